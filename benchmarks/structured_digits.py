"""Prune half of the filters of a digits net during training, then remove them: `python -m benchmarks.structured_digits`
(about 4 minutes)"""
import argparse, copy, csv, time
from pathlib import Path
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, set_seed
import fastai.callback.schedule  # noqa: F401, gives a learner `fit_one_cycle`
from fasterai_clone.digits import digits_dls, digits_net
from fasterai_clone.prune.all import compare, thin
from fasterai_clone.sparse.all import Sparsifier, SparsifyCallback, agp
from .timing import machine

WIDTH, EPOCHS, LR, SPARSITY = 16, 15, 5e-3, 50
END = 9  # pruning is done by this epoch; six are left for recovery
FIELDS = 'seed kind correct of accuracy params multiply_adds file speedup_1 speedup_64 changed difference'.split()
EXAMPLE = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))

def trained(seed, width=WIDTH, cbs=None):
    "Train a digits net for `EPOCHS` and return it in eval mode"
    set_seed(seed, reproducible=True)
    learn = Learner(digits_dls(), digits_net(width), loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(EPOCHS, LR, cbs=cbs)
    return learn.model.eval()

def pruning(end): return SparsifyCallback(SPARSITY, 'filter', schedule=agp, end_epoch=end, verbose=False)

def zeroed(net):
    "Prune half of the filters of `net` by magnitude, at once and without training"
    Sparsifier(net, 'filter').sparsify_model(SPARSITY)
    return net

@torch.no_grad()
def outputs(net):
    "What `net` gives for the validation digits, and what they are"
    x, y = map(torch.stack, zip(*digits_dls().valid.dataset))
    return net(x), y

def row(seed, kind, dense, net, masked=None):
    "What one network does and costs, beside the `dense` one and the `masked` one that it is to equal"
    (out, y), costs = outputs(net), compare(dense, net, EXAMPLE, devices=[])
    speed   = [compare(dense, net, EXAMPLE[:n], runs=30, devices='cpu').speedup()[0] for n in (1, 64)]
    same    = out if masked is None else outputs(masked)[0]
    changed = int((out.argmax(1) != same.argmax(1)).sum()), ((out - same).abs().max() / same.abs().max()).item()
    correct = int((out.argmax(1) == y).sum())
    c = costs.after
    return dict(zip(FIELDS, (seed, kind, correct, len(y), round(100*correct/len(y), 2), c.params,
                             c.multiply_adds, c.file, *[round(s, 3) for s in speed], changed[0], f'{changed[1]:.1e}')))

def rows(seed):
    "A row for each kind of network"
    dense, masked, late = trained(seed), trained(seed, cbs=pruning(END)), trained(seed, cbs=pruning(EPOCHS))
    yield row(seed, 'dense', dense, dense)
    yield row(seed, 'masked', dense, masked)
    yield row(seed, 'thinned', dense, thin(masked, example_inputs=EXAMPLE), masked)
    yield row(seed, 'thinned, no time to recover', dense, thin(late, example_inputs=EXAMPLE), late)
    yield row(seed, 'narrow from the start', dense, trained(seed, WIDTH//2))
    zero = zeroed(copy.deepcopy(dense))
    yield row(seed, 'pruned after training', dense, thin(zero, example_inputs=EXAMPLE), zero)

def main():
    p = argparse.ArgumentParser(prog='python -m benchmarks.structured_digits', description=__doc__)
    p.add_argument('--seeds', type=int, default=10)
    p.add_argument('--out', type=Path, default=Path('benchmarks/results/structured_digits.csv'))
    args = p.parse_args()
    torch.set_num_threads(1)
    start, table = time.perf_counter(), []
    about = {k: v for k,v in machine('cpu').items() if k in ('date', 'cpu', 'threads', 'load', 'python', 'torch',
                                                             'fastai', 'fasterai-clone')}
    for seed in range(args.seeds):
        table += rows(seed)
        print(f'seed {seed} done, {time.perf_counter() - start:.0f} s', flush=True)
    about |= dict(seeds=args.seeds, epochs=EPOCHS, end=END, lr=LR, width=WIDTH,
                  minutes=round((time.perf_counter() - start) / 60, 1))
    with open(args.out, 'w', newline='', encoding='utf-8') as f:
        f.writelines(f'# {k}: {v}\n' for k,v in about.items())
        writer = csv.DictWriter(f, FIELDS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(table)

if __name__ == '__main__': main()
