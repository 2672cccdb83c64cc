"The two commands, as a user calls them"
import csv, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from fastai.basics import CrossEntropyLossFlat, Learner
from safetensors.torch import save_file

from fasterai_clone.cli import sparsify_demo, sparsity_report
from fasterai_clone.digits import digits_dls, digits_net
from fasterai_clone.sparse.sparsify_callback import SparsifyCallback

demo = sparsify_demo.__wrapped__


def run(cmd, *args, cwd): return subprocess.run([Path(sys.executable).parent/cmd, *map(str, args)], capture_output=True, text=True, cwd=cwd)


def test_demo_trains_compares_and_saves(tmp_path):
    out = run('sparsify-demo', '--epochs', 2, '--sparsity', 80, '--context', 'global', '--out', 'here', cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert not out.stderr.strip(), 'a warning reached the user'
    for s in ('Pruning of weight until a sparsity of [80]%', 'Sparsity at the end of epoch 1: [80.0]%', '=== Comparison ===', 'here'): assert s in out.stdout
    rows = list(csv.DictReader(open(tmp_path/'here'/'comparison.csv')))
    assert [r['run'] for r in rows] == ['dense', 'one_shot', 'iterative', 'agp']
    assert [int(r['zeros']) for r in rows] == [0] + [23_184*80//100]*3
    epochs = list(csv.DictReader(open(tmp_path/'here'/'epochs.csv')))
    assert len(epochs) == 8
    for name in ('schedules', 'accuracy', 'zeros'): assert Image.open(tmp_path/'here'/f'{name}.png').size[0] > 500


def test_demo_on_a_folder_of_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for label in ('ones', 'twos'):
        (tmp_path/'images'/label).mkdir(parents=True)
        for i in range(6): Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype='uint8')).save(tmp_path/'images'/label/f'{i}.png')
    demo(images='images', arch='squeezenet1_1', scratch=True, size=32, bs=4, epochs=1, schedules='lin')
    dense, lin = csv.DictReader(open(tmp_path/'sparsify-demo'/'comparison.csv'))
    assert float(lin['sparsity']) == pytest.approx(90, abs=0.01)


@pytest.mark.parametrize('kwargs, said', [
    (dict(schedules='agp,oneshot'), "Did you mean 'one_shot'"), (dict(sparsity=0.9),          'write 90'),
    (dict(criterion='magnitud'),    'Did you mean'),            (dict(granularity='filters'), "Did you mean 'filter'"),
    (dict(images='nowhere'),        'sub-folder of images'),    (dict(epochs=0),              '`--epochs`')])
def test_demo_refuses_before_training(kwargs, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=said): demo(**kwargs)
    assert 'Pruning' not in capsys.readouterr().out and not any(tmp_path.iterdir())


def test_report_of_checkpoints(tmp_path, capsys):
    learn = Learner(digits_dls(n=128), digits_net(), loss_func=CrossEntropyLossFlat(), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=SparsifyCallback(90, verbose=False))
    save_file(learn.model.state_dict(), tmp_path/'a.safetensors')
    torch.save(learn.model.state_dict(), tmp_path/'a.pth')
    for file in (learn.save('with_opt'), learn.save('without', with_opt=False), tmp_path/'a.safetensors', tmp_path/'a.pth'):
        sparsity_report.__wrapped__(file)
        out = capsys.readouterr().out
        for zeros in ('129 ', '4,147 ', '16,588 '): assert zeros in out


class Evil:
    def __reduce__(self): return print, ('code has run',)


@pytest.mark.parametrize('content', [Evil(), [1, 2], {'a': 1}, torch.nn.Linear(2, 2)], ids=lambda c: type(c).__name__)
def test_report_refuses_anything_else(content, tmp_path, capsys):
    torch.save(content, tmp_path/'x.pth')
    with pytest.raises(SystemExit, match='sparsity-report: .*x.pth'): sparsity_report.__wrapped__(tmp_path/'x.pth')
    assert 'code has run' not in capsys.readouterr().out


def test_report_command(tmp_path):
    torch.save({'w': torch.tensor([[0., 1.]])}, tmp_path/'x.pth')
    out = run('sparsity-report', 'x.pth', cwd=tmp_path)
    assert out.returncode == 0 and '50.00%' in out.stdout, out.stderr
    out = run('sparsity-report', 'y.pth', cwd=tmp_path)
    assert out.returncode != 0 and out.stderr == 'sparsity-report: There is no file y.pth\n'
