"""What a transfer costs: counts against explicit shapes, one real measurement, and the claim on constructed ones."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ablations import claims
from ablations.cost import METHODS, as_kd, findings, measured, planned, seconds_needed, step
from atdiag.core.errors import UserError
from atdiag.core.spec import Network, Transfer
from atdiag.execution.cost import activations
from atdiag.networks.model import students
from atdiag.study.builder import Lab
from atdiag.study.protocol import BASELINE
from atdiag.study.settings import resolve
from atdiag.training import steps
from atdiag.training.steps import Bench
from atdiag.transfer import ops
from atdiag.transfer.observation import of_teacher
from figures.cost import cost as draw
from tests.drawings import check
from tests.studies import lab

MINI = planned(lab(), "deit_s", batch=2)


def test_vit_l_of_the_paper_is_counted_without_weights():
    paper = Lab(resolve("paper", environment={}, folder=Path("/nonexistent")))
    costs = planned(paper)
    assert (costs.teacher.name, costs.batch, list(costs.specs)) == ("mae_l", 16, [BASELINE, *METHODS])
    blocks, heads, tokens, width = 24, 16, 197, 1024
    for name in ("copy", "distill"):
        found = activations(costs.specs[name])
        assert found.as_maps == blocks * heads * tokens * tokens
        assert found.as_qk == blocks * 2 * tokens * width
    assert (activations(costs.specs["logits"]).as_maps, activations(costs.specs["logits"]).as_qk) == (1000, 1000)
    assert activations(costs.specs["finetune"]).as_maps == activations(costs.specs[BASELINE]).as_qk == 0
    assert seconds_needed(costs, 21, 50e9) > 3600


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers": (0, 11)},
        {"heads": (1,)},
        {"tensor": "q"},
        {"tensor": "v"},
        {"method": "features"},
        {"method": "logits"},
    ],
    ids=str,
)
def test_counts_are_the_elements_of_what_the_teacher_shows(changes):
    """One image through the teacher, and the elements of the tensors that then pass, counted."""
    base = planned(lab(), "dinov2_reg_s").specs["copy"]  # its registers do not pass
    fields = {"method": "copy", "layers": tuple(range(12)), **changes}
    transfer = Transfer(**({"method": "logits"} if fields["method"] == "logits" else fields))
    spec = base.model_copy(update={"transfer": transfer})
    bench = Bench(spec.teacher.network, spec.network, 1, torch.device("cpu"))
    shown = bench.show(transfer, spec.network)
    found = activations(spec)
    if transfer.method == "logits":
        assert (found.as_maps, found.as_qk) == (shown.logits.numel(),) * 2
        return
    if transfer.method == "features":
        assert found.as_maps == sum(one.numel() for one in shown.features.values())
        return
    share = len(transfer.heads or (0, 1)) / 2
    records = [shown.seen[layer] for layer in transfer.layers]
    if transfer.tensor == "map":
        assert found.as_maps == share * sum(ops.probabilities(one.map).numel() for one in records)
        assert found.as_qk == share * sum(one.map.q.numel() + one.map.k.numel() for one in records)
    else:
        tensors = [one.v if transfer.tensor == "v" else one.map.q for one in records]
        assert found.as_maps == found.as_qk == sum(one.numel() for one in tensors)


def test_a_step_of_every_method_is_measured(monkeypatch):
    told = []
    monkeypatch.setattr(steps, "memory", lambda one, device: 10.0 + len(one.transfer.layers))  # measured below
    costs = measured(MINI, "cpu", 1, 6, lambda done, total: told.append((done, total)))
    assert costs.seconds.keys() == costs.specs.keys() and {len(times) for times in costs.seconds.values()} == {6}
    assert min(time for times in costs.seconds.values() for time in times) > 0
    assert costs.memory_of("copy") == 2.2 and costs.memory_of("logits") == 1
    assert told[-1] == (11, 11)
    one = costs.time_of("copy")
    assert one.low <= one.value <= one.high and costs.time_of(BASELINE).value == 1
    (found,) = findings(costs)
    assert found.verdict in ("holds", "does not hold", "undecided") and "batch 2" in found.note


@pytest.mark.skipif(not steps.MEMORY.exists(), reason="a process's memory is measured on Linux")
def test_the_memory_of_a_step_is_measured_in_a_process_of_its_own():
    """A batch of random images [64, 1, 64, 64] and what 2 blocks keep of them: more than 4 MiB, less than 400."""
    network = Network(image_size=64, patch_size=4, channels=1, width=32, depth=2, heads=2, classes=10)
    used = steps.memory(steps.StepOf(network=network, batch=64), torch.device("cpu"))
    tokens = 64 * 257 * 32 * 4 / 2**20  # MiB of one [images, tokens, width] in float32; a block keeps about ten
    assert 2 * tokens < used < 100 * tokens


def test_a_step_trains_what_the_runs_of_its_method_train():
    """A copy-student's queries and keys have no part in the step; every other parameter moves."""
    network = Network(image_size=8, patch_size=4, channels=1, width=16, depth=2, heads=2, classes=3)
    bench = Bench(network, network, 2, torch.device("cpu"))
    made = []
    keep, build = students.build, lambda *args: made.append(keep(*args)) or made[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(students, "build", build)
        step = bench.step(network, Transfer(method="copy", layers=(0, 1)))
    (student,) = made
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    step()
    moved = {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}
    unused = {id(p) for block in student.blocks for p in block.attn.unused_parameters().values()}
    assert unused and moved == {name for name, value in student.named_parameters() if id(value) not in unused}
    assert of_teacher([Transfer(method="copy", layers=(0, 1))])


def made_up(copy=1.0, distill=1.0, spread=0.02, memory=(1.0, 1.0), rounds=21):
    """Make costs in which copying and distilling take such multiples of KD's time and memory."""
    steps = [1 + spread * (2 * i / (rounds - 1) - 1) for i in range(rounds)]
    by = {BASELINE: 1.0, "finetune": 1.0, "logits": 1.5, "copy": 1.5 * copy, "distill": 1.5 * distill}
    seconds = {
        name: [value * (step if name in ("copy", "distill") else 1.0) for step in steps] for name, value in by.items()
    }
    used = {BASELINE: 100.0, "finetune": 100.0, "logits": 100.0}
    if memory:
        used |= {"copy": 100.0 * memory[0], "distill": 100.0 * memory[1]}
    return replace(MINI, seconds=seconds, memory=used if memory else {})


@pytest.mark.parametrize(
    ("costs", "verdict"),
    [
        (made_up(), "holds"),
        (made_up(0.9, 1.2), "holds"),
        (made_up(1.4), "does not hold"),
        (made_up(distill=0.7), "does not hold"),
        (made_up(distill=1.24, spread=0.2), "undecided"),
        (made_up(memory=(1.0, 1.3)), "does not hold"),
        (made_up(memory=()), "holds"),
        (MINI, "not testable here"),
    ],
)
def test_whether_it_costs_what_kd_does(costs, verdict):
    found = as_kd(costs)
    assert found.verdict == verdict, found
    assert found.claim == claims.stated("cost", "attention transfer costs what KD does")
    assert ("memory can't be measured" in found.note) == bool(costs.seconds and not costs.memory)


def test_the_figure_shows_times_and_memory():
    for costs in (made_up(1.3, 1.6, 0.3, (1.1, 1.4)), made_up(memory=())):
        times = {name: costs.time_of(name) for name in METHODS}
        memory = {name: costs.memory_of(name) for name in METHODS} if costs.memory else {}
        figure = draw("cost, deit_s (mini), batch 32\ncpu", times, memory, BASELINE)
        drawn = check(figure)
        assert {f"{one.value:.2f}" for one in times.values()} | {f"{one:.2f}" for one in memory.values()} <= drawn
        assert len(figure.axes[0].patches) == len(times) + len(memory)


@pytest.mark.parametrize(
    ("teacher", "sets", "batch", "message"),
    [
        ("deit", (), None, "unknown teacher 'deit'"),
        ("deit_s,deit_b", (), None, "costs are those of one teacher"),
        ("deit_s", (), 0, "`batch` 0 is no number"),
        ("deit_s", ("transfer.average=examples",), None, "need the teacher's weights"),
        ("", (), None, "`teacher` is empty: name one, such as deit_s"),
        ("deit_s", ("recipe.batch_size=8",), 4, "both say how many images a step has: leave one of them out"),
    ],
)
def test_bad_input(teacher, sets, batch, message):
    with pytest.raises(UserError, match=message):
        planned(lab(*sets), teacher, batch)


def test_too_few_rounds_are_refused():
    with pytest.raises(UserError, match="`repeats` 5: too few for an interval of a median"):
        measured(MINI, "cpu", 1, 5)


def test_a_step_is_what_its_cost_depends_on():
    def steps_of(*sets):
        return {name: step(spec) for name, spec in planned(lab(*sets), "deit_s").specs.items()}

    usual = steps_of()
    assert steps_of("recipe.lr=0.1", "data.train=640") == usual
    fewer = steps_of("transfer.layers=top:3")
    assert {name for name in usual if fewer[name] != usual[name]} == {"copy", "distill"}
    assert all(steps_of("recipe.batch_size=8")[name] != usual[name] for name in usual)
