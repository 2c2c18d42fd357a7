"""A timm network's calls of scaled dot-product attention: answered with given maps, or recorded, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from atdiag.transfer import ops
from atdiag.transfer.attention import AttentionOverride
from atdiag.transfer.observation import AttentionRecord, record_of_sdpa
from atdiag.transfer.ops import QK


class AttentionInside(TorchFunctionMode):
    """While active, gives blocks their maps and records those of others, at their calls of SDPA."""

    def __init__(
        self, blocks: Sequence[nn.Module], given: dict[int, AttentionOverride], wanted: frozenset[int]
    ) -> None:
        super().__init__()
        self.given, self.wanted = given, wanted
        self.seen: dict[int, AttentionRecord] = {}
        self.met: set[int] = set()
        self.block: int | None = None
        whole = [i for i, one in given.items() if one.tensor == "map" and one.heads is None]
        self._skipped = {id(weight): i for i in whole if (weight := _fused_weight(blocks[i])) is not None}

    def enter(self, block: int) -> None:
        """Note that a block begins."""
        self.block = block

    def leave(self) -> None:
        """Note that a block has ended. Raises RuntimeError if its attention was not where it was expected."""
        asked = self.block in self.given or self.block in self.wanted
        if asked and self.block not in self.met:
            raise RuntimeError(
                f"block {self.block} made no call of scaled dot-product attention: its map can't be read"
            )
        self.block = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.block is None:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attend(func, args, kwargs)
        if func is F.linear and self._skipped:
            return self._project(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(self, func: Any, args: Any, kwargs: Any) -> Any:
        block = cast(int, self.block)
        if block not in self.given and block not in self.wanted:
            return func(*args, **kwargs)
        if block in self.met:
            raise RuntimeError(f"block {block} attends twice: it has no single map")
        self.met.add(block)
        record = record_of_sdpa(*args, **kwargs)
        if block in self.wanted:
            self.seen[block] = record
        return _under(record, self.given[block]) if block in self.given else func(*args, **kwargs)

    def _project(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute of a fused projection to q, k and v only v, if q and k have no use; they are zero."""
        if self._skipped.get(id(weight)) != self.block:
            return F.linear(input, weight, bias)
        first = 2 * weight.shape[0] // 3
        v = F.linear(input, weight[first:], None if bias is None else bias[first:])
        return torch.cat([v.new_zeros(*v.shape[:-1], first), v], dim=-1)


def _under(record: AttentionRecord, given: AttentionOverride) -> Tensor:
    """Return the attention output [B, H, N, d] of a call whose map, q, k or v is given, for all heads or for some."""
    qk, v = record.qk, record.v
    assert v is not None
    if given.tensor != "map":
        own: dict[str, Tensor] = {"q": qk.q, "k": qk.k, "v": v}
        assert isinstance(given.value, Tensor)
        taken = given.value.to(v.dtype)
        if given.heads is not None:
            taken = torch.cat([taken, own[given.tensor][:, given.heads.rest]], dim=1)[:, given.heads.order]
        own[given.tensor] = taken
        return ops.attend(QK(own["q"], own["k"], qk.scale, qk.bias), own["v"])
    assert not isinstance(given.value, Tensor)
    value = given.value
    if isinstance(value, QK) and value.q.dtype != v.dtype:
        value = value._replace(q=value.q.to(v.dtype), k=value.k.to(v.dtype))
    if given.heads is None:
        return ops.attend(value, v)
    part, rest, order = given.heads
    others = qk.select_heads(rest)
    return torch.cat([ops.attend(value, v[:, part]), ops.attend(others, v[:, rest])], dim=1)[:, order]


def fuse(student: nn.Module) -> list[nn.Module]:
    """Switch a timm network's blocks to scaled dot-product attention; return the modules that did not use it."""
    changed = []
    for module in student.get_submodule("blocks").modules():
        if getattr(module, "fused_attn", True) is False:
            module.fused_attn = True  # type: ignore[assignment]
            changed.append(module)
    return changed


def _fused_weight(block: nn.Module) -> Tensor | None:
    """Return the weight of a block's one projection to q, k and v, if it has one for equally many of each."""
    attn: Any = getattr(block, "attn", None)
    weight = getattr(getattr(attn, "qkv", None), "weight", None)
    if not isinstance(weight, Tensor) or getattr(attn, "num_kv_heads", None) not in (None, attn.num_heads):
        return None
    return weight if weight.shape[0] % 3 == 0 else None
