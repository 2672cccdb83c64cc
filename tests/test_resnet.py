"The laws on torchvision's ResNet-18 in a `vision_learner`, ten epochs on images"
import math
from fractions import Fraction
from functools import cache, partial

import numpy as np, pytest, torch, torch.nn as nn
from fastai.vision.all import ImageDataLoaders, set_seed, vision_learner
from PIL import Image
from torchvision.models import resnet18

from fasterai_clone.sparse.all import *
from helpers import column, layers, lines, sizes, spy, zeros

indices = [2, 8, 11, 14, 17, 21, 24, 27, 30, 33, 37, 40, 43, 46, 49, 53, 56, 59, 62, 65]

printed = dict(
    one_shot  = [0, 0, 0, 0, 90, 90, 90, 90, 90, 90],
    iterative = [0, 0, 30, 30, 60, 60, 60, 90, 90, 90],
    agp       = [0, 0, 29.71, 52.03, 68.03, 78.75, 85.25, 88.59, 89.82, 90],
    five      = [0, 0, 18, 36, 36, 54, 72, 72, 90, 90])
asked = {**printed, 'agp': [0, 0, *[90*(1 - (1 - Fraction(k, 8))**3) for k in range(1, 9)]]}
schedules = dict(one_shot=one_shot, iterative=iterative, agp=agp, five=partial(iterative, n_steps=5))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Ten images of noise, of two classes"
    path, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype='uint8')).save(path/f'{"ab"[i % 2]}_{i}.png')
    return path

def label(name): return name[0]

@pytest.fixture(scope='module')
def trained(folder):
    "name of a schedule → learner and callback after ten epochs, zeros when each validation started, text"
    @cache
    def train(name):
        import contextlib, io
        set_seed(0, reproducible=True)
        dls = ImageDataLoaders.from_name_func(folder, sorted(folder.glob('*.png')), label, valid_pct=0.2, seed=0,
                                              bs=4, num_workers=0)
        learn = vision_learner(dls, resnet18, pretrained=False, path=folder)
        learn.unfreeze()
        keys, seen, out = list(learn.model.state_dict()), [], io.StringIO()
        cb = SparsifyCallback(sparsity=90, granularity='weight', context='local', criteria=large_final,
                              schedule=schedules[name])
        with contextlib.redirect_stdout(out):
            learn.fit(10, 1e-3, cbs=[cb, spy('before_validate', lambda: seen.append(zeros(learn.model)))])
        assert len(dls.train) == 2 and list(learn.model.state_dict()) == keys
        return learn, cb, seen, out.getvalue()
    return train


@pytest.mark.parametrize('name', schedules)
def test_measured_is_printed_and_is_law_3(trained, name):
    learn, cb, seen, out = trained(name)
    n = sizes(learn.model)
    assert seen == [[math.floor(k*Fraction(s)/100) for k in n] for s in asked[name]]
    assert lines(out) == list(enumerate(printed[name]))
    assert [round(100*sum(z)/sum(n), 2) for z in seen] == printed[name]
    assert column(learn) == [h['sparsity'] for h in cb.history] == [100*sum(z)/sum(n) for z in seen]

@pytest.mark.parametrize('name', schedules)
def test_zeros_of_all_twenty_convolutions(trained, name):
    learn, cb, *_ = trained(name)
    n = sizes(learn.model)
    assert len(n) == 20 and sum(n) == 11_166_912
    assert [r.zeros for r in cb.report.rows] == zeros(learn.model) == [9*k//10 for k in n]
    assert sum(zeros(learn.model)) == cb.report.zeros == 10_050_211
    assert [m.dtype for m in cb.sparsifier.masks.values()] == [torch.bool]*20

def test_layers_are_numbered_as_in_modules(trained):
    learn, cb, *_ = trained('agp')
    assert [r.layer for r in cb.report.rows] == [f'Layer {i}' for i in indices]
    modules = list(learn.model.named_modules())
    assert [modules[i][1] for i in indices] == layers(learn.model)
    assert [modules[i][0] for i in indices] == [r.name for r in cb.report.rows]

def test_what_is_printed_to_the_letter(trained):
    learn, cb, _, text = trained('agp')
    out  = text.splitlines()
    rule = '-'*80
    assert out[0] == 'Pruning of weight until a sparsity of [90]%'
    k = out.index('Sparsity Report:')
    assert out[k-2:k] == ['Final Sparsity: [90.0]%', ''] and '\n'.join(out[k:]) == str(cb.report)
    assert out[k:k+5] == ['Sparsity Report:', rule,
                          'Layer                Type            Params     Zeros      Sparsity', rule,
                          'Layer 2              Conv2d          9,408      8,467         90.00%  0.0']
    assert out[k+24:k+26] == [rule, 'Overall              all             11,166,912 10,050,211    90.00%']
    assert out[k+23] == 'Layer 65             Conv2d          2,359,296  2,123,366     90.00%  0.7.1.conv2'

def test_report_says_what_is_left_dense(trained):
    learn, cb, _, text = trained('agp')
    total = sum(p.numel() for p in learn.model.parameters())
    assert cb.report.total == total and f'Covers 11,166,912 of {total:,} parameters' in text
    assert {n for n,*_ in cb.report.dense} == {n for n,p in learn.model.named_parameters() if p.ndim != 4}
    assert 'BatchNorm2d: ' in text and 'Linear: ' in text

def test_nothing_of_ours_on_the_modules(trained):
    learn, *_ = trained('agp')
    fresh = resnet18()
    conv  = next(m for m in learn.model.modules() if isinstance(m, nn.Conv2d))
    assert set(vars(conv)) == set(vars(fresh.conv1))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())
    assert 'sparsity' not in [m.name for m in learn.metrics]
