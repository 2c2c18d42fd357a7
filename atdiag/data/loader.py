"""Order and augmentation of training batches: a pure function of data seed, epoch and sample.

So a batch can be made at any time, in any process, in any company, and is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atdiag import randomness
from atdiag.data import datasets
from atdiag.spec import Data, Recipe


@dataclass(frozen=True)
class Batch:
    """images: float32 [B, C, S, S] in [0, 1]; labels: int64 [B]; samples: int64 [B], indices into the training set.

    Where Mixup or CutMix was applied, ``partner_labels`` [B] holds the other label of each image and ``lam`` the share
    of its own.
    """

    images: Tensor
    labels: Tensor
    samples: NDArray[np.int64]
    partner_labels: Tensor | None = None
    lam: float = 1.0

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        partner = None if self.partner_labels is None else self.partner_labels.to(device, non_blocking=True)
        images, labels = (t.to(device, non_blocking=True) for t in (self.images, self.labels))
        return Batch(images, labels, self.samples, partner, self.lam)


class Stream:
    """The training batches of a data stream. Epochs are permutations; a last partial batch is left out."""

    def __init__(self, data: Data, recipe: Recipe, seed: int) -> None:
        if recipe.batch_size > data.train:
            raise ValueError(f"batch_size {recipe.batch_size} is larger than the training set ({data.train} images)")
        self.images = datasets.train_split(data, seed)
        self.recipe, self.seed = recipe, seed
        self.steps_per_epoch = len(self.images) // recipe.batch_size
        self._augment = (
            _rand_augment(recipe.rand_augment, self.images.pixels.shape[-1]) if recipe.rand_augment else None
        )
        self._epoch: tuple[int, NDArray[np.int64]] | None = None

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, randomness.generator(self.seed, "order", epoch).permutation(len(self.images))
        return self._epoch[1]

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        size = self.recipe.batch_size
        samples = self._order(epoch)[position * size : (position + 1) * size]
        pixels = self.images.pixels[samples]
        if self._augment is not None:
            pixels = np.stack([self._augmented(image, epoch, int(s)) for image, s in zip(pixels, samples, strict=True)])
        images = torch.from_numpy(pixels).float().div_(255)
        labels = torch.from_numpy(self.images.labels[samples])
        if self.recipe.mixup or self.recipe.cutmix:
            images, lam = self._mix(images, step)
            return Batch(images, labels, samples, labels.flip(0), lam)
        return Batch(images, labels, samples)

    def _mix(self, images: Tensor, step: int) -> tuple[Tensor, float]:
        """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) with the reversed batch, by timm's formulas."""
        from timm.data.mixup import rand_bbox

        draw = randomness.generator(self.seed, "mix", step)
        mixup, cutmix = self.recipe.mixup, self.recipe.cutmix
        use_cutmix = cutmix > 0 and (mixup == 0 or draw.random() < 0.5)
        alpha = cutmix if use_cutmix else mixup
        lam = float(draw.beta(alpha, alpha))
        partner = images.flip(0)
        if not use_cutmix:
            return images * lam + partner * (1 - lam), lam
        # timm's box, with its two global draws replaced by ours.
        height, width = images.shape[-2:]
        top, bottom, left, right = _box(height, width, lam, draw, rand_bbox)
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = partner[:, :, top:bottom, left:right]
        return mixed, 1 - (bottom - top) * (right - left) / (height * width)

    def _augmented(self, image: NDArray[np.uint8], epoch: int, sample: int) -> NDArray[np.uint8]:
        from PIL import Image

        assert self._augment is not None
        gray = image.shape[0] == 1
        picture = Image.fromarray(image[0] if gray else np.moveaxis(image, 0, -1)).convert("RGB")
        with randomness.isolated(self.seed, "augment", epoch, sample):
            picture = self._augment(picture)
        out = np.asarray(picture.convert("L") if gray else picture)
        return out[None] if gray else np.moveaxis(out, -1, 0)


def _box(height: int, width: int, lam: float, draw: np.random.Generator, rand_bbox: Any) -> tuple[int, int, int, int]:
    with randomness.isolated(int(draw.integers(2**31)), "cutmix"):
        top, bottom, left, right = rand_bbox((height, width), lam)
    return int(top), int(bottom), int(left), int(right)


def _rand_augment(config: str, size: int) -> Any:
    from timm.data.auto_augment import rand_augment_transform

    return rand_augment_transform(config, {"translate_const": int(size * 0.45), "img_mean": (0, 0, 0)})
