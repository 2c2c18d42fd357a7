"""The decoded cache: the same pixels as decoding, made once, whole or not at all."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from atdiag.core import paths
from atdiag.core.spec import Recipe
from atdiag.data import cache, decoding, image_folders, sources
from atdiag.data.loader import Stream


def train(root):
    return image_folders.read(f"folder:{root}", "train")


def plain(files):
    """All images decoded one by one, uint8 [n, H, W, 3]."""
    return np.stack([np.asarray(Image.open(files.root / file).convert("RGB")) for file in files.files])


def test_the_cache_holds_the_decoded_pixels(uniform):
    files = train(uniform)
    path = cache.decoded(files)
    assert path.is_relative_to(paths.cache())
    assert np.array_equal(np.load(path), plain(files))
    assert not list(path.parent.glob("*.part"))


@pytest.mark.parametrize("size", [32, 48])
def test_images_are_the_same_with_and_without_a_cache(uniform, spec, size):
    data = spec(uniform, image_size=size)
    images = sources.find(data).train_split(data, 0)
    without = decoding.ImageFolder(images.files, images.view)
    assert images.decoded is not None
    some = np.array([5, 0, 33])
    assert np.array_equal(images.take(some), without.take(some))
    assert images.take(some).shape == (3, 3, size, size)
    assert np.array_equal(images.batch(30, 99), without.batch(30, 99))
    assert len(images.batch(30, 99)) == 6
    recipe = Recipe(epochs=1, batch_size=8, crop=0.3, flip=True)
    cached, direct = Stream(data, recipe, 0), Stream(data, recipe, 0)
    direct.images = without
    assert np.array_equal(cached.batch(1).images, direct.batch(1).images)


def test_nothing_is_decoded_twice(uniform, spec, monkeypatch):
    data = spec(uniform)
    before = sources.find(data).train_split(data, 0).batch(0, 36)

    def refuse(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(cache, "load", refuse)
    monkeypatch.setattr(decoding, "decode", refuse)
    assert np.array_equal(sources.find(data).train_split(data, 0).batch(0, 36), before)


def test_a_changed_image_is_decoded_again(uniform, draw):
    files = train(uniform)
    old = cache.decoded(files)
    image = uniform / "train" / "ant" / "ant_0.jpg"
    length = image.stat().st_size
    draw(image, (32, 32), 999)
    image.write_bytes(image.read_bytes()[:length].ljust(length, b"\0"))  # even where its length is the same
    new = cache.decoded(train(uniform))
    assert new != old
    assert not np.array_equal(np.load(new)[0], np.load(old)[0])


def test_pixels_decoded_by_older_rules_are_never_used(uniform, monkeypatch):
    wide = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    for image in uniform.glob("*/*/*"):
        Image.fromarray(wide).save(image.with_suffix(".png"))
        image.unlink()
    files = train(uniform)
    old = paths.cache() / "decoded" / f"{files.fingerprint(with_times=True)[:32]}.npy"  # the first version's name
    old.parent.mkdir(parents=True)
    np.save(old, np.full((36, 32, 32, 3), 255, np.uint8))
    expected = np.rint(wide / 257)
    path = cache.decoded(files)
    assert (np.load(path) == expected[..., None]).all()
    monkeypatch.setattr(cache, "RULE", cache.RULE + 1)
    assert cache.decoded(files) != path


def test_images_of_several_sizes_are_not_cached(mixed, uniform, draw, spec):
    assert cache.decoded(train(mixed)) is None
    data = spec(mixed)
    assert sources.find(data).train_split(data, 0).batch(0, 4).shape == (4, 3, 32, 32)
    # One image of another size is found while the cache is made, and remembered.
    for i in range(200):
        draw(uniform / "train" / "ant" / f"x{i:03}.jpg", (8, 8) if i != 101 else (8, 9), i)
    for path in uniform.glob("train/*/*_*.jpg"):
        path.unlink()
    draw(uniform / "train" / "bee" / "b.jpg", (8, 8), 0)
    draw(uniform / "train" / "cow" / "c.jpg", (8, 8), 0)
    files = train(uniform)
    assert cache._one_size(files) == (8, 8)
    assert cache.decoded(files) is None
    assert not list(paths.cache().rglob("*.npy")) + list(paths.cache().rglob("*.part"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "_write", lambda *_: pytest.fail("tried again"))
        assert cache.decoded(files) is None


def test_data_above_the_size_limit_is_not_cached(uniform, monkeypatch):
    monkeypatch.setattr(cache, "MOST", 36 * 32 * 32 * 3 - 1)
    assert cache.decoded(train(uniform)) is None
    monkeypatch.setattr(cache, "MOST", 36 * 32 * 32 * 3)
    assert cache.decoded(train(uniform)) is not None


@pytest.mark.parametrize("ruin", ["cut", "empty", "foreign", "other shape", "pickle"])
def test_a_damaged_cache_is_rebuilt(uniform, ruin):
    files = train(uniform)
    path = cache.decoded(files)
    good = path.read_bytes()
    if ruin == "cut":
        path.write_bytes(good[: len(good) // 2])
    elif ruin == "empty":
        path.write_bytes(b"")
    elif ruin == "foreign":
        path.write_bytes(b"nonsense" * 100)
    elif ruin == "other shape":
        np.save(path, np.zeros((3, 4), np.uint8))
    else:
        np.save(path, np.array([print], object), allow_pickle=True)
    assert cache.decoded(files) == path
    assert path.read_bytes() == good


def test_a_half_written_cache_is_never_used(uniform):
    files = train(uniform)

    class KilledError(Exception):
        pass

    def dies(*arguments):
        yield from list(whole(*arguments))[:20]
        raise KilledError

    whole = cache._all_pixels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "_all_pixels", dies)
        patch.setattr("pathlib.Path.unlink", lambda *_, **__: None)  # a killed process cleans up nothing
        with pytest.raises(KilledError):
            cache.decoded(files)
    (half,) = paths.cache().rglob("*.part")
    assert half.stat().st_size > 0
    assert np.array_equal(np.load(cache.decoded(files)), plain(files))
    assert not half.exists()


def test_concurrent_processes_make_one_cache(uniform, monkeypatch):
    files = train(uniform)
    written, write, together = [], cache._write, threading.Barrier(4)

    def counted(*arguments):
        written.append(1)
        return write(*arguments)

    def one(_):
        together.wait()
        return cache.decoded(files)

    monkeypatch.setattr(cache, "_write", counted)
    with ThreadPoolExecutor(4) as pool:
        (path,) = set(pool.map(one, range(4)))
    assert len(written) == 1
    assert np.array_equal(np.load(path), plain(files))


def test_an_unwritable_cache_folder_is_reported_and_training_goes_on(uniform, spec, monkeypatch, tmp_path):
    data = spec(uniform)
    expected = sources.find(data).train_split(data, 0).batch(0, 5)
    (tmp_path / "file").touch()
    monkeypatch.setenv("ATDIAG_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="no decoded cache in"):
        images = sources.find(data).train_split(data, 0)
    assert images.decoded is None
    assert np.array_equal(images.batch(0, 5), expected)


def test_a_full_disk_is_detected_before_anything_is_written(uniform, monkeypatch):
    usage = cache.shutil.disk_usage("/")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.warns(UserWarning, match="GiB needed"):
        assert cache.decoded(train(uniform)) is None


def test_other_processes_open_the_file_themselves(uniform, spec):
    data = spec(uniform)
    images = sources.find(data).train_split(data, 0)
    images.batch(0, 1)
    sent = pickle.dumps(images)
    assert len(sent) < 20_000  # not the pixels
    assert np.array_equal(pickle.loads(sent).batch(0, 9), images.batch(0, 9))
