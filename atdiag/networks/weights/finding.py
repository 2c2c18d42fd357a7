"""Find the ViTs in a checkpoint, through any nesting of containers and prefixes, and choose one of them.

Training code wraps a network again and again: ``module.`` (DDP), ``_orig_mod.`` (``torch.compile``), ``model.``,
``net.`` (Lightning), ``backbone.``, ``encoder.``; and puts its state dict under ``state_dict``, ``model``, ``student``
... beside averages, optimiser state and options. A network is wherever a key ends in that of the patch embedding, so
wrappers may come in any order.

Of several networks, this one is taken: the teacher, the student, any other, a momentum encoder, in this order; a moving
average only if it is requested. Ties are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from atdiag.core.text import shortlist
from atdiag.networks.weights.sources import Branch, WeightsError

ANCHOR = "patch_embed.proj.weight"
"""The key of the patch embedding in timm's names."""
FLEXIBLE = "embeds.proj.weight"
"""Likewise in timm's NaFlexVit."""
TRANSFORMERS = ("embeddings.patch_embeddings.projection.weight", "embeddings.patch_embedding.weight")
"""Likewise in those of Hugging Face's transformers."""
_DEEPEST = 4
"""Levels of containers that are searched."""

_CONTAINERS = ("teacher", "student", "state_dict", "model", "module", "")
"""Names of the outermost entry, the preferred one first; "" is the top level, and others come last."""
_AVERAGES = (
    *("state_dict_ema", "model_ema", "ema", "ema_state_dict", "model_ema_state_dict", "ema_model"),
    *("state_dict_average", "average", "averaged_model"),
)
"""Names that mark a moving average of the weights: timm's, DeiT's, and others'."""
_MOMENTUM = ("momentum_encoder",)
_WRAPPERS = frozenset(
    {
        *("module", "_orig_mod", "model", "net", "network", "backbone", "encoder", "student", "teacher", "state_dict"),
        *("base_encoder", *_MOMENTUM, *_AVERAGES),
        *("vit", "deit", "beit", "dinov2", "dinov2_with_registers", "data2vec_vision", "vision_model"),
    }
)
"""Names of wrappers. A network under another name is taken too, unless one under these is there."""
_ROLES = ("teacher", "student", "", "momentum")


@dataclass(frozen=True)
class Location:
    """Where a network is in a checkpoint."""

    containers: tuple[str, ...]
    prefix: str
    """Of its keys: ``module.backbone.``."""
    tensors: Mapping[str, Tensor]
    """All tensors of its container, other networks' included."""
    transformers: bool = False
    """Whether its keys are those of Hugging Face's transformers."""

    def __str__(self) -> str:
        """Return ``state_dict: module.base_encoder.*``."""
        return f"{' / '.join(self.containers)}{': ' if self.containers else ''}{self.prefix}*"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its wrappers, from outside."""
        return (*self.containers, *filter(None, self.prefix.split(".")))

    @property
    def average(self) -> str:
        """The name that marks it as a moving average; empty if it is none."""
        return next((name for name in self.names if name in _AVERAGES), "")

    @property
    def role(self) -> str:
        """What it is among several networks: ``teacher``, ``student``, ``momentum``, or empty."""
        if any(name in _MOMENTUM for name in self.names):
            return "momentum"
        return next((role for role in ("teacher", "student") if role in self.names), "")

    @property
    def _rank(self) -> tuple[int, bool, int]:
        outer = self.containers[0] if self.containers else ""
        known = all(name in _WRAPPERS for name in self.names)
        order = _CONTAINERS.index(outer) if outer in _CONTAINERS else len(_CONTAINERS)
        return _ROLES.index(self.role), not known, order


@dataclass(frozen=True)
class Choice:
    """The network that was taken, and those beside it."""

    place: Location
    averages: tuple[str, ...]
    """Names that mark moving averages in the file, taken or not."""
    others: tuple[Location, ...]
    """Other networks that are no averages."""

    @property
    def note(self) -> str:
        """Which network was taken from a file that holds several; empty for other files."""
        return "; ".join(filter(None, (self._of_averages(), self._of_pair())))

    def _of_averages(self) -> str:
        if not self.averages:
            return ""
        taken = " / ".join(self.place.containers) or self.place.prefix.rstrip(".") or "its top level"
        if self.place.average:
            return f"the moving average ({taken}) was taken, not the raw weights beside it"
        average = self.averages[0]
        return f"the raw weights ({taken}) were taken; the file also holds their moving average ({average}): FILE#ema"

    def _of_pair(self) -> str:
        for role, other in (("teacher", "student"), ("student", "teacher")):
            beside = [place for place in self.others if place.role == other]
            if self.place.role == role and beside:
                return (
                    f"the {role} network ({self.place}) was taken; the file also holds the {other} "
                    f"({beside[0]}): FILE#{other}"
                )
        return ""


def choose(contents: Mapping[str, Any], branch: Branch) -> Choice:
    """Return one of the networks in a checkpoint.

    Raises WeightsError, listing what there is: if there is no ViT, none of the requested branch, or no reason to prefer
    one of several.
    """
    found = list(_networks(contents, ()))
    if not found:
        raise WeightsError(
            f"no ViT is in the file: no key ends in {ANCHOR!r} (timm's name) or {TRANSFORMERS[0]!r} (transformers'); "
            f"it has {shortlist(map(str, contents))}"
        )
    averages = tuple(dict.fromkeys(sorted(filter(None, (one.average for one in found)), key=_AVERAGES.index)))
    candidates = _of_branch(found, branch, averages, contents)
    best = min(one._rank for one in candidates)
    first = [one for one in candidates if one._rank == best]
    if branch == "ema":
        first = [one for one in first if one.average == averages[0]] or first
    if len(first) > 1:
        told = shortlist(repr(one.prefix) for one in first)
        raise WeightsError(
            f"the file holds {len(first)} networks, with keys that begin with {told}",
            "save the state dict of one of them",
        )
    return Choice(first[0], averages, tuple(one for one in found if one is not first[0] and not one.average))


def _of_branch(
    found: list[Location], branch: Branch, averages: tuple[str, ...], contents: Mapping[str, Any]
) -> list[Location]:
    raw = [one for one in found if not one.average]
    if branch == "ema":
        if not averages:
            raise WeightsError(
                f"the file holds no moving average of the weights; it has {shortlist(map(str, contents))}",
                "leave #ema out",
            )
        return [one for one in found if one.average]
    if branch in ("student", "teacher"):
        if not (of_role := [one for one in raw if one.role == branch]):
            raise WeightsError(
                f"the file holds no network marked as {branch}; it has {shortlist(map(str, found))}",
                f"leave #{branch} out",
            )
        return of_role
    if not raw:
        raise WeightsError(f"the file holds a moving average alone ({averages[0]})", "add #ema to its name to use that")
    return raw


def _networks(entry: Mapping[str, Any], containers: tuple[str, ...]) -> Iterator[Location]:
    tensors = {str(key): value for key, value in entry.items() if isinstance(value, Tensor)}
    for key in tensors:
        for anchor in (ANCHOR, FLEXIBLE, *TRANSFORMERS):
            if key == anchor or key.endswith(f".{anchor}"):
                yield Location(containers, key.removesuffix(anchor), tensors, anchor in TRANSFORMERS)
    if len(containers) < _DEEPEST:
        for name, value in entry.items():
            if isinstance(value, Mapping):
                yield from _networks(value, (*containers, str(name)))
