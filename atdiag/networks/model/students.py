"""Build a student for a teacher, and initialise it: from scratch, or from the teacher's weights module by module.

The *standard* student is DeiT's ViT (Touvron et al. 2021, Training data-efficient image transformers), with the
teacher's width, depth, heads, MLP width, token grid and class token (``components`` states what is followed and what is
ablated). Its design choices and their sources:

- blocks: norms before each branch, one bias for every projection, GELU, no LayerScale (Dosovitskiy et al. 2021, section
  3.1); LayerNorm's epsilon 1e-6 (the authors' code of ViT and DeiT);
- pooling: the class token, after the last norm (Dosovitskiy et al. 2021, section 3.1). For a teacher without one, the
  mean of the patch tokens (Beyer et al. 2022, Better plain ViT baselines), normed after pooling as in timm;
- position embedding: learned, one vector for each patch and the class token, added to the input (Dosovitskiy et al.
  2021, section 3.1; its appendix D.4 compares others);
- initialisation: see :func:`initialise`;
- head: one linear layer on the pooled token, with no hidden layer (as when ViT is fine-tuned, and as DeiT's).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from atdiag.core import randomness
from atdiag.core.spec import Init, Network, Transfer
from atdiag.networks.model import components
from atdiag.networks.model.components import Component
from atdiag.networks.model.vit import ViT

_TOKENS = ("pos_embed", "cls_token", "reg_token", "dist_token", "latent")
_BRANCHES = {"attn": ("ls1", "attn.proj"), "mlp": ("ls2", "mlp.fc2")}
"""A block's module -> the LayerScale of its branch, and the projection that it scales."""


def build(network: Network, seed: int) -> ViT:
    """Build a randomly initialised network."""
    vit = ViT(network)
    initialise(vit, seed)
    return vit


def freeze_unused(student: ViT, transfer: Transfer) -> None:
    """Exclude from training the parameters of attention that a copy leaves unused in all heads of a block."""
    if transfer.method == "copy" and transfer.takes_all_heads:
        for layer in transfer.layers:
            for parameter in student.blocks[layer].attn.unused_parameters(transfer.tensor).values():
                parameter.requires_grad_(False)


@cache
def parameters(network: Network) -> int:
    """Return the number of a network's parameters, without allocating them."""

    def count(shallow: Network) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in ViT(shallow).parameters())

    return _in_depth(network, count)


@cache
def flops(network: Network) -> int:
    """Return the floating-point operations of one forward pass for one image, without allocating anything.

    Counts matrix products and convolutions only, with a multiplication and an addition as two operations (papers that
    quote "GFLOPs" of ViTs often count them as one: half of this).
    """

    def count(shallow: Network) -> int:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            vit = ViT(shallow).requires_grad_(False)
            vit(torch.empty(1, network.channels, network.image_size, network.image_size))
        return int(counter.get_total_flops())

    return _in_depth(network, count)


def _in_depth(network: Network, count: Callable[[Network], int]) -> int:
    """Count in a network by counting with one and with two blocks: all are alike, so each further one adds the same.

    A dry run counts in every arm's network, and a forward pass on the meta device takes a second for 24 blocks.
    """
    if network.depth <= 2:
        return count(network)
    one, two = (count(network.model_copy(update={"depth": depth})) for depth in (1, 2))
    return one + (network.depth - 1) * (two - one)


def initialise(vit: ViT, seed: int) -> None:
    """Draw every parameter anew, each from a generator keyed by its name.

    Students with different components therefore share all parameters that they have in common. Matrices are
    Xavier-uniform (q, k and v separately, the patch embedding as a matrix), as in MAE, MoCo v3 and the 2024 paper; at
    the miniatures' widths this also trains well, where DeiT's fixed 0.02 does not. Biases are zero; norms one and zero;
    tokens and position embeddings normal with std 0.02; relative position biases normal with std 0.02; a component's
    constants (LayerScale) and what else it draws by a rule of its own (rotary frequencies) as it defines them.
    """
    constants: dict[str, float | None] = {}
    parts = components.resolve(vit.network.components)
    for component in parts:
        constants |= component.initial(vit.network)
    for name, parameter in vit.named_parameters():
        constant = constants.get(name.rsplit(".", 1)[-1])
        if (drawn := _drawn(name, parameter, vit.network, seed, parts)) is not None:
            with torch.no_grad():
                parameter.copy_(drawn)
        elif constant is None:
            _draw(name, parameter, vit.network, seed)
        else:
            nn.init.constant_(parameter, constant)


def _drawn(name: str, parameter: Tensor, network: Network, seed: int, parts: list[Component]) -> Tensor | None:
    """Return the values that a component draws for a parameter; None if none does."""
    for part in parts:
        generator = randomness.generator(seed, "init", name)
        if (values := part.drawn(name, tuple(parameter.shape), network, generator)) is not None:
            return torch.from_numpy(values)
    return None


@torch.no_grad()
def _draw(name: str, parameter: nn.Parameter, network: Network, seed: int) -> None:
    leaf = name.rsplit(".", 1)[-1]
    if leaf in _TOKENS:
        parameter.copy_(_token_values(name, parameter, network, seed))
    elif leaf == "relative_position_bias_table":
        draw = randomness.generator(seed, "init", name)
        parameter.copy_(torch.from_numpy(0.02 * draw.standard_normal(parameter.shape, dtype=np.float32)))
    elif parameter.ndim >= 2:
        fan_in, fan_out = parameter[0].numel(), parameter.shape[0]
        bound = math.sqrt(6 / (fan_in + fan_out))
        draw = randomness.generator(seed, "init", name)
        parameter.copy_(torch.from_numpy(bound * (2 * draw.random(parameter.shape, dtype=np.float32) - 1)))
    elif leaf.endswith("bias"):
        parameter.zero_()
    elif leaf == "weight":  # of a LayerNorm
        parameter.fill_(1.0)
    else:
        raise ValueError(f"no rule to initialise parameter {name!r} of shape {tuple(parameter.shape)}")


def _token_values(name: str, parameter: Tensor, network: Network, seed: int) -> Tensor:
    """Draw normal values [1, n, C]; a position embedding's patch rows don't depend on its prefix rows."""
    patches = network.grid**2 if name == "pos_embed" else 0
    prefix = parameter.shape[1] - patches
    parts = []
    for stream, rows in (("init/prefix", prefix), ("init", patches)):
        values = randomness.generator(seed, stream, name).standard_normal(
            (1, rows, parameter.shape[2]), dtype=np.float32
        )
        parts.append(torch.from_numpy(0.02 * values))
    return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Start:
    """How a student's parameters relate to its teacher's, by name, for the output and the run's record."""

    taken: tuple[str, ...]
    """Student parameters copied from the teacher."""
    folded: tuple[str, ...]
    """Teacher parameters absorbed exactly into a parameter of another name: LayerScale into the projection that follows
    it, the biases of q and v into that of q, k, v; and a last norm after pooling, taken for one before it, or the other
    way round."""
    dropped: tuple[str, ...]
    """Teacher parameters without a counterpart or an exact equivalent in the student."""
    fresh: tuple[str, ...]
    """Student parameters that keep their random initialisation."""


@torch.no_grad()
def start_from(student: ViT, teacher: ViT, init: Init) -> Start:
    """Copy the teacher's weights into a freshly initialised student, except what ``init`` re-initialises.

    A re-initialised module (``attn``: q, k, v, output projection and position bias of every block; ``mlp``:
    both layers) keeps its random values, and so does the LayerScale of its branch. Norms, embeddings and tokens
    are copied. The head is copied only if ``init.head``; ``init.head_rows`` selects the teacher's classes.

    Biases that the teacher lacks (of its keys, of its patch embedding) keep their initial value of zero, so that the
    student computes exactly the same.

    Raises ValueError for mismatched shapes and for rows that the teacher's head lacks.
    """
    have, own = teacher.state_dict(), student.state_dict()
    drawn = [f".{part}." for module in init.reinit for part in (module, _BRANCHES[module][0])]
    replaced = _replaced(student.network, teacher.network)

    def stays_fresh(name: str) -> bool:
        if name.startswith(("head.", "head_dist.")):
            return not init.head
        return name.startswith("blocks.") and any(part in name for part in (*drawn, *replaced))

    folded: list[str] = []
    for block, (scale, projection) in product(range(teacher.network.depth), _BRANCHES.values()):
        name = f"blocks.{block}.{scale}.gamma"
        if name in have and name not in own and init.layer_scale == "fold" and not stays_fresh(name):
            key = f"blocks.{block}.{projection}"
            if stays_fresh(f"{key}.weight"):
                continue
            have[f"{key}.weight"] = have[name][:, None] * have[f"{key}.weight"]
            if f"{key}.bias" in have:
                have[f"{key}.bias"] = have[name] * have[f"{key}.bias"]
            folded.append(name)

    for block in range(teacher.network.depth):
        q, v, fused = (f"blocks.{block}.attn.{name}" for name in ("q_bias", "v_bias", "qkv.bias"))
        if q in have and q not in own and not stays_fresh(fused):
            have[fused] = torch.cat([have[q], torch.zeros_like(have[q]), have[v]])
            folded += [q, v]

    for theirs, mine in (("fc_norm", "norm"), ("norm", "fc_norm")):
        for kind in ("weight", "bias"):
            name = f"{theirs}.{kind}"
            if name in have and name not in own and f"{mine}.{kind}" in own and f"{mine}.{kind}" not in have:
                have[f"{mine}.{kind}"] = have[name]
                folded.append(name)

    # The student's position embedding covers class token and patches; that of a teacher with registers covers only
    # patches, and that of one with a distillation token this, too.
    if "pos_embed" in have and "pos_embed" in own and have["pos_embed"].shape != own["pos_embed"].shape:
        patches = student.network.grid**2
        prefix = min(have["pos_embed"].shape[1], own["pos_embed"].shape[1]) - patches
        position = torch.zeros_like(own["pos_embed"])
        position[:, -patches:] = have["pos_embed"][:, -patches:]
        position[:, :prefix] = have["pos_embed"][:, :prefix]
        have["pos_embed"] = position

    if init.head_rows:
        have |= _head_rows(have, init.head_rows)

    taken = [n for n in have if n in own and not stays_fresh(n)]
    for name in taken:
        if have[name].shape != own[name].shape:
            raise ValueError(f"{name}: teacher {tuple(have[name].shape)}, student {tuple(own[name].shape)}")
        own[name] = have[name]
    student.load_state_dict(own)
    return Start(
        taken=tuple(taken),
        folded=tuple(folded),
        dropped=tuple(n for n in teacher.state_dict() if n not in own and n not in folded),
        fresh=tuple(n for n in own if n not in taken),
    )


def _replaced(student: Network, teacher: Network) -> tuple[str, ...]:
    """Return fragments of the names of parameters that are of another kind in one network than in the other."""
    apart = set(student.components) ^ set(teacher.components)
    unlike = {name for name in apart | set(student.components) if student.own(name) != teacher.own(name)}
    return tuple(name for part in components.resolve(apart | unlike) for name in part.replaces)


def _head_rows(have: dict[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    """Select and reorder the head's rows."""
    classes = have["head.weight"].shape[0]
    if outside := [row for row in rows if not 0 <= row < classes]:
        raise ValueError(f"head_rows {outside} are out of range: the teacher's head has {classes} classes")
    names = (f"{head}.{kind}" for head in ("head", "head_dist") for kind in ("weight", "bias"))
    return {name: have[name][list(rows)] for name in names if name in have}
