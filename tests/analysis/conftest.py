"""Small subjects to analyse, and images for them."""

import numpy as np
import pytest
import torch

from atdiag.analysis import images, subjects
from atdiag.core.spec import Network
from atdiag.networks.model import students

PLAIN = Network(image_size=20, patch_size=4, channels=1, width=24, depth=3, heads=3, classes=10)


@pytest.fixture(scope="session")
def subject():
    """Make a subject with drawn weights; fields of its network by name."""

    def make(seed=0, label=None, spread=0.3, **fields):
        network = Network.model_validate({**PLAIN.model_dump(), **fields})
        vit, generator = students.build(network, seed), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
        return subjects.of(vit.eval().requires_grad_(False), label or f"net {seed}")

    return make


@pytest.fixture(scope="session")
def pictures():
    """Make random images for a subject, with labels."""

    def make(subject, count=4, seed=0):
        network, draw = subject.network, np.random.default_rng(seed)
        shape = (count, network.channels, network.image_size, network.image_size)
        pixels = draw.integers(0, 256, shape, dtype=np.uint8)
        return images.from_arrays(pixels, draw.integers(0, network.classes, count))

    return make


@pytest.fixture(scope="module")
def pair():
    """A teacher with registers and a student without, of depth 3."""
    plain = Network(image_size=20, patch_size=4, channels=1, width=24, depth=3, heads=3, classes=10)
    native = plain.model_copy(update={"components": ("registers", "rel_pos_bias"), "registers": 2})
    return students.build(plain, 0).eval(), students.build(native, 1).eval()
