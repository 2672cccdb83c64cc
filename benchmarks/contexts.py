"Contexts and criteria on a deep, narrow network, at high sparsity: `python -m benchmarks.contexts` (about 20 minutes)"
import argparse, csv, time, warnings
from pathlib import Path
import torch, torch.nn as nn, torch.nn.functional as F
from fasterai_clone.digits import digits_dls
from fasterai_clone.sparse.all import Schedule, Sparsifier, large_final, sched_agp
from fasterai_clone.sparse.measure import snip, synflow
from fasterai_clone.sparse.paths import passes_signal
from fasterai_clone.sparse.signal import LayerCollapse
from .timing import machine

WIDTHS  = (16, 16, 32, 32, 64, 64, 16, 16, 64, 64, 32, 32)  # filters of each convolution; the narrow ones are a waist
HALVES  = (2, 6)                                            # which of them halve the image: 8×8, 4×4, 2×2
METHODS = dict(magnitude=('global', large_final), snip=('global', snip), synflow=('global', synflow),
               lamp=('lamp', large_final), erk=('erk', large_final), uniform=('local', large_final))
REGIMES = dict(
    # masks, then training
    init    = dict(methods=tuple(METHODS), sparsities=(90, 95, 98, 99, 99.5)),
    # the same, from normal weights
    kaiming = dict(methods=('magnitude', 'synflow', 'erk', 'uniform'), sparsities=(90, 95, 98, 99, 99.5)),
    # masks while training, by `agp`
    gradual = dict(methods=('magnitude', 'lamp', 'erk', 'uniform'), sparsities=(95, 98, 99)))
FIELDS  = 'regime method sparsity seed weights zeros smallest empty passes accuracy'.split()

def images():
    "Return training and validation digits, each as `(x, y)`"
    dls = digits_dls()
    return [tuple(map(torch.stack, zip(*dl.dataset))) for dl in (dls.train, dls.valid)]

def deep_net(seed, init=None):
    "Stack twelve convolutions without shortcuts; `init(weight)` initialises them (None: as PyTorch does)"
    torch.manual_seed(seed)
    blocks, i = [], 1
    for k,o in enumerate(WIDTHS):
        blocks += [nn.Conv2d(i, o, 3, stride=2 if k in HALVES else 1, padding=1, bias=False),
                   nn.BatchNorm2d(o), nn.ReLU()]
        if init: init(blocks[-3].weight)
        i = o
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(i, 10))

def sparsifier(net, method, batch):
    "Prune single weights of the convolutions, as listed in `METHODS`"
    context, criteria = METHODS[method]
    return Sparsifier(net, 'weight', context, criteria, data=batch, loss_func=F.cross_entropy)

def kept(net): return [int(m.weight.count_nonzero()) for m in net if isinstance(m, nn.Conv2d)]

def fit(net, data, seed, sp=None, sparsity=None, epochs=8, bs=64, lr=1e-2):
    """Train and return the accuracy in percent; hold the zeros of `sp`, or with a `sparsity` reach it by `agp` at three
    quarters"""
    (x, y), (vx, vy) = data
    torch.manual_seed(seed)
    opt, steps, done = torch.optim.Adam(net.parameters()), len(x)//bs * epochs, 0
    warm, gradual = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps), Schedule(sched_agp, end_pct=0.75)
    hold = sp.hold(opt) if sp else None
    net.train()
    for _ in range(epochs):
        for b in torch.randperm(len(x))[:len(x)//bs * bs].split(bs):
            F.cross_entropy(net(x[b]), y[b]).backward()
            opt.step(), opt.zero_grad(), warm.step()
            done += 1
            if sparsity is not None: sp.sparsify_model(gradual.sparsity(done/steps, sparsity))
    if hold: hold.release()
    net.eval()
    with torch.no_grad(): return 100 * (net(vx).argmax(1) == vy).float().mean().item()

def row(regime, method, sparsity, seed, data):
    "Prune and train one network; return its counted masks and its accuracy"
    net, (x, y) = deep_net(seed, nn.init.kaiming_normal_ if regime == 'kaiming' else None), data[0]
    sp = None if method == 'dense' else sparsifier(net, method, (x[:128], y[:128]))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', LayerCollapse)
        if regime in ('init', 'kaiming'): sp.sparsify_model(sparsity)
        then     = kept(net), all(passes_signal(net, x[:1]).values())
        accuracy = fit(net, data, seed, sp, sparsity if regime == 'gradual' else None)
    left, passes = (kept(net), all(passes_signal(net, x[:1]).values())) if regime == 'gradual' else then
    total = sum(m.weight.numel() for m in net if isinstance(m, nn.Conv2d))
    counted = total, total - sum(left), min(left), left.count(0), int(passes)
    return dict(zip(FIELDS, (regime, method, sparsity, seed, *counted, round(accuracy, 2))))

def main():
    p = argparse.ArgumentParser(prog='python -m benchmarks.contexts', description=__doc__)
    p.add_argument('--seeds', type=int, default=7)
    p.add_argument('--out', type=Path, default=Path('benchmarks/results/contexts.csv'))
    args = p.parse_args()
    torch.set_num_threads(1)
    data, start, rows = images(), time.perf_counter(), []
    about = {k: v for k,v in machine('cpu').items() if k in ('date', 'cpu', 'python', 'torch', 'numpy',
                                                             'fasterai-clone')}
    for seed in range(args.seeds):
        rows.append(row('dense', 'dense', 0, seed, data))
        for regime, what in REGIMES.items():
            rows += [row(regime, m, s, seed, data) for s in what['sparsities'] for m in what['methods']]
        print(f'seed {seed} done, {time.perf_counter() - start:.0f} s', flush=True)
    about |= dict(seeds=args.seeds, minutes=round((time.perf_counter() - start) / 60, 1))
    with open(args.out, 'w', newline='', encoding='utf-8') as f:
        f.writelines(f'# {k}: {v}\n' for k,v in about.items())
        writer = csv.DictWriter(f, FIELDS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)

if __name__ == '__main__': main()
