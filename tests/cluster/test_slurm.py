"""SLURM for real: one node, started by :mod:`tests.cluster.one_node`."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from atdiag.core.errors import FaultError, UserError
from atdiag.core.runs import COHORT, Store, file_sha256
from atdiag.execution import plan, slurm, slurm_commands
from atdiag.execution.inprocess import InProcessExecutor
from atdiag.execution.run import execute
from atdiag.execution.slurm import SlurmExecutor
from atdiag.execution.slurm_options import SlurmOptions
from tests.commands import LINES, SETS
from tests.execution.specs import ONE, study

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="SLURM runs on Linux")]

QUICK = SlurmOptions(poll=0.5)
OFTEN = replace(ONE, checkpoint_seconds=0.2)


def scratch(epochs: int, seeds: int = 1):
    """Return runs from scratch, one for each seed: each is a cohort of its own."""
    return list(study(f"recipe.epochs={epochs}", seeds=seeds).arms[0].specs)


def submitted(specs, store: Store, options=QUICK) -> SlurmExecutor:
    executor = SlurmExecutor(options)
    store.root.mkdir(exist_ok=True)
    executor.submit(plan.share_out(specs, 1), store, OFTEN)
    return executor


def wait(executor: SlurmExecutor, seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while executor.poll() is not None:
        assert time.monotonic() < deadline


def until(true, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def command(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def digests(specs, store: Store) -> list[str]:
    return [file_sha256(store.run(spec).weights) for spec in specs]


def test_the_table_is_the_local_one(cluster, tmp_path):
    """``layers --from top --k 6`` gives the same numbers to the digit, trained here and by SLURM."""
    line = [sys.executable, "-m", "atdiag", *LINES["layers"], *SETS, "--seeds", "1", "--json"]
    there = ["--executor", "slurm", "--slurm.poll", "0.5"]
    records = []
    for name, more in (("here", []), ("there", [*there, "--wait"])):
        words = [*line, *more, "--runs", str(tmp_path / name), "--out", str(tmp_path / f"{name}-out")]
        printed = subprocess.run(words, check=True, capture_output=True, text=True, cwd=tmp_path, timeout=600).stdout
        record = json.loads(printed.splitlines()[-1])
        records.append({key: value for key, value in record.items() if key not in ("files", "settle", "figures")})
    here, from_there = (json.dumps(record, sort_keys=True) for record in records)
    assert here.replace(str(tmp_path / "here"), "") == from_there.replace(str(tmp_path / "there"), "")
    # The same line without --wait, once everything is there, shows the table and submits nothing.
    words = [*line, *there, "--runs", str(tmp_path / "there"), "--out", str(tmp_path / "again")]
    again = subprocess.run(words, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert "all finished before" in again
    assert len(list((tmp_path / "there" / "slurm").glob("*/job.sh"))) == 1


def test_twenty_interruptions(cluster, tmp_path):
    """Tasks are cancelled, requeued or killed at random: all end with the weights of uninterrupted runs."""
    specs, chance = scratch(epochs=60, seeds=20), random.Random(0)
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    execute(specs, here, ONE, executor=InProcessExecutor())
    executor = submitted(specs, there)
    root = there.root / "slurm"
    left = {spec.id: chance.choice(("cancel", "requeue", "kill")) for spec in specs}
    done: dict[str, str] = {}
    deadline = time.monotonic() + 1800
    while left:
        assert time.monotonic() < deadline, left
        for name, action in list(left.items()):
            run = next(there.run(spec) for spec in specs if spec.id == name)
            assert not run.finished, f"{name} was too fast to be interrupted"
            if not (run.path / COHORT).exists() or run.state != "training":
                continue
            time.sleep(chance.uniform(0, 1.0))
            task = next((str(one.task) for one in slurm_queue(root) if name in one.runs), None)
            if task is None or run.finished:
                continue
            if action == "kill":
                os.kill(json.loads((run.path / COHORT).read_text())["process"], signal.SIGKILL)
            else:
                command(*(("scancel", task) if action == "cancel" else ("scontrol", "requeue", task)))
            done[name] = left.pop(name)
        if left and not any(one.runs & set(left) for one in slurm_queue(root)):
            pytest.fail(f"{left} were never interrupted")
        time.sleep(0.1)
    while plan.pending(specs, there):
        assert time.monotonic() < deadline
        executor = submitted(specs, there)
        try:
            wait(executor)
        except FaultError as fault:  # what was cancelled or killed: the next round submits it again
            assert "the same command goes on from there" in str(fault)
    assert len(done) == 20
    assert set(done.values()) == {"cancel", "requeue", "kill"}
    assert digests(specs, there) == digests(specs, here)
    begun = [there.run(spec).result()["origin"]["from_step"] for spec in specs]
    assert sum(step > 0 for step in begun) >= 15  # they went on from checkpoints, mostly


def slurm_queue(root: Path):
    return [one for one in slurm.queue(root) if not one.task.ended]


def test_ten_submissions_at_once_train_each_run_once(cluster, tmp_path):
    line = [sys.executable, "-m", "atdiag", *LINES["layers"], *SETS, "--seeds", "1", "--executor", "slurm"]
    words = [*line, "--slurm.poll", "0.5", "--runs", str(tmp_path / "runs")]
    several = [
        subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(10)
    ]
    outputs = [(one.communicate(timeout=300), one.returncode) for one in several]
    assert [code for _, code in outputs] == [0] * 10, outputs
    assert sum("submitted job" in out for (out, _), _ in outputs) == 1
    assert len(list((tmp_path / "runs" / "slurm").glob("*/job.sh"))) == 1
    subprocess.run([*words, "--wait"], check=True, capture_output=True, cwd=tmp_path, timeout=300)
    trained = [path for path in Store(tmp_path / "runs").every() if (path.path / "tensorboard").exists()]
    assert len(trained) == 3
    for run in trained:  # each process that completes an epoch opens its own event file
        assert len(list((run.path / "tensorboard").iterdir())) == 1


def test_near_its_time_limit_a_task_writes_a_checkpoint_and_goes_back_to_the_queue(cluster, tmp_path):
    (spec,), store = scratch(epochs=200), Store(tmp_path / "runs")
    executor = submitted([spec], store)
    task = f"{executor.submitted[0].job}_0"
    until(lambda: store.run(spec).checkpoint.exists())
    command("scancel", "--signal=USR1", "--batch", task)
    wait(executor)
    log = (executor.submitted[0].folder / "task-0.log").read_text()
    assert f"SLURM task {task} goes back to the queue" in log
    assert "start 1" in log
    result = store.run(spec).result()
    assert 0 < result["origin"]["from_step"] < result["steps"] == 400
    execute([spec], Store(tmp_path / "here"), ONE, executor=InProcessExecutor())
    assert digests([spec], store) == digests([spec], Store(tmp_path / "here"))


def test_a_job_that_preempts_it_puts_a_task_back_into_the_queue(cluster, tmp_path):
    """A partition of higher priority takes the node: SLURM ends the task and starts it again after that job."""
    (spec,), store = scratch(epochs=60), Store(tmp_path / "runs")
    executor = submitted([spec], store)
    until(lambda: store.run(spec).checkpoint.exists())
    command("sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3")
    until(lambda: store.run(spec).state == "interrupted")
    wait(executor)
    log = (executor.submitted[0].folder / "task-0.log").read_text()
    assert "start 1" in log
    result = store.run(spec).result()
    assert 0 < result["origin"]["from_step"] < result["steps"] == 120
    execute([spec], Store(tmp_path / "here"), ONE, executor=InProcessExecutor())
    assert digests([spec], store) == digests([spec], Store(tmp_path / "here"))


def test_a_node_that_fails_loses_nothing(cluster, tmp_path):
    (spec,), store = scratch(epochs=100), Store(tmp_path / "runs")
    executor = submitted([spec], store)
    until(lambda: store.run(spec).checkpoint.exists())
    host = command("scontrol", "show", "hostnames").strip() or os.uname().nodename
    command("scontrol", "update", f"nodename={host}", "state=down", "reason=test")
    until(lambda: store.run(spec).state == "interrupted")
    # A node that has registered meanwhile is up already, and SLURM then refuses this.
    subprocess.run(("scontrol", "update", f"nodename={host}", "state=resume"), capture_output=True)
    wait(executor)
    assert store.run(spec).finished
    assert store.run(spec).result()["origin"]["from_step"] > 0


def test_a_node_with_another_source_refuses(cluster, tmp_path, monkeypatch):
    (spec,), store = scratch(epochs=1), Store(tmp_path / "runs")
    monkeypatch.setattr("atdiag.execution.source.digest", lambda: "0" * 64)
    executor = submitted([spec], store)
    with pytest.raises(
        FaultError, match=r"1 run unfinished: .*atdiag here is another .*ordered with 000000000000"
    ) as said:
        wait(executor)
    assert len(str(said.value).splitlines()) == 1
    assert store.run(spec).state == "new"


def test_what_the_cluster_refuses_is_said_in_its_words(cluster, tmp_path):
    store = Store(tmp_path / "runs")
    with pytest.raises(UserError, match=r"invalid partition specified: nix.*may be debug, short"):
        submitted(scratch(1), store, replace(QUICK, partition="nix"))
    assert not list((store.root / "slurm").glob("*/order-0.json"))
    limits = submitted(scratch(1), store, replace(QUICK, partition="short")).submitted[0]
    assert limits.limit == "0:05:00"  # what the partition allows
    command("scancel", limits.job)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"partition": "short", "time": "1:00:00"}, "PartitionTimeLimit"), ({"extra": "--hold"}, "JobHeldUser")],
)
def test_a_job_that_never_starts(cluster, tmp_path, options, reason):
    executor = submitted(scratch(1), Store(tmp_path / "runs"), replace(QUICK, **options))
    with pytest.raises(FaultError, match=rf"does not start by itself \({reason}\): 'scancel (\d+)' removes it"):
        wait(executor, 60)
    command("scancel", executor.submitted[0].job)


def test_a_node_that_does_not_see_the_disk(cluster, tmp_path):
    executor = submitted(scratch(1), Store(tmp_path / "runs"), replace(QUICK, extra="--begin=now+3"))
    folder = executor.submitted[0].folder
    runs = (folder / "runs.json").read_bytes()
    aside = folder.rename(tmp_path / "aside")
    folder.write_text("")  # where the node would write its log, there is no folder
    until(lambda: not any(one.job == executor.submitted[0].job and not one.ended for one in slurm_commands.tasks()))
    folder.unlink()
    aside.rename(folder)
    assert (folder / "runs.json").read_bytes() == runs
    with pytest.raises(FaultError, match=r"wrote no log: does the node see .*runs/slurm/"):
        wait(executor, 60)
