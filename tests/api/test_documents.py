"""The notebook and the code of docs/python.md, each run from top to bottom; they share their runs."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = (
    'seeds=1, settings={"data.train": 64, "recipe.epochs": 1, "recipe.warmup_epochs": 0.5, "data.test_per_source": 1}'
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("documents") / "runs"


@pytest.fixture
def here(runs, tmp_path, monkeypatch):
    """Change to an empty folder, with the runs of this module."""
    for name in ("ATDIAG_PROFILE", "ATDIAG_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ATDIAG_RUNS", str(runs))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def execute(cells: list[str]) -> dict:
    """Execute cells in one namespace, and show what each ends with as a notebook does; return the namespace."""
    names: dict = {"__name__": "__main__"}
    for cell in cells:
        *body, last = (tree := ast.parse(cell)).body
        ends = isinstance(last, ast.Expr)
        exec(compile(ast.Module(body if ends else tree.body, []), "cell", "exec"), names)
        if ends:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
            for show in ("_repr_html_", "__repr__"):
                if callable(getattr(value, show, None)):
                    getattr(value, show)()
    return names


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(here):
    notebook = json.loads((ROOT / "examples" / "atdiag.ipynb").read_text())
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    names = execute(code)
    assert len(names["answer"].runs) == 4 and len(names["alike"].figures) == 3
    assert names["pair"].loss > 0 and names["model"].num_classes == 10
    assert (here / "student" / "config.json").exists()


@pytest.mark.slow
def test_the_code_of_the_page_runs(here):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    assert "seeds=3" in blocks[0]
    names = execute([blocks[0].replace("seeds=3", TINY), *blocks[1:]])
    assert names["maps"].shape == (2, 3, 26, 26) and len(names["changed"])
    assert (here / "reinit.pdf").exists() and names["model"].num_classes == 10


def test_the_page_is_short():
    assert len((ROOT / "docs" / "python.md").read_text().split()) <= 700
