"""Runs small enough to train many times: depth 6, width 16, 2 epochs of 5 steps, with everything random switched on."""

import random
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Run, Store
from atdiag.core.spec import Data, Init, Network, Recipe, RunSpec, Seed, Teacher, Transfer
from atdiag.networks.model import students
from atdiag.training import cohort

CPU = torch.device("cpu")
EXECUTION = {field.name for field in fields(ExecutionOptions)}
NETWORK = Network(image_size=20, patch_size=4, channels=1, width=16, depth=6, heads=2, classes=10, mean=(0.2,))
NATIVE = Network.model_validate(
    {
        **NETWORK.model_dump(),
        "components": ("layer_scale", "registers", "rel_pos_bias"),
        "layer_scale_init": 0.5,
        "registers": 3,
    }
)
TEACHER = Teacher(name="deit_s", profile="mini", network=NATIVE, sha256="0" * 64)
DATA = Data(train=85, test_per_source=1)
RECIPE = Recipe(epochs=2, batch_size=16, drop_path=0.2, mixup=0.8, cutmix=1.0, label_smoothing=0.1)


def load_teacher(teacher: Teacher):
    return students.build(teacher.network, 99).eval().requires_grad_(False)


@dataclass(frozen=True)
class Bench:
    """A store, and functions to train in it."""

    store: Store

    @staticmethod
    def spec(model_seed=0, recipe=RECIPE, network=NETWORK, data=DATA, **parts):
        seed = Seed(data=0, model=model_seed)
        return RunSpec(network=network, teacher=TEACHER, data=data, recipe=recipe, seed=seed, **parts)

    def company(self):
        """Return runs of one cohort that differ in everything in which arms can differ."""
        other = RECIPE.model_copy(update={"lr": 3e-3, "drop_path": 0.0, "label_smoothing": 0.0, "epochs": 1})
        return {
            "baseline": self.spec(),
            "copy": self.spec(transfer=Transfer(method="copy", layers=(2, 3, 4, 5))),
            "copy below": self.spec(model_seed=1, transfer=Transfer(method="copy", layers=(0, 1))),
            "distill": self.spec(transfer=Transfer(method="distill", layers=range(6)), recipe=other),
            "started": self.spec(init=Init(source="teacher", reinit=("attn",))),
            "native": self.spec(network=NATIVE, transfer=Transfer(method="distill", layers=(2, 3))),
        }

    def train(self, *specs, load=load_teacher, **options):
        """Train a cohort, each time with another state of the global generators."""
        torch.seed(), np.random.seed(), random.seed()  # noqa: NPY002
        execution = {name: options.pop(name) for name in EXECUTION if name in options}
        return cohort.train(specs, self.store, load, ExecutionOptions(device="cpu", **execution), **options)

    def run(self, spec) -> Run:
        return self.store.run(spec)

    def weights(self, spec):
        return load_file(self.run(spec).weights)

    def sibling(self, name) -> "Bench":
        return Bench(Store(self.store.root / ".." / name))


@pytest.fixture
def bench(tmp_path):
    return Bench(Store(tmp_path / "runs"))


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """Train each run of :meth:`Bench.company` uninterrupted and alone: what all others must equal."""
    bench = Bench(Store(tmp_path_factory.mktemp("alone") / "runs"))
    for spec in bench.company().values():
        assert bench.train(spec) == {spec.id: "finished"}
    return bench


@pytest.fixture(scope="session")
def assert_same():
    """Assert that a run is the same in two benches, bit for bit."""

    def check(one: Bench, two: Bench, spec):
        left, right = one.weights(spec), two.weights(spec)
        assert left.keys() == right.keys()
        assert [name for name in left if not torch.equal(left[name], right[name])] == []
        assert one.run(spec).predictions.read_bytes() == two.run(spec).predictions.read_bytes()
        timeless = [[{**m, "seconds": 0} for m in b.run(spec).progress()] for b in (one, two)]
        assert timeless[0] == timeless[1]
        for name in ("top1", "steps", "start"):
            assert one.run(spec).result()[name] == two.run(spec).result()[name]
        assert not Path(two.run(spec).path, "checkpoint").exists()

    return check
