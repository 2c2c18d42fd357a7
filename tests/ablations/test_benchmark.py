"""The benchmark ablation: all methods side by side, on miniatures and published networks."""

from pathlib import Path

import pytest

from ablations.benchmark import benchmark
from ablations.gains import METHODS
from atdiag.core.errors import UserError
from atdiag.core.spec import Init
from atdiag.networks.registry import teachers
from atdiag.study.builder import Lab
from atdiag.study.protocol import BASELINE
from atdiag.study.settings import resolve


def lab(*sets, profile="mini") -> Lab:
    return Lab(resolve(profile=profile, sets=sets, seeds=2, environment={}, folder=Path("/nonexistent")))


def specs(*sets, teacher="clip_b", methods=METHODS, **options):
    study = benchmark(lab(*sets, **options), teacher, ",".join(methods))
    return {arm.name: arm.specs[0] for arm in study.arms}


def test_each_arm_differs_from_scratch_only_in_its_method():
    found = specs()
    assert list(found) == [BASELINE, *METHODS]
    scratch = found[BASELINE]
    for name in ("copy", "distill", "logits", "features"):
        spec = found[name]
        assert (spec.network, spec.init, spec.recipe) == (scratch.network, scratch.init, scratch.recipe)
        assert spec.transfer.method == name and spec.teacher.name == "clip_b"
    assert {found[name].transfer.layers for name in ("copy", "distill", "features")} == {tuple(range(12))}
    tuned = found["finetune"]
    assert tuned.transfer.method == "none" and tuned.init == Init(source="teacher")
    assert tuned.network == tuned.teacher.network  # everything but the head, which is new
    assert tuned.recipe.lr < scratch.recipe.lr


def test_baseline_and_transfers_are_shared_with_other_experiments():
    from ablations.layers import layers

    others = {spec.id for spec in layers(lab(), "top", 12, "clip_b", "copy", False).specs}
    found = specs(methods=("copy",))
    assert {found["copy"].id, found[BASELINE].id} <= others


def test_transfer_options_apply_only_to_arms_with_that_transfer():
    found = specs("transfer.tensor=q", "transfer.layers=top:2", "transfer.heads=0", "transfer.weight=2")
    for name in ("copy", "distill"):
        assert (found[name].transfer.tensor, found[name].transfer.layers) == ("q", (10, 11))
        assert found[name].transfer.heads == (0,)
    assert found["features"].transfer.layers == (10, 11)
    assert {name: found[name].transfer.weight for name in ("copy", "distill", "logits")} == {
        "copy": None,
        "distill": 2.0,
        "logits": 2.0,
    }


def test_published_teachers_can_be_planned_without_their_weights():
    study = benchmark(lab(profile="paper"), "dinov2_s", "copy,finetune")
    scratch, copy, tuned = (arm.specs[0] for arm in study.arms)
    assert study.teacher.sha256 is None
    assert (scratch.network.tokens, scratch.network.classes, scratch.network.components) == (257, 1000, ())
    assert copy.teacher.network.components == tuned.network.components == ("layer_scale",)
    assert study.reference.probed  # it has no head
    assert study.reference.specs[0].network.classes == 1000 and study.reference.specs[0].probe_images == 10_000
    deit = benchmark(lab(profile="small"), "deit_s", "copy").reference.specs[0]
    assert deit.network.classes == 10 and deit.init.head_rows == (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
    assert benchmark(lab(profile="paper"), "deit_s", "copy").reference.specs[0].init.head_rows == ()


def test_foreign_teachers_teach_but_initialise_no_student():
    options = {"profile": "small", "teacher": "timm:vit_base_patch16_xp_224"}
    assert specs(methods=("copy", "distill"), **options)["copy"].teacher.network.differences
    with pytest.raises(UserError, match=r"no student can start from this teacher.*parallel_blocks"):
        specs(methods=("finetune",), **options)


@pytest.mark.parametrize(
    ("methods", "message"),
    [("copi", "`methods` 'copi', did you mean 'copy'"), (",", "`methods` is empty")],
)
def test_wrong_methods(methods, message):
    with pytest.raises(UserError, match=message):
        benchmark(lab(), "clip_b", methods)


def test_every_row_of_the_registry_can_be_planned():
    for name in teachers.registry():
        planned = specs(profile="paper", teacher=name, methods=("copy",))
        network = planned["copy"].network
        assert network.components == () and network.classes == 1000, name
