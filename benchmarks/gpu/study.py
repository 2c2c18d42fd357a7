"""Part 5: a mini study, compared with the CPU's. Parts 6 to 8: real teachers and images, over several visits."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from atdiag.core.runs import Store
from benchmarks.gpu import archive
from benchmarks.gpu.record import PROJECT, Record, SkippedError, run

ATDIAG = (sys.executable, "-m", "atdiag.cli.app")
TEACHERS = {
    "vit_tiny_patch16_224": "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors",
    "deit_tiny_patch16_224": "deit_tiny_patch16_224.fb_in1k.safetensors",
}
"""One architecture, two pre-trainings: timm's name, and the file in ``ATDIAG_TEST_DATA``."""
IMAGES = "imagenette-128"
TOY = ("data.train=64", "recipe.epochs=1", "recipe.batch_size=16", "data.test_per_source=1")
P_AT_LEAST = 0.01
"""A difference between GPU and CPU with a smaller p-value than this is not noise."""


def _sets(items: tuple[str, ...]) -> list[str]:
    return [word for item in items for word in ("--set", item)]


def _document(said: str) -> dict[str, Any]:
    """Return the last line of a command with ``--json``."""
    out: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
    return out


def mini(record: Record) -> dict[str, Any]:
    """Compare the same mini study on device and CPU: each run's accuracy, and whether its difference is noise.

    Also the largest difference between two of a run's weights: rounding alone, if no image is classified differently.

    Runs are paired by their ids; noise means that a t test of their differences does not reject zero.
    """
    from scipy.stats import ttest_1samp

    seeds, sets = ("2", TOY) if record.toy else ("3", ())
    with tempfile.TemporaryDirectory() as name:
        top1: dict[str, dict[str, float]] = {}
        weights: dict[str, dict[str, dict[str, Tensor]]] = {}
        trained_on: dict[str, list[str]] = {}
        for side, device in (("device", record.device.type), ("cpu", "cpu")):
            where = ["--runs", f"{name}/{side}", "--out", f"{name}/{side}-out", "--device", device]
            line = [*ATDIAG, "benchmark", "--teacher", "deit_s", "--methods", "copy,distill", "--seeds", seeds]
            run([*line, *where, *_sets(sets)], record.left + 60, OMP_NUM_THREADS="1")
            found = Store(Path(name) / side).list()
            top1[side] = {one.id: one.result()["top1"] for one in found}
            trained_on[side] = sorted({one.result()["environment"]["device"] for one in found})
            weights[side] = {one.id: load_file(one.weights) for one in found if one.result()["steps"]}
    assert top1["device"].keys() == top1["cpu"].keys(), "the two studies trained other runs"
    differences = {name: top1["device"][name] - top1["cpu"][name] for name in top1["cpu"]}
    values = list(differences.values())
    apart = {
        name: max(float((one - weights["cpu"][name][key]).abs().max()) for key, one in state.items())
        for name, state in weights["device"].items()
    }
    out = {"runs": len(values), "mean_points": statistics.mean(values), "largest_points": max(map(abs, values))}
    if len(set(values)) > 1:
        out["p"] = float(ttest_1samp(values, 0.0).pvalue)
        assert out["p"] >= P_AT_LEAST, {**out, "differences": differences}
    return {**out, "trained_on": trained_on, "weights_apart": apart, "differences": differences, "top1": top1}


def methods(record: Record) -> dict[str, Any]:
    """Run ``atdiag cost``: time and memory of a step by method, of the published MAE ViT-L; of a miniature as a toy."""
    line = [*ATDIAG, "cost", "--json", "--device", record.device.type]
    with tempfile.TemporaryDirectory() as name:
        line += ["--out", name]
        line += ["--repeats", "6", "--batch", "2"] if record.toy else ["--teacher", "mae_l", "--profile", "paper"]
        found = _document(run(line, record.left + 60).stdout)
    found.pop("files")  # of a folder that is gone
    return found


def test_data(files: Collection[str] = tuple(TEACHERS.values())) -> Path:
    """Return the folder with the images and some files. Raises SkippedError if it is not given or lacks one."""
    if not (named := os.environ.get("ATDIAG_TEST_DATA")):
        raise SkippedError("ATDIAG_TEST_DATA names no folder")
    folder = Path(named)
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise SkippedError(f"{folder} lacks {', '.join(missing)}")
    return folder


def images(folder: Path, into: Path) -> Path:
    """Return the folder of data sets that contains Imagenette-128, unpacking it once if needed."""
    if (folder / IMAGES).is_dir():
        return folder
    if not (into / IMAGES).is_dir():
        packed = folder / f"{IMAGES}.zip"
        if not packed.is_file():
            raise SkippedError(f"{folder} lacks {packed.name}")
        with zipfile.ZipFile(packed) as archive_file:
            archive_file.extractall(into / ".part")
        (into / ".part" / IMAGES).rename(into / IMAGES)
    return into


def small(record: Record, runs: Path, seeds: int) -> dict[str, Any]:
    """Train from both real ViT-Ti on Imagenette-128: scratch, copy, distill, fine-tune, as far as time permits.

    When time is up the command is stopped (SIGTERM: it writes checkpoints); it resumes the next time. Raises
    SkippedError for missing data, RuntimeError if the command fails or is not done yet.
    """
    line = [*ATDIAG, "benchmark", "--methods", "copy,distill,finetune", "--seeds", str(seeds), "--json"]
    line += ["--runs", str(runs), "--device", record.device.type, "--out", str(runs.parent / f"study-{seeds}")]
    if record.toy:
        line += ["--teacher", "deit_s", *_sets(TOY)]
    else:
        folder = test_data()
        names = ",".join(f"timm:{model}@{folder / file}" for model, file in TEACHERS.items())
        line += ["--profile", "small", "--teacher", names, "--data-dir", str(images(folder, runs.parent / "data"))]
        # A process for each teacher's cohort: a single ViT-Ti leaves a GPU waiting for the host.
        line += ["--per-device", str(len(TEACHERS))]
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with subprocess.Popen(line, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            said, _ = process.communicate(timeout=max(record.left, 30))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=120)
    finished = [one for one in Store(runs).list() if one.finished] if runs.is_dir() else []
    if process.returncode:
        what = "stopped when the time was over" if process.returncode == 143 else f"exit code {process.returncode}"
        raise RuntimeError(f"{what}; {len(finished)} runs are finished; the same line goes on")
    results = {one.id: one.result() for one in finished}
    return {
        "finished": len(finished),
        "images_per_second": {name: result["images_per_second"] for name, result in results.items()},
        "study": _document(said),
    }


def pack(record: Record, runs: Path) -> dict[str, Any]:
    """Pack the runs into files for transfer; in the toy run also unpack them again and compare."""
    folder = record.folder / "packed"
    left_out = archive.pack(runs, folder)
    names = sorted(path.name for path in folder.iterdir())
    if record.toy:
        with tempfile.TemporaryDirectory() as name:
            archive.restore(folder, Path(name))
            for one in Store(runs).list():
                again = Store(Path(name)).run(one.spec)
                assert again.result() == one.result() and again.finished
    return {"files": names, "left_out": left_out}


def part(record: Record, runs: Path) -> None:
    """Measure part 5 or a later one: part 6 has one seed, 7 two and 8 three."""
    if record.part == 5:
        record.measure("mini study on device and CPU", partial(mini, record))
        return
    record.measure("small study", partial(small, record, runs, record.part - 5))
    record.document["measurements"].pop("packed", None)  # the folder's contents change with every visit
    record.measure("packed", partial(pack, record, runs), late=True)  # unpacked runs would be lost with the machine
