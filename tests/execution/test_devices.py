"""Devices, and how many processes fit on each."""

import pytest

from atdiag.core.errors import UserError
from atdiag.execution import devices


def test_processes(monkeypatch):
    monkeypatch.setattr(devices, "available_cores", lambda: 8)
    assert devices.processes_for("cpu", 1) == 8
    assert devices.processes_for("cpu", 3) == 2
    assert devices.processes_for("cpu", 16) == 1
    assert devices.processes_for("cpu", None) == 1
    assert devices.processes_for("cuda", 1) == 1


def test_an_absent_device_can_be_named(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.named("cuda") == "cuda"
    assert devices.named(None) is None
    with pytest.raises(UserError, match="no cuda device on this machine: leave `device` out to use"):
        devices.resolve("cuda")
    assert devices.resolve("cpu") == "cpu"
    assert devices.resolve(None) in ("mps", "cpu")
    for ask in (devices.named, devices.resolve):
        with pytest.raises(UserError, match="did you mean 'cuda'"):
            ask("cdua")
