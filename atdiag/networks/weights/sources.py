"""Locate weight files: shipped, named by the user, in the cache folder, or in the hub's cache. Loads none of them.

Imports no torch, so that planning stays fast.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from atdiag.core import paths
from atdiag.core.errors import suggest
from atdiag.core.runs import file_sha256, write_atomically
from atdiag.core.spec import Network, Teacher
from atdiag.core.text import shortlist
from atdiag.networks.weights import shards
from atdiag.networks.weights.shards import WeightsError as WeightsError

SHIPPED = Path(__file__).parent / "miniatures"
"""The miniature teachers shipped with the package: ``<name>.safetensors``, half precision."""

Branch = Literal["weights", "ema", "student", "teacher"]
"""Which of several networks in a file: by default the raw weights, and of a pair the teacher's."""
BRANCHES = ("ema", "student", "teacher")
"""Those that can be typed: ``FILE#student``."""

FACTS = ("heads", "pixels", "act")
"""What a file may not show and can be typed after its name: ``FILE#heads=6#pixels=imagenet``, see ``reading``."""

SUFFIXES = (".safetensors", ".pth", ".pt", ".pth.tar", ".bin")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of weight files in timm's hub repositories, the preferred one first."""

FOLDER_FILES = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    "model_best.pth.tar",
)
"""Names of weight files that are looked for in a folder, the preferred one first."""

_WORTH_REMEMBERING = 8_000_000
"""Minimum size in bytes for caching a file's sha256 between processes (smaller files hash in milliseconds)."""


class WeightsMissingError(FileNotFoundError):
    """A teacher's weights are not on this machine; the message says where they belong."""


@dataclass(frozen=True)
class Source:
    """How a teacher's published network is built, and where its weights may be."""

    name: str
    """The registry's name, or ``timm:MODEL``; without a file's path."""
    model: str
    """timm's name of the architecture."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Constructor arguments besides the image size."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    """For pixels in [0, 1]; None: timm's for the model."""
    formats: tuple[str, ...] | None = None
    """Accepted key layouts of its file (see ``formats``); None: any."""
    file: Path | None = None
    """The file that the user named; no other is then looked for."""
    branch: Branch = "weights"
    """Which network of the file."""
    image_size: int | None = None
    """Its native resolution, in pixels; None: timm's for the model."""
    hub: str | None = None
    url: str | None = None


def split_reference(reference: str) -> tuple[str, Path | None, Branch]:
    """Split ``NAME@FILE#ema`` into name, file and branch. An existing path is taken literally, ``#ema`` included."""
    name, at, typed = reference.partition("@")
    if not at:
        return name, None, "weights"
    return name, *split_branch(typed)


def split_branch(typed: str) -> tuple[Path, Branch]:
    """Split ``FILE#ema`` into file and branch; an existing path is taken literally."""
    file, branch, _ = split_marks(typed)
    return file, branch


def split_marks(typed: str) -> tuple[Path, Branch, dict[str, str]]:
    """Split ``FILE#heads=6#pixels=imagenet#ema`` into file, branch and facts; an existing path is taken literally."""
    branch: Branch = "weights"
    facts: dict[str, str] = {}
    while not Path(typed).expanduser().exists():
        path, mark, last = typed.rpartition("#")
        key, equals, value = last.partition("=")
        if mark and last in BRANCHES and branch == "weights":
            branch = cast(Branch, last)
        elif mark and equals and key in FACTS and key not in facts:
            facts[key] = value
        else:
            break
        typed = path
    return Path(typed).expanduser(), branch, dict(reversed(facts.items()))


# --- the cache folder ----------------------------------------------------------------------------------------------


def cached_name(source: Source) -> str:
    """Return the name of a source's file in the cache folder, without its suffix: ``mocov3_s``."""
    return source.name.removeprefix("timm:").replace("/", "_")


def place(source: Source, suffix: str = ".pth") -> Path:
    """Return the path of a source's checkpoint in the cache folder, placed by ``atdiag teachers pull`` or by hand."""
    return paths.cache() / f"{cached_name(source)}{suffix}"


def find(source: Source) -> Path | None:
    """Return the file with a source's weights if it is on this machine, without using the network.

    A folder that the user named stands for the weight file in it. Raises WeightsMissingError if what the user named
    does not exist, and WeightsError for a folder without weights.
    """
    if source.file is not None:
        if source.file.is_dir():
            return in_folder(source.file)
        if not source.file.is_file():
            raise WeightsMissingError(
                f"{source.file}: there is no such file (weights of {source.name}){near(source.file)}"
            )
        return source.file
    for suffix in SUFFIXES:
        if (path := place(source, suffix)).is_file():
            return path
    return _in_hub_cache(source.hub) if source.hub else None


def near(file: Path) -> str:
    """Return a suggestion for a file that does not exist: another name in its folder, or another branch."""
    path, mark, typed = file.name.partition("#")
    if mark and file.with_name(path).exists():
        marks = (*BRANCHES, *(f"{fact}=" for fact in FACTS))
        return suggest(typed, marks) or f" (after # comes one of {', '.join(marks)})"
    try:
        return suggest(file.name, (one.name for one in file.parent.iterdir()))
    except OSError:
        return ""


def in_folder(folder: Path) -> Path:
    """Return the weight file in a folder: by the hub's names, or the only one. Raises WeightsError otherwise."""
    for name in FOLDER_FILES:
        if (path := folder / name).is_file():
            return path
    files = sorted(one.name for one in folder.iterdir() if one.name.endswith(SUFFIXES) and one.is_file())
    if len(files) != 1:
        told = f"holds {len(files)} weight files ({shortlist(files)})" if files else "holds no weight file"
        example = folder / (files[0] if files else "model.safetensors")
        raise WeightsError(f"the folder {folder} {told}", f"name one file, as {example}")
    return folder / files[0]


def hub_folder(repository: str) -> Path:
    """Return the folder of a repository in the hub's cache. Raises WeightsError if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repository, "config.json")
    except ValueError as fault:  # no name of a repository
        raise WeightsError(f"hf-hub:{repository} is no folder and no repository ({fault})") from None
    if not isinstance(found, str):
        raise WeightsError(
            f"{repository} is not in the hub's cache on this machine", f"fetch it by 'hf download {repository}'"
        )
    return Path(found).parent


def _in_hub_cache(repository: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for name in HUB_FILES:
        path = try_to_load_from_cache(repository, name)
        if isinstance(path, str):
            return Path(path)
    return None


def how_to_get(source: Source) -> str:
    """Return a one-line instruction for getting a source's weights onto this machine."""
    if source.file is not None:
        return f"{source.file} must be there"
    by_hand = f"put the file at {place(source)} (or .safetensors), or name it: {source.name}@/path/to/file"
    if source.hub or source.url:
        return f"'atdiag teachers pull {source.name}' downloads them; without a network, {by_hand}"
    return by_hand


# --- sha256 --------------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Return the sha256 of a file; for a large one, cached in the cache folder by path, size and modification time.

    That of an index of shards is of the shards' names and hashes.
    """
    if shards.is_index(path):
        return shards.combined({one.name: sha256(one) for one in shards.members(path)})
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
        pass  # not cached yet
    digest = fresh_sha256(path)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(note, json.dumps({**known, "sha256": digest}))
    except OSError:
        pass  # an unwritable cache folder only costs time
    return digest


def fresh_sha256(path: Path) -> str:
    """Return the sha256 of a file's current bytes, bypassing the cache."""
    if shards.is_index(path):
        return shards.combined({one.name: file_sha256(one) for one in shards.members(path)})
    return file_sha256(path)


# --- the shipped miniatures ----------------------------------------------------------------------------------------


def metadata(path: Path) -> dict[str, Any]:
    """Return the JSON values in a safetensors file's header, without loading a tensor.

    Raises ValueError if the file is not a safetensors file.
    """
    try:
        if not (found := texts(path)):
            raise ValueError("no metadata")
        return {key: json.loads(value) for key, value in found.items()}
    except ValueError as fault:
        raise ValueError(f"{path} is not a safetensors file written by atdiag ({fault})") from None


def texts(path: Path) -> dict[str, str]:
    """Return the texts in a safetensors file's header, without loading a tensor; none is usual.

    Raises ValueError if it is not a whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return dict(file.metadata() or {})
    except SafetensorError as fault:
        raise ValueError(str(fault)) from None


def shipped_path(name: str) -> Path:
    """Return the path of a teacher's miniature, if it ships."""
    return SHIPPED / f"{name}.safetensors"


@cache
def shipped_sha256(path: Path) -> str:
    """Return the sha256 of a shipped file, hashed once for each process."""
    return fresh_sha256(path)


def shipped(name: str) -> Teacher:
    """Return the spec of a miniature teacher that ships with the package."""
    path = shipped_path(name)
    if not path.exists():
        raise WeightsMissingError(
            f"the miniature of {name} is not in {SHIPPED}: rebuild it with 'atdiag pretrain {name} --install'"
        )
    network = Network(**metadata(path)["network"])
    return Teacher(name=name, profile="mini", network=network, sha256=shipped_sha256(path))
