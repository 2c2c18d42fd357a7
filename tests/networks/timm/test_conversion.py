"""Published networks converted to ours: the same function, usable as teachers."""

import copy
import re

import pytest
import torch
from torch import nn

from atdiag.core.spec import Network, Transfer
from atdiag.networks.model import students
from atdiag.networks.model.vit import ViT
from atdiag.networks.timm import conversion
from atdiag.transfer import methods, ops
from atdiag.transfer.observation import CaptureRequest, Observation, of_teacher
from tests.networks.timm.published import FAMILIES, FOREIGN, OURS, images, model, normalised, teacher


def maps_by_hooks(of: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the maps [B, H, N, N] of timm's explicit formula: the input of each block's attention dropout."""
    seen: list[torch.Tensor] = []
    places = [getattr(block, "attn", block) for block in of.blocks]
    hooks = [place.attn_drop.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0])) for place in places]
    before = [place.fused_attn for place in places]
    for place in places:
        place.fused_attn = False
    try:
        of(normalised(x, of))
    finally:
        for hook, place, fused in zip(hooks, places, before, strict=True):
            hook.remove()
            place.fused_attn = fused
    assert len(seen) == len(places)
    return seen


def assert_close(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


# --- the same function as ours ---------------------------------------------------------------------------------------


# The same function
@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_the_converted_network_is_the_same_function(name):
    of, ours = model(name), teacher(name)
    assert isinstance(ours, ViT) and not ours.training and not any(p.requires_grad for p in ours.parameters())
    x = images(ours.network.image_size)
    tokens = ours.norm(ours.blocks(ours.embed(x)))
    expected = of.forward_features(normalised(x, of))
    moved = isinstance(of.norm, nn.Identity) and not isinstance(ours.norm, nn.Identity)
    assert moved == (name == "a norm after the class token")
    assert_close(tokens, of.fc_norm(expected) if moved else expected)
    if isinstance(of.head, nn.Linear):
        assert_close(ours(x), of(normalised(x, of)))
    else:
        pooled = ours.forward_head(tokens, pre_logits=True)
        assert_close(pooled, of(normalised(x, of)))
        assert not ours(x).any() and ours(x).shape == (2, 1)


@pytest.mark.parametrize("name", OURS)
def test_every_parameter_matters(name):
    """So that equality means something: the output depends on each of the source's parameters."""
    of = copy.deepcopy(model(name))
    out = of.requires_grad_(True)(normalised(images(conversion.describe(of).image_size), of))
    out.square().sum().backward()
    unread = {n for n, p in of.named_parameters() if p.grad is None or not p.grad.any()}
    assert not unread


@pytest.mark.parametrize("name", OURS)
def test_the_native_student_has_the_teachers_keys(name):
    ours = teacher(name)
    native = students.build(ours.network.student(ours.network.components), 0).state_dict()
    assert list(native) == list(ours.state_dict())
    assert all(native[key].shape == tensor.shape for key, tensor in ours.state_dict().items())
    if name in FAMILIES:  # and timm's, up to BEiT's names
        theirs = {
            key.replace("gamma_", "ls").replace("attn.rel", "attn.rel_pos_bias.rel") for key in model(name).state_dict()
        }
        theirs = {re.sub(r"attn\.[qkv]_proj\.weight", "attn.qkv.weight", key) for key in theirs}  # EVA-02's
        theirs = {re.sub(r"attn\.([qkv])_proj\.bias", r"attn.\1_bias", key) for key in theirs}
        fixed = {f"{key}.gamma" if key.endswith(("ls1", "ls2")) else key for key in theirs}
        assert {key for key in fixed if "head." not in key} == {key for key in native if "head." not in key}


@pytest.mark.parametrize("name", ["deit_s", "beitv2_b"])
def test_a_weight_without_a_place_or_a_parameter_without_a_weight_is_named(name):
    network = conversion.describe(model(name))
    has, lacks = network.model_dump(), network.model_dump()
    has |= {"components": (*network.components, "pre_norm")}
    lacks |= {"depth": 1}
    with pytest.raises(ValueError, match=r"no weights for norm_pre\.bias, norm_pre\.weight"):
        conversion.convert(model(name), Network.model_validate(has))
    with pytest.raises(ValueError, match=r"no place for blocks\.1.*blocks\.1\.norm1\.bias"):
        conversion.convert(model(name), Network.model_validate(lacks))
    with pytest.raises(ValueError, match=r"another shape of head\.bias \(\(\d+,\) for \(3,\)\)"):
        conversion.convert(model(name), network.model_copy(update={"classes": 3}))


# --- transfer from every family --------------------------------------------------------------------------------------


# Transfer from every family
@pytest.mark.parametrize("name", [*OURS, *FOREIGN])
@torch.no_grad()
def test_maps_are_those_of_timms_own_formula(name):
    of, taught = model(name), teacher(name)
    x = images(taught.network.image_size)
    maps = taught.maps(x, (0, 1))
    for layer, expected in enumerate(maps_by_hooks(of, x)):
        torch.testing.assert_close(ops.logits(maps[layer]).softmax(-1), expected, rtol=1e-4, atol=1e-6)
        assert expected.std() > 1e-4  # not uniform
    alone = taught.maps(x, (0,))
    assert list(alone) == [0] and torch.equal(alone[0].q, maps[0].q)


@pytest.mark.parametrize("name", [*FAMILIES, "eva02", "dinov3", "distilled deit", "naflex"])
def test_maps_are_what_nnsight_traces(name):
    nnsight = pytest.importorskip("nnsight")
    of, taught = copy.deepcopy(model(name)), teacher(name)
    assert of.blocks[0].attn.fused_attn
    x, traced = images(taught.network.image_size), {}
    wrapped = nnsight.NNsight(of)
    with wrapped.trace(normalised(x, of)):
        for layer in (0, 1):
            inputs = wrapped.blocks[layer].attn.source.F_scaled_dot_product_attention_0.inputs
            traced[layer] = nnsight.save(inputs)
    for layer, qk in taught.maps(x, (0, 1)).items():
        (q, k, _), options = traced[layer]
        bias = options["attn_mask"]
        assert (bias is None) == (qk.bias is None)
        expected = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + (0 if bias is None else bias)
        torch.testing.assert_close(ops.logits(qk).softmax(-1), expected.softmax(-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_self_copy_is_exact_and_needs_the_teachers_maps(name):
    ours = copy.deepcopy(teacher(name))
    network = ours.network
    student = ViT(network)
    student.load_state_dict(ours.state_dict())
    redrawn = students.build(network, 7)
    for block, other in zip(student.blocks, redrawn.blocks, strict=True):
        for key, parameter in block.attn.unused_parameters().items():
            parameter.copy_(other.attn.get_parameter(key))
    x, transfer = images(network.image_size), Transfer(method="copy", layers=(0, 1))
    shown = ours.observe(x, of_teacher([transfer]))
    for vit in (student, ours):  # without a head, its input is compared
        vit.head = nn.Identity() if not isinstance(model(name).head, nn.Linear) else vit.head
    expected = ours(x)
    found = methods.forward_test(student, transfer, x, shown)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    off = methods.forward_test(student, Transfer(), x, Observation())
    assert (off - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("name", [*FAMILIES, *FOREIGN])
def test_a_student_learns_from_every_teacher(name, native):
    taught = teacher(name)
    network = taught.network.student(taught.network.components if native else (), classes=3)
    student, x = students.build(network, 0), images(network.image_size)
    tokens = taught.shared_tokens(network)
    with torch.no_grad():
        shown = taught.observe(x, CaptureRequest(maps={0, 1}, values={0, 1}, features={1}))
    if tokens is not None:
        shown = shown.select(tokens)
    distill = Transfer(method="distill", layers=(0, 1))
    logits, loss = methods.forward(student, distill, x, shown)
    assert logits.shape == (2, 3) and loss.isfinite()
    (logits.logsumexp(1).mean() + loss).backward()
    for key, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    copied = methods.forward_test(student.eval(), Transfer(method="copy", layers=(0, 1)), x, shown)
    assert copied.shape == (2, 3) and not torch.equal(copied, logits)  # DINOv3's LayerScale begins at 1e-5
    for transfer in (Transfer(method="distill", layers=(0, 1), tensor="v"), Transfer(method="features", layers=(1,))):
        assert methods.forward(student, transfer, x, shown).loss.isfinite()
