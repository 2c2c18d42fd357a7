"""The interface that every data set implements."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from atdiag.core.errors import UserError
from atdiag.core.spec import Data, Network
from atdiag.data import catalogue, listing, manifest, sources
from atdiag.data.embedded import DIGITS, EmbeddedSet
from atdiag.data.splits import Images


def network(data_set, data, **change):
    channels, size = data_set.shape(data)
    values = {"image_size": size, "patch_size": 4, "channels": channels, "width": 16, "depth": 1, "heads": 2}
    return Network(**{**values, "classes": data_set.classes, **change})


@pytest.fixture(params=["digits", "larger", "folder"])
def spec(request):
    """Make a completed spec of each kind of data set."""
    if request.param == "folder":
        root = request.getfixturevalue("uniform")
        return sources.complete(Data(name=f"folder:{root}", train=1, image_size=32))
    return sources.complete(Data(name=request.param, train=36, test_per_source=2))


def test_splits_agree_with_the_data_sets_description(spec):
    data_set = sources.find(spec)
    assert data_set.name == spec.name
    data_set.check(spec, network(data_set, spec))
    for split in (data_set.train_split(spec, 0), data_set.test_split(spec)):
        assert (split.channels, split.size) == data_set.shape(spec)
        assert set(split.labels) == set(range(data_set.classes))
        assert split.batch(0, 2).shape == (2, split.channels, split.size, split.size)
        assert len(split.labels) == len(split.clusters) == len(split)
    assert len(data_set.train_split(spec, 0)) == spec.train
    test = data_set.test_split(spec)
    if spec.image_size is None:  # for the user's own folder it is a guess
        assert 0.4 * data_set.test_images(spec) < len(test) <= data_set.test_images(spec)
    assert (len(np.unique(test.clusters)) < len(test)) == bool(data_set.cluster)


def test_a_network_for_other_data_is_refused(spec):
    data_set = sources.find(spec)
    for change in ({"classes": 77}, {"channels": 2}, {"image_size": 24}):
        with pytest.raises(ValueError, match=f"the network has {next(iter(change))}"):
            data_set.check(spec, network(data_set, spec, **change))


def test_files_are_read_and_hashed_if_there_are_any(spec):
    data_set = sources.find(spec)
    files, stored = data_set.files(), spec.name.startswith("folder:")
    assert (files is not None) == (data_set.folder() is not None) == stored
    assert manifest.recorded(spec.name) is None
    if files is not None:
        assert (len(files["train"]), len(files["test"])) == (36, 15)
        found = manifest.read(files, processes=1)
        assert manifest.recorded(spec.name) == found.sha256


def test_completing_twice_changes_nothing(spec):
    assert sources.complete(spec) == spec


def test_generated_images_have_any_number_and_stored_ones_any_size(spec):
    data_set, stored = sources.find(spec), spec.name.startswith("folder:")
    more, larger = data_set.with_train(spec, 1000), data_set.resized(spec, 64)
    assert (more.train, larger.image_size) == ((36, 64) if stored else (1000, None))
    assert data_set.shape(larger) == ((3, 64) if stored else (1, 20))


@pytest.mark.parametrize(
    ("name", "classes", "rows"),
    [
        ("digits", 10, tuple(range(10))),
        ("digits", 9, None),
        ("larger", 9, tuple(range(9))),
        ("imagenet", 1000, tuple(range(1000))),
        ("imagenette", 1000, (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)),
        ("imagenette", 10, None),  # any ten classes
        ("cifar10", 10, None),
        ("cifar10", 1000, None),
    ],
)
def test_heads_that_have_the_classes(name, classes, rows):
    assert sources.find(name).head_rows(classes) == rows


def test_a_name_means_the_profiles_data_where_they_fit():
    mini, small = Data(name="digits", train=9, clutter=2), Data(name="imagenette", train=1, image_size=128)
    assert sources.find("larger").usual(mini) == mini.model_copy(update={"name": "larger"})
    assert sources.find("larger").usual(small) == Data(name="larger", train=2500, clutter=6)
    assert sources.find("cifar10").usual(mini).image_size == 32
    assert sources.find("cifar10").usual(small).image_size == 128
    assert sources.find("folder:x").usual(mini).image_size is None


# --- the user's own ---------------------------------------------------------------------------------------------------


def ones(n, size=8, dtype=np.uint8):
    return Images(np.ones((n, 1, size, size), dtype), np.zeros(n, np.int64), np.arange(n))


def plain(name="plain", **change):
    values = {"title": "one class", "classes": 1, "image_size": 8, "sources": 3}
    made = {"make_train": lambda data, seed: ones(data.train), "make_test": lambda data: ones(3)}
    return EmbeddedSet(name=name, **{**values, **made, **change})


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(sources, "REGISTERED", dict(sources.REGISTERED))
    sources.register(plain())
    return sources.find("plain")


def test_a_registered_data_set_is_found_suggested_and_listed(registered):
    with pytest.raises(UserError, match=r"did you mean 'plain'\? known: digits, larger, plain, imagenet"):
        sources.find("plan")
    names = [row["name"] for row in listing.rows()]
    assert names[:3] == ["digits", "larger", "plain"]
    assert set(catalogue.FACTS) < set(names)
    assert registered.row().keys() == sources.find("digits").row().keys() == sources.find("imagenet").row().keys()


@pytest.mark.parametrize("name", ["digits", "imagenet", "plain", "folder:x", "", "a b", "a,b"])
def test_taken_or_untypable_names_are_refused(registered, name):
    with pytest.raises(ValueError, match=r"can't be a data set's name|there is already a data set"):
        sources.register(plain(name))


def test_ignored_settings_do_not_change_the_runs_id(registered):
    data = [sources.complete(Data(name="plain", train=5, clutter=clutter)) for clutter in (3, 9)]
    assert data[0] == data[1]
    assert sources.complete(Data(name="plain", train=5, test_per_source=2)) != data[0]
    assert registered.head_rows(1) is None, "no teacher was trained on it"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda data, seed: ones(data.train - 1), "made 4 training images, not 5"),
        (lambda data, seed: ones(data.train, size=9), "made pixels of uint8 .*9, 9.*, not uint8 .*8, 8"),
        (lambda data, seed: ones(data.train, dtype=np.float32), "made pixels of float32"),
        (lambda data, seed: Images(ones(5).pixels, np.full(5, 1), np.arange(5)), "labels other than 0 to 0"),
        (lambda data, seed: Images(ones(5).pixels, np.zeros(5, np.int64), np.arange(4)), "made clusters of int64 .4"),
    ],
)
def test_images_that_differ_from_the_declaration_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        plain(make_train=make).train_split(Data(name="plain", train=5), 0)


def test_other_packages_add_data_sets_by_entry_points(monkeypatch):
    def entry(name, load):
        return SimpleNamespace(name=name, value=f"their.module:{name}", load=load)

    def broken():
        raise ImportError("no such module")

    entries = [entry("theirs", lambda: plain("theirs")), entry("broken", broken), entry("digits", lambda: DIGITS)]
    monkeypatch.setattr(sources, "REGISTERED", dict(sources.REGISTERED))
    monkeypatch.setattr(sources, "entry_points", lambda group: entries if group == "atdiag.data_sets" else [])
    sources._installed.cache_clear()
    try:
        with pytest.warns(UserWarning, match="'(broken|digits)' of their.module:(broken|digits) is left out") as said:
            assert sources.find("theirs").title == "one class"
        assert len(said) == 2
        assert sources.find("digits") is DIGITS
    finally:
        sources._installed.cache_clear()


def test_look_up_imports_no_numpy():
    code = (
        "import sys; from atdiag.data import sources; sources.find('digits'); sources.find('imagenet').head_rows(1000);"
        "print('numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
