"""The help of every command, without heavy imports."""

import re
import subprocess
import sys

import pytest

from atdiag.cli import app
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


RUNS = ("list", "show", "remove", "verify", "diff", "export")


def test_every_command_has_help(folder):
    commands = ["benchmark", "sizes", "epochs", "datasets", "ood", "reinit", "layers", "match", "rescue", "losses"]
    commands += [
        "recipes",
        "tensors",
        "heads",
        "averages",
        "ensemble",
        "grid",
        "shift",
        "robustness",
        "crosssize",
        "diagnose",
        "reproduce",
        "figures",
        "teachers",
        "pretrain",
        "doctor",
        "runs",
        "data",
    ]
    commands += ["hooks", "trace", "similarity", "intervene", "patch", "probe", "attention-stats", "maps"]
    code, out = ran("--help")
    assert code == 0
    assert re.findall(r"^  ([\w-]+)  ", out.partition("Commands:")[2], re.MULTILINE) == commands
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
