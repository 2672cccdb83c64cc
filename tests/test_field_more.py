"""More siblings of the reports from the field: checkpoints, counts and layers as people have them, with values that can
be checked by hand"""
from argparse import Namespace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest, torch, torch.nn as nn

from fasterai_clone.cli import load_tensors, sparsity_report
from fasterai_clone.model.flops import multiply_adds
from fasterai_clone.sparse.all import Sparsifier
from fasterai_clone.sparse.checkpoint import report_tensors, weights_in


# -- checkpoints ------------------------------------------------------------------------------------

def dense(): return nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 2)).state_dict()
def zeroed(): return {k: v.index_fill(0, torch.arange(5), 0) if k == '0.weight' else v for k,v in dense().items()}
def half(): return torch.cat([torch.zeros(5, 20), torch.ones(5, 20)])
def counted(state, file):
    torch.save(state, file)
    r = report_tensors(load_tensors(file, next(iter(weights_in(state)))))
    return r.zeros, r.params

beside = dict(class_weights=torch.ones(3, 3), anchors=torch.zeros(4, 4), losses=torch.rand(9, 2),
              confusion_matrix=torch.zeros(3, 3))

@pytest.mark.parametrize('name', beside)
@pytest.mark.parametrize('place', ['model', 'my_own_name'])
def test_tensors_beside_a_model_are_not_taken_for_it(name, place, tmp_path, capsys):
    "Of 20·10 + 10·2 = 220 weights, 5·20 are zero"
    state = {name: beside[name], 'epoch': 3, place: zeroed()}
    assert counted(state, tmp_path/'x.pth') == (100, 220)
    sparsity_report.__wrapped__(tmp_path/'x.pth')
    assert capsys.readouterr().out.startswith(f'Counted: {place}. The file also has')
    assert counted(state | {place: dense(), 'optimizer': {'state': zeroed()}}, tmp_path/'x.pth') == (0, 220)

def test_the_largest_of_unusual_names_comes_first():
    state = dict(statistics=dict(mean=torch.ones(1, 3)), mine=dense(), ema=dict(module=zeroed()))
    assert [*weights_in(state)] == ['mine', 'ema.module', 'statistics']
    assert [*weights_in(state | dict(model=dict(w=torch.ones(1, 2))))][0] == 'model'

def test_a_state_dict_with_more_inside_comes_first():
    "What a module stores with `get_extra_state` is no model"
    extra = {'0._extra_state': dict(amax=torch.ones(40, 40)), 'config': dict(prior=torch.ones(2, 2))}
    assert [*weights_in(zeroed() | extra)] == ['', 'config']

@pytest.mark.parametrize('args', [Namespace(lr=0.1), Path('runs/3'), np.float32(0.3), dict(path=[Path('a')])])
def test_options_in_a_checkpoint_are_read(args, tmp_path):
    assert counted(dict(model=zeroed(), args=args, epoch=3), tmp_path/'x.pth') == (100, 220)

@pytest.mark.parametrize('place', ['', 'model'])
def test_weights_as_numpy_arrays(place, tmp_path):
    arrays = {k: v.numpy() for k,v in zeroed().items()} | dict(names=np.array(['a', 'b']), other=np.ones((2, 2), 'c16'))
    state  = {place: arrays, '__author__': 'someone'} if place else arrays
    assert counted(state, tmp_path/'x.pth') == (100, 224)

class Custom:
    def __reduce__(self): return print, ('code has run',)

@pytest.mark.parametrize('what, name', [(Custom(), ''), (nn.ReLU(), 'torch.nn.modules.activation.ReLU')])
def test_what_is_refused_is_named(what, name, tmp_path, capsys):
    torch.save(dict(model=zeroed(), other=what), tmp_path/'x.pth')
    with pytest.raises(SystemExit, match=f'refused .*{name}.*model.state_dict'):
        sparsity_report.__wrapped__(tmp_path/'x.pth')
    assert capsys.readouterr().out == ''

@pytest.mark.parametrize('name', ['0.mask', '0.weight_mask', '0.mask_weight'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bool, torch.uint8])
def test_masks_that_a_layer_of_the_user_stores(name, dtype, tmp_path):
    "The mask is no weight, and what it hides is zero"
    state = dense() | {name: half().to(dtype)}
    assert counted(state, tmp_path/'x.pth') == counted(dict(model=state), tmp_path/'x.pth') == (100, 220)
    text = str(report_tensors(state))
    assert f'weight × mask, where 0 means pruned: 0.weight × {name}' in text
    assert [r.name for r in report_tensors(state).rows] == ['0.weight', '2.weight']

@pytest.mark.parametrize('mask, n', [(half()/2, 420), (half().T.contiguous(), 420), (torch.zeros(10, 4), 260)])
def test_what_only_looks_like_a_mask(mask, n):
    "Other values or another shape: counted as it is saved"
    r = report_tensors(dense() | {'0.mask': mask})
    assert r.params == n and not r.notes and r.rows[0].zeros == 0


# -- multiply-adds ----------------------------------------------------------------------------------

class Reads(nn.Module):
    "A recurrent layer, the steps first, and what reads its output"
    def __init__(self, read, kind=nn.LSTM):
        super().__init__()
        self.rnn, self.head, self.read = kind(3, 4), nn.Linear(4, 2), read
    def forward(self, x): return self.head(self.read(self.rnn(x)[0]))

@pytest.mark.parametrize('steps, items', [(7, 3), (7, 1), (3, 7), (5, 5)])
@pytest.mark.parametrize('read', [lambda y: y[-1], lambda y: y.mean(0), lambda y: y.amax(0)])
def test_the_steps_of_a_sequence_are_no_items(read, steps, items):
    "4 gates of 4 units read 3 inputs and 4 states in each step, and two classes read 4 units"
    counts = multiply_adds(Reads(read), torch.randn(steps, items, 3))
    assert (counts.items, dict(counts)) == (items, {'rnn': steps*4*4*(3 + 4), 'head': 4*2})

def test_items_that_no_output_shows():
    "A loss has no axis for the items: the first axis of the input is the batch"
    counts = multiply_adds(Reads(lambda y: y), torch.randn(6, 3, 3))
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)
        def forward(self, x): return self.layer(x).pow(2).mean()
    assert counts.total == 6*(4*4*7 + 8)
    loss = multiply_adds(Loss(), torch.randn(6, 5, 3))
    assert (loss.items, loss.total) == (6, 5*12)


# -- optimizers -------------------------------------------------------------------------------------

class Outer:
    "The optimizer is two objects further in"
    def __init__(self, opt): self.inner = Namespace(opt=opt)
    def step(self): self.inner.opt.step()

def test_hold_says_what_to_pass():
    net = nn.Sequential(nn.Linear(4, 6))
    opt = torch.optim.SGD(net.parameters(), 0.1)
    sp  = Sparsifier(net, layer_type=nn.Linear)
    sp.sparsify_model(50)
    for several in ([opt], (opt,), dict(a=opt)):
        with pytest.raises(TypeError, match='takes one optimizer, got a .*call `hold` for each'): sp.hold(several)
    with pytest.raises(TypeError, match='Outer has no attribute with one. Pass the optimizer that steps inside'):
        sp.hold(Outer(opt))
    with sp.hold(opt):
        net(torch.ones(2, 4)).sum().backward()
        Outer(opt).step()
    assert int((net[0].weight == 0).sum()) == 12


# -- a weight that the module around its layer reads -------------------------------------------------

class Around(nn.Module):
    "A layer, read by the module that contains it; what else it has changes nothing at first, as in LoRA"
    def __init__(self, layer, use):
        super().__init__()
        self.base, self.use = layer, use
        n = layer.weight[0].numel()
        self.a, self.b = nn.Parameter(torch.rand(1, n)), nn.Parameter(torch.zeros(len(layer.weight), 1))
    def forward(self, x):
        w = self.base.weight
        if self.use == 'called':    return self.base(x.to(w.dtype))
        if self.use == 'plain':     return nn.functional.linear(x, w)
        if self.use == 'scaled':    return nn.functional.linear(x, nn.functional.normalize(w))
        if self.use == 'transposed': return x @ w.T
        if self.use == 'convolved': return nn.functional.conv2d(x, w + (self.b @ self.a).view_as(w))
        if self.use == 'centred':   return nn.functional.linear(x, w - w.mean(1, keepdim=True))
        return nn.functional.linear(x, w + self.b @ self.a)

@pytest.mark.parametrize('use', ['added', 'centred', 'convolved'])
def test_a_weight_that_the_module_around_changes_is_refused(use):
    "Half of the weights of `base` would be zero, and none of those that are used"
    layer = nn.Conv2d(3, 4, 3) if use == 'convolved' else nn.Linear(6, 5)
    net, kinds = nn.Sequential(Around(layer, use), nn.Linear(5, 2)), (nn.Linear, nn.Conv2d)
    with pytest.raises(ValueError, match="0.base.*the `forward` of Around, which contains it, changes the weight.*"
                                         "`exclude='0.base'`"):
        Sparsifier(net, layer_type=kinds)
    sp = Sparsifier(net, layer_type=nn.Module)
    assert [t.name for t in sp.targets] == ['1.weight'] and 'Around' in sp.left_out['0.base']
    assert [t.name for t in Sparsifier(net, layer_type=kinds, exclude='0.base').targets] == ['1.weight']

@pytest.mark.parametrize('use', ['called', 'plain', 'scaled', 'transposed'])
def test_a_weight_that_the_module_around_only_reads_or_scales_stays(use):
    net = nn.Sequential(Around(nn.Linear(6, 5), use), nn.Linear(5, 2))
    sp  = Sparsifier(net, layer_type=nn.Linear)
    sp.sparsify_model(50)
    assert int((net[0].base.weight == 0).sum()) == 15

def test_whole_filters_that_the_module_around_centres_stay_zero():
    net = nn.Sequential(Around(nn.Linear(6, 5), 'centred'), nn.Linear(5, 2))
    Sparsifier(net, 'filter', layer_type=nn.Linear)
    with pytest.raises(ValueError, match='or choose granularity "filter"'): Sparsifier(net, layer_type=nn.Linear)

def test_a_module_around_with_a_length_of_zero_is_looked_at_too():
    class Empty(Around):
        def __len__(self): return 0
    with pytest.raises(ValueError, match='the `forward` of Empty, which contains it'):
        Sparsifier(Empty(nn.Linear(6, 5), 'centred'), layer_type=nn.Linear)

class Helped(Around):
    "Changes the weight outside of `forward`, in one of the ways that code does"
    @property
    def centred(self): return self.base.weight - self.base.weight.mean(1, keepdim=True)
    @cached_property
    def once(self): return self.centred
    @classmethod
    def of(cls, layer): return layer.weight - layer.weight.mean(1, keepdim=True)
    def by_name(self): return self.centred
    def forward(self, x):
        if self.use == 'property': w = self.centred
        elif self.use == 'cached': w = self.once
        elif self.use == 'classmethod': w = self.of(self.base)
        elif self.use == 'getattr': w = getattr(self, 'by_' + 'name')()
        else: w = torch.stack([row - row.mean() for l in (self.base,) for row in l.weight])
        return nn.functional.linear(x, w)

@pytest.mark.parametrize('use', ['property', 'cached', 'classmethod', 'getattr', 'comprehension'])
def test_a_weight_that_changes_outside_of_forward_is_refused(use):
    with pytest.raises(ValueError, match='the `forward` of Helped, which contains it'):
        Sparsifier(Helped(nn.Linear(6, 5), use), layer_type=nn.Linear)

def test_a_module_around_that_only_initialises_its_layers_is_not_run():
    "As in torchvision's ResNet: a run of the whole network for each layer would cost time, and a copy of all weights"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 4, 3)
            nn.init.ones_(self.conv1.weight)
        def reset(self): self.conv1.weight.data.fill_(1)
        def forward(self, x):
            runs.append(x.shape)
            return self.conv1(x)
    runs = []
    assert [t.name for t in Sparsifier(Net()).targets] == ['conv1.weight'] and runs == []
