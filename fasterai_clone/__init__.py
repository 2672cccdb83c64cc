"""Sparsify a network while fastai or PyTorch trains it

The main names are imported when they are first used: `import fasterai_clone` alone does not import torch."""
import importlib, importlib.util, sys
from .core.docs import install_docs
from .moved import MovedModules as MovedModules  # finds modules under their old names

__version__ = "0.2.0"

install_docs(__name__)
del install_docs

_homes = {  # module → the names that the package offers
    'analyze.compare':         'compare',
    'core.criteria':           'Criteria Normalizer Reducer large_final',
    'core.granularity':        'Granularities',
    'core.masks':              'Masks',
    'core.schedule':           'Schedule agp available_schedules iterative one_cycle one_shot',
    'export.onnx':             'export_onnx',
    'export.sparse_files':     'load_sparse save_sparse',
    'export.sparse_layers':    'sparse_layers',
    'methods.recalibrate':     'recalibrate',
    'methods.reconstruct':     'reconstruct',
    'model.channels.groups':   'coupled_groups',
    'model.flops':             'multiply_adds',
    'prune.prune_callback':    'PruneCallback',
    'prune.thin':              'thin',
    'prune.thinned_files':     'load_thinned save_thinned',
    'prune.vocabulary':        'thin_vocabulary',
    'sparse.context':          'Context available_contexts',
    'sparse.keep_callback':    'KeepSparsity',
    'sparse.measure':          'available_criterias',
    'sparse.report':           'Report',
    'sparse.rule':             'Rule',
    'sparse.save_callback':    'SaveSparseModelCallback',
    'sparse.sparsifier':       'Sparsifier',
    'sparse.sparsify_callback': 'SparsifyCallback',
    'sparse.ticket_files':     'load_ticket save_ticket',
    'sparse.tickets_callback': 'find_ticket',
}
_home_of = {name: home for home,names in _homes.items() for name in names.split()}
__all__  = sorted(_home_of)

def _message(name):
    from difflib import get_close_matches
    near = get_close_matches(name, __all__, n=1, cutoff=0.5) or get_close_matches(
        name.lower(), [k.lower() for k in __all__], n=1, cutoff=0.5)
    hint = ''.join(f' Did you mean {k!r}?' for k in __all__ if k.lower() in map(str.lower, near))
    return f'`{__name__}` has no {name!r}.{hint} Its names: {", ".join(__all__)}'

def __getattr__(name):
    if name in _home_of:
        globals()[name] = found = getattr(importlib.import_module(f'.{_home_of[name]}', __name__), name)
        return found
    # Python replaces an `AttributeError` in `from fasterai_clone import name` by a message without a hint
    in_from = sys._getframe(1).f_code.co_name == '_handle_fromlist'
    if in_from and not name.startswith('_') and importlib.util.find_spec(f'{__name__}.{name}') is None:
        raise ImportError(_message(name), name=__name__)
    raise AttributeError(_message(name))

def __dir__(): return sorted({*globals(), *__all__})
