"Checkpoints, schedules and weights that others wrote, or that a disk has damaged: read as they are, or refused by name"
import copy, io, pickle, random, re, resource, time, warnings, zipfile
from functools import cache

import pytest, torch, torch.nn as nn
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, SGD
from safetensors.torch import save_file

from fasterai_clone.cli import load_tensors, sparsity_report
from fasterai_clone.core.printing import print_text
from fasterai_clone.core.text import one_line, shortened
from fasterai_clone.core.zeros import zeros_in
from fasterai_clone.prune.distiller_callback import from_distiller_yaml
from fasterai_clone.prune.prune_callback import PruneCallback
from fasterai_clone.sparse.checkpoint import report_tensors, weights_in
from fasterai_clone.sparse.report import Report, Row
from fasterai_clone.sparse.sparsifier import Sparsifier
from fasterai_clone.sparse.sparsify_callback import SparsifyCallback
from fasterai_clone.fit.checkpoint import STATE_ENTRY, read_state
from helpers import spy

MAX_S, MAX_MB = 2, 100
report = sparsity_report.__wrapped__


# Learners and checkpoints, as small as they get

@cache
def items(): return [(torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(i)), i % 3) for i in range(8)]

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Flatten(),
                         nn.Linear(20, 3))

def learner(folder):
    return Learner(DataLoaders(*[DataLoader(items(), bs=4)]*2), net(), CrossEntropyLossFlat(),
                   opt_func=SGD, path=folder)

def load(learn, file): return learn.load(file.with_suffix(''))  # which `learn.load` adds again

def sparsify(): return SparsifyCallback(50, criteria='movmag', schedule='iterative', every=2, lth=True, verbose=False)
def prune():    return PruneCallback(50, verbose=False)
makers = dict(sparsify=sparsify, prune=prune)

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "Kind of callback → a checkpoint after two of three epochs"
    files = {}
    for kind,make in makers.items():
        learn = learner(tmp_path_factory.mktemp(kind))
        def save():
            if learn.epoch == 1: files[kind] = learn.save('whole')
        with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn.fit(3, 0.1, cbs=[make(), spy('after_validate', save, order=61)])
    return files

def numbers(learn):
    "All that a refusal must leave as it was"
    return copy.deepcopy(dict(model=learn.model.state_dict(), opt=None if learn.opt is None else learn.opt.state_dict(),
                              names=[type(cb).__name__ for cb in learn.cbs],
                              shapes=[tuple(p.shape) for p in learn.model.parameters()]))

def equal(a, b):
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict): return list(a) == list(b) and all(equal(v, b[k]) for k,v in a.items())
    if isinstance(a, (list, tuple)) or type(a).__name__ == 'L': return len(a) == len(b) and all(map(equal, a, b))
    return a == b

def with_state(file, to, change):
    "A copy of the checkpoint `file` whose state is what `change` makes of it, with right checksums"
    state = [dict(s) for s in read_state(file)]
    changed = change(copy.deepcopy(state))
    state = state if changed is None else changed
    with zipfile.ZipFile(file) as z, zipfile.ZipFile(to, 'w', zipfile.ZIP_STORED) as new:
        for i in z.infolist():
            data = z.read(i)
            if i.filename.endswith(STATE_ENTRY):
                torch.save(state, buffer := io.BytesIO())
                data = buffer.getvalue()
            new.writestr(i.filename, data)
    return to

def resume(file, kind, folder):
    "Load `file` in a new learner and train the last epoch; a refusal must leave all as it was before the call"
    learn, cb = learner(folder), makers[kind]()
    learn.create_opt()
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        before, step = numbers(learn), 'load'
        try:
            load(learn, file)
            before, step = numbers(learn), 'fit'
            learn.fit(3, 0.1, cbs=cb, start_epoch=2)
        except ValueError as e:
            assert equal(before, numbers(learn)), f'{step} has changed something: {e}'
            raise
    return learn

def refused(file, kind, folder, *words):
    with pytest.raises(ValueError) as e: resume(file, kind, folder)
    for word in (file.name, STATE_ENTRY, *words): assert word in str(e.value), str(e.value)
    assert len(str(e.value)) < 1000
    return str(e.value)


# State in a checkpoint

def put(o, path, value):
    "A copy of `o` with `value`, or what it makes of what is there, at `path`"
    if not path: return value(o) if callable(value) else value
    if isinstance(o, dict): return {**o, path[0]: put(o.get(path[0]), path[1:], value)}
    return type(o)(put(v, path[1:], value) if i == path[0] else v for i,v in enumerate(o))

w, many = '0.weight', torch.zeros(1).expand(10**9)
wrong = dict(sparsify=[
    (('epoch',), -1), (('epoch',), 2.5), (('epoch',), '2'), (('midway',), 1), (('asked',), None),
    (('asked', 0), float('nan')), (('asked',), 'abc'),
    (('led',), lambda v: v[:-1]), (('led',), lambda v: v + [1]), (('floor', 0), 10**6), (('last', 0), -1),
    (('last', 1), float('inf')), (('last',), {}),
    (('history',), lambda v: v + v), (('history', 0, 'epoch'), 7), (('history', 0, 'asked'), float('nan')),
    (('history', 0, 'sparsity'), torch.ones(3)),
    (('history', 0, 'layers', w), 101), (('history', 0, 'layers'), {}), (('logged', 0, 'train_loss'), [1]),
    (('logged',), 3), (('scaler',), dict(scale=0)), (('scaler',), 1),
    (('sparsifier',), []), (('sparsifier', 'masks', w, 0), lambda v: v[::-1]), (('sparsifier', 'masks', w, 0, 0), -6),
    (('sparsifier', 'masks', w, 0, 0), 2**50),
    (('sparsifier', 'masks', w, 1), lambda v: v[:-1]), (('sparsifier', 'masks', w, 1), lambda v: v.float()),
    (('sparsifier', 'masks', w, 1), lambda v: v | 255),
    (('sparsifier', 'masks', w, 1), many), (('sparsifier', 'masks'), lambda v: {'x': v[w]}),
    (('sparsifier', 'masks'), lambda v: {3: v[w]}),
    (('sparsifier', 'refs', w), lambda v: v[:1]), (('sparsifier', 'refs', w), lambda v: v.int()),
    (('sparsifier', 'refs', w), many), (('sparsifier', 'refs'), {}),
    (('sparsifier', 'used'), [1]), (('sparsifier', 'used'), ['other']), (('sparsifier', 'reference'), torch.ones(2)),
    (('sparsifier', 'granularity'), torch.ones(2)),
    (('sparsifier', 'context'), 7), (('sparsifier', 'names'), lambda v: v[:-1]), (('sparsifier', 'names', 0), 'a\nb'),
    (('sparsifier', 'names'), 'ab'),
    (('rewind_to', 'model', w), lambda v: v.double()), (('rewind_to', 'model', w), lambda v: v.flatten()),
    (('rewind_to', 'model'), lambda v: {**v, 'x': v[w]}),
    (('rewind_to', 'model'), lambda v: {k: t for k,t in v.items() if k != w}),
    (('rewind_to', 'optimizer', 'state'), lambda v: v[:-1]), (('rewind_to', 'optimizer'), {}),
    (('rewind_to', 'optimizer', 'state', 0), dict(grad_avg=torch.ones(2))),
    (('rewind_to', 'optimizer', 'state', 0), 'x'), (('rewind_to',), 5),
    (('random', 'python'), lambda v: v[:2]), (('random', 'python'), lambda v: (3, v[1][:-1] + (10**6,), None)),
    (('random', 'numpy'), lambda v: ('MT', *v[1:])),
    (('random', 'numpy'), lambda v: (v[0], v[1], 10**9, *v[3:])), (('random', 'torch'), lambda v: v*0 + 1),
    (('random', 'torch'), lambda v: v[:9]),
    (('random', 'loaders'), lambda v: v[:1]), (('random', 'loaders', 0), []), (('random', 'cuda'), [torch.ones(16)]),
    (('random', 'x'), 1) ] , prune=[
    (('epoch',), None), (('asked', 3), 10**400), (('at_first', 'params'), -5), (('at_first',), {}),
    (('channels', w), 0), (('channels',), {}), (('left', w), 9),
    (('left', w), 5), (('left',), lambda v: {'x': 3, **v}), (('goal', w), 400), (('goal', w), float('nan')),
    (('ratio',), 50), (('used',), ['x']), (('used',), 3),
    (('refs',), {'x': torch.ones(2)}), (('refs',), {w: torch.ones(7, 7)}), (('refs',), {w: 'x'}),
    (('history', 0, 'macs'), -1), (('history', 0, 'extra'), 1),
    (('sizes',), 3), (('sizes', 'tensors', w), [2**30, 1, 3, 3]), (('sizes', 'tensors', w), [-1, 1, 3, 3]),
    (('sizes', 'tensors', w), 'abcd'), (('sizes', 'tensors', w), [3]),
    (('sizes', 'tensors'), lambda v: {**v, 'x': [1]}), (('sizes', 'modules', '0', 'in_channels'), 'x'),
    (('sizes', 'modules', '0'), [1]), (('sizes', 'modules'), lambda v: {**v, 'x': {}}),
    (('sizes', 'heads'), {'0': 3}), (('sizes', 'extra'), {}), (('random', 'loaders'), [3]),
    (('random', 'torch'), None)])

@pytest.mark.parametrize('kind', makers)
def test_state_is_checked_as_arguments_are(kind, saved, tmp_path):
    "Each change is refused with the file and the entry, and nothing is changed"
    whole = resume(saved[kind], kind, tmp_path)
    again = resume(with_state(saved[kind], tmp_path/'same.pth', lambda s: None), kind, tmp_path)
    assert equal(whole.model.state_dict(), again.model.state_dict())
    accepted = []
    for i,(path,value) in enumerate(wrong[kind]):
        file  = with_state(saved[kind], tmp_path/f'changed{i}.pth', lambda states: [put(states[0], path, value)])
        where, start = '.'.join(map(str, path)), time.process_time()
        try: resume(file, kind, tmp_path)
        except ValueError as e: said = str(e)
        else:
            accepted.append(where)
            continue
        assert time.process_time() - start < 5 and len(said) < 1000 and file.name in said and STATE_ENTRY in said, (
            where, said)
        assert where.split('.')[0] in said or where.split('.')[-1] in said, (where, said)
    assert not accepted

@pytest.mark.parametrize('states', [5, [5], {}, [{3: 4}], 'abc', [['a']], torch.ones(3)], ids=repr)
def test_other_things_than_states(states, saved, tmp_path):
    file = with_state(saved['sparsify'], tmp_path/'other.pth', lambda _: states)
    refused(file, 'sparsify', tmp_path)

def test_a_state_of_another_callback(saved, tmp_path):
    "A dict that is of no callback of ours is not touched by `learn.load`; a callback that wants it refuses it"
    file = with_state(saved['sparsify'], tmp_path/'other.pth', lambda _: [dict(epoch=2, mark=torch.ones(2))])
    refused(file, 'sparsify', tmp_path, 'the state of a `SparsifyCallback`')

@pytest.mark.parametrize('kind', makers)
def test_by_hand(kind, saved):
    "`load_state_dict` refuses the same, and names the entry"
    state, cb = dict(read_state(saved[kind])[0]), makers[kind]()
    cb.load_state_dict(state)
    for wrong in ({**state, 'epoch': -1}, {**state, 'random': {}}, {**state, 'history': [1]}):
        with pytest.raises(ValueError, match='state'): cb.load_state_dict(wrong)
    with pytest.raises(TypeError, match='must be a dict'): cb.load_state_dict([state])

def test_state_of_a_sparsifier():
    sp = Sparsifier(net())
    sp.sparsify_model(50)
    state, before = sp.state_dict(), copy.deepcopy(dict(sp.masks))
    for k,v in dict(masks={w: 1}, names=[1], refs={w: 3}, used=[3], granularity=torch.ones(2), context=[1]).items():
        with pytest.raises(ValueError, match='[Ss]tate'): sp.load_state_dict({**state, k: v})
    for mask in (torch.ones(2, dtype=torch.bool), sp.masks[w].float()):
        with pytest.raises(ValueError, match='0.weight'):
            sp.load_state_dict({**state, 'masks': {**state['masks'], w: mask}})
    assert equal(before, dict(sp.masks))


# Archives

def rezip(file, to, method=zipfile.ZIP_STORED, change=lambda name, data: data, extra=()):
    with zipfile.ZipFile(file) as z, zipfile.ZipFile(to, 'w', method) as new, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # two entries of one name
        for name,data in [*((i.filename, z.read(i)) for i in z.infolist()), *extra]:
            new.writestr(name, change(name, data))
    return to

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def test_compressed_entries(saved, tmp_path):
    "Ours, those of torch and those inside of ours: a file of 1 MB is never 1 GB in memory"
    before, zeros = peak(), bytes(2**27)
    packed = [rezip(saved['sparsify'], tmp_path/f'{m}.pth', m)
              for m in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)]
    def one(part, name, data): return zeros if name.endswith(part) else data
    with zipfile.ZipFile(saved['sparsify']) as z:
        inner = z.read(next(n for n in z.namelist() if n.endswith(STATE_ENTRY)))
    (tmp_path/'inner').write_bytes(inner)
    inner = rezip(tmp_path/'inner', tmp_path/'inner2', zipfile.ZIP_DEFLATED).read_bytes()
    packed.append(rezip(saved['sparsify'], tmp_path/'in.pth',
                        change=lambda name, data: inner if name.endswith(STATE_ENTRY) else data))
    torch.save({'w': torch.ones(2, 2)}, tmp_path/'plain.pth')
    bombs = [rezip(tmp_path/'plain.pth', tmp_path/f'bomb{i}.pth', zipfile.ZIP_DEFLATED,
                   lambda name, data: one(part, name, data))
             for i,part in enumerate(('data/0', 'data.pkl'))]
    before = peak()
    for file in packed:
        with pytest.raises(ValueError, match=f'{file.name}.*compressed'): load(learner(tmp_path), file)
    for file in bombs:
        with pytest.raises(SystemExit, match=f'{file.name}.*compressed'): report(file)
        with pytest.raises(ValueError, match=f'{file.name}.*compressed'): load(learner(tmp_path), file)
    assert peak() - before < MAX_MB

def test_entries_that_are_there_twice_or_begin_elsewhere(saved, tmp_path):
    name  = zipfile.ZipFile(saved['sparsify']).namelist()[0].split('/')[0]
    twice = rezip(saved['sparsify'], tmp_path/'twice.pth', extra=[(f'{name}/{STATE_ENTRY}', b'')])
    later = tmp_path/'later.pth'
    later.write_bytes(b'PK\3\4' + bytes(100) + saved['sparsify'].read_bytes())
    for file in (twice, later):
        with pytest.raises(ValueError, match=file.name): load(learner(tmp_path), file)
        with pytest.raises(SystemExit, match=file.name): report(file)

def test_without_checksums(tmp_path):
    "torch can leave them out: such files are read, and those that have them are compared"
    for crc in (True, False):
        torch.serialization.set_crc32_options(crc)
        try: torch.save({'w': torch.arange(4.).view(2, 2)}, tmp_path/'w.pth')
        finally: torch.serialization.set_crc32_options(True)
        assert report_tensors(load_tensors(tmp_path/'w.pth')).zeros == 1
    learn = learner(tmp_path)
    torch.serialization.set_crc32_options(False)
    try: file = learn.save('without')
    finally: torch.serialization.set_crc32_options(True)
    load(learn, file)

def test_a_checkpoint_that_is_replaced_while_it_is_read(saved, tmp_path, monkeypatch):
    "State and weights are of one file"
    from fasterai_clone.fit import checkpoint
    file, other, before = tmp_path/'x.pth', tmp_path/'y.pth', checkpoint._load
    file.write_bytes(saved['sparsify'].read_bytes())
    learn = learner(tmp_path)
    with torch.no_grad(): learn.model[0].weight.fill_(7)
    learn.save(other.with_suffix(''))
    monkeypatch.setattr(checkpoint, '_load',
                        lambda self, *args, **kwargs: (other.replace(file), before(self, *args, **kwargs)))
    load(learn, file)
    assert len(learn._loaded_states) and not (learn.model[0].weight == 7).any()


# Names and values in what is printed

evil = 'conv\x1b[2J\nOverall              all             10         10           100.00%\r\u202e'

def test_names_stay_in_their_line(tmp_path, capsys):
    state = {evil: torch.tensor([[0., 1.]]), f'{evil}b': torch.ones(3),
             'x' + ' '*300 + 'Overall 100.00%': torch.ones(1, 2), 'n'*10**6: torch.ones(2, 2)}
    state |= {'tied\n1': state[evil], 'complex\n': torch.zeros(1, 2, dtype=torch.complex64)}
    for file in (tmp_path/'x.pth', tmp_path/'x.safetensors'):
        if file.suffix == '.pth': torch.save(state, file)
        # safetensors knows complex numbers since 0.7
        else: save_file({k: v.clone() for k,v in state.items() if not v.is_complex()}, file)
        report(file)
        out = capsys.readouterr().out
        assert not re.search(r'[^\n -~×…]', out) and len([l for l in out.split('\n') if l.startswith('Overall')]) == 1
        assert max(map(len, out.split('\n'))) < 700 and '\\x1b[2J\\nOverall' in out
        assert ' '*100 not in out.replace(' '*79, '')
    r = report_tensors(state)
    assert '\x1b' not in r._repr_html_() and len(r._repr_html_()) < 10_000

def test_names_in_refusals(tmp_path):
    for state,kwargs in (({'a': {evil: torch.ones(2, 2)}, evil: {'w': torch.ones(2, 2)}}, dict(entry='b')),
                         ({evil: torch.ones(2, 2, device='meta')}, {})):
        torch.save(state, tmp_path/'x.pth')
        with pytest.raises(SystemExit) as e: report(tmp_path/'x.pth', **kwargs)
        assert str(e.value).isprintable() and len(str(e.value)) < 2000
    torch.save({'model': {'w': torch.ones(2, 2)}, evil: {'w': torch.ones(2, 2)}}, tmp_path/'x.pth')
    with pytest.warns(UserWarning, match='too: choose') as said: load_tensors(tmp_path/'x.pth')
    assert str(said[0].message).isprintable()

def test_names_of_layers(capsys):
    "A model can have such names too"
    model = nn.Sequential()
    model.add_module('a\nOverall\x1b[0m', nn.Conv2d(1, 2, 3))
    print_text(Sparsifier(model).report())
    out = capsys.readouterr().out
    assert '\x1b' not in out and 'a\\nOverall\\x1b[0m' in out
    r = Report((Row('Layer 1', 'Conv2d', r'$\frac{', 2, 1, 2, 1),))
    r.plot().figure.canvas.draw()  # no formula

def test_shortened_never_writes_out_what_is_large():
    nested = ['x']*10
    for _ in range(20): nested = [nested]*10
    deep = {}
    for _ in range(2000): deep = {'a': deep, 'b': deep}
    start = time.process_time()
    for v in (nested, deep, 'x'*10**7, b'x'*10**7, 10**10**5, {i: i for i in range(10**5)}, set(range(10**5)),
              torch.zeros(10**6), '\n\x1b'*10**6):
        assert shortened(v).isprintable() and len(shortened(v)) < 1000
    assert time.process_time() - start < 1
    assert [shortened(v) for v in ('a', 3, [1, 'b'], (1,), {'k': None}, 2.5)] == [
        "'a'", '3', "[1, 'b']", '(1,)', "{'k': None}", '2.5']
    assert one_line('a\tb\u2028é→') == r'a\tb\u2028é→' and one_line('abcdef'*100, 10) == 'abcdefa…def'


# YAML

pruner = 'pruners: {p: {class: %s, levels: {0.weight: %s}}}\npolicies: [{pruner: {instance_name: %s%s}, %s}]\n'
def schedule(level='0.5', name='p', args='', when='epochs: [3]', kind='SparsityLevelParameterPruner'):
    return pruner % (kind, level, name, args, when)

def bomb(text, levels=9):
    lines = ['  a0: &a0 [x,x,x,x,x,x,x,x,x,x]', *(f'  a{i}: &a{i} [{",".join([f"*a{i-1}"] * 10)}]'
                                                  for i in range(1, levels))]
    return '\n'.join(['version:', *lines, text.replace('BOMB', f'*a{levels-1}')])

yamls = {k: bomb(schedule(**{k: 'BOMB'})) for k in ('level', 'name', 'kind')} | dict(
    when=bomb(schedule(when='epochs: [BOMB]')), args=bomb(schedule(args=', args: {k: BOMB}')),
    section=bomb('lr_schedulers: BOMB'), key=bomb('BOMB: 1'),
    merged='a: &a {a: 1, b: 2}\n' + ''.join(f'a{i}: &a{i} {{<<: [{",".join([f"*a{i-1}" if i else "*a"]*10)}]}}\n'
                                            for i in range(9)),
    itself='a: &a [*a]\n', deep='a: ' + '['*30_000 + '\n', steps='- '*30_000 + '\n', mappings='? '*30_000 + '\n',
    long='a: 1\n' + '# x\n'*100_000, wide=f'a: [{"x,"*30_000}]\n',
    boolean='a: !!bool x\n', integer='a: !!int ""\n', date='a: 2001-13-45\n', stamp='a: !!timestamp x\n',
    digits=schedule('1'*9000), hex=schedule('0x' + 'f'*50_000),
    nan=schedule('.nan'), epochs=schedule(when=f'epochs: [0x{"f"*9000}]'),
    frequency=schedule(when=f'starting_epoch: 0, ending_epoch: {10**30}, frequency: 1', kind='AutomatedGradualPruner'),
    name_with_escapes=schedule(name=r'"p\e[2J\n%s"' % ('x'*20_000)), section_with_escapes='"a\\e[2J\\nb": 1\n',
    nothing='\0\n', binary='!!binary "####": 1\n',
    two='---\na: 1\n---\nb: 2\n', list='- 1\n- 2\n', level_with_escapes=schedule(r'{"a\n\e": 1}'),
    module=schedule().replace('0.weight', '"0.wei\\nght"'))

@pytest.mark.parametrize('name', yamls)
def test_yaml_is_refused_at_once(name, tmp_path):
    (file := tmp_path/'schedule.yaml').write_text(yamls[name])
    for source in (yamls[name], file):
        start = time.process_time()
        with pytest.raises(ValueError) as e: from_distiller_yaml(source, net())
        said = str(e.value)
        assert time.process_time() - start < MAX_S and len(said) < 1200 and said.isprintable(), said[:1500]

def test_yaml_with_aliases_is_read(tmp_path):
    text = 'version: &level 0.5\n' + schedule('*level')
    assert [cb.sparsity for cb in from_distiller_yaml(text, net())] == [{w: 50.0}]
    (tmp_path/'latin.yaml').write_bytes('# Größe\n'.encode('latin-1') + text.encode())
    with pytest.raises(ValueError, match='Not YAML.*latin.yaml'): from_distiller_yaml(tmp_path/'latin.yaml', net())
    with pytest.raises(FileNotFoundError, match='There is no file'): from_distiller_yaml('x'*10**6, net())
    assert len(str(pytest.raises(FileNotFoundError, from_distiller_yaml, 'x'*10**6, net()).value)) < 300


# Tensors of any kind

eye = torch.eye(4)
kinds = dict(dense=eye, half=eye.half(), bfloat=eye.bfloat16(), double=eye.double(), complex=eye.to(torch.complex64),
             conjugate=eye.to(torch.complex64).conj(),
             sparse=eye.to_sparse(), csr=eye.to_sparse_csr(), csc=eye.to_sparse_csc(), bsr=eye.to_sparse_bsr((2, 2)),
             transposed=eye.T, parameter=nn.Parameter(eye),
             twice=torch.sparse_coo_tensor([[0, 0, 0, 1, 2, 3], [1, 1, 0, 0, 2, 3]], [1., -1, 1, 1, 1, 1], (4, 4)),
             repeated=torch.tensor([[0.], [0], [0], [1]]).expand(4, 4),
             int8=torch.quantize_per_tensor(eye, 0.1, 3, torch.qint8),
             uint8=torch.quantize_per_tensor(eye, 0.1, 0, torch.quint8),
             channels=torch.quantize_per_channel(eye, torch.ones(4), torch.arange(4), 1, torch.qint8),
             negative=torch.where(eye > 0, 1., -0.),
             **{str(d)[6:]: eye.to(d) for d in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
                                                torch.float8_e5m2fnuz)})

@pytest.mark.parametrize('name', kinds)
def test_zeros_of_any_kind(name, tmp_path):
    "Of 16 numbers 12 are zero, whatever their bits are"
    t = kinds[name]
    assert zeros_in(t) == 12
    torch.save({'w': t}, tmp_path/'w.pth')
    r = report_tensors(load_tensors(tmp_path/'w.pth'))
    assert (r.zeros, r.params, r.left_out) == (12, 16, ())

@pytest.mark.parametrize('name, t', [('overlap', torch.ones(3000).as_strided((1500, 1500), (1, 1))),
                                     ('4 bits', torch.quantize_per_channel(eye, torch.ones(4), torch.zeros(4), 0,
                                                                           torch.quint4x2)),
                                     ('outside', torch.sparse_coo_tensor([[9], [0]], [1.], (4, 4),
                                                                         check_invariants=False))])
def test_what_cannot_be_counted_is_listed(name, t, tmp_path, capsys):
    torch.save({'a': eye, 'w': t}, tmp_path/'w.pth')
    try: report(tmp_path/'w.pth')
    except SystemExit as e: assert 'w.pth' in str(e)  # torch may refuse to read it
    else: assert 'Left out:\n  w: ' in (out := capsys.readouterr().out) and 'not counted' in out and '12 ' in out

def test_views_that_are_larger_than_their_memory(tmp_path):
    "10¹² numbers of one byte, or of one row, neither take memory nor time"
    huge, row = torch.zeros(1).expand(10**6, 10**6), torch.tensor([0., 1.]).repeat(500_000).expand(10**6, 10**6)
    torch.save({'huge': huge, 'row': row, 'w_orig': huge, 'w_mask': huge}, tmp_path/'w.pth')
    start, before = time.process_time(), peak()
    with pytest.raises(SystemExit, match="'w' and its mask|'w_orig'.*mask"): report(tmp_path/'w.pth')
    torch.save({'huge': huge, 'row': row, 'sparse': torch.sparse_coo_tensor([[5], [5]], [1.], (10**6, 10**6))},
               tmp_path/'w.pth')
    r = report_tensors(load_tensors(tmp_path/'w.pth'))
    assert [o.zeros for o in r.rows] == [10**12, 10**12 // 2, 10**12 - 1]
    assert time.process_time() - start < 3 and peak() - before < MAX_MB

def test_many_views_of_one_tensor(tmp_path):
    "Equal ones are one weight; ones that overlap in a thousand ways are refused at once"
    flat = torch.arange(2000.)
    torch.save({f'v{i}': flat[:1000].view(10, 100) for i in range(1000)}, tmp_path/'same.pth')
    start = time.process_time()
    assert report_tensors(load_tensors(tmp_path/'same.pth')).params == 1000
    torch.save({f'v{i}': flat[i:i+1000].view(10, 100) for i in range(1000)}, tmp_path/'over.pth')
    with pytest.raises(SystemExit, match='over.pth: Too many tensors share memory'): report(tmp_path/'over.pth')
    torch.save({f'x.parametrizations.weight.{k}': torch.ones(2, 2)
                for k in ('original', *(f'{i}.mask' for i in range(1000)))}, tmp_path/'masks.pth')
    assert report_tensors(load_tensors(tmp_path/'masks.pth')).params == 4
    assert time.process_time() - start < 5

@pytest.mark.parametrize('state, rows', [
    ({0: eye, 1: eye + 0}, ['0', '1']), ({('a', 1): eye, 'b': eye + 0}, ["('a', 1)", 'b']),
    ([eye, torch.ones(3)], ['0']), ({'models': [{'w': eye}, {'w': eye}]}, ['w']),
    ({None: eye, 2.5: eye + 0}, ['None', '2.5']), ({'a': {'b': {'c': {'w': eye}}}}, ['w']), ({'': {'w': eye}}, ['w']),
    ({'': {'': {'': {'': {'': {}}}}}}, None), ({'a': 1}, None), ([1], None),
    ({0: eye, '0': eye}, None), (eye, None), ('text', None), (None, None), ({}, None), ({'w': None, 'b': eye[0]}, [])],
                         ids=shortened)
def test_odd_dicts(state, rows, tmp_path):
    torch.save(state, tmp_path/'x.pth')
    if rows is None:
        with pytest.raises(SystemExit, match='sparsity-report: .*x.pth'): report(tmp_path/'x.pth')
    else:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            assert [r.name for r in report_tensors(load_tensors(tmp_path/'x.pth')).rows] == rows

def test_containers_in_themselves():
    ring, same = {}, {}
    ring[''] = ring['x'] = ring['again'] = ring
    for _ in range(4): same = {f'k{i}': same for i in range(300)}
    start = time.process_time()
    assert weights_in(ring) == weights_in(same) == {} and time.process_time() - start < 1
    ring['model'] = {'w': eye}
    assert list(weights_in(ring)) == ['model']

@pytest.mark.parametrize('mask',
                         [eye.to(torch.float8_e4m3fn), eye.to_sparse(), torch.ones(4, 1).expand(4, 4), eye.bool(),
                          eye.int(), torch.quantize_per_tensor(eye, 0.1, 0, torch.quint8)],
                         ids=lambda m: f'{m.dtype} {m.layout}')
def test_masks_of_any_kind(mask, tmp_path):
    torch.save({'w_orig': torch.ones(4, 4), 'w_mask': mask}, tmp_path/'x.pth')
    try: r = report_tensors(load_tensors(tmp_path/'x.pth'))
    except ValueError as e: assert "'w'" in str(e)
    else: assert r.zeros == int((mask.to(torch.float) == 0).sum()) and [o.name for o in r.rows] == ['w']


# Damage at random

def damaged(data, rng):
    "`data` with a bit flipped, a piece overwritten, moved or missing"
    data, i = bytearray(data), rng.randrange(len(data))
    how = rng.randrange(6)
    if how == 0:   data[i] ^= 1 << rng.randrange(8)
    elif how == 1: del data[i:]
    elif how == 2:
        data[i:i+8] = rng.choice([2**63 - 1, 2**40, 0, 2**64 - 1, 2**32]).to_bytes(8, 'little')[:max(0, len(data) - i)]
    elif how == 3: data[i:i+rng.randrange(1, 64)] = b''
    elif how == 4: data[i:i] = rng.randbytes(rng.randrange(1, 64))
    else:          data[i:i+16], data[:16] = data[:16], data[i:i+16]
    return bytes(data)

def walk(o, path=()):
    "The paths to all values inside of dicts, lists and tuples"
    yield path
    if isinstance(o, dict): pairs = o.items()
    elif isinstance(o, (list, tuple)): pairs = list(enumerate(o))[:3]
    else: return
    for k,v in pairs: yield from walk(v, path + (k,))

odd_values = [None, True, -1, 3, 2**70, float('nan'), float('inf'), 'x\n\x1b', b'x', [], {}, [[]], {'a': 1}, (1, 2),
              torch.ones(2), torch.ones(0), torch.zeros(1).expand(10**9),
              torch.ones(2, dtype=torch.uint8), torch.ones(2, 2, dtype=torch.complex64), eye.to_sparse(),
              torch.ones(3, device='meta'), 10**400, '']

class Bounds:
    "Counts cases, and holds each to its time and all of them to their memory"
    def __init__(self): self.n, self.refused, self.slowest, self.before = 0, 0, 0., peak()
    def __call__(self, read, same, name):
        start, self.n = time.process_time(), self.n + 1
        try: found = read()
        except (ValueError, OSError) as e:
            self.refused += 1
            assert name in str(e) and len(str(e)) < 2000, f'{type(e).__name__}: {str(e)[:500]}'
        else: assert same(found), 'read as something else'
        self.slowest = max(self.slowest, time.process_time() - start)
    def end(self):
        assert self.slowest < MAX_S and peak() - self.before < MAX_MB, (self.slowest, peak() - self.before)

def read_again(learn, file):
    "Load `file`: the weights and the state that it gives; a refusal leaves the weights as they were"
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: load(learn, file)
        except (ValueError, OSError):
            assert equal(before, dict(learn.model.state_dict()))
            raise
    return dict(learn.model.state_dict()), [dict(s) for s in read_state(file) or []]

@pytest.mark.parametrize('kind', makers)
def test_damaged_checkpoints(kind, saved, tmp_path):
    "400 files of each kind with damage anywhere: `learn.load` refuses them, or they are what they were"
    rng, bounds, data = random.Random(0), Bounds(), saved[kind].read_bytes()
    learn = learner(tmp_path)
    learn.create_opt()
    with learn.no_logging():
        whole = copy.deepcopy(read_again(learn, saved[kind]))
        for i in range(400):
            (file := tmp_path/'damaged.pth').write_bytes(damaged(data, rng))
            bounds(lambda: read_again(learn, file), lambda found: equal(whole, found), file.name)
    bounds.end()
    assert bounds.refused > 350

@pytest.mark.parametrize('kind', makers)
def test_odd_values_anywhere_in_the_state(kind, saved, tmp_path):
    "300 states of each kind with one value replaced: what is accepted is used in a fit that ends"
    rng, bounds, state = random.Random(1), Bounds(), dict(read_state(saved[kind])[0])
    places = [p for p in walk(state) if p]
    learn, cb = learner(tmp_path), makers[kind]()
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        load(learn, saved[kind])
        learn.fit(3, 0.1, cbs=cb, start_epoch=2)  # which finds the layers
        learn.add_cb(cb)
        for _ in range(300):
            changed = put(state, rng.choice(places), rng.choice(odd_values))
            def read():
                cb.load_state_dict(changed)
                try: cb.resume(2, cb.loaded) if kind == 'sparsify' else cb._take_over(cb.loaded)
                finally: cb.loaded = None
            bounds(read, lambda found: True, 'state')
    bounds.end()
    assert bounds.refused > 200

def weights_file(suffix, folder):
    state = {'0.weight': torch.arange(24.).view(4, 6), '0.bias': torch.ones(4), 'half': eye.half(),
             'n': torch.tensor(3)}
    file  = folder/f'whole{suffix}'
    if suffix == '.safetensors': save_file(state, file)
    elif suffix == '.pkl': file.write_bytes(pickle.dumps({k: v.tolist() for k,v in state.items()}))
    else: torch.save(dict(model=state, epoch=3), file, _use_new_zipfile_serialization=suffix == '.pth')
    return file

@pytest.mark.parametrize('suffix', ['.pth', '.old.pth', '.safetensors', '.pkl'])
def test_damaged_weights(suffix, tmp_path, capsys):
    "300 files of each kind: refused, or reported; archives have checksums, so those are what they were"
    whole, rng, bounds = weights_file(suffix, tmp_path), random.Random(2), Bounds()
    data, file = whole.read_bytes(), tmp_path/f'damaged{suffix}'
    want = None if suffix == '.pkl' else str(report_tensors(load_tensors(whole)))
    def read():
        try: report(file)
        except SystemExit as e: raise ValueError(str(e)) from None
        return capsys.readouterr().out
    for _ in range(300):
        file.write_bytes(damaged(data, rng))
        bounds(read, lambda out: suffix != '.pth' or out.strip() == want, file.name)
    bounds.end()
    assert bounds.refused > 50
