"""Law 7: what is wrong is refused when the object is built, else before the first batch, and the message says what to
write instead"""
import math
from functools import partial

import pytest, torch, torch.nn as nn
from fastai.callback.schedule import SchedCos

from fasterai_clone.digits import digits_net
from fasterai_clone.sparse.all import *
from fasterai_clone.core.schedule import as_schedule
from helpers import learner, shown, spy, weights

def sparsifier(*args, **kwargs): return Sparsifier(digits_net(4), *args, **kwargs)
def linears(): return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

def refused(f, *says):
    "`f()` raises an error of ours: one that says all of `says`"
    with pytest.raises((ValueError, TypeError)) as e: f()
    for s in says: assert s in str(e.value), f'{s!r} is not in {e.value}'

def refused_before_training(cb, *says, model=None):
    "`fit` with `cb` sees no batch and changes nothing"
    learn, batches = learner(model=model), []
    before, metrics, cbs = weights(learn.model), list(learn.metrics), list(learn.cbs)
    refused(lambda: learn.fit(4, cbs=[cb, spy('before_batch', lambda: batches.append(1), order=-50)]), *says)
    after = weights(learn.model)
    assert not batches and all(torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before)
    assert list(learn.metrics) == metrics and list(learn.cbs) == cbs

names = [
    (dict(granularity='filtre'),             ["granularity", "'filtre'", "Did you mean 'filter'", 'kernel']),
    (dict(granularity='Weight'),             ["granularity", "'Weight'", "Did you mean 'weight'"]),
    (dict(context='globl'),                  ["context", "'globl'", "Did you mean 'global'", 'local']),
    (dict(context=None),                     ["context", 'None', 'local']),
    (dict(criteria='large_finall'),          ["criterion", "'large_finall'", "Did you mean 'large_final'", 'movement']),
    (dict(criteria=3),                       ["criterion", '3', 'large_final']),
    (dict(criteria=None),                    ["criterion", 'None', 'large_final']),
    (dict(granularity=5),                    ["granularity", '5']),
    (dict(granularity=None),                 ["granularity", 'None']),
    (dict(layer_type=3),                     ["layer_type", '3']),
    (dict(layer_type=()),                    ["layer_type", '()']),
    (dict(nm=(4, 2)),                        ["`nm`", '(4, 2)']),
    (dict(nm='4:2'),                         ["`nm`", '2:4']),
    (dict(nm=3),                             ["`nm`", '3']),
    (dict(nm=True, granularity='filter'),    ["`nm`", "'filter'", 'weight']),
    (dict(include=3),                        ["include", '3']),
    (dict(exclude=[3]),                      ["exclude", '3'])]

@pytest.mark.parametrize('kwargs, says', names, ids=str)
def test_sparsifier_refuses_when_built(kwargs, says): refused(lambda: sparsifier(**kwargs), *says)

@pytest.mark.parametrize('kwargs, says', names, ids=str)
def test_callback_refuses_when_built(kwargs, says): refused(lambda: SparsifyCallback(40, **kwargs), *says)

sparsities = [(-1, ['-1']), (101, ['101']), (math.nan, ['nan']), (math.inf, ['inf']), (True, ['True']),
              ('90', ["'90'"]), (None, ['None']),
              (0.9, ['0.9', 'write 90']), (0.5, ['write 50']),
              ([50, 0.9, 50], ['sparsity[1]', 'write 90']), ([50, True, 50], ['sparsity[1]', 'True']),
              ([[90], 50, 50], ['sparsity[0]', '[90]']), ({'0': '50'}, ["sparsity['0']", "'50'"])]

@pytest.mark.parametrize('sparsity, says', sparsities, ids=str)
def test_sparsities_are_percentages(sparsity, says):
    sp = sparsifier()
    refused(lambda: SparsifyCallback(sparsity), 'sparsity', 'percentage', *says)
    refused(lambda: sp.sparsify_model(sparsity), 'sparsity', 'percentage', *says)
    assert not sp.masks and sp.sparsity == 0

@pytest.mark.parametrize('sparsity, says', sparsities[:-4], ids=str)
def test_of_one_layer_too(sparsity, says):
    refused(lambda: sparsifier().sparsify_layer('0', sparsity), 'sparsity', 'percentage', *says)

@pytest.mark.parametrize('sparsity', [{'0': 50}, [50, 50, 50]], ids=str)
def test_layers_cannot_be_asked_for_globally(sparsity):
    refused(lambda: SparsifyCallback(sparsity, context='global'), 'context="local"')
    refused(lambda: sparsifier(context='global').sparsify_model(sparsity), 'context="local"')

@pytest.mark.parametrize('sparsity, says', [({'9': 50}, ["'9'", '0, 3, 6']),
                                            ({'0': 50, 'head': 3}, ["'head'", '0, 3, 6']),
                                            ([50, 50], ['2 numbers', '3 layers', '0, 3, 6']),
                                            ([], ['0 numbers', '3 layers']),
                                            ({}, ['sparsity', '0, 3, 6'])], ids=str)
def test_layers_that_are_not_there(sparsity, says):
    refused(lambda: sparsifier().sparsify_model(sparsity), *says)
    refused_before_training(SparsifyCallback(sparsity), *says)

@pytest.mark.parametrize('kwargs, says', [(dict(include='head*'), ["`include`", "'head*'", '0, 3, 6']),
                                          (dict(exclude='9.*'), ["`exclude`", "'9.*'", '0, 3, 6']),
                                          (dict(exclude='*'), ['no layer', '0, 3, 6']),
                                          (dict(layer_type=nn.Conv3d),
                                           ['Conv3d', 'Conv2d (3)', 'Linear (1)', 'layer_type']),
                                          (dict(granularity=(7,)), ['(7,)', '0 and 3']),
                                          (dict(granularity=(1, 1)), ['(1, 1)']),
                                          (dict(nm=True), ['inputs', '4', 'exclude']),
                                          (dict(granularity='kernel', layer_type=(nn.Conv2d, nn.Linear)),
                                           ['Linear', "'kernel'", 'Legal: weight, column, row, filter, layer']),
                                          (dict(granularity='vertical_slice', layer_type=nn.Linear),
                                           ['Linear', "'vertical_slice'", 'weight'])], ids=str)
def test_what_depends_on_the_model(kwargs, says):
    refused(lambda: sparsifier(**kwargs), *says)
    refused_before_training(SparsifyCallback(40, **kwargs), *says)

def test_no_layer_matched_lists_the_types_there_are():
    refused(lambda: Sparsifier(linears()), 'Conv2d', 'Linear (2)', 'layer_type')
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    refused_before_training(SparsifyCallback(90), 'Conv2d', 'Linear (2)', 'layer_type', model=net)

def test_what_is_no_model():
    refused(lambda: Sparsifier({}), '`model`', 'nn.Module', 'dict')
    refused(lambda: SparsifyCallback(90, model='resnet18'), '`model`', 'nn.Module', 'str')

def test_a_model_that_is_not_the_learners():
    refused_before_training(SparsifyCallback(90, model=digits_net(4)), '`model`')

def test_a_layer_that_is_not_there():
    sp = sparsifier()
    refused(lambda: sp.sparsify_layer('features.0', 50), "'features.0'", '0, 3, 6')
    refused(lambda: sp.sparsify_layer(nn.Conv2d(1, 1, 1), 50), 'Conv2d', '0, 3, 6')

# Weights and scores that are no numbers

@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers(bad):
    net = digits_net(4)
    net[3].weight.data[1, 2, 0, 1] = bad
    refused(lambda: Sparsifier(net), '3 (Conv2d)', 'NaN or infinite')
    refused_before_training(SparsifyCallback(90), '3 (Conv2d)', 'NaN or infinite', model=net)

@pytest.mark.parametrize('bad', [math.nan, math.inf])
@pytest.mark.parametrize('context', ['local', 'global'])
def test_weights_that_become_no_numbers(context, bad):
    net = digits_net(4)
    sp  = Sparsifier(net, context=context)
    net[3].weight.data[1, 2, 0, 1] = bad
    refused(lambda: sp.sparsify_model(50), 'NaN or infinite', '3')
    assert not sp.masks and int((net[0].weight == 0).sum()) == 0  # all or none

def nan_scores(w): return w * math.nan
def inf_scores(w): return w.abs() / 0
def one_score (w): return w.abs().sum()
def no_tensor (w): return w.abs().tolist()
def mistaken  (w): return w.magnitude()

@pytest.mark.parametrize('f, says', [(nan_scores, 'NaN or infinite'), (inf_scores, 'NaN or infinite'),
                                     (one_score, '(4, 1, 3, 3)'),
                                     (no_tensor, '(4, 1, 3, 3)')])
def test_scores_that_are_no_scores(f, says):
    refused(lambda: sparsifier(criteria=f), says)
    refused_before_training(SparsifyCallback(90, criteria=f, schedule=one_shot), says)

def test_a_score_function_with_a_mistake_is_found_before_training():
    learn, batches = learner(), []
    with pytest.raises(Exception, match='magnitude'):
        learn.fit(4, cbs=[SparsifyCallback(90, criteria=mistaken, schedule=one_shot),
                          spy('before_batch', lambda: batches.append(1), order=-50)])
    assert not batches

def ready(**change):
    scores = {f'{n}.weight': digits_net(4)[n].weight.detach().abs() for n in (0, 3, 6)}
    return {**scores, **{k.replace('_', '.'): v for k,v in change.items()}}

@pytest.mark.parametrize('scores, says',
                         [(ready(**{'3_weight': torch.full((8, 4, 3, 3), math.nan)}), ['3.weight', 'NaN or infinite']),
                                          (ready(**{'3_weight': torch.ones(8)}), ['3.weight', '(8, 4, 3, 3)', '(8,)']),
                                          ({'0.weight': torch.ones(4, 1, 3, 3)}, ['3.weight, 6.weight']),
                                          (ready(**{'9_weight': torch.ones(1)}), ['9.weight', '6.weight'])],
                                          ids=['nan', 'shape', 'missing', 'unknown'])
def test_ready_scores(scores, says):
    refused(lambda: sparsifier(criteria=scores), *says)
    refused_before_training(SparsifyCallback(90, criteria=scores, schedule=one_shot), *says)

@pytest.mark.parametrize('kwargs', [dict(needs_init=True, needs_update=True), dict(return_init=True),
                                    dict(output_fn=torch.add),
                                    dict(reducer=3), dict(normalizer='sum')], ids=shown)
def test_criteria_that_contradict_themselves(kwargs): refused(lambda: Criteria(torch.abs, **kwargs), 'Criteria')

def test_scores_without_what_they_need():
    refused(lambda: sparsifier(criteria=gradient).sparsify_model(50), 'gradient', '0.weight', 'backward')
    refused(lambda: sparsifier(criteria=wanda).sparsify_model(50), 'wanda needs data', 'DataLoader')

# Schedules

def no_args(): return 1
def two_args(a, b): return 1
def text(pos): return 'x'
def nothing(pos): return None
def wrong(pos): return 1/(pos - pos)
def above(pos): return 90*pos
def below(pos): return -pos
def nan(pos): return math.nan

@pytest.mark.parametrize('schedule, says', [
    ('agpp', ["'agpp'", "Did you mean 'agp'", 'one_shot']), ('iterativ', ["Did you mean 'iterative'"]),
    (3, ['3', 'one_shot']),
    (None, ['None']), (Schedule, ['Schedule']),
    (no_args, ['no_args', 'pos']), (two_args, ['two_args', 'pos']), (text, ['text', "'x'"]),
    (nothing, ['nothing', 'None']),
    (wrong, ['wrong']), (above, ['above', '0 to 1']), (below, ['below', '0 to 1']), (nan, ['nan', '0 to 1']),
    (SchedCos(0, 90), ['0 to 1']), (partial(iterative, nsteps=5), ["'nsteps'", "'n_steps'"]),
    (partial(iterative, n_steps=0), ['n_steps', '0']), (partial(iterative, n_steps=-1), ['n_steps', '-1']),
    (partial(iterative, n_steps=2.5), ['2.5']), (partial(iterative, 5), ['n_steps']),
    (partial(iterative, start_pct=2), ['start_pct', '2']),
    (partial(agp, start_sparsity=0.5), ['start_sparsity', '0.5'])])
def test_schedules(schedule, says):
    refused(lambda: as_schedule(schedule), *says)
    refused(lambda: SparsifyCallback(90, schedule=schedule), *says)

@pytest.mark.parametrize('kwargs, says', [(dict(start_pct=0.5, end_pct=0.2), ['start_pct=0.5', 'end_pct=0.2']),
                                          (dict(start_pct=-1), ['start_pct=-1']), (dict(end_pct=1.5), ['end_pct=1.5']),
                                          (dict(start_pct=math.nan), ['nan']),
                                          (dict(start_sparsity=101), ['start_sparsity', '101']),
                                          (dict(start_sparsity=0.5), ['start_sparsity', '0.5'])], ids=str)
def test_schedule_itself(kwargs, says): refused(lambda: Schedule(sched_agp, **kwargs), *says)

def test_schedule_of_no_function(): refused(lambda: Schedule('agp'), 'sched_func', "'agp'")

@pytest.mark.parametrize('kwargs, says', [
    (dict(start_sparsity=0.5), ['start_sparsity', 'write 50']), (dict(start_sparsity=101), ['start_sparsity', '101']),
    (dict(start_sparsity='5'), ['start_sparsity', "'5'"]), (dict(every=0), ['every', '0']),
    (dict(every=1.5), ['every', '1.5']),
    (dict(every=True), ['every', 'True']), (dict(round_to=0), ['round_to', '0']),
    (dict(round_to=2.5), ['round_to', '2.5']),
    (dict(round_to=8, context='output'), ['round_to', 'local']), (dict(rewind_epoch=-1), ['rewind_epoch', '-1']),
    (dict(start_epoch=-1), ['start_epoch', '-1']), (dict(start_epoch='2'), ['start_epoch', "'2'"]),
    (dict(end_epoch=True), ['end_epoch', 'True']), (dict(start_epoch=math.nan), ['start_epoch', 'nan']),
    (dict(start_epoch=3, end_epoch=2), ['start_epoch', 'end_epoch'])], ids=str)
def test_other_arguments_when_built(kwargs, says): refused(lambda: SparsifyCallback(90, **kwargs), *says)

@pytest.mark.parametrize('kwargs, says', [(dict(start_epoch=5), ['start_epoch', '4 epochs', '5']),
                                          (dict(end_epoch=4.5), ['end_epoch', '4 epochs', '4.5']),
                                          (dict(schedule=one_shot, end_epoch=1), ['end_epoch', '1']),
                                          (dict(schedule=one_shot, lth=True, rewind_epoch=3), ['rewind_epoch', '3']),
                                          (dict(lth=True), ['every step', 'one_shot']),
                                          (dict(nm=True, exclude='0'), ['2:4', '50', '3'])], ids=shown)
def test_what_depends_on_the_fit(kwargs, says): refused_before_training(SparsifyCallback(90, **kwargs), *says)

# Plain PyTorch

def test_more_zeros_than_a_pattern_has():
    sp = sparsifier(nm=True, exclude='0')
    refused(lambda: sp.sparsify_model(60), '2:4', '50')
    assert not sp.masks

def test_rounding():
    for r in (0, -1, 2.5, True): refused(lambda: sparsifier().sparsify_model(50, round_to=r), 'round_to', str(r))
    refused(lambda: sparsifier(context='output').sparsify_model(50, round_to=4), 'round_to', 'local')

def test_hold_takes_an_optimizer():
    refused(lambda: sparsifier().hold(digits_net()), 'Optimizer', 'Sequential', 'apply_masks')

def test_masks_are_bool_and_fit():
    masks = sparsifier().masks
    refused(lambda: masks.update({'0.weight': torch.ones(4, 1, 3, 3)}), '0.weight', 'bool', 'float32')
    refused(lambda: masks.update({'0.weight': torch.ones(4) > 0}), '(4, 1, 3, 3)', '(4,)')
    with pytest.raises(KeyError, match='0.weight'): masks['0.wight'] = torch.ones(4) > 0

def test_states_of_another_kind():
    sp = sparsifier()
    refused(lambda: sp.load_state_dict({}), 'masks')
    refused(lambda: sp.load_state_dict(sparsifier('filter').state_dict()), 'granularity', "'filter'", "'weight'")
    refused(lambda: sp.load_state_dict(sparsifier(criteria=movement).state_dict()), 'reference', "'init'")

def test_weights_that_cannot_be_masked():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3))
    refused(lambda: Sparsifier(conv), 'parametrization', 'exclude')
    refused(lambda: Sparsifier(nn.Sequential(nn.LazyConv2d(2, 3))), 'no shape yet', 'batch')
    refused(lambda: Sparsifier(nn.Conv2d(2, 2, 3, dtype=torch.complex64)), 'complex64')
    refused(lambda: Sparsifier(nn.BatchNorm2d(2), layer_type=nn.BatchNorm2d), 'BatchNorm2d', 'add_granularity')
    refused(lambda: Sparsifier(nn.utils.parametrizations.weight_norm(nn.LSTM(2, 2), 'weight_hh_l0'),
                               layer_type=nn.LSTM), 'weight_hh_l0', 'parametrization')

@pytest.mark.parametrize('budget', ['params', 'flops'])
def test_a_budget_promises_no_least_sparsity(budget):
    kwargs = dict(context='global', budget=budget, min_sparsity=50)
    refused(lambda: Sparsifier(nn.Linear(3, 3), layer_type=nn.Linear, **kwargs), '`min_sparsity`', budget)
    refused(lambda: SparsifyCallback(50, **kwargs), '`min_sparsity`', budget)
