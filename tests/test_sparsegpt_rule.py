"SparseGPT for whole models: exact counts everywhere, the same as its kernel, all or nothing"
import copy

import pytest, torch, torch.nn as nn
from fasterai_clone.methods.all import SparseGPT, sparsegpt
from fasterai_clone.methods.choice import choose_weights, matrix_counts
from fasterai_clone.methods.matrices import layer_matrices
from fasterai_clone.methods.moments import Moments, means_of, problem_of
from fasterai_clone.sparse.all import Sparsifier, SparsifyCallback
from helpers import exact, learner, same, weights

BOTH = dict(layer_type=(nn.Conv2d, nn.Linear))

def net():
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 12))

def data(n=40): return torch.randn(n, 4, 6, 6)

def zero_counts(model): return [int((p == 0).sum()) for p in model.parameters() if p.ndim > 1]

@pytest.mark.parametrize('sparsity', [0, 33.3, 50, 90, 100])
def test_counts_of_layers_are_exact(sparsity):
    model = net()
    Sparsifier(model, criteria='sparsegpt', data=data(), **BOTH).sparsify_model(sparsity)
    assert zero_counts(model) == [exact(n, sparsity) for n in (288, 288, 384)]

@pytest.mark.parametrize('criteria', ['obs', 'wanda', 'large_final'])
@pytest.mark.parametrize('sparsity', [30, 50])
def test_a_pattern_inside_of_each_output(criteria, sparsity):
    "n:m and the same number in each output, both exact, for criteria that score and for SparseGPT"
    model = net()
    sp = Sparsifier(model, context='output', criteria=criteria, nm=True, data=data(), **BOTH)
    sp.sparsify_model(sparsity)
    for m in (model[0], model[2], model[4]):
        gone = m.weight == 0
        assert gone.flatten(1).sum(1).unique().tolist() == [exact(m.weight[0].numel(), sparsity)]
        assert gone.unflatten(1, (-1, 4)).sum(2).max() <= 2

def test_one_layer_is_the_kernel():
    "On the moments of the inputs: the same mask and values as the sweep over one matrix"
    layer, x = nn.Linear(32, 8).double(), torch.randn(300, 8, dtype=torch.float64) @ torch.randn(8, 32).double()
    want, mask = sparsegpt(layer.weight.detach(), x.T @ x / 300, 77)
    sp = Sparsifier(layer, rule=SparseGPT(x), layer_type=nn.Linear)
    sp.sparsify_model(100*77/256)
    assert torch.equal(sp.masks['weight'], mask)
    torch.testing.assert_close(layer.weight.detach(), want, rtol=1e-4, atol=1e-6)

def test_better_than_scores():
    errors = {}
    torch.manual_seed(0)
    dense = nn.Linear(64, 32)
    x = torch.randn(500, 16) @ torch.randn(16, 64)
    x[:, ::16] *= 10
    for criteria in ('large_final', 'wanda', 'sparsegpt'):
        model = copy.deepcopy(dense)
        Sparsifier(model, 'weight', 'output', criteria, layer_type=nn.Linear, data=x).sparsify_model(50)
        errors[criteria] = float((model(x) - dense(x)).square().mean())
    assert errors['sparsegpt'] < .5*errors['wanda'] and errors['wanda'] < errors['large_final']

def test_pruned_stays_pruned():
    "Masks are nested while the sparsity rises; while it falls, weights are chosen anew"
    for context,nm in (('local', False), ('output', False), ('output', True)):
        model = net()
        sp = Sparsifier(model, context=context, criteria='sparsegpt', nm=nm, data=data(), **BOTH)
        sp.sparsify_model(20)
        first = {k: m.clone() for k,m in sp.masks.items()}
        sp.sparsify_model(45)
        assert all(not (m & ~first[k]).any() for k,m in sp.masks.items())
        assert zero_counts(model) == sp.dropped() == sp.counts(45)
        sp.sparsify_model(20)
        assert sp.dropped() == sp.counts(20)

def test_inputs_that_are_always_zero_are_pruned_first():
    layer, x = nn.Linear(8, 4), torch.randn(50, 8)
    x[:, [2, 5]] = 0
    sp = Sparsifier(layer, criteria='sparsegpt', data=x, layer_type=nn.Linear)
    sp.sparsify_model(25)
    assert not sp.masks['weight'][:, [2, 5]].any() and sp.masks['weight'].sum() == 24
    sp.sparsify_model(50)
    assert not sp.masks['weight'][:, [2, 5]].any() and sp.masks['weight'].sum() == 16

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_and_few_samples(dtype):
    model = net().to(dtype)
    Sparsifier(model, criteria='sparsegpt', data=data(2).to(dtype), **BOTH).sparsify_model(60)
    assert all(p.isfinite().all() and p.dtype == dtype for p in model.parameters())
    assert zero_counts(model) >= [exact(n, 60) for n in (288, 288, 384)]

def test_projections_of_attention_share_a_number():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        def forward(self, x): return self.attn(x, x, x)[0]
    model, x = Net(), torch.randn(9, 5, 8)
    sp = Sparsifier(model, criteria='sparsegpt', data=x, layer_type=nn.Module, params='in_proj_weight')
    sp.sparsify_model(41)
    assert int((model.attn.in_proj_weight == 0).sum()) == exact(192, 41)
    assert (~sp.masks['attn.in_proj_weight']).view(3, -1).sum(1).tolist() == [26, 26, 26]

def test_matrix_counts_by_hand():
    conv = nn.Conv2d(8, 6, 1, groups=2)
    layers, _ = layer_matrices(conv, ['weight'])
    old = torch.ones(6, 4, 1, 1).bool()
    old[0] = False
    assert matrix_counts(layers, {'weight': 10}, {}) == {'': [5, 5]}
    # 4 of the first group's 12 are gone; the 6 others are divided by 8:12
    assert matrix_counts(layers, {'weight': 10}, {'weight': old}) == {'': [6, 4]}
    assert matrix_counts(layers, {'weight': 6}, {}, per_output=True) == {'': [1, 1]}

@pytest.mark.parametrize('stop', [KeyboardInterrupt, RuntimeError])
def test_all_or_nothing(stop, monkeypatch):
    model, x = net(), data()
    sp, was, calls = Sparsifier(model, criteria='sparsegpt', data=x, **BOTH), weights(model), []
    import fasterai_clone.methods.sparsegpt_rule as room
    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3: raise stop
        return choose_weights(*args, **kwargs)
    monkeypatch.setattr(room, 'choose_weights', stopping)
    with pytest.raises(stop): sp.sparsify_model(50)
    assert same(weights(model), was) and not sp.masks and not any(m._forward_pre_hooks for m in model.modules())
    monkeypatch.undo()
    sp.sparsify_model(50)
    assert zero_counts(model) == [144, 144, 192]

@pytest.mark.parametrize('kwargs, message', [
    (dict(context='global'), "needs context='local'"), (dict(context='lamp'), "needs context='local'"),
    (dict(granularity='filter'), 'single weights'), (dict(budget='params', context='global'), 'without a budget')])
def test_refusals(kwargs, message):
    model = net()
    was = weights(model)
    with pytest.raises(ValueError, match=message):
        Sparsifier(model, rule=SparseGPT(data()), **BOTH, **kwargs).sparsify_model(50)
    assert same(weights(model), was)

def test_what_has_no_inputs_is_refused_by_name():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        def forward(self, x): return self.a(x)
    with pytest.raises(ValueError, match="cannot prune 'unused.weight': it did not run. Leave it out"):
        Sparsifier(Net(), criteria='obs', data=torch.randn(9, 4), layer_type=nn.Linear).sparsify_model(50)
    with pytest.raises(ValueError, match='needs calibration data'):
        Sparsifier(Net(), criteria='obs', layer_type=nn.Linear)
    with pytest.raises(ValueError, match="must be 'dense' or 'layer'"): SparseGPT(torch.ones(1), target='both')
    with pytest.raises(ValueError, match='leave `rule` out'):
        Sparsifier(Net(), criteria='obs', rule=SparseGPT(torch.ones(1)), layer_type=nn.Linear)

def test_in_a_fit():
    learn = learner()
    cb = SparsifyCallback(60, criteria='sparsegpt', schedule='one_shot', data=learn.dls.train, verbose=False)
    learn.fit(2, 1e-2, cbs=cb)
    assert cb.sparsifier.dropped() == cb.sparsifier.counts(60)

def test_reconstruct_is_a_method():
    dense, x = net(), data()
    model = copy.deepcopy(dense)
    sp = Sparsifier(model, context='global', **BOTH)
    sp.sparsify_model(60)
    def off(m): return float((m(x) - dense(x)).square().mean())
    masked = off(model)
    done   = sp.reconstruct(x, 'cg', dense=dense)
    assert off(model) < masked and [*done.layers] == ['0', '2', '4'] and sp.dropped() == sp.counts(60)

def test_moments_grow_with_inputs():
    "An input that becomes alive in a later batch: the same sums as with all of them at once"
    x, z = torch.randn(2, 1, 30, 6, dtype=torch.float64)
    x[:, :20, 3], x[:, :10, 1] = 0, 0
    w = torch.randn(1, 2, 6, dtype=torch.float64)
    for given in (None, z.clone()):
        if given is not None: given[:, :20, 3] = 0
        one, three = Moments(w), Moments(w)
        one.add(x, given)
        for i in range(3): three.add(x[:, 10*i:10*i+10], None if given is None else given[:, 10*i:10*i+10])
        for centred in (True, False):
            a, b = problem_of(one, centred), problem_of(three, centred)
            for k in ('H', 'B', 'yy'): torch.testing.assert_close(getattr(a, k), getattr(b, k))
        for a,b in zip(means_of(one), means_of(three)): torch.testing.assert_close(a, b)
