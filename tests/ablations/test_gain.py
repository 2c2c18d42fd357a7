"""Variants of a student that differ in the gain of its branches: one thing each."""

import numpy as np
import pytest
import torch

from ablations import gain
from atdiag.core.errors import UserError
from atdiag.networks.model import components, students
from atdiag.training.branches import branch_factors
from tests.figures.test_gain import reported
from tests.studies import arms, differences, lab


@pytest.fixture(scope="module")
def study():
    return gain.gain(lab(), "dinov2_s")


def test_each_variant_changes_one_thing(study):
    names = [
        "gain 0.1",
        "gain 0.3",
        "teacher's gains",
        "learned from 0.1",
        "warm-up",
        "LayerScale on the MLP",
        "LayerScale",
    ]
    assert [arm.name for arm in study.arms[2:]] == [f"{n}{end}" for n in names for end in (", scratch", " + copy")]
    for name in names:
        changed = {"recipe.branch_warmup"} if name == "warm-up" else {"network.components"}
        found = differences(study, "scratch", f"{name}, scratch")
        assert changed <= found <= {*changed, "network.layer_scale_init", "network.values"}
        assert found == differences(study, "standard + copy", f"{name} + copy")
    assert differences(study, "gain 0.1 + copy", "learned from 0.1 + copy") == {"network.values"}
    assert differences(study, "gain 0.1 + copy", "gain 0.3 + copy") == {"network.layer_scale_init"}
    for one in ("learned from 0.1", "LayerScale on the MLP"):  # each has a half of what LayerScale is
        assert differences(study, f"{one} + copy", "LayerScale + copy") == {"network.values"}


def test_the_teachers_gains_are_measured_block_by_block(study):
    network = arms(study)["teacher's gains + copy"].network
    values = network.own("layer_scale")
    assert values["frozen"] is True
    assert values["branch"] == "attn"
    student = students.build(network, seed=0)
    for block in range(network.depth):
        scale = student.blocks[block].ls1
        assert not scale.gamma.requires_grad
        assert torch.all(scale.gamma == torch.tensor(values[f"block_{block}"], dtype=torch.float32))
        assert 0 < values[f"block_{block}"] < 2
    assert any("Gains of dinov2_s (mini) by block" in note for note in study.notes)


def test_a_frozen_gain_multiplies_the_attention_branch_and_is_found_again(study):
    network = arms(study)["gain 0.3 + copy"].network
    plain, scaled = (students.build(one, seed=3).blocks[4] for one in (arms(study)["scratch"].network, network))
    x = torch.randn(2, network.tokens, network.width, generator=torch.Generator().manual_seed(0))
    after = x + 0.3 * plain.attn(plain.norm1(x))
    torch.testing.assert_close(scaled(x), after + plain.mlp(plain.norm2(after)))
    built = students.build(network, seed=3)
    assert components.inspect(built) == ("layer_scale",)
    assert components.values(built, ["layer_scale"]) == {"layer_scale.branch": "attn", "layer_scale.frozen": True}


def test_layer_scale_on_the_mlp_leaves_attention_alone(study):
    network = arms(study)["LayerScale on the MLP + copy"].network
    plain, scaled = (students.build(one, seed=3).blocks[4] for one in (arms(study)["scratch"].network, network))
    x = torch.randn(2, network.tokens, network.width, generator=torch.Generator().manual_seed(0))
    after = x + plain.attn(plain.norm1(x))
    torch.testing.assert_close(scaled(x), after + 0.1 * plain.mlp(plain.norm2(after)))
    assert scaled.ls2.gamma.requires_grad


def test_the_warm_up_grows_the_attention_branch_alone(study):
    spec = arms(study)["warm-up, scratch"]
    samples = np.arange(5)
    for step, factor in ((0, 0.0), (4, 0.25), (15, 15 / 16)):
        keep = branch_factors(spec, step, 160, samples)
        assert keep.shape == (spec.network.depth, 2, 5, 1, 1)
        assert torch.all(keep[:, 0] == factor)
        assert torch.all(keep[:, 1] == 1)
    assert branch_factors(spec, 16, 160, samples) is None
    dropping = spec.model_copy(update={"recipe": spec.recipe.model_copy(update={"drop_path": 0.5})})
    without = dropping.model_copy(update={"recipe": dropping.recipe.model_copy(update={"branch_warmup": 0.0})})
    both, dropped = (branch_factors(one, 4, 160, samples) for one in (dropping, without))
    torch.testing.assert_close(both[:, 0], 0.25 * dropped[:, 0])
    torch.testing.assert_close(both[:, 1], dropped[:, 1])


def test_a_plain_teacher_has_no_variant_with_its_own_layer_scale():
    study = gain.gain(lab(), "deit_s", gains="0.2")
    assert [arm.name for arm in study.arms if arm.name.startswith("LayerScale")] == []
    assert "gain 0.2 + copy" in arms(study)


@pytest.mark.parametrize("typed", ["0", "-0.1", "x", "nan", "11"])
def test_wrong_gains_are_refused(typed):
    with pytest.raises(UserError, match="is no factor above 0"):
        gain.gain(lab(), "deit_s", gains=typed)


def test_what_is_not_clear_on_both_scales_is_said():
    report = reported()
    said = report.study.verdict(report)
    assert "gain 0.1 +6.0 points [+4.0, +8.0], +0.30 log-odds [+0.20, +0.40];" in said
    assert "gain 0.3 +1.0 points [-1.0, +3.0], +0.05 log-odds [-0.05, +0.15] (not clear on both scales)" in said


def test_a_gain_of_one_is_the_standard_student():
    """Oracle: frozen at 1, the factor changes nothing, so the run ends with the standard student's weights."""
    network = lab().student(lab().teacher("deit_s"))
    one = gain._scaled(network, 1.0, frozen=True)
    x = torch.rand(2, 1, network.image_size, network.image_size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(students.build(one, 5)(x), students.build(network, 5)(x))
