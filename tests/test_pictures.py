"""What is drawn is what was counted; pictures are legible on white and on nearly black, to every eye, and leave nothing
behind"""
import copy, io, itertools, math, os, subprocess, sys, time
from pathlib import Path

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt, nbformat, numpy as np, pytest, torch, torch.nn as nn
from fastai.basics import CancelFitException, Recorder
from fastai.callback.progress import ProgressCallback
from matplotlib.colors import to_rgb
from nbclient import NotebookClient
from fasterai_clone.core.granularity import Granularities, plot_granularities, plot_granularity
from fasterai_clone.core.style import colors
from fasterai_clone.sparse.checkpoint import report_tensors
from fasterai_clone.sparse.all import *
from helpers import learner, measured, spy, zeros

root = Path(__file__).resolve().parent.parent

@pytest.fixture(autouse=True)
def nothing_open():
    "No figure is left by the test before, and none is left to the next"
    plt.close('all')
    yield
    plt.close('all')

@pytest.fixture(scope='module')
def trained():
    "Learner and callback of four epochs to 80 %"
    learn, cb = learner(), SparsifyCallback(80, context='global', verbose=False)
    with learn.no_logging(): learn.fit(4, 1e-2, cbs=cb)
    return learn, cb

def conv_masks(*shape, seed=0):
    torch.manual_seed(seed)
    return Masks({'conv.weight': torch.rand(shape) < 0.5})

def image(ax): return np.ma.filled(ax.images[0].get_array().astype(float), np.nan)


# The style

WHITE, DARK = '#ffffff', '#131416'

def linear(color):
    v = np.array(to_rgb(color))
    return np.where(v <= 0.04045, v/12.92, ((v + 0.055)/1.055)**2.4)

def contrast(a, b):
    "WCAG 2.1"
    low, high = sorted(linear(c) @ (0.2126, 0.7152, 0.0722) for c in (a, b))
    return (high + 0.05) / (low + 0.05)

# Machado, Oliveira and Fernandes 2009, doi:10.1109/TVCG.2009.113, severity 1.0, for linear RGB
EYES = dict(most=np.eye(3),
            protanopia  =np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                                   [-0.003882, -0.048116, 1.051998]]),
            deuteranopia=np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                                   [-0.011820,  0.042940, 0.968881]]))

def lab(rgb):
    "CIE 1976 L*a*b* of linear RGB, D65"
    xyz = np.array([[.4124, .3576, .1805], [.2126, .7152, .0722],
                    [.0193, .1192, .9505]]) @ np.clip(rgb, 0, 1) / (.9505, 1, 1.089)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787*xyz + 16/116)
    return np.array([116*y - 16, 500*(x - y), 200*(y - z)])

def apart(a, b, eye): return np.linalg.norm(lab(EYES[eye] @ linear(a)) - lab(EYES[eye] @ linear(b)))

def test_the_measures_themselves():
    assert contrast(WHITE, '#000000') == pytest.approx(21) and contrast(WHITE, WHITE) == 1
    for m in EYES.values(): assert m.sum(1) == pytest.approx(1, abs=1e-5)  # white stays white
    assert apart('#ff0000', '#008000', 'most') > 100
    assert apart('#b0a000', '#d08000', 'deuteranopia') < apart('#b0a000', '#d08000', 'most')

@pytest.mark.parametrize('name', colors)
def test_colours_stand_out_on_both_backgrounds(name): assert min(contrast(colors[name], b) for b in (WHITE, DARK)) >= 3

@pytest.mark.parametrize('eye', EYES)
def test_colours_used_together_stay_apart(eye):
    pairs = [*itertools.combinations(('blue', 'orange', 'green'), 2), ('blue', 'grey'), ('orange', 'grey')]
    assert min(apart(colors[a], colors[b], eye) for a,b in pairs) > 20

def drawn_colours(axs):
    "Colours of lines and of text"
    for ax in axs:
        yield from (l.get_color() for l in ax.lines)
        yield from (t.get_color() for t in [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels(),
                                            *ax.get_yticklabels()])
        if ax.get_legend(): yield from (t.get_color() for t in ax.get_legend().get_texts())


# Whatever draws

def weight(): return nn.Conv2d(3, 4, 3).weight.detach()

draws = dict(
    schedule      = lambda cb, ax: agp.plot(90, ax=ax),
    report        = lambda cb, ax: cb.report.plot(ax),
    mask          = lambda cb, ax: conv_masks(4, 3, 3, 3).plot('conv.weight', ax),
    granularity   = lambda cb, ax: plot_granularity(nn.Conv2d(2, 2, 2), 'filter', ax=ax),
    layers        = lambda cb, ax: cb.plot_layers(ax),
    weights       = lambda cb, ax: plot_weights(weight(), weight() > 0, ax),
    filters       = lambda cb, ax: plot_filters(weight(), axs=ax)[0])
several = dict(
    callback      = lambda cb, axs: cb.plot(axs),
    model         = lambda cb, axs: plot_weights(cb.sparsifier.model, cb.sparsifier.masks, axs),
    before_after  = lambda cb, axs: plot_filters(weight(), weight(), axs=axs))

@pytest.mark.parametrize('kind', draws)
def test_given_axes_are_drawn_on(kind, trained):
    fig, ax = plt.subplots()
    assert draws[kind](trained[1], ax) is ax and plt.get_fignums() == [fig.number] and ax.has_data() | bool(ax.patches)

@pytest.mark.parametrize('kind', several)
def test_given_axes_of_several_are_drawn_on(kind, trained):
    fig, axs = plt.subplots(1, 3)
    got = several[kind](trained[1], axs)
    assert isinstance(got, np.ndarray) and all(a is b for a,b in zip(got, axs)) and plt.get_fignums() == [fig.number]

@pytest.mark.parametrize('kind', [*draws, *several])
def test_settings_stay_yours_and_one_figure_is_made(kind, trained):
    plt.rcParams.update({'font.size': 17, 'interactive': True})
    try:
        before = copy.deepcopy(dict(plt.rcParams))
        axs = np.ravel({**draws, **several}[kind](trained[1], None))
        assert dict(plt.rcParams) == before and len(plt.get_fignums()) == 1
        assert min(contrast(c, b) for c in drawn_colours(axs) for b in (WHITE, DARK)) >= 3
        fig = axs[0].figure
        assert to_rgb(fig.get_facecolor()) is not None and fig.get_facecolor()[3] == 0
        assert all(a.get_facecolor()[3] == 0 for a in axs)
        fig.savefig(file := io.BytesIO(), format='png')
        assert 1000 < len(file.getvalue()) < 60_000
    finally: plt.rcParams.update(matplotlib.rcParamsDefault | {'backend': 'agg'})

@pytest.mark.parametrize('kind', ['weights', 'filters', 'mask'])
def test_a_failure_puts_settings_back(kind):
    before = dict(plt.rcParams)
    wrong  = dict(weights=lambda: plot_weights(torch.randn(3), torch.ones(4) > 0),
                  filters=lambda: plot_filters(weight(), weight(), axs=plt.subplots()[1]),
                  mask=lambda: conv_masks(2, 2).plot('c'))
    with pytest.raises((ValueError, KeyError)): wrong[kind]()
    assert dict(plt.rcParams) == before and len(plt.get_fignums()) == (kind == 'filters')  # the one that was given


@pytest.mark.parametrize('draw, message', [
    (lambda: plot_weights(None),
     '`weights` must be a tensor, a model, or tensors by name; got NoneType'),
    (lambda: plot_weights([torch.randn(3)]),                       'got list'),
    (lambda: plot_weights(nn.Linear(2, 3), torch.ones(3, 2) > 0),  '`masks` must be by name, got Tensor'),
    (lambda: plot_weights(torch.tensor([1., math.nan])),           'NaN or infinite'),
    (lambda: plot_weights(torch.randn(3), bins=0),                 '`bins` must be a whole number from 1, got 0'),
    (lambda: plot_filters(nn.Conv2d(3, 4, 3), n=-1),               '`n` must be a whole number from 1, got -1'),
    (lambda: plot_filters(nn.Conv2d(3, 4, 3), channels=2.5),       '`channels` must be a whole number from 1, got 2.5'),
    (lambda: plot_filters(nn.Conv2d(3, 4, 3).weight * math.inf),   'NaN or infinite')])
def test_wrong_arguments(draw, message):
    with pytest.raises((TypeError, ValueError), match=message): draw()
    assert not plt.get_fignums()


# What each one shows

def test_schedule():
    line, = agp.plot(90).lines
    assert list(line.get_ydata()) == [agp.sparsity(i/1000, 90) for i in range(1001)] and line.get_xdata()[500] == 50

def test_report():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 3))
    net[0].weight.data[:2] = 0
    net[1].weight.data[:, :3] = 0
    bars = report_tensors(net.state_dict()).plot().containers
    assert {c.get_label(): [b.get_width() for b in c] for c in bars} == dict(zero=[18, 108], kept=[54, 180])
    assert [b.get_x() for b in bars[1]] == [18, 108]  # side by side, so that neither covers the other

def test_granularity():
    ax = plot_granularity(nn.Conv2d(2, 3, 2), 'kernel', group=1)
    on = [p for p in ax.patches if p.get_facecolor()[3] == 1]
    assert len(ax.patches) == 24 and len(on) == 4 and ax.get_title() == 'kernel\n6 × 4'
    assert len(plot_granularities(nn.Linear(3, 2)).axes) >= len(Granularities.allowed_granularities(nn.Linear))

def tiles(mask):
    "Naive: one weight at a time"
    out, inp, h, w = mask.shape
    t = np.full((out*(h+1)-1, inp*(w+1)-1), np.nan)
    for o,i,y,x in itertools.product(*map(range, mask.shape)): t[o*(h+1) + y, i*(w+1) + x] = mask[o, i, y, x]
    return t

@pytest.mark.parametrize('shape', [(5, 3, 3, 3), (1, 1, 2, 4), (7, 2, 1, 3)])
def test_mask_of_a_convolution(shape):
    masks = conv_masks(*shape)
    ax, mask = masks.plot('conv.weight'), masks['conv.weight']
    assert np.array_equal(image(ax), tiles(mask), equal_nan=True)
    assert f'{masks.n_dropped} of {mask.numel()} dropped ({masks.sparsity:.2f}%)' in ax.get_title()

@pytest.mark.parametrize('shape,seen', [((6,), (1, 6)), ((4, 7), (4, 7)), ((4, 7, 1, 1), (4, 7)),
                                        ((4, 7, 3), (4*2-1, 7*4-1)),
                                        ((2, 3, 2, 4, 5), (2*9-1, 3*6-1)), ((), (1, 1))])
def test_masks_of_other_shapes(shape, seen):
    masks = Masks({'w': torch.rand(shape) < 0.5})
    got = image(masks.plot('w'))
    assert got.shape == seen and np.nansum(got) == masks.n - masks.n_dropped and (~np.isnan(got)).sum() == masks.n

def test_a_large_mask_is_drawn_in_a_second():
    masks = conv_masks(512, 512, 3, 3)
    masks.plot('conv.weight').figure.canvas.draw()  # fonts are loaded once
    plt.close('all')
    start = time.process_time()
    ax = masks.plot('conv.weight')
    ax.figure.canvas.draw()
    assert time.process_time() - start < 1 and image(ax).sum() == masks.n - masks.n_dropped

def test_an_unknown_mask_names_the_nearest():
    with pytest.raises(KeyError, match="Did you mean 'conv.weight'"): conv_masks(2, 2, 3, 3).plot('conv.wieght')

def test_filters():
    before = torch.randn(20, 5, 3, 3)
    after  = before * (before.abs() > 0.7)
    a, b = plot_filters(before, after, n=6, channels=2)
    for ax,w in ((a, before), (b, after)):
        assert np.array_equal(image(ax), tiles(w[:6, :2].transpose(0, 1)).astype(np.float32), equal_nan=True)
    limit = float(before[:6, :2].abs().max())
    assert a.images[0].get_clim() == b.images[0].get_clim() == pytest.approx((-limit, limit))
    assert b.get_title() == f'after: {int((after[:6, :2] == 0).sum())} of 108 weights are zero'
    assert a.get_title().startswith('before: 0 of')
    assert len(plot_filters(nn.Conv2d(3, 4, 3))) == 1
    with pytest.raises(TypeError, match='must be a convolution'): plot_filters(nn.Linear(3, 4))
    with pytest.raises(ValueError, match='shape of `before`'):    plot_filters(before, before[:3])

def histogram(ax):
    "Label → weights, read back from the steps; kept ones stand on the dropped"
    found = {}
    for p in ax.patches:
        values, edges, base = p.get_data()
        found[p.get_label()] = int((values - (0 if base is None else base)).sum())
    return found

def lines_at(ax): return sorted(l.get_xdata()[0] for l in ax.lines if len(l.get_xdata()))

def test_weights_and_their_threshold():
    w = torch.tensor([-3., -2., -1., 0.5, 1.5, 2.5, 3.5, 0.])
    ax = plot_weights(w, w.abs() > 1.2)
    assert histogram(ax) == dict(dropped=2, kept=5) and lines_at(ax) == [-1.5, 1.5]
    assert ax.get_title() == '3 of 8 dropped (37.50%)'
    assert 'zero: 1' in [t.get_text() for t in ax.get_legend().get_texts()]
    ax = plot_weights(w * (w.abs() > 1.2))  # after it was applied
    assert histogram(ax) == dict(kept=5) and lines_at(ax) == [-1.5, 1.5]
    overlapping = w != -3.  # the largest but one goes: no threshold
    assert lines_at(plot_weights(w, overlapping)) == [] and lines_at(plot_weights(w, w > -9)) == []

def test_weights_of_several_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.Linear(3, 2))
    before = {k: v.clone() for k,v in model.state_dict().items()}
    sp = Sparsifier(model, 'weight', 'global')
    sp.sparsify_model(70)
    axs = plot_weights(before, sp.masks)
    assert [ax.get_title().split('\n')[0] for ax in axs] == ['0', '2']
    assert sum(histogram(ax)['dropped'] for ax in axs) == sp.masks.n_dropped
    for ax,(k,m) in zip(axs, sp.masks.items()): assert lines_at(ax)[1] == pytest.approx(float(before[k][m].abs().min()))
    assert [ax.get_title().split('\n')[0] for ax in plot_weights(model)] == ['0', '2', '3']
    with pytest.raises(ValueError, match="Did you mean '0.weight'"): plot_weights(model, {'0.wight': m})
    with pytest.raises(ValueError, match='got 1 axes'): plot_weights(model, ax=plt.subplots()[1])
    with pytest.raises(ValueError, match='no weights to draw'): plot_weights(nn.ReLU())

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_dtypes(dtype):
    w = torch.randn(4, 3, 3, 3).to(dtype)
    assert histogram(plot_weights(w, w > 0)) == dict(kept=int((w > 0).sum()), dropped=int((w < 0).sum()))
    assert len(plot_filters(w, w)) == 2


# The callback's history

def xy(line): return list(line.get_xdata()), list(line.get_ydata())

def test_history_is_counted():
    learn, cb, seen = learner(), SparsifyCallback(80, context='global', schedule='lin', verbose=False), []
    learn.fit(4, 1e-2, cbs=[cb, spy('after_validate', lambda: seen.append(zeros(learn.model)))])
    assert [h['asked'] for h in cb.history] == [20, 40, 60, 80]
    for h,z in zip(cb.history, seen):
        assert h['layers'] == {k: 100*n/t for k,n,t in zip(cb.sparsifier.masks, z, (36, 288, 1152))}
        assert h['sparsity'] == 100*sum(z)/1476

def test_asked_of_layers_is_weighted():
    learn, cb = learner(), SparsifyCallback([25, 50, 75], schedule='one_shot', verbose=False)
    learn.fit(2, 1e-2, cbs=cb)
    assert [h['asked'] for h in cb.history] == pytest.approx([100*(9 + 144 + 864)/1476]*2)
    assert cb.history[-1]['sparsity'] == pytest.approx(cb.history[-1]['asked'])

def test_callback(trained):
    learn, cb = trained
    axs = cb.plot()
    assert [ax.get_title() for ax in axs] == ['sparsity (%)', 'loss', 'accuracy']
    asked, counted = axs[0].lines
    assert xy(asked)   == ([0, 1, 2, 3], [h['asked'] for h in cb.history])
    assert xy(counted) == ([0, 1, 2, 3], [h['sparsity'] for h in cb.history])
    assert counted.get_ydata()[-1] == measured(learn.model)
    train, valid, metric = *axs[1].lines, *axs[2].lines
    assert [xy(l)[1] for l in (train, valid, metric)] == [[v[i] for v in learn.recorder.values] for i in range(3)]

@pytest.mark.parametrize('kwargs, of', [(dict(granularity='filter', context='global'), 'filters'),
                                        (dict(granularity=(1,), context='global'), 'groups'),
                                        (dict(context='global', budget='flops'), 'multiply-adds'),
                                        (dict(granularity='filter', coupled=True), 'channels')])
def test_what_is_asked_of_other_things_than_weights(kwargs, of):
    "40 % of the filters need not be 40 % of the weights"
    learn, cb = learner(), SparsifyCallback(40, verbose=False, **kwargs)
    learn.fit(1, 1e-2, cbs=cb)
    asked, counted = cb.plot()[0].lines
    assert (asked.get_label(), counted.get_label()) == (f'requested, of {of}', 'measured, of weights')
    assert asked.get_ydata()[-1] == 40 and counted.get_ydata()[-1] == cb.history[-1]['sparsity']

def test_layers(trained):
    learn, cb = trained
    ax, n = cb.plot_layers(), (36, 288, 1152)
    got = image(ax)
    assert got.shape == (3, 4) and list(got[:, -1]) == [100*z/k for z,k in zip(zeros(learn.model), n)]
    assert [t.get_text() for t in ax.get_yticklabels()] == ['0', '3', '6'] and ax.images[0].get_clim() == (0, 100)

def test_a_second_fit_and_before_any():
    learn, cb = learner(), SparsifyCallback(80, schedule='lin', verbose=False)
    for f in (cb.plot, cb.plot_layers):
        with pytest.raises(ValueError, match='no epoch of a `fit`'): f()
    learn.fit(2, 1e-2, cbs=cb)
    learn.fit(3, 1e-2, cbs=cb)
    asked, counted = cb.plot()[0].lines
    assert list(asked.get_ydata()) == pytest.approx([80/3, 160/3, 80])
    assert list(counted.get_ydata()) == [measured(learn.model)]*3

def stop(learn, at, error):
    def f():
        if learn.epoch == at: raise error
    return f

@pytest.mark.parametrize('error', [KeyboardInterrupt, CancelFitException, RuntimeError('stop')], ids=repr)
@pytest.mark.parametrize('live', [False, True])
def test_an_interrupted_fit_is_plotted(error, live):
    learn, cb = learner(), SparsifyCallback(80, schedule='lin', live=live, verbose=False)
    try: learn.fit(4, 1e-2, cbs=[cb, spy('before_batch', stop(learn, 2, error))])
    except (KeyboardInterrupt, RuntimeError): pass
    assert plt.get_fignums() == []
    axs = cb.plot()
    assert [len(l.get_xdata()) for ax in axs for l in ax.lines] == [2]*5 and image(cb.plot_layers()).shape == (3, 2)

def test_train_metrics_and_a_fit_without_recorder():
    learn = learner()
    learn.recorder.train_metrics = True
    cb = SparsifyCallback(80, verbose=False)
    learn.fit(2, 1e-2, cbs=cb)
    axs = cb.plot()
    assert [(ax.get_title(), [l.get_label() for l in ax.lines]) for ax in axs[1:]] == [
        ('loss', ['train', 'valid']), ('accuracy', ['train', 'valid'])]
    learn, cb = learner(), SparsifyCallback(80, verbose=False)
    learn.remove_cbs([c for c in learn.cbs if isinstance(c, (Recorder, ProgressCallback))])
    learn.fit(2, 1e-2, cbs=cb)
    assert [ax.get_title() for ax in cb.plot()] == ['sparsity (%)']

@pytest.mark.parametrize('event', ['after_validate', 'after_epoch'])
def test_a_resumed_fit_plots_all_epochs(event, tmp_path):
    whole, a = learner(path=tmp_path), SparsifyCallback(80, verbose=False)
    whole.fit(4, 1e-2, cbs=[a, spy(event, lambda: whole.save(f'e{whole.epoch}'), order=61)])
    again, b = learner(seed=3, path=tmp_path), SparsifyCallback(80, verbose=False)
    again.load('e1')
    again.fit(4, 1e-2, start_epoch=2, cbs=b)
    assert a.history == b.history and len(b.history) == 4 and image(b.plot_layers()).shape == (3, 4)
    axs = b.plot()
    assert [xy(l)[0] for ax in axs for l in ax.lines] == [[0, 1, 2, 3]]*5
    # the validation loss; that of training is a running mean, begun anew
    assert xy(axs[1].lines[1]) == xy(a.plot()[1].lines[1])

def test_a_state_of_before_there_were_losses(tmp_path):
    learn, cb = learner(path=tmp_path), SparsifyCallback(80, verbose=False)
    learn.fit(3, 1e-2, cbs=[cb, spy('after_epoch', lambda: learn.save(f'e{learn.epoch}'), order=61)])
    again, old = learner(path=tmp_path), SparsifyCallback(80, verbose=False)
    again.load('e1')
    del again._loaded_states[0]['logged']
    again.fit(3, 1e-2, start_epoch=2, cbs=old)
    assert [len(l.get_xdata()) for ax in old.plot() for l in ax.lines] == [3, 3, 1, 1, 1]


# Live

def test_live_is_checked():
    with pytest.raises(TypeError, match='live'): SparsifyCallback(80, live='yes')

def test_in_a_terminal_live_changes_nothing(capsys):
    out = []
    for live in (False, True):
        learn = learner()
        learn.recorder.add_time = False
        learn.fit(3, 1e-2, cbs=SparsifyCallback(80, live=live))
        out.append(capsys.readouterr())
    assert out[0] == out[1] and 'Final Sparsity' in out[0].out and plt.get_fignums() == []

in_notebook = ['from fasterai_clone.core.all import *', 'ax = agp.plot()', 'ax = dsd.plot()',
'''import matplotlib.pyplot as plt
from fastai.callback.all import *
from helpers import learner, spy
from fasterai_clone.sparse.all import *
learn, cb = learner(), SparsifyCallback(80, live=True, verbose=False)
def stop():
    if learn.epoch == 2: raise KeyboardInterrupt''',
'learn.fit(3, 1e-2, cbs=cb)', 'print(plt.get_fignums(), cb.past.shown)',
'learn.fit(2, 1e-2, cbs=SparsifyCallback(80, verbose=False))',
'''try: learn.fit(3, 1e-2, cbs=[cb, spy('before_batch', stop)])
except KeyboardInterrupt: print(plt.get_fignums())''',
'''with learn.added_cbs(cb): learn.get_preds(), learn.validate(), learn.lr_find(num_it=5, show_plot=False)
assert not any(type(c).__name__ == 'Late' for c in learn.cbs)''', 'axs = cb.plot()']

def test_in_a_notebook(monkeypatch, tmp_path):
    """The first figure does not keep the next ones from being shown; a live one is drawn again in its place, and not by
    what is no training"""
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(root), str(root/'tests'), os.environ.get('PYTHONPATH', '')]))
    monkeypatch.setenv('PYTHONWARNINGS', 'ignore')
    monkeypatch.delenv('MPLBACKEND', raising=False)  # else the kernel does not draw inline
    nb, sent = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in in_notebook]), []
    class Client(NotebookClient):
        def process_message(self, msg, cell, cell_index):
            sent.append((cell_index, msg['msg_type'], 'image/png' in msg['content'].get('data', {})))
            return super().process_message(msg, cell, cell_index)
    Client(nb, timeout=120, kernel_name='python3', resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    def count(kind): return {i: n for i in range(len(nb.cells)) if (n := sent.count((i, kind, True)))}
    assert [sum('image/png' in o.get('data', {}) for o in c.outputs) for c in nb.cells] == [
        0, 1, 1, 0, 1, 0, 0, 1, 0, 1]
    assert count('display_data') == {1: 1, 2: 1, 4: 1, 7: 1, 9: 1} and count('update_display_data') == {4: 2, 7: 1}
    assert nb.cells[5].outputs[0].text == '[] None\n' and nb.cells[7].outputs[-1].text == '[]\n'
    assert not [o for c in nb.cells for o in c.outputs if o.get('name') == 'stderr']

def test_importing_draws_nothing_in():
    "matplotlib is imported by what draws"
    code = '''if True:
        import sys, fasterai_clone.sparse.plots
        from fasterai_clone.core.all import *
        from fasterai_clone.sparse.report import *
        print("matplotlib" in sys.modules)'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == 'False', done.stderr
