"This project"
from fasterai_clone.core.selection import keep_masks
from fasterai_clone.sparse.sparsifier import Sparsifier
from fasterai_clone.sparse.sparsify_callback import SparsifyCallback
from . import SPARSITY
from ..models import layer_type

NAMES = dict(magnitude='large_final', movement='movement', gradient='gradient')

def choose(model, context, criteria, kernel=False, **_):
    "Masks chosen and applied; with `kernel` chosen only"
    sp = Sparsifier(model, 'weight', context, NAMES[criteria], layer_type=layer_type(model))
    return masks_only(sp) if kernel else sp.sparsify_model

def masks_only(sp):
    "The selection alone; earlier masks are updated in place"
    masks = [None] * len(sp.pools)
    def go(sparsity):
        for i, (pool, k) in enumerate(zip(sp.pools, sp.counts(sparsity))):
            masks[i] = keep_masks([t.weight for t in pool], k, magnitude=True, pruned=masks[i], out=masks[i])
        return [m for pool in masks for m in pool]
    return go

def hold(model, opt, **options):
    sp = Sparsifier(model)
    sp.sparsify_model(SPARSITY)
    sp.hold(opt, **options)

def callback(context, **options): return SparsifyCallback(SPARSITY, context=context, verbose=False, **options)
