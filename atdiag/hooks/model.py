"""TransformerLens's interface to any Vision Transformer, unmodified, through nnsight.

    >>> import torch
    >>> from atdiag.hooks.model import hooked
    >>> model = hooked("clip_b")
    >>> logits, cache = model.run_with_cache(torch.rand(2, 1, 20, 20))
    >>> cache["pattern", 5].shape, cache["resid_post", -1].shape
    (torch.Size([2, 3, 26, 26]), torch.Size([2, 26, 48]))
    >>> def without_head_1(z, hook):
    ...     z[:, :, 1] = 0
    ...     return z
    >>> model.run_with_hooks(torch.rand(2, 1, 20, 20), fwd_hooks=[("blocks.5.attn.hook_z", without_head_1)]).shape
    torch.Size([2, 10])

Shapes: B images, S pixels on a side, H heads, N tokens, C width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from atdiag.analysis import subjects
from atdiag.analysis.points.names import NamesFilter, predicate
from atdiag.analysis.points.places import PointPlace
from atdiag.analysis.points.readout import pre_logits, readout
from atdiag.analysis.points.running import Runner
from atdiag.analysis.subjects import Subject
from atdiag.core.errors import UserError
from atdiag.core.runs import Store
from atdiag.hooks import weights
from atdiag.hooks.cache import ActivationCache
from atdiag.hooks.collecting import Collector
from atdiag.hooks.points import Direction, HookFunction, HookPoint
from atdiag.hooks.traced import TracedModel
from atdiag.networks.model.vit import ViT
from atdiag.networks.timm import inspection

Hooks = Sequence[tuple[str | Callable[[str], bool], HookFunction]]
"""Points (a name, or a function of a name) and what is called with the value of each."""


@dataclass(frozen=True)
class HookedConfig:
    """Sizes of a hooked network, in TransformerLens's names."""

    model_name: str
    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    n_key_value_heads: int | None
    d_mlp: int | None
    n_ctx: int
    """Number of tokens."""
    d_vocab_out: int
    """Number of classes."""
    eps: float
    image_size: int
    patch_size: int
    n_channels: int
    class_token: bool
    n_registers: int
    use_attn_result: bool = False
    """Whether an unfiltered cache holds each head's result (:meth:`HookedViT.set_use_attn_result`)."""


class HookedViT:
    """A network as it is, with named hook points. Made by :func:`hooked`.

    Images [B, channels, S, S] in [0, 1]: the network normalises them. It is in eval mode. Its fused attention stays,
    except where a hook changes scores or pattern, or a gradient passes through them.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._runner = Runner(subject)
        layout = self._runner.layout
        self.hook_dict: dict[str, HookPoint] = {name: HookPoint(name) for name in layout.shapes}
        self.context_level = 0
        self.cfg = _config(subject, self.model)

    def __repr__(self) -> str:
        return f"HookedViT({self.subject.label}: {self.cfg.n_layers} blocks, {len(self.hook_dict)} hook points)"

    def __getattr__(self, name: str) -> Any:
        if name in weights.NAMES:
            return weights.part(self.model, self.subject.network, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def module(self) -> nn.Module:
        """The network, which takes images in [0, 1]."""
        return self.subject.module

    @property
    def model(self) -> Any:
        """The network without the normalisation of pixels around it."""
        module: Any = self.subject.module
        return module if isinstance(module, ViT) else module.model

    @property
    def nnsight(self) -> TracedModel:
        """The network under nnsight, with the same names: ``model.nnsight["blocks.5.attn.hook_pattern"].output``."""
        return TracedModel(self._runner)

    @property
    def shapes(self) -> dict[str, tuple[str | int, ...]]:
        """Name of a point -> its shape, in the order of execution."""
        return dict(self._runner.layout.shapes)

    @property
    def missing(self) -> dict[str, str]:
        """Name of a point that the network lacks -> why."""
        return dict(self._runner.layout.missing)

    @property
    def linear(self) -> bool:
        """Whether the logits are linear in the tokens after the last norm, so that they have parts."""
        try:
            readout(self.model, self.subject.label)
        except UserError:
            return False
        return True

    def check(self, name: str) -> None:
        """Raise UserError, saying why, for a point that the network lacks."""
        self._runner.layout.check(name)

    def place(self, name: str) -> PointPlace:
        """Return the place of a point in the network."""
        self.check(name)
        return next(one for one in self._runner.layout.places if name in one.points)

    def logit_lens(self, stream: Tensor) -> Tensor:
        """Return the logits [B, classes] that the last norm, pooling and head make of a residual stream [B, N, C]."""
        return pre_logits(self.model, stream)

    def to(self, device: torch.device | str) -> HookedViT:
        """Move the network to a device; return this model."""
        self.subject.to(device)
        return self

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Choose whether a cache without a filter holds each head's result: H times a residual stream."""
        self.cfg = replace(self.cfg, use_attn_result=use_attn_result)

    def close(self) -> None:
        """Leave the network as it was, without nnsight."""
        self.reset_hooks(including_permanent=True)
        self._runner.close()

    # --- runs ------------------------------------------------------------------------------------------------------

    def __call__(self, images: Tensor, stop_at_layer: int | None = None) -> Tensor:
        """Run images under the hooks that are there; return logits [B, classes].

        stop_at_layer: return the residual stream that enters this block, and run no further; -1: the last one. Raises
        UserError for images of another format, and for a hook that returns what does not fit its point.
        """
        return self._run(images, stop_at_layer)

    forward = __call__

    def _run(self, images: Tensor, stop_at_layer: int | None, collector: Collector | None = None) -> Tensor:
        images = self._ready(images)
        taker = collector or Collector(self.hook_dict)
        if taker.backward and torch.is_grad_enabled() and not images.requires_grad:
            images = images.detach().requires_grad_()  # else a frozen network has no gradients
        taker.leaves.append(images)
        given = self.subject.given(images)
        out = self._runner.run(images, taker, given, self._stop(stop_at_layer))
        assert out is not None
        return out

    def _ready(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
            got = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise UserError(f"images must be a floating-point tensor [images, channels, height, width], not {got}")
        self._runner.check_images(images)
        return images.to(self.subject.device, next(self.module.parameters()).dtype)

    def _stop(self, layer: int | None) -> int | None:
        if layer is None:
            return None
        depth = self.cfg.n_layers
        if not -depth <= layer <= depth:
            raise UserError(f"stop_at_layer {layer} is out of range: {self.subject.label} has {depth} blocks")
        return layer % depth if layer < 0 else layer

    def run_with_hooks(
        self,
        images: Tensor,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        stop_at_layer: int | None = None,
    ) -> Tensor:
        """Run images under additional hooks, called as ``fn(value, hook=point)``; return logits [B, classes].

        A hook returns a value to go on with, or None; it may also change the value it is given. Several on one point
        are called in order. A backward hook is called with the gradient to the point's value, when a gradient is taken
        of what this returns.
        """
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self._run(images, stop_at_layer)

    def run_with_cache(
        self,
        images: Tensor,
        names_filter: NamesFilter = None,
        stop_at_layer: int | None = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        *,
        metric: Callable[[Tensor], Tensor] | None = None,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
    ) -> tuple[Tensor, ActivationCache]:
        """Run images; return the logits and a cache of the points' values, detached.

        names_filter: which points; None: all, without ``hook_result``. device: where the cache is kept.
        remove_batch_dim: leave out the axis of a single image. incl_bwd: also cache the gradients of ``metric``, a
        function from the logits to a number, as ``<name>_grad``; parameters get none. Raises UserError for a filter
        that matches nothing.
        """
        wanted = self._wanted(names_filter)
        if remove_batch_dim and len(images) != 1:
            raise UserError(f"remove_batch_dim needs a single image, and there are {len(images)}")
        if incl_bwd and not torch.is_grad_enabled():
            raise UserError("incl_bwd needs gradients: call it outside torch.no_grad")
        with self.hooks(fwd_hooks, bwd_hooks):
            collector = Collector(self.hook_dict, wanted, device, incl_bwd)
            out = self._run(images, stop_at_layer, collector)
            if incl_bwd:
                value = out if metric is None else metric(out)
                if not isinstance(value, Tensor) or value.numel() != 1:
                    raise UserError("incl_bwd needs a number to take gradients of: give a metric of the logits")
                torch.autograd.grad(value, collector.leaves, allow_unused=True)
        cache = ActivationCache(collector.cache, self)
        return out, cache.remove_batch_dim() if remove_batch_dim else cache

    def _wanted(self, names_filter: NamesFilter) -> frozenset[str]:
        if isinstance(names_filter, str | list | tuple | set | frozenset):
            for name in [names_filter] if isinstance(names_filter, str) else names_filter:
                self._runner.layout.check(name)
        test = predicate(names_filter)
        if names_filter is None and self.cfg.use_attn_result:
            test = lambda _: True  # noqa: E731
        wanted = frozenset(name for name in self.hook_dict if test(name))
        if not wanted:
            raise UserError(f"the filter matches no hook point of {self.subject.label}", "'atdiag hooks' lists them")
        return wanted

    # --- hooks -----------------------------------------------------------------------------------------------------

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Add a hook that stays until :meth:`reset_hooks`. Raises UserError for a name or filter without a point."""
        if isinstance(name, str):
            self._runner.layout.check(name)
            names = [name]
        else:
            names = [one for one in self.hook_dict if name(one)]
            if not names:
                raise UserError(
                    f"the filter matches no hook point of {self.subject.label}", "'atdiag hooks' lists them"
                )
        if not callable(hook):
            raise UserError(f"the hook on {names[0]} is no function but {type(hook).__name__}")
        for one in names:
            self.hook_dict[one].add_hook(hook, dir, is_permanent, level, prepend)

    def add_perma_hook(self, name: str | Callable[[str], bool], hook: HookFunction, dir: Direction = "fwd") -> None:
        """Add a hook that stays until it is removed with ``including_permanent``."""
        self.add_hook(name, hook, dir, is_permanent=True)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[HookedViT]:
        """Have hooks within a context; they are removed at its end, also after an error."""
        self.context_level += 1
        try:
            for direction, given in (("fwd", fwd_hooks), ("bwd", bwd_hooks)):
                for name, hook in given:
                    self.add_hook(name, hook, direction, level=self.context_level)  # type: ignore[arg-type]
            yield self
        finally:
            if reset_hooks_end:
                self.reset_hooks(clear_contexts, level=self.context_level)
            self.context_level -= 1

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove hooks: all that are not permanent, or those of one context level."""
        for point in self.hook_dict.values():
            if clear_contexts:
                point.clear_context()
            point.remove_hooks(direction, including_permanent, level)

    def hook_points(self) -> list[HookPoint]:
        """Return all points, in the order of execution."""
        return list(self.hook_dict.values())


def _config(subject: Subject, model: Any) -> HookedConfig:
    network = subject.network
    block = model.blocks[0]
    attn = getattr(block, "attn", block)
    few = int(getattr(attn, "num_kv_heads", network.heads))
    parallel = isinstance(block, inspection.PARALLEL)
    linear = None if parallel else getattr(block.mlp, "fc2", None)
    width = getattr(attn, "head_dim", network.width // network.heads)
    return HookedConfig(
        model_name=subject.label,
        n_layers=network.depth,
        d_model=network.width,
        n_heads=network.heads,
        d_head=int(width),
        n_key_value_heads=None if few == network.heads else few,
        d_mlp=int(block.in_split[0]) if parallel else None if linear is None else int(linear.in_features),
        n_ctx=network.tokens,
        d_vocab_out=network.classes,
        eps=network.norm_eps,
        image_size=network.image_size,
        patch_size=network.patch_size,
        n_channels=network.channels,
        class_token=network.class_token,
        n_registers=network.registers,
    )


def hooked(
    subject: str | Path | Subject | nn.Module,
    *,
    profile: str = "mini",
    label: str = "",
    runs: str | Path | None = None,
    device: torch.device | str | None = None,
) -> HookedViT:
    """Return a network with TransformerLens's hook points.

    subject: what every command takes (a teacher's name, a file, a run's id, ``timm:MODEL``), a subject, or a network: a
    ViT of ours or of timm, which is set to eval mode. profile: that of a teacher's name. label: its name in messages.
    runs: the folder of runs; None: ``ATDIAG_RUNS``, or ``runs`` in the working directory. device: where it is moved to.
    Raises UserError, saying why, for what can't be looked into.
    """
    if isinstance(subject, Subject):
        found = subject
    elif isinstance(subject, nn.Module):
        found = subjects.of(subject, label or type(subject).__name__)
    elif isinstance(subject, str | Path):
        store = Store(Path(runs or os.environ.get("ATDIAG_RUNS") or "runs").expanduser())
        found = subjects.find(str(subject), profile, None, store)
    else:
        raise UserError(f"{type(subject).__name__} is no network", "give a name, a file, a run's id or a timm model")
    model = HookedViT(replace(found, label=label) if label else found)
    return model if device is None else model.to(device)
