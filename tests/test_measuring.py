"How scores are measured: what a convolution's taps meet, in which mode, on which batches, and whether a path is left"
import dataclasses, math, warnings
from collections import UserDict, namedtuple
from copy import deepcopy
from functools import partial

import pytest, torch, torch.nn as nn, torch.nn.functional as F
from fastai.basics import DataLoaders, Learner, OptimWrapper
from fastai.losses import CrossEntropyLossFlat
from torch.utils.data import DataLoader, TensorDataset

from fasterai_clone.core.measure import *
from fasterai_clone.sparse.all import *
from fasterai_clone.sparse.sparsifier import LayerCollapse, Sparsifier

def close(a, b, tol=1e-5): return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=tol, atol=tol)
def weights(net): return {k: p for k,p in net.named_parameters() if k.endswith('weight')}
def a_gradient(w, g): return g


# What each tap of a kernel meets

def naive_taps(m, x):
    "The norm of the derivative by each weight alone: the loss Σ out with all weights zero but one is that weight times what it meets"
    x, norms, one = x.double(), torch.zeros(m.weight.shape, dtype=torch.float64), deepcopy(m).double()
    one.bias = None
    for i in range(m.weight.numel()):
        one.weight.data.zero_().view(-1)[i] = 1
        norms.view(-1)[i] = one(x).detach().square().sum().sqrt()  # each output is one of the values it meets, or nothing
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
        return F.conv2d(F.pad(x, [p for l in reversed(lack) for p in (l//2, l - l//2)]), self.weight, self.bias, self.stride)

def test_taps_of_a_convolution_that_pads_itself():
    m, x = SamePadding(2, 2, (3, 4), stride=2), torch.randn(2, 2, 6, 7)
    assert close(input_norms(m, weights(m), x)['weight'], naive_taps(m, x))

def test_masks_follow_the_taps():
    "The middle tap is the only one that meets anything, so its small weight is kept"
    net = nn.Sequential(nn.Conv1d(1, 1, 3, padding=1, bias=False))
    net[0].weight.data = torch.tensor([[[9., 0.1, 9.]]])
    Sparsifier(net, criteria='wanda', layer_type=nn.Conv1d, data=torch.tensor([[[3.]]])).sparsify_model(67)
    assert net[0].weight.flatten().tolist() == pytest.approx([0, 0.1, 0])
