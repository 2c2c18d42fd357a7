"""Train runs side by side on the same batches.

A cohort's runs share each decoded, augmented batch and one forward pass of their teacher. That is cheaper than training
them one by one, and makes their contrast paired; it changes no result: a run alone and in company ends with the same
weights, bit for bit on a CPU with the same number of threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from atdiag import randomness
from atdiag.data import datasets
from atdiag.data.loader import Batch, Stream
from atdiag.networks import students
from atdiag.networks.vit import ViT
from atdiag.runs import DamagedRunError, Run, RunBusyError, Store
from atdiag.spec import Recipe, RunSpec, Teacher
from atdiag.training import checkpoint as checkpoints
from atdiag.training import evaluate
from atdiag.training.board import Board
from atdiag.training.provenance import environment
from atdiag.transfer import method
from atdiag.transfer.ops import QK

Status = Literal["finished", "failed", "interrupted", "busy"]


@dataclass(frozen=True)
class Progress:
    """What a cohort reports while it works: steps done and to do over all its runs, and what it is doing."""

    done: int
    total: int
    images: int
    """Images that went through a student since the start."""
    doing: str


class Training:
    """One run under way: its student, optimiser and schedule, and how far it is."""

    def __init__(
        self, run: Run, spec: RunSpec, teacher: ViT | None, steps_per_epoch: int, device: torch.device
    ) -> None:
        self.run, self.spec, self.teacher = run, spec, teacher
        recipe = spec.recipe
        self.total = recipe.epochs * steps_per_epoch
        self.steps_per_epoch = steps_per_epoch
        self.student = students.build(spec.network, spec.seed.model)
        self.start: students.Start | None = None
        if spec.init.source == "teacher":
            assert teacher is not None
            self.start = students.start_from(self.student, teacher, spec.init)
        self.student.to(device).train()
        if spec.transfer.method == "copy":
            for layer in spec.transfer.layers:
                for parameter in self.student.blocks[layer].attn.qk_parameters().values():
                    parameter.requires_grad_(False)
        self.optimizer = _optimizer(self.student, recipe, device)
        self.schedule = _schedule(self.optimizer, recipe, self.total, steps_per_epoch)
        self.step, self.seconds = 0, 0.0
        self.metrics: list[dict[str, Any]] = []
        self.sums: dict[str, float] = {}
        self.cause: str | None = None
        self.board = Board(run)
        if (saved := checkpoints.load(run)) is not None:
            self.student.load_state_dict(saved.student)
            self.optimizer.load_state_dict(saved.optimizer)
            self.step, self.seconds = saved.step, saved.seconds
            self.metrics, self.sums = saved.metrics, saved.sums

    @property
    def done(self) -> bool:
        """Whether there is nothing left to train, or no way to."""
        return self.cause is not None or self.step >= self.total

    def save(self) -> None:
        """Write a checkpoint."""
        checkpoints.save(
            self.run,
            checkpoints.Checkpoint(
                self.step, self.student.state_dict(), self.optimizer.state_dict(), self.seconds, self.metrics, self.sums
            ),
        )

    def advance(self, batch: Batch, maps: dict[int, QK]) -> None:
        """One optimisation step. A loss or gradient that is not finite stops the run *before* the update."""
        spec, device = self.spec, batch.images.device
        keep = drop_path(spec.recipe.drop_path, spec.network.depth, spec.seed.model, self.step, batch.samples)
        with torch.autocast(device.type, torch.bfloat16, enabled=spec.recipe.precision == "bfloat16"):
            logits, transfer_loss = method.forward(
                self.student, spec.transfer, batch.images, maps, None if keep is None else keep.to(device)
            )
        task_loss = classification_loss(logits.float(), batch, spec.recipe.label_smoothing)
        loss = task_loss if transfer_loss is None else task_loss + transfer_loss
        if not math.isfinite(value := loss.item()):
            self.cause = f"the loss became {value}"
            return
        loss.backward()  # type: ignore[no-untyped-call]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = clip_grad_norm_(parameters, spec.recipe.clip_grad or math.inf)
        if not math.isfinite(norm.item()):
            self.cause = f"the gradient's norm became {norm.item()}"
            return
        self.schedule.step_update(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        sums = {"loss": value, "task_loss": task_loss.item(), "grad_norm": norm.item(), "steps": 1.0}
        if transfer_loss is not None:
            sums["transfer_loss"] = transfer_loss.item()
        for name, amount in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + amount

    def end_epoch(self) -> None:
        """Add the epoch's means to the run's metrics."""
        steps = self.sums.pop("steps")
        line: dict[str, Any] = {"epoch": self.step // self.steps_per_epoch, "step": self.step}
        line |= {name: total / steps for name, total in self.sums.items()}
        line["lr"] = self.optimizer.param_groups[0]["lr"]
        line["seconds"] = round(self.seconds, 3)
        self.metrics.append(line)
        self.sums = {}
        self.run.write_metrics(self.metrics)
        self.board.write(self.metrics)

    def subject(self) -> evaluate.Subject:
        """The student as something that can be evaluated."""
        return evaluate.Subject(self.student, self.spec.transfer, self.teacher)


def drop_path(rate: float, depth: int, seed: int, step: int, samples: np.ndarray) -> Tensor | None:
    """Drop-path factors [depth, 2, B, 1, 1] (attention and MLP branch of each block): 0, or 1 / (1 - rate).

    The rate rises linearly from 0 at the first block (Huang et al. 2016; timm's rule). Each factor depends on seed,
    step, layer and sample alone.
    """
    if rate == 0:
        return None
    rates = np.linspace(0, rate, depth)[:, None, None]
    draws = randomness.uniform(seed, "drop_path", step, np.arange(2 * depth).reshape(depth, 2, 1), samples)
    factors = np.where(draws >= rates, 1 / (1 - rates), 0.0).astype(np.float32)
    return torch.from_numpy(factors)[..., None, None]


def classification_loss(logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """Cross-entropy with label smoothing; for mixed images, of both labels by their shares (Zhang et al. 2018)."""
    loss = F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
    if batch.partner_labels is None:
        return loss
    return batch.lam * loss + (1 - batch.lam) * F.cross_entropy(logits, batch.partner_labels, label_smoothing=smoothing)


def _optimizer(student: ViT, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    no_decay = student.no_weight_decay() | {"reg_token"}  # older versions of timm forget it
    groups = param_groups_weight_decay(student, recipe.weight_decay, no_weight_decay_list=tuple(no_decay))
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=device.type in ("cpu", "cuda"))


def _schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, total: int, steps_per_epoch: int) -> CosineLRScheduler:
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), total)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(total, 1),
        lr_min=recipe.min_lr,
        warmup_t=warmup,
        warmup_lr_init=recipe.lr / max(warmup, 1),  # timm's default, 0, wastes the first step
        t_in_epochs=False,
    )


def train(
    specs: Sequence[RunSpec],
    store: Store,
    load_teacher: Callable[[Teacher], ViT],
    device: torch.device,
    report: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    checkpoint_seconds: float = 30.0,
) -> dict[str, Status]:
    """Train, evaluate and store the runs of one cohort; finished ones are left alone, interrupted ones go on.

    All must have the same data stream and, where they have one, the same teacher. ``should_stop`` is asked after each
    step: when it says so, every run writes its checkpoint and the call returns. Returns each run's status by id.

    Raises UserError or ValueError, with nothing written, for runs that can't be trained together or at all. What goes
    wrong with one run alone (a loss that is not finite, a checkpoint that can't be read) is that run's failure.
    """
    specs = list({spec.id: spec for spec in specs}.values())
    for spec in specs:
        datasets.check(spec.data, spec.network)
    if len({spec.stream for spec in specs}) > 1 or len({s.teacher.sha256 for s in specs if s.teacher}) > 1:
        raise ValueError("the runs of a cohort share one data stream and one teacher")
    status: dict[str, Status] = {}
    with ExitStack() as locks:
        todo: list[tuple[Run, RunSpec]] = []
        for spec in specs:
            try:
                run = store.create(spec)
                locks.enter_context(run.lock())
            except RunBusyError:
                status[spec.id] = "busy"
                continue
            except DamagedRunError as fault:
                store.run(spec).fail(0, str(fault))
                status[spec.id] = "failed"
                continue
            if run.finished:
                status[spec.id] = "finished"
            else:
                todo.append((run, spec))
        if todo:
            _Cohort(todo, load_teacher, device, report, should_stop, checkpoint_seconds, status).work()
    return status


class _Cohort:
    def __init__(
        self,
        todo: list[tuple[Run, RunSpec]],
        load_teacher: Callable[[Teacher], ViT],
        device: torch.device,
        report: Callable[[Progress], None],
        should_stop: Callable[[], bool],
        checkpoint_seconds: float,
        status: dict[str, Status],
    ) -> None:
        self.device, self.report, self.should_stop = device, report, should_stop
        self.checkpoint_seconds, self.status = checkpoint_seconds, status
        spec = todo[0][1]
        teacher_spec = next((s.teacher for _, s in todo if s.teacher), None)
        self.teacher = load_teacher(teacher_spec).to(device) if teacher_spec else None
        self.stream = Stream(spec.data, spec.recipe, spec.seed.data) if any(s.recipe.epochs for _, s in todo) else None
        steps = self.stream.steps_per_epoch if self.stream else 1
        self.test = datasets.test_split(spec.data)
        self.members: list[Training] = []
        for run, s in todo:
            try:
                self.members.append(Training(run, s, self.teacher if s.teacher else None, steps, device))
            except ValueError as fault:  # a checkpoint that can't be read, a teacher's weight that does not fit
                self._fail(run, 0, str(fault))
        self.total = sum(m.total for m in self.members)
        self.images = 0

    def work(self) -> None:
        """Train all members from the earliest step that any of them still has to do, and finish each as it ends."""
        last_save = time.monotonic()
        interval = self.checkpoint_seconds
        self._tell("starting")
        self._finish()
        step = min((m.step for m in self.members), default=0)
        while self.members:
            self._step(step)
            step += 1
            self._finish()
            self._tell("training")
            if self.should_stop():
                for member in self.members:
                    member.save()
                    member.board.close()
                    self.status[member.run.id] = "interrupted"
                return
            if time.monotonic() - last_save > interval:
                begin = time.monotonic()
                for member in self.members:
                    member.save()
                # Never more than a twentieth of the time, however slow the disk.
                last_save = time.monotonic()
                interval = max(self.checkpoint_seconds, 20 * (last_save - begin))

    def _step(self, step: int) -> None:
        # A member that is ahead (its checkpoint was written later than another's) waits for the others.
        active = [m for m in self.members if m.step == step]
        if not active:
            return
        assert self.stream is not None
        begin = time.perf_counter()
        batch = self.stream.batch(step).to(self.device)
        maps = self._teacher_maps(batch, active)
        shared = (time.perf_counter() - begin) / len(active)
        for member in active:
            begin = time.perf_counter()
            own = {}
            if member.spec.transfer.layers:
                assert member.teacher is not None
                own = evaluate.fit_maps(
                    {layer: maps[layer] for layer in member.spec.transfer.layers}, member.teacher, member.student
                )
            member.seconds += shared
            member.advance(batch, own)
            member.seconds += time.perf_counter() - begin
            self.images += len(batch.labels)
            if member.cause is None and member.step % member.steps_per_epoch == 0:
                member.end_epoch()

    def _teacher_maps(self, batch: Batch, active: list[Training]) -> dict[int, QK]:
        layers = {layer for member in active for layer in member.spec.transfer.layers}
        if not layers:
            return {}
        assert self.teacher is not None
        precision = active[0].spec.recipe.precision
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            maps: dict[int, QK] = self.teacher.maps(batch.images, layers)
        return maps

    def _finish(self) -> None:
        """Test and store the members that are done, and let go of them."""
        ended = [m for m in self.members if m.done]
        self.members = [m for m in self.members if not m.done]
        if whole := [m for m in ended if m.cause is None]:
            self._tell("testing")
            precision = whole[0].spec.recipe.precision  # the same for all: it is part of the stream
            results = evaluate.predict([m.subject() for m in whole], self.test, self.device, precision)
            for member, predictions in zip(whole, results, strict=True):
                if np.isfinite(predictions.log_p).all():
                    self._store(member, predictions)
                    self.status[member.run.id] = "finished"
                else:  # after the last update no loss is looked at
                    member.cause = "the trained network's outputs are not finite"
        for member in ended:
            member.board.close()
            if member.cause is not None:
                self._fail(member.run, member.step, member.cause)

    def _fail(self, run: Run, step: int, cause: str) -> None:
        run.fail(step, cause)
        self.status[run.id] = "failed"

    def _store(self, member: Training, predictions: evaluate.Predictions) -> None:
        run, spec = member.run, member.spec
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in member.student.state_dict().items()}
        run.write("weights.safetensors", to_safetensors(state, {"run": run.id}))
        run.write("predictions.npz", predictions.to_bytes())
        run.write_metrics(member.metrics)  # a checkpoint's lines, if the end came just after it was written
        trained = member.total * spec.recipe.batch_size
        run.finish(
            {
                "top1": predictions.top1,
                "test_images": len(predictions.label),
                "steps": member.total,
                "seconds": round(member.seconds, 3),
                "images_per_second": round(trained / member.seconds, 1) if member.seconds else None,
                "start": asdict(member.start) if member.start else None,
                "teacher": spec.teacher.label if spec.teacher else None,
                "environment": environment(self.device),
            }
        )

    def _tell(self, doing: str) -> None:
        to_do = sum(m.total - m.step for m in self.members)
        self.report(Progress(self.total - to_do, self.total, self.images, doing))
