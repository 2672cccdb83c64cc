"The two commands, as a user calls them"
import csv, re, subprocess, sys
from pathlib import Path
from urllib.error import URLError
import numpy as np, pytest, torch
from PIL import Image
from fastai.basics import CrossEntropyLossFlat, Learner
from safetensors.torch import save_file

from fasterai_clone.cli import sparsify_demo, sparsity_report
from fasterai_clone.demo import Run, verdict
from fasterai_clone.digits import digits_dls, digits_net
from fasterai_clone.sparse.sparsifier import Sparsifier
from fasterai_clone.sparse.sparsify_callback import SparsifyCallback

demo = sparsify_demo.__wrapped__


def run(cmd, *args, cwd):
    return subprocess.run([Path(sys.executable).parent/cmd, *map(str, args)], capture_output=True, text=True, cwd=cwd)


def test_demo_trains_compares_and_saves(tmp_path):
    out = run('sparsify-demo', '--epochs', 2, '--sparsity', 80, '--out', 'here', cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert not out.stderr.strip(), 'a warning reached the user'
    for s in ('Pruning of weight until a sparsity of [80]%', 'Sparsity at the end of epoch 1: [80.0]%',
              '=== Comparison ===', '=== Verdict ===\nAt 80 % sparsity, ', '18,547 of 23,184 weights',
              '=== Half of the filters removed ===', '24,058        6,274     3.8×', 'here'): assert s in out.stdout
    rows = list(csv.DictReader(open(tmp_path/'here'/'comparison.csv')))
    assert [r['run'] for r in rows] == ['dense', 'one_shot', 'iterative', 'agp']
    assert [int(r['zeros']) for r in rows] == [0] + [23_184*80//100]*3
    epochs = list(csv.DictReader(open(tmp_path/'here'/'epochs.csv')))
    assert len(epochs) == 8
    smaller = {r['what']: r for r in csv.DictReader(open(tmp_path/'here'/'smaller.csv'))}
    assert (smaller['params']['dense'], smaller['params']['thinned']) == ('24058', '6274')
    assert {'accuracy', 'multiply_adds', 'file', 'ms_1', 'ms_64'} < smaller.keys()
    for page in re.findall(r'/tutorials/(\w+)\.html', out.stdout):
        assert (Path(__file__).parent.parent/'nbs'/'tutorials'/f'{page}.ipynb').exists()
    for name in ('schedules', 'accuracy', 'zeros', 'smaller'):
        assert Image.open(tmp_path/'here'/f'{name}.png').size[0] > 500


def test_demo_defaults_are_what_the_studies_recommend(tmp_path, monkeypatch, capsys):
    "Weights of all layers compared and an end at 70 %, as the numbers of zeros show; other groups layer by layer"
    monkeypatch.chdir(tmp_path)
    demo(epochs=2, schedules='lin')
    demo(epochs=2, schedules='lin', granularity='filter', sparsity=50, end=100, out='filters')
    rows = list(csv.DictReader(open('sparsify-demo/epochs.csv')))
    assert [round(float(r['sparsity']), 1) for r in rows if r['run'] == 'lin'] == [64.3, 90]  # 90 % · 50/70
    rows = list(csv.DictReader(open('filters/epochs.csv')))
    assert [float(r['asked']) for r in rows if r['run'] == 'lin'] == [25, 50]
    said = capsys.readouterr().out
    assert '8 of 16' in said and '20,865 of 23,184 weights are zero' in said


def write_images(folder, n=6):
    rng = np.random.default_rng(0)
    for label in ('ones', 'twos'):
        (folder/label).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype='uint8')).save(folder/label/f'{i}.png')


def test_demo_on_a_folder_of_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path/'images')
    demo(images='images', arch='squeezenet1_1', scratch=True, size=32, bs=4, epochs=1, schedules='lin')
    dense, lin = csv.DictReader(open(tmp_path/'sparsify-demo'/'comparison.csv'))
    assert float(lin['sparsity']) == pytest.approx(90, abs=0.01)


@pytest.mark.parametrize('kwargs, said', [
    (dict(schedules='agp,oneshot'), "this is 'one_shot'"), (dict(sparsity=0.9),          'write 90'),
    (dict(criteria='magnitud'),     'Did you mean'),            (dict(granularity='filters'), "Did you mean 'filter'"),
    (dict(images='nowhere'),        'sub-folder of images'),    (dict(epochs=0),              '`--epochs`'),
    (dict(end=0.7),                 'percentage of training')])
def test_demo_refuses_before_training(kwargs, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=said): demo(**kwargs)
    assert 'Pruning' not in capsys.readouterr().out and not any(tmp_path.iterdir())


def test_the_former_spelling_of_criteria_is_accepted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.warns(DeprecationWarning, match='`criterion` is now called `criteria`'):
        demo(criterion='squared_final', epochs=1, schedules='lin')
    assert '20,865 of 23,184 weights are zero' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='former name of `criteria`: pass `criteria` only'):
        demo(criterion='movement', criteria='gradient')
    shown = run('sparsify-demo', '--help', cwd=tmp_path).stdout
    assert '--criteria (str)' in shown and re.search(r'--criterion .*former name of --criteria', shown)


def refused(capsys, said, **kwargs):
    with pytest.raises(SystemExit, match=said): demo(**kwargs)
    assert '===' not in capsys.readouterr().out, 'a training run has started'


def test_demo_refuses_a_folder_it_cannot_write_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('file').touch()
    Path('taken/zeros.png').mkdir(parents=True)
    refused(capsys, '`--out` must be a folder to write to, got file: it is a file', out='file')
    refused(capsys, '`--out`.*Not a directory', out='file/inner')
    refused(capsys, '`--out`.*too long', out='x'*300)
    refused(capsys, '`--out`.*zeros.png in it is a folder', out='taken')


def test_demo_refuses_folders_without_enough_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ('empty/ones', 'empty/twos', 'texts/ones', 'texts/twos', 'single'): Path(name).mkdir(parents=True)
    for name in ('ones', 'twos'): Path(f'texts/{name}/a.txt').touch()
    refused(capsys, 'empty has 0 images in 0 sub-folders', images='empty')
    refused(capsys, 'texts has 0 images in 0 sub-folders', images='texts')
    write_images(tmp_path/'few', 3)
    for p in Path('few/ones').iterdir(): p.rename(Path('single')/p.name)
    refused(capsys, 'single has 3 images in 0 sub-folders', images='single')
    refused(capsys, 'few has 3 images in 1 sub-folders', images='few')
    write_images(tmp_path/'some')
    refused(capsys, '12 images are too few for batches of 64', images='some', scratch=True, arch='resnet18')
    assert not Path('sparsify-demo').exists()


@pytest.mark.parametrize('error', [URLError('no route'), RuntimeError('invalid hash value')])
def test_demo_refuses_missing_pretrained_weights(error, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path/'images')
    def fail(*args, **kwargs): raise error
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', fail)
    refused(capsys, 'pretrained weights of resnet18 could not be loaded .*--scratch', images='images', bs=4, size=32)
    assert not Path('sparsify-demo').exists()


def made_up(name, accuracy, sparsity, images=400):
    net = digits_net()
    sp  = Sparsifier(net, context='global')
    if sparsity: sp.sparsify_model(sparsity)
    return Run(name, None, sp.report(), rows=[dict(accuracy=accuracy)], images=images, model=net)


def test_verdict():
    dense, agp, dsd = made_up('dense', 0.9, 0), made_up('agp', 0.88, 90), made_up('dsd', 0.92, 0)
    said = verdict([dense, dsd, agp])
    assert said.startswith('At 90 % sparsity, agp keeps 88.0 % (dense: 90.0 %): no measurable difference. '
                           'The others: dsd 92.0 %.\n')
    assert '400 images and one seed, differences up to 3.0 points' in said  # 2·√(0.9·0.1/400) = 0.03
    assert '20,865 of 23,184 weights are zero' in said and 'raise `--epochs`' not in said
    said = verdict([dense, made_up('agp', 0.85, 90)])
    assert 'agp keeps 85.0 % (dense: 90.0 %): 5.0 points less.\n' in said and 'raise `--epochs`' in said
    assert '4.0 points more' in verdict([dense, made_up('agp', 0.94, 90)])


def test_report_of_checkpoints(tmp_path, capsys):
    learn = Learner(digits_dls(n=128), digits_net(), loss_func=CrossEntropyLossFlat(), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=SparsifyCallback(90, verbose=False))
    save_file(learn.model.state_dict(), tmp_path/'a.safetensors')
    torch.save(learn.model.state_dict(), tmp_path/'a.pth')
    for file in (learn.save('with_opt'), learn.save('without', with_opt=False), tmp_path/'a.safetensors',
                 tmp_path/'a.pth'):
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
