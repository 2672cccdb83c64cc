"""Masks and files of earlier versions: what was chosen then is chosen now, to the bit, and what was saved then can be
read.

Weights and inputs are whole numbers over powers of two, few enough bits that every sum is exact: no kernel, thread
count or processor can change a score, ties included. `python tests/test_recorded.py` prints what `recorded.json` holds,
for a choice that was changed on purpose."""
import hashlib, json
from itertools import product
from pathlib import Path

import pytest, torch, torch.nn as nn
from fasterai_clone.sparse.all import *

RECORDED = Path(__file__).parent/'data'/'recorded.json'

def scrambled(n, prime=7919):
    "The numbers -(n//2) ... in an order that looks random: all different"
    prime = next(p for p in (prime, 7907, 7901) if n % p)
    return (torch.arange(n, dtype=torch.int64)*prime % n - n//2).float()

class Net(nn.Module):
    "Two convolutions that meet in a sum, a third, and two linear layers; without a norm, whose roots are not exact"
    def __init__(self, coarse=False):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.c    = nn.Conv2d(8, 12, 3)
        self.body = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
        for i,(n,p) in enumerate(self.named_parameters()):
            t = scrambled(p.numel(), 7919 + 2*i).reshape(p.shape)
            p.data = (t % 5 - 2)/2 if coarse else t/1024 + (t >= 0)/2048
    def forward(self, x):
        x = self.a(x).relu()
        x = (x + self.b(x)).relu()
        return self.body(self.c(x).amax((2, 3)))

def batch(): return (scrambled(2*4*4*4).reshape(2, 4, 4, 4) % 4 - 1).float()

def total(out, target): return (out*(target - 1)).sum()

BOTH = dict(layer_type=(nn.Conv2d, nn.Linear))

def combinations():
    "What is recorded: name → (arguments of `Sparsifier`, sparsity)"
    for g in GRANULARITIES: yield f'{g} local', dict(granularity=g), 60
    for g,c in product(('weight', 'kernel', 'filter'), ('global', 'erk', 'lamp')):
        yield f'{g} {c}', dict(granularity=g, context=c), 55
    for c in ('local', 'global', 'erk', 'lamp', 'output'):
        yield f'weight {c} of two kinds of layers', dict(context=c, **BOTH), 75
    for criteria in EXACT: yield f'weight {criteria}', dict(criteria=criteria, **BOTH), 50
    for criteria in MEASURED:
        yield f'{criteria}', dict(criteria=criteria, granularity='filter' if criteria in ('apoz', 'mean_activation')
                                  else 'weight', data=[(batch(), torch.tensor([2, 3]).view(2, 1))],
                                  loss_func=total, **BOTH), 50
    for b,(g,c) in product(('params', 'flops'), (('weight', 'global'), ('filter', 'global'), ('filter', 'lamp'))):
        yield f'{g} {c} budget {b}', dict(granularity=g, context=c, budget=b, example_inputs=batch()), 50
    for nm,c in product(((2, 4), (1, 4), (1, 2)), ('local',)):
        yield f'nm {nm}', dict(nm=nm, **BOTH), 100*(nm[1] - nm[0])/nm[1]
    for c,b in [*product(('local', 'global', 'erk', 'lamp'), ['groups']), ('global', 'params'), ('lamp', 'params')]:
        yield f'filter {c} coupled budget {b}', dict(granularity='filter', context=c, coupled=True, budget=b,
                                                     example_inputs=batch(), **BOTH), 40
    yield 'limits local', dict(min_sparsity={'a': 30}, max_sparsity={'b': 50}, context='global'), 60
    yield 'limits filters', dict(granularity='filter', context='global', max_sparsity=50), 45
    yield 'layers by name', dict(exclude='c', include=['a', 'b', 'c', 'body.*'], **BOTH), 80
    yield 'each its own', dict(), {'a': 25, 'b': 75, 'c': 0}
    yield 'heads of rows', dict(granularity='row', layer_type=nn.Linear, context='global'), 50

GRANULARITIES = 'weight kernel filter channel row column shared_weight horizontal_slice vertical_slice layer'.split()
EXACT    = ['large_final', 'small_final', 'squared_final', 'large_init', 'small_init', 'large_init_large_final',
            'small_init_small_final',
            'magnitude_increase', 'movement', 'movmag', 'updating_magnitude_increase', 'updating_movement']
MEASURED = ['gradient', 'snip', 'synflow', 'wanda', 'apoz', 'mean_activation']

def chosen(arguments, sparsity):
    "The digest of all masks after a first choice, and after a later, larger one from other weights"
    coarse = 'data' in arguments
    model, found = Net(coarse), hashlib.sha256()
    sp = Sparsifier(model, **arguments)
    for step in (2, 1):
        for p in model.parameters(): p.data = p.data + (scrambled(p.numel()).reshape(p.shape) % 3 - 1)/4*(p != 0)
        now = {k: v/step for k,v in sparsity.items()} if isinstance(sparsity, dict) else sparsity/step
        sp.sparsify_model(sparsity if 'nm' in arguments else now)
        for name,p in sorted(model.named_parameters()): found.update(name.encode() + bytes((p != 0).flatten().tolist()))
    return found.hexdigest()[:16]

CASES = {name: case for name,*case in combinations()}

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', CASES)
def test_masks_are_those_recorded(name):
    assert chosen(*CASES[name]) == json.loads(RECORDED.read_text())[name]

def test_every_combination_is_recorded():
    recorded = json.loads(RECORDED.read_text())
    assert list(recorded) == list(CASES) and len(recorded) >= 60
    assert len(set(recorded.values())) > 0.8*len(recorded)  # hardly any two choose the same

if __name__ == '__main__':
    print(json.dumps({name: chosen(*case) for name,case in CASES.items()}, indent=1, ensure_ascii=False))
