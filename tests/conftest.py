"One thread for tiny networks, no progress bars, and each test in a folder of its own"
import os
os.environ['OMP_NUM_THREADS'] = '1'  # before torch is imported: on tiny networks more threads only get in each other's way
for name in 'MPLBACKEND PYTHONWARNINGS PYTHONIOENCODING COLUMNS LINES NO_COLOR FORCE_COLOR'.split():
    os.environ.pop(name, None)  # a shell's settings, which the processes and kernels that tests start would inherit

import warnings
warnings.filterwarnings('ignore', category=FutureWarning, module=r'torch\.jit')  # importing fastai under torch ≥ 2.13
warnings.filterwarnings('ignore', message='.*torch.jit.*', category=FutureWarning)

import random

import numpy as np, pytest, torch
from hypothesis import HealthCheck, settings
from fastai.callback.progress import ProgressCallback
from fastai.learner import defaults

torch.set_num_threads(1)
torch.manual_seed(0)  # for what is drawn while tests are collected
settings.register_profile('tests', deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile('tests')
defaults.callbacks = [c for c in defaults.callbacks if c is not ProgressCallback]


def pytest_configure(config):
    config.addinivalue_line('filterwarnings', 'ignore:.*torch.jit.*:FutureWarning')
    config.addinivalue_line('filterwarnings', 'ignore:Layer collapse')  # of 100 % sparsity; those that are tested are caught
    config.addinivalue_line('filterwarnings', 'error:.*This is a bug in the rule.*:RuntimeWarning')
    config.addinivalue_line('filterwarnings', "ignore:.*device_type of 'cuda'.*:UserWarning")
    config.addinivalue_line('filterwarnings', 'ignore:.*GradScaler is enabled.*:UserWarning')


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

@pytest.fixture(autouse=True)
def _seeded():
    "Every test starts from the same random numbers"
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
