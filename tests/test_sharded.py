"Sharded weights: the masks of several processes are those of one, bit for bit"
import itertools, threading
from concurrent.futures import ThreadPoolExecutor

import pytest, torch, torch.nn as nn
from torch.nn.functional import cross_entropy
from fasterai_clone.core.criteria import Criteria, Normalizer, magnitude
from fasterai_clone.sparse.measure import as_criteria, available_criterias
from fasterai_clone.core.selection import keep_masks
from fasterai_clone.core.sharded import Piece, _kth, keep_masks_sharded
from fasterai_clone.sparse.sparsifier import Sparsifier  # not `sparse.all`, which imports fastai
from fasterai_clone.sparse.placement import is_sharded, piece_of
from processes import main, start


# The selection, with threads in the place of processes

def together(n, f):
    "`f(rank, reduce)` for `n` ranks at once; `reduce` waits for all of them"
    barrier, said = threading.Barrier(n, timeout=20), {}
    def reduce_of(rank):
        def reduce(mine):
            said[rank] = mine.clone()
            barrier.wait()
            total = sum(said.values())
            barrier.wait()
            return total
        return reduce
    def run(rank):
        try: return f(rank, reduce_of(rank))
        except BaseException as e:
            e.rank = rank
            return e
    with ThreadPoolExecutor(n) as pool: return list(pool.map(run, range(n)))

def cut(t, n, axis=0):
    "The pieces of `t` for `n` processes, and where they lie"
    size  = -(-t.shape[axis] // n)
    spans = [(min(i*size, t.shape[axis]), min((i+1)*size, t.shape[axis])) for i in range(n)]
    return [(t.narrow(axis, a, b-a), Piece(tuple(t.shape), tuple(a if i == axis else 0 for i in range(t.ndim))))
            for a,b in spans]

def sharded(tensors, n_drop, n, axes, old=None, magnitude=False):
    "`keep_masks` as `n` processes find it, put together again"
    parts  = [cut(t, n, a) for t,a in zip(tensors, axes)]
    before = None if old is None else [None if m is None else cut(m, n, a) for m,a in zip(old, axes)]
    def rank(r, reduce):
        pruned = None if before is None else [None if m is None else m[r][0] for m in before]
        return keep_masks_sharded([p[r][0] for p in parts], [p[r][1] for p in parts], n_drop, reduce, magnitude, pruned)
    found = together(n, rank)
    for f in found:
        if isinstance(f, BaseException): raise f
    return [torch.cat([f[i] for f in found], a) for i,a in enumerate(axes)]

def same(a, b): return len(a) == len(b) and all(torch.equal(x, y) for x,y in zip(a, b))

SHAPES = (5, 3), (4,), (2, 3, 2), (1, 7)

def tensors(kind, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    if kind == 'ties':     return [torch.randint(-2, 3, s, generator=g).to(dtype) for s in SHAPES]
    if kind == 'constant': return [torch.full(s, -1., dtype=dtype) for s in SHAPES]
    if kind == 'zeros':    return [torch.where(torch.rand(s, generator=g) < .5, -0., 0.).to(dtype) for s in SHAPES]
    return [torch.randn(s, generator=g).to(dtype) * 10.**i for i,s in enumerate(SHAPES)]

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('kind', ['normal', 'ties', 'constant', 'zeros'])
def test_pieces_find_the_mask_of_the_whole(kind, dtype):
    ts    = tensors(kind, dtype)
    total = sum(t.numel() for t in ts)
    # uneven, and empty: 7 in 4, 1 in 4
    for n,axes,by in itertools.product((1, 2, 3, 4), ((0, 0, 0, 0), (1, 0, 2, 1)), (False, True)):
        for k in (0, 1, 13, total - 1, total):
            assert same(sharded(ts, k, n, axes, magnitude=by), keep_masks(ts, k, by)), (n, axes, k, by)

@pytest.mark.parametrize('kind', ['normal', 'ties'])
def test_earlier_masks_up_and_down(kind):
    old   = keep_masks(tensors(kind, torch.float32), 15)
    ts    = tensors(kind, torch.float32, seed=1)
    old[1] = None
    gone  = sum(int((~m).sum()) for m in old if m is not None)
    for n,k in itertools.product((1, 2, 4), (0, 3, gone - 1, gone, gone + 1, 25, 38)):
        before = [None if m is None else m.clone() for m in old]
        assert same(sharded(ts, k, n, (0, 0, 1, 1), before), keep_masks(ts, k, pruned=old)), (n, k)
        assert all(m is None or torch.equal(m, b) for m,b in zip(old, before))

def test_mixed_precision_is_compared_in_the_higher_one():
    ts = [torch.tensor([1., 1.]), torch.tensor([1. - 1e-12, 1. + 1e-12], dtype=torch.float64)]
    assert same(sharded(ts, 2, 2, (0, 0)), [torch.tensor([False, True]), torch.tensor([False, True])])

def test_copies_count_once():
    w = torch.tensor([3., 1., 1., 2.])
    def rank(r, reduce):
        return keep_masks_sharded([w, w[2*r:2*r + 2]], [Piece((4,), (0,), r == 0), Piece((4,), (2*r,))], 3, reduce)
    (a, first), (b, second) = together(2, rank)
    want = keep_masks([w, w], 3)
    assert torch.equal(a, b) and same([a, torch.cat([first, second])], want)

def test_many_equal_scores_and_digits_of_64_bits():
    w = torch.zeros(70_000)
    w[69_000:] = 1
    assert same(sharded([w], 66_000, 3, (0,)), [torch.arange(70_000) >= 66_000])
    keys = [torch.tensor([3 << 40, -5, 7]), torch.tensor([1 << 40, 3 << 40])]
    assert [_kth(keys, r, 64, lambda c: c) for r in (1, 2, 3, 4, 5)] == [(-5, 0, 1), (7, 1, 1), (1 << 40, 2, 1),
                                                                         (3 << 40, 3, 2), (3 << 40, 3, 2)]

def test_messages_are_few_and_of_one_size():
    sent = []
    def reduce(c):
        sent.append(c.numel())
        return c
    keep_masks_sharded([torch.randn(100_000)], [Piece((100_000,), (0,))], 50_000, reduce)
    keep_masks_sharded([torch.randint(9, (100_000,)).double()], [Piece((100_000,), (0,))], 50_000, reduce)
    assert sent == [3, 1 << 16, 1 << 16] + [3] + [1 << 16]*4 + [1 << 16]*2

def test_NaN_in_one_process_is_raised_in_all():
    ws = [torch.ones(3), torch.tensor([1., float('nan')])]
    found = together(2, lambda r, reduce: keep_masks_sharded([ws[r]], [Piece((5,), (3*r,))], 2, reduce))
    assert [type(f) for f in found] == [ValueError]*2 and all('NaN' in str(f) for f in found)
    found = together(2, lambda r, reduce: keep_masks_sharded([torch.ones(2)], [Piece((4,), (2*r,))], 5, reduce))
    assert ['from 0 to 4' in str(f) for f in found] == [True, True]


# Real processes: each function runs in all of them

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6),
                         nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))

def batch(step):
    g = torch.Generator().manual_seed(step)
    return torch.randn(8, 1, 8, 8, generator=g), torch.randint(3, (8,), generator=g)

LAYERS  = nn.Conv2d, nn.Linear
ALLOWED = [c for c in available_criterias() if as_criteria(c).elementwise and not as_criteria(c).measure]
ASKED   = 30, 60, 45  # percent

def placed(model, mesh, **placements):
    "`model` with its parameters distributed over `mesh`, each as its number of axes says"
    from torch.distributed.tensor import distribute_tensor
    for m in model.modules():
        for k,p in m._parameters.items():
            if p is not None:
                m._parameters[k] = nn.Parameter(distribute_tensor(p.detach(), mesh,
                                                                  placements['weights' if p.ndim > 1 else 'others']))
    return model

def held_here(sp):
    "What this process has: parameter name → the shape of the whole, where the piece begins, its mask and its weights"
    def where(p):
        return piece_of(p.whole)[0][:2] if is_sharded(p.whole) else (tuple(p.whole.shape), (0,) * p.whole.ndim)
    return {p.name: (*where(p), sp.masks[p.name].clone(), p.tensor.detach().clone()) for t in sp.targets
            for p in t.parts + t.held}

def counted(sp):
    return [(r.name, r.params, r.zeros, r.groups, r.zero_groups)
            for r in sp.report().rows], sp.dropped(), sp.sizes, sp.sparsity, sp.report().total

def set_grads(model, step):
    "Known gradients, in the place of a backward pass"
    from torch.distributed.tensor import distribute_tensor
    for i,(k,p) in enumerate(model.named_parameters()):
        g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100*step + i))
        p.grad = distribute_tensor(g, p.device_mesh, p.placements) if hasattr(p, 'placements') else g

def steps(model, granularity, context, criteria, layers=LAYERS):
    "Masks and weights after each of a few steps with known gradients, and what is counted at the end"
    sp, found = Sparsifier(model, granularity, context, criteria, layer_type=layers), []
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with sp.hold(opt):
        for step,s in enumerate((*ASKED, None)):
            set_grads(model, step)
            opt.step()
            opt.zero_grad()
            if s: sp.sparsify_model(s)
            found.append(held_here(sp))
    return found, counted(sp)

def meshes(world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    flat = init_device_mesh('cpu', (world,))
    found = dict(rows  =(flat, dict(weights=[Shard(0)], others=[Shard(0)])),
                 inputs=(flat, dict(weights=[Shard(1)], others=[Replicate()])),
                 copies=(flat, dict(weights=[Replicate()], others=[Replicate()])))
    if world == 4:
        square = init_device_mesh('cpu', (2, 2))
        found.update(hsdp=(square, dict(weights=[Replicate(), Shard(0)], others=[Replicate(), Shard(0)])),
                     both=(square, dict(weights=[Shard(0), Shard(1)], others=[Shard(0), Replicate()])),
                     twice=(square, dict(weights=[Shard(0), Shard(0)], others=[Shard(0), Shard(0)])))
    return found

def single_weights(rank, world):
    "Every context and criterion, and every placement"
    ms = meshes(world)
    def case(name, *args): return steps(placed(net(), ms[name][0], **ms[name][1]), 'weight', *args)
    # it would take long
    found = {('rows', 'global', c): case('rows', 'global', c) for c in (ALLOWED if world < 4 else ())}
    return {**found, **{(name, context, 'large_final'): case(name, context, 'large_final') for name in ms
                        for context in ('local', 'global', 'erk')}}

def filters(rank, world):
    "Whole filters with their biases and norms"
    return {(name, context, c): steps(placed(net(), mesh, **how), 'filter', context, c, nn.Conv2d)
            for name,(mesh,how) in meshes(world).items()
            if name in ('rows', 'hsdp', 'copies') for context,c in (('local', 'large_final'), ('global', 'gradient'))}

def fsdp(rank, world):
    "A training with FSDP2: forward, backward and steps, with other data in each process"
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    model, mesh = net(), init_device_mesh('cpu', (world,))
    fully_shard(model[3], mesh=mesh)
    fully_shard(model, mesh=mesh)
    whole = Sparsifier(model, 'filter', 'global')
    every = Sparsifier(model, 'weight', 'global', 'movement', layer_type=LAYERS)
    opt, found = torch.optim.AdamW(model.parameters(), lr=0.01), []
    with every.hold(opt), whole.hold(opt):
        for step,s in enumerate((*ASKED, None)):
            x, y = batch(10*step + rank)
            cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
            now = {k: p.full_tensor().clone() for k,p in model.named_parameters()}
            if s:
                every.sparsify_model(s)
                whole.sparsify_model(s)
            found.append((now, held_here(every), held_here(whole)))
    model(x)  # leaves the weights gathered that are not in a block of their own
    try: whole.report()
    except RuntimeError as e: said = str(e)
    model.reshard()
    again = Sparsifier(model, 'filter', 'global')
    again.load_state_dict(whole.state_dict())
    again.print_sparsity()
    return found, said, counted(again), again.is_pruned(), again.is_pruned(model[0]), again.is_pruned('7')

def failures(rank, world):
    "What one process alone has wrong; and what is refused at once"
    mesh, how = meshes(world)['rows']
    def tried(f):
        try: f()
        except Exception as e: return type(e).__name__, str(e)
    def broken():
        model = placed(net(), mesh, **how)
        if (w := model[3].weight.to_local()).numel() and rank in (0, 2): w.data.view(-1)[-1] = float('nan')
        return model
    model = placed(net(), mesh, **how)
    sp = Sparsifier(model, criteria='squared_final')
    if rank == 0: model[0].weight.to_local().data.fill_(1e30)  # its square is infinite
    said = [tried(lambda: sp.sparsify_model(50)), dict(sp.masks)]
    said.append(tried(lambda: Sparsifier(placed(net(), mesh, **how), criteria='gradient').sparsify_model(50)))
    said.append(tried(lambda: Sparsifier(broken())))
    part = net()
    part[0] = placed(nn.Sequential(part[0]), mesh, **how)[0]
    said.append(tried(lambda: Sparsifier(part)))
    return said

def refused(rank, world):
    from torch.distributed.tensor import Replicate, Shard
    mesh, how = meshes(world)['rows']
    def why(placements=how, **kwargs):
        try: Sparsifier(placed(net(), mesh, **placements), **kwargs)
        except ValueError as e: return str(e)
    own = Criteria(magnitude, normalizer=Normalizer.mean)
    return [why(context='lamp'), why(context='output'), why(nm=True, layer_type=nn.Linear),
            why(context='global', budget='params'), why(context='global', max_sparsity=50),
            why(data=torch.zeros(1, 1, 8, 8)), why(example_inputs=torch.zeros(1, 1, 8, 8)), why(criteria='random'),
            why(criteria='synflow'), why(criteria=own),
            why(criteria=torch.abs), why(granularity='column'), why(granularity='layer'),
            why(placements=dict(weights=[Shard(1)], others=[Replicate()]), granularity='filter'),
            why(placements=dict(weights=[Shard(0)], others=[Replicate()]), granularity='filter')]

CASES = [single_weights, filters, fsdp, failures, refused]
if __name__ == '__main__': main(CASES)


# What is asked of the results

@pytest.fixture(scope='module', params=[1, 2, 4])
def ranks(request, tmp_path_factory): return start(__file__, request.param, tmp_path_factory.mktemp('ranks'))

def assembled(pieces):
    "Masks and weights, put together from what each process has"
    whole = {}
    for name in pieces[0]:
        shape  = pieces[0][name][0]
        mask, weight = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
        seen = torch.zeros(shape, dtype=torch.bool)
        for _,at,m,w in (p[name] for p in pieces):
            where = tuple(slice(a, a + n) for a,n in zip(at, m.shape))
            known = seen[where]
            # copies are the same
            assert torch.equal(mask[where][known], m[known]) and torch.equal(weight[where][known], w[known])
            mask[where], weight[where], seen[where] = m, w, True
        assert seen.all()
        whole[name] = mask, weight
    return whole

def alike(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(alike, a, b))
    return a == b

@pytest.mark.parametrize('case', ['single_weights', 'filters'])
def test_masks_weights_and_counts_are_those_of_one_process(ranks, case):
    cases  = [r[case][0] for r in ranks]
    places = {'rows', 'inputs', 'copies'} | ({'hsdp', 'both', 'twice'} if len(ranks) == 4 else set())
    assert {place for place,*_ in cases[0]} == (places if case == 'single_weights'
                                                else places & {'rows', 'copies', 'hsdp'})
    for (place,context,criteria) in cases[0]:
        args = ('weight', context, criteria) if case == 'single_weights' else ('filter', context, criteria, nn.Conv2d)
        want, counts = steps(net(), *args)
        every = [c[place, context, criteria] for c in cases]
        assert all(alike(c, counts) for _,c in every), (place, context, criteria)
        for i,w in enumerate(want):
            assert alike(assembled([f[i] for f,_ in every]), assembled([w])), (place, context, criteria, i)

def test_criteria_of_single_weights_are_many():
    assert len(ALLOWED) == 16 and {'large_final', 'movement', 'gradient', 'fisher'} <= {*ALLOWED}

def test_training_with_fully_shard(ranks):
    "The same choices as one process makes from the weights of all, and they last"
    found = [r['fsdp'][0][0] for r in ranks]
    model = net()
    every = Sparsifier(model, 'weight', 'global', 'movement', layer_type=LAYERS)
    whole = Sparsifier(model, 'filter', 'global')
    for i,s in enumerate((*ASKED, None)):
        now = found[0][i][0]
        assert all(alike(f[i][0], now) for f in found)
        model.load_state_dict(now, strict=False)
        if s: every.sparsify_model(s), whole.sparsify_model(s)
        else:
            assert all(alike(p, now[k]) for k,p in model.named_parameters())
            every.apply_masks()
            whole.apply_masks()
        for sp,where in ((every, 1), (whole, 2)):
            got = assembled([f[i][where] for f in found])
            assert alike({k: m for k,(m,_) in got.items()}, dict(sp.masks))
            # the other looked before this one pruned
            if where == 2 or not s: assert all(alike(w, sp.params[k]) for k,(_,w) in got.items())

def test_what_is_counted_after_fully_shard(ranks):
    for i,r in enumerate(ranks):
        (found, said, (rows, dropped, sizes, sparsity, total), *pruned), printed = r['fsdp']
        assert 'currently gathered' in said and 'model.reshard()' in said
        assert dropped == [4] and sizes == [11] and [n for *_,n,_ in rows] == [5, 6]
        assert total == sum(p.numel() for p in net().parameters())
        assert sum(z for *_,z in rows) >= 4 and sparsity == 100 * sum(z for _,_,z,*_ in rows) / 315
        assert pruned == [True, any(z for name,*_,z in rows if name == '0'), False]
        assert ('Sparsity Report' in printed) == (i == 0)

def test_what_one_process_cannot_do_stops_all(ranks):
    found = [r['failures'][0] for r in ranks]
    for i,(infinite, masks, no_gradient, nan, mixed) in enumerate(found):
        assert infinite[0] == 'ValueError' and masks == {}
        assert infinite[1] == ('The scores of 0.weight hold NaN or infinite numbers' if i == 0
                               else 'Another process cannot score its part of the weights')
        assert 'run a backward pass first' in no_gradient[1] and 'The weight of 3 (Conv2d) holds NaN' in nan[1]
        assert mixed == ('ValueError', '3.weight are not sharded, and the others are: leave them out with `exclude`')

def test_what_needs_the_whole_is_refused_at_once(ranks):
    named = ["context='lamp'", "context='output'", '`nm`', '`budget`', '`min_sparsity` and `max_sparsity`', '`data`',
             '`example_inputs`', *['this criterion']*4]
    for r in ranks:
        *first, column, layer, across, uncut = r['refused'][0]
        for said,name in zip(first, named, strict=True):
            assert said.startswith(f'Weights that are sharded (`DTensor`) cannot be sparsified with {name}: ')
        assert column is None  # of a kernel: it lies in one filter
        assert 'Groups of 0.weight would lie in more than one process, which has a part of axis [0]' in layer
        assert 'which has a part of axis [1]' in across
        why = '0.bias is not cut where 0.weight is, with which it is pruned'
        assert uncut == (None if len(ranks) == 1 else why)
