"What the tests share: small learners on real digits, spies, and references as naive as can be"
import math, re
from fractions import Fraction
from functools import cache

import torch, torch.nn as nn
from fastai.basics import (Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, TfmdLists, accuracy, noop,
                           set_seed)
from fasterai_clone.sparse.measure import as_criteria
from fasterai_clone.digits import digits_dls, digits_net


def exact(n, sparsity):
    "Law 1: floor(s·n/100), in exact arithmetic"
    return math.floor(Fraction(str(sparsity)) * n / 100)

def naive_keep(scores, n_drop):
    "The `n_drop` lowest go, ties by index: Python's stable sort"
    flat = scores.flatten().tolist()
    keep = torch.ones(len(flat), dtype=torch.bool)
    for i in sorted(range(len(flat)), key=flat.__getitem__)[:n_drop]: keep[i] = False
    return keep.reshape(scores.shape)

def layers(model, kind=nn.Conv2d): return [m for m in model.modules() if isinstance(m, kind)]
def zeros (model, kind=nn.Conv2d): return [int((m.weight == 0).sum()) for m in layers(model, kind)]
def sizes (model, kind=nn.Conv2d): return [m.weight.numel() for m in layers(model, kind)]
def measured(model, kind=nn.Conv2d): return 100 * sum(zeros(model, kind)) / sum(sizes(model, kind))
def weights (model): return {k: v.detach().clone() for k,v in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def shown(x):
    "`str(x)` without addresses: the ids of tests must be the same in all processes"
    return re.sub(r' (object )?at 0x[0-9a-f]+', '', str(x))

def fit_for(criteria):
    "A granularity that the criterion can score"
    c = as_criteria(criteria)
    return 'filter' if c.structured or c.channels else 'weight'

@cache
def images():
    "Digits for training and validation, which no test can change for those after it"
    dls = digits_dls()
    return tuple(dls.train.dataset), tuple(dls.valid.dataset)[:64]

def loaders(n=128, bs=16):
    train, valid = images()
    return DataLoaders(DataLoader(TfmdLists(list(train[:n]), noop), bs=bs, shuffle=True, drop_last=True),
                       DataLoader(TfmdLists(list(valid), noop), bs=64))

def learner(n=128, bs=16, width=4, seed=0, model=None, **kwargs):
    "The same learner every time: 8 batches of 16 digits an epoch, three convolutions with 36, 288 and 1,152 weights"
    images()  # reading them the first time draws random numbers
    set_seed(seed, reproducible=True)
    kwargs = {'metrics': accuracy, 'path': '.', **kwargs}
    return Learner(loaders(n, bs), digits_net(width) if model is None else model,
                   loss_func=CrossEntropyLossFlat(), **kwargs)

def spy(event, f, order=100):
    "A callback that calls `f` at `event`"
    cb = Callback(**{event: lambda self: f()})
    cb.order = order
    return cb

def column(learn, name='sparsity'):
    return [v[list(learn.recorder.metric_names[1:]).index(name)] for v in learn.recorder.values]
def lines(out):
    return [(int(e), float(s)) for e,s in re.findall(r'^Sparsity at the end of epoch (\d+): \[([\d.]+)\]%', out, re.M)]

class Parts(nn.Module):
    "Four and eight of twelve channels have different readers"
    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 12, 1), [4, 8]
        self.b, self.c, self.o = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(10, 2, 1)
    def forward(self, x):
        p, q = self.a(x).relu().split(self.n, 1)
        return self.o(torch.cat([self.b(p), self.c(q)], 1))
