"""What a shell completes after an option or in place of an argument. Imports no torch, and reads no weights.

``atdiag --install-completion`` tells the shell. An option gets its completion by its name (:func:`completed`), also
one of another package's ablation; an ``autocompletion`` of its own comes first.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from copy import copy
from typing import Annotated, Any, get_args, get_origin

import typer

Complete = Callable[..., list[str]]
"""A completion as Typer calls it: the parameter ``incomplete``, and ``context`` where it needs earlier options."""


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    """Return the names that complete the last part of a list with commas, each with the parts before it."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in names if name.startswith(last)]


def choices(*names: str) -> Complete:
    """Return the completion of an option with a fixed set of values."""

    def complete(incomplete: str) -> list[str]:
        return _beginning(incomplete, names)

    return complete


def teachers(incomplete: str) -> list[str]:
    """Complete names of teachers and specimens."""
    from atdiag.networks.registry.specimens import specimens
    from atdiag.networks.registry.teachers import registry

    return _beginning(incomplete, [*registry(), *specimens()])


def miniatures(incomplete: str) -> list[str]:
    """Complete names of what ``atdiag pretrain`` rebuilds."""
    from atdiag.networks.registry.specimens import specimens
    from atdiag.networks.registry.teachers import miniatures as shipped

    return _beginning(incomplete, [*shipped(), *specimens()])


def families(incomplete: str) -> list[str]:
    """Complete families of teachers."""
    from atdiag.networks.registry.teachers import registry

    return _beginning(incomplete, dict.fromkeys(row.family for row in registry().values()))


def components(incomplete: str) -> list[str]:
    """Complete native components: those of the published teachers, and of other packages."""
    from importlib.metadata import entry_points

    from atdiag.networks.registry.published import published

    ours = {name for row in published().values() for name in row.components or ()}
    return _beginning(incomplete, sorted(ours | {entry.name for entry in entry_points(group="atdiag.components")}))


def runs(context: typer.Context, incomplete: str) -> list[str]:
    """Complete ids of runs in the store that the line, the environment or the settings file names."""
    from atdiag.core.errors import UserError
    from atdiag.core.runs import Store
    from atdiag.study import settings

    try:
        store = Store(settings.runs_folder(context.params.get("runs")))
    except UserError:
        return []
    return [run.id for run in store.every() if run.id.startswith(incomplete)]


def subjects(context: typer.Context, incomplete: str) -> list[str]:
    """Complete what can be looked into: a teacher's name, or a run's id once its first digit stands there."""
    return [*teachers(incomplete), *(runs(context, incomplete) if incomplete else [])]


def settings(incomplete: str) -> list[str]:
    """Complete names of settings; those of a single method once it is named, as in ``recipe.copy.``."""
    from atdiag.study.settings import SETTINGS

    deep = incomplete.count(".") > 1
    return [f"{name}=" for name in SETTINGS if name.startswith(incomplete) and (name.count(".") > 1) == deep]


def analyses(incomplete: str) -> list[str]:
    """Complete names of experiments that ``atdiag figures`` draws."""
    from atdiag.study.registry import placed

    return _beginning(incomplete, ["all", *placed()])


def experiments(incomplete: str) -> list[str]:
    """Complete names of experiments."""
    from atdiag.study.registry import installed

    return _beginning(incomplete, [one.name for one in installed()])


def data_sets(incomplete: str) -> list[str]:
    """Complete names of data sets once one has begun: before, folders are the likelier answer."""
    from atdiag.data.catalogue import FACTS
    from atdiag.data.embedded import DIGITS, LARGER

    return _beginning(incomplete, [DIGITS.name, LARGER.name, *FACTS]) if incomplete else []


def gpus(incomplete: str) -> list[str]:
    """Complete names of GPUs that a plan can be for."""
    from atdiag.execution.gpus import GPUS

    return _beginning(incomplete, GPUS)


def losses(incomplete: str) -> list[str]:
    """Complete losses between maps."""
    from atdiag.core.spec.losses import MAP_LOSSES

    return _beginning(incomplete, MAP_LOSSES)


BY_NAME: dict[str, Complete] = {
    **dict.fromkeys(("teacher", "teachers"), teachers),
    **dict.fromkeys(("subject", "subjects", "other", "others"), subjects),
    **dict.fromkeys(("component", "components"), components),
    "family": families,
    "student": teachers,
    "data": data_sets,
    "set_": settings,
    "gpu": gpus,
    "profile": choices("mini", "small", "paper", "own"),
    "device": choices("cpu", "cuda", "mps"),
    "executor": choices("local", "slurm"),
    "transfer": choices("copy", "distill"),
    "methods": choices("copy", "distill", "finetune", "logits", "features"),
    "module": choices("attn", "mlp", "all"),
    "from_": choices("top", "bottom", "both"),
    "over": choices("examples", "queries", "heads", "layers"),
    "losses": losses,
    "tensors": choices("map", "q", "k", "v"),
    "track": choices("wandb"),
    "paper": choices("2024", "2026", "all"),
    "measure": choices("margin", "top1", "loss"),
    "by": choices("head", "position", "layer"),
}
"""The completion of options and arguments by the name of their parameter."""


def completed(name: str, annotation: Any, default: Any = None) -> Any:
    """Return a parameter's annotation with the completion of its name, unless it has one of its own or none exists.

    default: ``inspect.Parameter.empty`` for a parameter without one, which is an argument.
    """
    if name not in BY_NAME:
        return annotation
    if get_origin(annotation) is Annotated:
        kind, option = get_args(annotation)[:2]
    else:
        kind, option = annotation, typer.Argument() if default is inspect.Parameter.empty else typer.Option()
    if getattr(option, "autocompletion", None) is not None:
        return annotation
    option = copy(option)
    option.autocompletion = BY_NAME[name]
    return Annotated[kind, option]
