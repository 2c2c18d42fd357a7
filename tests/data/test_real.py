"""A few real images of CIFAR-10 and Imagenette-128, by name."""

import numpy as np
import pytest
import torch
from PIL import Image

from atdiag.data import datasets, facts, manifest, names
from atdiag.data.loader import Stream
from atdiag.spec import Data, Network, Recipe


def network(size):
    return Network(image_size=size, patch_size=size // 4, channels=3, width=16, depth=1, heads=2, classes=10)


@pytest.mark.parametrize("size", [64, 128, 224])
def test_imagenette(imagenette, size):
    data = names.complete(Data(name="imagenette", train=1, image_size=size))
    assert data.fingerprint is not None
    datasets.check(data, network(size))
    stream = Stream(data, Recipe(epochs=1, batch_size=20, crop=0.3, flip=True), 0)
    assert stream.images.decoded is not None  # all are 128 x 128
    batch = stream.batch(1)
    assert batch.images.shape == (20, 3, size, size)
    wnids = facts.FACTS["imagenette"].class_folders.split("|")
    for label, sample in zip(batch.labels, batch.samples, strict=True):
        assert stream.images.path(sample).parent.name == wnids[label]
    view = datasets.test_split(data).batch(0, 30)
    stored = np.asarray(Image.open(datasets.test_split(data).path(7)).convert("RGB"))
    if size == 128:
        assert np.array_equal(view[7], np.moveaxis(stored, -1, 0))
    assert view.mean() == pytest.approx(stored.mean(), rel=0.6)


def test_cifar10(cifar10):
    data = names.complete(Data(name="cifar10", train=1))
    datasets.check(data, network(32))
    assert (data.train, data.image_size) == (60, 32)
    images = datasets.train_split(data, 0)
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
    reading = manifest.read(datasets.check_files("cifar10"), processes=2)
    assert (reading.broken, reading.mean_size, reading.classes) == ((), (32, 32), 10)
    assert manifest.recorded("cifar10") == reading.sha256
