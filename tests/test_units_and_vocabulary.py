"Units of recurrent layers and rows of vocabularies: what was only masked can be removed, exactly"
import copy, pickle

import pytest, torch, torch.nn as nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from fasterai_clone.prune.all import coupled_groups, load_thinned, reshape_to, save_thinned, sizes_of, thin
from fasterai_clone.prune.vocabulary import Vocabulary, thin_vocabulary, used_ids
from fasterai_clone.sparse.sparsifier import Sparsifier

RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)


class Net(nn.Module):
    "Modules by name, and a function that runs them"
    def __init__(self, forward, **modules):
        super().__init__()
        self.f = forward
        for k,m in modules.items(): setattr(self, k, m)
    def forward(self, *args): return self.f(self, *args)

def steps(n=3, length=5, size=4, seed=0):
    return torch.randn(n, length, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def made(forward, seed=1, **modules):
    torch.manual_seed(seed)
    net = Net(forward, **modules).double().eval()
    with torch.no_grad():
        for p in net.parameters(): p.normal_(std=0.5)
    return net

def outputs(model, *args):
    with torch.no_grad(): out = model(*args)
    return list(out) if isinstance(out, (tuple, list)) else [out]

def equal(a, b, *args):
    "Both models give the same, to rounding in fp64"
    for x,y in zip(outputs(a, *args), outputs(b, *args), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)

def removed(net, *args, layer_type=(nn.RNNBase, nn.RNNCellBase), sparsity=50, granularity='unit', **kwargs):
    "`net` with units zeroed together, and the thinned copy that gives the same"
    Sparsifier(net, granularity, layer_type=layer_type, coupled=True, example_inputs=args,
               **kwargs).sparsify_model(sparsity)
    small = thin(net, None, args)
    equal(net, small, *args)
    return small

def zero_units(m, units):
    "Zero the rows of `units` in each gate of all weights and biases of the recurrent layer `m`"
    with torch.no_grad():
        for k,p in m.named_parameters():
            if not k.startswith('weight_hr'): p.reshape(-1, m.hidden_size, *p.shape[1:])[:, units] = 0


# One recurrent layer

@pytest.mark.parametrize('kind', RECURRENT)
@pytest.mark.parametrize('bias', [True, False])
def test_a_unit_of_zeros_stays_at_zero(kind, bias):
    "The law behind it: candidate state tanh(0), scaled by gates of one half"
    m = kind(4, 6, bias=bias, batch_first=True).double()
    zero_units(m, [1, 4])
    out, state = m(steps())
    for t in (out, *(state if isinstance(state, tuple) else [state])):
        assert not t[..., [1, 4]].any() and t[..., [0, 2, 3, 5]].all()

@pytest.mark.parametrize('kind', [*RECURRENT, lambda *a, **k: nn.RNN(*a, nonlinearity='relu', **k)])
@pytest.mark.parametrize('layers, both', [(1, False), (1, True), (2, False), (3, True)])
@pytest.mark.parametrize('bias, first', [(True, True), (False, False)])
def test_half_of_the_units(kind, layers, both, bias, first):
    width = 6*(1 + both)
    net   = made(lambda m, x: m.out(m.rnn(x)[0]),
                 rnn=kind(4, 6, layers, bias=bias, batch_first=first, bidirectional=both), out=nn.Linear(width, 2))
    small = removed(net, steps())
    assert small.rnn.hidden_size == 3 and small.rnn.input_size == 4 and small.out.in_features == width//2
    assert net.rnn.hidden_size == 6
    gates = dict(LSTM=4, GRU=3).get(small.rnn.mode, 1)
    assert small.rnn.weight_hh_l0.shape == (3*gates, 3) and small.rnn.weight_ih_l0.shape == (3*gates, 4)
    if layers > 1: assert small.rnn.weight_ih_l1.shape == (3*gates, width//2)

def test_the_input_of_the_issue():
    "16 units, 8 of them zero: 8 are left, and the outputs are equal"
    net = made(lambda m, x: m.o(m.lstm(x)[0][:, -1]), lstm=nn.LSTM(8, 16, batch_first=True), o=nn.Linear(16, 3))
    Sparsifier(net, 'unit', layer_type=nn.LSTM).sparsify_model(50)
    small = thin(net, None, steps(size=8))
    assert small.lstm.hidden_size == 8 and small.o.in_features == 8
    equal(net, small, steps(size=8))

@pytest.mark.parametrize('kind', RECURRENT)
def test_inputs_and_units_at_once(kind):
    net = made(lambda m, x: m.out(m.rnn(m.a(x).relu())[0]), a=nn.Linear(4, 6), rnn=kind(6, 8, batch_first=True),
               out=nn.Linear(8, 2))
    zero_units(net.rnn, [0, 7])
    with torch.no_grad(): net.a.weight[[1, 2]], net.a.bias[[1, 2]] = 0, 0
    small = thin(net, None, steps())
    assert (small.a.out_features, small.rnn.input_size, small.rnn.hidden_size, small.out.in_features) == (4, 4, 6, 6)
    equal(net, small, steps())

@pytest.mark.parametrize('last', [lambda m, x: m.out(m.rnn(x)[0][:, -1]), lambda m, x: m.out(m.rnn(x)[1][-1]),
                                  lambda m, x: m.out(m.rnn(x)[0].mean(1)),
                                  lambda m, x: m.out(m.rnn(x)[0].amax(1)),
                                  lambda m, x: m.out(m.rnn(x)[1].transpose(0, 1)[:, -1])])
def test_what_is_read_of_it(last):
    net = made(last, rnn=nn.GRU(4, 6, 2, batch_first=True), out=nn.Linear(6, 2))
    assert removed(net, steps()).rnn.hidden_size == 3

def test_the_last_states_of_both_directions():
    net = made(lambda m, x: m.out(torch.cat([*m.rnn(x)[1][0], *m.rnn(x)[1][1]], -1)),
               rnn=nn.LSTM(4, 6, batch_first=True, bidirectional=True), out=nn.Linear(24, 2))
    small = removed(net, steps())
    assert small.rnn.hidden_size == 3 and small.out.in_features == 12

@pytest.mark.filterwarnings('ignore:.* units of')
def test_a_unit_goes_only_if_all_layers_have_lost_it():
    "One `hidden_size` holds for the module: here unit 0 is zero in both layers, 1 and 2 in one of them"
    net = made(lambda m, x: m.out(m.rnn(x)[0]), rnn=nn.LSTM(4, 6, 2, batch_first=True), out=nn.Linear(6, 2))
    with torch.no_grad():
        for k,p in net.rnn.named_parameters():
            p.reshape(4, 6, *p.shape[1:])[:, [0, 1] if k.endswith('l0') else [0, 2]] = 0
    small = thin(net, None, steps())
    assert small.rnn.hidden_size == 5
    equal(net, small, steps())

@pytest.mark.filterwarnings('ignore:.* units of')
def test_never_all_units():
    net = made(lambda m, x: m.out(m.rnn(x)[0]), rnn=nn.GRU(4, 3, batch_first=True), out=nn.Linear(3, 2))
    zero_units(net.rnn, [0, 1, 2])
    small = thin(net, None, steps())
    assert small.rnn.hidden_size == 1
    equal(net, small, steps())
    assert thin(made(net.f, rnn=nn.LSTM(4, 1, batch_first=True), out=nn.Linear(1, 2)), None,
                steps()).rnn.hidden_size == 1


# Several

def test_stacked_modules_of_different_widths():
    net = made(lambda m, x: m.out(m.c(m.b(m.a(x)[0])[0])[0]), a=nn.LSTM(4, 8, batch_first=True, bidirectional=True),
               b=nn.GRU(16, 6, 2, batch_first=True), c=nn.RNN(6, 4, batch_first=True), out=nn.Linear(4, 2))
    small = removed(net, steps())
    assert [m.hidden_size for m in (small.a, small.b, small.c)] == [4, 3, 2]
    assert [m.input_size for m in (small.b, small.c)] == [8, 3]

@pytest.mark.parametrize('kind', RECURRENT)
def test_an_encoder_hands_its_state_on(kind):
    "What the decoder starts from is what the encoder ends with: the same units"
    def forward(m, x, y): return m.out(m.dec(y, m.enc(x)[1])[0])
    net   = made(forward, enc=kind(4, 6, 2, batch_first=True), dec=kind(5, 6, 2, batch_first=True), out=nn.Linear(6, 3))
    small = removed(net, steps(), steps(size=5, length=4))
    assert small.enc.hidden_size == small.dec.hidden_size == 3

def test_attention_over_the_outputs():
    "Additive attention, as of a translator: units of the encoder are read by `keys`, weighted and read by `out`"
    def forward(m, x, y):
        seen, state = m.enc(x)
        asks  = m.dec(y, state)[0]
        found = m.score((m.keys(seen)[:, None] + m.queries(asks)[:, :, None]).tanh()).squeeze(-1).softmax(-1) @ seen
        return m.out(torch.cat([asks, found], -1))
    net   = made(forward, enc=nn.GRU(4, 6, batch_first=True), dec=nn.GRU(5, 6, batch_first=True), keys=nn.Linear(6, 4),
                 queries=nn.Linear(6, 4), score=nn.Linear(4, 1), out=nn.Linear(12, 3))
    small = removed(net, steps(), steps(size=5, length=4))
    assert small.enc.hidden_size == small.keys.in_features == 3 and small.out.in_features == 6

@pytest.mark.parametrize('kind', RECURRENT)
@pytest.mark.parametrize('both', [False, True])
@pytest.mark.parametrize('ordered', [False, True])
def test_packed_sequences(kind, both, ordered):
    def forward(m, x):
        packed = pack_padded_sequence(m.a(x).relu(), [5, 3, 2] if ordered else [2, 5, 3], batch_first=True,
                                      enforce_sorted=ordered)
        out, state = m.rnn(packed)
        h = state[0] if isinstance(state, tuple) else state
        return m.out(pad_packed_sequence(out, batch_first=True)[0]), m.last(h[-1]), m.out(m.rnn(packed)[0].data)
    net   = made(forward, a=nn.Linear(4, 6), rnn=kind(6, 8, 2, bidirectional=both, batch_first=True),
                 out=nn.Linear(8*(1 + both), 2), last=nn.Linear(8, 2))
    small = removed(net, steps(), granularity='unit')
    assert small.rnn.hidden_size == small.last.in_features == 4
    with torch.no_grad(): net.a.weight[0], net.a.bias[0] = 0, 0
    assert thin(net, None, steps()).rnn.input_size == 5

def test_padding_that_is_not_zero():
    "What is padded with ones is no zero unit: it stays"
    def forward(m, x):
        return m.out(pad_packed_sequence(m.rnn(pack_padded_sequence(x, [5, 3, 2], batch_first=True))[0],
                                         padding_value=1.)[0])
    net = made(forward, rnn=nn.GRU(4, 6), out=nn.Linear(6, 2))
    zero_units(net.rnn, [2])
    assert thin(net, None, steps()).rnn.hidden_size == 6


# What it starts from

class Learned(nn.Module):
    "It learns what its LSTM starts from"
    def __init__(self, layers=1, batch=False):
        super().__init__()
        self.rnn, self.out = nn.LSTM(4, 6, layers, batch_first=True), nn.Linear(6, 2)
        self.h, self.c = (nn.Parameter(torch.randn(layers, 1, 6)) for _ in 'hc')
    def forward(self, x):
        return self.out(self.rnn(x, tuple(t.expand(-1, len(x), -1).contiguous() for t in (self.h, self.c)))[0])

@pytest.mark.parametrize('layers', [1, 2])
def test_a_learned_state_goes_too(layers):
    net   = Learned(layers).double().eval()
    small = removed(net, steps())
    assert small.h.shape == small.c.shape == (layers, 1, 3) and small.rnn.hidden_size == 3
    loaded = load_thinned(lambda: Learned(layers).double(), io_file(small)).eval()
    equal(small, loaded, steps())

def test_a_learned_state_that_is_not_zero_keeps_its_unit():
    net = Learned().double().eval()
    zero_units(net.rnn, [0, 1])
    with torch.no_grad(): net.h[..., :2], net.c[..., 0] = 0, 0
    assert thin(net, None, steps()).rnn.hidden_size == 5

@pytest.mark.parametrize('start, left', [
    (lambda m, x: x.new_zeros(1, len(x), m.rnn.hidden_size), 3),
    (lambda m, x: torch.zeros((1, 1, m.rnn.hidden_size), dtype=x.dtype).expand(-1, len(x), -1).contiguous(), 3),
    (lambda m, x: x.new_zeros(1, len(x), 6), 6),
    (lambda m, x: torch.ones(1, len(x), m.rnn.hidden_size, dtype=x.dtype), 6),
    (lambda m, x: m.first(x[:, 0]).tanh()[None], 6)])
def test_where_the_state_comes_from(start, left):
    "Zeros of the layer's own size are fine; other numbers, and other sizes, are not those of a unit that can go"
    net = made(lambda m, x: m.out(m.rnn(x, start(m, x))[0]), rnn=nn.GRU(4, 6, batch_first=True), first=nn.Linear(4, 6),
               out=nn.Linear(6, 2))
    zero_units(net.rnn, [0, 2, 4])
    small = thin(net, None, steps())
    assert small.rnn.hidden_size == left and type(net.rnn.hidden_size) is type(small.rnn.hidden_size) is int
    equal(net, small, steps())

def test_the_size_that_a_tutorial_writes_down():
    "`torch.zeros(layers, batch, self.size)`: said before anything is trained, with what to do"
    net = made(lambda m, x: m.out(m.rnn(x, (x.new_zeros(2, len(x), 6), x.new_zeros(2, len(x), 6)))[0]),
               rnn=nn.LSTM(4, 6, 2, batch_first=True), out=nn.Linear(6, 2))
    with pytest.raises(ValueError, match='`rnn` .LSTM. starts from a state of a fixed size.*`hidden_size`'):
        Sparsifier(net, 'unit', layer_type=nn.LSTM, coupled=True, example_inputs=steps())

def test_a_cell_state_like_the_hidden_state():
    net = made(lambda m, x: m.out(m.rnn(x, (h := m.first(x[:, 0])[None], torch.zeros_like(h)))[0]),
               rnn=nn.LSTM(4, 6, batch_first=True), first=nn.Linear(4, 6), out=nn.Linear(6, 2))
    zero_units(net.rnn, [5])
    with torch.no_grad(): net.first.weight[5], net.first.bias[5] = 0, 0
    small = thin(net, None, steps())
    assert small.first.out_features == small.rnn.hidden_size == 5
    equal(net, small, steps())

def test_the_language_model_of_fastai_keeps_its_state():
    """It remembers the state of the last run, of sizes that it writes down: its units stay, and `thin` goes on with the
    rest"""
    from fastai.text.models.awdlstm import AWD_LSTM
    net = AWD_LSTM(11, 4, 6, 2).double().eval()
    x   = torch.randint(11, (3, 5))
    net.reset(), outputs(net, x[:1])
    with torch.no_grad():
        for k,p in net.rnns[0].named_parameters(): p.reshape(4, 6, *p.shape[1:])[:, [0, 3]] = 0
    small = thin(net, None, x)
    assert small.rnns[0].module.hidden_size == 6
    net.reset(), small.reset()
    equal(net, small, x)

def test_a_state_that_a_layer_makes():
    "An image captioner: the rows of that layer are those of the units"
    net = made(lambda m, x: m.out(m.rnn(x, m.first(x[:, 0]).tanh()[None])[0]), rnn=nn.GRU(4, 6, batch_first=True),
               first=nn.Linear(4, 6), out=nn.Linear(6, 2))
    zero_units(net.rnn, [0, 2])
    with torch.no_grad(): net.first.weight[[0, 2]], net.first.bias[[0, 2]] = 0, 0
    small = thin(net, None, steps())
    assert small.first.out_features == small.rnn.hidden_size == 4
    equal(net, small, steps())

def test_a_state_from_outside_fixes_the_units():
    "It has a size that the caller knows"
    net = made(lambda m, x, h: m.out(m.rnn(x, h)[0]), rnn=nn.GRU(4, 6, batch_first=True), out=nn.Linear(6, 2))
    zero_units(net.rnn, [0])
    args = steps(), torch.zeros(1, 3, 6, dtype=torch.float64)
    assert thin(net, None, args).rnn.hidden_size == 6
    with pytest.raises(ValueError, match='starts from a state of a fixed size'):
        Sparsifier(net, 'unit', layer_type=nn.GRU, coupled=True, example_inputs=args)

def test_units_that_leave_the_model_stay():
    net = made(lambda m, x: m.rnn(x), rnn=nn.LSTM(4, 6, batch_first=True))
    assert 'output of the model' in coupled_groups(net, steps())[0].why_not
    net = made(lambda m, x: (m.out(m.rnn(x)[0]), m.rnn(x)[1]), rnn=nn.GRU(4, 6, batch_first=True), out=nn.Linear(6, 2))
    zero_units(net.rnn, [0])
    assert thin(net, None, steps()).rnn.hidden_size == 6

def test_a_projection_keeps_its_units():
    net = made(lambda m, x: m.out(m.rnn(m.a(x))[0]), a=nn.Linear(4, 5),
               rnn=nn.LSTM(5, 6, proj_size=3, batch_first=True), out=nn.Linear(3, 2))
    zero_units(net.rnn, [0])
    with torch.no_grad(): net.a.weight[1], net.a.bias[1] = 0, 0
    small = thin(net, None, steps())
    assert (small.rnn.input_size, small.rnn.hidden_size, small.rnn.proj_size) == (4, 6, 3)
    equal(net, small, steps())
    assert any('projects its units' in (g.why_not or '') for g in coupled_groups(net, steps()))


# Cells, and layers that are not called as they are

@pytest.mark.parametrize('cell', [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize('given', [True, False])
def test_cells(cell, given):
    "A loop of the model's own, from zeros of its own or none"
    def forward(m, x):
        state = None
        if given:
            state = x.new_zeros(len(x), m.cell.hidden_size)
            if cell is nn.LSTMCell: state = state, state
        for t in range(x.shape[1]): state = m.cell(m.a(x[:, t]).relu(), state)
        return m.out(state[0] if cell is nn.LSTMCell else state)
    net   = made(forward, a=nn.Linear(4, 5), cell=cell(5, 6), out=nn.Linear(6, 2))
    zero_units(net.cell, [1, 2])
    with torch.no_grad(): net.a.weight[0], net.a.bias[0] = 0, 0
    small = thin(net, None, steps())
    assert (small.cell.hidden_size, small.cell.input_size, small.out.in_features) == (4, 4, 4)
    equal(net, small, steps())

class Doubling(nn.LSTM):
    "A subclass may do more than its base"
    def forward(self, x):
        out, _ = super().forward(x)
        return out.cos()

def test_a_subclass_with_its_own_forward():
    "cos(0) is not 0: the units stay"
    net = made(lambda m, x: m.out(m.rnn(x)), rnn=Doubling(4, 6, batch_first=True), out=nn.Linear(6, 2))
    zero_units(net.rnn, [0])
    assert thin(net, None, steps()).rnn.hidden_size == 6

def test_a_hook_on_the_layer():
    net = made(lambda m, x: m.out(m.rnn(x)[0]), rnn=nn.GRU(4, 6, batch_first=True), out=nn.Linear(6, 2))
    zero_units(net.rnn, [0])
    handle = net.rnn.register_forward_hook(lambda m, args, out: (out[0] + 1, out[1]))
    assert thin(net, None, steps()).rnn.hidden_size == 6
    handle.remove()
    assert thin(net, None, steps()).rnn.hidden_size == 5

def test_a_layer_that_is_called_twice():
    net = made(lambda m, x: m.out(m.rnn(m.rnn(m.a(x))[0])[0]), a=nn.Linear(4, 6), rnn=nn.GRU(6, 6, batch_first=True),
               out=nn.Linear(6, 2))
    zero_units(net.rnn, [0])
    with torch.no_grad(): net.a.weight[0], net.a.bias[0] = 0, 0
    small = thin(net, None, steps())
    assert small.rnn.hidden_size == small.rnn.input_size == small.a.out_features == 5
    equal(net, small, steps())

def test_weight_dropout_of_fastai():
    "The weight is a copy that its owner makes of `weight_hh_l0_raw` in each run"
    from fastai.text.models.awdlstm import WeightDropout
    net = made(lambda m, x: m.out(m.rnn(x)[0]), rnn=WeightDropout(nn.LSTM(4, 6, batch_first=True), 0.5),
               out=nn.Linear(6, 2))
    outputs(net, steps())  # before its first run it cannot be copied
    with torch.no_grad():
        for p in net.rnn.parameters(): p.reshape(4, 6, *p.shape[1:])[:, [0, 3]] = 0
    small = thin(net, None, steps())
    assert small.rnn.module.hidden_size == 4 and small.rnn.weight_hh_l0_raw.shape == (16, 4)
    equal(net, small, steps())
    small.train()(steps()).sum().backward()

def test_a_sequencer_of_timm():
    "A network of LSTMs in two directions over both axes of an image"
    timm = pytest.importorskip('timm')
    net  = timm.create_model('sequencer2d_s', layers=[1, 1], patch_sizes=[7, 1], embed_dims=[12, 16],
                             hidden_sizes=[4, 6], mlp_ratios=[2, 2], num_classes=3).double().eval()
    x    = torch.randn(2, 3, 21, 21, dtype=torch.float64)
    small = removed(net, x)
    sizes = [m.hidden_size for m in small.modules() if isinstance(m, nn.LSTM)]
    assert sizes == [2, 2, 3, 3]


# What a smaller layer has to go on doing

def io_file(model): return save_thinned(model, 'small')  # each test has a folder of its own

@pytest.mark.parametrize('kind', RECURRENT)
def test_files_copies_scripts_and_training(kind):
    def build(): return Taps(kind)
    torch.manual_seed(0)
    net   = build().double().eval()
    small = removed(net, steps())
    for m in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)),
              load_thinned(lambda: build().double(), io_file(small)).eval(),
              torch.jit.script(small), torch.jit.trace(small, steps())):
        equal(small, m, steps())
    fresh = reshape_to(build().double(), sizes_of(small)).eval()
    fresh.load_state_dict(small.state_dict())
    equal(small, fresh, steps())
    assert fresh.rnn.hidden_size == 3 and all(a is b for a,b in zip(fresh.rnn._flat_weights, fresh.rnn.parameters()))
    opt = torch.optim.SGD(small.train().parameters(), 0.1)
    before = small.rnn.weight_hh_l0.detach().clone()
    small(steps()).sum().backward()
    opt.step()
    assert not torch.equal(before, small.rnn.weight_hh_l0)
    assert all(a is b for a,b in zip(small.rnn._flat_weights, small.rnn.parameters()))

class Taps(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.rnn, self.out = kind(4, 6, 2, batch_first=True, bidirectional=True), nn.Linear(12, 2)
    def forward(self, x): return self.out(self.rnn(x)[0])

def test_files_of_earlier_versions():
    "They have no `hidden_size`"
    sizes = sizes_of(Taps())
    del sizes['modules']['rnn']['hidden_size']
    assert reshape_to(Taps(), sizes).rnn.hidden_size == 6


# Sparsifier

def test_one_target_for_the_units_of_a_module():
    "2 layers × 2 directions drop the same 2 of 6 units"
    net = Taps().double()
    sp  = Sparsifier(net, 'unit', layer_type=nn.LSTM, coupled=True, example_inputs=steps())
    assert len(sp.targets) == 1 and sp.targets[0].groups.n == 6
    sp.sparsify_model(40)
    dead = [(p.reshape(4, 6, -1) == 0).all(2).all(0) for p in net.rnn.parameters()]
    assert all(torch.equal(d, dead[0]) and d.sum() == 2 for d in dead)
    assert not (net.out.weight == 0).any()

def test_units_of_all_layers_share_a_budget():
    net = made(lambda m, x: m.out(m.b(m.a(x)[0])[0]), a=nn.LSTM(4, 8, batch_first=True),
               b=nn.GRU(8, 8, batch_first=True), out=nn.Linear(8, 2))
    with torch.no_grad():
        for p in net.b.parameters(): p.mul_(0.01)
    small = removed(net, steps(), sparsity=25, context='global')
    assert (small.a.hidden_size, small.b.hidden_size) == (8, 4)


# Vocabularies

def logits_agree(net, small, words, ids, **kwargs):
    "Logits of the tokens that are kept, in fp64"
    net, small = (copy.deepcopy(m).double().eval() for m in (net, small))
    with torch.no_grad(): a, b = net(ids, **kwargs), small(words.encode(ids), **kwargs)
    a, b = (getattr(o, 'logits', o) for o in (a, b))
    a, b = (o[0] if isinstance(o, tuple) else o for o in (a, b))
    torch.testing.assert_close(b, a[..., words.kept], rtol=1e-10, atol=1e-12)

def language_model(tied=True, bias=True, **kwargs):
    torch.manual_seed(0)
    net = made(lambda m, x: m.head(m.hidden(m.embed(x)).tanh()), embed=nn.Embedding(10, 4, **kwargs),
               hidden=nn.Linear(4, 4), head=nn.Linear(4, 10, bias=bias))
    if tied: net.head.weight = net.embed.weight
    return net

USED = torch.tensor([7, 2, 2, 5, 3])

@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('sparse', [True, False])
def test_a_tied_head(bias, sparse):
    net = language_model(bias=bias, sparse=sparse, padding_idx=4)
    small, words = thin_vocabulary(net, USED)
    assert words.kept.tolist() == [2, 3, 4, 5, 7] and words.n == 10
    assert small.head.weight is small.embed.weight and small.embed.weight.shape == (5, 4)
    assert small.embed.sparse is sparse
    assert (small.embed.num_embeddings, small.embed.padding_idx, small.head.out_features) == (5, 2, 5)
    assert torch.equal(small.embed.weight, net.embed.weight[[2, 3, 4, 5, 7]]) and net.embed.num_embeddings == 10
    logits_agree(net, small, words, USED[None])
    small(words.encode(USED[None])).sum().backward()
    assert len(small.state_dict()) == len(net.state_dict())

def test_tied_by_memory():
    "Two parameters on one memory stay on one"
    net = language_model(tied=False)
    net.head.weight.data = net.embed.weight.data
    small, words = thin_vocabulary(net, USED)
    assert small.head.weight.data_ptr() == small.embed.weight.data_ptr() and small.head.out_features == 4
    logits_agree(net, small, words, USED[None])

def test_a_head_of_its_own_is_named():
    net = language_model(tied=False)
    small, words = thin_vocabulary(net, USED)
    # its outputs are classes, for all it knows
    assert small.head.out_features == 10 and small.embed.num_embeddings == 4
    small, words = thin_vocabulary(net, USED, output='head', keep=[0, 9])
    assert words.kept.tolist() == [0, 2, 3, 5, 7, 9] and small.head.out_features == len(small.head.bias) == 6
    logits_agree(net, small, words, USED[None])

def test_two_embeddings_of_one_vocabulary():
    "A translator between two spellings"
    net = made(lambda m, x, y: m.head(m.a(x) + m.b(y)), a=nn.Embedding(10, 4), b=nn.Embedding(10, 4, padding_idx=0),
               head=nn.Linear(4, 10))
    with pytest.raises(ValueError, match=r"'a' \(10 rows\), 'b' \(10 rows\).*`embedding`"): thin_vocabulary(net, USED)
    args = torch.tensor([[2, 3]]), torch.tensor([[5, 7]])
    small, words = thin_vocabulary(net, USED, embedding=['a', 'b'], output='head', example_inputs=args)
    assert words.kept.tolist() == [0, 2, 3, 5, 7] and small.a.num_embeddings == small.b.num_embeddings == 5
    torch.testing.assert_close(small(*map(words.encode, args)), net(*args)[..., words.kept])

@pytest.mark.parametrize('kwargs', [dict(mode='mean'), dict(mode='sum', padding_idx=3), dict(mode='max', max_norm=1.)])
def test_bags_of_words(kwargs):
    net = made(lambda m, ids, offsets: m.out(m.bag(ids, offsets)), bag=nn.EmbeddingBag(10, 4, **kwargs),
               out=nn.Linear(4, 2))
    args = torch.tensor([2, 7, 7, 5, 2]), torch.tensor([0, 3])
    small, words = thin_vocabulary(net, used_ids(args[0]), example_inputs=args)
    assert words.kept.tolist() == ([2, 3, 5, 7] if 'padding_idx' in kwargs else [2, 5, 7])
    assert small.bag.num_embeddings == len(words)
    torch.testing.assert_close(small(words.encode(args[0]), args[1]), net(*args))

def test_rows_that_are_zero_and_unused():
    "After pruning rows, what is not zero stays"
    net = language_model(tied=False)
    Sparsifier(net, 'row', layer_type=nn.Embedding).sparsify_model(60)
    small, words = thin_vocabulary(net, (net.embed.weight != 0).any(1))
    assert len(words) == small.embed.num_embeddings == 4 and (small.embed.weight != 0).any(1).all()

def test_the_map_there_and_back():
    words = Vocabulary(torch.tensor([1, 4, 8]), 9)
    assert words.encode([[8, 1], [4, 4]]).tolist() == [[2, 0], [1, 1]] and words.decode([2, 0]).tolist() == [8, 1]
    assert words.tokens([*'abcdefghi']) == ['b', 'e', 'i'] and len(words) == 3
    assert words.encode([0, 8], unknown=4).tolist() == [1, 2]
    assert pickle.loads(pickle.dumps(words)).encode(4) == 1

@pytest.mark.parametrize('wrong, kind, says', [
    (lambda: thin_vocabulary(language_model(), [10]), ValueError, '`used` must be from 0 to 9; got 10'),
    (lambda: thin_vocabulary(language_model(), [-1]), ValueError, '`used` must be from 0 to 9; got -1'),
    (lambda: thin_vocabulary(language_model(), []), ValueError, '`used` is empty'),
    (lambda: thin_vocabulary(language_model(), [1.5]), TypeError, 'whole numbers'),
    (lambda: thin_vocabulary(language_model(), torch.ones(9, dtype=torch.bool)), ValueError,
     'a bool for each of 10 ids'),
    (lambda: thin_vocabulary(language_model(), [1], keep=[11]), ValueError, '`keep` must be from 0 to 9; got 11'),
    (lambda: thin_vocabulary(language_model(), [1], output='hidden'), ValueError,
     "'hidden' .Linear. must have a weight of its own with 10 rows"),
    (lambda: thin_vocabulary(language_model(), [1], output='haed'), ValueError, "no 'haed'"),
    (lambda: thin_vocabulary(language_model(), [1], embedding='head'), TypeError, 'got Linear'),
    (lambda: thin_vocabulary(nn.Linear(2, 2), [1]), ValueError, 'has no `nn.Embedding`'),
    (lambda: thin_vocabulary(language_model(), [1], example_inputs=torch.tensor([[3]])), ValueError,
     'removed from the vocabulary, such as 3'),
    (lambda: thin_vocabulary(language_model(), [1], example_inputs=torch.randn(2, 4)), ValueError,
     'does not run on `example_inputs`'),
    (lambda: Vocabulary(torch.tensor([1, 4]), 9).encode([4, 5]), ValueError, 'such as 5'),
    (lambda: Vocabulary(torch.tensor([1, 4]), 9).decode(2), ValueError, 'from 0 to 1; got 2'),
    (lambda: used_ids([torch.randn(3)]), TypeError, 'whole numbers'),
    (lambda: used_ids([dict(a=torch.ones(3))]), ValueError, "no entry 'input_ids': it has entries 'a'")])
def test_what_is_refused(wrong, kind, says):
    with pytest.raises(kind, match=says): wrong()

def test_a_model_that_knows_its_tokens_by_number_is_refused():
    net = made(lambda m, x: m.head(m.embed(x)) * (x == 7).unsqueeze(-1), embed=nn.Embedding(10, 4),
               head=nn.Linear(4, 3))
    with pytest.raises(ValueError, match='does not compute the same'):
        thin_vocabulary(net, USED, example_inputs=USED[None])
    assert thin_vocabulary(net, USED, check=False)[0].embed.num_embeddings == 4


# ... of Hugging Face

def hugging(name, **config):
    transformers = pytest.importorskip('transformers')
    small = dict(vocab_size=60, num_hidden_layers=1, num_attention_heads=2, hidden_size=8, intermediate_size=16,
                 pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    return getattr(transformers,
                   f'{name[0]}{name[1]}')(getattr(transformers, f'{name[0]}Config')(**{**small, **config})).eval()

gpt = dict(n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=59, eos_token_id=59, pad_token_id=None)
hf  = dict(llama=(('Llama', 'ForCausalLM'), {}), untied=(('Llama', 'ForCausalLM'), dict(tie_word_embeddings=False)),
           tied=(('Llama', 'ForCausalLM'), dict(tie_word_embeddings=True)),
           gpt2=(('GPT2', 'LMHeadModel'), gpt), bert=(('Bert', 'ForMaskedLM'), {}),
           roberta=(('Roberta', 'ForMaskedLM'), dict(pad_token_id=1, bos_token_id=0)),
           classifier=(('Bert', 'ForSequenceClassification'), {}),
           distil=(('DistilBert', 'ForMaskedLM'), dict(dim=8, n_heads=2, n_layers=1, hidden_dim=16)))

@pytest.mark.parametrize('name', hf)
def test_models_of_hugging_face(name, tmp_path):
    net = hugging(hf[name][0], **hf[name][1])
    ids = torch.tensor([[7, 33, 50, 12]])
    small, words = thin_vocabulary(net, ids.flatten())
    n = small.config.vocab_size
    assert n == len(words) < 9 and net.config.vocab_size == 60 and small.get_input_embeddings().num_embeddings == n
    for k in ('pad_token_id', 'bos_token_id', 'eos_token_id'):
        if (old := getattr(net.config, k)) is not None: assert getattr(small.config, k) == words.encode(old)
    if name != 'classifier':
        tied = net.get_output_embeddings().weight is net.get_input_embeddings().weight
        assert (small.get_output_embeddings().weight is small.get_input_embeddings().weight) == tied
        logits_agree(net, small, words, ids)
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path).eval()
    with torch.no_grad(): assert torch.equal(again(words.encode(ids)).logits, small(words.encode(ids)).logits)
    again.resize_token_embeddings(n + 3)
    assert again.config.vocab_size == n + 3

def test_an_encoder_decoder(tmp_path):
    net = hugging(('Bart', 'ForConditionalGeneration'), d_model=8, encoder_layers=1, decoder_layers=1,
                  encoder_attention_heads=2, decoder_attention_heads=2,
                  encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16, decoder_start_token_id=2,
                  forced_eos_token_id=2)
    with torch.no_grad(): net.final_logits_bias.normal_()
    x = dict(input_ids=torch.tensor([[7, 33]]), decoder_input_ids=torch.tensor([[2, 50]]))
    small, words = thin_vocabulary(net, [7, 33, 50], example_inputs=x)
    assert words.kept.tolist() == [0, 1, 2, 7, 33, 50] and small.final_logits_bias.shape == (1, 6)
    with torch.no_grad(): a, b = net(**x).logits, small(**{k: words.encode(v) for k,v in x.items()}).logits
    torch.testing.assert_close(b, a[..., words.kept], rtol=1e-5, atol=1e-6)

def test_generation():
    "Greedy text of the smaller model is that of the full one, if the full one says nothing else"
    net = hugging(('Llama', 'ForCausalLM'))
    with torch.no_grad(): net.lm_head.weight[[k for k in range(60) if k not in (5, 6, 7, 40)]] = -100
    net = net.double()
    used = [0, 1, 2, 5, 6, 7, 40]
    small, words = thin_vocabulary(net, used)
    start = torch.tensor([[5, 40]])
    with torch.no_grad(): h = net.model(start).last_hidden_state[0, -1]
    best = words.kept[(net.lm_head.weight[words.kept] @ h).argmax()]
    assert words.decode(small.generate(words.encode(start), max_new_tokens=1, do_sample=False))[0, -1] == best


# ... of fastai

def test_a_language_model_of_fastai():
    from fastai.text.models.core import get_language_model
    from fastai.text.models.awdlstm import AWD_LSTM
    torch.manual_seed(0)
    config = dict(emb_sz=6, n_hid=8, n_layers=2, pad_token=1, bidir=False, output_p=0.1, hidden_p=0.1, input_p=0.1,
                  embed_p=0.1, weight_p=0.1, tie_weights=True, out_bias=True)
    net = get_language_model(AWD_LSTM, 30, config=config)
    batches = [(torch.tensor([[9, 12, 20]]), torch.tensor([[12, 20, 28]]))]
    used = used_ids(batches, key=(0, 1))
    assert used.tolist() == [9, 12, 20, 28]
    small, words = thin_vocabulary(net, used, keep=range(9))
    assert len(words) == 13 and small[0].encoder is small[0].encoder_dp.emb and small[0].encoder.num_embeddings == 13
    assert small[1].decoder.weight is small[0].encoder.weight
    assert small[1].decoder.out_features == len(small[1].decoder.bias) == 13
    assert small[0].pad_token == small[0].encoder.padding_idx == 1
    net.reset(), small.reset(), net.eval(), small.eval()
    with torch.no_grad(): a, b = net(batches[0][0])[0], small(words.encode(batches[0][0]))[0]
    torch.testing.assert_close(b, a[..., words.kept])
    small.train()
    small(words.encode(batches[0][0]))[0].sum().backward()


# Units that stay are reported

def test_units_that_stay_are_not_passed_over_in_silence():
    net = made(lambda m, x: m.out(m.rnn(x)[0]), rnn=nn.LSTM(4, 6, 2, batch_first=True), out=nn.Linear(6, 2))
    with torch.no_grad():
        for k,p in net.rnn.named_parameters():
            if k.endswith('l0'): p.reshape(4, 6, *p.shape[1:])[:, [0, 1]] = 0
    with pytest.warns(UserWarning, match='2 of 6 units of rnn.weight_ih_l0 are zero and stay.*coupled=True'):
        thin(net, None, steps())
    net = made(lambda m, x: m.rnn(x)[0], rnn=nn.GRU(4, 6, batch_first=True))
    zero_units(net.rnn, [3])
    with pytest.warns(UserWarning, match='1 of 6 units.*output of the model'): thin(net, None, steps())
