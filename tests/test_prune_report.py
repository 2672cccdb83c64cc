"Costs before and after: by hand, whatever the model is, what is said of them, and what is refused"
import copy, io, pickle, random

import matplotlib, numpy as np, pytest, torch, torch.nn as nn, torch.nn.functional as F

from fasterai_clone.analyze.compare import Comparison, compare
from fasterai_clone.analyze.cost import Cost, LayerCost
from fasterai_clone.prune.thin import thin

matplotlib.use('agg')


def two_convs():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, bias=False))

def without_a_filter(net):
    "A copy with filter 1 of the first convolution zero, and what the norm makes of it"
    net = copy.deepcopy(net)
    with torch.no_grad():
        for t in (net[0].weight, net[0].bias, net[1].weight, net[1].bias): t[1] = 0
    return net

def images(n=2): return torch.randn(n, 1, 6, 6)

def counted(before, after, x, **kwargs): return compare(before, after, x, devices=[], **kwargs)

def saved(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return len(file.getvalue())


# -- by hand ---------------------------------------------------------------------------------------
def test_what_two_convolutions_cost():
    net, x = two_convs(), images()
    small  = thin(without_a_filter(net), example_inputs=x)
    c      = counted(net, small, x)
    # 4 filters of 3×3 at 4×4 places, 2 of 4×3×3 at 2×2 places
    assert (c.before.params, c.before.weights, c.before.zeros) == (4*9+4 + 4+4 + 2*4*9, 4*9 + 2*4*9, 0)
    assert (c.after .params, c.after .weights, c.after .zeros) == (3*9+3 + 3+3 + 2*3*9, 3*9 + 2*3*9, 0)
    assert (c.before.multiply_adds, c.after.multiply_adds) == (4*9*16 + 2*4*9*4, 3*9*16 + 2*3*9*4)
    # convolution, norm and ReLU of 4×4 numbers for each channel, two times 2×2 at the end; 4 bytes each, two images
    assert (c.before.activations, c.after.activations) == (2*4*(3*4*16 + 2*4), 2*4*(3*3*16 + 2*4))
    assert c.batch == 2 and (c.before.file, c.after.file) == (saved(net), saved(small))
    assert c.before.layers == {'0': LayerCost('Conv2d', 1, 4, 40, 0, 576), '3': LayerCost('Conv2d', 4, 2, 72, 0, 288)}
    assert c.after .layers == {'0': LayerCost('Conv2d', 1, 3, 30, 0, 432), '3': LayerCost('Conv2d', 3, 2, 54, 0, 216)}
    assert c.layers['3'] == (c.before.layers['3'], c.after.layers['3'])

def test_masks_alone():
    net, x = two_convs(), images()
    c = counted(net, without_a_filter(net), x)
    assert (c.before.zeros, c.after.zeros) == (0, 9)
    for k in ('params', 'multiply_adds', 'activations', 'file'): assert getattr(c.before, k) == getattr(c.after, k)
    assert '9 of 108 weights are zero' in c.expect and 'masks alone make nothing smaller or faster' in c.expect
    assert '`thin`' in c.expect

def test_bytes_of_other_precisions():
    net, x = two_convs(), images()
    c = counted(net.double(), net, x.double())
    assert c.before.activations == 2*8*(3*4*16 + 2*4)

def test_the_batch_counts_for_activations_but_not_for_multiply_adds():
    net = two_convs()
    one, six = counted(net, net, images(1)).before, counted(net, net, images(6)).before
    assert six.activations == 6*one.activations and six.multiply_adds == one.multiply_adds == 864


# -- what is said ----------------------------------------------------------------------------------
def test_thinned():
    net, x = two_convs(), images()
    say = counted(net, thin(without_a_filter(net), example_inputs=x), x).expect
    assert say.startswith('1.33× fewer multiply-adds') and 'zero' not in say and 'Measured' not in say  # 864 ÷ 648

def test_zeros_in_what_is_left():
    net, x = two_convs(), images()
    small = thin(without_a_filter(net), example_inputs=x)
    with torch.no_grad(): small[3].weight[0, 0] = 0
    assert '9 of 81 weights are zero still: that alone brings nothing' in counted(net, small, x).expect

def test_nothing_was_done():
    net, x = two_convs(), images()
    assert counted(net, net, x).expect == 'Same sizes, and no more zeros than before: expect no difference.'

def test_more_work_than_before():
    net, x = two_convs(), images()
    assert counted(thin(without_a_filter(net), example_inputs=x), net,
                   x).expect.startswith('Not fewer multiply-adds: expect no speed-up.')

def test_another_model():
    "Layers are put together by name; one side may have none"
    net, x = two_convs(), images()
    c = counted(net, nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 2)), x)
    assert list(c.layers) == ['0', '3', '2'] and c.layers['3'][1] is None and c.layers['2'][0] is None
    for s in (str(c), c._repr_html_()): assert '64 → 2' in s and '–' in s
    assert c.to_pandas().set_index('name').loc['2', 'outputs_after'] == 2 and len(c.plot()) == 2


# -- time ------------------------------------------------------------------------------------------
class Clock:
    "Two models that take 4 and 1 seconds by this clock"
    def __init__(self): self.now, self.calls = 0., []
    def __call__(self): return self.now

class Slow(nn.Module):
    clock = Clock()
    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.weight = seconds, nn.Parameter(torch.ones(2, 2))

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        self.clock.now += self.seconds
        self.clock.calls.append(self.seconds)
        return x @ self.weight

def test_runs_are_interleaved(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(Slow, 'clock', clock)
    monkeypatch.setattr('fasterai_clone.analyze.cost.time.perf_counter', clock)
    c = compare(Slow(4), Slow(1), torch.ones(3, 2), runs=4, devices='cpu')
    assert c.before.seconds == {'cpu': (4., 4., 4., 4.)} and c.after.seconds == {'cpu': (1., 1., 1., 1.)}
    assert c.speedup() == (4., 4., 4.) and 'Measured: 4.00× on cpu (4.00–4.00).' in c.expect
    turns = clock.calls[-8:]
    # each in every round; who is first changes
    assert all(sorted(turns[i:i+2]) == [1, 4] for i in range(0, 8, 2)) and turns[0] != turns[2]
    assert len(clock.calls) >= 2*(3 + 4)
    assert '4000.00 ms (4000.00–4000.00)' in str(c)

def test_median_and_range():
    cost = dict(params=1, weights=1, zeros=0, multiply_adds=1, activations=1, file=1, layers={})
    c = Comparison(Cost(**cost, seconds={'cpu': (2., 9., 4.)}), Cost(**cost, seconds={'cpu': (1., 1., 1.)}), 1, 1)
    assert c.speedup() == (4., 2., 9.)
    costs = c.to_pandas('costs').set_index('cost').loc['Latency, cpu']
    assert (costs.before, costs.after, costs.ratio) == (4., 1., 4.)

def test_speedup_names_what_was_measured():
    net = two_convs()
    c   = compare(net, net, images(), 1, 'cpu')
    with pytest.raises(ValueError, match=r"Not measured on 'cuda', only on \['cpu'\]"): c.speedup('cuda')

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_on_a_gpu():
    net, x = two_convs(), images()
    for net, x in ((net, x), (net.cuda(), x.cuda())):
        c = compare(net, thin(without_a_filter(net), example_inputs=x), x)
        assert {*c.before.seconds} == {'cpu', 'cuda'} and all(s > 0 for s in c.after.seconds['cuda'])
        assert c.before.multiply_adds == 864 and next(net.parameters()).device == x.device


# -- the models stay as they are -------------------------------------------------------------------
class Draws(nn.Module):
    "Draws random numbers of all kinds and counts its calls"
    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.calls = nn.Linear(3, 3), nn.BatchNorm1d(3), 0
        self.register_buffer('seen', torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        return self.norm(self.layer(x)) + torch.rand(()) + random.random() + np.random.rand()

def test_untouched():
    net, other, x = Draws(), Draws().eval(), torch.randn(4, 3)
    net.layer.eval()
    net(x).sum().backward()
    state, grad = copy.deepcopy(net.state_dict()), net.layer.weight.grad.clone()
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    compare(net, other, x, runs=2)
    assert torch.equal(drawn[0], torch.get_rng_state())
    assert drawn[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert (net.training, net.layer.training, other.training, net.calls) == (True, False, False, 1)
    assert all(torch.equal(v, state[k]) for k,v in net.state_dict().items())
    assert torch.equal(net.layer.weight.grad, grad)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*net.modules(), *other.modules()))


# -- other models ----------------------------------------------------------------------------------
class Two(nn.Module):
    "Two inputs, the second by name, and work in functions"
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 6)
    def forward(self, x, scale=None):
        y = F.relu(self.a(x))
        return {'out': (y @ y.mT) * scale}

@pytest.mark.parametrize('inputs', [dict(x=torch.randn(3, 5, 4), scale=torch.ones(3, 1, 1)),
                                    (torch.randn(3, 5, 4), torch.ones(3, 1, 1)),
                                    [torch.randn(3, 5, 4), torch.ones(3, 1, 1)]], ids=['dict', 'tuple', 'list'])
def test_arguments_and_functions(inputs):
    "Products outside of layers count too: 5×4×6 in the layer, 5×6×5 after it"
    c = compare(Two(), Two(), inputs, runs=1, devices='cpu')
    assert (c.before.multiply_adds, c.before.layers['a'].multiply_adds,
            c.before.activations) == (5*4*6 + 5*6*5, 5*4*6, 3*5*6*4)

def test_attention_without_heads():
    layer, x = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True).eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        for t in (*layer.self_attn.in_proj_weight.chunk(3), *layer.self_attn.in_proj_bias.chunk(3)): t[:4] = 0
        layer.linear1.weight[::2], layer.linear1.bias[::2] = 0, 0
    c = counted(layer, thin(layer, example_inputs=x), x)
    assert [(l.inputs, l.outputs) for l in c.layers['self_attn']] == [(8, 8), (8, 8)]
    assert [(l.inputs, l.outputs) for l in c.layers['self_attn.out_proj']] == [(8, 8), (4, 8)]
    assert [(l.inputs, l.outputs) for l in c.layers['linear1']] == [(8, 16), (8, 8)]
    assert c.after.params < c.before.params and c.after.multiply_adds < c.before.multiply_adds

@pytest.mark.parametrize('layer, x, ends', [
    (nn.Embedding(7, 3), torch.tensor([[1, 2]]), (7, 3)), (nn.LSTM(4, 5), torch.randn(2, 1, 4), (4, 5)),
    (nn.ConvTranspose1d(2, 6, 3), torch.randn(1, 2, 8), (2, 6)),
    (nn.Conv1d(4, 8, 1, groups=2), torch.randn(1, 4, 8), (4, 8))])
def test_layers_by_themselves(layer, x, ends):
    c = counted(layer, layer, x)
    assert [(l.inputs, l.outputs) for l in c.layers['']] == [ends]*2 and 'the model' in str(c)

def test_shared_weights_count_once():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    c = counted(net, net, torch.randn(1, 4)).before
    assert (c.params, c.weights, c.multiply_adds) == (16, 16, 32)

def test_without_parameters():
    c = compare(nn.ReLU(), nn.ReLU(), torch.randn(2, 3), runs=1)
    assert (c.before.params, c.before.activations) == (0, 24)
    assert str(c) and c._repr_html_() and len(c.plot()) == 2 and c.to_pandas().empty


# -- as text, table, picture -----------------------------------------------------------------------
def test_shown():
    net, x = two_convs(), images()
    c = compare(net, thin(without_a_filter(net), example_inputs=x), x, runs=2, devices='cpu')
    text = str(c)
    assert repr(c) == text and c.expect in text and 'batch of 2' in text
    rows = {l[:13].strip(): l[13:].split() for l in text.splitlines()[:-1]}
    assert rows['Parameters'] == ['120', '90', '1.33×'] and rows['Multiply-adds'] == ['864', '648', '1.33×']
    assert rows['0      Conv2d'] == '1 → 4 1 → 3 40 30'.split()
    html = c._repr_html_()
    assert html.count('<tr>') == 1 + 6 + 1 + 2 and '4 → 2</td>' in html and '75.00%' in html
    df = c.to_pandas()
    assert df.shape == (2, 12) and df.outputs_after.tolist() == [3, 2]
    assert df.multiply_adds_before.tolist() == [576, 288]
    assert c.to_pandas('costs').cost.tolist() == ['Parameters', 'Zero weights', 'Multiply-adds', 'Activations',
                                                  'File', 'Latency, cpu']
    assert pickle.loads(pickle.dumps(c)) == c

def test_plot():
    net, x = two_convs(), images()
    c = counted(net, thin(without_a_filter(net), example_inputs=x), x)
    left, right = c.plot()
    assert [b.get_width() for b in right.patches] == [4, 2, 3, 2]
    assert left.patches[4].get_width() == pytest.approx(75)
    assert [t.get_text() for t in left.get_yticklabels()][0] == 'Parameters'
    axes = matplotlib.pyplot.subplots(1, 2)[1]
    assert c.plot(axes) is axes
    matplotlib.pyplot.close('all')


# -- refused ---------------------------------------------------------------------------------------
@pytest.mark.parametrize('kwargs, error, says', [
    (dict(before='net'), TypeError, '`nn.Module`, got str'),
    (dict(after=nn.Linear(7, 7)), ValueError, '`after` does not run on `example_inputs`: RuntimeError'),
    (dict(before=nn.Linear(7, 7)), ValueError, '`before` does not run on `example_inputs`: RuntimeError'),
    (dict(example_inputs=None), ValueError, 'there is no tensor in it'),
    (dict(example_inputs=torch.tensor(1.)), ValueError, 'there is no tensor in it'),
    (dict(example_inputs=torch.empty(0, 1, 6, 6)), ValueError, 'there is no tensor in it'),
    (dict(runs=0), ValueError, 'from 1, got 0'), (dict(runs=2.5), ValueError, 'got 2.5'),
    (dict(runs=True), ValueError, 'got True'),
    (dict(devices='meta'), ValueError, "can be cpu and cuda, got 'meta'"),
    (dict(devices=['cpu', 'gpu']), ValueError, "can be cpu and cuda, got 'gpu'"),
    (dict(devices=[0.5]), ValueError, 'can be cpu and cuda, got 0.5'),
    (dict(after=nn.LazyLinear(3)), ValueError, 'parameters without a shape')])
def test_refused(kwargs, error, says):
    net = two_convs()
    with pytest.raises(error) as e: compare(**{**dict(before=net, after=net, example_inputs=images()), **kwargs})
    assert says in str(e.value)

def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', bool)
    net = two_convs()
    with pytest.raises(ValueError, match='no GPU to measure on'): compare(net, net, images(), devices='cuda')

def test_what_to_pandas():
    net = two_convs()
    with pytest.raises(ValueError, match="'layers' or 'costs', got 'all'"): counted(net, net, images()).to_pandas('all')
