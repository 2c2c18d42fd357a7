"""Give malformed files, settings and options to the commands, and check that each is refused in one line or harmless.

    python benchmarks/fuzz.py [--cases 300] [--lanes 2] [--seed 0] [--json FILE]

Hypothesis draws the corruption of a file (flipped, cut or inserted bytes, emptied, deleted, another value in a JSON
document) and the values that are typed. Every case gets a fresh copy of a folder with finished runs, an interrupted
run, images, settings and weights. A case passes if every command ends within three minutes with exit code 0 (and then
with the numbers of the untouched folder), 1 or 2 (and then with one line that says why), without a traceback or a
report of a bug, and if no run then passes for finished whose files differ from those written. ``atdiag runs verify``
must name every finished run with a changed hashed file. Exit code 1 unless all pass.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

if __package__:
    from benchmarks.malformed import NUMBERS, TYPED, spoil
else:
    from malformed import NUMBERS, TYPED, spoil

from ablations.benchmark import benchmark
from atdiag.cli import app
from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import FILES, DamagedRunError, Store
from atdiag.core.spec import RunSpec
from atdiag.execution import plan
from atdiag.networks.weights import loading
from atdiag.study.builder import Lab
from atdiag.study.protocol import Study
from atdiag.study.settings import resolve
from atdiag.training import cohort, provenance

SETS = ("recipe.epochs=1", "data.train=256", "data.test_per_source=1", "recipe.warmup_epochs=0")
EXPERIMENT = ("benchmark", "--teacher", "deit_s", "--methods", "copy", "--seeds", "1", "--json")
EXPERIMENT += tuple(word for item in SETS for word in ("--set", item))
VERIFY = ("runs", "verify")
THEIRS = "timm:test_vit@theirs.safetensors"
LOOK = ("trace", THEIRS, "--images", "one.png", "--layers", "0", "--out", "t.safetensors")
SECONDS = 180
ROOM = 8 * 2**30
"""Memory limit of a command: sizes declared in a malformed file must not be trusted."""


# --- Run a command, and judge it -------------------------------------------------------------------------------------


def run_command(typed: Sequence[str], where: Path, to: Path) -> int:
    """Run one command in a separate process; return its exit code, or -1 if it did not end in time."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.setsid()
            os.chdir(where)
            out = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(os.open(f"{to}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, resource.RLIM_INFINITY))
            app.main(list(typed))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


def numbers(printed: str) -> Any:
    """Return a command's result without variable parts: the last line's document, if any."""
    with suppress(ValueError, IndexError):
        found = json.loads(printed.strip().splitlines()[-1])
        if isinstance(found, dict):
            return {name: value for name, value in found.items() if name != "files"}
    return None


@dataclass
class Case:
    """A malformed input, and the faults found in the commands' reactions."""

    kind: str
    what: str
    codes: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def run(self, folder: Path, typed: Sequence[str], meant: Any = None) -> None:
        """Run one command and check how it ended."""
        code = run_command(typed, folder, folder / "printed")
        self.codes.append(code)
        out, errors = ((folder / name).read_text(errors="replace") for name in ("printed", "printed.err"))
        line = " ".join(typed[:3])
        if code not in (0, 1, 2):
            self.faults.append(f"{line}: {'no end' if code == -1 else f'exit code {code}'}: {errors[-200:]}")
        if "Traceback" in out + errors or "this is a bug" in errors:
            self.faults.append(f"{line}: {errors[-300:]}")
        said = [one for one in errors.splitlines() if one.startswith("atdiag: ")]
        told = tuple(typed[:2]) == VERIFY or typed[0] == "data"  # these report their findings on standard output
        if code in (1, 2) and len(said) != 1 and not (told and out):
            self.faults.append(f"{line}: exit code {code} with {len(said)} lines: {errors[-200:]}")
        if code == 0 and meant is not None and numbers(out) != meant:
            self.faults.append(f"{line}: other numbers without a message")


def half_runs(store: Store) -> Iterator[str]:
    """Yield runs that count as finished but differ from what was written; every command that reads them must say so."""
    for run in store.list():
        if run.finished:
            try:
                recorded = run.result().get("files", {})
                for name in FILES:
                    run.sound(run.path / name)
                if set(recorded) != set(FILES):
                    yield f"{run.id} passes for finished with {sorted(recorded)}"
            except (DamagedRunError, ValueError):
                pass  # reported


# --- The folder that every case gets a copy of -----------------------------------------------------------------------


def specs() -> list[RunSpec]:
    """Return the experiment's runs."""
    study = benchmark(Lab(resolve(sets=SETS, seeds=1, environment={}, folder=Path("/nonexistent"))), "deit_s", "copy")
    assert isinstance(study, Study)
    return study.specs


def prepare(home: Path) -> Any:
    """Create that folder; return the experiment's output there."""
    torch.set_num_threads(1)
    cpu = ExecutionOptions(device="cpu")
    for group in plan.cohorts(specs()):
        cohort.train(group, Store(home / "runs"), loading.load, cpu)
    steps = iter([False, True])
    for group in plan.cohorts(specs()):
        cohort.train(group, Store(home / "half"), loading.load, cpu, should_stop=lambda: next(steps, True))
    rng = np.random.default_rng(0)
    for split, number in (("train", 3), ("val", 2)):
        for cls in ("ant", "bee"):
            (home / "photos" / split / cls).mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize((24, 24), Image.Resampling.BICUBIC)
                image.save(home / "photos" / split / cls / f"{index}.{'png' if index else 'jpg'}")
    Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(home / "one.png")
    (home / "settings").mkdir()  # a separate folder, so that other commands don't read it
    (home / "settings" / "atdiag.toml").write_text('profile = "mini"\nseeds = 2\n\n[recipe]\nepochs = 3\nlr = 1e-3\n')
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), home / "theirs.safetensors")
    for folder, typed in (
        (home / "settings", ("layers", "--dry-run", "--runs", "new")),
        (home, LOOK),
        (home, ("data", "check", "folder:photos")),
        (home, (*VERIFY, "--runs", "runs")),
        (home, (*EXPERIMENT, "--runs", "runs", "--out", "out")),
    ):
        case = Case("", "")
        case.run(folder, typed)
        if case.codes != [0] or case.faults:
            sys.exit(f"the untouched folder does not work: {(folder / 'printed.err').read_text()}")
    return numbers((home / "printed").read_text())


# --- The kinds of cases ----------------------------------------------------------------------------------------------


def a_run_s_file(name: str, folder: Path, draw: Callable[[Any], Any], meant: Any) -> Case:
    """Corrupt a file of a finished run."""
    store = Store(folder / "runs")
    victim = draw(st.sampled_from(sorted(run.id for run in store.list() if (run.path / name).stat().st_size)))
    what, changed = spoil(store.root / victim / name, draw, document=name.endswith(("json", "jsonl")))
    case = Case(name, f"{what} of {victim}")
    for typed in (("runs", "list"), ("runs", "show", victim), ("runs", "export", "--out", "all.csv")):
        case.run(folder, [*typed, "--runs", "runs"])
    case.run(folder, [*VERIFY, "--runs", "runs"])
    if changed and name != "result.json" and case.codes[-1] != 1:
        case.faults.append("runs verify does not see it")
    if name == "weights.safetensors":
        case.run(folder, ["attention-stats", victim, "--images", "4", "--runs", "runs", "--out", "out"])
        if changed and case.codes[-1] == 0:
            case.faults.append("other weights are analysed without a message")
    case.run(folder, [*EXPERIMENT, "--runs", "runs", "--out", "out"], meant)
    case.faults += half_runs(store)
    return case


def a_checkpoint(folder: Path, draw: Callable[[Any], Any], meant: Any) -> Case:
    """Corrupt the checkpoint of an interrupted run, then resume the experiment."""
    store = Store(folder / "half")
    victim = draw(st.sampled_from(sorted(run.id for run in store.list() if run.checkpoint.exists())))
    case = Case("checkpoint", f"{spoil(store.root / victim / 'checkpoint', draw)[0]} of {victim}")
    case.run(folder, [*EXPERIMENT, "--runs", "half", "--out", "out"], meant)
    case.faults += half_runs(store)
    return case


def settings_file(folder: Path, draw: Callable[[Any], Any], meant: Any) -> Case:
    """Corrupt a settings file, or draw its values."""
    path = folder / "settings" / "atdiag.toml"
    if draw(st.booleans()):
        case = Case("atdiag.toml", spoil(path, draw)[0])
    else:
        name = draw(st.sampled_from(["seeds", "profile", "recipe.epochs", "recipe.lr", "recipe", "data", "data.train"]))
        value = draw(st.integers() | st.floats() | st.booleans() | st.text(max_size=8) | st.just([]) | st.just({}))
        path.write_text(f"{name} = {json.dumps(value)}\n")
        case = Case("atdiag.toml", path.read_text().strip())
    case.run(path.parent, ["layers", "--dry-run", "--runs", "new"])
    return case


def overrides(folder: Path, draw: Callable[[Any], Any], meant: Any) -> Case:
    """Draw values for --set."""
    known = [
        "recipe.epochs",
        "recipe.lr",
        "recipe.betas",
        "recipe.copy.lr",
        "data.train",
        "data.name",
        "data.per_class",
        "data.validation",
        "data.test_draw",
    ]
    known += ["recipe.precision", "recipe.drop_path", "recipe.batch_size", "transfer.loss", "seeds", "network.depth"]
    text = draw(TYPED | st.tuples(st.sampled_from(known), st.just("="), NUMBERS | TYPED).map("".join))
    case = Case("--set", text)
    case.run(folder, ["reinit", "--dry-run", "--runs", "new", "--set", text])
    return case


def options(folder: Path, draw: Callable[[Any], Any], meant: Any) -> Case:
    """Draw values for other options."""
    line = draw(
        st.sampled_from(
            [
                ["layers", "--dry-run", "--runs", "new", "--k"],
                ["layers", "--dry-run", "--runs", "new", "--from"],
                ["reinit", "--dry-run", "--runs", "new", "--module"],
                ["rescue", "--dry-run", "--runs", "new", "--teacher"],
                ["benchmark", "--dry-run", "--runs", "new", "--seeds"],
                ["losses", "--dry-run", "--runs", "new", "--weights"],
                ["epochs", "--dry-run", "--runs", "new", "--epochs"],
                ["trace", "deit_s", "--out", "t.safetensors", "--images", "1", "--layers"],
                ["trace", "deit_s", "--out", "t.safetensors", "--layers", "0", "--images"],
                ["runs", "show", "--runs", "runs"],
                ["runs", "remove", "--runs", "runs"],
            ]
        )
    )
    value = draw(NUMBERS | TYPED)
    case = Case("options", " ".join([*line, value]))
    case.run(folder, [*line, value])
    return case


def an_image(folder: Path, draw: Callable[[Any], Any], meant: Any) -> Case:
    """Corrupt an image of a data set, or one given by name."""
    paths = [*sorted((folder / "photos").rglob("*.*")), folder / "one.png"]
    path = draw(st.sampled_from(paths))
    case = Case("image", spoil(path, draw)[0])
    if path.parent == folder:
        case.run(folder, LOOK)
    else:
        case.run(folder, ["data", "check", "folder:photos"])
    return case


def a_teacher_s_file(folder: Path, draw: Callable[[Any], Any], meant: Any) -> Case:
    """Corrupt a user's weight file."""
    case = Case("teacher's file", spoil(folder / "theirs.safetensors", draw)[0])
    case.run(folder, LOOK)
    return case


KINDS: tuple[tuple[str, float, Callable[[Path, Callable[[Any], Any], Any], Case]], ...] = (
    *((name, share, partial(a_run_s_file, name)) for name, share in zip(FILES, (0.09, 0.05, 0.08, 0.08), strict=True)),
    ("result.json", 0.1, partial(a_run_s_file, "result.json")),
    ("checkpoint", 0.1, a_checkpoint),
    ("atdiag.toml", 0.1, settings_file),
    ("--set", 0.1, overrides),
    ("options", 0.1, options),
    ("image", 0.1, an_image),
    ("teacher's file", 0.1, a_teacher_s_file),
)


def cases(kind: str, number: int, start: int, home: Path, meant: Any) -> list[Case]:
    """Run this many cases of a kind."""
    make = next(make for name, _, make in KINDS if name == kind)
    found: list[Case] = []
    work = home.parent / f"work-{kind.replace('/', '-')}"

    @seed(start)
    @settings(
        max_examples=number,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(home, work)
        found.append(make(work, data.draw, meant))

    one()
    return found


def main() -> None:
    """Draw, run and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--lanes", type=int, default=2, help="How many kinds at once.")
    parser.add_argument("--only", choices=[name for name, _, _ in KINDS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    about = provenance.environment(torch.device("cpu"))
    for name in ("ATDIAG_RUNS", "ATDIAG_DATA", "ATDIAG_PROFILE", "ATDIAG_DEBUG"):
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name) / "home"
        os.environ["ATDIAG_CACHE"] = f"{name}/cache"
        home.mkdir()
        meant = prepare(home)
        kinds = [(kind, round(chosen.cases * share)) for kind, share, _ in KINDS if chosen.only in (None, kind)]
        found: list[Case] = []
        with ProcessPoolExecutor(chosen.lanes, multiprocessing.get_context("fork")) as pool:
            jobs = [pool.submit(cases, kind, number, chosen.seed, home, meant) for kind, number in kinds]
            for (kind, _), job in zip(kinds, jobs, strict=True):
                of_kind = job.result()
                found += of_kind
                bad = [case for case in of_kind if case.faults]
                ends = {code: sum(code == case.codes[-1] for case in of_kind) for code in (0, 1, 2)}
                print(
                    f"{kind:>20}: {len(of_kind) - len(bad)} of {len(of_kind)} as it should be; last exit codes {ends}"
                )
                for case in bad:
                    print(f"    {case}", flush=True)
    passed = sum(not case.faults for case in found)
    print(f"{passed} of {len(found)} malformed inputs: a clear error or a correct result")
    if chosen.json:
        kinds_found = {kind: sum(case.kind == kind for case in found) for kind, _ in kinds}
        failed = [vars(case) for case in found if case.faults]
        report = {"machine": about, "seed": chosen.seed, "cases": len(found), "passed": passed}
        chosen.json.write_text(json.dumps({**report, "kinds": kinds_found, "failed": failed}, indent=1) + "\n")
    if passed < len(found):
        sys.exit(1)


if __name__ == "__main__":
    main()
