"Compact steps: the same weights as dense ones, with less state, and nothing left behind"
from functools import partial

import pytest, torch, torch.nn as nn
from fastai.basics import OptimWrapper, SGD, Adam
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import *
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.optimizer import Lamb
from helpers import *

from fasterai_clone.digits import digits_net
from fasterai_clone.sparse.all import *

optimizers = [Adam, partial(SGD, mom=0.9), partial(SGD, mom=0.9, decouple_wd=False),
              partial(OptimWrapper, opt=torch.optim.AdamW),
              partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=0.9))]
extras = {'alone': lambda: [], 'clip': lambda: [GradientClip(0.1)], 'accumulate': lambda: [GradientAccumulation(48)],
          'bf16': lambda: [MixedPrecision('bf16')], 'fp16': lambda: [MixedPrecision('fp16')]}

def trained(compact, opt_func=Adam, cbs=(), schedule=one_shot, fits=(4,), **kwargs):
    learn, cb = learner(opt_func=opt_func, wd=0.01), SparsifyCallback(90, schedule=schedule, compact=compact, **kwargs)
    for n in fits: learn.fit_one_cycle(n, 1e-2, cbs=[cb, *cbs])
    return learn, cb

@pytest.mark.parametrize('extra', extras)
@pytest.mark.parametrize('opt_func', optimizers, ids=range(len(optimizers)))
def test_same_weights_as_dense_steps(opt_func, extra):
    dense, compact = (trained(c, opt_func, extras[extra]())[0].model for c in (False, True))
    assert same(weights(dense), weights(compact))
    assert zeros(compact) == [32, 259, 1036]

def test_it_was_compact(capsys):
    learn, state = learner(), []
    cb = SparsifyCallback(90, schedule=one_shot, compact=True)
    def look():
        full = sum(v.numel() for p in learn.model.parameters()
                   for v in learn.opt.state[p].values() if isinstance(v, torch.Tensor))
        state.append((full, cb.compaction.step.nbytes if cb.compaction else 0))
    learn.fit(4, 1e-2, cbs=[cb, spy('after_batch', lambda: learn.training and look())])
    total = sum(p.numel() for p in learn.model.parameters())
    assert state[0] == (2*total, 0)                   # two moments a weight
    kept = 1476 - 1327
    assert state[-1] == (2*(total - 1476), kept*(8 + 4 + 2*4))
    assert capsys.readouterr().out.count('The masks are final') == 1
    assert all(v['grad_avg'].shape == p.shape for p,v in learn.opt.state.items() if v)   # given back after fit

@pytest.mark.parametrize('schedule, expected', [(one_shot, True), (iterative, True),
                                                (agp(end_pct=0.5), True), (dsd, False)])
def test_only_when_nothing_more_is_to_come(schedule, expected, capsys):
    _, cb = trained(True, schedule=schedule)
    assert ('The masks are final' in capsys.readouterr().out) == expected

def test_second_fit_is_compact_from_the_start():
    a, b = (trained(c, fits=(2, 2))[0].model for c in (False, True))
    assert zeros(b) == [32, 259, 1036]  # momentum of dropped weights is the only difference, and they do not matter
    assert same(weights(a), weights(b))

def test_unknown_optimizers_stay_dense(capsys):
    learn, _ = trained(True, opt_func=Lamb)
    assert 'Steps stay dense: the optimizer uses lamb_step' in capsys.readouterr().out
    assert zeros(learn.model) == [32, 259, 1036]

@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize('event', ['after_step', 'before_step', 'after_backward', 'after_batch', 'before_validate'])
def test_interrupted_it_leaves_a_plain_optimizer(event, error):
    learn, cb = learner(), SparsifyCallback(90, schedule=one_shot, compact=True)
    def stop():
        if learn.epoch == 3: raise error('stop')
    with pytest.raises(error): learn.fit(4, 1e-2, cbs=[cb, spy(event, stop)])
    ps = list(learn.model.parameters())
    assert all(any(p is q for q in ps) for pg in learn.opt.param_lists for p in pg) and set(learn.opt.state) <= set(ps)
    assert all(v.shape == p.shape for p in ps for k,v in learn.opt.state[p].items() if k in ('grad_avg', 'sqr_avg'))
    assert zeros(learn.model) == [32, 259, 1036]
    learn.fit(1, 1e-2)

def test_a_checkpoint_loaded_in_mid_run_is_masked():
    learn, cb = learner(), SparsifyCallback(90, schedule=one_shot, compact=True)
    learn.save('dense', with_opt=False)
    def load():
        if learn.epoch == 2: learn.load('dense', with_opt=False)
    learn.fit(4, 1e-2, cbs=[cb, spy('after_epoch', load)])
    assert zeros(learn.model) == [32, 259, 1036]

def test_best_model_reloaded_with_its_optimizer():
    learn, cb = learner(), SparsifyCallback(90, schedule=one_shot, compact=True)
    learn.fit(4, 1e-2, cbs=[cb, SaveModelCallback(with_opt=True)])
    assert zeros(learn.model) == [32, 259, 1036]
    learn.fit(1, 1e-2, cbs=cb)
    assert zeros(learn.model) == [32, 259, 1036]

def test_masks_that_change_under_hold():
    "In a loop of one's own the masks may change at any time"
    def run(compact):
        torch.manual_seed(0)
        net = digits_net(4)
        sp, opt = Sparsifier(net), torch.optim.SGD(net.parameters(), lr=0.1)
        x, y = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
        with sp.hold(opt, compact=compact):
            for s in (50, 50, 90, 90):
                sp.sparsify_model(s)
                nn.functional.cross_entropy(net(x), y).backward()
                opt.step()
                opt.zero_grad()
        return net
    a, b = run(False), run(True)
    assert same(weights(a), weights(b)) and zeros(b) == [32, 259, 1036]

def test_hold_refuses_what_it_cannot_do():
    net = digits_net(4)
    with pytest.raises(TypeError, match='Adagrad is none of'):
        Sparsifier(net).hold(torch.optim.Adagrad(net.parameters()), compact=True)
