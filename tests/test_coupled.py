"Filters that meet in sums are masked together during training, and `thin` takes out exactly those"
import copy, pickle

import fastai.callback.fp16 as fp16
import pytest, torch, torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from helpers import exact, learner, same, spy, weights
from fasterai_clone.sparse.measure import mean_activation
from fasterai_clone.prune.all import thin
from fasterai_clone.sparse.all import *
from fasterai_clone.sparse.counted import budget_used
from fasterai_clone.core.criteria import fpgm, random
from processes import main, start
from test_thin import Anything, lively


def conv(i, o, **kwargs): return nn.Conv2d(i, o, 3, padding=1, **kwargs)

class Residual(nn.Module):
    "8×8 digits: a sum of two convolutions, then two side by side under one norm"
    def __init__(self, w=8):
        super().__init__()
        self.stem, self.bn0 = conv(1, w, bias=False), nn.BatchNorm2d(w)
        self.a, self.bn1    = conv(w, w), nn.BatchNorm2d(w)
        self.b, self.bn2    = conv(w, w, bias=False), nn.BatchNorm2d(w)
        self.c, self.d      = conv(w, 6), conv(w, 4)
        self.bn3, self.head = nn.BatchNorm2d(10), nn.Linear(10, 10)
    def forward(self, x):
        x = self.bn0(self.stem(x)).relu()
        x = (x + self.bn2(self.b(self.bn1(self.a(x)).relu()))).relu()
        x = self.bn3(torch.cat([self.c(x), self.d(x)], 1)).relu()
        return self.head(x.mean((2, 3)))

def net(seed=0, **kwargs):
    torch.manual_seed(seed)
    return Residual(**kwargs)

def digits(n=3): return torch.randn(n, 1, 8, 8)
def widths(m): return [m.stem.out_channels, m.a.out_channels, m.b.out_channels, m.c.out_channels, m.d.out_channels]

@torch.no_grad()
def error(a, b, x):
    a, b = (copy.deepcopy(m).double().eval()(x.double()) for m in (a, b))
    return ((a - b).abs().max() / a.abs().max()).item()

def coupled(model, context='local', criteria=large_final, **kwargs):
    return Sparsifier(model, 'filter', context, criteria, coupled=True, example_inputs=digits(), **kwargs)


# -- which filters go together ---------------------------------------------------------------------

def test_parts_and_what_is_held():
    sp = coupled(net())
    assert {t.name: ([p.name for p in t.parts], sorted(p.name for p in t.held)) for t in sp.targets} == {
        'stem.weight': (['stem.weight', 'b.weight'], ['bn0.bias', 'bn0.weight', 'bn2.bias', 'bn2.weight']),
        'a.weight':    (['a.weight'], ['a.bias', 'bn1.bias', 'bn1.weight']),
        'c.weight':    (['c.weight'], ['bn3.bias', 'bn3.weight', 'c.bias']),
        'd.weight':    (['d.weight'], ['bn3.bias', 'bn3.weight', 'd.bias'])}
    assert [t.groups.n for t in sp.targets] == [8, 8, 6, 4] and not sp.left_out

def test_scores_are_the_mean_over_all_that_makes_a_channel():
    model = net()
    with torch.no_grad():
        model.stem.weight.fill_(1)                                      # 9 weights a channel
        model.b.weight.copy_(torch.arange(8.).reshape(8, 1, 1, 1).expand(8, 8, 3, 3))  # 72
    sp = coupled(model)
    torch.testing.assert_close(sp.scorer.scores(sp.targets[0]).flatten(), (9*1 + 72*torch.arange(8.)) / 81)
    sp.sparsify_model(25)
    for m in (model.stem, model.b, model.bn0, model.bn2): assert [not v.any() for v in m.weight] == [True]*2 + [False]*6

def test_a_norm_of_two_layers_loses_what_either_loses():
    model = net()
    with torch.no_grad(): model.c.weight[[1, 4]] = 1e-3; model.d.weight[[0, 2]] = 1e-3
    sp = coupled(model)
    with torch.no_grad(): model.bn3.weight.fill_(1)
    sp.sparsify_layer('c', n=2)
    assert model.bn3.weight.tolist() == [1, 0, 1, 1, 0, 1,  1, 1, 1, 1]
    sp.sparsify_layer('d', n=2)
    assert model.bn3.weight.tolist() == [1, 0, 1, 1, 0, 1,  0, 1, 0, 1]
    assert widths(thin(model, example_inputs=digits())) == [8, 8, 8, 4, 2]

@pytest.mark.parametrize('context', ['local', 'global', 'lamp', 'erk'])
@pytest.mark.parametrize('criteria', [large_final, squared_final, fpgm, random, movement])
def test_thin_takes_out_what_was_dropped(context, criteria):
    if (context, criteria) == ('lamp', movement): criteria = large_final
    model = net()
    sp = coupled(model, context, criteria)
    sp.sparsify_model(50)
    small, x = thin(model, example_inputs=digits()), digits()
    gone = {t.layer: int((~sp.found.group_mask(t)).sum()) for t in sp.targets}
    assert sum(gone.values()) == 13 and (context != 'local' or gone == dict(stem=4, a=4, c=3, d=2))
    assert widths(small) == [8 - gone['stem'], 8 - gone['a'], 8 - gone['stem'], 6 - gone['c'], 4 - gone['d']]
    assert error(model, small, x) < 1e-10

def test_grouped_convolutions():
    "Two filters for each channel that goes in: they go with it"
    model = nn.Sequential(conv(1, 4), nn.ReLU(), conv(4, 8, groups=4), nn.ReLU(), conv(8, 3))
    sp = coupled(model)
    assert [[p.name for p in t.parts] for t in sp.targets] == [['0.weight', '2.weight']] and list(sp.left_out) == ['4']
    sp.sparsify_model(50)
    small = thin(model, example_inputs=digits())
    assert (small[0].out_channels, small[2].groups, small[2].out_channels) == (2, 2, 4)
    assert error(model, small, digits()) < 1e-10

def test_transposed_and_linear():
    model = nn.Sequential(conv(1, 4), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3), nn.ReLU(), nn.Flatten(),
                          nn.Linear(600, 8), nn.ReLU(), nn.Linear(8, 2))
    sp = coupled(model, layer_type=nn.Module)
    sp.sparsify_model(50)
    small = thin(model, example_inputs=digits())
    assert (small[0].out_channels, small[2].out_channels, small[5].in_features, small[5].out_features) == (2, 3, 300, 4)
    assert error(model, small, digits()) < 1e-10

@pytest.mark.parametrize('budget', ['params', 'flops'])
def test_budgets(budget):
    model = net()
    sp = coupled(model, 'global', budget=budget)
    sp.sparsify_model(50)
    what, zero, total = budget_used(sp.found, sp.plan, sp.budget.unit)
    weights_of = dict(stem=72 + 576, a=576, c=432, d=288)
    if budget == 'params': assert total == sum(weights_of.values())
    else: assert total == 64 * sum(weights_of.values())                 # 64 pixels everywhere
    assert 40 < 100*zero/total <= 50 and error(model, thin(model, example_inputs=digits()), digits()) < 1e-10


# -- what is left out, and what is refused ---------------------------------------------------------

def test_what_is_left_out_is_named():
    sp = coupled(net(), layer_type=(nn.Conv2d, nn.Linear))
    assert sp.left_out == {'head': 'it is the output of the model'}
    assert 'Left out:\n  head: it is the output of the model' in str(sp.report())
    sp = coupled(net(), exclude='b')
    assert list(sp.left_out) == ['stem'] and 'b.weight' in sp.left_out['stem']
    assert [t.layer for t in sp.targets] == ['a', 'c', 'd']
    model = net()
    model.unused = conv(2, 2)
    assert 'seen' in coupled(model).left_out['unused']

def test_report_counts_each_parameter_once():
    model = net()
    sp = coupled(model)
    sp.sparsify_model(50)
    r = sp.report()
    assert r.total == sum(p.numel() for p in model.parameters())
    assert [(o.name, o.groups, o.zero_groups) for o in r.rows] == [('stem', 8, 4), ('b.weight', 0, 0), ('a', 8, 4),
                                                                   ('c', 6, 3), ('d', 4, 2)]
    assert [o.layer for o in r.rows] == [f'Layer {[*model.modules()].index(m)}'
                                         for m in (model.stem, model.b, model.a, model.c, model.d)]

@pytest.mark.parametrize('kwargs, message', [
    (dict(granularity='weight'), 'filter'), (dict(granularity='kernel'), 'channel'), (dict(coupled=1), 'True or False'),
    (dict(example_inputs=None), 'example_inputs'), (dict(criteria=mean_activation), 'belong together'),
    (dict(context='output'), 'output'),
    (dict(include='stem'), 'no channel can be removed'), (dict(context='global', min_sparsity=100), 'min_sparsity')])
def test_refused(kwargs, message):
    kwargs = dict(granularity='filter', coupled=True, example_inputs=digits()) | kwargs
    with pytest.raises((TypeError, ValueError), match=message): Sparsifier(net(), **kwargs)

@pytest.mark.parametrize('context', ['local', 'global', 'lamp', 'erk'])
def test_the_last_channel_stays(context):
    model = net()
    sp, before = coupled(model, context), weights(model)
    with pytest.raises(ValueError): sp.sparsify_model(100)
    assert same(weights(model), before)
    if context == 'local': return
    with torch.no_grad(): model.c.weight.mul_(1e-6)
    sp.sparsify_model(80)                                               # of the 20 to go, 6 would be those of `c`
    assert sum(sp.found.n_pruned(sp.targets)) == 20
    assert all(n < t.groups.n for t,n in zip(sp.targets, sp.found.n_pruned(sp.targets)))

def test_nothing_is_left_on_the_model():
    model = net()
    keys, hooks = list(model.state_dict()), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    sp = pickle.loads(pickle.dumps(coupled(model)))
    assert list(model.state_dict()) == keys and not any(hooks)
    sp.sparsify_model(50)
    other = coupled(net(1))
    other.load_state_dict(sp.state_dict())
    assert all(torch.equal(m, other.masks[k]) for k,m in sp.masks.items())


# -- in training -----------------------------------------------------------------------------------

@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('criteria', ['large_final', 'gradient', 'updating_movement'])
def test_training_then_thin(context, criteria):
    learn = learner(model=net())
    cb = SparsifyCallback(50, 'filter', context, criteria, agp, coupled=True, verbose=False)
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2, cbs=cb)
    sp, x = cb.sparsifier, digits()
    assert sum(sp.found.n_pruned(sp.targets)) == 13
    small = thin(learn.model, example_inputs=x)
    gone  = dict(zip((t.layer for t in sp.targets), sp.found.n_pruned(sp.targets)))
    assert widths(small) == [8 - gone['stem'], 8 - gone['a'], 8 - gone['stem'], 6 - gone['c'], 4 - gone['d']]
    assert error(learn.model, small, x) < 1e-10

def test_on_schedule():
    learn, seen = learner(model=net()), []
    cb = SparsifyCallback(50, 'filter', schedule='iterative', coupled=True, verbose=False)
    look = spy('after_train', lambda: seen.append(cb.sparsifier.found.n_pruned(cb.sparsifier.targets)))
    with learn.no_bar(), learn.no_logging(): learn.fit(4, 1e-2, cbs=[cb, look])
    asked = [cb.plan.schedule.sparsity((e+1)/4, 50) for e in range(4)]
    assert seen == [[int(s*n/100 + 1e-9) for n in (8, 8, 6, 4)] for s in asked] and seen[-1] == [4, 4, 3, 2]

def test_refused_before_the_first_batch():
    with pytest.raises(ValueError, match='filter'): SparsifyCallback(50, coupled=True)
    learn, seen = learner(model=net()), []
    with pytest.raises(ValueError, match='this would remove every channel'):
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, cbs=[SparsifyCallback(100, 'filter', coupled=True),
                              spy('before_batch', lambda: seen.append(1))])
    assert not seen


# -- whatever the network --------------------------------------------------------------------------

@pytest.mark.parametrize('seed', range(20))
def test_anything(seed):
    "Random networks: `thin` takes out as many channels of each group as were dropped, and nothing else"
    torch.manual_seed(seed)
    model, x = lively(Anything(seed), seed), torch.randn(2, 3, 5, 5)
    try:
        sp = Sparsifier(model, 'filter', ['local', 'global'][seed % 2], layer_type=nn.Module, coupled=True,
                        example_inputs=x)
    except ValueError as e:
        assert 'no channel can be removed' in str(e)
        return
    before = {k: p.shape for k,p in model.named_parameters()}
    sp.sparsify_model(60)
    small = thin(model, example_inputs=x)
    assert error(model, small, x) < 1e-10
    now = dict(small.named_parameters())
    for g,n in zip(sp.channel_groups, sp.found.n_pruned(sp.targets)):
        for m in g.members:
            if m.role == 'producer':
                assert before[m.name][m.axis] - now[m.name].shape[m.axis] == n * before[m.name][m.axis] // g.n


# -- leaders, and heads ----------------------------------------------------------------------------

@pytest.mark.parametrize('leader', ['stem', ['stem', 'a', 'c', 'd'], 'st*'])
def test_a_leader_is_scored_alone_and_the_others_follow(leader):
    model = net()
    with torch.no_grad():
        model.stem.weight.copy_(torch.arange(8.).reshape(8, 1, 1, 1).expand(8, 1, 3, 3) + 1)
        model.b.weight.copy_(100*(8 - torch.arange(8.)).reshape(8, 1, 1, 1).expand(8, 8, 3, 3))
    sp = Sparsifier(model, 'filter', coupled=leader, example_inputs=digits())
    t  = next(t for t in sp.targets if t.name == 'stem.weight')
    assert [p.name for p in t.parts] == ['stem.weight'] and 'b.weight' in [p.name for p in t.held]
    sp.sparsify_model(50)
    for w in (model.stem.weight, model.b.weight): assert (w == 0).flatten(1).all(1).tolist() == [True]*4 + [False]*4
    x = digits()
    assert widths(thin(model, example_inputs=x)) == [4, 4, 4, 3, 2]
    assert error(model, thin(model, example_inputs=x), x) < 1e-12

def test_without_a_leader_all_are_scored():
    model = net()
    with torch.no_grad():
        model.stem.weight.copy_(torch.arange(8.).reshape(8, 1, 1, 1).expand(8, 1, 3, 3) + 1)
        model.b.weight.copy_(100*(8 - torch.arange(8.)).reshape(8, 1, 1, 1).expand(8, 8, 3, 3))
    coupled(model).sparsify_model(50)
    assert (model.stem.weight == 0).flatten(1).all(1).tolist() == [False]*4 + [True]*4

@pytest.mark.parametrize('leader, message', [('stam', "Unknown layer in `coupled` 'stam'. Did you mean 'stem'"),
                                             ([], '`coupled` is empty'), (3, '`coupled` must be True or False')])
def test_leaders_that_are_none(leader, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Sparsifier(net(), 'filter', coupled=leader, example_inputs=digits())

def test_heads_go_as_a_whole():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.), 2).eval()
    Sparsifier(model, 'head', coupled=True, layer_type=nn.MultiheadAttention).sparsify_model(50)
    x = torch.randn(2, 5, 16)
    small = thin(model, example_inputs=x)
    assert [l.self_attn.in_proj_weight.shape for l in small.layers] == [(24, 16)]*2 and error(model, small, x) < 1e-12


# -- channels, by what reads them ------------------------------------------------------------------

class Parallel(nn.Module):
    "Two layers read the same channels"
    def __init__(self):
        super().__init__()
        self.stem, self.q, self.k, self.head = conv(1, 8), conv(8, 4), conv(8, 4, bias=False), conv(4, 2)
    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((self.q(x) + self.k(x)).relu())

class Flat(nn.Module):
    "A linear layer reads four pixels of each channel"
    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.fc, self.out = conv(1, 8), nn.BatchNorm2d(8), nn.Linear(32, 6), nn.Linear(6, 2)
    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(self.bn(self.stem(x)).relu(), 2).flatten(1)
        return self.out(self.fc(x).relu())

def same_place(c): return [c]
def pixels(c): return range(4*c, 4*c + 4)
def behind(n): return lambda c: [n + c]

# for each: the model, and its groups: how many channels, what reads them (columns) and what makes them (positions on
# axis 0)
CHANNELS = dict(
    two=(lambda: nn.Sequential(conv(1, 4), nn.ReLU(), conv(4, 6), nn.ReLU(), conv(6, 2)), [
        (4, {'2.weight': same_place}, {'0.weight': same_place, '0.bias': same_place}),
        (6, {'4.weight': same_place}, {'2.weight': same_place, '2.bias': same_place})]),
    norm=(lambda: nn.Sequential(conv(1, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 2)), [
        (6, {'3.weight': same_place}, {k: same_place for k in ('0.weight', '0.bias', '1.weight', '1.bias')})]),
    parallel=(Parallel, [
        (8, {'q.weight': same_place, 'k.weight': same_place}, {'stem.weight': same_place, 'stem.bias': same_place}),
        (4, {'head.weight': same_place}, {'q.weight': same_place, 'q.bias': same_place, 'k.weight': same_place})]),
    flat=(Flat, [
        (8, {'fc.weight': pixels}, {k: same_place for k in ('stem.weight', 'stem.bias', 'bn.weight', 'bn.bias')}),
        (6, {'out.weight': same_place}, {'fc.weight': same_place, 'fc.bias': same_place})]),
    residual=(Residual, [
        (8, {k: same_place for k in ('a.weight', 'c.weight', 'd.weight')},
            {k: same_place for k in ('stem.weight', 'bn0.weight', 'bn0.bias', 'b.weight', 'bn2.weight', 'bn2.bias')}),
        (8, {'b.weight': same_place}, {k: same_place for k in ('a.weight', 'a.bias', 'bn1.weight', 'bn1.bias')}),
        (6, {'head.weight': same_place}, {k: same_place for k in ('c.weight', 'c.bias', 'bn3.weight', 'bn3.bias')}),
        (4, {'head.weight': behind(6)}, {'d.weight': same_place, 'd.bias': same_place, 'bn3.weight': behind(6),
                                         'bn3.bias': behind(6)})]))

def numbered(name):
    "The model, the numbers 1, 2, 3, ... of both signs in the weights of each layer, in another order in each"
    torch.manual_seed(0)
    model = CHANNELS[name][0]()
    with torch.no_grad():
        for p in model.parameters():
            n = torch.randperm(p.numel()) + 1.
            p.copy_((n * (-1)**n).reshape(p.shape))
    return model

def by_channel(model, context='local', criteria=large_final, **kwargs):
    return Sparsifier(model, 'channel', context, criteria,
                      **dict(layer_type=(nn.Conv2d, nn.Linear), coupled=True, example_inputs=digits()) | kwargs)

def naive_scores(weights, group):
    n, reads, _ = group
    return [torch.cat([weights[k][:, list(at(c))].flatten().abs() for k,at in reads.items()]).double().mean().item()
            for c in range(n)]

def naive_masks(weights, groups, dropped):
    masks = {}
    def of(k): return masks.setdefault(k, torch.ones(weights[k].shape, dtype=torch.bool))
    for (_, reads, makes), gone in zip(groups, dropped):
        for c in gone:
            for k,at in reads.items(): of(k)[:, list(at(c))] = False
            for k,at in makes.items(): of(k)[list(at(c))] = False
    return masks

def naive_choice(scores, sparsity, gone, context):
    "What was dropped stays so, the lowest go next, one of each group stays"
    gone = [list(g) for g in gone]
    for pool in [range(len(scores))] if context == 'global' else [[i] for i in range(len(scores))]:
        while sum(len(gone[i]) for i in pool) < exact(sum(len(scores[i]) for i in pool), sparsity):
            left = [(x, i, c) for i in pool for c,x in enumerate(scores[i])
                    if c not in gone[i] and len(gone[i]) < len(scores[i]) - 1]
            gone[min(left)[1]].append(min(left)[2])
    return gone

@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('name', CHANNELS)
def test_channels_against_a_naive_reference(name, context):
    "The masks after each of three rounds, and the weights, bit for bit"
    model, groups = numbered(name), CHANNELS[name][1]
    sp, gone = by_channel(model, context), [[] for _ in groups]
    assert [t.groups.n for t in sp.targets] == [n for n,*_ in groups]
    for sparsity in (25, 40, 60):
        before = weights(model)
        gone   = naive_choice([naive_scores(before, g) for g in groups], sparsity, gone, context)
        want   = naive_masks(before, groups, gone)
        sp.sparsify_model(sparsity)
        assert {k: m for k,m in sp.masks.items() if not m.all()}.keys() == want.keys()
        assert all(torch.equal(sp.masks[k], m) for k,m in want.items())
        assert same(weights(model), {k: v * want[k] if k in want else v for k,v in before.items()})
        assert sp.found.n_pruned(sp.targets) == list(map(len, gone))

@pytest.mark.parametrize('name', CHANNELS)
def test_channels_are_zero_and_thin_takes_out_exactly_those(name):
    model, groups, x = numbered(name), CHANNELS[name][1], digits()
    sp = by_channel(model)
    sp.sparsify_model(50)
    want, seen = {k: list(p.shape) for k,p in model.named_parameters()}, []
    for t,(n, reads, makes) in zip(sp.targets, groups):
        dead = (~sp.found.group_mask(t)).flatten().nonzero()[:, 0].tolist()
        assert len(dead) == n//2
        for k,at in reads.items():
            want[k][1] -= sum(len(at(c)) for c in dead)
            inputs = [i for c in dead for i in at(c)]
            def look(m, args, inputs=inputs): seen.append(args[0][:, inputs].count_nonzero().item())
            model.get_submodule(k.removesuffix('.weight')).register_forward_pre_hook(look)
        for k,at in makes.items(): want[k][0] -= len(dead)
    model.train()(x), model.eval()(x)
    assert seen and not any(seen)
    for m in model.modules(): m._forward_pre_hooks.clear()
    small = thin(model, example_inputs=x)
    assert {k: list(p.shape) for k,p in small.named_parameters()} == want and error(model, small, x) < 1e-10

def test_channels_by_hand():
    "Columns 2, 3, 6, 7 of two filters: their means are 2, 3 and 1"
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    with torch.no_grad(): model[1].weight.copy_(torch.tensor([[1., 6, 1], [-3, 0, 1]]))
    sp = by_channel(model, example_inputs=torch.randn(4, 2))
    assert sp.scorer.scores(sp.targets[0]).flatten().tolist() == [2, 3, 1]
    sp.sparsify_model(n=1)
    assert model[1].weight.tolist() == [[1, 6, 0], [-3, 0, 0]] and not model[0].weight[2].any()
    assert model[0].bias[2] == 0
    assert sp.left_out == {'0': 'it sums over no channels of a layer'}

def test_report_of_channels():
    model = numbered('residual')
    sp = by_channel(model)
    sp.sparsify_model(50)
    r = sp.report()
    assert r.total == sum(p.numel() for p in model.parameters())
    assert [(o.name, o.groups, o.zero_groups) for o in r.rows] == [('a', 8, 4), ('c.weight', 0, 0), ('d.weight', 0, 0),
                                                                   ('b', 8, 4), ('head', 10, 5)]
    for o in r.rows:
        w = model.get_submodule(o.name.removesuffix('.weight')).weight
        assert o.zeros == int((w == 0).sum()) and (w == 0).transpose(0, 1).flatten(1).all(1).sum() == w.shape[1]//2

def test_what_channels_are_left_out():
    sp = by_channel(numbered('residual'), layer_type=nn.Conv2d)         # the linear layer is not asked for
    assert [t.layer for t in sp.targets] == ['a', 'b']
    assert sp.left_out == {'stem': 'it sums over no channels of a layer'}
    sp = by_channel(numbered('parallel'), include=['q', 'head'])        # `k` stays dense, and reads zeros
    assert [[p.name for p in t.parts] for t in sp.targets] == [['q.weight'], ['head.weight']]
    assert 'k.weight' not in {p.name for p in sp.targets[0].held}
    sp = by_channel(numbered('residual'), exclude='c')                  # neither what it reads nor what it makes
    assert [t.layer for t in sp.targets] == ['b', 'head']
    assert [p.name for t in sp.targets for p in t.held if 'weight' in p.name] == [
        'a.weight', 'bn1.weight', 'd.weight', 'bn3.weight']
    why = 'its inputs from stem stay: they are those of c.weight too, which is left out'
    assert sp.left_out['a'] == sp.left_out['d'] == why
    assert sp.left_out['part of head'] == 'its inputs from c stay: they are those of c.weight too, which is left out'
    with pytest.raises(ValueError,
                       match='no channel can be removed. q: its inputs from stem stay: they are those of k.weight too'):
        by_channel(numbered('parallel'), exclude='k')

@pytest.mark.parametrize('model, why', [
    (nn.Sequential(conv(1, 4), nn.Sigmoid(), conv(4, 6), nn.ReLU(), conv(6, 2)), 'does not keep zero at zero'),
    (nn.Sequential(conv(1, 4), nn.Softmax(1), conv(4, 6), nn.ReLU(), conv(6, 2)), 'takes its `softmax`')])
def test_channels_that_must_stay_are_named(model, why):
    sp = by_channel(model)
    assert [t.layer for t in sp.targets] == ['4'] and why in sp.left_out['2']
    assert sp.left_out['2'].startswith('its inputs from 0 stay: ')

@pytest.mark.parametrize('leader', ['c', ['c', 'head', 'b'], ['c*']])
def test_channels_of_a_leader(leader):
    "Of the layers that read the stem, `c` alone is scored; the columns of the others go with it"
    model = numbered('residual')
    with torch.no_grad():
        model.c.weight.copy_(torch.arange(1., 9).reshape(1, 8, 1, 1).expand(6, 8, 3, 3))
        model.a.weight.copy_(100*torch.arange(8., 0, -1).reshape(1, 8, 1, 1).expand(8, 8, 3, 3))
    sp = by_channel(model, coupled=leader)
    assert [p.name for p in sp.targets[0].parts] == ['c.weight']
    assert {'a.weight', 'd.weight'} <= {p.name for p in sp.targets[0].held}
    sp.sparsify_model(50)
    assert sp.found.group_mask(sp.targets[0]).flatten().tolist() == [False]*4 + [True]*4
    for m in (model.a, model.c, model.d): assert not m.weight[:, :4].any()
    assert widths(thin(model, example_inputs=digits())) == [4, 4, 4, 3, 2]

def test_one_layer_and_back():
    "`sparsify_layer` means what a layer reads; a lower sparsity brings back only its own channels"
    model = numbered('residual')
    sp = by_channel(model)
    sp.sparsify_layer('b', 50)
    assert sp.found.n_pruned(sp.targets) == [0, 4, 0, 0]
    sp.sparsify_layer('a', 50)
    assert sp.found.n_pruned(sp.targets) == [4, 4, 0, 0]
    sp.sparsify_layer('b', 25)
    assert sp.found.n_pruned(sp.targets) == [4, 2, 0, 0] and int((~sp.masks['b.weight']).sum()) == 9*(64 - 4*6)
    sp.sparsify_layer('head', n=2)                                      # of each of the two that it reads
    assert sp.found.n_pruned(sp.targets) == [4, 2, 2, 2] and int((~sp.masks['head.weight']).sum()) == 40

@pytest.mark.parametrize('context', ['local', 'global', 'lamp', 'erk'])
@pytest.mark.parametrize('criteria', [squared_final, fpgm, random, movement])
def test_channels_in_all_contexts(context, criteria):
    if (context, criteria) == ('lamp', movement): criteria = large_final
    model, x = net(), digits()
    sp = by_channel(model, context, criteria)
    sp.sparsify_model(50)
    gone = sp.found.n_pruned(sp.targets)
    assert sum(gone) == 13
    assert widths(thin(model, example_inputs=x)) == [8 - gone[0], 8 - gone[1], 8 - gone[0], 6 - gone[2], 4 - gone[3]]
    assert error(model, thin(model, example_inputs=x), x) < 1e-10

@pytest.mark.parametrize('budget', ['params', 'flops'])
def test_channels_within_a_budget(budget):
    model = numbered('residual')
    sp = by_channel(model, 'global', budget=budget)
    sp.sparsify_model(50)
    _, zero, total = budget_used(sp.found, sp.plan, sp.budget.unit)
    columns = dict(params=9*(64 + 48 + 32) + 9*64 + 100, flops=64*9*(64 + 48 + 32) + 64*9*64 + 100)
    assert total == columns[budget] and 40 < 100*zero/total <= 50

def test_gradients_are_counted_once():
    "`head` reads channels of two targets: its sum of gradients is that of one parameter"
    model = net()
    sp = by_channel(model, criteria='gradient')
    model(digits()).sum().backward()
    sp.accumulate_gradients()
    sp.accumulate_gradients()
    for k,ref in sp.refs.items():
        torch.testing.assert_close(ref,
                                   2*sp.criteria.step_fn(model.get_parameter(k), model.get_parameter(k).grad).detach())

def test_zero_channels_are_adopted():
    model = numbered('residual')
    with torch.no_grad(): model.b.weight[:, :2] = 0; model.head.weight[:, [1, 7]] = 0
    sp = by_channel(model)
    assert sp.adopt() == 4 and sp.found.n_pruned(sp.targets) == [0, 2, 1, 1]
    sp.apply_masks()
    assert widths(thin(model, example_inputs=digits())) == [8, 6, 8, 5, 3]

def test_channels_go_on_from_a_file(tmp_path):
    model = numbered('residual')
    sp = by_channel(model, criteria=movement)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p))
    sp.sparsify_model(40)
    torch.save(dict(model=model.state_dict(), sp=sp.state_dict()), tmp_path/'state.pt')
    state, other = torch.load(tmp_path/'state.pt', weights_only=True), numbered('residual')
    other.load_state_dict(state['model'])
    again = by_channel(other, criteria=movement)
    again.load_state_dict(state['sp'])
    assert again.found.n_pruned(again.targets) == sp.found.n_pruned(sp.targets)
    for o in (sp, again): o.sparsify_model(70)
    assert dict(again.masks).keys() == dict(sp.masks).keys()
    assert all(torch.equal(again.masks[k], m) for k,m in sp.masks.items())
    assert same(weights(model), weights(other)) and len(pickle.loads(pickle.dumps(sp)).targets) == 4

@pytest.mark.parametrize('context', ['local', 'global'])
def test_channels_in_training(context):
    learn, x = learner(model=net()), digits()
    cb = SparsifyCallback(50, 'channel', context, 'large_final', agp, coupled=True,
                          layer_type=(nn.Conv2d, nn.Linear), verbose=False)
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2, cbs=cb)
    gone = cb.sparsifier.found.n_pruned(cb.sparsifier.targets)
    assert sum(gone) == 13 and (context == 'global' or gone == [4, 4, 3, 2])
    small = thin(learn.model, example_inputs=x)
    assert widths(small) == [8 - gone[0], 8 - gone[1], 8 - gone[0], 6 - gone[2], 4 - gone[3]]
    assert small.head.in_features == 10 - gone[2] - gone[3]
    assert error(learn.model, small, x) < 1e-10

@pytest.mark.parametrize('seed', range(20))
def test_channels_of_anything(seed):
    "Random networks: `thin` takes out as many channels of each group as were dropped, and nothing else"
    torch.manual_seed(seed)
    model, x = lively(Anything(seed), seed), torch.randn(2, 3, 5, 5)
    try:
        sp = Sparsifier(model, 'channel', ['local', 'global'][seed % 2], layer_type=nn.Module, coupled=True,
                        example_inputs=x)
    except ValueError as e:
        assert 'no channel can be removed' in str(e)
        return
    before = {k: p.shape for k,p in model.named_parameters()}
    sp.sparsify_model(60)
    gone = sp.found.n_pruned(sp.targets)
    assert sum(gone) == exact(sum(sp.sizes), 60) if seed % 2 else gone == [exact(n, 60) for n in sp.sizes]
    small = thin(model, example_inputs=x)
    assert error(model, small, x) < 1e-10
    lost, now = {}, dict(small.named_parameters())
    for g,n in zip(sp.channel_groups, gone):
        for m in g.members:
            lost[m.name, m.axis] = lost.get((m.name, m.axis), 0) + n * int((m.channel >= 0).sum()) // g.n
    for k,p in now.items(): assert list(p.shape) == [n - lost.get((k, i), 0) for i,n in enumerate(before[k])]


# -- in half precision, and in two processes -------------------------------------------------------

@pytest.mark.parametrize('granularity', ['filter', 'channel'])
@pytest.mark.parametrize('half', [torch.bfloat16, torch.float16])
def test_autocast(monkeypatch, half, granularity):
    "The weights stay in fp32, the layers compute in `half`; in fp16 the first steps overflow and are skipped"
    monkeypatch.setattr(fp16, 'autocast',   lambda device, **kwargs: torch.amp.autocast('cpu', **kwargs))
    monkeypatch.setattr(fp16, 'GradScaler', lambda device, **kwargs: torch.amp.GradScaler('cpu', **kwargs))
    learn, seen = learner(model=net()), set()
    learn = learn.to_bf16() if half is torch.bfloat16 else learn.to_fp16(init_scale=2.**24)
    cb = SparsifyCallback(50, granularity, coupled=True, layer_type=(nn.Conv2d, nn.Linear), verbose=False)
    def look():
        seen.add(learn.pred.dtype)
        dropped = [p[~cb.sparsifier.masks[k]] for k,p in cb.sparsifier.params.items() if k in cb.sparsifier.masks]
        assert not any(d.any() for d in dropped)
    watch = spy('after_pred', look, order=5)                            # before fastai makes it a float
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2, cbs=[cb, watch])
    assert half in seen and {p.dtype for p in learn.model.parameters()} == {torch.float32}
    small, x = thin(learn.model, example_inputs=digits()), digits()
    assert widths(small) == [4, 4, 4, 3, 2] and error(learn.model, small, x) < 1e-10

def both_train(rank, world):
    "Each process has its own digits and its own weights at first; masks and weights after each of four steps"
    found = {}
    for granularity in ('filter', 'channel'):
        for criteria in ('gradient', 'random'):
            model = DistributedDataParallel(net(seed=rank))
            torch.manual_seed(10 + rank)
            sp  = Sparsifier(model, granularity, 'global', criteria, layer_type=(nn.Conv2d, nn.Linear), coupled=True,
                             example_inputs=digits())
            opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            with sp.hold(opt):
                for sparsity in (20, 40, 30, 60):
                    nn.functional.cross_entropy(model(digits(8)), torch.randint(10, (8,))).backward()
                    opt.step()
                    opt.zero_grad()
                    sp.sparsify_model(sparsity)
                    masks = {k: m.clone() for k,m in sp.masks.items()}
                    found.setdefault((granularity, criteria), []).append((
                        sp.found.n_pruned(sp.targets), masks, {k: p.detach().clone() for k,p in sp.params.items()}))
            found[granularity, criteria].append(widths(thin(model.module, example_inputs=digits())))
    return found

if __name__ == '__main__': main([both_train])

def test_two_processes_drop_the_same(tmp_path):
    a, b = [r['both_train'][0] for r in start(__file__, 2, tmp_path)]
    assert len(a) == 4
    for case,(*steps, small) in a.items():
        *others, also = b[case]
        assert [sum(gone) for gone,*_ in steps] == [exact(26, s) for s in (20, 40, 30, 60)] and small == also
        gone = steps[-1][0]
        assert small == [8 - gone[0], 8 - gone[1], 8 - gone[0], 6 - gone[2], 4 - gone[3]]
        for (_, masks, params),(_, same_masks, same_params) in zip(steps, others):
            assert masks.keys() == same_masks.keys() and all(torch.equal(m, same_masks[k]) for k,m in masks.items())
            assert all(torch.equal(p, same_params[k]) and not p[~masks[k]].any()
                       for k,p in params.items() if k in masks)
