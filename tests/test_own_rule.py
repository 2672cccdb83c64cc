"A rule of one's own, defined outside of the package: one that regrows, and one that rewrites weights"
import pytest, torch, torch.nn as nn
from fastai.basics import set_seed
from fasterai_clone.sparse.all import *
from fasterai_clone.sparse.rule import Change, Prune, Rule
from helpers import exact, learner, same, spy, weights, zeros


class Regrow(Rule):
    "Every few steps: the lowest kept weights make room for dropped ones with the largest gradients"
    steady = False
    def __init__(self, every=4, n=3): self.every, self.n, self.grown = every, n, 0

    def due(self, step, counts, applied): return counts != applied or step % self.every == 0

    def __call__(self, pool, n):
        change = pool.choose(n)
        for k,w,g,scores in zip(pool.names, pool.weights, pool.grads, pool.score()):
            keep = change.masks[k].flatten().clone()
            kept, gone = keep.nonzero().flatten(), (~keep).nonzero().flatten()
            m = min(self.n, len(kept), len(gone))
            if not m or g is None: continue
            keep[kept[scores.flatten()[kept].argsort()[:m]]] = False
            keep[gone[g.flatten()[gone].abs().argsort(descending=True)[:m]]] = True
            change.masks[k] = keep.reshape(scores.shape)
            self.grown += m
        return change

    def state_dict(self): return dict(grown=self.grown)
    def load_state_dict(self, state): self.grown = state['grown']

class Rescale(Rule):
    "What stays is scaled so that the sum of magnitudes is as before"
    def __call__(self, pool, n):
        change = pool.choose(n)
        for k,w in zip(pool.names, pool.weights):
            left = w * change.masks[k]
            change.values[k] = left * (w.abs().sum() / left.abs().sum().clamp(min=1e-9))
        return change

def line(n=10):
    model = nn.Linear(n, 1, bias=False)
    model.weight.data = torch.arange(1., n+1)[None]
    return model

def test_regrowth_by_hand():
    "The five lowest of ten are gone; then 6 makes room for the dropped weight with the largest gradient"
    model = line()
    sp = Sparsifier(model, layer_type=nn.Linear, rule=Regrow(n=1))
    sp.sparsify_model(50)
    assert model.weight.tolist() == [[0]*5 + [6, 7, 8, 9, 10]]
    model.weight.grad = torch.tensor([[0., 0, -9, 0, 0, 1, 1, 1, 1, 1]])
    sp.sparsify_model(50)
    assert sp.masks['weight'].int().tolist() == [[0, 0, 1, 0, 0, 0, 1, 1, 1, 1]]
    # what grew is zero until it is trained
    assert model.weight.tolist() == [[0]*6 + [7, 8, 9, 10]] and sp.sparsity == 60

def test_new_values_by_hand():
    "55 in all; 40 in the five that stay, so each is 55/40 as large"
    model = line()
    sp = Sparsifier(model, layer_type=nn.Linear, rule=Rescale())
    sp.sparsify_model(50)
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[0.]*5 + [6, 7, 8, 9, 10]]) * 55/40)
    assert sp.written == ['weight'] and model.weight.sum() == 55

@pytest.mark.parametrize('granularity, context', [('weight', 'local'), ('weight', 'global'), ('filter', 'local'),
                                                  ('filter', 'lamp')])
@pytest.mark.parametrize('rule', [Regrow(), Rescale()])
def test_counts_stay_exact(rule, granularity, context):
    set_seed(0)
    learn, seen = learner(), []
    cb = SparsifyCallback(60, granularity, context, schedule='one_shot', rule=rule, verbose=False)
    learn.fit(2, 1e-2, cbs=[cb, spy('after_step', lambda: seen.append(cb.sparsifier.dropped()), order=200)])
    assert all(s in ([0]*len(s), cb.sparsifier.counts(60)) for s in seen) and seen[-1] == cb.sparsifier.counts(60)
    if isinstance(rule, Regrow): assert rule.grown > 0

def test_regrowth_changes_masks_and_not_their_number():
    set_seed(0)
    learn, masks = learner(), []
    cb = SparsifyCallback(60, schedule='one_shot', start_epoch=0, rule=Regrow(every=4), verbose=False)
    def look(): masks.append(cb.sparsifier.masks.sparsity and {k: m.clone() for k,m in cb.sparsifier.masks.items()})
    learn.fit(2, 1e-2, cbs=[cb, spy('after_step', look, order=200)])
    changed = [i + 1 for i,(a,b) in enumerate(zip(masks, masks[1:])) if a and b and not same(a, b)]
    assert changed == [3, 7, 11, 15]  # after steps 4, 8, 12 and 16
    assert all(sum(int((~m).sum()) for m in ms.values()) == sum(exact(n, 60) for n in (36, 288, 1152))
               for ms in masks if ms)

def resumed(rule, folder):
    "Weights of four epochs at once, and of two and two"
    def make(seed):
        return learner(seed=seed, path=folder, model_dir='.'), SparsifyCallback(70, rule=rule(), verbose=False)
    learn, cb = make(0)
    learn.fit(4, 1e-2, cbs=[cb, spy('after_validate', lambda: learn.epoch == 1 and learn.save('half'), order=61)])
    other, again = make(7)
    torch.rand(9)
    other.load('half')
    other.fit(4, 1e-2, cbs=again, start_epoch=2)
    return (learn, cb), (other, again)

@pytest.mark.parametrize('rule', [Regrow, Rescale])
def test_resumed_bit_for_bit(rule, tmp_path):
    (learn, cb), (other, again) = resumed(rule, tmp_path)
    assert same(weights(learn.model), weights(other.model)) and sum(zeros(learn.model)) > 0
    assert cb.sparsifier.rule.state_dict() == again.sparsifier.rule.state_dict()

def test_state_of_another_rule_is_refused():
    sp, other = (Sparsifier(line(), layer_type=nn.Linear, rule=r) for r in (Regrow(), None))
    with pytest.raises(ValueError, match="the rule 'Regrow', here Prune"): other.load_state_dict(sp.state_dict())

class Stop(Rescale):
    "Ctrl-C while the rule decides about the second layer"
    def __init__(self): self.calls = 0
    def __call__(self, pool, n):
        self.calls += 1
        if self.calls == 2: raise KeyboardInterrupt
        return super().__call__(pool, n)

def test_interrupted_while_it_decides():
    model = nn.Sequential(line(), line())
    before = weights(model)
    sp = Sparsifier(model, layer_type=nn.Linear, rule=Stop())
    with pytest.raises(KeyboardInterrupt): sp.sparsify_model(50)
    assert same(before, weights(model)) and not sp.masks and sp.updates == 0

@pytest.mark.parametrize('at', range(1, 7))
def test_interrupted_while_values_are_written(at, monkeypatch):
    "… at any of the writes: all is as before, the masks of an earlier update too"
    model = nn.Sequential(line(), line())
    sp = Sparsifier(model, layer_type=nn.Linear, rule=Rescale())
    sp.sparsify_model(30)
    before, masks, n = weights(model), {k: m.clone() for k,m in sp.masks.items()}, []
    own, copy, apply = type(sp.masks).take, torch.Tensor.copy_, type(sp.masks).apply
    def stopping(f):
        def call(*args, **kwargs):
            n.append(1)
            if len(n) == at: raise KeyboardInterrupt
            return f(*args, **kwargs)
        return call
    monkeypatch.setattr(type(sp.masks), 'take', stopping(own))
    monkeypatch.setattr(type(sp.masks), 'apply', stopping(apply))
    monkeypatch.setattr(torch.Tensor, 'copy_', stopping(copy))
    try: sp.sparsify_model(60)
    except KeyboardInterrupt:
        monkeypatch.undo()
        assert same(before, weights(model)) and same(masks, dict(sp.masks))
    else: assert len(n) < at
    monkeypatch.undo()
    sp.sparsify_model(60)
    assert sp.sparsity == 60

class Wrong(Rule):
    def __init__(self, change): self.change = change
    def __call__(self, pool, n): return self.change

@pytest.mark.parametrize('change, what', [
    (None, 'must give a `Change`, got NoneType'), (Change(), '5 groups were to be pruned, and 0 are'),
    (Change({'weigth': torch.ones(1, 10).bool()}), "Did you mean 'weight'"),
    (Change({'weight': torch.ones(1, 10)}), 'must be a bool tensor'),
    (Change({'weight': torch.ones(10).bool()}), r'of shape \(1, 10\)'),
    (Change({'weight': torch.ones(1, 10).bool()}), 'and 0 are'),
    (Change(values={'bias': torch.ones(1)}), 'Unknown parameter'),
    (Change(values={'weight': torch.ones(10)}), 'must be like'),
    (Change(values={'weight': torch.full((1, 10), float('nan'))}), 'NaN')])
def test_what_a_rule_gives_is_checked(change, what):
    model = line()
    sp = Sparsifier(model, layer_type=nn.Linear, rule=Wrong(change))
    with pytest.raises((TypeError, ValueError), match=what): sp.sparsify_model(50)
    assert model.weight.tolist() == [[*range(1, 11)]] and not sp.masks

def test_what_is_no_rule():
    for make in (lambda: Sparsifier(line(), layer_type=nn.Linear, rule=Regrow),
                 lambda: SparsifyCallback(50, rule='prune')):
        with pytest.raises(TypeError, match='`rule` must be a `Rule`'): make()

def test_the_rule_of_old_is_the_default():
    a, b = line(), line()
    Sparsifier(a, layer_type=nn.Linear).sparsify_model(50), Sparsifier(b, layer_type=nn.Linear,
                                                                       rule=Prune()).sparsify_model(50)
    assert same(weights(a), weights(b))

def test_compact_steps_wait_for_a_rule_that_keeps_changing(capsys):
    learn = learner()
    learn.fit(2, 1e-2, cbs=SparsifyCallback(50, schedule='one_shot', start_epoch=0, rule=Regrow(), compact=True))
    assert 'masks are final' not in capsys.readouterr().out
