"""Catalogue of real-image data sets: known facts about each. Imports nothing heavy."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

CANVAS = 20
"""Side of the embedded scenes, in pixels."""


@dataclass(frozen=True)
class Archive:
    """An archive from which anyone may create a data set, without account or terms to accept."""

    url: str
    size: int
    """Exact size in bytes."""
    md5: str
    """MD5 of the published file."""


@dataclass(frozen=True)
class Facts:
    """Facts about one data set of real images.

    train, test: numbers of images. A folder with other numbers is not this data set, or incomplete (Imagenette's first
    edition has 12,894 and 500).
    """

    title: str
    classes: int
    train: int
    test: int
    image_size: int
    """Default side of the crop that networks see, in pixels."""
    resolution: str
    """Resolution of the stored images, in pixels."""
    folders: tuple[str, ...]
    """Possible names of its folder, in the folder of all data sets."""
    tests: tuple[str, ...]
    """Possible names of the folder of test images; training images are in ``train``."""
    class_folders: str
    """Regular expression for the names of class folders."""
    classes_text: str
    """Description of the class folders for messages."""
    source: str
    licence: str
    crop_share: float = 0.875
    """Test images: share of the shorter side that the central crop keeps if the image has to be resized."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of the training images' pixels in [0, 1], for a network without its own."""
    imagenet: tuple[int, ...] = ()
    """If the classes are ImageNet-1k's: their indices there, in the order of the classes here."""
    in_forms: bool = False
    """Whether it exists in several forms (resized, re-compressed), so that its name does not determine the pixels; a
    spec then holds the fingerprint of the files."""
    annotations: str | None = None
    """The year in ``train{year}.json``, the annotation files that replace class folders."""
    archive: Archive | None = None
    """The file that ``atdiag data check NAME --download`` fetches."""
    closed: str = ""
    """Why there is no archive to download."""


_WNID = r"n\d{8}"
_IMAGENETTE = {
    "n01440764": 0,
    "n02102040": 217,
    "n02979186": 482,
    "n03000684": 491,
    "n03028079": 497,
    "n03394916": 566,
    "n03417042": 569,
    "n03425413": 571,
    "n03445777": 574,
    "n03888257": 701,
}
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_TESTS = ("val", "validation", "test")


def _inat(year: int, classes: int, train: int, test: int, folders: tuple[str, ...] = ()) -> Facts:
    return Facts(
        title=f"iNaturalist {year}",
        classes=classes,
        train=train,
        test=test,
        image_size=224,
        resolution="to 800 px",
        folders=(f"inat{year}", f"inaturalist{year}", f"iNat{year}", f"inaturalist-{year}", f"train_val{year}"),
        tests=_TESTS,
        class_folders=r".+",
        classes_text=f"a folder for each class, or train{year}.json and val{year}.json beside the images",
        source="github.com/visipedia/inat_comp",
        licence="non-commercial",
        annotations=str(year),
        closed="it is up to 200 GB, under terms that you have to agree to",
    )


FACTS: dict[str, Facts] = {
    "imagenet": Facts(
        title="ImageNet-1k (ILSVRC 2012)",
        classes=1000,
        train=1_281_167,
        test=50_000,
        image_size=224,
        resolution="mixed",
        folders=("imagenet", "imagenet-1k", "imagenet1k", "ILSVRC2012", "ILSVRC/Data/CLS-LOC"),
        tests=_TESTS,
        class_folders=_WNID,
        classes_text="folders named by WordNet id, such as n01440764",
        source="image-net.org",
        licence="non-commercial",
        imagenet=tuple(range(1000)),
        closed="it requires an account, and agreement to its terms",
    ),
    "inat2017": _inat(2017, 5_089, 579_184, 95_986),
    "inat2018": _inat(2018, 8_142, 437_513, 24_426),
    "inat2019": _inat(2019, 1_010, 265_213, 3_030),
    "imagenette": Facts(
        title="Imagenette, second edition",
        classes=10,
        train=9_469,
        test=3_925,
        image_size=224,
        resolution="mixed",
        folders=("imagenette", "imagenette2", "imagenette2-320", "imagenette2-160", "imagenette-128"),
        tests=_TESTS,
        class_folders="|".join(_IMAGENETTE),
        classes_text="its ten folders named by WordNet id, such as n01440764",
        source="github.com/fastai/imagenette",
        licence="Apache-2.0",
        imagenet=tuple(_IMAGENETTE.values()),
        in_forms=True,
        archive=Archive(
            "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz",
            341_663_724,
            "3df6f0d01a2c9592104656642f5e78a3",
        ),
    ),
    "cifar10": Facts(
        title="CIFAR-10",
        classes=10,
        train=50_000,
        test=10_000,
        image_size=32,
        resolution="32 x 32",
        folders=("cifar10", "cifar-10", "CIFAR-10", "CIFAR-10-images", "cifar10-jpeg"),
        tests=("test", "val", "validation"),
        class_folders="|".join(_CIFAR10),
        classes_text=f"ten folders: {', '.join(_CIFAR10)}",
        source="cs.toronto.edu/~kriz/cifar.html",
        licence="none stated",
        crop_share=1.0,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        in_forms=True,
        archive=Archive(  # the binary version: the others are pickles
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", 170_052_171, "c32a1d4ab5d03f1284b67883e8d87530"
        ),
    ),
    "cifar100": Facts(
        title="CIFAR-100",
        classes=100,
        train=50_000,
        test=10_000,
        image_size=32,
        resolution="32 x 32",
        folders=("cifar100", "cifar-100", "CIFAR-100"),
        tests=("test", "val", "validation"),
        class_folders=r"[a-z_]+",
        classes_text="a hundred folders named by fine label, such as aquarium_fish",
        source="cs.toronto.edu/~kriz/cifar.html",
        licence="none stated",
        crop_share=1.0,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        in_forms=True,
        archive=Archive(  # the binary version: the others are pickles
            "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", 168_513_733, "03b5dce01913d631647c71ecec9e9cb8"
        ),
    ),
}
"""Data set -> facts. Data sets are found in the user's folder; none is downloaded unasked."""

ANY_FOLDER = "folder:"
"""``folder:PATH`` is a user's data set: ``train`` and ``val`` (or ``test``) with a folder for each class."""

OWN_TESTS = _TESTS
"""Possible names of the folder of test images in a user's data set."""


def crop_share(name: str) -> float:
    """Return the share of the shorter side that a test image's central crop keeps."""
    return FACTS[name].crop_share if name in FACTS else 0.875


def is_class(facts: Facts | TestFacts, folder: str) -> bool:
    """Return whether a folder is named like one of the set's classes."""
    return re.fullmatch(facts.class_folders, folder) is not None


# --- test sets other than a data set's own -------------------------------------------------------------------------


@dataclass(frozen=True)
class TestFacts:
    """Facts about a set of test images for networks with ImageNet-1k's classes.

    ``classes`` of the 1,000 classes occur, in ``images`` images; if fewer than 1,000, predictions are made among those.
    """

    __test__ = False  # keeps pytest from collecting it because of its name

    title: str
    classes: int
    images: int
    per_class: int | None
    """Images of each class, if equal for all."""
    folders: tuple[str, ...]
    """Possible names of its folder, in the folder of all data sets."""
    class_folders: str
    """Regular expression for the names of class folders."""
    classes_text: str
    """Description of the class folders for messages."""
    source: str
    licence: str
    """Licence of the collection; the images belong to their owners."""


_BY_SYNSET = "folders named by WordNet id, such as n01440764"


def _version2(variant: str) -> TestFacts:
    inner = f"imagenetv2-{variant}-format-val"
    return TestFacts(
        title=f"ImageNet-V2, {variant}",
        classes=1000,
        images=10_000,
        per_class=10,
        folders=(*(f"{outer}/{inner}" for outer in ("imagenet-v2", "imagenetv2", "ImageNetV2")), inner),
        class_folders=r"0|[1-9]\d{0,2}",
        classes_text="folders named 0 to 999",
        source="github.com/modestyachts/ImageNetV2",
        licence="MIT",
    )


TEST_SETS: dict[str, TestFacts] = {
    "imagenet-a": TestFacts(
        title="ImageNet-A (Hendrycks et al. 2021)",
        classes=200,
        images=7_500,
        per_class=None,
        folders=("imagenet-a", "imagenet_a", "ImageNet-A"),
        class_folders=_WNID,
        classes_text=f"200 {_BY_SYNSET}",
        source="github.com/hendrycks/natural-adv-examples",
        licence="MIT",
    ),
    "imagenet-r": TestFacts(
        title="ImageNet-R (Hendrycks et al. 2021)",
        classes=200,
        images=30_000,
        per_class=None,
        folders=("imagenet-r", "imagenet_r", "ImageNet-R"),
        class_folders=_WNID,
        classes_text=f"200 {_BY_SYNSET}",
        source="github.com/hendrycks/imagenet-r",
        licence="MIT",
    ),
    "imagenet-sketch": TestFacts(
        title="ImageNet-Sketch (Wang et al. 2019)",
        classes=1000,
        images=50_889,
        per_class=None,
        folders=("imagenet-sketch/sketch", "ImageNet-Sketch/sketch", "imagenet-sketch", "ImageNet-Sketch", "sketch"),
        class_folders=_WNID,
        classes_text=f"1,000 {_BY_SYNSET}",
        source="github.com/HaohanWang/ImageNet-Sketch",
        licence="MIT",
    ),
    "imagenet-v2": _version2("matched-frequency"),
    "imagenet-v2-threshold": _version2("threshold0.7"),
    "imagenet-v2-top": _version2("top-images"),
}
"""Test set -> facts. ``imagenet-v2`` alone is the variant that papers report (Recht et al. 2019)."""


CORRUPTIONS: tuple[str, ...] = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "motion_blur", "fog"),
    *("brightness", "contrast", "occlusion", "pixelate", "jpeg"),
)
"""Corruptions of any data set's test images, see ``corruptions``."""

SMALLEST = 20
"""Minimum side of images for corruptions, in pixels."""
SEVERITIES = (1, 2, 3, 4, 5)


@cache
def synsets() -> tuple[str, ...]:
    """Return the WordNet ids of ImageNet-1k's classes, in the order of the labels."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())
