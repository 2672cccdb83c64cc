"""What zeros pay: the file, the memory and the time of pruned networks in several runtimes, each against the dense
network in the same runtime: `python -m benchmarks.pays` (minutes)

Times on the CPU are the processor time of one thread, which other work on the machine changes little."""
import argparse, copy, csv, importlib.metadata, time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
import torch, torch.nn as nn
from safetensors.torch import save_file
from fasterai_clone.export.all import OpenVino, export_onnx, latencies, save_sparse, sparse_layers
from fasterai_clone.export.layer_trials import timed_in_turns
from fasterai_clone.prune.all import thin
from fasterai_clone.sparse.all import Sparsifier
from .timing import machine

FIELDS  = 'network case column unit dense pruned ratio low high why'.split()
LAYERS  = dict(layer_type=(nn.Conv2d, nn.Linear), exclude='output')
CASES   = {**{f'{s} % of weights': [(s, {})] for s in (50, 80, 90, 95, 99)},
           '2:4': [(50, dict(nm='2:4', exclude=['conv1', 'output']))],
           '90 % in blocks of 16 × 16': [(90, dict(granularity='block_16x16'))],
           'half of the filters removed': [(50, dict(granularity='filter'))],
           'half of the filters removed, then 90 % of weights': [(50, dict(granularity='filter')), (90, {})]}
GAIN    = 1.1   # times as small or as fast, from which it is called a gain
ZEROS   = 'The tensors are dense: zeros are multiplied like other numbers.'

def mlp():
    "Three large linear layers"
    sizes = 1024, 1024, 1024, 1024
    inner = [m for a,b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*inner, nn.Linear(sizes[-1], 10)), torch.randn(32, sizes[0])

def resnet18():
    "torchvision's ResNet-18 with random weights, on small images"
    from torchvision.models import resnet18
    return resnet18(num_classes=10), torch.randn(4, 3, 64, 64)

def linear():
    "One linear layer of 4096 × 4096, and a small one for the output"
    return nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10)), torch.randn(32, 4096)

NETWORKS = dict(mlp=mlp, resnet18=resnet18, linear=linear)
LEFT_OUT = {('resnet18', '90 % in blocks of 16 × 16'):
            'The network has no linear layer but its output, and the blocks are for linear layers.',
            **{('linear', c): 'Three sparsity levels show what size changes; the others are measured on three layers.'
               for c in CASES if not c.startswith(('50 % of', '90 % of', '99 % of'))}}

def pruned(model, steps, x):
    "A copy of `model` after all `steps`, without the filters that are zero"
    model = copy.deepcopy(model)
    for sparsity,kwargs in steps:
        kwargs = {**LAYERS, **kwargs}
        if kwargs.get('granularity', '').startswith('block'): kwargs['layer_type'] = nn.Linear
        if kwargs.get('nm') and not hasattr(model, 'conv1'): kwargs['exclude'] = 'output'
        by_filter = kwargs.get('granularity') == 'filter'
        if by_filter: kwargs['coupled'], kwargs['data'] = True, x
        Sparsifier(model, **kwargs).sparsify_model(sparsity)
        if by_filter: model = thin(model, example_inputs=x)
    return model

def processor_time(jobs, runs, device):
    "Seconds of the processor for each call of each of `jobs`, in turns; on a GPU the time that passes"
    if device.type == 'cuda': return timed_in_turns(jobs, runs, device)
    seconds = {k: [] for k in jobs}
    for r in range(-2, runs):
        for k in [*jobs][::-1] if r % 2 else jobs:
            start = time.process_time()
            jobs[k]()
            if r >= 0: seconds[k].append(time.process_time() - start)
    return {k: tuple(s) for k,s in seconds.items()}

def nbytes(model): return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))

def size(column, dense, small, why):
    "A row of bytes"
    ratio = dense/small
    return column, 'bytes', dense, small, f'{ratio:.2f}', '', '', '' if ratio >= GAIN else why

def speed(column, dense, small, x, runs, why):
    "A row of times: both run in turns"
    seconds = latencies({'dense': dense, 'pruned': small}, x, runs, processor_time)
    ratios  = [a/b for a,b in zip(*seconds.values())]
    ms      = [f'{1e3*median(s):.3f}' for s in seconds.values()]
    return column, 'ms', *ms, *(f'{r:.2f}' for r in (median(ratios), min(ratios), max(ratios))), \
        '' if median(ratios) >= GAIN else why

def compiled(model):
    "The model compiled by torch"
    torch.compiler.reset()  # it stops compiling after eight networks
    return torch.compile(copy.deepcopy(model).eval())

def why_dense(table):
    "Why the layers of a model stayed dense, in a sentence: the reason that most of its pruned weights have"
    reasons = {}
    for t in table.trials:
        if t.layout is None and t.zeros: reasons[t.why] = reasons.get(t.why, 0) + t.zeros
    reason = max(reasons, key=reasons.get, default='')
    return f'Most zeros are in layers that stay dense ({reason}).' if reason else 'The layers are too small to gain.'

def cells(dense, steps, x, folder, runs, with_compile):
    "All rows of one case"
    small = pruned(dense, steps, x)
    fewer = nbytes(small) < nbytes(dense)
    fixed = 'The fixed cost of each call is too large a share.' if fewer else ZEROS
    save_file({k: t.contiguous() for k,t in dense.state_dict().items()}, folder/'dense.safetensors')
    file  = save_sparse(small, folder/'sparse')
    yield size('file', (folder/'dense.safetensors').stat().st_size, file.stat().st_size, 'The file keeps every bit.')
    fast, table = sparse_layers(small, x, runs=runs, measure=processor_time)
    yield size('memory', nbytes(dense), nbytes(small), 'A tensor with zeros takes as much memory as any other.')
    yield size('memory, sparse layers', nbytes(dense), nbytes(fast), why_dense(table))
    yield speed('torch', dense, small, x, runs, fixed)
    if with_compile: yield speed('torch.compile', compiled(dense), compiled(small), x, runs, fixed)
    yield speed('sparse layers', dense, fast, x, runs, why_dense(table))
    files = [export_onnx(m, x, folder/name, exporter='torchscript') for name,m in (('dense', dense), ('small', small))]
    yield speed('ONNX Runtime', *files, x, runs, fixed)
    amx = ' This processor has no AMX, which could decompress sparse weights.' if not fewer else ''
    yield speed('OpenVINO', *(OpenVino(f.file) for f in files), x, runs, fixed + amx)
    if torch.cuda.is_available():
        a, b, y = copy.deepcopy(dense).half().cuda(), copy.deepcopy(small).half().cuda(), x.half().cuda()
        c, table = sparse_layers(b, y, runs=runs)
        yield speed('CUDA, half precision', a, b, y, runs, fixed)
        yield speed('CUDA, half precision, sparse layers', a, c, y, runs, why_dense(table))

def main():
    p = argparse.ArgumentParser(prog='python -m benchmarks.pays', description=__doc__)
    p.add_argument('--out', type=Path, default=Path('benchmarks/results/pays.csv'))
    p.add_argument('--runs', type=int, default=15)
    p.add_argument('--networks', default=','.join(NETWORKS))
    p.add_argument('--compile', default=','.join(NETWORKS),
                   help="networks to compile too, '' for none: needs a C++ compiler")
    args = p.parse_args()
    torch.set_num_threads(1)
    table = []
    with TemporaryDirectory() as folder:
        for network in args.networks.split(','):
            torch.manual_seed(0)
            dense, x = NETWORKS[network]()
            for case,steps in CASES.items():
                if why := LEFT_OUT.get((network, case)):
                    table.append([network, case, 'not measured', *['']*6, why])
                    continue
                for row in cells(dense.eval(), steps, x, Path(folder), args.runs, network in args.compile.split(',')):
                    table.append([network, case, *row])
                    print(*table[-1], flush=True)
    about = {**machine('cpu'), **{k: importlib.metadata.version(k) for k in ('onnxruntime', 'openvino')}}
    known = 'date', 'cpu', 'threads', 'load', 'python', 'torch', 'onnxruntime', 'openvino', 'fasterai-clone'
    with open(args.out, 'w', newline='', encoding='utf-8') as f:
        f.writelines(f'# {k}: {v}\n' for k,v in about.items() if k in known)
        csv.writer(f, lineterminator='\n').writerows([FIELDS, *table])

if __name__ == '__main__': main()
