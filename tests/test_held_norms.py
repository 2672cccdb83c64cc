"Norms that are not torch's: held by what they do to a zero channel, or a reason in the report"
import pytest, torch, torch.nn as nn, torch.nn.functional as F

from fasterai_clone.model.flow import trace_flow
from fasterai_clone.sparse.sparsifier import Sparsifier

torchvision = pytest.importorskip('torchvision')
x = torch.rand(2, 3, 8, 8)

class ResponseNorm(nn.Module):
    "With parameters of its own, as EvoNorm or FRN"
    def __init__(self, n):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(1, n, 1, 1)), nn.Parameter(torch.ones(1, n, 1, 1))
    def forward(self, x): return x * torch.rsqrt(x.pow(2).mean((2, 3), keepdim=True) + 1e-6) * self.weight + self.bias

class Affine(nn.Module):
    "Scale and shift by other names"
    def __init__(self, n):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(n)), nn.Parameter(torch.ones(n))
    def forward(self, x): return x * self.gamma[:, None, None] + self.beta[:, None, None]

class ChannelsLast(nn.Module):
    "A layer norm behind a permutation, as ConvNeXt has it"
    def __init__(self, n):
        super().__init__()
        self.norm = nn.LayerNorm(n)
    def forward(self, x): return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

class OneShift(nn.Module):
    "One shift for all channels: nothing to hold"
    def __init__(self, n):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(1))
    def forward(self, x): return x + self.bias

class Wavy(nn.BatchNorm2d):
    "A norm of torch's with an activation in it, which makes 1/2 of 0"
    def forward(self, x): return super().forward(x).sigmoid()

held   = [torchvision.ops.FrozenBatchNorm2d, ResponseNorm, Affine, ChannelsLast, nn.BatchNorm2d,
          lambda n: nn.Sequential(nn.BatchNorm2d(n)), lambda n: nn.BatchNorm2d(n).requires_grad_(False)]
unheld = [OneShift, Wavy, lambda n: nn.BatchNorm2d(n, affine=False)]

def pruned(norm, **kwargs):
    torch.manual_seed(0)
    with torch.no_grad():
        for k,t in [*norm.named_parameters(), *norm.named_buffers()]:
            if t.is_floating_point() and 'running_' not in k: t.uniform_(.5, 1)
            elif k.endswith('running_mean'): t.uniform_(-1, -.5)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm, nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    sp = Sparsifier(net, 'filter', layer_type=nn.Conv2d, include='0', **kwargs)
    sp.sparsify_model(50)
    dropped = (net[0].weight == 0).flatten(1).all(1)
    assert dropped.sum() == 4
    with torch.no_grad(): return sp, net[:3](x)[:, dropped], net[:3](x)[:, ~dropped]

@pytest.mark.parametrize('kwargs', [{}, dict(example_inputs=x)], ids=['traced', 'with inputs'])
@pytest.mark.parametrize('norm', held)
def test_what_can_be_held_is_held_and_nothing_is_said(norm, kwargs):
    sp, gone, left = pruned(norm(8), **kwargs)
    assert not gone.any() and left.any() and '0' not in sp.why_not

@pytest.mark.parametrize('norm', unheld)
def test_what_cannot_be_held_is_reported(norm):
    sp, gone, _ = pruned(norm(8))
    assert gone.any() and '0' in sp.why_not

class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.weight, self.bias = nn.Conv2d(3, 8, 3), nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
        self.register_buffer('mean', torch.ones(8)), self.register_buffer('var', torch.ones(8))
    def forward(self, x): return F.batch_norm(self.c(x), self.mean, self.var, self.weight, self.bias)

class Moved(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.n = nn.Conv2d(3, 8, 3), nn.LayerNorm(8)
    def forward(self, x): return self.n(self.c(x).permute(0, 2, 3, 1))

@pytest.mark.parametrize('model', [Functional, Moved])
def test_a_norm_that_is_not_followed_is_reported(model):
    sp = Sparsifier(model(), 'filter')
    assert 'normalises its output' in sp.why_not['c']

def test_no_false_alarm():
    "What goes to another layer, a sum or the output keeps its zeros: nothing is said"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 2)
        def forward(self, x):
            y = self.a(x)
            return self.fc((y + self.b(y)).mean((2, 3)).flatten(1))
    assert Sparsifier(Net(), 'filter', layer_type=(nn.Conv2d, nn.Linear)).why_not == {}

def test_fused_convolution_and_norm_is_reported():
    "The norm is inside the layer, and its scale divides"
    class Fused(nn.Conv2d):
        def __init__(self, *args):
            super().__init__(*args)
            self.bn = nn.BatchNorm2d(self.out_channels)
        def forward(self, x): return self.bn(super().forward(x))
    assert '`bn`' in Sparsifier(nn.Sequential(Fused(3, 8, 3)), 'filter').why_not['0']

def test_norms_of_timm():
    pytest.importorskip('timm')
    from timm.layers import BatchNormAct2d, EvoNorm2dS0, FilterResponseNormTlu2d, LayerNorm2d
    sp, gone, _ = pruned(LayerNorm2d(8))
    assert not gone.any() and not sp.why_not
    for norm in (BatchNormAct2d(8), FilterResponseNormTlu2d(8), EvoNorm2dS0(8, groups=4)):
        sp, gone, _ = pruned(norm)
        assert not gone.any() or '0' in sp.why_not

def test_inputs_of_fastai():
    from fastai.torch_core import TensorBase
    class Looks(nn.Sequential):  # must be run
        def forward(self, x): return super().forward(x) if x.sum() > -1e9 else x
    net = Looks(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    assert trace_flow(net, x.as_subclass(TensorBase)).norms == {'0': ('1',)}


class Shifted(nn.Module):
    "Multiplies its convolution with `gain`, and adds `shift`, both of the model's own; a constant, if that is given"
    def __init__(self, shift=True, constant=None):
        super().__init__()
        self.c, self.d, self.constant = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 2, 1), constant
        self.gain, self.shift = nn.Parameter(torch.ones(4, 1, 1)), nn.Parameter(torch.ones(4, 1, 1)) if shift else None
    def forward(self, x):
        x = self.c(x) * self.gain
        if self.shift is not None: x = x + self.shift
        return self.d(x if self.constant is None else x + self.constant)

@pytest.mark.parametrize('looks', [False, True])  # followed without running, or in a run
@pytest.mark.parametrize('net, said', [(lambda: Shifted(), True), (lambda: Shifted(False), False),
                                       (lambda: Shifted(False, 1.), True)])
def test_numbers_that_the_model_itself_adds(net, said, looks):
    "What a model adds to its layer in its own `forward` is reported; what it only multiplies with is not"
    class Looks(nn.Module):
        def __init__(self): super().__init__(); self.net = net()
        def forward(self, x): return self.net(x if x.sum() > -1e9 else -x)
    model, c = (Looks(), 'net.c') if looks else (net(), 'c')
    sp = Sparsifier(model, 'filter', layer_type=nn.Conv2d, include=c, example_inputs=torch.rand(2, 3, 4, 4))
    assert (c in sp.why_not) == said and ('adds a constant' in sp.why_not.get(c, '')) == said
