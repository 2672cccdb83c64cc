"Small networks that are trained here and pruned afterwards: digits, MNIST, and a language model of bytes"
import importlib, inspect
from functools import partial
from typing import Callable, NamedTuple
import torch, torch.nn as nn, torch.nn.functional as F
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, accuracy, set_seed
from fastai.callback import progress, schedule  # noqa: F401, give `Learner` its `no_bar` and `fit_one_cycle`
from fasterai_clone.analyze.all import evaluate, perplexity
from fasterai_clone.digits import digits_dls, digits_net
from .mnist import Batches, lenet_300_100, lenet_5, load_mnist

WEIGHTS = nn.Conv2d, nn.Linear

class Network(NamedTuple):
    "A trained network, data for calibration, for decisions and for the report, and how it is measured and pruned"
    model: nn.Module
    calibration: list   # batches without labels, of what it was trained on
    held: tuple         # a batch with targets: to decide with
    test: tuple         # another: to report on
    loss: Callable      # outputs, targets → mean loss
    score: Callable     # model, batch → accuracy in percent, or perplexity
    which: dict         # layers whose weights are pruned
    wide: dict          # the context of magnitudes
    units: dict         # layers whose filters or units are pruned
    metric: str = 'accuracy'

def right(model, batch):
    "Accuracy in percent"
    return 100*evaluate(model, batch, accuracy)

def cross_entropy(out, y): return F.cross_entropy(out, y)

def classifier(model, bs, calibration, valid, **how):
    "A `Network` of a trained classifier; every other image of `valid` decides, the others report"
    x, y = (t.as_subclass(torch.Tensor) for t in valid)
    calibration = [(b,) for b in calibration.as_subclass(torch.Tensor).split(bs)]
    return Network(model.eval(), calibration, (x[::2], y[::2]), (x[1::2], y[1::2]), cross_entropy, right, **how)

def fit(model, dls, epochs, lr):
    "Train with the one-cycle schedule"
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), train_bn=False)
    learn.recorder.train_metrics = False
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr)
    return learn.model

def digits(seed, epochs=8):
    "A convolutional network with batch norms"
    set_seed(seed, reproducible=True)
    dls   = digits_dls()
    model = fit(digits_net(), dls, epochs, 1e-2)
    valid = [*map(torch.cat, zip(*[b for b in dls.valid]))]
    calibration = torch.cat([x for x,_ in dls.train])[:512]
    return classifier(model, 64, calibration, valid, which=dict(layer_type=WEIGHTS, exclude='0'),
                      wide=dict(context='global'), units=dict(layer_type=nn.Conv2d, exclude='0'))

def mnist(make, which, last, bs, epochs, folder, seed):
    "A network without norms; the 10,000 test images are halved, as those of `classifier`"
    set_seed(seed, reproducible=True)
    x, y, x_test, y_test = load_mnist(folder)
    dls   = DataLoaders(Batches(x, y, bs, shuffle=True), Batches(x_test, y_test, 1000), device='cpu')
    model = fit(make(), dls, epochs, 3e-3)
    return classifier(model, 64, x[:512], (x_test, y_test), which=dict(layer_type=WEIGHTS, **which),
                      wide=dict(context='global'), units=dict(layer_type=WEIGHTS, exclude=last))

def docs(name):
    "Yield the docstrings of a module, and of its functions and classes"
    m = importlib.import_module(name)
    for o in [m, *vars(m).values()]:
        if inspect.ismodule(o) or callable(o): yield inspect.getdoc(o) or ''

MODULES = '''builtins argparse collections datetime decimal functools inspect itertools logging random statistics string
             typing'''.split()

def text_lines(length=64):
    "Bytes of docstrings of Python's standard library, in lines for training, for decisions and for the report"
    text  = '\n'.join(sorted({d for n in MODULES for d in docs(n)})).encode()
    ids   = torch.tensor(list(text)).clamp(max=127)
    cut   = len(ids)*9//10//length*length
    valid = ids[cut:][:len(ids[cut:])//length*length].view(-1, length)
    return ids[:cut].view(-1, length), valid[::2], valid[1::2]

class Block(nn.Module):
    "Apply attention and an MLP"
    def __init__(self, d, heads=4):
        super().__init__()
        self.heads, self.n1, self.n2 = heads, nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3*d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4*d), nn.Linear(4*d, d)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.n1(x)).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.n2(x))))

class LanguageModel(nn.Module):
    "Predict the next byte"
    def __init__(self, d=80):
        super().__init__()
        self.embed, self.place = nn.Embedding(128, d), nn.Parameter(torch.zeros(64, d))
        self.blocks, self.norm, self.head = nn.Sequential(Block(d), Block(d)), nn.LayerNorm(d), nn.Linear(d, 128)

    def forward(self, input_ids):
        return self.head(self.norm(self.blocks(self.embed(input_ids) + self.place[:input_ids.shape[1]])))

def next_byte(out, ids): return F.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

def perplexity_of(model, batch):
    "Perplexity of the next byte"
    return perplexity(model, batch[:1])

def language_model(seed, steps=500):
    "Two transformer blocks; another seed has other weights and another order of the text"
    train, held, test = text_lines()
    torch.manual_seed(seed)
    train = train[torch.randperm(len(train))]
    model = LanguageModel()
    opt   = torch.optim.AdamW(model.parameters())
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, 6e-3, total_steps=steps)
    for _ in range(steps):
        x    = train[torch.randint(len(train), (24,))]
        loss = next_byte(model(x), x)
        opt.zero_grad()
        loss.backward()
        opt.step(), sched.step()
    inside = dict(layer_type=nn.Linear, exclude='head')
    return Network(model.eval(), [(b,) for b in train[:256].split(64)], (held, held), (test, test), next_byte,
                   perplexity_of, which=inside, wide={}, units=dict(layer_type=nn.Linear, include='*.up'),
                   metric='perplexity')

def makers(folder=None):
    "Name → function of a seed; `folder` has the files of MNIST, or None: torchvision downloads them"
    return {'digits': digits, 'language model': language_model,
            'LeNet-300-100': partial(mnist, lenet_300_100, {}, '5', 250, 3, folder),
            'LeNet-5': partial(mnist, lenet_5, dict(exclude='0'), '9', 125, 1, folder)}
