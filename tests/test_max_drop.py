"Pruning that stops when validation falls"
import math
import pytest, torch
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, set_seed
from fastai.callback.core import Callback
from fasterai_clone.digits import digits_dls, digits_net
from fasterai_clone.sparse.all import SparsifyCallback


def learner(epochs_of=None):
    set_seed(0, reproducible=True)
    return Learner(digits_dls(), digits_net(width=4), loss_func=CrossEntropyLossFlat())

class Weights(Callback):
    "Copies of the weights at the end of each epoch, before our callback acts"
    order = 65
    def before_fit(self): self.at = []
    def after_epoch(self): self.at.append({k: p.detach().clone() for k,p in self.model.state_dict().items()})

def scripted(monkeypatch, values):
    "The metric is `values`, one after the other, at the start and after each epoch"
    from fasterai_clone.sparse import max_drop_callback as room
    values = iter(values)
    monkeypatch.setattr(room, 'validated', lambda learn, metric: next(values))

def fitted(monkeypatch, values, n=5, **kwargs):
    scripted(monkeypatch, values)
    learn, seen = learner(), Weights()
    cb = SparsifyCallback(80, schedule='lin', max_drop=1, metric=accuracy, verbose=False, **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-2, cbs=[cb, seen])
    return learn, cb, seen

def levels(cb): return [round(h['sparsity']) for h in cb.history]

def test_goes_back_to_the_last_that_held(monkeypatch):
    learn, cb, seen = fitted(monkeypatch, [.9, .95, .941, .9404, .1])
    assert levels(cb) == [16, 32, 48, 32, 32]  # 0.9404 is 1.01 % below 0.95; what comes after is not measured
    assert 'accuracy was 0.9404 at the end of epoch 2' in cb.report.notes[-1] and 'Back to epoch 1' in str(cb.report)
    zero = {k: seen.at[1][k] == 0 for k in cb.sparsifier.masks}
    assert all(torch.equal(z, ~cb.sparsifier.masks[k]) for k,z in zero.items())

def test_weights_are_those_of_that_epoch(monkeypatch):
    learn, cb, seen = fitted(monkeypatch, [.9, .9, .9, .1], n=3)
    assert all(torch.equal(p, seen.at[1][k]) for k,p in learn.model.state_dict().items())

def test_back_to_dense(monkeypatch):
    _, cb, _ = fitted(monkeypatch, [.9, math.nan, .9], n=2)
    assert levels(cb) == [40, 0] and not cb.sparsifier.masks and 'Back to the start, with 0.00%' in cb.report.notes[-1]

def test_nothing_happens_while_it_holds_or_masks_stay(monkeypatch):
    _, cb, _ = fitted(monkeypatch, [.9, .9, .1, .1], n=3, end_epoch=1)  # falls after pruning has ended
    assert levels(cb) == [80, 80, 80] and not cb.report.notes

@pytest.mark.parametrize('values', [[.9, .9, .9, .1], [.9, .1]])
def test_resumes(monkeypatch, tmp_path, values):
    whole, cb, _ = fitted(monkeypatch, values, n=4)
    class AtEpochOne(Callback):
        order = 80
        def after_epoch(self):
            if self.epoch == 1: self.learn.save('mid')
    scripted(monkeypatch, values)
    first, a = learner(), SparsifyCallback(80, schedule='lin', max_drop=1, metric=accuracy, verbose=False)
    first.path = tmp_path
    with first.no_bar(), first.no_logging(): first.fit(4, 1e-2, cbs=[a, AtEpochOne()])
    scripted(monkeypatch, values[3:])
    again, b = learner(), SparsifyCallback(80, schedule='lin', max_drop=1, metric=accuracy, verbose=False)
    again.path = tmp_path
    again.add_cb(b)
    again.load('mid')
    with again.no_bar(), again.no_logging(): again.fit(4, 1e-2, start_epoch=2)
    assert levels(b) == levels(cb) and b.report.notes == cb.report.notes != ()
    assert all(torch.equal(p, again.model.state_dict()[k]) for k,p in first.model.state_dict().items())

def test_as_without_while_nothing_falls():
    def weights(**kwargs):
        learn, cb = learner(), SparsifyCallback(80, verbose=False, **kwargs)
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=cb)
        return learn.model.state_dict()
    with_it, without = weights(max_drop=99, metric=accuracy), weights()
    assert all(torch.equal(p, without[k]) for k,p in with_it.items())

@pytest.mark.parametrize('given, error, says', [
    (dict(max_drop=1), ValueError, 'belong together'), (dict(metric=accuracy), ValueError, 'belong together'),
    (dict(max_drop=-1, metric=accuracy), ValueError, 'in percent'),
    (dict(max_drop=True, metric=accuracy), ValueError, 'in percent'),
    (dict(max_drop=1, metric='accuracy'), TypeError, 'function of outputs'),
    (dict(max_drop=1, metric=accuracy, lth=True), ValueError, 'choose one')])
def test_refused_at_once(given, error, says):
    with pytest.raises(error, match=says): SparsifyCallback(80, **given)

def test_a_metric_that_fails_is_refused_before_training():
    learn, seen = learner(), []
    class Step(Callback):
        def before_batch(self): seen.append(self.iter)
    def broken(out): return 1.
    cb = SparsifyCallback(80, max_drop=1, metric=broken, verbose=False)
    with pytest.raises(ValueError, match=r'broken\(outputs, targets\) failed'), learn.no_bar():
        learn.fit(1, cbs=[cb, Step()])
    assert not seen
