"""Prune small trained networks without training, with and without repair: `python -m benchmarks.repair`
(digits, MNIST and a language model, five seeds; about 15 minutes of CPU on one thread)"""
import argparse, copy, csv, time
from functools import partial
from pathlib import Path
import torch
from fasterai_clone.methods.all import prune_trained, recalibrate, reconstruct
from fasterai_clone.sparse.all import Sparsifier
from .small import makers
from .timing import machine
from .trained import measured

FIELDS = 'network seed pruned contestant metric value zeros cpu_seconds forward_passes peak_mb'.split()
CASES  = {f'{s} %': (s, {}) for s in (50, 70, 80, 90)}
CASES |= {'2:4': (50, dict(nm=True)), 'half of the units': (50, dict(granularity='filter'))}

def masked(net, model, sparsity, **how):
    "Masks only"
    Sparsifier(model, data=net.calibration, **how).sparsify_model(sparsity)

def with_norms(net, model, sparsity, **how):
    "Masks, and batch norms re-estimated if there are any"
    masked(net, model, sparsity, **how)
    if any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        recalibrate(model, net.calibration)

def repaired(net, model, sparsity, **how):
    "Masks, repair, and batch norms re-estimated"
    return prune_trained(model, net.calibration, sparsity, progress=False, **how)

def shared_out(net, model, sparsity, **how):
    "SparseGPT in each layer, with as many zeros in it as magnitudes over all layers prune there; repair"
    sp = Sparsifier(copy.deepcopy(model), **net.wide, **net.which)
    sp.sparsify_model(sparsity)
    each = {t.layer: 100*float((~sp.masks[t.name]).double().mean()) for t in sp.targets}
    return repaired(net, model, each, **how)

def and_blocks(net, model, sparsity, **how):
    "The same, and 30 steps of Adam on each block"
    report = shared_out(net, model, sparsity, **how) if net.wide and 'nm' not in how else \
        repaired(net, model, sparsity, **how)
    reconstruct(model, report.sparsifier, net.calibration, 'block', dense=net.model, steps=30)

def contestants(net, case):
    "Name → function of a model"
    sparsity, pattern = CASES[case]
    units = pattern.get('granularity') == 'filter'
    which = net.units if units else net.which
    wide  = {} if pattern else net.wide
    rows  = {} if 'nm' in pattern else dict(context='output')
    def with_(f, **how): return lambda model: f(net, model, sparsity, **which, **pattern, **how)
    found = {'magnitude': with_(masked, **wide), 'magnitude, norms': with_(with_norms, **wide),
             'magnitude, prune_trained': with_(repaired, criteria='large_final', **wide)}
    if units: return found | {'magnitude, all layers repaired': with_(repaired, criteria='large_final', fit='all')}
    found |= {'wanda, norms': with_(with_norms, criteria='wanda', **rows),
              'sparsegpt, prune_trained': with_(shared_out if wide else repaired)}
    if net.metric == 'perplexity': found['sparsegpt, prune_trained, blocks'] = with_(and_blocks)
    return found

def one_pass(net):
    "CPU seconds of a forward pass over the calibration data"
    start = time.process_time()
    with torch.no_grad():
        for b, in net.calibration: net.model(b)
    return time.process_time() - start

def rows(name, make, seed, cases):
    "A row for each case and contestant"
    net  = make(seed)
    unit = min(one_pass(net) for _ in range(3))
    yield name, seed, 'nothing', 'dense', net.metric, f'{net.score(net.model, net.test):.3f}', 0, 0, 0, 0
    for case in cases:
        for k,prune in contestants(net, case).items():
            value, zeros, seconds, peak = measured(prune, net.model, partial(net.score, batch=net.test))
            yield (name, seed, case, k, net.metric, f'{value:.3f}', f'{zeros:.2f}', f'{seconds:.2f}',
                   f'{seconds/unit:.1f}', f'{peak/2**20:.0f}')

def main():
    p = argparse.ArgumentParser(prog='python -m benchmarks.repair', description=__doc__)
    p.add_argument('--out', type=Path, default=Path('benchmarks/results/repair.csv'))
    p.add_argument('--data', type=Path, help='folder with the four .gz files of MNIST; default: download them')
    p.add_argument('--networks', default='all', help=f'of {", ".join(makers())}; separated by commas')
    p.add_argument('--cases', default='all', help=f'of {", ".join(CASES)}; separated by commas')
    p.add_argument('--seeds', type=int, default=5)
    args = p.parse_args()
    torch.set_num_threads(1)
    make  = makers(args.data)
    names = [*make] if args.networks == 'all' else args.networks.split(',')
    cases = [*CASES] if args.cases == 'all' else args.cases.split(',')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, 'w', newline='', encoding='utf-8') as file:
        for k,v in machine('cpu').items(): print(f'# {k}: {v}', file=file)
        out = csv.writer(file, lineterminator='\n')
        out.writerow(FIELDS)
        for name in names:
            for seed in range(args.seeds):
                for row in rows(name, make[name], seed, cases):
                    out.writerow(row), file.flush()
                    print(*row, sep='\t', flush=True)

if __name__ == '__main__': main()
