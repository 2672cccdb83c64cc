"""Files that version 0.1.0 wrote, in `data/0.1.0`: each can be read, and a training goes on from it.

`python tests/test_old_files.py FOLDER` writes such files with the version that is installed."""
import shutil, sys
from pathlib import Path

import torch, torch.nn as nn
from fasterai_clone.core.masks import Masks
from fasterai_clone.prune.all import *
from fasterai_clone.sparse.all import *
from fasterai_clone.sparse.ticket_files import ticket_info
from helpers import learner, spy, zeros

OLD = Path(__file__).parent/'data'/'0.1.0'

def net():
    "Weights -36, -35, ... in order, so that a reader can tell which are there"
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3))
    model[0].weight.data = torch.arange(-36., 36.).reshape(4, 2, 3, 3)
    model[4].weight.data = torch.arange(12.).reshape(3, 4)
    return model.eval()

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 4, batch_first=True)
        for p in self.parameters(): p.data = torch.arange(float(p.numel())).reshape(p.shape)/p.numel()
    def forward(self, x): return self.inner(x, x, x, need_weights=False)[0]

def image(): return torch.ones(1, 2, 3, 3)

def thinned(model, x, **kwargs):
    Sparsifier(model, layer_type=nn.Module, **kwargs).sparsify_model(50)
    return thin(model, example_inputs=x)

def write(folder):
    "What is in `data/0.1.0`"
    folder.mkdir(parents=True, exist_ok=True)
    model = net()
    masks = Masks({'0.weight': model[0].weight.detach().abs() > 18, '4.weight': model[4].weight.detach() > 3})
    masks.save(folder/'masks')
    save_ticket(folder/'ticket', model.state_dict(), masks, words='hello', epoch=3)
    save_thinned(thinned(net(), image(), granularity='filter', exclude='4', coupled=True, example_inputs=image()),
                 folder/'thinned')
    save_thinned(thinned(Attention(), torch.ones(1, 3, 8), granularity='head'), folder/'attention')
    for name,cb in ('sparsify', SparsifyCallback(80, context='global', criteria='movement')), (
        'prune', PruneCallback(50)):
        learn = learner(width=2, path=folder, model_dir='.')
        learn.fit(2, 1e-2, cbs=[cb, spy('after_validate', lambda: learn.epoch == 0 and learn.save(name), order=61)])

def test_masks():
    masks = Masks.load(OLD/'masks.safetensors', net())
    assert masks.sparsity == 100*(37 + 4)/84
    assert torch.equal(masks['0.weight'].flatten(), torch.arange(-36, 36).abs() > 18)
    assert masks['4.weight'].tolist() == [[False]*4, [True]*4, [True]*4]

def test_ticket():
    model = net()
    for p in model.parameters(): p.data.zero_()
    masks = load_ticket(OLD/'ticket.safetensors', model)
    assert int((model[0].weight == 0).sum()) == 37 and model[4].weight.tolist() == [[0]*4, [4, 5, 6, 7], [8, 9, 10, 11]]
    assert torch.equal(masks['0.weight'], model[0].weight != 0)
    about = ticket_info(OLD/'ticket.safetensors')
    assert (about['version'], about['words'], about['epoch']) == (1, 'hello', 3)

def test_thinned():
    "The two filters of the smallest mean size go: those around zero"
    small = load_thinned(net, OLD/'thinned.safetensors')
    assert small[0].weight.shape == (2, 2, 3, 3) and small[1].num_features == 2 and small[4].in_features == 2
    assert torch.equal(small[0].weight, net()[0].weight[[0, 3]])
    assert small(image()).shape == (1, 3)

def test_thinned_attention():
    small, x = load_thinned(Attention, OLD/'attention.safetensors'), torch.rand(2, 3, 8)
    whole = Attention().eval()
    Sparsifier(whole, 'head', layer_type=nn.Module).sparsify_model(50)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in whole.parameters())
    torch.testing.assert_close(small.eval()(x), whole(x))

def checkpoint(folder, name):
    shutil.copy(OLD/f'{name}.pth', folder)
    return learner(width=2, seed=5, path=folder, model_dir='.')

def test_checkpoint_of_sparsify_callback(tmp_path):
    learn = checkpoint(tmp_path, 'sparsify')
    seen, cb = [], SparsifyCallback(80, context='global', criteria='movement', verbose=False)
    learn.load('sparsify')
    learn.fit(2, 1e-2, cbs=[cb, spy('before_train', lambda: seen.append(sum(zeros(learn.model))))], start_epoch=1)
    assert 0 < seen[-1] < sum(zeros(learn.model)) == int(0.8*sum(m.weight.numel()
                                                                 for m in learn.model if isinstance(m, nn.Conv2d)))

def test_checkpoint_of_prune_callback(tmp_path):
    learn = checkpoint(tmp_path, 'prune')
    cb, seen = PruneCallback(50), []
    learn.load('prune')
    with learn.no_bar():
        learn.fit(2, 1e-2, cbs=[cb, spy('before_train', lambda: seen.append(widths(learn.model)))], start_epoch=1)
    assert widths(learn.model) == [1, 2, 4] and all(n >= m for n,m in zip(seen[-1], [1, 2, 4]))

def widths(model): return [m.out_channels for m in model if isinstance(m, nn.Conv2d)]

if __name__ == '__main__': write(Path(sys.argv[1]))
