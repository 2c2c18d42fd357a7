"""Options that commands share, and how a command comes to them beside its own.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

Runs = Annotated[
    Path | None, typer.Option("--runs", help="Where run directories live. [default: $ATDIAG_RUNS, else ./runs]")
]
Json = Annotated[bool, typer.Option("--json", help="Print a last line that a machine can read.")]
Profile = Annotated[str | None, typer.Option(help="The scale: mini, small or paper. [default: mini]")]
Set = Annotated[
    list[str],
    typer.Option("--set", metavar="NAME=VALUE", help="Override a setting, such as recipe.epochs=40. Repeatable."),
]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="The folder of all real data sets. [default: $ATDIAG_DATA]")
]

Common = Mapping[str, tuple[Any, Any]]
"""Options by the names of their parameters: annotation and default."""


def joined(function: Callable[..., Any], common: Common, call: Callable[..., None]) -> Callable[..., None]:
    """A command with a function's own options (its parameters but the first), then the ``common`` ones.

    ``call`` does the work: it is given the function with its own options filled in, which asks for nothing but its
    first parameter, and each common option by name.
    """
    signature = inspect.signature(function, eval_str=True)
    own = [p.replace(kind=p.KEYWORD_ONLY) for p in list(signature.parameters.values())[1:]]
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in common.items()
    ]

    def command(**options: Any) -> None:
        chosen = {p.name: options.pop(p.name) for p in own}
        call(partial(function, **chosen), **options)

    command.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (*own, *shared)}
    command.__doc__ = function.__doc__
    command.__name__ = function.__name__
    return command
