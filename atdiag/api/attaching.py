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
from torch import Tensor, nn

from atdiag.api.fitting import check, check_student, transfer_of
from atdiag.api.inside import AttentionInside, fuse
from atdiag.core.errors import UserError, suggest
from atdiag.core.spec import BlockRule, HeadRule, Network, Transfer
from atdiag.networks.model.vit import ViT
from atdiag.networks.registry import sizes, teachers
from atdiag.networks.timm import conversion, flexible, inspection
from atdiag.networks.timm.wrapping import Foreign
from atdiag.networks.weights import loading
from atdiag.study.protocol import METHODS
from atdiag.study.settings import profile_name
from atdiag.training import compiled, evaluation
from atdiag.transfer import methods, observation
from atdiag.transfer.attention import AttentionOverride
from atdiag.transfer.observation import Observation

Reference = str | Path | nn.Module
"""A teacher: a name, a file, or a network of timm's or ours."""

_GRIDS = ("resize", "resample")

_OURS, _TIMM = "forward", "forward_features"
"""The method of a student that a pair stands in for."""


def attach(
    student: nn.Module,
    teacher: Reference,
    method: Literal["copy", "distill"] = "distill",
    layers: Sequence[int] | str | None = None,
    weight: float | None = None,
    *,
    teacher_layers: Sequence[int] | BlockRule | None = None,
    teacher_heads: HeadRule | None = None,
    grid: Literal["resize", "resample"] = "resize",
    examples: Tensor | None = None,
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
    of the loss; default: 3.0. heads, tensor, average, loss, reduce: as in :class:`~atdiag.core.spec.Transfer`. mean,
    std: by which your loop normalises its images; default: those in the student's timm configuration. The teacher gets
    the same pixels under its own normalisation. profile: that of a teacher given by name.

    A teacher of another size passes its maps by the rules of ``--student``. teacher_layers: a rule (``uniform``,
    ``top``, ``bottom``), or the teacher's block for each of ``layers``. teacher_heads: ``first``, ``different``,
    ``mean`` or ``repeat``. grid: a teacher given by name with patches of another size sees each image at the size that
    gives it the student's grid (``resize``), or at the student's size, and its maps are resampled; a network sees it at
    its own size, resized from your loop's pixels, which are clipped to [0, 1]. examples: a batch of training images as
    the student gets them, by which ``different`` chooses the teacher's heads.

    Raises UserError, naming what does not fit: heads, blocks, class tokens, a student that drops tokens.
    """
    inner = _unwrapped(student)
    if not isinstance(inner, nn.Module):
        raise UserError(f"a {type(inner).__name__} is no student", "give attach(student, teacher): a network first")
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
    if grid not in _GRIDS:
        raise UserError(f"grid {grid!r}{suggest(grid, _GRIDS)}", f"give {' or '.join(_GRIDS)}")
    network = inspection.describe(inner, mean, std)
    found = _teacher(teacher, network, profile, grid)
    if teacher_heads is not None and network.heads == found.network.heads:
        raise UserError(f"both have {network.heads} heads, each beside its own", "leave teacher_heads out")
    transfer = transfer_of(
        network,
        found.network,
        method=method,
        layers=layers,
        weight=weight,
        teacher_layers=teacher_layers,
        teacher_heads=teacher_heads,
        heads=heads,
        tensor=tensor,
        average=average,
        loss=loss,
        reduce=reduce,
    )
    check(network, found.network, transfer)
    if not ours:
        check_student(inner)
    return Pair(inner, network, found, transfer, examples)


class Pair:
    """A student in training together with its teacher: what :func:`attach` returns.

    Calling it calls the student.
    """

    def __init__(
        self,
        student: nn.Module,
        network: Network,
        teacher: ViT | Foreign,
        transfer: Transfer,
        examples: Tensor | None = None,
    ) -> None:
        self.student, self.network, self.teacher, self.transfer = student, network, teacher, transfer
        self._loss: Tensor | None = None
        self._attached = True
        self._place = _OURS if isinstance(student, ViT) else _TIMM
        self._resizes = teacher.network.image_size != network.image_size
        if self._place == _TIMM and not self._resizes:
            _renormalise(teacher, network)
        self.heads = self._chosen_heads(examples)
        self._unfused = [] if isinstance(student, ViT) else fuse(student)
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
        shown = evaluation.show(self.teacher, self._pixels(images.to(like)), observation.of_teacher([self.transfer]))
        return evaluation.fit(shown, self.teacher, self.network, self.transfer, self.heads)

    def _pixels(self, images: Tensor) -> Tensor:
        """Return images as the teacher takes them, at the student's size: in [0, 1] if they are to be resized.

        Otherwise as they are, since its own normalisation then takes the student's.
        """
        if self._place == _OURS or not self._resizes:
            return images
        mean, std = (
            torch.tensor(x).to(images).view(1, -1, 1, 1)  # by way of float32, as in a network's buffers
            for x in (self.network.mean, self.network.std)
        )
        return (images * std + mean).clamp(0, 1)

    @torch.no_grad()
    def _chosen_heads(self, examples: Tensor | None) -> dict[int, tuple[int, ...]]:
        """Return the teacher's block -> its heads that differ most on the examples; empty for another rule."""
        if self.transfer.teacher_heads != "different":
            return {}
        if examples is None:
            raise UserError(
                "teacher_heads='different' compares the teacher's heads on training images",
                f"give examples=, {evaluation.COMPARED_IMAGES} of them as the student gets them",
            )
        like = torch.promote_types(torch.float32, next(self.student.parameters()).dtype)
        self.teacher.to(examples.device, like)
        pixels = torch.split(self._pixels(examples.to(like)), evaluation.BATCH)
        return evaluation.differing_heads(self.teacher, self.network, self.transfer, pixels)

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
        inside = AttentionInside(blocks, given, wanted)
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


def _teacher(asked: Reference, student: Network, profile: str | None, grid: str) -> ViT | Foreign:
    """Return a frozen teacher of our own making; if it is named, at the size of images at which it is to see them."""
    if isinstance(asked, nn.Module):
        inner = copy.deepcopy(_unwrapped(asked))
        if flexible.is_flexible(inner):  # which sees images of any size
            side = int(inner.get_submodule("embeds").patch_size[0])  # type: ignore[index]
            inner = flexible.plain(inner, student.grid * side if grid == "resize" else student.image_size)
        if reason := inspection.why_not(inner):
            raise UserError(f"{type(inner).__name__} can't be a teacher: {reason}")
        return conversion.teacher_from(inner)
    named, size = profile_name(profile), student.image_size
    if grid == "resize" and named != "mini":
        size = student.grid * sizes.network(str(asked), named).patch_size
    spec = teachers.teacher(str(asked), named, size)
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
