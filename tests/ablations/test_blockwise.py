"""Each block's attention alone, and what goes with its effect."""

from dataclasses import replace

import pytest
from scipy import stats

from ablations import blockwise
from ablations.layers import layers
from tests.figures.test_blockwise import made_up
from tests.studies import arms, lab


def test_each_arm_transfers_one_block():
    (study,) = blockwise.blockwise(lab(), "dinov2_s").studies
    found = arms(study)
    for block in range(12):
        assert found[f"block {block}"].transfer.layers == (block,)
    assert found["all blocks"].id == arms(layers(lab(), teacher="dinov2_s"))["all blocks"].id
    assert found["block 11"].id == arms(layers(lab(), "top", "1", teacher="dinov2_s"))["top 1"].id


def test_the_teachers_blocks_are_measured():
    found = blockwise.measured(lab().teacher("dinov2_reg_s"), lab())
    assert {len(values) for values in found.values()} == {12}
    assert all(0 < value < 1 for value in found["register_share"])
    assert all(value > 0 for value in found["gain"])
    assert blockwise.measured(lab().teacher("dinov2_s").model_copy(update={"sha256": None}), lab()) == {}


def test_associations_are_spearmans_and_corrected_for_their_number():
    (report,) = made_up(("dinov2_s",)).reports
    mixed = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    of_blocks = {"gain": mixed, "entropy": [1.0] * 12, "class_share": [float("nan")] * 12}
    found = blockwise.associations(report, of_blocks)
    assert list(found) == ["gain of the branch", "JSD from scratch"]  # the others are constant or missing
    ours, p = found["gain of the branch"]
    theirs = stats.spearmanr(mixed, range(12))
    assert (ours.rho, ours.p) == pytest.approx((theirs.statistic, theirs.pvalue))
    perfect, smallest = found["JSD from scratch"]
    assert perfect.rho == pytest.approx(1)
    assert (smallest, p) == pytest.approx((2 * perfect.p, max(2 * perfect.p, theirs.pvalue)))


def test_the_verdict_names_blocks_that_are_clear_and_what_goes_with_them():
    (report,) = made_up(("dinov2_s",)).reports
    said = report.study.verdict(report)
    assert "of single blocks, 3, 4, 5, 6, 7, 8, 9, 10, 11 help" in said
    assert "the highest, chosen after the fact, is block 11 (+5.5 points" in said
    assert "JSD from scratch (rho +1.00" in said
    alone = replace(report.rows[0], numbers={})
    mute = blockwise._said(replace(report, rows=(alone, *report.rows[1:])), {})
    assert "Over 12 blocks" not in mute
