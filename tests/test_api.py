"""The public API: every name is found, and nothing heavy is imported until it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import atdiag


@pytest.mark.parametrize("name", atdiag.__all__)
def test_every_public_name_exists(name):
    assert getattr(atdiag, name) is not None
    assert name in dir(atdiag)


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(atdiag.__file__).read_text())
    seen = {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("atdiag.")
        for alias in node.names
    }
    assert seen == {(module, name) for module, names in atdiag._HOMES.items() for name in names}


def test_unknown_names_raise_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'diagnoze'"):
        _ = atdiag.diagnoze


def test_import_loads_nothing_heavy():
    code = "import sys, atdiag; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "torch", "timm", "pandas", "typer", "pydantic", "rich"} & set(loaded)
