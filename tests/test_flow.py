"Which norms get a layer's channels: against zeros put into the model, and against names; multiply-adds by hand"
import pickle, random, time
from copy import deepcopy
from dataclasses import FrozenInstanceError

import numpy as np, pytest, torch, torch.nn as nn, torch.nn.functional as F

from fasterai_clone.model.flops import multiply_adds
from fasterai_clone.model.flow import Flow, trace_flow

kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)

def layers(model): return {n: m for n,m in model.named_modules() if isinstance(m, kinds)}
def norms_of(model):
    return {n: m for n,m in model.named_modules() if type(m).__name__.endswith('Norm') or 'Norm' in type(m).__name__}
def channels(m): return m.out_features if isinstance(m, nn.Linear) else m.out_channels
def conv(i=4, o=4, k=3, **kwargs): return nn.Conv2d(i, o, k, padding=k//2, **kwargs)

class Made(nn.Module):
    "A module of parts, with a forward of one's own"
    def __init__(self, f, **parts):
        super().__init__()
        self.f = f
        for k,v in parts.items(): self.add_module(k, v)
    def forward(self, x): return self.f(self, x)

class Looks(Made):
    "The same, but tracing fails: it looks at its data"
    def forward(self, x): return self.f(self, x) if x.sum() > -1e9 else x


# The law: zeros stay zeros

def stir(model):
    "Random biases, affine parameters and statistics: nothing is zero by accident"
    with torch.no_grad():
        for m in model.modules():
            for k in ('bias', 'running_mean'):
                if isinstance(getattr(m, k, None), torch.Tensor): getattr(m, k).uniform_(.1, .5)
            if 'Norm' in type(m).__name__ and getattr(m, 'weight', None) is not None: m.weight.uniform_(.5, 1.5)
    return model

def zero(layer, c, *norms):
    "Zero filter `c`, its bias, and γ and β of `norms` there"
    transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    with torch.no_grad():
        (layer.weight[:, c] if transposed else layer.weight[c]).zero_()
        for p in [layer.bias, *[q for n in norms for q in (n.weight, n.bias)]]:
            if p is not None: p[c] = 0

def seen(model, x, names, mode):
    "name → [(input, output)] of each call"
    found, hooks = {n: [] for n in names}, []
    for n in names:
        hooks.append(model.get_submodule(n).register_forward_hook(lambda m, i, o, n=n: found[n].append((
            i[0].clone(), o.clone()))))
    model.train(mode == 'train')
    with torch.no_grad(): model(x)
    for h in hooks: h.remove()
    return found

def channel(t, c, layer): return t[..., c] if isinstance(layer, nn.Linear) else t[:, c]

def check_law(model, x):
    "One zero filter in each layer that has norms: what goes into the norms and what comes out is exactly zero there"
    model = stir(deepcopy(model))
    flow, ls = trace_flow(model, x), layers(model)
    chosen = {l: random.randrange(channels(ls[l])) for l in flow.norms}
    for l,ns in flow.norms.items(): zero(ls[l], chosen[l], *map(model.get_submodule, ns))
    for mode in ('train', 'eval'):
        calls = seen(model, x, [n for ns in flow.norms.values() for n in ns], mode)
        for l,ns in flow.norms.items():
            for n in ns:
                assert calls[n], n
                for i,o in calls[n]:
                    assert not channel(i, chosen[l], ls[l]).any(), f'{n} gets more than {l}'
                    assert not channel(o, chosen[l], ls[l]).any() and o.any()
    return flow

def by_trial(model, x):
    """The naive reference: zero a filter, see in which norms every call gets a zero channel and can make it zero, zero
    those too, look again"""
    found = {}
    for l in layers(model):
        model_l, held = stir(deepcopy(model)), []
        layer = layers(model_l)[l]
        fit = [n for n,m in norms_of(model_l).items() if getattr(m, 'weight', None) is not None and m.weight.shape
               == (channels(layer),)]
        zero(layer, 1)
        while True:
            calls = seen(model_l, x, fit, 'eval')
            more = [n for n in fit if calls[n] and not any(channel(i, 1, layer).any() for i,_ in calls[n])]
            if not more: break
            zero(layer, 1, *map(model_l.get_submodule, more))
            calls, fit = seen(model_l, x, fit, 'eval'), [n for n in fit if n not in more]
            held += [n for n in more if not any(channel(o, 1, layer).any() for _,o in calls[n])]
        if held: found[l] = set(held)
    return found

im, vec = torch.randn(4, 3, 8, 8), torch.randn(6, 5)

def pre(self, x): return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
def pre_activation(): return Made(pre, norm2=nn.BatchNorm2d(4), conv1=conv(), norm1=nn.BatchNorm2d(4), conv2=conv())

def residual(self, x):
    out = F.relu(self.bn1(self.conv1(x)))
    out = self.bn2(self.conv2(out))
    out += self.down(x)
    return F.relu(out, inplace=True)

def functions(self, x):
    y = F.leaky_relu(F.dropout(torch.tanh(self.c(x)), .5, self.training).relu_()).contiguous()
    return self.b(F.max_pool2d(F.adaptive_avg_pool2d(y, 4), 2))

zoo = {  # name → (model, input, its flow)
    'conv bn relu': (lambda: nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.ReLU(), conv()), im, {'0': ('1',)}),
    'registered backwards': (lambda: Made(lambda s,x: s.b2(s.c2(F.relu(s.b1(s.c1(x))))),
                                          b2=nn.BatchNorm2d(4), b1=nn.BatchNorm2d(4), c1=conv(3), c2=conv()),
                             im, {'c1': ('b1',), 'c2': ('b2',)}),
    'crossed': (lambda: Made(lambda s,x: s.b1(s.c2(s.b2(s.c1(x)))), c1=conv(3), b1=nn.BatchNorm2d(4), c2=conv(),
                             b2=nn.BatchNorm2d(4)),
                im, {'c1': ('b2',), 'c2': ('b1',)}),
    'pre-activation': (lambda: nn.Sequential(conv(3), pre_activation(), pre_activation()), im,
                       {'0': ('1.norm1',), '1.conv1': ('1.norm2',), '2.conv1': ('2.norm2',)}),
    'residual': (lambda: Made(residual, conv1=conv(3), bn1=nn.BatchNorm2d(4), conv2=conv(), bn2=nn.BatchNorm2d(4),
                              down=nn.Sequential(conv(3, 4, 1), nn.BatchNorm2d(4))), im,
                 {'conv1': ('bn1',), 'conv2': ('bn2',), 'down.0': ('down.1',)}),
    'sum, then norm': (lambda: Made(lambda s,x: s.bn(s.a(x) + s.b(x)), a=conv(3), b=conv(3),
                                    bn=nn.BatchNorm2d(4)), im, {}),
    'in-place sum, then norm': (lambda: Made(lambda s,x: s.bn(s.a(x).add_(s.b(x))), a=conv(3), b=conv(3),
                                             bn=nn.BatchNorm2d(4)), im, {}),
    'cat, then norm': (lambda: Made(lambda s,x: s.bn(torch.cat([s.a(x), s.b(x)], 1)), a=conv(3), b=conv(3),
                                    bn=nn.BatchNorm2d(8)), im, {}),
    'layer twice': (lambda: Made(lambda s,x: s.b2(s.c(F.relu(s.b1(s.c(s.stem(x)))))), stem=conv(3), c=conv(),
                                 b1=nn.BatchNorm2d(4), b2=nn.BatchNorm2d(4)), im, {'c': ('b1', 'b2')}),
    'both twice': (lambda: Made(lambda s,x: s.b(s.c(F.relu(s.b(s.c(s.stem(x)))))), stem=conv(3), c=conv(),
                                b=nn.BatchNorm2d(4)),
                   im, {'c': ('b',)}),
    'norm of two layers': (lambda: Made(lambda s,x: s.b(s.c2(F.relu(s.b(s.c1(x))))), c1=conv(3), c2=conv(),
                                        b=nn.BatchNorm2d(4)), im, {}),
    'norm of a layer and the input': (lambda: Made(lambda s,x: s.b(s.c(s.b(x))), c=conv(3, 3),
                                                   b=nn.BatchNorm2d(3)), im, {}),
    'norms in a row': (lambda: nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4), nn.GELU(),
                                             nn.BatchNorm2d(4)),
                       im, {'0': ('1', '3', '5')}),
    'behind a norm that is shared': (lambda: Made(lambda s,x: s.own(s.b(s.c1(x))) + s.b(s.c2(x)),
                                                  c1=conv(3), c2=conv(3),
                                                  b=nn.BatchNorm2d(4), own=nn.BatchNorm2d(4)), im, {}),
    'group norm': (lambda: nn.Sequential(conv(3), nn.GroupNorm(2, 4), nn.SiLU()), im, {'0': ('1',)}),
    'instance norm': (lambda: nn.Sequential(conv(3), nn.InstanceNorm2d(4, affine=True)), im, {'0': ('1',)}),
    'plain instance norm': (lambda: nn.Sequential(conv(3), nn.InstanceNorm2d(4)), im, {}),
    'layer norm': (lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2)),
                   vec, {'0': ('1',)}),
    'layer norm without bias': (lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4, bias=False)),
                                vec, {'0': ('1',)}),
    'layer norm of more': (lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm((8, 8))), im, {}),
    'layer norm of rows': (lambda: nn.Sequential(conv(3, 8), nn.LayerNorm(8)), im, {}),
    'linear bn': (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Dropout(.5), nn.Linear(4, 2)),
                  vec, {'0': ('2',)}),
    'conv relu bn': (lambda: nn.Sequential(conv(3), nn.ReLU(inplace=True), nn.BatchNorm2d(4)), im, {'0': ('2',)}),
    'dropout': (lambda: nn.Sequential(conv(3), nn.Dropout2d(.5), nn.Dropout(.5, inplace=True), nn.BatchNorm2d(4)),
                im, {'0': ('3',)}),
    'functions': (lambda: Made(functions, c=conv(3), b=nn.BatchNorm2d(4)), im, {'c': ('b',)}),
    'modules': (lambda: nn.Sequential(conv(3), nn.LeakyReLU(), nn.PReLU(4), nn.ELU(), nn.Hardswish(), nn.ReLU6(),
                                      nn.Tanh(), nn.Identity(),
                                      nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(2), nn.BatchNorm2d(4)), im,
                {'0': ('11',)}),
    'sigmoid': (lambda: nn.Sequential(conv(3), nn.Sigmoid(), nn.BatchNorm2d(4)), im, {}),
    'softmax': (lambda: Made(lambda s,x: s.b(F.softmax(s.c(x), 1)), c=conv(3), b=nn.BatchNorm2d(4)), im, {}),
    'pooled over channels': (lambda: nn.Sequential(conv(3), nn.AvgPool3d((3, 1, 1), 1, (1, 0, 0)),
                                                   nn.BatchNorm2d(4)), im, {}),
    'pooled over features': (lambda: nn.Sequential(nn.Linear(5, 4), nn.MaxPool1d(3, 1, 1), nn.BatchNorm1d(4)), vec, {}),
    'plus one': (lambda: Made(lambda s,x: s.b(s.c(x) + 1), c=conv(3), b=nn.BatchNorm2d(4)), im, {}),
    'branch': (lambda: Made(lambda s,x: [s.b(y := s.c(x)).mean(), y.exp(), s.d(y)], c=conv(3),
                            b=nn.BatchNorm2d(4), d=conv()),
               im, {'c': ('b',)}),
    'two branches': (lambda: Made(lambda s,x: s.b(y := s.c(x)) + s.g(y), c=conv(3), b=nn.BatchNorm2d(4),
                                  g=nn.GroupNorm(2, 4)),
                     im, {'c': ('b', 'g')}),
    'no affine': (lambda: nn.Sequential(conv(3), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4)), im, {}),
    'depthwise': (lambda: nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.ReLU6(), conv(groups=4), nn.BatchNorm2d(4)),
                  im, {'0': ('1',), '3': ('4',)}),
    '1d': (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.MaxPool1d(2), nn.BatchNorm1d(4)), im[..., 0], {'0': ('2',)}),
    '3d': (lambda: nn.Sequential(nn.Conv3d(3, 4, 2), nn.AvgPool3d(2), nn.BatchNorm3d(4)),
           torch.randn(2, 3, 6, 6, 6), {'0': ('2',)}),
    'transposed': (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2, stride=2), nn.BatchNorm2d(4), nn.ReLU()),
                   im, {'0': ('1',)}),
}

@pytest.mark.parametrize('name', zoo)
def test_norms_of_the_zoo(name):
    "As written down, as tried out, and zero where it must be; traced and run"
    make, x, norms = zoo[name]
    model = make()
    assert trace_flow(model).norms == norms
    assert by_trial(model, x) == {l: set(ns) for l,ns in norms.items()}
    flow = check_law(model, x)
    assert set(flow.norms) | set(flow.why_not) == set(layers(model))

@pytest.mark.parametrize('name', zoo)
def test_a_run_tells_what_tracing_does(name):
    make, x, _ = zoo[name]
    model = make()
    inner = Looks(lambda s,x: s.net(x), net=model)
    run = trace_flow(inner, x)
    traced = trace_flow(Made(lambda s,x: s.net(x), net=model))
    assert run.norms == traced.norms and run.why_not.keys() == traced.why_not.keys()
    check_law(inner, x)

@pytest.mark.parametrize('name', ['no affine', 'norm of two layers', 'sum, then norm', 'residual',
                                  'layer norm of more', 'sigmoid', 'conv bn relu'])
def test_a_run_gives_the_same_reasons(name):
    make, x, _ = zoo[name]
    model = make()
    assert trace_flow(Looks(lambda s,x: s.net(x), net=model), x) == trace_flow(Made(lambda s,x: s.net(x), net=model))

@pytest.mark.parametrize('name, layer, said', [
    ('sum, then norm', 'a', 'goes to add'), ('sum, then norm', 'b', 'goes to add'),
    ('cat, then norm', 'a', 'goes to cat'),
    ('norm of two layers', 'c1', '`b` also normalises the output of `c2`'),
    ('norm of two layers', 'c2', '`b` also normalises the output of `c1`'),
    ('norm of a layer and the input', 'c', '`b` also normalises other values'),
    ('behind a norm that is shared', 'c1', '`b` also normalises the output of `c2`'),
    ('no affine', '0', '`1` has no affine weight'), ('plain instance norm', '0', '`1` has no affine weight'),
    ('layer norm of more', '0', '`1` normalises 8 × 8 features, not 8 channels'),
    ('layer norm of rows', '0', '`1` (LayerNorm)'),
    ('sigmoid', '0', '`1` (Sigmoid) does not keep a zero channel zero'), ('pre-activation', '1.conv2', 'goes to add'),
    ('conv bn relu', '3', 'the output of the model'), ('layer twice', 'stem', 'goes to `c` (Conv2d)')])
def test_why_not(name, layer, said):
    why = trace_flow(zoo[name][0]()).why_not[layer]
    assert said in why and len(why) <= 120

def test_a_layer_with_norms_has_a_reason_only_for_what_is_missing():
    assert trace_flow(zoo['conv bn relu'][0]()).why_not.keys() == {'3'}
    some = nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, affine=False))
    flow = trace_flow(some)
    assert flow.norms == {'0': ('1',)} and '`3` has no affine weight' in flow.why_not['0']


# What else may be in a model

def test_modules_that_are_registered_twice_go_by_their_first_name():
    c, b = conv(3), nn.BatchNorm2d(4)
    model = Made(lambda s,x: s.again_b(s.again_c(x)), c=c, b=b, again_c=c, again_b=b)
    assert trace_flow(model).norms == trace_flow(Looks(model.f, c=c, b=b, again_c=c, again_b=b),
                                                 im).norms == {'c': ('b',)}

def test_norms_that_share_their_parameters_are_not_held():
    a, b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    b.weight = a.weight
    flow = trace_flow(Made(lambda s,x: s.a(s.c1(x)) + s.b(s.c2(x)), c1=conv(3), c2=conv(3), a=a, b=b))
    assert flow.norms == {} and all('shares its parameters' in w for w in flow.why_not.values())

def test_subclasses():
    class Mine(nn.Conv2d):
        def forward(self, x): return super().forward(x) if x.sum() > -1e9 else x  # not looked into
    class MyNorm(nn.BatchNorm2d): pass
    model = nn.Sequential(Mine(3, 4, 3), nn.ReLU(), MyNorm(4))
    assert trace_flow(model).norms == {'0': ('2',)}
    assert trace_flow(Looks(lambda s,x: s.net(x), net=model), im).norms == {'net.0': ('net.2',)}

def relu(x): return x + 1

torch.fx.wrap('relu')  # tracing does not look into it

def test_a_user_function_is_not_torchs():
    "One that happens to be called relu"
    assert trace_flow(Made(lambda s,x: s.b(relu(s.c(x))), c=conv(3), b=nn.BatchNorm2d(4))).norms == {}

@pytest.mark.parametrize('change', ['add_', 'view', 'function', 'module'])
@pytest.mark.parametrize('kind', [Made, Looks])
def test_what_is_written_into_a_tensor_is_noticed(kind, change):
    def forward(s, x):
        y = s.c(x)
        if change == 'add_': y.add_(1)
        elif change == 'view': y.view(-1).add_(1)
        elif change == 'function': F.hardsigmoid(y.view(-1), inplace=True)
        else: s.h(y)
        return s.b(y)
    flow = trace_flow(kind(forward, c=conv(3), b=nn.BatchNorm2d(4), h=nn.Hardsigmoid(inplace=True)), im)
    assert flow.norms == {} and flow.why_not['c']

def test_writing_to_a_part_falls_back_to_a_run():
    def forward(s, x):
        y = s.c(x)
        y[:, 0] = 1
        return s.b(y)
    assert trace_flow(Made(forward, c=conv(3), b=nn.BatchNorm2d(4)), im).norms == {}

def test_a_reshape_that_changes_nothing_is_one():
    "It gives the very tensor that it got"
    def forward(s, x): return s.b(s.c(x).flatten(1))
    for kind in (Made, Looks): assert trace_flow(kind(forward, c=nn.Linear(5, 4), b=nn.BatchNorm1d(4)), vec).norms == {}

def test_tensors_that_come_from_nowhere():
    "Made where nothing is noted down, they may have the `id` of one that is gone"
    def forward(s, x):
        a   = np.exp(x.numpy())
        old = id(s.c(x))
        new = [torch.from_numpy(a) for _ in range(100)]
        return s.b(next((t for t in new if id(t) == old), new[0]))
    assert trace_flow(Looks(forward, c=conv(3, 3), b=nn.BatchNorm2d(3)), im).norms == {}

def test_a_layer_that_fails_and_is_caught():
    def forward(s, x):
        try: s.bad(x)
        except RuntimeError: pass
        return s.b(s.c(x)) @ s.w
    model = Looks(forward, bad=conv(5), c=conv(3), b=nn.BatchNorm2d(4))
    model.w = nn.Parameter(torch.ones(8, 2))
    assert trace_flow(model, im).norms == {'c': ('b',)}
    assert multiply_adds(model, im) == {'': 4*8 * 8 * 2, 'bad': 0, 'c': 64*9*3*4, 'b': 0}

def test_a_hook_that_changes_the_output_is_seen_in_a_run():
    model = Looks(lambda s,x: s.b(s.c(x)), c=conv(3), b=nn.BatchNorm2d(4))
    model.c.register_forward_hook(lambda m, i, o: o + 1)
    assert trace_flow(model, im).norms == {}

def test_layers_inside_other_modules_are_named():
    model = nn.Sequential(nn.Linear(5, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    flow = trace_flow(model)
    assert flow.norms == {} and set(flow.why_not) == set(layers(model)) and 'never called' in flow.why_not['1.linear1']

def test_a_model_that_is_a_layer():
    assert trace_flow(nn.Linear(2, 3)).why_not.keys() == {''}
    assert trace_flow(nn.ReLU()) == Flow({}, {})

def test_frozen_models():
    model = Looks(lambda s,x: s.b(s.c(x)), c=conv(3), b=nn.BatchNorm2d(4)).requires_grad_(False)
    assert trace_flow(model, im).norms == {'c': ('b',)}

def test_one_item_is_enough():
    "Batch norm in training can't do with one value a channel"
    model = Looks(lambda s,x: s.b(s.c(x)), c=nn.Linear(5, 4), b=nn.BatchNorm1d(4)).train()
    assert trace_flow(model, vec[:1]).norms == {'c': ('b',)}

class Takes(nn.Module):
    "More than one argument"
    def __init__(self): super().__init__(); self.c, self.b = conv(3), nn.BatchNorm2d(4)
    def forward(self, x, scale=None, *, bump=False):
        y = self.c(x)
        if scale is not None: y = y + scale
        if bump: y = y + 1
        return {'y': [self.b(y)]} if y.sum() > -1e9 else y

@pytest.mark.parametrize('inputs, held', [(im, True), ((im,), True), ([im, torch.ones(1)], False), ({'x': im}, True),
                                          ({'x': im, 'bump': True}, False)])
def test_example_inputs(inputs, held): assert trace_flow(Takes(), inputs).norms == ({'c': ('b',)} if held else {})

def test_defaults_are_left_as_they_are():
    class Plain(Takes):
        def forward(self, x, scale=None, *, bump=False, other=(1, 2)):
            y = self.c(x)
            if scale is not None: y = y + scale
            return self.b(y + 1 if bump else y)
    assert trace_flow(Plain()).norms == trace_flow(Plain(), im).norms == {'c': ('b',)}
    assert trace_flow(Plain(), (im, torch.ones(1))).norms == {}
    assert trace_flow(Plain(), dict(x=torch.randn(1, 9, 9), scale=1.)).norms == {}  # traced: the input does not fit


# Models that cannot be traced

def test_without_an_example_nothing_is_held():
    flow = trace_flow(Looks(lambda s,x: s.b(s.c(x)), c=conv(3), b=nn.BatchNorm2d(4), d=conv()))
    assert flow.norms == {} and set(flow.why_not) == {'c', 'd'} and len(set(flow.why_not.values())) == 1
    assert 'example_inputs' in flow.why_not['c'] and 'control flow' in flow.why_not['c']

def test_an_example_that_does_not_fit():
    model = Looks(lambda s,x: s.b(s.c(x)), c=conv(3), b=nn.BatchNorm2d(4))
    for inputs in (torch.randn(2, 5, 8, 8), (im, im, im), {'y': im}, 3, 'x'):
        flow = trace_flow(model, inputs)
        assert flow.norms == {} and flow.why_not['c'].startswith('The model does not run')
        assert len(flow.why_not['c']) <= 120

def test_reasons_are_one_short_line():
    def forward(s, x): raise RuntimeError('first\nsecond' + 'x'*500)
    why = trace_flow(Made(forward, c=conv()), im).why_not['c']
    assert 'first' in why and '\n' not in why and 'second' not in why
    def forward(s, x): raise RuntimeError('x'*500)
    assert len(trace_flow(Made(forward, c=conv())).why_not['c']) == 120

def test_lazy_models_stay_lazy():
    model = Looks(lambda s,x: s.b(s.c(x)), c=nn.LazyConv2d(4, 3), b=nn.LazyBatchNorm2d())
    assert 'without a shape' in trace_flow(model, im).why_not['c']
    assert type(model.c) is nn.LazyConv2d

@pytest.mark.parametrize('model', [3, None, torch.relu, nn.ReLU])
def test_only_modules(model):
    with pytest.raises(TypeError, match='`model` must be an `nn.Module`'): trace_flow(model)
    with pytest.raises(TypeError, match='`model` must be an `nn.Module`'): multiply_adds(model, im)

def test_a_flow_is_a_frozen_picklable_value():
    flow = trace_flow(zoo['residual'][0]())
    assert pickle.loads(pickle.dumps(flow)) == flow
    with pytest.raises(FrozenInstanceError): flow.norms = {}


# The model stays as it was

class Careless(nn.Module):
    "Leaves traces of every call, draws random numbers, and may fail in the middle"
    def __init__(self, looks, fails):
        super().__init__()
        self.c, self.b, self.looks, self.fails = conv(3), nn.BatchNorm2d(4, momentum=.5), looks, fails
        self.register_buffer('steps', torch.zeros(3))
        self.b.eval()
    def forward(self, x):
        self.steps.add_(1)
        self.steps = self.steps * 2
        self.last = self.c.last = x
        self.b.train()  # its statistics move
        torch.rand(3), np.random.rand(), random.random()
        if self.looks and x.sum() < -1e9: return x
        y = self.b(self.c(x))
        if self.fails: raise KeyboardInterrupt if self.fails == 'interrupt' else RuntimeError('in the middle')
        return y

def state(model):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_always_called))
             for m in model.modules()]
    return dict(modes=[m.training for m in model.modules()], hooks=hooks,
                attrs=[sorted(vars(m)) for m in model.modules()],
                tensors={k: v.tolist() for k,v in model.state_dict().items()}, ids=[id(b) for b in model.buffers()],
                grads=[None if p.grad is None else p.grad.tolist() for p in model.parameters()],
                needs=[p.requires_grad for p in model.parameters()],
                numbers=(torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), np.random.get_state()[2],
                         random.getstate()),
                grad=torch.is_grad_enabled(), fast=torch.backends.mha.get_fastpath_enabled())

@pytest.mark.parametrize('f', [trace_flow, multiply_adds])
@pytest.mark.parametrize('fails', ['', 'error', 'interrupt'])
@pytest.mark.parametrize('looks', [False, True])
def test_nothing_is_left_behind(f, fails, looks):
    model = Careless(looks, '')
    model(im).sum().backward()
    del model.last, model.c.last
    model.fails = fails
    model.train()
    model.b.eval()
    model.c.weight.requires_grad_(False)
    before = state(model)
    try: f(model, im)
    except (RuntimeError, KeyboardInterrupt): assert fails
    assert state(model) == before

def test_a_pending_backward_pass_is_not_disturbed():
    model = nn.Sequential(conv(3), nn.BatchNorm2d(4)).eval()
    y = model(im)
    trace_flow(model, im), multiply_adds(model, im)
    y.sum().backward()

def test_a_model_that_merges_weights_in_eval_is_not_told():
    class Merges(nn.Sequential):
        def train(self, mode=True): raise AssertionError('modes are set one by one')
    model = Merges(conv(3), nn.BatchNorm2d(4))
    assert trace_flow(model).norms == {'0': ('1',)} and multiply_adds(model, im)['0'] > 0

def test_scripted_parts_keep_their_mode():
    model = nn.Sequential(conv(3), torch.jit.script(nn.Dropout(.5)), nn.BatchNorm2d(4)).train()
    assert trace_flow(model, im).norms == {} and [m.training for m in model.modules()] == [True]*4
    assert multiply_adds(model, im)['0'] == 64*9*3*4 and model[1].training

@pytest.mark.parametrize('training', [True, False])
def test_the_mode_makes_no_difference(training):
    model = zoo['residual'][0]().train(training)
    assert trace_flow(model) == trace_flow(deepcopy(model).train(not training)) and model.training == training


# torchvision

def following(l): return '.'.join([*l.split('.')[:-1], str(int(l.split('.')[-1]) + 1)])

def expect_resnet(l): return following(l) if 'downsample' in l else l.replace('conv', 'bn') if 'conv' in l else None
def expect_densenet(l):
    if l == 'features.conv0': return 'features.norm0'
    return l.replace('conv1', 'norm2') if 'denselayer' in l and l.endswith('conv1') else None
def expect_mobilenet(l): return following(l) if l.startswith('features') else None

vision = dict(resnet18=expect_resnet, resnet50=expect_resnet, densenet121=expect_densenet,
              mobilenet_v2=expect_mobilenet, vgg11_bn=expect_mobilenet)

@pytest.mark.parametrize('name', vision)
def test_torchvision(name):
    tv = pytest.importorskip('torchvision').models
    model = getattr(tv, name)(weights=None, num_classes=10, **(dict(init_weights=False) if name == 'vgg11_bn' else {}))
    if name == 'vgg11_bn': model.avgpool, model.classifier[0] = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 4096)  # quicker
    expected = {l: (n,) for l in layers(model) if (n := vision[name](l))}
    start = time.process_time()
    flow  = trace_flow(model)
    assert time.process_time() - start < 2
    assert flow.norms == expected and set(flow.why_not) == set(layers(model)) - set(expected)
    check_law(model, torch.randn(2, 3, 64, 64))

def test_norms_after_concatenations_are_not_held():
    tv = pytest.importorskip('torchvision').models
    flow = trace_flow(tv.DenseNet(4, (2, 2), 8, num_classes=3))
    held = {n for ns in flow.norms.values() for n in ns}
    assert 'features.norm5' not in held and not any(n.endswith('norm1') or n.endswith('transition1.norm') for n in held)
    assert flow.why_not['features.denseblock1.denselayer1.conv2'].endswith('goes to cat')

def test_a_run_of_resnet18():
    tv = pytest.importorskip('torchvision').models
    model = tv.resnet18(weights=None)
    run = trace_flow(Looks(lambda s,x: s.net(x), net=model), torch.randn(1, 3, 64, 64))
    assert run == Flow({f'net.{l}': tuple(f'net.{n}' for n in ns) for l,ns in trace_flow(model).norms.items()},
                       {'net.fc': 'No norm gets its output: it goes to the output of the model'})


# Multiply-adds

@pytest.mark.parametrize('layer, x, n', [
    (lambda: nn.Conv2d(3, 8, 3, padding=1), (3, 8, 8), 8*8 * 9 * 3 * 8),
    (lambda: nn.Conv2d(3, 8, 3, stride=2), (3, 9, 9), 4*4 * 9 * 3 * 8),
    (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 6, 6), 4*4 * 9 * 2 * 6),
    (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (4, 6, 6), 6*6 * 9 * 4),
    (lambda: nn.Conv1d(2, 3, 5), (2, 9), 5 * 5 * 2 * 3),
    (lambda: nn.Conv3d(2, 3, 2), (2, 3, 3, 3), 2**3 * 2**3 * 2 * 3),
    # each input meets each weight of its channel
    (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 5, 5), 5*5 * 4 * 4 * 6),
    (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (4, 5, 5), 5*5 * 4 * 4 * 3),
    (lambda: nn.Linear(5, 7), (5,), 5 * 7),
    (lambda: nn.Linear(5, 7, bias=False), (5,), 5 * 7),
    (lambda: nn.Linear(5, 7), (9, 5), 9 * 5 * 7)])
def test_multiply_adds_by_hand(layer, x, n):
    for bs in (1, 2, 5):
        assert multiply_adds(layer(), torch.randn(bs, *x)) == {'': n}
        assert multiply_adds(nn.Sequential(layer(), nn.ReLU()), (torch.randn(bs, *x),)) == {'0': n}

def test_each_layer_has_its_own():
    model = Made(lambda s,x: s.body['b'](s.body['a'](s.body['a'](x))),
                 body=nn.ModuleDict(dict(a=conv(3, 3), b=nn.Sequential(conv(3, 2), nn.BatchNorm2d(2)))))
    model.scale = nn.Parameter(torch.ones(1))
    assert multiply_adds(model, im) == {'': 0, 'body.a': 2 * 64*9*3*3, 'body.b.0': 64*9*3*2, 'body.b.1': 0}

@pytest.mark.parametrize('frozen', [False, True])
def test_attention_is_counted(frozen):
    "Of 6 tokens of width 8 in 2 heads: three projections and both products are the module's own, as it calls no other"
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).requires_grad_(not frozen).eval()
    n = multiply_adds(model, torch.randn(3, 6, 8))
    assert (n['linear1'], n['linear2'], n['norm1']) == (6*8*16, 6*16*8, 0)
    assert n['self_attn'] == 4 * 6*8*8 + 2 * 6*6*8 and n['self_attn.out_proj'] == 0

def test_resnet18():
    model = pytest.importorskip('torchvision').models.resnet18(weights=None)
    n = multiply_adds(model, torch.randn(1, 3, 224, 224))
    assert n['conv1'] == 112*112 * 49 * 3 * 64 and n['fc'] == 512 * 1000 and sum(n.values()) == 1_814_073_344
    one, three = (sum(multiply_adds(model, torch.randn(n, 3, 64, 64)).values()) for n in (1, 3))
    assert one == three

def test_multiply_adds_need_a_batch():
    with pytest.raises(ValueError, match='no tensor'): multiply_adds(conv(), ())
    with pytest.raises(ValueError, match='no tensor'): multiply_adds(conv(), None)

def test_errors_of_the_model_come_through():
    with pytest.raises(RuntimeError, match='channels'): multiply_adds(conv(3), torch.randn(1, 5, 8, 8))
