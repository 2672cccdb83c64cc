"The selection kernel, every path of it, against a stable sort"
import numpy as np, pytest, torch, warnings
from torch import nn
from hypothesis import HealthCheck, given, settings, strategies as st
import fasterai_clone.core.criteria as criteria
import fasterai_clone.core.bracket as bracket, fasterai_clone.core.keys as keys
import fasterai_clone.core.masks as masks, fasterai_clone.core.tensors as numbers
import fasterai_clone.core.selection as selection, fasterai_clone.core.threads as threads
from fasterai_clone.sparse.measure import as_criteria, available_criterias
from fasterai_clone.core.selection import keep_mask, keep_masks
from fasterai_clone.core.lazy import LazyScores
from fasterai_clone.core.selection import select_torch
from fasterai_clone.sparse.sparsifier import Sparsifier
from helpers import naive_keep

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def reference_masks(tensors, n_drop, magnitude=False, pruned=None):
    "Naive: concatenate, stable ascending argsort; earlier masks first by a second stable sort"
    pruned = pruned or [None] * len(tensors)
    flat = torch.cat([t.detach().reshape(-1) for t in tensors]) if tensors else torch.empty(0)
    key = flat.abs() if magnitude else flat
    old = torch.cat([torch.ones(t.numel(), dtype=torch.bool) if p is None else p.reshape(-1)
                     for t, p in zip(tensors, pruned)])
    order = torch.argsort(key, stable=True)
    order = order[torch.argsort(old[order].to(torch.int8), stable=True)]  # what was dropped goes first
    keep = torch.ones(flat.numel(), dtype=torch.bool)
    keep[order[:n_drop]] = False
    return [k.view(t.shape) for k, t in zip(keep.split([t.numel() for t in tensors]), tensors)]


def check(tensors, n_drop, magnitude=False, pruned=None, sampler=None, alias=False, torch_path=True):
    "Numpy and torch paths against the reference; returns the masks"
    want = reference_masks(tensors, n_drop, magnitude, pruned)
    assert sum(int((~w).sum()) for w in want) == n_drop
    given_masks = None if pruned is None else [None if p is None else p.clone() for p in pruned]
    out = None
    if alias:
        pairs = zip(tensors, given_masks or [None] * len(tensors))
        out = [torch.empty(t.shape, dtype=torch.bool) if p is None else p for t, p in pairs]
    got = keep_masks(tensors, n_drop, magnitude, given_masks, out, sampler)
    assert all(torch.equal(g, w) for g, w in zip(got, want)), 'numpy path'
    if alias: assert all(g is o for g, o in zip(got, out))
    elif pruned is not None:
        assert all(g is None or torch.equal(g, p) for g, p in zip(given_masks, pruned)), 'pruned was written'
    if torch_path and sum(t.numel() for t in tensors):
        fresh = [torch.empty(t.shape, dtype=torch.bool) for t in tensors]
        fresh = select_torch(tensors, n_drop, magnitude, pruned or [None] * len(tensors), fresh,
                             sampler or bracket.strided)
        assert all(torch.equal(g, w) for g, w in zip(fresh, want)), 'torch path'
    return got


# samplers that never show the truth
def absolute(flat): return np.abs(flat) if isinstance(flat, np.ndarray) else flat[:].float().abs().numpy()
def top(flat, step): return np.argsort(absolute(flat))[-3:].copy()
def bottom(flat, step): return np.argsort(absolute(flat))[:3].copy()
def one(flat, step): return slice(0, 1)
def nothing(flat, step): return slice(0, 0)
def head(flat, step): return slice(0, max(1, len(flat) // 7))
def coarse(flat, step): return slice(0, None, 11)
SAMPLERS = [None, top, bottom, one, nothing, head, coarse]


@pytest.fixture(params=['usual', 'tiny'])
def limits(request, monkeypatch):
    "'tiny': small chunks, samples and caps, so that small tensors take every path"
    if request.param == 'tiny': tiny(monkeypatch)


def tiny(monkeypatch):
    monkeypatch.setattr(keys, 'CHUNK', 64)
    monkeypatch.setattr(bracket, '_WHOLE', 32)
    monkeypatch.setattr(selection, '_SMALL', 0)
    monkeypatch.setattr(bracket, '_CAP_FLOOR', 8)


def values(kind, n, seed):
    "Flat float64 values of a named distribution"
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n)
    return torch.from_numpy({
        'normal': x, 'equal': np.full(n, .5), 'zeros': np.zeros(n), 'signs': np.sign(x),
        'signed zeros': np.where(x > 0, 0., -0.),
        'zeros and normal': np.where(rng.random(n) < .5, np.where(x > 0, 0., -0.), x), 'few': np.round(x),
        'heavy tail': np.exp(8 * x) * np.sign(x),
        'denormal': x * 1e-42, 'small': x * 1e-9, 'large': x * 1e9, 'sorted': np.sort(x),
        'reversed': np.sort(x)[::-1].copy(),
        'mostly pruned': np.where(rng.random(n) < .9, 0., x), 'fp16 denormal': x * 1e-6}[kind])

KINDS = ['normal', 'equal', 'zeros', 'signs', 'signed zeros', 'zeros and normal', 'few', 'heavy tail', 'denormal',
         'small', 'large', 'sorted', 'reversed', 'mostly pruned', 'fp16 denormal']


def finite(x, dtype, magnitude):
    x = x.to(dtype)
    return x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max) if magnitude else x


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_property(limits, data):
    dtype, kind = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(KINDS))
    seed = data.draw(st.integers(0, 99))
    magnitude, sampler = data.draw(st.booleans()), data.draw(st.sampled_from(SAMPLERS))
    sizes = data.draw(st.lists(st.sampled_from([0, 1, 2, 7, 63, 64, 65, 300, 1000]), min_size=1, max_size=4))
    tensors = [finite(values(kind, n, seed + i), dtype, magnitude) for i, n in enumerate(sizes)]
    total = sum(sizes)
    if not magnitude and data.draw(st.booleans()):
        for t in tensors: t[:len(t) // 9] = -torch.inf; t[len(t) - len(t) // 9:] = torch.inf
    pruned = None
    if data.draw(st.booleans()):
        share = data.draw(st.sampled_from([0., .3, .8, 1.]))
        g = torch.Generator().manual_seed(seed)
        pruned = [None if data.draw(st.integers(0, 4)) == 0 else torch.rand(n, generator=g) >= share for n in sizes]
        if data.draw(st.booleans()):
            tensors = [t if p is None else t.where(p, torch.zeros((), dtype=dtype)) for t, p in zip(tensors, pruned)]
    gone = sum(int((~p).sum()) for p in pruned or [] if p is not None)
    n_drop = data.draw(st.one_of(st.integers(0, total),
                                 st.sampled_from([0, total, gone, max(gone - 1, 0), min(gone + 1, total)])))
    check(tensors, n_drop, magnitude, pruned, sampler, alias=data.draw(st.booleans()))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scores=st.lists(st.one_of(st.floats(width=32, allow_nan=False), st.sampled_from([0., -0., 1., -1.])),
                       max_size=40), data=st.data())
def test_any_floats(limits, scores, data):
    for dtype in DTYPES:
        x = torch.tensor(scores, dtype=torch.float64).to(dtype)
        check([x], data.draw(st.integers(0, len(scores))), sampler=data.draw(st.sampled_from(SAMPLERS)))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('magnitude', [False, True])
def test_large(dtype, kind, magnitude):
    tensors = [finite(values(kind, n, i), dtype, magnitude) for i, n in enumerate([200_001, 70_000, 5, 300_000])]
    total = sum(t.numel() for t in tensors)
    for n_drop in (0, 1, total // 10, total // 2, int(total * .9), total - 1, total):
        check(tensors, n_drop, magnitude, torch_path=n_drop == total // 2)


@pytest.mark.parametrize('sampler', SAMPLERS[1:])
@pytest.mark.parametrize('kind', ['normal', 'equal', 'zeros and normal', 'heavy tail', 'few'])
def test_adversarial_sampler_large(sampler, kind):
    tensors = [values(kind, n, i).float() for i, n in enumerate([200_000, 100_001])]
    for magnitude in (False, True):
        for n_drop in (3, 30_000, 150_000, 270_000, 299_999): check(tensors, n_drop, magnitude, sampler=sampler)
    masks = check(tensors, 150_000, True)
    for n_drop in (100_000, 149_999, 150_000, 150_001, 200_000, 300_000):
        check(tensors, n_drop, True, masks, sampler, alias=True)


@pytest.mark.parametrize('dtype', DTYPES)
def test_schedule_in_place(dtype):
    "Up and down again on the same masks, dropped weights zeroed, as training does"
    torch.manual_seed(0)
    weights = [torch.randn(300, 500).to(dtype), torch.randn(64, 64, 3, 3).to(dtype), torch.randn(10).to(dtype)]
    total, masks = sum(w.numel() for w in weights), [torch.ones(w.shape, dtype=torch.bool) for w in weights]
    for share in (.1, .5, .5, .8, .82, .9, .899, .4, .6, 0, 1, .3):
        want = reference_masks(weights, int(share * total), True, masks)
        keep_masks(weights, int(share * total), True, masks, masks)
        assert all(torch.equal(m, w) for m, w in zip(masks, want))
        for w, m in zip(weights, masks): w.mul_(m).add_(m * torch.randn(w.shape).to(dtype) * .01)


def test_earlier_drops_need_not_be_zero():
    x, old = torch.tensor([5., 1., 4., 2., 3.]), torch.tensor([False, True, True, True, True])
    assert keep_mask(x, 2, True, old).tolist() == [False, False, True, True, True]
    assert keep_mask(x, 0, True, old).tolist() == [True] * 5
    two = torch.tensor([False, True, False, True, True])
    assert keep_mask(x, 1, True, two).tolist() == [True, True, False, True, True]


def test_earlier_drops_come_before_minus_infinity():
    x, old = torch.tensor([-torch.inf, 3., 1.]), torch.tensor([True, False, True])
    for path in (True, False): check([x], 1, pruned=[old], torch_path=path)
    assert keep_mask(x, 1, pruned=old).tolist() == [True, False, True]


def test_layouts(limits):
    torch.manual_seed(0)
    base = torch.randn(8, 6, 5, 5).round(decimals=1)
    for x in (base.to(memory_format=torch.channels_last), base.permute(3, 1, 0, 2),
              base[::2, 1:, :, ::3], base[0, 0].t(),
              torch.tensor(2.5).expand(6, 7), torch.nn.Parameter(base), base.flip(0)[1:], torch.tensor(3.)):
        for n_drop in (0, x.numel() // 3, x.numel() - 1, x.numel()):
            for magnitude in (False, True): check([x, base], n_drop, magnitude); check([x], n_drop, magnitude)
    old = (torch.rand(6, 8) > .5).t()
    check([torch.randn(8, 6)], 30, pruned=[old])


def test_mixed_dtypes(limits):
    torch.manual_seed(0)
    for magnitude in (False, True):
        for dtypes in ([torch.bfloat16, torch.float16], [torch.float32, torch.bfloat16],
                       [torch.float64, torch.float16, torch.float32]):
            check([torch.randn(400).to(d) for d in dtypes], 333, magnitude)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('bad', [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_not_finite(dtype, bad):
    for where in (0, 99_999):
        x = torch.randn(100_000).to(dtype)
        x[where] = bad
        for n_drop in (0, 5, 50_000, 100_000):
            for magnitude in (False, True):
                if magnitude or bad != bad:
                    mask = torch.rand(100_000) > .4
                    before = mask.clone()
                    with pytest.raises(ValueError): keep_mask(x, n_drop, magnitude, mask, mask)
                    assert torch.equal(mask, before)
                    with pytest.raises(ValueError): keep_mask(x, n_drop, magnitude)
                    with pytest.raises(ValueError):
                        select_torch([x], n_drop, magnitude, [None], [mask], bracket.strided)
                else: check([x], n_drop)


def test_masks_in_one_buffer():
    "Views of one storage, and earlier masks that are other masks of `out`"
    torch.manual_seed(0)
    a, b, buffer = torch.randn(200), torch.randn(200), torch.rand(400) > .5
    p, q = buffer[:200], buffer[200:]
    want = reference_masks([a, b], 300, True, [p, q])
    got = keep_masks([a, b], 300, True, [p, q], [p, q])
    assert all(torch.equal(g, w) for g, w in zip(got, want))
    want = reference_masks([a, b], 350, True, [q, p])
    got = keep_masks([a, b], 350, True, [q, p], [p, q])
    assert all(torch.equal(g, w) for g, w in zip(got, want))


def test_refusals():
    x = torch.randn(4, 4)
    for n in (-1, 17):
        with pytest.raises(ValueError): keep_mask(x, n)
    with pytest.raises(TypeError): keep_mask(x, 1.5)
    with pytest.raises(TypeError): keep_mask(torch.arange(4), 1)
    with pytest.raises(ValueError): keep_mask(x, 1, out=torch.ones(4, 4, dtype=torch.bool).t()[:2])
    with pytest.raises(ValueError): keep_mask(x, 1, out=torch.ones(4, 8, dtype=torch.bool)[:, ::2])
    with pytest.raises(ValueError): keep_mask(x, 1, pruned=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError): keep_masks([x], 1, pruned=[None, None])
    assert keep_masks([], 0) == [] and keep_mask(torch.empty(0, 3), 0).shape == (0, 3)


def test_interrupt_restores(monkeypatch):
    "An error in the middle leaves masks that were given as both `pruned` and `out` as they were"
    x, mask = torch.randn(300_000), torch.rand(300_000) > .3
    before = mask.clone()
    def broken(*args): raise KeyboardInterrupt
    monkeypatch.setattr(bracket, '_finish', broken)
    with pytest.raises(KeyboardInterrupt): keep_mask(x, 200_000, True, mask, mask)
    with pytest.raises(KeyboardInterrupt): keep_mask(x, 20_000, True, mask, mask)
    assert torch.equal(mask, before)


@pytest.fixture
def n_threads():
    "`torch.set_num_threads`, put back afterwards"
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)

@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('kind', ['normal', 'equal', 'few', 'mostly pruned'])
def test_any_number_of_threads_gives_the_same_masks(kind, dtype, n_threads, monkeypatch):
    tiny(monkeypatch)
    monkeypatch.setattr(threads, 'PER_THREAD', 1)
    tensors = [finite(values(kind, n, n), dtype, True) for n in (1, 700, 3000)]
    pruned  = [None, torch.arange(700) % 3 > 0, torch.arange(3000) % 7 > 0]
    for n in (1, 2, 5):
        n_threads(n)
        for n_drop in (0, 300, 1500, 3700):
            for magnitude in (False, True):
                check(tensors, n_drop, magnitude, pruned, alias=n_drop % 2 == 0, torch_path=False)

@pytest.mark.parametrize('n', [1, 2, 5])
def test_an_error_in_one_thread_leaves_all_masks(n, n_threads, monkeypatch):
    tiny(monkeypatch)
    monkeypatch.setattr(threads, 'PER_THREAD', 1)
    n_threads(n)
    x, mask = torch.randn(3000), torch.rand(3000) > .3
    x[2999], before = torch.nan, mask.clone()
    with pytest.raises(ValueError, match='NaN'): keep_mask(x, 2500, True, mask, mask)
    assert torch.equal(mask, before)

@pytest.mark.parametrize('n', [1, 2, 5])
def test_zeroing_and_counting_on_threads(n, n_threads, monkeypatch):
    monkeypatch.setattr(threads, 'PER_THREAD', 1)
    monkeypatch.setattr(masks, '_CHUNK', 64)
    monkeypatch.setattr(numbers, '_CHUNK', 64)
    n_threads(n)
    for dtype in DTYPES:
        t, mask = torch.randn(7, 43).to(dtype), torch.rand(7, 43) > .5
        want = torch.where(mask, t, 0)
        masks.Masks(dict(a=mask)).apply(dict(a=t))
        assert torch.equal(t, want) and numbers.n_zeros(t) == numbers.n_zeros(mask) == int((~mask).sum())

@pytest.mark.parametrize('n', [1, 2])
def test_zeroing_leaves_the_buffer_of_numpy_as_it_was(n, n_threads, monkeypatch):
    "Masks are converted in pieces of 1,024: lengths around that, and a size that the caller has set"
    monkeypatch.setattr(threads, 'PER_THREAD', 1)
    monkeypatch.setattr(masks, '_CHUNK', 5000)
    n_threads(n)
    former = np.setbufsize(4096)
    try:
        for dtype in (torch.int8, *DTYPES):
            for size in (1023, 1024, 1025, 10_001):
                t, mask = torch.randint(-99, 99, (size,)).to(dtype), torch.rand(size) > .5
                want = torch.where(mask, t, 0)
                masks.zero_dropped(t, mask)
                assert torch.equal(t, want) and np.getbufsize() == 4096
        locked = np.zeros(3, np.int32)
        locked.flags.writeable = False
        with pytest.raises(ValueError, match='read-only'): masks._multiply([(locked, np.zeros(3, bool))])
        assert np.getbufsize() == 4096
    finally: np.setbufsize(former)

@pytest.mark.parametrize('n', [1, 2])
def test_finite_of_each_is_all_finite(n, n_threads, monkeypatch):
    "In the first piece, the last one or none; sums that overflow, views, half precision and other types too"
    monkeypatch.setattr(threads, 'PER_THREAD', 1)
    monkeypatch.setattr(numbers, '_CHUNK', 64)
    n_threads(n)
    tensors = [torch.arange(200), torch.zeros(0), torch.ones(3, 1).expand(3, 2), torch.ones(4).to(torch.float8_e4m3fn)]
    for dtype in DTYPES:
        top = torch.full((200,), torch.finfo(dtype).max, dtype=dtype)
        tensors += [top, top.view(20, 10).t(), nn.Parameter(torch.randn(200).to(dtype))]
        for odd in (torch.inf, -torch.inf, torch.nan):
            for i in (0, 63, 64, 199): tensors.append(top.index_fill(0, torch.tensor([i]), odd))
    with warnings.catch_warnings(action='error'): found = numbers.finite_of_each(tensors)
    assert found == [bool(torch.isfinite(t.float() if t.dtype.itemsize == 1 else t).all()) for t in tensors]
    assert found.count(False) == 3*4*len(DTYPES)

def test_a_finite_sum_is_no_condition():
    "Sums overflow where no number does, and what is not finite never has a finite sum"
    for dtype in DTYPES:
        top = torch.finfo(dtype).max
        assert numbers.all_finite(torch.tensor([top, top], dtype=dtype))
        for odd in (torch.inf, -torch.inf, torch.nan):
            assert not numbers.all_finite(torch.tensor([odd, 1., -odd], dtype=dtype))
    assert numbers.all_finite(torch.ones(3).to(torch.float8_e4m3fn)) and numbers.all_finite(torch.arange(3))


@pytest.mark.parametrize('kind', ['normal', 'mostly pruned', 'equal'])
def test_twenty_million(kind):
    tensors = [values(kind, 10_000_000, 0).float(), values(kind, 10_000_001, 1).float()]
    check(tensors, 18_000_000, True, torch_path=False)


# Scores made while they are ranked

def moved(now, ref): return (now - ref).abs_()
def one_of_two(now, ref): return now

def lazy_check(tensors, refs, f, n_drop, pruned=None, sampler=None):
    "Lazy scores give the masks of the same scores made beforehand, on both paths; the tensors stay as they are"
    up = lambda t: t if t.dtype == torch.float64 else t.float()
    before = [t.clone() for t in tensors]
    eager, lazy = [f(up(t), up(r)) for t, r in zip(tensors, refs)], [LazyScores(f, t, r) for t, r in zip(tensors, refs)]
    want = reference_masks(eager, n_drop, False, pruned)
    got = keep_masks(lazy, n_drop, False, pruned, None, sampler)
    assert all(torch.equal(g, w) for g, w in zip(got, want)), 'numpy path'
    if sum(t.numel() for t in tensors):
        fresh = [torch.empty(t.shape, dtype=torch.bool) for t in tensors]
        fresh = select_torch(lazy, n_drop, False, pruned or [None] * len(lazy), fresh, sampler or bracket.strided)
        assert all(torch.equal(g, w) for g, w in zip(fresh, want)), 'torch path'
    in_place = [torch.ones(t.shape, dtype=torch.bool) if pruned is None else p.clone()
                for t, p in zip(tensors, pruned or tensors)]
    got = keep_masks(lazy, n_drop, False, in_place, in_place, sampler)
    assert all(g is i and torch.equal(g, w) for g, i, w in zip(got, in_place, want)), 'in place'
    assert all(torch.equal(t, b) for t, b in zip(tensors, before)), 'the tensors were written'


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_lazy_property(limits, data):
    kinds, seed = [data.draw(st.sampled_from(KINDS)) for _ in range(2)], data.draw(st.integers(0, 99))
    dtypes, f = [data.draw(st.sampled_from(DTYPES)) for _ in range(2)], data.draw(st.sampled_from([moved, one_of_two]))
    sizes = data.draw(st.lists(st.sampled_from([0, 1, 2, 7, 63, 64, 65, 300, 1000]), min_size=1, max_size=4))
    ws, refs = [[finite(values(kind, n, seed + i), d, True).clamp(-6e4, 6e4) for i, n in enumerate(sizes)]
                for kind, d in zip(kinds, dtypes)]
    g = torch.Generator().manual_seed(seed)
    pruned = [torch.rand(n, generator=g) >= .4 for n in sizes] if data.draw(st.booleans()) else None
    lazy_check(ws, refs, f, data.draw(st.integers(0, sum(sizes))), pruned, data.draw(st.sampled_from(SAMPLERS)))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('kind', ['normal', 'equal', 'few', 'heavy tail', 'mostly pruned'])
def test_lazy_large(dtype, kind):
    sizes = [200_001, 70_000, 5, 140_000]
    ws, refs = [[finite(values(kind, n, seed + i), dtype, True).clamp(-6e4, 6e4) for i, n in enumerate(sizes)]
                for seed in (0, 9)]
    for n_drop in (0, 41_000, 369_000, sum(sizes)): lazy_check(ws, refs, moved, n_drop)
    masks = [torch.rand(n, generator=torch.Generator().manual_seed(n)) > .5 for n in sizes]
    for n_drop in (100_000, 300_000): lazy_check(ws, refs, moved, n_drop, masks)
    lazy_check(ws[:1], refs[:1], moved, 160_000)


@pytest.mark.parametrize('sampler', SAMPLERS[1:])
@pytest.mark.parametrize('kind', ['normal', 'few'])
def test_lazy_adversarial_sampler(sampler, kind):
    ws, refs = [[values(kind, n, seed + i).float() for i, n in enumerate([150_000, 60_001])] for seed in (0, 9)]
    for n_drop in (3, 100_000, 210_000): lazy_check(ws, refs, moved, n_drop, None, sampler)


def test_lazy_beside_ready(limits):
    "In one list with ready scores, which may be infinite"
    torch.manual_seed(0)
    ws, refs, ready = torch.randn(30, 40), torch.randn(30, 40).bfloat16(), torch.randn(900).double()
    ready[::7] = torch.inf
    want = reference_masks([moved(ws, refs.float()).double(), ready], 1500)
    got  = keep_masks([LazyScores(moved, ws, refs), ready], 1500)
    assert all(torch.equal(g, w) for g, w in zip(got, want))
    for view in (lambda x: x.t(), lambda x: x[:, ::3], lambda x: x[None].expand(3, 30, 40), lambda x: x[0, 0]):
        lazy_check([view(ws)], [view(refs)], moved, view(ws).numel() // 2)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('bad', [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_lazy_not_finite(dtype, bad):
    for n, where in ((100_000, 0), (100_000, 99_999), (30, 7)):
        x, good = torch.randn(n).to(dtype), torch.randn(n)
        x[where] = bad
        for scores in (LazyScores(criteria.identity, x), LazyScores(torch.mul, good, x)):
            for n_drop in (0, 5, n // 2, n):
                masks = [torch.rand(n) > .4, torch.rand(n) > .4]
                before = [m.clone() for m in masks]
                with pytest.raises(ValueError, match='NaN or infinite numbers among the scores'):
                    keep_masks([LazyScores(criteria.square, good), scores], n_drop, False, masks, masks)
                assert all(torch.equal(m, b) for m, b in zip(masks, before))
                with pytest.raises(ValueError):
                    select_torch([scores], n_drop, False, [None], [masks[0]], bracket.strided)


def test_lazy_sums_may_overflow():
    "Finite scores are ranked even if their sum is infinite"
    for n in (30, 100_000):
        x = torch.full((n,), 3e38)
        x[n // 2] = 2e38
        assert (~keep_mask(LazyScores(criteria.identity, x), 1)).nonzero().item() == n // 2


def test_lazy_refusals():
    x = torch.randn(100_000)
    with pytest.raises(ValueError, match='one shape'): LazyScores(moved, x, x[1:])
    with pytest.raises(ValueError, match='one shape'): LazyScores(moved)
    with pytest.raises(TypeError, match='magnitude'): keep_mask(LazyScores(moved, x, x), 5, magnitude=True)
    for n in (30, 100_000):
        with pytest.raises(ValueError, match='Expected .* scores, got'): keep_mask(LazyScores(torch.sum, x[:n]), 5)


def two_layers(dtype=torch.float32):
    "One layer that is small, one that is ranked in a stream, with parts that see other channels"
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Conv2d(96, 112, 3, groups=2))
    return model.to(dtype)

# test_measure has the others
ELEMENTWISE = [k for k in available_criterias() if (c := as_criteria(k)).elementwise and not c.measure]

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('name', ELEMENTWISE)
def test_elementwise_criteria(name, context, dtype):
    "The masks are those of a stable sort of all the scores, first and after, also from raw gradients"
    model = two_layers(dtype)
    sp, c = Sparsifier(model, 'weight', context, name), as_criteria(name)
    sizes = [m.weight.numel() for m in model]
    for round, percent in enumerate((30, 70)):
        for m in model:
            m.weight.data.add_(torch.randn_like(m.weight) * .02)
            m.weight.grad = torch.randn_like(m.weight)
        if round and c.needs_grad: sp.accumulate_gradients()
        old    = [sp.masks.get(t.name, torch.ones(t.weight.shape, dtype=torch.bool)).clone() for t in sp.targets]
        scores = [c(t.weight, sp.scorer.reference_of(t.parts[0])).masked_fill(~o, -torch.inf)
                  for t, o in zip(sp.targets, old)]
        sp.sparsify_model(percent)
        if context == 'global':
            want = naive_keep(torch.cat([s.flatten() for s in scores]), sum(sizes) * percent // 100).split(sizes)
        else: want = [naive_keep(s.flatten(), n * percent // 100) for s, n in zip(scores, sizes)]
        assert all(torch.equal(sp.masks[t.name].flatten(), w) for t, w in zip(sp.targets, want))
        assert not any(t.weight[~sp.masks[t.name]].any() for t in sp.targets)


def test_elementwise_criteria_are_the_librarys_own():
    assert len(ELEMENTWISE) == 16 and not criteria.random.elementwise
    assert not criteria.Criteria(torch.abs).elementwise
    assert not criteria.Criteria(criteria.identity, needs_init=True, output_fn=torch.sub).elementwise
    sp = Sparsifier(two_layers(), criteria='movement')
    assert isinstance(sp.scorer.lazy_scores(sp.targets[1]), LazyScores) and sp.chooser.lazy
    for kwargs in (dict(criteria=torch.abs), dict(criteria='random'), dict(granularity='filter', criteria='movement'),
                   dict(nm=True, criteria='movement'),
                   dict(criteria=criteria.Criteria(criteria.square, normalizer=criteria.Normalizer.mean))):
        assert not Sparsifier(two_layers(), **kwargs).chooser.lazy


@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('layer', [0, 1])
@pytest.mark.parametrize('bad', [torch.nan, torch.inf])
def test_lazy_scores_that_are_no_numbers(context, layer, bad):
    model = two_layers()
    sp = Sparsifier(model, context=context, criteria='movement')
    for m in model: m.weight.data.add_(torch.randn_like(m.weight))
    sp.sparsify_model(50)
    masks = {k: v.clone() for k, v in sp.masks.items()}
    kept = int(masks[f'{layer}.weight'].flatten().nonzero()[0])  # one that is dropped already may be anything
    model[layer].weight.data.view(-1)[kept] = bad
    with pytest.raises(ValueError, match=rf'^{layer}\.weight: NaN or infinite numbers among the scores'):
        sp.sparsify_model(90)
    assert all(torch.equal(masks[k], v) for k, v in sp.masks.items())
