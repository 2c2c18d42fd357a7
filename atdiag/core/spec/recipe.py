"""How a run is optimised, and the seeds of all that is random in it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from atdiag.core.spec.base import BelowOne, NonNegative, Positive, Share, Spec


class Recipe(Spec):
    """How a run is optimised: AdamW, cosine schedule with linear warm-up, as in DeiT (Touvron et al. 2021)."""

    epochs: int = Field(ge=0)
    """0: not trained at all, only evaluated (a teacher as it is)."""
    batch_size: Positive = 64
    optimizer: Literal["adamw"] = "adamw"
    lr: NonNegative = 1e-3
    min_lr: NonNegative = 1e-5
    warmup_epochs: NonNegative = 1.0
    weight_decay: NonNegative = 0.05
    """Of weight matrices, an attention pool's query and relative position biases; other biases, norms, LayerScale,
    tokens and position embeddings have none (as in timm's ``VisionTransformer``)."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.99)
    clip_grad: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the whole gradient; null for no clipping."""
    label_smoothing: Share = 0.0
    drop_path: BelowOne = 0.0
    """Stochastic depth rate of the last block, rising linearly from 0 at the first."""
    mixup: NonNegative = 0.0
    """Alpha of Mixup (0: off)."""
    cutmix: NonNegative = 0.0
    """Alpha of CutMix (0: off). With both on, each batch takes either with equal chance, as in timm."""
    rand_augment: str | None = None
    """timm's RandAugment configuration, such as ``rand-m9-mstd0.5-inc1``."""
    crop: Annotated[float, Field(gt=0, le=1)] | None = None
    """Random resized crop: the least share of the image's area that a crop keeps (0.08 in DeiT). None: the middle, as a
    test sees it."""
    flip: bool = False
    """Mirror images left to right with chance one half."""
    erase: Share = 0.0
    """Chance that a random rectangle of an image is erased (0.25 in DeiT; Zhong et al. 2020)."""
    ema: BelowOne | None = None
    """Decay per step of an exponential moving average of the weights, such as 0.9999 (MAE's recipe from scratch):
    ``average = ema * average + (1 - ema) * weights`` after every update, from the initial weights on. The run trains as
    it would without; what is tested and stored is the average. None: the weights themselves, as is 0."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: automatic mixed precision, weights and optimiser in float32."""

    def canonical(self) -> dict[str, Any]:
        """Call an average that forgets everything what it is: the weights."""
        return {"ema": self.ema or None}


class Seed(Spec):
    """A run's seed is a pair: ``data`` (subset, order, augmentation) and ``model`` (initialisation, drop path)."""

    data: int = Field(ge=0)
    model: int = Field(ge=0)
