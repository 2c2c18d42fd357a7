"""Optimisation of a run, and its seeds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from atdiag.core.spec.base import BelowOne, NonNegative, Positive, Share, Spec


class Recipe(Spec):
    """Optimisation of a run: AdamW, cosine schedule with linear warm-up, as in DeiT (Touvron et al. 2021)."""

    epochs: int = Field(ge=0)
    """0: evaluated without training (a teacher as it is)."""
    batch_size: Positive = 64
    optimizer: Literal["adamw"] = "adamw"
    lr: NonNegative = 1e-3
    min_lr: NonNegative = 1e-5
    warmup_epochs: NonNegative = 1.0
    weight_decay: NonNegative = 0.05
    """For weight matrices, an attention pool's query and relative position biases; other biases, norms, LayerScale,
    tokens and position embeddings have none (as in timm's ``VisionTransformer``)."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.99)
    clip_grad: Annotated[float, Field(gt=0)] | None = 1.0
    """Maximum norm of the whole gradient; null disables clipping."""
    label_smoothing: Share = 0.0
    drop_path: BelowOne = 0.0
    """Stochastic depth rate of the last block, rising linearly from 0 at the first."""
    branch_warmup: Share = 0.0
    """Share of the training over which the attention branch of every block grows linearly from 0 to its full size."""
    mixup: NonNegative = 0.0
    """Alpha of Mixup (0: off)."""
    cutmix: NonNegative = 0.0
    """Alpha of CutMix (0: off). If both are on, each batch uses one of them with equal chance, as in timm."""
    rand_augment: str | None = None
    """timm's RandAugment configuration, such as ``rand-m9-mstd0.5-inc1``."""
    crop: Annotated[float, Field(gt=0, le=1)] | None = None
    """Random resized crop: minimum share of the image's area (0.08 in DeiT). None: the central crop, as at test
    time."""
    flip: bool = False
    """Random horizontal flip with probability 1/2."""
    erase: Share = 0.0
    """Probability of random erasing (0.25 in DeiT; Zhong et al. 2020)."""
    ema: BelowOne | None = None
    """Decay per step of an exponential moving average (EMA) of the weights, such as 0.9999 (MAE's recipe from scratch):
    ``average = ema * average + (1 - ema) * weights`` after every update, starting from the initial weights. It does not
    change the training; the average is what is tested and stored. None, or 0: the weights themselves."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Layer-wise decay of the learning rate (Clark et al. 2020, ELECTRA; 0.75 in MAE's fine-tuning): block i of a
    network of L blocks, counted from 1, learns at ``lr * layer_decay ** (L + 1 - i)``, the embedding as block 0, the
    last norm as block L (timm's rule; at ``lr`` in MAE's code), and the head at ``lr``. Neither the warm-up nor
    ``min_lr`` is exempt. None, or 1: no decay."""
    cosine_after_warmup: bool = False
    """Whether the cosine begins at its peak when the warm-up ends, as in MAE's code; False: the warm-up covers its
    first part, as in timm's and DeiT's."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: automatic mixed precision, with weights and optimiser in float32."""

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed, in pairs."""
        return bool(self.mixup or self.cutmix)

    @property
    def most_ranks(self) -> int:
        """Ranks that can share a batch: one for each image, or for each pair of images that are mixed."""
        return (self.batch_size + 1) // 2 if self.mixes else self.batch_size

    def canonical(self) -> dict[str, Any]:
        """Reset what changes nothing: an average with a decay of 0, a layer decay of 1, a cosine after no warm-up."""
        after = self.cosine_after_warmup and self.warmup_epochs > 0
        decay = None if self.layer_decay == 1 else self.layer_decay
        return {"ema": self.ema or None, "layer_decay": decay, "cosine_after_warmup": after}


class Seed(Spec):
    """A run's pair of seeds: ``data`` (subset, order, augmentation) and ``model`` (initialisation, drop path)."""

    data: int = Field(ge=0)
    model: int = Field(ge=0)
