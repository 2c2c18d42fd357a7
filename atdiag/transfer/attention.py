"""The student's attention module, the one place where q, k and v meet."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atdiag.transfer import ops
from atdiag.transfer.observation import AttentionRecord
from atdiag.transfer.ops import QK, Map


@cache
def indices(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the indices [h] of some heads on a device; cached, since a copy to a GPU at each step would block."""
    return torch.tensor(heads, dtype=torch.long, device=device)


class Heads(NamedTuple):
    """A subset of a block's heads as indices: the subset, its complement, and the order that restores all heads."""

    part: Tensor
    rest: Tensor
    order: Tensor


@cache
def split_heads(part: tuple[int, ...], total: int, device: torch.device) -> Heads:
    """Return some heads of ``total`` as indices on a device."""
    rest = tuple(head for head in range(total) if head not in part)
    both = (*part, *rest)
    order = tuple(both.index(head) for head in range(total))
    return Heads(indices(part, device), indices(rest, device), indices(order, device))


class AttentionOverride(NamedTuple):
    """A teacher's tensor that a block uses in place of its own.

    value: a map, or queries, keys or values [B, h, N, d]; for some ``heads`` or for all (None).
    """

    tensor: Literal["map", "q", "k", "v"]
    value: Map | Tensor
    heads: Heads | None = None


class Attention(nn.Module):
    """Multi-head self-attention whose map, q, k or v can be overridden, and which can return what it used.

    Computes the same function as ``timm.layers.Attention`` with the same state-dict keys (``qkv.weight``, ``qkv.bias``,
    ``proj.*``), or if a component has removed the bias of k, those of timm's BEiT (``q_bias``, ``v_bias``, no
    ``qkv.bias``). In memory q, k and v are separate parameters: under copy the student computes no q and k at all, and
    their parameters get no gradient, no weight decay and no optimiser state, which is impossible for slices of a fused
    tensor.

    An override of some heads leaves the other heads' rows in the same parameters: the rows of overridden heads then
    affect nothing, get zero gradients, and decay like any weight.

    A component acts on the map in two places, each empty until it puts a module there:

    - ``qk_hooks``: modules by name, which act in this order on q and on k on their way to the logits (q/k norm, rotary
      embedding). Each is called as ``hook(x, name, heads)``, once with the queries and once with the keys:
      x [B, h, N, d], name ``"q"`` or ``"k"``, heads the indices [h] of the heads that x holds (None: all). It returns
      what takes the place of x. q and k are passed one at a time because either alone can be given by a teacher, and
      what is given has passed the teacher's own hooks. A hook belongs to one block. Its parameters whose names begin
      with ``q_`` or ``k_`` act on that tensor alone, all others on both.
    - ``rel_pos_bias``: a module that returns the bias [H, N, N] of the logits.

    ``QK``, and whatever else is handed out as q and k, holds them as they enter the logits.

    Takes the arguments that timm's block passes to its attention, and does with them what timm's does: ``qk_norm``
    gives norms of q and k, of each head, that come before the hooks; ``scale_norm`` one of the heads' joined outputs.
    Raises ValueError for dropout.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,  # of qk_norm and scale_norm
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        asked = {"attn_drop": attn_drop, "proj_drop": proj_drop}
        if refused := [f"`{name}` {value}" for name, value in asked.items() if value]:
            raise ValueError(f"{', '.join(refused)}: atdiag's attention has no such part (a component can add one)")
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        for name in ("q", "k", "v"):
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.empty(dim, dim, **like)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(dim, **like)) if qkv_bias else None)
        if qk_norm:
            self.q_norm, self.k_norm = (norm_layer(dim // num_heads, **like) for _ in "qk")
        if scale_norm:
            self.norm = norm_layer(dim, **like)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **like)
        self.qk_hooks = nn.ModuleDict()
        self.rel_pos_bias: nn.Module | None = None
        self.register_state_dict_post_hook(_fuse)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_split)  # type: ignore[no-untyped-call]

    def unused_parameters(self, tensor: Literal["map", "q", "k", "v"] = "map") -> dict[str, nn.Parameter]:
        """Return the parameters, by name, that are unused while a tensor of all heads is copied from a teacher."""
        names = "qk" if tensor == "map" else tensor
        own = {name: p for name, p in self.named_parameters(recurse=False) if name[0] in names}
        for part in ("q_norm", "k_norm"):
            if part[0] in names and hasattr(self, part):
                own |= {f"{part}.{name}": p for name, p in getattr(self, part).named_parameters()}
        for hook, module in self.qk_hooks.items():
            for name, parameter in module.named_parameters():
                if tensor == "map" or name.startswith(f"{tensor}_"):
                    own[f"qk_hooks.{hook}.{name}"] = parameter
        if tensor == "map" and self.rel_pos_bias is not None:
            own |= {f"rel_pos_bias.{name}": p for name, p in self.rel_pos_bias.named_parameters()}
        return own

    def _heads(self, x: Tensor, names: str, heads: Tensor | None = None) -> list[Tensor]:
        """Project tokens [B, N, C] to the named tensors, [B, H, N, d] each, in one matrix product; q and k as hooked.

        heads: indices [h] of the heads to compute; None: all.
        """

        def rows(parameter: Tensor) -> Tensor:
            if heads is None:
                return parameter
            return parameter.view(self.num_heads, -1, *parameter.shape[1:])[heads].flatten(0, 1)

        weight = torch.cat([rows(getattr(self, f"{n}_weight")) for n in names])
        bias = self._projection_bias(names, rows)
        batch, tokens, width = x.shape
        count = self.num_heads if heads is None else len(heads)
        out = F.linear(x, weight, bias).view(batch, tokens, len(names), count, width // self.num_heads)
        parts = zip(names, out.permute(2, 0, 3, 1, 4).unbind(0), strict=True)
        return [self._hooked(part, name, heads) for name, part in parts]

    def _hooked(self, x: Tensor, name: str, heads: Tensor | None) -> Tensor:
        """Apply norm and hooks to q or k [B, h, N, d], keeping its dtype (a norm gives float32 under autocast)."""
        if name in "qk":
            if (norm := getattr(self, f"{name}_norm", None)) is not None:
                x = norm(x).to(x.dtype)
            for hook in self.qk_hooks.values():
                x = hook(x, name, heads).to(x.dtype)
        return x

    def _projection_bias(self, names: str, rows: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Return the bias of the named projections, zero where one has none; None if none of them has one."""
        parts: dict[str, Tensor | None] = {n: getattr(self, f"{n}_bias") for n in names}
        some = next((part for part in parts.values() if part is not None), None)
        if some is None:
            return None
        return torch.cat([rows(torch.zeros_like(some) if part is None else part) for part in parts.values()])

    def _bias(self) -> Tensor | None:
        return None if self.rel_pos_bias is None else self.rel_pos_bias()

    def peek(self, x: Tensor, values: bool = False) -> AttentionRecord:
        """Return the map for tokens [B, N, C], and the values if requested, without computing the output."""
        # Project q and k alone: a teacher's last needed block stops here, with the same bits wherever it stops.
        q, k, *v = self._heads(x, "qkv" if values else "qk")
        return AttentionRecord(QK(q, k, self.scale, self._bias()), *v)

    def forward(self, x: Tensor, given: AttentionOverride | None = None) -> Tensor:
        """Map tokens [B, N, C] to [B, N, C]. given: override of the module's own tensor, which is then not computed."""
        return self.see(x, given)[0]

    def see(self, x: Tensor, given: AttentionOverride | None = None) -> tuple[Tensor, AttentionRecord]:
        """Run :meth:`forward`, and also return the map and values that were used.

        If only some heads get a given map, no single q and k define the result; the module's own map is returned for
        the rest.
        """
        if given is not None and given.tensor == "map":
            (v,) = self._heads(x, "v")
            used, out = self._under(x, given, v)
        else:
            q, k, v = self._tensors(x, given)
            used = QK(q, k, self.scale, self._bias())
            out = ops.attend(used, v)
        joined = out.transpose(1, 2).reshape(x.shape)
        if (norm := getattr(self, "norm", None)) is not None:
            joined = norm(joined)
        mixed: Tensor = self.proj(joined)
        return mixed, AttentionRecord(used, v)

    def _under(self, x: Tensor, given: AttentionOverride, v: Tensor) -> tuple[Map, Tensor]:
        """Return the map in use and the attention output under a given map."""
        assert not isinstance(given.value, Tensor)
        if given.heads is None:
            return given.value, ops.attend(given.value, v)
        part, rest, order = given.heads
        q, k = self._heads(x, "qk", rest)
        bias = self._bias()
        own = QK(q, k, self.scale, None if bias is None else bias[rest])
        out = torch.cat([ops.attend(given.value, v[:, part]), ops.attend(own, v[:, rest])], dim=1)
        return own, out[:, order]

    def _tensors(self, x: Tensor, given: AttentionOverride | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, one of which may be given."""
        if given is None:
            q, k, v = self._heads(x, "qkv")
            return q, k, v
        assert isinstance(given.value, Tensor)
        own = "qkv".replace(given.tensor, "")
        found = dict(zip(own, self._heads(x, own), strict=True))
        if given.heads is None:
            taken = given.value
        else:
            (others,) = self._heads(x, given.tensor, given.heads.rest)
            taken = torch.cat([given.value.to(others.dtype), others], dim=1)[:, given.heads.order]
        found[given.tensor] = taken
        return found["q"], found["k"], found["v"]


def _fuse(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Merge q, k, v parameters into timm's fused ``qkv``, in a state dict being saved."""
    for kind in ("weight", "bias"):
        keys = [f"{prefix}{n}_{kind}" for n in "qkv"]
        if all(key in state for key in keys):  # without a bias of k, q's and v's keep their names, as in timm's BEiT
            state[f"{prefix}qkv.{kind}"] = torch.cat([state.pop(key) for key in keys])


def _split(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Split timm's fused ``qkv`` into separate parameters, in a state dict being loaded."""
    for kind in ("weight", "bias"):
        if (fused := state.pop(f"{prefix}qkv.{kind}", None)) is not None:
            for name, part in zip("qkv", fused.chunk(3), strict=True):
                state[f"{prefix}{name}_{kind}"] = part
