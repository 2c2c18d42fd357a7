"""The executor that trains in a thread of this process."""

import json

import pytest
import torch
from safetensors.torch import load_file

from atdiag.core.errors import FaultError, UserError
from atdiag.core.runs import Store
from atdiag.execution.inprocess import InProcessExecutor
from atdiag.execution.local import LocalExecutor
from atdiag.execution.plan import Job
from atdiag.execution.run import execute
from tests.execution.specs import ONE, run, study


def same_weights(one: Store, other: Store, specs) -> None:
    for spec in specs:
        here, there = (load_file(store.run(spec).weights) for store in (one, other))
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name], there[name]) for name in here)


@pytest.mark.slow
def test_weights_equal_those_of_the_local_executor(tmp_path, one_worker):
    specs = study("recipe.epochs=1").specs
    here, there, told = Store(tmp_path / "here"), Store(tmp_path / "there"), []
    threads = torch.get_num_threads()
    execute(specs, here, ONE, told.append, executor=InProcessExecutor())
    execute(specs, there, ONE, executor=LocalExecutor())
    trained = [spec for spec in specs if spec.recipe.epochs]
    assert len(trained) == 3
    same_weights(here, there, trained)
    results = [
        json.loads((store.run(spec).path / "result.json").read_text()) for store in (here, there) for spec in specs
    ]
    half = len(specs)
    assert [one["top1"] for one in results[:half]] == [one["top1"] for one in results[half:]]
    assert (told[-1].done, told[-1].total) == (6, 6)  # three runs of two steps each
    assert torch.get_num_threads() == threads


def test_poll_raises_the_cohorts_error(tmp_path):
    missing = run(train=64).model_copy(
        update={"data": run().data.model_copy(update={"name": f"folder:{tmp_path}/gone"})}
    )
    executor = InProcessExecutor()
    executor.submit([Job(((missing,),))], Store(tmp_path / "runs"), ONE)
    with pytest.raises(UserError, match="gone"):
        while executor.poll() is not None:
            pass
    assert executor.poll() is None
    executor.cancel()  # after the end: no effect


def test_a_run_that_diverges_is_named(tmp_path):
    planned, store = study("recipe.epochs=2", "recipe.copy.lr=1e30"), Store(tmp_path)
    scratch, _, copy = (arm.specs[0] for arm in planned.arms)
    with pytest.raises(FaultError, match=f"run {copy.id} stopped at step"):
        execute([scratch, copy], store, ONE, executor=InProcessExecutor())
    assert (store.run(scratch).state, store.run(copy).state) == ("finished", "failed")


@pytest.mark.slow
def test_cancelled_runs_resume_from_their_checkpoints(tmp_path):
    spec = study("recipe.epochs=20").arms[0].specs[0]
    store, unbroken, executor = Store(tmp_path / "runs"), Store(tmp_path / "unbroken"), InProcessExecutor()
    executor.submit([Job(((spec,),))], store, ONE)
    while not (update := executor.poll()).progress.done:
        pass
    assert update.progress.total == 40
    executor.cancel()
    assert store.run(spec).state == "interrupted"
    assert 0 < torch.load(store.run(spec).checkpoint, weights_only=True)["step"] < 40
    assert executor.poll() is None

    told = []
    execute([spec], store, ONE, told.append, executor=executor)
    assert store.run(spec).finished
    assert told[-1].done == 40
    execute([spec], unbroken, ONE, executor=InProcessExecutor())
    same_weights(store, unbroken, [spec])
