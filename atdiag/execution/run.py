"""Train runs to completion with an executor.

The executor only trains; which runs are finished is read from their directories.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from atdiag.core.errors import FaultError, UserError
from atdiag.core.options import ExecutionOptions
from atdiag.core.progress import OnProgress, Progress, ignore
from atdiag.core.runs import Store
from atdiag.core.spec import RunSpec
from atdiag.core.text import count
from atdiag.execution import devices, plan, torchrun
from atdiag.execution.executor import Executor
from atdiag.execution.local import LocalExecutor


def execute(
    specs: Sequence[RunSpec],
    store: Store,
    options: ExecutionOptions,
    on_progress: OnProgress = ignore,
    executor: Executor | None = None,
) -> None:
    """Train every run to completion, skipping finished ones and waiting for those that another process is training.

    executor: None for processes on this machine.

    Raises FaultError (finished work is kept), StoppedError, or UserError for options that the executor can't meet.
    """
    executor = executor or torchrun.executor() or LocalExecutor()
    if options.ranks > 1 and not getattr(executor, "takes_ranks", False):
        raise UserError(
            f"`ranks` {options.ranks}: {type(executor).__name__} trains a run in one process", "leave `ranks` out"
        )
    while todo := plan.pending(specs, store):
        plan.fit_ranks(todo, options.ranks)
        if options.ranks > 1:
            devices.fit_ranks(options, devices.resolve(options.device))
        processes = executor.processes(options)
        store.root.mkdir(parents=True, exist_ok=True)
        elsewhere = {spec.id for spec in todo if store.run(spec).state == "training"}
        if len(elsewhere) == len(todo):
            doing = f"waiting for {count(len(todo), 'run')} that another process is training"
            on_progress(Progress(0, 0, doing=doing))
            time.sleep(1)
            continue
        ours = [spec for spec in todo if spec.id not in elsewhere]
        statuses = _work(executor, plan.share_out(ours, processes), store, options, on_progress)
        if failed := [spec for spec in ours if statuses.get(spec.id) == "failed"]:
            raise FaultError(_failures(failed, store))
        if "busy" not in statuses.values() and plan.pending(ours, store):
            raise FaultError("a training process ended before its runs did; start again to go on")


def _work(
    executor: Executor, jobs: Sequence[plan.Job], store: Store, options: ExecutionOptions, on_progress: OnProgress
) -> dict[str, str]:
    """Execute jobs until all end, and return each run's status by id."""
    statuses: dict[str, str] = {}
    try:
        executor.submit(jobs, store, options)
        while (update := executor.poll()) is not None:
            statuses |= update.statuses
            on_progress(update.progress)
    except BaseException:
        executor.cancel()
        raise
    return statuses


def _failures(failed: Sequence[RunSpec], store: Store) -> str:
    facts = [(spec.id, store.run(spec).failure() or {}) for spec in failed]
    text = "; ".join(f"run {name} stopped at step {fact.get('step')}: {fact.get('cause')}" for name, fact in facts)
    hint = "; a smaller recipe.lr may help" if any(fact.get("step") for _, fact in facts) else ""
    return f"{text} (the other runs are kept{hint})"
