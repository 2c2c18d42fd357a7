"""The prediction is validated as planned, and the rule ships nothing where there is nothing to ship."""

import json
from dataclasses import asdict, replace
from math import log2

import numpy as np
import pytest

from atdiag.analysis import images, statistics, subjects
from atdiag.core.spec import Data
from atdiag.networks.registry import teachers
from atdiag.networks.registry.specimens import specimens
from benchmarks import prediction, prediction_data
from benchmarks.prediction_data import BUDGETS, IMAGES, KINDS, OF_MAPS, TEACHERS, Cell


def made(seed=0):
    """Cells of all teachers at both budgets, and measurements that are noise."""
    draw = np.random.default_rng(seed)
    of = {name: dict(zip(OF_MAPS, draw.normal(size=len(OF_MAPS)), strict=True)) for name in TEACHERS}
    accuracy = {name: draw.uniform(50, 90) for name in of}
    cells = []
    for name, kind in TEACHERS.items():
        for (train, epochs), baseline in zip(BUDGETS, (20.0, 50.0), strict=True):
            whole = (name, kind, "copy", train, epochs, 3, 0, accuracy[name], baseline)
            cells.append(Cell(*whole, gain=0, low=-2, high=2, se=1, log_odds=0, log_odds_low=-1, log_odds_high=1))
    return cells, of


def test_every_teacher_has_one_kind():
    assert sorted(name for names in KINDS.values() for name in names) == sorted([*teachers.miniatures(), *specimens()])


def test_the_rule_ships_no_model_of_noise():
    """Gains go with accuracy and budget, and with kinds and teachers by chance: measurements tell nothing."""
    cells, of = made()
    draw = np.random.default_rng(0)
    shipped = [prediction.shipped(prediction.simulated(cells, of, 0, draw), of, resamples=100) for _ in range(5)]
    assert sum(shipped) == 0


def test_the_rule_ships_a_model_of_what_decides():
    cells, of = made()
    own = prediction.simulated(cells, of, 4, np.random.default_rng(0))
    assert prediction.shipped([replace(one, gain=one.gain - 5) for one in own], of, resamples=500)


def test_a_file_is_enough_to_validate_again(tmp_path, capsys):
    cells, of = made()
    cells = prediction.simulated(cells, of, 1, np.random.default_rng(0))
    content = {"cells": [asdict(one) for one in cells], "measurements": of, "machine": {"python": "3"}}
    (tmp_path / "in.json").write_text(json.dumps(content))
    lines = ["--from", str(tmp_path / "in.json"), "--json", str(tmp_path / "out.json"), "--resamples", "50"]
    prediction.main([*lines, "--figure", str(tmp_path / "a.png")])
    again = json.loads((tmp_path / "out.json").read_text())
    assert [Cell(**one) for one in again["cells"]] == cells and again["machine"] == {"python": "3"}
    found = again["validation"]["copy"]
    assert (found["teachers"], found["kinds"], found["cells"], again["missing"]) == (24, 14, 48, 48)
    by = found["left out"]["kind"]
    for what in ("rank correlation", "sign agreement"):
        model = by[what]["model"][0]
        for name in ("accuracy alone", "always transfers"):
            value, low, high = by[f"advantage in {what}"][name]
            assert value == pytest.approx(model - by[what][name][0], abs=0.002) and low <= value <= high
    assert by["rank correlation"]["always transfers"] == [0, 0, 0]
    known = [one for one in cells if one.low > 0 or one.high < 0]
    gains = sum(one.gain > 0 for one in known) / len(known)
    assert by["sign agreement"]["always transfers"][0] == pytest.approx(gains, abs=0.001)
    assert "copy: 48 cells, 24 teachers, 14 kinds" in capsys.readouterr().out
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_maps_are_measured_as_the_standard_student_is_given_them():
    plain, hub = prediction_data.measured("deit_s"), prediction_data.measured("hub")
    subject, data = subjects.find("deit_s"), Data(name="digits", train=1, clutter=6, test_per_source=4)
    (stats,) = statistics.attention_stats([subject], images.choose(IMAGES, data, subject.network))
    scale = {"entropy": log2(26), "distance": 20.0, "sink": 1.0, "rank": 26.0}
    for name, whole in scale.items():  # nothing is sliced off: atdiag's own statistics
        assert plain[name] == pytest.approx(stats.heads[name].mean() / whole, abs=2e-4)
    assert plain["heads"] == pytest.approx(stats.heads["redundancy"].mean(), abs=2e-4)
    assert plain["lost"] == pytest.approx(0, abs=1e-5)
    assert hub["lost"] > 0.5 and hub["rank"] > 0.7  # what goes through registers is lost, and the identity is left
    assert hub.keys() == plain.keys() == {*OF_MAPS}
