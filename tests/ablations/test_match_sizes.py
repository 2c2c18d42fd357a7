"""The match and blockwise ablations with students of another size than their teacher's."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from ablations.blockwise import blockwise
from ablations.match import match
from atdiag.analysis import images, streaming, subjects
from atdiag.core.runs import Store
from atdiag.networks.registry import teachers
from atdiag.networks.weights import loading
from atdiag.study import matching
from atdiag.study.builder import Lab
from atdiag.study.matching import HEAD_BY_HEAD, HEADS_MATCHED, Match, beside
from atdiag.study.settings import resolve
from atdiag.training import evaluation
from atdiag.transfer import sizes
from tests.ablations.test_match import DATA, finished, ticks

TEACHER = teachers.teacher("deit_b", "mini")  # 48 x 12 blocks x 3 heads, 5 x 5 patches


CPU = torch.device("cpu")


def lab(student, *sets) -> Lab:
    small = [f"data.{name}={value}" for name, value in DATA.model_dump(include={"train", "test_per_source"}).items()]
    return Lab(resolve(sets=(*small, *sets), seeds=1, environment={}, student=student))


def trained(tmp_path, study):
    """Return the store and the arms' runs, as they start."""
    store = Store(tmp_path / "runs")
    return store, {arm.name: finished(store, arm.specs[0]) for arm in study.arms}


def given(maps, spec, rule):
    """Return the maps that pass, by the rules' formulas: [images, H, N, N] -> [images, h, n, n]."""
    heads = {"first": [[0], [1]], "repeat": [[0], [0], [1], [1], [2], [2]]}.get(rule) or [[h] for h in rule]
    p = np.stack([maps[:, group].mean(1) for group in heads], 1)
    if spec.network.grid != TEACHER.network.grid:
        a, c = (x.double().numpy() for x in sizes.regridding(TEACHER.network.grid, spec.network.grid, 1, CPU))
        p = a @ p @ c
    return p


@pytest.mark.parametrize(
    ("student", "sets", "blocks", "rule"),
    [
        ("width=16,depth=3,heads=2,patch=5", [], {0: 3, 1: 7, 2: 11}, "first"),
        ("width=24,heads=6,depth=2", ["transfer.teacher_layers=[5,0]"], {0: 5, 1: 0}, "repeat"),
        (
            "width=16,heads=2,depth=4",
            ["transfer.teacher_heads=different", "transfer.layers=top:2", "transfer.teacher_layers=top"],
            {2: 10, 3: 11},
            "different",
        ),
    ],
)
def test_maps_are_compared_with_those_that_pass(tmp_path, student, sets, blocks, rule):
    series = match(lab(student, *sets), "deit_b", "copy,distill")
    (study,) = series.studies
    _, runs = trained(tmp_path, study)
    (measure,) = study.measures
    assert dict(zip(measure.passed.layers, measure.passed.sources, strict=True)) == blocks
    assert any("compared with those that pass" in note for note in series.notes)
    few = Match(TEACHER, 3, measure.passed)
    # A copied student has the maps that pass: nothing is measured.
    assert few.missing(list(runs.values())) == [runs["scratch"], runs["distill"]]
    assert few.numbers(runs["copy"])[HEAD_BY_HEAD] == 0
    few.take([runs["scratch"]], "cpu", ticks)
    found = few.numbers(runs["scratch"])

    spec = runs["distill"].spec
    every = images.choose(0, spec.data, spec.network)
    pictures = images.choose(",".join(str(i * len(every) // 3) for i in range(3)), spec.data, spec.network)
    own = streaming.trace(subjects.of_run(runs["scratch"]), pictures)
    taught = streaming.trace(subjects.loaded(TEACHER, spec.data), pictures)
    chosen = evaluation.chosen_heads(spec, loading.load(TEACHER)) if rule == "different" else {}
    means = []
    for block, source in blocks.items():
        p = given(taught["map", source].double().numpy(), spec, chosen.get(source, rule))
        q = own["map", block].double().numpy()
        assert p.shape == q.shape
        pairs = zip(p.reshape(-1, p.shape[-1]), q.reshape(-1, q.shape[-1]), strict=True)
        means.append(np.mean([jensenshannon(*rows, base=2) ** 2 for rows in pairs]))
        assert found[f"JSD block {block}"] == pytest.approx(means[-1], abs=1e-5)
    assert found[HEAD_BY_HEAD] == pytest.approx(np.mean(means), abs=1e-5)
    assert found[HEADS_MATCHED] <= found[HEAD_BY_HEAD]
    assert sorted(name for name in found if "block" in name) == [f"JSD block {block}" for block in blocks]


def test_each_set_of_rules_has_its_own_measurement(tmp_path):
    def measure(*sets):
        return Match(TEACHER, 2, beside(lab("width=16,depth=2,heads=2", *sets), TEACHER).passed)

    study = match(lab("width=16,depth=2,heads=2"), "deit_b").studies[0]
    _, runs = trained(tmp_path, study)
    one, other = measure(), measure("transfer.teacher_layers=bottom")
    assert one.name != other.name
    one.take([runs["scratch"]], "cpu", ticks)
    assert one.missing([runs["scratch"]]) == []
    assert other.missing([runs["scratch"]]) == [runs["scratch"]]
    assert measure("transfer.teacher_heads=first").missing([runs["scratch"]]) == []  # the default, by its name


def test_heads_that_differ_are_read_from_a_run_that_chose_them(tmp_path, monkeypatch):
    study = match(lab("width=16,depth=2,heads=2", "transfer.teacher_heads=different"), "deit_b").studies[0]
    store, runs = trained(tmp_path, study)
    measure = Match(TEACHER, 2, study.measures[0].passed)
    recorded = {str(block): [0, 2] for block in measure.passed.sources}
    result = {**runs["distill"].result(), "teacher_heads": recorded}
    monkeypatch.setattr(type(runs["distill"]), "result", lambda _: result)
    monkeypatch.setattr(sizes, "head_divergence", None)  # not computed anew
    measure.take([runs["scratch"], runs["distill"]], "cpu", ticks)
    assert store.run(study.arms[0].specs[0]).id == runs["scratch"].id
    assert matching.HEAD_BY_HEAD in measure.numbers(runs["scratch"])


def test_students_of_the_teachers_size_are_measured_as_before():
    assert beside(lab(None), TEACHER) == beside(lab("b"), TEACHER) == Match(TEACHER)
    assert beside(lab(None, "transfer.layers=top:2"), TEACHER) == Match(TEACHER)


def test_single_blocks_of_another_depth():
    study = blockwise(lab("width=16,depth=3,heads=2"), "deit_b").studies[0]
    (measure,) = study.measures
    assert measure.passed.sources == (3, 7, 11)
    assert [arm.specs[0].transfer.sources for arm in study.arms[1:4]] == [(3,), (7,), (11,)]
    assert any("compared with those that pass" in note for note in study.notes)
