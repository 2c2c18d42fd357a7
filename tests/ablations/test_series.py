"""Studies that are read together: many teachers, sizes, lengths, data sets, losses; claims; corrections."""

import io
import json
import tomllib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ablations import claims as paper
from ablations import gains
from ablations.benchmark import benchmark
from ablations.datasets import datasets
from ablations.epochs import epochs
from ablations.layers import layers
from ablations.losses import losses, slope
from ablations.ood import ood
from ablations.reinit import reinit
from ablations.reproduction import combinations
from ablations.rescue import rescue
from ablations.sizes import sizes
from atdiag.cli.experiments import spread
from atdiag.core.errors import UserError
from atdiag.core.runs import Store
from atdiag.core.spec import Seed, Transfer
from atdiag.networks.registry import teachers
from atdiag.reports import document, tables
from atdiag.stats.contrasts import holm
from atdiag.study import registry
from atdiag.study.aggregate import corrected, read
from atdiag.study.claims import Claim, Judged
from atdiag.study.judging import judge_claim
from atdiag.study.protocol import BASELINE, Reading, Series
from atdiag.study.verdicts import verb_phrase
from tests.studies import arms, differences, estimate, fabricated, finished, lab

PLACED = registry.placed()
ABLATIONS = {name: function for name, (function, _) in PLACED.items()}


def options(profile: str, quick: bool) -> dict:
    return {name: place.options(profile, quick) for name, (_, place) in PLACED.items()}


# --- teachers beside each other ------------------------------------------------------------------------------------


def test_an_ablation_of_one_teacher_is_spread_over_several():
    series = spread(partial(benchmark, teacher="deit_s,clip_b", methods="copy"), lab())
    assert [study.teacher.name for study in series.studies] == ["deit_s", "clip_b"]
    assert series.figure == "gains"
    alone = [benchmark(lab(), name, "copy") for name in ("deit_s", "clip_b")]
    assert {spec.id for spec in series.specs} == {spec.id for study in alone for spec in study.specs}
    assert spread(partial(benchmark, teacher="deit_s", methods="copy"), lab()).figure == ""


def test_of_all_teachers_those_that_an_ablation_refuses_are_named():
    series = spread(partial(rescue, teacher="all", transfer="copy"), lab())
    refused = [name for name in teachers.miniatures() if not teachers.miniature_network(name).components]
    assert refused
    assert {study.teacher.name for study in series.studies} == set(teachers.miniatures()) - set(refused)
    assert [note for note in series.notes if note.startswith("Left out: ")] == [
        f"Left out: {name} (mini) has no native component, so there is nothing to add: choose another, such as clip_b."
        for name in refused
    ]
    with pytest.raises(UserError, match="has no native component"):
        spread(partial(rescue, teacher=f"clip_b,{refused[0]}", transfer="copy"), lab())
    with pytest.raises(UserError, match="unknown teacher 'klip_b', did you mean 'clip_b'"):
        spread(partial(benchmark, teacher="deit_b,klip_b", methods="copy"), lab())
    with pytest.raises(UserError, match="--methods 'kopy', did you mean 'copy'"):
        spread(partial(benchmark, teacher="all", methods="kopy"), lab())


# --- what each varies ----------------------------------------------------------------------------------------------


def test_sizes_are_those_of_a_family():
    series = sizes(lab(), "dinov2")
    assert [study.teacher.name for study in series.studies] == ["dinov2_s", "dinov2_b"]
    every = {study.teacher.name for study in sizes(lab()).studies}
    assert every == {"deit_s", "deit_b", "dinov2_s", "dinov2_b"}
    with pytest.raises(UserError, match=r"clip has one size at profile mini \(clip_b\): .* choose from: deit, dinov2"):
        sizes(lab(), "clip")
    with pytest.raises(UserError, match="--family 'diet', did you mean 'deit'"):
        sizes(lab(), "diet")


def test_epochs_are_trainings_of_their_own_with_their_own_baselines():
    series = epochs(lab())
    assert [study.options["epochs"] for study in series.studies] == ["2", "4", "8"]
    for study in series.studies:
        length = int(study.options["epochs"])
        assert {spec.recipe.epochs for arm in study.arms for spec in arm.specs} == {length}
        assert study.label == f"dinov2_s (mini), {length} epochs"
    usual = benchmark(lab(), "dinov2_s", "copy")
    assert {spec.id for arm in series.studies[1].arms for spec in arm.specs} <= {spec.id for spec in usual.specs}
    short, long = (study.arms[1].specs[0].model_dump() for study in series.studies[:2])
    assert {key for key in short if short[key] != long[key]} == {"recipe"}
    for wrong in ("2,four", "0", "1.5", "-2"):
        with pytest.raises(UserError, match="is no number of epochs: write it as '2,4,8'"):
            epochs(lab(), epochs=wrong)
    # the user's own length is what is varied around
    assert [s.options["epochs"] for s in epochs(lab("recipe.epochs=6")).studies] == ["3", "6", "12"]


def test_datasets_have_their_own_baselines():
    series = datasets(lab())
    assert [{spec.data.name for spec in study.specs} for study in series.studies] == [{"digits"}, {"larger"}]
    assert series.studies[1].reference is None  # its head is for the other task
    with pytest.raises(UserError, match="did you mean 'larger'"):
        datasets(lab(), data="digits,largr")


def test_ood_trains_nothing_of_its_own():
    series = ood(lab(), "dinov2_s", "clean,contrast:2", "copy")
    assert [study.test_set for study in series.studies] == [None, "contrast:2"]
    assert {spec.id for spec in series.specs} == {spec.id for spec in benchmark(lab(), "dinov2_s", "copy").specs}
    with pytest.raises(UserError, match="unknown test set 'contrst', did you mean 'contrast'"):
        ood(lab(), on="contrst")


def test_losses_and_weights_are_all_that_their_arms_differ_by():
    (study,) = losses(lab(), "dinov2_s", "ce,jsd", "0.3,3").studies
    assert list(arms(study)) == [BASELINE, "ce x0.3", "ce x3", "jsd x0.3", "jsd x3"]
    assert differences(study, "ce x0.3", "ce x3") == {"transfer.weight"}
    assert differences(study, "ce x3", "jsd x3") == {"transfer.loss"}
    # the profile's usual distillation is one of them
    usual = benchmark(lab(), "dinov2_s", "distill").arms[1]
    assert next(arm for arm in study.arms if arm.name == "ce x3").specs == usual.specs
    for wrong in ("0", "-1", "x", "nan", "inf"):
        with pytest.raises(UserError, match="is no positive number"):
            losses(lab(), weights=wrong)
    with pytest.raises(UserError, match="--losses 'jds', did you mean 'jsd'"):
        losses(lab(), losses="jds")


def test_the_slope_over_the_weight_is_that_of_least_squares():
    factors, accuracy = [0.3, 1.0, 30.0], np.array([50.0, 53.0, 51.0])
    weights = slope("ce", factors)
    assert sum(weights.values()) == pytest.approx(0)
    found = sum(w * a for w, a in zip(weights.values(), accuracy, strict=True))
    assert found == pytest.approx(np.polyfit(np.log10(factors), accuracy, 1)[0])


def test_layers_from_both_ends():
    study = layers(lab(), "both", "3,6", "dinov2_s", "copy", False)
    assert list(arms(study)) == [BASELINE, "top 3", "bottom 3", "top 6", "bottom 6", "all blocks"]
    assert arms(study)["top 3"].transfer.layers == (9, 10, 11)
    assert arms(study)["bottom 3"].transfer.layers == (0, 1, 2)
    assert [dict(c.weights) for c in study.contrasts] == [
        {"top 3": 1, "bottom 3": -1},
        {"top 6": 1, "bottom 6": -1},
    ]
    one = layers(lab(), "top", 6, "dinov2_s", "copy", False)
    assert {spec.id for spec in one.specs} <= {spec.id for spec in study.specs}


def test_a_study_needs_a_baseline_and_another_arm():
    study = benchmark(lab(), "deit_s", "copy")
    with pytest.raises(UserError, match=r"no arm to contrast with a baseline: give arms=\(lab.baseline"):
        Series.join([replace(study, arms=study.arms[1:])])


@pytest.mark.parametrize("make", [partial(ood, on=""), partial(datasets, data=" , ")])
def test_an_empty_list_is_no_default(make):
    with pytest.raises(UserError, match="names none"):
        make(lab())


def test_arms_that_share_no_baseline_are_refused():
    study = benchmark(lab(), "deit_s", "copy")
    other = benchmark(lab("data.name=larger"), "deit_s", "copy")
    with pytest.raises(
        UserError, match=r"'copy' \(on larger\) and 'scratch' \(on digits\) are not measured on the same"
    ):
        replace(study, arms=(study.arms[0], other.arms[1]))
    late = replace(
        study.arms[1], specs=tuple(s.model_copy(update={"seed": Seed(data=9, model=9)}) for s in study.arms[1].specs)
    )
    with pytest.raises(UserError, match="have no seed in common"):
        replace(study, arms=(study.arms[0], late))


# --- corrected together --------------------------------------------------------------------------------------------


def fabricated_series(effects: dict[str, list[float]], half=1.0, seeds=3) -> list:
    return [
        fabricated(benchmark(lab(), name, "copy,distill"), values, half=half, seeds=seeds)
        for name, values in effects.items()
    ]


def test_contrasts_of_all_studies_are_corrected_together(tmp_path):
    store = Store(tmp_path)
    series = spread(partial(benchmark, teacher="deit_s,clip_b", methods="copy,distill"), lab(seeds=3))
    for study, shift in zip(series.studies, (0, 3), strict=True):
        right = {BASELINE: [20, 22, 21], "copy": [30 + shift, 31, 29], "distill": [25, 21 + shift, 23], "teacher": [36]}
        finished(study, store, right)
    reading = read(series, lab().settings, store)
    found = [row.contrast for report in reading.reports for row in report.rows[1:]]
    assert [e.adjusted for e in found] == pytest.approx(holm([e.p for e in found]))
    # alone, two of them are corrected for two
    one = read(Series.join([series.studies[0]]), lab().settings, store).reports[0]
    assert [row.contrast.adjusted for row in one.rows[1:]] == pytest.approx(holm([e.p for e in found[:2]]))


def test_a_contrast_that_studies_share_counts_once():
    report = fabricated(benchmark(lab(), "deit_s", "copy"), [3.0])
    (twice, again) = corrected([report, report])
    assert twice.rows[1].contrast.adjusted == again.rows[1].contrast.adjusted == 0.05


def test_what_is_clear_alone_need_not_be_so_among_many():
    alone = estimate(3.0, 2.9)
    assert alone.clear
    reports = corrected(fabricated_series({name: [3.0, 3.0] for name in ("deit_s", "clip_b")}, half=2.9))
    # equal numbers from runs with equal names are one contrast here, so this is a family of one
    assert reports[0].rows[1].contrast.clear
    assert not replace(alone, adjusted=0.2).clear
    assert "can't be told from noise" in verb_phrase(replace(alone, adjusted=0.2), "helps", "hurts")


def test_one_seed_is_not_corrected():
    (report,) = corrected(fabricated_series({"deit_s": [3.0, 9.0]}, seeds=1))
    assert [row.contrast.adjusted for row in report.rows[1:]] == [None, None]


def test_equivalence_is_said_where_it_was_asked_for_and_found():
    (report,) = corrected(fabricated_series({"deit_s": [0.1, 3.0]}, half=0.4), equivalence=0.5)
    near, far = (row.contrast for row in report.rows[1:])
    assert (near.within, far.within) == (0.5, None)
    assert verb_phrase(near, "helps", "hurts").startswith("makes no difference of 0.5 points (+0.1")
    (unasked,) = corrected(fabricated_series({"deit_s": [0.1, 3.0]}, half=0.4))
    assert unasked.rows[1].contrast.within is None


# --- claims --------------------------------------------------------------------------------------------------------

FAILS = Claim(
    name="fails", text="", paper="-5.1", source="", arms=("copy",), direction="below", families=("clip", "beitv2")
)


@pytest.mark.parametrize(
    ("effects", "verdict", "ours"),
    [
        ({"clip_b": -3.0, "beitv2_b": -5.0}, "holds", "-5.0 to -3.0 (2 of 2 clear)"),
        ({"clip_b": -3.0, "beitv2_b": 5.0}, "does not hold", "-3.0 to +5.0 (1 of 2 clear, 1 the other way)"),
        ({"clip_b": -3.0, "beitv2_b": -0.5}, "undecided", "-3.0 to -0.5 (1 of 2 clear)"),
        ({"clip_b": -0.5, "beitv2_b": 0.5}, "undecided", "-0.5 to +0.5 (0 of 2 clear)"),
        ({"clip_b": -3.0}, "holds", "-3.0"),
        ({"deit_b": -3.0}, "not testable here", ""),
    ],
)
def test_a_claim_is_judged_by_the_intervals_of_its_families(effects, verdict, ours):
    reports = [
        fabricated(benchmark(lab(), name, "copy,distill"), [effect, 99.0]) for name, effect in effects.items()
    ] + [fabricated(benchmark(lab(), "dinov2_s", "copy,distill"), [40.0, 99.0])]
    found = judge_claim(FAILS, reports)
    assert (found.verdict, found.ours) == (verdict, ours)
    tested = [effect for name, effect in effects.items() if name in ("clip_b", "beitv2_b")]
    if tested:
        assert (found.low, found.high) == (min(tested) - 1, max(tested) + 1)
    missing = [f for f in ("clip", "beitv2") if f"{f}_b" not in effects]
    assert found.note == (f"not tested: {', '.join(missing)}" if missing else "")


def test_a_claim_of_an_effect_does_not_hold_where_there_is_shown_to_be_none():
    reports = [fabricated(benchmark(lab(), "clip_b", "copy"), [-0.1], half=0.3)]
    assert judge_claim(FAILS, corrected(reports)).verdict == "undecided"
    assert judge_claim(FAILS, corrected(reports, equivalence=0.5)).verdict == "does not hold"


def test_nothing_is_rescued_that_has_not_failed():
    claim = next(one for one in paper.of("rescue") if one.name == "native components rescue")

    def judged(standard: float) -> Judged:
        study = rescue(lab(), "clip_b", "copy")
        effects = [standard if arm.name == "standard + copy" else 9.0 for arm in study.arms[1:]]
        return judge_claim(claim, [fabricated(study, effects)])

    assert judged(-3.0).verdict == "holds"
    for spared in (judged(24.0), judged(-0.5)):
        assert (spared.verdict, spared.note) == ("not testable here", "no failure to reverse: clip_b (mini)")


def test_one_seed_decides_no_claim():
    reports = [fabricated(benchmark(lab(), "clip_b", "copy"), [-30.0], seeds=1)]
    assert judge_claim(FAILS, reports).verdict == "undecided"


def test_the_claims_file_speaks_of_what_there_is():
    """Every claim names known ablations and families, and matches contrasts that its ablation makes."""
    content = tomllib.loads((Path(paper.__file__).with_name("claims.toml")).read_text())
    families = {row.family for row in teachers.registry().values()}
    planned = {
        name: Series.join([spread(partial(ABLATIONS[name], **one), lab()) for one in combinations(chosen)])
        for name, chosen in options("mini", False).items()
    }
    for ablation in content:
        series = planned[ablation]
        reports = [
            fabricated(
                study,
                [-9.0 if arm.name.startswith("standard + ") else 9.0 for arm in study.arms[1:]],
                [9.0] * len(study.contrasts),
            )
            for study in series.studies
        ]
        for claim in paper.of(ablation):
            assert claim in series.claims, f"{ablation} does not carry {claim.name}"
            assert set(claim.families) <= families
            assert claim.paper and claim.source and claim.text
            assert judge_claim(claim, reports).verdict != "not testable here", claim.name


# --- all analyses --------------------------------------------------------------------------------------------------


def runs_of(profile_lab, quick: bool) -> dict[str, set[str]]:
    chosen = options("mini", quick)
    return {
        name: {
            s.id
            for one in combinations(chosen[name])
            for s in spread(partial(ABLATIONS[name], **one), profile_lab).specs
        }
        for name in chosen
    }


def test_what_is_done_quickly_is_part_of_the_whole():
    some, every = runs_of(lab(seeds=3), True), runs_of(lab(seeds=3), False)
    assert list(some) == list(every) == list(ABLATIONS)
    for name in some:
        assert some[name] <= every[name], name
    count, whole = len(set.union(*some.values())), len(set.union(*every.values()))
    assert count < whole / 2
    # ood, match and recipes look at runs of others
    assert every["ood"] | every["recipes"] | every["match"] <= every["benchmark"]


@pytest.mark.parametrize("profile", ["small", "paper"])
def test_all_analyses_can_be_planned_at_every_profile(profile):
    from atdiag.study.builder import Lab
    from atdiag.study.settings import resolve

    sets = ["data.image_size=126"] if profile == "small" else []
    at = Lab(resolve(profile=profile, sets=sets, environment={}, folder=Path("/nonexistent")))
    made = 0
    for name in ("epochs", "reinit", "layers", "rescue", "losses"):
        for one in combinations(options(profile, False)[name]):
            try:
                made += len(spread(partial(ABLATIONS[name], **one), at).specs)
            except UserError as fault:
                assert profile == "small", fault  # 126 px fit patches of 14 and no others
    assert made


# --- as tables -----------------------------------------------------------------------------------------------------


@pytest.fixture
def reading(tmp_path) -> Reading:
    store = Store(tmp_path)
    series = spread(partial(benchmark, teacher="deit_s,clip_b", methods="copy,distill"), lab())
    for study in series.studies:
        finished(study, store, {BASELINE: [20, 22], "copy": [30, 31], "distill": [25, 19], "teacher": [36]})
    return read(series, lab().settings, store)


def test_tables_fit_a_terminal_and_name_every_study(reading):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(tables.terminal(reading))
    text = console.export_text()
    assert all(len(line) <= 80 for line in text.splitlines())
    for report in reading.reports:
        assert report.study.label in text
        assert f"{report.study.label} itself" in text
    assert text.count("copy") >= 2
    assert "…" not in text


def test_every_run_stands_behind_the_tables(reading):
    markdown, frame = tables.markdown(reading), tables.frame(reading)
    assert all(spec.id in markdown for spec in reading.series.specs)
    assert {run for runs in frame.runs for run in runs.split()} == {spec.id for spec in reading.series.specs}
    assert set(reading.runs) == {spec.id for spec in reading.series.specs}
    assert list(frame.study.unique()) == [report.study.label for report in reading.reports]
    found = json.loads(json.dumps(document.as_json(reading), allow_nan=False))
    assert [study["study"] for study in found["studies"]] == list(frame.study.unique())
    for study, report in zip(found["studies"], reading.reports, strict=True):
        assert [arm["top1"] for arm in study["arms"]] == [row.top1 for row in report.rows]
    caption = document.caption(reading)
    assert "2 seeds" in caption and "Profile mini" in caption and "n = 40 test images" in caption
    assert all(run in caption for run in reading.runs)


def test_latex_has_booktabs_rules_and_no_bare_special_characters(reading):
    text = tables.latex(reading)
    assert text.count("\\toprule") == text.count("\\midrule") == text.count("\\bottomrule") == 1
    assert "deit\\_s (mini)" in text
    body = text.partition("\\midrule")[2].partition("\\bottomrule")[0]
    assert {line.count(" & ") for line in body.splitlines() if "&" in line} == {5 - 1}
    assert not [line for line in body.splitlines() if "%" in line.replace("\\%", "")]


def test_what_is_undecided_says_how_many_seeds_would_settle_it(reading):
    (said,) = [note for note in tables.notes(reading) if "would settle" in note]
    assert "deit_s (mini) distill: " in said


def test_claims_as_a_table():
    judged = [Judged(FAILS, "holds", "-3.0", -4.0, -2.0, 3), Judged(FAILS, "not testable here", "", note="no such")]
    assert tables.claims_markdown(judged)[2:] == [
        "| fails | -5.1 | -3.0 [-4.0, -2.0] | holds |",
        "| fails | -5.1 |  | not testable here (no such) |",
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(tables.claims_table(judged))
    assert all(len(line) <= 80 for line in console.export_text().splitlines())


def test_gains_know_their_methods():
    with pytest.raises(UserError, match="--methods 'finetun', did you mean 'finetune'"):
        gains.study(lab(), "benchmark", "clip_b", ["finetun"])
    assert Transfer() == gains.study(lab(), "benchmark", "clip_b", ["finetune"]).arms[1].specs[0].transfer
    assert reinit(lab()).claims == paper.of("reinit")
