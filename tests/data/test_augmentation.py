"""Augmentation against torchvision and timm, and its ranges."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import v2

from atdiag.core import randomness
from atdiag.core.spec import Recipe
from atdiag.data import augmentation
from atdiag.data.augmentation import ATTEMPTS, Augment, crop_box, erase_box
from atdiag.data.decoding import View, to_array, to_picture
from atdiag.data.splits import Images

SIDES = st.integers(1, 300)
SEEDS = st.integers(0, 2**32 - 1)
BICUBIC = v2.InterpolationMode.BICUBIC


def draws(seed, count=1):
    return np.random.default_rng(seed).random((count, ATTEMPTS, 4))


def picture(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- the view of a test -----------------------------------------------------------------------------------------------


@given(
    height=st.integers(8, 90), width=st.integers(8, 90), size=st.integers(4, 40), share=st.sampled_from([1.0, 0.875])
)
def test_the_test_view_is_torchvisions(height, width, size, share):
    image = picture(height, width)
    whole = v2.Compose([v2.Resize(int(size / share), BICUBIC), v2.CenterCrop(size)])
    seen = View(size, share)(image)
    assert seen.size == (size, size)
    expected = image if height == width == size else whole(image)
    assert np.array_equal(np.asarray(seen), np.asarray(expected))


def test_an_image_of_the_right_size_is_taken_as_it_is():
    image = picture(32, 32)
    assert View(32, 0.875)(image) is image


# --- crops ------------------------------------------------------------------------------------------------------------


@given(height=SIDES, width=SIDES, least=st.floats(0.01, 1), seed=SEEDS)
def test_crops_lie_in_the_image_and_have_the_requested_area_and_ratio(height, width, least, seed):
    top, left, h, w = crop_box(height, width, least, draws(seed)[0])
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert h > 0
    assert w > 0
    # Each side is rounded by at most half a pixel.
    assert (w - 0.5) / (h + 0.5) <= 4 / 3
    assert (w + 0.5) / (h - 0.5) >= 3 / 4
    if 0.5 <= width / height <= 2:  # else an attempt may not fit, and the middle is taken
        assert (h + 0.5) * (w + 0.5) >= min(least, 0.5) * height * width * 0.99


@pytest.mark.parametrize(("height", "width"), [(100, 100), (90, 120), (60, 200), (300, 40)])
def test_crops_are_torchvisions(height, width):
    """The same box from the same numbers, torchvision's draws replaced by ours."""
    for seed in range(60):
        numbers = draws(seed)[0]
        area, ratio, down, right = (iter(numbers[:, i]) for i in range(4))
        with pytest.MonkeyPatch.context() as patch:
            tries = [0]

            def empty_uniform(low, high, tries=tries, area=area, ratio=ratio):
                tries[0] += 1
                return torch.tensor([low + (high - low) * next(ratio if tries[0] % 2 == 0 else area)])

            def randint(low, high, size, tries=tries, down=down, right=right, state=[0], numbers=numbers):  # noqa: B006
                state[0] += 1
                row = numbers[tries[0] // 2 - 1]
                return torch.tensor([int(row[2 if state[0] == 1 else 3] * (high - low))])

            patch.setattr(torch, "empty", lambda _: SimpleNamespace(uniform_=empty_uniform))
            patch.setattr(torch, "randint", randint)
            there = v2.RandomResizedCrop(32, scale=(0.08, 1)).make_params([picture(height, width)])
        assert crop_box(height, width, 0.08, numbers) == (there["top"], there["left"], there["height"], there["width"])


def test_a_crop_is_cut_and_resized_as_torchvision_does():
    image = to_array(picture(40, 40))
    images = Images(image[None], np.zeros(1, np.int64), np.zeros(1, np.int64))
    make = Augment(Recipe(epochs=1, crop=0.2), 3, 40, real=True)
    out = make(images, 2, np.array([0]))[0]
    numbers = randomness.uniform(3, "crop", 2, np.array([[0]]), np.arange(4 * ATTEMPTS)).reshape(ATTEMPTS, 4)
    expected = v2.functional.resized_crop(to_picture(image), *crop_box(40, 40, 0.2, numbers), [40, 40], BICUBIC)
    assert np.array_equal(out, to_array(expected))


# --- mirroring --------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, epoch=st.integers(0, 1000))
def test_an_image_is_flipped_or_unchanged(seed, epoch):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3, 6, 6), dtype=np.uint8)
    images = Images(pixels, np.zeros(12, np.int64), np.arange(12))
    out = Augment(Recipe(epochs=1, flip=True), seed, 6, real=True)(images, epoch, np.arange(12))
    for before, after in zip(pixels, out, strict=True):
        assert np.array_equal(after, before) or np.array_equal(after, before[..., ::-1])


def test_half_of_the_images_are_flipped_independently():
    pixels = np.zeros((4000, 1, 2, 2), np.uint8)
    pixels[..., 0] = 255
    images = Images(pixels, np.zeros(4000, np.int64), np.arange(4000))
    mirrored = Augment(Recipe(epochs=1, flip=True), 0, 2, real=True)(images, 0, np.arange(4000))[:, 0, 0, 1] == 255
    assert mirrored.mean() == pytest.approx(0.5, abs=0.03)
    assert np.corrcoef(mirrored[:-1], mirrored[1:])[0, 1] == pytest.approx(0, abs=0.05)


# --- erasing ----------------------------------------------------------------------------------------------------------


@given(height=st.integers(2, 300), width=st.integers(2, 300), seed=SEEDS)
def test_erased_rectangles_lie_in_the_image(height, width, seed):
    box = erase_box(height, width, draws(seed)[0])
    if box is not None:
        top, left, h, w = box
        assert 0 < h < height
        assert 0 < w < width
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w
        assert (h - 0.5) * (w - 0.5) <= height * width / 3


def test_erased_rectangles_are_distributed_as_timms():
    ours = [(box[2], box[3], box[0]) for d in draws(0, 3000) if (box := erase_box(64, 64, d))]
    erase = RandomErasing(probability=1, mode="const", device="cpu")
    theirs = []
    with randomness.isolated(0, "timm"):
        for _ in range(3000):
            gone = erase(torch.ones(1, 64, 64))[0] == 0
            rows, columns = gone.any(1).nonzero(), gone.any(0).nonzero()
            if len(rows):
                theirs.append((len(rows), len(columns), int(rows[0])))
    for one, two in zip(np.array(ours).T, np.array(theirs).T, strict=True):
        assert stats.ks_2samp(one, two).pvalue > 0.001


def test_erasing_fills_a_rectangle_of_some_images_with_noise():
    pixels = np.full((400, 3, 24, 24), 7, np.uint8)
    images = Images(pixels, np.zeros(400, np.int64), np.arange(400))
    out = Augment(Recipe(epochs=1, erase=0.25), 0, 24, real=True)(images, 0, np.arange(400))
    assert (pixels == 7).all()
    touched = (out != 7).any(axis=(1, 2, 3))
    assert touched.mean() == pytest.approx(0.25, abs=0.07)
    values = []
    for image in out[touched]:
        gone = (image != 7).any(axis=0)
        rows, columns = np.flatnonzero(gone.any(1)), np.flatnonzero(gone.any(0))
        inside = image[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (image != 7).sum() == (inside != 7).sum()
        assert (inside != 7).mean() > 0.9
        values.append(inside.ravel())
    assert np.concatenate(values).mean() == pytest.approx(127.5, abs=2)


# --- all of it --------------------------------------------------------------------------------------------------------


@given(
    st.builds(
        Recipe,
        epochs=st.just(1),
        crop=st.none() | st.floats(0.05, 1),
        flip=st.booleans(),
        erase=st.sampled_from([0.0, 0.5, 1.0]),
        rand_augment=st.sampled_from([None, "rand-m9-mstd0.5-inc1", "rand-m10-n1-inc1"]),
    ),
    st.sampled_from([1, 3]),
    st.permutations(range(6)),
    st.integers(1, 6),
)
def test_augmentation_does_not_depend_on_the_rest_of_the_batch(recipe, channels, order, count):
    pixels = np.random.default_rng(0).integers(0, 256, (6, channels, 12, 12), dtype=np.uint8)
    images = Images(pixels, np.zeros(6, np.int64), np.arange(6))
    make = Augment(recipe, 1, 12, real=channels == 3)
    whole = make(images, 4, np.arange(6))
    some = np.array(order[:count])
    assert np.array_equal(make(images, 4, some), whole[some])
    assert whole.shape == pixels.shape
    assert whole.dtype == np.uint8


def test_ratios_are_torchvisions_defaults():
    transform = v2.RandomResizedCrop(8)
    assert tuple(transform.ratio) == pytest.approx(augmentation.CROP_RATIO)
    erase = RandomErasing()
    assert (erase.min_area, erase.max_area) == augmentation.ERASE_AREA
    assert tuple(math.log(r) for r in augmentation.ERASE_RATIO) == pytest.approx(erase.log_aspect_ratio)
