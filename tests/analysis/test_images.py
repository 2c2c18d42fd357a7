"""The selection of images by number, index, file or folder; and files that are no images."""

import numpy as np
import pytest
from PIL import Image

from atdiag.analysis import images, streaming
from atdiag.core.errors import UserError
from atdiag.core.spec import Data
from atdiag.data import sources
from atdiag.networks.weights.classes import HeadRows

DIGITS = Data(name="digits", train=1, clutter=6)


def pixels(some):
    return np.concatenate([(one.pixels.numpy() * 255).round().astype(np.uint8) for one in some.batches(3)])


@pytest.fixture(scope="module")
def network(subject):
    return subject().network


def test_a_number_selects_that_many_evenly_spread_images(network):
    split = sources.find(DIGITS).test_split(DIGITS)
    some = images.choose("4", DIGITS, network)
    rows = [0, len(split) // 4, len(split) // 2, 3 * len(split) // 4]
    assert some.names == tuple(f"digits {row}" for row in rows)
    assert (pixels(some) == split.take(np.array(rows))).all()
    assert (some.labels == split.labels[rows]).all() and (some.clusters == split.clusters[rows]).all()
    assert len(images.choose(0, DIGITS, network)) == len(split)


def test_indices_select_these_images(network):
    assert images.choose("3,17,40-42", DIGITS, network).names == tuple(f"digits {i}" for i in (3, 17, 40, 41, 42))
    assert images.choose("17,", DIGITS, network).names == ("digits 17",)


@pytest.fixture
def folder(tmp_path):
    """Make two folders with three images of different sizes (one grey), a broken image and a text file."""
    draw = np.random.default_rng(0)
    for name, shape in (("a/1.png", (20, 20, 3)), ("a/3.png", (50, 30, 3)), ("b/2.jpg", (25, 40))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "readme.txt").write_text("no image")
    (tmp_path / "a/2.jpg").write_bytes(b"\xff\xd8 broken")
    return tmp_path


def test_a_folder_and_files(folder, subject):
    network = subject(channels=3).network
    files = [folder / "a/3.png", folder / "a/1.png"]
    some = images.choose(files, None, network)
    assert some.names == tuple(map(str, files)) and some.labels is None
    found = pixels(some)
    assert found.shape == (2, 3, 20, 20)
    assert (found[1] == np.moveaxis(np.asarray(Image.open(files[1])), -1, 0)).all()
    (folder / "a/2.jpg").unlink()
    assert images.choose(folder, None, network).names == tuple(
        str(folder / n) for n in ("a/1.png", "a/3.png", "b/2.jpg")
    )


def test_an_unreadable_image_is_named_and_skipped_only_on_request(folder, subject):
    one = subject()
    with pytest.raises(UserError, match=r"a/2.jpg can't be read.*`skip_bad`"):
        streaming.trace(one, images.choose(folder, None, one.network))
    some = images.choose(folder, None, one.network, skip_bad=True)
    found = streaming.trace(one, some, layers=(0,), batch=2)
    assert found["map", 0].shape[0] == 3
    assert list(some.skipped) == [str(folder / "a/2.jpg")]
    with pytest.raises(UserError, match="none of the 1 images can be read"):
        streaming.trace(one, images.choose(folder / "a/2.jpg", None, one.network, skip_bad=True))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("99999", "digits has .* test images: give at most [0-9]+"),
        ("3,99999", "digits has test images 0 to"),
        ("9-3", "is not a list of indices"),
        (",", "names no image"),
        ("nowhere/cat.jpg", "there is no such file or folder"),
        ("a.jpg,b.jpg", "`images` a.jpg `images` b.jpg"),
        ("3,b.jpg", "indices and files can't be mixed"),
        (["3", "b.jpg"], "`images` 3 is an index, and files are named too"),
        (["3", "5-6"], "`images` 3,5-6"),
        ([], "no images are named"),
    ],
)
def test_arguments_that_select_no_images_are_refused_in_one_line(network, wanted, message):
    with pytest.raises(UserError, match=message):
        images.choose(wanted, DIGITS, network)


def test_images_that_do_not_fit_the_network_are_refused(subject, tmp_path):
    network = subject(channels=3).network
    with pytest.raises(UserError, match="20 x 20 x 1, and the network sees 20 x 20 x 3"):
        images.choose(3, DIGITS, network)
    with pytest.raises(UserError, match="no data set is named"):
        images.choose(3, None, network)
    with pytest.raises(UserError, match="no images in the folder"):
        images.choose(tmp_path, None, network)


def test_head_rows_of_the_data_sets_classes(subject):
    some = images.choose(6, DIGITS, subject().network)
    assert some.head_rows(subject().head) == HeadRows(tuple(range(10)), "assumed: alphabetical order")
    assert some.head_rows(subject(classes=7).head).rows is None
    real = images.ImageSet(some.names, some.source, np.arange(6), None, Data(name="imagenette", train=1, image_size=20))
    rows = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
    assert real.head_rows(subject(classes=1000).head) == HeadRows(rows, "ImageNet's wnids")
    assert images.from_arrays(np.zeros((2, 1, 20, 20), np.uint8)).head_rows(subject().head).rows is None


def test_arrays_of_another_kind_are_refused():
    good = np.zeros((3, 1, 20, 20), np.uint8)
    for bad, labels, message in (
        (good.astype(np.float32), None, r"uint8 \[n, channels, S, S\], and these are float32.*255"),
        (good[0], None, r"\[1, 20, 20\]"),
        (good[:, :, :10], None, r"\[3, 1, 10, 20\]"),
        (good[:0], None, r"\[0, 1, 20, 20\]"),
        (good, np.zeros(2), "3 images have labels of shape .2."),
    ):
        with pytest.raises(UserError, match=message):
            images.from_arrays(bad, labels)
    assert len(images.from_arrays(good, [0, 1, 2])) == 3
