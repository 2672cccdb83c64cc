"""Reports from the field: layers, optimizers, memory and checkpoints as people have them, with values that can be
checked by hand"""
import re, types, warnings
from functools import partial

import pytest, torch, torch.nn as nn, torch.nn.functional as F
from fastai.basics import CrossEntropyLossFlat, DataLoaders, L, Learner, MSELossFlat, OptimWrapper
from torch.nn.utils import prune

from fasterai_clone.cli import load_tensors, sparsity_report
from fasterai_clone.prune.all import PruneCallback, thin
from fasterai_clone.sparse.checkpoint import report_tensors
from fasterai_clone.sparse.all import *
from fasterai_clone.sparse.compact import stepping_optimizer, why_not_compact

def refused(f, *says, kind=(ValueError, TypeError)):
    "`f()` raises an error of ours: one that says all of `says`"
    with pytest.raises(kind) as e: f()
    for s in says: assert s in str(e.value), f'{s!r} is not in {e.value}'

def pct(t): return 100 * int((t == 0).sum()) / t.numel()


# The stored weight is not the weight that is used

class StdConv(nn.Conv2d):
    def used(self):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return w / (self.weight.std((1, 2, 3), keepdim=True) + 1e-5)
    def forward(self, x): return F.conv2d(x, self.used(), self.bias)

class BitLinear(nn.Linear):
    def used(self): return (self.weight - self.weight.mean()).sign()
    def forward(self, x):
        w = self.weight + (self.used() - self.weight).detach()  # straight through
        return F.linear(x, w, self.bias)

class LowRank(nn.Linear):
    "An update of low rank that begins with zeros"
    def __init__(self, ni, no):
        super().__init__(ni, no)
        self.a, self.b = nn.Parameter(torch.randn(2, ni)), nn.Parameter(torch.zeros(no, 2))
    def used(self): return self.weight + self.b @ self.a
    def forward(self, x): return F.linear(x, self.used(), self.bias)

class ZeroPoint(nn.Linear):
    "Quantised to steps around a zero point that is no whole step"
    def used(self): return ((self.weight - 0.033) / 0.1).round() * 0.1 + 0.033
    def forward(self, x): return F.linear(x, self.used(), self.bias)

class StdEmbedding(nn.Embedding):
    def forward(self, i): return F.embedding(i, self.weight - self.weight.mean(0))

class Transforming(nn.Linear):
    def forward(self, x): return x @ (self.weight.t() - self.weight.mean())

def rewriting():
    def standardise(m, args): m.weight.data.sub_(m.weight.data.mean())
    m = nn.Linear(6, 8)
    m.register_forward_pre_hook(standardise)
    return m

def patched():
    m = nn.Conv2d(3, 8, 3)
    m.forward = types.MethodType(lambda m, x: F.conv2d(x, m.weight - m.weight.mean(), m.bias), m)
    return m

changing = dict(std_conv=lambda: StdConv(3, 8, 3), bit=lambda: BitLinear(6, 8), low_rank=lambda: LowRank(6, 8),
                zero_point=lambda: ZeroPoint(6, 8),
                embedding=lambda: StdEmbedding(9, 4), transposed=lambda: Transforming(6, 8), hook=rewriting,
                patched=patched)

@pytest.mark.parametrize('name', changing)
def test_weights_changed_in_forward_are_refused_or_left_out(name):
    layer = changing[name]()
    net = nn.Sequential(nn.Conv1d(2, 4, 3), layer)
    refused(lambda: Sparsifier(net, layer_type=type(layer)), '1 (', type(layer).__name__, '`forward`', "exclude='1'")
    sp = Sparsifier(net, layer_type=nn.Module)
    sp.sparsify_model(50)
    assert [t.label for t in sp.targets] == ['0'] and 'forward' in sp.left_out['1'] and 'Left out:' in str(sp.report())

class Rescaled(nn.Conv2d):
    def used(self): return self.weight / self.weight.norm()
    def forward(self, x): return F.conv2d(x, self.used(), self.bias)

class NormedByHand(nn.Linear):
    def __init__(self, ni, no):
        super().__init__(ni, no)
        self.g = nn.Parameter(torch.ones(no, 1))
    def used(self): return self.g * self.weight / (self.weight.norm(dim=1, keepdim=True) + 1e-9)
    def forward(self, x): return F.linear(x, self.used(), self.bias)

class Ternary(nn.Linear):
    def used(self): return (self.weight / self.weight.abs().mean()).round().clamp(-1, 1)
    def forward(self, x): return F.linear(x, self.used(), self.bias)

class FakeQuantized(nn.Linear):
    "Zero is one of the steps, as in every scheme of torch"
    def used(self): return torch.fake_quantize_per_tensor_affine(self.weight, 0.05, 3, -128, 127)
    def forward(self, x): return F.linear(x, self.used(), self.bias)

class Merging(nn.Linear):
    "Merges an update into the weight in `eval`, as layers of low rank do"
    def train(self, mode=True):
        if not mode: self.weight.data += 1
        return super().train(mode)
    def forward(self, x): return F.linear(x, self.weight, self.bias)
    def used(self): return self.weight

keeping = dict(rescaled=lambda: Rescaled(3, 8, 3), by_hand=lambda: NormedByHand(6, 8), ternary=lambda: Ternary(6, 8),
               fake_quantized=lambda: FakeQuantized(6, 8), merging=lambda: Merging(6, 8))

@pytest.mark.parametrize('name', keeping)
def test_layers_that_keep_their_zeros_go_on_working(name):
    layer  = keeping[name]()
    before = {k: v.clone() for k,v in layer.state_dict().items()}
    sp = Sparsifier(nn.Sequential(layer), layer_type=type(layer))
    assert all(torch.equal(v, before[k]) for k,v in layer.state_dict().items()), 'the probe leaves the layer as it was'
    sp.sparsify_model(75)
    assert pct(layer.weight) == 75 and pct(layer.used()) >= 75

def test_whole_filters_stay_zero_when_they_are_standardised():
    layer = StdConv(3, 8, 3)
    refused(lambda: Sparsifier(layer, layer_type=StdConv), 'granularity "filter"')
    Sparsifier(layer, 'filter', layer_type=StdConv).sparsify_model(50)
    assert int((layer.used().abs().sum((1, 2, 3)) == 0).sum()) == 4

@pytest.mark.parametrize('kind', ['StdConv2d', 'ScaledStdConv2d'])
def test_those_of_timm(kind):
    layers = pytest.importorskip('timm.layers')
    net = nn.Sequential(getattr(layers, kind)(3, 8, 3))
    refused(lambda: Sparsifier(net), '0 (', kind, 'forward')
    Sparsifier(nn.Sequential(layers.Conv2dSame(3, 8, 3))).sparsify_model(50)  # only pads

def test_hooks_that_do_something_else_are_not_run():
    seen, layer = [], nn.Linear(4, 4)
    layer.register_forward_pre_hook(lambda m, args: seen.append(1))
    Sparsifier(layer, layer_type=nn.Linear).sparsify_model(50)
    assert not seen and pct(layer.weight) == 50


# One weight, whatever its names

class AutoEncoder(nn.Module):
    def __init__(self, tie=lambda w: w.t()):
        super().__init__()
        self.enc, self.dec = nn.Linear(20, 10, bias=False), nn.Linear(10, 20, bias=False)
        self.dec.weight.data = tie(self.enc.weight.data)
    def forward(self, x): return self.dec(F.relu(self.enc(x)))

@pytest.mark.parametrize('context', ['local', 'global', 'erk', 'lamp'])
@pytest.mark.parametrize('criterion', ['large_final', 'random', 'movement', 'gradient', 'wanda'])
def test_tied_by_memory_is_one_weight(criterion, context):
    if context == 'lamp' and criterion == 'movement': return  # scores of both signs are refused there
    net, x = AutoEncoder(), torch.rand(32, 20)
    sp = Sparsifier(net, context=context, layer_type=nn.Linear, criteria=criterion, data=[(x, x)], loss_func=F.mse_loss)
    sp.sparsify_model(50)
    assert int((net.enc.weight == 0).sum()) == 100 and len(sp.masks) == 1
    report = sp.report()
    assert (report.zeros, report.total, report.tied) == (100, 200, (('enc.weight', 'dec.weight (Linear)'),))
    assert sp.is_pruned('dec') and 'enc.weight is also dec.weight' in str(report)

def test_tied_by_memory_in_training_and_after():
    net = AutoEncoder()
    x   = torch.rand(32, 20)
    items = [(a, a) for a in x]
    learn = Learner(DataLoaders.from_dsets(items, items, bs=16, num_workers=0), net, loss_func=MSELossFlat())
    cb = SparsifyCallback(50, criteria='random', layer_type=nn.Linear, verbose=False)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=cb)
    assert int((net.dec.weight == 0).sum()) == 100 and cb.report.total == 200
    masks = Masks.of(net)
    assert list(masks) == ['enc.weight'] and (masks.n, masks.n_dropped) == (200, 100)
    for given in (None, masks, {'dec.weight': masks['enc.weight'].t().contiguous()}):
        keep = KeepSparsity(given, verbose=False)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.1, cbs=keep)
        assert int((net.enc.weight == 0).sum()) == 100 and (keep.masks.n, keep.masks.n_dropped) == (200, 100)
    assert report_tensors(net.state_dict()).params == 200

def test_other_ways_to_share_memory():
    conv, lin = nn.Conv2d(4, 6, 1, bias=False), nn.Linear(4, 6, bias=False)
    lin.weight.data = conv.weight.data.view(6, 4)
    sp = Sparsifier(nn.ModuleList([conv, lin]), criteria='random', layer_type=(nn.Conv2d, nn.Linear))
    sp.sparsify_model(50)
    assert (int((conv.weight == 0).sum()), sp.report().total) == (12, 24)

def test_slices_of_a_flat_buffer_are_weights_of_their_own():
    flat, net = torch.randn(24), nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False))
    net[0].weight.data, net[1].weight.data = flat[:12].view(4, 3), flat[12:].view(3, 4)
    sp = Sparsifier(net, layer_type=nn.Linear)
    sp.sparsify_model(50)
    assert len(sp.targets) == 2 and int((flat == 0).sum()) == 12
    net[0].weight.data, net[1].weight.data = flat.view(6, 4)[:, :2], flat.view(6, 4)[:, 2:]  # columns, side by side
    assert len(Sparsifier(net, layer_type=nn.Linear).targets) == 2

def test_weights_that_share_a_part_are_refused_by_name():
    flat, net = torch.randn(16), nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False))
    net[0].weight.data, net[1].weight.data = flat[:12].view(4, 3), flat[4:].view(3, 4)
    refused(lambda: Sparsifier(net, layer_type=nn.Linear), '0.weight', '1.weight', 'share', 'exclude')

def test_coupled_channels_of_tied_memory_are_refused_or_exact():
    net, x = AutoEncoder(), torch.rand(2, 20)
    try: sp = Sparsifier(net, 'filter', layer_type=nn.Linear, coupled=True, example_inputs=x)
    except ValueError as e: assert 'enc' in str(e)
    else:
        sp.sparsify_model(50)
        assert torch.allclose(thin(net, example_inputs=x)(x), net(x), atol=1e-6)

class LanguageModel(nn.Module):
    def __init__(self, by_memory=False):
        super().__init__()
        self.emb, self.mix, self.head = nn.Embedding(9, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 9, bias=False)
        if by_memory: self.head.weight.data = self.emb.weight.data
        else: self.head.weight = self.emb.weight
    def forward(self, x): return self.head(self.mix(self.emb(x)))

def warned(f):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        out = f()
    return out, [str(w.message) for w in said]

@pytest.mark.parametrize('by_memory', [False, True])
def test_a_tied_head_says_that_the_embedding_becomes_sparse(by_memory):
    net = LanguageModel(by_memory)
    sp, said = warned(lambda: Sparsifier(net, layer_type=nn.Linear))
    assert len(said) == 1 and all(s in said[0]
                                  for s in ('head.weight', 'emb.weight (Embedding)', "exclude='head'")), said
    sp.sparsify_model(50)
    assert 'head.weight is also emb.weight (Embedding), which was not chosen' in str(sp.report())
    assert sp.report().total == 72 + 64
    assert warned(lambda: Sparsifier(net, layer_type=nn.Linear, exclude='head'))[1] == []
    assert warned(lambda: Sparsifier(net, layer_type=nn.Module))[1] == []  # both were chosen
    assert len(warned(lambda: Sparsifier(net, layer_type=nn.Module, exclude='emb'))[1]) == 1


# All that can be

def everything():
    return nn.ModuleDict(dict(conv=nn.Conv2d(3, 8, 3), lin=nn.Linear(6, 8), emb=nn.Embedding(9, 6), lstm=nn.LSTM(4, 6),
                              attn=nn.MultiheadAttention(8, 2)))

@pytest.mark.parametrize('granularity, has', [('filter', {'conv', 'lin', 'attn.out_proj'}), ('kernel', {'conv'}),
                                              ('head', {'attn'}), ('unit', {'lstm'}),
                                              ('vertical_slice', {'conv'}), ('block_9x3', {'emb'})])
def test_all_that_can_be_leaves_out_what_has_no_such_granularity(granularity, has):
    net = everything()
    sp  = Sparsifier(net, granularity, layer_type=nn.Module)
    assert {t.layer for t in sp.targets} == has and set(sp.left_out) - {'attn.out_proj'} == set(net) - has
    sp.sparsify_model(50)
    text = str(sp.report())
    assert 'Left out:' in text and all(re.search(rf'^  .*{k}.*: ', text, re.M) for k in sp.left_out)
    if granularity == 'filter': assert sp.left_out['emb'] == "Embedding has no granularity 'filter'"
    refused(lambda: Sparsifier(net, granularity, layer_type=(nn.Conv2d, nn.Linear, nn.Embedding, nn.LSTM)), granularity)

def test_a_pattern_leaves_out_what_has_other_sizes():
    net = everything()
    sp  = Sparsifier(net, nm=(2, 4), layer_type=nn.Module)
    assert {t.layer for t in sp.targets} == {'lstm', 'attn'}
    assert sp.left_out['conv'] == 'it has 3 inputs, not a multiple of 4'
    refused(lambda: Sparsifier(net, nm=(2, 4), layer_type=nn.Linear), '`nm`', 'lin', '6 inputs', 'exclude')

def test_where_nothing_can_be_that_is_an_error():
    refused(lambda: Sparsifier(nn.Sequential(nn.Embedding(4, 4), nn.LSTM(4, 4)), 'filter', layer_type=nn.Module),
            "0: Embedding has no granularity 'filter'", '1: LSTM')
    refused(lambda: Sparsifier(nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 4)), nm=True, layer_type=nn.Module),
            '`nm`', '3 inputs')

class Pooled(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.hidden, self.out = body, nn.Linear(16, 12), nn.Linear(12, 2)
    def forward(self, x):
        x = self.body(x)
        x = x[0] if isinstance(x, tuple) else x
        return self.out(F.relu(self.hidden(x.mean(1))))

bodies = dict(embedding=lambda: (nn.Embedding(10, 16), torch.randint(0, 10, (16, 5))),
              gru=lambda: (nn.GRU(8, 16, batch_first=True), torch.rand(16, 5, 8)),
              attention=lambda: (nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), torch.rand(16, 5, 16)))

@pytest.mark.parametrize('name', bodies)
def test_prune_callback_takes_what_has_filters(name, capsys):
    body, x = bodies[name]()
    items = [(t, torch.tensor(i % 2)) for i,t in enumerate(x)]
    learn = Learner(DataLoaders.from_dsets(items, items, bs=8, num_workers=0), Pooled(body),
                    loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=PruneCallback(50))
    assert learn.model.hidden.out_features == 6
    said = capsys.readouterr().out
    assert re.search(r"body\S* keeps all: \w+ has no granularity 'filter'", said), said


# Optimizers that wrap others

class Wrapped(torch.optim.Optimizer):
    "Skips `super().__init__`"
    def __init__(self, inner): self.inner = inner
    param_groups = property(lambda self: self.inner.param_groups)
    state        = property(lambda self: self.inner.state)
    def step(self, closure=None): return self.inner.step(closure)

class Plain:
    "No `torch.optim.Optimizer` at all"
    def __init__(self, inner): self.optimizer = inner
    def step(self): self.optimizer.step()

class Lookahead(torch.optim.Optimizer):
    "Writes to the weights after the step of the inner one"
    def __init__(self, inner):
        self.optimizer    = inner
        self.param_groups = inner.param_groups
        self.state        = inner.state
        self.defaults     = inner.defaults
        self.slow = [p.detach().clone() for g in self.param_groups for p in g['params']]
    def step(self, closure=None):
        self.optimizer.step(closure)
        for s,p in zip(self.slow, (p for g in self.param_groups for p in g['params'])):
            s.add_(p.detach() - s, alpha=0.5)
            p.data.copy_(s)

class Sam(torch.optim.Optimizer):
    "Steps from a place nearby, as sharpness-aware minimisation does"
    def __init__(self, params, make):
        super().__init__(params, dict(rho=0.1))
        self.base_optimizer = make(self.param_groups)
        self.param_groups   = self.base_optimizer.param_groups
    def step(self, closure=None):
        ps = [p for g in self.param_groups for p in g['params'] if p.grad is not None]
        for p in ps: p.data.add_(0.1)
        for p in ps: p.data.sub_(0.1)
        self.base_optimizer.step()
        for p in ps: p.data.add_(1e-3)  # a decay of its own

class Several(torch.optim.Optimizer):
    def __init__(self, *optimizers): self.optimizers = list(optimizers)
    def step(self, closure=None):
        for o in self.optimizers: o.step()

def two(ps):
    ps = list(ps)
    return Several(torch.optim.SGD(ps[:2], 0.1, momentum=0.9), torch.optim.Adam(ps[2:], 0.1))

def adam(ps): return torch.optim.AdamW(ps, 0.1)
def accelerated(ps):
    accelerate = pytest.importorskip('accelerate')
    return accelerate.Accelerator(cpu=True).prepare(adam(ps))

wrappers = dict(skips_init=lambda ps: Wrapped(adam(ps)), plain=lambda ps: Plain(adam(ps)),
                lookahead=lambda ps: Lookahead(adam(ps)),
                sam=lambda ps: Sam(ps, adam), nested=lambda ps: Wrapped(Lookahead(adam(ps))), several=two,
                accelerate=accelerated)

def small(): return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

def steps(net, opt, n=3):
    for _ in range(n):
        net(torch.rand(4, 8)).sum().backward()
        opt.step()

@pytest.mark.parametrize('by', ['sparsifier', 'masks'])
@pytest.mark.parametrize('name', wrappers)
def test_zeros_hold_after_steps_of_wrappers(name, by):
    net = small()
    opt = wrappers[name](net.parameters())
    sp  = Sparsifier(net, layer_type=nn.Linear)
    sp.sparsify_model(50)
    own = {k: v for k,v in vars(opt).items() if k != 'slow'}
    with (sp.hold(opt) if by == 'sparsifier' else sp.masks.hold(net, opt)):
        steps(net, opt)
        assert sp.sparsity == 50
    left = {k: v for k,v in vars(opt).items() if k != 'slow'}
    assert left.keys() == own.keys() and 'step' not in left, 'nothing is left behind'
    steps(net, opt)
    assert sp.sparsity < 50

@pytest.mark.parametrize('name', ['skips_init', 'lookahead', 'accelerate'])
@pytest.mark.parametrize('first', ['scheduler', 'hold'])
def test_schedulers_and_holds_in_any_order(name, first):
    net = small()
    opt = wrappers[name](net.parameters())
    sp  = Sparsifier(net, layer_type=nn.Linear)
    sp.sparsify_model(50)
    def schedule(): return torch.optim.lr_scheduler.StepLR(stepping_optimizer(opt), 1, 0.5)
    sched = schedule() if first == 'scheduler' else None
    held  = sp.hold(opt)
    sched = sched or schedule()
    steps(net, opt, 1)
    sched.step()
    assert sp.sparsity == 50 and sched.get_last_lr() == [0.05]
    held.release()
    steps(net, opt, 1)
    assert sp.sparsity < 50

def test_sums_of_gradients_are_taken_once_with_several_optimizers():
    net = small()
    opt = two(net.parameters())
    sp  = Sparsifier(net, criteria='gradient', layer_type=nn.Linear)
    with sp.hold(opt):
        net(torch.rand(4, 8)).sum().backward()
        w, g = net[2].weight.detach().clone(), net[2].weight.grad.clone()
        opt.step()
    assert torch.allclose(sp.refs['2.weight'], sp.criteria.step_fn(w, g))

def test_what_steps_inside_or_a_refusal_by_name():
    class Closed:
        def step(self): pass
    sp, net = Sparsifier(small(), layer_type=nn.Linear), small()
    refused(lambda: sp.hold(Closed()), 'Closed', kind=TypeError)
    empty = Wrapped(None)
    refused(lambda: sp.hold(empty), 'Wrapped', kind=TypeError)
    inner = adam(net.parameters())
    assert stepping_optimizer(Wrapped(Wrapped(inner))) is inner
    assert 'Lookahead wraps AdamW' in why_not_compact(Lookahead(inner)) and why_not_compact(inner) is None
    refused(lambda: sp.hold(Lookahead(inner), compact=True), 'Lookahead', kind=TypeError)

def test_compact_steps_inside_of_accelerates_optimizer():
    net = small()
    opt = accelerated(net.parameters())
    sp  = Sparsifier(net, layer_type=nn.Linear)
    sp.sparsify_model(50)
    with sp.hold(opt, compact=True): steps(net, opt)
    assert sp.sparsity == 50

def digits_of_two(n=16): return [(torch.rand(8), torch.tensor(i % 2)) for i in range(n)]

def test_a_lookahead_inside_of_fastais_wrapper(capsys):
    class Complete(Lookahead):
        def __init__(self, inner):
            torch.optim.Optimizer.__init__(self, inner.param_groups, {})
            super().__init__(inner)
    def opt_func(params, **kwargs): return OptimWrapper(opt=Complete(adam(L(params).concat())))
    def learner():
        items = digits_of_two()
        return Learner(DataLoaders.from_dsets(items, items, bs=8, num_workers=0), small(),
                       loss_func=CrossEntropyLossFlat(), opt_func=opt_func)
    learn = learner()
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, 0.1, cbs=SparsifyCallback(50, schedule=one_shot, layer_type=nn.Linear, compact=True))
    assert all(pct(learn.model[i].weight) == 50 for i in (0, 2))
    assert 'Complete wraps AdamW' in capsys.readouterr().out  # why steps stay dense
    refused(lambda: learner().fit(1, 0.1, cbs=PruneCallback(50, verbose=False)), 'Complete wraps AdamW')

@pytest.mark.parametrize('how', ['before', 'callback'])
def test_trainer_of_hugging_face(how, tmp_path):
    T = pytest.importorskip('transformers')
    config = T.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    net, ids = T.GPT2LMHeadModel(config), torch.randint(20, (8, 6))
    args = T.TrainingArguments(str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[],
                               save_strategy='no', use_cpu=True, learning_rate=0.1, disable_tqdm=True)
    sp = Sparsifier(net, layer_type='Conv1D')
    sp.sparsify_model(50)
    class Keep(T.TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs): self.held = sp.hold(optimizer)
    trainer = T.Trainer(net, args, train_dataset=[dict(input_ids=i, labels=i) for i in ids],
                        callbacks=[Keep()] if how == 'callback' else [])
    if how == 'before':
        trainer.create_optimizer()
        sp.hold(trainer.optimizer)
    before = net.transformer.h[0].mlp.c_fc.weight.detach().clone()
    trainer.train()
    after = net.transformer.h[0].mlp.c_fc.weight
    assert not torch.equal(before, after) and all(r.sparsity == 50 for r in sp.report().rows)


# Checkpoints

def dense(): return nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 2))
def zeroed():
    m = dense()
    m[0].weight.data[:5] = 0
    return m.state_dict()
def by_prune():
    m = dense()
    prune.l1_unstructured(m[0], 'weight', 0.5)
    return m.state_dict()
def by_ao():
    "Masks as buffers of a parametrization"
    m = dense()
    state = {k: v for k,v in m.state_dict().items() if k != '0.weight'}
    w = m[0].weight.detach()
    return state | {'0.parametrizations.weight.original': w,
                    '0.parametrizations.weight.0.mask': (w.abs() > w.abs().median()).float()}

adam_state = {'state': {0: {'exp_avg': torch.zeros(10, 20)}}, 'param_groups': [{'lr': 0.1}]}
saved = {'plain': zeroed, 'prune': by_prune, 'ao': by_ao,
         **{k: partial(lambda k: {'epoch': 3, 'loss': torch.tensor(.3), 'optimizer': adam_state, k: zeroed()}, k)
         for k in ('state_dict', 'model', 'model_state_dict', 'net', 'module', 'ema', 'my_own_name')},
         'two levels': lambda: {'ema': {'module': zeroed(), 'decay': 0.99}},
         'three levels': lambda: {'checkpoint': {'ema': {'module': zeroed()}}},
         'masked, one level down': lambda: {'state_dict': by_prune()},
         'lightning': lambda: {'state_dict': {f'model.{k}': v for k,v in by_prune().items()},
                               'optimizer_states': [adam_state], 'callbacks': {'best': zeroed()}},
         'distributed': lambda: {'model': {f'module.{k}': v for k,v in by_ao().items()}, 'optimizer': adam_state}}

@pytest.mark.parametrize('name', saved)
def test_report_counts_the_weights_that_are_used(name, tmp_path):
    torch.save(state := saved[name](), file := tmp_path/'x.pth')
    for r in (report_tensors(load_tensors(file)), report_tensors(state)):
        assert (r.zeros, r.params) == (100, 220)
        assert {tuple(row.name.split('.')[-2:]) for row in r.rows} == {('0', 'weight'), ('2', 'weight')}

def test_of_several_candidates_it_is_said_which_was_taken(tmp_path, capsys):
    torch.save(dict(ema=dense().state_dict(), model=zeroed(), optimizer=adam_state), file := tmp_path/'x.pth')
    sparsity_report.__wrapped__(file)
    out = capsys.readouterr().out
    assert out.startswith('Counted: model. The file also has ema') and '100 ' in out
    sparsity_report.__wrapped__(file, entry='ema')
    assert '100 ' not in capsys.readouterr().out.split('Overall')[1].split('Covers')[0]
    with pytest.warns(UserWarning, match='Read: model.*ema'): load_tensors(file)
    with pytest.raises(SystemExit, match="'emma'.*Did you mean 'ema'"): sparsity_report.__wrapped__(file, entry='emma')

def test_masks_that_are_not_in_the_file_are_not_made_up():
    from torch.ao.pruning import WeightNormSparsifier
    sp = WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 1), zeros_per_block=1)
    sp.prepare(m := dense(), [{'tensor_fqn': '0.weight'}])
    sp.step()
    text = str(report_tensors(m.state_dict()))  # torch saves the weight without its mask
    assert '0.parametrizations.weight.original' in text and 'squash_mask' in text
    sp.squash_mask()
    assert report_tensors(m.state_dict()).zeros == 100

def test_tied_tensors_of_a_checkpoint_are_counted_once(tmp_path):
    torch.save(LanguageModel().state_dict(), file := tmp_path/'x.pth')
    assert report_tensors(load_tensors(file)).params == 72 + 64


# Refusals that are true and show the way

class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4))
    def forward(self, x): return x @ self.kernel

def test_parameters_of_other_names():
    net = nn.Sequential(Mixer(), nn.Linear(4, 4))
    for own in ({}, dict(params='kernel'), dict(params=['kern*'])):
        refused(lambda: Sparsifier(net, layer_type=Mixer, **own), '0 (Mixer)', 'kernel (4×4)',
                'Granularities.add_granularity(Mixer', "param='kernel'")
    refused(lambda: Sparsifier(net, layer_type=(nn.Linear, Mixer)), '0 (Mixer)', 'add_granularity')
    refused(lambda: Sparsifier(net, layer_type=nn.Linear, params='kernel'), "'kernel'", 'weight, bias')
    builtin = Granularities.layouts
    try:
        # what the message says
        Granularities.add_granularity(Mixer, dict(weight=(), row=(1,), column=(0,)), param='kernel')
        sp = Sparsifier(net, layer_type=Mixer)
        sp.sparsify_model(50)
        assert pct(net[0].kernel) == 50
    finally: Granularities.layouts = builtin

class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.ws = nn.ParameterList([torch.randn(4, 4), torch.randn(4, 4)])
    def forward(self, x): return x @ self.ws[0] @ self.ws[1]

def test_parameters_in_a_list():
    refused(lambda: Sparsifier(nn.Sequential(Listed()), layer_type=Listed), '0 (Listed)', 'ws.0 (4×4), ws.1 (4×4)',
            'add_granularity(Listed')
    builtin = Granularities.layouts
    try:
        Granularities.add_granularity(Listed, dict(weight=()), param='ws.*')
        Sparsifier(net := nn.Sequential(Listed()), layer_type=Listed).sparsify_model(50)
        assert [pct(w) for w in net[0].ws] == [50, 50]
    finally: Granularities.layouts = builtin

@pytest.mark.parametrize('cell, gates', [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
def test_cells_split_as_recurrent_layers(cell, gates):
    m = cell(5, 6)
    sp = Sparsifier(nn.Sequential(m), layer_type=cell)
    sp.sparsify_model(50)
    assert (pct(m.weight_ih), pct(m.weight_hh)) == (50, 50)
    m = cell(5, 6)
    Sparsifier(m, 'unit', layer_type=cell).sparsify_model(50)
    assert all((p.view(gates, 6, -1) == 0).all(2).sum() == 3*gates for p in m.parameters())
    h = m(torch.rand(2, 5))
    assert int(((h[0] if isinstance(h, tuple) else h) == 0).all(0).sum()) == 3
    for g in ('row', 'column'): Sparsifier(cell(5, 6), g, layer_type=nn.Module).sparsify_model(50)

def test_bilinear_and_embedding_bag():
    m = nn.Bilinear(3, 4, 6)
    Sparsifier(m, 'filter', layer_type=nn.Bilinear).sparsify_model(50)
    assert int((m(torch.rand(2, 3), torch.rand(2, 4)) == 0).all(0).sum()) == 3
    Sparsifier(bag := nn.EmbeddingBag(6, 4), 'row', layer_type=nn.EmbeddingBag).sparsify_model(50)
    assert int((bag.weight == 0).all(1).sum()) == 3

def test_containers_say_where_their_weights_are():
    T = pytest.importorskip('transformers')
    net = T.LlamaForCausalLM(T.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                           num_attention_heads=4, num_key_value_heads=2))
    refused(lambda: Sparsifier(net, layer_type='LlamaAttention'),
                'Attention has no weights of its own', 'q_proj, k_proj, v_proj, o_proj',
                # in old versions of transformers it is a LlamaSdpaAttention
                'Linear', "include='model.layers.0.self_attn.*'")
    refused(lambda: Sparsifier(net, 'head', layer_type='LlamaAttention'), "'head' needs inputs", 'example_inputs')
    sp = Sparsifier(net, layer_type=nn.Linear, include='model.layers.0.self_attn.*')  # what the message says
    assert [t.layer.split('.')[-1] for t in sp.targets] == ['q_proj', 'k_proj', 'v_proj', 'o_proj']
    refused(lambda: Sparsifier(net, layer_type=nn.Linear, include='model.layers'), "'model.layers'", "'model.layers.*'")
    refused(lambda: Sparsifier(net, layer_type=nn.Linear, exclude='model'), "'model.*'")
    refused(lambda: Sparsifier(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), layer_type=nn.ReLU), 'ReLU has none')

def test_filters_of_all_that_can_be_in_llama():
    T = pytest.importorskip('transformers')
    net = T.LlamaForCausalLM(T.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                           num_attention_heads=4, num_key_value_heads=2))
    net = net.double().eval()
    ids = torch.randint(32, (2, 6))
    sp  = Sparsifier(net, 'filter', layer_type=nn.Module, coupled=True, example_inputs=dict(input_ids=ids),
                     exclude='*.self_attn.*')
    sp.sparsify_model(50)
    assert "Embedding has no granularity 'filter'" in sp.left_out['model.embed_tokens']
    out = thin(net, example_inputs=dict(input_ids=ids))
    assert out.model.layers[0].mlp.gate_proj.out_features == 12 and torch.allclose(out(ids).logits, net(ids).logits)

def awd(**kwargs):
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
    from fastai.text.models.core import get_language_model
    return get_language_model(AWD_LSTM, 30, dict(awd_lstm_lm_config, emb_sz=12, n_hid=10, n_layers=2))

@pytest.mark.parametrize('trained', [False, True])
def test_awd_lstm_becomes_sparse_in_the_weights_it_keeps(trained):
    net, x = awd(), torch.randint(30, (2, 7))
    if trained: net(x)[0].sum().backward()
    sp = Sparsifier(net, layer_type=nn.LSTM)
    sp.sparsify_model(50)
    names = [t.name for t in sp.targets]
    assert '0.rnns.0.weight_hh_l0_raw' in names and '0.rnns.0.module.weight_ih_l0' in names and len(names) == 4
    assert all(r.sparsity == 50 for r in sp.report().rows)
    for mode in (True, False):
        net.train(mode)
        net.reset()
        net(x)
        raw, used = net[0].rnns[0].weight_hh_l0_raw, net[0].rnns[0].module.weight_hh_l0
        assert int(((raw == 0) & (used != 0)).sum()) == 0 and pct(used) >= 50

def test_units_of_awd_lstm():
    net = awd()
    sp = Sparsifier(net, 'unit', layer_type=nn.LSTM)
    sp.sparsify_model(50)
    raw = net[0].rnns[0].weight_hh_l0_raw
    assert int((raw.view(4, 10, 10) == 0).all(2).all(0).sum()) == 5
    assert pytest.approx(50) == 100 * int((raw == 0).sum()) / raw.numel()

def test_fastais_language_model_learner_just_works():
    from fastai.text.all import LMDataLoader, rnn_cbs
    from fastai.data.core import DataLoaders as DLs
    text = [torch.randint(30, (40,)) for _ in range(4)]
    dl   = LMDataLoader([(t,) for t in text], bs=2, seq_len=8, lens=[40]*4)
    learn = Learner(DLs(dl, dl), awd(), loss_func=CrossEntropyLossFlat())
    learn.add_cbs(rnn_cbs(2, 1))
    cb = SparsifyCallback(60, layer_type=(nn.LSTM, nn.Linear), verbose=False)
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(2, 1e-2, cbs=cb)
    assert all(r.zeros == int(0.6 * r.params + 1e-9) for r in cb.report.rows)
    assert any(r.name == '0.rnns.0.weight_hh_l0_raw' for r in cb.report.rows)

class OldWeightDrop(nn.Module):
    "The first published form: the raw weight stays in the LSTM"
    def __init__(self, lstm):
        super().__init__()
        self.module, w = lstm, lstm.weight_hh_l0
        del lstm._parameters['weight_hh_l0']
        lstm.register_parameter('weight_hh_l0_raw', nn.Parameter(w.data))
        self._set()
    def _set(self): setattr(self.module, 'weight_hh_l0', F.dropout(self.module.weight_hh_l0_raw, 0.3, self.training))
    def forward(self, x):
        self._set()
        return self.module(x)

def test_other_forms_of_weight_dropout():
    net = OldWeightDrop(nn.LSTM(4, 5))
    Sparsifier(net, layer_type=nn.LSTM).sparsify_model(50)
    assert pct(net.module.weight_hh_l0_raw) == 50 and pct(net.module.weight_ih_l0) == 50

def test_weights_that_are_not_there():
    net = small()
    meta = small().to('meta')
    for f in (lambda: Sparsifier(meta, layer_type=nn.Linear), lambda: Sparsifier(meta, layer_type=nn.Module),
              lambda: Masks.of(meta),
              lambda: thin(meta, example_inputs=torch.rand(1, 8, device='meta')),
              lambda: report_tensors(meta.state_dict())):
        refused(f, 'weight', '"meta"', 'load_state_dict(..., assign=True)', kind=ValueError)
    sp = Sparsifier(net, layer_type=nn.Linear)
    sp.sparsify_model(50)
    masks = Masks(dict(sp.masks))
    net.to('meta')
    for f in (sp.report, sp.apply_masks, lambda: sp.sparsify_model(60),
              lambda: sp.hold(torch.optim.SGD(net.parameters(), 0.1)),
              lambda: masks.apply(meta), lambda: masks.hold(meta, torch.optim.SGD(meta.parameters(), 0.1)),
              sp.print_sparsity):
        refused(f, '0.weight', '"meta"', kind=ValueError)

def test_offloaded_by_accelerate():
    accelerate = pytest.importorskip('accelerate')
    net = accelerate.cpu_offload(small(), torch.device('cpu'))
    refused(lambda: Sparsifier(net, layer_type=nn.Linear), '"meta"', 'remove_hook_from_module', kind=ValueError)
    accelerate.hooks.remove_hook_from_module(net, recurse=True)  # what the message says

def test_lazy_and_quantized_layers():
    refused(lambda: Sparsifier(nn.Sequential(nn.LazyLinear(3)), layer_type=nn.Linear), 'no shape yet', 'run one batch')
    refused(lambda: Sparsifier(nn.Sequential(nn.LazyLinear(3)), layer_type=nn.Conv2d), 'LazyLinear (1)')
    sp = Sparsifier(nn.Sequential(nn.Conv2d(1, 2, 3), nn.LazyLinear(3)))
    sp.sparsify_model(50)
    assert sp.report().zeros == 9
    whole = nn.Linear(4, 4)
    whole.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    net = nn.Sequential(whole, nn.Linear(4, 4))
    refused(lambda: Sparsifier(net, layer_type=nn.Linear), '0 (Linear)', 'int8')
    sp = Sparsifier(net, layer_type=nn.Module)
    assert [t.layer for t in sp.targets] == ['1'] and 'int8' in sp.left_out['0']
