"Measures against naive references: finite differences, products of matrices, loops; and the model as it was"
import math, random
from copy import deepcopy
from functools import partial

import numpy as np, pytest, torch, torch.nn as nn, torch.nn.functional as F
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorCategory, TensorImage
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers.pytorch_utils import Conv1D

from fasterai_clone.methods.recalibrate import recalibrate
from fasterai_clone.model.preserve import restored
from fasterai_clone.model.run import opened_attention
from fasterai_clone.core.selection import keep_masks
from fasterai_clone.sparse.batches import *
from fasterai_clone.sparse.activations import *
from fasterai_clone.sparse.channel_scores import *
from fasterai_clone.sparse.gradients import *
from fasterai_clone.sparse.measure import *
from fasterai_clone.sparse.paths import *
from fasterai_clone.sparse.sparsifier import Sparsifier
from fasterai_clone.sparse.synflow import *
from fasterai_clone.digits import digits_dls, digits_net

def named(model, leaf=''): return {k: p for k,p in model.named_parameters() if k.endswith(leaf)}
def close(a, b, tol=1e-6): return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=tol, atol=tol)
def half_square(out, y): return (out - y).square().mean() / 2
def gradient(w, g): return g

def small_net(): return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
def small_data(n=12): return torch.randn(n, 3).double(), torch.randint(0, 2, (n,))

class Calls(nn.Module):
    "A model of layers by name, put together by a function"
    def __init__(self, f, **layers):
        super().__init__()
        for k,v in layers.items(): setattr(self, k, v)
        self.f = f
    def forward(self, *args): return self.f(self, *args)


# The model as it was

def bumpy(broken=False):
    """A model with modes, buffers, dropout, hooks, gradients and frozen parameters of its own; `broken` ones stop in
    the last layer"""
    def last(m, x):
        if broken: raise RuntimeError('broken')
        return x
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5),
                        nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 3), Calls(last))
    net(torch.randn(4, 1, 8, 8)).sum().backward() if not broken else net[0].weight.sum().backward()
    net.train()
    net[1].eval()
    net[4].weight.requires_grad_(False).grad = None
    net[4].register_forward_pre_hook(lambda m, a: None)
    return net

def state(model):
    "Everything a measure must leave alone; tensors by identity, and their content"
    def hooks(m): return {k: list(v) for k,v in vars(m).items() if 'hook' in k and isinstance(v, dict)}
    modules = [(m.training, hooks(m), set(vars(m)), m.forward.__func__) for m in model.modules()]
    tensors = {k: (id(t), t.detach().clone()) for k,t in [*model.named_parameters(), *model.named_buffers()]}
    grads   = {k: (p.requires_grad, None if p.grad is None else (id(p.grad), p.grad.clone()))
               for k,p in model.named_parameters()}
    rng     = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    return modules, tensors, grads, rng, torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()

def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)): return len(a) == len(b) and all(map(same, a, b))
    return a == b

measures = dict(snip=snip_scores, grasp=grasp_scores, synflow=synflow_scores, wanda=input_norms, apoz=channel_zeros,
                means=channel_means, accumulated=partial(accumulated, step_fn=gradient))

def loader(n=24, bs=8):
    return DataLoader(TensorDataset(torch.randn(n, 1, 8, 8), torch.randint(0, 3, (n,))), bs, shuffle=True)

@pytest.mark.parametrize('broken', [False, True])
@pytest.mark.parametrize('name', measures)
def test_measures_leave_the_model_as_it_was(name, broken):
    net, data = bumpy(broken), loader()
    ids, before = [id(p) for p in net.parameters()], state(net)
    params = {k: p for k,p in named(net, 'weight').items() if k != '1.weight'}
    if broken:
        with pytest.raises(RuntimeError, match='broken'):
            measures[name](net, params, data=data, loss_func=F.cross_entropy)
    else:
        scores = measures[name](net, params, data=data, loss_func=F.cross_entropy)
        assert scores.keys() == params.keys() and all(s.dtype == torch.float32 and not s.requires_grad
                                                      for s in scores.values())
        for k,s in scores.items(): assert s.expand_as(params[k]).isfinite().all() and s.any()
    assert same(state(net), before) and [id(p) for p in net.parameters()] == ids

@pytest.mark.parametrize('broken', [False, True])
def test_passes_signal_leaves_the_model_as_it_was(broken):
    net, x = bumpy(broken), torch.rand(2, 1, 8, 8)
    before = state(net)
    if broken:
        with pytest.raises(RuntimeError, match='broken'): passes_signal(net, x)
    else: assert all(passes_signal(net, x).values())
    assert same(state(net), before)

@pytest.mark.parametrize('broken', [False, True])
def test_restored_undoes_what_happens_inside(broken):
    net = bumpy()
    net[1].register_buffer('nothing', None)
    before = state(net)
    class Stop(Exception): pass
    try:
        with restored(net):
            assert all(p.grad is None for p in net.parameters())
            net.train()
            net.requires_grad_(True)
            net(torch.randn(4, 1, 8, 8)).sum().backward()
            net[1].running_var = torch.zeros(4)
            net[1].nothing = torch.ones(1)
            torch.rand(3), random.random(), np.random.rand()
            assert not same(state(net), before)
            if broken: raise Stop
    except Stop: pass
    assert same(state(net), before) and net[1].nothing is None

def test_a_graph_from_before_is_still_good():
    "A measure between forward and backward"
    net, (x, y) = digits_net(2), (torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,)))
    twin = deepcopy(net)
    loss, want = F.cross_entropy(net(x), y), F.cross_entropy(twin(x), y)
    snip_scores(net, named(net), (x, y), F.cross_entropy)
    loss.backward()
    want.backward()
    assert all(torch.equal(p.grad, q.grad) for p,q in zip(net.parameters(), twin.parameters()))


# What holds data

def listed(data, device='cpu'):
    return [([t.tolist() for t in xs], None if t is None else t.tolist()) for xs,t in batches(data, device)]

x, y = torch.tensor([[1.], [2]]), torch.tensor([3, 4])
alone, paired = ([[[1.], [2.]]], None), ([[[1.], [2.]]], [3, 4])

class Stream(IterableDataset):
    def __iter__(self): yield from [(x, y)]*2

@pytest.mark.parametrize('data, want', [
    (x, [alone]), ((x,), [alone]), ((x, None), [alone]), ((x, y), [paired]), ([x, y], [paired]), ([(x, y)], [paired]),
    ([[x, y]]*2, [paired]*2), ((x, x, y), [(alone[0]*2, [3, 4])]), ([(x, x, y)], [(alone[0]*2, [3, 4])]),
    ([(x, None)]*2, [alone]*2), ([(x,)], [alone]),
    (DataLoader(TensorDataset(x, y), 2), [paired]), (DataLoader(TensorDataset(x), 2), [alone]), (Stream(), [paired]*2)])
def test_batches(data, want): assert listed(data) == want

def test_a_generator_is_used_up():
    g = (b for b in [(x, y)])
    assert listed(g) == [paired]
    with pytest.raises(ValueError, match='no batch'): listed(g)

def test_a_list_of_three_inputs_is_explained():
    "It is one batch of two inputs and a target, and the model takes one input"
    for f in (lambda m, d: input_norms(m, named(m, 'weight'), d), recalibrated):
        with pytest.raises(TypeError, match=r'2 inputs of a batch.*\[\(x1, None\), \(x2, None\)\]'):
            f(nn.Sequential(nn.Linear(3, 2)), [torch.rand(4, 3)]*3)

def recalibrated(model, data): return recalibrate(nn.Sequential(nn.BatchNorm1d(3), *model), data)

def test_batches_of_fastai():
    dls = digits_dls(n=128)
    got = list(batches(dls, 'cpu'))
    assert [(xs[0].shape, len(t)) for xs,t in got] == [((64, 1, 8, 8), 64)]*2
    assert [len(t) for _,t in batches(dls.valid, 'cpu')] == [256, 104]  # has the `train` of its dataset, and is none

def test_what_is_nested_moves_along():
    (xs, t), = batches([((x, {'a': [y]}), x, (y, 7))], 'meta')
    assert [xs[0][0].device.type, xs[0][1]['a'][0].device.type, xs[1].device.type, t[0].device.type,
            t[1]] == ['meta']*4 + [7]

@pytest.mark.parametrize('data, says', [(None, 'NoneType'), (3, 'int'), ('x', 'str'), ({'x': 'x'}, 'dict'),
                                        (nn.Linear(1, 1), 'Linear'),
                                        (TensorDataset(x, y), 'TensorDataset')])
def test_what_holds_no_data_is_refused_at_once(data, says):
    with pytest.raises(TypeError, match=rf'DataLoader.*got {says}'): batches(data, 'cpu')

def test_wrong_batches_are_refused():
    with pytest.raises(TypeError, match='Tensor.*int'): batches((x, 3), 'cpu')
    with pytest.raises(TypeError, match='got dict'): list(batches([{'x': 'x'}], 'cpu'))
    with pytest.raises(TypeError, match='got float'): list(batches([1.5], 'cpu'))
    with pytest.raises(TypeError, match='got tuple'): list(batches([()], 'cpu'))
    for empty in ([], (), DataLoader(TensorDataset(x[:0], y[:0]))):
        with pytest.raises(ValueError, match='no batch'): list(batches(empty, 'cpu'))

@pytest.mark.parametrize('name', ['snip', 'grasp', 'accumulated'])
def test_what_is_missing_is_named(name):
    net = small_net()
    f, data = measures[name], small_data()
    with pytest.raises(ValueError, match=f'{name} needs data'):
        f(net, named(net), data=None, loss_func=F.cross_entropy)
    with pytest.raises(ValueError, match=f'{name} needs labels'):
        f(net, named(net), data=data[0], loss_func=F.cross_entropy)
    with pytest.raises(ValueError, match=f'{name} needs a loss'): f(net, named(net), data=data, loss_func=None)

@pytest.mark.parametrize('name', ['snip', 'grasp', 'gradient'])
def test_a_criterion_without_a_loss_is_named(name):
    sp = Sparsifier(small_net(), criteria=name, layer_type=nn.Linear, data=small_data())
    with pytest.raises(ValueError, match=f'^{name} needs a loss'): sp.sparsify_model(50)

@pytest.mark.parametrize('name', ['wanda', 'apoz', 'means', 'synflow'])
def test_labels_are_not_needed_and_data_are(name):
    net = small_net()
    params, (x, y) = named(net, 'weight'), small_data()
    a, b = measures[name](net, params, x), measures[name](net, params, (x, y))
    assert same(a, b)
    with pytest.raises(ValueError, match='needs'): measures[name](net, params)

@pytest.mark.parametrize('name', [*measures, 'norm_scales'])
def test_parameters_of_another_model_are_refused(name):
    net, other = small_net(), small_net()
    f = partial({**measures, 'norm_scales': norm_scales}[name], data=small_data(), loss_func=F.cross_entropy)
    with pytest.raises(ValueError, match="Did you mean '0.weight'"): f(net, {'0.wight': net[0].weight})
    with pytest.raises(ValueError, match='0.weight is not the parameter of this model'):
        f(net, {'0.weight': other[0].weight})

@pytest.mark.parametrize('kind', ['dls', 'loader', 'batch', 'fastai tensors', 'generator'])
@pytest.mark.parametrize('name', measures)
def test_every_measure_takes_every_kind_of_data(name, kind):
    dls, net = digits_dls(n=128), digits_net(2)
    batch = dls.valid.one_batch()
    data = dict(dls=dls, loader=dls.valid, batch=batch, generator=(b for b in dls.valid))
    data['fastai tensors'] = TensorImage(batch[0]), TensorCategory(batch[1])
    params = {k: p for k,p in named(net, 'weight').items() if p.ndim > 1}
    scores = measures[name](net, params, data=data[kind], loss_func=CrossEntropyLossFlat())
    assert scores.keys() == params.keys() and all(type(s) is torch.Tensor and s.any() for s in scores.values())

def test_several_inputs():
    net = Calls(lambda m, a, b: m.one(a) + m.two(b), one=nn.Linear(2, 1, bias=False), two=nn.Linear(3, 1, bias=False))
    data = torch.ones(1, 2), 2*torch.ones(1, 3), torch.zeros(1, 1)
    assert close(input_norms(net, named(net), data)['two.weight'], torch.full((1, 3), 2.))
    out = net(*data[:2]).item()  # (out)² has the gradient 2·out·x
    assert close(snip_scores(net, named(net), data, nn.MSELoss())['two.weight'], (net.two.weight * 2 * out * 2).abs())
    assert close(synflow_scores(net, named(net), data)['two.weight'],
                 net.two.weight.abs() / sum(p.abs().sum() for p in net.parameters()))


# Gradients

def masked_loss(net, data, name, i, c):
    "The loss with weight i of parameter `name` multiplied by c"
    w = dict(net.named_parameters())[name].data.view(-1)
    now = w[i].item()
    w[i] = c * now
    with torch.no_grad(): loss = sum(F.cross_entropy(net(x), y).item() for x,y in data)
    w[i] = now
    return loss

def test_snip_is_how_the_loss_reacts_to_a_switch():
    "Finite differences of a factor c on each weight; the batches differ in size, their losses add up"
    net, data = small_net(), [small_data(12), small_data(5)]
    for k,s in snip_scores(net, named(net), data, F.cross_entropy).items():
        assert s.dtype == torch.float64
        naive = [abs(masked_loss(net, data, k, i, 1 + 1e-5) - masked_loss(net, data, k, i, 1 - 1e-5)) / 2e-5
                 for i in range(s.numel())]
        assert close(s.flatten(), torch.tensor(naive), 1e-7), k

def flow(net, params, data, temperature=1):
    "The gradient flow ‖g‖² of the summed loss"
    with torch.enable_grad(): loss = sum(F.cross_entropy(net(x)/temperature, y) for x,y in data)
    return sum(g.square().sum().item() for g in torch.autograd.grad(loss, list(params.values())))

@pytest.mark.parametrize('temperature, leaf', [(1., ''), (3., ''), (1., 'weight'), (1., '0.weight')])
def test_grasp_is_how_the_gradient_flow_reacts(temperature, leaf):
    "Half the derivative of ‖g‖² by a factor on each weight: w·Hg"
    net, data = small_net(), [small_data(12), small_data(5)]
    params = named(net, leaf)
    for k,s in grasp_scores(net, params, data, F.cross_entropy, temperature=temperature).items():
        w, h, naive = params[k].data.view(-1), 1e-5, []
        for i in range(s.numel()):
            now, ends = w[i].item(), []
            for c in (1 + h, 1 - h):
                w[i] = c * now
                ends.append(flow(net, params, data, temperature))
            w[i] = now
            naive.append((ends[0] - ends[1]) / (2*h) / 2)
        assert close(s.flatten(), torch.tensor(naive).double(), 1e-6), k

def test_grasp_drops_first_what_the_flow_grows_without():
    "By hand: w = (0.1, −0.2), residual −1.1, ‖g‖² = 2.42; 2.88 without the first weight, 1.62 without the second"
    net = nn.Linear(2, 1, bias=False)
    net.weight.data = torch.tensor([[0.1, -0.2]])
    s = grasp_scores(net, named(net), (torch.ones(1, 2), torch.ones(1, 1)), half_square, temperature=1.)['weight']
    assert close(s, torch.tensor([[-0.22, 0.44]]))

def test_the_temperature_of_grasp_is_200():
    net, data = small_net(), small_data()
    args = net, named(net), data, F.cross_entropy
    assert same(grasp_scores(*args), grasp_scores(*args, temperature=200.))
    assert not same(grasp_scores(*args), grasp_scores(*args, temperature=1.))
    for wrong in (0, -1.):
        with pytest.raises(ValueError, match='temperature'):
            grasp_scores(net, named(net), data, F.cross_entropy, temperature=wrong)

def test_grasp_divides_tensors_only():
    net, data = Calls(lambda m, x: {'out': m.lin(x)}, lin=nn.Linear(3, 2).double()), small_data()
    def loss(out, y): return F.cross_entropy(out['out'], y)
    with pytest.raises(ValueError, match='temperature=1'): grasp_scores(net, named(net), data, loss)
    assert grasp_scores(net, named(net), data, loss, temperature=1)['lin.weight'].any()

def test_grasp_sees_the_same_dropout_twice():
    "L = ½(w·m)² for the mask m has H = mmᵀ and g = Hw: both passes must have drawn the same m"
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1, bias=False)).double()
    x, y = torch.ones(1, 4).double(), torch.zeros(1, 1).double()
    torch.manual_seed(3)
    s = grasp_scores(net, named(net), (x, y), half_square, temperature=1., training=True)['1.weight']
    mask = F.dropout(x, 0.5)  # what the passes drew, from the same state of random numbers
    w = net[1].weight.detach()
    assert 0 < (mask == 0).sum() < 4 and close(s, w * mask * (w @ mask.T) * mask.square().sum(), 1e-12)

@pytest.mark.parametrize('name, net, shape', [
    ('attention', lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=True), (2, 5, 8)),
    ('lstm', lambda: Calls(lambda m, x: m.lstm(x)[0], lstm=nn.LSTM(8, 8)), (5, 2, 8))])
def test_grasp_of_layers_whose_fused_kernels_have_no_second_derivative(name, net, shape):
    net = net()
    s = grasp_scores(net, named(net), (torch.randn(shape), torch.randn(shape)), nn.MSELoss(), temperature=1.)
    assert all(v.any() for k,v in s.items() if 'weight' in k)

def test_accumulated_adds_up_over_batches():
    net, data = small_net(), [small_data(12), small_data(5)]
    seen, params = [], named(net)
    def step(w, g):
        seen.append((w.requires_grad, g.requires_grad, torch.is_grad_enabled()))
        return (w * g).square()
    got  = accumulated(net, params, data, F.cross_entropy, step)
    want = {k: 0 for k in params}
    for x,y in data:
        for (k,p),g in zip(params.items(), torch.autograd.grad(F.cross_entropy(net(x), y), list(params.values()))):
            want[k] = want[k] + (p * g).square()
    assert all(close(got[k], want[k], 1e-12) for k in params) and set(seen) == {(False, False, False)}

def test_gradients_are_summed_before_the_product():
    "By hand: gradients (6, 2) and (−2, −2) of w = (1, −2)"
    net = nn.Linear(2, 1, bias=False)
    net.weight.data = torch.tensor([[1., -2]])
    data = [(torch.tensor([[3., 1]]), torch.zeros(1, 1)), (torch.tensor([[1., 1]]), torch.zeros(1, 1))]
    assert snip_scores(net, named(net), data, nn.MSELoss())['weight'].tolist() == [[4, 0]]
    assert accumulated(net, named(net), data, nn.MSELoss(), lambda w, g: (w*g).abs())['weight'].tolist() == [[8, 8]]

@pytest.mark.parametrize('f', [snip_scores, grasp_scores])
def test_frozen_models_no_grad_and_half_precision(f):
    net, data = digits_net(2), (torch.rand(16, 1, 8, 8), torch.arange(16) % 10)
    want = f(net, named(net), data, F.cross_entropy)
    net.requires_grad_(False)
    with torch.no_grad(): got = f(net, named(net), data, F.cross_entropy)
    assert same(got, want) and not any(p.requires_grad for p in net.parameters())
    got = f(net.bfloat16(), named(net), (data[0].bfloat16(), data[1]), F.cross_entropy)
    assert all(s.dtype == torch.float32 for s in got.values())

@pytest.mark.parametrize('f, kind', [(loss_gradients, 'snip'), (flow_gradients, 'grasp')])
def test_gradients_of_one_batch_stay_in_the_dtype_of_the_weights(f, kind):
    "2 bytes per weight in bf16; sums of several batches are fp32, and one batch twice has twice the gradient"
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).bfloat16()
    x, y = torch.randn(8, 6).bfloat16(), torch.arange(8) % 3
    def loss(out, y): return F.cross_entropy(out.float(), y)
    runs = []
    hook = net.register_forward_hook(lambda *a: runs.append(1))
    one  = f(net, named(net), (x, y), loss)
    assert {g.dtype for g in one.values()} == {torch.bfloat16} and len(runs) == 1
    two = f(net, named(net), [(x, y)]*2, loss)
    hook.remove()
    assert {g.dtype for g in two.values()} == {torch.float32} and len(runs) == (3 if kind == 'snip' else 5)
    times = 2 if kind == 'snip' else 4  # ‖2g‖²
    assert all(close(two[k], times*one[k].float(), 2e-2) for k in one) and any(g.any() for g in one.values())
    sp = Sparsifier(net, context='global', criteria=kind, data=(x, y), loss_func=loss, layer_type=nn.Linear)
    w  = {k: p.detach().float().clone() for k,p in named(net, 'weight').items()}
    sp.sparsify_model(50)
    scores = [w[k]*one[k].float() for k in w]
    keep = keep_masks([s.abs() for s in scores] if kind == 'snip' else scores, sum(map(torch.numel, scores))//2)
    assert all(torch.equal(sp.masks[k], m) for k,m in zip(w, keep)) and sp.refs == {}

def test_gradients_that_share_memory_are_not_added_to():
    "Both weights of a sum have one tensor as their gradient: 1 for each batch, so 3 in all"
    def both(m, x): return (x + m.a.weight + m.b.weight).sum()
    net = Calls(both, a=nn.Linear(2, 2, bias=False), b=nn.Linear(2, 2, bias=False))
    data = [(torch.zeros(2, 2), torch.zeros(1))]*3
    assert all((g == 3).all() for g in loss_gradients(net, named(net), data, lambda out, y: out).values())

@pytest.mark.parametrize('f', [snip_scores, grasp_scores])
def test_what_the_loss_does_not_depend_on_is_worth_nothing(f):
    net = Calls(lambda m, x: m.used(x), used=nn.Linear(3, 2), idle=nn.Linear(3, 2))
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    scores = f(net, named(net), (x, y), F.cross_entropy)
    assert scores['used.weight'].any() and not scores['idle.weight'].any() and not scores['idle.bias'].any()
    assert not f(net, {'idle.weight': net.idle.weight}, (x, y), F.cross_entropy)['idle.weight'].any()
    assert not f(Calls(lambda m, x: x, lin=net.used), {'lin.weight': net.used.weight}, (x[:, :2], y),
                 F.cross_entropy)['lin.weight'].any()

def test_losses_that_do_not_reduce_are_averaged():
    net, data = small_net(), small_data()
    def each(out, y): return F.cross_entropy(out, y, reduction='none')
    assert all(close(a, b, 1e-12) for a,b in zip(snip_scores(net, named(net), data, each).values(),
                                                 snip_scores(net, named(net), data, F.cross_entropy).values()))

def test_gradients_are_measured_as_the_model_is_used_or_in_train_mode():
    "The batch's own statistics count only if asked for, and the running ones stay as they were"
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    net[0].running_var.fill_(1e6)
    data = torch.randn(8, 3), torch.arange(8) % 2
    used, trained = (snip_scores(net, named(net), data, F.cross_entropy, training=t)['1.weight'] for t in (False, True))
    assert used.max() < 1e-3 and trained.max() > 1e-2 and net[0].running_var.tolist() == [1e6]*3

@pytest.mark.parametrize('name', [n for n in measures if n != 'synflow'])
def test_what_is_no_number_is_named(name):
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    x = torch.full((4, 3), math.inf)
    with pytest.raises(ValueError, match='0.weight'):
        measures[name](net, named(net, 'weight'), data=(x, torch.tensor([0, 1, 0, 1])), loss_func=F.cross_entropy)

def test_synflow_names_what_is_no_number():
    net = nn.Linear(3, 2)
    net.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match='synflow scores of weight'): synflow_scores(net, named(net), torch.rand(1, 3))


# Paths

def naive_shares(*ws):
    "For weights of a chain of linear layers: every path, its product added to each weight on it"
    from itertools import product
    shares = [torch.zeros_like(w) for w in ws]
    for path in product(*[range(ws[0].shape[1])], *[range(w.shape[0]) for w in ws]):
        p = math.prod(abs(w[path[l+1], path[l]].item()) for l,w in enumerate(ws))
        for l,s in enumerate(shares): s[path[l+1], path[l]] += p
    return [s / shares[0].sum() for s in shares]

def test_synflow_is_the_share_of_paths():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3)).double()
    scores = synflow_scores(net, named(net, 'weight'), torch.rand(7, 3))
    w1, w2, w3 = ws = [p.detach() for p in named(net, 'weight').values()]
    for s,want in zip(scores.values(), naive_shares(*ws)): assert s.dtype == torch.float64 and close(s, want, 1e-12)
    a1, a2, a3 = (w.abs() for w in ws)
    # closed form of the second layer: what arrives at its input, what leaves from its output
    up, down = (a3 @ a2 @ a1).sum(), a3.sum(0)
    assert close(scores['2.weight'], down[:, None] * a2 * a1.sum(1) / up, 1e-12)

def test_what_flows_into_a_layer_flows_out_of_it():
    """Conservation: the shares of every layer of a chain sum to one, so for each unit in = out; padding, pools, norms
    and strides included"""
    net = digits_net(4)
    net[1].weight.data.uniform_(-2, 2), net[1].bias.data.uniform_()
    net[1].running_mean.uniform_(), net[1].running_var.uniform_(0.5, 2)
    params = {k: p for k,p in net.named_parameters() if 'weight' in k}
    scores = synflow_scores(net, params, torch.rand(1, 1, 8, 8))
    assert all(s.sum().item() == pytest.approx(1, abs=1e-5) for s in scores.values())
    out_of = scores['0.weight'].sum((1, 2, 3))
    assert close(out_of, scores['1.weight'], 1e-5) and close(out_of, scores['3.weight'].sum((0, 2, 3)), 1e-5)

acts = dict(tanh=torch.tanh, method=torch.Tensor.sigmoid, gelu=F.gelu, relu6=partial(F.relu6, inplace=True))

@pytest.mark.parametrize('act', [
    nn.ReLU(inplace=True), nn.ReLU6(), nn.GELU(), nn.SiLU(inplace=True), nn.Tanh(), nn.Sigmoid(),
    nn.Hardswish(), nn.ELU(),
    nn.Hardsigmoid(), nn.LeakyReLU(), nn.PReLU(), nn.Softplus(), nn.Mish(), nn.Hardtanh(), nn.Dropout(0.9),
    *acts], ids=str)
def test_activation_functions_pass_on_what_they_get(act):
    "Weights of 100 saturate tanh for good, and ReLU6: that is no collapse"
    net = nn.Sequential(nn.Linear(3, 4), Calls(lambda m, x: acts[act](x)) if isinstance(act, str) else act,
                        nn.Linear(4, 2))
    for p in net[0].parameters(): p.data.mul_(100)
    got = synflow_scores(net, named(net, '0.weight') | named(net, '2.weight'), torch.rand(1, 3))
    for s,want in zip(got.values(), naive_shares(net[0].weight.detach(), net[2].weight.detach())):
        assert close(s, want, 1e-5)

@pytest.mark.parametrize('last', [nn.LogSoftmax(1), nn.Softmax(1), nn.Softmax(-1)], ids=str)
def test_a_softmax_at_the_end_is_no_collapse(last):
    net = nn.Sequential(nn.Linear(3, 4), last)
    assert close(synflow_scores(net, named(net, 'weight'), torch.rand(1, 3))['0.weight'],
                 naive_shares(net[0].weight.detach())[0])

@pytest.mark.parametrize('norm, channels', [
    (lambda: nn.BatchNorm2d(4), 1), (lambda: nn.BatchNorm2d(4, track_running_stats=False), 1),
    (lambda: nn.GroupNorm(2, 4), 1),
    (lambda: nn.InstanceNorm2d(4, affine=True), 1), (lambda: nn.BatchNorm2d(4, affine=False), 1),
    (lambda: nn.LayerNorm([4, 3, 3]), 0),
    (lambda: nn.LayerNorm(3), 0), (lambda: nn.RMSNorm(3), 0)])
def test_norms_scale_and_nothing_else(norm, channels):
    norm = norm().double()
    if norm._parameters.get('weight') is not None: nn.init.uniform_(norm.weight, -2, 2)
    if norm._parameters.get('bias') is not None: nn.init.uniform_(norm.bias, -2, 2)
    if norm._buffers.get('running_var') is not None: norm.running_var.uniform_(0.5, 2), norm.running_mean.uniform_()
    conv = nn.Conv2d(2, 4, 1).double()
    got = synflow_scores(nn.Sequential(conv, norm), {'0.weight': conv.weight}, torch.rand(2, 2, 3, 3))['0.weight']
    gamma = torch.ones(4) if norm._parameters.get('weight') is None else norm.weight.detach().abs()
    var   = norm.running_var + norm.eps if norm._buffers.get('running_var') is not None else torch.ones(4)
    scale = gamma / var.sqrt() if channels else gamma.expand(4, 3, 3).sum((1, 2))
    want  = conv.weight.detach().abs() * scale[:, None, None, None]
    assert close(got, want / want.sum(), 1e-6)

def test_a_norm_over_channels_that_a_derived_class_moves():
    class LayerNorm2d(nn.LayerNorm):
        def forward(self, x):
            return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight,
                                self.bias).permute(0, 3, 1, 2)
    net = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), LayerNorm2d(4))
    net[1].weight.data = torch.tensor([1., -2, 3, 0])
    want = net[0].weight.detach().abs() * torch.tensor([1., 2, 3, 0])[:, None, None, None]
    assert close(synflow_scores(net, named(net, '0.weight'), torch.rand(2, 2, 3, 3))['0.weight'], want/want.sum(), 1e-5)

def test_biases_are_no_source_of_signal():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    net[0].weight.data, net[0].bias.data = torch.ones(2, 2), torch.tensor([5., -7])
    net[1].weight.data = torch.tensor([[1., 3]])
    s = synflow_scores(net, named(net), torch.rand(1, 2))  # R = 2·1 + 2·3 = 8
    assert close(s['0.weight'], torch.tensor([[1., 1], [3, 3]])/8) and close(s['0.bias'], torch.tensor([5., 21])/8)

def test_an_embedding_sends_all_its_rows():
    net = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 1))
    net[0].weight.data, net[1].weight.data = torch.tensor([[1., -1], [2, 0], [0, 1]]), torch.tensor([[1., -2]])
    s = synflow_scores(net, named(net, 'weight'), torch.tensor([[0, 0, 2]]))  # (3, 2) arrive, R = 3 + 4
    assert close(s['0.weight'], torch.tensor([[1., 2], [2, 0], [0, 2]])/7)
    assert close(s['1.weight'], torch.tensor([[3., 4]])/7)

def test_shared_weights_have_one_score():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    net[1].weight = net[0].weight
    net[0].weight.data = torch.tensor([[1., 2], [0, 1]])  # W² = [[1, 4], [0, 1]], R = 6
    assert synflow_scores(net, named(net), torch.rand(1, 2))['0.weight'].sum().item() == pytest.approx(2)

def test_values_and_size_of_the_batch_do_not_matter():
    net = digits_net(2)
    a, b = (synflow_scores(net, named(net), x)
            for x in (torch.randn(9, 1, 8, 8), (torch.zeros(1, 1, 8, 8), torch.tensor([1]))))
    assert same(a, b)

@pytest.mark.parametrize('depth', [30, 300])
def test_deep_networks(depth):
    "30 layers of width 512 multiply by 10^33, 300 of width 64 by 10^361"
    torch.manual_seed(0)
    width = 512 if depth == 30 else 64
    net = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(depth)])
    for m in net: m.weight.data.uniform_(-.05, .05) if depth == 30 else m.weight.data.uniform_(-.5, .5)
    scores = synflow_scores(net, named(net), torch.rand(1, width))
    assert all(s.sum().item() == pytest.approx(1, abs=1e-4) for s in scores.values())

def test_outputs_of_any_form():
    lin = nn.Linear(2, 2, bias=False)
    want = synflow_scores(lin, named(lin), torch.rand(1, 2))['weight']
    for f in (lambda m, x: (m.lin(x), torch.tensor([1])), lambda m, x: {'a': [m.lin(x)], 'b': None}):
        assert close(synflow_scores(Calls(f, lin=lin), {'lin.weight': lin.weight}, torch.rand(1, 2))['lin.weight'],
                     want)
    with pytest.raises(ValueError, match='got str'):
        synflow_scores(Calls(lambda m, x: 'x', lin=lin), {'lin.weight': lin.weight}, torch.rand(1, 2))

def test_synflow_of_frozen_models_under_no_grad():
    net = digits_net(2)
    want = synflow_scores(net, named(net), torch.rand(1, 1, 8, 8))
    net.requires_grad_(False)
    with torch.no_grad(): assert same(synflow_scores(net, named(net), torch.rand(1, 1, 8, 8)), want)
    assert all(s.dtype == torch.float32 for s in synflow_scores(net.half(), named(net),
                                                                torch.rand(1, 1, 8, 8)).values())

def linears(n): return [nn.Linear(4, 4) for _ in range(n)]
def zeroed(m):
    nn.init.zeros_(m.weight)
    return m

def test_a_dead_layer_cuts_off_all_others():
    a, dead, c = linears(3)
    zeroed(dead)
    assert passes_signal(nn.Sequential(a, dead, c), torch.rand(1, 4)) == {'0': False, '1': False, '2': False}
    assert passes_signal(nn.Sequential(a, nn.ReLU(), c), torch.rand(1, 4)) == {'0': True, '2': True}

def test_a_residual_connection_goes_around_it():
    a, b, dead, c = linears(4)
    zeroed(dead)
    net = Calls(lambda m, x: m.c((h := m.a(x)) + m.dead(m.b(h))), a=a, b=b, dead=dead, c=c)
    assert passes_signal(net, torch.rand(1, 4)) == dict(a=True, b=False, dead=False, c=True)

def test_layers_that_do_not_meet():
    "The first has only its first output left, the second only its second input: no path, though neither is empty"
    net = nn.Sequential(*linears(2))
    net[0].weight.data[1:], net[1].weight.data[:, [0, 2, 3]] = 0, 0
    assert passes_signal(net, torch.rand(2, 4)) == {'0': False, '1': False}

def test_norms_carry_signal_too():
    net = digits_net(2)
    assert all(passes_signal(net, torch.rand(1, 1, 8, 8)).values())
    nn.init.zeros_(net[4].weight)
    assert not any(passes_signal(net, (torch.rand(2, 1, 8, 8), torch.tensor([1, 2]))).values())
    with pytest.raises(ValueError, match='passes_signal needs to know the shape'): passes_signal(net, None)

def test_attention_carries_signal():
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation='gelu'), 2,
                                enable_nested_tensor=False)
    assert all(passes_signal(net, torch.rand(2, 5, 8)).values())


# Inputs

def naive_norms(m, x):
    "The L2 norm of what each weight is multiplied with"
    norms = torch.zeros(m.weight.shape, dtype=torch.float64)
    for i in range(norms.numel()):
        idx = tuple(int(j) for j in np.unravel_index(i, norms.shape))
        if   isinstance(m, nn.Embedding): s = sum(t == idx[0] for t in x.flatten().tolist())
        elif isinstance(m, nn.Linear):    s = sum(v*v for v in x.reshape(-1, x.shape[-1])[:, idx[1]].tolist())
        else:
            one, m = m, deepcopy(m)  # with this weight alone the outputs are what it meets
            m.weight.data.zero_()[idx], m.bias.data[:] = 1, 0
            s, m = m(x).square().sum().item(), one
        norms[idx] = math.sqrt(s)
    return norms

seen = dict(
    linear      = (lambda: nn.Linear(5, 4),                        (7, 5)),
    linear_btc  = (lambda: nn.Linear(5, 4),                        (2, 3, 5)),
    linear_4d   = (lambda: nn.Linear(5, 4),                        (2, 2, 2, 5)),
    conv1d      = (lambda: nn.Conv1d(4, 6, 3),                     (2, 4, 7)),
    conv2d      = (lambda: nn.Conv2d(4, 6, 3),                     (2, 4, 5, 5)),
    grouped     = (lambda: nn.Conv2d(6, 9, 3, groups=3),           (2, 6, 5, 5)),
    depthwise   = (lambda: nn.Conv2d(4, 4, 3, groups=4),           (2, 4, 5, 5)),
    transposed  = (lambda: nn.ConvTranspose2d(4, 6, 3),            (2, 4, 5, 5)),
    gtransposed = (lambda: nn.ConvTranspose2d(6, 9, 3, groups=3),  (2, 6, 5, 5)),
    conv3d      = (lambda: nn.Conv3d(2, 3, 2),                     (2, 2, 3, 3, 3)),
    embedding   = (lambda: nn.Embedding(6, 4),                     (3, 8)))

@pytest.mark.parametrize('name', seen)
def test_input_norms_are_those_of_the_loops(name):
    make, shape = seen[name]
    m = make()
    x = torch.randint(0, 5, shape) if name == 'embedding' else torch.randn(shape)
    want = naive_norms(m, x)
    assert close(input_norms(m, named(m, 'weight'), x)['weight'].expand_as(m.weight), want, 1e-5)
    halves = [(x[:1], None), (x[1:], None)]  # two batches are as one
    assert close(input_norms(m, named(m, 'weight'), halves)['weight'].expand_as(m.weight), want, 1e-5)

@pytest.mark.parametrize('name, shape', [('conv2d', (4, 5, 5)), ('grouped', (6, 5, 5)), ('linear', (5,))])
def test_a_single_sample_has_no_batch_axis(name, shape):
    m, x = seen[name][0](), torch.randn(shape)
    assert close(input_norms(m, named(m, 'weight'), x)['weight'], input_norms(m, named(m, 'weight'), x[None])['weight'])

def test_tokens_are_counted_exactly():
    "70,007 of one token are more than fp16 can hold, and 256 + 1 is 256 in bf16"
    m = nn.Embedding(3, 1, dtype=torch.float16)
    data = [(torch.tensor([[0]*10_001 + [1]]), None)]*7
    assert input_norms(m, named(m), data)['weight'].square().flatten().tolist() == pytest.approx([70_007, 7, 0])

@pytest.mark.parametrize('batch_first', [False, True])
@pytest.mark.parametrize('kw', [False, True])
def test_projections_of_attention_see_queries_keys_and_values(batch_first, kw):
    m = nn.MultiheadAttention(4, 2, batch_first=batch_first)
    q, k, v = torch.randn(3, 3, 4), torch.randn(3, 3, 4), torch.randn(3, 3, 4)
    call = Calls(lambda net, q, k, v: net.mha(value=v, key=k, query=q) if kw else net.mha(q, k, v), mha=m)
    got = input_norms(call, named(call, 'in_proj_weight'), (q, k, v, None))['mha.in_proj_weight']
    assert got.shape == (12, 4)
    for rows,t in zip(got.split(4), (q, k, v)): assert close(rows, t.square().sum((0, 1)).sqrt().expand(4, 4), 1e-5)

@pytest.mark.parametrize('batch_first', [False, True])
@pytest.mark.parametrize('more', [{}, dict(kdim=3, vdim=5), dict(add_bias_kv=True), dict(bias=False)])
def test_the_output_projection_of_attention_sees_the_joined_heads(batch_first, more):
    "What it sees is what remains of the output if its weight is one and its bias is zero"
    m = nn.MultiheadAttention(4, 2, batch_first=batch_first, **more).eval()
    q, k, v = (torch.randn(3, 3, n) for n in (4, more.get('kdim', 4), more.get('vdim', 4)))
    plain, twin = m(q, k, v), deepcopy(m)
    twin.out_proj.weight.data = torch.eye(4)
    if twin.out_proj.bias is not None: twin.out_proj.bias.data.zero_()
    got = input_norms(m, named(m, 'out_proj.weight'), (q, k, v, None))['out_proj.weight']
    assert close(got, twin(q, k, v)[0].square().sum((0, 1)).sqrt()[None], 1e-5)
    assert all(map(torch.equal, m(q, k, v), plain)) and 'forward' not in vars(m)
    with opened_attention(m): assert close(m(q, k, v)[0], plain[0], 1e-5) and torch.equal(m(q, k, v)[1], plain[1])

def test_conv1d_of_transformers_is_a_linear_layer_with_its_weight_turned():
    m, x, y = Conv1D(5, 7), torch.randn(6, 3, 7), torch.randn(3, 4, 7)
    linear = nn.Linear(7, 5)
    linear.weight.data = m.weight.data.t()
    got, want = (input_norms(n, named(n, 'weight'), [(x, None), (y, None)])['weight'] for n in (m, linear))
    assert got.shape == (7, 1) and torch.equal(got, want.t())
    for context in ('output', 'local'):
        for net in (m, linear):
            Sparsifier(net, 'weight', context, 'wanda', layer_type=(nn.Linear, 'Conv1D'), data=x).sparsify_model(60)
        assert torch.equal(m.weight, linear.weight.t())
        assert int((m.weight == 0).sum()) == dict(output=5*4, local=21)[context]

def test_projections_with_sizes_of_their_own():
    m = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
    q, k, v = torch.randn(6, 2, 4), torch.randn(7, 2, 3), torch.randn(7, 2, 5)
    got = input_norms(m, named(m, '_proj_weight'), (q, k, v, None))
    for n,t in dict(q=q, k=k, v=v).items():
        assert close(got[f'{n}_proj_weight'], t.square().sum((0, 1)).sqrt()[None], 1e-5)

@pytest.mark.parametrize('kind', [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_see_their_input(kind):
    m, x = kind(3, 4, num_layers=2, bidirectional=True), torch.randn(5, 2, 3)
    params = {k: p for k,p in named(m).items() if k in ('weight_ih_l0', 'weight_ih_l0_reverse')}
    for s in input_norms(m, params, x).values(): assert close(s, x.square().sum((0, 1)).sqrt()[None], 1e-5)
    packed = Calls(lambda net, x: net.rnn(pack_padded_sequence(x, torch.tensor([5, 3])))[0].data, rnn=m)
    without = x.clone()
    without[3:, 1] = 0  # padding does not count
    got = input_norms(packed, {'rnn.weight_ih_l0': m.weight_ih_l0}, x)['rnn.weight_ih_l0']
    assert close(got, without.square().sum((0, 1)).sqrt()[None], 1e-5)
    for hidden in ('weight_hh_l0', 'weight_ih_l1', 'bias_ih_l0'):
        with pytest.raises(ValueError, match=f'{hidden} is multiplied with cannot be seen'):
            input_norms(m, {hidden: getattr(m, hidden)}, x)

def test_what_cannot_be_seen_is_refused_together():
    net = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    with pytest.raises(ValueError, match='linear1.bias, norm1.weight'):
        input_norms(net, named(net, 'linear1.weight') | named(net, 'linear1.bias') | named(net, 'norm1.weight'),
                    torch.rand(2, 3, 4))
    with pytest.raises(ValueError, match='linear1.bias'):
        input_norms(net, named(net, 'linear1.bias'), torch.rand(2, 3, 4))

def test_fused_attention_is_taken_apart():
    "In eval mode PyTorch would run the whole layer as one kernel, and pack padded sequences"
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.)
    nn.init.constant_(layer.linear1.bias, 9)  # no unit is dead
    net   = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True)
    call  = Calls(lambda m, x: m.net(x, src_key_padding_mask=torch.tensor([[False, False, True]]*2)), net=net)
    got = input_norms(call, {k: p for k,p in named(call, 'weight').items() if 'linear' in k or 'in_proj' in k},
                      torch.randn(2, 3, 4))
    assert len(got) == 3 and all((s > 0).all() for s in got.values())

def test_compiled_models_are_watched():
    "A model compiled before does not call hooks that come later: it runs uncompiled while it is measured"
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 0])
    compiled = torch.compile(net, backend='eager')
    with torch.no_grad(): compiled(x)
    compiled(x)
    for f in (input_norms, synflow_scores, channel_means, snip_scores, grasp_scores):
        a, b = (f(m, named(m, 'weight'), (x, y), F.cross_entropy) for m in (net, compiled))
        assert same(list(a.values()), list(b.values())) and a['0.weight'].any()

@pytest.mark.parametrize('f', [input_norms, channel_zeros, channel_means])
def test_layers_that_take_no_part_are_worth_nothing(f):
    net = Calls(lambda m, x: m.used(x), used=nn.Linear(3, 2), idle=nn.Linear(3, 2))
    scores = f(net, named(net, 'weight'), torch.rand(4, 3) + 9)
    assert not scores['idle.weight'].any() and scores['idle.weight'].expand(2, 3).shape == (2, 3)

def test_layers_called_twice_see_both():
    lin = nn.Linear(2, 2, bias=False)
    nn.init.eye_(lin.weight)
    net = Calls(lambda m, x: m.lin(2 * m.lin(x)), lin=lin)
    x = torch.tensor([[3., -1]])  # and (6, −2)
    assert close(input_norms(net, named(net), x)['lin.weight'], torch.tensor([[45., 5]]).sqrt())
    assert channel_means(net, named(net), x)['lin.weight'].tolist() == [[4.5], [0]]


# Channels

def test_zeros_and_means_by_hand():
    "Channels x, −x, 0 for the inputs 1, 2, −3"
    net = nn.Linear(1, 3, bias=False)
    net.weight.data = torch.tensor([[1.], [-1], [0]])
    x = torch.tensor([[1.], [2], [-3]])
    for data in (x, [(x[:1], None), (x[1:], None)], x.reshape(3, 1, 1)):  # batches of different sizes; (B, T, C)
        assert close(channel_zeros(net, named(net), data)['weight'], torch.tensor([[2/3], [1/3], [0]]))
        assert close(channel_means(net, named(net), data)['weight'], torch.tensor([[1.], [1], [0]]))

outs = dict(conv1d=(lambda: nn.Conv1d(2, 4, 2), (3, 2, 5)),
            grouped=(lambda: nn.Conv2d(4, 6, 2, groups=2), (3, 4, 4, 4)),
            conv3d=(lambda: nn.Conv3d(1, 2, 2), (2, 1, 3, 3, 3)),
            transposed=(lambda: nn.ConvTranspose1d(2, 3, 2), (3, 2, 5)),
            gtransposed=(lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (3, 4, 3, 3)),
            linear=(lambda: nn.Linear(3, 4), (5, 3)))

@pytest.mark.parametrize('name', outs)
def test_channels_are_those_of_the_loops(name):
    "Which output channel each weight belongs to: found by asking which outputs change with it"
    m, shape = outs[name][0](), outs[name][1]
    x = torch.randn(shape)
    with torch.no_grad(): out = m(x).movedim(1, 0).flatten(1)
    zeros, means = (f(m, named(m), x) for f in (channel_zeros, channel_means))
    for i in range(m.weight.numel()):
        idx = tuple(int(j) for j in np.unravel_index(i, m.weight.shape))
        with torch.no_grad():
            m.weight[idx] += 1
            moved = m(x).movedim(1, 0).flatten(1)
            m.weight[idx] -= 1
        c, = [c for c in range(len(out)) if (moved[c] - out[c]).abs().max() > 1e-3]
        got = zeros['weight'].expand_as(m.weight)[idx].item()
        assert got == pytest.approx((out[c] > 0).float().mean().item(), abs=1e-5)
        got = means['weight'].expand_as(m.weight)[idx].item()
        assert got == pytest.approx(out[c].clamp(min=0).mean().item(), abs=1e-5)
    assert means['bias'].shape == m.bias.shape and close(means['bias'], out.clamp(min=0).mean(1), 1e-5)

def test_a_single_image_has_no_batch_axis():
    m, x = nn.Conv2d(1, 3, 2), torch.randn(1, 4, 4)
    assert close(channel_means(m, named(m), x)['weight'], channel_means(m, named(m), x[None])['weight'])

def test_the_norm_that_follows_counts():
    "γ = (1, 1), β = (100, −100): after the norm one channel is always positive, the other never"
    net = nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 1))
    net[1].bias.data = torch.tensor([100., -100])
    x, params = torch.randn(3, 1, 5, 5), named(net, 'weight')
    params.pop('1.weight')
    got = channel_zeros(net, params, x, norms={'0': ('1',)})
    assert got['0.weight'].flatten().tolist() == [1, 0]
    assert 0 < channel_zeros(net, params, x, norms={})['0.weight'].min()
    assert all(close(channel_zeros(net, params, x)[k], got[k]) for k in got)  # as the flow of data shows it
    assert close(got['3.weight'], channel_zeros(net, params, x, norms={})['3.weight'])  # has no norm: its own output

@pytest.mark.parametrize('norm, move', [(lambda: nn.LayerNorm(4), True), (lambda: nn.GroupNorm(2, 4), False),
                                        (lambda: nn.InstanceNorm2d(4, affine=True), False)])
def test_norms_of_other_kinds_follow(norm, move):
    norm = norm()
    norm.bias.data = torch.tensor([100., -100, 100, -100])
    net = Calls(lambda m, x: m.norm(m.conv(x).movedim(1, -1) if move else m.conv(x)),
                conv=nn.Conv2d(1, 4, 2), norm=norm)
    got = channel_zeros(net, {'conv.weight': net.conv.weight}, torch.randn(2, 1, 5, 5),
                        norms={'conv': ('norm',)})['conv.weight']
    assert got.flatten().tolist() == [1, 0, 1, 0]

def test_of_several_norms_the_last_counts_and_the_first_scales():
    net = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    net[1].weight.data, net[2].bias.data = torch.tensor([3., -4]), torch.tensor([-100., 100])
    norms = {'0': ('1', '2')}
    assert channel_zeros(net, {'0.weight': net[0].weight}, torch.randn(4, 1),
                         norms=norms)['0.weight'].tolist() == [[0], [1]]
    assert norm_scales(net, {'0.weight': net[0].weight}, norms=norms)['0.weight'].tolist() == [[3], [4]]

@pytest.mark.parametrize('name', outs)
def test_scales_belong_to_output_channels(name):
    m = outs[name][0]()
    out = m.out_features if name == 'linear' else m.out_channels
    norm = nn.BatchNorm1d(out)
    norm.weight.data = -torch.arange(1., out + 1)
    net = nn.Sequential(m, norm)
    got = norm_scales(net, named(net, '0.weight') | named(net, '0.bias'), norms={'0': ('1',)})
    means = channel_means(m, named(m, 'weight'), torch.randn(outs[name][1]))['weight']
    assert got['0.weight'].shape == means.shape and got['0.bias'].tolist() == list(range(1, out + 1))
    assert set(got['0.weight'].flatten().tolist()) == set(range(1, out + 1)) and not got['0.weight'].requires_grad

@pytest.mark.parametrize('norms', [None, {}, {'0': ()}, {'0': ('1',)}])
def test_layers_without_a_scale_are_named(norms):
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2))
    with pytest.raises(ValueError, match='follows 0, 2: leave'): norm_scales(net, named(net), norms=norms)

def test_wrong_norms_are_refused():
    net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.LayerNorm([3, 4, 4]), nn.Conv2d(3, 5, 1))
    params, x = {'0.weight': net[0].weight}, torch.rand(2, 1, 5, 5)
    with pytest.raises(ValueError, match=r'\(3, 4, 4\).*3 channels'): norm_scales(net, params, norms={'0': ('1',)})
    with pytest.raises(ValueError, match="norm in `norms` 'norm'"): norm_scales(net, params, norms={'0': ('norm',)})
    with pytest.raises(ValueError, match='3 channels expected'): channel_zeros(net, params, x, norms={'0': ('2',)})

@pytest.mark.parametrize('f', [channel_zeros, channel_means, norm_scales])
def test_layers_without_output_channels_are_named(f):
    net = nn.Sequential(nn.Embedding(3, 2), nn.LayerNorm(2))
    with pytest.raises(ValueError, match='0.weight, 1.weight'): f(net, named(net, 'weight'), torch.tensor([[0]]))
    mha = nn.MultiheadAttention(4, 2)
    with pytest.raises(ValueError, match='out_proj.weight'): f(mha, named(mha, 'out_proj.weight'), torch.rand(2, 3, 4))

@pytest.mark.parametrize('f', [input_norms, channel_zeros, channel_means])
def test_activations_are_measured_in_eval_mode(f):
    "Dropout would double what it lets through"
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)).train()
    nn.init.eye_(net[1].weight), nn.init.zeros_(net[1].bias)
    assert f(net, {'1.weight': net[1].weight}, torch.ones(1, 2))['1.weight'].flatten().tolist() == [1, 1]

class Gated(nn.Module):
    """Squeeze-and-excitation: what flows is multiplied by what is made of it, so that numbers are squared at each of
    them"""
    def __init__(self, n):
        super().__init__()
        self.a, self.b = nn.Linear(n, n), nn.Linear(n, n)
    def forward(self, x): return x * self.b(self.a(x).relu()).sigmoid()

@pytest.mark.parametrize('factor', [1e-3, 1., 1e3])
def test_signal_through_many_gates(factor):
    "Without levels 12 squarings end in infinity or zero"
    net = nn.Sequential(*[Gated(6) for _ in range(12)], nn.Linear(6, 2))
    for p in net.parameters(): p.data.mul_(factor)
    through = passes_signal(net, torch.rand(1, 6))
    assert len(through) == 25 and all(through.values())
    net[5].a.weight.data.zero_()  # nothing passes this gate's layers; it is open by half, whatever they get
    assert [k for k,v in passes_signal(net, torch.rand(1, 6)).items() if not v] == ['5.a', '5.b']
