"""Training curves in Weights & Biases, an optional package (``pip install 'atdiag[wandb]'``).

A W&B run has the id of the run, so that a resumed run goes on in its place; its group is the experiment that asked for
the run last, its tags are arm and teacher. ``WANDB_MODE``, ``WANDB_PROJECT`` and W&B's other variables are heeded.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

from atdiag.core import asked
from atdiag.core.errors import UserError, suggest
from atdiag.core.runs import Run, Store

PLACES = ("wandb",)
"""Where training can be shown."""

_LONGEST_TAG = 64
"""Characters of a tag, by W&B's rule."""


def check(track: str | None) -> None:
    """Make sure that training can be shown there. Raises UserError where the place is unknown, or can't be used."""
    if track is None:
        return
    if track not in PLACES:
        raise UserError(f"`track` {track!r} is unknown{suggest(track, PLACES)}", f"known: {', '.join(PLACES)}")
    try:
        import wandb
    except ImportError:
        raise UserError("`track` wandb needs the package wandb", "type pip install 'atdiag[wandb]'") from None
    offline = os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun")
    if not offline and not wandb.api.api_key:
        raise UserError("`track` wandb: nobody is logged in to W&B", "type wandb login, or set WANDB_MODE=offline")


def begin(run: Run) -> WandbRun | None:
    """Begin a run in W&B, or go on with it; None, with a warning, where W&B does not answer: training goes on."""
    import wandb

    try:
        return WandbRun(run)
    except wandb.Error as fault:
        warnings.warn(f"run {run.id} is not shown in W&B ({fault})", stacklevel=2)
        return None


class WandbRun:
    """A run in W&B, of any number in one process. Its files lie in ``<runs>/wandb``, unless ``WANDB_DIR`` is set."""

    def __init__(self, run: Run) -> None:
        import wandb

        spec = run.spec
        who = asked.read(Store(run.path.parent)).get(run.id, {})
        group, arm = next(reversed(who.items()), (None, ""))
        tags = [tag[:_LONGEST_TAG] for tag in (arm, spec.teacher.label if spec.teacher else "") if tag]
        self._run = run
        self._wandb: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "atdiag"),
            id=run.id,
            name=f"{arm or spec.transfer.method}, seed {spec.seed.model}",
            group=group,
            tags=tags,
            config=spec.model_dump(mode="json"),
            dir=os.environ.get("WANDB_DIR", str(run.path.parent)),
            resume="allow",
            reinit="create_new",  # the runs of a cohort are side by side in one process
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._from: int = self._wandb.step
        """The step from which a resumed run goes on: W&B takes no earlier one again."""

    def log(self, numbers: dict[str, Any], step: int) -> None:
        """Write an epoch's numbers, unless they are there from before an interruption."""
        if step >= self._from:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        """End it, with the accuracy on the test images if the run is finished."""
        if self._run.finished:
            self._wandb.summary["top1"] = self._run.result()["top1"]
        self._wandb.finish(exit_code=0 if self._run.finished else 1)
