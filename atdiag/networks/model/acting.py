"""Whether a component can change a student, given what its teacher transfers. Imports no torch, since planning uses it.

A component of the map acts on q, k or the attention logits alone (``Component.belongs_to_map``): where the teacher's
map is copied for all blocks and heads, the student computes none of these. The bias of the keys adds the same number to
all logits of a query, and softmax cancels it: without that bias a student has fewer parameters (its width, in each
block), but computes the same function, gets the same gradients for everything else, and differs only by rounding. It
matters only where k is used outside the softmax: when k itself is distilled, or passes through another component
(rotary embedding turns a constant into something that depends on the position, a norm into one that depends on k).

Two components of the output's pooling act only where tokens are pooled: a student that reads its class token has no use
for them.
"""

from __future__ import annotations

from atdiag.core.spec import Network, Transfer
from atdiag.core.spec.losses import map_loss

OF_THE_MAP = frozenset({"no_k_bias", "qk_norm", "rel_pos_bias", "rope"})
"""Names of the package's components that belong to the map."""

AROUND_THE_MAP = frozenset(
    {
        *("attention_pool", "attn_norm", "distillation_token", "gelu_tanh", "layer_scale", "ln_eps", "mean_pool"),
        *("mlp_norm", "no_abs_pos", "no_class_token", "no_last_norm", "no_patch_bias", "no_proj_bias", "no_qkv_bias"),
        *("norm_before_pool", "patch_norm", "pool_includes_prefix", "post_norm", "pre_norm", "quick_gelu"),
        *("registers", "rms_norm", "swiglu"),
    }
)
"""Names of the package's components that act elsewhere. Those of other packages are looked up in ``components``."""


def belongs_to_map(name: str) -> bool:
    """Return whether a component acts on q, k or the attention logits alone. Raises ValueError for an unknown one."""
    if name in OF_THE_MAP or name in AROUND_THE_MAP:
        return name in OF_THE_MAP
    from atdiag.networks.model import components  # imports torch: only for a component of another package

    return components.resolve([name])[0].belongs_to_map


def why_idle(component: str, transfer: Transfer, network: Network) -> str | None:
    """Return why a component can't change a student under a transfer, as a clause about "it"; None if it can.

    network: the student that has the component.
    """
    if not belongs_to_map(component):
        return _why_unread(component, network)
    if _replaces_every_map(transfer, network):
        return "it acts on the attention logits, which copy of all blocks does not compute"
    if component == "no_k_bias" and not _uses_keys_outside_softmax(transfer, network):
        return "it takes away a term that is the same for all keys of a query, which softmax cancels"
    return None


def matters(component: str, transfer: Transfer, network: Network) -> bool:
    """Return whether a component of a student can change it under a transfer."""
    return why_idle(component, transfer, network) is None


def _replaces_every_map(transfer: Transfer, network: Network) -> bool:
    return (
        (transfer.method, transfer.tensor) == ("copy", "map")
        and set(transfer.layers) == set(range(network.depth))
        and (transfer.takes_all_heads or len(transfer.heads or ()) == network.heads)
    )


def _why_unread(component: str, network: Network) -> str | None:
    """Return why a component of the output's pooling does nothing, as a clause about "it"; None if it acts."""
    own = network.components
    averaged = "attention_pool" not in own and ("mean_pool" in own or not network.class_token)
    if component == "norm_before_pool" and not averaged:
        return "it acts on the mean of the tokens, and the output is no such mean"
    if component == "pool_includes_prefix":
        if not averaged and "attention_pool" not in own:
            return "it acts on what is pooled over tokens, and the output is the class token's"
        if not network.prefix_tokens:
            return "it acts on class token and registers, and there are none"
    return None


def _uses_keys_outside_softmax(transfer: Transfer, network: Network) -> bool:
    others = set(network.components) - {"no_k_bias", "rel_pos_bias"}
    if any(belongs_to_map(name) for name in others):  # k passes through them, and what they make of a constant varies
        return True
    if transfer.method != "distill" or transfer.tensor != "map":
        return transfer.method == "distill" and transfer.tensor == "k"
    loss = map_loss(transfer.loss or "ce")
    return loss.of_logits and loss.name != "logits_mse"  # which centres each row; another package's loss may not
