"""Does ``diagnose`` find what was planted? On the calibration's runs, and those that only it asks for.

    python -m benchmarks.diagnosis_calibration --runs DIR --json benchmarks/results/diagnosis_calibration.json

Study i of a kind is study i of ``benchmarks/calibration.py`` (seeds, test scenes, teacher), so that its runs in DIR are
used. One look of five seeds has the whole level. An answer is *right* with the verdict of ``truth.DIAGNOSES`` and all
that must be accused; *undecided* as the command calls it; *wrong* otherwise. A *false accusation* is an accused name
that must not be. The same line goes on where it was stopped; ``--budget`` stops in time, ``--only`` takes some kinds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from atdiag.core.runs import Store
from atdiag.core.spec import RunSpec
from atdiag.diagnosis import arms, asking, planning
from atdiag.diagnosis.hypotheses import MARGIN
from atdiag.networks.registry.specimens import specimens
from atdiag.stats.sequential import looks
from atdiag.training.provenance import environment
from benchmarks import calibration, truth


@dataclass(frozen=True)
class Diagnosed:
    """What was said of one specimen in one study."""

    specimen: str
    study: int
    teacher: str
    verdict: str
    causes: tuple[str, ...]
    sufficient: tuple[str, ...] | None
    """A sufficient set, if one was confirmed."""
    answer: str
    """``right``, ``wrong`` or ``undecided``."""
    false_accusations: tuple[str, ...]
    runs: int
    """Runs that were asked about."""


class OutOfTimeError(Exception):
    """The budget of this sitting is used up; checkpoints are written."""


def judge(specimen: str, verdict: str, causes: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return whether a diagnosis is right, and what it accuses falsely."""
    expected = truth.DIAGNOSES[specimen]
    false = tuple(name for name in causes if name.startswith(expected.innocent))
    if verdict == "undecided":
        return "undecided", false
    right = verdict == expected.verdict and expected.accused <= {*causes}
    return "right" if right else "wrong", false


def diagnose(asked: calibration.Plan, store: Store, specimen: str, study: int, until: float) -> Diagnosed:
    """Diagnose one specimen, training what is missing. Raises OutOfTimeError."""
    name = calibration.teacher(specimen, study)
    lab = planning.lab(asked.lab(study).settings, [asked.seeds])
    case = arms.case(lab, name, "copy", MARGIN)

    def train(specs: Sequence[RunSpec]) -> None:
        if not calibration.train(specs, store, until):
            raise OutOfTimeError

    runs = arms.Runs(case, store, train)
    found = asking.ask(case.outline, looks([asked.seeds]), runs.answers, runs.footing, runs.teacher())
    answer, false = judge(specimen, found.verdict, found.causes)
    enough = found.sufficient
    return Diagnosed(
        specimen=specimen,
        study=study,
        teacher=name,
        verdict=found.verdict,
        causes=found.causes,
        sufficient=enough.components if enough is not None and enough.confirmed else None,
        answer=answer,
        false_accusations=false,
        runs=sum(map(len, runs.asked.values())),
    )


def document(done: Sequence[Diagnosed], asked: calibration.Plan, studies: int) -> dict[str, Any]:
    """Return all that is written."""
    decided = [one for one in done if one.answer != "undecided"]
    right = [one for one in done if one.answer == "right"]
    return {
        "benchmark": "diagnosis_calibration",
        "machine": environment(torch.device("cpu")),
        "asked": asdict(asked),
        "right_of_decided": calibration.rate(len(right), len(decided)),
        "right_of_all": calibration.rate(len(right), len(done)),
        "with_false_accusations": calibration.rate(sum(bool(one.false_accusations) for one in done), len(done)),
        "missing": studies * len(truth.DIAGNOSES) - len(done),
        "diagnoses": [asdict(one) for one in done],
    }


def earlier(path: Path | None, asked: calibration.Plan) -> list[Diagnosed]:
    """Return the diagnoses in a file of an earlier sitting. Raises SystemExit if it asked for something else."""
    if path is None or not path.exists():
        return []
    content: Mapping[str, Any] = json.loads(path.read_text())
    if content["asked"] != json.loads(json.dumps(asdict(asked))):
        raise SystemExit(f"{path} holds diagnoses of other studies: give another file")
    as_tuples = (
        {key: tuple(v) if isinstance(v, list) else v for key, v in one.items()} for one in content["diagnoses"]
    )
    return [Diagnosed(**one) for one in as_tuples]


def main(argv: Sequence[str] | None = None) -> None:
    """Train, diagnose, print, and write JSON after each diagnosis."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="nothing there is trained twice")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--studies", type=int, default=truth.DIAGNOSED)
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="stop in time; the same line goes on")
    parser.add_argument("--only", help="kinds, such as hub,weak")
    parser.add_argument("--toy", action="store_true", help="so small that nothing can be decided")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    asked = calibration.Plan(sets=calibration.TOY if given.toy else ())
    until = time.monotonic() + 60 * given.budget if given.budget is not None else float("inf")
    kinds = [*truth.DIAGNOSES] if given.only is None else given.only.split(",")
    if unknown := {*kinds} - {*truth.DIAGNOSES}:
        raise SystemExit(f"--only {', '.join(sorted(unknown))}: not in benchmarks/truth.py")
    done, store = earlier(given.json, asked), Store(given.runs)
    for study in range(given.studies):
        for kind in kinds:
            source = specimens().get(calibration.teacher(kind, study))
            known = any((one.specimen, one.study) == (kind, study) for one in done)
            if known or (source is not None and not source.file.exists()):
                continue
            try:
                done.append(diagnose(asked, store, kind, study, until))
            except OutOfTimeError:
                return
            print(f"study {study}: {done[-1]}", flush=True)
            if given.json:
                given.json.parent.mkdir(parents=True, exist_ok=True)
                given.json.write_text(json.dumps(document(done, asked, given.studies), indent=1) + "\n")


if __name__ == "__main__":
    main()
