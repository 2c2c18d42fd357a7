"""A teacher of another size in a training loop of one's own, by the rules of ``--student``."""

import pytest
import timm
import torch
from torch import nn

import atdiag
from atdiag.api.attaching import attach
from atdiag.core.spec import Network, Transfer
from atdiag.transfer import ops, sizes
from tests.api.beside_trainer import NATIVE, assert_step_for_step, plain


def other(**changed) -> Network:
    return Network.model_validate({**NATIVE.model_dump(), **changed})


@pytest.mark.parametrize(
    ("method", "teacher", "options", "expected"),
    [
        ("distill", {"depth": 6, "heads": 4, "width": 24}, {}, {"teacher_layers": (1, 3, 5), "teacher_heads": "first"}),
        (
            "copy",
            {"depth": 4, "heads": 4},
            {"teacher_layers": "top", "teacher_heads": "mean"},
            {"teacher_layers": (1, 2, 3), "teacher_heads": "mean"},
        ),
        ("distill", {"heads": 1, "depth": 2}, {}, {"teacher_layers": (0, 1, 1), "teacher_heads": "repeat"}),
        ("distill", {"heads": 4}, {"teacher_heads": "different"}, {"teacher_heads": "different"}),
        ("copy", {"patch_size": 5}, {}, {}),  # resampled from 4 x 4 to 5 x 5 patches
        ("distill", {"image_size": 15, "patch_size": 3}, {"loss": "mse"}, {}),  # the same crop at 15 px: 5 x 5 patches
        ("copy", {"image_size": 16, "patch_size": 4, "heads": 4}, {"teacher_heads": "mean"}, {"teacher_heads": "mean"}),
    ],
)
def test_a_plain_loop_equals_our_trainer_step_for_step(tmp_path, method, teacher, options, expected):
    ours = {name: value for name, value in options.items() if name == "loss"}
    transfer = Transfer(method=method, layers=(0, 1, 2), **ours, **expected)
    assert_step_for_step(tmp_path, other(**teacher), transfer, options)


def test_the_maps_that_a_timm_student_is_given_are_those_of_the_formula():
    """Head i of the student takes the mean of two, and P_s = A P_t C."""
    torch.manual_seed(0)
    sizes_ = {"img_size": 32, "num_classes": 7, "depth": 2}
    teacher = timm.create_model("vit_tiny_patch16_224", **sizes_, embed_dim=48, num_heads=4, patch_size=8)
    student = timm.create_model("vit_tiny_patch16_224", **sizes_, embed_dim=24, num_heads=2, patch_size=16)
    for module in teacher.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
    pair = attach(student, teacher, "copy", teacher_heads="mean")
    images = torch.randn(3, 3, 32, 32)
    found = pair._shown(images).seen
    for block, seen in pair.teacher.maps(images, (0, 1)).items():
        p = ops.logits(seen).softmax(-1)
        a, c = sizes.regridding(4, 2, 1, torch.device("cpu"))
        expected = a @ torch.stack([p[:, :2].mean(1), p[:, 2:].mean(1)], 1) @ c
        assert torch.allclose(found[block].map.p, expected, atol=1e-6)
        assert torch.allclose(found[block].map.p.sum(-1), torch.ones(()), atol=1e-5)
    student(images).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_a_named_teacher_of_another_size():
    student = plain()  # 16 x 3 blocks x 2 heads; the miniature has 48 x 12 x 3
    pair = atdiag.attach(student, "deit_b", "distill", mean=(0.5,), std=(0.5,), teacher_layers="bottom")
    assert (pair.transfer.sources, pair.transfer.teacher_heads) == ((0, 1, 2), "first")
    student.train()(torch.randn(2, 1, 20, 20))
    assert pair.loss > 0


def test_a_teacher_for_images_of_any_size_sees_those_of_the_students_grid():
    torch.manual_seed(0)
    teacher = timm.create_model("naflexvit_base_patch16_gap", img_size=64, embed_dim=48, depth=2, num_heads=3).eval()
    student = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, class_token=False, global_pool="avg"
    )
    pair = attach(student, teacher)
    assert (pair.teacher.network.image_size, pair.teacher.network.grid) == (64, 4)  # 4 x 4 patches of 16 px
    student.train()(torch.randn(2, 3, 32, 32))
    assert pair.loss > 0
    pair.detach()
    assert attach(student, teacher, grid="resample").teacher.network.grid == 2
