"""Three classifiers on fixed features: linear, nearest neighbours, nearest class mean.

Each equals scikit-learn's classifier on the same features (``LogisticRegression``, ``KNeighborsClassifier``,
``NearestCentroid``), but is written in torch, so that it runs on the features' device and can fit a path of penalties,
each from the previous solution. Scaling and splitting are scikit-learn's own. Shapes: n training images, m test images,
D features, K classes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atdiag.core import randomness
from atdiag.core.errors import UserError

PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
"""Penalties that the linear probe chooses from, strong to weak: see :func:`fit_linear`."""

HELD_OUT = 0.2
"""Share of the training images on which the regularisation is chosen; more if these are fewer than the classes."""

FIXED_C = 1.0
"""scikit-learn's default ``C``: the penalty is ``1 / (FIXED_C * n)`` if no images can be held out to choose it."""

NEIGHBOURS = 20
"""Number of neighbours, as in DINO's evaluation (Caron et al. 2021; votes are weighted there)."""

_SMALL = 2**20
"""Number of feature values up to which one thread is faster than several."""

_PATH_TOLERANCE = 1e-4
"""Tolerance on the path of penalties, as in scikit-learn: at 1e-3 a fit of many classes has not yet converged."""


@dataclass(frozen=True)
class Linear:
    """A multinomial logistic regression: ``argmax(x @ weight.T + bias)``. weight: [K, D]; bias: [K]."""

    weight: Tensor
    bias: Tensor
    penalty: float

    def __call__(self, x: Tensor) -> Tensor:
        """Map features [m, D] to classes [m]."""
        return (x.to(self.weight) @ self.weight.T + self.bias).argmax(-1)


def standardise(train: Tensor, *others: Tensor) -> list[Tensor]:
    """Standardise all tensors, feature by feature, by the mean and standard deviation over the training images.

    By scikit-learn's ``StandardScaler``: constant features are only centred, including those whose spread is mere
    rounding error.
    """
    from sklearn.preprocessing import StandardScaler  # it imports SciPy and pandas, which most training never needs

    scaler = StandardScaler().fit(_array(train))
    rounding = 10 * torch.finfo(train.dtype).eps * np.abs(scaler.mean_).clip(1e-30)
    scaler.scale_[np.sqrt(scaler.var_) <= rounding] = 1.0
    return [torch.from_numpy(scaler.transform(_array(x))).to(_wide(x)).to(x.device) for x in (train, *others)]


def fit_linear(
    x: Tensor, y: Tensor, classes: int, penalty: float, start: Linear | None = None, tolerance: float = 1e-6
) -> Linear:
    """Fit multinomial logistic regression: minimise ``mean cross-entropy + penalty / 2 * |weight|^2`` (Frobenius norm).

    scikit-learn's ``LogisticRegression(C=1 / (penalty * n))`` has the same minimum. Uses L-BFGS with a strong Wolfe
    line search until no component of the gradient exceeds ``tolerance``. x: [n, D] in float64 (float32 on MPS); y:
    int64 [n]. Raises RuntimeError if that fails to converge.
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
    if not (left := float(parameter.grad.abs().max())) <= 100 * tolerance:  # NaN must fail, too
        raise RuntimeError(f"the linear probe with penalty {penalty:g} did not come to its minimum (gradient {left:g})")
    fitted = parameter.detach()
    return Linear(fitted[:, :width].clone(), fitted[:, width].clone(), penalty)


def choose_linear(
    x: Tensor, y: Tensor, classes: int, held_out: Tensor | None, penalties: Sequence[float] = PENALTIES
) -> Linear:
    """Return the linear probe with the best penalty on the held-out training images, refitted on all of them.

    held_out: bool [n]; None: use the penalty of scikit-learn's default ``C`` and ignore ``penalties``. Penalties are
    tried from strong to weak, each starting from the last one's solution; of equally good ones the strongest is taken.
    The final fit keeps ``C``, so its penalty per image is smaller in proportion to its larger number of images. All
    this is scikit-learn's ``LogisticRegressionCV`` on the same split. No test image is used.
    """
    if held_out is None:
        return fit_linear(x, y, classes, 1 / (FIXED_C * len(x)))
    best, found = -1.0, penalties[0]
    fitted: Linear | None = None
    kept: Linear | None = None
    for penalty in sorted(penalties, reverse=True):
        fitted = fit_linear(x[~held_out], y[~held_out], classes, penalty, fitted, _PATH_TOLERANCE)
        score = float((fitted(x[held_out]) == y[held_out]).double().mean())
        if score > best:
            best, found, kept = score, penalty, fitted
    return fit_linear(x, y, classes, found * int((~held_out).sum()) / len(x), kept)


def hold_out(
    clusters: NDArray[np.int64], labels: NDArray[np.int64], share: float = HELD_OUT
) -> NDArray[np.bool_] | None:
    """Choose the held-out training images: bool [n], whole clusters, stratified by class, deterministic.

    A cluster has the class of its first image. At least as many clusters as there are classes are held out. None if a
    class has only one cluster, which can't be both fitted and held out.
    """
    from sklearn.model_selection import StratifiedShuffleSplit

    _, first, index = np.unique(clusters, return_index=True, return_inverse=True)
    of_cluster = labels[first]
    classes, sizes = np.unique(of_cluster, return_counts=True)
    if len(classes) < len(np.unique(labels)) or sizes.min() < 2:
        return None
    seed = int(randomness.generator(0, "probe/held-out", len(first)).integers(2**32))
    count = max(math.ceil(share * len(first)), len(classes))
    split = StratifiedShuffleSplit(n_splits=1, test_size=count, random_state=seed)
    _, held = next(split.split(of_cluster[:, None], of_cluster))
    chosen = np.zeros(len(first), np.bool_)
    chosen[held] = True
    out: NDArray[np.bool_] = chosen[index]
    return out


def neighbours(train: Tensor, y: Tensor, test: Tensor, classes: int, k: int = NEIGHBOURS) -> Tensor:
    """Return the majority class among the k nearest training images by cosine similarity: [m, D] -> classes [m].

    Ties go to the lowest class number. Raises UserError for k out of range.
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
    """Return the class with the nearest mean over its training images (Euclidean): [m, D] -> classes [m]."""
    here = torch.zeros(classes, len(train), dtype=train.dtype, device=train.device)
    here[y, torch.arange(len(y), device=y.device)] = 1
    count = here.sum(-1, keepdim=True)
    means = here @ train / count.clamp_min(1)
    distance = torch.cdist(test, means, compute_mode="donot_use_mm_for_euclid_dist")
    distance[:, count[:, 0] == 0] = torch.inf  # never predict a class without training images
    return distance.argmin(-1)


@contextlib.contextmanager
def _threads(x: Tensor) -> Iterator[None]:
    """Use one thread for a small problem on a CPU, where several would spend most of their time waiting."""
    before = torch.get_num_threads()
    if x.device.type == "cpu" and x.numel() < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _array(x: Tensor) -> NDArray[np.float64]:
    return x.detach().cpu().double().numpy()


def _wide(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64
