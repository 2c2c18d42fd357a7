"""Compiled networks compute what uncompiled ones do, and never fall back silently."""

import pytest
import torch

from atdiag.core.errors import UserError
from atdiag.core.spec import Network, Transfer
from atdiag.networks.model import students
from atdiag.training import compiled
from atdiag.transfer import methods
from atdiag.transfer.observation import of_teacher

NETWORK = Network(image_size=12, patch_size=4, channels=1, width=24, depth=3, heads=3, classes=5)
NATIVE = NETWORK.model_copy(update={"components": ("layer_scale", "rel_pos_bias"), "layer_scale_init": 0.1})
TRANSFERS = [
    Transfer(),
    Transfer(method="copy", layers=(0, 2)),
    Transfer(method="distill", layers=(0, 1, 2)),
    Transfer(method="copy", layers=(1,), heads=(0, 2)),
    Transfer(method="distill", layers=(1,), tensor="v"),
]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch._dynamo.config.patch({}):
        yield
    torch._dynamo.reset()


def step(student, teacher, transfer, images):
    """Return logits, loss and gradients of one training step."""
    with torch.no_grad():
        shown = teacher.observe(images, of_teacher([transfer]))
    keep = torch.ones(3, 2, 2, 1, 1)
    logits, loss = methods.forward(student, transfer, images, shown, keep)
    (logits.square().sum() + (0 if loss is None else loss)).backward()
    return logits, loss, [p.grad for p in student.parameters()]


def both(network, backend):
    for transfer in TRANSFERS:
        found = []
        for wrap in (lambda vit: None, lambda vit: compiled.compile_blocks(vit, backend)):
            student, teacher = students.build(network, 0), students.build(network, 1).eval()
            wrap(student), wrap(teacher)
            found.append(step(student, teacher, transfer, torch.ones(2, 1, 12, 12).cumsum(-1) / 12))
        yield found


@pytest.mark.parametrize("network", [NETWORK, pytest.param(NATIVE, marks=pytest.mark.slow)])
def test_the_graph_of_a_block_has_no_break_and_the_same_numbers(network):
    """With only the compiler's front end, numbers are equal bit for bit."""
    for eager, traced in both(network, "aot_eager"):
        torch.testing.assert_close(traced, eager, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("network", [NETWORK, NATIVE])
def test_compiled_and_eager_agree(network):
    for eager, fast in both(network, "inductor"):
        torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-4)


def test_all_blocks_share_one_graph():
    student = students.build(NETWORK, 0)
    compiled.compile_blocks(student, counter := Counting())
    student(torch.rand(2, 1, 12, 12))
    assert counter.graphs == 1


class Counting:
    """A compiler backend that counts graphs and compiles none."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def test_one_recompilation_too_many_is_an_error(monkeypatch):
    monkeypatch.setattr(compiled, "_LIMIT", 2)
    student = students.build(NETWORK, 0)
    compiled.compile_blocks(student, Counting())
    student(torch.rand(2, 1, 12, 12)), student(torch.rand(3, 1, 12, 12))
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        student(torch.rand(4, 1, 12, 12))
    with compiled.eagerly():
        student(torch.rand(4, 1, 12, 12))


@pytest.mark.parametrize(
    ("choice", "device", "expected"), [("", "cpu", 0), ("", "cuda", 1), ("1", "cpu", 1), ("0", "cuda", 0)]
)
def test_the_environment_variable_decides(monkeypatch, choice, device, expected):
    monkeypatch.setenv(compiled.VARIABLE, choice)
    assert compiled.wanted(torch.device(device)) == bool(expected)
    monkeypatch.setenv(compiled.VARIABLE, "yes")
    with pytest.raises(UserError, match="give 1"):
        compiled.wanted(torch.device(device))
