"The page of guarantees names tests that exist"
import json, re
from pathlib import Path

import pytest

here = Path(__file__).parent

def rows():
    cells = json.loads((here.parent/'nbs/guarantees.ipynb').read_text(encoding='utf-8'))['cells']
    for line in ''.join(l for c in cells for l in [*c['source'], '\n']).splitlines():
        if line.startswith('| ') and not line.startswith(('| guarantee', '| ---')):
            yield [o.strip() for o in line.strip('| ').split(' | ')]

def test_there_are_rows(): assert len(list(rows())) > 20

@pytest.mark.parametrize('name', sorted({n for r in rows() for n in re.findall(r'`(tests/[^`]+)`', r[1])}))
def test_named_tests_exist(name):
    file, _, test = name.partition('::')
    text = (here.parent/file).read_text(encoding='utf-8')
    assert re.search(rf'^def {test}\(' if test else r'^def test_', text, re.M)

def test_each_guarantee_has_a_test(): assert not [r for r in rows() if 'tests/' not in r[1]]
