"""Two runs together: the mean of their class probabilities, against explicit numpy."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save as to_safetensors

from atdiag.core.errors import UserError
from atdiag.core.runs import Store
from atdiag.core.spec import Data, Transfer
from atdiag.data import sources
from atdiag.data.splits import Images
from atdiag.networks.model import students
from atdiag.training import ensembles, evaluation
from atdiag.training.evaluation import Predictor
from atdiag.training.predictions import DamagedPredictionsError, about_pair, is_pair_stored, read_pair
from tests.training.conftest import DATA, NETWORK, Bench, load_teacher

CPU = torch.device("cpu")
COPY = Transfer(method="copy", layers=(1, 3))


def probabilities(spec, images):
    """Return a network's class probabilities [n, classes] in float64, computed apart from the code that is tested."""
    student = students.build(spec.network, spec.seed.model).eval()
    pixels = torch.from_numpy(images.batch(0, len(images))).float() / 255
    shown = evaluation.Observation()
    if spec.transfer.method == "copy":
        teacher = load_teacher(spec.teacher)
        seen = evaluation.show(teacher, pixels, evaluation.of_teacher([spec.transfer]))
        shown = evaluation.fit(seen, teacher, spec.network, spec.transfer)
    with torch.no_grad():
        logits = evaluation.methods.forward_test(student, spec.transfer, pixels, shown).double().numpy()
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """Finished runs of untrained students: the second copies its teacher's maps."""
    bench = Bench(Store(tmp_path_factory.mktemp("pairs") / "runs"))
    specs = [bench.spec(0), bench.spec(1, transfer=COPY), bench.spec(2)]
    images = sources.find(DATA).test_split(DATA)
    runs = []
    for spec in specs:
        run = bench.store.create(spec)
        student = students.build(spec.network, spec.seed.model).eval()
        teacher = load_teacher(spec.teacher) if spec.teacher else None
        (found,) = evaluation.predict([Predictor(student, spec.transfer, teacher)], images, CPU)
        run.write("weights.safetensors", to_safetensors(student.state_dict(), {"run": run.id}))
        run.write("predictions.npz", found.to_bytes())
        run.finish({"top1": found.top1})
        runs.append(run)
    return runs, [probabilities(spec, images) for spec in specs], images


@pytest.fixture
def made(once, bench):
    """Return the same in a folder of the test's own."""
    runs, p, images = once
    shutil.copytree(runs[0].path.parent, bench.store.root, dirs_exist_ok=True)
    return [bench.store.run(run.spec) for run in runs], p, images


def test_a_pair_predicts_by_the_mean_of_its_probabilities(made):
    (one, other, third), p, images = made
    assert ensembles.evaluate_pairs([(one, other), (third, one)], CPU, load_teacher) == 2
    for pair, (a, b) in (((one, other), (p[0], p[1])), ((third, one), (p[2], p[0]))):
        found, mean = read_pair(*pair), (a + b) / 2
        assert np.array_equal(found.prediction, mean.argmax(-1))
        np.testing.assert_allclose(found.log_p, np.log(mean[np.arange(len(mean)), images.labels]), atol=1e-5)
        assert np.array_equal(found.label, images.labels)
        assert np.array_equal(found.cluster, images.clusters)
    assert not np.array_equal(read_pair(one, other).prediction, p[0].argmax(-1))


def test_a_pair_is_evaluated_once_and_again_for_other_weights(made, monkeypatch):
    (one, other, third), *_ = made
    apart = ensembles.evaluate_pairs([(one, other), (one, third), (other, third)], CPU, load_teacher, together=2)
    before = one.ensemble(other.id).read_bytes()
    assert apart == 3  # in passes of two runs
    assert ensembles.evaluate_pairs([(one, other)], CPU, None) == 0
    assert not is_pair_stored(other, one)
    one.ensemble(other.id).unlink()
    assert ensembles.evaluate_pairs([(one, other)], CPU, load_teacher) == 1
    assert one.ensemble(other.id).read_bytes() == before  # alone or in company
    other.write("weights.safetensors", to_safetensors(students.build(NETWORK, 9).state_dict(), {"run": other.id}))
    other.finish({"top1": other.result()["top1"]})
    assert not is_pair_stored(one, other)


def test_damage_is_named(made):
    (one, other, _), *_ = made
    ensembles.evaluate_pairs([(one, other)], CPU, load_teacher)
    path, found = one.ensemble(other.id), read_pair(one, other)
    for label, cluster in ((found.label[::-1].copy(), found.cluster), (found.label, found.cluster + 1)):
        path.write_bytes(replace(found, label=label, cluster=cluster).to_bytes(about_pair(one, other)))
        with pytest.raises(DamagedPredictionsError, match=f"{path} is damaged"):
            read_pair(one, other)
    path.write_bytes(b"torn")
    with pytest.raises(DamagedPredictionsError, match="delete it"):
        is_pair_stored(one, other)


def test_what_can_not_be_paired(made, bench):
    (one, *_), *_ = made
    with pytest.raises(UserError, match="not finished: train it first"):
        ensembles.evaluate_pairs([(one, bench.store.run(bench.spec(7)))], CPU, load_teacher)
    elsewhere = bench.store.create(bench.spec(8, data=Data(train=85, test_per_source=2)))
    elsewhere.finish({"top1": 0.0})
    with pytest.raises(UserError, match="not tested on the same images"):
        ensembles.evaluate_pairs([(one, elsewhere)], CPU, load_teacher)


def test_an_ensemble_chooses_among_the_same_classes_as_its_subjects(made):
    _, p, images = made
    few = np.array([2, 3, 7])
    some = np.isin(images.labels, few)
    part = evaluation.sources.find(DATA).test_split(DATA)
    pixels = part.batch(0, len(part))[some]
    own = [Predictor(students.build(NETWORK, seed).eval()) for seed in (0, 2)]
    split = Images(pixels, part.labels[some], part.clusters[some])
    *_, found = evaluation.predict(own, split, CPU, among=few, ensembles=[(0, 1)])
    among = [q[some][:, few] / q[some][:, few].sum(-1, keepdims=True) for q in (p[0], p[2])]
    assert np.array_equal(found.prediction, few[((among[0] + among[1]) / 2).argmax(-1)])
