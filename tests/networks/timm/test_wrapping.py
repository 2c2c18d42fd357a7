"""Wrapped teachers: what they run, what they refuse, and which of their tokens a student has."""

import copy
from functools import cache

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from atdiag.core.errors import UserError
from atdiag.networks.timm import conversion
from atdiag.networks.timm.wrapping import Foreign
from atdiag.transfer.observation import CaptureRequest

NAMES = {
    "eva02": "eva02_small_patch14_224",
    "dinov3": "vit_small_patch16_dinov3",
    "distilled deit": "deit_small_distilled_patch16_224",
}


@cache
def model(name: str) -> nn.Module:
    """Return a small timm network with random weights. Shared between tests: do not modify it."""
    side = 56 if "patch14" in NAMES[name] else 64
    made = timm.create_model(NAMES[name], img_size=side, depth=2, embed_dim=96, num_heads=3)
    return made.eval().requires_grad_(False)


@cache
def teacher(name: str) -> Foreign:
    """Return a network wrapped unmodified: it teaches whether a student of ours could be it or not."""
    return Foreign(copy.deepcopy(model(name)), conversion.describe(model(name)))


def images(side: int) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_foreign_teacher_is_frozen_and_returns_its_own_output():
    of, taught = model("eva02"), teacher("eva02")
    assert isinstance(taught, Foreign) and not taught.training
    assert not any(p.requires_grad for p in taught.parameters())
    x = images(taught.network.image_size)
    mean, std = (torch.tensor(of.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    assert torch.equal(taught(x), of((x - mean) / std))
    assert taught.maps(x, ()) == {}
    with pytest.raises(ValueError, match=r"blocks \[0, 2\]: the network has 2"):
        taught.maps(x, (0, 2))


@torch.no_grad()
def test_a_foreign_teacher_runs_no_further_than_needed_and_leaves_no_hook():
    taught, ran = teacher("dinov3"), set()
    hooks = [m.register_forward_hook(lambda *_, n=n: ran.add(n)) for n, m in taught.model.named_modules()]
    taught.maps(images(taught.network.image_size), (0,))
    for hook in hooks:
        hook.remove()
    assert "blocks.0.norm1" in ran and not {n for n in ran if n.startswith(("blocks.1", "blocks.0.mlp"))}
    assert not {"blocks.0", "blocks.0.attn", "blocks.0.norm2", "norm", "head"} & ran  # q and k were enough
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in taught.modules())


@torch.no_grad()
def test_a_network_with_explicit_attention_is_switched_to_sdpa():
    slow = copy.deepcopy(model("eva02"))
    for block in slow.blocks:
        block.attn.fused_attn = False
    x = images(56)
    found, expected = (taught.maps(x, (0, 1)) for taught in (Foreign(slow, teacher("eva02").network), teacher("eva02")))
    assert all(torch.equal(found[layer].q, expected[layer].q) for layer in (0, 1))


def test_registers_are_dropped_for_a_student_without_them():
    taught = teacher("distilled deit")
    shared = taught.shared_tokens(taught.network.student())
    assert shared.tolist() == [0, *range(2, 18)]  # class token, (distillation token), patches
    assert taught.shared_tokens(taught.network) is None
    with pytest.raises(ValueError, match="do not line up"):
        taught.shared_tokens(taught.network.model_copy(update={"class_token": False}))


class Odd(nn.Module):
    """Attention that does not do what a block's should."""

    def __init__(self, attn, calls=1, **options):
        super().__init__()
        self.attn, self.calls, self.options = attn, calls, options

    def forward(self, x, **unused):
        q = x[:, None].expand(-1, self.attn.num_heads, -1, -1)
        for _ in range(self.calls):
            F.scaled_dot_product_attention(q, q, q, **self.options)
        return x


@pytest.mark.parametrize(
    ("calls", "options", "says"),
    [
        (0, {}, "block 1 made no call"),
        (2, {}, "block 1 attends twice"),
        (1, {"is_causal": True}, "a causal mask"),
        (1, {"dropout_p": 0.1}, "dropout"),
        (1, {"attn_mask": torch.ones(17, 17, dtype=torch.bool)}, "is no bias of the heads' logits"),
    ],
)
def test_an_unexpected_attention_is_an_error_and_never_a_wrong_map(calls, options, says):
    of = model("eva02")
    network = conversion.describe(of)
    taught, broken = Foreign(copy.deepcopy(of), network), copy.deepcopy(of)
    broken.blocks[1].attn = Odd(broken.blocks[1].attn, calls, **options)
    with pytest.raises(UserError, match=f"Eva can't be a teacher: .*{says}"):
        Foreign(broken, network)
    taught.model = broken  # changed after construction
    if calls < 2:
        with pytest.raises(RuntimeError, match=says):
            taught.maps(images(56), (1,))


def test_tokens_other_than_the_described_ones_are_an_error():
    taught = Foreign(copy.deepcopy(model("dinov3")), conversion.describe(model("dinov3")))
    with pytest.raises(RuntimeError, match=r"expected \(2, 3, 21\)"):
        taught.maps(images(80), (1,))


@torch.no_grad()
def test_observations_of_a_foreign_teacher_equal_hooks():
    taught = teacher("dinov3")
    x, blocks = images(taught.network.image_size), taught._blocks
    outputs, values = {}, {}
    hooks = [b.register_forward_hook(lambda *seen, i=i: outputs.update({i: seen[-1]})) for i, b in enumerate(blocks)]
    hooks.append(blocks[1].attn.qkv.register_forward_hook(lambda *seen: values.update({1: seen[-1]})))
    expected = taught(x)
    for hook in hooks:
        hook.remove()
    shown = taught.observe(x, CaptureRequest(maps={0}, values={1}, features={0, 1}, logits=True))
    assert torch.equal(shown.logits, expected)
    assert all(torch.equal(shown.features[i], outputs[i]) for i in (0, 1))
    batch, heads, tokens, width = shown.seen[1].v.shape
    assert torch.equal(shown.seen[1].v, values[1].view(batch, tokens, 3, heads, width)[:, :, 2].transpose(1, 2))
    part = taught.observe(x, CaptureRequest(features={0}))
    assert torch.equal(part.features[0], outputs[0]) and not part.seen and part.logits is None
    assert set(taught.observe(x, CaptureRequest(maps={1}, features={0})).seen) == {1}
    assert not taught.observe(x, CaptureRequest()).seen


@torch.no_grad()
def test_attention_after_the_blocks_is_pooling_and_no_blocks_map():
    made = timm.create_model("vit_pe_core_tiny_patch16_384", img_size=64, depth=2, embed_dim=96, num_heads=3)
    taught = conversion.teacher_from(made.eval())
    x = images(64)
    whole = taught.observe(x, CaptureRequest(maps=frozenset({1}), logits=True))
    assert torch.equal(whole.logits, taught(x))
    assert set(whole.seen) == {1}
    assert whole.seen[1].qk.q.shape[-2] == taught.network.tokens  # pooling has one query
