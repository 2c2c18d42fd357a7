"""Does atdiag find what was planted, and nothing where nothing was?

    python -m benchmarks.calibration --runs DIR --json benchmarks/results/calibration.json [--budget MINUTES]

Each study of each specimen is judged by the commands' own verdicts (``ablations.found``) and compared with the truth
table (``benchmarks/truth.py``, committed before any result; it also holds the two denominators and the two kinds that
are set aside). Study i has seeds of its own, from ``--first-seed`` + i * ``--seeds`` on, and its own draw of test
scenes (``data.test_draw`` = i + 1). A kind that was pre-trained from several seeds takes them in turn: study i has the
teacher i mod n of its n. The studies share the source digits, and with the same turn the teacher's weights.

The same line goes on where it was stopped: finished runs are in DIR, finished answers in the JSON, which is written
after each of them. ``--budget`` stops in time, with checkpoints. ``--only hub,weak`` takes some kinds. What was not
run is counted under "missing".

- *right*: the verdict of the truth table; *undecided*: no verdict; *wrong*: another.
- Seeds that a right answer takes: the fewest from which on it is right with any number up to all. Minutes: of training
  of these seeds' runs on one thread, by the clock; on a machine that is shared with other work they are more.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from scipy.stats import binomtest

from ablations import found
from ablations.benchmark import benchmark
from ablations.reinit import reinit
from ablations.rescue import OF_INTEREST, rescue
from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.core.spec import RunSpec
from atdiag.execution import plan
from atdiag.networks.registry.specimens import members, specimens
from atdiag.networks.weights import loading
from atdiag.stats.contrasts import FEWEST_SEEDS
from atdiag.study.aggregate import read
from atdiag.study.builder import Lab
from atdiag.study.protocol import BASELINE, Report, Series, Study
from atdiag.study.settings import resolve
from atdiag.training import cohort
from atdiag.training.provenance import environment
from benchmarks import truth

SEEDS = 5
"""Seeds of a study: with three, few effects are clear after Holm's correction over a rescue's contrasts."""
FIRST_SEED = 10_000
"""Beyond the seeds of every other study in this repository."""
TOY = ("data.train=64", "data.test_per_source=1", "recipe.epochs=1")
"""Settings with which CI goes through all of it, and nothing can be decided."""


@dataclass(frozen=True)
class Answer:
    """What one command said of one specimen in one study."""

    specimen: str
    command: str
    study: int
    verdict: str
    truth: str
    answer: str
    """``right``, ``wrong`` or ``undecided``."""
    teacher: str
    """The specimen that it was asked of: of several pre-trainings of one kind, the one whose turn it was."""
    seeds: int | None
    """Seeds that a right answer takes; None for another answer."""
    minutes: float
    """Of training on one thread, by the clock: of these seeds' runs, of all runs for another answer."""


def compare(verdict: str, expected: str) -> str:
    """Return whether a verdict is right, wrong or undecided."""
    if verdict == expected:
        return "right"
    return "undecided" if verdict == found.UNDECIDED else "wrong"


@dataclass(frozen=True)
class Plan:
    """The studies that are asked for."""

    first_seed: int = FIRST_SEED
    seeds: int = SEEDS
    studies: int = truth.STUDIES
    sets: tuple[str, ...] = ()

    def of(self, specimen: str) -> int:
        """Return how many studies a kind has: fewer where it is in no denominator."""
        return min(self.studies, truth.DESCRIPTIVE_STUDIES) if specimen in truth.DESCRIPTIVE else self.studies

    def lab(self, study: int, seeds: int | None = None) -> Lab:
        """Return the lab of a study, with fewer seeds if asked."""
        sets = (*self.sets, f"data.test_draw={study + 1}")
        first = self.first_seed + study * self.seeds
        settings = resolve(
            "mini", seeds or self.seeds, sets, environment={}, folder=Path("/nonexistent"), first_seed=first
        )
        return Lab(settings)


def teacher(kind: str, study: int) -> str:
    """Return the name of the teacher of a kind whose turn it is in a study: a specimen, or a healthy miniature."""
    own = members(kind)
    return own[study % len(own)].name if own else kind


def make(lab: Lab, kind: str, command: str, study: int) -> Study:
    """Return the study that a command makes of a kind's teacher, a rescue without the arms that are cut."""
    name, what = teacher(kind, study), command.split()
    if what[0] == "rescue":
        return cut(rescue(lab, name, what[1]), what[1], names_components=found.names(truth.expected(kind)[command]))
    if what[0] == "reinit":
        return reinit(lab, what[1], name, "copy")
    methods = [one.split()[1] for one in truth.expected(kind) if one.startswith("benchmark")]
    return benchmark(lab, name, ",".join(methods))


def cut(study: Study, transfer: str, names_components: bool) -> Study:
    """Return a rescue without "all but one", and without each component alone where none is to be named.

    No verdict asks for the arms that are cut. With fewer contrasts Holm's correction is milder, so that a healthy
    teacher is accused more easily than by the whole command, not less.
    """
    kept = {BASELINE, f"standard + {transfer}", f"native + {transfer}", "native, scratch"}
    if names_components:
        kept |= {f"{name} + {transfer}" for name in study.teacher.network.components}
    return replace(study, arms=tuple(arm for arm in study.arms if arm.name in kept))


def said(report: Report, command: str) -> str:
    """Return a command's verdict as a word."""
    what, name = command.split()
    if what == "rescue":
        return found.rescue(report, f"standard + {name}", f"native + {name}", OF_INTEREST)
    return found.transfer(report, f"reinit {name}" if what == "reinit" else name)


def answer(asked: Plan, store: Store, specimen: str, command: str, study: int) -> Answer:
    """Read finished runs, and compare what they say with the truth."""
    expected = truth.expected(specimen)[command]

    def verdict(seeds: int) -> str:
        lab = asked.lab(study, seeds)
        return said(read(Series.join([make(lab, specimen, command, study)]), lab.settings, store).reports[0], command)

    whole = verdict(asked.seeds)
    seeds = asked.seeds if whole == expected else None
    while seeds is not None and seeds > FEWEST_SEEDS and verdict(seeds - 1) == expected:
        seeds -= 1
    specs = make(asked.lab(study, seeds), specimen, command, study).specs
    minutes = sum(store.run(spec).result()["seconds"] for spec in specs) / 60
    judged = compare(whole, expected)
    return Answer(specimen, command, study, whole, expected, judged, teacher(specimen, study), seeds, round(minutes, 2))


def train(specs: Sequence[RunSpec], store: Store, until: float) -> bool:
    """Train what is missing; return whether all is finished before ``until`` (a time of the monotonic clock)."""
    options = ExecutionOptions(device="cpu", threads=1)
    for group in plan.cohorts(plan.pending(specs, store)):
        status = cohort.train(group, store, loading.load, options, should_stop=lambda: time.monotonic() > until)
        if failed := [name for name, state in status.items() if state == "failed"]:
            raise RuntimeError(f"run {failed[0]}: {store.run(failed[0]).failure()}")
        if "interrupted" in status.values() or time.monotonic() > until:
            return not plan.pending(specs, store)
    return True


# --- the table -----------------------------------------------------------------------------------------------------


def rate(successes: int, of: int) -> dict[str, Any]:
    """Return a share with its 95 % interval (Wilson 1927), in per cent; no interval of nothing."""
    if not of:
        return {"count": 0, "of": 0}
    limits = binomtest(successes, of).proportion_ci(method="wilson")
    return {
        "count": successes,
        "of": of,
        "percent": round(100 * successes / of, 1),
        "interval": [round(100 * float(limits.low), 1), round(100 * float(limits.high), 1)],
    }


def rows(answers: Sequence[Answer], asked: Plan) -> list[dict[str, Any]]:
    """Return a row for each cell of the truth table."""
    out = []
    for one in truth.TRUTH:
        own = [a for a in answers if (a.specimen, a.command) == (one.specimen, one.command)]
        right = [a for a in own if a.answer == "right"]
        out.append(
            {
                "specimen": one.specimen,
                "command": one.command,
                "truth": one.verdict,
                **{kind: sum(a.answer == kind for a in own) for kind in ("right", "wrong", "undecided")},
                "rate": rate(len(right), len(own)),
                "seeds": median(a.seeds for a in right if a.seeds) if right else None,
                "minutes": round(median(a.minutes for a in right), 1) if right else None,
                "missing": asked.of(one.specimen) - len(own),
            }
        )
    return out


def denominators(answers: Sequence[Answer], asked: Plan) -> dict[str, Any]:
    """Return detection and false accusation over studies of whole kinds; a study with a missing row is not counted."""
    by = {(a.specimen, a.command, a.study): a for a in answers}

    def studies(kind: str, commands: Sequence[str]) -> list[list[Answer]]:
        own = "hub" if kind == "hub decoys" else kind
        every = [[by.get((own, command, i)) for command in commands] for i in range(asked.studies)]
        return [[a for a in some if a is not None] for some in every if all(some)]

    faults = [some for kind in truth.DETECTION for some in studies(kind, [*truth.expected(kind)])]
    decided = [some for some in faults if not any(a.answer == "undecided" for a in some)]
    right = [some for some in decided if all(a.answer == "right" for a in some)]
    sound = [
        (kind, some)
        for kind in truth.ACCUSATION
        for some in studies(kind, [truth.RESCUE] if kind == "hub decoys" else [*truth.expected(kind)])
    ]
    accused = [some for kind, some in sound if any(truth.accuses(kind, a.command, a.verdict) for a in some)]
    wanted = [len(kinds) * asked.studies for kinds in (truth.DETECTION, truth.ACCUSATION)]
    return {
        "detection": {
            "right_of_decided": rate(len(right), len(decided)),
            "right_of_all": rate(len(right), len(faults)),
            "missing": wanted[0] - len(faults),
        },
        "false_accusations": {**rate(len(accused), len(sound)), "missing": wanted[1] - len(sound)},
        "set_aside": list(truth.SET_ASIDE),
    }


def document(answers: Sequence[Answer], asked: Plan) -> dict[str, Any]:
    """Return all that is written."""
    unmade = [name for name, one in specimens().items() if not one.file.exists()]
    return {
        "benchmark": "calibration",
        "machine": environment(torch.device("cpu")),
        "asked": asdict(asked),
        "rows": rows(answers, asked),
        "denominators": denominators(answers, asked),
        "without_weights": unmade,
        "answers": [asdict(a) for a in answers],
    }


def earlier(path: Path | None, asked: Plan) -> list[Answer]:
    """Return the answers in a file of an earlier sitting. Raises SystemExit if it asked for something else."""
    if path is None or not path.exists():
        return []
    content: Mapping[str, Any] = json.loads(path.read_text())
    if content["asked"] != json.loads(json.dumps(asdict(asked))):
        raise SystemExit(
            f"{path} holds answers to other studies: give its --first-seed, --seeds and --studies, or another file"
        )
    kept = [Answer(**one) for one in content["answers"]]
    return [one for one in kept if truth.expected(one.specimen).get(one.command) == one.truth]


def show(content: Mapping[str, Any]) -> None:
    """Print the table."""
    for row in content["rows"]:
        counts = (
            f"{row['right']:2} right {row['wrong']:2} wrong {row['undecided']:2} undecided {row['missing']:2} missing"
        )
        seeds = f", {row['seeds']:g} seeds, {row['minutes']:g} min" if row["seeds"] else ""
        print(f"{row['specimen']:18}{row['command']:19}{counts}{seeds}")
    both = content["denominators"]
    print(f"detection: {both['detection']}\nfalse accusations: {both['false_accusations']}")


def main(argv: Sequence[str] | None = None) -> None:
    """Train, judge, print, and write JSON after each answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="nothing there is trained twice")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--studies", type=int, default=truth.STUDIES)
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="stop in time; the same line goes on")
    parser.add_argument("--only", help="kinds, such as hub,weak")
    parser.add_argument("--toy", action="store_true", help="so small that nothing can be decided")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    asked = Plan(given.first_seed, given.seeds, given.studies, TOY if given.toy else ())
    until = time.monotonic() + 60 * given.budget if given.budget is not None else float("inf")
    only = {*given.only.split(",")} if given.only else None
    if unknown := (only or set()) - {one.specimen for one in truth.TRUTH}:
        raise SystemExit(f"--only {', '.join(sorted(unknown))}: not in benchmarks/truth.py")
    answers = earlier(given.json, asked)
    store = Store(given.runs)
    # Study by study, so that a sitting that is cut off has a little of every kind.
    for study in range(asked.studies):
        for one in truth.TRUTH:
            if study >= asked.of(one.specimen):
                continue
            kind = specimens().get(teacher(one.specimen, study))
            known = any((a.specimen, a.command, a.study) == (one.specimen, one.command, study) for a in answers)
            if known or (only and one.specimen not in only) or (kind is not None and not kind.file.exists()):
                continue
            if not train(make(asked.lab(study), one.specimen, one.command, study).specs, store, until):
                show(document(answers, asked))
                return
            answers.append(answer(asked, store, one.specimen, one.command, study))
            print(f"study {study}: {answers[-1]}", flush=True)
            if given.json:
                given.json.parent.mkdir(parents=True, exist_ok=True)
                given.json.write_text(json.dumps(document(answers, asked), indent=1) + "\n")
    show(document(answers, asked))


if __name__ == "__main__":
    main()
