"Networks, data, and training steps that all contestants share"
import torch
from torch import nn
from .adapters import SPARSITY

def resnet(depth):
    "torchvision's, for ten classes"
    from torchvision.models import resnet18, resnet50
    return {18: resnet18, 50: resnet50}[depth](num_classes=10)

def vit_linears():
    "The linear layers of ViT-B/16 (torchvision's takes seconds to build)"
    shapes = [(768, 3*768), (768, 768), (768, 3072), (3072, 768)] * 12 + [(768, 1000)]
    model = nn.Sequential(*[nn.utils.skip_init(nn.Linear, i, o, bias=False) for i, o in shapes])
    for m in model: nn.init.normal_(m.weight, std=.02)
    return model

SIZES = {'ResNet-18, 11 M': lambda: resnet(18), 'ResNet-50, 23 M': lambda: resnet(50),
         'ViT-B linear, 86 M': vit_linears}

def layer_type(model): return nn.Conv2d if any(isinstance(m, nn.Conv2d) for m in model.modules()) else nn.Linear

def layers(model):
    "The layers whose weights are to become sparse"
    kind = layer_type(model)
    return [m for m in model.modules() if isinstance(m, kind)]

def pools(values, context):
    "Numbers of each layer, summed over those who compete"
    return [sum(values)] if context == 'global' else list(values)

def verdict(zeros, sizes, sparsity=SPARSITY):
    "Was the count exact?"
    floor = [n * sparsity // 100 for n in sizes]
    if zeros == floor: return 'exact'
    off = sum(abs(z - f) for z, f in zip(zeros, floor))
    if zeros == [round(n * sparsity / 100) for n in sizes]: return f'rounds up: {off:,} more'
    return f'off by {off:,} of {sum(sizes):,}'

def count(model, context, sparsity=SPARSITY, masks=None):
    "`verdict` on the weights, or on `masks`"
    ws = [m.weight.detach() for m in layers(model)]
    zeros = [w.numel() - int(w.count_nonzero()) for w in masks or ws]
    return verdict(pools(zeros, context), pools([w.numel() for w in ws], context), sparsity)

def agp_callback(make):
    """A fastai callback for a library that has none: `make(model)` gives a function of a sparsity, called after each
    step"""
    from fastai.callback.core import Callback
    class Agp(Callback):
        def before_fit(self): self.prune_to = make(self.learn.model)
        def after_step(self):
            done = (self.epoch*self.n_iter + self.iter + 1) / (self.n_epoch*self.n_iter)
            self.prune_to(SPARSITY * (1 - (1 - done)**3))
    return Agp()

def learner(net, device, batches=None):
    "A fastai `Learner`: the digits, or ResNet-18 on random images (64 px, batches of 16)"
    from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner
    if net == 'digits net':
        from fasterai_clone.digits import digits_dls, digits_net
        dls, model = digits_dls(), digits_net()
    else:
        data = list(zip(torch.randn(16*batches, 3, 64, 64), torch.randint(10, (16*batches,))))
        dls, model = DataLoaders(DataLoader(data, bs=16, shuffle=True), DataLoader(data[:16], bs=16)), resnet(18)
    return Learner(dls.to(device), model.to(device), loss_func=CrossEntropyLossFlat())

OPTIMIZERS = {'SGD, momentum': lambda ps: torch.optim.SGD(ps, lr=.01, momentum=.9),
              'Adam': lambda ps: torch.optim.Adam(ps, lr=1e-3)}

def stepper(contestant, model, optimizer, x, y):
    "A function that makes one training step with the masks of `contestant` held"
    opt = OPTIMIZERS[optimizer](model.parameters())
    after = contestant.call('hold', model, opt)
    def step():
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        if after: after()
        opt.zero_grad()
    return step
