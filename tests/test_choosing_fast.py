"Choices without sorting, each against one that sorts everything"
from itertools import product
import pytest, torch, torch.nn as nn
from fasterai_clone.core.lamp import lamp_counts
from fasterai_clone.core.lazy import LazyScores
from fasterai_clone.core.selection import keep_masks
from fasterai_clone.sparse.all import Sparsifier
from fasterai_clone.sparse.budget import lamp, row_mask
from fasterai_clone.sparse.plan import is_best

def values(n, kind, seed):
    "Weights with few or many ties"
    g = torch.Generator().manual_seed(seed)
    t = torch.randn(n, generator=g)
    return {'normal': t, 'half': t.bfloat16(), 'coarse': (2*t).round(), 'constant': torch.ones(n), 'zeros': t*0,
            'heavy': t**5}[kind]

KINDS = 'normal half coarse constant zeros heavy'.split()

@pytest.mark.parametrize('seed', range(6))
def test_lamp_counts_are_those_of_lamp(seed):
    "Numbers from a sort of everything, whatever the ties, sizes and earlier masks"
    kinds = KINDS[seed:] + KINDS[:seed]
    layers = [values(n, k, seed + i) for i,(n,k) in enumerate(zip((1, 700, 30_000, 9, 20_000), kinds))]
    total = sum(map(len, layers))
    old = [torch.rand(len(t), generator=torch.Generator().manual_seed(i)) > .2 if i % 2 else None
           for i,t in enumerate(layers)]
    scores = lamp([t.float().abs() for t in layers])
    for n,was in product((0, 1, total//20, total//2, total*9//10, total - 1, total), ([None]*5, old)):
        masks = keep_masks(scores, n, pruned=was)
        assert lamp_counts(layers, n, True, was) == [int((~m).sum()) for m in masks]

def test_lamp_masks_of_a_model():
    "The public call, in one go and in two, against masks from scores in memory"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 100), nn.Linear(100, 20))
    sp, ws = Sparsifier(net, context='lamp', layer_type=nn.Linear), [net[i].weight.detach().clone() for i in range(3)]
    old = None
    for s in (60, 93):
        sp.sparsify_model(s)
        n   = sum(w.numel() for w in ws) * s // 100
        old = keep_masks(lamp([w.abs() if old is None else (w*m).abs() for w,m in zip(ws, old or ws)]), n, pruned=old)
        assert all(torch.equal(sp.masks[f'{i}.weight'], m) for i,m in enumerate(old))

def naive_rows(scores, n, old):
    kept = torch.ones_like(scores, dtype=torch.bool) if old is None else old
    mask = torch.ones_like(kept)
    for r,(row,k) in enumerate(zip(scores.tolist(), kept.tolist())):
        for i in sorted(range(len(row)), key=lambda i: (k[i], row[i], i))[:n]: mask[r, i] = False
    return mask

@pytest.mark.parametrize('kind', KINDS)
def test_rows_against_a_sort_of_each(kind):
    "With earlier masks from which elements have to come back, too"
    scores = values(40*37, kind, 1).reshape(40, 37)
    old = torch.rand(40, 37, generator=torch.Generator().manual_seed(2)) > .3
    for n,was in product((0, 1, 5, 20, 36, 37), (None, old)):
        assert torch.equal(row_mask(scores, n, was), naive_rows(scores, n, was))

@pytest.mark.parametrize('nm', [(1, 2), (2, 4), (3, 7), (1, 16), (5, 20)])
def test_blocks_against_a_sort_of_each(nm):
    n, m = nm
    for kind,axis in product(KINDS, (0, 1)):
        s = values(m*3*m*2, kind, 3).reshape(m*3, m*2)
        blocks = s.movedim(axis, -1).unflatten(-1, (-1, m))
        want = torch.zeros_like(blocks, dtype=torch.bool)
        want.scatter_(-1, blocks.sort(dim=-1, stable=True).indices[..., m-n:], True)
        assert torch.equal(is_best(s, axis, nm), want.flatten(-2).movedim(-1, axis))

def test_references_that_repeat():
    "Pieces of scores whose reference is one row for all outputs"
    w, ref = torch.randn(700, 301), torch.rand(1, 301)
    lazy, want = LazyScores(torch.mul, w, ref).flat(), (w*ref).flatten()
    for where in (slice(None), slice(100, 5000), slice(7, None, 301*3 + 1), torch.tensor([5, 3, 200_000])):
        assert torch.equal(lazy[where], want[where])

def sorted_rows(scores, n, old):
    "The mask from a stable sort of each row, what was dropped before first"
    order = scores.argsort(dim=1, stable=True)
    if old is not None: order = order.gather(1, old.gather(1, order).byte().argsort(dim=1, stable=True))
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :n], False)

@pytest.mark.parametrize('kind', KINDS)
def test_wide_rows_against_a_sort_of_each(kind):
    "Rows that are ranked by counts: signed scores, magnitudes, formulas, earlier masks with more and with fewer zeros"
    w, ref = values(50*1400, kind, 4).reshape(50, 1400), torch.rand(1, 1400) + .5
    g = torch.Generator().manual_seed(5)
    for n,share in product((0, 1, 700, 1399, 1400), (None, .2, .9)):
        old = None if share is None else torch.rand(50, 1400, generator=g) > share
        assert torch.equal(row_mask(w, n, old), sorted_rows(w.float(), n, old))
        assert torch.equal(row_mask(w, n, old, magnitude=True), sorted_rows(w.float().abs(), n, old))
        lazy = LazyScores(torch.mul, w, ref)
        assert torch.equal(row_mask(lazy, n, old), sorted_rows(w.float()*ref, n, old))

def test_rows_with_zeros_of_both_signs_and_infinite_ends():
    "−0 and 0 are equal, so the first goes; nothing is below −inf, not even what was dropped before and stays"
    row = torch.linspace(1, 2, 1400).repeat(50, 1)
    row[:, [3, 5, 7, 9]] = torch.tensor([0., -0., -torch.inf, torch.inf])
    assert (~row_mask(row, 2)).nonzero()[:2].tolist() == [[0, 3], [0, 7]]
    assert (~row_mask(row, 3)).nonzero()[:3].tolist() == [[0, 3], [0, 5], [0, 7]]
    old = torch.ones_like(row, dtype=torch.bool)
    old[:, 9] = False
    assert (~row_mask(row, 2, old)).nonzero()[:2].tolist() == [[0, 7], [0, 9]]
    for bad in (torch.nan, torch.inf):
        row[1, 1] = bad
        with pytest.raises(ValueError, match='NaN or infinite'): row_mask(row, 2, magnitude=True)
    row[1, 1] = torch.nan
    with pytest.raises(ValueError, match='NaN'): row_mask(row, 2)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_number_for_each_output_in_every_precision(dtype):
    "The public call, twice, against a sort of each row"
    torch.manual_seed(0)
    net = nn.Linear(1200, 60, bias=False).to(dtype)
    sp, was, old = Sparsifier(net, context='output', layer_type=nn.Linear), net.weight.detach().clone(), None
    for s in (50, 90):
        sp.sparsify_model(s)
        old = sorted_rows((was.abs() if old is None else (was*old).abs()).double(), 1200*s//100, old)
        assert torch.equal(sp.masks['weight'], old)
    sp = Sparsifier(nn.Sequential(net), context='output', layer_type=nn.Linear)
    was[0, 0] = torch.nan
    net.weight.data = was
    with pytest.raises(ValueError, match='0.weight'): sp.sparsify_model(9)

def test_blocks_of_formulas_and_earlier_masks():
    "Some rows at a time, with weights that were dropped before: the best of the others stay"
    w, ref = values(600*800, 'half', 6).reshape(600, 800), torch.rand(1, 800)
    old = torch.rand(600, 800) > .2
    for mask in (None, old):
        s = w.float()*ref if mask is None else (w.float()*ref).masked_fill(~mask, -torch.inf)
        assert torch.equal(is_best(LazyScores(torch.mul, w, ref), 1, (2, 4), mask), is_best(s, 1, (2, 4)))
