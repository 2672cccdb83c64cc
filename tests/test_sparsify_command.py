"Pruning a checkpoint without the code of its model: the same zeros as a Sparsifier, exact, and never in place"
import configparser, hashlib, json, os, subprocess, sys
from pathlib import Path

import pytest, torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fasterai_clone.all import Sparsifier
from fasterai_clone.export.prune_files import Store, file_plan, masks_over, prune_store
from fasterai_clone.core.selection import keep_masks
from fasterai_clone.sparsify import sparsify, sparsify_file

root = Path(__file__).resolve().parent.parent

def small(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 12), nn.Linear(12, 4)).to(dtype)

def digest(path): return hashlib.sha256(Path(path).read_bytes()).hexdigest()

def run(*args, cwd):
    "As the console script calls it"
    script = cwd/'bin'/'sparsify'
    script.parent.mkdir(exist_ok=True)
    script.write_text('import sys\nfrom fasterai_clone.sparsify import sparsify\nsys.exit(sparsify())\n')
    return subprocess.run([sys.executable, '-W', 'ignore', script, *args], capture_output=True, text=True, cwd=cwd)

def test_the_command(tmp_path):
    save_file(small().state_dict(), tmp_path/'a.safetensors', metadata=dict(format='pt'))
    before = digest(tmp_path/'a.safetensors')
    out = run('a.safetensors', '--sparsity', '80', '--context', 'global', '--exclude', '0', '--out', 'b.safetensors',
              cwd=tmp_path)
    assert out.returncode == 0 and not out.stderr, out.stderr
    assert 'Overall' in out.stdout and 'Written: b.safetensors' in out.stdout
    found = load_file(tmp_path/'b.safetensors')
    assert sum(int((found[k] == 0).sum()) for k in ('2.weight', '3.weight')) == 144*80//100
    with safe_open(tmp_path/'b.safetensors', 'pt') as f: assert f.metadata() == dict(format='pt')
    assert digest(tmp_path/'a.safetensors') == before
    assert sorted(os.listdir(tmp_path)) == ['a.safetensors', 'b.safetensors', 'bin']
    out = run('a.safetensors', '--sparsity', '0.8', '--out', 'c.safetensors', cwd=tmp_path)
    assert out.returncode == 1 and out.stderr.startswith('sparsify: `sparsity` is a percentage')
    parser = configparser.ConfigParser(delimiters=['='], comment_prefixes=(';',))
    parser.read(root/'settings.ini', encoding='utf-8')
    assert 'sparsify = fasterai_clone.sparsify:sparsify' in parser['DEFAULT']['console_scripts']

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize('context', ['local', 'global', 'erk', 'lamp', 'output'])
@pytest.mark.parametrize('kind', ['safetensors', 'pth'])
def test_the_zeros_are_those_of_a_sparsifier(dtype, context, kind, tmp_path):
    net, file = small(dtype), tmp_path/f'a.{kind}'
    save_file(net.state_dict(), file) if kind == 'safetensors' else torch.save(net.state_dict(), file)
    report = sparsify_file(file, tmp_path/f'b.{kind}', 70, context)
    Sparsifier(net, context=context, layer_type=(nn.Conv2d, nn.Linear)).sparsify_model(70)
    found = load_file(tmp_path/f'b.{kind}') if kind == 'safetensors' else torch.load(tmp_path/f'b.{kind}')
    assert list(found) == list(net.state_dict()) or kind == 'safetensors'
    assert all(torch.equal(found[k], v) for k,v in net.state_dict().items())
    assert report.zeros == sum(int((found[k] == 0).sum()) for k in ('0.weight', '2.weight', '3.weight'))

@pytest.mark.parametrize('wide', [False, True])
def test_a_shared_threshold_with_ties(wide):
    torch.manual_seed(0)
    dtype  = torch.float64 if wide else torch.float32
    scores = [torch.randn(100, 70).abs().half().to(dtype), torch.rand(3000).round(decimals=2).to(dtype),
              torch.zeros(7, dtype=dtype), torch.full((5,), 1e-40, dtype=dtype)]
    total = sum(map(torch.numel, scores))
    for n in (0, 1, 7, 8, 12, 13, 500, 5000, total - 1, total):
        assert all(map(torch.equal, masks_over(lambda: iter(scores), n, wide), keep_masks(scores, n)))

def test_patterns_of_n_in_m(tmp_path):
    save_file({'w': torch.randn(4, 8), 'odd': torch.randn(4, 6)}, tmp_path/'a.safetensors')
    with pytest.raises(ValueError, match="`nm`: 'odd' has 6 inputs, not a multiple of 4"):
        sparsify_file(tmp_path/'a.safetensors', tmp_path/'b.safetensors', nm=(2, 4))
    sparsify_file(tmp_path/'a.safetensors', tmp_path/'b.safetensors', nm=(2, 4), exclude=['odd'])
    w, was = (load_file(tmp_path/f)['w'] for f in ('b.safetensors', 'a.safetensors'))
    blocks = was.abs().view(4, 2, 4)
    assert torch.equal(w.view(4, 2, 4) != 0, blocks >= blocks.sort(-1).values[..., 2:3])
    with pytest.raises(ValueError, match='2:4 zeroes at most 50 % of the weights, and `sparsity` is 60'):
        sparsify_file(tmp_path/'a.safetensors', tmp_path/'c.safetensors', 60, nm=(2, 4), exclude=['odd'])

def test_everything_else_stays_byte_for_byte(tmp_path):
    tensors = {'ids': torch.arange(6).view(2, 3), 'half': torch.ones(3, dtype=torch.bfloat16),
               'eight': torch.ones(4, 4).to(torch.float8_e4m3fn), 'w': torch.randn(5, 3), 'none': torch.zeros(0, 3)}
    save_file(tensors, tmp_path/'a.safetensors', metadata=dict(note='x'))
    report = sparsify_file(tmp_path/'a.safetensors', tmp_path/'b.safetensors', 40)
    a, b = ((tmp_path/f).read_bytes() for f in ('a.safetensors', 'b.safetensors'))
    assert len(a) == len(b) and sum(x != y for x,y in zip(a, b)) <= 6*4 and report.zeros == 6
    assert {k for k,*_ in report.dense} == {'ids', 'half', 'eight', 'none'}

def test_several_files_with_an_index(tmp_path):
    net = small()
    (tmp_path/'in').mkdir()
    where = {k: f'model-{1 + (k[0] == "3")}.safetensors' for k in net.state_dict()}
    for name in sorted(set(where.values())):
        save_file({k: v for k,v in net.state_dict().items() if where[k] == name}, tmp_path/'in'/name)
    (tmp_path/'in'/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=where)))
    sparsify_file(tmp_path/'in', tmp_path/'out', 70, 'global')
    Sparsifier(net, context='global', layer_type=(nn.Conv2d, nn.Linear)).sparsify_model(70)
    assert sorted(os.listdir(tmp_path/'in')) == sorted(os.listdir(tmp_path/'out'))
    for name in set(where.values()):
        for k,v in load_file(tmp_path/'out'/name).items(): assert torch.equal(v, net.state_dict()[k])
    with pytest.raises(ValueError, match='exists: name a new folder'): sparsify_file(tmp_path/'in', tmp_path/'out', 70)
    with pytest.raises(ValueError, match='is the input'): sparsify_file(tmp_path/'in', tmp_path/'in', 70)
    (tmp_path/'in'/'model-2.safetensors').unlink()
    with pytest.raises(ValueError, match='there is no such file'): sparsify_file(tmp_path/'in', tmp_path/'x', 70)
    (tmp_path/'in'/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=dict(a='../b.safetensors'))))
    with pytest.raises(ValueError, match='not in its folder'): sparsify_file(tmp_path/'in', tmp_path/'x', 70)

def test_a_checkpoint_of_torch_with_a_tied_weight(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.write = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.write.weight = self.read.weight
    torch.save(dict(state_dict=Tied().state_dict(), epoch=3), tmp_path/'a.pth')
    report = sparsify_file(tmp_path/'a.pth', tmp_path/'b.pth', 50)
    found  = torch.load(tmp_path/'b.pth')
    assert found['read.weight'].data_ptr() == found['write.weight'].data_ptr() and report.zeros == 20
    assert "The output has the tensors of 'state_dict' only" in str(report)

@pytest.mark.parametrize('kwargs,error', [
    (dict(sparsity=None), '`sparsity` is missing'), (dict(context='layer'), 'Unknown context'),
    (dict(include=['0.wait']), "Did you mean '0.weight'"), (dict(exclude=['*']), 'There is no tensor to prune'),
    (dict(out='a.safetensors'), 'is the input'), (dict(out='link.safetensors', overwrite=True), 'is the input'),
    (dict(out='old.safetensors'), 'add `--overwrite`'), (dict(out='b.pth'), 'name .*b.safetensors'),
    (dict(file='gone.safetensors'), 'There is no file'), (dict(file='broken.safetensors'), 'no whole safetensors file'),
    (dict(file='nan.safetensors'), "'w' holds NaN or infinite numbers"), (dict(file='.'), 'a folder with an index'),
    (dict(file='masked.pth', out='b.pth'), 'call `prune.remove`'), (dict(context='erk', nm=(2, 4)), 'nm')])
def test_bad_input_leaves_no_output(kwargs, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(small().state_dict(), 'a.safetensors')
    os.symlink('a.safetensors', 'link.safetensors')
    Path('old.safetensors').write_text('old')
    Path('broken.safetensors').write_bytes(Path('a.safetensors').read_bytes()[:-3])
    save_file(dict(v=torch.ones(2, 2), w=torch.full((2, 2), torch.nan)), 'nan.safetensors')
    torch.save({'w_orig': torch.ones(2, 2), 'w_mask': torch.ones(2, 2)}, 'masked.pth')
    before = {f: digest(f) for f in os.listdir()}
    with pytest.raises(ValueError, match=error):
        sparsify_file(**(dict(file='a.safetensors', out='b.safetensors', sparsity=50) | kwargs))
    assert {f: digest(f) for f in os.listdir()} == before

def test_memory_is_that_of_one_tensor(tmp_path):
    "A file of 32 tensors of 4 MiB, in a process of its own"
    save_file({f'{i}.weight': torch.randn(1024, 1024) for i in range(32)}, tmp_path/'a.safetensors')
    code = '''import resource, sys
from fasterai_clone.sparsify import sparsify_file
from fasterai_clone.export.prune_files import Store, file_plan, prune_store
import torch
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
prune_store(s := Store({'w': torch.randn(512, 512), 'v': torch.randn(512, 512)}), file_plan(s, 50, 'global'))
before = peak()
report = sparsify_file('a.safetensors', 'b.safetensors', 50, 'global')
print(peak() - before, report.zeros)'''
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    grown, zeros = out.stdout.split()
    assert float(grown) < 100 and int(zeros) == 16 * 2**20  # MiB; the file has 128

def test_arguments_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_file(small().state_dict(), 'a.safetensors')
    with pytest.raises(SystemExit, match='`--out` is missing'): sparsify.__wrapped__('a.safetensors', 50)
    with pytest.raises(SystemExit, match='`--nm` must be two numbers'):
        sparsify.__wrapped__('a.safetensors', nm='2/4', out='b.safetensors')
    sparsify.__wrapped__('a.safetensors', nm='1:2', exclude='0, 2.*', out='b.safetensors')
    assert int((load_file('b.safetensors')['3.weight'] == 0).sum()) == 24 and 'Written' in capsys.readouterr().out
    store = Store({'w': torch.tensor([[1., 2.], [0., 4.]])})
    assert prune_store(store, file_plan(store, 50)).zeros == 2
