"More situations of the kinds that users met: state, outputs in objects, ties, chance, batches by name, real learners"
import collections, gc, itertools, pickle, random, subprocess, sys, weakref
from dataclasses import dataclass
from functools import partial, wraps

import fastai.callback.fp16  # noqa: F401  for `to_fp16`
import numpy as np, pytest, torch, torch.nn as nn, torch.nn.functional as F
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner
from helpers import learner as digits_learner
from transformers import BatchEncoding

from fasterai_clone.analyze.all import *
from fasterai_clone.fit.batches import loss_of
from fasterai_clone.model.all import *
from fasterai_clone.prune.all import *
from fasterai_clone.sparse.all import *
from fasterai_clone.sparse.gradients import grasp_scores, loss_gradients
from fasterai_clone.sparse.measure import grasp, snip
from fasterai_clone.sparse.synflow import synflow_scores
from test_real_data import classifier, collab, fit, language, tabular, vision


class Net(nn.Module):
    def __init__(self, f, **parts):
        super().__init__()
        self.f = f
        for k,v in parts.items(): setattr(self, k, v)
    def forward(self, *args): return self.f(self, *args)

def why(model, x): return {g.name: g.why_not for g in coupled_groups(model, x)}
def free(model, x): return {g.name: g.n for g in coupled_groups(model, x) if not g.why_not}
def conv(i, o): return nn.Conv2d(i, o, 3, padding=1)
def image(n=2): return torch.rand(n, 3, 8, 8)
def coupled(model, x): return Sparsifier(model, 'filter', layer_type=nn.Module, coupled=True, example_inputs=x)

def shrunk(model, x):
    "Half of the channels of each group masked and removed: equal outputs"
    coupled(model.eval(), x).sparsify_model(50)
    small = thin(model, example_inputs=x)
    assert torch.allclose(small(x), model(x), atol=1e-6)
    return small


# --- models that remember tensors of their last run

def stored(m, h):
    m.h = h.detach()
    return h
def stored_inside(m, h):
    m.state = collections.namedtuple('State', 'h')([dict(h=h.detach())])
    return h
def stored_privately(m, h):
    m._h = h.detach()
    return h

reads = {stored: lambda m: getattr(m, 'h', None), stored_privately: lambda m: getattr(m, '_h', None),
         stored_inside: lambda m: m.state.h[0]['h'] if hasattr(m, 'state') else None}

@pytest.mark.parametrize('ran', [False, True])
@pytest.mark.parametrize('keep', reads)
def test_a_state_of_the_next_run_keeps_its_size(keep, ran):
    "What a recurrent layer of one's own keeps, it multiplies in the next run; it may have run before, or not"
    def f(m, x):
        h = reads[keep](m)
        return m.b(keep(m, torch.tanh(m.a(x) + (0 if h is None else m.r(h)))))
    model, x = Net(f, a=nn.Linear(4, 8), r=nn.Linear(8, 8), b=nn.Linear(8, 2)), torch.rand(3, 4)
    if ran: model(x)
    name = {stored: 'h', stored_privately: '_h', stored_inside: 'state'}[keep]
    assert why(model, x)['a'] == f'it is kept as `{name}`, for the next run'
    assert not free(model, x)

def test_what_is_written_before_it_is_read_goes():
    "Features in a list, kept privately, or in an object, made anew in each run: of 8 channels 4 go"
    def f(m, x):
        m.features, m._last = [F.relu(m.a(x))], None
        m._last = m.features[-1]
        return m.b(m._last)
    model, x = Net(f, a=nn.Linear(4, 8), b=nn.Linear(8, 2)), torch.rand(3, 4)
    model(x).sum().backward()
    assert shrunk(model, x).a.out_features == 4


# --- outputs in objects

class Lazy:
    def __init__(self, a): self.features = partial(torch.mul, a, 2.)
class Later:
    def __init__(self, a): self.get = lambda: a
class Default:
    def __init__(self, a):
        def get(x=a, *, y=a): return x + y
        self.get = get
class Own:
    def __init__(self, a): self.a = a
    def get(self): return self.a

def array_of(a):
    out = np.empty(1, dtype=object)
    out[0] = a
    return out

@pytest.mark.parametrize('form', [Lazy, Later, Default, lambda a: Own(a).get, lambda a: a.sum, array_of,
                                  lambda a: {a: 1}, lambda a: itertools.chain([a]), lambda a: itertools.islice([a], 1)])
def test_features_that_an_object_gives_when_asked_are_outputs(form):
    def f(m, x):
        h = F.relu(m.a(x))
        return m.b(h), form(h)
    model, x = Net(f, a=nn.Linear(4, 8), b=nn.Linear(8, 2)), torch.rand(3, 4)
    assert set(why(model, x).values()) == {'it is the output of the model'}


# --- tied by memory

def tied(m): m.b.weight.data = m.a.weight.data.t()
def thrice(m):
    tied(m)
    m.c.weight.data = m.a.weight.data
def parameter(m): m.b.weight = nn.Parameter(m.a.weight.t())
def numbers(m):
    array = np.random.randn(8, 6).astype(np.float32)
    m.a.weight.data, m.c.weight.data = torch.from_numpy(array), torch.from_numpy(array)
def stored_twice(m): m.register_buffer('w', m.a.weight.data)
def biases(m): m.c.bias.data = m.a.bias.data

@pytest.mark.parametrize('tie, other', [(tied, 'b.weight'), (thrice, 'b.weight'), (parameter, 'b.weight'),
                                        (numbers, 'c.weight'), (stored_twice, 'w'), (biases, 'c.bias')])
def test_channels_tied_by_memory_stay_and_the_reason_is_true(tie, other):
    model, x = Net(lambda m, x: m.b(F.relu(m.a(x))) + m.o(m.c(x)), a=nn.Linear(6, 8), b=nn.Linear(8, 6),
                   c=nn.Linear(6, 8), o=nn.Linear(8, 6)), torch.rand(3, 6)
    tie(model)
    assert why(model, x)['a'] == f'its memory is also that of {other}'
    if tie not in (tied, parameter, stored_twice): return
    sp = Sparsifier(model, 'filter', layer_type=nn.Linear, coupled=True, example_inputs=x)
    assert sp.left_out['a'] == f'its memory is also that of {other}' and [t.layer for t in sp.targets] == ['c']


# --- `PruneCallback` with its defaults

def learner(model, x):
    items = [(t, torch.tensor(i % 3)) for i,t in enumerate(x)]
    return Learner(DataLoaders.from_dsets(items, items, bs=8, num_workers=0), model, loss_func=CrossEntropyLossFlat())

def pooled(i): return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(i, 3)
def script(*layers): return torch.jit.script(nn.Sequential(*layers))

class ChannelNorm(nn.Module):
    "ConvNeXt's: it leaves its output in the memory format `channels_last`"
    def __init__(self, n):
        super().__init__()
        self.norm = nn.LayerNorm(n)
    def forward(self, x): return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

shrinks = {
    'a scripted norm':  (lambda: [conv(3, 8), script(nn.BatchNorm2d(8), nn.ReLU()), conv(8, 8), *pooled(8)],
                         {'0.weight': (4, 3, 3, 3), '1.0.weight': (4,), '2.weight': (4, 4, 3, 3)}),
    'a scripted layer': (lambda: [conv(3, 8), nn.ReLU(), script(conv(8, 8), nn.ReLU()), *pooled(8)],
                         {'0.weight': (4, 3, 3, 3), '2.0.weight': (8, 4, 3, 3)}),
    'channels_last':    (lambda: [conv(3, 8), ChannelNorm(8), conv(8, 8), *pooled(8)],
                         {'0.weight': (8, 3, 3, 3), '2.weight': (4, 8, 3, 3), '5.weight': (3, 4)})}

@pytest.mark.parametrize('name', shrinks)
def test_prune_callback_with_defaults(name):
    layers, shapes = shrinks[name]
    learn = learner(nn.Sequential(*layers()), image(16))
    fit(learn, PruneCallback(50, verbose=False), n=1)
    params = dict(learn.model.named_parameters())
    assert {k: tuple(params[k].shape) for k in shapes} == shapes

def test_a_model_in_channels_last():
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), *pooled(8))
    x = image().to(memory_format=torch.channels_last)
    assert free(model.to(memory_format=torch.channels_last), x) == {'0': 8, '3': 8}
    assert shrunk(model, x)[-1].in_features == 4


# --- chance

def by_python(p): return random.random() < p
def by_numpy(p): return np.random.rand() < p
def by_torch(p): return bool(torch.rand(()) < p)
def by_whole(p): return int(torch.randint(10, (1,))) < 10*p

@pytest.mark.parametrize('chance', [by_python, by_numpy, by_torch, by_whole])
def test_layers_that_run_by_chance_are_followed(chance):
    "Each of three layers runs in half of the runs, in eval mode too: whatever runs fits"
    def f(m, x):
        h = m.a(x)
        for c in m.cs: h = h + F.relu(c(h)) if chance(0.5) else h
        return m.b(h)
    model = Net(f, a=conv(3, 8), cs=nn.ModuleList([conv(8, 8) for _ in range(3)]), b=conv(8, 2)).eval()
    coupled(model, image()).sparsify_model(50)
    small = thin(model, example_inputs=image())
    assert [c.weight.shape for c in small.cs] == [(4, 4, 3, 3)]*3
    for _ in range(8): assert small(image()).shape == (2, 2, 8, 8)

def test_one_branch_by_chance():
    def f(m, x): return m.b(F.relu(m.branches[np.random.randint(3)](x)))
    model = Net(f, branches=nn.ModuleList([conv(3, 8) for _ in range(3)]), b=conv(8, 2)).eval()
    group, = (g for g in coupled_groups(model, image()) if not g.why_not)
    assert {m.module for m in group.members} == {'branches.0', 'branches.1', 'branches.2', 'b'}

def test_a_head_that_sometimes_runs_in_training():
    def f(m, x):
        h = F.relu(m.a(x))
        if m.training and random.random() < 0.3: m.loss = m.aux(h).sum()
        return m.b(h)
    model = Net(f, a=conv(3, 8), aux=conv(8, 4), b=conv(8, 2)).eval()
    assert shrunk(model, image()).aux.in_channels == 4

def test_random_numbers_that_choose_nothing_take_no_more_runs():
    "One run in eval mode and one in train mode, for a parameter that is not used"
    runs = []
    def f(m, x):
        runs.append(m.training)
        return m.b(F.dropout(F.relu(m.a(x)), 0.5, True)) if x.sum() > 0 else None
    model = Net(f, a=conv(3, 8), b=conv(8, 2), unused=nn.Linear(3, 3))
    assert free(model.eval(), image()) == {'a': 8} and runs == [False, True]


# --- batches by name

@dataclass
class Batch:
    input_ids: object
    attention_mask: object
    labels: object = None

class Encoder(nn.Module):
    "As a user writes one for Hugging Face's loaders: it returns a dict"
    def __init__(self):
        super().__init__()
        self.emb, self.a, self.b = nn.Embedding(30, 8), nn.Linear(8, 16), nn.Linear(16, 3)
    def forward(self, input_ids, attention_mask=None, labels=None):
        h   = self.emb(input_ids) * (1 if attention_mask is None else attention_mask[..., None])
        out = self.b(F.relu(self.a(h.mean(1))))
        return dict(logits=out, **({} if labels is None else dict(loss=F.cross_entropy(out, labels))))

def batch(): return dict(input_ids=torch.randint(1, 30, (4, 6)), attention_mask=torch.ones(4, 6, dtype=torch.long),
                         labels=torch.tensor([0, 1, 2, 0]))

def accuracy_of(out, y): return (out.argmax(-1) == y).float().mean()

@pytest.mark.parametrize('form', [dict, BatchEncoding, collections.UserDict, lambda b: Batch(**b)])
def test_batches_by_name(form):
    torch.manual_seed(0)
    model, b = Encoder().eval(), batch()
    x, right = form(b), accuracy_of(model(b['input_ids'])['logits'], b['labels'])
    assert evaluate(model, [x], accuracy_of) == right.item()
    plain = {k: v for k,v in b.items() if k != 'labels'}
    assert multiply_adds(model, x) == multiply_adds(model, plain)
    for criteria in ('wanda', 'snip', 'synflow', 'gradient', partial(grasp, temperature=1.)):
        sp = Sparsifier(Encoder(), criteria=criteria, layer_type=nn.Linear, data=[x])
        sp.sparsify_model(50)
        assert sp.report().zeros == 64 + 24
    coupled(model, x).sparsify_model(50)
    assert thin(model, example_inputs=x).a.out_features == 8
    with pytest.raises(ValueError, match=r'criteria=partial\(grasp, temperature=1\)'):
        Sparsifier(model, criteria='grasp', layer_type=nn.Linear, data=[x]).sparsify_model(50)

@dataclass
class Images:
    x: torch.Tensor

def test_a_dataclass_that_is_the_only_argument():
    "Its one field has the name of the argument"
    class Whole(Net):
        def forward(self, x): return self.b(F.relu(self.a(x.x)))
    model = Whole(None, a=conv(3, 8), b=conv(8, 2)).eval()
    assert free(model, Images(image())) == {'a': 8}

def test_labels_of_one_name_and_dicts_that_are_one_argument():
    model, b = Encoder().eval(), batch()
    one = {'label' if k == 'labels' else k: v for k,v in b.items()}
    outer = Net(lambda m, x: m.inner(x['input_ids'], x['attention_mask']), inner=model)
    assert evaluate(outer, [one], accuracy_of) == evaluate(model, [b], accuracy_of)
    n = multiply_adds(model, b)
    assert dict(multiply_adds(outer, one)) == {f'inner.{k}': n[k] for k in n}
    coupled(outer, one).sparsify_model(50)
    assert thin(outer, example_inputs=one).inner.a.out_features == 8


# --- fastai's learners, with criteria that measure

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('learners')

@pytest.mark.parametrize('granularity', ['weight', 'filter'])
@pytest.mark.parametrize('criteria', ['snip', 'grasp', 'gradient', 'synflow'])
@pytest.mark.parametrize('make', [vision, tabular, collab, language, classifier])
def test_criteria_that_measure_in_learners(make, criteria, granularity, folder):
    "Half of each layer, in a fit; a language model returns a tuple, and its decoder is the embedding, too"
    learn = make(folder/make.__name__)
    cb = SparsifyCallback(50, granularity, criteria=criteria, layer_type=nn.Module, verbose=False)
    fit(learn, cb, n=1)
    params = dict(learn.model.named_parameters(remove_duplicate=False))
    for t in cb.sparsifier.targets:
        zero = params[t.name] == 0
        if granularity == 'filter': zero = zero.flatten(1).all(1)
        assert int(zero.sum()) == zero.numel() // 2, t.name

class First(Callback):
    def after_pred(self):
        self.learn.pred, self.rest = self.pred[0], self.pred[1:]
        self.learn.yb = tuple(y.long() for y in self.yb)

@pytest.mark.parametrize('temperature', [None, 1., 200.])
def test_a_criterion_computes_the_loss_that_the_fit_does(temperature):
    "Callbacks change the outputs first; scores are those of a model without them, and nothing is left behind"
    model, x, y = Net(lambda m, x: (m.a(x), x), a=nn.Linear(4, 3)), torch.rand(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    items = [(a, b.int()) for a,b in zip(x, y)]
    first = First()
    learn = Learner(DataLoaders.from_dsets(items, items, bs=6, num_workers=0), model, loss_func=CrossEntropyLossFlat(),
                    cbs=first)
    before, loss = dict(vars(first)), loss_of(learn)
    def scores(model, params, loss, y):
        if temperature is None: return loss_gradients(model, params, (x, y), loss)
        return grasp_scores(model, params, (x, y), loss, temperature=temperature)
    found = scores(model, {'a.weight': model.a.weight}, loss, y.int())
    want  = scores(model.a, {'weight': model.a.weight}, F.cross_entropy, y)
    assert torch.allclose(found['a.weight'], want['weight'])
    assert vars(first) == before and not hasattr(learn, 'pred')
    learn.remove_cb(first)
    assert loss_of(learn) is learn.loss_func

def test_synflow_of_what_is_changed_in_place():
    "`Linear` and then `ReLU(inplace=True)`, as in heads of VGG: the same as with a `ReLU` of its own memory"
    nets = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=inplace), nn.Linear(4, 2)) for inplace in (True, False)]
    nets[1].load_state_dict(nets[0].state_dict())
    a, b = (synflow_scores(n, {'0.weight': n[0].weight}, torch.rand(2, 3))['0.weight'] for n in nets)
    assert torch.equal(a, b) and abs(float(a.sum()) - 1) < 1e-6

def test_synflow_of_numbers_that_modules_keep():
    "Constants and states that are no buffers are in float32, whatever the weights are converted to"
    model = Net(lambda m, x: m.b(m.a(x) * m.scale + m.states[0]), a=nn.Linear(3, 4), b=nn.Linear(4, 2),
                scale=torch.ones(4), states=[torch.zeros(4)])
    scores = synflow_scores(model, {'a.weight': model.a.weight}, torch.rand(2, 3))
    assert abs(float(scores['a.weight'].sum()) - 1) < 1e-6
    assert model.scale.dtype == model.states[0].dtype == torch.float32

@pytest.mark.parametrize('criteria', ['snip', 'synflow', 'wanda'])
def test_a_tied_weight_under_its_second_name(criteria):
    "The decoder of a language model: an embedding has no filters, so its weight is known as the decoder's"
    model = Net(lambda m, x: m.head(m.emb(x)), emb=nn.Embedding(9, 8), head=nn.Linear(8, 9, bias=False))
    model.head.weight = model.emb.weight
    x = torch.randint(0, 9, (12,))
    sp = Sparsifier(model, 'filter', criteria=criteria, layer_type=nn.Module, data=[(x, x)], loss_func=F.cross_entropy)
    sp.sparsify_model(50)
    assert [t.name for t in sp.targets] == ['head.weight']
    assert int((model.head.weight == 0).all(1).sum()) == 4


# --- a fresh look at these

class Collect(Callback):
    "Collects the predictions of a fit, in a list and a count"
    def before_fit(self): self.preds, self.n = [], {'all': 0}
    def after_pred(self):
        self.preds.append(self.pred)
        self.n['all'] += 1

def test_predictions_that_a_callback_collects_are_those_of_the_fit():
    learn, collect = digits_learner(), Collect()
    learn.fit(1, cbs=[collect, SparsifyCallback(sparsity=50, criteria=snip)])
    n = sum(map(len, learn.dls.loaders))
    assert len(collect.preds) == n and collect.n == {'all': n}

@pytest.mark.parametrize('criteria', ['large_final', snip])
def test_a_sparsifier_holds_no_learner_after_the_fit(criteria):
    "Under mixed precision, too, whose callback changes predictions: the learner is freed, and no data are pickled"
    sizes = []
    for mixed in (False, True):
        learn, cb = digits_learner(), SparsifyCallback(sparsity=50, criteria=criteria)
        if mixed: learn.to_fp16()
        learn.fit(1, cbs=cb)
        found = weakref.ref(learn)
        del learn
        gc.collect()
        assert found() is None
        sizes.append(len(pickle.dumps(cb.sparsifier)))
    assert sizes[1] < 1.1*sizes[0]

def test_a_loss_after_the_fit_is_that_of_the_learner_alone():
    learn, cb = digits_learner(), SparsifyCallback(sparsity=50, criteria=snip)
    learn.to_fp16().fit(1, cbs=cb)
    loss = cb.sparsifier.chooser.scorer.inputs.loss_func
    x, y = learn.dls.one_batch()
    assert torch.equal(loss(learn.model(x), y), learn.loss_func(learn.model(x), y))

def test_a_state_of_the_last_run_imports_no_compiler():
    "The import of `torch._dynamo` takes seconds, which the first trace would wait for"
    code = '''import sys, torch, torch.nn as nn
from fasterai_clone.model.all import coupled_groups
class Cached(nn.Linear):
    def forward(self, x):
        self.h = super().forward(x)
        return self.h
groups = coupled_groups(nn.Sequential(nn.Linear(4, 8), Cached(8, 8), nn.Linear(8, 2)), torch.rand(1, 4))
assert 'torch._dynamo' not in sys.modules'''
    subprocess.run([sys.executable, '-c', code], check=True)

def test_parameters_that_are_read_but_have_no_channels_take_no_more_runs():
    "A weight norm's parameters are read in each run, whatever chance decides"
    runs = []
    def f(m, x):
        runs.append(m.training)
        return m.b(F.relu(m.a(x))) if m.training and random.random() < 2 else m.b(m.a(x))
    model = Net(f, a=nn.utils.parametrizations.weight_norm(nn.Linear(3, 8)), b=nn.Linear(8, 2)).eval()
    coupled_groups(model, torch.rand(1, 3))
    assert runs == [False, True]

def test_outputs_in_a_closure_with_a_variable_that_is_not_set():
    def f(m, x):
        h = F.relu(m.a(x))
        def later(): return h, never
        out = m.b(h), later
        if m.training: never = 1  # noqa: F841
        return out
    assert set(free(Net(f, a=nn.Linear(3, 8), b=nn.Linear(8, 2)).eval(), torch.rand(1, 3))) == set()

def logged(f):
    @wraps(f)
    def run(*args): return f(*args)
    return run

@pytest.mark.parametrize('decorator', [logged, torch.autocast('cpu', enabled=False), torch.no_grad()])
def test_a_decorated_forward_that_changes_the_weight_of_a_part(decorator):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 5)
        @decorator
        def forward(self, x): return F.linear(x, self.fc.weight - self.fc.weight.mean(), self.fc.bias)
    with pytest.raises(ValueError, match='`forward` of Centred, which contains it, changes the weight'):
        Sparsifier(Centred(), 'weight', layer_type=nn.Linear)
