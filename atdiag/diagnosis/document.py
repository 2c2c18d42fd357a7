"""A diagnosis as a document: ``report.json``, with every number and the runs behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from atdiag.diagnosis.asking import Conclusion
from atdiag.diagnosis.judging import LookResult, Sufficient, Tested
from atdiag.diagnosis.planning import AnalysisPlan
from atdiag.diagnosis.words import Said
from atdiag.stats.contrasts import estimate
from atdiag.study.protocol import BASELINE
from figures.diagnosis import Row

if TYPE_CHECKING:
    from atdiag.diagnosis.arms import Runs
    from atdiag.diagnosis.first_look import FirstLook
    from atdiag.stats.contrasts import Estimate

SCHEMA = "atdiag.diagnosis.report/1"
"""Described in docs/diagnose.md. Keys may be added; none changes its meaning under this name."""


def as_json(plan: AnalysisPlan, found: Conclusion, said: Said, runs: Runs, seen: FirstLook) -> dict[str, Any]:
    """Return the whole diagnosis as JSON. It holds no path, no user's and no machine's name."""
    from atdiag.training.provenance import versions

    stands = found.footing
    return {
        "schema": SCHEMA,
        "verdict": found.verdict,
        "causes": list(found.causes),
        "headline": said.headline,
        "advice": [
            {"text": one.text, "experiment": one.experiment or None, "options": dict(one.options)}
            for one in said.advice
        ],
        "others": list(said.others),
        "teacher": {"label": plan.case.teacher.label, "top1": runs.teacher()},
        "chance": {"top1": stands.chance, "baseline_low": stands.low, "needed": stands.needed},
        "facts": list(seen.facts),
        "nearest_neighbour": seen.neighbour,
        "signs": [
            {"statistic": one.statistic, "layers": list(one.layers), "value": one.value, "text": one.text}
            for one in seen.signs
        ],
        "looks": [_look(one) for one in found.looks],
        "sufficient": None if found.sufficient is None else _sufficient(found.sufficient),
        "arms": arms(runs),
        "plan": {name: value for name, value in plan.document().items() if name != "runs"},
        "versions": versions(),
    }


def arms(runs: Runs) -> list[dict[str, Any]]:
    """Return a row for each arm that was asked about: accuracy in per cent, contrast with scratch, its runs."""
    rows = []
    scratch_seeds = runs.asked[BASELINE]
    for name, seeds in runs.asked.items():
        got = runs.stored(name, seeds)
        top1 = 100 * sum(float(right.mean()) for right in got.correct.values()) / len(got.correct)
        shared = sorted(seeds & scratch_seeds)
        row: dict[str, Any] = {"arm": name, "top1": top1, "seeds": len(seeds), "contrast": None}
        if name != BASELINE and shared:
            both = {name: runs.stored(name, shared), BASELINE: runs.stored(BASELINE, shared)}
            row["contrast"] = numbers(estimate(both, {name: 1, BASELINE: -1}))
        rows.append({**row, "runs": [spec.id for spec in runs.specs(name, seeds)]})
    return rows


def numbers(one: Estimate) -> dict[str, Any]:
    """Return an estimate as a record."""
    return {"points": one.value, "ci_low": one.low, "ci_high": one.high, "p": one.p, "seeds": one.seeds}


def _look(one: LookResult) -> dict[str, Any]:
    return {
        "seeds": one.look.seeds,
        "level": one.look.level,
        "transfers": {arm: numbers(value) for arm, value in one.transfers.items()},
        "findings": [_finding(finding) for finding in one.findings],
    }


def _finding(one: Tested) -> dict[str, Any]:
    tests = [
        {"contrast": dict(part.weights), "is": part.side, "than": part.bound, **numbers(value)}
        for part, value in zip(one.hypothesis.parts, one.parts, strict=True)
    ]
    return {"name": one.hypothesis.name, "state": one.state, "p_one_sided": one.p, "tests": tests}


def _sufficient(one: Sufficient) -> dict[str, Any]:
    def all_(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
        return {name: numbers(value) for name, value in estimates.items()}

    return {
        "components": list(one.components),
        "confirmed": one.confirmed,
        "on_fresh_seeds": len(one.seeds),
        "minus_standard": numbers(one.against_standard),
        "minus_native": None if one.against_native is None else numbers(one.against_native),
        "dropped": all_(one.dropped),
        "kept": all_(one.kept),
    }


def rows(plan: AnalysisPlan, found: Conclusion) -> list[Row]:
    """Return the contrasts of the last look, for the figure."""
    out = [
        Row(f"{arm.removeprefix('standard + ')} minus scratch", one, "transfer")
        for arm, one in found.last.transfers.items()
    ]
    out += [
        Row(one.hypothesis.name, one.parts[0], one.state, one.hypothesis.parts[0].bound) for one in found.last.findings
    ]
    if (enough := found.sufficient) is not None:
        out.append(Row(f"{', '.join(enough.components)} minus standard", enough.against_standard, "sufficient"))
    return out
