"""How a teacher's own images looked: their size, crop and interpolation, by timm's configuration of its model.

Their normalisation is part of its network. Imports timm on first use, and nothing heavy before.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from pathlib import Path

from atdiag.data.catalogue import crop_share
from atdiag.networks.registry import stored, teachers
from atdiag.networks.weights import files, sources
from atdiag.networks.weights.sources import Source


@dataclass(frozen=True)
class Preprocessing:
    """The test view of a teacher's images."""

    image_size: int
    """Side, in pixels."""
    crop_share: float
    """Share of the shorter side that the central crop keeps."""
    interpolation: str
    """As Pillow names it."""


def of(reference: str) -> Preprocessing:
    """Return the preprocessing of the teacher that a reference names. Raises UserError if it names nothing."""
    if reference.startswith(stored.RUN):
        reference = teachers.canonical(reference)  # first: which run an id names depends on the folder of runs
    path, _ = sources.split_branch(reference.rpartition("@")[2])
    about = path.stat() if path.exists() else None
    return _of(reference, None if about is None else (about.st_size, about.st_mtime_ns))


@lru_cache(maxsize=64)
def _of(reference: str, _stamp: tuple[int, int] | None) -> Preprocessing:
    import timm

    from atdiag.networks.timm import architectures

    reference = teachers.canonical(reference)
    path = sources.split_reference(reference)[1] or Path()
    if reference.startswith(stored.RUN) and (run := stored.run_of(path)) and run.spec.data.image_size:
        seen = run.spec.data
        return Preprocessing(run.spec.network.image_size, seen.crop_share or crop_share(seen.name), seen.interpolation)
    if reference.startswith(stored.OURS) and (own := stored.network(path)):
        return Preprocessing(own.image_size, 0.875, "bicubic")  # its file says nothing of crops
    source = teachers.source(reference)
    facts = timm.get_pretrained_cfg(source.model)
    row = teachers.registry().get(reference.partition("@")[0])
    size = row.image_size if row is not None and row.image_size else architectures.native_size(source)
    size = _size_in_file(source) or size
    crop = float(facts.crop_pct) if facts is not None and facts.crop_pct else 0.875
    interpolation = str(facts.interpolation) if facts is not None and facts.interpolation else "bicubic"
    known = ("bicubic", "bilinear", "lanczos", "nearest", "box", "hamming")
    return Preprocessing(size, crop, interpolation if interpolation in known else "bicubic")


def _size_in_file(source: Source) -> int | None:
    """Return the image size that a user's file was trained at, by its position embeddings; None if it has none."""
    from atdiag.networks.weights import formats

    path = sources.find(source) if source.file is not None else None
    if path is None:
        return None
    state = formats.convert(files.outline(path), source.branch).state
    positions, proj = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    if positions is None or proj is None or positions.ndim != 3:
        return None
    tokens, patch = int(positions.shape[1]), int(proj.shape[-1])
    for others in (1, 0, 2, 5):  # class token, none, and with a distillation token or four registers
        if tokens > others and isqrt(tokens - others) ** 2 == tokens - others:
            return isqrt(tokens - others) * patch
    return None
