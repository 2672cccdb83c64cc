"""Whatever stops a training, wherever it does: nothing stays on the model, files are whole, and what comes after is
exact

An error, Ctrl-C or SIGKILL at each event of fastai's loop, before, between and after the events of `SparsifyCallback`;
Ctrl-C at lines of the library itself; SIGKILL in the middle of a write. `tests/test_faults.py worker FOLDER` is the
process that forks those that are killed."""
import copy, json, os, pickle, random, resource, signal, subprocess, sys, zipfile
from linecache import getline
from pathlib import Path

import numpy as np, torch, torch.nn as nn
from fastai.basics import (Adam, Callback, CancelBackwardException, CancelBatchException, CancelEpochException,
                           CancelFitException,
                           CancelStepException, CancelTrainException, CancelValidException, DataLoader, DataLoaders,
                           Learner, accuracy)
from fastai.callback.core import event
from fastai.callback.progress import ProgressCallback
from safetensors.torch import load_file

import fasterai_clone
from fasterai_clone.sparse.all import (SparsifyCallback, cos, dsd, gradient, iterative, lin, movement, one_shot,
                                       updating_movmag, wanda)
from fasterai_clone.sparse.measure import synflow

N_EPOCH, N_ITER = 3, 3

def network():
    return nn.Sequential(nn.Conv2d(2, 4, (2, 3)), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, (3, 2)), nn.ReLU(),
                         nn.Dropout(.2), nn.Flatten(), nn.Linear(12, 4))

def learner(seed=0, **kwargs):
    "A small learner that draws random numbers for weights, order of the examples and dropout"
    random.seed(seed)
    np.random.seed(seed)
    g     = torch.Generator().manual_seed(7)
    items = [(torch.randn(2, 4, 5, generator=g), torch.randint(0, 4, (), generator=g)) for _ in range(16)]
    torch.manual_seed(seed)
    dls   = DataLoaders(DataLoader(items[:12], bs=4, shuffle=True), DataLoader(items[12:], bs=4))
    learn = Learner(dls, network(), loss_func=nn.CrossEntropyLoss(), opt_func=Adam, metrics=accuracy,
                    path='.', **kwargs)
    learn.remove_cb(ProgressCallback)
    return learn

KINDS = dict(
    plain    = lambda **kw: SparsifyCallback(80, verbose=False, **kw),
    filters  = lambda **kw: SparsifyCallback(50, 'filter', 'global', layer_type=(nn.Conv2d, nn.Linear),
                                             verbose=False, **kw),
    movement = lambda **kw: SparsifyCallback(70, criteria=movement, schedule=lin, verbose=False, **kw),
    gradient = lambda **kw: SparsifyCallback(60, 'row', criteria=gradient, schedule=cos, every=2, verbose=False, **kw),
    compact  = lambda **kw: SparsifyCallback(75, schedule=one_shot, end_epoch=1, start_epoch=1, compact=True,
                                             verbose=False, **kw),
    lottery  = lambda **kw: SparsifyCallback(66, schedule=one_shot, lth=True, reset_end=True, rewind_epoch=1,
                                             verbose=False, **kw),
    tickets  = lambda **kw: SparsifyCallback(66, schedule=one_shot, save_tickets=True, verbose=False, **kw),
    wanda    = lambda **kw: SparsifyCallback(50, context='output', criteria=wanda, schedule=lin, verbose=False, **kw),
    synflow  = lambda **kw: SparsifyCallback(50, context='global', criteria=synflow, schedule=one_shot,
                                             verbose=False, **kw),
    updating = lambda **kw: SparsifyCallback(40, 'kernel', criteria=updating_movmag, schedule=iterative,
                                             verbose=False, **kw),
    dsd      = lambda **kw: SparsifyCallback(60, schedule=dsd, verbose=False, **kw))
# zeros
WANTED = dict(plain=[38, 115], movement=[33, 100], compact=[36, 108], lottery=[31, 95], tickets=[31, 95],
              wanda=[24, 72], updating=[18, 54])

def fit(learn, *cbs, **kwargs):
    with learn.no_logging(): learn.fit(N_EPOCH, 1e-2, cbs=list(cbs), **kwargs)
    return learn

def numbers(learn):
    "All that training has changed"
    opt = [[v.clone() for v in s.values() if isinstance(v, torch.Tensor)]
           for s in (learn.opt.state[p] for p,*_ in learn.opt.all_params())]
    return {k: v.clone() for k,v in learn.model.state_dict().items()}, opt

def equal(a, b):
    (wa,oa), (wb,ob) = a, b
    return wa.keys() == wb.keys() and all(torch.equal(wa[k], wb[k]) for k in wa) and \
           len(oa) == len(ob) and all(len(s) == len(t) and all(map(torch.equal, s, t)) for s,t in zip(oa, ob))

def zeros(model): return [int((m.weight == 0).sum()) for m in model if isinstance(m, nn.Conv2d)]

# What must not be left behind

HOOKS = [k for k in vars(nn.Module()) if 'hook' in k]

def anatomy(learn):
    "All there is to a learner and its model but numbers"
    model = [(n, id(m), sorted(vars(m)), [len(getattr(m, h)) for h in HOOKS if getattr(m, h) is not None],
              sorted(m._buffers),
              [(k, id(p), type(p), p.requires_grad, len(p._backward_hooks or ()))
               for k,p in m._parameters.items() if p is not None])
             for n,m in learn.model.named_modules()]
    return model, list(learn.model.state_dict()), [id(m) for m in learn.metrics], [id(cb) for cb in learn.cbs]

def check_untouched(learn, before, where):
    assert anatomy(learn) == before, f'{where}: something is left behind'
    assert torch.is_grad_enabled(), where
    assert (torch.autocast_increment_nesting(), torch.autocast_decrement_nesting())[1] == 0, f'{where}: autocast'
    params = list(learn.model.parameters())
    known = [id(p) for p,*_ in learn.opt.all_params()]
    assert known == list(map(id, params)), f'{where}: the optimizer has other parameters'
    assert set(map(id, learn.opt.state)) <= set(map(id, params)), f'{where}: the optimizer knows of others'
    for p,s in learn.opt.state.items():
        assert all(v.shape == p.shape for v in s.values() if isinstance(v, torch.Tensor)
                   and v.ndim), f'{where}: its state is not whole'
    for m in (copy.deepcopy(learn.model), pickle.loads(pickle.dumps(learn.model))):
        assert all(map(torch.equal, m.state_dict().values(), learn.model.state_dict().values())), where

def check_after(kind, learn, cb, want, where):
    "The callback works on, exactly"
    assert equal(numbers(fit(learner(), cb)), want), f'{where}: the same callback with another learner'
    fit(learn, cb)
    if kind in WANTED: assert zeros(learn.model) == WANTED[kind], f'{where}: the next fit of the same learner'
    assert cb.report.zeros == sum(r.zeros for r in cb.sparsifier.report().rows)

# Faults

CANCELS = dict(after_cancel_backward=('before_backward', CancelBackwardException),
               after_cancel_step=('before_step', CancelStepException),
               after_cancel_batch=('before_batch', CancelBatchException),
               after_cancel_train=('before_train', CancelTrainException),
               after_cancel_validate=('before_validate', CancelValidException),
               after_cancel_epoch=('before_epoch', CancelEpochException),
               after_cancel_fit=('before_batch', CancelFitException))
EVENTS = [e for e in event._fields if e != 'after_create']
ORDERS = (-5, 16, 75)
ONCE, EACH_EPOCH = ('before_fit', 'after_fit', 'after_cancel_fit'), ('before_epoch', 'before_train', 'after_train',
                                                                     'before_validate', 'after_validate',
                    'after_epoch', 'after_cancel_train', 'after_cancel_validate', 'after_cancel_epoch')

def at(name, f, order):
    "A callback that calls `f` at event `name`"
    cb = Callback(**{name: lambda self: f()})
    cb.order = order
    return cb

class Fault:
    "Calls `act` when event `name` comes for the `nth` time to a callback of `order`"
    def __init__(self, name, act, order, nth):
        self.name, self.act, self.order, self.nth, self.n, self.fired = name, act, order, nth, 0, False
        self.cbs = [at(name, self.seen, order)]
        if name in CANCELS:
            before, self.error = CANCELS[name]
            self.cbs.append(at(before, self.cancel, random.choice((-50, 50))))
        self.seen_before = 0

    def cancel(self):
        self.seen_before += 1
        if self.seen_before == self.nth + 1: raise self.error

    def seen(self):
        self.n += 1
        if self.name not in CANCELS and self.n != self.nth + 1: return
        self.fired = True
        self.act()

def points(rng, orders=ORDERS):
    "(event, order, nth): each event in each order, at a random batch or epoch"
    return [(name, o, 0 if name in ONCE and name != 'after_cancel_fit'
             else rng.randrange(N_EPOCH if name in EACH_EPOCH else N_EPOCH*N_ITER))
            for name in EVENTS for o in orders]

fired = set()  # points at which something has really happened

def stopped(kind, cb, *cbs, error):
    "A learner whose fit ended with `error`, or not at all"
    learn  = learner()
    learn.create_opt()
    before = anatomy(learn)
    try: fit(learn, cb, *cbs)
    except error: return learn, before, True
    return learn, before, False

def test_errors_and_interrupts_at_every_event():
    rng, kinds = random.Random(1), list(KINDS)
    want = {k: numbers(fit(learner(), KINDS[k]())) for k in kinds}
    for k in WANTED: assert zeros(fit(learner(), KINDS[k]()).model) == WANTED[k], k
    for i,(name,order,nth) in enumerate(points(rng) + points(rng)):
        error, kind = (KeyboardInterrupt, RuntimeError)[i*2 // (2*len(EVENTS)*len(ORDERS))], rng.choice(kinds)
        where = f'{error.__name__} at {name} {nth}, order {order}, {kind}'
        def act(): raise error('stop')
        random.seed(i)
        fault, cb = Fault(name, act, order, nth), KINDS[kind]()
        learn, before, ended = stopped(kind, cb, *fault.cbs, error=error)
        assert ended == fault.fired, where
        if ended: fired.add((name, error.__name__, order, nth))
        check_untouched(learn, before, where)
        check_after(kind, learn, cb, want[kind], where)
    for k in kinds: assert equal(numbers(fit(learner(), KINDS[k]())), want[k]), f'{k}: a fresh run'

# Ctrl-C at lines of the library

LIBRARY = str(Path(fasterai_clone.__file__).parent)
CLEANUP = ('join', 'leave', 'learn', 'release')  # what puts things back is not undone if it is stopped itself

class Interrupt:
    """While it is on, counts the lines of the library as they run, and raises at the `nth`; `seen`: line → when it ran

    Not at a `with`: Python runs that line again before it leaves the block, where no signal is looked at and nothing
    would be closed."""
    def __init__(self, nth=None): self.nth, self.n, self.at, self.seen = nth, 0, None, {}

    def __call__(self, frame, what, arg):
        if not frame.f_code.co_filename.startswith(LIBRARY): return None
        f = frame
        while f is not None:
            if f.f_code.co_name in CLEANUP: return None
            f = f.f_back
        return self.line

    def line(self, frame, what, arg):
        if what == 'line':
            self.n += 1
            place = frame.f_code.co_filename, frame.f_lineno
            if not getline(*place).strip().startswith('with '): self.seen.setdefault(place, []).append(self.n)
            if self.n == self.nth:
                self.at = f'{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}'
                raise KeyboardInterrupt
        return self.line

    def __enter__(self):
        sys.settrace(self)
        return self
    def __exit__(self, *args): sys.settrace(None)

def test_interrupts_at_lines_of_the_library():
    rng = random.Random(2)
    for kind in ('filters', 'compact', 'lottery', 'wanda', 'synflow', 'gradient'):
        want = numbers(fit(learner(), KINDS[kind]()))
        cb = KINDS[kind]()
        with Interrupt() as lines: fit(learner(), cb)
        for line in rng.sample(sorted(lines.seen), 12):
            nth, cb = rng.choice(lines.seen[line]), KINDS[kind]()
            with Interrupt(nth) as stop: learn, before, ended = stopped(kind, cb, error=KeyboardInterrupt)
            where = f'Ctrl-C at line {nth}, {stop.at}, {kind}'
            assert ended and stop.at, where
            fired.add((stop.at, kind, nth))
            check_untouched(learn, before, where)
            check_after(kind, learn, cb, want, where)

# What is killed cannot clean up

class Saver(Callback):
    "Saves after each epoch that was trained"
    order = 61
    def before_epoch(self): self.trained = False
    def before_train(self): self.trained = True
    def after_epoch(self):
        if self.trained: self.save()
    def save(self):
        self.learn.save('last')
        self.learn.save(f'epoch_{self.epoch}')

class DiesInWriting(Saver):
    "Is killed when a file of epoch `when` gets longer than `size` bytes"
    def __init__(self, when, name, size): self.when, self.file, self.size = when, name, size
    def save(self):
        for name in ('last', f'epoch_{self.epoch}'):
            if (self.epoch, name.partition('_')[0]) == (self.when, self.file): limit_files(self.size)
            self.learn.save(name)

class DiesInTime(Saver):
    "Is killed so many seconds after the first file of epoch `when` was begun"
    def __init__(self, when, seconds): self.when, self.seconds = when, seconds
    def save(self):
        # nobody handles it: the process ends at once
        if self.epoch == self.when: signal.setitimer(signal.ITIMER_REAL, self.seconds)
        super().save()
        if self.epoch == self.when: kill()

def kill(): os.kill(os.getpid(), signal.SIGKILL)

def limit_files(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # so that it kills
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

def killers(job):
    "The callbacks that end the process as `job` says"
    if job['how'] == 'event':
        random.seed(job['nth'])
        return [Saver(), *Fault(job['name'], kill, job['order'], job['nth']).cbs]
    if job['how'] == 'write':  return [DiesInWriting(job['epoch'], job['name'], job['size'])]
    if job['how'] == 'time':   return [DiesInTime(job['epoch'], job['seconds'])]
    if job['how'] == 'ticket': return [at('before_batch', lambda: limit_files(job['size']), 0)]

def in_child(f):
    "How a fork that does `f` ends: the signal that killed it, or 0"
    pid = os.fork()
    if not pid:
        code = 1
        try:
            f()
            code = 0
        except BaseException:
            import traceback
            Path('error.txt').write_text(traceback.format_exc())
        finally: os._exit(code)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status): return os.WTERMSIG(status)
    if os.WEXITSTATUS(status): raise RuntimeError(Path('error.txt').read_text())
    return 0

def whole(file):
    "Can `file` be read to its end?"
    try:
        if file.suffix == '.safetensors': return bool(load_file(file))
        learner(seed=5).load(file.stem)
        return zipfile.ZipFile(file).testzip() is None
    except Exception as e: return f'{type(e).__name__}: {e}'

def train(kind, *cbs):
    torch.save(numbers(fit(learner(), KINDS[kind](), *cbs)), 'final.pt')

def go_on(kind, epoch):
    "Another process, with other random numbers, from what was saved"
    learn = learner(seed=99).load(f'epoch_{epoch}')
    torch.save(numbers(fit(learn, KINDS[kind](), Saver(), start_epoch=epoch + 1)), 'final.pt')

def one(job, want):
    "What became of `job`"
    signal_ = in_child(lambda: fit(learner(), KINDS[job['kind']](), *killers(job)))
    files   = {f.name: whole(f) for f in Path('models').glob('*') if f.suffix in ('.pth', '.safetensors')}
    epochs  = [int(f.split('_')[1][:-4]) for f in files if f.startswith('epoch_')]
    found   = dict(job, signal=signal_, broken={k: v for k,v in files.items() if v is not True}, files=sorted(files),
                   epochs=len(epochs), same=None)
    if not signal_ or not epochs or found['broken']: return found
    assert in_child(lambda: go_on(job['kind'], max(epochs))) == 0
    return dict(found, same=equal(torch.load('final.pt'), want))

def worker(folder):
    "Does the jobs in `folder`, each in a folder of its own, in forks of this process"
    torch.set_num_threads(1)
    jobs, want, found = json.loads(Path(folder, 'jobs.json').read_text()), {}, []
    def inside(name, f):
        Path(folder, name).mkdir()
        os.chdir(Path(folder, name))
        return f()
    for kind in dict.fromkeys(j['kind'] for j in jobs):
        inside(f'all of {kind}', lambda: in_child(lambda: train(kind)))
        want[kind] = torch.load('final.pt')
    for i,job in enumerate(jobs): found.append(inside(str(i), lambda: one(job, want[job['kind']])))
    Path(folder, 'found.json').write_text(json.dumps(found))

def killed(jobs, folder):
    "The `jobs` done in a process that has nothing else to do"
    Path(folder, 'jobs.json').write_text(json.dumps(jobs))
    env  = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join([
        str(Path(fasterai_clone.__file__).parents[1]), os.environ.get('PYTHONPATH', '')])}
    done = subprocess.run([sys.executable, __file__, 'worker', str(folder)], env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(Path(folder, 'found.json').read_text())

def test_killed_at_every_event(tmp_path):
    rng   = random.Random(3)
    found = killed([dict(how='event', name=n, order=o, nth=k, kind=rng.choice(list(KINDS))) for n,o,k in points(rng)],
                   tmp_path)
    for j in found:
        if j['signal']: fired.add((j['name'], 'SIGKILL', j['order'], j['nth']))
        assert j['signal'] in (0, signal.SIGKILL) and not j['broken'], j
        assert j['same'] in (None, True), j
    assert sum(j['same'] is True for j in found) >= 30

def test_killed_in_the_middle_of_a_write(tmp_path):
    rng   = random.Random(4)
    kinds = [k for k in KINDS if k != 'tickets']
    found = killed([dict(how='write', epoch=e, name=n, size=s, kind=rng.choice(kinds)) for e in (0, 1, 2)
                    for n in ('last', 'epoch') for s in (100, 9000)] +
                   [dict(how='time', epoch=1 + i % 2, seconds=1e-5 + .012*i/16, kind=rng.choice(kinds))
                    for i in range(16)] +
                   [dict(how='ticket', size=300, kind='tickets')], tmp_path)
    for j in found:
        assert j['signal'] in ((signal.SIGALRM, signal.SIGKILL) if j['how'] == 'time' else (signal.SIGXFSZ,)), j
        fired.add((j['how'], j.get('epoch'), j.get('name'), j.get('size'), j.get('seconds')))
        assert not j['broken'] and j['same'] in (None, True), j
    assert sum(j['same'] is True for j in found) >= 15

def test_there_were_enough_points():
    assert len(fired) >= 200, len(fired)

if __name__ == '__main__' and sys.argv[1:2] == ['worker']: worker(sys.argv[2])
