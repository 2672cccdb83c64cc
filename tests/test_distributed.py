"Two processes that train one model together have the same masks at every step"
import copy, os, pickle, re
from unittest.mock import patch

import pytest, torch, torch.distributed as dist, torch.nn as nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP
from fasterai_clone.sparse.measure import as_criteria, available_criterias
from fasterai_clone.sparse.all import Sparsifier, SparsifyCallback, Schedule
from helpers import exact, fit_for, learner, naive_keep, spy
from processes import main, start

ASKED = 20, 40, 60, 50  # percent, after each step: once down, too


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3),
                         nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8*16, 10))

def batch(rank, step):
    g = torch.Generator().manual_seed(100*rank + step)
    return torch.randn(8, 1, 8, 8, generator=g), torch.randint(10, (8,), generator=g)

def copied(sp):
    "Masks, references and weights as they are now"
    def clones(d): return {k: v.clone() for k,v in d.items()}
    return dict(masks=clones(sp.masks), refs=clones(sp.refs), used=set(sp.used), updates=sp.updates,
                weights=clones(sp.params))

def loop(model, criteria, rank, **kwargs):
    "Four steps of a training of one's own; what there is after each"
    g  = fit_for(criteria)
    sp = Sparsifier(model, g, criteria=criteria, loss_func=cross_entropy,
                    data=None if as_criteria(criteria).reference in (None, 'init', 'update') else
                    [batch(rank, s) for s in (90, 91)], **kwargs)
    opt, found = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01), []
    torch.manual_seed(rank)  # other dropout, and other random scores
    with sp.hold(opt):
        for step,s in enumerate(ASKED):
            x, y = batch(rank, step)
            cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
            sp.sparsify_model(s)
            found.append(copied(sp))
    return found


class Compiled(nn.Module):
    "In the place of `torch.compile`, which takes long to import"
    def __init__(self, m):
        super().__init__()
        self._orig_mod = m
    def forward(self, x): return self._orig_mod(x)


# What the processes do: each function runs in all of them, and its result comes back from each

def plain(rank, world): return {c: loop(DDP(net()), c, rank) for c in available_criterias()}

def compact(rank, world):
    model = DDP(net())
    sp = Sparsifier(model, criteria='random')
    sp.sparsify_model(50)
    opt, found = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), []
    with sp.hold(opt, compact=True):
        for step in range(3):
            x, y = batch(rank, step)
            cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
            if step == 1: sp.sparsify_layer('4', 75)
            found.append(copied(sp))
    return found

def drawn(rank, world):
    "Random masks, with what is drawn; and without `DistributedDataParallel`"
    torch.manual_seed(10 + rank)
    model = DDP(net())
    sp = Sparsifier(model, 'weight', 'local', 'random')
    torch.manual_seed(10 + rank)
    scores = [torch.rand(t.weight.shape) for t in sp.targets]
    torch.manual_seed(10 + rank)
    sp.sparsify_model(50)
    alone = Sparsifier(model.module, criteria='random')
    alone.sparsify_model(50)
    return scores, dict(sp.masks), dict(alone.masks)

def largest(rank, world):
    model = DDP(net())
    before = [t.weight.detach().clone() for t in Sparsifier(model).targets]
    sp = Sparsifier(model, context='global')
    sp.sparsify_model(70)
    return before, dict(sp.masks)

def unwrapped_is_silent(rank, world):
    "Nothing may be sent if the model is of this process alone: the other process does not come along here"
    if rank == 0: return None
    with (patch.object(dist, 'broadcast', side_effect=AssertionError),
          patch.object(dist, 'broadcast_object_list', side_effect=AssertionError)):
        for c in available_criterias(): loop(net(), c, rank)
        sp = Sparsifier(net())
        sp.sparsify_model(50)
        sp.print_sparsity()
    return sp.masks.n_dropped

def names(rank, world):
    "DistributedDataParallel around a compiled model with a compiled part"
    model = net()
    model[4] = Compiled(model[4])
    sp = Sparsifier(DDP(Compiled(model)), criteria='random')
    sp.sparsify_model(50)
    sp.print_sparsity()
    return list(sp.masks), [r.name for r in sp.report().rows]

def failures(rank, world):
    "One process after the other has data that cannot be read"
    said = []
    def broken():
        yield batch(0, 0)
        raise ZeroDivisionError(f'no more data in process {rank}')
    for bad in (0, 1):
        model = DDP(net())
        sp = Sparsifier(model, criteria='snip', loss_func=cross_entropy, data=[batch(rank, 0)])
        sp.sparsify_model(30)
        before, sp.data = copied(sp), broken() if rank == bad else [batch(rank, 1)]
        try: sp.sparsify_model(60)
        except Exception as e: said.append((type(e).__name__, str(e), before, copied(sp)))
        else: said.append((None, None, before, copied(sp)))
        sp.data = [batch(rank, 2)]
        sp.sparsify_model(70)
        said[-1] += (copied(sp),)
    return said

def refused(rank, world):
    "What no process can do is refused in all, and so is what a criterion refuses in the first"
    sp, said = Sparsifier(DDP(net()), criteria='gradient'), []
    for f in (lambda: sp.sparsify_model(101), lambda: sp.sparsify_model(50), lambda: sp.sparsify_layer('nine', 50)):
        try: f()
        except ValueError as e: said.append(str(e))
    return said

def synced(rank, world):
    "`SyncBatchNorm` waits for other processes, which do not come when one measures"
    model = DDP(net())
    nn.SyncBatchNorm.convert_sync_batchnorm(model)  # only now: `DistributedDataParallel` refuses it on CPUs
    sp = Sparsifier(model, 'filter', criteria='synflow', data=batch(rank, 0))
    sp.sparsify_model(50)
    return dict(sp.masks), [vars(m).get('forward') for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]

def copies(rank, world):
    sp = Sparsifier(DDP(net()), criteria='random')
    sp.sparsify_model(50)
    other = pickle.loads(pickle.dumps(sp)) if rank else copy.deepcopy(sp)
    other.sparsify_model(60)  # each for itself
    return sp.masks.n_dropped, other.masks.n_dropped

def _on_cpu(self, t, rank):
    "What fastai does on the GPU"
    t = torch.tensor(t)
    dist.broadcast(t, rank)
    return t.tolist()

def _fit(learn, cb):
    "What the callback held after each step"
    found = []
    def look():
        if learn.training: found.append(copied(cb.sparsifier))
    with learn.distrib_ctx(sync_bn=False, cpu=True):
        learn.fit(2, 0.1, cbs=[cb, spy('after_batch', look)])
    return found

def fastai(rank, world):
    from fastai.distributed import DistributedDL
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1',
                      MASTER_PORT='29511', ACCELERATE_USE_CPU='true')
    found = {}
    with patch.object(DistributedDL, '_broadcast', _on_cpu):
        for c in available_criterias():
            learn = learner(n=64, model=net(), metrics=[])
            torch.manual_seed(rank)
            with learn.no_bar(), learn.no_logging():
                found[c] = _fit(learn, SparsifyCallback(60, fit_for(c), criteria=c, schedule='lin', verbose=False))
    return found

def fastai_data(rank, world):
    "`dls` as the data to measure with: inside of `fit` its loaders are those of all processes"
    from fastai.distributed import DistributedDL
    learn = learner(n=64, model=net(), metrics=[])
    with patch.object(DistributedDL, '_broadcast', _on_cpu), learn.no_bar(), learn.no_logging():
        return _fit(learn, SparsifyCallback(60, criteria='snip', schedule='one_shot', data=learn.dls, verbose=False))

def fastai_prints(rank, world):
    from fastai.distributed import DistributedDL
    learn = learner(n=64, model=net(), metrics=[])
    with patch.object(DistributedDL, '_broadcast', _on_cpu), learn.no_bar(), learn.no_logging():
        cb = SparsifyCallback(60, 'filter', 'global', criteria='random')
        _fit(learn, cb)
    return [r.name for r in cb.report.rows], cb.report.group_sparsity

class Odd(nn.Module):
    "A model that cannot be traced without inputs"
    def __init__(self):
        super().__init__()
        self.body = net()
    def forward(self, x): return self.body(x) if x.sum() < 1e9 else x

def fastai_untraced(rank, world):
    from fastai.distributed import DistributedDL
    learn = learner(n=64, model=Odd(), metrics=[])
    with patch.object(DistributedDL, '_broadcast', _on_cpu), learn.no_bar(), learn.no_logging():
        return _fit(learn, SparsifyCallback(60, 'filter', criteria='random', verbose=False))

def fastai_again(rank, world):
    "First a fit of each process alone, then one of both with the same callback, then one alone again"
    from fastai.distributed import DistributedDL
    learn = learner(n=64, model=net(), metrics=[])
    cb = SparsifyCallback(60, criteria='random', schedule=Schedule(lambda start, end, pos: start + pos*(end - start)),
                          verbose=False)
    learn.add_cb(cb)
    with patch.object(DistributedDL, '_broadcast', _on_cpu), learn.no_bar(), learn.no_logging():
        learn.fit(1)
        cb.sparsifier.sparsify_model(0)
        torch.manual_seed(rank)
        with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(1)
        found = copied(cb.sparsifier)
        if rank == 0: cb.sparsifier.sparsify_model(80)  # nobody else is asked
    return found

def fastai_tickets(rank, world):
    from fastai.distributed import DistributedDL
    from safetensors.torch import load_file
    learn = learner(n=64, model=net(), metrics=[])
    with patch.object(DistributedDL, '_broadcast', _on_cpu), learn.no_bar(), learn.no_logging():
        _fit(learn, SparsifyCallback(50, criteria='random', schedule='one_shot', lth=True,
                                     save_tickets=True, verbose=False))
    dist.barrier()
    return list(load_file('models/winning_ticket_50.00.safetensors')), list(learn.model.state_dict())

CASES = [plain, compact, drawn, largest, unwrapped_is_silent, names, failures, refused, synced, copies, fastai,
         fastai_data, fastai_prints, fastai_untraced, fastai_again, fastai_tickets]
if __name__ == '__main__': main(CASES)


# What is asked of the results

@pytest.fixture(scope='module')
def ranks(tmp_path_factory): return start(__file__, 2, tmp_path_factory.mktemp('ranks'))

@pytest.fixture
def both(ranks): return lambda case: [r[case.__name__][0] for r in ranks]

def alike(a, b):
    "The same, tensors bit for bit"
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return list(a) == list(b) and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(alike, a, b))
    return a == b

def n_dropped(found): return [sum(int((~m).sum()) for k,m in f['masks'].items()
                                       if k.removeprefix('body.') in ('0.weight', '4.weight')) for f in found]

@pytest.mark.parametrize('criteria', available_criterias())
def test_masks_and_references_are_the_same_after_each_step(both, criteria):
    a, b = [r[criteria] for r in both(plain)]
    assert alike(a, b)
    sizes = ((4, 9), (8, 36)) if fit_for(criteria) == 'filter' else ((36, 1), (288, 1))
    assert n_dropped(a) == [sum(exact(n, s) * size for n,size in sizes) for s in ASKED]
    for f in a: assert all(not f['weights'][k][~m].any() for k,m in f['masks'].items())

def test_compact_steps_and_single_layers(both):
    a, b = both(compact)
    assert alike(a, b) and n_dropped(a) == [18 + 144, 18 + 216, 18 + 216]

def test_random_masks_are_those_the_first_process_draws(both):
    (scores, masks, alone), (others, also, other) = both(drawn)
    assert alike([naive_keep(s, s.numel()//2) for s in scores], list(masks.values())) and alike(masks, also)
    assert not alike(scores, others) and not alike(alone, other)  # left to themselves they differ

def test_magnitude_against_a_naive_reference(both):
    (weights, masks), (_, also) = both(largest)
    keep = naive_keep(torch.cat([w.abs().flatten() for w in weights]), exact(324, 70)).split([36, 288])
    assert all(torch.equal(k, m.flatten()) for k,m in zip(keep, masks.values())) and alike(masks, also)

def test_nothing_is_sent_without_DistributedDataParallel(both): assert both(unwrapped_is_silent) == [None, 18 + 144]

def test_names_are_plain_and_one_process_prints(ranks, both):
    assert both(names) == [(['0.weight', '4.weight'], ['0', '4'])] * 2
    assert ['Sparsity Report' in r['names'][1] for r in ranks] == [True, False]

def test_what_fails_in_the_first_process_is_raised_in_all(both):
    (a, fine), (b, also) = both(failures)
    assert a[:2] == ('ZeroDivisionError', 'no more data in process 0')
    assert b[:2] == ('RuntimeError', 'no more data in process 0')
    assert alike(a[2], a[3]) and alike(a[2:], b[2:])                   # nothing has changed, and it can go on
    assert fine[:2] == (None, None) and alike(fine, also)              # the data of the second one is not looked at

def test_what_is_refused_is_refused_in_all(both):
    a, b = both(refused)
    assert a == b and 'from 0 to 100' in a[0] and 'gradient of 0.weight' in a[1] and "Unknown layer 'nine'" in a[2]

def test_one_process_measures_through_SyncBatchNorm(both):
    a, b = both(synced)
    assert alike(a, b) and a[1] == [None, None] and sum(int((~m).sum()) for m in a[0].values()) > 0

def test_copies_and_pickles_are_of_one_process(both): assert both(copies) == [(18 + 144, 21 + 172)] * 2

@pytest.mark.parametrize('criteria', available_criterias())
def test_fastai_has_the_same_masks_at_every_step(both, criteria):
    a, b = [r[criteria] for r in both(fastai)]
    assert len(a) == 2 * 64//16//2 and alike(a, b)
    n = 5 if fit_for(criteria) == 'filter' else None
    assert n_dropped(a)[-1] == (2*9 + 4*36 if n else exact(36, 60) + exact(288, 60))

def test_fastai_measures_with_its_own_loaders(both):
    a, b = both(fastai_data)
    assert alike(a, b) and n_dropped(a)[-1] == exact(36, 60) + exact(288, 60)

def test_the_callback_prints_in_one_process(ranks, both):
    assert both(fastai_prints) == [(['0', '4'], 100 * 7/12)] * 2
    first, second = [r['fastai_prints'][1] for r in ranks]
    assert re.findall(r'^Sparsity at the end of epoch (\d)', first, re.M) == ['0', '1'] and 'Final Sparsity' in first
    assert second == ''

def test_a_model_is_traced_with_inputs_of_one_process(both):
    a, b = both(fastai_untraced)
    assert alike(a, b) and n_dropped(a)[-1] == 2*9 + 4*36 and 'body.1.bias' in a[-1]['masks']

def test_one_callback_in_a_fit_alone_and_in_one_of_both(both):
    a, b = both(fastai_again)
    assert alike(a['masks'], b['masks']) and n_dropped([a]) == [exact(36, 60) + exact(288, 60)]

def test_tickets_have_plain_names(both):
    for saved, names in both(fastai_tickets): assert sorted(saved) == sorted(names)
