"Every granularity of every layer type against Python loops; criteria on numbers one can check by hand"
import math, pickle, re
from copy import deepcopy
from dataclasses import FrozenInstanceError
from functools import partial
from itertools import product

import pytest, torch, torch.nn as nn

from fasterai_clone.sparse.all import *
from fasterai_clone.core.criteria import group_scores, magnitude, Normalizer, Reducer
from fasterai_clone.core.schedule import as_schedule
from fasterai_clone.sparse.measure import as_criteria
from fasterai_clone.core.criteria import random as random_criterion
from helpers import exact, naive_keep

layer_types = dict(
    conv1d   = lambda: nn.Conv1d(4, 6, 3),
    conv2d   = lambda: nn.Conv2d(4, 6, (3, 2)),
    conv3d   = lambda: nn.Conv3d(2, 4, (3, 2, 2)),
    grouped1 = lambda: nn.Conv1d(4, 6, 3, groups=2),
    grouped2 = lambda: nn.Conv2d(6, 9, (2, 3), groups=3),
    depth2   = lambda: nn.Conv2d(4, 4, 3, groups=4),
    grouped3 = lambda: nn.Conv3d(4, 4, (1, 2, 3), groups=2),
    trans1d  = lambda: nn.ConvTranspose1d(4, 6, 3),
    trans2d  = lambda: nn.ConvTranspose2d(4, 6, (3, 2)),
    trans3d  = lambda: nn.ConvTranspose3d(2, 4, (3, 2, 2)),
    gtrans1  = lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
    gtrans2  = lambda: nn.ConvTranspose2d(6, 9, (2, 3), groups=3),
    linear   = lambda: nn.Linear(5, 4),
    embed    = lambda: nn.Embedding(6, 4))

# Which coordinates run over a whole group: o filter, i channel, d depth, h height, w width
parts  = dict(channel='i', row='w', column='h', depth='d', horizontal_slice='iw', vertical_slice='ih',
              depth_slice='id', kernel='dhw')
spans  = dict(weight='', shared_weight='o', filter='idhw', layer='oidhw', **parts,
              **{f'shared_{k}': 'o' + v for k,v in parts.items()})
legal  = {
    1: 'weight shared_weight channel row kernel filter shared_channel shared_row shared_kernel layer'.split(),
    2: 'weight shared_weight channel row column kernel vertical_slice horizontal_slice filter shared_channel '
       'shared_row shared_column '
       'shared_kernel shared_vertical_slice shared_horizontal_slice layer'.split(),
    3: list(spans)}
matrix = dict(linear='weight row column filter layer'.split(), embed='weight row column layer'.split())

def legal_of(name): return matrix.get(name) or legal[layer_types[name]().weight.ndim - 2]
pairs   = [(n, g) for n in layer_types for g in legal_of(n)]
illegal = [(n, g) for n in layer_types for g in spans if g not in legal_of(n)]

def key_of(m, granularity):
    "Index of a weight → the group it belongs to"
    w, span = m.weight, spans[granularity]
    if isinstance(m, (nn.Linear, nn.Embedding)):
        kept = dict(weight=(0, 1), row=(0,), filter=(0,), column=(1,), layer=())[granularity]
        return lambda idx: tuple(idx[k] for k in kept)
    letters = ('io' if m.transposed else 'oi') + 'dhw'[-(w.ndim - 2):]
    per_part = w.shape[0] // m.groups
    # of a grouped convolution: no group crosses parts
    part = lambda idx: () if granularity == 'layer' else (idx[0] // per_part,)
    return lambda idx: part(idx) + tuple(i for i,l in zip(idx, letters) if l not in span)

def naive_masks(m, granularity, score, sparsity):
    """Loops over indices: groups in the order of their first weight, the mean score of each, the lowest go, ties by
    order"""
    key, members = key_of(m, granularity), {}
    for idx in product(*map(range, m.weight.shape)): members.setdefault(key(idx), []).append(idx)
    means = [sum(score(idx) for idx in g) for g in members.values()]
    keep = naive_keep(torch.tensor(means, dtype=torch.float64), exact(len(members), sparsity))
    mask = torch.zeros(m.weight.shape, dtype=torch.bool)
    for k,g in zip(keep, members.values()):
        for idx in g: mask[idx] = k
    return mask, members

def whole(m, seed=0):
    "`m` with small whole numbers as weights: sums are exact, ties abound"
    with torch.no_grad():
        m.weight.copy_(torch.randint(-9, 10, m.weight.shape, generator=torch.Generator().manual_seed(seed)))
    return m

def sparsifier(m, *args, **kwargs): return Sparsifier(m, *args, layer_type=type(m), **kwargs)


# Granularities

@pytest.mark.parametrize('name, granularity', pairs)
def test_groups_are_those_of_the_loops(name, granularity):
    m = layer_types[name]()
    gr, (_, members) = Granularities.groups(m, granularity), naive_masks(m, granularity, lambda idx: 0, 0)
    ids = gr.expand(torch.arange(gr.n), m.weight.shape)
    assert (gr.n, gr.n * gr.size) == (len(members), m.weight.numel())
    assert [ids[g[0]].item() for g in members.values()] == list(range(gr.n))
    for g in members.values(): assert {ids[idx].item() for idx in g} == {ids[g[0]].item()}

@pytest.mark.parametrize('sparsity', [29, 57.5])
@pytest.mark.parametrize('name, granularity', pairs)
def test_masks_are_those_of_the_loops(name, granularity, sparsity):
    m = whole(layer_types[name]())
    w, init = m.weight.detach().clone(), m.weight.detach().clone()
    for criteria, score in [('large_final', lambda i: abs(w[i].item())), ('small_final', lambda i: -abs(w[i].item())),
                            ('squared_final', lambda i: w[i].item()**2),
                            ('movement', lambda i: abs(w[i].item() - init[i].item()))]:
        init = whole(m, 1).weight.detach().clone()
        sp   = sparsifier(m, granularity, criteria=criteria)
        with torch.no_grad(): m.weight.copy_(w)
        sp.sparsify_model(sparsity)
        mask, members = naive_masks(m, granularity, score, sparsity)
        assert torch.equal(sp.masks['weight'], mask) and torch.equal(m.weight.detach(), w*mask), criteria
        row = sp.report().rows[0]
        assert row.groups == len(members) and row.zeros == int((w*mask == 0).sum())
        assert row.zero_groups == sum(all((w*mask)[i] == 0 for i in g) for g in members.values())

@pytest.mark.parametrize('granularity', ['weight', 'row', 'filter', 'shared_kernel'])
def test_layers_compete_group_by_group(granularity):
    "Global: all groups of all layers in one row, the layer's order breaking ties"
    net = nn.Sequential(whole(nn.Conv2d(3, 4, 3), 0), whole(nn.ConvTranspose2d(4, 5, (2, 3)), 1),
                        whole(nn.Conv2d(4, 6, (3, 2), groups=2), 2))
    w, flat = [m.weight.detach().clone() for m in net], []
    for n,m in enumerate(net):
        for g in naive_masks(m, granularity, lambda i: 0, 0)[1].values():
            flat.append((n, g, sum(abs(w[n][i].item()) for i in g)/len(g)))
    keep = naive_keep(torch.tensor([s for *_,s in flat], dtype=torch.float32), exact(len(flat), 40))
    Sparsifier(net, granularity, 'global', layer_type=(nn.Conv2d, nn.ConvTranspose2d)).sparsify_model(40)
    for k,(n,g,_) in zip(keep, flat):
        for i in g: assert net[n].weight[i] == (w[n][i] if k else 0)

@pytest.mark.parametrize('name, granularity', illegal)
def test_illegal_pairs_are_refused_with_what_is_legal(name, granularity):
    m = layer_types[name]()
    with pytest.raises(ValueError) as e: sparsifier(m, granularity)
    said = str(e.value)
    assert type(m).__name__ in said and repr(granularity) in said
    assert set(said.split('Legal: ')[1].split(', ')) == set(legal_of(name))

def test_legal_granularities_are_listed_by_layer_and_by_type():
    for name,f in layer_types.items():
        allowed = Granularities.allowed_granularities
    assert set(allowed(f())) == set(allowed(type(f()))) == set(legal_of(name))
    assert set(Granularities.available_granularities()) == set(spans) | {'head', 'unit'}

@pytest.mark.parametrize('dims, like', [((1, 2, 3), 'filter'), ([2, 3], 'kernel'), ((-1,), 'row'), ((), 'weight'),
                                        ((3, 0), 'shared_row'), ((0, 1, 2, 3), 'layer')])
def test_axes_as_granularity(dims, like):
    a, b = whole(nn.Conv2d(4, 6, 3)), whole(nn.Conv2d(4, 6, 3))
    sparsifier(a, dims).sparsify_model(50)
    sparsifier(b, like).sparsify_model(50)
    assert torch.equal(a.weight, b.weight)

@pytest.mark.parametrize('dims', [(4,), (-5,), (1, 1), (1, -3), (1.5,), ('1',)])
def test_axes_that_are_not_there_are_refused(dims):
    with pytest.raises(ValueError, match='axes between 0 and 3'): sparsifier(nn.Conv2d(4, 6, 3), dims)

def test_subclasses_have_what_their_parents_have():
    class Mine(nn.Conv2d): pass
    assert Granularities.groups(Mine(2, 4, 3), 'filter').n == 4

def test_layers_without_granularities_are_named():
    with pytest.raises(TypeError, match='BatchNorm2d.*Conv2d.*Linear.*Embedding'):
        Granularities.allowed_granularities(nn.BatchNorm2d)
    with pytest.raises((TypeError, ValueError), match='BatchNorm2d'):
        Sparsifier(nn.BatchNorm2d(3), 'filter', layer_type=nn.BatchNorm2d)

def test_a_granularity_of_ones_own(monkeypatch):
    monkeypatch.setattr(Granularities, 'layouts', dict(Granularities.layouts))
    Granularities.add_granularity(nn.LayerNorm, dict(weight=(), all=(0,)))
    Granularities.add_granularity(nn.Linear, dict(everything=(0, 1)))
    assert Granularities.groups(nn.LayerNorm(7), 'all').size == 7
    assert Granularities.groups(nn.Linear(3, 2), 'everything').n == 1
    assert Granularities.groups(nn.Linear(3, 2), 'row').n == 2


# Criteria: scores of w = (1, -2, 3, -4), which were (-3, 1, 2, -8) before, at the last update, or as reference

now, before = torch.tensor([1., -2, 3, -4]), torch.tensor([-3., 1, 2, -8])
by_hand = dict(
    large_final            = [1, 2, 3, 4],
    small_final            = [-1, -2, -3, -4],
    squared_final          = [1, 4, 9, 16],
    large_init             = [3, 1, 2, 8],
    small_init             = [-3, -1, -2, -8],
    large_init_large_final = [1, 1, 2, 4],
    small_init_small_final = [-3, -2, -3, -8],
    magnitude_increase     = [-2, 1, 1, -4],
    movement               = [4, 3, 1, 4],
    movmag                 = [4, 6, 3, 16],
    updating_magnitude_increase = [-2, 1, 1, -4],
    updating_movement           = [4, 3, 1, 4],
    updating_movmag             = [4, 6, 3, 16],
    gradient = [-3, 1, 2, -8],  # the reference itself: |w·∂L/∂w|
    fisher        = [-1.5, 2, 9, -64],  # ½w² times the sum of squared gradients
    sanh_movement = [-3, 1, 2, -8],     # the reference itself: the sum of −w·∂L/∂w
    wanda    = [3, 2, 6, 32],   # |w| times the norm of what it is multiplied with
    snip     = [3, 2, 6, 32],   # |w| times the gradient
    grasp    = [-3, -2, 6, 32], # w times Hessian · gradient
    # what was measured: test_measure
    **{k: [-3, 1, 2, -8] for k in ('synflow', 'apoz', 'mean_activation', 'bn_scale')})

def test_every_criterion_is_among_these(): assert set(by_hand) | {'random', 'fpgm'} == set(available_criterias())

@pytest.mark.parametrize('name', by_hand)
def test_scores_by_hand(name):
    c = as_criteria(name)
    ref = before.abs() if name == 'wanda' else before
    assert c(now, ref if c.reference else None).tolist() == by_hand[name]

@pytest.mark.parametrize('name, kind', [('large_init', 'init'), ('movement', 'init'), ('updating_movement', 'update'),
                                        ('gradient', 'grad'),
                                        ('fisher', 'grad'), ('wanda', 'measure'), ('synflow', 'measure'),
                                        ('large_final', None), ('random', None)])
def test_what_each_compares_with(name, kind):
    c = as_criteria(name)
    assert c.reference == kind
    if kind:
        with pytest.raises(ValueError, match=kind): c(now)

def test_the_alias():
    assert grad_crit is gradient is as_criteria('grad_crit') and available_criterias().count('gradient') == 1

def test_random_follows_torchs_seed():
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(random_criterion(now), want)
    assert not torch.equal(random_criterion(now), want)

@pytest.mark.parametrize('name, want', [('sum', [6., 15]), ('mean', [2., 5]), ('max', [3., 6]),
                                        ('l2', [math.sqrt(14), math.sqrt(77)])])
def test_reducers(name, want):
    rows   = Granularities.groups(nn.Linear(3, 2), 'row')
    scores = group_scores(Criteria(magnitude, getattr(Reducer, name)), torch.tensor([[1., -2, 3], [-4, 5, 6]]), rows)
    assert scores.flatten().tolist() == pytest.approx(want)

@pytest.mark.parametrize('name, want', [('sum', [.1, .2, .3, .4]), ('mean', [.4, .8, 1.2, 1.6]),
                                        ('max', [.25, .5, .75, 1]),
                                        ('standardization', [0, 1/3, 2/3, 1]),
                                        ('gaussian', [(i - 2.5)/math.sqrt(5/3) for i in (1, 2, 3, 4)])])
def test_normalizers(name, want):
    each   = Granularities.groups(nn.Linear(4, 1), 'weight')
    scores = group_scores(Criteria(magnitude, normalizer=getattr(Normalizer, name)), now[None], each)
    assert scores.flatten().tolist() == pytest.approx(want)

def test_a_normalizer_makes_layers_comparable():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    for m,s in zip(net, (1., 100.)): m.weight.data = s * torch.tensor([[1., 2], [3, 4]])
    plain, scaled = deepcopy(net), deepcopy(net)
    Sparsifier(plain,  'weight', 'global', layer_type=nn.Linear).sparsify_model(50)
    Sparsifier(scaled, 'weight', 'global', Criteria(magnitude, normalizer=Normalizer.max),
               layer_type=nn.Linear).sparsify_model(50)
    assert [int((m.weight == 0).sum()) for m in plain] == [4, 0]
    assert [int((m.weight == 0).sum()) for m in scaled] == [2, 2]

def test_init_is_what_the_weights_were_when_built():
    m = nn.Linear(4, 1, bias=False)
    m.weight.data = before[None].clone()
    sp = sparsifier(m, criteria='movement')
    m.weight.data = now[None].clone()     # movement 4 3 1 4
    sp.sparsify_model(50)
    assert m.weight.tolist() == [[1, 0, 0, -4]]

def test_update_is_what_the_weights_were_at_the_last_pruning():
    m = nn.Linear(4, 1, bias=False)
    m.weight.data = torch.zeros(1, 4)
    sp = sparsifier(m, criteria='updating_movement')
    m.weight.data = torch.tensor([[9., 1, 8, 7]])
    sp.sparsify_model(25)
    assert m.weight.tolist() == [[9, 0, 8, 7]]
    # since then 0 0 3 2: the first has moved least, though it is far from where it began
    m.weight.data = torch.tensor([[9., 0, 11, 9]])
    sp.sparsify_model(50)
    assert m.weight.tolist() == [[0, 0, 11, 9]]

values = [*map(as_criteria, available_criterias()), *map(as_schedule, available_schedules()),
          Granularities.groups(nn.Conv2d(2, 4, 3), 'filter')]

@pytest.mark.parametrize('value', values, ids=lambda v: re.sub(r' at 0x\w+', '', str(v))[:60])
def test_values_are_frozen_comparable_and_picklable(value):
    assert pickle.loads(pickle.dumps(value)) == value == deepcopy(value)
    assert hash(value) == hash(pickle.loads(pickle.dumps(value)))
    for k in vars(value):
        with pytest.raises(FrozenInstanceError): setattr(value, k, None)

def twice(w): return 2 * w.abs()

def test_a_function_is_a_criterion_and_keeps_its_name_when_pickled():
    c = as_criteria(twice)
    assert c(now).tolist() == [2, 4, 6, 8] and pickle.loads(pickle.dumps(c)) == c

def test_ready_scores_are_followed():
    m = nn.Linear(3, 3, bias=False)
    nn.init.ones_(m.weight)
    sparsifier(m, criteria={'weight': torch.arange(9).reshape(3, 3)}).sparsify_model(56)  # floor(0.56·9) = 5
    assert m.weight.tolist() == [[0, 0, 0], [0, 0, 1], [1, 1, 1]]


# Gradients

def step(m, opt, x):
    opt.zero_grad()
    m(x).sum().backward()
    opt.step()

def test_gradient_is_summed_over_the_steps_by_hand():
    "L = x·w, so ∂L/∂w = x: the scores are |w₁x₁| + |w₂x₂| with the weights of each step"
    m = nn.Linear(3, 1, bias=False)
    m.weight.data = torch.tensor([[2., -3, 1]])
    sp, opt = sparsifier(m, criteria='gradient'), torch.optim.SGD(m.parameters(), lr=1.)
    with sp.hold(opt):
        step(m, opt, torch.tensor([[1., 0, 4]]))    # |w·x| 2 0 4, then w = 1 -3 -3
        step(m, opt, torch.tensor([[-4., 0, 0]]))   # 4 0 0, then w = 5 -3 -3: sums 6 0 4
        assert sp.refs['weight'].tolist() == [[6, 0, 4]]
        sp.sparsify_model(200/3)                    # two of three: -3 (0) and -3 (4)
        assert m.weight.tolist() == [[5, 0, 0]]
        step(m, opt, torch.tensor([[0.5, 1, 1]]))   # counting starts anew: 2.5 0 0
        assert sp.refs['weight'].tolist() == [[2.5, 0, 0]] and m.weight.tolist() == [[4.5, 0, 0]]
    step(m, opt, torch.tensor([[1., 1, 1]]))        # released: nothing is counted, nothing is masked
    assert sp.refs['weight'].tolist() == [[2.5, 0, 0]] and m.weight.tolist() == [[3.5, -1, -1]]

@pytest.mark.parametrize('opt_func', [partial(torch.optim.SGD, lr=.1, momentum=.9), partial(torch.optim.AdamW, lr=.1)])
@pytest.mark.parametrize('granularity, reduce', [('weight', lambda s: s), ('filter', lambda s: s.mean((1, 2, 3))),
                                                 ('kernel', lambda s: s.mean((2, 3)))])
def test_gradient_sums_choose_the_groups(opt_func, granularity, reduce):
    torch.manual_seed(0)
    m = nn.Conv2d(3, 8, 3)
    sp, opt, total = sparsifier(m, granularity, criteria=grad_crit), opt_func(m.parameters()), 0
    with sp.hold(opt):
        for _ in range(4):
            opt.zero_grad()
            m(torch.randn(2, 3, 6, 6)).square().mean().backward()
            total = total + (m.weight.detach() * m.weight.grad).abs()
            opt.step()
        sp.sparsify_model(50)
    scores = reduce(total).flatten()
    kept   = reduce(sp.masks['weight'].float()).flatten().bool()
    assert int((~kept).sum()) == scores.numel() // 2 and scores[kept].min() >= scores[~kept].max()

def test_gradient_without_a_backward_pass_says_so():
    with pytest.raises(ValueError, match='backward'):
        sparsifier(nn.Linear(3, 1), criteria='gradient').sparsify_model(50)


# Wanda: |w| times the L2 norm of the input it is multiplied with

def naive_norms(m, x):
    "The norm that belongs to each weight, by loops"
    w, norms = m.weight, torch.zeros(m.weight.shape)
    for idx in product(*map(range, w.shape)):
        if   isinstance(m, nn.Embedding): s = sum(t == idx[0] for t in x.flatten().tolist())
        elif isinstance(m, nn.Linear):    s = sum(v*v for v in x.reshape(-1, x.shape[-1])[:, idx[1]].tolist())
        else:
            channel = idx[0] if m.transposed else idx[0] // (w.shape[0]//m.groups) * w.shape[1] + idx[1]
            taps = [slice(None) if m.transposed else slice(k, k + n - size + 1)
                    for k,n,size in zip(idx[2:], x.shape[2:], w.shape[2:])]
            s = sum(v*v for v in x[(slice(None), channel, *taps)].flatten().tolist())
        norms[idx] = math.sqrt(s)
    return norms

wandas = dict(
    linear      = (lambda: nn.Linear(5, 4),                        (7, 5)),
    linear_btc  = (lambda: nn.Linear(5, 4),                        (2, 3, 5)),
    linear_4d   = (lambda: nn.Linear(5, 4),                        (2, 2, 2, 5)),
    conv1d      = (lambda: nn.Conv1d(4, 6, 3),                     (2, 4, 7)),
    conv2d      = (lambda: nn.Conv2d(4, 6, 3),                     (2, 4, 5, 5)),
    grouped     = (lambda: nn.Conv2d(6, 9, 3, groups=3),           (2, 6, 5, 5)),
    depthwise   = (lambda: nn.Conv2d(4, 4, 3, groups=4),           (2, 4, 5, 5)),
    transposed  = (lambda: nn.ConvTranspose2d(4, 6, 3),            (2, 4, 5, 5)),
    gtransposed = (lambda: nn.ConvTranspose2d(6, 9, 3, groups=3),  (2, 6, 5, 5)),
    conv3d      = (lambda: nn.Conv3d(2, 3, 2),                     (2, 2, 3, 3, 3)),
    embedding   = (lambda: nn.Embedding(6, 4),                     (3, 8)))

@pytest.mark.parametrize('name', wandas)
def test_wanda_is_that_of_the_loops(name):
    make, shape = wandas[name]
    torch.manual_seed(1)
    m = make()
    x = torch.randint(0, 5, shape) if name == 'embedding' else torch.randn(shape)
    w, sp = m.weight.detach().clone(), sparsifier(m, criteria='wanda')
    scores = w.abs() * naive_norms(m, x)
    sp.observe(x)
    sp.sparsify_model(50)
    keep = sp.masks['weight']
    assert int((~keep).sum()) == w.numel()//2 and scores[keep].min() >= scores[~keep].max() - 1e-5

def test_wanda_adds_up_what_is_observed_until_the_next_update():
    m = nn.Linear(3, 2, bias=False)
    m.weight.data = torch.tensor([[1., 2, 3], [1, 3, 6]])  # times 5 2 1: 5 4 3, 5 6 6
    sp = sparsifier(m, criteria=wanda)
    sp.observe(torch.tensor([[3., 0, 1]]))
    sp.observe(torch.tensor([[4., 2, 0]]))
    sp.sparsify_model(50)
    assert m.weight.tolist() == [[0, 0, 0], [1, 3, 6]]
    with pytest.raises(ValueError, match='wanda needs data'): sp.sparsify_model(70)

@pytest.mark.parametrize('data', [torch.tensor([[3., 0, 1], [4, 2, 0]]),
                                  [(torch.tensor([[3., 0, 1]]),), (torch.tensor([[4., 2, 0]]),)],
                                  [(torch.tensor([[3., 0, 1], [4, 2, 0]]), torch.tensor([0, 1]))]],
                         ids=['tensor', 'batches', 'with labels'])
def test_wanda_takes_data(data):
    m = nn.Linear(3, 2, bias=False)
    m.weight.data = torch.tensor([[1., 2, 3], [1, 3, 6]])  # times 5 2 1: 5 4 3, 5 6 6
    sparsifier(m, criteria=wanda, data=data).sparsify_model(50)
    assert m.weight.tolist() == [[0, 0, 0], [1, 3, 6]]

def test_wanda_without_activations_says_so():
    with pytest.raises(ValueError, match='wanda needs data'):
        sparsifier(nn.Linear(3, 1), criteria='wanda').sparsify_model(50)


# n:m patterns

fills = dict(normal=lambda *s: torch.randn(*s, generator=torch.Generator().manual_seed(0)), constant=torch.ones,
             signs=lambda *s: torch.randint(0, 2, s, generator=torch.Generator().manual_seed(0)).float()*2 - 1,
             zero=torch.zeros)
nm_layers = dict(conv=lambda: nn.Conv2d(24, 5, 3), linear=lambda: nn.Linear(48, 7),
                 grouped=lambda: nn.Conv2d(48, 4, 1, groups=2),
                 conv1d=lambda: nn.Conv1d(24, 3, 2))

def blocks_of(t, m): return t.movedim(1, -1).unflatten(-1, (-1, m))

@pytest.mark.parametrize('fill', fills)
@pytest.mark.parametrize('n, m', [(2, 4), (1, 2), (1, 4), (4, 8), (1, 3), (5, 6)])
@pytest.mark.parametrize('name', nm_layers)
def test_nm_is_the_best_n_of_each_m(name, n, m, fill):
    layer = nm_layers[name]()
    layer.weight.data = w = fills[fill](*layer.weight.shape)
    sp, w = sparsifier(layer, nm=(n, m)), w.clone()
    sp.sparsify_model(100*(m-n)/m)
    for mask, block in zip(blocks_of(sp.masks['weight'], m).reshape(-1, m), blocks_of(w, m).reshape(-1, m)):
        assert torch.equal(mask, naive_keep(block.abs(), m-n))

@pytest.mark.parametrize('fill', fills)
@pytest.mark.parametrize('sparsity', [7, 29, 49])
@pytest.mark.parametrize('context', ['local', 'global'])
def test_on_the_way_no_block_has_less_than_n(fill, sparsity, context):
    net = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 12))
    for m in net: m.weight.data = fills[fill](*m.weight.shape)
    sp = Sparsifier(net, 'weight', context, nm=True, layer_type=nn.Linear)
    sp.sparsify_model(sparsity)
    dropped = [int((~v).sum()) for v in sp.masks.values()]
    if context == 'local': assert dropped == [exact(128, sparsity), exact(96, sparsity)]
    else: assert sum(dropped) == exact(224, sparsity)
    for v in sp.masks.values(): assert blocks_of(v, 4).sum(-1).min() >= 2

def test_nm_arrives_from_below():
    "Up in small steps, weights moving in between: pruned stays pruned, and the pattern is exact at the end"
    m = nn.Linear(32, 16)
    sp, gone = sparsifier(m, nm=(2, 4)), torch.zeros(16, 32, dtype=torch.bool)
    for s in (10, 20, 35, 49, 50):
        sp.sparsify_model(s)
        mask = sp.masks['weight'].clone()
        assert not (gone & mask).any() and int((~mask).sum()) == exact(512, s)
        gone = ~mask
        with torch.no_grad(): m.weight.add_(torch.randn(16, 32, generator=torch.Generator().manual_seed(s)))
        sp.apply_masks()
    assert (blocks_of(mask, 4).sum(-1) == 2).all()

@pytest.mark.parametrize('make, n_inputs', [(lambda: nn.Linear(6, 4), 6), (lambda: nn.Conv2d(3, 4, 3), 3),
                                            (lambda: nn.Conv2d(8, 8, 3, groups=4), 2)])
def test_nm_needs_a_multiple_of_m(make, n_inputs):
    with pytest.raises(ValueError, match=f'{n_inputs} inputs.*multiple of 4'): sparsifier(make(), nm=True)


CONV = dict(weight=[0], shared_weight=[1], channel=[2], column=[3], row=[4], kernel=[3, 4], filter=[2, 3, 4],
            shared_channel=[1, 2], shared_kernel=[1, 3, 4], layer=[1, 2, 3, 4])
BACK = dict(weight=[0], shared_weight=[2], channel=[1], kernel=[3, 4], filter=[1, 3, 4], shared_channel=[1, 2],
            shared_kernel=[2, 3, 4])
@pytest.mark.parametrize('m, axes', [(nn.Conv2d(2, 3, 3), CONV), (nn.ConvTranspose2d(2, 3, 3), BACK),
                                     (nn.Linear(2, 3), dict(weight=[0], column=[1], row=[2], layer=[1, 2]))])
def test_axes_as_fasterai_counts_them(m, axes):
    "One score a group, from the axes of `weight[None]`"
    assert {g: Granularities.get_dim(m, g) for g in axes} == axes
    w = m.weight[None]
    for g in axes.keys() - {'weight'}:
        groups = Granularities.groups(m, g)
        assert torch.allclose(w.abs().sum(axes[g]).flatten(), groups.reduce(m.weight.abs(), torch.sum).flatten())

def test_what_has_no_axes():
    with pytest.raises(ValueError, match="Did you mean 'filter'"): Granularities.get_dim(nn.Conv2d(1, 1, 1), 'filters')
    with pytest.raises(ValueError, match='no axes of one weight'): Granularities.get_dim(nn.LSTM(2, 3), 'unit')
    with pytest.raises(TypeError, match='No granularity is known for ReLU'): Granularities.get_dim(nn.ReLU(), 'filter')


@pytest.mark.parametrize('name', ['sum', 'mean', 'max', 'standardization'])
def test_a_normalizer_of_a_layer_that_is_pruned_entirely(name):
    "Its scores are all zero, and so are the normalized ones; the other layer loses the rest"
    net = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(4, 2, 1, bias=False))
    net[0].weight.data.zero_()
    net[1].weight.data = torch.arange(1., 9).reshape(2, 4, 1, 1)
    sp = Sparsifier(net, context='global', criteria=Criteria(torch.abs, normalizer=getattr(Normalizer, name)))
    sp.sparsify_model(50)
    assert sum(int((m.weight == 0).sum()) for m in net) == 6
