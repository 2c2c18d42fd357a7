"""Devices, and how many processes fit on each."""

import pytest

from atdiag.core.errors import UserError
from atdiag.core.options import ExecutionOptions
from atdiag.execution import devices
from atdiag.execution.dispatch import Dispatch


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


# --- several devices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("0,1,2", ["0", "1", "2"]),
        ("4, 6", ["4", "6"]),
        ("1,-1,2", ["1"]),
        ("", []),
        ("GPU-ab,GPU-cd", ["GPU-ab", "GPU-cd"]),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(given, names):
    assert devices.visible({devices.VISIBLE: given}) == names


def test_devices_are_chosen_among_the_visible_ones():
    seen = {devices.VISIBLE: "4,5,7"}
    assert devices.chosen(None, seen) == ["4", "5", "7"]
    assert devices.chosen("2", seen) == ["4", "5"]
    assert devices.chosen("0,2", seen) == ["4", "7"]
    assert devices.chosen("2,", seen) == ["7"]
    with pytest.raises(UserError, match=r"`devices` 9: this machine shows 3 GPUs \(CUDA_VISIBLE_DEVICES=4,5,7\)"):
        devices.chosen("9", seen)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "all", "0,0", ",1", "1,,2"])
def test_devices_that_name_none(text):
    with pytest.raises(UserError, match="`devices`"):
        devices.wanted(text)


def test_places_of_processes(monkeypatch):
    monkeypatch.setattr(devices, "available_cores", lambda: 4)
    monkeypatch.setattr(devices, "is_here", lambda device: True)
    monkeypatch.setenv(devices.VISIBLE, "3,5")
    on = [place[devices.VISIBLE] for place in devices.slots(ExecutionOptions(device="cuda", per_device=2))]
    assert on == ["3", "5", "3", "5"]
    assert devices.slots(ExecutionOptions(device="cpu", threads=1)) == [{}] * 4
    assert devices.slots(ExecutionOptions(device="cpu", threads=1, per_device=3)) == [{}] * 3
    with pytest.raises(UserError, match="`devices` 2 chooses GPUs, and these runs are trained on cpu"):
        devices.slots(ExecutionOptions(device="cpu", devices="2"))


def test_the_longest_waiting_job_goes_to_the_free_place():
    queue = Dispatch(4, 2)
    assert queue.starts() == [(0, 0), (1, 1)]
    assert queue.starts() == []
    queue.ended(1)
    assert queue.starts() == [(2, 1)]
    queue.lost([0], place_too=True)
    assert queue.starts() == []
    queue.ended(2)
    assert queue.starts() == [(0, 1)]
    queue.opened(0)
    assert queue.starts() == [(3, 0)]
    queue.ended(0)
    queue.ended(3)
    assert queue.over
