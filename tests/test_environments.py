"""The same results, files and text in any environment: locale, time zone, width and encoding of the terminal, hash
seed, threads, plotting backend"""
import hashlib, os, subprocess, sys
from pathlib import Path

import pytest

root  = Path(__file__).resolve().parent.parent
plain = dict(LC_ALL='C.UTF-8', TZ='UTC', COLUMNS='200', PYTHONHASHSEED='0', OMP_NUM_THREADS='1',
             PYTHONIOENCODING='utf-8')
other = dict(LC_ALL='tr_TR.UTF-8', TZ='Asia/Kathmandu', COLUMNS='40', PYTHONHASHSEED='7', OMP_NUM_THREADS='2',
             MPLBACKEND='svg', NO_COLOR='1', PYTHONIOENCODING='latin-1')

def child(folder):
    "What is compared: everything that is printed, and the files left in `folder`"
    import locale
    try: locale.setlocale(locale.LC_ALL, '')  # as a program with a window does; not every machine has every locale
    except locale.Error: pass
    import torch, torch.nn as nn
    from fastai.basics import CrossEntropyLossFlat, Learner, set_seed
    from fasterai_clone.digits import digits_dls, digits_net
    from fasterai_clone.prune.all import PruneCallback, compare, thin
    from fasterai_clone.core.printing import print_text
    from fasterai_clone.sparse.all import Sparsifier, SparsifyCallback
    set_seed(0, reproducible=True)
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 8, 1))
    for kind,context in (('weight', 'global'), ('kernel', 'local'), ('filter', 'erk')):
        sp = Sparsifier(net, kind, context)
        sp.sparsify_model(40)
        sp.print_sparsity()
        sp.masks.save(folder/f'{kind}.safetensors')
    sp.report().to_pandas().to_csv(folder/'report.csv')
    torch.set_num_threads(1)  # of training the sums do depend on it
    for name,cb in (('sparsify', SparsifyCallback(50, 'filter', coupled=True, live=True)),
                    ('prune', PruneCallback(50))):
        learn = Learner(digits_dls(64, 256), digits_net(8), loss_func=CrossEntropyLossFlat(), path=folder)
        learn.recorder.add_time = False
        with learn.no_bar(): learn.fit(1, 1e-2, cbs=cb)
        if hasattr(cb, 'plot'): cb.plot()
        learn.save(name, with_opt=False)
    print_text(str(compare(digits_net(8), thin(learn.model, example_inputs=torch.rand(4, 1, 8, 8)),
                           torch.rand(4, 1, 8, 8), devices=[])))

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Printed text and files of both environments"
    path, started = os.pathsep.join([str(root), os.environ.get('PYTHONPATH', '')]), []
    for env in (plain, other):
        folder = tmp_path_factory.mktemp('run')
        started.append((folder, env, subprocess.Popen([sys.executable, '-W', 'ignore', __file__, folder],
                                                      env={**os.environ, **env, 'PYTHONPATH': path},
                                                      cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)))
    found = []
    for folder,env,process in started:
        out, err = process.communicate(timeout=900)
        assert process.returncode == 0, err.decode(errors='replace')[-3000:]
        files = {p.relative_to(folder).as_posix(): p for p in folder.rglob('*') if p.is_file()}
        found.append((out.decode(env['PYTHONIOENCODING']), files))
    return found

def test_text_is_the_same(runs):
    "... but for characters that the output's encoding does not have"
    (first, _), (second, _) = runs
    assert '56 → 28 channels (50.00%)' in first and '1.weight, 1.bias, 4.weight, …, 7.bias' in first
    assert '56 -> 28 channels (50.00%)' in second and '1.weight, 1.bias, 4.weight, ..., 7.bias' in second
    for a,b in (('→', '->'), ('…', '...'), ('–', '-'), ('×', 'x'), ('÷', '/')):
        first, second = first.replace(a, b), second.replace(a, b)
    assert [l.split() for l in first.splitlines()] == [l.split() for l in second.splitlines()]

def content(file):
    "What is in `file`, as something to compare: the tensors by name, or the bytes"
    from fasterai_clone.cli import load_tensors
    if file.suffix not in ('.pth', '.safetensors'): return hashlib.sha256(file.read_bytes()).hexdigest()
    return {k: (t.dtype, t.shape, t.tolist()) for k,t in load_tensors(file).items()}

def test_files_are_the_same(runs):
    "Masks and weights bit for bit, tables byte for byte"
    (_, first), (_, second) = runs
    assert first.keys() == second.keys() and {'weight.safetensors', 'report.csv', 'models/sparsify.pth'} <= first.keys()
    for k in first: assert content(first[k]) == content(second[k]), k

if __name__ == '__main__': child(Path(sys.argv[1]))
