"""The layers ablation: its arms, and its verdict."""

import pytest

from ablations.layers import blocks, layers
from atdiag.core.errors import UserError
from atdiag.study.protocol import BASELINE
from tests.studies import arms, differences, fabricated, lab


@pytest.mark.parametrize(("end", "first", "last"), [("top", 6, 12), ("bottom", 0, 6)])
def test_layers(end, first, last):
    study = layers(lab(), end, 6, "clip_b", "copy", False)
    specs = arms(study)
    assert list(specs) == [BASELINE, f"{end} 6", "all blocks"]
    assert specs[f"{end} 6"].transfer.layers == tuple(range(first, last))
    assert specs["all blocks"].transfer.layers == tuple(range(12))
    assert differences(study, f"{end} 6", "all blocks") == {"transfer.layers"}
    assert differences(study, BASELINE, "all blocks") == {"teacher", "transfer.method", "transfer.layers"}
    assert dict(study.contrasts[0].weights) == {f"{end} 6": 1, "all blocks": -1}
    assert study.figure == "contrasts"


def test_blocks_are_counted_from_the_input():
    network = lab().teacher("clip_b").network
    assert blocks(network, "top", 1) == (11,)
    assert blocks(network, "bottom", 1) == (0,)
    assert blocks(network, "top", 0) == blocks(network, "bottom", 0) == ()
    for k in range(13):
        assert sorted(blocks(network, "top", k) + blocks(network, "bottom", 12 - k)) == list(range(12))


@pytest.mark.parametrize("end", ["top", "bottom"])
def test_layers_from_none_to_all_blocks(end):
    none, whole = layers(lab(), end, 0, "clip_b", "copy", False), layers(lab(), end, 12, "clip_b", "copy", False)
    assert list(arms(none)) == list(arms(whole)) == [BASELINE, "all blocks"]
    assert not none.contrasts and not whole.contrasts
    assert {s.id for s in none.specs} == {s.id for s in whole.specs}


@pytest.mark.parametrize("end", ["top", "bottom"])
def test_the_sweep_has_every_k(end):
    study = layers(lab(), end, None, "clip_b", "copy", True)
    assert list(study.curve.values()) == list(range(13))
    assert list(study.curve) == list(arms(study)) == [BASELINE, *(f"{end} {k}" for k in range(1, 12)), "all blocks"]
    for name, k in study.curve.items():
        assert arms(study)[name].transfer.layers == (tuple(range(12 - k, 12)) if end == "top" else tuple(range(k)))
    assert study.figure == "layer_curve"
    # a sweep finds the runs of single commands finished
    single = layers(lab(), end, 4, "clip_b", "copy", False)
    assert {s.id for s in single.specs} <= {s.id for s in study.specs}


@pytest.mark.parametrize("k", [-1, 13, 10**9])
def test_blocks_that_the_teacher_lacks_are_refused(k):
    with pytest.raises(UserError, match=rf"`k` {k}: clip_b \(mini\) has 12 blocks: give a number from 0 to 12"):
        layers(lab(), "top", k, "clip_b", "copy", False)


@pytest.mark.parametrize(
    ("k", "effects", "rest", "says"),
    [
        (6, [-2.0, 4.0], [-6.0], "hurts (-2.0 points [-3.0, -1.0], 3 seeds), and is worse than all (-6.0"),
        (6, [2.0, 2.5], [-0.5], "3 seeds), and can't be told apart from all (-0.5 points"),
        (6, [9.0, 4.0], [5.0], "is better than all (+5.0 points"),
        (12, [4.0], [], "Copy of all 12 blocks of clip_b (mini) helps (+4.0 points [+3.0, +5.0], 3 seeds)."),
        (0, [4.0], [], "k = 0 transfers nothing: this is the baseline."),
    ],
)  # fmt: skip
def test_the_verdict_of_layers(k, effects, rest, says):
    study = layers(lab(), "top", k, "clip_b", "copy", False)
    assert says in study.verdict(fabricated(study, effects, rest))


def test_the_verdict_of_a_sweep_admits_that_k_was_chosen_after_the_fact():
    study = layers(lab(), "bottom", None, "clip_b", "copy", True)
    text = study.verdict(fabricated(study, [float(k) for k in range(6, -6, -1)]))
    assert "Copy of all 12 blocks of clip_b (mini) hurts (-5.0 points" in text
    assert "along the curve bottom 1 is highest (56.0 %), chosen after the fact." in text


def test_layers_from_both_ends():
    study = layers(lab(), "both", "3,6", "dinov2_s", "copy", False)
    assert list(arms(study)) == [BASELINE, "top 3", "bottom 3", "top 6", "bottom 6", "all blocks"]
    assert arms(study)["top 3"].transfer.layers == (9, 10, 11)
    assert arms(study)["bottom 3"].transfer.layers == (0, 1, 2)
    assert [dict(c.weights) for c in study.contrasts] == [
        {"top 3": 1, "bottom 3": -1},
        {"top 6": 1, "bottom 6": -1},
    ]
    one = layers(lab(), "top", 6, "dinov2_s", "copy", False)
    assert {spec.id for spec in one.specs} <= {spec.id for spec in study.specs}
