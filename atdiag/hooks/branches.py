"""How much each block's attention adds to the stream."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from atdiag.analysis.images import ImageSet
from atdiag.analysis.subjects import Subject
from atdiag.hooks.model import HookedViT


def branch_gains(subject: Subject, pictures: ImageSet) -> NDArray[np.float64]:
    """Return the gain of each block's attention branch [L]: the mean over images and tokens of ||branch|| / ||stream||.

    The branch is what is added to the stream, after LayerScale. NaN for a block that adds none by itself.
    """
    model = HookedViT(subject)
    depth = subject.network.depth
    pairs = {n: (f"blocks.{n}.hook_resid_pre", f"blocks.{n}.hook_attn_out") for n in range(depth)}
    pairs = {n: pair for n, pair in pairs.items() if {*pair} <= model.hook_dict.keys()}
    sums, images = np.full(depth, np.nan), 0
    if not pairs:
        return sums
    for n in pairs:
        sums[n] = 0
    with torch.no_grad():
        for batch in pictures.batches(32):
            _, cache = model.run_with_cache(batch.pixels, [name for pair in pairs.values() for name in pair])
            images += len(batch.pixels)
            for n, (stream, branch) in pairs.items():
                ratio = cache[branch].norm(dim=-1) / cache[stream].norm(dim=-1)
                sums[n] += float(ratio.mean(-1).double().sum())
    return sums / images
