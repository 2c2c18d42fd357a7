"""Turned images: the same images, by exactly a quarter, in training, validation and at test."""

import numpy as np
import pytest

from atdiag.core import paths
from atdiag.core.spec import Data, Recipe
from atdiag.data import sources
from atdiag.data.augmentation import Augment
from atdiag.data.decoding import ImageFolder, View
from atdiag.data.loader import Stream
from tests.photos import draw

SCENES = Data(name="digits", train=40, test_per_source=1, validation=0.2)


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("name", ["digits", "larger"])
def test_scenes_are_turned_in_every_split(name, turns):
    upright = SCENES.model_copy(update={"name": name})
    turned = upright.model_copy(update={"turns": turns})
    found = sources.find(upright)
    for split in (
        lambda data: found.train_split(data, 3),
        lambda data: found.validation_split(data, 3),
        found.test_split,
    ):
        one, other = split(upright), split(turned)
        for a, b in zip(one.pixels[:, 0], other.pixels[:, 0], strict=True):
            assert np.array_equal(b, np.rot90(a, turns))
        assert np.array_equal(one.labels, other.labels)
        assert np.array_equal(one.clusters, other.clusters)
    assert found.test_split(upright.model_copy(update={"turns": 0})).pixels is not None


def test_a_turn_is_counter_clockwise_and_four_are_none():
    image = np.arange(9, dtype=np.uint8).reshape(3, 3)
    assert np.rot90(image)[0].tolist() == [2, 5, 8]  # the right column is on top
    with pytest.raises(ValueError, match="less than or equal to 3"):
        Data(train=1, turns=4)


def test_batches_are_turned_and_otherwise_the_same():
    recipe = Recipe(epochs=1, batch_size=8)
    upright, turned = (Stream(SCENES.model_copy(update={"turns": n}), recipe, 0).batch(1) for n in (0, 1))
    assert np.array_equal(turned.images.numpy(), np.rot90(upright.images.numpy(), 1, axes=(2, 3)))
    assert np.array_equal(turned.samples, upright.samples)


@pytest.fixture
def photos(tmp_path):
    draw(tmp_path / "set", 5)
    name = f"folder:{tmp_path / 'set'}"
    with paths.looking_in(tmp_path):
        data = Data(name=name, train=10, image_size=16)
        yield sources.find(name), data


def test_photographs_are_turned(photos, tmp_path):
    """As stored (for training crops), in the test view, and from a file of decoded images."""
    found, data = photos
    upright, turned = (found.test_split(data.model_copy(update={"turns": n})) for n in (0, 1))
    for i in range(len(upright)):
        assert np.array_equal(np.asarray(turned.picture(i)), np.rot90(np.asarray(upright.picture(i))))
    square = np.random.default_rng(0).integers(0, 256, (len(upright), 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "decoded.npy", square)
    stored = ImageFolder(turned.files, turned.view, tmp_path / "decoded.npy", 1)
    plain = ImageFolder(turned.files, turned.view, tmp_path / "decoded.npy")
    assert isinstance(turned.view, View)
    assert np.array_equal(stored.batch(0, 4), np.rot90(plain.batch(0, 4), 1, axes=(2, 3)))
    assert np.array_equal(stored.batch(0, 4)[1, 2], np.rot90(square[1, :, :, 2]))
    views = [one.batch(0, len(upright)).astype(int) for one in (upright, turned)]
    assert (
        np.abs(np.rot90(views[0], 1, axes=(2, 3)) - views[1]).mean() < 40
    )  # resized: the same up to the crop's rounding


def test_training_crops_are_cut_from_turned_photographs(photos):
    found, data = photos
    recipe = Recipe(epochs=1, batch_size=4, crop=0.9)
    for turns in (1, 2):
        split = found.train_split(data.model_copy(update={"turns": turns}), 0)
        augment = Augment(recipe, 0, 16, True)
        seen = augment(split, 0, np.arange(3))
        again = augment(ImageFolder(split.files, split.view, None, turns), 0, np.arange(3))
        assert np.array_equal(seen, again)
        assert not np.array_equal(seen, augment(ImageFolder(split.files, split.view), 0, np.arange(3)))
