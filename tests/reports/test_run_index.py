"""The list of runs, and the index that is only a cache of it."""

import json

import pytest

from atdiag.core.runs import Store
from atdiag.reports import run_index, run_table
from tests.studies import lab


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store of two finished runs and an unfinished one, for which an index is worth a file."""
    monkeypatch.setattr(run_index, "_FEW", 1)
    made = Store(tmp_path / "runs")
    study = lab("data.train=64", seeds=3)
    for number, spec in enumerate(study.baseline(study.teacher("deit_s")).specs):
        run = made.create(spec)
        if number < 2:
            run.write("predictions.npz", b"")
            run.finish({"top1": 50.0 + number, "seconds": 2.0})
    return made


def index(store) -> dict:
    return json.loads((store.root / run_index.INDEX).read_text())["rows"]


def test_rows_tell_what_a_run_is(store):
    rows = run_index.rows(store)
    assert [row["top1"] for row in rows] == [50.0, 51.0, None]
    assert {row["transfer"] for row in rows} == {"none"}
    assert [row["seed"] for row in rows] == ["0/0", "1/1", "2/2"]


def test_the_index_holds_finished_runs_and_is_used(store, monkeypatch):
    first = run_index.rows(store)
    assert index(store).keys() == {row["run"] for row in first[:2]}
    read = []
    monkeypatch.setattr(run_index, "listed", lambda run, real=run_index.listed: read.append(run.id) or real(run))
    assert run_index.rows(store) == first
    assert read == [first[2]["run"]], "finished runs came from the index"


@pytest.mark.parametrize("content", ["", "{torn", "[]", '{"form": 0, "rows": {}}', '{"form": 2, "rows": {"a": [1]}}'])
def test_an_index_that_is_torn_or_of_another_form_is_made_anew(store, content):
    first = run_index.rows(store)
    (store.root / run_index.INDEX).write_text(content)
    assert run_index.rows(store) == first
    assert len(index(store)) == 2


def test_a_changed_or_removed_run_is_not_listed_from_the_index(store):
    before = run_index.rows(store)
    changed, removed = store.list()[:2]
    result = changed.path / "result.json"
    result.write_text(result.read_text().replace("50.0", "49.25"))
    removed.path.rename(store.root.parent / "elsewhere")
    after = run_index.rows(store)
    assert [row["run"] for row in after] == [before[0]["run"], before[2]["run"]]
    assert after[0]["state"] == "damaged" or after[0]["top1"] == 49.25


def test_a_damaged_run_does_not_hide_the_others(store):
    run_index.rows(store)
    (store.list()[2].path / "spec.json").write_text("{torn")
    again = run_index.rows(store)
    assert [row["state"] for row in again] == ["finished", "finished", "damaged"]


def test_runs_as_flat_rows_and_their_differences(store):
    one, two, _ = store.list()
    row = run_table.row(one)
    assert (row["run"], row["state"], row["top1"], row["seed.data"]) == (one.id, "finished", 50.0, 0)
    found = run_table.differences(one, two)
    assert found["spec"] == [("seed.data", 0, 1), ("seed.model", 0, 1)]
    assert ("top1", 50.0, 51.0) in found["results"]
    lines = run_table.to_csv([row, run_table.row(two)]).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("run,state,top1")
