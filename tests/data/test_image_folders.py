"""The known data sets, their locations, and the images that a spec selects."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from atdiag.core.errors import UserError
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed
from atdiag.data import catalogue, image_folders, sources

NETWORK = Network(image_size=32, patch_size=8, channels=3, width=16, depth=1, heads=2, classes=3)


@pytest.fixture
def cifar(tmp_path, fill, monkeypatch):
    """Make a CIFAR-10 of 12 + 5 images per class, found by name."""
    row = catalogue.FACTS["cifar10"]
    classes = row.class_folders.split("|")
    monkeypatch.setitem(catalogue.FACTS, "cifar10", row.__class__(**{**vars(row), "train": 120, "test": 50}))
    root = tmp_path / "sets" / "cifar10"
    fill(root, classes=classes)
    monkeypatch.setenv("ATDIAG_DATA", str(root.parent))
    return root


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_and_classes():
    assert {name: sources.find(name).classes for name in ("digits", "imagenet", "imagenette", "cifar100")} == {
        "digits": 10,
        "imagenet": 1000,
        "imagenette": 10,
        "cifar100": 100,
    }
    sizes = {name: sources.find(name).image_size for name in ("digits", "imagenet", "cifar10", "folder:x")}
    assert sizes == {"digits": 20, "imagenet": 224, "cifar10": 32, "folder:x": None}
    with pytest.raises(UserError, match="unknown data set 'imagenete', did you mean 'imagenette'"):
        sources.find("imagenete")
    with pytest.raises(UserError, match="unknown data set 'folder:'"):
        sources.find("folder:")


def test_imagenet_classes_are_named_by_their_indices():
    rows = sources.find("imagenette").imagenet_rows
    assert rows == (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
    wnids = catalogue.FACTS["imagenette"].class_folders.split("|")
    assert wnids == sorted(wnids)  # ImageNet's indices follow the sorted WordNet ids
    assert len(wnids) == len(rows) == 10
    assert sources.find("imagenet").imagenet_rows == tuple(range(1000))
    assert sources.find("cifar10").imagenet_rows == sources.find("digits").imagenet_rows == ()


def test_a_spec_is_completed(uniform, cifar):
    own = sources.complete(Data(name=f"folder:{uniform}", train=1, image_size=32))
    assert (own.train, own.image_size) == (36, 32)
    assert own.fingerprint == image_folders.fingerprint(f"folder:{uniform}")
    assert sources.complete(own) == own
    assert sources.complete(Data(name="cifar10", train=1)).image_size == 32
    assert sources.complete(Data(name="cifar10", train=1)).train == 120
    some = sources.complete(Data(name="cifar10", train=1, image_size=224, per_class=7, test_per_class=2))
    assert (some.train, some.image_size, some.per_class) == (70, 224, 7)
    assert some.fingerprint is not None
    scenes = Data(train=30)
    assert sources.complete(scenes) is scenes


def test_missing_data_sets_are_completed_as_far_as_known():
    there = sources.complete(Data(name="imagenet", train=1))
    assert (there.train, there.image_size, there.fingerprint) == (1_281_167, 224, None)
    few = sources.complete(Data(name="imagenette", train=1, image_size=128, per_class=20))
    assert (few.train, few.fingerprint) == (200, None)
    with pytest.raises(UserError, match=r"needs `data\.image_size`"):
        sources.complete(Data(name="folder:/nowhere", train=1))
    with pytest.raises(UserError, match="there is no folder /nowhere"):
        sources.complete(Data(name="folder:/nowhere", train=1, image_size=32))
    with pytest.raises(UserError, match="digits are embedded"):
        sources.complete(Data(name="digits", train=1, image_size=32))


# --- where a set lies -------------------------------------------------------------------------------------------------


def test_a_data_set_is_found_under_any_of_its_names(cifar, monkeypatch):
    assert image_folders.find("cifar10") == cifar
    monkeypatch.setenv("ATDIAG_DATA", str(cifar))  # its own folder
    assert image_folders.find("cifar10") == cifar
    other = cifar.rename(cifar.with_name("CIFAR-10-images"))
    monkeypatch.setenv("ATDIAG_DATA", str(other.parent))
    assert image_folders.find("cifar10") == other


def test_a_missing_data_set_names_what_was_looked_for_and_where(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"data set imagenet: give `data_dir` or set ATDIAG_DATA.*'imagenet'"):
        image_folders.find("imagenet")
    (tmp_path / "root" / "pets").mkdir(parents=True)
    monkeypatch.setenv("ATDIAG_DATA", str(tmp_path / "root"))
    with pytest.raises(UserError, match=r"in .*root, which holds pets: looked for a folder 'cifar10' or"):
        image_folders.find("cifar10")
    monkeypatch.setenv("ATDIAG_DATA", str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"in .*gone, which is not a folder"):
        image_folders.find("cifar10")
    assert image_folders.found("cifar10") is None


# --- layout -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_by_class_and_name(uniform, draw):
    (uniform / "train" / ".DS_Store").touch()
    (uniform / "train" / "bee" / "._bee_1.jpg").touch()
    (uniform / "train" / "bee" / "notes.txt").touch()
    draw(uniform / "train" / "bee" / "also.JPEG", (32, 32), 5)
    files = image_folders.read(f"folder:{uniform}", "train")
    assert files.classes == ("ant", "bee", "cow")
    assert files.counts == [12, 13, 12]
    assert list(files.keys) == sorted(files.keys)
    for file, key, label in zip(files.files, files.keys, files.labels, strict=True):
        assert file == f"train/{key}"
        assert key.partition("/")[0] == files.classes[label]
        assert (uniform / file).is_file()
    assert image_folders.read(f"folder:{uniform}", "test").files[0] == "val/ant/ant_0.jpg"


def ruin(root, how):
    """Break one thing in a layout."""
    if how == "no train":
        (root / "train").rename(root / "training")
    elif how == "no test":
        (root / "val").rename(root / "evaluation")
    elif how == "flat":
        for image in list((root / "val").glob("*/*")):
            image.rename(root / "val" / image.name)
        for folder in list((root / "val").iterdir()):
            if folder.is_dir():
                folder.rmdir()
    elif how == "half flat":
        (root / "val" / "cat" / "cat_0.jpg").rename(root / "val" / "cat_0.jpg")
    elif how == "empty class":
        shutil.rmtree(root / "train" / "cat")
        (root / "train" / "cat").mkdir()
    elif how == "class missing":
        shutil.rmtree(root / "train" / "cat")
    elif how == "strange class":
        (root / "train" / "zebra").mkdir()
    elif how == "image missing":
        (root / "train" / "dog" / "dog_3.jpg").unlink()
    elif how == "empty split":
        shutil.rmtree(root / "val")
        (root / "val").mkdir()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("no train", r"has no folder 'train' with the training images of cifar10: it holds training, val"),
        ("no test", r"has no folder 'test' or 'val' or 'validation' with the test images of cifar10: it holds eval"),
        ("flat", r"val holds 50 images and no folder: expected ten folders: airplane"),
        ("half flat", r"val holds 1 images beside its 10 folders: expected ten folders"),
        ("empty class", r"1 of the 10 classes in .*train have no images: cat"),
        ("class missing", r"train has 9 classes, cifar10 10: expected ten folders"),
        ("strange class", r"train has folders that are not classes of cifar10: zebra"),
        (
            "image missing",
            r"has 119 training images, cifar10 \(CIFAR-10\) 120: complete it, or call it what it is",
        ),
        ("empty split", r"val holds neither folders nor images"),
    ],
)
def test_wrong_layouts_are_reported(cifar, how, says):
    data = sources.complete(Data(name="cifar10", train=1))
    network = NETWORK.model_copy(update={"classes": 10})
    sources.find(data).check(data, network)
    ruin(cifar, how)
    with pytest.raises(UserError, match=says):
        sources.find(data).check(data, network)


def nested(cls):
    (cls / "more").mkdir()
    shutil.copy(next(cls.glob("*.jpg")), cls / "more")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda cls: (cls / "z.jpg").symlink_to("missing"), "not a file"),
        (lambda cls: os.mkfifo(cls / "z.jpg"), "not a file"),
        (lambda cls: (cls / "z.jpg").mkdir(), "not a file"),
        (lambda cls: (cls / "two\nlines.jpg").touch(), "not plain text"),
        (lambda cls: Path(os.fsdecode(os.fsencode(cls) + b"/\xff.jpg")).touch(), "not plain text"),
        (lambda cls: (cls.parent / "two\nlines").mkdir(), "not plain text"),
        (nested, "has images in a folder within it, more"),
    ],
)
def test_images_that_are_no_plain_files_are_refused(uniform, spoil, says):
    cls = uniform / "train" / "bee"
    spoil(cls)
    with pytest.raises(UserError, match=says):
        image_folders.read(f"folder:{uniform}", "train")


def test_other_files_and_folders_are_ignored(uniform):
    cls = uniform / "train" / "bee"
    before = image_folders.read(f"folder:{uniform}", "train")
    (cls / "notes").mkdir()
    (cls / "notes" / "README").touch()
    (cls / ".thumbnails").mkdir()
    shutil.copy(next(cls.glob("*.jpg")), cls / ".thumbnails")
    linked = next((uniform / "train" / "ant").glob("*.jpg"))
    linked.rename(uniform / "elsewhere.jpg")
    linked.symlink_to(uniform / "elsewhere.jpg")
    after = image_folders.read(f"folder:{uniform}", "train")
    assert after.others == ("train/bee/notes/README",)
    assert replace(after, others=()) == before


def test_both_splits_have_the_same_classes(uniform, spec):
    data = spec(uniform)
    (uniform / "val" / "cow").rename(uniform / "val" / "dog")
    with pytest.raises(UserError, match="different classes: cow, dog"):
        sources.find(data).check(data, NETWORK)


def test_the_spec_must_agree_with_the_folder(uniform, spec):
    data = spec(uniform)
    sources.find(data).check(data, NETWORK)
    sources.find(data).check(data.model_copy(update={"train": 1}), NETWORK)  # a reference that is only evaluated
    for change, says in (
        ({"train": 37}, "`data.train`=37, but"),
        ({"per_class": 13, "train": 39}, "the class ant in .* has 12 train images, and the spec takes 13"),
        ({"per_class": 2, "train": 36}, "`data.per_class`=2 of 3 classes are 6 images"),
        ({"test_per_class": 6}, "has 5 test images, and the spec takes 6"),
        ({"fingerprint": "0" * 64}, "the files in .* are not those that the spec means"),
        ({"fingerprint": None}, "needs a fingerprint"),
    ):
        with pytest.raises(UserError, match=says):
            sources.find(data).check(data.model_copy(update=change), NETWORK)
    for change in ({"classes": 10}, {"channels": 1}, {"image_size": 24}):
        with pytest.raises(ValueError, match=f"the network has {next(iter(change))}"):
            sources.find(data).check(data, NETWORK.model_copy(update=change))
    with pytest.raises(ValueError, match="needs an image_size"):
        sources.find("cifar10").check(Data(name="cifar10", train=5), NETWORK.model_copy(update={"classes": 10}))


def test_inaturalist_is_read_from_its_annotations(tmp_path, draw, monkeypatch):
    root = tmp_path / "inat2018"
    for split, ids in (("train", [7, 7, 9, 3]), ("val", [9, 3, 7])):
        images, notes = [], []
        for i, category in enumerate(ids):
            draw(root / "train_val2018" / "Aves" / str(category) / f"{split}{i}.jpg", (40, 30), i)
            images.append({"id": i, "file_name": f"train_val2018/Aves/{category}/{split}{i}.jpg"})
            notes.append({"id": i, "image_id": i, "category_id": category})
        document = {"images": images, "annotations": notes, "categories": [{"id": c} for c in (9, 3, 7)]}
        (root / f"{split}2018.json").write_text(json.dumps(document))
    monkeypatch.setenv("ATDIAG_DATA", str(tmp_path))
    files = image_folders.read("inat2018", "train")
    assert files.classes == ("3", "7", "9")
    assert files.labels == (0, 1, 1, 2)
    assert files.keys == ("3/train3.jpg", "7/train0.jpg", "7/train1.jpg", "9/train2.jpg")
    assert all((root / file).is_file() for file in files.files)
    assert len(image_folders.read("inat2018", "test")) == 3

    for change, says in (
        ({"categories": [{"id": 3}, {"id": 7}]}, "categories that it does not list: 9"),
        ({"categories": [{"id": c} for c in (9, 3, 7, 8)]}, "1 of the 4 categories in .* have no images: 8"),
        ({"images": [{"id": i, "file_name": "../../etc/passwd"} for i in range(4)]}, "outside of its folder"),
        ({"images": []}, "is not an annotation file"),
    ):
        good = json.loads((root / "train2018.json").read_text())
        (root / "train2018.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(UserError, match=says):
            image_folders.read("inat2018", "train")
        (root / "train2018.json").write_text(json.dumps(good))


# --- subsets and fingerprints -----------------------------------------------------------------------------------------


def test_a_subset_has_the_smallest_hashes_of_each_class(uniform):
    files = image_folders.read(f"folder:{uniform}", "train")
    some = files.subset(per_class=4)
    assert some.counts == [4, 4, 4]
    for cls in files.classes:
        here = [key for key in files.keys if key.startswith(f"{cls}/")]
        expected = sorted(here, key=lambda key: hashlib.sha256(key.encode()).hexdigest())[:4]
        assert {key for key in some.keys if key.startswith(f"{cls}/")} == set(expected)
    assert list(some.keys) == sorted(some.keys)
    assert set(files.subset(per_class=3).keys) < set(some.keys)
    assert files.subset(per_class=50).keys == files.keys
    whole = sorted(files.keys, key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    assert set(files.subset(total=5).keys) == set(whole[:5])
    assert files.subset(total=36) is files


def test_a_subset_does_not_change_when_images_are_added(uniform, draw):
    before = image_folders.read(f"folder:{uniform}", "train").subset(per_class=4)
    for i in range(9):
        draw(uniform / "train" / "ape" / f"{i}.jpg", (32, 32), i)
    after = image_folders.read(f"folder:{uniform}", "train").subset(per_class=4)
    assert [key for key in after.keys if not key.startswith("ape/")] == list(before.keys)
    assert after.labels != before.labels[: len(after.labels)]  # labels are those of all classes, in order


def test_a_fingerprint_depends_on_files_and_not_on_their_location(uniform, tmp_path):
    before = image_folders.fingerprint(f"folder:{uniform}")
    copy = shutil.copytree(uniform, tmp_path / "copy")
    (copy / "val").rename(copy / "test")
    assert image_folders.fingerprint(f"folder:{copy}") == before
    image = copy / "train" / "ant" / "ant_0.jpg"
    image.write_bytes(image.read_bytes() + b"\0")
    assert image_folders.fingerprint(f"folder:{copy}") != before
    image.unlink()
    one = image_folders.fingerprint(f"folder:{copy}")
    (copy / "train" / "ant" / "ant_1.jpg").rename(copy / "train" / "ant" / "other.jpg")
    assert len({before, one, image_folders.fingerprint(f"folder:{copy}")}) == 3


def test_a_runs_id_depends_on_files_and_not_on_their_location(uniform, tmp_path, spec):
    copy = shutil.copytree(uniform, tmp_path / "copy")

    def run(root):
        return RunSpec(network=NETWORK, data=spec(root), recipe=Recipe(epochs=1), seed=Seed(data=0, model=0))

    one, two = run(uniform), run(copy)
    assert one.data.name != two.data.name
    assert (one.id, one.stream) == (two.id, two.stream)
    (copy / "train" / "ant" / "ant_0.jpg").unlink()
    assert run(copy).id != one.id
    assert run(copy).stream != one.stream
    unknown = [r.model_copy(update={"data": r.data.model_copy(update={"fingerprint": None})}) for r in (one, two)]
    assert unknown[0].id != unknown[1].id
