"""Attention transfer in a training loop of one's own, beside atdiag's trainer and the definitions."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn

import atdiag
from atdiag.api.attaching import attach
from atdiag.core.errors import UserError
from atdiag.core.spec import Network, Transfer
from atdiag.networks.model import students
from atdiag.networks.model.vit import ViT
from atdiag.networks.timm import conversion
from tests.api.beside_trainer import NATIVE, assert_step_for_step

SMALL = {"img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}


def small(name="vit_tiny_patch16_224", seed=0, **changed) -> nn.Module:
    """Return a small network of timm's with maps that are far from uniform."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**SMALL, **changed})
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.15)
    for name, parameter in model.named_parameters():
        if "gamma" in name:  # LayerScale
            nn.init.constant_(parameter, 0.5)
    return model


def images(side=32, seed=1) -> torch.Tensor:
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(seed))


# --- beside our trainer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("distill", {"weight": 3.0}),
        ("distill", {"layers": (0, 2), "loss": "mse", "reduce": "mean"}),
        ("distill", {"heads": (1,), "average": "queries", "loss": "jsd"}),
        ("copy", {}),
        ("copy", {"layers": (1, 2), "heads": (0,)}),
        ("copy", {"tensor": "k"}),
    ],
)
def test_a_plain_loop_equals_our_trainer_step_for_step(tmp_path, method, options):
    assert_step_for_step(tmp_path, NATIVE, Transfer(method=method, **{"layers": tuple(range(3)), **options}), options)


# --- against the definitions -----------------------------------------------------------------------------------------

KINDS = {
    "plain": ("vit_tiny_patch16_224", {"patch_size": 8}),
    "clip": ("vit_base_patch16_clip_224", {"patch_size": 8}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 28}),
    "position bias": ("beit_base_patch16_224", {"patch_size": 8}),
    "rope": ("eva02_small_patch14_224", {"img_size": 28, "num_heads": 3}),
    "q/k norm, in parallel": ("vit_base_patch16_xp_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"patch_size": 8}),
    "no class token": ("vit_base_patch16_siglip_224", {"patch_size": 8}),
}


def kind(name: str, seed=0) -> nn.Module:
    model, changed = KINDS[name]
    return small(model, seed, **changed)


def scramble_queries_and_keys(model: nn.Module) -> None:
    """Draw anew all that acts on q and k alone."""
    torch.manual_seed(7)
    with torch.no_grad():
        for block in model.blocks:
            if hasattr(block, "in_proj"):  # MLP, then q, k, v
                width = block.attn_out_proj.in_features
                block.in_proj.weight[-3 * width : -width].normal_(std=0.3)
                continue
            weight = block.attn.qkv.weight
            weight[: 2 * len(weight) // 3].normal_(std=0.3)


@pytest.mark.parametrize("name", KINDS)
def test_copying_gives_the_teachers_output_to_a_student_with_other_queries_and_keys(name):
    teacher = kind(name).eval()
    student = copy.deepcopy(teacher)
    scramble_queries_and_keys(student)
    x = images(teacher.patch_embed.img_size[0])
    before, keys = student(x), list(student.state_dict())
    expected = teacher(x)
    assert (before - expected).abs().max() > 1e-3
    pair = attach(student, teacher, "copy")
    for found in (student(x), pair(x), student.forward_head(student.forward_features(x))):
        assert (found - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    assert pair.loss == 0
    assert list(student.state_dict()) == keys
    assert all(p.requires_grad for p in teacher.parameters())  # the user's module is left as it is
    pair.detach()
    pair.detach()  # a second time does nothing
    assert torch.equal(student(x), before)


@pytest.mark.parametrize("name", KINDS)
def test_the_loss_is_the_cross_entropy_of_the_maps(name):
    """For a student and a teacher whose maps come from timm's own explicit formula."""
    teacher, student = kind(name).eval(), kind(name, seed=3)
    x = images(teacher.patch_embed.img_size[0])

    def maps(model):
        seen, fused = [], []
        places = [getattr(block, "attn", block) for block in model.blocks]
        hooks = [p.attn_drop.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0])) for p in places]
        for place in places:
            fused.append(place.fused_attn)
            place.fused_attn = False
        model(x)
        for hook, place, before in zip(hooks, places, fused, strict=True):
            hook.remove()
            place.fused_attn = before
        return seen

    student.train()
    expected = sum(-(p * q.log()).sum(-1).mean() for p, q in zip(maps(teacher), maps(student), strict=True))
    pair = attach(student, teacher, weight=2.0)
    plainly = student(x)
    assert pair.loss.item() == pytest.approx(2 * expected.item(), rel=1e-4)
    pair.detach()
    assert torch.allclose(student(x), plainly, atol=1e-5)


def test_each_network_sees_the_pixels_under_its_own_normalisation():
    """The student has mean and std 0.5, the teacher ImageNet's: its maps are those of its own normalised images."""
    teacher, student = small("deit_tiny_patch16_224", patch_size=8), small(patch_size=8, seed=2)
    pixels = torch.rand(4, 3, 32, 32)
    mean, std = (torch.tensor(teacher.pretrained_cfg[n]).view(1, 3, 1, 1) for n in ("mean", "std"))
    assert teacher.pretrained_cfg["mean"] != student.pretrained_cfg["mean"]
    ours = conversion.teacher_from(copy.deepcopy(teacher))
    expected = ours.maps(pixels, [2])[2]
    pair = attach(student, teacher)
    found = pair._shown((pixels - 0.5) / 0.5).seen[2].qk
    assert (found.q - expected.q).abs().max() < 1e-4 and (found.k - expected.k).abs().max() < 1e-4
    pair.detach()
    own = attach(student, teacher, mean=teacher.pretrained_cfg["mean"], std=teacher.pretrained_cfg["std"])
    assert torch.equal(own._shown((pixels - mean) / std).seen[2].qk.q, expected.q)


# --- a loop as people write it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["copy", "distill"])
def test_a_loop_in_the_style_of_timms_script(method):
    """timm's optimiser factory, schedule, average of the weights, compilation and autocast: the loss falls."""
    from timm.optim import create_optimizer_v2

    teacher = small(patch_size=8).eval()
    student = timm.create_model("vit_tiny_patch16_224", **SMALL, patch_size=8)
    optimizer = create_optimizer_v2(student, opt="adamw", lr=2e-3, weight_decay=0.05)
    pair = atdiag.attach(student, teacher, method=method)
    average = ModelEmaV3(student, decay=0.5)
    model = torch.compile(student, backend="eager")
    x, labels = images(), torch.tensor([0, 1, 2, 3])
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        loss = F.cross_entropy(output.float(), labels) + pair.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(student)
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(map(torch.isfinite, map(torch.tensor, losses)))
    model.eval()
    with torch.no_grad():
        out = model(x)
        assert pair.loss == 0 and torch.equal(out, student(x))
        averaged = average.module(x)  # has the teacher's maps under copy, too
    fresh = timm.create_model("vit_tiny_patch16_224", **SMALL, patch_size=8).eval()
    fresh.load_state_dict(average.module.state_dict())
    if method == "distill":
        assert torch.allclose(fresh(x), averaged, atol=1e-6)
    else:
        attach(fresh, teacher, "copy")
        assert torch.allclose(fresh(x), averaged, atol=1e-6)
    assert set(student.state_dict()) == set(fresh.state_dict())


def test_a_student_of_ours_and_a_teacher_by_name():
    student = students.build(Network.model_validate({**_clip(), "components": ()}), 0)
    pixels = torch.rand(2, 1, 20, 20)
    own = student(pixels)
    pair = atdiag.attach(student, "clip_b", layers="top:2")
    assert torch.allclose(student(pixels), own) and pair.loss > 0
    pair.detach()
    assert torch.equal(student(pixels), own) and isinstance(student, ViT)


def _clip() -> dict:
    from atdiag.networks.registry import teachers

    return teachers.miniature_network("clip_b").model_dump()


def test_a_student_inside_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        teacher, student = small(patch_size=8).eval(), small(patch_size=8, seed=2)
        alone, x = copy.deepcopy(student), images()
        model = nn.parallel.DistributedDataParallel(student)
        pair, other = attach(model, teacher), attach(alone, teacher)
        (model(x).sum() + pair.loss).backward()
        (alone(x).sum() + other.loss).backward()
        for one, two in zip(student.parameters(), alone.parameters(), strict=True):
            assert torch.allclose(one.grad, two.grad, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_a_student_and_a_teacher_in_the_wrong_order_are_noticed():
    with pytest.raises(UserError, match=r"a str is no student: give attach\(student, teacher\)"):
        attach("deit_b", small())


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        ({"num_heads": 6}, {"teacher_heads": "mean"}, "does not apply: .*; choose repeat"),
        ({"num_heads": 2}, {"teacher_heads": "mean"}, "groups of equal size, and the teacher has 3 heads"),
        ({"num_heads": 2}, {"teacher_heads": "different"}, "on training images: give examples=, 64 of them"),
        ({}, {"teacher_heads": "first"}, "both have 3 heads, each beside its own: leave teacher_heads out"),
        ({"num_heads": 6}, {"teacher_heads": "repaet"}, "unknown rule, did you mean 'repeat'"),
        ({"num_heads": 6}, {"tensor": "q"}, "q can pass only between networks of the same heads"),
        (
            {"depth": 4},
            {"teacher_layers": "top"},
            "^teacher_layers top pairs no block .*, or layers=top:3",
        ),
        ({"patch_size": 16}, {"loss": "logits_mse"}, "resampled over the grid has no logits"),
        ({"patch_size": 16}, {"tensor": "v"}, "v can pass only between networks of the same grid"),
        ({"in_chans": 1}, {}, "the student has a class token, 1 channels"),
        (
            {"class_token": False, "global_pool": "avg"},
            {},
            "the student has no class token, .* the teacher a class token, .* build one .* other's class token",
        ),
        ({"reg_tokens": 2}, {}, "the student has 2 registers"),
        ({"patch_drop_rate": 0.5}, {}, "drops patches"),
        ({"attn_drop_rate": 0.1}, {}, "drops attention weights"),
        ({}, {"mean": (127.5,) * 3}, "mean .* is not that of pixels in .0, 1.: give mean=.0.5,. . 3"),
        ({}, {"std": (0.0,) * 3}, "std .* is not that of pixels"),
        ({}, {"std": (0.5, 0.5)}, "std has 2 values, and the network 3 channels"),
        ({}, {"mean": "imagenet"}, "mean 'imagenet' is no number for each channel"),
        ({}, {"mean": 0.5}, "mean 0.5 is no number for each channel"),
        ({}, {"method": "kopy"}, "method 'kopy', did you mean 'copy'"),
        ({}, {"method": "copy", "weight": 1.0}, "copy has no loss"),
        ({}, {"grid": "rezise"}, "grid 'rezise', did you mean 'resize'"),
        ({}, {"layers": (3,)}, "3 is out of range"),
        ({}, {"teacher_layers": (0, 1)}, "^`teacher_layers`=0,1 names 2 blocks, and 3 of the student's"),
        (
            {},
            {"teacher_layers": [0, 1, "tpo"]},
            "^`teacher_layers`=0,1,tpo: 'tpo' is neither a block nor a rule",
        ),
        ({}, {"teacher_layers": 1}, "^`teacher_layers`=1 names 1 blocks, and 3 of the student's"),
        ({}, {"loss": "cee"}, "loss"),
        (
            {"embed_dim": 96},
            {"tensor": "q"},
            "networks of the same width: teacher 48, student 96",
        ),
    ],
)
def test_what_does_not_fit_is_named(student, options, message):
    with pytest.raises(UserError, match=message):
        attach(small(**{"patch_size": 8, **student}), small(patch_size=8), **options)


def test_other_misuse_is_named():
    student, teacher = small(patch_size=8), small(patch_size=8)
    with pytest.raises(UserError, match="Linear can't be a student: it has no self-attention"):
        attach(nn.Linear(2, 2), teacher)
    with pytest.raises(UserError, match="can't be a teacher"):
        attach(student, nn.Linear(2, 2))
    with pytest.raises(UserError, match="unknown teacher 'klip_b'"):
        attach(student, "klip_b")
    with pytest.raises(UserError, match="is a miniature for scenes of 20 px"):
        attach(student, "clip_b")
    pair = attach(student, teacher, "copy")
    with pytest.raises(RuntimeError, match="run it first"):
        _ = pair.loss
    with pytest.raises(UserError, match="already has a teacher"):
        attach(student, teacher)
    student.set_grad_checkpointing(True)
    with pytest.raises(UserError, match="gradient checkpointing"):
        student(images())
    student.set_grad_checkpointing(False)
    with pytest.raises(UserError, match="images of 40 x 40 px: this pair takes 32 x 32"):
        student(images(40))


def test_blocks_of_different_depths_are_paired():
    teacher, student = small(patch_size=8, depth=4), small(patch_size=8, depth=2, seed=2)
    pair = attach(student, teacher, layers=(0, 1), teacher_layers=(1, 3))
    student(images())
    both = pair.loss.item()
    pair.detach()
    single = []
    for layer, theirs in ((0, 1), (1, 3)):
        pair = attach(student, teacher, layers=(layer,), teacher_layers=(theirs,))
        student(images())
        single.append(pair.loss.item())
        pair.detach()
    assert both == pytest.approx(sum(single), rel=1e-5)
