"""What every test of the command line starts from."""

import signal

import pytest


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Nothing of the machine's settings, and the signal handler as it was."""
    for name in ("ATDIAG_PROFILE", "ATDIAG_RUNS", "ATDIAG_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ATDIAG_DATA", "")
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


@pytest.fixture
def at_tmp_path(tmp_path, monkeypatch):
    """The test's own folder as the working directory."""
    monkeypatch.chdir(tmp_path)
