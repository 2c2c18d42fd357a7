"""Planted teachers: the maps they show, and the protocol's ability to tell helpful from useless ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from atdiag.core.runs import Store
from atdiag.networks.weights import loading
from atdiag.study.builder import Lab
from atdiag.study.settings import resolve
from atdiag.transfer import ops
from atdiag.transfer.observation import CaptureRequest
from benchmarks.planted_teachers import as_planted, plant, study, uniform


def lab(*sets: str) -> Lab:
    return Lab(resolve("mini", 3, sets, environment={}, folder=Path("/nonexistent")))


@pytest.fixture(scope="module")
def planted():
    return plant(lab().teacher("deit_s"), clutter=3)


def maps(network, images):
    with torch.no_grad():
        seen = network.observe(images, CaptureRequest(maps=frozenset(range(12)))).seen
    return torch.stack([ops.logits(seen[layer].qk).softmax(-1) for layer in range(12)])


def images(count: int) -> torch.Tensor:
    noise = torch.randint(0, 256, (count, 1, 20, 20), generator=torch.Generator().manual_seed(0))
    return noise.float() / 255


def test_uniform_maps_are_uniform(planted):
    found = maps(planted["uniform"][1], images(4))
    torch.testing.assert_close(found, torch.full_like(found, 1 / 26))
    with pytest.raises(ValueError, match="relative position bias"):
        uniform(loading.load(lab().teacher("beitv2_b")))


def test_shuffled_maps_are_those_of_another_image(planted):
    own, shuffled, x = planted["own"][1], planted["shuffled"][1], images(6)
    others = shuffled.others(x)
    assert all(not torch.equal(one, other) for one, other in zip(x, others, strict=True))
    assert len({one.numpy().tobytes() for one in others}) > 1
    torch.testing.assert_close(maps(shuffled, x), maps(own, others))
    assert (maps(shuffled, x) - maps(own, x)).abs().amax() > 0.1


def test_the_other_image_does_not_depend_on_the_batch(planted):
    shuffled, x = planted["shuffled"][1], images(6)
    order = [3, 0, 5]
    assert torch.equal(shuffled.others(x)[order], shuffled.others(x[order]))
    assert torch.equal(shuffled.others(x), shuffled.others(x + 1e-4))  # pixels are multiples of 1/255


def test_planted_teachers_have_their_own_ids(planted):
    assert len({teacher.sha256 for teacher, _ in planted.values()}) == 3
    assert planted["own"][0] == lab().teacher("deit_s")


@pytest.mark.slow
def test_own_maps_help_and_planted_ones_do_not(tmp_path):
    """Copy with three seeds and a shorter recipe; for the default one see benchmarks/results/planted_teachers.json."""
    here = lab("recipe.epochs=2", "data.train=1600", "data.clutter=3")
    found = study(here, here.teacher("deit_s"), Store(tmp_path), methods=("copy",))
    assert as_planted(found, "copy")
    assert found["copy own"].value > 5
