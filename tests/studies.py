"""Studies with made-up numbers, for tests of the protocol."""

import io
from pathlib import Path

import numpy as np

from ablations.benchmark import benchmark
from atdiag.core.runs import Store
from atdiag.stats.contrasts import Estimate
from atdiag.study.aggregate import report as read
from atdiag.study.builder import Lab
from atdiag.study.claims import Claim
from atdiag.study.protocol import BASELINE, ArmResult, Report, Study
from atdiag.study.settings import resolve

FAILS = Claim(
    name="fails", text="", paper="-5.1", source="", arms=("copy",), direction="below", families=("clip", "beitv2")
)
"""A claim that the published teachers of two families fail."""


def lab(*sets, seeds=2) -> Lab:
    return Lab(resolve(sets=sets, seeds=seeds, environment={}, folder=Path("/nonexistent")))


def differences(study: Study, one: str, other: str) -> set[str]:
    """Return the dotted fields in which two arms differ."""
    arms = {arm.name: arm for arm in study.arms}

    def flat(node, path=""):
        if not isinstance(node, dict):
            return {path: node}
        return {k: v for key, value in node.items() for k, v in flat(value, f"{path}.{key}".lstrip(".")).items()}

    found = set()
    for a, b in zip(arms[one].specs, arms[other].specs, strict=True):
        left, right = flat(a.model_dump(exclude={"teacher"})), flat(b.model_dump(exclude={"teacher"}))
        found |= {key for key in left.keys() | right.keys() if left.get(key) != right.get(key)}
        if a.teacher != b.teacher:
            found.add("teacher")
    return found


def arms(study: Study) -> dict:
    return {arm.name: arm.specs[0] for arm in study.arms}


def estimate(value, half=1.0, seeds=3) -> Estimate:
    return Estimate(
        value=value, low=value - half, high=value + half, level=0.95, p=0.05, seeds=seeds, images=2396, clusters=599,
        df=2.0, se=half / 4.3, covers="images only" if seeds == 1 else "seeds and images",
        var_seed=None, var_cluster=0.0, var_residual=None,
    )  # fmt: skip


def fabricated(study: Study, effects, contrasts=None, teacher=90.0, base=50.0, seeds=3, half=1.0) -> Report:
    """Make a report in which the arms lie ``effects`` above the baseline."""
    rows = [ArmResult(BASELINE, base, seeds, ("0" * 16,))]
    for arm, effect in zip(study.arms[1:], effects, strict=True):
        rows.append(ArmResult(arm.name, base + effect, seeds, ("1" * 16,), estimate(effect, half, seeds)))
    found = contrasts or [0.0] * len(study.contrasts)
    asked = {c.name: estimate(v, half, seeds) for c, v in zip(study.contrasts, found, strict=True)}
    return Report(study, "mini", tuple(rows), asked, ArmResult("teacher", teacher, 1, ("2" * 16,)))


def finished(study: Study, store: Store, right: dict[str, list[int]], images: int = 40) -> Report:
    """Make a report on made-up runs: how many images each seed of each arm gets right."""
    label = np.arange(images, dtype=np.int32) % 10
    for arm in filter(None, [*study.arms, study.reference]):
        for spec, count in zip(arm.specs, right[arm.name], strict=True):
            prediction = np.where(np.arange(images) < count, label, (label + 1) % 10)
            run, buffer = store.create(spec), io.BytesIO()
            np.savez(buffer, prediction=prediction, label=label, cluster=np.arange(images, dtype=np.int32) // 2)
            run.write("predictions.npz", buffer.getvalue())
            start = {"dropped": ["norm_pre.weight", "blocks.0.attn.x", "blocks.1.attn.x"]}
            run.finish({"top1": 100 * count / images, "start": start if spec.init.source == "teacher" else None})
    return read(study, lab().settings, store)


def fabricated_series(effects: dict[str, list[float]], half=1.0, seeds=3) -> list:
    return [
        fabricated(benchmark(lab(), name, "copy,distill"), values, half=half, seeds=seeds)
        for name, values in effects.items()
    ]
