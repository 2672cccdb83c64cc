"""Prune LeNet-300-100 and LeNet-5 while they train on MNIST, next to published results: `python -m benchmarks.mnist`
(about 35 minutes of one core; `--quick`: 2,000 images and one seed, about a minute)"""
import argparse, csv, gzip, math, time
from functools import partial
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
import numpy as np, torch, torch.nn as nn
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, set_seed
import fastai.callback.schedule  # noqa: F401, gives a learner `fit_one_cycle`
from fasterai_clone.export.all import save_sparse
from fasterai_clone.model.flops import multiply_adds
from fasterai_clone.prune.all import thin
from fasterai_clone.sparse.all import SparsifyCallback, agp
from .timing import interleave, machine, timed

LR, END, LAYERS = 3e-3, 0.7, (nn.Linear, nn.Conv2d)  # pruning is done at 70 % of training, 30 % is for recovery
FILES  = 'train-images-idx3-ubyte train-labels-idx1-ubyte t10k-images-idx3-ubyte t10k-labels-idx1-ubyte'.split()
FIELDS = '''network seed kind correct of accuracy params nonzero multiply_adds file sparse_file ms_1 ms_64
            seconds'''.split()
# source, network, percent of weights pruned, accuracy and dense accuracy there, and the kind to compare with here
PUBLISHED = [('[Han et al., 2015](https://arxiv.org/abs/1506.02626), table 1', 'LeNet-300-100', 92, 98.41, 98.36, 90),
             ('[SNIP, 2019](https://arxiv.org/abs/1810.02340), table 1', 'LeNet-300-100', 95, 98.4, 98.3, 95),
             ('[Lottery tickets, 2019](https://arxiv.org/abs/1803.03635), section 2', 'LeNet-300-100', 96.4, None, None,
              95),
             ('[SNIP, 2019](https://arxiv.org/abs/1810.02340), table 1', 'LeNet-300-100', 98, 97.6, 98.3, 98),
             ('[Han et al., 2015](https://arxiv.org/abs/1506.02626), table 1', 'LeNet-5', 92, 99.23, 99.2, 90),
             ('[SNIP, 2019](https://arxiv.org/abs/1810.02340), table 1', 'LeNet-5', 98, 99.2, 99.1, 98)]

def lenet_300_100():
    "Return a perceptron of 266,200 weights, with 300 and 100 hidden units"
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(),
                         nn.Linear(100, 10))

def lenet_5():
    "Return the LeNet-5 of Caffe, with 431,080 parameters"
    net = nn.Sequential(nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2),
                        nn.ReLU(), nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))
    return net.to(memory_format=torch.channels_last)  # twice as fast on a CPU

NETWORKS = {'LeNet-300-100': (lenet_300_100, 10, 250), 'LeNet-5': (lenet_5, 3, 125)}  # epochs, images per batch
KINDS    = {'dense': None, **{f'{s} % of weights pruned': (s, 'weight', 'global') for s in (90, 95, 98)},
            'half of filters and units removed': (50, 'filter', 'local')}

def read_idx(file):
    "Return the bytes in a gzipped file of MNIST's own format as an array"
    with gzip.open(file) as f: data = f.read()
    shape = np.frombuffer(data, '>i4', data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4*data[3]).reshape(shape)

def load_mnist(folder=None):
    "Return images and labels for training and for testing, from `folder` or downloaded by torchvision"
    if folder is None:
        from torchvision.datasets import MNIST
        sets   = [MNIST('~/.cache/mnist', train=t, download=True) for t in (True, False)]
        arrays = [a for s in sets for a in (s.data, s.targets)]
    else: arrays = [torch.tensor(read_idx(Path(folder)/f'{name}.gz')) for name in FILES]
    def images(a): return a[:, None].float().div(255).sub(0.1307).div(0.3081)
    return images(arrays[0]), arrays[1].long(), images(arrays[2]), arrays[3].long()

class Batches:
    "Slice tensors into batches: a loader that takes no time"
    def __init__(self, x, y, bs, shuffle=False):
        self.x, self.y, self.bs, self.shuffle = x, y, bs, shuffle
        self.dataset = x
    def __len__(self): return math.ceil(len(self.x)/self.bs)
    def __iter__(self):
        order = torch.randperm(len(self.x)) if self.shuffle else torch.arange(len(self.x))
        for i in order.split(self.bs): yield self.x[i], self.y[i]

def callback(pruning, epochs):
    "Return the callback that prunes, or None for a dense network"
    if pruning is None: return None
    sparsity, granularity, context = pruning
    return SparsifyCallback(sparsity, granularity, context, schedule=agp, layer_type=LAYERS, end_epoch=END*epochs,
                            coupled=granularity == 'filter', verbose=False)

def train(make_net, pruning, data, epochs, bs, seed):
    "Train one network, and remove its zero filters if whole filters were pruned"
    set_seed(seed, reproducible=True)
    x, y, x_test, y_test = data
    dls   = DataLoaders(Batches(x, y, bs, shuffle=True), Batches(x_test, y_test, 1000), device='cpu')
    learn = Learner(dls, make_net(), loss_func=CrossEntropyLossFlat(), train_bn=False)
    learn.recorder.train_metrics = False
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, LR, cbs=callback(pruning, epochs))
    net = learn.model.eval()
    return thin(net, example_inputs=x_test[:64]) if pruning and pruning[1] == 'filter' else net

@torch.no_grad()
def n_correct(net, x, y): return sum(int((net(a).argmax(1) == b).sum()) for a,b in Batches(x, y, 1000))

def file_sizes(net):
    "Return the bytes of the weights as `torch.save` and as `save_sparse` write them"
    with TemporaryDirectory() as folder:
        torch.save(net.state_dict(), Path(folder)/'dense.pth')
        sparse = save_sparse(net, Path(folder)/'sparse.safetensors')
        return (Path(folder)/'dense.pth').stat().st_size, sparse.stat().st_size

@torch.no_grad()
def latencies(nets, x, rounds, calls=10):
    "Return the median milliseconds of one batch `x`, of each network in turns of some `calls`"
    def measured(net): return median(1000*timed(lambda: net(x), 'cpu')[0] for _ in range(calls))
    times, failed = interleave({k: partial(measured, net) for k,net in nets.items()}, rounds)
    if failed: raise RuntimeError(f'A network did not run: {failed}')
    return {k: round(median(v), 4) for k,v in times.items()}

def rows(name, data, seed, epochs=None, rounds=20):
    "Return a row for each way to prune the network `name`"
    make_net, usual, bs = NETWORKS[name]
    nets, seconds, x = {}, {}, data[2]
    for kind,pruning in KINDS.items():
        start = time.perf_counter()
        nets[kind]    = train(make_net, pruning, data, epochs or usual, bs, seed)
        seconds[kind] = round(time.perf_counter() - start, 1)
        print(f'{name}, seed {seed}, {kind}: {seconds[kind]} s', flush=True)
    ms = [latencies(nets, x[:n], rounds) for n in (1, 64)]
    for kind,net in nets.items():
        correct, params = n_correct(net, *data[2:]), list(net.parameters())
        yield dict(zip(FIELDS, (name, seed, kind, correct, len(x), round(100*correct/len(x), 2),
                                sum(p.numel() for p in params), sum(int(p.count_nonzero()) for p in params),
                                multiply_adds(net, x[:64]).total, *file_sizes(net), *(m[kind] for m in ms),
                                seconds[kind])))

def write(path, about, table):
    "Write the settings as comments, and the table"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='', encoding='utf-8') as f:
        f.writelines(f'# {k}: {v}\n' for k,v in about.items())
        writer = csv.DictWriter(f, FIELDS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(table)

def read_results(path):
    "Return the settings in the comments of the file, and network → kind → its rows, one per seed"
    lines = Path(path).read_text(encoding='utf-8').splitlines()
    about = dict(l.removeprefix('# ').split(': ', 1) for l in lines if l.startswith('#'))
    found = {}
    for row in csv.DictReader(l for l in lines if not l.startswith('#')):
        found.setdefault(row['network'], {}).setdefault(row['kind'], []).append(row)
    return about, found

def numbers(rows, key): return [float(r[key]) for r in rows]

def accuracy(rows):
    "Return the mean (lowest–highest) accuracy as text"
    values = numbers(rows, 'accuracy')
    return f'{mean(values):.2f} % ({min(values):.2f}–{max(values):.2f})'

def line(kind, rows):
    "Return one line of the table"
    def typical(key): return median(numbers(rows, key))
    file = typical('sparse_file' if 'weights' in kind else 'file')
    return (f'| {kind} | {accuracy(rows)} | {typical("nonzero"):,.0f} | {typical("multiply_adds"):,.0f} | '
            f'{file/1e3:,.0f} kB | {typical("ms_64"):.2f} ms |')

def published(source, network, pruned, reached, dense, nearest, found):
    "Return one line on a published result, beside the nearest one here"
    kinds = found[network]
    def here(kind): return f'{mean(numbers(kinds[kind], "accuracy")):.2f} %'
    there = 'equal to dense' if reached is None else f'{reached} % ({dense} %)'
    return (f'| {source} | {network} | {pruned} % | {there} | '
            f'{nearest} %: {here(f"{nearest} % of weights pruned")} ({here("dense")}) |')

def markdown(csv_path='benchmarks/results/mnist.csv'):
    "Return the results, and published ones for the same networks, as two Markdown tables with their notes"
    about, found = read_results(csv_path)
    out = ['| MNIST | Test accuracy | Nonzero parameters | Multiply-adds | File | Latency, 64 images |',
           '| :--- | ---: | ---: | ---: | ---: | ---: |']
    for network,kinds in found.items():
        out += [f'| **{network}** | | | | | |', *(line(k, rows) for k,rows in kinds.items())]
    setup = '; '.join(f'{n}: {len(kinds["dense"])} seeds, {about.get(n, "")}' for n,kinds in found.items())
    out += ['', f'Mean (lowest–highest) over seeds, after the last epoch. {setup}. '
            'Weights are ranked over all layers, and pruning ends at 70 % of training. '
            'Files: `torch.save`, and `save_sparse` where weights are pruned. '
            f'Latency: medians in turns, one thread, {about.get("cpu", "CPU")}; zero weights alone save none. '
            'Repeat it with `python -m benchmarks.mnist`.', '',
            '| Published for the same networks | Network | Weights pruned | Accuracy (dense) | Here (dense) |',
            '| :--- | :--- | ---: | ---: | ---: |', *(published(*p, found) for p in PUBLISHED if p[1] in found)]
    return '\n'.join(out) + '\n'

def main(args=None):
    p = argparse.ArgumentParser(prog='python -m benchmarks.mnist', description=__doc__)
    p.add_argument('--data', type=Path, help='folder with the four .gz files of MNIST; default: download them')
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--quick', action='store_true', help='2,000 images, one epoch and one seed: to see that it works')
    p.add_argument('--out', type=Path, default=Path('benchmarks/results/mnist.csv'))
    p.add_argument('--first', type=int, default=0, help='the first seed')
    p.add_argument('--only', nargs='+', choices=NETWORKS, default=list(NETWORKS))
    args = p.parse_args(args)
    torch.set_num_threads(1)
    data, seeds, epochs, rounds = load_mnist(args.data), args.seeds, None, 20
    if args.quick: data, seeds, epochs, rounds = tuple(a[:2000] for a in data), 1, 1, 3
    kept  = 'date', 'cpu', 'threads', 'load', 'python', 'torch', 'fastai', 'fasterai-clone'
    about = {k: v for k,v in machine('cpu').items() if k in kept}
    for name in args.only:
        _, usual, bs = NETWORKS[name]
        about[name]  = f'{epochs or usual} epochs, batches of {bs}'
    about |= dict(lr=LR, end=END)
    start, table = time.process_time(), []
    for seed in range(args.first, args.first + seeds):
        for name in args.only: table += rows(name, data, seed, epochs, rounds)
        minutes = round((time.process_time() - start)/60, 1)
        write(args.out, about | dict(seeds=seed + 1 - args.first, minutes_of_one_core=minutes), table)
        print(f'seed {seed} done, {minutes} minutes of one core', flush=True)
    print(markdown(args.out))

if __name__ == '__main__': main()
