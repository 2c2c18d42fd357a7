"""Native components: what is varied, and what is said of it."""

import pytest

from ablations.rescue import OF_INTEREST, rescue
from atdiag.core.errors import UserError
from atdiag.study.builder import Lab
from atdiag.study.protocol import BASELINE
from tests.studies import arms, differences, fabricated, lab


@pytest.mark.parametrize("transfer", ["copy", "distill"])
@pytest.mark.parametrize(
    ("teacher", "own"),
    [
        ("clip_b", ("no_patch_bias", "pre_norm", "quick_gelu")),
        ("beitv2_b", ("layer_scale", "no_abs_pos", "rel_pos_bias")),
    ],
)
def test_rescue(teacher, own, transfer):
    study = rescue(lab(), teacher, transfer)
    specs = arms(study)
    plain, full, control = f"standard + {transfer}", f"native + {transfer}", "native, scratch"
    singles = {f"{name} + {transfer}": (name,) for name in own}
    others = {f"all but {name} + {transfer}": tuple(other for other in own if other != name) for name in own}
    assert list(specs) == [BASELINE, plain, *singles, *others, full, control]
    have = {name: spec.network.components for name, spec in specs.items()}
    assert have == {BASELINE: (), plain: (), **singles, **others, full: own, control: own}
    assert all(spec.init.source == "scratch" for spec in specs.values())
    for name in (plain, *singles, *others, full):
        assert specs[name].teacher.name == teacher
        assert (specs[name].transfer.method, specs[name].transfer.layers) == (transfer, tuple(range(12)))
    assert specs[control].teacher is None
    assert specs[control].network == specs[full].network

    scale = {"network.layer_scale_init"} if "layer_scale" in own else set()
    loss = {"transfer.loss", "transfer.weight"} if transfer == "distill" else set()
    transferred = {"teacher", "transfer.method", "transfer.layers"} | loss
    assert differences(study, plain, full) == {"network.components"} | scale
    assert differences(study, BASELINE, control) == {"network.components"} | scale
    assert differences(study, control, full) == transferred
    assert differences(study, BASELINE, plain) == transferred
    assert study.contrasts[0].name == OF_INTEREST
    assert dict(study.contrasts[0].weights) == {full: 1, control: -1, plain: -1, BASELINE: 1}
    assert all(sum(c.weights.values()) == 0 for c in study.contrasts)


def test_seeds_are_the_same_in_every_arm():
    study = rescue(lab(seeds=4), "clip_b", "copy")
    assert {tuple(spec.seed.model for spec in arm.specs) for arm in study.arms} == {(0, 1, 2, 3)}
    assert len({spec.id for arm in study.arms for spec in arm.specs}) == 4 * len(study.arms)


def test_a_component_that_the_teacher_has_not():
    with pytest.raises(UserError, match=r"clip_b \(mini\) has no component 'prenorm', did you mean 'pre_norm'\?"):
        lab().student(lab().teacher("clip_b"), ["prenorm"])


def test_a_teacher_without_components_can_not_be_rescued(monkeypatch):
    plain = lab().teacher("clip_b")
    plain = plain.model_copy(update={"name": "deit_b", "network": lab().student(plain)})
    monkeypatch.setattr(Lab, "teacher", lambda self, name: plain)
    with pytest.raises(UserError, match=r"deit_b \(mini\) has no native component, so there is nothing to add: choose"):
        rescue(lab(), "deit_b", "copy")


@pytest.mark.parametrize(
    ("value", "seeds", "standard", "says"),
    [
        (4.0, 3, -1.5, "by +4.0 points [+3.0, +5.0] (a rescue)"),
        (-4.0, 3, -1.5, "by -4.0 points [-5.0, -3.0] (the opposite of a rescue)"),
        (4.0, 3, 1.5, "by +4.0 points [+3.0, +5.0] (clear of zero, but there was no failure to rescue)"),
        (0.5, 3, 1.5, "by +0.5 points [-0.5, +1.5] (within noise)"),
        (40.0, 1, 1.5, "(undecided with one seed)"),
    ],
)
def test_the_verdict_of_rescue(value, seeds, standard, says):
    study = rescue(lab(), "clip_b", "copy")
    text = study.verdict(fabricated(study, [standard, *[0.0] * 6, 5.0, -5.0], [value, 0.0, 0.0], seeds=seeds))
    assert says in text
    assert text.count("undecided") == (3 if seeds == 1 else 0)
    if seeds > 1:
        assert f"into a standard student {'helps' if standard > 0 else 'hurts'} ({standard:+.1f}" in text
        assert "the components alone, from scratch, hurt (-5.0" in text
