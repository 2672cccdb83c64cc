"""What larger groups cost: granularities at the same sparsity, over seeds: `python -m benchmarks.granularity` (about 2
minutes)"""
from functools import partial
from fasterai_clone.sparse.all import SparsifyCallback, agp
from .schedules import EPOCHS, LR, counted, percent, study, trained

NET           = dict(width=8, bs=128)  # half as wide as usual: more weights matter, and it takes half the time
GRANULARITIES = 'weight', 'row', 'kernel', 'filter', 'shared_kernel', 'block_4x1'
SPARSITIES    = 50, 75, 90
FIELDS        = 'seed granularity sparsity weights zeros accuracy'.split()

def pruned(granularity, sparsity, seed=0):
    """A learner after training, and its callback; the first layer stays dense, as 8 filters of 9 weights are too few to
    be cut so"""
    cb = SparsifyCallback(sparsity, granularity, 'local', schedule=partial(agp, end_pct=0.7),
                          exclude='0', verbose=False)
    return trained(seed, cb, **NET), cb

def rows(seed):
    "A row for each training"
    yield seed, 'dense', 0, 0, 0, percent(trained(seed, **NET))
    for s in SPARSITIES:
        for g in GRANULARITIES:
            learn, cb = pruned(g, s, seed)
            yield seed, g, s, *counted(cb.sparsifier), percent(learn)

if __name__ == '__main__': study('granularity', __doc__, rows, FIELDS, 5, epochs=EPOCHS, lr=LR, **NET)
