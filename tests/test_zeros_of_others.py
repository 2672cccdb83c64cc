"""Zeros that others made are found in the first call, although layers that certainly keep no zero are not counted"""
import random, re, warnings
import pytest, torch
from torch import nn
from fasterai_clone.sparse.all import Sparsifier
from fasterai_clone.sparse.found import Found

SIZE = 100  # weights of each layer, 1 to 100 and 101 to 200, without what `zeros` sets to zero

def net(dtype=torch.float32, zeros=((), ()), sign=1):
    "Two layers of 10 × 10; `zeros`: the indices of zeros in each"
    layers = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)).to(dtype)
    for i,(l,at) in enumerate(zip(layers, zeros)):
        l.weight.data.view(-1)[:] = torch.arange(1, SIZE + 1) + SIZE*i
        l.weight.data.view(-1)[list(at)] = 0
        l.weight.data *= sign  # minus zero is zero too
    return layers

def told(sp, *args, **kwargs):
    "The numbers (zero, all, pruned) of the warning that the call raises, or None"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        sp.sparsify_model(*args, **kwargs)
    found = [str(w.message) for w in seen if 'were already zero' in str(w.message)]
    return tuple(map(int, re.match(r'(\d+) of (\d+) .*pruned only (\d+) ', found[0]).groups())) if found else None

@pytest.mark.parametrize('sign', [1, -1])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_thirty_zeros_of_others(dtype, sign):
    "Of 200 weights 30 are zero: at 10 % 20 of these are pruned, at 15 % all, at 20 % ten others as well"
    for sparsity,want in ((10, (30, 200, 20)), (15, None), (20, None)):
        sp = Sparsifier(net(dtype, (range(50, 80), ()), sign), context='global', layer_type=nn.Linear)
        assert told(sp, sparsity) == want

def test_zeros_in_a_layer_that_drops_nothing():
    "At 10 % the lowest 20 are 20 of the 30 zeros in the last row of layer 1; layer 0 drops none, and keeps none"
    sp = Sparsifier(net(zeros=((), range(70, 100))), context='global', layer_type=nn.Linear)
    assert told(sp, 10) == (30, 200, 20)

def test_local_zeros_in_one_layer_only():
    "At 20 % layer 0 drops 20 weights that are not zero, layer 1 20 of its 30 zeros"
    sp = Sparsifier(net(zeros=((), range(70, 100))), layer_type=nn.Linear)
    assert told(sp, 20) == (50, 200, 40)

def test_one_layer_of_two():
    "`sparsify_layer` prunes 20 weights of layer 0; layer 1 has 30 zeros, and no mask"
    sp = Sparsifier(net(zeros=((), range(30))), layer_type=nn.Linear)
    with pytest.warns(UserWarning, match='50 of 200 weights are zero .*pruned only 20 '): sp.sparsify_layer('0', 20)

def test_what_an_optimizer_moved_proves_nothing():
    "A weight pruned earlier may be any number: with a mask of 20, 30 zeros of others are found in the second call"
    model = net()
    sp = Sparsifier(model, context='global', layer_type=nn.Linear)
    assert told(sp, 10) is None
    model[0].weight.data.fill_(5)
    model[1].weight.data.view(-1)[:30] = 0
    assert told(sp, 15) == (50, 200, 30)  # the 20 with a mask and 10 of the zeros are pruned

@pytest.mark.parametrize('context', ['local', 'global', 'lamp', 'erk'])
def test_as_if_all_were_counted(context):
    rng = random.Random(0)
    for _ in range(40):
        zeros = [rng.sample(range(SIZE), rng.choice([0, 0, 10, 50, 90])) for _ in range(2)]
        model = net(rng.choice([torch.float32, torch.bfloat16]), zeros, rng.choice([1, -1]))
        if rng.random() < .3:  # in another order in memory
            for l in model: l.weight = nn.Parameter(l.weight.data.t())
        sp   = Sparsifier(model, context=context, layer_type=nn.Linear)
        seen = told(sp, rng.choice([1, 10, 40, 50, 60, 95]))
        zero = sum(int((l.weight == 0).sum()) for l in model)
        gone = sp.masks.n_dropped
        assert seen == ((zero, 2*SIZE, gone) if zero > gone else None)

def test_layers_without_zeros_are_not_counted(monkeypatch):
    counted = []
    n_alive = Found.n_alive
    monkeypatch.setattr(Found, 'n_alive', lambda self, targets: counted.extend(t.name for t in targets)
                        or n_alive(self, targets))
    for context in ('local', 'global'):
        sp = Sparsifier(net(), context=context, layer_type=nn.Linear)
        sp.sparsify_model(50)
        assert counted == []
    sp.sparsify_model(60)
    assert counted == ['0.weight', '1.weight']  # the second call knows nothing of them
