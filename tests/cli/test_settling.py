"""What would settle an undecided verdict: lines to type, with their cost."""

from dataclasses import replace
from functools import partial

import pytest

from ablations.benchmark import benchmark
from atdiag.cli import messages, settling
from atdiag.cli.experiments import spread
from atdiag.cli.session import ExperimentSession
from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.reports import tables
from atdiag.study.aggregate import read
from atdiag.study.own import Length
from atdiag.study.protocol import BASELINE
from tests.studies import finished, lab

LINE = ("benchmark", "--teacher", "clip_b", "--methods", "copy,distill", "--seeds", "3")
MAKE = partial(benchmark, teacher="clip_b", methods="copy,distill")


def planned(settings):
    from atdiag.study.builder import Lab

    return spread(MAKE, Lab(settings))


@pytest.fixture
def undecided(tmp_path):
    """Make a session, and its reading of 3 seeds, from the numbers of images that each arm gets right of 400."""

    def make(copy, distill, scratch=(200, 204, 208), seeds=3, sets=(), choice=None):
        session = ExperimentSession(
            lab(*sets, seeds=seeds).settings, Store(tmp_path), ExecutionOptions("cpu"), None, choice
        )
        series = planned(session.settings)
        right = {BASELINE: scratch, "copy": copy, "distill": distill, "teacher": [380]}
        finished(
            series.studies[0], session.store, {arm: list(counts)[: max(seeds, 1)] for arm, counts in right.items()}, 400
        )
        messages.TYPED.set(LINE)
        return read(series, session.settings, session.store), session

    return make


def test_seeds_that_settle_are_in_the_line_with_the_cost_of_what_is_missing(undecided):
    reading, session = undecided(copy=(206, 202, 216), distill=(300, 310, 320))
    ((name, _, seeds),) = [one for one in tables.unsettled(reading) if one[0] == "copy"]
    assert seeds > 3
    first = settling.steps(planned, reading, session)[0]
    number = seeds if seeds <= 50 else min(n for _, _, n in tables.unsettled(reading) if n)
    assert first.line == f"atdiag benchmark --teacher clip_b --methods copy,distill --seeds {number}"
    more = planned(lab(seeds=number).settings).specs
    assert first.seconds == session.plan(more).seconds
    assert len(session.plan(more).todo) == 3 * (number - 3)
    assert name in first.why
    assert str(first) == f"{first.why} (about {settling.duration(first.seconds)}):\n  {first.line}"


def test_a_clear_result_needs_nothing(undecided):
    reading, session = undecided(copy=(300, 305, 310), distill=(280, 285, 290))
    assert settling.steps(planned, reading, session) == []


def test_below_three_seeds_it_is_three(undecided):
    reading, session = undecided(copy=(300, 305), distill=(280, 285), seeds=2, scratch=(200, 204))
    (step,) = settling.steps(planned, reading, session)
    assert step.why == "Verdicts begin at 3 seeds"
    assert step.line.endswith("--seeds 3")


def test_an_undertrained_study_is_to_be_trained_for_longer(undecided):
    reading, session = undecided(copy=(42, 43, 44), distill=(45, 44, 41), scratch=(40, 41, 42))
    (step,) = settling.steps(planned, reading, session)
    assert step.line.endswith("--seeds 3 --set recipe.epochs=10")
    assert "for 10 epochs in place of 4" in step.why


def test_a_budget_becomes_the_length_that_it_chose(undecided):
    choice = Length(4, 50e9, 100, "5m", None, "2026-01-01")
    sets = ("recipe.epochs=4", "recipe.warmup_epochs=0.4")
    reading, session = undecided(copy=(206, 202, 216), distill=(300, 310, 320), sets=sets, choice=choice)
    session = replace(session, settings=replace(session.settings, overrides={}, chosen=dict(choice.settings)))
    messages.TYPED.set((*LINE, "--budget", "5m"))
    line = settling.steps(planned, reading, session)[0].line
    assert "--budget" not in line
    assert line.endswith("--set recipe.epochs=4 --set recipe.warmup_epochs=0.4")


def test_a_curve_that_still_rises_asks_for_longer_training(undecided, monkeypatch):
    reading, session = undecided(copy=(206, 202, 216), distill=(300, 310, 320))
    curve = [10, 20, 30, 35, 40, 45, 50, 56]
    lines = [{"validation_top1": value} for value in curve]
    from atdiag.core.runs import Run

    monkeypatch.setattr(Run, "progress", lambda self: lines)
    monkeypatch.setattr(Run, "result", lambda self: {"validation_images": 2000})
    said = settling._risen(reading.reports, session.store)
    assert said.startswith(
        "The training may be too short: in its last 2 epochs scratch gained 11.0 points on the validation"
    )
    lines[:] = [{"validation_top1": value} for value in (*curve[:6], 55, 56)]
    assert settling._risen(reading.reports, session.store)
    lines[:] = [{"validation_top1": value} for value in (*curve[:5], 55.5, 55, 56)]
    assert not settling._risen(reading.reports, session.store)  # half a point


def test_images_that_would_settle_what_no_seeds_do(undecided):
    reading, session = undecided(copy=(206, 202, 216), distill=(300, 310, 320))
    estimate = next(one for name, one, _ in tables.unsettled(reading) if name == "copy")
    tiny = replace(estimate, value=0.1, var_cluster=50.0**2, clusters=400)
    step = settling._images(planned, "copy", tiny, session)
    assert "or about 1,960,000 test images in place of 400" in step.why  # (2.8 / 0.1)^2 x 2,500
    assert step.line == ""
    assert "nothing would settle" in settling._images(planned, "copy", replace(tiny, value=0.0), session).why
