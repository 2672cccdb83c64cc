"Shares of the layers against fractions and Python's sort: exact totals, monotone counts, limits kept, order kept"
import math
from fractions import Fraction
from itertools import accumulate

import pytest, torch, torch.nn as nn
from hypothesis import given, settings, strategies as st

from fasterai_clone.sparse.budget import *
from fasterai_clone.sparse.budget import _order
from fasterai_clone.core.selection import keep_mask, keep_masks, n_dropped
from helpers import exact, naive_keep

DTYPES   = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SPARSITY = st.one_of(st.integers(0, 100), st.floats(0, 100), st.sampled_from([29, 57.5, 99.9]))
seeds    = st.integers(0, 999)

def generator(seed): return torch.Generator().manual_seed(seed)
def drops(masks): return [int((~m).sum()) for m in masks]
def ranked(scores, pruned=None):
    """(layer, index) of all groups in the order they go: what was dropped before first, then by score, ties by layer
    and index"""
    old = [torch.ones(s.shape, dtype=torch.bool) if p is None else p
           for s,p in zip(scores, pruned or [None]*len(scores))]
    keys = [(kept, x, l, i) for l,(s,p) in enumerate(zip(scores, old))
            for i,(kept,x) in enumerate(zip(p.flatten().tolist(), s.flatten().tolist()))]
    return [(l, i) for *_,l,i in sorted(keys)]

@st.composite
def layers_of_scores(draw, least=-3, most=3):
    "A few layers of whole numbers, so that there are ties, in any dtype, and earlier masks of some"
    sizes, seed = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)), draw(seeds)
    dtype = draw(st.sampled_from(DTYPES))
    scores = [torch.randint(least, most + 1, (n,), generator=generator(seed + i)).to(dtype) for i,n in enumerate(sizes)]
    pruned = [None if draw(st.booleans()) else torch.rand(n, generator=generator(seed - i)) > 0.5
              for i,n in enumerate(sizes)]
    return scores, draw(st.sampled_from([None, pruned]))

@st.composite
def bounds(draw, sizes):
    "Lows and highs that fit"
    pairs = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in sizes]
    return [a for a,_ in pairs], [b for _,b in pairs]


# The order that all share

@pytest.mark.parametrize('dtype', DTYPES)
def test_order_is_that_of_a_stable_sort(dtype):
    x = torch.cat([torch.randn(500, generator=generator(1)),
                   torch.randint(-2, 3, (500,), generator=generator(2)).float(),
                   torch.tensor([0., -0., 0., -0., 1e-45, -1e-45, 3e38, -3e38, math.inf, -math.inf]*3)]).to(dtype)
    flat = x.tolist()
    assert _order(x).tolist() == sorted(range(len(flat)), key=flat.__getitem__)
    assert torch.equal(_order(x.reshape(5, -1)), x.reshape(5, -1).argsort(dim=1, stable=True))


# Limits

def test_limits_by_hand():
    assert limits([100, 100, 7], 29, 58) == ([29, 29, 3], [58, 58, 4])   # 7·29/100 = 2.03, 7·58/100 = 4.06
    assert limits([100, 3]) == ([0, 0], [100, 3])
    assert limits([1, 1], 50, None) == ([1, 1], [1, 1])                  # half of one is one
    assert limits([100, 100], 1.1*50) == ([55, 55], [100, 100])           # 55.00000000000001 is a rounding error
    assert limits([1, 16], 90, 90) == ([0, 14], [0, 14])                 # no whole number in between: as on its own

@given(st.lists(st.integers(0, 5000), min_size=1, max_size=5), st.integers(1, 1000), st.integers(1, 1000))
def test_limits_are_what_they_say(sizes, a, b):
    a, b = sorted((a, b))
    lows, highs = limits(sizes, a/10 if a > 9 else 0, b/10 if b > 9 else 0)
    a, b = a if a > 9 else 0, b if b > 9 else 0
    for n,lo,hi in zip(sizes, lows, highs):
        assert hi == exact(n, Fraction(b, 10)) and lo == min(math.ceil(Fraction(a*n, 1000)), hi)

def test_limits_by_name_or_pattern():
    names = ['stem', 'body.0', 'body.1', 'head']
    most = {'body.*': 50, 'body.1': 80, '*d': 20}
    assert limits([10]*4, None, most, names)[1] == [10, 5, 8, 2]
    # a name wins, then the last pattern
    assert limits([10]*4, None, {'body.1': 80, 'body.*': 50, 'b*': 60}, names)[1] == [10, 6, 8, 10]
    assert limits([10]*4, {'head.weight': 30}, None, names)[0] == [0, 0, 0, 3]

@pytest.mark.parametrize('kwargs, error, says', [
    (dict(max_sparsity={'bdy.0': 50}),            ValueError, "max_sparsity.*'bdy.0'.*Did you mean 'body.0'"),
    (dict(min_sparsity={'body.2*': 50}),          ValueError, 'min_sparsity'),
    (dict(max_sparsity={0: 50}),                  TypeError,  'layer names or patterns'),
    (dict(max_sparsity=0.5),                      ValueError, 'write 50'),
    (dict(min_sparsity={'head': 101}),            ValueError, r"min_sparsity\['head'\].*0 to 100"),
    (dict(min_sparsity='50'),                     TypeError,  'min_sparsity'),
    (dict(min_sparsity=60, max_sparsity={'head': 50}), ValueError, "'head' is 60, more than its `max_sparsity` of 50"),
    (dict(names=['stem']),                        ValueError, 'one name for each of 2')])
def test_limits_refuse(kwargs, error, says):
    with pytest.raises(error, match=says): limits([10, 10], **{'names': ['body.0', 'head'], **kwargs})

@given(st.data())
def test_limits_that_cannot_be_met_say_what_can(data):
    "The percentages in the message are ones that work"
    sizes = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=4))
    lows, highs = data.draw(bounds(sizes))
    for n in {0, sum(lows), sum(highs), sum(sizes)}:
        if sum(lows) <= n <= sum(highs): assert check_limits(n, lows, highs, sizes) is None
        else:
            with pytest.raises(ValueError, match=f'allow {sum(lows):,} to {sum(highs):,}') as e:
                check_limits(n, lows, highs, sizes)
            low, high = map(float, str(e.value).rsplit('from ', 1)[1].split(' %')[0].split(' to '))
            assert n_dropped(sum(sizes), low) >= sum(lows) and n_dropped(sum(sizes), high) <= sum(highs)


# ERK

def naive_webster(weights, n, lows, highs):
    "Kept groups come one by one at ε = (j - 1/2)/weight; the lowest ε first, of equal ones that of the later layer"
    first = [(Fraction(-1), 0, 0, l) for l,lo in enumerate(lows) for _ in range(lo)]
    rest  = [(Fraction(2*j - 1, 2)/w, -l, j, l) for l,(w,lo,hi) in enumerate(zip(weights, lows, highs))
             for j in range(lo + 1, hi + 1)]
    order = [o[-1] for o in first + sorted(rest)]
    return [order[:n].count(l) for l in range(len(weights))]

def naive_erk(shapes, sparsity):
    "RigL: layers that would be more than dense stay dense, the rest is rescaled; real numbers of kept weights"
    sizes, dense = [math.prod(s) for s in shapes], set()
    while True:
        keep = sum(sizes) - n_dropped(sum(sizes), sparsity) - sum(sizes[l] for l in dense)
        total = sum(sum(s) for l,s in enumerate(shapes) if l not in dense)
        over = {l for l,s in enumerate(shapes) if l not in dense and keep*sum(s) > total*sizes[l]}
        if not over: return [sizes[l] if l in dense else Fraction(keep*sum(s), total) for l,s in enumerate(shapes)]
        dense |= over

shape = st.one_of(st.tuples(*[st.integers(1, 6)]*2), st.tuples(*[st.integers(1, 4)]*4))

@settings(max_examples=150)
@given(data=st.data(), shapes=st.lists(shape, min_size=1, max_size=5), sparsity=SPARSITY)
def test_erk_is_webster(data, shapes, sparsity):
    sizes = [math.prod(s) if data.draw(st.booleans()) else s[0] for s in shapes]
    weights = [Fraction(n*sum(s), math.prod(s)) for s,n in zip(shapes, sizes)]
    n = n_dropped(sum(sizes), sparsity)
    counts = erk_counts(shapes, sizes, sparsity)
    assert sum(counts) == n and all(type(k) is int for k in counts)
    assert [s-k for s,k in zip(sizes, counts)] == naive_webster(weights, sum(sizes) - n, [0]*len(sizes), sizes)
    lows, highs = data.draw(bounds(sizes))
    if sum(lows) <= n <= sum(highs):
        counts = erk_counts(shapes, sizes, sparsity, lows, highs)
        kept = naive_webster(weights, sum(sizes) - n, [s-h for s,h in zip(sizes, highs)],
                             [s-l for s,l in zip(sizes, lows)])
        assert [s-k for s,k in zip(sizes, counts)] == kept
        assert all(lo <= k <= hi for lo,k,hi in zip(lows, counts, highs)) and sum(counts) == n
    else:
        with pytest.raises(ValueError, match='limits of the layers allow'):
            erk_counts(shapes, sizes, sparsity, lows, highs)

@settings(max_examples=60)
@given(data=st.data(), shapes=st.lists(shape, min_size=2, max_size=5))
def test_erk_never_gives_back(data, shapes):
    "From the lowest sparsity the limits allow to the highest, group by group"
    sizes = [math.prod(s) for s in shapes]
    lows, highs = data.draw(st.sampled_from([([0]*len(sizes), sizes), data.draw(bounds(sizes))]))
    N, path = sum(sizes), []
    for k in range(sum(lows), sum(highs) + 1): path.append(erk_counts(shapes, sizes, 100*k/N, lows, highs))
    assert [sum(p) for p in path] == list(range(sum(lows), sum(highs) + 1))
    assert path[0] == lows and path[-1] == highs
    for a,b in zip(path, path[1:]): assert sum(y - x for x,y in zip(a, b)) == 1 and all(x <= y for x,y in zip(a, b))

def test_largest_remainder_would_give_back():
    "What the rounding is there to avoid: 11 of 3:3:1 are 5, 5, 1 and 10 are 4, 4, 2"
    shapes, sizes = [(9, 9), (9, 9), (3, 3)], [81, 81, 9]
    counts = [erk_counts(shapes, sizes, 100*(171-k)/171) for k in (12, 11, 10, 9)]
    assert [[n-k for n,k in zip(sizes, c)] for c in counts] == [[5, 5, 2], [4, 5, 2], [4, 4, 2], [4, 4, 1]]

resnet = [(64, 3, 7, 7), *[(64, 64, 3, 3)]*4, (128, 64, 3, 3), *[(128, 128, 3, 3)]*3, (128, 64, 1, 1), (256, 128, 3, 3),
          *[(256, 256, 3, 3)]*3, (256, 128, 1, 1), (512, 256, 3, 3), *[(512, 512, 3, 3)]*3, (512, 256, 1, 1)]
nets = dict(lenet=[(300, 784), (100, 300), (10, 100)], digits=[(4, 1, 3, 3), (8, 4, 3, 3), (16, 8, 3, 3)],
            resnet18=resnet)

@pytest.mark.parametrize('sparsity', [10, 50, 80, 90, 95, 98, 99.5])
@pytest.mark.parametrize('net', nets)
def test_erk_is_that_of_rigl(net, sparsity):
    "Of real networks, less than one weight beside the real numbers"
    shapes = nets[net]
    sizes  = [math.prod(s) for s in shapes]
    counts = erk_counts(shapes, sizes, sparsity)
    assert sum(counts) == exact(sum(sizes), sparsity)
    assert all(abs(n - k - r) < 1 for n,k,r in zip(sizes, counts, naive_erk(shapes, sparsity)))

def test_erk_by_hand():
    shapes, sizes = [(2, 2), (8, 8)], [4, 64]
    want = {0: [0, 0], 50: [0, 34], 75: [1, 50], 100: [4, 64]}
    assert {s: erk_counts(shapes, sizes, s) for s in want} == want
    assert erk_counts([(2, 2)]*3, [4]*3, 100/12) == [1, 0, 0]  # ties by index
    assert erk_counts([(4, 2, 1, 1), (8, 4, 3, 3)], [4, 8], 50) == [0, 6]  # filters: 4·8/8 = 4 to 8·18/288 = 1/2 shares
    assert erk_counts([], [], 50) == [] and erk_counts([(0, 3), (2, 2)], [0, 4], 50) == [0, 2]

def test_erk_of_sparsities_on_the_way_to_the_first_percent():
    "A schedule passes through them"
    assert sum(erk_counts([(30, 30), (50, 50)], [900, 2500], 0.1)) == 3

@pytest.mark.parametrize('args, says', [
    (([(2, 2)], [4, 4], 50), 'one shape for each of 2'),
    (([(2, 2)], [4], 50, [1, 1]), 'one low and one high for each of 1'),
    (([(2, 2)], [4], 50, [3], [2]), 'Layer 0 has 4 groups'),
    (([(2, 2)], [4], 50, [0], [5]), 'Layer 0 has 4 groups'),
    (([(2, 2)], [4], 100, None, [3]), 'allow 0 to 3, a sparsity from 0 to 75'),
    (([(2, 2)], [4], 0, [1]), 'from 25 to 100')])
def test_erk_refuses(args, says):
    with pytest.raises(ValueError, match=says): erk_counts(*args)


# LAMP

def naive_lamp(scores):
    "The formula, in fractions"
    flat = [Fraction(x) for x in scores.flatten().tolist()]
    order = sorted(range(len(flat)), key=flat.__getitem__)
    left  = list(accumulate(flat[i]**2 for i in reversed(order)))[::-1]
    out   = [Fraction(0)]*len(flat)
    for i,l in zip(order, left): out[i] = flat[i]**2/l if l else Fraction(0)
    return torch.tensor([float(x) for x in out], dtype=torch.float64).reshape(scores.shape)

def same_order(scores, lamps):
    "Both sort the same way, ties by index; only equal scores may have equal LAMP scores"
    s, l = scores.flatten(), lamps.flatten()
    order = s.argsort(stable=True)
    s, l  = s[order], l[order]
    return torch.equal(order, lamps.flatten().argsort(stable=True)) and bool((
        (l[1:] > l[:-1]) | (s[1:] == s[:-1])).all())

@given(layers_of_scores(least=0))
def test_lamp_is_its_formula(given_scores):
    scores, _ = given_scores
    for s,l in zip(scores, lamp(scores)):
        assert l.dtype == torch.float64 and l.shape == s.shape and same_order(s, l)
        assert torch.allclose(l, naive_lamp(s), rtol=1e-14, atol=0)

@given(st.lists(st.floats(0, allow_nan=False, allow_infinity=False), min_size=1, max_size=30), st.sampled_from(DTYPES))
def test_lamp_keeps_the_order_of_any_numbers(scores, dtype):
    "From the smallest to the largest there are"
    s = torch.tensor(scores, dtype=torch.float64).clamp(max=torch.finfo(dtype).max).to(dtype)
    l = lamp([s])[0]
    assert same_order(s, l) and torch.allclose(l, naive_lamp(s), rtol=1e-13, atol=1e-300)
    assert l.max() == (1 if s.max() > 0 else 0)

@pytest.mark.parametrize('start', [0x3FE0000000000000, 0x3FEFF00000000000, 0x3FF0000000000000 - 20_000])
@pytest.mark.parametrize('largest', [0., 1e9, 1e200])
def test_lamp_keeps_the_order_of_neighbours(start, largest):
    x = torch.cat([torch.arange(40_000).add_(start).view(torch.float64), torch.tensor([largest], dtype=torch.float64)])
    x = x[torch.randperm(len(x), generator=generator(0))]
    assert same_order(x, lamp([x])[0])

@pytest.mark.parametrize('dtype', DTYPES)
def test_lamp_of_many(dtype):
    x = torch.randn(300_000, generator=generator(0)).abs().to(dtype)
    l = lamp([x])[0]
    assert same_order(x, l) and torch.allclose(l, lamp([x.double()])[0], rtol=1e-12)

def test_lamp_by_hand():
    a, b = lamp([torch.tensor([[3., 1.], [2., 0.]]), torch.tensor([5.])])
    assert torch.allclose(a, torch.tensor([[1, 1/14], [4/13, 0]], dtype=torch.float64)) and b.tolist() == [1]
    assert lamp([torch.ones(4)])[0].tolist() == [1/4, 1/3, 1/2, 1]
    assert lamp([torch.zeros(2, 2), torch.empty(0)])[0].tolist() == [[0, 0], [0, 0]]
    assert lamp([torch.empty(0, 3)])[0].shape == (0, 3)

def test_lamp_does_not_see_the_scale_of_a_layer():
    x = torch.rand(1000, generator=generator(0))
    a, *others = lamp([x, x * 2.**-100, x * 2.**100])
    assert all(torch.equal(a, o) for o in others)

def test_with_lamp_no_layer_is_emptied_first():
    "One group stays in each, however small its weights"
    w = [torch.rand(n, generator=generator(n)) * scale for n,scale in ((5, 1e-6), (50, 1.), (500, 1e6))]
    assert drops(keep_masks(lamp(w), 552)) == [4, 49, 499]

@pytest.mark.parametrize('scores, error, says', [
    (torch.tensor([1., -1.]), ValueError, 'at least 0.*got -1'),
    (torch.tensor([1., math.nan]), ValueError, 'NaN or infinite'),
    (torch.tensor([1., math.inf]), ValueError, 'infinite.*layer 1'),
    (torch.tensor([1, 2]), TypeError, 'int64'), ([1., 2.], TypeError, 'list')])
def test_lamp_refuses(scores, error, says):
    with pytest.raises(error, match=says): lamp([torch.ones(2), scores])

def test_lamp_is_that_of_torch_pruning():
    import torch_pruning as tp
    for out,inp,k in ((8, 3, 3), (64, 16, 1), (33, 5, 5)):
        torch.manual_seed(out)
        conv  = nn.Conv2d(inp, out, k, bias=False)
        graph = tp.DependencyGraph().build_dependency(conv, example_inputs=torch.randn(1, inp, 8, 8))
        group = graph.get_pruning_group(conv, tp.prune_conv_out_channels, idxs=list(range(out)))
        theirs = tp.importance.LAMPImportance(p=2, group_reduction='first', normalizer='lamp')(group)
        ours   = lamp([conv.weight.detach().flatten(1).norm(dim=1)])[0]
        assert torch.allclose(ours.float(), theirs, rtol=1e-4)


# A global choice with limits

def naive_bounded(scores, n, lows, highs, pruned):
    "Lows first, then what was dropped and may be, then by score, and never more than highs"
    order = ranked(scores, pruned)
    rank  = {g: sum(1 for o in order[:k] if o[0] == g[0]) for k,g in enumerate(order)}  # within its layer
    gone  = [0 if p is None else int((~p).sum()) for p in pruned or [None]*len(scores)]
    inside = [min(max(g, lo), hi) for g,lo,hi in zip(gone, lows, highs)]
    place  = {(l, i): 0 if rank[l, i] < lows[l] else 3 if rank[l, i] >= highs[l] else 1
              if rank[l, i] < inside[l] and pruned else 2
              for l,i in order}
    value  = {(l, i): scores[l].flatten()[i].item() for l,i in order}
    drop   = set(sorted(order, key=lambda g: (place[g], value[g], g))[:n])
    return [torch.tensor([(l, i) not in drop for i in range(s.numel())]).reshape(s.shape) for l,s in enumerate(scores)]

@settings(max_examples=150)
@given(st.data())
def test_bounded_choice(data):
    scores, pruned = data.draw(layers_of_scores())
    sizes = [s.numel() for s in scores]
    lows, highs = data.draw(bounds(sizes))
    n = data.draw(st.integers(sum(lows), sum(highs)))
    before = [s.clone() for s in scores], pruned and [p if p is None else p.clone() for p in pruned]
    new, old = bounded(scores, lows, highs, pruned)
    masks = keep_masks(new, n, pruned=old)
    counts = drops(masks)
    assert sum(counts) == n and all(lo <= k <= hi for lo,k,hi in zip(lows, counts, highs))
    assert all(torch.equal(m, w) for m,w in zip(masks, naive_bounded(scores, n, lows, highs, pruned)))
    assert all(a.dtype == b.dtype for a,b in zip(new, scores))
    assert all(torch.equal(a, b) for a,b in zip(scores, before[0]))
    assert pruned is None or all(a is b or torch.equal(a, b) for a,b in zip(pruned, before[1]))

@given(st.data())
def test_without_limits_nothing_changes(data):
    scores, pruned = data.draw(layers_of_scores())
    sizes = [s.numel() for s in scores]
    new, old = bounded(scores, [0]*len(sizes), sizes, pruned)
    assert all(torch.equal(a, b) and a.data_ptr() == b.data_ptr() for a,b in zip(new, scores))
    assert all(a is b for a,b in zip(old, pruned or [None]*len(sizes)))

def test_pruned_stays_pruned_inside_limits():
    "Up in steps, scores moving in between"
    lows, highs, old = [10, 0, 30], [50, 45, 100], None
    gone = [torch.zeros(100, dtype=torch.bool) for _ in range(3)]
    for n in (40, 77, 100, 150, 195):
        scores = [torch.randn(100, generator=generator(n + i)) * (i + 1) for i in range(3)]
        new, inside = bounded(scores, lows, highs, old)
        old = keep_masks(new, n, pruned=inside)
        assert not any((g & m).any() for g,m in zip(gone, old))
        assert sum(drops(old)) == n and all(lo <= k <= hi for lo,k,hi in zip(lows, drops(old), highs))
        gone = [~m for m in old]
    assert drops(old) == highs

def test_limits_bring_back_the_best():
    "Four were dropped where three may be: of those the best comes back"
    old = [torch.tensor([False, False, False, False, True]), None]
    scores = [torch.tensor([3., 1., 4., 2., 0.]), torch.tensor([5., 6.])]
    new, inside = bounded(scores, [0, 1], [3, 2], old)
    assert inside[0].tolist() == [False, False, True, False, True] and inside[1].tolist() == [False, True]
    assert [m.tolist() for m in keep_masks(new, 4, pruned=inside)] == [[False, False, True, False, True], [False, True]]
    assert [m.tolist() for m in keep_masks(new, 3, pruned=inside)] == [[True, False, True, False, True], [False, True]]

@pytest.mark.parametrize('args, error, says', [
    (([torch.tensor([1., math.inf])], [0], [1]), ValueError, 'NaN or infinite'),
    (([torch.ones(2)], [2], [1]), ValueError, '0 ≤ low ≤ high ≤ 2'),
    (([torch.ones(2)], [0], [3]), ValueError, 'got 0 and 3'),
    (([torch.ones(2)], [0.5], [1]), TypeError, 'integer'),
    (([torch.ones(2)], [0], [1], [torch.ones(2)]), ValueError, 'bool mask'),
    (([torch.ones(2)], [0], [1], []), ValueError, 'one earlier mask'),
    (([torch.ones(2)], [0, 0], [1]), ValueError, 'one low and one high')])
def test_bounded_refuses(args, error, says):
    with pytest.raises(error, match=says): bounded(*args)


# What it costs

cost = st.one_of(st.integers(0, 5), st.integers(10**17, 10**19), st.floats(0, 1e6), st.fractions(0, 10))

@settings(max_examples=200)
@given(st.data())
def test_affordable_is_exact(data):
    scores, pruned = data.draw(layers_of_scores())
    costs  = [data.draw(cost) for _ in scores]
    spent  = list(accumulate((Fraction(costs[l]) for l,_ in ranked(scores, pruned)), initial=Fraction(0)))
    at     = data.draw(st.sampled_from(spent))
    for budget in {at, max(at - Fraction(1, 10**9), Fraction(0)), at + Fraction(1, 10**9),
                   *([int(at)] if at == int(at) else [])}:
        n = affordable(scores, costs, budget, pruned)
        assert n == max(k for k,s in enumerate(spent) if s <= budget)

@given(st.data())
def test_what_is_afforded_is_what_goes(data):
    "The masks with that many groups cost no more than the budget, and one more would"
    scores, pruned = data.draw(layers_of_scores())
    costs  = [data.draw(st.integers(1, 20)) for _ in scores]
    budget = data.draw(st.integers(0, 200))
    n = affordable(scores, costs, budget, pruned)
    def price(n): return sum(c*k for c,k in zip(costs, drops(keep_masks(scores, n, pruned=pruned))))
    assert price(n) <= budget and (n == sum(s.numel() for s in scores) or price(n + 1) > budget)

def test_affordable_beyond_floats():
    "2⁵³ + 1 is no float64: one more than the budget must be seen"
    scores = [torch.tensor([0.]), torch.arange(1., 4.)]
    assert [affordable(scores, [2**53, 1], 2**53 + k) for k in (-1, 0, 1, 2, 3, 4)] == [0, 1, 2, 3, 4, 4]
    assert affordable([torch.arange(300_000.)], [10**15], 123_456*10**15) == 123_456

def test_affordable_by_hand():
    scores = [torch.tensor([1., 4]), torch.tensor([2., 3])]
    assert [affordable(scores, [100, 10], b) for b in (0, 99, 100, 119, 120, 219, 220)] == [0, 0, 1, 2, 3, 3, 4]
    assert affordable([torch.ones(2), torch.ones(2)], [1, 5], 6) == 2 + 0
    assert affordable([torch.ones(2), torch.ones(2)], [1, 5], 7) == 3
    assert affordable(scores, [0, 1], 0) == 1  # the 1 is free, the 2 is not
    assert affordable([], [], 5) == 0

@pytest.mark.parametrize('args, error, says', [
    (([torch.ones(2)], [-1], 5), ValueError, r'`costs\[0\]`.*at least 0'),
    (([torch.ones(2)], [1], math.inf), ValueError, '`budget`.*finite'),
    (([torch.ones(2)], [1], -1), ValueError, '`budget`'),
    (([torch.ones(2)], [1], '5'), TypeError, '`budget` must be a number'),
    (([torch.ones(2)], [math.nan], 5), TypeError, 'costs'),
    (([torch.ones(2)], [1, 2], 5), ValueError, 'one cost for each of 1'),
    (([torch.tensor([math.nan])], [1], 5), ValueError, 'NaN'),
    (([torch.ones(2)], [1], 5, [torch.ones(3) > 0]), ValueError, 'bool mask')])
def test_affordable_refuses(args, error, says):
    with pytest.raises(error, match=says): affordable(*args)


# Output by output

@settings(max_examples=200)
@given(st.data())
def test_rows_are_masked_as_if_alone(data):
    shape, seed = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)), data.draw(seeds)
    dtype, axis = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(-len(shape), len(shape) - 1))
    scores = torch.randint(-2, 3, shape, generator=generator(seed)).to(dtype)
    pruned = data.draw(st.sampled_from([None, torch.rand(shape, generator=generator(seed)) > 0.5]))
    n = data.draw(st.integers(0, scores.numel()//scores.shape[axis]))
    mask = row_mask(scores, n, pruned, axis)
    assert mask.shape == scores.shape and mask.dtype == torch.bool and mask.is_contiguous()
    for i in range(scores.shape[axis]):
        row, old = scores.select(axis, i), None if pruned is None else pruned.select(axis, i)
        want = naive_keep(row, n) if old is None else keep_mask(row.contiguous(), n, pruned=old.contiguous())
        assert torch.equal(mask.select(axis, i), want)

def test_rows_by_hand():
    w = torch.tensor([[4., 1, 3, 2], [0.1, 0.4, 0.4, 0.4]])
    assert row_mask(w, 2).int().tolist() == [[1, 0, 1, 0], [0, 0, 1, 1]]
    old = torch.tensor([[False, False, True, True], [True, True, True, True]])
    assert row_mask(w, 3, old).int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]
    assert row_mask(w, 1, old).int().tolist() == [[1, 0, 1, 1], [0, 1, 1, 1]]  # down: the 4 comes back
    assert row_mask(w, 0, old).all() and not row_mask(w, 4).any() and row_mask(torch.empty(0, 3), 2).shape == (0, 3)

@pytest.mark.parametrize('args, error, says', [
    ((torch.tensor([[1., math.nan]]), 1), ValueError, 'NaN'),
    ((torch.ones(2, 3), 4), ValueError, 'from 0 to 3'),
    ((torch.ones(2, 3), -1), ValueError, 'from 0 to 3'),
    ((torch.ones(2, 3), 1.5), TypeError, 'integer'),
    ((torch.ones(2, 3), 1, torch.ones(3, 2) > 0), ValueError, 'bool mask'),
    ((torch.ones(2, 3), 1, None, 2), IndexError, 'range')])
def test_rows_refuse(args, error, says):
    with pytest.raises(error, match=says): row_mask(*args)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_on_a_gpu_as_on_the_cpu():
    scores = [torch.randint(0, 50, (n,), generator=generator(n)).float() for n in (10, 1000, 50_000)]
    pruned, there = [s > 3 for s in scores], [s.cuda() for s in scores]
    for a,b in zip(lamp(scores), lamp(there)): assert torch.allclose(a, b.cpu(), rtol=1e-12) and same_order(a, b.cpu())
    a = bounded(scores, [5, 0, 10], [9, 500, 50_000], pruned)
    b = bounded(there, [5, 0, 10], [9, 500, 50_000], [p.cuda() for p in pruned])
    assert all(torch.equal(x, y.cpu()) for x,y in zip([*a[0], *a[1]], [*b[0], *b[1]]))
    assert affordable(scores, [3, 2, 1], 20_000, pruned) == affordable(there, [3, 2, 1], 20_000,
                                                                       [p.cuda() for p in pruned])
    assert torch.equal(row_mask(scores[1].reshape(10, -1), 7), row_mask(there[1].reshape(10, -1), 7).cpu())
