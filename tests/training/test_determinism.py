"""``--deterministic`` changes nothing on a CPU, and what it sets ends with the runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from atdiag.core.errors import UserError
from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed, Transfer
from atdiag.execution import run
from atdiag.training import determinism
from atdiag.transfer import divergences, ops
from tests.commands import ran

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(epochs=1, batch_size=16, drop_path=0.2, mixup=0.8, cutmix=1.0, label_smoothing=0.1, ema=0.9)
TRANSFERS = {
    "none": Transfer(),
    "copy": Transfer(method="copy", layers=(1, 4)),
    "copy of some heads": Transfer(method="copy", layers=(1, 4), heads=(1,)),
    **{f"copy {tensor}": Transfer(method="copy", layers=(1, 4), tensor=tensor) for tensor in "qkv"},
    **{
        f"{method}, average over {average}": Transfer(method=method, layers=(1, 4), average=average)
        for method in ("copy", "distill")
        for average in ("examples", "queries", "heads", "layers")
    },
    **{
        f"distill by {loss}": Transfer(method="distill", layers=(1, 4), loss=loss)
        for loss in ("ce", "mse", "jsd", "l1", "logits_mse")
    },
    "distill some heads": Transfer(method="distill", layers=(1, 4), heads=(0,)),
    **{f"distill {tensor}": Transfer(method="distill", layers=(1, 4), tensor=tensor) for tensor in "qkv"},
    "logits": Transfer(method="logits"),
    "features": Transfer(method="features", layers=(1, 4)),
}


@pytest.fixture(autouse=True)
def workspace(monkeypatch):
    monkeypatch.setenv(determinism.WORKSPACE, "")  # set here, so that changes end with the test


def strictly():
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.slow
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_every_transfer_runs_deterministically_with_the_same_bits(
    bench, assert_same, monkeypatch, tmp_path, native, fused
):
    """The native student has LayerScale, registers and a trained relative position bias. ``fused``: as on a GPU."""
    monkeypatch.setattr(ops, "prefers_explicit", lambda *_, **__: not fused)
    monkeypatch.setattr(divergences, "preferred", lambda *_: "sdpa" if fused else "blocks")
    network = bench.company()["native" if native else "baseline"].network
    specs = [bench.spec(recipe=RECIPE, network=network, transfer=transfer) for transfer in TRANSFERS.values()]
    during = []
    status = bench.train(*specs, deterministic=True, should_stop=lambda: during.append(strictly()))
    assert set(status.values()) == {"finished"}
    assert during and all(during) and not torch.are_deterministic_algorithms_enabled()
    other = bench.sibling(tmp_path / "other")
    other.train(*specs)
    for spec in specs:
        assert_same(other, bench, spec)
        for one, said in ((bench, True), (other, False)):
            assert one.run(spec).result()["environment"]["deterministic"] is said


def test_interrupted_with_it_and_resumed_without(bench, alone, assert_same):
    spec = bench.company()["distill"]
    left = iter([False] * 3)
    bench.train(spec, deterministic=True, should_stop=lambda: next(left, True))
    bench.train(spec)
    assert_same(alone, bench, spec)


def state():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.cudnn_sdp_enabled(),
    )


def test_settings_are_switched_on_and_restored(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = state()
    assert before == (False, False, True, True)
    with determinism.algorithms(False):
        assert state() == before and not os.environ[determinism.WORKSPACE]
    with pytest.raises(KeyError), determinism.algorithms(True):
        assert state() == (True, False, False, False)
        assert os.environ[determinism.WORKSPACE] == ":4096:8"
        raise KeyError
    assert state() == before
    assert os.environ[determinism.WORKSPACE] == ":4096:8"


@pytest.mark.parametrize(("given", "stays"), [(":16:8", ":16:8"), (":4096:2:16:8", ":4096:8"), ("", ":4096:8")])
def test_the_users_cublas_workspace_is_kept_if_deterministic(monkeypatch, given, stays):
    monkeypatch.setenv(determinism.WORKSPACE, given)
    with determinism.algorithms(True):
        assert os.environ[determinism.WORKSPACE] == stays


def test_switching_on_too_late_is_reported_and_changes_nothing(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="set CUBLAS_WORKSPACE_CONFIG=:4096:8 before"):
        bench.train(bench.spec(recipe=RECIPE), deterministic=True)
    assert not bench.store.root.exists() and not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv(determinism.WORKSPACE, ":4096:8")
    with determinism.algorithms(True):
        assert strictly()


@pytest.mark.slow
def test_worker_processes_get_the_option(tmp_path, monkeypatch):
    network = Network(image_size=20, patch_size=4, channels=1, width=16, depth=2, heads=2, classes=10)
    recipe, seed = Recipe(epochs=1, batch_size=16), Seed(data=0, model=0)
    spec = RunSpec(network=network, data=Data(train=32, test_per_source=1), recipe=recipe, seed=seed)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    store = Store(tmp_path / "runs")
    run.execute([spec], store, ExecutionOptions(device="cpu", threads=1, deterministic=True))
    assert store.run(spec).result()["environment"]["deterministic"] is True


class StopHereError(Exception):
    """Raised where training would start."""


@pytest.mark.parametrize("command", ["layers --k 6", "reproduce --quick"])
@pytest.mark.parametrize("asked", [True, False])
def test_every_experiment_passes_the_option_on(tmp_path, monkeypatch, command, asked):
    told = []

    def execute(specs, store, options, on_progress, executor=None):
        told.append(options.deterministic)
        raise StopHereError

    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.chdir(tmp_path)
    assert ran(*command.split(), *(["--deterministic"] if asked else []))[0] == 1
    assert told == [asked]


@pytest.mark.slow
def test_the_benchmark_needs_cuda_and_says_so():
    if torch.cuda.is_available():
        pytest.skip("CUDA is here")
    done = subprocess.run(
        [sys.executable, "benchmarks/deterministic.py"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and not done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert "there is no CUDA device here" in last and "--device cpu" in last
