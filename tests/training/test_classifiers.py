"""The probes' classifiers against scikit-learn's, and against explicit numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import StandardScaler

from atdiag.analysis import images, probing, subjects
from atdiag.core.errors import UserError
from atdiag.core.spec import Data
from atdiag.training import classifiers


def draw(seed=0, rows=120, width=9, classes=4, spread=2.0):
    """Draw training and test features around overlapping class means."""
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
    _same_probabilities(ours, theirs, b)
    assert np.array_equal(ours(b).numpy(), theirs.predict(b.numpy()))


def test_the_minimum_is_that_of_the_formula_from_any_starting_point():
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


def test_the_penalty_is_the_best_on_the_held_out_part():
    x, y, _, _ = draw(3, rows=200, spread=0.8)
    (x,) = classifiers.standardise(x)
    held = torch.from_numpy(classifiers.hold_out(np.arange(len(x)), y.numpy()))
    penalties = (1.0, 0.1, 0.01)
    scores = []
    for penalty in penalties:
        model = LogisticRegression(C=1 / (penalty * int((~held).sum())), tol=1e-8, max_iter=5000)
        scores.append(model.fit(x[~held].numpy(), y[~held].numpy()).score(x[held].numpy(), y[held].numpy()))
    chosen = classifiers.choose_linear(x, y, 4, held, penalties)
    assert chosen.penalty == pytest.approx(penalties[int(np.argmax(scores))] * float((~held).double().mean()))
    torch.testing.assert_close(
        chosen.weight, classifiers.fit_linear(x, y, 4, chosen.penalty).weight, atol=1e-4, rtol=1e-3
    )


def test_a_fit_that_does_not_converge_is_an_error():
    x, y, _, _ = draw()
    with pytest.raises(RuntimeError, match="did not come to its minimum"):
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
        assert int(mean) == int(np.argmin(distances))  # never class 4, which has no training image


def test_too_many_neighbours_are_refused():
    x, y, z, _ = draw()
    with pytest.raises(UserError, match=r"`neighbours` 200 .*120 training images"):
        classifiers.neighbours(x, y, z, 4, 200)


def test_constant_features_stay_finite():
    x, _, z, _ = draw()
    x[:, 2] = 0.1
    a, b = classifiers.standardise(x, z)
    assert a[:, 2].abs().max() < 1e-6 and b.isfinite().all()


@given(st.lists(st.integers(0, 12), min_size=5, max_size=60), st.integers(1, 4))
def test_whole_clusters_are_held_out_of_every_class(clusters, classes):
    clusters = np.array(clusters)
    labels = clusters % classes  # of each cluster one class, as of scenes that share a digit
    out = classifiers.hold_out(clusters, labels)
    sources = [len(set(clusters[labels == one])) for one in set(labels.tolist())]
    if min(sources) < 2:
        assert out is None
        return
    for cluster in np.unique(clusters):
        assert len(set(out[clusters == cluster])) == 1
    assert set(labels[~out]) == set(labels)  # every class keeps something to fit on
    held = len(set(clusters[out]))
    assert held == max(-(-sum(sources) // 5), len(sources))
    assert np.array_equal(out, classifiers.hold_out(clusters, labels))


def test_each_class_is_held_out_in_proportion():
    labels = np.repeat(np.arange(3), [500, 400, 100])
    assert np.bincount(labels[classifiers.hold_out(np.arange(1000), labels)]).tolist() == [100, 80, 20]
    pairs = np.repeat(np.arange(200), 2)
    assert np.bincount(pairs[classifiers.hold_out(np.arange(400), pairs)]).tolist() == [1] * 200


def test_with_a_single_image_of_a_class_the_penalty_is_scikit_learns_default():
    x, y, z, _ = draw(2, rows=40)
    labels = y.numpy().copy()
    labels[labels == 3], labels[0] = 2, 3
    assert classifiers.hold_out(np.arange(40), labels) is None
    a, b = classifiers.standardise(x, z)
    ours = classifiers.choose_linear(a, torch.from_numpy(labels), 4, None)
    theirs = LogisticRegression(tol=1e-9, max_iter=10_000).fit(a.numpy(), labels)
    assert ours.penalty == 1 / 40
    _same_probabilities(ours, theirs, b)


def _same_probabilities(ours, theirs, z, tolerance=1e-3):
    logits = z @ ours.weight.T + ours.bias
    np.testing.assert_allclose(logits.softmax(-1).numpy(), theirs.predict_proba(z.numpy()), atol=tolerance)


@pytest.mark.parametrize(("classes", "per_class"), [(2, 2), (2, 50), (10, 2), (10, 20), (50, 2), (200, 2), (200, 5)])
def test_the_whole_search_is_scikit_learns(classes, per_class):
    """``LogisticRegressionCV`` with the same grid and the same stratified split, from 2 to 200 classes."""
    rng = np.random.default_rng([classes, per_class])
    y = np.repeat(np.arange(classes), per_class)
    means = (0.3 + 0.1 * np.log(classes)) * rng.normal(size=(classes, 32))
    truth = np.repeat(np.arange(classes), max(1000 // classes, 5))
    x, z = (torch.from_numpy(means[of] + rng.normal(size=(len(of), 32))) for of in (y, truth))
    _compare(*classifiers.standardise(x, z), y, truth)


def test_the_whole_search_is_scikit_learns_on_a_teachers_features():
    """Ten images of each digit after three blocks of a miniature: real features, far from separable."""
    teacher, data = subjects.find("deit_s"), Data(name="digits", train=100, clutter=6)
    train = probing.training_pictures(data, teacher.network)
    test = images.choose(300, data, teacher.network)
    shown, labels = [], []
    for some in (train, test):
        (found,), kept = probing.features([teacher], some, (2,), exits=False)
        shown.append(found.of("both", 0))
        labels.append(some.labels[kept])
    _compare(*classifiers.standardise(*shown), *labels)


def _compare(x, z, y, truth):
    held = classifiers.hold_out(np.arange(len(y)), y)
    fit = np.flatnonzero(~held)
    ours = classifiers.choose_linear(x, torch.from_numpy(y), int(y.max()) + 1, torch.from_numpy(held))
    theirs = LogisticRegressionCV(
        Cs=[1 / (penalty * len(fit)) for penalty in classifiers.PENALTIES],
        cv=[(fit, np.flatnonzero(held))],
        l1_ratios=(0.0,),
        scoring="accuracy",
        max_iter=2000,
        use_legacy_attributes=False,
    ).fit(x.numpy(), y)
    right = [100 * (said == truth).mean() for said in (ours(z).numpy(), theirs.predict(z.numpy()))]
    assert right[0] == pytest.approx(right[1], abs=2.0)
    # On the held-out images the chosen penalty is as good as scikit-learn's, to one image: the two solvers stop at
    # slightly different points.
    scores = dict(zip(classifiers.PENALTIES, np.ravel(theirs.scores_.mean(0)), strict=True))
    chosen = min(scores, key=lambda one: abs(one - ours.penalty * len(y) / len(fit)))
    assert scores[chosen] >= max(scores.values()) - 1.01 / held.sum()
