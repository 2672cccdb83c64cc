"What the doors of `model/` do"
import re

import pytest, torch, torch.nn as nn

from fasterai_clone.model.channels.labels import Labels
from fasterai_clone.model.channels.trace import RULES, Trace
from fasterai_clone.model.patterns import as_patterns, matches
from fasterai_clone.model.preserve import all_or_nothing
from fasterai_clone.model.run import names_running
from fasterai_clone.model.wrappers import plain_name, unwrapped, without_compile
from fasterai_clone.prune.all import coupled_groups, thin


def test_names_without_wrappers():
    net = nn.Sequential(torch.compile(nn.Linear(2, 3)), nn.ReLU())
    assert plain_name('a._orig_mod.b.weight') == 'a.b.weight' and unwrapped(nn.DataParallel(torch.compile(net))) is net
    with without_compile(net): assert list(net.state_dict()) == ['0.weight', '0.bias']
    assert list(net.state_dict()) == ['0._orig_mod.weight', '0._orig_mod.bias']

def test_patterns_of_all_kinds():
    fc = nn.Linear(2, 3)
    yes = ('head.fc', 'head.*', 'head.fc.weight', re.compile('fc'), nn.Linear, lambda n, m: True)
    no = ('fc', nn.Conv2d, lambda n, m: False)
    assert [matches(p, 'head.fc', fc, 'head.fc.weight') for p in (*yes, *no)] == [True]*6 + [False]*3
    with pytest.raises(ValueError, match='`exclude`: .head. is not a layer, but contains some'):
        as_patterns('exclude', 'head', [('head.fc', fc, 'head.fc.weight')])

def test_names_running_ends_with_no_hooks_also_after_an_error():
    class Fails(nn.Module):
        def forward(self, x): raise KeyError(inside[-1])
    net, inside = nn.Sequential(nn.Linear(2, 2), Fails()), []
    with pytest.raises(KeyError, match='1'), names_running(net, inside): net(torch.rand(1, 2))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())

def test_labels_by_hand():
    "Three sets of numbers: a role that must be zero wins over one that need not; what meets no layer stays"
    sets = Labels()
    a, b = sets.new('a.weight', 0, 3), sets.new('b.weight', 1, 3)
    sets.join(a, b)
    sets.mark(b, 'scale'), sets.mark(b, 'bias'), sets.mark(a, 'consumer'), sets.mark(a, 'bias')
    assert sets.roots(b).tolist() == [0, 1, 2] and sets.role == {0: 'consumer', 1: 'bias'}
    sets.join(a[:1], torch.tensor([-1]))
    assert sets.why == {0: 'it meets a value that does not come from a layer'}

def test_a_trace_leaves_sizes_as_they_were():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with torch.no_grad(), Trace(net):
        assert type(net[0].out_channels) is not int and type(net[1].num_features) is not int
    assert (type(net[0].out_channels), net[1].num_features) == (int, 4)

def test_interrupted_all_is_as_before():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    opt = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.rand(4, 2)).sum().backward()
    opt.step()
    weight, momentum, numbers = net[0].weight, opt.state[net[0].weight]['momentum_buffer'], net[1].bias.detach().clone()
    with pytest.raises(KeyboardInterrupt), all_or_nothing(net, opt, [net[1].bias]):
        net[0].weight, net[0].out_features = nn.Parameter(torch.zeros(2, 2)), 2
        opt.param_groups[0]['params'][0] = net[0].weight
        opt.state.clear()
        with torch.no_grad(): net[1].bias += 1
        raise KeyboardInterrupt
    assert net[0].weight is weight is opt.param_groups[0]['params'][0] and net[0].out_features == 3
    assert opt.state[weight]['momentum_buffer'] is momentum and torch.equal(net[1].bias, numbers)

@pytest.mark.parametrize('known', [False, True])
def test_a_new_operator_takes_one_rule(monkeypatch, known):
    "And the thinned network computes the same"
    @torch.library.custom_op(f'fasterai_clone_tests::half{int(known)}', mutates_args=())
    def half(x: torch.Tensor) -> torch.Tensor: return x / 2
    class Half(nn.Module):
        def forward(self, x): return half(x)
    net, x = nn.Sequential(nn.Linear(3, 4), Half(), nn.Linear(4, 2)), torch.randn(5, 3)
    with torch.no_grad(): net[0].weight[1], net[0].bias[1] = 0, 0
    if known: monkeypatch.setitem(RULES, f'half{int(known)}', RULES['relu'] if 'relu' in RULES else RULES['pointwise'])
    groups = coupled_groups(net, x)
    if known: torch.testing.assert_close(thin(net, example_inputs=x)(x), net(x))
    assert thin(net, example_inputs=x)[0].out_features == 4 - known
    assert [bool(g.why_not) for g in groups if g.name == '0'] == [not known]
    if not known: assert f'`1` (Half) uses `half{int(known)}` on it' in {g.why_not for g in groups}
