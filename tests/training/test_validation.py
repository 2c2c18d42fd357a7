"""Accuracy on the validation part: measured every epoch on the network that would be tested."""

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from atdiag.core.spec import Data
from atdiag.data import embedded, sources
from atdiag.training import checkpoint, evaluation
from tests.training.conftest import RECIPE, load_teacher

CPU = torch.device("cpu")
DATA = Data(train=85, test_per_source=1, validation=300)
AVERAGED = RECIPE.model_copy(update={"ema": 0.8})


def after(steps):
    """Make a ``should_stop`` that returns True after some steps."""
    left = iter([False] * (steps - 1))
    return lambda: next(left, True)


def validated(bench, data=DATA):
    """Make runs of one cohort: without a teacher, with an average of the weights, with a teacher at test time."""
    company = bench.company()
    made = {name: company[name].model_copy(update={"data": data}) for name in ("baseline", "copy", "distill")}
    return made | {"averaged": bench.spec(model_seed=3, recipe=AVERAGED, data=data)}


def by_hand(spec, subject):
    """Compute a subject's accuracy on a spec's validation part, in per cent."""
    images = sources.find(spec.data).validation_split(spec.data, spec.seed.data)
    (found,) = evaluation.predict([subject], images, CPU)
    return 100 * np.mean(found.prediction == images.labels)


def numbers(bench, spec):
    return [line["validation_top1"] for line in bench.run(spec).progress()]


@pytest.mark.slow
def test_validation_accuracy_is_the_same_in_a_cohort_alone_resumed_and_by_hand(bench, assert_same, tmp_path):
    specs = validated(bench)
    assert set(bench.train(*specs.values()).values()) == {"finished"}
    alone, resumed = bench.sibling(tmp_path / "alone"), bench.sibling(tmp_path / "resumed")
    for steps in (2, 3, 2):  # also stopped exactly at the end of an epoch
        resumed.train(*specs.values(), should_stop=after(steps))
    resumed.train(*specs.values())
    for spec in specs.values():
        alone.train(spec)
        for other in (alone, resumed):
            assert_same(bench, other, spec)  # with the metrics
        run, found = bench.run(spec), numbers(bench, spec)
        assert len(found) == spec.recipe.epochs
        subject = evaluation.load_subject(run, load_teacher)
        assert found[-1] == run.result()["validation_top1"] == pytest.approx(by_hand(spec, subject))
        assert run.result()["validation_images"] == 300
        events = EventAccumulator(str(run.path / "tensorboard"))
        events.Reload()
        assert [event.value for event in events.Scalars("validation_top1")] == pytest.approx(found)


@pytest.mark.parametrize("name", ["baseline", "averaged"])
def test_validation_accuracy_is_that_of_each_epochs_weights(bench, name):
    """The weights in the checkpoint after the first epoch; the average if there is one."""
    spec = validated(bench)[name]
    bench.train(spec, should_stop=after(5))
    saved = checkpoint.load(bench.run(spec))
    assert saved.step == 5
    bench.train(spec)
    subject = evaluation.load_subject(bench.run(spec), load_teacher)
    subject.network.load_state_dict(saved.weights)
    assert numbers(bench, spec)[0] == pytest.approx(by_hand(spec, subject))


def test_validation_does_not_change_training(bench, monkeypatch):
    """The same run with and without validation, on the same images: weights, predictions and losses are equal."""
    specs = validated(bench)
    bench.train(*specs.values())
    other = bench.sibling("unmeasured")
    monkeypatch.setattr(embedded.EmbeddedSet, "validation_split", lambda *_: None)
    other.train(*specs.values())
    for spec in specs.values():
        one, two = bench.weights(spec), other.weights(spec)
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert bench.run(spec).predictions.read_bytes() == other.run(spec).predictions.read_bytes()
        left, right = (b.run(spec).progress() for b in (bench, other))
        skip = {"seconds", "validation_top1"}
        assert [{k: v for k, v in line.items() if k not in skip} for line in left] == [
            {k: v for k, v in line.items() if k not in skip} for line in right
        ]


def test_without_a_validation_part_none_is_reported(alone):
    run = alone.run(alone.company()["baseline"])
    assert all("validation_top1" not in line for line in run.progress())
    assert not {"validation_top1", "validation_images"} & run.result().keys()
