"""``atdiag doctor``: check this machine.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import json

import typer

from atdiag.cli.options import Json, Runs


def doctor(runs: Runs = None, json_: Json = False) -> None:
    """Check this machine: versions, device, disk, data, and that fused and explicit attention agree."""
    from rich.console import Console

    from atdiag.study import settings as profiles
    from atdiag.training import checkup

    findings = checkup.examine(profiles.resolve(None, None, (), runs).runs)
    for finding in findings:
        mark = "[green]ok[/green]  " if finding.ok else "[red]BAD[/red] "
        Console().print(f"{mark} {finding.what}: {finding.found}", highlight=False)
    if json_:
        typer.echo(json.dumps([{"what": f.what, "found": f.found, "ok": f.ok} for f in findings]))
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)
