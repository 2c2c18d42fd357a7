"""The help of every command, without heavy imports."""

import re
import subprocess
import sys

import pytest

from atdiag.cli import app, helping
from tests.commands import ran


@pytest.mark.parametrize("arguments", ["--help", "reinit --help", "runs --help", "data --help"])
def test_help_imports_nothing_heavy(arguments):
    code = f"import sys; from atdiag.cli import app\ntry: app.main({arguments.split()})\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    heavy = {"torch", "torchvision", "timm", "nnsight", "seaborn", "matplotlib", "scipy", "pandas", "sklearn", "numpy"}
    assert not loaded & heavy


EXPERIMENTS = ["benchmark", "sizes", "epochs", "datasets", "ood", "reinit", "layers", "match", "agreement", "rescue"]
EXPERIMENTS += ["losses", "recipes", "tensors", "heads", "averages", "ensemble", "grid", "shift", "robustness"]
EXPERIMENTS += ["crosssize", "pace", "gain", "source", "blockwise"]
GROUPED = {
    "Ask": ["diagnose", *EXPERIMENTS, "reproduce"],
    "Look inside": ["hooks", "trace", "similarity", "intervene", "patch", "probe", "attention-stats", "maps"],
    "Teachers and data": ["teachers", "pretrain", "data"],
    "Runs": ["runs", "figures"],
    "Machine": ["doctor", "cost"],
}
RUNS = ("list", "show", "remove", "verify", "diff", "export")


def test_every_command_has_help(folder):
    code, out = ran("--help")
    assert code == 0
    listed = {
        heading: re.findall(r"^  ([\w-]+)  ", rows, re.MULTILINE)
        for heading, rows in re.findall(r"^(\w.*):\n((?:  .*\n?)+)", out.partition("Options:")[2], re.MULTILINE)
    }
    assert listed == GROUPED
    commands = [name for names in GROUPED.values() for name in names]
    for command in [*commands, "teachers pull", *(f"runs {one}" for one in RUNS), "data check"]:
        code, out = ran(*command.split(), "--help")
        assert code == 0
        assert "Usage: " in out
    for command in ("reinit", "layers", "rescue"):
        out = ran(command, "--help")[1]
        options = ("teacher", "transfer", "profile", "set", "seeds", "dry-run", "json", "out", "runs", "device")
        assert all(f"--{option}" in out for option in options)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("group", [[], ["runs"]])
def test_no_arguments_show_the_help(group, capsys, folder):
    with pytest.raises(SystemExit) as end:
        app.main(group)
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert err.startswith("Usage: ")
    assert len(err.splitlines()) > 5


@pytest.mark.parametrize("columns", [60, 80])
def test_help_is_cut_nowhere(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in ("", "layers", "runs", "patch"):
        out = ran(*command.split(), "--help")[1]
        assert max(map(len, out.splitlines())) <= columns, command
        assert not re.search(r"\.\.\.$", out.partition("Options:")[2], re.MULTILINE), command


def test_every_command_has_one_full_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    rows = ran("--help")[1].partition("Ask:")[2].splitlines()
    rows += ran("runs", "--help")[1].partition("Commands:")[2].splitlines()
    for row in filter(None, rows):
        assert re.match(r"  [a-z]|[A-Z].*:$", row), f"{row!r} goes on from the line before: shorten that docstring"


def test_options_common_to_experiments_have_headings_of_their_own():
    parts = re.split(r"^(\w.*):$", ran("layers", "--help")[1], flags=re.MULTILINE)
    rows = zip(parts[1::2], parts[2::2], strict=True)
    options = {name: re.findall(r"^  --([\w-]+)", text, re.MULTILINE) for name, text in rows}
    assert options["Options"] == ["from", "k", "teacher", "transfer", "sweep", "help"]
    assert list(options)[1:] == [f"Common options ({what})" for what in ("data and scale", "output", "machine")]
    assert {"data", "seeds", "set"} <= set(options["Common options (data and scale)"])
    assert {"json", "out", "dry-run"} <= set(options["Common options (output)"])
    assert {"device", "executor", "wait"} <= set(options["Common options (machine)"])


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    text = "Usage: atdiag [OPTIONS]\n\n  An  introduction.\n\nOptions:\n  --seeds <int>  How many.\n    More."
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = helping.coloured(text)
    assert re.sub(r"\x1b\[\d*m", "", shown) == text
    assert "\x1b[1mOptions:\x1b[0m" in shown and "\x1b[36m--seeds <int>\x1b[0m" in shown
    assert shown.count("\x1b[") == 4, "the introduction is plain"
    assert "\x1b" not in ran("layers", "--help")[1], "nor does a pipe get any"
    monkeypatch.setenv("NO_COLOR", "1")
    assert helping.coloured(text) == text
