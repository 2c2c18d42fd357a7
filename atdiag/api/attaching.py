"""Transfer attention in a training loop of one's own: ``atdiag.attach``.

The student stays the module that it is. While a teacher is attached, its forward pass runs the teacher on the same
images, and the student's own calls of scaled dot-product attention are either answered with the teacher's map (copy) or
recorded for the loss (distill), by the operations that atdiag's trainer uses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from atdiag.api.fitting import check, check_student, transfer_of
from atdiag.core.errors import UserError, suggest
from atdiag.core.spec import Network, Transfer
from atdiag.networks.model.vit import ViT
from atdiag.networks.registry import teachers
from atdiag.networks.timm import conversion, inspection
from atdiag.networks.timm.wrapping import Foreign
from atdiag.networks.weights import loading
from atdiag.study.protocol import METHODS
from atdiag.study.settings import profile_name
from atdiag.training import compiled, evaluation
from atdiag.transfer import methods, observation, ops
from atdiag.transfer.attention import AttentionOverride
from atdiag.transfer.observation import AttentionRecord, Observation, record_of_sdpa
from atdiag.transfer.ops import QK

Reference = str | Path | nn.Module
"""A teacher: a name, a file, or a network of timm's or ours."""

_OURS, _TIMM = "forward", "forward_features"
"""The method of a student that a pair stands in for."""


def attach(
    student: nn.Module,
    teacher: Reference,
    method: Literal["copy", "distill"] = "distill",
    layers: Sequence[int] | str | None = None,
    weight: float | None = None,
    *,
    teacher_layers: Sequence[int] | None = None,
    heads: Sequence[int] | str | None = None,
    tensor: Literal["map", "q", "k", "v"] = "map",
    average: Literal["queries", "heads", "layers"] | None = None,
    loss: str | None = None,
    reduce: Literal["sum", "mean"] = "sum",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    profile: str | None = None,
) -> Pair:
    """Give a student its teacher's attention while you train it::

        pair = atdiag.attach(student, teacher, method="distill", weight=3.0)
        loss = criterion(student(images), labels) + pair.loss

    student: any timm ViT that inspection accepts, or ours; also inside ``DistributedDataParallel`` or
    ``torch.compile``. It is trained, saved and called as before, and its parameters and state dict stay as they are.
    teacher: a name (``clip_b``), a file, or a network; it is frozen, and your module is left as it is.

    method: ``copy``, the teacher's map replaces the student's, in evaluation too; ``distill``, ``pair.loss`` pulls the
    student's map to it. layers: the student's blocks, such as ``(0, 1)`` or ``"top:6"``; default: all. weight: factor
    of the loss; default: 3.0. teacher_layers: the teacher's block for each of ``layers``. heads, tensor, average, loss,
    reduce: as in :class:`~atdiag.core.spec.Transfer`. mean, std: by which your loop normalises its images; default:
    those in the student's timm configuration. The teacher gets the same pixels under its own normalisation. profile:
    that of a teacher given by name.

    Raises UserError, naming what does not fit: grids, heads, blocks, a student that drops tokens.
    """
    inner = _unwrapped(student)
    ours = isinstance(inner, ViT)  # which takes images in [0, 1]
    if (_OURS if ours else _TIMM) in inner.__dict__:
        raise UserError(
            "the student already has a teacher, or another's forward pass", "call its pair's detach() first"
        )
    if reason := inspection.why_not(inner):
        raise UserError(f"{type(inner).__name__} can't be a student: {reason}")
    if ours and not mean is std is None:
        raise UserError("atdiag's own networks take images in [0, 1] and normalise them", "leave mean and std out")
    if method not in METHODS:
        raise UserError(f"method {method!r}{suggest(method, METHODS)}", f"give {' or '.join(METHODS)}")
    network = inspection.describe(inner, mean, std)
    transfer = transfer_of(
        network,
        method=method,
        layers=layers,
        weight=weight,
        teacher_layers=tuple(teacher_layers or ()),
        heads=heads,
        tensor=tensor,
        average=average,
        loss=loss,
        reduce=reduce,
    )
    found = _teacher(teacher, network, profile)
    check(network, found.network, transfer)
    if not ours:
        check_student(inner)
        _renormalise(found, network)
    return Pair(inner, network, found, transfer)


class Pair:
    """A student in training together with its teacher: what :func:`attach` returns.

    Calling it calls the student.
    """

    def __init__(self, student: nn.Module, network: Network, teacher: ViT | Foreign, transfer: Transfer) -> None:
        self.student, self.network, self.teacher, self.transfer = student, network, teacher, transfer
        self._loss: Tensor | None = None
        self._attached = True
        self._place = _OURS if isinstance(student, ViT) else _TIMM
        self._unfused = [] if isinstance(student, ViT) else _fuse(student)
        setattr(student, self._place, self._forward)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Run the student."""
        return self.student(*args, **options)

    @property
    def loss(self) -> Tensor:
        """The weighted transfer loss of the student's last forward pass, a scalar.

        Zero for copy, which has no loss, and in eval mode, where a distilled student needs no teacher. Raises
        RuntimeError before the first pass.
        """
        if self._loss is None:
            raise RuntimeError("there is no loss before the student has seen a batch: run it first")
        return self._loss

    def detach(self) -> None:
        """Take the teacher off: the student computes what it computed before, with the weights that it has now."""
        if not self._attached:
            return
        delattr(self.student, self._place)
        for module in self._unfused:
            module.fused_attn = False  # type: ignore[assignment]
        self._attached = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Pair:
        """Return a pair for a copy of the student, such as a moving average of its weights; they share the teacher."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.student = copy.deepcopy(self.student, memo)
        twin._unfused = [copy.deepcopy(module, memo) for module in self._unfused]
        twin._loss = None
        return twin  # the copied student's method is bound to it, by memo

    # --- a forward pass -------------------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward(self, images: Tensor, *args: Any, **options: Any) -> Any:
        """Stand in for the student's own method: run the teacher where it is needed, then the student with it."""
        own: Callable[..., Any] = getattr(type(self.student), self._place)
        needed = self.student.training or methods.needs_teacher_at_test(self.transfer)
        shown = self._shown(images) if needed else Observation()
        with compiled.eagerly():  # a compiled block would not show its attention
            if isinstance(self.student, ViT):
                out, seen = self._of_ours(images, shown, *args, **options)
            else:
                given = methods.given(self.transfer, shown, self.network, images.device) if needed else None
                out, seen = self._of_timm(lambda: own(self.student, images, *args, **options), given or {}, needed)
        loss = methods.loss(self.transfer, shown, seen) if needed else None
        self._loss = torch.zeros((), device=images.device) if loss is None else loss
        return out

    @torch.no_grad()
    def _shown(self, images: Tensor) -> Observation:
        """Return what the teacher shows of images as the student gets them, on the student's tokens."""
        side = self.network.image_size
        if images.shape[-2:] != (side, side):
            raise UserError(
                f"images of {' x '.join(map(str, images.shape[-2:]))} px", f"this pair takes {side} x {side}"
            )
        like = torch.promote_types(torch.float32, next(self.student.parameters()).dtype)
        held = next(self.teacher.parameters())
        if (held.device, held.dtype) != (images.device, like):
            self.teacher.to(images.device, like)
        shown: Observation = self.teacher.observe(images.to(like), observation.of_teacher([self.transfer]))
        return evaluation.fit(shown, self.teacher, self.network, self.transfer)

    def _of_ours(self, images: Tensor, shown: Observation, *args: Any, **options: Any) -> tuple[Tensor, Observation]:
        student = cast(ViT, self.student)
        if args or options:
            raise TypeError("while a teacher is attached, give the student its images alone")
        wanted = observation.of_student(self.transfer) | observation.CaptureRequest(logits=True)
        given = methods.given(self.transfer, shown, self.network, images.device) if shown.seen else None
        seen = student.observe(images, wanted if student.training else observation.CaptureRequest(logits=True), given)
        assert seen.logits is not None
        return seen.logits, seen

    def _of_timm(
        self, run: Callable[[], Any], given: dict[int, AttentionOverride], needed: bool
    ) -> tuple[Any, Observation]:
        """Run the student under given maps; return its output, and the maps that a loss is about."""
        if getattr(self.student, "grad_checkpointing", False):
            raise UserError(
                "the student recomputes its activations (gradient checkpointing), and would do so without its teacher",
                "switch it off by student.set_grad_checkpointing(False)",
            )
        if not needed:
            return run(), Observation()
        wanted = observation.of_student(self.transfer).attention
        blocks = list(self.student.get_submodule("blocks").children())
        inside = _Inside(blocks, given, wanted)
        hooks = []
        for i, block in enumerate(blocks):
            hooks.append(block.register_forward_pre_hook(lambda *_, i=i: inside.enter(i)))
            hooks.append(block.register_forward_hook(lambda *_: inside.leave()))
        try:
            with inside:
                out = run()
        finally:
            for hook in hooks:
                hook.remove()
        if missing := sorted({*given, *wanted} - inside.met):
            raise RuntimeError(f"the student's forward pass never came to the attention of blocks {missing}")
        return out, Observation(inside.seen)


class _Inside(TorchFunctionMode):
    """While active, gives blocks their maps and records those of others, at their calls of SDPA."""

    def __init__(
        self, blocks: Sequence[nn.Module], given: dict[int, AttentionOverride], wanted: frozenset[int]
    ) -> None:
        super().__init__()
        self.given, self.wanted = given, wanted
        self.seen: dict[int, AttentionRecord] = {}
        self.met: set[int] = set()
        self.block: int | None = None
        whole = [i for i, one in given.items() if one.tensor == "map" and one.heads is None]
        self._skipped = {id(weight): i for i in whole if (weight := _fused_weight(blocks[i])) is not None}

    def enter(self, block: int) -> None:
        """Note that a block begins."""
        self.block = block

    def leave(self) -> None:
        """Note that a block has ended. Raises RuntimeError if its attention was not where it was expected."""
        asked = self.block in self.given or self.block in self.wanted
        if asked and self.block not in self.met:
            raise RuntimeError(
                f"block {self.block} made no call of scaled dot-product attention: its map can't be read"
            )
        self.block = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.block is None:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attend(func, args, kwargs)
        if func is F.linear and self._skipped:
            return self._project(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(self, func: Any, args: Any, kwargs: Any) -> Any:
        block = cast(int, self.block)
        if block not in self.given and block not in self.wanted:
            return func(*args, **kwargs)
        if block in self.met:
            raise RuntimeError(f"block {block} attends twice: it has no single map")
        self.met.add(block)
        record = record_of_sdpa(*args, **kwargs)
        if block in self.wanted:
            self.seen[block] = record
        return _under(record, self.given[block]) if block in self.given else func(*args, **kwargs)

    def _project(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute of a fused projection to q, k and v only v, if q and k have no use; they are zero."""
        if self._skipped.get(id(weight)) != self.block:
            return F.linear(input, weight, bias)
        first = 2 * weight.shape[0] // 3
        v = F.linear(input, weight[first:], None if bias is None else bias[first:])
        return torch.cat([v.new_zeros(*v.shape[:-1], first), v], dim=-1)


def _under(record: AttentionRecord, given: AttentionOverride) -> Tensor:
    """Return the attention output [B, H, N, d] of a call whose map, q, k or v is given, for all heads or for some."""
    qk, v = record.qk, record.v
    assert v is not None
    if given.tensor != "map":
        own: dict[str, Tensor] = {"q": qk.q, "k": qk.k, "v": v}
        assert isinstance(given.value, Tensor)
        taken = given.value.to(v.dtype)
        if given.heads is not None:
            taken = torch.cat([taken, own[given.tensor][:, given.heads.rest]], dim=1)[:, given.heads.order]
        own[given.tensor] = taken
        return ops.attend(QK(own["q"], own["k"], qk.scale, qk.bias), own["v"])
    assert not isinstance(given.value, Tensor)
    value = given.value
    if isinstance(value, QK) and value.q.dtype != v.dtype:
        value = value._replace(q=value.q.to(v.dtype), k=value.k.to(v.dtype))
    if given.heads is None:
        return ops.attend(value, v)
    part, rest, order = given.heads
    others = qk.select_heads(rest)
    return torch.cat([ops.attend(value, v[:, part]), ops.attend(others, v[:, rest])], dim=1)[:, order]


def _teacher(asked: Reference, student: Network, profile: str | None) -> ViT | Foreign:
    """Return a frozen teacher of our own making, at the student's image size if it is named."""
    if isinstance(asked, nn.Module):
        inner = _unwrapped(asked)
        if reason := inspection.why_not(inner):
            raise UserError(f"{type(inner).__name__} can't be a teacher: {reason}")
        return conversion.teacher_from(copy.deepcopy(inner))
    spec = teachers.teacher(str(asked), profile_name(profile), student.image_size)
    if spec.sha256 is None:
        raise UserError(f"the weights of {spec.label} are not on this machine", teachers.how_to_get(spec))
    try:
        return loading.load(spec)
    except (loading.WeightsMissingError, ValueError) as fault:
        raise UserError(str(fault)) from None


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the network inside DistributedDataParallel, DataParallel and torch.compile, in any order."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = module.module
        if inner is None:
            return module
        module = inner


def _renormalise(teacher: ViT | Foreign, student: Network) -> None:
    """Let a teacher take images as the student's loop normalises them; where both do the same, bit for bit those."""
    for name in ("mean", "std"):
        own = getattr(teacher, name).double()
        theirs = torch.tensor(student.mean, dtype=torch.float64).view(1, -1, 1, 1)
        scale = torch.tensor(student.std, dtype=torch.float64).view(1, -1, 1, 1)
        own = (own - _rounded(theirs)) / _rounded(scale) if name == "mean" else own / _rounded(scale)
        setattr(teacher, name, own.float())


def _rounded(values: Tensor) -> Tensor:
    """Return values in float64 as float32 holds them, as in the teacher's buffers: equal ones then cancel exactly."""
    return values.float().double()


def _fuse(student: nn.Module) -> list[nn.Module]:
    """Switch a timm network's blocks to scaled dot-product attention; return the modules that did not use it."""
    changed = []
    for module in student.get_submodule("blocks").modules():
        if getattr(module, "fused_attn", True) is False:
            module.fused_attn = True  # type: ignore[assignment]
            changed.append(module)
    return changed


def _fused_weight(block: nn.Module) -> Tensor | None:
    """Return the weight of a block's one projection to q, k and v, if it has one for equally many of each."""
    attn: Any = getattr(block, "attn", None)
    weight = getattr(getattr(attn, "qkv", None), "weight", None)
    if not isinstance(weight, Tensor) or getattr(attn, "num_kv_heads", None) not in (None, attn.num_heads):
        return None
    return weight if weight.shape[0] % 3 == 0 else None
