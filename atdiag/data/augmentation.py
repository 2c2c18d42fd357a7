"""Augmentation: a training image's view is a pure function of data seed, epoch and sample.

Geometry is drawn for a whole batch at once from :func:`atdiag.core.randomness.uniform`; RandAugment, which draws from
global generators, runs under :func:`atdiag.core.randomness.isolated`. Images stay uint8 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from atdiag.core import randomness
from atdiag.core.spec import Recipe
from atdiag.data.catalogue import IMAGENET_MEAN
from atdiag.data.decoding import resampling, to_array, to_picture
from atdiag.data.splits import Split

ATTEMPTS = 10
"""Attempts to draw a shape that fits the image, as in torchvision and timm."""

CROP_RATIO = (3 / 4, 4 / 3)
ERASE_AREA = (0.02, 1 / 3)
ERASE_RATIO = (0.3, 1 / 0.3)

Box = tuple[int, int, int, int]
"""Top, left, height, width in pixels."""


def _shape(area: float, ratio: float) -> tuple[int, int]:
    """Return height and width of a rectangle of this area whose width is ``ratio`` times its height."""
    return round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share


def _log_between(low: float, high: float, share: float) -> float:
    return math.exp(_between(math.log(low), math.log(high), share))


def crop_box(height: int, width: int, least: float, draws: NDArray[np.float64]) -> Box:
    """Draw a random resized crop (Szegedy et al. 2015) by torchvision's rule, from ``draws`` [ATTEMPTS, 4] in [0, 1).

    Its area is between ``least`` and 1 of the image's, its aspect ratio log-uniform between 3/4 and 4/3. If no attempt
    fits: the largest central crop with an aspect ratio in that range.
    """
    for area, ratio, down, right in draws:
        h, w = _shape(height * width * _between(least, 1, area), _log_between(*CROP_RATIO, ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    low, high = CROP_RATIO
    h, w = min(height, round(width / low)), min(width, round(height * high))
    return (height - h) // 2, (width - w) // 2, h, w


def erase_box(height: int, width: int, draws: NDArray[np.float64]) -> Box | None:
    """Draw a random-erasing box (Zhong et al. 2020) by timm's rule, from ``draws`` [ATTEMPTS, 4]; None if none fits."""
    for area, ratio, down, right in draws:
        h, w = _shape(height * width * _between(*ERASE_AREA, area), 1 / _log_between(*ERASE_RATIO, ratio))
        if 0 < h < height and 0 < w < width:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    return None


class Augment:
    """A recipe's augmentation of training images under a data seed."""

    def __init__(self, recipe: Recipe, seed: int, size: int, real: bool, interpolation: str = "bicubic") -> None:
        self.recipe, self.seed, self.size = recipe, seed, size
        self.resampling = resampling(interpolation)
        self._rand_augment: Callable[[Image.Image], Image.Image] | None = None
        if recipe.rand_augment:
            self._rand_augment = _rand_augment(recipe.rand_augment, size, self.resampling if real else None)

    def __call__(self, images: Split, epoch: int, samples: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return training views of some images of a split, uint8 [b, C, S, S]. Raises BrokenImageError."""
        recipe = self.recipe
        if recipe.crop is None and self._rand_augment is None:
            pixels = images.take(samples)
        else:
            boxes = None if recipe.crop is None else self._draws("crop", epoch, samples, 4 * ATTEMPTS)
            pixels = np.empty((len(samples), images.channels, self.size, self.size), np.uint8)
            for row, sample in enumerate(samples):
                draws = None if boxes is None else boxes[row].reshape(ATTEMPTS, 4)
                pixels[row] = self._one(images, epoch, int(sample), draws)
        if recipe.flip:
            # After RandAugment, whose operations have random signs: this has the same distribution as flipping before.
            mirrored = self._draws("flip", epoch, samples, 1)[:, 0] < 0.5
            pixels[mirrored] = pixels[mirrored][..., ::-1]
        if recipe.erase:
            self._erase(pixels, epoch, samples)
        return pixels

    def _draws(self, what: str, epoch: int, samples: NDArray[np.int64], count: int) -> NDArray[np.float64]:
        return randomness.uniform(self.seed, what, epoch, samples[:, None], np.arange(count))

    def _one(self, images: Split, epoch: int, sample: int, draws: NDArray[np.float64] | None) -> NDArray[np.uint8]:
        if draws is None:
            picture = to_picture(images.take(np.array([sample]))[0])
        else:
            assert self.recipe.crop is not None
            picture = images.picture(sample)
            top, left, height, width = crop_box(picture.height, picture.width, self.recipe.crop, draws)
            cut = picture.crop((left, top, left + width, top + height))
            picture = cut.resize((self.size, self.size), self.resampling)
        if self._rand_augment is not None:
            mode = picture.mode
            with randomness.isolated(self.seed, "augment", epoch, sample):
                picture = self._rand_augment(picture.convert("RGB"))
            picture = picture.convert(mode)
        return to_array(picture)

    def _erase(self, pixels: NDArray[np.uint8], epoch: int, samples: NDArray[np.int64]) -> None:
        """Fill a rectangle of some images with random values."""
        draws = self._draws("erase", epoch, samples, 1 + 4 * ATTEMPTS)
        for row in np.flatnonzero(draws[:, 0] < self.recipe.erase):
            box = erase_box(self.size, self.size, draws[row, 1:].reshape(ATTEMPTS, 4))
            if box is not None:
                top, left, height, width = box
                noise = randomness.generator(self.seed, "erase", epoch, int(samples[row]))
                area = pixels[row, :, top : top + height, left : left + width]
                area[...] = noise.integers(0, 256, area.shape, dtype=np.uint8)


def _rand_augment(config: str, size: int, real: Image.Resampling | None) -> Callable[[Image.Image], Image.Image]:
    from timm.data.auto_augment import posterize, rand_augment_transform

    settings: dict[str, Any] = {"translate_const": int(size * 0.45), "img_mean": (0, 0, 0)}  # scenes: black background
    if real is not None:
        settings["img_mean"] = tuple(min(255, round(255 * value)) for value in IMAGENET_MEAN)
        settings["interpolation"] = real
    transform = rand_augment_transform(config, settings)
    for operation in transform.ops:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    augment: Callable[[Image.Image], Image.Image] = transform
    return augment


def _posterize(image: Image.Image, bits: int, **settings: Any) -> Image.Image:
    """Apply timm's Posterize, whose highest magnitude asks for 0 bits: black, and an error since Pillow 13."""
    from timm.data.auto_augment import posterize

    if bits < 1:
        return Image.new(image.mode, image.size)
    picture: Image.Image = posterize(image, bits, **settings)
    return picture
