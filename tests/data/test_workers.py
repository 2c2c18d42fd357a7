"""Batches of real images from any number of worker processes, and dead workers and broken images."""

import multiprocessing
import os
import pickle
import signal
import time

import numpy as np
import pytest
import torch

from atdiag.core.spec import Data, Recipe
from atdiag.data import loader, sources
from atdiag.data.decoding import BrokenImageError
from atdiag.data.loader import Stream

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EVERYTHING = Recipe(
    epochs=2,
    batch_size=8,
    crop=0.2,
    flip=True,
    erase=0.5,
    rand_augment="rand-m9-mstd0.5-inc1",
    mixup=0.8,
    cutmix=1.0,
)


def same(one, two):
    return (
        torch.equal(one.images, two.images)
        and torch.equal(one.labels, two.labels)
        and np.array_equal(one.samples, two.samples)
        and (one.lam, one.box) == (two.lam, two.box)
        and torch.equal(one.partner_labels, two.partner_labels)
    )


def children():
    return {child.pid for child in multiprocessing.active_children()}


@pytest.fixture(params=["uniform", "mixed"])
def data(request, spec):
    return spec(request.getfixturevalue(request.param), image_size=24)


def test_batches_do_not_depend_on_the_number_of_workers(data):
    stream = Stream(data, EVERYTHING, 3)
    expected = [Stream(data, EVERYTHING, 3).batch(step) for step in range(2, 9)]  # beyond the end of an epoch
    before = children()
    for workers in (0, 1, 2):
        state = torch.get_rng_state()
        got = list(stream.batches(2, 9, workers))
        assert torch.equal(torch.get_rng_state(), state)
        assert len(got) == 7
        assert all(map(same, got, expected))
    assert children() == before
    assert list(stream.batches(4, 4, 2)) == []


def test_a_stream_can_be_sent_to_another_process(data):
    stream = Stream(data, EVERYTHING, 3)
    stream.batch(0)
    assert same(pickle.loads(pickle.dumps(stream)).batch(5), stream.batch(5))


def test_scenes_do_not_depend_on_workers_either():
    recipe = EVERYTHING.model_copy(update={"batch_size": 16})
    stream = Stream(Data(train=40), recipe, 0)
    assert all(map(same, stream.batches(0, 5, 2), stream.batches(0, 5)))


def test_abandoning_an_iterator_ends_its_workers(data):
    before = children()
    batches = Stream(data, EVERYTHING, 0).batches(0, 100, 2)
    next(batches)
    assert len(children() - before) == 2
    batches.close()
    for _ in range(100):
        if children() == before:
            break
        time.sleep(0.1)
    assert children() == before


def test_test_images_are_the_same_from_workers(data):
    images = sources.find(data).test_split(data)
    whole = images.batch(0, len(images))
    for workers in (0, 2):
        parts = list(loader.test_batches(images, 4, workers))
        assert [len(part) for part in parts] == [4, 4, 4, 3]
        assert np.array_equal(torch.cat(parts), whole)


def test_labels_are_those_of_the_folders(data):
    stream = Stream(data, EVERYTHING, 0)
    batch = stream.batch(0)
    for label, sample in zip(batch.labels, batch.samples, strict=True):
        assert stream.images.path(sample).parent.name == ("ant", "bee", "cow")[label]
    assert np.array_equal(stream.images.clusters, np.arange(36))


# --- what breaks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["truncated", "empty", "no image", "gone"])
def test_a_broken_image_in_the_middle_of_an_epoch_is_named(mixed, spec, workers, how):
    data = spec(mixed, image_size=24)
    stream = Stream(data, EVERYTHING, 0)
    step, row = 2, 3
    image = stream.images.path(stream.batch(step).samples[row])
    if how == "gone":
        image.unlink()
    else:
        content = image.read_bytes()
        image.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "no image": b"text" * 99}[how])
    batches = stream.batches(0, 8, workers)
    for _ in range(step):
        next(batches)
    with pytest.raises(BrokenImageError) as fault:
        next(batches)
    assert fault.value.path == image
    assert str(image) in str(fault.value)
    assert len(str(fault.value).splitlines()) == 1
    with pytest.raises(BrokenImageError, match=image.name):
        stream.batch(step)


def test_a_broken_image_is_named_while_the_cache_is_made(uniform, spec):
    data = spec(uniform)
    image = uniform / "train" / "bee" / "bee_7.jpg"
    image.write_bytes(image.read_bytes()[:-40])
    with pytest.raises(BrokenImageError, match=r"bee_7\.jpg can't be read: .*truncated"):
        sources.find(data).train_split(data, 0)


class Slow(Stream):
    """A stream of slow batches, so that workers are busy when they are killed."""

    def batch(self, step):
        time.sleep(0.05)
        return super().batch(step)


def test_a_dead_worker_is_an_error_and_does_not_hang(data):
    before = children()
    batches = Slow(data, EVERYTHING, 0).batches(0, 10_000, 2)
    next(batches)
    os.kill(min(children() - before), signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        for _ in batches:
            assert time.monotonic() - begin < 30
    assert time.monotonic() - begin < 30
    batches.close()


def test_a_dead_worker_is_reported_in_one_line():
    def dies():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore")
        yield

    with pytest.raises(loader.WorkerDiedError, match=r"a process that loads images died.*\(pid 7\)") as fault:
        loader._next(dies())
    assert "\n" not in str(fault.value)


def test_pinning_without_cuda_is_refused(data):
    if torch.cuda.is_available():
        pytest.skip("CUDA is here")
    with pytest.raises(ValueError, match="page-locked memory needs CUDA"):
        next(Stream(data, EVERYTHING, 0).batches(0, 2, pin=True))


# --- how many workers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "processes", "device", "expected"),
    [(1, 1, CUDA, 1), (8, 1, CUDA, 8), (64, 1, CUDA, 16), (64, 8, CUDA, 8), (2, 1, CPU, 0), (16, 1, CPU, 4)],
)
def test_the_default_number_of_workers(uniform, spec, monkeypatch, cores, processes, device, expected):
    monkeypatch.setattr(loader.resources, "available_cores", lambda: cores)
    data = spec(uniform)
    images = sources.find(data).train_split(data, 0)
    assert loader.default_workers(images, EVERYTHING, device, processes) == expected


def test_unaugmented_scenes_need_no_worker(monkeypatch):
    monkeypatch.setattr(loader.resources, "available_cores", lambda: 64)
    scenes = sources.find("digits").train_split(Data(train=5), 0)
    assert loader.default_workers(scenes, Recipe(epochs=1, mixup=0.8), CUDA) == 0
    assert loader.default_workers(scenes, None, CUDA) == 0  # test images, say
    assert loader.default_workers(scenes, EVERYTHING, CUDA) == 16


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batches_on_cuda_are_those_of_the_cpu(data):
    stream = Stream(data, EVERYTHING, 0)
    for workers in (0, 2):
        for one, two in zip(stream.batches(0, 6, workers, pin=True), stream.batches(0, 6), strict=True):
            assert one.images.is_pinned()
            assert torch.allclose(one.to(CUDA).images.cpu(), two.to(CPU).images, atol=1e-6)
            assert torch.equal(one.to(CUDA).partner_labels.cpu(), two.partner_labels)


@pytest.mark.parametrize("step", range(6))
def test_batches_are_mixed_by_the_formula(data, step):
    batch = Stream(data, EVERYTHING, 0).batch(step)
    images = batch.images.double() / 255
    partner = images.flip(0)
    if batch.box is None:
        expected = batch.lam * images + (1 - batch.lam) * partner
    else:
        top, bottom, left, right = batch.box
        inside = torch.zeros(24, 24, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        expected = torch.where(inside, partner, images)
        assert batch.lam == pytest.approx(1 - inside.double().mean().item())
    assert torch.allclose(batch.to(CPU).images.double(), expected, atol=1e-6)
    assert batch.images.dtype == torch.uint8


@pytest.mark.parametrize("fault", [ConnectionResetError(104, "reset"), EOFError("end"), FileNotFoundError("socket")])
def test_a_worker_that_dies_while_it_hands_a_batch_over_is_named(fault):
    def ahead():
        yield 1
        raise fault

    batches = ahead()
    assert loader._next(batches) == 1
    with pytest.raises(loader.WorkerDiedError, match="the same command goes on from the last checkpoint"):
        loader._next(batches)
    assert loader._next(batches) is None
