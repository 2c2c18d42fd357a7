"""A training process with an order on its standard input, or in a file."""

import json
import subprocess
import sys

import pytest
import torch

from atdiag.core.runs import Store
from atdiag.execution.order import Order
from tests.execution.specs import ONE, study

WORKER = [sys.executable, "-P", "-m", "atdiag.execution.worker"]


def order(tmp_path, epochs: int) -> tuple[Order, Store]:
    spec = study(f"recipe.epochs={epochs}").arms[0].specs[0]
    return Order(tmp_path / "runs", ONE, 1, ("atdiag", "reinit"), ((spec,),)), Store(tmp_path / "runs")


@pytest.mark.slow
def test_an_order_in_a_file_runs_independently(tmp_path):
    what, store = order(tmp_path, epochs=2)
    file = tmp_path / "order.json"
    file.write_text(what.to_json())
    done = subprocess.run([*WORKER, file], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (spec,) = what.cohorts[0]
    assert store.run(spec).finished
    assert json.loads((store.run(spec).path / "result.json").read_text())["steps"] == 4
    updates = [json.loads(line) for line in done.stdout.splitlines()]
    assert updates[-1]["statuses"] == {spec.id: "finished"}
    assert (updates[-1]["progress"]["done"], updates[-1]["progress"]["total"]) == (4, 4)


def test_an_order_on_standard_input_stops_when_the_input_ends(tmp_path):
    what, store = order(tmp_path, epochs=1000)
    done = subprocess.run(WORKER, input=what.to_json() + "\n", capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    (spec,) = what.cohorts[0]
    assert store.run(spec).state == "interrupted"
    assert torch.load(store.run(spec).checkpoint, weights_only=True)["step"] < 2000
