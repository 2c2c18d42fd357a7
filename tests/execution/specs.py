"""Specs of runs to plan and execute."""

from pathlib import Path

from ablations.reinit import reinit
from atdiag.core.options import ExecutionOptions
from atdiag.core.spec import Data, Init, Network, Recipe, RunSpec, Seed, Teacher, Transfer
from atdiag.study.builder import Lab
from atdiag.study.settings import resolve

TINY = ("data.train=64", "recipe.warmup_epochs=0.5", "data.test_per_source=1")


def network(**fields) -> Network:
    return Network(image_size=20, patch_size=4, channels=1, width=32, depth=12, heads=2, classes=10, **fields)


def run(seed=0, epochs=4, layers=(), teacher=None, train=2500, start="scratch", **recipe) -> RunSpec:
    needs = teacher if layers or start == "teacher" else None
    return RunSpec(
        network=network(),
        teacher=needs and Teacher(name=f"t{needs}", profile="mini", network=network(), sha256=f"{needs}" * 64),
        init=Init(source=start),
        transfer=Transfer(method="copy", layers=layers) if layers else Transfer(),
        data=Data(train=train),
        recipe=Recipe(epochs=epochs, batch_size=32, warmup_epochs=0, **recipe),
        seed=Seed(data=seed, model=seed),
    )


ONE = ExecutionOptions(device="cpu", threads=1)


def study(*sets, seeds=1):
    return reinit(Lab(resolve(sets=(*TINY, *sets), seeds=seeds, environment={}, folder=Path("/nonexistent"))))
