"""Models that change under us: layers and models that are replaced, fits inside of fits, several that prune or keep the
same weights"""
import warnings
from copy import deepcopy

import pytest, torch, torch.nn as nn
from fastai.basics import Callback
import fastai.callback.schedule  # noqa: F401, adds `lr_find` and `fit_one_cycle` to `Learner`
from torch.nn.utils import parametrizations, prune

from fasterai_clone.digits import digits_net
from fasterai_clone.prune.all import PruneCallback
from fasterai_clone.sparse.all import *
from helpers import exact, learner, measured, spy, zeros

SIZES = [36, 288, 1152]

def conv_like(old, **kwargs):
    "A new convolution with the name-giving sizes of `old`"
    sizes = dict(in_channels=old.in_channels, out_channels=old.out_channels, kernel_size=3, padding=1,
                 stride=old.stride, bias=old.bias is not None)
    return nn.Conv2d(**{**sizes, **kwargs})

def quiet(learn, n, *cbs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-2, cbs=cbs)

def at_step(step, f):
    "A callback that calls `f(learn)` once, after so many batches"
    class Once(Callback):
        order, n = -20, 0  # before anything else in the event
        def before_batch(self):
            self.n += self.training
            if self.training and self.n == step + 1: f(self.learn)
    return Once()

def sgd(model): return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

def step(model, opt, n=1):
    for _ in range(n):
        model(torch.randn(8, 1, 8, 8)).square().mean().backward()
        opt.step()
        opt.zero_grad()


# What is followed

def replace_layer(m):     m[6] = conv_like(m[6])
def replace_parameter(m): m[6].weight = nn.Parameter(torch.randn_like(m[6].weight))
def assign(m):            m.load_state_dict(digits_net(4).state_dict(), assign=True)
def compile_layer(m):     m[6] = torch.compile(m[6], backend='eager')
def wrap_layer(m):        m[6] = nn.DataParallel(m[6])
def freeze_layer(m):      m[6].weight.requires_grad_(False)
def to_double(m):         m.double()
FOLLOWED = [replace_layer, replace_parameter, assign, compile_layer, wrap_layer, freeze_layer, to_double]

@pytest.mark.parametrize('change', FOLLOWED)
@pytest.mark.parametrize('kwargs', [dict(), dict(context='global'), dict(granularity='filter'),
                                    dict(criteria='movement')])
def test_a_change_that_is_followed(change, kwargs):
    "The masks hold for what has the name now, and the report counts it before and after they are applied"
    model = digits_net(4)
    sp = Sparsifier(model, **kwargs)
    sp.sparsify_model(50)
    change(model)
    def counted(): return [int((p == 0).sum()) for k,p in model.named_parameters() if p.ndim == 4]
    assert [r.zeros for r in sp.report().rows] == counted()
    sp.apply_masks()
    assert [r.zeros for r in sp.report().rows] == counted()
    assert sum(counted()) == sum(int((~m).sum()) for k,m in sp.masks.items() if m.ndim == 4)
    sp.sparsify_model(75)
    assert [r.zeros for r in sp.report().rows] == counted()
    if sp.granularity == 'weight':
        assert sum(counted()) == exact(1476, 75) if kwargs.get('context') else counted() == [
            exact(n, 75) for n in SIZES]
    assert sp.report().total == sum(p.numel() for p in model.parameters())

@pytest.mark.parametrize('criteria,expected', [('movement', 0.), ('large_init', None)])
def test_what_a_new_layer_is_compared_with_begins_anew(criteria, expected):
    model = digits_net(4)
    sp = Sparsifier(model, criteria=criteria)
    replace_layer(model)
    sp.follow()
    assert torch.equal(sp.refs['6.weight'], model[6].weight) and sp.refs['6.weight'] is not model[6].weight
    assert not torch.equal(sp.refs['3.weight'], model[6].weight[:sp.refs['3.weight'].shape[0], :4])

def test_gradients_of_the_old_layer_are_forgotten():
    model = digits_net(4)
    sp, opt = Sparsifier(model, criteria='gradient'), sgd(model)
    with sp.hold(opt):
        step(model, opt)
        replace_layer(model)
        with pytest.raises(ValueError, match='gradient of 6.weight'): sp.sparsify_model(50)
        opt = sgd(model)
    with sp.hold(opt):
        step(model, opt)
        sp.sparsify_model(50)
    assert zeros(model) == [exact(n, 50) for n in SIZES]

@pytest.mark.parametrize('compact', [False, True])
@pytest.mark.parametrize('change', [replace_layer, replace_parameter, assign])
def test_hold_goes_on_with_the_new_one(change, compact):
    model = digits_net(4)
    sp, opt = Sparsifier(model), sgd(model)
    sp.sparsify_model(50)
    with sp.hold(opt, compact):
        step(model, opt, 2)
        change(model)
        opt.param_groups[0]['params'][:] = [*model.parameters()]  # the optimizer trains what is there now
        step(model, opt, 2)
        assert zeros(model) == [exact(n, 50) for n in SIZES]
        assert all((model.get_parameter(k)[~m] == 0).all() for k,m in sp.masks.items())

@pytest.mark.parametrize('compact', [False, True])
def test_masks_hold_too(compact):
    model = digits_net(4)
    Sparsifier(model).sparsify_model(50)
    masks, opt = Masks.of(model), sgd(model)
    with masks.hold(model, opt, compact):
        replace_layer(model)
        opt.param_groups[0]['params'][:] = [*model.parameters()]
        step(model, opt, 2)
    assert zeros(model) == [exact(n, 50) for n in SIZES]

def test_a_copy_and_a_pickle_watch_their_own_model():
    import pickle
    model = digits_net(4)
    sp = Sparsifier(model)
    sp.sparsify_model(50)
    for twin in (deepcopy(sp), pickle.loads(pickle.dumps(sp))):
        replace_layer(twin.model)
        twin.apply_masks()
        assert zeros(twin.model) == [exact(n, 50) for n in SIZES] and sp.watched.is_in_place()

def test_ties_are_those_of_now():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    net[1].weight = net[0].weight
    with pytest.warns(UserWarning, match='1.weight'): sp = Sparsifier(net, layer_type=nn.Embedding)
    assert sp.report().tied == (('0.weight', '1.weight (Linear), which was not chosen'),) and sp.report().total == 36
    net[1].weight = nn.Parameter(torch.randn(9, 4))
    assert sp.report().tied == () and sp.report().total == 72 and [d[0] for d in sp.report().dense] == ['1.weight']


# What is refused, by name

def another_shape(m):  m[6] = conv_like(m[6], out_channels=8)
def shape_of_data(m):  m[6].weight.data = m[6].weight.data[:8]
def another_type(m):   m[6] = nn.ConvTranspose2d(m[6].in_channels, m[6].out_channels, 3)
def weight_norm(m):    parametrizations.weight_norm(m[6])
def old_norm(m):       torch.nn.utils.weight_norm(m[6])
def prune_added(m):    prune.l1_unstructured(m[6], 'weight', 0.2)
def to_meta(m):        m.to('meta')
def moved(m):          m.insert(6, nn.Identity())
def gone(m):           m[6] = nn.Identity()
def integers(m):         m[6].weight = nn.Parameter(m[6].weight.long(), requires_grad=False)
REFUSED = [another_shape, shape_of_data, another_type, weight_norm, prune_added, to_meta, moved, gone, integers]

@pytest.mark.parametrize('change', REFUSED)
@pytest.mark.parametrize('use', ['report', 'sparsity', 'update', 'apply', 'layer', 'state'])
def test_a_change_that_is_refused(change, use):
    "No number is reported, no mask is changed, and the message names the layer"
    model = digits_net(4)
    sp = Sparsifier(model)
    sp.sparsify_model(50)
    change(model)
    before = {k: m.clone() for k,m in sp.masks.items()}
    calls  = dict(report=sp.report, sparsity=lambda: sp.sparsity, update=lambda: sp.sparsify_model(70),
                  apply=sp.apply_masks, layer=lambda: sp.sparsify_layer('3', 70), state=sp.state_dict)
    with pytest.raises(ValueError, match='meta' if change is to_meta else '6.weight'): calls[use]()
    assert sp.masks == before and 'the model has changed' in repr(sp)

def test_old_weight_norm_is_refused():
    with warnings.catch_warnings(action='ignore'):
        model = digits_net(4)
        sp = Sparsifier(model)
        old_norm(model)
    with pytest.raises(ValueError, match='6.weight cannot be followed: it is computed'): sp.sparsify_model(50)

def test_two_layers_that_swap_places_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sp = Sparsifier(model, layer_type=nn.Linear)
    model[0], model[1] = model[1], model[0]
    with pytest.raises(ValueError, match="0.weight cannot be followed: its module is at '1' now"): sp.report()

def test_parameters_that_become_one_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sp = Sparsifier(model, layer_type=nn.Linear)
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match='one parameter with 0.weight'): sp.sparsify_model(50)

def test_a_layer_with_a_bias_cannot_take_the_place_of_one_without_where_filters_go():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False))
    sp, whole = Sparsifier(model), Sparsifier(model, 'filter')
    model[0] = nn.Conv2d(1, 4, 3)
    sp.sparsify_model(50)
    with pytest.raises(ValueError, match='weight, bias now'): whole.sparsify_model(50)

@pytest.mark.parametrize('change', [another_shape, prune_added, moved])
def test_hold_refuses(change):
    model = digits_net(4)
    sp, opt = Sparsifier(model), sgd(model)
    sp.sparsify_model(50)
    with sp.hold(opt):
        for p in model.parameters(): p.grad = torch.ones_like(p)
        change(model)
        with pytest.raises(ValueError, match='6.weight'): opt.step()

def test_put_back_it_goes_on():
    model = digits_net(4)
    sp, old = Sparsifier(model), model[6]
    gone(model)
    with pytest.raises(ValueError): sp.sparsify_model(50)
    model[6] = old
    sp.sparsify_model(50)
    assert zeros(model) == [exact(n, 50) for n in SIZES]


# In fits

def other_model(learn): learn.model = deepcopy(learn.model)

@pytest.mark.parametrize('make', [lambda: SparsifyCallback(50, verbose=False),
                                  lambda: SparsifyCallback(50, schedule=one_shot, start_epoch=0,
                                                           compact=True, verbose=False),
                                  lambda: KeepSparsity(verbose=False)], ids=['schedule', 'compact', 'keep'])
@pytest.mark.parametrize('change', [lambda l: replace_layer(l.model), lambda l: replace_parameter(l.model), other_model,
                                    lambda l: compile_layer(l.model)], ids=['layer', 'parameter', 'model', 'compiled'])
def test_a_change_in_mid_fit_is_followed(make, change):
    learn = learner(opt_func=__import__('fastai.optimizer').optimizer.SGD)
    Sparsifier(learn.model).sparsify_model(50)
    cb = make()
    def change_all(l):
        change(l)
        l.create_opt()
        l.opt.set_hypers(lr=1e-2)
    quiet(learn, 2, cb, at_step(11, change_all))
    weights = [p for p in learn.model.parameters() if p.ndim == 4]
    assert [int((p == 0).sum()) for p in weights] == [exact(n, 50) for n in SIZES]
    if isinstance(cb, SparsifyCallback): assert [r.zeros for r in cb.report.rows] == [exact(n, 50) for n in SIZES]

@pytest.mark.parametrize('make', [lambda: SparsifyCallback(50, verbose=False), lambda: KeepSparsity(verbose=False),
                                  lambda: PruneCallback(25, verbose=False)],
                         ids=['sparsify', 'keep', 'prune'])
@pytest.mark.parametrize('change', [weight_norm, moved, another_type])
def test_a_change_in_mid_fit_is_refused(make, change):
    learn = learner()
    Sparsifier(learn.model).sparsify_model(50)
    class Deaf(Callback):  # the model itself need not run any more
        def after_pred(self): pass
    cb = make()
    with pytest.raises(ValueError, match=r'6\.weight|\b6 '):
        quiet(learn, 1, cb, spy('after_backward' if not isinstance(cb, PruneCallback) else 'after_batch',
                                lambda: change(learn.model) if not getattr(cb, 'done', 0) and not setattr(cb, 'done', 1)
                                else None, order=5))

def test_layers_that_cannot_be_followed_between_fits_are_found_again():
    learn, cb = learner(), SparsifyCallback(50, verbose=False)
    quiet(learn, 1, cb)
    learn.model[6], learn.opt = conv_like(learn.model[6], bias=True, stride=1, padding=0), None
    old = cb.sparsifier
    learn.model[6] = nn.Sequential(learn.model[6])
    quiet(learn, 1, cb)
    assert cb.sparsifier is not old and [r.name for r in cb.report.rows] == ['0', '3', '6.0']
    assert zeros(learn.model) == [exact(n, 50) for n in SIZES]

def test_no_number_for_a_model_that_it_does_not_know():
    learn = learner(cbs=SparsifyCallback(50, verbose=False))
    quiet(learn, 1)
    learn.model = digits_net(4)
    with learn.no_bar(), learn.no_logging(): assert learn.validate()[-1] is None
    assert learn.save('m') and not torch.load(learn.path/'models'/'m.pth', weights_only=False).get('fasterai_clone')

def test_pruning_follows_another_model():
    learn, cb = learner(width=8), PruneCallback(25, schedule=one_shot, verbose=False)
    def change(l):
        other_model(l)
        l.create_opt()
    quiet(learn, 2, cb, at_step(5, change))
    def n_params(m): return sum(p.numel() for p in m.parameters())
    assert cb.history[-1]['params'] == n_params(learn.model) < n_params(digits_net(8))

def test_tickets_follow_a_layer():
    learn, n = learner(), []
    def fit(learn, n_epoch, lr):
        n.append(1)
        if len(n) == 2: replace_layer(learn.model), learn.create_opt()
        learn.fit(n_epoch, lr)
    found = find_ticket(learn, 1, 1e-2, sparsity=50, rounds=1, controls=(), fit=fit, verbose=False)
    assert zeros(learn.model) == [exact(k, 50) for k in SIZES] and found.runs[-1].sparsity == 50


# A fit inside of a fit

class Inner(Callback):
    "Calls `f(learn)` once at `event`"
    order = 13
    def __init__(self, event, f):
        self.calls = 0
        def call():
            self.calls += 1
            if self.calls == 1: f(self.learn)
        setattr(self, event, call)

def inner_fit(l):       l.fit(1, 1e-2)
def inner_lr_find(l):   l.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
def inner_fine_tune(l): l.fine_tune(1)
def inner_callback(l):  l.fit(1, cbs=SparsifyCallback(90, verbose=False))

@pytest.mark.parametrize('event', ['before_fit', 'after_batch', 'after_train', 'before_validate',
                                   'after_epoch', 'after_fit'])
@pytest.mark.parametrize('f', [inner_fit, inner_lr_find, inner_fine_tune, inner_callback])
def test_a_fit_inside_of_a_fit_is_refused(event, f):
    learn = learner()
    with pytest.raises(ValueError, match='inside of a running `fit` with SparsifyCallback'):
        quiet(learn, 2, SparsifyCallback(50, verbose=False), Inner(event, f))
    quiet(learn, 1, cb := SparsifyCallback(50, verbose=False))  # nothing is left of it
    assert cb.report.sparsity == measured(learn.model) == 50 and '_fitting' not in vars(learn)

@pytest.mark.parametrize('f', [inner_fit, inner_lr_find, inner_callback])
def test_who_catches_the_refusal_goes_on_undisturbed(f):
    def caught(l):
        with pytest.raises(ValueError, match='inside of a running'): f(l)
    learn, alone = learner(), learner()
    quiet(learn, 3, cb := SparsifyCallback(50, verbose=False), Inner('after_train', caught))
    quiet(alone, 3, reference := SparsifyCallback(50, verbose=False))
    assert cb.report.sparsity == measured(learn.model) == 50 and cb.history == reference.history
    assert all(torch.equal(a, b) for a,b in zip(learn.model.state_dict().values(), alone.model.state_dict().values()))

@pytest.mark.parametrize('make,name', [(lambda: KeepSparsity(verbose=False), 'KeepSparsity'),
                                       (lambda: PruneCallback(25, verbose=False), 'PruneCallback')])
def test_the_others_refuse_it_too(make, name):
    learn = learner(width=8)
    Sparsifier(learn.model).sparsify_model(50)
    with pytest.raises(ValueError, match=f'`fit` with {name}'): quiet(learn, 2, make(), Inner('after_train', inner_fit))

def test_find_ticket_refuses_it():
    learn = learner(cbs=Inner('after_train', inner_fit))
    with pytest.raises(ValueError, match='`fit` with `find_ticket`'):
        find_ticket(learn, 1, sparsity=50, rounds=1, controls=(), verbose=False)

def test_without_us_fits_may_be_inside_of_fits():
    learn = learner()
    quiet(learn, 1, inner := Inner('after_train', inner_callback))
    assert inner.calls == 2 and '_fitting' not in vars(learn)

def test_a_callback_of_a_running_fit_cannot_be_taken_by_another_learner():
    learn, other, cb = learner(), learner(seed=1), SparsifyCallback(50, verbose=False)
    with pytest.raises(ValueError, match='fit of another learner'):
        quiet(learn, 1, cb, Inner('after_batch', lambda l: quiet(other, 1, cb)))

def test_an_exception_leaves_no_running_fit():
    learn = learner()
    def stop(l): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        quiet(learn, 1, SparsifyCallback(50, verbose=False), Inner('after_batch', stop))
    quiet(learn, 1, SparsifyCallback(50, verbose=False))
    assert measured(learn.model) == 50

def test_a_copy_made_in_a_fit_is_not_fitting():
    learn, copies = learner(), []
    quiet(learn, 1, SparsifyCallback(50, verbose=False),
          Inner('after_batch', lambda l: copies.append(deepcopy(vars(l)['_fitting']))))
    assert copies == [False]

def back_to_training(l):
    "As a callback does that validates in the middle of an epoch"
    l.validate()
    l.training, l.dl = True, l.dls.train
    l.model.train()

@pytest.mark.parametrize('f', [lambda l: l.validate(), lambda l: l.get_preds()])
@pytest.mark.parametrize('event', ['after_train', 'after_epoch', 'before_validate'])
def test_validation_inside_of_a_fit(f, event):
    learn = learner()
    quiet(learn, 4, cb := SparsifyCallback(90, schedule=lin, verbose=False), Inner(event, f))
    assert [round(h['sparsity'], 1) for h in cb.history] == [22.4, 44.9, 67.4, 89.9]
    assert cb.report.sparsity == measured(learn.model)

def test_validation_in_the_middle_of_an_epoch_does_not_change_the_pace():
    "Validation has 1 batch, an epoch has 8: after 5 of 16 steps 5/16 of the way is done"
    learn, seen = learner(), []
    cb = SparsifyCallback(80, schedule=lin, verbose=False)
    quiet(learn, 2, cb, Inner('after_batch', back_to_training),
          spy('after_batch', lambda: seen.append(zeros(learn.model))))
    steps = [z for z in dict.fromkeys(map(tuple, seen))]
    assert (exact(36, 25), exact(288, 25), exact(1152, 25)) in steps and steps[-1] == tuple(exact(n, 80) for n in SIZES)


# Several that prune or keep

@pytest.mark.parametrize('order', [1, -1])
@pytest.mark.parametrize('given', [False, True])
def test_kept_masks_lose_the_channels_that_are_removed(order, given):
    learn = learner(width=8)
    Sparsifier(learn.model).sparsify_model(50)
    masks = Masks.of(learn.model)
    keep, cut = KeepSparsity(masks if given else None, verbose=False), PruneCallback(25, verbose=False)
    lost = []
    def look(): lost.append(sum(int((learn.model.get_parameter(k)[~m] != 0).sum()) for k,m in keep.masks.items()))
    quiet(learn, 3, *[keep, cut][::order], spy('after_batch', look))
    assert not any(lost) and len(lost) > 20
    for k,m in keep.masks.items(): assert m.shape == learn.model.get_parameter(k).shape
    assert keep.masks.n < masks.n and learn.model[0].out_channels == 6 and 20 < keep.masks.sparsity < 80
    quiet(learn, 1, KeepSparsity(keep.masks, verbose=False))  # they are those of the network as it is now

def test_a_channel_takes_its_own_part_of_the_mask():
    "Of four filters the second is the smallest: rows 0, 2 and 3 of the mask stay"
    learn = learner(width=8)
    with torch.no_grad():
        for i in (0, 3, 6): learn.model[i].weight.flatten(1)[:, ::3] = 0
    keep = KeepSparsity(include='0', verbose=False)
    before = Masks.of(learn.model)['0.weight']
    quiet(learn, 1, keep, PruneCallback(50, schedule=one_shot, verbose=False))
    after = keep.masks['0.weight']
    # all rows are equal here
    assert after.shape == learn.model[0].weight.shape and torch.equal(after, before[:len(after)])
    assert (learn.model[0].weight[~after] == 0).all()

@pytest.mark.parametrize('of', ['masks', 'sparsifier'])
def test_a_hold_and_removal_are_refused_before_the_first_batch(of):
    from fastai.basics import OptimWrapper
    learn, batches = learner(width=8, opt_func=lambda params, **kw: OptimWrapper(params, torch.optim.SGD, lr=0.1)), []
    sp = Sparsifier(learn.model)
    sp.sparsify_model(50)
    learn.create_opt()
    inner = learn.opt.opt
    held = Masks.of(learn.model).hold(learn.model, inner) if of == 'masks' else sp.hold(inner)
    with pytest.raises(ValueError, match='release'):
        quiet(learn, 1, PruneCallback(25, verbose=False), spy('before_batch', lambda: batches.append(1)))
    assert not batches
    held.release()
    quiet(learn, 1, PruneCallback(25, verbose=False))

def test_two_that_keep():
    learn = learner()
    Sparsifier(learn.model).sparsify_model(50)
    halves = [KeepSparsity(include='0', verbose=False), KeepSparsity(include=['3', '6'], verbose=False)]
    quiet(learn, 2, *halves)
    assert zeros(learn.model) == [exact(n, 50) for n in SIZES] and len(learn.cbs) == len(learner().cbs)
    quiet(learn, 1, KeepSparsity(verbose=False), KeepSparsity(verbose=False))
    assert zeros(learn.model) == [exact(n, 50) for n in SIZES]

def test_a_second_sparsifier_says_what_the_first_has_left():
    model = digits_net(4)
    Sparsifier(model).sparsify_model(50)
    second = Sparsifier(model, criteria='random')
    with pytest.warns(UserWarning, match='are zero .*this sparsifier pruned only 441'): second.sparsify_model(30)
    assert second.report().sparsity == measured(model) > 60

def test_adopted_zeros_are_no_surprise():
    model = digits_net(4)
    Sparsifier(model).sparsify_model(50)
    second = Sparsifier(model, criteria='random')
    assert second.adopt() == 738
    with warnings.catch_warnings(action='error'): second.sparsify_model(60)
    assert second.masks.sparsity == measured(model) and zeros(model) == [exact(n, 60) for n in SIZES]

def test_going_on_with_the_first_is_said_too():
    model = digits_net(4)
    first, second = Sparsifier(model), Sparsifier(model, criteria='random')
    with warnings.catch_warnings(action='error'): first.sparsify_model(20)
    with warnings.catch_warnings(action='ignore'): second.sparsify_model(60)
    with pytest.warns(UserWarning, match='are zero'): first.sparsify_model(30)

def test_one_sparsifier_warns_of_nothing():
    model = digits_net(4)
    with warnings.catch_warnings(action='error'):
        sp = Sparsifier(model)
        for s in (10, 20, 50, 90): sp.sparsify_model(s)
        Sparsifier(digits_net(4), 'filter').sparsify_model(50)
        Sparsifier(model, 'filter', 'global')

def test_two_callbacks_for_one_weight():
    learn = learner()
    two = [SparsifyCallback(50, schedule=one_shot, start_epoch=0, compact=True, verbose=False),
           SparsifyCallback(30, criteria='random', schedule=one_shot, start_epoch=0, compact=True, verbose=False)]
    says = 'Another SparsifyCallback in this fit also prunes 0.weight, 3.weight, 6.weight'
    with pytest.warns(UserWarning, match=says): quiet(learn, 2, *two)
    for cb in two:
        assert cb.report.sparsity == measured(learn.model) > 55
        assert all((learn.model.get_parameter(k)[~m] == 0).all() for k,m in cb.sparsifier.masks.items())

def test_callbacks_for_different_weights_are_fine():
    learn = learner()
    with warnings.catch_warnings(action='error', category=UserWarning):
        quiet(learn, 1, SparsifyCallback(50, include='0', verbose=False),
              SparsifyCallback(70, include=['3', '6'], verbose=False))
    assert zeros(learn.model) == [18, exact(288, 70), exact(1152, 70)]

def test_a_random_choice_after_keep_sparsity_is_said():
    learn = learner()
    Sparsifier(learn.model).sparsify_model(50)
    with pytest.warns(UserWarning, match='are zero'):
        quiet(learn, 1, KeepSparsity(verbose=False), cb := SparsifyCallback(30, criteria='random', verbose=False))
    assert cb.report.sparsity == measured(learn.model) > 50

@pytest.mark.parametrize('compact', [(False, False), (True, True), (True, False), (False, True)])
def test_two_holds(compact):
    "Zeros of both stay after each step, whoever steps on kept weights only"
    model = digits_net(4)
    opt, a, b = sgd(model), Sparsifier(model), Sparsifier(model, criteria='random')
    a.sparsify_model(50)
    with warnings.catch_warnings(action='ignore'): b.sparsify_model(30)
    n = zeros(model)
    with a.hold(opt, compact[0]), b.hold(opt, compact[1]):
        for _ in range(3):
            step(model, opt)
            assert zeros(model) == n

def test_compact_steps_mask_what_they_do_not_cover():
    "A weight in another memory format is stepped on as a whole"
    model = digits_net(4)
    model[6].weight.data = model[6].weight.data.contiguous(memory_format=torch.channels_last)
    opt, sp = sgd(model), Sparsifier(model)
    sp.sparsify_model(50)
    with sp.hold(opt, compact=True):
        step(model, opt, 2)
        assert zeros(model) == [exact(n, 50) for n in SIZES]
