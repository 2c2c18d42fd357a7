"""Attention by a map, and averages of maps, against explicit formulas in float64."""

from math import prod

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from atdiag.transfer import ops, sdpa
from atdiag.transfer.ops import QK, Averaged

PATHS = pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "fused"])


@st.composite
def sizes(draw, most=4):
    """Draw batch, heads, tokens, the width of q and k, that of values, whether there is a bias, and a seed."""
    small = [draw(st.integers(1, most)) for _ in range(2)]
    return *small, *(draw(st.integers(1, 9)) for _ in range(3)), draw(st.booleans()), draw(st.integers(0, 999))


LONG = (2, 2, 600, 6, 9, True, 0)  # more than one block for each head


def make(batch, heads, tokens, width, value_width, bias, seed, dtype=torch.float32) -> tuple[QK, Tensor]:
    """Make a map and values."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k = (normal(batch, heads, tokens, width) for _ in range(2))
    values = normal(batch, heads, tokens, value_width)
    return QK(q, k, 0.4, normal(heads, tokens, tokens) if bias else None), values


def tensors(qk: QK) -> list[Tensor]:
    return [x for x in (qk.q, qk.k, qk.bias) if x is not None]


def changed(qk: QK, change) -> QK:
    return QK(change(qk.q), change(qk.k), qk.scale, None if qk.bias is None else change(qk.bias))


def leaves(qk: QK) -> QK:
    return changed(qk, lambda x: x.detach().clone().requires_grad_())


def the_map(qk: QK) -> Tensor:
    scores = qk.scale * torch.einsum("bhqd,bhkd->bhqk", qk.q.double(), qk.k.double())
    weights = (scores + (0 if qk.bias is None else qk.bias.double())).exp()
    return weights / weights.sum(-1, keepdim=True)


def value_and_gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def assert_all_close(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


class Watch(TorchDispatchMode):
    """Record which operations run, forward and backward, and the largest tensor that any of them makes."""

    def __init__(self):
        super().__init__()
        self.ran, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ran.add(func.overloadpacket.__name__)
        made = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        # An expanded view stores few elements.
        own = [prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride) for x in made]
        self.largest = max(self.largest, *own, 0)
        return out


@PATHS
@given(size=sizes())
@example(LONG)
def test_attend_is_softmax_times_values(explicit, size):
    qk, v = make(*size)
    qk, v = leaves(qk), v.requires_grad_()
    inputs, upstream = [*tensors(qk), v], torch.cos(v.detach())
    found = value_and_gradients((ops.attend(qk, v, explicit) * upstream).sum(), inputs)
    expected = value_and_gradients((the_map(qk) @ v.double() * upstream).sum(), inputs)
    assert_all_close(found, expected, 5e-5)


@PATHS
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(explicit, bias):
    qk, v = make(2, 2, 5, 3, 4, bias, 1, torch.float64)
    scale = qk.scale

    def attended(q, k, v, b=None):
        return ops.attend(QK(q, k, scale, b), v, explicit)

    q, k, *b = tensors(leaves(qk))
    assert gradcheck(attended, (q, k, v.requires_grad_(), *b))


@given(size=sizes(), chosen=st.sets(st.sampled_from(["q", "k", "bias", "v"]), min_size=1))
def test_any_part_alone_may_have_a_gradient(size, chosen):
    qk, v = make(*size, torch.float64)
    parts = {"q": qk.q, "k": qk.k, "bias": qk.bias, "v": v}
    trained = [x.requires_grad_() for name, x in parts.items() if name in chosen and x is not None]
    if trained:
        by_each = [torch.autograd.grad(ops.attend(qk, v, path).square().sum(), trained) for path in (True, False)]
        assert_all_close(*by_each, 1e-10)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_attention_stores_no_map(bias, trained):
    batch, heads, tokens = 2, 3, 1024
    qk, v = make(batch, heads, tokens, 16, 16, bias, 0)
    if trained:
        qk = leaves(qk)
    with Watch() as seen:
        ops.attend(qk, v.requires_grad_(), explicit=False).square().sum().backward()
    assert "_scaled_dot_product_flash_attention_for_cpu" in seen.ran
    assert "_scaled_dot_product_flash_attention_for_cpu_backward" in seen.ran
    assert seen.largest <= max(ops._BLOCK_CPU, heads * tokens * tokens if bias else 0)
    with Watch() as seen:
        ops.attend(qk, v, explicit=True)
    assert seen.largest == batch * heads * tokens * tokens  # the watch detects stored maps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("value_width", [4, 8, 12])
def test_the_fused_path_never_leaves_the_fast_kernels(dtype, bias, value_width):
    """SDPA would silently fall back to a formula that stores [B, H, N, N]."""
    qk, v = make(2, 3, 30, 8, value_width, bias, 0, dtype)
    with Watch() as seen:
        out = ops.attend(qk, v, explicit=False)
    assert "_scaled_dot_product_flash_attention_for_cpu" in seen.ran and out.shape == v.shape
    assert not {"_softmax", "_safe_softmax", "bmm"} & seen.ran


@given(size=sizes())
@example(LONG)
def test_the_kernels_log_sum_exp_is_the_logits(size):
    qk, v = make(*size)
    out = sdpa.attention(qk.q, qk.k, v.requires_grad_(), qk.scale, qk.bias)
    assert sdpa.kernel(out) == "flash"
    torch.testing.assert_close(sdpa.logsumexp(out), ops.logits(qk).logsumexp(-1), rtol=1e-5, atol=1e-5)
    assert sdpa.kernel(out * 2) is None and sdpa.logsumexp(out.detach()) is None


def in_bf16_with_offset_keys(offset: float) -> QK:
    qk, _ = make(2, 3, 40, 16, 16, True, 0)
    direction = torch.randn(16, generator=torch.Generator().manual_seed(1))
    return changed(qk._replace(k=qk.k + offset * direction), Tensor.bfloat16)


@pytest.mark.parametrize("autocast", [False, True])
@PATHS
def test_bf16_attention_survives_offset_keys(explicit, autocast):
    qk = leaves(in_bf16_with_offset_keys(24.0))
    values = qk.q.detach()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = ops.attend(qk, values, explicit)
    assert out.dtype == torch.bfloat16
    assert_all_close([out], [the_map(qk) @ values.double()], 2e-2)
    upstream = torch.cos(values)
    (found,) = torch.autograd.grad(out, [qk.bias], upstream)
    (expected,) = torch.autograd.grad(the_map(qk) @ values.double(), [qk.bias], upstream.double())
    assert found.dtype == torch.bfloat16 and (found - expected).norm() < 0.02 * expected.norm()


@PATHS
@given(data=st.data())
def test_select_gives_the_renormalised_map(explicit, data):
    qk, _ = make(2, 3, 8, 5, 5, data.draw(st.booleans()), 0)
    kept = torch.tensor(data.draw(st.lists(st.integers(0, 7), min_size=1, unique=True)))
    sliced = the_map(qk)[:, :, kept][..., kept]
    values = torch.eye(len(kept)).expand(*qk.q.shape[:2], -1, -1)
    found = ops.attend(qk.select(kept), values, explicit)
    assert_all_close([found], [sliced / sliced.sum(-1, keepdim=True)], 1e-5)


@given(size=sizes(), data=st.data())
def test_select_heads_takes_the_maps_of_those_heads(size, data):
    qk, _ = make(*size)
    heads = torch.tensor(data.draw(st.lists(st.integers(0, size[1] - 1), min_size=1, unique=True)))
    expected = the_map(qk)[:, heads]
    assert_all_close([ops.probabilities(qk.select_heads(heads))], [expected], 1e-5)
    assert_all_close([Averaged(the_map(qk)).select_heads(heads).p], [expected], 1e-12)
    shared = Averaged(the_map(qk)[:, :1])
    assert shared.select_heads(heads) is shared


AVERAGES = {"examples": 0, "heads": 1, "queries": 2, "layers": None}


@pytest.mark.parametrize("over", AVERAGES)
@given(size=sizes(), layers=st.integers(1, 3))
@example(LONG, 2)
def test_averages_are_means_of_the_maps(over, size, layers):
    maps = [leaves(make(*size[:-1], size[-1] + layer)[0]) for layer in range(layers)]
    found, dim = ops.average(maps, over), AVERAGES[over]
    full = [the_map(qk) for qk in maps]
    mean = [sum(full) / layers] * layers if dim is None else [p.mean(dim, keepdim=True) for p in full]
    assert not any(average.p.requires_grad for average in found)
    assert_all_close([average.p for average in found], mean, 1e-6)
    sums = [average.p.sum(-1) for average in found]
    assert_all_close(sums, [torch.ones_like(x) for x in sums], 1e-5)


@pytest.mark.parametrize("over", ["examples", "queries"])
def test_an_average_over_examples_or_queries_holds_only_blocks_of_the_maps(over):
    batch, heads, tokens = 3, 4, 512
    qk, _ = make(batch, heads, tokens, 8, 8, False, 0)
    with Watch() as seen:
        (average,) = ops.average([qk], over)
    assert seen.largest <= max(ops._BLOCK_CPU, average.p.numel()) < batch * heads * tokens * tokens


@given(size=sizes(), single=st.sets(st.sampled_from([0, 1, 2])))
def test_an_averaged_map_attends_like_its_dense_map(size, single):
    qk, v = make(*size)
    p = the_map(qk).float()
    for dim in single:
        p = p.mean(dim, keepdim=True)
    found = value_and_gradients(ops.attend(Averaged(p), v.requires_grad_()).square().sum(), [v])
    expected = value_and_gradients((p.expand(*v.shape[:3], -1).double() @ v.double()).square().sum(), [v])
    assert ops.attend(Averaged(p), v).shape == v.shape
    assert_all_close(found, expected, 1e-4)


def test_an_averaged_map_is_not_copied_for_every_image():
    _, v = make(8, 2, 128, 8, 8, False, 0)
    p = torch.rand(1, 2, 128, 128).softmax(-1)
    with Watch() as seen:
        ops.attend(Averaged(p), v.requires_grad_()).square().sum().backward()
    assert seen.largest <= p.numel()


def test_attention_under_autocast_by_an_averaged_map_is_in_bf16():
    qk, v = make(2, 2, 9, 4, 4, False, 0)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.attend(Averaged(the_map(qk).float()), v.bfloat16())
    assert out.dtype == torch.bfloat16


def test_attend_compiles_in_one_piece_with_a_trained_bias():
    qk, v = make(2, 2, 20, 8, 8, True, 0)
    qk, v = leaves(qk), v.requires_grad_()

    def loss(q, k, bias, v):
        return ops.attend(QK(q, k, 0.4, bias), v, explicit=False).square().sum()

    inputs = [*tensors(qk), v]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = value_and_gradients(compiled(*inputs), inputs)
    assert_all_close(found, value_and_gradients(loss(*inputs), inputs), 1e-6)


def test_the_rule_chooses_the_explicit_formula_only_for_short_sequences_on_a_cpu():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert ops.prefers_explicit(cpu, 26) and not ops.prefers_explicit(cpu, 197)
    assert ops.prefers_explicit(cpu, 197, in_part=True) and not ops.prefers_explicit(cpu, 577, in_part=True)
    assert not ops.prefers_explicit(gpu, 26) and not ops.prefers_explicit(gpu, 26, in_part=True)


@pytest.mark.parametrize(
    ("trained", "explicit"), [("", False), ("v", True), ("qkv", False), ("qkv bias", True), ("bias", True)]
)
def test_attend_follows_the_rule_for_what_is_trained(trained, explicit):
    qk, v = make(1, 2, 100, 4, 4, True, 0)
    for name, x in {"q": qk.q, "k": qk.k, "v": v, "bias": qk.bias}.items():
        x.requires_grad_(name in trained.partition(" ")[0] or name in trained.split())
    with Watch() as seen:
        ops.attend(qk, v)
    assert ("_softmax" in seen.ran) == explicit
    with torch.no_grad(), Watch() as seen:
        ops.attend(qk, v)
    assert "_softmax" not in seen.ran
