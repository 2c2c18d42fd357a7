"""Agreement of every method's maps with both states of the teacher: its measurement, runs and conclusions."""

import io
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import jensenshannon

from ablations.agreement import METHODS, agreement, findings, unlike
from ablations.benchmark import benchmark
from ablations.tensors import tensors
from atdiag.analysis import images, streaming, subjects
from atdiag.analysis.similarity import MATCHINGS
from atdiag.core.errors import UserError
from atdiag.core.runs import Store
from atdiag.core.spec import Data, Init, Recipe, RunSpec, Seed, Transfer
from atdiag.networks.model import students
from atdiag.networks.registry import teachers
from atdiag.study.judging import judge_claim
from atdiag.study.matching import MATCHED_BY, PRE_TRAINED, TUNED, Agreement, Match, column
from atdiag.study.protocol import LEFT_OUT, Footing, Report
from tests.studies import estimate, fabricated, lab

DATA = Data(name="digits", train=64, test_per_source=1, clutter=6)
TEACHER = teachers.teacher("deit_s", "mini")
ALL = tuple(range(12))


# --- the measurement -----------------------------------------------------------------------------------------------


def made(store, seed: int, **fields):
    """Make a finished run with the weights that it was initialised with, of its model seed."""
    common = {"network": TEACHER.network.student(), "data": DATA, "recipe": Recipe(epochs=1, batch_size=32)}
    run = store.create(RunSpec(**{**common, "seed": Seed(data=seed % 10, model=seed % 10), **fields}))
    save_file(students.build(run.spec.network, seed).state_dict(), run.weights)
    buffer = io.BytesIO()
    label = np.arange(40, dtype=np.int32) % 10
    np.savez(buffer, prediction=label, label=label, cluster=label)
    run.write("predictions.npz", buffer.getvalue())
    run.finish({"top1": 100.0, "start": None})
    return run


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    """Measure a copy-student and scratch students of two seeds beside fine-tuned runs of these seeds."""
    store = Store(tmp_path_factory.mktemp("runs"))
    tuned = [made(store, 20 + s, teacher=TEACHER, init=Init(source="teacher")) for s in (0, 1)]
    scratch = [made(store, s) for s in (0, 1)]
    copying = made(store, 1, teacher=TEACHER, transfer=Transfer(method="copy", layers=ALL))
    measure = Agreement(TEACHER, 4, tuned=tuple(run.spec for run in tuned))
    measure.take([*scratch, copying], "cpu", lambda *_: None)
    return measure, tuned, scratch, copying


def test_the_matchings_have_names():
    assert tuple(MATCHED_BY) == MATCHINGS


def test_divergences_from_the_fine_tuned_run_equal_the_explicit_formula(taken):
    measure, tuned, scratch, _ = taken
    every = images.choose(0, DATA, TEACHER.network)
    pictures = images.choose(",".join(str(i * len(every) // 4) for i in range(4)), DATA, TEACHER.network)
    found = measure.divergences(scratch[1])
    p, q = (
        np.asarray(streaming.trace(subjects.of_run(run), pictures, layers=(3,))["map", 3], np.float64)
        for run in (tuned[1], scratch[1])  # of its own seed
    )
    by_pair = np.array(
        [[(jensenshannon(p[:, i], q[:, j], base=2, axis=-1) ** 2).mean() for j in (0, 1)] for i in (0, 1)]
    )
    expected = {
        "same": by_pair.diagonal().mean(),
        "optimal": by_pair[linear_sum_assignment(by_pair)].mean(),
        "best": (by_pair.min(0).mean() + by_pair.min(1).mean()) / 2,
        "averaged": (jensenshannon(p.mean(1), q.mean(1), base=2, axis=-1) ** 2).mean(),
    }
    assert {how: found[how][3] for how in MATCHINGS} == pytest.approx(expected, abs=1e-5)
    numbers = measure.numbers(scratch[1])
    assert numbers.keys() == {column(TUNED, how) for how in MATCHINGS}
    assert numbers["JSD fine-tuned"] == pytest.approx(np.mean(found["optimal"]))
    assert numbers["JSD fine-tuned (same)"] == pytest.approx(np.mean(found["same"]))


def test_each_run_is_compared_with_its_own_seeds_and_none_with_itself(taken):
    measure, tuned, scratch, copying = taken
    assert {path.stem for run in scratch for path in (run.path / "match").iterdir()} == {run.id for run in tuned}
    assert measure.missing([*tuned, *scratch, copying]) == []
    assert set(measure.numbers(tuned[0]).values()) == {0.0}
    # A student with the pre-trained teacher's maps is none of the fine-tuned teacher's.
    assert measure.numbers(copying)["JSD fine-tuned"] > 0.01
    assert set(Agreement(TEACHER, 4).numbers(copying).values()) == {0.0}
    beside_teacher = Match(TEACHER, 4)
    assert beside_teacher.missing(scratch) == scratch and beside_teacher.name != measure.name
    with pytest.raises(ValueError, match="no fine-tuned run has the seed"):
        measure.take([made(Store(scratch[0].path.parent), 5)], "cpu", lambda *_: None)


def test_another_fine_tuned_student_is_measured_again_and_an_unfinished_one_never(taken, tmp_path):
    measure, *_ = taken
    store = Store(tmp_path / "runs")
    tuned = store.create(measure.tuned[0])
    run = made(store, 0)
    assert measure.missing([run]) == [run]
    with pytest.raises(ValueError, match=f"{tuned.id} is not finished"):
        measure.take([run], "cpu", lambda *_: None)
    for weights in (30, 31):
        save_file(students.build(tuned.spec.network, weights).state_dict(), tuned.weights)
        tuned.finish({"top1": 0.0, "start": None})
        assert measure.missing([run]) == [run]
        measure.take([run], "cpu", lambda *_: None)
        assert measure.missing([run]) == []


# --- the experiment ------------------------------------------------------------------------------------------------


def test_nothing_is_trained_that_another_analysis_has_but_two_methods():
    study = agreement(lab(), "deit_s").studies[0]
    own = {spec.id for spec in study.specs}
    shared = {spec.id for spec in (*benchmark(lab(), "deit_s").specs, *tensors(lab(), "deit_s").specs)}
    assert [arm.name for arm in study.arms[1:]] == list(METHODS)
    alone = {spec.id for arm in study.arms if arm.name in ("logits", "features") for spec in arm.specs}
    assert own - shared == alone
    assert [measure.tuned for measure in study.measures] == [
        (),
        next(a.specs for a in study.arms if a.name == "finetune"),
    ]
    few = agreement(lab(), "deit_s", "copy-q,distill").studies[0]
    assert [measure.tuned for measure in few.measures] == [()] and few.contrasts == ()


def test_a_teacher_without_a_head_leaves_out_logits(monkeypatch):
    from atdiag.study.builder import Lab

    def refuse(*_):
        raise UserError("the head of x is not for these classes")

    monkeypatch.setattr(Lab, "_check_same_classes", refuse)
    series = agreement(lab(), "deit_s")
    assert "logits" not in [arm.name for arm in series.studies[0].arms]
    assert series.notes[0] == f"{LEFT_OUT}logits: the head of x is not for these classes."
    with pytest.raises(UserError, match="the head of x"):
        agreement(lab(), "deit_s", "logits")


@pytest.mark.parametrize(("methods", "message"), [("copyq", "did you mean 'copy-q'"), ("", "is empty")])
def test_bad_input(methods, message):
    with pytest.raises(UserError, match=message):
        agreement(lab(), "deit_s", methods)


# --- what is concluded ---------------------------------------------------------------------------------------------

STUDY = agreement(lab(seeds=3), "deit_s").studies[0]


def report(queries, distill, seeds=3, spread=0.01, worst=None) -> Report:
    """Make a report with these divergences; worst: that of copied queries under one of the matchings."""
    study = STUDY if seeds == 3 else agreement(lab(seeds=seeds), "deit_s").studies[0]
    base = fabricated(study, [5.0] * (len(study.arms) - 1), seeds=seeds)

    def numbers(arm, step):
        own = {"copy q": queries, "distill": distill}.get(arm, 0.5)
        by = {column(PRE_TRAINED, how): own + step for how in MATCHINGS}
        return by | ({column(PRE_TRAINED, "averaged"): worst + step} if arm == "copy q" and worst is not None else {})

    rows = [
        replace(row, by_run=tuple(numbers(row.arm, spread * (i - 1) * (row.arm == "copy q")) for i in range(seeds)))
        for row in base.rows
    ]
    return replace(base, rows=tuple(rows))


@pytest.mark.parametrize(
    ("made_up", "verdict", "ours"),
    [
        (report(0.4, 0.1), "holds", "4 of 4 clearly further"),
        (report(0.4, 0.1, worst=0.1), "undecided", "3 of 4 clearly further"),
        (report(0.4, 0.1, worst=0.0), "does not hold", "3 of 4 clearly further"),
        (report(0.1, 0.4), "does not hold", "0 of 4 clearly further"),
        (report(0.12, 0.1), "undecided", "0 of 4"),
    ],
)
def test_whether_copied_queries_leave_other_maps(made_up, verdict, ours):
    found = unlike([made_up])
    assert (found.verdict, ours in found.ours, found.seeds) == (verdict, True, 3), found
    assert [one.claim.name for one in findings([made_up])] == ["copied queries, other maps"]


def test_no_conclusion_from_two_seeds_or_without_a_yardstick_or_near_chance():
    assert unlike([report(0.4, 0.1, seeds=2)]).verdict == "undecided"
    whole = report(0.4, 0.1)
    without = replace(whole, rows=tuple(row for row in whole.rows if row.arm != "distill"))
    assert "copy q and distill" in unlike([without]).note
    short = replace(whole, footing=Footing(10.0, 11.0, 20.0, 10))
    assert (unlike([short]).verdict, unlike([short]).note) == ("not testable here", "undertrained: deit_s (mini)")
    assert unlike([whole, short]).verdict == "holds" and unlike([whole, short]).note


@pytest.mark.parametrize(("values", "said"), [((3, 4), "holds"), ((3, -4), "does not hold"), ((3, 0.2), "undecided")])
def test_whether_they_are_the_best_copies(values, said):
    assert [one.name for one in STUDY.contrasts] == ["copy q minus copy", "copy q minus copy k"]
    asked = {one.name: estimate(v) for one, v in zip(STUDY.contrasts, values, strict=True)}
    (claim,) = STUDY.claims
    assert judge_claim(claim, [replace(report(0.4, 0.1), contrasts=asked)]).verdict == said
