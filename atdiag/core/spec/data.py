"""The data of a run: which images it is trained and tested on."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from atdiag.core.spec.base import Positive, Spec


class Data(Spec):
    """A data set: which images a run is trained and tested on."""

    name: str = "digits"
    """``digits`` and ``larger`` are embedded scenes, generated for each data seed; all others are real images."""
    train: Positive
    """Number of training images. Scenes are drawn by the data seed; a subset of real images is selected by a hash."""
    test_per_source: Positive = 4
    """Scenes: test scenes for each held-out source digit (the same for every run)."""
    clutter: int = Field(default=3, ge=0, le=64)
    """Scenes: number of fragments of other digits in each."""
    image_size: Positive | None = None
    """Real images: the side of the square crop that every network sees, in pixels. None for scenes."""
    per_class: Positive | None = None
    """Real images: number of training images of each class, selected by a hash of the file name; None: all."""
    test_per_class: Positive | None = None
    """Real images: number of test images of each class, likewise."""
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Real images in a user's folder, or of a data set that exists in several forms: sha256 of the list of files and
    sizes, because the path or name does not determine the images."""

    def canonical(self) -> dict[str, Any]:
        """Reset fields that apply only to scenes to their defaults if images are real."""
        scenes = type(self).model_fields
        return {} if self.image_size is None else {n: scenes[n].default for n in ("test_per_source", "clutter")}

    def check(self) -> None:
        """Raise ValueError for fields of real images without an image size."""
        if self.image_size is None and (self.per_class or self.test_per_class or self.fingerprint):
            raise ValueError("per_class, test_per_class and fingerprint are for real images: give an image_size, too")
