"""Every file in a class folder is read, refused by path, or counted and named."""

import hashlib
import io
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from atdiag.analysis.images import choose, named
from atdiag.core.errors import UserError
from atdiag.core.spec import Network
from atdiag.data import endings, folder_sets, image_folders, sources
from atdiag.data.decoding import FORMATS, ImageFolder, View
from tests.commands import ran, wrong
from tests.data.test_tars import as_folder_of_tars, as_tar, as_tar_of_tars, listed, pack

NETWORK = Network(image_size=32, patch_size=8, channels=3, width=16, depth=1, heads=2, classes=1)


def train(root, kind="folder"):
    return image_folders.read(f"{kind}:{root}", "train")


def test_each_file_ending_belongs_to_one_format_of_pillow():
    assert len(set(endings.READ)) == len(endings.READ)
    known = Image.registered_extensions()
    for name, own in endings.FORMATS.items():
        assert set(FORMATS) == set(endings.FORMATS)
        assert all(known[ending] in (name, "MPO", "DIB") for ending in own if ending in known and ending != ".pnm"), (
            name
        )
    assert not set(endings.READ) & {*endings.UNREAD, *endings.DOCUMENTS}
    assert endings.is_image("A.TIF") and not endings.is_image("a.pdf") and endings.is_refused("scan.NII.GZ")


@pytest.mark.parametrize("ending", endings.READ)
def test_a_file_with_each_ending_is_read(uniform, ending):
    before = train(uniform)
    name = next(name for name, own in endings.FORMATS.items() if ending in own)
    mode = {".pgm": "L", ".pbm": "1"}.get(ending, "RGB")
    picture = Image.new(mode, (32, 32), "white")
    content = io.BytesIO()
    picture.save(content, name, **({"no_jp2": True} if ending in (".j2k", ".j2c", ".jpc") else {}))
    (uniform / "train" / "bee" / f"z{ending.upper()}").write_bytes(content.getvalue())
    after = train(uniform)
    assert set(after.keys) - set(before.keys) == {f"bee/z{ending.upper()}"}
    place = after.keys.index(f"bee/z{ending.upper()}")
    assert ImageFolder(after, View(32, 1.0)).take(np.array([place])).min() == 255


def test_a_folder_with_the_first_five_endings_keeps_its_fingerprint(uniform):
    """The digest of names and sizes, as the first version of it listed them."""
    for i, ending in enumerate((".jpeg", ".png", ".webp", ".bmp")):
        Image.new("RGB", (32, 32), (i, i, i)).save(uniform / "train" / "ant" / f"more{ending}")
    digests = []
    for split, folder in (("train", "train"), ("test", "val")):
        files = sorted((uniform / folder).glob("*/*"), key=lambda p: (p.parent.name, p.name))
        lines = [f"{split}/{p.parent.name}/{p.name}\t{p.stat().st_size}\n" for p in files]
        digests.append(hashlib.sha256("".join(lines).encode()).hexdigest())
    expected = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    assert image_folders.fingerprint(f"folder:{uniform}") == expected
    (uniform / "train" / "ant" / "notes.txt").touch()
    assert image_folders.fingerprint(f"folder:{uniform}") == expected


@pytest.mark.parametrize("name", ["x.eps", "x.PDF", "x.avif", "x.heic", "x.dcm", "x.nii.gz", "x.svg"])
def test_unsupported_formats_are_refused_by_path(uniform, tmp_path, name):
    (uniform / "train" / "bee" / name).write_bytes(b"x")
    with pytest.raises(UserError, match=rf"train/bee/{name} is of a format that is not read: save it as PNG"):
        train(uniform)
    as_tar(uniform, tmp_path / "tars")
    with pytest.raises(UserError, match=rf"train\.tar/images/bee/{name} is of a format that is not read"):
        train(tmp_path / "tars", "timm")
    (uniform / "train" / "bee" / name).rename(uniform / "train" / name)
    with pytest.raises(UserError, match="holds 1 images beside its 3 folders"):
        train(uniform)
    shutil.move(uniform / "train" / name, uniform / "away")
    (uniform / "train" / "bee" / "more").mkdir()
    shutil.move(uniform / "away", uniform / "train" / "bee" / "more" / name)
    with pytest.raises(UserError, match="has images in a folder within it, more"):
        train(uniform)


def test_a_data_set_with_most_files_left_out_is_refused(uniform):
    for i in range(36):
        (uniform / "train" / "cow" / f"{i}.npy").touch()
    assert len(train(uniform).others) == 36  # one other file per image is no majority
    assert folder_sets.left_out(f"folder:{uniform}").startswith("36 files in class folders left out")
    (uniform / "train" / "ant" / "one.npy").touch()
    with pytest.raises(UserError, match=r"has 36 train images and 37 other files .*: train/ant/one.npy, train/cow/0"):
        train(uniform)


@pytest.mark.parametrize("layout", [as_folder_of_tars, as_tar_of_tars, as_tar])
def test_tars_are_listed_like_folders(uniform, tmp_path, layout):
    bee = uniform / "train" / "bee"
    for ending in (".tif", ".webp", ".gif", ".bmp"):
        Image.new("RGB", (32, 32)).save(bee / f"z{ending}")
    (bee / "notes.txt").write_text("x")
    (bee / ".hidden.txt").write_text("x")
    layout(uniform, tmp_path / "tars")
    plain, packed = train(uniform), train(tmp_path / "tars", "timm")
    assert packed.keys == plain.keys and len(plain) == 40
    assert packed.fingerprint() == plain.fingerprint()
    assert plain.others == ("train/bee/notes.txt",)
    (other,) = packed.others
    assert other.startswith("train") and other.endswith("notes.txt") and "bee" in other
    assert train(tmp_path / "tars", "timm") == packed  # from the index in the cache folder


def test_a_tar_of_mostly_other_files_is_refused_and_a_link_is_counted(uniform, tmp_path):
    entries = listed(uniform / "train")
    pack(tmp_path / "t" / "train.tar", entries)
    with tarfile.open(tmp_path / "t" / "train.tar", "a") as archive:
        entry = tarfile.TarInfo("ant/link.jpg")
        entry.type, entry.linkname = tarfile.SYMTYPE, "ant_0.jpg"
        archive.addfile(entry)
    assert train(tmp_path / "t", "timm").others == ("train.tar/ant/link.jpg",)
    pack(tmp_path / "t" / "train.tar", [*entries, *((f"ant/{i}.npy", b"x") for i in range(37))])
    with pytest.raises(UserError, match="has 36 train images and 37 other files"):
        train(tmp_path / "t", "timm")


# --- the commands -----------------------------------------------------------------------------------------------------


def test_a_plan_names_the_files_left_out(uniform):
    (uniform / "train" / "bee" / "notes.txt").touch()
    name = f"folder:{uniform}"
    sets = ("--set", f"data.name={name}", "--set", "data.image_size=32", "--set", "recipe.batch_size=4")
    code, out = ran("reinit", "--teacher", "timm:vit_tiny_patch16_224", *sets, "--dry-run")
    assert code == 0
    assert f"{name}: 1 file in class folders left out, no images by the ending: train/bee/notes.txt\n" in out


def test_a_single_class_is_refused_before_anything_is_trained(tmp_path, fill, spec, capsys):
    root = fill(tmp_path / "one", classes=("ant",), train=40)
    sets = ("--set", f"data.name=folder:{root}", "--set", "data.image_size=32", "--set", "recipe.batch_size=4")
    text = wrong(capsys, "reinit", "--teacher", "timm:vit_tiny_patch16_224", *sets, "--dry-run")
    assert "has 1 class, so that every network would be right on every image: training needs at least two" in text
    data = spec(root)
    with pytest.raises(UserError, match="has 1 class"):
        sources.find(data).check(data, NETWORK)
    code, out = ran("data", "check", f"folder:{root}")
    assert code == 0 and "1 class," in out


def test_rules_for_training_do_not_apply_to_analysing_ten_images(tmp_path, fill, capsys):
    root = fill(tmp_path / "few", classes=("ant",), train=5, test=5)
    text = wrong(
        capsys, "maps", "timm:vit_tiny_patch16_224", "--data", f"folder:{root}", "--set", "data.image_size=224"
    )
    assert "the weights of timm:vit_tiny_patch16_224 are not on this machine" in text


def test_analysing_a_folder_accepts_the_same_endings_and_names_unreadable_files(uniform):
    bee = uniform / "train" / "bee"
    for ending in (".tif", ".gif", ".pgm"):
        Image.new("L", (32, 32)).save(
            bee / f"z{ending.upper()}", {".pgm": "PPM", ".tif": "TIFF", ".gif": "GIF"}[ending]
        )
    for name in ("notes.txt", "figure.pdf"):
        (bee / name).touch()
    assert {path.name for path in named(bee)} == {path.name for path in bee.iterdir()} - {"notes.txt", "figure.pdf"}
    (bee / "new.avif").write_bytes(b"no format of ours")
    pictures = choose(bee, None, NETWORK)
    with pytest.raises(UserError, match=r"new.avif can't be read: it is not an image of a known format"):
        list(pictures.batches(64))
