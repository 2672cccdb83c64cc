"Everything that measures a model: `from fasterai_clone.analyze.all import *`"
from .allocate import allocate, judge_by, refine, score_curves
from .compare import Comparison, compare
from .cost import Cost, LayerCost
from .layer_times import layer_times
from .metric import evaluate, perplexity
from .sensitivity import Sensitivity, sensitivity
