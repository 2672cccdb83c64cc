"Prune and repair a trained network in one call: counts, models of all kinds, resuming, and what Ctrl-C leaves"
import copy, math

import pytest, torch, torch.nn as nn, torch.nn.functional as F
from fasterai_clone.methods.all import METHODS, evaluate, perplexity, prune_trained, recalibrate
from fasterai_clone.methods.fit import fit_layer
from fasterai_clone.methods.least_squares import exact as solve
from fasterai_clone.methods.moments import Moments, Samples, problem_of
from helpers import exact, same, weights

def data(n=40): return torch.randn(n, 1, 8, 8) + 1

def net():
    "A network whose norms know the data"
    first = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout()
    model = nn.Sequential(*first, nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5)).eval()
    recalibrate(model, data())
    return model

def zero_counts(model): return [int((p == 0).sum()) for p in model.parameters() if p.ndim > 1]

@pytest.mark.parametrize('criteria', ['sparsegpt', 'wanda', 'large_final', 'synflow'])
@pytest.mark.parametrize('target', ['dense', 'layer'])
def test_counts_and_errors(criteria, target):
    dense, x = net(), data()
    model  = copy.deepcopy(dense)
    report = prune_trained(model, x, 60, criteria=criteria, target=target)
    assert zero_counts(model) == [exact(n, 60) for n in (36, 144, 320)] == report.sparsifier.counts(60)
    assert [*report.layers] == ['0', '4', '6'] and [*report.norms] == ['1'] and report.seconds > 0
    assert all(0 <= f.after <= f.before and f.samples for f in report.layers.values())
    assert all(torch.equal(model.get_parameter(k) != 0, m) for k,m in report.sparsifier.masks.items())
    masked = copy.deepcopy(dense)
    report.sparsifier.masks.apply(masked)
    def off(m): return float((m(x) - dense(x)).detach().square().mean())
    assert off(model) < off(masked)
    assert '1 batch norm re-estimated' in str(report) and len(report.to_pandas()) == 3

@pytest.mark.parametrize('criteria', ['sparsegpt', 'wanda', 'snip'])
def test_a_generator_is_read_once(criteria):
    "Scores and moments come from the same batches"
    dense, batches = net(), [(x, torch.randint(5, (10,))) for x in data().split(10)]
    models = [copy.deepcopy(dense) for _ in range(3)]
    kwargs = dict(criteria=criteria, loss_func=F.cross_entropy, progress=False, damping=.01)
    for m,d in zip(models, (batches, iter(batches), (b for b in batches + ['not read']))):
        prune_trained(m, d, 60, max_batches=4, **kwargs)
    assert same(weights(models[0]), weights(models[1])) and same(weights(models[0]), weights(models[2]))

@pytest.mark.parametrize('kwargs, sparsity, most', [
    (dict(context='global', criteria='large_final'), 70, None), (dict(context='output'), 50, None),
    (dict(context='output', criteria='wanda', nm=(2, 4), include=['4', '6']), 50, None),
    (dict(granularity='filter', criteria='large_final', exclude='6'), 50, None),
    (dict(granularity='weight', context='erk', criteria='large_final'), 50, None),
    (dict(context='global', criteria='large_final', budget='params'), 50, None)], ids=str)
def test_all_kinds_of_masks(kwargs, sparsity, most):
    model, x = net(), data()
    report = prune_trained(model, x, sparsity, **kwargs)
    assert report.sparsifier.dropped() == [int(c) for c in report.sparsifier.counts(sparsity)]
    assert all(not model.get_parameter(k)[~m].any() for k,m in report.sparsifier.masks.items())
    assert all(f.after <= f.before for f in report.layers.values())

def test_a_sparsity_for_each_layer():
    model = net()
    prune_trained(model, data(), {'0': 0, '4': 50, '6': 75})
    assert zero_counts(model) == [0, 72, 240]

@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(method, dtype):
    model = net().to(dtype)
    prune_trained(model, data(8).to(dtype), 50, method=method)
    assert all(t.isfinite().all() for t in model.state_dict().values()) and model[0].weight.dtype == dtype

def language_model(kind):
    hf = pytest.importorskip('transformers')
    sizes = dict(vocab_size=50, bos_token_id=0, eos_token_id=0)
    if kind == 'gpt2': return hf.GPT2LMHeadModel(hf.GPT2Config(n_positions=8, n_embd=8, n_layer=1, n_head=2, **sizes))
    if kind == 'bert':
        config = hf.BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                               intermediate_size=12, max_position_embeddings=8, num_labels=3)
        return hf.BertForSequenceClassification(config)
    config = hf.LlamaConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
                            num_key_value_heads=1, max_position_embeddings=8, **sizes)
    return hf.LlamaForCausalLM(config)

@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'bert'])
def test_hugging_face(kind):
    "The same call; a loader of dicts; the tied output layer of GPT-2 stays dense"
    model, ids = language_model(kind).eval(), torch.randint(50, (32, 8))
    items  = [dict(input_ids=i, attention_mask=torch.ones_like(i)) for i in ids]
    loader = torch.utils.data.DataLoader(items, batch_size=8)
    report = prune_trained(model, loader, 50, target='layer', progress=False)
    share  = {k: int((p == 0).sum()) / p.numel() for k,p in model.named_parameters() if p.ndim > 1}
    inner  = [k for k in share if 'embed' not in k and 'wte' not in k and 'wpe' not in k]
    assert inner and all(share[k] == pytest.approx(.5, abs=.03) for k in inner), share
    assert not report.skipped
    assert all(share[k] < .1 for k in share.keys() - set(inner))
    if kind != 'bert': assert 1 < perplexity(model, ids) < math.inf

class Stop(KeyboardInterrupt): pass

def stopping_at(n):
    calls = []
    def method(H, B, mask, L):
        calls.append(1)
        if len(calls) > n: raise Stop
        return solve(H, B, mask, L)
    return method

@pytest.mark.parametrize('at', range(3))
def test_interrupted_with_a_dense_copy(at):
    model, x = net(), data()
    was = weights(model)
    with pytest.raises(Stop) as e: prune_trained(model, x, 60, method=stopping_at(at), damping=.01)
    assert same(weights(model), was)
    assert e.value.__notes__ == [f'`prune_trained` stopped after {at} of 3 layers. The model is as it was before']

@pytest.mark.parametrize('at', range(3))
def test_interrupted_without_a_copy(at):
    "Layers are done completely or not at all, and the error names them"
    model, x, whole = net(), data(), net()
    whole.load_state_dict(model.state_dict())
    prune_trained(whole, x, 60, target='layer', method='exact', damping=.01)
    was = weights(model)
    with pytest.raises(Stop) as e: prune_trained(model, x, 60, target='layer', method=stopping_at(at), damping=.01)
    now, then = weights(model), weights(whole)
    for i,layer in enumerate(('0', '4', '6')):
        for k in (f'{layer}.weight', f'{layer}.bias'): assert torch.equal(now[k], (then if i < at else was)[k])
    names = ['', 'Pruned and repaired: 0. All other', 'Pruned and repaired: 0, 4. All other'][at]
    assert names in e.value.__notes__[0] and f'after {at} of 3' in e.value.__notes__[0]

@pytest.mark.parametrize('criteria', ['sparsegpt', 'wanda'])
@pytest.mark.parametrize('target', ['dense', 'layer'])
def test_resumed_after_a_kill(criteria, target, tmp_path):
    "As in a new process: the dense model and the folder; the result is that of a call that was not interrupted"
    dense, x = net(), data()
    whole  = copy.deepcopy(dense)
    how    = dict(criteria=criteria, target=target, damping=.01, method='exact')
    report = prune_trained(whole, x, 60, **how)
    for at in (1, 1, 5):  # one layer more each time
        model = copy.deepcopy(dense)
        method = stopping_at(at)
        method.__qualname__ = 'exact'
        try: again = prune_trained(model, x, 60, **how | dict(method=method), state=tmp_path/'s')
        except Stop: pass
    assert len([*(tmp_path/'s').glob('layer-*')]) == 3
    for k,t in whole.state_dict().items(): torch.testing.assert_close(model.state_dict()[k], t)
    assert all(torch.equal(m, report.sparsifier.masks[k]) for k,m in again.sparsifier.masks.items())
    assert all(f.after == pytest.approx(report.layers[k].after, rel=1e-4) for k,f in again.layers.items())
    with pytest.raises(ValueError, match='belongs to a call with sparsity=60'):
        prune_trained(copy.deepcopy(dense), x, 70, **how | dict(method=method), state=tmp_path/'s')

def test_resumed_on_the_model_that_was_left(tmp_path):
    "Without a copy, the layers that are done are in the model already"
    model, x = net(), data()
    whole = copy.deepcopy(model)
    prune_trained(whole, x, 60, target='layer', method='exact', damping=.01)
    how = dict(target='layer', damping=.01, state=tmp_path)
    with pytest.raises(Stop): prune_trained(model, x, 60, method=stopping_at(2), **how)
    prune_trained(model, x, 60, method=stopping_at(9), **how)
    for k,t in whole.state_dict().items(): torch.testing.assert_close(model.state_dict()[k], t)
    with pytest.raises(ValueError, match='belongs to other weights'):
        for f in tmp_path.glob('layer-*'): f.unlink()  # only the plan is left
        prune_trained(net(), x, 60, target='layer', method=stopping_at(9), damping=.01, state=tmp_path)

def test_layers_that_are_too_large_are_masked_only():
    model, x = net(), data()
    report = prune_trained(model, x, 60, max_memory=8_000)
    assert [*report.layers] == ['0'] and zero_counts(model) == [exact(n, 60) for n in (36, 144, 320)]
    assert 'more than `max_memory`' in report.skipped['6.weight'] and '4.weight' in report.skipped
    assert '6.weight was only masked' in str(report)

def test_all_else_stays():
    model, x = net().train(), data()
    was, numbers = weights(model), torch.get_rng_state()
    prune_trained(model, x, 60)
    changed = {k for k,t in weights(model).items() if not torch.equal(t, was[k])}
    assert changed == {f'{i}.{k}' for i in (0, 4, 6) for k in ('weight', 'bias')} | {'1.running_mean', '1.running_var'}
    assert torch.equal(torch.get_rng_state(), numbers) and all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

@pytest.mark.parametrize('kwargs, message', [
    (dict(target='both'), "must be 'dense' or"), (dict(method='magic'), '`method` must be one of'),
    (dict(context='global'), "needs context='local'"), (dict(sparsity=.5), 'For 50 % write 50'),
    (dict(max_memory=10), 'No layer can be repaired')])
def test_refusals(kwargs, message):
    model = net()
    was = weights(model)
    with pytest.raises(ValueError, match=message): prune_trained(model, data(), **{'sparsity': 50, **kwargs})
    assert same(weights(model), was)

def test_perplexity_by_hand():
    class Fixed(nn.Module):
        "Logits 0, 1, …, 5 at each position"
        def forward(self, input_ids): return torch.arange(6.).expand(*input_ids.shape, 6)
    ids, logp = torch.tensor([[1, 2, 5], [0, 0, 3]]), torch.arange(6.).log_softmax(0)
    want = math.exp(-float(logp[[2, 5, 0, 3]].mean()))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert perplexity(Fixed(), ids) == pytest.approx(want)
    assert perplexity(Fixed(), [(ids[:1],), (ids[1:],)]) == pytest.approx(want)
    class Masked(Fixed):
        def forward(self, input_ids, attention_mask=None): return super().forward(input_ids)
    got = perplexity(Masked(), [dict(input_ids=ids, attention_mask=mask)])
    assert got == pytest.approx(math.exp(-float(logp[[2, 5, 0]].mean())))
    assert perplexity(Fixed(), (ids, ids)) == pytest.approx(math.exp(-float(logp[ids.flatten()].mean())))

def test_evaluate_weighs_items():
    "One batch of three items and one of a single item: the mean over four"
    net = nn.Identity()
    data = [(torch.zeros(3, 1), torch.tensor([[1.], [1.], [1.]])), (torch.zeros(1, 1), torch.tensor([[5.]]))]
    assert evaluate(net, data, F.mse_loss) == pytest.approx((3*1 + 25)/4)

def test_a_layer_that_is_too_large_is_repaired_in_parts():
    "Parts of its inputs: better than the mask alone, not better than all at once; counts stay exact"
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 4))
    x, errors = torch.randn(600, 8), {}
    rows = dict(context='output')
    for kwargs in (dict(criteria='wanda', **rows), rows, dict(), dict(nm=True, **rows)):
        for limit in (None, 2_000_000):
            model  = copy.deepcopy(dense)
            report = prune_trained(model, x, 50, max_memory=limit, method='exact', **kwargs)
            assert zero_counts(model) == [2048, 1024] and not report.skipped
            assert (len(report.layers) > 2) == bool(limit)
            if 'nm' in kwargs: assert (model[2].weight != 0).unflatten(1, (-1, 4)).sum(2).unique().tolist() == [2]
            masked = copy.deepcopy(dense)
            report.sparsifier.masks.apply(masked)
            errors[limit] = float((model(x) - dense(x)).square().mean())
            assert errors[limit] < float((masked(x) - dense(x)).square().mean())
        assert errors[None] <= errors[2_000_000] * 1.05


# Held-out data

def narrow(n_inputs=300, n=60):
    "A layer with more inputs than samples, and data in which a pruned network would fit noise"
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(20, n_inputs), nn.ReLU(), nn.Linear(n_inputs, 4)).eval()
    return dense, torch.randn(n, 20), torch.randn(500, 20)

@pytest.mark.parametrize('method', ['exact', 'cg', 'admm', 'sparsegpt'])
@pytest.mark.parametrize('sparsity', [50, 90])
def test_repair_never_makes_a_layer_worse_on_held_out_data(method, sparsity):
    "Fewer samples than inputs: the errors in the report are those on items that were not fitted, and never grow"
    dense, x, test = narrow()
    model  = copy.deepcopy(dense)
    report = prune_trained(model, x, sparsity, criteria='large_final', method=method)
    assert all(f.after <= f.before for f in report.layers.values())
    assert [f.samples for f in report.layers.values()] == [48, 48]  # 12 of 60 are held out
    masked = copy.deepcopy(dense)
    report.sparsifier.masks.apply(masked)
    def off(m): return float((m(test) - dense(test)).detach().square().mean())
    assert off(model) < off(masked)

def test_by_hand_what_is_held_out():
    "Items 2, 7, 12, ... are; the error of the first layer on them, from its weights"
    dense, x, _ = narrow()
    model  = copy.deepcopy(dense)
    report = prune_trained(model, x, 80, criteria='large_final')
    held, y = x[2::5], dense[0](x[2::5]).detach()
    error = (model[0](held) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert report.layers['0'].after == pytest.approx(float(error), rel=1e-4)
    masked = F.linear(held, dense[0].weight * report.sparsifier.masks['0.weight'], dense[0].bias)
    error = (masked - y).square().sum() / (y - y.mean(0)).square().sum()
    assert report.layers['0'].before == pytest.approx(float(error), rel=1e-4)

def test_pure_noise_leaves_the_weights_alone():
    "Targets that the inputs do not explain: whatever fits the samples is worse elsewhere"
    torch.manual_seed(0)
    moments, held = (Moments(torch.eye(30)[None]) for _ in range(2))
    for m in (moments, held): m.add(torch.randn(1, 20, 30), torch.randn(1, 20, 30))
    moments.held, mask = held, torch.rand(1, 30, 30) > .5
    bias = torch.zeros(1, 30, dtype=torch.float64)
    for method in METHODS.values():
        new, b, before, after = fit_layer(moments, mask, bias, bias == 0, method)
        assert after <= before and not new[~mask].any()
        free = fit_layer(moments, mask, bias, bias == 0, method, 1e-6)[0]
        assert problem_of(held, True).errors(new).sum() < problem_of(held, True).errors(free).sum()

@pytest.mark.parametrize('norms', [True, False])
def test_norms_are_those_of_the_finished_network(norms):
    "Measured on the way, after each layer: the same as those that `recalibrate` finds at the end"
    dense, x = net(), data()
    dense.add_module('7', nn.BatchNorm1d(5))
    recalibrate(dense, x)
    report = prune_trained(dense, x, 60, norms=norms)
    assert [*report.norms] == (['1', '7'] if norms else [])
    moved  = recalibrate(dense, x)
    assert all((m.mean < 1e-4) == norms and (abs(m.scale - 1) < 1e-4) == norms for m in moved.values())

@pytest.mark.parametrize('target', ['dense', 'layer'])
def test_remembered_outputs_change_nothing(target, monkeypatch):
    import fasterai_clone.methods.reconstruct as room
    results = []
    for free in (None, 1 << 40):  # nothing is known, nothing is remembered
        monkeypatch.setattr(room, 'free_memory', lambda device: free)
        torch.manual_seed(1)
        model = net()
        model.add_module('7', nn.Linear(5, 5))
        prune_trained(model, [(b,) for b in data().split(8)], 60, target=target)
        results.append(weights(model))
    for k,t in results[0].items(): torch.testing.assert_close(t, results[1][k])

def test_each_layer_is_computed_once():
    "Eight layers, three batches: each layer is run once per batch and network, besides the first batch for the order"
    torch.manual_seed(0)
    model, calls = nn.Sequential(*[nn.Linear(6, 6) for _ in range(8)]).eval(), []
    class Counted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, f, types, args=(), kwargs=None):
            if f is F.linear: calls.append(1)
            return f(*args, **(kwargs or {}))
    with Counted(): prune_trained(model, [(torch.randn(5, 6),) for _ in range(3)], 50, criteria='large_final')
    assert len(calls) <= 2*3*8 + 3*8  # 2*3*8*9/2 without

@pytest.mark.parametrize('criteria', ['sparsegpt', 'large_final'])
@pytest.mark.parametrize('nm', [False, True])
def test_layers_with_many_inputs_keep_samples(criteria, nm):
    "A kernel that mostly reads padding, 4,096 inputs, 4 outputs: counts are exact, and what is dead goes first"
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv1d(64, 4, 64, padding=31), nn.ReLU(), nn.Flatten(), nn.Linear(28, 2)).eval()
    mix = torch.randn(64, 4)
    x, new = (torch.einsum('cs,nsp->ncp', mix, torch.randn(60, 4, 8)) for _ in range(2))  # channels go together
    model  = copy.deepcopy(dense)
    sparsity = 50 if nm else 90
    report = prune_trained(model, x, sparsity, criteria=criteria, nm=nm, include='0', layer_type=nn.Module)
    assert zero_counts(model)[0] == exact(4*4096, sparsity)
    if nm: assert (model[0].weight != 0).unflatten(1, (-1, 4)).sum(2).max() == 2
    elif criteria == 'sparsegpt':
        patches = F.unfold(x[:, :, None], (1, 64), padding=(0, 31))
        live = (patches != 0).any(2).any(0).view(64, 64)
        assert not model[0].weight[:, ~live].any()  # 78 %
    fit = report.layers['0']
    assert fit.after < fit.before and fit.samples == 48*7
    masked = copy.deepcopy(dense)
    report.sparsifier.masks.apply(masked)
    assert (model(new) - dense(new)).square().mean() < (masked(new) - dense(new)).square().mean()

def test_samples_are_spread_evenly():
    "Whatever the period: as many of each residue, and never more than `most`"
    for most in (10, 100, 1000):
        s = Samples(torch.ones(1, 1, 1), most=most)
        for _ in range(40):
            at = s.chosen(64)
            s.add(at[None, :, None].float())
        s.joined()
        kept = (s.X + s.x0).flatten()
        assert most/2.5 < s.n == len(kept) <= most and s.seen == 2560
        for period in (2, 4, 8):
            counts = (kept % period).long().bincount(minlength=period)
            assert counts.max() - counts.min() <= max(3, .2*len(kept)/period)

@pytest.mark.parametrize('free', [None, 1 << 40])
def test_loaders_that_shuffle_with_their_own_random_numbers(free, monkeypatch):
    "fastai's do: each pass has another order, so batches are kept; if that is too much, no output is remembered"
    import fasterai_clone.methods.passes as room
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    monkeypatch.setattr(room, 'free_memory', lambda device: free)
    dense, x = net(), data(80)
    loader = DataLoader([(i, 0) for i in x], bs=20, shuffle=True, num_workers=0)
    kept = room.CalibrationData(DataLoaders(loader, loader), torch.device('cpu'))
    assert kept.kept == bool(free)
    model  = copy.deepcopy(dense)
    report = prune_trained(model, DataLoaders(loader, loader), 60)
    assert all(f.after < .9*f.before for f in report.layers.values())
    masked = copy.deepcopy(dense)
    report.sparsifier.masks.apply(masked)
    def off(m): return float((m(x) - dense(x)).detach().square().mean())
    assert off(model) < .7*off(masked)
