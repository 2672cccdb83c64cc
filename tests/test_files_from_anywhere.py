"Files that are damaged, forged or of earlier versions; disks that are full, and folders that cannot be written to"
import json, os, random, resource, signal, struct, time, tracemalloc
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version as installed
from pathlib import Path

import numpy as np, pytest, torch, torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fasterai_clone.core import envelope, files
from fasterai_clone.core.envelope import read_file
from fasterai_clone.core.files import unpack_bits, whole_file
from fasterai_clone.core.masks import Masks
from fasterai_clone.prune.thin import thin
from fasterai_clone.prune.thinned_files import load_thinned, reshape_to, save_thinned, sizes_of
from fasterai_clone.sparse.ticket_files import load_ticket, save_ticket, ticket_info
from helpers import same, weights

unchecked = Path(__file__).parent/'data'/'unchecked'  # written before files had checksums


# What is saved and read

def make_net(groups=4):
    "The network of the files in `unchecked`"
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(groups, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
                         nn.BatchNorm2d(8), nn.PReLU(8), nn.Flatten(), nn.Linear(128, 2))

def make_rnn(hidden=6): return nn.Sequential(nn.LSTM(4, hidden, 2, bidirectional=True))
def make_layer(): return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)

@cache
def net():
    torch.manual_seed(0)
    return make_net()

@cache
def masks(): return Masks({k: torch.rand(p.shape, generator=torch.Generator().manual_seed(i)) > .5
                           for i,(k,p) in enumerate(net().named_parameters()) if p.ndim > 1 or k == '7.bias'})

@cache
def thinned_net():
    small = make_net()
    with torch.no_grad():
        for k in ('0.weight', '0.bias', '1.weight', '1.bias', '3.weight', '3.bias', '4.weight', '4.bias'):
            small.get_parameter(k)[:2] = 0
    return thin(small, None, torch.randn(2, 3, 8, 8))

@cache
def thinned_layer():
    "Without one of four heads and without 20 of 32 hidden units"
    layer, sizes = make_layer(), sizes_of(make_layer())
    for k,shape in {'self_attn.in_proj_weight': [36, 16], 'self_attn.in_proj_bias': [36],
                    'self_attn.out_proj.weight': [16, 12],
                    'linear1.weight': [12, 16], 'linear1.bias': [12],
                    'linear2.weight': [16, 12]}.items(): sizes['tensors'][k] = shape
    sizes['heads'], sizes['modules'] = dict(self_attn=[0, 1, 3]), {}
    return reshape_to(layer, sizes)

def read_masks(file): return Masks.load(file, net())

def read_ticket(file):
    "The masks and the model; a model that has changed in spite of an error is an error of another type"
    model = make_net()
    before = weights(model)
    try: return dict(Masks(load_ticket(file, model))), weights(model)
    except ValueError:
        if not same(before, weights(model)): raise RuntimeError('the model has changed') from None
        raise

def read_info(file): return ticket_info(file)

def read_thinned(file, make=make_net):
    model = load_thinned(make, file)
    return repr(model), weights(model)

def read_thinned_rnn(file): return read_thinned(file, make_rnn)
def read_thinned_layer(file): return read_thinned(file, make_layer)

def save_masks(file): return masks().save(file)
def save_a_ticket(file): return save_ticket(file, net().state_dict(), masks(), round=2, names=['a', 'b'])
def save_net(file): return save_thinned(thinned_net(), file)
def save_rnn(file): return save_thinned(make_rnn(3), file)
def save_layer(file): return save_thinned(thinned_layer(), file)

KINDS = dict(masks=(save_masks, read_masks), ticket=(save_a_ticket, read_ticket), info=(save_a_ticket, read_info),
             net=(save_net, read_thinned), rnn=(save_rnn, read_thinned_rnn), layer=(save_layer, read_thinned_layer))
by_kind = pytest.mark.parametrize('kind', KINDS)

def equal(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(v, b[k]) for k,v in a.items())
    return all(map(equal, a, b)) if isinstance(a, (tuple, list)) else a == b


# What is done to files

def parts(data):
    "Header and tensors of a file"
    n = struct.unpack('<Q', data[:8])[0]
    return json.loads(data[8:8+n]), data[8+n:]

def joined(header, tensors):
    text = json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + tensors

def signed(data):
    "The file with right checksums: what is forged rather than damaged"
    header, tensors = parts(data)
    about, entries = header['__metadata__'], {k: v for k,v in header.items() if k != '__metadata__'}
    about.pop('checksums', None)
    sums = {'__metadata__': envelope._checksum_of_metadata(about)}
    for k,e in entries.items(): sums[k] = envelope._checksum_of_tensor(k, e, tensors[slice(*e['data_offsets'])])
    return joined({'__metadata__': {**about, 'checksums': json.dumps(sums)}, **entries}, tensors)

def flip_bits(data, rng):
    for _ in range(rng.choice([1, 1, 1, 2, 8])): data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data

def flip_header(data, rng):
    data[rng.randrange(8 + struct.unpack('<Q', data[:8])[0])] ^= 1 << rng.randrange(8)
    return data

def cut(data, rng): return data[:rng.randrange(len(data))]
def longer(data, rng): return data + rng.randbytes(rng.choice([1, 8, 1000]))

def lie_about_the_header(data, rng):
    data[:8] = struct.pack('<Q', rng.choice([0, 1, 7, len(data) - 8, len(data), 2**31, 2**40, 2**63, 2**64 - 1,
                                             rng.randrange(len(data))]))
    return data

def overwrite(data, rng):
    at, n = rng.randrange(len(data)), rng.choice([1, 16, 300])
    data[at:at+n] = rng.choice([bytes(n), rng.randbytes(n), data[:n]])[:len(data[at:at+n])]
    return data

hostile = [None, True, -1, 0, 1, 2, 2**20, 2**31, 2**48, 2**63, 2**70, 1e308, float('nan'), '', 'x', '0.weight', [], {},
           [[]], [-1], [2**40], [2**32, 2**32],
           [0], {'a': []}, 'a\n\x1b[2K', 'x'*10_000]

def changed(o, rng, depth=0):
    "JSON with one value or one name replaced"
    keys = list(o) if isinstance(o, dict) else list(range(len(o))) if isinstance(o, list) else []
    if not keys or depth and rng.random() < .15: return rng.choice([v for v in hostile if v is not o])
    k, o = rng.choice(keys), o.copy()
    how = rng.random()
    if how < .1: o.pop(k)
    elif how < .2 and isinstance(o, dict): o[rng.choice(['other', 'a\x1b\n', *o])] = o.pop(k)
    elif type(o[k]) is int and how < .7: o[k] += rng.choice([-1, 1, o[k], 64])
    elif type(o[k]) is list and how < .4: o[k] = [*reversed(o[k])] if rng.random() < .5 else [*o[k], 1]
    else: o[k] = changed(o[k], rng, depth + 1)
    return o

def change_metadata(data, rng):
    header, tensors = parts(data)
    about = header['__metadata__']
    k = rng.choice([*about])
    try: new = json.dumps(changed(json.loads(about[k]), rng))
    except ValueError: new = rng.choice(['', 'x', '2', '-1', 'nan', about[k][:-1], about[k]*2])
    about[k] = rng.choice([new, new, new, new, 3, None, [new]])
    return joined(header, tensors)

def change_entries(data, rng):
    header, tensors = parts(data)
    about, names = header.pop('__metadata__'), list(header)
    k, how = rng.choice(names), rng.randrange(5)
    if how == 0: header[k] = changed(header[k], rng)
    if how == 1:
        header[k]['dtype'] = rng.choice(['I8', 'U8', 'BOOL', 'F16', 'BF16', 'I32', 'F32', 'I64', 'F64',
                                         'C64', 'F4', 'X', 7])
    if how == 2:
        header[k]['shape'] = rng.choice([header[rng.choice(names)]['shape'], [*reversed(header[k]['shape'])],
                                         [2**40, 2**40], [-1], [0], [1]*70])
    if how == 3: header[k]['data_offsets'] = [rng.choice([0, 8, -8, 2**40]) + o for o in header[k]['data_offsets']]
    if how == 4:
        other = rng.choice([n for n in names if header[n]['shape'] != header[k]['shape']])
        header[other], header[k] = header[k], header[other]
    return joined({'__metadata__': about, **header}, tensors)

DAMAGES = [flip_bits, flip_header, cut, longer, lie_about_the_header, overwrite, change_metadata, change_entries]

def outcome(read, file, want=None):
    "`'refused'` or `'equal'`; anything else is what went wrong"
    start = time.process_time()
    try: got = read(file)
    except (ValueError, OSError) as e:
        text = str(e)
        if file.name not in text: return f'no name of a file: {text[:200]}'
        if len(text) > 2500 or any(c in text for c in '\n\x1b'): return f'foreign text: {text[:200]!r}'
        return 'refused' if time.process_time() - start < 2 else 'slow'
    except BaseException as e: return f'{type(e).__name__}: {str(e)[:200]}'
    if time.process_time() - start > 2: return 'slow'
    return 'equal' if want is None or equal(got, want) else 'something else was read'

@contextmanager
def memory_limit(n):
    "At most `n` bytes more of memory than now"
    if not Path('/proc/self/statm').exists(): return (yield)  # not Linux
    now = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + n, old[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_AS, old)

def fuzz(kind, tmp_path, n, damages=DAMAGES, sign=lambda data: data, start=None):
    "The outcomes of `n` damaged files of one `kind`, by what was done"
    save, read = KINDS[kind]
    file = save(tmp_path/'saved') if start is None else start
    return outcomes(read, file, tmp_path/'damaged.safetensors', n, damages, sign, random.Random(kind))

def outcomes(read, saved, file, n, damages, sign, rng):
    "The outcomes of reading `file`, `n` damaged copies of `saved`, by what was done"
    whole, want, found = saved.read_bytes(), read(saved), {}
    with memory_limit(200_000_000):
        for i in range(n):
            damage = damages[i % len(damages)]
            data   = bytes(damage(bytearray(whole), rng))
            try: data = sign(data)
            except (KeyError, TypeError, ValueError): pass  # nothing that could be signed
            if data == whole: continue
            file.write_bytes(data)
            found.setdefault((damage.__name__, outcome(read, file, want)), []).append(i)
    return found


# Damage

@by_kind
def test_damaged_files(kind, tmp_path):
    "2,400 in all"
    found = fuzz(kind, tmp_path, 400)
    assert {o for _,o in found} <= {'refused', 'equal'}, found
    equal = [len(v) for (_,o),v in found.items() if o == 'equal']
    assert sum(equal) < (100 if kind == 'info'
                         else 20), 'only changes of spaces, and of tensors where they are not read'

@by_kind
def test_forged_files(kind, tmp_path):
    "Names, dtypes, shapes, sizes and metadata are changed, and the checksums are right"
    found = fuzz(kind, tmp_path, 200, [change_metadata, change_entries], signed)
    wrong = {k: v for k,v in found.items() if k[1] not in ('refused', 'equal')}
    # what users write down may be anything
    if kind == 'info': wrong.pop(('change_metadata', 'something else was read'), None)
    # other heads of the same number
    if kind == 'layer': wrong.pop(('change_metadata', 'something else was read'), None)
    assert not wrong, {k: v[:5] for k,v in wrong.items()}

OLD = dict(masks='masks', ticket='ticket', info='ticket', net='thin')

@pytest.mark.parametrize('kind', OLD)
def test_damaged_files_of_earlier_versions(kind, tmp_path):
    "They have no checksums: a damaged weight cannot be noticed, but nothing else than ours is raised"
    found = fuzz(kind, tmp_path, 200, start=unchecked/f'{OLD[kind]}.safetensors')
    assert {o for _,o in found} <= {'refused', 'equal', 'something else was read'}, found
    odd = {d for d,o in found if o == 'something else was read'}
    assert odd <= {'flip_bits', 'flip_header', 'overwrite', 'change_metadata', 'change_entries'}, found


# Earlier versions

def test_files_of_earlier_versions_are_read():
    by_hand, model = load_file(unchecked/'masks.safetensors'), make_net()
    found = Masks.load(unchecked/'masks')
    for k,bits in by_hand.items():
        assert np.unpackbits(bits.numpy())[:found[k].numel()].tolist() == found[k].flatten().int().tolist()
    assert {k: tuple(m.shape) for k,m in found.items()} == {'0.weight': (8, 3, 3, 3), '3.weight': (8, 1, 3, 3),
                                                            '7.weight': (2, 128)}
    assert load_ticket(unchecked/'ticket', model) == found
    assert same(weights(model), load_file(unchecked/'ticket.safetensors'))
    assert ticket_info(unchecked/'ticket') == dict(version=1, sparsity=found.sparsity, round=2, names=['a'])
    small = load_thinned(make_net, unchecked/'thin')
    assert same(weights(small), load_file(unchecked/'thin.safetensors'))
    assert small[0].out_channels == small[3].groups == small[4].num_features == 6 and small[1].num_groups == 3

@pytest.mark.parametrize('save', [save_masks, save_a_ticket, save_net])
def test_other_programs_read_what_is_saved(save, tmp_path):
    file = save(tmp_path/'saved')
    about, tensors = read_file(file)
    assert same(load_file(file), tensors)
    with safe_open(file, 'pt') as f:
        assert f.metadata().keys() == {*about, 'checksums'} and f.metadata()['version'] == '1'

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool,
                                   torch.complex64, torch.float8_e5m2], ids=str)
def test_every_dtype(dtype, tmp_path):
    state = {'a': torch.arange(6).to(dtype).reshape(3, 2).T, 'b': torch.tensor(1).to(dtype),
             'c': torch.empty(0, 4, dtype=dtype)}
    file  = save_ticket(tmp_path/'t', state, {})
    found = [read_file(file)[1]]
    complex_is_known = tuple(map(int, installed('safetensors').split('.')[:2])) >= (0, 7)  # by their own reader
    if not dtype.is_complex or complex_is_known: found.append(load_file(file))
    for k,t in state.items():
        for other in (f[k] for f in found):
            assert other.dtype == dtype and other.shape == t.shape
            assert torch.equal(other.to(torch.complex128), t.to(torch.complex128))


# What does not fit together

def rewritten(file, change, tensors=None):
    "The file as a version without checksums would have written it, after `change` to its metadata and tensors"
    with safe_open(file, 'pt') as f: about, state = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    about.pop('checksums')
    change(about, state)
    save_file({k: t.contiguous() for k,t in state.items()}, file, metadata=about)
    return file

def refuses(read, file, *words):
    with pytest.raises(ValueError) as e: read(file)
    assert file.name in str(e.value) and all(w in str(e.value) for w in words), str(e.value)

@pytest.mark.parametrize('n', [0, 1, 100, 199, 201])
def test_masks_of_too_few_or_too_many_bits(n, tmp_path):
    "1,600 weights are 200 bytes"
    def change(about, state): state['weight'] = torch.cat([state['weight']]*2)[:n]
    file = rewritten(Masks({'weight': torch.ones(40, 40).bool()}).save(tmp_path/'m'), change)
    refuses(Masks.load, file, "the mask of 'weight'", '200 bytes')

def test_bits_behind_the_last_weight():
    assert unpack_bits(torch.tensor([0b11100000], dtype=torch.uint8), (3,)).tolist() == [True]*3
    for wrong in ([0b11110000], [0b11100001]):
        with pytest.raises(ValueError, match='more bits'): unpack_bits(torch.tensor(wrong, dtype=torch.uint8), (3,))
    for bits in (torch.zeros(1), torch.zeros(1, 1, dtype=torch.uint8), [0], None):
        with pytest.raises(ValueError, match='must have 1 bytes'): unpack_bits(bits, (3,))

@pytest.mark.parametrize('shape', [[20, 40], [1600, 2], [-40, -40], [40.0, 40], '40', None, [2**62, 4],
                                   [True, 1600], [1]*100])
def test_masks_of_a_wrong_shape(shape, tmp_path):
    def change(about, state): about['shapes'] = json.dumps({'weight': shape})
    refuses(Masks.load, rewritten(Masks({'weight': torch.ones(40, 40).bool()}).save(tmp_path/'m'), change),
            "the mask of 'weight'")

def test_masks_of_another_sparsity_than_stated(tmp_path):
    def change(about, state): state['weight'][0] = 0  # eight weights
    for save, read in ((lambda f: Masks({'weight': torch.ones(40, 40).bool()}).save(f), Masks.load),):
        refuses(read, rewritten(save(tmp_path/'m'), change), 'sparsity', '0.0', '0.5')
    def state_less(about, state): about['sparsity'] = '10.0'
    ticket = rewritten(save_a_ticket(tmp_path/'t'), state_less)
    refuses(read_ticket, ticket, 'sparsity', '10.0')

def test_the_masks_of_a_ticket_fit_its_tensors(tmp_path):
    def masks_as(f):
        def change(about, state):
            found = json.loads(about['masks'])
            f(found)
            about['masks'] = json.dumps(found)
        return change
    for f,words in ((lambda m: m.update({'0.weight': [[8, 27], m['0.weight'][1]]}), ["'0.weight'", '(8, 3, 3, 3)']),
                    (lambda m: m.update({'0.weight': [[8, 3, 3, 3], m['0.weight'][1][:8]]}),
                     ["'0.weight'", '27 bytes']),
                    (lambda m: m.update({'0.weight': [[8, 3, 3, 3], '!' + m['0.weight'][1][1:]]}), ["'0.weight'"]),
                    (lambda m: m.update({'0.weight': m['0.weight'][1]}), ["'0.weight'", 'a shape and bits']),
                    (lambda m: m.update({'1.scale': m['0.weight']}), ["'1.scale'"])):
        refuses(read_ticket, rewritten(save_a_ticket(tmp_path/'t'), masks_as(f)), *words)

def sizes_as(f):
    def change(about, state):
        sizes = json.loads(about['sizes'])
        f(sizes)
        about['sizes'] = json.dumps(sizes)
    return change

@pytest.mark.parametrize('module, key, value', [('1', 'num_groups', 2), ('1', 'num_groups', 6), ('3', 'groups', 3),
                                                ('0', 'out_channels', 8),
                                                ('4', 'num_features', 8), ('7', 'in_features', 128),
                                                ('5', 'num_parameters', 1)])
def test_numbers_of_a_layer_that_are_not_those_of_its_tensors(module, key, value, tmp_path):
    "Six channels of eight are left: three groups of four"
    change = sizes_as(lambda s: s['modules'][module].update({key: value}))
    refuses(read_thinned, rewritten(save_net(tmp_path/'n'), change), key, f"'{module}'", str(value))

@pytest.mark.parametrize('name, shape', [('0.bias', [4]), ('1.bias', [4]), ('4.running_var', [8]), ('3.bias', [1])])
def test_tensors_of_a_layer_that_do_not_go_together(name, shape, tmp_path):
    def change(about, state):
        state[name] = torch.zeros(shape)
        sizes_as(lambda s: s['tensors'].update({name: shape}))(about, state)
    refuses(read_thinned, rewritten(save_net(tmp_path/'n'), change), f"'{name}'", str(tuple(shape)))

def test_recurrent_layers_and_attentions_that_do_not_go_together(tmp_path):
    def lstm(about, state):
        state['0.weight_hh_l1'] = torch.zeros(12, 4)
        sizes_as(lambda s: s['tensors'].update({'0.weight_hh_l1': [12, 4]}))(about, state)
    refuses(read_thinned_rnn, rewritten(save_rnn(tmp_path/'r'), lstm), "'0.weight_hh_l1'")
    for heads in ([0, 1], [0, 0, 1], [1, 0, 3], [0, 1, 4], [0, 1, -1], [], 3, [0, 1, 2.0]):
        refuses(read_thinned_layer, rewritten(save_layer(tmp_path/'l'),
                                              sizes_as(lambda s: s['heads'].update(self_attn=heads))), 'self_attn')
    refuses(read_thinned_layer, rewritten(save_layer(tmp_path/'l'), sizes_as(lambda s: s['heads'].update(linear1=[0]))),
            'linear1')

def test_weights_are_not_converted(tmp_path):
    def to(dtype):
        def change(about, state): state['7.weight'] = state['7.weight'].to(dtype)
        return change
    for dtype in (torch.int8, torch.float16, torch.float64):
        refuses(read_thinned, rewritten(save_net(tmp_path/'n'), to(dtype)), "'7.weight'", str(dtype))
        refuses(read_ticket, rewritten(save_a_ticket(tmp_path/'t'), to(dtype)), "'7.weight'", str(dtype))
    half = load_thinned(lambda: make_net().half(),
                        save_thinned(reshape_to(make_net().half(), sizes_of(thinned_net())), tmp_path/'half'))
    assert half[7].weight.dtype == torch.float16 and half[7].in_features == 96

def test_a_later_version(tmp_path):
    def change(about, state): about['version'] = '2'
    for kind,(save, read) in KINDS.items(): refuses(read, rewritten(save(tmp_path/kind), change), 'version 2', 'Update')


# Sizes

def test_what_a_small_file_allocates(tmp_path):
    "Sizes of 4 GB: in the header, in the description, and for a tensor that is in the file under another name"
    def tied():
        model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
        model[1].weight = model[0].weight
        return model
    def description(about, state): sizes_as(lambda s: s['tensors'].update({'1.weight': [32_768, 32_768]}))(about, state)
    file = rewritten(save_thinned(tied(), tmp_path/'tied'), description)
    data, header = masks().save(tmp_path/'m').read_bytes(), 2**32
    (tmp_path/'long.safetensors').write_bytes(struct.pack('<Q', header) + data[8:])
    head, tensors = parts(data)
    head['0.weight'].update(shape=[2**32], data_offsets=[0, 2**32])
    (tmp_path/'big.safetensors').write_bytes(joined(head, tensors))
    with memory_limit(300_000_000):
        refuses(lambda f: load_thinned(tied, f), file, "'1.weight'")
        refuses(Masks.load, tmp_path/'long.safetensors', 'cut off')
        refuses(Masks.load, tmp_path/'big.safetensors', '4,294,967,296')

def bombs():
    "Headers and metadata of many brackets: name → (header text, metadata of a ticket)"
    n = 300_000
    yield 'header of lists',   '[[],' + '[],'*n + '[]]', None
    yield 'header of objects', '{"a":{' + '"b":{},'*n + '"c":{}}}', None
    yield 'deep header',       '[' * 3*n, None
    yield 'shape',             '{"a":{"dtype":"F32","shape":[' + '1,'*n + '1],"data_offsets":[0,4]}}', None
    yield 'digits',            '{"a":{"dtype":"F32","shape":[' + '1'*3*n + '],"data_offsets":[0,4]}}', None
    yield 'long name',         '{"' + 'n'*3*n + '":{"dtype":"F3","shape":[],"data_offsets":[0,4]}}', None
    for key in ('masks', 'about', 'sparsity', 'version'):
        yield f'lists as {key}', None, {key: '[' + '[],'*n + '0]'}
        yield f'deep {key}',     None, {key: '['*3*n}
        yield f'digits as {key}', None, {key: '1'*3*n}

@pytest.mark.parametrize('header, about', [pytest.param(h, a, id=i) for i,h,a in bombs()])
def test_memory_and_time_of_bombs(header, about, tmp_path):
    "A file of 0.9 MB takes at most three times its size, and 2 s"
    data = save_a_ticket(tmp_path/'t').read_bytes()
    if header is None:
        old, tensors = parts(data)
        old['__metadata__'].pop('checksums')
        old['__metadata__'].update(about)
        data = joined(old, tensors)
    else: data = struct.pack('<Q', len(header)) + header.encode() + bytes(4)
    (file := tmp_path/'bomb.safetensors').write_bytes(data)
    model = make_net()
    for read in (ticket_info, lambda f: load_ticket(f, model)):
        if about and 'about' in about and read is not ticket_info: continue  # it does not read it
        if about and 'masks' in about and read is ticket_info: continue
        tracemalloc.start()
        try: assert outcome(read, file) == 'refused'
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 3*len(data) + 500_000, f'{peak:,} bytes for a file of {len(data):,}'

def test_memory_of_large_files(tmp_path):
    "Weights of 16 MB are held at most three times, the model itself among them"
    def make(): return nn.Linear(2000, 2000)
    model = make()
    ticket = save_ticket(tmp_path/'t', model.state_dict(),
                         {'weight': torch.arange(4_000_000).reshape(2000, 2000) % 2 == 0})
    thinned = save_thinned(model, tmp_path/'n')
    del model
    with memory_limit(56_000_000): load_ticket(ticket, make())
    with memory_limit(56_000_000): load_thinned(make, thinned)


# What messages show

def test_names_that_forge_a_line(tmp_path):
    name = '\x1b[2K\rOverall              all             100.00%\n'
    state = {name + 'x'*5000: torch.zeros(2)}
    file = save_ticket(tmp_path/'t', state, {})
    with pytest.raises(ValueError) as e: load_ticket(file, nn.Linear(2, 2))
    assert str(e.value).isprintable() and len(str(e.value)) < 500
    for wrong in (Masks({k: t.bool() for k,t in state.items()}).save(tmp_path/'m'), ):
        with pytest.raises(ValueError) as e: Masks.load(wrong, nn.Linear(2, 2))
        assert str(e.value).isprintable() and len(str(e.value)) < 500
    with pytest.raises(ValueError) as e:
        load_thinned(lambda: nn.Linear(2, 2, bias=False), save_thinned(nn.Linear(2, 2), tmp_path/'a\nb'))
    assert '\n' not in str(e.value) and 'a\\nb' in str(e.value)


# Disks and names

SAVES = dict(masks=save_masks, ticket=save_a_ticket, thinned=save_net)
by_save = pytest.mark.parametrize('save', SAVES.values(), ids=SAVES)

@contextmanager
def full_disk(n):
    "No file can have more than `n` bytes"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, old[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)

def save_torch(file):
    "As a checkpoint is saved; torch raises a RuntimeError where there is no space"
    with whole_file(file) as part: torch.save({'a': torch.arange(100_000)}, part)
    return file

@pytest.mark.parametrize('save', [*SAVES.values(), save_torch], ids=[*SAVES, 'torch'])
@pytest.mark.parametrize('n', [0, 100, 300])
def test_a_full_disk(save, n, tmp_path):
    "The error names the file; the old file is whole, and nothing else is left"
    file = save(tmp_path/'f.safetensors')
    before = file.read_bytes()
    with full_disk(n), pytest.raises(OSError) as e: save(tmp_path/'f.safetensors')
    assert e.value.filename == str(file) and 'File too large' in str(e.value)
    assert file.read_bytes() == before and os.listdir(tmp_path) == ['f.safetensors']

@by_save
def test_a_folder_that_cannot_be_written_to(save, tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='m.safetensors'): save(tmp_path/'file'/'m.safetensors')
    def denied(path, *args): raise PermissionError(13, 'Permission denied', str(path))
    monkeypatch.setattr(files.os, 'open', denied)
    with pytest.raises(PermissionError) as e: save(tmp_path/'m.safetensors')
    assert e.value.filename == str(tmp_path/'m.safetensors') and '.tmp' not in str(e.value)

@by_save
@pytest.mark.parametrize('name', ['a'*243, 'a'*240 + '.safetensors', 'ä'*120 + '.safetensors', 'm'*251 + '.bin'])
def test_long_names(save, name, tmp_path):
    "File systems take names of 255 bytes"
    file = save(tmp_path/name)
    assert os.listdir(tmp_path) == [file.name] and read_file(file)[1]

@by_save
def test_a_name_that_is_too_long(save, tmp_path):
    with pytest.raises(OSError) as e: save(tmp_path/('a'*244))
    assert e.value.filename == str(tmp_path/('a'*244 + '.safetensors')) and os.listdir(tmp_path) == []

@pytest.mark.parametrize('name, file', [('m', 'm.safetensors'), ('m.st', 'm.st'), ('m_90.5', 'm_90.5.safetensors'),
                                        ('m.1', 'm.1.safetensors')])
def test_one_rule_for_extensions(name, file, tmp_path):
    for save, read in KINDS.values():
        assert save(tmp_path/name).name == file
        read(tmp_path/name), read(tmp_path/file)

def test_names_of_earlier_versions(tmp_path):
    "Masks had no extension after a dot, and tickets always had one"
    for source, name, read in (('masks', 'm_90.5', read_masks), ('ticket', 't.bin.safetensors', read_ticket)):
        (tmp_path/name).write_bytes((unchecked/f'{source}.safetensors').read_bytes())
        assert read(tmp_path/name.removesuffix('.safetensors'))

@by_kind
def test_files_that_are_missing(kind, tmp_path):
    with pytest.raises(FileNotFoundError) as e: KINDS[kind][1](tmp_path/'m')
    assert e.value.filename == str(tmp_path/'m.safetensors')


# Writers that are killed, and those that are not

def stopped_writer(file):
    "A process that is in the middle of writing `file`, and waits"
    ready, go = os.pipe(), os.pipe()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            with whole_file(file) as part:
                part.write_text('half')
                os.write(ready[1], b'.')
                os.read(go[0], 1)
                part.write_text('of the child')
            code = 0
        finally: os._exit(code)
    os.read(ready[0], 1)
    return pid, lambda: os.write(go[1], b'.')

def unfinished(folder): return [f for f in os.listdir(folder) if f.endswith('.tmp')]

def test_unfinished_files_of_killed_writers_are_swept(tmp_path):
    for file in (tmp_path/'m.safetensors', tmp_path/'m.safetensors.bin', tmp_path/('n'*255)):
        for _ in range(3):
            pid, _ = stopped_writer(file)
            os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)
            assert len(unfinished(tmp_path)) == 1  # each one has swept the one before
        masks().save(tmp_path/'other')
        assert len(unfinished(tmp_path)) == 1, 'of another name'
        with whole_file(file) as part: part.write_text('new')
        assert not unfinished(tmp_path) and file.read_text() == 'new'

def test_a_name_that_begins_like_another_is_not_swept(tmp_path):
    pid, _ = stopped_writer(tmp_path/'m.bin')
    os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)
    for name in ('m', '.m', 'm.b'):
        with whole_file(tmp_path/name) as part: part.write_text('new')
    assert len(unfinished(tmp_path)) == 1

def test_a_writer_that_lives_is_not_hurt(tmp_path):
    "Another process, and another thread or call of this one, is in the middle of writing"
    file = tmp_path/'m.safetensors'
    pid, go_on = stopped_writer(file)
    with whole_file(file) as outer:
        outer.write_text('outer')
        for _ in range(3): masks().save(file)
        assert len(unfinished(tmp_path)) == 2 and Masks.load(file) == masks()
    assert file.read_text() == 'outer'
    go_on()
    assert os.waitpid(pid, 0)[1] == 0 and file.read_text() == 'of the child' and not unfinished(tmp_path)
