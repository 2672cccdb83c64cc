"Sparse files: every bit comes back, they are as small as they can be, and what is damaged is refused"
import copy, itertools, json, math, os, random, signal, subprocess, sys, time, zlib
from functools import cache, partial
from pathlib import Path

import numpy as np, pytest, torch, torch.nn as nn
from safetensors.torch import save_file

from fasterai_clone.core.envelope import read_file
from fasterai_clone.core.masks import Masks
from fasterai_clone.export import streams
from fasterai_clone.export.all import load_sparse, save_sparse, sparse_masks
from fasterai_clone.sparse.sparsifier import Sparsifier
from test_files_from_anywhere import (DAMAGES, change_entries, change_metadata, joined, memory_limit, outcome,
                                      outcomes, parts)

root = Path(__file__).resolve().parent.parent
zstd = pytest.importorskip('zstandard')


# A reader of 30 lines, which knows the page of the format and nothing of this library

def read_sparse(file):
    data = Path(file).read_bytes()
    n = int.from_bytes(data[:8], 'little')
    header, data = json.loads(data[8:8+n]), data[8+n:]
    about = header.pop('__metadata__')
    coded = {name: entry for name,*entry in map(json.loads, about['coded'].splitlines())}
    plain = {k: (e['dtype'], e['shape']) for k,e in header.items()}
    return {k: read_tensor(data[slice(*e['data_offsets'])], *(plain | coded)[k]) for k,e in header.items()}, about

def read_tensor(data, dtype, shape, cut=(), pattern=('all',), kept=None, rotate=None, streams=()):
    size, found, at = dict(F64=8, I64=8, C64=8, F32=4, I32=4, F16=2, BF16=2, I16=2).get(dtype, 1), [], 0
    for stored,*codec in streams or [[len(data)]]:
        s, at = data[at:at+stored], at + stored
        if codec: s = zstd.ZstdDecompressor().decompress(s) if codec[1] == 'zstd' else zlib.decompress(s, -15)
        found.append(np.frombuffer(s, np.uint8))
    index = [np.arange(s) for s in shape]
    for axis,_ in cut: index[axis] = np.flatnonzero(np.unpackbits(found.pop(0)))
    (name, *args), box = pattern, [len(i) for i in index]
    if name == 'all': where = np.arange(math.prod(box))
    if name == 'bits': where = np.flatnonzero(np.unpackbits(found.pop(0)))
    if name == 'gaps':
        high = np.diff(np.flatnonzero(np.unpackbits(found.pop(0))), prepend=-1) - 1
        low  = np.unpackbits(found.pop(0))[:kept*args[0]].reshape(kept, args[0]) @ (1 << np.arange(args[0])[::-1])
        where = np.cumsum((high << args[0]) + low + 1) - 1
    if name == 'nofm':
        (n, m, axis), base, grid = args, math.comb(*args[1::-1]), np.arange(math.prod(box))
        grid  = np.moveaxis(grid.reshape(*box[:axis], -1, m, *box[axis+1:]), axis + 1, -1).reshape(-1, m)
        digit = [int(w) // base**i % base for w in found.pop(0).view('<u8') for i in range(int(64 / math.log2(base)))]
        where = np.take_along_axis(grid, np.array([*itertools.combinations(range(m), n)])[digit[:len(grid)]], 1).ravel()
    words = (found[0] if rotate is None else np.stack(found, 1).ravel()).view(f'<u{size}')
    if rotate: words = words >> words.dtype.type(rotate) | words << words.dtype.type(8*size - rotate)
    inside, whole = np.zeros(math.prod(box), words.dtype), np.zeros(shape, words.dtype)
    inside[where] = words
    whole[np.ix_(*index)] = inside.reshape(box)
    return whole


# Tensors and models

def bits(t):
    "The bits of a tensor, as an array of its shape"
    t = t.detach().resolve_conj().resolve_neg().contiguous()
    if not t.numel(): return np.zeros(tuple(t.shape), f'<u{t.itemsize}')
    return t.flatten().view(torch.uint8).numpy().view(f'<u{t.itemsize}').reshape(tuple(t.shape))

def same_bits(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(bits(a[k]), bits(b[k])) for k in a)

def check_round_trip(state, folder, **kwargs):
    "Save and load `state`, also with the reader above. Returns the file"
    file = save_sparse(state, folder/'model', **kwargs)
    back = load_sparse(file)
    assert same_bits(state, back) and all(back[k].shape == t.shape for k,t in state.items())
    theirs, about = read_sparse(file)
    tied = json.loads(about.get('tied', '{}'))
    assert {*theirs, *tied} == {*state}
    for k,words in theirs.items(): assert np.array_equal(words.reshape(-1), bits(state[k]).reshape(-1)), k
    assert file.stat().st_size <= dense_size(state, folder) + 1024
    return file

def dense_size(state, folder):
    "Bytes of a safetensors file of `state`"
    save_file({k: t.detach().resolve_conj().resolve_neg().clone().contiguous() for k,t in state.items()},
              folder/'dense')
    return (folder/'dense').stat().st_size

codecs = pytest.mark.parametrize('codec', ['zstd', 'deflate'])
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8,
          torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]

def random_state(dtype, seed=0):
    "Tensors of many shapes and kinds of zeros, of random bits"
    rng, state = np.random.default_rng(seed), {}
    size = torch.empty(0, dtype=dtype).itemsize
    shapes = ((), (0,), (3, 0, 2), (1,), (7,), (300,), (65, 33), (1, 64), (64, 1), (16, 32, 3, 3), (8, 12, 2, 2, 2),
              (9, 48))
    for shape in shapes:
        n = math.prod(shape)
        for share in (0, .01, .1, .5, 1):
            words = rng.integers(0, 256, (n, size), dtype=np.uint8)
            if dtype is torch.bool: words = np.ones_like(words)
            words[rng.random(n) >= share] = 0
            if n: state[f'{shape} {share}'] = torch.from_numpy(words.reshape(-1)).view(dtype).reshape(shape)
        if not n: state[f'{shape}'] = torch.empty(shape, dtype=dtype)
    return state

@codecs
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_every_dtype(dtype, codec, tmp_path): check_round_trip(random_state(dtype), tmp_path, codec=codec)

def test_signed_zeros_and_payloads_of_nan(tmp_path):
    words = np.array([0x00000000, 0x80000000, 0x7fc00001, 0xffc0abcd, 0x7f800001, 0x00000001, 0x3f800000], np.uint32)
    words = np.concatenate([np.tile(words, 40), np.zeros(4000, np.uint32)])
    state = {'w': torch.from_numpy(words.view(np.float32).copy())}
    check_round_trip(state, tmp_path)
    half  = {'w': torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)}
    check_round_trip(half, tmp_path)
    check_round_trip({'w': half['w'].view(torch.bfloat16)}, tmp_path)

GRANULARITIES = ['weight', 'row', 'column', 'kernel', 'filter', 'channel', 'block_4x4']

@pytest.mark.parametrize('granularity', GRANULARITIES)
def test_every_granularity(granularity, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3), nn.Flatten(),
                          nn.Linear(64, 32))
    sp = Sparsifier(model, granularity, layer_type=nn.Conv2d)
    sp.sparsify_model(70)
    file = check_round_trip(model.state_dict(), tmp_path, masks=sp.masks)
    assert sparse_masks(file) == sp.masks
    kept = sum(t.count_nonzero().item() for t in model.state_dict().values())
    assert file.stat().st_size < 4*kept + sum(t.numel() for t in model.state_dict().values())/8 + 2000

@pytest.mark.parametrize('nm', [(2, 4), (1, 4), (4, 8)], ids=str)
def test_n_of_m(nm, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Linear(256, 64))
    sp = Sparsifier(model, nm=nm, layer_type=(nn.Conv2d, nn.Linear))
    sp.sparsify_model(100*(1 - nm[0]/nm[1]))
    file = check_round_trip(model.state_dict(), tmp_path)
    assert sparse_masks(file) == sp.masks
    patterns = [json.loads(line)[4] for line in read_file(file)[0]['coded'].splitlines()]
    assert [p[:3] for p in patterns if p[0] == 'nofm'] == [['nofm', *nm]]*2

def test_views_and_devices_of_elements(tmp_path):
    "Transposed, expanded, strided and conjugate tensors, and those of a larger storage"
    base = torch.arange(600.).reshape(20, 30)
    z    = torch.view_as_complex(torch.randn(50, 2))
    check_round_trip({'t': base.T, 'e': torch.ones(1).expand(500), 's': base[::2, ::3], 'v': base[3:5], 'c': z,
                      'j': z.conj(), 'i': z.conj().imag}, tmp_path)


# Sizes

@cache
def resnet(sparsity):
    "torchvision's, with random weights"
    models = pytest.importorskip('torchvision.models')
    torch.manual_seed(0)
    sp = Sparsifier(models.resnet18(), layer_type=(nn.Conv2d, nn.Linear))
    sp.sparsify_model(sparsity)
    return sp.model, sp.masks

@pytest.mark.parametrize('sparsity, most', [(90, 4_300_000), (99, 600_000)])
def test_resnet18(sparsity, most, tmp_path):
    model, masks = resnet(sparsity)
    file = save_sparse(model, tmp_path/'model')
    assert file.stat().st_size <= most and sparse_masks(file) == masks
    assert same_bits(model.state_dict(), load_sparse(file))
    if sparsity == 99: assert save_sparse(model, tmp_path/'plain', codec='deflate').stat().st_size <= most
    assert same_bits(model.state_dict(), load_sparse(file, copy.deepcopy(resnet(0)[0])).state_dict())

@codecs
def test_what_cannot_be_made_smaller(codec, tmp_path):
    "Hundreds of tensors of random bytes, small and large, take a kilobyte more than in safetensors at most"
    rng   = np.random.default_rng(0)
    state = {f'layers.{i}.a.long.name.weight': torch.from_numpy(rng.integers(1, 256, 10 + 3*i, dtype=np.uint8))
             for i in range(900)}
    state |= {f'layers.{i}.mask': torch.from_numpy(rng.random(300 + i) < .5) for i in range(100)}
    file  = check_round_trip(state, tmp_path, codec=codec)
    assert file.stat().st_size <= dense_size(state, tmp_path) + 1024


# Models

def make_tied():
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 50, bias=False))
    model[3].weight = model[0].weight
    return model

def test_tied_weights(tmp_path):
    torch.manual_seed(0)
    model = make_tied()
    Sparsifier(model, layer_type=nn.Linear).sparsify_model(80)
    file = save_sparse(model, tmp_path/'tied')
    state = load_sparse(file)
    assert same_bits(state, model.state_dict()) and state['3.weight'] is state['0.weight']
    assert len(read_file(file)[1]) == len(state) - 1
    apart = make_tied()
    apart[3].weight = nn.Parameter(torch.randn(50, 16))
    for other in (make_tied(), apart):
        assert load_sparse(file, other) is other and same_bits(other.state_dict(), model.state_dict())
        assert other[3].weight is other[0].weight and isinstance(other[3].weight, nn.Parameter)

def test_a_model_that_ties_what_the_file_has_apart(tmp_path):
    "Is loaded if both have the same bits, and refused otherwise"
    apart = make_tied()
    apart[3].weight = nn.Parameter(apart[0].weight.detach().clone())
    assert same_bits(load_sparse(save_sparse(apart, tmp_path/'a'), make_tied()).state_dict(), apart.state_dict())
    with torch.no_grad(): apart[3].weight[0, 0] += 1
    model  = make_tied()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"b.safetensors: '0.weight' and '3.weight' are one"):
        load_sparse(save_sparse(apart, tmp_path/'b'), model)
    assert same_bits(before, model.state_dict())

class Odd(nn.Module):
    "Buffers of no dimensions, persistent and not, extra state that is a tensor, a weight that is computed"
    def __init__(self):
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))
        self.register_buffer('step', torch.tensor(7))
        self.register_buffer('scratch', torch.zeros(5), persistent=False)
        self.scale, self.extra = nn.Parameter(torch.tensor(2.5, dtype=torch.bfloat16)), torch.arange(3)
    def get_extra_state(self): return self.extra
    def set_extra_state(self, state): self.extra = state

def test_buffers_and_extra_state(tmp_path):
    model = Odd()
    model.step += 1
    model.extra = torch.arange(5)
    back = load_sparse(save_sparse(model, tmp_path/'odd'), Odd())
    assert same_bits(model.state_dict(), back.state_dict())
    assert back.extra.tolist() == [0, 1, 2, 3, 4] and back.step == 8

@pytest.mark.parametrize('wrap', [nn.DataParallel, torch.compile], ids=['DataParallel', 'compile'])
def test_wrapped_models(wrap, tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    file  = save_sparse(wrap(model), tmp_path/'w')
    assert same_bits(load_sparse(file), model.state_dict())
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    load_sparse(file, wrap(other))
    assert same_bits(other.state_dict(), model.state_dict())

def test_tensors_that_are_not_contiguous_are_loaded_into(tmp_path):
    model, other = (nn.Sequential(nn.Conv2d(8, 16, 3)).to(memory_format=torch.channels_last) for _ in range(2))
    Sparsifier(model).sparsify_model(60)
    load_sparse(save_sparse(model, tmp_path/'c'), other)
    assert torch.equal(other[0].weight, model[0].weight) and other[0].weight.stride() == model[0].weight.stride()

@pytest.mark.parametrize('name', ['mobilenet_v3_small', 'vit_tiny_patch16_224', 'bert'])
def test_models_of_others(name, tmp_path):
    if name == 'bert':
        transformers = pytest.importorskip('transformers')
        config = transformers.BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                         intermediate_size=64)
        make   = partial(transformers.BertForMaskedLM, config)
    elif name.startswith('vit'): make = partial(pytest.importorskip('timm').create_model, name)
    else: make = getattr(pytest.importorskip('torchvision.models'), name)
    torch.manual_seed(0)
    sp = Sparsifier(make(), layer_type=(nn.Conv2d, nn.Linear))
    sp.sparsify_model(90)
    file = save_sparse(sp.model, tmp_path/'m', masks=sp.masks)
    assert same_bits(sp.model.state_dict(), load_sparse(file, make()).state_dict()) and sparse_masks(file) == sp.masks
    share = .4 if name == 'bert' else .25  # embeddings are dense
    assert file.stat().st_size < share*dense_size(sp.model.state_dict(), tmp_path)

def test_what_cannot_be_saved(tmp_path):
    meta = nn.Linear(2, 2, device='meta')
    with pytest.raises(ValueError, match='no shape yet'): save_sparse(nn.LazyLinear(2), tmp_path/'no')
    for model,error in ((meta, ValueError), ({'a': torch.ones(3).to_sparse()}, ValueError), ({'a': 3}, TypeError),
                        (3, TypeError), ({1: torch.ones(2)}, TypeError),
                        ({'a': torch.ones(2, dtype=torch.complex128)}, ValueError)):
        with pytest.raises(error): save_sparse(model, tmp_path/'no')
    with pytest.raises(ValueError, match='codec'): save_sparse(nn.Linear(2, 2), tmp_path/'no', codec='rar')
    assert list(tmp_path.iterdir()) == []

def test_a_model_of_another_kind_is_refused_and_stays_as_it_was(tmp_path):
    file = save_sparse(nn.Sequential(nn.Linear(8, 8)), tmp_path/'m')
    for other in (nn.Sequential(nn.Linear(8, 9)), nn.Sequential(nn.Linear(8, 8).double()),
                  nn.Sequential(nn.Linear(8, 8, bias=False)), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match='m.safetensors'): load_sparse(file, other)
        assert same_bits(before, other.state_dict())
    with pytest.raises(TypeError): load_sparse(file, 3)
    with pytest.raises(FileNotFoundError): load_sparse(tmp_path/'other')


# Masks

def test_masks_are_saved_exactly(tmp_path):
    "Also where a kept weight is zero, everything is kept, or nothing"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 40))
    masks = Masks({'0.weight': torch.rand(40, 40) > .7, '0.bias': torch.arange(40) > 3,
                   '1.weight': torch.ones(40, 40).bool(), '2.weight': torch.zeros(40, 40).bool()})
    masks.apply(model)
    with torch.no_grad(): model[0].weight[:5], model[1].weight[:30] = 0, 0
    file = save_sparse(model, tmp_path/'m', masks=masks)
    assert sparse_masks(file) == masks and same_bits(load_sparse(file), model.state_dict())
    derived = sparse_masks(save_sparse(model, tmp_path/'d'))
    assert derived == {k: p != 0 for k,p in model.named_parameters() if k in ('0.weight', '1.weight', '2.weight')}

def test_masks_that_do_not_fit_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    for masks,error in (({'0.weight': torch.zeros(4, 4).bool()}, ValueError),
                        ({'0.weight': torch.ones(4, 3).bool()}, ValueError),
                        ({'1.weight': torch.ones(4, 4).bool()}, KeyError)):
        with pytest.raises(error): save_sparse(model, tmp_path/'m', masks=masks)


# Damage

def fuzzed_state():
    torch.manual_seed(0)
    w = torch.randn(6, 16, 3, 3)
    f = w * (torch.arange(6) % 2)[:, None, None, None]
    return {'gaps': w.where(w.abs() > 1.5, 0), 'filters': f + 0, 'half': w.where(w > .8, 0).half(),
            'dense': torch.randn(40, 50), 'small': torch.arange(5), 'zero': torch.zeros(300),
            'nm': torch.randn(64, 16)*(torch.arange(16) % 4 > 1) + 0}

def fuzz_sparse(tmp_path, n, damages, sign=lambda data: data, load=load_sparse):
    "The outcomes of `n` damaged files, by what was done"
    state = fuzzed_state()
    state['tied'] = state['gaps']
    saved = save_sparse(state, tmp_path/'saved')
    return outcomes(load, saved, tmp_path/'damaged.safetensors', n, damages, sign, random.Random(n))

def test_damaged_files(tmp_path):
    found = fuzz_sparse(tmp_path, 1200, DAMAGES)
    assert {o for _,o in found} <= {'refused', 'equal'}, found
    assert sum(len(v) for (_,o),v in found.items() if o == 'equal') < 40, 'only changes of spaces'

def sign(data):
    "The file with right checksums, as of somebody who means harm"
    header, tensors = parts(data)
    about, entries = header['__metadata__'], {k: v for k,v in header.items() if k != '__metadata__'}
    about.pop('checksums', None)
    def crc(what, data=b''): return f'{zlib.crc32(data, zlib.crc32(json.dumps(what).encode())):08x}'
    sums = {'__metadata__': crc(['__metadata__', *sorted(map(list, about.items()))]),
            '': crc([[k, e['dtype'], e['shape']] for k,e in entries.items()], tensors)}
    return joined({'__metadata__': {**about, 'checksums': json.dumps(sums)}, **entries}, tensors)

def change_coded(data, rng):
    "One number or word of the lines about codings"
    header, tensors = parts(data)
    lines = header['__metadata__']['coded'].splitlines()
    i     = rng.randrange(len(lines))
    entry = json.loads(lines[i])
    places = [(entry, k) for k in range(len(entry))]
    for o in entry:
        if not isinstance(o, list): continue
        places += [(p, k) for p in [o, *(p for p in o if isinstance(p, list))] for k in range(len(p))]
    o, k = rng.choice(places)
    o[k] = rng.choice([0, 1, 7, 8, 2**20, 2**40, 2**62, -1, None, True, 'zstd', 'F16', [], [['x']], [2**31, 2**31],
                       ['bits'], ['gaps', 24], ['nofm', 1, 4, 0], 1.5,
                       *([o[k] + 1, o[k] - 1, o[k]*2]*3 if type(o[k]) is int else ())])
    lines[i] = json.dumps(entry)
    header['__metadata__']['coded'] = '\n'.join(lines)
    return joined(header, tensors)

def flip_streams(data, rng):
    header, tensors = parts(data)
    tensors = bytearray(tensors)
    for _ in range(rng.choice([1, 4, 50])): tensors[rng.randrange(len(tensors))] ^= 1 << rng.randrange(8)
    return joined(header, bytes(tensors))

def test_forged_files(tmp_path):
    "Checksums are right, so other weights may be read, but nothing else is raised than `ValueError`"
    def load(file):
        state = load_sparse(file)
        return {k: t.shape for k,t in state.items() if t.numel() < 0}
    found = fuzz_sparse(tmp_path, 900, [change_coded, flip_streams, change_metadata, change_entries], sign, load)
    assert {o for _,o in found} <= {'refused', 'equal'}, {k: v[:5] for k,v in found.items()}
    assert len(found['change_coded', 'refused']) > 150

def test_a_damaged_file_leaves_the_model_as_it_was(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    Sparsifier(model, layer_type=nn.Linear).sparsify_model(80)
    whole, file = save_sparse(model, tmp_path/'m').read_bytes(), tmp_path/'d.safetensors'
    rng, other  = random.Random(0), nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    before, wrong = copy.deepcopy(other.state_dict()), 0
    for _ in range(60):
        file.write_bytes(sign(flip_streams(bytearray(whole), rng)))
        try: load_sparse(file, other)
        except ValueError:
            wrong += 1
            assert same_bits(before, other.state_dict())
        else: other.load_state_dict(before)
    assert wrong > 5

def bomb(tmp_path, entry, data, shape_in_header=None):
    "A file with one coded tensor"
    about  = dict(format='fasterai_clone.sparse', version='1', coded=json.dumps(['w', *entry]))
    header = {'__metadata__': about, 'w': dict(dtype='U8', shape=[len(data)], data_offsets=[0, len(data)])}
    (tmp_path/'bomb.safetensors').write_bytes(sign(joined(header, data)))
    return tmp_path/'bomb.safetensors'

@codecs
def test_bombs(codec, tmp_path):
    "What decompresses to more than is stated, and what states more than it may"
    data = streams.compressed(bytes(10**9), codec)
    for size in (4, 4000):
        file = bomb(tmp_path, ['F32', [size//4], [], ['all'], size//4, None, [[len(data), size, codec]]], data)
        with memory_limit(100_000_000): assert outcome(load_sparse, file) == 'refused'
    for shape in ([2**45], [2**31, 2**31], [2**62], [10]):
        file = bomb(tmp_path, ['F32', shape, [], ['all'], 250_000_000, None, [[len(data), 10**9, codec]]], data)
        with memory_limit(100_000_000): assert outcome(load_sparse, file) == 'refused'
    file = bomb(tmp_path, ['F32', [2**46], [], ['gaps', 0], 0, None, [[0], [0], [0]]], b'')
    with memory_limit(100_000_000): assert outcome(load_sparse, file) == 'refused'

def test_without_zstandard(tmp_path, monkeypatch):
    "Files are written with deflate, and what needs zstd says so"
    state, with_zstd = fuzzed_state(), save_sparse(fuzzed_state(), tmp_path/'z')
    monkeypatch.setitem(sys.modules, 'zstandard', None)
    file = save_sparse(state, tmp_path/'d')
    assert same_bits(load_sparse(file), state) and '"deflate"' in read_file(file)[0]['coded']
    with pytest.raises(ImportError, match='pip install zstandard'): load_sparse(with_zstd)
    with pytest.raises(ImportError, match='pip install zstandard'): save_sparse(state, tmp_path/'d', codec='zstd')


# Processes

def test_loading_streams(tmp_path):
    "The rise of resident memory: no more than the model and its largest tensor, also where it is loaded into a model"
    if not Path('/proc/self/status').exists(): pytest.skip('measured on Linux')
    torch.manual_seed(0)
    state = {f'{i}.weight': torch.randn(2000, 4000).mul_(torch.rand(2000, 4000) < share) + 0
             for i,share in enumerate((.1, .5, 1.))}
    file, dense = save_sparse(state, tmp_path/'big'), 3*32_000_000
    code = f"""if True:
        import sys, torch, torch.nn as nn
        from fasterai_clone.export.all import load_sparse, save_sparse
        load_sparse(save_sparse(nn.Linear(300, 300), {str(tmp_path/'warm')!r}))
        def status(key): return 1024*int(next(l for l in open('/proc/self/status') if l.startswith(key)).split()[1])
        model = nn.ModuleList([nn.Linear(4000, 2000, bias=False) for _ in range(3)]) if sys.argv[1] == 'into' else None
        open('/proc/self/clear_refs', 'w').write('5')
        before = status('VmRSS')
        loaded = load_sparse({str(file)!r}, model)
        print(status('VmHWM') - before)"""
    for how,most in (('state', dense + 32_000_000), ('into', 32_000_000)):
        done = subprocess.run([sys.executable, '-c', code, how], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) <= most, (how, int(done.stdout))

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_a_kill_while_saving_leaves_the_old_file(tmp_path):
    file = save_sparse({'w': torch.arange(10.)}, tmp_path/'model')
    state, seen = {f'{i}': torch.randn(100_000) for i in range(40)}, set()
    for wait in (0, .02, .05, .1, .2, .3, .4):
        if not (pid := os.fork()):
            while True: save_sparse(state, file)
        time.sleep(wait)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        seen.add(len(load_sparse(file)))
    assert seen <= {1, 40} and 1 in seen
    save_sparse({'w': torch.arange(10.)}, file)
    assert [f.name for f in tmp_path.iterdir()] == ['model.safetensors']

def test_report_of_a_sparse_file(tmp_path, capsys):
    from fasterai_clone.cli import load_tensors, sparsity_report
    model, masks = resnet(90)
    file = save_sparse(model, tmp_path/'r')
    save_file({k: t.clone() for k,t in model.state_dict().items()}, tmp_path/'r.dense.safetensors')
    sparsity_report.__wrapped__(str(file))
    ours = capsys.readouterr().out
    sparsity_report.__wrapped__(str(tmp_path/'r.dense.safetensors'))
    assert sorted(ours.splitlines()) == sorted(capsys.readouterr().out.splitlines()) or '90.0' in ours
    assert sum(int((t == 0).sum()) for k,t in load_tensors(file).items() if k in masks) == masks.n_dropped
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(SystemExit, match='r.safetensors'): sparsity_report.__wrapped__(str(file))
