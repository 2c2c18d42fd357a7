"""The data of a run: which images it is trained and tested on."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field

from atdiag.core.spec.base import Positive, Spec


def _share_or_number(value: float) -> float:
    """Return a share as it is, and a number of images as an integer. Raises ValueError for neither."""
    if value < 1:
        return value
    if value != int(value):
        raise ValueError("give a share between 0 and 1, or a whole number of images")
    return int(value)


OF_SCENES: tuple[Literal["test_per_source", "clutter", "test_draw"], ...] = ("test_per_source", "clutter", "test_draw")
"""Fields that apply only to embedded images."""


class Data(Spec):
    """A data set: which images a run is trained and tested on."""

    name: str = "digits"
    """``digits`` and ``larger`` are embedded scenes, generated for each data seed; all others are real images."""
    train: Positive
    """Number of training images. Scenes are drawn by the data seed; a subset of real images is selected by a hash. Does
    not include those held back for validation."""
    validation: Annotated[float, Field(gt=0), AfterValidator(_share_or_number)] | None = None
    """Training images that are held back: a share (below 1) or a number. Accuracy on them is measured after each epoch.

    Of real images: of those to choose from (all, or ``per_class`` of each class), stratified by class, those whose
    names have the smallest sha256; ``train`` are taken from the rest. Of scenes: made besides the ``train`` ones (the
    share is one of ``train``), from source digits that no training scene has; see :mod:`atdiag.data.scenes`."""
    test_per_source: Positive = 4
    """Scenes: test scenes for each held-out source digit (the same for every run)."""
    clutter: int = Field(default=3, ge=0, le=64)
    """Scenes: number of fragments of other digits in each."""
    test_draw: int = Field(default=0, ge=0)
    """Scenes: which draw of test scenes from the same held-out source digits. Another one, with other seeds, is an
    independent study, except for the source digits."""
    image_size: Positive | None = None
    """Real images: the side of the square crop that every network sees, in pixels. None for scenes."""
    per_class: Positive | None = None
    """Real images: number of training images of each class, selected by a hash of the file name; None: all."""
    test_per_class: Positive | None = None
    """Real images: number of test images of each class, likewise."""
    split: Annotated[float, Field(gt=0), AfterValidator(_share_or_number)] | None = None
    """Images of a user's folder without test images that become the test images: a share (below 1) or a number.
    Stratified by class, those whose ``split_seed:class/file`` has the smallest sha256."""
    split_seed: int = Field(default=0, ge=0)
    """Which such division: another seed gives other test images."""
    crop_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Real images: the share of the shorter side that a test image's central crop keeps; None: the data set's."""
    interpolation: Literal["bicubic", "bilinear", "lanczos", "nearest", "box", "hamming"] = "bicubic"
    """Real images: how they are resized, as Pillow names it."""
    turns: int = Field(default=0, ge=0, le=3)
    """Counter-clockwise quarter turns of every image, in training and at test: other images than teachers were
    pre-trained on, and as hard as before for a network that starts at random."""
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Real images in a user's folder, or of a data set that exists in several forms: sha256 of the list of files and
    sizes, because the path or name does not determine the images."""

    def only_tested(self) -> Self:
        """Return a spec that depends only on the test images: fields of the training images are reset."""
        return self.model_copy(update={"train": 1, "per_class": None, "validation": None})

    def canonical(self) -> dict[str, Any]:
        """Reset fields that apply only to scenes to their defaults if images are real, and a seed without a split."""
        fields = type(self).model_fields
        seed = {"split_seed": 0} if self.split is None else {}
        return seed if self.image_size is None else {name: fields[name].default for name in OF_SCENES} | seed

    def check(self) -> None:
        """Raise ValueError for fields of real images without an image size."""
        if self.image_size is None and (self.per_class or self.test_per_class or self.fingerprint):
            raise ValueError("per_class, test_per_class and fingerprint are for real images: give an image_size, too")
        if self.image_size is None and (self.split or self.crop_share or self.interpolation != "bicubic"):
            raise ValueError("split, crop_share and interpolation are for real images: give an image_size, too")
