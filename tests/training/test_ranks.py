"""Runs over 2 and 3 ranks (processes of torchrun, gloo) against the same runs in one process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atdiag.core.runs import Store
from atdiag.data import sources
from atdiag.networks.model.vit import ViT
from atdiag.training import evaluation
from atdiag.transfer import methods
from atdiag.transfer.observation import Observation, of_teacher
from tests.training import in_ranks
from tests.training.conftest import load_teacher

ROOT = Path(__file__).parents[2]
RUNS = [spec for group in in_ranks.specs() for spec in group]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    in_ranks.train(folder)
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def together(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"ranks-{request.param}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request.param}"]
    done = subprocess.run(
        [*command, "-m", "tests.training.in_ranks", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return folder


def trained(store: Store, spec):
    """Return a run's weights, and the logits of 32 test images."""
    weights = load_file(store.run(spec).weights)
    network = ViT(spec.network).eval().requires_grad_(False)
    network.load_state_dict(weights)
    images = torch.from_numpy(sources.find(spec.data).test_split(spec.data).batch(0, 32)).float() / 255
    shown = Observation()
    if methods.needs_teacher_at_test(spec.transfer):
        teacher = load_teacher(spec.teacher)
        shown = evaluation.fit(teacher.observe(images, of_teacher([spec.transfer])), teacher, spec.network)
        shown = evaluation.replace(shown, averages=evaluation.averages(spec, teacher))
    return weights, methods.forward_test(network, spec.transfer, images, shown)


def largest_differences(spec, one: Store, other: Store):
    """Return the largest differences of losses, logits, weights but for k's bias, and k's bias."""
    lines = [store.run(spec).progress() for store in (one, other)]
    assert [line.keys() for line in lines[0]] == [line.keys() for line in lines[1]]
    assert lines[0][-1]["step"] == lines[1][-1]["step"] == 30
    names = {"loss", "task_loss", "transfer_loss", "grad_norm", "kl"} & lines[0][0].keys()
    losses = max(abs(a[name] - b[name]) for a, b in zip(*lines, strict=True) for name in names)
    (here, logits), (there, others) = (trained(store, spec) for store in (one, other))
    bias, rest = [0.0], [0.0]
    for name, value in here.items():
        parts = zip("qkv", value.chunk(3), there[name].chunk(3), strict=True)
        if not name.endswith("qkv.bias"):
            parts = [("", value, there[name])]
        for part, a, b in parts:
            (bias if part == "k" else rest).append((a - b).abs().max().item())
    return losses, (logits - others).abs().max().item(), max(rest), max(bias)


@pytest.mark.slow
@pytest.mark.parametrize("spec", RUNS, ids=lambda spec: spec.transfer.method + (spec.transfer.average or ""))
def test_after_30_steps_in_float64_all_is_equal(alone, together, spec):
    with in_ranks.float64():
        found = largest_differences(spec, Store(alone / "float64"), Store(together / "float64"))
    print("float64", spec.transfer.method, *(f"{one:.1e}" for one in found))
    losses, logits, weights, _ = found
    assert losses < 1e-9
    assert logits < 1e-9
    assert weights < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("spec", RUNS, ids=lambda spec: spec.transfer.method + (spec.transfer.average or ""))
def test_after_30_steps_in_float32_all_is_equal_up_to_rounding(alone, together, spec):
    """k's bias changes no map, since it adds the same to all logits of a query. Its gradient is only rounding, which
    AdamW normalises to steps of the size of any other."""
    one, other = Store(alone / "float32"), Store(together / "float32")
    found = largest_differences(spec, one, other)
    print("float32", spec.transfer.method, *(f"{one:.1e}" for one in found))
    losses, logits, weights, bias = found
    assert losses < 5e-5
    assert logits < 1e-5
    assert weights < 1e-5
    assert bias < 30 * spec.recipe.lr
    here, there = (store.run(spec).result() for store in (one, other))
    assert abs(here["top1"] - there["top1"]) < 1
    assert there["environment"]["ranks"] in (2, 3)
    assert here["environment"]["ranks"] == 1


@pytest.mark.slow
def test_only_the_first_rank_writes(together):
    for spec in RUNS:
        run = Store(together / "float64").run(spec)
        names = {path.name for path in run.path.iterdir()} - {"tensorboard"}
        assert names == {"spec.json", "metrics.jsonl", "weights.safetensors", "predictions.npz", "result.json", "lock"}
        assert len(list(run.path.glob("tensorboard/*"))) <= 1
