"""Wrap a timm network unmodified as a teacher: its maps are read where the network computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from atdiag.core.errors import UserError
from atdiag.core.spec import Network
from atdiag.transfer.attention import indices
from atdiag.transfer.observation import AttentionRecord, CaptureRequest, Observation, record_of_sdpa
from atdiag.transfer.ops import QK


class Foreign(nn.Module):
    """A softmax-attention ViT with differences not available to students (``Network.differences``), as a teacher.

    Maps are read from the network's own calls of scaled dot-product attention (SDPA), one in each block: q and k as
    they enter it, after rotary embedding and norms, with scale and mask, so that no part of the network is
    re-implemented. The constructor runs one image of zeros through all blocks and raises UserError unless each block
    attends exactly once, without dropout, over the tokens in the network's description. Any later deviation is a
    RuntimeError, never a wrong map.

    Takes ownership of the network: sets it to eval mode and to SDPA in every block.
    """

    mean: Tensor
    std: Tensor

    origin: Any = None
    """Origin of published weights, as a dataclass (see ``weights.Origin``)."""

    def __init__(self, model: nn.Module, network: Network) -> None:
        super().__init__()
        self.model = model
        self.network = network
        for module in self._blocks.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = True  # type: ignore[assignment]  # the explicit formula calls no SDPA
        self.register_buffer("mean", torch.tensor(network.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(network.std).view(1, -1, 1, 1), persistent=False)
        self.eval()
        self._check()

    @torch.no_grad()
    def _check(self) -> None:
        """Raise UserError if the maps of some block can't be read."""
        like = next(self.model.parameters())
        side = self.network.image_size
        self.to(like.device)
        every = frozenset(range(self.network.depth))
        try:
            self._run(like.new_zeros(1, self.network.channels, side, side), CaptureRequest(maps=every, features=every))
        except RuntimeError as fault:
            raise UserError(f"{type(self.model).__name__} can't be a teacher: {fault}") from None

    @property
    def _blocks(self) -> nn.Module:
        return self.model.get_submodule("blocks")

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, channels, S, S] in [0, 1] (the network normalises them) to the network's own output."""
        out: Tensor = self.model((images - self.mean) / self.std)
        return out

    @torch.no_grad()
    def observe(self, images: Tensor, wanted: CaptureRequest) -> Observation:
        """Run images [B, channels, S, S] in [0, 1] only as far as needed for the request; return the observation.

        Raises ValueError for a block that the network lacks.
        """
        asked = wanted.attention | wanted.features
        if asked and (min(asked) < 0 or max(asked) >= self.network.depth):
            raise ValueError(f"blocks {sorted(asked)}: the network has {self.network.depth}, counted from 0")
        return self._run(images, wanted) if wanted else Observation()

    def maps(self, images: Tensor, layers: Iterable[int]) -> dict[int, QK]:
        """Return the maps of some blocks for images [B, channels, S, S] in [0, 1]; q and k are [B, H, N, d]."""
        seen = self.observe(images, CaptureRequest(maps=frozenset(layers))).seen
        return {layer: one.qk for layer, one in seen.items()}

    def shared_tokens(self, other: Network) -> Tensor | None:
        """Return the indices of the tokens that a network with fewer registers also has, on our device; None: all."""
        shared = self.network.tokens_shared_with(other)
        return None if shared is None else indices(shared, self.mean.device)

    def _run(self, images: Tensor, wanted: CaptureRequest) -> Observation:
        """Run the network as far as needed: to a block's attention, to a block's end, or to its output."""
        seen: dict[int, AttentionRecord] = {}
        features: dict[int, Tensor] = {}
        inside: list[int] = []  # the running block, if any
        calls = [0] * self.network.depth
        last = wanted.whole_blocks

        def attends(*args: Any, **options: Any) -> None:
            if not inside:
                if calls[-1]:  # all blocks are through: attention pooling, say, which is no block's map
                    return
                raise RuntimeError("the network attends outside its blocks: no map can be given to a block")
            block = inside[0]
            calls[block] += 1
            if calls[block] > 1:
                raise RuntimeError(f"block {block} attends twice: it has no single map")
            if block in wanted.attention:
                seen[block] = _checked(self.network, images.shape[0], record_of_sdpa(*args, **options))
            if block == last and not wanted.logits:
                raise _EnoughError

        def leaves(block: int, out: Tensor) -> None:
            if not calls[block]:
                raise RuntimeError(f"block {block} made no call of scaled dot-product attention: its map can't be read")
            inside.clear()
            if block in wanted.features:
                features[block] = out
            if block == last - 1 and last not in wanted.attention and not wanted.logits:
                raise _EnoughError

        hooks = []
        for i, block in enumerate(self._blocks.children()):
            hooks.append(block.register_forward_pre_hook(lambda *_, i=i: inside.append(i)))
            hooks.append(block.register_forward_hook(lambda *seen, i=i: leaves(i, seen[-1])))
        try:
            with _OnAttention(attends):
                logits = self(images)
        except _EnoughError:
            return Observation(dict(sorted(seen.items())), features)
        finally:
            for hook in hooks:
                hook.remove()
        if not wanted.logits:
            raise RuntimeError(f"the network's forward pass never came to block {last}")
        return Observation(dict(sorted(seen.items())), features, logits)


class _EnoughError(Exception):
    """Everything requested has been captured: abort the rest of the forward pass."""


class _OnAttention(TorchFunctionMode):
    """While active, calls a function with the arguments of each scaled dot-product attention."""

    def __init__(self, call: Callable[..., None]) -> None:
        super().__init__()
        self.call = call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.call(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _checked(network: Network, images: int, record: AttentionRecord) -> AttentionRecord:
    """Raise RuntimeError unless a record is of all heads and tokens of the network; return it."""
    q, k = record.qk.q, record.qk.k
    expected = (images, network.heads, network.tokens)
    if q.shape[:3] != expected or k.shape != q.shape:
        raise RuntimeError(f"q {tuple(q.shape)}, k {tuple(k.shape)}: expected {expected} and a head's width")
    return record
