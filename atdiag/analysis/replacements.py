"""Replacements for a network's attention: another network's, or a modified version of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from atdiag.analysis import streaming, tracing
from atdiag.analysis.similarity import pair_layers
from atdiag.analysis.sites import joined
from atdiag.analysis.subjects import Subject
from atdiag.analysis.tracing import Layer, Traced
from atdiag.core.errors import UserError, suggest
from atdiag.core.spec import Network
from atdiag.transfer import ops
from atdiag.transfer.attention import AttentionOverride, Heads, split_heads
from atdiag.transfer.ops import QK, Averaged, Map

Part = Literal["map", "q", "k", "v"]
PARTS: tuple[Part, ...] = get_args(Part)

Change = Literal["own", "uniform", "identity", "shuffled", "no-sinks"]
"""Replacements other than another network's attention. ``own``: the network's own, unchanged; ``uniform``: every query
attends to all tokens equally; ``identity``: to itself alone; ``shuffled``: the network's own for another image;
``no-sinks``: its own without the token that gets most of the attention (the largest column mean of the map, for each
head and image), renormalised."""

CHANGES: tuple[Change, ...] = get_args(Change)


@dataclass(frozen=True)
class Replacement:
    """A replacement of attention in some blocks and heads of a network."""

    source: Change | Subject
    part: Part = "map"
    layers: tuple[int, ...] | None = None
    """Blocks of the intervened network; None: all."""
    heads: tuple[int, ...] | None = None
    """Heads; None: all."""
    layer_map: Mapping[int, int] | None = None
    """Block -> block of the source network, where they differ."""

    @property
    def label(self) -> str:
        """Short label, such as ``q of clip_b (mini)`` or ``shuffled map``."""
        source = self.source
        return f"{self.part} of {source.label}" if isinstance(source, Subject) else f"{source} {self.part}"


# --- replacement values --------------------------------------------------------------------------------------------


def without_sinks(p: Tensor) -> Tensor:
    """Remove from maps [B, H, N, N] the key with the largest column mean, per image and head; rows sum to one again.

    A row with no other weight becomes uniform over the other tokens.
    """
    p = p.clone()
    sink = p.mean(-2).argmax(-1)[..., None, None].expand(*p.shape[:-1], 1)
    p.scatter_(-1, sink, 0.0)
    rest = p.sum(-1, keepdim=True)
    other = torch.full_like(p, 1 / (p.shape[-1] - 1)).scatter_(-1, sink, 0.0)
    return torch.where(rest > 1e-6, p / rest.clamp_min(1e-6), other)


def _changed(kind: str, part: Part, layer: Layer, tokens: int) -> Map | Tensor:
    """Return a network's own map, q, k or v after a modification."""
    if part != "map":
        own = layer.tensor(part)
        return own if kind == "own" else own.roll(1, 0)
    map = layer.used
    if kind == "own":
        return map
    like = map.q if isinstance(map, QK) else map.p
    if kind == "uniform":
        return Averaged(like.new_full((1, 1, 1, tokens), 1 / tokens))
    if kind == "identity":
        return Averaged(torch.eye(tokens, dtype=like.dtype, device=like.device)[None, None])
    if kind == "shuffled":
        return (
            map._replace(q=map.q.roll(1, 0), k=map.k.roll(1, 0)) if isinstance(map, QK) else Averaged(map.p.roll(1, 0))
        )
    return Averaged(without_sinks(ops.probabilities(map)))


# --- checks --------------------------------------------------------------------------------------------------------


def check(subject: Subject, one: Replacement) -> tuple[tuple[int, int], ...]:
    """Return the pairs (intervened block, source block) of a replacement. Raises UserError."""
    if one.part not in PARTS:
        raise UserError(
            f"nothing named {one.part!r} can be replaced{suggest(one.part, PARTS)}", f"known: {', '.join(PARTS)}"
        )
    streaming.check_heads(subject, one.heads)
    source, network = one.source, subject.network
    if not isinstance(source, Subject):
        if source not in CHANGES:
            raise UserError(f"unknown change {source!r}{suggest(source, CHANGES)}", f"known: {', '.join(CHANGES)}")
        if one.part != "map" and source not in ("own", "shuffled"):
            raise UserError(f"{source} can replace a map, not {one.part}", "leave `what` out")
        layers = tracing.request(subject, (), one.layers).layers
        pairs = tuple((layer, layer) for layer in layers)
    else:
        check_tokens(subject, source)
        theirs = source.network
        width = theirs.width // theirs.heads
        if one.part != "map" and width != network.width // network.heads:
            raise UserError(
                f"{source.label}'s heads are {width} wide, {subject.label}'s {network.width // network.heads}: "
                f"only its map can be put in",
                "use `what` map",
            )
        tracing.check_images([subject, source])
        pairs = pair_layers(subject, source, one.layers, one.layer_map)
    _check_copied(subject, one, [layer for layer, _ in pairs])
    return pairs


def check_tokens(subject: Subject, source: Subject) -> None:
    """Raise UserError unless two networks have the same heads and compatible tokens."""
    mine, theirs = subject.network, source.network
    wanted = f"{mine.heads} heads, {mine.grid} x {mine.grid} patches, {'a' if mine.class_token else 'no'} class token"
    hint = f"use a network with {wanted}"
    lost = ""
    if mine.heads != theirs.heads:
        lost = f"has {theirs.heads} heads, and {subject.label} has {mine.heads}"
    elif mine.grid != theirs.grid:
        lost = f"has {theirs.grid} x {theirs.grid} patches, and {subject.label} has {mine.grid} x {mine.grid}"
    elif mine.class_token != theirs.class_token:
        lost = f"has {'a' if theirs.class_token else 'no'} class token, and {subject.label} has "
        lost += "one" if mine.class_token else "none"
    elif mine.registers not in (0, theirs.registers):
        lost = f"has {theirs.registers} registers, and {subject.label} has {mine.registers}"
        hint += f" and {mine.registers} registers"
    if lost:
        raise UserError(f"{source.label} {lost}", hint)


def _check_copied(subject: Subject, one: Replacement, layers: Sequence[int]) -> None:
    """Raise UserError if a replacement conflicts with the part of its attention that a copy-student copies."""
    transfer = subject.transfer
    copied = sorted(set(layers) & set(transfer.layers)) if transfer.method == "copy" else []
    if not copied:
        return
    if transfer.tensor == "map" and one.part == "map" and (transfer.takes_all_heads or one.heads is None):
        return
    if transfer.tensor == one.part and one.heads is None:
        return
    raise UserError(
        f"{subject.label} copies the {transfer.tensor} of its teacher in layers {', '.join(map(str, copied))}: "
        f"its {one.part} can't be replaced there",
        f"choose other `layers`, or replace the {transfer.tensor} of all heads",
    )


def _given(
    subject: Subject, one: Replacement, layer: int, value: Map | Tensor, before: Mapping[int, AttentionOverride]
) -> AttentionOverride:
    """Return a block's override under a replacement, on top of its teacher's override, if any."""
    if one.heads is None or len(one.heads) == subject.network.heads:
        return AttentionOverride(one.part, value)
    heads = split_heads(one.heads, subject.network.heads, subject.device)
    copied = before.get(layer)
    if copied is None:
        return AttentionOverride(one.part, _of_heads(value, heads), heads)
    assert not isinstance(value, Tensor) and not isinstance(copied.value, Tensor)
    part, rest = _of_heads(value, heads), copied.value.select_heads(heads.rest)
    assert not isinstance(part, Tensor)
    return AttentionOverride("map", joined(part, rest, heads))


def _of_heads(value: Map | Tensor, heads: Heads) -> Map | Tensor:
    return value[:, heads.part] if isinstance(value, Tensor) else value.select_heads(heads.part)


def givens(
    subject: Subject,
    one: Replacement,
    pairs: tuple[tuple[int, int], ...],
    own: Traced,
    shown: Mapping[int, Traced],
    before: Mapping[int, AttentionOverride],
) -> dict[int, AttentionOverride]:
    """Return the overrides of a network's blocks under a replacement, for a batch.

    own: trace of the unchanged network; shown: traces of the other networks, by the identity of their subjects; before:
    overrides from its teacher.
    """
    out = {}
    for layer, theirs in pairs:
        value: Map | Tensor
        if isinstance(one.source, Subject):
            value = _fitted(shown[id(one.source)].layers[theirs], one, subject)
        else:
            value = _changed(one.source, one.part, own.layers[layer], subject.network.tokens)
        out[layer] = _given(subject, one, layer, value, before)
    return out


def kept_tokens(theirs: Network, mine: Network) -> list[int] | None:
    """Return the indices of a network's tokens that another also has, which may lack its registers; None: all."""
    if theirs.registers <= mine.registers:
        return None
    return [*range(int(theirs.class_token)), *range(theirs.prefix_tokens, theirs.tokens)]


def _fitted(layer: Layer, one: Replacement, subject: Subject) -> Map | Tensor:
    """Restrict another network's map, q, k or v to this one's tokens: extra registers are sliced off before softmax."""
    assert isinstance(one.source, Subject)
    kept = kept_tokens(one.source.network, subject.network)
    if one.part != "map":
        tensor = layer.tensor(one.part)
        return tensor if kept is None else tensor[:, :, kept]
    if kept is None:
        return layer.used
    if isinstance(layer.used, QK):
        return layer.used.select(torch.tensor(kept, device=layer.used.q.device))
    p = ops.probabilities(layer.used)
    p = p[:, :, kept][..., kept]
    return Averaged(p / p.sum(-1, keepdim=True))
