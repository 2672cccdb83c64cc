"""torch.ao.pruning: `WeightNormSparsifier`, which multiplies by a mask in a parametrization; convolutions flattened: it
knows matrices"""
from torch.ao.pruning import WeightNormSparsifier
from . import SPARSITY
from ..models import layers, agp_callback

class Flat(WeightNormSparsifier):
    "Single weights by magnitude, for weights of any shape"
    def __init__(self, model):
        super().__init__(sparse_block_shape=(1, 1))
        names = {m: n for n, m in model.named_modules()}
        self.prepare(model, [dict(tensor_fqn=f'{names[m]}.weight') for m in layers(model)])

    def _make_tensor_mask(self, data, input_shape, **kwargs):
        return super()._make_tensor_mask(data.flatten(1), input_shape, **kwargs).view(input_shape)

    def to(self, sparsity):
        "New masks at `sparsity` percent"
        for g in self.groups: g['sparsity_level'] = sparsity / 100
        self.step()

def check(context, criteria='magnitude'):
    "Refuse what it does not offer"
    if context == 'global': raise NotImplementedError('it prunes each layer by itself only')
    if criteria != 'magnitude': raise NotImplementedError('it scores by the norm of weights only')

def choose(model, context, criteria):
    check(context, criteria)
    return Flat(model).to

def hold(model, opt): Flat(model).to(SPARSITY)

def callback(context):
    check(context)
    return agp_callback(lambda model: Flat(model).to)
