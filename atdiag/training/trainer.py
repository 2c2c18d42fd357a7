"""Training state of one run: its student, optimiser, schedule and progress.

A step never synchronises with the GPU: losses accumulate there, and a value that is not finite disables the optimiser
there. :meth:`RunTrainer.settle` fetches the numbers every ``LOG_EVERY`` steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from atdiag.core.runs import Run
from atdiag.core.spec import Recipe, RunSpec
from atdiag.data.loader import Batch
from atdiag.networks.model import students
from atdiag.networks.model.vit import ViT
from atdiag.networks.timm.wrapping import Foreign
from atdiag.training import checkpoint as checkpoints
from atdiag.training import evaluation, linear_head, masked, planted
from atdiag.training.board import Board
from atdiag.training.branches import branch_factors
from atdiag.training.ranks import ALONE, RankGroup
from atdiag.transfer import methods
from atdiag.transfer.observation import Observation
from atdiag.transfer.ops import Averaged

LOG_EVERY = 50
"""Steps between two measurements of the divergence between a distilling student's maps and the teacher's, and on a GPU
between two fetches of the losses."""

_NAMES = ("loss", "task_loss", "grad_norm", "transfer_loss")


class RunTrainer:
    """Training state of one run: its student, optimiser, schedule and progress."""

    def __init__(
        self,
        run: Run,
        spec: RunSpec,
        teacher: ViT | Foreign | None,
        averages: Mapping[int, Averaged],
        steps_per_epoch: int,
        device: torch.device,
        heads: Mapping[int, tuple[int, ...]] | None = None,
        ranks: RankGroup = ALONE,
        track: str | None = None,
        origin: ViT | Foreign | None = None,
    ) -> None:
        """averages, heads: as in :class:`~atdiag.training.evaluation.Predictor`. track: where curves are shown, too.
        origin: the spec's ``start``.
        """
        self.run, self.spec, self.teacher, self.averages, self.heads = run, spec, teacher, averages, heads or {}
        self.ranks = ranks
        recipe = spec.recipe
        self.total = recipe.epochs * steps_per_epoch
        self.steps_per_epoch = steps_per_epoch
        self.student = students.build(spec.network, spec.seed.model)
        self.start: students.Start | None = None
        if spec.init.source == "teacher":
            source = origin or teacher
            assert isinstance(source, ViT)  # the spec rejects initialising from a foreign network
            self.start = students.start_from(self.student, source, spec.init)
        self.student.to(device).train()
        if spec.init.probe:
            linear_head.fit(self.student, spec, device)
        students.freeze_unused(self.student, spec.transfer)
        self.decoder: masked.Decoder | None = None
        if spec.masked is not None:
            self.decoder = masked.Decoder(spec.masked, spec.network, spec.seed.model).to(device)
            self.student.head.requires_grad_(False)
        self._forward = ranks.parallel(_Forward(self.student, spec, self.decoder))
        self._ema = None if recipe.ema is None else _average(self.student, recipe.ema)
        self.optimizer = _optimizer(self.student, recipe, device, self.decoder)
        self.schedule = _schedule(self.optimizer, recipe, self.total, steps_per_epoch)
        self.step, self.seconds = 0, 0.0
        self.metrics: list[dict[str, Any]] = []
        self.sums: dict[str, float] = {}
        """Sums over the epoch so far, at the last settle; ``steps`` counts steps, ``kl_steps`` those with a ``kl``."""
        exact = torch.float32 if device.type == "mps" else torch.float64  # MPS lacks float64
        self._latest = torch.zeros(len(_NAMES), dtype=exact, device=device)
        """Sums since the last settle, on the losses' device."""
        self._fetches_at_once = device.type in ("cpu", "mps")  # a CPU has nothing to wait for, MPS no fused optimiser
        self._unsettled = 0
        self._kl: list[Tensor] = []
        self._losses = torch.zeros(3, dtype=exact, device=device)
        """Total, task and transfer loss of the current step, summed over its micro-batches so far."""
        self._excess = torch.zeros((), device=device)
        self._fault = torch.zeros(4, dtype=exact, device=device)
        """Fault flag (1 after the first loss or gradient norm that is not finite), those two values, and the step."""
        self.cause: str | None = None
        self.board = Board(run, track)
        if (saved := _load(run, ranks)) is not None:
            if (saved.ema is None) != (self._ema is None):
                raise ValueError(
                    f"{run.checkpoint} was written with another recipe: 'atdiag runs remove {run.id}' starts afresh"
                )
            self.student.load_state_dict(saved.network)
            if self.decoder is not None:
                self.decoder.load_state_dict(saved.decoder)
            if self._ema is not None:
                self._ema.module.load_state_dict(saved.ema)
            self.optimizer.load_state_dict(saved.optimizer)
            self.step, self.seconds = saved.step, saved.seconds
            self.metrics, self.sums = saved.metrics, saved.sums
        self.began = self.step
        """The step at which this process started or resumed the run."""

    @property
    def done(self) -> bool:
        """Whether training has ended, complete or at a fault."""
        return self.cause is not None or self.step >= self.total

    def save(self) -> None:
        """Write a checkpoint, unless the run has stopped at a fault. The ranks do so at the same step."""
        self.settle()
        if self.cause is not None or not self.ranks.first:
            return
        checkpoints.save(
            self.run,
            checkpoints.Checkpoint(
                self.step,
                self.student.state_dict() | self._decoder_state,
                self.optimizer.state_dict(),
                self.seconds,
                self.metrics,
                self.sums,
                None if self._ema is None else self._ema.module.state_dict(),
            ),
        )

    @property
    def _decoder_state(self) -> dict[str, Tensor]:
        own = {} if self.decoder is None else self.decoder.state_dict()
        return {f"{checkpoints.DECODER}{name}": tensor for name, tensor in own.items()}

    def advance(self, batch: Batch, teacher: Observation) -> None:
        """Take one optimisation step; a loss or gradient that is not finite stops the run *before* the update.

        teacher: the observation that the transfer needs, on the student's tokens.
        """
        self.learn(batch, teacher)
        self.update()

    def learn(self, part: Batch, teacher: Observation, share: float = 1.0, last: bool = True) -> None:
        """Accumulate the gradient of one micro-batch of a step.

        share: the micro-batch's share of the images of the batch of all ranks. Every loss is a mean over images, and
        images do not interact in a ViT, so the micro-batches' gradients sum to the whole batch's, up to rounding.
        teacher: its observation for this micro-batch. last: it is this rank's last of the step, which sums the ranks'
        gradients.
        """
        spec, device = self.spec, part.images.device
        keep = branch_factors(spec, self.step, self.total, part.samples)
        if keep is not None:
            keep = keep.to(device, non_blocking=True)  # otherwise each step on a GPU waits for the transfer
        hide = None
        if spec.masked is not None:
            hide = masked.hidden(spec.masked, spec.network, spec.seed.model, self.step, part.samples).to(device)
        with self.ranks.alone(self._forward, not last):
            with torch.autocast(device.type, torch.bfloat16, enabled=spec.recipe.precision == "bfloat16"):
                out, transfer_loss = self._forward(part.images, teacher, keep, hide)
            task_loss = out
            if hide is None:
                task_loss = classification_loss(out.float(), part, spec.recipe.label_smoothing)
            loss = task_loss if transfer_loss is None else task_loss + transfer_loss
            weight = share * self.ranks.count  # the ranks' gradients are averaged, not summed
            (loss if weight == 1 else weight * loss).backward()
        losses = [loss, task_loss, torch.zeros_like(loss) if transfer_loss is None else transfer_loss]
        self._losses += share * torch.stack([one.detach().to(self._losses.dtype) for one in losses])
        if self._measures:
            assert transfer_loss is not None
            with torch.no_grad():
                self._excess = self._excess + share * methods.excess(spec.transfer, teacher, transfer_loss.detach())

    def update(self) -> None:
        """Apply the accumulated gradients and end the step."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.ranks.count > 1 and self.step == self.began and any(p.grad is None for p in parameters):
            raise RuntimeError("a weight of this student has no part in its loss: it can't be trained in ranks")
        norm = clip_grad_norm_(parameters, self.spec.recipe.clip_grad or math.inf)
        losses, excess = self.ranks.add(self._losses), self._excess
        if self._measures:
            excess = self.ranks.add(excess)
        self._losses, self._excess = torch.zeros_like(losses), torch.zeros_like(excess)
        loss, task_loss, transfer_loss = losses
        self._watch(loss, norm)
        if self.cause is not None:
            return
        self.schedule.step_update(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._ema is not None:  # also after a fault on a GPU, which left the weights unchanged and finite
            self._ema.update(self.student)
        if self._measures:
            self._kl.append(excess)
        self._latest += torch.stack([loss, task_loss, norm.detach().to(loss.dtype), transfer_loss])
        self.step += 1
        self._unsettled += 1
        if self._fetches_at_once or self._unsettled == LOG_EVERY:
            self.settle()

    @property
    def _measures(self) -> bool:
        """Whether the current step measures the divergence between the student's maps and the teacher's."""
        return self.spec.transfer.loss == "ce" and self.step % self.steps_per_epoch % LOG_EVERY == 0

    def forget(self) -> None:
        """Drop the gradients and losses of an abandoned step."""
        self.optimizer.zero_grad(set_to_none=True)
        self._losses, self._excess = torch.zeros_like(self._losses), torch.zeros_like(self._excess)

    def _watch(self, loss: Tensor, norm: Tensor) -> None:
        """Record the first loss or gradient that is not finite, and disable all optimiser updates from then on."""
        step = torch.full_like(self._fault[0], self.step)
        now = torch.stack([(~(loss.isfinite() & norm.isfinite())).to(step), loss.to(step), norm.to(step), step])
        self._fault = torch.where(self._fault[0] == 0, now, self._fault)
        if self._fetches_at_once:
            self._look()
        else:  # the interface that torch.amp.GradScaler uses
            self.optimizer.found_inf = self._fault[0].float()  # type: ignore[attr-defined]

    def _look(self) -> None:
        bad, loss, norm, step = self._fault.tolist()
        if bad and self.cause is None:
            self.step = int(step)
            self.cause = f"the gradient's norm became {norm}" if math.isfinite(loss) else f"the loss became {loss}"

    def settle(self) -> None:
        """Fetch the losses of the steps since the last call, and note a fault if one of them was not finite."""
        if not self._unsettled:
            return
        if self.cause is None:
            self._look()
        sums = dict(zip(_NAMES, self._latest.tolist(), strict=True)) | {"steps": float(self._unsettled)}
        besides = sums.pop("transfer_loss")
        if self.spec.transfer.weight is not None or self.spec.planted is not None:
            sums["transfer_loss" if self.spec.planted is None else "planted_loss"] = besides
        if self._kl:
            sums |= {"kl": torch.stack(self._kl).sum().item(), "kl_steps": float(len(self._kl))}
        for name, amount in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + amount
        self._latest.zero_()
        self._unsettled, self._kl = 0, []

    @property
    def ends_epoch(self) -> bool:
        """Return whether the last step was an epoch's last. Fetches pending losses first: False after a fault."""
        if self.step % self.steps_per_epoch:
            return False
        self.settle()
        return self.cause is None

    def end_epoch(self, validation_top1: float | None = None) -> None:
        """Append the epoch's means to the run's metrics, and its accuracy on the validation part if it has one."""
        self.settle()
        if self.cause is not None:
            return
        counts = {name: self.sums.pop(f"{name}steps", 1.0) for name in ("", "kl_")}
        line: dict[str, Any] = {"epoch": self.step // self.steps_per_epoch, "step": self.step}
        line |= {name: total / counts["kl_" if name == "kl" else ""] for name, total in self.sums.items()}
        if validation_top1 is not None:
            line["validation_top1"] = validation_top1
        first = self.optimizer.param_groups[0]
        line["lr"] = first["lr"] / first.get("lr_scale", 1.0)
        line["seconds"] = round(self.seconds, 3)
        self.metrics.append(line)
        self.sums = {}
        if self.ranks.first:
            self.run.write_metrics(self.metrics)
            self.board.write(self.metrics)

    @property
    def outcome(self) -> ViT:
        """The network that is tested and stored: the student, or the moving average of its weights."""
        return self.student if self._ema is None else self._ema.module

    @property
    def chosen_heads(self) -> dict[str, Any]:
        """The teacher's heads that were chosen for the student, by block, for the result; empty if none were."""
        found = {str(block): list(heads) for block, heads in self.heads.items()}
        return {"teacher_heads": found} if found else {}

    def subject(self) -> evaluation.Predictor:
        """Return the trained network as a subject to evaluate; one that saw no labels gets a linear probe's head."""
        if self.spec.masked is not None:
            linear_head.fit(self.outcome, self.spec, self._losses.device)
        return evaluation.Predictor(self.outcome, self.spec.transfer, self.teacher, self.averages, self.heads)


class _Forward(nn.Module):
    """A student's forward pass in training: its logits, with the loss besides that of the task if there is one.

    Of a masked autoencoder it is the loss of the task in place of logits, which it has none of.
    """

    def __init__(self, student: ViT, spec: RunSpec, decoder: masked.Decoder | None = None) -> None:
        super().__init__()
        self.student, self.spec, self.decoder = student, spec, decoder

    def forward(
        self, images: Tensor, teacher: Observation, keep: Tensor | None, hide: Tensor | None = None
    ) -> methods.Passed:
        """Arguments as in :func:`atdiag.transfer.methods.forward` and :func:`atdiag.training.masked.loss`."""
        if self.decoder is not None:
            assert hide is not None
            return methods.Passed(masked.loss(self.student, self.decoder, images, hide, keep), None)
        if self.spec.planted is None:
            return methods.forward(self.student, self.spec.transfer, images, teacher, keep)
        seen = self.student.observe(images, planted.request(self.spec.planted), keep=keep)
        assert seen.logits is not None
        return methods.Passed(seen.logits, planted.loss(self.spec.planted, self.student, seen, images))


def _load(run: Run, ranks: RankGroup) -> checkpoints.Checkpoint | None:
    """Return a run's checkpoint as the first rank reads it; None if it has none. Raises ValueError on all ranks."""
    found: checkpoints.Checkpoint | ValueError | None = None
    if ranks.first:
        try:
            found = checkpoints.load(run)
        except ValueError as fault:
            found = fault
    found = ranks.shared(found)
    if isinstance(found, ValueError):
        raise found
    return found


def classification_loss(logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """Return cross-entropy with label smoothing; for mixed images, weighted over both labels (Zhang et al. 2018)."""
    loss = F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
    if batch.partner_labels is None:
        return loss
    return batch.lam * loss + (1 - batch.lam) * F.cross_entropy(logits, batch.partner_labels, label_smoothing=smoothing)


def _optimizer(
    student: ViT, recipe: Recipe, device: torch.device, decoder: masked.Decoder | None = None
) -> torch.optim.Optimizer:
    no_decay = student.no_weight_decay() | {"reg_token"}  # older versions of timm omit it
    own = {"weight_decay": recipe.weight_decay, "no_weight_decay_list": tuple(no_decay)}
    if recipe.layer_decay is None:
        groups = param_groups_weight_decay(student, **own)
    else:  # with an "lr_scale", by which timm's schedules multiply
        groups = param_groups_layer_decay(student, **own, layer_decay=recipe.layer_decay)
    if decoder is not None:
        besides = ("mask_token", "pos_embed")
        groups += param_groups_weight_decay(decoder, recipe.weight_decay, no_weight_decay_list=besides)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=device.type in ("cpu", "cuda"))


def _average(student: ViT, decay: float) -> ModelEmaV3:
    """Return a copy of the student that will hold the moving average of its weights; call before compiling its blocks.

    Without warm-up of the decay, which would be one more hyperparameter that defines a run. ``exclude_buffers`` makes
    timm average parameter by parameter; through the state dict our ViT's q, k and v would never be updated, since it
    fuses them into new tensors.
    """
    average = ModelEmaV3(student, decay=decay, exclude_buffers=True)
    average.requires_grad_(False)
    return average


def _schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, total: int, steps_per_epoch: int) -> CosineLRScheduler:
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), total)
    after = recipe.cosine_after_warmup and warmup < total
    return CosineLRScheduler(
        optimizer,
        t_initial=max(total - warmup if after else total, 1),
        warmup_prefix=after,
        lr_min=recipe.min_lr,
        warmup_t=warmup,
        warmup_lr_init=recipe.lr / max(warmup, 1),  # timm's default, 0, wastes the first step
        t_in_epochs=False,
    )
