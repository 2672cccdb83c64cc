"""Where to prune a trained network: allocated sparsities beside uniform, global, ERK and LAMP at equal zeros, without
training afterwards: `python -m benchmarks.allocation` (about a minute)"""
import argparse, csv
from pathlib import Path
from statistics import mean
import torch, torch.nn as nn
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, set_seed
from fastai.callback import progress, schedule  # noqa: F401, give `Learner` its `no_bar` and `fit_one_cycle`
from fasterai_clone.analyze.all import allocate, evaluate, judge_by, refine, sensitivity
from fasterai_clone.digits import digits_dls, digits_net
from fasterai_clone.sparse.all import Sparsifier

FIELDS = 'seed sparsity method zeros accuracy'.split()
LEVELS = 10, 20, 30, 40, 50, 60, 70, 75, 80, 85, 90, 95, 98
LAYERS = dict(layer_type=(nn.Conv2d, nn.Linear))

def trained(seed, epochs):
    "A digits net, and two halves of what it was not trained on: to allocate with, and to report on"
    set_seed(seed, reproducible=True)
    learn = Learner(digits_dls(), digits_net(), loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-2)
    x, y = map(torch.cat, zip(*[b for b in learn.dls.valid]))
    x, y = x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)
    return learn.model.eval(), (x[::2], y[::2]), (x[1::2], y[1::2])

def pruned(model, test, sparsity, context='local'):
    "Zeros and test accuracy of the model at `sparsity`; its weights come back"
    was = {k: v.clone() for k,v in model.state_dict().items()}
    sp  = Sparsifier(model, context=context, **LAYERS)
    sp.sparsify_model(sparsity)
    found = sum(int((p == 0).sum()) for p in sp.params.values()), 100*evaluate(model, test, accuracy)
    model.load_state_dict(was)
    return found

def rows(seed, sparsities, epochs):
    "A row for each sparsity and method"
    model, held, test = trained(seed, epochs)
    sp    = Sparsifier(model, **LAYERS)
    total = sum(p.numel() for p in sp.params.values())
    def loss(out, y): return nn.functional.cross_entropy(out, y)
    yield seed, 0, 'dense', 0, f'{100*evaluate(model, test, accuracy):.2f}'
    curves = sensitivity(model, held, loss, LEVELS, progress=False, **LAYERS)
    judge  = judge_by(sp, held, loss, lower=True)
    for s in sparsities:
        each = allocate(curves, s)
        zeros, found = pruned(model, test, each)
        yield seed, s, 'allocated', zeros, f'{found:.2f}'
        better = refine(each, curves, judge, tries=60)
        n, found = pruned(model, test, better)
        yield seed, s, 'allocated, swaps', n, f'{found:.2f}'
        same = 100*max(zeros, n)/total + 1e-9  # the others get as many zeros
        for name,context in (('uniform', 'local'), ('global', 'global'), ('ERK', 'erk'), ('LAMP', 'lamp')):
            n, found = pruned(model, test, same, context)
            yield seed, s, name, n, f'{found:.2f}'

def main():
    p = argparse.ArgumentParser(prog='python -m benchmarks.allocation', description=__doc__)
    p.add_argument('--out', type=Path, default=Path('benchmarks/results/allocation.csv'))
    p.add_argument('--sparsities', default='70,80,90')
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--epochs', type=int, default=8)
    args = p.parse_args()
    torch.set_num_threads(1)
    found = [r for seed in range(args.seeds) for r in rows(seed, [*map(int, args.sparsities.split(','))], args.epochs)]
    with open(args.out, 'w', newline='', encoding='utf-8') as file:
        csv.writer(file, lineterminator='\n').writerows([FIELDS, *found])
    for s,name in dict.fromkeys((r[1], r[2]) for r in found):
        right = [float(r[4]) for r in found if r[1:3] == (s, name)]
        print(f'{s:3} {name:20} {mean(right):6.2f}  {min(right):6.2f} to {max(right):6.2f}')

if __name__ == '__main__': main()
