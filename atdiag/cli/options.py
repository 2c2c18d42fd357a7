"""Options that commands share, and how they are added to a command's own.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from atdiag.cli import completing
from atdiag.cli.completing import completed
from atdiag.execution.slurm_options import SlurmOptions

Runs = Annotated[
    Path | None, typer.Option("--runs", help="Where run directories live. [default: $ATDIAG_RUNS, else ./runs]")
]
Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON on the last line.")]
Profile = Annotated[
    str | None,
    typer.Option(
        autocompletion=completing.BY_NAME["profile"],
        help="The scale: mini, small, paper or own. [default: own with --data FOLDER, else mini]",
    ),
]
Set = Annotated[
    list[str],
    typer.Option("--set", metavar="NAME=VALUE", help="Override a setting, such as recipe.epochs=40. Repeatable."),
]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="The folder that holds all real data sets. [default: $ATDIAG_DATA]")
]

Classes = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Text file with the class names of a teacher's head, one line for each row. "
        "[default: a list inside the weights or beside them, ImageNet-1k's for 1,000 rows]",
    ),
]

_Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="FOLDER",
        help="Your images: train/CLASS/IMAGE and val/CLASS/IMAGE, or CLASS/IMAGE alone, or images with labels.csv "
        "(columns file, label). Also a name that 'atdiag data' lists.",
    ),
]
Split = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Hold out test images where the folder has none: a share, as 0.2, or a number."),
]
_Budget = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Train for as many epochs as fit this time, as 20m or 3h, all runs together."),
]
_Gpu = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The GPU that a dry run or --budget is meant for: h100, a100, rtx4090 and others. [default: here]",
    ),
]
_Student = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="The size of all students: a name (deit_s), timm:MODEL, or width=384,depth=12,heads=6. "
        "[default: their teacher's]",
    ),
]
_Recipe = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Published recipes in place of the profile's: li2024-copy, li2024-distill, li2024-finetune, mae-scratch, "
        "deit, or several with commas (docs/recipes.md); --set overrides their fields.",
    ),
]
_Seeds = Annotated[int | None, typer.Option(help="How many seeds. [default: the profile's; mini: 3]")]
_FirstSeed = Annotated[
    int | None,
    typer.Option(metavar="N", help="The first seed: N to N + S - 1 of S seeds, for an independent study. [default: 0]"),
]
_DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would run, what is finished, and what it costs; run nothing.")
]
_Out = Annotated[
    Path | None,
    typer.Option(help="Folder for table and figure. [default: ./results/<ablation>-<teacher>-<profile>]"),
]
_Equivalence = Annotated[
    float | None,
    typer.Option(help="Margin in points: contrasts shown to lie within it make no difference (two one-sided tests)."),
]
_Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu. [default: the profile's; mini: cpu]")]
_MicroBatch = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Images per forward pass, to save memory: the result stays the same up to rounding. "
        "[default: recipe.batch_size]",
    ),
]
_Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="Make results on a GPU bitwise reproducible, at some cost in speed. On a CPU they always are.",
    ),
]

_Ranks = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Train each run in N processes, every one on a device of its own with its share of each batch: the result "
        "stays the same up to rounding. Also by torchrun --nproc-per-node N -m atdiag.",
        show_default=False,
    ),
]
_Devices = Annotated[
    str | None,
    typer.Option(metavar="N", help="GPUs to use: how many, as 8, or which, as 0,2 (2, is one alone). [default: all]"),
]
_PerDevice = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Training processes on each device, for small networks.")
]
_Track = Annotated[
    str | None,
    typer.Option(metavar="WHERE", help="Show training there, too: wandb (docs/following.md). [default: nowhere]"),
]
_Executor = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="local, or slurm: submit a job array (docs/clusters.md; --slurm.partition and the like). [default: local]",
    ),
]
_Wait = Annotated[bool, typer.Option("--wait", help="With --executor slurm: follow the jobs, then show the table.")]

Common = Mapping[str, tuple[Any, Any]]
"""Options by parameter name: annotation and default."""


def under(heading: str, options: Common) -> Common:
    """Return options that stand under a heading of their own in a command's help."""
    out = {}
    for name, (annotation, default) in options.items():
        kind, option = get_args(annotation)
        option = copy(option)
        option.rich_help_panel = heading
        out[name] = (Annotated[kind, option], default)
    return out


SCALE_PANEL = "Common options (data and scale)"
OUTPUT_PANEL = "Common options (output)"
MACHINE_PANEL = "Common options (machine)"
"""Headings of the options that experiments share."""

EXECUTION: Common = under(
    MACHINE_PANEL,
    {
        "device": (_Device, None),
        "devices": (_Devices, None),
        "per_device": (_PerDevice, None),
        "micro_batch": (_MicroBatch, None),
        "deterministic": (_Deterministic, False),
        "ranks": (_Ranks, 1),
        "data_dir": (DataDir, None),
        "track": (_Track, None),
    },
)
"""Execution options: fields of :class:`~atdiag.core.options.ExecutionOptions` by name."""

SLURM: Common = {
    f"slurm_{one.name}": (
        Annotated[
            str | None,
            typer.Option(f"--slurm.{one.name}", hidden=True, help=f"{one.metadata['about'].capitalize()}."),
        ],
        None,
    )
    for one in fields(SlurmOptions)
}
"""``--slurm.KEY``: hidden, since there are many; ``docs/clusters.md`` lists them."""

FLEET: Common = under(MACHINE_PANEL, {"executor": (_Executor, None), **SLURM})

WAIT: Common = under(MACHINE_PANEL, {"wait": (_Wait, False)})

SINGLE: Common = under(SCALE_PANEL, {"student": (_Student, None), "budget": (_Budget, None), "gpu": (_Gpu, None)})
"""Options of single experiments alone."""

EXPERIMENT: Common = {
    **under(
        SCALE_PANEL,
        {
            "data": (_Data, None),
            "split": (Split, None),
            "profile": (Profile, None),
            "set_": (Set, []),
            "recipe": (_Recipe, None),
            "seeds": (_Seeds, None),
            "first_seed": (_FirstSeed, None),
            "equivalence": (_Equivalence, None),
            "classes": (Classes, None),
        },
    ),
    **under(
        OUTPUT_PANEL,
        {
            "dry_run": (_DryRun, False),
            "json_": (Json, False),
            "out": (_Out, None),
            "runs": (Runs, None),
        },
    ),
    **EXECUTION,
    **FLEET,
}
"""Options common to all experiments; ``SINGLE`` only to single ones."""


def joined(function: Callable[..., Any], common: Common, call: Callable[..., None]) -> Callable[..., None]:
    """Return a command with a function's own options (all parameters but the first), then the ``common`` ones.

    call: does the work; it receives the function with its own options filled in, so that only the first parameter is
    missing, and each common option by name.
    """
    signature = inspect.signature(function, eval_str=True)
    own = [
        p.replace(kind=p.KEYWORD_ONLY, annotation=completed(p.name, p.annotation, p.default))
        for p in list(signature.parameters.values())[1:]
    ]
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=completed(name, annotation))
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
