"""The reinit ablation: its arms, and its verdict."""

import pytest

from ablations.reinit import reinit
from atdiag.study.protocol import BASELINE
from tests.studies import arms, differences, fabricated, lab


@pytest.mark.parametrize(("module", "redrawn"), [("attn", ("attn",)), ("mlp", ("mlp",)), ("all", ("attn", "mlp"))])
@pytest.mark.parametrize("transfer", ["copy", "distill"])
@pytest.mark.parametrize("teacher", ["clip_b", "beitv2_b"])
def test_reinit_separates_initialisation_from_transfer(module, redrawn, transfer, teacher):
    study = reinit(lab(), module, teacher, transfer)
    without, passed = f"reinit {module}", f"reinit {module} + {transfer}"
    specs = arms(study)
    assert list(specs) == [BASELINE, without, passed]
    assert specs[BASELINE].teacher is None
    assert (specs[BASELINE].init.source, specs[BASELINE].transfer.method) == ("scratch", "none")
    for name in (without, passed):
        assert specs[name].teacher.name == teacher
        assert (specs[name].init.source, specs[name].init.reinit, specs[name].init.head) == ("teacher", redrawn, False)
    assert specs[without].transfer.method == "none"
    assert (specs[passed].transfer.method, specs[passed].transfer.layers) == (transfer, tuple(range(12)))
    assert specs[passed].transfer.weight == (None if transfer == "copy" else 3.0)

    assert differences(study, BASELINE, without) == {"teacher", "init.source", "init.reinit"}
    loss = {"transfer.loss", "transfer.weight"} if transfer == "distill" else set()
    assert differences(study, without, passed) == {"transfer.method", "transfer.layers"} | loss
    assert all(spec.network.components == () for spec in specs.values())
    assert {c.name: dict(c.weights) for c in study.contrasts} == {
        f"{transfer}, given the start": {passed: 1, without: -1},
    }


def test_reinit_states_how_layer_scale_is_handled():
    clip, beit = (" ".join(reinit(lab(), "attn", name, "copy").notes) for name in ("clip_b", "beitv2_b"))
    assert "the head is new" in clip
    assert "LayerScale" not in clip
    assert "LayerScale is folded into the projection that follows it, which is exact." in beit


def test_the_teacher_itself_has_its_own_head_on_its_own_task_and_a_probe_on_others():
    own = reinit(lab(), "attn", "clip_b", "copy").reference
    assert own.specs[0].init.head and not own.probed
    study = reinit(lab("data.name=larger"), "attn", "clip_b", "copy")
    (spec,) = study.reference.specs
    assert study.reference.probed and not spec.init.head and spec.recipe.epochs == 0
    assert spec.data == study.arms[0].specs[0].data
    assert {spec.network.classes for spec in arms(study).values()} == {9}


def test_a_recipe_for_one_method_applies_only_to_its_arms():
    study = reinit(lab("recipe.copy.lr=0.5"), "attn", "clip_b", "copy")
    assert {name: spec.recipe.lr for name, spec in arms(study).items()} == {
        BASELINE: 2e-3,
        "reinit attn": 2e-3,
        "reinit attn + copy": 0.5,
    }


def test_the_verdict_of_reinit():
    study = reinit(lab(), "attn", "clip_b", "copy")
    report = fabricated(study, [5.0, 2.0], [-3.0])
    assert study.verdict(report) == (
        "Starting a standard student from clip_b (mini) with attn re-initialised helps (+5.0 points [+4.0, +6.0], "
        "3 seeds); copy of its attention on top hurts (-3.0 points [-4.0, -2.0], 3 seeds)."
    )
