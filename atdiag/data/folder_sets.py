"""Data sets of real images in folders: those of the catalogue, and the user's own. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atdiag.core.errors import UserError
from atdiag.core.spec import Data, Network
from atdiag.data import image_folders, validation
from atdiag.data.catalogue import ANY_FOLDER, FACTS, IMAGENET_MEAN, IMAGENET_STD, Facts, crop_share, synsets
from atdiag.data.datasets import check_fit
from atdiag.data.files import Files, SplitName
from atdiag.data.tars import TIMM

if TYPE_CHECKING:
    from atdiag.data.decoding import ImageFolder

_IMAGENET_CLASSES = 1000
_WNID = re.compile(r"n\d{8}")
"""A WordNet id, as ImageNet names its classes."""


@dataclass(frozen=True)
class FolderSet:
    """A data set of images in a folder; networks see square crops of a size given in the spec.

    name: a name in the catalogue, ``folder:PATH`` or ``timm:PATH``. No dependence between images is known: each is its
    own cluster.
    """

    name: str

    @property
    def facts(self) -> Facts | None:
        """The catalogue's facts; None for a user's own folder."""
        return FACTS.get(self.name)

    @property
    def classes(self) -> int:
        """Number of classes. Raises UserError if the user's own folder is missing."""
        return self.facts.classes if self.facts else len(image_folders.class_names(self.name))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the class folders, in the order of the labels; empty if the folder is not found.

        Raises UserError for a folder with an invalid layout.
        """
        if self.facts and self.facts.imagenet:
            return tuple(synsets()[row] for row in self.facts.imagenet)
        if self.folder() is None:
            return ()
        return image_folders.read(self.name, "train").classes if self.facts else image_folders.class_names(self.name)

    @property
    def image_size(self) -> int | None:
        """Default side of the crop, in pixels; None for a user's own folder."""
        return self.facts.image_size if self.facts else None

    @property
    def imagenet_rows(self) -> tuple[int, ...]:
        """If the classes are ImageNet-1k's: their indices there, in the order of the labels; else empty."""
        if self.facts is not None:
            return self.facts.imagenet
        names = self.class_names
        if not names or not all(map(_WNID.fullmatch, names)):
            return ()
        row = {synset: index for index, synset in enumerate(synsets())}
        return tuple(row[name] for name in names) if row.keys() >= set(names) else ()

    @property
    def cluster(self) -> str:
        """Empty: every image is its own cluster."""
        return ""

    def row(self) -> dict[str, Any]:
        """Return the data set's row in ``atdiag data``; only sets of the catalogue have one."""
        facts = FACTS[self.name]
        folder = self.folder()
        return {
            "name": self.name,
            "title": facts.title,
            "classes": facts.classes,
            "train": facts.train,
            "test": facts.test,
            "resolution": facts.resolution,
            "normalisation": "ImageNet" if (facts.mean, facts.std) == (IMAGENET_MEAN, IMAGENET_STD) else "own",
            "source": facts.source,
            "licence": facts.licence,
            "folder": None if folder is None else str(folder),
        }

    def usual(self, beside: Data) -> Data:
        """Return the spec of all images, at the profile's image size if it has one."""
        size = beside.image_size or self.image_size
        return Data(name=self.name, train=beside.train, image_size=size, validation=beside.validation)

    def complete(self, data: Data, train: int | None = None) -> Data:
        """Return the spec with the actual ``train``, ``image_size`` and fingerprint.

        ``train`` becomes the number of training images: all, or ``per_class`` of each class, without those held out for
        validation, or as many of these as ``train`` requests. If only the files determine the images (``folder:PATH``,
        ``timm:PATH``, sets that exist in several forms), their fingerprint is added; it stays None for a set that is
        not on this machine, which can be planned but not trained on.

        Raises UserError for a user's own folder that is missing or has an invalid layout, or without ``image_size``
        (which only its owner can know), and for more training images than there are.
        """
        facts = self.facts
        if facts is None and data.image_size is None:
            raise UserError(f"{self.name} needs `data.image_size`", "say which, such as `data.image_size`=224")
        self._check_split(data)
        have = facts.train if facts else len(self._available(data))
        chosen = self.classes * data.per_class if data.per_class else have
        have = chosen - (held := validation.size(data.validation, chosen))
        if have < 1:
            raise UserError(
                f"`data.validation`={data.validation:g} holds back all of {chosen:,} training images",
                "give a smaller one",
            )
        fingerprint = data.fingerprint
        if facts is None or (facts.in_forms and self.folder() is not None):
            fingerprint = image_folders.fingerprint(self.name)
        beside = f", and {held} for validation" if held else ""
        if train is not None and train > have:
            raise UserError(f"`data.train`={train}: {self.name} has {have} training images to choose from{beside}")
        values = {
            "train": have if train is None else train,
            "image_size": data.image_size or self.image_size,
            "crop_share": None if data.crop_share == crop_share(self.name) else data.crop_share,
            "fingerprint": fingerprint,
        }
        return Data.model_validate({**data.model_dump(), **values})

    def _check_split(self, data: Data) -> None:
        """Raise UserError for a folder without test images and without a split, or with both."""
        if (len(image_folders.parts(self.name)) > 1) == (data.split is None):
            return
        if data.split is None:
            root = image_folders.read(self.name, "train").root  # first, for any other fault of the folder
            hint = "hold some out by adding `split` 0.2"
            if root.name == "train" and image_folders.test_folder(root.parent):
                hint = f"give {root.parent}, which has some, or {hint}"
            raise UserError(f"{root} has no test images (no folder val or test, no column split)", hint)
        where = self.name.removeprefix(ANY_FOLDER)
        raise UserError(f"`split` {data.split:g}: {where} has test images of its own", "leave `split` out")

    def resized(self, data: Data, size: int) -> Data:
        """Return the spec with another size of the crop."""
        return data.model_copy(update={"image_size": size})

    def with_train(self, data: Data, count: int) -> Data:
        """Return the spec itself: the number of images is fixed."""
        return data

    def shape(self, data: Data) -> tuple[int, int]:
        """Return channels and side of the crops. Raises ValueError for a spec without a size."""
        if data.image_size is None:
            raise ValueError(f"the data set {self.name} is of real images: its spec needs an image_size")
        return 3, data.image_size

    def test_images(self, data: Data) -> int:
        """Return the approximate number of test images of a spec; for a user's own folder a guess."""
        if data.test_per_class:
            return self.classes * data.test_per_class
        if data.split is not None and data.split >= 1:
            return int(data.split)
        share = 0.2 if data.split is None else data.split / (1 - data.split)
        return self.facts.test if self.facts else round(share * data.train / (1 - min(data.validation or 0, 0.5)))

    def validation_images(self, data: Data) -> int:
        """Return the number of images a spec holds out; a guess for a share of all images in a user's folder."""
        if data.validation is None or data.validation >= 1:
            return validation.size(data.validation, 0)
        if data.per_class:
            return validation.size(data.validation, self.classes * data.per_class)
        chosen = self.facts.train if self.facts else round(data.train / (1 - data.validation))
        return validation.size(data.validation, chosen)

    def head_rows(self, classes: int) -> tuple[int, ...] | None:
        """Return the rows of a head of 1,000 classes, assumed to be ImageNet-1k's, if this set's are among them."""
        return self.imagenet_rows or None if classes == _IMAGENET_CLASSES else None

    def check(self, data: Data, network: Network) -> None:
        """Compare the folder with the spec, decoding no image.

        Raises UserError for a data set that is missing, or whose folder contradicts its name or the spec (layout,
        classes, empty classes, numbers of images, fingerprint); ValueError for a network that does not fit it.
        """
        check_fit(self, data, network)
        self._check_split(data)
        files = self.files()
        train, test = self._available(data, files["train"]), self._tests(data, files)
        for part, wanted in ((train, data.per_class), (test, data.test_per_class)):
            if wanted and (fewest := min(part.counts)) < wanted:
                name = part.classes[part.counts.index(fewest)]
                raise UserError(
                    f"the class {name} in {part.root} has {fewest} {part.split} images, and the spec takes {wanted}"
                )
        left, held = self._parts(data, train)
        if held is None:
            _check_count(data, len(train), len(train.classes))
        elif data.train > len(left):
            raise UserError(
                f"`data.train`={data.train}, but {data.name} has {len(left)} training images beside {len(held)} for "
                "validation"
            )
        if data.fingerprint is None:
            if self.facts is None:
                raise UserError(f"{self.name} needs a fingerprint in its spec", "sources.complete gives it")
        elif (now := image_folders.fingerprint_of(files.values())) != data.fingerprint:
            raise UserError(
                f"the files in {train.root} are not those that the spec means "
                f"(fingerprint {now[:12]}, not {data.fingerprint[:12]})"
            )

    def folder(self) -> Path | None:
        """Return the folder; None if it is not found."""
        return image_folders.found(self.name)

    def files(self) -> dict[SplitName, Files]:
        """Return the images of both splits, or of the only one. Raises UserError if the folder contradicts the name."""
        files = {split: image_folders.read(self.name, split) for split in image_folders.parts(self.name)}
        if len(files) == 1:
            return files
        train, test = files["train"], files["test"]
        if train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise UserError(f"training and test images in {train.root} have different classes: {', '.join(odd[:5])}")
        if facts := self.facts:
            for split, have, need in (("training", len(train), facts.train), ("test", len(test), facts.test)):
                if have != need:
                    raise UserError(
                        f"{train.root} has {have:,} {split} images, {self.name} ({facts.title}) {need:,}",
                        f"complete it, or call it what it is: folder:{train.root}",
                    )
        return files

    def train_split(self, data: Data, seed: int) -> ImageFolder:
        """Return the training images of the spec, the same for every data seed."""
        left, _ = self._parts(data, self._available(data))
        return self._images(data, left.subset(total=data.train))

    def validation_split(self, data: Data, seed: int) -> ImageFolder | None:
        """Return the images held out for validation, the same for every data seed; None if there are none."""
        if data.validation is None:
            return None
        _, held = self._parts(data, self._available(data))
        assert held is not None
        return self._images(data, held)

    def test_split(self, data: Data) -> ImageFolder:
        """Return the test images of the spec."""
        return self._images(data, self._tests(data).subset(data.test_per_class))

    def _available(self, data: Data, train: Files | None = None) -> Files:
        """Return the images to train on and validate with: all but the test images. train: those in the folder."""
        train = image_folders.read(self.name, "train") if train is None else train
        return train if data.split is None else validation.test_part(train, data.split, data.split_seed)[0]

    def _tests(self, data: Data, files: Mapping[SplitName, Files] | None = None) -> Files:
        """Return the test images. files: those in the folder, if already read."""
        split: SplitName = "test" if data.split is None else "train"
        images = image_folders.read(self.name, split) if files is None else files[split]
        return images if data.split is None else validation.test_part(images, data.split, data.split_seed)[1]

    def _parts(self, data: Data, files: Files) -> tuple[Files, Files | None]:
        """Return the images available for training, and those held out."""
        chosen = files.subset(data.per_class)
        return (chosen, None) if data.validation is None else validation.divide(chosen, data.validation)

    def _images(self, data: Data, files: Files) -> ImageFolder:
        from atdiag.data import cache
        from atdiag.data.decoding import ImageFolder, View

        return ImageFolder(files, View.of(data, crop_share(self.name)), cache.decoded(files), data.turns)


def left_out(name: str) -> str:
    """Describe in one line the files left out of a user's own folder; empty if there are none.

    The catalogue's sets are complete or refused, since their numbers of images are known.
    """
    own = name.startswith((ANY_FOLDER, TIMM))
    return image_folders.left_out(image_folders.read(name, split) for split in image_folders.parts(name)) if own else ""


def _check_count(data: Data, have: int, number: int) -> None:
    need = data.per_class * number if data.per_class else data.train
    if data.train > need:
        raise UserError(
            f"`data.train`={data.train}, but `data.per_class`={data.per_class} of {number} classes are {need} images"
        )
    if need > have:
        raise UserError(f"`data.train`={data.train}, but {data.name} has {have} training images")
