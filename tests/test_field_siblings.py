"""Siblings of the reports from the field: norms over channels written by hand, numbers and weights that have another
use, outputs in any container; each in fp64 against the masked network, also without the check"""
import copy, math
from collections import deque
from types import SimpleNamespace

import pytest, torch, torch.nn as nn, torch.nn.functional as F

from fasterai_clone.analyze.all import compare, evaluate, layer_times, sensitivity
from fasterai_clone.core.masks import Masks
from fasterai_clone.export.all import export_onnx, save_sparse, sparse_layers
from fasterai_clone.methods.all import prune_trained, recalibrate, reconstruct
from fasterai_clone.model.flops import multiply_adds
from fasterai_clone.model.run import outputs_in
from fasterai_clone.prune.all import *
from fasterai_clone.sparse.all import Sparsifier
from helpers import Parts
from test_thin import lively


def free(model, x): return {g.name: g.n for g in coupled_groups(model, x) if not g.why_not}
def why_not(model, x, name): return next(g.why_not for g in coupled_groups(model, x) if g.name == name)

def halved(model, x, only=None):
    "Return the model with every second channel of the groups masked, and the model without them, which is not checked"
    groups = coupled_groups(model, x)
    keep   = [torch.arange(g.n) % 2 == 1 if not g.why_not and only in (None, g.name) else None for g in groups]
    masks, masked = group_masks(groups, keep), copy.deepcopy(model)
    Masks(masks).apply({**dict(masked.named_parameters()), **dict(masked.named_buffers())})
    return masked, thin(model, masks, x, check=False)

def assert_equal(model, x, only=None):
    masked, small = halved(model, x, only)
    with torch.no_grad(): a, b = outputs_in(masked(x)), outputs_in(small(x))
    assert [t.shape for t in a] == [t.shape for t in b]
    for s,t in zip(a, b): torch.testing.assert_close(t, s, rtol=0, atol=1e-12*float(s.abs().max()))
    return small

def made(model):
    torch.manual_seed(0)
    return lively(model.eval().double())


# -- norms by the root of a mean square -------------------------------------------------------------

class RMS(nn.Module):
    "As in Llama"
    def __init__(self, n, eps=1e-2):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(n) + 0.5), eps
    def forward(self, x): return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

class Divided(RMS):
    def forward(self, x): return x / torch.sqrt((x*x).mean(-1, True) + self.eps) * self.weight

class Power(RMS):
    def forward(self, x): return self.weight * (x * (x.square().mean(-1, True) + self.eps)**-0.5).to(x.dtype)

class OnePlus(RMS):
    "As in Gemma: the weight is one more than the parameter"
    def forward(self, x): return x * torch.rsqrt(x.pow(2).mean(-1, True) + self.eps) * (1.0 + self.weight.type_as(x))

class Called(RMS):
    def forward(self, x): return F.rms_norm(x, (x.shape[-1],), weight=self.weight, eps=self.eps)

class Width(RMS):
    "The module stores the number of its channels"
    def __init__(self, n):
        super().__init__(n)
        self.dim = n
    def forward(self, x): return torch.rms_norm(x, (self.dim,), self.weight, self.eps)

class Absolute(RMS):
    def forward(self, x): return x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.weight

class Unit(RMS):
    "A norm, to which zero channels add nothing"
    def forward(self, x): return F.normalize(x, dim=-1) * self.weight

class Length(RMS):
    def forward(self, x): return x / x.norm(dim=-1, keepdim=True).clamp(min=self.eps) * self.weight

class Largest(RMS):
    def forward(self, x): return x / x.norm(p=math.inf, dim=-1, keepdim=True) * self.weight

class Twice(RMS):
    "Two means that scale the same weight and the same number"
    def forward(self, x): return super().forward(super().forward(x))

class Early(RMS):
    "Multiplied by the weight too early: the layers that read it absorb the power"
    def forward(self, x): return (self.weight * x) / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

class Unweighted(RMS):
    def __init__(self, n):
        super().__init__(n)
        del self.weight
    def forward(self, x): return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

class NoNumber(Unweighted):
    def forward(self, x): return x / x.square().mean(-1, keepdim=True).sqrt()

class Summed(RMS):
    def forward(self, x): return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + self.eps) * self.weight

class Products(RMS):
    def forward(self, x):
        squares = torch.einsum('bsc,bsc->bs', x, x) / x.size(-1)
        return x / (squares.unsqueeze(-1) + self.eps)**0.5 * self.weight

class Sized(RMS):
    def forward(self, x): return x / (x.norm(dim=-1, keepdim=True) * x.shape[-1]**-0.5 + self.eps) * self.weight

class Dim(RMS):
    "A number that stays"
    def __init__(self, n):
        super().__init__(n)
        self.dim = n
    def forward(self, x): return x / (x.norm(2, -1, True) * self.dim**-0.5 + self.eps) * self.weight

class Rooted(RMS):
    def forward(self, x): return F.normalize(x, dim=-1) * x.shape[-1]**0.5 * self.weight

class Bounded(RMS):
    def forward(self, x): return x * x.pow(2).mean(-1, True).clamp(min=self.eps).rsqrt() * self.weight

class Buffer(RMS):
    "Its `eps` is a tensor"
    def __init__(self, n):
        super().__init__(n)
        del self.eps
        self.register_buffer('eps', torch.tensor(1e-2))
    def forward(self, x): return x * torch.rsqrt(self.eps + x.pow(2).mean(-1, True)) * self.weight

class CalledAlone(RMS):
    def forward(self, x): return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight

def torchs(n): return nn.RMSNorm(n, eps=1e-2)
def alone(n): return nn.RMSNorm(n, elementwise_affine=False)

class Stream(nn.Module):
    "A residual stream with norms on the way"
    def __init__(self, norm, n=12):
        super().__init__()
        self.emb, self.n1, self.up, self.down = nn.Linear(6, n), norm(n), nn.Linear(n, 16), nn.Linear(16, n)
        self.n2, self.head = norm(n), nn.Linear(n, 3)
    def forward(self, x):
        x = self.emb(x)
        return self.head(self.n2(x + self.down(F.silu(self.up(self.n1(x))))))

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)).double()
FOLLOWED = [RMS, Divided, Power, OnePlus, Called, Absolute, Unit, Length, Largest, Twice, torchs, nn.RMSNorm, Early,
            Unweighted, NoNumber, Summed, Products, Sized, Dim, Rooted, Bounded, Buffer, CalledAlone, alone]

@torch.no_grad()
def test_by_hand():
    "x = 3, 4, 0, 0: the mean square is 25/4, and 25/2 over the two that are left; half of the factor is in the weight"
    net = nn.Sequential(nn.Linear(1, 4, bias=False), RMS(4, eps=0.25), nn.Linear(4, 1, bias=False)).double()
    net[0].weight[:, 0] = torch.tensor([3., 4., 0., 0.])
    net[1].weight[:] = 1
    x = torch.ones(1, 1, 1).double()
    small = thin(net, example_inputs=x)
    assert small[1].eps == 0.5 and net[1].eps == 0.25
    assert small[1].weight.tolist() == pytest.approx([2**0.5]*2)
    want = [3/6.5**0.5, 4/6.5**0.5]
    assert small[1](small[0](x)).flatten().tolist() == pytest.approx(want)
    assert net[1](net[0](x)).flatten().tolist() == pytest.approx([*want, 0, 0])

@pytest.mark.parametrize('norm', FOLLOWED)
def test_a_residual_stream_loses_channels(norm, tmp_path):
    "Half of 12 channels and of 16 hidden units; also in the steps of users, and from a file"
    net = made(Stream(norm))
    assert free(net, X) == dict(emb=12, up=16)
    small = assert_equal(net, X)
    assert small.emb.weight.shape == (6, 6) and small.up.weight.shape == (8, 6)
    sp = Sparsifier(net, 'filter', layer_type=nn.Linear, coupled=True, example_inputs=X)
    sp.sparsify_model(50)
    small = thin(net, example_inputs=X)
    assert (small.emb.out_features, small.up.out_features) == (6, 8)
    torch.testing.assert_close(small(X), net(X), rtol=0, atol=1e-12)
    back = load_thinned(lambda: Stream(norm).eval().double(), save_thinned(small, tmp_path/'small'))
    assert torch.equal(back(X), small(X))

def test_the_default_eps_of_torch():
    "`eps=None` is that of the precision of the weight: 2⁻²³ for fp32, and twice that for half of the channels"
    torch.manual_seed(0)
    net   = lively(Stream(nn.RMSNorm).eval())
    small = halved(net, X.float(), 'emb')[1]
    assert small.n1.eps == 2**-22 and net.n1.eps is None and small.n1.normalized_shape == (6,)

@torch.no_grad()
def test_a_reader_absorbs_the_power_by_hand():
    "x = 3, 4, 0, 0 without a weight: the next layer is multiplied by the root of 2/4, its bias by nothing"
    net = nn.Sequential(nn.Linear(1, 4, bias=False), Unweighted(4), nn.Linear(4, 1)).double()
    net[0].weight[:, 0], net[1].eps = torch.tensor([3., 4., 0., 0.]), 0.25
    net[2].weight[:], net[2].bias[:] = 1, 5
    x = torch.ones(1, 1, 1).double()
    small = thin(net, example_inputs=x)
    assert small[1].eps == 0.5 and small[2].bias.tolist() == [5]
    assert small[2].weight.tolist() == [pytest.approx([2**0.5]*2)]
    assert small(x).item() == pytest.approx(7/6.5**0.5 + 5) and net(x).item() == pytest.approx(7/6.5**0.5 + 5)

class Read(nn.Module):
    "A norm without a weight, and what reads it"
    def __init__(self, f, n=12):
        super().__init__()
        self.emb, self.norm, self.f = nn.Linear(6, n), Unweighted(n), f
        self.a, self.b, self.w = nn.Linear(n, n), nn.Linear(n, n, bias=False), nn.Parameter(torch.randn(n))
        self.conv, self.lstm, self.out = nn.Conv1d(n, 5, 3, padding=1), nn.LSTM(n, 4), nn.Linear(n, 3)
    def forward(self, x): return self.f(self, self.emb(x))

def two(m, x): return m.out(m.a(m.norm(x)) * m.b(m.norm(x)))
def gated(m, x): return m.out(m.norm(x) * F.silu(x))
def twice(m, x): return m.out(m.norm(x) * m.norm(x))
def convolved(m, x): return m.conv(m.norm(x).transpose(1, 2))
def vector(m, x): return m.norm(x) @ m.w
def dotted(m, x): return F.scaled_dot_product_attention(m.a(m.norm(x)), m.b(m.norm(x)), m.b(m.norm(x)))
def other_size(m, x): return m.out(x * m.a(x).shape[-1]**-0.5)
def both(m, x): return m.a(m.norm(x)) + m.a(x)
def output(m, x): return m.norm(x), m.out(m.norm(x))
def stream(m, x): return m.out(m.norm(x) + x)
def recurrent(m, x): return m.lstm(m.norm(x))[0]
def rectified(m, x): return m.out(m.norm(x).relu())
def scores(m, x): return (m.norm(x) @ m.norm(x).mT).softmax(-1)
def joined(m, x): return F.linear(torch.cat([m.norm(x), x], -1), torch.cat([m.out.weight]*2, 1))
def shared(m, x): return F.linear(m.norm(x), m.w * m.out.weight)
def no_channels(m, x): return m.out(x), x.square().mean(-1) @ torch.ones(5, 2, dtype=x.dtype)

@pytest.mark.parametrize('f', [two, gated, twice, convolved, vector, dotted, other_size])
def test_readers_that_absorb_the_power(f):
    net = made(Read(f))
    assert 'emb' in free(net, X)
    assert assert_equal(net, X).emb.out_features == 6

@pytest.mark.parametrize('f', [both, output, stream, recurrent, rectified, scores, joined, shared,
                               no_channels])
def test_readers_that_do_not(f):
    net = made(Read(f))
    assert 'emb' not in free(net, X)
    assert_equal(net, X)

class Reused(RMS):
    def forward(self, x): return super().forward(x) * (1 + x.sum(-1, True).clamp(min=self.eps))
class Computed(RMS):
    def forward(self, x): return super().forward(x) * (self.eps*3 + 1)
class Elsewhere(RMS):
    def forward(self, x): return super().forward(x) * F.layer_norm(x.sum(-1), (5,), eps=self.eps)[..., None]
class AddedTwice(RMS):
    def forward(self, x): return super().forward(x) * (x.sum(-1, True) + self.eps)
class OtherWeight(RMS):
    def forward(self, x): return super().forward(x) + x * self.weight
class OneAndAnother(RMS):
    def forward(self, x):
        w = 1 + self.weight
        return x * torch.rsqrt(x.pow(2).mean(-1, True) + self.eps) * w + x * w
class Literal(RMS):
    def forward(self, x): return x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-6) * self.weight
class Config(RMS):
    def __init__(self, n):
        super().__init__(n)
        self.config = SimpleNamespace(eps=1e-2)
    def forward(self, x): return x * torch.rsqrt(x.pow(2).mean(-1, True) + self.config.eps) * self.weight
class LiteralBound(RMS):
    def forward(self, x): return x * x.pow(2).mean(-1, True).clamp(min=1e-6).rsqrt() * self.weight
class LiteralCall(RMS):
    def forward(self, x): return F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)
class DefaultCall(RMS):
    def forward(self, x): return F.rms_norm(x, x.shape[-1:], self.weight)
class LayerNorm(RMS):
    "Zero channels are not zero without the mean, and they count in the variance"
    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
class Variance(RMS):
    def forward(self, x):
        var, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
        return (x - mean) * torch.rsqrt(var + self.eps) * self.weight
class EarlyShifted(Early):
    def __init__(self, n):
        super().__init__(n)
        self.bias = nn.Parameter(torch.randn(n))
    def forward(self, x): return super().forward(x) + self.bias
class Rectified(Unweighted):
    def forward(self, x): return super().forward(x).sigmoid() * x
class Root(RMS):
    def forward(self, x): return F.normalize(x, dim=-1) * math.sqrt(x.shape[-1]) * self.weight
class Exponential(RMS):
    def forward(self, x): return F.normalize(x, dim=-1) * math.exp(x.shape[-1]**-0.5) * self.weight
class WeightBuffer(RMS):
    "A weight that is a buffer has another use"
    def __init__(self, n):
        super().__init__(n)
        del self.weight
        self.register_buffer('weight', torch.rand(n) + 0.5)
    def forward(self, x): return super().forward(x) + x * self.weight
class Smallest(RMS):
    def forward(self, x): return x * x.norm(p=-math.inf, dim=-1, keepdim=True) * self.weight

@pytest.mark.parametrize('norm,why', [
    (Reused, 'also calculates with `eps`'), (Computed, 'also calculates with `eps`'),
    (Elsewhere, 'also calculates with `eps`'), (AddedTwice, 'also calculates with `eps`'),
    (OtherWeight, 'also uses `n1.weight` without their mean'), (OneAndAnother, 'also uses `n1.weight`'),
    (Literal, 'adds a number to their mean that is not an attribute like `self.eps`'),
    (Config, 'adds a number to their mean that is not an attribute like `self.eps`'),
    (LiteralBound, 'bounds their mean by a number that is not an attribute like `self.eps`'),
    (LiteralCall, 'with an `eps` that is not an attribute like `self.eps`'),
    (DefaultCall, 'without an `eps` that is an attribute like `self.eps`'),
    (LayerNorm, 'adds other values to what it computed from their mean'), (Variance, 'takes its `var_mean`'),
    (EarlyShifted, 'adds other values to what it computed from their mean'), (Rectified, 'takes its `mean`'),
    (Root, 'calculates with its size'), (Exponential, 'calculates with its size'),
    (WeightBuffer, 'also uses `n1.weight` without their mean'), (Smallest, 'takes its `linalg_vector_norm`'),
    (Width, 'sets its size explicitly with `rms_norm`')])
def test_a_stream_that_stays(norm, why):
    "The trace sees it: no trial is needed"
    net = made(Stream(norm))
    assert why in why_not(net, X, 'emb') and free(net, X) == dict(up=16)
    assert_equal(net, X)


# -- numbers that the model calculates with ---------------------------------------------------------

class Scaled(nn.Module):
    "A size, or a number that a module stores, is a factor"
    def __init__(self, f):
        super().__init__()
        self.dim, self.f = 16, f
        self.v, self.o, self.out = nn.Linear(6, 16), nn.Linear(16, 8), nn.Linear(8, 3)
    def forward(self, x): return self.out(self.o(self.f(self, self.v(x).view(-1, self.dim)).relu()))

def by_root(m, y): return y / m.dim**0.5
def by_math(m, y): return y / math.sqrt(m.dim)
def by_number(m, y): return y * m.dim
def by_shape(m, y): return y / y.shape[-1]**0.5
def by_two(m, y): return y / math.sqrt(2*y.size(-1))
def by_layer(m, y): return y / m.v.out_features
def by_tensor(m, y): return y / torch.tensor(y.shape[-1])
def by_weight(m, y): return y / m.o.weight.sum()

@pytest.mark.parametrize('f', [by_root, by_math, by_number, by_shape, by_two, by_layer, by_tensor, by_weight])
def test_what_would_be_another_number_stays(f):
    net = made(Scaled(f))
    assert free(net, X) == dict(o=8)
    assert_equal(net, X)

def by_own_weight(m, y): return y / m.v.weight.sum()
def by_none(m, y): return y
@pytest.mark.parametrize('f', [by_own_weight, by_none])
def test_what_is_the_same_number_goes(f):
    "Rows that are zero add nothing to the sum of the weights; a size that is only that of a view is changed"
    net = made(Scaled(f))
    assert free(net, X) == dict(v=16, o=8)
    assert assert_equal(net, X).dim == 8

class Copying(nn.Module):
    "Copies the numbers that it stores"
    def __init__(self):
        super().__init__()
        self.sizes, self.eps, self.a, self.b = [4, 4], 1e-3, nn.Linear(6, 8), nn.Linear(8, 3)
    def forward(self, x): return self.b(self.a(x)) + sum(copy.deepcopy(self.sizes)) + copy.copy(self.eps)

def test_numbers_can_be_copied_while_the_model_runs(): assert free(made(Copying()), X) == dict(a=8)


# -- values that follow the size of others ----------------------------------------------------------

class Gate(nn.Module):
    "One gate for all channels"
    def __init__(self, f):
        super().__init__()
        self.f, self.a, self.g = f, nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1)
        self.b, self.c = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)
    def forward(self, x):
        x = self.a(x).relu()
        return self.c(self.b(x * self.f(self.g(x).sigmoid(), x)).relu())

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
def like(g, x): return g.expand_as(x)
def sizes(g, x): return g.expand(-1, x.shape[1], -1, -1)
def number(g, x): return g.expand(-1, 8, -1, -1)
def copied(g, x): return g.expand_as(x).contiguous()

@pytest.mark.parametrize('f,n', [(like, 8), (sizes, 8), (number, None), (copied, None)])
def test_a_gate_that_is_expanded(f, n):
    net = made(Gate(f))
    assert free(net, IMAGE).get('a') == n
    assert_equal(net, IMAGE)

class Shuffled(nn.Module):
    "Two groups of a convolution, shuffled"
    def __init__(self, groups, shuffles):
        super().__init__()
        self.a, self.g = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=groups)
        self.sh, self.b, self.c = nn.ChannelShuffle(shuffles), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)
    def forward(self, x): return self.c(self.b(self.sh(self.g(self.a(x).relu()))).relu())

@pytest.mark.parametrize('groups,shuffles,n', [(1, 2, dict(a=8, g=4)), (2, 2, dict(a=4, g=4)), (1, 4, dict(a=8, g=2))])
def test_channel_shuffle(groups, shuffles, n):
    "Each part that is shuffled loses the same channels"
    net = made(Shuffled(groups, shuffles))
    assert free(net, IMAGE) == dict(**n, b=6)
    assert_equal(net, IMAGE)


# -- outputs ----------------------------------------------------------------------------------------

class Returning(nn.Module):
    "Two layers of features, of which the second leave the model"
    def __init__(self, f):
        super().__init__()
        self.f, self.a, self.b, self.c = f, nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)
    def forward(self, x):
        y = self.b(self.a(x).relu()).relu()
        return self.f(y, self.c(y))

def generator(y, z): return (t for t in (y, z))
def mapped(y, z): return z, map(torch.clone, [y])
def chained(y, z): return dict(z=z, more=[iter((y,))])
def queue(y, z): return deque([y, z])
def values(y, z): return dict(y=y, z=z).values()
def array(y, z): return z, y.detach().numpy()
def numbers(y, z): return z, y.tolist()
def nested(y, z): return z, torch.nested.nested_tensor([*y], layout=torch.jagged)

@pytest.mark.parametrize('f', [generator, mapped, chained, queue, values, array, numbers, nested])
def test_features_that_leave_the_model_stay(f):
    net = made(Returning(f))
    assert free(net, X) == dict(a=8)
    groups = coupled_groups(net, X)
    masks  = group_masks(groups, [None if g.why_not else torch.arange(g.n) % 2 == 1 for g in groups])
    small  = thin(net, masks, X)  # which compares the outputs
    assert (small.a.out_features, small.b.out_features) == (4, 5)

def test_multiply_adds_of_a_generator():
    "Its steps run when it is read"
    class Late(Returning):
        def forward(self, x): return (m(x) for m in (self.a, self.a))
    assert multiply_adds(Late(None), torch.randn(4, 6)).total == 2*6*8


# -- configs ----------------------------------------------------------------------------------------

def language_model(name, **more):
    transformers = pytest.importorskip('transformers')
    config = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, **more)
    torch.manual_seed(0)
    return lively(getattr(transformers, f'{name}ForCausalLM')(getattr(transformers, f'{name}Config')(**config)).eval())

def without_half(model, ids):
    "Return the masked model and the one without half of the channels of its residual stream"
    groups = coupled_groups(model, ids)
    stream = [g for g in groups if not g.why_not and g.n == 16 and g.kind is None]
    assert len(stream) == 1
    masks = group_masks(groups, [torch.arange(16) % 2 == 1 if g is stream[0] else None for g in groups])
    small, masked = thin(model, masks, ids), copy.deepcopy(model)
    Masks(masks).apply(dict(masked.named_parameters(remove_duplicate=False)))
    return masked, small

def test_the_residual_stream_of_llama(tmp_path):
    "Also the config has half of the channels, and twice the `eps`"
    ids = torch.arange(16).reshape(2, 8)
    model = language_model('Llama', rms_norm_eps=1e-3)
    masked, small = without_half(model, ids)
    assert (small.config.hidden_size, small.config.rms_norm_eps, model.config.hidden_size) == (8, 2e-3, 16)
    torch.testing.assert_close(small.double()(ids).logits, masked.double()(ids).logits, rtol=0, atol=1e-6)
    small.float().save_pretrained(tmp_path)
    back = type(small).from_pretrained(tmp_path)
    assert torch.equal(back(ids).logits, small(ids).logits)

def test_what_a_config_computes_is_said():
    "Gemma multiplies its embeddings by the root of their width: a model created from the config has another factor"
    ids = torch.arange(16).reshape(2, 8)
    model = language_model('Gemma', head_dim=4)
    with pytest.warns(UserWarning, match='cannot describe `model.embed_tokens.scalar_embed_scale`.*`save_thinned`'):
        masked, small = without_half(model, ids)
    torch.testing.assert_close(small(ids).logits, masked(ids).logits, rtol=0, atol=1e-5)


# -- zeros that are taken over ----------------------------------------------------------------------

def test_the_second_group_of_a_layer_is_adopted_after_the_first():
    "Both groups of `a` share one mask; that of the first does not hide the zeros of the second"
    torch.manual_seed(0)
    net = Parts()
    sp  = Sparsifier(net, 'filter', coupled=True, example_inputs=torch.randn(2, 3, 4, 4))
    first, second = [i for i,t in enumerate(sp.targets) if t.layer == 'a']
    with torch.no_grad(): net.a.weight[:2], net.a.bias[:2] = 0, 0
    assert sp.found.adopt([[first]]) == 2 and sp.found.n_pruned(sp.targets)[:2] == [2, 0]
    with torch.no_grad(): net.a.weight[4:7], net.a.bias[4:7] = 0, 0
    assert sp.found.adopt([[first], [second]]) == 3 and sp.found.n_pruned(sp.targets)[:2] == [2, 3]
    assert int((~sp.masks['a.weight'].flatten(1).any(1)).sum()) == 5


# -- multiply-adds ----------------------------------------------------------------------------------

class Experts(nn.Module):
    "One of two experts for each item"
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
    def forward(self, x):
        first, out = x[:, 0] > 0, torch.empty_like(x)
        out[first], out[~first] = self.a(x[first]), self.b(x[~first])
        return out

def test_the_total_of_experts_is_rounded_once():
    "16 and 32 multiply-adds for three items: 5.3 and 10.7 for one, and 16 in all"
    n = multiply_adds(Experts(), torch.rand(3, 4) - torch.tensor([[0.], [2.], [2.]]))
    assert dict(n) == dict(a=5, b=10) and n.total == 16 and n.items == 3


# -- weights on the device "meta" -------------------------------------------------------------------

IMAGES = torch.randn(2, 3, 6, 6)
def accuracy(out, y): return (out.argmax(1) == y).float().mean()
def small(**kwargs): return nn.Sequential(nn.Conv2d(3, 4, 3, **kwargs), nn.Flatten(), nn.Linear(64, 2, **kwargs))
DATA = [(IMAGES, torch.tensor([0, 1]))]

@pytest.mark.parametrize('f', [
    lambda m, path: coupled_groups(m, IMAGES), lambda m, path: multiply_adds(m, IMAGES),
    lambda m, path: multiply_adds(m, IMAGES.to('meta')), lambda m, path: thin(m, example_inputs=IMAGES),
    lambda m, path: unremovable(m, coupled_groups(small(), IMAGES), IMAGES), lambda m, path: compare(m, m, IMAGES),
    lambda m, path: compare(small(), m, IMAGES), lambda m, path: sensitivity(m, DATA, accuracy),
    lambda m, path: evaluate(m, DATA, accuracy), lambda m, path: layer_times(m, IMAGES),
    lambda m, path: recalibrate(m, DATA), lambda m, path: prune_trained(m, DATA, 50),
    lambda m, path: reconstruct(m, Masks.of(small()), DATA), lambda m, path: save_thinned(m, path/'small'),
    lambda m, path: save_sparse(m, path/'sparse'), lambda m, path: sparse_layers(m, IMAGES),
    lambda m, path: export_onnx(m, IMAGES, path/'net.onnx')])
def test_weights_without_numbers_are_refused_alike(f, tmp_path):
    with pytest.raises(ValueError, match='is on the device "meta" and has no numbers. Load the weights first'):
        f(small(device='meta'), tmp_path)
    assert not [*tmp_path.iterdir()]
