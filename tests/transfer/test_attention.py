"""Our attention module: equal to timm's, its captured tensors, and its overrides."""

import copy
import inspect
import pickle

import pytest
import timm.layers
import timm.models.vision_transformer
import torch

from atdiag.transfer import divergences, ops
from atdiag.transfer.attention import Attention, AttentionOverride, split_heads
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


class Hook(torch.nn.Module):
    """A factor per head common to q and k, and a shift of each, as a component attaches it."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.randn(HEADS, 1, 1))
        self.q_shift = torch.nn.Parameter(torch.randn(WIDTH // HEADS))
        self.k_shift = torch.nn.Parameter(torch.randn(WIDTH // HEADS))

    def forward(self, x, name, heads):
        return x * (self.factor if heads is None else self.factor[heads]) + self.get_parameter(f"{name}_shift")


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
def test_equals_timms_attention(qkv_bias, fused, tokens):
    module, twin = ours(qkv_bias), timms(qkv_bias, fused)
    twin.load_state_dict(module.state_dict())
    x = torch.randn(2, tokens, WIDTH)
    torch.testing.assert_close(module(x), twin(x), rtol=1e-5, atol=1e-5)
    if not fused and ops.prefers_explicit(x.device, tokens):
        assert torch.equal(module(x), twin(x))


@BIAS
def test_state_dicts_convert_both_ways(qkv_bias):
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
    assert same(given, kept)  # loading does not modify the caller's dict


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


def test_the_captured_map_is_the_one_used():
    module, x = ours(), torch.randn(2, 6, WIDTH)
    module.rel_pos_bias = Bias(6)
    out, (qk, v) = module.see(x)
    values = (x @ module.v_weight.T + module.v_bias).view(2, 6, HEADS, -1).transpose(1, 2)
    rebuilt = module.proj((ops.logits(qk).softmax(-1) @ values).transpose(1, 2).reshape(x.shape))
    torch.testing.assert_close(rebuilt, out, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(v, values)
    assert torch.equal(module(x), out)
    for tensor, value in (("map", qk), ("q", qk.q), ("k", qk.k), ("v", v)):
        torch.testing.assert_close(module(x, AttentionOverride(tensor, value)), out)
    for seen in (module.peek(x), module.peek(x, values=True)):
        assert all(map(torch.equal, seen.qk[:2], qk[:2])) and torch.equal(seen.qk.bias, qk.bias)
    assert module.peek(x).v is None and torch.equal(module.peek(x, values=True).v, v)


def test_the_captured_map_equals_a_hook_on_timms_module():
    module, twin, x, seen = ours(), timms(), torch.randn(2, 6, WIDTH), []
    twin.load_state_dict(module.state_dict())
    twin.attn_drop.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    twin(x)
    torch.testing.assert_close(ops.logits(module.peek(x).qk).softmax(-1), seen[0], rtol=1e-6, atol=1e-6)


def test_a_given_map_replaces_the_modules_own():
    module, x = ours(), torch.randn(2, 6, WIDTH)
    module.rel_pos_bias, module.qk_hooks["mine"] = Bias(6), Hook()
    given = QK(torch.randn(2, HEADS, 6, 4), torch.randn(2, HEADS, 6, 4), 0.5)  # a teacher of another head width
    given = AttentionOverride("map", given)
    out, seen = module.see(x, given)
    assert seen.map is given.value
    with torch.no_grad():
        for parameter in module.unused_parameters().values():
            parameter.normal_()
    assert torch.equal(module(x, given), out)
    assert not torch.allclose(module(x), out, atol=1e-2)


@pytest.mark.parametrize("tensor", ["map", "q", "k", "v"])
def test_no_gradient_reaches_replaced_tensors(tensor):
    module, x = ours(), torch.randn(2, 6, WIDTH)
    module.rel_pos_bias, module.qk_hooks["mine"] = Bias(6), Hook()
    unused = module.unused_parameters(tensor)
    parts = {n: {f"{n}_weight", f"{n}_bias", f"qk_hooks.mine.{n}_shift"} for n in "qk"}
    parts |= {"v": {"v_weight", "v_bias"}}
    parts |= {"map": {*parts["q"], *parts["k"], "qk_hooks.mine.factor", "rel_pos_bias.table"}}
    assert set(unused) == parts[tensor]
    module(x, AttentionOverride(tensor, taken(ours(), x, tensor))).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == (name in unused), name
    module(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def taken(module, x, tensor):
    """Return what a module used, for all heads."""
    seen = module.peek(x, values=True)
    return {"map": seen.qk, "q": seen.qk.q, "k": seen.qk.k, "v": seen.v}[tensor]


@pytest.mark.parametrize("tensor", ["map", "q", "k", "v"])
@pytest.mark.parametrize("heads", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("parts", ["", "bias", "hook", "bias and hook"])
def test_an_override_of_some_heads_leaves_the_others_unchanged(tensor, heads, parts):
    """Against an oracle that computes every head's output by an explicit formula and picks by head."""
    module, teacher, x = ours(), ours(), torch.randn(2, 6, WIDTH)
    for one in (module, teacher):
        one.rel_pos_bias = Bias(6) if "bias" in parts else None
        if "hook" in parts:
            one.qk_hooks["mine"] = Hook()
    theirs = taken(teacher, x, tensor)
    index = torch.tensor(heads)
    part = theirs.select_heads(index) if tensor == "map" else theirs[:, index]
    out = module(x, AttentionOverride(tensor, part, split_heads(heads, HEADS, x.device)))

    own, v = module.peek(x, values=True)
    q, k = own.q.clone(), own.k.clone()
    p = ops.logits(own).softmax(-1)
    if tensor == "map":
        p[:, index] = ops.logits(theirs).softmax(-1)[:, index]
    else:
        v = v.clone()
        {"q": q, "k": k, "v": v}[tensor][:, index] = theirs[:, index]
        p = ops.logits(own._replace(q=q, k=k)).softmax(-1)
    expected = module.proj((p @ v).transpose(1, 2).reshape(x.shape))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out, module(x), atol=1e-2)
    every = AttentionOverride(tensor, theirs, split_heads((0, 1, 2), HEADS, x.device))
    torch.testing.assert_close(module(x, every), module(x, AttentionOverride(tensor, theirs)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, HEADS, 6, 6), (2, 1, 6, 6), (2, HEADS, 1, 6)])
def test_an_averaged_map_can_be_given(shape):
    module, x = ours(), torch.randn(2, 6, WIDTH)
    p = torch.rand(shape).softmax(-1)
    out = module(x, AttentionOverride("map", ops.Averaged(p)))
    v = module.peek(x, values=True).v
    expected = module.proj((p.expand(2, HEADS, 6, 6) @ v).transpose(1, 2).reshape(x.shape))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_unused_parameters_are_those_that_the_map_depends_on():
    module, x = ours(), torch.randn(2, 6, WIDTH)
    module.rel_pos_bias, module.qk_hooks["mine"] = Bias(6), Hook()
    divergences.entropy(module.peek(x).qk).backward()
    assert {name for name, p in module.named_parameters() if p.grad is not None} == set(module.unused_parameters())


# --- What acts on q and k ---------------------------------------------------------------------------------------------


class Add(torch.nn.Module):
    """Add the same number to queries and keys."""

    def forward(self, x, name, heads):
        return x + 2.0


@torch.no_grad()
def test_hooks_act_in_order_on_q_and_k_alone():
    module, x = ours(), torch.randn(2, 6, WIDTH)
    plain = module.peek(x, values=True)
    module.qk_hooks["first"], module.qk_hooks["second"] = hook, _ = Hook(), Add()
    seen = module.peek(x, values=True)
    assert torch.equal(seen.qk.q, plain.qk.q * hook.factor + hook.q_shift + 2.0)
    assert torch.equal(seen.qk.k, plain.qk.k * hook.factor + hook.k_shift + 2.0)
    assert torch.equal(seen.v, plain.v)
    out, used = module.see(x)
    expected = (seen.qk.q @ seen.qk.k.transpose(-2, -1) * 8**-0.5).softmax(-1) @ seen.v
    torch.testing.assert_close(out, module.proj(expected.transpose(1, 2).reshape(x.shape)), rtol=1e-5, atol=1e-5)
    assert torch.equal(used.qk.q, seen.qk.q)
    del module.qk_hooks["first"]
    module.qk_hooks["first"] = hook
    assert torch.equal(module.peek(x).qk.q, (plain.qk.q + 2.0) * hook.factor + hook.q_shift)


def test_a_hook_that_does_nothing_changes_no_bit():
    class Nothing(torch.nn.Module):
        def forward(self, x, name, heads):
            return x

    module, x = ours(), torch.randn(2, 6, WIDTH)
    keys, out = list(module.state_dict()), module(x)
    module.qk_hooks["nothing"] = Nothing()
    assert torch.equal(module(x), out) and list(module.state_dict()) == keys


@torch.no_grad()
def test_hooks_compile_into_one_graph():
    module, x = ours(), torch.randn(2, 6, WIDTH)
    module.qk_hooks["first"], module.qk_hooks["second"] = Hook(), Add()
    theirs = ours().peek(x).qk.select_heads(torch.tensor([1]))
    part = AttentionOverride("map", theirs, split_heads((1,), HEADS, x.device))
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for given in (None, part):
        torch.testing.assert_close(compiled(x, given), module(x, given))


@torch.no_grad()
def test_a_hook_keeps_the_dtype_under_autocast():
    class Norm(torch.nn.LayerNorm):
        def forward(self, x, name, heads):
            return super().forward(x)

    module, x = ours(), torch.randn(2, 6, WIDTH)
    module.qk_hooks["norm"] = Norm(WIDTH // HEADS)
    with torch.autocast("cpu", torch.bfloat16):
        seen = module.peek(x, values=True)
    assert seen.qk.q.dtype == seen.qk.k.dtype == seen.v.dtype == torch.bfloat16


# --- Arguments --------------------------------------------------------------------------------------------------------


def test_accepts_the_arguments_that_timms_block_passes():
    class Recorder(torch.nn.Module):
        def __init__(self, *args, **options):
            super().__init__()
            passed.update(options)

    passed = {}
    timm.models.vision_transformer.Block(WIDTH, HEADS, attn_layer=Recorder)
    assert {"dim", *passed} == set(inspect.signature(Attention).parameters)
    module = timm.models.vision_transformer.Block(WIDTH, HEADS, attn_layer=Attention, dtype=torch.float64).attn
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}
    assert {p.device.type for p in Attention(WIDTH, HEADS, device="meta").parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("attn_drop", 0.1), ("proj_drop", 0.1)],
)
def test_unsupported_values_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^`?{name}`?[ =]{value}"):
        Attention(WIDTH, HEADS, **{name: value})


@pytest.mark.parametrize("name", ["attn_head_dim", "gated", "qk_nrom"])
def test_an_unknown_argument_is_an_error(name):
    with pytest.raises(TypeError, match=name):
        Attention(WIDTH, HEADS, **{name: None})
