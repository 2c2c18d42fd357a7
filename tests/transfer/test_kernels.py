"""The Triton kernels of the losses against the formulas: on a GPU where there is one, else in Triton's interpreter."""

import math

import pytest
import torch
from torch import Tensor

from atdiag.transfer import divergences
from atdiag.transfer.ops import QK
from tests.transfer.formulas import KNOWN, changed, leaves, make, tensors, the_loss, value_and_gradients

pytest.importorskip("triton", reason="PyTorch came without Triton")

from atdiag.transfer import kernels  # conftest has chosen the interpreter where there is no GPU

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NATIVE = DEVICE.type == "cuda"
SMALL = kernels.Tiles(16, 16, 4, 1)
EACH = pytest.mark.parametrize("name", kernels.LOSSES)
BIASES = pytest.mark.parametrize("both", [False, True], ids=["plain", "biased"])


def sizes(own: bool = False, theirs: bool = False, tokens: int = 18, **others: int) -> dict:
    """Few images and heads: the interpreter takes a second for a dozen tiles."""
    small = {**KNOWN, "batch": 1, "heads": 2, "tokens": tokens, "student_bias": own, "teacher_bias": theirs}
    return small | others


def there(qk: QK) -> QK:
    return changed(qk, lambda x: x.to(DEVICE))


def by_kernels(name: str, teacher: QK, student: QK, wanted: bool = True) -> list[Tensor]:
    """Mean loss and its gradients, as the autograd function makes them of the kernels' sums."""
    small = None if NATIVE else lambda *_: SMALL
    given = (name, there(teacher), there(student), wanted)
    value, *grads = kernels.sums(*given) if small is None else kernels.sums(*given, small)
    factors = (student.scale, 1.0, 1.0)
    rows = student.q.shape[:-1].numel()
    found = [g.double() * f / rows for g, f in zip(grads, factors, strict=True) if g is not None]
    return [one.cpu() for one in (value / rows, *found)]


@EACH
@BIASES
def test_values_and_gradients_are_those_of_the_definition(name, both):
    """More tokens than fit in a tile, head widths that differ and are no power of two."""
    teacher, student = make(sizes(both, both))
    exact = leaves(student, torch.float64)
    expected = value_and_gradients(the_loss(name, teacher, exact), tensors(exact))
    found = by_kernels(name, teacher, student)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-6)
    (alone,) = by_kernels(name, teacher, student, wanted=False)
    torch.testing.assert_close(alone, found[0], rtol=1e-6, atol=1e-7)


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_sixteen_bits_lose_what_rounding_loses(name, dtype):
    if dtype == torch.bfloat16 and not NATIVE:
        pytest.skip("Triton's interpreter multiplies bf16 as integers")
    teacher, student = (changed(map, lambda x: x.to(dtype)) for map in make(sizes()))
    exact = leaves(student, torch.float64)
    value, *expected = value_and_gradients(the_loss(name, teacher, exact), tensors(exact))
    found, *gradients = by_kernels(name, teacher, student)
    torch.testing.assert_close(found.double(), value, rtol=1e-4, atol=1e-4)
    for one, other in zip(gradients, expected, strict=True):
        assert (one - other).norm() < 4 * torch.finfo(dtype).eps * other.norm()


@EACH
def test_an_own_copy_is_pulled_nowhere(name):
    teacher, _ = make(sizes())
    value, *gradients = by_kernels(name, teacher, teacher)
    least = divergences.entropy(teacher).double() if name == "ce" else torch.zeros(())
    torch.testing.assert_close(value.double(), least.double(), rtol=1e-6, atol=1e-6)
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients)


@EACH
def test_maps_with_nothing_in_common(name):
    sure = 60.0 * torch.eye(2)
    student = QK(sure.view(1, 1, 2, 2), torch.eye(2).view(1, 1, 2, 2), 1.0)
    teacher = QK(sure.flip(0).view(1, 1, 2, 2).contiguous(), torch.eye(2).view(1, 1, 2, 2), 1.0)
    value, *gradients = by_kernels(name, teacher, student)
    assert math.isclose(value.item(), {"ce": 60.0, "kl": 60.0, "mse": 2.0, "jsd": 1.0, "l1": 2.0}[name], rel_tol=1e-6)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("names", ["bnhd", "bhnd", "hbnd"])
def test_any_strides(names):
    """Queries and keys as views of one projection, contiguous, or with the images inside."""
    teacher, student = make(sizes(tokens=5, batch=2, teacher_width=8))
    order = [names.index(one) for one in "bhnd"]
    laid = {
        side: changed(map, lambda x: x.permute(["bhnd".index(one) for one in names]).contiguous().permute(order))
        for side, map in (("teacher", teacher), ("student", student))
    }
    mixed = laid["student"]._replace(k=student.k.contiguous())
    for own in (laid["student"], mixed):
        for one, other in zip(by_kernels("ce", laid["teacher"], own), by_kernels("ce", teacher, student), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_two_tensors_times_a_number_each():
    a, b = (torch.randn(3, 5, 7, 11, device=DEVICE) for _ in range(2))
    by_a, by_b = (torch.tensor(x, device=DEVICE) for x in (0.3, -2.0))
    for one, other in zip(kernels.times(a, b, by_a, by_b), (a * by_a, b * by_b), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=0)


def test_what_the_kernels_cannot_take_goes_another_way():
    teacher, student = make(sizes())
    assert kernels.able(there(teacher), there(student)) == NATIVE
    for wrong in (
        changed(there(student), Tensor.double),
        changed(there(student), Tensor.half),  # not the teacher's type
        there(student)._replace(q=student.q[:, :, :5].to(DEVICE)),
        QK(*(torch.zeros(1, 1, 4, 2 * kernels.WIDEST, device=DEVICE) for _ in range(2)), 1.0),
    ):
        assert not kernels.able(there(teacher), wrong)


@pytest.mark.cuda
@pytest.mark.skipif(not NATIVE, reason="needs CUDA")
@EACH
@BIASES
def test_the_losses_use_the_kernels_on_a_gpu(name, both, monkeypatch):
    teacher, student = make(sizes(both, both, tokens=197))
    exact = leaves(student, torch.float64)
    expected = value_and_gradients(the_loss(name, teacher, exact), tensors(exact))
    ran, sums = [], kernels.sums
    monkeypatch.setattr(kernels, "sums", lambda *given: ran.append(given[0]) or sums(*given))
    student = leaves(there(student))
    loss = getattr(divergences, {"ce": "cross_entropy"}.get(name, name))
    found = value_and_gradients(loss(there(teacher), student), tensors(student))
    assert ran == [name]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double().cpu(), other, rtol=2e-5, atol=2e-6)
