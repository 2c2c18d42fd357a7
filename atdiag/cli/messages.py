"""Messages of the command line: exit codes, lines on standard error, and what an interrupted command leaves.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping
from contextvars import ContextVar

import typer

EXIT_FAULT, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_PIPE, EXIT_TERMINATED = 1, 2, 130, 141, 143

LOOKING = ("hooks", "trace", "similarity", "intervene", "patch", "probe", "attention-stats", "maps")
"""Commands that analyse networks: they train nothing, and write their files at the end."""

GROUPS = {
    "Ask": ("diagnose", "reproduce"),
    "Look inside": LOOKING,
    "Teachers and data": ("teachers", "pretrain", "data"),
    "Runs": ("runs", "figures"),
    "Machine": ("doctor", "cost"),
}
"""Headings of ``atdiag --help``; the experiments stand in the first group, after its first command."""

RESERVED = tuple(name for names in GROUPS.values() for name in names)
"""Names of commands that are not experiments."""


def stopped(command: str, planned: bool = False) -> str:
    """Describe what an interrupted command leaves, by its name. planned: it was to plan alone."""
    if planned:
        return "stopped: a dry run writes nothing"
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
    if name.startswith("slurm."):
        return f"--{name}"
    return f"--set {name}" if "." in name else f"--{name.strip('_').replace('_', '-')}"


_GUESSES = {
    "--teacher FILE": ("--model", "--checkpoint", "--ckpt", "--weights", "--pretrained", "--resume", "--file"),
    "--data FOLDER": ("--dataset", "--data-path", "--data-folder", "--folder", "--train-dir", "--root", "--images"),
    "--split 0.2": ("--val-split", "--test-split", "--test-size", "--val-size", "--holdout"),
    "--budget 20m": ("--time", "--hours", "--minutes", "--max-time"),
    "--set data.image_size=N": ("--img-size", "--input-size", "--size", "--resolution", "--imgsz"),
    "--set recipe.batch_size=N": ("--batch", "--bs"),
    "--set recipe.epochs=N": ("--num-epochs", "--epoch"),
    "--set recipe.lr=N": ("--learning-rate",),
    "--seeds N": ("--seed", "--runs-per-arm"),
    "--out FOLDER": ("--output", "--output-dir", "--save-dir", "--log-dir"),
}
"""What to type -> what other programs call it."""


def instead(option: str, known: Collection[str]) -> str:
    """Return what to type for an option that does not exist, among the ``known`` ones; empty if nothing is alike.

    >>> instead("--epochs", ["--set"]), instead("--ckpt", ["--teacher"]), instead("--ckpt", [])
    ('--set recipe.epochs=N', '--teacher FILE', '')
    """
    from atdiag.core.spec import Data, Recipe

    asked = option.lower().replace("_", "-")
    field = asked.lstrip("-").removeprefix("no-").replace("-", "_")
    sections = {"recipe": Recipe.model_fields, "data": Data.model_fields}
    found = [f"--set {section}.{field}=N" for section, fields in sections.items() if field in fields]
    found += [line for line, names in _GUESSES.items() if asked in names]
    return next((line for line in found if line.split()[0] in known), "")


TYPED: ContextVar[tuple[str, ...]] = ContextVar("typed", default=())
"""The command line as typed, without the program's name."""


def retyped(changes: Mapping[str, str | None], settings: Mapping[str, object]) -> str:
    """Return the command line as typed, with other options: ``--seeds`` -> its value, or None to leave it out.

    settings: the same for settings by dotted name. Quoted for a shell.
    """
    words, kept = list(TYPED.get()), list[str]()
    while words:
        word = words.pop(0)
        name, sign, value = word.partition("=")
        if name in changes:
            if not sign and words:
                words.pop(0)
            continue
        if name == "--set":
            given = value if sign else words.pop(0) if words else ""
            if given.partition("=")[0].strip() not in settings:
                kept += ["--set", given]
            continue
        kept.append(word)
    kept += [word for name, value in changes.items() if value is not None for word in (name, value)]
    kept += [word for name, value in settings.items() if value is not None for word in ("--set", f"{name}={value}")]
    return shlex.join(["atdiag", *kept])


def say(text: str) -> None:
    """Print one line on standard error."""
    typer.echo(f"atdiag: {' '.join(text.splitlines())}", err=True)
