"""torch.nn.utils.prune: hooks that multiply by a mask in each forward pass; whole amounts, since it counts from what
remains"""
from torch.nn.utils import prune
from . import SPARSITY
from ..models import layers, agp_callback

def score(criteria, m, init):
    "Importance of the weights of `m`"
    if criteria == 'movement': return (m.weight - init).abs()
    return (m.weight * m.weight.grad).abs()

class Pruner:
    "Counts what is pruned already, and prunes the rest"
    def __init__(self, model, context, criteria='magnitude'):
        self.layers, self.context, self.criteria = layers(model), context, criteria
        self.inits = [m.weight.detach().clone() if criteria == 'movement' else None for m in self.layers]
        pools = [self.layers] if context == 'global' else [[m] for m in self.layers]
        self.sizes, self.done = [sum(m.weight.numel() for m in p) for p in pools], [0] * len(pools)

    def to(self, sparsity):
        "Prune up to `sparsity` percent"
        more = [int(n * sparsity / 100 + 1e-9) - d for n, d in zip(self.sizes, self.done)]
        scores = None if self.criteria == 'magnitude' else [score(self.criteria, m, i).detach()
                                                            for m, i in zip(self.layers, self.inits)]
        if self.context == 'global' and more[0]:
            named = [(m, 'weight') for m in self.layers]
            prune.global_unstructured(named, prune.L1Unstructured, scores and dict(zip(named, scores)), amount=more[0])
        elif self.context == 'local':
            for i, (m, k) in enumerate(zip(self.layers, more)):
                if k: prune.l1_unstructured(m, 'weight', k, importance_scores=scores and scores[i])
        self.done = [d + k for d, k in zip(self.done, more)]

def choose(model, context, criteria): return Pruner(model, context, criteria).to

def hold(model, opt): Pruner(model, 'local').to(SPARSITY)

def callback(context): return agp_callback(lambda model: Pruner(model, context).to)
