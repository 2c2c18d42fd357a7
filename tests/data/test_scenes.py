import numpy as np
import pytest
from sklearn.datasets import load_digits

from atdiag.core import randomness
from atdiag.core.errors import UserError
from atdiag.core.spec import Data, Network
from atdiag.data import scenes, sources

SOURCES = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
LABELS = load_digits().target
TASKS = {"digits": 10, "larger": 9}
"""Task -> number of classes."""


def make(task, split, clutter=3, seed=0):
    return scenes.train_scenes(task, 3000, seed, clutter) if split == "train" else scenes.test_scenes(task, 3, clutter)


def found(image, source):
    """Return whether a source digit is somewhere in a scene: every pixel at least as bright as the digit's."""
    windows = np.lib.stride_tricks.sliding_window_view(image, (8, 8))
    return bool((windows >= SOURCES[source]).all(axis=(-1, -2)).any())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_scenes_are_deterministic(task, split):
    with randomness.isolated(0, "other global state"):
        one = make(task, split)
    two = make(task, split)
    for field in ("images", "labels", "clusters", "sources"):
        assert np.array_equal(getattr(one, field), getattr(two, field))


@pytest.mark.parametrize("task", TASKS)
def test_seeds_change_the_training_scenes(task):
    one, two = make(task, "train", seed=0), make(task, "train", seed=1)
    assert (one.sources != two.sources).mean() > 0.9
    assert (one.images != two.images).any(axis=(1, 2, 3)).mean() > 0.99


def test_the_split_of_sources_is_disjoint_complete_and_stratified():
    train, test = scenes.source_split()
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(1797))
    share = np.bincount(LABELS[test]) / np.bincount(LABELS)
    assert np.abs(share - 1 / 3).max() < 0.005


@pytest.mark.parametrize("task", TASKS)
def test_no_source_digit_appears_in_both_splits(task, monkeypatch):
    train, test = scenes.source_split()
    assert np.isin(make(task, "train").sources, train).all()
    assert np.isin(make(task, "test").sources, test).all()

    # Nor as clutter: if all digits of one split are blackened, the other's scenes must not change.
    plain = {split: make(task, split).images for split in ("train", "test")}
    for split, unseen in (("train", test), ("test", train)):
        images = SOURCES.copy()
        images[unseen] = 0
        monkeypatch.setattr(scenes, "_sources", lambda images=images: (images, LABELS.astype(np.int64)))
        assert np.array_equal(make(task, split).images, plain[split])
        other = "test" if split == "train" else "train"
        assert not np.array_equal(make(task, other).images, plain[other])


@pytest.mark.parametrize("split", ["train", "test"])
def test_digits_scenes_contain_their_digit_and_have_its_label(split):
    scenes = make("digits", split)
    assert scenes.images.shape[1:] == (1, 20, 20)
    assert scenes.images.dtype == np.uint8
    assert np.array_equal(scenes.labels, LABELS[scenes.sources[:, 0]])
    assert set(scenes.labels) == set(range(10))
    for i in range(0, len(scenes), 37):
        assert found(scenes.images[i, 0], scenes.sources[i, 0])


@pytest.mark.parametrize("split", ["train", "test"])
def test_larger_scenes_contain_two_digits_and_have_the_larger_ones_label(split):
    scenes = make("larger", split)
    shown = LABELS[scenes.sources]
    assert (shown[:, 0] != shown[:, 1]).all()
    assert np.array_equal(scenes.labels, shown.max(axis=1) - 1)
    assert set(scenes.labels) == set(range(9))
    for i in range(0, len(scenes), 37):
        assert all(found(scenes.images[i, 0], source) for source in scenes.sources[i])


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_two_digits_do_not_overlap(split):
    # Without clutter: if no pixel is shared, the scene's total is the sum of both digits'.
    scenes = make("larger", split, clutter=0)
    totals = SOURCES.astype(int).sum(axis=(1, 2))[scenes.sources].sum(axis=1)
    assert np.array_equal(scenes.images.astype(int).sum(axis=(1, 2, 3)), totals)


@pytest.mark.parametrize("task", TASKS)
def test_digits_are_placed_everywhere_and_clutter_is_added(task):
    bare, cluttered = make(task, "train", clutter=0), make(task, "train", clutter=6)
    lit = (bare.images[:, 0] > 0).mean(axis=0)
    assert (lit > 0).mean() > 0.95
    assert (cluttered.images > 0).mean() > 1.5 * (bare.images > 0).mean()


def test_training_and_test_labels_have_the_same_distribution():
    for task, classes in TASKS.items():
        train, test = (np.bincount(make(task, split).labels, minlength=classes) for split in ("train", "test"))
        assert np.abs(train / train.sum() - test / test.sum()).max() < 0.03


@pytest.mark.parametrize("task", TASKS)
def test_clusters_are_disjoint_and_of_equal_size(task):
    made = scenes.test_scenes(task, 4, 3)
    assert np.array_equal(np.bincount(made.clusters), np.full(made.clusters.max() + 1, 4))
    owners: dict[int, set[int]] = {}
    for cluster, digits in zip(made.clusters, made.sources, strict=True):
        for source in digits:
            owners.setdefault(int(source), set()).add(int(cluster))
    assert all(len(clusters) == 1 for clusters in owners.values())
    assert len(owners) >= 0.85 * len(scenes.source_split()[1])


def test_test_scenes_do_not_depend_on_training_settings():
    data = Data(name="digits", train=10, test_per_source=2)
    one = sources.find(data).test_split(data)
    two = sources.find(data).test_split(data.model_copy(update={"train": 500}))
    assert np.array_equal(one.pixels, two.pixels)
    assert len(one) == 2 * len(scenes.source_split()[1])


def test_splits_by_name():
    data = Data(name="larger", train=50)
    images = sources.find(data).train_split(data, 3)
    assert np.array_equal(images.pixels, scenes.train_scenes("larger", 50, 3, data.clutter).images)
    assert len(images) == 50


NETWORK = Network(image_size=20, patch_size=4, channels=1, width=16, depth=1, heads=2, classes=10)


def test_an_unknown_data_set_is_refused_everywhere():
    data = Data(name="digit", train=10)
    for use in (
        lambda: sources.find(data).check(data, NETWORK),
        lambda: sources.find(data).train_split(data, 0),
        lambda: sources.find(data).test_split(data),
    ):
        with pytest.raises(UserError, match="did you mean 'digits'"):
            use()


@pytest.mark.parametrize("change", [{"classes": 9}, {"channels": 3}, {"image_size": 24}])
def test_a_network_that_does_not_fit_its_data_is_refused(change):
    data = Data(name="digits", train=10)
    sources.find(data).check(data, NETWORK)
    with pytest.raises(ValueError, match=f"the network has {next(iter(change))}"):
        sources.find(data).check(data, NETWORK.model_copy(update=change))
