"Every layer type × granularity × criterion against loops over indices; then what the other words promise"
import math, re, warnings
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import product

import pytest, torch, torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.prune

from fasterai_clone.sparse.gradients import grasp_scores
from fasterai_clone.sparse.activations import input_norms
from fasterai_clone.sparse.synflow import synflow_scores
from fasterai_clone.sparse.all import *
from fasterai_clone.sparse.measure import synflow
from fasterai_clone.sparse.signal import LayerCollapse
from helpers import exact, naive_keep, shown

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

_lines = dict(channel='i', row='w', column='h', depth='d', horizontal_slice='iw', vertical_slice='ih',
              depth_slice='id', kernel='dhw')
spans  = dict(weight='', shared_weight='o', filter='idhw', layer='oidhw', **_lines,
              **{f'shared_{k}': 'o' + v for k,v in _lines.items()})

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
    """For each target: parameter → the number of the group each element belongs to, groups in the order of their first
    element"""
    names = [k for k,_ in m.named_parameters() if ('bias' in k) == biases]
    if   granularity == 'head': together = [[k for k in names]]
    elif granularity == 'unit':
        together = [[f'weight_ih{e}', f'weight_hh{e}'] for e in dict.fromkeys(k[9:] for k in names)]
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
    return granularity in ('filter', 'layer') and is_conv(m) or granularity in (
        'filter', 'layer', 'row') and isinstance(m, nn.Linear)

def held_names(m, granularity, norm):
    "What is dropped along: the bias and norm of a filter, the biases of heads and hidden units"
    if whole_filters(m, granularity): return {'layer.bias'} | {f'norm.{k}' for k,_ in norm.named_parameters()}
    if granularity not in ('head', 'unit'): return set()
    return {f'layer.{k}' for k,_ in m.named_parameters() if k.startswith(('in_proj_bias', 'bias_'))}


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
    # test_field_reports.py
    assert {k for k in Granularities.available_modules() if not any(issubclass(o, k) for o in kinds)} == {
        nn.Bilinear, nn.RNNCellBase}
    assert set(Granularities.available_granularities()) == {*spans, 'head', 'unit'}
    assert set(available_criterias()) == {*elementwise, *needs, 'random', 'fpgm'} - {'at once'}

def refused_when_built(m, granularity, criterion, biases):
    "What the error has to say, or None; Wanda has to see what a weight is multiplied with"
    seen = not biases and (is_conv(m) or isinstance(m, (nn.Linear, nn.Embedding, nn.MultiheadAttention)))
    if criterion == 'wanda' and not seen: return 'multiplied with cannot be seen'
    if criterion in channels and (biases or not whole_filters(m, granularity)): return 'whole output channels.*Legal: '
    if criterion == 'fpgm' and granularity == 'weight': return 'groups of several weights.*Legal'

def build(net, name, granularity, criterion, biases=False, **kwargs):
    if criterion in needs: kwargs = dict(data=example(name), loss_func=F.cross_entropy, **kwargs)
    if biases: kwargs['params'] = ['*bias*']
    if criterion == 'at once': criterion = at_once
    return Sparsifier(net, granularity, criteria=criterion, layer_type=type(net.layer), include='layer*', **kwargs)

def legal_of(name, biases):
    m = make(name)
    legal = dict.fromkeys(g for k,_ in m.named_parameters() if ('bias' in k) == biases
                          for g in Granularities.allowed_granularities(m, k))
    return [*legal, *(['block_2x2'] if not biases and all(s % 2 == 0 for k,p in m.named_parameters() if p.ndim > 1
                                                          for s in p.shape[:2])
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
    if criterion == 'wanda':
        return {k: p.detach().abs() * v for (k,p),v in zip(params.items(), input_norms(net, params, x).values())}
    if criterion == 'grasp':   return grasp_scores(net, params, (x, y), F.cross_entropy)
    if criterion == 'at once': return synflow_scores(net, params, x)
    net.zero_grad()
    twin = deepcopy(net).eval()  # as it is used: what is measured with `data` is measured so
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
        if self.criterion in elementwise:
            each = {k: elementwise[self.criterion](w[k], self.init[k], self.last[k]) for k in w}
        elif self.criterion == 'fisher':  each = {k: w[k]**2 * self.sums[k] / 2 for k in w}
        elif self.criterion in grads:     each = self.sums
        elif self.criterion in channels:
            s = channel_scores(self.net, example(self.name)[0], self.criterion)
            m = self.net.layer
            axis = 1 if getattr(m, 'transposed', False) else 0
            if axis: s = s.reshape(m.groups, 1, -1).expand(-1, m.in_channels//m.groups, -1).reshape(m.in_channels, -1)
            each = {k: s.reshape(*s.shape, *[1]*(w[k].ndim - s.ndim)) for k in w}
        else: each = measured_scores(self.net, self.name, self.criterion, self.params)
        return [by_group(ids, n, {k: each[f'layer.{k}'] for k in ids}, self.criterion != 'at once')
                for ids,n in self.wanted]

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

@pytest.mark.filterwarnings('ignore::fasterai_clone.sparse.signal.LayerCollapse')
@pytest.mark.parametrize('name, granularity, biases', pairs,
                         ids=lambda v: str(v) if not isinstance(v, bool) else 'bias'*v)
def test_laws_for_every_criterion(name, granularity, biases):
    for criterion in [*available_criterias(), 'at once']:
        m = make(name)
        if says := refused_when_built(m, granularity, criterion, biases):
            with pytest.raises(ValueError, match=says): build(network(name), name, granularity, criterion, biases)
            continue
        c = Case(name, granularity, criterion, biases)
        assert set(c.sp.masks.shapes) - set(c.params) == (set() if biases
                                                          else held_names(m, granularity, c.net.norm)), criterion
        if criterion in grads: c.train()
        else: set_whole(c.params.values(), 1)
        c.sparsify(29)
        c.train(1)
        if criterion not in grads: set_whole(c.params.values(), 2)
        c.sparsify(57.5)


# What is dropped is really gone

def zero_groups(masks, ids, n):
    "How many groups are dropped whole"
    return n - len({i for k,number in ids.items() for i in number[masks[k]].tolist()})

@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('kdim, vdim', [(None, None), (5, 3)])
def test_a_dropped_head_is_no_head(kdim, vdim, bias):
    "Attention by hand, without the heads that are gone"
    B, T, E, H = 2, 4, 12, 4
    d = E//H
    m = nn.MultiheadAttention(E, H, batch_first=True, kdim=kdim, vdim=vdim, bias=bias)
    if bias: nn.init.normal_(m.in_proj_bias)
    q, k, v = torch.randn(B, T, E), torch.randn(B, T, kdim or E), torch.randn(B, T, vdim or E)
    w = [p.detach().clone()
         for p in (m.in_proj_weight.chunk(3) if kdim is None else (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight))]
    b = [p.detach().clone() for p in m.in_proj_bias.chunk(3)] if bias else [0., 0., 0.]
    out, out_bias = m.out_proj.weight.detach().clone(), m.out_proj.bias if bias else 0.
    sp = Sparsifier(m, 'head', layer_type=nn.MultiheadAttention)
    sp.sparsify_model(50)
    lead = m.in_proj_weight if kdim is None else m.q_proj_weight
    gone = [h for h in range(H) if not lead[h*d:(h+1)*d].any()]
    assert len(gone) == 2
    want = torch.zeros(B, T, E) + out_bias
    Q, K, V = (x @ p.T + o for x,p,o in zip((q, k, v), w, b))
    for h in set(range(H)) - set(gone):
        s = slice(h*d, (h+1)*d)
        want = want + (Q[..., s] @ K[..., s].transpose(1, 2) / math.sqrt(d)).softmax(-1) @ V[..., s] @ out[:, s].T
    assert torch.allclose(m(q, k, v)[0], want, atol=1e-5)

@pytest.mark.parametrize('name', ['lstm', 'bilstm', 'gru', 'bigru', 'rnn', 'nobias', 'tanh'])
def test_a_dropped_unit_puts_out_zero(name):
    torch.manual_seed(0)
    m = nn.RNN(3, 4, 2, batch_first=True) if name == 'tanh' else make(name)
    for k,p in m.named_parameters(): nn.init.normal_(p)
    sp, x = Sparsifier(m, 'unit', layer_type=type(m)), torch.randn(2, 9, m.input_size)
    sp.sparsify_model(50)
    last, H = m.num_layers - 1, m.hidden_size
    gates = m.weight_ih_l0.shape[0] // H
    for direction,end in enumerate(['', '_reverse'][:1 + m.bidirectional]):
        gone = [u for u in range(H) if not getattr(m, f'weight_ih_l{last}{end}')[u::H].any()]
        assert len(gone) == H//2
        for u in gone:
            if m.bias:
                assert not getattr(m, f'bias_ih_l{last}{end}')[u::H].any()
                assert not getattr(m, f'bias_hh_l{last}{end}')[u::H].any()
            assert not m(x)[0][..., direction*H + u].any()
    assert (m(x)[0] != 0).any() and gates == dict(LSTM=4, GRU=3).get(type(m).__name__, 1)

def test_a_dropped_unit_with_a_projection_changes_nothing():
    "What it keeps in the cell is zero, so its column of the projection meets zeros"
    m, x = make('projected'), torch.randn(2, 5, 3)
    Sparsifier(m, 'unit', layer_type=nn.LSTM).sparsify_model(50)
    gone, out = [u for u in range(4) if not m.weight_ih_l0[u::4].any()], m(x)[0]
    assert len(gone) == 2 and not m(x)[1][1][..., gone].any()
    with torch.no_grad(): m.weight_hr_l0[:, gone] = 9.
    assert torch.equal(m(x)[0], out)

followed = dict(
    batch   = lambda: (nn.Conv2d(3, 6, 3),                  nn.BatchNorm2d(6)),
    group   = lambda: (nn.Conv2d(3, 6, 3),                  nn.GroupNorm(2, 6)),
    one     = lambda: (nn.Conv2d(3, 6, 3),                  nn.GroupNorm(1, 6)),
    inst    = lambda: (nn.Conv2d(3, 6, 3),                  nn.InstanceNorm2d(6, affine=True)),
    grouped = lambda: (nn.Conv2d(3, 6, 3, groups=3),        nn.BatchNorm2d(6)),
    trans   = lambda: (nn.ConvTranspose2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)),
    layer   = lambda: (nn.Linear(8, 6),                     nn.LayerNorm(6)))

@pytest.mark.parametrize('name', followed)
def test_a_dropped_filter_puts_out_zero(name):
    layer, norm = followed[name]()
    body = nn.Sequential(layer, norm, nn.SiLU())
    x    = torch.randn(8, 3, 8, 8)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    net  = nn.Sequential(body, nn.AdaptiveAvgPool2d(1) if name != 'layer' else nn.Identity(), nn.Flatten(),
                         nn.LazyLinear(3))
    net(x)
    sp = Sparsifier(net, 'filter', layer_type=type(layer), include='0.0')
    sp.sparsify_model(50)
    gone = (~sp.masks['0.1.bias']).nonzero().flatten().tolist()
    assert len(gone) == 3 and not sp.report().why_not
    axis = -1 if name == 'layer' else 1
    def check():
        for mode in (True, False):
            out = body.train(mode)(x).movedim(axis, 0)
            assert all(bool(out[c].any()) != (c in gone) for c in range(6))
    check()
    opt = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    with sp.hold(opt):
        for _ in range(4):
            opt.zero_grad()
            F.cross_entropy(net.train()(x), torch.arange(8) % 3).backward()
            opt.step()
            check()


# Contexts: how many go, in all and of each

def mlp(seed=0, sizes=(12, 10, 8, 5)):
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(a, b) for a,b in zip(sizes, sizes[1:])])

def convnet(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 9, 3, groups=3, stride=2), nn.ReLU(),
                         nn.Conv2d(9, 4, (1, 2)))

every = dict(layer_type=(nn.Linear, nn.Conv2d))

def gone(sp):
    "Groups dropped of each target, counted in the masks"
    return [t.groups.n - int(t.groups.reduce(sp.masks[t.name], torch.any).count_nonzero()) for t in sp.targets]

@pytest.mark.parametrize('sparsities', [(1, 29, 57.5, 99), (7, 50, 90.5, 100)])
@pytest.mark.parametrize('granularity', ['weight', 'filter', 'row'])
@pytest.mark.parametrize('context', ['local', 'global', 'lamp', 'erk', 'output'])
@pytest.mark.parametrize('make', [mlp, convnet])
@pytest.mark.filterwarnings('ignore::fasterai_clone.sparse.signal.LayerCollapse')
def test_totals_are_exact(make, context, granularity, sparsities):
    if context == 'output' and granularity != 'weight': return
    sp = Sparsifier(make(), granularity, context, **every)
    sizes, old = [t.groups.n for t in sp.targets], {}
    for s in sparsities:
        with torch.no_grad():
            for p in sp.model.parameters(): p.add_(torch.randn_like(p) * 0.1)
        sp.sparsify_model(s)
        if   context == 'local':  assert gone(sp) == [exact(n, s) for n in sizes]
        elif context == 'output':  # the weights of each output by themselves
            for t in sp.targets:
                assert {int((~r).sum()) for r in sp.masks[t.name].flatten(1)} == {exact(t.weight[0].numel(), s)}
        else: assert sum(gone(sp)) == exact(sum(sizes), s)
        for k,m in sp.masks.items(): assert not (m & ~old.get(k, m)).any() and not sp.model.get_parameter(k)[~m].any()
        old = {k: m.clone() for k,m in sp.masks.items()}

def test_each_output_of_a_grouped_convolution_is_compared_by_itself():
    m = nn.Conv2d(4, 6, 3, groups=2)
    w = m.weight.detach().clone()
    Sparsifier(m, context='output').sparsify_model(50)
    for before,after in zip(w.flatten(1), m.weight.flatten(1)):
        assert torch.equal(after != 0, naive_keep(before.abs(), 9))

def test_outputs_of_a_transposed_convolution():
    m = nn.ConvTranspose2d(4, 6, 3)
    w = m.weight.detach().clone()
    Sparsifier(m, context='output', layer_type=nn.ConvTranspose2d).sparsify_model(50)
    for o in range(6): assert torch.equal(m.weight[:, o] != 0, naive_keep(w[:, o].abs(), 18))
    # one index along an axis is an output of each part
    with pytest.raises(ValueError, match='context=.output.*grouped'):
        Sparsifier(nn.ConvTranspose2d(4, 6, 3, groups=2), context='output', layer_type=nn.ConvTranspose2d)

def test_a_number_of_groups_is_one_that_each_output_can_give():
    sp = Sparsifier(nn.Linear(3, 5), context='output', layer_type=nn.Linear)
    with pytest.raises(ValueError, match='`n`.*count groups.*context='): sp.sparsify_model(n=7)

@pytest.mark.parametrize('context', ['lamp', 'local'])
def test_lamp_takes_scores_from_zero(context):
    def f(): return Sparsifier(mlp(), 'weight', context, 'small_final', layer_type=nn.Linear)
    if context == 'local': return f().sparsify_model(50)
    with pytest.raises(ValueError, match='LAMP.*at least 0'): f()


# Limits

@pytest.mark.parametrize('context', ['global', 'lamp', 'erk'])
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_limits_hold_all_the_way(context, granularity):
    net = mlp(sizes=(10, 20, 20, 20))
    with torch.no_grad(): net[0].weight.mul_(100), net[1].weight.div_(100)
    sp  = Sparsifier(net, granularity, context, layer_type=nn.Linear, min_sparsity={'0': 20, '2': 10},
                     max_sparsity={'1': 60, '*': 90})
    sizes, old = [t.groups.n for t in sp.targets], {}
    for s in (5, 12, 20, 33, 50, 75):
        with torch.no_grad():
            for p in net.parameters(): p.add_(torch.randn_like(p) * p.std() / 4)
        sp.update(sp.counts_at([s]*3))  # as a schedule goes through them
        got = gone(sp)
        assert sum(got) == exact(sum(sizes), s), s
        if s >= 20:
            assert all(math.ceil(n*lo/100) <= k <= n*hi/100
                       for n,k,lo,hi in zip(sizes, got, (20, 0, 10), (90, 60, 90))), s
        for k,m in sp.masks.items():
            assert not (m & ~old.get(k, m)).any() and not net.get_parameter(k)[~m].any(), (s, k)
        old = {k: m.clone() for k,m in sp.masks.items()}

def test_limits_refuse_what_cannot_be():
    sp = Sparsifier(mlp(), 'weight', 'global', layer_type=nn.Linear, min_sparsity=30, max_sparsity=60)
    for s in (10, 75):
        with pytest.raises(ValueError, match='allow 72 to 144.*30.*60'): sp.sparsify_model(s)
    for context in ('local', 'output'):
        with pytest.raises(ValueError, match='`min_sparsity` and `max_sparsity`.*global'):
            Sparsifier(mlp(), 'weight', context, min_sparsity=3, **every)
    with pytest.raises(ValueError, match='Did you mean .2'):
        Sparsifier(mlp(), 'weight', 'global', min_sparsity={'22': 3}, **every)


# Budgets

def naive_budget(layers, s, costs):
    "Scores of each layer's groups: the lowest of all go while their costs are within `s` percent"
    order = sorted((v, l, i) for l,scores in enumerate(layers) for i,v in enumerate(scores))
    left, out = s/100 * sum(len(x)*c for x,c in zip(layers, costs)), [0]*len(layers)
    for _,l,i in order:
        if costs[l] > left + 1e-9: break
        left -= costs[l]
        out[l] += 1
    return out

@pytest.mark.parametrize('s', [10, 37.5, 60, 92])
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
@pytest.mark.parametrize('budget', ['params', 'flops'])
def test_budgets_are_those_of_a_loop(budget, granularity, s):
    net, x = convnet(), torch.randn(2, 3, 8, 8)
    sp = Sparsifier(net, granularity, 'global', budget=budget, example_inputs=x, **every)
    shapes, pixels = [net[i].weight.shape for i in (0, 2, 4)], (8*8, 3*3, 3*2)
    size   = [1 if granularity == 'weight' else math.prod(w[1:]) for w in shapes]
    costs  = [k * (p if budget == 'flops' else 1) for k,p in zip(size, pixels)]
    scores = [net[i].weight.detach().abs() for i in (0, 2, 4)]
    scores = [v.flatten(1).mean(1) if granularity == 'filter' else v.flatten() for v in scores]
    want   = naive_budget([v.tolist() for v in scores], s, costs)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', LayerCollapse)
        sp.sparsify_model(s)
    assert gone(sp) == want and sp.costs == costs
    spent, total = sum(g*c for g,c in zip(gone(sp), costs)), sum(len(v)*c for v,c in zip(scores, costs))
    assert total*s/100 - max(costs) < spent <= total*s/100

class Tagger(nn.Module):
    def __init__(self, cell=nn.LSTM):
        super().__init__()
        self.embed, self.cell, self.out = nn.Embedding(6, 4), cell(4, 5, batch_first=True), nn.Linear(5, 8)
        with torch.no_grad(): self.out.weight.add_(100)
    def forward(self, x): return self.out(self.cell(self.embed(x))[0])

@pytest.mark.parametrize('cell', [nn.LSTM, nn.GRU, nn.RNN])
def test_what_costs_nothing_is_not_sold(cell):
    "Looking up a row is no multiplication: it would be free to drop, even at 0 %"
    x = torch.randint(0, 6, (2, 3))
    with pytest.raises(ValueError, match='embed.*no multiply-adds.*exclude'):
        Sparsifier(Tagger(cell), 'weight', 'global', layer_type=nn.Module, budget='flops', example_inputs=x)
    sp = Sparsifier(Tagger(cell), context='global', layer_type=nn.Module, exclude='embed', budget='flops',
                    example_inputs=x)
    sp.sparsify_model(0)
    assert sp.sparsity == 0

def test_budgets_need_layers_that_share():
    for context in ('local', 'erk', 'output'):
        with pytest.raises(ValueError, match='`budget`.*global.*lamp'):
            Sparsifier(mlp(), 'weight', context, budget='params', **every)
    with pytest.raises(ValueError, match='example_inputs'):
        Sparsifier(mlp(), 'weight', 'global', budget='flops', **every)
    with pytest.raises(ValueError, match="'flops'"):
        Sparsifier(mlp(), 'weight', 'global', budget='flop', **every)


# n:m patterns

patterned = dict(linear=(lambda: nn.Linear(24, 5), {'weight': 1}), conv=(lambda: nn.Conv2d(24, 4, 3), {'weight': 1}),
                 trans=(lambda: nn.ConvTranspose2d(24, 4, 3), {'weight': 0}),
                 grouped=(lambda: nn.Conv2d(48, 4, 3, groups=2), {'weight': 1}),
                 attention=(lambda: nn.MultiheadAttention(24, 3), {'in_proj_weight': 1, 'out_proj.weight': 1}),
                 separate=(lambda: nn.MultiheadAttention(24, 3, kdim=48, vdim=72),
                           dict.fromkeys(['q_proj_weight', 'k_proj_weight', 'v_proj_weight', 'out_proj.weight'], 1)),
                 lstm=(lambda: nn.LSTM(48, 24), {'weight_ih_l0': 1, 'weight_hh_l0': 1}))

@pytest.mark.parametrize('nm', [(1, 2), (2, 4), (4, 8), (1, 3), True])
@pytest.mark.parametrize('name', patterned)
def test_patterns_along_the_inputs(name, nm):
    f, axes = patterned[name]
    m = f()
    before, (n, k) = {o: m.get_parameter(o).detach().clone() for o in axes}, (2, 4) if nm is True else nm
    sp = Sparsifier(m, nm=nm, layer_type=type(m))
    sp.sparsify_model(30)
    assert [int((~v).sum()) for v in sp.masks.values()] == [exact(v.numel(), 30) for v in sp.masks.values()]
    sp.sparsify_model(100*(k-n)/k)
    assert sp.masks.keys() == axes.keys()
    for o,axis in axes.items():
        kept, w = (t.movedim(axis, -1).reshape(-1, k) for t in (sp.masks[o], before[o].abs()))
        for a,b in zip(kept, w): assert torch.equal(a, naive_keep(b, k-n))

def test_patterns_stay_inside_a_part_of_a_grouped_convolution():
    "Four inputs of one output, not two each of two"
    for m in (nn.Conv2d(8, 8, 3, groups=4), nn.ConvTranspose2d(8, 8, 3, groups=4)):
        with pytest.raises(ValueError, match='2 inputs.*multiple of 4'): Sparsifier(m, nm=True, layer_type=type(m))
    m = nn.ConvTranspose2d(8, 8, 3, groups=2)
    sp = Sparsifier(m, nm=True, layer_type=nn.ConvTranspose2d)
    sp.sparsify_model(50)
    assert (sp.masks['weight'].movedim(0, -1).reshape(-1, 4).sum(1) == 2).all()


# Which layers

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
    def forward(self, x): return self.head(self.body(self.embed(x)))

@pytest.mark.parametrize('granularity', ['weight', 'row', 'column'])
def test_tied_weights_are_counted_once(granularity):
    net = Tied()
    sp  = Sparsifier(net, granularity, 'global', layer_type=nn.Module)
    assert [t.name for t in sp.targets] == ['embed.weight', 'body.weight']
    sp.sparsify_model(50)
    n = dict(weight=56, row=14, column=8)[granularity]
    assert sum(gone(sp)) == n//2 and net.head.weight is net.embed.weight
    assert torch.equal(net.head.weight == 0, ~sp.masks['embed.weight'])
    assert sp.report().total == 40 + 16 + 4
    only = Sparsifier(Tied(), granularity, layer_type=nn.Linear)
    assert [t.name for t in only.targets] == ['body.weight', 'head.weight']

def two_blocks():
    torch.manual_seed(0)
    def mlp(): return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    def block(): return nn.ModuleDict(dict(attn=nn.MultiheadAttention(4, 2), mlp=mlp()))
    return nn.ModuleDict(dict(stem=nn.Conv2d(3, 4, 3), blocks=nn.ModuleList([block(), block()]), head=nn.Linear(4, 2)))

mlps = ['blocks.0.mlp.0', 'blocks.0.mlp.2', 'blocks.1.mlp.0', 'blocks.1.mlp.2']
def is_narrow(name, m): return isinstance(m, nn.Linear) and m.in_features == 4

@pytest.mark.parametrize('kwargs, want', [
    (dict(include='head'),                             ['head.weight']),
    (dict(include='head.weight'),                      ['head.weight']),
    (dict(include='*.mlp.*', layer_type=nn.Linear),    [f'{k}.weight' for k in mlps]),
    (dict(include=['*.0.mlp.0', 'stem']),              ['stem.weight', 'blocks.0.mlp.0.weight']),
    (dict(include=re.compile(r'blocks\.\d\.mlp\.0$'), layer_type=nn.Linear),
     ['blocks.0.mlp.0.weight', 'blocks.1.mlp.0.weight']),
    (dict(include=nn.Conv2d),                          ['stem.weight']),
    (dict(include=is_narrow, exclude='*.out_proj*'),   ['blocks.0.mlp.0.weight', 'blocks.1.mlp.0.weight',
                                                        'head.weight']),
    (dict(include=[nn.Conv2d, 'head']),                ['stem.weight', 'head.weight']),
    (dict(include=nn.MultiheadAttention, exclude='*.out_proj.weight'),
     ['blocks.0.attn.in_proj_weight', 'blocks.1.attn.in_proj_weight']),
    (dict(exclude=['blocks.*', nn.Conv2d]),            ['head.weight']),
    (dict(layer_type='Conv2d'),                        ['stem.weight']),
    (dict(layer_type=('Conv2d', nn.Linear), exclude=re.compile('blocks')), ['stem.weight', 'head.weight'])], ids=shown)
def test_layers_are_chosen(kwargs, want):
    sp = Sparsifier(two_blocks(), **{'layer_type': nn.Module, **kwargs})
    assert [t.name for t in sp.targets if not t.name.endswith('attn.out_proj.weight') or t.name in want] == want

@pytest.mark.parametrize('kwargs, error, says', [
    (dict(include='heat'),              ValueError, "`include` 'heat'. Did you mean 'head'"),
    (dict(exclude='blocks.0.mpl.0'),    ValueError, "`exclude` 'blocks.0.mpl.0'. Did you mean 'blocks.0.mlp.0'"),
    (dict(include=re.compile('^zzz')),  ValueError, "`include` '^zzz'"),
    (dict(include=nn.LSTM),             ValueError, "`include` 'LSTM'"),
    (dict(include=5),                   TypeError,  '`include` takes layer names'),
    (dict(exclude=['head', 5]),         TypeError,  '`exclude` takes layer names'),
    (dict(exclude='*'),                 ValueError, '`include` and `exclude` select no layer'),
    (dict(layer_type=nn.LSTM),          ValueError, 'no layer of type LSTM. Layers with weights it has: Conv2d (1)'),
    (dict(layer_type='linear'),         ValueError, 'no layer of type linear'),
    (dict(layer_type=5),                TypeError,  '`layer_type` must be a type')], ids=str)
def test_layers_that_are_not_there(kwargs, error, says):
    with pytest.raises(error, match=re.escape(says)): Sparsifier(two_blocks(), **{'layer_type': nn.Module, **kwargs})

def test_a_module_is_no_pattern():
    "It is callable like a function of (name, module)"
    net = two_blocks()
    with pytest.raises(TypeError, match='`include` takes layer names.*part'): Sparsifier(net, include=net['stem'])
    assert [t.name for t in Sparsifier(net, layer_type=nn.Linear, part=net['blocks'][1]).targets][-2:] == [
        f"{k}.weight" for k in mlps[2:]]


# Amounts

def test_amounts_count_groups():
    sp = Sparsifier(mlp(), 'row', layer_type=nn.Linear)           # 10, 8, 5 rows
    sp.sparsify_model(n=2)
    assert gone(sp) == [2, 2, 2]
    sp.sparsify_model(n=[3, 1, 0], relative=True)
    assert gone(sp) == [5, 3, 2]
    sp.sparsify_model(40, relative=True)                          # of 5, 5, 3 left: 2, 2, round(1.2)
    assert gone(sp) == [7, 5, 3]
    sp.sparsify_layer('1', n=7)
    sp.sparsify_layer('0', 100/3, relative=True)
    assert gone(sp) == [8, 7, 3]
    sp = Sparsifier(mlp(), 'row', 'global', layer_type=nn.Linear)
    sp.sparsify_model(n=4)
    sp.sparsify_model(n=4, relative=True)
    assert sum(gone(sp)) == 8
    sp.sparsify_model(20, relative=True)                          # of 15
    assert sum(gone(sp)) == 11

@pytest.mark.parametrize('kwargs, says', [
    (dict(n=6), 'has 5 groups, and 6'), (dict(n=-1), '`n`'), (dict(n=1.5), '`n`'), (dict(n=True), '`n`'),
    (dict(n=[1, 2]), 'each of 3'),
    (dict(), 'Give either'), (dict(sparsity=5, n=5), 'Give either'), (dict(n=3, round_to=4), '`round_to`'),
    (dict(sparsity=50, relative=True, round_to=4), '`round_to`')], ids=str)
def test_amounts_that_make_no_sense(kwargs, says):
    sp = Sparsifier(mlp(), 'row', layer_type=nn.Linear)
    with pytest.raises(ValueError, match=says): sp.sparsify_model(**kwargs)
    assert not sp.masks
    if kwargs.get('n') != [1, 2]:
        with pytest.raises(ValueError): sp.sparsify_layer('2', **kwargs)

@pytest.mark.parametrize('kwargs', [dict(context='erk'), dict(context='lamp', budget='params')], ids=str)
def test_amounts_need_layers_that_count(kwargs):
    sp = Sparsifier(mlp(), 'row', layer_type=nn.Linear, **kwargs)
    for amount in (dict(n=3), dict(sparsity=10, relative=True)):
        with pytest.raises(ValueError, match='`n` and `relative`'): sp.sparsify_model(**amount)

def test_is_pruned():
    net = two_blocks()
    sp  = Sparsifier(net, 'filter', layer_type=nn.Linear, include='*.mlp.*')
    for k in (None, net, 'head', 'blocks.0.mlp.0', 'blocks.0.mlp.0.weight', 'blocks.0.mlp.0.bias', 'head.bias'):
        assert not sp.is_pruned(k)
    sp.sparsify_layer('blocks.0.mlp.0', 50)
    for k in (None, net, net['blocks'], 'blocks.0', 'blocks.0.mlp.0', 'blocks.0.mlp.0.weight', 'blocks.0.mlp.0.bias'):
        assert sp.is_pruned(k), k
    for k in ('head', 'head.weight', 'head.bias', net['stem'], 'blocks.1', 'blocks.0.mlp.2', 'blocks.0.mlp.2.bias'):
        assert not sp.is_pruned(k), k
    with pytest.raises(ValueError, match="Did you mean 'head'"): sp.is_pruned('heat')
    with pytest.raises(TypeError, match='5'): sp.is_pruned(5)
    tied = Sparsifier(Tied(), layer_type=nn.Module)
    tied.sparsify_model(50)
    assert tied.is_pruned('head') and tied.is_pruned('head.weight') and tied.is_pruned(tied.model.head)


# Collapse

def warned(f):
    "What `f` warns of"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        f()
    return [str(w.message) for w in seen if issubclass(w.category, LayerCollapse)]

def test_a_layer_of_which_nothing_is_left():
    assert warned(lambda: Sparsifier(mlp(), layer_type=nn.Linear).sparsify_model(99)) == []
    assert warned(lambda: Sparsifier(mlp(), layer_type=nn.Linear).sparsify_model([50, 100, 0])) == \
        ['Layer collapse: no weight is left in 1, so nothing gets through']
    net = mlp()
    with torch.no_grad(): net[1].weight.div_(1000)
    for granularity in ('weight', 'row', 'filter'):
        said = warned(lambda: Sparsifier(deepcopy(net), granularity, 'global', layer_type=nn.Linear).sparsify_model(60))
        assert len(said) == 1 and 'no weight is left in 1,' in said[0], granularity
    assert warned(lambda: Sparsifier(deepcopy(net), 'weight', 'lamp', layer_type=nn.Linear).sparsify_model(60)) == []

def test_a_path_of_which_nothing_is_left():
    "Something is left in each layer, but what one puts out the next does not take"
    def build(**kwargs):
        net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        net[0].weight.data, net[1].weight.data = torch.tensor([[1., 1], [9, 9]]), torch.tensor([[9., 1], [9, 1]])
        return Sparsifier(net, layer_type=nn.Linear, **kwargs)
    said = warned(lambda: build(example_inputs=torch.randn(1, 2)).sparsify_model(50))
    assert len(said) == 1 and 'no path is left through 0, 1' in said[0]
    assert warned(lambda: build().sparsify_model(50)) == []
    assert warned(lambda: build(example_inputs=torch.randn(1, 2)).sparsify_model(25)) == []


# Wrapped models

def bn_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

@pytest.mark.parametrize('wrap', [torch.compile, nn.DataParallel, lambda m: torch.compile(nn.DataParallel(m)),
                                  lambda m: nn.DataParallel(torch.compile(m))],
                         ids=['compile', 'parallel', 'both', 'both2'])
@pytest.mark.parametrize('criterion', ['large_final', 'snip', 'gradient'])
def test_wrapped_models_have_plain_names(wrap, criterion):
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4) % 2
    def build(m): return Sparsifier(m, 'filter', criteria=criterion, data=(x, y), loss_func=F.cross_entropy)
    plain, sp = build(bn_net()), build(wrap(bn_net()))
    for o in (plain, sp): o.sparsify_model(50)
    assert list(sp.masks) == list(plain.masks) == ['0.weight', '0.bias', '1.weight', '1.bias', '3.weight', '3.bias']
    assert all(torch.equal(sp.masks[k], m) for k,m in plain.masks.items()) and str(sp.report()) == str(plain.report())
    assert sp.is_pruned('0') and [t.layer for t in Sparsifier(wrap(bn_net()), include='3').targets] == ['3']

@pytest.mark.parametrize('criterion', ['large_final', 'snip', 'bn_scale'])
def test_a_compiled_part_has_plain_names(criterion):
    "Where only a part is compiled, as `net.body = torch.compile(net.body)` does"
    def whole(wrap): return nn.Sequential(wrap(bn_net()[:3]), bn_net()[3:])
    x, y, masks = torch.randn(4, 3, 8, 8), torch.arange(4) % 2, []
    for wrap in (lambda m: m, torch.compile):
        sp = Sparsifier(whole(wrap), 'filter', criteria=criterion, include='0.0', data=(x, y),
                        loss_func=F.cross_entropy)
        sp.sparsify_model(50)
        masks.append(dict(sp.masks))
    assert list(masks[0]) == list(masks[1]) == ['0.0.weight', '0.0.bias', '0.1.weight', '0.1.bias']
    assert all(torch.equal(masks[0][k], masks[1][k]) for k in masks[0])


# Weights that are computed from others

def normed_projection():
    m = nn.MultiheadAttention(8, 2)
    nn.utils.parametrizations.weight_norm(m.out_proj)
    return m

old_norm, new_norm = nn.utils.weight_norm, nn.utils.parametrizations.weight_norm
computed = dict(
    old=lambda: old_norm(nn.Conv2d(3, 4, 3)), new=lambda: new_norm(nn.Conv2d(3, 4, 3)),
    linear=lambda: old_norm(nn.Linear(3, 4)),
    lstm=lambda: old_norm(nn.LSTM(3, 4), 'weight_hh_l0'), lstm_new=lambda: new_norm(nn.LSTM(3, 4), 'weight_hh_l0'),
    attention=lambda: new_norm(nn.MultiheadAttention(8, 2), 'in_proj_weight'), projection=normed_projection,
    spectral=lambda: nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)),
    spectral_new=lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)))

@pytest.mark.filterwarnings('ignore:.*weight_norm.*:FutureWarning')
@pytest.mark.parametrize('granularity', ['weight', 'head', 'unit', 'filter'])
@pytest.mark.parametrize('name', computed)
def test_computed_weights_are_refused_with_what_to_do(name, granularity):
    net  = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(3, 4), computed[name]())
    kind = next(k for k in (nn.Conv2d, nn.Linear, nn.LSTM, nn.MultiheadAttention)
                if any(isinstance(m, k) for m in net[2].modules()))
    if name in ('projection', 'attention'): kind = nn.MultiheadAttention
    if granularity not in {**Granularities.allowed_granularities(kind), 'weight': ()}: return
    with pytest.raises(ValueError, match='computed by a parametrization or hook.*remove.*exclude'):
        Sparsifier(net, granularity, layer_type=kind, include='2*')

def test_pruned_by_torch_is_said_so():
    m = nn.utils.prune.l1_unstructured(nn.Conv2d(3, 4, 3), 'weight', 0.5)
    with pytest.raises(ValueError, match='torch.nn.utils.prune.*from_torch_prune'): Sparsifier(m)


# Small things

def test_axes_of_a_filter_hold_what_a_filter_holds():
    for m in (nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2)):
        for granularity in ((1, 2, 3), 'filter'):
            assert [p.name for p in Sparsifier(m, granularity).targets[0].held] == ['bias']

def test_a_single_weight_is_no_filter():
    assert not Sparsifier(nn.Linear(1, 1), layer_type=nn.Linear).targets[0].held

def test_gradients_are_taken_anew_for_each_update():
    "As everything else that `data` is for"
    m, (x, y) = nn.Linear(3, 2, bias=False), (torch.randn(4, 3), torch.randn(4, 2))
    sp = Sparsifier(m, criteria='gradient', layer_type=nn.Linear, data=(x, y), loss_func=F.mse_loss)
    sp.sparsify_model(20)
    with torch.no_grad(): m.weight.copy_(torch.randn(2, 3)).mul_(sp.masks['weight'])
    want = (m.weight * torch.autograd.grad(F.mse_loss(m(x), y), m.weight)[0]).abs().detach()
    old  = sp.masks['weight'].clone()
    sp.sparsify_model(50)
    assert torch.equal(sp.masks['weight'], naive_keep(want.masked_fill(~old, -1.), 3))

def test_blocks_of_a_bias_are_refused_by_its_name():
    with pytest.raises(ValueError, match='bias of Linear'):
        Sparsifier(nn.Linear(4, 4), 'block_2x2', layer_type=nn.Linear, params=['weight', 'bias'])

class Two(nn.Module):
    "A model of two arguments"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(3, 4), nn.Linear(5, 4), nn.LayerNorm(4)
        for m in (self.a, self.b): m.weight.data[:2] /= 99  # the same ones go: others would leave no path
    def forward(self, x, y): return self.norm(self.a(x)) * self.b(y)

@pytest.mark.parametrize('criterion', ['large_final', 'synflow'])
@pytest.mark.parametrize('give', [lambda x, y: (x, y), lambda x, y: [x, y], lambda x, y: dict(y=y, x=x),
                                  lambda x, y: lambda: (x, y)],
                         ids=['tuple', 'list', 'by name', 'function'])
def test_example_inputs_are_arguments(give, criterion):
    torch.manual_seed(0)
    sp = Sparsifier(Two(), 'filter', criteria=criterion, layer_type=nn.Linear,
                    example_inputs=give(torch.randn(2, 3), torch.randn(2, 5)))
    assert warned(lambda: sp.sparsify_model(50)) == [] and gone(sp) == [2, 2] and 'norm.weight' in sp.masks
    assert 'no weight is left' in warned(lambda: sp.sparsify_layer('a', 100))[0]
    said = warned(lambda: sp.sparsify_model([100, 50]))
    assert len(said) == 2 and 'no path is left through a' in said[1]
