"Heads and hidden units that a model makes of linear layers: found by a run, pruned whole, taken out by `thin`"
import copy, warnings

import pytest, torch, torch.nn as nn
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, TfmdLists, noop

from fasterai_clone.prune.all import coupled_groups, group_masks, load_thinned, save_thinned, thin
from fasterai_clone.prune.thinned_files import reshape_to, sizes_of
from fasterai_clone.sparse.all import Sparsifier, SparsifyCallback
from helpers import exact
from test_thin import lively

IDS = torch.arange(14).reshape(2, 7)
common = dict(vocab_size=32, bos_token_id=1, eos_token_id=2)

def bert():
    lib = pytest.importorskip('transformers')
    config = lib.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=20,
                            max_position_embeddings=16, **common)
    return lib.BertModel(config), dict(input_ids=IDS)

def llama():
    "Two heads of queries for each of four heads of keys and values"
    lib = pytest.importorskip('transformers')
    return lib.LlamaForCausalLM(lib.LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=8, head_dim=4,
                                                num_key_value_heads=4, intermediate_size=20, **common)
                                ), dict(input_ids=IDS, use_cache=False)

def gpt2():
    lib = pytest.importorskip('transformers')
    return lib.GPT2LMHeadModel(lib.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_inner=20, n_positions=16, **common)
                               ), dict(input_ids=IDS, use_cache=False)

def vit():
    timm = pytest.importorskip('timm')
    return timm.create_model('vit_tiny_patch16_224', img_size=16, patch_size=8, depth=2, embed_dim=32, num_heads=4,
                             mlp_ratio=0.625, num_classes=3), torch.randn(2, 3, 16, 16)

# for each: the model, the parameters of a head in layer 1 with their axes (and how many of the three projections they
# hold), and those of a hidden unit
MODELS = dict(
    bert=(bert, {f'encoder.layer.1.attention.{k}.weight': a for k,a in {'self.query': 0, 'self.key': 0, 'self.value': 0,
                                                                       'output.dense': 1}.items()},
          {'encoder.layer.1.intermediate.dense.weight': 0, 'encoder.layer.1.output.dense.weight': 1}),
    llama=(llama, {f'model.layers.1.self_attn.{k}_proj.weight': int(k == 'o') for k in 'qkvo'},
           {f'model.layers.1.mlp.{k}_proj.weight': int(k == 'down') for k in ('gate', 'up', 'down')}),
    gpt2=(gpt2, {'transformer.h.1.attn.c_attn.weight': (1, 3), 'transformer.h.1.attn.c_proj.weight': 0},
          {'transformer.h.1.mlp.c_fc.weight': 1, 'transformer.h.1.mlp.c_proj.weight': 0}),
    vit=(vit, {'blocks.1.attn.qkv.weight': (0, 3), 'blocks.1.attn.proj.weight': 1},
         {'blocks.1.mlp.fc1.weight': 0, 'blocks.1.mlp.fc2.weight': 1}))

pytestmark = pytest.mark.filterwarnings('ignore:The `config` of')  # it cannot describe fewer heads

def made(name):
    torch.manual_seed(0)
    model, x = MODELS[name][0]()
    return lively(model.eval()), x

@torch.no_grad()
def outputs(model, x):
    "What `model` computes in fp64"
    model = copy.deepcopy(model).double().eval()
    if not isinstance(x, dict): return model(x.double())
    out = model(**x)
    return out.logits if hasattr(out, 'logits') else out.last_hidden_state

def rows(w, axis, n):
    "The weights of each of `n` groups that follow each other along `axis`, in each of the projections that are in it"
    axis, sets = axis if isinstance(axis, tuple) else (axis, 1)
    w = w.detach().movedim(axis, 0)
    return w.reshape(sets, n, len(w)//sets//n, -1).transpose(0, 1).reshape(n, -1)

@pytest.mark.parametrize('kind', ['head', 'unit'])
@pytest.mark.parametrize('name', MODELS)
def test_whole_groups_go_by_their_mean_weight(name, kind):
    "Exactly the lowest ones, in every layer: rows, columns and biases; and the rest computes the same without them"
    model, x = made(name)
    where, n = MODELS[name][1 if kind == 'head' else 2], 4 if kind == 'head' else 20
    params = dict(model.named_parameters())
    before = {k: rows(params[k], axis, n) for k,axis in where.items()}
    worth  = torch.cat([*before.values()], 1).abs().mean(1)
    sp = Sparsifier(model, kind, 'local', example_inputs=x)
    assert {p.name for p in sp.targets[1].parts} == set(where) and sp.sizes == [n, n] and not sp.left_out
    sp.sparsify_model(55)
    gone = set(worth.argsort()[:exact(n, 55)].tolist())
    for k,axis in where.items():
        now = rows(params[k], axis, n)
        assert {i for i in range(n) if not now[i].count_nonzero()} == gone
        assert all(torch.equal(now[i], before[k][i]) for i in range(n) if i not in gone)
    report = sp.report()
    assert [(r.groups, r.zero_groups) for r in report.rows if r.groups] == [(n, exact(n, 55))] * 2
    assert f'{kind}s' in str(report)
    small = thin(model, example_inputs=x)
    sizes = {k: p.shape for k,p in small.named_parameters()}
    left  = n - len(gone)
    for k,axis in where.items():
        axis = axis[0] if isinstance(axis, tuple) else axis
        assert sizes[k][axis] == params[k].shape[axis]*left//n
    dense, now = outputs(model, x), outputs(small, x)
    assert ((dense - now).abs().max() / dense.abs().max()).item() < 1e-12

def test_groups_that_share_keys_go_with_all_their_queries():
    model, x = made('llama')
    Sparsifier(model, 'head', example_inputs=x).sparsify_model(50)
    attn  = thin(model, example_inputs=x).model.layers[0].self_attn
    assert [getattr(attn, f'{k}_proj').out_features for k in 'qkv'] == [16, 8, 8] and attn.o_proj.in_features == 16

@pytest.mark.parametrize('name', ['gpt2', 'vit'])
def test_numbers_that_a_module_stores_follow(name, tmp_path):
    "In a thinned model, a copy, a file, a model that is thinned again, and one that is given all heads back"
    model, x = made(name)
    sp = Sparsifier(model, 'head', example_inputs=x)
    sp.sparsify_model(25)
    small = thin(model, example_inputs=x)
    def numbers(m):
        if name == 'gpt2': return [b.attn.split_size for b in m.transformer.h]
        return [(b.attn.num_heads, b.attn.head_dim, b.attn.attn_dim) for b in m.blocks]
    assert numbers(model) == [32 if name == 'gpt2' else (4, 8, 32)] * 2
    assert numbers(small) == numbers(copy.deepcopy(small)) == [24 if name == 'gpt2' else (3, 8, 24)] * 2
    again = load_thinned(lambda: made(name)[0], save_thinned(small, tmp_path/'small'))
    assert numbers(again) == numbers(small) and torch.equal(outputs(again, x), outputs(small, x))
    sp = Sparsifier(again, 'head', example_inputs=x)
    sp.sparsify_model(34)
    tiny = thin(again, example_inputs=x)  # compares the outputs
    assert numbers(tiny) == [16 if name == 'gpt2' else (2, 8, 16)] * 2
    assert numbers(reshape_to(tiny, sizes_of(small))) == numbers(small)
    assert numbers(reshape_to(tiny, sizes_of(model))) == numbers(model)
    sizes = sizes_of(small)
    for wrong in (0, -3, [3], 'x', True):
        bad = dict(stored={n: {k: wrong for k in own} for n,own in sizes['stored'].items()})
        with pytest.raises(ValueError, match='stores'): reshape_to(made(name)[0], sizes | bad)
    bad = dict(stored={'': {'colour': 3}})
    with pytest.raises(ValueError, match='stores no number'): reshape_to(model, sizes | bad)

class Parts(nn.Module):
    "Two branches on parts of stored lengths; `how` they are taken, and another use of a length"
    def __init__(self, how):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(1, 12, 1), nn.Conv2d(8, 5, 1), nn.Conv2d(4, 5, 1)
        if how == 'equal': self.a = nn.Conv2d(6, 5, 1); self.b = nn.Conv2d(6, 5, 1)
        self.how, self.splits, self.n, self.width = how, [8, 4], 8, 6
    def forward(self, x):
        y = self.stem(x).relu()
        if self.how == 'lengths': a, b = y.split(self.splits, 1)
        elif self.how == 'equal': a, b = torch.split(y, self.width, dim=1)
        else: a, b = y[:, :self.n], y[:, self.n:]
        if self.how == 'other': a = a + x.new_ones(8).reshape(self.n, 1).mean()
        return self.a(a) + self.b(b)

# how the parts are taken → the sizes of the groups, and the stored numbers after half of each is removed
@pytest.mark.parametrize('how, groups, after', [('lengths', [8, 4], ([4, 2], 8, 6)), ('equal', [6], ([8, 4], 8, 3)),
                                                ('slices', [8, 4], ([8, 4], 4, 6)), ('other', [4], ([8, 4], 8, 6))])
def test_parts_of_stored_lengths(how, groups, after):
    torch.manual_seed(0)
    model, x = lively(Parts(how).eval()), torch.randn(2, 1, 3, 3)
    found = coupled_groups(model, x)
    assert [g.n for g in found if not g.why_not] == groups
    masks = group_masks(found, [None if g.why_not else torch.arange(g.n) >= g.n//2 for g in found])
    small = thin(model, masks, x)
    assert (small.splits, small.n, small.width) == after and model.splits == [8, 4] and type(model.n) is int
    assert (small.a.in_channels, small.b.in_channels) == dict(equal=(3, 3), other=(8, 2)).get(how, (4, 2))

class Attention(nn.Module):
    "Attention of plain layers, with the weights of `m`"
    def __init__(self, m):
        super().__init__()
        self.size = m.head_dim
        self.q, self.k, self.v, self.o = (nn.Linear(m.embed_dim, m.embed_dim) for _ in range(4))
        with torch.no_grad():
            for l,w,b in zip((self.q, self.k, self.v), m.in_proj_weight.chunk(3), m.in_proj_bias.chunk(3)):
                l.weight.copy_(w), l.bias.copy_(b)
            self.o.weight.copy_(m.out_proj.weight), self.o.bias.copy_(m.out_proj.bias)
    def forward(self, x):
        q, k, v = (l(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for l in (self.q, self.k, self.v))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

@pytest.mark.parametrize('criteria', ['large_final', 'small_final'])
def test_the_heads_are_those_of_multihead_attention(criteria):
    "Equal weights, equal heads: zeros in the same places"
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(24, 6, batch_first=True)
    plain = nn.Sequential(Attention(whole), nn.Linear(24, 2))
    Sparsifier(whole, 'head', criteria=criteria).sparsify_model(50)
    Sparsifier(plain, 'head', criteria=criteria, example_inputs=torch.randn(2, 5, 24)).sparsify_model(50)
    for l,w,b in zip((plain[0].q, plain[0].k, plain[0].v), whole.in_proj_weight.chunk(3), whole.in_proj_bias.chunk(3)):
        assert torch.equal(l.weight, w) and torch.equal(l.bias, b)
    assert torch.equal(plain[0].o.weight, whole.out_proj.weight) and int((whole.in_proj_weight == 0).sum()) == 36*24


# -- models that have both -------------------------------------------------------------------------

class Both(nn.Module):
    "An LSTM and an MLP; attention in one layer, and attention of plain layers"
    def __init__(self):
        super().__init__()
        self.lstm, self.norm = nn.LSTM(8, 6, batch_first=True), nn.LayerNorm(24)
        self.mlp   = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 24))
        self.whole = nn.MultiheadAttention(24, 6, batch_first=True)
        self.plain, self.out = Attention(nn.MultiheadAttention(24, 3)), nn.Linear(24, 2)
    def forward(self, x):
        x = self.norm(self.mlp(self.lstm(x)[0]))
        x = self.norm(self.whole(x, x, x, need_weights=False)[0])
        return self.out(self.norm(self.plain(x)))

def both():
    torch.manual_seed(0)
    return lively(Both().eval()), torch.randn(2, 5, 8)

@pytest.mark.parametrize('kind, own, other', [('head', ('whole', 6), ('plain.q', 3)),
                                              ('unit', ('lstm', 6), ('mlp.0', 10))])
def test_both_kinds_of_layers(kind, own, other):
    model, x = both()
    def found(**kwargs): return [(t.layer, t.groups.n) for t in Sparsifier(model, kind, **kwargs).targets]
    own_type = type(model.get_submodule(own[0]))
    for types in (nn.Conv2d, nn.Module, own_type): assert found(layer_type=types) == [own]
    assert found(layer_type=own_type, example_inputs=x) == [own]
    for types in (nn.Conv2d, nn.Module, (own_type, nn.Linear)):
        assert found(layer_type=types, example_inputs=x) == [own, other]
    assert found(layer_type='Linear', example_inputs=x) == [other]
    sp = Sparsifier(model, kind, example_inputs=x)
    sp.sparsify_model(50)
    counted = [(r.groups, r.zero_groups) for r in sp.report().rows if r.groups]
    assert counted == [(n, n//2) for _,n in (own, other)]
    small = thin(model, example_inputs=x)
    if kind == 'head': assert (small.whole.num_heads, small.plain.q.out_features) == (3, 16)
    else: assert small.mlp[0].out_features == 5

def test_the_residual_stream_has_no_hidden_units():
    model = nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoderLayer(16, 4, 12, batch_first=True), nn.Linear(16, 2))
    groups = coupled_groups(model, torch.randn(2, 5, 8))
    assert [(g.name, g.kind) for g in groups] == [('0', None), ('1.self_attn', 'head'), ('1.linear1', 'unit'),
                                                  ('2', None)]
    mlp = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    sp  = Sparsifier(mlp, 'unit', example_inputs=torch.randn(3, 4))
    assert [(t.layer, t.groups.n, {p.name for p in t.parts}) for t in sp.targets] == [
        ('0', 8, {'0.weight', '3.weight'}), ('3', 6, {'3.weight', '5.weight'})]
    sp.sparsify_model(50)  # a weight of `3` may go with a row or a column
    assert sp.found.n_pruned() == [4, 3] and int((mlp[3].weight != 0).sum()) == 3*4
    cnn = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    assert [g.kind for g in coupled_groups(cnn, torch.randn(1, 1, 4, 4))] == [None, None]


# -- choices, and refusals -------------------------------------------------------------------------

def test_layers_are_chosen_by_name_and_type():
    model, x = made('llama')
    def found(kind='head', **kwargs): return Sparsifier(model, kind, example_inputs=x, **kwargs)
    assert [t.layer for t in found(include='*.layers.1.*').targets] == ['model.layers.1.self_attn.q_proj']
    assert len(found(layer_type='LlamaAttention').targets) == len(found(layer_type=nn.Linear).targets) == 2
    sp = found(exclude='*.0.self_attn.k_proj')
    why = sp.left_out['model.layers.0.self_attn.q_proj']
    assert len(sp.targets) == 1 and 'k_proj.weight too, which is left out' in why
    sp = found(exclude='*.o_proj')  # it stays dense, and reads zeros
    sp.sparsify_model(50)
    assert len(sp.targets) == 2 and model.model.layers[0].self_attn.o_proj.weight.count_nonzero() == 32*32
    sp = found('unit', coupled='*.down_proj')
    assert {p.name.split('.')[-2] for t in sp.targets for p in t.parts} == {'down_proj'}
    sp = found('unit', context='global', budget='params')
    assert sp.costs == [3*32]*2

def test_refusals():
    model, x = made('bert')
    for kwargs, says in [(dict(), "Granularity 'head' needs inputs to run the model with: pass `example_inputs`"),
                         (dict(example_inputs=x, include='*.intermediate.*'), 'layers of BertModel make no attention'),
                         (dict(example_inputs=x, layer_type=nn.LSTM), 'no layer of type LSTM'),
                         (dict(example_inputs=x, layer_type=nn.Embedding), 'make no attention heads')]:
        with pytest.raises(ValueError, match=says): Sparsifier(model, 'head', **kwargs)
    with pytest.raises(ValueError, match="make no hidden units. They are made by linear layers whose outputs"):
        Sparsifier(nn.Linear(4, 2), 'unit', example_inputs=torch.randn(2, 4))


# -- in a training run -----------------------------------------------------------------------------

class Classifier(nn.Module):
    "BERT, and a layer on its first position"
    def __init__(self):
        super().__init__()
        self.body, self.out = made('bert')[0], nn.Linear(32, 2)
    def forward(self, x): return self.out(self.body(x).last_hidden_state[:, 0])

@pytest.mark.parametrize('given', [False, True])
def test_in_fit(given, capsys):
    "Two callbacks at once; the inputs for the trace are those of a batch, or given"
    items = [(torch.randint(0, 32, (7,)), torch.tensor(i % 2)) for i in range(16)]
    dls   = DataLoaders(*[DataLoader(TfmdLists(items, noop), bs=8) for _ in range(2)])
    learn = Learner(dls, Classifier(), loss_func=CrossEntropyLossFlat())
    x   = dict(example_inputs=IDS) if given else {}
    cbs = [SparsifyCallback(50, 'head', **x), SparsifyCallback(25, 'unit', **x)]
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=cbs)
    said = capsys.readouterr().out
    assert 'Pruning of head until a sparsity of [50]%' in said and 'Pruning of unit until a sparsity of [25]%' in said
    assert [cb.report.group_sparsity for cb in cbs] == [50, 25] and cbs[0].past.share_of == 'heads'
    layer = thin(learn.model, example_inputs=IDS).body.encoder.layer[1]
    assert (layer.attention.self.query.out_features, layer.intermediate.dense.out_features) == (16, 15)

def again(small, folder):
    "The model that transformers reads back after it has saved `small`"
    small.save_pretrained(folder)
    return type(small).from_pretrained(folder).eval()

@pytest.mark.parametrize('kind,numbers', [('head', dict(num_attention_heads=4, num_key_value_heads=2, head_dim=4)),
                                          ('unit', dict(intermediate_size=10)), ('both', {})])
@pytest.mark.parametrize('name', ['Llama', 'Qwen2'])
def test_transformers_reads_back_what_its_config_can_describe(name, kind, numbers, tmp_path):
    "Qwen2's config names no `head_dim` until heads are removed"
    lib = pytest.importorskip('transformers')
    config = getattr(lib, f'{name}Config')(hidden_size=32, num_hidden_layers=2, num_attention_heads=8,
                                           num_key_value_heads=4, intermediate_size=20, **common)
    torch.manual_seed(0)
    model, x = lively(getattr(lib, f'{name}ForCausalLM')(config).eval()), dict(input_ids=IDS, use_cache=False)
    for k in ('head', 'unit'):
        if kind in (k, 'both'): Sparsifier(model, k, example_inputs=x).sparsify_model(50)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        small = thin(model, example_inputs=x)
    if kind == 'both': numbers = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=4, intermediate_size=10)
    assert {k: getattr(small.config, k) for k in numbers} == numbers
    assert (model.config.num_attention_heads, model.config.intermediate_size) == (8, 20)
    assert torch.equal(outputs(again(small, tmp_path), x), outputs(small, x))

@pytest.mark.parametrize('name,key', [('bert', 'intermediate_size'), ('gpt2', 'n_inner')])
def test_units_of_bert_and_gpt2_are_in_the_config(name, key, tmp_path):
    model, x = made(name)
    Sparsifier(model, 'unit', example_inputs=x, exclude='pooler.*' if name == 'bert' else None).sparsify_model(55)
    small = thin(model, example_inputs=x)
    assert getattr(small.config, key) == 9 and torch.equal(outputs(again(small, tmp_path), x), outputs(small, x))

@pytest.mark.filterwarnings('default')
@pytest.mark.parametrize('name,context,which', [
    ('llama', 'global', r'layers of different sizes \(model.layers.\*.self_attn.q_proj.weight is \d+×32 in 0, \d+×32 '
                        r'in 1; .*\): .*remove the same number from each layer'),
    ('bert', 'local', r'the new sizes \(encoder.layer.\*.attention.self.query.weight is 16×32; '),
    ('gpt2', 'local', r'the new sizes \(transformer.h.\*.attn.c_attn.weight is 32×48; ')])
def test_what_no_config_can_describe_is_named(name, context, which):
    model, x = made(name)
    with torch.no_grad():
        for p in (p for k,p in model.named_parameters() if '.1.' in k and '_proj' in k and name == 'llama'): p.mul_(3)
    Sparsifier(model, 'head', context, example_inputs=x).sparsify_model(50 if context == 'local' else 25)
    with pytest.warns(UserWarning, match=f'The `config` of .* cannot describe {which}.*'): thin(model, example_inputs=x)

def test_in_a_trainer(tmp_path):
    lib = pytest.importorskip('transformers')
    from fasterai_clone.trainers.huggingface import SparsifyTrainerCallback
    model = lib.BertForSequenceClassification(made('bert')[0].config)
    data  = [dict(input_ids=IDS[i % 2], labels=i % 2) for i in range(8)]
    cb    = SparsifyTrainerCallback(50, 'head', verbose=False)
    args  = lib.TrainingArguments(str(tmp_path), num_train_epochs=1, per_device_train_batch_size=4, use_cpu=True,
                                  report_to=[], save_strategy='no', disable_tqdm=True)
    lib.Trainer(model, args, train_dataset=data, callbacks=[cb]).train()
    assert [(r.groups, r.zero_groups) for r in cb.report.rows if r.groups] == [(4, 2)] * 2
    small = thin(model, example_inputs=dict(input_ids=IDS))
    assert small.bert.encoder.layer[0].attention.self.value.out_features == 16
