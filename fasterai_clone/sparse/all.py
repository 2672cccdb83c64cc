"What it takes to sparsify: `from fasterai_clone.sparse.all import *`"
from ..core.criteria import (
    Criteria, Normalizer, Reducer, grad_crit, gradient, large_final, large_init, large_init_large_final,
    magnitude_increase, movement, movmag, random_importance, small_final, small_init, small_init_small_final,
    squared_final, updating_magnitude_increase, updating_movement, updating_movmag)
from ..core.granularity import Granularities
from ..core.masks import Masks
from ..core.schedule import (
    Schedule, agp, available_schedules, constant, cos, dsd, iterative, lin, one_cycle, one_shot, sched_agp, sched_dsd,
    sched_iterative, sched_onecycle, sched_oneshot)
from .context import available_contexts
from .keep_callback import KeepSparsity
from .measure import available_criterias, wanda
from .plots import plot_filters, plot_weights
from .report import Report
from .sparsifier import Sparsifier
from .save_callback import SaveSparseModelCallback
from .sparsify_callback import SparsifyCallback
from .ticket_files import load_ticket, save_ticket
from .tickets_callback import find_ticket

