"""Which images a run is trained and measured on."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from atdiag.core.spec.base import Positive, Spec


class Data(Spec):
    """A data set: which images a run is trained and measured on."""

    name: str = "digits"
    """``digits`` and ``larger`` are embedded scenes, made for each data seed; the others are real images."""
    train: Positive
    """Training images: of scenes, the data seed chooses which; of real images fewer than there are, a hash does."""
    test_per_source: Positive = 4
    """Scenes: test scenes for each held-out source digit (the same for every run)."""
    clutter: int = Field(default=3, ge=0, le=64)
    """Scenes: fragments of other digits in each."""
    image_size: Positive | None = None
    """Real images: the side of the square crop that every network sees, in pixels. None for scenes."""
    per_class: Positive | None = None
    """Real images: how many training images of each class, chosen by a hash of the file name; None: all."""
    test_per_class: Positive | None = None
    """Real images: the same for test images."""
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Real images in a folder of one's own, or of a set that is kept in several forms: sha256 of the list of files and
    sizes, because the path, or the name, does not say which images they are."""

    def canonical(self) -> dict[str, Any]:
        """Leave what only scenes have at its default where images are real."""
        scenes = type(self).model_fields
        return {} if self.image_size is None else {n: scenes[n].default for n in ("test_per_source", "clutter")}

    def check(self) -> None:
        """Raise ValueError for fields of real images without a size."""
        if self.image_size is None and (self.per_class or self.test_per_class or self.fingerprint):
            raise ValueError("per_class, test_per_class and fingerprint are for real images: give an image_size, too")
