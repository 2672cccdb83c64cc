"""`torch.compile`: masks change at every step of a compiled model, which is never compiled again for it, and nothing is
named after it"""
import pickle, shutil
from copy import deepcopy
from functools import cache, partial

import pytest, torch, torch.nn as nn, torch.nn.functional as F
import torch._dynamo as dynamo
from fastai.basics import Adam, SGD, noop
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from fasterai_clone.digits import digits_net
from fasterai_clone.sparse.all import *
from helpers import column, exact, images, learner, same, spy, weights, zeros


@pytest.fixture(autouse=True)
def _nothing_compiled():
    dynamo.reset()
    counters.clear()
    yield
    dynamo.reset()

graphs = []  # one entry for each graph that was compiled

def counting(name):
    "The backend `name`, which notes what it compiles"
    graphs.clear()
    real = dynamo.lookup_backend(name)
    def backend(gm, inputs):
        graphs.append(len(list(gm.graph.nodes)))
        return real(gm, inputs)
    return backend

class Chain(nn.Sequential):
    "A Sequential with a `forward` of the user's own: old torch compiles nothing for torch's own modules"
    def forward(self, x):
        for m in self: x = m(x)
        return x

def compiled(model, how, name):
    "`model`, compiled as users do it"
    fast = partial(torch.compile, backend=counting(name))
    if how == 'whole':    return fast(model)
    if how == 'in place':
        model = Chain(*model)
        model.compile(backend=counting(name))
    if how == 'body':     return nn.Sequential(fast(model[:6]), model[6:])
    if how == 'layers':
        for i in (0, 3): model[i] = fast(model[i])
    return model

def breaks(): return dict(counters['graph_break'])
def original(learn): return getattr(learn.model, '_orig_mod', learn.model)
def plain(sd): return {k.replace('_orig_mod.', ''): v for k,v in sd.items()}


# In a loop of one's own

def loop(wrap, n_steps=6, sparsity=lambda i: 15*(i+1), compact=False, **kwargs):
    "Train with masks that change at every step; returns the plain model, the sparsifier and the zeros after each step"
    torch.manual_seed(0)
    net, digits = digits_net(4), images()[0]
    x, y = (torch.stack([torch.as_tensor(o[i]) for o in digits[:96]]) for i in (0, 1))
    model = wrap(net)
    opt, seen = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), []
    sp = Sparsifier(model, **kwargs)
    with sp.hold(opt, compact):
        for i in range(n_steps):
            b = slice(16*i, 16*(i+1))
            F.cross_entropy(model(x[b]), y[b]).backward()
            opt.step()
            opt.zero_grad()
            sp.sparsify_model(sparsity(i))
            seen.append(zeros(net))
    return net, sp, seen

@pytest.mark.parametrize('backend,criteria', [('eager', 'large_final'), ('eager', 'gradient'),
                                              ('eager', 'updating_movmag'),
                                              ('aot_eager', 'movement')])
def test_masks_change_at_every_step_of_one_graph(backend, criteria):
    with dynamo.config.patch(error_on_recompile=True):
        net, sp, seen = loop(lambda m: torch.compile(m, backend=counting(backend), fullgraph=True), criteria=criteria)
    assert len(graphs) == 1 and breaks() == {} and counters['stats']['unique_graphs'] == 1
    assert seen == [[exact(n, 15*(i+1)) for n in (36, 288, 1152)] for i in range(6)]
    dense, theirs, once = loop(noop, criteria=criteria)
    assert seen == once and sp.masks == theirs.masks and list(sp.masks) == ['0.weight', '3.weight', '6.weight']
    if backend == 'eager': assert same(weights(net), weights(dense))

@pytest.mark.parametrize('granularity,context', [('filter', 'global'), ('weight', 'lamp')])
@pytest.mark.parametrize('compact', [False, True], ids=['dense', 'compact'])
def test_other_groups_and_compact_steps(granularity, context, compact):
    def train(wrap):
        return loop(wrap, granularity=granularity, context=context, sparsity=lambda i: 10*(i+1), compact=compact)
    net, sp, seen = train(lambda m: torch.compile(m, backend=counting('eager'), fullgraph=True))
    dense, theirs, once = train(noop)
    assert len(graphs) == 1 and breaks() == {} and seen == once and sp.masks == theirs.masks
    assert same(weights(net), weights(dense))

def test_what_is_seen_without_us():
    "The laws above can fail: a mask as a buffer that is replaced is compiled again, a print breaks the graph"
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.dropped = nn.Parameter(torch.ones(3)), 0
        def forward(self, x):
            if self.dropped: print('sparse')
            return (x * self.weight)[self.dropped:]
    m = Masked()
    fast = torch.compile(m, backend=counting('eager'))
    fast(torch.ones(3))
    assert len(graphs) == 1 and breaks() == {}
    m.dropped = 1
    fast(torch.ones(3))
    assert len(graphs) > 1 and breaks()

def test_the_graph_has_no_trace_of_masks():
    "Compiled before, with, and after a sparsifier, the graph is the same"
    x, found = torch.randn(2, 1, 8, 8), []
    def explain(m):
        found.append((lambda e: (e.graph_count, e.graph_break_count,
                                 [str(g.graph) for g in e.graphs]))(dynamo.explain(m)(x)))
    net = digits_net(4)
    explain(net)
    sp, opt = Sparsifier(net), torch.optim.SGD(net.parameters(), lr=0.1)
    sp.sparsify_model(50)
    with sp.hold(opt):
        dynamo.reset()
        explain(net)
    dynamo.reset()
    explain(net)
    assert found[0][:2] == (1, 0) and found[0] == found[1] == found[2]

def test_a_compiled_optimizer_step():
    "Where the step is compiled too"
    def train(wrap, wrap_step):
        torch.manual_seed(0)
        net = digits_net(4)
        model, opt = wrap(net), torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        sp, seen = Sparsifier(model), []
        step = wrap_step(opt.step)
        with sp.hold(opt):
            for i in range(4):
                model(torch.randn(8, 1, 8, 8)).square().mean().backward()
                sp.sparsify_model(20*(i+1))
                step()
                opt.zero_grad()
                seen.append(zeros(net))
        assert seen == [[exact(n, 20*(i+1)) for n in (36, 288, 1152)] for i in range(4)]
        return weights(net)
    fast = partial(torch.compile, backend='eager')
    plain, fused = train(noop, noop), train(fast, fast)  # a compiled step adds its terms in another order
    assert plain.keys() == fused.keys() and all(torch.allclose(plain[k], fused[k], atol=1e-6) for k in plain)

@pytest.mark.skipif(not (shutil.which('g++') and shutil.which('gcc')), reason='inductor needs a C++ compiler')
def test_inductor():
    "The default backend: kernels read the weights that are there, not those they were compiled with"
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2)
        def forward(self, x): return self.b(self.a(x).relu())
    torch.manual_seed(0)
    net, x = Small(), torch.randn(4, 8)
    model, opt = torch.compile(net), torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    sp = Sparsifier(model, layer_type=nn.Linear)
    with sp.hold(opt), dynamo.config.patch(error_on_recompile=True):
        for s in (0, 25, 50, 75):
            model(x).square().mean().backward()
            opt.step()
            opt.zero_grad()
            sp.sparsify_model(s)
            assert zeros(net, nn.Linear) == [exact(64, s), exact(16, s)] and torch.allclose(model(x), net(x), atol=1e-6)
    assert breaks() == {}


# In fastai's

def fit(how, backend='eager', n_epoch=2, opt_func=Adam, criteria='large_final', **kwargs):
    "A learner with a compiled model, fitted; without a `criteria` there is no callback of ours"
    learn, seen = learner(opt_func=opt_func), []
    learn.logger = noop
    learn.model  = compiled(learn.model, how, backend)
    cb = criteria and SparsifyCallback(90, criteria=criteria, schedule=kwargs.pop('schedule', lin),
                                       verbose=False, **kwargs)
    keys, storage = list(learn.model.state_dict()), {k: p.data_ptr() for k,p in learn.model.named_parameters()}
    learn.fit(n_epoch, 1e-2,
              cbs=[o for o in (cb, spy('before_validate', lambda: seen.append(zeros(learn.model)))) if o])
    assert list(learn.model.state_dict()) == keys
    assert {k: p.data_ptr() for k,p in learn.model.named_parameters()} == storage
    return learn, cb, seen

HOWS = ['whole', 'in place', 'body', 'layers']

@cache
def dense_graphs(how):
    "Graphs, graph breaks and statistics of training without us"
    fit(how, criteria=None)
    found = list(graphs), breaks(), dict(counters['stats'])
    dynamo.reset()
    counters.clear()
    return found

@pytest.mark.parametrize('how', HOWS)
@pytest.mark.parametrize('criteria', ['large_final', 'wanda'])
def test_as_many_graphs_as_without_us(how, criteria):
    """One for training and one for validation (two each where two layers are compiled), and the same weights as
    uncompiled"""
    dense = dense_graphs(how)
    learn, cb, seen = fit(how, criteria=criteria)
    assert (list(graphs), breaks(), dict(counters['stats'])) == dense and dense[1] == {}
    assert len(graphs) == (4 if how == 'layers' else 2)
    assert seen == [[exact(n, s) for n in (36, 288, 1152)] for s in (45, 90)]
    assert column(learn) == [h['sparsity'] for h in cb.history]
    alone, theirs, _ = fit('', criteria=criteria)
    ours, uncompiled = weights(learn.model), weights(alone.model)
    assert len(ours) == len(uncompiled) == 20
    assert all(torch.equal(a, b) for a,b in zip(ours.values(), uncompiled.values()))
    assert [m.tolist() for m in cb.sparsifier.masks.values()] == [m.tolist() for m in theirs.sparsifier.masks.values()]

@pytest.mark.parametrize('how', HOWS)
def test_names_are_those_of_the_original_model(how):
    learn, cb, _ = fit(how, n_epoch=1, criteria='movement')
    sp, params = cb.sparsifier, dict(original(learn).named_parameters())
    wanted = ['0.0.weight', '0.3.weight', '1.6.weight'] if how == 'body' else ['0.weight', '3.weight', '6.weight']
    assert list(sp.masks) == list(sp.refs) == wanted == [f'{r.name}.weight' for r in cb.report.rows]
    assert not any('_orig_mod' in f'{n}' for n,*_ in cb.report.dense) and '_orig_mod' not in str(cb.report)
    assert all(p is q for p,q in zip(sp.params.values(), (p for k,p in params.items() if p.ndim == 4)))
    net = digits_net(4)
    if how == 'body': net = nn.Sequential(net[:6], net[6:])
    sp.masks.apply(dict(net.named_parameters()))  # so masks fit a model that is not compiled
    assert zeros(net) == [32, 259, 1036]

@pytest.mark.parametrize('how,kwargs', [('whole', dict()), ('in place', dict()), ('whole', dict(criteria='snip')),
                                        ('in place', dict(criteria='wanda')), ('whole', dict(granularity='filter')),
                                        ('whole', dict(compact=True, schedule=one_shot)),
                                        ('whole', dict(lth=True, schedule=one_shot))],
                         ids=['plain', 'in_place', 'snip', 'wanda', 'filter', 'compact', 'rewound'])
def test_a_model_compiled_before_is_not_compiled_again(how, kwargs):
    learn, n = learner(opt_func=SGD), []
    learn.logger = noop
    learn.model  = compiled(learn.model, how, 'eager')
    learn.fit(1, 1e-2)
    n.append(len(graphs))
    with dynamo.config.patch(error_on_recompile=True):
        learn.fit(4, 1e-2, cbs=SparsifyCallback(50, verbose=False, **{'schedule': lin, **kwargs}))
        n.append(zeros(learn.model))
        learn.fit(1, 1e-2)
        learn.validate()
    assert len(graphs) == n[0] == 2 and breaks() == {} and sum(n[1]) == 738

def test_the_same_callback_before_and_after_compiling():
    learn = learner(cbs=(cb := SparsifyCallback(90, verbose=False)))
    learn.logger = noop
    learn.fit(1, 1e-2)
    sp, masks = cb.sparsifier, {k: m.clone() for k,m in cb.sparsifier.masks.items()}
    learn.model = torch.compile(learn.model, backend=counting('eager'))
    learn.fit(2, 1e-2)
    assert cb.sparsifier is sp and len(graphs) == 2 and same(dict(sp.masks), masks)
    assert zeros(learn.model) == [32, 259, 1036]
    learn.model = learn.model._orig_mod
    learn.fit(1, 1e-2)
    assert cb.sparsifier is sp and same(dict(sp.masks), masks) and zeros(learn.model) == [32, 259, 1036]

def test_part_of_a_compiled_model():
    learn = learner()
    learn.model = torch.compile(learn.model, backend=counting('eager'))
    learn.fit(1, 1e-2, cbs=(cb := SparsifyCallback(50, schedule=lin, model=learn.model._orig_mod[3:6])))
    assert zeros(learn.model) == [0, 144, 0] and list(cb.sparsifier.masks) == ['3.weight']


# Afterwards

@pytest.mark.parametrize('how', ['whole', 'in place', 'layers'])
def test_copies_are_sparse_and_train(how):
    learn, cb, _ = fit(how, n_epoch=1)
    x = torch.rand(2, 1, 8, 8)
    twin = deepcopy(learn.model)
    assert zeros(twin) == [32, 259, 1036] and torch.equal(twin.eval()(x), learn.model.eval()(x))
    with torch.no_grad():
        for p in twin.parameters(): p.zero_()
    # nothing is shared
    assert zeros(learn.model) == [32, 259, 1036] == [int((~m).sum()) for m in cb.sparsifier.masks.values()]

def test_a_plain_model_loads_what_was_trained():
    learn, *_ = fit('whole', n_epoch=1)
    net = digits_net(4)
    net.load_state_dict(original(learn).state_dict())
    assert zeros(net) == [32, 259, 1036]
    vars(original(learn)).pop('_compile_kwargs', None)  # importing lightning wraps `torch.compile`, which leaves them
    assert zeros(pickle.loads(pickle.dumps(original(learn)))) == [32, 259, 1036]

def test_export_after_training():
    "`torch.export` of the model inside: no more than what a dense model has, with the zeros"
    learn, *_ = fit('whole', n_epoch=1)
    net, x = original(learn).eval(), torch.rand(2, 1, 8, 8)
    program = torch.export.export(net, (x,))
    dense   = torch.export.export(digits_net(4).eval(), (x,))
    assert set(program.state_dict) == set(dense.state_dict) == set(net.state_dict())
    assert [n.target for n in program.graph.nodes if n.op == 'call_function'] == \
           [n.target for n in dense.graph.nodes   if n.op == 'call_function']
    assert sum(int((v == 0).sum()) for v in program.state_dict.values() if v.ndim == 4) == 1327
    assert torch.allclose(program.module()(x), net(x))

def test_save_and_load_with_the_callback():
    learn, cb, _ = fit('whole', n_epoch=1)
    before = weights(learn.model)
    learn.save('m')
    learn.fit(1, 1e-2)
    learn.load('m')
    assert same(weights(learn.model), before) and list(plain(before)) == list(digits_net(4).state_dict())

def test_tickets():
    learn, *_ = fit('whole', n_epoch=2, save_tickets=True, schedule=one_shot)
    net = digits_net(4)
    net.load_state_dict(plain(load_file(next((learn.path/learn.model_dir).glob('*.safetensors')))))
    assert zeros(net) == [32, 259, 1036]
