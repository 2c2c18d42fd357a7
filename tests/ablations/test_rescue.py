"""The rescue ablation: its arms, and its verdict."""

import pytest

from ablations.rescue import OF_INTEREST, rescue
from atdiag.core.errors import UserError
from atdiag.core.spec import Network
from atdiag.study.builder import Lab
from atdiag.study.protocol import BASELINE
from tests.studies import arms, differences, fabricated, lab

CLIP = ("no_patch_bias", "pre_norm", "quick_gelu")
BEIT = ("layer_scale", "no_abs_pos", "rel_pos_bias")


@pytest.mark.parametrize(
    ("teacher", "own", "transfer"),
    [("clip_b", CLIP, "copy"), ("clip_b", CLIP, "distill"), ("beitv2_b", BEIT, "distill")],
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


@pytest.fixture
def having(monkeypatch):
    """Make a teacher with these components the only one."""

    def give(*names):
        beit = lab().teacher("beitv2_b")
        changed = beit.network.model_dump() | {"components": names, "layer_scale_init": 0.1}
        teacher = beit.model_copy(update={"network": Network.model_validate(changed)})
        monkeypatch.setattr(Lab, "teacher", lambda self, name: teacher)

    return give


def test_components_that_can_not_matter_under_copy_are_reported_and_not_trained():
    study = rescue(lab(), "beitv2_b", "copy")
    specs = arms(study)
    assert list(specs) == [
        *(BASELINE, "standard + copy", "layer_scale + copy", "no_abs_pos + copy", "native + copy", "native, scratch")
    ]
    # the native student keeps all, since it is the same network from scratch
    assert specs["native + copy"].network == specs["native, scratch"].network
    assert specs["native + copy"].network.components == BEIT
    _, said, control = study.notes
    assert said == (
        "Can't matter under this transfer: rel_pos_bias: it acts on the attention logits, which copy of all blocks "
        "does not compute. Not trained: rel_pos_bias + copy would be the run of standard + copy; "
        "all but layer_scale + copy would be the run of no_abs_pos + copy; "
        "all but no_abs_pos + copy would be the run of layer_scale + copy; "
        "all but rel_pos_bias + copy would be the run of native + copy."
    )
    assert control == "In native, scratch, rel_pos_bias can matter."
    # only arms are left out: those that remain are the same runs as before
    every = rescue(lab("transfer.layers=0-10"), "beitv2_b", "copy")
    assert [arm.name for arm in every.arms if arm.name in specs] == list(specs)
    assert [arms(every)[name].network for name in specs] == [spec.network for spec in specs.values()]


def test_of_a_modern_vit_only_the_gated_mlp_can_matter_under_copy():
    """Rotary positions and q/k norm belong to the map: no arm is trained for them, and all are under distillation."""
    study = rescue(lab(), "eva02_s", "copy")
    assert list(arms(study)) == [BASELINE, "standard + copy", "native + copy", "native, scratch"]
    (note,) = (note for note in study.notes if "Can't matter" in note)
    for name in ("qk_norm", "rope"):
        assert f"{name}: it acts on the attention logits" in note
        assert f"{name} + copy would be the run of standard + copy" in note
        assert f"all but {name} + copy would be the run of native + copy" in note
    assert "swiglu + copy would be the run of native + copy" in note
    assert len(arms(rescue(lab(), "eva02_s", "distill"))) == 10
    assert len(arms(rescue(lab("transfer.layers=top:6"), "eva02_s", "copy"))) == 10


@pytest.mark.parametrize(
    "set_", ["transfer.layers=top:11", "transfer.heads=0,1", "transfer.tensor=q", "transfer.tensor=v"]
)
def test_under_a_partial_copy_every_component_can_matter(set_):
    study = rescue(lab(set_), "beitv2_b", "copy")
    assert len(study.arms) == 4 + 6
    assert len(study.notes) == 1


def test_naming_every_head_equals_copying_all_heads():
    named, all_heads = (rescue(lab(*sets), "beitv2_b", "copy") for sets in (["transfer.heads=0-2"], []))
    assert named.arms == all_heads.arms


@pytest.mark.parametrize(
    ("own", "transfer", "planned"),
    [
        (("layer_scale", "rel_pos_bias"), "copy", []),
        (("layer_scale", "no_k_bias"), "distill", []),
        (("layer_scale", "no_abs_pos", "no_k_bias"), "distill", ["layer_scale", "no_abs_pos"]),
        (("no_k_bias", "rel_pos_bias"), "distill", []),
        (("layer_scale", "rel_pos_bias"), "distill", ["layer_scale", "rel_pos_bias"]),
        (("layer_scale",), "copy", []),
        (
            ("layer_scale", "no_abs_pos", "no_k_bias", "quick_gelu", "rel_pos_bias"),
            "copy",
            [
                *("layer_scale", "no_abs_pos", "quick_gelu"),
                *("all but layer_scale", "all but no_abs_pos", "all but quick_gelu"),
            ],
        ),
    ],
)
def test_arms_that_would_be_the_same_run_are_planned_once(having, own, transfer, planned):
    having(*own)
    study = rescue(lab(), "mine", transfer)
    inner = [arm.name.removesuffix(f" + {transfer}") for arm in study.arms[2:-2]]
    assert inner == planned
    for arm in study.arms[2:-2]:  # planned arms keep their idle components: the run's id does not change
        name = arm.name.removesuffix(f" + {transfer}")
        rest = name.removeprefix("all but ")
        assert arm.specs[0].network.components == ((name,) if rest == name else tuple(n for n in own if n != rest))
    idle = {"copy": {"no_k_bias", "rel_pos_bias"}, "distill": {"no_k_bias"}}[transfer] & {*own}
    same = "; ".join(study.notes[1:]).replace("Not trained:", ";").split("; ")
    for name in own:
        said = f"{name} + {transfer} would be the run of standard + {transfer}"
        assert (said in [part.strip(" .") for part in same]) == (name in idle), study.notes


@pytest.mark.parametrize(
    ("own", "transfer", "instead"),
    [
        (("rel_pos_bias",), "copy", "give `transfer` distill"),
        (("no_k_bias", "rel_pos_bias"), "copy", "give `transfer` distill"),
        (("no_k_bias",), "distill", "choose another teacher"),
        (("no_k_bias",), "copy", "choose another teacher"),
    ],
)
def test_a_teacher_none_of_whose_components_can_matter_is_refused(having, own, transfer, instead):
    having(*own)
    with pytest.raises(UserError, match=f"under {transfer} no native component of .* can change .*: {instead}"):
        rescue(lab(), "mine", transfer)


def test_seeds_are_the_same_in_every_arm():
    study = rescue(lab(seeds=4), "clip_b", "copy")
    assert {tuple(spec.seed.model for spec in arm.specs) for arm in study.arms} == {(0, 1, 2, 3)}
    assert len({spec.id for arm in study.arms for spec in arm.specs}) == 4 * len(study.arms)


def test_a_component_that_the_teacher_lacks_is_refused():
    with pytest.raises(UserError, match=r"clip_b \(mini\) has no component 'prenorm', did you mean 'pre_norm'\?"):
        lab().student(lab().teacher("clip_b"), ["prenorm"])


def test_a_teacher_without_components_is_refused(monkeypatch):
    plain = lab().teacher("clip_b")
    plain = plain.model_copy(update={"name": "deit_b", "network": lab().student(plain)})
    monkeypatch.setattr(Lab, "teacher", lambda self, name: plain)
    with pytest.raises(
        UserError,
        match=r"deit_b \(mini\) has no native component.*'benchmark' for 'rescue'",
    ):
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
