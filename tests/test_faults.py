"""Whatever stops a training, wherever it does: nothing stays on the model, files are whole, and what comes after is exact

An error, Ctrl-C or SIGKILL at each event of fastai's loop, before, between and after the events of `SparsifyCallback`; Ctrl-C at lines of
the library itself; SIGKILL in the middle of a write. `tests/test_faults.py worker FOLDER` is the process that forks those that are killed."""
import copy, json, os, pickle, random, resource, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, torch, torch.nn as nn
from fastai.basics import (Adam, Callback, CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException,
                           CancelStepException, CancelTrainException, CancelValidException, DataLoader, DataLoaders, Learner, accuracy)
from fastai.callback.core import event
from fastai.callback.progress import ProgressCallback
from fastai.learner import defaults
from safetensors.torch import load_file

import fasterai_clone
from fasterai_clone.sparse.all import (SparsifyCallback, cos, dsd, gradient, iterative, lin, movement, one_shot, synflow, updating_movmag,
                                       wanda)

N_EPOCH, N_ITER = 4, 3

def network():
    return nn.Sequential(nn.Conv2d(2, 4, (2, 3)), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, (3, 2)), nn.ReLU(), nn.Dropout(.2), nn.Flatten(),
                         nn.Linear(12, 4))

def learner(seed=0, **kwargs):
    "A small learner that draws random numbers for weights, order of the examples and dropout"
    random.seed(seed)
    np.random.seed(seed)
    g     = torch.Generator().manual_seed(7)
    items = [(torch.randn(2, 4, 5, generator=g), torch.randint(0, 4, (), generator=g)) for _ in range(16)]
    torch.manual_seed(seed)
    dls   = DataLoaders(DataLoader(items[:12], bs=4, shuffle=True), DataLoader(items[12:], bs=4))
    learn = Learner(dls, network(), loss_func=nn.CrossEntropyLoss(), opt_func=Adam, metrics=accuracy, path='.', **kwargs)
    learn.remove_cb(ProgressCallback)
    return learn

KINDS = dict(
    plain    = lambda **kw: SparsifyCallback(80, verbose=False, **kw),
    filters  = lambda **kw: SparsifyCallback(50, 'filter', 'global', layer_type=(nn.Conv2d, nn.Linear), verbose=False, **kw),
    movement = lambda **kw: SparsifyCallback(70, criteria=movement, schedule=lin, verbose=False, **kw),
    gradient = lambda **kw: SparsifyCallback(60, 'row', criteria=gradient, schedule=cos, every=2, verbose=False, **kw),
    compact  = lambda **kw: SparsifyCallback(75, schedule=one_shot, end_epoch=1, start_epoch=1, compact=True, verbose=False, **kw),
    lottery  = lambda **kw: SparsifyCallback(66, schedule=one_shot, lth=True, reset_end=True, rewind_epoch=1, verbose=False, **kw),
    tickets  = lambda **kw: SparsifyCallback(66, schedule=one_shot, save_tickets=True, verbose=False, **kw),
    wanda    = lambda **kw: SparsifyCallback(50, context='output', criteria=wanda, schedule=lin, verbose=False, **kw),
    synflow  = lambda **kw: SparsifyCallback(50, context='global', criteria=synflow, schedule=one_shot, verbose=False, **kw),
    updating = lambda **kw: SparsifyCallback(40, 'kernel', criteria=updating_movmag, schedule=iterative, verbose=False, **kw),
    dsd      = lambda **kw: SparsifyCallback(60, schedule=dsd, verbose=False, **kw))
WANTED = dict(plain=[38, 115], movement=[33, 100], compact=[36, 108], lottery=[31, 95], tickets=[31, 95], wanda=[24, 72], updating=[18, 54])  # zeros

def fit(learn, *cbs, **kwargs):
    with learn.no_logging(): learn.fit(N_EPOCH, 1e-2, cbs=list(cbs), **kwargs)
    return learn

def numbers(learn):
    "All that training has changed"
    opt = [[v.clone() for v in s.values() if isinstance(v, torch.Tensor)] for s in (learn.opt.state[p] for p,*_ in learn.opt.all_params())]
    return {k: v.clone() for k,v in learn.model.state_dict().items()}, opt

def equal(a, b):
    (wa,oa), (wb,ob) = a, b
    return wa.keys() == wb.keys() and all(torch.equal(wa[k], wb[k]) for k in wa) and \
           len(oa) == len(ob) and all(len(s) == len(t) and all(map(torch.equal, s, t)) for s,t in zip(oa, ob))

def zeros(model): return [int((m.weight == 0).sum()) for m in model if isinstance(m, nn.Conv2d)]

# What must not be left behind

HOOKS = [k for k in vars(nn.Module()) if 'hook' in k]

def anatomy(learn):
    "All there is to a learner and its model but numbers"
    model = [(n, id(m), sorted(vars(m)), [len(getattr(m, h)) for h in HOOKS if getattr(m, h) is not None], sorted(m._buffers),
              [(k, id(p), type(p), p.requires_grad, len(p._backward_hooks or ())) for k,p in m._parameters.items() if p is not None])
             for n,m in learn.model.named_modules()]
    return model, list(learn.model.state_dict()), [id(m) for m in learn.metrics], [id(cb) for cb in learn.cbs]

def check_untouched(learn, before, where):
    assert anatomy(learn) == before, f'{where}: something is left behind'
    params = list(learn.model.parameters())
    assert [id(p) for p,*_ in learn.opt.all_params()] == list(map(id, params)), f'{where}: the optimizer has other parameters'
    assert set(map(id, learn.opt.state)) <= set(map(id, params)), f'{where}: the optimizer knows of others'
    for p,s in learn.opt.state.items():
        assert all(v.shape == p.shape for v in s.values() if isinstance(v, torch.Tensor) and v.ndim), f'{where}: its state is not whole'
    for m in (copy.deepcopy(learn.model), pickle.loads(pickle.dumps(learn.model))):
        assert all(map(torch.equal, m.state_dict().values(), learn.model.state_dict().values())), where

def check_after(kind, learn, cb, want, where):
    "The callback works on, exactly"
    assert equal(numbers(fit(learner(), cb)), want), f'{where}: the same callback with another learner'
    fit(learn, cb)
    if kind in WANTED: assert zeros(learn.model) == WANTED[kind], f'{where}: the next fit of the same learner'
    assert cb.report.zeros == sum(r.zeros for r in cb.sparsifier.report().rows)

# Faults

CANCELS = dict(after_cancel_backward=('before_backward', CancelBackwardException), after_cancel_step=('before_step', CancelStepException),
               after_cancel_batch=('before_batch', CancelBatchException), after_cancel_train=('before_train', CancelTrainException),
               after_cancel_validate=('before_validate', CancelValidException), after_cancel_epoch=('before_epoch', CancelEpochException),
               after_cancel_fit=('before_batch', CancelFitException))
EVENTS = [e for e in event._fields if e != 'after_create']
ORDERS = (-5, 16, 75)
ONCE, EACH_EPOCH = ('before_fit', 'after_fit', 'after_cancel_fit'), ('before_epoch', 'before_train', 'after_train', 'before_validate', 'after_validate',
                    'after_epoch', 'after_cancel_train', 'after_cancel_validate', 'after_cancel_epoch')

def at(name, f, order):
    "A callback that calls `f` at event `name`"
    cb = Callback(**{name: lambda self: f()})
    cb.order = order
    return cb

class Fault:
    "Calls `act` when event `name` comes for the `nth` time to a callback of `order`"
    def __init__(self, name, act, order, nth):
        self.name, self.act, self.order, self.nth, self.n, self.fired = name, act, order, nth, 0, False
        self.cbs = [at(name, self.seen, order)]
        if name in CANCELS:
            before, self.error = CANCELS[name]
            self.cbs.append(at(before, self.cancel, random.choice((-50, 50))))
        self.seen_before = 0

    def cancel(self):
        self.seen_before += 1
        if self.seen_before == self.nth + 1: raise self.error

    def seen(self):
        self.n += 1
        if self.name not in CANCELS and self.n != self.nth + 1: return
        self.fired = True
        self.act()

def points(rng, orders=ORDERS):
    "(event, order, nth): each event in each order, at a random batch or epoch"
    return [(name, o, 0 if name in ONCE and name != 'after_cancel_fit' else rng.randrange(N_EPOCH if name in EACH_EPOCH else N_EPOCH*N_ITER))
            for name in EVENTS for o in orders]

fired = set()  # points at which something has really happened

def stopped(kind, cb, *cbs, error):
    "A learner whose fit ended with `error`, or not at all"
    learn  = learner()
    learn.create_opt()
    before = anatomy(learn)
    try: fit(learn, cb, *cbs)
    except error: return learn, before, True
    return learn, before, False

def test_errors_and_interrupts_at_every_event():
    rng, kinds = random.Random(1), list(KINDS)
    want = {k: numbers(fit(learner(), KINDS[k]())) for k in kinds}
    for k in WANTED: assert zeros(fit(learner(), KINDS[k]()).model) == WANTED[k], k
    for i,(name,order,nth) in enumerate(points(rng) + points(rng)):
        error, kind = (KeyboardInterrupt, RuntimeError)[i*2 // (2*len(EVENTS)*len(ORDERS))], rng.choice(kinds)
        where = f'{error.__name__} at {name} {nth}, order {order}, {kind}'
        def act(): raise error('stop')
        random.seed(i)
        fault, cb = Fault(name, act, order, nth), KINDS[kind]()
        learn, before, ended = stopped(kind, cb, *fault.cbs, error=error)
        assert ended == fault.fired, where
        if ended: fired.add((name, error.__name__, order, nth))
        check_untouched(learn, before, where)
        check_after(kind, learn, cb, want[kind], where)
    for k in kinds: assert equal(numbers(fit(learner(), KINDS[k]())), want[k]), f'{k}: a fresh run'
