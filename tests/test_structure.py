"""The package structure: a module imports only from its own layer or a lower one, and planning stays light."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS: list[str] = [
    "atdiag.core",
    "atdiag.stats",
    "atdiag.transfer",
    "atdiag.data",
    "atdiag.networks",
    "atdiag.training",
    "atdiag.analysis",
    "atdiag.hooks",
    "atdiag.execution",
    "atdiag.study",
    "atdiag.reports",
    "figures",
    "ablations",
    "atdiag.diagnosis",
    "atdiag.api",
    "atdiag.cli",
    "atdiag.__main__",
]
"""The packages, from the lowest: each may import those before it."""

LOWEST = [
    *("atdiag.core.errors", "atdiag.core.text", "atdiag.core.selection", "atdiag.core.progress", "atdiag.core.options"),
    *("atdiag.core.resources", "atdiag.core.paths", "atdiag.core.spec", "atdiag.core.randomness", "atdiag.core.runs"),
    "atdiag.core.asked",
]
"""The lowest layer has an order of its own: runs knows spec and nothing above, spec knows nothing else of atdiag."""

MOST_LINES, MOST_SHARE = 400, 0.18

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
    *(
        f"atdiag/api/{name}.py"
        for name in ("analyses", "cards", "experiments", "exporting", "given", "looks", "probed")
    ),
    *(f"atdiag/api/{name}.py" for name in ("results", "running", "sessions")),
    "atdiag/cli/*.py",
    "atdiag/core/**/*.py",
    "atdiag/execution/*.py",
    "atdiag/reports/*.py",
    *(f"atdiag/data/{name}.py" for name in ("catalogue", "datasets", "embedded", "files", "folder_sets", "listed")),
    *(f"atdiag/data/{name}.py" for name in ("image_folders", "sources", "testsets")),
    *(f"atdiag/networks/{name}/__init__.py" for name in ("registry", "weights", "timm")),
    *(f"atdiag/networks/registry/{name}.py" for name in ("listing", "preprocessing", "sizes", "stored", "teachers")),
    *(f"atdiag/networks/weights/{name}.py" for name in ("files", "loading", "pull", "sources")),
    "atdiag/networks/model/acting.py",
    "atdiag/networks/timm/architectures.py",
    *(f"atdiag/study/{name}.py" for name in ("aggregate", "builder", "claims", "judging", "matching", "pipeline")),
    *(
        f"atdiag/study/{name}.py"
        for name in ("other_size", "own", "profiles", "protocol", "registry", "sense", "settings", "student")
    ),
    *(f"atdiag/study/{name}.py" for name in ("transfer_settings", "verdicts")),
    *(f"atdiag/training/{name}.py" for name in ("audit", "predictions")),
    "ablations/*.py",
)

MODULES = sorted(path for package in ("atdiag", "ablations", "figures") for path in (ROOT / package).rglob("*.py"))


def name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(nodes: Iterator[ast.AST], package: str) -> Iterator[str]:
    """Yield the full names imported by statements among ``nodes``: module, or module.attribute."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements that run when a module is imported: not in functions, not under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from (inner for other in child.orelse for inner in at_import(other))
            continue
        yield child
        yield from at_import(child)


def layer(module: str) -> int | None:
    """Return the number of a module's layer; None for other packages."""
    for number, package in enumerate(LAYERS):
        if module == package or module.startswith(package + "."):
            return number
    return None


def rank(module: str) -> int:
    """Return a module's place in the order of the lowest layer."""
    return next(i for i, room in enumerate(LOWEST) if module == room or module.startswith(room + "."))


def faults(path: Path) -> list[str]:
    here = name(path)
    own = layer(here)
    assert own is not None, f"{here} belongs to no layer: add it to LAYERS"
    package = here if path.name == "__init__.py" else here.rpartition(".")[0]
    out = []
    for target in imported(ast.walk(ast.parse(path.read_text())), package):
        there = layer(target)
        assert there is not None or target.partition(".")[0] not in ("atdiag", "ablations", "figures"), target
        if there is not None and there > own:
            out.append(f"{here} imports {target} from a higher layer")
        if there == own == 0 and here != "atdiag.core" and target != "atdiag.core":
            target = target if target.count(".") > 1 else here
            if rank(target) > rank(here) or (here.startswith("atdiag.core.spec") and rank(target) != rank(here)):
                out.append(f"{here} imports {target}")
    return out


@pytest.mark.parametrize("path", [p for p in MODULES if name(p) != "atdiag"], ids=name)
def test_imports_go_down(path):
    assert not faults(path)


def test_the_top_level_holds_only_the_public_api():
    here = {path.name for path in (ROOT / "atdiag").iterdir() if path.is_file()}
    assert here == {"__init__.py", "__main__.py", "py.typed"}


def test_no_module_or_package_is_too_large():
    lines = {path: len(path.read_text().splitlines()) for path in MODULES}
    assert {name(path): count for path, count in lines.items() if count > MOST_LINES} == {}
    packages = Counter()
    for path, count in lines.items():
        packages[".".join(name(path).split(".")[: 2 if name(path).startswith("atdiag.") else 1])] += count
    assert {package: n for package, n in packages.items() if n > MOST_SHARE * sum(packages.values())} == {}


def test_no_two_public_classes_share_a_name():
    """A public class's name stands for one thing in the whole project."""
    named = Counter()
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                named[node.name] += 1
    assert [name for name, count in named.items() if count > 1] == []


@pytest.mark.parametrize("path", sorted({p for pattern in LIGHT for p in ROOT.glob(pattern)}), ids=name)
def test_planning_modules_import_nothing_heavy(path):
    names = {target.partition(".")[0] for target in imported(at_import(ast.parse(path.read_text())), name(path))}
    assert not names & HEAVY


def test_planning_modules_load_nothing_heavy_indirectly():
    light = [name(p) for pattern in LIGHT for p in ROOT.glob(pattern)]
    code = f"import sys, {', '.join(light)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not {module.partition(".")[0] for module in loaded.split()} & HEAVY


def test_the_import_checks_detect_violations(tmp_path):
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "def f():\n    from atdiag import cli\n"
        "class C:\n    import scipy.stats\n"
        "from ..study import protocol\n"
    )
    tree = ast.parse(source)
    everything = set(imported(ast.walk(tree), "atdiag.networks"))
    assert {"torch", "atdiag.cli", "scipy.stats", "atdiag.study.protocol"} <= everything
    assert set(imported(at_import(tree), "atdiag.networks")) == {
        "typing.TYPE_CHECKING",
        "scipy.stats",
        "atdiag.study.protocol",
    }
    assert layer("atdiag.study.protocol") > layer("atdiag.networks.model.vit") > layer("atdiag.core.spec.RunSpec")
    assert layer("atdiag.specials") is None


def test_imports_have_no_cycles():
    """Not even for type annotations: what two modules need from each other belongs in a third."""
    known = {name(path) for path in MODULES}
    graph = {}
    for path in MODULES:
        here = name(path)
        package = here if path.name == "__init__.py" else here.rpartition(".")[0]
        targets = imported(ast.walk(ast.parse(path.read_text())), package)
        found = {target if target in known else target.rpartition(".")[0] for target in targets}
        graph[here] = (found & known) - {here}
    TopologicalSorter(graph).prepare()  # raises CycleError


# --- messages ------------------------------------------------------------------------------------------------------

LIBRARY = [path for path in MODULES if not name(path).startswith("atdiag.cli")]
_TALKING = tuple(f"atdiag.execution.{one}" for one in ("slurm", "slurm_commands", "slurm_options", "gpus", "worker"))
"""Modules that pass options to other programs, or to the worker."""
_FLAG = re.compile(r"(?<![\w-])--[a-z]|(?<!\S)-o(?!\w)")
_COMMAND = re.compile(r"'atdiag [^']*'")
_NAMED = re.compile(r"`([^\W\d]\w*(?:\.[^\W\d]\w*)*)`")
_OTHER_PROGRAMS = ("--untracked-files=no", "--porcelain")
"""Options of git."""
_NAMED_AT = {"choose": 2, "comma_separated": 1, "indices": 2, "writable": 1}
"""Function -> the position of its argument that names an argument of its caller."""


def literals(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of every string except docstrings and option declarations; placeholders read {}."""
    left_out: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            left_out.add(id(node.value))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("Option", "Argument"):
            left_out |= {id(inner) for inner in ast.walk(node)}
        elif isinstance(node, ast.JoinedStr) and id(node) not in left_out:
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            left_out |= {id(part) for part in node.values if isinstance(part, ast.Constant)}
            yield node.lineno, "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
            yield node.lineno, node.value


def flags(tree: ast.Module) -> list[int]:
    """Return the lines of strings that contain a command-line flag outside a quoted whole command."""
    found = ((line, _COMMAND.sub("", text)) for line, text in literals(tree))
    return sorted(line for line, text in found if _FLAG.search(text) and text not in _OTHER_PROGRAMS)


def named_arguments(tree: ast.Module) -> set[str]:
    """Return the arguments named in messages: in backticks, or through a function that adds those."""
    found = {argument for _, text in literals(tree) for argument in _NAMED.findall(text)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            at = _NAMED_AT.get(node.func.id if isinstance(node.func, ast.Name) else node.func.attr, len(node.args))
            given = node.args[at] if at < len(node.args) else None
            found |= {given.value} if isinstance(given, ast.Constant) and isinstance(given.value, str) else set()
    return found


@pytest.mark.parametrize("path", [path for path in LIBRARY if name(path) not in _TALKING], ids=name)
def test_library_messages_contain_no_command_line_flags(path):
    assert flags(ast.parse(path.read_text())) == []


def test_arguments_named_in_messages_exist_on_the_command_line():
    """Every argument named in a message is a command-line option or a setting."""
    from atdiag.cli import app, messages
    from atdiag.study import settings

    typed, commands = set(), [app.whole(app.app)]
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        typed |= {flag for one in command.params if one.param_type_name == "option" for flag in one.opts}
    named = {argument for path in LIBRARY for argument in named_arguments(ast.parse(path.read_text()))}
    assert len(named) > 20
    setting = {one for one in named if "." in one and not one.startswith("slurm.")}
    wrong = [one for one in setting if one not in settings.SETTINGS]
    wrong += [one for one in named - setting if messages.as_typed(f"`{one}`") not in typed]
    assert wrong == []


def test_the_message_checks_detect_violations():
    tree = ast.parse(
        '"""Docstring with --out."""\n'
        "import typer\n"
        "def f(x: Annotated[str, typer.Option('--out', help='See --out.')] = 'a--b', y=-1):\n"
        "    'And --in.'\n"
        "    raise UserError(f'{x} is empty', f'give --{x}' + 'or --out')\n"
        "    raise UserError(f\"'atdiag data check {x} --download' fetches it\", f'`data.train`={x} or `k`')\n"
        "    raise UserError(f\"'atdiag doctor' says it; type -o {x}\")\n"
        "    choose(x, ('a', 'b'), '--out')\n"
        "    paths.writable(x, 'folder')\n"
    )
    assert flags(tree) == [5, 7, 8]
    assert named_arguments(tree) == {"data.train", "k", "--out", "folder"}
