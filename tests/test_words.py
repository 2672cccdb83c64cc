"Words of other libraries get ours, warnings name the user's line, and mistakes of a first day are answered"
import ast, builtins, importlib, inspect, pkgutil, re, warnings, zipfile

import matplotlib.pyplot as plt
import pytest, torch, torch.nn as nn
from fastai.callback.core import Callback

import fasterai_clone
from fasterai_clone.analyze.compare import compare
from fasterai_clone.cli import sparsity_report
from fasterai_clone.core.arguments import as_nm
from fasterai_clone.core.criteria import Criteria
from fasterai_clone.core.schedule import as_schedule
from fasterai_clone.core.words import WORDS, word_table
from fasterai_clone.export.sparse_files import load_sparse, save_sparse
from fasterai_clone.methods.sparsegpt import sparsegpt
from fasterai_clone.model.channels.groups import coupled_groups
from fasterai_clone.model.flops import multiply_adds
from fasterai_clone.model.outputs import output_layers
from fasterai_clone.prune.prune_callback import PruneCallback
from fasterai_clone.prune.thin import thin
from fasterai_clone.prune.thinned_files import load_thinned, save_thinned
from fasterai_clone.sparse.checks import check_granularity
from fasterai_clone.sparse.context import as_budget, as_context
from fasterai_clone.sparse.measure import as_criteria
from fasterai_clone.sparse.signal import LayerCollapse
from fasterai_clone.sparse.sparsifier import Sparsifier
from fasterai_clone.sparse.sparsify_callback import SparsifyCallback
from fasterai_clone.sparse.ticket_files import load_ticket, save_ticket
from fasterai_clone.sparse.tickets_callback import find_ticket
from helpers import learner

resolvers = dict(criterion=as_criteria, schedule=as_schedule, granularity=check_granularity, context=as_context,
                 budget=as_budget)

def told(f, *args, **kwargs):
    "The warnings of a call"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        f(*args, **kwargs)
    return [w for w in seen if issubclass(w.category, (UserWarning, DeprecationWarning)) and 'torch.jit' not in
            str(w.message)]

def public_names():
    "Every public name of every module, and the arguments of our classes and functions"
    space = {}
    for m in pkgutil.walk_packages(fasterai_clone.__path__, 'fasterai_clone.'):
        if m.name.endswith(('all', '_modidx', 'flow')): continue
        module = importlib.import_module(m.name)
        space |= {k: v for k,v in vars(module).items() if not k.startswith('_')}
    return space

@pytest.fixture(scope='module')
def names(): return public_names()

given = 'model masks learn data n_epoch'.split()  # what a user has

@pytest.mark.parametrize('word', [w for w in WORDS if w.ours], ids=lambda w: f'{w.kind}-{w.theirs[0]}')
def test_every_word_of_ours_exists(word, names):
    "A legal value, a public name, an argument, or a call with arguments that exist"
    arguments = {k for c in (Sparsifier, SparsifyCallback, PruneCallback, Criteria)
                 for k in inspect.signature(c).parameters}
    if word.kind != 'term' and word.ours.isidentifier():
        resolvers[word.kind](word.ours)
        return
    call = ast.parse(f'f({word.ours})', mode='eval').body
    for node in ast.walk(call):
        if isinstance(node, ast.Name) and node.id != 'f':
            assert node.id in names or node.id in arguments or node.id in given or hasattr(builtins, node.id)
        if isinstance(node, ast.Attribute): assert hasattr(names[node.value.id], node.attr)
        if isinstance(node, ast.keyword):
            assert node.arg in arguments
            if isinstance(node.value, ast.Constant) and node.arg in ('context', 'granularity'):
                resolvers[node.arg](node.value.value)
        if isinstance(node, ast.Call) and node is not call:
            taken = inspect.signature(names[node.func.id]).parameters
            assert all(k.arg in taken for k in node.keywords) and len(node.args) <= len(taken)

@pytest.mark.parametrize('word', [w for w in WORDS if w.kind != 'term'], ids=lambda w: f'{w.kind}-{w.theirs[0]}')
def test_each_spelling_gets_our_word(word):
    for theirs in word.theirs:
        with pytest.raises(ValueError) as e: resolvers[word.kind](theirs)
        assert f'{word.ours!r} (' in str(e.value) or f'`{word.ours}` (' in str(e.value), str(e.value)

@pytest.mark.parametrize('kind, theirs, ours', [
    ('criterion', 'magnitude', 'large_final'), ('criterion', 'L1', 'large_final'), ('criterion', 'taylor', 'gradient'),
    ('criterion', 'hessian', 'fisher'), ('schedule', 'gradual', 'agp'), ('schedule', 'polynomial', 'agp'),
    ('schedule', 'cubic', 'agp'), ('schedule', 'GMP', 'agp'), ('granularity', 'unstructured', 'weight'),
    ('granularity', 'neuron', 'filter'), ('granularity', 'structured', 'filter'), ('granularity', 'ln', 'filter'),
    ('context', 'layer', 'local'), ('context', 'layer-wise', 'local'), ('context', 'uniform', 'local'),
    ('context', 'network', 'global')])
def test_a_word_of_others_gets_ours(kind, theirs, ours):
    with pytest.raises(ValueError, match=f'this is {ours!r}'): resolvers[kind](theirs)

def test_a_spelling_mistake_still_gets_the_nearest_name():
    with pytest.raises(ValueError, match="Did you mean 'large_final'"): as_criteria('large_finel')

def test_no_word_is_in_the_table_twice():
    for kind in {w.kind for w in WORDS}:
        theirs = [t for w in WORDS if w.kind == kind for t in w.theirs]
        assert len(theirs) == len(set(theirs)), kind
        assert word_table(kind).count('\n') == sum(w.kind == kind for w in WORDS) + 1

# 2:4 as a string

def net(): return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8*16, 10))
def image(): return torch.randn(2, 1, 8, 8)

def test_a_pattern_as_a_string():
    one, two = net(), net()
    two.load_state_dict(one.state_dict())
    for m,nm in ((one, '2:4'), (two, (2, 4))): Sparsifier(m, nm=nm, layer_type=nn.Linear).sparsify_model(50)
    assert torch.equal(one[4].weight, two[4].weight) and (one[4].weight.reshape(-1, 4) != 0).sum(1).eq(2).all()

def test_a_pattern_as_a_string_in_a_fit():
    learn = learner()
    learn.fit(1, cbs=SparsifyCallback(50, nm='2:4', layer_type=nn.Linear, schedule='one_shot', verbose=False))
    weight = [m for m in learn.model.modules() if isinstance(m, nn.Linear)][0].weight
    assert (weight.reshape(-1, 4) != 0).sum(1).le(2).all()

def test_a_pattern_as_a_string_for_sparsegpt():
    torch.manual_seed(0)
    w, x = torch.randn(3, 8), torch.randn(8, 50)
    assert torch.equal(sparsegpt(w, x @ x.T, nm='2:4')[1], sparsegpt(w, x @ x.T, nm=(2, 4))[1])

@pytest.mark.parametrize('nm', ['4:2', '2-4', '24', '2:4:8', ':', '', 'two:four', '-2:4', (2, 4.), 2])
def test_an_invalid_pattern_is_refused(nm):
    with pytest.raises(ValueError, match="`nm` must be a pattern such as '2:4'"): as_nm(nm)
    with pytest.raises(ValueError, match='`nm`'): Sparsifier(net(), nm=nm)
    with pytest.raises(ValueError, match='`nm`'): SparsifyCallback(50, nm=nm)

# One percent

@pytest.mark.parametrize('make', [
    lambda: SparsifyCallback(1), lambda: SparsifyCallback([1, 1]), lambda: SparsifyCallback({'0': 1.}),
    lambda: PruneCallback(1), lambda: Sparsifier(net()).sparsify_model(1),
    lambda: Sparsifier(net()).sparsify_layer('0', 1)])
def test_one_percent_warns_once(make):
    said = told(make)
    assert [w.filename for w in said] == [__file__] and '1 means 1 %' in str(said[0].message)

@pytest.mark.parametrize('sparsity', [0, 1.5, 50, 100, [1, 50], {'0': 1, '2': 10}])
def test_other_percentages_do_not_warn(sparsity): assert told(lambda: SparsifyCallback(sparsity)) == []

def test_a_fit_does_not_warn_again():
    with pytest.warns(UserWarning, match='1 means 1 %'): cb = SparsifyCallback(1, verbose=False)
    learn = learner()
    assert not [w for w in told(learn.fit, 1, cbs=cb) if '1 %' in str(w.message)]

# Wanda

@pytest.mark.parametrize('context, kwargs, hint', [
    ('local', {}, 'all weights of a layer'), ('global', {}, 'not comparable between layers'), ('output', {}, None),
    ('local', dict(nm='2:4', layer_type=nn.Linear), None), ('local', dict(granularity='filter'), None)])
def test_what_wandas_context_is(context, kwargs, hint):
    said = [w for w in told(lambda: Sparsifier(net(), context=context, criteria='wanda', data=image(), **kwargs))]
    assert [w.filename for w in said] == [__file__]*bool(hint)
    if hint: assert hint in str(said[0].message) and "context='output'" in str(said[0].message)

# Output layers

class Named(nn.Module):
    "The layer that is called `output` is not the last one"
    def __init__(self):
        super().__init__()
        self.output, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
    def forward(self, x): return self.last(self.output(x).relu())

class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
    def forward(self, x): return self.b(self.a(x)) if x.sum() != 1e9 else self.a(x)

def layers(sp): return [t.layer for t in sp.targets]

@pytest.mark.parametrize('inputs', [{}, dict(example_inputs=image()), dict(data=image()),
                                    dict(data=[(image(), 0*image())])])
def test_exclude_output(inputs):
    assert layers(Sparsifier(net(), layer_type=nn.Module, exclude='output', **inputs)) == ['0', '2']
    assert layers(Sparsifier(net(), layer_type=nn.Module, exclude=['0', 'output'], **inputs)) == ['2']
    assert layers(Sparsifier(net(), exclude='output', **inputs)) == ['0', '2']  # the last layer is none of these

def test_exclude_output_in_fits():
    for cb in (SparsifyCallback(50, layer_type=nn.Module, exclude='output', verbose=False),
               PruneCallback(50, exclude='output', verbose=False)):
        learn = learner()
        last  = output_layers(learn.model, image())
        before = dict(learn.model.named_modules())[last[0]].weight
        learn.fit(1, cbs=cb)
        assert len(last) == 1 and last[0] not in layers(cb.sparsifier)
        assert dict(learn.model.named_modules())[last[0]].weight.count_nonzero() == before.numel() or isinstance(
            cb, PruneCallback)

def test_a_model_that_cannot_be_traced_needs_inputs():
    with pytest.raises(ValueError, match='without `example_inputs`: pass them'):
        Sparsifier(Untraceable(), layer_type=nn.Linear, exclude='output')
    sp = Sparsifier(Untraceable(), layer_type=nn.Linear, exclude='output', example_inputs=torch.randn(2, 4))
    assert layers(sp) == ['a']

def test_a_layer_called_output():
    said = told(lambda: Sparsifier(Named(), layer_type=nn.Linear, exclude='output'))
    assert len(said) == 1 and said[0].filename == __file__ and "write 'output.weight'" in str(said[0].message)
    assert layers(Sparsifier(Named(), layer_type=nn.Linear, exclude='output.weight')) == ['last']

def test_output_layers_leave_the_model_as_it_was():
    m = net()
    before = {k: v.clone() for k,v in m.state_dict().items()}
    m[0].weight.requires_grad_(False)
    output_layers(m.train(), image())
    assert m.training and not m[0].weight.requires_grad and all(p.grad is None for p in m.parameters())
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items())
    assert not any(o._forward_hooks for o in m.modules())

@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v2', 'densenet121', 'vit_b_16', 'googlenet'])
def test_output_layers_of_torchvision(name):
    from torchvision.models import get_model
    own = dict(aux_logits=False, init_weights=False) if name == 'googlenet' else {}
    m = get_model(name, weights=None, **own, **(dict(image_size=32) if name == 'vit_b_16' else {}))
    found = output_layers(m, torch.randn(1, 3, *[32 if name == 'vit_b_16' else 64]*2))
    assert [type(m.get_submodule(n)) for n in found] == [nn.Linear] and m.get_submodule(found[0]).out_features == 1000

# One word for one thing

def test_former_names_warn_and_work():
    said = told(lambda: PruneCallback(pruning_ratio=50, every=2))
    assert [w.category for w in said] == [DeprecationWarning]*2 and {w.filename for w in said} == {__file__}
    with pytest.warns(DeprecationWarning): cb = PruneCallback(pruning_ratio=50, every=2)
    assert (cb.sparsity, cb.every_epochs) == (50, 2)
    assert list(inspect.signature(PruneCallback).parameters)[:4] == 'sparsity schedule context criteria'.split()

def test_both_names_or_none_are_refused():
    with pytest.raises(TypeError, match='former name'): PruneCallback(50, pruning_ratio=60)
    with pytest.raises(TypeError, match='`sparsity` is missing'): PruneCallback()

def test_results_of_tickets_as_a_table():
    found = find_ticket(learner(), 1, sparsity=50, rounds=1, controls=(), seed=0, verbose=False)
    with pytest.warns(DeprecationWarning, match='to_pandas'): old = found.df()
    assert old.equals(found.to_pandas())

# Example inputs in any form

def test_thin_takes_inputs_in_the_second_place():
    m = net()
    with torch.no_grad(): m[0].weight[:4], m[0].bias[:4] = 0, 0
    x = image()
    for inputs in (x, (x,), [x], dict(input=x), (x, torch.zeros(2))):
        small = thin(m, inputs)
        assert small[0].out_channels == 4 and torch.allclose(small(x), m(x), atol=1e-6)
    assert thin(m, {'0.weight': m[0].weight != 0}, x)[0].out_channels == 4

def test_a_batch_of_fastai_will_do():
    learn = learner()
    batch = learn.dls.one_batch()
    x = batch[0]
    assert len(coupled_groups(learn.model, batch)) == len(coupled_groups(learn.model, x))
    assert multiply_adds(learn.model, batch) == multiply_adds(learn.model, x)
    assert compare(learn.model, learn.model, batch, devices=[]).before.params == sum(
        p.numel() for p in learn.model.parameters())

# What stays, and why

def test_scattered_zeros_say_what_would_shrink_the_network():
    m = net()
    Sparsifier(m).sparsify_model(50)
    said = told(thin, m, image())
    assert len(said) == 1 and 'no whole channel is' in str(said[0].message) and 'PruneCallback' in str(said[0].message)
    assert told(thin, net(), image()) == []  # a dense network needs no explanation

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 2)
    def forward(self, x):
        x = self.a(x)
        return self.last((x + self.b(x)).mean((2, 3)))

def test_filters_that_are_added_say_coupled():
    torch.manual_seed(0)
    m = Residual()
    Sparsifier(m, 'filter').sparsify_model(50)
    said = told(thin, m, image())
    assert len(said) == 1 and 'coupled=True' in str(said[0].message) and said[0].filename != thin.__code__.co_filename
    m = Residual()
    Sparsifier(m, 'filter', coupled=True, example_inputs=image()).sparsify_model(50)
    assert told(thin, m, image()) == [] and thin(m, image()).a.out_channels == 4

# Swapped arguments

def test_the_first_argument_of_load_thinned(tmp_path):
    file = save_thinned(net(), tmp_path/'small')
    for first in (net(), str(file), file):
        with pytest.raises(TypeError, match='`make_model`, the first argument, must be a function'):
            load_thinned(first, file)
    with pytest.raises(TypeError, match='`file` must be a path, got Sequential'): load_thinned(net, net())
    assert isinstance(load_thinned(net, file), nn.Module)

def test_a_model_where_a_file_is_expected(tmp_path):
    m, file = net(), save_sparse(net(), tmp_path/'sparse')
    ticket  = save_ticket(tmp_path/'ticket', m.state_dict(), {'0.weight': m[0].weight != 0})
    for call,how in ((lambda: load_sparse(m, file), r'load_sparse\(file, model\)'),
                     (lambda: load_ticket(m, ticket), r'load_ticket\(file, model\)'),
                     (lambda: save_sparse(file, m), r'save_sparse\(model, file\)'),
                     (lambda: save_sparse(m, m), r'save_sparse\(model, file\)'),
                     (lambda: save_thinned(file, m), r'save_thinned\(model, file\)'),
                     (lambda: save_thinned(m, m), r'save_thinned\(model, file\)'),
                     (lambda: save_ticket(m, m.state_dict(), {}), r'save_ticket\(file, state, masks\)')):
        with pytest.raises(TypeError, match=how): call()
    with pytest.raises(TypeError, match='model.state_dict'): save_ticket(ticket, m, {})
    with pytest.raises(TypeError, match='`model` must be'): load_ticket(ticket, str(ticket))

# Warnings name the line of the user

def test_the_collapse_warning_names_this_line():
    m = net()
    said = told(lambda: Sparsifier(m).sparsify_model(100))
    assert {w.category for w in said} == {LayerCollapse} and {w.filename for w in said} == {__file__}

def test_a_warning_in_a_fit_names_the_line_of_the_fit():
    learn = learner()
    cbs = [SparsifyCallback(50, verbose=False), SparsifyCallback(60, 'filter', verbose=False)]
    said = [w for w in told(lambda: learn.fit(1, cbs=cbs)) if 'SparsifyCallback' in str(w.message)]
    assert said and {w.filename for w in said} == {__file__}

def test_a_warning_of_a_diverged_fit_names_the_line_of_the_fit():
    class Spoil(Callback):
        order = 50
        def after_step(self): self.learn.model[0].weight.data.fill_(float('nan'))
    learn = learner()
    said  = told(lambda: learn.fit(1, cbs=[SparsifyCallback(50, criteria='random', verbose=False), Spoil()]))
    assert {w.filename for w in said if 'diverged' in str(w.message)} == {__file__}

def test_every_warning_is_made_by_one_function():
    "No module gives a `stacklevel`, which points into our files when it is called in another way"
    folder = fasterai_clone.__path__[0]
    import pathlib
    found = [p.name for p in pathlib.Path(folder).rglob('*.py') if re.search(r'warnings\.warn\(', p.read_text('utf-8'))]
    assert set(found) <= {'cli.py', 'moved.py'}

# A criterion of two arguments

def test_a_criterion_of_two_arguments():
    def change(now, before): return (now - before).abs()
    for make in (lambda: as_criteria(change), lambda: Criteria(change), lambda: Sparsifier(net(), criteria=change)):
        with pytest.raises(TypeError, match=r'needs_init=True, output_fn=change\)'): make()
    as_criteria(lambda w, p=2: w.abs()**p)
    as_criteria(torch.abs)

# Charts and files

def test_bars_have_names():
    ax = Sparsifier(net()).report().plot()
    assert [t.get_text() for t in ax.get_yticklabels()] == ['0 (Conv2d)', '2 (Conv2d)']
    assert not re.search(r'\[.*\]%', ax.get_title())
    plt.close('all')

@pytest.mark.parametrize('content, kind', [
    (b'', 'it is empty'), (b'\x08\x08\x12\x07pytorch', 'an ONNX file'), (b'epoch,loss\n0,1.5\n', 'a text file'),
    ('zip', 'a zip archive, but not one of `torch.save`')])
def test_a_file_that_has_no_weights_is_named(content, kind, tmp_path):
    file = tmp_path/'model.pth'
    if content == 'zip':
        with zipfile.ZipFile(file, 'w') as z: z.writestr('readme.txt', 'nothing')
    else: file.write_bytes(content)
    with pytest.raises(SystemExit, match=kind): sparsity_report(str(file))
