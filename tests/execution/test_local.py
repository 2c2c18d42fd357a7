"""Misbehaving workers (a shell script in place of Python)."""

import sys

import pytest

from atdiag.core.errors import FaultError, StoppedError
from atdiag.core.runs import Store
from atdiag.execution import devices
from atdiag.execution.run import execute
from tests.execution.specs import ONE, run


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """Replace workers by a shell script in ``tmp_path``."""

    def put(script: str) -> None:
        path = tmp_path / "worker"
        path.write_text(f"#!/bin/sh\ncd {tmp_path}\nread order\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return put


def fault(tmp_path, specs=None) -> str:
    with pytest.raises(FaultError) as found:
        execute(specs or [run()], Store(tmp_path / "runs"), ONE)
    assert len(str(found.value).splitlines()) == 1
    return str(found.value)


def test_the_last_output_of_a_crashed_worker_is_reported(worker, tmp_path):
    worker("for i in $(seq 2000); do echo line $i; done >&2\necho 'OSError: disk full' >&2\nexit 1")
    text = fault(tmp_path)
    assert "a training process failed: OSError: disk full (its last output is in " in text
    log = (tmp_path / "runs" / "last-fault.log").read_text()
    assert "line 2000\nOSError: disk full" in log
    assert len(log.splitlines()) < 50


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("kill -9 $$", "it was ended by SIGKILL (out of memory?)"),
        ("kill -ABRT $$", "it was ended by SIGABRT"),
        ("exit 3", "exit code 3"),
        (
            "echo 'ValidationError: 1 error\n  a field\n    see there\n' >&2; exit 1",
            "failed: ValidationError: 1 error (its",
        ),
        ("exit 0", "a training process ended before its runs did; start again to go on"),
        ("echo not json", "a training process ended before its runs did"),
    ],
)
def test_a_worker_that_ends_without_a_result_is_an_error(worker, tmp_path, script, says):
    worker(script)
    assert says in fault(tmp_path)


def test_a_stopped_worker_stops_all(worker, tmp_path):
    worker("exit 143")
    with pytest.raises(StoppedError):
        execute([run()], Store(tmp_path / "runs"), ONE)


def test_when_one_fails_the_others_are_asked_to_end(worker, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "available_cores", lambda: 2)
    worker(
        "if mkdir first 2>/dev/null; then trap 'echo > ended; exit 143' TERM; echo > ready\n"
        "  while true; do sleep 0.05; done\nfi\n"
        "while [ ! -e ready ]; do sleep 0.05; done\necho 'no luck' >&2; exit 1"
    )
    assert "no luck" in fault(tmp_path, [run(), run(seed=1)])
    assert (tmp_path / "ended").exists()
