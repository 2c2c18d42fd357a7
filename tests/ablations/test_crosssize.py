"""The crosssize ablation, and `--student` in the other experiments."""

import pytest

from ablations.benchmark import benchmark
from ablations.crosssize import compared, crosssize
from ablations.layers import layers
from ablations.reinit import reinit
from ablations.rescue import rescue
from ablations.tensors import tensors
from atdiag.core.errors import UserError
from atdiag.study.builder import Lab
from atdiag.study.settings import resolve
from tests.studies import arms
from tests.studies import lab as usual


def lab(student=None, *sets, profile=None) -> Lab:
    return Lab(resolve(profile, sets=sets, seeds=2, environment={}, student=student))


def test_each_size_has_its_own_baseline_and_is_compared_with_the_teachers_own():
    small, own = crosssize(usual(), "dinov2_b").studies
    assert [study.label for study in (small, own)] == ["dinov2_b (mini), student s", "dinov2_b (mini), student b"]
    assert list(arms(own)) == ["scratch", "copy", "distill"]
    assert list(arms(small)) == ["scratch", "copy", "distill", "scratch, b", "copy, b", "distill, b"]
    for name, spec in arms(own).items():
        assert arms(small)[f"{name}, b"].id == spec.id  # trained once
    assert [contrast.name for contrast in small.contrasts] == [compared(m, "s", "b") for m in ("copy", "distill")]
    assert small.contrasts[0].weights == {"copy": 1, "scratch": -1, "copy, b": -1, "scratch, b": 1}
    assert arms(small)["copy"].network.width == 32
    assert arms(small)["copy"].transfer.teacher_heads == "first"
    assert own.options.get("student") is None
    assert any("take the teacher's first 2 of 3" in note for note in small.notes)
    up = crosssize(usual(), "dinov2_s", "b,s").studies
    assert [arms(study)["copy"].transfer.teacher_heads for study in up] == [None, "repeat"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"students": "s,x"}, "`students` 'x': profile mini has the sizes s, b"),
        ({"students": "s,deit_s"}, "s and deit_s are the same size"),
        ({"students": "width=32"}, "`student` takes one by its width"),
        ({"methods": "copi"}, "did you mean 'copy'"),
    ],
)
def test_wrong_sizes_are_refused(asked, message):
    with pytest.raises(UserError, match=message):
        crosssize(usual(), "deit_b", **asked)
    with pytest.raises(UserError, match="crosssize compares several"):
        crosssize(lab("s"), "deit_b")


def test_equal_sizes_are_the_runs_of_before():
    for asked in ("deit_s", "s", "width=32,heads=2", "depth=12", "patch=4,mlp=4"):
        assert layers(lab(asked), teacher="dinov2_s").specs == layers(usual(), teacher="dinov2_s").specs


def test_every_experiment_takes_a_student_and_its_native_components():
    planned = rescue(lab("width=24,depth=6,heads=3,patch=5"), "dinov2_reg_s")
    found = arms(planned)
    sizes = {(spec.network.width, spec.network.depth, spec.network.heads, spec.network.grid) for spec in found.values()}
    assert sizes == {(24, 6, 3, 4)}
    assert found["native + copy"].network.components == ("layer_scale", "registers")
    assert found["native + copy"].transfer.teacher_layers == (1, 3, 5, 7, 9, 11)
    assert found["native + copy"].transfer.teacher_heads == "repeat"
    assert found["native, scratch"].teacher is None
    assert any("RESAMPLED to the student's 4 x 4" in note for note in planned.notes)
    assert planned.options["student"] == "width=24,depth=6,heads=3,patch=5"
    assert planned.reference.specs[0].network == planned.teacher.network


@pytest.mark.parametrize(
    ("rule", "layers_", "expected"),
    [
        ("top", "null", (6, 7, 8, 9, 10, 11)),
        ("bottom", "null", ()),
        ("uniform", "null", (1, 3, 5, 7, 9, 11)),
        ("[0,0,2,2,4,4]", "null", (0, 0, 2, 2, 4, 4)),
        ("[9,11]", "[2,5]", (9, 11)),
    ],
)
def test_blocks_are_paired_by_a_rule_or_one_by_one(rule, layers_, expected):
    sets = (f"transfer.teacher_layers={rule}", f"transfer.layers={layers_}")
    study = benchmark(lab("width=32,depth=6", *sets), "deit_s", "copy")
    assert arms(study)["copy"].transfer.teacher_layers == expected


@pytest.mark.parametrize(
    ("student", "sets", "message"),
    [
        ("depth=14", ["transfer.teacher_layers=top"], r"transfer.teacher_layers top pairs no block .* with block 0"),
        ("depth=6", ["transfer.teacher_layers=[1,2]"], "names 2 blocks, and 6 of the student's"),
        ("depth=2", ["transfer.teacher_layers=[1,12]"], "12 is out of range.*0 to 11"),
        ("depth=2", ["transfer.teacher_layers=topp"], "did you mean 'top'"),
        ("heads=1", ["transfer.teacher_heads=repeat"], "choose first, different or mean"),
        ("width=48,heads=3", ["transfer.teacher_heads=mean"], "does not apply.*choose repeat"),
        ("heads=1", ["transfer.tensor=q"], "q can pass only between networks of the same heads"),
        ("width=48", ["transfer.tensor=v"], "v can pass only between networks of the same width"),
    ],
)
def test_what_can_not_be_paired_is_refused(student, sets, message):
    with pytest.raises(UserError, match=message):
        benchmark(lab(student, *sets), "deit_s", "copy")


def test_heads_that_do_not_divide_are_not_averaged():
    with pytest.raises(UserError, match=r"groups of equal size.*the teacher has 3 heads, the student 2"):
        benchmark(lab("s", "transfer.teacher_heads=mean"), "deit_b", "copy")
    with pytest.raises(UserError, match="a map that is resampled over the grid has no logits"):
        benchmark(lab("patch=5", "transfer.loss=logits_mse"), "deit_b", "distill")
    with pytest.raises(UserError, match="unknown rule, did you mean 'mean'"):
        lab("s", "transfer.teacher_heads=meen")


def test_only_maps_pass_between_sizes():
    with pytest.raises(UserError, match=r"q, k and v pass only .* than deit_b \(mini\): leave `student` out"):
        tensors(lab("s"), "deit_b")
    assert list(arms(tensors(lab("s"), "deit_b", tensors="map"))) == ["scratch", "copy map", "distill map"]
    assert len(arms(tensors(lab("depth=6"), "deit_b"))) == 9  # blocks are paired, whatever passes


def test_start_weights_do_not_pass_between_sizes():
    with pytest.raises(UserError, match=r"can't start from the weights of deit_b .*\(width 32 for the teacher's 48"):
        reinit(lab("s"), "attn", "deit_b")
    with pytest.raises(UserError, match=r"finetune trains the teacher itself.*give `methods` copy,distill"):
        benchmark(lab("s"), "deit_b")


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("deit_ss", "did you mean 'deit_s'"),
        ("widht=32", "unknown size 'widht', did you mean 'width'"),
        ("width=32,width=16", "width is given twice"),
        ("width=0", "not a whole number above 0"),
        ("width=32,heads", "'heads' is not NAME=NUMBER"),
        ("l", "profile mini has the sizes s, b"),
        ("6", "profile mini has the sizes s, b"),
        ("", "`student` is empty"),
        ("timm:vit_smal_patch16_224", "did you mean 'vit_small_patch16_224'"),
        ("hub", "is a specimen"),
    ],
)
def test_wrong_students_are_refused(student, message):
    with pytest.raises(UserError, match=message):
        lab(student)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("width=33", "width 33 is not a multiple of heads 2: give a width that its heads divide"),
        ("patch=3", "patches of 3 px do not divide images of 20 px"),
    ],
)
def test_students_that_can_not_be_built_are_refused(student, message):
    with pytest.raises(UserError, match=message):
        benchmark(lab(student), "deit_s", "copy")


def test_published_sizes_meet_on_one_grid_at_their_own_resolutions():
    from atdiag.networks.registry import sizes

    other = lab("deit_s").settings.student  # the miniature's
    assert other.patch_size == 4
    found = sizes.network("deit_s", "paper")
    assert (found.width, found.depth, found.heads, found.patch_size) == (384, 12, 6, 16)
    from atdiag.study.student import parse

    student = parse("timm:vit_small_patch16_224", "paper")
    assert student.teachers_image_size(224, 14) == 196
    assert parse("s", "paper").teachers_image_size(224, 14) == 224  # no patch of its own: the teacher's
