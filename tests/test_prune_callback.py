"Channels are taken out during training: the loss stays, the optimizer goes on, the learner is as usable as before"
import copy, io, os, subprocess, sys
from functools import partial
from pathlib import Path
from random import Random

import pytest, torch, torch.nn as nn
from fastai.basics import (Adam, Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, OptimWrapper,
                           RMSProp, SGD, TfmdLists, load_learner, noop, ranger)
from fastai.callback.all import EarlyStoppingCallback, GradientAccumulation, GradientClip, SaveModelCallback
from fasterai_clone.prune.all import *
from fasterai_clone.sparse.all import *
from fasterai_clone.fit.checkpoint import read_state
from helpers import learner, spy
import test_faults
from test_coupled import Residual, conv, net, widths
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

torch_opts = {f.__name__: partial(OptimWrapper, opt=f)
              for f in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop)}
torch_opts['SGD'] = partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=0.9))
opts = {'fastai SGD': partial(SGD, mom=0.9), 'fastai Adam': Adam,
        'fastai RMSProp': partial(RMSProp, mom=0.9), **torch_opts}

def state_of(opt):
    "Parameter → its tensors of more than one number, and the lists of parameters"
    inner = opt.opt if isinstance(opt, OptimWrapper) else opt
    lists = [p for g in inner.param_groups for p in g['params']]
    return {p: {k: v for k,v in s.items() if isinstance(v, torch.Tensor) and v.numel() > 1}
            for p,s in inner.state.items()}, lists


# -- the laws --------------------------------------------------------------------------------------

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
    gone = dict(zip((t.layer for t in sp.targets), sp.found.n_pruned(sp.targets)))
    assert widths(after) == [8 - gone['stem'], 8 - gone['a'], 8 - gone['stem'], 6 - gone['c'], 4 - gone['d']]
    assert sum(gone.values()) == 13

@pytest.mark.parametrize('opt', opts)
def test_the_optimizer_has_what_is_left(opt):
    "Its state right after a removal is that before it, at the kept positions"
    learn, before = learner(model=net(), opt_func=opts[opt]), {}
    def keep():
        names = {p: k for k,p in learn.model.named_parameters()}
        before.update({names[p]: ({k: v.clone() for k,v in s.items()}, p.detach().clone())
                       for p,s in state_of(learn.opt)[0].items()})
    def look():
        state, lists = state_of(learn.opt)
        params = dict(learn.model.named_parameters())
        assert {id(p) for p in lists} == {id(p) for p in params.values()} and len(lists) == len(params)
        assert {id(p) for p in state} <= {id(p) for p in params.values()}
        for k,p in params.items():
            tensors, full = before[k]
            at = [[i for i in range(full.shape[d]) if p.shape[d] == full.shape[d] or kept(full, p, d, i)]
                  for d in range(full.ndim)]
            for name,v in tensors.items():
                assert torch.equal(state[p][name], v[torch.meshgrid(*map(torch.tensor, at), indexing='ij')])
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
    assert out.startswith('Pruning of channels until a ratio of [50]%\n  head keeps all: it is the output of the '
                          'model\n')
    assert [h['params'] for h in cb.history][-1] == n_params(learn.model)
    assert [h['channels'] for h in cb.history][-1] == 13
    for h in cb.history:
        assert (f'Parameters at the end of epoch {h["epoch"]}: {h["params"]:,} ({100*h["params"]/n_full:.2f}%), '
                f'in {h["channels"]} channels') in out
    assert f'Final: {n_full:,} → {n_params(learn.model):,} parameters' in out and '26 → 13 channels (50.00%)' in out

def test_every():
    learn, look = learner(model=net()), Look()
    fit(learn, 5, look, quiet(50, 'lin', every_epochs=2))
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
    assert learn.model is model and dict(model.named_modules()) == inside
    assert list(model.state_dict()) == list(net().state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

def test_frozen_layers():
    learn = learner(model=net())
    for p in learn.model.stem.parameters(): p.requires_grad_(False)
    fit(learn, 1, quiet(50))
    assert not learn.model.stem.weight.requires_grad and learn.model.a.weight.requires_grad
    assert widths(learn.model)[0] == 4

def test_parameter_groups_and_their_rates():
    def split(m):
        return [[*m.stem.parameters(), *m.bn0.parameters()],
                [p for n,p in m.named_parameters() if not n.startswith(('stem', 'bn0'))]]
    learn = learner(model=net(), splitter=split)
    fit(learn, 2, quiet(50), lr=slice(1e-4, 1e-2))
    assert [[id(p) for p in g] for g in learn.opt.param_lists] == [[id(p) for p in g] for g in split(learn.model)]
    assert learn.opt.hypers[0]['lr'] != learn.opt.hypers[1]['lr']


# -- how many stay ---------------------------------------------------------------------------------

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
    assert sum(cb.left().values()) == 4 and (context == 'global' or set(widths(learn.model)) == {1})
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


# -- the learner stays usable ----------------------------------------------------------------------

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
    sizes, left = cb.sizes.values(), cb.left().values()
    if cb.context == 'local': assert list(left) == [n - int(0.6*n + 1e-9) for n in sizes]
    else: assert sum(left) == sum(sizes) - int(0.6*sum(sizes) + 1e-9)
    state, lists = state_of(learn.opt)
    assert {id(p) for p in state} == {id(p) for p in lists} == {id(p) for p in learn.model.parameters()}
    assert all(v.shape == p.shape for p,s in state.items() for v in s.values())


# -- refused ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('args, message', [
    (dict(sparsity=100), 'less than 100'), (dict(sparsity=0.5), 'percent'),
    (dict(sparsity=[50, 100]), 'less than 100'),
    (dict(context='erk'), 'context'), (dict(min_channels=0), 'min_channels'), (dict(every_epochs=0), 'every_epochs'),
    (dict(round_to=0), 'round_to'),
    (dict(schedule='apg'), 'agp'), (dict(criteria='large_finel'), 'large_final'), (dict(check=1), 'True or False'),
    (dict(data=3), 'data'),
    (dict(sparsity=[50, 50], context='global'), 'local')])
def test_refused_when_made(args, message):
    with pytest.raises((TypeError, ValueError), match=message): PruneCallback(**{'sparsity': 50, **args})

@pytest.mark.parametrize('cb, kwargs, message', [
    (lambda: [quiet(95, context='global')], {}, 'min|can be removed'),
    (lambda: [quiet(50, include='nothing')], {}, 'nothing'),
    (lambda: [quiet(50), SparsifyCallback(50, verbose=False)], {}, 'one after the other'),
    (lambda: [quiet(50), quiet(50)], {}, 'one after the other'),
    (lambda: [quiet(50)], dict(opt_func=ranger), 'Lookahead'), (lambda: [quiet([50, 50])], {}, '2 numbers for 4'),
    (lambda: [quiet(50)], dict(opt_func=partial(OptimWrapper, opt=torch.optim.Adafactor)), 'Adafactor'),
    (lambda: [quiet(50, include='head')], {}, 'output of the model')])
def test_refused_before_the_first_batch(cb, kwargs, message):
    learn, seen = learner(model=net(), **kwargs), []
    with pytest.raises(ValueError, match=message): fit(learn, 1, *cb(), spy('before_batch', lambda: seen.append(1)))
    assert not seen and n_params(learn.model) == n_full


# -- stop and resume -------------------------------------------------------------------------------

resumes = [('SGD', {}), ('fastai SGD', dict(context='global')), ('fastai Adam', dict(criteria='movement')),
           ('AdamW', dict(criteria='gradient')),
           ('fastai Adam', dict(criteria='random', every_epochs=2))]
def of_case(i, seed=0, folder='.'):
    "Learner and callback of case `i`"
    opt, kwargs = resumes[i]
    return learner(n=64, seed=seed, model=net(), opt_func=opts[opt], path=folder), quiet(50, 'lin', **kwargs)

def resume_all(folder):
    "What the other process does"
    ends = []
    for i in range(len(resumes)):
        learn, cb = of_case(i, 100 + i, folder)
        torch.rand(13)
        learn.load(f'case{i}_1')
        fit(learn, 4, cb, start_epoch=2)
        ends.append(dict(weights=learn.model.state_dict(), history=cb.history, left=cb.left()))
    torch.save(ends, folder/'ends.pt')

def same_weights(a, b):
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a)

def test_resumed_in_a_new_process_bit_for_bit(tmp_path):
    whole = []
    for i in range(len(resumes)):
        learn, cb = of_case(i, folder=tmp_path)
        fit(learn, 4, cb, SaveModelCallback(fname=f'case{i}', every_epoch=True, with_opt=True))
        whole.append((learn.model.state_dict(), cb.history, cb.left()))
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get('PYTHONPATH', '')])
    run  = subprocess.run([sys.executable, '-W', 'ignore', __file__, tmp_path], env={**os.environ, 'PYTHONPATH': path},
                          capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for (weights, history, left), end in zip(whole, torch.load(tmp_path/'ends.pt', weights_only=True)):
        assert same_weights(weights, end['weights']) and history == end['history'] and left == end['left']
        assert len(history) == 4

def saved(tmp_path, *args, n=3, **kwargs):
    "A training of which every epoch is saved"
    learn, cb = learner(n=64, model=net(), path=tmp_path), quiet(50, *(args or ['lin']), **kwargs)
    return fit(learn, n, cb, SaveModelCallback(every_epoch=True, with_opt=True)), cb

def check_optimizer(learn):
    state, lists = state_of(learn.opt)
    assert [id(p) for p in lists] == [id(p) for p in learn.model.parameters()]
    assert {id(p) for p in state} <= {id(p) for p in lists}
    assert all(v.shape == p.shape for p,s in state.items() for v in s.values())

def test_what_is_said_of_a_resume(tmp_path, capsys):
    whole, _ = saved(tmp_path)
    capsys.readouterr()
    learn, cb = learner(n=64, seed=3, model=net(), path=tmp_path), PruneCallback(50, 'lin')
    learn.load('model_0')
    assert capsys.readouterr().out == (f'The checkpoint is of a network with other sizes: the model has '
                                       f'{n_params(learn.model):,} parameters now, '
                                       f'and had {n_full:,}\n')
    fit(learn, 3, cb, start_epoch=1)
    out = capsys.readouterr().out
    assert out.startswith('Resuming at epoch 1\nPruning of channels until a ratio of [50]%\n')
    assert f'Final: {n_full:,} → ' in out and '26 → 13 channels' in out
    assert same_weights(whole.model.state_dict(), learn.model.state_dict())
    for start, ratio, says in ((2, 50, 'goes on at epoch 1, and this fit at epoch 2: sizes are taken over'),
                               (1, 60, 'with another target')):
        learn, cb = learner(n=64, model=net(), path=tmp_path), PruneCallback(ratio, 'lin')
        learn.load('model_0')
        fit(learn, 3, cb, start_epoch=start)
        assert says in capsys.readouterr().out
        assert sum(cb.left().values()) == sum(n - int(ratio*n/100) for n in cb.sizes.values())
    fit(learner(n=64, model=net()), 3, PruneCallback(50), start_epoch=1)
    assert 'No state was loaded: this fit starts a new schedule at epoch 1' in capsys.readouterr().out

def test_by_layer_again(tmp_path):
    ratios = {'a': 50, 'c': 50}
    learn = learner(n=64, model=net(), path=tmp_path)
    fit(learn, 3, quiet(ratios, 'lin'), SaveModelCallback(every_epoch=True, with_opt=True))
    again = learner(n=64, seed=3, model=net(), path=tmp_path).load('model_1')
    fit(again, 3, quiet(ratios, 'lin'), start_epoch=2)
    assert widths(again.model) == [8, 4, 8, 3, 4] and same_weights(learn.model.state_dict(), again.model.state_dict())

def test_the_same_callback_after_a_crash(tmp_path):
    whole, _ = saved(tmp_path)
    learn, cb = learner(n=64, model=net(), path=tmp_path), quiet(50, 'lin')
    def crash():
        if learn.epoch == 2: raise RuntimeError('power')
    with pytest.raises(RuntimeError, match='power'):
        fit(learn, 3, cb, spy('after_batch', crash), SaveModelCallback(fname='b', every_epoch=True, with_opt=True))
    learn.load('b_0')  # larger than the model is by now
    check_optimizer(learn)
    fit(learn, 3, cb, start_epoch=1)
    assert same_weights(whole.model.state_dict(), learn.model.state_dict())

def test_one_channel_each_again(tmp_path):
    learn = learner(n=64, model=net(), path=tmp_path)
    fit(learn, 3, quiet(99, agp(end_pct=0.6)), SaveModelCallback(every_epoch=True, with_opt=True))
    assert set(widths(learn.model)) == {1}
    again, cb = learner(n=64, seed=3, model=net(), path=tmp_path).load('model_1'), quiet(99, agp(end_pct=0.6))
    fit(again, 3, cb, start_epoch=2)
    assert same_weights(learn.model.state_dict(), again.model.state_dict()) and sum(cb.left().values()) == 4

def test_state_by_hand(tmp_path):
    whole, _ = saved(tmp_path)
    learn, cb = learner(n=64, model=net(), path=tmp_path), quiet(50, 'lin')
    with pytest.raises(ValueError, match='no state to save before the first `fit`'): cb.state_dict()
    with pytest.raises(ValueError, match='it has no asked, at_first'): cb.load_state_dict(dict(sizes={}))
    states = []
    fit(learn, 3, cb, spy('after_epoch', lambda: states.append((cb.state_dict(), copy.deepcopy(learn.model),
                                                                copy.deepcopy(learn.opt.state_dict()))), 61))
    state, model, opt = states[0]
    again, cb = learner(n=64, seed=3, model=net()), quiet(50, 'lin')
    cb.load_state_dict(state)
    with pytest.raises(ValueError, match='other sizes than the state'): fit(again, 3, cb, start_epoch=1)
    reshape_to(again.model, state['sizes']).load_state_dict(model.state_dict())
    again.create_opt()
    again.opt.load_state_dict(opt)
    fit(again, 3, cb, start_epoch=1)
    assert same_weights(whole.model.state_dict(), again.model.state_dict())

def test_a_checkpoint_of_the_end(tmp_path, capsys):
    """Saved without the callback; a dense learner takes its sizes, plain PyTorch refuses it, and a dense checkpoint has
    no sizes"""
    learn, _ = saved(tmp_path)
    learn.model_dir = '.'
    assert read_state(learn.save('end')) [0].keys() == {'sizes'}
    x, y  = learn.dls.valid.one_batch()
    dense = learner(n=64, seed=4, model=net(), path=tmp_path, model_dir='.')
    dense.create_opt()
    dense.load('end')
    assert torch.equal(dense.model.eval()(x), learn.model.eval()(x)) and 'other sizes' in capsys.readouterr().out
    check_optimizer(dense)
    fit(dense, 1)
    with pytest.raises(RuntimeError, match='size mismatch'):
        net().load_state_dict(torch.load(tmp_path/'end.pth', weights_only=False)['model'])
    plain = learner(n=64, model=net(), path=tmp_path, model_dir='.')
    plain.create_opt()
    assert read_state(plain.save('dense')) is None
    with pytest.raises(RuntimeError, match='size mismatch'): learn.load('dense')
    check_optimizer(learn)
    file = io.BytesIO()
    learn.save(file)
    file.seek(0)
    assert widths(learner(n=64, model=net()).load(file).model) == [4, 4, 4, 3, 2]

def test_without_the_prune_modules(tmp_path):
    learn, _ = saved(tmp_path, n=1)
    code = f'''if True:
        from fasterai_clone.sparse.all import *
        import sys
        from fastai.basics import *
        dls = DataLoaders(*[DataLoader(list(range(4)), bs=2)]*2)
        learn = Learner(dls, nn.Linear(2, 3), CrossEntropyLossFlat(), path={str(tmp_path)!r})
        try: learn.load('model_0')
        except ValueError as e: print(e)
        if 'fasterai_clone.prune.prune_callback' in sys.modules: raise SystemExit('imported')'''
    run = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert run.returncode == 0 and 'import `fasterai_clone.prune.all`' in run.stdout, run.stderr

@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_a_load_that_fails_changes_nothing(tmp_path, monkeypatch, error):
    saved(tmp_path)
    learn = learner(n=64, model=net(), path=tmp_path)
    fit(learn, 1)
    before, ids = copy.deepcopy(learn.model.state_dict()), [id(p) for p in learn.model.parameters()]
    state = {k: dict(v) for k,v in enumerate(learn.opt.state_dict()['state'])}
    def fails(*args, **kwargs): raise error('stop')
    monkeypatch.setattr('fastai.learner.load_model', fails)
    with pytest.raises(error): learn.load('model_1')
    assert [id(p) for p in learn.model.parameters()] == ids and same_weights(learn.model.state_dict(), before)
    assert learn.model.stem.out_channels == 8
    check_optimizer(learn)
    for a,b in zip(state.values(), learn.opt.state_dict()['state']):
        assert all(torch.equal(a[k], b[k]) if torch.is_tensor(b[k]) else a[k] == b[k] for k in b)
    monkeypatch.undo()
    assert widths(learn.load('model_1').model) == [6, 6, 6, 4, 3]
    with pytest.raises(ValueError, match='not the model that was thinned'): learner(n=64, path=tmp_path).load('model_1')

def test_save_model_goes_back_to_an_epoch_of_other_sizes(tmp_path, capsys):
    "As when no later epoch has a loss that is a number"
    learn, cb = learner(n=64, model=net(), path=tmp_path), PruneCallback(50, 'lin', criteria='movement')
    keep = SaveModelCallback()
    def never_better(): keep.best = -float('inf') if learn.epoch else float('inf')
    fit(learn, 3, cb, keep, spy('after_validate', never_better))
    out = capsys.readouterr().out
    assert widths(learn.model) == [7, 7, 7, 5, 4]
    assert 'has other sizes: these are the current sizes of the network' in out
    assert f'{n_full:,} → {n_params(learn.model):,} parameters' in out and '26 → 23 channels' in out
    assert all(v.shape == dict(learn.model.named_parameters())[k].shape for k,v in cb.sparsifier.refs.items())
    check_optimizer(learn)
    fit(learn, 2, cb)
    assert widths(learn.model) == [4, 4, 4, 3, 2]

def test_attention_goes_back_to_all_its_heads(tmp_path):
    attn  = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.)
    whole = copy.deepcopy(attn)
    x     = torch.randn(2, 5, 16)
    groups = coupled_groups(attn, x)
    small = thin(attn,
                 coupled_masks(groups, channel_scores(groups, {k: p.abs() for k,p in attn.named_parameters()}), 50), x)
    sizes = sizes_of(small)
    again = reshape_to(reshape_to(small, sizes_of(whole)), sizes_of(whole))
    again.load_state_dict(whole.state_dict())
    torch.testing.assert_close(again.eval()(x), whole.eval()(x))
    assert sizes_of(again)['tensors'] == sizes_of(whole)['tensors'] and again.self_attn.num_heads == 4
    assert sizes_of(reshape_to(again, sizes)) == sizes


# -- stopped in the middle -------------------------------------------------------------------------

class Stop(test_faults.Interrupt):
    "Ctrl-C at a line inside of a removal; what puts things back is not stopped itself"
    def __call__(self, frame, what, arg):
        if not frame.f_code.co_filename.startswith(test_faults.LIBRARY): return None
        names, f = set(), frame
        while f is not None:
            names.add(f.f_code.co_name)
            f = f.f_back
        return super().__call__(frame, what, arg) if 'prune_to' in names and 'put_back' not in names else None

def small_learner():
    torch.manual_seed(0)
    items = [(torch.randn(1, 6, 6), torch.tensor(i % 10)) for i in range(8)]
    return Learner(DataLoaders(*[DataLoader(TfmdLists(items, noop), bs=4) for _ in 'tv']), net(),
                   loss_func=CrossEntropyLossFlat())

@pytest.mark.parametrize('criteria, opt', [('large_final', Adam), ('movement', opts['SGD']),
                                           ('gradient', opts['fastai SGD'])])
def test_ctrl_c_in_a_removal(criteria, opt):
    "The network and what the optimizer knows are those before or those after it"
    def train(stop):
        learn, cb, trained = small_learner(), quiet(50, 'one_shot', criteria=criteria), {}
        learn.opt_func = opt
        def keep(): trained.update(copy.deepcopy(learn.model.state_dict()))
        try:
            with stop: fit(learn, 1, cb, spy('after_train', keep, 69))
        except KeyboardInterrupt: pass
        return learn, cb, trained
    with Stop() as lines: want = train(lines)[0].model.state_dict()
    rng, seen = Random(3), set()
    last = max(n for ns in lines.seen.values() for n in ns)
    for nth in sorted({*(rng.choice(lines.seen[l]) for l in rng.sample(sorted(lines.seen), 6)),
                       *range(last - 4, last + 1)}):
        learn, cb, trained = train(stop := Stop(nth))
        if stop.at is None: continue  # at a `with`
        state = learn.model.state_dict()
        is_before, is_after = same_weights(state, trained), same_weights(state, want)
        assert is_before != is_after, stop.at
        seen.add(is_after)
        assert learn.model.stem.out_channels == (4 if is_after else 8) and cb.sparsifier.model is learn.model, stop.at
        assert {t.name: t.groups.n for t in cb.sparsifier.targets}['stem.weight'] == len(state['stem.weight']), stop.at
        check_optimizer(learn)
        fit(learn, 1, cb)
        assert widths(learn.model) == [4, 4, 4, 3, 2], stop.at
    assert False in seen

@pytest.mark.parametrize('where', ['verify', 'shrink', 'carry_over', '_measure_sizes', 'new_sparsifier'])
def test_an_error_in_a_removal(where, monkeypatch):
    import fasterai_clone.prune.prune_callback as module
    def fails(*args, **kwargs): raise RuntimeError('stop')
    learn, cb, before = small_learner(), quiet(50, 'one_shot'), {}
    def keep():
        before.update(copy.deepcopy(learn.model.state_dict()))
        if where == 'new_sparsifier': monkeypatch.setattr(PruneCallback, where, fails)
        elif where == '_measure_sizes': monkeypatch.setattr(module, 'has_no_tensors', fails)
        else: monkeypatch.setattr(module, where, fails)
    with pytest.raises(RuntimeError, match='stop'): fit(learn, 1, cb, spy('after_train', keep, 69))
    assert same_weights(learn.model.state_dict(), before) and learn.model.stem.out_channels == 8
    check_optimizer(learn)
    monkeypatch.undo()
    fit(learn, 1, cb)
    assert widths(learn.model) == [4, 4, 4, 3, 2]


# -- compiled --------------------------------------------------------------------------------------

@pytest.mark.parametrize('how', ['whole', 'in place', 'part'])
def test_compiled(how, tmp_path):
    "In more steps than torch compiles a function anew, and without a break in the graph"
    def train(compiled):
        learn, graphs = small_learner(), []
        learn.path = tmp_path
        def backend(gm, inputs): graphs.append(gm); return gm.forward
        if not compiled: pass
        elif how == 'whole':    learn.model = torch.compile(learn.model, backend=backend, fullgraph=True)
        elif how == 'in place': learn.model.compile(backend=backend, fullgraph=True)
        else:                   learn.model.a = torch.compile(learn.model.a, backend=backend, fullgraph=True)
        fit(learn, 7, quiet(80, 'lin', context='global'), SaveModelCallback(fname=f'{compiled}', every_epoch=True))
        return learn, graphs
    (learn, graphs), (plain, _) = train(True), train(False)
    ours, theirs = learn.model.state_dict(), plain.model.state_dict()
    assert len(graphs) > 8 and all(torch.allclose(a, b) for a,b in zip(ours.values(), theirs.values(), strict=True))
    learn.load('True_2')  # larger
    assert n_params(learn.model) == n_params(plain.load('False_2').model) > sum(p.numel() for p in ours.values())
    torch._dynamo.reset()


# -- what cannot be done ---------------------------------------------------------------------------

class Wild(nn.Module):
    "Copies numbers with NumPy, where no trace can follow"
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3), nn.Linear(4, 10)
    def forward(self, x): return self.b(torch.from_numpy(self.a(x).detach().numpy().copy()).mean((2, 3)))

class Alone(nn.Module):
    "One layer, which is the output"
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(36, 10)
    def forward(self, x): return self.a(x.flatten(1))

@pytest.mark.parametrize('model, x, message', [
    (Wild, (1, 6, 6), 'no channel can be removed. a: the model exports it with `numpy`; b: it is the output'),
    (Alone, (1, 6, 6), 'no channel can be removed. a: it is the output of the model'),
    (net, (3, 6, 6), r'does not run on `example_inputs`, in `stem` \(Conv2d\)')])
def test_models_that_cannot_be_pruned(model, x, message):
    items = [(torch.randn(*x), torch.tensor(i % 10)) for i in range(8)]
    learn = Learner(DataLoaders(*[DataLoader(TfmdLists(items, noop), bs=4) for _ in 'tv']), model(),
                    loss_func=CrossEntropyLossFlat())
    before, inside = copy.deepcopy(learn.model.state_dict()), sorted(vars(learn.model))
    with pytest.raises(ValueError, match=message): fit(learn, 1, quiet(50))
    assert same_weights(learn.model.state_dict(), before) and sorted(vars(learn.model)) == inside
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())

def test_what_stays_is_said(capsys):
    learn = learner(n=64, model=net())
    fit(learn, 1, PruneCallback(99, 'one_shot', min_channels=3))
    assert '  stem.weight keeps 3 of 8 channels, where 99% would leave 1: `min_channels` 3\n' in capsys.readouterr().out
    assert set(widths(learn.model)) == {3}
    learn = learner(n=64, model=net())
    fit(learn, 1, PruneCallback(40, 'one_shot', round_to=4))
    out = capsys.readouterr().out
    assert 'keeps 8 of 8 channels, where 40% would leave 5: `round_to` 4\n' in out
    assert 'd.weight' not in out.split('Param')[0].replace('d.weight keeps 4 of 4', '')

def test_outputs_are_never_pruned():
    learn = learner(n=64, model=net())
    fit(learn, 1, quiet(90, 'one_shot'))
    assert learn.model.head.out_features == 10 and learn.get_preds()[0].shape[1] == 10


if __name__ == '__main__': resume_all(Path(sys.argv[1]))

def grouped():
    torch.manual_seed(0)
    return nn.Sequential(conv(1, 8), nn.ReLU(), conv(8, 12, groups=2), nn.ReLU(), conv(12, 6), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))

@pytest.mark.parametrize('context', ['local', 'global'])
def test_a_convolution_whose_parts_go(context, tmp_path):
    "Its two parts count as two channels, also when one is left and all of its channels could go on their own"
    learn, cb = learner(n=64, model=grouped(), path=tmp_path), quiet(50, 'lin', context)
    keep = spy('after_epoch', lambda: learn.save(f'at_{learn.epoch}'))
    fit(learn, 4, cb, keep)
    channels = [h['channels'] for h in cb.history]
    assert channels == ([8, 7, 6, 4] if context == 'local' else [7, 6, 5, 4]) and sum(cb.left().values()) == 4
    sizes = [learn.model[i].out_channels for i in (0, 2, 4)]  # two parts and six filters are 8 channels
    assert sizes in ([4, 6, 3], [8, 12, 2])  # of the two parts one, or both
    fit(learn, 2, cb)
    assert [learn.model[i].out_channels for i in (0, 2, 4)] == sizes
    for e in range(3):
        again, other = learner(n=64, model=grouped(), path=tmp_path), quiet(50, 'lin', context)
        again.load(f'at_{e}')
        fit(again, 4, other, start_epoch=e+1)
        assert [again.model[i].out_channels for i in (0, 2, 4)] == sizes
        assert [h['channels'] for h in other.history] == channels

def test_a_checkpoint_that_is_refused_changes_nothing(tmp_path):
    "torch copies what fits before it says what does not"
    plain = learner(n=64, seed=3, model=net(seed=3), path=tmp_path, model_dir='.')
    plain.create_opt()
    plain.save('dense')
    learn = fit(learner(n=64, model=net(), path=tmp_path, model_dir='.'), 1, quiet(50, 'one_shot'))
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(RuntimeError, match='size mismatch'): learn.load('dense')
    assert all(torch.equal(before[k], v) for k,v in learn.model.state_dict().items())

def test_layers_without_filters_are_left_out():
    "Where `layer_type` names such a layer itself, it is refused"
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.GRU(8, 6))
    sp = Sparsifier(model, 'filter', layer_type=nn.Module, coupled=True, example_inputs=torch.randn(2, 3, 64))
    assert [t.layer for t in sp.targets] == ['0'] and '2' in str(sp.report().left_out)
    with pytest.raises(ValueError,
                       match="Unknown granularity of weight_ih_l0 of GRU 'filter'.*leave 2 out, with `exclude`"):
        Sparsifier(model, 'filter', layer_type=(nn.Linear, nn.GRU), coupled=True, example_inputs=torch.randn(2, 3, 64))
