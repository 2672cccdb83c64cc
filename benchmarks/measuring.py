"""What each score and context costs beside local magnitude and the passes it measures with:
`python -m benchmarks.measuring` (about 5 minutes on one thread)"""
import argparse, csv, gc, os, subprocess, sys, time
from functools import partial
from pathlib import Path
import torch, torch.nn as nn, torch.nn.functional as F
from fasterai_clone.sparse.all import Sparsifier
from .child import peak
from .timing import interleave, spread

FIELDS = 'network contestant weights passes seconds beyond beyond_min beyond_max over_passes bytes_per_weight'.split()
REFERENCE = 'large_final, local'
SPARSITY, LESS = 90, {'2:4': 50, 'synflow, global': 50}  # SynFlow measures 14 times up to 50 %, 45 times up to 90 %
# contestant → arguments of `Sparsifier`
CONTESTANTS = {
    REFERENCE: dict(), 'large_final, global': dict(context='global'), 'lamp': dict(context='lamp'),
    'output': dict(context='output'), '2:4': dict(nm='2:4'), 'wanda, local': dict(criteria='wanda'),
    'wanda, output': dict(criteria='wanda', context='output'), 'snip, global': dict(criteria='snip', context='global'),
    'grasp, global': dict(criteria='grasp', context='global'),
    'synflow, global': dict(criteria='synflow', context='global')}

def resnet_case(images=16, size=64):
    "ResNet-50 and its data"
    from .models import resnet
    return resnet(50).eval(), torch.randn(images, 3, size, size), torch.randint(10, (images,)), nn.Conv2d

def linears_case(n=4, width=2048, tokens=256):
    "Linear layers as in language models, in bf16, and their data"
    model = nn.Sequential(*[nn.utils.skip_init(nn.Linear, width, width, bias=False, dtype=torch.bfloat16)
                            for _ in range(n)])
    for m in model: nn.init.normal_(m.weight, std=width**-.5)
    return model, torch.randn(tokens, width, dtype=torch.bfloat16), torch.randint(width, (tokens,)), nn.Linear

CASES = {'ResNet-50': resnet_case, 'bf16 linears': linears_case}

def forward(model, x, y):
    "One forward pass without gradients"
    with torch.no_grad(): model(x)

def both(model, x, y):
    "One forward and backward pass"
    loss = F.cross_entropy(model(x).float(), y)
    torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)

def curvature(model, x, y):
    "A forward and backward pass whose gradients are differentiated again"
    ws    = [*model.parameters()]
    loss  = F.cross_entropy(model(x).float() / 200, y)
    grads = torch.autograd.grad(loss, ws, create_graph=True)
    torch.autograd.grad(sum((g*g.detach()).sum() for g in grads), ws, allow_unused=True)

def rounds_of_synflow(model, x, y):
    "A forward and backward pass in fp64 on one example, as often as SynFlow measures up to 50 %"
    import copy, math
    model = copy.deepcopy(model).double()
    n, x  = math.ceil(math.log(2)/-math.log(.95)), x[:1].double()
    for _ in range(n): torch.autograd.grad(model(x).sum(), [*model.parameters()], allow_unused=True)

PASSES = {'wanda': forward, 'snip': both, 'grasp': curvature, 'synflow': rounds_of_synflow}

def passes_of(contestant):
    "Return the passes that a contestant measures with, or None"
    return PASSES.get(contestant.partition(',')[0])

def cpu_seconds(f):
    "Seconds of CPU time that `f()` takes, which other processes do not change much"
    start = time.process_time()
    f()
    return time.process_time() - start

class Job:
    "Make the same dense network sparse again and again"
    def __init__(self, model, x, y, kind, sparsity, **given):
        self.sparsity = sparsity
        odd = [k for k,m in model.named_modules() if isinstance(m, kind) and m.weight.shape[1] % 4]
        if 'nm' in given and odd: given['exclude'] = odd  # the first convolution has 3 inputs
        self.model, self.data, self.kind, self.given = model, [(x, y)], kind, given
        self.weights = [m.weight.data for m in model.modules() if isinstance(m, kind)]
        self.dense = [w.clone() for w in self.weights]

    def sparsify(self):
        sp = Sparsifier(self.model, layer_type=self.kind, data=self.data, loss_func=loss, **self.given)
        sp.sparsify_model(self.sparsity)

    def reset(self):
        "Make the network dense again"
        for w,dense in zip(self.weights, self.dense): w.copy_(dense)
        gc.collect()

    def __call__(self):
        "Seconds"
        self.reset()
        return cpu_seconds(self.sparsify)

    def peak(self):
        "Bytes per weight that the process takes in addition, at most"
        self.reset()
        before = peak('cpu', reset=True)
        self.sparsify()
        return (peak('cpu') - before) / sum(w.numel() for w in self.weights)

def loss(out, y): return F.cross_entropy(out.float(), y)

def wanted(only):
    "Return the names of the contestants"
    return [k for k in CONTESTANTS if k == REFERENCE or not only or any(o in k for o in only)]

def jobs_of(case, names, **size):
    "Contestant → `Job`, all with the same network, and that network with its data"
    model, x, y, kind = CASES[case](**size)
    jobs = {k: Job(model, x, y, kind, LESS.get(k, SPARSITY), **CONTESTANTS[k]) for k in names}
    for j in jobs.values(): j.dense = jobs[names[0]].dense
    return jobs, (model, x, y)

def peaks(args):
    "Case → contestant → bytes per weight, each from a process whose freed memory goes back to the system at once"
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_='1048576')  # which makes all that allocates slow: not for times
    def of(case, name):
        again = [sys.executable, '-m', 'benchmarks.measuring', '--peak', case, name,
                 '--linears', str(args.linears), '--width', str(args.width)]
        return float(subprocess.run(again, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return {c: {k: of(c, k) for k in wanted(args.only)} for c in args.cases}

def own_peak(case, name, args):
    "Return the bytes per weight of a contestant, after a small run for all that is made once"
    jobs_of('bf16 linears', [name], n=2, width=64)[0][name].sparsify()
    return jobs_of(case, [name], **sizes(case, args))[0][name].peak()

def sizes(case, args): return dict(n=args.linears, width=args.width) if case == 'bf16 linears' else {}

def measured(case, only, rounds, peaks, **size):
    "A row for each contestant"
    jobs, given = jobs_of(case, wanted(only), **size)
    runs = dict(jobs)
    for k in jobs:
        f = passes_of(k)
        if f: runs[f'passes of {f.__name__}'] = partial(cpu_seconds, partial(f, *given))
    results, failed = interleave(runs, rounds, rounds > 1)
    if failed: raise RuntimeError(failed)
    base = results[REFERENCE]
    for k,j in jobs.items():
        f = passes_of(k)
        free = results[f'passes of {f.__name__}'] if f else [0.]*rounds
        beyond = spread([(s - p)/b for s,p,b in zip(results[k], free, base)])
        n = sum(w.numel() for w in j.weights)
        over = f'{spread([s/p for s,p in zip(results[k], free)])[0]:.2f}' if f else ''
        yield (case, k, n, f'{spread(free)[0]:.2f}', f'{spread(results[k])[0]:.3f}', *(f'{v:.2f}' for v in beyond),
               over, f'{peaks[k]:.2f}')

def main():
    p = argparse.ArgumentParser(prog='python -m benchmarks.measuring', description=__doc__)
    p.add_argument('--out', type=Path, default=Path('benchmarks/results/measuring.csv'))
    p.add_argument('--cases', default=','.join(CASES))
    p.add_argument('--only', default='', help='parts of the names of contestants')
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--linears', type=int, default=4)
    p.add_argument('--width', type=int, default=2048)
    p.add_argument('--peak', nargs=2, metavar=('CASE', 'CONTESTANT'), help='print the peak of memory of one only')
    args = p.parse_args()
    args.cases, args.only = args.cases.split(','), [o for o in args.only.split(',') if o]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.peak: return print(own_peak(*args.peak, args))
    found = peaks(args)
    with open(args.out, 'w', newline='', encoding='utf-8') as file:
        out = csv.writer(file, lineterminator='\n')
        out.writerow(FIELDS)
        for case in args.cases:
            for row in measured(case, args.only, args.rounds, found[case], **sizes(case, args)):
                out.writerow(row), file.flush()
                print(*row, sep='\t', flush=True)

if __name__ == '__main__': main()
