"""Maps for a student of another size, against explicit maps in numpy."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from atdiag.core.spec import Network, Transfer
from atdiag.core.spec.sizes import check_heads, head_groups, paired_blocks
from atdiag.networks.model import students
from atdiag.training import evaluation
from atdiag.transfer import ops, sizes
from atdiag.transfer.attention import AttentionOverride
from atdiag.transfer.observation import CaptureRequest
from atdiag.transfer.ops import QK, Averaged

CPU = torch.device("cpu")


def a_map(heads=4, tokens=17, batch=2, width=6, bias=False, seed=0) -> QK:
    draw = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, heads, tokens, width, generator=draw) for _ in "qk")
    return QK(q, k, 0.7, torch.randn(heads, tokens, tokens, generator=draw) if bias else None)


def network(width=16, depth=6, heads=2, patch_size=4, **more) -> Network:
    size = {"image_size": 20, "channels": 1, "classes": 10, "mean": (0.2,)}
    return Network(**{**size, "width": width, "depth": depth, "heads": heads, "patch_size": patch_size, **more})


# --- blocks and heads: the rules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student", "teacher"), [(12, 24), (24, 12), (12, 12), (7, 12), (5, 3), (1, 9)])
def test_uniform_pairs_blocks_that_end_at_the_same_relative_depth(student, teacher):
    pairs = paired_blocks("uniform", tuple(range(student)), student, teacher)
    assert list(pairs) == sorted(pairs)
    assert pairs[-1] == teacher - 1
    for block, other in enumerate(pairs):  # the first of the teacher's blocks that ends no earlier
        assert (other + 1) / teacher >= (block + 1) / student - 1e-12
        assert other / teacher < (block + 1) / student
    if student == teacher:
        assert pairs == tuple(range(student))


def test_top_and_bottom_count_from_an_end_and_refuse_what_is_not_there():
    assert paired_blocks("top", (2, 3), 4, 10) == (8, 9)
    assert paired_blocks("bottom", (2, 3), 4, 10) == (2, 3)
    assert paired_blocks("top", (2, 3), 4, 2) == (0, 1)
    for rule in ("top", "bottom"):
        with pytest.raises(ValueError, match=rf"pairs no block of the teacher \(2 blocks\).*layers={rule}:2"):
            paired_blocks(rule, (0, 1, 2, 3), 4, 2)


@pytest.mark.parametrize(("student", "teacher"), [(3, 2), (12, 6), (16, 6), (5, 1)])
def test_repeated_heads_stand_in_groups_whose_sizes_differ_by_one_at_most(student, teacher):
    heads = [head for (head,) in head_groups("repeat", student, teacher)]
    assert heads == sorted(heads)
    counts = np.bincount(heads, minlength=teacher)
    assert counts.sum() == student
    assert counts.max() - counts.min() <= 1
    assert student % teacher or counts.max() == counts.min()


@pytest.mark.parametrize(
    ("rule", "student", "teacher", "message"),
    [
        ("mean", 2, 3, "groups of equal size"),
        ("mean", 3, 2, "does not apply.*choose repeat"),
        ("first", 3, 2, "choose repeat"),
        ("repeat", 2, 3, "choose first, different or mean"),
    ],
)
def test_heads_that_a_rule_does_not_fit_are_refused(rule, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        check_heads(rule, student, teacher)


# --- heads: the maps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_a_mean_of_heads_is_the_mean_of_their_maps(bias, monkeypatch):
    monkeypatch.setattr(ops, "_BLOCK_CPU", 100)  # in many blocks
    one = a_map(bias=bias)
    p = ops.probabilities(one).numpy()
    found = sizes.of_heads(one, ((0, 1), (2, 3)))
    assert isinstance(found, Averaged)
    np.testing.assert_allclose(found.p, np.stack([p[:, :2].mean(1), p[:, 2:].mean(1)], 1), atol=1e-6)
    np.testing.assert_allclose(found.p.sum(-1), 1, atol=1e-6)


def test_averaging_equal_heads_is_the_identity():
    one = a_map(heads=1)
    equal = QK(one.q.repeat(1, 4, 1, 1), one.k.repeat(1, 4, 1, 1), one.scale)
    found = sizes.of_heads(equal, ((0, 1), (2, 3)))
    assert torch.allclose(found.p, ops.probabilities(one).expand(-1, 2, -1, -1), atol=1e-6)


def test_chosen_and_repeated_heads_keep_their_queries_and_keys():
    one = a_map(bias=True)
    for groups in (((2,), (0,)), ((0,), (0,), (1,), (3,), (3,))):
        found = sizes.of_heads(one, groups)
        assert isinstance(found, QK)
        assert torch.equal(ops.probabilities(found), ops.probabilities(one)[:, [head for (head,) in groups]])


def test_divergences_of_heads_are_scipys_and_the_most_different_are_chosen_greedily():
    one = a_map(heads=5, tokens=6, batch=3)
    p = ops.probabilities(one).double().numpy()
    found = sizes.head_divergence(one)
    expected = np.array(
        [[(jensenshannon(p[:, i], p[:, j], base=2, axis=-1) ** 2).mean() for j in range(5)] for i in range(5)]
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)
    pair = np.unravel_index(expected.argmax(), expected.shape)
    assert set(sizes.most_different(found, 2)) == set(map(int, pair))
    three = sizes.most_different(found, 3)
    rest = [head for head in range(5) if head not in pair]
    (third,) = set(three) - set(map(int, pair))
    assert third == max(rest, key=lambda head: expected[head, list(pair)].min())
    assert sizes.most_different(found, 1) == (int(expected.sum(1).argmax()),)
    assert sizes.most_different(found, 5) == tuple(range(5))


def test_copies_of_a_head_are_chosen_last():
    one = a_map(heads=3, tokens=6)
    twice = one.select_heads(torch.tensor([0, 0, 0, 1, 2]))
    assert sizes.most_different(sizes.head_divergence(twice), 3) == (0, 3, 4)


# --- grid -------------------------------------------------------------------------------------------------------------


def overlap(i, n, j, m) -> float:
    """Return the length that cell i of n and cell j of m share on the unit interval."""
    return max(0.0, min((i + 1) / n, (j + 1) / m) - max(i / n, j / m))


@pytest.mark.parametrize(("teacher", "student"), [(4, 2), (2, 4), (5, 4), (4, 5), (3, 1)])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_resampling_is_by_area_and_keeps_rows_that_sum_to_one(teacher, student, prefix):
    tokens = prefix + teacher**2
    one = a_map(heads=2, tokens=tokens, bias=True)
    a, c = np.zeros((prefix + student**2, tokens)), np.zeros((tokens, prefix + student**2))
    a[:prefix, :prefix] = c[:prefix, :prefix] = np.eye(prefix)
    for s in range(student**2):
        for t in range(teacher**2):
            shared = overlap(s // student, student, t // teacher, teacher)
            shared *= overlap(s % student, student, t % teacher, teacher)
            a[prefix + s, prefix + t] = shared * student**2
            c[prefix + t, prefix + s] = shared * teacher**2
    found = sizes.resampled(one, *sizes.regridding(teacher, student, prefix, CPU))
    np.testing.assert_allclose(found.p, a @ ops.probabilities(one).numpy() @ c, atol=1e-6)
    np.testing.assert_allclose(found.p.sum(-1), 1, atol=1e-5)
    assert (found.p >= 0).all()


def test_resampling_to_the_same_grid_is_the_identity():
    one = a_map()
    a, c = sizes.regridding(4, 4, 1, CPU)
    assert torch.equal(a, torch.eye(17))
    assert torch.equal(c, torch.eye(17))
    assert torch.allclose(sizes.resampled(one, a, c).p, ops.probabilities(one), atol=1e-6)


def test_resampling_in_blocks_gives_the_same(monkeypatch):
    one, how = a_map(), sizes.regridding(4, 3, 1, CPU)
    whole = sizes.resampled(one, *how).p
    monkeypatch.setattr(ops, "_BLOCK_CPU", 60)
    assert len(list(ops.blocks(one.q))) > 8
    assert torch.allclose(sizes.resampled(one, *how).p, whole, atol=1e-6)


# --- together ---------------------------------------------------------------------------------------------------------


def test_where_sizes_are_equal_nothing_is_done():
    both = network()
    for transfer in (Transfer(method="copy", layers=(0, 1)), Transfer(method="distill", layers=(0, 1))):
        assert sizes.fitting(transfer, both, both, CPU) is None
    teacher = students.build(both, 0)
    shown = teacher.observe(torch.rand(2, 1, 20, 20), CaptureRequest(maps=frozenset({0})))
    assert evaluation.fit(shown, teacher, both, Transfer(method="copy", layers=(0,))) is shown
    images = torch.rand(1, 1, 20, 20)
    assert sizes.seen_at(images, 20) is images
    for other in (network(width=24, heads=4), network(patch_size=5)):
        with pytest.raises(ValueError, match="the transfer says how maps pass"):
            evaluation.fit(shown, teacher, other)


@pytest.mark.parametrize(
    ("student", "teacher", "rule", "groups"),
    [
        (network(heads=4), network(heads=2), "repeat", ((0,), (0,), (1,), (1,))),
        (network(heads=2), network(width=24, heads=4), "first", ((0,), (1,))),
        (network(heads=2), network(width=24, heads=4), "mean", ((0, 1), (2, 3))),
        (network(heads=4, patch_size=5), network(width=24, heads=2), "repeat", ((0,), (0,), (1,), (1,))),
    ],
    ids=["repeat", "first", "mean", "repeat and grid"],
)
@pytest.mark.parametrize("registers", [0, 3])
def test_a_student_that_copies_gives_what_explicit_maps_give(student, teacher, rule, groups, registers):
    if registers:
        parts = {"components": ("registers",), "registers": registers}
        teacher = Network.model_validate({**teacher.model_dump(), **parts})
    vit, taught = students.build(student, 1).eval(), students.build(teacher, 2).eval()
    layers, sources = (0, 3, 5), (1, 1, 4)
    transfer = Transfer(method="copy", layers=layers, teacher_layers=sources, teacher_heads=rule)
    body = evaluation.Predictor(vit, transfer, taught)
    images = torch.rand(3, 1, 20, 20)
    from atdiag.transfer import methods

    with torch.no_grad():
        shown = evaluation.show(taught, images, CaptureRequest(maps=frozenset(sources)))
        found = methods.forward_test(vit, transfer, images, body.given(shown))
        maps = {}
        keep = [0, *range(1 + registers, teacher.tokens)]
        for layer, source in zip(layers, sources, strict=True):
            logits = ops.logits(shown.seen[source].qk)[:, :, keep][:, :, :, keep]
            p = logits.softmax(-1)
            p = torch.stack([p[:, list(group)].mean(1) for group in groups], 1)
            if student.grid != teacher.grid:
                a, c = sizes.regridding(teacher.grid, student.grid, 1, CPU)
                p = a @ p @ c
            maps[layer] = AttentionOverride("map", Averaged(p))
        expected = vit(images, maps)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, vit(images), atol=1e-3)
