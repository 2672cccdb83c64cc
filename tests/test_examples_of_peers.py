"What was seen to fail in fasterai 0.4.1, and what users of `torch.nn.utils.prune` expect: each is a law here"
import io
from copy import deepcopy

import pytest, torch, torch.nn as nn
from fastai.basics import params
from fastai.callback.all import GradientAccumulation

from fasterai_clone.digits import digits_net
from fasterai_clone.sparse.all import *
from fasterai_clone.core.criteria import magnitude, Reducer
from fasterai_clone.core.criteria import random as random_criterion
from helpers import exact, fit_for, layers, learner, naive_keep, same, sizes, spy, weights, zeros


def net_of(*sizes): return nn.Sequential(*[nn.Linear(a, b, bias=False) for a,b in zip(sizes, sizes[1:])])
def linear(values):
    m = nn.Linear(len(values), 1, bias=False)
    m.weight.data = torch.tensor([values], dtype=torch.float32)
    return m


# fasterai 0.4.1: miscounts

@pytest.mark.parametrize('fill', [torch.ones, lambda *s: torch.full(s, -0.5),
                                  lambda *s: torch.randint(0, 2, s).float()*2 - 1],
                         ids=['ones', 'equal', 'signs'])
@pytest.mark.parametrize('context', ['local', 'global'])
def test_constant_weights_are_pruned_too(fill, context):
    learn = learner()
    with torch.no_grad():
        for m in layers(learn.model): m.weight.copy_(fill(*m.weight.shape))
    learn.fit(1, 0., cbs=SparsifyCallback(90, context=context, schedule=one_shot))
    found, n = zeros(learn.model), sizes(learn.model)
    if context == 'local': assert found == [exact(k, 90) for k in n]
    else: assert sum(found) == exact(sum(n), 90)

def test_29_of_a_hundred():
    m = nn.Linear(10, 10)
    Sparsifier(m, layer_type=nn.Linear).sparsify_model(29)
    assert int((m.weight == 0).sum()) == 29

def test_bf16_ties_are_counted():
    "100 weights with but four values in bf16"
    m = nn.Linear(10, 10, dtype=torch.bfloat16)
    m.weight.data = (torch.arange(100).reshape(10, 10) % 4 + 1).to(torch.bfloat16)
    Sparsifier(m, layer_type=nn.Linear).sparsify_model(57)
    assert int((m.weight == 0).sum()) == 57

def test_lin_over_eight_batches_arrives():
    "78.7 % there, with 90 % printed: the last batch never reached the end"
    learn, cb = learner(), SparsifyCallback(90, schedule=lin)
    learn.fit(1, 1e-2, cbs=cb)
    assert cb.report.zeros == sum(zeros(learn.model)) == 32 + 259 + 1036


# fasterai 0.4.1: what is touched and what is not

@pytest.mark.parametrize('granularity', ['weight', 'filter', 'channel'])
def test_pruning_touches_convolutions_only(granularity):
    learn = learner()
    learn.fit(1, 1e-2)
    before = weights(learn.model)
    sp = Sparsifier(learn.model, granularity)
    sp.sparsify_model(50)
    changed = {k for k,v in learn.model.state_dict().items() if not torch.equal(v, before[k])}
    norms = {f'{i}.{k}' for i in (1, 4, 7) for k in ('weight', 'bias')} if granularity == 'filter' else set()
    assert changed == {t.name for t in sp.targets} | norms
    assert {t.name for t in sp.targets} == {'0.weight', '3.weight', '6.weight'}

def test_the_norms_of_dropped_filters_go_and_stay_gone():
    """There BatchNorm was zeroed once and grew back. At a learning rate of zero nothing changes but filters and their
    scales"""
    learn = learner()
    before = {k: v.detach().clone() for k,v in learn.model.named_parameters()}
    learn.fit(2, 0., cbs=SparsifyCallback(50, 'filter', schedule=lin), wd=0.)
    now = dict(learn.model.named_parameters())
    changed = {k for k in now if not torch.equal(now[k], before[k])}
    assert changed == {'0.weight', '3.weight', '6.weight', '1.weight', '4.weight', '7.weight'}
    learn.fit(2, 1e-1, cbs=SparsifyCallback(50, 'filter', verbose=False))
    net = learn.model
    for conv,norm in ((net[0], net[1]), (net[3], net[4]), (net[6], net[7])):
        gone = ~conv.weight.flatten(1).any(1)
        assert gone.sum() == len(gone) // 2 and not norm.weight[gone].any() and not norm.bias[gone].any()
        assert norm.bias[~gone].all()

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.out = nn.Linear(8, 10)
    def forward(self, x):
        x = x.flatten(1).unflatten(1, (8, 8))
        return self.out(self.rnn(self.mha(x, x, x)[0])[0].mean(1))

def test_what_stays_dense_is_listed():
    net = Attention()
    sp  = Sparsifier(net, layer_type=nn.Linear)
    sp.sparsify_model(50)
    report, named = sp.report(), dict(net.named_parameters())
    covered = {t.name for t in sp.targets}
    assert {n: k for n,_,k in report.dense} == {n: p.numel() for n,p in named.items() if n not in covered}
    assert report.total == sum(p.numel() for p in net.parameters())
    assert 'mha.in_proj_weight' in {n for n,*_ in report.dense} and 'MultiheadAttention' in str(report)
    assert 'LSTM' in str(report)
    assert f'Covers {report.params:,} of {report.total:,} parameters' in str(report)

def test_layers_of_attention_train_sparse():
    learn = learner(model=Attention())
    learn.fit(2, 1e-2, cbs=SparsifyCallback(50, layer_type=nn.Linear))
    assert zeros(learn.model, nn.Linear) == [32, 40]

class Sentence(nn.Module):
    "Layer types that are not supported there"
    def __init__(self):
        super().__init__()
        self.emb, self.conv1, self.conv3 = nn.Embedding(17, 6), nn.Conv1d(6, 8, 3), nn.Conv3d(1, 4, (1, 3, 3))
        self.out, self.up = nn.Linear(8*62, 10), nn.ConvTranspose2d(4, 2, 2)
    def forward(self, x):
        volume = self.up(self.conv3(x[:, None]).squeeze(2)).mean()
        return self.out(self.conv1(self.emb((x.flatten(1)*16).long()).transpose(1, 2)).relu().flatten(1)) + volume

@pytest.mark.parametrize('criteria', ['large_final', 'movement', 'gradient', 'wanda'])
def test_embedding_conv1d_conv3d_transposed_and_linear_train_sparse(criteria):
    learn, kinds = learner(model=Sentence()), (nn.Embedding, nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
    learn.fit(2, 1e-2, cbs=SparsifyCallback(50, criteria=criteria, schedule=lin, layer_type=kinds))
    assert zeros(learn.model, kinds) == [k//2 for k in sizes(learn.model, kinds)] == [51, 72, 18, 2480, 16]

def test_grouped_convolutions_and_bct_linears_with_wanda():
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(2),
                        nn.Linear(36, 5), nn.Flatten(), nn.Linear(40, 10))
    learn, kinds = learner(model=net), (nn.Conv2d, nn.Linear)
    learn.fit(2, 1e-2, cbs=SparsifyCallback(50, criteria=wanda, schedule=lin, layer_type=kinds))
    assert zeros(net, kinds) == [36, 72, 90, 200]

@pytest.mark.parametrize('criteria', available_criterias())
def test_training_stays_in_training_mode(criteria):
    "As `wanda` there left the model in eval mode; layers that the user put there stay there"
    learn, modes = learner(), []
    frozen = learn.model[1]
    def look(): modes.append([m.training for m in learn.model.modules()])
    cb = SparsifyCallback(50, fit_for(criteria), criteria=criteria, schedule=iterative)
    learn.fit(2, 1e-2, cbs=[cb, spy('before_batch', lambda: frozen.eval()), spy('after_step', look)])
    assert len(modes) == 16 and all(m == [k is not frozen for k in learn.model.modules()] for m in modes)

def test_partly_frozen_networks_are_sparsified_whole():
    learn = learner(splitter=lambda m: [params(m[:6]), params(m[6:])])
    learn.freeze()
    held = [m.weight.detach().clone() for m in layers(learn.model)[:2]]
    learn.fit(2, 1e-2, cbs=SparsifyCallback(50, schedule=lin))
    assert zeros(learn.model) == [18, 144, 576]
    for m,w in zip(layers(learn.model), held): assert torch.equal(m.weight, w * (m.weight != 0))

@pytest.mark.parametrize('sparsity, kwargs, want', [(50, dict(include=['0', '6']), [18, 0, 576]),
                                                    (50, dict(exclude='3*'), [18, 0, 576]),
                                                    ({'6': 25}, {}, [0, 0, 288]),
                                                    ([0, 50, 0], {}, [0, 144, 0])], ids=str)
def test_layers_that_were_not_asked_for_stay_dense(sparsity, kwargs, want):
    learn = learner()
    learn.fit(1, 1e-2, cbs=(cb := SparsifyCallback(sparsity, schedule=lin, **kwargs)))
    assert zeros(learn.model) == want
    assert {n for n,*_ in cb.report.dense} | {f'{r.name}.weight' for r in cb.report.rows} == {
        n for n,_ in learn.model.named_parameters()}


# fasterai 0.4.1: criteria

def test_random_global_draws_once_for_each_weight():
    "Two draws there: what was ranked was not what was compared"
    net = net_of(4, 6, 5)
    torch.manual_seed(7)
    drawn = [torch.rand_like(m.weight) for m in net]
    after = torch.get_rng_state()
    torch.manual_seed(7)
    Sparsifier(net, 'weight', 'global', random_criterion, layer_type=nn.Linear).sparsify_model(40)
    assert torch.equal(torch.get_rng_state(), after)
    keep = naive_keep(torch.cat([d.flatten() for d in drawn]), exact(54, 40))
    assert torch.equal(torch.cat([m.weight.detach().flatten() != 0 for m in net]), keep)

@pytest.mark.parametrize('context', ['local', 'global'])
def test_random_is_repeatable_under_a_seed_and_grows(context):
    masks = []
    for seed in (1, 1, 2):
        net = digits_net(4)
        sp  = Sparsifier(net, 'weight', context, 'random')
        torch.manual_seed(seed)
        for s in (20, 50, 90):
            old = {k: m.clone() for k,m in sp.masks.items()}
            sp.sparsify_model(s)
            assert not any((~old[k] & sp.masks[k]).any() for k in old)
        masks.append({k: m.clone() for k,m in sp.masks.items()})
    assert same(masks[0], masks[1]) and not same(masks[0], masks[2])

@pytest.mark.parametrize('n_acc', [16, 32, 64])
def test_gradients_are_those_of_accumulated_batches(n_acc):
    "`gradient` sums over optimizer steps: with batches of 16 that is each, every second or every fourth batch"
    learn, sums = learner(), {}
    cb = SparsifyCallback(50, criteria=grad_crit, schedule=Schedule(sched_oneshot, start_pct=1.))
    def add():
        for i,m in enumerate(layers(learn.model)):
            sums.setdefault(i, []).append((m.weight * m.weight.grad).abs().detach())
    learn.fit(1, 1e-2, cbs=[cb, GradientAccumulation(n_acc), spy('before_step', add, order=14)])
    assert len(sums[0]) == 8*16//n_acc and zeros(learn.model) == [18, 144, 576]
    for i,mask in enumerate(cb.sparsifier.masks.values()):
        total = sum(sums[i])
        assert total[mask].min() >= total[~mask].max()


# fasterai 0.4.1: 2:4 on ties, checkpoints

@pytest.mark.parametrize('make', [lambda: nn.Linear(16, 4), lambda: nn.Conv2d(8, 4, 3)])
def test_2_of_4_on_ties_leaves_two(make):
    m = make()
    nn.init.ones_(m.weight)
    Sparsifier(m, nm=True, layer_type=type(m)).sparsify_model(50)
    assert ((m.weight != 0).movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1) == 2).all()

def test_checkpoints_do_not_grow():
    def size(model):
        torch.save(model.state_dict(), f := io.BytesIO())
        return len(f.getvalue())
    learn = learner(cbs=SparsifyCallback(90, criteria='movement'))
    before = size(learn.model)
    learn.fit(1, 1e-2)
    assert size(learn.model) == before and size(deepcopy(learn.model)) == before

def test_a_fresh_learner_after_an_interrupted_one_is_pruned():
    "A spoiled module-level schedule there: the next learner stayed dense, with 90 % printed"
    learn = learner()
    def stop():
        if learn.epoch == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        learn.fit(4, 1e-2, cbs=[SparsifyCallback(90, schedule=agp), spy('before_batch', stop)])
    fresh = learner()
    fresh.fit(4, 1e-2, cbs=SparsifyCallback(90, schedule=agp))
    assert zeros(fresh.model) == [32, 259, 1036]


# torch.nn.utils.prune: what its users expect

def test_scores_of_ones_own():
    "`arange(9)` on `Linear(3, 3)`, five of nine: the first five"
    m = nn.Linear(3, 3)
    nn.init.ones_(m.weight)
    Sparsifier(m, criteria={'weight': torch.arange(9.).reshape(3, 3)}, layer_type=nn.Linear).sparsify_model(500/9)
    assert m.weight.flatten().tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]

def test_scores_of_ones_own_compete_globally():
    net = nn.Sequential(linear([1, 1, 1]), linear([1, 1]))
    scores = {'0.weight': torch.tensor([[1., 4, 2]]), '1.weight': torch.tensor([[3., 0]])}
    Sparsifier(net, 'weight', 'global', scores, layer_type=nn.Linear).sparsify_model(60)
    assert [m.weight.tolist() for m in net] == [[[0, 1, 0]], [[1, 0]]]

@pytest.mark.parametrize('sparsity, left', [(50, 6), (75, 3), (87.5, 2), (100, 0)])
def test_twelve_weights(sparsity, left):
    m = linear(range(1, 13))
    Sparsifier(m, layer_type=nn.Linear).sparsify_model(sparsity)
    assert m.weight.tolist() == [[0]*(12-left) + list(range(13-left, 13))]

@pytest.mark.parametrize('granularity, want', [('row', [[0, 0, 0], [4, 5, 6]]), ('column', [[0, 2, 3], [0, 5, 6]])])
def test_a_neuron_and_an_input_of_a_linear(granularity, want):
    m = nn.Linear(3, 2, bias=False)
    m.weight.data = torch.tensor([[1., 2, 3], [4, 5, 6]])
    Sparsifier(m, granularity, layer_type=nn.Linear).sparsify_model(50 if granularity == 'row' else 34)
    assert m.weight.tolist() == want

@pytest.mark.parametrize('granularity, axis', [('filter', 0), (('shared_kernel'), 1)])
def test_a_filter_and_an_input_channel_of_a_convolution(granularity, axis):
    m = nn.Conv2d(4, 4, 3)
    with torch.no_grad():
        m.weight.copy_(torch.tensor([3., 1, 4, 2]).reshape([4 if a == axis else 1
                                                            for a in range(4)]).expand(4, 4, 3, 3))
    Sparsifier(m, granularity).sparsify_model(50)
    assert (m.weight.detach().abs().sum([a for a in range(4) if a != axis]) == 0).tolist() == [False, True, False, True]

@pytest.mark.parametrize('reducer, dropped', [(Reducer.sum, 0), (Reducer.l2, 0), (Reducer.max, 1)])
def test_norms(reducer, dropped):
    """Of (5, 0, 0) and (3, 3, 3) the first has the smaller sum (5, 9) and 2-norm (5, √27), the second the smaller
    maximum"""
    m = nn.Linear(3, 2, bias=False)
    m.weight.data = torch.tensor([[5., 0, 0], [3, 3, 3]])
    Sparsifier(m, 'row', criteria=Criteria(magnitude, reducer), layer_type=nn.Linear).sparsify_model(50)
    assert (m.weight.sum(1) == 0).tolist() == [dropped == 0, dropped == 1]

def test_repeated_calls_only_go_on():
    m = linear(range(1, 13))
    sp = Sparsifier(m, layer_type=nn.Linear)
    for s,k in ((25, 3), (50, 6), (75, 9)):
        sp.sparsify_model(s)
        assert int((m.weight == 0).sum()) == k
    assert list(m.state_dict()) == ['weight'] and not m._forward_pre_hooks  # no `weight_orig`, no `weight_mask`
