"""Micro-batches: the same gradient and the same result up to rounding, whatever is switched on."""

import pytest
import torch

from atdiag.core.spec import Init, Recipe, Transfer
from atdiag.data.loader import Stream
from atdiag.networks.model import students
from atdiag.training import cohort, evaluation, trainer
from atdiag.transfer.observation import Observation, of_teacher

CPU = torch.device("cpu")

TRANSFERS = {
    "none": Transfer(),
    "copy": Transfer(method="copy", layers=(2, 3)),
    "copy of averaged maps": Transfer(method="copy", layers=(2, 3), average="queries"),
    "distill": Transfer(method="distill", layers=range(6)),
    "distill by jsd": Transfer(method="distill", layers=(0, 1), loss="jsd"),
    "distill by mse": Transfer(method="distill", layers=(0, 1), loss="mse", reduce="mean"),
    "distill queries": Transfer(method="distill", layers=(0, 1), tensor="q"),
    "logits": Transfer(method="logits"),
    "features": Transfer(method="features", layers=(1, 4)),
}


def begin(bench, spec):
    stream = Stream(spec.data, spec.recipe, spec.seed.data)
    teacher = students.build(spec.teacher.network, 99).eval().requires_grad_(False) if spec.teacher else None
    training = trainer.RunTrainer(bench.store.create(spec), spec, teacher, {}, stream.steps_per_epoch, CPU)
    return training, stream.batch(0).to(CPU), teacher


def learn(training, batch, teacher, size):
    for part in batch.parts(size):
        shown = Observation()
        if teacher is not None:
            with torch.no_grad():
                shown = teacher.observe(part.images, of_teacher([training.spec.transfer]))
            shown = evaluation.fit(shown, teacher, training.spec.network)
        training.learn(part, shown, len(part.labels) / len(batch.labels))


@pytest.mark.parametrize("size", [1, 5, 8])
@pytest.mark.parametrize("name", TRANSFERS)
def test_gradients_of_micro_batches_sum_to_the_whole_batchs(bench, name, size):
    """Mixup or CutMix, drop path, label smoothing; 5 does not divide the batch of 16."""
    training, batch, teacher = begin(bench, bench.spec(transfer=TRANSFERS[name]))
    assert batch.partner_labels is not None
    found = []
    for parts in (None, size):
        learn(training, batch, teacher, parts)
        gradients = {n: p.grad.clone() for n, p in training.student.named_parameters() if p.grad is not None}
        found.append((gradients, training._losses.clone(), training._excess.clone()))
        training.forget()
    (whole, losses, excess), (summed, losses_of_parts, excess_of_parts) = found
    assert whole.keys() == summed.keys()
    norm = torch.stack([g.norm() for g in whole.values()]).norm()
    assert all(torch.allclose(whole[n], summed[n], rtol=1e-4, atol=1e-6 * float(norm)) for n in whole)
    assert torch.allclose(losses, losses_of_parts, rtol=1e-5)
    assert torch.allclose(excess, excess_of_parts, rtol=1e-4, atol=1e-6)


def test_runs_in_micro_batches_end_like_others_and_record_it(alone, tmp_path):
    bench = alone.sibling(tmp_path / "parts")
    names = ("baseline", "copy", "distill", "started")
    specs = [alone.company()[name] for name in names]
    assert set(bench.train(*specs, micro_batch=5).values()) == {"finished"}
    for spec in specs:
        one, other = alone.weights(spec), bench.weights(spec)
        # AdamW divides by the gradient's size, so rounding errors in a zero gradient move a weight like any other.
        far = torch.cat([(one[n] - other[n]).abs().flatten() for n in one])
        assert far.mean() < 1e-4 * spec.recipe.lr / 1e-3
        for before, after in zip(alone.run(spec).progress(), bench.run(spec).progress(), strict=True):
            for key in before.keys() - {"seconds"}:
                assert after[key] == pytest.approx(before[key], rel=2e-3), key
        assert alone.run(spec).result()["environment"]["micro_batch"] is None
        assert bench.run(spec).result()["environment"]["micro_batch"] == 5


def test_a_micro_batch_larger_than_the_batch_is_the_batch(bench, alone, assert_same):
    spec = bench.company()["distill"]
    bench.train(spec, micro_batch=1000)
    assert_same(alone, bench, spec)


def test_interrupted_in_micro_batches_and_resumed(bench, assert_same, tmp_path):
    spec, other = bench.company()["copy"], bench.sibling(tmp_path / "whole")
    other.train(spec, micro_batch=6)
    left = iter([False] * 6)
    bench.train(spec, micro_batch=6, should_stop=lambda: next(left, True))
    bench.train(spec, micro_batch=6)
    assert_same(other, bench, spec)


# --- Out of memory ----------------------------------------------------------------------------------------------------


@pytest.fixture
def room_for(monkeypatch):
    """Simulate a device with room for so many images: more raise CUDA's out-of-memory error."""

    def set_(images: int) -> None:
        learn = trainer.RunTrainer.learn

        def limited(self, part, teacher, *how):
            if len(part.labels) > images:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            learn(self, part, teacher, *how)

        monkeypatch.setattr(trainer.RunTrainer, "learn", limited)

    return set_


@pytest.mark.parametrize(
    ("room", "given", "fits"),
    [
        pytest.param(15, None, 8, marks=pytest.mark.slow),
        (3, None, 2),
        pytest.param(1, None, 1, marks=pytest.mark.slow),
        (3, 6, 3),
    ],
)
def test_out_of_memory_suggests_a_micro_batch_that_fits(bench, room_for, room, given, fits):
    room_for(room)
    specs = (
        bench.spec(recipe=Recipe(epochs=1, batch_size=16)),
        bench.spec(recipe=Recipe(epochs=1, batch_size=16), init=Init(source="teacher")),
    )
    with pytest.raises(cohort.OutOfMemoryError) as found:
        bench.train(*specs, micro_batch=given)
    text = f"cpu is out of memory at {given or 16} images at once with 2 runs side by side: `micro_batch` {fits} fits"
    assert str(found.value).startswith(text)
    assert not any(bench.run(spec).finished for spec in specs)
    assert set(bench.train(*specs, micro_batch=fits).values()) == {"finished"}


def test_not_even_one_image_fits(bench, room_for):
    room_for(0)
    with pytest.raises(cohort.OutOfMemoryError, match=r"not even one fits.*more memory"):
        bench.train(bench.spec())
