"Sphinx's settings, for `python tools/build_docs.py`"
import html, json, re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

root = Path(__file__).resolve().parent.parent
blob = 'https://github.com/fasterai-clone/fasterai_clone/blob/main'

project          = 'fasterai_clone'
author           = 'The fasterai_clone authors'
copyright        = author
version = release = re.search(r'__version__ = "(.+?)"', (root/project/'__init__.py').read_text(encoding='utf-8'))[1]
extensions       = ['myst_nb', 'sphinx_copybutton', 'sphinx.ext.mathjax', 'sphinx-mathjax-offline',
                    'sphinx.ext.linkcode']
exclude_patterns = ['_extra']

nb_execution_mode         = 'off'
nb_render_markdown_format = 'myst'
myst_enable_extensions    = ['attrs_block', 'attrs_inline', 'colon_fence', 'deflist', 'dollarmath']
myst_heading_anchors      = 4
smartquotes_action        = 'qe'  # `--images` is no dash

html_theme         = 'furo'
html_title         = f'fasterai_clone {version}'
html_static_path   = ['_static']
html_css_files     = ['custom.css']
html_copy_source   = html_show_sourcelink = False
html_show_sphinx   = False
html_domain_indices = html_use_index = False
html_favicon       = '_static/logo.svg'
html_logo          = '_static/logo.svg'
html_theme_options = dict(top_of_page_buttons=[], navigation_with_keys=True,
                          footer_icons=[dict(name='GitHub', url='https://github.com/fasterai-clone/fasterai_clone',
                                             html='GitHub', **{'class': ''})])
copybutton_selector = '.cell_input pre, .highlight-python pre, .highlight-bash pre'
add_module_names    = False
toc_object_entries_show_parents = 'hide'
python_display_short_literal_types   = True


_known = {}  # full name → (name inside of its module, address of its source); filled by `setup`

def linkcode_resolve(domain, info): return _known[f'{info["module"]}.{info["fullname"]}'][1]


class NameAnchors(SphinxTransform):
    "nbdev's links end in names of lower case: they shall hold"
    default_priority = 800

    def apply(self, **kwargs):
        for sig in self.document.findall(addnodes.desc_signature):
            anchor = sig['fullname'].lower()
            if anchor not in self.document.ids:
                self.document.ids[anchor] = sig
                sig['ids'].append(anchor)


class LinkNames(SphinxPostTransform):
    "Names in code type lead to their entries, paths of tests and notebooks to the files"
    default_priority = 5  # before other references are resolved

    def run(self, **kwargs):
        objects = self.env.get_domain('py').objects
        short   = {name: full for full,(name,_) in _known.items() if full in objects}
        for literal in list(self.document.findall(nodes.literal)):
            text = literal.astext()
            name = re.fullmatch(r'([A-Za-z_][\w.]*)(\(.*\))?', text, re.S)  # a call of it as well
            full = name and (name[1] if name[1] in objects else short.get(name[1]))
            if self._closed(literal): continue
            if full:
                to  = objects[full]
                ref = make_refnode(self.app.builder, self.env.docname, to.docname, to.node_id, literal.deepcopy())
            elif self._is_file(text):
                ref = nodes.reference('', '', literal.deepcopy(), refuri=f'{blob}/{text.split("::")[0]}')
            else: continue
            literal.replace_self(ref)

    def _closed(self, node):
        "Links, headings and the names of arguments stay what they are"
        while (node := node.parent) is not None:
            if isinstance(node, (nodes.reference, nodes.title, addnodes.pending_xref)): return True
            if isinstance(node, nodes.entry) and node.parent.index(node) == 0 and self._in_entry(node): return True
        return False

    def _in_entry(self, node):
        while (node := node.parent) is not None:
            if isinstance(node, addnodes.desc_content): return True
        return False

    def _is_file(self, text):
        m = re.fullmatch(r'((?:tests|benchmarks|tools|nbs)/[\w./-]*\w)(::\w+)?', text)
        return m and (root/m[1]).is_file()


def link_code(app, pagename, templatename, context, doctree):
    "Names in blocks of code lead to their entries, if they can be taken for nothing else"
    objects = app.env.get_domain('py').objects
    body    = context.get('body') or ''
    defined = set(re.findall(r'<span class="k">(?:def|class)</span><span class="w"> </span><span '
                             r'class="n[cf]">(\w+)</span>', body))
    to      = {name: objects[full] for full,(name,_) in _known.items()
               if full in objects and re.search('[A-Z]|._', name) and name not in defined}
    def link(m):
        if m[2] not in to: return m[0]
        page = app.builder.get_relative_uri(pagename, to[m[2]].docname)
        return f'<a class="in-code" href="{page}#{to[m[2]].node_id}">{m[1]}</a>'
    def breaks(m):
        return re.sub(r'(?<=<span class="pre">)[^<]+', lambda w: re.sub(r'(?<=\w)(::|[_(])(?=\w)',
                                                                        r'\1<wbr>', w[0]), m[0])
    if doctree is not None:
        body = re.sub(r'<td.*?</td>', breaks, body, flags=re.S)  # long names in tables break between words
        context['body'] = re.sub(r'(<span class="n[cfn]?">(\w+)</span>)(?!<span class="o">=</span>)', link, body)


def fit_code(app, pagename, templatename, context, doctree):
    """Every line of code and of output is an element of its own: a long one goes on below, indented. A block knows its
    longest line, and output gets smaller before it breaks"""
    def line(text):
        plain  = html.unescape(re.sub(r'<[^>]*>', '', text))
        indent = len(plain) - len(plain.lstrip(' '))
        style  = f' style="--indent: {indent}"' if indent and plain.strip() else ''
        return f'<span class="line"{style}>{text}\n</span>', len(plain)
    def block(m):
        lines, widths = zip(*map(line, m[1].removesuffix('\n').split('\n')))
        return f'<pre style="--columns: {max(widths)}">{"".join(lines)}</pre>'
    if doctree is not None:
        context['body'] = re.sub(r'(?<=<div class="highlight">)<pre>(?:<span></span>)?(.*?)</pre>', block,
                                 context['body'], flags=re.S)

def setup(app):
    _known.update(json.loads((Path(app.srcdir)/'names.json').read_text(encoding='utf-8')))
    app.config.html_extra_path = [str(Path(app.srcdir)/'_extra')]
    app.add_transform(NameAnchors)
    app.add_post_transform(LinkNames)
    app.connect('html-page-context', link_code)
    app.connect('html-page-context', fit_code, priority=600)
