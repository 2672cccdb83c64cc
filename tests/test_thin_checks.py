"""What `thin` and `Sparsifier(coupled=True)` try before they promise: innocent layers go on, guilty ones are named, in
few runs; export; sizes"""
import copy, io, pickle, warnings
from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest, torch, torch.nn as nn, torch.nn.functional as F
from fastai.torch_core import TensorImage
from helpers import learner, spy
from fasterai_clone.model.choices import Choices
from fasterai_clone.model.same import Check, doubled, with_tensors
from fasterai_clone.model.run import tensors_in
from fasterai_clone.prune.all import *
from fasterai_clone.prune.coupling import CoupledGroup, group_masks
from fasterai_clone.prune.prune_callback import PruneCallback
from fasterai_clone.prune.thin import sampled, unremovable
from fasterai_clone.sparse.all import *
from fasterai_clone.sparse.signal import LayerCollapse
from torchvision.ops import nms
from test_thin import Net, conv, dropping, error, image, lively, masked, n_params


def half(model, x): return thin(model, dropping(model, x), x)

def runs_of(monkeypatch):
    "Counts the forward passes of the check"
    runs, run = [], Check.run
    def counted(self, *args, **kwargs): runs.append(args); return run(self, *args, **kwargs)
    monkeypatch.setattr(Check, 'run', counted)
    return runs


# -- a trial before training -----------------------------------------------------------------------

class Told(nn.Module):
    """A block that asks how many channels it has, where no trace sees it, and multiplies by that: always, in training,
    or never"""
    def __init__(self, told):
        super().__init__()
        self.told, self.a, self.b = told, nn.Linear(8, 8), nn.Linear(8, 8)
    def forward(self, x):
        y = self.a(x).relu()
        return x + self.b(y * len(self.a.weight) if self.told is True or self.told == 'train' and self.training else y)

def tower(*told): return lively(nn.Sequential(*map(Told, told), nn.Linear(8, 3)))

def test_what_thin_would_refuse_is_left_out_before_training():
    model, x = tower(False, True, False), torch.randn(4, 8)
    sp = Sparsifier(model, 'filter', layer_type=nn.Linear, coupled=True, example_inputs=x)
    assert [t.layer for t in sp.targets] == ['0.a', '2.a'] and [g.name for g in sp.channel_groups] == ['0.a', '2.a']
    assert "could not remove its channels: the outputs in eval mode differ" in sp.left_out['1.a']
    assert "`exclude='1.a'`" in sp.left_out['1.a']
    assert '1.a: `thin` could not' in str(sp.report())
    sp.sparsify_model(50)
    assert [m.a.out_features for m in thin(model, example_inputs=x)[:3]] == [4, 8, 4]
    assert [t.layer for t in Sparsifier(model, 'filter', layer_type=nn.Linear, coupled=True, example_inputs=x,
                                        check=False).targets] == ['0.a', '1.a', '2.a']

@pytest.mark.parametrize('cb', [lambda: SparsifyCallback(50, 'filter', layer_type=nn.Linear, coupled=True),
                                lambda: PruneCallback(50, layer_type=nn.Linear)])
def test_callbacks_say_it_before_the_first_batch(cb, capsys):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Told(True), Told(False), nn.Linear(8, 10))
    learn, seen = learner(n=64, model=model), []
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3, cbs=[cb(), spy('before_batch', lambda: seen.append(capsys.readouterr().out))])
    assert "  2.a keeps all: `thin` could not remove its channels" in seen[0] and "`exclude='2.a'`" in seen[0]
    assert '3.a' not in seen[0]
    assert learn.model[2].a.out_features == 8

def test_in_train_mode_only():
    model, x = tower(False, 'train', False), torch.randn(4, 8)
    groups = coupled_groups(model, x)
    why = unremovable(model, groups, x)
    assert [groups[i].name for i in why] == ['1.a'] and 'in train mode' in [*why.values()][0]

def test_nothing_is_left_to_prune():
    with pytest.raises(ValueError, match=r"no channel can be removed. 0.a: `thin` could not .*`exclude='0.a'`"):
        Sparsifier(tower(True), 'filter', layer_type=nn.Linear, include='*.a', coupled=True,
                   example_inputs=torch.randn(4, 8))

def test_a_wrong_trace_is_caught(monkeypatch):
    "Even if the groups were wrong: output classes are compared by their shape"
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(4, 8)
    free = [CoupledGroup(g.name, g.n, g.members, None) for g in coupled_groups(model, x)]
    assert [g.name for g in free] == ['0', '2']
    why = unremovable(model, free, x)
    assert [*why] == [1] and 'have the shape (2, 3) instead of (2, 4)' in why[1]


# -- few runs --------------------------------------------------------------------------------------

@pytest.mark.parametrize('guilty', [[3], [0], [31], [2, 29], [10, 11, 12], [], [*range(32)]])
def test_the_guilty_are_found_in_ten_runs_more(guilty, monkeypatch):
    model, x = tower(*[i in guilty for i in range(32)]), torch.randn(4, 8)
    groups = coupled_groups(model, x)
    runs = runs_of(monkeypatch)
    why  = unremovable(model, groups, x)
    names = {groups[i].name for i in why}
    assert {f'{i}.a' for i in guilty} <= names and len(runs) <= 4 + 10
    if len(guilty) == 1: assert names == {f'{guilty[0]}.a'}
    if not guilty: assert not names and len(runs) == 4
    rest = [g.name for i,g in enumerate(groups) if i not in why and not g.why_not]
    masks = group_masks(groups, [torch.arange(g.n) > 0 if g.name in rest else None for g in groups])
    assert error(masked(model, masks), thin(model, masks, x), x) < 1e-10  # what is left over can be removed together

def test_thin_names_the_guilty_only(monkeypatch):
    model, x = tower(*[i == 5 for i in range(16)]), torch.randn(4, 8)
    masks, runs = dropping(model, x), runs_of(monkeypatch)
    with pytest.raises(ValueError,
                       match=r"without the zero channels of `5.a`, the outputs in eval mode differ "
                             r".*exclude=\['5.a'\]`$"): thin(model, masks, x)
    assert len(runs) <= 4 + 10
    assert thin(model, masks, x, exclude='5.a')[4].a.out_features == 4

class Sized(Told):
    def forward(self, x):
        y = self.a(x).relu()
        if y.shape[1] != 8: raise RuntimeError('8 units expected')
        return x + self.b(y)

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.told, self.sized = Told(False), Sized(False)
    def forward(self, x): return self.sized(self.told(x))

def test_an_error_points_to_its_module(monkeypatch):
    "Twelve of 24 groups have a size in their code: they are found by where the error comes from, and by their names"
    model, x = lively(nn.Sequential(*[Both() for _ in range(12)], nn.Linear(8, 3))), torch.randn(4, 8)
    groups, runs = coupled_groups(model, x), runs_of(monkeypatch)
    why = unremovable(model, groups, x)
    assert {groups[i].name for i in why} == {f'{i}.sized.a' for i in range(12)} and len(runs) <= 4 + 10
    assert all('RuntimeError: 8 units expected' in w for w in why.values())

def test_a_list_of_images_is_no_batch(monkeypatch):
    "Three channels are no three items: two of them are too few, and the whole is taken"
    model = lively(Net(lambda m, x: [m.b(m.a(i[None]).relu()) for i in x], a=conv(3, 8), b=conv(8, 2)))
    x, seen, run = ([torch.randn(3, 5, 5)],), [], Choices.run
    def look(self, args, kwargs): seen.append(args[0][0].shape); return run(self, args, kwargs)
    monkeypatch.setattr(Choices, 'run', look)
    assert not unremovable(model, coupled_groups(model, x), x) and {*seen[-4:]} == {torch.Size([3, 5, 5])}

def test_the_check_can_sample(monkeypatch):
    model, x, runs = tower(False, False), torch.randn(64, 8), runs_of(monkeypatch)
    masks = dropping(model, x)
    a, b  = thin(model, masks, x), len(runs)
    assert b == 4 and n_params(thin(model, masks, x, check='sample')) == n_params(a) and len(runs) == 6
    for wrong in ('quick', 2, None):
        with pytest.raises(ValueError, match='`check` must be'): thin(model, masks, x, check=wrong)
    assert len(sampled(x)) == 2 and len(sampled(dict(a=x, b=[x[:, 0]]))['b'][0]) == 2 and sampled((x, x[:7]))[0] is x


# -- choices ---------------------------------------------------------------------------------------

class Tied(nn.Module):
    """Its outputs 0-3 are equal to 4-7, but for `off`, which is added or taken away depending on how many units are
    left: another one is the larger"""
    def __init__(self, choose, off):
        super().__init__()
        self.choose, self.off, self.a, self.b = choose, off, nn.Linear(5, 16), nn.Linear(16, 8)
    def forward(self, x):
        y = self.b(self.a(x).relu())[:, :4]
        return self.choose(torch.cat([y + (self.off if self.a.out_features == 16 else -self.off), y], 1))

CHOICES = dict(
    topk=lambda y: y.topk(4)[1].float(), sort=lambda y: y.sort(1)[1], argsort=lambda y: torch.argsort(y, 1),
    argmax=lambda y: y.argmax(1),
    max=lambda y: y.max(1), min=lambda y: y.min(1, keepdim=True), kthvalue=lambda y: y.kthvalue(3, 1),
    compare=lambda y: y > y.roll(4, 1),
    nonzero=lambda y: (y >= y.roll(4, 1)).nonzero(), rounding=lambda y: (y - y.roll(4, 1) + 1).floor(),
    to_int=lambda y: (y - y.roll(4, 1) + 1).long(),
    bucketize=lambda y: torch.bucketize(y, y[0].sort()[0]),
    searchsorted=lambda y: torch.searchsorted(y[0].sort()[0], y),
    unique=lambda y: y.unique(return_inverse=True), low=lambda y: y.half(), cummax=lambda y: y.cummax(1)[1],
    item=lambda y: y[:, :2 + int(y[0, 0].item() >= y[0, 4].item())],
    mask=lambda y: torch.where(y > y.roll(4, 1), 1., -1.),
    in_place=lambda y: (y - y.roll(4, 1) + 1).floor_(),
    into_int=lambda y: torch.zeros_like(y, dtype=torch.long).copy_(y - y.roll(4, 1) + 1),
    nms=lambda y: nms(torch.stack([0*y[0], 0*y[0], 1 + 0*y[0], 1 + 0*y[0]], 1), y[0], 0.5))

def tied(name, off):
    "The network, with half of the units at zero"
    model = lively(Tied(CHOICES[name], off))
    with torch.no_grad(): model.a.weight[::2], model.a.bias[::2] = 0, 0
    return model.double(), torch.randn(3, 5, dtype=torch.float64)

@pytest.mark.parametrize('name', CHOICES)
def test_ties_are_no_difference(name):
    "Off by 1e-13: rounding. Top-k, sort and the others choose another one for it"
    model, x = tied(name, 1e-13)
    small = thin(model, None, x)
    assert small.a.out_features == 8 and (name == 'low' or not same_outputs(model(x), small(x)))

def same_outputs(a, b):
    a, b = tensors_in(a), tensors_in(b)
    return all(x.shape == y.shape and torch.equal(x, y) for x,y in zip(a, b))

@pytest.mark.parametrize('name', CHOICES)
def test_another_function_is_one_before_the_choice_too(name):
    "Off by a millionth: another function, though the same is chosen from it perhaps"
    model, x = tied(name, 1e-6)
    with pytest.raises(ValueError, match="without the zero channels of `a`, the (values that|outputs)"):
        thin(model, None, x)

def test_what_is_compared_on_removed_channels_is_left_to_itself():
    model = lively(Net(lambda m, x: m.b(torch.where((y := m.a(x)) > 0, y, 0.1*y)), a=nn.Linear(5, 16),
                       b=nn.Linear(16, 8)))
    assert half(model, torch.randn(3, 5)).a.out_features == 8

def test_experts_are_chosen_alike():
    "The router has ties: which of two equal experts is taken must not matter"
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.back, self.route = nn.Linear(5, 8), nn.Linear(8, 5), nn.Linear(5, 4)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(4))
        def forward(self, x):
            x = self.back(self.stem(x).relu())
            p, which = self.route(x).softmax(-1).topk(2)
            return sum((p * (which == i)).sum(-1, keepdim=True) * e(x) for i,e in enumerate(self.experts))
    model = lively(Experts())
    with torch.no_grad(): model.route.weight[1:], model.route.bias[1:] = model.route.weight[:1], model.route.bias[:1]
    small = half(model, torch.randn(6, 5))
    assert small.stem.out_features == 4 and [e[0].out_features for e in small.experts] == [4]*4

def test_random_numbers_hide_no_error():
    "A network that draws numbers in eval mode too: those of the same shape are the same in both runs"
    noisy = lambda m, x: m.b(m.a(x + torch.randn_like(x)).relu())
    assert half(lively(Net(noisy, a=nn.Linear(5, 16), b=nn.Linear(16, 8))), torch.randn(3, 5)).a.out_features == 8
    wrong = lively(Net(lambda m, x: noisy(m, x) * len(m.a.weight), a=nn.Linear(5, 16), b=nn.Linear(16, 8)))
    with pytest.raises(ValueError, match='without the zero channels of `a`'): half(wrong, torch.randn(3, 5))

@pytest.mark.parametrize('draw', [lambda y: F.dropout(y, 0.2),
                                  lambda y: y + torch.rand(y.shape, generator=torch.Generator().manual_seed(0)),
                                  lambda y: y * torch.rand(y.shape, generator=torch.Generator().manual_seed(0),
                                                           dtype=y.dtype).round()],
                         ids=['dropout', 'added', 'mask'])
@pytest.mark.parametrize('units', [16, 640])
def test_fewer_random_numbers_are_no_error(draw, units):
    """In train mode. Some kernels take a single number of the generator, whose state is the same afterwards, however
    many they draw"""
    model = lively(Net(lambda m, x: m.b(draw(m.a(x)) if m.training else m.a(x)), a=nn.Linear(5, units),
                       b=nn.Linear(units, 8)))
    assert half(model, torch.randn(3, 5)).a.out_features == units // 2


# -- outputs and inputs inside objects -------------------------------------------------------------

@dataclass
class Result: classes: torch.Tensor; features: torch.Tensor

class Instances:
    "As detectron2 has it: attributes in a private dict"
    def __init__(self, **fields): object.__setattr__(self, '_fields', fields)
    def __getattr__(self, name): return self._fields[name]

class Slots:
    __slots__ = ('classes', 'features')
    def __init__(self, classes, features): self.classes, self.features = classes, features

OBJECTS = dict(dataclass=Result, namespace=SimpleNamespace, instances=Instances, slots=Slots,
               mapping=lambda **kw: UserDict(kw),
               nested=lambda **kw: [{'all': (Result(**kw), SimpleNamespace(inner=Instances(**kw)))}])

@pytest.mark.parametrize('kind', OBJECTS)
def test_features_that_leave_in_objects_stay(kind):
    x, make = torch.randn(4, 5), OBJECTS[kind]
    def forward(m, x):
        y = m.a(x).relu()
        return make(classes=m.c(m.b(y).relu()), features=y)
    model = lively(Net(forward, a=nn.Linear(5, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3)))
    small = half(model, x)
    assert (small.a.out_features, small.b.out_features, small.c.out_features) == (8, 4, 3)
    # if the trace had not seen it
    free = [CoupledGroup(g.name, g.n, g.members, None) for g in coupled_groups(model, x)]
    assert {free[i].name for i in unremovable(model, free, x)} == {'a', 'c'}

Pair = namedtuple('Pair', 'x scale')

def test_subclasses_in_double_precision():
    x = with_tensors([TensorImage(torch.rand(2, 3))], doubled)
    assert type(x[0]) is TensorImage and x[0].dtype == torch.float64

@pytest.mark.parametrize('wrap', [lambda x: (Pair(x, 2.),), lambda x: (SimpleNamespace(x=x, scale=2.),),
                                  lambda x: UserDict(x=x), lambda x: (Result(x, x),), lambda x: ([x, {'x': x}],)])
def test_inputs_of_any_kind_in_double_precision(wrap, monkeypatch):
    def take(o):
        if isinstance(o, torch.Tensor): return o
        if isinstance(o, list): return take(o[0])
        return o.classes if isinstance(o, Result) else o.x
    model, seen = lively(Net(lambda m, x: m.b(m.a(take(x)).relu()), a=nn.Linear(5, 8), b=nn.Linear(8, 3))), []
    run = Choices.run
    def look(self, args, kwargs):
        seen.extend(t.dtype for t in tensors_in((args, kwargs)))
        return run(self, args, kwargs)
    monkeypatch.setattr(Choices, 'run', look)
    assert half(model, wrap(torch.randn(4, 5))).a.out_features == 4 and {*seen} == {torch.float64}


# -- sizes that modules and configs tell -----------------------------------------------------------

class Wrapped(nn.Module):
    "Layers in a wrapper that tells its size, and says it in its code"
    def __init__(self):
        super().__init__()
        self.in_features, self.hidden_features, self.out_features, self.num_heads = 5, 8, 3, 8
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
    def forward(self, x): return self.b(self.a(x).relu())

def test_sizes_of_wrappers(tmp_path):
    x, model = torch.randn(4, 5), lively(Wrapped())
    small = half(model, x)
    for m in (small, load_thinned(Wrapped, save_thinned(small, tmp_path/'wrapped')), copy.deepcopy(small),
              pickle.loads(pickle.dumps(small))):
        assert (m.in_features, m.hidden_features, m.out_features, m.num_heads) == (5, 4, 3, 8)
        assert torch.equal(m(x), small(x))
    assert model.hidden_features == 8

def test_what_is_ambiguous_stays():
    "Two blocks that lose different numbers, and sizes that are equal by chance"
    model, x = lively(nn.Sequential(Wrapped(), nn.Linear(3, 5), Wrapped())), torch.randn(4, 5)
    model.hidden_size, model[2].hidden_size = 8, 8
    with torch.no_grad(): model[2].a.weight[0], model[2].a.bias[0] = 0, 0
    small = thin(model, None, x)
    assert (small.hidden_size, small[0].hidden_features, small[2].hidden_features, small[2].hidden_size) == (8, 8, 7, 7)

def llama(**kwargs):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2) | kwargs
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()

def mlp_masks(model, kept):
    "Masks that keep so many of the MLP units in each layer"
    masks = {}
    for i,n in enumerate(kept):
        for k in ('gate_proj', 'up_proj'):
            w = model.model.layers[i].mlp.get_submodule(k).weight
            masks[f'model.layers.{i}.mlp.{k}.weight'] = (torch.arange(len(w)) < n)[:, None].expand_as(w).contiguous()
    return masks

def test_the_config_of_transformers_says_what_is_left(tmp_path):
    model, ids = llama(), dict(input_ids=torch.randint(40, (2, 6)))
    small = thin(model, mlp_masks(model, [9, 9]), ids)
    assert small.config.intermediate_size == 9 and model.config.intermediate_size == 24
    assert small.model.layers[0].mlp.intermediate_size == 9
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path).eval()
    with torch.no_grad(): assert torch.equal(again(**ids).logits, small(**ids).logits)
    back = load_thinned(llama, save_thinned(small, tmp_path/'small'))
    assert back.config.intermediate_size == 9

def test_layers_of_different_sizes_are_more_than_a_config_can_say(tmp_path):
    model, ids = llama(), dict(input_ids=torch.randint(40, (2, 6)))
    with pytest.warns(UserWarning, match='`config` of LlamaForCausalLM cannot describe.*`save_thinned`'):
        small = thin(model, mlp_masks(model, [9, 12]), ids)
    assert small.config.intermediate_size == 24 and [l.mlp.intermediate_size for l in small.model.layers] == [9, 12]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        back = load_thinned(llama, save_thinned(small, tmp_path/'small'))
    with torch.no_grad(): torch.testing.assert_close(back(**ids).logits, small(**ids).logits)


# -- where layers compete --------------------------------------------------------------------------

def ladder():
    "A layer of 128 units with small weights, between two with large ones: it loses nearly all"
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(),
                          nn.Linear(64, 2))
    with torch.no_grad():
        for i,scale in ((0, 1.), (2, 1e-4), (4, 1.), (6, 1.)):
            model[i].weight.copy_(scale * (1 + torch.arange(model[i].weight.numel()).reshape(model[i].weight.shape)))
    return model

@pytest.mark.parametrize('context', ['global', 'lamp', 'local'])
def test_a_layer_that_loses_nearly_all_is_named_once(context):
    sp = Sparsifier(ladder(), 'filter', context, layer_type=nn.Linear, coupled=True, example_inputs=torch.randn(3, 4))
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        for s in (10, 50, 51): sp.sparsify_model(s)
    told = [str(o.message) for o in w if issubclass(o.category, LayerCollapse) and 'few channels' in str(o.message)]
    assert told == (['Layer collapse: few channels are left in 2 (1 of 128). Limit what a layer loses '
                     'with `max_sparsity`, or `min_channels` of `PruneCallback`'] if context == 'global' else [])

def test_with_a_limit_there_is_no_warning():
    sp = Sparsifier(ladder(), 'filter', 'global', layer_type=nn.Linear, coupled=True, example_inputs=torch.randn(3, 4),
                    max_sparsity=80)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        sp.sparsify_model(50)
    assert sp.found.n_pruned(sp.targets)[1] == 102


# -- export ----------------------------------------------------------------------------------------

class Attends(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.a, self.attn, self.b = nn.Linear(3, 8), nn.MultiheadAttention(8, 4, **kwargs), nn.Linear(8, 2)
    def forward(self, x, padding: torch.Tensor|None = None, mask: torch.Tensor|None = None):
        x = self.a(x)
        return self.b(self.attn(x, x, x, key_padding_mask=padding, attn_mask=mask)[0])

def exported(model, x):
    "What the model gives by each way to export it, and whether the ONNX exporter knows all of its operations"
    yield torch.jit.script(model)(*x)
    yield torch.jit.trace(model, x, check_trace=False)(*x)
    yield torch.export.export(model, x).module()(*x)
    graph, _, out = torch.onnx.utils._model_to_graph(model, x)
    assert not [n.kind() for n in graph.nodes() if n.kind().startswith('aten::')]
    yield out

def attention_inputs(batch_first):
    padding, x = torch.tensor([[False]*4 + [True], [False]*5]), torch.randn(2, 5, 3)
    x = x if batch_first else x.transpose(0, 1).contiguous()
    return [(x,), (x, padding), (x, None, torch.ones(5, 5).triu(1).bool()), (x, None, torch.randn(8, 5, 5)),
            (x, padding, torch.randn(5, 5))]

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kwargs', [{}, dict(batch_first=True), dict(bias=False, batch_first=True),
                                    dict(add_zero_attn=True, add_bias_kv=True)])
def test_attention_exports(kwargs):
    model, inputs = lively(Attends(**kwargs)).eval(), attention_inputs(kwargs.get('batch_first'))
    masks = dropping(model, inputs[0])
    zeros, small = masked(model, masks), thin(model, masks, inputs[0]).eval()
    assert type(small.attn) is ThinAttention and small.attn.num_heads == 2
    for x in inputs:
        torch.testing.assert_close(small(*x), zeros(*x))
        if len(x) > 2: torch.testing.assert_close(torch.jit.script(small)(*x), zeros(*x))
        else:
            for out in exported(small, x): torch.testing.assert_close(out, zeros(*x))

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('batch_first', [False, True])
def test_an_encoder_layer_exports(batch_first):
    model = lively(nn.TransformerEncoderLayer(16, 4, 32, dropout=0., batch_first=batch_first)).eval()
    x = torch.randn(2, 5, 16)
    masks = dropping(model, x)
    zeros, small = masked(model, masks), thin(model, masks, x).eval()
    for out in exported(small, (x,)): torch.testing.assert_close(out, zeros(x))

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('make, x', [
    (lambda: nn.Sequential(conv(3, 8), nn.GroupNorm(4, 8), nn.ReLU(), conv(8, 8, groups=8), nn.BatchNorm2d(8),
                           nn.ReLU(), conv(8, 2)), image()),
    (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.ConvTranspose1d(8, 6, 3, groups=2), nn.PReLU(6),
                           nn.Conv1d(6, 2, 1)), torch.randn(2, 3, 9)),
    (lambda: nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randint(7, (2, 5)))])
def test_other_layers_export(make, x):
    small = half(lively(make()), x).eval()
    assert n_params(small) < n_params(make())
    for out in exported(small, (x,)): torch.testing.assert_close(out, small(x))
    torch.save(small, file := io.BytesIO())
    file.seek(0)
    for m in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), torch.load(file, weights_only=False)):
        assert torch.equal(m(x), small(x))
