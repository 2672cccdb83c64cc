"Everything to prune and repair a trained network, and to train towards zeros: `from fasterai_clone.methods.all import *`"
from .admm import ADMM
from .admm_callback import ADMMCallback
from .distill import Teacher, decoupled_loss, feature_loss, soft_loss
from .distill_callback import DistillCallback
from .fit import METHODS
from .group_lasso import GroupLasso, group_lasso, shrink
from .isomorphic import isomorphic
from .lasso_callback import RegularizeCallback
from .owl import owl
from .proximal import Proximal
from .proximal_callback import ProximalCallback
from .regrow import Regrow
from .recalibrate import Moved, recalibrate
from .reconstruct import LayerFit, Reconstruction, reconstruct, reconstruction_memory
from .sparsegpt import sparsegpt
from .sparsegpt_rule import SparseGPT
from .trained import PrunedReport, prune_trained
from ..analyze.metric import evaluate, perplexity
