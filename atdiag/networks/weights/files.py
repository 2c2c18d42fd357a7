"""Read untrusted weight files: a damaged one, or one that would run code, is refused with a one-line reason.

A file is checked against its own header before any of it is allocated. ``check`` needs no torch.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from atdiag.core.text import shortlist
from atdiag.networks.weights import inert, shards
from atdiag.networks.weights.shards import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["safetensors", "zip", "pickle", "index"]

_LARGEST_HEADER = 100_000_000  # safetensors' limit


def check(path: Path) -> Kind:
    """Return the kind of a weight file, from its bytes rather than its name.

    Raises WeightsError for a file that is truncated, has trailing data beyond its header's size, or is not a weight
    file.
    """
    if shards.is_index(path):
        for one in shards.members(path):
            check(one)
        return "index"
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
    if start[8:9] == b"{":
        _check_safetensors(path, size)
        return "safetensors"
    if start.startswith(b"PK"):
        _check_zip(path, size)
        return "zip"
    if start.startswith(b"\x80"):
        return "pickle"
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a Git LFS pointer, not the weights that it points to", "fetch them by 'git lfs'")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise WeightsError(f"{path} is a web page, not a weight file", "download the file itself")
    if size == 0:
        raise WeightsError(f"{path} is empty (0 bytes)", "copy or download it again")
    if start.lstrip().startswith(b"{") and b'"weight_map"' in path.read_bytes():
        raise WeightsError(
            f"{path} is an index of shards, which holds no weights itself",
            f"let its name end in .index.json, as {path.with_name('model.safetensors.index.json')}",
        )
    raise WeightsError(f"{path} is neither a safetensors file nor a checkpoint of torch.save")


def _check_safetensors(path: Path, size: int) -> None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _LARGEST_HEADER):
            raise WeightsError(f"{path} is damaged: its header should be {length} bytes long, the file has {size}")
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            whole = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, IndexError) as fault:
            raise WeightsError(f"{path} is damaged: its header can't be read ({fault})") from None
    if not ends:
        raise WeightsError(f"{path} holds no tensors")
    if whole != size:
        raise WeightsError(f"{path} is {_short(whole, size)}: its header asks for {whole} bytes, the file has {size}")


def _short(whole: int, size: int) -> str:
    return "truncated" if size < whole else "damaged"


def _check_zip(path: Path, size: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError) as fault:
        raise WeightsError(f"{path} is truncated or damaged: it has no list of contents ({fault})") from None
    # torch.save does not compress, so it can't have written a file that expands when read.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise WeightsError(f"{path} is a compressed archive, not a checkpoint of torch.save")
    if (whole := sum(entry.file_size for entry in entries)) > size:
        raise WeightsError(f"{path} is damaged: its contents should be {whole} bytes long, the file has {size}")


def read(path: Path) -> Mapping[str, Any]:
    """Return the contents of a weight file, with tensors on the CPU (memory-mapped for a torch checkpoint).

    Raises WeightsError for a damaged file, and for a pickle that would run code, which it names.
    """
    return _contents(path, "cpu")


def outline(path: Path) -> Mapping[str, Any]:
    """Return the contents of a weight file, with tensors that have shapes and no values (on the meta device).

    Raises WeightsError as :func:`read`.
    """
    return _contents(path, "meta")


def _contents(path: Path, device: Literal["cpu", "meta"]) -> Mapping[str, Any]:
    kind = check(path)
    if kind == "index":
        return _joined(path, device)
    try:
        if kind == "safetensors":
            return _from_safetensors(path, device)
        contents = _from_torch(path, device, mmap=kind == "zip")
    except Exception as fault:  # the unpickler raises anything on invalid bytes
        if isinstance(fault, pickle.UnpicklingError) and (names := _code_in(path, fault)):
            raise WeightsError(
                f"{path} is refused: unpickling it would call {names}, and a checkpoint needs tensors only",
                "if you trust it, save its state dict alone, best as safetensors",
            ) from None
        raise WeightsError(f"{path} is truncated or damaged ({_first_line(fault)})") from None
    if not isinstance(contents, Mapping):
        raise WeightsError(f"{path} holds a {type(contents).__name__}, not a dictionary of tensors")
    return contents


def _from_safetensors(path: Path, device: str) -> Mapping[str, Any]:
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    if device == "cpu":
        found: Mapping[str, Any] = load_file(path)
        return found
    with safe_open(path, "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - it is no dictionary
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def _from_torch(path: Path, device: str, *, mmap: bool) -> Any:
    import torch

    with torch.serialization.safe_globals(inert.classes()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the pickle protocol
        return torch.load(path, map_location=device, weights_only=True, mmap=mmap)


def _joined(index: Path, device: Literal["cpu", "meta"]) -> Mapping[str, Any]:
    """Return the tensors of all shards, each of which must hold exactly the keys that the index gives to it."""
    meant = shards.weight_map(index)
    joined: dict[str, Any] = {}
    for shard in shards.members(index):
        contents = _contents(shard, device)
        listed = {key for key, name in meant.items() if name == shard.name}
        if odd := sorted(listed.symmetric_difference(contents)):
            told = "lacks" if odd[0] in listed else "holds, against its index,"
            raise WeightsError(f"{shard} {told} {shortlist(odd)}", f"put the shards that belong to {index.name} there")
        joined |= contents
    return joined


def tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file that atdiag wrote.

    Raises WeightsError for any other file, and OSError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if check(path) != "safetensors":
        raise WeightsError(f"{path} is not a safetensors file")
    try:
        found: dict[str, Tensor] = load_file(path)
    except (SafetensorError, ValueError) as fault:
        raise WeightsError(f"{path} is damaged ({_first_line(fault)})") from None
    return found


def _first_line(fault: BaseException) -> str:
    return (str(fault).strip() or type(fault).__name__).splitlines()[0][:200]


def _code_in(path: Path, fault: pickle.UnpicklingError) -> str:
    """Return what a pickle would call besides torch's own constructors; empty if it is only damaged."""
    import torch

    text = str(fault)
    try:
        names = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except (RuntimeError, ValueError, pickle.UnpicklingError):  # the format before torch 1.6
        names = set(re.findall(r"GLOBAL (\S+)", text))
    if names:
        return ", ".join(sorted(names))
    return "code" if "Unsupported" in text else ""
