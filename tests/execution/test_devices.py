"""Devices and how many processes each has room for."""

from atdiag.execution import devices


def test_processes(monkeypatch):
    monkeypatch.setattr(devices, "available_cores", lambda: 8)
    assert devices.processes_for("cpu", 1) == 8
    assert devices.processes_for("cpu", 3) == 2
    assert devices.processes_for("cpu", 16) == 1
    assert devices.processes_for("cpu", None) == 1
    assert devices.processes_for("cuda", 1) == 1
