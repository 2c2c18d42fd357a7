"""nnsight's reading against plain hooks and against our own attention module, for whatever can be read."""

import gc
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from atdiag.analysis import images, streaming, subjects, tracing
from atdiag.core.errors import UserError
from atdiag.core.spec import Data, Network
from atdiag.networks.model import students
from atdiag.networks.registry import teachers
from atdiag.networks.timm import conversion, inspection
from atdiag.training import evaluation
from atdiag.transfer import methods, ops
from atdiag.transfer.observation import CaptureRequest

DATA = Data(name="digits", train=1, clutter=6)
TIMM = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch16_36x1_224": {},
    "vit_small_patch14_reg4_dinov2": {},
    "vit_base_patch16_clip_quickgelu_224": {},
    "vit_base_patch16_siglip_224": {},
    "deit3_small_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "beit_base_patch16_224": {},
    "beitv2_base_patch16_224": {},
    "eva02_tiny_patch14_224": {},
    "vit_small_patch16_dinov3": {},
    "vit_base_patch16_rope_224": {},
    "vit_so150m_patch16_reg4_gap_256": {},
}


def build(name, **arguments):
    """A timm architecture with random weights, small, and biases and scales that are not neutral."""
    size = 28 if "14" in name else 32
    small = {"img_size": size, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5, **arguments}
    torch.manual_seed(0)
    model = timm.create_model(name, **small)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def pictures(subject, count=4, seed=0):
    network = subject.network
    shape = (count, network.channels, network.image_size, network.image_size)
    return images.from_arrays(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def pixels(some):
    return next(some.batches(len(some))).pixels


def hooked(subject, given, some):
    """What plain hooks see: outputs of each block's modules and, of our attention, the block's own arguments."""
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


def test_of_every_miniature_is_what_hooks_and_our_own_module_see():
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
def test_of_timms_networks_is_what_hooks_see(name, fused):
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

    # With fused attention off, timm hands its map to the module attn_drop: an independent witness.
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


def test_most_of_timms_networks_can_be_ours():
    assert len(OURS) >= 8


@pytest.mark.parametrize("name", sorted(OURS))
def test_of_timms_networks_is_what_our_own_attention_sees(name):
    """The same weights in our own attention module, whose map is taken where it forms it: no nnsight, no hook."""
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


def test_leaves_the_network_as_it_was():
    model = build("vit_tiny_patch16_224")
    subject = subjects.of(model, "mine")
    some = pictures(subject)
    before, state = subject.module(pixels(some)), {m: set(m.__dict__) for m in model.modules()}
    streaming.trace(subject, some)
    assert torch.equal(before, subject.module(pixels(some)))
    assert {m: set(m.__dict__) for m in model.modules()} == state


def test_leaves_the_process_as_it_was():
    code = """
from atdiag.analysis import images, streaming, subjects
from atdiag.core.spec import Data
subject = subjects.find("deit_s")
streaming.trace(subject, images.choose(1, Data(name="digits", train=1), subject.network))
assert not hasattr(object(), "save")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def pair():
    """A teacher with registers and a student without, of depth 3."""
    plain = Network(image_size=20, patch_size=4, channels=1, width=24, depth=3, heads=3, classes=10)
    native = plain.model_copy(update={"components": ("registers", "rel_pos_bias"), "registers": 2})
    return students.build(plain, 0).eval(), students.build(native, 1).eval()


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
def test_a_student_that_copies_uses_what_is_its_teachers(pair, form):
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
    for layer in range(3):  # whatever was given: the map that was read, on the values, gives the module's output
        assert torch.equal(found["attn", layer], expected["attn", layer])
        mixed = found["map", layer] @ found["v", layer]
        out = student.blocks[layer].attn.proj(mixed.transpose(1, 2).flatten(2))
        torch.testing.assert_close(out, found["attn", layer], atol=1e-5, rtol=1e-4)


def test_streaming_equals_one_shot_and_means_equal_means():
    subject = subjects.find("dinov2_reg_s")
    some = images.choose(23, DATA, subject.network)
    whole = streaming.trace(subject, some, tracing.WHAT, (3, 7), batch=23)
    for batch in (1, 5):
        for key, value in streaming.trace(subject, some, tracing.WHAT, (3, 7), batch=batch).items():
            torch.testing.assert_close(value, whole[key], atol=1e-5, rtol=1e-4)
    for key, value in streaming.trace(subject, some, tracing.WHAT, (3, 7), mean=True, batch=4).items():
        torch.testing.assert_close(value, whole[key].double().mean(0), atol=1e-5, rtol=1e-4)


def test_heads_and_layers_are_those_asked_for():
    subject = subjects.find("clip_b")
    some = images.choose(2, DATA, subject.network)
    whole = streaming.trace(subject, some, ("map", "residual"))
    part = streaming.trace(subject, some, ("map", "residual"), (11, 2), heads=(2, 0))
    assert set(part) == {(what, layer) for what in ("map", "residual") for layer in (2, 11)}
    assert torch.equal(part["map", 2], whole["map", 2][:, [2, 0]])
    assert torch.equal(part["residual", 11], whole["residual", 11])


def live() -> int:
    gc.collect()
    return sum(x.numel() for x in gc.get_objects() if issubclass(type(x), torch.Tensor))


def test_memory_is_flat_in_the_number_of_images():
    subject = subjects.find("deit_s")
    want = tracing.request(subject, tracing.WHAT, (0, 5))
    peaks = {}
    for count in (100, 2000):
        some, mean = images.choose(count, DATA, subject.network), streaming.Mean(("map", "residual"))
        before, peak = live(), 0
        for n, (traced,) in enumerate(streaming.stream([(subject, want)], some, 50)):
            mean.add(traced)
            if n in (1, count // 50 - 1):
                peak = max(peak, live() - before)
        peaks[count] = peak
        del traced
        assert mean.count == count
    assert 0 < peaks[2000] == peaks[100]


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


class Calls(nn.Module):
    """Attention that calls the fused operation in its own way."""

    def __init__(self, attn, **options):
        super().__init__()
        self.qkv, self.proj, self.options = attn.qkv, attn.proj, options

    def forward(self, x, **unused):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, **self.options)
        return self.proj(out.transpose(1, 2).flatten(2))


def test_a_scale_and_a_bias_of_its_own_are_in_the_map():
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
    """A block that leaves its attention out."""

    def __init__(self, block):
        super().__init__()
        self.attn, self.mlp = block.attn, block.mlp

    def forward(self, x):
        return x + self.mlp(x)


def test_the_wrong_kind_of_block_is_named_with_its_layer():
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


@pytest.mark.parametrize("what", ["q", "k", "v", "logits"])
def test_what_explicit_attention_does_not_show_is_named_with_its_layer(what):
    model = build("vit_tiny_patch16_224", depth=3)
    model.blocks[1].attn.fused_attn = False
    subject = subjects.of(model, "half")
    message = f"layer 1 of half has its fused attention off: its map can be read there, its {what} can't.*fused_attn"
    with pytest.raises(UserError, match=message):
        streaming.trace(subject, pictures(subject), ("map", what))
    assert set(streaming.trace(subject, pictures(subject), ("map", what), (0, 2))) == {
        (name, layer) for name in ("map", what) for layer in (0, 2)
    }
    assert ("map", 1) in streaming.trace(subject, pictures(subject))


def test_a_map_that_was_given_as_it_is_has_no_queries(pair):
    student, teacher = pair
    transfer = methods.Transfer(method="copy", layers=(0, 2), average="heads")
    subject = subjects.Subject("copy", evaluation.Predictor(student, transfer, teacher), student.network)
    with pytest.raises(tracing.TracingError, match="layer 0 of copy has no k, logits: its map was given"):
        streaming.trace(subject, pictures(subject), ("logits", "k"))
    assert ("q", 1) in streaming.trace(subject, pictures(subject), ("q",), (1,))


def test_attention_that_is_never_called_is_no_map_but_an_error():
    """Zero captures: the module is there and its source has softmax attention, and the block goes around it."""
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


def test_what_is_out_of_range_is_said_in_one_line():
    subject = subjects.find("deit_s")
    for arguments, message in (
        ({"layers": (12,)}, "layer 12 is out of range: deit_s .mini. has 12 blocks, 0 to 11"),
        ({"heads": (2,)}, "head 2 is out of range"),
        ({"what": ("maps",)}, "did you mean 'map'"),
    ):
        with pytest.raises(UserError, match=message):
            streaming.trace(subject, pictures(subject), **arguments)
