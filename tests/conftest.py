"One thread for tiny networks, no progress bars, and each test in a folder of its own"
import os
# before torch is imported: on tiny networks more threads only get in each other's way
os.environ['OMP_NUM_THREADS'] = '1'
for name in 'MPLBACKEND PYTHONWARNINGS PYTHONIOENCODING COLUMNS LINES NO_COLOR FORCE_COLOR'.split():
    os.environ.pop(name, None)  # a shell's settings, which the processes and kernels that tests start would inherit

import warnings
warnings.filterwarnings('ignore', category=FutureWarning, module=r'torch\.jit')  # importing fastai under torch ≥ 2.13
warnings.filterwarnings('ignore', message='.*torch.jit.*', category=FutureWarning)

import gc, random
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import HealthCheck, settings
from fastai.callback.progress import ProgressCallback
from fastai.learner import defaults

torch.set_num_threads(1)
torch.manual_seed(0)  # for what is drawn while tests are collected
settings.register_profile('tests', deadline=None, derandomize=True,
                          suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile('tests')
defaults.callbacks = [c for c in defaults.callbacks if c is not ProgressCallback]


@pytest.hookimpl(tryfirst=True)  # before that of xdist
def pytest_cmdline_main(config):
    """Several files: on all processors, the tests of a file together in one process.

    They share what is slow to make (a site, processes, thinned networks). `-n 0` or `-p no:xdist` runs them one after
    the other."""
    option, files = config.option, [Path(a.split('::')[0]) for a in config.args]
    if not config.pluginmanager.hasplugin('xdist') or hasattr(config, 'workerinput'): return
    if option.numprocesses is not None or option.dist != 'no' or option.distload or option.tx: return
    if option.collectonly or option.usepdb: return
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    if n_cores == 1 or len(files) == 1 and files[0].is_file(): return
    option.numprocesses, option.dist, option.loadscopereorder = min(n_cores, 8), 'loadfile', False
    option.maxworkerrestart = '0'  # a process that dies ends the run: with a new one, xdist waits for ever at the end

def pytest_configure(config):
    config.addinivalue_line('filterwarnings', 'ignore:.*torch.jit.*:FutureWarning')
    # of 100 % sparsity; those that are tested are caught
    config.addinivalue_line('filterwarnings', 'ignore:Layer collapse')
    config.addinivalue_line('filterwarnings', 'error:.*This is a bug in the rule.*:RuntimeWarning')
    config.addinivalue_line('filterwarnings', "ignore:.*device_type of 'cuda'.*:UserWarning")
    config.addinivalue_line('filterwarnings', 'ignore:.*GradScaler is enabled.*:UserWarning')


def pytest_collection_finish(session):
    "Leave what was imported and collected out of later garbage collections: a quarter of a second for each full one"
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

@pytest.fixture(autouse=True)
def _gradients():
    "No test leaves gradients switched off for those after it"
    yield
    on = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert on, 'This test left gradients switched off'

@pytest.fixture(autouse=True)
def _seeded():
    "Every test starts from the same random numbers"
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
