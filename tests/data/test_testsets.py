"""Test sets by name, with made-up folders of ImageNet-A, -R, -Sketch and -V2 in their published layouts."""

import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
from timm.data import ImageNetInfo

from atdiag.core.errors import UserError
from atdiag.core.spec import Data, Network
from atdiag.data import testsets
from atdiag.data.catalogue import CORRUPTIONS, TEST_SETS
from atdiag.data.decoding import decode, to_array

SYNSETS = sorted(ImageNetInfo("imagenet-1k").label_names())
DATA = Data(name="imagenet", train=1000, image_size=24)
NETWORK = Network(image_size=24, patch_size=8, channels=3, width=16, depth=1, heads=2, classes=1000)
V2 = "imagenetv2-matched-frequency-format-val"


@pytest.fixture
def lay(tmp_path, monkeypatch, draw):
    """Write a small test set: (name, folder, classes, images per class), and make its facts match."""
    monkeypatch.setenv("ATDIAG_DATA", str(tmp_path / "sets"))
    for i in range(7):
        draw(tmp_path / f"{i}.jpg", (30 + i, 28), i)

    def make(name, folder, classes, each=1):
        row = TEST_SETS[name]
        few = replace(row, images=len(classes) * each, per_class=row.per_class and each)
        monkeypatch.setitem(TEST_SETS, name, few)
        root = tmp_path / "sets" / folder
        for i, cls in enumerate(random.Random(0).sample(list(classes), len(classes))):
            (root / cls).mkdir(parents=True)
            for j in range(each):
                shutil.copy(tmp_path / f"{(i + j) % 7}.jpg", root / cls / f"image {j}.JPEG")
        return root

    return make


@pytest.fixture
def renditions(lay):
    """Make an ImageNet-R of every fifth class, with two images of each."""
    root = lay("imagenet-r", "imagenet-r", SYNSETS[::5], 2)
    (root / "README.txt").write_text("not an image")
    return root


# --- names ----------------------------------------------------------------------------------------------------------


def test_names():
    found = testsets.find("gaussian_noise:5")
    assert (found.name, found.corruption, found.severity) == ("gaussian_noise:5", "gaussian_noise", 5)
    assert found.file == "gaussian_noise-5"
    assert testsets.find("jpeg") == testsets.find("jpeg:3")
    assert testsets.find("imagenet-a") == testsets.TestSet("imagenet-a")
    assert [testsets.find(n).own_images for n in ("clean", "fog", "imagenet-v2")] == [True, True, False]
    files = [t.file for t in testsets.expand(["corruptions:all", "clean", *TEST_SETS])]
    assert len(set(files)) == len(files) == 5 * len(CORRUPTIONS) + 1 + len(TEST_SETS)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") for name in files)


def test_names_that_stand_for_several():
    def names(*typed):
        return [found.name for found in testsets.expand(typed)]

    assert names("fog:2", "clean", "fog:2", "fog") == ["fog:2", "clean", "fog:3"]
    assert names("fog:all") == [f"fog:{severity}" for severity in range(1, 6)]
    assert names("corruptions") == [f"{name}:3" for name in CORRUPTIONS]
    assert names("corruptions:5", "imagenet-r")[-2:] == ["jpeg:5", "imagenet-r"]
    assert len(names("corruptions:all", "jpeg:1")) == 55


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("imagenet-s", "unknown test set 'imagenet-s', did you mean 'imagenet-"),
        ("gausian_noise:2", "unknown test set 'gausian_noise:2', did you mean 'gaussian_noise'"),
        ("fog:6", "fog:6: 6 is not a severity: type fog:1 to fog:5"),
        ("fog:", "fog:: nothing is not a severity"),
        ("fog:03", "03 is not a severity"),
        ("imagenet-a:3", "imagenet-a has no severity: type imagenet-a"),
        ("corruptions:9", "9 is not a severity"),
        ("clean:all", "clean has no severity"),
        ("", "unknown test set ''"),
    ],
)
def test_unknown_names(typed, message):
    with pytest.raises(UserError) as fault:
        testsets.expand([typed])
    assert message in str(fault.value)


# --- labels -----------------------------------------------------------------------------------------------------------


def test_the_classes_of_imagenet_are_in_the_order_of_its_labels():
    assert testsets.synsets() == tuple(SYNSETS)
    assert len(SYNSETS) == 1000
    assert SYNSETS[217] == "n02102040"  # an English springer, as in Imagenette


def test_two_hundred_classes_keep_their_labels_and_are_chosen_among(renditions):
    opened = testsets.open_images(testsets.find("imagenet-r"), DATA)
    assert opened.among.tolist() == list(range(0, 1000, 5))
    assert opened.images.labels.tolist() == [label for label in range(0, 1000, 5) for _ in range(2)]
    assert opened.images.clusters.tolist() == list(range(400))
    for index in (0, 7, 399):
        path = opened.images.path(index)
        assert path.parent.name == SYNSETS[opened.images.labels[index]]
        assert np.array_equal(opened.images.take(np.array([index]))[0], to_array(opened.images.view(decode(path))))
    before = opened.fingerprint
    shutil.copy(renditions / SYNSETS[0] / "image 1.JPEG", renditions / SYNSETS[5] / "image 1.JPEG")
    assert testsets.open_images(testsets.find("imagenet-r"), DATA).fingerprint != before


def test_a_test_set_of_all_classes_is_not_masked(lay):
    lay("imagenet-sketch", "imagenet-sketch/sketch", SYNSETS)
    opened = testsets.open_images(testsets.find("imagenet-sketch"), DATA)
    assert opened.among is None
    assert opened.images.labels.tolist() == list(range(1000))


@pytest.mark.parametrize("outer", ["imagenet-v2/", ""])
def test_version_2_is_sorted_by_number(lay, outer):
    lay("imagenet-v2", outer + V2, [str(i) for i in range(1000)])
    opened = testsets.open_images(testsets.find("imagenet-v2"), DATA)
    assert opened.among is None
    assert opened.images.labels.tolist() == list(range(1000))
    assert [opened.images.path(i).parent.name for i in range(12)] == [str(i) for i in range(12)]


def test_the_variants_of_version_2_are_distinguished(lay):
    for name, variant in (("imagenet-v2-threshold", "threshold0.7"), ("imagenet-v2-top", "top-images")):
        root = lay(name, f"imagenet-v2/imagenetv2-{variant}-format-val", [str(i) for i in range(1000)])
        assert testsets.read(name).root == root
    with pytest.raises(UserError, match="no data set imagenet-v2 in .*looked for a folder 'imagenet-v2/" + V2):
        testsets.read("imagenet-v2")


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_a_run_with_other_classes_can_not_be_tested(renditions):
    testsets.check(testsets.find("imagenet-r"), DATA, NETWORK)
    ten = NETWORK.model_copy(update={"classes": 10})
    for data, network in ((Data(train=1), ten), (Data(name="imagenette", train=1, image_size=24), ten), (DATA, ten)):
        with pytest.raises(UserError, match=r"1,000 classes, and this one has the 10 of \w+: corruptions fit"):
            testsets.check(testsets.find("imagenet-r"), data, network)


def test_small_images_are_not_corrupted():
    small = Network(image_size=16, patch_size=4, channels=1, width=16, depth=1, heads=2, classes=10)
    with pytest.raises(UserError, match="at least 20 px, and these have 16 px"):
        testsets.check(testsets.find("fog"), Data(train=1), small)


def test_the_folder_of_the_runs_own_images_is_checked(uniform, spec):
    data = spec(uniform)
    network = Network(image_size=32, patch_size=8, channels=3, width=16, depth=1, heads=2, classes=3)
    testsets.check(testsets.find("fog"), data, network)
    (uniform / "val" / "ant" / "ant_0.jpg").unlink()
    with pytest.raises(UserError, match="not those that the spec means"):
        testsets.check(testsets.find("fog"), data, network)


def test_a_missing_test_set_says_where_it_was_looked_for(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no folder is given for the data set imagenet-a.*`data_dir`.*'imagenet-a' or"):
        testsets.read("imagenet-a")
    (tmp_path / "imagenet").mkdir()
    monkeypatch.setenv("ATDIAG_DATA", str(tmp_path))
    with pytest.raises(UserError, match="which holds imagenet: looked for a folder 'imagenet-a' or"):
        testsets.read("imagenet-a")


def _change(root, how):
    first = root / SYNSETS[0]
    if how == "missing class":
        shutil.rmtree(first)
    elif how == "missing image":
        (first / "image 0.JPEG").unlink()
    elif how == "empty class":
        shutil.rmtree(first)
        first.mkdir()
    elif how == "strange class":
        first.rename(root / "tench")
    elif how == "unknown class":
        first.rename(root / "n00000001")
        (root / SYNSETS[5]).rename(root / "n00000002")
    elif how == "flat":
        (first / "image 0.JPEG").rename(root / "image 0.JPEG")
    elif how == "numbers":
        for i, cls in enumerate(SYNSETS[::5]):
            (root / cls).rename(root / str(i))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing class", "has 199 classes, imagenet-r 200: expected 200 folders named by WordNet id"),
        ("missing image", "has 399 images, imagenet-r (ImageNet-R (Hendrycks et al. 2021)) 400"),
        ("empty class", f"the class {SYNSETS[0]} in "),
        (
            "strange class",
            "has folders that are not classes of imagenet-r: tench: expected 200 folders named by WordNet id",
        ),
        ("unknown class", "2 of the 200 classes in the folder of imagenet-r are not ImageNet-1k's: n00000001, n00"),
        ("flat", "holds 1 images beside its 200 folders"),
        ("numbers", "that are not classes of imagenet-r: 0, 1, 10, 100, 101 and 195 more"),
    ],
)
def test_a_wrong_layout_says_what_was_expected_and_found(renditions, how, message):
    _change(renditions, how)
    with pytest.raises(UserError) as fault:
        testsets.check(testsets.find("imagenet-r"), DATA, NETWORK)
    assert message in str(fault.value)
    assert "\n" not in str(fault.value)


def test_wrong_layouts_of_version_2(lay):
    root = lay("imagenet-v2", V2, [str(i) for i in range(1000)])
    (root / "7").rename(root / "007")
    with pytest.raises(UserError, match="not classes of imagenet-v2: 007: expected folders named 0 to 999"):
        testsets.read("imagenet-v2")
    (root / "007").rename(root / "7")
    shutil.copy(root / "8" / "image 0.JPEG", root / "7" / "image 1.JPEG")
    with pytest.raises(UserError, match=r"the class 7 in .* has 2 images: imagenet-v2 has 1 of each class"):
        testsets.read("imagenet-v2")
