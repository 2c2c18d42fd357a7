"""How a teacher's architecture is hashed, so that runs from before a difference became a component stay found.

A part of a teacher that no student could be given was one of its ``differences``. When it becomes a component, the
teacher's description changes, and nothing else: neither its weights, which the hash names, nor its maps. So a teacher's
network (not a student's) is hashed as it was first described: such components are written as the differences that they
were, without their values, which the weights' network determines. A student that has one of them is a new network, and
hashes as any. Old and new descriptions of one teacher have equal hashes; runs of both are the same runs.
"""

from __future__ import annotations

from typing import Any

FORMER_DIFFERENCES: dict[str, str] = {
    **{
        name: name
        for name in (
            *("attn_norm", "distillation_token", "gelu_tanh", "mlp_norm", "no_last_norm", "no_proj_bias"),
            *("no_qkv_bias", "norm_before_pool", "patch_norm", "pool_includes_prefix", "post_norm", "qk_norm"),
            *("rope", "swiglu"),
        )
    },
    "rms_norm": "no_layer_norm",
}
"""Component -> the difference that it was. Frozen: a row leaves or changes only with ``SEMANTICS``."""

FORMER_VALUES: dict[str, str] = {"attention_pool": "other_attention_pool", "layer_scale": "one_layer_scale"}
"""Component that was one already -> the difference that a teacher also had if the component has values."""

DISTILLATION_TOKEN = "distillation_token"
"""Its token was described as one of the component ``registers``."""


def as_first_described(network: dict[str, Any]) -> dict[str, Any]:
    """Return a teacher's network, as a JSON object, in its first description. One in it already is returned equal."""
    components, values = list(network["components"]), [list(pair) for pair in network.get("values", [])]
    owners = {name.partition(".")[0] for name, _ in values}
    was = {FORMER_DIFFERENCES[name] for name in components if name in FORMER_DIFFERENCES}
    was |= {difference for name, difference in FORMER_VALUES.items() if name in owners}
    kept = {name for name in components if name not in FORMER_DIFFERENCES}
    if DISTILLATION_TOKEN in components:
        kept.add("registers")
    described = {*FORMER_DIFFERENCES, *FORMER_VALUES}
    return {
        **network,
        "components": sorted(kept),
        "differences": sorted({*network.get("differences", []), *was}),
        "values": [pair for pair in values if pair[0].partition(".")[0] not in described],
    }
