"The README's code runs, its commands are the two there are, its pictures exist"
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
    assert len(cells) == len(blocks('python')) >= 5
    space, compared = {'__name__': 'readme'}, []
    for code,rest in cells:
        got = run(code, space)
        for want in re.findall(r'^```text\n(.*?)^```$', rest, re.M | re.S):
            compared.append(code)
            if 'fit' in code or 'backward' in code: assert not shapes(want) - shapes(got), code
            else: assert re.sub(r'\s', '', want) == re.sub(r'\s', '', got), code
    assert len(compared) >= 5

def test_counted_numbers_are_those_shown():
    "Zeros of the first report: floor(0.9·n) of each convolution, whatever the machine"
    report = re.search(r'Sparsity Report:.*?Covers', readme, re.S)[0]
    rows   = re.findall(r'^Layer \d+ +Conv2d +([\d,]+) +([\d,]+)', report, re.M)
    assert [(int(a.replace(',', '')), int(b.replace(',', ''))) for a,b in rows] == [(n, 9*n//10) for n in (144, 4608, 18432)]

def test_bash_commands_are_the_two():
    assert [b.strip() for b in blocks('bash')] == ['pip install . && sparsify-demo', "pip install '.[dev]' && pytest"]

def test_pictures_and_local_links_exist():
    pictures = re.findall(r'!\[[^\]]*\]\(([^)]+)\)', readme)
    local    = [l for l in re.findall(r'\]\(([^)#]+)\)', readme) if not l.startswith('http')]
    assert pictures and all((root/l).is_file() for l in local)
    for p in pictures: assert (root/p).read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'

def test_links_to_the_repository_exist():
    for path in re.findall(r'https://github\.com/fasterai-clone/fasterai_clone/blob/main/([^)#]+)', readme): assert (root/path).exists()

@pytest.mark.parametrize('script', ['sparsify-demo', 'sparsity-report'])
def test_the_console_scripts_are_named(script): assert f'`{script}' in readme
