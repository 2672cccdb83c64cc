"The thinned model computes the same: small networks by hand, the usual architectures, files, and what is refused"
import copy, json, pickle, random

import pytest, torch, torch.nn as nn, torch.nn.functional as F
from safetensors import safe_open

from fasterai_clone.prune.all import *
from fasterai_clone.sparse.all import Masks, Sparsifier
from test_coupling import Net, conv, image


def scores(model): return {k: p.detach().abs() for k,p in model.named_parameters()}
def n_params(model): return sum(p.numel() for p in model.parameters())

def lively(model, seed=0):
    "`model` with random norms and no zeros among its weights, so that nothing is equal by chance; without dropout"
    torch.manual_seed(seed)
    for m in model.modules():
        if isinstance(m, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)) and m.weight is not None:
            nn.init.uniform_(m.weight, 0.5, 1.5), nn.init.normal_(m.bias, std=0.3)
        if getattr(m, 'running_mean', None) is not None:
            nn.init.normal_(m.running_mean, std=0.3), nn.init.uniform_(m.running_var, 0.5, 1.5)
        if isinstance(m, nn.modules.dropout._DropoutNd): m.p = 0.
        if type(m).__name__ == 'StochasticDepth': m.p = 0.
        if isinstance(m, nn.MultiheadAttention): m.dropout = 0.
    for k,p in model.named_parameters():
        if 'layer_scale' in k: nn.init.uniform_(p, 0.5, 1.5)
        elif p.ndim == 1 and not p.count_nonzero(): nn.init.normal_(p, std=0.1)
        elif not p.count_nonzero(): nn.init.normal_(p, std=0.02)
    return model

def masked(model, masks):
    "A copy of `model` with the masks applied"
    model = copy.deepcopy(model)
    masks.apply(dict(model.named_parameters()))
    return model

def dropping(model, x, sparsity=50, context='local'):
    groups = coupled_groups(model, x)
    return coupled_masks(groups, channel_scores(groups, scores(model)), sparsity, context)

@torch.no_grad()
def error(a, b, x, training=False, dtype=torch.float64):
    "The largest difference of outputs of copies of `a` and `b`, relative to the largest output"
    with torch.random.fork_rng():
        outs = []
        for m in (a, b):
            torch.manual_seed(0)
            m = copy.deepcopy(m).to(dtype).train(training)
            out = m(*[t.to(dtype) for t in x]) if isinstance(x, tuple) else m(x.to(dtype))
            outs.append(out if isinstance(out, torch.Tensor) else out[0])
    assert outs[0].shape == outs[1].shape and outs[0].count_nonzero()
    return ((outs[0] - outs[1]).abs().max() / outs[0].abs().max()).item()

@torch.no_grad()
def between(a, b, x):
    "The same of the models themselves: large ones are not copied"
    x, y = a(x), b(x)
    assert x.shape == y.shape and x.count_nonzero()
    return ((x - y).abs().max() / x.abs().max()).item()

def check(model, x, sparsity=50, context='local', other=None):
    "The law, for one model: the thinned one"
    model = lively(model)
    masks = dropping(model, x, sparsity, context)
    zeros, before = masked(model, masks), weights(model)
    small = thin(model, masks, x)
    for x in [x] if other is None else [x, other]:
        for training in (False, True):
            assert error(zeros, small, x, training) < 1e-10
            assert error(zeros, small, x, training, torch.float32) < 1e-5
    assert error(model, zeros, x) > 1e-3                                     # the masks do something
    assert [n for n,_ in small.named_modules()] == [n for n,_ in model.named_modules()]
    assert list(small.state_dict()) == list(model.state_dict()) and n_params(small) < n_params(model)
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
    return small

def weights(model): return {k: v.detach().clone() for k,v in model.state_dict().items()}


# -- by hand ---------------------------------------------------------------------------------------

def test_two_convolutions():
    net = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2))
    with torch.no_grad(): net[0].weight[[0, 2]], net[0].bias[[0, 2]] = 0, 0
    small = thin(net, example_inputs=image())
    assert torch.equal(small[0].weight, net[0].weight[[1, 3]]) and torch.equal(small[0].bias, net[0].bias[[1, 3]])
    assert torch.equal(small[2].weight, net[2].weight[:, [1, 3]]) and torch.equal(small[2].bias, net[2].bias)
    assert (small[0].out_channels, small[2].in_channels) == (2, 2) and net[0].out_channels == 4

@pytest.mark.parametrize('left', ['0.weight', '0.bias', '1.weight', '1.bias'])
def test_all_that_makes_a_channel_must_be_zero(left):
    net = lively(nn.Sequential(conv(3, 2), nn.BatchNorm2d(2), conv(2, 2)))
    with torch.no_grad():
        for k,p in net.named_parameters():
            if k in {'0.weight', '0.bias', '1.weight', '1.bias'} - {left}: p[0] = 0
    assert thin(net, example_inputs=image())[0].out_channels == 2
    with torch.no_grad(): dict(net.named_parameters())[left][0] = 0
    assert thin(net, example_inputs=image())[0].out_channels == 1

def test_one_channel_is_left():
    net = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2))
    with torch.no_grad(): net[0].weight.zero_(), net[0].bias.zero_()
    small = thin(net, example_inputs=image())
    assert small[0].out_channels == 1 and torch.equal(small(x := image()), net(x))

def test_one_channel_is_left_of_a_concatenation():
    net = Net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), a=conv(3, 2), b=conv(3, 3), c=conv(5, 2))
    with torch.no_grad():
        for p in (*net.a.parameters(), *net.b.parameters()): p.zero_()
    small = thin(net, example_inputs=image())
    assert (small.a.out_channels, small.b.out_channels, small.c.in_channels) == (1, 1, 2)

def test_parallel_consumers_residuals_concatenations():
    class Everything(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = conv(3, 8), conv(8, 8), conv(8, 6), conv(14, 5)
            self.bn, self.head = nn.BatchNorm2d(8), nn.Linear(5*16, 3)
        def forward(self, x):
            a = self.a(x).relu()
            y = a + self.bn(self.b(a)).relu()
            return self.head(self.d(torch.cat([y, self.c(a).relu()], 1)).relu().flatten(1))
    small = check(Everything(), image(), other=torch.randn(5, 3, 4, 4))
    assert (small.a.out_channels, small.b.out_channels, small.c.out_channels, small.d.in_channels,
            small.head.in_features) == (4, 4, 3, 7, 3*16)

@pytest.mark.parametrize('groups', [2, 4, 8])
@pytest.mark.parametrize('Conv', [nn.Conv2d, nn.ConvTranspose2d])
def test_grouped(groups, Conv):
    small = check(nn.Sequential(conv(3, 8), nn.ReLU(), Conv(8, 16, 3, groups=groups), nn.ReLU(), conv(16, 2)),
                  image(3, 6, 6))
    assert (small[2].groups, small[2].in_channels, small[2].out_channels) == (groups//2, 4, 8)

@pytest.mark.parametrize('norm', [nn.BatchNorm2d(8), nn.GroupNorm(4, 8), nn.GroupNorm(8, 8), nn.InstanceNorm2d(8),
                                  nn.InstanceNorm2d(8, affine=True),
                                  nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
                                  nn.BatchNorm2d(8, track_running_stats=False)])
def test_norms(norm):
    small = check(nn.Sequential(conv(3, 8), norm, nn.ReLU(), conv(8, 2)), image(3, 6, 6))
    assert small[0].out_channels == 4
    if isinstance(norm, nn.modules.batchnorm._NormBase): assert small[1].num_features == 4
    if isinstance(norm, nn.GroupNorm): assert (small[1].num_groups, small[1].num_channels) == (norm.num_groups//2, 4)

def test_statistics_learn_as_before():
    "After a step in train mode the running statistics are those of the channels that are left"
    net   = lively(nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 2)))
    masks = dropping(net, image())
    zeros, small = masked(net, masks).train(), thin(net, masks, image()).train()
    left, x = masks['1.weight'], image()
    zeros(x), small(x)
    torch.testing.assert_close(small[1].running_mean, zeros[1].running_mean[left])
    assert small[1].num_features == 2

def test_it_trains():
    small = thin(net := nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2)), dropping(net, image()), image())
    small[0].weight.requires_grad_(False)
    opt = torch.optim.SGD(small.parameters(), lr=0.1)
    small(image()).sum().backward()
    opt.step()
    assert small[2].weight.grad.shape == small[2].weight.shape == (2, 2, 3, 3)
    assert thin(small, None, image())[0].weight.requires_grad is False

def test_shared_parameters_stay_shared():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    net[2].weight = net[1].weight
    small = check(net, image(3))
    assert small[1].weight is small[2].weight and small[1].weight.shape == (2, 2) and small[2].out_features == 2

def test_half_precision():
    net = lively(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2))).bfloat16()
    small = thin(net, dropping(net, image().bfloat16()), image().bfloat16())
    assert small[0].weight.dtype == torch.bfloat16 and small[0].out_channels == 2

def test_masks_of_a_sparsifier():
    "Where nothing else is coupled, granularity 'filter' is enough"
    net = lively(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.BatchNorm2d(6), nn.ReLU(),
                               nn.Flatten(), nn.Linear(6*16, 2)))
    sp  = Sparsifier(net, 'filter')
    sp.sparsify_model(50)
    small = thin(net, example_inputs=image())
    assert (small[0].out_channels, small[3].out_channels, small[7].in_features) == (4, 3, 48)
    assert error(net, small, image()) < 1e-10
    assert n_params(thin(net, sp.masks, image())) == n_params(small)


class Anything(nn.Module):
    "Ten operations at random on the values there are so far"
    def __init__(self, seed):
        super().__init__()
        rng = random.Random(seed)
        self.layers, self.steps, widths = nn.ModuleList(), [], [3]
        for i in range(10):
            kind = rng.choice(['conv', 'conv', 'depthwise', 'grouped', 'transposed', 'norm', 'group norm', 'act',
                               'add', 'cat', 'gate'])
            a, b = (rng.randrange(len(widths)) for _ in 'ab')
            if kind == 'grouped' and widths[a] % 4: kind = 'conv'
            if kind == 'group norm' and widths[a] % 4: kind = 'norm'
            if kind in ('add', 'gate') and widths[a] != widths[b]: kind = 'cat'
            n, o = widths[a], rng.choice([4, 8, 12])
            made = dict(conv=lambda: conv(n, o, bias=rng.random() < 0.5), depthwise=lambda: conv(n, n, groups=n),
                        grouped=lambda: conv(n, 8, groups=4),
                        transposed=lambda: nn.ConvTranspose2d(n, o, 3, padding=1), norm=lambda: nn.BatchNorm2d(n),
                        act=lambda: rng.choice([nn.ReLU(), nn.GELU(), nn.Hardswish(), nn.Sigmoid(), nn.PReLU(n),
                                                nn.Softmax(1)]))
            made['group norm'] = lambda: nn.GroupNorm(4, n)
            self.layers.append(made.get(kind, nn.Identity)())
            self.steps.append((kind, a, b))
            widths.append(dict(conv=o, transposed=o, grouped=8, cat=n + widths[b]).get(kind, n))
        self.head = nn.Linear(sum(widths), 3)

    def forward(self, x):
        xs = [x]
        for layer,(kind,a,b) in zip(self.layers, self.steps):
            two = dict(add=lambda: xs[a] + xs[b], gate=lambda: xs[a] * xs[b].sigmoid(),
                       cat=lambda: torch.cat([xs[a], xs[b]], 1))
            xs.append(two.get(kind, lambda: layer(xs[a]))())
        return self.head(torch.cat(xs, 1).mean((2, 3)))

@pytest.mark.parametrize('seed', range(60))
def test_anything(seed):
    "Whatever the network: the law holds, and `thin` finds nothing to refuse"
    torch.manual_seed(seed)
    model, x = lively(Anything(seed), seed), image(3, 5, 5)
    groups = coupled_groups(model, x)
    masks  = coupled_masks(groups, channel_scores(groups, scores(model)), 60, ['local', 'global'][seed % 2])
    zeros, small = masked(model, masks), thin(model, masks, x)
    assert all(error(zeros, small, torch.randn(3, 3, 5, 5), t) < 1e-10 for t in (False, True))
    assert n_params(small) < n_params(model) or not masks


# -- attention -------------------------------------------------------------------------------------

def attention(batch_first=True, **kwargs):
    return Net(lambda m, q, k=None, **kw: m.b(m.attn(m.a(q), *[m.a(q if k is None else k)]*2, **kw)[0]),
               a=nn.Linear(3, 8),
               attn=nn.MultiheadAttention(8, 4, batch_first=batch_first, **kwargs), b=nn.Linear(8, 2))

@pytest.mark.parametrize('kwargs', [{}, dict(bias=False), dict(batch_first=False), dict(add_zero_attn=True),
                                    dict(add_bias_kv=True), dict(kdim=5, vdim=6)])
def test_heads(kwargs):
    if 'kdim' in kwargs:
        net = Net(lambda m, x: m.attn(m.a(x), m.k(x), m.v(x), need_weights=False)[0] @ torch.ones(8, 1, dtype=x.dtype),
                  a=nn.Linear(3, 8), k=nn.Linear(3, 5),
                  v=nn.Linear(3, 6), attn=nn.MultiheadAttention(8, 4, batch_first=True, **kwargs))
    else: net = attention(**kwargs)
    small = check(net, torch.randn(2, 5, 3), other=torch.randn(3, 7, 3))
    assert small.attn.num_heads == 2 and small.attn.out_proj.in_features == 4

@pytest.mark.parametrize('inputs', [
    lambda: dict(q=torch.randn(2, 5, 3), k=torch.randn(2, 7, 3)), lambda: dict(q=torch.randn(5, 3)),
    lambda: dict(q=torch.randn(2, 5, 3), key_padding_mask=torch.tensor([[False]*4 + [True], [False]*5])),
    lambda: dict(q=torch.randn(2, 5, 3), attn_mask=torch.ones(5, 5).triu(1).bool(), is_causal=True),
    lambda: dict(q=torch.randn(2, 5, 3), attn_mask=torch.randn(8, 5, 5)),
    lambda: dict(q=torch.randn(2, 5, 3), need_weights=False)])
def test_ways_to_call_attention(inputs):
    torch.manual_seed(0)
    net, x = lively(attention()), inputs()
    masks = dropping(net, x)
    zeros, small = masked(net, masks), thin(net, masks, x)
    torch.testing.assert_close(small(**x), zeros(**x))
    assert type(small.attn) is ThinAttention and n_params(small) < n_params(net)
    assert type(net.attn) is nn.MultiheadAttention

def test_weights_of_single_heads():
    net = lively(nn.MultiheadAttention(8, 4, batch_first=True))
    wrap = Net(lambda m, x: m.attn(x, x, x)[0], attn=net)
    x = torch.randn(2, 5, 8)
    masks = dropping(wrap, x)
    small, left = thin(wrap, masks, x).attn, masks['attn.in_proj_bias'][:8:2]
    _, each = small(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(each, masked(wrap, masks).attn(x, x, x, average_attn_weights=False)[1][:, left])

def test_thinned_twice():
    net, x = lively(attention()), torch.randn(2, 5, 3)
    for heads in (2, 1):
        masks = dropping(net, x)
        zeros, net = masked(net, masks), thin(net, masks, x)
        assert net.attn.num_heads == heads and error(zeros, net, x) < 1e-10
    again = pickle.loads(pickle.dumps(net.attn))
    assert again.kept_heads == net.attn.kept_heads and torch.equal(again.in_proj_weight, net.attn.in_proj_weight)

def test_encoder_with_its_shortcuts():
    "In eval mode `nn.TransformerEncoderLayer` takes a fused way, which knows only attention of the usual size"
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0., batch_first=True)
    check(nn.TransformerEncoder(layer, 2), torch.randn(2, 5, 16), other=torch.randn(3, 4, 16))
    model, x = lively(nn.TransformerEncoder(layer, 2)), torch.randn(2, 5, 16)
    padding = torch.tensor([[False]*5, [False]*3 + [True]*2])
    masks = dropping(model, x)
    zeros, small = masked(model, masks).eval(), thin(model, masks, x).eval()
    # nested tensors
    with torch.no_grad():
        torch.testing.assert_close(small(x, src_key_padding_mask=padding), zeros(x, src_key_padding_mask=padding))
    assert small.layers[1].self_attn.num_heads == 2 and small.layers[0].linear1.out_features == 16


@pytest.mark.parametrize('name', ['Bert', 'GPT2'])
def test_transformers(name):
    "Hidden units go; the heads, whose number is in the code, and the stream, which is normalised, stay"
    lib, ids = pytest.importorskip('transformers'), torch.randint(0, 50, (2, 7))
    small = dict(vocab_size=50, num_hidden_layers=2, num_attention_heads=4, hidden_size=32,
                 bos_token_id=1, eos_token_id=1)
    if name == 'Bert': small |= dict(intermediate_size=128)
    torch.manual_seed(0)
    model = lively(getattr(lib, f'{name}Model')(getattr(lib, f'{name}Config')(**small)))
    groups = coupled_groups(model, dict(input_ids=ids))
    assert sum(g.n for g in groups if not g.why_not) >= 2*128
    masks = coupled_masks(groups, channel_scores(groups, scores(model)), 50)
    less  = thin(model, masks, dict(input_ids=ids))
    torch.testing.assert_close(less.eval()(ids)[0], masked(model, masks).eval()(ids)[0])
    assert n_params(model) - n_params(less) >= 2*64*(32 + 32 + 1)


class Caching(nn.Module):
    """Keeps what it has computed in eval mode, as timm's LeViT and EfficientViT keep their attention biases: in a dict
    or a list"""
    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.cache = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), kind()
    def forward(self, x):
        y = self.b(self.a(x).relu())
        if not self.cache:
            kept = self.b.bias.sum().detach().reshape(1, 1, 1, 1)
            self.cache.update(cpu=kept) if isinstance(self.cache, dict) else self.cache.append(kept)
        kept = self.cache['cpu'] if isinstance(self.cache, dict) else self.cache[0]
        return y + F.conv2d(y.mean(1, keepdim=True), kept)

@pytest.mark.parametrize('kind', [dict, list])
def test_tensors_kept_in_containers(kind):
    "The check runs in double precision, where what was kept in single precision ended in `expected scalar type Double`"
    model, x = Caching(kind).eval(), torch.randn(2, 3, 6, 6)
    model(x)
    sp = Sparsifier(model, 'filter', layer_type=nn.Conv2d, coupled=True, example_inputs=x)
    sp.sparsify_model(50)
    less = thin(model, example_inputs=x)
    assert less.a.out_channels == 4
    assert next(iter(model.cache.values() if kind is dict else model.cache)).dtype == torch.float32
    torch.testing.assert_close(less(x), model(x))


# -- the usual architectures -----------------------------------------------------------------------

class UNet(nn.Module):
    def __init__(self, n=8):
        super().__init__()
        def block(i, o):
            return nn.Sequential(conv(i, o, bias=False), nn.BatchNorm2d(o), nn.ReLU(), conv(o, o, bias=False),
                                 nn.BatchNorm2d(o), nn.ReLU())
        self.down1, self.down2, self.mid = block(3, n), block(n, 2*n), block(2*n, 4*n)
        self.up2, self.up1   = nn.ConvTranspose2d(4*n, 2*n, 2, 2), nn.ConvTranspose2d(2*n, n, 2, 2)
        self.dec2, self.dec1 = block(4*n, 2*n), block(2*n, n)
        self.out = nn.Conv2d(n, 2, 1)
    def forward(self, x):
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        y = self.dec2(torch.cat([b, self.up2(self.mid(F.max_pool2d(b, 2)))], 1))
        return self.out(self.dec1(torch.cat([a, self.up1(y)], 1)))

class PreAct(nn.Module):
    "Norm and activation before each convolution, and a sum that no norm follows"
    def __init__(self, i, o, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(o), nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.short = nn.Conv2d(i, o, 1, stride, bias=False) if i != o else nn.Identity()
    def forward(self, x): return self.short(x) + self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())

def preact():
    return nn.Sequential(conv(3, 16), PreAct(16, 16, 1), PreAct(16, 32, 2), PreAct(32, 32, 1),
                         nn.BatchNorm2d(32), nn.ReLU(),
                                   nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

def plain(nd):
    Conv, Norm, Pool = ((nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d), None,
                        (nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d))[nd-1]
    return nn.Sequential(Conv(3, 8, 3, padding=1), Norm(8), nn.ReLU(), Pool(2), Conv(8, 12, 3, padding=1, groups=4),
                         Norm(12), nn.ReLU(), Conv(12, 10, 1), nn.GELU(), nn.Flatten(), nn.Linear(10 * 4**nd, 5))

def encoder():
    return nn.Sequential(nn.Linear(6, 16),
                         nn.TransformerEncoder(
                             nn.TransformerEncoderLayer(16, 4, 32, dropout=0., batch_first=True, norm_first=True),
                             2, enable_nested_tensor=False),
                         nn.Linear(16, 3))

ours = dict(unet=(UNet, (3, 16, 16)), preact_resnet=(preact, (3, 16, 16)), encoder=(encoder, (7, 6)),
            conv1d=(lambda: plain(1), (3, 8)), conv3d=(lambda: plain(3), (3, 8, 8, 8)))

# name → image size; parameters before and after dropping the half of each group
zoo = dict(
    resnet18           = (64,  11_689_512,  3_055_880),
    resnet50           = (64,  25_557_032,  6_917_640),
    vgg11_bn           = (64, 132_868_840, 34_246_504),
    mobilenet_v2       = (64,   3_504_872,  1_221_768),
    mobilenet_v3_small = (64,   2_542_856,    911_224),
    densenet121        = (64,   7_978_856,  2_274_728),
    googlenet          = (64,   6_624_904,  1_918_968),
    efficientnet_b0    = (64,   5_288_548,  1_701_446),
    regnet_y_400mf     = (64,   4_344_144,  1_298_224),
    convnext_tiny      = (64,  28_589_128, 15_636_616),
    squeezenet1_1      = (64,   1_235_496,    438_792),
    mnasnet0_5         = (64,   2_218_512,    901_132),
    vit_b_16           = (32,  86_420_200, 43_920_616),
)
# what can't lose channels, and how many layers that make channels are fixed for it
fixed = dict(convnext_tiny={'normalises over all channels at once': 4},
             vit_b_16={'normalises over all channels at once': 1})

def torchvision_model(name):
    models = pytest.importorskip('torchvision.models')
    extra  = dict(googlenet=dict(aux_logits=False, init_weights=False), vit_b_16=dict(image_size=32),
                  vgg11_bn=dict(init_weights=False)).get(name, {})
    torch.manual_seed(0)
    return lively(models.get_model(name, weights=None, **extra))

@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('sparsity', [30, 50, 80])
@pytest.mark.parametrize('name', ours)
def test_our_models(name, sparsity, context):
    make, shape = ours[name]
    torch.manual_seed(0)
    check(make(), image(*shape), sparsity, context, other=torch.randn(3, *shape))

@pytest.mark.parametrize('name', zoo)
def test_architectures(name):
    """At 50 % inside groups and, if it is small, at 80 % over all, on another batch than the example; the check of
    `thin` once"""
    size, before, after = zoo[name]
    model, x, other = torchvision_model(name), torch.randn(2, 3, size, size), torch.randn(3, 3, size, size)
    groups = coupled_groups(model, x)
    worth  = channel_scores(groups, scores(model))
    why    = [g.why_not for g in groups if g.why_not and g.why_not != 'it is the output of the model']
    assert {w.split(') ')[-1]: len(why) for w in why} == fixed.get(name, {})
    assert n_params(model) == before
    for sparsity,context in [(50, 'local'), (80, 'global')][:1 if before > 1e7 else 2]:
        zeros = masked(model, coupled_masks(groups, worth, sparsity, context))
        small = thin(zeros, None, x, check=(sparsity, context) == (50, 'local'))
        assert list(small.state_dict()) == list(model.state_dict())
        if (sparsity, context) == (50, 'local'): assert n_params(small) == after
        errors = [between(zeros.eval(), small.eval(), other),
                  *[between(zeros.double().train(t), small.double().train(t), other.double()) for t in (False, True)]]
        print(f'{name:20} {sparsity} % {context:6} {n_params(small):>11,}  fp32 {errors[0]:.1e}, fp64 {errors[1]:.1e}, '
              f'in train mode {errors[2]:.1e}')
        assert errors[0] < 1e-5 and errors[1] < 1e-10 and errors[2] < 1e-10


# -- files -----------------------------------------------------------------------------------------

def make_net():
    return nn.Sequential(conv(3, 8), nn.GroupNorm(4, 8), nn.ReLU(), conv(8, 8, groups=8), nn.BatchNorm2d(8),
                         nn.PReLU(8), nn.Flatten(), nn.Linear(8*16, 2))

@pytest.mark.parametrize('make, x', [(make_net, image()), (attention, torch.randn(2, 5, 3)), (UNet, image(3, 16, 16)),
                                     (encoder, torch.randn(2, 7, 6))])
def test_file_and_back(make, x, tmp_path):
    model = lively(make())
    small = thin(model, dropping(model, x), x)
    file  = save_thinned(small, tmp_path/'net')
    again = load_thinned(make, file)
    assert file.name == 'net.safetensors' and error(small, again, x) == 0
    assert all(torch.equal(v, again.state_dict()[k]) for k,v in small.state_dict().items())
    assert repr(again) == repr(small)
    with safe_open(file, 'pt') as f: assert json.loads(f.metadata()['sizes']) == json.loads(json.dumps(sizes_of(small)))
    plain = reshape_to(make(), sizes_of(small))
    plain.load_state_dict(small.state_dict())
    assert error(small, plain, x) == 0

def test_a_file_is_smaller_than_the_model_was(tmp_path):
    model = lively(UNet())
    small = thin(model, dropping(model, image(3, 16, 16)), image(3, 16, 16))
    assert save_thinned(small, tmp_path/'s').stat().st_size < 0.4 * save_thinned(model, tmp_path/'m').stat().st_size

def test_shared_parameters_in_a_file(tmp_path):
    def make():
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
        net[2].weight = net[1].weight
        return net
    small = check(make(), image(3))
    again = load_thinned(make, save_thinned(small, tmp_path/'net'))
    assert again[1].weight is again[2].weight and error(small, again, image(3)) == 0

def test_wrong_files(tmp_path):
    small = thin(make_net(), None, image())
    file  = save_thinned(small, tmp_path/'net')
    with pytest.raises(ValueError, match='is not the model that was thinned'): load_thinned(UNet, file)
    with pytest.raises(TypeError, match='must return an `nn.Module`, got int'): load_thinned(int, file)
    with pytest.raises(ValueError, match='has no model that `save_thinned` wrote'):
        load_thinned(make_net, Masks({'a': torch.ones(2).bool()}).save(tmp_path/'masks'))
    other = nn.Sequential(*[nn.Conv1d(3, 8, 3), *list(make_net())[1:]])
    with pytest.raises(ValueError, match="'0.weight' has 3 axes, and 4 in the description"):
        load_thinned(lambda: other, file)
    with pytest.raises(FileNotFoundError): load_thinned(make_net, tmp_path/'nothing')


# -- what is refused -------------------------------------------------------------------------------

def test_errors_leave_the_model_alone():
    net = make_net()
    before = weights(net)
    for kwargs, why in [(dict(example_inputs=torch.randn(2, 5, 4, 4)),
                         r'does not run on `example_inputs`, in `0` \(Conv2d\)'), ({}, '`example_inputs` is required'),
                        (dict(masks={'0.weight': torch.ones(3).bool()}, example_inputs=image()),
                         "mask of '0.weight' must have shape"),
                        (dict(example_inputs=image(), exclude='11'), 'Unknown layer in `exclude`')]:
        with pytest.raises(ValueError, match=why): thin(net, **kwargs)
    with pytest.raises(KeyError, match="Did you mean '0.weight'"):
        thin(net, {'0.weigth': torch.ones(3).bool()}, image())
    with pytest.raises(TypeError, match='must be an `nn.Module`'): thin(image(), None, image())
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())

def test_outputs_are_never_thinned():
    net = nn.Sequential(conv(3, 4), nn.ReLU())
    with torch.no_grad(): net[0].weight[0], net[0].bias[0] = 0, 0
    assert thin(net, None, image())[0].out_channels == 4

def test_excluded_layers_stay():
    net, x = lively(make_net()), image()
    masks = dropping(net, x)
    assert n_params(thin(net, masks, x, exclude='0')) == n_params(net)

@pytest.mark.parametrize('forward', [lambda m, x: m.b(m.a(x)) * len(m.a.weight),
                                     lambda m, x: m.b(m.a(x)) * (2 if m.training else 1) ** len(m.a.weight),
                                     lambda m, x: m.b(m.a(x) if m.a.out_channels == 4 else x)])
def test_the_check_names_the_group(forward):
    "What a run does not show: the code asks for the number of channels itself"
    net = lively(Net(forward, a=conv(3, 4), b=conv(4, 2), c=conv(2, 2)))
    with torch.no_grad(): net.a.weight[0], net.a.bias[0] = 0, 0
    with pytest.raises(ValueError,
                       match=r"does not compute the same: without the zero channels of `a`, "
                             r".*exclude=\['a'\]"): thin(net, None, image())
    assert thin(net, None, image(), exclude='a').a.out_channels == 4
    assert thin(net, None, image(), check=False).a.out_channels == 3

@pytest.mark.parametrize('kind', [nn.RNN, nn.GRU])
@pytest.mark.parametrize('kwargs', [{}, dict(num_layers=2, bidirectional=True)])
def test_what_a_recurrent_layer_reads(kind, kwargs, tmp_path):
    "It runs on a list of its weights, which has to be that of the new ones"
    make = lambda: Net(lambda m, x: m.b(m.rnn(m.a(x).relu())[0]), a=nn.Linear(5, 8), rnn=kind(8, 6, **kwargs),
                       b=nn.Linear(12 if kwargs else 6, 2))
    net, x = lively(make()), torch.randn(4, 3, 5)
    with torch.no_grad(): net.a.weight[[1, 4]], net.a.bias[[1, 4]] = 0, 0
    small = thin(net, None, x)
    assert small.a.out_features == small.rnn.input_size == 6 and small.rnn.weight_ih_l0.shape[1] == 6
    assert net.rnn.input_size == 8
    for m in (small, copy.deepcopy(small), load_thinned(make, save_thinned(small, tmp_path/'rnn'))):
        torch.testing.assert_close(m(x), net(x))
        assert all(w is p for w,p in zip(m.rnn._flat_weights, m.rnn.parameters()))
