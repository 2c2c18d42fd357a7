"""Teachers for tests: every miniature's architecture, with random weights and, where shipped, trained ones."""

import pytest
import torch

from atdiag.networks.model import students
from atdiag.networks.registry import teachers
from atdiag.networks.weights import loading

SOURCES = ("drawn", "shipped")


@pytest.fixture(scope="session")
def perturbed():
    """Build a network in which every parameter matters: biases, LayerScale, bias tables and tokens are not neutral."""

    def build(network, seed=0, spread=0.2):
        vit, generator = students.build(network, seed), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
        return vit.eval().requires_grad_(False)

    return build


@pytest.fixture(scope="session", params=[f"{name}-{source}" for name in teachers.miniatures() for source in SOURCES])
def teacher(request, perturbed):
    """Return a teacher by "name-source". Shared between tests: do not modify it."""
    name, source = request.param.split("-")
    if source == "drawn":
        return perturbed(teachers.miniature_network(name))
    if not loading.shipped_path(name).exists():
        pytest.skip(f"the miniature of {name} is not in the package")
    return loading.load(loading.shipped(name))


@pytest.fixture(scope="session")
def images():
    return torch.rand(4, 1, 20, 20, generator=torch.Generator().manual_seed(0))
