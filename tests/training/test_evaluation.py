import numpy as np
import pytest
import torch

from atdiag.core.spec import Init, Recipe, Transfer
from atdiag.data import sources
from atdiag.networks.model import students
from atdiag.training import cohort, evaluation

CPU = torch.device("cpu")


def test_a_stored_run_reproduces_its_predictions(bench, alone):
    asked = []

    def load_teacher(teacher):
        asked.append(teacher)
        return students.build(teacher.network, 99).eval().requires_grad_(False)

    company = bench.company()
    subjects = {name: evaluation.load_subject(alone.run(spec), load_teacher) for name, spec in company.items()}
    assert asked == [company["copy"].teacher] * 2, "only what copies needs its teacher"
    images = sources.find(company["copy"].data).test_split(company["copy"].data)
    for (name, spec), predictions in zip(
        company.items(), evaluation.predict(list(subjects.values()), images, CPU), strict=True
    ):
        with np.load(alone.run(spec).predictions) as stored:
            for field in ("prediction", "label", "cluster", "log_p"):
                assert np.array_equal(getattr(predictions, field), stored[field]), name
    assert not any(p.requires_grad for subject in subjects.values() for p in subject.network.parameters())


def test_a_copy_student_needs_its_teacher_and_differs_with_its_own_maps(bench, alone):
    spec = bench.company()["copy"]
    subject = evaluation.load_subject(alone.run(spec), lambda teacher: None)
    images = sources.find(spec.data).test_split(spec.data)
    with pytest.raises(ValueError, match="needs its teacher"):
        evaluation.predict([subject], images, CPU)
    (own,) = evaluation.predict([evaluation.Predictor(subject.network, Transfer())], images, CPU)
    with np.load(alone.run(spec).predictions) as stored:
        assert np.abs(own.log_p - stored["log_p"]).max() > 1e-2


def test_zero_epochs_evaluate_the_teacher_itself(bench):
    native = bench.company()["native"].network
    spec = bench.spec(network=native, init=Init(source="teacher", head=True), recipe=Recipe(epochs=0))
    assert bench.train(spec) == {spec.id: "finished"}
    teacher = students.build(native, 99).eval()
    images = sources.find(spec.data).test_split(spec.data)
    (expected,) = evaluation.predict([evaluation.Predictor(teacher)], images, CPU)
    assert bench.run(spec).result()["top1"] == expected.top1
    assert bench.run(spec).progress() == []


def test_predictions_do_not_depend_on_the_batch(alone):
    teacher = students.build(alone.company()["native"].network, 99).eval()
    nets = [students.build(alone.spec().network, seed) for seed in range(2)]
    subjects = [
        evaluation.Predictor(teacher),
        evaluation.Predictor(nets[0], Transfer(method="copy", layers=(5,)), teacher),
        evaluation.Predictor(nets[1], Transfer(method="copy", layers=(0, 2)), teacher),
        evaluation.Predictor(nets[1]),
    ]
    images = sources.find(alone.spec().data).test_split(alone.spec().data)
    together = evaluation.predict(subjects, images, CPU)
    for subject, expected in zip(subjects, together, strict=True):
        (single,) = evaluation.predict([subject], images, CPU)
        assert np.array_equal(single.log_p, expected.log_p)
    assert len({p.log_p.tobytes() for p in together}) == 4


def test_workers_do_not_change_predictions(alone, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH", 100)
    spec = alone.company()["baseline"]
    subject = evaluation.load_subject(alone.run(spec), lambda teacher: None)
    images = sources.find(spec.data).test_split(spec.data)
    (here,), (ahead,) = (evaluation.predict([subject], images, CPU, workers=workers) for workers in (0, 2))
    assert here.to_bytes() == ahead.to_bytes()


def test_a_cohort_evaluates_with_the_default_number_of_workers(bench, monkeypatch):
    asked = []
    real = evaluation.loader.test_batches

    def noted(images, size, workers, pin, *others):
        asked.append(workers)
        return real(images, size, workers, pin, *others)

    monkeypatch.setattr(cohort, "default_workers", lambda images, recipe, device, processes: 2 if recipe is None else 0)
    monkeypatch.setattr(evaluation.loader, "test_batches", noted)
    spec = bench.spec(recipe=Recipe(epochs=1, batch_size=16))
    assert bench.train(spec) == {spec.id: "finished"}
    assert asked == [2]


def test_a_cohort_averages_its_teacher_s_maps_once(bench, monkeypatch, assert_same):
    """Once for each choice of blocks, heads and tokens; each run ends as it does alone."""
    seen = []
    real = evaluation.averages

    def noted(spec, *rest):
        seen.append(spec.id)
        return real(spec, *rest)

    monkeypatch.setattr(evaluation, "averages", noted)
    over = {"layers": (2, 3), "average": "examples"}
    transfers = [Transfer(method="copy", **over), Transfer(method="distill", **over)]
    native = bench.company()["native"].network
    specs = [
        *(bench.spec(seed, transfer=transfer) for seed in (0, 1) for transfer in transfers),
        bench.spec(transfer=Transfer(method="copy", heads=(1,), **over)),
        bench.spec(network=native, transfer=transfers[1]),  # with registers, which the others lack
        bench.spec(),
    ]
    bench.train(*specs)
    assert seen == [specs[i].id for i in (0, 4, 5)]
    alone = bench.sibling("alone")
    for spec in specs[:-1]:
        alone.train(spec)
        assert_same(alone, bench, spec)
    assert len(seen) == 3 + 6
