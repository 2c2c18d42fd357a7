"""Real images: decoding, the test view, and a split as one object.

Every mode of Pillow is converted to 8-bit RGB by a rule. No rule depends on an image's own minimum and maximum, which
would change the contrast from image to image.

====================  ================================================================================================
mode                  rule
====================  ================================================================================================
RGB                   as it is. Of 16 bits a channel Pillow keeps the upper 8 (at most 1 from division by 257)
L, 1                  the grey value in all three channels; 1, 2 and 4 bits are spread over 0 to 255 by Pillow
P                     the colour in the palette
LA, RGBA, PA, RGBX    the colour; alpha is dropped, as in timm and torchvision, whatever is transparent
La, RGBa              the same, after division by alpha: these modes are premultiplied
CMYK                  (255 - C) (255 - K) / 255, likewise for M and Y; colour profiles are ignored in every mode
YCbCr                 JFIF's matrix (ITU-R BT.601, full range)
I;16, I;16B, I;16L    round(255 v / largest), the same in all three channels. largest: 65,535, so v / 257; 4,095 in a
                      TIFF whose BitsPerSample is 12. White as zero in a TIFF: 255 minus that
I                     the same, in a PGM, whose values Pillow scales from the file's own largest to 65,535, and in a PNG
                      by old versions of Pillow; otherwise refused: 32-bit or signed integers have no stated range
F, LAB, HSV, others   refused: no stated range, or no rule
====================  ================================================================================================

12 bits in a 16-bit PNG or TIFF can't be distinguished from a dark image, and are read as 16 bits: neither PNG's sBIT
(PNG's samples fill their range at any significant depth) nor TIFF's MaxSampleValue (a statistic of the image) is a
range. ``atdiag data check`` counts images of 16 bits that use less than an eighth of their range.

Of an animation or several pages, the first image is used (of an APNG, its default image). EXIF orientation is
ignored, as in timm; a TIFF's own Orientation is applied, by Pillow.
"""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from atdiag.core.spec import Data
from atdiag.data import endings
from atdiag.data.files import Files, Stored

RULE = 2
"""Version of the rule above; the decoded cache's file names hold it. 1: Pillow's own conversion, which clips I;16."""


class BrokenImageError(OSError):
    """An image that can't be decoded, named by its path. A run that meets one stops: nothing is skipped silently."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(path, why)  # args must match the constructor for unpickling
        self.path, self.why = path, why

    def __str__(self) -> str:
        return f"the image {self.path} can't be read: {self.why}"


FORMATS = tuple(endings.FORMATS)
"""Formats that are read, whatever a file's suffix."""

SEVERAL = "with several frames or pages: the first is taken"
TRANSPARENT = "with transparent pixels: alpha is dropped, and the colours under it show"
TURNED = "with an EXIF orientation, which is ignored"
DARK = "of 16-bit grey within an eighth of the range, so almost black at 8 bits: 12 bits have to be scaled to 16 first"


class _NoRuleError(Exception):
    """An image of a mode without a rule; args: the reason."""


def decode(path: Path, content: bytes | None = None, remarks: set[str] | None = None) -> Image.Image:
    """Decode an image as RGB at its stored size, by the rule for its mode. Raises BrokenImageError.

    content: the file's bytes, if already read. remarks: a set to which surprising properties are added, such as
    ``DARK``.
    """
    try:
        # Never by name: Pillow would map the file, and then gets the rows of a grey TIFF with an Orientation wrong.
        with (
            path.open("rb") if content is None else io.BytesIO(content) as file,
            Image.open(file, formats=FORMATS) as picture,
        ):
            out = as_rgb(picture)
            if remarks is not None:
                remarks |= _remarks(picture, out)
            return out
    except _NoRuleError as fault:
        raise BrokenImageError(path, str(fault)) from None
    except UnidentifiedImageError:
        raise BrokenImageError(path, "it is not an image of a known format") from None
    except OSError as fault:
        raise BrokenImageError(path, fault.strerror or str(fault)) from None
    except Exception as fault:  # Pillow's readers raise many types on a broken file
        raise BrokenImageError(path, f"{type(fault).__name__}: {fault}") from None


_COLOUR = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_MULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
_WIDE = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _ORIENTATION = 258, 262, 274
"""Tags of TIFF; the last is also EXIF's."""


def as_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture as opened to RGB by the rule for its mode (see the module). Raises _NoRuleError, OSError."""
    if picture.mode in _MULTIPLIED:
        return picture.convert(_MULTIPLIED[picture.mode]).convert("RGB")
    if picture.mode in _COLOUR:
        return picture.convert("RGB")
    largest, inverted = _range(picture), _white_is_zero(picture)
    values = np.asarray(picture).astype(np.int64)
    grey = ((510 * values + largest) // (2 * largest)).astype(np.uint8)  # 255 v / largest, rounded
    return Image.fromarray(255 - grey if inverted else grey).convert("RGB")


def _range(picture: Image.Image) -> int:
    """Return the largest possible value of a wide grey image. Raises _NoRuleError if the file states none."""
    mode = picture.mode
    if isinstance(picture, TiffImageFile) and mode in _WIDE[:-1]:
        return int(2 ** picture.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0]) - 1
    if mode in _WIDE[:-1] or (mode == "I" and picture.format in ("PPM", "PNG")):
        return 2**16 - 1
    why = {
        "I": "its pixels are signed or 32-bit integers, whose range the file does not state",
        "F": "its pixels are floating-point numbers, whose range the file does not state",
    }.get(mode, f"there is no rule that turns its pixels, of Pillow's mode {mode}, into RGB")
    raise _NoRuleError(f"{why}; save it as 8-bit RGB or as grey of 8 or 16 bits")


def _white_is_zero(picture: Image.Image) -> bool:
    """Return whether white is zero in a wide grey TIFF: Pillow inverts this at 8 bits, but not at 16."""
    if not isinstance(picture, TiffImageFile) or not picture.tile:
        return False
    how = picture.tile[0].args
    return picture.tag_v2.get(_PHOTOMETRIC) == 0 and isinstance(how, tuple) and how[0] == "I;16"


def _remarks(picture: Image.Image, rgb: Image.Image) -> set[str]:
    """Return the surprising properties of a picture that was converted to ``rgb``."""
    found = set()
    if picture.mode in _WIDE:
        if int(np.asarray(rgb).max()) < 256 // 8:
            found.add(DARK)
    elif picture.mode in ("LA", "PA", "RGBA", *_MULTIPLIED) or "transparency" in picture.info:
        alpha = picture.convert(_MULTIPLIED.get(picture.mode, picture.mode)).convert("RGBA").getchannel("A")
        if alpha.getextrema()[0] != 255:
            found.add(TRANSPARENT)
    if getattr(picture, "is_animated", False) and picture.format != "MPO":  # MPO: a preview, or a stereo pair
        found.add(SEVERAL)
    if not isinstance(picture, TiffImageFile):
        with suppress(Exception), warnings.catch_warnings(action="ignore"):  # EXIF is often malformed, never needed
            if picture.getexif().get(_ORIENTATION, 1) not in (0, 1):
                found.add(TURNED)
    return found


def load(stored: Stored) -> Image.Image:
    """Decode a stored image, in a file or a tar. Raises BrokenImageError."""
    try:
        content = stored.read()
    except OSError as fault:
        raise BrokenImageError(stored.path, fault.strerror or str(fault)) from None
    return decode(stored.path, content)


@dataclass(frozen=True)
class View:
    """The test view of an image: resize the shorter side to ``size / share``, then crop the centre.

    An image stored as ``size x size`` is used unchanged. interpolation: as Pillow names it.
    """

    size: int
    share: float
    interpolation: str = "bicubic"

    @classmethod
    def of(cls, data: Data, share: float) -> View:
        """Return the view of a spec of real images; ``share``: its data set's, unless the spec has its own."""
        assert data.image_size is not None
        return cls(data.image_size, data.crop_share or share, data.interpolation)

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Return the view, ``size x size``."""
        width, height = picture.size
        if width == height == self.size:
            return picture
        short = int(self.size / self.share)
        if width <= height:
            width, height = short, int(short * height / width)
        else:
            width, height = int(short * width / height), short
        picture = picture.resize((width, height), resampling(self.interpolation))
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return picture.crop((left, top, left + self.size, top + self.size))


def resampling(name: str) -> Image.Resampling:
    """Return Pillow's way of resizing, by its name in lower case."""
    return Image.Resampling[name.upper()]


def to_array(picture: Image.Image) -> NDArray[np.uint8]:
    """Convert a grey or colour picture to uint8 [C, H, W]."""
    array = np.asarray(picture)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def to_picture(array: NDArray[np.uint8]) -> Image.Image:
    """Convert uint8 [C, H, W] with one or three channels to a picture."""
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(np.moveaxis(array, 0, -1)))


_QUARTERS = {turns: getattr(Image.Transpose, f"ROTATE_{90 * turns}") for turns in (1, 2, 3)}


class ImageFolder:
    """A split of real images, each its own cluster.

    decoded: a file with all images decoded at their stored size, uint8 [n, H, W, 3] (see ``cache``); None: decode each
    image on demand. turns: counter-clockwise quarter turns of each image.
    """

    channels = 3

    def __init__(self, files: Files, view: View, decoded: Path | None = None, turns: int = 0) -> None:
        self.files, self.view, self.decoded, self.turns = files, view, decoded, turns
        self.size = view.size
        self.labels = np.array(files.labels, np.int64)
        self.clusters: NDArray[np.int64] = np.arange(len(files), dtype=np.int64)
        self._stored: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getstate__(self) -> dict[str, Any]:  # each process opens the decoded file itself
        return {**self.__dict__, "_stored": None}

    def _open(self) -> NDArray[np.uint8] | None:
        if self._stored is None and self.decoded is not None:
            self._stored = np.load(self.decoded, mmap_mode="r", allow_pickle=False)
        return self._stored

    def path(self, index: int) -> Path:
        """Return the path that names an image."""
        return self.files.stored(index).path

    def picture(self, index: int) -> Image.Image:
        """Return an image at its stored size, turned. Raises BrokenImageError."""
        stored = self._open()
        picture = load(self.files.stored(index)) if stored is None else Image.fromarray(stored[index])
        return picture.transpose(_QUARTERS[self.turns]) if self.turns else picture

    def take(self, samples: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return test views of some images, uint8 [b, 3, S, S]. Raises BrokenImageError."""
        stored = self._open()
        if stored is not None and stored.shape[1:3] == (self.size, self.size):
            return np.ascontiguousarray(np.rot90(np.moveaxis(stored[samples], -1, 1), self.turns, axes=(2, 3)))
        out = np.empty((len(samples), 3, self.size, self.size), np.uint8)
        for row, index in enumerate(samples):
            out[row] = to_array(self.view(self.picture(int(index))))
        return out

    def batch(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return test views of the images in ``[start, stop)``, uint8 [b, 3, S, S]."""
        return self.take(np.arange(start, min(stop, len(self))))
