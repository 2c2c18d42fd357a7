"""Run the command line in tests."""

import contextlib
import io

import pytest

from atdiag.cli import app
from atdiag.execution import run
from atdiag.execution.inprocess import InProcessExecutor

TINY = ("data.train=64", "recipe.epochs=1", "recipe.warmup_epochs=0.5", "data.test_per_source=1")
SETS = [word for item in TINY for word in ("--set", item)]
LINES = {
    "reinit": ["reinit", "--module", "attn", "--teacher", "clip_b"],
    "layers": ["layers", "--from", "top", "--k", "6", "--teacher", "clip_b"],
    "rescue": ["rescue", "--teacher", "clip_b"],
}


def in_this_process(patch: pytest.MonkeyPatch) -> None:
    """Train in this process from now on: most of a worker's time goes into its imports."""
    patch.setattr(run, "LocalExecutor", InProcessExecutor)


def ran(*arguments) -> tuple[int, str]:
    """Run a command; return its exit code and standard output."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
        app.main([str(argument) for argument in arguments])
    return end.value.code or 0, out.getvalue()


def atdiag(*arguments) -> str:
    """Run a command that must succeed; return its standard output."""
    code, out = ran(*arguments)
    assert code == 0
    return out


def wrong(capsys, *arguments) -> str:
    """Run a wrong command; return its one-line message."""
    with pytest.raises(SystemExit) as end:
        app.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert end.value.code == 2, err
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("atdiag: ")
    return err.removeprefix("atdiag: ").rstrip("\n")
