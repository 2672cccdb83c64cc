"Weights that stay make up for those that are gone: against closed forms, brute force and naive references"
import copy, itertools

import pytest, torch, torch.nn as nn, torch.nn.functional as F
from fasterai_clone.methods.all import METHODS, recalibrate, reconstruct, reconstruction_memory, sparsegpt
from fasterai_clone.methods.least_squares import admm, cg, damped, exact
from fasterai_clone.sparse.all import Masks, Sparsifier
from helpers import images, same, weights

f64 = torch.float64


# One layer: tensors

def correlated(n_inputs, n_samples, rank=None, outliers=0):
    "Inputs that go together, so that some can stand in for others"
    rank = rank or n_inputs//2
    x = torch.randn(n_inputs, rank, dtype=f64) @ torch.randn(rank, n_samples, dtype=f64) / rank**.5
    x = x + .5*torch.randn(n_inputs, n_samples, dtype=f64)
    if outliers: x[::outliers] *= 20
    return x

def problem(n_outputs=8, n_inputs=32, n_samples=400, **kwargs):
    X, W = correlated(n_inputs, n_samples, **kwargs), torch.randn(n_outputs, n_inputs, dtype=f64)
    return X, W, X @ X.T / n_samples

def error(new, X, W): return float(((new - W) @ X).square().mean())

def random_mask(W, share): return torch.rand_like(W) >= share

def nm_mask(W, n=2, m=4):
    "The n largest of each m"
    order = W.abs().unflatten(1, (-1, m)).argsort(dim=-1, descending=True)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., :n], True).flatten(1)

def constant(W, keep): return torch.full_like(W, keep, dtype=torch.bool)

MASKS = dict(half=lambda W: random_mask(W, .5), most=lambda W: random_mask(W, .9), few=lambda W: random_mask(W, .1),
             nm=nm_mask, inputs=lambda W: (torch.arange(W.shape[1]) % 3 > 0).expand_as(W),
             nothing=lambda W: constant(W, False), everything=lambda W: constant(W, True))
by_mask = pytest.mark.parametrize('mask', MASKS.values(), ids=MASKS)

@by_mask
@pytest.mark.parametrize('seed', range(3))
def test_the_better_method_has_the_smaller_error(mask, seed):
    torch.manual_seed(seed)
    X, W, H = problem()
    mask = mask(W)
    new  = {k: f(H, W @ H, mask) for k,f in METHODS.items()}
    errors = {k: error(w, X, W) for k,w in new.items()}
    floor  = errors['exact'] - 1e-12
    assert all(not w[~mask].any() and w.isfinite().all() for w in new.values())
    assert floor <= errors['cg'] <= errors['sparsegpt'] + 1e-9 and floor <= errors['admm'] <= errors['sparsegpt'] + 1e-9
    assert errors['sparsegpt'] <= error(W*mask, X, W) + 1e-12

@by_mask
def test_exact_is_exact(mask):
    "Row by row, by PyTorch's own least squares on the samples"
    X, W, H = problem()
    mask = mask(W)
    new  = exact(H, W @ H, mask)
    for w,row,keep in zip(W, new, mask):
        want = torch.linalg.lstsq(X[keep].T, X.T @ w).solution if keep.any() else w[:0]
        torch.testing.assert_close(row[keep], want)

@by_mask
def test_iterations_lead_to_exact(mask):
    X, W, H = problem()
    mask = mask(W)
    torch.testing.assert_close(cg(H, W @ H, mask, iterations=60), exact(H, W @ H, mask), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(admm(H, W @ H, mask, iterations=3000), exact(H, W @ H, mask), rtol=1e-4, atol=1e-4)

def test_conjugate_gradients_get_better_with_each_iteration():
    X, W, H = problem()
    mask = random_mask(W, .5)
    errors = [error(cg(H, W @ H, mask, iterations=i), X, W) for i in range(12)]
    assert errors[0] == pytest.approx(error(W*mask, X, W)) and all(b < a for a,b in itertools.pairwise(errors))

def test_one_weight_by_the_closed_form():
    "Optimal brain surgeon: w − w_q/[H⁻¹]_qq·[H⁻¹]_q:, at the cost w_q²/[H⁻¹]_qq (of the mean square)"
    X, W, H = problem(1, 6)
    inverse = torch.linalg.inv(H)
    for q in range(6):
        mask = torch.arange(6)[None] != q
        want = W - W[:, q:q+1] / inverse[q, q] * inverse[q]
        new  = exact(H, W @ H, mask)
        torch.testing.assert_close(new, want * mask)
        assert error(new, X, W) == pytest.approx(float(W[0, q]**2 / inverse[q, q]))
        # all others are to the right of the first one
        if q == 0: torch.testing.assert_close(sparsegpt(W, H, mask=mask, damping=0)[0], want * mask)

@pytest.mark.parametrize('seed', range(10))
def test_the_best_mask_of_all_is_not_beaten(seed):
    "Three of six inputs: 20 masks; SparseGPT, which chooses in one sweep, stays within 12 times the best"
    torch.manual_seed(seed)
    X, W, H = problem(1, 6)
    def least(kept): return error(exact(H, W @ H, torch.tensor([[i in kept for i in range(6)]])), X, W)
    best = min(map(least, itertools.combinations(range(6), 3)))
    new, mask = sparsegpt(W, H, n_drop=3, damping=0)
    fitted, swept = error(exact(H, W @ H, mask), X, W), error(new, X, W)
    assert best <= fitted + 1e-12 and fitted <= swept + 1e-12 and swept <= 12*best

@pytest.mark.parametrize('seed', range(3))
def test_outliers_among_inputs(seed):
    "Magnitude does not see them, Wanda does, and SparseGPT makes up for what is gone as well"
    torch.manual_seed(seed)
    X, W, H = problem(32, 256, 1000, rank=64, outliers=16)
    def top_half(scores): return torch.zeros_like(W, dtype=torch.bool).scatter_(1, scores.argsort(1)[:, 128:], True)
    magnitude, wanda = top_half(W.abs()), top_half(W.abs() * H.diagonal().sqrt())
    new, _ = sparsegpt(W, H, 128, per_output=True)
    assert error(new, X, W) < .7*error(W*wanda, X, W) and error(W*wanda, X, W) < .2*error(W*magnitude, X, W)


# SparseGPT against a naive reference

def naive(W, H, n_drop=0, nm=None, mask=None, per_output=False, block=128):
    "Unblocked: after each column the inverse is that of what is left of H, computed anew"
    W, n = W.clone(), W.shape[1]
    keep = torch.ones_like(W, dtype=torch.bool) if mask is None else mask.clone()
    for j in range(n):
        if j % block == 0 and mask is None:
            end = min(j + block, n)
            # the pivot of column i, given those to its right
            pivots = torch.stack([torch.linalg.inv(H[i:, i:])[0, 0] for i in range(j, end)])
            scores = W[:, j:end]**2 / pivots
            if nm:
                for r in range(len(W)):
                    for c in range(0, end - j, nm[1]):
                        for i in scores[r, c:c+nm[1]].argsort(stable=True)[:nm[1]-nm[0]]: keep[r, j+c+i] = False
            else:
                due = n_drop*end//n - n_drop*j//n
                for r in range(len(W)) if per_output else [None]:
                    s = scores.flatten() if r is None else scores[r]
                    for i in s.argsort(stable=True)[:due].tolist():
                        if r is None: keep[i // (end - j), j + i % (end - j)] = False
                        else: keep[r, j+i] = False
        inverse = torch.linalg.inv(H[j:, j:])
        for r in range(len(W)):
            if keep[r, j]: continue
            W[r, j:] -= W[r, j].clone() / inverse[0, 0] * inverse[0]
            W[r, j] = 0
    return W * keep, keep

@pytest.mark.parametrize('kwargs', [
    dict(n_drop=101), dict(n_drop=13, per_output=True), dict(nm=(2, 4)), dict(nm=(1, 4)), dict(n_drop=0),
    dict(n_drop=8*32), dict(mask='random')], ids=str)
@pytest.mark.parametrize('block', [8, 20, 128])
def test_same_as_unblocked(kwargs, block):
    X, W, H = problem()
    if 'mask' in kwargs: kwargs = dict(mask=random_mask(W, .6))
    new, mask  = sparsegpt(W, H, **kwargs, block=block, damping=0)
    want, keep = naive(W, H, **kwargs, block=block)
    assert torch.equal(mask, keep) and not new[~mask].any()
    torch.testing.assert_close(new, want, rtol=1e-4, atol=1e-8)

@pytest.mark.parametrize('n_drop', [0, 1, 77, 128, 255, 256])
def test_counts_are_exact(n_drop):
    "Ties, zero weights and dead inputs too"
    X, W, H = problem()
    W[:, 5:9], W[2], H[20] , H[:, 20] = 1., 0., 0., 0.
    for block in (5, 32): assert int((~sparsegpt(W, H, n_drop=n_drop, block=block)[1]).sum()) == n_drop
    each = n_drop // 8
    assert (~sparsegpt(W, H, n_drop=each, per_output=True, block=5)[1]).sum(1).tolist() == [each]*8
    assert sparsegpt(W, H, nm=(1, 4), block=6)[1].unflatten(1, (-1, 4)).sum(2).unique().tolist() == [1]

@pytest.mark.parametrize('kwargs, message', [
    (dict(), 'Give one of'), (dict(n_drop=1, mask=torch.ones(8, 32).bool()), 'Give one of'),
    (dict(n_drop=999), 'from 0 to 256'), (dict(n_drop=129, nm=(2, 4)), 'from 0 to 128'),
    (dict(n_drop=1, pruned=torch.zeros(8, 32).bool()), 'drops more than'),
    (dict(nm=(3, 5)), 'multiple of m'), (dict(mask=torch.ones(8, 32)), 'must be bool')])
def test_sparsegpt_refuses(kwargs, message):
    X, W, H = problem()
    with pytest.raises(ValueError, match=message): sparsegpt(W, H, **kwargs)

@pytest.mark.parametrize('case', ['dead', 'few', 'twice', 'zero'])
def test_singular_moments(case):
    "Dead inputs, fewer samples than inputs, the same input twice, nothing but zeros"
    X, W, _ = problem(n_samples=10 if case == 'few' else 400)
    if case == 'dead': X[[3, 7]] = 0
    if case == 'twice': X[1::2] = X[::2]
    if case == 'zero': X = X * 0
    mask, H0 = random_mask(W, .5), X @ X.T / X.shape[1]
    for damping in (0., .01):
        H, B, L = damped(H0, W @ H0, W, damping)
        for f in METHODS.values():
            new = f(H, B, mask, L)
            assert new.isfinite().all() and not new[~mask].any() and error(new, X, W) <= error(W*mask, X, W) + 1e-9
        if case in ('dead', 'zero'):
            at = [3, 7] if case == 'dead' else slice(None)
            torch.testing.assert_close(exact(H, B, mask)[:, at], (W*mask)[:, at])  # what has no say stays as it is


# Layers of all kinds

class Conv1D(nn.Module):
    "As in transformers: inputs × outputs"
    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))
    def forward(self, x): return x @ self.weight + self.bias

class SamePad(nn.Conv2d):
    "Pads as TensorFlow does"
    def forward(self, x):
        lack = [max(0, (-(-n//s) - 1)*s + k - n) for n,s,k in zip(x.shape[-2:], self.stride, self.kernel_size)]
        x = F.pad(x, [p for l in reversed(lack) for p in (l//2, l - l//2)])
        return F.conv2d(x, self.weight, self.bias, self.stride)

LAYERS = dict(
    linear    = (lambda: nn.Linear(6, 4), (50, 6)),
    tokens    = (lambda: nn.Linear(6, 4, bias=False), (5, 10, 6)),
    conv1d_hf = (lambda: Conv1D(4, 6), (9, 6, 6)),
    conv1     = (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (8, 4, 9)),
    conv2     = (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), (8, 2, 9, 8)),
    reflect   = (lambda: nn.Conv2d(2, 3, (3, 1), dilation=2, padding=(2, 0), padding_mode='reflect'), (8, 2, 6, 6)),
    same      = (lambda: nn.Conv2d(2, 3, 5, padding='same'), (6, 2, 6, 6)),
    depthwise = (lambda: nn.Conv2d(4, 8, 3, groups=4), (9, 4, 6, 6)),
    conv3     = (lambda: nn.Conv3d(2, 2, 2, stride=(1, 2, 1)), (5, 2, 4, 5, 4)),
    samepad   = (lambda: SamePad(2, 3, 3, stride=2), (8, 2, 8, 7)))

def by_hand(layer, x, keep, live):
    "Columns of outputs for each parameter that is free, found by switching them on one by one, and least squares"
    m, want = copy.deepcopy(layer), layer(x)
    params = [(p, k) for p,k in ((m.weight, keep), (m.bias, live)) if p is not None]
    for p,_ in params: p.data.zero_()
    columns = []
    for p,k in params:
        for i in k.flatten().nonzero()[:, 0].tolist():
            p.data.view(-1)[i] = 1
            columns.append(m(x).flatten())
            p.data.view(-1)[i] = 0
    found = torch.linalg.lstsq(torch.stack(columns, 1), want.flatten()[:, None], driver='gelsd').solution[:, 0]
    for p,k in params:
        n = int(k.sum())
        p.data.view(-1)[k.flatten()], found = found[:n], found[n:]
    return m

@pytest.mark.parametrize('make, shape', LAYERS.values(), ids=LAYERS)
@torch.no_grad()
def test_each_kind_of_layer_against_brute_force(make, shape):
    layer = make().double()
    x     = torch.randn(shape, dtype=f64) + 1
    keep  = torch.rand_like(layer.weight) > .5
    live  = None if layer.bias is None else torch.ones_like(layer.bias, dtype=torch.bool)
    want  = by_hand(layer, x, keep, live)
    done  = reconstruct(layer, {'weight': keep}, [(part,) for part in x.split(4)], damping=1e-10)
    assert not layer.weight[~keep].any() and not done.skipped
    torch.testing.assert_close(layer.weight, want.weight, rtol=1e-4, atol=1e-4)
    if layer.bias is not None: torch.testing.assert_close(layer.bias, want.bias, rtol=1e-4, atol=1e-4)
    (fit,) = done.layers.values()
    assert 0 <= fit.after < fit.before and fit.sparsity == pytest.approx(100*float((~keep).double().mean()))

@torch.no_grad()
def test_a_bias_that_is_dropped_stays_so():
    layer, x = nn.Linear(6, 4).double(), torch.randn(50, 6, dtype=f64) + 1
    keep, live = torch.rand(4, 6) > .4, torch.tensor([True, False, True, False])
    keep[3] = False
    want = by_hand(layer, x, keep, live)
    reconstruct(layer, {'weight': keep, 'bias': live}, x, damping=1e-10)
    torch.testing.assert_close(layer.weight, want.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.bias, want.bias, rtol=1e-4, atol=1e-5)
    assert layer.bias[1] == layer.bias[3] == 0 and not layer.weight[3].any()

@torch.no_grad()
def test_errors_in_the_report_are_those_of_the_outputs():
    layer, x = nn.Linear(6, 4).double(), torch.randn(50, 6, dtype=f64) + 1
    masks, dense = {'weight': torch.rand(4, 6) > .5}, copy.deepcopy(layer)
    fit = reconstruct(layer, masks, x, damping=.01).layers['']
    masked, y = copy.deepcopy(dense), dense(x)
    Masks(masks).apply(masked)
    for m,e in ((masked, fit.before), (layer, fit.after)):
        assert e == pytest.approx(float((m(x) - y).square().sum() / y.var(0, correction=0).sum() / len(x)))

@pytest.mark.parametrize('target', ['dense', 'layer'])
@torch.no_grad()
def test_the_second_layer_sees_what_the_first_has_become(target):
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x, dense = torch.randn(200, 6, dtype=f64), copy.deepcopy(net)
    masks = {k: torch.rand_like(p) > .4 for k,p in net.named_parameters() if p.ndim > 1}
    reconstruct(net, masks, x, target=target, damping=1e-10)
    torch.testing.assert_close(net[0].weight, by_hand(dense[0], x, masks['0.weight'], torch.ones(8).bool()).weight)
    hidden = net[:2](x)
    want   = dense(x) if target == 'dense' else dense[2](hidden)
    for r,keep in enumerate(masks['2.weight']):
        A = torch.cat([hidden[:, keep], torch.ones(200, 1, dtype=f64)], 1)
        found = torch.linalg.lstsq(A, want[:, r], driver='gelsd').solution
        torch.testing.assert_close(torch.cat([net[2].weight[r, keep], net[2].bias[r:r+1]]), found, rtol=1e-5, atol=1e-6)

@pytest.mark.parametrize('kdim', [None, 6])
@torch.no_grad()
def test_projections_of_attention(kdim):
    "Each of the three is fitted to its own inputs; what comes out is closer than with a mask alone"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim, batch_first=True)
            nn.init.normal_(self.attn.in_proj_bias)
        def forward(self, x, y): return self.attn(x, y, value=y)[0]
    net  = Net()
    a, b = torch.randn(3, 8), torch.randn(3, kdim or 8)
    data = [dict(x=torch.randn(20, 7, 3) @ a, y=torch.randn(20, 5, 3) @ b) for _ in range(2)]
    dense, masked = copy.deepcopy(net), copy.deepcopy(net)
    masks = {k: torch.rand_like(p) > .5 for k,p in net.named_parameters() if 'proj_weight' in k}
    Masks(masks).apply(masked)
    done = reconstruct(net, masks, data, damping=.01)
    assert [*done.layers] == ['attn.q', 'attn.k', 'attn.v'] and all(f.after < .8*f.before for f in done.layers.values())
    assert all(not net.get_parameter(k)[~m].any() for k,m in masks.items())
    def projected(m, i, x):
        w = m.attn.in_proj_weight[8*i:8*i+8] if kdim is None else getattr(m.attn, f'{"qkv"[i]}_proj_weight')
        return F.linear(x, w, m.attn.in_proj_bias[8*i:8*i+8]).flatten(0, -2)
    for i,(k,name) in enumerate(zip(done.layers, 'xyy')):
        x = torch.cat([b[name] for b in data])
        y = projected(dense, i, x)
        after = (projected(net, i, x) - y).square().sum() / y.var(0, correction=0).sum() / len(y)
        assert done.layers[k].after == pytest.approx(float(after), rel=1e-3)
    def off(m): return sum(float((m(**b) - dense(**b)).square().sum()) for b in data)
    assert off(net) < .8*off(masked)

@pytest.mark.parametrize('batch_first', [False, True])
def test_the_output_projection_of_attention_is_fitted_to_the_joined_heads(batch_first):
    "After the input projections, by least squares on what the heads give then"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        def forward(self, x): return self.a(x, x, x, need_weights=False)[0]
    net, x = Net().eval(), torch.randn(40, 6, 8)
    dense, masks = copy.deepcopy(net), {k: torch.rand(p.shape) > .5 for k,p in net.named_parameters() if p.ndim > 1}
    masked = copy.deepcopy(net)
    for k,m in masks.items(): masked.get_parameter(k).data.mul_(m)
    done = reconstruct(net, masks, x, damping=1e-9)
    assert [*done.layers] == ['a.q', 'a.k', 'a.v', 'a.out_proj'] and not done.skipped
    heads = copy.deepcopy(net)
    heads.a.out_proj.weight.data, heads.a.out_proj.bias.data = torch.eye(8), torch.zeros(8)
    z, y = heads(x).detach().flatten(0, 1).double(), dense(x).detach().flatten(0, 1).double()
    for row,keep in enumerate(masks['a.out_proj.weight']):
        best = torch.linalg.lstsq(torch.cat([z[:, keep], torch.ones(len(z), 1)], 1), y[:, row:row + 1]).solution[:, 0]
        assert torch.allclose(net.a.out_proj.weight[row, keep].double(), best[:-1], atol=1e-4)
    def off(m): return float((m(x) - dense(x)).square().mean())
    assert off(net) < .8*off(masked) and 'forward' not in vars(net.a)

def test_a_transformer_and_what_is_left_out():
    class Scaled(nn.Linear):
        def forward(self, input): return F.linear(input, F.normalize(self.weight), self.bias)
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layer = nn.Embedding(11, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.scaled, self.unused, self.head = Scaled(8, 8), nn.Linear(2, 2), nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight
        def forward(self, input_ids): return self.head(self.scaled(self.layer(self.embed(input_ids))))
    net   = Net().eval()
    masks = {k: torch.rand_like(p) > .5 for k,p in net.named_parameters() if p.ndim > 1}
    done  = reconstruct(net, masks, [dict(input_ids=torch.randint(11, (40, 6))) for _ in range(3)])
    assert [*done.layers] == [f'layer.{k}' for k in
                              'self_attn.q self_attn.k self_attn.v self_attn.out_proj linear1 linear2'.split()]
    assert done.skipped == {'embed.weight': 'is shared by several modules',
                            'scaled.weight': 'does more than weights · inputs + bias',
                            'unused.weight': 'did not run'}
    assert all(not net.get_parameter(k)[~m].any() for k,m in masks.items())
    assert 'unused.weight was only masked: it did not run' in str(done) and len(done.to_pandas()) == 6

class Mixture(nn.Module):
    "Two experts, one for each half of the items; which is which depends on the first layer"
    def __init__(self):
        super().__init__()
        self.first, self.experts = nn.Linear(6, 6), nn.ModuleList(nn.Linear(6, 3) for _ in range(2))
    def forward(self, x):
        x = self.first(x)
        second, out = x[:, 0] > 0, x.new_empty(len(x), 3)
        for i,e in enumerate(self.experts): out[second == i] = e(x[second == i])
        return out

def test_experts():
    "They get other items in the pruned network, so the target is what their dense weights give; a batch may have none"
    net, x = Mixture(), torch.randn(200, 3) @ torch.randn(3, 6)
    masks  = {k: torch.rand_like(p) > .5 for k,p in net.named_parameters() if p.ndim > 1}
    was    = weights(net)
    with pytest.raises(ValueError, match="Use target='layer'"): reconstruct(net, masks, x)
    assert same(weights(net), was)
    with torch.no_grad(): none = x[net.first(x)[:, 0] > 0]
    done = reconstruct(net, masks, [(x,), (none,)], target='layer')
    assert [*done.layers] == ['first', 'experts.0', 'experts.1']
    assert all(f.after < f.before for f in done.layers.values())

@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_language_models(kind):
    "Every matrix of the blocks is fitted, in the order of the data"
    hf = pytest.importorskip('transformers')
    sizes = dict(vocab_size=50, bos_token_id=0, eos_token_id=0)
    if kind == 'gpt2': net = hf.GPT2LMHeadModel(hf.GPT2Config(n_positions=8, n_embd=8, n_layer=1, n_head=2, **sizes))
    else:
        config = hf.LlamaConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
                                num_key_value_heads=1, max_position_embeddings=8, **sizes)
        net = hf.LlamaForCausalLM(config)
    blocks = {k: p for k,p in net.named_parameters() if p.ndim > 1 and ('.h.' in k or '.layers.' in k)}
    masks  = {k: torch.rand_like(p) > .5 for k,p in blocks.items()}
    ids    = torch.randint(50, (40, 8))
    done   = reconstruct(net, masks, [dict(input_ids=i, labels=i) for i in ids.split(20)], damping=.01)
    wanted = dict(gpt2='c_attn c_proj c_fc c_proj', llama='q_proj k_proj v_proj o_proj gate_proj up_proj down_proj')
    assert [k.split('.')[-1] for k in done.layers] == wanted[kind].split() and not done.skipped
    assert all(f.after < f.before and f.samples == 320 for f in done.layers.values())
    assert all(not net.get_parameter(k)[~m].any() for k,m in masks.items())

def test_a_layer_that_runs_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
        def forward(self, x): return self.a(torch.tanh(self.a(x)))
    net, x = Twice(), torch.randn(100, 2) @ torch.randn(2, 4)
    done = reconstruct(net, {'a.weight': torch.rand(4, 4) > .4}, x, damping=.01)
    assert done.layers['a'].samples == 200 and done.layers['a'].after < done.layers['a'].before


# The model

def net():
    first = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout()
    return nn.Sequential(*first, nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(48, 5))

def pruned(sparsity=50):
    "A dense network, its pruned copy, and the sparsifier of the copy"
    dense = net()
    model = copy.deepcopy(dense)
    sp    = Sparsifier(model, layer_type=(nn.Conv2d, nn.Linear))
    sp.sparsify_model(sparsity)
    return dense, model, sp

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('method', METHODS)
def test_zeros_are_where_the_mask_says_and_all_else_stays(method, dtype):
    dense, model, sp = pruned()
    dense.to(dtype), model.to(dtype).train()
    x = torch.randn(30, 1, 8, 8, dtype=dtype)
    was, numbers = weights(model), torch.get_rng_state()
    reconstruct(model, sp.masks, x, method, dense=dense, damping=.01)
    now = weights(model)
    changed = {k for k in was if not torch.equal(was[k], now[k])}
    assert changed == {f'{i}.{k}' for i in (0, 4, 6) for k in ('weight', 'bias')}
    assert all(torch.equal(model.get_parameter(k) != 0, m) for k,m in sp.masks.items())
    assert now['0.weight'].dtype == dtype and all(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *dense.modules()])

def test_where_the_dense_weights_come_from():
    "A model, its state, or the model itself before it is pruned: the same; and without them it is refused"
    dense, model, sp = pruned()
    x, results = torch.randn(30, 1, 8, 8), []
    for source in (dense, dense.state_dict(), None):
        m = copy.deepcopy(dense if source is None else model)
        reconstruct(m, sp, x, dense=source)
        results.append(weights(m))
    assert same(results[0], results[1]) and same(results[0], results[2])
    with pytest.raises(ValueError, match='zero already'): reconstruct(model, sp, x)

def test_wrapped_models_and_batches_of_any_form():
    dense, model, sp = pruned()
    x = torch.randn(30, 1, 8, 8)
    y, results = torch.zeros(30), []
    for data in (x, (x, y), [(x[:20], y[:20]), (x[20:], y[20:])], ((p,) for p in x.split(7)), [dict(input=x)]):
        m = copy.deepcopy(model)
        reconstruct(nn.DataParallel(m), sp, data, dense=dense)
        results.append(m[6].weight.detach())
    for r in results[1:]: torch.testing.assert_close(r, results[0], rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('stop', [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize('at', [0, 1, 2])
@pytest.mark.parametrize('target', ['dense', 'layer'])
def test_all_or_nothing(stop, at, target):
    "And the exception tells how far it came"
    dense, calls = net(), []
    masks = {k: torch.rand_like(p) > .5 for k,p in dense.named_parameters() if p.ndim > 1}
    def stopping(H, B, mask, L):
        calls.append(1)
        if len(calls) > at: raise stop
        return exact(H, B, mask, L)
    was = weights(dense)
    with pytest.raises(stop) as e:
        reconstruct(dense, masks, torch.randn(30, 1, 8, 8), stopping, target=target, damping=.01)
    assert same(weights(dense), was) and dense.training and not any(m._forward_pre_hooks for m in dense.modules())
    assert e.value.__notes__ == [f'`reconstruct` stopped after {at} of 3 layers. The model is as it was before']

def test_stopped_while_the_order_of_layers_is_found():
    dense = net()
    masks = {k: torch.rand_like(p) > .5 for k,p in dense.named_parameters() if p.ndim > 1}
    def stop(*_): raise KeyboardInterrupt
    dense[0].register_forward_hook(stop)
    was = weights(dense)
    with pytest.raises(KeyboardInterrupt) as e: reconstruct(dense, masks, torch.randn(30, 1, 8, 8))
    assert same(weights(dense), was)
    assert e.value.__notes__ == ['`reconstruct` stopped after 0 of 3 layers. The model is as it was before']

def test_memory_is_told_and_limited():
    dense, x = net(), torch.randn(30, 1, 8, 8)
    masks = {k: torch.rand_like(p) > .5 for k,p in dense.named_parameters() if p.ndim > 1}
    need  = reconstruction_memory(dense, masks, held=False)
    assert [*need] == ['0', '4', '6'] and need['6'] == 8*(2*48*48 + 5*48*48 + 8*5*48)
    less = reconstruction_memory(dense, masks, target='layer', dtype=torch.float32)
    assert less['6'] == 4*(2*2*48*48 + 5*48*48 + 6*5*48)
    was = weights(dense)
    with pytest.raises(ValueError, match="'6' needs about 181,248 bytes"):
        reconstruct(dense, masks, x, max_memory=181_247)
    assert same(weights(dense), was)
    reconstruct(dense, masks, x, max_memory=181_248)

@pytest.mark.parametrize('kwargs, error, message', [
    (dict(method='magic'), ValueError, 'must be one of exact, cg, admm, sparsegpt'),
    (dict(target='both'), ValueError, "must be 'dense' or"), (dict(damping=-1.), ValueError, 'a share from 0'),
    (dict(masks={}), ValueError, 'is empty'), (dict(masks=[1]), TypeError, 'must be `Masks`'),
    (dict(masks={'0.bias': torch.ones(4).bool()}), ValueError, 'has no weights of layers'),
    (dict(masks={'nope': torch.ones(4).bool()}), KeyError, 'nope'),
    (dict(masks={'0.weight': torch.ones(4).bool()}), ValueError, 'must have shape'),
    (dict(data=[]), ValueError, 'holds no batch'),
    (dict(data=torch.full((3, 1, 8, 8), torch.nan)), ValueError, 'NaN or infinite')])
def test_refusals(kwargs, error, message):
    dense = net()
    given = dict(masks={'0.weight': torch.rand(4, 1, 3, 3) > .5}, data=torch.randn(3, 1, 8, 8))
    was   = weights(dense)
    with pytest.raises(error, match=message): reconstruct(dense, **{**given, **kwargs})
    assert same(weights(dense), was)


# End to end

def trained(norms):
    "A network that reads digits, after some seconds of training; and pixels to calibrate and to test with"
    train, valid = images()
    x, y = (torch.stack([torch.as_tensor(b[i]) for b in train]) for i in (0, 1))
    def block(i, o):
        return nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o) if norms else nn.Identity(), nn.ReLU()
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), *block(16, 32), *block(32, 64),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    opt = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(6):
        for i in torch.randperm(len(y)).split(64):
            opt.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            opt.step()
    test = [torch.stack([torch.as_tensor(b[i]) for b in valid]) for i in (0, 1)]
    return model.eval(), x[:512], test

@pytest.mark.parametrize('norms', [True, False])
def test_at_80_and_90_percent_repair_closes_half_of_the_gap(norms):
    dense, x, (inputs, labels) = trained(norms)
    def right(m): return 100*float((m(inputs).argmax(1) == labels).float().mean())
    top = right(dense)
    assert top > 90
    for sparsity in (80, 90):
        model = copy.deepcopy(dense)
        sp = Sparsifier(model, layer_type=(nn.Conv2d, nn.Linear), exclude='0')
        sp.sparsify_model(sparsity)
        before = right(model)
        for target in ('dense', 'layer'):
            m = copy.deepcopy(model)
            reconstruct(m, sp, [(p,) for p in x.split(128)], dense=dense, target=target)
            if target == 'dense': assert right(m) - before >= (top - before)/2 > 5
        if norms:
            recalibrate(model, [(p,) for p in x.split(128)])
            assert right(model) > before


# Whole blocks

class Residual(nn.Module):
    "As in ResNets; the norm keeps its statistics"
    def __init__(self, n=6):
        super().__init__()
        self.a, self.b = nn.Conv2d(n, n, 3, padding=1), nn.Conv2d(n, n, 3, padding=1)
        self.norm = nn.BatchNorm2d(n)
    def forward(self, x, scale=1.): return x + scale*self.b(F.relu(self.norm(self.a(x))))

class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(1, 6, 3), nn.ModuleList(Residual() for _ in range(2))
        self.head = nn.Linear(6, 3)
    def forward(self, x):
        x = self.stem(x)
        for b in self.blocks: x = b(x, scale=.9)
        return self.head(x.mean((2, 3)))

def resnet():
    "A dense network, its pruned copy, masks, and data"
    torch.manual_seed(0)
    dense = ResNet().eval()
    masks = {k: random_mask(p, .6) for k,p in dense.named_parameters() if p.ndim > 1}
    return dense, copy.deepcopy(dense), masks, [(torch.randn(20, 1, 8, 8),) for _ in range(5)]

def off(m, dense, data): return sum(float((m(x) - dense(x)).detach().square().sum()) for x, in data)

@pytest.mark.parametrize('target', ['dense', 'layer'])
def test_blocks_come_closer_than_layers(target):
    "Two residual blocks, after a repair of each layer; zeros stay, norms and all else too"
    dense, net, masks, data = resnet()
    reconstruct(net, masks, data, 'cg', target=target)
    before, was, new = off(net, dense, data), weights(net), [(torch.randn(50, 1, 8, 8),)]
    elsewhere = off(net, dense, new)
    done = reconstruct(net, masks, data, 'block', dense=dense, target=target)
    assert [*done.layers] == ['blocks.0', 'blocks.1'] and all(f.after < f.before for f in done.layers.values())
    assert done.skipped == dict.fromkeys(['stem.weight', 'head.weight'], 'is in no block that was fitted')
    head = {'head.weight': masks['head.weight']}
    reconstruct(net, head, data, 'cg', target=target, dense=dense)  # it was fitted to other outputs of the blocks
    assert off(net, dense, data) < before and off(net, dense, new) < elsewhere
    assert all(not net.get_parameter(k)[~m].any() for k,m in masks.items())
    changed = {k for k,t in weights(net).items() if not torch.equal(t, was[k])} - {'head.weight', 'head.bias'}
    assert changed == {f'blocks.{i}.{k}.{p}' for i in (0, 1) for k in 'ab' for p in ('weight', 'bias')}
    assert all(p.requires_grad and p.grad is None for p in net.parameters())

def test_blocks_that_are_chosen():
    dense, net, masks, data = resnet()
    whole = copy.deepcopy(net)
    assert [*reconstruct(net, masks, data, 'block', blocks=['blocks.1'], steps=10).layers] == ['blocks.1']
    one = reconstruct(whole, masks, data, 'block', blocks=[''], steps=10)
    assert [*one.layers] == [''] and not one.skipped
    with pytest.raises(ValueError, match="Did you mean.*'blocks'|blocks"):
        reconstruct(copy.deepcopy(dense), masks, data, 'block', blocks=['block'])
    with pytest.raises(ValueError, match="no weight of 'blocks.0.norm' is pruned"):
        reconstruct(copy.deepcopy(dense), masks, data, 'block', blocks=['blocks.0.norm'])

def test_block_steps_by_hand():
    "Adam on a single weight: the first step is the rate times the size of the weight, whatever the gradient"
    net, x = nn.Linear(1, 1, bias=False), torch.arange(4.)[:, None]
    nn.init.constant_(net.weight, 2.)
    dense = copy.deepcopy(net)
    nn.init.constant_(dense.weight, 3.)
    reconstruct(net, {'weight': torch.ones(1, 1).bool()}, [(x,)], 'block', dense=dense, steps=1)
    assert net.weight.item() == pytest.approx(2.04)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_blocks_in_half_precision_and_shared_data(dtype):
    "A single batch: nothing is held out, and the error is that on the batch"
    dense, net, masks, data = resnet()
    dense, net = dense.to(dtype), net.to(dtype)
    done = reconstruct(net, masks, [(data[0][0].to(dtype),)], 'block', dense=dense, steps=20)
    assert all(f.after < f.before for f in done.layers.values())
    assert net.stem.weight.dtype == dtype and all(not net.get_parameter(k)[~m].any() for k,m in masks.items())

@pytest.mark.parametrize('stop', [KeyboardInterrupt, RuntimeError])
def test_blocks_all_or_nothing(stop, monkeypatch):
    import fasterai_clone.methods.blocks as room
    dense, net, masks, data = resnet()
    was, fit, calls = weights(net), room.fit_block, []
    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1: raise stop
        return fit(*args, **kwargs)
    monkeypatch.setattr(room, 'fit_block', stopping)
    with pytest.raises(stop) as e: reconstruct(net, masks, data, 'block')
    assert same(weights(net), was) and all(p.requires_grad for p in net.parameters())
    assert e.value.__notes__ == ['`reconstruct` stopped after 1 of 2 blocks. The model is as it was before']

def test_blocks_of_a_transformer():
    hf = pytest.importorskip('transformers')
    config = hf.GPT2Config(n_positions=8, n_embd=8, n_layer=2, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
    dense  = hf.GPT2LMHeadModel(config).eval()
    net    = copy.deepcopy(dense)
    masks  = {k: random_mask(p, .6) for k,p in net.named_parameters() if p.ndim > 1 and '.h.' in k}
    data   = [dict(input_ids=torch.randint(50, (8, 8))) for _ in range(3)]
    done   = reconstruct(net, masks, data, 'block', steps=20)
    assert [*done.layers] == [f'transformer.h.{i}.{k}' for i in (0, 1) for k in ('attn', 'mlp')] and not done.skipped
    assert all(f.after < f.before for f in done.layers.values())
