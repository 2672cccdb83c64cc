"How long it takes to make ResNet-50 sparse: build, choose, zero: `python -m benchmarks.building` (about 2 minutes)"
import argparse, csv, time
from pathlib import Path
import torch
from torch import nn
from fasterai_clone.core.selection import keep_masks
from fasterai_clone.sparse.all import Sparsifier
from .models import layers, resnet
from .timing import installed, interleave, machine, spread, timed

FIELDS = 'threads contestant unit median min max'.split()
SPARSITY = 90

class Sparsified:
    "Make the same dense network sparse again and again, by a function of the model"
    def __init__(self, model, make):
        self.model, self.make = model, make
        self.weights = [m.weight.data for m in layers(model)]
        self.dense = [w.clone() for w in self.weights]

    def __call__(self):
        "Seconds; the dense weights are put back first, which is not timed"
        for w,dense in zip(self.weights, self.dense): w.copy_(dense)
        return timed(lambda: self.make(self.model), 'cpu')[0]

def ours(model): Sparsifier(model, 'weight', 'global').sparsify_model(SPARSITY)

def theirs(model):
    from fasterai.core.criteria import large_final
    from fasterai.sparse.sparsifier import Sparsifier as Theirs
    Theirs(model, 'weight', 'global', large_final, layer_type=nn.Conv2d).sparsify_model(SPARSITY / 100)

def jobs():
    "Contestant → seconds of one call"
    model = resnet(50)
    all_weights = torch.cat([m.weight.detach().flatten() for m in layers(model)])
    parts, n = [m.weight.detach().clone() for m in layers(model)], all_weights.numel() * SPARSITY // 100
    runs = {'one pass of torch.gt': lambda: timed(lambda: torch.gt(all_weights, 0.01), 'cpu')[0],
            'Sparsifier, build': lambda: timed(lambda: Sparsifier(model, 'weight', 'global'), 'cpu')[0],
            'selection alone': lambda: timed(lambda: keep_masks(parts, n, magnitude=True), 'cpu')[0],
            'Sparsifier, build and sparsify': Sparsified(model, ours)}
    if installed('fasterai') != 'not installed': runs['fasterai 0.4.1, the same'] = Sparsified(resnet(50), theirs)
    return runs, parts, n

def rows(threads, rounds):
    "Seconds of each contestant, and in passes of torch.gt in the same round"
    torch.set_num_threads(threads)
    runs, *_ = jobs()
    results, failed = interleave(runs, rounds)
    if failed: raise RuntimeError(failed)
    base = results['one pass of torch.gt']
    for k,v in results.items(): yield threads, k, 'seconds', *spread(v)
    for k,v in results.items(): yield threads, k, 'passes', *spread([a/b for a,b in zip(v, base)])

def identical(counts):
    "Are the masks the same for each number of threads?"
    _, parts, n = jobs()
    masks = []
    for threads in counts:
        torch.set_num_threads(threads)
        masks.append(keep_masks(parts, n, magnitude=True))
    return all(torch.equal(a, b) for other in masks for a,b in zip(masks[0], other))

def main():
    p = argparse.ArgumentParser(prog='python -m benchmarks.building', description=__doc__)
    p.add_argument('--rounds', type=int, default=11)
    p.add_argument('--threads', type=int, nargs='+', default=[1, 2])
    p.add_argument('--out', type=Path, default=Path('benchmarks/results/building.csv'))
    args = p.parse_args()
    start = time.perf_counter()
    known = 'date', 'cpu', 'cores', 'load', 'python', 'torch', 'torchvision', 'fasterai-clone', 'fasterai', 'numpy'
    about = {k: v for k,v in machine('cpu').items() if k in known}
    about |= dict(same_masks_for_all_threads=identical(args.threads), rounds=args.rounds)
    table = [(*r[:3], *[f'{v:.4g}' for v in r[3:]]) for n in args.threads for r in rows(n, args.rounds)]
    about |= dict(minutes=round((time.perf_counter() - start) / 60, 1))
    with open(args.out, 'w', newline='', encoding='utf-8') as f:
        f.writelines(f'# {k}: {v}\n' for k,v in about.items())
        csv.writer(f, lineterminator='\n').writerows([FIELDS, *table])
    for r in table: print(*r)

if __name__ == '__main__': main()
