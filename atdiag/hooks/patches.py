"""Activation patching over many images: the effect of every head, position or block, with its interval.

    >>> from atdiag.analysis import images, subjects
    >>> from atdiag.hooks import patches
    >>> from atdiag.core.spec import Data
    >>> student, teacher = subjects.find("deit_s"), subjects.find("dinov2_reg_s")
    >>> pictures = images.choose(8, Data(name="digits", train=1, clutter=6), student.network)
    >>> found = patches.patch(student, teacher, pictures, what="pattern", by="head", layers=(0, 11))
    >>> found.change.shape
    (2, 2)

One network's values (a teacher's, say) are put into another's run on the same images, or a network's own values on
other images into its run; the rest of the network then runs on. Places, names and checks are those of ``patching`` and
of interventions, which replace whole maps and measure accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from atdiag.analysis import tracing
from atdiag.analysis.images import ImageSet
from atdiag.analysis.interventions import paired
from atdiag.analysis.points.names import act_name
from atdiag.analysis.replacements import check_tokens
from atdiag.analysis.similarity import pair_layers
from atdiag.analysis.subjects import Subject
from atdiag.core.errors import UserError, suggest
from atdiag.hooks import patching
from atdiag.hooks.cache import ActivationCache
from atdiag.hooks.model import HookedViT
from atdiag.hooks.patching import Setter
from atdiag.networks.weights.classes import HeadRows

if TYPE_CHECKING:
    import pandas as pd

By = Literal["layer", "head", "position"]
BY: tuple[By, ...] = get_args(By)
Measure = Literal["margin", "top1", "loss"]
"""``margin``: the class's logit minus the mean of the others; ``top1``: share of correct predictions, in per cent;
``loss``: cross-entropy, in nats. The class is the image's, or where the head's classes are unknown the prediction of
the unchanged network."""
MEASURES: tuple[Measure, ...] = get_args(Measure)

_HEADS = ("z", "q", "k", "v", "score_q", "score_k", "rot_q", "rot_k", "result")
_PATTERNS = ("pattern", "attn_scores")
_STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
POINTS = ("z", "pattern", "q", "k", "v", *_STREAM, *_HEADS[4:], "attn_scores")
"""Points that can be patched, by their short names."""
_ALIASES = {"map": "pattern", "logits": "attn_scores", "residual": "resid_post", "attn_head_out": "z"}


class _Kind(NamedTuple):
    setter: Setter
    axis: str | None
    """What the second index counts."""


@dataclass(frozen=True)
class Patched:
    """The effect of every patch. L layers, n heads or positions (1 by layer), m images."""

    a: str
    b: str
    what: str
    by: By
    measure: Measure
    layers: tuple[int, ...]
    """Blocks of the network that is changed, [L]."""
    before: NDArray[np.float64]
    """The measure of the unchanged run, by image [m]."""
    after: NDArray[np.float64]
    """The measure after each patch, [L, n, m]."""
    clusters: NDArray[np.int64] | None
    class_token: bool
    """Whether position 0 is a class token."""
    labelled: bool
    """Whether the measure is of the images' classes, not of the unchanged network's predictions."""
    head: HeadRows | None = None

    @property
    def change(self) -> NDArray[np.float64]:
        """The mean change of the measure, [L, n]."""
        out: NDArray[np.float64] = (self.after - self.before).mean(-1)
        return out

    @property
    def images(self) -> int:
        """The number of images."""
        return len(self.before)

    def frame(self) -> pd.DataFrame:
        """Tabulate one row for each patch: before, after, change with its 95 % interval, paired over images."""
        import pandas as pd

        lines = []
        for (i, layer), j in product(enumerate(self.layers), range(self.after.shape[1])):
            change, low, high = paired(self.after[i, j] - self.before, self.clusters)
            place: dict[str, int] = {} if self.by == "layer" else {self.by: j}
            values = {"before": float(self.before.mean()), "after": float(self.after[i, j].mean())}
            interval = {"change": change, "ci_low": low, "ci_high": high}
            lines.append({"a": self.a, "b": self.b, "what": self.what, "layer": layer, **place, **values, **interval})
        return pd.DataFrame(lines).assign(measure=self.measure, images=self.images)


def point(what: str) -> str:
    """Return the short name of a point that can be patched, from an alias too. Raises UserError."""
    name = _ALIASES.get(what, what)
    if name not in POINTS:
        known = (*POINTS, *_ALIASES)
        raise UserError(f"nothing named {what!r} can be patched{suggest(what, known)}", f"known: {', '.join(known)}")
    return name


def _kind(what: str, by: str) -> _Kind:
    """Return how one patch is made. Raises UserError for a point without such parts."""
    if by not in BY:
        raise UserError(f"`by` {by!r} is not one of {', '.join(BY)}{suggest(by, BY)}")
    if by == "layer":
        return _Kind(patching.layer_patch_setter, None)
    if by == "head":
        if what in _STREAM:
            raise UserError(f"{what} has no heads", "`by` position or layer")
        of_map = what in _PATTERNS
        setter = patching.layer_head_pattern_patch_setter if of_map else patching.layer_head_vector_patch_setter
        return _Kind(setter, "head")
    return _Kind(_row_setter if what in _PATTERNS else patching.layer_pos_patch_setter, "pos")


def _row_setter(value: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    """Put in the rows of one query of all heads of [B, H, N, N]; index: [layer, pos]."""
    value[:, :, index[1]] = clean[:, :, index[1]]
    return value


def check(
    a: Subject,
    b: Subject,
    what: str,
    by: str,
    layers: Sequence[int] | None = None,
    layer_map: Mapping[int, int] | None = None,
) -> tuple[tuple[int, int], ...]:
    """Return the pairs (block of A, block of B). Raises UserError for networks or parts that don't fit."""
    name = point(what)
    _kind(name, by)
    check_tokens(a, b)
    tracing.check_images([a, b])
    pairs = pair_layers(a, b, layers, layer_map)
    if name not in _PATTERNS and a.network.width // a.network.heads != b.network.width // b.network.heads:
        raise UserError(f"the heads of {a.label} and {b.label} are not equally wide", "`what` pattern")
    if name in _STREAM and a.network.width != b.network.width:
        raise UserError(f"{a.label} is {a.network.width} wide, {b.label} {b.network.width}", "`what` pattern")
    return pairs


def patch(
    a: Subject,
    b: Subject,
    pictures: ImageSet,
    what: str = "z",
    by: By = "head",
    measure: Measure = "margin",
    layers: Sequence[int] | None = None,
    layer_map: Mapping[int, int] | None = None,
    others: ImageSet | None = None,
    batch: int | None = None,
) -> Patched:
    """Put values of B into A, one block and head (or position) at a time; return the effect on A's output.

    others: images on which B is run, one for each of ``pictures``; None: the same. Only the patched points of one batch
    are kept. Raises UserError as :func:`check`.
    """
    pairs = check(a, b, what, by, layers, layer_map)
    if measure not in MEASURES:
        raise UserError(f"`measure` {measure!r} is not one of {', '.join(MEASURES)}{suggest(measure, MEASURES)}")
    if others is not None and len(others) != len(pictures):
        raise UserError(f"there are {len(pictures)} images and {len(others)} to take values from", "give as many")
    name, kind = point(what), _kind(point(what), by)
    mine, theirs = HookedViT(a), HookedViT(b)
    head = pictures.head_rows(a.head)
    labelled = head.rows is not None and pictures.labels is not None
    size = batch or tracing.batch_size(a.network, b.network)
    counts = {"head": a.network.heads, "pos": a.network.tokens, None: 1}[kind.axis]
    rows = [(layer,) if kind.axis is None else (layer, j) for layer, _ in pairs for j in range(counts)]
    before: list[Tensor] = []
    after: list[Tensor] = []
    index: list[NDArray[np.int64]] = []
    try:
        twos = pictures.batches(size, a.device) if others is None else others.batches(size, a.device)
        for one, two in zip(pictures.batches(size, a.device), twos, strict=True):
            if len(one.pixels) != len(two.pixels):
                raise UserError("some of these images can't be read", "choose others: each needs its partner")
            with torch.no_grad():
                own = mine(one.pixels)
                cache = _clean(mine, theirs, two.pixels, name, pairs)
            if labelled:
                assert head.rows is not None and one.labels is not None
                classes = torch.tensor(head.rows, device=a.device)[torch.as_tensor(one.labels, device=a.device)]
            else:
                classes = own.argmax(-1)
            score = _score(measure, classes)
            before.append(score(own))
            runs = patching.each_patch(mine, one.pixels, cache, kind.setter, name, rows)
            after.append(torch.stack([score(logits) for logits in runs]))
            index.append(one.index)
    finally:
        theirs.close()
        mine.close()
    where = np.concatenate(index)
    whole = torch.cat(after, 1).double().cpu().numpy()
    return Patched(
        a=a.label,
        b=b.label,
        what=name,
        by=by,
        measure=measure,
        layers=tuple(layer for layer, _ in pairs),
        before=torch.cat(before).double().cpu().numpy(),
        after=whole.reshape(len(pairs), counts, -1),
        clusters=None if pictures.clusters is None else pictures.clusters[where],
        class_token=a.network.class_token,
        labelled=labelled,
        head=head,
    )


def _clean(
    mine: HookedViT, theirs: HookedViT, pixels: Tensor, name: str, pairs: Sequence[tuple[int, int]]
) -> ActivationCache:
    """Return B's values on A's tokens, under the names of A's blocks."""
    wanted = {act_name(name, other) for _, other in pairs}
    _, cache = theirs.run_with_cache(pixels, sorted(wanted))
    fitted = patching.aligned(cache, mine)
    return ActivationCache(
        {act_name(name, own): fitted.cache_dict[act_name(name, other)] for own, other in pairs}, mine
    )


def _score(measure: Measure, classes: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function from logits [B, classes] to the measure of each image [B]."""

    def score(logits: Tensor) -> Tensor:
        logits = logits.float()
        own = logits.gather(1, classes[:, None])[:, 0]
        if measure == "top1":
            return 100.0 * (logits.argmax(-1) == classes)
        if measure == "loss":
            return F.cross_entropy(logits, classes, reduction="none")
        return own - (logits.sum(-1) - own) / (logits.shape[-1] - 1)

    return score
