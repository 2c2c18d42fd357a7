"""Corrupt test images: eleven corruptions at five severities, after Hendrycks & Dietterich 2019.

The selection and severities follow "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (ICLR 2019), whose ImageNet-C is for 224 px and CIFAR-10-C for 32 px; ``occlusion`` is ours. The
code is ours, so numbers are not comparable with published ones for these two sets.

Two rules adapt a corruption to any size. **Lengths** (a blur's radius, a motion's extent) are proportional to
the image's width: the same share of a 20 px scene is blurred as of a 224 px photograph. **Intensities** (noise,
contrast, JPEG quality ...) are interpolated in the logarithm of the width between values for 32 px and for 224 px,
because noise of equal strength destroys more where fewer pixels show an object; outside that range they are constant.

Everything random is a pure function of corruption, image index and position (``randomness.uniform``), and the *same*
numbers serve all severities: the noise of severity 3 is that of severity 2, stronger. So severities are paired like
the arms of an experiment, and a batch's composition never matters.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import fft, special

from atdiag.core import randomness
from atdiag.data.catalogue import CORRUPTIONS, SEVERITIES, SMALLEST
from atdiag.data.decoding import to_array, to_picture
from atdiag.data.splits import Split

_SEED = 0  # part of a test set's definition, as the test scenes are, and not of a run
_VALUES = 2**20  # pixel values processed at a time
_FLOAT = NDArray[np.float64]

Five = tuple[float, float, float, float, float]


@dataclass(frozen=True)
class _Batch:
    """Images to corrupt. pixels: [b, C, H, W] in [0, 1]; indices: [b]; name: stream of the random numbers."""

    pixels: _FLOAT
    indices: NDArray[np.int64]
    name: str

    @property
    def width(self) -> int:
        return int(self.pixels.shape[-1])

    def per_value(self) -> _FLOAT:
        """Return a uniform number for each value of each image, [b, C, H, W]."""
        count = int(np.prod(self.pixels.shape[1:]))
        drawn = randomness.uniform(_SEED, f"corruption/{self.name}", self.indices[:, None], np.arange(count))
        return drawn.reshape(self.pixels.shape)

    def per_image(self, count: int) -> _FLOAT:
        """Return ``count`` uniform numbers for each image, [b, count]."""
        return randomness.uniform(_SEED, f"corruption/{self.name}", self.indices[:, None], np.arange(count))


def _intensity(width: int, small: Five, large: Five, severity: int) -> float:
    """Interpolate an intensity geometrically between its values for 32 and 224 px, by the logarithm of the width."""
    share = np.clip(np.log(width / 32) / np.log(224 / 32), 0, 1)
    return float(small[severity - 1] ** (1 - share) * large[severity - 1] ** share)


def _length(width: int, at_224: Five, severity: int) -> float:
    """Return a length in pixels, proportional to the width."""
    return at_224[severity - 1] * width / 224


# --- noise ---------------------------------------------------------------------------------------------------------


def _gaussian_noise(batch: _Batch, severity: int) -> _FLOAT:
    """Add independent normal noise to every value."""
    scale = _intensity(batch.width, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38), severity)
    return np.asarray(batch.pixels + scale * special.ndtri(batch.per_value() + 2.0**-55))


def _shot_noise(batch: _Batch, severity: int) -> _FLOAT:
    """Replace values by photon counts: Poisson with the pixel's brightness as mean."""
    rate = _intensity(batch.width, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3), severity)
    levels = np.rint(batch.pixels * 255).astype(np.int64)
    steps, most = _poisson_steps(rate)
    # Apply the inverse distribution function of each level: the rows lie end to end, each offset by its number.
    counts = np.searchsorted(steps, (levels + batch.per_value()).ravel(), side="right") - levels.ravel() * most
    return (counts / rate).reshape(levels.shape)


@lru_cache(maxsize=16)
def _poisson_steps(rate: float) -> tuple[_FLOAT, int]:
    """Return the distribution functions of Poisson counts of mean ``level / 255 * rate``, a row for each level."""
    most = int(rate + 10 * np.sqrt(rate) + 10)
    mean = np.arange(256)[:, None] / 255 * rate
    steps = special.pdtr(np.arange(most), mean)
    steps[:, -1] = 1.0
    return (np.arange(256)[:, None] + steps).ravel(), most


def _impulse_noise(batch: _Batch, severity: int) -> _FLOAT:
    """Add salt-and-pepper noise: set a share of the values to 0 or 1."""
    share = _intensity(batch.width, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27), severity)
    drawn = batch.per_value()
    return np.where(drawn < share / 2, 0.0, np.where(drawn >= 1 - share / 2, 1.0, batch.pixels))


# --- blur ----------------------------------------------------------------------------------------------------------


def _defocus_blur(batch: _Batch, severity: int) -> _FLOAT:
    """Blur every point to a disc."""
    return _convolve(batch.pixels, _disc(_length(batch.width, (3, 4, 6, 8, 10), severity))[None])


def _motion_blur(batch: _Batch, severity: int) -> _FLOAT:
    """Blur every point to a line, of one direction in each image."""
    length = _length(batch.width, (6, 10, 16, 24, 32), severity)
    angle = np.pi * batch.per_image(1)
    along = length * (np.arange(count := max(16, int(8 * length))) / (count - 1) - 0.5)
    return _convolve(batch.pixels, _kernels(along * np.sin(angle), along * np.cos(angle)))


@lru_cache(maxsize=64)
def _disc(radius: float) -> _FLOAT:
    side = max(33, int(8 * radius))
    y, x = radius * np.linspace(-1, 1, side)[:, None], radius * np.linspace(-1, 1, side)
    inside = y**2 + x**2 <= radius**2 * (1 + 1e-9)
    return np.asarray(_kernels(*(np.broadcast_to(v, inside.shape)[inside][None] for v in (y, x)))[0])


def _kernels(y: _FLOAT, x: _FLOAT) -> _FLOAT:
    """Return blur kernels [b, k, k] of points [b, t] in pixels from the centre.

    A point between pixels is split over its four neighbours (bilinear interpolation), so that lengths below one pixel
    also blur, the more the longer they are.
    """
    reach = int(np.ceil(max(np.abs(y).max(), np.abs(x).max())))
    grid = np.arange(-reach, reach + 1)
    rows, columns = (np.maximum(1 - np.abs(v[..., None] - grid), 0) for v in (y, x))
    return np.asarray(np.matmul(rows.transpose(0, 2, 1), columns) / y.shape[-1])


def _convolve(pixels: _FLOAT, kernels: _FLOAT) -> _FLOAT:
    """Convolve images [b, C, H, W] with kernels [b or 1, k, k], with mirrored borders."""
    reach = kernels.shape[-1] // 2
    padded = np.pad(pixels, ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="symmetric")
    shape = [fft.next_fast_len(side, real=True) for side in padded.shape[-2:]]
    product = fft.rfft2(padded, shape) * fft.rfft2(kernels, shape)[:, None]
    whole = fft.irfft2(product, shape)
    height, width = pixels.shape[-2:]
    out = whole[..., 2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]
    return np.asarray(np.round(out, 9))  # rounding errors of the transform must not decide how 0.5 is rounded


# --- weather and light ---------------------------------------------------------------------------------------------


def _fog(batch: _Batch, severity: int) -> _FLOAT:
    """Blend in a bright field that is smooth at every scale."""
    thick = _intensity(batch.width, (0.17, 0.33, 0.43, 0.50, 0.60), (0.60, 0.67, 0.71, 0.73, 0.75), severity)
    brightest = batch.pixels.max(axis=(1, 2, 3), keepdims=True)
    return np.asarray((1 - thick) * batch.pixels + thick * brightest * _clouds(batch)[:, None])


_OCTAVES = 5


def _clouds(batch: _Batch) -> _FLOAT:
    """Return random fields [b, H, W] in [0, 1]: grids of 3 x 3 to 33 x 33 points, each half as strong as the last."""
    height, width = batch.pixels.shape[-2:]
    sides = [2**octave + 1 for octave in range(1, _OCTAVES + 1)]
    drawn = np.split(batch.per_image(sum(side**2 for side in sides)), np.cumsum([s**2 for s in sides])[:-1], axis=1)
    field = np.zeros((len(batch.pixels), height, width))
    for octave, (side, points) in enumerate(zip(sides, drawn, strict=True)):
        field += 2.0**-octave * _stretched(_stretched(points.reshape(-1, side, side), 1, height), 2, width)
    low, high = field.min(axis=(1, 2), keepdims=True), field.max(axis=(1, 2), keepdims=True)
    return np.asarray((field - low) / (high - low))


def _stretched(points: _FLOAT, axis: int, pixels: int) -> _FLOAT:
    """Stretch points over ``pixels`` along an axis by linear interpolation."""
    last = points.shape[axis] - 1
    at = np.linspace(0, last, pixels)
    before = np.minimum(at.astype(np.int64), last - 1)
    share = (at - before).reshape(-1, *[1] * (points.ndim - axis - 1))
    return np.asarray((1 - share) * points.take(before, axis) + share * points.take(before + 1, axis))


def _brightness(batch: _Batch, severity: int) -> _FLOAT:
    """Raise the brightness by a constant: the value in HSV (for a grey image, the grey level)."""
    more = _intensity(batch.width, (0.05, 0.10, 0.15, 0.20, 0.30), (0.1, 0.2, 0.3, 0.4, 0.5), severity)
    value = batch.pixels.max(axis=1, keepdims=True)
    lighter = np.minimum(value + more, 1)
    # Scaling all channels by one factor keeps hue and saturation; black has neither and becomes grey.
    return np.asarray(np.where(value > 0, batch.pixels * lighter / np.where(value > 0, value, 1), lighter))


def _contrast(batch: _Batch, severity: int) -> _FLOAT:
    """Move values towards the image's mean, channel by channel."""
    left = _intensity(batch.width, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05), severity)
    mean = batch.pixels.mean(axis=(2, 3), keepdims=True)
    return np.asarray(mean + left * (batch.pixels - mean))


def _occlusion(batch: _Batch, severity: int) -> _FLOAT:
    """Hide part of the image behind a grey square; a severity's square covers that of the severity below."""
    share = (0.05, 0.10, 0.20, 0.30, 0.40)[severity - 1]
    height, width = batch.pixels.shape[-2:]
    drawn = batch.per_image(2)
    inside = []
    for axis, side in enumerate((height, width)):
        hidden = max(1, round(side * share**0.5))
        first = np.floor(drawn[:, axis, None] * (side - hidden + 1))
        inside.append((np.arange(side) >= first) & (np.arange(side) < first + hidden))
    return np.where((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.5, batch.pixels)


# --- digital -------------------------------------------------------------------------------------------------------


def _pixelate(batch: _Batch, severity: int) -> _FLOAT:
    """Coarsen pixels: move each block towards its mean.

    A small image has no room for five block sizes: there, blocks of 2 x 2 pixels move part of the way to their mean.
    Blocks of fractional size would shift the picture by an amount that depends on the sizes, so a higher severity could
    do less.
    """
    side = round(_intensity(batch.width, (2, 2, 2, 2, 2), (2, 2, 3, 4, 5), severity))
    way = _intensity(batch.width, (0.3, 0.5, 0.65, 0.8, 1.0), (0.75, 1.0, 1.0, 1.0, 1.0), severity)
    return (1 - way) * batch.pixels + way * _blocks(batch.pixels, side)


def _blocks(pixels: _FLOAT, side: int) -> _FLOAT:
    """Replace each ``side x side`` block, from the upper left corner, by its mean."""
    out = pixels
    for axis in (2, 3):
        starts = np.arange(0, out.shape[axis], side)
        counts = np.diff(np.append(starts, out.shape[axis]))
        means = np.add.reduceat(out, starts, axis) / counts.reshape(-1, *[1] * (3 - axis))
        out = np.repeat(means, counts, axis)
    return out


def _jpeg(picture: Image.Image, severity: int) -> Image.Image:
    """Compress as JPEG and decode again."""
    quality = round(_intensity(picture.width, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7), severity))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as again:
        return again.convert(picture.mode)


_ARRAYS: dict[str, Callable[[_Batch, int], _FLOAT]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "motion_blur": _motion_blur,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "occlusion": _occlusion,
    "pixelate": _pixelate,
}


def corrupt(pixels: NDArray[np.uint8], name: str, severity: int, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Corrupt images [b, C, H, W] (C = 1 or 3; uint8, 0 to 255); the result has the same form.

    indices: [b], each image's number in its test set, which keys its noise. Raises ValueError for an unknown corruption
    or severity, and for images of another type, smaller than 20 px, or without 1 or 3 channels.
    """
    if name not in CORRUPTIONS or severity not in SEVERITIES:
        raise ValueError(
            f"no corruption {name!r} of severity {severity} (known: {', '.join(CORRUPTIONS)}; {SEVERITIES})"
        )
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or pixels.dtype != np.uint8:
        raise ValueError(f"corruptions need uint8 images with 1 or 3 channels, not {pixels.dtype} {pixels.shape}")
    if min(pixels.shape[-2:]) < SMALLEST:
        raise ValueError(f"corruptions need images of at least {SMALLEST} px, not {pixels.shape[-1]} px")
    out = np.empty_like(pixels)
    if name == "jpeg":
        for row, image in enumerate(pixels):
            out[row] = to_array(_jpeg(to_picture(image), severity))
        return out
    at_once = max(1, _VALUES // int(np.prod(pixels.shape[1:])))
    for start in range(0, len(pixels), at_once):
        rows = slice(start, start + at_once)
        batch = _Batch(pixels[rows].astype(np.float64) / 255, indices[rows].astype(np.int64), name)
        out[rows] = np.rint(np.clip(_ARRAYS[name](batch, severity), 0, 1) * 255)
    return out


class Corrupted:
    """A corrupted split: labels and clusters are the split's, an image's number is its index."""

    def __init__(self, images: Split, name: str, severity: int) -> None:
        self.images, self.name, self.severity = images, name, severity
        self.labels, self.clusters = images.labels, images.clusters
        self.channels, self.size = images.channels, images.size

    def __len__(self) -> int:
        return len(self.images)

    def picture(self, index: int) -> Image.Image:
        """Return one image in its test view."""
        return to_picture(self.take(np.array([index]))[0])

    def take(self, samples: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return test views of some images, uint8 [b, C, S, S]."""
        return corrupt(self.images.take(samples), self.name, self.severity, samples)

    def batch(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return test views of the images in ``[start, stop)``, uint8 [b, C, S, S]."""
        return corrupt(self.images.batch(start, stop), self.name, self.severity, np.arange(start, min(stop, len(self))))
