"What users rely on beside the documented calls: found when the rooms of `Sparsifier` and the callbacks were split"
import warnings

import pytest, torch, torch.nn as nn
from fastai.basics import Learner

from fasterai_clone.core.masks import Masks
from fasterai_clone.digits import digits_dls
from fasterai_clone.sparse.all import KeepSparsity, Sparsifier, SparsifyCallback, find_ticket, one_shot
from helpers import learner

def lines(n=2): return nn.Sequential(*[nn.Linear(8, 8) for _ in range(n)])

def fit(learn, n, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, **kwargs)

def test_two_masks_of_one_memory_lose_no_zero():
    "With several threads, whatever their order"
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        net = nn.Sequential(nn.Linear(2048, 2048, bias=False), nn.Linear(2048, 2048, bias=False))
        net[1].weight = net[0].weight
        a, b = torch.ones(2048, 2048, dtype=torch.bool), torch.ones(2048, 2048, dtype=torch.bool)
        a[::2], b[1::2] = False, False
        for _ in range(5):
            with torch.no_grad(): net[0].weight.fill_(1)
            Masks({'0.weight': a, '1.weight': b}).apply(net)
            assert int(net[0].weight.count_nonzero()) == 0
    finally: torch.set_num_threads(threads)

def test_an_update_of_given_pools_follows_a_replaced_layer():
    net = lines()
    sp  = Sparsifier(net, layer_type=nn.Linear)
    sp.sparsify_model(25)
    net[0] = nn.Linear(8, 8)
    sp.update([32, 32], sp.pools)
    assert [int((m.weight == 0).sum()) for m in net] == [32, 32]

def test_all_pools_given_are_as_none_given():
    "A criterion that measures in rounds makes the same rounds"
    found = []
    for pools in (False, True):
        torch.manual_seed(0)
        sp = Sparsifier(lines(), 'weight', 'global', 'synflow', layer_type=nn.Linear, data=torch.ones(1, 8))
        sp.update(sp.counts(90), sp.pools if pools else None)
        found.append((sp.updates, {k: m.tolist() for k,m in sp.masks.items()}))
    assert found[0] == found[1] and found[0][0] > 1

@pytest.mark.parametrize('name', 'late plan active epochs past course stepping checked random rewind held'.split())
def test_a_model_with_a_part_of_a_name_of_ours(name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(name, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
        def forward(self, x): return self.get_submodule(name)(x)
    learn = Learner(digits_dls(64, n=64), Net(), loss_func=nn.CrossEntropyLoss())
    def new(): return SparsifyCallback(50, layer_type=nn.Linear, verbose=False)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*shadowing')
        fit(learn, 1, cbs=new())
        fit(learn, 1, cbs=[KeepSparsity(), new()])
    part = learn.model.get_submodule(name)
    assert int((part[1].weight == 0).sum()) == 320 and getattr(learn, name) is part
    assert not [cb for cb in learn.cbs if type(cb).__name__ in ('Late', 'SparsifyCallback', 'KeepSparsity')]

class Mine(SparsifyCallback): "A class derived from ours"

def test_a_subclass_beside_its_base_resumes_its_own_state(tmp_path):
    def both():
        return [SparsifyCallback(50, include='0', schedule=one_shot, verbose=False),
                Mine(70, include='3', schedule=one_shot, verbose=False)]
    learn = learner(n=64)
    learn.path = tmp_path
    fit(learn, 1, cbs=(cbs := both()))
    learn.add_cbs(cbs)
    learn.save('two')
    again = learner(n=64)
    again.path = tmp_path
    again.load('two')
    fit(again, 2, start_epoch=1, cbs=both())
    zero = {n: round(100*float((m.weight == 0).float().mean())) for n,m in again.model.named_modules()
            if isinstance(m, nn.Conv2d)}
    assert (zero['0'], zero['3']) == (50, 70)

def test_what_was_set_after_construction_holds(capsys):
    cb = SparsifyCallback(50, lth=True, schedule=one_shot(start_pct=0.7))
    cb.rewind_epoch = 1
    fit(learner(n=64), 3, cbs=cb)
    assert 'Saving Weights at epoch 1' in capsys.readouterr().out
    cb.history = []
    assert cb.history == []

def test_parts_of_a_sparsifier_can_be_set():
    sp = Sparsifier(lines(), layer_type=nn.Linear, criteria='movement')
    sp.refs, sp.seen = {k: torch.zeros(8, 8) for k in sp.params}, []
    sp.sparsify_model(50)
    assert (sp.sparsity, sp.scorer.seen) == (50, [])

def test_a_search_that_fails_leaves_a_model_of_one_dtype():
    "Also one that was converted meanwhile: its weights are as before, and buffers follow"
    learn = learner(n=64)
    before = {k: t.clone() for k,t in learn.model.state_dict().items()}
    def fails(learn, n_epoch, lr):
        learn.model.double()
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): find_ticket(learn, 1, sparsity=50, rounds=1, fit=fails, verbose=False)
    state = learn.model.state_dict()
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float64}
    assert all(torch.equal(state[k].to(t.dtype), t) for k,t in before.items())
