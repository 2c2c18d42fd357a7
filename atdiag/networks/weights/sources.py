"""Where weight files lie: shipped, named by the user, in the cache folder, in the hub's cache. Loads none of them.

Needs no torch, so that planning stays fast.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from atdiag.core import paths
from atdiag.core.errors import UserError
from atdiag.core.runs import file_sha256, write_atomically
from atdiag.core.spec import Network, Teacher

SHIPPED = Path(__file__).parent / "miniatures"
"""The miniature teachers that come with the package: ``<name>.safetensors``, half precision."""

SUFFIXES = (".safetensors", ".pth", ".pt", ".pth.tar", ".bin")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""What timm's repositories on the hub call their weights, the preferred one first."""

_WORTH_REMEMBERING = 8_000_000
"""Bytes from which on a file's sha256 is remembered between processes (smaller ones are hashed in milliseconds)."""


class WeightsMissingError(FileNotFoundError):
    """A teacher's weights are not on this machine; the message says where they would go."""


class WeightsError(UserError, ValueError):
    """A weight file is not what it should be: refused, with the reason in one line."""


@dataclass(frozen=True)
class Source:
    """What a teacher's published network is built from, and where its weights may lie."""

    name: str
    """The registry's name, or ``timm:MODEL``; without a file's path."""
    model: str
    """timm's name of the architecture."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What its constructor takes beside the image size."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    """Of the pixels in [0, 1]; None: timm's for the model."""
    formats: tuple[str, ...] | None = None
    """Key layouts that its file may have (see ``formats``); None: any."""
    file: Path | None = None
    """The file that the user named; no other is then looked for."""
    branch: Literal["weights", "ema"] = "weights"
    """Which weights of the file: the raw ones, or their moving average."""
    hub: str | None = None
    url: str | None = None


AVERAGE = "#ema"
"""Ends a reference that means the moving average in a file: ``timm:MODEL@FILE#ema``."""


def split_reference(reference: str) -> tuple[str, Path | None, Literal["weights", "ema"]]:
    """Split ``NAME@FILE#ema`` into name, file and branch. A path that is there is taken whole, ``#ema`` included."""
    name, at, typed = reference.partition("@")
    if not at:
        return name, None, "weights"
    file = Path(typed).expanduser()
    if typed.endswith(AVERAGE) and not file.exists():
        return name, Path(typed.removesuffix(AVERAGE)).expanduser(), "ema"
    return name, file, "weights"


# --- the cache folder ----------------------------------------------------------------------------------------------


def cached_name(source: Source) -> str:
    """What a source's file is called in the cache folder, less its suffix: ``mocov3_s``."""
    return source.name.removeprefix("timm:").replace("/", "_")


def place(source: Source, suffix: str = ".pth") -> Path:
    """Where in the cache folder a source's checkpoint is put, by ``atdiag teachers pull`` or by hand."""
    return paths.cache() / f"{cached_name(source)}{suffix}"


def find(source: Source) -> Path | None:
    """The file with a source's weights, if it is on this machine. Asks no network.

    Raises WeightsMissingError where the user named a file that is not there.
    """
    if source.file is not None:
        if not source.file.is_file():
            raise WeightsMissingError(f"{source.file}: there is no such file (weights of {source.name})")
        return source.file
    for suffix in SUFFIXES:
        if (path := place(source, suffix)).is_file():
            return path
    return _in_hub_cache(source.hub) if source.hub else None


def _in_hub_cache(repository: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for name in HUB_FILES:
        path = try_to_load_from_cache(repository, name)
        if isinstance(path, str):
            return Path(path)
    return None


def how_to_get(source: Source) -> str:
    """One line that says how to bring a source's weights to this machine."""
    if source.file is not None:
        return f"{source.file} must be there"
    by_hand = f"put the file at {place(source)} (or .safetensors), or name it: {source.name}@/path/to/file"
    if source.hub or source.url:
        return f"'atdiag teachers pull {source.name}' downloads them; without a network, {by_hand}"
    return by_hand


# --- sha256 --------------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes; of a large one, remembered in the cache folder by path, size and time of change."""
    about = path.stat()
    if about.st_size < _WORTH_REMEMBERING:
        return fresh_sha256(path)
    resolved = str(path.resolve())
    note = paths.cache() / "sha256" / f"{hashlib.sha256(resolved.encode()).hexdigest()[:32]}.json"
    known = {"path": resolved, "size": about.st_size, "mtime_ns": about.st_mtime_ns}
    try:
        noted = json.loads(note.read_text())
        if {key: noted[key] for key in known} == known:
            return str(noted["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not noted yet
    digest = fresh_sha256(path)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(note, json.dumps({**known, "sha256": digest}))
    except OSError:
        pass  # a cache folder that can't be written costs time only
    return digest


def fresh_sha256(path: Path) -> str:
    """The sha256 of a file's bytes as they are now, whatever is remembered."""
    return file_sha256(path)


# --- the shipped miniatures ----------------------------------------------------------------------------------------


def metadata(path: Path) -> dict[str, Any]:
    """The JSON values in a safetensors file's header, read without loading a tensor.

    Raises ValueError where the file is not such a file.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size <= 100_000_000 or size > path.stat().st_size:
                raise ValueError("no header")
            header = json.loads(file.read(size))
        return {key: json.loads(value) for key, value in header["__metadata__"].items()}
    except (ValueError, KeyError, TypeError) as fault:
        raise ValueError(f"{path} is not a safetensors file written by atdiag ({fault})") from None


def shipped_path(name: str) -> Path:
    """Where the miniature of a teacher lies, if it ships."""
    return SHIPPED / f"{name}.safetensors"


@cache
def _shipped_sha256(path: Path) -> str:
    return fresh_sha256(path)


def shipped(name: str) -> Teacher:
    """The spec of a miniature teacher that ships with the package."""
    path = shipped_path(name)
    if not path.exists():
        raise WeightsMissingError(
            f"the miniature of {name} is not in {SHIPPED}: rebuild it with 'atdiag pretrain {name} --install'"
        )
    network = Network(**metadata(path)["network"])
    return Teacher(name=name, profile="mini", network=network, sha256=_shipped_sha256(path))
