"""Pre-training without labels, by a masked autoencoder.

He et al. 2022, Masked autoencoders are scalable vision learners.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from atdiag.core.spec.base import Positive, Spec

NOT_MASKED = ("attention_pool", "rope")
"""Components of networks that can't be pre-trained so: angles for all patches in turn, or a pooling of the tokens that
would learn nothing."""


class Masked(Spec):
    """A masked autoencoder: the network encodes the visible patches, and a small decoder predicts the hidden ones.

    The loss is the mean squared error of the hidden patches' pixels. The formulas: :mod:`atdiag.training.masked`.
    """

    share: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Share of the patches that is hidden, drawn anew for each image and step."""
    width: Positive = 32
    """Of the decoder."""
    depth: Positive = 2
    heads: Positive = 2
    pixels: Literal["of patch", "of network"] = "of patch"
    """By which mean and standard deviation the pixels to predict are normalised: those of each patch itself, or those
    by which the network normalises images."""
    positions: Literal["learned", "sincos"] = "learned"
    """The decoder's: learned from small random values on, or fixed sines and cosines (He et al.)."""

    def check(self) -> None:
        """Raise ValueError for a decoder's width that its heads, or its positions, can't share."""
        if self.positions == "sincos" and self.width % 4:
            raise ValueError(f"the decoder's width {self.width} is not a multiple of 4, which sincos needs")
        if self.width % self.heads:
            raise ValueError(f"the decoder's width {self.width} is not a multiple of its heads {self.heads}")

    def hidden(self, patches: int) -> int:
        """Return how many of an image's patches are hidden: at least one, and one is visible."""
        return min(max(1, round(self.share * patches)), patches - 1)
