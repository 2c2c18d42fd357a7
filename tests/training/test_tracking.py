"""Training in W&B, against the real package, offline: no test talks to anybody."""

import json
import struct
import time

import pytest

from atdiag.core import asked
from atdiag.core.errors import UserError
from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed, Teacher, Transfer
from atdiag.networks.model import students
from atdiag.training import cohort, tracking
from tests.commands import LINES, wrong

NETWORK = Network(image_size=20, patch_size=4, channels=1, width=16, depth=2, heads=2, classes=10, mean=(0.2,))
DATA, RECIPE = Data(train=32, test_per_source=1), Recipe(epochs=2, batch_size=16)
SCRATCH = RunSpec(network=NETWORK, data=DATA, recipe=RECIPE, seed=Seed(data=0, model=0))
TEACHER = Teacher(name="clip_b", profile="mini", network=NETWORK, sha256="0" * 64)
COPY = SCRATCH.model_copy(update={"teacher": TEACHER, "transfer": Transfer(method="copy", layers=(1,))})
OPTIONS = ExecutionOptions(device="cpu", track="wandb")


def load_teacher(teacher):
    return students.build(teacher.network, 9).eval().requires_grad_(False)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DIR", "WANDB_PROJECT", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    return Store(tmp_path / "runs")


def records(content):
    """Yield the records of W&B's file: LevelDB's log format after a header of 7 bytes, in blocks of 32 KiB."""
    place, whole = 7, b""
    while place + 7 <= len(content):
        left = 32_768 - place % 32_768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a record in one piece, or the last piece of one
            yield whole
            whole = b""


def values(items):
    return {one.key or "/".join(one.nested_key): json.loads(one.value_json) for one in items}


def settled(path):
    """Return a file's content once W&B's own process, which writes behind ours, has written it."""
    content = path.read_bytes()
    for _ in range(100):
        time.sleep(0.2)
        before, content = content, path.read_bytes()
        if len(content) == len(before) > 7:
            break
    return content


def read(path):
    """Return what W&B wrote of a run: its record, the history by step, and the last summary."""
    from wandb.proto import wandb_internal_pb2

    run, history, summary = None, {}, {}
    for data in records(settled(path)):
        record = wandb_internal_pb2.Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
        elif kind == "history":
            line = values(record.history.item)
            history[line["_step"]] = line
        elif kind == "summary":
            summary |= values(record.summary.update)
    return run, history, summary


def test_a_cohort_is_shown_run_by_run_and_a_resumed_run_in_its_place(offline):
    asked.record(offline, "layers", {"scratch": [SCRATCH.id], "all blocks": [COPY.id]})
    stops = iter([False] * 2)
    status = cohort.train([SCRATCH, COPY], offline, load_teacher, OPTIONS, should_stop=lambda: next(stops, True))
    assert set(status.values()) == {"interrupted"}, "after the first epoch"
    assert set(cohort.train([SCRATCH, COPY], offline, load_teacher, OPTIONS).values()) == {"finished"}
    for spec, arm, tags in ((SCRATCH, "scratch", ["scratch"]), (COPY, "all blocks", ["all blocks", "clip_b (mini)"])):
        files = offline.root.glob(f"wandb/offline-run-*/run-{spec.id}.wandb")
        before, after = sorted(files, key=lambda path: path.stat().st_mtime)
        for path in (before, after):
            run = read(path)[0]
            assert (run.run_id, run.project, run.run_group) == (spec.id, "atdiag", "layers")
            assert run.display_name == f"{arm}, seed 0"
            assert sorted(run.tags) == sorted(tags)
        lines = offline.run(spec).progress()
        _, history, summary = read(after)
        assert [*history] == [line["step"] for line in lines] == [2, 4]
        for line in lines:
            assert {name: history[line["step"]][name] for name in line if name != "step"} == {
                name: value for name, value in line.items() if name != "step"
            }
            assert history[line["step"]]["system/images_per_second"] > 0
        assert summary["top1"] == offline.run(spec).result()["top1"]
        assert [*read(before)[1]] == [2]
    assert len(offline.list()) == 2, "W&B's folder is no run"


def test_numbers_that_are_there_already_are_not_sent_again(offline):
    offline.create(SCRATCH)
    shown = tracking.WandbRun(offline.run(SCRATCH))
    shown._from = 3  # as a run that is resumed online says
    shown.log({"loss": 1.0}, 2)
    shown.log({"loss": 2.0}, 4)
    shown.close()
    (path,) = offline.root.glob("wandb/offline-run-*/*.wandb")
    assert {step: line["loss"] for step, line in read(path)[1].items()} == {4: 2.0}


def test_training_goes_on_where_wandb_does_not_answer(offline, monkeypatch):
    import wandb

    def fail(**given):
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.warns(UserWarning, match=r"is not shown in W&B \(no network\)"):
        assert cohort.train([SCRATCH], offline, load_teacher, OPTIONS) == {SCRATCH.id: "finished"}


def test_a_place_that_can_not_be_used_is_said_before_anything(offline, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = wrong(capsys, *LINES["layers"], "--track", "wandbb")
    assert said.startswith("--track 'wandbb' is unknown, did you mean 'wandb'?")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match="nobody is logged in to W&B: type wandb login, or set WANDB_MODE=offline"):
        tracking.check("wandb")
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match=r"needs the package wandb: type pip install 'atdiag\[wandb\]'"):
        tracking.check("wandb")
    assert tracking.check(None) is None
