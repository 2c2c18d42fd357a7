"""What each transfer method makes of a student and its teacher's maps."""

import pytest
import torch

from atdiag.networks import students
from atdiag.spec import Network, Transfer
from atdiag.transfer import method, ops

SMALL = Network(image_size=8, patch_size=4, channels=1, width=8, depth=3, heads=2, classes=4)
NONE, COPY, DISTILL = Transfer(), Transfer(method="copy", layers=(0, 2)), Transfer(method="distill", layers=(0, 2))


@pytest.fixture
def student():
    return students.build(SMALL, 0)


@pytest.fixture
def images():
    return torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def maps(images):
    return students.build(SMALL, 1).maps(images, range(3))


def test_none_is_the_student_alone(student, images, maps):
    logits, loss = method.forward(student, NONE, images, maps)
    assert loss is None and torch.equal(logits, student(images))


def test_copy_gives_the_teachers_maps_to_its_layers_alone(student, images, maps):
    logits, loss = method.forward(student, COPY, images, maps)
    assert loss is None and not torch.allclose(logits, student(images), atol=1e-3)
    assert torch.equal(logits, student(images, given={0: maps[0], 2: maps[2]}))
    assert torch.equal(logits, method.forward_test(student, COPY, images, maps))
    logits.sum().backward()
    untouched = [all(p.grad is None for p in block.attn.qk_parameters().values()) for block in student.blocks]
    assert untouched == [True, False, True]


@pytest.mark.parametrize("weight", [3.0, 0.5])
def test_distill_adds_the_weighted_sum_of_cross_entropies(student, images, maps, weight):
    transfer = DISTILL.model_copy(update={"weight": weight})
    logits, loss = method.forward(student, transfer, images, maps)
    own = student.maps(images, range(3))
    assert torch.equal(logits, student(images))
    torch.testing.assert_close(loss, weight * sum(ops.cross_entropy(maps[i], own[i]) for i in (0, 2)))
    assert torch.equal(method.forward_test(student, transfer, images, {}), student(images))


def test_the_distillation_loss_falls_when_followed(student, images, maps):
    optimizer, losses = torch.optim.SGD(student.parameters(), lr=0.5), []
    for _ in range(10):
        optimizer.zero_grad()
        _, loss = method.forward(student, DISTILL, images, maps)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    floor = DISTILL.weight * sum(ops.entropy(maps[i]).item() for i in (0, 2))
    assert floor < losses[-1] < losses[0]


def test_only_copy_needs_the_teacher_at_test_time():
    assert [method.layers_at_test(t) for t in (NONE, COPY, DISTILL)] == [(), (0, 2), ()]


def test_keep_reaches_the_student(student, images, maps):
    keep = torch.zeros(3, 2, 3, 1, 1)
    for transfer in (NONE, COPY, DISTILL):
        assert torch.equal(method.forward(student, transfer, images, maps, keep)[0], student(images, keep=keep))
