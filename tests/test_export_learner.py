"""`learn.export_sparse`: what `learn.export` saves, with sparse weights; loaded without the training data"""
import os, subprocess, sys, warnings

import pytest, torch, torch.nn as nn
from fastai.basics import F, Learner, accuracy, set_seed
from fastai.learner import load_learner

from fasterai_clone.digits import digits_dls, digits_net
from fasterai_clone.export.all import load_sparse_learner
from fasterai_clone.sparse.all import Sparsifier, SparsifyCallback

def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)

class Tied(nn.Module):
    "Tied weights, buffers that are saved and not, a reference to a weight outside of parameters, a frozen layer"
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.b.weight, self.held = self.a.weight, [self.a.weight]
        self.head = nn.Linear(64, 10).requires_grad_(False)
        self.register_buffer('scale', torch.tensor(2.5))
        self.register_buffer('shift', torch.full((64,), .5), persistent=False)
    def forward(self, x): return self.head(self.b(self.a(x.flatten(1))*self.scale + self.shift))

def learner(net, path, **kwargs):
    set_seed(0)
    return Learner(digits_dls(n=256), net, loss_func=F.cross_entropy, path=path, metrics=accuracy, **kwargs)

def trained(net, path, sparsity=90, **kwargs):
    learn = learner(net, path, **kwargs)
    cb    = SparsifyCallback(sparsity, layer_type=(nn.Conv2d, nn.Linear), verbose=False)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=cb)
    return learn

def test_every_bit_and_every_reference_comes_back(tmp_path):
    learn = trained(Tied(), tmp_path)
    learn.export(), learn.export_sparse('sparse.pkl')
    other = load_sparse_learner(tmp_path/'sparse.pkl')
    m = other.model
    assert same(m, learn.model) and m.b.weight is m.a.weight is m.held[0] and type(m.a.weight) is nn.Parameter
    assert torch.equal(m.shift, learn.model.shift) and not m.head.weight.requires_grad and m.a.weight.requires_grad
    assert (tmp_path/'sparse.pkl').stat().st_size < .8*(tmp_path/'export.pkl').stat().st_size

def test_predictions_without_the_data(tmp_path):
    "In a process that has no data; fastai's own function reads the file too"
    learn = trained(digits_net(), tmp_path)
    file  = learn.export_sparse('sparse.pkl')
    xb    = learn.dls.valid.one_batch()[0][:9]
    with torch.no_grad(): wanted = learn.model.eval()(xb)
    torch.save(xb, tmp_path/'x.pt')
    code = f"""if True:
        import torch
        from fasterai_clone.export.all import load_sparse_learner
        learn = load_sparse_learner({str(file)!r})
        with torch.no_grad(): out = learn.model.eval()(torch.load({str(tmp_path/'x.pt')!r}))
        torch.save((out, len(learn.dls.train_ds), learn.opt is None), {str(tmp_path/'y.pt')!r})"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out, n, without = torch.load(tmp_path/'y.pt')
    assert torch.equal(out, wanted) and n == 0 and without
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert same(load_learner(file).model, learn.model)

def test_the_learner_goes_on(tmp_path):
    learn = trained(digits_net(), tmp_path)
    dls, opt, before = learn.dls, learn.opt, {k: t.clone() for k,t in learn.model.state_dict().items()}
    learn.export_sparse()
    assert learn.dls is dls and learn.opt is opt
    assert all(torch.equal(t, before[k]) for k,t in learn.model.state_dict().items())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)

def test_what_fails_leaves_the_old_file_and_the_learner(tmp_path):
    learn = trained(digits_net(), tmp_path)
    file  = learn.export_sparse()
    whole, dls, opt = file.read_bytes(), learn.dls, learn.opt
    class Bad:
        def __reduce__(self): raise RuntimeError('cannot be pickled')
    learn.extra = Bad()
    with pytest.raises(RuntimeError, match='cannot be pickled'): learn.export_sparse()
    assert file.read_bytes() == whole and learn.dls is dls and learn.opt is opt
    assert [f for f in os.listdir(tmp_path) if f.endswith('.tmp')] == []
    learn.model.add_module('odd', nn.Linear(2, 2, device='meta'))
    with pytest.raises(ValueError, match='meta'): learn.export_sparse()

def test_other_files_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path/'model.pkl')
    with pytest.raises((ValueError, AttributeError)): load_sparse_learner(tmp_path/'model.pkl')
    with pytest.raises(FileNotFoundError): load_sparse_learner(tmp_path/'none.pkl')
    with pytest.raises(TypeError): load_sparse_learner(3)
    with pytest.raises(TypeError, match='export_sparse'): learner(digits_net(), tmp_path).export_sparse(3)

def test_before_training_and_in_half_precision(tmp_path):
    net = digits_net().half()
    Sparsifier(net).sparsify_model(50)
    learn = learner(net, tmp_path)
    assert same(load_sparse_learner(learn.export_sparse()).model, net)
