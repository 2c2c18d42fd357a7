"""Traces by nnsight against plain hooks and our own attention module, for everything that can be traced."""

import subprocess
import sys

import pytest
import torch

from atdiag.analysis import images, streaming, subjects, tracing
from atdiag.core.spec import Data
from atdiag.networks.registry import teachers
from atdiag.networks.timm import conversion, inspection
from atdiag.training import evaluation
from atdiag.transfer import methods, ops
from atdiag.transfer.observation import CaptureRequest
from tests.analysis.timm_networks import TIMM, Calls, build, pictures, pixels

DATA = Data(name="digits", train=1, clutter=6)


def hooked(subject, given, some):
    """Return what plain hooks see: outputs of each block's modules and, for our attention, its arguments."""
    found, handles = {}, []
    blocks = getattr(subject.module, "blocks", None)
    for i, block in enumerate(subject.module.model.blocks if blocks is None else blocks):
        for what, module in (("attn", block.attn), ("mlp", block.mlp), ("residual", block)):

            def keep(_, inputs, output, key=(what, i)):
                found[key] = output.detach().clone()

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        subject.module(some, given) if given else subject.module(some)
    for handle in handles:
        handle.remove()
    return found


def test_traces_of_miniatures_equal_hooks_and_our_attention_module():
    for name in teachers.miniatures():
        subject = subjects.find(name)
        some = images.choose(3, DATA, subject.network)
        found = streaming.trace(subject, some, tracing.WHAT)
        depth = subject.network.depth
        seen = subject.module.observe(
            pixels(some), CaptureRequest(frozenset(range(depth)), frozenset(range(depth)))
        ).seen
        for i in range(depth):
            assert torch.equal(found["q", i], seen[i].qk.q) and torch.equal(found["k", i], seen[i].qk.k)
            assert torch.equal(found["v", i], seen[i].v)
            assert torch.equal(found["logits", i], ops.logits(seen[i].qk))
            assert torch.equal(found["map", i], ops.probabilities(seen[i].qk))
        for key, value in hooked(subject, None, pixels(some)).items():
            assert torch.equal(found[key], value), (name, key)


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("fused", [True, False])
def test_traces_of_timms_networks_equal_hooks(name, fused):
    model = build(name)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    subject = subjects.of(model, name)
    some = pictures(subject)
    what = tracing.WHAT if fused else ("map", "attn", "mlp", "residual")
    found = streaming.trace(subject, some, what)
    assert all(module.fused_attn == fused for module in model.modules() if hasattr(module, "fused_attn"))
    for key, value in hooked(subject, None, pixels(some)).items():
        assert torch.equal(found[key], value), key

    # With fused attention off, timm passes its map through the module attn_drop: an independent witness.
    witness, handles = {}, []
    for i, block in enumerate(model.blocks):
        block.attn.fused_attn = False
        keep = lambda _, inputs, output, i=i: witness.__setitem__(i, output.detach())  # noqa: E731
        handles.append(block.attn.attn_drop.register_forward_hook(keep))
    with torch.no_grad():
        subject.module(pixels(some))
    for i, p in witness.items():
        assert found["map", i].shape == (4, 2, subject.network.tokens, subject.network.tokens)
        torch.testing.assert_close(found["map", i], p, atol=2e-6, rtol=1e-4)
        if fused:
            torch.testing.assert_close(found["logits", i].softmax(-1), p, atol=2e-6, rtol=1e-4)


OURS = {name for name in TIMM if not inspection.describe(build(name)).differences}
"""Those that a ViT of ours can be."""


def test_most_of_timms_networks_can_be_converted():
    assert len(OURS) >= 8


@pytest.mark.parametrize("name", sorted(OURS))
def test_traces_of_timms_networks_equal_our_attention_module(name):
    """The same weights in our own attention module, which returns its map itself: no nnsight, no hook."""
    subject = subjects.of(build(name), name)
    some = pictures(subject)
    found = streaming.trace(subject, some, tracing.WHAT)
    ours = conversion.convert(subject.module.model, subject.network).eval()
    every = frozenset(range(subject.network.depth))
    with torch.no_grad():
        seen = ours.observe(pixels(some), CaptureRequest(maps=every, features=every, values=every))
    for i in every:
        p = ops.probabilities(seen.seen[i].qk)
        torch.testing.assert_close(found["map", i], p, atol=5e-6, rtol=1e-3)
        torch.testing.assert_close(found["v", i], seen.seen[i].v, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found["residual", i], seen.features[i], atol=1e-3, rtol=1e-4)


def test_tracing_leaves_the_network_unchanged():
    model = build("vit_tiny_patch16_224")
    subject = subjects.of(model, "mine")
    some = pictures(subject)
    before, state = subject.module(pixels(some)), {m: set(m.__dict__) for m in model.modules()}
    streaming.trace(subject, some)
    assert torch.equal(before, subject.module(pixels(some)))
    assert {m: set(m.__dict__) for m in model.modules()} == state


@pytest.mark.slow
def test_tracing_leaves_the_process_unchanged():
    code = """
from atdiag.analysis import images, streaming, subjects
from atdiag.core.spec import Data
subject = subjects.find("deit_s")
streaming.trace(subject, images.choose(1, Data(name="digits", train=1), subject.network))
assert not hasattr(object(), "save")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "form",
    [
        {"tensor": "map"},
        {"tensor": "map", "heads": (0, 2)},
        {"tensor": "q"},
        {"tensor": "v", "heads": (1,)},
        {"tensor": "map", "average": "queries", "heads": (0,)},
        {"tensor": "map", "average": "heads"},
    ],
    ids=str,
)
def test_a_copy_student_uses_its_teachers_maps(pair, form):
    student, teacher = pair
    transfer = methods.Transfer(method="copy", layers=(0, 2), **form)
    subject = subjects.Subject("copy", evaluation.Predictor(student, transfer, teacher), student.network)
    some = pictures(subject, 3)
    tensor, average, heads = form["tensor"], form.get("average"), form.get("heads", (0, 1, 2))
    shown = evaluation.fit(
        teacher.observe(pixels(some), CaptureRequest(frozenset((0, 2)), frozenset((0, 2)))), teacher, student.network
    )
    found = streaming.trace(subject, some, ("map", "v", "attn"))
    given = subject.given(pixels(some))
    expected = hooked(subject, given, pixels(some))
    for layer in (0, 2):
        seen = shown.seen[layer]
        if tensor == "v":
            assert torch.equal(found["v", layer][:, heads], seen.v[:, heads])
        elif tensor == "map" and not average:
            p = ops.probabilities(seen.qk)[:, heads]
            torch.testing.assert_close(found["map", layer][:, heads], p, atol=1e-6, rtol=1e-4)
        elif average == "heads":
            p = ops.probabilities(seen.qk).mean(1, keepdim=True).expand(-1, 3, -1, -1)
            torch.testing.assert_close(found["map", layer].expand_as(p), p, atol=1e-6, rtol=1e-4)
    for layer in range(3):  # whatever was given: the traced map applied to the values gives the module's output
        assert torch.equal(found["attn", layer], expected["attn", layer])
        mixed = found["map", layer] @ found["v", layer]
        out = student.blocks[layer].attn.proj(mixed.transpose(1, 2).flatten(2))
        torch.testing.assert_close(out, found["attn", layer], atol=1e-5, rtol=1e-4)


def test_only_requested_heads_and_layers_are_traced():
    subject = subjects.find("clip_b")
    some = images.choose(2, DATA, subject.network)
    whole = streaming.trace(subject, some, ("map", "residual"))
    part = streaming.trace(subject, some, ("map", "residual"), (11, 2), heads=(2, 0))
    assert set(part) == {(what, layer) for what in ("map", "residual") for layer in (2, 11)}
    assert torch.equal(part["map", 2], whole["map", 2][:, [2, 0]])
    assert torch.equal(part["residual", 11], whole["residual", 11])


def test_a_custom_scale_and_bias_are_part_of_the_map():
    model = build("vit_tiny_patch16_224", depth=1)
    subject = subjects.of(model, "calls")
    tokens = subject.network.tokens
    bias = torch.randn(2, tokens, tokens, generator=torch.Generator().manual_seed(0))
    model.blocks[0].attn = Calls(model.blocks[0].attn, scale=0.7, attn_mask=bias[None])
    found = streaming.trace(subject, pictures(subject), ("map", "q", "k", "v", "attn"))
    p = (0.7 * found["q", 0] @ found["k", 0].transpose(-2, -1) + bias).softmax(-1)
    torch.testing.assert_close(found["map", 0], p, atol=1e-6, rtol=1e-4)
    out = model.blocks[0].attn.proj((p @ found["v", 0]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(found["attn", 0], out, atol=1e-5, rtol=1e-4)
