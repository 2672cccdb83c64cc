"""Mixed precision whose scaler skips steps, with everything that fastai's loop can have besides: exact whatever the
order of the list"""
import csv
from copy import deepcopy
from functools import partial
from random import Random
from types import SimpleNamespace

import fastai.callback.fp16 as fp16
import pytest, torch, torch.nn as nn, torch.nn.functional as F
from fastai.basics import (Adam, Callback, CancelBatchException, CancelEpochException, CancelStepException,
                           CancelTrainException, Lamb,
                           Larc, Lookahead, OptimWrapper, QHAdam, RAdam, RMSProp, SGD, noop, ranger)
from fastai.callback.all import (CSVLogger, EarlyStoppingCallback, GradientAccumulation, GradientClip, MixedPrecision,
                                 MixUp, ModelResetter, ProgressCallback, ReduceLROnPlateau, ShowGraphCallback)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fasterai_clone.digits import digits_net
from fasterai_clone.sparse.all import *
from helpers import column, exact, layers, learner, lines, measured, same, shown, spy, weights, zeros


# fastai asks for CUDA by name; the same classes of PyTorch do it all on a CPU

@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setattr(fp16, 'autocast',   lambda device, **kwargs: torch.amp.autocast('cpu', **kwargs))
    monkeypatch.setattr(fp16, 'GradScaler', lambda device, **kwargs: torch.amp.GradScaler('cpu', **kwargs))

some = dict(init_scale=2.**24, growth_interval=4)  # too large for the first steps, and again every few
most = dict(init_scale=2.**34, growth_interval=4)  # too large for all of the first epoch

def quiet(**kwargs):
    learn = learner(**kwargs)
    learn.logger = noop
    return learn

def asked(s): return [exact(n, s) for n in (36, 288, 1152)]

def train(learn, cb, n_epoch=3, cbs=(), fit='fit', lr=1e-2):
    "Fit, and see: which steps were made, the zeros at validation, and how many dropped weights any batch brought back"
    o = SimpleNamespace(made=0, skipped=0, zeros=[], column=[], back=0, dtypes=set(), old={})
    def made():    o.made += 1
    def skipped(): o.skipped, o.made = o.skipped + 1, o.made - 1  # fastai calls `after_step` for them too
    def look():
        if not learn.training: return
        sp = cb.sparsifier
        o.back += sum(int((p[~sp.masks[k]] != 0).sum()) for k,p in sp.params.items() if k in sp.masks)
        o.back += sum(int((m & ~o.old[k]).sum()) for k,m in sp.masks.items() if k in o.old)
        o.old = {k: m.clone() for k,m in sp.masks.items()}
    spies = [spy('after_step', made), spy('after_cancel_step', skipped), spy('after_batch', look),
             # before `MixedPrecision` makes it a float
             spy('after_pred', lambda: o.dtypes.add(learn.pred.dtype), order=5),
             spy('before_validate', lambda: o.zeros.append(zeros(learn.model))),
             spy('after_epoch', lambda: o.column.append(measured(learn.model)))]
    getattr(learn, fit)(n_epoch, lr, cbs=[*([cb] if cb else []), *cbs, *(spies if cb else spies[:2])])
    return o

def sure(learn, cb, o, series):
    "Exact in every epoch and at the end, and what was written is what was there"
    assert o.zeros == [asked(s) for s in series]
    assert zeros(learn.model) == o.zeros[-1] == [r.zeros for r in cb.report.rows]
    assert o.back == 0 and column(learn) == o.column == [h['sparsity'] for h in cb.history]


# Half precision

@pytest.mark.parametrize('criteria', ['large_final', 'gradient', 'movement', 'wanda'])
@pytest.mark.parametrize('scale', [some, most], ids=['some', 'most'])
def test_fp16_that_skips_steps(scale, criteria):
    learn, cb = quiet().to_fp16(**scale), SparsifyCallback(90, criteria=criteria, schedule=lin, verbose=False)
    o = train(learn, cb)
    sure(learn, cb, o, (30, 60, 90))
    assert o.made + o.skipped == 24 and o.made >= 2 and o.skipped >= (6 if scale is some else 14)
    assert torch.float16 in o.dtypes
    assert {p.dtype for p in learn.model.parameters()} == {torch.float32}

@pytest.mark.parametrize('kwargs', [dict(granularity='filter', schedule=lin), dict(schedule=lin, every=3),
                                    dict(schedule=agp),
                                    dict(context='global', schedule=lin), dict(schedule=dsd)], ids=shown)
def test_fp16_and_ways_to_prune(kwargs):
    "As many zeros as in fp32 at the end of each epoch, skipped steps or not"
    (a, b), ways = [quiet(), quiet().to_fp16(**some)], []
    for learn in (a, b):
        cb, seen = SparsifyCallback(80, verbose=False, **kwargs), []
        learn.fit(3, 1e-2, cbs=[cb, spy('before_validate', lambda: seen.append(sum(zeros(learn.model))))])
        ways.append(seen)
    assert ways[0] == ways[1]

def test_bf16():
    learn, cb = quiet().to_bf16(), SparsifyCallback(90, schedule=lin, verbose=False)
    o = train(learn, cb)
    sure(learn, cb, o, (30, 60, 90))
    assert (o.made, o.skipped) == (24, 0) and torch.bfloat16 in o.dtypes

@pytest.mark.parametrize('schedule', ['one_shot', 'iterative'])
def test_rewound_weights_under_fp16(schedule):
    learn, cb, first = quiet().to_fp16(**some), SparsifyCallback(90, schedule=schedule, lth=True, verbose=False), []
    seen = []
    def look():
        masks = cb.sparsifier.masks
        if masks:
            seen.append(all(torch.equal(p, first[0][k]*masks[k])
                            for k,p in learn.model.named_parameters() if k in masks))
    o = train(learn, cb, 5, [spy('before_train', lambda: first or first.append(weights(learn.model))),
                             spy('after_step', look)])
    assert any(seen) and o.skipped and o.made and o.back == 0 and zeros(learn.model) == asked(90)

def test_kept_weights_moved_furthest():
    learn, cb = quiet().to_fp16(**some), SparsifyCallback(50, criteria=movement, schedule=one_shot, verbose=False)
    before = []
    start = weights(learn.model)
    def look():
        if not cb.sparsifier.masks: before[:] = [weights(learn.model)]
    o = train(learn, cb, 2, [spy('after_step', look, order=14)])
    assert o.skipped and zeros(learn.model) == asked(50)
    for k,mask in cb.sparsifier.masks.items():
        moved = (before[0][k] - start[k]).abs()
        assert moved[mask].min() >= moved[~mask].max()


# Gradients are read unscaled

def gradients(model, learn):
    "Gradients of one batch in full precision, by layer"
    twin = deepcopy(model)
    twin.zero_grad()
    F.cross_entropy(twin(*learn.xb), *learn.yb).backward()
    return [m.weight.grad for m in layers(twin)]

@pytest.mark.parametrize('n_acc,clip', [(16, None), (32, None), (48, None), (16, 0.05), (32, 0.05)])
def test_scores_are_sums_of_unscaled_gradients(n_acc, clip):
    "Σ|w·g| over the steps that were made, g from backward passes in fp32 next to those of the run"
    cbs   = [o for o in (GradientAccumulation(n_acc) if n_acc > 16 else None,
                         GradientClip(clip) if clip else None) if o]
    learn = quiet(opt_func=SGD).to_fp16(init_scale=2.**22, growth_interval=3)
    cb    = SparsifyCallback(50, criteria=gradient, schedule=Schedule(sched_oneshot, start_pct=1.), verbose=False)
    exact_sums, fp32, far, total = {}, [], [], []
    def each_batch():
        now = [g * 16/n_acc for g in gradients(learn.model, learn)]
        fp32[:] = [a + b for a,b in zip(fp32, now)] if fp32 else now
    def each_step():
        ws, gs = zip(*[(m.weight.detach(), m.weight.grad) for m in layers(learn.model)])
        size = torch.cat([g.flatten() for g in gs]).norm()
        if not clip: far.extend(float((a - b).norm() / b.norm()) for a,b in zip(gs, fp32))
        else: total.append(float(size))
        for i,(w,g) in enumerate(zip(ws, gs)): exact_sums[i] = exact_sums.get(i, 0) + (w*g).abs()
        fp32.clear()
    o = train(learn, cb, 2, [*cbs, spy('before_step', each_batch, order=5), spy('before_step', each_step, order=14),
                             spy('after_cancel_step', fp32.clear)])
    assert o.skipped >= 2 and o.made >= 2 and zeros(learn.model) == asked(50)
    assert all(torch.equal(ref, s) for ref,s in zip(cb.sparsifier.refs.values(), exact_sums.values()))
    assert len(exact_sums) == 3
    if clip: assert max(total) <= clip * 1.0001
    else: assert max(far) < 0.1  # scaled they would be some 2²⁰ times as large
    for i,mask in enumerate(cb.sparsifier.masks.values()):
        assert exact_sums[i][mask].min() >= exact_sums[i][~mask].max()

@pytest.mark.parametrize('scale', [None, some, most], ids=['fp32', 'some', 'most'])
@pytest.mark.parametrize('opt_func', [Adam, partial(OptimWrapper, opt=torch.optim.AdamW)], ids=['fastai', 'torch'])
@pytest.mark.parametrize('n_acc', [16, 48, 1000])
@pytest.mark.parametrize('criteria', ['gradient', 'updating_movement'])
def test_an_epoch_that_ends_before_a_step_was_made(criteria, n_acc, opt_func, scale):
    "By skipped steps, or in the middle of an accumulation: gradients are absent, scaled or infinite then"
    learn, cb = quiet(opt_func=opt_func), SparsifyCallback(90, criteria=criteria, schedule=lin, verbose=False)
    if scale: learn.to_fp16(**scale)
    first = []
    def look():
        first.extend(int((~m).flatten().nonzero().max()) + 1 > int((~m).sum()) for m in cb.sparsifier.masks.values())
    o = train(learn, cb, cbs=[spy('after_train', look), *([GradientAccumulation(n_acc)] if n_acc > 16 else [])])
    sure(learn, cb, o, (30, 60, 90))
    # chosen by scores; weights that never moved are as good as each other
    if criteria == 'gradient': assert all(first) and len(first) == 9

def test_compact_steps_of_accumulated_gradients():
    """Epochs of 8 batches, steps of 3, some of them skipped: what is accumulated at the end of an epoch counts in the
    next"""
    runs = []
    for compact in (False, True):
        learn = quiet().to_fp16(init_scale=2.**18, growth_interval=2)
        cb    = SparsifyCallback(90, schedule=one_shot, compact=compact, verbose=False)
        o = train(learn, cb, 6, [GradientAccumulation(48), GradientClip(0.1)])
        sure(learn, cb, o, (0, 0, 90, 90, 90, 90))
        assert o.made + o.skipped == 16 and o.made >= 6 and o.skipped >= 4
        runs.append(weights(learn.model))
    for k in runs[0]: assert torch.allclose(*(r[k].float() for r in runs), rtol=1e-4, atol=1e-5), k

@pytest.mark.parametrize('criteria', ['gradient', 'snip', 'wanda', 'fisher'])
def test_measuring_mixed_up_batches(criteria):
    "`MixUp` has a loss of its own while it trains"
    learn, cb = quiet().to_fp16(**some), SparsifyCallback(90, criteria=criteria, schedule=lin, verbose=False)
    loss_func = learn.loss_func
    o = train(learn, cb, cbs=[MixUp(), GradientAccumulation(32)])
    sure(learn, cb, o, (30, 60, 90))
    assert learn.loss_func is loss_func and o.made and o.skipped


# All together, in any order

class EMA(Callback):
    "Keeps an average of the weights, as `torch.optim.swa_utils` has it"
    def __init__(self, order=20): self.order = order
    def before_fit(self): self.ema = AveragedModel(self.learn.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    def after_step(self): self.ema.update_parameters(self.learn.model)

class Resettable(nn.Module):
    "A network that adds what it remembers of earlier batches, until it is reset"
    def __init__(self):
        super().__init__()
        self.net, self.resets, self.last = digits_net(4), 0, None
    def reset(self): self.resets, self.last = self.resets + 1, None
    def forward(self, x):
        if self.last is not None: x = x + 0.1*self.last
        self.last = x.detach().mean(0, keepdim=True)
        return self.net(x)

def resettable():
    torch.manual_seed(0)
    return Resettable()

everything = dict(
    sparsify = partial(SparsifyCallback, 80, schedule=lin),
    half     = partial(MixedPrecision, init_scale=2.**20, growth_interval=2),
    acc      = partial(GradientAccumulation, 32),
    clip     = partial(GradientClip, 0.1),
    mixup    = MixUp,
    # no epoch is that much better: stops after the third
    stop     = partial(EarlyStoppingCallback, min_delta=100, patience=2),
    plateau  = partial(ReduceLROnPlateau, min_delta=100, patience=1),
    reset    = ModelResetter,
    log      = CSVLogger,
    graph    = ShowGraphCallback,
    ema      = EMA)

def in_order(names, fit):
    # it comes first, as usual: fastai's loggers must wrap it
    learn = learner(model=resettable(), cbs=ProgressCallback())
    cbs = {k: everything[k]() for k in names}
    steps, saw = [], lambda event, what: spy(event, lambda: steps.append(what))
    getattr(learn, fit)(6, 1e-2, cbs=[*cbs.values(), saw('after_cancel_step', 'skipped'), saw('after_step', 'step')])
    return learn, cbs, steps

def orders(n, seed):
    "As listed, backwards, and others"
    rng, names = Random(seed), list(everything)
    return [names, names[::-1], *[rng.sample(names, len(names)) for _ in range(n - 2)]]

@pytest.mark.parametrize('fit', ['fit', 'fit_one_cycle'])
def test_all_callbacks_in_any_order(fit, capsys):
    dense, sparse, masks = [], [], []
    for names in orders(12, fit):
        without = [k for k in names if k != 'sparsify']
        learn, cbs, steps = in_order(without, fit)
        dense.append(weights(learn.model))
        lrs = learn.recorder.lrs
        capsys.readouterr()

        learn, cbs, steps = in_order(names, fit)
        cb, out = cbs['sparsify'], capsys.readouterr().out
        assert learn.epoch == 2 and 0 < steps.count('skipped') < steps.count('step') - 2
        assert learn.recorder.lrs == pytest.approx(lrs) and learn.model.resets == 3*2 + 2
        assert zeros(learn.model) == asked(40) == [r.zeros for r in cb.report.rows]
        assert column(learn) == [h['sparsity'] for h in cb.history] and len(cb.history) == 3
        assert column(learn)[-1] == measured(learn.model)
        assert lines(out) == [(i, round(s, 2)) for i,s in enumerate(column(learn))]
        assert out.count('Final Sparsity: [39.91]%') == 1
        rows = list(csv.reader(open(learn.path/'history.csv')))
        assert rows[0] == list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy',
                                                                'sparsity', 'time']
        assert [float(r[4]) for r in rows[1:]] == pytest.approx(column(learn), abs=1e-4)
        sparse.append(weights(learn.model))
        masks.append(dict(cb.sparsifier.masks))
    assert all(same(dense[0],  d) for d in dense)
    assert all(same(sparse[0], s) for s in sparse)
    assert all(same(masks[0],  m) for m in masks)

def test_reports_are_of_the_moment_of_the_stop(capsys):
    "Stopped after an epoch by a callback listed before or after ours; the rest of the schedule is not made up for"
    for place in (0, 1):
        learn, cb = quiet().to_fp16(**some), SparsifyCallback(90, schedule=lin)
        cbs = [EarlyStoppingCallback(min_delta=100, patience=2), ReduceLROnPlateau(min_delta=100, patience=1)]
        learn.fit(9, 1e-2, cbs=[cb, *cbs] if place else [*cbs, cb])
        out = capsys.readouterr().out
        assert zeros(learn.model) == asked(30) == [r.zeros for r in cb.report.rows] and len(cb.history) == 3
        places = [out.index(w) for w in ('early stopping', 'end of epoch 2: [29.88]%', 'Final Sparsity: [29.88]%')]
        assert places == sorted(places)
        assert learn.opt.hypers[-1]['lr'] == pytest.approx(1e-2 / 100)  # two plateaus

def test_progress_bars_have_the_column(capsys):
    learn, cb = learner(), SparsifyCallback(90, schedule=lin)
    logger = learn.logger
    learn.fit_one_cycle(2, 1e-2, cbs=[ShowGraphCallback(), cb, ProgressCallback()])
    out = capsys.readouterr().out
    heads = [l.split() for l in out.splitlines() if l.split()[:2] == ['epoch', 'train_loss']]
    assert heads[0] == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'sparsity', 'time']
    assert lines(out) == [(0, 44.92), (1, 89.91)] and out.count(f'{100*663/1476:.6f}') == 1
    assert learn.logger == logger and len(learn.metrics) == 1


# What a step does besides

def lookahead(opt_func, params, **kwargs): return Lookahead(opt_func(params, **kwargs), k=3)

optimizers = dict(
    adam = Adam, sgd = partial(SGD, mom=0.9, wd=0.1), rmsprop = partial(RMSProp, mom=0.9), lamb = Lamb, larc = Larc,
    qhadam = QHAdam,
    radam = RAdam, ranger = ranger, lookahead_sgd = partial(lookahead, partial(SGD, mom=0.9)),
    lookahead_adam = partial(lookahead, Adam),
    adamw = partial(OptimWrapper, opt=partial(torch.optim.AdamW, weight_decay=0.1)),
    nesterov = partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.1)),
    torch_rmsprop = partial(OptimWrapper, opt=partial(torch.optim.RMSprop, momentum=0.9)),
    asgd = partial(OptimWrapper, opt=torch.optim.ASGD))

@pytest.mark.parametrize('name', optimizers)
def test_no_optimizer_brings_anything_back(name):
    "Not by momentum, decay, or slow weights"
    learn = quiet(opt_func=optimizers[name]).to_fp16(**some)
    cb = SparsifyCallback(90, schedule=iterative, verbose=False)
    o = train(learn, cb, 5, fit='fit' if name == 'asgd' else 'fit_one_cycle')  # which needs a momentum
    sure(learn, cb, o, (0, 30, 60, 90, 90))
    assert o.skipped and all(torch.isfinite(p).all() for p in learn.model.parameters())

@pytest.mark.parametrize('name', optimizers)
def test_compact_steps_are_the_same_or_refused(name, capsys):
    "The same kept weights as with steps on all of them: what an optimizer makes of one weight depends on no other"
    runs, outs = [], []
    for compact in (False, True):
        learn, late = quiet(opt_func=optimizers[name]).to_fp16(init_scale=2.**20, growth_interval=3), []
        cb = SparsifyCallback(90, schedule=one_shot, compact=compact)
        o = train(learn, cb, 4, [spy('after_cancel_step', lambda: late.append(learn.epoch))])
        sure(learn, cb, o, (0, 90, 90, 90))
        assert late.count(2) + late.count(3) >= 2  # also while steps are compact
        runs.append(weights(learn.model))
        outs.append(capsys.readouterr().out)
    assert ('Steps stay dense' in outs[1]) != ('works on the kept weights only' in outs[1])
    for k in runs[0]: assert torch.allclose(*(r[k].float() for r in runs), rtol=1e-4, atol=1e-5), k

@pytest.mark.parametrize('order', [0, 20, 100])
def test_averaged_weights(order):
    """An average kept next to the model, with or without us in between: training knows nothing of it, and masks make it
    sparse"""
    alone, both = quiet().to_fp16(**some), quiet().to_fp16(**some)
    train(alone, SparsifyCallback(90, schedule=lin, verbose=False))
    cb, ema = SparsifyCallback(90, schedule=lin, verbose=False), EMA(order)
    o = train(both, cb, cbs=[ema])
    sure(both, cb, o, (30, 60, 90))
    assert same(weights(alone.model), weights(both.model)) and o.skipped
    average = deepcopy(ema.ema)
    assert int(average.n_averaged) == 24 and list(average.module.state_dict()) == list(both.model.state_dict())
    assert sum(zeros(average)) < 1327  # what was dropped late is still in the average
    cb.sparsifier.masks.apply(dict(average.module.named_parameters()))
    assert zeros(average) == asked(90) and zeros(ema.ema) != asked(90) and zeros(both.model) == asked(90)

def test_average_in_place_of_the_weights_during_validation():
    "What is measured is what validates; training goes on with its own"
    learn, cb = quiet().to_fp16(**some), SparsifyCallback(90, schedule=lin, verbose=False)
    ema, seen = EMA(), []
    def swap():
        for p,q in zip(learn.model.parameters(), ema.ema.module.parameters()): p.data, q.data = q.data, p.data
    def look(): seen.append(measured(learn.model))
    learn.fit(3, 1e-2, cbs=[cb, ema, spy('before_validate', swap, order=40), spy('after_validate', look, order=49),
                            spy('after_epoch', swap, order=-5)])
    assert column(learn) == seen and seen[-1] < 80
    assert zeros(learn.model) == asked(90) == [r.zeros for r in cb.report.rows]
    assert cb.history[-1]['sparsity'] == measured(learn.model)


# Steps that are cancelled late, after we have seen their gradients

@pytest.mark.parametrize('compact', [False, True], ids=['dense', 'compact'])
@pytest.mark.parametrize('exc', [CancelStepException, CancelBatchException, CancelTrainException, CancelEpochException])
def test_a_step_cancelled_before_us_or_after_us(exc, compact):
    "The same weights, whatever the `order` of the callback that cancels it"
    runs = []
    for order in (14, 30):
        learn = quiet(opt_func=SGD)
        def cancel():
            if (learn.epoch, learn.iter) == (4, 2): raise exc
        learn.fit(6, 1e-2, cbs=[SparsifyCallback(90, schedule=one_shot, compact=compact, verbose=False),
                                spy('before_step', cancel, order=order)])
        runs.append(weights(learn.model))
    assert same(*runs) and sum(zeros(learn.model)) == 1327

@pytest.mark.parametrize('exc', [CancelStepException, CancelBatchException])
def test_gradients_of_a_step_cancelled_after_us_do_not_count(exc):
    "As one that overflowed, and that a callback of a later `order` finds"
    learn = quiet(opt_func=SGD)
    cb, sums = SparsifyCallback(50, criteria=gradient, schedule=Schedule(sched_oneshot, start_pct=1.)), {}
    def bad(): return (learn.epoch, learn.iter) == (0, 3)
    def look():
        for i,m in enumerate(layers(learn.model)):
            if bad(): m.weight.grad.fill_(float('inf'))
            else: sums[i] = sums.get(i, 0) + (m.weight * m.weight.grad).abs().detach()
    def cancel():
        if not bad(): return
        learn.opt.zero_grad()
        raise exc
    learn.fit(2, 1e-2, cbs=[cb, spy('before_step', look, order=14), spy('before_step', cancel, order=30)])
    assert zeros(learn.model) == asked(50)
    for i,mask in enumerate(cb.sparsifier.masks.values()): assert sums[i][mask].min() >= sums[i][~mask].max()


# A model that remembers

@pytest.mark.parametrize('criteria', ['large_final', 'gradient', 'wanda', 'snip'])
def test_what_a_model_remembers_is_not_touched(criteria):
    "Measuring runs the model, between two batches that belong together"
    learn, cb = quiet(model=resettable()), SparsifyCallback(90, criteria=criteria, schedule=lin, verbose=False)
    before, after = [], []
    o = train(learn, cb, 2,
              [ModelResetter(), spy('after_step', lambda: before.append(learn.model.last.clone()), order=14),
                             spy('after_step', lambda: after.append(learn.model.last.clone()), order=16)])
    sure(learn, cb, o, (45, 90))
    assert len(before) == 16 and all(torch.equal(a, b) for a,b in zip(before, after)) and learn.model.last is None
