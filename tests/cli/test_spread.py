"""Single-teacher ablations over several teachers."""

from functools import partial

import pytest

from ablations.benchmark import benchmark
from ablations.rescue import rescue
from atdiag.cli.experiments import spread
from atdiag.core.errors import UserError
from atdiag.networks.registry import teachers
from tests.studies import lab


def test_a_single_teacher_ablation_runs_for_each_of_several_teachers():
    series = spread(partial(benchmark, teacher="deit_s,clip_b", methods="copy"), lab())
    assert [study.teacher.name for study in series.studies] == ["deit_s", "clip_b"]
    assert series.figure == "gains"
    alone = [benchmark(lab(), name, "copy") for name in ("deit_s", "clip_b")]
    assert {spec.id for spec in series.specs} == {spec.id for study in alone for spec in study.specs}
    assert spread(partial(benchmark, teacher="deit_s", methods="copy"), lab()).figure == ""


def test_teachers_that_an_ablation_refuses_are_named():
    series = spread(partial(rescue, teacher="all", transfer="copy"), lab())
    refused = [name for name in teachers.miniatures() if not teachers.miniature_network(name).components]
    assert refused
    assert {study.teacher.name for study in series.studies} == set(teachers.miniatures()) - set(refused)
    assert [note for note in series.notes if note.startswith("Left out: ")] == [
        f"Left out: {name} (mini) has no native component, so there is nothing to add: "
        "its standard student is its native one: the same line with 'benchmark' for 'rescue' shows whether its "
        "attention transfers."
        for name in refused
    ]
    with pytest.raises(UserError, match="has no native component"):
        spread(partial(rescue, teacher=f"clip_b,{refused[0]}", transfer="copy"), lab())
    with pytest.raises(UserError, match="unknown teacher 'klip_b', did you mean 'clip_b'"):
        spread(partial(benchmark, teacher="deit_b,klip_b", methods="copy"), lab())
    with pytest.raises(UserError, match="`methods` 'kopy', did you mean 'copy'"):
        spread(partial(benchmark, teacher="all", methods="kopy"), lab())
