"""The house of the design: a module imports only from its own floor or a lower one, and what plans is light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS: list[set[str]] = [
    {"atdiag.spec", "atdiag.words", "atdiag.limits", "atdiag.folders", "atdiag.randomness", "atdiag.runs"},
    {"atdiag.transfer", "atdiag.data"},
    {"atdiag.networks"},
    {"atdiag.training", "atdiag.analysis"},
    {"atdiag.study"},
    {"ablations", "figures"},
    {
        "atdiag.__main__",
        "atdiag.cli",
        "atdiag.options",
        "atdiag.desk",
        "atdiag.conduct",
        "atdiag.planning",
        "atdiag.experiments",
        "atdiag.inspection",
        "atdiag.probes",
        "atdiag.records",
        "atdiag.reproduction",
    },
]
GROUND = ["atdiag.words", "atdiag.limits", "atdiag.folders", "atdiag.spec", "atdiag.randomness", "atdiag.runs"]
"""The ground floor has an order of its own: runs knows spec and nothing above, spec knows nothing."""

HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "nnsight",
    "seaborn",
    "matplotlib",
    "scipy",
    "pandas",
    "sklearn",
    "tensorboard",
}
LIGHT = (
    "atdiag/__init__.py",
    "atdiag/__main__.py",
    "atdiag/cli.py",
    "atdiag/desk.py",
    "atdiag/conduct.py",
    "atdiag/experiments.py",
    "atdiag/planning.py",
    "atdiag/folders.py",
    "atdiag/inspection.py",
    "atdiag/options.py",
    "atdiag/probes.py",
    "atdiag/records.py",
    "atdiag/reproduction.py",
    "atdiag/spec.py",
    "atdiag/runs.py",
    "atdiag/words.py",
    "atdiag/data/facts.py",
    "atdiag/data/names.py",
    "atdiag/data/places.py",
    "atdiag/data/testsets.py",
    "atdiag/networks/__init__.py",
    "atdiag/networks/architectures.py",
    "atdiag/networks/files.py",
    "atdiag/networks/listing.py",
    "atdiag/networks/pull.py",
    "atdiag/networks/sources.py",
    "atdiag/networks/teachers.py",
    "atdiag/networks/weights.py",
    "atdiag/study/__init__.py",
    "atdiag/study/ablation.py",
    "atdiag/study/audit.py",
    "atdiag/study/bookkeeping.py",
    "atdiag/study/claims.py",
    "atdiag/study/judging.py",
    "atdiag/study/matching.py",
    "atdiag/study/outputs.py",
    "atdiag/study/reading.py",
    "atdiag/study/forms.py",
    "atdiag/study/profile.py",
    "atdiag/study/schedule.py",
    "atdiag/study/worker.py",
    "atdiag/training/predictions.py",
    "ablations/*.py",
)

MODULES = sorted(path for package in ("atdiag", "ablations", "figures") for path in (ROOT / package).rglob("*.py"))


def name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(nodes: Iterator[ast.AST], package: str) -> Iterator[str]:
    """The full names that import statements among ``nodes`` bring in: module, or module.attribute."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The statements that run when a module is imported: not in functions, not under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from (inner for other in child.orelse for inner in at_import(other))
            continue
        yield child
        yield from at_import(child)


def floor(module: str) -> int | None:
    """The number of a module's floor; None for what is not ours."""
    for number, rooms in enumerate(FLOORS):
        if any(module == room or module.startswith(room + ".") for room in rooms):
            return number
    return None


def faults(path: Path) -> list[str]:
    here = name(path)
    own = floor(here)
    assert own is not None, f"{here} is on no floor of the house: give it one"
    package = here if path.name == "__init__.py" else here.rpartition(".")[0]
    out = []
    for target in imported(ast.walk(ast.parse(path.read_text())), package):
        there = floor(target)
        assert there is not None or target.partition(".")[0] not in ("atdiag", "ablations", "figures"), target
        if there is None:
            continue
        if there > own:
            out.append(f"{here} imports {target} from a higher floor")
        if own == there == 0:
            rank = next(i for i, room in enumerate(GROUND) if target == room or target.startswith(room + "."))
            if rank > GROUND.index(here) or here == "atdiag.spec":
                out.append(f"{here} imports {target}")
    return out


@pytest.mark.parametrize("path", [p for p in MODULES if name(p) != "atdiag"], ids=name)
def test_imports_go_down(path):
    assert not faults(path)


@pytest.mark.parametrize("path", sorted({p for pattern in LIGHT for p in ROOT.glob(pattern)}), ids=name)
def test_what_plans_imports_nothing_heavy(path):
    names = {target.partition(".")[0] for target in imported(at_import(ast.parse(path.read_text())), name(path))}
    assert not names & HEAVY


def test_what_plans_loads_nothing_heavy_by_detours():
    light = [name(p) for pattern in LIGHT for p in ROOT.glob(pattern)]
    code = f"import sys, {', '.join(light)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not {module.partition(".")[0] for module in loaded.split()} & HEAVY


def test_these_tests_see_what_they_should(tmp_path):
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "def f():\n    from atdiag import cli\n"
        "class C:\n    import scipy.stats\n"
        "from ..study import schedule\n"
    )
    tree = ast.parse(source)
    everything = set(imported(ast.walk(tree), "atdiag.networks"))
    assert {"torch", "atdiag.cli", "scipy.stats", "atdiag.study.schedule"} <= everything
    assert set(imported(at_import(tree), "atdiag.networks")) == {
        "typing.TYPE_CHECKING",
        "scipy.stats",
        "atdiag.study.schedule",
    }
    assert floor("atdiag.study.schedule") > floor("atdiag.networks.vit") > floor("atdiag.spec.RunSpec")
    assert floor("atdiag.specials") is None


def test_no_circle_of_imports():
    """Not for types either: what two modules need of each other is a third."""
    known = {name(path) for path in MODULES}
    graph = {}
    for path in MODULES:
        here = name(path)
        package = here if path.name == "__init__.py" else here.rpartition(".")[0]
        targets = imported(ast.walk(ast.parse(path.read_text())), package)
        found = {target if target in known else target.rpartition(".")[0] for target in targets}
        graph[here] = (found & known) - {here}
    TopologicalSorter(graph).prepare()  # raises CycleError
