"""Recognise the architecture of a weight file that is named without one, from its keys and shapes.

``signatures.csv`` has a row for each ViT of timm whose maps can be read: the hash of its keys and shapes, which says
patch, width and depth, and a number for its function. Models with one signature and several functions differ in what
no weight shows: heads, the pixels' normalisation, an activation. Then the file must say which it is (a ``config.json``
of timm beside it, ``arch`` or ``args.model`` in it, timm's name as its own), or the user is asked.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atdiag.core.errors import UserError
from atdiag.core.resources import small_file
from atdiag.core.text import shortlist
from atdiag.networks.registry.published import TIMM
from atdiag.networks.weights import files, sources
from atdiag.networks.weights.sources import Branch, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

_FREE = re.compile(r"(head|head_dist|norm|fc_norm)\.|.*relative_position_index$")
"""Keys that fine-tuning changes, or that hold no weights."""
_RESAMPLED = ("pos_embed", "relative_position_bias_table")
"""Keys whose length depends on the resolution."""

_TORCH = tuple(suffix for suffix in sources.SUFFIXES if suffix != ".safetensors")


@dataclass(frozen=True)
class Signature:
    """A timm model that can be recognised."""

    model: str
    signature: str
    function: str
    """Equal for models that compute the same function of equal weights."""
    patch: int
    width: int
    depth: int
    heads: int
    mean: float
    pixels: int
    """Its native resolution."""

    def __str__(self) -> str:
        """Name it with what no weight shows."""
        return f"{self.model} ({self.heads} heads, pixels with mean {self.mean:.3g})"


@cache
def table() -> tuple[Signature, ...]:
    """Return the rows of ``signatures.csv``."""
    with (Path(__file__).parent / "signatures.csv").open() as file:
        rows = list(csv.DictReader(file))
    numbers = ("patch", "width", "depth", "heads", "pixels")
    return tuple(
        Signature(**{**row, **{name: int(row[name]) for name in numbers}, "mean": float(row["mean"])})  # type: ignore[arg-type]
        for row in rows
    )


def signature(state: Mapping[str, Tensor]) -> str:
    """Return the hash of a network's keys and shapes, without what resolution and fine-tuning change."""
    lines = []
    for key, tensor in sorted(state.items()):
        if not _FREE.match(key):
            shape = tensor.shape[-1:] if key.endswith(_RESAMPLED) else tensor.shape
            lines.append(f"{key} {'x'.join(map(str, shape))}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def fitting(state: Mapping[str, Tensor]) -> list[Signature]:
    """Return the timm models with a network's keys and shapes, one for each function."""
    own = signature(state)
    found: dict[str, Signature] = {}
    for row in table():
        if row.signature == own:
            found.setdefault(row.function, row)
    return list(found.values())


def is_foreign(reference: str) -> bool:
    """Return whether a reference is an existing file or folder with weights that atdiag did not write."""
    path, branch = sources.split_branch(reference)
    if path.is_dir():
        return (path / "config.json").is_file() and not (path / "spec.json").exists()
    if not path.is_file() or (path.parent / "spec.json").exists():
        return False
    if branch != "weights" or path.name.endswith((*_TORCH, ".index.json")):
        return True
    try:
        return path.suffix == ".safetensors" and "network" not in sources.metadata(path)
    except ValueError:  # no metadata, or another program's
        return path.suffix == ".safetensors"


def instead(state: Mapping[str, Tensor], model: str) -> list[str]:
    """Return the models with a network's keys and shapes; none if a model that was asked for is one of them."""
    same = {row.model for row in table() if row.signature == signature(state)}
    return [] if model.partition(".")[0] in same else [row.model for row in fitting(state)]


def reference(path: Path, branch: Branch = "weights") -> str:
    """Return the full reference to a weight file or folder: ``timm:MODEL@/path/file#branch``.

    Raises UserError, with the lines to type, if its architecture can't be told; WeightsError for a file that can't be
    read.
    """
    path = path.expanduser().absolute()
    file = sources.in_folder(path) if path.is_dir() else path
    ending = "" if branch == "weights" else f"#{branch}"
    if told := _from_config(file):
        return f"{TIMM}{told}@{file}{ending}"
    from atdiag.networks.weights import formats

    contents = files.outline(file)
    try:
        state = formats.convert(contents, branch).state
    except WeightsError as fault:
        raise WeightsError(f"{path}: {fault}") from None
    rows = fitting(state)
    names = {row.model for row in table() if row.signature == signature(state)}
    said = next((name for name in _names(file, contents) if name.partition(".")[0] in names), None)
    if said or len(rows) == 1:
        return f"{TIMM}{said or rows[0].model}@{file}{ending}"
    if rows:
        lines = " or ".join(f"{TIMM}{row.model}@{file}{ending}" for row in rows)
        raise UserError(
            f"{path} has the keys and shapes of {' and of '.join(map(str, rows))}, and does not say which it is",
            f"type {lines}",
        )
    raise _unknown(path, state)


def _names(file: Path, contents: Mapping[str, Any]) -> Iterator[str]:
    """Yield timm's names that a file gives to itself, the most reliable first."""
    from atdiag.networks.timm import architectures

    known = set(architectures.known_models())
    args = contents.get("args")
    stem = file.name
    for suffix in sorted(sources.SUFFIXES, key=len, reverse=True):
        stem = stem.removesuffix(suffix)
    for name in (contents.get("arch"), getattr(args, "model", None), stem):
        if isinstance(name, str) and name in known:
            yield name


def _from_config(file: Path) -> str | None:
    """Return the model in timm's ``config.json`` beside a file; None if there is none.

    Raises UserError for one that asks for more than timm's model of that name.
    """
    config = file.with_name("config.json")
    try:
        found = json.loads(small_file(config))
        name, facts = found["architecture"], found.get("pretrained_cfg") or {}
        tagged = f"{name}.{facts.get('tag')}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    from atdiag.networks.timm import architectures

    name = tagged if tagged in architectures.known_models() else str(name)
    mean, std = architectures.pixels(architectures.timm_source(name))
    other: dict[str, Any] = {"arguments": found["model_args"]} if found.get("model_args") else {}
    if (facts.get("mean") or list(mean), facts.get("std") or list(std)) != (list(mean), list(std)):
        other |= {"mean": facts.get("mean"), "std": facts.get("std")}
    if other:
        told = ", ".join(f"{key}={value}" for key, value in other.items())
        raise UserError(
            f"{config} asks for {name} with {told}, which no name says",
            f"register it: register_teacher('NAME', '{name}', file='{file}', {told})",
        )
    return name


def _unknown(path: Path, state: Mapping[str, Tensor]) -> UserError:
    """Return the refusal of a network that no timm model has, with what its shapes tell."""
    proj = state["patch_embed.proj.weight"]
    width, patch = int(proj.shape[0]), int(proj.shape[-1])
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    near = sorted(table(), key=lambda row: (row.width != width, row.depth != depth, row.patch != patch))
    alike = [row.model for row in near if (row.width, row.depth, row.patch) == (width, depth, patch)]
    sizes = f"patches of {patch} px, width {width}, {depth} blocks"
    if alike:
        return UserError(
            f"no model of timm has the keys and shapes of {path} ({sizes}); of these sizes are {shortlist(alike)}",
            f"type {TIMM}{alike[0]}@{path} to see which keys differ",
        )
    heads = _possible_heads(width)
    given = f"dict(patch_size={patch}, embed_dim={width}, depth={depth}, num_heads=HEADS)"
    return UserError(
        f"no model of timm has the sizes of {path} ({sizes}), and shapes do not show its heads "
        f"({', '.join(map(str, heads))} are possible)",
        f"register it: register_teacher('NAME', 'vit_base_patch16_224', file='{path}', arguments={given}, "
        f"mean=..., std=...)",
    )


def _possible_heads(width: int) -> Sequence[int]:
    """Return the numbers of heads of usual widths (16 to 128 channels each)."""
    return [heads for heads in range(1, width + 1) if width % heads == 0 and 16 <= width // heads <= 128]
