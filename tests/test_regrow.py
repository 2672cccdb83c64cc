"Dynamic sparse training: the number of zeros stays, and what moves is what a naive reference moves"
import copy, math, os, subprocess, sys
from pathlib import Path

import fastai.callback.fp16 as fp16
import pytest, torch, torch.nn as nn
from fastai.basics import SGD, Callback, ranger, set_seed
from fastai.callback.all import GradientAccumulation, GradientClip
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP

from fasterai_clone.methods.regrow import Regrow, divided, drop_fraction
from fasterai_clone.sparse.all import Sparsifier, SparsifyCallback
from fasterai_clone.sparse.grown import forget_grown, grown_since
from helpers import learner, same, spy, weights
from processes import main, start

EVERY, N_EPOCH = 3, 3  # 24 steps; zeros move after 3, 6, 9, 12 and 15


def fit(learn, n=N_EPOCH, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-2, **kwargs)

def sparse(rule, sparsity=80, context='erk', **kwargs):
    return SparsifyCallback(sparsity, context=context, schedule='constant', rule=rule, verbose=False, **kwargs)

class Naive(Callback):
    "RigL with Python's sort, one layer after the other"
    order = 15
    def __init__(self, masks, n_steps, every=EVERY):
        self.masks = {k: m.clone() for k,m in masks.items()}
        self.n, self.every, self.last, self.moves = n_steps, every, 0, 0

    def apply(self):
        params = dict(self.model.named_parameters())
        for k,m in self.masks.items(): params[k].data[~m] = 0.
    def before_batch(self): self.apply()

    def after_step(self):
        self.apply()
        step = self.epoch * self.n_iter + self.iter + 1
        if step // self.every == self.last // self.every: return
        self.last = step
        if step >= .75 * self.n: return
        share, params = .15 * (1 + math.cos(math.pi * step / (.75 * self.n))), dict(self.model.named_parameters())
        for k,m in self.masks.items():
            w, g, flat = params[k].detach().flatten().tolist(), params[k].grad.flatten().tolist(), m.flatten()
            kept, gone = [i for i in range(len(w)) if flat[i]], [i for i in range(len(w)) if not flat[i]]
            n = min(int(share * len(kept)), len(gone))
            drop, grow = sorted(kept, key=lambda i: abs(w[i]))[:n], sorted(gone, key=lambda i: -abs(g[i]))[:n]
            flat = flat.clone()
            flat[drop], flat[grow] = False, True
            self.masks[k], self.moves = flat.reshape(m.shape), self.moves + n
            for v in self.opt.state[params[k]].values():
                if isinstance(v, torch.Tensor) and v.shape == m.shape: v.view(-1)[grow] = 0.
        self.apply()

def first_masks(model, sparsity=80):
    sp = Sparsifier(copy.deepcopy(model), context='erk')
    sp.sparsify_model(sparsity)
    return sp.masks

@pytest.mark.parametrize('kwargs, cbs', [
    ({}, []), (dict(opt_func=SGD), [GradientClip]), ({}, [lambda: GradientAccumulation(32)])])
def test_as_the_naive_reference_bit_for_bit(kwargs, cbs):
    learn, other = learner(**kwargs), learner(**kwargs)
    rule, naive  = Regrow(every=EVERY), Naive(first_masks(other.model), N_EPOCH*8)
    cb = sparse(rule)
    set_seed(1)
    fit(learn, cbs=[cb, *(c() for c in cbs)])
    set_seed(1)
    fit(other, cbs=[naive, *(c() for c in cbs)])
    assert same(weights(learn.model), weights(other.model))
    assert same(dict(cb.sparsifier.masks), naive.masks) and naive.moves == sum(r['moved'] for r in rule.history) > 50

def test_as_the_naive_reference_in_a_loop_of_ones_own():
    "torch's Adam; the state of a weight that has grown is zero, that of the others is untouched"
    torch.manual_seed(0)
    net, data = nn.Linear(12, 7), [(torch.randn(8, 12), torch.randint(7, (8,))) for _ in range(12)]
    other, rule = copy.deepcopy(net), Regrow(every=2, fraction=.5)
    sp = Sparsifier(net, layer_type=nn.Linear, rule=rule)
    sp.sparsify_model(50)
    mask = sp.masks['weight'].clone()
    opt, opt2 = torch.optim.Adam(net.parameters(), lr=.1), torch.optim.Adam(other.parameters(), lr=.1)
    other.weight.data[~mask] = 0.
    with sp.hold(opt):
        for step,(x,y) in enumerate(data, 1):
            for m,o in ((net, opt), (other, opt2)):
                cross_entropy(m(x), y).backward()
                o.step()
            other.weight.data[~mask] = 0.
            if rule.moves_at(step, 12): sp.sparsify_model(50)
            k = int(drop_fraction(step, 12, .5) * 42) if step % 2 == 0 else 0
            w, g, kept = other.weight.detach().abs(), other.weight.grad.abs(), mask.clone()
            mask.view(-1)[w.masked_fill(~kept, 9e9).flatten().sort(stable=True).indices[:k]] = False
            grow = g.masked_fill(kept, -1).flatten().sort(stable=True, descending=True).indices[:k]
            mask.view(-1)[grow] = True
            other.weight.data[~kept] = 0.
            other.weight.data.mul_(mask)
            for v in (opt2.state[other.weight][s] for s in ('exp_avg', 'exp_avg_sq')): v.view(-1)[grow] = 0.
            assert torch.equal(net.weight, other.weight) and torch.equal(sp.masks['weight'], mask)
            for s in ('exp_avg', 'exp_avg_sq', 'step'):
                assert torch.equal(opt.state[net.weight][s], opt2.state[other.weight][s])
            opt.zero_grad(), opt2.zero_grad()
    assert [r['step'] for r in rule.history] == [2, 4, 6, 8] and sp.found.steppers.all == []

def test_slow_weights_of_lookahead_begin_at_zero():
    "fastai's `ranger` averages the weights with slow ones every six steps: they must not bring old values back"
    learn, moved, old = learner(opt_func=ranger), [], {}
    cb = sparse(Regrow(every=EVERY, fraction=.5))
    def look():
        groups = zip(learn.opt.param_lists, learn.opt.slow_weights or [])
        slow   = {id(p): s for ps,ss in groups for p,s in zip(ps, ss)}
        for k,m in cb.sparsifier.masks.items() if slow else ():
            kept = slow[id(cb.sparsifier.params[k])]
            moved.extend(kept[m & ~old.get(k, m)].tolist())
            old[k] = m.clone()
    fit(learn, cbs=[cb, spy('after_step', look)])
    assert len(moved) > 50 and not any(moved)

WAYS = [('rigl', 'weight', 'local', {}), ('set', 'weight', 'erk', {}), ('snfs', 'weight', 'global', {}),
        ('rigl', 'weight', 'global', {}), ('rigl', 'weight', 'lamp', {}), ('rigl', 'filter', 'local', {}),
        ('set', 'kernel', 'global', {}), ('rigl', 'weight', 'output', {}), ('rigl', 'weight', 'local', dict(nm='2:4')),
        ('set', 'weight', 'output', dict(nm='2:4')), ('rigl', 'weight', 'global', dict(nm='1:4')),
        ('snfs', 'horizontal_slice', 'erk', {})]

@pytest.mark.parametrize('method, granularity, context, more', WAYS)
def test_counts_are_exact_at_every_step(method, granularity, context, more):
    rule, seen = Regrow(method, every=2, fraction=.5), []
    learn = learner(width=8)
    cb = sparse(rule, 50, context, granularity=granularity, exclude='0', **more)
    def look():
        sp = cb.sparsifier
        seen.append([{k: m.clone() for k,m in sp.masks.items()}, sp.dropped() == sp.counts(50)])
        for m in sp.masks.values() if more and granularity == 'weight' else ():
            n, of = map(int, more['nm'].split(':'))
            assert m.movedim(1, -1).unflatten(-1, (-1, of)).sum(-1).min() >= n
        if context == 'output': assert all(len(set(m.flatten(1).sum(1).tolist())) == 1 for m in sp.masks.values())
        if rule.now:
            old, moved = seen[-2][0] if len(seen) > 1 else None, rule.history[-1]['moved']
            if old: assert any((old[k] != m).any() for k,m in sp.masks.items()) == (moved > 0)
    fit(learn, 2, cbs=[cb, spy('before_batch', lambda: learn.training and seen.append(
        [dict(cb.sparsifier.masks), cb.sparsifier.dropped() == cb.sparsifier.counts(50)]), order=60),
        spy('after_step', look, order=60)])
    assert all(ok for _,ok in seen) and len(seen) == 32
    assert [r['step'] for r in rule.history] == [2, 4, 6, 8, 10] and rule.history[0]['moved'] > 0
    assert all(r['first'] >= r['survivors'] for r in rule.history)

def test_the_number_that_moves_is_the_share_of_the_kept():
    "Never fewer, so nothing that was dropped came back in the same update"
    rule, cb = Regrow(every=EVERY), None
    cb = sparse(rule, 80, 'local')
    fit(learner(), cbs=cb)
    kept = [n - n*80//100 for n in (36, 288, 1152)]
    for r in rule.history:
        assert r['moved'] == sum(int(drop_fraction(r['step'], 24) * k) for k in kept) and r['kept'] == sum(kept)

def test_it_waits_until_zeros_are_there_and_until_the_share_of_training_is_done():
    "With a schedule that rises: gradual pruning with regrowth"
    rule = Regrow(every=EVERY)
    cb = SparsifyCallback(80, schedule='lin', rule=rule, verbose=False)
    seen = []
    fit(learner(), cbs=[cb, spy('after_step', lambda: seen.append(cb.sparsifier.dropped()), order=60)])
    assert [sum(d) for d in seen] == [sum(int(80*s/24*n/100 + 1e-9) for n in (36, 288, 1152)) for s in range(1, 25)]
    assert [r['step'] for r in rule.history] == [3, 6, 9, 12, 15] and rule.history[1]['moved'] > 0

def test_a_filter_that_grows_can_learn():
    "Its weights start at random, its norm with the scale 1: zeros after a ReLU have no gradient"
    learn, seen, before = learner(width=8), [], {}
    rule = Regrow(every=4, fraction=.5)
    cb = sparse(rule, 50, 'local', granularity='filter')
    def look():
        for t in cb.sparsifier.targets:
            gamma = next(p for p in t.held if p.param == 'weight')
            keep  = cb.sparsifier.found.group_mask(t).flatten()
            new   = keep & ~before.get(t.name, keep)
            before[t.name] = keep.clone()
            assert t.weight.flatten(1)[new].any(1).all()
            seen.extend(gamma.tensor[new].tolist())
    fit(learn, 2, cbs=[cb, spy('after_step', look, order=60)])
    assert seen and set(seen) == {1.}
    kept = [cb.sparsifier.found.group_mask(t).flatten() for t in cb.sparsifier.targets]
    assert all(t.weight.flatten(1).any(1)[k].all() for t,k in zip(cb.sparsifier.targets, kept))

def test_state_of_what_grows():
    w = nn.Parameter(torch.ones(4))
    opt = torch.optim.SGD([w], lr=1., momentum=.9)
    w.grad = torch.arange(1., 5)
    opt.step()
    old = dict(w=torch.tensor([True, True, False, False]))
    new = dict(w=torch.tensor([False, True, True, False]))
    forget_grown([opt, opt], dict(w=w), grown_since(old, new))
    assert opt.state[w]['momentum_buffer'].tolist() == [1, 2, 0, 4]

def test_compact_steps_follow(capsys):
    ends = []
    for compact in (False, True):
        learn = learner(opt_func=SGD)
        cb = sparse(Regrow(every=4), compact=compact)
        cb.verbose = compact
        seen = []
        fit(learn, cbs=[cb, spy('before_backward', lambda: seen.append(bool(cb.compaction)))])
        ends.append(weights(learn.model))
        assert any(seen) == compact
    assert same(*ends) and 'Between changes of the masks' in capsys.readouterr().out

@pytest.mark.parametrize('method', ['rigl', 'set', 'snfs'])
def test_resumed_bit_for_bit(method, tmp_path):
    def make(seed): return learner(seed=seed, path=tmp_path, model_dir='.'), sparse(Regrow(method, every=EVERY))
    learn, cb = make(0)
    fit(learn, 4, cbs=[cb, spy('after_validate', lambda: learn.epoch == 1 and learn.save('half'), order=61)])
    other, again = make(7)
    torch.rand(9)
    other.load('half')
    fit(other, 4, cbs=again, start_epoch=2)
    assert same(weights(learn.model), weights(other.model))
    assert same(dict(cb.sparsifier.masks), dict(again.sparsifier.masks))
    assert cb.rule.history == again.rule.history and len(cb.rule.history) == 7

def test_resumed_in_a_new_process(tmp_path):
    learn, cb = learner(path=tmp_path, model_dir='.'), sparse(Regrow('snfs', every=EVERY))
    fit(learn, cbs=[cb, spy('after_validate', lambda: learn.epoch == 0 and learn.save('half'), order=61)])
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], env={**os.environ, 'PYTHONPATH': path},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert same(torch.load(tmp_path/'end.pt', weights_only=True), weights(learn.model))

def resumed(folder):
    learn = learner(seed=5, path=folder, model_dir='.')
    learn.load('half')
    fit(learn, cbs=sparse(Regrow('snfs', every=EVERY)), start_epoch=1)
    torch.save(learn.model.state_dict(), folder/'end.pt')

@pytest.mark.parametrize('event', ['before_batch', 'before_step', 'after_step', 'after_train', 'after_epoch'])
@pytest.mark.parametrize('order', [0, 99])
def test_stopped_anywhere_the_next_fit_is_as_the_first(event, order):
    "… with the same callback"
    def stop():
        n.append(1)
        if len(n) == 5 or event in ('after_train', 'after_epoch'): raise KeyboardInterrupt
    learn, n = learner(), []
    first, cb = weights(learn.model), sparse(Regrow('snfs', every=EVERY))
    keys, hooks = list(learn.model.state_dict()), sum(len(m._forward_hooks) for m in learn.model.modules())
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=[cb, spy(event, stop, order=order)])
    assert list(learn.model.state_dict()) == keys and not [c for c in learn.cbs if c.name.endswith('sparsify')]
    assert sum(len(m._forward_hooks) for m in learn.model.modules()) == hooks
    other = learner()
    other.model.load_state_dict(first)
    def again(l, c):
        set_seed(3)
        fit(l, cbs=c)
    again(other, cb)
    fresh = learner()
    again(fresh, sparse(Regrow('snfs', every=EVERY)))
    assert same(weights(other.model), weights(fresh.model))

def test_skipped_steps_do_not_regrow(monkeypatch):
    monkeypatch.setattr(fp16, 'autocast',   lambda device, **kwargs: torch.amp.autocast('cpu', **kwargs))
    monkeypatch.setattr(fp16, 'GradScaler', lambda device, **kwargs: torch.amp.GradScaler('cpu', **kwargs))
    learn, rule, skipped = learner().to_fp16(init_scale=2.**22, growth_interval=2), Regrow(every=2), []
    cb = sparse(rule)
    def at(): return learn.epoch*8 + learn.iter + 1
    fit(learn, cbs=[cb, spy('after_cancel_step', lambda: skipped.append(at()))])
    moved = [r['step'] for r in rule.history]
    assert skipped and not set(moved) & set(skipped) and len(moved) > 3
    assert cb.sparsifier.dropped() == cb.sparsifier.counts(80)

@pytest.mark.parametrize('arguments, what', [
    (dict(method='rigle'), "Did you mean 'rigl'"), (dict(method=3), 'Unknown method'),
    (dict(fraction=30), '`fraction`'),
    (dict(until=-1), '`until`'), (dict(every=0), '`every`'), (dict(momentum='x'), '`momentum`')])
def test_wrong_arguments(arguments, what):
    with pytest.raises(ValueError, match=what): Regrow(**arguments)

def test_what_cannot_move_is_refused_before_the_first_batch():
    batches = []
    for kwargs, what in ((dict(budget='params', context='global'), '`budget`'),
                         (dict(coupled=True, granularity='filter', context='local'), 'coupled'),
                         (dict(max_sparsity=90, context='global'), '`min_sparsity`')):
        with pytest.raises(ValueError, match=what):
            count = spy('before_batch', lambda: batches.append(1), order=-9)
            fit(learner(), cbs=[sparse(Regrow(), 50, **kwargs), count])
    sp = Sparsifier(nn.Linear(4, 4), layer_type=nn.Linear, rule=(rule := Regrow(every=1)))
    sp.sparsify_model(50)
    rule.at(1, 10)
    with pytest.raises(ValueError, match='before `zero_grad`'): sp.sparsify_model(50)
    assert not batches and sp.sparsity == 50

def test_a_frozen_layer_stays():
    learn, rule = learner(), Regrow(every=2)
    next(learn.model.parameters()).requires_grad_(False)
    cb, seen = sparse(rule), []
    def look(): seen.append(cb.sparsifier.masks['0.weight'].clone())
    fit(learn, cbs=[cb, spy('after_step', look, order=60)])
    assert all(torch.equal(m, seen[0]) for m in seen) and rule.history[0]['moved'] > 0

some = dict(method='rigl', step=1, n_steps=1, last=0, history=[], averages={}, first={})

@pytest.mark.parametrize('state', [{}, 3, some | dict(step=-1), some | dict(history=[3]),
                                   some | dict(averages=dict(w=3))])
def test_a_damaged_state_is_refused(state):
    with pytest.raises(ValueError, match='state of Regrow'): Regrow().load_state_dict(state)

def test_growth_is_divided_exactly():
    for k,shares,room in ((0, [1.], [5]), (7, [.2, .5, .3], [1, 9, 9]), (6, [0., 0.], [3, 3]),
                          (10, [1e-9, 1.], [9, 2])):
        out = divided(k, shares, room)
        assert sum(out) == k and all(0 <= a <= b for a,b in zip(out, room))


# Two processes

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8*36, 10))

def moves(rank, world):
    found = []
    for method in ('rigl', 'set', 'snfs'):
        model, rule = DDP(net()), Regrow(method, every=2, fraction=.5)
        filters = method == 'rigl'
        sp  = Sparsifier(model, 'filter' if filters else 'weight', rule=rule, layer_type=(nn.Conv2d, nn.Linear),
                         include='0' if filters else None)
        opt = torch.optim.Adam(model.parameters(), lr=.01)
        torch.manual_seed(rank)
        sp.sparsify_model(50)
        with sp.hold(opt):
            for step in range(1, 9):
                x, y = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
                cross_entropy(model(x), y).backward()
                opt.step()
                if rule.moves_at(step, 8): sp.sparsify_model(50)
                opt.zero_grad()
                now = {k: p.detach().clone() for k,p in model.module.named_parameters()}
                found.append([{k: m.clone() for k,m in sp.masks.items()}, now, sp.dropped() == sp.counts(50)])
        state = [v.clone() for s in opt.state.values() for v in s.values()]
        found.append(state)
    return found

CASES = [moves]

def alike(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, list): return len(a) == len(b) and all(map(alike, a, b))
    return a == b

def test_two_processes_agree(tmp_path):
    a, b = (r['moves'][0] for r in start(__file__, 2, tmp_path))
    counted = [x[2] for x in a if len(x) == 3 and isinstance(x[2], bool)]
    assert alike(a, b) and len(counted) == 24 and all(counted)
    assert any(not same(x[0], y[0]) for x,y in zip(a[:7], a[1:8]))

if __name__ == '__main__':
    if len(sys.argv) == 2: resumed(Path(sys.argv[1]))
    else: main(CASES)
