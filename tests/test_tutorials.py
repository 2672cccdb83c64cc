"The tutorials run where only the package is installed, notebooks are numbered, and README's long sections have a home"
import ast, json, re
from pathlib import Path

import pytest

root      = Path(__file__).resolve().parent.parent
tutorials = sorted((root/'nbs'/'tutorials').glob('*.ipynb'))
each      = pytest.mark.parametrize('path', tutorials, ids=lambda p: p.stem)

def cells(path, kind='code'):
    return [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells']
            if c['cell_type'] == kind]

def code(path):
    "The Python of a notebook, without commands of a shell"
    return ast.parse('\n'.join(re.sub(r'^[!%].*$', '', c, flags=re.M) for c in cells(path)))

def imported(tree):
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): yield from (a.name for a in n.names)
        if isinstance(n, ast.ImportFrom): yield n.module

def functions(tree): return {n.name: ast.dump(n) for n in tree.body if isinstance(n, ast.FunctionDef)}

@each
def test_a_tutorial_imports_only_what_is_installed(path):
    assert {m.split('.')[0] for m in imported(code(path))} & {'benchmarks', 'tests', 'tools'} == set()
    assert not any('sys.path' in c for c in cells(path))

@each
def test_a_tutorial_installs_the_package_in_colab(path):
    "In its first cell of code, which does nothing elsewhere"
    first = cells(path)[0]
    where = re.search(r'^repository = (\S+)$', (root/'settings.ini').read_text(encoding='utf-8'), re.M)[1]
    assert first.splitlines()[:2] == ['#| hide', '#| eval: false']
    assert first.splitlines()[-1] == f'! [ -e /content ] && pip install -q git+{where}'

@pytest.mark.parametrize('name, names', [
    ('contexts', 'contexts_and_collapse: deep_net sparsifier kept images fit'),
    ('structured_digits', 'structured_pruning: trained pruning outputs'), ('tickets', 'lottery_tickets: lenet')])
def test_the_code_in_a_page_is_that_of_its_study(name, names):
    page, names = names.split(': ')
    here  = functions(code(root/'nbs'/'tutorials'/f'{page}.ipynb'))
    study = functions(ast.parse((root/'benchmarks'/f'{name}.py').read_text(encoding='utf-8')))
    for n in names.split(): assert here[n] == study[n], n

def test_all_tutorials_read_results_in_the_same_way():
    "From a clone, or from the repository"
    found = {f['study'] for p in tutorials if 'study' in (f := functions(code(p)))}
    assert len(found) == 1

def test_results_are_read_where_there_is_no_clone(tmp_path, monkeypatch):
    import io, urllib.request
    asked = []
    def urlopen(url):
        asked.append(url)
        return io.BytesIO(b'# seeds: 7\nseed\n1\n')
    monkeypatch.setattr(urllib.request, 'urlopen', urlopen)
    source = next(c for c in cells(root/'nbs'/'tutorials'/'schedules.ipynb') if 'def study' in c)
    space  = {}
    exec(source, space)
    monkeypatch.chdir(tmp_path)
    assert space['study']('schedules.csv').startswith('# seeds')
    assert asked[0].endswith('/main/benchmarks/results/schedules.csv')
    monkeypatch.chdir(root/'nbs'/'tutorials')
    assert space['study']('schedules.csv') == (root/'benchmarks'/'results'/'schedules.csv').read_text(encoding='utf-8')
    assert len(asked) == 1

def test_every_number_names_one_notebook():
    numbers = [m[0] for p in (root/'nbs').glob('*.ipynb') if (m := re.match(r'\d+', p.name))]
    assert len(numbers) > 100 and {n for n in numbers if numbers.count(n) > 1} == set()

@pytest.mark.parametrize('page, says', [
    ('tutorials/everything_you_can_choose', '''partial(iterative SchedCos available_schedules available_criterias
        available_granularities available_contexts block_4x4 ln_norm kept_sign granularity=(2 add_context `Rule`
        MultiheadAttention budget='flops' coupled=True PruneCallback compare('''),
    ('tutorials/resume_and_distributed',
     'every_epoch=True start_epoch= SaveSparseModelCallback KeepSparsity distrib_ctx fully_shard'),
    ('tutorials/plain_pytorch', 'sp.hold Masks.load Masks.of'),
    ('tutorials/lottery_tickets', 'rewind_epoch save_tickets find_ticket'),
    ('guarantees', '**Exact** **Measured** time** **Kept** models** files** arguments**'),
    ('600_benchmarks', "compact=True 'import'"), ('950_cli', 'sparsity-report sparsify-demo')])
def test_what_left_the_readme_is_in_a_page(page, says):
    path = root/'nbs'/f'{page}.ipynb'
    text = '\n'.join(cells(path) + cells(path, 'markdown'))
    for words in says.split(): assert words in text, words
