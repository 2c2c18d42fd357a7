"""The words that a calibration compares with what was planted."""

from dataclasses import replace

import pytest

from ablations import found
from ablations.benchmark import benchmark
from ablations.rescue import OF_INTEREST, rescue
from tests.studies import fabricated, lab

PLAIN, FULL = "standard + copy", "native + copy"


@pytest.fixture(scope="module")
def copied():
    return benchmark(lab(seeds=3), "deit_s", "copy")


@pytest.mark.parametrize(
    ("effect", "teacher", "word"),
    [
        (5.0, 90.0, found.TRANSFERS),
        (5.0, 40.0, found.TRANSFERS),
        (-5.0, 90.0, found.FAILS),
        (-5.0, 40.0, found.WEAK),
        (0.5, 90.0, found.UNDECIDED),
        (0.5, 40.0, found.WEAK),
    ],
)
def test_a_transfer(copied, effect, teacher, word):
    assert found.transfer(fabricated(copied, [effect], teacher=teacher), "copy") == word


def test_two_seeds_find_nothing(copied):
    assert found.transfer(fabricated(copied, [-5.0], seeds=2), "copy") == found.UNDECIDED


RESCUE = rescue(lab(seeds=3), "clip_b", "copy")
OWN = ("no_patch_bias", "pre_norm", "quick_gelu")


def rescued(plain, full, change, **alone):
    """A report on clip_b's rescue: what each arm gains, those of single components by name."""
    effects = {arm.name: -5.0 for arm in RESCUE.arms[1:]} | {PLAIN: plain, FULL: full}
    effects |= {f"{name} + copy": value for name, value in alone.items()}
    return fabricated(RESCUE, list(effects.values()), [change, *[0.0] * (len(RESCUE.contrasts) - 1)])


@pytest.mark.parametrize(
    ("report", "word", "said"),
    [
        (rescued(5.0, 6.0, 0.0), found.TRANSFERS, "(within noise);"),
        (rescued(0.5, 6.0, 5.0), found.UNDECIDED, "(a rescue);"),
        (rescued(-5.0, 6.0, 9.0), found.RESCUED_TOGETHER, "(a rescue), which no single component does;"),
        (
            rescued(-5.0, 6.0, 9.0, pre_norm=4.0),
            found.fails_by("pre_norm"),
            "(a rescue), and pre_norm alone reverses the failure;",
        ),
        (
            rescued(-5.0, 6.0, 9.0, pre_norm=4.0, quick_gelu=4.0),
            found.fails_by("quick_gelu", "pre_norm"),
            "(a rescue), and pre_norm and quick_gelu alone reverse the failure;",
        ),
        (rescued(-5.0, 6.0, 9.0, pre_norm=0.5), found.RESCUED_TOGETHER, "(a rescue), which no single component does;"),
        (rescued(-5.0, -6.0, 0.2), found.NOT_RESCUED, "(within noise), and no component rescues it;"),
        (rescued(-5.0, -9.0, -4.0), found.NOT_RESCUED, "(the opposite of a rescue), and no component rescues it;"),
        (rescued(-5.0, 0.5, 0.5), found.UNDECIDED, "(within noise);"),
    ],
)
def test_a_rescue(report, word, said):
    assert found.rescue(report, PLAIN, FULL, OF_INTEREST) == word
    assert said in RESCUE.verdict(report)


def test_a_single_component_is_the_native_student():
    study = rescue(lab(seeds=3), "dinov2_s", "copy")
    effects = {arm.name: -5.0 for arm in study.arms[1:]} | {FULL: 6.0}
    report = fabricated(study, list(effects.values()), [9.0, 0.0, 0.0])
    assert found.rescue(report, PLAIN, FULL, OF_INTEREST) == "fails: layer_scale"


def test_a_correction_that_takes_clearness_away_takes_the_verdict_away(copied):
    report = fabricated(copied, [-5.0])
    row = report.rows[1]
    corrected = replace(row, contrast=replace(row.contrast, adjusted=0.2))
    assert found.transfer(replace(report, rows=(report.rows[0], corrected)), "copy") == found.UNDECIDED
