"""``atdiag doctor``: check this machine.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from atdiag.cli.options import Json, Runs

_Bench = Annotated[
    bool, typer.Option("--bench", help="Also measure for 20 s how fast this machine trains, and keep that for plans.")
]


def doctor(runs: Runs = None, bench: _Bench = False, json_: Json = False) -> None:
    """Check this machine: versions, devices, disk, data.

    Also that fused and explicit attention agree on it.
    """
    from rich.console import Console
    from rich.text import Text

    from atdiag.study import settings as profiles
    from atdiag.training import checkup

    findings = checkup.examine(profiles.resolve(None, None, (), runs).runs)
    if bench:
        findings += [checkup.Finding(f"speed of {device}", said) for device, said in _speeds().items()]
    for finding in findings:
        mark = ("ok  ", "green") if finding.ok else ("BAD ", "red")
        Console().print(Text.assemble(mark, f" {finding.what}: {finding.found}"))
    if json_:
        typer.echo(json.dumps([{"what": f.what, "found": f.found, "ok": f.ok} for f in findings]))
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def _speeds() -> dict[str, str]:
    """Measure the devices of this machine, keep their speeds, and say what they are."""
    from ablations.reinit import reinit
    from atdiag.core.options import ExecutionOptions
    from atdiag.execution import bench, devices, gpus, rate
    from atdiag.study import settings as profiles
    from atdiag.study.builder import Lab

    out = {}
    if devices.is_here("cuda"):
        speed = bench.measure("cuda")
        bench.keep("cuda", speed)
        kind = gpus.here()
        table = f" ({kind} in the table: {gpus.GPUS[kind].flops_per_second / 1e12:.0f})" if kind else ""
        out["cuda"] = f"{speed / 1e12:.0f} TFLOP/s with a ViT-B in bfloat16{table}, images not counted"
    settings = profiles.resolve("mini", 1, environment={}, folder=Path("/nonexistent"))
    speed = rate.measure(reinit(Lab(settings)).specs, ExecutionOptions(device="cpu", threads=1))
    bench.keep("cpu", speed)
    return out | {"cpu": f"{speed / 1e9:.0f} GFLOP/s with a miniature on one thread"}
