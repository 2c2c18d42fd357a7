"""What the commands that look inside share: their options, subjects and images, and how they tell what came out.

Each is a function whose first parameter is :class:`Given`. Part of the command line: imports nothing heavy before a
command is called.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atdiag import folders
from atdiag.options import DataDir, Json, Profile, Runs, Set, joined

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.progress import Progress, TaskID
    from rich.table import Table

    from atdiag.analysis.images import Pictures
    from atdiag.analysis.subjects import Subject

SUBJECT = "a teacher (clip_b), a run's id (start:ID: before its first step), a file of a run, or timm:MODEL[@FILE]"
"""What names a network."""

Images = Annotated[
    list[str] | None,
    typer.Option(
        "--images",
        help="A number of test images (0: all), indices as 3,17,40-43, a folder, or files. Repeatable. [default: 256]",
    ),
]
Layers = Annotated[str | None, typer.Option(help="Blocks, such as 0,5,11 or 3-5 or top:4. [default: all]")]
_DataName = Annotated[
    str | None, typer.Option("--data", help="The data set. [default: the one that a run was trained on, else mini's]")
]
_SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that can't be read, and count them.")]
_Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu. [default: the best that is here]")]
_Out = Annotated[Path | None, typer.Option(help="Folder for tables and figures. [default: ./results/<command>]")]

_COMMON: dict[str, tuple[Any, Any]] = {
    "skip_bad": (_SkipBad, False),
    "data": (_DataName, None),
    "set_": (Set, []),
    "data_dir": (DataDir, None),
    "profile": (Profile, None),
    "runs": (Runs, None),
    "device": (_Device, None),
    "out": (_Out, None),
    "json_": (Json, False),
}


@dataclass(frozen=True)
class Given:
    """The options that all of these commands have, as they were typed."""

    skip_bad: bool = False
    data: str | None = None
    set_: Sequence[str] = ()
    data_dir: Path | None = None
    profile: str | None = None
    runs: Path | None = None
    device: str | None = None
    out: Path | None = None
    json_: bool = False

    def folder(self, command: str) -> Path:
        """Where tables and figures go. Raises UserError where nothing can be written."""

        out = self.out.expanduser() if self.out else Path("results") / command
        folders.writable(out, "--out")
        return out


def add(app: typer.Typer, name: str, function: Callable[..., None]) -> None:
    """Make a function of :class:`Given` and its own options a command. Its own option goes before a common one."""
    own = inspect.signature(function).parameters
    common = {name: option for name, option in _COMMON.items() if name not in own}

    def call(work: Callable[[Given], None], **options: Any) -> None:
        work(Given(**options))

    app.command(name)(joined(function, common, call))


class Desk:
    """Subjects by their references, and images for them."""

    def __init__(self, references: Sequence[str], given: Given) -> None:
        from atdiag.analysis import subjects
        from atdiag.runs import Store
        from atdiag.study import profile as profiles
        from atdiag.study import schedule

        if given.data_dir is not None:
            folders.look_in(given.data_dir)
        overrides = [*([f"data.name={given.data}"] if given.data is not None else []), *given.set_]
        settings = profiles.resolve(given.profile, None, overrides, given.runs)
        self.given = given
        self.profile = settings.profile.name
        self.store = Store(settings.runs)
        self.device = schedule.choose_device(given.device)
        data = settings.profile.data
        self.subjects: list[Subject] = [
            subjects.find(reference, self.profile, data, self.store).to(self.device) for reference in references
        ]
        # A run's student is looked into with the images that it was trained for, unless others are asked for.
        trained = next((one.data for one in self.subjects if one.spec is not None), None)
        own = trained is None or any(item.startswith("data.") for item in overrides)
        self.data = data if own else trained

    def pictures(self, images: Sequence[str] | None, default: int = 256) -> Pictures:
        """The images that are asked for; else ``default`` of the data set's. Raises UserError where the subjects do not
        see images of one kind."""
        import numpy as np

        from atdiag.analysis.images import choose
        from atdiag.analysis.tracing import check_images

        check_images(self.subjects)  # before images are asked for, which could be of none of the kinds
        network = self.subjects[0].network
        if images:
            return choose(list(images), self.data, network, self.given.skip_bad)
        every = choose(0, self.data, network)
        count = min(default, len(every))
        return every.reordered(np.arange(count, dtype=np.int64) * len(every) // count)

    def tell(
        self, tables: Sequence[Table], notes: Sequence[str], files: Sequence[Path], document: Any, pictures: Pictures
    ) -> None:
        """Say what came out."""
        from rich.console import Console

        console = Console()
        for one in tables:
            console.print(one)
        for note in [*notes, *left_out(pictures)]:
            console.print(f"- {note}", style="dim", highlight=False)
        for path in files:
            typer.echo(f"  {path}")
        if self.given.json_:
            typer.echo(json.dumps({**document, "files": [str(path) for path in files]}))


def chosen(text: str | None, count: int, option: str) -> tuple[int, ...] | None:
    """Blocks or heads as they are typed; None for all. Raises UserError."""
    from atdiag.study.forms import indices

    return None if text is None else indices(text, count, option)


def layer_pairs(text: str | None) -> dict[int, int] | None:
    """``0:0,5:11`` -> a mapping. Raises UserError."""
    from atdiag.words import UserError

    if text is None:
        return None
    out: dict[int, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", part)
        if not found:
            raise UserError(f"--layer-map {text!r} is no list of pairs", "write it as 0:0,5:11")
        if int(found[1]) in out:
            raise UserError(
                f"--layer-map {text!r} has layer {int(found[1])} of A twice", "each is compared with one of B's"
            )
        out[int(found[1])] = int(found[2])
    return out


def write(folder: Path, stem: str, frame: pd.DataFrame, document: Any, figures: dict[str, Figure]) -> list[Path]:
    """Write a table as CSV and JSON, and figures as PNG and PDF. Returns the files."""
    from atdiag.runs import write_atomically
    from figures import style

    folder.mkdir(parents=True, exist_ok=True)
    drawn = {folder / f"{stem}{name}.{kind}": figure for name, figure in figures.items() for kind in ("png", "pdf")}
    paths = [folder / f"{stem}.csv", folder / f"{stem}.json", *drawn]
    style.save(drawn)
    write_atomically(paths[0], frame.to_csv(index=False))
    write_atomically(paths[1], json.dumps({**document, "files": [str(path) for path in paths]}, indent=1))
    return paths


def stem(*parts: str) -> str:
    """A file name for what was looked at: readable, and another one for anything else."""
    words = [re.sub(r"[^\w.-]+", "_", part).strip("_")[:40] for part in parts[:2]]
    return f"{'-'.join(words)}-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:6]}"


def table(title: str, *columns: str) -> Table:
    """An empty table for the terminal: the first column is of names, the others are of numbers."""
    from rich import box
    from rich.table import Table

    out = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        out.add_column(name, justify="left" if i == 0 else "right", overflow="fold", no_wrap=i > 0)
    return out


@contextlib.contextmanager
def watched(**several: Pictures) -> Iterator[None]:
    """On a terminal a bar for each set of images, under its name, while they are gone through."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        for name, pictures in several.items():
            pictures.tick = _ticker(bar, bar.add_task(name.replace("_", " "), total=len(pictures)))
        yield


def _ticker(bar: Progress, task: TaskID) -> Callable[[int], None]:
    return lambda done: bar.update(task, completed=done)


def left_out(pictures: Pictures, kind: str = "images") -> list[str]:
    """A note on the images that can't be read, with the names of the first; nothing where all can."""
    names = list(pictures.skipped)
    if not names:
        return []
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    told = f"{', '.join(names[:_NAMED])}{more}"
    return [f"{len(names)} of {len(pictures)} {kind} can't be read and are left out: {told}"]


_NAMED = 10


def size(count: int) -> str:
    """A number of bytes for a reader.

    >>> size(5_408), size(12_345_678)
    ('5.4 kB', '12.3 MB')
    """
    return f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"


def shown_on(pictures: Pictures) -> str:
    """``256 test images of digits``."""
    seen = len(pictures) - len(pictures.skipped)
    return f"{seen} images" if pictures.data is None else f"{seen} test images of {pictures.data.name}"
