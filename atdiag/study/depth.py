"""Accuracy over depth: probe results for each layer of an arm's runs, with intervals over seeds and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from atdiag.stats.contrasts import Outcomes, estimate

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from atdiag.analysis.probing import Probed


def frame(arms: Mapping[str, Sequence[Probed]], level: float = 0.95) -> pd.DataFrame:
    """Tabulate accuracy in per cent by layer, probe and tokens, with intervals, one row each.

    arms: name -> the runs of one condition (or one network alone), all probed on the same images. Columns: subject,
    layer (-1: the network itself), probe (linear, knn, centroid, head: early exit, itself), tokens (class, patch, both,
    empty), top1, ci_low, ci_high (cut off at 0 and 100), interval_covers, seeds, images, clusters, train, penalty (the
    geometric mean over seeds), held_out (training images that it was chosen on; 0: it is fixed). Intervals are of the
    test images and of seeds (``contrast``), given the images that the probes were fitted to. Raises ValueError for runs
    of one arm that were probed in different layers.
    """
    import pandas as pd

    lines: list[dict[str, Any]] = []
    for name, runs in arms.items():
        first = runs[0]
        if any(run.layers != first.layers for run in runs):
            raise ValueError(f"the runs of {name} were probed in different layers")
        for probe, tokens in first.correct:
            for i, layer in enumerate(first.layers):
                line = {"subject": name, "layer": layer, "probe": probe, "tokens": tokens}
                line |= _accuracy([run.correct[probe, tokens][i] for run in runs], first, level)
                if probe == "linear" and tokens:
                    line["penalty"] = float(np.exp(np.mean([np.log(run.penalties[tokens][i]) for run in runs])))
                    line["held_out"] = first.held_out
                lines.append(line)
        own = [run.itself for run in runs if run.itself is not None]
        if len(own) == len(runs):
            line = {"subject": name, "layer": -1, "probe": "itself", "tokens": ""}
            lines.append(line | _accuracy(own, first, level))
    return pd.DataFrame(lines)


def _accuracy(correct: Sequence[NDArray[np.bool_]], first: Probed, level: float) -> dict[str, Any]:
    clusters = first.clusters.astype(np.int32)
    found = estimate({"": Outcomes(dict(enumerate(correct)), clusters)}, {"": 1}, level)
    return {
        "top1": found.value,
        "ci_low": max(found.low, 0.0),
        "ci_high": min(found.high, 100.0),
        "interval_covers": found.covers,
        "seeds": found.seeds,
        "images": found.images,
        "clusters": found.clusters,
        "train": first.train,
    }
