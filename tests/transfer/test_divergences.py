"""Values and gradients of every loss against its definition in float64."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from atdiag.core.spec import losses
from atdiag.transfer import divergences, ops
from atdiag.transfer.ops import QK, Averaged
from tests.transfer.formulas import KNOWN, changed, leaves, make, tensors, the_loss, the_map, value_and_gradients

BOTH = {"teacher_bias": True, "student_bias": True}
NEITHER = {"teacher_bias": False, "student_bias": False}
LONG = {**KNOWN, **BOTH, "heads": 2, "batch": 1, "tokens": 600}  # more than one block for each head
LONG_PLAIN = {**LONG, **NEITHER}


@st.composite
def pairs(draw):
    """Draw sizes of a teacher's and a student's map on the same tokens."""
    small = st.integers(1, 4)
    sizes = {name: draw(small) for name in ("batch", "heads")}
    sizes |= {name: draw(st.integers(1, 9)) for name in ("tokens", "teacher_width", "student_width")}
    sizes |= {name: draw(st.booleans()) for name in BOTH}
    return sizes | {"scale": draw(st.sampled_from([0.05, 0.3, 0.5, 2.0])), "seed": draw(st.integers(0, 999))}


def ours(name: str, way: str | None):
    loss = losses.function(name)
    return loss if way is None else lambda teacher, student: loss(teacher, student, way)


WAYS = [(name, way) for name in ("ce", "kl", "mse") for way in ("blocks", "sdpa")]
WAYS += [("jsd", None), ("l1", None), ("logits_mse", None)]
EACH = pytest.mark.parametrize(("name", "way"), WAYS, ids=lambda x: x or "")
OF_AVERAGES = pytest.mark.parametrize("name", ["ce", "kl", "mse", "jsd", "l1"])


def assert_all_close(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def assert_is_the_loss(name, way, teacher, student, tolerance):
    student, exact = leaves(student), leaves(student, torch.float64)
    found = value_and_gradients(ours(name, way)(teacher, student), tensors(student))
    expected = value_and_gradients(the_loss(name, teacher, exact), tensors(exact))
    assert_all_close(found, expected, tolerance)


def test_the_table_has_the_losses_of_the_spec():
    assert {name: losses.function(name) for name in losses.MAP_LOSSES} == {
        "ce": divergences.cross_entropy,
        **{name: getattr(divergences, name) for name in ("kl", "mse", "jsd", "l1", "logits_mse")},
    }


@EACH
@settings(max_examples=20)
@given(sizes=pairs())
@example(LONG)
@example(LONG_PLAIN)
def test_values_and_gradients_are_those_of_the_definition(name, way, sizes):
    assert_is_the_loss(name, way, *make(sizes), 2e-5)


@EACH
@settings(max_examples=20)
@given(sizes=pairs())
@example(LONG_PLAIN)
def test_they_are_exact_in_float64(name, way, sizes):
    assert_is_the_loss(name, way, *make(sizes, torch.float64), 1e-11)


@OF_AVERAGES
@settings(max_examples=20)
@given(sizes=pairs(), single=st.sets(st.sampled_from([0, 1, 2])))
@example(LONG, {0})
@example(LONG, {1, 2})
def test_the_teacher_may_be_an_average(name, sizes, single):
    teacher, student = make(sizes)
    p = the_map(teacher).float()
    for dim in single:
        p = p.mean(dim, keepdim=True)
    assert_is_the_loss(name, None, Averaged(p), student, 2e-5)


@EACH
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(name, way, bias):
    teacher, student = make({**KNOWN, "tokens": 5, "teacher_bias": True, "student_bias": bias}, torch.float64)

    def loss(q, k, b=None):
        return ours(name, way)(teacher, QK(q, k, student.scale, b))

    assert gradcheck(loss, tensors(leaves(student)))


@EACH
def test_a_subset_of_heads(name, way):
    teacher, student = make({**KNOWN, **BOTH, "tokens": 6}, torch.float64)
    student, heads = leaves(student), torch.tensor([0, 2])
    found = ours(name, way)(teacher.select_heads(heads), student.select_heads(heads))
    expected = the_loss(name, teacher.select_heads(heads), student.select_heads(heads))
    gradients = value_and_gradients(found, tensors(student))
    assert_all_close(gradients, value_and_gradients(expected, tensors(student)), 1e-11)
    assert gradients[1][:, 1].abs().max() == 0 != gradients[1][:, 0].abs().max()


def test_logit_mse_by_forming_the_logits_and_without():
    """On either side of the length from which it pays not to form them."""
    for tokens in (24, 25, 40):
        for biases in ({**BOTH}, {**NEITHER}, {**BOTH, "student_bias": False}, {**BOTH, "teacher_bias": False}):
            teacher, student = make({**KNOWN, **biases, "tokens": tokens})
            assert_is_the_loss("logits_mse", None, teacher, student, 1e-6)


@EACH
def test_equal_maps_have_no_gradient_and_none_reaches_the_teacher(name, way):
    teacher, _ = make({**KNOWN, "tokens": 7, "teacher_bias": True, "student_bias": False}, torch.float64)
    teacher, copy = leaves(teacher), leaves(teacher)
    loss, *gradients = value_and_gradients(ours(name, way)(teacher, copy), tensors(copy))
    least = divergences.entropy(teacher) if name == "ce" else torch.zeros(())
    torch.testing.assert_close(loss, least.double(), rtol=1e-12, atol=1e-14)
    assert all(gradient.abs().max() < 1e-14 for gradient in gradients)
    moved = leaves(copy._replace(q=copy.q + 0.1))
    ours(name, way)(teacher, moved).backward()
    assert all(x.grad is None for x in tensors(teacher))
    assert moved.q.grad.abs().max() > 1e-5


@pytest.mark.parametrize("way", ["blocks", "sdpa"])
@settings(max_examples=20)
@given(sizes=pairs())
def test_kl_is_cross_entropy_minus_entropy_with_the_same_gradients(way, sizes):
    teacher, student = make(sizes, torch.float64)
    student = leaves(student)
    ce, *ce_gradients = value_and_gradients(ours("ce", way)(teacher, student), tensors(student))
    kl, *kl_gradients = value_and_gradients(ours("kl", way)(teacher, student), tensors(student))
    torch.testing.assert_close(kl, ce - divergences.entropy(teacher), rtol=1e-10, atol=1e-12)
    assert_all_close(kl_gradients, ce_gradients, 1e-12)
    assert kl > -1e-12


@settings(max_examples=20)
@given(sizes=pairs())
@example(LONG)
def test_entropy_is_that_of_the_map(sizes):
    teacher, _ = make(sizes)
    p = the_map(teacher)
    expected = -(p * p.log()).sum(-1).mean()
    for found in (teacher, leaves(teacher), Averaged(p)):
        torch.testing.assert_close(divergences.entropy(found).double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(divergences.entropy(one := leaves(teacher)), [one.q])
    (exact,) = torch.autograd.grad(-(the_map(one) * the_map(one).log()).sum(-1).mean(), [one.q])
    assert_all_close([gradient], [exact], 1e-5)


@OF_AVERAGES
def test_maps_with_nothing_in_common_and_zeros_in_the_teachers(name):
    sure = 60.0 * torch.eye(2)
    student = leaves(QK(sure.view(1, 1, 2, 2), torch.eye(2).view(1, 1, 2, 2), 1.0))
    teacher = Averaged(torch.eye(2).flip(0).view(1, 1, 2, 2))
    loss, *gradients = value_and_gradients(ours(name, None)(teacher, student), tensors(student))
    torch.testing.assert_close(loss, torch.tensor({"ce": 60.0, "kl": 60.0, "mse": 2.0, "jsd": 1.0, "l1": 2.0}[name]))
    assert all(gradient.isfinite().all() for gradient in gradients)


def in_bf16_with_offset_keys(offset: float, bias: bool) -> QK:
    sizes = {**KNOWN, "tokens": 40, "teacher_width": 16, "teacher_bias": bias, "student_bias": False}
    direction = torch.randn(16, generator=torch.Generator().manual_seed(1))
    teacher, _ = make(sizes)
    return changed(teacher._replace(k=teacher.k + offset * direction), Tensor.bfloat16)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("offset", [0.0, 24.0])
@pytest.mark.parametrize("bias", [True, False])
@EACH
def test_bf16_gradients_survive_near_agreement_with_offset_keys(name, way, offset, bias, autocast):
    """Maps that nearly agree, keys far from zero: the gradient is a small difference of large numbers."""
    teacher = in_bf16_with_offset_keys(offset, bias)
    nudge = 0.2 * torch.randn(teacher.q.shape, generator=torch.Generator().manual_seed(2))
    student = leaves(teacher._replace(q=(teacher.q.float() + nudge).bfloat16()))
    exact = leaves(student, torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = ours(name, way)(teacher, student)
    found = value_and_gradients(loss, tensors(student))
    expected = value_and_gradients(the_loss(name, teacher, exact), tensors(exact))
    assert [x.dtype for x in found] == [torch.float32] + len(tensors(student)) * [torch.bfloat16]
    # SDPA subtracts attention outputs that are already rounded to bf16.
    bound = 0.05 if way == "sdpa" and not bias else 0.004
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert (one.double() - other).norm() < bound * other.norm()
    assert (found[0] - expected[0]).abs() < (0.01 if way == "sdpa" and not bias else 1e-4) * max(expected[0], 1)


@EACH
@settings(max_examples=20)
@given(sizes=pairs())
@example(LONG)
@example(LONG_PLAIN)
def test_bf16_stays_close_to_float32(name, way, sizes):
    """For maps that differ: relative to the gradient's norm, and apart from the rounding of q and k themselves."""
    teacher, student = (changed(map, Tensor.bfloat16) for map in make(sizes))
    student, wide = leaves(student), leaves(student, torch.float32)
    found = value_and_gradients(ours(name, way)(teacher, student), tensors(student))
    expected = value_and_gradients(
        ours(name, "blocks" if way == "sdpa" else way)(changed(teacher, Tensor.float), wide), tensors(wide)
    )
    torch.testing.assert_close(found[0], expected[0], rtol=0.01, atol=0.01)
    rows = student.q.shape[:-1].numel()
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert (one.float() - other).norm() <= 0.02 * other.norm() + 0.02 / rows**0.5


@EACH
def test_float16_gradients_under_a_scaled_loss(name, way):
    """As with a GradScaler: gradients of a mean are too small for float16, scaled ones are not."""
    teacher, student = (changed(map, Tensor.half) for map in make({**LONG_PLAIN, "heads": 4}))
    student, exact = leaves(student), leaves(student, torch.float64)
    found = torch.autograd.grad(ours(name, way)(teacher, student), tensors(student), torch.tensor(65536.0))
    expected = torch.autograd.grad(the_loss(name, teacher, exact) * 65536.0, tensors(exact))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float16
        assert (one.double() - other).norm() < 0.02 * other.norm()


class Watch(TorchDispatchMode):
    """Record which operations run, forward and backward, and the largest tensor that any of them makes."""

    def __init__(self):
        super().__init__()
        self.ran, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ran.add(func.overloadpacket.__name__)
        made = [x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        self.largest = max(self.largest, *made, 0)
        return out


@pytest.mark.parametrize("biases", [BOTH, NEITHER, {**BOTH, "student_bias": False}], ids=["both", "neither", "teacher"])
@EACH
def test_no_map_is_stored(name, way, biases):
    sizes = {**KNOWN, **biases, "tokens": 1024, "heads": 2}
    teacher, student = make(sizes)
    with Watch() as seen:
        ours(name, way)(teacher, leaves(student)).backward()
    whole = sizes["batch"] * sizes["heads"] * 1024 * 1024
    biased = sizes["heads"] * 1024 * 1024 if any(biases.values()) else 0
    assert seen.largest <= max(ops._BLOCK_CPU, biased) < whole
    if way == "sdpa" and not biases["student_bias"]:
        assert "_scaled_dot_product_flash_attention_for_cpu" in seen.ran
        assert "_scaled_dot_product_flash_attention_for_cpu_backward" in seen.ran
        if name != "kl":  # its constant, the teacher's entropy, is computed in blocks
            assert not {"_softmax", "_log_softmax", "bmm"} & seen.ran
    with Watch() as seen:
        the_loss(name, teacher, student)
    assert seen.largest == whole  # the watch detects stored maps


@EACH
def test_no_operation_depends_on_a_tensors_value(name, way):
    """Reading or branching on a number would fail on tensors without data."""
    with FakeTensorMode():
        teacher, student = make({**KNOWN, **NEITHER, "tokens": 30})
        student = leaves(student)
        ours(name, way)(teacher, student).backward()
        assert student.q.grad.shape == student.q.shape
        with pytest.raises(DataDependentOutputException):
            student.q.sum().item()


@EACH
def test_values_alone_cost_no_gradients(name, way):
    teacher, student = make({**LONG_PLAIN})
    expected = ours(name, way)(teacher, leaves(student))
    with torch.no_grad(), Watch() as seen:
        found = ours(name, way)(teacher, leaves(student))
    torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-6)
    assert not found.requires_grad and "_scaled_dot_product_flash_attention_for_cpu_backward" not in seen.ran


def test_maps_that_do_not_line_up_are_refused():
    teacher, student = make({**KNOWN, **NEITHER, "tokens": 6})
    for wrong in (
        teacher.select(torch.arange(5)),
        teacher.select_heads(torch.tensor([0])),
        Averaged(torch.ones(2, 2, 6, 6)),
    ):
        with pytest.raises(ValueError, match="line up"):
            divergences.cross_entropy(wrong, student)
    with pytest.raises(TypeError, match="no logits"):
        divergences.logits_mse(Averaged(torch.ones(1, 1, 1, 6) / 6), student)


def test_maps_are_formed_in_blocks_only_on_a_cpu():
    assert divergences.preferred(torch.device("cpu")) == "blocks"
    assert divergences.preferred(torch.device("cuda")) in ("kernels", "sdpa")
    assert divergences.preferred(torch.device("mps")) == "sdpa"
    teacher, student = make({**KNOWN, **NEITHER, "tokens": 6})
    own = {"q": student.q.clone().requires_grad_(), "k": student.k}
    sdpa = "_scaled_dot_product_flash_attention_for_cpu"
    for map, way, meant in (
        (teacher, "sdpa", True),
        (teacher, None, False),
        (Averaged(the_map(teacher)), "sdpa", False),
    ):
        with Watch() as seen:
            divergences.cross_entropy(map, student._replace(**own), way)
        assert (sdpa in seen.ran) == meant
