"""The calibration of diagnose counts what it should."""

import json

import pytest

from benchmarks import diagnosis_calibration, truth


@pytest.mark.parametrize(
    ("specimen", "verdict", "causes", "answer", "false"),
    [
        ("clip_b", "transfers", (), "right", ()),
        ("clip_b", "undecided", (), "undecided", ()),
        ("clip_b", "fails", ("blocks 0-5",), "wrong", ("blocks 0-5",)),
        ("clip_b", "fails", ("block 3", "the start (MLPs)"), "wrong", ("block 3", "the start (MLPs)")),
        ("hub", "fails", ("the architecture", "component registers"), "right", ()),
        ("hub", "fails", ("the architecture", "component registers", "the maps"), "right", ()),
        ("hub", "fails", ("the architecture",), "wrong", ()),
        (
            "hub",
            "fails",
            ("the architecture", "component layer_scale", "component registers"),
            "right",
            ("component layer_scale",),
        ),
        ("weak", "weak teacher", (), "right", ()),
        ("uniform", "fails", ("the maps", "blocks 6-11"), "right", ()),
        ("uniform", "fails", ("the architecture",), "wrong", ("the architecture",)),
    ],
)
def test_answers_are_judged_by_the_truth_table(specimen, verdict, causes, answer, false):
    assert diagnosis_calibration.judge(specimen, verdict, causes) == (answer, false)


def test_every_kind_has_a_truth_and_a_teacher():
    kinds = {*truth.HEALTHY, *truth.DETECTION, *truth.DESCRIPTIVE, *truth.ACCUSATION}
    assert {*truth.DIAGNOSES} <= kinds
    assert len(truth.DIAGNOSES) * truth.DIAGNOSED >= 60


@pytest.mark.slow
def test_a_toy_decides_nothing_and_goes_on_where_it_stopped(tmp_path, capsys):
    line = ["--runs", str(tmp_path / "runs"), "--json", str(tmp_path / "d.json"), "--toy", "--only", "deit_s"]
    diagnosis_calibration.main([*line, "--studies", "1"])
    (one,) = json.loads((tmp_path / "d.json").read_text())["diagnoses"]
    assert (one["verdict"], one["answer"]) == ("undertrained", "wrong")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    diagnosis_calibration.main([*line, "--studies", "1"])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
