"Lottery tickets against their controls, over seeds: `python -m benchmarks.tickets` (about 6 minutes)"
import argparse, csv, time
from pathlib import Path
import torch, torch.nn as nn
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fasterai_clone.digits import digits_dls
from fasterai_clone.sparse.tickets_callback import find_ticket
from .timing import machine

# percent after the last round; the output layer ('5') at about half the rate, as Frankle & Carbin have it
SPARSITY = {'*': 98, '5': 80}
SEARCH   = dict(n_epoch=20, lr=2e-3, rounds=5, layer_type=nn.Linear)
KINDS    = ('ticket', 'reinit', 'random')
FIELDS   = 'seed round kind sparsity epoch train_loss valid_loss accuracy'.split()

def lenet(seed):
    "Build LeNet-300-100 for 8×8 images"
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(),
                         nn.Linear(100, 10))

def search(seed, **kwargs):
    "Run `find_ticket` with the weights and batches of `seed`"
    learn = Learner(digits_dls(60), lenet(seed), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    return find_ticket(learn, **{**SEARCH, 'sparsity': SPARSITY, 'seed': seed, 'verbose': False, **kwargs})

def rows(seed, found):
    "Return a row for each epoch of each training run, with the accuracy in percent"
    for r in found.runs:
        for e in r.epochs:
            numbers = [round(v, 4) for v in (e['train_loss'], e['valid_loss'], 100*e['accuracy'])]
            yield dict(zip(FIELDS, (seed, r.round, r.kind, round(r.sparsity, 4), e['epoch'], *numbers)))

def main():
    p = argparse.ArgumentParser(prog='python -m benchmarks.tickets', description=__doc__)
    p.add_argument('--seeds', type=int, default=8)
    p.add_argument('--out', type=Path, default=Path('benchmarks/results/tickets.csv'))
    args = p.parse_args()
    torch.set_num_threads(1)
    start, table = time.perf_counter(), []
    about = {k: v for k,v in machine('cpu').items() if k in ('date', 'cpu', 'python', 'torch', 'fastai', 'numpy',
                                                             'fasterai-clone')}
    for seed in range(args.seeds):
        table += rows(seed, search(seed))
        print(f'seed {seed} done, {time.perf_counter() - start:.0f} s', flush=True)
    about |= dict(seeds=args.seeds, epochs=SEARCH['n_epoch'], lr=SEARCH['lr'],
                  minutes=round((time.perf_counter() - start) / 60, 1))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, 'w', newline='', encoding='utf-8') as f:
        f.writelines(f'# {k}: {v}\n' for k,v in about.items())
        writer = csv.DictWriter(f, FIELDS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(table)

if __name__ == '__main__': main()
