"""Cohorts, their distribution over processes, and the estimated cost."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atdiag.core.runs import Store
from atdiag.execution.cost import FLOPS_PER_SECOND, measured_speed, seconds
from atdiag.execution.plan import cohorts, estimate, pending, share_out
from tests.execution.specs import run

RUNS = st.lists(
    st.builds(
        run,
        seed=st.integers(0, 3),
        epochs=st.integers(0, 40),
        layers=st.sampled_from([(), (0,), (11,), tuple(range(12))]),
        teacher=st.sampled_from([1, 2]),
        train=st.sampled_from([64, 2500]),
        start=st.sampled_from(["scratch", "teacher"]),
    ),
    max_size=20,
    unique_by=lambda spec: spec.id,
)


@given(RUNS)
def test_a_cohort_shares_stream_and_teacher(specs):
    groups = cohorts(specs)
    assert sorted(spec.id for group in groups for spec in group) == sorted(spec.id for spec in specs)
    for group in groups:
        assert len({spec.stream for spec in group}) == 1
        assert len({spec.teacher.sha256 for spec in group if spec.teacher}) <= 1
    # as few as possible: one for each stream and teacher, and one for each stream without a teacher
    pairs = {(spec.stream, spec.teacher.sha256) for spec in specs if spec.teacher}
    alone = {spec.stream for spec in specs} - {stream for stream, _ in pairs}
    assert len(groups) == len(pairs) + len(alone)


def test_the_baseline_joins_its_teacher_s_cohort():
    baseline, copy, other = run(), run(layers=(0,), teacher=1), run(seed=1, layers=(0,), teacher=1)
    assert baseline.teacher is None
    assert [{s.id for s in group} for group in cohorts([baseline, copy, other])] == [
        {baseline.id, copy.id},
        {other.id},
    ]


@given(RUNS, st.integers(1, 6))
def test_a_plan_covers_every_run_once_and_is_balanced(specs, processes):
    jobs = share_out(specs, processes)
    assert sorted(spec.id for job in jobs for spec in job.specs) == sorted(spec.id for spec in specs)
    assert len(jobs) <= processes
    assert all(job.specs for job in jobs)
    costs = [seconds(spec) for spec in specs]
    for job in jobs:
        share = sum(costs) / min(processes, len(specs))
        assert sum(seconds(spec) for spec in job.specs) <= share + max(costs) + 1e-9
        for group in job.cohorts:
            assert len({spec.stream for spec in group}) == 1
            assert len({spec.teacher.sha256 for spec in group if spec.teacher}) <= 1
    # each border between two processes splits one cohort at most
    pieces = sum(len(job.cohorts) for job in jobs)
    assert pieces <= len(cohorts(specs)) + max(len(jobs) - 1, 0)


@given(RUNS, st.integers(1, 6), st.integers(1, 5))
def test_the_estimate(specs, processes, times):
    if not specs:
        assert estimate(specs, processes) == 0
        return
    costs = [seconds(spec) for spec in specs]
    found = estimate(specs, processes) - estimate([run(epochs=0)], 1) + seconds(run(epochs=0))
    assert sum(costs) / processes - 1e-6 <= found <= sum(costs) + 1e-6
    assert estimate(specs, 1) >= estimate(specs, processes) - 1e-6
    assert estimate(specs[:-1], 1) <= estimate(specs, 1) + 1e-6


def test_larger_runs_cost_more():
    base = seconds(run())
    assert seconds(run(epochs=8)) > 1.9 * base
    assert seconds(run(train=5000)) > 1.9 * base
    assert seconds(run(layers=(0,), teacher=1)) == pytest.approx(base, rel=0.05)
    assert seconds(run(layers=(11,), teacher=1)) > seconds(run(layers=(0,), teacher=1))
    assert 0 < seconds(run(epochs=0)) < base / 5
    assert seconds(run(train=31)) == seconds(run(epochs=0))  # not one whole batch


def test_finished_runs_are_not_pending(tmp_path):
    store = Store(tmp_path)
    specs = [run(seed=s) for s in range(3)]
    store.create(specs[1]).finish({})
    assert pending(specs, store) == [specs[0], specs[2]]
    store.create(specs[0])  # started is not finished
    assert pending(specs, store) == [specs[0], specs[2]]


def test_the_measured_speed_ignores_runs_that_are_mostly_their_start():
    def finished(spec, took):
        result = {"seconds": took, "environment": {"device": "cpu"}}
        return SimpleNamespace(spec=spec, result=lambda: result)

    short = [finished(run(seed=seed, epochs=1, train=64), 30.0) for seed in range(3)]
    assert measured_speed(SimpleNamespace(list=lambda: short), "cpu") == FLOPS_PER_SECOND
    specs = [run(seed=seed, epochs=40, train=2500) for seed in range(3)]
    long = [finished(spec, 2 * seconds(spec, tested=False)) for spec in specs]
    for runs in (long, short + long):
        assert measured_speed(SimpleNamespace(list=lambda runs=runs: runs), "cpu") == pytest.approx(
            FLOPS_PER_SECOND / 2
        )
