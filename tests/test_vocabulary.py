"Every layer type × granularity × criterion against loops over indices; then what the other words promise"
import math, re, warnings
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import product

import pytest, torch, torch.nn as nn
import torch.nn.functional as F

from fasterai_clone.core.flow import multiply_adds
from fasterai_clone.core.measure import grasp_scores, input_norms, synflow_scores
from fasterai_clone.sparse.all import *
from helpers import exact, naive_keep

# Layers, and the norm that follows each

vocabulary = dict(
    conv1d    = lambda: (nn.Conv1d(3, 4, 3),                               nn.BatchNorm1d(4)),
    conv2d    = lambda: (nn.Conv2d(2, 4, (3, 2)),                          nn.BatchNorm2d(4)),
    conv3d    = lambda: (nn.Conv3d(2, 4, (1, 2, 3)),                       nn.BatchNorm3d(4)),
    grouped1  = lambda: (nn.Conv1d(4, 6, 3, groups=2),                     nn.BatchNorm1d(6)),
    grouped2  = lambda: (nn.Conv2d(4, 6, (2, 3), groups=2),                nn.GroupNorm(3, 6)),
    grouped3  = lambda: (nn.Conv3d(4, 4, (1, 2, 2), groups=2),             nn.BatchNorm3d(4)),
    depth1    = lambda: (nn.Conv1d(5, 5, 2, groups=5),                     nn.BatchNorm1d(5)),
    depth2    = lambda: (nn.Conv2d(4, 8, 2, groups=4),                     nn.BatchNorm2d(8)),
    depth3    = lambda: (nn.Conv3d(4, 4, (1, 2, 2), groups=4),             nn.BatchNorm3d(4)),
    trans1d   = lambda: (nn.ConvTranspose1d(3, 4, 3),                      nn.BatchNorm1d(4)),
    trans2d   = lambda: (nn.ConvTranspose2d(2, 4, (3, 2)),                 nn.BatchNorm2d(4)),
    trans3d   = lambda: (nn.ConvTranspose3d(2, 4, (1, 2, 3)),              nn.BatchNorm3d(4)),
    gtrans1   = lambda: (nn.ConvTranspose1d(4, 6, 3, groups=2),            nn.BatchNorm1d(6)),
    gtrans2   = lambda: (nn.ConvTranspose2d(4, 6, (2, 3), groups=2),       nn.BatchNorm2d(6)),
    gtrans3   = lambda: (nn.ConvTranspose3d(4, 4, (1, 2, 2), groups=2),    nn.BatchNorm3d(4)),
    linear    = lambda: (nn.Linear(6, 4),                                  nn.BatchNorm1d(4)),
    embedding = lambda: (nn.Embedding(6, 4),                               nn.Identity()),
    bag       = lambda: (nn.EmbeddingBag(6, 4),                            nn.Identity()),
    attention = lambda: (nn.MultiheadAttention(6, 3, batch_first=True),    nn.Identity()),
    separate  = lambda: (nn.MultiheadAttention(4, 2, batch_first=True, kdim=3, vdim=2), nn.Identity()),
    lstm      = lambda: (nn.LSTM(3, 4, batch_first=True),                  nn.Identity()),
    projected = lambda: (nn.LSTM(3, 4, batch_first=True, proj_size=2),     nn.Identity()),
    bilstm    = lambda: (nn.LSTM(2, 3, 2, batch_first=True, bidirectional=True), nn.Identity()),
    gru       = lambda: (nn.GRU(3, 4, 2, batch_first=True),                nn.Identity()),
    bigru     = lambda: (nn.GRU(2, 3, batch_first=True, bidirectional=True), nn.Identity()),
    rnn       = lambda: (nn.RNN(3, 4, 2, batch_first=True, nonlinearity='relu'), nn.Identity()),
    nobias    = lambda: (nn.RNN(3, 4, batch_first=True, bias=False, bidirectional=True), nn.Identity()))

def make(name):
    torch.manual_seed(len(name))
    return vocabulary[name]()[0]

class Net(nn.Module):
    "A layer, a norm, ReLU, and a readout"
    def __init__(self, name, x):
        super().__init__()
        self.layer, self.norm = vocabulary[name]()
        self.relu = nn.ReLU()
        with torch.no_grad(): self.readout = nn.Linear(self.run(x).flatten(1).shape[1], 3)

    def run(self, x):
        m = self.layer
        if isinstance(m, nn.MultiheadAttention): return m(x, x[..., :m.kdim], x[..., :m.vdim], need_weights=False)[0]
        return m(x)[0] if isinstance(m, nn.RNNBase) else m(x)

    def forward(self, x): return self.readout(self.relu(self.norm(self.run(x))).flatten(1))

@cache
def example(name):
    "Inputs and labels"
    m, g = make(name), torch.Generator().manual_seed(1)
    if   isinstance(m, (nn.Embedding, nn.EmbeddingBag)): x = torch.randint(0, 6, (6, 3), generator=g)
    elif isinstance(m, nn.Linear):             x = torch.randn(6, m.in_features, generator=g)
    elif isinstance(m, nn.MultiheadAttention): x = torch.randn(6, 3, m.embed_dim, generator=g)
    elif isinstance(m, nn.RNNBase):            x = torch.randn(6, 3, m.input_size, generator=g)
    else:                                      x = torch.randn(6, m.in_channels, *[4]*(m.weight.ndim - 2), generator=g)
    return x, torch.arange(6) % 3

def network(name):
    torch.manual_seed(7)
    net = Net(name, example(name)[0])
    if (scales := getattr(net.norm, 'weight', None)) is not None: nn.init.uniform_(scales, 0.5, 1.5)
    return net

def is_conv(m): return isinstance(m, nn.modules.conv._ConvNd)


# Which weights are one group, by the meaning of the names: coordinates that run over a whole one,
# o filter, i channel, d depth, h height, w width

_lines = dict(channel='i', row='w', column='h', depth='d', horizontal_slice='iw', vertical_slice='ih', depth_slice='id', kernel='dhw')
spans  = dict(weight='', shared_weight='o', filter='idhw', layer='oidhw', **_lines, **{f'shared_{k}': 'o' + v for k,v in _lines.items()})

def key_of(m, param, granularity, idx):
    "The group that the element `idx` of parameter `param` belongs to"
    if granularity == 'layer':  return ()
    if granularity == 'weight': return idx
    if granularity == 'head':
        E, H = m.embed_dim, m.num_heads
        if param == 'out_proj.weight': return (idx[1] // (E//H),)
        return (idx[0] % E // (E//H),)
    if granularity == 'unit': return (idx[0] % m.hidden_size,)
    if granularity.startswith('block_'):
        sizes = [int(k) for k in granularity[6:].split('x')]
        return tuple(i//k for i,k in zip(idx, sizes))
    if not is_conv(m): return (idx[dict(row=0, filter=0, column=1)[granularity]],)
    letters = ('io' if m.transposed else 'oi') + 'dhw'[-(len(idx) - 2):]
    part = idx[0] // (m.weight.shape[0]//m.groups)  # no group crosses the parts of a grouped convolution
    return (part,) + tuple(i for i,l in zip(idx, letters) if l not in spans[granularity])

def naive_targets(m, granularity, biases=False):
    "For each target: parameter → the number of the group each element belongs to, groups in the order of their first element"
    names = [k for k,_ in m.named_parameters() if ('bias' in k) == biases]
    if   granularity == 'head': together = [[k for k in names]]
    elif granularity == 'unit': together = [[f'weight_ih{e}', f'weight_hh{e}'] for e in dict.fromkeys(k[9:] for k in names)]
    else: together = [[k] for k in names]
    found = []
    for parts in together:
        number, ids = {}, {}
        for k in parts:
            shape  = m.get_parameter(k).shape
            ids[k] = torch.tensor([number.setdefault(key_of(m, k, granularity, idx), len(number))
                                   for idx in product(*map(range, shape))]).reshape(shape)
        found.append((ids, len(number)))
    return found

def whole_filters(m, granularity):
    "Is a group one whole output channel, or all of them?"
    return granularity in ('filter', 'layer') and is_conv(m) or granularity in ('filter', 'layer', 'row') and isinstance(m, nn.Linear)

def held_names(m, granularity, norm):
    "What is dropped along: the bias and norm of a filter, the biases of heads and hidden units"
    if whole_filters(m, granularity): return {'layer.bias'} | {f'norm.{k}' for k,_ in norm.named_parameters()}
    return {f'layer.{k}' for k,_ in m.named_parameters() if k.startswith(('in_proj_bias', 'bias_'))} if granularity in ('head', 'unit') else set()


# What is legal

grads     = dict(gradient=lambda w, g: (w*g).abs(), fisher=lambda w, g: g*g, sanh_movement=lambda w, g: -w*g)
needs     = {*grads, 'snip', 'grasp', 'synflow', 'at once', 'wanda', 'apoz', 'mean_activation', 'bn_scale'}
at_once   = replace(synflow, rate=None)  # SynFlow measures anew on the way: only a single choice can be compared
channels  = {'apoz', 'mean_activation', 'bn_scale'}
elementwise = dict(  # of the weights now, at first, and at the last update
    large_final            = lambda w, i, u: w.abs(),
    small_final            = lambda w, i, u: -w.abs(),
    squared_final          = lambda w, i, u: w*w,
    large_init             = lambda w, i, u: i.abs(),
    small_init             = lambda w, i, u: -i.abs(),
    large_init_large_final = lambda w, i, u: torch.minimum(i.abs(), w.abs()),
    small_init_small_final = lambda w, i, u: -torch.maximum(i.abs(), w.abs()),
    magnitude_increase     = lambda w, i, u: w.abs() - i.abs(),
    movement               = lambda w, i, u: (w - i).abs(),
    movmag                 = lambda w, i, u: (w*(w - i)).abs(),
    updating_magnitude_increase = lambda w, i, u: w.abs() - u.abs(),
    updating_movement           = lambda w, i, u: (w - u).abs(),
    updating_movmag             = lambda w, i, u: (w*(w - u)).abs())

def test_every_word_is_here():
    "A new layer type, granularity or criterion has to be added above"
    kinds = {type(make(k)) for k in vocabulary}
    assert {k for k in Granularities.available_modules() if not any(issubclass(o, k) for o in kinds)} == set()
    assert set(Granularities.available_granularities()) == {*spans, 'head', 'unit'}
    assert set(available_criterias()) == {*elementwise, *needs, 'random', 'fpgm'} - {'at once'}

def refused_when_built(m, granularity, criterion, biases):
    "What the error has to say, or None"
    if criterion in channels and (biases or not whole_filters(m, granularity)): return 'whole output channels.*Legal: '
    if criterion == 'fpgm' and granularity == 'weight': return 'groups of several weights.*Legal'

def refused_when_measured(m, criterion, biases):
    "Wanda has to see what a weight is multiplied with"
    if criterion == 'wanda' and (biases or not (is_conv(m) or isinstance(m, (nn.Linear, nn.Embedding)))): return 'multiplied with cannot be seen'
    if criterion == 'grasp' and isinstance(m, nn.EmbeddingBag): return 'not implemented'  # PyTorch has no second derivative of it

def build(net, name, granularity, criterion, biases=False, **kwargs):
    if criterion in needs: kwargs = dict(data=example(name), loss_func=F.cross_entropy, **kwargs)
    if biases: kwargs['params'] = ['*bias*']
    if criterion == 'at once': criterion = at_once
    return Sparsifier(net, granularity, criteria=criterion, layer_type=type(net.layer), include='layer*', **kwargs)

def legal_of(name, biases):
    m = make(name)
    legal = dict.fromkeys(g for k,_ in m.named_parameters() if ('bias' in k) == biases for g in Granularities.allowed_granularities(m, k))
    return [*legal, *(['block_2x2'] if not biases and all(s % 2 == 0 for k,p in m.named_parameters() if p.ndim > 1 for s in p.shape[:2])
                      and not (getattr(m, 'groups', 1) > 1 and m.weight.shape[0]//m.groups % 2) else [])]

pairs = [(n, g, b) for n in vocabulary for b in (False, True) for g in legal_of(n, b)]


# Scores

def set_whole(tensors, seed):
    "Small whole numbers: sums are exact, ties abound"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tensors: p.copy_(torch.randint(-9, 10, p.shape, generator=g))

def by_group(ids, n, scores, mean=True):
    "Sum or mean over the elements of each group, one by one"
    total, count = [0.]*n, [0]*n
    for k,number in ids.items():
        for i,s in zip(number.flatten().tolist(), scores[k].expand(number.shape).flatten().tolist()):
            total[i] += s
            count[i] += 1
    return [t/c for t,c in zip(total, count)] if mean else total

def spread(ids, n, weights):
    "FPGM: how far each group is from all others"
    rows = [[] for _ in range(n)]
    for k,number in ids.items():
        for i,w in zip(number.flatten().tolist(), weights[k].flatten().tolist()): rows[i].append(w)
    return [sum(math.dist(a, b) for b in rows) for a in rows]

def channel_scores(net, x, criterion):
    "What the ReLU lets through of each channel, or the norm's scale"
    if criterion == 'bn_scale': return net.norm.weight.detach().abs()
    was = [m.training for m in net.modules()]
    with torch.no_grad():
        out = net.eval().relu(net.norm(net.run(x))).movedim(1, 0).flatten(1)
    for m,t in zip(net.modules(), was): m.training = t
    return (out > 0).double().mean(1) if criterion == 'apoz' else out.double().mean(1)

def measured_scores(net, name, criterion, params):
    "The score of each weight, as tested against formulas elsewhere; here it is the groups that count"
    x, y = example(name)
    if criterion == 'wanda':   return {k: p.detach().abs() * v for (k,p),v in zip(params.items(), input_norms(net, params, x).values())}
    if criterion == 'grasp':   return grasp_scores(net, params, (x, y), F.cross_entropy)
    if criterion == 'at once': return synflow_scores(net, params, x)
    net.zero_grad()
    twin = deepcopy(net).train()
    F.cross_entropy(twin(x), y).backward()
    got = {k: twin.get_parameter(k) for k in params}
    return {k: (p * p.grad).abs().detach() for k,p in got.items()}

class Case:
    "A network with its sparsifier, and the scores as they are to be"
    def __init__(self, name, granularity, criterion, biases, **kwargs):
        self.name, self.granularity, self.criterion, self.net = name, granularity, criterion, network(name)
        self.wanted = naive_targets(self.net.layer, granularity, biases)
        self.params = {f'layer.{k}': self.net.layer.get_parameter(k) for ids,_ in self.wanted for k in ids}
        set_whole(self.params.values(), 0)
        self.sp   = build(self.net, name, granularity, criterion, biases, **kwargs)
        self.init = self.copy()
        self.last, self.sums, self.gone = self.init, {}, [set() for _ in self.wanted]

    def copy(self): return {k: p.detach().clone() for k,p in self.params.items()}

    def train(self, n=2):
        "Steps with momentum and weight decay; gradients are looked at between `backward` and `step`"
        x, y = example(self.name)
        opt  = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        with self.sp.hold(opt):
            for _ in range(n):
                opt.zero_grad()
                F.cross_entropy(self.net(x), y).backward()
                if self.criterion in grads:
                    for k,p in self.params.items():
                        self.sums[k] = self.sums.get(k, 0) + grads[self.criterion](p.detach(), p.grad)
                opt.step()
                self.is_masked()

    def is_masked(self):
        for k,mask in self.sp.masks.items(): assert not self.net.get_parameter(k)[~mask].any(), k

    def scores(self):
        "A list for each target, or None: nobody can tell"
        if self.criterion in ('random', 'synflow'): return None
        w = self.copy()
        if self.criterion == 'fpgm': return [spread(ids, n, {k: w[f'layer.{k}'] for k in ids}) for ids,n in self.wanted]
        if self.criterion in elementwise: each = {k: elementwise[self.criterion](w[k], self.init[k], self.last[k]) for k in w}
        elif self.criterion == 'fisher':  each = {k: w[k]**2 * self.sums[k] / 2 for k in w}
        elif self.criterion in grads:     each = self.sums
        elif self.criterion in channels:
            s = channel_scores(self.net, example(self.name)[0], self.criterion)
            m = self.net.layer
            axis = 1 if getattr(m, 'transposed', False) else 0
            if axis: s = s.reshape(m.groups, 1, -1).expand(-1, m.in_channels//m.groups, -1).reshape(m.in_channels, -1)
            each = {k: s.reshape(*s.shape, *[1]*(w[k].ndim - s.ndim)) for k in w}
        else: each = measured_scores(self.net, self.name, self.criterion, self.params)
        return [by_group(ids, n, {k: each[f'layer.{k}'] for k in ids}, self.criterion != 'at once') for ids,n in self.wanted]

    def sparsify(self, s):
        "Update, and compare with what was to be"
        scores = self.scores()
        self.sp.sparsify_model(s)
        self.last = self.copy()
        if self.criterion in ('gradient', 'fisher'): self.sums = {}
        for i,(ids,n) in enumerate(self.wanted):
            gone = self.dropped(ids, n)
            assert len(gone) == exact(n, s) and gone >= self.gone[i], (self.criterion, s)
            if scores: self.are_lowest(scores[i], gone, self.gone[i])
            self.gone[i] = gone
        self.is_masked()

    def dropped(self, ids, n):
        "The groups of which nothing is left; nothing is missing of the others"
        kept = {i for k,number in ids.items() for i in number[self.sp.masks[f'layer.{k}']].tolist()}
        assert all(set(number[~self.sp.masks[f'layer.{k}']].tolist()).isdisjoint(kept) for k,number in ids.items())
        return set(range(n)) - kept

    def are_lowest(self, scores, gone, before):
        left = [i for i in range(len(scores)) if i not in before]
        if self.criterion in elementwise:  # whole numbers: also ties are as they are to be
            assert gone - before == set(sorted(left, key=scores.__getitem__)[:len(gone) - len(before)]), self.criterion
        elif gone - before and len(gone) < len(scores):
            worst, best = max(scores[i] for i in gone - before), min(scores[i] for i in left if i not in gone)
            assert worst <= best + 1e-5*max(1e-3, abs(best)), self.criterion

@pytest.mark.filterwarnings('ignore::fasterai_clone.sparse.sparsifier.LayerCollapse')
@pytest.mark.parametrize('name, granularity, biases', pairs, ids=lambda v: str(v) if not isinstance(v, bool) else 'bias'*v)
def test_laws_for_every_criterion(name, granularity, biases):
    for criterion in [*available_criterias(), 'at once']:
        m = make(name)
        if says := refused_when_built(m, granularity, criterion, biases):
            with pytest.raises(ValueError, match=says): build(network(name), name, granularity, criterion, biases)
            continue
        c = Case(name, granularity, criterion, biases)
        if says := refused_when_measured(m, criterion, biases):
            with pytest.raises((ValueError, NotImplementedError), match=says): c.sp.sparsify_model(50)
            continue
        assert set(c.sp.masks.shapes) - set(c.params) == (set() if biases else held_names(m, granularity, c.net.norm)), criterion
        if criterion in grads: c.train()
        else: set_whole(c.params.values(), 1)
        c.sparsify(29)
        c.train(1)
        if criterion not in grads: set_whole(c.params.values(), 2)
        c.sparsify(57.5)
