"A reader gets one whole version of a file that other processes replace meanwhile"
import os, signal, time
from contextlib import contextmanager
from functools import cache

import pytest, torch, torch.nn as nn

from fasterai_clone.core.envelope import FileFormat, read_file, write_file
from fasterai_clone.core.masks import Masks
from fasterai_clone.prune.thinned_files import load_thinned, save_thinned
from fasterai_clone.sparse.ticket_files import load_ticket, save_ticket, ticket_info

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs processes that can be forked')
N_VERSIONS, N_READS = 5, 500


# The i-th version of each kind of file differs from the others in its sizes, in its numbers and in its metadata

def net(i): return nn.Sequential(nn.Linear(8, 200), nn.ReLU(), nn.Linear(200, 8)) if i is None else filled(net(None), i)

@torch.no_grad()
def filled(model, i):
    for p in model.parameters(): p.fill_(i + 1)
    return model

@cache
def masks(i): return Masks({'a': torch.arange(20_000) % 7 == i, 'b': torch.full((i + 1,), True)})

@cache
def ticket_masks(i): return Masks({'0.weight': torch.arange(1600).reshape(200, 8) % 7 <= i})

def save_masks(file, i): masks(i).save(file)
def read_masks(file):
    found = Masks.load(file)
    return len(found['b']) - 1 if found == masks(len(found['b']) - 1) else None

def save_a_ticket(file, i): save_ticket(file, net(i).state_dict(), ticket_masks(i), version_is=i)
def read_ticket(file):
    model = net(None)
    found = load_ticket(file, model)
    i     = int(model[2].bias[0]) - 1
    want  = net(i)
    ticket_masks(i).apply(want)
    return i if found == ticket_masks(i) and all(map(torch.equal, model.parameters(), want.parameters())) else None

def read_info(file):
    about = ticket_info(file)
    return about['version_is'] if about['sparsity'] == ticket_masks(about['version_is']).sparsity else None

def make_large(): return nn.Sequential(nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 8))
def smaller(i): return filled(nn.Sequential(nn.Linear(8, 50 + i), nn.ReLU(), nn.Linear(50 + i, 8)), i)
def save_small(file, i): save_thinned(smaller(i), file)
def read_small(file):
    model = load_thinned(make_large, file)
    i     = model[0].out_features - 50
    return i if all(map(torch.equal, model.parameters(), smaller(i).parameters())) else None

numbers = FileFormat('example.numbers', 'numbers', 'save_numbers', needed=('i',))
def save_numbers(file, i):
    write_file(file, numbers, {'a': torch.full((1000 + i,), i), f'b{i}': torch.tensor(i)}, i=str(i))
def read_any(file):
    "As any safetensors file is read, for a report"
    about, found = read_file(file)
    i = int(about['i'])
    return i if torch.equal(found['a'], torch.full((1000 + i,), i)) and int(found[f'b{i}']) == i else None

KINDS = dict(masks=(save_masks, read_masks), ticket=(save_a_ticket, read_ticket), info=(save_a_ticket, read_info),
             thinned=(save_small, read_small), any=(save_numbers, read_any))

@contextmanager
def writers(save, file, n=1):
    "Processes that save one version after the other until the block ends"
    pids = []
    try:
        for _ in range(n):
            if (pid := os.fork()) == 0:
                try:
                    for i in range(1_000_000): save(file, i % N_VERSIONS)
                finally: os._exit(1)  # nothing of the parent's is to run here
            pids.append(pid)
        yield pids
    finally:
        for pid in pids: os.kill(pid, signal.SIGKILL)
        ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert ended == [-signal.SIGKILL]*n, 'a writer has failed'

def many_reads(read, file):
    "What came of so many reads, and of more until a writer has got its turn on a busy machine"
    found, end = [], time.monotonic() + 60
    while len(found) < N_READS or len({*found}) == 1 and time.monotonic() < end: found.append(read(file))
    return found

@pytest.mark.parametrize('kind', KINDS)
def test_every_read_is_one_whole_version(kind, tmp_path):
    torch.set_num_threads(1)  # a forked process has none of the parent's threads
    save, read = KINDS[kind]
    file = tmp_path/'f.safetensors'
    for i in range(N_VERSIONS): save(file, i)
    with writers(save, file): found = many_reads(read, file)
    assert None not in found and len({*found}) > 1, f'{found.count(None)} of {N_READS} reads are of no version'

def test_two_writers_and_a_reader(tmp_path):
    "Nor do writers hurt each other: what the last one leaves is whole, and so is what is read meanwhile"
    torch.set_num_threads(1)
    file = tmp_path/'f.safetensors'
    save_masks(file, 0)
    with writers(save_masks, file, 2): found = many_reads(read_masks, file)
    assert None not in found and len({*found}) > 1
    save_masks(file, 3)
    assert read_masks(file) == 3 and os.listdir(tmp_path) == ['f.safetensors']

def test_a_file_that_is_replaced_between_two_reads_of_a_reader(tmp_path, monkeypatch):
    "The handle is that of the old file, at whichever moment the new one comes"
    import fasterai_clone.core.envelope as files
    file, read_header = tmp_path/'f.safetensors', files._read_header
    def replaced(f, format):
        found = read_header(f, format)
        save_masks(file, 4)
        return found
    save_masks(file, 1)
    monkeypatch.setattr(files, '_read_header', replaced)
    assert read_masks(file) == 1
    monkeypatch.undo()
    assert read_masks(file) == 4

def test_a_file_that_is_written_to_in_place_is_refused(tmp_path, monkeypatch):
    "As other programs do"
    import fasterai_clone.core.envelope as files
    file, read_header = Masks({'a': torch.ones(800_000).bool()}).save(tmp_path/'f'), files._read_header
    whole = file.read_bytes()
    for new in (whole[:-5], whole + b'.....', whole[:-5] + bytes(5)):
        def rewritten(f, format):
            found = read_header(f, format)
            file.write_bytes(new)
            return found
        file.write_bytes(whole)
        monkeypatch.setattr(files, '_read_header', rewritten)
        with pytest.raises(ValueError, match='f.safetensors'): Masks.load(file)
        monkeypatch.undo()
