"The README's code runs, its commands are the two there are, it fits on three screens"
import ast, contextlib, io, re
from pathlib import Path

import pytest

root   = Path(__file__).resolve().parent.parent
readme = (root/'README.md').read_text(encoding='utf-8')

def blocks(kind): return re.findall(rf'^```{kind}\n(.*?)^```$', readme, re.M | re.S)


def run(code, space):
    "What a notebook shows of `code`: what it prints, and the value of its last line"
    *body, last = ast.parse(code).body
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        value = None
        if not isinstance(last, ast.Expr): body.append(last)
        exec(compile(ast.Module(body, []), 'README.md', 'exec'), space)
        if isinstance(last, ast.Expr): value = eval(compile(ast.Expression(last.value), 'README.md', 'eval'), space)
    return out.getvalue() + ('' if value is None else repr(value))

def shapes(text):
    "The lines of `text` without what may differ by machine: numbers, and the width they take"
    return {re.sub(r'[-\s]+', ' ', re.sub(r'[\d,.]+', '#', l)).strip() for l in text.splitlines()}

def test_python_blocks_run_and_show_what_is_shown():
    cells = re.findall(r'^```python\n(.*?)^```$(.*?)(?=^```python|^#|\Z)', readme, re.M | re.S)
    assert len(cells) == len(blocks('python')) == 4
    space, compared = {'__name__': 'readme'}, []
    for code,rest in cells:
        got = run(code, space)
        for want in re.findall(r'^```text\n(.*?)^```$', rest, re.M | re.S):
            compared.append(code)
            if 'fit' in code or 'backward' in code: assert not shapes(want) - shapes(got), code
            else: assert re.sub(r'\s', '', want) == re.sub(r'\s', '', got), code
    assert len(compared) == 3, 'what fit prints, its report and that of plain PyTorch'

def test_it_has_at_most_three_screens(): assert len(readme.splitlines()) <= 200

def test_each_example_runs_alone():
    "The one in PyTorch needs nothing of the one in fastai, and trains on the training data"
    imports, example = blocks('python')[2:]
    assert 'fastai' not in (imports + example).replace('fasterai', '')
    run(imports + example, {'__name__': 'readme'})
    assert 'in enumerate(loader)' in example and 'x_test' not in example.split('print')[0].split('loader', 1)[1]

def test_the_examples_reach_what_they_claim():
    "Of 360 images each: little is lost at 90 %"
    accuracy = float(re.findall(r'^\| \d+ \| .* \| ([\d.]+) \| [\d.]+ \|$', readme, re.M)[-1])
    correct  = int(re.search(r'(\d+) of 360 test images correct', readme)[1])
    assert accuracy > 0.98 and correct > 340

def test_counted_numbers_are_those_shown():
    "Zeros of the reports: floor(0.9·n) of all layers together, whatever the machine"
    reports = re.findall(r'Sparsity Report:.*?Covers', readme, re.S)
    for report,sizes in zip(reports, ((144, 4608, 18432), (16384, 2560)), strict=True):
        rows = re.findall(r'^Layer \d+ +\w+ +([\d,]+) +([\d,]+)', report, re.M)
        n, zeros = zip(*[[int(v.replace(',', '')) for v in r] for r in rows])
        assert n == sizes and sum(zeros) == 9*sum(sizes)//10

def test_bash_commands_are_the_two():
    assert [b.strip() for b in blocks('bash')] == ['pip install . && sparsify-demo', "pip install '.[dev]' && pytest"]

def test_local_links_exist():
    local = [l for l in re.findall(r'\]\(([^)#]+)\)', readme) if not l.startswith('http')]
    assert all((root/l).is_file() for l in local)

def test_links_to_the_repository_exist():
    for path in re.findall(r'https://github\.com/fasterai-clone/fasterai_clone/blob/main/([^)#]+)', readme):
        assert (root/path).exists()

@pytest.mark.parametrize('script', ['sparsify-demo', 'sparsity-report'])
def test_the_console_scripts_are_named(script): assert f'`{script}' in readme
