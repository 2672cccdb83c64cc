"Filters that meet in sums are masked together during training, and `thin` takes out exactly those"
import copy, pickle

import pytest, torch, torch.nn as nn
from helpers import column, learner, same, spy, weights
from fasterai_clone.core.measure import mean_activation
from fasterai_clone.prune.all import thin
from fasterai_clone.sparse.all import *
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


# -- which filters go together -----------------------------------------------------------------------------------------------------------

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
    torch.testing.assert_close(sp._scores(sp.targets[0]).flatten(), (9*1 + 72*torch.arange(8.)) / 81)
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
    gone = {t.layer: int((~sp._group_mask(t)).sum()) for t in sp.targets}
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
    model = nn.Sequential(conv(1, 4), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(600, 8), nn.ReLU(), nn.Linear(8, 2))
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
    what, zero, total = sp._budget_used()
    weights_of = dict(stem=72 + 576, a=576, c=432, d=288)
    if budget == 'params': assert total == sum(weights_of.values())
    else: assert total == 64 * sum(weights_of.values())                 # 64 pixels everywhere
    assert 40 < 100*zero/total <= 50 and error(model, thin(model, example_inputs=digits()), digits()) < 1e-10


# -- what is left out, and what is refused -----------------------------------------------------------------------------------------------

def test_what_is_left_out_is_named():
    sp = coupled(net(), layer_type=(nn.Conv2d, nn.Linear))
    assert sp.left_out == {'head': 'it is the output of the model'}
    assert 'Left out:\n  head: it is the output of the model' in str(sp.report())
    sp = coupled(net(), exclude='b')
    assert list(sp.left_out) == ['stem'] and 'b.weight' in sp.left_out['stem'] and [t.layer for t in sp.targets] == ['a', 'c', 'd']
    model = net()
    model.unused = conv(2, 2)
    assert 'seen' in coupled(model).left_out['unused']

def test_report_counts_each_parameter_once():
    model = net()
    sp = coupled(model)
    sp.sparsify_model(50)
    r = sp.report()
    assert r.total == sum(p.numel() for p in model.parameters())
    assert [(o.name, o.groups, o.zero_groups) for o in r.rows] == [('stem', 8, 4), ('b.weight', 0, 0), ('a', 8, 4), ('c', 6, 3), ('d', 4, 2)]
    assert [o.layer for o in r.rows] == [f'Layer {[*model.modules()].index(m)}' for m in (model.stem, model.b, model.a, model.c, model.d)]

@pytest.mark.parametrize('kwargs, message', [
    (dict(granularity='weight'), 'filter'), (dict(granularity='channel'), 'filter'), (dict(coupled=1), 'True or False'),
    (dict(example_inputs=None), 'example_inputs'), (dict(criteria=mean_activation), 'go together'), (dict(context='output'), 'output'),
    (dict(include='stem'), 'no channel can go'), (dict(context='global', min_sparsity=100), 'min_sparsity')])
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
    assert sum(sp._gone(sp.targets)) == 20 and all(n < t.groups.n for t,n in zip(sp.targets, sp._gone(sp.targets)))

def test_nothing_is_left_on_the_model():
    model = net()
    keys, hooks = list(model.state_dict()), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    sp = pickle.loads(pickle.dumps(coupled(model)))
    assert list(model.state_dict()) == keys and not any(hooks)
    sp.sparsify_model(50)
    other = coupled(net(1))
    other.load_state_dict(sp.state_dict())
    assert all(torch.equal(m, other.masks[k]) for k,m in sp.masks.items())


# -- in training -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('criteria', ['large_final', 'gradient', 'updating_movement'])
def test_training_then_thin(context, criteria):
    learn = learner(model=net())
    cb = SparsifyCallback(50, 'filter', context, criteria, agp, coupled=True, verbose=False)
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2, cbs=cb)
    sp, x = cb.sparsifier, digits()
    assert sum(sp._gone(sp.targets)) == 13
    small = thin(learn.model, example_inputs=x)
    gone  = dict(zip((t.layer for t in sp.targets), sp._gone(sp.targets)))
    assert widths(small) == [8 - gone['stem'], 8 - gone['a'], 8 - gone['stem'], 6 - gone['c'], 4 - gone['d']]
    assert error(learn.model, small, x) < 1e-10

def test_on_schedule():
    learn, seen = learner(model=net()), []
    cb = SparsifyCallback(50, 'filter', schedule='iterative', coupled=True, verbose=False)
    look = spy('after_train', lambda: seen.append(cb.sparsifier._gone(cb.sparsifier.targets)))
    with learn.no_bar(), learn.no_logging(): learn.fit(4, 1e-2, cbs=[cb, look])
    asked = [cb._curve.sparsity((e+1)/4, 50) for e in range(4)]
    assert seen == [[int(s*n/100 + 1e-9) for n in (8, 8, 6, 4)] for s in asked] and seen[-1] == [4, 4, 3, 2]

def test_refused_before_the_first_batch():
    with pytest.raises(ValueError, match='filter'): SparsifyCallback(50, coupled=True)
    learn, seen = learner(model=net()), []
    with pytest.raises(ValueError, match='no channel would be left'):
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[SparsifyCallback(100, 'filter', coupled=True), spy('before_batch', lambda: seen.append(1))])
    assert not seen


# -- whatever the network ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('seed', range(20))
def test_anything(seed):
    "Random networks: `thin` takes out as many channels of each group as were dropped, and nothing else"
    torch.manual_seed(seed)
    model, x = lively(Anything(seed), seed), torch.randn(2, 3, 5, 5)
    try: sp = Sparsifier(model, 'filter', ['local', 'global'][seed % 2], layer_type=nn.Module, coupled=True, example_inputs=x)
    except ValueError as e:
        assert 'no channel can go' in str(e)
        return
    before = {k: p.shape for k,p in model.named_parameters()}
    sp.sparsify_model(60)
    small = thin(model, example_inputs=x)
    assert error(model, small, x) < 1e-10
    now = dict(small.named_parameters())
    for g,n in zip(sp.channel_groups, sp._gone(sp.targets)):
        for m in g.members:
            if m.role == 'producer': assert before[m.name][m.axis] - now[m.name].shape[m.axis] == n * before[m.name][m.axis] // g.n


# -- leaders, and heads -------------------------------------------------------------------------------------------------------------------

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
    assert widths(thin(model, example_inputs=x)) == [4, 4, 4, 3, 2] and error(model, thin(model, example_inputs=x), x) < 1e-12

def test_without_a_leader_all_are_scored():
    model = net()
    with torch.no_grad():
        model.stem.weight.copy_(torch.arange(8.).reshape(8, 1, 1, 1).expand(8, 1, 3, 3) + 1)
        model.b.weight.copy_(100*(8 - torch.arange(8.)).reshape(8, 1, 1, 1).expand(8, 8, 3, 3))
    coupled(model).sparsify_model(50)
    assert (model.stem.weight == 0).flatten(1).all(1).tolist() == [False]*4 + [True]*4

@pytest.mark.parametrize('leader, message', [('stam', "Unknown layer in `coupled` 'stam'. Did you mean 'stem'"), ([], '`coupled` is empty'), (3, '`coupled` must be True or False')])
def test_leaders_that_are_none(leader, message):
    with pytest.raises((TypeError, ValueError), match=message): Sparsifier(net(), 'filter', coupled=leader, example_inputs=digits())

def test_heads_go_as_a_whole():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.), 2).eval()
    Sparsifier(model, 'head', coupled=True, layer_type=nn.MultiheadAttention).sparsify_model(50)
    x = torch.randn(2, 5, 16)
    small = thin(model, example_inputs=x)
    assert [l.self_attn.in_proj_weight.shape for l in small.layers] == [(24, 16)]*2 and error(model, small, x) < 1e-12
