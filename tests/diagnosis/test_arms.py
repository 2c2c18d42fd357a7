"""A diagnosis asks about the ablations' own runs, and its plan is written down."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest

from ablations.benchmark import benchmark
from ablations.layers import layers
from ablations.reinit import reinit
from ablations.rescue import rescue
from atdiag.core.errors import UserError
from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.diagnosis import arms, planning
from atdiag.execution import plan as plans
from atdiag.study.builder import Lab
from atdiag.study.settings import resolve

SEEDS = (5, 8, 12)


def settings(*sets, first=0):
    return resolve("mini", 1, sets, environment={}, folder=Path("/nonexistent"), first_seed=first)


def case(name="clip_b", transfer="copy", *sets):
    return arms.case(planning.lab(settings(*sets), SEEDS), name, transfer, 4.0)


def ids(arm):
    return [spec.id for spec in arm.specs]


@pytest.mark.parametrize("transfer", ["copy", "distill"])
@pytest.mark.parametrize("name", ["clip_b", "beitv2_b", "dinov2_reg_s", "hub"])
def test_runs_are_shared_with_the_ablations(name, transfer):
    own = case(name, transfer)
    lab, theirs = own.lab, {}
    for study in (
        rescue(lab, name, transfer),
        reinit(lab, "attn", name, transfer),
        reinit(lab, "mlp", name, transfer),
        layers(lab, "both", "6", name, transfer),
        benchmark(lab, name, "copy,distill"),
    ):
        theirs |= {tuple(ids(arm)): arm.name for arm in study.arms}
    names = own.outline.names
    asked = [*own.outline.first, names.native, names.control, *names.singles, "reinit attn", "reinit mlp"]
    asked += [names.blocks(half) for half in own.outline.halves]
    asked += [names.given(c for c in names.components if c != left) for left in names.components]
    assert [arm for arm in asked if tuple(ids(own.arm(arm))) not in theirs] == []


def test_the_native_student_of_a_plain_teacher_is_the_standard_one():
    own = case("deit_s")
    assert own.outline.components == ()
    assert own.outline.names.native == own.outline.names.standard
    assert "the architecture" not in own.outline.hypotheses
    assert own.outline.not_asked["the architecture"] == "deit_s (mini) has no native component"


def test_components_that_cannot_matter_are_not_asked_about():
    own = case("beitv2_b", "copy")
    assert set(own.idle) == {"rel_pos_bias"}
    assert not set(own.idle) & set(own.outline.components)
    assert "rel_pos_bias" in case("beitv2_b", "distill").outline.components


def test_every_arm_can_be_made_and_they_differ():
    for transfer in ("copy", "distill"):
        own = case("clip_b", transfer)
        made = {name: tuple(ids(own.arm(name))) for name in planning.arms(own)}
        assert len(set(made.values())) == len(made), "one condition under two names"
        assert {len(one) for one in made.values()} == {SEEDS[-1] + 5}


def test_a_plan_is_written_once_and_never_replaced(tmp_path):
    plan = make()
    path = plan.write(tmp_path / "new" / "folder")
    assert json.loads(path.read_text()) == json.loads(json.dumps(plan.document()))
    assert plan.write(path.parent) == path, "the same plan is found again"
    other = make(case("clip_b", "distill"))
    with pytest.raises(UserError, match=r"plan\.json is the plan of another diagnosis"):
        other.write(path.parent)
    assert plan.stem != other.stem


def make(of=None, store="nowhere", **more):
    options = ExecutionOptions(device="cpu", threads=1)
    return planning.make(of or case(), lambda specs: plans.make(specs, Store(Path(store)), options), **more)


def test_a_budget_leaves_out_looks_before_anything_runs():
    whole = make()
    assert [look.seeds for look in make(budget=whole.most + 1).looks] == [5, 8, 12]
    less = make(budget=whole.most - 1)
    assert len(less.looks) < 3
    assert sum(look.level for look in less.looks) == pytest.approx(0.05)
    with pytest.raises(UserError, match=r"`budget` 1 s is too short for the first question alone: \d+ runs take about"):
        make(budget=1.0)


@pytest.mark.parametrize(
    ("name", "transfer", "margin", "message"),
    [
        ("clip", "copy", 4.0, "clip"),
        ("clip_b", "coppy", 4.0, "did you mean 'copy'"),
        ("clip_b", "copy", 0.0, "`margin` 0 is not a margin"),
    ],
)
def test_wrong_input_is_refused(name, transfer, margin, message):
    with pytest.raises(UserError, match=message):
        arms.case(planning.lab(settings(), SEEDS), name, transfer, margin)


def test_seeds_beyond_the_last_are_refused():
    with pytest.raises(UserError, match="`first_seed` 999999"):
        planning.lab(settings(first=999_999), SEEDS)
    lab = planning.lab(settings(first=7), SEEDS)
    assert [seed.data for seed in lab.settings.seeds] == list(range(7, 24))


def test_a_teacher_with_more_than_a_student_can_have(monkeypatch):
    own = case("clip_b")
    network = own.teacher.network.model_copy(update={"differences": ("rope",)})
    more = dataclasses.replace(own, teacher=own.teacher.model_copy(update={"network": network}))
    assert more.outline.components == ()
    assert not more.outline.start
    assert "rope" in more.outline.not_asked["the architecture"]


def test_images_smaller_than_those_that_the_teacher_was_trained_on():
    own = case()
    assert own.smaller_than is None
    profile = own.lab.settings.profile
    for size, expected in ((64, 224), (224, None), (384, None)):
        seen = profile.model_copy(update={"data": profile.data.model_copy(update={"image_size": size})})
        chosen = replace(own.lab.settings, profile=seen, chosen={"data.image_size": 224})
        assert replace(own, lab=Lab(chosen)).smaller_than == expected
