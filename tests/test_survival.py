"""Small samples of the benchmarks kills, fuzz and together: each exits with an error unless all cases pass."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]


def script(name: str, *arguments: str) -> str:
    """Run a script that must succeed; return what it prints."""
    done = subprocess.run(
        [sys.executable, PROJECT / "benchmarks" / f"{name}.py", *arguments],
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_kills_of_training():
    out = script("kills", "--kills", "1", "--commands", "0", "--lanes", "1")
    assert "training: 1 of 1 kills survived" in out


@pytest.mark.slow
def test_more_kills_of_training():
    out = script("kills", "--kills", "4", "--commands", "0", "--lanes", "1")
    assert "training: 4 of 4 kills survived" in out


@pytest.mark.slow
def test_kills_of_the_command_line():
    out = script("kills", "--kills", "0", "--commands", "3", "--lanes", "1")
    assert "command line: 3 of 3 kills survived" in out


@pytest.mark.slow
def test_malformed_inputs():
    out = script("fuzz", "--cases", "11", "--lanes", "1")
    assert out.splitlines()[-1].endswith("malformed inputs: a clear error or a correct result")


@pytest.mark.slow
def test_ten_processes_on_one_ablation():
    assert "each run trained exactly once, every process shows the same table" in script("together")
