"""Scaled dot-product attention (SDPA) as a primitive, without silent fallbacks, and with its kernels' by-products.

Shapes: q, k, v are [B, H, N, *]; a bias is [H, N, N].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_KERNELS = {
    "ScaledDotProductFlashAttentionForCpuBackward0": "flash",
    "ScaledDotProductFlashAttentionBackward0": "flash",
    "ScaledDotProductEfficientAttentionBackward0": "efficient",
    "ScaledDotProductCudnnAttentionBackward0": "cudnn",
}


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Compute ``softmax(scale * q k^T + bias) v`` by a kernel that stores no map. No gradient reaches the bias.

    SDPA silently falls back to a formula with N x N tensors for a mask that requires a gradient, for a
    three-dimensional mask on a CPU, and for unequal head widths. Hence the padding: zeros appended to q and k change no
    product, those appended to v are cut off again. Widths are padded to multiples of 8, as CUDA's kernels require; SDPA
    would pad by itself, but then hide which kernel ran.
    """
    width = max(q.shape[-1], v.shape[-1])
    width = width if q.device.type in ("cpu", "meta") else -(-width // 8) * 8  # meta: used to count operations
    q, k, padded = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    mask = None if bias is None else bias.detach().to(q.dtype)[None]
    out = F.scaled_dot_product_attention(q, k, padded, attn_mask=mask, scale=scale)
    return out if v.shape[-1] == width else out[..., : v.shape[-1]]


def kernel(out: Tensor) -> str | None:
    """Return the kernel that computed ``out``, a result of :func:`attention` with a gradient; None if unknown."""
    node = _node(out)
    return None if node is None else _KERNELS[node.name()]


def logsumexp(out: Tensor) -> Tensor | None:
    """Return the rows' log-sum-exp [B, H, N] that the kernel saved for its backward pass; None if not available.

    ``out`` is a result of :func:`attention` that has a gradient.
    """
    node = _node(out)
    if node is None:
        return None
    for name in ("_saved_logsumexp", "_saved_log_sumexp"):
        if isinstance(kept := getattr(node, name, None), Tensor) and kept.dim() in (3, 4):
            batch, heads, tokens = out.shape[:3]
            kept = kept.flatten(2)[..., :tokens]  # the memory-efficient kernel pads the rows, cuDNN's is [B, H, N, 1]
            return kept if kept.shape == (batch, heads, tokens) else None
    return None


def _node(out: Tensor) -> torch.autograd.graph.Node | None:
    node = out.grad_fn
    while node is not None and node.name() == "SliceBackward0":
        node = node.next_functions[0][0]
    return node if node is not None and node.name() in _KERNELS else None
