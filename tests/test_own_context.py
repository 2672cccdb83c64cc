"Contexts and budgets are values: one's own works wherever those of the library do"
import pickle

import pytest, torch, torch.nn as nn
from fastai.basics import set_seed
from fasterai_clone.sparse.context import *
from fasterai_clone.sparse.context import contexts, keep_in_outputs
from fasterai_clone.prune.all import PruneCallback
from fasterai_clone.sparse.all import *
from fasterai_clone.sparse.context import add_context, all_layers, as_budget, as_context, Budget
from helpers import exact, learner, zeros


def same_shape(layers):
    "Layers of one shape compete"
    pools = {}
    for l in layers: pools.setdefault(l.shape, []).append(l)
    return list(pools.values())

def deeper_gives_more(pools):
    "The first pool gives half of what is asked for, the last all of it"
    shares = [0.5 + 0.5*i/max(len(pools) - 1, 1) for i in range(len(pools))]
    return [int(s * sum(l.n for l in pool) * pool[0].sparsity / 100) for s,pool in zip(shares, pools)]

def highest_go(scores, n, pruned, pool):
    "The opposite choice, for a test"
    keep = torch.ones(scores[0].numel(), dtype=torch.bool)
    keep[scores[0].flatten().argsort(descending=True)[:n]] = False
    return [keep.reshape(scores[0].shape)]

def by_mean(scores): return [s / s.mean() for s in scores]

by_shape, deeper = Context('by_shape', same_shape), Context('deeper', counts=deeper_gives_more)
relative = Context('relative', all_layers, compare=by_mean, without={'layers', 'signed'})

def net(*scales):
    "Layers of 2×3 weights, 1 to 6 times a scale"
    model = nn.Sequential(*[nn.Linear(3, 2, bias=False) for _ in scales])
    for m,s in zip(model, scales): m.weight.data = s * torch.arange(1., 7).reshape(2, 3)
    return model

def gone(model): return [int((m.weight == 0).sum()) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]

def sparse(model, context, sparsity=50, **kwargs):
    sp = Sparsifier(model, context=context, layer_type=(nn.Linear, nn.Conv2d), **kwargs)
    sp.sparsify_model(sparsity)
    return sp

def test_pools_of_ones_own():
    "Of two layers that compete the smaller gives all its weights; a layer of another shape only its own share"
    model = net(1, 10, 1)
    model[2] = nn.Linear(5, 1, bias=False)
    model[2].weight.data = torch.arange(1., 6)[None]
    sparse(model, by_shape)
    assert gone(model) == [6, 0, 2]

def test_counts_of_ones_own():
    model = net(1, 10, 100)
    sp = sparse(model, deeper)
    assert gone(model) == [1, 2, 3] and sp.counts(100) == [3, 4, 6]

def test_a_choice_of_ones_own():
    model = net(1, 10)
    sparse(model, Context('highest', keep=highest_go))
    assert model[0].weight.tolist() == [[1, 2, 3], [0, 0, 0]]

def test_a_scale_of_ones_own():
    "As shares of their mean the layers are alike, so ties go by layer: 1 and 1, 2 and 2, 3 of the first"
    model = net(1, 10)
    sparse(model, relative, 40)
    assert gone(model) == [2, 2]

def test_what_the_library_has_is_made_of_the_same():
    for name in available_contexts():
        a, b = net(1, 3, 2), net(1, 3, 2)
        sparse(a, name), sparse(b, Context('mine', **{k: getattr(contexts[name], k)
                                                      for k in ('pools', 'counts', 'compare', 'keep')}))
        assert [m.weight.tolist() for m in a] == [m.weight.tolist() for m in b]

def test_limits_and_budgets_of_several_pools():
    model = net(1, 10)
    for s in (1, 10):
        model.append(nn.Linear(4, 1, bias=False))
        model[-1].weight.data = s * torch.arange(1., 5)[None]
    sp = sparse(model, by_shape, max_sparsity=70)
    assert gone(model) == [4, 2, 2, 2] and sp.counts(50) == [6, 4]
    weights = Budget('doubled', 'weights', double)
    sp = sparse(net(1, 10), Context('all', all_layers), budget=weights)
    assert sp.costs == [2, 2] and sp.dropped() == [12] and 'weights' in str(sp.report())

def double(weights, macs): return 2*weights

@pytest.mark.parametrize('context', [by_shape, deeper, relative])
def test_in_a_fit(context):
    set_seed(0)
    learn, cb = learner(), SparsifyCallback(80, context=context, verbose=False)
    learn.fit(2, 1e-2, cbs=cb)
    counts = cb.sparsifier.counts(80)
    assert sum(zeros(learn.model)) == sum(counts) > 0
    if context is relative: assert sum(counts) == exact(sum(t.groups.n for t in cb.sparsifier.targets), 80)

def test_channels_in_a_fit():
    learn = learner()
    learn.fit(2, 1e-2, cbs=PruneCallback(50, context=relative, verbose=False))
    assert sum(m.out_channels for m in learn.model if isinstance(m, nn.Conv2d)) == 14
    for context,why in (by_shape, 'its own rules'), (deeper, 'its own rules'), ('erk', 'it needs context'):
        with pytest.raises(ValueError, match=why): PruneCallback(50, context=context)

def test_a_name_for_it():
    try:
        add_context(by_shape)
        add_context(by_shape)  # again is no mistake
        assert 'by_shape' in available_contexts() and as_context('by_shape') is by_shape
        assert gone(sparse(net(1, 10), 'by_shape').model) == [6, 0]
        with pytest.raises(ValueError, match="A context 'by_shape' already exists"): add_context(Context('by_shape'))
    finally: contexts.pop('by_shape', None)

@pytest.mark.parametrize('make, what', [
    (lambda: Context(''), 'has a name'), (lambda: Context('c', pools=3), '`pools` must be a function'),
    (lambda: Context('c', compare='lamp'), '`compare` must be a function'),
    (lambda: Context('c', without={'budgt'}), "Did you mean 'budget'"),
    (lambda: as_context(None), 'Unknown context'), (lambda: as_budget('macs'), 'Unknown budget'),
    (lambda: add_context('local'), 'Expected')])
def test_what_is_no_context(make, what):
    with pytest.raises((TypeError, ValueError), match=what): make()

@pytest.mark.parametrize('context, what', [
    (Context('lost', lambda layers: [layers[:1]]), 'each layer into one list'),
    (Context('twice', lambda layers: [layers, layers]), 'into one'),
    (Context('empty', lambda layers: [layers, []]), 'into one'), (Context('none', lambda layers: None), 'into one'),
    (Context('half', counts=lambda pools: [0.5]*len(pools)), 'whole number'),
    (Context('more', counts=lambda pools: [7]*len(pools)), 'at most'),
    (Context('few', counts=lambda pools: [1]), 'for each pool'),
    (Context('shape', keep=lambda scores, n, pruned, pool: [torch.ones(6, dtype=torch.bool)]),
     '`keep` must give a bool mask'),
    (Context('all', keep=lambda scores, n, pruned, pool: [torch.ones_like(s, dtype=torch.bool) for s in scores]),
     'drops 3 groups')])
def test_what_a_context_gives_is_checked(context, what):
    "… before anything has changed"
    model = net(1, 10)
    with pytest.raises(ValueError, match=what): sparse(model, context)
    assert gone(model) == [0, 0]

def test_refusals_are_the_table():
    "For each context of the library: what it refuses is what `without` says"
    tried = dict(nm=dict(nm=True), limits=dict(max_sparsity=80), budget=dict(budget='params'))
    for c in contexts.values():
        for k,arguments in tried.items():
            model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            if k not in c.without: sparse(model, c, **arguments)
            else:
                with pytest.raises(ValueError, match=f"it needs context=.*got '{c.name}'"):
                    sparse(model, c, **arguments)

def test_values():
    for c in (*map(as_context, available_contexts()), by_shape, as_budget('flops')):
        assert pickle.loads(pickle.dumps(c)) == c
    with pytest.raises(AttributeError): by_shape.name = 'other'
    sp = sparse(net(1, 2), by_shape)
    assert "'by_shape'" in repr(sp)
    again = Sparsifier(net(1, 2), context=by_shape, layer_type=nn.Linear)
    again.load_state_dict(sp.state_dict())
    assert gone(again.model) == gone(sp.model)

def test_outputs_are_asked_for_by_the_choice():
    "A context of one's own that keeps in outputs knows their axis"
    model = net(1, 10)
    sparse(model, Context('rows', keep=keep_in_outputs), 67)
    assert [(m.weight == 0).sum(1).tolist() for m in model] == [[2, 2], [2, 2]]
