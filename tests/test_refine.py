"Swaps judged by a metric, and tables of times; no test measures time"
import pytest, torch, torch.nn as nn
from fasterai_clone.analyze.all import allocate, judge_by, layer_times, refine
from fasterai_clone.sparse.all import Sparsifier

LEVELS = 0, 25, 50, 75

def table(**weights): return {k: {s: w*(1 - s/100) for s in LEVELS} for k,w in weights.items()}

def spent(costs, each): return sum(costs[k][s] for k,s in each.items())

@pytest.mark.parametrize('wanted', [dict(a=75, b=0, c=50), dict(a=0, b=75, c=50), dict(a=50, b=50, c=25)])
def test_the_best_is_found_although_the_curves_are_wrong(wanted):
    "Curves that say nothing; the metric has one best choice, at the same cost"
    costs, curves = table(a=4., b=4., c=4.), {k: {s: s/100 for s in LEVELS[1:]} for k in 'abc'}
    found = allocate(curves, 41, costs)
    def judge(each): return -sum(abs(each[k] - wanted[k]) for k in each)
    best = refine(found, curves, judge, costs)
    assert best == wanted and spent(costs, best) <= spent(costs, found) + 1e-9

def test_never_worse_never_dearer_and_no_more_tries_than_allowed():
    costs, curves, calls = table(a=1., b=9., c=3.), {k: {s: float(s) for s in LEVELS[1:]} for k in 'abc'}, []
    found = allocate(curves, 50, costs)
    def judge(each):
        calls.append(dict(each))
        assert spent(costs, each) <= spent(costs, found) + 1e-9
        return -float(hash(tuple(each.values())) % 101)
    best = refine(found, curves, judge, costs, tries=7)
    assert len(calls) <= 7 and calls[0] == found and judge(best) >= judge(found)
    assert len({tuple(c.values()) for c in calls[:-2]}) == len(calls) - 2  # none twice

def test_a_small_layer_goes_up_far_before_a_large_one_goes_down():
    "Curves in steps of 1 %: eight steps of the small layer pay for one of the large layer"
    levels, sizes = range(101), dict(small=100., large=800.)
    costs  = {k: {s: n*(1 - s/100) for s in levels} for k,n in sizes.items()}
    curves = {k: {s: s/100 for s in levels if s} for k in sizes}
    def judge(each): return -each['large']
    best = refine(dict(small=50., large=50.), curves, judge, costs, tries=40)
    assert best['large'] <= 44 and spent(costs, best) <= spent(costs, dict(small=50., large=50.)) + 1e-9

def test_refusals():
    with pytest.raises(ValueError, match='one of the sparsities'): refine({'a': 30}, {'a': {50: 1.}}, len, dict(a=1))

@pytest.mark.parametrize('lower', [False, True])
def test_the_judge_measures_the_pruned_model_and_leaves_it(lower):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(32, 6), torch.randn(32, 3)
    def error(out, target): return (out - target).square().mean()
    was = {k: p.clone() for k,p in net.state_dict().items()}
    judge = judge_by(Sparsifier(net, layer_type=nn.Linear), (x, y), error, lower=lower)
    got = judge({'0': 50, '2': 25})
    assert all(torch.equal(p, was[k]) for k,p in net.state_dict().items())
    Sparsifier(net, layer_type=nn.Linear).sparsify_model({'0': 50, '2': 25})
    want = float(error(net(x), y).detach())
    assert got == pytest.approx(-want if lower else want, rel=1e-6)

def test_times_of_each_width_with_a_clock_that_counts():
    "One call a round for each width, of layers with that width, on the inputs that the layer gets"
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(8*16, 4))
    was, seen = {k: p.clone() for k,p in net.state_dict().items()}, []
    def clock(layer, x):
        seen.append(tuple(layer(x).shape))
        return float(len(layer.weight))
    times = layer_times(net, torch.randn(2, 3, 8, 8), (25, 75, 90), rounds=3, clock=clock)
    assert times == {'0': {0: 8, 25: 6, 75: 2, 90: 1}, '4': {0: 4, 25: 3, 75: 1, 90: 1}}  # no grouped convolution
    assert seen.count((2, 6, 6, 6)) == 5 and seen.count((2, 3)) == 5  # two warm-ups
    assert all(torch.equal(p, was[k]) for k,p in net.state_dict().items()) and net[0].out_channels == 8
    assert allocate({'0': {75: 1.}, '4': {75: 9.}}, 50, times) == {'0': 75, '4': 0}
