"""Write what editors and `help` read: a stub `.pyi` beside each module, and `fasterai_clone/docs.json`.

The sources are read and not imported. A stub has the methods that are patched into a class in its class, wherever they
are defined, the attributes that methods set, and docstrings with the comments of the arguments. `refresh.py` calls
`write_stubs` after each export."""
import ast, builtins, json, re
from functools import cached_property
from pathlib import Path

from build_docs import _args as arguments_of, _comments as comments_in

root    = Path(__file__).resolve().parent.parent
package = root/'fasterai_clone'

text_of = ast.unparse

def is_public(name): return not name.startswith('_') or re.fullmatch('__[a-z]+__', name) is not None

def decorators(node): return [text_of(d) for d in node.decorator_list]

def is_dataclass(node): return any(d.split('(')[0] == 'dataclass' for d in decorators(node))

def patched_class(node):
    "The name of the class that a function is patched into, or None"
    if not isinstance(node, ast.FunctionDef) or not any(d.split('(')[0] == 'patch' for d in decorators(node)):
        return None
    return text_of(node.args.args[0].annotation)


class Module:
    "A module of the package, parsed"
    def __init__(self, path):
        self.path = path
        self.name = '.'.join(path.relative_to(root).with_suffix('').parts).removesuffix('.__init__')
        src = path.read_text(encoding='utf-8')
        self.tree, self.comments = ast.parse(src), comments_in(src)

    @cached_property
    def statements(self):
        "Those of the module, also inside of `if` and `try`"
        def inside(body):
            for n in body:
                yield n
                if isinstance(n, ast.If): yield from inside(n.body)
                if isinstance(n, ast.Try): yield from inside(n.body)
        return [*inside(self.tree.body)]

    def absolute(self, node):
        "The module that `from ... import` names"
        if not node.level: return node.module
        parts = self.name.split('.') if self.path.stem == '__init__' else self.name.split('.')[:-1]
        return '.'.join([*parts[:len(parts) - node.level + 1], *filter(None, [node.module])])

    @cached_property
    def imports(self):
        "Name here → (module, name there), or (module, None) for a module"
        found = {}
        for n in self.statements:
            if isinstance(n, ast.ImportFrom) and n.module != '__future__':
                for a in n.names: found[a.asname or a.name] = self.absolute(n), a.name
            if isinstance(n, ast.Import):
                for a in n.names:
                    name = a.asname or a.name.split('.')[0]
                    found[name] = (a.name if a.asname else name), None
        return found

    @cached_property
    def functions(self):
        return {n.name: n for n in self.statements if isinstance(n, ast.FunctionDef) and patched_class(n) is None}

    @cached_property
    def classes(self): return {n.name: n for n in self.statements if isinstance(n, ast.ClassDef)}

    @cached_property
    def data(self):
        "Name → its value, of what is assigned"
        found = {}
        for n in self.tree.body:
            if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name): found[n.target.id] = n
            if not isinstance(n, ast.Assign): continue
            for t in n.targets:
                if isinstance(t, ast.Name): found[t.id] = n.value
        return found

    def origin(self, name):
        "Where a name in this module comes from: (module, name there)"
        if name in self.imports: return self.imports[name]
        if name in self.functions or name in self.classes or name in self.data: return self.name, name
        return None


class Package:
    "All modules, and what is patched into their classes"
    def __init__(self):
        paths = [p for p in sorted(package.rglob('*.py')) if p.stem not in ('__init__', '_modidx', 'all')]
        self.modules = {m.name: m for m in map(Module, paths)}
        self.patches = {}  # (module, class) → [(module of the patch, function)]
        for m in self.modules.values():
            for n in m.statements:
                if (cls := patched_class(n)) is None: continue
                self.patches.setdefault(self.home(m, cls), []).append((m, n))

    def home(self, module, name):
        "(module, name) of the definition that `name` in `module` stands for"
        found = module.origin(name)
        while found and found[1] and found[0] != module.name and found[0] in self.modules:
            module = self.modules[found[0]]
            further = module.origin(found[1])
            if further is None or further == found: break
            found = further
        return found

    def class_of(self, module, name):
        "(module, class) that `name` in `module` stands for, or None"
        found = self.home(module, name)
        if not found or found[0] not in self.modules: return None
        m = self.modules[found[0]]
        return (m, m.classes[found[1]]) if found[1] in m.classes else None

    def members(self, module, cls):
        "(module of the source, node) of each function in a class, patched ones too"
        own = [(module, n) for n in cls.body if isinstance(n, ast.FunctionDef)]
        return own + self.patches.get((module.name, cls.name), [])

    def bases(self, module, cls):
        "(module, class) of the bases in the package, and of theirs"
        for b in cls.bases:
            if found := self.class_of(module, text_of(b)):
                yield found
                yield from self.bases(*found)


# Docstrings

def described(lines, head): return [f'{head}:', *(f'    {line}' for line in lines)] if lines else []

def argument_lines(params):
    return [f'{name}: {note}' for name,_,_,note in params if note and name != '*']

def fields_of(module, cls):
    "(name, annotation, default, comment) of the fields of a dataclass"
    fields = [n for n in cls.body if isinstance(n, ast.AnnAssign) and 'init=False' not in text_of(n.value or n.target)]
    return [(n.target.id, text_of(n.annotation), text_of(n.value) if n.value else '',
             module.comments.get(n.end_lineno, '')) for n in fields]

def parameters_of(module, node):
    "Arguments and result of a function, or arguments of what makes a class"
    if isinstance(node, ast.FunctionDef):
        params, returns = arguments_of(node, module.comments, 0)
        plain = node.args.posonlyargs + node.args.args
        if plain and plain[0].arg in ('self', 'cls'): params = params[1:]
        return params, returns
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == '__init__'), None)
    if is_dataclass(node) and not init: return fields_of(module, node), ()
    return (arguments_of(init, module.comments, 1)[0], ()) if init else ([], ())

def about(module, node):
    "The text that completes the docstring of a function or class"
    params, returns = parameters_of(module, node)
    lines = described(argument_lines(params), 'Args')
    if returns and returns[1]: lines += ['', *described([returns[1]], 'Returns')]
    return '\n'.join(lines).strip('\n')

def full_doc(module, node):
    return '\n\n'.join(filter(None, [ast.get_docstring(node) or '', about(module, node)]))


# Stubs

BUILTINS = set(dir(builtins))
KEPT = 'property staticmethod classmethod contextmanager cached_property abstractmethod overload'.split()
KINDS = {ast.List: 'list', ast.ListComp: 'list', ast.Dict: 'dict', ast.DictComp: 'dict', ast.Set: 'set',
         ast.SetComp: 'set', ast.Tuple: 'tuple', ast.JoinedStr: 'str', ast.Compare: 'bool'}

class Stub:
    "The stub of one module"
    def __init__(self, pkg, module):
        self.pkg, self.module = pkg, module
        self.extra = {}  # name here → (module, name there) of what this stub imports and the module does not

    def write(self):
        m, lines = self.module, []
        for n in m.tree.body:
            if isinstance(n, ast.ClassDef): lines += ['', *self.class_lines(n)]
            elif isinstance(n, ast.FunctionDef) and patched_class(n) is None and is_public(n.name):
                lines += ['', *self.function_lines(m, n)]
            elif isinstance(n, (ast.Assign, ast.AnnAssign)): lines += self.data_lines(n)
        names = next(n for n in m.tree.body if isinstance(n, ast.Assign) and text_of(n.targets[0]) == '__all__')
        head  = ['"""' + (ast.get_docstring(m.tree) or '').split('\n')[0] + '"""',
                 '# AUTOGENERATED by tools/refresh.py from the module: what editors and type checkers read',
                 *self.import_lines(), '', text_of(names)]
        body = '\n'.join([*head, *lines])
        m.path.with_suffix('.pyi').write_text(re.sub(r'\n{3,}', '\n\n', body).rstrip() + '\n', encoding='utf-8')

    def import_lines(self):
        own = [text_of(n) for n in self.module.statements
               if isinstance(n, (ast.Import, ast.ImportFrom)) and getattr(n, 'module', '') != '__future__']
        def line(here, there):
            module, name = there
            if name is None: return f'import {module}' + (f' as {here}' if here != module else '')
            return f'from {module} import {name}' + (f' as {here}' if here != name else '')
        return [*dict.fromkeys(own + [line(*o) for o in sorted(self.extra.items())])]

    # names

    def local(self, node, source):
        "The text of the expression `node` of the module `source`, with names that this stub has"
        if node is None: return ''
        if source is self.module: return text_of(node)
        renamed = {n.id: self.bring(n.id, source) for n in ast.walk(node) if isinstance(n, ast.Name)}
        class Rename(ast.NodeTransformer):
            def visit_Name(self, n): return ast.Name(renamed[n.id], n.ctx)
        return text_of(Rename().visit(ast.parse(text_of(node), mode='eval').body))

    def bring(self, name, source):
        "The name that `name` of the module `source` has here; it is imported if necessary"
        origin = source.origin(name)
        if origin is None: return name  # a builtin
        if (mine := self.module.origin(name) or self.extra.get(name)) == origin: return name
        here = name if mine is None else f'_{origin[0].split(".")[-1]}_{name}'
        self.extra[here] = origin
        return here

    # functions

    def default(self, node, source):
        "A default that says something: a number, a string or a name; `...` for anything else"
        simple = (ast.Constant, ast.Name, ast.Attribute, ast.Tuple, ast.UnaryOp, ast.Load, ast.USub)
        if all(isinstance(n, simple) for n in ast.walk(node)) and not re.match('_', text_of(node)):
            return self.local(node, source)
        return '...'

    def argument_texts(self, f, source):
        "The arguments of the function `f`, as source"
        a = f.args
        plain = [*a.posonlyargs, *a.args]
        def one(arg, default=None, stars=''):
            hint = self.local(arg.annotation, source) if arg is not plain[:1] else ''
            text = f'{stars}{arg.arg}' + (f': {hint}' if hint else '')
            if default is None: return text
            return f'{text}{" = " if hint else "="}{self.default(default, source)}'
        texts = [one(*o) for o in zip(plain, [None]*(len(plain) - len(a.defaults)) + a.defaults)]
        if a.posonlyargs: texts.insert(len(a.posonlyargs), '/')
        if a.vararg: texts.append(one(a.vararg, stars='*'))
        elif a.kwonlyargs: texts.append('*')
        texts += [one(*o) for o in zip(a.kwonlyargs, a.kw_defaults)]
        if a.kwarg: texts.append(one(a.kwarg, stars='**'))
        if plain and plain[0].arg in ('self', 'cls'): texts[0] = plain[0].arg
        return texts

    def function_lines(self, source, f, indent=''):
        decs = decorators(f)
        kept = [d for d in decs if d.split('(')[0] in KEPT or d.endswith(('.setter', '.deleter'))]
        if 'patch(as_prop=True)' in decs: kept.append('property')
        if 'patch(cls_method=True)' in decs: kept.append('classmethod')
        for k in kept:  # `contextmanager` must be known here
            if k in source.imports: self.bring(k, source)
        texts   = self.argument_texts(f, source)
        result  = self.local(f.returns, source) or ('None' if f.name == '__init__' else '')
        arrow   = f' -> {result}' if result else ''
        doc     = full_doc(source, f) if f.name != '__init__' else ''
        one     = f'{indent}def {f.name}({", ".join(texts)}){arrow}:'
        heading = [one] if len(one) <= 100 else [
            f'{indent}def {f.name}(', *(f'{indent}    {t},' for t in texts), f'{indent}){arrow}:']
        lines = [*(f'{indent}@{d}' for d in kept), *heading]
        if not doc: return [*lines[:-1], f'{lines[-1]} ...']
        return lines + doc_lines(doc, f'{indent}    ')

    # data

    def data_lines(self, n):
        lines = []
        if isinstance(n, ast.AnnAssign):
            return [f'{text_of(n.target)}: {text_of(n.annotation)}'] if is_public(text_of(n.target)) else []
        for t in n.targets:
            if not isinstance(t, ast.Name) or not is_public(t.id) or t.id.startswith('__'): continue
            lines.append(f'{t.id}: {self.type_of(n.value, self.module) or self.any()}')
        return lines

    def any(self):
        if self.module.origin('Any') != ('typing', 'Any'): self.extra['Any'] = 'typing', 'Any'
        return 'Any'

    def type_of(self, node, source, params=None):
        "The type of an expression, as a name in this stub; None if it is not known"
        params = params or {}
        if isinstance(node, ast.Constant): return 'None' if node.value is None else type(node.value).__name__
        if type(node) is ast.Dict and node.keys and None not in node.keys: return self.type_of_dict(node)
        if type(node) in KINDS: return KINDS[type(node)]
        if isinstance(node, ast.UnaryOp):
            return 'bool' if isinstance(node.op, ast.Not) else self.type_of(node.operand, source)
        if isinstance(node, ast.BinOp):
            kinds = {self.type_of(node.left, source, params), self.type_of(node.right, source, params)}
            return kinds.pop() if len(kinds) == 1 else None
        if isinstance(node, (ast.IfExp, ast.BoolOp)):
            parts = [node.body, node.orelse] if isinstance(node, ast.IfExp) else node.values
            kinds = [self.type_of(o, source, params) for o in parts]
            return None if None in kinds else self.union(kinds)
        if isinstance(node, ast.Name):
            if node.id in params: return params[node.id]
            found = self.pkg.home(source, node.id)
            home  = self.pkg.modules.get(found[0]) if found else None
            value = home.data.get(found[1]) if home else None
            return self.type_of(value, home) if isinstance(value, ast.expr) else None
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name): return None
        name = node.func.id
        if source.origin(name) is None:
            return name if isinstance(getattr(builtins, name, None), type) else None
        if self.pkg.class_of(source, name): return self.bring(name, source)
        module, there = self.pkg.home(source, name)
        home = self.pkg.modules.get(module)
        if home is None: return self.bring(name, source) if name[0].isupper() else None  # a class of another library
        f = home.functions.get(there)
        return self.local(f.returns, home) if f and f.returns else None

    def type_of_dict(self, node):
        keys, values = ({self.type_of(o, self.module) for o in part} for part in (node.keys, node.values))
        if len(keys) == len(values) == 1 and None not in keys | values: return f'dict[{keys.pop()}, {values.pop()}]'
        return 'dict'

    def union(self, kinds):
        "The union of the types that are known; None if there is none but `None`"
        kinds = [k for k in kinds if k is not None]
        parts = [*dict.fromkeys(p.strip() for k in kinds for p in k.split('|'))] if not any(
            '[' in k for k in kinds) else [*dict.fromkeys(kinds)]
        return '|'.join(sorted(parts, key=lambda k: k == 'None')) if parts != ['None'] else None

    # classes

    def assigned(self, cls):
        "Public attribute → types of all that is assigned to it, in the body and through `self`"
        found = {}
        def note(target, value, source, params, to_self):
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
                for t,v in zip(target.elts, value.elts): note(t, v, source, params, to_self)
                return
            if isinstance(target, ast.Tuple):
                for t in target.elts: note(t, None, source, params, to_self)
                return
            name = getattr(target, 'attr' if to_self else 'id', None)
            if not name or name.startswith('_') or to_self and text_of(target.value) != 'self': return
            if not isinstance(target, ast.Attribute if to_self else ast.Name): return
            found.setdefault(name, []).append(None if value is None else self.type_of(value, source, params))
        for n in cls.body:
            if isinstance(n, ast.Assign):
                for t in n.targets: note(t, n.value, self.module, {}, False)
        for source,f in self.pkg.members(self.module, cls):
            args   = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
            params = {a.arg: self.local(a.annotation, source) for a in args if a.annotation}
            for n in ast.walk(f):
                if isinstance(n, ast.Assign):
                    for t in n.targets: note(t, n.value, source, params, True)
                if f.name == '__init__' and text_of(n) == 'store_attr()':
                    for a in args[1:]: found.setdefault(a.arg, []).append(params.get(a.arg))
        return found

    def known_in(self, module, cls):
        "Names that a class defines by annotation or as a function"
        names = {n.name for _,n in self.pkg.members(module, cls)}
        return names | {text_of(n.target) for n in cls.body if isinstance(n, ast.AnnAssign)}

    def attribute_lines(self, cls):
        known = self.known_in(self.module, cls)
        above = set().union(*(self.known_in(*b) for b in self.pkg.bases(self.module, cls)))
        lines = []
        for n in cls.body:
            if not isinstance(n, ast.AnnAssign) or not is_public(text_of(n.target)): continue
            value = f' = {self.field_default(n.value)}' if n.value is not None and is_dataclass(cls) else ''
            lines.append(f'{text_of(n.target)}: {text_of(n.annotation)}{value}')
        for name,kinds in self.assigned(cls).items():
            if name in known or name in above: continue
            kind = self.union(kinds) or self.any()
            if is_dataclass(cls): lines += ['@property', f'def {name}(self) -> {kind}: ...']
            else: lines.append(f'{name}: {kind}')
        return lines

    def field_default(self, value):
        text = text_of(value)
        return text if text.startswith('field(') else self.default(value, self.module)

    def class_lines(self, cls):
        bases = ', '.join([*map(text_of, cls.bases), *(f'{k.arg}={text_of(k.value)}' for k in cls.keywords)])
        decs  = [d for d in decorators(cls) if d.split('(')[0] in ('dataclass', 'total_ordering')]
        inner = [*doc_lines(full_doc(self.module, cls), ''), *self.attribute_lines(cls)]
        for source,f in self.pkg.members(self.module, cls):
            if is_public(f.name): inner += ['', *self.function_lines(source, f)]
        for n in cls.body:
            if isinstance(n, ast.ClassDef) and is_public(n.name): inner += ['', *self.class_lines(n)]
        body = [f'    {line}' if line else '' for line in inner] or ['    ...']
        return [*(f'@{d}' for d in decs), f'class {cls.name}({bases}):' if bases else f'class {cls.name}:', *body]


def doc_lines(doc, indent):
    if not doc: return []
    doc   = doc.replace('\\', '\\\\').replace('"""', "'''")
    lines = doc.split('\n')
    if doc.endswith('"'): lines[-1] += ' '
    if len(lines) == 1: return [f'{indent}"""{doc}{" " if doc.endswith(chr(34)) else ""}"""']
    return [f'{indent}"""{lines[0]}', *(f'{indent}{line}'.rstrip() for line in lines[1:]), f'{indent}"""']


# What `help` adds

def long_signature(params):
    "Does it need several lines, or names for its defaults?"
    shown = ', '.join(f'{n}: {a} = {d}' for n,a,d,_ in params)
    return len(shown) > 84 or any(re.fullmatch(r'[A-Za-z_][\w.]*', d) and d not in ('None', 'True', 'False')
                                  for _,_,d,_ in params)

def docs_of(pkg, module):
    "Texts by name in the module, and names of long signatures"
    docs, long = {}, []
    def add(name, node, source=module):
        if isinstance(node, ast.ClassDef) or '__init__' not in name:
            if text := about(source, node): docs[name] = text
        if long_signature(parameters_of(source, node)[0]):
            long.append(f'{name}.__init__' if isinstance(node, ast.ClassDef) else name)
    for n in module.statements:
        cls = patched_class(n)
        if isinstance(n, ast.FunctionDef) and is_public(n.name): add(f'{cls}.{n.name}' if cls else n.name, n)
        if not isinstance(n, ast.ClassDef): continue
        if has_own_init(n): add(n.name, n)
        for o in n.body:
            if isinstance(o, ast.FunctionDef) and is_public(o.name) and o.name != '__init__':
                add(f'{n.name}.{o.name}', o)
    return docs, long

def has_own_init(cls):
    return is_dataclass(cls) or any(isinstance(n, ast.FunctionDef) and n.name == '__init__' for n in cls.body)


def write_package_stub():
    "`__init__.pyi`: the names that the package offers"
    m = Module(package/'__init__.py')
    homes = ast.literal_eval(m.data['_homes'])
    lines = ['"""' + ast.get_docstring(m.tree).split('\n')[0] + '"""',
             '# AUTOGENERATED by tools/refresh.py from `__init__.py`: what editors and type checkers read']
    lines += [f'from .{home} import {", ".join(f"{n} as {n}" for n in names.split())}' for home,names in homes.items()]
    lines += ['', '__version__: str', f'__all__ = {sorted(n for names in homes.values() for n in names.split())!r}']
    (package/'__init__.pyi').write_text('\n'.join(lines) + '\n', encoding='utf-8')

def write_stubs():
    "Write all stubs and `docs.json`"
    for old in package.rglob('*.pyi'): old.unlink()
    pkg = Package()
    for m in pkg.modules.values(): Stub(pkg, m).write()
    write_package_stub()
    docs = {m.name.removeprefix('fasterai_clone.'): docs_of(pkg, m) for m in pkg.modules.values()}
    (package/'docs.json').write_text(json.dumps({k: v for k,v in docs.items() if any(v)}, ensure_ascii=False, indent=0)
                                     + '\n', encoding='utf-8')

if __name__ == '__main__': write_stubs()
