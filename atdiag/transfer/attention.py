"""The one place where q, k and v meet: the attention module that students train with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atdiag.transfer import ops
from atdiag.transfer.ops import QK


class Attention(nn.Module):
    """Multi-head self-attention that can be given the map it uses, and can hand out its own.

    The same function as ``timm.layers.Attention`` and, in a state dict, the same keys (``qkv.weight``, ``qkv.bias``,
    ``proj.*``); where a component has taken the bias of k away, those of timm's BEiT (``q_bias``, ``v_bias`` and no
    ``qkv.bias``). In memory q, k and v are separate parameters: under copy the student computes no q, k at all, and
    what is not computed gets no gradient, no weight decay and no optimiser state, which slices of a fused tensor can't
    do.

    ``rel_pos_bias``, where a component has set it, is a module that returns the bias [H, N, N] of the logits.
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = True, **unused: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        for name in ("q", "k", "v"):
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.empty(dim, dim)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(dim)) if qkv_bias else None)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_bias: nn.Module | None = None
        self.register_state_dict_post_hook(_fuse)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_split)  # type: ignore[no-untyped-call]

    def qk_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that only the map depends on, by name: unused while a teacher's map is copied."""
        own = {name: p for name, p in self.named_parameters(recurse=False) if name[0] in "qk"}
        if self.rel_pos_bias is not None:
            own |= {f"rel_pos_bias.{name}": p for name, p in self.rel_pos_bias.named_parameters()}
        return own

    def _heads(self, x: Tensor, names: str) -> list[Tensor]:
        """Project tokens [B, N, C] to the named tensors, [B, H, N, d] each, in one matrix product."""
        weight = torch.cat([getattr(self, f"{n}_weight") for n in names])
        batch, tokens, width = x.shape
        out = F.linear(x, weight, self._projection_bias(names)).view(
            batch, tokens, len(names), self.num_heads, width // self.num_heads
        )
        return list(out.permute(2, 0, 3, 1, 4).unbind(0))

    def _projection_bias(self, names: str) -> Tensor | None:
        """The bias of the named projections, zero for one that has none; None if none of them has one."""
        parts: dict[str, Tensor | None] = {n: getattr(self, f"{n}_bias") for n in names}
        some = next((part for part in parts.values() if part is not None), None)
        if some is None:
            return None
        return torch.cat([torch.zeros_like(some) if part is None else part for part in parts.values()])

    def _bias(self) -> Tensor | None:
        return None if self.rel_pos_bias is None else self.rel_pos_bias()

    def map(self, x: Tensor) -> QK:
        """The map for tokens [B, N, C], without computing what it would be applied to."""
        # q, k alone: a teacher's last needed block stops here, and gets the same bits wherever it stops.
        q, k = self._heads(x, "qk")
        return QK(q, k, self.scale, self._bias())

    def forward(self, x: Tensor, given: QK | None = None, captured: list[QK] | None = None) -> Tensor:
        """Tokens [B, N, C] -> [B, N, C].

        given: the map to use instead of the module's own, which is then not computed.
        captured: the map that was used is appended here.
        """
        if given is not None:
            qk, (v,) = given, self._heads(x, "v")
        else:
            q, k, v = self._heads(x, "qkv")
            qk = QK(q, k, self.scale, self._bias())
        if captured is not None:
            captured.append(qk)
        out = ops.attend(qk, v)
        mixed: Tensor = self.proj(out.transpose(1, 2).reshape(x.shape))
        return mixed


def _fuse(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Separate q, k, v parameters -> timm's fused ``qkv``, in a state dict that is being saved."""
    for kind in ("weight", "bias"):
        keys = [f"{prefix}{n}_{kind}" for n in "qkv"]
        if all(key in state for key in keys):  # without a bias of k, q's and v's keep their names, as in timm's BEiT
            state[f"{prefix}qkv.{kind}"] = torch.cat([state.pop(key) for key in keys])


def _split(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """timm's fused ``qkv`` -> separate parameters, in a state dict that is being loaded."""
    for kind in ("weight", "bias"):
        if (fused := state.pop(f"{prefix}qkv.{kind}", None)) is not None:
            for name, part in zip("qkv", fused.chunk(3), strict=True):
                state[f"{prefix}{name}_{kind}"] = part
