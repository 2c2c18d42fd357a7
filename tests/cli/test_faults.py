"""Errors and signals while a command runs."""

import contextlib
import io
import signal
import subprocess
import sys

import pytest

from atdiag.cli import app
from atdiag.core import errors
from atdiag.execution import run
from tests.commands import SETS


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        (errors.FaultError("run 0 stopped"), 1, "run 0 stopped"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (RuntimeError("surprise"), 1, "RuntimeError: surprise (this is a bug in atdiag; ATDIAG_DEBUG=1 shows where)"),
        (errors.StoppedError("asked"), 143, "stopped: checkpoints are written"),
        (SystemExit(143), 143, "stopped: checkpoints are written"),
        (KeyboardInterrupt(), 130, "stopped: checkpoints are written"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_faults_end_in_one_line(fault, code, says, folder, capsys, monkeypatch):
    def fail(*_):
        raise fault

    monkeypatch.setattr(run, "execute", fail)
    with pytest.raises(SystemExit) as end:
        app.main(["reinit", *SETS])
    said = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert end.value.code == code
    assert len(said) == 1
    assert said[0].startswith(f"atdiag: {says}") or says in said[0]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("similarity", "deit_s", "dinov2_s"), "nothing was written, the same command starts again"),
        (("trace", "deit_s", "-o", "x.safetensors"), "nothing was written, the same command starts again"),
        (("runs", "list"), "stopped: the same command starts again"),
        (("reinit",), "checkpoints are written"),
    ],
)
@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (SystemExit, 143)])
def test_the_message_of_a_stopped_command_is_true(command, says, stop, code, folder, capsys, monkeypatch):
    def stops(*_, **__):
        raise stop(143)

    monkeypatch.setattr("atdiag.study.settings.resolve", stops)
    with pytest.raises(SystemExit) as end:
        app.main([*command])
    assert end.value.code == code
    assert says in capsys.readouterr().err


def test_debug_mode_shows_the_traceback_of_a_bug(folder, monkeypatch):
    def fail(*_):
        raise RuntimeError("surprise")

    monkeypatch.setattr(run, "execute", fail)
    monkeypatch.setenv("ATDIAG_DEBUG", "1")
    with pytest.raises(RuntimeError, match="surprise"), contextlib.redirect_stdout(io.StringIO()):
        app.main(["reinit", *SETS])


def test_ctrl_c_during_start_up(folder):
    child = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "atdiag", "doctor"], stderr=subprocess.PIPE, text=True
    )
    with child:
        assert any("typer" in line for line in child.stderr)  # during the imports of cli
        child.send_signal(signal.SIGINT)
        assert "Traceback" not in child.stderr.read()
    assert child.returncode == 130
