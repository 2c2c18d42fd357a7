import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.mixup import Mixup, rand_bbox
from torch.nn import functional as F

from atdiag.core.spec import Data, Recipe
from atdiag.data.loader import Batch, Stream

CPU = torch.device("cpu")
DATA = Data(train=70)
RECIPE = Recipe(epochs=3, batch_size=16)
MIXED = RECIPE.model_copy(update={"mixup": 0.8, "cutmix": 1.0, "rand_augment": "rand-m9-mstd0.5-inc1"})


def same(one, two):
    return (
        torch.equal(one.images, two.images)
        and torch.equal(one.labels, two.labels)
        and np.array_equal(one.samples, two.samples)
        and one.lam == two.lam
        and one.box == two.box
        and (one.partner_labels is None) == (two.partner_labels is None)
        and (one.partner_labels is None or torch.equal(one.partner_labels, two.partner_labels))
    )


@pytest.fixture(scope="module")
def straight():
    stream = Stream(DATA, MIXED, seed=5)
    return [stream.batch(step) for step in range(8)]


@settings(max_examples=30)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_a_batch_is_a_pure_function_of_its_step(straight, steps, noise):
    stream = Stream(DATA, MIXED, seed=5)
    random.seed(noise), np.random.seed(noise), torch.manual_seed(noise)  # noqa: NPY002
    for step in steps:
        assert same(stream.batch(step), straight[step])


def test_seeds_and_steps_change_the_batch(straight):
    assert not same(straight[0], Stream(DATA, MIXED, seed=6).batch(0))
    assert not any(same(straight[i], straight[j]) for i in range(8) for j in range(i))


def test_an_epoch_visits_each_image_once_in_its_own_order():
    stream = Stream(Data(train=64), RECIPE, seed=0)
    assert stream.steps_per_epoch == 4
    epochs = [np.concatenate([stream.batch(4 * epoch + i).samples for i in range(4)]) for epoch in range(3)]
    for order in epochs:
        assert np.array_equal(np.sort(order), np.arange(64))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])


def test_a_partial_last_batch_is_dropped():
    stream = Stream(DATA, RECIPE, seed=0)
    assert stream.steps_per_epoch == 4
    assert len(np.unique(np.concatenate([stream.batch(i).samples for i in range(4)]))) == 64


def test_an_unaugmented_batch_holds_the_images_unchanged():
    stream = Stream(DATA, RECIPE, seed=0)
    batch = stream.batch(2)
    assert batch.partner_labels is None
    assert np.array_equal(batch.images, stream.images.pixels[batch.samples])
    assert np.array_equal(batch.labels, stream.images.labels[batch.samples])
    there = batch.to(CPU)
    assert torch.equal(there.images, torch.from_numpy(stream.images.pixels[batch.samples] / np.float32(255)))
    assert torch.equal(there.to(CPU).images, there.images)


def test_a_batch_larger_than_the_training_set_is_refused():
    with pytest.raises(ValueError, match="larger than the training set"):
        Stream(Data(train=8), RECIPE, seed=0)


# --- Mixup and CutMix -------------------------------------------------------------------------------------------------


def mixed(step, **recipe):
    """Make a plain batch, and the same one mixed."""
    plain = Stream(DATA, RECIPE, seed=0).batch(step).to(CPU)
    return plain, Stream(DATA, RECIPE.model_copy(update=recipe), seed=0).batch(step).to(CPU)


def by_timm(plain, batch, box=None, **alphas):
    """Apply timm's Mixup to the same images and labels, its draws replaced by ours."""
    mix = Mixup(**alphas, label_smoothing=0.1, num_classes=10)
    lam = batch.lam
    mix._params_per_batch = lambda: (lam, box is not None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("timm.data.mixup.rand_bbox", lambda *_, **__: box)
        return mix(plain.images.clone(), plain.labels)


@pytest.mark.parametrize("step", range(4))
def test_mixup_is_timms(step):
    plain, batch = mixed(step, mixup=0.8)
    images, target = by_timm(plain, batch, mixup_alpha=0.8)
    assert 0 <= batch.lam <= 1
    assert torch.allclose(batch.images, images, atol=1e-7)
    assert torch.allclose(soft(batch), target, atol=1e-6)


@pytest.mark.parametrize("step", range(4))
def test_cutmix_is_timms(step):
    plain, batch = mixed(step, cutmix=1.0)
    changed = (batch.images != plain.images).any(dim=1)
    # The box is not returned: find the one that fits among those of the right area.
    area = round((1 - batch.lam) * 400)
    fits = [
        box
        for top in range(21)
        for bottom in range(top, 21)
        for left in range(21)
        for right in range(left, 21)
        if (bottom - top) * (right - left) == area
        for box in [(top, bottom, left, right)]
        if torch.equal(paste(plain.images, box), batch.images)
    ]
    assert fits
    assert changed.sum() <= len(changed) * area
    images, target = by_timm(plain, batch, box=fits[0], cutmix_alpha=1.0)
    assert torch.equal(batch.images, images)
    assert torch.allclose(soft(batch), target, atol=1e-6)


def paste(images, box):
    top, bottom, left, right = box
    out = images.clone()
    out[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    return out


def soft(batch):
    """Return the target distribution of a mixed batch, with label smoothing 0.1."""
    one, two = (0.9 * F.one_hot(labels, 10) + 0.01 for labels in (batch.labels, batch.partner_labels))
    return batch.lam * one + (1 - batch.lam) * two


def test_the_partner_is_the_reversed_batch():
    _, batch = mixed(0, mixup=0.8)
    assert torch.equal(batch.partner_labels, batch.labels.flip(0))


def test_shares_and_boxes_are_distributed_as_timms():
    stream = Stream(DATA, RECIPE.model_copy(update={"mixup": 0.8, "cutmix": 1.0}), seed=0)
    images = torch.zeros(2, 1, 20, 20, dtype=torch.uint8)
    images[1] = 255
    labels = torch.tensor([0, 1])
    kinds, lams = [], {True: [], False: []}
    for step in range(2000):
        lam, box = stream._mix(step)
        out = Batch(images, labels, np.arange(2), labels.flip(0), lam, box).to(CPU).images
        is_box = bool(((out == 0) | (out == 1)).all())
        assert is_box == (box is not None)
        kinds.append(is_box)
        lams[is_box].append(lam)
        if is_box:
            assert out[0].mean().item() == pytest.approx(1 - lam, abs=1e-6)
        else:
            assert out[1].mean().item() == pytest.approx(lam, abs=1e-6)
    assert np.mean(kinds) == pytest.approx(0.5, abs=0.05)
    assert np.mean(lams[False]) == pytest.approx(0.5, abs=0.04)
    # A Beta(a, a) has variance 1 / (4 (2a + 1)).
    assert np.var(lams[False]) == pytest.approx(1 / (4 * 2.6), rel=0.1)
    draw = np.random.RandomState(0)
    expected = []
    for lam in draw.beta(1, 1, 4000):
        top, bottom, left, right = rand_bbox((20, 20), lam)
        expected.append(1 - (bottom - top) * (right - left) / 400)
    assert np.mean(lams[True]) == pytest.approx(np.mean(expected), abs=0.04)


# --- RandAugment ------------------------------------------------------------------------------------------------------

AUGMENTED = RECIPE.model_copy(update={"rand_augment": "rand-m9-n3-mstd0.5"})


def augmented(stream, epoch, sample):
    return stream._augment(stream.images, epoch, np.array([sample]))[0]


def test_rand_augment_depends_only_on_seed_epoch_and_sample():
    stream = Stream(DATA, AUGMENTED, seed=0)
    first = augmented(stream, 1, 3)
    random.seed(1), np.random.seed(1)  # noqa: NPY002
    augmented(stream, 7, 9)
    assert np.array_equal(augmented(stream, 1, 3), first)
    assert np.array_equal(augmented(Stream(DATA, AUGMENTED, seed=0), 1, 3), first)

    several = [augmented(Stream(DATA, AUGMENTED, seed=s), e, i) for s in (0, 1) for e in (0, 1) for i in (0, 1)]
    assert len({out.tobytes() for out in several}) >= 6


def test_rand_augment_changes_pixels_but_not_shape_or_dtype():
    plain, augmented = Stream(DATA, RECIPE, seed=0).batch(0), Stream(DATA, AUGMENTED, seed=0).batch(0)
    assert np.array_equal(plain.samples, augmented.samples)
    assert augmented.images.shape == plain.images.shape
    assert augmented.images.dtype == torch.uint8
    assert (plain.images != augmented.images).flatten(1).any(dim=1).float().mean() > 0.5


def test_an_image_is_augmented_alike_in_any_batch():
    small = Stream(DATA, AUGMENTED.model_copy(update={"batch_size": 8}), seed=0)
    large = Stream(DATA, AUGMENTED, seed=0)
    pair = torch.cat([small.batch(0).images, small.batch(1).images])
    assert torch.equal(pair, large.batch(0).images)


def test_the_highest_magnitude_is_no_error():
    # timm then keeps 0 bits per channel, which newer versions of Pillow refuse.
    stream = Stream(DATA, RECIPE.model_copy(update={"rand_augment": "rand-m10-n4-inc1"}), seed=0)
    assert all(stream.batch(step).images.dtype == torch.uint8 for step in range(4))
