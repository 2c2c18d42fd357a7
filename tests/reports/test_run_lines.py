"""``atdiag runs list`` and ``runs show``: lines that fit a terminal, and that a pipe can search."""

import json
import os
import re

import pytest

from atdiag.core import asked
from atdiag.core.errors import UserError
from atdiag.core.runs import Store
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed, Teacher, Transfer
from atdiag.reports import run_index, run_lines
from tests.commands import atdiag, wrong

NETWORK = Network(image_size=20, patch_size=4, channels=1, width=16, depth=12, heads=2, classes=10, mean=(0.2,))
TEACHER = Teacher(name="clip_b", profile="mini", network=NETWORK, sha256="0" * 64)
COPY = {"teacher": TEACHER, "transfer": Transfer(method="copy", layers=tuple(range(6, 12)))}


def spec(seed=0, **parts):
    data, recipe = Data(train=32, test_per_source=1), Recipe(epochs=1, batch_size=16)
    return RunSpec(network=NETWORK, data=data, recipe=recipe, seed=Seed(data=0, model=seed), **parts)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Make a finished baseline, a copy that is new and one that failed; asked for by two experiments."""
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path / "runs")
    scratch, new, failed = (store.create(one) for one in (spec(), spec(**COPY), spec(3, **COPY)))
    command = ["atdiag", "reinit", "--seeds", "1"]
    scratch.finish({"top1": 54.321, "origin": {"command": command}, "environment": {"device": "cpu"}, "seconds": 100})
    failed.fail(7, "the loss is not finite")
    arms = {"scratch": [scratch.id], "a copy with a name so long that it fills every line": [new.id, failed.id]}
    asked.record(store, "layers", arms)
    asked.record(store, "rescue", {"standard": [scratch.id]})
    return store


def test_each_run_has_one_line(store):
    long = "clip_b: a copy with a name so long that it fills every line"
    head, *lines = atdiag("runs", "list").splitlines()
    assert head.split() == ["experiment", "arm", "seed", "top-1", "state", "age", "id"]
    cells = [re.split(r"  +", line) for line in lines]
    assert [row[:5] for row in cells] == [
        ["rescue +1", "standard", "0", "54.3", "finished"],
        ["layers", long, "0", "-", "new"],
        ["layers", long, "0/3", "-", "failed"],
    ]
    assert [row[-1] for row in cells] == [run.id[:12] for run in store.list()]
    wide = atdiag("runs", "list", "--wide")
    assert all(run.id in wide for run in store.list())
    assert "copy 6-11" in wide and "rescue,layers" in wide


def test_a_chosen_experiment_comes_first_with_its_name_of_the_arm(store):
    lines = atdiag("runs", "list", "--ablation", "layers").splitlines()
    assert re.split(r"  +", lines[1])[:2] == ["layers +1", "scratch"]


def test_a_terminal_is_not_overrun(store):
    rows = run_lines.rows(store)
    for width in (80, 60, 20):
        lines = run_lines.lines(rows, False, width)
        assert max(map(len, lines)) <= max(width, 60), "the other columns are kept"
        assert len(lines) == 4
        assert all(run.id[:8] in "\n".join(lines) for run in store.list())
    assert any("…" in line for line in run_lines.lines(rows, False, 80))
    assert not any("…" in line for line in run_lines.lines(rows, False, None))


def test_filters(store, capsys):
    def ids(*words):
        return [row["run"] for row in json.loads(atdiag("runs", "list", *words, "--json"))]

    scratch, new, failed = (run.id for run in store.list())
    assert ids("--ablation", "rescue") == ids("--teacher", "none") == ids("--state", "finished") == [scratch]
    assert (
        ids("--teacher", "clip_b") == ids("--teacher", "clip_b (mini)") == ids("--state", "new,failed") == [new, failed]
    )
    assert ids("--ablation", "layers", "--state", "failed") == [failed]
    assert ids("--ablation", "benchmark") == []
    assert atdiag("runs", "list", "--ablation", "benchmark") == "0 runs of 3 in runs\n"
    assert "--ablation 'layer' is unknown, did you mean 'layers'?" in wrong(
        capsys, "runs", "list", "--ablation", "layer"
    )
    assert "--state 'done' is unknown" in wrong(capsys, "runs", "list", "--state", "done")


def test_a_run_of_which_no_experiment_is_recorded_tells_what_it_is(store):
    for path in (store.root / asked.FOLDER).glob("*"):
        path.unlink()
    scratch, new, _ = run_lines.rows(store, ["reinit"])
    assert (scratch["experiments"], scratch["arm"]) == (["reinit"], "scratch"), "by the line that ordered it"
    assert (new["experiments"], new["arm"]) == ([], "copy 6-11")
    assert run_lines.rows(store)[0]["experiments"] == []


def test_keys_of_before_are_kept(store):
    row = json.loads(atdiag("runs", "list", "--json"))[0]
    assert [*row][:9] == ["run", "state", "teacher", "student", "start", "transfer", "data", "seed", "top1"]
    assert (row["top1"], row["age"] >= 0) == (54.321, True)


def test_ages(store):
    run = store.list()[0]
    for seconds, text in ((5, "5s"), (125, "2m"), (7300, "2h"), (3 * 86_400 + 5, "3d")):
        at = run_lines.time.time() - seconds - 0.4
        os.utime(run.path / "result.json", (at, at))
        assert run_lines.lines([run_lines.rows(store)[0]], False, None)[1].split()[-2] == text


def test_show_is_short(store):
    scratch, _, failed = store.list()
    lines = dict(line.split(maxsplit=1) for line in run_lines.summary(scratch, store) if not line.startswith("asked"))
    assert lines["run"].startswith(f"{scratch.id}, finished ")
    assert lines["result"] == "top-1 54.32 %, 2 min on cpu"
    assert lines["transfer"] == "none"
    assert len(run_lines.summary(scratch, store)) <= 11
    text = atdiag("runs", "show", failed.id)
    assert "failed at step 7: the loss is not finite" in text
    assert "asked by  layers: a copy" in text
    assert {"run", "state", "spec", "metrics", "failure"} == {*json.loads(atdiag("runs", "show", failed.id, "--json"))}


def test_records_of_experiments(store):
    before = sorted((store.root / asked.FOLDER).iterdir())
    first = store.list()[0].id
    (rescue,) = (store.root / asked.FOLDER).glob("rescue-*")
    os.utime(rescue, (1, 1))
    asked.record(store, "rescue", {"standard": [first]}, trains=False)
    assert list(asked.read(store)[first]) == ["rescue", "layers"]
    assert rescue.stat().st_mtime == 1, "a second time writes nothing, unless it trains"
    asked.record(store, "rescue", {"standard": [first]})
    assert list(asked.read(store)[first]) == ["layers", "rescue"], "the one that asked last is last"
    asked.record(store, "sizes", {})
    assert sorted((store.root / asked.FOLDER).iterdir()) == before, "the same again, and nothing, write nothing"
    (store.root / asked.FOLDER / "x-1.json").write_text('{"experiment": "x", "arms": [1]}')
    assert set(asked.read(store)) == {run.id for run in store.list()}
    assert len(store.list()) == len(store.every()) == 3, "the records are no run"
    (store.root / "file").write_text("")
    asked.record(Store(store.root / "file"), "x", {"a": ["b"]})  # nowhere to write: no matter


def test_an_index_of_before_is_made_anew(store, monkeypatch):
    monkeypatch.setattr(run_index, "_FEW", 0)
    first = run_index.rows(store)
    content = json.loads((store.root / run_index.INDEX).read_text())
    (store.root / run_index.INDEX).write_text(json.dumps({**content, "form": content["form"] - 1, "rows": {"a": [1]}}))
    assert run_index.rows(store) == first


def test_unknown_names_raise(store):
    with pytest.raises(UserError, match="`state` 'x' is unknown"):
        run_lines.chosen([], None, None, "x", [])
