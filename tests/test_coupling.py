"What is coupled: networks small enough to see it, what keeps a channel, and the same groups as torch-pruning's"
import copy, threading

import pytest, torch, torch.nn as nn, torch.nn.functional as F, torch.nn.utils.prune

from fasterai_clone.prune.all import *
from fasterai_clone.model.channels import trace
from fasterai_clone.model.channels.trace import RULES, RuleFailed, Unforeseen


class Net(nn.Module):
    "Layers by name, and how they are called"
    def __init__(self, forward, **layers):
        super().__init__()
        for k,v in layers.items(): self.add_module(k, v)
        self.f = forward
    def forward(self, *args, **kwargs): return self.f(self, *args, **kwargs)

def conv(i, o, **kwargs): return nn.Conv2d(i, o, 3, padding=1, **kwargs)
def image(*shape): return torch.randn(2, *(shape or (3, 4, 4)))

def free(model, x, **kwargs):
    "Name → ((name, axis) → the channel of each position), for the groups that can shrink"
    return {g.name: {(m.name, m.axis): m.channel.tolist() for m in g.members}
            for g in coupled_groups(model, x, **kwargs) if not g.why_not}

def kept(model, x): return {g.name: g.why_not for g in coupled_groups(model, x) if g.why_not}


def test_two_convolutions():
    assert free(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2)), image()) == {
        '0': {('0.weight', 0): [0, 1, 2, 3], ('0.bias', 0): [0, 1, 2, 3], ('2.weight', 1): [0, 1, 2, 3]}}

def test_norms_have_all_their_vectors():
    for norm,own in [(nn.BatchNorm2d(4), ['weight', 'bias', 'running_mean', 'running_var']),
                     (nn.InstanceNorm2d(4, affine=True), ['weight', 'bias']),
                     (nn.GroupNorm(4, 4), ['weight', 'bias']),
                     (nn.BatchNorm2d(4, track_running_stats=False), ['weight', 'bias'])]:
        groups = free(nn.Sequential(conv(3, 4, bias=False), norm, nn.ReLU(), conv(4, 2)), image())
        assert groups == {'0': {(k, a): [0, 1, 2, 3]
                                for k,a in [('0.weight', 0), ('3.weight', 1), *[(f'1.{k}', 0) for k in own]]}}, norm

def test_roles():
    group, _ = coupled_groups(nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.PReLU(4), conv(4, 2)), image())
    assert {m.name: m.role for m in group.members} == {
        '0.weight': 'producer', '0.bias': 'bias', '1.weight': 'norm', '1.bias': 'norm', '2.weight': 'scale',
        '3.weight': 'consumer', '1.running_mean': 'statistics', '1.running_var': 'statistics'}
    assert [m.name for m in group.members if m.held] == ['0.weight', '0.bias', '1.weight', '1.bias']

def test_two_consumers():
    net = Net(lambda m, x: (lambda y: m.b(y) + m.c(y))(m.a(x)), a=conv(3, 4), b=conv(4, 2), c=conv(4, 2))
    assert free(net, image()) == {'a': {(k, i): [0, 1, 2, 3]
                                        for k,i in [('a.weight', 0), ('a.bias', 0), ('b.weight', 1), ('c.weight', 1)]}}

def test_a_sum_loses_the_same_channel():
    net = Net(lambda m, x: m.c(m.a(x) + m.b(x)), a=conv(3, 4), b=conv(3, 4), c=conv(4, 2))
    assert free(net, image()) == {'a': {(k, i): [0, 1, 2, 3] for k,i in
                                        [('a.weight', 0), ('a.bias', 0), ('b.weight', 0), ('b.bias', 0),
                                         ('c.weight', 1)]}}

def test_concatenation():
    net = Net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), a=conv(3, 2), b=conv(3, 3), c=conv(5, 2))
    assert free(net, image()) == {
        'a': {('a.weight', 0): [0, 1],    ('a.bias', 0): [0, 1],    ('c.weight', 1): [0, 1, -1, -1, -1]},
        'b': {('b.weight', 0): [0, 1, 2], ('b.bias', 0): [0, 1, 2], ('c.weight', 1): [-1, -1, 0, 1, 2]}}

def test_concatenated_with_the_input():
    net = Net(lambda m, x: m.c(torch.cat([m.a(x), x], 1)), a=conv(3, 2), c=conv(5, 2))
    assert free(net, image()) == {'a': {('a.weight', 0): [0, 1], ('a.bias', 0): [0, 1],
                                        ('c.weight', 1): [0, 1, -1, -1, -1]}}

def test_depthwise():
    groups = free(nn.Sequential(conv(3, 4), conv(4, 4, groups=4), conv(4, 2)), image())
    assert groups == {'0': {(k, i): [0, 1, 2, 3] for k,i in [('0.weight', 0), ('0.bias', 0), ('1.weight', 0),
                                                             ('1.bias', 0), ('2.weight', 1)]}}

def test_depthwise_with_two_outputs_for_each():
    groups = free(nn.Sequential(conv(3, 2), conv(2, 4, groups=2), conv(4, 2)), image())
    assert groups['0'][('0.weight', 0)] == [0, 1]
    assert groups['0'][('1.weight', 0)] == groups['0'][('2.weight', 1)] == [0, 0, 1, 1]

@pytest.mark.parametrize('transposed', [False, True])
def test_grouped_by_whole_groups(transposed):
    grouped = nn.ConvTranspose2d(4, 6, 3, groups=2) if transposed else conv(4, 6, groups=2)
    groups  = free(nn.Sequential(conv(3, 4), grouped, conv(6, 2)), image())
    rows = [0, 0, 1, 1] if transposed else [0, 0, 0, 1, 1, 1]
    assert groups == {'0': {('0.weight', 0): [0, 0, 1, 1], ('0.bias', 0): [0, 0, 1, 1], ('1.weight', 0): rows,
                            ('1.bias', 0): [0, 0, 0, 1, 1, 1], ('2.weight', 1): [0, 0, 0, 1, 1, 1]}}

@pytest.mark.parametrize('nd', [1, 2, 3])
def test_flatten(nd):
    Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[nd-1]
    groups = free(nn.Sequential(Conv(3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 2**nd, 5)), image(3, *[2]*nd))
    assert groups == {'0': {('0.weight', 0): [0, 1], ('0.bias', 0): [0, 1], ('3.weight', 1): [0]*2**nd + [1]*2**nd}}

def test_transposed():
    groups = free(nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ConvTranspose2d(4, 2, 2)), image())
    assert groups == {'0': {('0.weight', 1): [0, 1, 2, 3], ('0.bias', 0): [0, 1, 2, 3], ('1.weight', 0): [0, 1, 2, 3]}}

def test_pixel_shuffle_takes_its_inputs_together():
    groups = free(nn.Sequential(conv(3, 8), nn.PixelShuffle(2), conv(2, 3)), image())
    assert groups['0'][('0.weight', 0)] == [0]*4 + [1]*4 and groups['0'][('2.weight', 1)] == [0, 1]

@pytest.mark.parametrize('x', [image(3), image(5, 3), image(5, 6, 3)])
def test_hidden_units(x):
    groups = free(nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)), x)
    assert groups == {'0': {('0.weight', 0): [0, 1, 2, 3], ('0.bias', 0): [0, 1, 2, 3], ('2.weight', 1): [0, 1, 2, 3]}}

def test_gated_units():
    "Both halves of a GLU lose the same"
    groups = free(nn.Sequential(nn.Linear(3, 4), nn.GLU(), nn.Linear(2, 2)), image(3))
    assert groups == {'0': {('0.weight', 0): [0, 1, 0, 1], ('0.bias', 0): [0, 1, 0, 1], ('2.weight', 1): [0, 1]}}
    def forward(m, x):
        a, b = m.a(x).chunk(2, -1)
        return m.b(a * b.sigmoid())
    groups = free(Net(forward, a=nn.Linear(3, 4), b=nn.Linear(2, 2)), image(3))
    assert groups == {'a': {('a.weight', 0): [0, 1, 0, 1], ('a.bias', 0): [0, 1, 0, 1], ('b.weight', 1): [0, 1]}}

def test_heads():
    def forward(m, x, **kwargs): return m.b(m.attn(*[m.a(x)]*3, **kwargs)[0])
    net = Net(forward, a=nn.Linear(3, 4), attn=nn.MultiheadAttention(4, 2, batch_first=True), b=nn.Linear(4, 2))
    for kwargs in ({}, dict(need_weights=False)):
        groups = free(net, dict(x=torch.randn(2, 5, 3), **kwargs))
        assert groups['attn'] == {('attn.in_proj_weight', 0): [0, 0, 1, 1]*3, ('attn.in_proj_bias', 0): [0, 0, 1, 1]*3,
                                  ('attn.out_proj.weight', 1): [0, 0, 1, 1]}
        assert groups['a'][('attn.in_proj_weight', 1)] == [0, 1, 2, 3]
    net.f = lambda m, x: m.b(m.attn(*[m.a(x)]*3)[0]) + m.attn(*[m.a(x)]*3)[1].mean()
    assert 'attn' not in free(net, torch.randn(2, 5, 3))  # somebody looks at the mean of the heads

def test_squeeze_and_excitation():
    def forward(m, x):
        y = m.a(x)
        return m.b(y * m.up(m.down(y.mean((2, 3), keepdim=True)).relu()).sigmoid())
    net = Net(forward, a=conv(3, 4), down=nn.Conv2d(4, 2, 1), up=nn.Conv2d(2, 4, 1), b=conv(4, 2))
    groups = free(net, image())
    assert set(groups) == {'a', 'down'} and ('up.weight', 0) in groups['a'] and ('down.weight', 1) in groups['a']
    assert ('up.weight', 1) in groups['down']


@pytest.mark.parametrize('net, x, why', [
    (nn.Sequential(conv(3, 4), nn.Sigmoid(), conv(4, 2)), image(), 'does not keep zero at zero with `sigmoid`'),
    (nn.Sequential(conv(3, 4), nn.Softmax(1), conv(4, 2)), image(), '`1` (Softmax) takes its `softmax`'),
    (nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, affine=False), conv(4, 2)), image(), '`1` (BatchNorm2d) has no scale'),
    (nn.Sequential(conv(3, 4), nn.GroupNorm(1, 4), conv(4, 2)), image(),
     '`1` (GroupNorm) normalises over all channels at once'),
    (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), image(3),
     '`1` (LayerNorm) normalises over all channels at once'),
    (Net(lambda m, x: m.b(m.a(x) + x), a=conv(3, 3), b=conv(3, 2)), image(),
     'it meets a value that does not come from a layer'),
    (Net(lambda m, x: m.b(m.a(x) + 1), a=conv(3, 4), b=conv(4, 2)), image(), 'does not keep zero at zero with `add`'),
    (Net(lambda m, x: m.b(m.a(x) - m.a(x).mean(1, keepdim=True)), a=conv(3, 4), b=conv(4, 2)), image(),
     'computed from their mean'),
    (Net(lambda m, x: m.b(m.a(x)[:, 1:]), a=conv(3, 4), b=conv(3, 2)), image(), 'takes a part of it with `slice`'),
    (Net(lambda m, x: m.b(m.a(x).cumsum(1)), a=conv(3, 4), b=conv(4, 2)), image(), 'uses `cumsum` on it'),
    (Net(lambda m, x: m.b(m.a(x).unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)), a=conv(3, 4), b=conv(4, 2)),
     image(), 'splits it into a fixed number of parts with `view`'),
    (Net(lambda m, x: F.conv2d(m.a(x), torch.ones(2, 4, 1, 1)), a=conv(3, 4)), image(),
     'reads it with weights that are not parameters'),
    (Net(lambda m, x: m.b(F.pad(m.a(x), (1, 1), value=3.)), a=conv(3, 4), b=conv(4, 2)), image(), 'pads with 3.0'),
])
def test_what_keeps_channels(net, x, why):
    reasons = kept(net, x)
    first = next(iter(reasons))
    assert why in reasons[first] and not free(net, x).get(first)

def test_parameters_that_scale_need_not_be_zero_and_those_that_are_added_must():
    net = Net(lambda m, x: m.b(m.a(x) * m.scale + m.shift), a=conv(3, 4), b=conv(4, 2))
    net.scale, net.shift = (nn.Parameter(torch.ones(4, 1, 1)) for _ in 'ab')
    group = coupled_groups(net, image())[0]
    assert {m.name: m.held for m in group.members} == {'scale': False, 'shift': True, 'a.weight': True, 'a.bias': True,
                                                       'b.weight': False}

def test_a_buffer_that_is_added_keeps_its_channels():
    net = Net(lambda m, x: m.b(m.a(x) + m.shift), a=conv(3, 4), b=conv(4, 2))
    net.register_buffer('shift', torch.ones(4, 1, 1))
    assert 'the buffer `shift` is in it' in kept(net, image()).values() and not free(net, image())

def test_tokens_are_no_channels():
    "A class token, positions, a part of the tokens: the channels are free as long as nothing normalises over them"
    def forward(m, x):
        x = torch.cat([m.token.expand(len(x), -1, -1), m.a(x).flatten(2).transpose(1, 2)], 1) + m.place
        return m.b(x[:, 0].relu())
    net = Net(forward, a=conv(3, 4), b=nn.Linear(4, 2))
    net.token, net.place = nn.Parameter(torch.ones(1, 1, 4)), nn.Parameter(torch.ones(1, 17, 4))
    group = free(net, image())['a']
    assert set(group) == {('token', 2), ('place', 2), ('a.weight', 0), ('a.bias', 0), ('b.weight', 1)}
    assert set(map(tuple, group.values())) == {(0, 1, 2, 3)}

@pytest.mark.parametrize('mix, alone', [(nn.Linear(5, 5, bias=False), True), (nn.Linear(5, 5), False),
                                        (nn.LayerNorm(5), False), (nn.BatchNorm1d(4), True)])
def test_what_is_added_along_another_axis(mix, alone):
    "A bias for each token does not go with a channel: its zeros are not zero any more"
    net = Net(lambda m, x: m.b(m.mix(m.a(x).transpose(1, 2)).transpose(1, 2)), a=nn.Linear(3, 4), mix=mix,
              b=nn.Linear(4, 2))
    assert ('a' in free(net, torch.randn(2, 5, 3))) == alone
    if not alone: assert '`mix`' in kept(net, torch.randn(2, 5, 3))['a']

@pytest.mark.parametrize('wrap', [nn.DataParallel, lambda m: torch.compile(m, backend='eager')])
def test_wrapped_models_have_the_names_inside(wrap):
    net = nn.Sequential(conv(3, 4), conv(4, 2))
    assert [g.name for g in coupled_groups(wrap(net), image())] == ['0', '1']

def test_group_norm_by_whole_groups():
    groups = free(nn.Sequential(conv(3, 4), nn.GroupNorm(2, 4), conv(4, 2)), image())
    assert groups['0'][('0.weight', 0)] == groups['0'][('1.weight', 0)] == groups['0'][('2.weight', 1)] == [0, 0, 1, 1]

def test_outputs_are_fixed():
    assert kept(nn.Sequential(conv(3, 4), conv(4, 2)), image()) == {'1': 'it is the output of the model'}
    net = Net(lambda m, x: dict(a=m.a(x), b=[m.b(m.a(x))]), a=conv(3, 4), b=conv(4, 2))
    assert kept(net, image()) == {k: 'it is the output of the model' for k in 'ab'}

def test_shared_weights_are_one():
    a = conv(4, 4)
    groups = free(Net(lambda m, x: m.c(m.a(m.a(m.s(x)))), s=conv(3, 4), a=a, c=conv(4, 2)), image())
    assert groups == {'s': {(k, i): [0, 1, 2, 3] for k,i in [('s.weight', 0), ('s.bias', 0), ('a.weight', 0),
                                                             ('a.weight', 1), ('a.bias', 0), ('c.weight', 1)]}}

def test_auxiliary_classifiers_run_in_train_mode_only():
    net = Net(lambda m, x: (m.b(m.a(x)), m.aux(m.a(x))) if m.training else m.b(m.a(x)), a=conv(3, 4),
              b=conv(4, 2), aux=conv(4, 2))
    assert free(net, image())['a'][('aux.weight', 1)] == [0, 1, 2, 3]


def test_the_model_stays_as_it_is():
    net = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.Dropout(), conv(4, 2)).train()
    net[1].eval()
    good, *wrong = image(), torch.randn(2, 5, 4, 4), None, 'x'
    before, modes, state = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()], torch.get_rng_state()
    coupled_groups(net, good)
    for bad in wrong:
        with pytest.raises(ValueError): coupled_groups(net, bad)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    assert modes == [m.training for m in net.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters())

def test_errors():
    net = nn.Sequential(conv(3, 4), conv(4, 2))
    with pytest.raises(ValueError, match=r'Sequential does not run on `example_inputs`, in `0` \(Conv2d\)'):
        coupled_groups(net, torch.randn(2, 5, 4, 4))
    with pytest.raises(ValueError, match='`example_inputs` is required'): coupled_groups(net, None)
    with pytest.raises(TypeError, match='must be an `nn.Module`, got function'): coupled_groups(image, image())
    with pytest.raises(ValueError, match='Unknown layer in `exclude`'): coupled_groups(net, image(), exclude='nothing')
    with pytest.raises(ValueError, match='run one batch through it first'): coupled_groups(nn.LazyLinear(3), image())
    with pytest.raises(ValueError, match='contains no tensor'):
        coupled_groups(Net(lambda m, x: 3, a=conv(3, 4)), image())
    with pytest.raises(ValueError, match='cannot be copied'):
        coupled_groups(Net(lambda m, x: x, a=type('C', (nn.Conv2d,), {'__deepcopy__': 0})(3, 4, 1)), image())

def test_held_by_torch_prune():
    net = nn.Sequential(conv(3, 4), conv(4, 2))
    torch.nn.utils.prune.random_structured(net[0], 'weight', 0.5, 0)
    with pytest.raises(ValueError, match='Call `prune.remove` first'): coupled_groups(net, image())
    torch.nn.utils.prune.remove(net[0], 'weight')
    assert list(free(net, image())) == ['0']

@pytest.mark.parametrize('exclude', ['b', '[b]', [nn.Linear], lambda n, m: n == 'b'])
def test_exclude(exclude):
    net = Net(lambda m, x: m.c(m.b(m.a(x)).mean((2, 3))), a=conv(3, 4), b=conv(4, 5), c=nn.Linear(5, 2))
    assert set(free(net, image())) == {'a', 'b'}
    assert set(free(net, image(), exclude=exclude)) == ({'a'} if exclude == [nn.Linear] else set())

def test_in_a_thread():
    found = []
    t = threading.Thread(target=lambda: found.append(free(nn.Sequential(conv(3, 4), conv(4, 2)), image())))
    t.start(), t.join()
    assert list(found[0]) == ['0']

class Clock:
    "In the place of `time`: goes on where it is told to"
    now = 0.
    def monotonic(self): return self.now
    def ticking(self):
        "A function that lets a second pass; what a model remembers is put back after a run, a clock must not be"
        def tick(): self.now += 1
        return tick

class Slow(nn.Module):
    "Steps that take a second each; `only` in train mode, or in eval mode"
    def __init__(self, tick, only=None):
        super().__init__()
        self.tick, self.only = tick, only
    def forward(self, x):
        for _ in range(100 if self.only in (None, self.training) else 0):
            self.tick()
            x = x * 1
        return x

@pytest.mark.parametrize('caught', [False, True])
@pytest.mark.parametrize('only', [None, True])
def test_timeout(monkeypatch, caught, only):
    "Between operations, in any thread; in the second run too, which is in train mode and forgives other errors"
    clock, x, found = Clock(), image(), []
    monkeypatch.setattr(trace, 'time', clock)
    def forward(m, x):
        x = m.a(x)
        try: x = m.slow(x)
        except TimeoutError:
            if not caught: raise
        return m.b(x)
    net = Net(forward, a=conv(3, 4), slow=Slow(clock.ticking(), only), b=conv(4, 2))
    net.unused = nn.Linear(2, 2)                                        # so that there is a second run
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    def ask():
        start = clock.now
        with pytest.raises(TimeoutError) as e: coupled_groups(net, x, timeout=10)
        found.append((str(e.value), clock.now - start))
    ask()
    t = threading.Thread(target=ask)
    t.start(), t.join()
    if not caught:
        assert found == [('Tracing Net took longer than 10 s and stopped in `slow` (Slow). Pass smaller '
                          '`example_inputs`, '
                                     'or increase `timeout` (seconds; None: no limit)', 10)] * 2
    else: assert len(found) == 2 and all(n == 10 for _,n in found)      # the next operation is refused as well
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    for enough in (201, 300., None): assert list(free(net, x, timeout=enough)) == ['a']

@pytest.mark.parametrize('timeout', [0, -1, '60', True, float('nan')])
def test_timeout_refused(timeout):
    with pytest.raises(ValueError, match='`timeout` must be a number of seconds above 0'):
        coupled_groups(conv(3, 4), image(), timeout=timeout)

def test_an_error_of_the_model_is_no_timeout():
    def forward(m, x): raise TimeoutError('of its own')
    net = nn.Sequential(conv(3, 4), Net(forward))
    with pytest.raises(ValueError, match=r'does not run on `example_inputs`, in `1` \(Net\): .*of its own'):
        coupled_groups(net, image())

def test_scripted_parts_are_seen_through():
    assert list(free(nn.Sequential(conv(3, 4), torch.jit.script(nn.ReLU()), conv(4, 2)), image())) == ['0']

def test_every_operation_has_its_rule():
    assert len(RULES) > 100 and all(map(callable, RULES.values()))
    assert {'pointwise', 'unknown', 'convolution', 'mm', 'cat', 'view', 'native_layer_norm', '_softmax',
            'embedding'} <= RULES.keys()

def test_a_form_that_a_rule_refuses_is_unknown(monkeypatch):
    def refuses(trace, call): raise Unforeseen('a form of it')
    monkeypatch.setitem(RULES, 'convolution', refuses)
    assert not free(nn.Sequential(conv(3, 4), conv(4, 2)), image())

@pytest.mark.parametrize('training', [False, True])
def test_a_bug_in_a_rule_is_no_unknown_operation(monkeypatch, training):
    """It is said as what it is, also in the second run, which is in train mode and forgives errors of the model; its
    channels stay"""
    right = RULES['convolution']
    def broken(trace, call):
        if trace.model.training == training: raise KeyError('a bug')
        right(trace, call)
    monkeypatch.setitem(RULES, 'convolution', broken)
    net = Net(lambda m, x: m.b(m.a(x)), a=conv(3, 4), b=conv(4, 2))
    net.unused = nn.Linear(2, 2)  # so that there is a second run
    with pytest.raises(RuleFailed, match=r"The rule for `convolution` fails in `a` \(Conv2d\): KeyError: 'a bug'"):
        coupled_groups(net, image())
    with pytest.warns(RuleFailed, match='please report it'): groups = coupled_groups(net, image())
    if not training: assert groups[0].why_not == '`a` (Conv2d) uses `convolution` on it'

def test_a_rule_for_an_operator_of_ones_own(monkeypatch):
    "Without one its channels stay, with one of a line they can be removed"
    @torch.library.custom_op('fasterai_clone_tests::twice', mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor: return 2*x
    class Twice(nn.Module):
        def forward(self, x): return twice(x)
    net = nn.Sequential(conv(3, 4), Twice(), conv(4, 2))
    assert not free(net, image())
    monkeypatch.setitem(RULES, 'twice', lambda trace, call: trace.put(call.out, trace.get(call.args[0])))
    assert list(free(net, image())) == ['0']


def scores(model): return {k: p.detach().abs() for k,p in model.named_parameters()}

def test_scores_by_hand():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1., 2.], [3., -4.],
                                          [0., 0.]])), net[0].bias.copy_(torch.tensor([6., 2., -3.]))
    groups = coupled_groups(net, torch.randn(1, 2))
    assert channel_scores(groups, scores(net))[0].tolist() == [3., 3., 1.]
    assert channel_scores(groups, scores(net), 'sum')[0].tolist() == [9., 9., 3.]
    assert channel_scores(groups, scores(net), 'first')[0].tolist() == [3., 7., 0.]
    masks = coupled_masks(groups, channel_scores(groups, scores(net), 'first'), 67)
    assert masks['0.weight'].tolist() == [[False]*2, [True]*2, [False]*2]
    assert masks['0.bias'].tolist() == [False, True, False]
    assert list(masks) == ['0.weight', '0.bias']

@pytest.mark.parametrize('sparsity', [0, 30, 50, 80, 100])
def test_exact_counts(sparsity):
    torch.manual_seed(0)
    net = nn.Sequential(conv(3, 10), nn.ReLU(), conv(10, 7), nn.ReLU(), conv(7, 2))
    groups = coupled_groups(net, image())
    values = channel_scores(groups, scores(net))
    def dropped(context):
        return {k: int((~m).sum()) for k,m in coupled_masks(groups, values, sparsity, context).items() if 'bias' in k}
    local = {'0.bias': min(sparsity*10//100, 9), '2.bias': min(sparsity*7//100, 6)}
    assert dropped('local') == {k: v for k,v in local.items() if v}
    assert sum(dropped('global').values()) == min(sparsity*17//100, 15)

def test_global_ranks_over_all():
    net = nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 4), nn.Linear(4, 1))
    groups = coupled_groups(net, torch.randn(1, 1))
    masks  = coupled_masks(groups, [torch.tensor([5., 6., 7.]), torch.tensor([1., 2., 3., 8.]), torch.zeros(1)], 50,
                           'global')
    assert masks['1.bias'].tolist() == [False, False, False, True] and '0.bias' not in masks  # three of seven


# -- the same as torch-pruning's -------------------------------------------------------------------

def layers_of(groups, fit):
    "Layers that lose output channels together (axis 0), and those that lose inputs (1), with the positions"
    return {frozenset((m.module, m.axis, tuple(m.channel.ge(0).nonzero()[:, 0].tolist())) for m in g.members
                      if m.name.endswith('.weight') and fit(m.module)) for g in groups}

def layers_of_torch_pruning(model, x, fit):
    tp = pytest.importorskip('torch_pruning')
    graph, names = tp.DependencyGraph().build_dependency(model, x), {m: n for n,m in model.named_modules()}
    found = set()
    for g in graph.get_all_groups():
        items = [(names.get(item.dep.target.module), item) for item in g]
        found.add(frozenset((n, 0 if graph.is_out_channel_pruning_fn(item.dep.handler) else 1,
                             tuple(sorted(set(item.idxs))))
                            for n,item in items if n is not None and fit(n)))
    return found

def with_outputs_of(name, groups):
    "The group of what the layer `name` gets and the one of what it makes as one"
    gets, makes = (next(g for g in groups if any(o[:2] == (name, axis) for o in g)) for axis in (1, 0))
    return groups - {gets, makes} | {frozenset(o for o in gets | makes if o[:2] != (name, 1))}

NETS = dict.fromkeys('resnet18 resnet50 vgg11_bn mobilenet_v2 mobilenet_v3_small densenet121 efficientnet_b0 '
                     'regnet_y_400mf squeezenet1_1 mnasnet0_5'.split(), {}) | {
    # those classifiers run in train mode only, where torch-pruning does not look
    'googlenet': dict(aux_logits=False, init_weights=False)}

@pytest.mark.parametrize('name', NETS)
def test_same_groups_as_torch_pruning(name):
    """The same in all of these, but for convolutions with several groups, as RegNet has them: torch-pruning takes as
    many inputs out of each group, and outputs apart from them; here a whole group goes, with its inputs and outputs, so
    that the weights that stay are those there were"""
    models = pytest.importorskip('torchvision.models')
    model, x = models.get_model(name, weights=None, **NETS[name]).eval(), torch.randn(1, 3, 64, 64)
    def fit(n): return isinstance(model.get_submodule(n), (nn.Conv2d, nn.Linear))
    ours, theirs = layers_of(coupled_groups(model, x), fit), layers_of_torch_pruning(model, x, fit)
    grouped = [n for n,m in model.named_modules() if isinstance(m, nn.Conv2d) and 1 < m.groups < m.in_channels]
    assert (len(grouped) > 0) == (ours != theirs) == (name == 'regnet_y_400mf')
    for n in grouped: theirs = with_outputs_of(n, theirs)
    assert ours == theirs
