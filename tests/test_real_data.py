"fastai's own learners on files and tables, end to end: masks, removal, save, load, export, compare"
from functools import cache, partial

import numpy as np, pandas as pd, pytest, torch, torch.nn as nn
from fastai.basics import CategoryBlock, ColReader, DataBlock, RandomSplitter, accuracy, load_learner, set_seed
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.all import (AWD_LSTM, TextBlock, TextDataLoaders, awd_lstm_clas_config, awd_lstm_lm_config,
                             language_model_learner, text_classifier_learner)
from fastai.vision.all import ImageDataLoaders, SegmentationDataLoaders, TensorImage, unet_learner, vision_learner
from PIL import Image

from fasterai_clone.model.run import tensors_in
from fasterai_clone.prune.all import *
from fasterai_clone.sparse.all import *


# --- five kinds of data, written by the tests

def write_images(folder):
    "48 images of 3 kinds, 32 × 32, by folder"
    rng = np.random.default_rng(0)
    for i in range(48):
        kind = i % 3
        pixels = rng.integers(0, 90, (32, 32, 3))
        pixels[..., kind] += 120
        path = folder/('valid' if i >= 36 else 'train')/'abc'[kind]/f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder

def write_masks(folder):
    "16 images with a bright square, and where that is"
    rng = np.random.default_rng(0)
    for name in ('images', 'masks'): (folder/name).mkdir(parents=True)
    for i in range(16):
        pixels, mask = rng.integers(0, 90, (32, 32, 3)), np.zeros((32, 32))
        y, x = rng.integers(0, 20, 2)
        pixels[y:y+12, x:x+12] += 120
        mask[y:y+12, x:x+12] = 1
        Image.fromarray(pixels.astype(np.uint8)).save(folder/'images'/f'{i}.png')
        Image.fromarray(mask.astype(np.uint8)).save(folder/'masks'/f'{i}.png')
    return folder

def table():
    rng = np.random.default_rng(0)
    df  = pd.DataFrame(dict(color=rng.choice(['red', 'blue', 'green'], 160), size=rng.choice([*'SML'], 160),
                            x=rng.normal(size=160), y=rng.normal(size=160)))
    return df.assign(good=np.where((df.color == 'red') ^ (df.x > 0), 'yes', 'no'))

def texts():
    rng = np.random.default_rng(0)
    def one(words): return ' '.join(rng.choice(words, 12))
    return pd.DataFrame([(one(['good', 'great', 'fine', 'film', 'the']), 'pos') if i % 2
                         else (one(['bad', 'poor', 'dull', 'film', 'the']), 'neg')
                         for i in range(80)], columns=['text', 'label'])

def ratings():
    rng = np.random.default_rng(0)
    return pd.DataFrame(dict(user=rng.integers(0, 12, 200), item=rng.integers(0, 15, 200),
                             rating=rng.integers(1, 6, 200).astype(float)))


# --- five kinds of learners

class Around(nn.Module):
    "Two convolutions, and a way around them"
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
    def forward(self, x): return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)

def conv(i, o): return nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()
def head(): return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)
def small_resnet(**kwargs): return nn.Sequential(*conv(3, 8), Around(), *conv(8, 16), *head())
def two_stages(**kwargs): return nn.Sequential(nn.Sequential(*conv(3, 8)), nn.Sequential(*conv(8, 16)), *head())

@cache
def images_of(path): return ImageDataLoaders.from_folder(write_images(path), valid='valid', bs=12, num_workers=0)

def vision(path):
    return vision_learner(images_of(path), small_resnet, pretrained=False, cut=-3, normalize=False, lin_ftrs=[16],
                          metrics=accuracy, path=path)

def mask_of(folder, file): return folder/file.name

@cache
def masks_of(path):
    files = sorted((write_masks(path)/'images').glob('*.png'))
    return SegmentationDataLoaders.from_label_func(path, files, partial(mask_of, path/'masks'), codes=['no', 'yes'],
                                                   bs=4, num_workers=0)

def segmentation(path):
    return unet_learner(masks_of(path), two_stages, pretrained=False, cut=-3, normalize=False, n_out=2, path=path)

@cache
def table_of(path):
    return TabularDataLoaders.from_df(table(), path, procs=[Categorify, Normalize], cat_names=['color', 'size'],
                                      cont_names=['x', 'y'], y_names='good', bs=32, num_workers=0)

def tabular(path): return tabular_learner(table_of(path), layers=[16, 8], metrics=accuracy, path=path)

@cache
def texts_of(path, is_lm):
    blocks = [TextBlock.from_df('text', is_lm=is_lm, seq_len=8, n_workers=0)] + ([] if is_lm else [CategoryBlock])
    block  = DataBlock(blocks=blocks, get_x=ColReader('text'), get_y=None if is_lm else ColReader('label'),
                       splitter=RandomSplitter(0.2, seed=0))
    return TextDataLoaders.from_dblock(block, texts(), path=path, seq_len=8, bs=8, num_workers=0)

sizes = dict(emb_sz=12, n_hid=16, n_layers=2)

def language(path):
    return language_model_learner(texts_of(path, True), AWD_LSTM, config={**awd_lstm_lm_config, **sizes},
                                  pretrained=False, path=path)

def classifier(path):
    return text_classifier_learner(texts_of(path, False), AWD_LSTM, config={**awd_lstm_clas_config, **sizes},
                                   pretrained=False, seq_len=8, path=path)

@cache
def ratings_of(path): return CollabDataLoaders.from_df(ratings(), bs=32, num_workers=0, path=path)

def collab(path):
    return collab_learner(ratings_of(path), use_nn=True, emb_szs={'user': 6, 'item': 8}, layers=[16, 8],
                          y_range=(0, 5.5), path=path)

kinds = dict(vision=vision, segmentation=segmentation, tabular=tabular, language=language,
             classifier=classifier, collab=collab)

# layer → (inputs, outputs) after half of the filters of each group are removed; embeddings have none, and the outputs
# of the model stay
halves = dict(
    vision       = {'0.0': (3, 4), '0.3.conv1': (4, 4), '0.3.conv2': (4, 4), '0.4': (4, 8),
                    '1.4': (16, 8), '1.8': (8, 3)},
    segmentation = {'layers.3.0.0': (8, 16), 'layers.3.1.0': (16, 8)},
    tabular      = {'embeds.0': (4, 3), 'embeds.1': (4, 3), 'layers.0.0': (8, 8), 'layers.1.0': (8, 4),
                    'layers.2.0': (4, 2)},
    classifier   = {'1.layers.0.2': (36, 25), '1.layers.1.2': (25, 2)},
    collab       = {'embeds.0': (13, 6), 'embeds.1': (16, 8), 'layers.0.0': (14, 8), 'layers.1.0': (8, 4),
                    'layers.2.0': (4, 1)})


@pytest.fixture(scope='module')
def make(tmp_path_factory):
    "A function that makes the same learner of a kind each time, on data that is written once"
    folders = {k: tmp_path_factory.mktemp(k) for k in kinds}
    def f(kind):
        set_seed(0, reproducible=True)
        return kinds[kind](folders[kind])
    return f

def fit(learn, *cbs, n=2):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-2, cbs=list(cbs))
    return learn

def inputs(learn):
    b = learn.dls.valid.one_batch()
    return b[:learn.dls.n_inp] if learn.dls.n_inp > 1 else b[0]

@torch.no_grad()
def outputs(model, x):
    if hasattr(model, 'reset'): model.reset()
    return tensors_in(model.eval()(*x) if isinstance(x, tuple) else model(x))

def close(a, b):
    return len(a) == len(b) and all(s.shape == t.shape and torch.allclose(s, t, atol=1e-5) for s,t in zip(a, b))
def n_params(model): return sum(p.numel() for p in model.parameters())
def width(m):
    return (m.num_embeddings, m.embedding_dim) if isinstance(m, nn.Embedding) else tuple(m.weight.shape[:2][::-1])
def widths(model, kind): return {k: width(model.get_submodule(k)) for k,w in halves[kind].items() if w}

def goes_on(learn):
    "Saved, loaded, exported and trained again it is the same network"
    x = inputs(learn)
    want = outputs(learn.model, x)
    learn.save('saved')
    with torch.no_grad():
        for p in learn.model.parameters(): p.zero_()
    learn.load('saved')
    assert close(outputs(learn.model, x), want)
    learn.export('exported.pkl')
    assert close(outputs(load_learner(learn.path/'exported.pkl').model, x), want)
    fit(learn, n=1)


@pytest.mark.parametrize('granularity', ['weight', 'filter'])
@pytest.mark.parametrize('kind', kinds)
def test_masks(make, kind, granularity):
    "Half of the weights or filters of each layer that has some, rounded down"
    learn = make(kind)
    if kind in ('vision', 'segmentation'): assert isinstance(inputs(learn), TensorImage)
    cb = SparsifyCallback(50, granularity, layer_type=nn.Module, verbose=False)
    fit(learn, cb)
    params = dict(learn.model.named_parameters(remove_duplicate=False))
    names  = [t.name for t in cb.sparsifier.targets]
    assert names
    for k in names:
        zero = params[k] == 0
        if granularity == 'filter': zero = zero.flatten(1).all(1)
        assert int(zero.sum()) == zero.numel() // 2, k
    goes_on(learn)

def test_the_language_model_is_masked_in_the_weights_that_are_used(make):
    """`WeightDropout` keeps the recurrent weights as `weight_hh_l0_raw`; in eval mode they are what the LSTM computes
    with"""
    learn = make('language')
    cb = SparsifyCallback(50, 'weight', layer_type=nn.Module, verbose=False)
    fit(learn, cb)
    outputs(learn.model, inputs(learn))
    for rnn in learn.model[0].rnns:
        raw, used = rnn.weight_hh_l0_raw, rnn.module.weight_hh_l0
        assert int((raw == 0).sum()) == raw.numel() // 2 and torch.equal(raw, used)

@pytest.mark.parametrize('kind', halves)
def test_coupled_masks_and_thin(make, kind):
    learn = make(kind)
    cb = SparsifyCallback(50, 'filter', layer_type=nn.Module, coupled=True, verbose=False)
    fit(learn, cb)
    x     = inputs(learn)
    small = thin(learn.model.eval(), example_inputs=x)
    assert widths(small, kind) == {k: w for k,w in halves[kind].items() if w}
    assert close(outputs(small, x), outputs(learn.model, x))
    report = compare(learn.model, small, x, runs=1)
    assert (report.before.params, report.after.params) == (n_params(learn.model), n_params(small))
    assert n_params(small) < n_params(learn.model) and report.after.multiply_adds < report.before.multiply_adds
    goes_on(learn)

@pytest.mark.parametrize('kind', halves)
def test_prune_callback(make, kind):
    "With default arguments, in the middle of training"
    learn = make(kind)
    dense, x = n_params(learn.model), inputs(learn)
    shapes = [t.shape for t in outputs(learn.model, x)]
    fit(learn, PruneCallback(50, verbose=False))
    assert widths(learn.model, kind) == {k: w for k,w in halves[kind].items() if w}
    assert n_params(learn.model) < dense and [t.shape for t in outputs(learn.model, x)] == shapes
    goes_on(learn)

@pytest.mark.parametrize('cb', [SparsifyCallback(50, 'filter', layer_type=nn.Module, coupled=True, verbose=False),
                                PruneCallback(50, verbose=False)])
def test_the_states_of_a_language_model_have_sizes(make, cb):
    """Its embedding is tied to the output, and its LSTMs go on from states with as many units as they began with:
    nothing can be removed"""
    with pytest.raises(ValueError, match='no channel can'): fit(make('language'), cb)

def test_resnet18(make):
    "The real one, with the head of `vision_learner`"
    from torchvision.models import resnet18
    set_seed(0)
    learn = vision_learner(make('vision').dls, resnet18, pretrained=False, metrics=accuracy)
    x = inputs(learn)
    assert isinstance(x, TensorImage)
    model = learn.model.eval()
    groups = coupled_groups(model, x)
    assert [g.n for g in groups if not g.why_not] == [64, 64, 64, 128, 128, 128, 256, 256, 256, 512, 512, 512, 512]
    assert [(g.n, g.why_not) for g in groups if g.why_not] == [(3, 'it is the output of the model')]
    Sparsifier(model, 'filter', layer_type=nn.Module, coupled=True, example_inputs=x).sparsify_model(50)
    small = thin(model, example_inputs=x)
    assert (small[0][0].out_channels, small[1][4].in_features, small[1][4].out_features,
            small[1][8].out_features) == (32, 512, 256, 3)
    assert close(outputs(small, x), outputs(model, x))
