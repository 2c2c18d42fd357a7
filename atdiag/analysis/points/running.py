"""Run a subject's network once under nnsight, and take hook points on the way."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from atdiag.analysis import instrument, sites
from atdiag.analysis.instrument import Instrument
from atdiag.analysis.points.layout import Layout, layout
from atdiag.analysis.points.places import AttentionPlace, Pass, Taker
from atdiag.analysis.sites import TracingError
from atdiag.analysis.subjects import Subject
from atdiag.core.errors import UserError
from atdiag.networks.model.vit import ViT
from atdiag.transfer.attention import AttentionOverride


class Nobody:
    """Takes nothing."""

    def wants(self, name: str) -> bool:
        """Return False."""
        return False

    def take(self, name: str, value: Any) -> Any:
        """Return the value."""
        return value


def _mapped(given: Mapping[int, AttentionOverride]) -> frozenset[int]:
    return frozenset(layer for layer, one in given.items() if one.tensor == "map")


class Runner:
    """A subject under nnsight, with the layout of its points; :meth:`close` leaves the network as it was."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.instrument = Instrument(subject.module)
        self.layout: Layout = layout(subject, self.root)
        self.own = Pass(self.root, Nobody(), 0)
        """The user's own trace (``TracedModel.trace``)."""

    @property
    def root(self) -> Any:
        """nnsight's envoy of the subject's module."""
        return self.instrument.root

    def close(self) -> None:
        """Leave the network as it was."""
        self.instrument.restore()

    def check_images(self, pixels: Tensor) -> None:
        """Raise UserError for images of another format than the network sees; warn of those that can't be in [0, 1]."""
        network = self.subject.network
        if pixels.shape[1:] != (network.channels, network.image_size, network.image_size):
            sees = f"{network.image_size} x {network.image_size} x {network.channels}"
            raise UserError(f"{self.subject.label} sees images of {sees}, and these are {list(pixels.shape[1:])}")
        if pixels.numel():
            low, high = (float(end) for end in pixels.detach().aminmax())
            if low < -0.5 or high > 1.5:  # somewhat outside are also resized or perturbed images
                warnings.warn(
                    f"images lie between {low:.1f} and {high:.1f}: {self.subject.label} takes them in [0, 1], and "
                    "normalises them itself",
                    stacklevel=5,
                )

    def run(
        self,
        pixels: Tensor,
        taker: Taker,
        given: Mapping[int, AttentionOverride] | None = None,
        stop: int | None = None,
        output: bool = True,
    ) -> Tensor | None:
        """Run images [B, channels, S, S] in [0, 1]; return the logits, or the tokens that enter block ``stop``.

        output: whether to return anything; if not, the pass ends as soon as all before ``stop`` is taken.
        given: overrides of our network's attention. Raises TracingError naming the layer for a place that is not
        reached.
        """
        if self.root is None:
            raise UserError(f"the hooks of {self.subject.label} were closed", "make the model anew with atdiag.hooked")
        given = given or {}
        on = Pass(self.root, taker, len(pixels), self._unfused(taker), _mapped(given))
        places = self.layout.places
        if stop is not None:
            places = places[: self.layout.block_ends[stop - 1] if stop else self.layout.first]
        call = (pixels, dict(given)) if given else (pixels,)
        entry = f"{self._prefix}blocks.{stop}" if stop != self.subject.network.depth else f"{self._prefix}norm"
        root, found = self.root, list[Tensor]()
        blocks = [self._block(layer) for layer in on.unfused]
        switched = [module for block in blocks if (module := sites.unfused(block)) is not None]
        try:
            for module in switched:
                module.fused_attn = True  # type: ignore[assignment]
            # Everything is taken in the order in which the network computes it: nnsight can't go back.
            with root.trace(*call) as tracer:
                for place in places:
                    place.visit(on)
                if output:
                    found.append(root.output if stop is None else root.get(entry).input)
                if stop is not None:
                    tracer.stop()
        except instrument.out_of_order() as fault:
            raise TracingError(instrument.translated(fault)) from None
        finally:
            for module in switched:
                module.fused_attn = False  # type: ignore[assignment]
        return found[0] if found else None

    def begin(self, pixels: Tensor) -> tuple[Any, ...]:
        """Return the arguments of the module for the user's own trace of images, and note it as ``own``."""
        self.check_images(pixels)
        pixels = pixels.to(self.subject.device)
        given = self.subject.given(pixels)
        self.own = Pass(self.root, Nobody(), len(pixels), frozenset(), _mapped(given))
        return (pixels, given) if given else (pixels,)

    @property
    def _prefix(self) -> str:
        return "" if isinstance(self.subject.module, ViT) else "model."

    def _block(self, layer: int) -> Any:
        return self.subject.module.get_submodule(f"{self._prefix}blocks.{layer}")

    def _unfused(self, taker: Taker) -> frozenset[int]:
        """Return the blocks with explicit attention of which something is taken."""
        return frozenset(
            place.layer
            for place in self.layout.places
            if isinstance(place, AttentionPlace) and any(map(taker.wants, (*place.points, place.record)))
            if sites.unfused(self._block(place.layer)) is not None
        )
