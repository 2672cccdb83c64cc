"""Ways to train towards zeros, with and without a teacher, for equal epochs: `python -m benchmarks.towards`
(digits, about 2 minutes of one core for a seed; MNIST, about 8 and 13: `--data FOLDER`, or `--mnist` to download it)"""
import argparse, copy, csv, time
from functools import partial
from pathlib import Path
from statistics import median
import torch, torch.nn as nn
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, accuracy, set_seed
import fastai.callback.schedule  # noqa: F401, gives a learner `fit_one_cycle`
from fasterai_clone.digits import digits_dls, digits_net
from fasterai_clone.methods.all import ADMMCallback, DistillCallback, ProximalCallback, Regrow
from fasterai_clone.prune.all import thin
from fasterai_clone.sparse.all import KeepSparsity, Sparsifier, SparsifyCallback, agp
from .mnist import LAYERS, NETWORKS, Batches, load_mnist
from .models import learner as random_images
from .timing import machine

LR, END, HEAL = 1e-2, 0.7, 0.3  # pruning is done at 70 % of training, 30 % is for recovery
WEIGHTS, FILTERS = (90, 95, 98, 99), (50, 75)
EPOCHS = {'LeNet-300-100': 5, 'LeNet-5': 1}  # 60 runs for each seed
OVERHEADS = 'network', 'method', 'whole fit', 'after the first epoch'
FIELDS = 'network seed kind unit asked distilled weights zeros params accuracy seconds'.split()

# The networks: a function that makes one, its data, the learning rate and the types of layers

def digits(epochs=8):
    "Return the setting of the digits"
    return dict(name='digits', make=digits_net, dls=digits_dls, epochs=epochs, lr=LR, layers=nn.Conv2d)

def mnist(name, data, epochs=None):
    "Return the setting of a LeNet on MNIST"
    make, _, bs = NETWORKS[name]
    x, y, x_test, y_test = data
    def dls(): return DataLoaders(Batches(x, y, bs, shuffle=True), Batches(x_test, y_test, 1000), device='cpu')
    return dict(name=name, make=make, dls=dls, epochs=epochs or EPOCHS[name], lr=3e-3, layers=LAYERS)

def learner(setting, seed):
    "Return a learner with new weights"
    set_seed(seed, reproducible=True)
    return Learner(setting['dls'](), setting['make'](), loss_func=CrossEntropyLossFlat(), metrics=accuracy)

# The methods: a function of the learner, the sparsity, the types of layers and the number of steps → callbacks

def masked(learn, s, layers, n_steps, criteria='random', context='erk', rule=None):
    "Choose a mask before training, and keep it or let a rule move it"
    batch = next(iter(learn.dls.train))
    sp = Sparsifier(learn.model, 'weight', context, criteria, layer_type=layers, data=batch,
                    loss_func=learn.loss_func)
    sp.sparsify_model(s)
    if rule is None: return [KeepSparsity(verbose=False)]
    rule = Regrow(rule, every=max(1, n_steps // 40))
    return [SparsifyCallback(s, 'weight', context, schedule='constant', rule=rule, layer_type=layers, verbose=False)]

def gradual(learn, s, layers, n_steps, granularity='weight', context='global'):
    "Prune a little after each step"
    return [SparsifyCallback(s, granularity, context, schedule=partial(agp, end_pct=END), layer_type=layers,
                             coupled=granularity == 'filter', verbose=False)]

def admm(learn, s, layers, n_steps, granularity='weight', context='global'):
    "Pull the weights towards sparse ones"
    return [ADMMCallback(s, granularity, context, every=max(1, n_steps // 40), heal=HEAL, layer_type=layers,
                         coupled=granularity == 'filter', verbose=False)]

def lasso(learn, s, layers, n_steps):
    "Shrink the norms of groups until enough are zero"
    return [ProximalCallback(sparsity=s, coupled=True, heal=HEAL, layer_type=layers, verbose=False)]

KINDS = {'weights': {'static, random': masked, 'static, SNIP': partial(masked, criteria='snip', context='global'),
                     'SET': partial(masked, rule='set'), 'RigL': partial(masked, rule='rigl'),
                     'gradual magnitude': gradual, 'ADMM': admm},
         'filters': {'gradual magnitude': partial(gradual, granularity='filter', context='local'),
                     'ADMM': partial(admm, granularity='filter', context='local'), 'group lasso': lasso}}

def trained(setting, seed, kind=None, s=0, teacher=None):
    "Return a learner that was trained by a method, with a teacher or without one"
    learn   = learner(setting, seed)
    n_steps = setting['epochs'] * len(learn.dls.train)
    cbs = kind(learn, s, setting['layers'], n_steps) if kind else []
    set_seed(seed, reproducible=True)
    if teacher is not None: cbs.append(DistillCallback(teacher, temperature=2., verbose=False))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(setting['epochs'], setting['lr'], cbs=cbs)
    return learn

def row(setting, seed, unit, name, s, distilled, learn, seconds):
    "Return the numbers of a trained network, without its zero filters"
    layers = [m for m in learn.model.modules() if isinstance(m, setting['layers'])]
    weights, zeros = sum(m.weight.numel() for m in layers), sum(int((m.weight == 0).sum()) for m in layers)
    with learn.no_bar(), learn.no_logging(): right = round(100*learn.validate()[1], 2)
    net = learn.model.eval()
    if unit == 'filters': net = thin(net, example_inputs=next(iter(learn.dls.valid))[0][:8])
    params = sum(p.numel() for p in net.parameters())
    return dict(zip(FIELDS, (setting['name'], seed, name, unit, s, distilled, weights, zeros, params, right,
                             round(seconds, 1))))

def rows(setting, seed, weights=WEIGHTS, filters=FILTERS):
    "Return a row for the dense network, and one for each method, sparsity and choice of teacher"
    start = time.process_time()
    dense = trained(setting, seed)
    yield row(setting, seed, 'none', 'dense', 0, False, dense, time.process_time() - start)
    for unit,asked in dict(weights=weights, filters=filters).items():
        for name,kind in KINDS[unit].items():
            for s in asked:
                for teacher in (None, dense.model):
                    start = time.process_time()
                    learn = trained(setting, seed, kind, s, teacher)
                    seconds = time.process_time() - start
                    yield row(setting, seed, unit, name, s, teacher is not None, learn, seconds)

# What each costs

class Clock(Callback):
    "Note the processor time at the end of each epoch"
    order = 100
    def before_fit(self): self.ends = []
    def after_epoch(self): self.ends.append(time.process_time())

WAYS = {'no callback': lambda l: [], 'RigL, between moves': lambda l: [_between()],
        'RigL, moves every 100 steps': lambda l: [_between(100)],
        'ADMM, every 10 steps': lambda l: [ADMMCallback(90, heal=0, verbose=False)],
        'distillation': lambda l: [DistillCallback(verbose=False)],
        'one more forward pass': lambda l: [Forward(l.model.train())],
        'one more forward pass, frozen': lambda l: [Forward(l.model.eval())]}
NETS = {'digits, 16 batches of 64': (lambda: Learner(digits_dls(64, n=1024), digits_net(32),
                                                     loss_func=CrossEntropyLossFlat()), 10),
        'ResNet-18, 8 batches of 16': (lambda: random_images('ResNet-18', 'cpu', 8), 3)}

def overheads(rounds=15, nets=NETS):
    """Yield the time of some epochs with each method, relative to that without: median and extremes of rounds in
    turns, of the whole fit and of what follows the first epoch"""
    for net,(make, epochs) in nets.items():
        times = {k: [] for k in WAYS}
        for _ in range(rounds):
            for k,callbacks in WAYS.items():
                learn = make()
                cbs, clock = callbacks(learn), Clock()
                start = time.process_time()
                with learn.no_bar(), learn.no_logging(): learn.fit(epochs, LR, cbs=[*cbs, clock])
                times[k].append((time.process_time() - start, clock.ends[-1] - clock.ends[0]))
        def ratio(k, i):
            r = sorted(a[i]/b[i] for a,b in zip(times[k], times['no callback']))
            return f'{median(r):.2f} ({r[0]:.2f}–{r[-1]:.2f})'
        for k in WAYS: yield dict(zip(OVERHEADS, (net, k, ratio(k, 0), ratio(k, 1))))

class Forward(Callback):
    "Run a copy of a model on each batch, with gradients in train mode only"
    def __init__(self, model): self.copy = copy.deepcopy(model)
    def before_batch(self):
        if self.training:
            with torch.set_grad_enabled(self.copy.training): self.copy(*self.xb)

def _between(every=10**6):
    return SparsifyCallback(90, 'weight', 'erk', schedule='constant', rule=Regrow(every=every), verbose=False)

def write(path, about, fields, table):
    "Write the settings as comments, and the table"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='', encoding='utf-8') as f:
        f.writelines(f'# {k}: {v}\n' for k,v in about.items())
        writer = csv.DictWriter(f, fields, lineterminator='\n')
        writer.writeheader()
        writer.writerows(table)

def file_of(name):
    "Return the file with the results of a network"
    return Path('benchmarks/results')/f'towards_{name.lower().replace("-", "_")}.csv'

def study(setting, seeds, more, about, out):
    "Train with each method and each seed, and write all rows that are known after each"
    start, table = time.process_time(), []
    for i,seed in enumerate(seeds, 1):
        for r in rows(setting, seed, **more):
            table.append(r)
            print(f'{r["network"]}, seed {seed}, {r["kind"]} {r["asked"]} % of {r["unit"]}'
                  f'{", distilled" if r["distilled"] else ""}: {r["accuracy"]} %', flush=True)
        minutes = round((time.process_time() - start)/60, 1)
        write(out, about | dict(end=END, seeds=i, minutes_of_one_core=minutes), FIELDS, table)

def main(args=None):
    p = argparse.ArgumentParser(prog='python -m benchmarks.towards', description=__doc__)
    p.add_argument('--data', type=Path, help='folder with the four .gz files of MNIST; default: digits')
    p.add_argument('--mnist', action='store_true', help='download MNIST')
    p.add_argument('--only', nargs='+', choices=NETWORKS, help='of the networks for MNIST')
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--first', type=int, default=0, help='the first seed')
    p.add_argument('--epochs', type=int)
    p.add_argument('--weights', type=int, nargs='*', default=WEIGHTS, help='percent of weights')
    p.add_argument('--filters', type=int, nargs='*', default=FILTERS, help='percent of filters')
    p.add_argument('--overheads', action='store_true', help='measure what each method costs instead')
    p.add_argument('--rounds', type=int, default=15, help='of the overheads')
    p.add_argument('--quick', action='store_true', help='one epoch, one seed and one sparsity: to see that it works')
    p.add_argument('--out', type=Path, help='default: a file for each network, in benchmarks/results')
    args = p.parse_args(args)
    torch.set_num_threads(1)
    kept  = 'date', 'cpu', 'threads', 'python', 'torch', 'fastai', 'fasterai-clone'
    about = {k: v for k,v in machine('cpu').items() if k in kept}
    if args.overheads:
        found, out = overheads(1 if args.quick else args.rounds), Path('benchmarks/results/towards_overheads.csv')
        return write(args.out or out, about | dict(rounds=args.rounds), OVERHEADS, found)
    epochs, seeds, more = args.epochs, args.seeds, dict(weights=args.weights, filters=args.filters)
    if args.quick: epochs, seeds, more = 1, 1, dict(weights=(90,), filters=(50,))
    if args.data or args.mnist:
        data = load_mnist(args.data)
        settings = [mnist(name, data, epochs) for name in args.only or NETWORKS]
    else: settings = [digits(epochs or 8)]
    for setting in settings:
        about['epochs'] = f'{setting["epochs"]}, one cycle to {setting["lr"]}'
        study(setting, range(args.first, args.first + seeds), more, about, args.out or file_of(setting['name']))

if __name__ == '__main__': main()
