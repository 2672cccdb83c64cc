"""Any arguments at all: either they work exactly, or they are refused before the first batch by a message that names
one of them

Arguments are drawn as source text, so that what fails prints as a call that can be pasted. What is expected is computed
here, from the definitions, and not by the library."""
import copy, inspect, io, math, re, types
from collections import Counter
from contextlib import redirect_stdout
from fnmatch import fnmatchcase
from fractions import Fraction
from decimal import Decimal   # noqa: F401  cases are code, which names it
from functools import partial
from pathlib import Path      # noqa: F401

import numpy as np, pytest, torch, torch.nn as nn
from fastai.basics import Adam, Callback, DataLoaders, Learner, SGD
from fastai.callback.core import CancelFitException
from fastai.callback.schedule import SchedCos  # noqa: F401
from fastai.metrics import accuracy  # noqa: F401
from hypothesis import given, settings, strategies as st

from fasterai_clone.core.all import *
from fasterai_clone.sparse.measure import *
from fasterai_clone.sparse.all import *

pytestmark = pytest.mark.filterwarnings('ignore:The paths through the model could not')

# A network of 176 weights, and three batches

CASES, HOLDS = 1100, 1000  # cases of each of the two tests
N_EPOCH, N_ITER = 2, 3

def _network():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(2, 4, (2, 3)), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, (3, 2)),
                             nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4))

_net = _network()
def network(): return copy.deepcopy(_net)

_layers = {'0': nn.Conv2d, '3': nn.Conv2d, '7': nn.Linear}
_places = {'0': 9, '3': 2, '7': 1}  # where each weight is used in one example: positions of the output

def _data():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return [(torch.randn(4, 2, 4, 5), torch.randint(0, 4, (4,))) for _ in range(N_ITER)]

BATCHES = _data()

class Batches:
    "As much of a loader as fastai needs"
    device, rng = torch.device('cpu'), None
    def __init__(self, batches): self.batches = self.dataset = batches
    def __len__ (self): return len(self.batches)
    def __iter__(self): return iter(self.batches)
    def one_batch(self): return self.batches[0]

def scores(seed=3):
    g = torch.Generator().manual_seed(seed)
    return {k: torch.rand(p.shape, generator=g) for k,p in network().named_parameters()
            if k in ('0.weight', '3.weight', '7.weight')}

def only(*names): return {k: v for k,v in scores().items() if k in names}
def l1(w): return w.abs()
def nan_scores(w): return w * math.nan
def one_score (w): return w.abs().sum()
def is_conv(name, module): return isinstance(module, nn.Conv2d)
def one_argument(name): return True
def slow(start, end, pos): return start + (end - start) * pos**2
def up_down(pos): return 1 - abs(2*pos - 1)
def too_far(pos): return 2*pos

# What can be passed, as source text

COMMON = ['None', 'True', 'False', '0', '1', '-1', '2', '0.5', '1.5', '50', '101', '10**400', '1e300', 'math.nan',
          'math.inf', '-math.inf', '1j',
          'np.float32(50)', 'np.float64(2)', 'np.int64(2)', 'np.bool_(True)', 'np.array(50)', 'np.array([50, 60])',
          'torch.tensor(2)',
          'torch.tensor([50., 60.])', 'Fraction(1, 3)', 'Fraction(50)', "Decimal('50')", "''", "'weight'", "'local'",
          "'yes'", "'2'", "b'2'", '()',
          '[]', '{}', 'set()', '[None]', '[50]', '(1, 2)', '[[1]]', "{'0': 50}", "{'x': 50}", '{3: 50}', '{None: None}',
          'object()', 'lambda: 0', 'print',
          'nn.Conv2d', 'nn.Linear', 'nn.Linear(2, 2)', 'Path()', 'range(2)', "re.compile('0')", 'slice(2)',
          'iter([50, 50])', 'float', '...']

GRANULARITIES = ['weight', 'row', 'column', 'channel', 'kernel', 'vertical_slice', 'horizontal_slice', 'filter',
                 'layer', 'shared_weight',
                 'shared_row', 'shared_column', 'shared_channel', 'shared_kernel', 'shared_vertical_slice',
                 'shared_horizontal_slice']
BLOCKS = ['block_2', 'block_2x2', 'block_1x2', 'block_4x1', 'block_2x1x1x1', 'block_1x1x1x1']
CRITERIA = ['random', 'large_final', 'small_final', 'squared_final', 'large_init', 'small_init',
            'large_init_large_final',
            'small_init_small_final', 'magnitude_increase', 'movement', 'movmag', 'updating_magnitude_increase',
            'updating_movement',
            'updating_movmag', 'gradient', 'grad_crit', 'fisher', 'sanh_movement', 'fpgm', 'wanda', 'snip', 'grasp',
            'synflow', 'apoz', 'mean_activation', 'bn_scale']

def _shot(p): return 1
def _steps(k): return lambda p: math.ceil(round(p*k, 9)) / k
def _cosine(p): return (1 - math.cos(math.pi*p)) / 2
def _logistic(p): return (1 + math.exp(-8)) / (1 + math.exp(6 - 14*p))
def _there_and_back(p): return _cosine(2*p) if p < .5 else 1 - _cosine(2*p - 1)

# source → progress as a function of position, share of training after which it starts, after which it ends, first
# sparsity
SCHEDULES = {
    "'one_shot'": (_shot, .5, 1, 0), 'one_shot': (_shot, .5, 1, 0), "'iterative'": (_steps(3), .2, 1, 0),
    'partial(iterative, n_steps=5)': (_steps(5), .2, 1, 0), 'iterative(n_steps=2, start_pct=0)': (_steps(2), 0, 1, 0),
    "'agp'": (lambda p: 1 - (1 - p)**3, .2, 1, 0), "'one_cycle'": (_logistic, 0, 1, 0), "'cos'": (_cosine, 0, 1, 0),
    "'constant'": (_shot, 0, 1, 0), "'lin'": (lambda p: p, 0, 1, 0), 'lin': (lambda p: p, 0, 1, 0),
    "'dsd'": (_there_and_back, 0, 1, 0),
    'slow': (lambda p: p*p, 0, 1, 0),
    'SchedCos(0, 1)': (_cosine, 0, 1, 0), 'lambda pos: pos': (lambda p: p, 0, 1, 0),
    'up_down': (lambda p: 1 - abs(2*p - 1), 0, 1, 0),
    'lambda start, end, pos: end': (_shot, 0, 1, 0), 'Schedule(slow, .25, .75)': (lambda p: p*p, .25, .75, 0),
    'Schedule(slow, start_sparsity=20)': (lambda p: p*p, 0, 1, 20),
    'lin(start_sparsity=60, end_pct=.5)': (lambda p: p, 0, .5, 60)}

def quoted(names): return [repr(n) for n in names]

LEGAL = dict(
    sparsity     = ['0', '1', '29', '50', '75.5', '90', '99.99', '100', 'np.float32(50)', 'np.int64(40)',
                    'Fraction(100, 3)', '[50, 90]',
                    '(30, 60.5)', '[20, 40, 60]', "{'0': 50}", "{'3': 80, '0': 10}",
                    "{'*': 30, '3.weight': 66}", '[40]'],
    granularity  = quoted(GRANULARITIES + BLOCKS) + ["'weight'"]*8 + ["'filter'"]*4
    + ['(1,)', '(0, 1)', '[1]', '()', '(-1,)', '(1, 2, 3)'],
    context      = quoted(['local', 'global', 'erk', 'lamp', 'output']),
    criteria     = quoted(CRITERIA) + ['large_final', 'l1', 'movement', 'scores()', "only('0.weight', '3.weight')",
                                       'Criteria(torch.square)', 'ln_norm(2)',
                    "ln_norm('nuc')", 'partial(large_final, reducer=Reducer.l2)',
                                       'Criteria(torch.abs, normalizer=Normalizer.mean)',
                    'Criteria(torch.abs, normalizer=Normalizer.gaussian)', 'lambda w: w.abs()', 'partial(wanda)'],
    schedule     = list(SCHEDULES),
    lth          = ['True', 'False'],
    rewind_epoch = ['0', '1'],
    rewind_step  = ['None', '0', '1', '2', '5'],
    reset_end    = ['True', 'False'],
    save_tickets = ['True', 'False'],
    model        = ['None', 'net', 'net[0]', 'net[3]', 'net[:4]'],
    round_to     = ['None', '1', '2', '3', '4', '8', '100'],
    nm           = ['False', 'None', 'True', '(1, 2)', '[1, 4]', '(3, 4)', '(2, 4)'],
    layer_type   = ['nn.Conv2d', '(nn.Conv2d, nn.Linear)', 'nn.Linear', "'Conv2d'", "['Linear', nn.Conv2d]",
                    'nn.Module', '{nn.Conv2d}'],
    start_sparsity = ['None', '0', '10', '30.5', '95'],
    start_epoch  = ['None', '0', '0.5', '1', '2', '1.5'],
    end_epoch    = ['None', '0', '0.5', '1', '2', '1.5'],
    include      = ['None', "'0'", "'3'", "['0', '3']", "'*'", "re.compile('[03]')", 'nn.Conv2d',
                    'is_conv', "'*.weight'"],
    exclude      = ['None', "'0'", "'3'", "['0']", "re.compile('3')", "'7'"],
    every        = ['1', '2', '3', '4', '100'],
    compact      = ['True', 'False'],
    params       = ['None', "'weight'", "'bias'", "['weight', 'bias']", "'*'", "('weight',)"],
    min_sparsity = ['None', '0', '10', '40', "{'0': 30}", "{'*': 20, '3': 50}"],
    max_sparsity = ['None', '100', '95', '60', "{'3': 50}", "{'0.weight': 80, '*': 99}"],
    budget       = quoted(['groups', 'params', 'flops']),
    coupled      = ['False'],
    data         = ['None', 'BATCHES', 'BATCHES[0]', 'dls', 'BATCHES[0][0]'],
    example_inputs = ['None', 'BATCHES[0][0]'],
    max_drop     = ['None'],
    metric       = ['None'],
    live         = ['True', 'False'],
    verbose      = ['True', 'False'])

WILD = dict(
    sparsity     = ["{'0.weight': 50, '9': 3}", '{}', "[50, '60']", '[50, True]', '[101, 2]', '[0.9, 50]',
                    "{'0': math.nan}", "{nn.Conv2d: 50}", '{net[0]: 50}',
                    '{net: 50}', "{'*': 0.3}", '(i for i in (50, 50))'],
    granularity  = ["'filtre'", "'Weight'", "'block_0x2'", "'block_'", "'block_3x3'", "'block_2x2x2x2x2'",
                    "'block_99999999999999999999'", "'unit'", "'head'",
                    '(9,)', '(1, 1)', "('a',)", '(True,)', '(0.,)', '(0, -4)', '{1}'],
    context      = ["'globl'", "'LOCAL'", "['local']", "'output '"],
    criteria     = ["'large_finall'", 'nan_scores', 'one_score', "{'0.weight': 3}", "{'0.weight': torch.ones(1)}",
                    "{0: torch.ones(4)}", 'Criteria',
                    'partial(large_final, reducr=3)', 'Reducer.mean', "only('3.weight')",
                    'partial(random_importance, 3)',
                    'Criteria(torch.sqrt)'],
    schedule     = ["'agpp'", 'too_far', 'partial(iterative, n_steps=0)', 'partial(iterative, nsteps=3)',
                    'partial(agp, 3)', 'SchedCos(0, 90)', 'Schedule',
                    'lambda pos: math.nan', 'lambda a, b: 0', "lambda pos: 'x'"],
    model        = ['network()', "'0'", 'net[2]', 'net[0].weight', 'nn.Sequential()', '[net[0]]', 'net[7]'],
    nm           = ['(4, 2)', '(2, 2)', '(0, 4)', '(1, 2, 3)', "'2:4'", '(True, 2)', '(1, 3)', '(2., 4.)', '4'],
    layer_type   = ['nn.Conv3d', 'nn.BatchNorm2d', "'Conv'", '(nn.Conv2d, 3)', 'nn.ReLU', 'nn.Sequential', 'object',
                    'int', 'net[0]'],
    include      = ["'9'", "['0', '9']", 'one_argument', "re.compile('9')", 'nn.Conv3d', 'net[0]', '[is_conv, 3]',
                    'lambda n, m: False', 'lambda n, m: 1/0'],
    exclude      = ["'9'", "'*'", 'one_argument', "re.compile('')", 'nn.Conv3d', 'net[0]', '[is_conv, 3]',
                    'lambda n, m: False', 'lambda n, m: 1/0'],
    params       = ["'wieght'", "['weight', 3]", "['weight', 'x']", "'0.weight'"],
    min_sparsity = ["{'9': 50}", "{'0': 0.5}", "{'0': 101}", '96', '100'],
    max_sparsity = ["{'9': 50}", "{'0': 0.5}", "{'0': 101}", '0', '10'],
    rewind_step  = ['6', '100', '2.5'],
    max_drop     = ['0', '-1', "'1'", 'math.nan'],
    metric       = ['accuracy', '3'],
    budget       = ["'flop'", "'Groups'"],
    coupled      = ["'9'", "'stam'", '[]', "['0', 3]"],
    data         = ["'x'", '3', 'net', '[3]', "[(torch.ones(2), 'a')]", 'torch.ones(3)', "{'a': 1}"])

# The definitions

AXES = {4: dict(weight=(), row=(3,), column=(2,), channel=(1,), kernel=(2, 3), vertical_slice=(1, 2),
                horizontal_slice=(1, 3), filter=(1, 2, 3),
                layer=(0, 1, 2, 3), shared_weight=(0,), shared_row=(0, 3), shared_column=(0, 2), shared_channel=(0, 1),
                shared_kernel=(0, 2, 3), shared_vertical_slice=(0, 1, 2), shared_horizontal_slice=(0, 1, 3)),
        2: dict(weight=(), column=(0,), row=(1,), filter=(1,), layer=(0, 1)),
        1: dict(weight=(), layer=(0,))}

def gone(zero, granularity):
    "Which groups are gone, of a tensor that tells which weights are"
    if isinstance(granularity, str) and granularity.startswith('block_'):
        sizes = [int(k) for k in granularity[6:].split('x')]
        sizes += list(zero.shape[len(sizes):])
        for axis,k in enumerate(sizes): zero = zero.unfold(axis, k, k)
        return zero.flatten(len(sizes)).all(-1)
    axes = AXES[zero.ndim][granularity] if isinstance(granularity, str) else granularity
    for a in sorted((a % zero.ndim for a in axes), reverse=True): zero = zero.all(a, keepdim=True)
    return zero

def meant(patterns, layer, param):
    "Is this parameter of this layer meant by `patterns`?"
    if isinstance(patterns, (str, re.Pattern, type)) or callable(patterns): patterns = [patterns]
    names = (layer, f'{layer}.{param}')
    return any(any(fnmatchcase(n, p) for n in names) if isinstance(p, str) else any(p.search(n) for n in names)
               if isinstance(p, re.Pattern) else
               issubclass(_layers[layer], p) if isinstance(p, type) else p(layer, _layers[layer](2, 2, 2))
               for p in patterns)

def chosen(a, net):
    "(layer, parameter) of all that the arguments `a` choose"
    types_ = a['layer_type'] if isinstance(a['layer_type'], (tuple, list, set)) else [a['layer_type']]
    part   = next((a[k] for k in ('model', 'part') if a.get(k) is not None), net)
    params = [a['params']] if isinstance(a['params'], str) else a['params'] or ['weight']
    lenient = nn.Module in types_  # all that can be: what does not split so is left out
    return [(n, k) for n,kind in _layers.items() for k in ('weight', 'bias')
            if (not lenient or splits(a, net.get_submodule(n), k)) and
            any(t in [c.__name__ for c in kind.__mro__] if isinstance(t, str) else issubclass(kind, t)
                for t in types_) and
            net.get_submodule(n) in set(part.modules()) and any(fnmatchcase(k, p) for p in params) and
            (a['include'] is None or meant(a['include'], n, k))
            and not (a['exclude'] is not None and meant(a['exclude'], n, k))]

def splits(a, m, k):
    "Does the parameter `k` of layer `m` have the granularity that is asked for, and the n:m pattern?"
    p, granularity = m._parameters[k], a['granularity']
    if p is None: return True
    if a['nm'] and (p.ndim < 2 or p.shape[1] % (4 if a['nm'] is True else a['nm'][1])): return False
    if not isinstance(granularity, str): return all(-p.ndim <= d < p.ndim for d in granularity)
    if not granularity.startswith('block_'): return granularity in AXES[p.ndim]
    sizes = [int(o) for o in granularity[6:].split('x')]
    return p.ndim >= len(sizes) and not any(n % o for n,o in zip(p.shape, sizes))

def percents(given, found, net, free):
    "The percentage of each of the `found`"
    if isinstance(given, (int, float, Fraction, np.number)): return [Fraction(float(given))] * len(found)
    if not isinstance(given, dict): return [Fraction(float(v)) for v in given]
    def one(n, k):
        named = [v for o,v in given.items() if o is net.get_submodule(n)]
        named = named or [given[o] for o in (f'{n}.{k}', n) if o in given]
        some  = [v for o,v in given.items() if not isinstance(o, nn.Module) and meant(o, n, k)]
        return Fraction(float((named or some[-1:] or [free])[0]))
    return [one(*f) for f in found]

EPS = 1e-9

def floors(x):
    "⌊x⌋, either way where `x` is a rounding error from a whole number"
    return {math.floor(x - EPS), math.floor(x + EPS)}

def rounded(n, k, r): return n - min(n, -(-(n - k) // r) * r) if r else k

class Exact:
    "What the arguments `a` promise for the weights `net`, checked on which weights are zero"
    def __init__(self, a, net):
        self.a, self.found = a, chosen(a, net)
        self.net, self.context, self.r = net, a['context'], a['round_to']
        self.asked = percents(a['sparsity'], self.found, net, 0)
        assert len(self.asked) == len(self.found), 'a sparsity for each'
        assert all(0 <= s <= 100 and not 0 < s < 1 for s in self.asked), 'percentages'
        if self.context in ('global', 'lamp', 'erk'): assert len(set(self.asked)) <= 1

    def check(self, zeros, at, wanted=None):
        """`zeros`: name → which weights are zero; `at`: sparsity asked for → the one to be at; `wanted`: numbers of
        groups instead"""
        a, tensors = self.a, [zeros[f'{n}.{k}'] for n,k in self.found]
        groups = [gone(t, a['granularity']) for t in tensors]
        self.n = n = [g.numel() for g in groups]
        k = [int(g.sum()) for g in groups]
        if a['granularity'] != 'weight':  # nothing but whole groups
            assert all(int(t.sum()) == j * t.numel() // m
                       for t,j,m in zip(tensors, k, n)), f'{[int(t.sum()) for t in tensors]} weights of {k} groups'
        s = [at(s) for s in self.asked]
        if wanted is not None: assert wanted in (k, [sum(k)]), f'{k} groups zero, {wanted} expected'
        elif self.context == 'output':
            rows = [g.reshape(g.shape[0], -1) for g in groups]
            for g,o in zip(rows, s): assert all(int(r.sum()) in floors(o*r.numel()/100) for r in g), f'rows of {k}'
        elif self.context == 'local':
            want = [{rounded(m, f, self.r) for f in floors(o*m/100)} for o,m in zip(s, n)]
            assert all(j in w for j,w in zip(k, want)), f'{k} of {n} groups zero, {want} expected'
        else: self.check_shared(s[0], k, n)
        if a['nm']:
            few, many = (2, 4) if a['nm'] is True else a['nm']
            assert all(((~t).unfold(1, many, many).sum(-1) >= few).all() for t in tensors), 'n:m'
        return k

    def check_shared(self, s, k, n):
        "One sparsity for all"
        a, total = self.a, sum(n)
        free = a['min_sparsity'] is a['max_sparsity'] is None
        if a['budget'] != 'groups': self.check_budget(s, k, n, free)
        elif self.r:
            most = max(floors(s*total/100))
            assert most - (self.r - 1)*len(n) <= sum(k) <= most, f'{k} of {n} zero at {float(s)} %'
        else: assert sum(k) in floors(s*total/100), f'{sum(k)} of {total} groups zero at {float(s)} %'
        if self.r:
            assert all((m - j) % self.r == 0 or not j
                       for j,m in zip(k, n)), f'{k} of {n} gone: not multiples of {self.r} are kept'
        if a['max_sparsity'] is not None:
            most = percents(a['max_sparsity'], self.found, self.net, 100)
            assert all(j <= max(floors(p*m/100)) for j,p,m in zip(k, most,
                                                                  n)), f'{k} of {n} zero, over {a["max_sparsity"]}'
        if a['min_sparsity'] is not None and s == self.asked[0]:
            least = percents(a['min_sparsity'], self.found, self.net, 0)
            assert all(j >= math.ceil(p*m/100 - EPS)
                       for j,p,m in zip(k, least, n)), f'{k} of {n} zero, under {a["min_sparsity"]}'

    def check_budget(self, s, k, n, free):
        "As much as can go goes"
        sizes = [self.net.get_submodule(l)._parameters[p].numel() for l,p in self.found]
        costs = [Fraction(size, m) * (_places[l] if self.a['budget'] == 'flops' else 1)
                 for size,m,(l,_) in zip(sizes, n, self.found)]
        if self.a['budget'] == 'flops' and any(p == 'bias' for _,p in self.found): return
        spent, budget = sum(j*c for j,c in zip(k, costs)), s * sum(m*c for m,c in zip(n, costs)) / 100
        assert spent <= budget + EPS, f'{float(spent)} spent of {float(budget)}'
        if free and not self.r and k != n:
            assert spent + max(c for j,c,m in zip(k, costs, n)
                               if j < m) > budget - EPS, f'{float(spent)} of {float(budget)}'

# What must not be left behind

HOOKS = [k for k in vars(nn.Module()) if 'hook' in k]

def anatomy(model):
    "All there is to a model but its numbers"
    return [(n, id(m), sorted(vars(m)), [len(getattr(m, h)) for h in HOOKS if getattr(m, h) is not None],
             [(k, id(p), type(p), p.requires_grad, len(p._backward_hooks or ()))
              for k,p in m._parameters.items() if p is not None], sorted(m._buffers))
            for n,m in model.named_modules()]

def state(model): return {k: v.clone() for k,v in model.state_dict().items()}
def zeros(model): return {k: p.detach() == 0 for k,p in model.named_parameters()}

# The oracle

DEFAULTS = dict(granularity='weight', context='local', round_to=None, nm=False, layer_type=nn.Conv2d, include=None,
                exclude=None, params=None,
                min_sparsity=None, max_sparsity=None, budget='groups', start_sparsity=None, start_epoch=None,
                end_epoch=None, verbose=False)
FLAGS  = ('lth', 'reset_end', 'save_tickets', 'compact', 'live', 'verbose')
WORDS  = dict(criteria='criteri(a|on)')
NEEDED = ('data', 'loss_func', 'example_inputs')  # a message may ask for these
counts = Counter()

def evaluated(source, **here): return {k: eval(v, globals(), here) for k,v in source.items()}

def said(word, e): return re.search(rf'(?<!\w){word}(?!\w)', str(e), re.IGNORECASE)

def without(source, names):
    "`source` without some of its arguments; one that must be there is a harmless one then"
    left = {k: v for k,v in source.items() if k not in names}
    return left if 'n' in left else {'sparsity': '37.5', **left}

def check_refusal(e, source, n_batches, again):
    "An error of ours, before the first batch, that names an argument without which it would not have come"
    text  = f'{type(e).__name__} after {n_batches} batches: {e}'
    named = [k for k,v in source.items() if said(WORDS.get(k, k), e) or re.fullmatch(r"'[a-z]\w+'", v)
             and said(v[1:-1], e)]
    assert isinstance(e, (ValueError, TypeError, KeyError)), text
    assert not n_batches, text
    if any(said(k, e) for k in NEEDED if source.get(k, 'None') == 'None'): return
    assert any(again(without(source, out)) != str(e) for out in [*([k] for k in named), named]), \
           f'{" and ".join(named) or "no argument"} named by {text}'

class Watch(Callback):
    "Remembers what is zero after each batch and each epoch"
    order = 100
    def __init__(self): self.n, self.batches, self.epochs = 0, [], []
    def before_batch(self): self.n += 1
    def after_batch(self): self.batches.append(zeros(self.learn.model))
    def before_validate(self):
        masks = next(cb for cb in self.learn.cbs if isinstance(cb, SparsifyCallback)).sparsifier.masks
        self.epochs.append((zeros(self.learn.model), {k: ~m for k,m in masks.items()}))

def curve(source, a):
    "(share of training, sparsity asked for) → sparsity to be at; and does it rise only?"
    f, start, end, first = SCHEDULES[source.get('schedule', "'agp'")]
    if a['start_epoch']    is not None: start = a['start_epoch'] / N_EPOCH
    if a['end_epoch']      is not None: end   = a['end_epoch']   / N_EPOCH
    if a['start_sparsity'] is not None: first = float(a['start_sparsity'])
    def at(pct, s):
        p = 0 if pct < start else f(1 if pct >= end else (pct - start) / (end - start))
        return float(s) and first + (float(s) - first) * p
    return at, lambda s: source.get('schedule') not in ("'dsd'", 'up_down') and (not s or s >= first)

def check_run(source, kwargs, net, cb, watch, learn, out):
    "Everything that `kwargs` promise"
    a = {**DEFAULTS, **kwargs, **evaluated({'sparsity': source['sparsity']}, net=net)}
    for k in FLAGS: assert isinstance(a.get(k, False), bool), f'{k}={a[k]!r} was taken for {bool(a[k])}'
    exact, (at, rises) = Exact(a, net), curve(source, a)
    up = all(map(rises, exact.asked))
    assert [t.name for t in cb.sparsifier.targets] == [f'{n}.{k}' for n,k in exact.found]
    assert watch.n == N_EPOCH * N_ITER and len(watch.epochs) == N_EPOCH
    dense = zeros(_net)
    for e,(now,masked) in enumerate(watch.epochs):
        exact.check(now if up else {**dense, **masked}, partial(at, (e + 1) / N_EPOCH))
        assert all((now[k] | ~masked[k]).all() for k in masked), 'masked and not zero'
    exact.check(zeros(net) if up else {**dense, **{k: ~m for k,m in cb.sparsifier.masks.items()}}, partial(at, 1))
    if up:
        for b,c in zip(watch.batches, watch.batches[1:]):
            assert all((c[f'{n}.{k}'] | ~b[f'{n}.{k}']).all() for n,k in exact.found), 'what was pruned came back'
    check_words(a, exact, cb, watch, learn, out)

def share(now, names): return 100 * sum(int(now[k].sum()) for k in names) / sum(now[k].numel() for k in names)

def check_words(a, exact, cb, watch, learn, out):
    "What is said is what is in the weights"
    names   = [f'{n}.{k}' for n,k in exact.found]
    counted = [share(now, names) for now,_ in watch.epochs]
    assert [h['sparsity'] for h in cb.history] == pytest.approx(counted)
    assert [v[learn.recorder.metric_names.index('sparsity') - 1]
            for v in learn.recorder.values] == pytest.approx(counted)
    assert cb.report.sparsity == pytest.approx(share(zeros(learn.model), names))
    if not a['verbose']: return
    each = isinstance(a['sparsity'], (list, tuple, dict))
    said = [[float(x) for x in s.split(', ')]
            for s in re.findall(r'^Sparsity at the end of epoch \d+: \[([\d., ]+)\]%', out, re.M)]
    want = [[share(now, [k]) for k in names] if each else [s] for (now,_),s in zip(watch.epochs, counted)]
    assert len(said) == N_EPOCH and all(s == pytest.approx(w, abs=.0051) for s,w in zip(said, want))

def attempt(source, opt_func, *cbs):
    "A fit with the arguments of `source`: everything there is afterwards, and the error or None"
    r = types.SimpleNamespace(net=network(), watch=Watch(), out=io.StringIO(), error=None)
    dls = DataLoaders(Batches(BATCHES), Batches([]))
    r.learn  = Learner(dls, r.net, loss_func=nn.CrossEntropyLoss(), opt_func=opt_func, path='.')
    r.kwargs = evaluated(source, net=r.net, dls=dls)
    before   = anatomy(r.net), list(r.learn.metrics), list(r.learn.cbs)
    try:
        with redirect_stdout(r.out), r.learn.no_logging():
            r.cb = SparsifyCallback(**{'verbose': False, **r.kwargs})
            r.learn.fit(N_EPOCH, 1e-2, cbs=[r.cb, r.watch, *cbs])
    except Exception as e: r.error = e
    assert (anatomy(r.net), list(r.learn.metrics), list(r.learn.cbs)) == before, 'something is left behind'
    return r

def cancel(self): raise CancelFitException

def fuzz_callback(source, opt_func=SGD):
    "One case: the arguments of `source`, in a fit"
    r, values = attempt(source, opt_func), state(_net)
    if r.error is None: check_run(source, r.kwargs, r.net, r.cb, r.watch, r.learn, r.out.getvalue())
    else:
        check_refusal(r.error, source, r.watch.n,
                      lambda s: str(attempt(s, opt_func, Callback(before_train=cancel)).error))
        if not r.watch.n: assert all(torch.equal(v, values[k]) for k,v in r.net.state_dict().items()), 'weights changed'
    counts['ran' if r.error is None else 'refused'] += 1

# The cases

def agree(kwargs):
    "Of arguments that exclude each other, the later ones are left out most of the time: too few cases would run"
    k = dict(kwargs)
    shared = k.get('context') in ("'global'", "'lamp'", "'erk'")
    if k.get('granularity', "'weight'") != "'weight'": k.pop('nm', None)
    if k.get('context') in ("'lamp'", "'erk'", "'output'"): k.pop('nm', None)
    if k.get('context') == "'output'": k.pop('round_to', None)
    if not shared or k.get('nm'): k.pop('min_sparsity', None), k.pop('max_sparsity', None)
    if not shared or k.get('context') == "'erk'": k.pop('budget', None)
    elif k['sparsity'][0] in '[({': k['sparsity'] = '50'
    if k.get('budget', "'groups'") != "'groups'": k.pop('min_sparsity', None)
    if k.get('rewind_epoch') == '1': k.pop('rewind_step', None)
    tickets = k.get('lth') == 'True' or k.get('save_tickets') == 'True'
    if tickets and k.get('schedule') not in ("'one_shot'", 'one_shot'): k['schedule'] = "'iterative'"
    return k

def sources(legal, wild, first, agree=agree):
    "Some arguments; in half of the cases one or two of them come from what is mostly illegal"
    main, names = ('granularity', 'context', 'criteria'), sorted(set(legal) - {first})
    others = [k for k in names if k not in main]
    @st.composite
    def draw(pick):
        n_wild = pick(st.sampled_from((0, 0, 0, 1, 1, 2)))
        given  = [k for k in main if pick(st.booleans())] + pick(st.lists(st.sampled_from(others),
                                                                          max_size=4, unique=True))
        odd    = pick(st.lists(st.sampled_from([first, *names]), min_size=n_wild, max_size=n_wild, unique=True))
        own    = {k: pick(st.sampled_from(legal[k])) for k in [first, *given]}
        if pick(st.sampled_from((True,)*7 + (False,))): own = agree(own)
        own |= {k: pick(st.sampled_from(COMMON + wild.get(k, []) * 3)) for k in odd}
        # these have tests/test_coupled.py
        if own.get('granularity') in ("'filter'", "'channel'", "'head'"): own.pop('coupled', None)
        return own
    return draw()

# The same for `Sparsifier` in a loop of one's own

CALL     = ('sparsity', 'round_to', 'n', 'relative', 'schedule', 'done')
SP_LEGAL = {**{k: LEGAL[k] for k in ('sparsity', 'granularity', 'context', 'criteria', 'nm', 'layer_type', 'include',
                                     'exclude', 'params', 'min_sparsity',
                                     'max_sparsity', 'budget', 'data', 'round_to', 'compact', 'coupled')},
            # on the way: test_sparsifier.py
            'schedule': ['None', "'agp'", 'iterative', 'cos', 'partial(one_shot, start_pct=.2)'],
            'done': ['None', '1', '1.'],
            'part': LEGAL['model'], 'loss_func': ['None', 'nn.CrossEntropyLoss()', 'nn.functional.cross_entropy'],
            'relative': ['True', 'False'],
            'example_inputs': ['None', 'BATCHES[0][0]', 'lambda: BATCHES[1][0]', '(BATCHES[0][0],)'],
            'n': ['0', '1', '2', '4', '[1, 2]', '(2, 1)', '[1]'], 'check': ['True', 'False']}
SP_WILD  = {**WILD, 'check': ['1', "'yes'", 'None'], 'done': ['50', '-0.1', "'1'", 'True', 'math.nan'],
            'part': WILD['model'], 'example_inputs': ['torch.ones(3)', "'x'"],
            'loss_func': ["'mse'", 'nn.MSELoss', 'nn.MSELoss()']}

def prune(source, net, opt):
    "A `Sparsifier` of `net` that has sparsified it, and what holds the masks"
    kwargs = evaluated(source, net=net, dls=DataLoaders(Batches(BATCHES), Batches([])))
    sp = Sparsifier(net, **{k: v for k,v in kwargs.items() if k not in (*CALL, 'compact')})
    hold = sp.hold(opt, **{k: kwargs[k] for k in ('compact',) if k in kwargs})
    try: sp.sparsify_model(**{k: kwargs[k] for k in CALL if k in kwargs})
    except BaseException:
        hold.release()
        raise
    return kwargs, sp, hold

def train(net, opt, steps):
    for x,y in BATCHES[:steps]:
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        opt.step()

def fuzz_sparsifier(source, backward=True):
    "One case: the arguments of `source`, in plain PyTorch"
    def fresh():
        net = network()
        if backward: nn.functional.cross_entropy(net(BATCHES[0][0]), BATCHES[0][1]).backward()
        return net, torch.optim.SGD(net.parameters(), 1e-2, momentum=.9)
    def refusal(source):
        net, opt = fresh()
        before, values = (anatomy(net), [p.grad is None for p in net.parameters()]), state(net)
        try: return net, opt, before, prune(source, net, opt)
        except Exception as e:
            assert (anatomy(net), [p.grad is None for p in net.parameters()]) == before, 'something is left behind'
            assert all(torch.equal(v, values[k]) for k,v in net.state_dict().items()), 'numbers changed'
            return e
    found = refusal(source)
    if isinstance(found, Exception):
        check_refusal(found, source, 0, lambda s: str(refusal(s)))
        counts['sparsifier refused'] += 1
        return
    net, opt, before, (kwargs, sp, hold) = found
    check_pruned(source, kwargs, net, sp)
    masked = {k: ~m for k,m in sp.masks.items()}
    train(net, opt, 2)
    check_pruned(source, kwargs, net, sp)
    hold.release()
    assert (anatomy(net), [p.grad is None for p in net.parameters()])[0] == before[0], 'something is left behind'
    assert not opt._optimizer_step_pre_hooks and not opt._optimizer_step_post_hooks
    assert all(s['momentum_buffer'].shape == p.shape for p,s in opt.state.items())
    assert all((zeros(net)[k] | ~m).all() for k,m in masked.items())
    counts['sparsifier ran'] += 1

def check_pruned(source, kwargs, net, sp):
    a = {**DEFAULTS, 'sparsity': 0, **kwargs, **evaluated({k: v for k,v in source.items() if k == 'sparsity'}, net=net)}
    for k in ('relative', 'compact'):
        assert isinstance(a.get(k, False), bool), f'{k}={a[k]!r} was taken for {bool(a[k])}'
    exact  = Exact({**a, 'sparsity': 0 if a['sparsity'] is None else a['sparsity']}, net)
    pooled = a['context'] in ('global', 'lamp')
    wanted = a.get('n')
    if a.get('relative') and wanted is None:
        sizes  = [gone(zeros(net)[f'{n}.{k}'], a['granularity']).numel() for n,k in exact.found]
        wanted = [round(a['sparsity'] * n / 100) for n in ([sum(sizes)] if pooled else sizes)]
    elif wanted is not None:
        wanted = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted] * (1 if pooled else len(exact.found))
    exact.check(zeros(net), float, wanted)
    assert [t.name for t in sp.targets] == [f'{n}.{k}' for n,k in exact.found]
    names = [f'{n}.{k}' for n,k in exact.found]
    assert sp.sparsity == pytest.approx(share(zeros(net), names)) == pytest.approx(sp.report().sparsity)

def agree_too(kwargs):
    k = agree({'sparsity': '50', **kwargs})
    if k.get('n') or k.get('relative'): k.pop('round_to', None), k.pop('budget', None)
    if k.get('n'): k.pop('sparsity')
    on_the_way = k.get('schedule', 'None') != 'None' and not (k.get('n') or k.get('relative'))
    k.pop('schedule', None), k.pop('done', None)
    return {**k, 'schedule': kwargs['schedule'], 'done': '1'} if on_the_way else k

@settings(max_examples=CASES)
@given(source=sources(LEGAL, WILD, 'sparsity'), opt_func=st.sampled_from([SGD, Adam]))
def test_arguments_of_the_callback(source, opt_func): fuzz_callback(source, opt_func)

@settings(max_examples=HOLDS)
@given(source=sources(SP_LEGAL, SP_WILD, 'sparsity', agree_too), backward=st.booleans())
def test_arguments_of_the_sparsifier(source, backward): fuzz_sparsifier(source, backward)

def test_there_were_enough_cases():
    assert sum(counts.values()) >= 2000, counts
    assert min(counts.values()) >= 300, counts

def test_every_argument_is_drawn():
    def arguments(f): return set(inspect.signature(f).parameters) - {'self', 'model', 'rule'}  # rules: test_own_rule.py
    assert set(LEGAL) - {'model'} == arguments(SparsifyCallback.__init__)
    assert set(SP_LEGAL) == arguments(Sparsifier.__init__) | arguments(Sparsifier.sparsify_model) | {'compact'}
