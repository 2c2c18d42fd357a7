"""Corruptions against explicit formulas; all grow with severity and do not depend on the rest of the batch."""

import colorsys
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats

from atdiag.core.randomness import uniform
from atdiag.core.spec import Data
from atdiag.data import corruptions, scenes, sources
from atdiag.data.catalogue import CORRUPTIONS, SEVERITIES
from atdiag.data.corruptions import Corrupted, corrupt
from atdiag.data.sources import complete


def some_scenes(count=120):
    return scenes.test_scenes("digits", 1, 3).images[:count]


def photographs(size, channels, count=6, seed=0):
    """Make images with structure at every scale, uint8 [count, channels, size, size]."""
    draw = np.random.default_rng(seed)
    out = np.zeros((count, channels, size, size))
    for side in (3, 9, size):
        grid = draw.normal(size=(count, channels, side, side))
        out += np.kron(grid, np.ones((-(-size // side),) * 2))[..., :size, :size]
    out = ndimage.gaussian_filter(out, (0, 0, 0.7, 0.7))
    low, high = out.min(), out.max()
    return np.rint(255 * (out - low) / (high - low)).astype(np.uint8)


def distances(pixels, name):
    """Return the mean squared difference to the clean images at each severity."""
    numbers = np.arange(len(pixels))
    worse = [corrupt(pixels, name, severity, numbers) for severity in SEVERITIES]
    return np.array([((w.astype(float) - pixels) ** 2).mean() for w in worse])


def grows(values):
    return values[0] > 0 and (np.diff(values) > 0).all()


# --- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_higher_severity_changes_scenes_more(name):
    assert grows(distances(some_scenes(), name))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_higher_severity_changes_real_images_more(name, imagenette):
    for size in (64, 128):
        images = sources.find("imagenette").test_split(complete(Data(name="imagenette", train=1, image_size=size)))
        assert grows(distances(images.batch(0, 12), name)), size


@given(st.integers(20, 90), st.sampled_from((1, 3)), st.sampled_from(CORRUPTIONS), st.integers(0, 99))
def test_higher_severity_changes_more_at_any_size(size, channels, name, seed):
    assert grows(distances(photographs(size, channels, seed=seed), name))


@given(st.integers(20, 50), st.sampled_from((1, 3)), st.sampled_from(CORRUPTIONS), st.sampled_from(SEVERITIES))
def test_corruption_does_not_depend_on_the_rest_of_the_batch(size, channels, name, severity):
    pixels, numbers = photographs(size, channels, 5), np.array([7, 0, 2399, 7, 50_000])
    together = corrupt(pixels, name, severity, numbers)
    assert together.dtype == np.uint8
    assert together.shape == pixels.shape
    assert np.array_equal(together, corrupt(pixels, name, severity, numbers))
    turned = np.array([3, 1, 4, 0, 2])
    assert np.array_equal(corrupt(pixels[turned], name, severity, numbers[turned]), together[turned])
    for row in range(5):
        alone = corrupt(pixels[row : row + 1], name, severity, numbers[row : row + 1])
        assert np.array_equal(alone[0], together[row])


def test_many_images_are_processed_in_parts(monkeypatch):
    whole = {name: corrupt(some_scenes(50), name, 4, np.arange(50)) for name in CORRUPTIONS}
    monkeypatch.setattr(corruptions, "_VALUES", 7 * 400)
    for name in CORRUPTIONS:
        assert np.array_equal(corrupt(some_scenes(50), name, 4, np.arange(50)), whole[name]), name


@pytest.mark.parametrize("name", [n for n in CORRUPTIONS if n.endswith("noise") or n in ("fog", "motion_blur")])
def test_noise_depends_only_on_the_images_number(name):
    pixels = np.repeat(photographs(24, 3, 1), 3, axis=0)
    one, two, three = corrupt(pixels, name, 3, np.array([4, 5, 4]))
    assert np.array_equal(one, three)
    assert not np.array_equal(one, two)


def test_images_that_are_not_square_keep_their_shape():
    pixels = photographs(60, 3, 2)[:, :, :31]
    for name in CORRUPTIONS:
        assert corrupt(pixels, name, 2, np.arange(2)).shape == (2, 3, 31, 60), name


def test_images_that_can_not_be_corrupted_are_refused():
    pixels = np.zeros((1, 3, 32, 32), np.uint8)
    for wrong in (pixels.astype(float), pixels[0], np.zeros((1, 2, 32, 32), np.uint8)):
        with pytest.raises(ValueError, match="uint8 images with 1 or 3 channels"):
            corrupt(wrong, "fog", 1, np.arange(1))
    with pytest.raises(ValueError, match="at least 20 px, not 19 px"):
        corrupt(np.zeros((1, 1, 20, 19), np.uint8), "fog", 1, np.arange(1))
    for name, severity in (("frog", 1), ("fog", 0), ("fog", 6)):
        with pytest.raises(ValueError, match="no corruption"):
            corrupt(pixels, name, severity, np.arange(1))


def test_a_corrupted_split_differs_only_in_its_pixels():
    own = sources.find("digits").test_split(Data(train=1, test_per_source=1))
    worse = Corrupted(own, "motion_blur", 3)
    assert (len(worse), worse.channels, worse.size) == (len(own), 1, 20)
    assert np.array_equal(worse.labels, own.labels)
    assert np.array_equal(worse.clusters, own.clusters)
    last = worse.batch(500, 1000)
    assert len(last) == len(own) - 500
    assert np.array_equal(last, corrupt(own.pixels, "motion_blur", 3, np.arange(len(own)))[500:])
    assert np.array_equal(worse.take(np.array([501, 500])), last[[1, 0]])
    assert np.array_equal(np.asarray(worse.picture(503)), last[3, 0])


# --- one by one -----------------------------------------------------------------------------------------------------


GREY = np.full((40, 3, 32, 32), 128, np.uint8)


def result(name, severity, pixels=GREY):
    return corrupt(pixels, name, severity, np.arange(len(pixels))).astype(float) / 255


def test_lengths_scale_with_size_and_intensities_are_interpolated():
    one, five = (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)
    for severity in SEVERITIES:
        at = {width: corruptions._intensity(width, one, five, severity) for width in (20, 32, 85, 224, 518)}
        assert at[20] == pytest.approx(at[32]) == pytest.approx(one[severity - 1])
        assert at[518] == pytest.approx(at[224]) == pytest.approx(five[severity - 1])
        assert at[85] == pytest.approx((at[32] * at[224]) ** 0.5, rel=0.02)  # 85 is about the geometric mean
    assert corruptions._length(112, (3, 4, 6, 8, 10), 5) == 5


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_noise_has_its_standard_deviation(severity):
    noise = result("gaussian_noise", severity) - 128 / 255
    scale = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    assert abs(noise.mean()) < 4 * scale / noise.size**0.5
    assert noise.std() == pytest.approx(scale, rel=0.02)
    assert stats.kstest(noise.ravel()[:2000] / scale, "norm").pvalue > 0.001


def test_shot_noise_is_drawn_by_the_inverse_poisson_cdf():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(2, 2).repeat(2, 3).repeat(5, 0)
    drawn = uniform(0, "corruption/shot_noise", np.arange(5)[:, None], np.arange(32 * 32)).reshape(5, 1, 32, 32)
    for severity, rate in zip(SEVERITIES, (500, 250, 100, 75, 50), strict=True):
        expected = np.clip(stats.poisson.ppf(drawn, levels / 255 * rate), 0, None) / rate
        assert np.array_equal(
            corrupt(levels, "shot_noise", severity, np.arange(5)), np.rint(255 * np.clip(expected, 0, 1))
        )


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_noise_is_salt_and_pepper(severity):
    out = result("impulse_noise", severity)
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    for value in (0, 1):
        assert (out == value).mean() == pytest.approx(share / 2, rel=0.1)
    assert set(np.unique(out)) == {0, 128 / 255, 1}


@pytest.mark.parametrize("radius", [0.27, 1.4, 5.0])
def test_a_disc_blurs_up_to_its_radius(radius):
    kernel = corruptions._disc(radius)
    reach = len(kernel) // 2
    grid = np.arange(-reach, reach + 1)
    assert kernel.sum() == pytest.approx(1)
    assert np.allclose(kernel, kernel.T)
    assert np.allclose(kernel, kernel[::-1])
    spread = (kernel.sum(0) * grid**2).sum()
    assert radius**2 / 4 <= spread * 1.03  # of a disc, and what the steps between pixels add: a quarter at most
    assert spread <= radius**2 / 4 + 0.25


def test_blur_is_the_convolution_with_its_kernel():
    pixels = photographs(41, 3, 4) / 255.0
    angles = uniform(0, "corruption/motion_blur", np.arange(4)[:, None], np.arange(1))[:, 0] * np.pi
    for severity in SEVERITIES:
        disc = corruptions._disc((3, 4, 6, 8, 10)[severity - 1] * 41 / 224)
        length = (6, 10, 16, 24, 32)[severity - 1] * 41 / 224
        steps = np.linspace(-length / 2, length / 2, 64)
        for image in range(4):
            line = corruptions._kernels((steps * np.sin(angles[image]))[None], (steps * np.cos(angles[image]))[None])
            for name, kernel, tolerance in (("defocus_blur", disc, 0.51 / 255), ("motion_blur", line[0], 2 / 255)):
                out = corrupt(
                    np.rint(pixels[image : image + 1] * 255).astype(np.uint8), name, severity, np.array([image])
                )[0]
                for channel in range(3):
                    expected = ndimage.convolve(pixels[image, channel], kernel, mode="reflect")
                    assert np.abs(out[channel] / 255 - expected).max() < tolerance


def test_motion_has_one_direction():
    steps = np.linspace(-4, 4, 65)[None]
    kernel = corruptions._kernels(steps * np.sin(0.6), steps * np.cos(0.6))[0]
    grid = np.arange(len(kernel)) - len(kernel) // 2
    y, x = np.meshgrid(grid, grid, indexing="ij")
    moments = np.array(
        [[(kernel * x * x).sum(), (kernel * x * y).sum()], [(kernel * x * y).sum(), (kernel * y * y).sum()]]
    )
    values, vectors = np.linalg.eigh(moments)
    assert np.arctan2(vectors[1, 1], vectors[0, 1]) % np.pi == pytest.approx(0.6, abs=0.05)
    assert values[0] < 0.3 < 5 < values[1]


def test_fog_lies_between_the_image_and_its_brightest_value():
    pixels = photographs(32, 3, 4)
    brightest = pixels.max(axis=(1, 2, 3), keepdims=True)
    for severity, thick in zip(SEVERITIES, (0.17, 0.33, 0.43, 0.50, 0.60), strict=True):
        field = (corrupt(pixels, "fog", severity, np.arange(4)) - (1 - thick) * pixels.astype(float)) / thick
        assert np.all(field > -0.51 / thick)
        assert np.all(field < brightest + 0.51 / thick)
        assert np.ptp(field, axis=1).max() < 1.1 / thick, "one field for all channels"
        assert np.ptp(field.mean(1), axis=(1, 2)).min() > 0.9 * brightest.min()


def test_brightness_keeps_hue_and_saturation():
    pixels = photographs(32, 3, 1)
    pixels[0, :, 0, 0] = 0
    out = result("brightness", 2, pixels)[0]
    for row, column in ((0, 0), (3, 9), (20, 31), (11, 5)):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixels[0, :, row, column] / 255)
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.1, 1))
        assert out[:, row, column] == pytest.approx(expected, abs=0.51 / 255)
    grey = pixels[:, :1]
    assert result("brightness", 2, grey)[0] == pytest.approx(np.minimum(grey[0] / 255 + 0.1, 1), abs=0.51 / 255)


def test_contrast_shrinks_the_distance_to_each_channels_mean():
    pixels = photographs(32, 3, 2)
    mean = pixels.mean(axis=(2, 3), keepdims=True)
    for severity, left in zip(SEVERITIES, (0.75, 0.5, 0.4, 0.3, 0.15), strict=True):
        expected = (mean + left * (pixels - mean)) / 255
        assert np.abs(result("contrast", severity, pixels) - expected).max() <= 0.51 / 255


def test_occlusion_hides_one_square_that_grows_with_severity():
    pixels = np.zeros((30, 1, 64, 64), np.uint8)
    before = np.zeros((64, 64), bool)
    for severity, share in zip(SEVERITIES, (0.05, 0.10, 0.20, 0.30, 0.40), strict=True):
        hidden = corrupt(pixels, "occlusion", severity, np.arange(30))[:, 0] > 0
        sides = hidden.any(1).sum(1), hidden.any(2).sum(1)
        assert np.array_equal(*sides)
        assert np.array_equal(hidden.sum((1, 2)), sides[0] ** 2)
        assert hidden.mean() == pytest.approx(share, rel=0.06)
        assert (hidden | ~before).mean() > 0.99  # up to the rounding to whole pixels
        before = hidden


def test_pixelate_averages_blocks():
    pixels = photographs(224, 1, 1)
    expected = pixels.reshape(112, 2, 112, 2).mean((1, 3)).repeat(2, 0).repeat(2, 1)
    assert np.abs(corrupt(pixels, "pixelate", 2, np.arange(1))[0, 0] - expected).max() <= 0.5
    ragged = corruptions._blocks(np.arange(5.0).repeat(3).reshape(1, 1, 5, 3), 2)[0, 0]
    assert ragged.tolist() == [[0.5] * 3, [0.5] * 3, [2.5] * 3, [2.5] * 3, [4.0] * 3]


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillows(channels):
    pixels = photographs(32, channels, 1)
    picture = Image.fromarray(pixels[0, 0] if channels == 1 else np.moveaxis(pixels[0], 0, -1))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=58)
    expected = np.asarray(Image.open(buffer))
    expected = expected[None] if channels == 1 else np.moveaxis(expected, -1, 0)
    assert np.array_equal(corrupt(pixels, "jpeg", 3, np.arange(1))[0], expected)
