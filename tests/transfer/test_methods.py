"""Each transfer method: the student's output and loss, given the teacher's observation."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from atdiag.core.spec import Network, Transfer
from atdiag.networks.model import students
from atdiag.transfer import divergences, methods, ops
from atdiag.transfer.attention import AttentionOverride
from atdiag.transfer.observation import CaptureRequest, Observation, of_student, of_teacher

SMALL = Network(image_size=8, patch_size=4, channels=1, width=12, depth=3, heads=3, classes=4)
DEEP = SMALL.model_copy(update={"depth": 5})
NONE, COPY, DISTILL = Transfer(), Transfer(method="copy", layers=(0, 2)), Transfer(method="distill", layers=(0, 2))
EVERYTHING = CaptureRequest(frozenset(range(3)), frozenset(range(3)), frozenset(range(3)), logits=True)
IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def student():
    return students.build(SMALL, 0)


@pytest.fixture
def teacher():
    return students.build(SMALL, 1).eval().requires_grad_(False)


@pytest.fixture
def shown(teacher):
    return teacher.observe(IMAGES, EVERYTHING)


def probabilities(qk):
    return ops.logits(qk).softmax(-1)


# The papers' three methods


def test_none_is_the_student_alone(student, shown):
    logits, loss = methods.forward(student, NONE, IMAGES, shown)
    assert loss is None and torch.equal(logits, student(IMAGES))


def test_copy_gives_the_teachers_maps_to_its_layers_only(student, shown):
    logits, loss = methods.forward(student, COPY, IMAGES, shown)
    assert loss is None and not torch.allclose(logits, student(IMAGES), atol=1e-3)
    assert torch.equal(logits, student(IMAGES, {i: AttentionOverride("map", shown.seen[i].qk) for i in (0, 2)}))
    assert torch.equal(logits, methods.forward_test(student, COPY, IMAGES, shown))
    logits.sum().backward()
    untouched = [all(p.grad is None for p in block.attn.unused_parameters().values()) for block in student.blocks]
    assert untouched == [True, False, True]


@pytest.mark.parametrize("weight", [3.0, 0.5])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_distill_adds_the_weighted_cross_entropies(student, shown, weight, reduce):
    transfer = Transfer(method="distill", layers=(0, 2), weight=weight, reduce=reduce)
    logits, loss = methods.forward(student, transfer, IMAGES, shown)
    own = student.maps(IMAGES, range(3))
    assert torch.equal(logits, student(IMAGES))
    each = [-(probabilities(shown.seen[i].qk) * probabilities(own[i]).log()).sum(-1).mean() for i in (0, 2)]
    torch.testing.assert_close(loss, weight * sum(each) / (2 if reduce == "mean" else 1))
    assert torch.equal(methods.forward_test(student, transfer, IMAGES, Observation()), student(IMAGES))
    kl = [(probabilities(shown.seen[i].qk).log() - probabilities(own[i]).log()) for i in (0, 2)]
    kl = [(probabilities(shown.seen[i].qk) * d).sum(-1).mean() for i, d in zip((0, 2), kl, strict=True)]
    torch.testing.assert_close(methods.excess(transfer, shown, loss), sum(kl) / 2)


def test_the_distillation_loss_decreases_along_its_gradient(student, shown):
    optimizer, losses = torch.optim.SGD(student.parameters(), lr=0.5), []
    for _ in range(10):
        optimizer.zero_grad()
        _, loss = methods.forward(student, DISTILL, IMAGES, shown)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    floor = DISTILL.weight * sum(divergences.entropy(shown.seen[i].qk).item() for i in (0, 2))
    assert floor < losses[-1] < losses[0]


@pytest.mark.parametrize("transfer", [NONE, COPY, DISTILL])
def test_keep_reaches_the_student(student, shown, transfer):
    keep = torch.zeros(3, 2, 3, 1, 1)
    assert torch.equal(methods.forward(student, transfer, IMAGES, shown, keep)[0], student(IMAGES, keep=keep))


# Requests to a teacher


def test_a_teacher_is_asked_for_no_more_than_is_needed():
    assert not of_teacher([NONE]) and not of_teacher([Transfer(method="copy", layers=(1,), average="examples")])
    assert of_teacher([COPY, DISTILL]) == CaptureRequest(maps={0, 2}) == of_student(DISTILL)
    assert not of_student(COPY)
    mixed = [Transfer(method="distill", layers=(0,), teacher_layers=(4,), tensor="v"), Transfer(method="logits")]
    assert of_teacher(mixed) == CaptureRequest(values={4}, logits=True)
    assert of_student(mixed[0]) == CaptureRequest(values={0})
    assert of_teacher([Transfer(method="features", layers=(1,))]).whole_blocks == 2


def test_only_copy_needs_the_teacher_at_test_time():
    others = [DISTILL, Transfer(method="logits"), Transfer(method="features", layers=(1,))]
    assert [methods.needs_teacher_at_test(t) for t in (NONE, COPY, *others)] == [False, True, False, False, False]


# Every combination of options


FORMS = st.fixed_dictionaries(
    {"method": st.sampled_from(["copy", "distill"]), "tensor": st.sampled_from(["map", "q", "k", "v"])},
    optional={
        "heads": st.sets(st.integers(0, 2), min_size=1, max_size=2).map(tuple),
        "different_heads": st.integers(1, 2),
        "average": st.sampled_from(["queries", "heads", "layers", "examples"]),
        "pairs": st.dictionaries(st.integers(0, 2), st.integers(0, 4), min_size=1),
        "loss": st.sampled_from(["ce", "mse", "jsd", "l1", "logits_mse"]),
    },
)


@settings(max_examples=60, deadline=None)
@given(FORMS)
def test_every_form_against_an_oracle(form):
    """Any layers, layer mapping, heads, tensor, average and loss, against explicit formulas in terms of the maps."""
    pairs = form.pop("pairs", {0: 0, 2: 2})
    if form["tensor"] != "map":
        form.pop("average", None), form.pop("loss", None)
    if form["method"] == "copy" or (form.get("average") and form.get("loss") == "logits_mse"):
        form.pop("loss", None)
    if "different_heads" in form:
        form.pop("heads", None), form.pop("average", None)
    transfer = Transfer(layers=tuple(pairs), teacher_layers=tuple(pairs.values()), **form)
    student, teacher = students.build(SMALL, 0), students.build(DEEP, 1)
    with torch.no_grad():
        shown = teacher.observe(IMAGES, CaptureRequest(maps=frozenset(range(5)), values=frozenset(range(5))))
    heads = {layer: list(transfer.heads or range(3)) for layer in transfer.layers}
    if (count := transfer.different_heads) is not None:  # other heads in each of the teacher's blocks
        shown = replace(shown, heads={i: tuple(sorted({i % 3, (i + 1) % 3})[:count]) for i in range(5)})
        heads = {
            layer: list(shown.heads[source]) for layer, source in zip(transfer.layers, transfer.sources, strict=True)
        }
    targets = {}
    for layer, source in zip(transfer.layers, transfer.sources, strict=True):
        seen = shown.seen[source]
        tensors = {"map": probabilities(seen.qk), "q": seen.qk.q, "k": seen.qk.k, "v": seen.v}
        targets[layer] = tensors[transfer.tensor][:, heads[layer]]
    if transfer.average == "examples":
        sources = dict(zip(transfer.layers, transfer.sources, strict=True))
        averages = {sources[i]: ops.Averaged(p.mean(0, keepdim=True)) for i, p in targets.items()}
        shown = replace(shown, averages=averages)
    if transfer.average == "layers":
        targets = dict.fromkeys(targets, torch.stack(list(targets.values())).mean(0))
    elif transfer.average:
        over = {"queries": 2, "heads": 1, "examples": 0}[transfer.average]
        targets = {i: p.mean(over, keepdim=True).expand_as(p) for i, p in targets.items()}

    if transfer.method == "copy":
        logits = methods.forward_test(student, transfer, IMAGES, shown)
        torch.testing.assert_close(logits, copied(student, transfer, targets, heads), rtol=1e-4, atol=1e-4)
        return
    logits, loss = methods.forward(student, transfer, IMAGES, shown)
    own = student.observe(IMAGES, CaptureRequest(maps=frozenset(pairs), values=frozenset(pairs))).seen
    expected = 0.0
    for layer, source in zip(transfer.layers, transfer.sources, strict=True):
        if transfer.tensor != "map":
            mine = {"q": own[layer].qk.q, "k": own[layer].qk.k, "v": own[layer].v}[transfer.tensor][:, heads[layer]]
            expected += (mine - targets[layer]).square().mean()
        else:
            both = [ops.logits(one.qk)[:, heads[layer]] for one in (own[layer], shown.seen[source])]
            expected += compare(transfer.loss, targets[layer], *both)
    assert torch.equal(logits, student(IMAGES))
    torch.testing.assert_close(loss, transfer.weight * expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


def compare(loss, p_t, s, t):
    """Compute the losses by definition; p_t: the target, s and t: both networks' logits."""
    p_s = s.softmax(-1)
    if loss == "ce":
        return -(p_t * p_s.log()).sum(-1).mean()
    if loss == "mse":
        return (p_t - p_s).square().sum(-1).mean()
    if loss == "l1":
        return (p_t - p_s).abs().sum(-1).mean()
    if loss == "jsd":
        m = (p_t + p_s) / 2
        kl = [(p * (p / m).log2()).sum(-1) for p in (p_t, p_s)]
        return ((kl[0] + kl[1]) / 2).mean()
    s, t = (x - x.mean(-1, keepdim=True) for x in (s, t))
    return (s - t).square().mean()


def copied(student, transfer, targets, heads):
    """Compute a copying student's logits with its attention written out head by head."""
    x = student.embed(IMAGES)
    for i, block in enumerate(student.blocks):
        attn, z = block.attn, block.norm1(x)
        seen = attn.peek(z, values=True)
        p, q, k, v = probabilities(seen.qk).clone(), seen.qk.q.clone(), seen.qk.k.clone(), seen.v.clone()
        if i in targets:
            {"map": p, "q": q, "k": k, "v": v}[transfer.tensor][:, heads[i]] = targets[i]
            if transfer.tensor in "qk":
                p = (attn.scale * q @ k.transpose(-2, -1)).softmax(-1)
        x = x + attn.proj((p @ v).transpose(1, 2).reshape(x.shape))
        x = x + block.mlp(block.norm2(x))
    return student.forward_head(student.norm(x))


# Comparison losses


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_logit_distillation_equals_hintons_formula(student, shown, temperature):
    transfer = Transfer(method="logits", temperature=temperature, weight=0.7)
    logits, loss = methods.forward(student, transfer, IMAGES, shown)
    p, q = ((x.double() / temperature).softmax(-1) for x in (shown.logits, logits))
    expected = 0.7 * temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    assert methods.forward(student, transfer, IMAGES, replace(shown, logits=logits.detach())).loss.abs() < 1e-6


def test_feature_distillation_compares_residual_streams(student, teacher, shown):
    transfer = Transfer(method="features", layers=(0, 2))
    _, loss = methods.forward(student, transfer, IMAGES, shown)
    own = student.observe(IMAGES, EVERYTHING).features
    whitened = [[F.layer_norm(x[i], (12,)) for x in (own, shown.features)] for i in (0, 2)]
    torch.testing.assert_close(loss, sum((a - b).square().mean() for a, b in whitened))
    mine = teacher.observe(IMAGES, EVERYTHING)
    assert methods.forward(teacher, transfer, IMAGES, mine).loss == 0


@pytest.mark.parametrize("tensor", ["q", "k", "v"])
def test_tensors_are_compared_in_the_precision_that_they_have(student, teacher, tensor):
    transfer = Transfer(method="distill", layers=(0, 2), tensor=tensor, weight=2.0)
    images, student, teacher = IMAGES.double(), student.double(), teacher.double()
    seen = teacher.observe(images, of_teacher([transfer]))
    own = student.observe(images, of_student(transfer))
    found = methods.loss(transfer, seen, own)

    def of(shown, layer):
        return (shown.seen[layer].v if tensor == "v" else getattr(shown.seen[layer].qk, tensor)).detach().numpy()

    assert found.dtype == torch.float64
    wanted = 2 * sum(((of(seen, layer) - of(own, layer)) ** 2).mean() for layer in (0, 2))
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-14)
    half = methods.loss(
        transfer, teacher.bfloat16().observe(IMAGES.bfloat16(), of_teacher([transfer])),
        student.bfloat16().observe(IMAGES.bfloat16(), of_student(transfer)),
    )  # fmt: skip
    assert half.dtype == torch.float32
