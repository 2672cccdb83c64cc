"A training run that is stopped and resumed in another process ends with the weights of one that never stopped"
import copy, io, json, os, pickle, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch, torch.nn as nn
from fastai.basics import (CancelFitException, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, OptimWrapper,
                           SGD, ranger, set_seed)
from fastai.callback.all import GradientClip, MixUp, SaveModelCallback
from fasterai_clone.sparse.all import *
from fasterai_clone.sparse.measure import available_criterias
from fasterai_clone.fit.checkpoint import read_state
from helpers import exact, fit_for, images, learner, same, sizes, spy, weights, zeros

SCHEDULES = ['one_shot', 'iterative', 'agp', 'one_cycle', 'dsd']
N_EPOCH   = 4


def saver(name='e'):
    "Saves each epoch that trains, where `SaveModelCallback` would"
    def save(): cb.learn.save(f'{name}{cb.learn.epoch}')
    cb = spy('after_validate', save, order=61)
    return cb

def resumed(file, start, make, kwargs, lr=1e-2, fit='fit', cbs=(), n_epoch=N_EPOCH):
    """The learner and callback of a run that continues from `file`, with other weights and random numbers to begin
    with"""
    set_seed(99)
    learn, cb = make(7), SparsifyCallback(80, verbose=False, **kwargs)
    torch.rand(13)
    learn.load(file)
    getattr(learn, fit)(n_epoch, lr, cbs=[cb, *cbs], start_epoch=start)
    return learn, cb


# In another process, every criterion with two of the schedules, and every schedule with several criteria

PAIRS = [(c, SCHEDULES[(i + j) % len(SCHEDULES)]) for i,c in enumerate(available_criterias()) for j in (0, 2)]

@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    "Uninterrupted training runs here, the same ones resumed in one other process"
    folder, cases, ends = tmp_path_factory.mktemp('resume'), [], {}
    learn = Learner(DataLoaders(*[DataLoader(list(range(4)), bs=2)]*2),
                    nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)),
                    CrossEntropyLossFlat(), path=folder)
    learn.create_opt()
    learn.cbs.append(type('Marked', (), dict(state_to_save=lambda self: dict(epoch=1), order=0))())
    learn.save('small')
    ends['small'] = weights(learn.model)
    for i,(criteria,schedule) in enumerate(PAIRS):
        start  = 1 + i % (N_EPOCH - 1)
        kwargs = dict(criteria=criteria, schedule=schedule, granularity=fit_for(criteria),
                      context='local' if i % 2 else 'global')
        case   = dict(file=f'{criteria}-{schedule}-{start - 1}', start_epoch=start, n_epoch=N_EPOCH, kwargs=kwargs)
        learn, cb = learner(n=64, path=folder), SparsifyCallback(80, verbose=False, **kwargs)
        def save():
            if learn.epoch == start - 1: learn.save(case['file'])
        with learn.no_logging(): learn.fit(N_EPOCH, 1e-2, cbs=[cb, spy('after_validate', save, order=61)])
        ends[case['file']] = dict(weights=weights(learn.model), history=cb.history)
        cases.append(case)
    (folder/'cases.json').write_text(json.dumps(cases))
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get('PYTHONPATH', '')])
    run  = subprocess.run([sys.executable, here/'resume_child.py', folder], env={**os.environ, 'PYTHONPATH': path},
                          capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder, ends, torch.load(folder/'ends.pt', weights_only=True)

@pytest.mark.parametrize('criteria', available_criterias())
def test_resumed_in_a_new_process_bit_for_bit(two_processes, criteria):
    _, ours, theirs = two_processes
    found = [k for k in ours if k.split('-')[0] == criteria]
    assert len(found) == 2
    for k in found:
        assert same(ours[k]['weights'], theirs[k]['weights']), k
        assert ours[k]['history'] == theirs[k]['history'] and len(ours[k]['history']) == N_EPOCH, k

def test_fastai_without_the_library_reads_the_file(two_processes):
    folder, ends, _ = two_processes
    assert same(torch.load(folder/'plain.pt', weights_only=True), ends['small'])
    assert read_state(folder/'models/small.pth') == [dict(epoch=1)]


# Together with other parts of a training run

class Noisy(nn.Module):
    "Batch norm, dropout, an embedding-like table, tied weights and a buffer that is not saved"
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.3)
        self.same, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)
        self.again = self.same
        self.register_buffer('calls', torch.zeros(()), persistent=False)
    def forward(self, x):
        if self.training: self.calls += 1
        x = self.drop(self.norm(self.conv(x)).relu())
        return self.head(self.again(self.same(x).relu()).mean((2, 3)))

def noisy(seed=0, **kwargs):
    images()
    set_seed(seed, reproducible=True)
    return learner(n=64, seed=seed, model=Noisy(), **kwargs)

OPTIMS = dict(adam={}, sgd=dict(opt_func=SGD), ranger=dict(opt_func=ranger),
              adamw=dict(opt_func=lambda ps, **kw: OptimWrapper(ps, torch.optim.AdamW, **kw)))

@pytest.mark.parametrize('kwargs', [{}, dict(every=3), dict(compact=True, end_epoch=1),
                                    dict(schedule='iterative', start_epoch=1, end_epoch=4, lth=True, rewind_epoch=1),
                                    dict(schedule='iterative', lth=True, rewind_step=2),
                                    dict(schedule='one_shot', reset_end=True),
                                    dict(granularity='filter', context='global'),
                                    dict(context='erk', params=['weight', 'bias'], criteria='updating_movement'),
                                    dict(nm=(2, 4), exclude='conv')],
                         ids=lambda kw: '-'.join(kw) or 'plain')
@pytest.mark.parametrize('start', [1, 3])
def test_resumes_with(kwargs, start):
    if kwargs.get('nm'): kwargs = dict(kwargs, start_sparsity=0, schedule=lin)
    sparsity = 50 if kwargs.get('nm') else 80
    learn, cb = noisy(), SparsifyCallback(sparsity, verbose=False, **kwargs)
    learn.fit_one_cycle(N_EPOCH, 1e-2, cbs=[cb, saver(), MixUp(), GradientClip(0.5)])
    set_seed(99)
    again, cb2 = noisy(7), SparsifyCallback(sparsity, verbose=False, **kwargs)
    again.load(f'e{start - 1}')
    again.fit_one_cycle(N_EPOCH, 1e-2, cbs=[cb2, MixUp(), GradientClip(0.5)], start_epoch=start)
    assert same(weights(learn.model), weights(again.model))
    assert cb2.history == cb.history and cb2.sparsifier.masks == cb.sparsifier.masks

@pytest.mark.parametrize('optim', OPTIMS)
def test_resumes_with_optimizer(optim):
    make = lambda seed=0: noisy(seed, **OPTIMS[optim])
    learn, cb = make(), SparsifyCallback(80, verbose=False)
    learn.fit(N_EPOCH, 1e-2, cbs=[cb, saver()])
    again, _ = resumed('e1', 2, make, {})
    assert same(weights(learn.model), weights(again.model))

def test_compact_steps_leave_a_whole_optimizer_in_the_checkpoint():
    learn, seen = noisy(), []
    def look():
        compact = bool(cb.compaction)
        state   = torch.load(learn.save('x'), weights_only=False)['opt']['state']
        seen.append((compact, [tuple(s['sqr_avg'].shape) for s in state]))
    cb = SparsifyCallback(80, verbose=False, compact=True, end_epoch=1)
    learn.fit(3, 1e-2, cbs=[cb, spy('after_validate', look, order=61)])
    assert seen == [(True, [tuple(p.shape) for p in learn.model.parameters()])]*3

def test_the_callback_in_the_constructor():
    cb = SparsifyCallback(80, verbose=False)
    learn = noisy(cbs=cb)
    learn.fit(N_EPOCH, 1e-2, cbs=saver())
    again = noisy(5, cbs=SparsifyCallback(80, verbose=False))
    again.load('e1')
    again.fit(N_EPOCH, 1e-2, start_epoch=2)
    assert same(weights(learn.model), weights(again.model))

def test_the_same_process_after_a_crash():
    learn, cb = noisy(), SparsifyCallback(80, verbose=False)
    learn.fit(N_EPOCH, 1e-2, cbs=[cb, saver()])
    whole = weights(learn.model)
    again, cb2 = noisy(), SparsifyCallback(80, verbose=False)
    def crash():
        if again.epoch == 2 and again.iter == 2 and again.training: raise RuntimeError('power')
    with pytest.raises(RuntimeError, match='power'):
        again.fit(N_EPOCH, 1e-2, cbs=[cb2, saver('f'), spy('after_batch', crash)])
    again.load('f1')
    again.fit(N_EPOCH, 1e-2, cbs=cb2, start_epoch=2)  # the same callback, whose masks are those of the crash
    assert same(weights(again.model), whole)

def test_state_dict_by_hand(tmp_path):
    states = []
    learn, cb = noisy(), SparsifyCallback(80, verbose=False, criteria='movmag')
    def save():
        if learn.epoch == 1:
            torch.save(cb.state_dict(), tmp_path/'state.pt')
            states.append(weights(learn.model))
            torch.save(learn.opt.state_dict(), tmp_path/'opt.pt')
    learn.fit(N_EPOCH, 1e-2, cbs=[cb, spy('after_validate', save, order=61)])
    again, cb2 = noisy(3), SparsifyCallback(80, verbose=False, criteria='movmag')
    again.create_opt()
    again.model.load_state_dict(states[0])
    again.opt.load_state_dict(torch.load(tmp_path/'opt.pt', weights_only=False))
    cb2.load_state_dict(torch.load(tmp_path/'state.pt', weights_only=True))
    again.fit(N_EPOCH, 1e-2, cbs=cb2, start_epoch=2)
    assert same(weights(learn.model), weights(again.model))


# What the checkpoint is to others, and what is said

def test_a_plain_model_loads_it_strictly():
    learn = learner()
    learn.fit(2, 1e-2, cbs=[SparsifyCallback(80, verbose=False), saver(),
                            SaveModelCallback(fname='plain', at_end=True)])
    fresh = learner(seed=3).model
    fresh.load_state_dict(torch.load('models/e1.pth', weights_only=False)['model'], strict=True)
    assert same(weights(fresh), weights(learn.model))
    fresh.load_state_dict(torch.load('models/plain.pth', weights_only=True), strict=True)
    assert same(weights(fresh), weights(learn.model)) and len(read_state('models/plain.pth')) == 1

def test_masks_take_a_bit_a_weight():
    learn = learner(width=32)
    learn.fit(1, 1e-2, cbs=[SparsifyCallback(80, verbose=False), saver()])
    ours = os.path.getsize('models/e0.pth')
    learn.save('dense')
    extra = ours - os.path.getsize('models/dense.pth')
    # the random numbers of Python, numpy and torch take most of that
    assert extra < sum(sizes(learn.model)) / 8 + 40_000

def test_without_our_callbacks_save_is_fastais():
    learn = learner()
    learn.fit(1, 1e-2)
    assert read_state(learn.save('x')) is None and Learner.save.__doc__ == Learner.save.__wrapped__.__doc__

def test_what_a_resume_says(capsys):
    learn = learner()
    learn.fit(4, 1e-2, cbs=[SparsifyCallback(80, verbose=False), saver()])
    def said(file, start, sparsity=80, n_epoch=4):
        again = learner(seed=2)
        again.load(file)
        capsys.readouterr()
        cb = SparsifyCallback(sparsity)
        again.fit(n_epoch, 1e-2, cbs=cb, start_epoch=start)
        return capsys.readouterr().out, cb
    assert 'Resuming at epoch 2\n' in said('e1', 2)[0]
    assert 'Resuming at epoch 2, with another target, schedule or number of epochs' in said('e1', 2, 90)[0]
    assert 'Resuming at epoch 2, with another' in said('e1', 2, n_epoch=6)[0]
    out, cb = said('e3', 2)
    assert 'goes on at epoch 4, and this fit at epoch 2' in out
    assert cb.report.zeros == sum(exact(n, 80) for n in sizes(learn.model))
    out, cb = said('e2', 0)
    assert 'Resuming' not in out and 'are zero already' in out  # a new run

def test_masks_of_the_checkpoint_replace_later_ones():
    learn, cb = learner(), SparsifyCallback(80, schedule=one_shot, verbose=False)
    learn.fit(4, 1e-2, cbs=[cb, saver()])
    assert sum(zeros(learn.model)) and cb.sparsifier.masks
    learn.load('e0')
    seen = []
    learn.fit(4, 1e-2, cbs=[cb, spy('after_batch', lambda: seen.append(sum(zeros(learn.model))))], start_epoch=1)
    assert seen[0] == 0 and zeros(learn.model) == [exact(n, 80) for n in sizes(learn.model)]

@pytest.mark.parametrize('change, message', [(dict(granularity='filter'), 'granularity'),
                                             (dict(criteria='gradient'), 'reference'),
                                             (dict(exclude='0'), "of other layers: '0.weight' is in one of them only"),
                                             (dict(context='erk'), 'context')])
def test_a_state_of_another_kind_is_refused_before_the_first_batch(change, message):
    learn = learner()
    learn.fit(4, 1e-2, cbs=[SparsifyCallback(80, schedule=lin, verbose=False), saver()])
    again, batches = learner(seed=2), []
    again.load('e1')
    with pytest.raises((ValueError, KeyError), match=message):
        again.fit(4, 1e-2, start_epoch=2, cbs=[SparsifyCallback(80, schedule=lin, verbose=False, **change),
                                               spy('before_batch', lambda: batches.append(1))])
    assert not batches

def test_not_a_state():
    with pytest.raises(ValueError, match='Not the state of a `SparsifyCallback`'):
        SparsifyCallback(80).load_state_dict({'masks': {}})
    with pytest.raises(ValueError, match='no state to save before the first `fit`'): SparsifyCallback(80).state_dict()

@pytest.mark.parametrize('point', [dict(rewind_epoch=1), dict(rewind_step=3), {}])
def test_a_rewind_to_a_point_before_the_resume_needs_the_state(point):
    with pytest.raises(ValueError, match='load a checkpoint that was saved during the earlier'):
        learner().fit(6, 1e-2, start_epoch=2, cbs=SparsifyCallback(80, schedule=one_shot, lth=True, **point))

def test_a_best_epoch_loaded_at_the_end_is_no_resume():
    learn, cb = learner(), SparsifyCallback(80, verbose=False)
    learn.fit(4, 1e-2, cbs=[cb, SaveModelCallback(with_opt=True)])
    assert '_loaded_states' not in learn.__dict__ and zeros(learn.model) == [exact(n, 80) for n in sizes(learn.model)]


# The best of the sparse epochs

def test_the_best_sparse_epoch(capsys):
    learn, cb = learner(), SparsifyCallback(80, end_epoch=3, verbose=False)
    losses, states = [], []
    def look():
        losses.append(float(learn.recorder.values[-1][1]))
        states.append(weights(learn.model))
    learn.fit(6, 3e-2, cbs=[cb, SaveSparseModelCallback(), spy('after_epoch', look, order=62)])
    best = min(range(2, 6), key=losses.__getitem__)
    assert same(weights(learn.model), states[best]) and zeros(learn.model) == [exact(n, 80) for n in sizes(learn.model)]
    assert 'pruned weights had come back' not in capsys.readouterr().out

def test_an_older_denser_best_is_noticed(capsys):
    learn, cb = learner(), SparsifyCallback(80)
    learn.fit(3, 1e-2, cbs=[cb, SaveModelCallback(monitor='sparsity', comp=np.less)])
    assert 'pruned weights had come back' in capsys.readouterr().out
    assert zeros(learn.model) == [exact(n, 80) for n in sizes(learn.model)]

def test_no_epoch_is_sparse_enough(capsys):
    learn, cb = learner(), SparsifyCallback(80, verbose=False)
    def early(): raise CancelFitException
    stop = spy('after_epoch', early, order=80)
    learn.fit(4, 1e-2, cbs=[cb, SaveSparseModelCallback(), stop])
    assert 'No epoch was as sparse as the schedule ends' in capsys.readouterr().out
    assert not Path('models/model.pth').exists()


# What a second pair of eyes found

def stopped(name='o', n_epoch=4, learn=None, **kwargs):
    learn, cb = learn or learner(n=64), SparsifyCallback(80, verbose=False, **kwargs)
    learn.fit(n_epoch, 1e-2, cbs=[cb, saver(name)])
    return learn

def test_a_state_of_fewer_layers_is_refused():
    stopped(schedule='iterative', exclude='6')
    again = learner(n=64)
    again.load('o1')
    with pytest.raises(ValueError, match="other layers: '6.weight' is in one"):
        again.fit(4, 1e-2, cbs=SparsifyCallback(80, schedule='iterative'), start_epoch=2)

def test_savers_in_a_resumed_fit():
    "fastai tells them of epochs that are skipped: they would overwrite earlier checkpoints, or fail"
    whole = stopped('e')
    again, kept = learner(n=64, seed=3), Path('models/e_0.pth')
    learner(n=64).fit(1, 1e-2, cbs=SaveModelCallback(fname='e', every_epoch=True, with_opt=True))
    before = kept.read_bytes()
    again.load('e1')
    again.fit(4, 1e-2, start_epoch=2, cbs=[SparsifyCallback(80, verbose=False),
                                           SaveModelCallback(fname='e', every_epoch=True, with_opt=True)])
    assert same(weights(whole.model), weights(again.model)) and kept.read_bytes() == before
    best = learner(n=64, seed=3)
    best.load('e1')
    best.fit(4, 1e-2, start_epoch=2, cbs=[SparsifyCallback(80, verbose=False), SaveModelCallback()])

def test_lr_find_after_load_keeps_the_state():
    import fastai.callback.schedule  # noqa: F401, adds `lr_find` and `fit_one_cycle` to `Learner`
    whole, again = stopped(), learner(n=64, seed=3)
    again.load('o1')
    again.lr_find(num_it=6, show_plot=False)
    again.fit(4, 1e-2, cbs=SparsifyCallback(80, verbose=False), start_epoch=2)
    assert same(weights(whole.model), weights(again.model))

def test_a_refused_fit_can_be_corrected():
    whole, again = stopped(), learner(n=64, seed=3)
    again.load('o1')
    with pytest.raises(ValueError, match='`end_epoch` is 9'):
        again.fit(4, 1e-2, cbs=SparsifyCallback(80, end_epoch=9), start_epoch=2)
    again.fit(4, 1e-2, cbs=SparsifyCallback(80, verbose=False), start_epoch=2)
    assert same(weights(whole.model), weights(again.model))

def test_a_checkpoint_without_a_rewind_point():
    stopped(schedule='one_shot')
    again = learner(n=64)
    again.load('o0')
    with pytest.raises(ValueError, match='`rewind_epoch` is before epoch 1'):
        again.fit(4, 1e-2, cbs=SparsifyCallback(80, schedule='one_shot', lth=True), start_epoch=1)

@pytest.mark.parametrize('sparsity, n_epoch', [(40, 4), (80, 6)])
def test_another_target_brings_nothing_back(sparsity, n_epoch):
    stopped(n_epoch=2 if n_epoch == 6 else 4)
    again, seen = learner(n=64), []
    again.load('o1')
    start = sum(zeros(again.model))
    again.fit(n_epoch, 1e-2, cbs=[SparsifyCallback(sparsity, verbose=False),
                                  spy('after_batch', lambda: seen.append(sum(zeros(again.model))))], start_epoch=2)
    assert start and min(seen) >= start

def test_state_after_fit_copies_and_exports():
    learn, cb = learner(n=64), SparsifyCallback(80, verbose=False)
    learn.fit(2, 1e-2, cbs=[cb, saver('o')])
    for same_cb in (cb, copy.deepcopy(cb), pickle.loads(pickle.dumps(cb))): assert same_cb.state_dict()['epoch'] == 2
    learn.export('plain.pkl')
    learn.load('o1')
    learn.export('loaded.pkl')
    assert abs(os.path.getsize('loaded.pkl') - os.path.getsize('plain.pkl')) < 500

def test_a_buffer_instead_of_a_file():
    learn, buffer = learner(n=64), io.BytesIO()
    cb = SparsifyCallback(80, verbose=False)
    def save():
        if learn.epoch == 1: learn.save(buffer)
    learn.fit(4, 1e-2, cbs=[cb, spy('after_validate', save, order=61)])
    again = learner(n=64, seed=3)
    buffer.seek(0)
    again.load(buffer)
    again.fit(4, 1e-2, cbs=SparsifyCallback(80, verbose=False), start_epoch=2)
    assert same(weights(learn.model), weights(again.model))

def test_a_start_without_a_state_is_said(capsys):
    learner(n=64).fit(3, 1e-2, cbs=SparsifyCallback(80), start_epoch=1)
    assert 'No state was loaded: this fit starts a new schedule at epoch 1' in capsys.readouterr().out

def test_a_second_fit_rewinds_to_its_own_start():
    learn, cb, starts = learner(n=64), SparsifyCallback(80, reset_end=True, verbose=False), []
    for _ in range(2):
        learn.fit(2, 1e-2, cbs=[spy('before_fit', lambda: starts.append(weights(learn.model)), order=0), cb])
        with torch.no_grad(): learn.model[1].bias.add_(1)
    assert torch.equal(learn.model[1].bias - 1, starts[1]['1.bias'])
    assert not torch.equal(starts[0]['1.bias'], starts[1]['1.bias'])

def test_the_scaler_of_fp16_goes_on(monkeypatch):
    from fastai.callback import fp16
    monkeypatch.setattr(fp16, 'GradScaler', lambda device, **kw: torch.amp.GradScaler('cpu', **kw))
    monkeypatch.setattr(fp16, 'autocast', lambda device, **kw: torch.autocast('cpu', **kw))
    def half(seed=0): return learner(n=64, seed=seed, cbs=fp16.MixedPrecision(init_scale=2.**24, growth_interval=4))
    whole = stopped(learn=half())
    again = half(3)
    again.load('o1')
    again.fit(4, 1e-2, cbs=SparsifyCallback(80, verbose=False), start_epoch=2)
    assert same(weights(whole.model), weights(again.model))

def test_tickets_need_a_folder(tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(ValueError, match='`save_tickets` writes to'):
        learner(n=64, path=tmp_path/'file').fit(2, 1e-2,
                                                cbs=SparsifyCallback(80, schedule='one_shot', save_tickets=True))
