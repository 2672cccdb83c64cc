"`SparsifyCallback` in fastai's training loop, end to end on real digits: laws 3, 4, 5 and 6"
import csv, gc, pickle, threading, weakref
from copy import deepcopy
from functools import partial

import pytest, torch, torch.nn as nn
from fastai.basics import (CancelFitException, CancelStepException, CancelTrainException, OptimWrapper, SGD,
                           load_learner, params)
from fastai.callback.all import CSVLogger, EarlyStoppingCallback, GradientAccumulation, GradientClip, SaveModelCallback
from safetensors.torch import load_file

from fasterai_clone.digits import digits_net
from fasterai_clone.sparse.all import *
from fasterai_clone.core.criteria import random as random_criterion
from helpers import column, exact, fit_for, layers, learner, lines, measured, same, shown, sizes, spy, weights, zeros


def fit_seen(learn, n_epoch, cb, lr=1e-2, cbs=(), **kwargs):
    "Zeros of each convolution when validation starts, epoch by epoch"
    seen = []
    learn.fit(n_epoch, lr, cbs=[cb, spy('before_validate', lambda: seen.append(zeros(learn.model))), *cbs], **kwargs)
    return seen

def regrown(learn, f):
    "How many weights that were zero before a batch are not after it, over all batches that `f(spies)` trains"
    before, lost = [[m.weight == 0 for m in layers(learn.model)]], []
    def look():
        now = [m.weight == 0 for m in layers(learn.model)]
        lost.append(sum(int((b & ~n).sum()) for b,n in zip(before[-1], now)))
        before.append(now)
    f([spy('after_batch', look), spy('before_validate', look)])
    return sum(lost)

law3 = dict(
    one_shot  = [0, 0, 0, 0, 90, 90, 90, 90, 90, 90],
    iterative = [0, 0, 30, 30, 60, 60, 60, 90, 90, 90],
    agp       = [0, 0, *[round(90*(1 - (1 - k/8)**3), 9) for k in range(1, 9)]])


# Measured and on time

@pytest.mark.parametrize('name', law3)
def test_series_is_measured_when_validation_starts(name, capsys):
    learn, cb = learner(), SparsifyCallback(90, schedule=name)
    seen, n = fit_seen(learn, 10, cb), sizes(learn.model)
    asked = [[exact(k, s) for k in n] for s in law3[name]]
    pcts  = [100*sum(z)/sum(n) for z in seen]
    assert seen == asked
    assert lines(capsys.readouterr().out) == [(e, round(p, 2)) for e,p in enumerate(pcts)]
    assert column(learn) == pcts
    assert [(h['epoch'], h['sparsity']) for h in cb.history] == list(enumerate(pcts))

def test_what_fit_prints(capsys):
    learn, cb = learner(), SparsifyCallback(90)
    learn.fit(1, cbs=cb)
    out = capsys.readouterr().out.splitlines()
    assert out[0]  == 'Pruning of weight until a sparsity of [90]%'
    assert out[2:5] == ['Sparsity at the end of epoch 0: [89.91]%', 'Final Sparsity: [89.91]%', '']
    assert out[5:]  == str(cb.report).splitlines()
    assert [r.zeros for r in cb.report.rows] == zeros(learn.model) == [32, 259, 1036]
    assert 'Overall              all             1,476      1,327         89.91%' in out
    assert not any(o.startswith('Saving Weights') for o in out)

def test_quiet_callback_prints_nothing_of_ours(capsys):
    learner().fit(1, cbs=SparsifyCallback(90, verbose=False))
    assert 'parsity' not in capsys.readouterr().out

@pytest.mark.parametrize('name', ['lin', 'cos', 'agp', 'one_cycle', 'one_shot', 'iterative'])
def test_one_epoch_of_eight_batches_ends_exact(name):
    learn, cb = learner(), SparsifyCallback(90, schedule=name)
    seen = fit_seen(learn, 1, cb)
    assert seen == [[32, 259, 1036]] and zeros(learn.model) == seen[0]

@pytest.mark.parametrize('every', [1, 3, 5, 100])
def test_every_epoch_is_exact_however_rarely_masks_change(every):
    learn, changes = learner(), []
    seen = fit_seen(learn, 4, SparsifyCallback(90, schedule='lin', every=every),
                    cbs=[spy('after_batch', lambda: changes.append(sum(zeros(learn.model))))])
    assert seen == [[exact(n, s) for n in sizes(learn.model)] for s in (22.5, 45, 67.5, 90)]
    train = [changes[i] for i in range(len(changes)) if i % 9 < 8]  # 8 batches of training, 1 of validation
    # every third step of 32, and the ends of 4 epochs, ...
    assert len(set(train) - {0}) == {1: 32, 3: 13, 5: 10, 100: 4}[every]

def test_sparsity_0_is_bit_identical_to_no_callback():
    dense, ours = learner(), learner()
    dense.fit(2, 1e-2)
    ours.fit(2, 1e-2, cbs=SparsifyCallback(0))
    assert same(weights(dense.model), weights(ours.model))

def test_same_seed_same_weights():
    runs = []
    for _ in range(2):
        learn = learner()
        learn.fit(2, 1e-2, cbs=SparsifyCallback(80, criteria=random_criterion, schedule=lin))
        runs.append(weights(learn.model))
    assert same(*runs)

def test_dsd_rises_and_falls_smoothly():
    learn, cb, steps = learner(), SparsifyCallback(80, schedule=dsd), []
    learn.fit(4, 1e-2, cbs=[cb, spy('after_step', lambda: steps.append(cb.sparsifier.masks.n_dropped))])
    top = steps.index(max(steps))
    assert max(steps) == sum(exact(n, 80) for n in sizes(learn.model)) and top == 15 and steps[-1] == 0
    assert steps[:top+1] == sorted(steps[:top+1]) and steps[top:] == sorted(steps[top:], reverse=True)
    # no jump: π/32 of the way in the steepest step
    assert max(abs(a - b) for a,b in zip(steps, steps[1:])) < 0.12 * max(steps)

def test_dsd_ends_dense_again():
    learn = learner()
    learn.fit(4, 1e-2, cbs=SparsifyCallback(80, schedule=dsd))
    learn.fit(1, 1e-2)
    assert sum(zeros(learn.model)) < 20

def test_fit_one_cycle_and_csv_logger():
    learn, cb = learner(), SparsifyCallback(50, schedule=cos)
    learn.fit_one_cycle(4, 1e-2, cbs=[cb, CSVLogger()])
    rows = list(csv.DictReader(open(learn.path/'history.csv')))
    assert [float(r['sparsity']) for r in rows] == pytest.approx([h['sparsity'] for h in cb.history], abs=1e-4)
    assert zeros(learn.model) == [18, 144, 576]

def test_starting_at_a_later_epoch():
    learn, cb = learner(), SparsifyCallback(90, schedule=iterative)
    learn.fit(10, 1e-2, cbs=cb, start_epoch=5)
    assert [h['epoch'] for h in cb.history] == [5, 6, 7, 8, 9]
    assert [h['sparsity'] for h in cb.history] == pytest.approx([60, 60, 90, 90, 90], abs=0.2)
    assert zeros(learn.model) == [32, 259, 1036]


# What can be asked for

def test_a_list_of_sparsities(capsys):
    learn, cb = learner(), SparsifyCallback([25, 50, 75], schedule=lin)
    seen = fit_seen(learn, 2, cb)
    assert seen == [[exact(n, s/2) for n,s in zip(sizes(learn.model), (25, 50, 75))], [9, 144, 864]]
    out = capsys.readouterr().out
    assert 'until a sparsity of [25, 50, 75]%' in out and 'end of epoch 1: [25.0, 50.0, 75.0]%' in out

@pytest.mark.parametrize('sparsity', [{'3': 50}, {'3.weight': 50}, {'[3]': 50}, {'*': 50, '0': 0, '6': 0}])
def test_a_dict_of_sparsities(sparsity):
    learn = learner()
    assert fit_seen(learn, 1, SparsifyCallback(sparsity, schedule=lin)) == [[0, 144, 0]]

def test_global_counts_over_all_layers():
    learn, cb = learner(), SparsifyCallback(90, context='global', schedule=iterative)
    seen = fit_seen(learn, 10, cb)
    assert [sum(z) for z in seen] == [exact(1476, s) for s in law3['iterative']]
    assert seen[-1] != [32, 259, 1036]  # layers differ

def test_filters_are_zero_as_a_whole():
    learn, cb = learner(), SparsifyCallback(50, 'filter', schedule=one_shot)
    learn.fit(2, 1e-2, cbs=cb)
    assert [int((m.weight == 0).flatten(1).all(1).sum()) for m in layers(learn.model)] == [2, 4, 8]
    assert zeros(learn.model) == [18, 144, 576]
    assert [(r.groups, r.zero_groups) for r in cb.report.rows] == [(4, 2), (8, 4), (16, 8)]

def test_uneven_filters_report_weights_and_groups(capsys):
    learn, cb = learner(), SparsifyCallback(30, 'filter', schedule=one_shot)  # 1 of 4, 2 of 8, 4 of 16 filters
    learn.fit(1, 1e-2, cbs=cb)
    assert zeros(learn.model) == [9, 72, 288] and cb.report.sparsity == cb.report.group_sparsity == 25
    assert 'Final Sparsity: [25.0]%' in capsys.readouterr().out

def test_gradient_criterion_keeps_what_had_most_of_it():
    "|w·∂L/∂w| summed over the steps up to the pruning, counted here by hand"
    learn, sums, masks = learner(), {}, []
    def add():
        if masks: return
        for i,m in enumerate(layers(learn.model)): sums[i] = sums.get(i, 0) + (m.weight * m.weight.grad).abs().detach()
    cb = SparsifyCallback(50, criteria=gradient, schedule=one_shot)
    def look():
        if not masks and cb.sparsifier.masks: masks.append([m.clone() for m in cb.sparsifier.masks.values()])
    learn.fit(2, 1e-2, cbs=[cb, spy('before_step', add), spy('after_step', look)])
    assert zeros(learn.model) == [18, 144, 576]
    for i,mask in enumerate(masks[0]): assert sums[i][mask].min() >= sums[i][~mask].max()

@pytest.mark.parametrize('skipped', [[0], [3, 4], [6, 7], list(range(8))], ids=str)
def test_gradient_criterion_when_steps_overflow(skipped):
    "As under fp16: gradients are infinite, the step is cancelled. Only steps that were made count"
    cb = SparsifyCallback(50, criteria=gradient, schedule=Schedule(sched_oneshot, start_pct=1.))
    learn, sums = learner(), {}
    def overflow():
        if learn.epoch != 0 or learn.iter not in skipped: return
        for p in learn.model.parameters(): p.grad.fill_(float('inf'))
        raise CancelStepException
    def add():
        for i,m in enumerate(layers(learn.model)): sums[i] = sums.get(i, 0) + (m.weight * m.weight.grad).abs().detach()
    learn.fit(2, 1e-2, cbs=[cb, spy('before_step', overflow, order=10), spy('before_step', add)])
    assert zeros(learn.model) == [18, 144, 576]
    for i,mask in enumerate(cb.sparsifier.masks.values()): assert sums[i][mask].min() >= sums[i][~mask].max()

@pytest.mark.parametrize('skipped', [[0], [3, 4], [6, 7]], ids=str)
def test_gradient_criterion_prunes_on_after_an_overflow(skipped):
    learn = learner()
    def overflow():
        if learn.iter not in skipped: return
        for p in learn.model.parameters(): p.grad.fill_(float('nan'))
        raise CancelStepException
    seen = fit_seen(learn, 2, SparsifyCallback(90, criteria=gradient, schedule=lin),
                    cbs=[spy('before_step', overflow, order=10)])
    assert seen == [[exact(n, s) for n in (36, 288, 1152)] for s in (45, 90)]

@pytest.mark.parametrize('name', available_criterias())
def test_every_criterion_trains_and_ends_exact(name):
    learn = learner()
    learn.fit(2, 1e-2, cbs=SparsifyCallback(50, fit_for(name), criteria=name, schedule=iterative))
    assert zeros(learn.model) == [18, 144, 576]

def test_2_of_4_pattern():
    learn = learner(width=4)
    learn.fit(2, 1e-2, cbs=SparsifyCallback(50, nm=True, exclude='0', schedule=lin))
    for m in layers(learn.model)[1:]: assert ((m.weight == 0).movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1) == 2).all()

def test_part_of_a_model():
    learn = learner()
    learn.fit(1, 1e-2, cbs=SparsifyCallback(50, schedule=lin, model=learn.model[3:6]))
    assert zeros(learn.model) == [0, 144, 0]

def test_linear_layers_too():
    learn = learner()
    learn.fit(1, 1e-2, cbs=SparsifyCallback(50, layer_type=(nn.Conv2d, nn.Linear)))
    assert zeros(learn.model, (nn.Conv2d, nn.Linear)) == [18, 144, 576, 80]


# Together with fastai's own callbacks

def test_lr_find_with_the_callback_attached(capsys):
    learn = learner(cbs=(cb := SparsifyCallback(90)))
    before = weights(learn.model)
    learn.lr_find(num_it=12, show_plot=False)
    assert same(before, weights(learn.model)) and cb.sparsifier is None and capsys.readouterr().out == ''
    learn.fit(1, 1e-2)
    assert zeros(learn.model) == [32, 259, 1036]
    learn.lr_find(num_it=12, show_plot=False)
    assert zeros(learn.model) == [32, 259, 1036]

@pytest.mark.parametrize('call', ['validate', 'get_preds'])
def test_inference_with_the_callback_attached(call, capsys):
    learn, plain = learner(cbs=(cb := SparsifyCallback(90))), learner()
    before = weights(learn.model)
    ours, theirs = getattr(learn, call)(), getattr(plain, call)()
    assert same(before, weights(learn.model)) and capsys.readouterr().out == '' and cb.history == []
    assert cb.report is None
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a,b in zip(ours, theirs))
    learn.fit(1, 1e-2)
    history, report = list(cb.history), cb.report
    capsys.readouterr()
    getattr(learn, call)()
    assert cb.history == history and cb.report is report and zeros(learn.model) == [32, 259, 1036]
    assert capsys.readouterr().out == ''

def test_validate_inside_fit():
    learn, cb = learner(), SparsifyCallback(90, schedule=lin)
    fit_seen(learn, 3, cb, cbs=[spy('after_epoch', lambda: learn.get_preds(inner=True), order=65)])
    assert zeros(learn.model) == [32, 259, 1036] and len(cb.history) == 3 and cb.report is not None

@pytest.mark.parametrize('call', ['validate', 'get_preds', 'lr_find'])
def test_interrupted_inference_does_not_silence_the_next_fit(call):
    learn = learner(cbs=SparsifyCallback(90))
    def stop(): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), learn.added_cbs(spy('after_pred', stop)): getattr(learn, call)()
    learn.fit(1, 1e-2)
    assert zeros(learn.model) == [32, 259, 1036]

def test_best_model_of_a_denser_epoch_is_masked_again(capsys):
    learn, cb = learner(), SparsifyCallback(90, schedule=lin)
    # best in epoch 0
    worse = spy('after_epoch', lambda: learn.recorder.values[-1].__setitem__(1, float(learn.epoch)), order=55)
    learn.fit(4, 1e-2, cbs=[cb, worse, SaveModelCallback()])
    out = capsys.readouterr().out
    back = 1327 - sum(exact(n, 22.5) for n in (36, 288, 1152))
    assert zeros(learn.model) == [32, 259, 1036] == [r.zeros for r in cb.report.rows]
    assert f'{back:,} pruned weights had come back' in out and 'Final Sparsity: [89.91]%' in out
    assert sum(zeros_in(learn.path/'models'/'model.pth')) == 1327 - back

def zeros_in(path): return [int((v == 0).sum()) for v in torch.load(path, weights_only=True).values() if v.ndim == 4]

def test_saving_every_epoch(capsys):
    learn, cb = learner(), SparsifyCallback(90, schedule=iterative)
    keys = list(learn.model.state_dict())
    learn.fit(10, 1e-2, cbs=[cb, SaveModelCallback(every_epoch=True)])
    for e,s in enumerate(law3['iterative']):
        assert zeros_in(learn.path/'models'/f'model_{e}.pth') == [exact(n, s) for n in (36, 288, 1152)]
        assert list(torch.load(learn.path/'models'/f'model_{e}.pth', weights_only=True)) == keys
    assert 'come back' not in capsys.readouterr().out

def test_monitoring_sparsity_itself():
    learn = learner()
    learn.fit(3, 1e-2, cbs=[SparsifyCallback(60, schedule=lin), SaveModelCallback(monitor='sparsity', with_opt=True)])
    assert zeros(learn.model) == [21, 172, 691]

def test_early_stopping_still_prints_its_last_epoch(capsys):
    learn, cb = learner(), SparsifyCallback(90, schedule=lin)
    worse = spy('after_epoch', lambda: learn.recorder.values[-1].__setitem__(1, float(learn.epoch)), order=55)
    learn.fit(10, 1e-2, cbs=[cb, worse, EarlyStoppingCallback(patience=2)])
    at = [exact(n, 27) for n in (36, 288, 1152)]
    assert [e for e,_ in lines(capsys.readouterr().out)] == [0, 1, 2] and zeros(learn.model) == at
    assert [r.zeros for r in cb.report.rows] == at

def test_cancelled_fit_reports_what_is_there(capsys):
    learn, cb = learner(), SparsifyCallback(90, schedule=lin)
    def stop():
        if learn.training and learn.epoch == 1 and learn.iter == 3: raise CancelFitException
    learn.fit(4, 1e-2, cbs=[cb, spy('after_batch', stop)])
    assert zeros(learn.model) == [exact(n, 90*12/32) for n in (36, 288, 1152)] == [r.zeros for r in cb.report.rows]
    assert len(cb.history) == 1 and 'Final Sparsity' in capsys.readouterr().out

@pytest.mark.parametrize('cancel', [CancelTrainException, CancelStepException])
def test_skipped_steps_do_not_make_an_epoch_late(cancel):
    learn = learner()
    def stop():
        if learn.iter >= 5: raise cancel
    seen = fit_seen(learn, 3, SparsifyCallback(90, schedule=lin), cbs=[spy('before_step', stop, order=12)])
    assert seen == [[exact(n, s) for n in (36, 288, 1152)] for s in (30, 60, 90)]

@pytest.mark.parametrize('n_acc', [16, 48, 1000])
def test_gradient_accumulation(n_acc):
    learn = learner()
    seen = fit_seen(learn, 2, SparsifyCallback(90, schedule=lin), cbs=[GradientAccumulation(n_acc)])
    assert seen == [[exact(n, s) for n in (36, 288, 1152)] for s in (45, 90)]

def test_gradient_accumulation_with_the_gradient_criterion():
    learn = learner()
    seen = fit_seen(learn, 2, SparsifyCallback(90, criteria=gradient, schedule=lin), cbs=[GradientAccumulation(48)])
    assert seen == [[exact(n, s) for n in (36, 288, 1152)] for s in (45, 90)]

@pytest.mark.parametrize('to', ['to_bf16', 'to_fp16'])
@pytest.mark.parametrize('criteria', [large_final, gradient])
def test_mixed_precision(to, criteria):
    learn = getattr(learner(), to)()
    seen = fit_seen(learn, 2, SparsifyCallback(90, schedule=lin, criteria=criteria))
    assert seen == [[exact(n, s) for n in (36, 288, 1152)] for s in (45, 90)]
    assert learn.model[0].weight.dtype == torch.float32

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype(dtype):
    learn = learner(model=digits_net(4).to(dtype))
    cast = [spy('before_batch', lambda: setattr(learn, 'xb', (learn.xb[0].to(dtype),))),
            spy('after_pred', lambda: setattr(learn, 'pred', learn.pred.float()))]
    seen = fit_seen(learn, 2, SparsifyCallback(90, schedule=lin), lr=1e-3, cbs=cast)
    assert seen == [[exact(n, s) for n in (36, 288, 1152)] for s in (45, 90)] and learn.model[0].weight.dtype == dtype

@pytest.mark.parametrize('cbs', [[], [GradientClip(0.1)]])
@pytest.mark.parametrize('opt_func', [partial(SGD, mom=0.9, wd=0.1),
                                      partial(OptimWrapper,
                                              opt=partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1)),
                                      partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_momentum_and_weight_decay_bring_nothing_back(opt_func, cbs):
    learn = learner(opt_func=opt_func, wd=0.1)
    lost = regrown(learn,
                   lambda spies: learn.fit(4, 1e-2, cbs=[SparsifyCallback(90, schedule=iterative), *cbs, *spies]))
    assert lost == 0 and zeros(learn.model) == [32, 259, 1036]


# Second fits

def test_second_fit_loses_nothing():
    learn, cb = learner(), SparsifyCallback(90)
    learn.fit(3, 1e-2, cbs=cb)
    assert regrown(learn, lambda spies: learn.fit(3, 1e-2, cbs=[cb, *spies])) == 0
    assert zeros(learn.model) == [32, 259, 1036] and [h['sparsity'] for h in cb.history] == [measured(learn.model)]*3

def test_second_fit_with_the_callback_attached_loses_nothing():
    learn = learner(cbs=SparsifyCallback(90))
    learn.fit(3, 1e-2)
    assert regrown(learn, lambda spies: learn.fit_one_cycle(3, 1e-2, cbs=spies)) == 0
    assert zeros(learn.model) == [32, 259, 1036]

def test_second_fit_with_a_new_callback_loses_nothing():
    learn = learner()
    learn.fit(3, 1e-2, cbs=SparsifyCallback(90))
    assert regrown(learn, lambda spies: learn.fit(3, 1e-2, cbs=[SparsifyCallback(90), *spies])) == 0
    assert zeros(learn.model) == [32, 259, 1036]

def test_fine_tune_loses_nothing():
    learn, cb = learner(splitter=lambda m: [params(m[:6]), params(m[6:])]), SparsifyCallback(90)
    assert regrown(learn, lambda spies: learn.fine_tune(3, 1e-2, freeze_epochs=2, cbs=[cb, *spies])) == 0
    assert zeros(learn.model) == [32, 259, 1036] and len(cb.history) == 3

def test_second_fit_of_dsd_comes_down_again():
    "Up again to where the network is, then down, also where no step falls on the very top"
    learn, cb = learner(n=80), SparsifyCallback(80, schedule=dsd)  # 5 batches an epoch
    def stop():
        if learn.training and learn.iter == 4: raise CancelFitException
    learn.fit(2, 1e-2, cbs=[cb, spy('after_batch', stop)])
    assert zeros(learn.model) == [28, 230, 921]
    learn.fit(1, 1e-2, cbs=cb)
    assert cb.sparsifier.masks.n_dropped == 0

def test_frozen_layers_are_said(capsys):
    learn = learner(splitter=lambda m: [params(m[:6]), params(m[6:])])
    learn.freeze()
    learn.fit(1, 1e-2, cbs=SparsifyCallback(90))
    assert '2 of 3 layers are frozen' in capsys.readouterr().out and zeros(learn.model) == [32, 259, 1036]

def test_gradients_of_frozen_layers_are_refused():
    learn, batches = learner(splitter=lambda m: [params(m[:6]), params(m[6:])]), []
    learn.freeze()
    with pytest.raises(ValueError, match='2 of 3 layers are frozen'):
        learn.fit(1, cbs=[SparsifyCallback(90, criteria=gradient),
                          spy('before_batch', lambda: batches.append(1), order=-50)])
    assert not batches and sum(zeros(learn.model)) == 0


# Saving and loading

def test_checkpoint_of_a_denser_epoch_loaded_between_fits():
    learn, cb = learner(), SparsifyCallback(90, schedule=lin)
    learn.save('dense')
    learn.fit(2, 1e-2, cbs=cb)
    learn.load('dense')
    assert sum(zeros(learn.model)) == 0
    seen = fit_seen(learn, 2, cb)
    assert seen == [[32, 259, 1036]]*2

def test_checkpoint_loaded_in_mid_run():
    learn, cb, seen = learner(), SparsifyCallback(90, schedule=lin), []
    def swap():
        if learn.epoch == 0: learn.save('mid')
        if learn.epoch == 2: learn.load('mid')
    seen = fit_seen(learn, 4, cb, cbs=[spy('after_epoch', swap)])
    assert seen == [[exact(n, s) for n in (36, 288, 1152)] for s in (22.5, 45, 67.5, 90)]

def test_a_plain_model_loads_the_checkpoint():
    learn = learner()
    learn.fit(1, 1e-2, cbs=SparsifyCallback(90))
    plain = digits_net(4)
    plain.load_state_dict(torch.load(learn.save('m', with_opt=False), weights_only=True))
    assert zeros(plain) == [32, 259, 1036]

def test_export_and_load_learner_with_the_callback_attached():
    learn = learner(cbs=SparsifyCallback(90))
    learn.fit(1, 1e-2)
    learn.export('m.pkl')
    back = load_learner('m.pkl')
    x = torch.rand(2, 1, 8, 8)
    assert zeros(back.model) == [32, 259, 1036] and torch.equal(back.model.eval()(x), learn.model.eval()(x))
    dl = learn.dls.valid
    assert torch.equal(back.get_preds(dl=dl)[0], learn.get_preds(dl=dl)[0])
    back.dls = learn.dls
    assert regrown(back, lambda spies: back.fit(1, 1e-2, cbs=spies)) == 0

def test_export_without_the_callback_holds_nothing_of_ours():
    learn = learner()
    learn.fit(1, 1e-2, cbs=SparsifyCallback(90, criteria=movement))
    learn.export('m.pkl')
    assert zeros(load_learner('m.pkl').model) == [32, 259, 1036]
    assert b'fasterai_clone.sparse' not in (learn.path/'m.pkl').read_bytes()

@pytest.mark.parametrize('copy', [deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=['deepcopy', 'pickle'])
def test_copies(copy):
    learn, cb = learner(), SparsifyCallback(90, criteria=movement, schedule=partial(iterative, n_steps=5))
    fresh = copy(cb)
    learn.fit(1, 1e-2, cbs=fresh)
    used, model = copy(fresh), copy(learn.model)
    assert zeros(model) == zeros(learn.model) == [32, 259, 1036]
    assert used.history == fresh.history and used.report == fresh.report
    assert same(used.sparsifier.masks, fresh.sparsifier.masks)

def test_deepcopy_in_mid_fit():
    learn, copies = learner(), []
    learn.fit(2, 1e-2, cbs=[SparsifyCallback(90), spy('after_batch', lambda: copies.append(deepcopy(learn.model)))])
    assert list(copies[3].state_dict()) == list(digits_net(4).state_dict()) and zeros(copies[-1]) == [32, 259, 1036]


# The model stays yours

def inside(model):
    "Every attribute, parameter, buffer and hook of every module, by name"
    return [(n, sorted(m.__dict__), [list(v) for v in m.__dict__.values() if isinstance(v, dict)])
            for n,m in model.named_modules()]

@pytest.mark.parametrize('kwargs', [dict(), dict(criteria=movement), dict(criteria=gradient), dict(criteria=wanda),
                                    dict(schedule=one_shot, lth=True),
                                    dict(granularity='filter', context='global')], ids=shown)
def test_nothing_of_ours_is_left_on_the_modules(kwargs):
    learn, dense = learner(), learner()
    metrics, cbs = list(learn.metrics), list(learn.cbs)
    before = inside(learn.model)
    inner = []
    learn.fit(1, 1e-2,
              cbs=[SparsifyCallback(50, **kwargs), spy('after_batch', lambda: inner.append(inside(learn.model)))])
    dense.fit(1, 1e-2)
    assert inside(learn.model) == before == inner[3]
    assert list(learn.metrics) == metrics and list(learn.cbs) == cbs and not hasattr(learn, 'sparsify')
    assert not hasattr(learn, 'sparsify_closing')
    assert learn.model.training == dense.model.training

def test_callback_is_freed_after_fit():
    "Its reference weights do not live as long as the learner"
    learn, cb = learner(), SparsifyCallback(90, criteria=movement)
    learn.fit(1, 1e-2, cbs=cb)
    ref = weakref.ref(cb)
    del cb
    gc.collect()
    assert ref() is None

EVENTS = ['before_fit', 'before_epoch', 'before_train', 'before_batch', 'after_pred', 'before_backward',
          'before_step', 'after_step',
          'after_batch', 'after_train', 'before_validate', 'after_validate', 'after_epoch', 'after_fit']

@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize('event', EVENTS)
def test_a_crash_leaves_nothing_behind(event, error):
    schedule, criteria = partial(iterative, n_steps=5), movement
    states = pickle.dumps((schedule, criteria))
    def stop():
        if learn.epoch == 1 or event in ('before_fit', 'after_fit'): raise error('stop')
    def run():
        learn = learner()
        learn.fit(3, 1e-2, cbs=SparsifyCallback(90, criteria=criteria, schedule=schedule))
        return weights(learn.model)
    clean, learn = run(), learner()
    keys, metrics, cbs = list(learn.model.state_dict()), list(learn.metrics), list(learn.cbs)
    modules = inside(learn.model)
    with pytest.raises(error, match='stop'):
        learn.fit(3, 1e-2, cbs=[SparsifyCallback(90, criteria=criteria, schedule=schedule), spy(event, stop)])
    assert list(learn.model.state_dict()) == keys and list(learn.metrics) == metrics and list(learn.cbs) == cbs
    assert inside(learn.model) == modules
    assert pickle.dumps((schedule, criteria)) == states
    again = run()
    assert same(clean, again) and sum(int((v == 0).sum()) for v in again.values() if v.ndim == 4) == 1327

@pytest.mark.parametrize('event', ['before_batch', 'after_step', 'before_validate', 'after_epoch'])
def test_training_goes_on_after_a_crash(event):
    "With the same learner and an attached callback"
    learn = learner(cbs=(cb := SparsifyCallback(90, schedule=lin)))
    def stop():
        if learn.epoch == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learn.fit(3, 1e-2, cbs=spy(event, stop))
    learn.validate()
    assert regrown(learn, lambda spies: learn.fit(3, 1e-2, cbs=spies)) == 0
    assert zeros(learn.model) == [32, 259, 1036] and [h['epoch'] for h in cb.history] == [0, 1, 2]
    assert learn.recorder.metric_names.count('sparsity') == 1

def test_one_callback_for_two_learners():
    cb, a, b = SparsifyCallback(90), learner(), learner(seed=1)
    for l in (a, b, a): l.fit(1, 1e-2, cbs=cb)
    alone = learner(seed=1)
    alone.fit(1, 1e-2, cbs=SparsifyCallback(90))
    assert same(weights(b.model), weights(alone.model)) and zeros(a.model) == [32, 259, 1036]

def test_two_callbacks_on_one_learner():
    learn = learner()
    learn.fit(1, 1e-2, cbs=[SparsifyCallback(90), SparsifyCallback(50, layer_type=nn.Linear)])
    assert zeros(learn.model, (nn.Conv2d, nn.Linear)) == [32, 259, 1036, 80] and len(learn.metrics) == 1

def test_two_learners_in_two_threads_share_schedule_and_criterion():
    schedule, criteria, seen = iterative(n_steps=4), Criteria(torch.abs, needs_init=True, output_fn=torch.add), {}
    errors = []
    learners = {0: learner(seed=0), 1: learner(seed=1, width=8)}
    def train(i):
        try: seen[i] = fit_seen(learners[i], 5, SparsifyCallback(80, criteria=criteria, schedule=schedule))
        except Exception as e: errors.append(e)
    threads = [threading.Thread(target=train, args=(i,)) for i in learners]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not errors
    for i,l in learners.items(): assert seen[i] == [[exact(n, s) for n in sizes(l.model)] for s in (0, 20, 40, 60, 80)]


# Rewinding

def test_rewound_weights_are_the_saved_ones_under_the_mask(capsys):
    learn, cb, saved, after = learner(), SparsifyCallback(80, schedule=one_shot, lth=True, rewind_epoch=1), [], []
    def save():
        if learn.epoch == 1: saved.append(weights(learn.model))
    def look():
        if (learn.epoch, learn.iter) == (1, 7): after.append(weights(learn.model))
    learn.fit(4, 1e-2, cbs=[cb, spy('before_epoch', save), spy('after_step', look)])
    masks = cb.sparsifier.masks
    for k,v in saved[0].items(): assert torch.equal(after[0][k], v*masks[k] if k in masks else v), k
    out = capsys.readouterr().out
    assert out.count('Saving Weights at epoch 1') == 1 and zeros(learn.model) == [28, 230, 921]

def test_iterative_lottery_rewinds_at_each_round():
    learn, cb, first, states = learner(), SparsifyCallback(90, schedule=iterative, lth=True), [], []
    def look():
        masks = {k: m for k,m in cb.sparsifier.masks.items()}
        rewound = masks and all(torch.equal(v, first[0][k]*masks[k])
                                for k,v in learn.model.named_parameters() if k in masks)
        if rewound: states.append(sum(zeros(learn.model)))
    learn.fit(10, 1e-2, cbs=[cb, spy('before_train', lambda: first or first.append(weights(learn.model))),
                             spy('after_step', look)])
    assert states == [sum(exact(n, s) for n in (36, 288, 1152)) for s in (30, 60, 90)]

def test_reset_end():
    learn, cb = learner(), SparsifyCallback(80, schedule=lin, reset_end=True)
    before = weights(learn.model)
    learn.fit(2, 1e-2, cbs=cb)
    masks = cb.sparsifier.masks
    for k,v in learn.model.state_dict().items():
        assert torch.equal(v, before[k]*masks[k] if k in masks else before[k]), k
    assert [r.zeros for r in cb.report.rows] == zeros(learn.model) == [28, 230, 921]

def test_tickets_are_plain_weights():
    learn, cb = learner(), SparsifyCallback(90, schedule=iterative, save_tickets=True)
    before = weights(learn.model)
    learn.fit(10, 1e-2, cbs=cb)
    files = sorted((learn.path/learn.model_dir).glob('*.safetensors'))
    counts = [sum(exact(n, s) for n in (36, 288, 1152)) for s in (30, 60, 90)]
    assert [f.stem.split('_')[-1] for f in files] == [f'{100*c/1476:.2f}' for c in counts]
    for f,c in zip(files, counts):
        plain = digits_net(4)
        plain.load_state_dict(load_file(f))
        assert sum(zeros(plain)) == c
        for k,v in plain.state_dict().items():
            assert torch.equal(v, before[k]*(v != 0) if k in cb.sparsifier.masks else before[k])

def tied_net():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Linear(10, 64), nn.Linear(64, 10))
    net[3].weight = net[1].weight
    return net

def test_tickets_of_tied_weights_have_their_zeros():
    learn = learner(model=tied_net())
    cb = SparsifyCallback(50, schedule=one_shot, save_tickets=True, layer_type=nn.Linear)
    learn.fit(2, 1e-3, cbs=cb)
    plain = tied_net()
    plain.load_state_dict(load_file(next((learn.path/learn.model_dir).glob('*.safetensors'))))
    assert zeros(plain, nn.Linear) == [320, 320, 320]

@pytest.mark.parametrize('opt_func', [partial(OptimWrapper, opt=torch.optim.RMSprop),
                                      partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=0.9)),
                                      partial(SGD, mom=0.9)])
def test_rewinding_forgets_the_optimizers_state(opt_func):
    learn, states = learner(opt_func=opt_func), []
    def look():
        opt = getattr(learn.opt, 'opt', learn.opt)
        states.append(sum('grad_avg' in v or 'momentum_buffer' in v or 'square_avg' in v for v in opt.state.values()))
    learn.fit(2, 1e-2, cbs=[SparsifyCallback(50, schedule=one_shot, lth=True), spy('after_step', look)])
    assert [n == 0 for n in states] == [False]*7 + [True] + [False]*8 and zeros(learn.model) == [18, 144, 576]

def test_rewinding_at_every_step_is_refused():
    learn, batches = learner(), []
    with pytest.raises(ValueError, match='at every step'):
        learn.fit(4, cbs=[SparsifyCallback(80, schedule=agp, lth=True),
                          spy('before_batch', lambda: batches.append(1), order=-50)])
    assert not batches

class Unused(nn.Module):
    "A convolution that takes no part"
    def __init__(self):
        super().__init__()
        self.net, self.idle = digits_net(4), nn.Conv2d(2, 2, 3)
    def forward(self, x): return self.net(x)

@pytest.mark.parametrize('criteria', ['gradient', 'wanda'])
def test_a_layer_that_takes_no_part_is_worth_nothing(criteria):
    learn = learner(model=Unused())
    learn.fit(2, 1e-2, cbs=SparsifyCallback(50, context='global', criteria=criteria))
    assert zeros(learn.model)[-1] == 36 and sum(zeros(learn.model)) == (1476 + 36) // 2

def test_zeros_that_need_not_fit_a_pattern_are_not_adopted():
    learn = learner(width=4)
    w = learn.model[3].weight.data
    w[:, :3] = 0  # three of each four inputs
    learn.fit(1, 1e-2, cbs=SparsifyCallback(50, nm=(2, 4), exclude='0', schedule=one_shot))
    for m in layers(learn.model)[1:]: assert ((m.weight != 0).movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1) <= 2).all()

def test_a_callback_may_validate_inside_of_fit():
    plain, learn = learner(), learner()
    def fit(learn, cbs): learn.fit(4, 1e-2, cbs=[cb := SparsifyCallback(80, verbose=False), *cbs]); return cb
    a = fit(plain, [])
    b = fit(learn, [spy('after_train', lambda: (learn.validate(), learn.get_preds()), order=90)])
    assert same(weights(plain.model), weights(learn.model)) and a.history == b.history
    assert b.report.zeros == a.report.zeros > 0
