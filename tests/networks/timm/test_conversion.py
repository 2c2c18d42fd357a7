"""Networks as they are published: found by inspection, rebuilt as ours, and taught from, two blocks of each."""

import copy
from functools import cache

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from atdiag.core.errors import UserError
from atdiag.core.spec import Network, Transfer
from atdiag.networks.model import components, students
from atdiag.networks.model.vit import ViT
from atdiag.networks.registry import teachers
from atdiag.networks.timm import conversion, inspection
from atdiag.networks.timm.wrapping import Foreign
from atdiag.transfer import methods, ops
from atdiag.transfer.observation import CaptureRequest, Observation, of_teacher


def narrow(row: teachers.TeacherEntry) -> dict:
    """Arguments that leave a large network three heads of its own width: what is tested does not depend on how many."""
    if row.size == "s":
        return {}
    return {"num_heads": 3, "embed_dim": 3 * row.width // row.heads}


# Every row of the registry -> timm's name, arguments, and what inspection must find. (Sizes and heads of the whole
# networks are compared with timm's in test_teachers.)
FAMILIES: dict[str, tuple[str, dict, tuple[str, ...]]] = {
    row.name: (row.model, {**row.arguments, **narrow(row)}, row.components or ())
    for row in teachers.registry().values()
}
PLAIN: tuple[str, ...] = ()
BEIT = ("layer_scale", "mean_pool", "no_abs_pos", "no_k_bias", "rel_pos_bias")
SMALL = {"embed_dim": 96, "num_heads": 3, "num_classes": 5}
OTHERS: dict[str, tuple[str, dict, tuple[str, ...]]] = {
    "eva giant": ("eva_giant_patch14_224", {"embed_dim": 176, "num_heads": 2}, ("mean_pool", "no_k_bias")),
    "mean and registers, no class token": (
        "vit_medium_patch16_reg4_gap_256",
        SMALL,
        ("layer_scale", "registers"),
    ),
    "registers with positions": (
        "vit_small_patch14_reg4_dinov2",
        SMALL | {"no_embed_class": False},
        FAMILIES["dinov2_reg_s"][2],
    ),
    "one table for all blocks": (
        "beit_base_patch16_224",
        SMALL | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "use_abs_pos_emb": True},
        ("layer_scale", "mean_pool", "no_k_bias", "rel_pos_bias"),
    ),
    "both kinds of tables": ("beit_base_patch16_224", SMALL | {"use_shared_rel_pos_bias": True}, BEIT),
    "the class token of a beit": (
        "beit_base_patch16_224",
        SMALL | {"global_pool": "token"},
        tuple(name for name in BEIT if name != "mean_pool"),
    ),
    "a norm after the class token": ("deit_small_patch16_224", SMALL | {"fc_norm": True}, PLAIN),
    "separate projections": ("eva_giant_patch14_224", SMALL | {"qkv_fused": False}, ("mean_pool", "no_k_bias")),
    "all biases, separate": (
        "eva_giant_patch14_224",
        SMALL | {"qkv_fused": False, "attn_type": "rope"},
        ("mean_pool",),
    ),
    "a mean beside a class token": ("vit_small_patch16_224", SMALL | {"global_pool": "avg"}, ("mean_pool",)),
    "images of another size": ("vit_small_patch16_224", SMALL | {"dynamic_img_size": True}, PLAIN),
}
FOREIGN: dict[str, tuple[str, dict, set[str]]] = {
    "eva02": ("eva02_small_patch14_224", {}, {"rope", "swiglu"}),
    "eva02 clip": ("eva02_base_patch16_clip_224", SMALL, {"rope", "swiglu", "attn_norm", "mlp_norm"}),
    "dinov3": ("vit_small_patch16_dinov3", {}, {"rope", "no_qkv_bias", "norm_before_pool"}),
    "dinov3 with biases": ("vit_small_plus_patch16_dinov3_qkvb", SMALL, {"rope", "swiglu", "norm_before_pool"}),
    "distilled deit": ("deit_small_distilled_patch16_224", SMALL, {"distillation_token"}),
    "mixed rope": ("vit_base_patch16_rope_mixed_224", SMALL, {"rope"}),
    "parallel": ("vit_base_patch16_xp_224", SMALL, {"parallel_blocks", "qk_norm", "no_layer_norm"}),
    "grouped": (
        "vit_base_patch16_sapiens2",
        SMALL | {"num_heads": 4, "num_kv_heads": (4, 2), "img_size": 64},
        {"rope", "swiglu", "qk_norm", "grouped_queries", "no_layer_norm", "one_layer_scale", "uneven_blocks"},
    ),
    "beit3": ("beit3_base_patch16_224", SMALL, {"attn_norm", "mlp_norm"}),
    "post norm": ("vit_base_patch16_rpn_224", SMALL, {"post_norm", "no_qkv_bias"}),
    "siglip so400m": ("vit_so400m_patch16_siglip_256", SMALL, {"gelu_tanh"}),
    "beit with swiglu": ("beit_base_patch16_224", SMALL | {"swiglu_mlp": True}, {"swiglu"}),
    "a mean of normed tokens": ("vit_base_patch16_siglip_gap_224", SMALL, {"norm_before_pool"}),
}


@cache
def model(name: str) -> nn.Module:
    """A network of the tables above, in eval mode. Shared between tests: not to be changed."""
    return build(name)


def build(name: str) -> nn.Module:
    """A network of the tables above, with every parameter away from its initial value."""
    timms, options, _ = (FAMILIES | OTHERS | FOREIGN)[name]
    side = 4 * (14 if "patch14" in timms else 16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = timm.create_model(timms, pretrained=False, **({"img_size": side, "depth": 2} | options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            spread = 0.2 if parameter.ndim == 1 or parameter.shape[0] == 1 else 0.02
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
        for table in (p for n, p in made.named_parameters() if "relative_position_bias_table" in n):
            torch.nn.init.normal_(table, generator=generator)
    return made.eval().requires_grad_(False)


def images(side: int) -> torch.Tensor:
    """Two images in [0, 1]."""
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def normalised(x: torch.Tensor, of: nn.Module) -> torch.Tensor:
    """Images as timm's network wants them."""
    mean, std = (torch.tensor(of.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (x - mean) / std


def maps_by_hooks(of: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The maps [B, H, N, N] as timm's own formula makes them: what enters the dropout of each block's attention."""
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


@cache
def teacher(name: str) -> ViT | Foreign:
    return conversion.teacher_from(copy.deepcopy(model(name)))


def assert_close(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


OURS = [*FAMILIES, *OTHERS]


# What a network is


@pytest.mark.parametrize("name", OURS)
def test_inspection_finds_what_a_network_has(name):
    of, network = model(name), conversion.describe(model(name))
    assert network.components == tuple(sorted((FAMILIES | OTHERS)[name][2])) and not network.differences
    heads = [block.attn.num_heads for block in of.blocks]
    assert (network.depth, network.width, network.heads) == (len(heads), of.embed_dim, heads[0])
    assert network.grid**2 == of.patch_embed.num_patches
    assert network.tokens == of.forward_features(torch.zeros(1, 3, network.image_size, network.image_size)).shape[1]
    assert network.classes == (of.head.out_features if isinstance(of.head, nn.Linear) else 1)
    assert network.layer_scale_init in (None, 0.1, 1e-5, 1e-6)  # not the values that have been learned since


@pytest.mark.parametrize("name", FOREIGN)
def test_what_no_student_can_be_given_is_named(name):
    network = conversion.describe(model(name))
    assert set(network.differences) == FOREIGN[name][2]
    with pytest.raises(ValueError, match="no ViT of ours computes the same function"):
        conversion.convert(model(name), network)
    assert not network.student(network.components).differences


def test_a_gated_mlp_counts_as_the_plain_one_with_as_many_weights():
    network = conversion.describe(model("eva02"))
    mlps = [sum(p.numel() for p in m.parameters() if p.ndim == 2) for m in (model("eva02").blocks[0].mlp,)]
    assert mlps == [2 * network.width * int(network.width * network.mlp_ratio)] and network.mlp_ratio == 4


@pytest.mark.parametrize(("width", "hidden"), [(1408, 6144), (1152, 4304), (768, 2730), (10, 3)])
def test_the_ratio_gives_the_width_of_the_mlp_back(width, hidden):
    assert int(width * inspection._ratio(hidden, width)) == hidden


NAMES = sorted(name for name, component in components.COMPONENTS.items() if not component.followed)


@given(names=st.sets(st.sampled_from(NAMES)), class_token=st.booleans(), channels=st.sampled_from([1, 3]))
def test_our_own_network_is_described_as_it_was_asked_for(names, class_token, channels):
    if "attention_pool" in names or not class_token:
        names -= {"mean_pool"}
    network = Network(
        image_size=12,
        patch_size=4,
        channels=channels,
        width=12,
        depth=2,
        heads=3,
        mlp_ratio=2.5,
        class_token=class_token,
        classes=5,
        norm_eps=1e-3 if "ln_eps" in names else 1e-6,
        mean=(0.1, 0.2, 0.3)[:channels],
        std=(1.0, 2.0, 4.0)[:channels],
        components=tuple(names),
        layer_scale_init=0.3 if "layer_scale" in names else None,
        registers=3 if "registers" in names else 0,
    )
    assert conversion.describe(students.build(network, 0)) == network


def test_normalisation_is_taken_from_timms_configuration_or_given():
    assert conversion.describe(model("clip_b")).mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert conversion.describe(model("clip_b"), mean=(0.5,), std=(0.2, 0.2, 0.2)).std == (0.2,)
    bare = VisionTransformer(img_size=32, embed_dim=12, depth=1, num_heads=2)
    with pytest.raises(UserError, match=r"with which mean.*give its mean"):
        conversion.describe(bare)
    assert conversion.describe(bare, (0.5,), (0.5,)).tokens == 5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet18", "no self-attention"),
        ("convnext_atto", "no self-attention"),
        ("mixer_s32_224", "no self-attention"),
        ("swin_tiny_patch4_window7_224", "within windows"),
        ("xcit_nano_12_p16_224", "across channels"),
        ("cait_xxs24_224", "talking heads"),
        ("pvt_v2_b0", "from stage to stage"),
        ("vit_tiny_r_s16_p8_224", r"more than one linear layer \(HybridEmbed\)"),
        ("vit_small_patch16_18x2_224", r"its blocks \(ParallelThingsBlock\)"),
        ("vit_relpos_small_patch16_224", "not one of timm's classes"),
        ("convit_tiny", "not one of timm's classes"),
    ],
)
def test_what_is_no_vit_with_softmax_attention_is_refused_with_the_reason(name, reason):
    with torch.device("meta"):
        made = timm.create_model(name, pretrained=False)
    with pytest.raises(UserError, match=rf"{type(made).__name__} can't be a teacher: .*{reason}"):
        conversion.teacher_from(made)


def test_a_subclass_is_refused_because_its_parts_do_not_show_what_it_changes():
    class Mine(VisionTransformer):
        pass

    with pytest.raises(UserError, match="Mine can't be a teacher"):
        conversion.describe(Mine(img_size=32, embed_dim=12, depth=1, num_heads=2), (0.5,), (0.5,))


@pytest.mark.parametrize("options", [{"img_size": (32, 64)}, {"img_size": 32, "patch_size": (8, 16)}, {"img_size": 50}])
def test_only_square_grids_that_fit_are_taken(options):
    bare = VisionTransformer(embed_dim=12, depth=1, num_heads=2, **options)
    with pytest.raises(UserError, match=r"not square|not a multiple"):
        conversion.describe(bare, (0.5,), (0.5,))


def test_blocks_that_differ_are_a_difference():
    bare = VisionTransformer(img_size=32, embed_dim=12, depth=2, num_heads=2)
    bare.blocks[1].mlp.act = nn.ReLU()
    assert conversion.describe(bare, (0.5,), (0.5,)).differences == ("relu", "uneven_blocks")
    bare.blocks[1].mlp.act, bare.blocks[1].norm1.eps = nn.GELU(), 1e-3
    assert conversion.describe(bare, (0.5,), (0.5,)).differences == ("uneven_ln_eps",)


# The same function as ours


@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_our_network_is_the_same_function(name):
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
    """So that equality means something: the output moves with each of the source's parameters."""
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


@pytest.mark.parametrize("name", [*FAMILIES, "eva02", "dinov3", "distilled deit"])
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
    for vit in (student, ours):  # with no head of its own, what the head would read is compared
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
    assert copied.shape == (2, 3) and not torch.allclose(copied, logits)
    for transfer in (Transfer(method="distill", layers=(0, 1), tensor="v"), Transfer(method="features", layers=(1,))):
        assert methods.forward(student, transfer, x, shown).loss.isfinite()
