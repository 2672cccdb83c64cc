"`Sparsifier` in a training loop of one's own, without fastai: laws 4 and 5"
import math, pickle
from copy import deepcopy
from functools import partial

import pytest, torch, torch.nn as nn, torch.nn.functional as F

from torch.nn.utils import prune
from fasterai_clone.digits import digits_net
from fasterai_clone.sparse.all import *
from fasterai_clone.core.schedule import as_schedule
from helpers import same, zeros


def steps(net, opt, n=3):
    x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(n):
        net(x).square().mean().backward()
        opt.step()
        opt.zero_grad()

@pytest.mark.parametrize('opt_func', [partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
                                      torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize('criteria, kwargs', [('large_final', {}), ('random', {}),
                                              ('wanda', dict(data=torch.rand(4, 1, 8, 8)))])
def test_hold_keeps_zeros_until_released(opt_func, criteria, kwargs):
    net = digits_net(4)
    sp, opt = Sparsifier(net, criteria=criteria, **kwargs), opt_func(net.parameters())
    sp.sparsify_model(50)
    with sp.hold(opt): steps(net, opt)
    assert zeros(net) == [18, 144, 576]
    steps(net, opt)
    assert sum(zeros(net)) < 18 + 144 + 576 and not opt._optimizer_step_post_hooks and not opt._optimizer_step_pre_hooks

def test_hold_counts_gradients():
    net = digits_net(4)
    sp, opt, before = Sparsifier(net, criteria='gradient'), torch.optim.SGD(net.parameters(), lr=0.), {}
    def add(*args):
        before.update({t.name: before.get(t.name, 0) + (t.weight * t.weight.grad).abs().detach() for t in sp.targets})
    opt.register_step_pre_hook(add)
    with sp.hold(opt): steps(net, opt)
    sp.sparsify_model(50)
    for k,mask in sp.masks.items(): assert before[k][mask].min() >= before[k][~mask].max()

@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_refused_update_changes_nothing(bad):
    net = digits_net(4)
    sp  = Sparsifier(net)
    sp.sparsify_model(50)
    net[6].weight.data[0, 0, 0, 0] = bad
    masks, before = {k: m.clone() for k,m in sp.masks.items()}, zeros(net)
    with pytest.raises(ValueError, match='6.weight'): sp.sparsify_model(90)
    assert same(sp.masks, masks) and zeros(net) == before

@pytest.mark.parametrize('copy', [lambda s: s.state_dict(), lambda s: deepcopy(s.state_dict()),
                                  lambda s: pickle.loads(pickle.dumps(s.state_dict()))],
                         ids=['state_dict', 'deepcopy', 'pickle'])
def test_two_that_shared_a_state_go_their_own_ways(copy):
    a, b = Sparsifier(digits_net(4)), Sparsifier(digits_net(4))
    a.sparsify_model(50)
    b.load_state_dict(copy(a))
    b.sparsify_model(90)
    a.apply_masks()
    assert zeros(a.model) == [18, 144, 576] and zeros(b.model) == [32, 259, 1036]

def test_masks_given_by_hand_are_ones_own():
    sp, mine = Sparsifier(digits_net(4)), torch.arange(36).reshape(4, 1, 3, 3) > 8
    kept = mine.clone()
    sp.masks['0.weight'] = mine
    sp.apply_masks()
    assert zeros(sp.model) == [9, 0, 0]
    sp.sparsify_model(50)
    assert not (sp.masks['0.weight'] & ~kept).any() and torch.equal(mine, kept) and zeros(sp.model) == [18, 144, 576]

@pytest.mark.parametrize('granularity', ['weight', 'filter', (0, 1)])
def test_state_survives_a_file(granularity, tmp_path):
    a, b = Sparsifier(digits_net(4), granularity), Sparsifier(digits_net(4), granularity)
    a.sparsify_model(50)
    torch.save(a.state_dict(), tmp_path/'masks.pt')
    b.load_state_dict(torch.load(tmp_path/'masks.pt', weights_only=True))
    assert same(a.masks, b.masks) and zeros(b.model) == zeros(a.model)

def test_references_are_copied_only_where_needed():
    assert not Sparsifier(digits_net(4)).refs and not Sparsifier(digits_net(4), criteria='gradient').refs
    sp = Sparsifier(digits_net(4), criteria='movement', exclude='6')
    assert {k: tuple(v.shape) for k,v in sp.refs.items()} == {'0.weight': (4, 1, 3, 3), '3.weight': (8, 4, 3, 3)}
    sp.sparsify_model(50)
    assert all(m.dtype == torch.bool for m in sp.masks.values())


# Numbers of groups, of all or of what is left

def two_linears(): return nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))

@pytest.mark.parametrize('kwargs', [dict(n=160), dict(sparsity=80, relative=True), dict(sparsity=80)], ids=str)
def test_numbers_of_groups_respect_limits(kwargs):
    sp = Sparsifier(two_linears(), context='global', layer_type=nn.Linear, max_sparsity=50)
    with pytest.raises(ValueError, match='limits of the layers allow 0 to 100'): sp.sparsify_model(**kwargs)
    assert not sp.masks

@pytest.mark.parametrize('context', ['output', 'erk'])
def test_numbers_that_a_context_cannot_share_out_are_refused(context):
    sp = Sparsifier(two_linears(), context=context, layer_type=nn.Linear)
    for kwargs in (dict(n=15), dict(sparsity=50, relative=True)):
        with pytest.raises(ValueError, match='`n` and `relative`'): sp.sparsify_model(**kwargs)

@pytest.mark.parametrize('size, percent, steps', [(12, 50, [6, 3, 1]), (150, 7, [139]), (10, 25, [8, 6, 4])])
def test_relative_amounts_are_those_of_torch(size, percent, steps):
    m, left = nn.Linear(size, 1, bias=False), []
    sp = Sparsifier(m, layer_type=nn.Linear)
    for _ in steps:
        sp.sparsify_model(percent, relative=True)
        left.append(int(m.weight.count_nonzero()))
    torch_m, torch_left = nn.Linear(size, 1, bias=False), []
    for _ in steps:
        prune.l1_unstructured(torch_m, 'weight', amount=percent/100)
        torch_left.append(int(torch_m.weight.count_nonzero()))
    assert left == torch_left == steps

def test_what_is_pruned():
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2)))
    sp = Sparsifier(net, layer_type=nn.Linear)
    assert not sp.is_pruned()
    sp.sparsify_model({'1.0': 50})
    assert sp.is_pruned() and sp.is_pruned('1') and sp.is_pruned(net[1][0]) and sp.is_pruned('1.0.weight')
    assert sp.is_pruned(net[1][0].weight)
    assert not any(map(sp.is_pruned, ('0', '0.weight', '1.0.bias', net[0])))
    with pytest.raises(ValueError, match="'1.0.bais'.*mean '1.0.bias'"): sp.is_pruned('1.0.bais')
    with pytest.raises(TypeError, match='module, a parameter'): sp.is_pruned(3)


@pytest.mark.parametrize('schedule', ['agp', one_shot, cos(end_pct=0.5), lambda pos: pos**2],
                         ids=['name', 'one_shot', 'cos', 'function'])
@pytest.mark.parametrize('context', ['local', 'global'])
def test_a_schedule_in_a_loop_of_ones_own(schedule, context):
    "Exactly as many as the schedule says, also between 0 and 1 %, whatever the number of layers"
    net = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 17))
    sp, curve = Sparsifier(net, context=context, layer_type=nn.Linear), as_schedule(schedule)
    for done in (0, 0.205, 0.21, 0.5, 1):
        sp.sparsify_model(90, schedule=schedule, done=done)
        sizes = [600, 340] if context == 'local' else [940]
        assert sp.masks.n_dropped == sum(math.floor(round(curve.sparsity(done, 90)*n/100, 9)) for n in sizes)
    assert sp.masks.n_dropped == (540 + 306 if context == 'local' else 846)

def test_a_schedule_and_how_far_to_be_go_together():
    sp = Sparsifier(nn.Linear(4, 4), layer_type=nn.Linear)
    for kw, words in ((dict(schedule='agp'), 'belong together'), (dict(done=0.5), 'belong together'),
                      (dict(schedule='agp', done=50), 'from 0 to 1, got 50'),
                      (dict(schedule='agp', done='half'), "got 'half'"), (dict(schedule='agpp', done=1), 'agp'),
                      (dict(schedule='agp', done=1, relative=True), 'omit `n` and `relative`')):
        with pytest.raises(ValueError, match=words): sp.sparsify_model(90, **kw)
    assert not sp.masks

def test_data_and_loss_may_be_replaced():
    "Of the next update; and what a budget needs to run the model"
    net, x = nn.Sequential(nn.Linear(3, 2)), torch.eye(3)
    sp = Sparsifier(net, criteria='snip', layer_type=nn.Linear, loss_func=F.mse_loss, data=[(x, torch.zeros(3, 2))])
    sp.data, sp.loss_func = [(x[:1], torch.ones(1, 2))], F.l1_loss   # inputs 1 and 2 get no gradient from it
    sp.sparsify_model(66.7)
    assert sp.masks['0.weight'].tolist() == [[True, False, False]]*2
    assert (sp.loss_func, sp.example_inputs) == (F.l1_loss, None) and len(sp.data) == 1
