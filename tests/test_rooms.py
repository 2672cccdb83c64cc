"""The house: folders import one way, nothing private crosses a module, rooms are small, a live call stands behind most
exports"""
import ast, importlib, inspect, json, re
from pathlib import Path

import pytest

root    = Path(__file__).resolve().parent.parent
package = root/'fasterai_clone'
rooms   = sorted(p for p in package.rglob('*.py') if p.stem not in ('__init__', '_modidx', 'all'))
by_room = pytest.mark.parametrize('path', rooms, ids=lambda p: '.'.join(p.relative_to(package).with_suffix('').parts))

# folder → those that it may import from
BELOW = dict(core=(), model=('core',), fit=('core',), sparse=('core', 'model'))
for folder in ('methods', 'analyze', 'prune', 'export'): BELOW[folder] = ('core', 'model', 'sparse')
BELOW['trainers'] = ('core', 'model', 'sparse', 'fit')  # of `fit` what needs no fastai, see `test_trainers`
CALLBACKS = ('fit', *BELOW)  # what a `*_callback` may know

def dotted(path): return '.'.join(path.relative_to(package).with_suffix('').parts)

def folder_of(name): return name.split('.')[0]

def imported(path):
    "(module, name) of what the file imports from the package, dotted from its top"
    here = path.relative_to(root).with_suffix('').parts
    for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(n, ast.Import):
            yield from ((a.name.removeprefix('fasterai_clone.'), '')
                        for a in n.names if a.name.startswith('fasterai_clone'))
        if not isinstance(n, ast.ImportFrom): continue
        base = '.'.join((*here[:len(here) - n.level], *filter(None, [n.module]))) if n.level else n.module
        if base.startswith('fasterai_clone'):
            yield from ((base.removeprefix('fasterai_clone').lstrip('.'), a.name) for a in n.names)

@by_room
def test_a_room_is_small(path):
    text = path.read_text(encoding='utf-8')
    own  = re.sub(r'^__all__ = \[.*?\]$', '', text, flags=re.M|re.S)  # nbdev writes it
    assert len(text.splitlines()) <= 330 and max(map(len, own.splitlines())) <= 120

@by_room
def test_a_class_has_at_most_25_methods(path):
    "Patched ones too, wherever they are"
    for p in rooms: importlib.import_module('fasterai_clone.' + dotted(p))
    m = importlib.import_module('fasterai_clone.' + dotted(path))
    own = [c for c in vars(m).values() if inspect.isclass(c) and c.__module__ == m.__name__]
    assert all(sum(map(inspect.isfunction, vars(c).values())) <= 25 for c in own)

@by_room
def test_no_private_name_crosses_a_module(path):
    assert [(base, n) for base,n in imported(path) if n.startswith('_') and not n.startswith('__')] == []

@by_room
def test_folders_import_one_way(path):
    name = dotted(path)
    if '.' not in name: return  # `digits` and `cli` stand above all folders
    may = CALLBACKS if name.endswith('_callback') else (folder_of(name), *BELOW[folder_of(name)])
    assert [base for base,_ in imported(path) if base and folder_of(base) not in may] == []

@by_room
def test_only_callbacks_know_fastai(path):
    name = dotted(path)
    known = {n.module or '' if isinstance(n, ast.ImportFrom) else n.names[0].name
             for n in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
             if isinstance(n, (ast.Import, ast.ImportFrom))}
    fastai = {k for k in known if k.split('.')[0] == 'fastai'}
    assert not fastai or folder_of(name) in ('fit', 'digits', 'cli') or name.endswith('_callback')

def notebook_of(path):
    return next(p for p in (root/'nbs').glob('*.ipynb') if re.sub(r'^\d+_', '', p.stem) == dotted(path))

def shown_cells(path):
    "Sources of the code cells that a reader sees"
    cells = json.loads(notebook_of(path).read_text(encoding='utf-8'))['cells']
    sources = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    return [s for s in sources if not s.startswith('#| hide')]

@by_room
def test_most_exports_are_followed_by_a_live_call(path):
    "65 of 100, and no more than 8 exports without one"
    exports = [s.startswith('#| export') for s in shown_cells(path)]
    live    = [not s.startswith('#|') for s in shown_cells(path)]
    followed = sum(a and b for a,b in zip(exports, live[1:]))
    assert followed >= 0.65*sum(exports)
    runs = ''.join('e' if e else 'l' if l else '' for e,l in zip(exports, live)).split('l')
    assert max(map(len, runs)) <= 8
