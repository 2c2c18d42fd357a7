"""Three classifiers on fixed features: a linear one, the nearest neighbours, the nearest class mean.

Each is scikit-learn's of the same name on the same features (``LogisticRegression``, ``KNeighborsClassifier``,
``NearestCentroid``), written in torch so that it runs where the features are and fits a path of penalties from one
another. Shapes: n training images, m test images, D features, K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atdiag.core import randomness
from atdiag.core.errors import UserError

PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
"""The linear probe's choices of regularisation, strong to weak: see :func:`fit_linear`."""

HELD_OUT = 0.2
"""The share of the training images on which the regularisation is chosen."""

NEIGHBOURS = 20
"""As in DINO's evaluation (Caron et al. 2021), there with weighted votes."""

_SMALL = 2**20
"""Numbers in the features of a problem that one thread solves faster than several."""

_PATH_TOLERANCE = 1e-3
"""On the path of penalties: nearer to the minimum takes twice as long and chooses the same, within the noise."""

_PATIENCE = 2
"""The path of penalties ends after so many that are no better than the best."""


@dataclass(frozen=True)
class Linear:
    """A multinomial logistic regression: ``argmax(x @ weight.T + bias)``. weight: [K, D]; bias: [K]."""

    weight: Tensor
    bias: Tensor
    penalty: float

    def __call__(self, x: Tensor) -> Tensor:
        """Features [m, D] -> classes [m]."""
        return (x.to(self.weight) @ self.weight.T + self.bias).argmax(-1)


def standardise(train: Tensor, *others: Tensor) -> list[Tensor]:
    """Less the mean and by the standard deviation of the training images, feature by feature, all of the tensors.

    A feature that is constant there is only centred (as scikit-learn's ``StandardScaler`` does).
    """
    wide = train.to(_wide(train))
    mean, std = wide.mean(0), wide.std(0, correction=0)
    std = torch.where(std > 10 * torch.finfo(train.dtype).eps * mean.abs().clamp_min(1e-30), std, torch.ones_like(std))
    return [(x.to(wide) - mean) / std for x in (train, *others)]


def fit_linear(
    x: Tensor, y: Tensor, classes: int, penalty: float, start: Linear | None = None, tolerance: float = 1e-6
) -> Linear:
    """Multinomial logistic regression: least ``mean cross-entropy + penalty / 2 * |weight|^2`` (Frobenius).

    scikit-learn's ``LogisticRegression(C=1 / (penalty * n))`` has the same minimum. By L-BFGS with a strong Wolfe
    search, until no component of the gradient is above ``tolerance``. x: [n, D] in float64 (float32 on MPS); y: int64
    [n]. Raises RuntimeError where that is not reached.
    """
    rows, width = x.shape
    target = torch.zeros(rows, classes, dtype=x.dtype, device=x.device)
    target[torch.arange(rows, device=x.device), y] = 1
    parameter = x.new_zeros(classes, width + 1)
    if start is not None:
        parameter[:, :width], parameter[:, width] = start.weight, start.bias
    parameter.requires_grad_(True)
    most = 2000
    search = torch.optim.LBFGS(
        [parameter],
        max_iter=most,
        max_eval=2 * most,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> Tensor:
        weight, bias = parameter[:, :width], parameter[:, width]
        log_p = (x @ weight.T + bias).log_softmax(-1)
        error = (log_p.exp() - target) / rows
        parameter.grad = torch.cat([error.T @ x + penalty * weight, error.sum(0)[:, None]], dim=1)
        return -(log_p * target).sum() / rows + penalty / 2 * weight.square().sum()

    with _threads(x):
        search.step(closure)  # type: ignore[no-untyped-call]
        closure()
    assert parameter.grad is not None
    if not (left := float(parameter.grad.abs().max())) <= 100 * tolerance:  # a NaN is no success
        raise RuntimeError(f"the linear probe with penalty {penalty:g} did not converge (gradient {left:g})")
    fitted = parameter.detach()
    return Linear(fitted[:, :width].clone(), fitted[:, width].clone(), penalty)


def choose_linear(
    x: Tensor, y: Tensor, classes: int, held_out: Tensor, penalties: Sequence[float] = PENALTIES
) -> Linear:
    """The linear probe with the penalty that is best on the held-out training images, fitted again on all of them.

    held_out: bool [n]. Penalties are tried from strong to weak, each from the last one's solution, until two in a row
    are no better than the best so far; of equal ones the stronger is taken. Nothing of a test set is seen.
    """
    best, found, since = -1.0, penalties[0], 0
    fitted: Linear | None = None
    kept: Linear | None = None
    for penalty in sorted(penalties, reverse=True):
        fitted = fit_linear(x[~held_out], y[~held_out], classes, penalty, fitted, _PATH_TOLERANCE)
        score = float((fitted(x[held_out]) == y[held_out]).double().mean())
        if score > best:
            best, found, since, kept = score, penalty, 0, fitted
        else:
            since += 1
            if since == _PATIENCE:
                break
    return fit_linear(x, y, classes, found, kept)


def hold_out(clusters: NDArray[np.int64], share: float = HELD_OUT) -> NDArray[np.bool_]:
    """Which training images are held out: bool [n], about a share of them, whole clusters, the same ones every time.

    Raises UserError where there are too few.
    """
    _, index, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    order = randomness.generator(0, "probe/held-out", len(sizes)).permutation(len(sizes))
    before = np.cumsum(sizes[order]) - sizes[order]
    chosen = np.zeros(len(sizes), np.bool_)
    chosen[order[before < share * len(clusters)]] = True
    chosen[order[-1]] = False  # something is left to fit to, even where clusters are large
    out: NDArray[np.bool_] = chosen[index]
    if not out.any():
        raise UserError(
            f"{len(clusters)} training images are too few to hold some of them out", "give more with `train`"
        )
    return out


def neighbours(train: Tensor, y: Tensor, test: Tensor, classes: int, k: int = NEIGHBOURS) -> Tensor:
    """The majority class among the k nearest training images by cosine similarity: [m, D] -> classes [m].

    Of classes with equal votes the lowest number. Raises UserError for k out of range.
    """
    if not 1 <= k <= len(train):
        raise UserError(
            f"`neighbours` {k} is out of range", f"there are {len(train)} training images: give 1 to {len(train)}"
        )
    near, out = torch.nn.functional.normalize(train, dim=-1), []
    for part in torch.split(torch.nn.functional.normalize(test, dim=-1), 1024):
        chosen = y[(part @ near.T).topk(k, dim=-1).indices]
        votes = torch.zeros(len(part), classes, device=train.device)
        votes.scatter_add_(1, chosen, torch.ones_like(votes[:, :1]).expand(-1, k))
        out.append((votes == votes.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1))
    return torch.cat(out)


def centroids(train: Tensor, y: Tensor, test: Tensor, classes: int) -> Tensor:
    """The class whose mean over the training images is nearest (Euclidean): [m, D] -> classes [m]."""
    here = torch.zeros(classes, len(train), dtype=train.dtype, device=train.device)
    here[y, torch.arange(len(y), device=y.device)] = 1
    count = here.sum(-1, keepdim=True)
    means = here @ train / count.clamp_min(1)
    distance = torch.cdist(test, means, compute_mode="donot_use_mm_for_euclid_dist")
    distance[:, count[:, 0] == 0] = torch.inf  # a class without training images is never meant
    return distance.argmin(-1)


@contextlib.contextmanager
def _threads(x: Tensor) -> Iterator[None]:
    """One thread for a small problem on a CPU: several would wait for each other more than they compute."""
    before = torch.get_num_threads()
    if x.device.type == "cpu" and x.numel() < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _wide(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64
