"""Outcomes of made-up arms."""

from __future__ import annotations

import numpy as np

from atdiag.stats.contrasts import Estimate, Outcomes

DIFFERENCE = {"a": 1.0, "b": -1.0}


def arms_of(correct: np.ndarray, clusters: np.ndarray, names: str = "abcdefgh") -> dict[str, Outcomes]:
    """Make arms named a, b, c ... with seeds 0, 1, 2 ... from an array [arm, S, n]."""
    return {
        name: Outcomes(dict(enumerate(of_arm)), clusters.astype(np.int32))
        for name, of_arm in zip(names, correct, strict=False)
    }


def random_arms(
    seed: int, arms: int = 2, seeds: int = 3, clusters: int = 20, unequal: bool = False
) -> dict[str, Outcomes]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, clusters) if unequal else np.full(clusters, 3)
    ids = rng.permutation(np.repeat(rng.permutation(1000)[:clusters], sizes))
    logits = rng.normal(size=ids.size) + rng.normal(size=(arms, seeds, 1)) + rng.normal(size=(arms, seeds, ids.size))
    return arms_of(logits > 0, ids)


def numbers(e: Estimate) -> list[float]:
    """Return an estimate as numbers."""
    return [e.value, e.low, e.high, e.p, e.df, e.se, e.var_seed or 0, e.var_cluster, e.var_residual or 0]
