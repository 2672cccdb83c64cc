"""What makes a network faster, smaller or quicker to train, and what does not: `python -m benchmarks.faster` (about 8
minutes)"""
import argparse, copy, csv, io, tempfile, time, warnings, zipfile
from pathlib import Path
import torch, torch.nn as nn, torch.nn.functional as F
from safetensors.torch import save_file
from fasterai_clone.sparse.all import Sparsifier
from .models import resnet
from .structured import lively_resnet, ours
from .timing import interleave, machine, spread, timed

FIELDS = 'part case contestant unit median min max'.split()
SPARSITIES = 50, 80, 90, 95, 99

def sparse(model, sparsity, **kwargs):
    "A copy of `model` with so many percent of the weights of each convolution zero, and its masks"
    model = copy.deepcopy(model)
    sp = Sparsifier(model, **kwargs)
    sp.sparsify_model(sparsity)
    return model, sp.masks

def in_turns(part, case, jobs, rounds, reference, calls=1):
    """Seconds of each of `jobs`, the least of so many `calls` each, and how much faster each is than `reference` in the
    same round"""
    results, failed = interleave({k: lambda f=f: min(timed(f, 'cpu')[0] for _ in range(calls)) for k,f in jobs.items()},
                                 rounds)
    if failed: raise RuntimeError(f'{part}, {case}: {failed}')
    for k,v in results.items(): yield part, case, k, 'seconds', *spread(v)
    for k,v in results.items():
        yield part, case, k, 'times as fast', *spread([a/b for a,b in zip(results[reference], v)])

@torch.inference_mode()
def networks(rounds):
    "Forward passes of ResNet-18"
    model, x = lively_resnet(), torch.randn(1, 3, 224, 224)
    halved   = sparse(model, 50, granularity='filter')[0].eval()
    with torch.inference_mode(False): thinned = ours(model, x)[0]
    models = {'dense': model, 'dense, again': copy.deepcopy(model),
              **{f'{s} % of weights zero': sparse(model, s)[0] for s in (90, 99)},
              '2:4 zeros, dense tensors': sparse(model, 50, nm=True, exclude='conv1')[0],
              '50 % of filters zero': halved, '50 % of filters out': thinned}
    for batch,few in ((1, 1), (16, 4)):
        x = torch.randn(batch, 3, 224, 224)
        jobs = {k: lambda m=m: m(x) for k,m in models.items()}
        yield from in_turns('network', f'batch of {batch}', jobs, max(5, rounds//few), 'dense', calls=3)

def layouts(n, sparsity, block):
    "A weight of `n` × `n` with so many percent zero, dense and in the layouts torch has for it"
    torch.manual_seed(0)
    layer, blocks = nn.Linear(n, n, bias=False), nn.Linear(n, n, bias=False)
    Sparsifier(layer, layer_type=nn.Linear).sparsify_model(sparsity)
    Sparsifier(blocks, f'block_{block}x{block}', layer_type=nn.Linear).sparsify_model(sparsity)
    w, b = layer.weight.detach(), blocks.weight.detach()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # torch: sparse CSR is in beta
        return {'dense': w, 'dense, again': w.clone(), 'CSR': w.to_sparse_csr(),
                f'BSR, blocks of {block}×{block}': b.to_sparse_bsr(block)}

@torch.inference_mode()
def matrices(rounds):
    "Linear layers: dense against torch's sparse layouts"
    for n in (1024, 4096):
        for s in SPARSITIES:
            with torch.inference_mode(False): weights = layouts(n, s, 16)
            for batch in (1, 64):
                x = torch.randn(batch, n).t().contiguous()
                jobs = {k: lambda w=w: w @ x for k,w in weights.items()}
                yield from in_turns('matrix', f'{n} × {n}, batch of {batch}, {s} %', jobs, rounds, 'dense', calls=7)

def zipped(path):
    "Bytes of the file at `path` in a zip archive"
    data = io.BytesIO()
    with zipfile.ZipFile(data, 'w', zipfile.ZIP_DEFLATED, compresslevel=6) as z: z.write(path, 'model')
    return data.tell()

def file_sizes():
    "Bytes of ResNet-18's weights, dense and sparse, plain and zipped; of masks; and of a thinned network"
    model = lively_resnet()
    with tempfile.TemporaryDirectory() as folder:
        def saved(m):
            save_file({k: v.contiguous() for k,v in m.state_dict().items()}, f'{folder}/model.safetensors')
            return Path(f'{folder}/model.safetensors')
        def rows(case, file, **more):
            sizes = {'safetensors': file.stat().st_size, 'safetensors, zipped': zipped(file), **more}
            return [('file', case, k, 'bytes', n, n, n) for k,n in sizes.items()]
        yield from rows('dense', saved(model))
        for s in (50, 90, 99):
            small, masks = sparse(model, s)
            bits = masks.save(f'{folder}/masks.safetensors').stat().st_size
            kept = masks.n - masks.n_dropped + sum(p.numel() for k,p in model.state_dict().items() if k not in masks)
            more = {'masks, one bit per weight': bits, 'masks and kept weights': bits + 4*kept}
            yield from rows(f'{s} % of weights zero', saved(small), **more)
        yield from rows('50 % of filters out', saved(ours(model, torch.randn(1, 3, 64, 64))[0]))

def steps(rounds):
    "The optimizer's step alone, of ResNet-18 with Adam, and a whole training step of four small images"
    x, y = torch.randn(4, 3, 64, 64), torch.randint(10, (4,))
    for sparsity in (90, 99):
        alone, whole = {}, {}
        for kind in ('no masks', 'hold', 'hold, compact'):
            torch.manual_seed(0)
            model = resnet(18)
            opt   = torch.optim.Adam(model.parameters(), 1e-4)
            if kind != 'no masks':
                sp = Sparsifier(model)
                sp.sparsify_model(sparsity)
                sp.hold(opt, compact='compact' in kind)
            def train(model=model, opt=opt):
                opt.zero_grad()
                F.cross_entropy(model(x), y).backward()
                opt.step()
            train()
            alone[kind], whole[kind] = opt.step, train
        yield from in_turns('step', f'the step alone, {sparsity} %', alone, rounds, 'no masks', calls=3)
        yield from in_turns('step', f'a training step, 4 images, {sparsity} %', whole, rounds, 'no masks')

PARTS = dict(network=networks, matrix=matrices, file=lambda rounds: file_sizes(), step=steps)

def main():
    p = argparse.ArgumentParser(prog='python -m benchmarks.faster', description=__doc__)
    p.add_argument('--rounds', type=int, default=11)
    p.add_argument('--only', nargs='+', choices=PARTS, default=list(PARTS),
                   help='parts to measure; rows of the others stay')
    p.add_argument('--out', type=Path, default=Path('benchmarks/results/faster.csv'))
    args = p.parse_args()
    torch.set_num_threads(1)
    start, table = time.perf_counter(), {}
    known = 'date', 'cpu', 'threads', 'load', 'python', 'torch', 'torchvision', 'fasterai-clone'
    about = {k: v for k,v in machine('cpu').items() if k in known}
    if len(args.only) < len(PARTS):
        lines = [l for l in args.out.read_text(encoding='utf-8').splitlines() if not l.startswith('#')]
        for row in csv.reader(lines): table.setdefault(row[0], []).append(row)
    for k in args.only:
        table[k] = [(*r[:4], *[f'{v:.6g}' if isinstance(v, float) else v for v in r[4:]])
                    for r in PARTS[k](args.rounds)]
        print(f'{k} done, {time.perf_counter() - start:.0f} s', flush=True)
    about |= dict(measured=' '.join(args.only), rounds=args.rounds, mkl=torch.backends.mkl.is_available(),
                  minutes=round((time.perf_counter() - start) / 60, 1))
    with open(args.out, 'w', newline='', encoding='utf-8') as f:
        f.writelines(f'# {k}: {v}\n' for k,v in about.items())
        csv.writer(f, lineterminator='\n').writerows([FIELDS, *[r for k in PARTS for r in table[k]]])

if __name__ == '__main__': main()
