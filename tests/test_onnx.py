"""Exported files compute what the model computes, for other data and other batch sizes; what is reported was counted in
the file"""
import copy, os, pickle, signal, subprocess, sys, warnings

import numpy as np, pytest, torch, torch.nn as nn

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime'), pytest.importorskip('onnxscript')

from fasterai_clone.analyze.compare import compare
from fasterai_clone.export import onnx_files
from fasterai_clone.export.all import OpenVino, export_onnx, latencies, save_sparse, sparse_layers
from fasterai_clone.export.onnx_counts import file_weights
from fasterai_clone.export.onnx_inputs import export_inputs, other_inputs
from fasterai_clone.model.flops import multiply_adds
from fasterai_clone.prune.thin import thin
from fasterai_clone.sparse.sparsifier import Sparsifier

def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Flatten(),
                         nn.Linear(4*8*8, 10)).eval()

x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))

def masked(model, sparsity=90, **kwargs):
    Sparsifier(model, **{'layer_type': (nn.Conv2d, nn.Linear), **kwargs}).sparsify_model(sparsity)
    return model

def zeros_of(model): return sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1)

def agrees(exported, model, *args, **kwargs):
    "The file computes what the model does"
    with torch.no_grad(): out = model(*args, **kwargs)
    out = out if isinstance(out, torch.Tensor) else out[0]
    torch.testing.assert_close(exported(*args, **kwargs)[0], out, rtol=1e-3, atol=1e-4)


# What is counted

@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    "A masked network, and its file from the exporter that traces"
    net = masked(small_net())
    return net, export_onnx(net, x, tmp_path_factory.mktemp('onnx')/'net', exporter='torchscript', int8=True)

def test_counts_are_those_of_the_file(plain):
    net, exported = plain
    assert exported.file.name == 'net.onnx' and exported.nbytes == exported.file.stat().st_size
    arrays = [onnx.numpy_helper.to_array(t) for t in onnx.load(str(exported.file)).graph.initializer]
    assert exported.zeros == sum(int((a == 0).sum()) for a in arrays if a.ndim > 1) == zeros_of(net)
    assert exported.weights == sum(p.numel() for p in net.parameters() if p.ndim > 1)
    assert exported.multiply_adds == multiply_adds(net, x).total and not exported.uncounted

def test_multiply_adds_by_hand(plain):
    "8·6·6 outputs of 27, 8·4·4 of 36, 8·4·4 inputs to 4·2·2 each, 256·10"
    assert plain[1].multiply_adds == 8*36*27 + 8*16*36 + 8*16*16 + 2560

def test_zeros_survive_int8(plain):
    "Counted again in the quantized file: weights that are zero are the zero point"
    net, exported = plain
    small = exported.int8
    model = onnx.load(str(small.file))
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    quantized = {k: a for k,a in arrays.items() if k.endswith('_quantized')}
    assert quantized and all(a.dtype == np.int8 for a in quantized.values())
    assert all((arrays[k.replace('_quantized', '_zero_point')] == 0).all() for k in quantized)
    assert small.zeros >= exported.zeros and small.file.name == 'net.int8.onnx' and small.exporter == 'int8'
    assert {k for k,(n,z) in file_weights(model).items()} >= {*quantized}
    assert small.multiply_adds == exported.multiply_adds and max(small.errors.values()) < .2

def test_unsigned_weights_have_another_zero_point(tmp_path):
    quantization = pytest.importorskip('onnxruntime.quantization')
    net = masked(nn.Sequential(nn.Linear(32, 16)), 75)
    with torch.no_grad(): net[0].weight += (net[0].weight != 0)*1.5    # so the zero point is not in the middle
    file = export_onnx(net, torch.randn(2, 32), tmp_path/'net', exporter='torchscript').file
    quantization.quantize_dynamic(str(file), str(tmp_path/'u8.onnx'), weight_type=quantization.QuantType.QUInt8)
    (n, zeros), = file_weights(onnx.load(str(tmp_path/'u8.onnx'))).values()
    assert n == 512 and 384 <= zeros < 400

def test_the_result_is_called_like_the_model(plain):
    net, exported = plain
    for n in (1, 2, 7): agrees(exported, net, torch.randn(n, 3, 6, 6))
    again = pickle.loads(pickle.dumps(exported))
    agrees(again, net, x)
    with pytest.raises(TypeError, match='needs the input'): exported()
    assert 'in the model' in str(exported) and 'net.int8.onnx' in repr(exported)


# The exporters

def test_dynamo_comes_first(tmp_path):
    net = masked(small_net())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        exported = export_onnx(net, x[:1], tmp_path/'net.onnx')
    assert exported.exporter == 'dynamo' and exported.zeros == zeros_of(net) and not exported.notes
    assert sorted(exported.errors) == [1, 2, 3]
    agrees(exported, net, torch.randn(5, 3, 6, 6))

def broken(how):
    def export(model, inputs, file):
        if how == 'raises': raise RuntimeError('no such operator')
        if how == 'wrong': model = nn.Sequential(model, nn.Hardtanh(-1e-3, 1e-3))
        if how == 'fixed batch':
            return torch.onnx.export(model, inputs.args, str(file), dynamo=False, input_names=[*inputs.tensors])
        onnx_files._torchscript(model, inputs, file)
    return export

@pytest.mark.parametrize('how', ['raises', 'wrong', 'fixed batch'])
def test_the_other_exporter_is_said_aloud(how, tmp_path, monkeypatch):
    "If the first fails, computes something else, or only takes the batch of the example"
    monkeypatch.setitem(onnx_files.EXPORTERS, 'dynamo', broken(how))
    net = small_net()
    with pytest.warns(UserWarning, match='The other exporter failed. dynamo'):
        exported = export_onnx(net, x, tmp_path/'net')
    assert exported.exporter == 'torchscript' and 'dynamo' in exported.notes[0] in str(exported)
    monkeypatch.setitem(onnx_files.EXPORTERS, 'torchscript', broken(how))
    before = exported.file.read_bytes()
    with pytest.raises(ValueError, match='dynamo: .*torchscript: '): export_onnx(net, x, tmp_path/'net')
    assert exported.file.read_bytes() == before and os.listdir(tmp_path) == ['net.onnx']

def test_the_model_stays_as_it_was(tmp_path):
    net = small_net().train()
    before, modules = copy.deepcopy(net.state_dict()), str(net)
    export_onnx(net, x, tmp_path/'net', exporter='torchscript')
    assert net.training and str(net) == modules
    assert all(torch.equal(t, before[k]) for k,t in net.state_dict().items())

def test_bad_arguments(tmp_path):
    net = small_net()
    for kwargs in (dict(exporter='dynmo'), dict(tolerance=-1), dict(example_inputs=[[x]]), dict(example_inputs={}),
                   dict(example_inputs=torch.ones(0, 3, 6, 6))):
        with pytest.raises(ValueError):
            export_onnx(**{**dict(model=net, example_inputs=x, file=tmp_path/'no'), **kwargs})
    for kwargs in (dict(model=3), dict(file=3), dict(int8=1)):
        with pytest.raises(TypeError):
            export_onnx(**{**dict(model=net, example_inputs=x, file=tmp_path/'no'), **kwargs})
    fast, _ = sparse_layers(masked(nn.Sequential(nn.Linear(8, 8))), torch.ones(1, 8), runs=3,
                            measure=lambda jobs, runs, device: {k: (float(k in ('dense',)) + 1,)*runs for k in jobs})
    with pytest.raises(ValueError, match='to_dense'): export_onnx(fast, torch.ones(1, 8), tmp_path/'no')
    assert os.listdir(tmp_path) == []

@pytest.mark.parametrize('missing', ['onnx', 'onnxruntime'])
def test_a_missing_extra_is_named(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install 'fasterai_clone\[onnx\]'"):
        export_onnx(small_net(), x, tmp_path/'net')
    assert os.listdir(tmp_path) == []


# Inputs

def test_other_data():
    ids  = torch.arange(12).reshape(3, 4)
    mask = torch.tensor([[1, 1, 1, 0]]*3)
    class Net(nn.Module):
        def forward(self, ids, mask=None, table=None, flag=False): return ids
    given = export_inputs(Net(), dict(ids=ids, mask=mask, table=torch.eye(5), flag=True))
    assert given.batched == {'ids', 'mask'} and given.others == dict(flag=True) and given.batch == 3
    for n in (1, 5):
        other = other_inputs(given, n, seed=n).tensors
        assert other['ids'].shape == (n, 4) and other['mask'].sum(1).tolist() == [3]*n
        assert all(sorted(r) in ids.tolist() for r in other['ids'].tolist())
        assert torch.equal(other['table'], torch.eye(5))
    assert [*export_inputs(Net(), (ids, mask)).tensors] == ['ids', 'mask']


# Models of others; the exporter that traces is quick, and dynamo is tested on some

def test_resnet18_masked_and_thinned(tmp_path):
    models = pytest.importorskip('torchvision.models')
    torch.manual_seed(0)
    net, x = masked(models.resnet18().eval()), torch.randn(2, 3, 64, 64)
    exported = export_onnx(net, x, tmp_path/'masked', exporter='torchscript')
    assert exported.zeros == zeros_of(net) > .89*exported.weights
    filters = masked(models.resnet18().eval(), 50, granularity='filter', layer_type=nn.Conv2d, coupled=True, data=x)
    small   = thin(filters, example_inputs=x)
    fewer   = export_onnx(small, x, tmp_path/'thin', exporter='torchscript')
    assert fewer.multiply_adds < .5*exported.multiply_adds and fewer.nbytes < .5*exported.nbytes
    agrees(fewer, small, torch.randn(3, 3, 64, 64))

def test_vit(tmp_path):
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    vit = masked(timm.create_model('vit_tiny_patch16_224', img_size=32, depth=1, num_classes=5).eval())
    exported = export_onnx(vit, torch.randn(2, 3, 32, 32), tmp_path/'vit', exporter='torchscript')
    assert exported.zeros >= zeros_of(vit)
    agrees(exported, vit, torch.randn(4, 3, 32, 32))

def test_unet_of_fastai(tmp_path):
    unet = pytest.importorskip('fastai.vision.models.unet')
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1),
                         nn.ReLU())
    net = masked(unet.DynamicUnet(body, 2, (16, 16)).eval())
    exported = export_onnx(net, torch.randn(2, 3, 16, 16), tmp_path/'unet')
    assert exported.exporter == 'dynamo' and not exported.notes and exported.zeros == zeros_of(net)
    agrees(exported, net, torch.randn(3, 3, 16, 16))
    assert type(net.layers[-1]).__name__ == 'ToTensorBase'

def test_modules_that_change_the_class_of_a_tensor(tmp_path):
    "The numbers are the same, so dynamo does without them; what does more stays, and the model as it was"
    class Kind(torch.Tensor): pass
    class Wrap(nn.Module):
        def forward(self, x): return x.as_subclass(Kind)
    class Double(nn.Module):
        def forward(self, x): return (2*x).as_subclass(Kind)
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.once, self.again, self.more = nn.Linear(3, 3), Wrap(), Wrap(), Double()
        def forward(self, x): return self.more(self.again(self.once(self.again(self.a(x))).as_subclass(torch.Tensor)))
    net, given = Twice(), torch.randn(2, 3)
    inputs = export_inputs(net, given)
    assert onnx_files.changers_of_class(net, inputs) == {net.again}  # `once` gets what is of that class already
    small = nn.Sequential(nn.Linear(3, 2), Wrap(), nn.Flatten())
    exported = export_onnx(small, given, tmp_path/'net', exporter='dynamo')
    assert type(small[1]) is Wrap and not small[1]._forward_hooks
    agrees(exported, small[0], given)

def test_a_model_too_large_for_a_file_is_refused_at_once(tmp_path):
    "Before it is copied: these weights are never touched"
    net = nn.Embedding(2**22, 128, _weight=torch.empty(2**22, 128))
    with pytest.raises(ValueError, match='2,147,483,648 bytes of weights.*external_data=True'):
        export_onnx(net, torch.ones(2, 3, dtype=torch.long), tmp_path/'net')
    assert os.listdir(tmp_path) == []

def test_bert(tmp_path):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=64)
    bert = masked(transformers.BertForSequenceClassification(config).eval())
    ids  = dict(input_ids=torch.randint(50, (2, 7)), attention_mask=torch.tensor([[1]*7, [1]*5 + [0]*2]))
    exported = export_onnx(bert, ids, tmp_path/'bert', exporter='torchscript')
    assert exported.zeros == zeros_of(bert)
    agrees(exported, bert, **{k: t.repeat(2, 1)[:3] for k,t in ids.items()})


# Beside the rest

def test_openvino_and_latencies(plain):
    pytest.importorskip('openvino')
    net, exported = plain
    run = OpenVino(exported.file)
    with torch.no_grad(): torch.testing.assert_close(run(x)[0], net(x), rtol=1e-2, atol=1e-3)
    assert run(torch.randn(5, 3, 6, 6))[0].shape == (5, 10) and 'net.onnx' in repr(run)
    seconds = latencies({'torch': net, 'ONNX Runtime': exported, 'OpenVINO': run}, x, runs=3)
    assert [*seconds] == ['torch', 'ONNX Runtime', 'OpenVINO'] and min(map(min, seconds.values())) > 0
    compressed = OpenVino(exported.int8.file, threads=1, sparse_rate=.5)
    assert compressed(x)[0].shape == (2, 10) and '50%' in repr(compressed)
    for kwargs,error in ((dict(file='no.onnx'), FileNotFoundError), (dict(sparse_rate=50), ValueError),
                         (dict(threads=0), ValueError)):
        with pytest.raises(error): OpenVino(**{**dict(file=exported.file), **kwargs})
    for bad in ({}, [net], {'a': 3}):
        with pytest.raises(TypeError): latencies(bad, x)

@pytest.mark.skipif(not hasattr(signal, 'SIGUSR1'), reason='signals of this kind are not sent here')
def test_signals_after_openvino(plain):
    "Two compiled models, deleted in the order they were made in; the next signal is handled, and kills nobody"
    pytest.importorskip('openvino')
    code = f'''if True:
        import faulthandler, gc, os, signal
        faulthandler.enable()  # as pytest does: gives signal handlers memory of their own
        from fasterai_clone.export.openvino import OpenVino
        models = [OpenVino({str(plain[1].file)!r}) for _ in range(2)]
        while models:
            del models[0]
            gc.collect()
        signal.signal(signal.SIGUSR1, lambda *args: print('handled'))
        os.kill(os.getpid(), signal.SIGUSR1)'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, 'handled\n'), done.stderr[-2000:]

def test_openvino_missing(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, 'openvino', None)
    with pytest.raises(ImportError, match=r"pip install 'fasterai_clone\[openvino\]'"): OpenVino(plain[1].file)

def test_compare_shows_files_and_runners(plain, tmp_path):
    net, exported = plain
    file = save_sparse(net, tmp_path/'net')
    c = compare(small_net(), net, x, runs=2, devices=[], files={'Sparse file': file},
                runners={'ONNX Runtime': exported})
    assert c.files == {'Sparse file': file.stat().st_size} and len(c.runners['ONNX Runtime'][1]) == 2
    text = str(c)
    assert 'Sparse file' in text and 'Latency, ONNX Runtime' in text and 'with ONNX Runtime' in c.expect
    costs = c.to_pandas('costs').set_index('cost')
    assert costs.loc['Sparse file', 'after'] == file.stat().st_size
    assert costs.loc['Sparse file', 'before'] == c.before.file and costs.loc['Latency, ONNX Runtime', 'after'] > 0
    assert [*compare(net, net, x, devices=[], files=file).files] == [f'File {file.name}']
    assert len(c.plot()) == 2
    for kwargs,error in ((dict(files='no.file'), FileNotFoundError), (dict(runners=[net]), TypeError),
                         (dict(runners={'a': 3}), TypeError)):
        with pytest.raises(error): compare(net, net, x, devices=[], **kwargs)

def test_compare_measures_nothing_more_by_default(plain):
    c = compare(plain[0], plain[0], x, devices=[])
    assert not c.files and not c.runners and not c.pairs
