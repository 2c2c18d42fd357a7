"""Attention statistics against explicit formulas, and on maps whose statistics are known."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from atdiag.analysis import statistics as stats
from atdiag.core.errors import UserError
from atdiag.core.spec import Network

GRID = Network(image_size=12, patch_size=4, channels=1, width=8, depth=1, heads=2, classes=3)


def random_maps(seed=0, images=3, heads=3, tokens=10):
    draw = np.random.default_rng(seed).dirichlet(np.full(tokens, 0.3), (images, heads, tokens))
    return torch.from_numpy(draw)


def test_statistics_of_random_maps_equal_their_formulas():
    p = random_maps()
    a = p.numpy()
    logs = np.log2(np.where(a > 0, a, 1))
    np.testing.assert_allclose(stats.entropy(p), -(a * logs).sum(-1).mean(-1))

    places = [(row, column) for row in range(3) for column in range(3)]
    expected = np.zeros((3, 3))
    for b, h, i, j in np.ndindex(3, 3, 9, 9):
        weight = a[b, h, i + 1, j + 1] / a[b, h, i + 1, 1:].sum()
        expected[b, h] += weight * 4 * math.dist(places[i], places[j]) / 9
    np.testing.assert_allclose(stats.distance(p, GRID), expected)

    values = np.linalg.svd(a, compute_uv=False)
    values /= values.sum(-1, keepdims=True)
    np.testing.assert_allclose(stats.effective_rank(p), np.exp(-(values * np.log(values)).sum(-1)))

    between = np.zeros(3)
    for b, h, g, i in np.ndindex(3, 3, 3, 10):
        between[h] += (h != g) * jensenshannon(a[b, h, i], a[b, g, i], base=2) ** 2 / 10 / 2
    np.testing.assert_allclose(stats.redundancy(p), between, atol=1e-6)


def test_statistics_of_known_maps():
    uniform, identity = torch.full((1, 1, 10, 10), 0.1), torch.eye(10)[None, None]
    assert stats.entropy(uniform).item() == pytest.approx(math.log2(10))
    assert stats.entropy(identity).item() == 0
    assert stats.effective_rank(uniform).item() == pytest.approx(1, abs=1e-4)
    assert stats.effective_rank(identity).item() == pytest.approx(10, rel=1e-5)
    assert stats.distance(identity, GRID).item() == 0
    neighbour = torch.zeros(1, 1, 10, 10)
    neighbour[..., torch.arange(10), [1, *np.array([1, 0, 1, 4, 3, 4, 7, 6, 7]) + 1]] = 1  # each to one beside it
    assert stats.distance(neighbour, GRID).item() == pytest.approx(4)
    assert stats.redundancy(uniform.expand(1, 4, -1, -1)).tolist() == pytest.approx([0] * 4, abs=1e-6)
    assert stats.redundancy(uniform).isnan().all()


def explicit(subject, pictures):
    """Compute maps and residual streams of all images at once with our own module."""
    from atdiag.transfer import ops
    from atdiag.transfer.observation import CaptureRequest

    blocks = frozenset(range(subject.network.depth))
    pixels = next(pictures.batches(len(pictures))).pixels
    with torch.no_grad():
        seen = subject.module.observe(pixels, CaptureRequest(maps=blocks, features=blocks))
    maps = [ops.probabilities(seen.seen[i].qk).double().numpy() for i in sorted(blocks)]
    return maps, [seen.features[i].double().numpy() for i in sorted(blocks)]


@pytest.mark.parametrize("fields", [{}, {"components": ("registers",), "registers": 2}, {"class_token": False}])
def test_statistics_of_a_network_are_means_over_all_images(subject, pictures, fields):
    one, some = subject(3, **fields), None
    some = pictures(one, 11)
    found, whole = (stats.attention_stats([one], some, rank_images=11, batch=size)[0] for size in (3, 11))
    for name in stats.OF_HEADS:
        np.testing.assert_allclose(found.heads[name], whole.heads[name], rtol=1e-4, atol=1e-6)
        assert found.heads[name].shape == (3, 3)
    maps, features = explicit(one, some)
    network = one.network
    first, prefix = int(network.class_token), network.prefix_tokens
    for layer, (p, x) in enumerate(zip(maps, features, strict=True)):
        column = p.mean(2)
        np.testing.assert_allclose(found.heads["sink"][layer], column.max(-1).mean(0), rtol=1e-4)
        if first:
            np.testing.assert_allclose(found.heads["class_share"][layer], column[..., 0].mean(0), rtol=1e-4)
        if prefix > first:
            share = column[..., first:prefix].sum(-1).mean(0)
            np.testing.assert_allclose(found.heads["register_share"][layer], share, rtol=1e-4)
        norms = np.linalg.norm(x, axis=-1)
        middle = np.sort(norms[:, prefix:], axis=1)[:, (network.grid**2 - 1) // 2]
        np.testing.assert_allclose(found.layers_only["norm"][layer], middle.mean(), rtol=1e-5)
        share = (norms > stats.HIGH_NORM * middle[:, None]).mean()
        np.testing.assert_allclose(found.layers_only["high_norm"][layer], share, atol=1e-9)
    assert np.isnan(found.heads["class_share"]).all() == (not network.class_token)
    assert np.isnan(found.heads["register_share"]).all() == (network.registers == 0)


def test_the_outlier_threshold_is_a_norm(subject, pictures):
    one = subject(3)
    some = pictures(one, 4)
    _, features = explicit(one, some)
    limit = float(np.median(np.linalg.norm(features[1], axis=-1)))
    (found,) = stats.attention_stats([one], some, threshold=limit)
    share = (np.linalg.norm(features[1], axis=-1) > limit).mean()
    assert found.layers_only["high_norm"][1] == pytest.approx(share, abs=0.02)


def test_the_rank_is_of_images_spread_over_the_whole_set(subject, pictures):
    one = subject(3)
    some = pictures(one, 10)
    (found,) = stats.attention_stats([one], some, rank_images=4, batch=4)
    maps, _ = explicit(one, some)
    assert found.rank_images == 4 and found.images == 10
    expected = stats.effective_rank(torch.from_numpy(maps[2][[0, 3, 6, 9]])).mean(0)
    np.testing.assert_allclose(found.heads["rank"][2], expected, rtol=1e-4)


def test_several_subjects_give_what_each_gives_alone(subject, pictures):
    one, other = subject(3), subject(4)
    some = pictures(one, 6)
    together = stats.attention_stats([one, other], some, layers=(0, 2))
    for net, found in zip((one, other), together, strict=True):
        (alone,) = stats.attention_stats([net], some, layers=(0, 2))
        for name in stats.OF_HEADS:
            np.testing.assert_array_equal(found.heads[name], alone.heads[name])
    frame = together[0].frame()
    assert len(frame) == 2 * 3 and set(stats.OF_HEADS) | set(stats.OF_LAYERS) < set(frame.columns)


def test_a_missing_layer_is_refused(subject, pictures):
    one = subject(3)
    with pytest.raises(UserError, match=r"layer 9 is out of range: net 3 has 3 blocks, 0 to 2"):
        stats.attention_stats([one], pictures(one), layers=(9,))
