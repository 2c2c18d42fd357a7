"""A few real images of CIFAR-10 and Imagenette-128, by name."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed
from atdiag.data import catalogue, manifest, sources
from atdiag.data.loader import Stream
from atdiag.training import cohort

CPU = torch.device("cpu")
ON_CPU = ExecutionOptions(device="cpu")


def network(size):
    return Network(image_size=size, patch_size=size // 4, channels=3, width=16, depth=1, heads=2, classes=10)


@pytest.mark.parametrize("size", [64, 128, 224])
def test_imagenette(imagenette, size):
    data = sources.complete(Data(name="imagenette", train=1, image_size=size))
    assert data.fingerprint is not None
    sources.find(data).check(data, network(size))
    stream = Stream(data, Recipe(epochs=1, batch_size=20, crop=0.3, flip=True), 0)
    assert stream.images.decoded is not None  # all are 128 x 128
    batch = stream.batch(1)
    assert batch.images.shape == (20, 3, size, size)
    wnids = catalogue.FACTS["imagenette"].class_folders.split("|")
    for label, sample in zip(batch.labels, batch.samples, strict=True):
        assert stream.images.path(sample).parent.name == wnids[label]
    view = sources.find(data).test_split(data).batch(0, 30)
    stored = np.asarray(Image.open(sources.find(data).test_split(data).path(7)).convert("RGB"))
    if size == 128:
        assert np.array_equal(view[7], np.moveaxis(stored, -1, 0))
    assert view.mean() == pytest.approx(stored.mean(), rel=0.6)


def test_cifar10(cifar10):
    data = sources.complete(Data(name="cifar10", train=1))
    sources.find(data).check(data, network(32))
    assert (data.train, data.image_size) == (60, 32)
    images = sources.find(data).train_split(data, 0)
    assert images.files.classes == (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    assert np.array_equal(np.bincount(images.labels), np.full(10, 6))
    stored = np.stack([np.asarray(Image.open(images.path(i)).convert("RGB")) for i in range(60)])
    assert np.array_equal(np.moveaxis(images.batch(0, 60), 1, -1), stored)
    batch = Stream(data, Recipe(epochs=1, batch_size=30), 0).batch(1).to(torch.device("cpu"))
    assert 0.2 < batch.images.mean() < 0.8
    assert batch.images.dtype == torch.float32


def test_a_check_of_real_images(cifar10, imagenette_files):
    reading = manifest.read(sources.find("cifar10").files(), processes=2)
    assert (reading.broken, reading.mean_size, reading.classes) == ((), (32, 32), 10)
    assert manifest.recorded("cifar10") == reading.sha256


@pytest.mark.parametrize("size", [32, 48])
def test_training_on_real_images_resumes_bit_for_bit(cifar10, tmp_path, size):
    own = {
        "crop": 0.3,
        "flip": True,
        "erase": 0.25,
        "rand_augment": "rand-m9-mstd0.5-inc1",
        "mixup": 0.8,
        "cutmix": 1.0,
    }
    data = sources.complete(Data(name="cifar10", train=1, image_size=size, per_class=5, test_per_class=2))
    recipe = Recipe(epochs=2, batch_size=10, drop_path=0.1, **own)
    spec = RunSpec(network=network(size), data=data, recipe=recipe, seed=Seed(data=0, model=0))
    weights = []
    for stops in (0, 7):  # 7 steps: in the middle of the second epoch
        store, asked = Store(tmp_path / str(stops)), itertools.count(1)
        if stops:
            status = cohort.train([spec], store, None, ON_CPU, should_stop=lambda asked=asked: next(asked) == 7)
            assert status == {spec.id: "interrupted"}
        assert cohort.train([spec], store, None, ON_CPU) == {spec.id: "finished"}
        assert store.run(spec).result()["test_images"] == 20
        weights.append(load_file(store.run(spec).weights))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
