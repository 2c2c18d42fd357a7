"""Fixtures for tests of executors."""

import pytest

from atdiag.execution import devices


@pytest.fixture
def one_worker(monkeypatch):
    """Use one process for each ``execute``: most of its time goes into imports."""
    monkeypatch.setattr(devices, "available_cores", lambda: 1)
