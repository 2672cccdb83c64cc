"""What editors, type checkers, `help` and `import` show: every name, argument and type; the smallest first import"""
import ast, builtins, dataclasses, importlib, inspect, json, os, pydoc, re, shutil, subprocess, sys, tarfile, zipfile
from pathlib import Path

import jedi, pytest

root    = Path(__file__).resolve().parent.parent
package = root/'fasterai_clone'
rooms   = sorted(p for p in package.rglob('*.py') if p.stem not in ('__init__', '_modidx', 'all'))
stars   = sorted(package.rglob('all.py'))

def dotted(p): return '.'.join(p.relative_to(root).with_suffix('').parts)

by_room = pytest.mark.parametrize('path', rooms, ids=dotted)

def in_new_process(code):
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(root)})


# Imports

@pytest.mark.parametrize('path', stars, ids=dotted)
def test_a_star_import_replaces_no_name_that_people_import(path):
    space = {}
    exec(f'from {dotted(path)} import *', space)
    names = {k for k in space if not k.startswith('__')}
    assert names and not names & {*sys.stdlib_module_names, *vars(builtins)}

def test_random_keeps_its_names():
    from fasterai_clone.core import criteria
    from fasterai_clone.core.names import named_criteria
    from fasterai_clone.sparse.all import available_criterias, random_importance
    assert random_importance is criteria.random is named_criteria()['random'] and 'random' in available_criterias()
    assert 'random_importance' not in available_criterias()  # a second name of one, as `grad_crit`

def test_importing_the_package_imports_neither_torch_nor_fastai():
    done = in_new_process('import sys, fasterai_clone\n'
                          'heavy = {"torch", "fastai", "fastcore", "numpy"} & {*sys.modules}\n'
                          'assert not heavy, heavy\n'
                          'assert {"Sparsifier", "PruneCallback"} <= {*dir(fasterai_clone)}\n'
                          'from fasterai_clone import SparsifyCallback, Sparsifier\n'
                          'assert "fastai" in sys.modules\n'
                          'from fasterai_clone.sparse.all import Sparsifier as same\n'
                          'assert Sparsifier is same\n'
                          'import fasterai_clone.cli, fasterai_clone.core.masks\n'
                          'from fasterai_clone import core, cli')
    assert done.returncode == 0, done.stderr

def test_every_name_of_the_package_is_that_of_its_module():
    import fasterai_clone
    for name in fasterai_clone.__all__:
        home = importlib.import_module(f'fasterai_clone.{fasterai_clone._home_of[name]}')
        assert getattr(fasterai_clone, name) is getattr(home, name)

@pytest.mark.parametrize('wrong,right', [('SparsifyCalback', 'SparsifyCallback'), ('sparsifier', 'Sparsifier'),
                                         ('Prunecallback', 'PruneCallback'), ('KeepSparse', 'KeepSparsity')])
def test_a_mistyped_name_gets_the_nearest_one(wrong, right):
    import fasterai_clone
    with pytest.raises(AttributeError, match=f'Did you mean {right!r}'): getattr(fasterai_clone, wrong)
    with pytest.raises(ImportError, match=f'Did you mean {right!r}'): exec(f'from fasterai_clone import {wrong}')
    assert not hasattr(fasterai_clone, wrong)

def test_a_name_like_no_other_gets_no_hint():
    import fasterai_clone
    with pytest.raises(AttributeError, match='Its names: .*Sparsifier') as e: fasterai_clone.xyzxyz
    assert 'Did you mean' not in str(e.value)


# Help

def public(module):
    "(name, object) of the names that a module offers"
    return [(k, getattr(module, k)) for k in module.__all__]

def commented(path):
    "(name, comment) of each argument with a comment on its line, by function or class"
    src, found = path.read_text(encoding='utf-8').splitlines(), {}
    for node in ast.parse('\n'.join(src)).body:
        init = node if isinstance(node, ast.FunctionDef) else next(
            (o for o in getattr(node, 'body', []) if isinstance(o, ast.FunctionDef) and o.name == '__init__'), None)
        if not init: continue
        for a in [*init.args.posonlyargs, *init.args.args, *init.args.kwonlyargs]:
            line, end = src[a.lineno - 1], src[a.lineno - 1].rfind('  # ')
            alone = a.lineno > init.lineno and re.match(rf'\s*{a.arg}\b', line)
            if alone and end > 0 and line.count('#') == 1: found.setdefault(node.name, []).append(line[end+4:].strip())
    return found

@by_room
def test_help_explains_every_argument_and_shows_names(path):
    module, comments = importlib.import_module(dotted(path)), commented(path)
    for name,o in public(module):
        text = pydoc.plain(pydoc.render_doc(o))
        assert ' at 0x' not in text, name
        for comment in comments.get(name, ()):
            assert comment in text, f'{name}: {comment}'

def test_help_has_short_signatures():
    from fasterai_clone.all import Sparsifier, SparsifyCallback
    for c in (Sparsifier, SparsifyCallback):
        lines = str(inspect.signature(c)).splitlines()
        assert len(lines) <= 20 and max(map(len, lines)) <= 88
        assert 'criteria: Criteria | str | dict = large_final' in str(inspect.signature(c))
    assert 'schedule: Schedule | str = agp' in str(inspect.signature(SparsifyCallback))

def test_jupyter_shows_the_same():
    "`SparsifyCallback?`"
    from IPython.core.oinspect import Inspector
    from fasterai_clone.all import SparsifyCallback
    theme = {'theme_name': 'nocolor'} if 'theme_name' in inspect.signature(Inspector).parameters else {}
    text  = Inspector(**theme).info(SparsifyCallback, 'SparsifyCallback')
    call = text['init_definition']
    assert ' at 0x' not in call and 'criteria: Criteria | str | dict = large_final' in call
    assert 'save_tickets: save the rewound, masked weights' in text['docstring']

def test_values_print_as_their_names():
    from functools import partial
    import torch
    from fasterai_clone.all import Criteria, Schedule, agp, iterative, large_final, sched_agp, wanda
    assert [repr(o) for o in (large_final, wanda, agp)] == ['large_final', 'wanda', 'agp']
    assert repr(Criteria(torch.abs)) == 'Criteria(abs)' and repr(Schedule(sched_agp, 0.3)) == (
        'Schedule(sched_agp, start_pct=0.3)')
    assert repr(iterative(n_steps=5)) == 'Schedule(partial(sched_iterative, n_steps=5), start_pct=0.2)'
    assert repr(Criteria(partial(torch.clamp, min=0))) == 'Criteria(partial(clamp, min=0))'


# Annotations

def gaps(f):
    "Arguments without a type, and `return` if the result has none"
    f = inspect.unwrap(f)
    params = [*inspect.signature(f, follow_wrapped=False).parameters.values()]
    code   = f.__code__
    bare   = [p.name for p in params if p.annotation is p.empty and not (p is params[0] and p.name in ('self', 'cls'))]
    return bare + (['return'] if 'return' not in f.__annotations__ and code.co_name != '__init__' else [])

def functions_of(c):
    "Public functions of a class and of its bases in the package, patched ones too"
    for base in c.__mro__:
        if not base.__module__.startswith('fasterai_clone.'): continue
        for k,v in vars(base).items():
            if k.startswith('_') and k not in ('__init__', '__call__'): continue
            if isinstance(v, property) and k in inspect.get_annotations(base): continue  # its class says its type
            bound = getattr(base, k)  # a class method is bound
            parts = [v.fget, v.fset] if isinstance(v, property) else [getattr(bound, '__func__', bound)]
            for f in parts:
                ours = inspect.isfunction(f) and f.__module__.startswith('fasterai_clone.')
                if ours and (k != '__init__' or not dataclasses.is_dataclass(base)): yield f'{base.__name__}.{k}', f

@by_room
def test_public_functions_and_methods_are_annotated(path):
    bare = {}
    for name,o in public(importlib.import_module(dotted(path))):
        for k,f in functions_of(o) if inspect.isclass(o) else [(name, o)] if inspect.isfunction(o) else []:
            if found := gaps(f): bare[k] = found
    assert bare == {}


# Stubs

def stub_of(path): return ast.parse(path.with_suffix('.pyi').read_text(encoding='utf-8'))

def arguments(f):
    a = f.args
    return [o.arg for o in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg) if o]

@by_room
def test_a_stub_has_what_the_module_has(path):
    "Functions, and the public methods of classes, wherever they were patched in, with the same arguments"
    for p in rooms: importlib.import_module(dotted(p))
    module, stub = importlib.import_module(dotted(path)), stub_of(path)
    here = {n.name: n for n in stub.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    data = {n.target.id: ast.unparse(n.annotation) for n in stub.body if isinstance(n, ast.AnnAssign)}
    for name,o in public(module):
        if getattr(o, '__module__', module.__name__) != module.__name__ and callable(o): continue  # only passed on
        if inspect.isclass(o):
            known = {n.name: n for n in here[name].body if isinstance(n, ast.FunctionDef)}
            own   = {k: v for k,v in vars(o).items() if not k.startswith('_') and inspect.isfunction(v)
                     and v.__module__.startswith('fasterai_clone.') and v.__name__ == k}
            assert {*own} <= {*known}
            assert [k for k,v in own.items() if arguments(known[k]) != [*inspect.signature(v).parameters]] == []
        elif inspect.isfunction(o): assert arguments(here[name]) == [*inspect.signature(o).parameters]
        elif name in data: assert data[name].split('[')[0] == type(o).__name__

CALLS = '''
sp = Sparsifier(model, context='global', criteria=large_final, layer_type=nn.Linear)
sp.sparsify_model(50, round_to=2)
sp.sparsify_layer('0', 50, relative=True)
sp.hold(opt, compact=True).release()
sp.report().to_pandas()
sp.report().plot(ax=None)
sp.print_sparsity()
sp.load_state_dict(state=sp.state_dict())
sp.masks.apply(params=model)
sp.masks.save(file='masks')
Masks.load('masks', model=model)
Masks.of(model, exclude='0')
Masks().hold(model, opt, compact=True)
cb = SparsifyCallback(90, schedule=agp, end_epoch=7, verbose=False)
cb.load_state_dict(state=cb.state_dict())
PruneCallback(50, min_channels=2)
PruneCallback(50).table()
KeepSparsity(masks=None, verbose=False)
KeepSparsity().masks_for(model=model)
Schedule(sched_agp, start_pct=0.1).sparsity(0.5, target=80)
agp.progress(pct_train=0.5)
thin(model, example_inputs=x)
compare(model, model, x, runs=1).plot(axes=None)
Criteria(abs, needs_init=True)
'''
HEAD = '''import torch, torch.nn as nn
from fasterai_clone import (Criteria, KeepSparsity, Masks, PruneCallback, Schedule, Sparsifier, SparsifyCallback, agp,
                            compare, large_final, thin)
from fasterai_clone.core.schedule import sched_agp
model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
opt = torch.optim.SGD(model.parameters(), lr=0.1)
sp, cb = Sparsifier(model), SparsifyCallback(90)
'''
calls = CALLS.strip().splitlines()

def inside_last_call(line): return line.rfind(')')

@pytest.mark.parametrize('call', calls)
def test_jedi_knows_the_call(call):
    "The arguments with their types, and the explanation, at the last bracket"
    code   = HEAD + call
    script = jedi.Script(code, path=str(root/'example.py'), project=jedi.Project(root),
                         environment=jedi.InterpreterEnvironment())
    found  = script.get_signatures(code.count('\n') + 1, inside_last_call(call))
    assert len(found) == 1, found
    given = re.findall(r'(\w+)=', call[call.rfind('('):])
    params = {p.name: p.to_string() for p in found[0].params}
    assert {*given} <= {*params} and all(':' in params[k] for k in given)
    assert found[0].docstring(raw=True).strip()

def test_jedi_completes_patched_methods():
    for code,names in (('sp.', 'sparsify_model sparsify_layer hold report print_sparsity masks apply_masks'),
                       ('sp.report().', 'to_pandas plot rows sparsity'), ('sp.masks.', 'apply save of load hold'),
                       ('cb.', 'report sparsifier history plot state_dict load_state_dict')):
        script = jedi.Script(HEAD + code, path=str(root/'example.py'), project=jedi.Project(root),
                             environment=jedi.InterpreterEnvironment())
        assert {*names.split()} <= {c.name for c in script.complete()}, code

def pyright(folder, code):
    "(line, rule, message) of each error that Pyright finds in `code`"
    (folder/'pyrightconfig.json').write_text(json.dumps(dict(typeCheckingMode='standard', extraPaths=[str(root)])))
    (folder/'example.py').write_text(code)
    done = subprocess.run([sys.executable, '-m', 'basedpyright', '--outputjson', '--project', folder, '--pythonpath',
                           sys.executable], capture_output=True, text=True, cwd=folder)
    found = json.loads(done.stdout)['generalDiagnostics']
    return [(d['range']['start']['line'] + 1, d.get('rule'), d['message']) for d in found if d['severity'] == 'error']

def test_pyright_knows_the_calls_and_reports_a_wrong_argument(tmp_path):
    "All of them pass; with an argument that does not exist each one is reported"
    first, wrong = HEAD.count('\n') + 1, 'no_such_argument=1'
    assert pyright(tmp_path, HEAD + CALLS.strip() + '\n') == []
    def spoiled(line):
        i = inside_last_call(line)
        return f'{line[:i]}{"" if line[i-1] == "(" else ", "}{wrong}{line[i:]}'
    found = pyright(tmp_path, HEAD + '\n'.join(map(spoiled, calls)) + '\n')
    reported = {line for line,rule,message in found if rule == 'reportCallIssue' and 'no_such_argument' in message}
    assert reported == {*range(first, first + len(calls))}

def test_pyright_knows_types(tmp_path):
    "A wrong type and a wrong name are reported, with the right ones in the message"
    found = pyright(tmp_path, HEAD + "sp.sparsify_model('ninety')\nsp.sparsify_modle(90)\n"
                                     "from fasterai_clone import Sparsifyer\n")
    assert [rule for _,rule,_ in found] == ['reportArgumentType', 'reportAttributeAccessIssue',
                                            'reportAttributeAccessIssue']


# What is installed

@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "Names in a wheel and in a source distribution, built from the files that git knows or would"
    copy, dest = tmp_path_factory.mktemp('copy'), tmp_path_factory.mktemp('dist')
    shutil.copytree(package, copy/'fasterai_clone', ignore=shutil.ignore_patterns('__pycache__'))
    for f in root.iterdir():
        if f.is_file() and not f.name.startswith('.'): shutil.copy(f, copy/f.name)
    code = f'from setuptools import build_meta as b\nb.build_wheel({str(dest)!r})\nb.build_sdist({str(dest)!r})'
    done = subprocess.run([sys.executable, '-c', code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel, = dest.glob('*.whl')
    sdist, = dest.glob('*.tar.gz')
    with tarfile.open(sdist) as t: in_sdist = {n.partition('/')[2] for n in t.getnames()}
    return {*zipfile.ZipFile(wheel).namelist()}, in_sdist

@pytest.mark.parametrize('which', [0, 1], ids=['wheel', 'sdist'])
def test_stubs_are_installed(built, which):
    expected = {str(p.relative_to(root)) for p in package.rglob('*.pyi')} | {'fasterai_clone/py.typed',
                                                                           'fasterai_clone/docs.json'}
    assert len(expected) > 120 and expected <= built[which]
