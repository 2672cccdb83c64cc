"""Channels under a mean over channels (global response norms), and channels inside the groups of a convolution: what is
removed is removed exactly, in fp64, and what cannot be is refused with a reason"""
import copy
import pytest, torch, torch.nn as nn
from fastai.data.core import DataLoaders
from fastai.learner import Learner

from fasterai_clone.analyze.all import judge_by, score_curves, sensitivity
from fasterai_clone.core.masks import Masks
from fasterai_clone.prune.all import *
from fasterai_clone.sparse.all import Sparsifier
from helpers import Parts
from test_thin import lively


class GRN(nn.Module):
    "A global response norm of ConvNeXt V2, over tokens"
    def __init__(self, n, eps=1e-2):
        super().__init__()
        self.gamma, self.beta, self.eps = nn.Parameter(torch.rand(n) + 0.5), nn.Parameter(torch.randn(n)), eps
    def forward(self, x):
        gx = x.norm(p=2, dim=1, keepdim=True)
        return self.gamma * (x * (gx / (gx.mean(dim=-1, keepdim=True) + self.eps))) + self.beta + x

class First(GRN):
    "The same with channels first, the mean without its axis, another order and steps in place"
    def forward(self, x):
        gx = x.square().sum((2, 3)).sqrt()
        nx = gx.mul_((self.eps + gx.mean(1)).reciprocal().unsqueeze(1))[:, :, None, None]
        return torch.addcmul(self.beta[:, None, None], nx * x, self.gamma.view(-1, 1, 1)).add_(x)

class Written(GRN):
    "A number in the code"
    def forward(self, x): return self.gamma * x / (x.norm(dim=1, keepdim=True).mean(-1, keepdim=True) + 1e-2) + x

class Elsewhere(GRN):
    "Its `eps` is a number of another mean, too"
    def __init__(self, n):
        super().__init__(n)
        self.more, self.scale = nn.Linear(n, 6), nn.Parameter(torch.rand(6))
    def forward(self, x):
        y = self.more(x)
        return super().forward(x) * (self.scale * (y / (y.relu().mean(-1, keepdim=True) + self.eps))).sum(-1, True)

class Told(GRN):
    "The mean is an output of the model, too"
    def forward(self, x):
        self.mean = x.norm(dim=1, keepdim=True).mean(-1, keepdim=True)
        return self.gamma * (x / (self.mean + self.eps))

class Net(nn.Module):
    def __init__(self, norm, again=False, n=8):
        super().__init__()
        self.conv = norm is First
        def layer(i, o): return nn.Conv2d(i, o, 1) if self.conv else nn.Linear(i, o)
        self.fc1, self.grn, self.fc2, self.again = layer(3, n), norm(n), layer(n, 2), again
    def forward(self, x):
        x = self.grn(nn.functional.gelu(self.fc1(x)))
        if self.again: x = self.grn(x)
        y = self.fc2(x)
        return (y, self.grn.mean) if isinstance(self.grn, Told) else y

def data(net): return torch.randn(2, 3, 5, 5) if net.conv else torch.randn(2, 5, 3)

@torch.no_grad()
def test_by_hand():
    "G = 4, 2, 0, 0: the mean over the two that are left is twice 1.5, and so are the number and the weights"
    net = nn.Sequential(nn.Linear(1, 4, bias=False), GRN(4, eps=0.5), nn.Linear(4, 1, bias=False))
    net[0].weight[:, 0] = torch.tensor([4., 2., 0., 0.])
    net[1].gamma[:], net[1].beta[:] = torch.tensor([3., 5., 7., 7.]), torch.tensor([1., 1., 0., 0.])
    x = torch.ones(1, 1, 1)
    assert net[1](net[0](x)).flatten().tolist() == [3*4*4/2 + 1 + 4, 5*2*2/2 + 1 + 2, 0, 0]
    small = thin(net, example_inputs=x)
    assert small[1].gamma.tolist() == [6, 10] and small[1].eps == 1 and net[1].eps == 0.5
    assert small[1](small[0](x)).flatten().tolist() == [29, 13]
    assert torch.equal(small(x), net(x))

@pytest.mark.parametrize('again', [False, True])
@pytest.mark.parametrize('norm', [GRN, First])
def test_exact(norm, again, tmp_path):
    "Also if the norm runs twice, if channels are removed twice, and from a file"
    torch.manual_seed(0)
    net = lively(Net(norm, again).eval().double())
    x   = data(net).double()
    sp  = Sparsifier(net, 'filter', layer_type=(nn.Linear, nn.Conv2d), coupled=True, example_inputs=x)
    sp.sparsify_model(n=3)
    dead = net.fc1.bias == 0
    assert dead.sum() == 3 and torch.equal(net.grn.beta == 0, dead) and net.grn.gamma[dead].all()
    small = thin(net, example_inputs=x)
    assert small.fc1.weight.shape[0] == 5 and small.grn.eps == pytest.approx(1e-2*8/5, rel=1e-12)
    torch.testing.assert_close(small(x), net(x), rtol=0, atol=1e-13)
    with torch.no_grad(): small.fc1.weight[0], small.fc1.bias[0], small.grn.beta[0] = 0, 0, 0
    less = thin(small, example_inputs=x)
    assert less.grn.eps == pytest.approx(1e-2*8/4, rel=1e-12)
    torch.testing.assert_close(less(x), small(x), rtol=0, atol=1e-13)
    file = save_thinned(less, tmp_path/'small')
    back = load_thinned(lambda: Net(norm, again).eval().double(), file)
    assert torch.equal(back(x), less(x)) and back.grn.eps == less.grn.eps

def test_precision_of_the_weights():
    "Weights are rounded to their own precision; the check does not mistake this for another function"
    torch.manual_seed(0)
    net = lively(Net(GRN).eval())
    x   = data(net)
    with torch.no_grad(): net.fc1.weight[:3], net.fc1.bias[:3], net.grn.beta[:3] = 0, 0, 0
    torch.testing.assert_close(thin(net, example_inputs=x)(x), net(x), rtol=1e-5, atol=1e-6)
    assert thin(net.bfloat16(), example_inputs=x.bfloat16()).fc1.out_features == 5

WHY = [(Written, 'not an attribute'), (Elsewhere, 'other uses'), (Told, 'takes its `mean`')]

@pytest.mark.parametrize('norm,why', WHY)
def test_what_stays(norm, why):
    net   = lively(Net(norm).eval())
    group = next(g for g in coupled_groups(net, data(net)) if g.name == 'fc1')
    assert why in group.why_not and not group.scales

def test_a_number_that_is_used_otherwise_is_found_by_a_trial():
    "`eps` is the number of a layer norm, too: the `Sparsifier` leaves the channels out, and `thin` refuses them"
    class Both(GRN):
        def forward(self, x):
            shift = nn.functional.layer_norm(x.sum(-1), (5,), eps=self.eps)
            return super().forward(x) * shift[..., None]
    torch.manual_seed(0)
    net = lively(Net(Both).eval())
    with pytest.raises(ValueError, match='no channel can be removed.*fc1'):
        Sparsifier(net, 'filter', layer_type=nn.Linear, coupled=True, example_inputs=data(net))


class Splat(nn.Module):
    "Two groups of a convolution, whose outputs are added: as in ResNeSt"
    def __init__(self, transposed=False):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), self.grouped(transposed), nn.Conv2d(6, 2, 1)
    def grouped(self, transposed): return (nn.ConvTranspose2d if transposed else nn.Conv2d)(8, 12, 3, groups=2)
    def forward(self, x):
        y = self.b(self.a(x).relu())
        return self.c(y.reshape(y.shape[0], 2, y.shape[1]//2, *y.shape[2:]).sum(1))

@pytest.mark.parametrize('transposed', [False, True])
def test_each_group_loses_the_same(transposed, tmp_path):
    torch.manual_seed(0)
    net, x = lively(Splat(transposed).eval().double()), torch.randn(2, 3, 6, 6).double()
    groups = coupled_groups(net, x)
    assert {g.name: g.n for g in groups if not g.why_not} == dict(a=4, b=6)
    masks = group_masks(groups, [None if g.why_not else torch.arange(g.n) % 2 == 0 for g in groups])
    small = thin(net, masks, x)
    assert (small.a.out_channels, small.b.in_channels, small.b.out_channels, small.b.groups) == (4, 4, 6, 2)
    assert small.c.in_channels == 3
    Masks(masks).apply(dict(net.named_parameters()))
    torch.testing.assert_close(small(x), net(x), rtol=0, atol=1e-13)
    back = load_thinned(lambda: Splat(transposed).eval().double(), save_thinned(small, tmp_path/'small'))
    assert torch.equal(back(x), small(x)) and back.b.groups == 2

def test_whole_groups_where_they_are_independent():
    "As in ResNeXt: a group goes as a whole, and the number of groups with it"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(12, 2, 1))
    net = lively(net.eval())
    x   = torch.randn(2, 3, 6, 6)
    groups = coupled_groups(net, x)
    assert [g.n for g in groups if not g.why_not] == [4]
    small = thin(net, group_masks(groups, [torch.arange(4) > 0, None]), x)
    assert (small[2].groups, small[2].in_channels, small[2].out_channels) == (3, 6, 9)


def test_filters_of_several_groups():
    "Half of each part of `a`, and what is left computes the same"
    torch.manual_seed(0)
    net, x = Parts().double(), torch.randn(2, 3, 4, 4).double()
    sp = Sparsifier(net, 'filter', coupled=True, example_inputs=x)
    assert [(t.label, t.key, t.groups.n) for t in sp.targets] == [
        ('a', 'a.weight:0', 4), ('a', 'a.weight:4', 8), ('b', 'b.weight', 4), ('c', 'c.weight', 6)]
    sp.sparsify_model(50)
    assert [int((net.a.bias[some] == 0).sum()) for some in (slice(4), slice(4, 12))] == [2, 4]
    again = Sparsifier(net, 'filter', coupled=True, example_inputs=x)
    again.load_state_dict(sp.state_dict())
    assert again.masks == sp.masks
    small = thin(net, example_inputs=x)
    assert (small.n, small.a.out_channels, small.b.in_channels, small.c.in_channels) == ([2, 4], 6, 2, 4)
    torch.testing.assert_close(small(x), net(x), rtol=0, atol=1e-13)

def test_lasso_of_filters_of_several_groups():
    "Each part has its own flags, also after they were saved"
    from fasterai_clone.methods.group_lasso import GroupLasso, group_norms_of
    torch.manual_seed(0)
    net, x = Parts(), torch.randn(2, 3, 4, 4)
    sp     = Sparsifier(net, 'filter', coupled=True, example_inputs=x)
    lasso  = GroupLasso(sp, 1., sparsity=50)
    want   = sum((sum(p.groups.size for p in t.parts)**0.5 * group_norms_of(t).sort().values[:t.groups.n//2].sum())
                 for t in sp.targets)
    torch.testing.assert_close(lasso(), want)
    other = GroupLasso(sp, 1., sparsity=50)
    other.load_state_dict(lasso.state_dict())
    flags = [{k: v.flatten().tolist() for k,v in o.only.items()} for o in (lasso, other)]
    assert flags[0] == flags[1] and len(flags[0]) == 4

def test_results_by_layer_are_refused_for_several_groups():
    "`sensitivity` and `allocate` keep results by layer: a second target would overwrite the first"
    torch.manual_seed(0)
    net, x = Parts().eval(), torch.randn(4, 3, 6, 6)
    def metric(out, y): return out.float().mean()
    which = dict(coupled=True, example_inputs=x, layer_type=nn.Conv2d)
    with pytest.raises(ValueError, match="several coupled groups.*exclude='a'"):
        sensitivity(net, [(x, x)], metric, (50,), 'filter', **which)
    with pytest.raises(ValueError, match="exclude='a'"): score_curves(Sparsifier(net, 'filter', **which))
    assert 'a' not in sensitivity(net, [(x, x)], metric, (50,), 'filter', exclude='a', **which).values

def test_sparsities_of_a_layer_with_several_groups_are_judged_together():
    "The masks of both parts of `a` apply at once: two of four and four of eight filters"
    net, x = Parts().eval(), torch.randn(2, 3, 4, 4)
    def n_zero(model, data): return float((net.a.weight.flatten(1) == 0).all(1).sum())
    sp = Sparsifier(net, 'filter', 'local', coupled=True, example_inputs=x)
    assert judge_by(sp, None, n_zero)(50) == 6 and n_zero(net, None) == 0

def test_an_interrupted_removal_leaves_the_norm():
    "The weights that a mean scales are restored too, if a removal ends with Ctrl-C"
    class Stopped(PruneCallback):
        def for_rest(self, sp, dead): raise KeyboardInterrupt
    torch.manual_seed(0)
    net = Net(GRN)
    x   = data(net)
    was, dl = copy.deepcopy(net.state_dict()), [(x, torch.randn(2, 5, 2))]
    learn = Learner(DataLoaders(dl, dl), net, loss_func=nn.MSELoss(), lr=0.)
    with learn.no_bar(), learn.no_logging(), pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=Stopped(50, verbose=False))
    assert net.grn.eps == 1e-2
    for k,t in net.state_dict().items(): assert torch.equal(t, was[k]), k

def test_a_number_of_zero_is_read_back(tmp_path):
    net = lively(Net(GRN).eval())
    net.grn.eps = 0.
    with torch.no_grad(): net.fc1.weight[:3], net.fc1.bias[:3], net.grn.beta[:3] = 0, 0, 0
    x = data(net)
    small = thin(net, example_inputs=x)
    def made():
        net = Net(GRN).eval()
        net.grn.eps = 0.
        return net
    assert torch.equal(load_thinned(made, save_thinned(small, tmp_path/'small'))(x), small(x))

def test_groups_and_then_filters_are_read_back(tmp_path):
    "One of four groups is left, and then loses a filter: its file can still be read"
    def made(): return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1, groups=4), nn.Conv2d(12, 2, 1)).eval()
    torch.manual_seed(0)
    net, x = lively(made()), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        for m,n in (net[0], 2), (net[1], 3): m.weight[n:], m.bias[n:] = 0, 0
    small = thin(net, example_inputs=x)
    with torch.no_grad(): small[1].weight[0], small[1].bias[0] = 0, 0
    small = thin(small, example_inputs=x)
    assert (small[1].groups, small[1].out_channels) == (1, 2)
    back = load_thinned(made, save_thinned(small, tmp_path/'small'))
    assert back[1].groups == 1 and torch.equal(back(x), small(x))

def test_a_layer_that_keeps_a_part_is_not_said_to_keep_all():
    "The first four channels of `a` leave the model, the other eight can go"
    class Out(Parts):
        def forward(self, x):
            p, q = self.a(x).relu().split(self.n, 1)
            return p, self.c(q)
    torch.manual_seed(0)
    net, x = Out().double(), torch.randn(2, 3, 4, 4).double()
    sp = Sparsifier(net, 'filter', coupled=True, example_inputs=x)
    assert [t.key for t in sp.targets] == ['a.weight:4']
    assert 'output' in sp.left_out['part of a'] and 'a' not in sp.left_out
