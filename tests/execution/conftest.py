"""What several executors' tests need."""

import pytest

from atdiag.execution import devices


@pytest.fixture
def one_worker(monkeypatch):
    """One process for each ``execute``: most of its time goes into imports."""
    monkeypatch.setattr(devices, "available_cores", lambda: 1)
