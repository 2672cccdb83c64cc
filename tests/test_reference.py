"""Every public name has an example that runs where it is defined; methods have one somewhere; parameters say what they
are"""
import ast, importlib, inspect, json, re
from functools import cache
from pathlib import Path

import pytest, torch.nn as nn
from fastcore.docments import docments

root    = Path(__file__).resolve().parent.parent
package = root/'fasterai_clone'
modules = ['.'.join(p.relative_to(root).with_suffix('').parts) for p in sorted(package.rglob('*.py'))
           if p.stem not in ('__init__', '_modidx', 'all')]
by_module = pytest.mark.parametrize('name', modules, ids=lambda n: n.removeprefix('fasterai_clone.'))

@cache
# all of them: classes grow in later modules too
def imported(): return {m: importlib.import_module(m) for m in modules}

def public(name):
    "name → object, of the module called `name`"
    return {n: getattr(imported()[name], n) for n in imported()[name].__all__}


# Examples

def directives(source): return [d.split() for d in re.findall(r'^#\|\s*(.+?)\s*$', source, re.M)]

def is_example(source):
    "Is this cell shown, and run?"
    first = [d[0].rstrip(':') for d in directives(source)]
    return not any(d.startswith(('export', 'hide', 'default_exp'))
                   for d in first) and ['eval:', 'false'] not in directives(source)

def parsed(source): return ast.parse('\n'.join(l for l in source.splitlines() if not l.lstrip().startswith(('%', '!'))))

def used(source):
    "The names and attributes that code reads or calls"
    nodes = [n for n in ast.walk(parsed(source)) if not isinstance(getattr(n, 'ctx', None), (ast.Store, ast.Del))]
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}

@cache
def examples():
    "path of a notebook → (the module it defines or None, what its visible cells use)"
    found = {}
    for p in sorted((root/'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' in p.parts: continue
        cells  = [''.join(c['source']) for c in json.loads(p.read_text(encoding='utf-8'))['cells']
                  if c['cell_type'] == 'code']
        module = next((f'fasterai_clone.{d[1]}' for s in cells for d in directives(s) if d[0] == 'default_exp'), None)
        found[p] = module, set().union(*(used(s) for s in cells if is_example(s)))
    return found

@cache
def used_anywhere(): return set().union(*(names for _,names in examples().values()))

def test_cells_are_told_apart():
    "Only what is shown and run counts, and only what is used: not what a string, a comment or an assignment names"
    shown = {'f(1)': True, '#| echo: false\nf(1)': True, '#| eval: false\nf(1)': False, '#| hide\nf(1)': False,
             '#|hide_input\nf(1)': False,
             '#| export\ndef f(): ...': False, '#| exporti\ndef f(): ...': False, '#| default_exp core.f': False}
    assert {s: is_example(s) for s in shown} == shown
    assert used('%matplotlib inline\ng = f.h(1)  # comment\n"text"') == {'f', 'h'}

def none(missing, what): assert not missing, f'{what}:\n' + '\n'.join(sorted(missing))

@by_module
def test_every_public_name_has_an_example(name):
    "In the notebook that defines it"
    here = [names for module,names in examples().values() if module == name]
    assert len(here) == 1, f'{len(here)} notebooks define {name}'
    none(set(public(name)) - here[0], 'Used in no visible cell of their notebook')

def plots(source):
    "Is the last thing this code does a call of something called `plot`?"
    last = parsed(source).body[-1:]
    call = last[0].value if last and isinstance(last[0], ast.Expr) else None
    return isinstance(call, ast.Call) and getattr(call.func, 'attr', getattr(call.func, 'id', '')).startswith('plot')

def test_what_is_plotted_is_shown():
    "A picture is saved with each: one that comes up in the wrong place takes all later ones away from the reader"
    bare = []
    for p in examples():
        for c in json.loads(p.read_text(encoding='utf-8'))['cells']:
            source = ''.join(c['source'])
            if c['cell_type'] != 'code' or not is_example(source) or not plots(source): continue
            if not any('image/png' in o.get('data', {}) for o in c['outputs']):
                bare.append(f'{p.stem}: {source.splitlines()[-1]}')
    none(bare, 'No picture in the output')

def callables(c):
    """name → function of the public methods and properties of the class `c` that are ours; fastai calls its events
    itself"""
    for k,v in vars(c).items():
        f = v.fget if isinstance(v, property) else v.__func__ if isinstance(v, (classmethod, staticmethod)) else v
        event = re.match(r'(before|after)_', k) and any(b.__name__ == 'Callback' for b in c.__mro__)
        field = k in getattr(c, '__dataclass_fields__', ())  # a default that is a function
        # documented where it comes from
        known = any(hasattr(b, k) for b in c.__mro__ if not b.__module__.startswith('fasterai_clone'))
        ours  = inspect.isfunction(f) and not k.startswith('_') and f.__module__.startswith('fasterai_clone')
        # what a base of our callbacks declares and calls
        hook = k in ('record', 'reloaded', 'state_to_save') or any(
            k in vars(b) for b in c.__mro__[1:] if b.__module__.startswith('fasterai_clone.fit'))
        if ours and not (event or field or known or hook): yield k, f

def methods(name):
    "(class, name, function) of each method of the public classes"
    return [(n, k, f) for n,c in public(name).items() if inspect.isclass(c) for k,f in callables(c)]

@by_module
def test_every_public_method_has_an_example(name):
    "In some notebook"
    none({f'{c}.{k}' for c,k,_ in methods(name) if k not in used_anywhere()}, 'Used in no visible cell of any notebook')


# Parameters

def words(text): return {w for t in re.findall(r'`([^`]+)`', text or '') for w in re.findall(r'\w+', t)}

plain = dict(model='Module', learn='Learner', optimizer='Optimizer')  # name and type say it all

def commented(f):
    "Parameters, or fields of a `NamedTuple`, that have a comment"
    if inspect.isclass(f) and issubclass(f, tuple):
        return set(re.findall(r'^\s*(\w+):.*\S\s+#', inspect.getsource(f), re.M))
    return {k for k,v in docments(f, returns=False).items() if v}

def undocumented(f, *docs):
    "Parameters of `f` that have no comment, and that no docstring, its own or one of `docs`, names in back-ticks"
    said  = commented(f) | words(inspect.getdoc(f)).union(*map(words, docs))
    given = {k: p for k,p in inspect.signature(f).parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    given = {k for k,p in given.items() if plain.get(k, '-') not in str(p.annotation)}
    return given - said - {'self', 'cls'}

def test_comments_and_back_ticks_are_documentation():
    def f(a,
          b,  # a number
          c,
          model: nn.Module, learn): "Adds `a`"
    assert undocumented(f) == {'c', 'learn'} and undocumented(f, 'Two: `c`') == {'learn'}

def inherited(c):
    "What the `__init__` of a class that is not ours documents, and ours takes over"
    base = next(b for b in c.__mro__ if not b.__module__.startswith('fasterai_clone'))
    return set(inspect.signature(base).parameters) if base not in (object, dict) else set()

def signatures(name):
    "label → undocumented parameters, of what users call"
    for n,o in public(name).items():
        if inspect.isfunction(o): yield n, undocumented(inspect.unwrap(o))
        elif inspect.isclass(o) and not issubclass(o, Warning):
            yield n, undocumented(o, o.__init__.__doc__) - inherited(o)
    for c,k,f in methods(name): yield f'{c}.{k}', undocumented(f, public(name)[c].__doc__)

@by_module
def test_every_parameter_is_documented(name):
    "By a comment, or in the docstring of the function or its class"
    none({f'{label}: {", ".join(sorted(found))}' for label,found in signatures(name) if found},
         'Parameters that nothing says the meaning of')
