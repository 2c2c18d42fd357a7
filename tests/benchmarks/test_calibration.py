"""The calibration counts what it should, and goes on where it was stopped."""

import json
from dataclasses import replace

import pytest

from ablations import found
from atdiag.networks.registry.specimens import specimens
from benchmarks import calibration, truth

ASKED = calibration.Plan(studies=2, sets=calibration.TOY)


def answers(*wrong: tuple[str, str, int, str]) -> list[calibration.Answer]:
    """All answers of two studies, right but for some: specimen, command, study, verdict."""
    out = []
    said = {key: verdict for *key, verdict in wrong for key in [tuple(key)]}
    for study in range(2):
        for one in truth.TRUTH:
            verdict = said.get((one.specimen, one.command, study), one.verdict)
            kind = calibration.compare(verdict, one.verdict)
            seeds = 4 if kind == "right" else None
            own = calibration.teacher(one.specimen, study)
            cell = (one.specimen, one.command, study, verdict, one.verdict, kind, own, seeds, 2.0)
            out.append(calibration.Answer(*cell))
    return out


def test_all_right():
    both = calibration.denominators(answers(), ASKED)
    assert both["detection"]["right_of_decided"] == both["detection"]["right_of_all"]
    assert both["detection"]["right_of_all"]["count"] == both["detection"]["right_of_all"]["of"] == 14
    assert (both["false_accusations"]["count"], both["false_accusations"]["of"]) == (0, 14)
    assert both["detection"]["missing"] == both["false_accusations"]["missing"] == 0


def test_one_wrong_row_makes_a_study_wrong_and_one_undecided_takes_it_from_the_decided():
    made = answers(("weak", truth.COPY, 0, found.FAILS), ("sharp", truth.DISTILL, 1, found.UNDECIDED))
    found_ = calibration.denominators(made, ASKED)["detection"]
    assert (found_["right_of_decided"]["count"], found_["right_of_decided"]["of"]) == (12, 13)
    assert (found_["right_of_all"]["count"], found_["right_of_all"]["of"]) == (12, 14)


def test_accusations_of_the_healthy_and_of_decoys():
    made = answers(
        ("clip_b", truth.RESCUE, 0, found.fails_by("pre_norm")),
        ("deit_s", truth.COPY, 0, found.UNDECIDED),
        ("hub", truth.RESCUE, 1, found.fails_by("registers", "layer_scale")),
    )
    assert calibration.denominators(made, ASKED)["false_accusations"]["count"] == 2


def test_what_was_not_run_is_missing():
    made = [a for a in answers() if (a.specimen, a.command) != ("hub", truth.RESCUE)]
    both = calibration.denominators(made, ASKED)
    assert (both["detection"]["missing"], both["false_accusations"]["missing"]) == (2, 2)
    table = {(row["specimen"], row["command"]): row for row in calibration.rows(made, ASKED)}
    assert table["hub", truth.RESCUE]["missing"] == 2
    assert table["hub", truth.RESCUE]["rate"] == {"count": 0, "of": 0}
    assert (table["weak", truth.COPY]["right"], table["weak", truth.COPY]["seeds"]) == (2, 4)


def test_wilson():
    """Newcombe 1998, table I: 81 of 263."""
    assert calibration.rate(81, 263)["interval"] == [25.5, 36.6]


def test_studies_have_seeds_and_scenes_of_their_own():
    labs = [ASKED.lab(study) for study in range(2)]
    seeds = [{seed.data for seed in lab.settings.seeds} for lab in labs]
    assert not seeds[0] & seeds[1]
    assert [lab.settings.profile.data.test_draw for lab in labs] == [1, 2]
    assert ASKED.lab(1, 3).settings.seeds == labs[1].settings.seeds[:3]


def test_pre_trainings_of_one_kind_take_turns():
    assert [calibration.teacher("hub", study) for study in range(4)] == ["hub", "hub_2", "hub_3", "hub"]
    assert {calibration.teacher(name, 5) for name in ("sharp", "deit_s")} == {"sharp", "deit_s"}


def test_every_cell_can_be_planned():
    for one in truth.TRUTH:
        for turn in range(3):
            own = specimens().get(calibration.teacher(one.specimen, turn))
            if own is not None and not own.file.exists():
                continue  # a further pre-training that is not there yet
            study = calibration.make(ASKED.lab(turn), one.specimen, one.command, turn)
            assert len(study.arms) >= 2


@pytest.mark.slow
def test_a_toy_calibration_is_interrupted_goes_on_and_decides_nothing(tmp_path, capsys):
    file = tmp_path / "calibration.json"
    line = ["--toy", "--studies", "1", "--seeds", "3", "--only", "weak", "--runs", str(tmp_path / "runs")]
    calibration.main([*line, "--json", str(file), "--budget", "0"])
    assert not file.exists()
    calibration.main([*line, "--json", str(file)])
    content = json.loads(file.read_text())
    assert [(a["command"], a["answer"]) for a in content["answers"]] == [
        (truth.COPY, "undecided"),
        (truth.DISTILL, "undecided"),
    ]
    before = file.read_text()
    calibration.main([*line, "--json", str(file)])  # all is known
    assert file.read_text() == before
    assert " 1 undecided  0 missing" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="answers to other studies"):
        calibration.main(["--toy", "--json", str(file)])
    with pytest.raises(SystemExit, match=r"--only hubb: not in"):
        calibration.main(["--only", "hubb"])


@pytest.mark.slow
def test_a_toy_calibration_asks_every_command_of_what_has_rows_of_its_own(tmp_path):
    file = tmp_path / "calibration.json"
    line = ["--toy", "--studies", "1", "--seeds", "1", "--runs", str(tmp_path / "runs"), "--json", str(file)]
    calibration.main([*line, "--only", ",".join(truth.DESCRIPTIVE)])
    content = json.loads(file.read_text())
    asked = {(one.specimen, one.command) for one in truth.TRUTH if one.specimen in truth.DESCRIPTIVE}
    assert {(a["specimen"], a["command"]) for a in content["answers"]} == asked
    assert {a["answer"] for a in content["answers"]} == {"undecided"}
    assert content["denominators"]["detection"]["missing"] == len(truth.DETECTION)


def test_answers_under_another_truth_are_asked_again(tmp_path):
    made = [replace(answers()[0], truth="something else"), answers()[1]]
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(calibration.document(made, ASKED)))
    assert calibration.earlier(file, ASKED) == made[1:]


@pytest.mark.parametrize(
    ("kind", "alone"), [("hub", {"layer_scale + copy", "quick_gelu + copy", "registers + copy"}), ("clip_b", set())]
)
def test_a_rescue_keeps_the_arms_that_its_verdict_is_read_from(kind, alone):
    whole = calibration.rescue(ASKED.lab(0), kind, "copy")
    kept = calibration.make(ASKED.lab(0), kind, truth.RESCUE, 0)
    names = {arm.name for arm in kept.arms}
    assert names == {"scratch", "standard + copy", "native + copy", "native, scratch", *alone}
    assert {name for contrast in whole.contrasts for name in contrast.weights} <= names
    assert kept.contrasts == whole.contrasts
    assert {spec.id for spec in kept.specs} < {spec.id for spec in whole.specs}


def test_kinds_in_no_denominator_have_fewer_studies():
    assert {calibration.Plan().of(kind) for kind in truth.DESCRIPTIVE} == {truth.DESCRIPTIVE_STUDIES}
    assert {calibration.Plan().of(kind) for kind in (*truth.DETECTION, *truth.HEALTHY)} == {truth.STUDIES}
    assert ASKED.of("sink") == 2
