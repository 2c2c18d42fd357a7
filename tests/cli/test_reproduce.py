"""All analyses as one set of runs, and figures of what is finished."""

import contextlib
import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from ablations import claims, cost
from atdiag.core.runs import Store
from atdiag.execution import local
from atdiag.study import registry
from tests.commands import in_this_process, ran, wrong

SETS = ("--set", "data.train=64", "--set", "recipe.epochs=1", "--set", "data.test_per_source=1", "--seeds", "2")
FEW = {
    "benchmark": {"teacher": "deit_s,dinov2_s", "methods": "copy"},
    "ood": {"teacher": "dinov2_s", "methods": "copy", "on": "clean,contrast"},
    "rescue": {"teacher": "dinov2_s"},
    "sizes": {"family": "clip"},  # has one size at mini
}
PLACED = registry.placed()


def few() -> dict:
    """Install the ablations above, with these options for --quick."""
    return {name: (PLACED[name][0], replace(PLACED[name][1], quick=FEW[name])) for name in FEW}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Reproduce a few analyses in a folder; keep what was printed."""
    here = tmp_path_factory.mktemp("home")
    with contextlib.chdir(here), pytest.MonkeyPatch.context() as patch:
        in_this_process(patch)
        patch.setattr(registry, "placed", few)
        plan = ran("reproduce", "--quick", *SETS, "--dry-run")
        assert plan[0] == 0 and not list(here.iterdir())
        code, printed = ran("reproduce", "--quick", *SETS, "--json")
        assert code == 0
        yield here, plan[1], printed


def test_the_plan_counts_shared_runs_once(home):
    _, plan, _ = home
    # scratch, two copies and two teachers; ood's are among them; rescue adds native + copy and native, scratch
    rows = {
        line.split()[0]: line.split()[1:5] for line in plan.splitlines() if line.split()[:1] and line.split()[0] in FEW
    }
    assert rows["benchmark"] == ["2", "8", "8", "8"]
    assert rows["ood"] == ["2", "5", "0", "0"]
    assert rows["rescue"] == ["1", "9", "4", "4"]
    assert "12 runs, 12 to do, 5 measurements of finished runs: about" in plan
    assert "- sizes is not testable here: clip has one size at profile mini (clip_b)" in plan


def test_every_claim_of_every_analysis_has_a_verdict(home):
    here, _, printed = home
    document = json.loads(printed.splitlines()[-1])
    names = [claim["name"] for claim in document["claims"]]
    stated = [claim.name for name in FEW for claim in claims.of(name)]
    assert sorted(names) == sorted(stated)
    verdicts = {claim["name"]: claim for claim in document["claims"]}
    assert verdicts["gain at every size"]["verdict"] == "not testable here"
    assert "has one size" in verdicts["gain at every size"]["note"]
    assert "Profile mini is a working example" in printed
    folder = here / "results" / "reproduce-mini"
    assert {path.name for path in folder.iterdir()} == {
        *("benchmark", "ood", "rescue"),
        *(f"summary.{kind}" for kind in ("md", "csv", "tex", "json")),
    }
    with (folder / "summary.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == names
    finished = {run.id for run in Store(here / "runs").list() if run.finished}
    assert set(document["runs"]) == finished
    assert all(run in (folder / "summary.md").read_text() for run in finished)


def test_nothing_is_trained_or_measured_twice(home, monkeypatch):
    here, _, printed = home
    monkeypatch.chdir(here)
    monkeypatch.setattr(registry, "placed", few)
    monkeypatch.setattr(local.subprocess, "Popen", None)
    before = {path: path.stat().st_mtime_ns for path in (here / "runs").rglob("*") if path.name != "lock"}
    code, again = ran("reproduce", "--quick", *SETS, "--json")
    assert code == 0
    assert "all finished before: nothing to train" in again
    assert json.loads(again.splitlines()[-1]) == json.loads(printed.splitlines()[-1])
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_2024_paper_has_its_cost_measured(home, monkeypatch):
    here, _, _ = home
    monkeypatch.chdir(here)
    monkeypatch.setattr(registry, "placed", few)
    monkeypatch.setattr(local.subprocess, "Popen", None)
    asked = []

    def measured(costs, device, threads, repeats, on_step):
        asked.append((costs.teacher.label, costs.batch, device, threads, repeats))
        times = {"scratch": 1.0, "finetune": 1.0, "logits": 1.4, "copy": 1.3, "distill": 2.1}
        return replace(costs, seconds={name: [times[name]] * 9 for name in costs.specs})

    monkeypatch.setattr(cost, "measured", measured)
    plan = ran("reproduce", "--paper", "2024", "--quick", *SETS, "--dry-run")[1]
    assert "Then cost: activations" in plan and asked == []
    code, printed = ran("reproduce", "--paper", "2024", "--quick", *SETS, "--json")
    assert code == 0 and asked == [("deit_s (mini)", 32, "cpu", 1, cost.REPEATS)]
    claims_ = {claim["name"]: claim for claim in json.loads(printed.splitlines()[-1])["claims"]}
    found = claims_["attention transfer costs what KD does"]
    assert found["verdict"] == "does not hold" and "distill 1.50 [1.50, 1.50]" in found["ours"]
    folder = here / "results" / "reproduce-2024-mini" / "cost"
    assert {path.suffix for path in folder.iterdir()} == {".csv", ".md", ".json", ".png", ".pdf"}
    assert "| copy | 16,224 | 19,968 | 1300.0 | 1.30 [1.30, 1.30] |" in (folder / "cost.md").read_text()


def test_figures_are_drawn_from_finished_runs_only(home, monkeypatch):
    here, _, _ = home
    monkeypatch.chdir(here)
    monkeypatch.setattr(registry, "placed", few)
    monkeypatch.setattr(local.subprocess, "Popen", None)
    code, printed = ran("figures", "benchmark", "--quick", *SETS, "--json")
    assert code == 0
    files = [Path(file) for file in json.loads(printed.splitlines()[-1])["files"]]
    assert {file.suffix for file in files} == {".csv", ".md", ".tex", ".json", ".txt", ".png", ".pdf"}
    caption = next(file for file in files if file.suffix == ".txt").read_text()
    assert "2 seeds" in caption and "Profile mini" in caption
    code, printed = ran("figures", "all", "--quick", *SETS)
    assert code == 0
    assert printed.count(".png") == 3
    assert "not drawn: sizes: clip has one size" in printed


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("figures bench", "unknown analysis 'bench', did you mean 'benchmark'? known: all, benchmark"),
        ("figures rescue", "rescue: 9 runs of 9 not finished or not measured: the same line with 'reproduce'"),
        ("figures sizes", "clip has one size at profile mini (clip_b)"),
        ("reproduce --quick --set recipe.warmup_epoch=1", "did you mean 'recipe.warmup_epochs'?"),
        ("reproduce --quick --set recipe.finetune.lr=0.5", "recipe.finetune.lr has no effect here"),
        ("reproduce --quick --equivalence 0", "--equivalence 0 is not a margin"),
    ],
)
def test_bad_input(line, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "placed", few)
    extra = ("--quick", "--seeds", "2") if line.startswith("figures") else ()
    assert says in wrong(capsys, *line.split(), *extra)
    assert list(tmp_path.iterdir()) == []
