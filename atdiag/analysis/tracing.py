"""Trace the internal activations of any network with nnsight, without modifying the network.

Where its attention is fused, queries and keys are read as they enter the kernel, and a layer's map is computed from
them on request. Shapes: B images, H heads, N tokens, d head width, C width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from atdiag.analysis import instrument, sites
from atdiag.analysis.sites import Site, TracingError
from atdiag.analysis.subjects import Subject
from atdiag.core.errors import UserError, suggest
from atdiag.core.spec import Network
from atdiag.networks.model.vit import ViT
from atdiag.transfer import ops
from atdiag.transfer.attention import AttentionOverride
from atdiag.transfer.observation import AttentionRecord
from atdiag.transfer.ops import QK, Map

What = Literal["map", "logits", "q", "k", "v", "attn", "mlp", "residual"]
"""``map`` [B, H, N, N], its ``logits`` before softmax [B, H, N, N]; ``q``, ``k``, ``v`` [B, H, N, d] as they enter the
product; ``attn`` and ``mlp``, the outputs of the block's two modules, before LayerScale [B, N, C]; ``residual``, the
residual stream at the block's output [B, N, C]."""

WHAT: tuple[What, ...] = get_args(What)
PER_HEAD: frozenset[What] = frozenset({"map", "logits", "q", "k", "v"})
_OF_QK: frozenset[What] = frozenset({"logits", "q", "k"})
"""Quantities available only if a map is given by its queries and keys."""

_SWITCH = "set fused_attn of its attention to True"

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
        self._before: dict[nn.Module, dict[str, Any]] = {}
        self._sites: dict[int, Site] = {}
        self._nnsight = instrument.nnsight()
        self._root: Any = None

    def __enter__(self) -> Reader:
        module = self.subject.module
        # nnsight replaces the forward of every module whose source it reads, and leaves it replaced.
        self._before = {m: {k: m.__dict__[k] for k in instrument.PLANTED if k in m.__dict__} for m in module.modules()}
        self._root = self._nnsight.NNsight(module)
        return self

    def __exit__(self, *_: object) -> None:
        for module, had in self._before.items():
            for name in instrument.PLANTED:
                module.__dict__.pop(name, None)
            module.__dict__.update(had)
        self._before, self._sites, self._root = {}, {}, None

    @torch.no_grad()
    def __call__(
        self, pixels: Tensor, want: TraceRequest, given: Mapping[int, AttentionOverride] | None = None
    ) -> Traced:
        """Trace images [B, channels, S, S] in [0, 1] on the subject's device.

        given: overrides by block; by default those from the subject's teacher. Raises UserError for a block without
        softmax attention, TracingError naming the layer for a block that did not run or produced a NaN.
        """
        network = self.subject.network
        if pixels.shape[1:] != (network.channels, network.image_size, network.image_size):
            sees = f"{network.image_size} x {network.image_size} x {network.channels}"
            raise UserError(f"{self.subject.label} sees images of {sees}, and these are {list(pixels.shape[1:])}")
        given = self.subject.given(pixels) if given is None else given
        read = want.layers if want.what & PER_HEAD else ()
        put = {} if isinstance(self.subject.module, ViT) else given  # our ViT takes overrides as an argument
        where = {layer: self._site(layer) for layer in sorted({*read, *put})}
        self._check_explicit(where, want, put)
        nodes, outputs, logits = self._run(pixels, want, where, {} if put else given, put)
        layers: dict[int, Layer] = {}
        for layer in want.layers:
            seen = self._seen(where[layer], nodes, len(pixels), layer) if layer in read else None
            if seen is not None and not isinstance(seen.map, QK) and (lost := sorted(want.what & _OF_QK)):
                raise TracingError(
                    f"layer {layer} of {self.subject.label} has no {', '.join(lost)}: its map was given from outside"
                )
            layers[layer] = Layer(seen and seen.map, seen and seen.v, **outputs[layer])
        _check_finite(layers, self.subject.label)
        return Traced(layers, pixels, None, None, logits)

    def _check_explicit(
        self, where: Mapping[int, Site], want: TraceRequest, put: Mapping[int, AttentionOverride]
    ) -> None:
        """Raise UserError for quantities that explicit attention does not expose: there only the map can be read."""
        lost = sorted(want.what & {*_OF_QK, "v"})
        for layer, site in where.items():
            if site.kind != "explicit":
                continue
            off = f"layer {layer} of {self.subject.label} has its fused attention off"
            if layer in put:
                raise UserError(f"{off}: nothing can be put in there", _SWITCH)
            if lost and layer in want.layers:
                raise UserError(f"{off}: its map can be read there, its {', '.join(lost)} can't", _SWITCH)

    def _seen(self, site: Site, nodes: Mapping[int, Any], images: int, layer: int) -> AttentionRecord:
        if layer not in nodes:
            raise TracingError(f"layer {layer} of {self.subject.label}: the forward pass never came to its attention")
        return sites.seen(site, nodes[layer], self.subject.network, images, layer)

    def _run(
        self,
        pixels: Tensor,
        want: TraceRequest,
        where: Mapping[int, Site],
        given: Mapping[int, AttentionOverride],
        put: Mapping[int, AttentionOverride],
    ) -> tuple[dict[int, Any], dict[int, dict[str, Any]], Tensor | None]:
        """Run one pass; return each layer's value at its site, its modules' outputs, and the network's output.

        given: overrides passed to the network as an argument; put: overrides written at the attention's site during the
        pass.
        """
        root, save = self._root, self._nnsight.save
        names = [name for name in ("attn", "mlp") if name in want.what]
        for name, layer in product(names, want.layers):
            if not isinstance(getattr(self._blocks[layer], name, None), nn.Module):
                raise UserError(f"layer {layer} of {self.subject.label} has no {name} module, whose output to read")
        envoys = {layer: self._envoy(layer) for layer in sorted({*want.layers, *where})}
        network, images = self.subject.network, len(pixels)
        call = (pixels, dict(given)) if given else (pixels,)
        try:
            # Read everything in the order in which the network computes it: nnsight can't go back.
            with root.trace(*call) as tracer:
                nodes: dict[int, Any] = save({})
                outputs: dict[int, dict[str, Any]] = save({layer: {} for layer in want.layers})
                logits: list[Any] = save([])
                for layer, block in envoys.items():
                    if layer in where:
                        site = where[layer]
                        node = getattr((block.attn if site.inside else block).source, site.node)
                        arguments = node.inputs if site.kind != "explicit" else None
                        if layer in put:
                            own = sites.seen(site, (arguments, None), network, images, layer)
                            node.output = sites.attended(put[layer], own)
                        nodes[layer] = (arguments, node.output if site.kind != "fused" else None)
                    if layer not in outputs:
                        continue
                    for name in names:
                        outputs[layer][name] = getattr(block, name).output
                    if "residual" in want.what:
                        outputs[layer]["residual"] = block.output
                if want.logits:
                    logits.append(root.output)
                else:
                    tracer.stop()
        except instrument.out_of_order() as fault:
            raise TracingError(instrument.translated(fault)) from None
        return nodes, outputs, logits[0] if logits else None

    @property
    def _blocks(self) -> list[nn.Module]:
        return list(self.subject.module.get_submodule(self._path).children())

    @property
    def _path(self) -> str:
        """The attribute path of the blocks; a foreign network is nested one level deeper."""
        return "blocks" if hasattr(self.subject.module, "blocks") else "model.blocks"

    def _envoy(self, layer: int) -> Any:
        envoy = self._root
        for name in self._path.split("."):
            envoy = getattr(envoy, name)
        return envoy[layer]

    def _site(self, layer: int) -> Site:
        """Return where a block's map can be read in the source of its attention. Raises UserError if nowhere."""
        block = self._blocks[layer]
        attn = getattr(block, "attn", None)
        inside = isinstance(attn, nn.Module)
        module: nn.Module = attn if isinstance(attn, nn.Module) else block
        envoy = self._envoy(layer)
        names: Sequence[str] = (envoy.attn if inside else envoy).source.names
        kind, found = sites.locate(module, names)
        if len(found) != 1:
            how = "no softmax attention that can be read" if not found else f"attention in {len(found)} places"
            raise UserError(f"layer {layer} of {self.subject.label} ({type(module).__name__}) has {how}")
        return Site(inside, found[0], kind)


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
