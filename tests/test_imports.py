"What importing costs, what the metadata says, and the rules that exported cells keep"
import ast, configparser, importlib, importlib.metadata, inspect, json, re, subprocess, sys, tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

root = Path(__file__).resolve().parent.parent


# Imports, each in a fresh process

def loaded(code):
    "Top-level modules that `code` brings, in a process of its own"
    tell = 'import sys\nprint(*{m.split(".")[0] for m in sys.modules})'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', f'{code}\n{tell}'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())

def test_without_torchvision():
    names = loaded('\n'.join(f'from fasterai_clone.{m} import *'
                             for m in ('sparse.all', 'core.all', 'all', 'digits', 'cli')))
    assert {'torch', 'fastai'} <= names and not names & {'torchvision', 'spacy'}

def test_core_report_sparsifier_and_command_line_need_torch_alone():
    "Also where fastai is not installed"
    names = loaded('''if True:
        import sys
        sys.modules['fastai'] = sys.modules['torchvision'] = None  # an import of these fails
        import torch, fasterai_clone.cli
        from fasterai_clone.core.all import *
        from fasterai_clone.sparse.report import *
        from fasterai_clone.sparse.sparsifier import Sparsifier
        m = torch.nn.Conv2d(4, 4, 3)
        sp = Sparsifier(m)
        sp.sparsify_model(50)
        if str(sp.report()) and int((m.weight == 0).sum()) != 72: raise SystemExit('not pruned')
        del sys.modules['fastai'], sys.modules['torchvision']''')
    assert 'torch' in names and not names & {'fastai', 'torchvision', 'pandas', 'matplotlib', 'sklearn'}

surface = '''SparsifyCallback Sparsifier Granularities Criteria Schedule Masks Reducer Normalizer Report
random_importance large_final small_final squared_final large_init small_init large_init_large_final
small_init_small_final magnitude_increase movement movmag updating_magnitude_increase updating_movement updating_movmag
gradient grad_crit wanda available_criterias one_shot iterative agp one_cycle cos lin dsd sched_oneshot sched_iterative
sched_agp sched_onecycle sched_dsd available_schedules'''.split()

@pytest.mark.parametrize('module', ['sparse.all', 'all'])
def test_public_surface(module):
    space = {}
    exec(f'from fasterai_clone.{module} import *', space)
    assert not [n for n in surface if n not in space] and len(space) <= 50

def test_core_has_its_part():
    space = {}
    exec('from fasterai_clone.core.all import *', space)
    assert not [n for n in surface
                if n not in space and n not in 'SparsifyCallback Sparsifier Report wanda available_criterias'.split()]

def test_names_and_order_of_arguments_are_a_contract():
    from fasterai_clone.all import Criteria, Schedule, Sparsifier, SparsifyCallback
    def args(f): return list(inspect.signature(f).parameters)
    def keywords(f): return {p.name for p in inspect.signature(f).parameters.values() if p.kind == p.KEYWORD_ONLY}
    assert args(Sparsifier)[:6] == 'model granularity context criteria nm layer_type'.split()
    assert args(SparsifyCallback)[:13] == ('sparsity granularity context criteria schedule lth rewind_epoch reset_end '
                                           'save_tickets model '
                                           'round_to nm layer_type').split()
    assert keywords(SparsifyCallback) >= set('start_sparsity start_epoch end_epoch include exclude every '
                                             'verbose'.split())
    assert [p.name for p in inspect.signature(SparsifyCallback).parameters.values()
            if p.default is p.empty] == ['sparsity']
    assert args(Criteria)[:7] == 'f reducer normalizer needs_init needs_update output_fn return_init'.split()
    assert args(Schedule) == 'sched_func start_pct end_pct start_sparsity'.split()

@cache
def modules():
    return [p for p in sorted((root/'fasterai_clone').rglob('*.py')) if p.stem not in ('__init__', '_modidx', 'all')]

def dotted(p): return '.'.join(p.relative_to(root).with_suffix('').parts)

@pytest.mark.parametrize('path', modules(), ids=dotted)
def test_public_names_have_docstrings(path):
    m = importlib.import_module(dotted(path))
    assert m.__doc__ and hasattr(m, '__all__')  # a room may have nothing but names for other rooms
    def missing(o):
        doc = inspect.getdoc(o) or ''
        # what `dataclass` writes is no docstring
        return not doc.strip() or doc.startswith(f'{getattr(o, "__name__", "")}(')
    assert [n for n in m.__all__ if missing(getattr(m, n))] == []

# the name says it
plain = {'weight', 'score_shape', 'reducer', 'sparsity', 'group_sparsity', 'params', 'zeros', 'accuracy',
         # their class says what they are
         'sum', 'mean', 'max', 'l2', 'standardization', 'gaussian'}

@pytest.mark.parametrize('path', modules(), ids=dotted)
def test_public_methods_have_docstrings(path):
    m = importlib.import_module(dotted(path))
    bare = []
    for n in m.__all__:
        c = getattr(m, n)
        if not inspect.isclass(c): continue
        for k,v in vars(c).items():
            ours = isinstance(v, (classmethod, staticmethod, property)) or inspect.isfunction(v)
            if ours and not k.startswith('_') and not v.__doc__: bare.append(f'{n}.{k}')
    assert [b for b in bare if b.split('.')[1] not in plain and not re.match(r'(before|after)_', b.split('.')[1])] == []



# Metadata

@cache
def settings():
    parser = configparser.ConfigParser(delimiters=['='], comment_prefixes=(';',))
    parser.read(root/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']

@cache
def pyproject(): return tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))

def lines_of(key): return [l.strip() for l in settings()[key].splitlines() if l.strip()]

def test_both_files_agree():
    project = pyproject()['project']
    assert settings()['lib_name'] == project['name'] == pyproject()['tool']['nbdev']['lib_path']
    assert (settings()['repository'], settings()['documentation']) == (project['urls']['Repository'],
                                                                       project['urls']['Documentation'])
    assert set(project) == {'name', 'dynamic', 'urls'}, 'everything else has its home in settings.ini'

def test_installed_metadata_is_that_of_settings():
    from fasterai_clone import __version__
    dist = importlib.metadata.distribution('fasterai_clone')
    assert dist.version == __version__ and dist.metadata['Summary'] == settings()['description']
    assert dist.metadata['Requires-Python'] == f">={settings()['min_python']}"
    assert settings()['license'] in str(dist.metadata)
    def plain(r): return Requirement(r).name, Requirement(r).specifier
    assert {plain(r) for r in dist.requires} == {plain(r) for k in ('', 'dev_', 'docs_', 'bench_', 'export_',
                                                           'hf_', 'lightning_', 'onnx_', 'openvino_')
                                                 for r in lines_of(f'{k}requirements')}
    assert {Requirement(r).name for r in dist.requires if 'extra' not in r} == {
        Requirement(r).name for r in lines_of('requirements')}
    assert sorted(dist.metadata.get_all('Provides-Extra')) == [
        'bench', 'dev', 'docs', 'export', 'hf', 'lightning', 'onnx', 'openvino']
    def of(extra):
        return {Requirement(r).name for r in dist.requires if Requirement(r).marker
                and Requirement(r).marker.evaluate(dict(extra=extra))}
    assert of('dev') >= of('docs') == {Requirement(r).name
                                       for r in lines_of('docs_requirements')}, 'the tests build the site'

def test_entry_points():
    points = {(p.group, p.name): p.value for p in importlib.metadata.distribution('fasterai_clone').entry_points}
    assert points == {('console_scripts', 'sparsify'): 'fasterai_clone.sparsify:sparsify',
                      ('console_scripts', 'sparsify-demo'): 'fasterai_clone.cli:sparsify_demo',
                      ('console_scripts', 'sparsity-report'): 'fasterai_clone.cli:sparsity_report',
                      ('nbdev', 'fasterai_clone'): 'fasterai_clone._modidx:d'}
    for p in importlib.metadata.distribution('fasterai_clone').entry_points: assert p.load()
    for script in ('sparsify', 'sparsify-demo', 'sparsity-report'): assert (Path(sys.executable).parent/script).exists()

def test_a_source_distribution_has_what_setup_reads():
    included = (root/'MANIFEST.in').read_text().split()
    assert {'settings.ini', 'README.md'} <= set(included)
    for f in re.findall(r"here/'([\w.]+)'", (root/'setup.py').read_text()): assert f in included

@pytest.mark.parametrize('name', ['settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'CHANGELOG.md',
                                  'CONTRIBUTING.md', 'LICENSE', '.ci/run', '.github/workflows', 'nbs', 'tests'])
def test_the_repository_has(name): assert (root/name).exists()

def test_changelog_knows_this_version():
    from fasterai_clone import __version__
    heads = re.findall(r'^## \[?([^\]\s]+)', (root/'CHANGELOG.md').read_text(encoding='utf-8'), re.M)
    assert __version__ in heads and f'version: {__version__}\n' in (root/'CITATION.cff').read_text(encoding='utf-8')

def test_ids_of_tests_are_the_same_in_all_processes(request):
    "Processes that run tests side by side compare them: no addresses in them"
    assert [i.nodeid for i in request.session.items if re.search('0x[0-9a-f]{6}', i.nodeid)] == []

@pytest.mark.parametrize('where', ['benchmarks', 'docs', 'fasterai_clone', 'nbs', 'setup.py', 'tests', 'tools'])
def test_ruff_finds_nothing(where):
    done = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', '--output-format=concise', root/where],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

# Exported cells

@cache
def notebooks():
    "module → (name of its notebook, which begins with a number; source of its exported cells)"
    found = {}
    for p in sorted((root/'nbs').rglob('*.ipynb')):
        cells = [''.join(c['source']) for c in json.loads(p.read_text(encoding='utf-8'))['cells']
                 if c['cell_type'] == 'code']
        name  = next((m[1] for s in cells if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', s, re.M))), None)
        if name: found[name] = (p.name, [s for s in cells if re.search(r'^#\|\s*exporti?s?\b', s, re.M)])
    return found

by_module = pytest.mark.parametrize('module', notebooks())
def trees(module): return [ast.parse(s) for s in notebooks()[module][1]]
def nodes(module, kind): return [n for t in trees(module) for n in ast.walk(t) if isinstance(n, kind)]

def imported(module):
    "Dotted names of all modules an exported cell imports, in functions too"
    for n in nodes(module, ast.Import): yield from (a.name for a in n.names)
    for n in nodes(module, ast.ImportFrom):
        assert not n.level, 'notebooks import absolutely'
        yield n.module
        yield from (f'{n.module}.{a.name}' for a in n.names)

def test_every_module_has_its_notebook():
    assert {dotted(p).removeprefix('fasterai_clone.') for p in modules()} == set(notebooks())

def test_names_begin_with_a_number(): assert all(re.match(r'\d{3}_', n) for n,_ in notebooks().values())

@by_module
def test_imports_go_one_way(module):
    "Notebooks import from those that come before them in the order of their names"
    name, _ = notebooks()[module]
    ours = {m.removeprefix('fasterai_clone.') for m in imported(module) if m.startswith('fasterai_clone.')}
    known = {m for m in ours if m in notebooks()}
    assert all(notebooks()[m][0] < name for m in known)
    assert all(any(m == k or m.startswith(f'{k}.') for k in known) for m in ours), 'notebooks do not import `all`'

@by_module
def test_fastai_only_where_it_belongs(module):
    names = {m for m in imported(module) if m.split('.')[0] == 'fastai'}
    assert not names or module.split('.')[0] in ('fit', 'digits', 'cli') or module.endswith('_callback')
    assert module == 'cli' or not any(m.startswith('fastai.vision') for m in names)

def lines_in(cell): return [l for l in cell.rstrip().splitlines() if not l.startswith('#|')]

@by_module
def test_exported_cells_are_short(module): assert [c for c in notebooks()[module][1] if len(lines_in(c)) > 40] == []

@by_module
def test_exported_lines_are_short(module):
    assert [l for c in notebooks()[module][1] for l in lines_in(c) if len(l) > 140] == []

@by_module
def test_no_assert_and_no_star_import(module):
    assert not nodes(module, ast.Assert)
    assert not [n for n in nodes(module, ast.ImportFrom) if any(a.name == '*' for a in n.names)]

@by_module
def test_prints_only_what_is_asked_for(module):
    def prints(tree):
        return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, 'id', '') == 'print']
    allowed = [n for f in nodes(module, ast.FunctionDef) if f.name == 'print_text' for n in prints(f)]
    assert module == 'cli' or sum(len(prints(t)) for t in trees(module)) == len(allowed)
