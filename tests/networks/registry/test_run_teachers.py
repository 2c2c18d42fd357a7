"""A finished run's student as a teacher: the same maps and accuracy, an id that moves with it, and what is refused."""

import shutil

import pytest
import torch

from atdiag.analysis import subjects
from atdiag.core import paths
from atdiag.core.errors import UserError
from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.core.spec import Data, Init, Network, Recipe, RunSpec, Seed, Transfer
from atdiag.networks.registry import preprocessing, sizes, teachers
from atdiag.networks.weights import loading, sources
from atdiag.study.builder import Lab
from atdiag.study.settings import resolve
from atdiag.training import cohort
from tests.commands import SETS, wrong

NETWORK = Network(
    image_size=20, patch_size=4, channels=1, width=16, depth=2, heads=2, classes=10, mean=(0.18,), std=(0.33,)
)
DATA = Data(name="digits", train=64, test_per_source=1, clutter=6)
RECIPE = Recipe(epochs=1, batch_size=16, lr=3e-3, warmup_epochs=0)
CPU = ExecutionOptions(device="cpu")


def spec(teacher=None, method="none", **more):
    transfer = Transfer() if teacher is None else Transfer(method=method, layers=(0, 1))
    seed = Seed(data=0, model=more.pop("model", 0))
    return RunSpec(network=NETWORK, teacher=teacher, transfer=transfer, data=DATA, recipe=RECIPE, seed=seed, **more)


def trained(one, store):
    assert cohort.train([one], store, loading.load, CPU) == {one.id: "finished"}
    return store.run(one)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("of runs") / "runs")


@pytest.fixture(scope="module")
def run(store):
    return trained(spec(), store)


@pytest.fixture(autouse=True)
def here(store):
    paths.runs_are_in(store.root)


@pytest.fixture(scope="module")
def copied(run, store):
    paths.runs_are_in(store.root)
    return trained(spec(teachers.teacher(f"run:{run.id}", "mini"), "copy", model=1), store)


def test_a_run_as_a_teacher_gives_its_own_maps_and_accuracy(run, store):
    teacher = teachers.teacher(f"run:{run.id[:5]}", "mini")
    assert teacher.sha256 == sources.fresh_sha256(run.weights) and teacher.network == NETWORK
    assert teacher.label == f"run {run.id[:6]}"
    images = torch.rand(5, 1, 20, 20, generator=torch.Generator().manual_seed(1))
    theirs, own = loading.load(teacher), subjects.of_run(run).body.network
    for layer, qk in own.maps(images, (0, 1)).items():
        assert torch.equal(theirs.maps(images, (0, 1))[layer].q, qk.q)
        assert torch.equal(theirs.maps(images, (0, 1))[layer].k, qk.k)
    sets = [word for word in SETS if word != "--set"]
    reference = Lab(resolve("mini", 1, sets, store.root)).reference(teacher)
    assert reference.head.rows == tuple(range(10)) and not reference.probed
    assert trained(reference.specs[0], store).result()["top1"] == run.result()["top1"]


@pytest.mark.parametrize(
    "write", [lambda run: f"run:{run.id}", lambda run: str(run.path), lambda run: str(run.weights)]
)
def test_a_run_is_named_by_id_folder_or_weights(run, write):
    typed = write(run)
    assert teachers.teacher(typed, "mini") == teachers.teacher(f"run:{run.id}", "mini")
    assert sizes.network(typed, "mini") == NETWORK
    assert preprocessing.of(typed).image_size == 20
    teachers.glance(typed, "mini", None)


def test_a_run_of_a_moved_store_keeps_its_id_and_finds_its_teacher(run, copied, store, tmp_path):
    moved = Store(tmp_path / "elsewhere")
    for one in (run, copied):
        shutil.copytree(one.path, moved.root / one.id)
    paths.runs_are_in(moved.root)
    again = spec(teachers.teacher(f"run:{run.id}", "mini"), "copy", model=1)
    assert again.id == copied.id and again.teacher.name != copied.spec.teacher.name
    assert moved.run(again).finished
    hidden = run.path.rename(store.root / "hidden")  # as if the store had been moved, not copied
    try:
        found = subjects.find(copied.id, store=moved)
        assert found.spec.id == copied.id and str(moved.root) in found.spec.teacher.name
        maps = found.body.teacher.maps(torch.rand(2, 1, 20, 20), (0,))
        assert maps[0].q.shape == (2, 2, 26, 8)
    finally:
        hidden.rename(run.path)


def test_a_run_that_cannot_teach_is_refused_with_what_to_do(run, copied, store):
    unfinished = store.create(spec(model=7))
    bare = trained(spec(model=8), store)
    bare.weights.unlink()
    wrong_digit = run.id[:9] + ("0" if run.id[9] != "0" else "1")
    for typed, told in (
        (f"run:{copied.id}", f"copies its teacher's maps.*take its teacher, run {run.id[:6]}"),
        (f"run:{unfinished.id}", "is not finished"),
        (f"run:{bare.id}", "has no weights.*runs remove"),
        (str(unfinished.path), "is not finished"),
        ("run:", "names no run"),
        ("run:abc", "too short"),
        (f"run:{wrong_digit}", f"no run in .* did you mean run:{run.id}"),
        ("run:0000000000000000", "no run in .*'atdiag runs list'"),
        (f"rum:{run.id[:8]}", f"did you mean 'run:{run.id[:8]}'"),
        (run.id[:8], f"a run's student is named run:{run.id[:8]}"),
    ):
        with pytest.raises(UserError, match=told):
            teachers.teacher(typed, "mini")
    shutil.copytree(run.path, store.root / (twin := run.id[:-1] + ("0" if run.id[-1] != "0" else "1")))
    with pytest.raises(UserError, match=f"2 runs in .* begin with '{run.id[:8]}'"):
        teachers.teacher(f"run:{run.id[:8]}", "mini")
    shutil.rmtree(store.root / twin)


def test_the_command_line_refuses_it_in_one_line(run, store, capsys, tmp_path):
    line = ["layers", "--runs", store.root, "--out", tmp_path / "out"]
    assert "'atdiag runs list' with --runs " in wrong(capsys, *line, "--teacher", "run:0123456789abcdef")
    names = tmp_path / "names.txt"
    names.write_text("\n".join("0123456789"))
    assert "leave --classes out" in wrong(capsys, *line, "--teacher", f"run:{run.id}", "--classes", names, *SETS)
    assert not (tmp_path / "out").exists()


def test_a_student_starts_from_a_run(run, store):
    teacher = teachers.teacher(f"run:{run.id}", "mini")
    start = RunSpec(
        network=NETWORK,
        teacher=teacher,
        init=Init(source="teacher", head=True),
        data=DATA,
        recipe=RECIPE,
        seed=Seed(data=0, model=0),
    )
    begun = subjects.of_start(store.create(start)).body.network
    for name, tensor in subjects.of_run(run).body.network.state_dict().items():
        assert torch.equal(begun.state_dict()[name], tensor)
