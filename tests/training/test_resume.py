"""A run interrupted in any way ends with the weights of the uninterrupted run."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from atdiag.core.runs import Run
from atdiag.core.spec import Recipe
from atdiag.training import checkpoint, cohort

SHORT = Recipe(epochs=1, batch_size=32)


def after(steps):
    """Make a ``should_stop`` that returns True after some steps."""
    left = iter([False] * (steps - 1))
    return lambda: next(left, True)


@given(gaps=st.lists(st.integers(1, 6), min_size=1, max_size=4))
@settings(max_examples=4, phases=[Phase.generate])  # an example takes a second: no shrinking
def test_interruption_at_any_steps_changes_nothing(tmp_path_factory, alone, assert_same, gaps):
    bench = alone.sibling(tmp_path_factory.mktemp("resumed"))
    specs = [alone.company()[name] for name in ("copy", "distill")]
    for gap in gaps:
        status = bench.train(*specs, should_stop=after(gap))
        assert set(status.values()) <= {"interrupted", "finished"}
        for spec in specs:
            assert bench.run(spec).state == status[spec.id]
    assert set(bench.train(*specs).values()) == {"finished"}
    for spec in specs:
        assert_same(alone, bench, spec)


def test_a_run_that_is_ahead_waits_for_its_cohort(bench, alone, assert_same):
    company = bench.company()
    names = ("copy", "started", "native")
    for name, steps in zip(names, (3, 7), strict=False):
        assert bench.train(company[name], should_stop=after(steps)) == {company[name].id: "interrupted"}
    assert set(bench.train(*(company[name] for name in names)).values()) == {"finished"}
    for name in names:
        assert_same(alone, bench, company[name])


CHILD = """
import importlib.util, json, sys, time
from pathlib import Path
import torch
from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.core.spec import RunSpec
from atdiag.training import cohort

torch.set_num_threads(1)
found = importlib.util.spec_from_file_location("conftest", sys.argv[1])
conftest = importlib.util.module_from_spec(found)
sys.modules["conftest"] = conftest
found.loader.exec_module(conftest)

def report(progress):
    print(progress.done, flush=True)
    time.sleep(0.05)

options = ExecutionOptions(device="cpu", checkpoint_seconds=0.0)
specs = [RunSpec.model_validate(document) for document in json.load(sys.stdin)]
cohort.train(specs, Store(Path(sys.argv[2])), conftest.load_teacher, options, report)
"""


def test_being_killed_and_resumed_changes_nothing(bench, alone, assert_same):
    specs = [bench.company()[name] for name in ("baseline", "copy")]
    conftest = __file__.replace("test_resume.py", "conftest.py")
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, conftest, str(bench.store.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        child.stdin.write(json.dumps([spec.model_dump(mode="json") for spec in specs]))
        child.stdin.close()
        for line in child.stdout:
            if int(line) >= 6 and all(bench.run(spec).checkpoint.exists() for spec in specs):
                child.send_signal(signal.SIGKILL)
                break
    assert child.returncode == -signal.SIGKILL
    for spec in specs:
        assert bench.run(spec).state == "interrupted"
        assert 0 < checkpoint.load(bench.run(spec)).step < 10
    assert set(bench.train(*specs).values()) == {"finished"}
    for spec in specs:
        assert_same(alone, bench, spec)


def test_checkpoints_are_written_at_time_intervals(bench, monkeypatch):
    saved = []
    monkeypatch.setattr(cohort.RunTrainer, "save", lambda training: (saved.append(training.step), time.sleep(0.01)))
    spec = bench.spec()
    bench.train(spec, checkpoint_seconds=1e9)
    assert not saved
    bench.train(bench.spec(model_seed=1), checkpoint_seconds=0)
    # At most a twentieth of the time goes into writing.
    assert 1 <= len(saved) < 8
    assert saved == sorted(set(saved))


def files(run: Run):
    return {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.name != "lock"}


def test_a_finished_run_is_not_touched_again(bench):
    old, new = bench.spec(recipe=SHORT), bench.spec(recipe=SHORT, model_seed=1)
    bench.train(old)
    before = files(bench.run(old))
    assert set(bench.train(old, new, load=None).values()) == {"finished"}
    assert files(bench.run(old)) == before


# --- Checkpoints that won't do ----------------------------------------------------------------------------------------


def newer(path):
    torch.save({**torch.load(path, weights_only=True), "version": 99, "more": 1}, path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flipped(path):
    content = bytearray(path.read_bytes())
    weights = torch.load(path, weights_only=True)["student"]["head.weight"].numpy().tobytes()
    content[content.index(weights) + 10] ^= 1  # one bit of one number, which torch.load would not notice
    path.write_bytes(content)


def incomplete(path):
    content = torch.load(path, weights_only=True)
    del content["optimizer"]
    torch.save(content, path)


def another_s(path):
    torch.save({**torch.load(path, weights_only=True), "run": "0123456789abcdef"}, path)


def code(path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"version": checkpoint.VERSION, "step": Evil()}, path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (newer, "another version of atdiag"),
        (cut, "can't be read"),
        (flipped, "can't be read"),
        (incomplete, "can't be read"),
        (code, "can't be read"),
        (another_s, "is the checkpoint of run 0123456789abcdef"),
        (lambda path: path.write_bytes(b""), "can't be read"),
        (lambda path: torch.save([1, 2], path), "can't be read"),
    ],
)
def test_an_unusable_checkpoint_is_refused_and_affects_no_other_run(bench, spoil, message, capsys):
    spec, other = bench.spec(recipe=SHORT), bench.spec(recipe=SHORT, model_seed=1)
    bench.train(spec, should_stop=after(1))
    run = bench.run(spec)
    spoil(run.checkpoint)
    content = run.checkpoint.read_bytes()
    with pytest.raises(ValueError, match=message):
        checkpoint.load(run)
    assert bench.train(spec, other) == {spec.id: "failed", other.id: "finished"}
    assert message in run.failure()["cause"]
    assert f"atdiag runs remove {run.id}" in run.failure()["cause"]
    assert run.checkpoint.read_bytes() == content, "what may be worth something is kept"
    assert "executed" not in capsys.readouterr().out
    run.checkpoint.unlink()
    assert bench.train(spec) == {spec.id: "finished"}
    assert run.failure() is None


# --- Curves -----------------------------------------------------------------------------------------------------------


def test_tensorboard_has_each_metric_once_even_after_a_kill(bench):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    spec = bench.company()["distill"].model_copy(update={"recipe": Recipe(epochs=3, batch_size=16)})
    bench.train(spec, should_stop=after(7))
    early = bench.run(spec).checkpoint.read_bytes()
    bench.train(spec, should_stop=after(4))  # after the second epoch
    bench.run(spec).write("checkpoint", early)  # as if killed before this checkpoint was written
    bench.train(spec)
    events = EventAccumulator(str(bench.run(spec).path / "tensorboard")).Reload()
    lines = bench.run(spec).progress()
    assert [line["step"] for line in lines] == [5, 10, 15]
    tags = {*events.Tags()["scalars"]}
    system = {name for name in tags if name.startswith("system/")}
    assert tags - system == set(lines[0]) - {"epoch", "step"}
    assert {"system/images_per_second", "system/memory_gb"} <= system
    assert all(event.value > 0 for name in system for event in events.Scalars(name))
    assert [event.step for event in events.Scalars("system/images_per_second")] == [5, 10, 15]
    for name in tags - system:
        curve = events.Scalars(name)
        assert [event.step for event in curve] == [5, 10, 15]
        assert [event.value for event in curve] == pytest.approx([line[name] for line in lines], rel=1e-6)
