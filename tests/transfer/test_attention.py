"""Our attention module beside timm's, and what it hands out and takes in."""

import copy
import pickle

import pytest
import timm.layers
import torch

from atdiag.transfer import ops
from atdiag.transfer.attention import Attention
from atdiag.transfer.ops import QK

WIDTH, HEADS = 24, 3
BIAS = pytest.mark.parametrize("qkv_bias", [True, False])


class Bias(torch.nn.Module):
    """A learned position bias, as a component attaches it."""

    def __init__(self, tokens):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(HEADS, tokens, tokens))

    def forward(self):
        return self.table


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def ours(qkv_bias=True) -> Attention:
    module = Attention(WIDTH, HEADS, qkv_bias)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return module


def timms(qkv_bias=True, fused=False) -> timm.layers.Attention:
    module = timm.layers.Attention(WIDTH, HEADS, qkv_bias=qkv_bias)
    module.fused_attn = fused
    return module


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@BIAS
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tokens", [5, ops.EXPLICIT_UP_TO_TOKENS + 1])
def test_is_timms_attention(qkv_bias, fused, tokens):
    module, twin = ours(qkv_bias), timms(qkv_bias, fused)
    twin.load_state_dict(module.state_dict())
    x = torch.randn(2, tokens, WIDTH)
    torch.testing.assert_close(module(x), twin(x), rtol=1e-5, atol=1e-5)
    if not fused and ops.prefers_explicit(x.device, tokens):
        assert torch.equal(module(x), twin(x))


@BIAS
def test_state_dicts_go_both_ways(qkv_bias):
    module, twin = ours(qkv_bias), timms(qkv_bias)
    before = module.state_dict()
    twin.load_state_dict(before)
    assert same(twin.state_dict(), before)
    back = ours(qkv_bias)
    assert not same(back.state_dict(), before)
    back.load_state_dict(twin.state_dict())
    assert same(back.state_dict(), before)


def test_state_dicts_keep_timms_layout_as_part_of_a_network():
    nested, twin = (torch.nn.ModuleDict({"block": torch.nn.ModuleDict({"attn": m})}) for m in (ours(), timms()))
    given = nested.state_dict()
    assert set(given) == {f"block.attn.{name}" for name in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")}
    twin.load_state_dict(given)
    kept = dict(given)
    nested.load_state_dict(given)
    assert same(given, kept)  # loading leaves the caller's dict alone


def test_a_wrong_state_dict_is_refused():
    state = ours().state_dict()
    with pytest.raises(RuntimeError, match="q_weight"):
        ours().load_state_dict({name: tensor for name, tensor in state.items() if name != "qkv.weight"})
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours().load_state_dict({**state, "qkv.weight": state["qkv.weight"][:-3]})


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_clones_are_independent_equals(clone):
    module, x = ours(), torch.randn(2, 5, WIDTH)
    module.rel_pos_bias = Bias(5)
    twin = clone(module)
    assert torch.equal(twin(x), module(x)) and same(twin.state_dict(), module.state_dict())
    with torch.no_grad():
        twin.v_weight.add_(1)
    assert not torch.equal(twin(x), module(x))


def test_captured_is_what_is_used():
    module, x, captured = ours(), torch.randn(2, 6, WIDTH), []
    module.rel_pos_bias = Bias(6)
    out = module(x, captured=captured)
    (qk,) = captured
    values = (x @ module.v_weight.T + module.v_bias).view(2, 6, HEADS, -1).transpose(1, 2)
    rebuilt = module.proj((ops.logits(qk).softmax(-1) @ values).transpose(1, 2).reshape(x.shape))
    torch.testing.assert_close(rebuilt, out, rtol=1e-6, atol=1e-5)
    assert torch.equal(module(x, given=qk), out)
    assert all(map(torch.equal, module.map(x)[:2], qk[:2])) and torch.equal(module.map(x).bias, qk.bias)


def test_captured_is_what_a_hook_on_timms_module_sees():
    module, twin, x, captured, seen = ours(), timms(), torch.randn(2, 6, WIDTH), [], []
    twin.load_state_dict(module.state_dict())
    twin.attn_drop.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    module(x, captured=captured), twin(x)
    torch.testing.assert_close(ops.logits(captured[0]).softmax(-1), seen[0], rtol=1e-6, atol=1e-6)


def test_a_given_map_replaces_the_own_one():
    module, x = ours(), torch.randn(2, 6, WIDTH)
    module.rel_pos_bias = Bias(6)
    given = QK(torch.randn(2, HEADS, 6, 4), torch.randn(2, HEADS, 6, 4), 0.5)  # a teacher of another head width
    captured = []
    out = module(x, given, captured)
    assert captured == [given]
    with torch.no_grad():
        for parameter in module.qk_parameters().values():
            parameter.normal_()
    assert torch.equal(module(x, given), out)
    assert not torch.allclose(module(x), out, atol=1e-2)


def test_no_gradient_reaches_q_and_k_under_a_given_map():
    module, x = ours(), torch.randn(2, 6, WIDTH)
    module.rel_pos_bias = Bias(6)
    unused = module.qk_parameters()
    assert set(unused) == {"q_weight", "q_bias", "k_weight", "k_bias", "rel_pos_bias.table"}
    given = ours().map(x)
    module(x, given).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == (name in unused), name
    module(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_qk_parameters_are_those_that_the_map_depends_on():
    module, x = ours(), torch.randn(2, 6, WIDTH)
    module.rel_pos_bias = Bias(6)
    ops.entropy(module.map(x)).backward()
    assert {name for name, p in module.named_parameters() if p.grad is not None} == set(module.qk_parameters())
