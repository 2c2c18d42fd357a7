"""Cache of decoded data sets: a file in the cache folder holds a split's pixels for all later runs.

A split is cached if all its images have one size and the total is at most ``MOST`` bytes. The cache file's name is a
hash of the list of image files with sizes and modification times, and the version of the rule by which pixels are
decoded, so neither a changed image nor pixels of an older rule are ever served.
It is written to a temporary file and renamed; what a killed process left is never read.
"""

from __future__ import annotations

import io
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image

from atdiag.core import paths
from atdiag.core.resources import available_cores
from atdiag.data.decoding import FORMATS, RULE, BrokenImageError, load
from atdiag.data.files import Files

MOST = 4 * 2**30
"""Maximum bytes of pixels cached for one split (CIFAR-10: 0.15 GB; Imagenette-128: 0.47 GB)."""

_LOOK = 64
_CHUNK = 256


def decoded(files: Files) -> Path | None:
    """Return the file with a split's decoded pixels, uint8 [n, H, W, 3], created if needed; None if not cacheable.

    Raises BrokenImageError. If the cache folder can't be written, warns, and images are then decoded on demand: slower,
    but with the same result.
    """
    size = _one_size(files)
    if size is None:
        return None
    shape = (len(files), size[1], size[0], 3)
    path = paths.cache() / "decoded" / f"{files.fingerprint(with_times=True)[:32]}-{RULE}.npy"
    mixed = path.with_suffix(".mixed")  # marks a split whose images turned out to have several sizes
    if mixed.exists():
        return None
    if _sound(path, shape):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if _sound(path, shape):  # another process created it meanwhile
                return path
            for left in path.parent.glob(f"{path.stem}.*.part"):  # left by a killed process: we hold the lock
                left.unlink()
            if not _write(path, files, shape):
                mixed.touch()
                return None
    except BrokenImageError:
        raise
    except OSError as fault:
        warnings.warn(f"no decoded cache in {path.parent} ({fault}): images are decoded as needed", stacklevel=2)
        return None
    return path


def _one_size(files: Files) -> tuple[int, int] | None:
    """Return the common size (width, height) of a sample of the images, if the whole split would fit."""
    look = np.unique(np.linspace(0, len(files) - 1, _LOOK).astype(int))
    sizes = set()
    for index in look:
        stored = files.stored(int(index))
        try:
            with Image.open(io.BytesIO(stored.read()), formats=FORMATS) as picture:
                sizes.add(picture.size)
        except Exception:
            load(stored)  # raises the error that names the fault
            raise
        if len(sizes) > 1:
            return None
    (size,) = sizes
    return size if 3 * size[0] * size[1] * len(files) <= MOST else None


def _sound(path: Path, shape: tuple[int, ...]) -> bool:
    """Return whether a complete cache of this shape exists; remove an invalid one."""
    if not path.exists():
        return False
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.shape == shape and array.dtype == np.uint8 and array.flags.c_contiguous:
            return True
    except (ValueError, OSError, EOFError):
        pass
    path.unlink(missing_ok=True)
    return False


def _write(path: Path, files: Files, shape: tuple[int, ...]) -> bool:
    """Decode all images into a file; return False if one differs in size. Raises OSError if the disk is full."""
    need, free = int(np.prod(shape)), shutil.disk_usage(path.parent).free
    if need > free - 2**28:
        raise OSError(f"{need / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free")
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        # Use writes, not a memory map: on a full disk a write raises, a store to a mapped page kills the process.
        with part.open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for pixels in _all_pixels(files, shape[1:]):
                if pixels is None:
                    return False
                file.write(pixels)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return True


def _all_pixels(files: Files, shape: tuple[int, ...]) -> Iterator[bytes | None]:
    def one(index: int) -> bytes | None:
        picture = load(files.stored(index))
        return picture.tobytes() if (picture.height, picture.width, 3) == shape else None

    with ThreadPoolExecutor(available_cores()) as pool:  # Pillow releases the GIL while decoding
        for start in range(0, len(files), _CHUNK):
            yield from pool.map(one, range(start, min(start + _CHUNK, len(files))))
