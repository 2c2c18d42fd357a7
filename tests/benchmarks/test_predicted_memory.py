"""Predicted memory of a step against what follows from its definition."""

import pytest

from benchmarks import predicted_memory

MIB = 2**20


@pytest.fixture(scope="module")
def predicted():
    return {
        (depth, tokens): predicted_memory.predict("ti", tokens, depth)["mib_per_image"]
        for depth, tokens in ((1, 577), (2, 577), (2, 1370))
    }


def test_each_block_of_the_straightforward_method_adds_its_maps(predicted):
    """[H, N, N] in float32: copying keeps the teacher's, distilling three (the teacher's, the student's, and this one
    clamped, for the logarithm), where ours keeps a few tensors [N, C]."""
    one_map, one = 3 * 577**2 * 4 / MIB, 577 * 192 * 4 / MIB
    added = {name: predicted[2, 577][name] - predicted[1, 577][name] for name in predicted[1, 577]}
    # Ours: q, k (and v, of the same storage) of the teacher, and the output that SDPA needs for its gradient.
    assert added["straight copy"] - added["copy"] == pytest.approx(one_map - 4 * one, rel=0.02)
    # Ours: these, and the gradients of q, k of the student; theirs: beside the maps, q times the scale, and more.
    assert added["straight distill ce"] - added["distill ce"] == pytest.approx(3 * one_map - 4 * one, rel=0.02)


def test_straightforward_memory_grows_faster_with_tokens_than_ours(predicted):
    ratio = 1370 / 577
    for name in ("plain", "copy", "distill ce"):
        assert predicted[2, 1370][name] / predicted[2, 577][name] == pytest.approx(ratio, rel=0.1)
    growth = predicted[2, 1370]["straight distill ce"] / predicted[2, 577]["straight distill ce"]
    assert 1.5 * ratio < growth < ratio**2


def test_distilling_adds_the_teachers_tensors_and_two_gradients_per_block(predicted):
    """q, k of the teacher (its block's product of q, k and v is one storage; the last block's of q, k), and the
    gradients of the student's q, k: [N, C] each."""
    one = 577 * 192 * 4 / MIB
    added = predicted[2, 577]["distill ce"] - predicted[2, 577]["plain"]
    assert added == pytest.approx((3 + 2 + 2 * 2) * one, rel=0.05)
