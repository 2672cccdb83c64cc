"Measures that need a process of their own: `python -m benchmarks.child CONTESTANT DEVICE` prints them as JSON"
import time
START = time.perf_counter()  # before anything is imported
import gc, importlib, io, json, sys, warnings
from contextlib import redirect_stdout
from pathlib import Path
from .adapters import CONTESTANTS, SPARSITY

def startup(contestant, device):
    "Seconds to import the package, and until the first batch of a fastai training is done"
    importlib.import_module(contestant.package)
    imported = time.perf_counter() - START
    import torch
    from fastai.callback.core import Callback, CancelFitException
    from .models import learner
    torch.set_num_threads(1)
    class Stop(Callback):
        order = 100
        def after_batch(self):
            Stop.at = time.perf_counter() - START
            raise CancelFitException
    learn = learner('digits net', device)
    with redirect_stdout(io.StringIO()):
        learn.fit(1, cbs=[cb for cb in (contestant.call('callback', 'local'), Stop()) if cb])
    return dict(imported=imported, first=Stop.at)

def peak(device, reset=False):
    "Peak of memory in bytes, on CUDA the device's; `reset` makes it start from what is in use now"
    if device == 'cuda':
        import torch
        if reset: torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset: Path('/proc/self/clear_refs').write_text('5')
    return 1024 * int(next(l for l in Path('/proc/self/status').read_text().split('\n')
                           if l.startswith('VmHWM')).split()[1])

def held():
    "Bytes of all tensors that are alive"
    import torch
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        stores = [o.untyped_storage() for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in stores}.values())

def memory(contestant, device):
    "After three training steps with masks held: bytes of tensors, checkpoint, peak of memory"
    import torch
    from .models import resnet, stepper
    model = resnet(18).to(device)
    weights = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 4)
    gc.collect()
    peak(device, reset=True)
    step = stepper(contestant, model, 'Adam', torch.randn(16, 3, 64, 64, device=device),
                   torch.zeros(16, dtype=torch.long, device=device))
    for _ in range(3): step()
    top, _, now, file = peak(device), gc.collect(), held(), io.BytesIO()
    torch.save(model.state_dict(), file)
    result = dict(held=now, weights=weights, checkpoint=file.tell()/1e6, peak=top/1e6)
    del file, step, model
    try: return result | dict(rise=rise(contestant, device))
    except NotImplementedError as e: return result | dict(rise=str(e))

def rise(contestant, device):
    "Bytes per weight by which memory peaks while masks are chosen"
    from .models import layers, resnet
    model = resnet(50).to(device)
    weights = sum(m.weight.numel() for m in layers(model))
    choose = contestant.call('choose', model, 'global', 'magnitude')
    gc.collect()
    before = peak(device, reset=True)
    choose(SPARSITY)
    return (peak(device) - before) / weights

if __name__ == '__main__':
    name, device = sys.argv[1:]
    contestant = next(c for c in CONTESTANTS if c.name == name)
    print('\n' + json.dumps(startup(contestant, device) | memory(contestant, device)))
