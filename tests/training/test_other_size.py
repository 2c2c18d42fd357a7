"""Students of another size than their teacher's: what holds for equal ones holds for them."""

import json

import numpy as np
import pytest
import torch

from atdiag.analysis import subjects, tracing
from atdiag.core.spec import Network, Teacher, Transfer
from atdiag.data.splits import Images
from atdiag.execution.plan import cohorts
from atdiag.training import evaluation
from atdiag.transfer import ops, sizes
from atdiag.transfer.observation import CaptureRequest
from tests.training.conftest import NETWORK, RECIPE, load_teacher

BIG = Network.model_validate(
    {
        **NETWORK.model_dump(),
        "width": 24,
        "depth": 8,
        "heads": 4,
        "components": ("registers", "rel_pos_bias"),
        "registers": 2,
    }
)
TEACHER = Teacher(name="big", profile="own", network=BIG, sha256="1" * 64)
COARSE = Network.model_validate({**NETWORK.model_dump(), "patch_size": 5})
SHORT = RECIPE.model_copy(update={"epochs": 1})
EVERY = tuple(range(6))
SOURCES = (1, 2, 3, 5, 6, 7)


def passed(method, rule, **more):
    return Transfer(method=method, layers=EVERY, teacher_layers=SOURCES, teacher_heads=rule, **more)


def company(bench):
    def spec(method, rule, network=NETWORK, **more):
        one = bench.spec(recipe=SHORT, network=network, transfer=Transfer())
        content = {**one.model_dump(), "teacher": TEACHER, "transfer": passed(method, rule, **more)}
        return type(one).model_validate(content)

    return {
        "different": spec("copy", "different"),
        "coarse": spec("copy", "mean", COARSE),
        "coarse distilled": spec("distill", "different", COARSE),
        "averaged": spec("copy", "first", COARSE, average="examples"),
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Each run, trained uninterrupted and alone."""
    from atdiag.core.runs import Store
    from tests.training.conftest import Bench

    bench = Bench(Store(tmp_path_factory.mktemp("other size") / "runs"))
    for spec in company(bench).values():
        assert bench.train(spec) == {spec.id: "finished"}
    return bench


def test_alone_in_company_and_resumed_they_end_with_the_same_weights(trained, assert_same, tmp_path):
    every = company(trained)
    together = trained.sibling("together")
    stops = iter([False, True])
    assert set(together.train(*every.values(), should_stop=lambda: next(stops))) == {one.id for one in every.values()}
    assert {together.run(spec).state for spec in every.values()} == {"interrupted"}
    assert set(together.train(*every.values()).values()) == {"finished"}
    for spec in every.values():
        assert_same(trained, together, spec)
    heads = [trained.weights(spec)["head.weight"] for spec in every.values()]
    assert not any(torch.equal(one, other) for i, one in enumerate(heads) for other in heads[:i])


def test_the_chosen_heads_are_recorded_and_read_again(trained, monkeypatch):
    run = trained.run(company(trained)["different"])
    chosen = run.result()["teacher_heads"]
    assert set(map(int, chosen)) == set(SOURCES)
    assert all(len(set(heads)) == 2 and heads == sorted(heads) and max(heads) < 4 for heads in chosen.values())
    assert len({tuple(heads) for heads in chosen.values()}) > 1  # block by block
    monkeypatch.setattr(sizes, "head_divergence", None)  # not computed anew
    found = evaluation.load_subject(run, load_teacher)
    assert {str(block): list(heads) for block, heads in found.heads.items()} == chosen
    assert "teacher_heads" not in trained.run(company(trained)["coarse"]).result()


@pytest.mark.parametrize("name", ["different", "coarse", "averaged"])
def test_nnsight_sees_the_maps_that_the_teacher_passes(trained, name):
    spec = company(trained)[name]
    body = evaluation.load_subject(trained.run(spec), load_teacher)
    subject = subjects.Subject(name, body, spec.network, spec.data, spec.id, spec)
    pixels = torch.randint(0, 256, (3, 1, 20, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = pixels.float() / 255
    with tracing.Reader(subject) as reader:
        seen = reader(images, tracing.request(subject, ["map"], logits=True))
    taught = load_teacher(TEACHER)
    maps = taught.observe(images, CaptureRequest(maps=frozenset(SOURCES))).seen
    keep = torch.tensor([0, *range(3, BIG.tokens)])
    for layer, source in zip(EVERY, SOURCES, strict=True):
        p = ops.logits(maps[source].qk)[:, :, keep][..., keep].softmax(-1)
        heads = body.heads.get(source, (0, 1))
        p = torch.stack([p[:, :2].mean(1), p[:, 2:].mean(1)], 1) if name == "coarse" else p[:, list(heads)]
        if spec.network.grid != BIG.grid:
            a, c = sizes.regridding(5, 4, 1, torch.device("cpu"))
            p = a @ p @ c
        if name == "averaged":
            p = body.averages[source].p.expand_as(p)
        found = seen.layers[layer].tensor("map")
        assert torch.allclose(found, p, atol=1e-5)
        assert torch.allclose(found.sum(-1), torch.ones(()), atol=1e-5)
    labels = np.zeros(3, dtype=np.int64)
    (again,) = evaluation.predict([body], Images(pixels.numpy(), labels, labels), torch.device("cpu"))
    assert torch.allclose(torch.from_numpy(again.log_p), seen.logits.log_softmax(-1)[:, 0], atol=1e-4)


def test_a_teacher_of_another_image_size_sees_the_same_crop_resized_once(bench):
    taught = load_teacher(TEACHER.model_copy(update={"network": BIG.model_copy(update={"image_size": 16})}))
    images = torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(1))
    wanted = CaptureRequest(maps=frozenset({1}))
    shown = evaluation.show(taught, images, wanted)
    small = torch.nn.functional.interpolate(images, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(shown.seen[1].qk.q, taught.observe(small, wanted).seen[1].qk.q)
    constant = torch.full((1, 1, 20, 20), 0.3)
    assert torch.allclose(sizes.seen_at(constant, 28), torch.full((1, 1, 28, 28), 0.3))


def test_runs_of_one_teacher_at_two_image_sizes_are_no_cohort(bench):
    """Students of two patch sizes meet the same weights at two resolutions."""
    small = TEACHER.model_copy(update={"network": BIG.model_copy(update={"image_size": 16})})
    one = company(bench)["different"]
    other = type(one).model_validate(
        {**one.model_dump(), "teacher": small, "network": COARSE, "transfer": passed("copy", "first")}
    )
    assert [len(group) for group in cohorts([one, other])] == [1, 1]
    with pytest.raises(ValueError, match="share one data stream and one teacher"):
        bench.train(one, other)
    assert bench.train(other) == {other.id: "finished"}  # 4 x 4 patches in both: no map is resampled


def test_the_id_of_a_run_depends_on_the_rule_and_that_of_an_equal_size_does_not(bench):
    every = company(bench)
    assert len({spec.id for spec in every.values()}) == len(every)
    plain = bench.spec(transfer=Transfer(method="copy", layers=EVERY))
    ruled = bench.spec(transfer=Transfer(method="copy", layers=EVERY, teacher_heads="first"))
    assert ruled == plain
    assert ruled.id == plain.id
    assert json.loads(every["coarse"].model_dump_json())["transfer"]["teacher_heads"] == "mean"
