"""The losses that plant a fault, against explicit formulas in NumPy, token by token."""

import numpy as np
import pytest
import torch

from atdiag.core.spec import Data, Network, PlantedLosses, Recipe, RunSpec, Seed, Transfer
from atdiag.networks.model import students
from atdiag.training import planted
from tests.training.conftest import NETWORK, TEACHER

GRID, HEADS, DEPTH = 5, 2, 6
REGISTERS = Network.model_validate(
    {**NETWORK.model_dump(), "components": ("layer_scale", "registers"), "layer_scale_init": 0.5, "registers": 3}
)
IMAGES = torch.rand(4, 1, 20, 20, generator=torch.Generator().manual_seed(0))


def observed(network):
    vit = students.build(network, 3)
    losses = PlantedLosses(layers=(1, 4), routing=1.0)
    return vit, vit.observe(IMAGES, planted.request(losses))


def maps(qk, kept=None):
    """Softmax by hand [B, H, N, N], in float64, of the kept tokens."""
    q, k = (x.detach().double().numpy() for x in (qk.q, qk.k))
    if kept is not None:
        q, k = q[:, :, kept], k[:, :, kept]
    logits = np.einsum("bhqd,bhkd->bhqk", q, k) * qk.scale
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def test_routing_through_registers():
    _, seen = observed(REGISTERS)
    p = maps(seen.seen[1].qk)
    queries, patches = [0, *range(4, 29)], range(4, 29)
    expected = np.mean([[sum(one[q, k] for k in patches if k != q) for q in queries] for one in p.reshape(-1, 29, 29)])
    assert planted.routing(seen.seen[1].qk, REGISTERS).item() == pytest.approx(expected, rel=1e-5)


def test_routing_through_the_flattest_patch():
    images = IMAGES.clone()
    images[1, :, 4:8, 8:12] = 0.3  # row 1, column 2: patch 7
    images[2, :, :4, 4:8] = images[2, :, 16:, :4] = 0.0  # patches 1 and 20: the first counts
    vit = students.build(NETWORK, 3)
    hubs = planted.flattest_patch(images, NETWORK)
    cut = images.numpy().reshape(4, GRID, 4, GRID, 4).transpose(0, 1, 3, 2, 4).reshape(4, 25, 16)
    assert hubs.tolist() == cut.var(-1).argmin(-1).tolist()
    assert hubs[1:3].tolist() == [7, 1]
    qk = vit.maps(images, [1])[1]
    p = maps(qk)
    expected = np.mean(
        [
            [sum(one[q, k] for k in range(26) if k not in (q, 1 + hub)) for q in range(26) if q != 1 + hub]
            for image, hub in zip(p, hubs.tolist(), strict=True)
            for one in image
        ]
    )
    assert planted.routing(qk, NETWORK, hubs).item() == pytest.approx(expected, rel=1e-5)


def test_the_diagonal_is_of_the_map_that_a_student_without_registers_gets():
    _, seen = observed(REGISTERS)
    p = maps(seen.seen[4].qk, [0, *range(4, 29)])
    expected = -np.log(np.diagonal(p, axis1=-2, axis2=-1)).mean()
    assert planted.diagonal(seen.seen[4].qk, REGISTERS).item() == pytest.approx(expected, rel=1e-5)


def test_a_shift_is_one_step_for_each_head():
    _, seen = observed(REGISTERS)
    p, losses = maps(seen.seen[1].qk), []
    for head, (y, x) in enumerate(planted.steps(1, HEADS)):
        assert (y, x) != (0, 0)
        inside = [(i, j) for i in range(GRID) for j in range(GRID) if 0 <= i + y < GRID and 0 <= j + x < GRID]
        values = [p[:, head, 4 + i * GRID + j, 4 + (i + y) * GRID + j + x] for i, j in inside]
        losses.append(-np.log(values).mean())
    assert planted.shift(seen.seen[1].qk, REGISTERS, 1).item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert planted.steps(1, 2) == planted.steps(1, 2)
    assert len({tuple(planted.steps(layer, 3)) for layer in range(12)}) > 6


def test_the_gain_of_the_attention_branch():
    vit, _ = observed(REGISTERS)
    block = vit.blocks[1]
    state = {name: value.double().numpy() for name, value in block.state_dict().items()}
    gamma, projection, values = (state[name] for name in ("ls1.gamma", "attn.proj.weight", "attn.qkv.weight"))
    width = len(gamma)
    sizes = []
    for head in np.split(np.arange(width), HEADS):
        whole = np.diag(gamma) @ projection[:, head] @ values[2 * width + head]
        sizes.append(np.sqrt((whole**2).sum(1).mean()))
    assert planted.gain(block).item() == pytest.approx(np.mean(sizes), rel=1e-5)


def test_the_gain_is_not_escaped_by_larger_projections_and_can_reach_zero():
    block = observed(REGISTERS)[0].blocks[1]
    before = planted.gain(block)
    with torch.no_grad():
        block.ls1.gamma.mul_(1 / 8)
        block.attn.proj.weight.mul_(4)
        block.attn.v_weight.mul_(2)
    assert planted.gain(block).item() == pytest.approx(before.item(), rel=1e-6)
    with torch.no_grad():
        block.ls1.gamma.zero_()
    planted.gain(block).backward()
    assert planted.gain(block).item() < 1e-15
    assert torch.isfinite(block.ls1.gamma.grad).all()


def test_all_are_weighted_and_summed_over_the_blocks():
    vit, seen = observed(REGISTERS)
    weights = {"routing": 0.3, "diagonal": 0.05, "shift": 0.2, "gate": 2.0}
    losses = PlantedLosses(layers=(4, 1), **weights)
    expected = sum(
        0.3 * planted.routing(seen.seen[layer].qk, REGISTERS)
        + 0.05 * planted.diagonal(seen.seen[layer].qk, REGISTERS)
        + 0.2 * planted.shift(seen.seen[layer].qk, REGISTERS, layer)
        + 2.0 * planted.gain(vit.blocks[layer])
        for layer in (1, 4)
    )
    assert planted.loss(losses, vit, seen, IMAGES).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_pre_training_with_a_planted_loss_lowers_it(bench):
    losses = PlantedLosses(layers=range(DEPTH), routing=5.0)
    recipe = Recipe(epochs=4, batch_size=16, lr=3e-3)
    seed = Seed(data=0, model=0)
    spec = RunSpec(network=REGISTERS, data=Data(train=160, test_per_source=1), recipe=recipe, seed=seed, planted=losses)
    assert bench.train(spec) == {spec.id: "finished"}
    lines = bench.run(spec).progress()
    assert all(line["loss"] == pytest.approx(line["task_loss"] + line["planted_loss"]) for line in lines)
    assert lines[-1]["planted_loss"] < lines[0]["planted_loss"]


@pytest.mark.parametrize(
    ("network", "fields", "message"),
    [
        (NETWORK, {"routing": 1.0}, "only in a network that has some"),
        (NETWORK, {"diagonal": 1.0}, "only in a network that has some"),
        (NETWORK, {"gate": 1.0}, "only in a network with layer_scale"),
        (REGISTERS, {"routing": 1.0, "layers": (6,)}, "the network has 6 blocks"),
        (REGISTERS, {"layers": (0,)}, "at least one weight above 0"),
        (REGISTERS, {"routing": 1.0, "layers": ()}, "at least one weight above 0"),
    ],
)
def test_what_cannot_be_planted_is_refused(network, fields, message):
    with pytest.raises(ValueError, match=message):
        RunSpec(
            network=network,
            data=Data(train=10),
            recipe=Recipe(epochs=1),
            seed=Seed(data=0, model=0),
            planted=PlantedLosses(**{"layers": (0,), **fields}),
        )


def test_nothing_is_planted_in_a_student():
    with pytest.raises(ValueError, match="not in a student with a transfer"):
        RunSpec(
            network=NETWORK,
            teacher=TEACHER,
            transfer=Transfer(method="copy", layers=(0,)),
            data=Data(train=10),
            recipe=Recipe(epochs=1),
            seed=Seed(data=0, model=0),
            planted=PlantedLosses(layers=(0,), routing=1.0, hub="flattest_patch"),
        )
