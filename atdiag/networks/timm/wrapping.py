"""A teacher that is not built from our own modules: its maps are read where timm's network computes them."""

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
from atdiag.transfer.observation import AttentionRecord, CaptureRequest, Observation
from atdiag.transfer.ops import QK


class Foreign(nn.Module):
    """A softmax-attention ViT with differences that a student can't be given yet (``Network.differences``): it teaches.

    The maps are taken from the calls of scaled dot-product attention (SDPA) that the network itself makes, one in each
    block: q and k as they enter it, after rotary embedding and norms, with scale and mask. So nothing of the network is
    written a second time. One image of zeros goes through all blocks when the object is made: a network whose blocks do
    not each attend once, without dropout, over the tokens that its description names, is a UserError then. What
    changes later is a RuntimeError, never a wrong map.

    The network is brought to eval mode and to use SDPA in every block, and belongs to this object from then on.
    """

    mean: Tensor
    std: Tensor

    origin: Any = None
    """Where published weights came from, as a dataclass (see ``weights.Origin``)."""

    def __init__(self, model: nn.Module, network: Network) -> None:
        super().__init__()
        self.model = model
        self.network = network
        for module in self._blocks.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = True  # type: ignore[assignment]  # else the formula, which calls no SDPA
        self.register_buffer("mean", torch.tensor(network.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(network.std).view(1, -1, 1, 1), persistent=False)
        self.eval()
        self._check()

    @torch.no_grad()
    def _check(self) -> None:
        """Raises UserError where the maps of some block can't be read."""
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
        """Images [B, channels, S, S] in [0, 1] (not normalised: the network does that) -> its own output."""
        out: Tensor = self.model((images - self.mean) / self.std)
        return out

    @torch.no_grad()
    def observe(self, images: Tensor, wanted: CaptureRequest) -> Observation:
        """Run no further than what is wanted of images [B, channels, S, S] in [0, 1], and hand it out.

        Raises ValueError for a block that the network lacks.
        """
        asked = wanted.attention | wanted.features
        if asked and (min(asked) < 0 or max(asked) >= self.network.depth):
            raise ValueError(f"blocks {sorted(asked)}: the network has {self.network.depth}, counted from 0")
        return self._run(images, wanted) if wanted else Observation()

    def maps(self, images: Tensor, layers: Iterable[int]) -> dict[int, QK]:
        """The maps of some blocks for images [B, channels, S, S] in [0, 1]; q and k are [B, H, N, d]."""
        seen = self.observe(images, CaptureRequest(maps=frozenset(layers))).seen
        return {layer: one.qk for layer, one in seen.items()}

    def shared_tokens(self, other: Network) -> Tensor | None:
        """Indices of this network's tokens that a network with fewer registers also has, on its device; None if all."""
        shared = self.network.tokens_shared_with(other)
        return None if shared is None else indices(shared, self.mean.device)

    def _run(self, images: Tensor, wanted: CaptureRequest) -> Observation:
        """Run the network as far as anything is wanted: to a block's attention, to a block's end, or to its own end."""
        seen: dict[int, AttentionRecord] = {}
        features: dict[int, Tensor] = {}
        inside: list[int] = []  # the block that is running, if any
        calls = [0] * self.network.depth
        last = wanted.whole_blocks

        def attends(*args: Any, **options: Any) -> None:
            if not inside:
                raise RuntimeError("the network attends outside its blocks: no map can be given to a block")
            block = inside[0]
            calls[block] += 1
            if calls[block] > 1:
                raise RuntimeError(f"block {block} attends twice: it has no single map")
            if block in wanted.attention:
                seen[block] = _seen(self.network, images.shape[0], *args, **options)
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
    """All that was asked for is there: the rest of the forward pass is not needed."""


class _OnAttention(TorchFunctionMode):
    """While active, calls a function with the arguments of every scaled dot-product attention."""

    def __init__(self, call: Callable[..., None]) -> None:
        super().__init__()
        self.call = call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.call(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _seen(
    network: Network,
    images: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionRecord:
    """The map and the values of one call of scaled dot-product attention (its arguments, by their names)."""
    if is_causal or dropout_p:
        raise RuntimeError("the network attends with a causal mask or dropout: such a map can't be transferred")
    expected = (images, network.heads, network.tokens)
    if query.shape[:3] != expected or key.shape != query.shape:
        raise RuntimeError(f"q {tuple(query.shape)}, k {tuple(key.shape)}: expected {expected} and a width of a head")
    bias = None
    if attn_mask is not None:
        if not attn_mask.is_floating_point() or attn_mask.shape[-3:] != (network.heads, *2 * (network.tokens,)):
            raise RuntimeError(
                f"a mask of {attn_mask.dtype}, {tuple(attn_mask.shape)}, is no bias of the heads' logits"
            )
        if attn_mask.ndim == 4 and attn_mask.shape[0] != 1:
            raise RuntimeError("the network's mask differs between images: such a map can't be transferred")
        bias = attn_mask.reshape(attn_mask.shape[-3:])
    return AttentionRecord(QK(query, key, query.shape[-1] ** -0.5 if scale is None else scale, bias), value)
