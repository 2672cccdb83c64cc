"Group lasso, proximal training, ADMM and distillation: closed forms, naive references, and whole training runs"
import copy, math, pickle

import fastai.callback.fp16 as fp16
import pytest, torch, torch.nn as nn, torch.nn.functional as F
from fastai.basics import SGD, Callback, set_seed
from fastai.callback.all import GradientAccumulation, MixUp
from torch.nn.parallel import DistributedDataParallel as DDP

from fasterai_clone.methods.all import (
    ADMM, ADMMCallback, DistillCallback, Proximal, ProximalCallback, RegularizeCallback, decoupled_loss, feature_loss,
    group_lasso, shrink, soft_loss)
from fasterai_clone.prune.all import PruneCallback, thin
from fasterai_clone.sparse.all import Sparsifier, SparsifyCallback
from helpers import learner, same, spy, weights
from processes import main, start


def fit(learn, n=2, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-2, **kwargs)

def line(*rows):
    net = nn.Linear(len(rows[0]), len(rows), bias=False)
    net.weight.data = torch.tensor(rows, dtype=torch.float32)
    return net

def quiet(make, *args, **kwargs): return make(*args, verbose=False, **kwargs)

# Closed forms

def test_the_penalty_by_hand():
    net = line([3, 4], [0, 0], [5, 12])
    def of(g): return float(group_lasso(Sparsifier(net, g, layer_type=nn.Linear).targets).__float__())
    assert of('weight') == 24 and of('row') == pytest.approx(math.sqrt(2)*(5 + 0 + 13))
    assert of('column') == pytest.approx(math.sqrt(3)*(math.sqrt(34) + math.sqrt(160)))
    assert of('layer') == pytest.approx(math.sqrt(6)*math.sqrt(194))

def test_its_gradient_at_zero_is_zero():
    net = line([3, 4], [0, 0])
    group_lasso(Sparsifier(net, 'row', layer_type=nn.Linear).targets).backward()
    torch.testing.assert_close(net.weight.grad, math.sqrt(2)*torch.tensor([[.6, .8], [0, 0]]))

def test_coupled_groups():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    for p in net.parameters(): p.data = torch.arange(1., p.numel() + 1).reshape(p.shape)
    sp = Sparsifier(net, 'filter', layer_type=nn.Linear, coupled=True, example_inputs=torch.ones(1, 2))
    t, = sp.targets
    naive = 0.
    for i in range(3):
        w = net[0].weight[i].tolist()
        if any(p.name == '0.bias' for p in t.parts): w.append(float(net[0].bias[i]))
        naive += math.sqrt(len(w)) * math.sqrt(sum(x*x for x in w))
    assert float(group_lasso(sp.targets).detach()) == pytest.approx(naive, rel=1e-6)

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_the_proximal_step_by_hand(dtype):
    net = line([3, 4], [.6, .8], [5, 12]).to(dtype)
    n = shrink(Sparsifier(net, 'row', layer_type=nn.Linear).targets, 1.01/math.sqrt(2))
    assert n == 1 and net.weight[1].tolist() == [0, 0]
    torch.testing.assert_close(net.weight[0].float(), .8*torch.tensor([3., 4]), rtol=1e-2, atol=1e-3)
    single = line([3, -1, .5, 0])
    assert shrink(Sparsifier(single, layer_type=nn.Linear).targets, 1.) == 3
    torch.testing.assert_close(single.weight.detach(), torch.tensor([[2., 0, 0, 0]]))

def test_admm_by_hand():
    "Three steps of one layer, beside the formulas"
    net, other = line([2., 1., -3.]), line([2., 1., -3.])
    admm = ADMM(Sparsifier(net, layer_type=nn.Linear), 34, rho=.5, every=1, heal=0, ramp=0)
    opt  = torch.optim.SGD(net.parameters(), .1)
    def sparse(v):
        v = v.clone()
        v[0, v[0].abs().argmin()] = 0
        return v
    w = other.weight.data
    z, u = sparse(w), torch.zeros_like(w)
    for step in range(3):
        net.weight.grad = torch.ones(1, 3)
        admm.add_gradients()
        opt.step()
        admm.step(step + 1, 9)
        w  = w - .1*(1 + .5*(w - z + u))
        z2 = sparse(w + u)
        u, dual, z = u + w - z2, .5*float((z2 - z).norm()), z2
        torch.testing.assert_close(net.weight.data, w)
        torch.testing.assert_close(admm.z['weight'], z)
        torch.testing.assert_close(admm.u['weight'], u)
        assert admm.primal == pytest.approx(float((w - z).norm())) and admm.dual == pytest.approx(dual)
    admm.finish()
    assert int((net.weight == 0).sum()) == 1 and admm.nbytes == 0

def test_losses_by_hand():
    a, b, y = torch.tensor([[1., 0, 2]]), torch.tensor([[0., 1, 1]]), torch.tensor([2])
    p, q = (b/3).softmax(1), (a/3).softmax(1)
    assert float(soft_loss(a, b, 3.)) == pytest.approx(9*float((p*(p/q).log()).sum()), rel=1e-5)
    images = (t[:, :, None, None].expand(1, 3, 2, 2) for t in (a, b))
    assert float(soft_loss(*images, 3.)) == pytest.approx(float(soft_loss(a, b, 3.)))
    def two(t): return torch.stack([t[0, 2], 1 - t[0, 2]])
    right = float((two(p)*(two(p)/two(q)).log()).sum())
    def rest(t): return t[0, :2]/t[0, :2].sum()
    wrong = float((rest(p)*(rest(p)/rest(q)).log()).sum())
    assert float(decoupled_loss(a, b, 3., y)) == pytest.approx(9*(right + 8*wrong), rel=1e-4)
    # Zhao et al., equation 7: the sum of the parts is the whole
    whole = decoupled_loss(a, b, 3., y, 1., float(1 - p[0, 2]))
    assert float(whole) == pytest.approx(float(soft_loss(a, b, 3.)), rel=1e-4)
    x = torch.randn(2, 4, 3, 3)
    assert float(feature_loss(x, x)) == 0 and float(feature_loss(2*x, x)) == pytest.approx(1)
    assert float(feature_loss(x.repeat(1, 2, 1, 1), x)) == pytest.approx(0, abs=1e-6)

# Whole training runs

class NaivePenalty(Callback):
    order = 5
    def after_loss(self):
        if not self.training: return
        loss = 0.
        for m in self.model.modules():
            if isinstance(m, nn.Conv2d):
                for f in m.weight: loss = loss + math.sqrt(f.numel()) * f.square().sum().sqrt()
        self.learn.loss_grad = self.learn.loss_grad + 1e-2*loss

@pytest.mark.parametrize('cbs', [[], [lambda: GradientAccumulation(32)]])
def test_the_penalty_in_a_fit(cbs):
    ends = []
    for cb in (quiet(RegularizeCallback, 1e-2), NaivePenalty(), None):
        learn = learner()
        set_seed(0)
        fit(learn, cbs=[*([cb] if cb else []), *(c() for c in cbs)])
        ends.append(learn.model)
    for a,b in zip(ends[0].parameters(), ends[1].parameters()): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    norm, free = (float(m[6].weight.detach().norm()) for m in ends[1:])
    assert norm < .95*free

@pytest.mark.parametrize('cb', [
    lambda: quiet(ProximalCallback, sparsity=50), lambda: quiet(ProximalCallback, sparsity=50, coupled=True),
    lambda: quiet(ProximalCallback, .05, 'weight', sparsity=80), lambda: quiet(ADMMCallback, 90),
    lambda: quiet(ADMMCallback, 50, 'filter', every=3), lambda: quiet(ADMMCallback, 70, context='global', every=3),
    lambda: quiet(ADMMCallback, 50, nm='2:4', exclude='0', every=3), lambda: quiet(ADMMCallback, {'3': 50, '6': 80})])
def test_ends_at_exactly_the_requested_number(cb):
    cb, learn, seen = cb(), learner(width=8), []
    look = spy('before_validate', lambda: seen.append(cb.sparsifier.dropped()))
    fit(learn, 3, cbs=[cb, look])
    sp = cb.sparsifier
    assert sp.dropped() == cb.method.counts == seen[-1] and sum(sp.dropped()) > 0 and seen[0] != seen[-1]
    assert all((p.detach()[~sp.masks[k]] == 0).all() for k,p in sp.params.items())
    assert [h['epoch'] for h in cb.history] == [0, 1, 2] and cb.method.done
    if isinstance(cb, ADMMCallback): assert all(h['primal'] > 0 for h in cb.history[1:])
    if sp.coupled:
        x = learn.dls.valid.one_batch()[0]
        small = thin(learn.model.eval().double(), example_inputs=x[:2].double())
        torch.testing.assert_close(small(x.double()), learn.model(x.double()))
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in learn.model.parameters())

def test_a_fixed_strength_prunes_what_became_zero():
    learn, cb = learner(opt_func=SGD), quiet(ProximalCallback, 2., 'kernel')
    fit(learn, 3, cbs=cb)
    assert sum(cb.sparsifier.dropped()) > 0 and cb.history[0]['zeros'] > 0

RESUMABLE = [lambda: quiet(ProximalCallback, sparsity=50), lambda: quiet(ADMMCallback, 80, every=3),
             lambda: quiet(RegularizeCallback, 1e-2, sparsity=50, growing=True)]

@pytest.mark.parametrize('at', [0, 2])
@pytest.mark.parametrize('make', RESUMABLE)
def test_resumed_bit_for_bit(make, at, tmp_path):
    learn, cb = learner(path=tmp_path, model_dir='.'), make()
    fit(learn, 4, cbs=[cb, spy('after_validate', lambda: learn.epoch == at and learn.save('half'), order=61)])
    other, again = learner(seed=7, path=tmp_path, model_dir='.'), make()
    torch.rand(9)
    other.load('half')
    fit(other, 4, cbs=again, start_epoch=at + 1)
    assert same(weights(learn.model), weights(other.model)) and cb.history == again.history
    with pytest.raises(ValueError, match='state'): again.load_state_dict({**again.state_dict(), again.kind.mark: 3})

@pytest.mark.parametrize('event', ['after_loss', 'before_step', 'after_step', 'after_train'])
@pytest.mark.parametrize('make', [*RESUMABLE, lambda: quiet(DistillCallback, loss='features', layers=['3'])])
def test_stopped_anywhere_nothing_is_left(make, event):
    learn, cb, n = learner(), make(), []
    keys, cbs = list(learn.model.state_dict()), len(learn.cbs)
    def stop():
        n.append(1)
        if len(n) == 3 or event == 'after_train': raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=[cb, spy(event, stop)])
    assert list(learn.model.state_dict()) == keys and len(learn.cbs) == cbs and len(learn.metrics) == 1
    assert not any(m._forward_hooks for m in learn.model.modules()) and not cb.active
    other, fresh = learner(), learner()
    ends = []
    for l,c in ((other, cb), (fresh, make())):
        set_seed(3)
        fit(l, cbs=c)
        ends.append(weights(l.model))
    assert same(*ends)

def half_precision(monkeypatch):
    monkeypatch.setattr(fp16, 'autocast',   lambda device, **kwargs: torch.amp.autocast('cpu', **kwargs))
    monkeypatch.setattr(fp16, 'GradScaler', lambda device, **kwargs: torch.amp.GradScaler('cpu', **kwargs))

@pytest.mark.parametrize('make', [*RESUMABLE, lambda: quiet(DistillCallback)])
def test_mixed_precision_that_skips_steps(make, monkeypatch):
    half_precision(monkeypatch)
    learn, cb, skipped = learner().to_fp16(init_scale=2.**20, growth_interval=2), make(), []
    fit(learn, 3, cbs=[cb, spy('after_cancel_step', lambda: skipped.append(1))])
    assert skipped and all(p.isfinite().all() for p in learn.model.parameters())
    if hasattr(cb, 'method') and cb.prunes: assert cb.sparsifier.dropped() == cb.method.counts

# Distillation

def dense():
    learn = learner()
    fit(learn, 2)
    return learn.model

def test_weight_0_is_as_none():
    ends = []
    for cbs in ([], [quiet(DistillCallback, weight=0)]):
        learn = learner()
        fit(learn, cbs=[quiet(SparsifyCallback, 80), *cbs])
        ends.append(weights(learn.model))
    assert same(*ends)

@pytest.mark.parametrize('kwargs', [{}, dict(loss='decoupled'), dict(loss='features', layers=['3', '6']),
                                    dict(loss=lambda out, teacher, t, y: (out - teacher).square().mean())])
def test_the_teacher_stays_as_it_was(kwargs, tmp_path):
    model  = dense()
    before = weights(model)
    learn  = learner(model=model, path=tmp_path, model_dir='.')
    cb, sizes = quiet(DistillCallback, weight=.5, **kwargs), []
    def look():
        assert not any(m._forward_hooks for m in model.modules())
        sizes.append(learn.save('now').stat().st_size)
    fit(learn, cbs=[cb, quiet(SparsifyCallback, 80), spy('after_epoch', look, order=80)])
    assert same(weights(cb.taught.model), before) and not same(weights(model), before)
    assert cb.taught.model is not model and all(p.grad is None for p in cb.taught.model.parameters())
    assert len(cb.history) == 2 and all(h['distillation'] > 0 for h in cb.history)
    assert not cb.taught.model.training and not any(m._forward_hooks for m in cb.taught.model.modules())
    if 'loss' not in kwargs or isinstance(kwargs['loss'], str):
        assert pickle.loads(pickle.dumps(cb)).taught is None
        plain = learner(path=tmp_path, model_dir='.')
        def size(): sizes.append(plain.save('now').stat().st_size)
        fit(plain, cbs=[quiet(SparsifyCallback, 80), spy('after_epoch', size, order=80)])
        assert abs(sizes[1] - sizes[3]) < 2000

def test_the_student_gets_closer():
    model, out = dense(), []
    x = learner().dls.valid.one_batch()[0]
    target = model.eval()(x).softmax(1).detach()
    for weight in (0, .9):
        learn = learner(model=copy.deepcopy(model))
        fit(learn, 4, cbs=[quiet(SparsifyCallback, 90), quiet(DistillCallback, weight=weight, temperature=2.)])
        out.append(float((learn.model.eval()(x).softmax(1) - target).abs().mean()))
    assert out[1] < out[0]

def test_accumulated_batches_are_as_one():
    "Without norms: two batches of 16 as one of 32"
    ends, net = [], nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    teacher = copy.deepcopy(net)
    teacher[1].weight.data.mul_(3)
    for bs,cbs in ((32, []), (16, [GradientAccumulation(32)])):
        learn = learner(bs=bs, model=copy.deepcopy(net), opt_func=SGD)
        lasso = quiet(RegularizeCallback, 1e-2, 'row', layer_type=nn.Linear)
        fit(learn, cbs=[quiet(DistillCallback, teacher, weight=.7), lasso, *cbs])
        ends.append(learn.model[1].weight.detach())
    torch.testing.assert_close(*ends)

@pytest.mark.parametrize('kwargs', [{}, dict(loss='features', layers=['3', '6'])])
def test_the_teacher_stays_dense_while_channels_go(kwargs):
    learn = learner(model=dense())
    n  = sum(p.numel() for p in learn.model.parameters())
    cb = quiet(DistillCallback, **kwargs)
    fit(learn, 3, cbs=[cb, quiet(PruneCallback, 50), quiet(RegularizeCallback, 1e-3)])
    assert sum(p.numel() for p in cb.taught.model.parameters()) == n > sum(p.numel() for p in learn.model.parameters())

def test_half_a_teacher_and_mixed_batches():
    learn, cb = learner(model=dense()), quiet(DistillCallback, dtype=torch.bfloat16)
    fit(learn, cbs=[cb, MixUp()])
    assert {p.dtype for p in cb.taught.model.parameters()} == {torch.bfloat16} and cb.history[0]['distillation'] > 0

def test_resumed_with_its_teacher(tmp_path):
    model = dense()
    def both(): return [quiet(SparsifyCallback, 80), quiet(DistillCallback, model)]
    learn = learner(model=copy.deepcopy(model), path=tmp_path, model_dir='.')
    fit(learn, 4, cbs=[*both(), spy('after_validate', lambda: learn.epoch == 1 and learn.save('half'), order=61)])
    other = learner(seed=5, path=tmp_path, model_dir='.')
    other.load('half')
    with pytest.raises(ValueError, match='pass the dense network as `teacher`'):
        fit(other, 4, cbs=[quiet(SparsifyCallback, 80), quiet(DistillCallback)], start_epoch=2)
    fit(other, 4, cbs=both(), start_epoch=2)
    assert same(weights(learn.model), weights(other.model))

WRONG = [(lambda: DistillCallback(loss='sofd'), "Did you mean 'soft'"), (lambda: DistillCallback(weight=2), '`weight`'),
         (lambda: DistillCallback(temperature=0), '`temperature`'), (lambda: DistillCallback(3), '`teacher`'),
         (lambda: DistillCallback(layers='3'), 'list of names'),
         (lambda: DistillCallback(loss='features'), 'give their names'),
         (lambda: RegularizeCallback(-1), '`strength`'), (lambda: RegularizeCallback('auto'), '`strength`'),
         (lambda: RegularizeCallback(granularity='filtre'), "Did you mean 'filter'"),
         (lambda: ProximalCallback(), 'to reach'),
         (lambda: ProximalCallback(sparsity=.5), 'percentage'), (lambda: ADMMCallback(.9), 'percentage'),
         (lambda: ADMMCallback(90, 'filter', nm='2:4'), '`nm`'),
         (lambda: fit(learner(), cbs=ProximalCallback(sparsity=50, heal=2)), '`heal`'),
         (lambda: fit(learner(), cbs=ADMMCallback(90, rho=0)), '`rho`'),
         (lambda: fit(learner(), cbs=ADMMCallback(90, every=0)), '`every`'),
         (lambda: fit(learner(), cbs=ADMMCallback(90, ramp=2)), '`ramp`'),
         (lambda: fit(learner(), cbs=ADMMCallback(60, nm='2:4', exclude='0')), 'at most that'),
         (lambda: fit(learner(), cbs=DistillCallback(loss='features', layers=['33'])), "in `layers` '33'"),
         (lambda: fit(learner(), cbs=DistillCallback(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))), 'same classes')]

@pytest.mark.parametrize('make, what', WRONG)
def test_wrong_arguments(make, what):
    with pytest.raises((TypeError, ValueError), match=what): make()

# Two processes

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8*36, 10))

def trains(rank, world):
    found = []
    for make in (lambda sp: ADMM(sp, 50, every=2), lambda sp: Proximal(sp, 'auto', 50)):
        model  = DDP(net())
        method = make(Sparsifier(model, 'filter'))
        opt = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9)
        torch.manual_seed(rank)
        for step in range(1, 13):
            F.cross_entropy(model(torch.randn(4, 1, 8, 8)), torch.randint(10, (4,))).backward()
            if isinstance(method, ADMM): method.add_gradients()
            opt.step()
            opt.zero_grad()
            method.step(step, 12, opt)
        params = [p.detach() for p in model.parameters()]
        found.append((dict(method.sp.masks), params, method.row(), method.sp.dropped()))
    return found

CASES = [trains]

def test_two_processes_agree(tmp_path):
    a, b = (r['trains'][0] for r in start(__file__, 2, tmp_path))
    for (m,w,row,n),(m2,w2,row2,n2) in zip(a, b):
        assert same(m, m2) and all(map(torch.equal, w, w2)) and row == row2 and n == n2 == [4]

if __name__ == '__main__': main(CASES)


# The study

def test_the_study_trains_with_every_method(tmp_path):
    "One epoch on digits: a row for each method, without and with a teacher, and exact numbers of zeros"
    import pandas as pd
    from benchmarks import towards
    towards.main(['--quick', '--out', str(tmp_path/'towards.csv')])
    rows = pd.read_csv(tmp_path/'towards.csv', comment='#')
    for unit,kinds in towards.KINDS.items():
        some = rows[rows.unit == unit]
        assert sorted(zip(some.kind, some.distilled)) == sorted((k, d) for k in kinds for d in (False, True))
    weights, dense = rows[rows.unit == 'weights'], rows[rows.kind == 'dense'].params.item()
    for k,z in zip(weights.kind, weights.zeros):  # `erk` and `global` round to the same number
        assert z == 90*weights.weights.iloc[0]//100, k
    assert (rows[rows.unit == 'filters'].params < dense/2).all() and rows.accuracy.between(0, 100).all()

@torch.no_grad()
def test_proximal_in_few_steps_zeros_no_more_than_requested(monkeypatch):
    "Five steps, three of them before the masks; one row of two; and the norms are computed once for a pool"
    import fasterai_clone.methods.proximal as room
    net = line([3., 4., 0., 0.], [0., 6., 0., 0.])
    sp  = Sparsifier(net, 'row', 'global', layer_type=nn.Linear)
    calls, counted = [], room.distance
    monkeypatch.setattr(room, 'distance', lambda pool, k: calls.append(k) or counted(pool, k))
    method = Proximal(sp, 'auto', 50, ramp=0)
    method.step(3, 5, torch.optim.SGD(net.parameters(), lr=.1))
    assert method.zeros == 1 and net.weight[0].eq(0).all() and net.weight[1, 1] > 0 and calls == [1]
