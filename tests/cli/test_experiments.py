"""The experiments end to end, trained once for all tests of this file."""

import contextlib
import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from atdiag.cli.messages import as_typed
from atdiag.core import paths
from atdiag.core.errors import UserError
from atdiag.core.runs import Store
from atdiag.execution import devices, local
from atdiag.networks.weights import loading
from atdiag.stats.contrasts import Outcomes, estimate
from tests.commands import LINES, SETS, in_this_process, ran, wrong


def test_a_dry_run_creates_nothing(folder):
    code, out = ran("reinit", "--dry-run", "--json", "--seeds", "2", *SETS)
    assert code == 0
    plan = json.loads(out.splitlines()[-1])
    assert plan["ablation"] == "reinit"
    assert len(plan["runs"]) == 7
    assert {run["state"] for run in plan["runs"]} == {"new"}
    assert {run["spec"]["recipe"]["epochs"] for run in plan["runs"] if run["arm"] != "teacher"} == {1}
    for planned in plan["runs"]:
        assert planned["run"] in out.partition("{")[0]
    assert "7 runs, 7 to do, about " in out
    assert "clip_b (mini)" in out
    assert list(folder.iterdir()) == []


def test_listing_runs_creates_nothing(folder):
    assert json.loads(ran("runs", "list", "--json")[1]) == []
    assert "0 runs in runs" in ran("runs", "list")[1]
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Run the three experiments in a folder: its path, and what each printed."""
    here = tmp_path_factory.mktemp("home")
    with contextlib.chdir(here), pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "available_cores", lambda: 1)
        printed = {}
        for name, line in LINES.items():  # the first with a worker process, as users have it
            code, printed[name] = ran(*line, *SETS, "--seeds", "2", "--json")
            assert code == 0
            in_this_process(patch)
    return here, printed


@pytest.fixture
def at_home(home, monkeypatch):
    monkeypatch.chdir(home[0])
    return home[0]


def answer(printed: str) -> dict:
    """Return an experiment's JSON, merged with that of its only study; without the cost of what would settle it."""
    document = json.loads(printed.splitlines()[-1])
    assert document.pop("settle") is not None
    return alone(document)


def alone(document: dict) -> dict:
    (study,) = document["studies"]
    return study | document


def snapshot(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "lock"}


def right(run: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(run / "predictions.npz") as saved:
        return saved["prediction"] == saved["label"], saved["cluster"]


@pytest.mark.parametrize("name", LINES)
def test_the_output_of_an_experiment(home, at_home, name):
    printed = home[1][name]
    found = answer(printed)
    assert found.keys() >= {"ablation", "profile", "teacher", "arms", "verdict", "files"}
    assert (found["ablation"], found["profile"], found["teacher"]) == (name, "mini", "clip_b (mini)")
    for arm in found["arms"]:
        assert arm.keys() >= {"arm", "top1", "contrast", "ci_low", "ci_high", "seeds", "runs"}
        assert arm["seeds"] == len(arm["runs"]) == 2
        assert (arm["contrast"] is None) == (arm["arm"] == "scratch")
        if arm["contrast"] is not None:
            assert arm["ci_low"] <= arm["contrast"] <= arm["ci_high"]
        assert arm["arm"] in printed
        assert f"{arm['top1']:.1f}" in printed
    suffixes = [".csv", ".md", ".tex", ".json", ".txt", ".png", ".pdf"]
    assert [Path(file).suffix for file in found["files"]] == suffixes
    for file in found["files"]:
        assert Path(file).stat().st_size > 100
        assert Path(file).parent == Path("results") / f"{name}-clip_b-mini"
    assert f"\n  {found['files'][0]}  (and {', '.join(suffixes[1:])})\n" in printed
    flat = " ".join(printed.split())
    assert "Verdict " + " ".join(as_typed(found["verdict"]).split()) in flat
    assert "clip_b (mini) itself" in printed
    assert "overrides: data.test_per_source=1, data.train=64" in printed
    saved = json.loads(Path(found["files"][3]).read_text())
    assert alone(saved) == found
    markdown = Path(found["files"][1]).read_text()
    assert found["verdict"] in markdown
    assert all(run in markdown for arm in found["arms"] for run in arm["runs"])


@pytest.mark.parametrize("name", LINES)
def test_every_number_can_be_recomputed_from_run_directories(home, at_home, name):
    found = answer(home[1][name])
    measured = {}
    for arm in found["arms"]:
        runs = [right(Path("runs") / run) for run in arm["runs"]]
        assert arm["top1"] == pytest.approx(np.mean([100 * correct.mean() for correct, _ in runs]))
        measured[arm["arm"]] = Outcomes({i: correct for i, (correct, _) in enumerate(runs)}, runs[0][1])
        if arm["contrast"] is not None:
            again = estimate(measured, {arm["arm"]: 1, "scratch": -1})
            assert (arm["contrast"], arm["ci_low"], arm["ci_high"]) == pytest.approx(
                (again.value, again.low, again.high)
            )
    assert found["reference"]["top1"] == pytest.approx(
        100 * right(Path("runs") / found["reference"]["runs"][0])[0].mean()
    )
    with Path(found["files"][0]).open() as file:
        table = list(csv.DictReader(file))
    by_name = {row["name"]: row for row in table}
    for arm in found["arms"]:
        row = by_name[arm["arm"]]
        assert float(row["top1"]) == pytest.approx(arm["top1"])
        assert row["runs"].split() == arm["runs"]
        assert row["interval_covers"] == ("seeds and images" if arm["contrast"] is not None else "")
    for contrast in found["contrasts"]:
        row = by_name[contrast["contrast"]]
        assert float(row["contrast"]) == pytest.approx(contrast["value"])
        assert set(row["runs"].split()) <= {run for arm in found["arms"] for run in arm["runs"]}
    assert {row["teacher"] for row in table} == {"clip_b (mini)"}


def test_the_teachers_accuracy_agrees_with_its_file(home, at_home):
    """On other scenes of the same digits: 599 here, 2,396 in its file."""
    told = loading.metadata(loading.shipped_path("clip_b"))["top1"]
    assert answer(home[1]["reinit"])["reference"]["top1"] == pytest.approx(told, abs=5)


def test_baseline_and_reference_are_shared(home):
    found = [answer(printed) for printed in home[1].values()]
    assert len({tuple(answer["arms"][0]["runs"]) for answer in found}) == 1
    assert len({tuple(answer["reference"]["runs"]) for answer in found}) == 1
    # layers' "all blocks" is rescue's "standard + copy"
    whole = {arm["arm"]: arm["runs"] for answer in found for arm in answer["arms"]}
    assert whole["all blocks"] == whole["standard + copy"]


@pytest.mark.parametrize("name", LINES)
def test_the_second_time_nothing_is_trained(home, at_home, name, monkeypatch):
    def never(*_):
        raise AssertionError("a worker was started")

    monkeypatch.setattr(local.subprocess, "Popen", never)
    before = snapshot(at_home / "runs")
    code, printed = ran(*LINES[name], *SETS, "--seeds", "2", "--json")
    assert code == 0
    assert "all finished before: nothing to train" in printed
    assert snapshot(at_home / "runs") == before
    assert answer(printed) == answer(home[1][name])


def test_a_dry_run_afterwards_says_finished(home, at_home):
    before = snapshot(at_home)
    printed = ran(*LINES["rescue"], *SETS, "--seeds", "3", "--dry-run", "--json")[1]
    states = [run["state"] for run in json.loads(printed.splitlines()[-1])["runs"]]
    assert (states.count("finished"), states.count("new")) == (21, 10)
    assert "31 runs, 10 to do" in printed
    assert snapshot(at_home) == before


def test_another_module_keeps_the_files_of_the_first(home, at_home, monkeypatch):
    in_this_process(monkeypatch)
    files = {path: path.read_bytes() for path in map(Path, answer(home[1]["reinit"])["files"])}
    code, printed = ran("reinit", "--module", "mlp", *SETS, "--seeds", "2", "--json")
    assert code == 0
    assert "7 runs, 3 finished before; 4 to do" in printed
    assert not set(answer(printed)["files"]) & {str(path) for path in files}
    assert all(path.read_bytes() == content for path, content in files.items())


def test_finished_runs_are_read_only(home, at_home, monkeypatch, capsys):
    writable = paths.writable

    def read_only(folder, argument):
        if argument == "runs":
            raise UserError(f"`runs` {folder} can't be written")
        writable(folder, argument)

    monkeypatch.setattr(paths, "writable", read_only)
    assert answer(ran(*LINES["reinit"], *SETS, "--seeds", "2", "--json")[1]) == answer(home[1]["reinit"])
    assert "can't be written" in wrong(capsys, *LINES["reinit"], *SETS, "--seeds", "3")


def test_one_seed_is_undecided(home, at_home):
    code, printed = ran(*LINES["reinit"], *SETS, "--seeds", "1", "--json")
    found = answer(printed)
    assert code == 0
    assert "undertrained: nothing can be said" in found["verdict"] and "with one seed" not in found["verdict"]
    assert {arm["seeds"] for arm in found["arms"]} == {1}
    assert "test images only: one seed" in printed
    assert not set(found["files"]) & set(answer(home[1]["reinit"])["files"])


def test_out_and_runs_can_be_elsewhere(home, at_home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "a" / "b"
    code, printed = ran(*LINES["reinit"], *SETS, "--seeds", "2", "--runs", home[0] / "runs", "--out", out, "--json")
    assert code == 0
    assert {Path(file).parent for file in answer(printed)["files"]} == {out}
    monkeypatch.setenv("ATDIAG_RUNS", str(home[0] / "runs"))
    assert "nothing to train" in ran(*LINES["reinit"], *SETS, "--seeds", "2")[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "results"]


def test_runs_list_show_remove(home, at_home, tmp_path, monkeypatch, capsys):
    listed = json.loads(ran("runs", "list", "--json")[1].splitlines()[-1])
    assert {row["run"] for row in listed} == {path.parent.name for path in Path("runs").glob("*/spec.json")}
    assert {row["state"] for row in listed} == {"finished"}
    table = ran("runs", "list")[1]
    assert all(row["run"][:12] in table for row in listed)

    copy = next(row for row in listed if row["transfer"] == "copy 6-11")
    assert (copy["teacher"], copy["student"], copy["start"]) == ("clip_b (mini)", "standard", "scratch")
    assert copy["experiments"][0] in LINES and copy["arm"]
    assert len(ran("runs", "show", copy["run"][:6])[1].splitlines()) <= 12
    shown = json.loads(ran("runs", "show", copy["run"][:6], "--json")[1])
    assert (shown["run"], shown["state"]) == (copy["run"], "finished")
    assert shown["result"]["top1"] == copy["top1"]
    assert shown["spec"]["transfer"]["layers"] == [6, 7, 8, 9, 10, 11]
    assert [line["epoch"] for line in shown["metrics"]] == [1]

    shutil.copytree("runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    one, other = (row["run"] for row in listed[:2])
    assert wrong(capsys, "runs", "remove", one, "nothing").startswith("no run in runs named 'nothing'")
    assert (tmp_path / "runs" / one).exists()  # all are found before any is removed
    with Store(Path("runs")).find(one).lock():
        assert "wait until it ends" in wrong(capsys, "runs", "remove", one)
    code, out = ran("runs", "remove", one[:8], other)
    assert (code, out) == (0, f"removed {one}\nremoved {other}\n")
    assert len(json.loads(ran("runs", "list", "--json")[1])) == len(listed) - 2
    assert "at least 4" in wrong(capsys, "runs", "show", "")


def test_a_damaged_run_is_listed_and_can_be_removed(folder, capsys):
    run = folder / "runs" / "0123456789abcdef"
    run.mkdir(parents=True)
    (run / "spec.json").write_text("{")
    assert json.loads(ran("runs", "list", "--json")[1])[0]["state"] == "damaged"
    assert "damaged" in ran("runs", "list")[1]
    assert "'atdiag runs remove 0123456789abcdef' deletes it" in wrong(capsys, "runs", "show", "0123")
    assert ran("runs", "remove", "0123") == (0, "removed 0123456789abcdef\n")
    assert not run.exists()


def test_a_run_directory_holds_what_later_analyses_need(home, at_home):
    for spec in Path("runs").glob("*/spec.json"):
        names = {path.name for path in spec.parent.iterdir()} - {"tensorboard", "lock"}
        assert names == {"spec.json", "metrics.jsonl", "weights.safetensors", "predictions.npz", "result.json"}
