"""Siblings of the faults of files from anywhere and of models that change, found by a reader who had not written the
fixes"""
import io, zipfile
from copy import deepcopy

import pytest, torch, torch.nn as nn

from fasterai_clone.prune.all import PruneCallback
from fasterai_clone.sparse.all import *
from helpers import learner, spy

def quiet(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(*args, **kwargs)

# Compact steps and `weight.data = ...`

OPTIMIZERS = [lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9), lambda ps: torch.optim.Adam(ps, lr=0.1)]

def held(make, compact=True):
    model = nn.Sequential(nn.Linear(6, 5))
    sp, opt = Sparsifier(model, layer_type=nn.Linear), make(model.parameters())
    sp.sparsify_model(50)
    hold = sp.hold(opt, compact)
    def step():
        w = model[0].weight
        model(torch.randn(3, w.shape[1], dtype=w.dtype)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    step()
    return model, sp, hold, step

@pytest.mark.parametrize('compact', [False, True])
@pytest.mark.parametrize('make', OPTIMIZERS)
def test_other_memory_for_a_weight_is_noticed(make, compact):
    model, sp, hold, step = held(make, compact)
    model[0].weight.data = torch.ones(5, 6)
    step()
    assert (model[0].weight == 0).sum() == 15 and torch.equal(model[0].weight != 0, sp.masks['0.weight'])

@pytest.mark.parametrize('make', OPTIMIZERS)
def test_writes_to_data_are_zero_after_release(make):
    model, sp, hold, step = held(make)
    model[0].weight.data.add_(1.)
    step()
    hold.release()
    assert torch.equal(model[0].weight != 0, sp.masks['0.weight'])

@pytest.mark.parametrize('change', [nn.Module.double, nn.Module.bfloat16])
def test_compact_steps_follow_the_dtype(change):
    model, sp, hold, step = held(OPTIMIZERS[0])
    change(model)
    old = model[0].weight.detach().clone()
    step()
    assert not torch.equal(model[0].weight, old) and torch.equal(model[0].weight != 0, sp.masks['0.weight'])

@pytest.mark.parametrize('cols', [3, 7])
def test_another_shape_is_refused_by_name_with_compact_steps(cols):
    model, sp, hold, step = held(OPTIMIZERS[0])
    model[0].weight.grad, model[0].weight.data = None, torch.randn(5, cols)
    with pytest.raises(ValueError, match='0.weight.*shape'): step()
    hold.release()  # does not fail either

def test_another_shape_in_a_compact_fit_is_refused_by_name():
    learn = learner()
    def change(): learn.model[6].weight.data = torch.randn(3, 3, 3, 3)
    cb = SparsifyCallback(50, schedule=one_shot, start_epoch=0, compact=True, verbose=False)
    with pytest.raises(ValueError, match='6.weight.*shape'):
        quiet(learn, 2, 1e-2, cbs=[cb, spy('after_step', change, order=-20)])

# Checkpoints of `PruneCallback`

@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    learn = learner(path=tmp_path_factory.mktemp('pruned'), cbs=PruneCallback(30, verbose=False))
    quiet(learn, 2, 1e-2)
    return learn.save('good', with_opt=False)

def damaged(file, change_state=None, change_weights=None):
    "A copy of `file` with other states or weights"
    with zipfile.ZipFile(file) as z:
        entry = next(n for n in z.namelist() if n.endswith('/fasterai_clone.pt'))
        states = torch.load(io.BytesIO(z.read(entry)), weights_only=True)
    weights = torch.load(file, weights_only=True)
    if change_state: states[0] = change_state(deepcopy(states[0]))
    if change_weights: weights = change_weights(weights)
    torch.save(weights, out := file.with_name('bad.pth'))
    torch.save(states, data := io.BytesIO())
    with zipfile.ZipFile(out, 'a') as z: z.writestr('bad/fasterai_clone.pt', data.getvalue())
    return out

def without_parameters(s): return {**s, 'at_first': {**s['at_first'], 'params': 0}}
def everything_goes(s):    return {**s, 'goal': dict.fromkeys(s['goal'], 100.)}
def without_sizes(s):      return {k: v for k,v in s.items() if k != 'sizes'}
def nothing(s):            return {}

@pytest.mark.parametrize('change', [without_parameters, everything_goes, without_sizes, nothing])
def test_states_that_no_training_could_have(change, checkpoint):
    file  = damaged(checkpoint, change)
    learn = learner(path=file.parent.parent, cbs=PruneCallback(30, verbose=False))
    sizes = [p.shape for p in learn.model.parameters()]
    with pytest.raises(ValueError, match=r'bad\.pth, entry fasterai_clone\.pt\[0\]'): learn.load('bad', with_opt=False)
    assert [p.shape for p in learn.model.parameters()] == sizes

@pytest.mark.parametrize('dtype', [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_of_another_kind_are_not_converted(dtype, checkpoint):
    file  = damaged(checkpoint, change_weights=lambda ws: {k: w.to(dtype) if w.ndim == 4 else w for k,w in ws.items()})
    learn = learner(path=file.parent.parent)
    old   = {k: v.clone() for k,v in learn.model.state_dict().items()}
    with pytest.raises(ValueError, match='bad.pth.*0.weight.*floating-point'): learn.load('bad', with_opt=False)
    assert all(torch.equal(old[k], v) for k,v in learn.model.state_dict().items())

def test_weights_of_another_precision_are_loaded(checkpoint):
    file  = damaged(checkpoint, change_weights=lambda ws: {k: w.half() if w.ndim == 4 else w for k,w in ws.items()})
    learn = learner(path=file.parent.parent)
    learn.load('bad', with_opt=False)
    assert learn.model[0].weight.dtype == torch.float32 and learn.model[0].weight.shape[0] == 3
