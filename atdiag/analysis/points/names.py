"""Names of hook points: TransformerLens's (3.9), those of our own, and the short names of the command line.

Follows ``transformer_lens.utilities.get_act_name``: ``("pattern", 5)`` and ``"pattern5"`` are
``blocks.5.attn.hook_pattern``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

NamesFilter: TypeAlias = str | Sequence[str] | Callable[[str], bool] | None
"""Which points: one name, several, or a function of a name; None: all, without ``hook_result``."""

_ATTN = frozenset({"q", "k", "v", "z", "rot_q", "rot_k", "score_q", "score_k", "attn_scores", "pattern", "result"})
_MLP = frozenset({"pre", "pre_linear", "mid", "post"})
_ALIASES = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "query": "q",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_mid": "mid",
    "mlp_post": "post",
}
_PARTS = {"a": "attn", "m": "mlp", "b": "", "block": "", "blocks": "", "attention": "attn"}

TRACED = {
    "map": "attn.hook_pattern",
    "logits": "attn.hook_attn_scores",
    "q": "attn.hook_score_q",
    "k": "attn.hook_score_k",
    "v": "attn.hook_v",
    "attn": "attn.hook_out",
    "mlp": "mlp.hook_out",
    "residual": "hook_resid_post",
}
"""What 'atdiag trace' calls a quantity -> the hook point of a block that it is."""


def act_name(name: str, layer: int | None = None, part: str | None = None) -> str:
    """Return the full name of a point from a short one: ``act_name("scale", 2, "ln1")``, ``act_name("k6")``.

    part: the part of the block (``attn``, ``mlp``, ``ln1``, ``ls1`` ...), where the name does not say which.

    >>> act_name("pattern", 5), act_name("hook_pattern", 5), act_name("attn.hook_pattern", 5)
    ('blocks.5.attn.hook_pattern', 'blocks.5.attn.hook_pattern', 'blocks.5.attn.hook_pattern')
    >>> act_name("ln1.hook_scale", 2), act_name("hook_resid_pre", 0), act_name("hook_embed")
    ('blocks.2.ln1.hook_scale', 'blocks.0.hook_resid_pre', 'hook_embed')
    """
    if "." in name or name.startswith("hook_"):
        if layer is None and part is None:
            return name
        own, _, leaf = name.rpartition(".")  # ("attn.hook_pattern", 5) and ("hook_pattern", 5) name it, too
        name, part = leaf.removeprefix("hook_"), part or own or None
    where = None if layer is None else str(layer)
    if layer is None and (found := re.match(r"([a-z_]+?)(\d+)([a-z]?.*)$", name)):
        name, where, part = found[1], found[2], found[3] or part
    name = _ALIASES.get(name, name)
    if name in _ATTN:
        part = "attn"
    elif name in _MLP:
        part = "mlp"
    elif part is not None:
        part = _PARTS.get(part, part)
    at = "" if where is None else f"blocks.{where}."
    at += f"{part}." if part else ""
    if where is None and name in ("scale", "normalized"):
        at = f"ln_final.{at}"
    return f"{at}hook_{name}"


def layer_of(name: str) -> int:
    """Return the block of a point. Raises ValueError for a point outside the blocks."""
    found = re.match(r"blocks\.(\d+)\.", name)
    if not found:
        raise ValueError(f"{name} is in no block")
    return int(found[1])


def leaf_of(name: str) -> str:
    """Return the name of a point within its block, such as ``attn.hook_q``; unchanged for one outside the blocks."""
    return re.sub(r"^blocks\.\d+\.", "", name)


def predicate(names: NamesFilter) -> Callable[[str], bool]:
    """Return a filter as a function of the full name."""
    if names is None:
        return lambda name: not name.endswith("hook_result")
    if callable(names):
        return names
    chosen = frozenset([names] if isinstance(names, str) else names)
    return chosen.__contains__
