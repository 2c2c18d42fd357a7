"""Native components: parts that a teacher has and the plain ViT lacks, each detected on a network or added to one.

The *standard* student follows its teacher where maps require their tokens to line up, even though this departs from the
plain ViT: in the token grid (image and patch size) and in whether there is a class token (``no_class_token``, the one
component that is ``followed``: it is stored as ``Network.class_token``, never in ``Network.components``). It also
follows width, depth, heads and MLP width. Everything else here is *ablated*: the standard student has none of it, and a
student can be given any subset of its teacher's components.

The set is open: :func:`register_component`, or an entry point of the group ``atdiag.components`` that names a
:class:`Component` (which also reaches the processes that train). A new one needs no other file, wherever it acts: on q
and k (``Attention.qk_hooks``), on the logits (``Attention.rel_pos_bias``), or anywhere else in the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from itertools import product
from typing import Any

import torch
from timm.layers import PatchEmbed, gen_relative_position_index
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from atdiag.core.errors import suggest
from atdiag.core.spec import PLAIN_NORM_EPS, Network


class RelPosBias(nn.Module):
    """BEiT's relative position bias: a learned value for each head and each offset between patches.

    Returns [H, N, N] for the whole token sequence. The class token has three values (to it, from it, with itself), as
    in BEiT; registers, which have no position, get zero bias.
    """

    index: Tensor
    places: Tensor

    def __init__(self, grid: int, class_token: bool, registers: int, heads: int) -> None:
        super().__init__()
        rows = (2 * grid - 1) ** 2 + 3 * class_token
        # timm's name, so that the keys of a BEiT checkpoint match.
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
        index = gen_relative_position_index((grid, grid), class_token=class_token)
        self.register_buffer("index", index, persistent=False)
        self.registers = registers
        patches, prefix = grid**2, int(class_token)
        # Indices of the tokens with a bias: a buffer, since a copy to a GPU at each step would block.
        places = torch.tensor([*range(prefix), *range(prefix + registers, prefix + registers + patches)])
        self.register_buffer("places", places, persistent=False)

    def forward(self) -> Tensor:
        """Return the bias [H, N, N]."""
        bias = self.relative_position_bias_table[self.index.flatten()]
        bias = bias.view(*self.index.shape, -1).permute(2, 0, 1)
        if not self.registers:
            return bias.contiguous()
        full = bias.new_zeros(bias.shape[0], *(size + self.registers for size in bias.shape[1:]))
        heads = torch.arange(bias.shape[0], device=bias.device)[:, None, None]
        return full.index_put((heads, self.places[:, None], self.places), bias)


@dataclass(frozen=True)
class Component:
    """One native component.

    summary: a description of its function, in a paragraph. source: the publication that describes it.
    found: predicate on a built network, one of ours or timm's ``VisionTransformer``, ``Beit`` or ``Eva``. It must check
        every block if the component explains a difference, since nothing else does then.
    arguments: changes to the arguments of timm's ``VisionTransformer``.
    attach: adds or removes parts after the network is built. Components are attached in the order of their names.
    keys: renames its weights in a timm state dict to our names, in place, if they differ; called with the state dict
        and the description of the network. Must leave our own state dicts unchanged (:func:`renamed` makes such a
        function).
    explains: names of ``Network.differences`` that this component accounts for: a network that has the component no
        longer counts as different in these respects, so a student can be given them.
    belongs_to_map: whether it acts only on q, k or the logits, so that a copied map includes its whole effect.
    parameters: fragments of the names of its parameters.
    initial: constant initial values of its parameters, by the last part of their name, where these differ from the
        general rules (``students.initialise``).
    followed: whether every student of a teacher has it, so that it can't be chosen (see the module).
    """

    name: str
    summary: str
    source: str
    found: Callable[[nn.Module], bool]
    arguments: Callable[[Network], dict[str, Any]] = lambda network: {}
    attach: Callable[[VisionTransformer, Network], None] = lambda vit, network: None
    keys: Callable[[dict[str, Tensor], Network], None] = lambda state, network: None
    explains: frozenset[str] = frozenset()
    belongs_to_map: bool = False
    parameters: tuple[str, ...] = field(default=())
    initial: Callable[[Network], dict[str, float | None]] = lambda network: {}
    followed: bool = False


def patch_embedding(bias: bool) -> Callable[..., PatchEmbed]:
    """Return timm's patch embedding class, with or without a bias regardless of the rest of the network.

    timm ties the bias to the norm before the blocks (``bias=not pre_norm``); here each is a separate component.
    """

    def build(*args: Any, **options: Any) -> PatchEmbed:
        return PatchEmbed(*args, **{**options, "bias": bias})

    return build


def branch_scales(block: Any) -> list[Tensor | None]:
    """Return the scales of a block's two residual branches (attention, MLP), under either of timm's names."""
    own = [getattr(getattr(block, name, None), "gamma", None) for name in ("ls1", "ls2")]
    return [getattr(block, f"gamma_{n}", None) if scale is None else scale for n, scale in enumerate(own, start=1)]


def qkv_biases(attn: Any) -> tuple[bool, bool, bool]:
    """Return which of q, k, v have a bias, in our attention module or timm's (where BEiT's k has a buffer of zeros)."""
    fused = getattr(attn, "qkv", None)
    if fused is not None and fused.bias is not None:
        return True, True, True
    parts = ((getattr(attn, f"{n}_bias", None), getattr(attn, f"{n}_proj", None)) for n in "qkv")
    q, k, v = (isinstance(own, nn.Parameter) or (proj is not None and proj.bias is not None) for own, proj in parts)
    return q, k, v


def layer_norms(module: nn.Module) -> list[nn.LayerNorm]:
    """Return all LayerNorms of a network."""
    return [m for m in module.modules() if isinstance(m, nn.LayerNorm)]


def renamed(names: Mapping[str, str]) -> Callable[[dict[str, Tensor], Network], None]:
    """Make a function for ``Component.keys`` that renames parts of every block.

    names: timm's name of a parameter or a module within a block -> ours (``{"gamma_1": "ls1.gamma"}``).
    """

    def rename(state: dict[str, Tensor], network: Network) -> None:
        for block, (old, new) in product(range(network.depth), names.items()):
            at = f"blocks.{block}.{old}"
            for key in [key for key in state if key == at or key.startswith(f"{at}.")]:
                state[f"blocks.{block}.{new}{key.removeprefix(at)}"] = state.pop(key)

    return rename


def _first_block(model: Any) -> Any:
    return model.blocks[0]


def _attention(model: Any) -> Any:
    return getattr(_first_block(model), "attn", None)


def _has(name: str) -> Callable[[Any], bool]:
    """Return a predicate: whether a network has an attribute that is neither None nor an identity module."""
    return lambda model: not isinstance(getattr(model, name, None), nn.Identity | None)


def _without(name: str) -> Callable[[Any], bool]:
    return lambda model: getattr(model, name, None) is None


def _has_position_bias(model: Any) -> bool:
    # In BEiT it may be one table shared by all blocks, held by the network.
    tables = (getattr(_attention(model), name, None) for name in ("rel_pos_bias", "relative_position_bias_table"))
    return _has("rel_pos_bias")(model) or any(table is not None for table in tables)


def _attach_position_bias(vit: VisionTransformer, network: Network) -> None:
    for block in vit.blocks:
        block.attn.rel_pos_bias = RelPosBias(network.grid, network.class_token, network.registers, network.heads)


def _give_tables(state: dict[str, Tensor], network: Network) -> None:
    """Convert the position biases of timm's BEiT to ours: to a block's own table the one shared by all is added."""
    table = "relative_position_bias_table"
    renamed({f"attn.{table}": f"attn.rel_pos_bias.{table}"})(state, network)
    shared = state.pop(f"rel_pos_bias.{table}", None)
    if shared is not None:
        for key in (f"blocks.{block}.attn.rel_pos_bias.{table}" for block in range(network.depth)):
            state[key] = state[key] + shared if key in state else shared


def _detach_k_bias(vit: VisionTransformer, network: Network) -> None:
    for block in vit.blocks:
        block.attn.register_parameter("k_bias", None)


COMPONENTS: dict[str, Component] = {}
"""All components by name."""


def register_component(component: Component) -> None:
    """Add a component to the set. Raises ValueError for a name that is taken."""
    if component.name in COMPONENTS:
        raise ValueError(f"there is already a component {component.name!r}")
    COMPONENTS[component.name] = component


for _component in (
    Component(
        "layer_scale",
        "A learned factor per channel on each residual branch. It starts small (0.1 to 1e-6), so that every block "
        "starts near the identity, which lets deep networks train.",
        "Touvron et al. 2021, Going deeper with Image Transformers (CaiT), section 2",
        found=lambda model: any(scale is not None for scale in branch_scales(_first_block(model))),
        arguments=lambda network: {"init_values": network.layer_scale_init},
        keys=renamed({"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}),
        parameters=("ls1.", "ls2."),
        initial=lambda network: {"gamma": network.layer_scale_init},
    ),
    Component(
        "registers",
        "Extra learned tokens that belong to no patch and are dropped at the output. They take over the role of the "
        "few patch tokens of high norm that large networks otherwise use to hold global information. Positions are "
        "then given to patches alone, as in DINOv2 with registers.",
        "Darcet et al. 2024, Vision Transformers Need Registers, section 2",
        found=_has("reg_token"),
        arguments=lambda network: {"reg_tokens": network.registers, "no_embed_class": True},
        parameters=("reg_token",),
    ),
    Component(
        "pre_norm",
        "A LayerNorm on the embedded tokens before the first block, beside the usual ones within the blocks.",
        "Radford et al. 2021, CLIP, section 2.4",
        found=_has("norm_pre"),
        arguments=lambda network: {"pre_norm": True},
        parameters=("norm_pre.",),
    ),
    Component(
        "no_patch_bias",
        "The patch embedding has no bias. Before position embeddings a bias is redundant for the patches, whose "
        "positions can hold it.",
        "Radford et al. 2021, CLIP (published code)",
        found=lambda model: model.patch_embed.proj.bias is None,  # type: ignore[union-attr]
        arguments=lambda network: {"embed_layer": patch_embedding(bias=False)},
    ),
    Component(
        "quick_gelu",
        "The activation x * sigmoid(1.702 x) in place of GELU, which it approximates.",
        "Hendrycks and Gimpel 2016, GELUs, section 2; used by CLIP's published weights",
        found=lambda model: (
            type(getattr(getattr(_first_block(model), "mlp", None), "act", None)).__name__ == "QuickGELU"
        ),
        arguments=lambda network: {"act_layer": "quick_gelu"},
    ),
    Component(
        "ln_eps",
        "An epsilon of every LayerNorm other than the plain ViT's 1e-6 (CLIP: 1e-5). It matters where tokens have "
        "little variance, as embedded patches at the start of training have.",
        "Radford et al. 2021, CLIP (published code: torch's default)",
        found=lambda model: any(norm.eps != PLAIN_NORM_EPS for norm in layer_norms(_first_block(model))),
    ),
    Component(
        "rel_pos_bias",
        "A learned bias on the attention logits for each head and each offset between two patches.",
        "Shaw et al. 2018; in this form Bao et al. 2022, BEiT, after Raffel et al. 2020",
        found=_has_position_bias,
        attach=_attach_position_bias,
        keys=_give_tables,
        belongs_to_map=True,
        parameters=("rel_pos_bias.",),
    ),
    Component(
        "no_k_bias",
        "Queries and values have a bias, keys none. A bias of the keys adds the same number to all logits of a query, "
        "so softmax does not see it: the maps that can be had are the same, with fewer parameters.",
        "Bao et al. 2022, BEiT (published code)",
        found=lambda model: qkv_biases(_attention(model)) == (True, False, True),
        attach=_detach_k_bias,
        belongs_to_map=True,
        parameters=("attn.q_bias", "attn.v_bias"),
    ),
    Component(
        "no_abs_pos",
        "No absolute position embedding: where a patch is shows in relative positions alone, if at all.",
        "Bao et al. 2022, BEiT, as fine-tuned and as in BEiT v2",
        found=_without("pos_embed"),
        arguments=lambda network: {"pos_embed": "none"},
    ),
    Component(
        "mean_pool",
        "The output is the mean of the patch tokens, normed after pooling, although there is a class token: that takes "
        "part in attention and is read by nothing.",
        "Bao et al. 2022, BEiT, as fine-tuned on image classification",
        found=lambda model: not _without("cls_token")(model) and getattr(model, "global_pool", None) == "avg",
        arguments=lambda network: {"global_pool": "avg"},
        parameters=("fc_norm.",),
    ),
    Component(
        "attention_pool",
        "The output is pooled by one learned query that attends to all tokens, in place of class token or mean.",
        "Zhai et al. 2022, Scaling Vision Transformers, section 3.1; used by SigLIP",
        found=_has("attn_pool"),
        arguments=lambda network: {"global_pool": "map"},
        parameters=("attn_pool.",),
    ),
    Component(
        "no_class_token",
        "There is no class token: the sequence is patches (and registers) alone, and the output is pooled over them.",
        "Zhai et al. 2022, Scaling Vision Transformers, section 3.1; used by SigLIP",
        found=_without("cls_token"),
        arguments=lambda network: {"class_token": False},
        followed=True,
    ),
):
    register_component(_component)


def resolve(names: Iterable[str]) -> list[Component]:
    """Return the components of the given names. Raises ValueError for an unknown or a ``followed`` one."""
    out = []
    for name in names:
        if name not in COMPONENTS:
            raise ValueError(f"unknown component {name!r}{suggest(name, COMPONENTS)} (known: {', '.join(COMPONENTS)})")
        if COMPONENTS[name].followed:
            raise ValueError(f"{name} is not a component to choose: every student has it if its teacher does")
        out.append(COMPONENTS[name])
    return out


def inspect(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a built network's native components, without those that every student follows."""
    return tuple(sorted(name for name, c in COMPONENTS.items() if not c.followed and c.found(model)))


for _entry in entry_points(group="atdiag.components"):  # last, since such a module imports this one
    register_component(_entry.load())
