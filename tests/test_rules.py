"""Rules of the trace, one small network each: what can be removed is removed exactly, and what cannot is fixed with its
reason, before training"""
import copy

import pytest, torch, torch.nn as nn, torch.nn.functional as F

from fasterai_clone.prune.all import *
from fasterai_clone.sparse.all import Sparsifier
from test_coupling import Net, conv, free, image, kept
from test_thin import error, lively


def tensors(model): return {**dict(model.named_parameters()), **dict(model.named_buffers())}

def shrunk(net, x, sparsity=50, other=None):
    "`net` without half of each group: equal to the masked one in fp64, on `other` inputs too"
    net    = lively(net)
    groups = coupled_groups(net, x)
    masks  = coupled_masks(groups, channel_scores(groups, {k: t.detach().abs() for k,t in tensors(net).items()}),
                           sparsity)
    zeros  = copy.deepcopy(net)
    masks.apply(tensors(zeros))
    small  = thin(net, masks, x)
    for y in (x, x if other is None else other):
        assert error(zeros, small, y) < 1e-10
    assert error(net, zeros, x) > 1e-6
    return small

def fixed(net, x, layer, why):
    "Is no channel of `layer` free, for this reason?"
    assert layer not in free(net, x) and why in kept(net, x).get(layer, ''), kept(net, x)


# -- several labels on one axis --------------------------------------------------------------------

class Outer(nn.Module):
    def __init__(self, *between):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(16, 4, bias=False), nn.Linear(16, 8, bias=False), nn.Linear(32, 5)
        self.between = nn.Sequential(*between)
    def forward(self, x): return self.o(self.between((self.a(x)[:, :, None]*self.b(x)[:, None, :]).flatten(1)))

def test_outer_product():
    "Channel i of `a` goes with the columns 8i … 8i+7 of `o`, channel j of `b` with j, 8+j, 16+j, 24+j"
    groups = free(Outer(), image(16))
    assert groups['a'] == {('a.weight', 0): [0, 1, 2, 3], ('o.weight', 1): [i for i in range(4) for _ in range(8)]}
    assert groups['b'] == {('b.weight', 0): [*range(8)], ('o.weight', 1): [*range(8)]*4}
    small = shrunk(Outer(), image(16), other=torch.randn(3, 16))
    assert (small.a.out_features, small.b.out_features, small.o.in_features) == (2, 4, 8)

@pytest.mark.parametrize('between', [lambda: [nn.ReLU(), nn.Dropout(0.)], lambda: [nn.BatchNorm1d(32), nn.GELU()]])
def test_outer_product_with_layers_after_it(between):
    small = shrunk(Outer(*between()), image(16))
    assert (small.a.out_features, small.b.out_features, small.o.in_features) == (2, 4, 8)
    if between()[0]._get_name() == 'BatchNorm1d': assert small.between[0].num_features == 8

def test_outer_product_in_a_convolution():
    net = Net(lambda m, x: m.o((m.a(x)[:, :, None]*m.b(x)[:, None]).flatten(1, 2)), a=conv(3, 4, bias=False),
              b=conv(3, 6, bias=False), o=conv(24, 2))
    small = shrunk(net, image())
    assert (small.a.out_channels, small.b.out_channels, small.o.in_channels) == (2, 3, 6)

def test_outer_product_added_to_one_layer():
    "Each of 32 channels of `c` would have to go with one of `a` and one of `b`: all of them together"
    net = Net(lambda m, x: m.o((m.a(x)[:, :, None]*m.b(x)[:, None, :]).flatten(1) + m.c(x)), a=nn.Linear(16, 4),
              b=nn.Linear(16, 8), c=nn.Linear(16, 32), o=nn.Linear(32, 5))
    assert all(set(c) == {0} for c in free(net, image(16))['a'].values())

def test_one_axis_of_two_in_the_other_summand():
    "`d` has 8 numbers for each of 4 that repeat: it cannot lose one of `b`"
    net = Net(lambda m, x: m.o((m.a(x)[:, :, None]*m.b(x)[:, None, :]).flatten(1) + m.a(x).repeat_interleave(8, 1)),
              a=nn.Linear(16, 4, bias=False), b=nn.Linear(16, 8, bias=False), o=nn.Linear(32, 5))
    assert 'b' not in free(net, image(16))
    assert shrunk(net, image(16)).a.out_features == 2

def test_weights_read_once_with_and_once_without():
    net = Net(lambda m, x: m.o((m.a(x)[:, :, None]*m.b(x)[:, None, :]).flatten(1)) + m.o(m.c(x)),
              a=nn.Linear(16, 4, bias=False),
              b=nn.Linear(16, 8, bias=False), c=nn.Linear(16, 32, bias=False), o=nn.Linear(32, 5))
    shrunk(net, image(16), 80)                                         # whatever goes: `thin` has nothing to refuse

def attention(m, x, heads, each, values=None):
    q, k = (t.view(*x.shape[:2], heads, each).transpose(1, 2) for t in (m.q(x), m.k(x)))
    v = m.v(x).view(*x.shape[:2], values or heads, each).transpose(1, 2)
    if values: v = v.expand(-1, q.shape[1], -1, -1)
    return m.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))

def linears(heads, values, each=4, n=16):
    return dict(q=nn.Linear(n, heads*each), k=nn.Linear(n, heads*each), v=nn.Linear(n, values*each),
                o=nn.Linear(heads*each, 5))

def test_one_set_of_values_for_all_heads():
    net = Net(lambda m, x: attention(m, x, -1, 4, 1), **linears(4, 1))
    fixed(net, torch.randn(2, 6, 16), 'v', 'sets its size explicitly with `view`')
    shrunk(net, torch.randn(2, 6, 16)) if free(net, torch.randn(2, 6, 16)) else None


# -- weights that are computed ---------------------------------------------------------------------

class StdConv(nn.Conv2d):
    "Standardises its weights as timm does"
    def forward(self, x):
        w = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None,
                         training=True).reshape_as(self.weight)
        return F.conv2d(x, w, self.bias, padding=1)

class ScaledStdConv(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args, padding=1)
        self.gain = nn.Parameter(torch.ones(args[1], 1, 1, 1))
    def forward(self, x):
        gain = (self.gain * 0.3).view(-1)
        w = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, weight=gain, training=True,
                         momentum=0.).reshape_as(self.weight)
        return F.conv2d(x, w, self.bias, padding=1)

class MeanStdConv(nn.Conv2d):
    def forward(self, x):
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (var + 1e-5).sqrt(), self.bias, padding=1)

@pytest.mark.parametrize('Conv', [StdConv, ScaledStdConv])
def test_weight_standardisation(Conv):
    "It standardises over its inputs: those stay; its outputs can go"
    net = nn.Sequential(conv(3, 6), nn.ReLU(), Conv(6, 8, 3), nn.ReLU(), conv(8, 5))
    fixed(net, image(3, 6, 6), '0', f'`2` ({Conv.__name__}) standardises over it')
    assert shrunk(net, image(3, 6, 6))[2].out_channels == 4

def test_weight_standardisation_by_mean_and_deviation():
    net = nn.Sequential(conv(3, 6), nn.ReLU(), MeanStdConv(6, 8, 3), nn.ReLU(), conv(8, 5))
    fixed(net, image(3, 6, 6), '0', '(MeanStdConv) takes its `var_mean`')
    assert shrunk(net, image(3, 6, 6))[2].out_channels == 4

def test_weights_that_are_not_zero_when_their_parameter_is():
    net = Net(lambda m, x: m.b(F.conv2d(x, m.a.weight + 1, padding=1)), a=conv(3, 4, bias=False), b=conv(4, 2))
    fixed(net, image(), 'a', 'does not keep zero at zero with `add`')
    net = Net(lambda m, x: m.b(x @ m.a.weight.T.sigmoid()), a=nn.Linear(3, 4, bias=False), b=nn.Linear(4, 2))
    fixed(net, image(3), 'a', 'does not keep zero at zero with `sigmoid`')

def test_weights_with_a_scale_for_each_output():
    "What is zero in the weights is zero in the product, whatever the scale"
    net = Net(lambda m, x: m.b(F.conv2d(x, m.scale * m.a.weight, padding=1)), a=conv(3, 4, bias=False), b=conv(4, 2))
    net.scale = nn.Parameter(torch.rand(4, 1, 1, 1) + 1)
    assert shrunk(net, image()).scale.shape == (2, 1, 1, 1)


# -- sizes that the model says itself --------------------------------------------------------------

@pytest.mark.parametrize('f, free_', [
    (lambda m, y: y.flatten(1), True), (lambda m, y: torch.flatten(y, 1), True),
    (lambda m, y: y.reshape(len(y), -1), True),
    (lambda m, y: y.view(y.size(0), -1), True), (lambda m, y: y.view(y.size(0), y.size(1)*16), True),
    (lambda m, y: y.reshape(2, y.shape[1:].numel()), True),
    (lambda m, y: y.view(2, y.shape[1]//2, 2, 16).flatten(1), True), (lambda m, y: y.view(y.shape).flatten(1), True),
    (lambda m, y: y.reshape(-1, 8*16), False), (lambda m, y: y.view(2, m.n*16), False),
    (lambda m, y: y.view(2, 8, 16).flatten(1), False),
    (lambda m, y: y.flatten(2).unflatten(1, (1, 8)).flatten(1), False),
    (lambda m, y: y.flatten(1).unflatten(1, (8, 16)).flatten(1), False),
    (lambda m, y: y.expand(2, 8, 4, 4).flatten(1), False), (lambda m, y: y.expand(2, -1, 4, 4).flatten(1), True),
    (lambda m, y: y.view_as(y).flatten(1), True),
    (lambda m, y: y[:, :8].flatten(1), True), (lambda m, y: y.narrow(1, 0, 8).flatten(1), False)])
def test_sizes(f, free_):
    net = Net(lambda m, x: m.b(f(m, m.a(x))), a=conv(3, 8), b=nn.Linear(128, 2))
    net.n = 8
    assert ('a' in free(net, image())) == free_, kept(net, image())
    if free_: shrunk(net, image())
    else:
        assert any(w in kept(net, image())['a']
                   for w in ('sets its size explicitly', 'into a fixed number of parts', 'takes a part of it'))

def test_a_size_of_another_value():
    "The number of channels of the input, which stays, is no number of the layer's own channels"
    net = Net(lambda m, x: (lambda y: m.b(m.a(y).view(2, y.shape[1], 16).flatten(1)) + m.c(y).sum())(m.s(x)),
              s=conv(3, 8), a=conv(8, 8), b=nn.Linear(128, 2), c=conv(8, 1))
    assert not {'a', 's'} & set(free(net, image()))                     # neither can lose one without the other
    net = Net(lambda m, x: (lambda y: m.b((y + m.a(y).view(2, y.shape[1], 4, 4)).flatten(1)))(m.s(x)), s=conv(3, 8),
              a=conv(8, 8), b=nn.Linear(128, 2))
    assert shrunk(net, image()).a.out_channels == 4                      # here they lose the same

def test_sizes_that_layers_know():
    "`out_channels` is changed by `thin`"
    net = Net(lambda m, x: m.b(m.a(x).view(2, m.a.out_channels, 16).flatten(1)), a=conv(3, 8), b=nn.Linear(128, 2))
    assert shrunk(net, image()).a.out_channels == 4 and type(net.a.out_channels) is int

def test_one_head():
    net = Net(lambda m, x: m.o(m.v(x).view(2, 6, 1, 8).flatten(2)), v=nn.Linear(16, 8), o=nn.Linear(8, 5))
    fixed(net, torch.randn(2, 6, 16), 'v', 'sets its size explicitly with `view`')

def test_shuffled_groups():
    "Two groups of channels, interleaved: both lose the same"
    def shuffle(m, x):
        b, c, h, w = x.shape
        return x.view(b, 2, c//2, h, w).transpose(1, 2).reshape(b, c, h, w)
    net = Net(lambda m, x: m.b(shuffle(m, m.a(x))), a=conv(3, 8), b=conv(8, 2))
    assert free(net, image())['a'][('a.weight', 0)] == [0, 1, 2, 3]*2
    assert shrunk(net, image()).a.out_channels == 4


# -- heads -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('fused', [False, True])
def test_whole_heads_where_their_number_is_open(fused):
    def forward(m, x):
        q, k, v = (f(x).view(*x.shape[:-1], -1, 4).transpose(1, 2) for f in (m.q, m.k, m.v))
        y = F.scaled_dot_product_attention(q, k, v) if fused else (q @ k.mT / 2).softmax(-1) @ v
        return m.o(y.transpose(1, 2).reshape(*x.shape[:-1], -1))
    net, x = Net(forward, **linears(4, 4)), torch.randn(2, 6, 16)
    group = free(net, x)['q']
    assert group[('v.weight', 0)] == group[('q.weight', 0)] == group[('o.weight', 1)] == [
        h for h in range(4) for _ in range(4)]
    small = shrunk(net, x, other=torch.randn(3, 5, 16))
    assert (small.q.out_features, small.v.out_features, small.o.in_features) == (8, 8, 8)

@pytest.mark.parametrize('how', ['expand', 'interleave', 'gqa'])
def test_heads_that_share_keys_and_values(how):
    "A head of keys and values goes with the two heads of queries that use it"
    def repeated(t):
        b, h, n, d = t.shape
        if how == 'expand': return t[:, :, None].expand(b, h, 2, n, d).reshape(b, 2*h, n, d)
        return t.repeat_interleave(2, 1) if how == 'interleave' else t
    def forward(m, x):
        q, k, v = (f(x).view(*x.shape[:-1], -1, 4).transpose(1, 2) for f in (m.q, m.k, m.v))
        return m.o(F.scaled_dot_product_attention(q, repeated(k), repeated(v),
                                                  enable_gqa=how == 'gqa').transpose(1, 2).flatten(2))
    net, x = Net(forward, **dict(linears(4, 2), k=nn.Linear(16, 8))), torch.randn(2, 6, 16)
    group = free(net, x)['q']
    assert group[('q.weight', 0)] == [0]*8 + [1]*8 and group[('k.weight', 0)] == group[('v.bias', 0)] == [0]*4 + [1]*4
    small = shrunk(net, x)
    assert (small.q.out_features, small.k.out_features, small.o.in_features) == (8, 4, 8)

def test_rotated_and_normalised_heads():
    "Positions and norms inside of a head do not mind whether another one is there"
    def turn(t, cos, sin): return t*cos + torch.cat([-t[..., t.shape[-1]//2:], t[..., :t.shape[-1]//2]], -1)*sin
    def norm(m, t): return t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6) * m.scale
    def forward(m, x):
        q, k, v = (f(x).view(*x.shape[:-1], -1, 4).transpose(1, 2) for f in (m.q, m.k, m.v))
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.tensor([1., .1, 1., .1], dtype=x.dtype)
        q, k  = (turn(norm(m, t), angle.cos(), angle.sin()) for t in (q, k))
        return m.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
    net = Net(forward, **linears(4, 4))
    net.scale = nn.Parameter(torch.rand(4) + 1)
    small = shrunk(net, torch.randn(2, 6, 16), other=torch.randn(2, 3, 16))
    assert small.q.out_features == 8 and small.scale.shape == (4,)

def test_heads_that_are_counted_stay():
    net, x = Net(lambda m, x: attention(m, x, 4, 4), **linears(4, 4)), torch.randn(2, 6, 16)
    fixed(net, x, 'q', 'splits it into a fixed number of parts with `view`')
    assert not free(net, x)

def test_values_may_get_shorter_where_the_length_of_a_head_is_open():
    def forward(m, x):
        q, k, v = (f(x).view(*x.shape[:2], 4, -1).transpose(1, 2) for f in (m.q, m.k, m.v))
        return m.o(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))
    net, x = Net(forward, **linears(4, 4)), torch.randn(2, 6, 16)
    assert free(net, x)['v'][('v.weight', 0)] == [0, 1, 2, 3]*4
    assert shrunk(net, x).v.out_features == 8


# -- parts of an axis ------------------------------------------------------------------------------

@pytest.mark.parametrize('parts', [lambda y: y.chunk(2, 1), lambda y: torch.split(y, y.shape[1]//2, 1),
                                   lambda y: y.tensor_split(2, 1),
                                   lambda y: (y[:, :y.shape[1]//2], y[:, y.shape[1]//2:]),
                                   lambda y: torch.split(y, [y.size(1)//2]*2, dim=1)])
def test_parts_by_their_number(parts):
    "As in C2f blocks: both halves lose the same"
    def forward(m, x):
        a, b = parts(m.a(x))
        return m.d(torch.cat([a, b, m.c(b)], 1))
    net = Net(forward, a=conv(3, 8), c=conv(4, 4), d=conv(12, 2))
    assert free(net, image())['a'][('a.weight', 0)] == [0, 1, 2, 3]*2
    small = shrunk(net, image())
    assert (small.a.out_channels, small.c.in_channels, small.d.in_channels) == (4, 2, 6)

@pytest.mark.parametrize('parts', [lambda y: y.split([4, 4], 1), lambda y: torch.split(y, 4, 1),
                                   lambda y: (y[:, :4], y[:, 4:]), lambda y: (y[:, ::2], y[:, 1::2]),
                                   lambda y: (y[:, 2:6], y[:, 4:])])
def test_parts_of_a_length_that_the_model_says(parts):
    def forward(m, x):
        a, b = parts(m.a(x))
        return m.b(a * b)
    net = Net(forward, a=conv(3, 8), b=conv(4, 2))
    fixed(net, image(), 'a', 'takes a part of it with')

def test_stacked_branches():
    "Selective kernels: two branches, each times its own softmax, are summed"
    def forward(m, x):
        y = torch.stack([m.a(x), m.b(x)], 1)
        z = m.up(m.down(y.sum(1).mean((2, 3), keepdim=True)).relu())
        b, c, h, w = z.shape
        return m.c((y * z.view(b, 2, c//2, h, w).softmax(1)).sum(1))
    net = Net(forward, a=conv(3, 6), b=conv(3, 6), down=nn.Conv2d(6, 4, 1), up=nn.Conv2d(4, 12, 1), c=conv(6, 2))
    assert free(net, image())['a'][('up.weight', 0)] == [*range(6)]*2
    small = shrunk(net, image())
    assert (small.a.out_channels, small.b.out_channels, small.up.out_channels, small.down.out_channels) == (3, 3, 6, 2)

def test_a_norm_over_an_axis():
    "`norm(p=2, dim=1)` gets the power before the axis; a channel of zeros adds nothing to it, but is the least"
    def net(p, dim):
        return Net(lambda m, x: m.b(m.a(x) / (m.a(x).norm(p=p, dim=dim, keepdim=True) + 1)), a=conv(3, 4), b=conv(4, 2))
    for p,dim in ((2, 1), (1, 1), (2, (2, 3))): assert shrunk(net(p, dim), image()).a.out_channels == 2
    for p in (-1, -torch.inf): fixed(net(p, 1), image(), 'a', 'takes its `linalg_vector_norm`')


# -- scales and shifts -----------------------------------------------------------------------------

class Affine(nn.Module):
    def __init__(self, shape, buffers=False):
        super().__init__()
        for k in ('scale', 'shift'):
            if buffers: self.register_buffer(k, torch.rand(shape) + 0.5)
            else: setattr(self, k, nn.Parameter(torch.rand(shape) + 0.5))
    def forward(self, x): return x*self.scale + self.shift

class Frozen(nn.Module):
    "As torchvision's `FrozenBatchNorm2d`, detectron2's or timm's"
    def __init__(self, n, kind):
        super().__init__()
        self.kind = kind
        for k in ('weight', 'running_var'): self.register_buffer(k, torch.rand(n) + 0.5)
        for k in ('bias', 'running_mean'): self.register_buffer(k, torch.randn(n))
    def forward(self, x):
        if self.kind == 'batch_norm':
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False)
        w, b, mean, var = (t.reshape(1, -1, 1, 1)
                           for t in (self.weight, self.bias, self.running_mean, self.running_var))
        if self.kind == 'centred': return (x - mean) / (var + 1e-5).sqrt() * w + b
        scale = w * (var + 1e-5).rsqrt()
        return x*scale + (b - mean*scale)

@pytest.mark.parametrize('shape', [(1, 6, 1, 1), (6, 1, 1)])
@pytest.mark.parametrize('buffers', [False, True])
def test_affine(shape, buffers):
    net = nn.Sequential(conv(3, 6), Affine(shape, buffers), nn.ReLU(), conv(6, 2))
    assert {m.name: m.held for m in coupled_groups(net, image())[0].members if m.name[0] == '1'} == {
        '1.scale': False, '1.shift': True}
    assert shrunk(net, image())[1].shift.numel() == 3

def test_affine_of_a_vector():
    assert shrunk(nn.Sequential(nn.Linear(3, 6), Affine(6), nn.ReLU(), nn.Linear(6, 2)),
                  image(3))[1].scale.shape == (3,)

def test_one_number_added_to_all_channels():
    fixed(nn.Sequential(conv(3, 6), nn.ReLU(), Affine(1), conv(6, 2)), image(), '0',
          '`2` (Affine) does not keep zero at zero with `add`')

@pytest.mark.parametrize('kind', ['fused', 'batch_norm', 'centred'])
def test_frozen_norms(kind):
    net  = nn.Sequential(conv(3, 8, bias=False), Frozen(8, kind), nn.ReLU(), conv(8, 2))
    held = {m.name for m in coupled_groups(net, image())[0].members if m.held}
    assert held == {'0.weight', '1.bias', '1.running_mean' if kind == 'centred' else '1.weight'}
    small = shrunk(net, image())
    assert small[0].out_channels == 4 and all(t.shape == (4,) for t in small[1].buffers())

def test_frozen_norm_held_in_training():
    "Its shift and scale are zero for what is dropped, and `thin` takes it out"
    net = lively(nn.Sequential(conv(3, 8, bias=False), Frozen(8, 'fused'), nn.ReLU(), conv(8, 2)))
    dense, sp = copy.deepcopy(net), Sparsifier(net, 'filter', coupled=True, example_inputs=image())
    sp.sparsify_model(50)
    assert int((net[1].weight == 0).sum()) == int((net[1].bias == 0).sum()) == 4
    assert thin(dense, sp.masks, image())[1].bias.shape == (4,)
    small = thin(net, example_inputs=image())
    assert small[0].out_channels == 4 and error(net, small, image()) < 1e-10

def test_frozen_norm_in_a_pruning_run():
    from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner
    items = [(torch.randn(3, 4, 4), i % 2) for i in range(8)]
    dls   = DataLoaders.from_dsets(items, items, bs=4, num_workers=0)
    net   = lively(nn.Sequential(conv(3, 8, bias=False), Frozen(8, 'fused'), nn.ReLU(), conv(8, 4),
                                 nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=PruneCallback(50, 'lin', verbose=False))
    assert net[0].out_channels == 4 and net[1].running_mean.shape == (4,)

def test_frozen_norm_of_torchvision():
    FrozenBatchNorm2d = pytest.importorskip('torchvision.ops').FrozenBatchNorm2d
    norm = FrozenBatchNorm2d(8)
    with torch.no_grad():
        for t in norm.buffers(): t.uniform_(0.5, 1.5)
    net = lively(nn.Sequential(conv(3, 8, bias=False), norm, nn.ReLU(), conv(8, 2)))
    Sparsifier(net, 'filter', coupled=True, example_inputs=image()).sparsify_model(50)
    small = thin(net, example_inputs=image())
    assert small[0].out_channels == 4 and small[1].running_var.shape == (4,) and error(net, small, image()) < 1e-10

def test_backbone_with_frozen_norms():
    "All channels of a detector's ResNet can go"
    models, ops = (pytest.importorskip(f'torchvision.{k}') for k in ('models', 'ops'))
    torch.manual_seed(0)
    net, x = lively(models.resnet18(weights=None, norm_layer=ops.FrozenBatchNorm2d)), image(3, 32, 32)
    groups = coupled_groups(net, x)
    assert [g.name for g in groups if g.why_not] == ['fc']
    assert sum(g.n for g in groups if not g.why_not) == 2*(64 + 128 + 256 + 512) + 64 + 128 + 256 + 512
    assert shrunk(net, x).layer4[1].conv2.out_channels == 256

def test_a_position_that_is_a_buffer_stays():
    "It is often computed when the model is made: zeros in it would be lost with the next file"
    net = Net(lambda m, x: m.b(m.a(x) + m.place), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    net.register_buffer('place', torch.randn(5, 4))
    fixed(net, torch.randn(2, 5, 3), 'a', 'the buffer `place` is in it')

@pytest.mark.parametrize('f', [lambda x, p: x * p, lambda x, p: (x * p).sum(-1, keepdim=True),
                               lambda x, p: (x @ p)[:, None], lambda x, p: torch.einsum('bc,c->b', x, p)[:, None]])
def test_a_parameter_for_each_channel(f):
    net = Net(lambda m, x: m.o(f(m.a(x), m.p)), a=nn.Linear(3, 6),
              o=nn.Linear(1 if f(torch.ones(2, 6), torch.ones(6)).shape[1] == 1 else 6, 2))
    net.p = nn.Parameter(torch.rand(6) + 1)
    assert set(free(net, image(3))['a']) >= {('a.weight', 0), ('a.bias', 0), ('p', 0)}
    assert shrunk(net, image(3)).p.shape == (3,)

@pytest.mark.parametrize('f', [lambda x, p: x * p, lambda x, p: x @ p])
def test_a_parameter_for_each_column_of_an_image(f):
    "Not of the channels: these are free in both"
    net = Net(lambda m, x: m.b(f(m.a(x), m.p).reshape(2, -1, 4, 4 if f(torch.ones(2, 4), torch.ones(4)).ndim > 1
                                                      else 1)), a=conv(3, 8), b=conv(8, 2))
    net.p = nn.Parameter(torch.rand(4) + 1)
    assert 'a' in free(net, image()) and shrunk(net, image()).a.out_channels == 4


def test_a_class_that_is_picked_cannot_go():
    "What `argmax` picks among are answers of the model"
    class Picks(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)
        def forward(self, x): return self.b(self.a(x).relu()).argmax(-1)
    assert [*free(Picks(), torch.randn(3, 6))] == ['a'] and '`argmax`' in kept(Picks(), torch.randn(3, 6))['b']
