"""Pre-training without labels, by a masked autoencoder.

He et al. 2022, Masked autoencoders are scalable vision learners.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from atdiag.core.spec.base import Positive, Spec

NOT_MASKED = ("attention_pool", "rope")
"""Components of networks that can't be pre-trained so: angles for all patches in turn, or a pooling of the tokens that
would learn nothing."""


class Masked(Spec):
    """A masked autoencoder: the network encodes the visible patches, and a small decoder predicts the hidden ones.

    The loss is the mean squared error of the hidden patches' pixels, each patch normalised by its own mean and standard
    deviation. The formulas: :mod:`atdiag.training.masked`.
    """

    share: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Share of the patches that is hidden, drawn anew for each image and step."""
    width: Positive = 32
    """Of the decoder."""
    depth: Positive = 2
    heads: Positive = 2

    def check(self) -> None:
        """Raise ValueError for heads that do not divide the decoder's width."""
        if self.width % self.heads:
            raise ValueError(f"the decoder's width {self.width} is not a multiple of its heads {self.heads}")

    def hidden(self, patches: int) -> int:
        """Return how many of an image's patches are hidden: at least one, and one is visible."""
        return min(max(1, round(self.share * patches)), patches - 1)
