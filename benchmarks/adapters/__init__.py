"""The contestants. Each is a module of three functions, imported only when it runs:

    choose(model, context, criteria, **options)
        -> function of a sparsity in percent that makes the masks (the call that is timed)
    hold(model, opt, **options)
        -> function to call after each step, or None: keeps 90 % zero, local
    callback(context, **options)
        -> fastai callback (or None) that goes to 90 % by agp, changing at every batch

What a contestant does not offer raises `NotImplementedError` with the reason, and is listed as not run."""
from importlib import import_module
from typing import NamedTuple

SPARSITY = 90  # percent

class Contestant(NamedTuple):
    """Who takes part: `adapter` is a module beside this one, `package` what its users import, `parts` the measures it
    is in"""
    name: str
    adapter: str
    package: str
    parts: str = 'choose criteria step train process'
    options: dict = {}

    def call(self, what, *args):
        "Call function `what` of the adapter"
        return getattr(import_module(f'benchmarks.adapters.{self.adapter}'), what)(*args, **self.options)

BASELINE = 'no pruning'
CONTESTANTS = [
    Contestant(BASELINE, 'none', 'fastai.basics', 'step train process'),
    Contestant('fasterai_clone', 'ours', 'fasterai_clone.sparse.all'),
    Contestant('fasterai_clone, masks only', 'ours', 'fasterai_clone.sparse.all', 'choose', dict(kernel=True)),
    Contestant('fasterai_clone, every=8', 'ours', 'fasterai_clone.sparse.all', 'train', dict(every=8)),
    Contestant('fasterai_clone, compact', 'ours', 'fasterai_clone.sparse.all', 'step process', dict(compact=True)),
    Contestant('fasterai 0.4.1', 'fasterai_041', 'fasterai.sparse.all'),
    Contestant('torch.nn.utils.prune', 'torch_prune', 'torch.nn.utils.prune'),
    Contestant('torch.ao.pruning', 'torch_ao', 'torch.ao.pruning'),
]

def taking_part(part): return [c for c in CONTESTANTS if part in c.parts.split()]
