"""``atdiag runs verify``, ``diff`` and ``export`` on runs that were really trained, and damaged by hand."""

import csv
import io
import json
import shutil

import pytest
import torch

from atdiag.analysis import subjects
from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import FILES, DamagedRunError, Store
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed, Teacher, Transfer
from atdiag.networks.model import students
from atdiag.networks.weights import sources
from atdiag.reports import run_table
from atdiag.training import audit, cohort, evaluation, predictions
from tests.commands import atdiag, ran, wrong

NETWORK = Network(image_size=20, patch_size=4, channels=1, width=16, depth=2, heads=2, classes=10, mean=(0.2,))


def spec(seed=0, lr=1e-3, **parts):
    data, recipe = Data(train=32, test_per_source=1), Recipe(epochs=1, batch_size=16, lr=lr)
    return RunSpec(network=NETWORK, data=data, recipe=recipe, seed=Seed(data=0, model=seed), **parts)


def load_teacher(teacher):
    return students.build(teacher.network, 9).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Make three finished runs, one of them with a teacher, and one that was never started."""
    store = Store(tmp_path_factory.mktemp("trained") / "runs")
    teacher = Teacher(name="clip_b", profile="mini", network=NETWORK, sha256="0" * 64)
    copy = spec(teacher=teacher, transfer=Transfer(method="copy", layers=(1,)))
    specs = [spec(0), spec(1, lr=2e-3), copy]
    status = cohort.train(specs, store, load_teacher, ExecutionOptions(device="cpu"))
    assert set(status.values()) == {"finished"}
    store.create(spec(7))
    return store, specs


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    """Copy them, with an intact teacher's file."""
    store, specs = trained
    shutil.copytree(store.root, tmp_path / "runs")
    monkeypatch.setattr(sources, "fresh_sha256", lambda path: "0" * 64)
    monkeypatch.chdir(tmp_path)
    return [Store(tmp_path / "runs").run(one) for one in specs]


def verdict(run):
    return audit.verify([run])[0]


# --- reading ----------------------------------------------------------------------------------------------------------

READERS = {
    "weights.safetensors": (lambda run: evaluation.load_subject(run, load_teacher), subjects.of_run),
    "predictions.npz": (predictions.correct,),
    "metrics.jsonl": (lambda run: run.progress(),),
}


@pytest.mark.parametrize("name", READERS)
def test_changed_files_are_not_used(runs, name):
    """Flipped weights still load, as do another run's predictions: only the hash detects it."""
    for read in READERS[name]:
        read(runs[0])
    shutil.copy(runs[1].path / name, runs[0].path / name)
    for read in READERS[name]:
        with pytest.raises(DamagedRunError, match=f"{name} is damaged .its sha256 is not the one in result"):
            read(runs[0])
    older(runs[0])
    if name != "predictions.npz":  # without recorded hashes nothing can be verified
        for read in READERS[name]:
            read(runs[0])


# --- verify -----------------------------------------------------------------------------------------------------------


def test_verify_passes_sound_runs(runs):
    seen = []
    found = audit.verify(runs, lambda done, total: seen.append((done, total)))
    assert [one.state for one in found] == ["sound"] * 3
    assert seen == [(1, 3), (2, 3), (3, 3)]
    out = atdiag("runs", "verify")
    assert out.splitlines()[-1] == "4 runs in runs: 3 sound, 1 unfinished"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["a bit", "half", "gone"])
def test_a_damaged_file_is_named_with_the_remedy(runs, name, how):
    run = runs[0]
    path = run.path / name
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "half":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    code, out = ran("runs", "verify")
    assert code == 1
    first, last = out.splitlines()
    assert first.startswith(f"damaged {run.id}: ")
    assert str(path).removeprefix(f"{run.path.parent.parent}/") in first
    assert f"'atdiag runs remove {run.id}' starts that run afresh" in first
    assert last == "4 runs in runs: 2 sound, 1 damaged, 1 unfinished"


@pytest.mark.parametrize("how", ["gone", "another's"])
def test_a_run_without_spec_is_damaged_everywhere_and_can_be_removed(runs, how):
    path = runs[0].path / "spec.json"
    path.unlink() if how == "gone" else shutil.copy(runs[1].path / "spec.json", path)
    run = type(runs[0])(runs[0].path)
    with pytest.raises(DamagedRunError, match=r"spec\.json is damaged"):
        predictions.correct(run)
    states = {row["run"]: row["state"] for row in json.loads(atdiag("runs", "list", "--json"))}
    assert states[run.id] == "damaged" and len(states) == 4
    assert "removed" in atdiag("runs", "remove", run.id)
    assert not run.path.exists()


@pytest.mark.parametrize("how", ["a bit", "half", "nothing"])
def test_a_damaged_checkpoint_is_found(runs, how):
    run = Store(runs[0].path.parent).run(spec(7))
    torch.save({"step": torch.arange(100)}, run.checkpoint)
    assert verdict(run).state == "unfinished"
    content = bytearray(run.checkpoint.read_bytes())
    content[content.index(torch.arange(100).numpy().tobytes()) + 9] ^= 1
    run.checkpoint.write_bytes({"a bit": content, "half": content[: len(content) // 2], "nothing": b""}[how])
    assert verdict(run).state == "damaged"
    assert verdict(run).faults[0][0] == run.checkpoint


def test_verify_checks_only_the_named_runs(runs):
    runs[0].weights.write_bytes(b"")
    assert atdiag("runs", "verify", runs[1].id[:6]).startswith("1 run in runs: 1 sound")
    assert ran("runs", "verify", runs[0].id[:6], runs[1].id)[0] == 1


def test_a_result_or_spec_of_another_run_is_damaged(runs):
    for name in ("result.json", "spec.json"):
        shutil.copy(runs[1].path / name, runs[0].path / name)
        assert verdict(type(runs[0])(runs[0].path)).state == "damaged"


def test_an_edited_accuracy_is_found(runs):
    path = runs[0].path / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "top1": 99.0}))
    assert verdict(runs[0]).faults == ((path, "it was changed"),)
    assert [row["state"] for row in json.loads(atdiag("runs", "list", "--json"))].count("damaged") == 1
    rewritten(runs[0], lambda result: result.update(top1=99.0))
    assert verdict(runs[0]).faults == ((runs[0].predictions, "it does not agree with result.json"),)


def rewritten(run, change):
    """Change a run's result, and write it like a version that recorded no hash."""
    path = run.path / "result.json"
    result = json.loads(path.read_text())
    change(result)
    result.pop("digest", None)
    path.write_text(json.dumps(result))


def older(run):
    rewritten(run, lambda result: result.pop("files"))


def test_a_run_without_recorded_hashes_is_not_called_sound(runs):
    older(runs[0])
    assert verdict(runs[0]).state == "not verifiable"
    out = atdiag("runs", "verify")
    assert "2 sound, 1 not verifiable (finished by an older version, which recorded no hashes), 1 unfinished" in out
    runs[0].predictions.write_bytes(b"PK nonsense")
    assert verdict(runs[0]).state == "damaged", "what can be seen without hashes is seen"


def test_the_teachers_file_is_verified_where_available(runs, monkeypatch):
    monkeypatch.setattr(sources, "fresh_sha256", lambda path: "1" * 64)
    found = verdict(runs[2])
    assert found.state == "damaged"
    assert found.faults[0][0] == sources.shipped_path("clip_b")
    assert "0" * 12 in found.remedy

    def gone(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(sources, "fresh_sha256", gone)
    assert (verdict(runs[2]).state, verdict(runs[2]).teacher_here) == ("sound", False)
    assert "the teacher's weights of 1 are not on this machine" in atdiag("runs", "verify")


def test_damaged_predictions_on_another_test_set_are_repeated_without_retraining(runs):
    (runs[0].path / "ood").mkdir()
    runs[0].ood("fog").write_bytes(runs[0].predictions.read_bytes()[:-30])
    assert verdict(runs[0]).remedy == "delete it, and it is made again"


def test_nothing_to_verify(tmp_path):
    (tmp_path / "none").mkdir()
    assert "0 runs" in atdiag("runs", "verify", "--runs", tmp_path / "none")


@pytest.mark.parametrize("command", ["list", "verify", "export"])
def test_a_mistyped_runs_folder_is_not_reported_as_sound(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        assert "is not a folder" in wrong(capsys, "runs", command, "--runs", tmp_path / name)


@pytest.mark.parametrize("command", [("verify",), ("diff", "ID"), ("show",)])
def test_an_unknown_id(runs, capsys, command):
    words = [runs[1].id if word == "ID" else word for word in command]
    mistyped = ("f" if runs[0].id[5] != "f" else "e").join([runs[0].id[:5], runs[0].id[6:]])
    assert f"named '{mistyped}': 'atdiag runs list'" in wrong(capsys, "runs", *words, mistyped)


# --- diff and export --------------------------------------------------------------------------------------------------


def test_diff_names_the_fields_that_differ(runs):
    found = json.loads(atdiag("runs", "diff", runs[0].id, runs[1].id, "--json"))
    assert found["runs"] == [runs[0].id, runs[1].id]
    assert found["spec"] == [["recipe.lr", 1e-3, 2e-3], ["seed.model", 0, 1]]
    assert found["environment"] == []
    assert found["results"][0] == ["top1", runs[0].result()["top1"], runs[1].result()["top1"]]
    out = atdiag("runs", "diff", runs[0].id[:8], runs[1].id[:8])
    for word in ("recipe.lr", "0.001", "0.002", "no difference", "top1"):
        assert word in out


def test_diff_of_a_run_with_itself_is_refused(runs, capsys):
    said = wrong(capsys, "runs", "diff", runs[0].id, runs[0].id[:8])
    assert f"{runs[0].id} and {runs[0].id[:8]} are the same run" in said


def test_diff_of_a_run_with_a_teacher_and_one_without(runs):
    found = {name: values for name, *values in run_table.differences(runs[0], runs[2])["spec"]}
    assert found["teacher.sha256"] == [None, "0" * 64]
    assert found["transfer.layers"] == [[], [1]]
    assert "teacher" not in found
    assert not any(name.startswith(("network.", "data.", "recipe.")) for name in found)


def test_diff_shows_the_machines(runs):
    rewritten(runs[0], lambda result: result["environment"]["versions"].update(torch="1.0"))
    now = runs[1].result()["environment"]["versions"]["torch"]
    assert run_table.differences(runs[0], runs[1])["environment"] == [("environment.versions.torch", "1.0", now)]


def test_export_writes_one_table_of_everything(runs, tmp_path, capsys):
    (runs[1].path / "result.json").write_text("{")
    out = atdiag("runs", "export", "-o", tmp_path / "all.csv")
    assert out.splitlines() == ["4 runs", f"  {tmp_path / 'all.csv'}"]
    assert capsys.readouterr().err == "atdiag: 1 run can't be read: 'atdiag runs verify' says why\n"
    text = (tmp_path / "all.csv").read_text()
    assert atdiag("runs", "export") == text
    capsys.readouterr()
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(text))}
    assert len(rows) == 4
    states = {run.id: rows[run.id]["state"] for run in runs}
    assert states == {runs[0].id: "finished", runs[1].id: "damaged", runs[2].id: "finished"}
    row = rows[runs[2].id]
    assert float(row["top1"]) == runs[2].result()["top1"]
    assert json.loads(row["transfer.layers"]) == [1]
    assert row["teacher.name"] == "clip_b"
    assert "teacher" not in row
    assert row["environment.versions.torch"]
    assert row["origin.hardware.cpu"]
    assert rows[spec(7).id]["state"] == "new"
    assert rows[runs[1].id]["data.name"] == ""
    assert "is a folder" in wrong(capsys, "runs", "export", "-o", tmp_path)
    assert "no folder" in wrong(capsys, "runs", "export", "-o", tmp_path / "nowhere" / "all.csv")


def test_validation_accuracy_is_reported_for_runs_that_have_it(runs):
    store = Store(runs[0].path.parent)
    held = spec().model_copy(update={"data": Data(train=32, test_per_source=1, validation=20)})
    assert cohort.train([held], store, load_teacher, ExecutionOptions(device="cpu")) == {held.id: "finished"}
    accuracy = store.run(held).progress()[-1]["validation_top1"]
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(atdiag("runs", "export")))}
    assert float(rows[held.id]["validation_top1"]) == accuracy
    assert rows[held.id]["validation_images"] == "20"
    assert rows[runs[0].id]["validation_top1"] == "" == rows[runs[0].id]["validation_images"]
    found = {name: values for name, *values in run_table.differences(runs[0], store.run(held))["results"]}
    assert found["validation_top1"] == [None, accuracy]
    assert "validation_top1" not in {name for name, *_ in run_table.differences(runs[0], runs[1])["results"]}


def test_nested_specs_are_flattened():
    assert run_table.flat({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}
