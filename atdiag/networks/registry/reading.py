"""Read a network's architecture from its file: ``vit:NAME@FILE``, for networks that no timm model stands for.

Keys and shapes tell patch, width, depth, the MLP's width, tokens, LayerScale, norms and biases. They do not tell heads
(except by tables of relative positions and norms of q), the activation, the norms' epsilon, nor how pixels are
normalised. Those come from ``config.json`` and ``preprocessor_config.json`` of Hugging Face's transformers beside the
file, or from the user: ``FILE#heads=6#pixels=imagenet``. Heads and pixels that nothing tells are asked for, and a
pre-norm network's activation (CLIPs differ in it); any other plain ViT is taken to have GELU and timm's epsilon.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atdiag.core.errors import UserError, suggest
from atdiag.core.resources import small_file
from atdiag.networks.registry.published import table
from atdiag.networks.weights import files, sources
from atdiag.networks.weights.sources import Branch, Source, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

    from atdiag.networks.weights.formats import Converted
    from atdiag.networks.weights.transformers_keys import KeyLayout

VIT = "vit:"
"""Prefix of the names of such teachers."""

_PLAIN, _GATED = "vit_base_patch16_224", "vit_giant_patch14_dinov2"
_DISTILLED, _BEIT = "deit_base_distilled_patch16_224", "beit_base_patch16_224"
"""timm's models whose constructors take the sizes: a plain ViT's, with a gated MLP, DeiT's, BEiT's."""

ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    **dict.fromkeys(("gelu_tanh", "gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh"),
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Names of activations, transformers' included -> timm's."""


@dataclass(frozen=True)
class Told:
    """What keys and shapes do not tell, as far as it is known."""

    heads: int | None = None
    eps: float | None = None
    act: str | None = None
    """timm's name."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def pixels(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of a named normalisation. Raises UserError for an unknown name."""
    known: dict[str, Any] = table()["pixels"]
    if name not in known:
        raise UserError(
            f"unknown pixels {name!r}{suggest(name, known)}", f"type #pixels= and one of {', '.join(known)}"
        )
    return tuple(known[name]["mean"]), tuple(known[name]["std"])


def typed(facts: Mapping[str, str]) -> Told:
    """Return what the user tells: ``heads``, ``pixels``, ``act``. Raises UserError for a value that can't be."""
    heads, act = facts.get("heads"), facts.get("act")
    if heads is not None and not re.fullmatch(r"[1-9]\d{0,3}", heads):
        raise UserError(f"#heads={heads} is no number of heads", "type a whole number, as #heads=6")
    if act is not None and act not in ACTIVATIONS:
        raise UserError(f"unknown activation {act!r}{suggest(act, ACTIVATIONS)}", f"known: {', '.join(ACTIVATIONS)}")
    mean, std = pixels(facts["pixels"]) if "pixels" in facts else (None, None)
    return Told(None if heads is None else int(heads), None, ACTIVATIONS[act] if act else None, mean, std)


# --- transformers' configuration -----------------------------------------------------------------------------------


def beside(file: Path, layout: KeyLayout | None) -> Told:
    """Return what transformers' ``config.json`` and ``preprocessor_config.json`` beside a file tell.

    layout: of its keys. Raises UserError for a configuration of another network than the keys are of.
    """
    mean, std = _preprocessor(file.with_name("preprocessor_config.json"))
    if layout is not None and mean is None and layout.pixels is not None:
        mean, std = pixels(layout.pixels)
    eps = None if layout is None else layout.eps
    path = file.with_name("config.json")
    config = _json(path)
    config = config if "hidden_size" in config else config.get("vision_config") or {}
    if layout is None or "model_type" not in config:
        return Told(None, eps, None, mean, std)
    if config["model_type"] not in layout.types:
        raise UserError(
            f"{path} is of {config['model_type']!r}, and the keys of {file} are of {' or '.join(layout.types)}",
            "put the file that belongs to it beside it",
        )
    heads, act = config.get("num_attention_heads", layout.heads), config.get("hidden_act", layout.act)
    if act not in ACTIVATIONS:
        raise UserError(f"{path} has the activation {act!r}", f"known are {', '.join(ACTIVATIONS)}")
    try:
        return Told(int(heads), float(config.get("layer_norm_eps", layout.eps)), ACTIVATIONS[act], mean, std)
    except (TypeError, ValueError) as fault:
        raise UserError(f"{path} can't be read ({fault})") from None


def _json(path: Path) -> dict[str, Any]:
    """Return a file's JSON object; empty if there is none."""
    try:
        found = json.loads(small_file(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _preprocessor(path: Path) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    found = _json(path)
    if found.get("do_normalize") is False:
        return (0.0,) * 3, (1.0,) * 3
    try:
        return tuple(map(float, found["image_mean"])), tuple(map(float, found["image_std"]))
    except (KeyError, TypeError, ValueError):
        return None, None


# --- keys and shapes -----------------------------------------------------------------------------------------------


def sizes(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Return a timm model and the constructor arguments by which it has a network's keys and shapes.

    state: under timm's names. ``num_heads`` is among the arguments if a table of relative positions or a norm of q
    shows it. Whether all keys really fit is for the loader to check.

    Raises WeightsError, naming the key, for a network without the parts of a plain ViT.
    """
    for key in (
        "patch_embed.proj.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
    ):
        if key not in state:
            raise WeightsError(f"it has no {key!r}, so it is no plain ViT")
    proj, fc1, fc2 = (
        state["patch_embed.proj.weight"],
        state["blocks.0.mlp.fc1.weight"],
        state["blocks.0.mlp.fc2.weight"],
    )
    if proj.ndim != 4 or proj.shape[2] != proj.shape[3] or fc1.ndim != 2 or fc2.ndim != 2:
        raise WeightsError("its patches are not square, or its MLP is not of two matrices, so it is no plain ViT")
    if proj.shape[1] != 3:
        raise WeightsError(f"its images have {proj.shape[1]} channels, and not 3 (patch_embed.proj.weight)")
    from atdiag.networks.timm.inspection import ratio

    width = int(proj.shape[0])
    found: dict[str, Any] = {
        "patch_size": int(proj.shape[-1]),
        "embed_dim": width,
        "depth": len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        "mlp_ratio": ratio(int(fc1.shape[0]), width),
    }
    bias_table = state.get("blocks.0.attn.relative_position_bias_table")
    if bias_table is not None or {"blocks.0.gamma_1", "blocks.0.attn.q_bias"} & set(state):
        return _BEIT, found | _of_beit(state, bias_table)
    return _model(state, fc1, fc2), found | _of_vit(state)


def _model(state: Mapping[str, Tensor], fc1: Tensor, fc2: Tensor) -> str:
    if "dist_token" in state:
        return _DISTILLED
    return _GATED if fc1.shape[0] == 2 * fc2.shape[1] else _PLAIN


def _of_beit(state: Mapping[str, Tensor], bias_table: Tensor | None) -> dict[str, Any]:
    return {
        "init_values": 1e-5 if "blocks.0.gamma_1" in state else 0.0,  # timm takes None as not given
        "qkv_bias": "blocks.0.attn.q_bias" in state,
        "use_abs_pos_emb": "pos_embed" in state,
        "use_rel_pos_bias": bias_table is not None,
        "global_pool": "token" if "norm.weight" in state else "avg",
        **({"num_heads": int(bias_table.shape[-1])} if bias_table is not None else {}),
    }


def _of_vit(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of timm's ``VisionTransformer``; the initial value of LayerScale is DINOv2's."""
    width = int(state["patch_embed.proj.weight"].shape[0])
    norm = state.get("blocks.0.attn.q_norm.weight")  # over the channels of a head
    token, registers = "cls_token" in state, int(state["reg_token"].shape[1]) if "reg_token" in state else 0
    pool = "map" if "attn_pool.latent" in state else "avg" if not token or "fc_norm.weight" in state else "token"
    if "norm_pre.weight" in state and "norm.weight" not in state and "head.weight" in state:
        pool = "avg"  # CLIP's classifier in transformers
    given: dict[str, Any] = {
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "qk_norm": norm is not None,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in state else 0.0,
        "pre_norm": "norm_pre.weight" in state,
        "final_norm": "norm.weight" in state or "fc_norm.weight" in state,
        "fc_norm": "fc_norm.weight" in state,
        "global_pool": pool,
        **({"num_heads": width // norm.shape[0]} if norm is not None and norm.ndim == 1 else {}),
    }
    if "dist_token" in state:  # its constructor sets the tokens
        return given
    return given | {
        "class_token": token,
        "reg_tokens": registers,
        "pos_embed": "learn" if "pos_embed" in state else "none",
        "no_embed_class": _patches_alone(state, int(token) + registers),
    }


def _patches_alone(state: Mapping[str, Tensor], prefix: int) -> bool:
    """Return whether the position embedding is of patches alone. Raises WeightsError if its length fits no grid."""
    if "pos_embed" not in state:
        return False
    length = int(state["pos_embed"].shape[1])
    whole, patches = _is_square(length - prefix), _is_square(length)
    if not whole and not patches:
        raise WeightsError(
            f"pos_embed has {length} rows, which is no square grid, with or without {prefix} more tokens"
        )
    only_class = "cls_token" in state and prefix == 1
    if patches and not whole and only_class and "blocks.0.ls1.gamma" not in state:
        # DeiT III, which leaves the class token out, has LayerScale; without it a grid that is no square is as likely.
        raise WeightsError(
            f"pos_embed has {length} rows: those of a square grid without the class token, or those of a grid that is "
            "not square with it, and nothing tells which"
        )
    return patches and (not whole or prefix > 1)  # a network with registers has, by timm's habit, positions of patches


def image_size(state: Mapping[str, Tensor], model: str, arguments: Mapping[str, Any]) -> int:
    """Return the resolution of a network's positions, in pixels; without positions, about 224."""
    patch = int(arguments["patch_size"])
    if "pos_embed" in state:
        prefix = 2 if model == _DISTILLED else int(arguments.get("class_token", True)) + arguments.get("reg_tokens", 0)
        patches = int(state["pos_embed"].shape[1]) - (0 if arguments.get("no_embed_class") else prefix)
        return patch * math.isqrt(patches)
    if (bias_table := state.get("blocks.0.attn.relative_position_bias_table")) is not None:
        return patch * ((math.isqrt(int(bias_table.shape[0]) - 3) + 1) // 2)
    return patch * max(224 // patch, 1)


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def possible_heads(width: int) -> Sequence[int]:
    """Return the numbers of heads of usual widths (16 to 128 channels each), that nearest to 64 channels first."""
    found = [heads for heads in range(1, width + 1) if width % heads == 0 and 16 <= width // heads <= 128]
    return sorted(found, key=lambda heads: abs(width // heads - 64)) or [1]


# --- together ------------------------------------------------------------------------------------------------------


def title(file: Path) -> str:
    """Return a name for a file's network, for tables: the file's, or its folder's if the file has a hub's name."""
    stem = file.name
    for suffix in sorted((*sources.SUFFIXES, ".index.json"), key=len, reverse=True):
        stem = stem.removesuffix(suffix)
    stem = file.absolute().parent.name if file.name in sources.FOLDER_FILES else stem
    return re.sub(r"[^\w.-]+", "-", stem).strip("-") or "file"


def source(file: Path, branch: Branch, facts: Mapping[str, str], found: Converted | None = None) -> Source:
    """Return the source of a file's own network. found: the file's outline, if it was read already.

    Raises UserError, with the line to type, for what nothing tells, and WeightsError for a file that can't be read or
    whose network is no plain ViT.
    """
    from atdiag.networks.weights import formats, transformers_keys

    if not file.is_file():
        raise sources.WeightsMissingError(f"{file}: there is no such file{sources.near(file)}")
    try:
        found = found or formats.convert(files.outline(file), branch)
        model, arguments = sizes(found.state)
    except WeightsError as fault:
        raise fault if str(file) in str(fault) else WeightsError(f"{file}: {fault}") from None
    known = _together(file, arguments, beside(file, transformers_keys.layout(found.format)), typed(facts))
    _ask(file, branch, facts, arguments, known, "norm_pre.weight" in found.state)
    arguments |= {"num_heads": known.heads}
    if known.eps is not None or "norm_pre.weight" in found.state:
        arguments["norm_eps"] = known.eps or 1e-5  # CLIP's
    if known.act not in (None, "gelu") and model == _PLAIN:
        arguments["act_layer"] = known.act
    elif known.act not in (None, "gelu") and model != _GATED:
        raise UserError(f"{file} has the activation {known.act}, which timm's {model} does not take")
    size = image_size(found.state, model, arguments)
    name = VIT + title(file)
    return Source(name, model, arguments, known.mean, known.std, file=file, branch=branch, image_size=size)


def _together(file: Path, arguments: Mapping[str, Any], config: Told, user: Told) -> Told:
    """Return what is known, of which pixels are the user's first. Raises UserError for contradictions."""
    shown = arguments.get("num_heads")
    for told, where in ((shown, "by its shapes"), (config.heads, "by its config.json")):
        if None not in (told, user.heads) and told != user.heads:
            raise UserError(f"{file} has {told} heads {where}, not {user.heads}", "leave #heads out")
    heads = user.heads or shown or config.heads
    if heads and arguments["embed_dim"] % heads:
        raise UserError(
            f"{heads} heads do not divide the width of {file}, {arguments['embed_dim']}",
            f"type #heads= and one of {', '.join(map(str, possible_heads(arguments['embed_dim'])))}",
        )
    if None not in (config.act, user.act) and config.act != user.act:
        raise UserError(f"{file} has the activation {config.act} by its config.json", "leave #act out")
    whose = user if user.mean else config
    return replace(config, heads=heads, act=user.act or config.act, mean=whose.mean, std=whose.std)


def _ask(
    file: Path, branch: Branch, facts: Mapping[str, str], arguments: Mapping[str, Any], known: Told, pre_norm: bool
) -> None:
    """Raise UserError, with one line to type, for all that is not known."""
    needed, add = [], dict(facts)
    if known.heads is None:
        heads = possible_heads(arguments["embed_dim"])
        needed.append(f"its heads ({', '.join(map(str, sorted(heads)))} are possible)")
        add["heads"] = str(heads[0])
    if pre_norm and known.act is None:
        needed.append("its activation (quick_gelu as OpenAI's CLIP, gelu as other CLIPs)")
        add["act"] = "gelu"
    if known.mean is None:
        needed.append(f"how pixels are normalised ({', '.join(table()['pixels'])})")
        add["pixels"] = "imagenet"
    if needed:
        told = "".join(f"#{key}={value}" for key, value in add.items())
        size = "patches of {patch_size} px, width {embed_dim}, {depth} blocks".format(**arguments)
        raise UserError(
            f"{file} ({size}) does not show {' and '.join(needed)}",
            f"type {_quoted(file, told + ('' if branch == 'weights' else f'#{branch}'))}, with what is right for it",
        )


def _quoted(file: Path, marks: str) -> str:
    """Return a reference as it can be pasted into a shell."""
    text = f"{file}{marks}"
    return text if shlex.quote(str(file)) == str(file) else shlex.quote(text)
