"""The validation part and draws of test scenes: what is held out, and what does not change."""

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from atdiag.core import randomness
from atdiag.core.errors import UserError
from atdiag.core.spec import Data
from atdiag.data import scenes, sources, validation
from atdiag.data.embedded import EmbeddedSet
from atdiag.data.image_folders import read
from atdiag.data.splits import Images
from atdiag.study.settings import resolve
from tests.data.test_sources import network

LABELS = load_digits().target


# --- What does not change ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("digits", "4a9d9c3c9a38dafc0d8e1587fa144d7c", "49ab705f7f0b1b65992d9c2fad8a82ab"),
        ("larger", "4b9965b97832d1fec3d867c0966a39af", "5770534166e6caed10a6d55230d0abd8"),
    ],
)
def test_scenes_are_golden(name, train, test):
    # From before other draws and the validation part existed: finished runs were trained and measured on these.
    data = Data(name=name, train=300, clutter=6, test_per_source=2)
    found = [sources.find(data).train_split(data, 5), sources.find(data).test_split(data)]
    bits = [split.pixels.tobytes() + split.labels.tobytes() + split.clusters.tobytes() for split in found]
    assert [hashlib.sha256(one).hexdigest()[:32] for one in bits] == [train, test]
    assert sources.find(data).validation_split(data, 5) is None
    assert sources.find(data).validation_images(data) == 0


# --- The draw of test scenes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "larger"])
def test_another_draw_makes_other_scenes_of_the_same_source_digits(name):
    draws = [scenes.test_scenes(name, 3, 3, draw) for draw in range(3)]
    _, held_out = scenes.source_split()
    for i, one in enumerate(draws):
        assert np.isin(one.sources, held_out).all()
        for other in draws[:i]:
            count = min(len(one), len(other))
            assert (one.images[:count] != other.images[:count]).any(axis=(1, 2, 3)).mean() > 0.9
    if name == "digits":
        assert all(np.array_equal(draws[0].sources, one.sources) for one in draws)
    data = Data(name=name, train=40, test_per_source=3, test_draw=2)
    assert np.array_equal(sources.find(data).test_split(data).pixels, draws[2].images)
    plain = data.model_copy(update={"test_draw": 0})
    assert np.array_equal(*(sources.find(one).train_split(one, 0).pixels for one in (data, plain)))


def test_real_images_have_one_draw():
    assert Data(name="cifar10", train=10, image_size=32, test_draw=3).test_draw == 0


# --- How many ---------------------------------------------------------------------------------------------------------


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=80), data=st.data())
def test_parts_are_stratified_and_nested(labels, data):
    order = data.draw(st.permutations(range(len(labels))))
    counts = Counter(labels)
    before: set[int] = set()
    for count in range(len(labels) + 1):
        found = validation.stratified(labels, order, count)
        assert len(set(found)) == len(found) == count
        assert before <= set(found)
        before = set(found)
        of = Counter(labels[i] for i in found)
        assert all(abs(of[label] - count * counts[label] / len(labels)) <= len(counts) for label in counts)
        for label in counts:  # those of a class in the given order
            first = [i for i in order if labels[i] == label][: of[label]]
            assert {i for i in found if labels[i] == label} == set(first)


@pytest.mark.parametrize(("value", "images", "expected"), [(0.1, 85, 8), (0.001, 85, 1), (40, 85, 40), (None, 85, 0)])
def test_a_fraction_or_a_number(value, images, expected):
    assert validation.size(value, images) == expected


@pytest.mark.parametrize("value", [0, -0.1, 1.5, float("inf")])
def test_neither_a_fraction_nor_a_number(value):
    with pytest.raises(ValueError, match="validation"):
        Data(train=10, validation=value)


def test_equal_numbers_are_equal_specs():
    one, two = Data(train=9, validation=3), Data(train=9, validation=3.0)
    assert one == two == Data.model_validate_json(one.model_dump_json(), strict=True)
    assert one.model_dump_json() == two.model_dump_json()


# --- Scenes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "larger"])
@pytest.mark.parametrize("value", [0.2, 60, 0.0001, 0.999])
def test_no_source_digit_is_in_two_parts_even_as_clutter(name, value, monkeypatch):
    data = Data(name=name, train=400, validation=value, clutter=6, test_per_source=1)
    train, held = scenes.training_split(data.validation)
    _, test = scenes.source_split()
    assert np.array_equal(np.sort(np.concatenate([train, held, test])), np.arange(1797))
    assert set(LABELS[train]) == set(LABELS[held]) == set(range(10))
    count = validation.size(data.validation, data.train)
    made = {
        "train": lambda: scenes.train_scenes(name, data.train, 3, 6, data.validation),
        "validation": lambda: scenes.validation_scenes(name, count, 3, 6, data.validation),
        "test": lambda: scenes.test_scenes(name, 1, 6),
    }
    of = {"train": train, "validation": held, "test": test}
    plain = {part: make() for part, make in made.items()}
    for part, digits in of.items():
        assert np.isin(plain[part].sources, digits).all()
    images, labels = scenes._sources()
    for part, digits in of.items():  # blackening all other digits changes nothing
        dark = np.zeros_like(images)
        dark[digits] = images[digits]
        monkeypatch.setattr(scenes, "_sources", lambda dark=dark: (dark, labels))
        assert np.array_equal(made[part]().images, plain[part].images)
    monkeypatch.undo()
    data_set = sources.find(data)
    assert len(data_set.train_split(data, 3)) == 400
    split = data_set.validation_split(data, 3)
    assert np.array_equal(split.pixels, plain["validation"].images)
    assert len(split) == data_set.validation_images(data) == count
    assert not np.array_equal(split.pixels, data_set.validation_split(data, 4).pixels)
    bare = data.model_copy(update={"validation": None})
    assert np.array_equal(data_set.test_split(data).pixels, data_set.test_split(bare).pixels)


def test_the_number_of_source_digits_held_out():
    pool, _ = scenes.source_split()
    share = np.bincount(LABELS[scenes.training_split(0.25)[1]]) / np.bincount(LABELS[pool])
    assert np.abs(share - 0.25).max() < 0.01
    for number, digits in ((2, 10), (60, 60), (100_000, round(len(pool) / 5))):
        assert len(scenes.training_split(number)[1]) == digits
    assert set(scenes.training_split(0.1)[1]) < set(scenes.training_split(0.3)[1])


def test_validation_scenes_do_not_depend_on_global_generators():
    data = Data(train=50, validation=20)
    with randomness.isolated(0, "another state"):
        one = sources.find(data).validation_split(data, 0)
    assert np.array_equal(one.pixels, sources.find(data).validation_split(data, 0).pixels)


def test_a_registered_data_set_makes_its_own_validation_part_or_has_none():
    def make(count, value):
        return Images(np.full((count, 1, 8, 8), value, np.uint8), np.arange(count) % 2, np.arange(count))

    own = EmbeddedSet(
        name="plain",
        title="plain",
        classes=2,
        image_size=8,
        make_train=lambda data, seed: make(data.train, 0),
        make_test=lambda data: make(4, 1),
        sources=4,
    )
    data = Data(name="plain", train=10, validation=0.4, test_draw=3)
    with pytest.raises(UserError, match=r"`data\.validation`: plain makes no images for validation"):
        own.complete(data)
    assert own.complete(data.model_copy(update={"validation": None})).test_draw == 0
    with_part = replace(own, make_validation=lambda data, seed: make(4, 2), settings=frozenset({"test_draw"}))
    assert with_part.complete(data) == data
    assert (with_part.validation_split(data, 0).pixels == 2).all()
    with pytest.raises(ValueError, match="made 4 images for validation, not 5"):
        with_part.validation_split(data.model_copy(update={"validation": 5}), 0)


# --- Real images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{"validation": 0.25}, {"validation": 7}, {"validation": 0.25, "per_class": 8}])
def test_files_are_in_one_part_and_stratified(uniform, given):
    data = sources.complete(Data(name=f"folder:{uniform}", train=1, image_size=32, **given))
    data_set = sources.find(data)
    chosen = 3 * data.per_class if data.per_class else 36
    held = int(data.validation) if data.validation >= 1 else chosen // 4
    assert data.train == chosen - held
    assert sources.complete(data) == data
    data_set.check(data, network(data_set, data))
    train, part = data_set.train_split(data, 0), data_set.validation_split(data, 0)
    assert (len(train), len(part)) == (data.train, held)
    assert data_set.validation_images(data) == held
    keys = [set(one.files.keys) for one in (train, part)]
    assert not keys[0] & keys[1]
    assert keys[0] | keys[1] == set(read(data.name, "train").subset(data.per_class).keys)
    assert max(part.files.counts) - min(part.files.counts) <= 1
    assert part.files.split == "train"
    for label in range(3):  # by sha256 of the key, within the class
        names = sorted(
            (
                key
                for one in (train, part)
                for key, of in zip(one.files.keys, one.files.labels, strict=True)
                if of == label
            ),
            key=lambda key: hashlib.sha256(key.encode()).digest(),
        )
        assert keys[1] & set(names) == set(names[: part.files.counts[label]])
    assert np.array_equal(part.batch(0, 3), data_set.validation_split(data, 1).batch(0, 3))


def test_the_validation_part_does_not_depend_on_the_number_of_training_images(uniform):
    data = sources.complete(Data(name=f"folder:{uniform}", train=1, image_size=32, validation=6))
    few = sources.complete(data, train=9)
    data_set = sources.find(data)
    train, part = data_set.train_split(few, 0), data_set.validation_split(few, 0)
    assert (len(train), part.files.keys) == (9, data_set.validation_split(data, 0).files.keys)
    assert not set(train.files.keys) & set(part.files.keys)


def test_a_part_that_leaves_too_little_is_refused(uniform):
    data = Data(name=f"folder:{uniform}", train=1, image_size=32, validation=36)
    with pytest.raises(UserError, match=r"`data\.validation`=36 holds back all of 36"):
        sources.complete(data)
    data = data.model_copy(update={"validation": 6})
    with pytest.raises(UserError, match=r"has 30 training images to choose from, and 6 for validation"):
        sources.complete(data, train=31)
    most = sources.complete(data.model_copy(update={"validation": 34}))
    with pytest.raises(UserError, match=r"`data\.validation`=34 leaves no training image of "):
        sources.find(most).check(most, network(sources.find(most), most))
    whole = sources.complete(data).model_copy(update={"train": 36})
    with pytest.raises(UserError, match="has 30 training images beside 6 for validation"):
        sources.find(whole).check(whole, network(sources.find(whole), whole))


# --- As settings ------------------------------------------------------------------------------------------------------


def test_validation_and_test_draw_are_settings():
    made = resolve(sets=["data.validation=0.1", "data.test_draw=1"], environment={}).profile.data
    assert (made.validation, made.test_draw, made.train) == (0.1, 1, 2500)
    for text, says in (
        ("data.validation=0", "should be greater than 0"),
        ("data.validation=1.5", "give a share between 0 and 1, or a whole number"),
        ("data.validation=some", "should be a valid number"),
        ("data.test_draw=-1", "greater than or equal to 0"),
    ):
        with pytest.raises(UserError, match=says):
            resolve(sets=[text], environment={})
