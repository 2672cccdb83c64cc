"""The same calls to fasterai 0.4.1 and to this library, and what was counted: `python -m benchmarks.beside_fasterai`
(about a minute)"""
import argparse, contextlib, copy, csv, io, pickle, re, tempfile, warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import torch, torch.nn as nn
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, TfmdLists, noop, set_seed
from fastai.callback.schedule import SchedCos
from fastai.callback.tracker import SaveModelCallback
from fastai.metrics import accuracy
from fasterai_clone.digits import digits_dls, digits_net
from .timing import machine

def peers():
    "Both libraries under the same names; `share(90)` is 90 % in the unit of each"
    import fasterai.core.criteria as fc, fasterai.core.schedule as fs
    import fasterai.sparse.sparsifier as fp, fasterai.sparse.sparsify_callback as fb
    import fasterai_clone.sparse.all as ours
    theirs = SimpleNamespace(**{k: v for m in (fc, fs, fp, fb) for k,v in vars(m).items() if not k.startswith('_')},
                             share=lambda s: s/100)
    theirs.names = ['random', 'large_final', 'squared_final', 'small_final', 'large_init', 'small_init',
                    'large_init_large_final', 'small_init_small_final',
                    'magnitude_increase', 'movement', 'updating_magnitude_increase', 'updating_movement',
                    'updating_movmag', 'wanda']
    return {'fasterai 0.4.1': theirs,
            'fasterai_clone': SimpleNamespace(**{k: v for k,v in vars(ours).items() if not k.startswith('_')},
                                              share=lambda s: s, names=theirs.names)}

def learner(seed=0, batches=8, **kwargs):
    "The same small learner each time, with so many batches of 16 digits an epoch"
    data = digits_dls()
    set_seed(seed, reproducible=True)
    train, valid = list(data.train.dataset)[:16*batches], list(data.valid.dataset)[:64]
    dls = DataLoaders(DataLoader(TfmdLists(train, noop), bs=16, shuffle=True, drop_last=True),
                      DataLoader(TfmdLists(valid, noop), bs=64))
    return Learner(dls, digits_net(8), loss_func=CrossEntropyLossFlat(), path=Path.cwd(), **kwargs)

def callback(lib, sparsity=90, schedule='agp', granularity='weight', **kwargs):
    schedule = copy.deepcopy(getattr(lib, schedule)) if isinstance(schedule, str) else schedule
    return lib.SparsifyCallback(lib.share(sparsity) if not isinstance(sparsity, dict)
                                else {k: lib.share(v) for k,v in sparsity.items()},
                                granularity, 'local', kwargs.pop('criteria', lib.large_final), schedule, **kwargs)

def fit(learn, epochs, *cbs):
    "What is printed meanwhile"
    said = io.StringIO()
    with learn.no_bar(), learn.no_logging(), contextlib.redirect_stdout(said): learn.fit(epochs, 1e-2, cbs=list(cbs))
    return said.getvalue()

def zeros(model, kind=nn.Conv2d): return [int((m.weight == 0).sum()) for m in model.modules() if isinstance(m, kind)]
def percent(model):
    return 100 * sum(zeros(model)) / sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
def printed(said): return [float(s) for s in re.findall(r'end of epoch \d+: \[?([\d.]+)', said)]
def shown(numbers): return ' '.join(f'{n:g}' for n in numbers)
def error(e):
    # fastai adds that line
    lines = [l.strip() for l in str(e).splitlines() if l.strip() and not l.startswith('Exception occured in')]
    return f'{type(e).__name__}: {" ".join(lines)[:150]}'

class Count(Callback):
    "The percentage of zeros when an epoch ends, and how many batches were done"
    order = 90
    def __init__(self): self.found, self.steps = [], 0
    def after_step(self): self.steps += 1
    def after_train(self): self.found.append(round(percent(self.model), 2))

# What is asked of both: each takes a library, and says what was seen

def zeros_of_72_1152_4608_at_90(lib):
    net = learner().model
    lib.Sparsifier(net, 'weight', 'local', lib.large_final).sparsify_model(lib.share(90))
    return shown(zeros(net))

def zeros_of_100_at_29(lib):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(10, 10))
    lib.Sparsifier(m, 'weight', 'local', lib.large_final, layer_type=nn.Linear).sparsify_model(lib.share(29))
    return shown(zeros(m, nn.Linear))

def zeros_of_100_equal_weights_at_50(lib):
    m = nn.Sequential(nn.Linear(10, 10))
    nn.init.ones_(m[0].weight)
    lib.Sparsifier(m, 'weight', 'local', lib.large_final, layer_type=nn.Linear).sparsify_model(lib.share(50))
    return shown(zeros(m, nn.Linear))

def _printed_and_counted(lib, schedule, epochs):
    learn, count = learner(), Count()
    said = fit(learn, epochs, callback(lib, schedule=schedule), count)
    return f'printed {shown(printed(said))}; counted {shown(count.found)}'

def one_shot_over_10_epochs(lib):  return _printed_and_counted(lib, 'one_shot', 10)
def iterative_over_10_epochs(lib): return _printed_and_counted(lib, 'iterative', 10)
def agp_over_10_epochs(lib):       return _printed_and_counted(lib, 'agp', 10)
def lin_over_1_epoch_of_8_batches(lib):   return _printed_and_counted(lib, 'lin', 1)

def percent_zero_after_one_more_fit_without_the_callback(lib):
    learn = learner()
    fit(learn, 2, callback(lib))
    fit(learn, 1)
    return f'{percent(learn.model):.2f}'

def lowest_percent_zero_in_a_second_fit_with_the_callback(lib):
    learn, count, cb = learner(), Count(), callback(lib)
    fit(learn, 2, cb)
    fit(learn, 4, cb, count)
    return f'{min(count.found):.2f}'

def SaveModelCallback_in_the_same_fit(lib):
    learn = learner(metrics=accuracy)
    try: fit(learn, 3, callback(lib), SaveModelCallback(monitor='accuracy'))
    except Exception as e: return error(e)
    return f'no error; {percent(learn.model):.2f} % zero at the end'

def lr_find_with_the_callback_attached(lib):
    learn = learner(cbs=callback(lib))
    said = io.StringIO()
    with learn.no_bar(), learn.no_logging(), contextlib.redirect_stdout(said):
        try: learn.lr_find(num_it=8, show_plot=False)
        except Exception as e: return error(e)
    return f'no error; {percent(learn.model):.2f} % zero afterwards'

class SaveEach(Callback):
    def after_epoch(self): self.learn.save(f'epoch{self.epoch}')

def a_plain_learner_loads_a_checkpoint_of_the_fit(lib):
    learn, plain = learner(), learner()
    fit(learn, 2, callback(lib), SaveEach())
    plain.path = learn.path
    try: plain.load('epoch0')
    except Exception as e: return error(e)
    return 'no error'

def tensors_and_bytes_of_a_checkpoint_during_the_fit(lib):
    learn = learner()
    fit(learn, 1, callback(lib), SaveEach())
    saved = torch.load(learn.path/'models'/'epoch0.pth', weights_only=False)
    state = saved['model'] if 'opt' in saved else saved
    return f'{len(state)} tensors of {sum(t.nbytes for t in state.values()):,} bytes'

def _misuse(lib, **kwargs):
    learn, count = learner(), Count()
    try: fit(learn, 2, callback(lib, schedule='one_shot', **kwargs), count)
    except Exception as e: return f'after {count.steps} batches: {error(e)}'
    return f'no error; {percent(learn.model):.2f} % zero at the end'

def granularity_with_a_typo(lib):     return _misuse(lib, granularity='wieght')
def a_layer_type_that_is_not_there(lib): return _misuse(lib, layer_type=nn.Conv1d)
def a_name_that_is_not_there(lib):    return _misuse(lib, sparsity={'no_such_layer': 90})
def criteria_by_name(lib):            return _misuse(lib, criteria='large_final')
def gradient_criterion(lib):          return _misuse(lib, criteria=lib.grad_crit)

def _schedule(lib, make):
    learn = learner()
    try: fit(learn, 2, lib.SparsifyCallback(lib.share(90), 'weight', 'local', lib.large_final, make()))
    except Exception as e: return error(e)
    return f'{percent(learn.model):.2f} % zero at the end'

def schedule_as_a_partial(lib):          return _schedule(lib, lambda: partial(lib.iterative, n_steps=5))
def schedule_as_an_annealer_of_fastai(lib): return _schedule(lib, lambda: SchedCos(0, 1))
def schedule_by_name(lib):               return _schedule(lib, lambda: 'agp')

def criteria_that_pickle(lib):
    def ok(c):
        try: return bool(pickle.dumps(c))
        except Exception: return False
    return f'{sum(ok(getattr(lib, k)) for k in lib.names)} of {len(lib.names)}'

class Stop(Callback):
    order = 80
    def after_batch(self):
        if self.training and self.epoch == 1: raise KeyboardInterrupt

def after_ctrl_c_a_new_learner_with_the_same_schedule(lib):
    learn, fresh = learner(), learner()
    before = {*learn.model.state_dict()}
    with contextlib.suppress(KeyboardInterrupt): fit(learn, 2, callback(lib, schedule=lib.one_shot), Stop())
    left = {*learn.model.state_dict()} - before
    said = fit(fresh, 2, callback(lib, schedule=lib.one_shot))
    return (f'{len(left)} tensors left on the first model; printed {shown(printed(said)[-1:])}, counted '
            f'{percent(fresh.model):.2f} '
            'on the second')

def with_2_of_4_and_equal_weights(lib):
    net = nn.Sequential(nn.Conv2d(16, 4, 1, bias=False))
    nn.init.ones_(net[0].weight)
    with contextlib.redirect_stdout(io.StringIO()):
        lib.Sparsifier(net, 'weight', 'local', lib.large_final, nm=True).sparsify_model(lib.share(50))
    kept = net[0].weight.reshape(4, 4, 4).count_nonzero(-1).unique().tolist()
    return f'{shown(kept)} of each 4 are kept'

def _asks(f): return hasattr(f, '__code__') and f.__code__.co_varnames[:f.__code__.co_argcount] == ('lib',)

ASKED = [f for k,f in list(globals().items()) if _asks(f) and not k.startswith('_')]

def main():
    p = argparse.ArgumentParser(prog='python -m benchmarks.beside_fasterai', description=__doc__)
    p.add_argument('--out', type=Path, default=Path('benchmarks/results/beside_fasterai.csv'))
    args = p.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    about = {k: v for k,v in machine('cpu').items() if k in ('date', 'python', 'torch', 'fastai', 'fasterai',
                                                             'fasterai-clone')}
    out = args.out.resolve()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        table = [(f.__name__.replace('_', ' '), *[f(lib) for lib in peers().values()]) for f in ASKED]
    with open(out, 'w', newline='', encoding='utf-8') as f:
        f.writelines(f'# {k}: {v}\n' for k,v in about.items())
        csv.writer(f, lineterminator='\n').writerows([('asked', *peers()), *table])

if __name__ == '__main__': main()
