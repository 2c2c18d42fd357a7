"""Attention shown on images: the rows of maps, the rollout, and the choice of queries."""

import numpy as np
import pytest
import torch

from atdiag.analysis import maps, rollout, streaming
from atdiag.core.errors import UserError


def test_the_rollout_is_the_product_of_half_attention_half_identity():
    rng = np.random.default_rng(0)
    layers = [rng.dirichlet(np.ones(6), (2, 3, 6)) for _ in range(4)]
    expected = np.stack([np.eye(6)] * 2)
    partial = []
    for p in layers:
        expected = (0.5 * p.mean(1) + 0.5 * np.eye(6)) @ expected
        partial.append(expected)
    found = list(rollout.steps(torch.from_numpy(p) for p in layers))
    for mine, theirs in zip(found, partial, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs)
    np.testing.assert_allclose(rollout.rollout(map(torch.from_numpy, layers)).numpy(), expected)
    np.testing.assert_allclose(expected.sum(-1), 1)
    with pytest.raises(ValueError, match="at least one layer"):
        rollout.rollout([])


@pytest.mark.parametrize("fields", [{}, {"components": ("registers",), "registers": 2}])
def test_shown_maps_equal_traced_maps(subject, pictures, fields):
    one = subject(2, **fields)
    some = pictures(one, 5)
    traced = streaming.trace(one, some)
    first = one.network.prefix_tokens
    shown = maps.maps(one, some, (0, 2), ("cls", "centre", "19,0"), "all", batch=2)
    assert shown.attention.shape == (5, 2, 3, 3, 5, 5) and shown.elsewhere.shape == (5, 2, 3, 3)
    assert shown.places == (0, first + 12, first + 4)
    for j, layer in enumerate((0, 2)):
        for q, place in enumerate(shown.places):
            row = traced["map", layer][:, :, place].numpy()
            np.testing.assert_allclose(shown.attention[:, j, q].reshape(5, 3, 25), row[..., first:], atol=1e-6)
            np.testing.assert_allclose(shown.elsewhere[:, j, q], row[..., :first].sum(-1), atol=1e-6)
    rolled = rollout.rollout(traced["map", layer] for layer in range(3))
    np.testing.assert_allclose(shown.rollout.reshape(5, 3, 25), rolled[:, shown.places, first:], atol=1e-6)
    np.testing.assert_allclose(shown.pixels, next(some.batches(5)).pixels)

    mean = maps.maps(one, some, (0, 2), ("cls",), "mean")
    np.testing.assert_allclose(mean.attention[:, :, 0, 0], shown.attention[:, :, 0].mean(2), atol=1e-6)
    second = maps.maps(one, some, (2,), ("centre",), 1, roll=False)
    np.testing.assert_allclose(second.attention[:, 0, 0, 0], shown.attention[:, 1, 1, 1], atol=1e-6)
    assert second.rollout is None and second.heads == ("1",)


def test_queries_are_placed_in_the_image(subject, pictures):
    one = subject(2)
    shown = maps.maps(one, pictures(one, 1), (0,), ("cls", "centre", "0,19"))
    assert shown.point(0) is None and shown.point(1) == (9.5, 9.5) and shown.point(2) == (1.5, 17.5)
    frame = shown.frame()
    assert list(frame["query"]) == ["cls", "centre", "0,19"]
    row = frame.iloc[1]
    assert row.largest == pytest.approx(shown.attention[0, 0, 1, 0, row.row, row.column])


def test_errors_name_the_problem(subject, pictures):
    one, pooled = subject(2), subject(2, class_token=False)
    some = pictures(one, 1)
    for fault, arguments in {
        r"layer 7 is out of range": {"layers": (7,)},
        r"head 3 is out of range: net 2 has 3 heads, 0 to 2": {"heads": 3},
        r"`query` 20,0 is out of range: net 2 sees 20 x 20 pixels": {"queries": ("20,0",)},
        r"`query` 'center', did you mean 'centre'\?": {"queries": ("center",)},
    }.items():
        with pytest.raises(UserError, match=fault):
            maps.maps(one, some, **arguments)
    with pytest.raises(UserError, match="has no class token"):
        maps.maps(pooled, some, queries=("cls",))
