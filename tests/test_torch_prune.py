"The masks of `torch.nn.utils.prune`: taken over, given back, and the same as ours wherever both can choose"
import pickle, warnings
from copy import deepcopy

import pytest, torch, torch.nn as nn
from torch.nn.utils import prune

from fasterai_clone.core.masks import Masks
from fasterai_clone.sparse.all import *
from fasterai_clone.core.criteria import ln_norm
from fasterai_clone.sparse.signal import LayerCollapse
from helpers import same, weights

def owner(model, name):
    "The module that has a parameter, and its name there"
    path, _, param = name.rpartition('.')
    return model.get_submodule(path), param

def params_of(model): return {k: p.detach().clone() for k,p in model.named_parameters()}
def effective(model, names): return {k: getattr(*owner(model, k)).detach().clone() for k in names}
def removed(model, names):
    for k in names: prune.remove(*owner(model, k))
    return model

class Attends(nn.Module):
    def __init__(self, **kwargs):
        super().__init__(); self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **kwargs)
    def forward(self, x): return self.attention(x, x, x)[0]

class Recurs(nn.Module):
    def __init__(self, kind):
        super().__init__(); self.rnn = kind(4, 3, num_layers=2, bidirectional=True, batch_first=True)
    def forward(self, x): return self.rnn(x)[0]

models = dict(
    linear = lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2, bias=False)),
    root   = lambda: nn.Linear(4, 5),
    conv   = lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 3, 2)),
    deep   = lambda: nn.Sequential(nn.Sequential(nn.ModuleDict(dict(a=nn.Sequential(nn.Linear(3, 3)),
                                                                    weight=nn.Linear(2, 2))))),
    lstm   = lambda: Recurs(nn.LSTM),
    gru    = lambda: Recurs(nn.GRU),
    heads  = Attends,
    three  = lambda: Attends(kdim=4, vdim=4),
    embed  = lambda: nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6)))
by_model = pytest.mark.parametrize('name', models)
shapes   = dict(linear=(3, 4), root=(3, 4), conv=(1, 2, 5, 5), lstm=(2, 3, 4), gru=(2, 3, 4), heads=(2, 3, 4),
                three=(2, 3, 4))
inputs   = {**{k: torch.randn(s) for k,s in shapes.items()}, 'embed': torch.arange(6)}

def random_masks(model): return Masks({k: torch.rand(p.shape) < 0.5 for k,p in model.named_parameters()})


# From

@by_model
def test_masks_are_those_in_the_buffers(name):
    model = models[name]()
    names, before = [k for k,_ in model.named_parameters()], params_of(model)
    for k in names: prune.random_unstructured(*owner(model, k), amount=0.5)
    state, masks = weights(model), Masks.from_torch_prune(model)
    assert set(masks) == set(names)
    for k,mask in masks.items():
        assert mask.dtype == torch.bool and mask.shape == before[k].shape
        assert int((~mask).sum()) == round(0.5 * mask.numel())
        assert torch.equal(before[k] * mask, effective(model, [k])[k])
    assert same(state, weights(model))

def test_only_what_is_held():
    model = models['linear']()
    prune.l1_unstructured(model[0], 'bias', amount=2)
    assert set(Masks.from_torch_prune(model)) == {'0.bias'}

def test_masks_are_copies():
    layer = prune.l1_unstructured(nn.Linear(2, 2), 'weight', amount=1)
    masks = Masks.from_torch_prune(layer)
    layer.weight_mask.zero_()
    assert masks.n_dropped == 1

def test_repeated_pruning_is_combined():
    "12 weights, half each time: 6, 3, 1 are left; a row of zeros on top of it"
    layer = nn.Linear(4, 3)
    with torch.no_grad(): layer.weight.copy_(torch.arange(1., 13.).view(3, 4))
    left = []
    for _ in range(3):
        prune.l1_unstructured(layer, 'weight', amount=0.5)
        left.append(int(Masks.from_torch_prune(layer)['weight'].sum()))
    assert left == [6, 3, 1]
    layer = nn.Linear(4, 3)
    with torch.no_grad(): layer.weight.copy_(torch.arange(1., 13.).view(3, 4))
    prune.ln_structured(layer, 'weight', amount=1, n=1, dim=0)
    prune.l1_unstructured(layer, 'weight', amount=2)
    prune.random_unstructured(layer, 'weight', amount=0)
    kept = Masks.from_torch_prune(layer)['weight']
    assert kept.tolist() == [[False]*4, [False, False, True, True], [True]*4]

def test_parameter_and_buffer_of_such_names_are_no_pruning():
    "What looks like a mask and is none"
    model = nn.Linear(2, 2)
    model.gate_orig = nn.Parameter(torch.ones(2))
    model.register_buffer('gate_mask', torch.ones(2))
    with pytest.raises(ValueError, match='holds no parameter'): Masks.from_torch_prune(model)
    prune.l1_unstructured(model, 'gate_orig', amount=1)
    assert set(Masks.from_torch_prune(model)) == {'gate_orig'}

def test_other_hooks_do_not_matter():
    model, seen = nn.Linear(3, 3), []
    model.register_forward_pre_hook(lambda m, args: seen.append(1))
    masks = random_masks(model)
    assert Masks.from_torch_prune(masks.to_torch_prune(model)) == masks
    model(torch.ones(1, 3))
    assert seen == [1]

def test_a_frozen_and_an_unpickled_model():
    model = models['linear']().requires_grad_(False)
    prune.l1_unstructured(model[0], 'weight', amount=7)
    masks = Masks.from_torch_prune(model)
    assert masks.n_dropped == 7
    assert Masks.from_torch_prune(pickle.loads(pickle.dumps(model))) == masks == Masks.from_torch_prune(deepcopy(model))

@pytest.mark.parametrize('model, error, says', [
    (nn.Linear(2, 2),                       ValueError, 'holds no parameter of this Linear'),
    (nn.ReLU(),                             ValueError, 'holds no parameter of this ReLU'),
    ({'weight_orig': torch.ones(2)},        TypeError,  'must be an `nn.Module`, got dict'),
    (None,                                  TypeError,  'got NoneType')], ids=str)
def test_what_cannot_be_taken_over(model, error, says):
    with pytest.raises(error, match=says): Masks.from_torch_prune(model)

def test_masks_that_scale_are_refused():
    layer = prune.custom_from_mask(nn.Linear(2, 2), 'weight', torch.tensor([[1., 0.5], [0., 1.]]))
    says  = r"mask of 'weight' must be of zeros and ones, got \[0.0, 0.5, 1.0\]"
    with pytest.raises(ValueError, match=says): Masks.from_torch_prune(layer)


# To

@by_model
def test_there_and_back(name):
    model = models[name]()
    masks, plain = random_masks(model), params_of(model)
    ours = deepcopy(model)
    masks.apply(dict(ours.named_parameters()))
    assert masks.to_torch_prune(model) is model
    assert Masks.from_torch_prune(model) == masks
    assert same(effective(model, masks), params_of(ours))
    assert all(torch.equal(dict(model.named_parameters())[f'{k}_orig'], plain[k]) for k in masks)
    assert all(prune.is_pruned(owner(model, k)[0]) for k in masks)
    if name in inputs: assert torch.equal(model(inputs[name]), ours(inputs[name]))
    assert same(params_of(removed(model, masks)), params_of(ours))

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model = models['linear']().to(dtype)
    masks = random_masks(model)
    masks.to_torch_prune(model)
    assert model[0].weight_mask.dtype == model[0].weight.dtype == dtype
    assert Masks.from_torch_prune(model) == masks
    assert torch.equal(model[0].weight == 0, ~masks['0.weight'])

def test_the_hook_keeps_no_mask_of_ours():
    "Ours are updated in place"
    model, masks = nn.Linear(4, 4), Masks({'weight': torch.ones(4, 4, dtype=torch.bool)})
    masks.to_torch_prune(model)
    masks['weight'][0] = False
    assert Masks.from_torch_prune(model).n_dropped == 0
    assert all(h.mask.all() for h in model._forward_pre_hooks.values())

def test_pytorch_goes_on_from_there():
    "6 of 12 are left, then 3"
    layer = nn.Linear(4, 3)
    masks = Masks({'weight': torch.arange(12).view(3, 4) % 2 == 0})
    prune.l1_unstructured(masks.to_torch_prune(layer), 'weight', amount=0.5)
    now = Masks.from_torch_prune(layer)['weight']
    assert int(now.sum()) == 3 and not (now & ~masks['weight']).any()

def test_training_through_the_masks():
    model = models['linear']()
    masks = random_masks(model)
    before = effective(masks.to_torch_prune(model), masks)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        opt.zero_grad()
        model(inputs['linear']).square().sum().backward()
        opt.step()
    removed(model, masks)
    after = params_of(model)
    assert all(not after[k][~m].any() for k,m in masks.items())
    assert not torch.equal(after['2.weight'], before['2.weight'])

@pytest.mark.parametrize('masks, says', [
    ({'0.wieght': torch.ones(5, 4)},      r"Unknown parameter '0.wieght'\. Did you mean '0.weight'\?"),
    ({'0.weight_orig': torch.ones(5, 4)}, "Unknown parameter '0.weight_orig'"),
    ({'1.running_mean': torch.ones(5)},   'Unknown parameter'),
    ({'2.bias': torch.ones(2)},           "Unknown parameter '2.bias'"),  # it has none
    ({'0.weight': torch.ones(4, 5)},      r"mask of '0.weight' must have shape \(5, 4\), got \(4, 5\)"),
    ({'0.bias': torch.ones(1)},           r'must have shape \(5,\)')], ids=str)
def test_nothing_is_touched_if_one_mask_is_wrong(masks, says):
    model = models['linear']()
    state = weights(model)
    good  = Masks({'2.weight': torch.zeros(2, 5, dtype=torch.bool)})
    with pytest.raises(ValueError, match=says):
        Masks({**good, **{k: v.bool() for k,v in masks.items()}}).to_torch_prune(model)
    assert same(state, weights(model)) and not any(m._forward_pre_hooks for m in model.modules())

def test_what_is_held_already_is_refused():
    model = models['linear']()
    prune.l1_unstructured(model[2], 'weight', amount=1)
    state, masks = weights(model), random_masks(models['linear']())
    with pytest.raises(ValueError,
                       match="'2.weight' is held by `torch.nn.utils.prune` already.*from_torch_prune.*prune.remove"):
        masks.to_torch_prune(model)
    assert same(state, weights(model)) and not prune.is_pruned(model[0])
    del masks['2.weight']
    masks.to_torch_prune(model)
    assert set(Masks.from_torch_prune(model)) == {k for k,_ in models['linear']().named_parameters()}

def test_model_must_be_a_module():
    with pytest.raises(TypeError, match='must be an `nn.Module`, got dict'): Masks().to_torch_prune({})

def test_no_masks_change_nothing():
    model = nn.Linear(2, 2)
    assert Masks().to_torch_prune(model) is model and not prune.is_pruned(model)


# One parameter in two modules

def tied():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    return model

def test_a_tied_parameter_has_one_mask_everywhere():
    model = tied()
    masks = random_masks(model)
    assert set(masks) == {'0.weight'}
    masks.to_torch_prune(model)
    assert model[0].weight_orig is model[1].weight_orig
    assert torch.equal(model[0].weight, model[1].weight) and torch.equal(model[0].weight != 0, masks['0.weight'])
    assert Masks.from_torch_prune(model) == masks

@pytest.mark.parametrize('where', [[0], [1], [0, 1]])
def test_different_masks_of_a_tied_parameter_are_refused(where):
    model = tied()
    for i in where: prune.random_unstructured(model[i], 'weight', amount=5 + i)
    with pytest.raises(ValueError, match="'0.weight' and '1.weight' are one parameter"): Masks.from_torch_prune(model)

def test_a_module_in_two_places():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    masks = random_masks(model)
    assert Masks.from_torch_prune(masks.to_torch_prune(model)) == masks and set(masks) == {'0.weight', '0.bias'}


# Equality of masks

def test_masks_are_equal_by_value():
    a, b = torch.tensor([True, False]), torch.tensor([True, True])
    assert Masks({'a': a, 'b': b}) == Masks({'b': b, 'a': a}) == {'a': a, 'b': b}
    assert not Masks({'a': a}) != Masks({'a': a})
    for other in ({'a': b}, {'a': a, 'b': b}, {}, {'b': a}, {'a': a[:1]}, {'a': 1}, None):
        assert Masks({'a': a}) != other


# Going on with a `Sparsifier`

def held_net():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2))
    prune.l1_unstructured(model[0], 'weight', amount=20)
    prune.random_unstructured(model[0], 'weight', amount=10)
    prune.l1_unstructured(model[2], 'weight', amount=9)
    return model

def test_masks_are_taken_over():
    model = held_net()
    with pytest.raises(ValueError, match='from_torch_prune'): Sparsifier(model)
    masks = Masks.from_torch_prune(model)
    kept  = effective(model, masks)
    sp = Sparsifier(removed(model, masks))
    sp.masks.update(masks)
    sp.apply_masks()
    assert sp.masks == masks and same(effective(model, masks), kept)
    assert set(model.state_dict()) == {'0.weight', '0.bias', '2.weight', '2.bias'}
    sp.sparsify_model(75)
    assert [r.zeros for r in sp.report().rows] == [54, 36]
    assert all(not (sp.masks[k] & ~masks[k]).any() for k in masks)

def test_zeros_are_adopted():
    model = held_net()
    masks = Masks.from_torch_prune(model)
    sp = Sparsifier(removed(model, masks))
    assert sp.adopt() == 39 and sp.masks == masks

def test_recurrent_masks_are_taken_over():
    model = Recurs(nn.LSTM)
    names = [k for k,_ in model.named_parameters() if 'weight' in k]
    for k in names: prune.l1_unstructured(*owner(model, k), amount=0.5)
    masks = Masks.from_torch_prune(model)
    sp = Sparsifier(removed(model, masks), layer_type=nn.LSTM)
    sp.masks.update(masks)
    out = model(inputs['lstm'])
    sp.apply_masks()
    assert torch.equal(model(inputs['lstm']), out) and sp.is_pruned('rnn.weight_hh_l1_reverse')


# The same choice

layers = dict(
    linear  = lambda: nn.Linear(7, 6),
    conv1d  = lambda: nn.Conv1d(4, 6, 3),
    conv2d  = lambda: nn.Conv2d(4, 6, (3, 2)),
    conv3d  = lambda: nn.Conv3d(3, 5, (2, 3, 2)),
    trans1d = lambda: nn.ConvTranspose1d(4, 6, 3),
    trans2d = lambda: nn.ConvTranspose2d(4, 6, (3, 2)),
    trans3d = lambda: nn.ConvTranspose3d(3, 5, (2, 3, 2)),
    embed   = lambda: nn.Embedding(7, 5))
by_layer = pytest.mark.parametrize('name', layers)

def of_dim(layer, dim):
    "The granularity of one index along `dim`"
    if layer.weight.ndim == 2: return ('row', 'column')[dim]
    return ('filter', 'shared_kernel')[dim if not layer.transposed else 1 - dim]

def both(name):
    theirs = layers[name]()
    return theirs, deepcopy(theirs)

def sparsified(layer, n, *args, **kwargs):
    sp = Sparsifier(layer, *args, layer_type=type(layer), **kwargs)
    sp.sparsify_model(n=n)
    return sp.masks['weight']

@by_layer
@pytest.mark.parametrize('share', [0, 0.1, 0.33, 0.5, 0.9])
def test_l1_unstructured(name, share):
    theirs, ours = both(name)
    n = int(share * ours.weight.numel())
    prune.l1_unstructured(theirs, 'weight', amount=n)
    assert torch.equal(sparsified(ours, n), Masks.from_torch_prune(theirs)['weight'])
    assert int((ours.weight == 0).sum()) == n
    assert torch.equal(ours.weight, theirs.weight)

@by_layer
@pytest.mark.parametrize('dim', [0, 1])
@pytest.mark.parametrize('norm', [1, 2, 3, 0.5, torch.inf, -torch.inf, 'fro'])
def test_ln_structured(name, dim, norm):
    for n in range(1, layers[name]().weight.shape[dim]):
        theirs, ours = both(name)
        known = 2 if norm == 'fro' and ours.weight.ndim > 3 else norm  # torch 2.7 has 'fro' for matrices only
        prune.ln_structured(theirs, 'weight', amount=n, n=known, dim=dim)
        assert torch.equal(sparsified(ours, n, of_dim(ours, dim), criteria=ln_norm(norm)),
                           Masks.from_torch_prune(theirs)['weight'])

@pytest.mark.parametrize('name', ['conv1d', 'trans1d'])
@pytest.mark.parametrize('dim', [0, 1])
def test_ln_structured_by_nuclear_norms(name, dim):
    "A matrix for each group: there are three axes"
    for n in range(1, layers[name]().weight.shape[dim]):
        theirs, ours = both(name)
        prune.ln_structured(theirs, 'weight', amount=n, n='nuc', dim=dim)
        assert torch.equal(sparsified(ours, n, of_dim(ours, dim), criteria=ln_norm('nuc')),
                           Masks.from_torch_prune(theirs)['weight'])

@by_layer
def test_the_mean_magnitude_orders_as_the_first_norm(name):
    theirs, ours = both(name)
    prune.ln_structured(theirs, 'weight', amount=2, n=1, dim=0)
    assert torch.equal(sparsified(ours, 2, of_dim(ours, 0)), Masks.from_torch_prune(theirs)['weight'])

@pytest.mark.parametrize('axis', [2, 3])
def test_ln_structured_along_kernels(axis):
    "An axis without a name here: a tuple of the others"
    theirs, ours = both('conv2d')
    prune.ln_structured(theirs, 'weight', amount=1, n=2, dim=axis)
    spans = tuple(d for d in range(4) if d != axis)
    assert torch.equal(sparsified(ours, 1, spans, criteria=ln_norm(2)), Masks.from_torch_prune(theirs)['weight'])

@by_layer
@pytest.mark.parametrize('dim', [0, 1])
def test_random_structured_counts(name, dim):
    theirs, ours = both(name)
    prune.random_structured(theirs, 'weight', amount=2, dim=dim)
    mask = sparsified(ours, 2, of_dim(ours, dim), criteria='random')
    others = tuple(d for d in range(mask.ndim) if d != dim)
    assert int((~mask).sum()) == int((theirs.weight_mask == 0).sum())
    assert int((~mask.any(others)).sum()) == 2

@pytest.mark.parametrize('n', [1, 25, 100, 350])
def test_global_unstructured(n):
    "460 weights in four kinds of layer"
    torch.manual_seed(n)
    theirs = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 5, 3), nn.Linear(12, 12), nn.Embedding(8, 8))
    ours   = deepcopy(theirs)
    prune.global_unstructured([(m, 'weight') for m in theirs], prune.L1Unstructured, amount=n)
    sp = Sparsifier(ours, context='global', layer_type=nn.Module)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', LayerCollapse)  # 350 are all of one layer
        sp.sparsify_model(n=n)
    assert sp.masks == Masks.from_torch_prune(theirs) and sp.masks.n_dropped == n and sp.masks.n == 460

def test_global_unstructured_with_biases():
    theirs, ours = models['linear'](), models['linear']()
    ours.load_state_dict(theirs.state_dict())
    prune.global_unstructured([(theirs[0], 'weight'), (theirs[0], 'bias'), (theirs[2], 'weight')],
                              prune.L1Unstructured, amount=17)
    sp = Sparsifier(ours, context='global', layer_type=nn.Linear, params=['weight', 'bias'])
    sp.sparsify_model(n=17)
    assert sp.masks == Masks.from_torch_prune(theirs)

def test_importance_scores():
    "Five of 0 to 8"
    theirs = nn.Sequential(nn.Linear(3, 3))
    ours, scores = deepcopy(theirs), torch.arange(9.).view(3, 3)
    prune.l1_unstructured(theirs[0], 'weight', amount=5, importance_scores=scores)
    sp = Sparsifier(ours, criteria={'0.weight': scores}, layer_type=nn.Linear)
    sp.sparsify_model(n=5)
    assert sp.masks == Masks.from_torch_prune(theirs)
    assert sp.masks['0.weight'].flatten().tolist() == [False]*5 + [True]*4

def test_importance_scores_of_rows():
    theirs = nn.Sequential(nn.Linear(5, 4))
    ours, scores = deepcopy(theirs), torch.rand(4, 5)
    prune.ln_structured(theirs[0], 'weight', amount=2, n=1, dim=0, importance_scores=scores)
    sp = Sparsifier(ours, 'row', criteria={'0.weight': scores}, layer_type=nn.Linear)
    sp.sparsify_model(n=2)
    assert torch.equal(sp.masks['0.weight'], Masks.from_torch_prune(theirs)['0.weight'])

@by_layer
def test_repeated_relative_amounts(name):
    theirs, ours = both(name)
    sp = Sparsifier(ours, layer_type=type(ours))
    for _ in range(5):
        prune.l1_unstructured(theirs, 'weight', amount=0.3)
        sp.sparsify_model(30, relative=True)
        assert sp.masks == Masks.from_torch_prune(theirs)

def test_a_share_is_rounded_there_and_floored_here():
    "29 % of 10 is 3 there, 2 here; 25 % is 2 in both, 38 % is 4 and 3"
    for percent,rounded,floored in ((25, 2, 2), (29, 3, 2), (38, 4, 3)):
        theirs = nn.Linear(10, 1)
        ours   = deepcopy(theirs)
        prune.l1_unstructured(theirs, 'weight', amount=percent/100)
        Sparsifier(ours, layer_type=nn.Linear).sparsify_model(percent)
        assert (int((theirs.weight == 0).sum()), int((ours.weight == 0).sum())) == (rounded, floored)

@pytest.mark.parametrize('param, n', [('in_proj_weight', 20), ('out_proj.weight', 8)])
def test_attention(param, n):
    theirs = nn.MultiheadAttention(4, 2)
    ours = deepcopy(theirs)
    prune.l1_unstructured(*owner(theirs, param), amount=n)
    sp = Sparsifier(ours, layer_type=nn.MultiheadAttention, params=param)
    sp.sparsify_model(n=n)
    assert sp.masks == Masks.from_torch_prune(theirs) and sp.masks.n_dropped == n

@pytest.mark.parametrize('kind', [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent(kind):
    theirs = kind(3, 4, num_layers=2)
    ours = deepcopy(theirs)
    for k in [k for k,_ in ours.named_parameters() if 'weight' in k]: prune.l1_unstructured(theirs, k, amount=5)
    sp = Sparsifier(ours, layer_type=kind)
    sp.sparsify_model(n=5)
    assert sp.masks == Masks.from_torch_prune(theirs) and len(sp.masks) == 4
