"""The classic study, over seeds: dense, at once, in steps, gradually, for equal epochs:
`python -m benchmarks.schedules` (about 5 minutes on an idle core)"""
import argparse, copy, csv, time
from functools import partial
from pathlib import Path
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, set_seed
import fastai.callback.schedule  # noqa: F401, gives a learner `fit_one_cycle`
from fasterai_clone.digits import digits_dls, digits_net
from fasterai_clone.sparse.all import Sparsifier, SparsifyCallback, agp, iterative, one_shot
from .timing import machine

EPOCHS, LR, SPARSITIES = 10, 1e-2, (80, 90, 95, 98)
KINDS  = {'one-shot': one_shot, 'iterative': iterative, 'gradual': agp,
          'iterative, done at 70 %': partial(iterative, end_pct=0.7),
          'gradual, done at 70 %': partial(agp, end_pct=0.7)}
FIELDS = 'seed kind sparsity weights zeros accuracy'.split()

def trained(seed, cbs=None, epochs=EPOCHS, lr=LR, width=16, bs=64):
    "A learner that has trained a digits net; `seed` gives its first weights and the order of its batches"
    set_seed(seed, reproducible=True)
    learn = Learner(digits_dls(bs), digits_net(width), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr, cbs=cbs)
    return learn

def percent(learn):
    "Validation accuracy, measured now"
    with learn.no_bar(), learn.no_logging(): return round(100*learn.validate()[1], 2)

def counted(sp):
    "Weights of the targets, and how many are zero"
    return sum(t.weight.numel() for t in sp.targets), sum(t.weight.numel() - int(t.weight.count_nonzero())
                                                          for t in sp.targets)

def rows(seed):
    "A row for each training, and for the dense network pruned after it"
    dense = trained(seed)
    yield seed, 'dense', 0, *counted(Sparsifier(dense.model)), percent(dense)
    for s in SPARSITIES:
        learn = Learner(dense.dls, copy.deepcopy(dense.model), loss_func=dense.loss_func, metrics=accuracy)
        sp = Sparsifier(learn.model, 'weight', 'global')
        sp.sparsify_model(s)
        yield seed, 'after training', s, *counted(sp), percent(learn)
        for k,schedule in KINDS.items():
            cb = SparsifyCallback(s, 'weight', 'global', schedule=schedule, verbose=False)
            learn = trained(seed, cb)
            yield seed, k, s, *counted(cb.sparsifier), percent(learn)

def study(name, doc, rows, fields, seeds, **about):
    "Run `rows` for each seed and write what they give to a table in `results`"
    p = argparse.ArgumentParser(prog=f'python -m benchmarks.{name}', description=doc)
    p.add_argument('--seeds', type=int, default=seeds)
    p.add_argument('--out', type=Path, default=Path(f'benchmarks/results/{name}.csv'))
    args = p.parse_args()
    torch.set_num_threads(1)
    start, table = time.perf_counter(), []
    kept = 'date', 'cpu', 'python', 'torch', 'fastai', 'numpy', 'fasterai-clone'
    about = {k: v for k,v in machine('cpu').items() if k in kept} | about
    for seed in range(args.seeds):
        table += rows(seed)
        so_far = about | dict(seeds=seed + 1, minutes=round((time.perf_counter() - start) / 60, 1))
        with open(args.out, 'w', newline='', encoding='utf-8') as f:
            f.writelines(f'# {k}: {v}\n' for k,v in so_far.items())
            csv.writer(f, lineterminator='\n').writerows([fields, *table])
        print(f'seed {seed} done, {time.perf_counter() - start:.0f} s', flush=True)

if __name__ == '__main__': study('schedules', __doc__, rows, FIELDS, 7, epochs=EPOCHS, lr=LR)
