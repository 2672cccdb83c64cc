"""Schedules of Distiller: what they ask for is compared with its formula, epoch by epoch; what cannot be done is
refused by name"""
import math, pickle

import pytest, torch, torch.nn as nn

from fasterai_clone.prune.distiller_callback import from_distiller_yaml
from fasterai_clone.digits import digits_net
from helpers import learner, spy, weights

PRUNER = """
pruners:
  p:
    class: {kind}
    {rest}
policies:
  - pruner: {{instance_name: p}}
    {when}
"""
WHEN   = 'starting_epoch: 1\n    ending_epoch: 6\n    frequency: 2'  # updates in the epochs 1, 3 and 5
AGP    = 'initial_sparsity: 0.1\n    final_sparsity: 0.5\n    '
L1, L2 = 'L1RankedStructureParameterPruner_AGP', 'L2RankedStructureParameterPruner_AGP'

FILTERS = AGP + 'group_type: Filters\n    weights: [module.3.weight]'

def yaml(kind=L1, rest=FILTERS, when=WHEN): return PRUNER.format(kind=kind, rest=rest, when=when)
def one(*args, model=None, **kwargs):
    cb, = from_distiller_yaml(yaml(*args), digits_net(4) if model is None else model, verbose=False, **kwargs)
    return cb

def distiller_agp(e, start, end, freq, s_i, s_f):
    "What Distiller prunes to in epoch `e`, None before its first update"
    times = [t for t in range(start, end, freq) if t <= e]
    if not times: return 0.
    span = ((end - start - 1)//freq)*freq
    return s_f + (s_i - s_f)*(1 - (times[-1] - start)/span)**3


@pytest.mark.parametrize('start,end,freq', [(0, 2, 1), (1, 6, 2), (0, 7, 3), (2, 9, 1), (3, 8, 4)])
def test_values_of_agp_by_the_end_of_each_epoch(start, end, freq):
    cb = one(L1, FILTERS, f'starting_epoch: {start}\n    ending_epoch: {end}\n    frequency: {freq}')
    n  = 10
    s  = cb.schedule(start_pct=cb.start_epoch/n, end_pct=cb.end_epoch/n)
    for e in range(n):
        want = 100*distiller_agp(e, start, end, freq, .1, .5)
        assert s.sparsity((e + 1)/n, cb.sparsity)      == pytest.approx(want, abs=1e-9)
        # the whole epoch, from its first step
        assert s.sparsity((e + 1e-3)/n, cb.sparsity)   == pytest.approx(want, abs=1e-9)
    assert s.sparsity(1, cb.sparsity) == 50

def test_what_is_configured():
    cb = one()
    assert (cb.sparsity, cb.granularity, cb.context, cb.include) == (50, 'filter', 'local', ['3.weight'])
    assert (cb.start_epoch, cb.end_epoch) == (1, 6)
    assert cb.criteria.reducer.n == 1 and one(L2).criteria.reducer.n == 2
    again = pickle.loads(pickle.dumps(cb.schedule))
    assert all(again.progress(i/9) == cb.schedule.progress(i/9) for i in range(10))

@pytest.mark.parametrize('group,weight,granularity', [
    ('Filters', 3, 'filter'), ("'3D'", 3, 'filter'), ('Channels', 3, 'shared_kernel'), ('Channels', 11, 'column'),
    ('Rows', 11, 'column')])
def test_group_types(group, weight, granularity):
    assert one(L1, AGP + f'group_type: {group}\n    weights: [{weight}.weight]').granularity == granularity

def test_channels_of_two_kinds_of_layers_are_two_callbacks():
    cbs = from_distiller_yaml(yaml(L1, AGP + 'group_type: Channels\n    weights: [3.weight, 11.weight, 6.weight]'),
                              digits_net(4))
    assert [(cb.granularity, cb.include) for cb in cbs] == [('shared_kernel', ['3.weight', '6.weight']),
                                                            ('column', ['11.weight'])]

def test_blocks():
    rest = AGP + 'group_type: Blocks\n    kwargs: {block_shape: %s}\n    weights: [3.weight]'
    assert one(L1, rest % '[1, 4, 1, 1]').granularity == 'block_1x4x1x1'
    with pytest.raises(ValueError, match=r'`p`: `block_shape` must be \[1, d, 1, 1\], got \[2, 4, 1, 1\]'):
        one(L1, rest % '[2, 4, 1, 1]')

def test_names_inside_of_data_parallel():
    net = nn.Sequential(); net.add_module('features', digits_net(4))
    rest = AGP + 'group_type: Filters\n    weights: [%s]'
    for name in ('features.3.weight', 'module.features.3.weight', 'features.module.3.weight'):
        assert one(L1, rest % name, model=net).include == ['features.3.weight']
    assert one(L1, rest % 'module.features.3.weight', model=nn.DataParallel(net)).include == ['features.3.weight']


def groups_that_are_zero(w, axis): return int((w.movedim(axis, 0).flatten(1) == 0).all(1).sum())

def test_filters_of_a_real_fit_are_those_of_the_formula():
    learn, counts = learner(), []
    cbs = from_distiller_yaml(yaml(), learn, verbose=False)
    before = weights(learn.model)
    count = spy('after_train', lambda: counts.append(groups_that_are_zero(learn.model[3].weight, 0)))
    with learn.no_bar(), learn.no_logging(): learn.fit(7, cbs=[*cbs, count])
    assert counts == [math.floor(8*distiller_agp(e, 1, 6, 2, .1, .5) + 1e-9) for e in range(7)] == [0, 0, 0, 3, 3, 4, 4]
    assert (learn.model[0].weight != 0).all() and before.keys() == weights(learn.model).keys()

def test_the_first_update_drops_the_filters_with_the_smallest_norm():
    learn = learner(lr=0.)
    with torch.no_grad():
        learn.model[3].weight.copy_(torch.tensor([5., 3, 8, 1, 6, 2, 7, 4]).reshape(8, 1, 1, 1).expand(8, 4, 3, 3))
    with learn.no_bar(), learn.no_logging():
        learn.fit(4, cbs=from_distiller_yaml(yaml(when='starting_epoch: 0\n    ending_epoch: 4\n    frequency: 3'),
                                             learn, verbose=False))
    assert [bool((f != 0).any()) for f in learn.model[3].weight] == [True, False, True, False, True, False, True, False]

def test_two_pruners_of_one_weight_one_after_the_other():
    text = """
    pruners:
      whole:
        class: L1RankedStructureParameterPruner
        desired_sparsity: 0.25
        group_type: Filters
        weights: [3.weight]
      single:
        class: AutomatedGradualPruner
        initial_sparsity: 0.3
        final_sparsity: 0.5
        weights: 3.weight
    policies:
      - pruner: {instance_name: whole}
        epochs: [1]
      - {pruner: {instance_name: single}, starting_epoch: 2, ending_epoch: 4, frequency: 1}
    """
    learn = learner()
    with learn.no_bar(), learn.no_logging(): learn.fit(4, cbs=from_distiller_yaml(text, learn, verbose=False))
    w = learn.model[3].weight
    assert groups_that_are_zero(w, 0) == 2 and int((w == 0).sum()) == w.numel()//2
    assert list(learn.recorder.metric_names).count('sparsity') == 2

def test_levels():
    cb = one('SparsityLevelParameterPruner', 'levels: {module.0.weight: 0.25, module.3.weight: 0.5}', 'epochs: [2, 4]')
    assert cb.sparsity == {'0.weight': 25, '3.weight': 50} and (cb.start_epoch, cb.end_epoch) == (2, 3)
    learn = learner()
    text = yaml('SparsityLevelParameterPruner', 'levels: {0.weight: 0.25, 3.weight: 0.5}', 'epochs: [2, 4]')
    cbs  = from_distiller_yaml(text, learn, verbose=False)
    with learn.no_bar(), learn.no_logging(): learn.fit(4, cbs=cbs)
    assert [int((learn.model[i].weight == 0).sum()) for i in (0, 3)] == [9, 144]
    assert [h['sparsity'] > 0 for h in cbs[0].history] == [False, False, True, True]

def test_epochs_of_a_checkpoint():
    when = 'starting_epoch: 181\n    ending_epoch: 186\n    frequency: 2'
    cb = one(L1, FILTERS, when, first_epoch=180)
    assert (cb.start_epoch, cb.end_epoch) == (1, 6)
    with pytest.raises(ValueError, match='starts in epoch 181, before `first_epoch` 182'):
        one(L1, FILTERS, when, first_epoch=182)
    learn = learner()
    with pytest.raises(ValueError, match='this fit has 3 epochs'), learn.no_bar(), learn.no_logging():
        learn.fit(3, cbs=from_distiller_yaml(yaml(), learn, verbose=False))

class Residual(nn.Module):
    "A block whose sum needs the same channels from both sides"
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 10, 3)
    def forward(self, x):
        x = self.conv1(x).relu()
        return self.conv3(x + self.conv2(x)).mean((2, 3))

def test_leader():
    learn = learner(model=Residual())
    rest  = AGP + 'group_type: Filters\n    group_dependency: Leader\n    weights: [conv1.weight, conv2.weight]'
    with pytest.raises(ValueError, match="Unknown group_dependency 'Follower'. .*Legal: Leader"):
        one(L1, rest.replace('Leader', 'Follower'), model=learn.model)
    assert one(L1, rest, model=learn.model).coupled == ['conv1.weight']
    with learn.no_bar(), learn.no_logging(): learn.fit(6, cbs=one(L1, rest, model=learn.model))
    dead = [(learn.model.get_parameter(f'{k}.weight').flatten(1) == 0).all(1).tolist() for k in ('conv1', 'conv2')]
    assert dead[0] == dead[1] and sum(dead[0]) == 4

def test_channels_with_a_leader():
    "What reads the sum leads: the channels that it has lowest go, with all that makes them"
    learn = learner(model=Residual())
    rest  = AGP + 'group_type: Channels\n    group_dependency: Leader\n    weights: [conv3.weight]'
    cb = one(L1, rest, model=learn.model)
    assert (cb.granularity, cb.coupled) == ('channel', ['conv3.weight'])
    with learn.no_bar(), learn.no_logging(): learn.fit(6, cbs=cb)
    m = learn.model
    dead = [(m.get_parameter(f'{k}.weight').flatten(1) == 0).all(1).tolist() for k in ('conv1', 'conv2')]
    read = (m.conv3.weight == 0).transpose(0, 1).flatten(1).all(1).tolist()
    assert dead[0] == dead[1] == read and sum(read) == 4

def test_from_a_file_and_a_learner(tmp_path):
    (tmp_path/'s.yaml').write_text(yaml())
    learn = learner()
    for path in (tmp_path/'s.yaml', str(tmp_path/'s.yaml')):
        assert from_distiller_yaml(path, learn)[0].include == ['3.weight']
    with pytest.raises(FileNotFoundError, match='no file'): from_distiller_yaml(str(tmp_path/'other.yaml'), learn)


@pytest.mark.parametrize('kind,instead', [
    ('SensitivityPruner', 'SparsityLevelParameterPruner'), ('MagnitudeParameterPruner', 'SparsityLevelParameterPruner'),
    ('StructuredAGP', L1), ('SplicingPruner', 'AutomatedGradualPruner'), ('BaiduRNNPruner', 'AutomatedGradualPruner'),
    ('ActivationAPoZRankedFilterPruner_AGP', "criteria='apoz'"),
    ('GradientRankedFilterPruner_AGP', "criteria='gradient'")])
def test_classes_that_cannot_be_honoured(kind, instead):
    with pytest.raises(ValueError, match=f'`p`: {kind} cannot be honoured. Use .*{instead}'): one(kind)

@pytest.mark.parametrize('args,message', [
    (('L1RankedStructureParameterPruner_AGB',),
     "Unknown class .* Did you mean 'L1RankedStructureParameterPruner_AGP'"),
    ((L1, FILTERS.replace('Filters', 'Filter')),
     "Unknown group type 'Filter'. Did you mean 'Filters'"),
    ((L1, FILTERS.replace('Filters', 'Rows')),
     'Rows of 3.weight, a Conv2d, are not defined in Distiller'),
    ((L1, FILTERS.replace('module.3.weight', '4.weight')),
     'Filters of 4.weight, a BatchNorm2d, are not defined'),
    ((L1, FILTERS.replace('module.3.weight', '3.wieght')),
     "Unknown weights '3.wieght'. Did you mean '3.weight'"),
    ((L1, FILTERS.replace('0.5', '50')),
     '`final_sparsity` must be a fraction from 0 to 1, .*, got 50'),
    ((L1, FILTERS.replace('0.1', '0.6')),
     'must be more than `initial_sparsity`, got 0.5 and 0.6'),
    ((L1, FILTERS + '\n    noise: 0.3'),                           "Unknown key of L1.* 'noise'"),
    ((L1, FILTERS + '\n    desired_sparsity: 0.3'),                "Unknown key of L1.* 'desired_sparsity'"),
    ((L1, FILTERS, 'epochs: [1, 2]'),                              'AGP needs `starting_epoch`'),
    ((L1, FILTERS, WHEN.replace('6', '3')),                        'leaves 1 update: AGP needs 2'),
    ((L1, FILTERS, WHEN.replace('frequency: 2', 'frequency: 0')),  '`frequency` must be a whole number from 1, got 0'),
    ((L1, FILTERS, WHEN + '\n    until: 7'),                       "Unknown key in a policy 'until'"),
    (('SparsityLevelParameterPruner', "levels: {'*': 0.5}"),       'means every parameter'),
    (('AutomatedGradualPruner', AGP.strip()),                      'expected `weights`')])
def test_what_is_wrong_is_said(args, message):
    with pytest.raises(ValueError, match=message): one(*args)

def test_policies_and_sections_that_cannot_be_honoured():
    net = digits_net(4)
    def said(text, message, **kwargs):
        with pytest.raises(ValueError, match=message): from_distiller_yaml(text, net, **kwargs)
    said(yaml().replace('instance_name: p', 'instance_name: q'), "Unknown `instance_name` in a policy 'q'")
    said(yaml() + '  - pruner: {instance_name: p}\n    ' + WHEN, 'two policies')
    said(yaml().replace('policies:', 'policies: []\nversion: 1\nx:'), "Unknown section 'x'")
    said('pruners: {p: {class: X}}\npolicies: []\n', '`p` has no policy')
    args = 'instance_name: p, args: {mini_batch_pruning_frequency: 3}'
    said(yaml().replace('instance_name: p', args), 'has mini_batch_pruning_frequency=3')
    said(yaml().replace('instance_name: p', 'instance_name: p, args: [3]'), '`args` must have names and values')
    said('a: [\n', 'Not YAML')
    said('- 1\n- 2\n', 'Not a schedule of Distiller')
    said('!!python/object/apply:os.getcwd []\n', 'Not YAML')  # nothing in a file is run
    for section in ('lr_schedulers', 'extensions', 'regularizers', 'quantizers'):
        more = yaml() + f'  - {section[:-1]}: {{instance_name: z}}\n    epochs: [3]\n{section}: {{z: {{class: Z}}}}\n'
        said(more, f'`{section}` \\(z\\)')
        assert len(from_distiller_yaml(more, net, ignore=section)) == 1
    said(yaml(), "Unknown section in `ignore` 'extension'. Did you mean 'extensions'", ignore='extension')
    assert len(from_distiller_yaml(yaml().replace('instance_name: p',
                                                  'instance_name: p, args: {keep_mask: True}'), net)) == 1
