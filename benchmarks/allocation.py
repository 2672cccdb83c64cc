"""Where to prune a trained network: allocated sparsities beside uniform, global, ERK and LAMP at equal zeros, without
training afterwards: `python -m benchmarks.allocation` (digits and a language model; about 8 minutes)"""
import argparse, csv
from pathlib import Path
from statistics import mean
import torch
from fasterai_clone.analyze.all import allocate, judge_by, refine, sensitivity
from fasterai_clone.sparse.all import Sparsifier
from .small import makers

FIELDS = 'network seed sparsity method zeros metric value'.split()
LEVELS = 10, 20, 30, 40, 50, 60, 70, 75, 80, 85, 90, 95, 98
NETWORKS = {'digits': (70, 80, 90), 'language model': (50, 70, 80, 90)}

def pruned(net, which, sparsity, context='local'):
    "Zeros and the score on test data of the model at `sparsity`; its weights come back"
    was = {k: v.clone() for k,v in net.model.state_dict().items()}
    sp  = Sparsifier(net.model, context=context, **which)
    sp.sparsify_model(sparsity)
    found = sum(int((p == 0).sum()) for p in sp.params.values()), net.score(net.model, net.test)
    net.model.load_state_dict(was)
    return found

def rows(name, make, seed, sparsities, tries):
    "A row for each sparsity and method"
    net   = make(seed)
    which = dict(net.which) if name == 'language model' else dict(layer_type=net.which['layer_type'])  # all layers
    sp    = Sparsifier(net.model, **which)
    total = sum(p.numel() for p in sp.params.values())
    yield name, seed, 0, 'dense', 0, net.metric, f'{net.score(net.model, net.test):.3f}'
    curves = sensitivity(net.model, net.held, net.loss, LEVELS, progress=False, **which).finer()
    judge  = judge_by(sp, net.held, net.loss, lower=True)
    for s in sparsities:
        def row(method, each, context='local'):
            n, found = pruned(net, which, each, context)
            zeros.append(n)
            return name, seed, s, method, n, net.metric, f'{found:.3f}'
        zeros = []
        each  = allocate(curves, s)
        yield row('allocated', each)
        yield row('allocated, swaps', refine(each, curves, judge, tries=tries))
        same = 100*max(zeros)/total + 1e-9  # the others get as many zeros
        for method,context in (('uniform', 'local'), ('global', 'global'), ('ERK', 'erk'), ('LAMP', 'lamp')):
            yield row(method, same, context)

def main():
    p = argparse.ArgumentParser(prog='python -m benchmarks.allocation', description=__doc__)
    p.add_argument('--out', type=Path, default=Path('benchmarks/results/allocation.csv'))
    p.add_argument('--networks', default='all', help=f'of {", ".join(NETWORKS)}; separated by commas')
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--tries', type=int, default=60, help='measurements of `refine`')
    args = p.parse_args()
    torch.set_num_threads(1)
    names = [*NETWORKS] if args.networks == 'all' else args.networks.split(',')
    with open(args.out, 'w', newline='', encoding='utf-8') as file:
        out = csv.writer(file, lineterminator='\n')
        out.writerow(FIELDS)
        found = []
        for name in names:
            for seed in range(args.seeds):
                for r in rows(name, makers()[name], seed, NETWORKS[name], args.tries):
                    found.append(r), out.writerow(r), file.flush()
    for name,s,method in dict.fromkeys((r[0], r[2], r[3]) for r in found):
        values = [float(r[6]) for r in found if (r[0], *r[2:4]) == (name, s, method)]
        print(f'{name} {s:3} {method:20} {mean(values):7.2f}  {min(values):6.2f} to {max(values):6.2f}')

if __name__ == '__main__': main()
