"""Our ViT beside timm's: the same function, and maps that nnsight confirms independently."""

import copy
import pickle
from functools import partial

import pytest
import torch
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from atdiag.core.spec import Network
from atdiag.networks.model import students
from atdiag.networks.model.vit import ViT
from atdiag.networks.registry import teachers
from atdiag.transfer import ops
from atdiag.transfer.attention import AttentionOverride
from atdiag.transfer.observation import CaptureRequest

TIMM_ARGUMENTS = {
    "deit_s": {},
    "dinov2_s": {"init_values": 0.1},
    "dinov2_reg_s": {"init_values": 0.1, "reg_tokens": 4, "no_embed_class": True},
    "clip_b": {"pre_norm": True, "act_layer": "quick_gelu"},
    "siglip2_b": {"class_token": False, "global_pool": "map"},
}
SHORT = Network(image_size=20, patch_size=4, channels=1, width=12, depth=4, heads=3, classes=5)


def timms(vit: ViT, **arguments) -> VisionTransformer:
    """Make timm's network with the same weights."""
    network = vit.network
    twin = VisionTransformer(
        img_size=network.image_size,
        patch_size=network.patch_size,
        in_chans=network.channels,
        num_classes=network.classes,
        embed_dim=network.width,
        depth=network.depth,
        num_heads=network.heads,
        norm_layer=partial(nn.LayerNorm, eps=network.norm_eps),
        **arguments,
    )
    twin.load_state_dict(vit.state_dict())
    return twin.eval().requires_grad_(False)


def normalised(images, network):
    return (images - network.mean[0]) / network.std[0]


def assert_same_logits(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def equal(one: ops.QK, other: ops.QK) -> bool:
    same_bias = one.bias is other.bias or torch.equal(one.bias, other.bias)
    return torch.equal(one.q, other.q) and torch.equal(one.k, other.k) and one.scale == other.scale and same_bias


@pytest.fixture(params=[SHORT, SHORT.model_copy(update={"components": ("rel_pos_bias",)})], ids=["plain", "bias"])
def vit(request, perturbed):
    return perturbed(request.param)


# The same function as timm's


@pytest.mark.parametrize("name", TIMM_ARGUMENTS)
@torch.no_grad()
def test_equals_timms_vision_transformer(name, perturbed, images):
    vit = perturbed(teachers.miniature_network(name))
    assert_same_logits(vit(images), timms(vit, **TIMM_ARGUMENTS[name])(normalised(images, vit.network)))


@torch.no_grad()
def test_equals_timms_beit(perturbed, images):
    vit = perturbed(teachers.miniature_network("beitv2_b"))
    network, state, table = vit.network, vit.state_dict(), "relative_position_bias_table"
    for i in range(network.depth):  # BEiT has its own names, and no bias of k
        attn = f"blocks.{i}.attn"
        state[f"{attn}.q_bias"], _, state[f"{attn}.v_bias"] = state.pop(f"{attn}.qkv.bias").chunk(3)
        vit.blocks[i].attn.k_bias.zero_()
        state[f"{attn}.{table}"] = state.pop(f"{attn}.rel_pos_bias.{table}")
        for n in (1, 2):
            state[f"blocks.{i}.gamma_{n}"] = state.pop(f"blocks.{i}.ls{n}.gamma")
    twin = Beit(
        img_size=20,
        patch_size=4,
        in_chans=1,
        num_classes=10,
        global_pool="token",
        embed_dim=network.width,
        depth=network.depth,
        num_heads=network.heads,
        init_values=0.1,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
    )
    twin.load_state_dict(state)
    assert_same_logits(vit(images), twin.eval()(normalised(images, network)))


def test_pixels_are_normalised_per_channel():
    network = SHORT.model_validate({**SHORT.model_dump(), "channels": 3, "mean": (0.1, 0.2, 0.3), "std": (1, 2, 4)})
    colour, plain = (students.build(n, 0) for n in (network, network.model_copy(update={"mean": (0,), "std": (1,)})))
    images = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    by_hand = torch.stack([(images[:, 0] - 0.1) / 1, (images[:, 1] - 0.2) / 2, (images[:, 2] - 0.3) / 4], dim=1)
    torch.testing.assert_close(colour(images), plain(by_hand))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_clones_are_equal(clone, vit, images):
    assert torch.equal(clone(vit)(images), vit(images))


def test_tokens_positions_and_position_biases_have_no_weight_decay():
    network = SHORT.model_copy(update={"components": ("registers", "rel_pos_bias"), "registers": 4})
    tables = {f"blocks.{i}.attn.rel_pos_bias.relative_position_bias_table" for i in range(4)}
    assert tables | {"pos_embed", "cls_token", "reg_token"} <= ViT(network).no_weight_decay()


def test_keep_factors_of_one_change_nothing(vit, images):
    assert torch.equal(vit(images, keep=torch.ones(4, 2, 4, 1, 1)), vit(images))


@pytest.mark.parametrize(("branch", "end"), [(0, "attn.proj"), (1, "mlp.fc2")])
@pytest.mark.parametrize("block", [0, 2])
@torch.no_grad()
def test_a_keep_factor_scales_one_branch_of_one_image(vit, images, block, branch, end):
    keep = torch.ones(4, 2, 4, 1, 1)
    keep[block, branch, 1] = 1.7
    scaled = copy.deepcopy(vit)
    for parameter in scaled.blocks[block].get_submodule(end).parameters():
        parameter.mul_(1.7)
    found, full, expected = vit(images, keep=keep), vit(images), scaled(images)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
    assert (expected[1] - full[1]).abs().max() > 1e-2
    torch.testing.assert_close(found[[0, 2, 3]], full[[0, 2, 3]])


# Maps


def test_maps_are_those_of_the_forward_pass_wherever_it_stops(vit, images):
    captured = used(vit, images, range(4))
    assert list(captured) == [0, 1, 2, 3]
    for layers in ((0,), (1,), (2,), (3,), (0, 2), (3, 1), range(4)):
        maps = vit.maps(images, layers)
        assert sorted(maps) == sorted(layers)
        assert all(equal(maps[layer], captured[layer]) for layer in layers)
        assert not any(x.requires_grad for qk in maps.values() for x in (qk.q, qk.k))
    assert vit.maps(images, ()) == {}


def used(vit, images, layers, given=None):
    """Return the maps that a full forward pass uses."""
    shown = vit.observe(images, CaptureRequest(maps=frozenset(layers), logits=True), given)
    assert torch.equal(shown.logits, vit(images, given))
    return {layer: seen.map for layer, seen in shown.seen.items()}


def test_observations_are_the_same_wherever_the_pass_stops(vit, images):
    """Values, residual stream and logits equal those of a full pass, and those of the blocks themselves."""
    full = vit.observe(images, CaptureRequest(maps={0}, values={1, 3}, features={0, 2}, logits=True))
    for layers in ({1}, {3}, {1, 3}):
        shown = vit.observe(images, CaptureRequest(values=frozenset(layers)))
        assert shown.logits is None and set(shown.seen) == layers
        assert all(
            torch.equal(shown.seen[i].v, full.seen[i].v) and equal(shown.seen[i].map, full.seen[i].map) for i in layers
        )
    assert torch.equal(vit.observe(images, CaptureRequest(features={2})).features[2], full.features[2])
    stream = vit.embed(images)
    for i in range(3):
        stream = vit.blocks[i](stream)
        if i in full.features:
            assert torch.equal(full.features[i], stream)
    assert not CaptureRequest() and (
        CaptureRequest(maps={1}) | CaptureRequest(features={2}, logits=True)
    ) == CaptureRequest(maps={1}, features={2}, logits=True)


def test_maps_run_no_further_than_needed(vit, images, monkeypatch):
    ran, projected = set(), []
    for name, module in vit.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
    for i, block in enumerate(vit.blocks):
        heads = block.attn._heads
        monkeypatch.setattr(
            block.attn,
            "_heads",
            lambda x, names, i=i, heads=heads, **kw: projected.append((i, names)) or heads(x, names),
        )
    vit.maps(images, (0, 2))
    assert projected == [(0, "qkv"), (1, "qkv"), (2, "qk")]
    assert {"blocks.0.mlp", "blocks.1.mlp", "blocks.2.norm1"} <= ran
    assert {name for name in ran if name.startswith("blocks.2")} <= {"blocks.2.norm1", "blocks.2.attn.rel_pos_bias"}
    assert not any(name.startswith(("blocks.3", "head", "norm.", "fc_norm")) for name in ran)


def test_a_given_map_is_used_in_its_block_only(vit, images):
    other = students.build(vit.network, 9).maps(images, (1,))
    captured = used(vit, images, (0, 1, 2), {1: AttentionOverride("map", other[1])})
    own = vit.maps(images, (0, 1, 2))
    assert captured[1] is other[1] and equal(captured[0], own[0]) and not equal(captured[2], own[2])


@pytest.mark.parametrize(("class_token", "kept"), [(True, [0, *range(5, 30)]), (False, list(range(4, 29)))])
def test_shared_tokens_skip_the_registers(class_token, kept):
    plain = SHORT.model_copy(update={"class_token": class_token})
    teacher = ViT(plain.model_copy(update={"components": ("registers",), "registers": 4}))
    assert teacher.shared_tokens(plain).tolist() == kept
    assert teacher.shared_tokens(teacher.network) is None and ViT(plain).shared_tokens(plain) is None


@pytest.mark.parametrize("name", ["deit_s", "dinov2_reg_s", "clip_b"])
def test_copied_maps_equal_nnsights_traces(name, perturbed, images):
    """On timm's own network, with fused attention on."""
    nnsight = pytest.importorskip("nnsight")
    vit = perturbed(teachers.miniature_network(name))
    twin, layers, traced = timms(vit, **TIMM_ARGUMENTS[name]), (0, 5, 11), {}
    assert twin.blocks[0].attn.fused_attn
    model = nnsight.NNsight(twin)
    with model.trace(normalised(images, vit.network)):
        for layer in layers:
            inputs = model.blocks[layer].attn.source.F_scaled_dot_product_attention_0.inputs
            traced[layer] = nnsight.save(inputs)
    maps, captured = vit.maps(images, layers), used(vit, images, layers)
    for layer in layers:
        (q, k, _), options = traced[layer]
        assert options["attn_mask"] is None
        expected = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        assert equal(maps[layer], captured[layer])
        torch.testing.assert_close(ops.logits(maps[layer]).softmax(-1), expected, rtol=1e-5, atol=1e-6)
