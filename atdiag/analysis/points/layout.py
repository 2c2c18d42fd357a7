"""The hook points of a network: which it has, their shapes, where they are, and why it lacks the others.

Made from the network's modules alone, for our ViT and for timm's; no part of a network is re-implemented. Names and
shapes follow TransformerLens 3.9 (``names``); of our own are ``hook_full_embed`` (as in TransformerLens's encoder),
``ln_pre``, ``attn.hook_score_q``, ``attn.hook_score_k``, ``attn.hook_out``, ``mlp.hook_out``, ``ls1.hook_in``,
``ls2.hook_in``, ``hook_cls``, ``hook_registers`` and ``ln_pooled``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.layers import GluMlp, Mlp, RmsNorm, SwiGLU
from timm.layers.attention import AttentionRope
from torch import nn

from atdiag.analysis import sites
from atdiag.analysis.points.names import leaf_of
from atdiag.analysis.points.places import (
    AttentionPlace,
    Branch,
    Direct,
    Embedding,
    Halves,
    Middle,
    Norm,
    PointPlace,
    Results,
)
from atdiag.analysis.subjects import Subject
from atdiag.core.errors import UserError, suggest
from atdiag.networks.model import components
from atdiag.networks.model.vit import Block, ViT
from atdiag.networks.timm import inspection
from atdiag.transfer.attention import Attention

Shape = tuple[str | int, ...]
"""Lengths of a point's axes; those that the network does not fix have names (``batch``)."""

_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
_LEAVES = (
    *_STREAM,
    *(f"ln{n}.hook_{kind}" for n in (1, 2) for kind in ("scale", "normalized")),
    *(f"attn.hook_{n}" for n in ("q", "k", "v", "rot_q", "rot_k", "score_q", "score_k")),
    *(f"attn.hook_{n}" for n in ("attn_scores", "pattern", "z", "result", "out")),
    *(f"mlp.hook_{n}" for n in ("pre", "pre_linear", "mid", "post", "out")),
    *("ls1.hook_in", "ls2.hook_in", "hook_cls", "hook_registers"),
)
"""All points that a block can have."""
_OUTSIDE = (
    *("hook_embed", "hook_pos_embed", "hook_full_embed"),
    *(f"{ln}.hook_{kind}" for ln in ("ln_pre", "ln_final", "ln_pooled") for kind in ("scale", "normalized")),
    *("unembed.hook_in", "unembed.hook_out"),
)


@dataclass
class Layout:
    """The points of one subject's network, in the order of execution."""

    label: str
    places: list[PointPlace] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """Full name -> why the network lacks it."""
    block_ends: dict[int, int] = field(default_factory=dict)
    """Block -> number of places up to its end."""
    first: int = 0
    """Number of places up to the entry of the first block."""

    def add(self, place: PointPlace, *shapes: Shape) -> None:
        """Add a place with the shapes of its points."""
        self.places.append(place)
        self.shapes |= dict(zip(place.points, shapes, strict=True))

    def check(self, name: str) -> None:
        """Raise UserError, saying why, for a point that the network lacks."""
        if name in self.shapes:
            return
        if name in self.missing:
            raise UserError(f"{self.label} has no {name}: {self.missing[name]}", "'atdiag hooks' lists what it has")
        depth = len(self.block_ends)
        if name.startswith("blocks.") and leaf_of(name) in _LEAVES:
            raise UserError(f"{name} is out of range: {self.label} has {depth} blocks, 0 to {depth - 1}")
        raise UserError(
            f"{self.label} has no hook point {name!r}{suggest(name, self.shapes)}", "'atdiag hooks' lists all of them"
        )


def layout(subject: Subject, root: Any) -> Layout:
    """Return the points of a subject's network. root: nnsight's envoy of its module."""
    module: Any = subject.module
    prefix = "" if isinstance(module, ViT) else "model."
    model: Any = module if isinstance(module, ViT) else module.model
    out = Layout(subject.label)
    network = subject.network
    stream: Shape = ("batch", network.tokens, network.width)
    _embedding(out, model, prefix, stream)
    for layer, block in enumerate(model.blocks):
        if layer == 0:
            out.add(Direct(("hook_full_embed",), f"{prefix}blocks.0", "input"), stream)
            out.first = len(out.places)
        _Maker(out, subject, block, layer, prefix, root).make()
        out.block_ends[layer] = len(out.places)
    _end(out, model, prefix, subject)
    for name in _OUTSIDE:
        if name not in out.shapes:
            out.missing.setdefault(name, "it has no such part")
    return out


def _embedding(out: Layout, model: Any, prefix: str, stream: Shape) -> None:
    where, side = ("norm_pre", "input") if hasattr(model, "norm_pre") else ("pos_drop", "output")
    names = ["hook_embed"]
    if getattr(model, "pos_embed", None) is not None:
        names.append("hook_pos_embed")
    else:
        out.missing["hook_pos_embed"] = "it has no absolute position embedding"
    place = Embedding(tuple(names), f"{prefix}patch_embed", f"{prefix}{where}", side, model)
    out.add(place, *[stream] * len(names))
    _norm(out, getattr(model, "norm_pre", None), "ln_pre", f"{prefix}norm_pre", stream)


def _norm(out: Layout, norm: nn.Module | None, name: str, path: str, stream: Shape) -> None:
    """Add a norm's points, or why there are none."""
    points = f"{name}.hook_scale", f"{name}.hook_normalized"
    if isinstance(norm, nn.LayerNorm | RmsNorm | nn.RMSNorm):
        out.add(Norm(points, path, norm), (*stream[:-1], 1), stream)
        return
    told = "there is no norm there"
    if norm is not None and not isinstance(norm, nn.Identity):
        told = f"its norm ({type(norm).__name__}) is neither LayerNorm nor RMSNorm"
    out.missing |= dict.fromkeys(points, told)


def _end(out: Layout, model: Any, prefix: str, subject: Subject) -> None:
    network = subject.network
    pooled: Shape = ("batch", network.width)
    norms = {name: getattr(model, name, None) for name in ("norm", "fc_norm")}
    there = [name for name, norm in norms.items() if not isinstance(norm, nn.Identity | None)]
    stream: Shape = ("batch", network.tokens, network.width)
    for name, path in zip(("ln_final", "ln_pooled"), there, strict=False):
        _norm(out, norms[path], name, f"{prefix}{path}", stream if path == "norm" else pooled)
    if isinstance(model.head, nn.Linear) and inspection.distilled(model):
        out.missing["unembed.hook_in"] = "it has two heads, of the class token and of the distillation token"
    elif isinstance(model.head, nn.Linear):
        out.add(Direct(("unembed.hook_in",), f"{prefix}head", "input"), pooled)
    classes = network.classes if isinstance(model.head, nn.Linear) else network.width
    out.add(Direct(("unembed.hook_out",), ""), ("batch", classes))


@dataclass
class _Maker:
    """Makes the places of one block."""

    out: Layout
    subject: Subject
    block: Any
    layer: int
    prefix: str
    root: Any

    def make(self) -> None:
        """Add the block's places in the order of execution, and the reasons for what it lacks."""
        block, network = self.block, self.subject.network
        self.stream: Shape = ("batch", network.tokens, network.width)
        self.path = f"{self.prefix}blocks.{self.layer}"
        self.ours = isinstance(block, Block)
        self.parallel = isinstance(block, inspection.PARALLEL)
        self.post = isinstance(block, inspection.POST_NORM)
        self.known = self.ours or self.parallel or self.post or isinstance(block, inspection.BLOCKS)
        scales: Any = components.branch_scales(block) if self.known and not self.parallel else (None, None)
        self.out.add(Direct(self.full("hook_resid_pre"), self.path, "input"), self.stream)
        if not self.known:
            self._unknown()
        elif self.parallel:
            self._norm(1, "in_norm")
            self._attention("attn_out_proj", None)
            self.out.add(Direct(self.full("mlp.hook_pre"), f"{self.path}.mlp_act", "input"), self._hidden())
            self.out.add(Direct(self.full("mlp.hook_post"), f"{self.path}.mlp_act"), self._hidden())
            self.miss(("ln2.hook_scale", "ln2.hook_normalized"), "its two branches share one norm")
            self._branch(None)
        else:
            self._sequential(scales)
        told = "its block has no such part" if self.known else f"its block ({type(block).__name__}) is of no known kind"
        if self.parallel:
            told = "its blocks compute attention and MLP side by side and add them at once"
        self.miss(_LEAVES, told)

    def full(self, *leaves: str) -> Any:
        """Return full names."""
        return tuple(f"blocks.{self.layer}.{leaf}" for leaf in leaves)

    def miss(self, leaves: tuple[str, ...], why: str) -> None:
        """Note why points are missing, unless they are there."""
        for name in self.full(*leaves):
            if name not in self.out.shapes:
                self.out.missing.setdefault(name, why)

    def _hidden(self) -> Shape:
        mlp = getattr(self.block, "mlp", None)
        width = self.block.in_split[0] if mlp is None else mlp.fc2.in_features
        return ("batch", self.stream[1], int(width))

    def _norm(self, n: int, name: str) -> None:
        _norm(self.out, getattr(self.block, name), f"blocks.{self.layer}.ln{n}", f"{self.path}.{name}", self.stream)

    def _unknown(self) -> None:
        """Add what any block has: its modules' outputs, and its own."""
        self._other_attention(getattr(self.block, "attn", self.block))
        for name in ("attn", "mlp"):
            if isinstance(getattr(self.block, name, None), nn.Module):
                self.out.add(Direct(self.full(f"{name}.hook_out"), f"{self.path}.{name}"), self.stream)
        self._branch(None)

    def _sequential(self, scales: Any) -> None:
        """Add the places of a block with one branch after the other."""
        if not self.post:
            self._norm(1, "norm1")
        self._attention("attn.proj", scales[0])
        self._module("attn", "ls1", scales[0])
        if self.post:
            self._norm(1, "norm1")
        path = f"{self.path}.{'ls1' if self.ours else 'drop_path1'}"
        self.out.add(Direct(self.full("hook_attn_out"), path, total=f"{self.layer}.results"), self.stream)
        self.out.add(Middle(self.full("hook_resid_mid"), f"{self.path}.{'mlp' if self.post else 'norm2'}"), self.stream)
        if not self.post:
            self._norm(2, "norm2")
        self._mlp()
        self._module("mlp", "ls2", scales[1])
        if self.post:
            self._norm(2, "norm2")
        self._branch(f"{self.path}.{'ls2' if self.ours else 'drop_path2'}")

    def _module(self, name: str, scale: str, gamma: Any) -> None:
        """Add the output of a branch's module, before LayerScale."""
        leaves = (f"{name}.hook_out", *([f"{scale}.hook_in"] if gamma is not None else []))
        if gamma is None:
            self.miss((f"{scale}.hook_in",), "its branch has no LayerScale")
        self.out.add(Direct(self.full(*leaves), f"{self.path}.{name}"), *[self.stream] * len(leaves))

    def _branch(self, path: str | None) -> None:
        network = self.subject.network
        first, last = int(network.class_token), network.prefix_tokens
        slices: list[tuple[str, int, int]] = []
        shapes: list[Shape] = []
        if network.class_token:
            slices.append((*self.full("hook_cls"), 0, 1))
            shapes.append(("batch", network.width))
        if network.registers:
            slices.append((*self.full("hook_registers"), first, last))
            shapes.append(("batch", network.registers, network.width))
        self.miss(("hook_cls",), "it has no class token") if not network.class_token else None
        self.miss(("hook_registers",), "it has no registers") if not network.registers else None
        leaves = (["hook_mlp_out"] if path else []) + ["hook_resid_post"]
        names = (*self.full(*leaves), *(name for name, *_ in slices))
        self.out.add(Branch(names, path, self.path, tuple(slices)), *[self.stream] * len(leaves), *shapes)

    def _attention(self, proj: str, gamma: Any) -> None:
        """Add q and k before norm and rotary embedding, what is at the attention itself, and the heads' results."""
        network, block = self.subject.network, self.block
        attn = block if self.parallel else block.attn
        if not (self.parallel or isinstance(attn, inspection.ATTENTION)):
            self._other_attention(attn)
            return
        path = self.path if self.parallel else f"{self.path}.attn"
        heads: Shape = ("batch", network.tokens, network.heads, self._head_width(attn))
        few = int(getattr(attn, "num_kv_heads", network.heads))
        grouped: Shape = (*heads[:2], few, heads[3])
        rotary = not self.parallel and isinstance(getattr(self._model, "rope", None), nn.Module)
        before = isinstance(getattr(attn, "q_norm", None), nn.Module)  # timm calls it always, as an identity if need be
        leaves = ["v"] if few == network.heads else []
        if not leaves:
            self.out.add(Direct(self.full("attn.hook_v"), f"{path}.v_proj", heads=few), grouped)
        if self._mapped():
            told = "its map is its teacher's, so it computes no queries and keys of its own there"
            self.miss(tuple(f"attn.hook_{n}" for n in ("q", "k", "score_q", "score_k", "attn_scores")), told)
        elif before:
            site = sites.locate(self.block, self.root.get(self.path))[0] if isinstance(attn, Attention) else None
            for name, shape in (("q", heads), ("k", grouped)):
                place = Direct(
                    self.full(f"attn.hook_{name}"),
                    f"{path}.{name}_norm",
                    "input",
                    swapped=not self.parallel,
                    within=None if site is None else (self.path, site),
                )
                self.out.add(place, shape)
        elif isinstance(attn, Attention) and attn.qk_hooks:
            told = (
                f"they pass through {', '.join(attn.qk_hooks)} within the attention; read hook_score_q and hook_score_k"
            )
            self.miss(("attn.hook_q", "attn.hook_k"), told)
        else:
            leaves = ["q", "k", *leaves]
        if not self._mapped():
            leaves += [*(["rot_q", "rot_k"] if rotary else []), "score_q", "score_k", "attn_scores"]
        self.miss(("attn.hook_rot_q", "attn.hook_rot_k"), "it has no rotary embedding")
        self._attention_site(self.full(*(f"attn.hook_{name}" for name in (*leaves, "pattern", "z"))), heads)
        self._results(proj, gamma)

    def _other_attention(self, attn: Any) -> None:
        """Add what can be read of attention of an unknown kind: its one operation, if it has one."""
        network = self.subject.network
        leaves = ("v", "score_q", "score_k", "attn_scores", "pattern", "z")
        heads: Shape = ("batch", network.tokens, network.heads, "d_head")
        self._attention_site(self.full(*(f"attn.hook_{name}" for name in leaves)), heads)
        told = f"its attention ({type(attn).__name__}) is of no known kind"
        self.miss(tuple(leaf for leaf in _LEAVES if leaf.startswith("attn.") and leaf != "attn.hook_out"), told)

    def _attention_site(self, names: tuple[str, ...], heads: Shape = ()) -> None:
        site, why = sites.locate(self.block, self.root.get(self.path))
        if site is None:
            self.out.missing |= dict.fromkeys((*names, self.record), why)
            return
        network = self.subject.network
        square: Shape = ("batch", network.heads, network.tokens, network.tokens)
        shapes = [square if name.endswith(("scores", "pattern")) else heads for name in names]
        self.out.add(AttentionPlace(names, self.record, self.path, self.layer, site, network), *shapes)

    @property
    def record(self) -> str:
        """The name under which the attention's record is taken."""
        return f"blocks.{self.layer}.attn.record"

    @property
    def _model(self) -> Any:
        module: Any = self.subject.module
        return module if isinstance(module, ViT) else module.model

    def _mapped(self) -> bool:
        """Return whether a copy-student is given this block's map by its teacher."""
        transfer = self.subject.transfer
        return (
            isinstance(self.subject.module, ViT)
            and (transfer.method, transfer.tensor) == ("copy", "map")
            and self.layer in transfer.layers
        )

    def _head_width(self, attn: Any) -> int:
        if isinstance(attn, Attention):
            return self.subject.network.width // attn.num_heads
        if isinstance(attn, AttentionRope) or hasattr(attn, "head_dim"):
            return int(attn.head_dim)
        return int(attn.proj.in_features) // int(attn.num_heads)

    def _results(self, proj: str, gamma: Any) -> None:
        if self.post or self.parallel:
            told = "a norm follows on the attention's output" if self.post else "attention and MLP are added at once"
            self.miss(("attn.hook_result",), f"{told}, so the heads' parts are not what is added to the stream")
            return
        linear = self.block.get_submodule(proj)
        heads = self.subject.network.heads
        shape: Shape = (*self.stream[:2], heads, self.stream[2])
        place = Results(
            self.full("attn.hook_result"), f"{self.path}.{proj}", linear, heads, gamma, f"{self.layer}.results"
        )
        self.out.add(place, shape)

    def _mlp(self) -> None:
        """Add what is within the MLP."""
        mlp, path, hidden = self.block.mlp, f"{self.path}.mlp", None
        told = f"its MLP ({type(mlp).__name__}) is of no known kind"
        if isinstance(mlp, GluMlp):
            hidden = self._hidden()
            names = self.full("mlp.hook_pre", "mlp.hook_pre_linear")
            self.out.add(Halves(names, f"{path}.fc1", mlp.gate_last), hidden, hidden)
        elif isinstance(mlp, SwiGLU):
            hidden = self._hidden()
            self.out.add(Direct(self.full("mlp.hook_pre"), f"{path}.fc1_g"), hidden)
            self.out.add(Direct(self.full("mlp.hook_pre_linear"), f"{path}.fc1_x"), hidden)
        elif type(mlp) is Mlp:
            hidden = self._hidden()
            self.out.add(Direct(self.full("mlp.hook_pre"), f"{path}.fc1"), hidden)
            self.miss(("mlp.hook_pre_linear",), "its MLP is not gated")
        if hidden is None:
            self.miss(tuple(f"mlp.hook_{n}" for n in ("pre", "pre_linear", "mid", "post")), told)
            return
        if isinstance(mlp.norm, nn.Identity):
            self.miss(("mlp.hook_mid",), "its MLP has no norm")
        else:
            self.out.add(Direct(self.full("mlp.hook_mid"), f"{path}.norm", "input"), hidden)
        self.out.add(Direct(self.full("mlp.hook_post"), f"{path}.fc2", "input"), hidden)


def points_by_leaf(found: Layout) -> Mapping[str, tuple[list[int], Shape]]:
    """Return each kind of point (its name within a block) with the blocks that have it, and its shape."""
    out: dict[str, tuple[list[int], Shape]] = {}
    for name, shape in found.shapes.items():
        layers, _ = out.setdefault(leaf_of(name), ([], shape))
        if name.startswith("blocks."):
            layers.append(int(name.split(".")[1]))
    return out
