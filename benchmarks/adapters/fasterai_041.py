"fasterai, as its documentation uses it"
from fasterai.core.criteria import grad_crit, large_final, movement
from fasterai.core.schedule import Schedule, sched_agp
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.sparse.sparsify_callback import SparsifyCallback
from . import SPARSITY
from ..models import layer_type

CRITERIA = dict(magnitude=large_final, movement=movement, gradient=grad_crit)

def choose(model, context, criteria):
    sp = Sparsifier(model, 'weight', context, CRITERIA[criteria], layer_type=layer_type(model))
    return lambda sparsity: sp.sparsify_model(sparsity / 100)

def hold(model, opt):
    sp = Sparsifier(model, 'weight', 'local', large_final)
    sp.sparsify_model(SPARSITY / 100)
    return sp._apply_masks  # what its callback does after each step

def callback(context): return SparsifyCallback(SPARSITY / 100, 'weight', context, large_final, Schedule(sched_agp))
