"Channels are taken out during training: the loss stays, the optimizer goes on, the learner is as usable as before"
import copy
from functools import partial

import pytest, torch, torch.nn as nn
from fastai.basics import (Adam, Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, OptimWrapper, RMSProp, SGD, TfmdLists,
                           load_learner, noop, ranger)
from fastai.callback.all import EarlyStoppingCallback, GradientAccumulation, GradientClip, SaveModelCallback
from fasterai_clone.prune.prune_callback import PruneCallback
from fasterai_clone.prune.thin import load_thinned, save_thinned
from fasterai_clone.sparse.all import *
from helpers import learner, spy
from test_coupled import Residual, net, widths
from test_thin import Anything, lively

n_full = sum(p.numel() for p in net().parameters())
def n_params(m): return sum(p.numel() for p in m.parameters())

class Look(Callback):
    "The model just before a removal and just after it"
    order = 69
    def __init__(self): self.seen = []
    def after_train(self): self.before = copy.deepcopy(self.model)
    def before_validate(self): self.seen.append((self.before, copy.deepcopy(self.model)))

def fit(learn, n, *cbs, lr=1e-2, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, cbs=list(cbs), **kwargs)
    return learn

def quiet(*args, **kwargs): return PruneCallback(*args, **{'verbose': False, **kwargs})

torch_opts = {f.__name__: partial(OptimWrapper, opt=f) for f in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop)}
torch_opts['SGD'] = partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=0.9))
opts = {'fastai SGD': partial(SGD, mom=0.9), 'fastai Adam': Adam, 'fastai RMSProp': partial(RMSProp, mom=0.9), **torch_opts}

def state_of(opt):
    "Parameter → its tensors of more than one number, and the lists of parameters"
    inner = opt.opt if isinstance(opt, OptimWrapper) else opt
    lists = [p for g in inner.param_groups for p in g['params']]
    return {p: {k: v for k,v in s.items() if isinstance(v, torch.Tensor) and v.numel() > 1} for p,s in inner.state.items()}, lists


# -- the laws ----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('criteria', ['large_final', 'squared_final', 'fpgm'])
def test_the_loss_right_after_is_that_of_the_masked_model(context, criteria):
    learn, look = learner(model=net()), Look()
    fit(learn, 1, look, quiet(50, 'one_shot', context, criteria))
    (before, after), (x, y) = look.seen[0], learn.dls.valid.one_batch()
    sp = Sparsifier(before, 'filter', context, criteria, coupled=True, example_inputs=x)
    sp.sparsify_model(50)
    with torch.no_grad(): a, b = (learn.loss_func(m.eval()(x), y) for m in (before, after))
    assert abs(a - b) < 1e-5
    gone = dict(zip((t.layer for t in sp.targets), sp._gone(sp.targets)))
    assert widths(after) == [8 - gone['stem'], 8 - gone['a'], 8 - gone['stem'], 6 - gone['c'], 4 - gone['d']] and sum(gone.values()) == 13

@pytest.mark.parametrize('opt', opts)
def test_the_optimizer_has_what_is_left(opt):
    "Its state right after a removal is that before it, at the kept positions"
    learn, before = learner(model=net(), opt_func=opts[opt]), {}
    def keep():
        names = {p: k for k,p in learn.model.named_parameters()}
        before.update({names[p]: ({k: v.clone() for k,v in s.items()}, p.detach().clone()) for p,s in state_of(learn.opt)[0].items()})
    def look():
        state, lists = state_of(learn.opt)
        params = dict(learn.model.named_parameters())
        assert {id(p) for p in lists} == {id(p) for p in params.values()} and len(lists) == len(params)
        assert {id(p) for p in state} <= {id(p) for p in params.values()}
        for k,p in params.items():
            tensors, full = before[k]
            at = [[i for i in range(full.shape[d]) if p.shape[d] == full.shape[d] or kept(full, p, d, i)] for d in range(full.ndim)]
            for name,v in tensors.items(): assert torch.equal(state[p][name], v[torch.meshgrid(*map(torch.tensor, at), indexing='ij')])
            assert set(state[p]) == set(tensors) and state[p]
    def kept(full, p, d, i):
        "Is a value of line `i` along axis `d` still there? Weights are random, so that says it"
        return bool(torch.isin(full.select(d, i), p.detach()).any())
    fit(learn, 1, spy('after_train', keep, 69), spy('before_validate', look), quiet(50, 'one_shot'))
    assert widths(learn.model) == [4, 4, 4, 3, 2]
    now = n_params(learn.model)
    fit(learn, 1)
    assert n_params(learn.model) == now and all(torch.isfinite(p).all() for p in learn.model.parameters())

def test_on_schedule(capsys):
    learn = learner(model=net())
    cb = PruneCallback(50, 'iterative')
    seen = []
    fit(learn, 4, cb, spy('before_validate', lambda: seen.append(widths(learn.model))))
    def at(s): return [n - int(s*n/100 + 1e-9) for n in (8, 8, 8, 6, 4)]
    assert seen == [at(cb.schedule.sparsity((e+1)/4, 50)) for e in range(4)] and seen[-1] == [4, 4, 4, 3, 2]
    out = capsys.readouterr().out
    assert out.startswith('Pruning of channels until a ratio of [50]%\n  head keeps all: it is the output of the model\n')
    assert [h['params'] for h in cb.history][-1] == n_params(learn.model) and [h['channels'] for h in cb.history][-1] == 13
    for h in cb.history: assert f'Parameters at the end of epoch {h["epoch"]}: {h["params"]:,} ({100*h["params"]/n_full:.2f}%), in {h["channels"]} channels' in out
    assert f'Final: {n_full:,} → {n_params(learn.model):,} parameters' in out and '26 → 13 channels (50.00%)' in out

def test_every():
    learn, look = learner(model=net()), Look()
    fit(learn, 5, look, quiet(50, 'lin', every=2))
    sizes = [n_params(a) for _,a in look.seen]
    assert [a == b for a,b in zip(sizes, sizes[1:])] == [False, True, False, False]

@pytest.mark.parametrize('criteria', ['gradient', 'movement', 'updating_movement', 'fisher', 'sanh_movement'])
@pytest.mark.parametrize('context', ['local', 'global'])
def test_criteria_that_compare(criteria, context):
    "What they compare with is cut like the parameters"
    learn = learner(model=net())
    cb = quiet(50, 'lin', context, criteria)
    fit(learn, 3, cb)
    assert sum(widths(learn.model)) - learn.model.b.out_channels == 13
    params = dict(learn.model.named_parameters())
    assert all(v.shape == params[k].shape for k,v in cb.sparsifier.refs.items())

def test_initial_weights_are_those_of_the_kept_channels():
    learn = learner(model=net())
    first = copy.deepcopy(learn.model)
    cb = quiet(25, 'one_shot', criteria='movement')
    fit(learn, 2, cb)
    assert len(rows := cb.sparsifier.refs['d.weight']) == 3
    assert all(any(r.shape == w[:len(r)].shape and torch.isin(r, w).all() for w in first.d.weight) for r in rows)

def test_modules_are_the_same():
    model = net()
    learn, inside = learner(model=model), dict(model.named_modules())
    fit(learn, 1, quiet(50))
    assert learn.model is model and dict(model.named_modules()) == inside and list(model.state_dict()) == list(net().state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

def test_frozen_layers():
    learn = learner(model=net())
    for p in learn.model.stem.parameters(): p.requires_grad_(False)
    fit(learn, 1, quiet(50))
    assert not learn.model.stem.weight.requires_grad and learn.model.a.weight.requires_grad and widths(learn.model)[0] == 4

def test_parameter_groups_and_their_rates():
    def split(m): return [[*m.stem.parameters(), *m.bn0.parameters()], [p for n,p in m.named_parameters() if not n.startswith(('stem', 'bn0'))]]
    learn = learner(model=net(), splitter=split)
    fit(learn, 2, quiet(50), lr=slice(1e-4, 1e-2))
    assert [[id(p) for p in g] for g in learn.opt.param_lists] == [[id(p) for p in g] for g in split(learn.model)]
    assert learn.opt.hypers[0]['lr'] != learn.opt.hypers[1]['lr']


# -- how many stay -----------------------------------------------------------------------------------------------------------------------

def test_a_second_fit_counts_from_the_beginning():
    learn, cb = learner(model=net()), quiet(50)
    fit(learn, 2, cb), fit(learn, 2, cb)
    assert widths(learn.model) == [4, 4, 4, 3, 2]
    fit(learn, 1, quiet(50))
    assert widths(learn.model) == [2, 2, 2, 2, 1]

@pytest.mark.parametrize('context', ['local', 'global', 'lamp'])
def test_min_channels(context):
    learn = learner(model=net())
    fit(learn, 2, quiet(50 if context != 'local' else 99, context=context, min_channels=3))
    assert min(widths(learn.model)) >= 3 and (context != 'local' or set(widths(learn.model)) == {3})

@pytest.mark.parametrize('context', ['local', 'global', 'lamp'])
def test_one_channel_each(context):
    "The most that can go, in several steps; a group of one channel is left alone"
    learn = learner(model=net())
    cb = quiet(85 if context != 'local' else 99, 'lin', context)
    fit(learn, 4, cb)
    assert set(widths(learn.model)) == {1} and sum(cb._left().values()) == 4 if context == 'local' else sum(cb._left().values()) == 26 - 22
    fit(learn, 1)

def test_by_layer_and_rounded():
    learn = learner(model=net())
    fit(learn, 2, quiet({'a': 50, 'c': 50}))
    assert widths(learn.model) == [8, 4, 8, 3, 4]
    learn = learner(model=net())
    fit(learn, 2, quiet(40, round_to=4))
    assert widths(learn.model) == [8, 8, 8, 4, 4]
    learn = learner(model=net())
    fit(learn, 1, quiet(70, exclude=['c', 'd'], round_to=2))
    assert widths(learn.model) == [4, 4, 4, 6, 4]


# -- the learner stays usable ------------------------------------------------------------------------------------------------------------

def test_save_load_export_find(tmp_path):
    learn = learner(model=net(), path=tmp_path)
    fit(learn, 2, quiet(50))
    (tmp_path/'models').mkdir(exist_ok=True)
    x, y = learn.dls.valid.one_batch()
    with learn.no_bar(), learn.no_logging(): want = learn.validate()
    learn.save('small')
    fit(learn, 1)
    learn.load('small')
    with learn.no_bar(), learn.no_logging(): assert learn.validate() == want
    learn.export('small.pkl')
    torch.testing.assert_close(load_learner(tmp_path/'small.pkl').model.eval()(x), learn.model.eval()(x))
    save_thinned(learn.model, tmp_path/'thin')
    torch.testing.assert_close(load_thinned(Residual, tmp_path/'thin').eval()(x), learn.model.eval()(x))
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=5, show_plot=False)
    assert widths(learn.model) == [4, 4, 4, 3, 2]

def test_nothing_happens_in_lr_find_and_validate():
    learn = learner(model=net(), cbs=quiet(50, 'one_shot'))
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=3, show_plot=False)
        learn.validate()
    assert n_params(learn.model) == n_full

def test_the_best_epoch_is_one_of_the_final_size(tmp_path):
    "Later epochs are worse, but only they have the size the network ends with"
    learn = learner(model=net(), path=tmp_path)
    fit(learn, 4, SaveModelCallback(), quiet(50, agp(end_pct=0.5)))
    assert widths(learn.model) == [4, 4, 4, 3, 2]
    losses = [v[1] for v in learn.recorder.values]
    with learn.no_bar(), learn.no_logging(): assert learn.validate()[0] == pytest.approx(min(losses[1:]))

def test_beside_other_callbacks():
    learn = learner(model=net())
    fit(learn, 3, quiet(50), GradientAccumulation(32), GradientClip(1.), EarlyStoppingCallback(patience=5))
    assert widths(learn.model) == [4, 4, 4, 3, 2]

def test_it_gets_smaller_while_a_graph_of_before_is_alive():
    learn, alive = learner(model=net()), []
    fit(learn, 3, quiet(50, 'lin'), spy('after_loss', lambda: alive.append(learn.pred)))
    assert widths(learn.model) == [4, 4, 4, 3, 2] and alive

@pytest.mark.parametrize('seed', range(8))
def test_anything(seed):
    "Random networks, in three removals: the channels asked for are gone, the optimizer has what is left"
    torch.manual_seed(seed)
    items = [(torch.randn(3, 5, 5), torch.tensor(i % 3)) for i in range(16)]
    dls   = DataLoaders(*[DataLoader(TfmdLists(items, noop), bs=8) for _ in 'tv'])
    learn = Learner(dls, lively(Anything(seed), seed), loss_func=CrossEntropyLossFlat())
    cb = quiet(60, 'lin', ['local', 'global'][seed % 2])
    fit(learn, 3, cb, lr=1e-3), fit(learn, 1, lr=1e-3)
    sizes, left = cb.sizes.values(), cb._left().values()
    if cb.context == 'local': assert list(left) == [n - int(0.6*n + 1e-9) for n in sizes]
    else: assert sum(left) == sum(sizes) - int(0.6*sum(sizes) + 1e-9)
    state, lists = state_of(learn.opt)
    assert {id(p) for p in state} == {id(p) for p in lists} == {id(p) for p in learn.model.parameters()}
    assert all(v.shape == p.shape for p,s in state.items() for v in s.values())


# -- refused -----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('args, message', [
    (dict(pruning_ratio=100), 'less than 100'), (dict(pruning_ratio=0.5), 'percent'), (dict(pruning_ratio=[50, 100]), 'less than 100'),
    (dict(context='erk'), 'context'), (dict(min_channels=0), 'min_channels'), (dict(every=0), 'every'), (dict(round_to=0), 'round_to'),
    (dict(schedule='apg'), 'agp'), (dict(criteria='large_finel'), 'large_final'), (dict(check=1), 'True or False'), (dict(data=3), 'data'),
    (dict(pruning_ratio=[50, 50], context='global'), 'local')])
def test_refused_when_made(args, message):
    with pytest.raises((TypeError, ValueError), match=message): PruneCallback(**{'pruning_ratio': 50, **args})

@pytest.mark.parametrize('cb, kwargs, message', [
    (lambda: [quiet(95, context='global')], {}, 'min|can go'), (lambda: [quiet(50, include='nothing')], {}, 'nothing'),
    (lambda: [quiet(50), SparsifyCallback(50, verbose=False)], {}, 'one after the other'), (lambda: [quiet(50), quiet(50)], {}, 'one after the other'),
    (lambda: [quiet(50)], dict(opt_func=ranger), 'Lookahead'), (lambda: [quiet([50, 50])], {}, '2 numbers for 4'),
    (lambda: [quiet(50)], dict(opt_func=partial(OptimWrapper, opt=torch.optim.Adafactor)), 'Adafactor'),
    (lambda: [quiet(50, include='head')], {}, 'output of the model')])
def test_refused_before_the_first_batch(cb, kwargs, message):
    learn, seen = learner(model=net(), **kwargs), []
    with pytest.raises(ValueError, match=message): fit(learn, 1, *cb(), spy('before_batch', lambda: seen.append(1)))
    assert not seen and n_params(learn.model) == n_full
