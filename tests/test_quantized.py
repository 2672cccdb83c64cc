"""Zeros survive int8 and quantization-aware training of torch and torchao: the zero point is 0, and zeros are counted
after each step. There is no quantizer in this library"""

import pytest, torch, torch.nn as nn
from fastai.basics import F, Learner, set_seed

from fasterai_clone.core.masks import Masks
from fasterai_clone.digits import digits_dls, digits_net
from fasterai_clone.sparse.all import KeepSparsity, Sparsifier

quantization = pytest.importorskip('torch.ao.quantization')
pytestmark = pytest.mark.filterwarnings('ignore')  # torch moves these functions to torchao

@pytest.fixture(autouse=True)
def engine():
    "An engine that this build of torch has"
    was, names = torch.backends.quantized.engine, torch.backends.quantized.supported_engines
    usable = [k for k in ('fbgemm', 'x86', 'onednn', 'qnnpack') if k in names]
    if not usable: pytest.skip('this build of torch has no kernels for int8')
    torch.backends.quantized.engine = usable[0]
    yield usable[0]
    torch.backends.quantized.engine = was

def zeros(model): return {k: int((p == 0).sum()) for k,p in model.named_parameters() if p.ndim > 1}

def zero_points(w):
    per_channel = w.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
    return w.q_per_channel_zero_points().abs().max().item() if per_channel else abs(w.q_zero_point())

def int8_zeros(model):
    "name → zeros in the int8 weights of a quantized model, all with zero point 0"
    weights = {k: m.weight() for k,m in model.named_modules() if callable(getattr(m, 'weight', None))}
    assert weights and all(w.dtype == torch.qint8 and zero_points(w) == 0 for w in weights.values())
    return {f'{k}.weight': int((w.int_repr() == 0).sum()) for k,w in weights.items()}

@pytest.mark.parametrize('kwargs', [dict(), dict(nm='2:4'), dict(granularity='row')], ids=['weight', '2:4', 'row'])
def test_dynamic_int8(kwargs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 12))
    sp  = Sparsifier(net, layer_type=nn.Linear, **kwargs)
    sp.sparsify_model(50)
    q     = quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    found = int8_zeros(q)
    assert all(found[k] >= n > 0 for k,n in zeros(net).items())
    for k,mask in sp.masks.items(): assert (q[int(k[0])].weight().int_repr()[~mask] == 0).all()

def qat_net(engine):
    "A pruned network for digits, prepared for quantization-aware training"
    set_seed(0)
    net = nn.Sequential(quantization.QuantStub(), *digits_net(8), quantization.DeQuantStub())
    Sparsifier(net).sparsify_model(80)
    net.train().qconfig = quantization.get_default_qat_qconfig(engine)
    fused = [[str(i + k) for k in range(3)] for i in (1, 4, 7)]
    return quantization.prepare_qat(quantization.fuse_modules_qat(net, fused)), zeros(net)

def test_keep_sparsity_in_quantization_aware_training(engine):
    net, before = qat_net(engine)
    assert zeros(net) == before
    masks, old = Masks.of(net), net.state_dict()['4.weight'].clone()
    learn = Learner(digits_dls(n=256), net, loss_func=F.cross_entropy)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=KeepSparsity(verbose=False))
    after = zeros(net)
    assert not torch.equal(net.state_dict()['4.weight'], old)
    assert after == before and all((p[~masks[k]] == 0).all() for k,p in net.named_parameters() if k in masks)
    found = int8_zeros(quantization.convert(net.eval()))
    assert all(found[k] >= n for k,n in after.items())

def test_without_keep_sparsity_the_zeros_are_lost(engine):
    "So the test above shows something"
    net, before = qat_net(engine)
    learn = Learner(digits_dls(n=128), net, loss_func=F.cross_entropy)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    assert sum(zeros(net).values()) < sum(before.values())

def test_plain_pytorch(engine):
    "`masks.hold` does the same"
    net, before = qat_net(engine)
    opt, (xb, yb) = torch.optim.Adam(net.parameters(), 1e-2), digits_dls(n=128).one_batch()
    with Masks.of(net).hold(net, opt):
        for _ in range(5):
            F.cross_entropy(net(xb), yb).backward()
            opt.step(), opt.zero_grad()
    assert zeros(net) == before

def torchao_zeros(w):
    "The number of zeros in the int8 weight of torchao, whose zero point is 0; torchao has two classes for it"
    if hasattr(w, 'tensor_impl'): numbers, _, point = w.tensor_impl.get_plain()
    else: numbers, point = w.qdata, w.zero_point
    assert numbers.dtype == torch.int8 and (point is None or not point.any())
    return int((numbers == 0).sum())

def test_torchao():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 12))
    sp  = Sparsifier(net, layer_type=nn.Linear)
    sp.sparsify_model(90)
    before = zeros(net)
    quantize_(net, Int8WeightOnlyConfig())
    for k,mask in sp.masks.items():
        w = net.get_parameter(k)
        assert torchao_zeros(w) >= before[k] > 0 and (w.dequantize()[~mask] == 0).all()

def test_keep_sparsity_in_torchao_qat():
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, qat, quantize_
    set_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    Sparsifier(net, layer_type=nn.Linear, exclude='3').sparsify_model(80)
    before, config = zeros(net), Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8)
    quantize_(net, qat.QATConfig(config, step='prepare'))
    old, learn = net[1].weight.detach().clone(), Learner(digits_dls(n=256), net, loss_func=F.cross_entropy)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=KeepSparsity(verbose=False))
    assert zeros(net) == before and 'FakeQuantized' in type(net[1]).__name__ and not torch.equal(net[1].weight, old)
    mask = net[1].weight != 0
    quantize_(net, qat.QATConfig(config, step='convert'))
    assert torchao_zeros(net[1].weight) >= before['1.weight'] and (net[1].weight.dequantize()[~mask] == 0).all()
