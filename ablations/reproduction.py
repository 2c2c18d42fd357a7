"""Which analyses ``atdiag reproduce`` makes: all of the 2026 paper's, at each profile; and a few of each, quickly.

Data, not code: for each ablation its options. An option with several values in a tuple is varied over them, and the
studies are read together. Teachers are those that the paper is known to have used for that analysis, where the profile
has them; at mini the nearest architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

from ablations.benchmark import benchmark
from ablations.datasets import datasets
from ablations.epochs import epochs
from ablations.layers import layers
from ablations.losses import losses
from ablations.match import match
from ablations.ood import ood
from ablations.recipes import recipes
from ablations.reinit import reinit
from ablations.rescue import rescue
from ablations.sizes import sizes
from atdiag.study.ablation import Series, Study

ABLATIONS: dict[str, Callable[..., Study | Series]] = {
    "benchmark": benchmark,
    "sizes": sizes,
    "epochs": epochs,
    "datasets": datasets,
    "ood": ood,
    "reinit": reinit,
    "layers": layers,
    "match": match,
    "rescue": rescue,
    "losses": losses,
    "recipes": recipes,
}
"""In the order of the paper."""

_FAILING = "dinov2_s,dinov2_reg_s,clip_b,beitv2_b"

_FULL: dict[str, dict[str, Any]] = {
    "benchmark": {"teacher": "all"},
    "sizes": {"family": "all"},
    "epochs": {"teacher": "deit_s,dino_s,dinov2_s,dinov2_reg_s"},
    "datasets": {"teacher": "deit_s,dino_s,dinov2_s,dinov2_reg_s"},
    "ood": {"teacher": f"deit_s,{_FAILING}"},
    "reinit": {"module": ("mlp", "attn"), "teacher": "deit_s,dinov2_s,clip_b"},
    "layers": {"from_": "both", "k": "3,6,9", "teacher": "dinov2_s"},
    "match": {"teacher": "all"},
    "rescue": {"teacher": _FAILING},
    "losses": {"teacher": "deit_s,dinov2_s"},
    "recipes": {"teacher": "all"},
}

_MINI = _FULL | {
    "epochs": {"teacher": "deit_s,dinov2_s"},
    "datasets": {"teacher": "deit_s,dinov2_s,dinov2_reg_s"},
}
"""DINO's architecture at this size is DeiT's."""

_FEW = "deit_s,dinov2_s,clip_b"

_QUICK = _FULL | {
    "benchmark": {"teacher": _FEW, "methods": "copy,distill"},
    "sizes": {"family": "dinov2", "methods": "copy"},
    "epochs": {"teacher": "deit_s,dinov2_s", "epochs": "2,4"},
    "datasets": {"teacher": "deit_s,dinov2_s"},
    "ood": {"teacher": "deit_s,dinov2_s", "methods": "copy"},
    "reinit": {"module": ("mlp", "attn"), "teacher": "deit_s,dinov2_s"},
    "layers": {"from_": "both", "k": "6", "teacher": "dinov2_s"},
    "match": {"teacher": _FEW},
    "rescue": {"teacher": "dinov2_s"},
    "losses": {"teacher": "dinov2_s", "losses": "ce,jsd", "weights": "0.3,30"},
    "recipes": {"teacher": _FEW},
}


def options(profile: str, quick: bool) -> Mapping[str, Mapping[str, Any]]:
    """For each ablation its options."""
    return _QUICK if quick else _MINI if profile == "mini" else _FULL


def combinations(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The options with every combination of those that are varied.

    >>> combinations({"module": ("mlp", "attn"), "teacher": "clip_b"})
    [{'module': 'mlp', 'teacher': 'clip_b'}, {'module': 'attn', 'teacher': 'clip_b'}]
    """
    values = [value if isinstance(value, tuple) else (value,) for value in options.values()]
    return [dict(zip(options, chosen, strict=True)) for chosen in product(*values)]
