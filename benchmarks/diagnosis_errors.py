"""How often does a diagnosis accuse what is innocent? Simulated studies through ``asking.ask``, the production code.

    python -m benchmarks.diagnosis_errors --json benchmarks/results/diagnosis_errors.json [--studies 5000]

Studies vary as real runs do (the moments in ``results/false_alarms.json``, by ``atdiag.stats.simulation``). Looks are
nested, and all looks and arms share seeds and test images, as in reality. The teacher has three native components, 12
blocks, and copying is diagnosed. A *false accusation* is a rejected hypothesis that is true in the simulation; their
rate, in any number, is that of studies with one or more. The design allows 5 %, and what a simulation of N studies may
show beyond it is two standard errors.

In every setting but the first the transfer does not help, so that causes are asked about at all looks. Settings:

- nothing wrong: the transfer helps by 25 points; and no effect of anything, the worst case for accusations;
- each fault alone;
- each effect exactly at the margin of its null hypothesis: maps worth just the margin, halves that differ by nothing
  and hurt;
- the baseline at chance (nothing may be said), other arms with four times the variance of runs, one run in twenty
  diverged to chance.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from atdiag.diagnosis.asking import FRESH, Conclusion, ask
from atdiag.diagnosis.hypotheses import REINIT, Outline
from atdiag.stats.contrasts import Outcomes
from atdiag.stats.sequential import looks
from atdiag.stats.simulation import Moments, Population
from atdiag.study import chance
from atdiag.study.protocol import BASELINE, Footing
from atdiag.training.provenance import environment

LIKE = Path(__file__).parent / "results" / "false_alarms.json"
OUTLINE = Outline("copy", ("layer_scale", "registers", "quick_gelu"), depth=12)
NAMES = OUTLINE.names
LOWER, UPPER = (NAMES.blocks(half) for half in OUTLINE.halves)
CHANCE = 10.0
TEACHER = 90.0


@dataclass(frozen=True)
class Setting:
    """A truth: accuracies in per cent by arm, and how runs vary."""

    accuracies: Mapping[str, float]
    guilty: frozenset[str] = frozenset()
    """The accusations that are right."""
    spread: float = 1.0
    """Factor of the variance of runs in all arms but scratch."""
    diverged: float = 0.0
    """Chance of a run to end at chance."""


def truth(base: float = 50.0, **changed: float) -> dict[str, float]:
    """Return the accuracies of all arms in per cent: ``base``, but for what is named.

    Names: own, maps (what is left of the transfer without the image), native, control, lower, upper, start_attention,
    start_MLPs, and components.
    """
    own = base + changed.get("own", 0.0)
    native = base + changed.get("native", changed.get("own", 0.0))
    control = base + changed.get("control", 0.0)
    out = {BASELINE: base, "standard + copy": own, "standard + distill": base}
    out |= {NAMES.native: native, NAMES.control: control, NAMES.averaged: native - changed.get("maps", 20.0)}
    out |= {arm: base + changed.get(f"start_{what}", 0.0) for what, arm in REINIT.items()}
    out |= {LOWER: base + changed.get("lower", 0.0), UPPER: base + changed.get("upper", 0.0)}
    for half, end in zip(OUTLINE.halves, ("lower", "upper"), strict=True):
        for part in OUTLINE.parts.values():
            if part[0] in half:
                out[NAMES.blocks(part)] = base + changed.get(end, 0.0)
    one = changed.get("alone", 0.0)
    for component in OUTLINE.components:
        worth = one if component == "registers" else 0.0
        out[NAMES.given([component])] = own + worth
        without = [other for other in OUTLINE.components if other != component]
        out[NAMES.given(without)] = native - (worth if component == "registers" else 0.0)
    return out


SETTINGS: dict[str, Setting] = {
    "nothing wrong": Setting(truth(own=25.0)),
    "no effect of anything": Setting(truth()),
    "hurts, for no reason that is asked about": Setting(truth(own=-10.0, native=-10.0)),
    "the maps": Setting(truth(maps=0.0), frozenset({"the maps"})),
    "the architecture": Setting(
        truth(own=-10.0, native=10.0, alone=20.0), frozenset({"the architecture", "component registers"})
    ),
    "the start": Setting(truth(start_attention=-10.0), frozenset({"the start (attention)"})),
    "the blocks": Setting(
        truth(lower=-12.0), frozenset({f"blocks {OUTLINE.halves[0].start}-{OUTLINE.halves[0].stop - 1}"})
    ),
    "maps worth just the margin": Setting(truth(maps=OUTLINE.margin)),
    "halves that hurt alike": Setting(truth(lower=-8.0, upper=-8.0)),
    "the baseline at chance": Setting(truth(base=CHANCE + 1)),
    "unequal variances": Setting(truth(), spread=4.0),
    "one run in twenty diverged": Setting(truth(), diverged=0.05),
}


class Simulated:
    """The answers of one simulated study: all arms with all seeds, of which looks see the first."""

    def __init__(self, population: Population, setting: Setting, rng: np.random.Generator, seeds: int) -> None:
        shares = {name: value / 100 for name, value in setting.accuracies.items()}
        if setting.spread == 1:
            self.arms = population.study(rng, shares, seeds)
        else:
            wide = replace(population, run=population.run * setting.spread)
            self.arms = wide.study(rng, shares, seeds)
        if setting.diverged:
            self.arms = {name: _diverge(arm, setting.diverged, rng) for name, arm in self.arms.items()}

    def answers(self, arms: Sequence[str], seeds: range) -> dict[str, Outcomes]:
        """Return the outcomes of some arms with some seeds."""
        return {
            name: Outcomes({seed: self.arms[name].correct[seed] for seed in seeds}, self.arms[name].clusters)
            for name in arms
        }


def _diverge(arm: Outcomes, share: float, rng: np.random.Generator) -> Outcomes:
    right = {
        seed: rng.random(len(one)) < CHANCE / 100 if rng.random() < share else one for seed, one in arm.correct.items()
    }
    return Outcomes(right, arm.clusters)


def footing(scratch: Outcomes) -> Footing:
    """Return how far the baseline is above chance, with ten balanced classes."""
    labels = np.arange(len(scratch.clusters)) % 10
    return chance.footing(scratch, labels, TEACHER)


def studies(setting: Setting, population: Population, number: int, title: str) -> dict[str, Any]:
    """Diagnose simulated studies, and count what was concluded."""
    rng = np.random.default_rng(2026)
    planned = looks()
    seeds = planned[-1].seeds + FRESH
    innocent = [name for name in OUTLINE.hypotheses if name not in setting.guilty]
    false: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    right: Counter[str] = Counter()
    seeds_used: list[int] = []
    some = 0
    for _ in track(range(number), title, transient=True):
        found = diagnosed(Simulated(population, setting, rng, seeds))
        wrong = [name for name in found.causes if name in innocent]
        some += bool(wrong)
        false.update(wrong)
        right.update(name for name in found.causes if name in setting.guilty)
        verdicts[found.verdict] += 1
        seeds_used.append(found.last.look.seeds)
    rate = some / number
    return {
        "studies": number,
        "false_accusations": {"percent": 100 * rate, "standard_error": 100 * sqrt(rate * (1 - rate) / number)},
        "met": rate <= 0.05 + 2 * sqrt(0.05 * 0.95 / number),
        "by_hypothesis": {name: 100 * n / number for name, n in sorted(false.items())},
        "found": {name: 100 * right[name] / number for name in sorted(setting.guilty)},
        "verdicts": {name: 100 * n / number for name, n in verdicts.most_common()},
        "seeds": float(np.mean(seeds_used)),
    }


def diagnosed(study: Simulated) -> Conclusion:
    """Diagnose one simulated study with the production code."""
    return ask(OUTLINE, looks(), study.answers, footing, TEACHER)


def population() -> Population:
    """Return the population whose studies vary as real runs do."""
    content = json.loads(LIKE.read_text())["simulated"]["copy - scratch"]["moments"]
    return Population.like(Moments(**content))


def document(found: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return all that is written."""
    return {
        "benchmark": "diagnosis_errors",
        "machine": environment(torch.device("cpu")),
        "like": "copy - scratch",
        "looks": [{"seeds": look.seeds, "level": look.level} for look in looks()],
        "margin": OUTLINE.margin,
        "studies": number,
        "settings": found,
    }


def earlier(path: Path | None, number: int) -> dict[str, Any]:
    """Return the settings in a file of an earlier sitting with as many studies."""
    if path is None or not path.exists():
        return {}
    content: Mapping[str, Any] = json.loads(path.read_text())
    return dict(content["settings"]) if content.get("studies") == number else {}


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate every setting that the JSON lacks; print, and write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="settings that it has are not simulated again")
    parser.add_argument("--studies", type=int, default=5000)
    parser.add_argument("--only", help="settings whose name has this text")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    like, found = population(), earlier(given.json, given.studies)
    for title, setting in SETTINGS.items():
        if title not in found and (given.only is None or given.only in title):
            found[title] = studies(setting, like, given.studies, title)
            if given.json:
                given.json.write_text(json.dumps(document(found, given.studies), indent=1) + "\n")
    for title, one in found.items():
        rate, met = one["false_accusations"], "met   " if one["met"] else "MISSED"
        said = ", ".join(f"{name} {value:.1f} %" for name, value in {**one["verdicts"], **one["found"]}.items())
        print(f"{met} {title}: false accusations {rate['percent']:.1f} +- {rate['standard_error']:.1f} %; {said}")


if __name__ == "__main__":
    main()
