"""A rewind takes everything back: all parameters, statistics, buffers, and what the optimizer knows; only masks and
learning rate stay"""
import pytest, torch, torch.nn as nn
from fastai.basics import OptimWrapper, SGD, ranger
from fastai.callback.all import GradientAccumulation
from fasterai_clone.sparse.all import *
from fasterai_clone.fit.state import optimizer_state
from helpers import exact, layers, learner, spy


class Words(nn.Module):
    """Rows of an image as words: an embedding, tied weights, all kinds of norms, buffers that are saved and one that is
    not"""
    def __init__(self):
        super().__init__()
        self.embed, self.rms, self.layer = nn.Embedding(17, 8), nn.RMSNorm(8), nn.LayerNorm(8)
        self.up, self.batch, self.group = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GroupNorm(2, 16)
        self.same, self.out, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 10)
        self.out.weight = self.same.weight
        self.register_buffer('steps', torch.zeros((), dtype=torch.long))
        self.register_buffer('drift', torch.zeros(3), persistent=False)
    def forward(self, x):
        if self.training:
            self.steps += 1
            self.drift += 0.5
        x = self.layer(self.rms(self.embed((x.flatten(1)*16).long().clamp(0, 16)))).mean(1)
        x = self.group(self.batch(self.up(x))).relu()
        return self.head(self.out(self.same(x).relu()).relu())

def everything(model):
    return {k: v.detach().clone() for k,v in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}

def flat(x):
    "All tensors and numbers in a state, in order"
    if isinstance(x, dict): return [o for k in x for o in flat(x[k])]
    if isinstance(x, (list, tuple)) or type(x).__name__ == 'L': return [o for v in x for o in flat(v)]
    return [x]

def equal(a, b):
    a, b = flat(a), flat(b)
    return len(a) == len(b) and all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x,y in zip(a, b))

OPTIMS = dict(adam={}, sgd=dict(opt_func=lambda ps, **kw: SGD(ps, mom=0.9, **kw)), ranger=dict(opt_func=ranger),
              adamw=dict(opt_func=lambda ps, **kw: OptimWrapper(ps, torch.optim.AdamW, **kw)),
              sgd_torch=dict(opt_func=lambda ps, **kw: OptimWrapper(ps, torch.optim.SGD, momentum=0.9, **kw)))
POINTS = [dict(rewind_epoch=0), dict(rewind_epoch=1), dict(rewind_step=5)]

@pytest.mark.parametrize('optim', OPTIMS)
@pytest.mark.parametrize('point', POINTS, ids=str)
def test_everything_goes_back(optim, point):
    learn = learner(model=Words(), **OPTIMS[optim])
    cb = SparsifyCallback(80, schedule=one_shot, lth=True, layer_type=(nn.Linear, nn.Embedding), verbose=False, **point)
    steps = 8*point['rewind_epoch'] if 'rewind_epoch' in point else point['rewind_step']
    saved, after, rates = [], [], []
    def save():
        if learn.training and not saved and 8*learn.epoch + learn.iter == steps:
            saved.append((everything(learn.model), optimizer_state(learn.opt)))
    def look():
        rates.append(learn.opt.hypers[-1]['lr'])
        if not after and cb.sparsifier.masks:
            after.append((everything(learn.model), optimizer_state(learn.opt), learn.opt.hypers[-1]['lr']))
    learn.fit_one_cycle(4, 1e-2, cbs=[cb, spy('before_batch', save), spy('after_step', look)])
    (then, opt_then), (now, opt_now, lr), masks = saved[0], after[0], cb.sparsifier.masks
    known = {id(p): masks[k] for k,p in learn.model.named_parameters() if k in masks}
    named = dict(learn.model.named_parameters(remove_duplicate=False))
    for k,v in then.items():
        assert torch.equal(now[k], v*known[id(named[k])] if k in named and id(named[k]) in known else v), k
    assert int(now['steps']) == steps and now['drift'].tolist() == [steps/2]*3
    assert int(now['batch.num_batches_tracked']) == steps
    assert equal(opt_then, opt_now)
    assert lr == rates[15] and len(set(rates)) > 16  # the learning rate goes on
    assert torch.equal(learn.model.same.weight, learn.model.out.weight)
    assert learn.model.same.weight is learn.model.out.weight
    assert [r.zeros for r in cb.report.rows] == [exact(r.params, 80) for r in cb.report.rows]

def test_training_goes_on_as_from_the_rewind_point():
    "After a rewind to the very start: as a new network with these weights, masked, at the learning rate of now"
    learn, cb, start = learner(), SparsifyCallback(80, schedule=one_shot, lth=True, verbose=False), []
    batches = []
    learn.fit(4, 1e-2, cbs=[cb, spy('before_fit', lambda: start.append(everything(learn.model))),
                            spy('before_backward', lambda: learn.epoch >= 2 and batches.append((learn.xb, learn.yb)))])
    again, masks = learner(seed=5), cb.sparsifier.masks
    again.model.load_state_dict(start[0])
    again.create_opt()
    again.opt.set_hypers(lr=1e-2)
    again.model.train()
    def mask():
        for k,p in again.model.named_parameters():
            if k in masks: p.data.mul_(masks[k])
    mask()
    for xb,yb in batches:
        again.loss_func(again.model(*xb), *yb).backward()
        again.opt.step()
        again.opt.zero_grad()
        mask()
    assert len(batches) == 16
    assert all(torch.equal(a, b) for a,b in zip(again.model.parameters(), learn.model.parameters()))

def test_the_way_back_is_no_movement():
    learn, refs = learner(), []
    cb = SparsifyCallback(80, schedule='iterative', lth=True, criteria='updating_movement', verbose=False)
    def look():
        if cb.sparsifier.updates > len(refs):
            refs.append({k: (v.clone(), dict(learn.model.named_parameters())[k].detach().clone())
                                                          for k,v in cb.sparsifier.refs.items()})
    learn.fit(10, 1e-2, cbs=[cb, spy('after_step', look)])
    assert len(refs) == 3 and all(torch.equal(ref, w) for r in refs for ref,w in r.values())

def test_rewind_step_is_saved_once(capsys):
    learner().fit(4, 1e-2, cbs=SparsifyCallback(80, schedule=one_shot, lth=True, rewind_step=3))
    out = capsys.readouterr().out
    assert out.count('Saving Weights at step 3') == 1 and out.count('Resetting Weights to their step 3 values') == 1

def test_rewind_step_within_gradient_accumulation():
    learn, cb, seen = learner(), SparsifyCallback(80, schedule=one_shot, lth=True, rewind_step=5, verbose=False), []
    learn.fit(4, 1e-2, cbs=[cb, GradientAccumulation(32),
                            spy('before_batch', lambda: seen.append(everything(learn.model)), order=99)])
    model = cb.rewind.state['model']
    assert all(torch.equal(model[k], v) for k,v in seen[5].items())

@pytest.mark.parametrize('every, ok', [(1, False), (3, False), (8, True), (100, True)])
def test_once_an_epoch_is_a_round(every, ok):
    learn, cb, n = learner(), SparsifyCallback(80, lth=True, every=every, verbose=False), []
    if ok:
        learn.fit(5, 1e-2, cbs=[cb, spy('after_step', lambda: n.append(cb.sparsifier.updates))])
        assert n[-1] == 4 and [sum(int((m.weight == 0).sum()) for m in layers(learn.model))] == [
            sum(exact(k, 80) for k in (36, 288, 1152))]
    else:
        with pytest.raises(ValueError, match='use one with few steps, as `one_shot` or `iterative`'):
            learn.fit(5, 1e-2, cbs=cb)

@pytest.mark.parametrize('kwargs, message', [
    (dict(rewind_step=-1), '`rewind_step` must be a whole number'),
    (dict(rewind_step=1.5), '`rewind_step` must be a whole number'),
    (dict(rewind_step=True), '`rewind_step` must be a whole number'),
    (dict(rewind_step=3, rewind_epoch=1), 'either to `rewind_epoch` or to `rewind_step`')])
def test_refused_at_construction(kwargs, message):
    with pytest.raises(ValueError, match=message): SparsifyCallback(80, **kwargs)

def test_a_rewind_point_after_the_first_pruning_is_refused():
    with pytest.raises(ValueError, match='`rewind_step` is 17, but the schedule starts to prune in epoch 2'):
        learner().fit(4, 1e-2, cbs=SparsifyCallback(80, schedule=one_shot, lth=True, rewind_step=17))

def test_supermask():
    """`reset_end`: the network that was trained gives the mask, the one before training the weights, and the optimizer
    forgets"""
    learn = learner(model=Words())
    cb = SparsifyCallback(50, schedule=lin, reset_end=True, layer_type=nn.Linear, verbose=False)
    before = everything(learn.model)
    learn.fit(2, 1e-2, cbs=cb)
    named = dict(learn.model.named_parameters(remove_duplicate=False))
    known = {id(p): cb.sparsifier.masks[k] for k,p in learn.model.named_parameters() if k in cb.sparsifier.masks}
    for k,v in everything(learn.model).items():
        want = before[k]*known[id(named[k])] if k in named and id(named[k]) in known else before[k]
        assert torch.equal(v, want), k
    assert not any('sqr_avg' in s for s in learn.opt.state_dict()['state'])
