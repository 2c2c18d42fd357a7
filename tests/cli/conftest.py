"""Fixtures for tests of the command line."""

import signal

import pytest

from atdiag.reports import writers


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Ignore this machine's settings, and restore the signal handler."""
    for name in ("ATDIAG_PROFILE", "ATDIAG_RUNS", "ATDIAG_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ATDIAG_DATA", "")
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Change to an empty working directory."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


@pytest.fixture
def at_tmp_path(tmp_path, monkeypatch):
    """Change to the test's own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pictures(monkeypatch):
    """Write figures as PNG alone: each again as PDF takes most of a command's time.

    With PDFs in test_inspect, test_probes, test_experiments, test_reproduce and test_diagnose, which look at them.
    """
    monkeypatch.setattr(writers, "FIGURE_KINDS", ("png",))
