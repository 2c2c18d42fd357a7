"""Diagnose and ablate attention transfer in Vision Transformers.

The public Python API. Each name is imported when first used, so ``import atdiag`` loads nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atdiag.api.analyses import intervene as intervene
    from atdiag.api.analyses import probe as probe
    from atdiag.api.analyses import similarity as similarity
    from atdiag.api.analyses import trace as trace
    from atdiag.api.attaching import Pair as Pair
    from atdiag.api.attaching import attach as attach
    from atdiag.api.diagnosing import diagnose as diagnose
    from atdiag.api.exported import load_student as load_student
    from atdiag.api.exporting import export_model as export_model
    from atdiag.api.looks import attention_stats as attention_stats
    from atdiag.api.looks import maps as maps
    from atdiag.api.points import hook_points as hook_points
    from atdiag.api.points import patch as patch
    from atdiag.api.results import Result as Result
    from atdiag.api.running import run as run
    from atdiag.core.errors import FaultError as FaultError
    from atdiag.core.errors import StoppedError as StoppedError
    from atdiag.core.errors import UserError as UserError
    from atdiag.core.options import ExecutionOptions as ExecutionOptions
    from atdiag.core.runs import Run as Run
    from atdiag.core.runs import Store as Store
    from atdiag.core.spec import Data as Data
    from atdiag.core.spec import Init as Init
    from atdiag.core.spec import Network as Network
    from atdiag.core.spec import Recipe as Recipe
    from atdiag.core.spec import RunSpec as RunSpec
    from atdiag.core.spec import Seed as Seed
    from atdiag.core.spec import Teacher as Teacher
    from atdiag.core.spec import Transfer as Transfer
    from atdiag.core.spec.losses import MapLoss as MapLoss
    from atdiag.core.spec.losses import register_map_loss as register_map_loss
    from atdiag.execution.executor import Executor as Executor
    from atdiag.execution.inprocess import InProcessExecutor as InProcessExecutor
    from atdiag.execution.local import LocalExecutor as LocalExecutor
    from atdiag.execution.run import execute as execute
    from atdiag.hooks import patching as patching  # type: ignore[attr-defined,unused-ignore] # a cycle
    from atdiag.hooks.model import hooked as hooked
    from atdiag.networks.model.components import Component as Component
    from atdiag.networks.model.components import register_component as register_component
    from atdiag.networks.registry.teachers import register_teacher as register_teacher
    from atdiag.stats.contrasts import Estimate as Estimate
    from atdiag.study.aggregate import read as read
    from atdiag.study.builder import Lab as Lab
    from atdiag.study.protocol import Arm as Arm
    from atdiag.study.protocol import Contrast as Contrast
    from atdiag.study.protocol import Reading as Reading
    from atdiag.study.protocol import Report as Report
    from atdiag.study.protocol import Series as Series
    from atdiag.study.protocol import Study as Study
    from atdiag.study.registry import ablation as ablation
    from atdiag.study.settings import Settings as Settings
    from atdiag.study.settings import resolve as resolve
    from atdiag.study.verdicts import verb_phrase as verb_phrase

_HOMES: dict[str, tuple[str, ...]] = {
    "atdiag.api.analyses": ("intervene", "probe", "similarity", "trace"),
    "atdiag.api.attaching": ("Pair", "attach"),
    "atdiag.api.diagnosing": ("diagnose",),
    "atdiag.api.exported": ("load_student",),
    "atdiag.api.exporting": ("export_model",),
    "atdiag.api.looks": ("attention_stats", "maps"),
    "atdiag.api.points": ("hook_points", "patch"),
    "atdiag.api.results": ("Result",),
    "atdiag.api.running": ("run",),
    "atdiag.hooks": ("patching",),
    "atdiag.hooks.model": ("hooked",),
    "atdiag.core.errors": ("FaultError", "StoppedError", "UserError"),
    "atdiag.core.options": ("ExecutionOptions",),
    "atdiag.core.runs": ("Run", "Store"),
    "atdiag.core.spec": ("Data", "Init", "Network", "Recipe", "RunSpec", "Seed", "Teacher", "Transfer"),
    "atdiag.core.spec.losses": ("MapLoss", "register_map_loss"),
    "atdiag.execution.executor": ("Executor",),
    "atdiag.execution.inprocess": ("InProcessExecutor",),
    "atdiag.execution.local": ("LocalExecutor",),
    "atdiag.execution.run": ("execute",),
    "atdiag.networks.model.components": ("Component", "register_component"),
    "atdiag.networks.registry.teachers": ("register_teacher",),
    "atdiag.stats.contrasts": ("Estimate",),
    "atdiag.study.aggregate": ("read",),
    "atdiag.study.builder": ("Lab",),
    "atdiag.study.protocol": ("Arm", "Contrast", "Reading", "Report", "Series", "Study"),
    "atdiag.study.registry": ("ablation",),
    "atdiag.study.settings": ("Settings", "resolve"),
    "atdiag.study.verdicts": ("verb_phrase",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return version("atdiag")
        except PackageNotFoundError:
            return "unknown"
    if name not in _HOME:
        raise AttributeError(f"module 'atdiag' has no attribute {name!r}")
    home = import_module(_HOME[name])
    found = getattr(home, name) if hasattr(home, name) else import_module(f"{_HOME[name]}.{name}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
