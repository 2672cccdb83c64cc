"Sphinx's settings, for `python tools/build_docs.py`"
import json, re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

root = Path(__file__).resolve().parent.parent
blob = 'https://github.com/fasterai-clone/fasterai_clone/blob/main'

project          = 'fasterai_clone'
author           = 'The fasterai_clone authors'
copyright        = author
version = release = re.search(r'__version__ = "(.+?)"', (root/project/'__init__.py').read_text(encoding='utf-8'))[1]
extensions       = ['myst_nb', 'sphinx_copybutton', 'sphinx.ext.mathjax', 'sphinx-mathjax-offline', 'sphinx.ext.linkcode']
exclude_patterns = ['_extra']
nitpicky         = False

nb_execution_mode         = 'off'
nb_render_markdown_format = 'myst'
myst_enable_extensions    = ['attrs_block', 'attrs_inline', 'colon_fence', 'deflist', 'dollarmath']
myst_heading_anchors      = 4

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
                          footer_icons=[dict(name='GitHub', url='https://github.com/fasterai-clone/fasterai_clone', html='GitHub', **{'class': ''})])
copybutton_selector = '.cell_input pre, .highlight-python pre, .highlight-bash pre'
add_module_names    = False
toc_object_entries_show_parents = 'hide'
python_display_short_literal_types   = True


def linkcode_resolve(domain, info): return names().get(f'{info["module"]}.{info["fullname"]}')

_names = {}
def names():
    "Full name → address of its source"
    return _names


class LinkNames(SphinxPostTransform):
    "Names in code type lead to their entries, paths of tests and notebooks to the files"
    default_priority = 5

    def run(self, **kwargs):
        domain = self.env.domains.python_domain
        for literal in list(self.document.findall(nodes.literal)):
            if self._closed(literal): continue
            text = literal.astext()
            if found := self._entry(domain, text): ref = make_refnode(self.app.builder, self.env.docname, *found, literal.deepcopy())
            elif path := self._file(text): ref = nodes.reference('', '', literal.deepcopy(), refuri=path, internal=False)
            else: continue
            literal.replace_self(ref)

    def _closed(self, node):
        "Links and headings stay what they are"
        while (node := node.parent) is not None:
            if isinstance(node, (nodes.reference, nodes.title, addnodes.pending_xref)): return True
        return False

    def _entry(self, domain, text):
        m = re.fullmatch(r'([A-Za-z_][\w.]*)(\(.*\))?', text, re.S)
        full = m and self.short().get(m[1])
        if not full or full not in domain.objects: return None
        o = domain.objects[full]
        return o.docname, o.node_id

    def _file(self, text):
        m = re.fullmatch(r'((?:tests|benchmarks|tools|nbs)/[\w./-]+)(::\w+)?', text)
        if not m or not (root/m[1]).exists(): return None
        return f'{blob}/{m[1]}'.rstrip('/')

    def short(self):
        "Name without its module → full name"
        if not hasattr(self.env, '_short_names'):
            self.env._short_names = {n: full for full in names() for n in (full, _inside(full))}
        return self.env._short_names

def _inside(full):
    "The part of a full name that follows the module"
    modules = {n.rsplit('.', 1)[0] for n in names()}
    parts = full.split('.')
    k = next((k for k in range(1, len(parts)) if (root/Path(*parts[:k]).with_suffix('.py')).is_file()), len(parts) - 1)
    return '.'.join(parts[k:])

def setup(app):
    _names.update(json.loads((Path(app.srcdir)/'names.json').read_text(encoding='utf-8')))
    app.config.html_extra_path = [str(Path(app.srcdir)/'_extra')]
    app.add_post_transform(LinkNames)
