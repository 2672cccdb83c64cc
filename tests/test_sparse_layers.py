"""Sparse layouts: every bit comes back, products are right, and a layer is changed only where the times that were
measured say so. No test depends on real times: they are given"""
import copy, pickle, itertools

import pytest, torch, torch.nn as nn

from fasterai_clone.export.all import LayerTable, sparse_layers, to_dense
from fasterai_clone.export.layer_trials import choose_layout, timed_in_turns
from fasterai_clone.export.layouts import (Compressed, Cut, Lookup, TwoOfFour, layouts_for, pack_two_of_four,
                                           unpack_two_of_four)
from fasterai_clone.export.sparse_modules import SparseEmbedding, SparseLayer, SparseLinear, as_sparse, why_not_sparse
from fasterai_clone.sparse.sparsifier import Sparsifier

def bits(t): return t.detach().contiguous().flatten().view(torch.uint8)

def same_bits(a, b): return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))

def given(**seconds):
    "A function that returns these times instead of measuring; layouts that are not named are ten times slower"
    def measure(jobs, runs, device):
        for f in jobs.values(): f()
        return {k: (seconds.get(k.replace(' ', '_').replace('×', 'x'), 1. if k in ('dense', 'sparse') else 10.),)*runs
                for k in jobs}
    return measure

fast = given(CSR=.5, rows=.5, sparse=.5)

def drop(layer, share, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad(): layer.weight.masked_fill_(torch.rand(layer.weight.shape, generator=g) < share, 0)
    return layer


# Layouts

LAYOUTS = [Compressed(), Compressed(2), Compressed(4), Cut(), Lookup()]

def naive(w, layout):
    "What CSR stores, row by row"
    crow, column, values = [0], [], []
    for row in w.tolist():
        kept = [(i, v) for i,v in enumerate(row) if v]
        column += [i for i,_ in kept]
        values += [v for _,v in kept]
        crow.append(len(column))
    return crow, column, values

def test_csr_by_hand():
    w = torch.tensor([[0., 0, 3], [0, 0, 0], [1, 2, 0]])
    parts = Compressed().pack(w)
    assert (parts['crow'].tolist(), parts['column'].tolist(), parts['values'].tolist()) == (
        [0, 1, 1, 3], [2, 0, 1], [3., 1., 2.]) == naive(w, None)

def test_csr_and_bsr_are_those_of_torch():
    torch.manual_seed(0)
    w = torch.randn(12, 8) * (torch.rand(12, 8) > .7)
    theirs = [(w.to_sparse_csr(), Compressed()), (w.to_sparse_bsr((4, 4)), Compressed(4))]
    for t,layout in theirs:
        parts = layout.pack(w)
        assert torch.equal(t.crow_indices(), parts['crow'].long()) and torch.equal(t.values(), parts['values'])
        assert torch.equal(t.col_indices(), parts['column'].long())

@pytest.mark.parametrize('layout', LAYOUTS, ids=lambda l: l.name)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_every_bit_comes_back(layout, dtype):
    "With all shares of zeros, nothing kept, one row, one column, NaN and infinity"
    g = torch.Generator().manual_seed(0)
    for shape in ((8, 12), (4, 4), (12, 8)):
        for share in (0, .3, .9, 1):
            w = torch.randint(-9, 10, shape, generator=g).to(dtype)
            w[torch.rand(shape, generator=g) < share] = 0
            w[::3], w[:, 1::4] = 0, 0
            if dtype.is_floating_point and share < 1: w[0, 0], w[1, 1], w[1, 2] = float('nan'), float('inf'), -1e-4
            assert same_bits(layout.unpack(layout.pack(w), shape), w)

@pytest.mark.parametrize('share', [0, .5, 1])
def test_products(share):
    torch.manual_seed(0)
    w, x = torch.randn(8, 12).double(), torch.randn(12, 5).double()
    w[torch.rand(8, 12) < share] = 0
    w[3], w[:, 5] = 0, 0
    wanted = torch.tensor([[sum(a*b for a,b in zip(row, column)) for column in x.T.tolist()] for row in w.tolist()])
    torch.testing.assert_close(Cut().product(Cut().pack(w), (8, 12), x), wanted.double())
    for layout in (Compressed(), Compressed(4)):
        try: got = layout.product(layout.pack(w), (8, 12), x)
        except RuntimeError as e: pytest.skip(f'this build of torch has no such product: {e}')
        torch.testing.assert_close(got, wanted.double())

def test_two_of_four_by_hand_and_all_patterns():
    values, places = pack_two_of_four(torch.tensor([[0., 5, 0, 7, 1, 2, 0, 0]]))
    assert values.tolist() == [[5, 7, 1, 2]] and places.tolist() == [[1 + 4*3 + 16*(0 + 4*1)]]
    patterns = [p for p in itertools.product([0., 1.], repeat=4) if sum(p) <= 2]
    w = torch.tensor([[*a, *b] for a in patterns for b in patterns])
    w = w * (1 + torch.arange(w.numel()).reshape(w.shape))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert same_bits(unpack_two_of_four(*pack_two_of_four(w.to(dtype))), w.to(dtype))

def test_two_of_four_as_torch_packs_it():
    "Torch's own conversion, which runs on a CPU, accepts the weights that we would give it, and loses nothing"
    theirs = pytest.importorskip('torch.sparse._semi_structured_conversions')
    torch.manual_seed(0)
    sp = Sparsifier(nn.Sequential(nn.Linear(128, 64).half()), nm='2:4', layer_type=nn.Linear)
    sp.sparsify_model(50)
    w = sp.model[0].weight.detach()
    assert 'CUDA' in TwoOfFour().why_not(w)
    sparse, meta = theirs.sparse_semi_structured_from_dense_cutlass(w)
    assert same_bits(theirs.sparse_semi_structured_to_dense_cutlass(sparse, meta), w)
    assert torch.equal(sparse, pack_two_of_four(w)[0])

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_two_of_four_on_a_gpu():
    layer = nn.Linear(128, 64).half().cuda()
    Sparsifier(nn.Sequential(layer), nm='2:4', layer_type=nn.Linear).sparsify_model(50)
    sparse, x = as_sparse(layer, TwoOfFour()), torch.randn(32, 128).half().cuda()
    assert same_bits(sparse.dense_weight(), layer.weight)
    with torch.no_grad(): torch.testing.assert_close(sparse(x), layer(x), rtol=1e-2, atol=1e-2)

def test_which_layouts_are_worth_a_trial():
    torch.manual_seed(0)
    scattered = torch.randn(64, 64) * (torch.rand(64, 64) > .9)
    squares   = torch.randn(64, 64) * (torch.rand(4, 4) > .5).repeat_interleave(16, 0).repeat_interleave(16, 1)
    rows      = torch.randn(64, 64) * (torch.rand(64, 1) > .5)
    def names(w): return [l.name for l in layouts_for(w)]
    assert names(scattered) == ['CSR'] and names(squares)[:3] == ['CSR', 'BSR 16×16', 'BSR 8×8']
    assert names(rows)[-1] == 'rows and columns' and 'BSR 4×4' not in names(rows)


# Modules

LAYERS = {'linear': (lambda: nn.Linear(12, 8), (5, 12)), 'linear, more axes': (lambda: nn.Linear(12, 8), (2, 3, 12)),
          'linear, no axis': (lambda: nn.Linear(12, 8, bias=False), (12,)),
          'conv1d': (lambda: nn.Conv1d(12, 8, 1), (2, 12, 7)),
          'conv3d': (lambda: nn.Conv3d(12, 8, 1), (2, 12, 2, 3, 2)),
          'conv2d': (lambda: nn.Conv2d(12, 8, 1, stride=(2, 1)), (3, 12, 5, 4)),
          'conv2d, no batch': (lambda: nn.Conv2d(12, 8, 1, bias=False), (12, 5, 4))}

@pytest.mark.parametrize('name', LAYERS)
def test_layers_compute_the_same(name):
    make, shape = LAYERS[name]
    layer, x = drop(make(), .7).double(), torch.randn(shape).double()
    with torch.no_grad(): layer.weight[2] = 0
    wanted = layer(x)
    for layout in (Cut(), Compressed(), Compressed(4)):
        sparse = as_sparse(layer, layout)
        try:
            with torch.no_grad(): got = sparse(x)
        except RuntimeError as e: pytest.skip(f'this build of torch has no such product: {e}')
        torch.testing.assert_close(got, wanted)
        assert got.is_contiguous()
        dense = sparse.to_dense()
        assert type(dense) is type(layer) and same_bits(dense.weight, layer.weight) and dense.bias is layer.bias
        assert repr(dense) == repr(layer) and torch.equal(dense(x), wanted)

def test_negative_zeros_and_flags_come_back():
    layer = drop(nn.Linear(16, 8), .8)
    with torch.no_grad(): layer.weight *= -1
    layer.weight.requires_grad_(False)
    sparse = as_sparse(layer.eval(), Compressed())
    back = sparse.to_dense()
    assert same_bits(back.weight, layer.weight) and not back.weight.requires_grad and not back.training
    assert layer.weight[layer.weight == 0].signbit().any() and sparse.signs is not None
    with torch.no_grad(): layer.weight[layer.weight == 0] = 0
    assert as_sparse(layer, Compressed()).signs is None

class PackedOnCpu(TwoOfFour):
    "2:4 as it is packed on a GPU, which no product needs here"
    def pack(self, w): return dict(zip(('values', 'places'), pack_two_of_four(w)))
    def unpack(self, parts, shape=None): return unpack_two_of_four(**parts)

WITH_SIGNS = torch.float32, torch.float64, torch.bfloat16, torch.float16
NO_SIGNS   = torch.int8, torch.uint8, torch.int64, torch.bool

@pytest.mark.parametrize('layout', [*LAYOUTS, PackedOnCpu()], ids=lambda l: l.name)
@pytest.mark.parametrize('dtype', WITH_SIGNS + NO_SIGNS, ids=str)
def test_weights_multiplied_by_a_mask_come_back(layout, dtype):
    "Half of their zeros are negative; also in the model that `to_dense` returns, after a copy and a state dict"
    torch.manual_seed(0)
    mask = torch.zeros(8, 4, 4, dtype=torch.bool)
    mask[torch.arange(8)[:, None], torch.arange(4), torch.randint(4, (8, 4))] = True
    mask[3], mask[:, 2] = False, False
    layer = nn.Linear(16, 8, bias=False).requires_grad_(False)
    layer.weight.data = (9*torch.randn(8, 16)).to(dtype)*mask.reshape(8, 16).to(dtype)
    sparse = SparseLayer(layer, layout)
    assert (sparse.signs is not None) == (dtype in WITH_SIGNS)
    if sparse.signs is not None:
        zeros = layer.weight[layer.weight == 0]
        assert 0 < zeros.signbit().sum() < len(zeros) and sparse.signs.nbytes == 8*16/8
    other = SparseLayer(layer, layout)
    for t in other.buffers(): t.zero_()
    other.load_state_dict(sparse.state_dict())
    for s in (sparse, other, copy.deepcopy(sparse)):
        assert same_bits(to_dense(nn.Sequential(s))[0].weight, layer.weight)

@pytest.mark.parametrize('dtype', [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_weights_of_other_dtypes_stay_dense(dtype):
    layer = nn.Linear(16, 8, bias=False).requires_grad_(False)
    layer.weight.data = torch.zeros(8, 16).to(dtype)
    assert why_not_sparse(layer) == f'its dtype {dtype} is not supported'

def test_copies_files_and_devices():
    layer  = drop(nn.Linear(16, 8), .8)
    sparse = as_sparse(layer, Cut())
    for other in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert same_bits(other.dense_weight(), layer.weight)
    other = as_sparse(layer, Cut())
    with torch.no_grad(): other.values.zero_()
    other.load_state_dict(sparse.state_dict())
    assert same_bits(other.dense_weight(), layer.weight) and sparse.half().dense_weight().dtype == torch.float16

def test_gradients_are_refused():
    sparse = as_sparse(drop(nn.Linear(16, 8), .8), Cut())
    with pytest.raises(RuntimeError, match='no gradient'): sparse(torch.ones(2, 16))
    sparse.bias.requires_grad_(False)
    sparse(torch.ones(2, 16))
    with pytest.raises(RuntimeError, match='torch.no_grad'): sparse(torch.ones(2, 16, requires_grad=True))
    with torch.inference_mode(): sparse(torch.ones(2, 16))


# The decision

def test_decision():
    assert choose_layout({'a': 1.2, 'b': 3.}, 1.1) == ('b', '')
    assert choose_layout({'a': 1.1}, 1.1) == ('a', '') and choose_layout({'a': 1.09}, 1.1)[0] is None
    assert choose_layout({'a': 1.5}, 1.1, {'b'})[1].endswith('not in three quarters of the rounds')
    assert choose_layout({}, 1.1) == (None, 'no layout could be timed')

def test_a_few_disturbed_rounds_decide_nothing():
    "Faster in the median, in five of eight rounds: dense"
    def measure(jobs, runs, device):
        return {k: (2., 2., 2., 2., 2., 1., 1., 1.) if k == 'dense' else (1.5,)*8 for k in jobs}
    layer = drop(nn.Linear(16, 8), .9)
    _, table = sparse_layers(layer, torch.randn(4, 16), measure=measure)
    assert table.trials[0].speedups['CSR'] == 2/1.5 and not table.trials[0].steady and not table.changed
    assert 'CSR is 1.33× as fast as dense, but not' in table.dense['']

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()

def test_faster_layers_are_changed_and_come_back():
    model = net()
    drop(model[1], .9), drop(model[3], .9)
    with torch.no_grad(): model[0].weight[3:15] = 0
    before, x = copy.deepcopy(model.state_dict()), torch.randint(20, (6, 5))
    new, table = sparse_layers(model, x, measure=given(rows=.5, rows_and_columns=.5, CSR=.25, sparse=.5))
    assert isinstance(new[0], SparseEmbedding) and isinstance(new[1], SparseLinear) and type(model[1]) is nn.Linear
    assert {k: t.layout.name for k,t in table.changed.items()} == {'0': 'rows', '1': 'CSR', '3': 'CSR'}
    assert table.speedup == 2 and table.error <= table.tolerance == 1e-4 and not table.dense
    back = to_dense(new)
    assert str(back) == str(model) and all(same_bits(t, before[k]) for k,t in back.state_dict().items())
    assert all(same_bits(t, before[k]) for k,t in model.state_dict().items()) and isinstance(new[1], SparseLayer)
    with torch.no_grad(): torch.testing.assert_close(new(x), model(x))
    assert 'CSR 4.00×' in str(table) and '3 of 3 layers' in str(table) and 'CSR' in table._repr_html_()
    assert table.to_pandas().query('chosen').name.tolist() == ['0', '1', '3']

def test_slower_layers_stay_dense_and_say_so():
    model = net()
    drop(model[1], .5)
    new, table = sparse_layers(model, torch.randint(20, (6, 5)), measure=given(CSR=2.))
    assert not any(isinstance(m, SparseLayer) for m in new.modules()) and not table.changed
    assert table.dense['1'] == 'measured: CSR is 0.50× as fast as dense, less than 1.1×'
    assert table.dense['3'] == '0 of 128 weights are zero, less than 20 %'
    assert 'All 3 layers stay dense' in str(table)

def test_one_layer_is_a_model():
    layer = drop(nn.Linear(16, 8), .9)
    new, table = sparse_layers(layer, torch.randn(4, 16), measure=fast)
    assert isinstance(new, SparseLinear) and same_bits(to_dense(new).weight, layer.weight)

class Odd(nn.Module):
    "Layers that cannot be changed, each for another reason"
    def __init__(self):
        super().__init__()
        self.tied, self.same = (nn.Linear(8, 8, bias=False) for _ in range(2))
        self.same.weight = self.tied.weight
        self.read, self.hooked, self.apart, self.left, self.twice = (nn.Linear(8, 8) for _ in range(5))
        self.hooked.register_forward_hook(lambda *_: None)
        self.conv, self.attention = nn.Conv1d(8, 8, 3, padding=1), nn.MultiheadAttention(8, 2, batch_first=True)
        self.again = self.twice
    def forward(self, x):
        x = self.same(self.tied(x)) + self.hooked(x) + self.left(x) + self.read(x.to(self.read.weight.dtype))
        x = self.again(self.twice(x))
        return self.conv(self.attention(x, x, x)[0].mT) if x.ndim == 3 else self.apart(x)

def test_reasons():
    torch.manual_seed(0)
    model = Odd().eval()
    for m in model.modules():
        if isinstance(getattr(m, 'weight', None), nn.Parameter): drop(m, .9)
    new, table = sparse_layers(model, torch.randn(2, 4, 8), exclude='left', measure=fast)
    why = table.dense
    assert [*table.changed] == ['twice'] and new.twice is new.again and isinstance(new.twice, SparseLinear)
    assert why['left'] == 'excluded' and why['tied'] == 'it shares its weight with same'
    assert why['hooked'] == 'it has hooks' and 'no sparse convolution' in why['conv']
    assert why['apart'] == 'the model does not call it with one tensor'
    assert why['read'].startswith("the model fails with it: AttributeError")
    assert 'NonDynamicallyQuantizableLinear' in why['attention.out_proj']

def test_bad_arguments():
    model, x = drop(nn.Linear(8, 8), .9), torch.ones(2, 8)
    for kwargs in (dict(runs=2), dict(speedup=.9), dict(tolerance=-1), dict(tolerance='a'), dict(exclude='nothing')):
        with pytest.raises(ValueError): sparse_layers(model, x, **kwargs)
    with pytest.raises(TypeError, match='nn.Module'): sparse_layers(3, x)
    with pytest.raises(ValueError, match='does not run'): sparse_layers(model, torch.ones(2, 9))

def test_outputs_that_differ_are_refused():
    class Chaos(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = drop(nn.Linear(64, 64), .9)
        def forward(self, x): return torch.sin(1e9*self.a(x))
    torch.manual_seed(0)
    with pytest.raises(ValueError, match='more than `tolerance`'):
        sparse_layers(Chaos().eval(), torch.randn(4, 64), measure=fast, tolerance=1e-6)

def test_slow_jobs_are_not_timed_to_the_end():
    calls, clock = [], {'dense': 1, 'slow': 50_000}
    def job(name): return lambda: (calls.append(name), sum(range(clock[name])))
    seconds = timed_in_turns({k: job(k) for k in clock}, 6, torch.device('cpu'))
    assert len(seconds['dense']) == 6 and len(seconds['slow']) in (3, 6)
    assert calls[:6] == ['dense', 'slow']*2 + ['slow', 'dense']

def test_models_of_others():
    "A small ViT and a BERT: all of their linear layers, and outputs that agree"
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    vit = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=2, num_classes=5).eval()
    sp  = Sparsifier(vit, layer_type=nn.Linear)
    sp.sparsify_model(90)
    new, table = sparse_layers(vit, torch.randn(2, 3, 32, 32), runs=3, measure=fast)
    assert len(table.changed) == 9 and table.error < 1e-4 and isinstance(table, LayerTable)
    bert = pytest.importorskip('transformers')
    config = bert.BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                             intermediate_size=64)
    model = bert.BertModel(config).eval()
    Sparsifier(model, layer_type=nn.Linear).sparsify_model(90)
    ids   = dict(input_ids=torch.randint(50, (2, 7)), attention_mask=torch.ones(2, 7, dtype=torch.long))
    new, table = sparse_layers(model, ids, runs=3, measure=fast)
    assert len(table.changed) == 7
    assert all(same_bits(t, model.state_dict()[k]) for k,t in to_dense(new).state_dict().items())
