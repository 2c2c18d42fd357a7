"""Networks of the user's beside subjects by reference."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from atdiag.analysis.subjects import Subject, find_all, of
from atdiag.core.spec import Data
from atdiag.data import sources as data_sets

if TYPE_CHECKING:
    from atdiag.core.runs import Store


def find_among(
    given: Sequence[str | nn.Module],
    profile: str,
    data: Data,
    store: Store | None = None,
    asked: Collection[str] = (),
) -> tuple[list[Subject], Data]:
    """Return the subjects of references and of networks, in order, and the data set, as :func:`find_all` does.

    Real images have the size that the first network sees, unless a run or the user determines it. A network is named
    by its timm architecture or its class.
    """
    modules = [one for one in given if isinstance(one, nn.Module)]
    found = {id(one): of_module(one) for one in modules}
    references = [one for one in given if not isinstance(one, nn.Module)]
    if modules and "data.image_size" not in asked:
        data = data_sets.find(data).resized(data, found[id(modules[0])].network.image_size)
    named, data = find_all(references, profile, data, store, asked)
    rest = iter(named)
    return [found[id(one)] if isinstance(one, nn.Module) else next(rest) for one in given], data


def of_module(model: nn.Module) -> Subject:
    """Return a network of the user's as a subject, with a name and an id of its own: see :func:`of`."""
    config = getattr(model, "pretrained_cfg", None) or {}
    label = str(config.get("architecture") or type(model).__name__)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return replace(of(copy.deepcopy(model), label), id=digest.hexdigest())
