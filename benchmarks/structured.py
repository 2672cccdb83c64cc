"""Half of the filters of ResNet-18 out, with what is coupled to them: ours beside Torch-Pruning:
`python -m benchmarks.structured` (about a minute)"""
import argparse, copy, csv, time
from pathlib import Path
import torch, torch.nn as nn
from fasterai_clone.prune.all import channel_scores, compare, coupled_groups, coupled_masks, thin
from .models import resnet
from .timing import installed, interleave, machine, spread, timed

SPARSITY = 50
FIELDS   = 'measure contestant unit median min max'.split()
COUNTED  = (('parameters', 'params', 'number'), ('multiply-adds', 'multiply_adds', 'one image'),
            ('activations', 'activations', 'bytes'),
            ('file', 'file', 'bytes'))

def lively_resnet(seed=0):
    "Random weights, and random norms too: with those of a new network many differences would be times zero"
    torch.manual_seed(seed)
    model = resnet(18)
    for m in model.modules():
        if not isinstance(m, nn.BatchNorm2d): continue
        for t in (m.weight.data, m.running_var): t.uniform_(0.5, 1.5)
        for t in (m.bias.data, m.running_mean): t.normal_(std=0.3)
    return model.eval()

def ours(model, x, **kwargs):
    "Masks for the smallest half of each coupled group, and the network without it"
    groups = coupled_groups(model, x)
    masks  = coupled_masks(groups, channel_scores(groups, {k: p.detach().square() for k,p in model.named_parameters()}),
                           SPARSITY)
    return thin(model, masks, x, **kwargs), masks

def theirs(model, x):
    "What Torch-Pruning's pruner leaves of a copy of `model`, and what it took: (module name, output channels)"
    import torch_pruning as tp
    small  = copy.deepcopy(model)
    pruner = tp.pruner.MagnitudePruner(small, x, tp.importance.GroupMagnitudeImportance(p=2),
                                       pruning_ratio=SPARSITY/100, ignored_layers=[small.fc])
    names, taken = {m: n for n,m in small.named_modules()}, []
    for group in pruner.step(interactive=True):
        taken += [(names[dep.layer], idxs) for dep,idxs in group
                  if dep.layer in names and 'out_channels' in dep.pruning_fn.__name__]
        group.prune()
    return small, taken

@torch.no_grad()
def masked(model, masks=None, taken=()):
    "A copy of `model` with the `masks` applied, and the output channels in `taken` zero"
    model = copy.deepcopy(model)
    if masks: masks.apply(dict(model.named_parameters()))
    for name,channels in taken:
        for p in model.get_submodule(name).parameters(recurse=False): p[channels] = 0
    return model

@torch.no_grad()
def difference(a, b, x, dtype):
    "The largest difference of outputs, relative to the largest output"
    a, b = (copy.deepcopy(m).to(dtype)(x.to(dtype)) for m in (a, b))
    return ((a - b).abs().max() / a.abs().max()).item()

def pruning_times(model, x, rounds):
    jobs = {'ours': lambda: timed(lambda: ours(model, x), 'cpu')[0],
            'ours, outputs not compared': lambda: timed(lambda: ours(model, x, check=False), 'cpu')[0],
            'Torch-Pruning': lambda: timed(lambda: theirs(model, x), 'cpu')[0]}
    return interleave(jobs, rounds)[0]

@torch.no_grad()
def latencies(models, x, rounds):
    return interleave({k: lambda m=m: timed(lambda: m(x), 'cpu')[0] for k,m in models.items()}, rounds)[0]

def table(rounds):
    "All rows"
    model, x = lively_resnet(), torch.randn(1, 3, 224, 224)
    (small, masks), (peer, taken) = ours(model, x), theirs(model, x)
    zeros  = {'ours': masked(model, masks), 'Torch-Pruning': masked(model, taken=taken)}
    models = {'dense': copy.deepcopy(model), 'masked': zeros['ours'], 'ours': small, 'Torch-Pruning': peer}
    costs  = {k: compare(model, m, x, devices=[]).after for k,m in models.items()}
    rows   = [(what, k, unit, *[getattr(c, key)]*3) for what,key,unit in COUNTED for k,c in costs.items()]
    images = torch.randn(4, 3, 224, 224)
    for dtype in (torch.float64, torch.float32):
        rows += [(f'difference to masked, {str(dtype)[6:]}', k, 'relative',
                  *[difference(zeros[k], models[k], images, dtype)]*3) for k in zeros]
    for batch,few in ((1, 1), (16, 3)):
        results = latencies({**models, 'dense, again': copy.deepcopy(model)}, torch.randn(batch, 3, 224, 224),
                            max(3, rounds//few))
        rows   += [(f'latency, batch of {batch}', k, 'seconds', *spread(v)) for k,v in results.items()]
        rows   += [(f'speed-up, batch of {batch}', k, 'ratio within a round',
                    *spread([d/s for d,s in zip(results['dense'], v)]))
                   for k,v in results.items()]
    return rows + [('time to prune, 64×64 image', k, 'seconds', *spread(v))
                   for k,v in pruning_times(model, x[:, :, :64, :64], 5).items()]

def main():
    p = argparse.ArgumentParser(prog='python -m benchmarks.structured', description=__doc__)
    p.add_argument('--rounds', type=int, default=30, help='forward passes of one image to time')
    p.add_argument('--out', type=Path, default=Path('benchmarks/results/structured.csv'))
    args = p.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    about = {k: v for k,v in machine('cpu').items() if k in ('date', 'cpu', 'threads', 'load', 'python', 'torch',
                                                             'torchvision', 'fasterai-clone')}
    rows  = table(args.rounds)
    about |= {'torch-pruning': installed('torch-pruning'), 'rounds': args.rounds,
              'seconds': round(time.perf_counter() - start)}
    with open(args.out, 'w', newline='', encoding='utf-8') as f:
        f.writelines(f'# {k}: {v}\n' for k,v in about.items())
        writer = csv.writer(f, lineterminator='\n')
        writer.writerows([FIELDS, *[(*r[:3], *[f'{v:.6g}' if isinstance(v, float) else v for v in r[3:]])
                                    for r in rows]])

if __name__ == '__main__': main()
