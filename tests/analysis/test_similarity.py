"""The divergence against scipy's, matchings against all permutations, CKA against its definition;
streaming against one shot."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from atdiag.analysis import similarity, streaming, subjects
from atdiag.analysis.similarity import MATCHINGS, Covariance, Similarity
from atdiag.core.errors import UserError
from atdiag.training import evaluation
from atdiag.transfer.methods import Transfer


def maps(seed, *shape, sharpness=2.0):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (sharpness * scores).softmax(-1)


def oracle(p, q):
    """[B, H, N, N], [B, G, N, N] -> [H, G, N]: scipy, one row at a time."""
    p, q = (np.asarray(x, np.float64) for x in (p, q))  # scipy's own float32 gives NaN near 0
    out = np.zeros((p.shape[1], q.shape[1], p.shape[2]))
    for b, h, g, n in itertools.product(range(len(p)), range(p.shape[1]), range(q.shape[1]), range(p.shape[2])):
        out[h, g, n] += jensenshannon(p[b, h, n], q[b, g, n], base=2) ** 2
    return out


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(2, 6), st.sampled_from((0.1, 3.0, 300.0)),
    st.sampled_from(((torch.float64, 1e-9), (torch.float32, 3e-6))),
)  # fmt: skip
def test_divergence_is_scipys_squared_distance(batch, heads, others, tokens, sharpness, kind):
    dtype, tolerance = kind
    p = maps(0, batch, heads, tokens, tokens, sharpness=sharpness).to(dtype)
    q = maps(1, batch, others, tokens, tokens, sharpness=sharpness).to(dtype)
    expected = oracle(p.numpy(), q.numpy())
    np.testing.assert_allclose(similarity.pairwise(p, q).numpy(), expected, atol=batch * tolerance)
    one = similarity.divergence(p[:, 0], q[:, 0]).sum(0).numpy()
    np.testing.assert_allclose(one, expected[0, 0], atol=batch * tolerance)


@given(st.integers(0, 1000), st.sampled_from((0.1, 3.0, 300.0)))
def test_divergence_is_symmetric_bounded_and_zero_on_itself(seed, sharpness):
    p, q = (maps(s, 2, 2, 5, 5, sharpness=sharpness).float() for s in (seed, seed + 1))
    found = similarity.divergence(p, q)
    assert torch.equal(found, similarity.divergence(q, p))
    assert (found >= 0).all() and (found <= 1).all()
    assert (similarity.divergence(p, p) == 0).all()
    assert similarity.divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == 1


def test_blockwise_computation_changes_nothing(monkeypatch):
    p, q = maps(0, 5, 3, 7, 7), maps(1, 5, 2, 7, 7)
    whole = similarity.pairwise(p, q)
    for size in (1, 60, 300):
        monkeypatch.setattr(similarity, "_BLOCK_CPU", size)
        torch.testing.assert_close(similarity.pairwise(p, q), whole, atol=1e-12, rtol=0)


def found_of(heads):
    """Make a comparison with the given mean divergences of heads [L, H, G]."""
    layers = len(heads)
    none = {"all": np.zeros(layers)}
    return Similarity("a", "b", tuple((i, i) for i in range(layers)), 1, {"all": np.asarray(heads)}, none, none)


@given(st.integers(0, 1000), st.integers(1, 5), st.randoms())
def test_matchings_are_invariant_to_the_order_of_heads(seed, heads, random):
    matrix = np.random.default_rng(seed).random((2, heads, heads))
    order = random.sample(range(heads), heads)
    for permuted in (matrix[:, order], matrix[:, :, order]):
        for how in ("optimal", "best"):
            np.testing.assert_allclose(found_of(permuted).matched(how), found_of(matrix).matched(how), atol=1e-12)
    every = [matrix[:, range(heads), one].mean(1) for one in itertools.permutations(range(heads))]
    np.testing.assert_allclose(found_of(matrix).matched("optimal"), np.min(every, axis=0), atol=1e-12)
    np.testing.assert_allclose(found_of(matrix).matched("same"), [m.diagonal().mean() for m in matrix], atol=1e-12)
    assert (found_of(matrix).matched("best") <= found_of(matrix).matched("optimal") + 1e-12).all()
    np.testing.assert_allclose(
        found_of(matrix).matched("best"), found_of(matrix.transpose(0, 2, 1)).matched("best"), atol=1e-12
    )


def permuted(subject, order):
    """Return the same function with its heads permuted."""
    import copy

    vit = copy.deepcopy(subject.module)
    width = vit.network.width // vit.network.heads
    rows = torch.cat([torch.arange(h * width, (h + 1) * width) for h in order])
    for block in vit.blocks:
        for name in "qkv":
            for kind in ("weight", "bias"):
                parameter = getattr(block.attn, f"{name}_{kind}")
                parameter.data = parameter.data[rows]
        block.attn.proj.weight.data = block.attn.proj.weight.data[:, rows]
    return subjects.of(vit, "permuted")


@given(st.permutations(range(3)))
def test_a_network_with_its_heads_in_another_order_is_the_same(subject, pictures, order):
    one = subject()
    other = permuted(one, order)
    (found,) = similarity.similarity(one, other, pictures(one))
    for how in ("optimal", "best", "averaged"):
        np.testing.assert_allclose(found.matched(how), 0, atol=3e-6)
    np.testing.assert_allclose(found.cka["all"], 1, atol=1e-6)
    for heads, match in found.assignments():
        assert [order[m] for m in match] == list(heads)
    assert (found.matched("same") > 1e-3).all() == (list(order) != [0, 1, 2])


def test_every_quantity_equals_its_definition_on_whole_arrays(subject, pictures):
    one, other = subject(0), subject(1)
    some = pictures(one, 5)
    (found,) = similarity.similarity(one, [other], some)
    a, b = (streaming.trace(s, some, ("map", "residual")) for s in (one, other))
    for i in range(3):
        by_row = oracle(a["map", i].numpy(), b["map", i].numpy()) / 5
        means = (x["map", i].mean(1, keepdim=True).numpy() for x in (a, b))
        averaged = oracle(*means)[0, 0] / 5
        for rows, where in (("all", slice(None)), ("class", slice(0, 1)), ("patch", slice(1, None))):
            np.testing.assert_allclose(found.heads[rows][i], by_row[..., where].mean(-1), atol=3e-6)
            np.testing.assert_allclose(found.averaged[rows][i], averaged[where].mean(), atol=3e-6)
            x, y = (s["residual", i][:, where].flatten(0, 1).double() for s in (a, b))
            x, y = x - x.mean(0), y - y.mean(0)
            cka = (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
            np.testing.assert_allclose(found.cka[rows][i], cka, atol=1e-6)
    frame = found.frame()
    assert len(frame) == 9 and set(frame.rows) == {"all", "class", "patch"}
    assert list(frame[frame.rows == "patch"].jsd_best) == list(found.matched("best", "patch"))


@pytest.mark.parametrize("batch", [1, 3])
def test_streaming_equals_one_shot(subject, pictures, batch):
    one, others = subject(0), [subject(1), subject(2, heads=4)]
    some = pictures(one, 7)
    for found, whole in zip(
        similarity.similarity(one, others, some, batch=batch),
        similarity.similarity(one, others, some, batch=7),
        strict=True,
    ):
        assert found.images == whole.images == 7
        for how in MATCHINGS:
            np.testing.assert_allclose(found.matched(how), whole.matched(how), atol=3e-6)
        np.testing.assert_allclose(found.cka["all"], whole.cka["all"], atol=1e-6)


def test_similarity_is_symmetric_and_zero_on_itself(subject, pictures):
    one, other = subject(0), subject(1)
    some = pictures(one)
    there, itself = similarity.similarity(one, [other, one], some)
    (back,) = similarity.similarity(other, one, some)
    for how in MATCHINGS:
        np.testing.assert_allclose(there.matched(how), back.matched(how), atol=1e-9)
        assert (there.matched(how) > 0).all() and (there.matched(how) <= 1).all()
        assert (itself.matched(how) == 0).all()
    np.testing.assert_allclose(there.cka["all"], back.cka["all"], atol=1e-9)
    np.testing.assert_allclose(itself.cka["all"], 1, atol=1e-9)


@given(st.integers(0, 1000), st.integers(3, 30), st.integers(1, 6), st.integers(1, 6))
def test_cka_equals_kornbliths_definition_by_gram_matrices(seed, samples, width, other):
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with K = X X^T, L = Y Y^T (section 3, biased HSIC)."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(samples, width)) + 5
    y = draw.normal(size=(samples, other)) + 0.5 * x[:, :1]
    centre = np.eye(samples) - 1 / samples

    def hsic(k, of):
        return np.trace(k @ centre @ of @ centre) / (samples - 1) ** 2

    k, of = x @ x.T, y @ y.T
    expected = hsic(k, of) / np.sqrt(hsic(k, k) * hsic(of, of))
    sums = Covariance()
    for part in np.array_split(np.arange(samples), 3):  # streamed
        sums.add(torch.from_numpy(x[part]), torch.from_numpy(y[part]))
    assert sums.cka() == pytest.approx(expected, rel=1e-6)


def test_cka_is_invariant_to_rotation_and_scale_and_not_to_more():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=draw, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=draw, dtype=torch.float64))
    stretched = x * torch.tensor([9.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    for y, expected in ((3 * x @ rotation + 2, 1.0), (stretched, None)):
        sums = Covariance()
        sums.add(x, y)
        assert sums.cka() == pytest.approx(1.0) if expected else sums.cka() < 0.9
    constant = Covariance()
    constant.add(x, torch.ones(50, 2))
    assert math.isnan(constant.cka())


def test_registers_and_a_lacking_class_token_are_sliced_off_before_softmax(subject, pictures):
    plain = subject(0)
    native = subject(1, components=("registers",), registers=2)
    bare = subject(2, class_token=False)
    some = pictures(plain)
    with_registers, without_token = similarity.similarity(plain, [native, bare], some)
    assert "2 registers sliced off before softmax" in with_registers.notes[0]
    assert "its class token" in without_token.notes[0] and set(without_token.heads) == {"all", "patch"}
    a, b = streaming.trace(plain, some, ("map",)), streaming.trace(native, some, ("logits",))
    kept = [0, *range(3, 28)]
    q = b["logits", 1][:, :, kept][..., kept].softmax(-1)
    expected = oracle(a["map", 1].numpy(), q.numpy()).mean(-1) / 4
    np.testing.assert_allclose(with_registers.heads["all"][1], expected, atol=3e-6)


def test_a_student_that_copies_an_averaged_map_has_it_in_every_head(subject, pictures):
    student, teacher = subject(0), subject(7, components=("registers",), registers=2)
    for average in ("heads", "queries", "layers"):
        transfer = Transfer(method="copy", layers=(0, 2), average=average)
        body = evaluation.Predictor(student.module, transfer, teacher.module)
        copying = subjects.Subject("copy", body, student.network)
        some = pictures(student)
        (found,) = similarity.similarity(copying, subject(1, components=("registers",), registers=1), some)
        a, b = streaming.trace(copying, some), streaming.trace(subject(1, components=("registers",), registers=1), some)
        q = b["map", 2][..., [0, *range(2, 27)]][:, :, [0, *range(2, 27)]]
        expected = oracle(a["map", 2].numpy(), (q / q.sum(-1, keepdim=True)).numpy()).mean(-1) / 4
        np.testing.assert_allclose(found.heads["all"][2], expected, atol=3e-6)
        assert a["map", 2].shape == (4, 3, 26, 26)


# What can't be compared


def test_mismatched_networks_are_refused_in_one_line(subject, pictures):
    one = subject()
    some = pictures(one)
    for other, options, message in (
        (subject(1, patch_size=5), {}, r"grid of 5 x 5 patches, net 1 one of 4 x 4"),
        (subject(1, depth=4), {}, r"has 3 blocks, net 1 4.*`layer_map` 0:0,2:3"),
        (subject(1), {"layers": (3,)}, "layer 3 is out of range"),
        (subject(1), {"layer_map": {0: 5}}, "layer 5 is out of range: net 1 has 3"),
        (subject(1, depth=4, patch_size=5), {}, "grid of 5 x 5"),  # a layer map would not help here
        (subject(1), {"layer_map": {0: 5}}, "^`layer_map` 0:5: "),
        (subject(1), {"layer_map": {4: 0}}, "^`layer_map` 4:0: layer 4 is out of range: net 0"),
        (subject(1, depth=4), {"layer_map": {0: 0}, "layers": (1,)}, "layer 1 of net 0 is not in `layer_map`"),
        (subject(1, image_size=40, patch_size=8), {}, "see different images"),
    ):
        with pytest.raises(UserError, match=message):
            similarity.similarity(one, other, some, **options)


def test_networks_of_different_depth_are_compared_by_the_layer_map(subject, pictures):
    one, other = subject(0), subject(1, depth=5)
    some = pictures(one)
    (found,) = similarity.similarity(one, other, some, layer_map={0: 0, 2: 4})
    assert found.layers == ((0, 0), (2, 4))
    a, b = streaming.trace(one, some), streaming.trace(other, some)
    np.testing.assert_allclose(
        found.heads["all"][1], oracle(a["map", 2].numpy(), b["map", 4].numpy()).mean(-1) / 4, atol=3e-6
    )
