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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atdiag.core.errors import UserError
from atdiag.core.resources import small_file
from atdiag.core.text import shortlist
from atdiag.networks.registry import reading
from atdiag.networks.registry.published import TIMM
from atdiag.networks.weights import files, sources
from atdiag.networks.weights.sources import Branch, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

    from atdiag.networks.weights.formats import Converted

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
    return hashlib.sha256("\n".join(_lines(state)).encode()).hexdigest()[:12]


def _lines(state: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield ``key shape`` of what neither resolution nor fine-tuning changes."""
    for key, tensor in sorted(state.items()):
        if not _FREE.match(key):
            shape = tensor.shape[-1:] if key.endswith(_RESAMPLED) else tensor.shape
            yield f"{key} {'x'.join(map(str, shape))}"


def same(state: Mapping[str, Tensor]) -> list[Signature]:
    """Return the timm models with a network's keys and shapes."""
    own = signature(state)
    return [row for row in table() if row.signature == own]


def _distinct(rows: list[Signature]) -> list[Signature]:
    """Return the first row of each function."""
    found: dict[str, Signature] = {}
    for row in rows:
        found.setdefault(row.function, row)
    return list(found.values())


def is_foreign(reference: str) -> bool:
    """Return whether a reference is an existing file or folder with weights that atdiag did not write."""
    path, branch, facts = sources.split_marks(reference)
    if path.is_dir():
        return (path / "config.json").is_file() and not (path / "spec.json").exists()
    if not path.is_file() or (path.parent / "spec.json").exists():
        return False
    if branch != "weights" or facts or path.name.endswith((*_TORCH, ".index.json")):
        return True
    try:
        return path.suffix == ".safetensors" and "network" not in sources.metadata(path)
    except ValueError:  # no metadata, or another program's
        return path.suffix == ".safetensors"


def instead(state: Mapping[str, Tensor], model: str) -> list[str]:
    """Return the models with a network's keys and shapes; none if a model that was asked for is one of them."""
    rows = same(state)
    named = model.partition(".")[0] in {row.model for row in rows}
    return [] if named else [row.model for row in _distinct(rows)]


def reference(path: Path, branch: Branch = "weights", facts: Mapping[str, str] | None = None) -> str:
    """Return the full reference to a weight file or folder: ``timm:MODEL@/path/file#branch``.

    facts: what the user typed after it, see ``reading``. Raises UserError, with the lines to type, if its architecture
    can't be told; WeightsError for a file that can't be read.
    """
    facts = facts or {}
    path = path.expanduser().absolute()
    file = sources.in_folder(path) if path.is_dir() else path
    ending = "" if branch == "weights" else f"#{branch}"
    if not facts and (told := _from_config(file)):
        return f"{TIMM}{told}@{file}{ending}"
    from atdiag.networks.weights import finding, formats, transformers_keys

    contents = files.outline(file)
    try:
        found = formats.convert(contents, branch)
    except WeightsError as fault:
        raise WeightsError(f"{path}: {fault}") from None
    if finding.FLEXIBLE in found.state:
        named = next((name for name in _names(file, contents) if name.startswith("naflexvit")), None)
        if named and not facts:
            return f"{TIMM}{named}@{file}{ending}"
        raise UserError(
            f"{path} has the keys of timm's NaFlexVit, and does not say which model it is",
            f"type {TIMM}naflexvit_base_patch16_gap@{file}{ending}, or with another of timm's naflexvit models",
        )
    if (kind := transformers_keys.layout(found.format)) and reading.beside(file, kind).heads:
        return _own(file, branch, facts, found)
    fitting = same(found.state)
    rows, names = _chosen(_distinct(fitting), facts), {row.model for row in fitting}
    said = next((name for name in _names(file, contents) if name.partition(".")[0] in names), None)
    if len(rows) == 1 or (said and not facts):
        return f"{TIMM}{said if said and not facts else rows[0].model}@{file}{ending}"
    if rows:
        lines = " or ".join(f"{TIMM}{row.model}@{file}{ending}" for row in rows)
        raise UserError(
            f"{path} has the keys and shapes of {' and of '.join(map(str, rows))}, and does not say which it is",
            f"type {lines}",
        )
    if not fitting and (odd := _unbuildable(found.state)):
        alike = _alike(found.state)
        raise UserError(
            f"{path} has the keys of no timm model and of no plain ViT ({shortlist(odd)})",
            f"type {TIMM}{alike[0]}@{path} to compare it with a model of its width, depth and patch" if alike else None,
        )
    return _own(file, branch, facts, found)


def _own(file: Path, branch: Branch, facts: Mapping[str, str], found: Converted) -> str:
    """Return the reference to a file's own network. Raises UserError, asking for what nothing tells."""
    source = reading.source(file, branch, facts, found)
    told = "".join(f"#{key}={value}" for key, value in facts.items())
    return f"{source.name}@{file}{told}{'' if branch == 'weights' else f'#{branch}'}"


def _chosen(rows: list[Signature], facts: Mapping[str, str]) -> list[Signature]:
    """Return the rows that are as the user says; those with an activation to choose are not known by it."""
    told = reading.typed(facts)
    if told.act is not None:
        return []
    return [
        row
        for row in rows
        if told.heads in (None, row.heads) and (told.mean is None or abs(told.mean[0] - row.mean) < 1e-3)
    ]


def _alike(state: Mapping[str, Tensor]) -> list[str]:
    """Return timm's models of a network's width, depth and patch."""
    proj = state["patch_embed.proj.weight"]
    size = int(proj.shape[0]), len({key.split(".")[1] for key in state if key.startswith("blocks.")}), proj.shape[-1]
    return [row.model for row in table() if (row.width, row.depth, row.patch) == size]


def _unbuildable(state: Mapping[str, Tensor]) -> list[str]:
    """Return the keys in which a network differs from the plain ViT of its sizes; empty if it is one."""
    from atdiag.networks.timm import architectures

    try:
        model, arguments = reading.sizes(state)
        size = reading.image_size(state, model, arguments)
        heads = arguments.get("num_heads") or reading.possible_heads(arguments["embed_dim"])[0]
        source = sources.Source("it", model, {**arguments, "num_heads": heads, "num_classes": 0})
        built = architectures.build(source, size, meta=True).state_dict()
    except UserError as fault:
        return [str(fault)]
    mine, theirs = ({line.split(" ")[0]: line for line in _lines(one)} for one in (state, built))
    return sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))


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
