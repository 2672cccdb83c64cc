"""Tensor subclasses, writes through views, what is kept for the caller, random numbers, and copies of models that
remember"""
import copy, threading

import pytest, torch, torch.nn as nn, torch.nn.functional as F
from fastai.torch_core import TensorBase, TensorImage
from fastai.vision.models.unet import DynamicUnet

from fasterai_clone.model.flops import multiply_adds
from fasterai_clone.model.flow import trace_flow
from fasterai_clone.model.preserve import copied
from fasterai_clone.sparse.activations import input_norms
from fasterai_clone.sparse.gradients import snip_scores
from fasterai_clone.sparse.synflow import synflow_scores
from fasterai_clone.prune.all import *
from fasterai_clone.sparse.all import *


class Meta(torch.Tensor):
    "Like MONAI's `MetaTensor`: keeps notes, and gives them on to what is computed from it"
    def __new__(cls, x, note=None):
        t = torch.as_tensor(x).as_subclass(cls)
        t.note = note
        return t
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(out, cls): out.note = next((getattr(a, 'note', None) for a in args if isinstance(a, cls)), None)
        return out

class Net(nn.Module):
    "Layers by name, and how they are called"
    def __init__(self, forward, **layers):
        super().__init__()
        for k,v in layers.items(): self.add_module(k, v)
        self.f = forward
    def forward(self, x): return self.f(self, x)

def conv(i, o): return nn.Conv2d(i, o, 3, padding=1)
def image(n=2): return torch.rand(n, 3, 6, 6)
def net():
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(6, 4))
    nn.init.uniform_(model[1].bias, 0.1, 0.2)
    return model

def seen(model, x):
    return [(g.name, g.n, g.why_not, [(m.name, m.role, m.channel.tolist()) for m in g.members])
            for g in coupled_groups(model, x)]
def free(model, x): return {g.name: g.n for g in coupled_groups(model, x) if not g.why_not}
def why (model, x, name): return next(g.why_not for g in coupled_groups(model, x) if g.name == name)

kinds = [TensorImage, TensorBase, Meta]


@pytest.mark.parametrize('kind', kinds)
def test_inputs(kind):
    x = image()
    assert seen(net(), kind(x)) == seen(net(), x) and free(net(), kind(x)) == {'0': 8, '3': 6}
    assert multiply_adds(net(), kind(x)) == multiply_adds(net(), x)
    assert trace_flow(net(), kind(x)) == trace_flow(net(), x)

@pytest.mark.parametrize('kind', kinds)
def test_made_inside_and_turned_back(kind):
    "The model wraps a value between two layers, adds a plain one to it, and unwraps it"
    def forward(m, x):
        y = m.a(x).as_subclass(kind)
        return m.c(F.relu(m.b(F.relu(y)).as_subclass(torch.Tensor) + y))
    model = Net(forward, a=conv(3, 8), b=conv(8, 8), c=conv(8, 2))
    assert free(model, image()) == {'a': 8}
    plain = Net(lambda m, x: m.c(F.relu(m.b(F.relu(y)) + y)) if (y := m.a(x)) is not None else None, a=conv(3, 8),
                b=conv(8, 8), c=conv(8, 2))
    assert seen(model, image()) == seen(plain, image())
    assert why(Net(lambda m, x: m.a(x).as_subclass(kind), a=conv(3, 8)), image(),
               'a') == 'it is the output of the model'

@pytest.mark.parametrize('kind', kinds)
def test_parameters(kind):
    model = net()
    for m in model:
        for k,p in [*m._parameters.items()]: m._parameters[k] = nn.Parameter(p.data.as_subclass(kind))
    assert isinstance(model[0].weight, kind) and seen(model, image()) == seen(net(), image())
    Sparsifier(model, 'filter', coupled=True, example_inputs=image()).sparsify_model(50)
    small = thin(model, example_inputs=image())
    assert (small[0].out_channels, small[3].out_channels, small[7].in_features, small[7].out_features) == (4, 3, 3, 4)
    assert isinstance(small[0].weight, kind)
    assert torch.allclose(small.eval()(image(1)*0 + 1), model.eval()(image(1)*0 + 1), atol=1e-6)

@pytest.mark.parametrize('kind', kinds)
def test_coupled_sparsifier_and_thin(kind):
    "4 of 8 and 3 of 6 filters with their shifts; the 4 classes stay"
    x, model = kind(image()), net()
    Sparsifier(model, 'filter', layer_type=nn.Module, coupled=True, example_inputs=x).sparsify_model(50)
    zero = lambda t: int((t.flatten(1) == 0).all(1).sum()) if t.ndim > 1 else int((t == 0).sum())
    assert [zero(model[i].weight) for i in (0, 3, 7)] == [4, 3, 0] and zero(model[1].bias) == zero(model[1].weight) == 4
    small = thin(model, example_inputs=x)
    assert (small[0].out_channels, small[1].num_features, small[3].out_channels, small[7].in_features) == (4, 4, 3, 3)
    assert torch.allclose(small.eval()(x), model.eval()(x), atol=1e-6) and small(x).shape == (2, 4)

@pytest.mark.parametrize('kind', kinds)
def test_scores(kind):
    x, y, model = image(), torch.tensor([0, 1]), net()
    params = {k: p for k,p in model.named_parameters() if k in ('0.weight', '3.weight')}
    for measure in (input_norms, synflow_scores):
        assert all(torch.equal(a, b) for a,b in zip(measure(model, params, x).values(),
                                                    measure(model, params, kind(x)).values()))
    a, b = (snip_scores(model, params, (t, y), F.cross_entropy) for t in (x, kind(x)))
    assert all(torch.allclose(a[k], b[k]) and type(b[k]) is torch.Tensor for k in a)

@pytest.mark.parametrize('kind', kinds)
def test_masks_and_keeping(kind):
    model = net()
    model[0].weight = nn.Parameter(model[0].weight.data.as_subclass(kind))
    keep = model[0].weight.detach().as_subclass(torch.Tensor).abs() > 0.1
    Masks({'0.weight': keep}).apply(dict(model.named_parameters()))
    assert torch.equal(model[0].weight.as_subclass(torch.Tensor) != 0, keep)


# --- memory

def test_both_names_of_a_value_have_its_label():
    "What is written through one name is read through the other"
    def forward(m, x):
        y = m.a(x)
        z = y.detach()
        z.add_(1)
        return m.b(y)
    assert 'does not keep zero at zero with `add`' in why(Net(forward, a=conv(3, 8), b=conv(8, 2)), image(), 'a')

@pytest.mark.parametrize('write, says', [
    (lambda y: y[:, :, 0].add_(1), 'does not keep zero at zero with `add`'),
    (lambda y: y[:, :, :2].copy_(torch.ones(2, 8, 2, 6)), 'meets a value that does not come from a layer'),
    (lambda y: y[0].fill_(5), 'does not keep zero at zero with `fill`'),
    (lambda y: y.__setitem__((Ellipsis, 0), 5), 'does not keep zero at zero with'),
    (lambda y: y.flatten(2).sigmoid_(), 'does not keep zero at zero with `sigmoid`'),
    (lambda y: y[:, :, 0].cumsum_(1), 'uses `cumsum` on it'),
    (lambda y: y[:, 0].fill_(5), 'takes a part of it with `select`'),
    (lambda y: y[:, :4].relu_(), 'takes a part of it with `slice`'),
    (lambda y: y.__setitem__(y > 0.5, 1.), 'does not keep zero at zero with `masked_fill`'),
    (lambda y: y.__setitem__((0, torch.tensor([1, 2])), 1.), 'uses `index_')])
def test_writes_through_a_view(write, says):
    def forward(m, x):
        y = m.a(x)
        write(y)
        return m.b(y)
    assert says in why(Net(forward, a=conv(3, 8), b=conv(8, 2)), image(), 'a')

def test_a_view_made_before_the_write():
    def forward(m, x):
        y = m.a(x)
        flat = y.flatten(1)
        y += 1
        return m.b(flat)
    assert 'does not keep zero at zero with `add`' in why(Net(forward, a=conv(3, 8), b=nn.Linear(8*36, 2)), image(),
                                                          'a')

@pytest.mark.parametrize('write', [lambda y: y[:, :, 0].relu_(), lambda y: y[0].mul_(2),
                                   lambda y: y.flatten(2).clamp_(min=0),
                                   lambda y: y[..., 1:3].zero_(), lambda y: y.unsqueeze_(0).squeeze_(0),
                                   lambda y: y[1].__setitem__(slice(None), 0)])
def test_writes_that_keep_zero(write):
    "Exactly: the thinned model computes the same"
    def forward(m, x):
        y = m.a(x)
        write(y)
        return m.b(y)
    model, x = Net(forward, a=conv(3, 8), b=conv(8, 2)).eval(), image()
    assert free(model, x) == {'a': 8}
    Sparsifier(model, 'filter', coupled=True, example_inputs=x).sparsify_model(50)
    small = thin(model, example_inputs=x)
    assert small.a.out_channels == 4 and torch.allclose(small(x), model(x), atol=1e-6)

def test_parts_of_one_memory_that_do_not_overlap():
    "Parameters in one flat memory: what is written into one leaves the other alone"
    flat  = torch.randn(8*3 + 8)
    layer, out = nn.Linear(3, 8), nn.Linear(8, 2)
    layer.weight.data, layer.bias.data = flat[:24].view(8, 3), flat[24:]
    def forward(m, x):
        m.a.bias.data.mul_(1)
        return m.b(m.a(x))
    assert free(Net(forward, a=layer, b=out), torch.rand(2, 3)) == {'a': 8}

def test_memory_used_again_misleads_nobody():
    "A long chain of values, each freed at once: no label of an old one is found for a new one"
    def forward(m, x):
        for _ in range(20): m.a(x).sigmoid()
        y = torch.rand(2, 8, 6, 6)
        return m.b(y)
    groups = {g.name: g.why_not for g in coupled_groups(Net(forward, a=conv(3, 8), b=conv(8, 2)), image())}
    assert groups['a'] is None or 'sigmoid' in groups['a']
    assert groups['b'] == 'it is the output of the model'


# --- what leaves the model

def test_kept_for_the_caller():
    """An auxiliary output that is only an attribute has the classes of the training loop; what the model reads itself
    has none"""
    def forward(m, x):
        y = F.relu(m.a(x))
        m.features = [y]
        m.aux = dict(logits=m.aux_head(y.mean((2, 3))))
        return m.b(m.features[0])
    model = Net(forward, a=conv(3, 8), aux_head=nn.Linear(8, 4), b=conv(8, 2))
    assert free(model, image()) == {'a': 8}
    assert why(model, image(), 'aux_head') == 'it is kept as `aux`, for the caller or the next run'


# --- random numbers

class Noise(nn.Module):
    def __init__(self, always): super().__init__(); self.always = always
    def forward(self, x): return x + 0.1*torch.randn_like(x) if self.always or self.training else x

class Always(nn.Module):
    "Monte Carlo dropout: also in eval mode"
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, x): return self.f(x)

def by_hand(x): return x * (torch.rand(x.shape) > 0.3) / 0.7
def path(x): return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.9).div_(0.9)

@pytest.mark.parametrize('drop', [lambda x: F.dropout(x, 0.5, True), lambda x: F.dropout2d(x, 0.5, True),
                                  lambda x: F.dropout(x, 0.5, True, inplace=True),
                                  by_hand, path, lambda x: x * torch.bernoulli(torch.full_like(x[:, :, :1, :1], 0.5)),
                                  torch.jit.script(nn.Dropout2d().train())])
def test_dropout_that_is_always_on(drop):
    assert free(nn.Sequential(conv(3, 8), nn.ReLU(), Always(drop), conv(8, 2)), image()) == {'0': 8}

def test_noise():
    "Added always it makes something of zero channels; in train mode only it is not part of the network"
    def model(always): return nn.Sequential(conv(3, 8), nn.ReLU(), Noise(always), conv(8, 2))
    assert why(model(True), image(), '0') == '`2` (Noise) adds random numbers to it with `add`'
    assert free(model(False), image()) == {'0': 8}

@pytest.mark.parametrize('extra', [nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout(), nn.FeatureAlphaDropout(),
                                   nn.RReLU(), Noise(False), nn.BatchNorm2d(6)])
@pytest.mark.parametrize('n', [1, 2])
def test_heads_that_run_in_training_only(extra, n):
    """What a head for training reads goes with it: in exact numbers, 8 channels of `a` and 6 of the head's own; a batch
    of one image, too"""
    def forward(m, x):
        y = F.relu(m.a(x))
        if m.training: return m.b(y), m.out(m.extra(m.aux(m.extra2(y))))
        return m.b(y)
    extra2 = nn.BatchNorm2d(8) if isinstance(extra, nn.BatchNorm2d) else copy.deepcopy(extra)
    model = Net(forward, a=conv(3, 8), b=conv(8, 2), aux=conv(8, 6), extra=extra, extra2=extra2, out=conv(6, 3)).eval()
    if n == 1 and isinstance(extra, nn.BatchNorm2d):  # which refuse single numbers
        def pooled(m, x):
            y = F.relu(m.a(x))
            return (m.b(y), m.out(m.extra(m.aux(m.extra2(y.mean((2, 3), keepdim=True)))))) if m.training else m.b(y)
        model.f = pooled
    groups = {g.name: g for g in coupled_groups(model, image(n))}
    assert {k for k,g in groups.items() if not g.why_not} == {'a', 'aux'}
    assert ('aux.weight', 1) in {(m.name, m.axis) for m in groups['a'].members}
    assert groups['out'].why_not == 'it is the output of the model'


# --- copies

class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
    def forward(self, x):
        h = F.relu(self.a(x))
        self.aux_loss = h.mean()
        return self.b(h)

class Holder:
    def __init__(self): self.stored = None
    def __call__(self, m, inputs, out): self.stored = out

class Hooked(nn.Module):
    "What a hook stores is what `forward` reads: an object, a method of one, a function"
    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.holder, self.kept = nn.Linear(4, 8), nn.Linear(8, 2), Holder(), {}
        def function(m, inputs, out): self.kept['it'] = out
        def default(m, inputs, out, kept=self.kept): kept['it'] = out
        self.how = how
        self.a.register_forward_hook(dict(object=self.holder, method=self.holder.__call__, function=function,
                                          default=default)[how])
    def forward(self, x):
        self.a(x)
        return self.b(F.relu(self.holder.stored if self.how in ('object', 'method') else self.kept['it']))

def body(): return nn.Sequential(nn.Sequential(conv(3, 8), nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.ReLU()),
                                 nn.Sequential(conv(8, 16), nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.ReLU()))

@pytest.mark.parametrize('make, x', [
    (Experts, torch.rand(2, 4)), (lambda: DynamicUnet(body(), 3, (16, 16)), torch.rand(2, 3, 16, 16)),
    *[(lambda how=how: Hooked(how), torch.rand(2, 4)) for how in ('object', 'method', 'function', 'default')]])
def test_copies_of_models_that_remember(make, x):
    torch.manual_seed(0)
    model = make()
    want, _ = model(x), model.eval()(x).sum()
    kept = [t for m in model.modules()
            for t in (getattr(m, 'aux_loss', None), *(h.stored for h in getattr(m, 'sfs', ()))) if t is not None]
    new  = copied(model)
    new(torch.zeros_like(x))
    assert torch.equal(new(x), model(x))
    with torch.no_grad():
        for p in new.parameters(): p.zero_()
    assert not new(x).count_nonzero() and model(x).count_nonzero()  # neither reads what the other one stored
    assert all(t.requires_grad for t in kept)
    want.sum().backward()  # from before the copy
    assert all(p.grad is not None for p in model.parameters())

def test_hooks_of_a_copy_that_are_functions():
    assert free(Hooked('function'), torch.rand(2, 4)) == free(Hooked('default'), torch.rand(2, 4)) == {'a': 8}

@pytest.mark.parametrize('make, x, some', [(Experts, torch.rand(2, 4), {'a'}),
                                           (lambda: DynamicUnet(body(), 3, (16, 16)), torch.rand(2, 3, 16, 16),
                                            {'layers.0.1.0'}),
                                           *[(lambda how=how: Hooked(how), torch.rand(2, 4), {'a'})
                                             for how in ('object', 'method')]])
def test_models_that_remember_shrink(make, x, some):
    torch.manual_seed(0)
    model = make()
    model(x).sum().backward()
    model.eval()
    assert some <= set(free(model, x))
    Sparsifier(model, 'filter', layer_type=nn.Module, coupled=True, example_inputs=x).sparsify_model(50)
    small = thin(model, example_inputs=x)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert torch.allclose(small(x), model(x), atol=1e-5)

def test_what_cannot_be_copied_is_named():
    model = nn.Sequential(nn.Linear(4, 2))
    model[0].lock = threading.Lock()
    with pytest.raises(ValueError, match=r'Sequential cannot be copied, because `0.lock` \(lock\) cannot: TypeError'):
        coupled_groups(model, torch.rand(1, 4))
    model[0].lock = None
    model.pipe = [(i for i in range(3))]
    with pytest.raises(ValueError, match=r'because `pipe` \(list\) cannot: TypeError'): copied(model)

@pytest.mark.parametrize('look', [lambda m, x: multiply_adds(m, x), lambda m, x: trace_flow(m, x),
                                  lambda m, x: coupled_groups(m, x),
                                  lambda m, x: compare(m, m, x, runs=1),
                                  lambda m, x: Sparsifier(m, 'filter', layer_type=nn.Module, coupled=True,
                                                          example_inputs=x)])
@pytest.mark.parametrize('make, x', [(lambda: DynamicUnet(body(), 3, (16, 16)), torch.rand(2, 3, 16, 16)),
                                     (lambda: Hooked('object'), torch.rand(2, 4))])
def test_what_hooks_store_is_still_there(make, x, look):
    "A loss of what a hook stored, computed after a look at the model, has its gradients"
    model  = make()
    model(x)
    hooks  = [*getattr(model, 'sfs', [])] or [model.holder]
    stored = [h.stored for h in hooks]
    look(model, x)
    assert all(h.stored is t and t.requires_grad for h,t in zip(hooks, stored))
