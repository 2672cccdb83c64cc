"""Real architectures with random weights: half of what can go is dropped and taken out, and the network computes the
same in fp64

How many channels can go is a lower bound, so that a rule that breaks and fixes everything is found here; what stays has
one of a few reasons. Depths and images are as small as the architectures allow."""
import re

import pytest, torch

from fasterai_clone.prune.all import *
from fasterai_clone.sparse.all import Sparsifier
from test_rules import tensors
from test_thin import lively, n_params

# name → image size, arguments of `create_model`, how many channels can go
timm_models = dict(
    efficientvit_b0              = (64, dict(depths=(1, 1, 1, 1)), 1624),
    maxvit_rmlp_pico_rw_256      = (64, dict(img_size=64), 15536),
    mobilevit_xxs                = (64, {}, 3032),
    edgenext_xx_small            = (64, dict(depths=(1, 1, 2, 1)), 1664),
    swin_tiny_patch4_window7_224 = (56, dict(img_size=56, depths=(1, 1, 1, 1), embed_dim=48), 2880),
    nfnet_l0                     = (64, dict(depths=(1, 1, 1, 1)), 3264),
    eca_nfnet_l0                 = (64, dict(depths=(1, 1, 1, 1)), 2304),
    nf_regnet_b0                 = (64, {}, 4264),
    levit_128s                   = (224, {}, 7280),
    ghostnet_050                 = (64, {}, 4064),
    hrnet_w18_small              = (64, {}, 6384),
    skresnet18                   = (64, {}, 2176),
    resnest14d                   = (64, {}, 5888),
    mobilenetv4_hybrid_medium    = (64, {}, 18624),
    mixnet_s                     = (64, {}, 9110),
    res2net50_14w_8s             = (64, dict(layers=(1, 1, 1, 1)), 1),
    lambda_resnet26t             = (64, dict(img_size=64), 5240),
    mambaout_femto               = (64, dict(depths=(1, 1, 1, 1)), 1664),
    convnextv2_atto              = (32, dict(depths=(1, 1, 1, 1)), 2400),
    # nothing can go: norms over the inputs of each filter, one number added to all channels
    nf_resnet26                  = (64, {}, 0),
    resnetv2_50x1_bit            = (64, {}, 0),
    hgnetv2_b0                   = (64, {}, 0),
)
REASONS = ['it is the output of the model', 'normalises over all channels at once', r'StdConv2d\) standardises over it',
           'splits it into a fixed number of parts with `(view|reshape)`', 'sets its size explicitly with `',
           'uses its size for other values with `',
           r'takes a part of it with `(split|split_with_sizes|slice|index)`',
           'it meets a value that does not come from a layer', 'takes its `(mean|softmax)`',
           r'\(Conv1d\) mixes it in space', r'\(LearnableAffineBlock\) does not keep zero at zero with `add`',
           'does not keep zero at zero with `(safe_)?softmax`',
           r'\((Linear|LayerNorm)\) adds nonzero values to it', 'uses `constant_pad_nd` across it']

@pytest.mark.parametrize('name', timm_models)
def test_timm(name):
    "Exact, as many channels as before, and a reason for each group that stays"
    size, kwargs, least = timm_models[name]
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    model, x = lively(timm.create_model(name, **kwargs).eval()), torch.randn(2, 3, size, size)
    groups = coupled_groups(model, x, timeout=None)
    strange = {g.why_not for g in groups if g.why_not and not any(re.search(r, g.why_not) for r in REASONS)}
    assert not strange, strange
    n = sum(g.n for g in groups if not g.why_not)
    assert n >= least and (n > 0) == (least > 0), n
    if not n: return
    worth = channel_scores(groups, {k: t.detach().abs() for k,t in tensors(model).items()})
    assert n_params(thin(model, coupled_masks(groups, worth, 50), x)) < n_params(model)  # `thin` compares in fp64

def test_what_cannot_go_is_refused_before_training():
    timm = pytest.importorskip('timm')
    with pytest.raises(ValueError,
                       match=r'no channel can be removed.*stem\.conv: .*\(ScaledStdConv2d\) standardises over it'):
        Sparsifier(timm.create_model('nf_resnet26'), 'filter', coupled=True, example_inputs=torch.randn(2, 3, 64, 64))


llamas = dict(Llama={}, Mistral=dict(num_key_value_heads=2, head_dim=8), Qwen2={}, Qwen3=dict(head_dim=8),
              Gemma=dict(head_dim=8, pad_token_id=0))

@pytest.mark.parametrize('how', ['eager', 'sdpa'])
@pytest.mark.parametrize('name', llamas)
def test_heads_of_decoders(name, how):
    "A head of keys and values goes with its heads of queries; nothing but weights has to change"
    lib  = pytest.importorskip('transformers')
    more = dict(dict(num_key_value_heads=4), **llamas[name])
    torch.manual_seed(0)
    config = getattr(lib, f'{name}Config')(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                           num_attention_heads=8,
                                           attn_implementation=how, bos_token_id=1, eos_token_id=2, **more)
    model = lively(getattr(lib, f'{name}ForCausalLM')(config).eval())
    x = dict(input_ids=torch.randint(64, (2, 7)), use_cache=False)
    groups = {g.name: g for g in coupled_groups(model, x)}
    heads  = groups['model.layers.0.self_attn.q_proj']
    n, each = more['num_key_value_heads'], 8//more['num_key_value_heads']
    assert heads.n == n and not heads.why_not
    of = {m.name.split('.')[-2]: m.channel.tolist() for m in heads.members if m.name.endswith('weight')}
    assert of['k_proj'] == of['v_proj'] == [h for h in range(n) for _ in range(8)]
    assert of['q_proj'] == of['o_proj'] == [h for h in range(n) for _ in range(8*each)]
    keep  = [None if g.why_not or 'self_attn' not in g.name else torch.arange(g.n) % 2 == 0 for g in groups.values()]
    small = thin(model, group_masks([*groups.values()], keep), x)
    assert small.model.layers[1].self_attn.k_proj.out_features == 4*n
    assert small.model.layers[1].self_attn.o_proj.in_features == 32
