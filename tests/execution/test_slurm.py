"""Submitting and following with a made-up sbatch and squeue in the PATH."""

import json
import os
import sys
import time

import pytest

from atdiag.core.errors import FaultError, UserError
from atdiag.core.runs import Store
from atdiag.execution import plan, slurm, slurm_commands, slurm_options, source
from atdiag.execution.order import Order
from atdiag.execution.slurm import SlurmExecutor
from atdiag.execution.slurm_options import SlurmOptions
from tests.execution.specs import ONE, run

SBATCH = """#!{python}
import json, pathlib, sys
here = pathlib.Path(__file__).parent
if (here / "refusal").exists():
    sys.exit((here / "refusal").read_text())
calls = json.loads((here / "calls").read_text()) + [sys.argv[1:]]
(here / "calls").write_text(json.dumps(calls))
print(f"{{len(calls)}};cluster")
name = next(word for word in sys.argv if word.startswith("--job-name=")).partition("=")[2]
array = next(word for word in sys.argv if word.startswith("--array=0-"))
tasks = int(array.removeprefix("--array=0-").partition("%")[0]) + 1
with (here / "queue").open("a") as queue:
    for task in range(tasks):
        queue.write(f"{{len(calls)}}_{{task}}|{{name}}|PENDING|Resources||1:00:00\\n")
"""


AWAY = "squeue: error: Unable to contact slurm controller"


class Fake:
    """A scheduler whose state is a file."""

    def __init__(self, folder):
        self.folder = folder

    @property
    def calls(self):
        return json.loads((self.folder / "calls").read_text())

    def flags(self, call=-1):
        return {word.partition("=")[0]: word.partition("=")[2] for word in self.calls[call] if word.startswith("--")}

    def put(self, old, new):
        """Replace a part of what squeue prints."""
        queue = self.folder / "queue"
        queue.write_text(queue.read_text().replace(old, new))

    def refuse(self, text):
        (self.folder / "refusal").write_text(text)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "sbatch": SBATCH.format(python=sys.executable),
        "squeue": f"#!/bin/sh\n[ ! -e {folder}/down ] || {{ echo '{AWAY}' >&2; exit 1; }}\ncat {folder}/queue",
        "sinfo": f'#!/bin/sh\ncase "$*" in *%R*) echo debug; echo long;; *) cat {folder}/limits;; esac',
        "scontrol": "#!/bin/sh\necho 'MaxArraySize            = 4'",
    }
    for name, script in scripts.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    (folder / "calls").write_text("[]")
    (folder / "queue").write_text("")
    (folder / "limits").write_text("debug*|infinite\nshort|5:00\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return Fake(folder)


def submit(specs, store, options=ONE, **given) -> SlurmExecutor:
    executor = SlurmExecutor(SlurmOptions(poll=0.01, **given))
    store.root.mkdir(exist_ok=True)
    executor.submit(plan.share_out(specs, executor.processes(options)), store, options)
    return executor


def follow(executor):
    updates = []
    deadline = time.monotonic() + 20
    while (update := executor.poll()) is not None:
        assert time.monotonic() < deadline
        updates.append(update)
    return updates


SPECS = [run(seed=seed) for seed in range(3)]


def test_what_is_submitted(fake, tmp_path):
    """One task for each cohort, a JSON order for each task, and the flags that the options mean."""
    store = Store(tmp_path / "runs")
    (fake.folder / "limits").write_text("debug*|infinite\n")
    given = {"partition": "debug", "account": "lab", "memory": "8G", "extra": "--exclude=a1 --mail-type=FAIL"}
    executor = submit(SPECS, store, setup=("module load x", "export A=b"), container="apptainer exec a.sif", **given)
    (made,) = executor.submitted
    assert (made.job, made.tasks, made.runs, made.at_once) == ("1", 3, 3, 3)
    flags = fake.flags()
    assert flags["--array"] == "0-2%3"
    asked = [flags[name] for name in ("--partition", "--account", "--mem", "--exclude", "--mail-type")]
    assert asked == ["debug", "lab", "8G", "a1", "FAIL"]
    assert flags["--signal"] == "B:USR1@120"
    assert "--requeue" in flags
    assert "--gres" not in flags  # these runs are trained on a processor
    orders = [Order.from_json((made.folder / f"order-{i}.json").read_text()) for i in range(3)]
    assert sorted(spec.id for order in orders for (spec,) in order.cohorts) == sorted(spec.id for spec in SPECS)
    assert {(order.runs, order.source, order.options.devices) for order in orders} == {
        (store.root, source.digest(), None)
    }
    script = (made.folder / "job.sh").read_text()
    assert script.index("module load x") < script.index("export A=b") < script.index("exec apptainer exec a.sif ")
    assert f"atdiag.execution.worker --notice 120 {made.folder}/order-$SLURM_ARRAY_TASK_ID.json" in script


def test_on_gpus_a_task_has_one_and_devices_divide_cohorts(fake, tmp_path):
    cohort = [run(layers=(layer,), teacher="a") for layer in range(4)]
    options = slurm.replace(ONE, device=None, devices="2")
    submit(cohort, Store(tmp_path / "runs"), options)
    flags = fake.flags()
    assert (flags["--gres"], flags["--cpus-per-task"], flags["--array"]) == ("gpu:1", "8", "0-1%2")
    submit([run(layers=(5,), teacher="a")], Store(tmp_path / "others"), options, gres="gpu:h100:1", cpus=4)
    assert (fake.flags()["--gres"], fake.flags()["--cpus-per-task"]) == ("gpu:h100:1", "4")
    submit([run(layers=(6,), teacher="a")], Store(tmp_path / "more"), options, gres="")
    assert "--gres" not in fake.flags()


def test_an_array_is_split_below_what_the_cluster_allows(fake, tmp_path):
    specs = [run(seed=seed) for seed in range(7)]
    executor = submit(specs, Store(tmp_path / "runs"), throttle=6)
    assert [fake.flags(call)["--array"] for call in range(3)] == ["0-2%2", "0-2%2", "0-0%1"]  # MaxArraySize = 4
    ids = [
        one
        for made in executor.submitted
        for task in json.loads((made.folder / "runs.json").read_text())
        for one in task
    ]
    assert sorted(ids) == sorted(spec.id for spec in specs)


def test_the_time_limit_follows_the_estimate_within_the_partitions(fake, tmp_path):
    store = Store(tmp_path / "runs")
    slow = SlurmExecutor(SlurmOptions(), flops_per_second=1e9)
    slow.submit(plan.share_out([run()], 1), store, ONE)
    needed = slurm.cost.seconds(run(), 1e9)
    assert slurm_options.seconds(fake.flags()["--time"]) == pytest.approx(needed * 1.5 + 900, abs=60)
    (fake.folder / "limits").write_text("debug*|10:00\n")
    submit([run(seed=8)], store)
    assert fake.flags()["--time"] == "0:10:00"
    submit([run(seed=9)], store, time="2-00:00")
    assert fake.flags()["--time"] == "2-00:00"


def test_what_is_queued_is_not_submitted_again(fake, tmp_path):
    store = Store(tmp_path / "runs")
    submit(SPECS[:2], store)
    again = submit(SPECS, store)
    assert [made.runs for made in again.submitted] == [1]
    assert len(fake.calls) == 2
    assert not submit(SPECS, store).submitted
    fake.put("1_0|", "9_0|")
    queued = slurm.queue(store.root / "slurm")
    assert {str(one.task) for one in queued} == {"9_0", "1_1", "2_0"}
    fake.put("PENDING", "CANCELLED")
    assert submit(SPECS, store).submitted[0].runs == 3


def test_it_is_followed_to_the_end(fake, tmp_path):
    store = Store(tmp_path / "runs")
    executor = submit(SPECS, store)
    first = executor.poll()
    assert first.progress.doing == "3 waiting (Resources)"
    fake.put("1_0|", "1_0|")
    for spec in SPECS:
        store.create(spec).finish({})
    updates = follow(executor)
    assert updates[-1].statuses == {spec.id: "finished" for spec in SPECS}
    assert updates[-1].progress.done == updates[-1].progress.total > 0


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ("CANCELLED", "task 1_0 was cancelled"),
        ("NODE_FAIL", "the node of SLURM task 1_0 failed"),
        ("TIMEOUT", "reached its time limit before it could be put in the queue again"),
        ("FAILED", "wrote no log: does the node see "),
        ("FAILED+log", r"ended \(FAILED\): no luck \("),
        ("OUT_OF_MEMORY+log", "out of memory: give more with `slurm.memory`"),
    ],
)
def test_why_a_task_ended(fake, tmp_path, state, says):
    executor = submit(SPECS[:1], Store(tmp_path / "runs"))
    state, log, _ = state.partition("+")
    if log:
        text = 'Traceback:\n  File "x"\natdiag.core.errors.FaultError: no luck\n'
        (executor.submitted[0].folder / "task-0.log").write_text(text)
    fake.put("PENDING", state)
    with pytest.raises(FaultError, match=says) as said:
        follow(executor)
    assert str(said.value).startswith("1 run unfinished: ")
    assert str(said.value).endswith("; the same command goes on from there")
    assert len(str(said.value).splitlines()) == 1


def test_a_failed_run_is_no_lost_one(fake, tmp_path):
    store = Store(tmp_path / "runs")
    executor = submit(SPECS[:1], store)
    store.create(SPECS[0]).fail(3, "the loss became nan")
    fake.put("PENDING", "COMPLETED")
    assert follow(executor)[-1].statuses == {SPECS[0].id: "failed"}


def test_a_scheduler_that_is_away_for_a_while_is_asked_again(fake, tmp_path, monkeypatch):
    executor = submit(SPECS[:1], Store(tmp_path / "runs"))
    (fake.folder / "down").touch()
    for _ in range(4):
        assert executor.poll() is not None
        time.sleep(0.02)
    monkeypatch.setattr(slurm, "_PATIENCE", 0)
    with pytest.raises(FaultError, match="SLURM does not answer: Unable to contact slurm controller"):
        follow(executor)


def test_refusals(fake, tmp_path, monkeypatch):
    store = Store(tmp_path / "runs")
    fake.refuse("sbatch: error: invalid partition specified: nix\nsbatch: error: Batch job submission failed: Nix")
    with pytest.raises(UserError, match=r"SLURM refuses: invalid partition specified: nix; .*may be debug, long"):
        submit(SPECS, store, partition="nix")
    assert [path.name for path in (store.root / "slurm").iterdir()] == ["lock"]
    fake.refuse("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    with pytest.raises(FaultError, match="Socket timed out"):
        submit(SPECS, store)
    with pytest.raises(UserError, match="`per_device` is for the devices of one machine"):
        submit(SPECS, store, slurm.replace(ONE, per_device=2))
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match="there is no squeue on this machine: submit from a login node"):
        submit(SPECS, store)


def test_the_sbatch_of_an_allocation_does_not_inherit_it(monkeypatch, tmp_path, fake):
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1")
    seen = {}

    def ask(*words, environment=None):
        seen.update(environment)
        return "7;here\n"

    monkeypatch.setattr(slurm_commands, "ask", ask)
    assert slurm_commands.submit([], tmp_path) == "7"
    assert "SLURM_MEM_PER_CPU" not in seen
    assert "PATH" in seen


def test_options_from_the_file_and_the_line():
    file = {"partition": "gpu", "cpus": 4, "setup": ["module load x", "true"], "throttle": 9}
    options = SlurmOptions.parse(file, {"cpus": "16", "time": "1-12"})
    assert (options.partition, options.cpus, options.time, options.throttle) == ("gpu", 16, "1-12", 9)
    assert options.setup == ("module load x", "true")
    assert SlurmOptions.parse({"setup": "a\n\nb\n"}, {}).setup == ("a", "b")


@pytest.mark.parametrize(
    ("file", "line", "says"),
    [
        ({"partitoin": "gpu"}, {}, "slurm.partitoin is not known, did you mean 'partition'"),
        ({"cpus": "many"}, {}, "atdiag.toml: slurm.cpus = 'many' is no whole number"),
        ({"cpus": 1.5}, {}, "no whole number"),
        ({}, {"cpus": "0"}, "`slurm.cpus` 0: give 1 or more"),
        ({}, {"time": "soon"}, "`slurm.time` 'soon' is not a time limit: write it as 4:00:00 or 1-12"),
        ({}, {"notice": "9999"}, "`slurm.notice` 9999 is more than an hour"),
        ({}, {"poll": "0"}, "`slurm.poll` 0"),
        ({"setup": [1]}, {}, "is no list of lines"),
        ({"partition": ["a"]}, {}, "is no text on one line"),
        ({}, {"partition": "a\nb"}, "is no text on one line"),
    ],
)
def test_wrong_options(file, line, says):
    with pytest.raises(UserError) as said:
        SlurmOptions.parse(file, line)
    assert says in str(said.value)
