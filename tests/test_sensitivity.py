"Sensitivity is measured and leaves the model alone; an allocation is the best of all"
import copy, itertools, json

import numpy as np, pytest, torch, torch.nn as nn, torch.nn.functional as F
from fasterai_clone.analyze.all import Sensitivity, allocate, evaluate, judge_by, score_curves, sensitivity
from fasterai_clone.analyze.allocate import cheapest
from fasterai_clone.methods.all import isomorphic, owl
from fasterai_clone.methods.owl import owl_counts
from fasterai_clone.sparse.all import Sparsifier
from helpers import exact, same, weights
from torch.utils.data import DataLoader

def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(),
                         nn.Linear(64, 5))

def data(): return [(torch.randn(6, 1, 8, 8), torch.randint(5, (6,))) for _ in range(3)]

def accuracy(out, y): return (out.argmax(1) == y).float().mean()

@pytest.mark.parametrize('granularity, criteria', [('weight', 'large_final'), ('weight', 'wanda'), ('filter', 'snip')])
def test_each_number_is_what_pruning_by_hand_gives(granularity, criteria):
    model, batches = net().train(), data()
    was, numbers = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    kwargs = dict(layer_type=(nn.Conv2d, nn.Linear), data=batches, loss_func=F.cross_entropy)
    found  = sensitivity(model, batches, F.cross_entropy, (25, 50), granularity, criteria, kwargs['layer_type'],
                         loss_func=F.cross_entropy)
    assert all(torch.equal(t, was[k]) for k,t in model.state_dict().items()) and model.training
    assert torch.equal(torch.get_rng_state(), numbers) and [*found.values] == ['0', '3', '5']
    assert found.dense == evaluate(model, batches, F.cross_entropy)
    for layer,row in found.values.items():
        for s,value in row.items():
            m = copy.deepcopy(model)
            Sparsifier(m, granularity, 'local', criteria, **kwargs).sparsify_layer(layer, s)
            assert value == pytest.approx(evaluate(m, batches, F.cross_entropy), rel=1e-5)

def test_interrupted_and_resumed(tmp_path):
    model, batches, calls = net(), data(), []
    def metric(model, data):
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt
        return evaluate(model, data, accuracy)
    was = weights(model)
    with pytest.raises(KeyboardInterrupt): sensitivity(model, batches, metric, (50, 90), state=tmp_path/'s.json')
    assert same(weights(model), was) and not any(m._forward_hooks for m in model.modules())
    found = sensitivity(model, batches, metric, (50, 90), state=tmp_path/'s.json')
    assert len(calls) == 4 + 4  # the dense model and two of six were there
    whole = sensitivity(model, batches, accuracy, (50, 90))
    assert found.values == whole.values and found.dense == whole.dense
    model[0].weight.data += 1
    with pytest.raises(ValueError, match='belongs to other weights'):
        sensitivity(model, batches, metric, (50, 90), state=tmp_path/'s.json')

@pytest.mark.parametrize('form', ['list', 'loader', 'tuple'])
def test_a_file_of_other_data_is_refused(form, tmp_path):
    model, file = net(), tmp_path/'s.json'
    def given(seed, n=3):
        g = torch.Generator().manual_seed(seed)
        items = [(torch.randn(6, 1, 8, 8, generator=g), torch.randint(5, (6,), generator=g)) for _ in range(n)]
        return dict(list=items, loader=DataLoader(items, None), tuple=items[0])[form]
    def run(data, **kwargs): return sensitivity(model, data, F.cross_entropy, (50,), state=file, **kwargs)
    first = run(given(0))
    assert run(given(0)).values == first.values
    with pytest.raises(ValueError, match='belongs to other data: the first batches differ'): run(given(1))
    if form != 'tuple':
        with pytest.raises(ValueError, match='other data: the numbers of batches differ'): run(given(0, 2))
    saved = json.loads(file.read_text())
    del saved['about']['data']  # as files of earlier versions
    file.write_text(json.dumps(saved))
    assert run(given(0)).values == first.values

def test_a_loader_that_shuffles_continues_its_file(tmp_path):
    model, calls = net(), []
    items = [(x, y) for xs,ys in data() for x,y in zip(xs, ys)]
    def metric(model, data):
        calls.append(1)
        return 0.
    for _ in range(2): sensitivity(model, DataLoader(items, 8, shuffle=True), metric, (50,), state=tmp_path/'s.json')
    assert len(calls) == 4  # the dense model and three layers, all in the first call
    for _ in range(2): sensitivity(model, None, metric, (50,), state=tmp_path/'no data.json')  # the metric has its own
    assert len(calls) == 8

def test_a_generator_is_read_once_and_used_for_every_measurement():
    model, batches = net(), data()
    want = sensitivity(model, batches, accuracy, (50, 90), criteria='wanda')
    assert sensitivity(model, iter(batches), accuracy, (50, 90), criteria='wanda').values == want.values
    sp = Sparsifier(model, layer_type=nn.Linear)
    judge, other = judge_by(sp, iter(batches), accuracy), judge_by(sp, batches, accuracy)
    for s in (30, 60): assert judge(s) == other(s)

def test_table_and_plots():
    found = Sensitivity(.9, {'a': {50: .9, 90: .5}, 'b': {50: .8}}, {'a': 4, 'b': 6}, {'a': 4, 'b': 6})
    assert found.damage() == {'a': {50: 0, 90: pytest.approx(.4)}, 'b': {50: pytest.approx(.1)}}
    assert found.to_pandas().shape == (2, 2) and '0.5' in str(found)
    assert Sensitivity(3., {'a': {50: 9.}}, {'a': 1}, {'a': 1}).damage() == {'a': {50: 6.}}  # a loss
    for kind in ('lines', 'heat'): assert found.plot(kind).get_xlabel().startswith('sparsity')
    with pytest.raises(ValueError, match="'lines' or 'heat'"): found.plot('bars')

def brute(options, limit):
    "Every choice"
    best = None
    for ks in itertools.product(*[range(len(c)) for c,_ in options]):
        cost, loss = (sum(o[i][k] for o,k in zip(options, ks)) for i in (0, 1))
        if cost <= limit and (best is None or loss < best): best = loss
    return best

@pytest.mark.parametrize('seed', range(30))
def test_the_best_of_all_choices(seed):
    "Three or four layers, damage that need not rise, ties, costs that are whole numbers or not"
    rng = np.random.default_rng(seed)
    options = []
    for _ in range(3 + seed % 2):
        n = int(rng.integers(2, 7))
        cost, loss = rng.integers(1, 30, n).astype(float), rng.integers(-3, 12, n).astype(float)
        options.append((cost + rng.random(n)*(seed % 3 == 0), loss + rng.random(n)*(seed % 3 == 1)))
    for limit in rng.uniform(2, sum(c.max() for c,_ in options), 8):
        want, found = brute(options, limit), cheapest(options, limit)
        assert (found is None) == (want is None)
        if found is None: continue
        assert sum(c[k] for (c,_),k in zip(options, found)) <= limit + 1e-9*limit
        assert sum(v[k] for (_,v),k in zip(options, found)) == pytest.approx(want, abs=1e-9)

def test_many_layers_in_a_moment():
    "Sixty layers, twenty levels: the bound keeps the number of partial solutions small; not worse than any price"
    rng = np.random.default_rng(0)
    options = [(np.sort(rng.random(20))[::-1]*1e6, np.sort(rng.random(20)**3)) for _ in range(60)]
    limit = .4*sum(c[0] for c,_ in options)
    found = cheapest(options, limit)
    loss  = sum(v[k] for (_,v),k in zip(options, found))
    for price in 10**np.linspace(-9, -3, 40):
        ks = [int((v + price*c).argmin()) for c,v in options]
        if sum(c[k] for (c,_),k in zip(options, ks)) <= limit:
            assert loss <= sum(v[k] for (_,v),k in zip(options, ks)) + 1e-9

def test_a_planted_insensitive_layer_is_found():
    found = Sensitivity(.9, {k: {s: .9 - (0 if k == 'b' else s/200) for s in (30, 60, 90)} for k in 'abc'},
                        dict.fromkeys('abc', 100), dict.fromkeys('abc', 100))
    assert allocate(found, 30) == {'a': 0, 'b': 90, 'c': 0}
    each = allocate(found, 50)
    assert each['b'] == 90 and sorted([each['a'], each['c']]) == [0, 60]

def test_what_it_returns_is_what_a_sparsifier_takes():
    model = net()
    sp = Sparsifier(model, criteria='squared_final', layer_type=(nn.Conv2d, nn.Linear))
    each = allocate(sp, 60)
    sp.sparsify_model(each)
    total = sum(t.groups.n for t in sp.targets)
    assert sum(sp.dropped()) >= exact(total, 60) and sp.dropped() == sp.counts(each)

def test_score_curves_by_hand():
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[1., -2., 3., 4.]])
    assert score_curves(Sparsifier(model, layer_type=nn.Linear), (0, 25, 50, 99)) == {'': {0: 0, 25: 1, 50: 3, 99: 6}}

@pytest.mark.parametrize('kwargs, error, message', [
    (dict(budget=99), ValueError, 'save at most'), (dict(budget=.5), ValueError, 'percent'),
    (dict(costs={'x': 1}), ValueError, 'Unknown layer'), (dict(costs=None), ValueError, '`costs` is needed'),
    (dict(curves={'a': {50: float('nan')}}), ValueError, 'NaN')])
def test_refusals(kwargs, error, message):
    given = dict(curves={'a': {50: 1.}}, budget=50, costs={'a': 4})
    with pytest.raises(error, match=message): allocate(**{**given, **kwargs})


# Contexts

def linears(*shapes):
    model = nn.Sequential(*[nn.Linear(i, o, bias=False) for i,o in shapes])
    return model

def test_layers_of_one_shape_share_a_number():
    model = linears((6, 4), (4, 6), (6, 4))
    model[0].weight.data, model[2].weight.data = torch.arange(24.).view(4, 6) + 100, torch.arange(24.).view(4, 6) + 1
    Sparsifier(model, context='isomorphic', layer_type=nn.Linear).sparsify_model(50)
    assert [int((m.weight == 0).sum()) for m in model] == [0, 12, 24]

@pytest.mark.parametrize('n', [0, 1, 57, 200, 399, 400])
def test_owl_is_exact_and_spares_outliers(n):
    counts = owl_counts([.1, .05, 0.], [100, 100, 200], n)
    assert sum(counts) == n and all(0 <= c <= k for c,k in zip(counts, (100, 100, 200)))
    if n == 200: assert counts[0] < counts[1] < counts[2]/2
    assert owl_counts([0., 0., 0.], [100, 100, 200], 200) == [50, 50, 100]

def test_owl_by_name_and_nested():
    model, x = linears((32, 32), (32, 32), (32, 8)), torch.randn(50, 32)
    model[0].weight.data[:3] *= 30
    sp = Sparsifier(model, context='owl', criteria='wanda', layer_type=nn.Linear, data=x)
    for s in (30, 60, 80):
        before = {k: m.clone() for k,m in sp.masks.items()}
        sp.sparsify_model(s)
        assert sum(sp.dropped()) == exact(2304, s) and all(not (sp.masks[k] & ~m).any() for k,m in before.items())
    share = [float((m.weight == 0).double().mean()) for m in model]
    assert share[1] < share[0]
    assert owl.name == 'owl' and isomorphic.name == 'isomorphic'

def test_finer_curves_go_through_what_was_measured_and_stay_between():
    rng = np.random.default_rng(0)
    for _ in range(20):
        levels = sorted(rng.choice(np.arange(1, 100), 6, replace=False).tolist())
        row    = dict(zip(map(float, levels), rng.normal(size=6).cumsum().tolist()))
        found  = Sensitivity(.5, {'a': row}, {'a': 100}, {'a': 100}).finer(1).values['a']
        points = {0.: .5} | row
        assert all(found[s] == v for s,v in row.items()) and [*found] == [float(s) for s in range(1, levels[-1] + 1)]
        for a,b in itertools.pairwise(points):
            low, high = sorted((points[a], points[b]))
            assert all(low - 1e-9 <= v <= high + 1e-9 for s,v in found.items() if a <= s <= b)
        slope = [float(s) for s in found]
        line  = Sensitivity(0., {'a': {s: 2*s for s in row}}, {}, {}).finer(1).values['a']
        assert np.allclose([line[s] for s in slope], [2*s for s in slope])
    assert Sensitivity(1., {'a': {50.: .5}}, {}, {}).finer(25).values['a'] == {25.: .75, 50.: .5}
