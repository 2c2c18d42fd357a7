"""Orders and options survive JSON, or the error says why not."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atdiag.core.options import ExecutionOptions
from atdiag.execution.order import Order
from tests.execution.specs import run

OPTIONS = st.builds(
    ExecutionOptions,
    device=st.sampled_from([None, "cuda", "mps", "cpu"]),
    threads=st.none() | st.integers(1, 64),
    micro_batch=st.none() | st.integers(1, 4096),
    deterministic=st.booleans(),
    data_dir=st.none() | st.text(min_size=1),
    checkpoint_seconds=st.floats(0, 1e6),
)
COHORTS = st.lists(st.lists(st.builds(run, seed=st.integers(0, 9)), min_size=1, max_size=3).map(tuple), max_size=3)


@given(OPTIONS)
def test_options_survive_a_json_round_trip(options):
    document = options.to_json()
    assert set(document) == {field.name for field in fields(ExecutionOptions)}
    assert ExecutionOptions.from_json(json.loads(json.dumps(document))) == options


def test_an_option_of_another_version_is_refused():
    with pytest.raises(TypeError, match="nodes"):
        ExecutionOptions.from_json({**ExecutionOptions().to_json(), "nodes": 4})
    assert ExecutionOptions.from_json({}) == ExecutionOptions()  # fields that an older version did not have


@given(OPTIONS, COHORTS, st.integers(1, 64), st.lists(st.text(), max_size=3))
def test_an_order_survives_a_json_round_trip(options, cohorts, processes, command):
    order = Order(Path("/runs/ä b"), options, processes, tuple(command), tuple(cohorts))
    text = order.to_json()
    assert len(text.splitlines()) == 1  # a worker reads one line
    again = Order.from_json(text)
    assert again == order
    assert [spec.id for cohort in again.cohorts for spec in cohort] == [s.id for cohort in cohorts for s in cohort]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda document: document["options"].update(nodes=4), TypeError),
        (lambda document: document.pop("cohorts"), KeyError),
        (lambda document: document["cohorts"][0][0].update(unknown=1), ValueError),
        (lambda document: document["cohorts"][0][0]["recipe"].update(epochs="many"), ValueError),
    ],
)
def test_an_order_of_another_version_is_refused(change, fault):
    document = json.loads(Order(Path("/runs"), ExecutionOptions(), 1, (), ((run(),),)).to_json())
    change(document)
    with pytest.raises(fault):
        Order.from_json(json.dumps(document))


def test_invalid_orders_are_refused():
    with pytest.raises(ValueError):
        Order.from_json("")
