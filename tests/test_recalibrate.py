"Batch norms get the statistics of the inputs that they see in the pruned network"
import copy

import pytest, torch, torch.nn as nn
from fasterai_clone.methods.passes import CalibrationData
from fasterai_clone.methods.recalibrate import Statistics, recalibrate
from helpers import same, weights


def net():
    first = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
    return nn.Sequential(*first, nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.Flatten())

def batches(*sizes): return [(torch.randn(n, 1, 8, 8)*3 + 1,) for n in sizes]

def inputs_of(model, data):
    "Norm → the inputs it gets in eval mode, all of `data` in one batch"
    seen, m = {}, copy.deepcopy(model).eval()
    for k,norm in m.named_modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.register_forward_pre_hook(lambda norm, args, k=k: seen.update({k: args[0].detach()}))
    m(torch.cat([x for x, in data]))
    return seen

def check_fixed_point(model, data):
    "The law: the statistics of each norm are those of its own inputs"
    for k,x in inputs_of(model, data).items():
        x, norm = x.double().transpose(0, 1).flatten(1), model.get_submodule(k)
        torch.testing.assert_close(norm.running_mean.double(), x.mean(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), x.var(1), rtol=1e-5, atol=1e-5)

def test_by_hand():
    "1, 2, 3, 4, 5: mean 3, variance 10/4, however they are cut into batches"
    for cut in (1, 2, 4):
        bn = nn.BatchNorm1d(1)
        x = torch.arange(1., 6)[:, None]
        moved = recalibrate(bn, [(x[:cut],), (x[cut:],)])
        assert bn.running_mean.item() == 3 and abs(bn.running_var.item() - 2.5) < 1e-6
        values, mean, scale = moved['']
        assert values == 5 and abs(mean - 3/2.5**.5) < 1e-3 and abs(scale - 2.5**.5) < 1e-3

@pytest.mark.parametrize('sizes', [(12,), (5, 9, 2), (1, 1, 1)])
def test_each_norm_has_the_statistics_of_its_own_inputs(sizes):
    model, data = net(), batches(*sizes)
    assert list(recalibrate(model, data)) == ['1', '4']
    check_fixed_point(model, data)

def test_one_pass_over_one_batch_is_what_training_with_momentum_one_gives():
    model, (data,) = net(), batches(16)
    other = copy.deepcopy(model)
    for m in (other[1], other[4]): m.momentum = 1.
    other.train()(*data)
    recalibrate(model, data, sequential=False)
    for i in (1, 4):
        torch.testing.assert_close(model[i].running_mean, other[i].running_mean)
        torch.testing.assert_close(model[i].running_var, other[i].running_var)

def test_one_pass_is_exact_for_the_first_norm():
    model, data = net(), batches(5, 9, 2)
    exact = copy.deepcopy(model)
    recalibrate(exact, data)
    recalibrate(model, data, sequential=False)
    torch.testing.assert_close(model[1].running_mean, exact[1].running_mean)
    assert not torch.allclose(model[4].running_var, exact[4].running_var, rtol=1e-3)

def test_large_means_and_half_precision():
    "A mean of 10,000 with variance 1: the difference of squares would be lost in fp32"
    x, s = torch.randn(1000, 1, dtype=torch.float64) + 1e4, Statistics()
    for part in x.split(100): s.add(part)
    assert abs(s.variance().item() - x.var().item()) < 1e-6
    model = net().to(torch.bfloat16)
    recalibrate(model, [(b.to(torch.bfloat16),) for b, in batches(4, 6)])
    assert model[1].running_var.dtype == torch.bfloat16 and model[1].running_var.isfinite().all()

@pytest.mark.parametrize('training', [True, False])
def test_all_else_stays(training):
    model, data = net().train(training), batches(4, 6)
    model[1].momentum, model[4].momentum = None, .3
    model[2].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    was, numbers = weights(model), torch.get_rng_state()
    recalibrate(model, data)
    assert [m.training for m in model] == [training, training, False, training, training, training]
    assert model[1].momentum is None and model[4].momentum == .3 and model[1].num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), numbers) and model[0].weight.grad.sum() == 36
    changed = {k for k,v in weights(model).items() if not torch.equal(v, was[k])}
    assert changed == {f'{i}.running_{k}' for i in (1, 4) for k in ('mean', 'var')}
    assert not any(m._forward_pre_hooks for m in model)

@pytest.mark.parametrize('stop', [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize('after', [1, 3, 4])
def test_all_or_nothing(stop, after, monkeypatch):
    "While the batches are read, or in a later pass if there is no memory to keep them"
    import fasterai_clone.methods.passes as room
    if after > 2: monkeypatch.setattr(room, 'free_memory', lambda device: None)
    model, n = net(), 0
    class Data:
        def __iter__(self):
            nonlocal n
            for b in batches(3, 4):
                n += 1
                if n > after: raise stop
                yield b
    was = weights(model)
    with pytest.raises(stop): recalibrate(model, Data())
    assert same(weights(model), was) and model.training and model[1].momentum == .1

class Shared(nn.Module):
    "A norm that runs twice, one that never runs, and arguments by name"
    def __init__(self):
        super().__init__()
        self.bn, self.unused = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    def forward(self, x, other): return self.bn(x) + self.bn(other)

def test_a_norm_that_runs_twice_and_one_that_never_does():
    model, data = Shared(), [dict(x=torch.randn(4, 2), other=torch.randn(6, 2)[:4] + 5) for _ in range(3)]
    assert list(recalibrate(model, data)) == ['bn']
    both = torch.cat([t for b in data for t in b.values()])
    torch.testing.assert_close(model.bn.running_mean, both.mean(0))
    torch.testing.assert_close(model.bn.running_var, both.var(0))
    assert model.unused.running_var.tolist() == [1, 1]

def test_all_kinds_of_data():
    "Tensors, tuples with labels, dicts, generators, loaders that shuffle, fastai's tensors and loaders"
    from fastai.torch_core import TensorImage
    x, y = torch.randn(8, 1, 8, 8), torch.zeros(8)
    model = net()
    def means(data, **kwargs):
        m = copy.deepcopy(model)
        recalibrate(m, data, **kwargs)
        return torch.cat([m[1].running_mean, m[4].running_mean])
    want   = means(x)
    pairs  = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(pairs, batch_size=3, shuffle=True)
    parts   = ((x[i:i+2],) for i in (0, 2, 4, 6))
    several = [(x[:5], y[:5]), (x[5:], y[5:])], parts, [dict(input=x[:4]), dict(input=x[4:])]
    for data in ((x, y), dict(input=x), TensorImage(x), *several, loader):
        torch.testing.assert_close(means(data), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(means([(x[:5],), (x[5:],)], max_batches=1), means(x[:5]))

def test_passes_see_the_same_batches():
    x    = torch.arange(10.)
    data = CalibrationData(torch.utils.data.DataLoader(x, batch_size=3, shuffle=True, drop_last=True), 'cpu')
    assert [b[0].tolist() for b in data] == [b[0].tolist() for b in data]

def test_wrapped_and_compiled():
    model, data = net(), batches(4, 6)
    plain = copy.deepcopy(model)
    recalibrate(plain, data)
    recalibrate(nn.DataParallel(model), data)
    assert same(weights(model), weights(plain))

nans = torch.full((1, 1, 8, 8), torch.nan)

wrong = [([], 'holds no batch'), ([(nans,), (nans,)], 'NaN or infinite'), (None, 'must be a tensor')]

@pytest.mark.parametrize('data, message', wrong)
def test_refusals(data, message):
    model = net()
    was = weights(model)
    with pytest.raises((ValueError, TypeError), match=message): recalibrate(model, data)
    assert same(weights(model), was)

def test_refuses_models_without_norms():
    with pytest.raises(ValueError, match='no batch norm with'): recalibrate(nn.Linear(2, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match='needs two values'): recalibrate(nn.BatchNorm2d(2), torch.ones(1, 2, 1, 1))
    with pytest.raises(TypeError, match='must be an `nn.Module`'): recalibrate(dict(), torch.ones(3, 2))


# Relative to the dense network

def test_repair_of_the_variance_by_hand():
    "Inputs are half as large in the pruned network: the norm makes up for it"
    dense = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3)).eval()
    dense[1].running_mean.copy_(torch.tensor([1., 2., 3.])), dense[1].running_var.copy_(torch.tensor([.5, 1., 2.]))
    model, x = copy.deepcopy(dense), torch.randn(40, 3)
    model[0].weight.data /= 2
    recalibrate(model, x, dense=dense)
    torch.testing.assert_close(model(x), dense(x))
    torch.testing.assert_close(model[1].running_mean, dense[1].running_mean/2, rtol=1e-4, atol=1e-4)

def test_the_dense_network_stays_as_it_is():
    "Whatever the data, no change means no change; plain statistics would follow the data"
    dense, data = net().eval(), batches(6, 6)
    model = copy.deepcopy(dense)
    recalibrate(model, data, dense=dense)
    for i in (1, 4):
        torch.testing.assert_close(model[i].running_mean, dense[i].running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model[i].running_var, dense[i].running_var, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('shrinkage', [0., .5, 1.])
def test_shrinkage_by_hand(shrinkage):
    "Inputs of channels are 4 and 1 times as large: ratios of 4 and 1, of which the geometric mean is 2"
    dense = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, eps=0)).eval()
    model, x = copy.deepcopy(dense), torch.randn(50, 2)
    model[0].weight.data[0] *= 4
    recalibrate(model, x, dense=dense, shrinkage=shrinkage)
    want = torch.tensor([4**(1 - shrinkage) * 2**shrinkage, 2**shrinkage])**2
    torch.testing.assert_close(model[1].running_var, want, rtol=1e-3, atol=1e-4)

def test_channels_that_are_dead_keep_their_statistics():
    dense = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)).eval()
    model, x = copy.deepcopy(dense), torch.randn(50, 2)
    model[0].weight.data[0] = 0
    recalibrate(model, x, dense=dense)
    assert model[1].running_var[0].item() == pytest.approx(1) and model[1].running_mean.isfinite().all()

@pytest.mark.parametrize('kwargs, message', [(dict(shrinkage=2.), '`shrinkage` must be'),
                                             (dict(dense=nn.Linear(1, 1)), '`dense` must have the norms')])
def test_refusals_of_the_repair(kwargs, message):
    model = net()
    with pytest.raises(ValueError, match=message): recalibrate(model, batches(4), **{'dense': net(), **kwargs})
