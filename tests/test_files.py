"A file is whole whenever the process that writes it is killed"
import os, random, signal, time
from functools import cache

import pytest, torch

from fasterai_clone.core.masks import Masks
from fasterai_clone.core.files import whole_file

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs processes that can be forked')


@cache
def version(i):
    "What the i-th file holds: 200,000 weights of one layer, and of another as many as i"
    return Masks({'0.weight': torch.arange(200_000).reshape(200, 1000) % 7 == i % 7,
                  '1.weight': torch.full((i,), True)})

def save_masks(masks, file): masks.save(file)

def save_torch(masks, file):
    with whole_file(file) as part: torch.save(dict(masks), part)

def save_in_place(masks, file):
    "What must not be done"
    torch.save(dict(masks), file)

def load_torch(file): return Masks(torch.load(file, weights_only=True))

def killed_while_writing(save, file, seconds):
    "Write one version after the other, in a process of its own, which is killed after so many `seconds`"
    if (pid := os.fork()) == 0:
        try:
            for i in range(1_000_000): save(version(i % 8), file)
        finally: os._exit(1)  # nothing of the parent's is to run here
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

def is_whole(load, file):
    "Is it one of the versions?"
    try: masks = load(file)
    except Exception: return False
    return masks == version(len(masks['1.weight']))

def outcomes(save, load, file, n):
    "For each of `n` kills, at random moments: was the file whole after it, and which other files were left?"
    for i in range(8): save(version(i), file)
    random.seed(0)
    torch.set_num_threads(1)  # a forked process has none of the parent's threads
    whole = []
    for _ in range(n):
        assert killed_while_writing(save, file, random.uniform(0.005, 0.05))
        whole.append((is_whole(load, file), [p.name for p in file.parent.iterdir() if p != file]))
    return zip(*whole)


@pytest.mark.parametrize('save, load', [(save_masks, Masks.load), (save_torch, load_torch)], ids=['masks', 'torch'])
def test_killed_at_random_moments(save, load, tmp_path):
    "Unfinished files that are left show that kills came in mid writing; the next save removes them"
    whole, left = outcomes(save, load, tmp_path/'file.bin', 30)
    assert whole == (True,)*30
    assert sum(map(bool, left)) > 3 and all(len(ns) <= 1 and ns[0].startswith('.file.bin.') for ns in left if ns)
    save(version(3), tmp_path/'file.bin')
    assert [p.name for p in tmp_path.iterdir()] == ['file.bin']

def test_a_file_that_is_written_in_place_is_broken_by_such_kills(tmp_path):
    whole, _ = outcomes(save_in_place, load_torch, tmp_path/'file.bin', 15)
    assert not all(whole)

def test_a_folder_that_is_full_or_missing(tmp_path):
    "An error while writing leaves the old file, and no other"
    file = tmp_path/'new'/'file'
    save_masks(version(3), file.with_suffix('.safetensors'))
    with pytest.raises(OSError), whole_file(file.with_suffix('.safetensors')) as part:
        part.write_bytes(b'half')
        raise OSError('No space left on device')
    assert Masks.load(file) == version(3) and [p.name for p in file.parent.iterdir()] == ['file.safetensors']
