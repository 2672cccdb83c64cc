"""What is sparse stays sparse: masks of the zeros a model has, held in plain loops, in averages, and by `KeepSparsity`
in any further fit"""
import gc, pickle, re, weakref
from copy import deepcopy
from functools import partial

import pytest, torch, torch.nn as nn
from fastai.basics import Callback, CancelStepException, Learner, OptimWrapper, SGD, load_learner, params
from fastai.callback.all import EarlyStoppingCallback, GradientAccumulation, SaveModelCallback
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fasterai_clone.digits import digits_net
from fasterai_clone.sparse.all import *
from helpers import exact, layers, learner, loaders, same, shown, spy, weights, zeros

T, F = True, False
AT_90 = [32, 259, 1036]  # of 36, 288 and 1,152 weights

def small():
    "Two linear layers: four of six and one of six weights are zero"
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1., 0., 0.], [0., 0., 6.]]))
        net[2].weight.copy_(torch.tensor([[1., 2.], [3., 0.], [5., 6.]]))
    return net

def pruned(sparsity=90, model=None, **kwargs):
    "A model that is sparse, and knows nothing of it"
    torch.manual_seed(0)
    model = digits_net(4) if model is None else model
    Sparsifier(model, **kwargs).sparsify_model(sparsity)
    return model

def sparse_learner(seed=0, **kwargs): return learner(seed=seed, model=pruned(), **kwargs)

def second(first, n_out=2, **kwargs):
    "A learner for odd or even, with the body of `first` and a head of its own"
    dls = loaders()
    for dl in dls.loaders: dl.dataset.items[:] = [(x, y % n_out) for x,y in dl.dataset.items]
    return Learner(dls, nn.Sequential(*first[:-1], nn.Linear(16, n_out)), loss_func=nn.CrossEntropyLoss(),
                   path='.', **kwargs)

def inside(model):
    "Every attribute, parameter, buffer and hook of every module, by name"
    return [(n, sorted(m.__dict__), [list(v) for v in m.__dict__.values() if isinstance(v, dict)])
            for n,m in model.named_modules()]

def said(out): return [l for l in out.splitlines() if l.startswith('Keeping') or 'come back' in l]


# The zeros a model has

def test_masks_of_a_model():
    net = small()
    assert Masks.of(net) == {'0.weight': torch.tensor([[T, F, F], [F, F, T]]),
                             '2.weight': torch.tensor([[T, T], [T, F], [T, T]])}
    assert Masks.of(net).n_dropped == 5 and type(Masks.of(net)) is Masks
    assert Masks.of(nn.Linear(3, 3)) == {}

def test_masks_of_what_is_pruned_are_those_that_pruned_it():
    model = digits_net(4)
    sp = Sparsifier(model, 'filter', layer_type=(nn.Conv2d, nn.Linear))
    sp.sparsify_model(50)
    assert {k for k in sp.masks if not k.endswith('bias')} < set(Masks.of(model))
    for k,mask in Masks.of(model).items(): assert torch.equal(mask, sp.masks[k]), k

def test_what_is_zero_all_over_is_not_pruned():
    net = small()
    with torch.no_grad():
        net[0].bias.zero_()
        net[2].bias.copy_(torch.tensor([0., 1., 2.]))
        net[2].weight.zero_()
    assert set(Masks.of(net)) == {'0.weight', '2.bias'}
    assert Masks.of(net)['2.bias'].tolist() == [F, T, T]

def test_only_floating_point():
    net = small()
    net[0].count = nn.Parameter(torch.tensor([0, 1, 2]), requires_grad=False)
    net[0].register_buffer('mean', torch.tensor([0., 1.]))
    assert set(Masks.of(net)) == {'0.weight', '2.weight'}
    assert Masks.of(small().bfloat16()) == Masks.of(small().double()) == Masks.of(small())

def test_negative_zero_is_zero_and_nan_is_not():
    net = nn.Linear(3, 1, bias=False)
    net.weight.data = torch.tensor([[-0., float('nan'), 1e-45]])
    assert Masks.of(net)['weight'].tolist() == [[F, T, T]]

def test_a_parameter_without_a_shape_has_no_zeros():
    assert Masks.of(nn.Sequential(nn.LazyLinear(2), small())).keys() == {'1.0.weight', '1.2.weight'}

wrappers = dict(compiled=torch.compile, parallel=nn.DataParallel, average=AveragedModel,
                both=lambda m: torch.compile(nn.DataParallel(m)), other=lambda m: nn.DataParallel(torch.compile(m)))

def compiled_inside(model):
    model[0] = torch.compile(model[0])
    return model

@pytest.mark.parametrize('wrap', [*wrappers.values(), compiled_inside], ids=[*wrappers, 'inside'])
def test_plain_names_whatever_wraps_the_model(wrap):
    model = wrap(small())
    names = list(model.state_dict())
    assert Masks.of(model) == Masks.of(small()) == Masks.of(model, include=nn.Linear)
    assert Masks.of(model, include='0').keys() == {'0.weight'} and list(model.state_dict()) == names

def test_tied_weights_are_one_parameter():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    with torch.no_grad(): net[0].weight[0] = 0
    assert set(Masks.of(net)) == {'0.weight'} == set(Masks.of(net, include='2'))
    assert Masks.of(net, exclude='2') == Masks.of(net, exclude='2.weight') == {}  # by either name
    shared = nn.Sequential(small(), nn.ReLU())
    shared.append(shared[0])
    assert set(Masks.of(shared)) == {'0.0.weight', '0.2.weight'} == set(Masks.of(shared, include='2.*'))

@pytest.mark.parametrize('kwargs', [dict(include='0'), dict(include=['0.*']), dict(include='0.weight'),
                                    dict(exclude='2'),
    dict(include=nn.Linear, exclude='2.weight'), dict(include=lambda name, m: name == '0'),
                                    dict(exclude=re.compile('^2')),
    dict(include=lambda name, m: getattr(m, 'in_features', 0) == 3)], ids=shown)
def test_include_and_exclude(kwargs): assert set(Masks.of(small(), **kwargs)) == {'0.weight'}

def test_patterns_that_match_nothing():
    net = nn.ModuleDict(dict(conv1=nn.Conv2d(1, 2, 3), head=nn.Linear(2, 2)))
    with pytest.raises(ValueError,
                       match="Unknown layer in `include` 'conv2'. Did you mean 'conv1'. Legal: conv1, head"):
        Masks.of(net, include='conv2')
    with pytest.raises(ValueError, match='Unknown layer in `exclude`'): Masks.of(net, exclude=['head', 'body.*'])
    with pytest.raises(TypeError, match='`include` takes'): Masks.of(net, include=1)
    with pytest.raises(TypeError, match='must be an `nn.Module`, got dict'): Masks.of({})

def test_looking_leaves_the_model_as_it_was():
    model = compiled_inside(small())
    before = inside(model)
    Masks.of(model)
    assert inside(model) == before


# Applied to models

def test_an_average_is_as_sparse_as_the_masks_say():
    "Decay 0.5: a weight of 8 that was dropped three steps ago is 4, 2, 1 in the average"
    net = nn.Linear(4, 1, bias=False)
    nn.init.constant_(net.weight, 8.)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(net)
    sp = Sparsifier(net, criteria=dict(weight=torch.tensor([[0., 1., 2., 3.]])), layer_type=nn.Linear)
    sp.sparsify_model(25)
    average.update_parameters(net)
    sp.sparsify_model(50)
    for _ in range(2): average.update_parameters(net)
    assert average.module.weight.tolist() == [[1, 2, 8, 8]]
    sp.masks.apply(average)
    assert average.module.weight.tolist() == [[0, 0, 8, 8]]

def test_an_average_beside_a_pruning():
    learn, cb = learner(), SparsifyCallback(90, schedule=lin)
    average = AveragedModel(learn.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    def update():
        if learn.training: average.update_parameters(learn.model)
    learn.fit(3, 1e-2, cbs=[cb, spy('after_batch', update)])
    # what the first of 24 steps drops, the average has never seen
    first = sum(exact(n, 90/24) for n in (36, 288, 1152))
    assert zeros(learn.model) == AT_90 and sum(zeros(average)) == first == 54
    kept = [m.weight[m0.weight != 0].clone() for m,m0 in zip(layers(average), layers(learn.model))]
    cb.sparsifier.masks.apply(average)
    assert zeros(average) == AT_90
    assert Masks.of(average, include=nn.Conv2d) == Masks.of(learn.model, include=nn.Conv2d)
    # and what is kept is as it was
    for m,k in zip(layers(average), kept): assert torch.equal(m.weight[m.weight != 0], k)

@pytest.mark.parametrize('wrap', [*wrappers.values(), compiled_inside], ids=[*wrappers, 'inside'])
def test_applied_to_wrapped_models(wrap):
    model, masks = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3)), Masks.of(small())
    model = wrap(model)
    masks.apply(model)
    assert Masks.of(model) == masks

def test_masks_of_tied_weights_by_either_name():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    Masks({'1.weight': torch.eye(3, dtype=torch.bool)}).apply(net)
    assert int((net[0].weight != 0).sum()) == 3

@pytest.mark.parametrize('name, shape, says',
                         [('2.weigth', (3, 2), "Unknown parameter '2.weigth'. Did you mean '2.weight'"),
                                               ('2.weight', (2, 3),
                                                r"mask of '2.weight' must have shape \(3, 2\), got \(2, 3\)"),
                                               ('2.weight', (3, 1), r'must have shape \(3, 2\), got \(3, 1\)')])
def test_masks_that_do_not_fit_touch_nothing(name, shape, says):
    net, masks = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3)), Masks.of(small(), include='0')
    before, masks[name] = weights(net), torch.zeros(shape, dtype=torch.bool)
    for f in (masks.apply, lambda m: masks.hold(m, torch.optim.SGD(m.parameters(), 1.))):
        with pytest.raises(ValueError, match=says): f(net)
        assert same(before, weights(net))

def test_a_dict_that_lacks_a_parameter():
    net = small()
    with pytest.raises(ValueError, match="Unknown parameter '2.weight'"):
        Masks.of(net).apply({'0.weight': net[0].weight})

def test_files_are_loaded_for_wrapped_models(tmp_path):
    masks = Masks.of(small())
    file  = masks.save(tmp_path/'m')
    assert Masks.load(file, torch.compile(small())) == masks == Masks.load(file, nn.DataParallel(small()))
    with pytest.raises(ValueError, match='parameter'): Masks.load(file, nn.DataParallel(nn.Linear(3, 2)))


@pytest.fixture
def process_group():
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()

def test_distributed_models(process_group, capsys):
    model = nn.parallel.DistributedDataParallel(small())
    assert Masks.of(model) == Masks.of(small())
    plain = nn.parallel.DistributedDataParallel(digits_net(4))
    learn = learner(model=plain)
    learn.fit(1, 1e-2, cbs=KeepSparsity(Masks.of(pruned())))
    assert zeros(plain) == AT_90 and 'Keeping 1,327 zeros' in capsys.readouterr().out


# In plain loops

def step(net, opt):
    "Every gradient is 1"
    for p in net.parameters(): p.grad = torch.ones_like(p)
    opt.step()

@pytest.mark.parametrize('compact', [False, True])
def test_hold_until_release(compact):
    net = small()
    opt = torch.optim.SGD(net.parameters(), lr=0.5)
    held = Masks.of(net, include='0').hold(net, opt, compact)
    for _ in range(2): step(net, opt)
    assert net[0].weight.tolist() == [[0, 0, 0], [0, 0, 5]] and net[2].weight.tolist() == [[0, 1], [2, -1], [4, 5]]
    held.release()
    step(net, opt)
    assert net[0].weight.tolist() == [[-0.5, -0.5, -0.5], [-0.5, -0.5, 4.5]]
    assert not opt._optimizer_step_pre_hooks and not opt._optimizer_step_post_hooks and inside(net) == inside(small())

@pytest.mark.parametrize('wrap', [*wrappers.values(), compiled_inside], ids=[*wrappers, 'inside'])
def test_hold_in_a_with_block_under_wrappers(wrap):
    model = wrap(small())
    opt = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    masks = Masks.of(model)
    with pytest.raises(KeyboardInterrupt), masks.hold(model, opt):
        for _ in range(3): step(model, opt)
        assert Masks.of(model) == masks
        raise KeyboardInterrupt
    step(model, opt)
    assert Masks.of(model) == {}

def test_hold_applies_at_once_and_to_new_parameters():
    "Masks from a file, weights from elsewhere; `load_state_dict(assign=True)` brings other parameters"
    net, masks = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3)), Masks.of(small())
    opt = torch.optim.SGD(net.parameters(), lr=0.5)
    with masks.hold(net, opt):
        assert Masks.of(net) == masks
        net.load_state_dict({k: torch.ones_like(v) for k,v in net.state_dict().items()}, assign=True)
        opt.step()
        assert Masks.of(net) == masks

def test_hold_refuses_what_is_no_optimizer():
    with pytest.raises(TypeError, match='takes a `torch.optim.Optimizer`'): Masks.of(small()).hold(small(), small())
    with pytest.raises(TypeError, match='must be an `nn.Module`'):
        Masks.of(small()).hold({}, torch.optim.SGD(small().parameters()))


# The callback

def test_what_it_says_and_keeps(capsys):
    learn, cb = sparse_learner(), KeepSparsity()
    learn.fit(2, 1e-2, cbs=cb)
    total = sum(p.numel() for p in learn.model.parameters())  # 1,476 in convolutions, 56 in norms, 170 in the head
    assert total == 1702 and zeros(learn.model) == AT_90 == [int((~m).sum()) for m in cb.masks.values()]
    assert said(capsys.readouterr().out) == ["Keeping 1,327 zeros of 1,476 weights in 3 parameters (86.72% of the "
                                             "model's 1,702)"]
    assert Masks.of(learn.model, include=nn.Conv2d) == cb.masks

def test_without_it_they_are_lost():
    learn = sparse_learner()
    learn.fit(2, 1e-2)
    assert sum(zeros(learn.model)) < 1327/2

def test_every_validation_and_every_batch_sees_the_zeros():
    learn, cb, seen = sparse_learner(), KeepSparsity(), []
    look = lambda: seen.append(zeros(learn.model))
    learn.fit(2, 1e-2, cbs=[cb, spy('after_step', look, order=15), spy('before_validate', look),
                            spy('before_batch', look)])
    assert seen == [AT_90] * (2*8 + 2 + 2*9)

@pytest.mark.parametrize('opt_func', [partial(SGD, mom=0.9, wd=0.1),
                                      partial(OptimWrapper,
                                              opt=partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1)),
                                      partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_momentum_and_weight_decay_bring_nothing_back(opt_func):
    learn = learner(opt_func=opt_func, wd=0.1)
    learn.fit(1, 1e-2)  # momentum is there when the pruning comes
    pruned(model=learn.model)
    seen = []
    learn.fit(2, 1e-2, reset_opt=False, cbs=[KeepSparsity(),
                                             spy('after_step', lambda: seen.append(zeros(learn.model)))])
    assert seen == [AT_90]*16

@pytest.mark.parametrize('cbs', [[GradientAccumulation(48)], [GradientAccumulation(1000)]])
def test_gradient_accumulation(cbs):
    learn = sparse_learner()
    learn.fit(2, 1e-2, cbs=[KeepSparsity(), *cbs])
    assert zeros(learn.model) == AT_90

@pytest.mark.parametrize('to', ['to_bf16', 'to_fp16'])
def test_mixed_precision(to):
    learn = getattr(sparse_learner(), to)()
    learn.fit(1, 1e-2, cbs=KeepSparsity())
    assert zeros(learn.model) == AT_90

def test_skipped_steps_and_writers_of_other_kinds():
    "Steps are cancelled, and somebody writes to the weights after each batch: validation sees the zeros"
    learn, seen = sparse_learner(), []
    def skip():
        if learn.iter >= 5: raise CancelStepException
    def write(): learn.model[0].weight.data.add_(1)
    def look(): seen.append(zeros(learn.model))
    learn.fit(2, 1e-2, cbs=[KeepSparsity(), spy('before_step', skip, order=12), spy('after_step', look),
                            spy('after_batch', lambda: learn.training and write()), spy('before_validate', look)])
    assert seen == [AT_90]*18

def test_masks_that_are_given(tmp_path, capsys):
    file  = Masks.of(pruned()).save(tmp_path/'m')
    learn = learner()
    learn.fit(1, 1e-2, cbs=KeepSparsity(Masks.load(file)))
    assert zeros(learn.model) == AT_90 and Masks.of(learn.model, include=nn.Conv2d) == Masks.load(file)
    assert 'Keeping 1,327 zeros' in capsys.readouterr().out

def test_a_parameter_that_is_given_as_zero_all_over():
    learn, mask = learner(), {'11.bias': torch.zeros(10, dtype=torch.bool)}
    learn.fit(1, 1e-2, cbs=KeepSparsity(mask))
    assert not learn.model[-1].bias.any() and sum(zeros(learn.model)) == 0

def test_include_and_exclude_choose_among_masks_too():
    masks = Masks.of(pruned())
    for kwargs in (dict(include='3'), dict(exclude=['0', '6'])):
        learn, other = learner(), sparse_learner()
        assert sum(zeros(learn.model)) == 0
        learn.fit(1, 1e-2, cbs=KeepSparsity(masks, **kwargs))
        other.fit(1, 1e-2, cbs=KeepSparsity(**kwargs))
        assert zeros(learn.model) == [0, 259, 0] and zeros(other.model)[1] == 259 and zeros(other.model)[2] < 1036/2

def test_given_masks_of_tied_weights_are_counted_once(capsys):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10))
    net[2].weight = net[1].weight
    rows, cols = torch.ones(64, 64, dtype=torch.bool), torch.ones(64, 64, dtype=torch.bool)
    rows[:32], cols[:, :32] = False, False
    learn = learner(model=net)
    learn.fit(1, 1e-2, cbs=KeepSparsity({'1.weight': rows, '2.weight': cols}))
    assert 'Keeping 3,072 zeros of 4,096 weights in 1 parameters' in capsys.readouterr().out
    assert zeros(net, nn.Linear)[:2] == [3072, 3072]

def test_quiet(capsys):
    sparse_learner().fit(1, 1e-2, cbs=KeepSparsity(verbose=False))
    assert said(capsys.readouterr().out) == []

def test_only_the_first_process_prints(monkeypatch, capsys):
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, 'get_rank', lambda: rank)
        cb = KeepSparsity()
        cb.say('here')
        assert capsys.readouterr().out == ('here\n' if rank == 0 else '')


# What is refused, before the first batch

@pytest.mark.parametrize('model, kwargs, says', [
    (digits_net, {}, 'There are no zeros to keep: no parameter has any. Prune the model first'),
    (pruned, dict(include='11'), 'no parameter has any among what `include` and `exclude` leave'),
    (digits_net, dict(masks={}), '`masks` prune nothing'),
    (digits_net, dict(masks={'0.weight': torch.ones(4, 1, 3, 3, dtype=torch.bool)}), '`masks` prune nothing'),
    (digits_net, dict(masks={'0.weigth': torch.zeros(4, 1, 3, 3, dtype=torch.bool)}), "Did you mean '0.weight'"),
    (digits_net, dict(masks={'0.weight': torch.zeros(1, 4, 3, 3, dtype=torch.bool)}),
     r'must have shape \(4, 1, 3, 3\)'),
    (pruned, dict(exclude='conv'), 'Unknown layer in `exclude`')], ids=shown)
def test_refused_before_the_first_batch(model, kwargs, says):
    learn, batches = learner(model=model(4) if model is digits_net else model()), []
    before = weights(learn.model)
    with pytest.raises(ValueError, match=says):
        learn.fit(1, cbs=[KeepSparsity(**kwargs), spy('before_batch', lambda: batches.append(1), order=-50)])
    assert not batches and same(before, weights(learn.model)) and not any('Keep' in type(c).__name__ for c in learn.cbs)

@pytest.mark.parametrize('kwargs, says', [(dict(masks=digits_net(4)), 'got Sequential'),
                                          (dict(masks='file'), 'got str'),
                                          (dict(masks={'0.weight': torch.ones(2)}), 'must be a bool tensor'),
                                          (dict(include=1), '`include`')])
def test_refused_when_made(kwargs, says):
    with pytest.raises(TypeError, match=says): KeepSparsity(**kwargs)


# Transfer

@pytest.mark.parametrize('n_out', [2, 10])
def test_another_task_with_the_body_of_the_first(n_out):
    first = learner()
    first.fit(2, 1e-2, cbs=SparsifyCallback(90))
    learn = second(first.model, n_out)
    before = Masks.of(learn.model)
    learn.fit(2, 1e-2, cbs=KeepSparsity())
    assert zeros(learn.model) == AT_90 and Masks.of(learn.model, include=nn.Conv2d) == before
    assert int((learn.model[-1].weight == 0).sum()) == 0
    first.fit(1, 1e-2, cbs=KeepSparsity())  # and back
    assert zeros(first.model) == AT_90

def test_frozen_and_fine_tuned(capsys):
    learn = second(pruned(), splitter=lambda m: [params(m[:-1]), params(m[-1])])
    before, seen = Masks.of(learn.model), []
    learn.fine_tune(2, 1e-2, freeze_epochs=1, cbs=[KeepSparsity(),
                                                   spy('after_step', lambda: seen.append(zeros(learn.model)))])
    assert seen == [AT_90]*24 and Masks.of(learn.model, include=nn.Conv2d) == before
    assert len(said(capsys.readouterr().out)) == 2

def test_one_callback_for_two_learners():
    cb, a, b = KeepSparsity(), sparse_learner(), learner(model=pruned(50))
    for l in (a, b, a): l.fit(1, 1e-2, cbs=cb)
    assert zeros(a.model) == AT_90 and zeros(b.model) == [18, 144, 576]

def test_a_dense_checkpoint_between_two_fits():
    learn = learner(cbs=KeepSparsity())
    learn.save('dense')
    pruned(model=learn.model)
    learn.fit(1, 1e-2)
    learn.load('dense')
    assert sum(zeros(learn.model)) == 0
    learn.fit(1, 1e-2)
    assert zeros(learn.model) == AT_90

def test_further_pruning_between_two_fits_is_kept_as_well():
    learn = sparse_learner(cbs=(cb := KeepSparsity()))
    learn.fit(1, 1e-2)
    pruned(95, learn.model)
    learn.fit(1, 1e-2)
    assert zeros(learn.model) == [exact(n, 95) for n in (36, 288, 1152)]
    assert set(cb.masks) >= {'0.weight', '3.weight', '6.weight'}

def test_a_new_layer_is_not_held_by_the_masks_of_the_old_one():
    model = pruned(90, layer_type=(nn.Conv2d, nn.Linear))
    learn = learner(model=model, cbs=(cb := KeepSparsity()))
    learn.fit(1, 1e-2)
    assert zeros(model, nn.Linear) == [144]
    model[-1] = nn.Linear(16, 10)
    learn.create_opt()
    learn.fit(1, 1e-2)
    assert zeros(model) == AT_90 and zeros(model, nn.Linear) == [0] and '11.weight' not in cb.masks


# Together with other callbacks

@pytest.mark.parametrize('order', [1, -1])
@pytest.mark.parametrize('criteria', [large_final, movement])
def test_with_a_pruning_that_goes_on(order, criteria, capsys):
    learn = learner(model=pruned(50))
    before, steps = Masks.of(learn.model), []
    prune = SparsifyCallback(90, schedule=lin, criteria=criteria)
    learn.fit(2, 1e-2,
              cbs=[prune, KeepSparsity(), spy('after_step', lambda: steps.append(sum(zeros(learn.model))))][::order])
    assert zeros(learn.model) == AT_90 == [r.zeros for r in prune.report.rows] and steps == sorted(steps)
    assert steps[0] == 738
    now = Masks.of(learn.model)
    for k,mask in before.items(): assert not (now[k] & ~mask).any()
    assert 'Final Sparsity: [89.91]%' in capsys.readouterr().out

@pytest.mark.parametrize('order', [1, -1])
def test_pruning_to_less_than_there_is(order):
    "The pruning takes the kept zeros first: none are added to those"
    learn = sparse_learner()
    learn.fit(2, 1e-2, cbs=[SparsifyCallback(50, schedule=lin), KeepSparsity()][::order])
    assert zeros(learn.model) == AT_90

def test_both_orders_give_the_same_weights():
    runs = []
    for order in (1, -1):
        learn = learner(model=pruned(50))
        learn.fit(2, 1e-2, cbs=[SparsifyCallback(90, schedule=lin), KeepSparsity()][::order])
        runs.append(weights(learn.model))
    assert same(*runs)

def test_a_checkpoint_that_is_denser_is_masked_again(capsys):
    "Saved in an epoch before somebody pruned on, reloaded at the end"
    learn, cb = sparse_learner(), KeepSparsity()
    torch.save(digits_net(4).state_dict(), 'dense.pth')
    class Reload(SaveModelCallback):
        def after_fit(self): self.learn.model.load_state_dict(torch.load('dense.pth', weights_only=True))
    learn.fit(2, 1e-2, cbs=[cb, Reload()])
    out = said(capsys.readouterr().out)
    assert zeros(learn.model) == AT_90 and out[1].startswith('1,327 dropped weights had come back') and len(out) == 2

def test_saving_and_stopping_together(capsys):
    learn = sparse_learner()
    # best in epoch 0
    worse = spy('after_epoch', lambda: learn.recorder.values[-1].__setitem__(1, float(learn.epoch)), order=55)
    learn.fit(4, 1e-2, cbs=[KeepSparsity(), worse, SaveModelCallback(), EarlyStoppingCallback(patience=1)])
    assert zeros(learn.model) == AT_90 and len(said(capsys.readouterr().out)) == 1  # the checkpoint is sparse too
    assert [int((v == 0).sum()) for v in torch.load('models/model.pth', weights_only=True).values()
            if v.ndim == 4] == AT_90

def test_lr_find_leaves_nothing(capsys):
    learn = sparse_learner(cbs=(cb := KeepSparsity()))
    before = weights(learn.model)
    learn.lr_find(num_it=12, show_plot=False)
    assert same(before, weights(learn.model)) and cb.masks is None and capsys.readouterr().out == ''
    learn.fit(1, 1e-2)
    learn.lr_find(num_it=12, show_plot=False)
    assert zeros(learn.model) == AT_90

@pytest.mark.parametrize('call', ['validate', 'get_preds'])
def test_inference_with_the_callback_attached(call, capsys):
    learn, plain = sparse_learner(cbs=(cb := KeepSparsity())), sparse_learner()
    ours, theirs = getattr(learn, call)(), getattr(plain, call)()
    assert cb.masks is None and capsys.readouterr().out == ''
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a,b in zip(ours, theirs))

def test_a_dense_model_can_be_validated():
    learner(cbs=KeepSparsity()).validate()

@pytest.mark.parametrize('call', ['validate', 'get_preds'])
def test_inference_inside_fit(call):
    learn, seen = sparse_learner(), []
    class Infer(Callback):
        def after_train(self): getattr(self.learn, call)()
    learn.fit(2, 1e-2, cbs=[KeepSparsity(), Infer(), spy('after_step', lambda: seen.append(zeros(learn.model)))])
    assert seen == [AT_90]*16


# The model stays yours

def test_nothing_of_ours_is_left():
    learn = sparse_learner()
    before, cbs, metrics, inner = inside(learn.model), list(learn.cbs), list(learn.metrics), []
    learn.fit(1, 1e-2, cbs=[KeepSparsity(), spy('after_batch', lambda: inner.append(inside(learn.model)))])
    plain = sparse_learner()
    plain.fit(1, 1e-2)
    assert inside(learn.model) == before == inner[3] and list(learn.cbs) == cbs and list(learn.metrics) == metrics
    assert set(vars(learn)) == set(vars(plain))

EVENTS = ['before_fit', 'before_epoch', 'before_batch', 'before_step', 'after_step', 'after_train',
          'before_validate', 'after_epoch', 'after_fit']

@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize('event', EVENTS)
def test_a_crash_leaves_nothing_behind(event, error, capsys):
    def stop(): raise error('stop')
    learn = sparse_learner()
    cbs, modules = list(learn.cbs), inside(learn.model)
    with pytest.raises(error, match='stop'): learn.fit(1, 1e-2, cbs=[KeepSparsity(), spy(event, stop)])
    assert list(learn.cbs) == cbs and inside(learn.model) == modules and zeros(learn.model) == AT_90
    attached = KeepSparsity()
    learn.add_cb(attached)
    with pytest.raises(error, match='stop'): learn.fit(1, 1e-2, cbs=spy(event, stop))
    capsys.readouterr()
    learn.validate()
    assert said(capsys.readouterr().out) == []
    learn.fit(1, 1e-2)
    assert zeros(learn.model) == AT_90

def test_it_is_freed_after_fit():
    learn, cb = sparse_learner(), KeepSparsity()
    learn.fit(1, 1e-2, cbs=cb)
    ref = weakref.ref(cb)
    del cb
    gc.collect()
    assert ref() is None

def test_export_and_load_learner_with_the_callback_attached():
    learn = sparse_learner(cbs=KeepSparsity())
    learn.fit(1, 1e-2)
    learn.export('m.pkl')
    back = load_learner('m.pkl')
    back.dls = learn.dls
    assert zeros(back.model) == AT_90
    back.fit(1, 1e-2)
    assert zeros(back.model) == AT_90

def test_export_without_the_callback_holds_nothing_of_ours():
    learn = sparse_learner()
    learn.fit(1, 1e-2, cbs=KeepSparsity())
    learn.export('m.pkl')
    assert b'fasterai_clone.sparse' not in (learn.path/'m.pkl').read_bytes()

@pytest.mark.parametrize('copy', [deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=['deepcopy', 'pickle'])
def test_copies(copy):
    learn, cb = sparse_learner(), KeepSparsity(include=['3', '6'])
    learn.fit(1, 1e-2, cbs=copy(cb))
    learn.fit(1, 1e-2, cbs=cb)
    used = copy(cb)
    assert used.masks == cb.masks and list(used.masks) == ['3.weight', '6.weight']
    learn.fit(1, 1e-2, cbs=used)
    assert zeros(learn.model)[1:] == AT_90[1:]

@pytest.mark.parametrize('wrap', [nn.DataParallel, compiled_inside], ids=['parallel', 'inside'])
def test_wrapped_models(wrap):
    model = pruned()
    if wrap is compiled_inside: model[0] = torch.compile(model[0], backend='eager')
    else: model = wrap(model)
    learn = learner(model=model)
    learn.fit(1, 1e-2, cbs=(cb := KeepSparsity()))
    assert zeros(learn.model) == AT_90 and set(cb.masks) == {'0.weight', '3.weight', '6.weight'}

def test_a_compiled_model():
    learn = learner(model=torch.compile(pruned(), backend='eager'))
    learn.fit(1, 1e-2, cbs=KeepSparsity())
    assert zeros(learn.model) == AT_90
