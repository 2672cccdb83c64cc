"Law 1: exactly floor(s·n/100) groups go, the lowest first, ties by index, whatever the dtype or the scale"
import math
from fractions import Fraction

import numpy as np, pytest, torch, torch.nn as nn
from hypothesis import given, settings, strategies as st

from fasterai_clone.core.all import *
from fasterai_clone.sparse.sparsifier import Sparsifier
from helpers import exact, naive_keep

SPARSITIES = [0, 1, 29, 57.5, 90, 99.9, 100]
FILLS = dict(
    normal   = lambda n: torch.randn(n, generator=torch.Generator().manual_seed(n)),
    constant = lambda n: torch.full((n,), -0.37),
    signs    = lambda n: (torch.arange(n) * 7 % 3 - 1).sign().masked_fill(torch.arange(n) * 7 % 3 == 1, 1.).float(),
    ties     = lambda n: ((torch.arange(n) * 37 % 11) - 5.5).float(),
    rising   = lambda n: torch.arange(1, n+1).float() / n,
    falling  = lambda n: -torch.arange(n, 0, -1).float() / n)
SCALES = {torch.float64: (1e-9, 1, 1e9), torch.float32: (1e-9, 1, 1e9), torch.bfloat16: (1e-9, 1, 1e9),
          torch.float16: (1e-3, 1, 1e3)}  # of fp16's range

def linears(*sizes, fill='normal', scale=1., dtype=torch.float32):
    "Layers without bias, with these many weights"
    net = nn.Sequential(*[nn.Linear(n, 1, bias=False) for n in sizes])
    for m in net: m.weight.data = (FILLS[fill](m.weight.numel()) * scale).reshape(m.weight.shape).to(dtype)
    return net

def masks_of(sp):
    return [sp.masks[t.name] if t.name in sp.masks else torch.ones_like(t.weight, dtype=torch.bool) for t in sp.targets]

def check_local(net, sparsity):
    before, sp = [m.weight.detach().clone() for m in net], Sparsifier(net, layer_type=nn.Linear)
    sp.sparsify_model(sparsity)
    for w,m,mask in zip(before, net, masks_of(sp)):
        keep = naive_keep(w.abs(), exact(w.numel(), sparsity))
        assert torch.equal(mask, keep) and mask.dtype == torch.bool
        assert torch.equal(m.weight, torch.where(keep, w, 0))
        assert int((m.weight == 0).sum()) == exact(w.numel(), sparsity)

def check_global(net, sparsity):
    before, sp = [m.weight.detach().clone() for m in net], Sparsifier(net, context='global', layer_type=nn.Linear)
    sp.sparsify_model(sparsity)
    all_w = torch.cat([w.flatten() for w in before])
    keep  = naive_keep(all_w.abs(), exact(all_w.numel(), sparsity))
    assert torch.equal(torch.cat([m.flatten() for m in masks_of(sp)]), keep)
    assert torch.equal(torch.cat([m.weight.flatten() for m in net]), torch.where(keep, all_w, 0))


# Through `Sparsifier`, against Python's stable sort

@pytest.mark.parametrize('sparsity', SPARSITIES)
@pytest.mark.parametrize('dtype', SCALES)
@pytest.mark.parametrize('fill', FILLS)
@pytest.mark.parametrize('check', [check_local, check_global])
def test_bit_for_bit(check, fill, dtype, sparsity):
    for scale in SCALES[dtype]: check(linears(1, 2, 100, 1000, 777, fill=fill, scale=scale, dtype=dtype), sparsity)

@pytest.mark.parametrize('sparsity, zeros', [(0, 0), (1, 1), (29, 29), (57.5, 57), (90, 90), (99.9, 99), (100, 100),
                                             (58, 58), (57, 57),
                                             (7, 7), (55.00000001, 55)])
@pytest.mark.parametrize('fill', FILLS)
def test_of_a_hundred(fill, sparsity, zeros):
    net = linears(100, fill=fill)
    Sparsifier(net, layer_type=nn.Linear).sparsify_model(sparsity)
    assert int((net[0].weight == 0).sum()) == zeros

@pytest.mark.parametrize('sparsity, zeros', [(0, 0), (90, 0), (99.9, 0), (100, 1)])
def test_of_one(sparsity, zeros):
    net = linears(1, 1)
    Sparsifier(net, layer_type=nn.Linear).sparsify_model(sparsity)
    assert [int((m.weight == 0).sum()) for m in net] == [zeros]*2

def test_subnormal_weights_are_numbers_too():
    w = torch.tensor([4e-40, -1e-40, 3e-40, -2e-40, 1e-45])
    net = linears(5)
    net[0].weight.data = w[None].clone()
    sp = Sparsifier(net, layer_type=nn.Linear)
    sp.sparsify_model(60)
    assert masks_of(sp)[0].tolist() == [[True, False, True, False, False]]

def test_fp64_is_not_rounded():
    net = linears(4, dtype=torch.float64)
    net[0].weight.data = torch.tensor([[1 + 3e-12, 1 + 1e-12, 1 + 2e-12, -1]], dtype=torch.float64)
    sp = Sparsifier(net, layer_type=nn.Linear)
    sp.sparsify_model(50)
    assert masks_of(sp)[0].tolist() == [[True, False, True, False]]

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('fill', ['normal', 'constant', 'ties'])
def test_twenty_million_weights(fill, dtype):
    net, n = linears(20_000_000, fill=fill, dtype=dtype), 20_000_000
    keys, sp = net[0].weight.detach().abs().float().flatten().numpy(), Sparsifier(net, layer_type=nn.Linear)
    sp.sparsify_model(99.9)
    keep = np.ones(n, dtype=bool)
    k    = exact(n, 99.9)
    edge = np.partition(keys, k)[k]  # lower ones go, and the first of those that equal it
    keep[keys < edge] = False
    keep[np.flatnonzero(keys == edge)[:k - int((keys < edge).sum())]] = False
    assert k == 19_980_000 and int((net[0].weight == 0).sum()) == k
    assert np.array_equal(masks_of(sp)[0].flatten().numpy(), keep)

def test_many_layers_globally():
    net = linears(*range(1, 80), fill='ties')
    check_global(net, 33.3)

@pytest.mark.parametrize('criteria, keep', [('large_final', [False, True, False, True]),
                                            ('small_final', [True, False, True, False])])
def test_higher_score_stays(criteria, keep):
    net = linears(4)
    net[0].weight.data = torch.tensor([[0.1, -0.4, 0.2, 0.3]])
    sp = Sparsifier(net, criteria=criteria, layer_type=nn.Linear)
    sp.sparsify_model(50)
    assert masks_of(sp)[0].tolist() == [keep]

def test_global_small_final_compares_layers_as_they_are():
    net = linears(2, 2)
    net[0].weight.data, net[1].weight.data = torch.tensor([[1., 2.]]), torch.tensor([[30., 40.]])
    Sparsifier(net, context='global', criteria='small_final', layer_type=nn.Linear).sparsify_model(50)
    assert net[0].weight.tolist() == [[1, 2]] and net[1].weight.tolist() == [[0, 0]]

def test_rounding_to_a_multiple():
    net = linears(100, 30, fill='rising')
    Sparsifier(net, layer_type=nn.Linear).sparsify_model(57.5, round_to=8)
    assert [int((m.weight != 0).sum()) for m in net] == [48, 16]  # 43 and 13 stay, rounded up

def test_one_layer_leaves_the_others():
    net = linears(100, 100)
    sp = Sparsifier(net, context='global', layer_type=nn.Linear)
    sp.sparsify_layer(net[1], 29)
    assert [int((m.weight == 0).sum()) for m in net] == [0, 29]
    sp.sparsify_layer('0', 31)
    assert [int((m.weight == 0).sum()) for m in net] == [31, 29]

def test_repeated_is_the_same():
    net = linears(1000, fill='ties')
    sp = Sparsifier(net, layer_type=nn.Linear)
    sp.sparsify_model(57.5)
    first = masks_of(sp)[0].clone()
    sp.sparsify_model(57.5)
    assert torch.equal(first, masks_of(sp)[0])

def test_up_and_down_nested():
    net = linears(1000)
    sp, kept = Sparsifier(net, layer_type=nn.Linear), {}
    for s in (20, 50, 90, 50, 20, 0):
        sp.sparsify_model(s)
        now = masks_of(sp)[0].clone()
        assert int((~now).sum()) == 10*s
        kept.setdefault('last', now)
        assert not (kept['last'] & ~now).any() or not (now & ~kept['last']).any()  # one contains the other
        kept['last'] = now

@pytest.mark.parametrize('granularity', ['filter', 'row', 'column', 'kernel'])
@pytest.mark.parametrize('sparsity', SPARSITIES)
def test_groups_are_counted_exactly(granularity, sparsity):
    conv = nn.Conv2d(5, 20, 3)
    sp = Sparsifier(conv, granularity)
    sp.sparsify_model(sparsity)
    row = sp.report().rows[0]
    assert row.zero_groups == exact(row.groups, sparsity) and row.zeros == row.zero_groups * (300*3 // row.groups)


# The kernel itself

numbers  = st.sampled_from([0., 0.5, 1., 1.5, 2., -1., -2., 1e-9, 1e9, 3.25, 1e-40])
scores   = st.lists(st.one_of(numbers, st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=80)
percents = st.one_of(st.sampled_from(SPARSITIES), st.integers(1, 100), st.decimals(1, 100, places=3).map(float))

@given(scores, st.data())
def test_keep_mask_is_the_stable_sort(values, data):
    t, k = torch.tensor(values), data.draw(st.integers(0, len(values)))
    mask = keep_mask(t, k)
    assert torch.equal(mask, naive_keep(t, k)) and mask.dtype == torch.bool
    assert torch.equal(keep_mask(t, k, magnitude=True), naive_keep(t.abs(), k))

@given(st.lists(scores, min_size=1, max_size=5), st.data())
def test_keep_masks_compete_over_all_tensors(lists, data):
    ts = [torch.tensor(l) for l in lists]
    k  = data.draw(st.integers(0, sum(map(len, lists))))
    assert torch.equal(torch.cat(keep_masks(ts, k)), naive_keep(torch.cat(ts), k))

@given(scores, st.data())
def test_survivors_are_worth_more(values, data):
    t, k = torch.tensor(values), data.draw(st.integers(0, len(values)))
    mask = keep_mask(t, k)
    assert int((~mask).sum()) == k
    if 0 < k < len(values):
        low, high = t[mask].min(), t[~mask].max()
        assert low >= high
        # ties by index
        if low == high: assert (~mask & (t == low)).nonzero().max() < (mask & (t == low)).nonzero().min()

@given(scores, scores, st.data())
def test_pruned_stays_pruned_upwards_and_kept_stays_kept_downwards(values, others, data):
    n  = min(len(values), len(others))
    # `pruned` is the mask so far: True is kept
    a, b = sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))
    first, now = torch.tensor(values[:n]), torch.tensor(others[:n])  # training has changed the scores in between
    low  = keep_mask(first, a)
    high = keep_mask(now, b, pruned=low)
    assert int((~high).sum()) == b and not (high & ~low).any()
    again = keep_mask(first, a, pruned=high)
    assert int((~again).sum()) == a and not (high & ~again).any()

@given(scores, percents)
@settings(max_examples=50)
def test_sparsifier_counts(values, sparsity):
    net = nn.Linear(len(values), 1, bias=False)
    net.weight.data = torch.tensor([values])
    sp = Sparsifier(net, layer_type=nn.Linear)
    sp.sparsify_model(sparsity)
    assert torch.equal(sp.masks['weight'][0], naive_keep(torch.tensor(values).abs(), exact(len(values), sparsity)))

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('magnitude', [False, True])
def test_kernel_over_dtypes(dtype, magnitude):
    t = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    for k in (0, 1, 999, 1000, 1999, 2000):
        mask = keep_mask(t, k, magnitude=magnitude)
        assert torch.equal(mask, naive_keep(t.abs() if magnitude else t, k)) and mask.shape == t.shape

def test_kernel_takes_what_is_not_contiguous():
    t = torch.arange(24.).reshape(4, 6).t()
    assert torch.equal(keep_mask(t, 7), naive_keep(t, 7)) and torch.equal(keep_mask(t[::2], 5), naive_keep(t[::2], 5))

def test_infinite_scores_are_last_or_first():
    t = torch.tensor([math.inf, 1., -math.inf, math.inf, 2.])
    assert keep_mask(t, 1).tolist() == [True, True, False, True, True]
    assert keep_mask(t, 4).tolist() == [False, False, False, True, False]

def test_minus_zero_ties_with_zero():
    assert keep_mask(torch.tensor([0., -0., 0., -0.]), 2).tolist() == [False, False, True, True]

@pytest.mark.parametrize('bad', [[math.nan, 1, 2]])
@pytest.mark.parametrize('magnitude', [False, True])
def test_nan_is_refused(bad, magnitude):
    with pytest.raises(ValueError, match='NaN'): keep_mask(torch.tensor(bad), 1, magnitude=magnitude)

def test_infinite_weights_are_refused():
    with pytest.raises(ValueError, match='infinite'): keep_mask(torch.tensor([1., math.inf]), 1, magnitude=True)

def test_out_is_filled_and_scores_are_untouched():
    ts = [torch.randn(7, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    copies, out = [t.clone() for t in ts], [torch.zeros(7, dtype=torch.bool) for _ in ts]
    res = keep_masks(ts, 10, magnitude=True, out=out)
    assert all(r is o for r,o in zip(res, out)) and torch.equal(torch.cat(out), naive_keep(torch.cat(ts).abs(), 10))
    assert all(torch.equal(t, c) for t,c in zip(ts, copies))

def test_masks_do_not_share_memory():
    a, b = keep_masks([torch.arange(3.), torch.arange(3.)], 2)
    a.zero_()
    assert b.tolist() == [False, True, True]


# Counting

@given(st.integers(1, 30_000_000), st.decimals(1, 100, places=3))
@settings(max_examples=500)
def test_n_dropped_is_exact_arithmetic(n, s): assert n_dropped(n, float(s)) == math.floor(Fraction(s) * n / 100)

@pytest.mark.parametrize('n, s, k', [(100, 29, 29), (100, 57, 57), (100, 58, 58), (1000, 99.9, 999), (1000, 57.5, 575),
                                     (9408, 90, 8467),
                                     (1, 99.9, 0), (1, 100, 1), (0, 50, 0), (3, 100/3, 1),
                                     (20_000_000, 99.9, 19_980_000), (7, 100, 7), (10, 30.000000000000004, 3),
                                     (10, 29.999999999999996, 3),
                                     (9, 200/3, 6)])
def test_n_dropped_by_hand(n, s, k): assert n_dropped(n, s) == k

@pytest.mark.parametrize('ok', [0, 1, 57.5, 100, np.float32(90), np.int64(90), Fraction(181, 2)])
def test_percentages(ok): assert check_sparsity(ok) == float(ok) and type(check_sparsity(ok)) is float

@pytest.mark.parametrize('bad, error, says', [
    (-1, ValueError, '-1'), (100.5, ValueError, '100.5'), (math.nan, ValueError, 'nan'), (math.inf, ValueError, 'inf'),
    (0.9, ValueError, 'write 90'), (0.29, ValueError, 'write 29'),
    (True, TypeError, 'True'), (np.bool_(True), TypeError, 'True'), ('90', TypeError, "'90'"),
    (None, TypeError, 'None'),
    (torch.tensor(90), TypeError, 'tensor'), (1+2j, TypeError, '2j')])
def test_what_is_no_percentage(bad, error, says):
    with pytest.raises(error, match=says) as e: check_sparsity(bad, 'start')
    assert '`start`' in str(e.value) and 'percentage' in str(e.value)

@pytest.mark.parametrize('criteria', ['large_final', 'small_final', 'movement'])
@pytest.mark.parametrize('granularity', ['weight', 'row'])
@pytest.mark.parametrize('context', ['global', 'erk'])
def test_multiples_where_layers_share_a_sparsity(context, granularity, criteria):
    "Each layer keeps a multiple of 8 groups, less than 8 more than without; what is dropped stays so on the way up"
    net, gone = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 64)), {}
    sp = Sparsifier(net, granularity, context, criteria, layer_type=nn.Linear)
    for sparsity in (10, 45, 80):
        with torch.no_grad():
            for p in net.parameters(): p.add_(torch.randn_like(p))
        sp.apply_masks()
        sp.sparsify_model(sparsity, round_to=8)
        kept = [t.groups.n - int((~sp.found.group_mask(t)).sum()) for t in sp.targets]
        least = sum(sp.sizes) - exact(sum(sp.sizes), sparsity)
        assert all(k % 8 == 0 for k in kept) and least <= sum(kept) < least + 16
        assert not any((sp.masks[k] & m).any() for k,m in gone.items())
        gone = {k: ~m for k,m in sp.masks.items()}
