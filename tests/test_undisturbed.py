"What a run leaves in a model is taken back: attributes, hooks, contents of containers, buffers, gradients"
from collections import OrderedDict, defaultdict, deque

import pytest, torch, torch.nn as nn

from fasterai_clone.model.flops import multiply_adds
from fasterai_clone.model.flow import trace_flow
from fasterai_clone.model.preserve import restored, undisturbed

x = torch.ones(1, 4)

class Installs(nn.Module):
    "Registers a hook in its first run, as transformers' capture of outputs does"
    def __init__(self):
        super().__init__()
        self.l, self.seen = nn.Linear(4, 4), []
    def forward(self, x):
        if x.sum() < -1e9: return x
        if not getattr(self, 'installed', False):
            self.installed = True
            self.l.register_forward_hook(lambda m, a, o: self.seen.append(1))
        self.seen.clear()
        self.l(x)
        return len(self.seen)

@pytest.mark.parametrize('look', [lambda m: trace_flow(m, x), lambda m: multiply_adds(m, x)])
def test_hooks_of_a_first_run_are_not_left_behind(look):
    model = Installs()
    look(model)
    assert not model.l._forward_hooks and not hasattr(model, 'installed') and model.seen == []
    assert model(x) == 1

class RemovesItsHook(nn.Module):
    "A hook that is there for one run only, and a flag that says so"
    def __init__(self):
        super().__init__()
        self.l, self.first = nn.Linear(4, 4), True
        self.handle = self.l.register_forward_pre_hook(lambda m, a: (a[0] + 1,))
    def forward(self, x):
        out = self.l(x)
        if self.first: self.handle.remove()
        self.first = False
        return out

def test_a_hook_that_removes_itself_is_put_back():
    model = RemovesItsHook()
    with undisturbed(model): first, second = model(x), model(x)
    assert not torch.equal(first, second) and len(model.l._forward_pre_hooks) == 1
    assert torch.equal(model(x), first) and torch.equal(model(x), second)  # and its handle still works

class Remembers(nn.Module):
    "In every kind of container, one inside another"
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(4, 4)
        self.a_list, self.a_dict, self.a_set, self.a_deque = [1], {}, {1}, deque([1], maxlen=2)
        self.ordered, self.default, self.nested = OrderedDict(a=1, b=2), defaultdict(list), dict(layers=[[], {}])
        self.count, self.other = torch.zeros(2), [nn.Linear(4, 4)]  # neither a buffer nor a registered layer
        self.l.weight.calls = 0
    def forward(self, x):
        self.a_list.append(x), self.a_dict.update(x=x), self.a_set.add(2), self.a_deque.extend([2, 3])
        self.ordered.move_to_end('a'), self.default['x'].append(x)
        self.nested['layers'][0].append(x), self.nested['layers'][1].update(x=x)
        self.count += 1
        self.other[0].calls = self.l.weight.calls = 1
        self.l.weight.register_hook(lambda g: g)
        self.add_module('late', nn.Linear(4, 4))
        return self.l(x)

def test_contents_of_containers_are_put_back():
    model = Remembers()
    ids = [id(o) for o in vars(model).values()]
    with undisturbed(model): model(x), model(x)
    assert [id(o) for o in vars(model).values()] == ids
    assert (model.a_list, model.a_dict, model.a_set, [*model.a_deque], model.a_deque.maxlen) == ([1], {}, {1}, [1], 2)
    assert [*model.ordered] == ['a', 'b'] and model.default == {} and model.nested == dict(layers=[[], {}])
    assert model.count.tolist() == [0, 0] and not hasattr(model.other[0], 'calls') and model.l.weight.calls == 0
    assert not model.l.weight._backward_hooks and [*model._modules] == ['l']

def test_gradients_are_put_back():
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    model(torch.rand(3, 4)).sum().backward()
    grads, mode = [p.grad for p in model.parameters()], model.training
    values = [g.clone() for g in grads]
    with restored(model):
        assert all(p.grad is None for p in model.parameters())
        model.eval()
        model[0].weight.requires_grad_(False)
        model(torch.rand(3, 4)).pow(2).sum().backward()
    assert all(p.grad is g and torch.equal(g, v) for p,g,v in zip(model.parameters(), grads, values))
    assert model.training == mode and model[0].weight.requires_grad
