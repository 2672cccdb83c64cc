"fastai's own learners on files and tables, end to end: masks, removal, save, load, export, compare"
import numpy as np, pandas as pd, pytest, torch, torch.nn as nn
from fastai.basics import *
from fastai.callback.all import *
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.tabular.all import Categorify, CategoryBlock, FillMissing, Normalize, RandomSplitter, TabularDataLoaders, tabular_learner
from fastai.text.all import AWD_LSTM, TextDataLoaders, awd_lstm_lm_config, awd_lstm_clas_config, language_model_learner, text_classifier_learner
from fastai.vision.all import ImageDataLoaders, PILImage, PILMask, Resize, SegmentationDataLoaders, TensorImage, unet_learner, vision_learner
from PIL import Image

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
    df  = pd.DataFrame(dict(color=rng.choice(['red', 'blue', 'green'], 160), size=rng.choice([*'SML'], 160), x=rng.normal(size=160), y=rng.normal(size=160)))
    return df.assign(good=np.where((df.color == 'red') ^ (df.x > 0), 'yes', 'no'))

def texts():
    rng = np.random.default_rng(0)
    def one(words): return ' '.join(rng.choice(words, 12))
    return pd.DataFrame([(one(['good', 'great', 'fine', 'film', 'the']), 'pos') if i % 2 else (one(['bad', 'poor', 'dull', 'film', 'the']), 'neg')
                         for i in range(80)], columns=['text', 'label'])

def ratings():
    rng = np.random.default_rng(0)
    return pd.DataFrame(dict(user=rng.integers(0, 12, 200), item=rng.integers(0, 15, 200), rating=rng.integers(1, 6, 200).astype(float)))


# --- five kinds of learners

class Small(nn.Sequential):
    "A ResNet-like network, for `vision_learner`'s `cut`: a stem, and a block with a way around it"
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Around(), nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))

class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
    def forward(self, x): return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)

def small(**kwargs): return Small()
def two_stages(**kwargs):
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()), nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))

def vision(path):
    dls = ImageDataLoaders.from_folder(write_images(path), valid='valid', bs=12, num_workers=0)
    return vision_learner(dls, small, pretrained=False, cut=-3, normalize=False, n_in=3, metrics=accuracy, lin_ftrs=[16], path=path)

def segmentation(path):
    files = sorted((write_masks(path)/'images').glob('*.png'))
    dls = SegmentationDataLoaders.from_label_func(path, files, lambda f: path/'masks'/f.name, codes=['no', 'yes'], bs=4, num_workers=0)
    return unet_learner(dls, two_stages, pretrained=False, cut=-3, normalize=False, n_out=2, path=path)

def tabular(path):
    dls = TabularDataLoaders.from_df(table(), path, procs=[Categorify, Normalize], cat_names=['color', 'size'], cont_names=['x', 'y'], y_names='good', bs=32, num_workers=0)
    return tabular_learner(dls, layers=[16, 8], metrics=accuracy, path=path)

lstm = dict(emb_sz=12, n_hid=16, n_layers=2)

def language(path):
    dls = TextDataLoaders.from_df(texts(), path, text_col='text', is_lm=True, seq_len=8, bs=8, num_workers=0)
    return language_model_learner(dls, AWD_LSTM, config={**awd_lstm_lm_config, **lstm}, pretrained=False, path=path)

def classifier(path):
    dls = TextDataLoaders.from_df(texts(), path, text_col='text', label_col='label', seq_len=8, bs=16, num_workers=0)
    return text_classifier_learner(dls, AWD_LSTM, config={**awd_lstm_clas_config, **lstm}, pretrained=False, seq_len=8, path=path)

def collab(path):
    dls = CollabDataLoaders.from_df(ratings(), bs=32, num_workers=0)
    return collab_learner(dls, use_nn=True, layers=[16, 8], y_range=(0, 5.5), path=path)
