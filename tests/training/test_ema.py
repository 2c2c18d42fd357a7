"""An average of the weights equals its formula, is evaluated and stored, and survives interruptions and errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from atdiag.analysis import subjects
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed, Transfer
from atdiag.data import sources
from atdiag.data.loader import Stream
from atdiag.data.sources import complete
from atdiag.networks.model import students
from atdiag.training import checkpoint, cohort, compiled, evaluation, trainer
from atdiag.transfer.observation import Observation
from tests.photos import draw

CPU = torch.device("cpu")
DECAY = 0.8


def averaged(spec, ema=DECAY):
    return spec.model_copy(update={"recipe": spec.recipe.model_copy(update={"ema": ema})})


def after(steps):
    """Make a ``should_stop`` that returns True after some steps."""
    left = iter([False] * (steps - 1))
    return lambda: next(left, True)


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def trajectory(bench, *specs):
    """Return the checkpoints of runs that are stopped after every step, by spec."""
    found = {spec.id: [] for spec in specs}
    while any(not bench.run(spec).finished for spec in specs):
        bench.train(*specs, should_stop=after(1))
        for spec in specs:
            if not bench.run(spec).finished:
                found[spec.id].append(checkpoint.load(bench.run(spec)))
    return [found[spec.id] for spec in specs]


@pytest.mark.parametrize("name", ["copy", "started", "native"])
def test_the_average_equals_its_formula_and_leaves_training_unchanged(bench, alone, name):
    """Recomputed in float64 from the same run without an average. The copying run has parameters that never change, the
    initialised one starts from its teacher's, the native one has a bias, LayerScale and registers."""
    plain = bench.company()[name]
    spec = averaged(plain)
    own, other = trajectory(bench, spec, plain)
    assert [one.step for one in own] == list(range(1, 10))
    assert all(equal(one.student, two.student) for one, two in zip(own, other, strict=True))
    assert [one.ema for one in other] == [None] * 9
    last = alone.weights(plain)
    assert equal(last, bench.weights(plain))
    begun = bench.sibling("begun").store.create(spec)
    teacher = None
    if spec.teacher:
        teacher = students.build(spec.teacher.network, 99).eval().requires_grad_(False)
    initial = trainer.RunTrainer(begun, spec, teacher, {}, 5, CPU).student.state_dict()
    for key, value in initial.items():
        expected = value.double().numpy()
        for step, weights in enumerate([*(one.student for one in own), last]):
            expected = DECAY * expected + (1 - DECAY) * weights[key].double().numpy()
            found = (own[step].ema if step < 9 else bench.weights(spec))[key].double().numpy()
            assert np.allclose(found, expected, rtol=0, atol=1e-6), (key, step)
        still = torch.equal(last[key], value)
        assert torch.equal(bench.weights(spec)[key], last[key]) == still, "what is never trained is simply equal"
    assert {k: v for k, v in bench.run(spec).progress()[-1].items() if k != "seconds"} == {
        k: v for k, v in alone.run(plain).progress()[-1].items() if k != "seconds"
    }


def test_the_stored_average_is_what_is_tested(bench):
    """Evaluating the stored weights gives the stored predictions bit for bit, not those of the student itself."""
    spec, plain = averaged(bench.spec()), bench.spec()
    bench.train(spec, plain)
    subject = evaluation.load_subject(bench.run(spec), None)
    (found,) = evaluation.predict([subject], sources.find(spec.data).test_split(spec.data), CPU)
    with np.load(bench.run(spec).predictions) as stored, np.load(bench.run(plain).predictions) as other:
        assert np.array_equal(found.log_p, stored["log_p"])
        assert not np.array_equal(found.log_p, other["log_p"])


def test_the_average_is_the_same_alone_and_in_a_cohort(bench, assert_same, tmp_path):
    company = bench.company()
    specs = [averaged(company["copy"]), averaged(company["distill"], 0.99), company["baseline"]]
    one = bench.sibling(tmp_path / "alone")
    for spec in specs:
        one.train(spec)
    assert set(bench.train(*specs[::-1]).values()) == {"finished"}
    for spec in specs:
        assert_same(one, bench, spec)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Train runs uninterrupted on a folder of JPEGs of several sizes with everything random switched on."""
    root = tmp_path_factory.mktemp("photos")
    draw(root, train=13)
    network = Network(image_size=20, patch_size=4, channels=3, width=16, depth=2, heads=2, classes=2)
    recipe = Recipe(
        epochs=3, batch_size=8, flip=True, crop=0.3, erase=0.5, rand_augment="rand-m9-mstd0.5-inc1",
        mixup=0.8, cutmix=1.0, drop_path=0.3, label_smoothing=0.1, ema=0.7,
    )  # fmt: skip
    data = complete(Data(name=f"folder:{root}", train=26, image_size=20))
    return [
        RunSpec(network=network, data=data, recipe=recipe.model_copy(update={"ema": ema}), seed=Seed(data=0, model=0))
        for ema in (0.7, None)
    ]


@pytest.mark.slow
def test_interruption_at_any_step_changes_nothing_with_everything_on(
    bench, photos, assert_same, monkeypatch, tmp_path_factory
):
    """9 steps, 3 per epoch: Mixup, CutMix, drop path, RandAugment, random erasing; resumed with other workers."""
    monkeypatch.setenv("ATDIAG_CACHE", str(tmp_path_factory.mktemp("cache")))
    bench.train(*photos)
    asked = []
    monkeypatch.setattr(cohort, "default_workers", lambda *_: asked.append(2) or 2)

    @given(gaps=st.lists(st.integers(1, 5), min_size=1, max_size=3))
    @settings(max_examples=5, phases=[Phase.generate], deadline=None)
    def check(gaps):
        other = bench.sibling(tmp_path_factory.mktemp("resumed"))
        for gap in gaps:
            other.train(*photos, should_stop=after(gap))
        assert set(other.train(*photos).values()) == {"finished"}
        for spec in photos:
            assert_same(bench, other, spec)

    check()
    assert asked
    assert not equal(*(bench.weights(spec) for spec in photos))


def test_non_finite_steps_do_not_touch_the_average(bench):
    spec = averaged(bench.spec())
    stream = Stream(spec.data, spec.recipe, 0)
    training = trainer.RunTrainer(bench.store.create(spec), spec, None, {}, stream.steps_per_epoch, CPU)
    batch = stream.batch(0).to(CPU)
    training.advance(batch, Observation())
    before = {name: value.clone() for name, value in training.outcome.state_dict().items()}
    batch.images[3, 0, 5, 5] = math.nan
    training.advance(batch, Observation())
    assert training.cause == "the loss became nan"
    assert equal(training.outcome.state_dict(), before)


def test_without_fetching_losses_no_nan_enters_the_average(bench):
    """As on a GPU, where errors are noticed later: the average continues over unchanged weights."""
    spec = averaged(bench.spec())
    stream = Stream(spec.data, spec.recipe, 0)
    training = trainer.RunTrainer(bench.store.create(spec), spec, None, {}, stream.steps_per_epoch, CPU)
    training._fetches_at_once = False
    batch = stream.batch(0).to(CPU)
    training.advance(batch, Observation())
    batch.images[3, 0, 5, 5] = math.nan
    for _ in range(3):
        training.advance(batch, Observation())
    assert all(value.isfinite().all() for value in training.outcome.state_dict().values())
    training.save()
    assert training.cause == "the loss became nan" and training.step == 1
    assert not training.run.checkpoint.exists()


def test_a_non_finite_last_update_fails_a_run_with_an_average_too(bench):
    spec = bench.spec(recipe=Recipe(epochs=1, batch_size=16, lr=1e38, ema=0.5), data=Data(train=16, test_per_source=1))
    assert bench.train(spec) == {spec.id: "failed"}
    assert "not finite" in bench.run(spec).failure()["cause"]


def test_the_average_does_not_share_compiled_blocks(bench, assert_same, monkeypatch, tmp_path):
    spec = averaged(bench.company()["copy"])
    bench.train(spec)
    compile_blocks, seen = compiled.compile_blocks, []
    monkeypatch.setenv(compiled.VARIABLE, "1")
    monkeypatch.setattr(compiled, "compile_blocks", lambda network: compile_blocks(network, "eager"))
    subject = trainer.RunTrainer.subject
    monkeypatch.setattr(trainer.RunTrainer, "subject", lambda self: seen.append(self) or subject(self))
    torch._dynamo.reset()
    other = bench.sibling(tmp_path / "compiled")
    with torch._dynamo.config.patch({}):
        other.train(spec)
    torch._dynamo.reset()
    (training,) = seen
    assert all("forward" in block.__dict__ for block in training.student.blocks)
    assert not any("forward" in block.__dict__ for block in training.outcome.blocks)
    assert_same(bench, other, spec)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def test_analysing_a_checkpoint_uses_its_average(bench):
    spec = averaged(bench.spec())
    bench.train(spec, should_stop=after(3))
    saved = checkpoint.load(bench.run(spec))
    assert not equal(saved.student, saved.ema)
    assert equal(subjects.find(str(bench.run(spec).path)).module.state_dict(), saved.ema)


def test_a_checkpoint_of_the_version_without_averages_can_be_resumed(bench, alone, assert_same):
    spec = bench.company()["distill"]
    bench.train(spec, should_stop=after(3))
    path = bench.run(spec).checkpoint
    content = torch.load(path, weights_only=True)
    assert content.pop("ema") is None and content.pop("run") == spec.id
    torch.save({**content, "version": 1}, path)
    assert checkpoint.load(bench.run(spec)).ema is None
    bench.train(spec)
    assert_same(alone, bench, spec)


@pytest.mark.parametrize("with_average", [True, False])
def test_a_checkpoint_with_a_missing_or_superfluous_average_is_refused(bench, with_average):
    plain = bench.spec()
    spec, other = (averaged(plain), plain) if with_average else (plain, averaged(plain))
    for one in (spec, other):
        bench.train(one, should_stop=after(2))
    content = torch.load(bench.run(other).checkpoint, weights_only=True)
    torch.save(content | {"run": spec.id}, bench.run(spec).checkpoint)
    assert bench.train(spec) == {spec.id: "failed"}
    cause = bench.run(spec).failure()["cause"]
    assert "another recipe" in cause and f"atdiag runs remove {spec.id}" in cause


def test_a_flipped_bit_in_the_average_is_detected(bench):
    spec = averaged(bench.spec())
    bench.train(spec, should_stop=after(2))
    path = bench.run(spec).checkpoint
    content, saved = bytearray(path.read_bytes()), checkpoint.load(bench.run(spec))
    content[content.index(saved.ema["head.weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="can't be read"):
        checkpoint.load(bench.run(spec))


def test_the_stored_weights_have_timms_names(bench):
    spec = averaged(bench.spec(transfer=Transfer(method="copy", layers=(0,))))
    bench.train(spec)
    assert load_file(bench.run(spec).weights).keys() == students.build(spec.network, 0).state_dict().keys()
