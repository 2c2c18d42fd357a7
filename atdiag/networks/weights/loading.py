"""Load a teacher's weights strictly: completely, or not at all.

From the shipped miniatures, files that the user names, authors' checkpoints in the cache folder, or the hub's own
cache. Reading a file's header needs no torch, so that planning stays fast.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atdiag.core.spec import Teacher
from atdiag.networks.registry import recognition, specimens, teachers
from atdiag.networks.registry.published import TIMM, TeacherEntry
from atdiag.networks.weights import sources
from atdiag.networks.weights.sources import (
    Source,
    WeightsError,
    WeightsMissingError,
    metadata,
    shipped,
    shipped_path,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from atdiag.core.spec import Network, Operation
    from atdiag.networks.model.vit import ViT
    from atdiag.networks.timm.wrapping import Foreign
    from atdiag.networks.weights.formats import Converted

__all__ = [
    "Origin",
    "WeightsError",
    "WeightsMissingError",
    "load",
    "load_source",
    "metadata",
    "save",
    "shipped",
    "shipped_path",
]


@dataclass(frozen=True)
class Origin:
    """Where a teacher's weights came from, for the record of a run."""

    file: str
    sha256: str
    format: str
    """Key layout, see ``formats``."""
    branch: str
    """The part of the file that was used: ``state_dict: module.base_encoder.*``."""
    dropped: tuple[str, ...]
    """Its keys that are not part of the network (pre-training heads, decoders, mask tokens)."""
    averages: tuple[str, ...] = ()
    """Names in the file that mark a moving average of the weights, used or not."""
    others: tuple[str, ...] = ()
    """Places of other networks in the file."""

    note: str = ""
    """Which network was taken from a file that holds several; empty for other files."""


def load(teacher: Teacher) -> ViT | Foreign:
    """Load a teacher, frozen and in eval mode, with the weights that its sha256 names.

    Raises WeightsMissingError if they are not on this machine, and WeightsError (a UserError and ValueError) if the
    file has another hash, is damaged, or does not fit the network.
    """
    if teacher.operation is not None and teacher.operation.name == "untrained":
        return _drawn(teacher.network, teacher.operation)
    if teachers.is_shipped(teacher):
        return _load_shipped(teacher)
    path, source = _file(teacher)
    if not source.model:
        return _load_stored(teacher, path)
    model, converted = load_source(source, path, teacher.network.image_size)
    from atdiag.networks.timm import architectures, conversion

    found = conversion.teacher_from(model, *architectures.pixels(source))
    if found.network.as_taught != teacher.network.as_taught:  # an old plan's description is older than ours
        raise WeightsError(
            f"{teacher.label}: timm now builds a different network from the one that this run was planned with",
            "use the version of timm that it was planned with",
        )
    found.eval().requires_grad_(False)
    found.origin = Origin(
        str(path),
        str(teacher.sha256),
        converted.format,
        converted.branch,
        converted.dropped,
        converted.averages,
        converted.others,
        converted.note,
    )
    return found


def _drawn(network: Network, operation: Operation) -> ViT:
    """Return an untrained network, which needs no file. Raises WeightsError for an architecture that is not ours."""
    from atdiag.networks.model import students

    if network.differences:
        raise WeightsError(f"an untrained network with {', '.join(network.differences)} can't be built")
    assert operation.seed is not None
    vit = students.build(network, operation.seed)
    vit.eval().requires_grad_(False)
    return vit


def _load_stored(teacher: Teacher, path: Path) -> ViT:
    """Load a network that is stored with its architecture, at the image size of the spec."""
    from atdiag.networks.model.vit import ViT
    from atdiag.networks.weights import files, formats

    vit = ViT(teacher.network)
    try:
        vit.load_state_dict(formats.fit(files.tensors(path), vit))
    except WeightsError as fault:
        raise WeightsError(f"{path} does not fit the architecture in its header: {fault}") from None
    vit.eval().requires_grad_(False)
    vit.origin = Origin(str(path), str(teacher.sha256), "atdiag", "*", ())
    return vit


def _file(teacher: Teacher) -> tuple[Path, Source]:
    """Return the file with a published teacher's weights, whose hash must be the teacher's sha256."""
    source = teachers.source(teacher.name)
    path = sources.find(source)
    if path is None:
        raise WeightsMissingError(f"no weights of {teacher.label} on this machine: {sources.how_to_get(source)}")
    if teacher.sha256 is None:
        raise WeightsError(f"{teacher.label} was planned without weights, but {path} is here now", "plan again")
    _verify(path, teacher.sha256)
    return path, source


def _verify(path: Path, meant: str | None) -> None:
    if (found := sources.fresh_sha256(path)) != meant:
        raise WeightsError(
            f"{path} is not the file this run was made with (sha256 {found[:12]}, not {str(meant)[:12]})"
        )


def _load_shipped(teacher: Teacher) -> ViT:
    """Load a miniature, or a specimen with the operation that plants its fault."""
    from atdiag.networks.model import operations
    from atdiag.networks.model.vit import ViT
    from atdiag.networks.weights import files

    path = specimens.shipped_file(teacher)
    if not path.exists():
        raise WeightsMissingError(f"no weights of {teacher.label} on this machine")
    _verify(path, teacher.sha256)
    vit = ViT(teacher.network)
    vit.load_state_dict({name: tensor.float() for name, tensor in files.tensors(path).items()})
    if teacher.operation is not None:
        vit = operations.apply(vit, teacher.operation)
    vit.eval().requires_grad_(False)
    return vit


# --- published networks --------------------------------------------------------------------------------------------


def load_source(source: Source, path: Path, image_size: int) -> tuple[nn.Module, Converted]:
    """Return timm's network of a source with the weights of a file, and the converted checkpoint.

    Raises WeightsError, naming the file, if its format is not one of the source's, a key is missing or left over, a
    shape or the number of heads does not fit, or a value is not finite.
    """
    from atdiag.networks.timm import architectures, flexible
    from atdiag.networks.weights import adaptation, files, formats

    try:
        found = formats.convert(files.read(path), source.branch)
    except WeightsError as fault:
        raise fault if str(path) in str(fault) else WeightsError(f"{path}: {fault}") from None
    source = adaptation.adapted(source, found.state)
    model: Any = architectures.build(source, image_size, meta=True, as_is=True)
    _check_format(found, source, path)
    _check_heads(found, model, path)
    try:
        state = formats.fit(found.state, model)
    except WeightsError as fault:
        rows = [row.name for row in _published_as(found, model) if row.name != source.name]
        rows = rows or [f"{TIMM}{name}" for name in recognition.instead(found.state, source.model)]
        hint = f"a checkpoint of this kind is {' or '.join(rows)}: type {rows[0]}@{path}" if rows else None
        raise WeightsError(f"{path} does not fit {source.name}: {fault}", hint) from None
    persistent = set(model.state_dict())
    if any(name not in persistent for name, _ in model.named_buffers()):
        # timm computes some buffers at construction and saves them in no file, so the network must really be
        # allocated.
        model = architectures.build(source, image_size, meta=False, as_is=True)
    model.load_state_dict(state, strict=True, assign=True)
    if flexible.is_flexible(model):
        model = flexible.plain(model, image_size)
    return model.eval().requires_grad_(False), found


def _check_format(found: Converted, source: Source, path: Path) -> None:
    from atdiag.networks.weights import transformers_keys

    if found.format.startswith(transformers_keys.PREFIX) and "timm" in (source.formats or ("timm",)):
        return  # under timm's names now
    if source.formats is not None and found.format not in source.formats:
        raise WeightsError(
            f"{path} has the key layout {found.format!r}, and {source.name} is published as "
            f"{' or '.join(map(repr, source.formats))}"
        )


def _published_as(found: Converted, model: Any) -> list[TeacherEntry]:
    """Return the registry entries of this width and depth whose authors publish in this format."""
    if found.format == "timm":
        return []
    size = model.embed_dim, len(model.blocks)
    rows = teachers.registry().values()
    return [row for row in rows if found.format in (row.formats or ()) and (row.width, row.depth) == size]


def _check_heads(found: Converted, model: Any, path: Path) -> None:
    """Check the number of heads, which shapes do not show, against registry entries of this format."""
    rows = _published_as(found, model)
    if not rows:
        return
    heads = model.blocks[0].attn.num_heads
    if heads not in {row.heads for row in rows}:
        raise WeightsError(
            f"{path} is a checkpoint in {found.format}'s format, whose network of width {model.embed_dim} has "
            f"{rows[0].heads} heads, not {heads}",
            f"use {rows[0].name}@{path}",
        )


def save(vit: ViT, path: Path, facts: dict[str, Any]) -> None:
    """Write a network as a miniature teacher: half precision, with its architecture and ``facts`` in the header."""
    from safetensors.torch import save as to_bytes

    from atdiag.core.runs import write_atomically

    state: dict[str, Tensor] = {name: tensor.detach().half().contiguous() for name, tensor in vit.state_dict().items()}
    header = {"network": vit.network.model_dump(mode="json"), **facts}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_bytes(state, {key: json.dumps(value) for key, value in header.items()}))
