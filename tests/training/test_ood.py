"""Finished runs on other test sets: stored predictions against the run's own and explicit formulas."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from atdiag.core.errors import UserError
from atdiag.core.runs import DamagedRunError, Run, Store
from atdiag.core.spec import Data, Init, Network, Recipe, Transfer
from atdiag.data import corruptions, sources, splits, testsets
from atdiag.data.catalogue import CORRUPTIONS, TEST_SETS
from atdiag.networks.model import students
from atdiag.networks.model.vit import ViT
from atdiag.networks.weights import loading
from atdiag.training import evaluation, ood
from atdiag.training.predictions import DamagedPredictionsError, is_stored, read

CPU = torch.device("cpu")
FIELDS = ("prediction", "label", "cluster", "log_p")


def load_teacher(teacher):
    return students.build(teacher.network, 99).eval().requires_grad_(False)


@pytest.fixture
def trained(alone, tmp_path):
    """A copy of the trained company that a test may write into: name -> run."""
    shutil.copytree(alone.store.root, tmp_path / "trained")
    store = Store(tmp_path / "trained")
    return {name: store.run(spec) for name, spec in alone.company().items()}


def sets(*names):
    return testsets.expand(names)


def same(one, two):
    return all(np.array_equal(getattr(one, field), getattr(two, field)) for field in FIELDS)


def test_evaluating_on_the_runs_own_test_set_reproduces_its_predictions(trained, bench):
    as_it_is = bench.spec(
        network=bench.company()["native"].network, init=Init(source="teacher", head=True), recipe=Recipe(epochs=0)
    )
    assert bench.train(as_it_is) == {as_it_is.id: "finished"}
    runs = [*trained.values(), bench.run(as_it_is)]
    assert ood.evaluate_runs(runs, sets("clean"), CPU, load_teacher) == len(runs) == 7
    for run in runs:
        with np.load(run.predictions) as own, np.load(run.ood("clean")) as again:
            assert {field for field in FIELDS if not np.array_equal(own[field], again[field])} == set()
        found = read(run, *sets("clean"))
        assert found.predictions.top1 == run.result()["top1"]
        assert found.among.size == 0
        assert found.about["fingerprint"] is None


@pytest.mark.parametrize("name", ["gaussian_noise:5", "pixelate"])
def test_predictions_on_a_corruption_equal_explicit_evaluation(trained, name):
    (test_set,) = sets(name)
    ood.evaluate_runs(list(trained.values()), [test_set], CPU, load_teacher)
    clean = sources.find(trained["copy"].spec.data).test_split(trained["copy"].spec.data)
    pixels = corruptions.corrupt(clean.pixels, test_set.corruption, test_set.severity, np.arange(len(clean)))
    for name, run in trained.items():
        subject = evaluation.load_subject(run, load_teacher)
        (expected,) = evaluation.predict([subject], splits.Images(pixels, clean.labels, clean.clusters), CPU)
        assert same(read(run, test_set).predictions, expected), name
        with np.load(run.predictions) as own:
            assert np.array_equal(own["cluster"], expected.cluster), "a scene's cluster is still its source digit"
            assert not np.array_equal(own["log_p"], expected.log_p)


def test_a_runs_results_do_not_depend_on_the_other_runs(trained, tmp_path):
    wanted = sets("fog:1", "jpeg")
    ood.evaluate_runs(list(trained.values()), wanted, CPU, load_teacher, together=4)
    for name in ("baseline", "copy"):
        run = trained[name]
        alone = Run(shutil.copytree(run.path, tmp_path / "alone" / run.id, ignore=shutil.ignore_patterns("ood")))
        for test_set in reversed(wanted):
            assert ood.evaluate_runs([alone], [test_set], CPU, load_teacher) == 1
            assert same(read(alone, test_set).predictions, read(run, test_set).predictions), name


def test_nothing_is_evaluated_twice_and_pixels_are_shared(trained, monkeypatch):
    made, asked = [], []
    corrupt = corruptions.corrupt

    def counted(pixels, name, severity, indices):
        made.append((name, int(indices[0])))
        return corrupt(pixels, name, severity, indices)

    def load(teacher):
        asked.append(teacher)
        return load_teacher(teacher)

    monkeypatch.setattr(corruptions, "corrupt", counted)
    runs, wanted, told = list(trained.values()), sets("contrast:2", "occlusion"), []
    assert ood.evaluate_runs(runs[:2], wanted[:1], CPU, load) == 2
    assert ood.evaluate_runs(runs, [*wanted, *wanted], CPU, load, told.append) == 10
    batches = -(-len(sources.find(runs[0].spec.data).test_split(runs[0].spec.data)) // evaluation.BATCH)
    assert len(made) == 3 * batches, "once for all runs, and once more for those that came later"
    assert len(asked) == 2, "a teacher is loaded once for all"
    assert [(p.done, p.total, p.doing) for p in told] == [
        (0, 10, "contrast:2"),
        (4, 10, "occlusion:3"),
        (10, 10, "done"),
    ]

    def never(*_):
        raise AssertionError("evaluated again")

    monkeypatch.setattr(corruptions, "corrupt", never)
    before = {path: path.stat().st_mtime_ns for run in runs for path in (run.path / "ood").iterdir()}
    assert len(before) == 12, "and nothing else is left beside them"
    assert ood.evaluate_runs(runs, wanted, CPU, never) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_stopped_evaluation_resumes(trained):
    run, wanted, told = trained["baseline"], sets("corruptions"), []
    assert ood.evaluate_runs([run], wanted, CPU, load_teacher, told.append, lambda: len(told) == 3) == 3
    assert [is_stored(run, t) for t in wanted] == [True] * 3 + [False] * (len(CORRUPTIONS) - 3)
    assert ood.evaluate_runs([run], wanted, CPU, load_teacher) == len(CORRUPTIONS) - 3


def test_outdated_predictions_are_repeated(trained, monkeypatch):
    run, (test_set,) = trained["baseline"], sets("shot_noise")
    ood.evaluate_runs([run], [test_set], CPU, load_teacher)
    before = read(run, test_set)
    assert before.about["run"] == run.id
    assert before.about["environment"]["versions"] == run.result()["environment"]["versions"]
    monkeypatch.setattr(testsets, "SEMANTICS", testsets.SEMANTICS + 1)
    assert not is_stored(run, test_set)
    with pytest.raises(FileNotFoundError, match="made from other images"):
        read(run, test_set)
    assert ood.evaluate_runs([run], [test_set], CPU, load_teacher) == 1
    assert same(read(run, test_set).predictions, before.predictions)


def _without(path, name):
    with np.load(path) as saved:
        arrays = {key: saved[key] for key in saved if key != name}
    np.savez_compressed(path, **arrays)


DAMAGE = {
    "cut": lambda path, other: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path, other: path.write_bytes(b""),
    "text": lambda path, other: path.write_text("predictions"),
    "one bit": lambda path, other: path.write_bytes(bytes([*path.read_bytes()[:200], 255, *path.read_bytes()[201:]])),
    "without labels": lambda path, other: _without(path, "label"),
    "the run's own": lambda path, other: shutil.copy(path.parents[1] / "predictions.npz", path),
    "another run's": lambda path, other: shutil.copy(other, path),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_named_with_the_remedy(trained, how):
    runs, (test_set,) = [trained["baseline"], trained["distill"]], sets("fog")
    ood.evaluate_runs(runs, [test_set], CPU, load_teacher)
    path = runs[0].ood(test_set.file)
    DAMAGE[how](path, runs[1].ood(test_set.file))
    for call in (lambda: read(runs[0], test_set), lambda: ood.evaluate_runs(runs, [test_set], CPU, load_teacher)):
        with pytest.raises(DamagedPredictionsError, match=rf"{path} is damaged \(.+\): delete it") as fault:
            call()
        assert isinstance(fault.value, DamagedRunError), "the command line knows what to do with it"
    path.unlink()
    assert ood.evaluate_runs(runs, [test_set], CPU, load_teacher) == 1


def test_impossible_evaluations_are_refused_before_any_is_run(trained, bench, monkeypatch):
    (fog,) = sets("fog")
    unfinished = bench.store.create(bench.spec(model_seed=5))
    with pytest.raises(UserError, match=rf"run {unfinished.id} is new, not finished: train it first"):
        ood.evaluate_runs([trained["baseline"], unfinished], [fog], CPU, load_teacher)
    with pytest.raises(UserError, match=r"ImageNet-1k's 1,000 classes, and this one has the 10 of digits"):
        ood.evaluate_runs([trained["baseline"]], sets("fog", "imagenet-a"), CPU, load_teacher)
    assert not is_stored(trained["baseline"], fog)

    def missing(teacher):
        raise loading.WeightsMissingError("no weights here")

    with pytest.raises(UserError, match="copies from its teacher: no weights here"):
        ood.evaluate_runs([trained["copy"]], [fog], CPU, missing)
    assert ood.evaluate_runs([trained["distill"]], [fog], CPU, missing) == 1, "what does not copy needs none"


def test_unreadable_or_non_finite_weights(trained):
    run, (fog,) = trained["baseline"], sets("fog")
    state = load_file(run.weights)
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in state.items()}, run.weights)
    with pytest.raises(DamagedRunError, match="its sha256 is not the one in result"):
        ood.evaluate_runs([run], [fog], CPU, load_teacher)
    result = json.loads((run.path / "result.json").read_text())
    del result["digest"]  # as by a version that recorded no hashes
    run.write("result.json", json.dumps({**result, "files": run.hashes()}))
    with pytest.raises(DamagedRunError, match=r"its outputs on fog:3 are not finite"):
        ood.evaluate_runs([run], [fog], CPU, load_teacher)
    run.weights.write_bytes(run.weights.read_bytes()[:50])
    run.write("result.json", json.dumps({**result, "files": run.hashes()}))
    with pytest.raises(DamagedRunError, match=rf"{run.weights} is damaged"):
        ood.evaluate_runs([run], [fog], CPU, load_teacher)
    assert not is_stored(run, fog)


# --- ImageNet's other test sets ---------------------------------------------------------------------------------------


@pytest.fixture
def photographs(bench, tmp_path, monkeypatch):
    """Make a finished run with ImageNet's classes, and an ImageNet-A of 200 images."""
    network = Network(image_size=24, patch_size=8, channels=3, width=16, depth=2, heads=2, classes=1000)
    spec = bench.spec(network=network, data=Data(name="imagenet", train=1000, image_size=24))
    run = bench.store.create(spec)
    save_file(students.build(network, 3).state_dict(), run.weights)
    run.finish({"top1": 0.0})
    root = tmp_path / "sets" / "imagenet-a"
    draw = np.random.default_rng(0)
    for synset in testsets.synsets()[3::5]:
        (root / synset).mkdir(parents=True)
        Image.fromarray(draw.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(root / synset / "image.png")
    monkeypatch.setenv("ATDIAG_DATA", str(root.parent))
    monkeypatch.setenv("ATDIAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(TEST_SETS, "imagenet-a", replace(TEST_SETS["imagenet-a"], images=200))
    return run, root


def test_predictions_are_among_the_test_sets_200_classes(photographs):
    run, root = photographs
    (test_set,) = sets("imagenet-a")
    ood.evaluate_runs([run], [test_set], CPU, load_teacher)
    found = read(run, test_set)
    network = ViT(run.spec.network).eval()
    network.load_state_dict(load_file(run.weights))
    labels = np.arange(3, 1000, 5)
    files = [root / testsets.synsets()[label] / "image.png" for label in labels]
    pixels = np.stack([np.moveaxis(np.asarray(Image.open(file)), -1, 0) for file in files])
    with torch.no_grad():
        logits = network(torch.from_numpy(pixels).float() / 255).double().numpy()
    kept = logits[:, labels]  # in a smaller problem with only these classes
    log_p = kept - np.log(np.exp(kept).sum(1, keepdims=True))
    assert found.predictions.label.tolist() == labels.tolist()
    assert found.predictions.prediction.tolist() == labels[kept.argmax(1)].tolist()
    assert found.predictions.prediction.tolist() != logits.argmax(1).tolist()
    assert np.abs(found.predictions.log_p - np.diag(log_p)).max() < 1e-5
    assert found.among.tolist() == labels.tolist()
    assert found.about["images"] == 200
    assert len(found.about["fingerprint"]) == 64


def test_labels_outside_of_the_classes_are_refused(photographs):
    run, _ = photographs
    opened = testsets.open_images(*sets("imagenet-a"), run.spec.data)
    subject = evaluation.Predictor(ViT(run.spec.network), Transfer())
    with pytest.raises(ValueError, match="labels of some images are not among"):
        evaluation.predict([subject], opened.images, CPU, among=opened.among[1:])


def test_the_file_is_a_plain_npz_archive(photographs):
    run, _ = photographs
    ood.evaluate_runs([run], sets("imagenet-a"), CPU, load_teacher)
    with np.load(run.path / "ood" / "imagenet-a.npz", allow_pickle=False) as saved:
        assert set(saved) == {*FIELDS, "among", "about"}
        assert json.loads(str(saved["about"]))["test_set"] == "imagenet-a"
        assert {saved[name].dtype for name in ("prediction", "label", "cluster", "among")} == {np.dtype(np.int32)}
