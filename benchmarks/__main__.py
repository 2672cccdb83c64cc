"Compare with every peer: `python -m benchmarks --quick`"
import argparse, time
from pathlib import Path
import torch
from .measures import MEASURES
from .models import SIZES
from .output import save, table
from .timing import machine

def arguments():
    "The command line, and what it makes of the sizes"
    p = argparse.ArgumentParser(prog='python -m benchmarks', description=__doc__)
    p.add_argument('--quick', action='store_true',
                   help='small sizes and few rounds, under two minutes: to see that it works')
    p.add_argument('--only', default=','.join(MEASURES),
                   help='which of a (choosing masks), b (step), c (training), d (memory), e (start)')
    p.add_argument('--rounds', type=int,
                   help='rounds after a warm-up (default 7; quick 2, without it); (b) takes 8 times as many')
    p.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    p.add_argument('--out', type=Path, default=Path('benchmarks/results'))
    args = p.parse_args()
    args.only = args.only.split(',')
    if unknown := set(args.only) - set(MEASURES):
        p.error(f'--only takes {", ".join(MEASURES)}, got {", ".join(sorted(unknown))}')
    args.rounds = args.rounds or (2 if args.quick else 7)
    args.steps, args.starts, args.workers = (2, 1, 2) if args.quick else (8*args.rounds, 3, 1)
    args.sizes, args.detail = (list(SIZES)[:1], 0) if args.quick else (list(SIZES), 1)
    args.contexts = ['local'] if args.quick else ['local', 'global']
    args.digits_epochs, args.epochs, args.batches = (2, 1, 3) if args.quick else (10, 3, 16)
    return args

def main():
    args = arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows, about, start = [], machine(args.device), time.perf_counter()
    print(*(f'{k}: {v}' for k, v in about.items()), '', sep='\n')
    for letter in args.only:
        rows += (new := list(MEASURES[letter](args)))
        print(table(new), f'[{time.perf_counter() - start:.0f} s]\n', sep='\n', flush=True)
    about['minutes'] = round((time.perf_counter() - start) / 60, 1)
    save(rows, about, '\n'.join(f'{k}: {v}' for k, v in about.items()) + '\n\n' + table(rows), args.out)
    print(f'{about["minutes"]} minutes; results in {args.out}')

if __name__ == '__main__': main()
