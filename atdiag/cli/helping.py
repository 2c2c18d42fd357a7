"""The layout of ``--help``: commands and options in groups, nothing cut, in colour on a terminal.

Groups are Typer's own ``rich_help_panel``; rich's boxes need more columns than a terminal of 60 has.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

_HEADING = re.compile(r"[A-Z].*:")
_NAME = re.compile(r"  (-*[\w.]+.*?)(?=  |$)")
"""The first column of a list: an option with its value, or a command."""


def coloured(text: str) -> str:
    """Return a help text with bold headings and coloured names, unless NO_COLOR is set; a pipe gets it plain anyway."""
    if os.environ.get("NO_COLOR"):
        return text
    lines, listed = text.split("\n"), False
    for i, line in enumerate(lines):
        if _HEADING.fullmatch(line):
            lines[i], listed = typer.style(line, bold=True), True
        elif listed and (found := _NAME.match(line)):
            lines[i] = f"  {typer.style(found[1], fg='cyan')}{line[found.end() :]}"
    return "\n".join(lines)


def summary(command: Any) -> str:
    """Return the first line of a command's help, in full."""
    text: str = command.short_help or command.help or ""
    return text.strip().partition("\n")[0].removesuffix(".")


class _Grouped:
    """Options by ``rich_help_panel``: a command's own first, those of a panel under its heading."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and options, under their headings."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in ctx.command.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is None:
                continue
            usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
            sections.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(record)
        width = max(len(name) for rows in sections.values() for name, _ in rows)
        for heading, rows in sections.items():
            if rows:
                with formatter.section(heading):
                    formatter.write_dl([(f"{name:{min(width, 22)}}", text) for name, text in rows], col_max=22)

    def get_help(self, ctx: Any) -> str:
        """Return the help text."""
        text: str = super().get_help(ctx)  # type: ignore[misc]
        return coloured(text)


class _Command(_Grouped, TyperCommand):
    pass


class CommandGroup(_Grouped, TyperGroup):
    """A group of commands, each with its summary in full."""

    def panel(self, name: str) -> str:
        """Return the heading of a command."""
        return "Commands"

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, then the commands."""
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write every command with its summary, under its heading."""
        sections: dict[str, list[tuple[str, str]]] = {}
        names = self.list_commands(ctx)
        width = max(map(len, names))
        for name in names:
            command: Any = self.get_command(ctx, name)
            if not command.hidden:
                sections.setdefault(self.panel(name), []).append((f"{name:{width}}", summary(command)))
        for heading, rows in sections.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


class App(typer.Typer):
    """A Typer whose commands have this layout."""

    def __init__(self, group: type[CommandGroup] = CommandGroup, **settings: Any) -> None:
        super().__init__(cls=group, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """Add a command, as Typer's own method does."""
        return super().command(name, cls=_Command, **settings)
