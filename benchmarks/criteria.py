"""Which score: all criteria that make sense on digits, over sparsities and seeds: `python -m benchmarks.criteria`
(about 5 minutes)"""
from functools import partial
from fasterai_clone.sparse.all import SparsifyCallback, agp
from .schedules import EPOCHS, LR, counted, percent, study, trained

NET     = dict(width=8, bs=128)  # half as wide as usual: more weights matter, and it takes half the time
WEIGHTS = ('large_final', 'movmag', 'movement', 'magnitude_increase', 'large_init', 'gradient', 'fisher',
           'sanh_movement', 'wanda', 'snip', 'synflow', 'random', 'small_final')
FILTERS = 'large_final', 'bn_scale', 'mean_activation', 'apoz', 'fpgm', 'gradient', 'random'
CASES   = [('weight', s, c) for s in (90, 97) for c in WEIGHTS] + [('filter', s, c) for s in (50, 75) for c in FILTERS]
FIELDS  = 'seed granularity sparsity criterion weights zeros accuracy'.split()

def pruned(granularity, sparsity, criterion, seed=0, context='local'):
    """A learner after training, and its callback; masks move at every fifth batch, so that criteria that sum have steps
    to sum over"""
    cb = SparsifyCallback(sparsity, granularity, context, criterion, partial(agp, end_pct=0.7), every=5,
                          exclude='0', verbose=False)
    return trained(seed, cb, **NET), cb

def rows(seed):
    "A row for each training"
    yield seed, 'dense', 0, '', 0, 0, percent(trained(seed, **NET))
    for g,s,c in CASES:
        learn, cb = pruned(g, s, c, seed)
        yield seed, g, s, c, *counted(cb.sparsifier), percent(learn)

if __name__ == '__main__': study('criteria', __doc__, rows, FIELDS, 5, epochs=EPOCHS, lr=LR, every=5, **NET)
