"""Activation patching: put values of one run into another, one place at a time, and measure the effect on the output.

Names, arguments and results as in ``transformer_lens.patching``; "tokens" are images. The run that is changed (the
"corrupted" one) and the run whose values are put in (the "clean" one) differ in their images, or in their networks:
:func:`aligned` fits a cache of another network, such as a teacher's, to a student.

    >>> import torch
    >>> from atdiag import hooked, patching
    >>> model, images = hooked("deit_s"), torch.rand(2, 4, 1, 20, 20)
    >>> logits, cache = model.run_with_cache(images[0])
    >>> def metric(logits):
    ...     return logits[:, 3].mean()
    >>> patching.get_act_patch_attn_head_out_all_pos(model, images[1], cache, metric, progress=False).shape
    torch.Size([12, 2])

After Meng et al. 2022 (Locating and editing factual associations in GPT) and Vig et al. 2020 (Causal mediation
analysis); how to choose runs and metrics: Zhang and Nanda 2024 (Towards best practices of activation patching).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from atdiag.analysis.points.names import act_name, leaf_of
from atdiag.analysis.replacements import check_tokens, kept_tokens
from atdiag.core.errors import UserError, suggest
from atdiag.hooks.cache import ActivationCache
from atdiag.hooks.model import HookedViT

if TYPE_CHECKING:
    import pandas as pd

Axis = Literal["layer", "pos", "head_index", "head", "src_pos", "dest_pos"]
Metric = Callable[[Tensor], Any]
"""A function from the logits [B, classes] to a number."""
Setter = Callable[[Tensor, Sequence[int], Tensor], Tensor]
"""Called with the changed run's value, the index and the clean value; returns the value to go on with."""


# --- setters -------------------------------------------------------------------------------------------------------


def layer_patch_setter(value: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    """Put in everything; index: [layer]."""
    return clean.clone()


def layer_pos_patch_setter(value: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    """Put in one position of [B, N, ...]; index: [layer, pos]."""
    value[:, index[1]] = clean[:, index[1]]
    return value


def layer_head_vector_patch_setter(value: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    """Put in one head of [B, N, H, d]; index: [layer, head]."""
    value[:, :, index[1]] = clean[:, :, index[1]]
    return value


def layer_pos_head_vector_patch_setter(value: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    """Put in one position of one head of [B, N, H, d]; index: [layer, pos, head]."""
    _, pos, head = index
    value[:, pos, head] = clean[:, pos, head]
    return value


def layer_head_pattern_patch_setter(value: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    """Put in one head of [B, H, N, N]; index: [layer, head]."""
    value[:, index[1]] = clean[:, index[1]]
    return value


def layer_head_pos_pattern_patch_setter(value: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    """Put in the row of one query of one head of [B, H, N, N]; index: [layer, head, dest_pos]."""
    _, head, query = index
    value[:, head, query] = clean[:, head, query]
    return value


def layer_head_dest_src_pos_pattern_patch_setter(value: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    """Put in one entry of one head of [B, H, N, N]; index: [layer, head, dest_pos, src_pos]."""
    _, head, query, key = index
    value[:, head, query, key] = clean[:, head, query, key]
    return value


# --- patching ------------------------------------------------------------------------------------------------------


def generic_activation_patch(
    model: HookedViT,
    corrupted_images: Tensor,
    clean_cache: ActivationCache,
    patching_metric: Metric,
    patch_setter: Setter,
    activation_name: str,
    index_axis_names: Sequence[Axis] | None = None,
    index_df: pd.DataFrame | None = None,
    return_index_df: bool = False,
    *,
    layers: Sequence[int] | None = None,
    progress: bool = True,
) -> Any:
    """Return the metric after each patch, with one axis for each name, or one row for each row of ``index_df``.

    Runs the network once for each index, on ``corrupted_images`` [B, channels, S, S], with that part of one point
    replaced by the clean run's. The first axis is the layer. layers: some blocks alone; the result then has these on
    its first axis. progress: show a progress bar on a terminal or in a notebook. Runs without gradients. Raises
    UserError for a cache that does not fit.
    """
    if (index_df is None) == (index_axis_names is None):
        raise UserError("give the names of the axes or a table of indices, one of the two")
    if index_df is None:
        assert index_axis_names is not None
        ranges = [_range(model, axis, activation_name, layers) for axis in index_axis_names]
        rows = list(product(*ranges))
        shape = [len(one) for one in ranges]
    else:
        rows = [tuple(map(int, row)) for row in index_df.itertuples(index=False)]
        shape = [len(rows)]
    runs = each_patch(model, corrupted_images, clean_cache, patch_setter, activation_name, rows, progress)
    values = [float(patching_metric(logits)) for logits in runs]
    out = torch.tensor(values).reshape(shape)
    if not return_index_df:
        return out
    import pandas as pd

    return out, index_df if index_df is not None else pd.DataFrame(rows, columns=list(index_axis_names or ()))


@torch.no_grad()
def each_patch(
    model: HookedViT,
    images: Tensor,
    clean_cache: ActivationCache,
    setter: Setter,
    activation_name: str,
    rows: Sequence[Sequence[int]],
    progress: bool = False,
) -> Iterator[Tensor]:
    """Yield the logits [B, classes] of a run for each patch, whose index (the layer first) is a row.

    Raises UserError for a cache that does not fit.
    """
    for layer in sorted({row[0] for row in rows}):
        _check(model, clean_cache, act_name(activation_name, layer), images)
    for row in _shown(rows, progress):
        name = act_name(activation_name, row[0])
        hook = partial(_put, setter=setter, index=row, clean=clean_cache[name])
        yield model.run_with_hooks(images, fwd_hooks=[(name, hook)])


def _put(value: Tensor, hook: Any, setter: Setter, index: Sequence[int], clean: Tensor) -> Tensor:
    return setter(value, index, clean.to(value))


def _range(model: HookedViT, axis: Axis, name: str, layers: Sequence[int] | None) -> Sequence[int]:
    config = model.cfg
    if axis == "layer":
        return range(config.n_layers) if layers is None else layers
    if axis in ("head", "head_index"):
        grouped = config.n_key_value_heads if name in ("k", "v") else None
        return range(grouped or config.n_heads)
    if axis in ("pos", "src_pos", "dest_pos"):
        return range(config.n_ctx)
    known = ("layer", "pos", "head", "head_index", "src_pos", "dest_pos")
    raise UserError(f"there is no axis {axis!r}{suggest(axis, known)}", f"known: {', '.join(known)}")


def _check(model: HookedViT, cache: ActivationCache, name: str, images: Tensor) -> None:
    """Raise UserError for a clean value that is missing or does not fit the network."""
    model.check(name)
    wanted = [len(images) if length == "batch" else length for length in model.shapes[name]]
    if (found := list(cache[name].shape)) != wanted:
        raise UserError(
            f"{name} of the clean run is {found}, and that of {model.cfg.model_name} is {wanted}",
            "cache as many images, and fit a cache of another network with patching.aligned",
        )


def _shown(rows: Sequence[Any], progress: bool) -> Any:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    seen = progress and (console.is_terminal or console.is_jupyter)
    return track(rows, "patching", console=console, transient=True, disable=not seen)


def aligned(cache: ActivationCache, model: HookedViT) -> ActivationCache:
    """Return the cache of another network with the tokens of a network that lacks its registers.

    A pattern is renormalised over the tokens that remain. Raises UserError for networks whose heads, patches or class
    token differ.
    """
    source, mine = cache.model.subject, model.subject
    check_tokens(mine, source)
    kept = kept_tokens(source.network, mine.network)
    if kept is None:
        return cache
    out = {}
    for name, value in cache.items():
        shape = cache.model.shapes[name.removesuffix("_grad")]
        if "pattern" in leaf_of(name):
            value = value[..., kept, :][..., kept]
            value = value / value.sum(-1, keepdim=True)
        else:
            for axis, length in enumerate(shape, -len(shape)):
                if length == source.network.tokens:
                    value = value.index_select(axis, torch.tensor(kept, device=value.device))
        out[name] = value
    return ActivationCache(out, model, cache.has_batch_dim)


def _function(name: str, setter: Setter, axes: Sequence[Axis], what: str) -> Callable[..., Any]:
    call = partial(generic_activation_patch, patch_setter=setter, activation_name=name, index_axis_names=tuple(axes))
    call.__doc__ = (
        f"Patch {what}; return the metric after each patch, [{', '.join(axes)}].\n\n"
        "Called as (model, corrupted_images, clean_cache, patching_metric); see generic_activation_patch."
    )
    return call


_VECTOR, _VECTOR_POS = layer_head_vector_patch_setter, layer_pos_head_vector_patch_setter
_POS: tuple[Axis, ...] = ("layer", "pos")
_HEAD: tuple[Axis, ...] = ("layer", "head")
_POS_HEAD: tuple[Axis, ...] = ("layer", "pos", "head")

get_act_patch_resid_pre = _function("resid_pre", layer_pos_patch_setter, _POS, "the residual stream before each block")
get_act_patch_resid_mid = _function("resid_mid", layer_pos_patch_setter, _POS, "the stream between the branches")
get_act_patch_attn_out = _function("attn_out", layer_pos_patch_setter, _POS, "what attention adds to the stream")
get_act_patch_mlp_out = _function("mlp_out", layer_pos_patch_setter, _POS, "what the MLP adds to the stream")
get_act_patch_attn_head_out_by_pos = _function("z", _VECTOR_POS, _POS_HEAD, "each head's output (z), by position")
get_act_patch_attn_head_q_by_pos = _function("q", _VECTOR_POS, _POS_HEAD, "each head's queries, by position")
get_act_patch_attn_head_k_by_pos = _function("k", _VECTOR_POS, _POS_HEAD, "each head's keys, by position")
get_act_patch_attn_head_v_by_pos = _function("v", _VECTOR_POS, _POS_HEAD, "each head's values, by position")
get_act_patch_attn_head_pattern_by_pos = _function(
    "pattern", layer_head_pos_pattern_patch_setter, ("layer", "head_index", "dest_pos"), "each query's attention"
)
get_act_patch_attn_head_pattern_dest_src_pos = _function(
    "pattern",
    layer_head_dest_src_pos_pattern_patch_setter,
    ("layer", "head_index", "dest_pos", "src_pos"),
    "each entry of the attention pattern",
)
get_act_patch_attn_head_out_all_pos = _function("z", _VECTOR, _HEAD, "each head's output (z)")
get_act_patch_attn_head_q_all_pos = _function("q", _VECTOR, _HEAD, "each head's queries")
get_act_patch_attn_head_k_all_pos = _function("k", _VECTOR, _HEAD, "each head's keys")
get_act_patch_attn_head_v_all_pos = _function("v", _VECTOR, _HEAD, "each head's values")
get_act_patch_attn_head_pattern_all_pos = _function(
    "pattern", layer_head_pattern_patch_setter, ("layer", "head_index"), "each head's attention pattern"
)

ALL_HEADS = (
    get_act_patch_attn_head_out_all_pos,
    get_act_patch_attn_head_q_all_pos,
    get_act_patch_attn_head_k_all_pos,
    get_act_patch_attn_head_v_all_pos,
    get_act_patch_attn_head_pattern_all_pos,
)
"""Output, queries, keys, values, pattern."""


def get_act_patch_attn_head_all_pos_every(
    model: HookedViT, corrupted_images: Tensor, clean_cache: ActivationCache, metric: Metric, **options: Any
) -> Tensor:
    """Patch each head's output, q, k, v and pattern; return [5, layer, head]; 0 for key heads that are shared."""
    found = [call(model, corrupted_images, clean_cache, metric, **options) for call in ALL_HEADS]
    heads = model.cfg.n_heads
    return torch.stack([torch.nn.functional.pad(one, (0, heads - one.shape[-1])) for one in found])


def get_act_patch_attn_head_by_pos_every(
    model: HookedViT, corrupted_images: Tensor, clean_cache: ActivationCache, metric: Metric, **options: Any
) -> Tensor:
    """Patch each head's output, q, k, v and pattern by position; return [5, layer, pos, head]."""
    calls = (
        get_act_patch_attn_head_out_by_pos,
        get_act_patch_attn_head_q_by_pos,
        get_act_patch_attn_head_k_by_pos,
        get_act_patch_attn_head_v_by_pos,
        get_act_patch_attn_head_pattern_by_pos,
    )
    found = [call(model, corrupted_images, clean_cache, metric, **options) for call in calls]
    found[-1] = found[-1].transpose(1, 2)  # [layer, head, pos]
    heads = model.cfg.n_heads
    return torch.stack([torch.nn.functional.pad(one, (0, heads - one.shape[-1])) for one in found])


def get_act_patch_block_every(
    model: HookedViT, corrupted_images: Tensor, clean_cache: ActivationCache, metric: Metric, **options: Any
) -> Tensor:
    """Patch the stream before each block, and what attention and MLP add to it; return [3, layer, pos]."""
    calls = get_act_patch_resid_pre, get_act_patch_attn_out, get_act_patch_mlp_out
    return torch.stack([call(model, corrupted_images, clean_cache, metric, **options) for call in calls])
