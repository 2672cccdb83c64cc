"The five measures: each yields rows of results"
import io, json, os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from copy import deepcopy
from functools import cache, partial
from itertools import chain
import torch
from .adapters import BASELINE, SPARSITY, taking_part
from .models import OPTIMIZERS, SIZES, count, layers, learner, resnet, stepper
from .timing import interleave, rows, timed

PASS = 'one memory pass'

def memory_pass(model, device):
    "Seconds of reading all weights once"
    ws = [m.weight.detach() for m in layers(model)]
    return sorted(timed(lambda: [w.sum() for w in ws], device)[0] for _ in range(3))[1]

def choice(base, noise, contestant, context, criteria, start, end, counts, device):
    "Seconds to choose masks for a copy of `base` at `end` percent, after masks at `start`"
    model = deepcopy(base)
    choose = contestant.call('choose', model, context, criteria)
    if start: choose(start)
    if noise:  # for magnitude too: the same memory is in use then
        for m, n in zip(layers(model), noise):
            m.weight.data.add_(n)
            m.weight.grad = n.clone()
    seconds, masks = timed(partial(choose, end), device)
    counts[contestant.name] = count(model, context, end, masks)
    return seconds

def choosing(args):
    "(a) Time to choose masks"
    for i, size in enumerate(args.sizes):
        base = SIZES[size]().to(args.device)
        noise = [torch.randn_like(m.weight) * .01 for m in layers(base)] if i == args.detail else None
        cases = [(c, 'magnitude', 0, SPARSITY) for c in ('local', 'global')]
        if noise: cases += [('global', 'movement', 0, SPARSITY)]
        if noise and not args.quick: cases += [('global', 'gradient', 0, SPARSITY), ('global', 'magnitude', 80, 82)]
        for context, criteria, start, end in cases:
            counts, part = {}, 'choose' if criteria == 'magnitude' else 'criteria'
            jobs = {PASS: lambda: memory_pass(deepcopy(base), args.device)}
            jobs |= {c.name: partial(choice, base, noise, c, context, criteria, start, end, counts, args.device)
                     for c in taking_part(part)}
            case = f'{size}, {context}, {f"{start} to {end}" if start else end} %'
            if part == 'criteria': case += f', {criteria}'
            yield from rows('a choosing masks', case, *interleave(jobs, args.rounds, not args.quick), 's', PASS, counts)

def steps(args):
    "(b) Time of a training step with masks held"
    x, y = torch.randn(16, 3, 64, 64, device=args.device), torch.randint(10, (16,), device=args.device)
    base = resnet(18).to(args.device)
    for optimizer in OPTIMIZERS:
        models, steppers = {}, {}
        def one(c):
            if c.name not in steppers:
                models[c.name] = deepcopy(base)
                steppers[c.name] = stepper(c, models[c.name], optimizer, x, y)
            return timed(steppers[c.name], args.device)[0]
        results = interleave({c.name: partial(one, c) for c in taking_part('step')}, args.steps)
        counts = {k: count(models[k], 'local') for k in results[0] if k != BASELINE}
        yield from rows('b step at 90 %', f'ResNet-18, {optimizer}', *results, 's', BASELINE, counts)

def fit(contestant, net, context, epochs, batches, counts, device):
    "Seconds an epoch of a whole training"
    from fastai.callback import progress  # noqa: F401, gives `Learner` its `no_bar`
    torch.manual_seed(0)
    learn, cb = learner(net, device, batches), contestant.call('callback', context)
    with learn.no_bar(), learn.no_logging(), redirect_stdout(io.StringIO()):
        seconds, _ = timed(partial(learn.fit, epochs, 1e-3, cbs=cb), device)
    if cb: counts[contestant.name] = count(learn.model, context)
    return seconds / epochs

def training(args):
    "(c) Time of a training whose target moves at every batch"
    for net, epochs in (('digits net', args.digits_epochs), ('ResNet-18', args.epochs)):
        for context in args.contexts:
            counts = {}
            jobs = {c.name: partial(fit, c, net, context, epochs, args.batches, counts, args.device)
                    for c in taking_part('train')}
            results = interleave(jobs, args.rounds, not args.quick)
            yield from rows('c training with agp', f'{net}, {context}', *results, 's/epoch', BASELINE, counts)

class ChildError(Exception): "The last line of a process that failed"

def child(contestant, device):
    "What `benchmarks.child` measured in a process of its own"
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_='65536')  # freed memory goes back to the system at once
    out = subprocess.run([sys.executable, '-m', 'benchmarks.child', contestant.name, device], env=env,
                         capture_output=True, text=True)
    if out.returncode: raise ChildError(out.stderr.strip().split('\n')[-1])
    return json.loads(out.stdout.split('\n')[-2])

@cache
def children(device, rounds, workers):
    "The results of all contestants, each in a process of its own, `workers` at a time; and why some failed"
    with ThreadPoolExecutor(workers) as pool:
        tasks = [(c.name, pool.submit(child, c, device)) for _ in range(rounds) for c in taking_part('process')]
    results, failed = {}, {}
    for name, task in tasks:
        if task.exception(): failed[name] = str(task.exception())
        else: results.setdefault(name, []).append(task.result())
    return {k: v for k, v in results.items() if k not in failed}, failed

def by_key(part, cases, results, failed, reference=None):
    "Rows of results that are dicts: one case for each of their keys; a string says why there is no number"
    for key, (case, unit) in cases.items():
        values = {k: [v[key] for v in vs] for k, vs in results.items()}
        why = failed | {k: v[0] for k, v in values.items() if isinstance(v[0], str)}
        yield from rows(part, case, {k: v for k, v in values.items() if k not in why}, why, unit, reference)

def memory(args):
    "(d) Memory"
    results, failed = children(args.device, args.starts, args.workers)
    base = results[BASELINE][0]['held']
    for r in chain(*results.values()): r['extra'] = (r['held'] - base) / r['weights']
    cases = dict(extra=('ResNet-18, Adam: tensors held on top of weights and optimizer', 'bytes/weight'),
                 checkpoint=('ResNet-18: state_dict, saved', 'MB'), peak=('ResNet-18, Adam, 3 steps: peak', 'MB'),
                 rise=('ResNet-50: rise of the peak while choosing masks, global', 'bytes/weight'))
    yield from by_key('d memory', cases, results, failed)

def startup(args):
    "(e) Time to import, and to the first batch"
    results, failed = children(args.device, args.starts, args.workers)
    yield from by_key('e start', dict(imported=('import', 's'), first=('digits net: first batch done', 's')), results,
                      failed, BASELINE)

MEASURES = dict(a=choosing, b=steps, c=training, d=memory, e=startup)
