"""Planted teachers: are useless maps recognised as such, and the same teacher's own maps as helpful?

    python benchmarks/planted_teachers.py --json benchmarks/results/planted_teachers.json [--runs DIR]

A miniature in three forms, copied by a standard student and distilled into one:

- *own*: unchanged;
- *uniform*: its queries are zero, so that every token attends to all tokens equally;
- *shuffled*: each image gets the maps that the teacher has for another image. The other is found from the image's own
  pixels, so it is the same in every epoch, in training and at test, and whatever else is in the batch.

Judged like every experiment: contrast with the student from scratch, three seeds, 95 %. Also reported: each planted
form minus the teacher's own maps.
"""

from __future__ import annotations

import argparse
import copy
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.core.spec import Network, RunSpec, Teacher
from atdiag.data import scenes
from atdiag.networks.model.vit import ViT
from atdiag.networks.weights import loading
from atdiag.stats.contrasts import Estimate, Outcomes, estimate
from atdiag.study.builder import Lab
from atdiag.study.settings import resolve
from atdiag.training import cohort
from atdiag.training.provenance import environment
from atdiag.transfer.observation import CaptureRequest, Observation

FORMS = ("own", "uniform", "shuffled")
METHODS = ("copy", "distill")
_POOL_SEED = 10**6  # source of the other images: no run trains on these


def uniform(teacher: ViT) -> ViT:
    """Return the teacher with all queries zero. With relative position biases it would still not be uniform."""
    if "rel_pos_bias" in teacher.network.components:
        raise ValueError("zero queries leave the relative position bias: take another teacher")
    planted = copy.deepcopy(teacher)
    for block in planted.blocks:
        for name in ("q_weight", "q_bias"):
            getattr(block.attn, name).data.zero_()
    return planted


class Shuffled(nn.Module):
    """A teacher that sees another image than its student."""

    def __init__(self, teacher: ViT, pool: np.ndarray) -> None:
        super().__init__()
        self.teacher, self.network = teacher, teacher.network
        self.register_buffer("pool", torch.from_numpy(pool).float() / 255)

    def others(self, images: Tensor) -> Tensor:
        """Return the other image for each of [B, C, S, S]: a function of its pixels alone."""
        pixels = (images * 255).round().to(torch.uint8).cpu().numpy()
        return self.pool[[zlib.crc32(one.tobytes()) % len(self.pool) for one in pixels]]

    def observe(self, images: Tensor, wanted: CaptureRequest) -> Observation:
        """Return the teacher's observation of the other images."""
        return self.teacher.observe(self.others(images), wanted)

    def shared_tokens(self, other: Network) -> Tensor | None:
        """Return the teacher's shared tokens."""
        return self.teacher.shared_tokens(other)


def plant(source: Teacher, clutter: int) -> dict[str, tuple[Teacher, nn.Module]]:
    """Return each form of a miniature: its spec and network. Each form has its own sha256."""
    teacher = loading.load(source)
    pool = scenes.train_scenes("digits", 4096, _POOL_SEED, clutter).images
    networks = {"own": teacher, "uniform": uniform(teacher), "shuffled": Shuffled(teacher, pool)}
    return {
        form: (source if form == "own" else _renamed(source, form), network.eval().requires_grad_(False))
        for form, network in networks.items()
    }


def _renamed(source: Teacher, form: str) -> Teacher:
    assert source.sha256 is not None
    number = f"{zlib.crc32(form.encode()):08x}"
    return source.model_copy(update={"name": f"{source.name}, {form} maps", "sha256": number + source.sha256[8:]})


def study(
    here: Lab,
    source: Teacher,
    store: Store,
    methods: Sequence[str] = METHODS,
    layers: Sequence[int] | None = None,
    report: Any = lambda name: None,
) -> dict[str, Estimate]:
    """Train the student from scratch and with each form by each method; return all contrasts of interest.

    Runs with a planted form go to a separate folder, because no other command could load their teacher.
    """
    planted = plant(source, here.settings.profile.data.clutter)
    networks = {str(teacher.sha256): network for teacher, network in planted.values()}
    student = here.student(source)
    aside = Store(store.root / "planted")
    arms: dict[str, tuple[tuple[RunSpec, ...], Store]] = {"scratch": (here.baseline(source).specs, store)}
    for method in methods:
        passed = here.transfer(method, student, layers)
        for form, (teacher, _) in planted.items():
            specs = here.arm(form, student, teacher, transfer=passed).specs
            arms[f"{method} {form}"] = specs, store if form == "own" else aside
    measured = {}
    for name, (specs, where) in arms.items():
        for spec in specs:
            status = cohort.train([spec], where, lambda t: networks[str(t.sha256)], ExecutionOptions(device="cpu"))
            if status[spec.id] != "finished":
                raise RuntimeError(f"{name}, seed {spec.seed.data}: {where.run(spec).failure() or status[spec.id]}")
        measured[name] = outcomes(specs, where)
        report(name)
    found = {name: estimate(measured, {name: 1, "scratch": -1}) for name in arms if name != "scratch"}
    for method in methods:
        for form in FORMS[1:]:
            pair = {f"{method} {form}": 1.0, f"{method} own": -1.0}
            found[f"{method} {form} - own"] = estimate(measured, pair)
    return found


def outcomes(specs: Sequence[RunSpec], store: Store) -> Outcomes:
    """Return finished runs' outcomes by seed."""
    correct = {}
    for spec in specs:
        with np.load(store.run(spec).predictions) as saved:
            correct[spec.seed.data, spec.seed.model] = saved["prediction"] == saved["label"]
            clusters = saved["cluster"]
    return Outcomes(correct, clusters)


def as_planted(found: Mapping[str, Estimate], method: str) -> bool:
    """Return whether the verdicts are as planted: own maps help; the others don't, and are worse than own."""
    own = found[f"{method} own"]
    others = [(found[f"{method} {form}"], found[f"{method} {form} - own"]) for form in FORMS[1:]]
    return (
        own.clear
        and own.value > 0
        and all(not (gain.clear and gain.value > 0) and less.clear and less.value < 0 for gain, less in others)
    )


def main() -> None:
    """Measure, print, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", default="deit_s,deit_b", help="miniatures by name")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="nothing there is trained twice")
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    here = Lab(resolve("mini", environment={}, folder=Path("/nonexistent")))
    document: dict[str, Any] = {
        "benchmark": "planted_teachers",
        "machine": environment(torch.device("cpu")),
        "teachers": {},
    }
    for name in asked.teachers.split(","):
        teacher = here.teacher(name)
        with Progress(transient=True) as bar:
            task = bar.add_task(teacher.label, total=1 + len(METHODS) * len(FORMS))
            found = study(here, teacher, Store(asked.runs), report=lambda _: bar.advance(task))  # noqa: B023
        verdicts = {method: as_planted(found, method) for method in METHODS}
        print(teacher.label)
        for arm, e in found.items():
            print(f"  {arm:24} {e.value:+6.1f} [{e.low:+.1f}, {e.high:+.1f}] {'clear' if e.clear else ''}".rstrip())
        for method, met in verdicts.items():
            print(f"  {'met   ' if met else 'MISSED'} {method}: own maps help, uniform and shuffled ones don't")
        document["teachers"][teacher.label] = {
            "contrasts": {arm: asdict(e) for arm, e in found.items()},
            "as_planted": verdicts,
        }
    if asked.json:
        asked.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
