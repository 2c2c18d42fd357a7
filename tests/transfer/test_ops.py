"""The fused identities against formulas written out here in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from atdiag.transfer import ops
from atdiag.transfer.ops import QK

PATHS = pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "fused"])
KNOWN = {"batch": 2, "heads": 3, "teacher_width": 5, "student_width": 8, "scale": 0.3, "seed": 0}
LONG = {**KNOWN, "batch": 1, "heads": 2, "tokens": 2 * ops._ROWS + 7, "teacher_bias": True, "student_bias": True}


@st.composite
def pairs(draw):
    """Sizes of a teacher's and a student's map on the same tokens."""
    small = st.integers(1, 4)
    sizes = {name: draw(small) for name in ("batch", "heads")}
    sizes |= {name: draw(st.integers(1, 9)) for name in ("tokens", "teacher_width", "student_width")}
    sizes |= {name: draw(st.booleans()) for name in ("teacher_bias", "student_bias")}
    return sizes | {"scale": draw(st.floats(0.05, 2.0)), "seed": draw(st.integers(0, 999))}


def make(sizes: dict, dtype=torch.float32) -> tuple[QK, QK]:
    generator = torch.Generator().manual_seed(sizes["seed"])

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def one(width, scale, bias):
        shape = sizes["batch"], sizes["heads"], sizes["tokens"]
        return QK(normal(*shape, width), normal(*shape, width), scale, normal(*shape[1:], shape[2]) if bias else None)

    teacher = one(sizes["teacher_width"], 0.5, sizes["teacher_bias"])
    return teacher, one(sizes["student_width"], sizes["scale"], sizes["student_bias"])


def tensors(qk: QK) -> list[Tensor]:
    return [x for x in (qk.q, qk.k, qk.bias) if x is not None]


def changed(qk: QK, change) -> QK:
    return QK(change(qk.q), change(qk.k), qk.scale, None if qk.bias is None else change(qk.bias))


def leaves(qk: QK, dtype=None) -> QK:
    return changed(qk, lambda x: x.detach().to(dtype or x.dtype, copy=True).requires_grad_())


def the_map(qk: QK) -> Tensor:
    scores = qk.scale * torch.einsum("bhqd,bhkd->bhqk", qk.q.double(), qk.k.double())
    weights = (scores + (0 if qk.bias is None else qk.bias.double())).exp()
    return weights / weights.sum(-1, keepdim=True)


def the_cross_entropy(teacher: QK, student: QK) -> Tensor:
    return -(the_map(teacher) * the_map(student).log()).sum(-1).mean()


def value_and_gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def assert_all_close(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


@PATHS
@given(sizes=pairs())
@example(LONG)
def test_attend_is_softmax_times_values(explicit, sizes):
    qk, other = make(sizes)  # the other's queries serve as values of another width
    qk, v = leaves(qk), other.q.clone().requires_grad_()
    inputs, upstream = [*tensors(qk), v], torch.cos(v.detach())
    found = value_and_gradients((ops.attend(qk, v, explicit) * upstream).sum(), inputs)
    expected = value_and_gradients((the_map(qk) @ v.double() * upstream).sum(), inputs)
    assert_all_close(found, expected, 3e-5)


@PATHS
@given(sizes=pairs())
@example(LONG)
def test_cross_entropy_and_its_gradients_are_those_of_the_formula(explicit, sizes):
    teacher, student = make(sizes)
    student, exact = leaves(student), leaves(student, torch.float64)
    found = value_and_gradients(ops.cross_entropy(teacher, student, explicit), tensors(student))
    expected = value_and_gradients(the_cross_entropy(teacher, exact), tensors(exact))
    assert_all_close(found, expected, 1e-5)


@given(sizes=pairs())
@example(LONG)
def test_both_paths_agree_in_float64(sizes):
    teacher, student = make(sizes, torch.float64)
    student = leaves(student)
    both = [
        value_and_gradients(ops.cross_entropy(teacher, student, explicit), tensors(student))
        for explicit in (True, False)
    ]
    assert_all_close(*both, 1e-12)


@PATHS
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(explicit, bias):
    teacher, student = make({**KNOWN, "tokens": 5, "teacher_bias": True, "student_bias": bias}, torch.float64)

    def loss(q, k, b=None):
        return ops.cross_entropy(teacher, QK(q, k, student.scale, b), explicit)

    assert gradcheck(loss, tensors(leaves(student)))


def in_bf16_with_offset_keys(offset: float) -> QK:
    qk, _ = make({**KNOWN, "tokens": 40, "teacher_width": 16, "teacher_bias": True, "student_bias": False})
    direction = torch.randn(16, generator=torch.Generator().manual_seed(1))
    return changed(qk._replace(k=qk.k + offset * direction), Tensor.bfloat16)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("offset", [0.0, 24.0])
@PATHS
def test_bf16_gradients_survive_near_agreement_with_offset_keys(explicit, offset, autocast):
    """Maps that nearly agree, keys far from zero: the gradient is a small difference of large numbers."""
    teacher = in_bf16_with_offset_keys(offset)
    nudge = 0.2 * torch.randn(teacher.q.shape, generator=torch.Generator().manual_seed(2))
    student = leaves(teacher._replace(q=(teacher.q.float() + nudge).bfloat16()))
    exact = leaves(student, torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = ops.cross_entropy(teacher, student, explicit)
    found = value_and_gradients(loss, tensors(student))
    expected = value_and_gradients(the_cross_entropy(teacher, exact), tensors(exact))
    assert [x.dtype for x in found] == [torch.float32] + 3 * [torch.bfloat16]
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() < 0.04 * other.norm()


@pytest.mark.parametrize("autocast", [False, True])
@PATHS
def test_bf16_attention_survives_offset_keys(explicit, autocast):
    qk = in_bf16_with_offset_keys(24.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = ops.attend(qk, qk.q, explicit)
    assert out.dtype == torch.bfloat16
    assert_all_close([out], [the_map(qk) @ qk.q.double()], 2e-2)


@PATHS
def test_distilling_into_an_own_copy_costs_the_entropy_and_pulls_nowhere(explicit):
    teacher, _ = make({**KNOWN, "tokens": 7, "teacher_bias": True, "student_bias": False}, torch.float64)
    loss, *gradients = value_and_gradients(
        ops.cross_entropy(teacher, (copy := leaves(teacher)), explicit), tensors(copy)
    )
    torch.testing.assert_close(loss, ops.entropy(teacher))
    assert all(gradient.abs().max() < 1e-14 for gradient in gradients)


@PATHS
def test_a_changed_copy_is_pulled_back_along_finite_differences(explicit):
    teacher, _ = make({**KNOWN, "tokens": 7, "teacher_bias": True, "student_bias": False}, torch.float64)
    directions = changed(teacher, lambda x: torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double())
    moved = leaves(teacher._replace(q=teacher.q + 0.1 * directions.q))
    loss, *gradients = value_and_gradients(ops.cross_entropy(teacher, moved, explicit), tensors(moved))
    assert loss > ops.entropy(teacher)
    assert gradients[0].abs().max() > 1e-5
    step = 1e-5

    def loss_at(name, sign):
        shifted = getattr(moved, name) + sign * step * getattr(directions, name)
        return ops.cross_entropy(teacher, moved._replace(**{name: shifted}), explicit)

    for name, gradient in zip(("q", "k", "bias"), gradients, strict=True):
        slope = (loss_at(name, 1) - loss_at(name, -1)) / (2 * step)
        torch.testing.assert_close((gradient * getattr(directions, name)).sum(), slope, rtol=1e-6, atol=1e-10)


@given(sizes=pairs())
def test_entropy_is_the_least_cross_entropy(sizes):
    teacher, student = make(sizes)
    torch.testing.assert_close(ops.cross_entropy(teacher, teacher), ops.entropy(teacher), rtol=1e-5, atol=1e-6)
    assert ops.cross_entropy(teacher, student) >= ops.entropy(teacher) - 1e-5


@PATHS
def test_no_gradient_reaches_the_teacher(explicit):
    teacher, student = make({**KNOWN, "tokens": 6, "teacher_bias": True, "student_bias": True})
    teacher, student = leaves(teacher), leaves(student)
    ops.cross_entropy(teacher, student, explicit).backward()
    assert all(x.grad is None for x in tensors(teacher))
    assert all(x.grad.isfinite().all() for x in tensors(student))


@PATHS
@given(data=st.data())
def test_select_is_the_renormalised_map(explicit, data):
    qk, _ = make({**KNOWN, "tokens": 8, "teacher_bias": data.draw(st.booleans()), "student_bias": False})
    kept = torch.tensor(data.draw(st.lists(st.integers(0, 7), min_size=1, unique=True)))
    sliced = the_map(qk)[:, :, kept][..., kept]
    values = torch.eye(len(kept)).expand(*qk.q.shape[:2], -1, -1)
    found = ops.attend(qk.select(kept), values, explicit)
    assert_all_close([found], [sliced / sliced.sum(-1, keepdim=True)], 1e-5)


@pytest.mark.parametrize(("teacher_width", "student_width"), [(8, 8), (4, 8), (8, 4)])
def test_the_fused_path_never_leaves_the_fast_kernels(monkeypatch, teacher_width, student_width):
    """SDPA would fall back in silence to a formula that stores [B, H, N, N]."""
    kernels, sdpa = [], F.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, scale=None):
        kernels.append(torch._fused_sdp_choice(q, k, v, attn_mask, 0.0, False, scale=scale))
        return sdpa(q, k, v, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    widths = {"teacher_width": teacher_width, "student_width": student_width}
    teacher, student = make({**KNOWN, **widths, "tokens": 30, "teacher_bias": True, "student_bias": True})
    student = leaves(student)
    ops.cross_entropy(teacher, student, explicit=False).backward()
    ops.attend(teacher, student.q, explicit=False).sum().backward()
    math = 0
    assert len(kernels) == 4 and math not in kernels


def test_the_rule_takes_the_explicit_formula_for_short_sequences_on_a_cpu_alone():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert ops.prefers_explicit(cpu, 197) and not ops.prefers_explicit(cpu, 577)
    assert not ops.prefers_explicit(gpu, 197)
