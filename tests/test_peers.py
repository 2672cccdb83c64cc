"Scores as Torch-Pruning has them; models of transformers, timm and torchvision in one line"
import os
os.environ.setdefault('HF_HUB_OFFLINE', '1')  # models are made from configurations: nothing is to be downloaded

import re
from dataclasses import replace

import pytest, timm, torch, torch.nn as nn, torch_pruning as tp, torchvision, transformers

from fasterai_clone.sparse.budget import lamp as lamp_scores
from fasterai_clone.core.criteria import group_scores
from fasterai_clone.sparse.all import *
from fasterai_clone.core.criteria import fpgm, ln_norm, Reducer
from helpers import exact


# Torch-Pruning: one importance for each output channel

filtered = dict(conv1d=(lambda: nn.Conv1d(3, 9, 3),        (1, 3, 8)),
                conv2d=(lambda: nn.Conv2d(5, 16, 3),       (1, 5, 8, 8)),
                wide=(lambda: nn.Conv2d(2, 40, 1),         (1, 2, 4, 4)),
                conv3d=(lambda: nn.Conv3d(2, 7, (1, 2, 3)), (1, 2, 4, 4, 4)),
                trans=(lambda: nn.ConvTranspose2d(4, 11, 3), (1, 4, 6, 6)),
                linear=(lambda: nn.Linear(12, 20),         (1, 12)),
                nobias=(lambda: nn.Linear(7, 33, bias=False), (1, 7)))

def made(name, seed=0):
    make, shape = filtered[name]
    torch.manual_seed(seed)
    m = make()
    x = torch.randn(shape)
    m(x).square().sum().backward()
    return m, x

def theirs(m, x, importance):
    n = m.weight.shape[1 if getattr(m, 'transposed', False) else 0]
    prune = tp.prune_linear_out_channels if isinstance(m, nn.Linear) else tp.prune_conv_out_channels
    graph = tp.DependencyGraph().build_dependency(m, example_inputs=x)
    return importance(graph.get_pruning_group(m, prune, idxs=list(range(n)))).detach()

def ours(m, criteria):
    ref = (m.weight * m.weight.grad).abs().detach() if criteria.needs_grad else None
    return group_scores(criteria, m.weight, Granularities.groups(m, 'filter'), ref).flatten()

def agree(m, a, b, criteria):
    "The same up to a factor, and so the same filters go"
    ratio = a / b
    assert torch.allclose(ratio, ratio.mean().expand_as(ratio), rtol=1e-4) and torch.equal(a.argsort(), b.argsort())
    if criteria is None: return
    k  = exact(len(b), 40)
    sp = Sparsifier(m, 'filter', criteria=criteria, layer_type=type(m))
    sp.sparsify_model(40)
    gone = (~sp.masks['weight']).transpose(0, 1 if getattr(m, 'transposed', False)
                                           else 0).flatten(1).all(1).nonzero().flatten().tolist()
    assert len(gone) == k and gone == sorted(b.argsort()[:k].tolist())

plain = dict(group_reduction='first', normalizer=None)

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('p', [1, 2])
@pytest.mark.parametrize('name', filtered)
def test_magnitudes(name, p, seed):
    "Theirs is Σ|w|ᵖ, ours its p-th root"
    m, x = made(name, seed)
    agree(m, ours(m, ln_norm(p)) ** p, theirs(m, x, tp.importance.GroupMagnitudeImportance(p=p, **plain)), ln_norm(p))

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('name', filtered)
def test_lamp(name, seed):
    m, x = made(name, seed)
    want = theirs(m, x, tp.importance.LAMPImportance(p=2, group_reduction='first', normalizer='lamp'))
    agree(m, lamp_scores([ours(m, ln_norm(2))])[0].float(), want, ln_norm(2))

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('name', filtered)
def test_fpgm(name, seed):
    "They take distances between |w|, the paper and we those between w: the same where nothing is negative"
    m, x = made(name, seed)
    with torch.no_grad(): m.weight.abs_()
    agree(m, ours(m, fpgm), theirs(m, x, tp.importance.FPGMImportance(p=1, **plain)), fpgm)

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('name', filtered)
def test_taylor(name, seed):
    m, x = made(name, seed)
    summed = replace(gradient, reducer=Reducer.sum)
    agree(m, ours(m, summed), theirs(m, x, tp.importance.TaylorImportance(**plain)), summed)

def test_scales_of_norms():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10)), torch.randn(2, 3, 6, 6)
    nn.init.normal_(net[1].weight)
    graph = tp.DependencyGraph().build_dependency(net, example_inputs=x)
    group = graph.get_pruning_group(net[0], tp.prune_conv_out_channels, list(range(10)))
    want  = tp.importance.BNScaleImportance(**plain)(group).detach()
    sp    = Sparsifier(net, 'filter', criteria='bn_scale')
    sp.sparsify_model(40)
    assert (~sp.masks['0.bias']).nonzero().flatten().tolist() == sorted(want.argsort()[:4].tolist())


# Models of others

def bert():
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2,
                                                          num_attention_heads=2,
                                                          intermediate_size=32, max_position_embeddings=16))
def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2,
                                                                n_head=2, n_positions=16,
                                                                bos_token_id=0, eos_token_id=0))
def vit():
    torch.manual_seed(0)
    return transformers.ViTModel(transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                                        intermediate_size=32, image_size=8, patch_size=4))
def timm_vit():
    torch.manual_seed(0)
    return timm.create_model('vit_tiny_patch16_224', pretrained=False, img_size=16, patch_size=8, depth=2,
                             embed_dim=24, num_heads=3, num_classes=5)
def torchvision_vit():
    torch.manual_seed(0)
    net = torchvision.models.VisionTransformer(image_size=8, patch_size=4, num_layers=2, num_heads=2,
                                               hidden_dim=16, mlp_dim=32, num_classes=5)
    nn.init.normal_(net.heads.head.weight)  # it begins at zero, and nothing behind it would train
    return net
def timm_net(name):
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=5)

tokens = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
def image(size): return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))

def outputs(out): return out if isinstance(out, torch.Tensor) else out[0]

def trains(sp, net, x, steps=3):
    "Forward and backward, with momentum and weight decay; what is dropped stays so"
    opt = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1)
    net.train()
    with sp.hold(opt):
        for _ in range(steps):
            opt.zero_grad()
            loss = outputs(net(x)).square().mean()
            assert loss.isfinite()
            loss.backward()
            opt.step()
    for k,m in sp.masks.items():
        assert not net.get_parameter(k)[~m].any() and (m.ndim == 1 or net.get_parameter(k)[m].any()), k

def counted(sp, sparsity):
    "Each target has exactly as many empty groups"
    for row in [r for r in sp.report().rows if r.groups]: assert row.zero_groups == exact(row.groups, sparsity), row

one_liners = dict(
    bert_attention  = (bert, tokens, dict(layer_type=nn.Linear, include='*attention*'), 8),
    bert_mlp        = (bert, tokens, dict(layer_type=nn.Linear,
                                          include=['*.intermediate.*', 'encoder.layer.?.output.*']), 4),
    bert_filters    = (bert, tokens, dict(granularity='filter', layer_type=nn.Linear), 13),
    bert_rows       = (bert, tokens, dict(granularity='row', layer_type=nn.Embedding, include='*word*'), 1),
    bert_all        = (bert, tokens, dict(layer_type=nn.Module), 16),
    bert_blocks     = (bert, tokens, dict(granularity='block_4x4', layer_type='Linear', exclude='pooler*'), 12),
    gpt2_mlp        = (gpt2, tokens, dict(layer_type='Conv1D', include='*.mlp.*'), 4),
    gpt2_attention  = (gpt2, tokens, dict(layer_type='Conv1D', include='*.attn.*'), 4),
    gpt2_filters    = (gpt2, tokens, dict(granularity='filter', layer_type='Conv1D'), 8),
    gpt2_columns    = (gpt2, tokens, dict(granularity='column', layer_type='Conv1D'), 8),
    gpt2_pattern    = (gpt2, tokens, dict(nm=True, layer_type='Conv1D'), 8),
    gpt2_all        = (gpt2, tokens, dict(layer_type=nn.Module), 10),
    vit_attention   = (vit, image(8), dict(layer_type=nn.Linear, include='*attention*'), 8),
    vit_mlp         = (vit, image(8), dict(granularity='filter', layer_type=nn.Linear,
                                           include=re.compile(r'mlp|intermediate|\d\.output')), 4),
    vit_all         = (vit, image(8), dict(layer_type=nn.Module), 14),
    timm_attention  = (timm_vit, image(16), dict(layer_type=nn.Linear, include='*.attn.*'), 4),
    timm_mlp        = (timm_vit, image(16), dict(granularity='filter', layer_type=nn.Linear, include='*.mlp.*'), 4),
    timm_all        = (timm_vit, image(16), dict(layer_type=nn.Module), 10),
    torchvision_heads = (torchvision_vit, image(8), dict(granularity='head', layer_type=nn.MultiheadAttention), 2),
    torchvision_mlp   = (torchvision_vit, image(8), dict(granularity='filter', layer_type=nn.Linear, include='*.mlp.*'),
                         4),
    torchvision_all   = (torchvision_vit, image(8), dict(layer_type=nn.Module), 10))

@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('name', one_liners)
def test_one_line(name, context):
    make, x, kwargs, n_layers = one_liners[name]
    net = make()
    keys, sp = list(net.state_dict()), Sparsifier(net, context=context, **kwargs)
    assert len(sp.targets) == n_layers
    sp.sparsify_model(50)
    if context == 'local': counted(sp, 50)
    else: assert sum(r.zero_groups for r in sp.report().rows) == exact(sum(r.groups for r in sp.report().rows), 50)
    if context == 'local' or 'all' in name: trains(sp, net, x)
    if context == 'local': counted(sp, 50)
    assert list(net.state_dict()) == keys and sp.report().total == sum(p.numel() for p in net.parameters())

def test_filters_of_bert_hold_their_biases():
    net = bert()
    sp  = Sparsifier(net, 'filter', layer_type=nn.Linear, include='*attention.self*',
                     example_inputs=dict(input_ids=tokens))
    sp.sparsify_model(25)
    for n,m in net.named_modules():
        if 'attention.self.' not in n or not isinstance(m, nn.Linear): continue
        gone = ~m.weight.any(1)
        assert int(gone.sum()) == 4 and torch.equal(~sp.masks[f'{n}.bias'], gone) and not m.bias[gone].any()
        assert m.bias[~gone].numel() == 12

def test_the_weights_of_gpt2_lie_the_other_way():
    "A row is what one output is made of, and a filter: a column of the matrix, `x @ W + b`"
    for granularity in ('row', 'filter', 'column'):
        net = gpt2()
        for p in net.parameters(): nn.init.normal_(p)
        sp = Sparsifier(net, granularity, layer_type='Conv1D', include='transformer.h.0.mlp.c_fc')
        fc = net.transformer.h[0].mlp.c_fc
        w = fc.weight.detach().clone()
        sp.sparsify_model(50)
        axis  = 1 if granularity == 'column' else 0
        means = w.abs().mean(axis)
        kept  = fc.weight.any(axis)
        assert fc.weight.shape == (16, 64) and len(kept) == (64 if axis == 0 else 16)
        assert int(kept.sum()) == len(kept)//2
        assert means[kept].min() >= means[~kept].max()
        out = fc(torch.randn(5, 16))
        if axis == 0:
            assert ('transformer.h.0.mlp.c_fc.bias' in sp.masks) and not out[:, ~kept].any() and out[:, kept].all()

def test_a_pattern_of_gpt2_runs_along_its_inputs():
    net = gpt2()
    sp  = Sparsifier(net, nm=True, layer_type='Conv1D')
    sp.sparsify_model(50)
    for m in sp.masks.values(): assert (m.T.reshape(-1, 4).sum(1) == 2).all()

def test_tied_embeddings_are_masked_once():
    net = gpt2()
    sp  = Sparsifier(net, layer_type=nn.Module)
    assert [t.name for t in sp.targets].count('transformer.wte.weight') == 1 and 'lm_head.weight' not in sp.masks.shapes
    sp.sparsify_model(60)
    trains(sp, net, tokens)
    assert net.lm_head.weight is net.transformer.wte.weight and int((net.lm_head.weight == 0).sum()) == exact(800, 60)
    assert sp.is_pruned('lm_head') and sp.report().coverage == pytest.approx(100*7200/7648)

def test_what_is_tied_is_called_by_its_first_owner():
    dense = {n: kind for n,kind,_ in Sparsifier(gpt2(), layer_type='Conv1D').report().dense}
    assert dense['transformer.wte.weight'] == 'Embedding'

def test_a_filter_of_an_embedding_is_left_out_or_refused():
    "What stands for all layers leaves out those without filters, and says so; a type that is named has to have them"
    report = Sparsifier(bert(), 'filter', layer_type=nn.Module).report()
    assert 'embeddings.word_embeddings' in str(report.left_out) and all(r.type == 'Linear' for r in report.rows)
    with pytest.raises(ValueError, match="Embedding 'filter'.*Legal: weight, column, row, layer"):
        Sparsifier(bert(), 'filter', layer_type=(nn.Linear, nn.Embedding))


# Filters with their norms

def put_out(net, x, names):
    "What the modules put out"
    seen, hooks = {}, []
    def look(n, out): seen.setdefault(n, []).append(out.clone())  # residuals are added in place
    for n in names: hooks.append(net.get_submodule(n).register_forward_hook(lambda m, i, o, n=n: look(n, o)))
    with torch.no_grad(): net(x)
    for h in hooks: h.remove()
    return seen

def are_zero(sp, net, x):
    "Dropped channels of each layer and of each of its norms are zero, and no others; how many norms that are"
    norms = {}
    for t in sp.targets:
        gone = (~sp.masks[t.name]).transpose(0, 1 if getattr(t.module, 'transposed', False) else 0).flatten(1).all(1)
        for n in dict.fromkeys([t.layer, *(p.name.rpartition('.')[0] for p in t.held)]): norms[n] = gone
    for n,outs in put_out(net, x, norms).items():
        for o in outs:
            axis = next(a for a in ((1, o.ndim-1) if o.ndim > 3 else (o.ndim-1, 1)) if o.shape[a] == len(norms[n]))
            assert not o.movedim(axis, 0)[norms[n]].any(), n
    return len(norms) - len(sp.targets)

nets = dict(timm_resnet       = (lambda: timm_net('test_resnet'),       32, 8),
            timm_efficientnet = (lambda: timm_net('test_efficientnet'), 32, 8),
            timm_convnext     = (lambda: timm_net('test_convnext'),     64, 0),
            resnet18          = (lambda: torchvision.models.resnet18(num_classes=5), 32, 20))

@pytest.mark.parametrize('name', nets)
def test_dropped_filters_put_out_zero(name):
    make, size, n_norms = nets[name]
    torch.manual_seed(0)
    net, x = make(), image(size)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm)) and m.bias is not None: nn.init.normal_(m.bias, std=0.1)
    sp = Sparsifier(net, 'filter', example_inputs=x)
    sp.sparsify_model(50)
    counted(sp, 50)
    assert are_zero(sp, net.train(), x) == are_zero(sp, net.eval(), x) >= n_norms
    trains(sp, net, x, steps=2)
    for mode in (True, False): are_zero(sp, net.train(mode), x)
    counted(sp, 50)
