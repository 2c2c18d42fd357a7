"""Places of a network where hook points are read and written during a pass, through nnsight.

A :class:`PointPlace` is one location in the order of execution, and serves one or several points. A :class:`Taker` is
whoever looks: it says which points it wants, gets each value, and returns the value to go on with. Tracing, caching,
hooks and patching are takers; where a point is, is written here and in ``layout`` alone.

Shapes: B images, N tokens, C width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from atdiag.analysis import sites
from atdiag.analysis.points.parts import affine, learned_tokens, normalised, positions
from atdiag.analysis.sites import Site
from atdiag.core.spec import Network
from atdiag.transfer import ops
from atdiag.transfer.observation import AttentionRecord
from atdiag.transfer.ops import QK


class Taker(Protocol):
    """Whoever reads and writes points during a pass."""

    def wants(self, name: str) -> bool:
        """Return whether a point is to be taken."""

    def take(self, name: str, value: Any) -> Any:
        """Return the value to go on with: the given object itself where nothing changes."""


@dataclass
class Pass:
    """One pass through the network."""

    root: Any
    """nnsight's envoy of the subject's module."""
    taker: Taker
    images: int
    unfused: frozenset[int] = frozenset()
    """Blocks whose attention is by the explicit formula, and runs fused during this pass so that it can be read."""
    mapped: frozenset[int] = frozenset()
    """Blocks of our network whose map is given."""
    kept: dict[str, Any] = field(default_factory=dict)
    """Values that a later place needs."""

    def take(self, name: str, value: Any) -> Any:
        """Pass a value to the taker if it wants the point; return the value to go on with."""
        return self.taker.take(name, value) if self.taker.wants(name) else value

    def wants(self, names: Sequence[str]) -> bool:
        """Return whether any of the points is wanted."""
        return any(self.taker.wants(name) for name in names)


class PointPlace(Protocol):
    """A location in the network."""

    @property
    def points(self) -> tuple[str, ...]:
        """Full names of its points, in the order in which they are taken."""

    def visit(self, on: Pass) -> None:
        """Read its points, and write those that the taker changed."""


@dataclass(frozen=True)
class Direct:
    """The input or the output of a module, as it is or seen as heads."""

    points: tuple[str, ...]
    path: str
    side: str = "output"
    heads: int = 0
    """Heads into which the last axis is split: [B, N, H d] -> [B, N, H, d]; 0: none."""
    swapped: bool = False
    """Whether the module sees [B, H, N, d] and the point is [B, N, H, d]."""
    total: str = ""
    """A key of ``Pass.kept``: if it is there, the value comes from it."""
    within: tuple[str, Site] | None = None
    """Block and site of our attention that calls the module: nnsight enters it first, since it can't go back."""

    def visit(self, on: Pass) -> None:
        """Take the value."""
        if not (on.wants(self.points) or self.total in on.kept):
            return
        if self.within is not None:
            block, site = self.within
            sites.node(site, on.root.get(block))
        envoy = on.root.get(self.path) if self.path else on.root
        own = getattr(envoy, self.side)
        value = given = on.kept.pop(self.total) if self.total in on.kept else own
        seen = value.transpose(1, 2) if self.swapped else value.unflatten(-1, (self.heads, -1)) if self.heads else value
        first = seen
        for name in self.points:
            seen = on.take(name, seen)
        if seen is not first:
            given = seen.transpose(1, 2) if self.swapped else seen.flatten(2) if self.heads else seen
        if given is not own:
            setattr(envoy, self.side, given)


@dataclass(frozen=True)
class Embedding:
    """Patches with the learned tokens before them, and position embeddings, in front of any norm and the blocks."""

    points: tuple[str, ...]
    patches: str
    """Path of the patch embedding."""
    stream: str
    """Path of the module that takes the sum of both."""
    side: str
    model: nn.Module

    def visit(self, on: Pass) -> None:
        """Take both, and write their sum."""
        if not on.wants(self.points):
            return
        patches = on.root.get(self.patches).output
        patches = patches.flatten(1, 2) if patches.ndim == 4 else patches
        parts = [token.expand(len(patches), -1, -1) for token in learned_tokens(self.model)]
        embed = first = torch.cat([*parts, patches], 1)
        embed = on.take(self.points[0], embed)
        position = whole = None
        if len(self.points) > 1:
            whole = positions(self.model).expand(len(patches), -1, -1)
            position = on.take(self.points[1], whole)
        if embed is first and position is whole:
            return
        # The network's own sum has the same terms in the same order.
        setattr(on.root.get(self.stream), self.side, embed if position is None else embed + position)


@dataclass(frozen=True)
class Norm:
    """A norm: its scale, and its value before weight and bias."""

    points: tuple[str, str]
    path: str
    norm: nn.Module

    def visit(self, on: Pass) -> None:
        """Take scale and normalised value; write the output where one of them is edited."""
        if not on.wants(self.points):
            return
        envoy = on.root.get(self.path)
        x = envoy.input
        centred, first = normalised(self.norm, x)
        scale = on.take(self.points[0], first)
        value = before = centred / scale
        value = on.take(self.points[1], value)
        if scale is not first or value is not before:
            envoy.output = affine(self.norm, value).to(x.dtype)


@dataclass(frozen=True)
class AttentionPlace:
    """The operation at which a block's q, k and v meet.

    Scores and pattern are computed from q and k when they are asked for. Where a hook may change them, the block goes
    on with the explicit formula; else its own fused operation stays.
    """

    points: tuple[str, ...]
    record: str
    """Name under which the whole record is taken (no hook point: :class:`AttentionRecord`)."""
    block: str
    layer: int
    site: Site
    network: Network

    def visit(self, on: Pass) -> None:
        """Take v, q, k, scores, pattern and z."""
        if not (on.wants(self.points) or on.taker.wants(self.record)):
            return
        envoy = on.root.get(self.block)
        site = replace(self.site, kind="given") if self.layer in on.mapped else self.site
        node = sites.node(site, envoy)
        own = sites.read(site, node, self.network, on.images, self.layer)
        if on.taker.wants(self.record):
            value = on.taker.take(self.record, own)
            if not isinstance(value, Tensor) and self.layer in on.unfused:
                value = self._formula(own)
            if isinstance(value, Tensor):  # the attention's output [B, H, N, d]
                sites.write_output(site, node, value)
                return
        if not on.wants(self.points):
            return
        record = self._operands(on, own)
        out = self._explicit(on, record)
        if out is None and self.layer in on.unfused:
            out = self._formula(record)
        if out is None and record is not own:
            out = sites.write_operands(site, node, record)
        if out is not None:
            sites.write_output(site, node, out)
        name = self._name("z")
        if on.taker.wants(name):
            z = sites.output(site, node).transpose(1, 2) if out is None else out.transpose(1, 2)
            new = on.taker.take(name, z)
            if new is not z:
                sites.write_output(site, node, new.transpose(1, 2))

    def _name(self, leaf: str) -> str:
        return f"blocks.{self.layer}.attn.hook_{leaf}"

    def _taken(self, on: Pass, leaf: str, x: Tensor) -> Tensor:
        """Take a value [B, H, N, d] as a point [B, N, H, d], if it is one of this place's."""
        name = self._name(leaf)
        if name not in self.points or not on.taker.wants(name):
            return x
        seen = x.transpose(1, 2)
        new: Tensor = on.taker.take(name, seen)
        return x if new is seen else new.transpose(1, 2)

    @staticmethod
    def _formula(record: AttentionRecord) -> Tensor:
        """Return the attention's output as the network's own explicit formula gives it."""
        assert record.v is not None
        return ops.attend(record.map, record.v, explicit=True)

    def _operands(self, on: Pass, own: AttentionRecord) -> AttentionRecord:
        assert own.v is not None
        if not isinstance(own.map, QK):
            v = self._taken(on, "v", own.v)
            return own if v is own.v else AttentionRecord(own.map, v)
        q, k, v = own.map.q, own.map.k, own.v
        for kind in ("", "rot_", "score_"):
            q, k = self._taken(on, f"{kind}q", q), self._taken(on, f"{kind}k", k)
            v = v if kind else self._taken(on, "v", v)
        if q is own.map.q and k is own.map.k and v is own.v:
            return own
        return AttentionRecord(own.map._replace(q=q, k=k), v)

    def _explicit(self, on: Pass, record: AttentionRecord) -> Tensor | None:
        """Take scores and pattern; return the output by the explicit formula if a hook may have changed them."""
        scores, pattern = self._name("attn_scores"), self._name("pattern")
        if not on.wants((scores, pattern)):
            return None
        assert record.v is not None
        edited = False
        if isinstance(record.map, QK):
            logits = first = ops.logits(record.map)
            logits = on.take(scores, logits)
            edited = logits is not first
            if not (edited or on.taker.wants(pattern)):
                return None
            p = logits.softmax(-1)
        else:
            p = ops.probabilities(record.map)
            p = p.expand(on.images, self.network.heads, self.network.tokens, self.network.tokens)
        own = p
        p = on.take(pattern, p)
        return p.to(record.v.dtype) @ record.v if edited or p is not own else None


@dataclass(frozen=True)
class Results:
    """Each head's part of the attention's output, [B, N, H, C], after LayerScale."""

    points: tuple[str]
    path: str
    """Path of the output projection."""
    linear: nn.Linear
    heads: int
    scale: nn.Parameter | Tensor | None
    total: str
    """The key under which a changed sum is kept for the place of ``hook_attn_out``."""

    def visit(self, on: Pass) -> None:
        """Compute the heads' parts, and keep their sum if they are edited."""
        (name,) = self.points
        if not on.taker.wants(name):
            return
        weight = self.linear.weight if self.scale is None else self.scale[:, None] * self.linear.weight
        z = on.root.get(self.path).input.unflatten(-1, (self.heads, -1))
        parts = torch.einsum("bnhd,chd->bnhc", z, weight.view(len(weight), self.heads, -1))
        new = on.taker.take(name, parts)
        if new is parts:
            return
        out = new.sum(2)
        if self.linear.bias is not None:
            out = out + (self.linear.bias if self.scale is None else self.scale * self.linear.bias)
        on.kept[self.total] = out


@dataclass(frozen=True)
class Middle:
    """The residual stream between a block's two branches."""

    points: tuple[str]
    path: str
    """Path of the module that takes it: the second norm, or the MLP."""

    def visit(self, on: Pass) -> None:
        """Take the value; keep a changed one for the sum at the block's end."""
        (name,) = self.points
        if not on.taker.wants(name):
            return
        envoy = on.root.get(self.path)
        own = envoy.input
        new = on.taker.take(name, own)
        if new is not own:
            envoy.input = new
            on.kept["middle"] = new


@dataclass(frozen=True)
class Branch:
    """The MLP's addition to the residual stream, and the stream after it with its slices."""

    points: tuple[str, ...]
    """``hook_mlp_out`` if the block has one, ``hook_resid_post``, then slices of it."""
    branch: str | None
    """Path of the module whose output is added; None: it can't be told from the attention's."""
    block: str
    slices: tuple[tuple[str, int, int], ...]
    """Point, first and last token (excluded); one token alone loses its axis."""

    def visit(self, on: Pass) -> None:
        """Take the branch, then the stream."""
        middle = on.kept.pop("middle", None)
        out = None
        if self.branch is not None and (middle is not None or on.taker.wants(self.points[0])):
            envoy = on.root.get(self.branch)
            own = envoy.output
            out = on.take(self.points[0], own)
            if out is not own:
                envoy.output = out
        if middle is None and not on.wants(self.points[self.branch is not None :]):
            return
        envoy = on.root.get(self.block)
        own = envoy.output
        x = own if middle is None else middle + out
        x = on.take(self.points[self.branch is not None], x)
        for name, first, last in self.slices:
            if on.taker.wants(name):
                part = x[:, first] if last - first == 1 and name.endswith("hook_cls") else x[:, first:last]
                new = on.taker.take(name, part)
                if new is not part:
                    new = new[:, None] if new.ndim == 2 else new
                    x = torch.cat([x[:, :first], new, x[:, last:]], 1)
        if x is not own:
            envoy.output = x


@dataclass(frozen=True)
class Halves:
    """The two halves of a packed gated MLP's first layer."""

    points: tuple[str, str]
    """``hook_pre``, which passes through the activation, and ``hook_pre_linear``, which multiplies it."""
    path: str
    gate_last: bool

    def visit(self, on: Pass) -> None:
        """Take both halves."""
        if not on.wants(self.points):
            return
        envoy = on.root.get(self.path)
        halves = envoy.output.chunk(2, dim=-1)
        gate, linear = reversed(halves) if self.gate_last else halves
        new = on.take(self.points[0], gate), on.take(self.points[1], linear)
        if new[0] is not gate or new[1] is not linear:
            envoy.output = torch.cat(new[::-1] if self.gate_last else new, -1)
