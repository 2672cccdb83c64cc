"Time in turns, and know the machine"
import gc, os, platform, time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from statistics import median
import torch

def timed(f, device):
    "Seconds that `f()` takes, and what it returns"
    gc.disable()
    sync = torch.cuda.synchronize if device == 'cuda' else int
    try:
        sync()
        start = time.perf_counter()
        result = f()
        sync()
        return time.perf_counter() - start, result
    finally: gc.enable()

def interleave(jobs, rounds, warm_up=True):
    """Call each of `jobs` (name → function that gives a number) once a round, in rotating order: the numbers, and why
    some failed"""
    results, failed = {k: [] for k in jobs}, {}
    for r in range(rounds + warm_up):
        gc.collect()
        names = [k for k in jobs if k not in failed]
        shift = r % max(len(names), 1)
        for k in names[shift:] + names[:shift]:
            try: value = jobs[k]()
            except NotImplementedError as e: failed[k] = str(e)
            except Exception as e: failed[k] = f'{type(e).__name__}: {e}'.split('\n')[0]
            else:
                if r >= warm_up: results[k].append(value)
    return {k: v for k, v in results.items() if k not in failed}, failed

def spread(values):
    "Median, minimum and maximum"
    return [median(values), min(values), max(values)]

def rows(part, case, results, failed, unit, reference=None, counts=None):
    "One record for each contestant; ratios to the `reference` of the same round"
    base = results.get(reference)
    for k in [*results, *failed]:
        row = dict(part=part, case=case, contestant=k, unit=unit, count=(counts or {}).get(k, ''),
                   why=failed.get(k, ''))
        if k in results:
            row |= dict(zip(('median', 'min', 'max'), spread(results[k])), rounds=results[k])
            ratios = [a/b for a, b in zip(results[k], base or [])]
            if ratios: row |= dict(zip(('ratio', 'ratio_min', 'ratio_max'), spread(ratios)), reference=reference)
        yield row

def cpu_model():
    try: return next(l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name'))
    except (OSError, StopIteration): return platform.processor() or platform.machine()

def installed(package):
    try: return version(package)
    except PackageNotFoundError: return 'not installed'

def machine(device):
    "What the numbers were measured on"
    return dict(date=str(date.today()), cpu=cpu_model(), cores=os.cpu_count(), threads=torch.get_num_threads(),
                load=round(os.getloadavg()[0], 2),
                device=torch.cuda.get_device_name() if device == 'cuda' else 'cpu', system=platform.platform(),
                python=platform.python_version(),
                **{p: installed(p) for p in ('torch', 'torchvision', 'fastai', 'fasterai-clone', 'fasterai', 'numpy')})
