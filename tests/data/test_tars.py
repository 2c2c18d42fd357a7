"""``timm:PATH``: images in tars are the same data set as in a folder, in every use."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from atdiag.core import paths
from atdiag.core.errors import UserError
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed
from atdiag.data import cache, image_folders, manifest, sources, tars
from atdiag.data.decoding import BrokenImageError, ImageFolder, View, load
from atdiag.data.loader import Stream
from atdiag.data.sources import complete
from tests.commands import ran, wrong


def pack(tar, entries):
    """Write a tar of (name, content)."""
    tar.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(tar, "w") as archive:
        for name, content in entries:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return tar


def listed(folder, top="") -> list:
    """Return the images of a folder of classes in another order."""
    return [(f"{top}{p.parent.name}/{p.name}", p.read_bytes()) for p in sorted(folder.glob("*/*"), reverse=True)]


def as_tar(root, to):
    for split in ("train", "val"):
        pack(to / f"{split}.tar", [("./readme.txt", b"x"), ("a/._b.jpg", b"x"), *listed(root / split, "./images/")])


def as_folder_of_tars(root, to):
    for split in ("train", "val"):
        for folder in (root / split).iterdir():
            pack(to / split / f"{folder.name}.tar", [(p.name, p.read_bytes()) for p in folder.iterdir()])


def as_tar_of_tars(root, to):
    for split in ("train", "val"):
        inner = []
        for folder in sorted((root / split).iterdir(), reverse=True):
            tar = pack(to / "inner.tar", [(p.name, p.read_bytes()) for p in folder.iterdir()])
            inner.append((f"{folder.name}.tar", tar.read_bytes()))
        pack(to / f"{split}.tar", inner)
    (to / "inner.tar").unlink()


LAYOUTS = {f.__name__: f for f in (as_tar, as_folder_of_tars, as_tar_of_tars)}


@pytest.fixture(params=LAYOUTS)
def both(request, mixed, tmp_path):
    """Make a folder, and the same in tars."""
    LAYOUTS[request.param](mixed, tmp_path / "tars")
    return mixed, tmp_path / "tars"


def test_tars_hold_the_same_data_set_as_a_folder(both):
    folder, packed = both
    for split in image_folders.SPLITS:
        plain, tar = image_folders.read(f"folder:{folder}", split), image_folders.read(f"timm:{packed}", split)
        assert (tar.classes, tar.keys, tar.labels) == (plain.classes, plain.keys, plain.labels)
        assert tar.fingerprint() == plain.fingerprint()
        assert tar.subset(2).keys == plain.subset(2).keys
        for files in (tar, tar.subset(2)):
            for i, key in enumerate(files.keys):
                alias = "train" if split == "train" else "val"
                assert files.stored(i).read() == (folder / alias / key).read_bytes()
                assert files.stored(i).path.as_posix().endswith(key)


def test_timm_s_reader_gives_the_same_bytes(both):
    _, packed = both
    place = tars.place(packed, ["train"])
    files = image_folders.read(f"timm:{packed}", "train")
    reader = ReaderImageInTar(str(place), cache_tarinfo=False)
    names_of = reader.class_idx_to_name
    theirs = {}
    for i in range(len(reader)):
        key = f"{names_of[int(reader.targets[i])]}/{reader.filename(i, basename=True)}"
        theirs[key] = reader[i][0].read()
    assert {key: content for key, content in theirs.items() if "/." not in key} == {
        key: files.stored(i).read() for i, key in enumerate(files.keys)
    }


def spec(data: Data) -> RunSpec:
    network = Network(image_size=32, patch_size=8, channels=3, width=16, depth=1, heads=2, classes=3)
    return RunSpec(network=network, data=data, recipe=Recipe(epochs=1), seed=Seed(data=0, model=0))


def test_a_run_on_tars_or_a_folder_is_the_same_run(both):
    specs = [
        spec(complete(Data(name=name, train=1, image_size=32, per_class=4)))
        for name in (f"folder:{both[0]}", f"timm:{both[1]}")
    ]
    assert specs[0].id == specs[1].id
    for one in specs:
        sources.find(one.data).check(one.data, one.network)
    pack(both[1] / "val.tar", [(f"{cls}/{i}.jpg", b"other") for cls in ("ant", "bee", "cow") for i in range(5)])
    with pytest.raises(UserError, match="are not those that the spec means"):
        sources.find(specs[1].data).check(specs[1].data, specs[1].network)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_augmentation_get_the_same_pixels(both, workers):
    recipe = Recipe(epochs=2, batch_size=8, flip=True, crop=0.3, mixup=0.8)
    plain, tar = (
        list(Stream(complete(Data(name=name, train=1, image_size=32)), recipe, 3).batches(0, 8, workers))
        for name in (f"folder:{both[0]}", f"timm:{both[1]}")
    )
    for one, other in zip(plain, tar, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_images_of_one_size_are_decoded_once(uniform, tmp_path):
    as_tar(uniform, tmp_path / "tars")
    plain, tar = (image_folders.read(name, "train") for name in (f"folder:{uniform}", f"timm:{tmp_path}/tars"))
    path = cache.decoded(tar)
    assert np.array_equal(np.load(path), np.load(cache.decoded(plain)))
    view = View(32, 1.0)
    assert np.array_equal(ImageFolder(tar, view, path).batch(0, 9), ImageFolder(plain, view).batch(0, 9))
    os.utime(tmp_path / "tars" / "train.tar", (1, 1))
    assert cache.decoded(image_folders.read(f"timm:{tmp_path}/tars", "train")) != path


def test_check_hashes_all_images_and_names_broken_ones(both):
    name = f"timm:{both[1]}"
    code, out = ran("data", "check", name, "--json")
    document = json.loads(out.splitlines()[-1])
    assert (code, document["images"], document["classes"]) == (0, {"train": 36, "test": 15}, 3)
    assert manifest.recorded(name) == document["sha256"]
    theirs = manifest.read(sources.find(f"folder:{both[0]}").files(), processes=1)
    texts = [Path(path).read_text() for path in (document["manifest"], theirs.manifest)]
    hashes = [sorted(line.split()[0] for line in text.splitlines()) for text in texts]
    assert hashes[0] == hashes[1]


def test_a_broken_image_in_a_tar_is_named(uniform, tmp_path):
    (uniform / "train" / "bee" / "bee_3.jpg").write_bytes(b"no image")
    as_tar(uniform, tmp_path / "tars")
    code, out = ran("data", "check", f"timm:{tmp_path}/tars")
    assert code == 1
    assert f"broken: {tmp_path}/tars/train.tar/bee/bee_3.jpg (it is not an image of a known format)" in out
    files = image_folders.read(f"timm:{tmp_path}/tars", "train")
    (tmp_path / "tars" / "train.tar").unlink()
    with pytest.raises(BrokenImageError, match=r"train\.tar/ant/ant_0\.jpg can't be read: No such file"):
        load(files.stored(0))


# --- what is kept, and what is not ------------------------------------------------------------------------------------


def test_tars_are_indexed_once(both, monkeypatch):
    name = f"timm:{both[1]}"
    first = image_folders.read(name, "train")
    with monkeypatch.context() as patch:
        patch.setattr(tars, "_scan", lambda path: pytest.fail("looked again"))
        assert image_folders.read(name, "train") == first
    (kept,) = (paths.cache() / "tars").glob("*.json")
    for content in (b"", b"{", b"[[1]]", b"null", b"[" * 10_000, kept.read_bytes()[:-9]):
        kept.write_bytes(content)
        assert image_folders.read(name, "train") == first
    document = json.loads(kept.read_text())
    document["images"][0][4] = 2**60
    kept.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"truncated, or .* is out of date"):
        image_folders.read(name, "train")


def test_a_changed_tar_is_indexed_again(uniform, tmp_path):
    as_tar(uniform, tmp_path / "tars")
    before = image_folders.read(f"timm:{tmp_path}/tars", "train")
    pack(tmp_path / "tars" / "train.tar", listed(uniform / "train")[:-1])
    assert len(image_folders.read(f"timm:{tmp_path}/tars", "train")) == len(before) - 1


def test_an_unwritable_cache_is_reported(uniform, tmp_path, monkeypatch):
    as_tar(uniform, tmp_path / "tars")
    (tmp_path / "file").touch()
    monkeypatch.setenv("ATDIAG_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="can't be kept in"):
        assert len(image_folders.read(f"timm:{tmp_path}/tars", "train")) == 36


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_no_pickle_file_is_read_or_written_beside_tars(both, tmp_path):
    _, packed = both
    bombs = [packed / "_train_tarinfos.pickle", packed / "train" / "_train_tarinfos.pickle"]
    for bomb in bombs:
        if bomb.parent.exists():
            bomb.write_bytes(pickle.dumps(_Bomb(tmp_path / "exploded")))
    before = sorted(packed.rglob("*"))
    assert len(image_folders.read(f"timm:{packed}", "train")) == 36
    assert not (tmp_path / "exploded").exists()
    assert sorted(packed.rglob("*")) == before


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("wds/shards", "order of its own"),
        ("tfds/cifar10", "order of its own"),
        ("HFIDS/timm/imagenet", "order of its own"),
        ("torch/cifar10", "unpickles"),
        ("hfds/timm/imagenette", "downloads unasked"),
    ],
)
def test_unsupported_and_unsafe_readers_are_refused(capsys, name, says):
    text = wrong(capsys, "data", "check", f"timm:{name}")
    assert says in text
    assert text.endswith("give a folder of images as folder:PATH, or of tars as timm:PATH")


def test_names_of_data_sets_in_tars(tmp_path):
    with pytest.raises(UserError, match=r"unknown data set 'timm:'.*timm:PATH"):
        sources.find("timm:")
    with pytest.raises(UserError, match="there is no folder /nowhere"):
        image_folders.read("timm:/nowhere", "train")
    with pytest.raises(UserError, match=r"needs `data\.image_size`"):
        complete(Data(name=f"timm:{tmp_path}", train=1))


def wrongly(packed, how):
    train = packed / "train.tar"
    image = (packed / "val.tar").read_bytes()[512:1000]
    if how == "none":
        train.unlink()
    elif how == "text":
        train.write_bytes(b"no tar" * 1000)
    elif how == "empty":
        train.write_bytes(b"")
    elif how == "no images":
        pack(train, [("ant/x.txt", b"x")])
    elif how == "flat":
        pack(train, [("x.jpg", image)])
    elif how == "twice":
        pack(train, [("a/ant/x.jpg", image), ("b/ant/x.jpg", image)])
    elif how == "cut":
        train.write_bytes(train.read_bytes()[:3000])
    elif how == "cut at the end":
        pack(train, [("ant/x.jpg", image * 100)])
        train.write_bytes(train.read_bytes()[:2048])
    elif how == "no text":
        pack(train, [("ant/x\n.jpg", image)])


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("none", r"has neither 'train.tar' nor a folder of tars 'train': it holds val.tar; .*folder:PATH"),
        ("text", r"train.tar can't be read as tars of images \(invalid header\)"),
        ("empty", r"train.tar can't be read as tars of images"),
        ("no images", r"train.tar can't be read as tars of images \(no image in it\)"),
        ("flat", "train.tar holds images outside of any folder, such as x.jpg"),
        ("twice", "train.tar holds two images ant/x.jpg"),
        ("cut", "train.tar can't be read as tars of images|train.tar is truncated"),
        ("cut at the end", "train.tar can't be read as tars of images|train.tar is truncated"),
        ("no text", "not stored as it should be"),
    ],
)
def test_malformed_tars_are_refused(uniform, tmp_path, how, says):
    as_tar(uniform, tmp_path / "tars")
    wrongly(tmp_path / "tars", how)
    with pytest.raises(UserError, match=says):
        image_folders.read(f"timm:{tmp_path}/tars", "train")


def test_links_and_malicious_names_are_not_followed(uniform, tmp_path):
    as_tar(uniform, tmp_path / "tars")
    with tarfile.open(tmp_path / "tars" / "train.tar", "a") as archive:
        entry = tarfile.TarInfo("ant/link.jpg")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(entry)
        for name in ("../../etc/ant/up.jpg", "/ant/absolute.jpg"):
            entry = tarfile.TarInfo(name)
            entry.size = 4
            archive.addfile(entry, io.BytesIO(b"here"))
    files = image_folders.read(f"timm:{tmp_path}/tars", "train")
    assert {"ant/up.jpg", "ant/absolute.jpg"} < set(files.keys)
    assert "ant/link.jpg" not in files.keys
    for i in range(len(files)):
        assert files.stored(i).file == tmp_path / "tars" / "train.tar"
    assert files.stored(files.keys.index("ant/up.jpg")).read() == b"here"


@pytest.mark.parametrize("inside", [False, True])
def test_a_header_with_a_size_beyond_the_file_is_refused_at_once(tmp_path, inside):
    """timm's reader would read on past the end, for 2^50 bytes."""
    huge = tarfile.TarInfo("cat/huge.jpg")
    huge.size = 2**50
    content = huge.tobuf(tarfile.GNU_FORMAT) + bytes(10240)
    if inside:
        outer = io.BytesIO()
        with tarfile.open(fileobj=outer, mode="w") as tar:
            entry = tarfile.TarInfo("cat.tar")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        content = outer.getvalue()
    for name in ("train.tar", "val.tar"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"claims to have 1,125,899,906,842,624 bytes|unexpected end of data"):
        image_folders.read(f"timm:{tmp_path}", "train")
