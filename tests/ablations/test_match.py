"""The match ablation: divergences against explicit formulas, measured once, and the conclusions from them."""

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file
from scipy.spatial.distance import jensenshannon

from ablations import claims
from ablations import match as ablation
from ablations.match import match, matched, usable
from atdiag.analysis import images, streaming, subjects
from atdiag.cli import experiments
from atdiag.core.errors import UserError
from atdiag.core.progress import ignore
from atdiag.core.runs import DamagedRunError, Store
from atdiag.core.spec import Data, Recipe, RunSpec, Seed, Transfer
from atdiag.networks.model import students
from atdiag.networks.registry import teachers
from atdiag.networks.weights import loading
from atdiag.reports import tables
from atdiag.stats.contrasts import Estimate
from atdiag.study import matching, pipeline
from atdiag.study.aggregate import read
from atdiag.study.builder import Lab
from atdiag.study.claims import Claim
from atdiag.study.matching import HEAD_BY_HEAD, HEADS_MATCHED, Match
from atdiag.study.protocol import BASELINE, ArmResult, Report
from atdiag.study.settings import resolve

DATA = Data(name="digits", train=64, test_per_source=1, clutter=6)
ALL = tuple(range(12))
TEACHER = teachers.teacher("deit_s", "mini")


def ticks(*_):
    """Ignore progress."""


def spec(seed=0, **fields) -> RunSpec:
    common = {"network": TEACHER.network.student(), "data": DATA, "recipe": Recipe(epochs=1, batch_size=32)}
    return RunSpec(**{**common, "seed": Seed(data=seed, model=seed), **fields})


def finished(store, one: RunSpec, state=None):
    """Make a finished run with the given weights, or those it was initialised with."""
    run = store.create(one)
    save_file(state or students.build(one.network, one.seed.model).state_dict(), run.weights)
    label = np.arange(40, dtype=np.int32) % 10
    right = np.random.default_rng(one.seed.model).random(40) < 0.5
    buffer = io.BytesIO()
    np.savez(buffer, prediction=np.where(right, label, (label + 1) % 10), label=label, cluster=label)
    run.write("predictions.npz", buffer.getvalue())
    run.finish({"top1": 100 * float(right.mean()), "start": None})
    return run


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "runs")


def own_state(order=None):
    """Return the teacher's weights; optionally permute its heads in every block, which changes no output."""
    state = {name: tensor.clone() for name, tensor in loading.load(TEACHER).state_dict().items()}
    heads, width = TEACHER.network.heads, TEACHER.network.width
    for name in state if order else ():
        if ".attn.qkv." in name:
            parts = state[name].view(3, heads, width // heads, *state[name].shape[1:])
            state[name] = parts[:, list(order)].reshape(state[name].shape).contiguous()
        if name.endswith(".attn.proj.weight"):
            state[name] = state[name].view(width, heads, -1)[:, list(order)].reshape(width, width).contiguous()
    return state


def distilled(**fields):
    return spec(teacher=TEACHER, transfer=Transfer(method="distill", layers=ALL), **fields)


# --- the measurement -----------------------------------------------------------------------------------------------


def test_a_student_with_the_teachers_q_and_k_matches_and_one_from_scratch_does_not(store):
    same, scratch = finished(store, distilled(), own_state()), finished(store, spec())
    turned = finished(store, distilled(seed=1), own_state(order=(1, 0)))
    measure = Match(TEACHER, 16)
    measure.take([same, scratch, turned], "cpu", ticks)
    own, drawn, other = map(measure.numbers, (same, scratch, turned))
    assert all(value < 1e-5 for value in own.values())
    assert drawn[HEAD_BY_HEAD] > 0.1
    # The same maps with permuted heads: no match head by head, a perfect match once heads are paired.
    assert other[HEADS_MATCHED] < 1e-5 and other[HEAD_BY_HEAD] > 0.05


def test_divergences_equal_the_explicit_formula(store):
    run, measure = finished(store, spec()), Match(TEACHER, 5)
    measure.take([run], "cpu", ticks)
    every = images.choose(0, DATA, TEACHER.network)
    chosen = ",".join(str(i * len(every) // 5) for i in range(5))
    pictures = images.choose(chosen, DATA, TEACHER.network)
    p, q = (
        streaming.trace(one, pictures, layers=(0, 11)) for one in (subjects.of_run(run), subjects.loaded(TEACHER, DATA))
    )
    for layer in (0, 11):
        a, b = (np.asarray(x["map", layer], np.float64) for x in (p, q))
        expected = np.mean([jensenshannon(*rows, base=2) ** 2 for rows in zip(a.reshape(-1, 26), b.reshape(-1, 26))])  # noqa: B905
        assert measure.numbers(run)[f"JSD block {layer}"] == pytest.approx(expected, abs=1e-5)
    saved = json.loads((run.path / "match" / f"{TEACHER.sha256[:12]}.json").read_text())
    assert (saved["images"], saved["teacher"], len(saved["head_by_head"])) == (5, "deit_s (mini)", 12)


def test_divergences_are_measured_once_per_teacher(store):
    run = finished(store, spec())
    one, other = Match(TEACHER, 4), Match(teachers.teacher("dinov2_s", "mini"), 4)
    assert one.missing([run]) == [run]
    one.take([run], "cpu", ticks)
    assert one.missing([run]) == [] and one.numbers(run)
    assert other.missing([run]) == [run] and other.numbers(run) == {}
    other.take([run], "cpu", ticks)
    assert one.numbers(run) != other.numbers(run)
    assert len(list((run.path / "match").iterdir())) == 2
    assert Match(TEACHER, 5).missing([run]) == [run]  # of other images


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: json.dumps(json.loads(text) | {"version": matching.VERSION + 1}),
        lambda text: json.dumps(json.loads(text) | {"sha256": "0" * 64}),
        lambda text: json.dumps(json.loads(text) | {"head_by_head": [0.1] * 11}),
        lambda text: json.dumps(json.loads(text) | {"heads_matched": [float("nan")] * 12}),
        lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "heads_averaged"}),
        lambda text: text.replace("0.25", "0.24", 1),
        lambda text: "[" * 100_000,
        lambda text: "\x00\xff",
    ],
)
def test_damaged_or_outdated_measurements_are_repeated(store, spoil):
    run, measure = store.create(spec()), Match(TEACHER, 4)
    (run.path / "match").mkdir()
    values = {"same": 0.25, "optimal": 0.125, "best": 0.1, "averaged": 0.0625}
    measure._save(run, 4, {how: [value] * 12 for how, value in values.items()})
    assert measure.missing([run]) == [] and measure.numbers(run)[HEADS_MATCHED] == 0.125
    (path,) = (run.path / "match").iterdir()
    path.write_text(spoil(path.read_text()), encoding="latin-1")
    assert measure.missing([run]) == [run] and measure.numbers(run) == {}


def test_copying_all_maps_needs_no_measurement_and_the_teacher_is_not_measured(store):
    measure = Match(TEACHER)

    def made(method="copy", teacher=TEACHER, **fields):
        return store.create(spec(teacher=teacher, transfer=Transfer(method=method, **{"layers": ALL, **fields})))

    whole = made()
    assert measure.missing([whole]) == []
    assert set(measure.numbers(whole).values()) == {0.0} and len(measure.numbers(whole)) == 14
    parts = [made(layers=ALL[6:]), made(heads=(0,)), made(tensor="q"), made(average="examples"), made("distill")]
    parts.append(made(teacher=teachers.teacher("dinov2_s", "mini")))
    assert measure.missing(parts) == parts
    reference = store.create(Lab(resolve(seeds=2, environment={}, folder=Path("/no"))).reference(TEACHER).specs[0])
    assert measure.missing([reference]) == [] and measure.numbers(reference) == {}


def test_students_that_can_not_be_measured_are_refused(store):
    with pytest.raises(ValueError, match="is not finished"):
        Match(TEACHER).take([store.create(spec())], "cpu", ticks)
    wide = finished(store, spec(network=teachers.teacher("deit_b", "mini").network.student()))
    with pytest.raises(UserError, match=r"has 3 heads and deit_s \(mini\) 2: they can't be compared head by head"):
        Match(TEACHER).take([wide], "cpu", ticks)
    run = finished(store, spec())
    run.weights.write_bytes(b"nonsense")
    with pytest.raises(DamagedRunError, match=f"runs remove {run.id}"):
        Match(TEACHER, 4).take([run], "cpu", ticks)
    with pytest.raises(ValueError, match="not on this machine"):
        Match(TEACHER.model_copy(update={"sha256": None})).numbers(run)


# --- the experiment ------------------------------------------------------------------------------------------------


def lab(seeds=2, *sets) -> Lab:
    return Lab(resolve(sets=sets, seeds=seeds, environment={}, folder=Path("/nonexistent")))


def test_runs_are_shared_with_the_benchmark():
    from ablations.benchmark import benchmark

    ours, theirs = match(lab(), "clip_b", "copy,distill"), benchmark(lab(), "clip_b", "copy,distill")
    assert [spec.id for spec in ours.specs] == [spec.id for spec in theirs.specs]
    assert ours.figure == "match" and any("by construction" in note for note in ours.notes)


def test_the_table_is_made_from_runs_and_nothing_is_measured_twice(store, monkeypatch, capsys):
    series = experiments.spread(partial(match, teacher="deit_s,dinov2_s", methods="copy,distill"), lab())
    few = tuple(replace(s, measures=tuple(replace(m, images=4) for m in s.measures)) for s in series.studies)
    series = replace(series, studies=few)
    for one in series.specs:
        finished(store, one)
    pipeline.measure([series], store, "cpu", ignore)
    monkeypatch.setattr(Match, "take", lambda *_: pytest.fail("taken twice"))
    pipeline.measure([series], store, "cpu", ignore)
    reading = read(series, lab().settings, store)
    for report in reading.reports:
        scratch, copy, distill = report.rows
        assert copy.numbers[HEAD_BY_HEAD] == 0 and report.reference.numbers == {}
        # A student that was not trained is where the baseline of its seed is.
        assert distill.by_run == scratch.by_run and len(scratch.by_run) == 2
        assert scratch.numbers[HEAD_BY_HEAD] == np.mean([one[HEAD_BY_HEAD] for one in scratch.by_run])
    assert reading.reports[0].rows[0].numbers != reading.reports[1].rows[0].numbers
    head = tables.markdown(reading).splitlines()[2]
    assert head == "| arm | top-1 % | points vs scratch [95 %] | p, Holm | JSD | seeds |"
    assert {"JSD block 0", "JSD block 11", HEADS_MATCHED} <= set(tables.frame(reading).columns)
    assert [one.claim.name for one in reading.judged] == [
        "matched, and fails", "the students match", "matching is not the issue",
    ]  # fmt: skip
    assert "Maps, bits from the teacher's: copy 0.000, distill" in reading.verdict
    capsys.readouterr()


@pytest.mark.parametrize(
    ("teacher", "methods", "message"),
    [
        ("deit_s", "distil", "`methods` 'distil', did you mean 'distill'"),
        ("deit_s", ",", "`methods` is empty"),
        ("deits", "distill", "unknown teacher 'deits', did you mean 'deit_s'"),
    ],
)
def test_bad_input(teacher, methods, message):
    with pytest.raises(UserError, match=message) as fault:
        match(lab(), teacher, methods)
    assert len(str(fault.value).splitlines()) == 1


# --- what is concluded ---------------------------------------------------------------------------------------------

STUDY = match(lab(3), "deit_s").studies[0]


def report(effect, jsd, scratch=0.4, spread=0.01, label="x", seeds=3, clear=True) -> Report:
    """Make a report on a teacher whose distilled students gain ``effect`` points and end ``jsd`` bits from its maps."""
    study = match(lab(seeds), "deit_s").studies[0] if seeds != 3 else STUDY
    half = 1.0 if clear else 100.0
    contrast = Estimate(
        value=effect, low=effect - half, high=effect + half, level=0.95, p=0.01, seeds=seeds, images=40, clusters=40,
        df=2.0, se=0.2, covers="seeds and images" if seeds > 1 else "images only",
        var_seed=None, var_cluster=0.0, var_residual=None,
    )  # fmt: skip
    steps = [spread * (i - 1) for i in range(seeds)]
    rows = [
        ArmResult(BASELINE, 50.0, seeds, (), by_run=tuple({HEADS_MATCHED: scratch, HEAD_BY_HEAD: 1.0} for _ in steps)),
        ArmResult(
            "distill", 50 + effect, seeds, (), contrast, by_run=tuple({HEAD_BY_HEAD: jsd + step} for step in steps)
        ),
    ]
    return Report(replace(study, label=label), "mini", tuple(rows), {}, None)


@pytest.mark.parametrize(
    ("of", "verdict", "ours"),
    [
        ([(0.1, 0.01), (0.2, 0.01)], "holds", "2 of 2 clearly closer"),
        ([(0.1, 0.01), (0.39, 0.1)], "undecided", "1 of 2 clearly closer"),
        ([(0.1, 0.01), (0.9, 0.01)], "does not hold", "1 of 2 clearly closer"),
        ([(0.4, 0.01)], "undecided", "+0.000 bits [-0.025, +0.025], 0 of 1"),
        # Closer than the scratch student's heads in order (1.0), but not closer than its paired heads (0.4).
        ([(0.5, 0.01)], "does not hold", "+0.100 bits"),
    ],
)
def test_whether_the_students_match(of, verdict, ours):
    found = matched([report(0.0, jsd, spread=spread) for jsd, spread in of])
    assert found.verdict == verdict and ours in found.ours and found.seeds == 3


def test_claiming_a_match_is_harder_with_many_teachers():
    alone = report(0.0, 0.35, spread=0.018)
    assert matched([alone]).verdict == "holds"
    assert matched([alone] * 4).verdict == "undecided"


def test_without_maps_or_enough_seeds_there_is_no_finding():
    bare = replace(report(0.0, 0.1), rows=report(0.0, 0.1).rows[:1])
    assert matched([bare]).verdict == usable([bare]).verdict == "not testable here"
    one = [report(5.0, 0.1, seeds=1)] * 6
    assert matched(one).verdict == usable(one).verdict == "undecided"


@pytest.mark.parametrize(
    ("of", "verdict", "note"),
    [
        # Failing teachers are matched as well as gaining ones, each better than one of these.
        ([(5, 0.30), (4, 0.10), (3, 0.20), (-4, 0.15), (-5, 0.20)], "holds", "2 of 2 failing"),
        # The worse the match, the smaller the gain.
        ([(5, 0.10), (4, 0.15), (3, 0.20), (-4, 0.25), (-5, 0.30)], "does not hold", "0 of 2 failing"),
        ([(5, 0.10), (4, 0.20), (3, 0.15), (-5, 0.25), (-4, 0.30)], "undecided", "0 of 2 failing"),
        ([(5, 0.30), (4, 0.10), (3, 0.20), (2, 0.15), (1, 0.20)], "not testable here", "no teacher clearly fails"),
        ([(-5, 0.30), (-4, 0.1), (-3, 0.2), (-2, 0.15), (-6, 0.2)], "not testable here", "no teacher clearly gains"),
        ([(5, 0.30), (4, 0.10), (-3, 0.20), (-4, 0.15)], "not testable here", "with 4 teachers no correlation"),
        ([(5, 0.30), (-5, 0.10)], "not testable here", "here are 2"),
    ],
)
def test_whether_matching_is_the_issue(of, verdict, note):
    found = usable([report(float(effect), jsd) for effect, jsd in of])
    assert (found.verdict, note in found.note) == (verdict, True), found


def test_undecided_teachers_count_for_neither_side():
    of = [report(5, 0.3), report(4, 0.1), report(3, 0.2), report(-4, 0.15), report(-5, 0.2, clear=False)]
    assert "1 of 1 failing" in usable(of).note


def test_findings_are_in_the_order_of_the_claims():
    found = ablation.findings([report(1.0, 0.1)])
    assert [(one.claim.name, one.verdict) for one in found] == [
        ("the students match", "holds"),
        ("matching is not the issue", "not testable here"),
    ]


@pytest.mark.parametrize("fields", [{"direction": "above"}, {"arms": ("copy",)}, {"contrasts": ("x",)}])
def test_only_claims_about_contrasts_have_a_direction(fields):
    with pytest.raises(ValueError, match="needs a direction"):
        Claim(name="x", text="x", paper="x", source="x", **fields)


def test_each_claim_has_exactly_one_kind_of_judgement():
    assert [claim.name for claim in claims.of("match")] == ["matched, and fails"]
    assert claims.of("recipes") == () and claims.stated("match", "the students match").direction is None
    with pytest.raises(StopIteration):
        claims.stated("match", "matched, and fails")
