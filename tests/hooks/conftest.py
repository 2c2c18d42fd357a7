"""Hooked networks, made once."""

import functools

import pytest
import torch

from atdiag import hooked
from tests.analysis.conftest import pair, pictures, subject  # noqa: F401
from tests.analysis.timm_networks import build
from tests.hooks.witness import ARCHITECTURES


@functools.cache
def teacher(name):
    return hooked(name)


@pytest.fixture
def mini():
    """Give a hooked miniature, without hooks."""

    def give(name="deit_s"):
        model = teacher(name)
        model.reset_hooks(including_permanent=True)
        model.set_use_attn_result(False)
        return model

    return give


@pytest.fixture(scope="session")
def network():
    """Make a hooked timm architecture with drawn weights, and images for it."""

    def make(name, count=2, **arguments):
        model = build(name.partition(".")[0], **ARCHITECTURES.get(name, {}), **arguments)
        model.requires_grad_(False)
        return hooked(model, label=name), images_of(hooked(model, label=name), count)

    return make


def images_of(model, count=2, seed=0):
    config = model.cfg
    shape = (count, config.n_channels, config.image_size, config.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def images():
    """Make images for a hooked model."""
    return images_of
