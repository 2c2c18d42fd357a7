"""Options and output of the commands that analyse networks.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atdiag.api.sessions import SUBJECT as SUBJECT
from atdiag.api.sessions import ExperimentSession as ExperimentSession
from atdiag.api.sessions import check_exists
from atdiag.api.sessions import open_session as open_session
from atdiag.api.sessions import resolve as resolve
from atdiag.cli.messages import as_typed
from atdiag.cli.options import DataDir, Json, Profile, Runs, Set, Split, joined, under
from atdiag.reports import console

if TYPE_CHECKING:
    from rich.table import Table

    from atdiag.api.results import Result

Given = dict[str, Any]
"""The common options of a command, as the functions in Python take them."""
Shown = tuple["Result", "Sequence[Table]"]
"""What a command shows: a result, and its tables for the terminal."""

Images = Annotated[
    list[str] | None,
    typer.Option(
        "--images",
        help="A number of test images (0: all), indices as 3,17,40-43, a folder, or files. Repeatable. [default: 256]",
    ),
]
Layers = Annotated[str | None, typer.Option(help="Blocks, such as 0,5,11 or 3-5 or top:4. [default: all]")]
LayerMap = Annotated[
    str | None, typer.Option(help="Which blocks belong together in networks of different depth: 0:0,5:11.")
]
_DataName = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="A folder of images, or a data set's name. [default: the one that a run was trained on, else mini's]",
    ),
]
_SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that can't be read, and count them.")]
_Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu. [default: the best that is here]")]
_Out = Annotated[Path | None, typer.Option(help="Folder for tables and figures. [default: ./results/<command>]")]

_Label = Annotated[
    list[str] | None,
    typer.Option("--label", help="A subject's name in tables and figures. Repeatable: one for each, in order."),
]

_COMMON: dict[str, tuple[Any, Any]] = {
    "label": (_Label, None),
    "skip_bad": (_SkipBad, False),
    "data": (_DataName, None),
    "split": (Split, None),
    "set_": (Set, []),
    "data_dir": (DataDir, None),
    "profile": (Profile, None),
    "runs": (Runs, None),
    "device": (_Device, None),
    "out": (_Out, None),
    "json_": (Json, False),
}


def add(app: typer.Typer, name: str, function: Callable[..., Shown]) -> None:
    """Add a function as a command: its own options, then the common ones of analyses that it does not replace.

    function: takes the common options as the analyses in Python do; returns the result and its tables, to be printed.
    """
    own = inspect.signature(function).parameters
    common = under("Common options", {option: given for option, given in _COMMON.items() if option not in own})

    def call(work: partial[Shown], json_: bool, **given: Any) -> None:
        for parameter in ("subject", "subjects", "other", "others"):  # before anything heavy is loaded
            named = work.keywords.get(parameter) or ()
            for reference in [named] if isinstance(named, str) else named:
                check_exists(reference)
        settings = given.pop("set_")
        out = given.pop("out", None) or Path("results") / name
        show(*work({**given, "out": out, "settings": settings, "spoken": as_typed}), json_)

    app.command(name)(joined(function, common, call))


def show(result: Result, tables: Sequence[Table], json_: bool) -> None:
    """Print tables, notes and files, and the document as JSON if requested."""
    from rich.console import Console

    terminal = Console()
    for one in tables:
        console.show_table(one)
    for note in result.notes:
        terminal.print(f"- {note}", style="dim", highlight=False, markup=False)
    if result.written is not None:
        console.show_files(result.written.files)
    if json_:
        files = {} if result.written is None else result.written.record()
        typer.echo(json.dumps({**result.document, **files}))
