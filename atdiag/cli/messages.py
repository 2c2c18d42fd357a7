"""Messages of the command line: exit codes, lines on standard error, and what an interrupted command leaves.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import re

import typer

EXIT_FAULT, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_PIPE, EXIT_TERMINATED = 1, 2, 130, 141, 143

LOOKING = ("trace", "similarity", "intervene", "probe", "attention-stats", "maps")
"""Commands that analyse networks: they train nothing, and write their files at the end."""

RESERVED = (
    "diagnose",
    "reproduce",
    "figures",
    "teachers",
    "pretrain",
    "doctor",
    "runs",
    "data",
    *LOOKING,
)
"""Names of commands that are not experiments."""


def stopped(command: str) -> str:
    """Describe what an interrupted command leaves, by its name."""
    if command in ("pretrain", "reproduce", "diagnose") or command not in RESERVED:
        return "stopped: checkpoints are written, the same command goes on from there"
    if command in LOOKING:
        return "stopped: nothing was written, the same command starts again"
    return "stopped: the same command starts again"


_ARGUMENT = re.compile(r"`([^\W\d]\w*(?:\.[^\W\d]\w*)*)`")
"""An argument as the library names it: an identifier in backticks, or a dotted one, which is a setting."""


def as_typed(text: str) -> str:
    """Return a library's message with its arguments spelled as command-line options.

    >>> as_typed("give `data_dir`, or `data.image_size`=224")
    'give --data-dir, or --set data.image_size=224'
    """
    return _ARGUMENT.sub(lambda found: _option(found[1]), text)


def _option(name: str) -> str:
    return f"--set {name}" if "." in name else f"--{name.strip('_').replace('_', '-')}"


def say(text: str) -> None:
    """Print one line on standard error."""
    typer.echo(f"atdiag: {' '.join(text.splitlines())}", err=True)
