"""Analysis of a run while it trains, and of every checkpoint that was kept: similarity over training."""

import shutil

import pandas as pd
import pytest
import torch

from atdiag.analysis import images, similarity, subjects
from atdiag.core.errors import UserError
from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import DamagedRunError, Store
from atdiag.core.spec import Data, Init, Recipe, RunSpec, Seed, Transfer
from atdiag.training import checkpoint, cohort
from tests.studies import lab

DATA = Data(name="digits", train=64, test_per_source=1, clutter=6)


@pytest.fixture(scope="module", params=["distill", "copy"])
def trained(request, tmp_path_factory):
    """A run, finished, of which every checkpoint was copied as it trained; and what was seen of it by its id then."""
    teacher = subjects.teachers.teacher("deit_s", "mini")
    spec = RunSpec(
        network=teacher.network.student(), teacher=teacher, data=DATA, seed=Seed(data=0, model=0),
        recipe=Recipe(epochs=2, batch_size=16, lr=3e-3, warmup_epochs=0),
        transfer=Transfer(method=request.param, layers=tuple(range(12))),
    )  # fmt: skip
    store = Store(tmp_path_factory.mktemp("training") / "runs")
    run, seen, asked = store.run(spec), {}, []

    def stop():
        asked.append(run.state)
        if run.checkpoint.exists():
            step = checkpoint.load(run).step
            shutil.copy(run.checkpoint, run.path / f"step-{step}")
            seen[step] = subjects.find(run.id[:6], store=store)
        return len(asked) % 2 == 0  # stopped and resumed after every other step

    status = "interrupted"
    while status == "interrupted":
        status = cohort.train([spec], store, subjects.loading.load, ExecutionOptions(device="cpu"), should_stop=stop)[
            run.id
        ]
    assert set(asked[:-1]) == {"training"}  # analysed while it was training
    return store, run, seen


def same(a, b):
    return all(torch.equal(x, b.module.state_dict()[name]) for name, x in a.module.state_dict().items())


def test_an_unfinished_run_is_read_from_its_checkpoint_or_a_copy(trained):
    store, run, seen = trained
    assert len(seen) == 3 and not run.checkpoint.exists()
    label = f"{run.id[:6]} {run.spec.transfer.method}"
    for step, at_work in seen.items():
        kept = subjects.find(str(run.path / f"step-{step}"), store=store)
        assert kept.label == at_work.label == f"{label} at step {step}"
        assert same(kept, at_work) and kept.transfer == run.spec.transfer
    first, *_, last = seen.values()
    assert not same(first, last)
    assert subjects.find(run.id, store=store).label == label  # finished, with the copies still beside it
    assert [one.id for one in store.list()] == [run.id]


def test_similarity_over_training_takes_one_pass(trained):
    store, run, seen = trained
    teacher = subjects.find("deit_s")
    steps = sorted(seen)
    references = [f"start:{run.id}", *(str(run.path / f"step-{step}") for step in steps), run.id]
    curve = [subjects.find(reference, store=store) for reference in references]
    found = similarity.similarity(teacher, curve, images.choose(16, DATA, teacher.network))
    frame = pd.concat([one.frame() for one in found])
    by = frame[frame.rows == "all"].groupby("b", sort=False).jsd_optimal.mean()
    assert list(by.index) == [one.label for one in curve] and by.index.is_unique
    if run.spec.transfer.method == "copy":  # its own map is its teacher's from the first step on
        assert by.iloc[0] > 0.1 and (by.iloc[1:] == 0).all()
    else:
        assert by.is_unique and by.iloc[-1] < by.iloc[0] - 0.01


def test_a_run_without_a_checkpoint_is_refused_in_one_line(trained, tmp_path):
    _, run, _ = trained
    store = Store(tmp_path / "runs")
    new = store.run(run.spec)
    new.path.mkdir(parents=True)
    shutil.copy(run.path / "spec.json", new.path)
    for reference in (run.id, str(new.path)):
        with pytest.raises(UserError, match=f"run {run.id} is not finished and has no checkpoint yet"):
            subjects.find(reference, store=store)
    (new.path / "checkpoint").write_bytes(b"half")
    with pytest.raises(DamagedRunError, match=f"checkpoint is damaged .*'atdiag runs remove {run.id}'"):
        subjects.find(run.id, store=store)


def test_damaged_run_files_give_the_same_message_everywhere(trained, tmp_path):
    _, run, _ = trained
    store = Store(tmp_path / "runs")
    new = store.run(run.spec)
    shutil.copytree(run.path, new.path)
    advice = f"is damaged .*'atdiag runs remove {run.id}' starts that run afresh"
    whole = new.weights.read_bytes()
    new.weights.write_bytes(whole[:-100])
    for reference in (run.id, str(new.path), str(new.weights)):
        with pytest.raises(DamagedRunError, match=f"weights.safetensors {advice}"):
            subjects.find(reference, store=store)
    new.weights.unlink()
    with pytest.raises(DamagedRunError, match="it is missing"):
        subjects.find(run.id, store=store)
    new.weights.write_bytes(whole)
    (new.path / "result.json").unlink()
    with pytest.raises(
        UserError, match=r"is not finished: .*result\.json is not there: the same experiment finishes it"
    ):
        subjects.find(run.id, store=store)
    assert subjects.find(str(new.weights), store=store).spec == run.spec  # as they are
    (new.path / "spec.json").write_text("{")
    for reference in (run.id, str(new.path)):
        with pytest.raises(DamagedRunError, match=f"spec.json {advice}"):
            subjects.find(reference, store=store)


def test_the_run_of_a_teachers_own_accuracy_is_not_called_fine_tuned():
    source = lab().teacher("deit_s")
    (reference,) = lab().reference(source).specs
    (tuned, *_) = lab().arm("tuned", source.network, source, Init(source="teacher")).specs
    assert subjects._kind(reference) == "teacher itself"
    assert subjects._kind(tuned) == "fine-tuned"
