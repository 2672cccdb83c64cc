"Law 3: the series by hand, everything that can stand for a schedule, and the callback's ways to shape one"
import math, pickle
from fractions import Fraction
from functools import partial

import numpy as np, pytest, torch
from fastai.callback.schedule import (SchedCos, SchedLin, SchedNo, SchedPoly, combine_scheds, combined_cos, sched_cos,
                                      sched_lin)

from fasterai_clone.sparse.all import *
from fasterai_clone.core.schedule import as_schedule
from helpers import column, exact, learner, shown, sizes, spy, zeros


def series(schedule, target=90, n=10):
    return [round(as_schedule(schedule).sparsity((e+1)/n, target), 2) for e in range(n)]

law3 = dict(
    one_shot  = [0, 0, 0, 0, 90, 90, 90, 90, 90, 90],
    iterative = [0, 0, 30, 30, 60, 60, 60, 90, 90, 90],
    agp       = [0, 0, 29.71, 52.03, 68.03, 78.75, 85.25, 88.59, 89.82, 90])
five_steps    = [0, 0, 18, 36, 36, 54, 72, 72, 90, 90]

def cubic(pos): return pos**3
def slow(start, end, pos): return start + (end - start) * pos**2
def with_power(start, end, pos, power=2): return start + (end - start) * pos**power
class Halves:
    def __call__(self, start, end, pos): return start + (end - start) * math.floor(2*pos)/2

lin10 = list(range(10, 101, 10))
cos10 = [round(50 - 50*math.cos(math.pi*k/10), 2) for k in range(1, 11)]


# Progress as a pure function

@pytest.mark.parametrize('name', law3)
def test_law_3(name):
    assert series(name) == series(as_schedule(name)) == law3[name]
    assert as_schedule(name).sparsity(1, 90) == 90 and as_schedule(name).sparsity(0, 90) == 0

@pytest.mark.parametrize('five', [partial(iterative, n_steps=5), partial(partial(iterative), n_steps=5),
                                  iterative(n_steps=5), Schedule(partial(sched_iterative, n_steps=5), start_pct=0.2)])
def test_partial_of_iterative(five): assert series(five) == five_steps

@pytest.mark.parametrize('f, at_quarters', [
    (sched_oneshot,   [1, 1, 1, 1, 1]),
    (sched_iterative, [0, 1/3, 2/3, 1, 1]),
    (sched_agp,       [0, 37/64, 7/8, 63/64, 1]),
    (sched_dsd,       [0, .5, 1, .5, 0])])
def test_functions_by_hand(f, at_quarters):
    assert [f(0, 1, k/4) for k in range(5)] == pytest.approx(at_quarters)
    assert [f(10, 30, k/4) for k in range(5)] == pytest.approx([10 + 20*v for v in at_quarters])

def test_one_cycle_is_logistic():
    "(1+e⁻⁸)/(1+e^(6-14·pos)): half of (1+e⁻⁸) at 3/7, and exactly 1 at the end"
    assert sched_onecycle(0, 1, 3/7) == pytest.approx((1 + math.exp(-8))/2) and sched_onecycle(0, 1, 1.) == 1
    assert [one_cycle.progress(k/100) for k in range(101)] == sorted(one_cycle.progress(k/100) for k in range(101))

def test_iterative_takes_as_many_equal_steps_as_asked():
    for n in range(1, 30):
        at = [iterative(n_steps=n, start_pct=0.).progress(k/n) for k in range(n+1)]
        assert at == pytest.approx([k/n for k in range(n+1)])  # no float error starts a step too early

@pytest.mark.parametrize('name', available_schedules())
def test_ends_and_bounds(name):
    s = as_schedule(name)
    p = [s.progress(k/1000) for k in range(1001)]
    assert p[-1] == (0 if name == 'dsd' else 1) and all(0 <= v <= 1 for v in p) and (p[0] < 0.01 or s.from_start)
    up = p[:501] if name == 'dsd' else p
    assert up == sorted(up) and p[500:] == sorted(p[500:], reverse=name == 'dsd')

def test_available(): assert available_schedules() == ['one_shot', 'iterative', 'agp', 'one_cycle', 'cos', 'lin', 'dsd',
                                                          'constant']

def test_constant_is_at_its_target_before_the_first_step():
    assert constant.sparsity(0, 90) == 90 and constant.from_start and not constant(start_pct=.1).from_start
    for criteria in ('large_final', 'gradient', 'snip'):
        learn, seen = learner(), []
        look = spy('before_backward', lambda: learn.training and seen.append(zeros(learn.model)))
        cb = SparsifyCallback(90, schedule='constant', criteria=criteria, verbose=False)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[cb, look])
        assert len(seen) == 8 and all(z == [exact(n, 90) for n in sizes(learn.model)] for z in seen)

@pytest.mark.parametrize('schedule, want', [
    ('lin', lin10), (lin, lin10), ('cos', cos10), (sched_agp, [round(100*(1 - (1-k/10)**3), 2) for k in range(1, 11)]),
    (SchedCos(0, 1), cos10), (SchedLin(0, 1), lin10), (sched_cos, cos10), (sched_lin, lin10),
    (partial(sched_cos), cos10),
    (SchedPoly(0, 1, 2), [k*k for k in range(1, 11)]),
    (combine_scheds([.5, .5], [SchedNo(0, 0), SchedLin(0, 1)]), [0, 0, 0, 0, 0, 20, 40, 60, 80, 100]),
    (combine_scheds([.2, .8], [SchedLin(0, .5), SchedNo(.5, .5)]), [25, *[50]*9]),
    (combined_cos(.5, 0, 1, 1), [round(50 - 50*math.cos(math.pi*k/5), 2) for k in range(1, 5)] + [100]*6),
    (cubic, [round(k**3/10, 2) for k in range(1, 11)]), (lambda pos: pos, lin10), (lambda p: p, lin10),
    (slow, [k*k for k in range(1, 11)]), (lambda start, end, pos: start + (end-start)*pos, lin10),
    (lambda a, b, c: a + (b-a)*c, lin10),
    (with_power, [k*k for k in range(1, 11)]), (partial(with_power, power=1), lin10),
    (partial(with_power, power=3), [round(k**3/10, 2) for k in range(1, 11)]),
    (Halves(), [0]*4 + [50]*5 + [100]), (Schedule(sched_lin), lin10),
    (Schedule(cubic, end_pct=.5), [.8, 6.4, 21.6, 51.2, *[100]*6]),
    (partial(lin, start_pct=.5), [0]*5 + [20, 40, 60, 80, 100]), (partial(lin, end_pct=.5), [20, 40, 60, 80, *[100]*6]),
    (partial(lin, start_pct=.2, end_pct=.6), [0, 0, 25, 50, 75, *[100]*5]),
    (partial(lin, start_sparsity=50), list(range(55, 101, 5))),
    (partial(iterative, n_steps=2, start_pct=0., end_pct=.8, start_sparsity=20), [60]*4 + [100]*6),
    (partial(one_shot, start_pct=1.), [0]*9 + [100]), (partial(one_shot, start_pct=0.), [100]*10),
    (agp(start_pct=0.)(end_pct=.5), [48.8, 78.4, 93.6, 99.2, *[100]*6])], ids=shown)
def test_what_can_stand_for_a_schedule(schedule, want):
    assert series(schedule, 100) == pytest.approx(want, abs=0.01)
    assert series(SparsifyCallback(90, schedule=schedule).schedule, 100) == pytest.approx(want, abs=0.01)

@pytest.mark.parametrize('schedule', [partial(iterative, n_steps=5), iterative(n_steps=5), Schedule(cubic),
                                      SchedCos(0, 1), slow, partial(with_power, power=3)])
def test_schedules_are_picklable_as_they_are_used(schedule):
    s = as_schedule(schedule)
    assert series(pickle.loads(pickle.dumps(s))) == series(s)

def test_variations_leave_the_original_alone():
    partial(agp, start_pct=0.5)()
    agp(start_sparsity=50)
    SparsifyCallback(90, schedule=partial(agp, start_pct=.7), start_sparsity=10)
    assert series(agp) == law3['agp'] and agp.start_pct == 0.2 and agp.start_sparsity == 0


@pytest.mark.parametrize('kwargs', [dict(start_sparsity=True), dict(start_sparsity='20'), dict(start_sparsity=0.5),
                                    dict(start_sparsity=math.nan), dict(start_pct='0.2'), dict(end_pct=True),
                                    dict(start_pct=-.1),
                                    dict(end_pct=1.1), dict(start_pct=math.nan)], ids=str)
def test_what_shapes_a_schedule_is_checked_and_named(kwargs):
    with pytest.raises((TypeError, ValueError), match=next(iter(kwargs))): Schedule(sched_agp, **kwargs)
    with pytest.raises((TypeError, ValueError), match=next(iter(kwargs))):
        SparsifyCallback(90, schedule=partial(agp, **kwargs))


# In the callback

def epochs(cb, n_epoch=10, n=64):
    "Zeros of each layer when validation starts"
    learn, seen = learner(n=n), []
    learn.fit(n_epoch, 1e-2, cbs=[cb, spy('before_validate', lambda: seen.append(zeros(learn.model)))])
    assert [h['sparsity'] for h in cb.history] == column(learn) == [100*sum(z)/1476 for z in seen]
    return seen

def at(*pcts): return [[exact(n, s) for n in (36, 288, 1152)] for s in pcts]

@pytest.mark.parametrize('kwargs, pcts', [
    (dict(schedule='lin', start_epoch=2),
     [0, 0, *[Fraction(90*k, 8) for k in range(1, 9)]]),
    (dict(schedule='lin', end_epoch=5),                               [18, 36, 54, 72, 90, 90, 90, 90, 90, 90]),
    (dict(schedule='lin', start_epoch=4, end_epoch=9),                [0, 0, 0, 0, 18, 36, 54, 72, 90, 90]),
    (dict(schedule='lin', start_epoch=0.5, end_epoch=5),              [10, 30, 50, 70, 90, 90, 90, 90, 90, 90]),
    (dict(schedule='lin', start_sparsity=40),                         [45, 50, 55, 60, 65, 70, 75, 80, 85, 90]),
    (dict(schedule='lin', start_sparsity=40, start_epoch=5),          [40, 40, 40, 40, 40, 50, 60, 70, 80, 90]),
    (dict(schedule=partial(lin, start_sparsity=10, end_pct=.8)),      [20, 30, 40, 50, 60, 70, 80, 90, 90, 90]),
    (dict(schedule='one_shot', start_epoch=9),                        [0, 0, 0, 0, 0, 0, 0, 0, 90, 90]),
    (dict(schedule='one_shot', start_epoch=10),                       [0, 0, 0, 0, 0, 0, 0, 0, 0, 90]),
    (dict(schedule='one_shot', start_epoch=0),                        [90]*10),
    (dict(schedule='agp', start_epoch=0),
     [Fraction(90*(1000 - (9-e)**3), 1000) for e in range(10)]),
    (dict(schedule='iterative', start_epoch=4, end_epoch=7),          [0, 0, 0, 0, 30, 60, 90, 90, 90, 90]),
    (dict(schedule=partial(iterative, n_steps=5)),                    five_steps),
    (dict(schedule=SchedLin(0, 1)),                                   [9, 18, 27, 36, 45, 54, 63, 72, 81, 90]),
    (dict(schedule=lambda pos: pos, every=3),                         [9, 18, 27, 36, 45, 54, 63, 72, 81, 90]),
    (dict(schedule='lin', every=1000),                                [9, 18, 27, 36, 45, 54, 63, 72, 81, 90]),
    (dict(schedule='lin', start_epoch=4, end_epoch=9, every=7, start_sparsity=20),
     [20, 20, 20, 20, 34, 48, 62, 76, 90, 90])], ids=shown)
def test_epochs_are_where_the_schedule_says(kwargs, pcts):
    pcts = [Fraction(p) for p in pcts]
    assert epochs(SparsifyCallback(90, **kwargs)) == [[math.floor(n*p/100) for n in (36, 288, 1152)] for p in pcts]

def test_start_sparsity_is_there_from_the_first_step():
    learn, steps = learner(n=64), []
    cb = SparsifyCallback(90, schedule='lin', start_sparsity=50, start_epoch=1)
    learn.fit(2, 1e-2, cbs=[cb, spy('after_step', lambda: steps.append(zeros(learn.model)))])
    assert steps[:4] == at(50, 50, 50, 50) and steps[4:] == at(60, 70, 80, 90)

def test_start_sparsity_above_the_target_goes_down():
    assert epochs(SparsifyCallback(20, schedule='lin', start_sparsity=60), 4) == at(50, 40, 30, 20)

def test_every_step_follows_the_schedule():
    learn, steps = learner(n=64), []
    learn.fit(2, 1e-2, cbs=[SparsifyCallback(80, schedule='lin'),
                            spy('after_step', lambda: steps.append(zeros(learn.model)))])
    assert steps == at(10, 20, 30, 40, 50, 60, 70, 80)

@pytest.mark.parametrize('every, pcts', [(1, [10, 20, 30, 40, 50, 60, 70, 80]), (2, [0, 20, 20, 40, 40, 60, 60, 80]),
                                         (3, [0, 0, 30, 40, 40, 60, 60, 80]),
                                         (4, [0, 0, 0, 40, 40, 40, 40, 80]), (8, [0, 0, 0, 40, 40, 40, 40, 80])])
def test_every_nth_step_and_the_end_of_each_epoch(every, pcts):
    learn, steps = learner(n=64), []
    learn.fit(2, 1e-2, cbs=[SparsifyCallback(80, schedule='lin', every=every),
                            spy('after_step', lambda: steps.append(zeros(learn.model)))])
    assert steps == at(*pcts)

def test_one_schedule_serves_fits_of_different_length():
    s = partial(iterative, n_steps=5)
    assert epochs(SparsifyCallback(90, schedule=s), 5) == at(*five_steps[1::2])
    assert epochs(SparsifyCallback(90, schedule=s), 10) == at(*five_steps)


# Code written for fasterai

@pytest.mark.parametrize('name', available_schedules())
@pytest.mark.parametrize('array', [np.linspace(0, 1, 7), np.linspace(0, 1, 6).reshape(2, 3),
                                   torch.linspace(0, 1, 5, dtype=torch.float64)])
def test_arrays_of_positions(name, array):
    "As fasterai's tutorial draws its schedules: `sched_func(0, 1, np.linspace(0, 1, 100))`"
    s = as_schedule(name)
    for f in (lambda p: s.sched_func(0, 1, p)), s.progress, lambda p: s.sparsity(p, 80):
        got = f(array)
        assert isinstance(got, np.ndarray) and got.shape == tuple(array.shape)
        assert got.ravel().tolist() == [f(float(p)) for p in array.ravel()]

def test_reset_changes_nothing():
    for name in available_schedules():
        s = as_schedule(name)
        s.reset()
        assert s == as_schedule(name)
