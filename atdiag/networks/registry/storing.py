"""Store networks of the user's as teachers, in files that processes and later sessions find: see ``stored``."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from atdiag.core.errors import UserError
from atdiag.core.runs import write_atomically
from atdiag.networks.registry.published import TIMM
from atdiag.networks.registry.stored import FILE
from atdiag.networks.timm import architectures, conversion, inspection
from atdiag.networks.weights import loading, sources
from atdiag.networks.weights.sources import WeightsError


def store(model: nn.Module, folder: Path) -> str:
    """Store a network in a folder, unless it is there already, and return the reference that names it as a teacher.

    Raises UserError, with the reason, for a network that can't teach, or that can't be built again from a file.
    """
    if reason := inspection.why_not(model):
        raise UserError(f"{type(model).__name__} can't be a teacher: {reason}")
    facts = getattr(model, "pretrained_cfg", None) or {}
    if not (facts.get("mean") and facts.get("std")) and not hasattr(model, "network"):
        raise UserError(
            f"it is not known how the images of this {type(model).__name__} are normalised",
            'set model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}, or what it is',
        )
    known = _as_timms(model, facts, folder) if facts.get("architecture") else None
    return known or _as_ours(model, folder)


def _as_timms(model: Any, facts: Any, folder: Path) -> str | None:
    """Store a network under timm's name; None unless timm's network of that name, with these weights, is the same."""
    known = architectures.known_models()
    name = str(facts["architecture"])
    tagged = f"{name}.{facts.get('tag')}"
    name = tagged if tagged in known else name
    if name not in known:
        return None
    source = architectures.timm_source(name)
    if architectures.pixels(source) != (tuple(facts["mean"]), tuple(facts["std"])):
        return None
    content = save({key: tensor.detach().cpu().contiguous().clone() for key, tensor in model.state_dict().items()})
    size = model.patch_embed.img_size[0]
    with tempfile.TemporaryDirectory() as trial:
        file = Path(trial) / "model.safetensors"
        file.write_bytes(content)
        try:
            built, _ = loading.load_source(architectures.timm_source(name, file=file), file, size)
        except (WeightsError, UserError, RuntimeError):
            return None
    if not _same(model, built, size):
        return None
    return f"{TIMM}{name}@{_write(folder, name, content)}"


def _same(one: Any, other: Any, size: int) -> bool:
    """Return whether two networks have the same parts and give the same features for an image, up to rounding."""
    plain = copy.deepcopy(one).eval().float().cpu()
    like = torch.Generator().manual_seed(0)
    image = torch.randn(1, plain.patch_embed.proj.in_channels, size, size, generator=like)
    with torch.no_grad():
        left, right = plain.forward_features(image), other.forward_features(image)
    return left.shape == right.shape and bool(torch.allclose(left, right, rtol=1e-3, atol=1e-4))


def _as_ours(model: Any, folder: Path) -> str:
    """Store a network as our ViT, with its architecture in the header."""
    described = inspection.describe(model)
    if described.differences:
        raise UserError(
            f"this {type(model).__name__} has {', '.join(described.differences)}, and timm builds no such network from "
            "its name alone, so a training process could not build it again",
            "make it by timm.create_model(NAME) with timm's own arguments, or register it: register_teacher",
        )
    vit = conversion.convert(model, described)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in vit.state_dict().items()}
    content = save(state, {"network": json.dumps(described.model_dump(mode="json"), sort_keys=True)})
    facts = getattr(model, "pretrained_cfg", None) or {}
    name = str(facts.get("architecture") or type(model).__name__)
    return f"{FILE}{name}@{_write(folder, name, content)}"


def _write(folder: Path, name: str, content: bytes) -> Path:
    digest = hashlib.sha256(content).hexdigest()
    path = folder.expanduser().absolute() / f"{name}-{digest[:16]}.safetensors"
    if not path.is_file() or sources.fresh_sha256(path) != digest:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    return path
