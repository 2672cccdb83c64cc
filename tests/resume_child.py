"""Resumes trainings in a process of its own: `python resume_child.py folder` reads cases from there and writes final
weights"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import json, sys, warnings
from pathlib import Path
warnings.filterwarnings('ignore')
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, defaults, set_seed
from fastai.callback.progress import ProgressCallback
torch.set_num_threads(1)
defaults.callbacks = [c for c in defaults.callbacks if c is not ProgressCallback]


def without_the_library(folder, file):
    "What a colleague sees who has fastai only"
    from torch import nn
    from fastai.basics import DataLoader, DataLoaders
    plain = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    learn = Learner(DataLoaders(*[DataLoader(list(range(4)), bs=2)]*2), plain, CrossEntropyLossFlat(), path=folder)
    learn.load(file)
    assert not any(m.startswith('fasterai_clone') for m in sys.modules)
    torch.save(plain.state_dict(), folder/'plain.pt')

def main(folder):
    without_the_library(folder, 'small')
    from fasterai_clone.sparse.all import SparsifyCallback
    from helpers import learner
    ends = {}
    for i,case in enumerate(json.loads((folder/'cases.json').read_text())):
        learn = learner(n=64, seed=100 + i, path=folder)  # other weights, other random numbers
        learn.load(case['file'])
        set_seed(1000 + i)
        cb = SparsifyCallback(80, verbose=False, **case['kwargs'])
        with learn.no_logging(): learn.fit(case['n_epoch'], 1e-2, cbs=cb, start_epoch=case['start_epoch'])
        ends[case['file']] = dict(weights=learn.model.state_dict(), history=cb.history)
    torch.save(ends, folder/'ends.pt')

if __name__ == '__main__': main(Path(sys.argv[1]))
