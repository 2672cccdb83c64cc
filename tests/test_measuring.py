"How scores are measured: what a convolution's taps meet, in which mode, on which batches, and whether a path is left"
import dataclasses, math, warnings
from collections import UserDict, namedtuple
from copy import deepcopy
from functools import partial

import pytest, torch, torch.nn as nn, torch.nn.functional as F
from fastai.basics import DataLoaders, Learner, OptimWrapper
from fastai.losses import CrossEntropyLossFlat
from fastai.text.models.awdlstm import WeightDropout
from torch.utils.data import DataLoader, TensorDataset

from fasterai_clone.sparse.measure import *
from fasterai_clone.sparse.all import *
from fasterai_clone.core.criteria import fisher, identity
from fasterai_clone.core.lazy import LazyScores, Product
from fasterai_clone.core.selection import keep_masks
from fasterai_clone.sparse.measure import as_criteria, grasp, snip
from fasterai_clone.sparse.gradients import accumulated, grasp_scores, snip_scores
from fasterai_clone.sparse.channel_scores import channel_means
from fasterai_clone.sparse.activations import input_norms
from fasterai_clone.sparse.paths import passes_signal
from fasterai_clone.sparse.synflow import path_shares, synflow_scores
from fasterai_clone.sparse.batches import as_batch, batches
from fasterai_clone.sparse.budget import row_mask
from fasterai_clone.model.preserve import restored
from fasterai_clone.sparse.signal import LayerCollapse
from fasterai_clone.sparse.sparsifier import Sparsifier

def close(a, b, tol=1e-5): return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=tol, atol=tol)
def weights(net): return {k: p for k,p in net.named_parameters() if k.endswith('weight')}
def a_gradient(w, g): return g


# What each tap of a kernel meets

def naive_taps(m, x):
    """The norm of the derivative by each weight alone: the loss Σ out with all weights zero but one is that weight
    times what it meets"""
    x, norms, one = x.double(), torch.zeros(m.weight.shape, dtype=torch.float64), deepcopy(m).double()
    one.bias = None
    for i in range(m.weight.numel()):
        one.weight.data.zero_().view(-1)[i] = 1
        # each output is one of the values it meets, or nothing
        norms.view(-1)[i] = one(x).detach().square().sum().sqrt()
    return norms

convolutions = dict(
    stride      = (lambda: nn.Conv2d(2, 3, 3, stride=2), (2, 2, 7, 6)),
    padded      = (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2)), (2, 2, 5, 4)),
    dilated     = (lambda: nn.Conv2d(2, 2, (2, 3), dilation=(3, 2), padding=1), (2, 2, 7, 6)),
    same        = (lambda: nn.Conv1d(2, 2, 4, padding='same'), (2, 2, 7)),
    valid       = (lambda: nn.Conv1d(2, 2, 4, padding='valid', stride=3), (2, 2, 8)),
    reflect     = (lambda: nn.Conv2d(2, 2, 3, padding=2, padding_mode='reflect', stride=2), (2, 2, 5, 6)),
    circular    = (lambda: nn.Conv1d(2, 2, 3, padding=2, padding_mode='circular'), (2, 2, 5)),
    replicate   = (lambda: nn.Conv3d(1, 2, 3, padding=(1, 0, 2), padding_mode='replicate'), (2, 1, 4, 3, 3)),
    conv3d      = (lambda: nn.Conv3d(2, 2, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)), (2, 2, 3, 4, 3)),
    grouped     = (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, stride=2), (2, 4, 5, 5)),
    depthwise   = (lambda: nn.Conv1d(3, 6, 3, groups=3, padding=1), (2, 3, 5)),
    single      = (lambda: nn.Conv2d(2, 2, 3, padding=1), (2, 4, 5)),
    up          = (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 2, 3, 4)),
    up_cut      = (lambda: nn.ConvTranspose1d(2, 2, 5, padding=3, dilation=2), (2, 2, 6)),
    up_grouped  = (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2, padding=1), (2, 4, 3, 3)),
    up_single   = (lambda: nn.ConvTranspose3d(1, 2, 2, stride=2, padding=1), (1, 2, 3, 2)))

@pytest.mark.parametrize('name', convolutions)
def test_taps_of_convolutions(name):
    make, shape = convolutions[name]
    m, x = make(), torch.randn(shape)
    got = input_norms(m, weights(m), (x, None))['weight']
    assert close(got.expand_as(m.weight), naive_taps(m, x))

def test_taps_by_hand():
    m = nn.Conv1d(1, 1, 1, stride=2, bias=False)
    assert input_norms(m, weights(m), torch.tensor([[[1., 100, 1, 100]]]))['weight'].item() == pytest.approx(2**.5)
    m = nn.Conv1d(1, 1, 3, padding=1, bias=False)
    assert input_norms(m, weights(m), torch.tensor([[[3.]]]))['weight'].flatten().tolist() == [0, 3, 0]
    m = nn.ConvTranspose1d(1, 1, 3, padding=1, bias=False)  # of three outputs the first and the last are cut off
    assert input_norms(m, weights(m), torch.tensor([[[3.]]]))['weight'].flatten().tolist() == [0, 3, 0]

class SamePadding(nn.Conv2d):
    "TensorFlow's padding to keep the size, in a `forward` of its own, as in networks carried over from there"
    def forward(self, x):
        lack = [max((math.ceil(n/s) - 1)*s + k - n, 0) for n,s,k in zip(x.shape[-2:], self.stride, self.kernel_size)]
        return F.conv2d(F.pad(x, [p for l in reversed(lack) for p in (l//2, l - l//2)]), self.weight,
                        self.bias, self.stride)

def test_taps_of_a_convolution_that_pads_itself():
    m, x = SamePadding(2, 2, (3, 4), stride=2), torch.randn(2, 2, 6, 7)
    assert close(input_norms(m, weights(m), x)['weight'], naive_taps(m, x))

def test_masks_follow_the_taps():
    "The middle tap is the only one that meets anything, so its small weight is kept"
    net = nn.Sequential(nn.Conv1d(1, 1, 3, padding=1, bias=False))
    net[0].weight.data = torch.tensor([[[9., 0.1, 9.]]])
    Sparsifier(net, criteria='wanda', layer_type=nn.Conv1d, data=torch.tensor([[[3.]]])).sparsify_model(67)
    assert net[0].weight.flatten().tolist() == pytest.approx([0, 0.1, 0])


# In which mode gradients are measured

def used_gradient(net, x, y, training=False):
    "The gradient of the loss by the first weight, by PyTorch alone"
    net = deepcopy(net).train(training)
    loss = F.cross_entropy(net(x), y)
    return torch.autograd.grad(loss, net[0].weight)[0]

nets = dict(norm=lambda: [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)],
            dropout=lambda: [nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)],
            instance=lambda: [nn.Conv1d(4, 4, 1), nn.InstanceNorm1d(4, track_running_stats=True), nn.Flatten(),
                              nn.Linear(12, 2)])

@pytest.mark.parametrize('name', nets)
@pytest.mark.parametrize('training', [False, True])
def test_gradients_are_those_of_the_model_as_it_is_used(name, training):
    net, (x, y) = nn.Sequential(*nets[name]()), (torch.randn(8, 4) + 5, torch.arange(8) % 2)
    if name == 'instance': x = torch.randn(8, 4, 3) + 5
    if name != 'dropout': net[1].running_mean.fill_(5.), net[1].running_var.fill_(9.)
    torch.manual_seed(0)
    want = used_gradient(net, x, y)
    params, data = {'0.weight': net[0].weight}, [(x, y)]
    got = accumulated(net, params, data, F.cross_entropy, a_gradient)['0.weight']
    assert close(got, want) and net.training
    torch.manual_seed(0)
    trained = used_gradient(net, x, y, True)
    torch.manual_seed(0)
    assert close(accumulated(net, params, data, F.cross_entropy, a_gradient, training=True)['0.weight'], trained)
    assert not close(want, trained, 1e-2)

def test_criteria_choose_the_mode():
    "As a measure takes it (snip), and as a criterion of gradients does (gradient, fisher)"
    def scores(criterion):
        torch.manual_seed(0)
        net, x, y = nn.Sequential(*nets['norm']()).eval(), torch.randn(8, 4) + 5, torch.arange(8) % 2
        net[1].running_mean.fill_(5.)
        sp = Sparsifier(net, 'weight', 'global', criterion, layer_type=nn.Linear, include='0', data=[(x, y)],
                        loss_func=F.cross_entropy)
        sp.scorer.measure(net, sp.parts)
        g = [used_gradient(net, x, y, t) for t in (False, True)]
        ref = sp.refs['0.weight']
        w   = net[0].weight.detach()
        return ref, sp.criteria(w, ref), [(w * k).abs() for k in g], [k.square() for k in g]
    for i,t in enumerate((False, True)):
        for criterion in (snip, 'snip', gradient):
            _, got, taylor, _ = scores(partial(as_criteria(criterion), training=t))
            assert close(got, taylor[i])
        got, *_, squares = scores(partial(fisher, training=t))
        assert close(got, squares[i])
    assert close(scores('gradient')[0], scores(partial(gradient, training=False))[0])
    for wrong in (large_final, movement):
        with pytest.raises(ValueError, match='`training` is about gradients'):
            as_criteria(partial(wrong, training=True))

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True, dropout=0.5, num_layers=2), nn.Linear(4, 2)
    def forward(self, x): return self.head(self.lstm(x)[0][:, -1])

def test_recurrent_layers_have_gradients_in_eval_mode():
    net, data = Recurrent(), (torch.randn(4, 5, 3), torch.arange(4) % 2)
    a, b = (snip_scores(net, weights(net), data, F.cross_entropy)['head.weight'] for _ in range(2))
    assert torch.equal(a, b) and a.any()  # without dropout


# Sparse gradients

class Bags(nn.Module):
    "A recommender: a table of its own for words and for the rest"
    def __init__(self, sparse, mode='mean'):
        super().__init__()
        self.words = nn.Embedding(20, 4, sparse=sparse, padding_idx=0)
        self.bag, self.head = nn.EmbeddingBag(30, 4, mode=mode, sparse=sparse), nn.Linear(4, 2)
    def forward(self, x): return self.head(torch.tanh(self.words(x).sum(1) + self.bag(x)))

ids, classes = torch.randint(0, 20, (16, 4), generator=torch.Generator().manual_seed(0)), torch.arange(16) % 2

def masks(sparse, criterion, how, mode='mean', **kwargs):
    torch.manual_seed(0)
    net = Bags(sparse, mode)
    data = dict(data=[(ids, classes)], loss_func=F.cross_entropy) if how == 'data' else {}
    sp = Sparsifier(net, criteria=criterion, layer_type=(nn.Embedding, nn.EmbeddingBag), **data, **kwargs)
    opt = torch.optim.SGD(net.parameters(), 0.1)
    if how == 'hold': sp.hold(opt)
    for _ in range(dict(data=0, backward=1, hold=3)[how]):
        opt.zero_grad()
        F.cross_entropy(net(ids), classes).backward()
        if how == 'hold': opt.step()
    sp.sparsify_model(50)
    return sp.masks

@pytest.mark.parametrize('how', ['data', 'backward', 'hold'])
@pytest.mark.parametrize('criterion', ['gradient', 'fisher', 'sanh_movement'])
def test_sparse_gradients(criterion, how):
    "The same masks as with dense gradients, of which half are exactly zero"
    want, got = masks(False, criterion, how), masks(True, criterion, how)
    assert all(torch.equal(got[k], want[k]) for k in ('words.weight', 'bag.weight'))
    assert [int((~got[k]).sum()) for k in got] == [40, 60]

@pytest.mark.parametrize('mode', ['sum', 'mean'])
@pytest.mark.parametrize('criterion', ['snip', 'synflow', partial(grasp, temperature=1.)])
def test_measures_of_embeddings_with_sparse_gradients(criterion, mode):
    want, got = (masks(s, criterion, 'data', mode) for s in (False, True))
    assert all(torch.equal(got[k], want[k]) for k in ('words.weight', 'bag.weight'))

def test_grasp_of_bags_is_that_of_a_product():
    "A bag is a product of counts and rows, which has second derivatives anyway"
    def scores(table, data):
        return grasp_scores(nn.Sequential(table, head), {'0.weight': table.weight}, data, F.cross_entropy,
                            temperature=1.)['0.weight']
    torch.manual_seed(0)
    table, head = nn.EmbeddingBag(6, 3, mode='sum', sparse=True), nn.Sequential(nn.Tanh(), nn.Linear(3, 2))
    flat = nn.Linear(6, 3, bias=False)
    flat.weight.data = table.weight.data.T.clone()
    x, y = torch.tensor([[0, 1, 1], [5, 2, 0]]), torch.tensor([0, 1])
    counts = torch.tensor([[1., 2, 0, 0, 0, 0], [1, 0, 1, 0, 0, 1]])
    assert close(scores(table, (x, y)), scores(flat, (counts, y)).T)
    class Offsets(nn.Module):
        def __init__(self): super().__init__(); self.table, self.head = table, head
        def forward(self, x, offsets): return self.head(self.table(x, offsets))
    net = Offsets()
    got = grasp_scores(net, {'table.weight': table.weight}, (x.flatten(), torch.tensor([0, 3]), y),
                       F.cross_entropy, temperature=1.)
    assert close(got['table.weight'], scores(flat, (counts, y)).T)

def test_grasp_refuses_what_has_no_second_derivative():
    table = nn.EmbeddingBag(6, 3, mode='max')
    net = nn.Sequential(table, nn.Linear(3, 2))
    with pytest.raises(ValueError, match='grasp needs second derivatives.*Choose another criterion'):
        grasp_scores(net, {'0.weight': table.weight}, (torch.tensor([[0, 1]]), torch.tensor([0])), F.cross_entropy)

def test_sparse_gradients_in_a_callback():
    def fitted(sparse):
        torch.manual_seed(0)
        net = Bags(sparse)
        dl  = DataLoader(TensorDataset(ids, classes), 8)
        learn = Learner(DataLoaders(dl, dl), net, loss_func=CrossEntropyLossFlat(),
                        opt_func=partial(OptimWrapper, opt=torch.optim.SGD))
        cb = SparsifyCallback(50, criteria='gradient', layer_type=(nn.Embedding, nn.EmbeddingBag), verbose=False)
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 0.1, cbs=cb)
        return cb.sparsifier.masks
    want, got = fitted(False), fitted(True)
    assert all(torch.equal(got[k], want[k]) for k in want)


# Batches that are dicts

class Net(nn.Module):
    "Takes arguments by name, and makes a loss of labels, as the models of Hugging Face do"
    def __init__(self):
        super().__init__()
        self.emb, self.mid, self.head = nn.Embedding(20, 4), nn.Linear(4, 4), nn.Linear(4, 2)
    def forward(self, input_ids, attention_mask=None, labels=None):
        h = self.emb(input_ids)
        if attention_mask is not None: h = h * attention_mask[..., None]
        logits = self.head(torch.tanh(self.mid(h.mean(1))))
        return dict(logits=logits) if labels is None else dict(loss=F.cross_entropy(logits, labels), logits=logits)

@dataclasses.dataclass(frozen=True)
class Fields:
    input_ids: torch.Tensor
    attention_mask: torch.Tensor

def logits_loss(out, y): return F.cross_entropy(out['logits'], y)

mask  = (torch.arange(64).reshape(16, 4) % 3 > 0).float()
rows  = [dict(input_ids=i, attention_mask=m) for i,m in zip(ids, mask)]
named = dict(input_ids=ids, attention_mask=mask)

def made(data, criterion='wanda', loss_func=None, **kwargs):
    torch.manual_seed(0)
    sp = Sparsifier(Net(), criteria=criterion, layer_type=nn.Linear, data=data, loss_func=loss_func, **kwargs)
    sp.sparsify_model(50)
    return sp.masks

without = dict(tuple=lambda: (ids, mask, None), dict=lambda: named, user_dict=lambda: UserDict(named),
               dataclass=lambda: Fields(ids, mask),
               loader=lambda: DataLoader(rows, 8),
               list=lambda: [{k: v[i:i+8] for k,v in named.items()} for i in (0, 8)],
               with_target=lambda: (named, classes), loader_of_pairs=lambda: DataLoader([*zip(rows, classes)], 8),
               generator=lambda: (b for b in DataLoader(rows, 8)),
               namedtuple=lambda: namedtuple('Batch', 'ids mask y')(ids, mask, classes))

@pytest.mark.parametrize('kind', without)
def test_activations_are_measured_on_dicts(kind):
    assert made(without[kind]()) == made([(ids, mask, None)])

labelled = dict(dict=lambda: dict(named, labels=classes), list=lambda: [dict(named, labels=classes)],
                loader=lambda: DataLoader([dict(r, labels=y) for r,y in zip(rows, classes)], 16))

@pytest.mark.parametrize('criterion', ['snip', 'gradient', partial(grasp, temperature=1.)])
@pytest.mark.parametrize('kind', labelled)
def test_the_loss_is_that_of_the_model(kind, criterion):
    want = made([(ids, mask, classes)], criterion, logits_loss)
    assert made(labelled[kind](), criterion) == want
    # a loss that was given gets the labels among the arguments
    assert made(labelled[kind](), criterion, logits_loss) == want
    assert made([(named, classes)], criterion, logits_loss) == want  # or the target beside them

def test_what_is_missing_in_a_dict_is_named():
    with pytest.raises(ValueError, match='snip needs a loss: pass .*dicts with `labels`'): made(named, 'snip')
    with pytest.raises(ValueError, match='snip needs labels'): made(named, 'snip', logits_loss)
    with pytest.raises(ValueError, match='snip needs a loss'): made([(named, classes)], 'snip')
    with pytest.raises(TypeError, match=r'keyword arguments input_ids, mask.*`forward` takes \(input_ids'):
        made(dict(input_ids=ids, mask=mask))
    with pytest.raises(TypeError, match='got dict'): made(dict(input_ids=[1, 2]))
    class Silent(Net):
        def forward(self, **kwargs): return super().forward(**kwargs)['logits']
    with pytest.raises(ValueError, match='no `loss` among the outputs'):
        snip_scores(net := Silent(), weights(net), dict(named, labels=classes))

def test_huggingface_batches_and_outputs():
    transformers = pytest.importorskip('transformers')
    assert made([transformers.BatchEncoding(named)]) == made(transformers.BatchEncoding(named)) == made(named)
    class Output(Net):
        def forward(self, **kwargs):
            return transformers.modeling_outputs.SequenceClassifierOutput(**super().forward(**kwargs))
    torch.manual_seed(0)
    sp = Sparsifier(Output(), criteria='snip', layer_type=nn.Linear, data=dict(named, labels=classes))
    sp.sparsify_model(50)
    assert sp.masks == made(dict(named, labels=classes), 'snip')

class Both(Net):
    def forward(self, input_ids, attention_mask): return super().forward(input_ids, attention_mask)

class Stacked(Net):
    def forward(self, pair): return super().forward(*pair)

def test_inputs_in_a_tuple_of_their_own():
    "`((x1, x2), y)`: in parts for a model of two arguments, and as it is for a model of one"
    want = input_norms(net := Net(), {'mid.weight': net.mid.weight}, (ids, mask, None))
    for kind in (Both, Stacked):
        like = kind()
        like.load_state_dict(net.state_dict())
        assert torch.equal(input_norms(like, {'mid.weight': like.mid.weight}, ((ids, mask), classes))['mid.weight'],
                           want['mid.weight'])

class OneDict(Net):
    "Takes the dict itself, as fastai calls a model"
    def forward(self, batch): return super().forward(**batch)['logits']

def test_a_model_that_takes_the_dict_itself():
    torch.manual_seed(0)
    net = OneDict()
    got = snip_scores(net, weights(net), (named, classes), F.cross_entropy)
    want = snip_scores(like := Net(), weights(like), (named, classes), logits_loss)
    like.load_state_dict(net.state_dict())
    want = snip_scores(like, weights(like), (named, classes), logits_loss)
    assert all(torch.equal(got[k], want[k]) for k in want)

@pytest.mark.parametrize('criterion', ['wanda', 'snip'])
@pytest.mark.parametrize('own', [False, True])
def test_dicts_in_a_callback(criterion, own):
    torch.manual_seed(0)
    dl    = DataLoader([*zip(rows, classes)], 8)
    learn = Learner(DataLoaders(dl, dl), OneDict(), loss_func=CrossEntropyLossFlat())
    cb    = SparsifyCallback(50, criteria=criterion, layer_type=nn.Linear, verbose=False, data=dl if own else None)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.1, cbs=cb)
    assert [(p == 0).sum().item() for p in (learn.model.mid.weight, learn.model.head.weight)] == [8, 4]

def test_several_targets():
    "A fastai loader says what are inputs; its loss gets the targets one by one, a tuple of PyTorch's as one"
    class TwoHeads(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 1)
        def forward(self, x): return self.a(x), self.b(x)
    def loss(out, y1, y2): return F.cross_entropy(out[0], y1) + F.mse_loss(out[1], y2)
    class Loader:
        n_inp = 1
        def __iter__(self): yield x, y1, y2
    net, x, y1, y2 = TwoHeads(), torch.randn(8, 3), torch.arange(8) % 2, torch.randn(8, 1)
    want = snip_scores(net, weights(net), [(x, (y1, y2))], lambda out, y: loss(out, *y))
    for data in (Loader(), as_batch((x,), (y1, y2)), [as_batch((x,), (y1, y2))]):
        got = snip_scores(net, weights(net), data, loss)
        assert all(torch.equal(got[k], want[k]) and got[k].any() for k in want)

def test_batches_of_a_dict_stay_as_they_are():
    "Moving a batch to a device changes no dict or object of the user's"
    batch = UserDict(named)
    (inputs, target), = batches(batch, 'meta')
    assert inputs[0]['input_ids'].is_meta and not batch['input_ids'].is_meta and target is None
    fields = Fields(ids, mask)
    ((moved,), _), = batches(fields, 'meta')
    assert moved.input_ids.is_meta and not fields.input_ids.is_meta


# The model as it was

class Hooked(nn.Module):
    "Registers hooks and remembers things at its first run"
    def __init__(self): super().__init__(); self.l, self.seen, self.runs = nn.Linear(4, 4), [], {}
    def forward(self, x):
        if not getattr(self, 'installed', False):
            self.installed = True
            self.l.register_forward_hook(lambda m, a, o: self.seen.append(1))
            self.l.register_forward_pre_hook(lambda m, a: self.seen.append(2))
            self.l.register_state_dict_pre_hook(lambda *a: None)
        self.seen.clear()
        self.runs['n'] = self.runs.get('n', 0) + 1
        return self.l(x)

@pytest.mark.parametrize('measure', [input_norms, synflow_scores, channel_means,
                                     partial(snip_scores, loss_func=F.cross_entropy)])
def test_hooks_and_memories_of_a_first_run_are_undone(measure):
    net = Hooked()
    for _ in range(2): measure(net, weights(net), (torch.ones(2, 4), torch.tensor([0, 1])))
    assert not net.l._forward_hooks and not net.l._forward_pre_hooks and not hasattr(net, 'installed')
    assert net.runs == {}
    net(torch.ones(1, 4))
    assert net.seen == [2, 1] and net.runs == {'n': 1}

def test_hooks_for_all_modules_are_undone():
    net, seen = nn.Linear(2, 2), []
    with restored(net):
        nn.modules.module.register_module_forward_hook(lambda *a: seen.append(1))
        nn.modules.module.register_module_full_backward_hook(lambda *a: seen.append(2))
    net(torch.ones(1, 2)).sum().backward()
    assert seen == []


# Layers that are cut off

def cut(net, x): return [k for k,v in passes_signal(net, x).items() if not v]
def zero(*ms):
    for m in ms: nn.init.zeros_(m.weight)

dense_nets = ['efficientvit_b0', 'mobilevit_xxs', 'resnest14d', 'skresnet18', 'pvt_v2_b0', 'crossvit_tiny_240',
              'eva02_tiny_patch14_224']

@pytest.mark.parametrize('name', dense_nets)
def test_dense_networks_have_no_layer_cut_off(name):
    timm = pytest.importorskip('timm')
    net = timm.create_model(name)
    assert cut(net, torch.randn(1, *net.default_cfg['input_size'])) == []

class Half(nn.Module):
    "A part in fp32, whose squares overflow"
    def forward(self, x): x = x.float(); return ((x*x) / (x.sum()*x.sum())).to(torch.float64)

def test_an_overflow_is_no_collapse():
    convs = [nn.Conv2d(3, 32, 3, padding=1), *[nn.Conv2d(32, 32, 3, padding=1) for _ in range(20)]]
    net = nn.Sequential(*convs, Half(), nn.Conv2d(32, 5, 1)).double()
    x = torch.randn(2, 3, 8, 8).double()
    assert cut(net, x) == []
    zero(net[22])
    assert len(cut(net, x)) == 22

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        for k in 'qkvo': setattr(self, k, nn.Linear(6, 6))
    def forward(self, x): return self.o(F.softmax(self.q(x) @ self.k(x).mT * 1e4, -1) @ self.v(x))

@pytest.mark.parametrize('zeros, dead', [('', ''), ('q', 'q'), ('k', 'k'), ('v', 'qkvo'), ('o', 'qkvo')])
def test_attention(zeros, dead):
    """A saturated softmax carries signal; without queries keys may count by the bias; without values nothing gets
    through"""
    net = Attention()
    zero(*(getattr(net, k) for k in zeros))
    assert cut(net, torch.randn(1, 5, 6)) == list(dead)

class Gate(nn.Module):
    def __init__(self):
        super().__init__(); self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
    def forward(self, x):
        x = self.conv(x)
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()

class GatedUnit(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
    def forward(self, x): return self.out(F.silu(self.a(x)) * self.b(x))

def test_gates():
    "What multiplies has a bias, so that an empty one is no end of what it multiplies"
    net, x = Gate(), torch.randn(1, 3, 4, 4)
    assert cut(net, x) == []
    zero(net.fc2)
    assert cut(net, x) == ['fc1', 'fc2']
    zero(net.conv)
    assert cut(net, x) == ['conv', 'fc1', 'fc2']
    for k,dead in dict(a=['a'], b=['b'], out=['a', 'b', 'out']).items():
        unit = GatedUnit()
        zero(getattr(unit, k))
        assert cut(unit, torch.randn(1, 4)) == dead

def test_chains_and_branches_are_still_found():
    chain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(),
                          nn.LazyLinear(2))
    x = torch.randn(2, 1, 8, 8)
    chain(x)
    assert cut(chain, x) == []
    # the one leaves channels 0 and 1, the other reads 2 and 3
    chain[0].weight.data[2:], chain[3].weight.data[:, :2] = 0, 0
    assert cut(chain, x) == ['0', '1', '3', '5']
    class Block(nn.Module):
        def __init__(self):
            super().__init__(); self.a, self.norm, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        def forward(self, x): return F.relu(x + self.b(F.relu(self.norm(self.a(x)))))
    net = nn.Sequential(Block(), Block(), nn.Linear(4, 2))
    nn.init.ones_(net[0].norm.bias), zero(net[0].a, net[1].b)
    assert cut(net, torch.randn(2, 4)) == ['0.a', '0.norm', '0.b', '1.a', '1.norm', '1.b']

def test_what_starts_closed_is_no_collapse():
    """The last norm of a block is often zero as made; experts that no item is sent to, and choices that have no
    gradient, are unknown"""
    class Block(nn.Module):
        def __init__(self): super().__init__(); self.a, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        def forward(self, x): return x + self.norm(self.a(x))
    class Experts(nn.Module):
        def __init__(self):
            super().__init__(); self.gate, self.each = nn.Linear(4, 3), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        def forward(self, x):
            out, best = torch.zeros_like(x), self.gate(x).argmax(-1)
            for i,e in enumerate(self.each): out[best == i] = e(x[best == i])
            return out
    net = nn.Sequential(Block(), Experts(), nn.Linear(4, 2))
    zero(net[0].norm)
    assert cut(net, torch.randn(1, 4)) == []
    zero(net[2])
    assert '2' in cut(net, torch.randn(1, 4))

def test_a_warning_comes_for_layers_that_are_cut_off_only():
    def said(*percent):
        net = nn.Sequential(Gate(), nn.Flatten(), nn.LazyLinear(2))
        x = torch.randn(2, 3, 4, 4)
        net(x)
        sp = Sparsifier(net, layer_type=(nn.Conv2d, nn.Linear), example_inputs=x)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            sp.sparsify_model([*percent])
        return [str(w.message) for w in seen if issubclass(w.category, LayerCollapse)]
    assert said(50, 50, 50, 50) == []
    no_weight, no_path = said(50, 50, 100, 0)
    assert 'no weight is left in 0.fc2,' in no_weight and no_path.endswith('through 0.fc1, 0.fc2')


# Parameters that a measure does not support are refused before anything is lost

class Dropped(nn.Module):
    "An LSTM as in AWD-LSTM, which keeps its hidden weight under another name"
    def __init__(self):
        super().__init__()
        self.rnn = WeightDropout(nn.LSTM(3, 4, batch_first=True), .1)
    def forward(self, x): return self.rnn(x)[0]

unseen = dict(
    dropped  = (Dropped, nn.LSTM, 'rnn.weight_hh_l0_raw'),
    deeper   = (lambda: nn.LSTM(3, 4, 2), nn.LSTM, 'weight_hh_l0, weight_ih_l1, weight_hh_l1'),
    cell     = (lambda: nn.GRUCell(3, 4), nn.GRUCell, 'weight_ih, weight_hh'),
    bilinear = (lambda: nn.Bilinear(2, 3, 4), nn.Bilinear, 'weight'))

@pytest.mark.parametrize('name', unseen)
@pytest.mark.parametrize('criteria', ['wanda', dataclasses.replace(as_criteria('wanda'), measure=partial(input_norms))])
def test_wanda_refuses_weights_with_hidden_inputs_when_it_is_built(name, criteria):
    make, kind, hidden = unseen[name]
    with pytest.raises(ValueError, match=f'What {hidden} is multiplied with cannot be seen'):
        Sparsifier(make(), criteria=criteria, layer_type=kind)
    for other in ('snip', 'grasp', 'synflow', 'large_final'): Sparsifier(make(), criteria=other, layer_type=kind)

def test_a_fit_refuses_them_before_its_first_step():
    x, y = torch.rand(6, 5, 3), torch.rand(6, 5, 4)
    dl, steps = DataLoader(TensorDataset(x, y), 2), []
    net = Dropped()
    def loss(out, y):
        steps.append(1)
        return F.mse_loss(out, y)
    learn = Learner(DataLoaders(dl, dl), net, loss_func=loss)
    was = {k: v.clone() for k,v in net.state_dict().items()}
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match='weight_hh_l0_raw'):
        learn.fit(1, 1., cbs=SparsifyCallback(50, criteria='wanda', layer_type=nn.LSTM, verbose=False))
    assert not steps and all(torch.equal(v, was[k]) for k,v in net.state_dict().items())

@pytest.mark.parametrize('criteria', ['apoz', 'mean_activation', 'bn_scale'])
def test_scores_of_channels_are_refused_for_other_layers_when_it_is_built(criteria):
    for layer,kind,granularity in ((nn.Embedding(4, 3), nn.Embedding, 'column'), (nn.GRU(3, 4), nn.GRU, 'row')):
        with pytest.raises((TypeError, ValueError), match='channels'):
            Sparsifier(layer, granularity, criteria=criteria, layer_type=kind)

def test_a_measure_of_your_own_may_check():
    def measure(model, params, data, loss_func): raise AssertionError('not measured')
    def check(model, params):
        if '0.weight' in params: raise ValueError(f'not the first of {len(model)}')
    measure.check = check
    mine, net = Criteria(torch.abs, measure=measure, return_init=True), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match='not the first of 2'): Sparsifier(net, criteria=mine, layer_type=nn.Linear)
    Sparsifier(net, criteria=mine, layer_type=nn.Linear, exclude='0')


# SynFlow without copies or gradients of linear layers

def naive_shares(net, x):
    "|w·∂R/∂w|/R with a copy of everything in fp64"
    net = deepcopy(net).double()
    for k,p in net.named_parameters(): p.data = p.data*0 if 'bias' in k else p.data.abs()
    R = net(torch.ones_like(x[:1], dtype=torch.float64)).sum()
    ws    = weights(net)
    grads = torch.autograd.grad(R, [*ws.values()])
    return {k: (p*g/R).detach() for (k,p),g in zip(ws.items(), grads)}

def layers_without_activations(dtype):
    return nn.Sequential(nn.Linear(37, 301), nn.ReLU(), nn.Linear(301, 203, bias=False), nn.Linear(203, 11)).to(dtype)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('shape, kind', [((3, 37), Product), ((2, 3, 37), Product), ((2, 9, 37), torch.Tensor)])
def test_synflow_of_linear_layers_is_that_of_copies(dtype, shape, kind):
    torch.manual_seed(0)
    net, x = layers_without_activations(dtype), torch.rand(shape, dtype=dtype)
    was, want = {k: p.clone() for k,p in weights(net).items()}, naive_shares(net, x)
    found, whole = path_shares(net, weights(net), x), synflow_scores(net, weights(net), x)
    assert all(type(s) is kind for s in found.values()) and all(torch.equal(p, was[k]) for k,p in weights(net).items())
    for k,s in whole.items():
        assert s.dtype == (dtype if dtype == torch.float64 else torch.float32) and not s.requires_grad
        assert close(s, want[k], 1e-12 if dtype == torch.float64 else 1e-6) and s.sum().item() == pytest.approx(1)
    lazy, all_ = [LazyScores(identity, s) for s in found.values()], [*whole.values()]
    for n in (1, 30_000, 70_000):
        for a,b in zip(keep_masks(lazy, n), keep_masks(all_, n)): assert torch.equal(a, b)
    for s,l in zip(all_, lazy):
        for n in (1, s.shape[1]//2): assert torch.equal(row_mask(l, n), row_mask(s, n))
        flat = l.flat()
        assert torch.equal(flat[5:1234], s.view(-1)[5:1234]) and torch.equal(flat[[7, 0]], s.view(-1)[[7, 0]])
        assert torch.equal(flat[3::17], s.view(-1)[3::17])

class Twice(nn.Module):
    "Uses the weight of a linear layer again"
    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), how
        if how == 'tied': self.b.weight = self.a.weight
    def forward(self, x):
        if self.how == 'tied': return self.b(self.a(x))
        if self.how == 'product': return self.a(x) @ self.a.weight
        return F.linear(input=self.a(x), weight=self.b.weight) * self.b.weight.sum()

@pytest.mark.parametrize('how', ['tied', 'product', 'sum'])
def test_synflow_of_weights_that_are_used_twice(how):
    net, x = Twice(how), torch.rand(2, 4)
    params = {k: p for k,p in weights(net).items() if how != 'product' or k == 'a.weight'}
    want = naive_shares(net, x) if how != 'product' else None
    got = synflow_scores(net, params, x)
    if want is None:  # R = Σ (|a|·1)ᵀ|a|
        a = net.a.weight.detach().double().abs().requires_grad_()
        R = (a.sum(1) @ a).sum()
        want = {'a.weight': (a * torch.autograd.grad(R, a)[0] / R).detach()}
    assert got.keys() == want.keys() and all(close(got[k], want[k], 1e-6) for k in want)

def test_rounds_of_synflow_keep_a_thin_layer():
    "On the way to 90 % each of the rounds sees the weights that are left; one shot empties the wide layers"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8), nn.ReLU(), nn.Linear(8, 128))
    sp  = Sparsifier(net, context='global', criteria='synflow', layer_type=nn.Linear, data=torch.rand(2, 64))
    sp.sparsify_model(90)
    zeros = sum(int((p == 0).sum()) for p in weights(net).values())
    assert zeros == 9*(64*128 + 128*8*2)//10 and all(p.any() for p in weights(net).values()) and not sp.scorer.refs
