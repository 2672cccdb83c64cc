"Starts processes that run the cases of a test file together, and brings their results back"
import contextlib, datetime, io, os, subprocess, sys, time, traceback
from pathlib import Path

import torch, torch.distributed as dist

LIMIT = 300  # seconds until what hangs has failed


def start(file, world, folder):
    "Run `file` as a script in `world` processes; each one's results by the name of the case"
    env   = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore', CUDA_VISIBLE_DEVICES='',
                 TORCH_CPP_LOG_LEVEL='ERROR')
    logs  = [open(folder/f'{r}.log', 'w+') for r in range(world)]
    procs = [subprocess.Popen([sys.executable, file, str(r), str(world), str(folder)], stdout=l, stderr=l,
                              env=env, cwd=folder)
             for r,l in enumerate(logs)]
    until = time.time() + LIMIT
    try:
        for p in procs: p.wait(max(until - time.time(), 0.1))
    except subprocess.TimeoutExpired: pass
    finally:
        for p in procs: p.kill()
    said = '\n'.join(Path(l.name).read_text()[-2000:] for l in logs)
    for l in logs: l.close()
    assert all(p.wait() == 0 for p in procs), f'exit codes {[p.returncode for p in procs]}\n{said}'
    return [Results(torch.load(folder/f'{r}.pt', weights_only=False)) for r in range(world)]

class Results(dict):
    "What a process returned and printed, by the name of the case"
    def __getitem__(self, case):
        found = super().__getitem__(case)
        assert not isinstance(found, str), found  # it has failed
        return found

def main(cases):
    "What each process does: run the `cases` in their order, and save what they return and print"
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group('gloo', store=dist.FileStore(str(folder/'store'), world), rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=60))
    results = {}
    for case in cases:
        said, start = io.StringIO(), time.time()
        try:
            with contextlib.redirect_stdout(said): found = case(rank, world)
        except Exception: results[case.__name__] = f'{case.__name__} in process {rank}:\n{traceback.format_exc()}'
        else: results[case.__name__] = found, said.getvalue()
        print(f'{case.__name__} {time.time() - start:.1f} s', flush=True)
    torch.save(results, folder/f'{rank}.pt')
    dist.destroy_process_group()
