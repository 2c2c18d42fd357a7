"""Factors of residual branches at a step: stochastic depth, also of the teacher, and a warm-up of attention."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from atdiag.core import randomness
from atdiag.core.spec import RunSpec


def branch_factors(spec: RunSpec, step: int, total: int, samples: np.ndarray) -> Tensor | None:
    """Return the factors of both branches of each block at a step, [depth, 2, B, 1, 1]; None where all are 1.

    Drop path's (:func:`drop_path`), and for the attention branch a warm-up: at step s of the first ``branch_warmup``
    of all steps, W of them, its factor is s / W.
    """
    depth = spec.network.depth
    keep = drop_path(spec.recipe.drop_path, depth, spec.seed.model, step, samples)
    warmup = round(spec.recipe.branch_warmup * total)
    if step >= warmup:
        return keep
    if keep is None:
        keep = torch.ones(depth, 2, len(samples), 1, 1)
    keep[:, 0] *= step / warmup
    return keep


def teacher_drops(spec: RunSpec) -> tuple[int, float] | None:
    """Return what decides which of its teacher's branches are dropped (seed and rate); None if it is always whole."""
    return (spec.seed.model, spec.recipe.drop_path) if spec.transfer.shared_drop_path else None


def teacher_factors(spec: RunSpec, step: int, samples: np.ndarray) -> Tensor | None:
    """Return the factors of the teacher's branches at a step, as :func:`drop_path`: its student's, if it shares them.

    None where the teacher is whole.
    """
    if not spec.transfer.shared_drop_path:
        return None
    return drop_path(spec.recipe.drop_path, spec.network.depth, spec.seed.model, step, samples)


def drop_path(rate: float, depth: int, seed: int, step: int, samples: np.ndarray) -> Tensor | None:
    """Return drop-path factors [depth, 2, B, 1, 1] (attention and MLP branch of each block): 0 or 1 / (1 - rate).

    The rate rises linearly from 0 at the first block (Huang et al. 2016; timm's rule). Each factor depends on seed,
    step, layer and sample alone.
    """
    if rate == 0:
        return None
    rates = np.linspace(0, rate, depth)[:, None, None]
    draws = randomness.uniform(seed, "drop_path", step, np.arange(2 * depth).reshape(depth, 2, 1), samples)
    factors = np.where(draws >= rates, 1 / (1 - rates), 0.0).astype(np.float32)
    return torch.from_numpy(factors)[..., None, None]
