"""Trace the internal activations of any network with nnsight, without modifying the network.

Where its attention is fused, queries and keys are read as they enter the kernel, and a layer's map is computed from
them on request. Shapes: B images, H heads, N tokens, d head width, C width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from atdiag.analysis import sites
from atdiag.analysis.points.names import TRACED
from atdiag.analysis.points.running import Runner
from atdiag.analysis.sites import TracingError
from atdiag.analysis.subjects import Subject
from atdiag.core.errors import UserError, suggest
from atdiag.core.spec import Network
from atdiag.networks.model.vit import ViT
from atdiag.transfer import ops
from atdiag.transfer.attention import AttentionOverride
from atdiag.transfer.observation import AttentionRecord
from atdiag.transfer.ops import QK, Averaged, Map

What = Literal["map", "logits", "q", "k", "v", "attn", "mlp", "residual"]
"""Short names of hook points (``points.names.TRACED``): ``map`` [B, H, N, N], its ``logits`` before softmax [B, H, N,
N]; ``q``, ``k``, ``v`` [B, H, N, d] as they enter the product; ``attn`` and ``mlp``, the outputs of the block's two
modules, before LayerScale [B, N, C]; ``residual``, the residual stream at the block's output [B, N, C]."""

WHAT: tuple[What, ...] = get_args(What)
PER_HEAD: frozenset[What] = frozenset({"map", "logits", "q", "k", "v"})
_OF_QK: frozenset[What] = frozenset({"logits", "q", "k"})
"""Quantities available only if a map is given by its queries and keys."""

BATCH = 64
"""Images traced at a time, unless one layer's maps would then exceed ``_MOST`` elements."""
_MOST = 2**25


@dataclass(frozen=True)
class Layer:
    """The traced values of one block; None where not requested."""

    map: Map | None = None
    v: Tensor | None = None
    attn: Tensor | None = None
    mlp: Tensor | None = None
    residual: Tensor | None = None

    @property
    def used(self) -> Map:
        """The map that the block used: by q and k if available, else as a tensor."""
        if self.map is None:
            raise TracingError("no map was requested")
        return self.map

    def tensor(self, what: What, heads: Sequence[int] | None = None) -> Tensor:
        """Return one quantity by name, shaped as in :data:`What`, for some heads, in float32 or better.

        Raises TracingError for q, k or logits of a map that was given as a tensor.
        """
        out = self._whole(what)
        return out[:, list(heads)] if heads is not None and what in PER_HEAD else out

    def _whole(self, what: What) -> Tensor:
        if what == "map":
            return ops.probabilities(self.used)
        if what in ("logits", "q", "k"):
            if not isinstance(self.map, QK):
                raise TracingError(f"there is no {what} to be read: the map is there as a tensor alone")
            if what == "logits":
                return ops.logits(self.map)
            return self.map.q if what == "q" else self.map.k
        found = getattr(self, what)
        if not isinstance(found, Tensor):
            raise TracingError(f"{what} was not read")
        return found


@dataclass(frozen=True)
class Traced:
    """The traced values of one batch."""

    layers: Mapping[int, Layer]
    pixels: Tensor
    """[B, channels, S, S] in [0, 1]."""
    index: Any
    """int64 [B]: the images' positions in the traced set."""
    labels: Any = None
    logits: Tensor | None = None
    """The network's output [B, classes], if requested."""


@dataclass(frozen=True)
class TraceRequest:
    """The quantities to trace in a pass."""

    what: frozenset[What]
    layers: tuple[int, ...]
    logits: bool = False
    """Whether to include the network's output."""


def request(
    subject: Subject, what: Iterable[str] = ("map",), layers: Sequence[int] | None = None, logits: bool = False
) -> TraceRequest:
    """Return a validated request. layers: blocks counted from 0 at the input; None: all. Raises UserError."""
    names = frozenset(what)
    for name in sorted(names - set(WHAT)):
        raise UserError(f"nothing named {name!r} can be traced{suggest(name, WHAT)}", f"known: {', '.join(WHAT)}")
    depth = subject.network.depth
    chosen = tuple(range(depth)) if layers is None else tuple(sorted(set(layers)))
    for layer in chosen:
        if not 0 <= layer < depth:
            raise UserError(f"layer {layer} is out of range: {subject.label} has {depth} blocks, 0 to {depth - 1}")
    return TraceRequest(names, chosen, logits)  # type: ignore[arg-type]


# --- the reader ----------------------------------------------------------------------------------------------------


class Reader:
    """Traces one subject; a context manager that restores the network on exit::

    with Reader(subject) as reader:
        traced = reader(pixels, wanted)
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._runner: Runner | None = None

    def __enter__(self) -> Reader:
        self._runner = Runner(self.subject)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._runner is not None
        self._runner.close()
        self._runner = None

    @torch.no_grad()
    def __call__(
        self, pixels: Tensor, want: TraceRequest, given: Mapping[int, AttentionOverride] | None = None
    ) -> Traced:
        """Trace images [B, channels, S, S] in [0, 1] on the subject's device.

        given: overrides by block; by default those from the subject's teacher. Raises UserError for a block without
        softmax attention, TracingError naming the layer for a block that did not run or produced a NaN.
        """
        runner = self._runner
        assert runner is not None
        runner.check_images(pixels)
        given = self.subject.given(pixels) if given is None else given
        put = {} if isinstance(self.subject.module, ViT) else given  # our ViT takes overrides as an argument
        seen = _Seen(want, put)
        for layer, name in seen.names:
            if why := runner.layout.missing.get(name):
                raise UserError(f"layer {layer} of {self.subject.label} {why}")
        stop = None if want.logits else max(want.layers, default=-1) + 1
        logits = runner.run(pixels, seen, {} if put else given, stop, output=want.logits)
        layers: dict[int, Layer] = {}
        for layer in want.layers:
            record = seen.records.get(layer)
            if record is None and want.what & PER_HEAD:
                raise TracingError(f"layer {layer} of {self.subject.label}: the pass never came to its attention")
            if record is not None and not isinstance(record.map, QK) and (lost := sorted(want.what & _OF_QK)):
                raise TracingError(
                    f"layer {layer} of {self.subject.label} has no {', '.join(lost)}: its map was given from outside"
                )
            if record is not None:
                record = _for_all_images(record, self.subject.network, len(pixels))
            layers[layer] = Layer(record and record.map, record and record.v, **seen.outputs[layer])
        _check_finite(layers, self.subject.label)
        return Traced(layers, pixels, None, None, logits)


class _Seen:
    """What a reader takes: the record of each block's attention, and outputs of its parts."""

    def __init__(self, want: TraceRequest, put: Mapping[int, AttentionOverride]) -> None:
        self.put = put
        self.records: dict[int, AttentionRecord] = {}
        self.outputs: dict[int, dict[str, Tensor]] = {layer: {} for layer in want.layers}
        attended = set(want.layers if want.what & PER_HEAD else ())
        self._records = {f"blocks.{layer}.attn.record": layer for layer in sorted(attended | set(put))}
        whats = sorted(want.what - PER_HEAD)
        self._outputs = {f"blocks.{layer}.{TRACED[what]}": (layer, what) for layer in want.layers for what in whats}

    @property
    def names(self) -> list[tuple[int, str]]:
        """Block and name of everything wanted, by block."""
        found = [(layer, name) for name, layer in self._records.items()]
        return sorted([*found, *((layer, name) for name, (layer, _) in self._outputs.items())])

    def wants(self, name: str) -> bool:
        return name in self._records or name in self._outputs

    def take(self, name: str, value: Any) -> Any:
        if name in self._outputs:
            layer, what = self._outputs[name]
            self.outputs[layer][what] = value
            return value
        layer = self._records[name]
        self.records[layer] = value
        return sites.attended(self.put[layer], value) if layer in self.put else value


def _for_all_images(record: AttentionRecord, network: Network, images: int) -> AttentionRecord:
    """Return a record whose map, if it is a tensor, is there for every image, head and query."""
    if isinstance(record.map, QK):
        return record
    whole = images, network.heads, network.tokens, network.tokens
    return AttentionRecord(Averaged(record.map.p.expand(whole)), record.v)


def _check_finite(layers: Mapping[int, Layer], label: str) -> None:
    """Raise TracingError naming the first layer with a NaN (an infinity becomes one downstream)."""
    flags: list[Tensor] = []
    where: list[tuple[int, str]] = []
    for layer, one in layers.items():
        parts: dict[str, Tensor | None] = {name: getattr(one, name) for name in ("v", "attn", "mlp", "residual")}
        if isinstance(one.map, QK):
            parts |= {"q": one.map.q, "k": one.map.k}
        elif one.map is not None:
            parts["map"] = one.map.p
        for name, tensor in parts.items():
            if tensor is not None:
                flags.append(tensor.isfinite().all())
                where.append((layer, name))
    if flags and not (fine := torch.stack(flags)).all():  # one synchronisation with the device for all layers
        layer, name = next(place for place, good in zip(where, fine.tolist(), strict=True) if not good)
        raise TracingError(f"layer {layer} of {label}: its {name} is not finite")


# --- streams -------------------------------------------------------------------------------------------------------


def batch_size(*networks: Network) -> int:
    """Return how many images to trace at a time, so that no layer's maps exceed ``_MOST`` elements."""
    largest = max(network.heads * network.tokens**2 for network in networks)
    return max(1, min(BATCH, _MOST // largest))


def check_images(subjects: Sequence[Subject]) -> None:
    """Raise UserError unless all subjects take images of the same format."""
    kinds = {(one.network.image_size, one.network.channels) for one in subjects}
    if len(kinds) > 1:
        told = " and ".join(f"{size} x {size} x {channels}" for size, channels in sorted(kinds))
        raise UserError(f"the subjects see different images ({told})", "compare networks with the same image size")
