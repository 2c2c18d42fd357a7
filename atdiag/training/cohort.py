"""Train runs side by side on the same batches.

A cohort's runs share each decoded, augmented batch and one forward pass of their teacher. This is cheaper than training
them one by one and pairs their contrasts, but changes no result: alone or in company, a run ends with the same weights,
bit for bit on a CPU with the same number of threads. Over several ranks every run of the cohort is trained by all of
them, and its result is the same up to rounding.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as to_safetensors

from atdiag.core.options import ExecutionOptions
from atdiag.core.progress import OnProgress, Progress, ignore
from atdiag.core.runs import Run, Store
from atdiag.core.spec import RunSpec, Teacher
from atdiag.data import loader, sources
from atdiag.data.loader import Batch, Stream, WorkerDiedError, default_workers
from atdiag.data.splits import Split
from atdiag.networks.model.vit import ViT
from atdiag.networks.timm.wrapping import Foreign
from atdiag.training import compiled, determinism, evaluation, provenance
from atdiag.training.branches import teacher_drops, teacher_factors
from atdiag.training.claiming import Status, claim
from atdiag.training.pulse import Pulse
from atdiag.training.ranks import ALONE, RankGroup
from atdiag.training.teacher_facts import TeacherFacts
from atdiag.training.trainer import RunTrainer
from atdiag.transfer.observation import Observation, of_teacher


class OutOfMemoryError(RuntimeError):
    """A training step does not fit in device memory; the message names a ``micro_batch`` that does."""


def train(
    specs: Sequence[RunSpec],
    store: Store,
    load_teacher: Callable[[Teacher], ViT | Foreign],
    options: ExecutionOptions,
    on_progress: OnProgress = ignore,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    processes: int = 1,
    command: Sequence[str] | None = None,
    ranks: RankGroup = ALONE,
) -> dict[str, Status]:
    """Train, evaluate and store the runs of one cohort; skip finished runs, resume interrupted ones.

    All runs must have the same data stream and, where they have one, the same teacher. should_stop: polled after each
    step; once it returns True, on any rank, every run writes its checkpoint and the call returns. processes: number of
    such trainings that share the machine. command: the command line to record; None for this process's. ranks: the
    processes that make this call together; the first alone looks at run directories. Returns each run's status by id.

    Raises UserError or ValueError, with nothing written, for runs that can't be trained, or not together. A fault of a
    single run (a loss that is not finite, a checkpoint that can't be read) fails only that run. Raises OutOfMemoryError
    if a step does not fit in device memory; it names a ``micro_batch`` that does. Raises RankLostError if another rank
    has ended.
    """
    specs = list({spec.id: spec for spec in specs}.values())
    with ranks.watched(), ExitStack() as locks:
        locks.enter_context(determinism.algorithms(options.deterministic))
        locks.enter_context(determinism.float32_as_float32())
        status = ranks.shared(claim(specs, store, locks) if ranks.first else {})
        if todo := [(store.run(spec), spec) for spec in specs if spec.id not in status]:
            cohort = _Cohort(todo, load_teacher, options, processes, ranks)
            status |= cohort.work(on_progress, should_stop, command)
    return status


class _Cohort:
    """The active runs of a cohort, their shared batches, and the status of those that ended (``status``)."""

    def __init__(
        self,
        todo: list[tuple[Run, RunSpec]],
        load_teacher: Callable[[Teacher], ViT | Foreign],
        options: ExecutionOptions,
        processes: int,
        ranks: RankGroup,
    ) -> None:
        device = provenance.best_device() if options.device is None else torch.device(options.device)
        self.device = device = ranks.device(device)
        self.options, self.ranks, self.processes = options, ranks, processes * ranks.here
        self.pulse = Pulse(provenance.device_name(device))
        self.status: dict[str, Status] = {}
        self.on_progress: OnProgress = ignore
        self.should_stop: Callable[[], bool] = lambda: False
        self.origin: dict[str, Any] = {}
        self.data = todo[0][1].data
        spec = todo[0][1]
        teacher_spec = next((s.teacher for _, s in todo if s.teacher), None)
        self.teacher = load_teacher(teacher_spec).to(device) if teacher_spec else None
        self.stream = None
        if any(s.recipe.epochs for _, s in todo):
            self.stream = Stream(spec.data, spec.recipe, spec.seed.data, ranks.index, ranks.count)
        self.batch_size = spec.recipe.batch_size  # of all ranks together
        steps = self.stream.steps_per_epoch if self.stream else 1
        self.validation = None
        if self.stream is not None and spec.data.validation is not None:
            self.validation = sources.find(spec.data).validation_split(spec.data, spec.seed.data)
        self.test = sources.find(spec.data).test_split(spec.data)
        self.members: list[RunTrainer] = []
        prepared = TeacherFacts(self.teacher, self.stream.images if self.stream else None)
        for run, s in todo:
            try:
                origin = prepared.origin(s, load_teacher)
                facts = prepared.averages(s), steps, device, prepared.heads(s), ranks, options.track, origin
                self.members.append(RunTrainer(run, s, self.teacher if s.teacher else None, *facts))
            except ValueError as fault:  # a checkpoint that can't be read, teacher weights that do not fit
                self._fail(run, 0, str(fault))
        self.compiled = compiled.wanted(device)
        if self.compiled:
            for network in (*(m.student for m in self.members), self.teacher):
                if isinstance(network, ViT):  # a foreign network's modules stay as they are
                    compiled.compile_blocks(network)
        self.total = sum(m.total for m in self.members)
        self.images = 0
        self._ahead: Generator[Batch, None, None] | None = None

    def work(
        self, on_progress: OnProgress, should_stop: Callable[[], bool], command: Sequence[str] | None
    ) -> dict[str, Status]:
        """Train all members from the earliest step that any of them needs, and finish each one when it is done."""
        self.on_progress, self.should_stop = on_progress, should_stop
        self.origin = provenance.origin(self.data, self.device, command) if self.ranks.first else {}
        try:
            self._work()
            return self.status
        except RuntimeError as fault:
            if died := loader.worker_died(fault):
                raise died from fault
            raise
        finally:
            self._leave_batches()
            self.pulse.end()

    def _work(self) -> None:
        last_save = time.monotonic()
        interval = self.options.checkpoint_seconds
        self._tell("starting")
        self._finish()
        step = min((m.step for m in self.members), default=0)
        while self.members:
            self._step(step)
            step += 1
            self._finish()
            self._tell("training")
            due = self.ranks.first and time.monotonic() - last_save > interval
            stop, due = self.ranks.agree(self.should_stop(), due)
            if stop:
                for member in self.members:
                    member.save()
                    member.board.close()
                    self.status[member.run.id] = "interrupted"
                return
            if due:
                begin = time.monotonic()
                for member in self.members:
                    member.save()
                # Spend at most a twentieth of the time on saving, however slow the disk.
                last_save = time.monotonic()
                interval = max(self.options.checkpoint_seconds, 20 * (last_save - begin))

    def _step(self, step: int) -> None:
        # A member that is ahead (with a later checkpoint than the others) waits for the rest.
        active = [m for m in self.members if m.step == step]
        if not active:
            self._leave_batches()
            return
        begin = time.perf_counter()
        try:
            batch = self._batch(step).to(self.device)
        except (OSError, WorkerDiedError):  # raised between steps, so the state up to here is valid
            with contextlib.suppress(OSError):
                for member in self.members:
                    member.save()
            raise
        taken = (time.perf_counter() - begin) / len(active)
        for member in active:
            member.seconds += taken
        fits = True
        try:
            self._advance(batch, active)
        except torch.OutOfMemoryError:
            fits = False
        if not fits:  # outside the handler, whose traceback keeps the allocated tensors alive
            raise self._too_large(batch, active)
        self.images += self.batch_size * len(active)
        self._end_epoch([m for m in active if m.cause is None and m.ends_epoch])

    def _end_epoch(self, members: list[RunTrainer]) -> None:
        """Record the epoch that these members have just ended, with their accuracy on the validation part if any."""
        accuracy: list[float | None] = [None] * len(members)
        if members and self.validation is not None:
            self._tell("validating")
            accuracy = [predictions.top1 for predictions in self._predict(members, self.validation)]
            for member in members:
                member.student.train()
        for member, top1 in zip(members, accuracy, strict=True):
            member.end_epoch(top1)

    def _advance(self, batch: Batch, active: list[RunTrainer]) -> None:
        """Advance some members by one step, in micro-batches if requested."""
        learnt = 0
        for part in batch.parts(self.options.micro_batch):
            learnt += len(part.labels)
            self._learn(part, active, last=learnt == len(batch.labels))

    def _learn(self, part: Batch, active: list[RunTrainer], last: bool) -> None:
        share = len(part.labels) / self.batch_size
        groups: dict[Hashable, list[RunTrainer]] = defaultdict(list)
        for member in active:
            groups[teacher_drops(member.spec)].append(member)
        for members in groups.values():
            self._learn_together(part, members, share, last)

    def _learn_together(self, part: Batch, active: list[RunTrainer], share: float, last: bool) -> None:
        begin = time.perf_counter()
        shown = self._teacher_shows(part, active)
        shared = (time.perf_counter() - begin) / len(active)
        for member in active:
            begin = time.perf_counter()
            own = Observation()
            if member.spec.transfer.method != "none":
                assert member.teacher is not None
                spec = member.spec
                own = evaluation.fit(shown, member.teacher, spec.network, spec.transfer, member.heads)
                own = replace(own, averages=member.averages)
            member.learn(part, own, share, last)
            if last:  # member by member: each update frees gradients for the next
                member.update()
            member.seconds += shared + time.perf_counter() - begin

    def _too_large(self, batch: Batch, active: list[RunTrainer]) -> OutOfMemoryError:
        """Return the error for a step that does not fit, with the largest micro-batch that does, found by trial."""
        tried = min(self.options.micro_batch or len(batch.labels), len(batch.labels))
        size = tried // 2 if self.ranks.count == 1 else 0  # others wait for this rank's gradients: no trial
        while size and not self._fits(batch, size, active):
            size //= 2
        where = f"{provenance.device_name(self.device)} is out of memory at {tried} images at once"
        if len(self.members) > 1:
            where += f" with {len(self.members)} runs side by side"
        if self.ranks.count > 1:
            return OutOfMemoryError(f"{where} on one of {self.ranks.count} ranks: give a smaller `micro_batch`")
        if not size:
            return OutOfMemoryError(f"{where}, and not even one fits: use a device with more memory")
        return OutOfMemoryError(f"{where}: `micro_batch` {size} fits, and gives the same result up to rounding")

    def _fits(self, batch: Batch, size: int, active: list[RunTrainer]) -> bool:
        """Return whether a forward and backward pass on ``size`` images fits; its gradients are dropped."""
        fits = True
        try:
            self._forget(active)
            # The first update allocates the optimiser's two moments; this trial makes no update, so reserve their
            # memory.
            reserved = [
                torch.empty_like(parameter)
                for member in active
                if not member.optimizer.state
                for parameter in (*member.student.parameters(),) * 2
            ]
            self._learn(next(batch.parts(size)), active, last=False)
            del reserved
        except torch.OutOfMemoryError:
            fits = False
        self._forget(active)
        return fits

    def _forget(self, active: list[RunTrainer]) -> None:
        for member in active:
            member.forget()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _batch(self, step: int) -> Batch:
        """Return the batch of a step; workers, if any, prepare batches in advance while steps come in order."""
        assert self.stream is not None
        if self._ahead is None:
            stream, cuda = self.stream, self.device.type == "cuda"
            workers = default_workers(stream.images, stream.recipe, self.device, self.processes)
            self._ahead = stream.batches(step, max(m.total for m in self.members), workers, pin=cuda)
        return next(self._ahead)

    def _leave_batches(self) -> None:
        """Stop the workers that prepare batches."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _teacher_shows(self, batch: Batch, active: list[RunTrainer]) -> Observation:
        wanted = of_teacher(member.spec.transfer for member in active)
        if not wanted:
            return Observation()
        assert self.teacher is not None
        one = active[0]  # as the others
        keep = teacher_factors(one.spec, one.step, batch.samples)
        if keep is not None:
            keep = keep.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=one.spec.recipe.precision == "bfloat16"):
            return evaluation.show(self.teacher, batch.images, wanted, keep)

    def _finish(self) -> None:
        """Evaluate, store and release the members that are done."""
        ended = [m for m in self.members if m.done]
        self.members = [m for m in self.members if not m.done]
        if whole := [m for m in ended if m.cause is None]:
            self._tell("testing")
            for member, predictions in zip(whole, self._predict(whole, self.test), strict=True):
                if np.isfinite(predictions.log_p).all():
                    self._store(member, predictions)
                    self.status[member.run.id] = "finished"
                else:  # no loss is checked after the last update
                    member.cause = "the trained network's outputs are not finite"
        for member in ended:
            member.board.close()
            if member.cause is not None:
                self._fail(member.run, member.step, member.cause)

    def _predict(self, members: list[RunTrainer], images: Split) -> list[evaluation.Predictions]:
        precision = members[0].spec.recipe.precision  # the same for all: precision is part of the stream
        with compiled.eagerly() if self.compiled else nullcontext():
            workers = default_workers(images, None, self.device, self.processes)
            subjects = [m.subject() for m in members]
            return evaluation.predict(subjects, images, self.device, precision, workers, ranks=self.ranks)

    def _fail(self, run: Run, step: int, cause: str) -> None:
        if self.ranks.first:
            run.fail(step, cause)
        self.status[run.id] = "failed"

    def _store(self, member: RunTrainer, predictions: evaluation.Predictions) -> None:
        if not self.ranks.first:
            return
        run, spec = member.run, member.spec
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in member.outcome.state_dict().items()}
        run.write("weights.safetensors", to_safetensors(state, {"run": run.id}))
        run.write("predictions.npz", predictions.to_bytes())
        run.write_metrics(member.metrics)  # needed if the process ended right after the last checkpoint
        trained = member.total * spec.recipe.batch_size
        run.finish(
            {
                "top1": predictions.top1,
                "test_images": len(predictions.label),
                **self._validated(member),
                "steps": member.total,
                "seconds": round(member.seconds, 3),
                "images_per_second": round(trained / member.seconds, 1) if member.seconds else None,
                "start": asdict(member.start) if member.start else None,
                **member.chosen_heads,
                "teacher": spec.teacher.label if spec.teacher else None,
                "weights": asdict(origin) if (origin := getattr(member.teacher, "origin", None)) else None,
                "environment": {
                    **provenance.environment(self.device),
                    "compiled": self.compiled,
                    "micro_batch": self.options.micro_batch,
                    "deterministic": self.options.deterministic,
                    "ranks": self.ranks.count,
                },
                "origin": {**self.origin, "from_step": member.began},
            }
        )

    def _validated(self, member: RunTrainer) -> dict[str, Any]:
        if self.validation is None:
            return {}
        return {
            "validation_top1": member.metrics[-1]["validation_top1"] if member.metrics else None,
            "validation_images": len(self.validation),
        }

    def _tell(self, doing: str) -> None:
        to_do = sum(m.total - m.step for m in self.members)
        if self.ranks.first:
            self.pulse.beat(self.members, self.images, doing)
        self.on_progress(Progress(self.total - to_do, self.total, self.images, doing))
