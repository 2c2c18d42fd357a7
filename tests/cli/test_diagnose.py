"""``atdiag diagnose``: what it prints and writes, on made-up answers; and one tiny study that really trains."""

import json
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from atdiag.diagnosis import html, words
from atdiag.diagnosis.arms import Runs
from atdiag.execution import devices
from tests.commands import SETS, ran, wrong
from tests.diagnosis.test_asking import Answers, trained, truth

HUB = truth(own=-12, native=10, alone=22) | {
    "quick_gelu, registers + copy": 60.0,
    "layer_scale, quick_gelu + copy": 38.0,
}
"""Accuracies like those of the specimen ``hub``: only registers reverse the failure."""


@pytest.fixture
def made_up(monkeypatch):
    """Replace training by made-up answers; returns the function that sets their accuracies."""
    known = {}

    def answers(self, names, seeds):
        seeds = list(seeds)
        for name in names:
            self.asked.setdefault(name, set()).update(seeds)
        return known["answers"](names, seeds)

    monkeypatch.setattr(Runs, "answers", answers)
    monkeypatch.setattr(Runs, "stored", lambda self, name, seeds: known["answers"]([name], seeds)[name])
    monkeypatch.setattr(Runs, "teacher", lambda self: 67.5)
    monkeypatch.setattr(Runs, "footing", lambda self, scratch: trained(scratch))
    return lambda accuracies: known.update(answers=Answers(accuracies))


def test_a_dry_run_shows_the_plan_and_writes_nothing(folder):
    code, out = ran("diagnose", "clip_b", "--dry-run", "--json")
    assert code == 0
    plan = json.loads(out.splitlines()[-1])
    assert [look["seeds"] for look in plan["looks"]] == [5, 8, 12]
    assert sum(look["level"] for look in plan["looks"]) == pytest.approx(0.05)
    assert {one["name"] for one in plan["accusations"]} >= {"the maps", "the architecture", "blocks 0-5"}
    assert "if it does not help, asked: the maps; the architecture" in out
    assert max(map(len, out.splitlines()[:-1])) <= 130
    assert list(folder.iterdir()) == []


def test_a_failure_is_explained_on_one_screen_and_in_a_report(folder, made_up):
    made_up(HUB)
    code, out = ran("diagnose", "hub", "--json")
    assert code == 0
    content = json.loads(out.splitlines()[-1])
    assert (content["verdict"], content["causes"]) == ("fails", ["the architecture", "component registers"])
    assert content["sufficient"]["components"] == ["registers"]
    screen = out[out.index("Verdict") : out.index("  results")]
    assert "because of the architecture (registers)." in " ".join(screen.split())
    assert len(screen.splitlines()) <= 24
    (where,) = Path("results").iterdir()
    assert {path.name for path in where.iterdir()} == {
        *("plan.json", "report.json", "report.html", "report.png", "report.pdf")
    }
    assert json.loads((where / "plan.json").read_text())["margin"] == 4
    known = {arm["arm"]: arm for arm in content["arms"]}
    assert known["registers + copy"]["seeds"] == 10, "the fresh seeds of the confirmation are counted"
    assert all(len(arm["runs"]) == arm["seeds"] for arm in content["arms"])


def test_the_page_asks_no_host_and_escapes_everything(folder, made_up):
    made_up(HUB)
    evil = "<script>alert(1)</script>"
    assert ran("diagnose", "hub", "--json")[0] == 0
    (path,) = Path("results").glob("*/report.json")
    content = json.loads(path.read_text())
    content["teacher"]["label"] = content["headline"] = evil
    content["arms"][0]["arm"] = content["signs"][0]["text"] = content["others"][0] = evil
    said = words.Said(evil, ((evil, evil),), (words.Advice(evil),), (evil,))
    page = html.page(content, said, Figure(), lambda one: one.text)
    assert evil not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    whole = path.with_suffix(".html").read_text()
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?!#)(?:https?:)?//", whole)
    assert "@import" not in whole
    assert "url(http" not in whole
    assert str(folder) not in whole + path.read_text()


def test_the_report_is_opened_where_asked(folder, made_up, monkeypatch):
    made_up(truth(own=20))
    opened = []
    monkeypatch.setattr("typer.launch", lambda url: opened.append(url) or 0)
    assert ran("diagnose", "clip_b", "--out", "here")[0] == 0
    assert opened == []
    assert ran("diagnose", "clip_b", "--out", "here", "--open")[0] == 0
    assert [Path(url).read_text()[:15] for url in opened] == ["<!doctype html>"]


def test_the_same_line_finds_its_plan_and_another_one_is_refused(folder, made_up, capsys):
    made_up(truth(own=20))
    line = ["diagnose", "clip_b", "--out", "here"]
    assert "transfers" in ran(*line)[1]
    before = Path("here/plan.json").read_bytes()
    assert ran(*line)[0] == 0
    assert Path("here/plan.json").read_bytes() == before
    code, _ = ran(*line, "--margin", "3")
    assert code == 2
    assert "is the plan of another diagnosis: give --out another folder" in capsys.readouterr().err
    assert Path("here/plan.json").read_bytes() == before


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["clip_c"], "did you mean"),
        (["clip_b", "--transfer", "coppy"], "--transfer 'coppy', did you mean 'copy'?"),
        (["clip_b", "--looks", "5,five"], "--looks '5,five' is not a list of at most three increasing numbers"),
        (["clip_b", "--looks", "8,5"], "write it as 5,8,12"),
        (["clip_b", "--looks", "2"], "--looks 2 ends below 3 seeds, where verdicts begin"),
        (["clip_b", "--margin", "0"], "--margin 0 is not a margin"),
        (["clip_b", "--set", "recipe.epoch=3"], "epochs"),
    ],
)
def test_wrong_input(folder, capsys, typed, message):
    assert message in wrong(capsys, "diagnose", *typed)
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_it_trains_what_it_asks_about_and_nothing_twice(folder, monkeypatch):
    monkeypatch.setattr(devices, "available_cores", lambda: 1)
    line = ["diagnose", "clip_b", "--looks", "3", *SETS, "--json"]
    code, out = ran(*line)
    assert code == 0
    content = json.loads(out.splitlines()[-1])
    assert content["verdict"] == "undertrained"
    assert len(list(Path("runs").glob("*/spec.json"))) == 10, "three arms of three seeds, and the teacher itself"
    stamps = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    code, again = ran(*line)
    assert json.loads(again.splitlines()[-1])["arms"] == content["arms"]
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")} == stamps
