"""A user's own folder: its layouts, and the test images held out of one that has none."""

import hashlib
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from atdiag.core.errors import UserError
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed
from atdiag.data import image_folders, manifest, sources
from atdiag.data.decoding import View, decode, to_array
from atdiag.data.loader import Stream

CLASSES = ("ant", "bee", "cow")


def named(root, **fields) -> Data:
    return Data(name=f"folder:{root}", **{"train": 1, "image_size": 32, **fields})


def refused(work, *arguments) -> str:
    with pytest.raises(UserError) as fault:
        work(*arguments)
    return str(fault.value)


@pytest.fixture
def classes(uniform, tmp_path):
    """A folder of class folders alone: 12 images in each."""
    root = tmp_path / "classes"
    shutil.copytree(uniform / "train", root)
    return root


@pytest.fixture
def flat(classes, tmp_path):
    """The same images in one folder, with a table of labels."""
    root = tmp_path / "flat"
    root.mkdir()
    lines = ["file,label,age"]
    for path in sorted(classes.rglob("*.jpg")):
        shutil.copy(path, root)
        lines.append(f"{path.name},{path.parent.name},3")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root


def parts(data):
    found = sources.find(data)
    return [found.train_split(data, 0), found.validation_split(data, 0), found.test_split(data)]


def names(split) -> set[str]:
    return set(split.files.keys)


# --- the split -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7])
def test_the_split_is_stratified_and_by_the_hash_of_the_name(classes, seed):
    data = sources.complete(named(classes, split=0.25, split_seed=seed, validation=0.2))
    train, validation, test = parts(data)
    every = {f"{path.parent.name}/{path.name}" for path in classes.rglob("*.jpg")}
    assert names(train) | names(validation) | names(test) == every
    assert len(train) + len(validation) + len(test) == len(every) == 36
    assert (data.train, len(train), len(validation), len(test)) == (22, 22, 5, 9)
    for cls in CLASSES:  # the three of twelve with the smallest hash
        own = sorted(
            (name for name in every if name.startswith(cls)),
            key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest(),
        )
        assert {name for name in names(test) if name.startswith(cls)} == set(own[:3])


def test_seeds_and_shares_give_different_runs(classes):
    network = Network(image_size=32, patch_size=8, width=16, depth=1, heads=2, classes=3)

    def run(**fields):
        data = sources.complete(named(classes, **fields))
        return RunSpec(network=network, data=data, recipe=Recipe(epochs=1), seed=Seed(data=0, model=0)).id

    several = [run(split=0.25), run(split=9), run(split=0.25, split_seed=1), run(split=0.5)]
    assert len(set(several)) == 4
    assert run(split=0.25) == several[0]


def test_the_split_survives_a_move_and_a_new_class(classes, tmp_path):
    before = sources.complete(named(classes, split=0.25))
    moved = tmp_path / "moved"
    shutil.copytree(classes, moved)
    after = sources.complete(named(moved, split=0.25))
    assert after.fingerprint == before.fingerprint
    assert names(parts(after)[2]) == names(parts(before)[2])
    shutil.copytree(moved / "ant", moved / "dog")
    assert {name for name in names(parts(sources.complete(named(moved, split=0.25)))[2]) if "dog" not in name} == names(
        parts(before)[2]
    )


def test_a_number_and_per_class(classes):
    data = sources.complete(named(classes, split=6, per_class=4, test_per_class=1))
    train, _, test = parts(data)
    assert Counter(train.labels.tolist()) == {0: 4, 1: 4, 2: 4}
    assert Counter(test.labels.tolist()) == {0: 1, 1: 1, 2: 1}
    assert not names(train) & names(test)


def test_without_a_split_it_is_asked_for(classes, uniform):
    said = refused(sources.complete, named(classes))
    assert said.endswith(
        "has no test images (no folder val or test, no column split): hold some out by adding `split` 0.2"
    )
    assert f"give {uniform}, which has some, or" in refused(sources.complete, named(uniform / "train"))
    assert "has test images of its own: leave `split` out" in refused(sources.complete, named(uniform, split=0.2))
    with pytest.raises(UserError, match="holds back all of 36"):
        sources.complete(named(classes, split=36))
    with pytest.raises(UserError, match=r"`data.split`=1 leaves no test image of (bee, cow|ant, cow|ant, bee)"):
        sources.complete(named(classes, split=1))


def test_the_check_before_training(classes):
    network = Network(image_size=32, patch_size=8, width=16, depth=1, heads=2, classes=3)
    data = sources.complete(named(classes, split=0.25))
    sources.find(data).check(data, network)
    extra = classes / "ant" / "new.jpg"
    shutil.copy(next((classes / "ant").iterdir()), extra)
    with pytest.raises(UserError, match="not those that the spec means"):
        sources.find(data).check(data, network)


def test_train_alone(uniform):
    shutil.rmtree(uniform / "val")
    assert image_folders.parts(f"folder:{uniform}") == ("train",)
    data = sources.complete(named(uniform, split=0.25))
    assert [len(part) for part in parts(data) if part is not None] == [27, 9]
    reading = manifest.read(sources.find(data).files(), processes=1)
    assert reading.counts == {"train": 36}


# --- a table of labels -----------------------------------------------------------------------------------------------


def test_a_table_is_the_same_as_folders(classes, flat):
    listed, foldered = (sources.complete(named(root, split=0.25)) for root in (flat, classes))
    assert listed.fingerprint == foldered.fingerprint
    for one, other in zip(parts(listed)[::2], parts(foldered)[::2], strict=True):
        assert one.files.keys == other.files.keys
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.batch(0, 4), other.batch(0, 4))
    assert sources.find(listed).class_names == CLASSES


def test_a_table_with_its_own_split(flat):
    lines = (flat / "labels.csv").read_text().splitlines()
    columns = [f"{line},{'split' if not i else 'test' if i % 4 == 0 else 'train'}" for i, line in enumerate(lines)]
    (flat / "labels.csv").write_text("\n".join(columns).replace(",", ";"))
    data = sources.complete(named(flat))
    train, _, test = parts(data)
    assert (len(train), len(test)) == (27, 9)
    assert not names(train) & names(test)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("file,label", "id,breed", "has no column 'file' and no column 'label', but id, breed, age"),
        ("ant_0.jpg", "gone.jpg", "1 of the 36 images in"),
        ("ant_0.jpg", "../ant_0.jpg", "write paths below"),
        ("ant_0.jpg", "ant_1.jpg", "is listed twice"),
        ("ant_0.jpg", "ant_0.heic", "is of a format that is not read"),
        ("ant_0.jpg", "ant_0.txt", "has no image's ending"),
        ("ant_0.jpg,ant", "ant_0.jpg,", "'' is not the name of a class"),
        ("ant_0.jpg,ant,3", "ant_0.jpg,ant", "line 2 has another number of columns"),
        ("file,label,age", "file,label,split", "the split '3' is unknown"),
    ],
)
def test_wrong_tables(flat, old, new, says):
    table = flat / "labels.csv"
    table.write_text(table.read_text().replace(old, new, 1))
    assert says in refused(image_folders.read, f"folder:{flat}", "train")


def test_what_a_table_does_not_list_is_counted(flat):
    table = flat / "labels.csv"
    table.write_text("".join(line for line in table.open() if "ant_0" not in line))
    files = image_folders.read(f"folder:{flat}", "train")
    assert (len(files), files.others) == (35, ("ant_0.jpg",))


def test_a_table_beside_classes_is_no_table_of_labels(classes):
    (classes / "notes.csv").write_text("a,b\n1,2\n")
    assert len(image_folders.read(f"folder:{classes}", "train")) == 36


# --- names as typed --------------------------------------------------------------------------------------------------


def test_names_as_typed(uniform, flat, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert sources.named("uniform") == sources.named(str(uniform)) == f"folder:{uniform}"
    assert [sources.named(name) for name in ("digits", "cifar10", f"timm:{uniform}")] == [
        "digits",
        "cifar10",
        f"timm:{uniform}",
    ]
    assert refused(sources.named, "unifrom") == "there is no folder unifrom, did you mean 'uniform'?"
    assert "did you mean 'imagenette'?" in refused(sources.named, "imagenete")
    assert "give a folder of images" in refused(sources.named, "/no/where")
    assert refused(sources.named, str(flat / "labels.csv")).endswith(f"such as {flat}")
    outer = tmp_path / "outer"
    shutil.copytree(uniform, outer / "pets")
    assert refused(image_folders.read, f"folder:{outer}", "train").endswith(f"give {outer / 'pets'}")
    (tmp_path / "empty").mkdir()
    assert "holds no images in folders of classes" in refused(
        image_folders.read, f"folder:{tmp_path / 'empty'}", "train"
    )


# --- crop and interpolation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "interpolation"), [(None, "bicubic"), (0.9, "bilinear"), (1.0, "bicubic")])
def test_the_view_is_the_spec_s(mixed, share, interpolation):
    data = sources.complete(named(mixed, crop_share=share, interpolation=interpolation, image_size=24))
    split = sources.find(data).test_split(data)
    way = Image.Resampling.BILINEAR if interpolation == "bilinear" else Image.Resampling.BICUBIC
    for i in range(4):
        picture = decode(split.path(i))
        short = int(24 / (share or 0.875))
        width, height = picture.size
        size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        left, top = round((size[0] - 24) / 2), round((size[1] - 24) / 2)
        expected = picture.resize(size, way).crop((left, top, left + 24, top + 24))
        np.testing.assert_array_equal(split.batch(i, i + 1)[0], to_array(expected))
    assert data.crop_share == share
    assert sources.complete(named(mixed, crop_share=0.875)) == sources.complete(named(mixed))
    assert View.of(data, 0.875) == View(24, share or 0.875, interpolation)


def test_training_crops_are_resized_as_the_spec_says(mixed):
    recipe = Recipe(epochs=1, batch_size=4, crop=0.3)
    batches = [
        Stream(sources.complete(named(mixed, interpolation=name)), recipe, 0).batch(0)
        for name in ("bicubic", "nearest")
    ]
    np.testing.assert_array_equal(batches[0].samples, batches[1].samples)
    assert (batches[0].images != batches[1].images).any()
