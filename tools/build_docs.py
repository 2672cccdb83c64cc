"""Build the documentation site from the notebooks: `python tools/build_docs.py [--dest _site]`.

No notebook is run and nothing is loaded from anywhere: pages are the saved notebooks, with an entry (signature, table
of arguments, link to the source) in the place of every exported definition. A broken link, a warning of Sphinx's or
anything from another host fails the build."""
import argparse, ast, builtins, io, json, os, re, shutil, sys, tempfile, tokenize
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat

from navigation import FOLDERS, GROUPS, INTERNALS, listing, place

root    = Path(__file__).resolve().parent.parent
package = 'fasterai_clone'
github  = 'https://github.com/fasterai-clone/fasterai_clone/blob/main'
pages   = 'https://fasterai-clone.github.io/fasterai_clone'

# Pages that no notebook is behind
WRITTEN = ['api', 'changelog', 'contributing', *map(listing, FOLDERS)]

# What the modules define, read and not imported

@dataclass
class Entry:
    "A public name: what its entry in the reference says"
    module: str
    name: str            # dotted inside of the module
    kind: str            # of Sphinx's: function, class, method, property, data
    sig: str = ''        # `(a, b=1)`, with what it returns
    doc: str = ''
    params: list = field(default_factory=list)  # (name, annotation, default, comment) each
    returns: tuple = ()  # (annotation, comment)
    flags: tuple = ()    # `classmethod`, `staticmethod`
    lines: tuple = ()    # first and last, in the module's file
    inside: list = field(default_factory=list)  # entries of the methods in the body of a class
    init: bool = True    # is it known what a class is made with?

    @property
    def full(self): return f'{self.module}.{self.name}'
    @property
    def source(self): return f'{github}/{self.module.replace(".", "/")}.py#L{self.lines[0]}-L{self.lines[1]}'

def _comments(src):
    "Line → the comment on it, or alone above it"
    beside, above = {}, {}
    for t in tokenize.generate_tokens(io.StringIO(src).readline):
        if t.type != tokenize.COMMENT or t.string.startswith('# %%'): continue  # that is where a cell begins
        place = above if t.line.lstrip().startswith('#') else beside
        place[t.start[0]] = t.string.lstrip('# ').strip()
    for line in sorted(above):
        if line + 1 in above: above[line + 1] = f'{above[line]} {above[line + 1]}'
        else: beside.setdefault(line + 1, above[line])
    return beside

def _text(node): return '' if node is None else ast.unparse(node)

def _args(f, comments, skip):
    """(name, annotation, default, comment) of each argument but the first `skip`, and the annotation and comment of the
    result"""
    a = f.args
    plain, back = [*a.posonlyargs, *a.args], f.returns.end_lineno if f.returns else None
    given = [(o.arg, o, d) for o,d in zip(plain, [None]*(len(plain) - len(a.defaults)) + a.defaults)][skip:]
    if a.vararg: given.append((f'*{a.vararg.arg}', a.vararg, None))
    elif a.kwonlyargs: given.append(('*', None, None))
    given += [(o.arg, o, d) for o,d in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg: given.append((f'**{a.kwarg.arg}', a.kwarg, None))
    ends, params = {}, []
    for name,o,d in given:
        if o: ends[(d or o).end_lineno] = name  # a comment belongs to the last argument of its line
    for name,o,d in given:
        end  = (d or o).end_lineno if o else None
        note = comments.get(end, '') if o and ends[end] == name and end != back else ''
        params.append((name, _text(o.annotation) if o else '', _text(d), note))
    return params, (_text(f.returns), comments.get(back, '')) if f.returns else ()

def _signature(params, returns=()):
    arrow = f' -> {returns[0]}' if returns and returns[0] else ''
    return '(' + ', '.join(n if d == '' else f'{n}={d}' for n,_,d,_ in params) + ')' + arrow

def _lines(node): return min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.end_lineno

def _decorators(node): return [_text(d) for d in node.decorator_list]

def _of_function(module, node, comments, cls=None):
    "The entry of a function, or of a method of `cls`"
    decs  = _decorators(node)
    prop  = 'property' in decs or 'patch(as_prop=True)' in decs
    flags = tuple(k for k in ('classmethod', 'staticmethod') if k in decs or 'patch(cls_method=True)' in decs and k
                  == 'classmethod')
    params, returns = _args(node, comments, int(bool(cls) and 'staticmethod' not in flags))
    kind  = 'property' if prop else 'method' if cls else 'function'
    return Entry(module, f'{cls}.{node.name}' if cls else node.name, kind, '' if prop else _signature(params, returns),
                 ast.get_docstring(node) or '', [] if prop else params, returns, flags, _lines(node))

def _is_shown(name): return not name.startswith(('_', 'before_', 'after_')) or name == '__call__'

def _of_class(module, node, comments):
    "The entry of a class, with those of the public methods in its body"
    e = Entry(module, node.name, 'class', doc=ast.get_docstring(node) or '', lines=_lines(node))
    init = next((o for o in node.body if isinstance(o, ast.FunctionDef) and o.name == '__init__'), None)
    if any(d.startswith('dataclass') for d in _decorators(node)):
        fields = [o for o in node.body if isinstance(o, ast.AnnAssign)]
        e.params = [(o.target.id, _text(o.annotation),
                     re.sub(r'^field\(default_factory=(\w+)\)$', r'\1()', _text(o.value)),
                     comments.get(o.end_lineno, ''))
                    for o in fields if 'init=False' not in _text(o.value)]
    elif init: e.params = _args(init, comments, 1)[0]
    else:
        e.init = False
        if base := next((_text(b) for b in node.bases if not hasattr(builtins, _text(b))), ''):
            e.doc += f'\n\nTakes the arguments of `{base}`.'
    e.sig = _signature(e.params) if e.init else ''
    for o in node.body:
        if not isinstance(o, ast.FunctionDef) or not _is_shown(o.name): continue
        if o.name != '__call__' or ast.get_docstring(o):
            e.inside.append(_of_function(module, o, comments, node.name))
    return e

def _patched(node):
    "The class that a function is patched into, if it is"
    if not isinstance(node, ast.FunctionDef) or not any(d.split('(')[0] == 'patch' for d in _decorators(node)):
        return None
    return _text(node.args.args[0].annotation)

def _names(node):
    "The names in a module that the statement `node` gives a meaning"
    if cls := _patched(node): return [f'{cls}.{node.name}'] if _is_shown(node.name) else []
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)): return [node.name]
    if isinstance(node, ast.Assign):
        dotted = re.compile(r'[A-Za-z]\w*\.[a-z]\w*')  # `Class.name = property(...)`
        return [t.id if isinstance(t, ast.Name) else _text(t)
                for t in node.targets if isinstance(t, ast.Name) or dotted.fullmatch(_text(t))]
    return []

def _entry(module, name, node, comments):
    cls = _patched(node)
    if isinstance(node, ast.ClassDef): return _of_class(module, node, comments)
    if isinstance(node, ast.FunctionDef): return _of_function(module, node, comments, cls)
    value, lines = _text(node.value), (node.lineno, node.end_lineno)
    if isinstance(node.value, ast.Call) and _text(node.value.func) == 'property':
        return Entry(module, name, 'property',
                     doc=next((k.value.value for k in node.value.keywords if k.arg == 'doc'), ''), lines=lines)
    if len(value) <= 100: shown = value
    else: shown = value[:value.find('(') + 1] + '…)' if isinstance(node.value, ast.Call) else value[:60] + ' …'
    return Entry(module, name, 'attribute' if '.' in name else 'data',
                 doc=comments.get(node.end_lineno, '') or f'`{shown}`', lines=lines)

@cache
def entries():
    "Full name → entry of every public name, of modules that are written from notebooks"
    found = {}
    for path in sorted((root/package).rglob('*.py')):
        src = path.read_text(encoding='utf-8')
        if 'AUTOGENERATED' not in src[:1000]: continue
        module, tree, comments = '.'.join(path.relative_to(root).with_suffix('').parts), ast.parse(src), _comments(src)
        public = next(ast.literal_eval(n.value) for n in tree.body
                      if isinstance(n, ast.Assign) and _text(n.targets[0]) == '__all__')
        for node in tree.body:
            for name in _names(node):
                if name not in public and ('.' not in name or name.startswith('_')): continue
                e = _entry(module, name, node, comments)
                if e.kind == 'property' and not e.doc: continue
                found[e.full] = e
    return found

def flat():
    "All entries, those of methods in the body of a class too"
    return [o for e in entries().values() for o in (e, *e.inside)]


# Notebooks and their pages

@dataclass
class Page:
    "A notebook, and where it goes"
    path: Path
    doc: str    # name of the page
    group: str  # in the sidebar
    module: str = ''
    title: str = ''
    blurb: str = ''  # what the page is for, in a sentence
    at: int = 0      # in its group

    @property
    def is_tutorial(self): return self.path.parent.name == 'tutorials'

def _directives(src): return re.findall(r'^#\|\s*(.+?)\s*$', src, re.M)

@cache
def site_pages():
    "Every notebook's page, in reading order"
    found = []
    for path in sorted((root/'nbs').rglob('*.ipynb')):
        if any(p.startswith('.') for p in path.relative_to(root).parts): continue
        nb  = nbformat.read(path, as_version=4)
        exp = next((m[1] for c in nb.cells if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', c.source, re.M))), '')
        doc = exp or re.sub(r'^\d+_', '', path.stem)
        title, blurb = re.match(r'# (.+?)\n+> (.+)', nb.cells[0].source).groups()
        group, at = place(doc, exp)
        if path.parent.name == 'tutorials': doc = f'tutorials/{doc}'
        if doc == 'index': group = ''
        found.append(Page(path, doc, group, exp, title, blurb, at))
    return sorted(found, key=lambda p: ([*GROUPS, INTERNALS, ''].index(p.group), p.at))

def _relative(doc, base): return os.path.relpath(doc, os.path.dirname(base) or '.')

class BrokenLink(ValueError): "A link that leads nowhere"

def _local_link(link, page, images):
    "What `link`, as it is written in the notebook of `page`, is on the site"
    target, _, anchor = link.partition('#')
    anchor = f'#{anchor}' if anchor else ''
    by_path = {p.path.resolve(): p.doc + '.ipynb' for p in site_pages()}
    by_path |= {root/'CHANGELOG.md': 'changelog.md', root/'CONTRIBUTING.md': 'contributing.md',
                root/'README.md': 'index.ipynb'}
    if target.startswith(pages):
        doc = re.sub(r'\.html(\.md)?$', '', target.removeprefix(pages).strip('/')) or 'index'
        known = {re.sub(r'\.(ipynb|md)$', '', o): o for o in by_path.values()} | {o: f'{o}.md' for o in WRITTEN}
        if doc not in known: raise BrokenLink(f'{page.path.name}: there is no page {link}')
        return _relative(known[doc], page.doc) + anchor
    if not target or re.match(r'[a-z]+:', target) and not target.startswith(github): return link
    path = (root/unquote(target.removeprefix(github).strip('/')) if target.startswith(github)
            else page.path.parent/unquote(target)).resolve()
    if path in by_path: return _relative(by_path[path], page.doc) + anchor
    if not path.exists(): raise BrokenLink(f'{page.path.name}: there is no {link}')
    if path.suffix in ('.png', '.svg', '.jpg', '.gif'):
        images.add(path)
        return _relative(f'images/{path.name}', page.doc)
    return f'{github}/{path.relative_to(root)}{anchor}'

def link_locally(text, page, images):
    "Markdown with its links to notebooks, files and the site turned into those to pages"
    parts = re.split(r'(^```.*?^```|``.+?``|`[^`\n]+`)', text, flags=re.M | re.S)  # code is left alone
    parts[::2] = [re.sub(r'\]\(([^)\s]+)\)', lambda m: f']({_local_link(m[1], page, images)})', p) for p in parts[::2]]
    return ''.join(parts)


# Cells

def _cell_text(s): return s.replace('|', r'\|').replace('\n', ' ')

def _code(s): return f'`{_cell_text(s)}`' if s else ''

def _type(s): return _code(s) if '[' in s else ' \\| '.join(_code(t) for t in s.split(' | '))  # each with its own link

def _table(e):
    "The arguments of `e` as a markdown table, and what it gives back, if there is more to say than the type"
    named = [p for p in e.params if p[0] != '*']
    lines = [f'| {_code(n)} | {_type(t)} | {_code(d)} | {_cell_text(c)} |' for n,t,d,c in named]
    if e.returns and e.returns[1]: lines.append(f'| *returns* | {_type(e.returns[0])} | | {_cell_text(e.returns[1])} |')
    if not any(t or c for _,t,_,c in named) and not (e.returns and e.returns[1]): return ''
    return '\n'.join(['| | Type | Default | |', '|---|---|---|---|', *lines])

def _show(e, depth=3):
    "The entry of `e` as a directive of Sphinx's"
    fence   = '`' * (depth + bool(e.inside))
    options = [f':module: {e.module}', *(f':{k}:' for k in e.flags)]
    if e.kind == 'property' and e.returns: options.append(f':type: {e.returns[0]}')
    body    = ['\n'.join(options), e.doc, _table(e), *(_show(o) for o in e.inside)]
    return f'{fence}{{py:{e.kind}}} {e.name}{e.sig}\n' + '\n\n'.join(b for b in body if b) + f'\n{fence}'

def _only_imports(src): return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(src).body)

def _bare(src): return re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip('\n')

def _fold(sources, show='Source'):
    "A code cell that is closed at first"
    meta = dict(tags=['hide-input'], mystnb=dict(code_prompt_show=show, code_prompt_hide=show))
    return nbformat.v4.new_code_cell('\n\n'.join(sources), metadata=meta, id='x')

def _plain(md): return re.sub(r'\s+', ' ', re.sub(r'[`*_$>#|]|\]\([^)]*\)|\[', '', md)).strip()

def _breaks(html):
    """Where cells of tables may break: at the dots and underscores of long names, not inside of `0.1–0.2`, `8 → 4`,
    `2 of 4` and `Layer 3`"""
    html = re.sub(r'(?<=\d)–(?=\d)', '\u2060–\u2060', html)
    html = re.sub(r'(?<=\d) (→|of) (?=\d)', '\u00a0\\1\u00a0', html).replace('<td>Layer ', '<td>Layer\u00a0')
    return re.sub(r'(?<=<t[dh]>)[\w.]{12,}(?=</t[dh]>)', lambda m: re.sub('[._]', r'\g<0><wbr>', m[0]), html)

def _outputs(cell, page, images, before):
    """Outputs with links that lead somewhere, tables without a style of their own and words for those who do not see
    pictures"""
    for o in cell.outputs:
        data = o.get('data', {})
        if 'text/markdown' in data:
            data['text/markdown'] = link_locally(''.join(data['text/markdown']), page, images)
            for k in ('text/html', 'text/plain'): data.pop(k, None)
        if 'text/html' in data:
            data['text/html'] = re.sub(r'<style.*?</style>|\s(?:border|style)="[^"]*"', '',
                                       ''.join(data['text/html']), flags=re.S)
            data['text/html'] = re.sub(r'`([^`<]+)`', r'<samp>\1</samp>', _breaks(data['text/html']))
            if 'text-align' not in data['text/html']: data['text/html'] = f'<div class="wide">{data["text/html"]}</div>'
    if any('image/png' in o.get('data', {}) for o in cell.outputs):
        words = _plain(before.strip().split('\n\n')[-1])
        cell.metadata['mystnb'] = dict(image=dict(alt=words if len(words) <= 160
                                                  else words[:160].rsplit(' ', 1)[0] + ' …'))

COLAB = 'https://colab.research.google.com/github/' + github.removeprefix('https://github.com/')
install = f'pip install git+{github.removesuffix("/blob/main")}'

def _header(page):
    "Below the title: what to import, where to run it, and the notebook"
    path  = page.path.relative_to(root)
    links = [f'[Notebook]({github}/{path})']
    if page.module: links.insert(0, f'`from {package}.{page.module} import *`')
    if not page.is_tutorial: return '{.about}\n' + ' · '.join(links)
    links.insert(0, f'[Open in Colab]({COLAB}/{path})')
    return '{.about .run}\n' + ' · '.join(links) + f' · In Colab, the first cell installs the package: `!{install}`'

def transform(page, images):
    "The cells of `page`'s notebook as those of a page of the site"
    module, cells, code, before = f'{package}.{page.module}', [], [], ''
    def close():
        "What was exported since the last cell that is shown: entries, then the source"
        found = [entries()[f'{module}.{n}'] for src in code for node in ast.parse(src).body
                 for n in _names(node) if f'{module}.{n}' in entries()]
        if found: cells.append(nbformat.v4.new_markdown_cell('\n\n'.join(_show(e) for e in found)))
        if code:  cells.append(_fold(code))
        code.clear()
    for cell in nbformat.read(page.path, as_version=4).cells:
        if cell.cell_type == 'markdown':
            close()
            before = cell.source
            cells.append(nbformat.v4.new_markdown_cell(link_locally(cell.source, page, images)))
            continue
        what, src = _directives(cell.source), _bare(cell.source)
        if 'hide' in what or any(w.startswith('default_exp') for w in what): continue
        if any(re.match(r'exporti?s?\b', w) for w in what):
            if src.strip() and not _only_imports(src): code.append(src)
            if not cell.outputs: continue
            src = ''
        close()
        cell.source, cell.metadata = src, nbformat.NotebookNode(tags=[])
        _outputs(cell, page, images, before)
        if 'code-fold: true' in what: cell.metadata.update(_fold([]).metadata)
        if page.module and src and _only_imports(src):
            cell.metadata.update(_fold([], 'Imports of the examples').metadata)
        if 'echo: false' in what or not src: cell.metadata['tags'] = ['remove-input']
        cells.append(cell)
    close()
    first = cells[0].source.split('\n')
    if page.doc != 'index':
        cut = next((i for i,l in enumerate(first) if i and not l.startswith('>') and first[i-1].startswith('>')),
                   len(first))
        cells[0].source = '\n'.join([*first[:cut], '', _header(page), '', *first[cut:]])
    return cells


# The site

def _toctree(caption, docs):
    return f':::{{toctree}}\n:hidden:\n:caption: {caption}\n\n' + '\n'.join(docs) + '\n:::'

def _trees():
    "The sidebar"
    docs = {g: [p.doc for p in site_pages() if p.group == g] for g in GROUPS}
    docs['Reference'] = ['api', *docs['Reference'], 'changelog']
    docs[INTERNALS]   = [*map(listing, FOLDERS), 'contributing']
    return '\n\n'.join(_toctree(g, d) for g,d in docs.items())

def _listing(folder):
    "The page that lists the modules of a folder which only those who change the library need"
    title, blurb = FOLDERS[folder]
    inside = [p for p in site_pages() if p.group == INTERNALS and p.module.split('.')[0] == folder]
    rows   = ''.join(f'- [{p.title}]({p.doc}.ipynb): {p.blurb[0].lower() + p.blurb[1:]}\n' for p in inside)
    about  = f'The modules of `{package}.{folder}` that the library itself uses, in the order in which they import.'
    tree   = ':::{toctree}\n:hidden:\n\n' + '\n'.join(p.doc for p in inside) + '\n:::'
    return f'# {title}\n\n> {blurb}\n\n{about}\n\n{rows}\n{tree}\n'

def _api():
    "Every public name, in the order of the alphabet"
    heads, rows = [], []
    for e in sorted(flat(), key=lambda e: (e.name.lower(), e.module)):
        if e.name[0].upper() not in heads:
            heads.append(e.name[0].upper())
            rows.append(f'\n## {heads[-1]}\n')
        rows.append(f'`{e.name}`\n: {e.doc.splitlines()[0] if e.doc else "see `" + e.name.rpartition(".")[0] + "`"}\n')
    return '# All names\n\n> Every public name of the library, with a line on what it is\n\n' + '\n'.join(rows)

def _as_markdown(cells):
    "The page as plain markdown, for those who read it with other tools"
    out = []
    for c in cells:
        if c.cell_type == 'markdown': out.append(c.source)
        else:
            if 'remove-input' not in c.metadata.get('tags', []): out.append(f'```python\n{c.source}\n```')
            for o in c.outputs:
                data = o.get('data', {})
                text = o.get('text') or data.get('text/markdown') or data.get('text/plain', '')
                if text and 'text/markdown' in data: out.append(text)
                elif text.strip(): out.append(f'```text\n{text.rstrip()}\n```')
    return re.sub(r'\.ipynb([)#])', r'.html\1', '\n\n'.join(out)) + '\n'

def write_sources(src):
    "Sphinx's sources, into the folder `src`"
    images, broken = set(), []
    for page in site_pages():
        try: cells = transform(page, images)
        except BrokenLink as e:
            broken.append(str(e))
            continue
        if page.doc == 'index': cells = _landing(cells, images)
        for i,c in enumerate(cells): c.id = f'c{i}'
        nb = nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name='python3', display_name='python3',
                                                                                 language='python'),
                                                                 language_info=dict(name='python')))
        for dest,text in ((src/f'{page.doc}.ipynb', nbformat.writes(nb)),
                          (src/'_extra'/f'{page.doc}.html.md', _as_markdown(cells))):
            dest.parent.mkdir(parents=True, exist_ok=True)
            dest.write_text(text, encoding='utf-8')
    if broken: raise SystemExit('\n'.join(broken))
    for p in images:
        (src/'images').mkdir(exist_ok=True)
        shutil.copy(p, src/'images'/p.name)
    for name in ('changelog', 'contributing'):
        path = root/f'{name.upper()}.md'
        (src/f'{name}.md').write_text(link_locally(path.read_text(encoding='utf-8'), Page(path, name, ''), images),
                                      encoding='utf-8')
    (src/'api.md').write_text(_api(), encoding='utf-8')
    for folder in FOLDERS: (src/f'{listing(folder)}.md').write_text(_listing(folder), encoding='utf-8')
    (src/'names.json').write_text(json.dumps({e.full: (e.name, e.source) for e in flat()}), encoding='utf-8')

def _landing(cells, images):
    "The first page: claim, measured table, benefits, a snippet and links, and the sidebar"
    index = next(p for p in site_pages() if p.doc == 'index')
    table = next(c for c in cells if any('text/markdown' in o.get('data', {}) for o in c.get('outputs', ())))
    hero  = (root/'docs'/'landing.md').read_text(encoding='utf-8')
    above, below = link_locally(hero, index, images).split('TABLE')
    return [nbformat.v4.new_markdown_cell(above.strip()), table,
            nbformat.v4.new_markdown_cell(below.strip() + '\n\n' + _trees())]

def build(dest):
    "Write the site to the folder `dest`"
    from sphinx.cmd.build import main as sphinx_build
    if dest.exists() and any(dest.iterdir()) and not (dest/'searchindex.js').exists():
        raise SystemExit(f'{dest} is not empty and no earlier site: name another folder')
    with tempfile.TemporaryDirectory() as tmp:
        src, out = Path(tmp)/'src', Path(tmp)/'out'
        src.mkdir()
        write_sources(src)
        failed = sphinx_build(['-W', '--keep-going', '-q', '-b', 'html', '-c', str(root/'docs'), '-d',
                               f'{tmp}/doctrees', str(src), str(out)])
        if failed: return failed
        shutil.rmtree(out/'_sources', ignore_errors=True)
        wrong = list(problems(out))
        for p in wrong: print(p, file=sys.stderr)
        if wrong: return 1
        if dest.exists(): shutil.rmtree(dest)
        shutil.copytree(out, dest)
    return 0


# Is everything there that the pages ask for?

class _Links(HTMLParser):
    "Ids, links, and what is loaded"
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads = [], [], []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if a.get('id'): self.ids.append(a['id'])
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        if tag == 'link' and a.get('href') and a.get('rel') != 'canonical': self.loads.append(a['href'])
        if a.get('src'): self.loads.append(a['src'])

def problems(site):
    """Links and anchors that lead nowhere, ids given twice, and whatever comes from another host, in the pages of the
    folder `site`"""
    site = Path(site).resolve()
    read = {p: _Links(p.read_text(encoding='utf-8')) for p in sorted(site.rglob('*.html'))
            if '_static' not in p.relative_to(site).parts}
    for page,got in read.items():
        where = page.relative_to(site)
        for o in sorted({o for o in got.ids if got.ids.count(o) > 1}): yield f"{where}: the id {o} is given twice"
        for link in got.loads + got.links:
            url = urlsplit(link)
            if url.scheme == 'data': continue
            if url.scheme or url.netloc:
                if link in got.loads: yield f'{where}: {link} comes from another host'
                continue
            target = (page.parent/unquote(url.path)).resolve() if url.path else page
            if target.is_dir(): target /= 'index.html'
            if not target.is_file(): yield f'{where}: there is no {link}'
            elif not url.fragment or target not in read or link in got.loads: continue
            elif unquote(url.fragment) not in read[target].ids:
                yield f'{where}: there is no {link}'
    for css in site.rglob('*.css'):
        for url in re.findall(r'url\(["\']?(?!data:|#)([^)"\']+)', css.read_text(encoding='utf-8')):
            if urlsplit(url).netloc or not (css.parent/urlsplit(url).path).is_file():
                yield f'{css.relative_to(site)}: there is no {url} on this host'


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--dest', type=Path, default=root/'_site', help='where the site goes')
    sys.exit(build(parser.parse_args(args).dest))

if __name__ == '__main__': main()
