"""Build a teacher's published network with timm: on the meta device for planning, on the CPU for loading.

Imports timm on first use, and nothing heavy before.
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

from atdiag.core.errors import UserError, suggest
from atdiag.core.spec import Network
from atdiag.networks.weights.sources import Source

if TYPE_CHECKING:
    from torch import nn


def known_models() -> tuple[str, ...]:
    """Return all model names that timm currently knows, with and without pre-training tags."""
    import timm

    return (*timm.list_models(), *timm.list_models(pretrained=True))


def timm_source(model: str, name: str | None = None, **own: Any) -> Source:
    """Return the source of any timm model; ``own`` overrides timm's configuration.

    Raises UserError for a name that timm does not know.
    """
    import timm

    if model not in known_models():
        raise UserError(f"timm has no model {model!r}{suggest(model, known_models())}", "see timm.list_models()")
    facts = timm.get_pretrained_cfg(model)
    hub = None if facts is None or facts.hf_hub_filename else facts.hf_hub_id
    given = {key: value for key, value in own.items() if value is not None}
    return Source(**{"name": name or f"timm:{model}", "model": model, "hub": hub, **given})


def build(source: Source, image_size: int, *, meta: bool, as_is: bool = False) -> nn.Module:
    """Build timm's network at an image size. meta: without allocating or initialising weights.

    The argument ``norm_eps``, which timm lacks, is the epsilon of all LayerNorms. A NaFlexVit becomes the plain ViT
    that it is at that size (:mod:`atdiag.networks.timm.flexible`), unless ``as_is``.

    Raises UserError if the architecture can't be built for this or any image size.
    """
    import timm
    import torch

    given = dict(source.arguments)
    if (eps := given.pop("norm_eps", None)) is not None:
        given["norm_layer"] = partial(torch.nn.LayerNorm, eps=eps)
    from atdiag.networks.timm import shapes

    try:
        with shapes.without_values() if meta else torch.device("cpu"):
            model: nn.Module = timm.create_model(source.model, img_size=image_size, **given)
    except TypeError:  # its constructor takes no image size: find out what it is
        raise UserError(f"{source.name} can't be a teacher: {_why_not(source)}") from None
    except (AssertionError, ValueError) as fault:
        raise UserError(f"{source.name} can't be built for images of {image_size} px ({fault})") from None
    from atdiag.networks.timm import flexible, inspection

    any_size = flexible.is_flexible(model)
    patch = getattr(getattr(model, "embeds" if any_size else "patch_embed", None), "patch_size", None)
    if patch is None:
        reason = inspection.why_not(model) or "it has no patch embedding of one size"
        raise UserError(f"{source.name} (timm's {type(model).__name__}) can't be a teacher: {reason}")
    side = patch if isinstance(patch, int) else max(patch)
    if image_size % side:
        low = image_size // side * side
        raise UserError(
            f"{source.name} has patches of {side} px, and {image_size} px is not a multiple of that",
            f"add `data.image_size`={low or low + side}{f', or {low + side}' if low else ''}",
        )
    return flexible.plain(model, image_size) if any_size and not as_is else model


def _why_not(source: Source) -> str:
    """Explain why a network that can't be built for an image size can't be a teacher."""
    import timm

    from atdiag.networks.timm import inspection, shapes

    with shapes.without_values():
        model = timm.create_model(source.model, **source.arguments)
    return inspection.why_not(model) or "timm's constructor of it takes no image size"


def pixels(source: Source) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation by which a source's network normalises pixels in [0, 1]."""
    import timm

    facts = timm.get_pretrained_cfg(source.model)
    mean, std = source.mean or (facts and facts.mean), source.std or (facts and facts.std)
    if not mean or not std:
        raise UserError(
            f"timm does not say how {source.model}'s pixels are normalised", "register it with mean and std"
        )
    return tuple(mean), tuple(std)


def native_size(source: Source) -> int:
    """Return a source's own image size, else that in timm's configuration of its model, in pixels."""
    import timm

    if source.image_size is not None:
        return source.image_size
    facts = timm.get_pretrained_cfg(source.model)
    return 224 if facts is None else int(facts.input_size[-1])


def network(source: Source, image_size: int) -> Network:
    """Return the architecture of a source at an image size, by inspection of the network that timm builds.

    Raises UserError, with the reason, for a network that is not a softmax-attention ViT.
    """
    arguments = tuple(sorted(source.arguments.items()))
    return _network(source.name, source.model, arguments, *pixels(source), image_size)


@cache
def _network(
    name: str,
    model: str,
    arguments: tuple[tuple[str, Any], ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    image_size: int,
) -> Network:
    from atdiag.networks.timm import inspection

    built = build(Source(name=name, model=model, arguments=dict(arguments)), image_size, meta=True)
    return inspection.describe(built, mean, std)
