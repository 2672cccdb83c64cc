"Measure the file of a pruned ResNet-18, saved by this library and by others: `python -m benchmarks.sizes` (minutes)"
import argparse, csv, gzip, math, time
from pathlib import Path
from tempfile import TemporaryDirectory
import torch, torch.nn as nn
from safetensors.torch import save_file
from fasterai_clone.export.all import load_sparse, save_sparse
from fasterai_clone.export.streams import compressed
from fasterai_clone.sparse.all import Sparsifier
from .timing import machine

FIELDS = 'pruned file bytes of_dense save_seconds load_seconds'.split()
CASES  = {'nothing': None, **{f'{s} % of weights': (s, {}) for s in (50, 80, 90, 95, 99)}, 
          '2:4': (50, dict(nm=True, exclude='conv1')),
          '50 % of filters': (50, dict(granularity='filter', layer_type=nn.Conv2d))}

def pruned(sparsity=0, kwargs=None):
    "torchvision's ResNet-18 with random weights, of which so many are zero"
    from torchvision.models import resnet18
    torch.manual_seed(0)
    model = resnet18()
    if sparsity: Sparsifier(model, **{'layer_type': (nn.Conv2d, nn.Linear), **(kwargs or {})}).sparsify_model(sparsity)
    return model.state_dict()

def entropy_bound(state):
    "Return the entropy of each mask, as if its weights were independent, and of kept values as they are, in bytes"
    bits = 0
    for t in state.values():
        share = t.count_nonzero().item() / max(t.numel(), 1)
        bits += t.numel() * (share*8*t.element_size() - sum(p*math.log2(p) for p in (share, 1 - share) if p))
    return round(bits / 8)

def timed(f):
    "What `f` returns, and the seconds it took"
    start = time.perf_counter()
    out   = f()
    return out, time.perf_counter() - start

def rows(case, folder):
    "A row for each way to save it"
    state = pruned(*(CASES[case] or ()))
    torch.save(state, folder/'model.pth')
    save_file(state, folder/'dense.safetensors')
    dense = (folder/'dense.safetensors').read_bytes()
    sizes = {'torch.save': ((folder/'model.pth').stat().st_size,), 'safetensors': (len(dense),),
             'safetensors, gzip': (len(gzip.compress(dense, 6)),),
             'safetensors, zstd': (len(compressed(dense, 'zstd', 9)),)}
    for codec in ('zstd', 'deflate'):
        file, saving  = timed(lambda: save_sparse(state, folder/'sparse', codec=codec))
        back, loading = timed(lambda: load_sparse(file))
        if not all(torch.equal(back[k].view(torch.uint8), t.view(torch.uint8)) for k,t in state.items() if t.ndim):
            raise RuntimeError(f'{case}: other weights came back')
        sizes[f'save_sparse, {codec}'] = file.stat().st_size, f'{saving:.2f}', f'{loading:.2f}'
    sizes['entropy of the mask and values of 32 bits'] = (entropy_bound(state),)
    for k,(n, *seconds) in sizes.items(): yield case, k, n, f'{n/len(dense):.4f}', *seconds

def main():
    p = argparse.ArgumentParser(prog='python -m benchmarks.sizes', description=__doc__)
    p.add_argument('--out', type=Path, default=Path('benchmarks/results/sizes.csv'))
    args = p.parse_args()
    torch.set_num_threads(1)
    table = []
    with TemporaryDirectory() as folder:
        for case in CASES:
            table += (new := list(rows(case, Path(folder))))
            print(*new, sep='\n', flush=True)
    known = 'date', 'cpu', 'threads', 'load', 'python', 'torch', 'torchvision', 'fasterai-clone'
    with open(args.out, 'w', newline='', encoding='utf-8') as f:
        f.writelines(f'# {k}: {v}\n' for k,v in machine('cpu').items() if k in known)
        csv.writer(f, lineterminator='\n').writerows([FIELDS, *table])

if __name__ == '__main__': main()
