"""Progress bars in a notebook, where rich needs more packages than tqdm. Imports nothing heavy."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID


@dataclass
class _Task:
    description: str
    bar: Any
    began: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds since the task was added."""
        return time.monotonic() - self.began


class NotebookBar:
    """The part of rich's progress bar that :mod:`atdiag.reports.console` uses, drawn by tqdm.

    With ipywidgets it is a widget, without it a line of text; at the end it is removed.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.tasks: list[_Task] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self.tasks:
            task.bar.close()

    def add_task(self, description: str, total: float | None = None, **_: Any) -> TaskID:
        """Add a bar, and return its number."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tqdm's advice to install ipywidgets
            from tqdm.auto import tqdm

        bar = tqdm(total=total, desc=description, leave=False)
        self.tasks.append(_Task(description, bar))
        return cast("TaskID", len(self.tasks) - 1)

    def update(
        self,
        task: TaskID,
        *,
        completed: float | None = None,
        total: float | None = None,
        description: str | None = None,
        rate: str = "",
    ) -> None:
        """Show how much of a task is done."""
        bar = self.tasks[task].bar
        if total is not None and total != bar.total:
            bar.reset(total=total)
        if completed is not None:
            bar.update(completed - bar.n)
        if description is not None:
            bar.set_description(" ".join(filter(None, (description, rate))))
