"""The measurements of one part, saved to a JSON file after each, so that an interrupted part can resume."""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from atdiag.core.runs import write_atomically
from atdiag.training.provenance import best_device, environment, hardware, now

PROJECT = Path(__file__).parents[2]
DONE = ("measured", "skipped")


class SkippedError(Exception):
    """A measurement that can't be taken here; the message is the reason."""


def driver() -> str | None:
    """Return the version of the GPU's driver; None without one."""
    try:
        line = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(line, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


class Record:
    """The measurements of a part so far.

    A failing measurement is recorded with its traceback, and the next one is taken. When a part is resumed, those that
    were measured, or skipped for a reason, are not repeated; failed ones are.
    """

    def __init__(self, folder: Path, part: int, toy: bool, seconds: float, only: Sequence[str] = ()) -> None:
        self.folder, self.part, self.toy, self.only = folder, part, toy, only
        self.device = torch.device("cpu") if toy else best_device()
        self.path = folder / f"part{part}{'-toy' if toy else ''}.json"
        self.deadline = time.monotonic() + seconds
        folder.mkdir(parents=True, exist_ok=True)
        machine = {**environment(self.device), **hardware(self.device), "driver": driver()}
        self.document: dict[str, Any] = {"benchmark": "gpu", "part": part, "toy": toy, "machine": machine}
        self.document["measurements"] = {}
        if self.path.exists():
            earlier = json.loads(self.path.read_text())
            self.document["measurements"] = earlier["measurements"]

    @property
    def left(self) -> float:
        """Seconds until the part should end."""
        return self.deadline - time.monotonic()

    def measure(self, name: str, work: Callable[[], Any], late: bool = False) -> None:
        """Take a measurement, unless it was taken before or time is up, and save it.

        late: also when time is up, for what must not be left undone.
        """
        if self.only and not any(text in name for text in self.only):
            return
        before = self.document["measurements"].get(name, {})
        if before.get("status") in DONE:
            self._say(name, f"{before['status']} before")
            return
        if self.left <= 0 and not late:
            self._keep(name, {"status": "not begun", "reason": "the part's time was over: the same line goes on"})
            return
        begin = time.monotonic()
        try:
            out = {"status": "measured", "result": work()}
        except SkippedError as reason:
            out = {"status": "skipped", "reason": str(reason)}
        except Exception:  # any error is recorded and must not affect the next measurement
            out = {"status": "failed", "traceback": traceback.format_exc()}
        self._keep(name, {**out, "seconds": round(time.monotonic() - begin, 2), **self._where()})
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _where(self) -> dict[str, str]:
        """Return when and on what a measurement was taken: the next one may be taken on another machine."""
        return {"at": now(), "device": str(self.document["machine"]["device"])}

    def _keep(self, name: str, entry: dict[str, Any]) -> None:
        self.document["measurements"][name] = entry
        write_atomically(self.path, json.dumps(self.document, indent=1) + "\n")
        self._say(name, entry["status"])
        if entry["status"] == "failed":
            print(entry["traceback"], flush=True)

    def _say(self, name: str, status: str) -> None:
        print(f"part {self.part}, {name}: {status}", flush=True)

    @property
    def failed(self) -> list[str]:
        """Names of the measurements that failed."""
        return [name for name, entry in self.document["measurements"].items() if entry["status"] == "failed"]

    def needs_cuda(self, why: str) -> None:
        """Raise SkippedError if there is no CUDA device."""
        if self.device.type != "cuda":
            raise SkippedError(f"no CUDA device here: {why}")

    def script(self, name: str, *arguments: str, json_option: bool = True) -> Any:
        """Run a benchmark of this folder by its command line; return its JSON, or its output.

        Runs in a separate process, limited to the remaining time; in the toy run in this process, where importing torch
        again would take most of the time. Raises RuntimeError with its last output if it fails.
        """
        out = self.folder / f".{name}.json"
        words = [*arguments, *(["--json", str(out)] if json_option else [])]
        try:
            said = _here(name, words) if self.toy else _process(name, words, self.left + 60)
            return json.loads(out.read_text()) if json_option else said
        finally:
            out.unlink(missing_ok=True)


def _here(name: str, words: list[str]) -> str:
    before, threads, printed = sys.argv, torch.get_num_threads(), io.StringIO()
    sys.argv = [f"benchmarks/{name}.py", *words]
    try:
        with redirect_stdout(printed):
            runpy.run_path(str(PROJECT / "benchmarks" / f"{name}.py"), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"{name} ended with {ended.code}: {printed.getvalue()[-2000:]}") from None
    finally:
        sys.argv = before
        torch.set_num_threads(threads)
    return printed.getvalue()


def _process(name: str, words: list[str], seconds: float) -> str:
    return run([sys.executable, str(PROJECT / "benchmarks" / f"{name}.py"), *words], seconds).stdout


def run(
    line: list[str], seconds: float, codes: tuple[int, ...] = (0,), **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command line in the project. Raises RuntimeError with its last output for another exit code."""
    path = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    done = subprocess.run(line, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=max(seconds, 60))
    if done.returncode not in codes:
        raise RuntimeError(f"exit code {done.returncode}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done
