"""A cache of a run's values, with TransformerLens's methods for taking the residual stream and the logits apart.

The stream at a block's entry is the sum of what came before: embeddings, and the outputs of attention and MLP after
LayerScale (:meth:`ActivationCache.decompose_resid`). With the last norm's statistics held at their values in the run,
each part adds to each logit (:meth:`ActivationCache.logit_attrs`); with :meth:`ActivationCache.bias_attrs`, the parts
sum to the logits.

    >>> import torch
    >>> from atdiag.hooks.model import hooked
    >>> logits, cache = hooked("dinov2_s").run_with_cache(torch.rand(4, 1, 20, 20))
    >>> parts, labels = cache.decompose_resid(return_labels=True)
    >>> attrs = cache.logit_attrs(parts, 3)
    >>> labels[:4], attrs.shape
    (['embed', 'pos_embed', '0_attn_out', '0_mlp_out'], torch.Size([26, 4, 26]))
    >>> torch.allclose(attrs.sum((0, 2)) + cache.bias_attrs(3), logits[:, 3], atol=1e-4)
    True
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Sequence, ValuesView
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from atdiag.analysis.points import parts
from atdiag.analysis.points.names import act_name
from atdiag.analysis.points.places import Norm
from atdiag.analysis.points.readout import readout
from atdiag.core.errors import UserError, suggest
from atdiag.core.text import count

Slice: TypeAlias = int | tuple[int | None, ...] | Sequence[int] | slice | Tensor | None
"""Positions: one (its axis goes), ``(start, stop[, step])``, several by index, or None: all."""

Classes: TypeAlias = int | Tensor | Sequence[int]
"""A class for all images, or one for each image."""


def sliced(x: Tensor, positions: Slice, dim: int) -> Tensor:
    """Return some positions of an axis, counted from the end (``dim`` negative)."""
    if positions is None:
        return x
    if isinstance(positions, int):
        return x.select(dim, positions)
    if isinstance(positions, tuple):
        positions = slice(*positions)
    index: list[Any] = [slice(None)] * x.ndim
    index[dim] = positions if isinstance(positions, slice | Tensor) else list(positions)
    return x[tuple(index)]


class ActivationCache:
    """The values of a run by point, as :meth:`HookedViT.run_with_cache` returns them.

    ``cache["blocks.5.attn.hook_pattern"]``, ``cache["pattern", 5]`` and ``cache["pattern5"]`` are the same; layers may
    be negative. Methods that take a ``layer`` cover what comes before that block; None or -1: all blocks.
    """

    def __init__(self, values: dict[str, Tensor], model: Any, has_batch_dim: bool = True) -> None:
        self.cache_dict = values
        self.model = model
        """The :class:`~atdiag.hooks.model.HookedViT` that ran."""
        self.has_batch_dim = has_batch_dim

    def __repr__(self) -> str:
        return f"ActivationCache with keys {list(self.cache_dict)}"

    def __getitem__(self, key: str | tuple[Any, ...]) -> Tensor:
        if isinstance(key, str) and key in self.cache_dict:
            return self.cache_dict[key]
        if isinstance(key, str):
            name = act_name(key)
        else:
            layer = key[1] if len(key) > 1 else None
            depth = self.model.cfg.n_layers
            if isinstance(layer, int) and not -depth <= layer < depth:
                raise UserError(f"layer {layer} is out of range: {self.model.cfg.model_name} has {depth} blocks")
            name = act_name(key[0], layer if layer is None or layer >= 0 else depth + layer, *key[2:])
        if name in self.cache_dict:
            return self.cache_dict[name]
        if name in self.model.hook_dict:
            raise UserError(f"{name} is not in the cache", "name it in names_filter")
        if name.removesuffix("_grad") in self.model.hook_dict:
            raise UserError(f"{name} is not in the cache", "cache it with incl_bwd")
        if name in self.model.missing:
            self.model.check(name)
        raise KeyError(f"no hook point {name!r}{suggest(name, self.model.hook_dict)}")

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __contains__(self, name: object) -> bool:
        return name in self.cache_dict

    def keys(self) -> KeysView[str]:
        """Return the full names of the cached points."""
        return self.cache_dict.keys()

    def values(self) -> ValuesView[Tensor]:
        """Return the cached values."""
        return self.cache_dict.values()

    def items(self) -> ItemsView[str, Tensor]:
        """Return names and values."""
        return self.cache_dict.items()

    def to(self, device: torch.device | str) -> ActivationCache:
        """Move the values to a device; return the cache."""
        self.cache_dict = {name: value.to(device) for name, value in self.cache_dict.items()}
        return self

    def remove_batch_dim(self) -> ActivationCache:
        """Leave out the axis of a single image; return the cache. Raises UserError for several images."""
        if not self.has_batch_dim:
            return self
        if any(len(value) != 1 for value in self.cache_dict.values()):
            images = max(len(value) for value in self.cache_dict.values())
            raise UserError(f"the cache holds {images} images: the axis of one alone can be removed")
        self.cache_dict = {name: value[0] for name, value in self.cache_dict.items()}
        self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: Slice) -> ActivationCache:
        """Return the cache of some images."""
        if not self.has_batch_dim:
            raise UserError("the cache has no axis of images")
        own = {name: sliced(value, batch_slice, -value.ndim) for name, value in self.cache_dict.items()}
        return ActivationCache(own, self.model, not isinstance(batch_slice, int))

    # --- the residual stream ---------------------------------------------------------------------------------------

    def _layer(self, layer: int | None) -> int:
        depth: int = self.model.cfg.n_layers
        if layer is None or layer == -1:
            return int(depth)
        if not 0 <= layer <= depth:
            raise UserError(f"layer {layer} is out of range: {self.model.cfg.model_name} has {depth} blocks")
        return layer

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Slice = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """Return the stream at the entry of every block up to ``layer``, [n, B, N, C], with labels if asked for.

        incl_mid: also between the branches of each block; mlp_input: of block ``layer`` too. apply_ln: apply the norm
        that the stream meets there: the last one with its own statistics for each entry (the logit lens), another with
        those of the run.
        """
        layer, depth = self._layer(layer), self.model.cfg.n_layers
        entries, labels = [], []
        for i in range(layer + 1):
            if i == depth:
                entries.append(self["resid_post", depth - 1])
                labels.append("final_post")
                continue
            entries.append(self["resid_pre", i])
            labels.append(f"{i}_pre")
            if (incl_mid and i < layer) or (mlp_input and i == layer):
                entries.append(self["resid_mid", i])
                labels.append(f"{i}_mid")
        stack = torch.stack([sliced(one, pos_slice, -2) for one in entries])
        if apply_ln:
            stack = self.apply_ln_to_stack(
                stack, layer, mlp_input, pos_slice, recompute_ln=layer == self.model.cfg.n_layers
            )
        return (stack, labels) if return_labels else stack

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Slice = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """Return what the stream at the entry of block ``layer`` is the sum of, [n, B, N, C], with labels if asked for.

        Embeddings (as they enter the first block, if a norm comes before it), and each branch's output after
        LayerScale. mode: branches of one kind alone. mlp_input: also the attention of block ``layer``. apply_ln: as
        each part adds to that block's norm.
        """
        if mode not in ("all", "mlp", "attn"):
            raise UserError(f"mode is all, mlp or attn, not {mode!r}")
        layer = self._layer(layer)
        names: list[tuple[str, str]] = []
        if incl_embeds:
            names += self._embeddings()
        for i in range(layer):
            names += [(f"blocks.{i}.hook_attn_out", f"{i}_attn_out")] if mode != "mlp" else []
            names += [(f"blocks.{i}.hook_mlp_out", f"{i}_mlp_out")] if mode != "attn" else []
        if mlp_input and mode != "mlp":
            names.append((f"blocks.{layer}.hook_attn_out", f"{layer}_attn_out"))
        if not names:
            raise UserError("nothing comes before block 0 but the embeddings")
        stack = torch.stack([sliced(self[name], pos_slice, -2) for name, _ in names])
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input, pos_slice)
        return (stack, [label for _, label in names]) if return_labels else stack

    def _embeddings(self) -> list[tuple[str, str]]:
        names = ["embed", *(["pos_embed"] if "hook_pos_embed" in self.model.hook_dict else [])]
        if "ln_pre.hook_scale" in self.model.hook_dict or not all(f"hook_{name}" in self for name in names):
            names = ["full_embed"]
        return [(f"hook_{name}", name) for name in names]

    def compute_head_results(self) -> None:
        """Add each head's part of the attention's output, after LayerScale, to the cache if it is not there."""
        for i in range(self.model.cfg.n_layers):
            name = f"blocks.{i}.attn.hook_result"
            if name in self:
                continue
            self.model.check(name)
            attn = getattr(self.model.model.blocks[i], "attn", None)
            if any(
                not isinstance(getattr(attn, part, None), torch.nn.Identity | None) for part in ("norm", "gate")
            ):  # then the projection does not see z itself
                raise UserError(
                    f"{name} is not in the cache", "cache it with names_filter, or set_use_attn_result(True)"
                )
            self.cache_dict[name] = torch.einsum("...nhd,hdc->...nhc", self["z", i], self._w_o[i])

    @property
    def _w_o(self) -> Tensor:
        weight: Tensor = self.model.W_O.detach()
        return weight.to(next(iter(self.cache_dict.values())).device)

    def stack_head_results(
        self,
        layer: int | None = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Slice = None,
        apply_ln: bool = False,
    ) -> Any:
        """Return each head's part of the stream before block ``layer``, [n, B, N, C], with labels such as ``L0H3``.

        incl_remainder: last, everything else in that stream.
        """
        layer = self._layer(layer)
        self.compute_head_results()
        stream = self["resid_post", layer - 1] if layer else self["resid_pre", 0]
        found = [self["result", i].movedim(-2, 0) for i in range(layer)]
        labels = [f"L{i}H{h}" for i in range(layer) for h in range(self.model.cfg.n_heads)]
        stack = torch.cat(found) if found else stream.new_zeros(0, *stream.shape)
        if incl_remainder:
            stack = torch.cat([stack, (stream - stack.sum(0))[None]])
            labels.append("remainder")
        stack = sliced(stack, pos_slice, -2)
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, pos_slice=pos_slice)
        return (stack, labels) if return_labels else stack

    def stack_activation(
        self, activation_name: str, layer: int | None = None, sublayer_type: str | None = None
    ) -> Tensor:
        """Return one point of all blocks before ``layer``, stacked: ``stack_activation("scale", -1, "ln1")``."""
        return torch.stack([self[activation_name, i, sublayer_type] for i in range(self._layer(layer))])

    # --- norms and logits ------------------------------------------------------------------------------------------

    def apply_ln_to_stack(
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Slice = None,
        recompute_ln: bool = False,
    ) -> Tensor:
        """Return what each part of a stack [n, B, N, C] adds to the norm of a block: centred, scaled, times the weight.

        The scale is that of the run. layer: the block's first norm (second: ``mlp_input``); None or -1: the last norm.
        recompute_ln: apply the last norm to each entry with its own statistics, and with its bias. Where the last norm
        comes after pooling, its one scale serves all positions.
        """
        layer = self._layer(layer)
        final = layer == self.model.cfg.n_layers
        norm, name = self._norm(layer, mlp_input, final)
        if norm is None:
            return residual_stack
        if recompute_ln and final:
            centred, scale = parts.normalised(norm, residual_stack)
            return parts.affine(norm, centred / scale)
        scale = self[f"{name}.hook_scale"]
        if scale.ndim == self.has_batch_dim + 1:  # of the pooled vector: for all positions
            scale = scale if isinstance(pos_slice, int) else scale[..., None, :]
        else:
            scale = sliced(scale, pos_slice, -2)
        stack = residual_stack
        if parts.centres(norm):
            stack = stack - stack.mean(-1, keepdim=True)
        out: Tensor = stack / scale
        return out if norm.weight is None else out * norm.weight

    def _norm(self, layer: int, mlp_input: bool, final: bool) -> tuple[Any, str]:
        model = self.model.model
        if final:
            last = readout(model, self.model.cfg.model_name).norm if self.model.linear else model.norm
            return (None, "") if isinstance(last, torch.nn.Identity | None) else (last, "ln_final")
        name = f"blocks.{layer}.ln{2 if mlp_input else 1}"
        self.model.check(f"{name}.hook_scale")
        place = self.model.place(f"{name}.hook_scale")
        assert isinstance(place, Norm)
        return place.norm, name

    def logit_attrs(
        self,
        residual_stack: Tensor,
        tokens: Classes,
        incorrect_tokens: Classes | None = None,
        pos_slice: Slice = None,
        batch_slice: Slice = None,
        has_batch_dim: bool | None = None,
    ) -> Tensor:
        """Return what each part of a stack [n, B, N, C] adds to the logit of a class: [n, B, N].

        tokens: a class, or one for each image; incorrect_tokens: a class whose logit is subtracted. Positions that the
        head does not read (all but the class token, or registers beside pooled patches) add 0. With every position and
        part, the sum over both and :meth:`bias_attrs` is the logit. pos_slice, batch_slice: what was already taken from
        the stack. Raises UserError for a head that is not linear in the tokens.
        """
        read = readout(self.model.model, self.model.cfg.model_name)
        direction = self._direction(read.weight, tokens)
        if incorrect_tokens is not None:
            direction = direction - self._direction(read.weight, incorrect_tokens)
        cache = self if batch_slice is None else self.apply_slice_to_batch_dim(batch_slice)
        whole = cache.apply_ln_to_stack(residual_stack, -1, pos_slice=pos_slice)
        one = isinstance(pos_slice, int)  # then the stack has no axis of positions
        if direction.ndim == 3:  # a class for each image: [heads, B, C]
            direction = sliced(direction, batch_slice, -2)
            images = len(whole[0]) if cache.has_batch_dim else 1
            if direction.ndim == 3 and direction.shape[1] not in (1, images):
                classes = count(direction.shape[1], "class")
                raise UserError(f"{classes} for {count(images, 'image')}: give one class, or one for each image")
            direction = direction if one else direction.unsqueeze(-2)
        else:
            direction = direction[:, None] if not one else direction
        shares = sliced(read.shares.detach(), pos_slice, -1)
        return torch.stack([(whole * own).sum(-1) * share for share, own in zip(shares, direction, strict=True)]).sum(0)

    def bias_attrs(self, tokens: Classes, incorrect_tokens: Classes | None = None) -> Tensor:
        """Return what the last norm's bias and the head's add to the logit of a class: one number for each class given.

        Raises UserError as :meth:`logit_attrs`.
        """
        read = readout(self.model.model, self.model.cfg.model_name)
        bias = read.bias
        own = getattr(read.norm, "bias", None)
        if own is not None:
            bias = bias + torch.einsum("c,gck,g->k", own, read.weight, read.shares.sum(-1))
        out = self._classes(bias, tokens)
        return out if incorrect_tokens is None else out - self._classes(bias, incorrect_tokens)

    def _direction(self, weight: Tensor, tokens: Classes) -> Tensor:
        """Return the rows of the head's weights [heads, C, classes] for some classes: [heads, C], or [heads, B, C]."""
        found = self._classes(weight, tokens)
        return found if found.ndim == 2 else found.transpose(1, 2)

    def _classes(self, x: Tensor, tokens: Classes) -> Tensor:
        """Return entries along the last axis, whose length is the number of classes, detached."""
        index = torch.as_tensor(tokens, device=x.device)
        classes = x.shape[-1]
        if index.is_floating_point() or index.ndim > 1:
            raise UserError("a class is a whole number, or one for each image")
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= classes):
            raise UserError(f"class {int(index.max())} is out of range: there are {classes}, 0 to {classes - 1}")
        return x.detach()[..., index]
