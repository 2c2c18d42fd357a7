"""Files of Hugging Face's transformers give the same maps and the same output as that library does."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from atdiag.core.errors import UserError
from atdiag.networks.registry import teachers
from atdiag.networks.weights import files, formats, loading
from atdiag.networks.weights.sources import WeightsError
from atdiag.transfer import ops

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'atdiag[dev]'")

SIZE, HEADS, TOLERANCE = 32, 3, 1e-5
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS, "image_size": SIZE, "patch_size": 8}
WIDE = {**SIZES, "intermediate_size": 96}
TEXT = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 1, "intermediate_size": 16, "vocab_size": 99}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
IMAGES = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Kind:
    """A class of transformers, and what of its output our network's must equal."""

    model: str
    config: str
    options: dict[str, Any]
    output: str = "logits"
    """``logits``, ``pooled`` (before a head), or ``hidden`` (the last hidden state)."""
    components: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


SCALE, BIAS = ("layer_scale",), ("layer_scale", "rel_pos_bias")
KINDS = {
    "vit": Kind("ViTForImageClassification", "ViTConfig", {**WIDE, "num_labels": 5}),
    "vit without a head": Kind("ViTModel", "ViTConfig", WIDE, "hidden", (), ("pooler.dense.weight",)),
    "vit, tanh, no bias": Kind(
        *("ViTForImageClassification", "ViTConfig"),
        {**WIDE, "num_labels": 5, "hidden_act": "gelu_new", "qkv_bias": False, "layer_norm_eps": 1e-3},
    ),
    "mae": Kind("ViTMAEModel", "ViTMAEConfig", {**WIDE, "mask_ratio": 0.0}, "hidden"),
    "deit": Kind("DeiTForImageClassification", "DeiTConfig", {**WIDE, "num_labels": 5}, "logits", ("registers",)),
    "deit distilled": Kind("DeiTForImageClassificationWithTeacher", "DeiTConfig", {**WIDE, "num_labels": 5}),
    "dinov2": Kind("Dinov2Model", "Dinov2Config", SIZES, "hidden", SCALE, ("embeddings.mask_token",)),
    "dinov2 classifier": Kind(
        *("Dinov2ForImageClassification", "Dinov2Config", {**SIZES, "num_labels": 5}, "hidden", SCALE),
        ("classifier.weight", "classifier.bias"),
    ),
    "dinov2 swiglu": Kind("Dinov2Model", "Dinov2Config", {**SIZES, "use_swiglu_ffn": True}, "hidden"),
    "dinov2 registers": Kind(
        *("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", SIZES, "hidden", ("layer_scale", "registers"))
    ),
    "beit": Kind(
        *("BeitForImageClassification", "BeitConfig"),
        *({**WIDE, "num_labels": 5, "use_relative_position_bias": True}, "logits", BIAS),
    ),
    "beit pre-trained": Kind(
        *("BeitForMaskedImageModeling", "BeitConfig"),
        {**WIDE, "use_shared_relative_position_bias": True, "use_mask_token": True, "vocab_size": 11},
        *("hidden", BIAS, ("lm_head.weight", "beit.embeddings.mask_token")),
    ),
    "beit, positions": Kind(
        *("BeitModel", "BeitConfig", {**WIDE, "use_absolute_position_embeddings": True, "use_mean_pooling": False}),
        *("hidden", SCALE),
    ),
    "clip tower": Kind("CLIPVisionModel", "CLIPVisionConfig", WIDE, "pooled", ("pre_norm", "quick_gelu")),
    "clip projection": Kind(
        *("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**WIDE, "hidden_act": "gelu"}, "hidden", ("pre_norm",)),
        ("visual_projection.weight",),
    ),
    "clip": Kind(
        *("CLIPModel", "CLIPConfig", {"vision_config": WIDE, "text_config": TEXT}, "hidden"),
        *(("pre_norm", "quick_gelu"), ("logit_scale", "text_model.final_layer_norm.bias")),
    ),
    "clip classifier": Kind(
        *("CLIPForImageClassification", "CLIPConfig", {"vision_config": WIDE, "num_labels": 5}),
        dropped=("vision_model.post_layernorm.weight",),
    ),
    "siglip tower": Kind("SiglipVisionModel", "SiglipVisionConfig", WIDE, "pooled"),
    "siglip": Kind(
        "SiglipModel", "SiglipConfig", {"vision_config": WIDE, "text_config": TEXT}, "hidden"
    ),
    "siglip classifier": Kind(
        *("SiglipForImageClassification", "SiglipConfig", {"vision_config": WIDE, "num_labels": 5}),
        dropped=("vision_model.head.probe",),
    ),
}  # fmt: skip


def network(kind):
    """Build the library's network, with weights that all matter."""
    config = getattr(transformers, kind.config)(**kind.options)
    config._attn_implementation = "eager"  # the only one that gives maps
    model = getattr(transformers, kind.model)(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def folder(model, path, form):
    """Write a folder: as the library's ``save_pretrained``, or a pickled state dict, whose names are others."""
    if form == "safetensors":
        model.save_pretrained(path)
    else:
        path.mkdir()
        torch.save(model.state_dict(), path / "pytorch_model.bin")
        model.config.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return path


AFTER = ("post_layernorm", "vision_model.post_layernorm", "layernorm")
"""The last norm of CLIP and of BEiT with a masked-image head, which their last hidden state has not passed."""


def normalised():
    return (IMAGES - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@torch.no_grad()
def told(model, kind):
    """Return the library's maps, one for each block, and its output."""
    tower = model.vision_model if kind.model in ("CLIPModel", "SiglipModel") else model
    extra = {"noise": torch.arange(16.0).expand(len(IMAGES), -1)} if kind.model == "ViTMAEModel" else {}
    out = tower(pixel_values=normalised(), output_attentions=True, **extra)
    if kind.output == "logits":
        return out.attentions, out.logits
    if kind.output == "pooled":
        return out.attentions, out.pooler_output
    if (last := getattr(out, "last_hidden_state", None)) is None:  # a classifier does not return it
        last = model.base_model(pixel_values=normalised()).last_hidden_state
    after = next(
        (n for n in AFTER if kind.model.startswith(("CLIP", "BeitForM")) and n in dict(model.named_modules())), ""
    )
    return out.attentions, model.get_submodule(after)(last) if after else last


@torch.no_grad()
def computed(teacher, kind):
    """Return the same of timm's network with the file's weights, before it is converted to ours."""
    source = teachers.source(teacher.name)
    model, _ = loading.load_source(source, source.file, SIZE)
    if kind.output == "logits":
        return model(normalised())
    features = model.forward_features(normalised())
    return features if kind.output == "hidden" else model.forward_head(features, pre_logits=True)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("name", KINDS)
def test_maps_and_output_are_the_librarys(name, form, tmp_path):
    kind = KINDS[name]
    model = network(kind)
    teacher = teachers.teacher(str(folder(model, tmp_path / "own", form)), "small", SIZE)
    assert teacher.label == "vit:own (own file)" and teacher.network.heads == HEADS
    assert teacher.network.mean == tuple(MEAN) and teacher.network.std == tuple(STD)
    assert set(kind.components) <= set(teacher.network.components)
    ours = loading.load(teacher)
    maps, output = told(model, kind)
    with torch.no_grad():
        for layer, qk in ours.maps(IMAGES, range(2)).items():
            torch.testing.assert_close(ops.probabilities(qk), maps[layer], rtol=0, atol=TOLERANCE)
        if kind.output == "logits":
            torch.testing.assert_close(ours(IMAGES), output, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(computed(teacher, kind), output, rtol=TOLERANCE, atol=TOLERANCE)
    assert set(kind.dropped) <= set(ours.origin.dropped)


# --- what is refused -----------------------------------------------------------------------------------------------


def refused(reference):
    with pytest.raises(UserError) as fault:
        teachers.teacher(str(reference), "small", SIZE)
    assert "\n" not in str(fault.value)
    return str(fault.value)


@pytest.fixture
def vit(tmp_path):
    return folder(network(KINDS["vit"]), tmp_path / "own", "safetensors")


def test_a_file_without_its_configuration_asks_for_what_it_told(vit):
    (vit / "config.json").unlink()
    (vit / "preprocessor_config.json").unlink()
    said = refused(vit / "model.safetensors")
    assert "does not show its heads (1, 2, 3 are possible) and how pixels are normalised" in said
    found = teachers.teacher(f"{vit}/model.safetensors#heads=3#pixels=inception", "small", SIZE)
    assert found.network.heads == 3 and set(found.network.mean) == {0.5} and found.network.norm_eps == 1e-12


def test_contradictions_with_the_configuration_are_refused(vit):
    assert "has 3 heads by its config.json, not 6: leave #heads out" in refused(f"{vit}#heads=6")
    assert "has the activation gelu by its config.json" in refused(f"{vit}#act=quick_gelu")
    assert teachers.teacher(f"{vit}#pixels=clip", "small", SIZE).network.mean[0] == 0.48145466
    config = json.loads((vit / "config.json").read_text())
    for change, said in (
        ({"model_type": "swin"}, "is of 'swin', and the keys of"),
        ({"hidden_act": "mish"}, "has the activation 'mish': known are gelu"),
        ({"num_attention_heads": "many"}, "can't be read"),
    ):
        (vit / "config.json").write_text(json.dumps({**config, **change}))
        assert said in refused(vit)


def test_defaults_that_a_nested_configuration_leaves_out(tmp_path):
    config = {"vision_config": {"model_type": "clip_vision_model", "hidden_size": 48}}
    kind = KINDS["clip tower"]
    wide = Kind(kind.model, kind.config, {**WIDE, "num_attention_heads": 12})
    path = folder(network(wide), tmp_path / "own", "bin")
    (path / "config.json").write_text(json.dumps(config))
    (path / "preprocessor_config.json").unlink()
    found = teachers.teacher(str(path), "small", SIZE).network
    assert (found.heads, found.norm_eps, found.mean[0]) == (12, 1e-5, 0.48145466)
    assert "quick_gelu" in found.components


def test_keys_that_a_layout_lacks_are_named(vit):
    state = load_file(vit / "model.safetensors")
    torch.save({**state, "vit.encoder.layer.0.adapter.weight": torch.ones(2)}, vit / "x.pth")
    assert "transformers' vit does not have: vit.encoder.layer.0.adapter.weight" in refused(vit / "x.pth")
    lost = {key: value for key, value in state.items() if key != "vit.encoder.layer.1.attention.attention.key.weight"}
    torch.save(lost, vit / "x.pth")
    with pytest.raises(WeightsError, match=r"missing: blocks\.1\.attn\.qkv\.weight"):
        loading.load(teachers.teacher(str(vit / "x.pth"), "small", SIZE))
    swin = {
        "embeddings.patch_embeddings.projection.weight": torch.ones(4, 3, 2, 2),
        "encoder.layers.0.blocks.0.x": torch.ones(1),
    }
    torch.save(swin, vit / "x.pth")
    assert "its keys are of transformers, and of none of dinov2, deit, beit, vit, clip, siglip" in refused(
        vit / "x.pth"
    )


def test_wrappers_and_averages_around_them(vit):
    state = load_file(vit / "model.safetensors")
    contents = {
        "state_dict": {f"module.model.{key}": value for key, value in state.items()},
        "state_dict_ema": {key: value + 1 for key, value in state.items()},
    }
    raw, mean = (formats.convert(contents, branch) for branch in ("weights", "ema"))
    assert raw.format == mean.format == "hf_vit" and raw.branch == "state_dict: module.model.vit.*"
    assert torch.equal(raw.state["head.weight"] + 1, mean.state["head.weight"])


def test_a_registered_teacher_takes_its_familys_file(tmp_path):
    sizes = {**SIZES, "hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 12}
    config = transformers.CLIPVisionConfig(**sizes, intermediate_size=3072)
    path = folder(transformers.CLIPVisionModel(config), tmp_path / "own", "bin")
    with pytest.raises(WeightsError, match=r"does not fit clip_b.*missing: blocks\.1"):
        loading.load(teachers.teacher(f"clip_b@{path}", "small", SIZE))
    assert files.check(path / "pytorch_model.bin") == "zip"
