"""Errors for what can't be traced name the layer."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from atdiag.analysis import images, streaming, subjects, tracing
from atdiag.core.errors import UserError
from atdiag.training import evaluation
from atdiag.transfer import methods
from tests.analysis.timm_networks import Calls, build, pictures


# What can't be read
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet18", {}, "ResNet"),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": (1, 1, 1, 1)}, "Swin"),
        ("mixer_s32_224", {}, "Mixer"),
        ("cait_xxs24_224", {"img_size": 32, "depth": 2}, "talking heads"),
        ("xcit_nano_12_p16_224", {}, "across channels"),
    ],
)
def test_a_network_without_softmax_attention_is_refused(name, arguments, message):
    with pytest.raises(UserError, match=message):
        subjects.of(timm.create_model(name, **arguments), name)


class Mixes(nn.Module):
    """Attention whose heads are mixed after softmax: no head has a map of its own."""

    def __init__(self, attn):
        super().__init__()
        self.qkv, self.proj = attn.qkv, attn.proj

    def forward(self, x, **unused):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        p = (q @ k.transpose(-2, -1)).softmax(-1).flip(1)
        return self.proj((p @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_causal": True}, "layer 1: it attends with a causal mask or dropout"),
        ({"dropout_p": 0.1}, "layer 1: it attends with a causal mask or dropout"),
        ({"attn_mask": torch.ones(5, 5, dtype=torch.bool)}, "layer 1: a mask of torch.bool, .5, 5., is no bias"),
    ],
    ids=str,
)
def test_attention_that_is_no_map_over_all_tokens_is_named_with_its_layer(options, message):
    model = build("vit_tiny_patch16_224", depth=2)
    subject = subjects.of(model, "calls")
    assert subject.network.tokens == 5
    model.blocks[1].attn = Calls(model.blocks[1].attn, **options)
    with pytest.raises(tracing.TracingError, match=message):
        streaming.trace(subject, pictures(subject))


class Skips(nn.Module):
    """A block that skips its attention."""

    def __init__(self, block):
        super().__init__()
        self.attn, self.mlp = block.attn, block.mlp

    def forward(self, x):
        return x + self.mlp(x)


def test_a_block_without_softmax_attention_is_named_with_its_layer():
    model = build("vit_tiny_patch16_224", depth=3)
    subject = subjects.of(model, "mixes")
    model.blocks[1].attn = Mixes(model.blocks[1].attn)
    with pytest.raises(UserError, match=r"layer 1 of mixes \(Mixes\) has no softmax attention"):
        streaming.trace(subject, pictures(subject))


def test_a_block_that_is_not_run_is_named_with_its_layer():
    model = build("vit_tiny_patch16_224", depth=3)
    subject = subjects.of(model, "skips")
    model.blocks[1] = Skips(model.blocks[1])
    with pytest.raises(tracing.TracingError, match="layer 1"):
        streaming.trace(subject, pictures(subject))
    assert streaming.trace(subject, pictures(subject), layers=(0, 2)).keys() == {("map", 0), ("map", 2)}


def test_explicit_attention_shows_what_fused_attention_does():
    model = build("vit_tiny_patch16_224", depth=3)
    subject = subjects.of(model, "half")
    fused = streaming.trace(subject, pictures(subject), tracing.WHAT)
    model.blocks[1].attn.fused_attn = False
    half = streaming.trace(subject, pictures(subject), tracing.WHAT)
    assert not model.blocks[1].attn.fused_attn
    for key, value in fused.items():
        torch.testing.assert_close(half[key], value, atol=1e-5, rtol=1e-4)


def test_a_map_given_as_a_tensor_has_no_queries(pair):
    student, teacher = pair
    transfer = methods.Transfer(method="copy", layers=(0, 2), average="heads")
    subject = subjects.Subject("copy", evaluation.Predictor(student, transfer, teacher), student.network)
    with pytest.raises(tracing.TracingError, match="layer 0 of copy has no k, logits: its map was given"):
        streaming.trace(subject, pictures(subject), ("logits", "k"))
    assert ("q", 1) in streaming.trace(subject, pictures(subject), ("q",), (1,))


def test_attention_that_is_never_called_is_an_error():
    """Zero captures: the module's source has softmax attention, but the block never calls it."""
    model = build("vit_tiny_patch16_224", depth=3)
    subject = subjects.of(model, "around")
    model.blocks[2] = Skips(model.blocks[2])
    for what in (("map",), ("attn",)):
        with pytest.raises(tracing.TracingError, match="layer 2: attn"):
            streaming.trace(subject, pictures(subject), what, (2,))


def test_images_of_another_size_are_refused_in_one_line():
    subject = subjects.find("deit_s")
    some = images.from_arrays(np.zeros((2, 3, 32, 32), np.uint8))
    with pytest.raises(UserError, match=r"deit_s .mini. sees images of 20 x 20 x 1, and these are \[3, 32, 32\]"):
        streaming.trace(subject, some)


def test_nan_is_named_with_its_layer():
    model = build("vit_tiny_patch16_224", depth=3)
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[0] = float("nan")
    subject = subjects.of(model, "nan")
    with pytest.raises(tracing.TracingError, match="layer 1 of nan: its residual"):
        streaming.trace(subject, pictures(subject), ("residual",))
    with pytest.raises(tracing.TracingError, match=r"layer 2 of nan: its [qkv] is"):
        streaming.trace(subject, pictures(subject))


def test_out_of_range_layers_and_heads_are_refused_in_one_line():
    subject = subjects.find("deit_s")
    for arguments, message in (
        ({"layers": (12,)}, "layer 12 is out of range: deit_s .mini. has 12 blocks, 0 to 11"),
        ({"heads": (2,)}, "head 2 is out of range"),
        ({"what": ("maps",)}, "did you mean 'map'"),
    ):
        with pytest.raises(UserError, match=message):
            streaming.trace(subject, pictures(subject), **arguments)
