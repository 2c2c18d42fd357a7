"""Interventions: own tensors change nothing, others equal the explicit formula, with nnsight as the witness."""

import nnsight
import numpy as np
import pytest
import timm
import torch

from atdiag.analysis import interventions, streaming, subjects
from atdiag.analysis.interventions import Outcome
from atdiag.analysis.replacements import PARTS, Replacement, without_sinks
from atdiag.core.errors import UserError
from atdiag.networks.registry import teachers
from atdiag.training import evaluation
from atdiag.transfer.methods import Transfer


def run(subject, some, *replacements, **options):
    return interventions.intervene(subject, list(replacements), some, **options)


@pytest.mark.parametrize("name", teachers.miniatures())
def test_its_own_maps_queries_keys_and_values_change_nothing(name, pictures):
    subject = subjects.find(name)
    every = [Replacement("own", part, heads=heads) for part in PARTS for heads in (None, (1,))]
    for outcome in run(subject, pictures(subject, 6), *every, Replacement("own", layers=(2, 5))):
        assert outcome.logits <= 1e-5, outcome.replaced
        assert outcome.residual.max() <= 1e-5 and outcome.flips == 0
        assert outcome.change == (0, 0, 0)
    (shuffled,) = run(subject, pictures(subject, 6), Replacement("shuffled"))
    assert shuffled.logits > 0.1 and shuffled.residual.min() > 0.01


def test_a_replacement_changes_only_later_blocks(subject, pictures):
    one = subject()
    some = pictures(one, 6)
    changes = [Replacement(kind, layers=(1,)) for kind in ("uniform", "identity", "shuffled", "no-sinks")]
    for outcome in run(one, some, *changes, Replacement("shuffled", "v", (1,)), Replacement(subject(5), layers=(1,))):
        assert outcome.logits > 1e-3, outcome.replaced
        assert outcome.residual[0] == 0 and (outcome.residual[1:] > 1e-3).all()
        assert outcome.layers == (1,)


def explicit(subject, images, change, layers, heads):
    """Compute the network by explicit formulas, with the map replaced in some layers and heads."""
    vit = subject.module
    x = vit.embed(images)
    for i, block in enumerate(vit.blocks):
        attn = block.attn
        q, k, v = attn._heads(block.norm1(x), "qkv")
        p = (attn.scale * q @ k.transpose(-2, -1)).softmax(-1)
        if i in layers:
            p = p.clone()
            p[:, heads] = change(p)[:, heads]
        x = x + attn.proj((p @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return vit.forward_head(vit.norm(x))


@pytest.mark.parametrize("heads", [(0, 1, 2), (2,), (0, 1)])
@pytest.mark.parametrize("kind", ["uniform", "identity"])
def test_uniform_and_identity_maps_equal_the_formula(subject, pictures, kind, heads):
    one = subject()
    some = pictures(one, 5)
    tokens = one.network.tokens
    put = torch.full((tokens, tokens), 1 / tokens) if kind == "uniform" else torch.eye(tokens)
    images = next(some.batches(5)).pixels
    expected = explicit(one, images, lambda p: put.expand_as(p), (0, 2), list(heads))
    (outcome,) = run(one, some, Replacement(kind, layers=(0, 2), heads=heads))
    assert list(outcome.after) == expected.argmax(-1).tolist()
    assert outcome.logits == pytest.approx(float((expected - one.module(images)).abs().max()), rel=1e-4)


def test_writing_maps_with_nnsight_gives_the_same(subject, pictures):
    one, other = subject(0), subject(1)
    some = pictures(one, 4)
    images = next(some.batches(4)).pixels
    theirs = streaming.trace(other, some, ("map",), (1,))["map", 1]
    values = streaming.trace(one, some, ("v",), (1,))["v", 1]
    mixed = one.module.blocks[1].attn.proj((theirs @ values).transpose(1, 2).flatten(2))
    model = nnsight.NNsight(one.module)
    with torch.no_grad(), model.trace(images):
        model.blocks[1].attn.output = mixed
        stream = nnsight.save(model.blocks[2].output)
        logits = nnsight.save(model.output)
    clean = streaming.trace(one, some, ("residual",), (2,))["residual", 2]
    (outcome,) = run(one, some, Replacement(other, layers=(1,)))
    assert outcome.logits == pytest.approx(float((logits - one.module(images)).abs().max()), rel=1e-4)
    expected = (stream - clean).flatten(1).norm(dim=1) / clean.flatten(1).norm(dim=1)
    assert outcome.residual[2] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert outcome.residual_class[2] == pytest.approx(
        float(((stream - clean)[:, 0].norm(dim=1) / clean[:, 0].norm(dim=1)).mean()), rel=1e-4
    )


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_q_k_and_v_of_another_network_equal_the_formula(subject, pictures, part):
    one, other = subject(0), subject(1)
    some = pictures(one, 4)
    images = next(some.batches(4)).pixels
    theirs = streaming.trace(other, some, (part,), (0,))[part, 0]
    vit = one.module
    x = vit.embed(images)
    own = dict(zip("qkv", vit.blocks[0].attn._heads(vit.blocks[0].norm1(x), "qkv"), strict=True))
    own[part] = torch.cat([own[part][:, :1], theirs[:, 1:2], own[part][:, 2:]], 1)
    p = (vit.blocks[0].attn.scale * own["q"] @ own["k"].transpose(-2, -1)).softmax(-1)
    x = x + vit.blocks[0].attn.proj((p @ own["v"]).transpose(1, 2).flatten(2))
    x = vit.blocks[0]._rest(x, torch.zeros_like(x), None)
    (outcome,) = run(one, some, Replacement(other, part, (0,), (1,)))
    clean = streaming.trace(one, some, ("residual",), (0,))["residual", 0]
    expected = (x - clean).flatten(1).norm(dim=1) / clean.flatten(1).norm(dim=1)
    assert outcome.residual[0] == pytest.approx(float(expected.mean()), rel=1e-3)


def test_shuffled_gives_each_image_another_images_map(subject, pictures):
    one = subject()
    some = pictures(one, 9)
    once, again, other = (run(one, some, Replacement("shuffled"), batch=4, seed=seed)[0] for seed in (0, 0, 1))
    assert (once.after == again.after).all() and once.residual.tolist() == again.residual.tolist()
    assert once.residual.tolist() != other.residual.tolist()
    assert once.logits > 1e-3
    with pytest.raises(UserError, match="at least 2"):
        run(one, pictures(one, 1), Replacement("shuffled"))


def test_removing_sinks_equals_the_formula():
    p = torch.tensor([[[[0.7, 0.1, 0.2], [0.6, 0.4, 0.0], [1.0, 0.0, 0.0]]]])
    expected = torch.tensor([[[[0, 1 / 3, 2 / 3], [0, 1, 0], [0, 0.5, 0.5]]]])
    torch.testing.assert_close(without_sinks(p), expected)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "vit_small_patch16_dinov3"])
def test_replacements_reach_timms_networks_where_they_attend(name, pictures):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=32, depth=3, embed_dim=24, num_heads=2, num_classes=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    one = subjects.of(model, name)
    some = pictures(one, 6)
    own = [Replacement("own", part, heads=heads) for part in PARTS for heads in (None, (1,))]
    for outcome in run(one, some, *own):
        assert outcome.logits <= 1e-5 and outcome.residual.max() <= 1e-5, outcome.replaced
    (found,) = run(one, some, Replacement("uniform", layers=(1,), heads=(0,)))

    # With fused attention off, timm passes its map through the module attn_drop, so a hook can replace it.
    def flat(module, inputs, output):
        output[:, 0] = 1 / output.shape[-1]
        return output

    images = next(some.batches(6)).pixels
    with torch.no_grad():
        before = one.module(images)
        model.blocks[1].attn.fused_attn = False
        handle = model.blocks[1].attn.attn_drop.register_forward_hook(flat)
        after = one.module(images)
        handle.remove()
    assert found.logits > 1e-4
    assert found.logits == pytest.approx(float((after - before).abs().max()), rel=1e-3)
    assert (found.after == after.argmax(-1).numpy()).all()
    (explicit,) = run(one, some, Replacement("uniform", layers=(1,), heads=(0,)))  # now with fused attention off
    assert explicit.logits == pytest.approx(found.logits, rel=1e-3) and not model.blocks[1].attn.fused_attn


def copying(subject, **form):
    """Make a student that copies layers 0 and 1 of its teacher."""
    student, teacher = subject(0), subject(7)
    transfer = Transfer(method="copy", layers=(0, 1), **form)
    return subjects.Subject(
        "copy", evaluation.Predictor(student.module, transfer, teacher.module), student.network
    ), teacher


def test_a_copy_students_own_maps_are_its_teachers(subject, pictures):
    one, teacher = copying(subject)
    some = pictures(one, 5)
    put_in = (
        Replacement("own"),
        Replacement(teacher, layers=(0, 1)),
        Replacement(teacher, layers=(1,), heads=(2,)),
        Replacement("uniform", layers=(1,), heads=(0,)),
    )
    own, theirs, part, uniform = run(one, some, *put_in)
    for outcome in (own, theirs, part):
        assert outcome.logits <= 1e-5
    assert uniform.logits > 1e-4
    for replacement in (Replacement("own", "q", (0,)), Replacement("shuffled", "v", (1,))):
        with pytest.raises(UserError, match="copies the map of its teacher in layers"):
            run(one, some, replacement)
    some_heads, _ = copying(subject, heads=(0, 1))
    assert run(some_heads, some, Replacement("own"))[0].logits <= 1e-5
    with pytest.raises(UserError, match="copies the map"):
        run(some_heads, some, Replacement("own", heads=(2,)))


def test_accuracy_is_reported_with_its_interval():
    labels = np.arange(8) % 4
    after = labels.copy()
    after[:2] = 3
    facts = {"subject": "a", "replaced": "b", "layers": (0,), "heads": None, "images": 8, "residual": np.zeros(1)}
    outcome = Outcome(
        **facts, before=labels, after=after, labels=labels, clusters=None, residual_class=None, logits=1.0
    )
    assert outcome.top1 == (100, 75) and outcome.flips == 25
    value, low, high = outcome.change
    d = np.array([-1, -1, 0, 0, 0, 0, 0, 0])
    half = 100 * 2.3646 * d.std(ddof=1) / np.sqrt(8)  # the paired t interval, 7 degrees of freedom
    assert value == -25 and low == pytest.approx(-25 - half, rel=1e-4) and high == pytest.approx(-25 + half, rel=1e-4)
    frame = interventions.frame([outcome])
    assert frame.loc[0, ["top1_before", "top1_after", "change"]].tolist() == [100, 75, -25]


def test_streaming_equals_one_shot(subject, pictures):
    one, other = subject(0), subject(1)
    some = pictures(one, 7)
    for small, whole in zip(
        *(run(one, some, Replacement(other), Replacement("uniform", layers=(1,)), batch=b) for b in (3, 7)), strict=True
    ):
        assert (small.after == whole.after).all() and (small.labels == whole.labels).all()
        np.testing.assert_allclose(small.residual, whole.residual, rtol=1e-5)


def test_mismatched_networks_are_refused_in_one_line(subject, pictures):
    one = subject()
    for replacement, message in (
        (Replacement("unifrom"), "did you mean 'uniform'"),
        (Replacement("uniform", "q"), "can replace a map, not q"),
        (Replacement("own", "maps"), "did you mean 'map'"),
        (Replacement("own", layers=(3,)), "layer 3 is out of range"),
        (Replacement("own", heads=(3,)), "head 3 is out of range"),
        (
            Replacement(subject(1, heads=4)),
            "has 4 heads, and net 0 has 3: use a network with 3 heads, 5 x 5 patches",
        ),
        (Replacement(subject(1, width=36), "v"), "heads are 12 wide, net 0's 8"),
        (Replacement(subject(1, class_token=False)), "has no class token, and net 0 has one"),
        (Replacement(subject(1, depth=4)), "`layer_map`"),
    ):
        with pytest.raises(UserError, match=message):
            run(one, pictures(one), replacement)
