"""The probes' classifiers against scikit-learn's, and against explicit numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import StandardScaler

from atdiag.analysis import classifiers
from atdiag.core.errors import UserError


def draw(seed=0, rows=120, width=9, classes=4, spread=2.0):
    """Clouds of features around class means that overlap: training and test."""
    rng = np.random.default_rng(seed)
    means = spread * rng.normal(size=(classes, width))
    y = np.concatenate([np.arange(classes), rng.integers(0, classes, 2 * rows - classes)])
    x = (means[y] + 3 * rng.normal(size=(2 * rows, width))) * rng.uniform(0.1, 10, width) + 5
    x = torch.from_numpy(x.astype(np.float32))
    return x[:rows], torch.from_numpy(y[:rows]), x[rows:], torch.from_numpy(y[rows:])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("penalty", [1.0, 0.01, 0.0001])
def test_the_linear_probe_is_scikit_learns(seed, penalty):
    x, y, z, _ = draw(seed)
    a, b = classifiers.standardise(x, z)
    scaler = StandardScaler().fit(x.double().numpy())
    np.testing.assert_allclose(a.numpy(), scaler.transform(x.double().numpy()), atol=1e-10)
    np.testing.assert_allclose(b.numpy(), scaler.transform(z.double().numpy()), atol=1e-10)
    ours = classifiers.fit_linear(a, y, 4, penalty)
    theirs = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-9, max_iter=10_000).fit(a.numpy(), y.numpy())
    np.testing.assert_allclose(ours.weight.numpy(), theirs.coef_, atol=2e-3 * np.abs(theirs.coef_).max())
    assert np.array_equal(ours(b).numpy(), theirs.predict(b.numpy()))


def test_the_minimum_is_that_of_the_formula_wherever_it_starts():
    x, y, _, _ = draw(7)
    (x,) = classifiers.standardise(x)

    def loss(weight, bias):
        log_p = (x @ weight.T + bias).log_softmax(-1)
        return -log_p[torch.arange(len(x)), y].mean() + 0.05 / 2 * weight.square().sum()

    cold = classifiers.fit_linear(x, y, 4, 0.05)
    warm = classifiers.fit_linear(x, y, 4, 0.05, classifiers.fit_linear(x, y, 4, 0.5))
    torch.testing.assert_close(cold.weight, warm.weight, atol=1e-4, rtol=1e-3)
    least = loss(cold.weight, cold.bias)
    for seed in range(20):
        step = 0.05 * torch.randn(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert loss(cold.weight + step[:, 1:], cold.bias + step[:, 0]) > least


def test_the_penalty_is_the_one_that_is_best_on_the_held_out_part():
    x, y, _, _ = draw(3, rows=200, spread=0.8)
    (x,) = classifiers.standardise(x)
    held = torch.from_numpy(classifiers.hold_out(np.arange(len(x))))
    penalties = (1.0, 0.1, 0.01)
    scores = []
    for penalty in penalties:
        model = LogisticRegression(C=1 / (penalty * int((~held).sum())), tol=1e-8, max_iter=5000)
        scores.append(model.fit(x[~held].numpy(), y[~held].numpy()).score(x[held].numpy(), y[held].numpy()))
    chosen = classifiers.choose_linear(x, y, 4, held, penalties)
    assert chosen.penalty == penalties[int(np.argmax(scores))]
    torch.testing.assert_close(
        chosen.weight, classifiers.fit_linear(x, y, 4, chosen.penalty).weight, atol=1e-4, rtol=1e-3
    )


def test_a_fit_that_does_not_end_is_an_error():
    x, y, _, _ = draw()
    with pytest.raises(RuntimeError, match="did not converge"):
        classifiers.fit_linear(torch.full_like(x, torch.nan).double(), y, 4, 0.1)


@given(st.integers(0, 1000), st.integers(1, 30), st.integers(2, 6))
def test_neighbours_and_centroids_are_scikit_learns(seed, k, classes):
    x, y, z, _ = draw(seed, rows=60, classes=classes)
    a, b = classifiers.standardise(x, z)
    near = KNeighborsClassifier(k, metric="cosine").fit(a.numpy(), y.numpy())
    assert np.array_equal(classifiers.neighbours(a, y, b, classes, k).numpy(), near.predict(b.numpy()))
    means = NearestCentroid().fit(a.numpy(), y.numpy())
    assert np.array_equal(classifiers.centroids(a, y, b, classes).numpy(), means.predict(b.numpy()))


def test_neighbours_and_centroids_by_hand():
    x, y, z, _ = draw(11)
    a, b = (one.numpy() for one in classifiers.standardise(x, z))
    for row, said, mean in zip(
        b,
        classifiers.neighbours(*map(torch.from_numpy, (a,)), y, torch.from_numpy(b), 5, 7),
        classifiers.centroids(torch.from_numpy(a), y, torch.from_numpy(b), 5),
        strict=True,
    ):
        cosine = a @ row / np.linalg.norm(a, axis=1) / np.linalg.norm(row)
        votes = np.bincount(y.numpy()[np.argsort(-cosine)[:7]], minlength=5)
        assert int(said) == int(votes.argmax())
        distances = [np.linalg.norm(a[y.numpy() == c].mean(0) - row) for c in range(4)]
        assert int(mean) == int(np.argmin(distances))  # and never class 4, which has no training image


def test_too_many_neighbours_are_refused():
    x, y, z, _ = draw()
    with pytest.raises(UserError, match=r"`neighbours` 200 .*120 training images"):
        classifiers.neighbours(x, y, z, 4, 200)


def test_a_constant_feature_does_not_blow_up():
    x, _, z, _ = draw()
    x[:, 2] = 0.1
    a, b = classifiers.standardise(x, z)
    assert a[:, 2].abs().max() < 1e-6 and b.isfinite().all()


@given(st.lists(st.integers(0, 12), min_size=5, max_size=60).filter(lambda c: len(set(c)) > 1))
def test_whole_clusters_are_held_out(clusters):
    clusters = np.array(clusters)
    out = classifiers.hold_out(clusters)
    assert 0 < out.sum() < len(out)
    for cluster in np.unique(clusters):
        assert len(set(out[clusters == cluster])) == 1
    assert np.array_equal(out, classifiers.hold_out(clusters))


def test_about_a_fifth_is_held_out():
    assert classifiers.hold_out(np.arange(1000)).sum() == 200
    with pytest.raises(UserError, match="too few"):
        classifiers.hold_out(np.zeros(10, np.int64))
