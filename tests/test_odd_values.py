"""Odd numbers and odd weights: what a stopped batch leaves, NaN and infinity under a mask, weights that cannot be
masked

A dropped weight is zero whatever stood there; what cannot be sparsified is refused by name before anything changes."""
import math, warnings
from functools import partial

import pytest, torch, torch.nn as nn
from fastai.basics import (Callback, CancelBatchException, CancelFitException, DataLoader, DataLoaders, Learner,
                           OptimWrapper, set_seed)
from fastai.callback.training import GradientAccumulation
from torch.nn.utils import prune

from fasterai_clone.core.criteria import Criteria, identity
from fasterai_clone.core.tensors import why_not_writable
from fasterai_clone.core.masks import Masks, clear_dropped, zero_dropped
from fasterai_clone.prune.all import PruneCallback
from fasterai_clone.sparse.scorer import Scorer
from fasterai_clone.sparse.all import KeepSparsity, Sparsifier, SparsifyCallback, gradient, lin, one_shot, wanda
from fasterai_clone.sparse.compact import CompactStep

NAN, INF = math.nan, math.inf

def network(): return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))

def learner(**kwargs):
    "Four batches of four an epoch; loaders shuffle"
    set_seed(0)
    items = [(x, (x.sum() > 0).long()) for x in torch.randn(20, 4)]
    dls   = DataLoaders(DataLoader(items[:16], bs=4, shuffle=True), DataLoader(items[16:], bs=4))
    return Learner(dls, network(), loss_func=nn.CrossEntropyLoss(), path='.', **kwargs)

def fit(learn, *cbs, n=3, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-2, cbs=list(cbs), **kwargs)
    return learn

def state(learn): return {k: v.detach().clone() for k,v in learn.model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def sparsify(**kwargs): return SparsifyCallback(50, layer_type=nn.Linear, schedule=lin, verbose=False, **kwargs)
def grads(model): return [p.grad for p in model.parameters() if p.grad is not None and p.grad.any()]

# 6. What a stopped batch leaves

class SaveEpoch(Callback):
    order = 61
    def after_epoch(self): self.learn.save(f'e{self.epoch}', with_opt=True)

class Stop(Callback):
    "Raises `error` at `event` of the third batch of epoch 1"
    def __init__(self, event, error, order=0):
        self.error, self.order = error, order
        setattr(self, event, self.stop)
    def stop(self):
        if self.epoch == 1 and self.training and self.iter == 2: raise self.error('stop')

KINDS = dict(sparsify=sparsify, gradient=partial(sparsify, criteria=gradient), wanda=partial(sparsify, criteria=wanda),
             compact=lambda: SparsifyCallback(50, layer_type=nn.Linear, schedule=one_shot, end_epoch=1, start_epoch=1,
                                              compact=True, verbose=False),
             prune=lambda: PruneCallback(50, schedule=one_shot, verbose=False))
STOPS = dict(ctrl_c=('after_backward', KeyboardInterrupt), error=('before_step', RuntimeError),
             cancel_batch=('before_step', CancelBatchException),
             cancel_fit=('after_backward', CancelFitException), in_update=('after_step', KeyboardInterrupt))

@pytest.mark.parametrize('kind,stop,extra', [
    *[('sparsify', s, ()) for s in STOPS], *[(k, 'ctrl_c', ()) for k in KINDS if k != 'sparsify'],
    ('prune', 'cancel_fit', ()),
    ('sparsify', 'ctrl_c', (partial(GradientAccumulation, 8),)),
    ('gradient', 'error', (partial(GradientAccumulation, 8),))])
def test_the_same_learner_goes_on_like_a_new_one(kind, stop, extra):
    "Ctrl-C after `backward` of the third batch of epoch 1; then epochs 1 and 2 again from the checkpoint of epoch 0"
    def cbs(): return [KINDS[kind](), *(f() for f in extra)]
    event, error = STOPS[stop]
    want, learn = state(fit(learner(), *cbs())), learner()
    try: fit(learn, *cbs(), SaveEpoch(), Stop(event, error, order=16 if stop == 'in_update' else -1))
    except (KeyboardInterrupt, RuntimeError): pass
    if stop in ('ctrl_c', 'error', 'cancel_fit'): assert grads(learn.model)
    assert same(want, state(fit(learner().load('e0'), *cbs(), start_epoch=1)))
    learn.load('e0')
    assert not grads(learn.model)
    assert same(want, state(fit(learn, *cbs(), start_epoch=1)))

def test_torch_optimizers_too():
    make = partial(OptimWrapper, opt=torch.optim.SGD)
    want, learn = state(fit(learner(opt_func=make), sparsify())), learner(opt_func=make)
    with pytest.raises(KeyboardInterrupt):
        fit(learn, sparsify(), SaveEpoch(), Stop('after_backward', KeyboardInterrupt))
    assert same(want, state(fit(learn.load('e0'), sparsify(), start_epoch=1)))

@pytest.mark.parametrize('cb', [sparsify, lambda: KeepSparsity({'0.weight': torch.rand(8, 4) > 0.5}, verbose=False),
                                lambda: PruneCallback(50, schedule=one_shot, verbose=False)])
def test_a_fit_begins_without_gradients(cb):
    """The gradients of a batch that was stopped by hand: a first step by SGD without momentum or decay is made of the
    new batch alone"""
    ends = []
    for stale in (False, True):
        learn = learner()
        learn.create_opt()
        if stale: learn.model(torch.randn(3, 4)).sum().backward()
        set_seed(1)
        ends.append(state(fit(learn, cb(), n=1)))
    assert same(*ends)

def test_refused_before_the_first_batch_leaves_gradients_alone():
    learn = learner()
    learn.model(torch.ones(3, 4)).sum().backward()
    with pytest.raises(ValueError): fit(learn, SparsifyCallback(50, layer_type=nn.Conv2d))
    assert grads(learn.model)

def test_observed_batch_of_a_stopped_update_is_forgotten(monkeypatch):
    "Ctrl-C while a criterion measures: the next fit with the same callback measures with its own batch only"
    learn, cb, n = learner(), sparsify(criteria=wanda), []
    measure = Scorer.measure
    def stopped(self, *args):
        n.append(len(self.seen))
        if len(n) == 3: raise KeyboardInterrupt
        return measure(self, *args)
    monkeypatch.setattr(Scorer, 'measure', stopped)
    with pytest.raises(KeyboardInterrupt): fit(learn, cb)
    fit(learn, cb)
    assert set(n) == {1}

@pytest.mark.parametrize('cb', [sparsify, lambda: KeepSparsity({'0.weight': torch.rand(8, 4) > 0.5}, verbose=False)])
@pytest.mark.parametrize('error', [KeyboardInterrupt, CancelFitException])
def test_autocast_is_off_again(cb, error):
    """As fastai's `MixedPrecision` does, enter before the forward pass and leave after the loss: here the batch is
    stopped in between"""
    class Half(Callback):
        order = 10
        def before_batch(self):
            self.cast = torch.autocast('cpu', torch.bfloat16)
            self.cast.__enter__()
        def after_loss(self): self.cast.__exit__(None, None, None)
    learn = learner()
    try: fit(learn, cb(), Half(), Stop('after_pred', error))
    except KeyboardInterrupt: pass
    assert not torch.is_autocast_enabled('cpu') and learn.model[0](torch.ones(1, 4)).dtype == torch.float32
    assert torch.autocast_increment_nesting() == 1 and torch.autocast_decrement_nesting() == 0
    with torch.autocast('cpu', torch.bfloat16):
        fit(learn, cb(), n=1)
        assert torch.is_autocast_enabled('cpu')  # the user's own stays

def test_rewind_forgets_half_accumulated_gradients():
    """Three batches of four are left over at the end of each epoch: after the rewind the count and the gradients begin
    anew"""
    seen, learn = [], learner()
    acc = GradientAccumulation(20)
    def look(self): seen.append((acc.count, len(grads(self.learn.model))))
    cb = SparsifyCallback(50, layer_type=nn.Linear, schedule=one_shot, start_epoch=0, end_epoch=2,
                          lth=True, verbose=False)
    late = Callback(after_train=look)
    late.order = 99
    fit(learn, cb, acc, late)
    assert (0, 0) in seen and any(n for _,n in seen)

# 9. NaN and infinity under a mask

@pytest.mark.parametrize('bad', [NAN, INF, -INF, 3., -3.])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn,
                                   torch.complex64, torch.complex128, torch.int32])
@pytest.mark.parametrize('layout', ['contiguous', 'transposed', 'strided'])
def test_zero_dropped_whatever_stands_there(bad, dtype, layout):
    if not (dtype.is_floating_point or dtype.is_complex) and not math.isfinite(bad): bad = 7
    t = torch.full((6, 4), bad).to(dtype)
    if layout == 'transposed': t = t.T
    if layout == 'strided':    t = torch.full((6, 8), bad).to(dtype)[:, ::2]
    mask = torch.arange(24).reshape(t.shape) % 3 == 0
    # a byte can always be indexed
    def bits(t): return t.contiguous().view(torch.uint8).reshape(*t.shape, t.element_size())
    kept = bits(t)[mask].clone()
    with warnings.catch_warnings(action='error'): zero_dropped(t, mask)
    assert not bits(t)[~mask].any()          # +0.0, not −0.0
    assert torch.equal(bits(t)[mask], kept)

def spoil(p, mask, bad):
    "A dropped weight becomes no number"
    with torch.no_grad(): p.view(-1)[int((~mask).flatten().nonzero()[0])] = bad

CRITERIA = ['random', 'large_final', 'squared_final', 'movement', 'updating_movement', lambda w: w.abs(), 'large_init']

@pytest.mark.parametrize('bad', [NAN, INF])
@pytest.mark.parametrize('criteria', CRITERIA)
@pytest.mark.parametrize('context', ['local', 'global', 'erk'])
def test_updates_go_on_if_only_dropped_weights_are_spoilt(bad, criteria, context):
    model = network()
    sp = Sparsifier(model, 'weight', context, criteria, layer_type=nn.Linear)
    for s,n in ((30, 26), (50, 46), (75, 69), (25, 23)):  # of 32, 48 and 12 weights; 30 % of each are 9, 14 and 3
        sp.sparsify_model(s)
        assert sp.masks.n_dropped == n + (context != 'local' and s == 30)  # 27 of 92
        assert all(p.isfinite().all() for p in model.parameters())
        assert all(not p[~sp.masks[k]].any() for k,p in model.named_parameters() if k in sp.masks)
        if not sp.masks['2.weight'].all(): spoil(model[2].weight, sp.masks['2.weight'], bad)

def test_spoilt_gradients_and_sums_of_dropped_weights():
    "The criterion's own sums are cleared where a weight is dropped"
    model = network()
    sp = Sparsifier(model, criteria=gradient, layer_type=nn.Linear)
    def step():
        model.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        if sp.masks: spoil(model[0].weight.grad, sp.masks['0.weight'], INF)
        sp.accumulate_gradients()
    for s in (25, 50):
        step()
        sp.sparsify_model(s)
    assert int((model[0].weight == 0).sum()) == 16 and sp.sparsity == 50

def test_what_is_kept_is_still_refused_by_name_and_nothing_changes():
    model = network()
    sp = Sparsifier(model, layer_type=nn.Linear)
    sp.sparsify_model(30)
    masks, n = Masks(sp.masks), sp.updates
    with torch.no_grad(): model[2].weight[tuple(sp.masks['2.weight'].nonzero()[0])] = INF
    before = {k: p.detach().clone() for k,p in model.named_parameters()}
    with pytest.raises(ValueError, match='2.weight.*diverged'): sp.sparsify_model(50)
    assert sp.masks == masks and sp.updates == n and all(torch.equal(before[k], p) for k,p in model.named_parameters())

@pytest.mark.parametrize('compact', [False, True])
@pytest.mark.parametrize('opt', [partial(torch.optim.SGD, lr=0.1, momentum=0.9), partial(torch.optim.AdamW, lr=0.1)])
def test_hold_keeps_zeros_through_spoilt_gradients(opt, compact):
    "A gradient of a dropped weight is infinite, so its momentum is no number either"
    model = network()
    sp = Sparsifier(model, layer_type=nn.Linear)
    sp.sparsify_model(50)
    with sp.hold(opt := opt(model.parameters()), compact=compact):
        for i in range(3):
            opt.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            if i == 1: spoil(model[0].weight.grad, sp.masks['0.weight'], INF)
            opt.step()
            assert sp.sparsity == 50 and all(p.isfinite().all() for p in model.parameters())

def test_compact_steps_of_weights_that_are_not_contiguous():
    "channels_last weights stay sparse, too"
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).to(memory_format=torch.channels_last)
    sp = Sparsifier(model)
    sp.sparsify_model(50)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with sp.hold(opt, compact=True):
        for _ in range(2):
            model(torch.randn(2, 3, 8, 8)).square().mean().backward()
            opt.step()
            assert [int((m.weight == 0).sum()) for m in model] == [54, 36]

def test_compact_step_begins_with_zeros():
    w = nn.Parameter(torch.ones(4))
    mask, opt = torch.tensor([True, False, True, False]), torch.optim.SGD([w], lr=0.5)
    with torch.no_grad(): w[1] = NAN
    step = CompactStep(opt, dict(w=w), dict(w=mask))
    w.grad = torch.ones(4)
    step.enter()
    opt.step()
    step.exit()
    assert w.tolist() == [0.5, 0, 0.5, 0]

def test_exported_to_torch_prune():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad(): model[0].weight.copy_(torch.tensor([[NAN, 2.], [3., INF]]))
    Masks({'0.weight': torch.tensor([[False, False], [True, True]])}).to_torch_prune(model)
    assert model[0].weight.tolist() == [[0, 0], [3, INF]] and model[0].weight_orig.tolist() == [[0, 2], [3, INF]]
    prune.remove(model[0], 'weight')
    assert model[0].weight.tolist() == [[0, 0], [3, INF]]

def test_keep_and_rewind_and_tickets_zero_whatever_stands_there():
    mask = torch.rand(8, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    class Spoil(Callback):
        order = -5
        def after_step(self): spoil(self.learn.model[0].weight, mask, NAN)
    seen  = []
    late  = Callback(after_batch=lambda self: seen.append(int((self.learn.model[0].weight == 0).sum())))
    learn = fit(learner(), KeepSparsity({'0.weight': mask}, verbose=False), Spoil(), late, n=1)
    assert set(seen[:4]) == {int((~mask).sum())} and learn.model[0].weight.isfinite().all()
    for cb in (sparsify(), SparsifyCallback(50, layer_type=nn.Linear, schedule=one_shot, start_epoch=0, end_epoch=2,
                                            lth=True, reset_end=True, verbose=False)):
        class SpoilDropped(Callback):
            order = -5
            def after_step(self):
                masks = cb.sparsifier.masks
                if '0.weight' in masks and not masks['0.weight'].all():
                    spoil(self.learn.model[0].weight, masks['0.weight'], INF)
        learn = fit(learner(), cb, SpoilDropped())
        assert [int((learn.model[i].weight == 0).sum()) for i in (0, 2, 4)] == [16, 24, 6]
        assert all(p.isfinite().all() for p in learn.model.parameters())

def pruned_early():
    return SparsifyCallback(50, layer_type=nn.Linear, include='0', schedule=one_shot, start_epoch=1,
                            end_epoch=1, verbose=False)

class Diverge(Callback):
    "The second weight of the last layer becomes infinite in epoch 1"
    def after_batch(self):
        if self.epoch == 1 and self.training:
            with torch.no_grad(): self.learn.model[4].weight[0, 1] = INF

@pytest.mark.parametrize('cbs',
                         [[pruned_early], [lambda: KeepSparsity({'0.weight': torch.rand(8, 4) > 0.5}, verbose=False)],
                                 [lambda: sparsify(criteria='random')],
                                 [lambda: KeepSparsity({'2.weight': torch.rand(6, 8) > 0.5}, verbose=False),
                                  pruned_early]])
def test_a_diverged_fit_warns_once_by_name(cbs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        learn = fit(learner(), *(f() for f in cbs), Diverge(), n=4)
    told = [str(w.message) for w in caught if 'diverged' in str(w.message)]
    assert len(told) == 1 and '4.weight' in told[0] and 'epoch 1' in told[0]
    assert not [k for k in vars(learn) if 'around' in k or 'told' in k]

def test_a_fit_that_has_not_diverged_says_nothing():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        fit(learner(), sparsify())
    assert not [w for w in caught if 'diverged' in str(w.message)]

@pytest.mark.parametrize('opt', [partial(torch.optim.Adam, lr=0.1), partial(torch.optim.Adafactor, lr=0.1),
                                 partial(torch.optim.LBFGS, lr=0.1), partial(torch.optim.Rprop, lr=0.1)])
def test_optimizers_with_state_of_other_shapes(opt):
    model = network()
    sp = Sparsifier(model, layer_type=nn.Linear)
    sp.sparsify_model(50)
    opt = opt(model.parameters())
    def closure():
        opt.zero_grad()
        loss = model(torch.ones(8, 4)).square().mean()
        loss.backward()
        return loss
    with sp.hold(opt):
        for _ in range(2): opt.step(closure)
        assert sp.sparsity == 50

# 10. Odd weights

def linear(w):
    m = nn.Sequential(nn.Linear(w.shape[1] if w.dim() > 1 else 2, w.shape[0]))
    m[0].weight = nn.Parameter(w, requires_grad=False)
    return m

def inference():
    with torch.inference_mode(): return torch.randn(4, 6)

W = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
ODD = dict(float8_e4m3=lambda: W.to(torch.float8_e4m3fn), float8_e5m2=lambda: W.to(torch.float8_e5m2),
           complex=lambda: W.to(torch.complex64),
           int8=lambda: W.to(torch.int8), bool=lambda: W > 0,
           quantized=lambda: torch.quantize_per_tensor(W, 0.1, 0, torch.qint8),
           expanded=lambda: W[:1].expand(4, 6), expanded_columns=lambda: W[:, :1].expand(4, 6),
           overlapping=lambda: W.flatten().as_strided((4, 6), (2, 1)),
           empty=lambda: W[:, :0], no_rows=lambda: W[:0], coo=lambda: W.to_sparse(), csr=lambda: W.to_sparse_csr(),
           mkldnn=lambda: W.to_mkldnn(),
           negative_view=lambda: torch._neg_view(W), inference=inference, meta=lambda: W.to('meta'))
KWARGS = dict(weight={}, filter=dict(granularity='filter'), output=dict(context='output'),
              random=dict(criteria='random'),
              final=dict(criteria='squared_final', context='global'), init=dict(criteria='movement'))

def odd(make):
    "A layer with the odd weight, after a plain one"
    odd = nn.Linear(2, 2)
    odd.weight = nn.Parameter(make(), requires_grad=False)
    return nn.Sequential(nn.Linear(4, 4), odd)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kwargs', KWARGS)
@pytest.mark.parametrize('what', ODD)
def test_odd_weights_are_refused_by_name(what, kwargs):
    model = odd(ODD[what])
    before = model[0].weight.detach().clone()
    with pytest.raises((ValueError, TypeError), match=r'\b1\b') as e:
        Sparsifier(model, layer_type=nn.Linear, **KWARGS[kwargs])
    assert 'NaN' not in str(e.value)
    assert torch.equal(model[0].weight, before)
    sp = Sparsifier(model, layer_type=nn.Linear, exclude='1', **KWARGS[kwargs])  # others are not held up by it
    sp.sparsify_model(50)
    assert sp.sparsity == 50 and [r.name for r in sp.report().rows] == ['0']

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('what', [k for k in ODD if k != 'meta'])
def test_odd_weights_are_left_out_and_named_where_all_that_can_be_is_meant(what):
    sp = Sparsifier(odd(ODD[what]), layer_type=nn.Module)
    sp.sparsify_model(50)
    assert list(sp.left_out) == ['1'] and sp.sparsity == 50

@pytest.mark.parametrize('what', ['expanded', 'inference', 'meta'])
def test_odd_biases_that_are_held_with_filters(what):
    bias  = {'expanded': lambda: torch.ones(1).expand(4), 'inference': lambda: inference()[:, 0].clone(),
             'meta': lambda: torch.ones(4, device='meta')}[what]
    model = nn.Sequential(nn.Linear(6, 4))
    if what == 'inference':
        with torch.inference_mode(): model[0].bias = nn.Parameter(torch.ones(4), requires_grad=False)
    else: model[0].bias = nn.Parameter(bias(), requires_grad=False)
    with pytest.raises(ValueError, match='0.bias'): Sparsifier(model, 'filter', layer_type=nn.Linear)
    Sparsifier(model, 'weight', layer_type=nn.Linear).sparsify_model(50)

def test_strange_but_sound_layouts_work():
    whole = torch.randn(8, 12)
    for w in (whole[::2, ::2], whole.T[:4, :6], torch.randn(24).as_strided((4, 6), (1, 4)),
              torch.arange(1., 40).as_strided((3, 2), (2, 3))):
        sp = Sparsifier(model := linear(w), layer_type=nn.Linear)
        sp.sparsify_model(50)
        assert int((model[0].weight == 0).sum()) == w.numel()//2

@pytest.mark.parametrize('change', [lambda w: w.data.to('meta'), lambda w: w.data[:1].expand(4, 4),
                                    lambda w: w.data.to(torch.float8_e4m3fn)])
def test_weights_that_become_odd_later_are_refused_and_nothing_changes(change):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sp = Sparsifier(model, layer_type=nn.Linear)
    sp.sparsify_model(25)
    masks, before = Masks(sp.masks), model[0].weight.detach().clone()
    model[1].weight = nn.Parameter(change(model[1].weight), requires_grad=False)
    with pytest.raises(ValueError, match='1.weight'): sp.sparsify_model(50)
    assert sp.masks == masks and torch.equal(model[0].weight, before)

@pytest.mark.parametrize('change', [lambda w: w.to('meta'), lambda w: w[:1].expand(4, 4)])
def test_masks_are_applied_to_all_or_none(change):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    masks = Masks({f'{i}.weight': torch.eye(4) > 0 for i in (0, 1)})
    model[1].weight = nn.Parameter(change(model[1].weight.data), requires_grad=False)
    with pytest.raises(ValueError, match='1.weight'): masks.apply(model)
    with pytest.raises(ValueError, match='1.weight'): masks.apply(dict(model.named_parameters()))
    assert not (model[0].weight == 0).any()

IN_PLACE = dict(f=lambda t: t.mul_(0).abs(), zero=lambda t: t.zero_() + 1, out=lambda t: torch.abs(t, out=t),
                index=lambda t: t.__setitem__(0, 0) or t.abs(),
                output_fn=Criteria(identity, needs_init=True, output_fn=lambda now, ref: now.sub_(ref).abs()),
                reference=Criteria(identity, needs_update=True, output_fn=lambda now, ref: ref.sub_(now).abs()),
                step_fn=Criteria(identity, needs_grad=True, return_init=True, step_fn=lambda w, g: g.mul_(w).abs()),
                of_measured=Criteria(lambda w: w.abs_(), measure=wanda.measure, output_fn=lambda now, ref: now*ref))

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('criteria', IN_PLACE.values(), ids=IN_PLACE)
def test_criteria_that_write_into_weights_are_refused_by_name(criteria, dtype):
    model = nn.Sequential(nn.Linear(6, 4)).to(dtype)
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match='0.weight.*changes the weights'):
        Sparsifier(model, criteria=criteria, layer_type=nn.Linear)
    assert torch.equal(model[0].weight, before)

@pytest.mark.parametrize('criteria', [Criteria(identity, reducer=lambda s, dims: s.abs_().sum(dims)),
                                      Criteria(identity, normalizer=lambda s: s.abs_()),
                                      lambda w: torch.from_numpy(abs(w.numpy()))])
@pytest.mark.parametrize('granularity', ['weight', 'row'])
def test_functions_of_the_user_that_change_scores_change_no_weights(criteria, granularity):
    model = nn.Sequential(nn.Linear(6, 4))
    before = model[0].weight.detach().clone()
    sp = Sparsifier(model, granularity, criteria=criteria, layer_type=nn.Linear)
    sp.sparsify_model(50)
    assert sp.sparsity == 50 and torch.equal(model[0].weight, before * sp.masks['0.weight'])

def test_a_step_function_that_gives_the_gradient_itself():
    "Sums of gradients are no gradients: zeroing these leaves the sums"
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    sp = Sparsifier(model, criteria=Criteria(torch.abs, needs_grad=True, return_init=True, step_fn=lambda w, g: g),
                    layer_type=nn.Linear)
    for _ in range(2):
        for p in model.parameters(): p.grad = torch.tensor([[1., -2.]])
        sp.accumulate_gradients()
        for p in model.parameters(): p.grad.zero_()
    assert sp.refs['0.weight'].tolist() == [[2, -4]]

def test_a_measure_that_writes_into_weights_is_refused_and_they_are_put_back():
    def measure(model, params, data, loss_func): return {k: p.data.mul_(2).abs() for k,p in params.items()}
    model = nn.Sequential(nn.Linear(6, 4))
    before = model[0].weight.detach().clone()
    sp = Sparsifier(model, criteria=Criteria(identity, measure=measure, return_init=True), layer_type=nn.Linear,
                    data=torch.ones(2, 6))
    with pytest.raises(ValueError, match='0.weight'): sp.sparsify_model(50)
    assert torch.equal(model[0].weight, before) and not sp.masks

@pytest.mark.parametrize('scores', [lambda w: w.to(torch.complex64), lambda w: w * NAN, lambda w: w.to('meta'),
                                    lambda w: w.to_sparse(), lambda w: w / 0])
def test_odd_scores_are_refused_by_name(scores):
    model = nn.Sequential(nn.Linear(6, 4))
    w = model[0].weight.detach()
    for criteria in (scores, {'0.weight': scores(w.clone())}):
        with pytest.raises((ValueError, TypeError), match='0.weight'):
            Sparsifier(model, criteria=criteria, layer_type=nn.Linear).sparsify_model(50)

def test_several_rounds_are_done_in_full_or_not_at_all():
    "The third round of measuring fails: nothing of the first two is left"
    n = []
    def measure(model, params, data, loss_func):
        n.append(1)
        return {k: p.detach().abs() * (NAN if len(n) == 3 else 1) for k,p in params.items()}
    model = nn.Sequential(nn.Linear(6, 4))
    before = model[0].weight.detach().clone()
    sp = Sparsifier(model, criteria=Criteria(identity, measure=measure, return_init=True, rate=0.1),
                    layer_type=nn.Linear, data=torch.ones(2, 6))
    with pytest.raises(ValueError, match='0.weight'): sp.sparsify_model(50)
    assert len(n) == 3 and not sp.masks and sp.updates == 0 and torch.equal(model[0].weight, before)

def test_a_loss_of_nan_is_refused_and_nothing_changes():
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    sp = Sparsifier(model, criteria='snip', layer_type=nn.Linear, data=(torch.full((2, 4), NAN), torch.tensor([0, 1])),
                    loss_func=nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match='NaN'): sp.sparsify_model(50)
    assert not sp.masks and all(map(torch.equal, before, model.parameters()))

def test_where_nothing_can_be_written():
    for t in ODD:
        assert bool(why_not_writable(ODD[t]())) == (t in ('expanded', 'expanded_columns', 'overlapping', 'coo', 'csr',
                                                          'mkldnn', 'negative_view', 'inference')), t
    assert 'nested' in why_not_writable(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))

def test_clear_dropped_broadcasts_and_counts():
    t = torch.tensor([[NAN, 1.], [INF, NAN]])
    assert clear_dropped(t, torch.tensor([[True], [False]])) == 2
    assert str(t.tolist()) == '[[nan, 1.0], [0.0, 0.0]]'
