"""What the command line says beside its results: exit codes, one line on standard error, and what a stop leaves.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import typer

EXIT_FAULT, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143

LOOKING = ("trace", "similarity", "intervene", "probe", "attention-stats", "maps")
"""Commands that look inside: they train nothing, and write at their end."""

RESERVED = (
    "reproduce",
    "figures",
    "teachers",
    "pretrain",
    "doctor",
    "runs",
    "data",
    *LOOKING,
)
"""Names of commands that are no experiments."""


def stopped(command: str) -> str:
    """What is left of a command that was stopped, by its name."""
    if command in ("pretrain", "reproduce") or command not in RESERVED:
        return "stopped: checkpoints are written, the same command goes on from there"
    if command in LOOKING:
        return "stopped: nothing was written, the same command starts again"
    return "stopped: the same command starts again"


def say(text: str) -> None:
    """Tell the user something in one line, on standard error."""
    typer.echo(f"atdiag: {' '.join(text.splitlines())}", err=True)
