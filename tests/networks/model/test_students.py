"""Students: self-copy, initialisation from scratch, and initialisation from the teacher's weights."""

import copy
import math

import pytest
import torch

from atdiag.core.spec import Init, Network, Transfer
from atdiag.networks.model import components, students
from atdiag.networks.model.vit import ViT
from atdiag.networks.registry import teachers
from atdiag.transfer import methods
from atdiag.transfer.observation import Observation, of_teacher

PLAIN = Network(image_size=12, patch_size=4, channels=1, width=16, depth=2, heads=2, classes=5)
EXTRAS = {"layer_scale_init": 0.1, "registers": 3}
CHOSEN = [name for name, component in components.COMPONENTS.items() if not component.followed]
OTHERS = {"mean_pool", "distillation_token", "gelu_tanh", "quick_gelu", "ln_eps", "no_last_norm", "no_qkv_bias"}
ALL = tuple(name for name in CHOSEN if name not in OTHERS)
"""As many as one network can have."""


def on(*names: str, sources=("drawn", "shipped")):
    """Run the test on these miniatures only, with random weights, the shipped ones, or both."""
    ids = [f"{name}-{source}" for name in names for source in sources]
    return pytest.mark.parametrize("teacher", ids, indirect=True)


def with_components(*names: str) -> Network:
    eps = {"norm_eps": 1e-5} if "ln_eps" in names else {}
    eps |= {"registers": 1} if "distillation_token" in names else {}
    return Network.model_validate({**PLAIN.model_dump(), **EXTRAS, **eps, "components": names})


def assert_same_logits(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


# Self-copy


@torch.no_grad()
def test_a_copy_with_random_q_and_k_needs_only_the_teachers_maps(teacher, images):
    student = ViT(teacher.network)
    student.load_state_dict(teacher.state_dict())
    redrawn = students.build(teacher.network, 7)
    for block, other in zip(student.blocks, redrawn.blocks, strict=True):
        for name, parameter in block.attn.unused_parameters().items():
            parameter.copy_(other.attn.get_parameter(name))
    transfer = Transfer(method="copy", layers=tuple(range(teacher.network.depth)))
    expected = teacher(images)
    shown = teacher.observe(images, of_teacher([transfer]))
    assert_same_logits(methods.forward_test(student, transfer, images, shown), expected)
    assert (methods.forward_test(student, Transfer(), images, Observation()) - expected).abs().max() > 1e-2


# From scratch


def test_a_student_matches_its_teachers_dimensions():
    teacher = teachers.miniature_network("dinov2_reg_s")
    plain, native = teacher.student(), teacher.student(teacher.components, classes=3)
    assert plain.components == () and plain.registers == 0 and plain.layer_scale_init is None
    assert native == teacher.model_copy(update={"classes": 3})
    for field in ("grid", "width", "depth", "heads", "class_token"):
        assert getattr(plain, field) == getattr(native, field) == getattr(teacher, field)
    with pytest.raises(ValueError, match=r"pre_norm: not a native component of this teacher.*layer_scale, registers"):
        teacher.student(("pre_norm",))


def test_initialisation_is_a_function_of_the_seed_alone():
    network = with_components(*ALL)
    torch.manual_seed(1)
    first = students.build(network, 3).state_dict()
    torch.manual_seed(2)
    again, other = students.build(network, 3).state_dict(), students.build(network, 4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("names", [*((name,) for name in CHOSEN), ALL])
def test_students_with_different_components_share_the_rest(names):
    plain = dict(students.build(PLAIN, 5).named_parameters())
    other = dict(students.build(with_components(*names), 5).named_parameters())
    common = plain.keys() & other.keys()
    gone = {"no_abs_pos": 1, "no_patch_bias": 1, "no_k_bias": PLAIN.depth, "mean_pool": 2, "no_last_norm": 2}
    gone |= {"no_qkv_bias": 3 * PLAIN.depth, "no_proj_bias": 3 * PLAIN.depth, "rms_norm": 2 * PLAIN.depth + 1}
    gone |= {"swiglu": 2 * PLAIN.depth}
    if len(names) == 1:
        assert len(plain) - len(common) == gone.get(names[0], 0)
    for name in common:
        if "swiglu" in names and ".mlp." in name:
            continue  # another shape
        if name == "pos_embed":  # class token, patches | patches
            assert torch.equal(plain[name][:, -9:], other[name][:, -9:])
        else:
            assert torch.equal(plain[name], other[name]), name


def test_matrices_are_xavier_uniform_and_the_rest_is_neutral():
    vit = students.build(with_components(*ALL).model_copy(update={"width": 48}), 0)
    for name, parameter in vit.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("cls_token", "reg_token", "pos_embed", "latent", "relative_position_bias_table"):
            assert 0.01 < parameter.std() < 0.03 and abs(parameter.mean()) < 0.01, name
        elif parameter.ndim >= 2:
            bound = math.sqrt(6 / (parameter.shape[0] + parameter[0].numel()))
            assert 0.9 * bound < parameter.abs().max() <= bound, name
            assert abs(parameter.std() / bound - 3**-0.5) < 0.06 and abs(parameter.mean()) < 0.1 * bound, name
        else:
            neutral = 0.0 if leaf.endswith("bias") else 0.1 if leaf == "gamma" else 1.0
            assert torch.equal(parameter, torch.full_like(parameter, neutral)), name


def test_no_two_rows_are_drawn_alike():
    drawn = [p.reshape(-1, p.shape[-1])[:, :4] for p in students.build(PLAIN, 0).parameters() if p.std() > 0]
    rows = torch.cat(drawn)
    assert len(drawn) == 16 and len(rows.unique(dim=0)) == len(rows)


# From the teacher


def started(teacher, names=None, seed=7, **init):
    network = teacher.network.student(teacher.network.components if names is None else names)
    student = students.build(network, seed).eval()
    fresh = copy.deepcopy(student.state_dict())
    return student, fresh, students.start_from(student, teacher, Init(source="teacher", **init))


@torch.no_grad()
def test_a_native_student_that_takes_everything_is_the_teacher(teacher, images):
    student, _, start = started(teacher, head=True)
    assert torch.equal(student(images), teacher(images))
    assert set(start.taken) == set(teacher.state_dict()) and not (start.folded or start.dropped or start.fresh)


@on("dinov2_s", "dinov2_b")
@torch.no_grad()
def test_layer_scale_folds_exactly(teacher, images):
    student, _, start = started(teacher, (), head=True)
    assert_same_logits(student(images), teacher(images))
    assert set(start.folded) == {name for name in teacher.state_dict() if name.endswith("gamma")}
    assert not start.dropped and not start.fresh


@on("dinov2_s")
@torch.no_grad()
def test_layer_scale_can_be_dropped(teacher, images):
    student, _, start = started(teacher, (), head=True, layer_scale="drop")
    assert set(start.dropped) == {name for name in teacher.state_dict() if name.endswith("gamma")}
    assert not start.folded and not start.fresh
    state = teacher.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in student.state_dict().items())
    assert (student(images) - teacher(images)).abs().max() > 1e-2


REINIT = {"attn": ("attn.", "ls1."), "mlp": ("mlp.", "ls2.")}


@on("beitv2_b", "clip_b", "siglip2_b", sources=["drawn"])
@pytest.mark.parametrize("reinit", [(), ("attn",), ("mlp",), ("attn", "mlp")])
@pytest.mark.parametrize("head", [True, False])
def test_only_reinitialised_modules_keep_their_initial_weights(teacher, reinit, head):
    student, fresh, start = started(teacher, reinit=reinit, head=head)
    expected = {
        name
        for name in fresh
        if (name.startswith("head.") and not head)
        or any(name.startswith("blocks.") and f".{part}" in name for module in reinit for part in REINIT[module])
    }
    assert set(start.fresh) == expected
    state = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, fresh[name] if name in expected else state[name]), name


@on("dinov2_s")
def test_layer_scale_does_not_fold_into_a_reinitialised_module(teacher):
    student, fresh, start = started(teacher, (), reinit=("attn",))
    assert {name.split(".")[2] for name in start.folded} == {"ls2"}
    assert {name.split(".")[2] for name in start.dropped} == {"ls1"}
    name = "blocks.3.attn.proj.weight"
    assert torch.equal(student.state_dict()[name], fresh[name])


@on("beitv2_b", "clip_b", "siglip2_b", "dinov2_reg_s", sources=["drawn"])
@pytest.mark.parametrize("init", [{}, {"reinit": ("attn",)}, {"reinit": ("mlp",), "layer_scale": "drop"}])
def test_the_report_names_every_parameter_once(teacher, init):
    network = teacher.network
    for names in ((), network.components, *((name,) for name in network.components)):
        student, fresh, start = started(teacher, names, **init)
        ours, theirs = set(student.state_dict()), set(teacher.state_dict())
        assert sorted([*start.taken, *start.fresh]) == sorted(ours)
        assert sorted([*start.folded, *start.dropped]) == sorted(theirs - ours)
        changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, fresh[name])}
        assert changed <= set(start.taken)


@on("dinov2_reg_s")
def test_positions_line_up_without_registers(teacher):
    student, _, _ = started(teacher, ())
    patches = teacher.pos_embed
    assert torch.equal(student.pos_embed[:, 1:], patches) and not student.pos_embed[:, :1].any()


# From a teacher with components of published networks


PARTS = ("ln_eps", "mean_pool", "no_abs_pos", "no_k_bias", "no_patch_bias", "pre_norm", "registers", "rel_pos_bias")


@pytest.fixture
def published(perturbed):
    """Make a teacher with most components, including those that no miniature has."""
    return perturbed(with_components("layer_scale", *PARTS))


@pytest.fixture
def small_images():
    return torch.rand(4, 1, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("names", [(), ("no_k_bias",), ("mean_pool", "layer_scale"), ("layer_scale", *PARTS)])
@pytest.mark.parametrize("init", [{}, {"reinit": ("attn",)}, {"head": True, "layer_scale": "drop"}])
def test_the_report_names_every_parameter_of_any_teacher_once(published, names, init):
    student, fresh, start = started(published, names, **init)
    ours, theirs = set(student.state_dict()), set(published.state_dict())
    assert sorted([*start.taken, *start.fresh]) == sorted(ours)
    assert sorted([*start.folded, *start.dropped]) == sorted(theirs - ours)
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, fresh[name])}
    assert changed <= set(start.taken)


@pytest.mark.parametrize("missing", ["no_k_bias", "no_patch_bias"])
@torch.no_grad()
def test_a_bias_that_the_teacher_lacks_is_exactly_zero(perturbed, small_images, missing):
    teacher = perturbed(with_components("no_k_bias", "no_patch_bias", "pre_norm"))
    kept = tuple(name for name in teacher.network.components if name != missing)
    student, _, start = started(teacher, kept, head=True)
    assert torch.equal(student(small_images), teacher(small_images))
    if missing == "no_k_bias":
        assert not any(block.attn.k_bias.any() for block in student.blocks) and not start.fresh
        assert set(start.folded) == {f"blocks.{i}.attn.{n}_bias" for i in range(2) for n in "qv"}
        assert {f"blocks.{i}.attn.qkv.bias" for i in range(2)} <= set(start.taken)
    else:
        assert start.fresh == ("patch_embed.proj.bias",) and not start.folded


def test_reinitialised_attention_drops_the_biases_of_q_and_v(perturbed):
    teacher = perturbed(with_components("no_k_bias"))
    _, _, start = started(teacher, (), reinit=("attn",))
    assert {"blocks.0.attn.q_bias", "blocks.1.attn.v_bias"} <= set(start.dropped) and not start.folded
    assert "blocks.0.attn.qkv.bias" in start.fresh


@torch.no_grad()
def test_the_norm_after_a_mean_becomes_the_last_norm(perturbed, small_images):
    teacher = perturbed(with_components("mean_pool"))
    student, _, start = started(teacher, (), head=True)
    assert set(start.folded) == {"fc_norm.weight", "fc_norm.bias"} and not (start.dropped or start.fresh)
    assert torch.equal(student.norm.weight, teacher.fc_norm.weight)
    tokens = teacher.blocks(teacher.embed(small_images))  # the same weights: only what is read from them differs
    expected = teacher.head(teacher.fc_norm(tokens[:, 0]))
    torch.testing.assert_close(student(small_images), expected)


@torch.no_grad()
def test_head_rows_choose_the_teachers_classes(perturbed, small_images):
    teacher = perturbed(with_components("layer_scale"))
    student = students.build(teacher.network.student(("layer_scale",), classes=3), 7).eval()
    start = students.start_from(student, teacher, Init(source="teacher", head=True, head_rows=(4, 0, 2)))
    torch.testing.assert_close(student(small_images), teacher(small_images)[:, [4, 0, 2]], rtol=1e-6, atol=1e-6)
    assert {"head.weight", "head.bias"} <= set(start.taken)
    with pytest.raises(ValueError, match=r"head_rows \[5\] are out of range: the teacher's head has 5 classes"):
        students.start_from(student, teacher, Init(source="teacher", head=True, head_rows=(4, 5, 2)))
    with pytest.raises(ValueError, match=r"head.weight: teacher \(2, 16\), student \(3, 16\)"):
        students.start_from(student, teacher, Init(source="teacher", head=True, head_rows=(4, 1)))


# What a student costs


def test_the_number_of_parameters_is_that_of_the_network():
    for names in ((), ALL, PARTS):
        network = with_components(*names).model_copy(update={"depth": 5})
        assert students.parameters(network) == sum(p.numel() for p in students.build(network, 0).parameters())


@pytest.mark.parametrize("names", [(), ("registers", "rel_pos_bias", "no_k_bias"), ("mean_pool", "layer_scale")])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_flops_count_two_per_multiplication(names, depth):
    network = with_components(*names).model_copy(update={"depth": depth})
    n, c, hidden = network.tokens, network.width, int(network.width * network.mlp_ratio)
    patches = network.grid**2 * c * network.channels * network.patch_size**2
    block = n * c * 3 * c + 2 * n * n * c + n * c * c + 2 * n * c * hidden
    assert students.flops(network) == 2 * (patches + network.depth * block + c * network.classes)


def test_deit_small_costs_what_its_paper_says():
    deit = Network(image_size=224, patch_size=16, width=384, depth=12, heads=6, classes=1000)
    assert students.parameters(deit) == 22_050_664
    assert students.flops(deit) / 2 == pytest.approx(4.6e9, rel=0.01)
