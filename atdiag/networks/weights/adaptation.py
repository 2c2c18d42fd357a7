"""What a user's own file says about its architecture where fine-tuning changes it: the head's classes and the pooling.

timm's name gives the published architecture; a file fine-tuned from it has a head for other classes or none, and MAE's
and BEiT's fine-tuning pools the patches, with ``fc_norm`` in place of ``norm``. Neither changes a map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atdiag.networks.weights.sources import Source, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

HEAD, HEAD_BIAS, FC_NORM = "head.weight", "head.bias", "fc_norm.weight"


def planned(source: Source, path: Path | None) -> Source:
    """Return a source as its file's outline adapts it, without loading a tensor. Raises WeightsError, naming the file.

    A branch that is the default's network becomes the default, so that equal weights have equal specs.
    """
    if source.file is None or path is None:
        return source
    from atdiag.networks.weights import files, formats

    contents = files.outline(path)
    try:
        found = formats.convert(contents, source.branch)
        if source.branch in ("student", "teacher") and formats.convert(contents).branch == found.branch:
            source = replace(source, branch="weights")
    except WeightsError as fault:
        raise WeightsError(f"{path}: {fault}") from None
    return adapted(source, found.state)


def adapted(source: Source, state: Mapping[str, Tensor]) -> Source:
    """Return a source with the constructor arguments that a user's file tells; those that were given are kept."""
    if source.file is None:
        return source
    told: dict[str, Any] = {}
    if "num_classes" not in source.arguments:
        told["num_classes"] = _classes(state)
    if FC_NORM in state and "norm.weight" not in state and "global_pool" not in source.arguments:
        told |= _pooling(source)
    return replace(source, arguments={**source.arguments, **told})


def _classes(state: Mapping[str, Tensor]) -> int:
    """Return the rows of the head; 0 without one."""
    weight = state.get(HEAD)
    return int(weight.shape[0]) if weight is not None and weight.ndim == 2 else 0


def _pooling(source: Source) -> dict[str, Any]:
    from atdiag.networks.timm import architectures

    model = architectures.build(source, architectures.native_size(source), meta=True)
    return {} if FC_NORM in model.state_dict() else {"global_pool": "avg"}
