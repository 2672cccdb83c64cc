"""Run the notebooks, save clean outputs, export the modules, write their stubs and README.md:
`python tools/refresh.py [nbs/name.ipynb ...]`.

Without names every notebook is run. `--check` runs nothing: it only exports, cleans and writes stubs and README.md."""
import base64, configparser, os, re, sys
from pathlib import Path
os.environ['OMP_NUM_THREADS'] = '1'  # the networks here are tiny: more threads only get in each other's way
# of importing fastai, and timm
os.environ['PYTHONWARNINGS']  = 'ignore::FutureWarning:torch.jit._script,ignore:IProgress not found'
# saved outputs are the same from any shell
for name in 'MPLBACKEND COLUMNS LINES NO_COLOR FORCE_COLOR'.split(): os.environ.pop(name, None)

import nbformat
from fastcore.xtras import globtastic
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from nbdev.export import nb_export
from nbdev.doclinks import nbdev_export

from stubs import write_stubs

root = Path(__file__).resolve().parent.parent
nbs  = root/'nbs'


def _directives(cell): return re.findall(r'^#\|\s*(.+?)\s*$', cell.source, re.M)

def _progress_junk(out):
    "fastprogress' style sheet and its empty bar: they are no result"
    html = ''.join(out.get('data', {}).get('text/html', ''))
    return '<style>' in html and 'progress' in html or bool(html) and not re.sub(r'<[^>]*>|\s', '', html)

def _tidy(cell):
    "Keep the outputs that teach"
    outs = []
    for o in cell.outputs:
        if _progress_junk(o): continue
        if o.output_type == 'stream' and o.name == 'stderr':
            raise RuntimeError(f'A cell wrote to stderr:\n{cell.source}\n---\n{o.text}')
        if o.output_type == 'stream' and outs and outs[-1].output_type == 'stream': outs[-1].text += o.text
        else: outs.append(o)
        if 'image/png' in o.get('data', {}): o.data.pop('text/plain', None)
        if 'text/html' in o.get('data', {}): o.data.pop('text/markdown', None)
    cell.outputs = outs

def run(path):
    "Execute the notebook at `path` in a fresh kernel and save its outputs"
    nb = nbformat.read(path, as_version=4)
    client = NotebookClient(nb, timeout=600, kernel_name='python3',
                            resources=dict(metadata=dict(path=str(path.parent))))
    with client.setup_kernel():
        for i,cell in enumerate(nb.cells):
            if cell.cell_type != 'code': continue
            if 'eval: false' in _directives(cell):
                cell.outputs = []
                continue
            client.execute_cell(cell, i)
            _tidy(cell)
    nbformat.write(nb, path)


def _repository():
    cfg = configparser.ConfigParser(delimiters=['='], comment_prefixes=(';',))
    cfg.read(root/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']['repository']

# fastai's own notebooks begin like this: `/content` is where Google Colab works
COLAB = f'''#| hide
#| eval: false
# Google Colab starts without the package
! [ -e /content ] && pip install -q git+{_repository()}'''

def prepare_for_colab(path):
    "Let a tutorial install the package in its first code cell"
    nb = nbformat.read(path, as_version=4)
    if any(c.source == COLAB for c in nb.cells): return
    nb.cells = [c for c in nb.cells if '/content' not in c.source]
    nb.cells.insert(1, nbformat.v4.new_code_cell(COLAB, id='colab'))
    nbformat.write(nb, path)


def _table(html):
    "An HTML table of fastai's as a markdown one"
    rows = [re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', r, re.S) for r in re.findall(r'<tr[^>]*>(.*?)</tr>', html, re.S)]
    lines = ['| ' + ' | '.join(r) + ' |' for r in rows]
    return '\n'.join([lines[0], '|' + ' ---: |'*len(rows[0]), *lines[1:]])

def _output(o, images):
    "One output as markdown; a picture goes to the folder `images`"
    data = o.get('data', {})
    if 'image/png' in data:
        name = f'index_{len(list(images.glob("index_*.png"))) + 1}.png'
        (images/name).write_bytes(base64.b64decode(data['image/png']))
        return f'![](nbs/images/{name})'
    if 'fastprogress' in data.get('text/html', ''): return _table(data['text/html'])
    if 'text/markdown' in data: return data['text/markdown']
    text = (o.get('text') or data.get('text/plain', '')).strip()
    return f'```text\n{text}\n```' if text else ''

def _markdown(nb, images):
    "The notebook as README text"
    out = []
    for cell in nb.cells:
        if 'hide' in _directives(cell): continue
        src = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
        if cell.cell_type == 'markdown': out.append(src)
        elif src:
            if 'echo: false' not in _directives(cell): out.append(f'```python\n{src}\n```')
            out += [_output(o, images) for o in cell.outputs]
    return '\n\n'.join(o for o in out if o) + '\n'

def write_readme(dest=root/'README.md'):
    "README.md is `nbs/index.ipynb` as text"
    images = dest.parent/'nbs'/'images'
    images.mkdir(parents=True, exist_ok=True)
    for old in images.glob('index_*.png'): old.unlink()
    dest.write_text('<!-- written by tools/refresh.py from nbs/index.ipynb: edit that -->\n\n'
                    + _markdown(nbformat.read(nbs/'index.ipynb', as_version=4), images), encoding='utf-8')


def main(args):
    os.chdir(root)
    if '--check' not in args:
        for p in [Path(a) for a in args] or sorted(Path(o) for o in globtastic('nbs', file_glob='*.ipynb',
                                                                               skip_folder_re=r'^\.')):
            print('running', p, flush=True)
            nb_export(p)
            run(p)
    for p in sorted((nbs/'tutorials').glob('*.ipynb')): prepare_for_colab(p)
    nbdev_clean.__wrapped__()
    nbdev_export.__wrapped__()
    write_stubs()
    if (nbs/'index.ipynb').exists(): write_readme()

if __name__ == '__main__': main(sys.argv[1:])
