"Multiply-adds by hand: whichever kernel runs, for one item of the batch, and what cannot be counted is named"
from types import SimpleNamespace as NS

import pytest, torch, torch.nn as nn, torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from fasterai_clone.model.flops import multiply_adds
from fasterai_clone.model.formulas import formulas, operator_cost
from fasterai_clone.analyze.compare import compare
from fasterai_clone.sparse.sparsifier import Sparsifier

aten, steps = torch.ops.aten, torch.rand(5, 2, 8)  # 5 steps of 2 items

def cost(name, args, out):
    "By the formula of an operator, also of one that this torch or machine lacks"
    f, at = formulas()[f'aten::{name}']
    return f(out, *(args[i] for i in at))


# Attention

q, k, v = torch.rand(3, 2, 5, 8), torch.rand(3, 2, 7, 8), torch.rand(3, 2, 7, 8)  # 3 items, 2 heads, 5 queries, 7 keys
by_hand = 3*2 * 5*7 * (8 + 8)

@pytest.mark.parametrize('kernel', '''flash_attention flash_attention_for_cpu efficient_attention
    cudnn_attention attention_math fused_attention_overrideable attention_math_for_mps'''.split())
def test_every_kernel_of_attention_costs_the_same(kernel):
    assert cost(f'_scaled_dot_product_{kernel}', (q, k, v), None) == by_hand

@pytest.mark.parametrize('kernel', ['_flash_attention_forward', '_efficient_attention_forward',
                                    '_cudnn_attention_forward'])
def test_heads_last_and_sequences_of_different_lengths(kernel):
    last = [t.transpose(1, 2) for t in (q, k, v)]
    assert cost(kernel, (*last, None, None, None), None) == by_hand
    joined, starts = torch.rand(5, 2, 8), torch.tensor([0, 2, 5])  # of 2 and 3 steps
    given = [joined]*3 + [starts, starts, starts]
    assert cost(kernel, given, None) == (2*2 + 3*3) * 2 * (8 + 8)

class Attends(nn.Module):
    def forward(self, q, k, v): return F.scaled_dot_product_attention(q, k, v)

def test_attention_as_it_is_called():
    backends = torch.nn.attention.SDPBackend
    for b in (backends.MATH, backends.FLASH_ATTENTION):
        with torch.nn.attention.sdpa_kernel([b, backends.MATH]):
            assert multiply_adds(Attends(), (q, k, v)).total == by_hand // 3

def test_fused_encoder_layers():
    """3 projections and that of the output 4·8·8 for each of 6 tokens, 2·6·6·8 for scores and sums, 2·8·16 for each
    token after that"""
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.rand(3, 6, 8)
    a, one = layer.self_attn, 6*4*8*8 + 2*6*6*8
    given = (x, x, x, 8, 2, a.in_proj_weight, a.in_proj_bias, a.out_proj.weight, a.out_proj.bias)
    assert operator_cost(aten._native_multi_head_attention.default, given, {}, (x, None)) == 3*one
    n = [layer.norm1.weight, layer.norm1.bias, layer.norm2.weight, layer.norm2.bias]
    whole = (x, 8, 2, *given[5:], False, False, 1e-5, *n, layer.linear1.weight, layer.linear1.bias,
             layer.linear2.weight, layer.linear2.bias)
    assert operator_cost(aten._transformer_encoder_layer_fwd.default, whole, {}, x) == 3*(one + 6*2*8*16)
    assert multiply_adds(layer, x).total == one + 6*2*8*16


# Recurrent layers and other operators

unit = 8 + 6

@pytest.mark.parametrize('layer, n', [
    (nn.LSTM(8, 6), 5*4*6*unit), (nn.GRU(8, 6), 5*3*6*unit), (nn.RNN(8, 6), 5*6*unit),
    (nn.LSTM(8, 6, 2), 5*4*6*(unit + 6 + 6)), (nn.GRU(8, 6, bidirectional=True), 2*5*3*6*unit),
    (nn.LSTM(8, 6, proj_size=3), 5*(4*6*(8 + 3) + 6*3))])
def test_recurrent_layers(layer, n):
    counted = multiply_adds(layer, steps)
    assert counted == {'': n} and counted.items == 2
    first = type(layer)(layer.input_size, 6, layer.num_layers, batch_first=True, bidirectional=layer.bidirectional,
                        proj_size=layer.proj_size) \
        if isinstance(layer, nn.LSTM) else type(layer)(8, 6, batch_first=True, bidirectional=layer.bidirectional)
    assert multiply_adds(first, steps.transpose(0, 1)) == {'': n}

def test_more_of_recurrent_layers():
    weights = torch.rand(24, 8), torch.rand(24, 6), torch.rand(24), torch.rand(24)
    assert cost('_cudnn_rnn', (steps, weights), None) == 2 * 5*4*6*unit
    assert multiply_adds(nn.LSTMCell(8, 6), steps[0]) == {'': 4*6*unit}
    assert multiply_adds(nn.LSTM(8, 6), pack_padded_sequence(steps, [5, 3])).total == (5 + 3)*4*6*unit // 2

def test_bilinear_and_bags():
    assert multiply_adds(nn.Bilinear(8, 4, 3), (torch.rand(2, 8), torch.rand(2, 4))) == {'': 8*4*3}
    assert multiply_adds(nn.EmbeddingBag(9, 4), torch.zeros(2, 3).long()) == {'': 0}

def test_products_of_functions():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.rand(8, 3))
        def forward(self, x):
            return torch.einsum('btc,co->bto', x, self.w) + torch.baddbmm(torch.zeros(1), x,
                                                                          self.w.expand(len(x), 8, 3))
    assert multiply_adds(Net(), torch.rand(4, 5, 8)) == {'': 2 * 5*8*3}

def test_scripted_parts_are_counted():
    parts = torch.jit.script(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)))
    assert multiply_adds(nn.Sequential(parts), torch.rand(2, 8)) == {'0.0': 48, '0.2': 18}
    assert multiply_adds(parts, torch.rand(2, 8)) == {'0': 48, '2': 18}


# For one item

class Sums(nn.Module):
    "A network whose inputs come in many forms"
    def __init__(self, read):
        super().__init__()
        self.read, self.fc = read, nn.Linear(8, 3)
    def forward(self, *args, **kwargs): return self.fc(self.read(*args, **kwargs))

x = torch.rand(4, 8)

@pytest.mark.parametrize('read, inputs, items', [
    (lambda x: x, x, 4), (lambda x: x, x[:1], 1), (lambda x: x, x[0], None),
    (lambda time, x: x + time, dict(time=torch.ones(1), x=x), 4),
    (lambda time, x: x + time[:, None], dict(time=torch.ones(4), x=x), 4),
    (lambda xs: torch.stack(xs), ([*x],), 4), (lambda xs: torch.stack(xs), ((*x,),), 4),
    (lambda ds: torch.stack([d['x'] for d in ds]), ([dict(x=t) for t in x],), 4), (lambda o: o.x, (NS(x=x),), 4),
    (lambda x: x + torch.randn_like(x), x, 4)])
def test_items_of_a_batch(read, inputs, items):
    counted = multiply_adds(Sums(read), inputs)
    assert counted.items == items and counted == {'fc': 24}

def test_sequences_first():
    "The decoder sees 4 steps, of the encoder's 5"
    counted = multiply_adds(nn.Transformer(8, 2, 1, 1, 16), (torch.rand(5, 2, 8), torch.rand(4, 2, 8)))
    assert counted.items == 2 and counted['encoder.layers.0.linear1'] == 5*8*16
    assert counted['decoder.layers.0.linear1'] == 4*8*16
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__(); self.e, self.l, self.d = nn.Embedding(20, 8), nn.LSTM(8, 6), nn.Linear(6, 20)
        def forward(self, x): return self.d(self.l(self.e(x))[0]).flatten(0, 1)
    assert multiply_adds(Tagger(), torch.randint(20, (5, 3))) == {'e': 0, 'l': 5*4*6*unit, 'd': 5*6*20}

def test_what_is_done_once_stays():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.t, self.fc = nn.Linear(1, 8), nn.Linear(8, 3)
        def forward(self, t, x): return self.fc(x + self.t(t))
    assert multiply_adds(Net(), (torch.ones(1), x)) == {'t': 8, 'fc': 24}


# What cannot be counted

@torch.library.custom_op('fasterai_clone_tests::product', mutates_args=())
def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor: return a @ b

class Hidden(nn.Linear):
    def forward(self, x): return product(x, self.weight.T)

def test_unknown_operators_are_named():
    net = nn.Sequential(nn.Linear(8, 6), Hidden(6, 3))
    counted = multiply_adds(net, x)
    assert counted == {'0': 48, '1': 0} and counted.uncounted == {'fasterai_clone_tests.product': ('1',)}
    assert 'fasterai_clone_tests.product (in 1)' in str(compare(net, net, x, runs=1, devices=[]))
    with pytest.raises(ValueError, match='fasterai_clone_tests.product, which 1 calls'):
        Sparsifier(net, 'weight', 'global', layer_type=nn.Linear, budget='flops', example_inputs=x)
    assert multiply_adds(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.MaxPool2d(2)),
                         torch.rand(2, 3, 8, 8)).uncounted == {}

def test_an_lstm_in_a_comparison():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.l, self.fc = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 2)
        def forward(self, x): return self.fc(self.l(x)[0][:, -1])
    c = compare(Net(), Net(), torch.rand(2, 5, 8), runs=1, devices=[])
    assert c.before.multiply_adds == 5*4*16*(8 + 16) + 16*2 and c.batch == 2
