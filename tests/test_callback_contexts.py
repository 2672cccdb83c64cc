"""Contexts, limits, budgets, parameters and measured criteria through `SparsifyCallback`: on schedule, exact, and
nothing else changed"""

import pytest, torch, torch.nn as nn

from fasterai_clone.sparse.all import *
from fasterai_clone.core.criteria import identity
from helpers import exact, fit_for, layers, learner, same, spy, weights, zeros

total = 36 + 288 + 1152

def fit_seen(learn, n, cb, **kwargs):
    "Zeros of each layer when validation starts"
    seen = []
    learn.fit(n, 1e-2, cbs=[cb, spy('before_validate', lambda: seen.append(zeros(learn.model)))], **kwargs)
    return seen

@pytest.mark.parametrize('context', ['global', 'lamp', 'erk'])
def test_all_layers_share_a_sparsity(context):
    "Measured before each validation: floor(s·N/100) in all"
    seen = fit_seen(learner(), 3, SparsifyCallback(60, context=context, schedule=lin))
    assert [sum(z) for z in seen] == [exact(total, s) for s in (20, 40, 60)]
    assert all(a <= b for x,y in zip(seen, seen[1:]) for a,b in zip(x, y))  # no layer gets weights back

def test_each_output_gives_its_share():
    learn = learner()
    fit_seen(learn, 2, SparsifyCallback(50, context='output', schedule=lin))
    for m in layers(learn.model):
        per_row = (m.weight == 0).flatten(1).sum(1)
        assert (per_row == exact(m.weight[0].numel(), 50)).all()

@pytest.mark.parametrize('context', ['global', 'lamp', 'erk'])
def test_limits_hold_all_the_way(context):
    cb = SparsifyCallback(80, context=context, schedule=lin, min_sparsity={'0': 50}, max_sparsity={'3': 60})
    seen = fit_seen(learner(), 4, cb)
    assert [sum(z) for z in seen] == [exact(total, s) for s in (20, 40, 60, 80)]
    assert all(z[1] <= 0.6*288 for z in seen) and seen[-1][0] >= 18

def test_limits_that_cannot_be_met_are_refused_before_training():
    learn = learner()
    before = weights(learn.model)
    with pytest.raises(ValueError, match='limits of the layers allow'):
        learn.fit(1, cbs=SparsifyCallback(90, context='global', max_sparsity=50))
    assert same(before, weights(learn.model))

@pytest.mark.parametrize('budget', ['params', 'flops'])
def test_a_budget_is_met_within_one_filter(budget):
    learn = learner()
    cb = SparsifyCallback(70, 'filter', 'global', schedule=lin, budget=budget)
    learn.fit(2, 1e-2, cbs=cb)
    sp = cb.sparsifier
    whole, gone = sum(c*n for c,n in zip(sp.costs, [len(m.weight) for m in layers(learn.model)])), sp.dropped()[0]
    price = max(sp.costs)
    assert 0.7*whole - price < gone <= 0.7*whole + 1e-6
    by_hand = sum(c * int((~m.weight.flatten(1).any(1)).sum()) for c,m in zip(sp.costs, layers(learn.model)))
    assert gone == by_hand == cb.report.budget[1] and cb.report.budget[2] == whole
    if budget == 'params': assert sp.costs == [m.weight[0].numel() for m in layers(learn.model)]
    else:  # weights of a filter times positions: 8×8 images, halved by each stride
        out = [m(x) for m,x in ((learn.model[0], torch.zeros(1, 1, 8, 8)),)]
        assert sp.costs[0] == learn.model[0].weight[0].numel() * out[0].shape[-1] * out[0].shape[-2]

def test_biases_when_asked_for():
    learn = learner(model=nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10)))
    learn.fit(2, 1e-2, cbs=SparsifyCallback(50, layer_type=nn.Linear, params=['weight', 'bias'], schedule=lin))
    assert [int((p == 0).sum()) for p in learn.model.parameters()] == [640, 10, 100, 5]

@pytest.mark.parametrize('name', ['snip', 'grasp', 'synflow', 'wanda', 'apoz', 'mean_activation', 'bn_scale'])
def test_measuring_leaves_training_as_it_is(name):
    "At 0 % the weights after training are those of training without the callback; the loss of the learner is used"
    learn, other = learner(), learner()
    other.fit(1, 1e-2)
    learn.fit(1, 1e-2, cbs=SparsifyCallback(0, fit_for(name), criteria=name))
    assert same(weights(learn.model), weights(other.model))

def test_data_of_ones_own_to_measure_with():
    learn, seen = learner(), []
    x, y = learn.dls.valid.one_batch()
    def measure(model, params, data, loss_func):
        seen.append(data)
        return {k: p.detach().abs() for k,p in params.items()}
    learn.fit(1, 1e-2, cbs=SparsifyCallback(50, criteria=Criteria(identity, measure=measure, return_init=True),
                                            data=(x, y), schedule=one_shot))
    assert len(seen) > 1 and all(d[0] is x and d[1] is y for d in seen[1:]) and zeros(learn.model) == [18, 144, 576]

class Switched(nn.Module):
    "`torch.fx` cannot trace this"
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.Linear(54, 10)
    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.head((x if x.sum() > -1e9 else -x).relu().flatten(1))

def test_models_that_must_be_run_to_be_traced():
    "The norm is found with a batch of the validation set; batches and random numbers of training stay the same"
    def trained(**kwargs):
        torch.manual_seed(0)
        learn = learner(model=Switched())
        learn.fit(2, 1e-2, **kwargs)
        return learn.model
    a, b = trained(), trained(cbs=SparsifyCallback(0, 'filter'))
    assert same(weights(a), weights(b))
    net  = trained(cbs=(cb := SparsifyCallback(50, 'filter', schedule=lin)))
    gone = ~net.conv.weight.flatten(1).any(1)
    assert gone.sum() == 3 and not net.norm.weight[gone].any() and not net.norm.bias[gone].any()
    assert not cb.report.why_not
    assert not net.eval().norm(net.conv(torch.randn(2, 1, 8, 8)))[:, gone].any()

def test_what_cannot_be_held_is_said(capsys):
    "A norm without scale makes something of a zero channel"
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Flatten(),
                        nn.Linear(144, 10))
    learn = learner(model=net)
    learn.fit(1, 1e-2, cbs=SparsifyCallback(50, 'filter', schedule=lin))
    assert 'may still output a constant' in (out := capsys.readouterr().out) and 'no affine weight' in out

def test_held_norms_stay_at_zero_in_a_second_fit_and_through_checkpoints(tmp_path):
    learn = learner(path=tmp_path)
    cb = SparsifyCallback(50, 'filter', schedule=lin)
    learn.fit(1, 1e-2, cbs=cb)
    learn.save('sparse')
    learn.fit(1, 1e-1, cbs=cb)
    again = learner(path=tmp_path)
    again.load('sparse')
    again.fit(1, 1e-1, cbs=SparsifyCallback(50, 'filter', schedule=one_shot))
    for net in (learn.model, again.model):
        for conv,norm in zip(layers(net), layers(net, nn.BatchNorm2d)):
            gone = ~conv.weight.flatten(1).any(1)
            assert gone.sum() == len(gone) // 2 and not norm.weight[gone].any() and not norm.bias[gone].any()

def test_heads_and_units_of_a_network_that_trains():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.att = nn.MultiheadAttention(8, 4, batch_first=True)
            self.rnn = nn.LSTM(8, 6, batch_first=True)
            self.out = nn.Linear(6, 10)
        def forward(self, x):
            x = x.flatten(1).unflatten(1, (8, 8))
            return self.out(self.rnn(self.att(x, x, x)[0])[0][:, -1])
    learn = learner(model=Net())
    heads = SparsifyCallback(50, 'head', layer_type=nn.MultiheadAttention, schedule=lin, verbose=False)
    learn.fit(2, 1e-2, cbs=heads)
    assert [int((m == 0).sum()) for m in (learn.model.att.in_proj_weight, learn.model.att.out_proj.weight)] == [96, 32]
    units = SparsifyCallback(50, 'unit', layer_type='LSTM', schedule=lin, verbose=False)
    learn.fit(2, 1e-2, cbs=[heads, units])
    out = learn.model.rnn(torch.randn(2, 5, 8))[0]
    assert (out == 0).all(0).all(0).sum() == 3 and int((learn.model.att.in_proj_weight == 0).sum()) == 96
