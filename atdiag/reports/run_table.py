"""Runs as flat, comparable rows: spec, environment and results.

Imports no torch.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from atdiag.core.runs import Run

_VALIDATION = ("validation_top1", "validation_images")
RESULTS = ("top1", "test_images", *_VALIDATION, "steps", "seconds", "images_per_second")
"""Numeric fields of a run's result; those of the validation part are in runs with ``data.validation`` alone."""

_RECORDED = ("environment", "origin")
_TIMES = ("environment.finished_at", "origin.started_at")

_MISSING = object()

Difference = tuple[str, Any, Any]
"""A field's dotted name, and its values in both runs (None if a run lacks the field)."""


def flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings by dotted names; lists are values. ``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    out: dict[str, Any] = {}
    for key, value in document.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def _spec(run: Run) -> dict[str, Any]:
    document = run.spec.model_dump(mode="json")
    if document["teacher"] is None:  # otherwise an extra column beside teacher.name etc.
        del document["teacher"]
    return flat(document)


def _result(run: Run) -> dict[str, Any]:
    return run.result() if run.finished else {}


def _recorded(result: Mapping[str, Any]) -> dict[str, Any]:
    return flat({name: result[name] for name in _RECORDED if result.get(name) is not None})


def row(run: Run) -> dict[str, Any]:
    """Return a run as one flat row: id, state, results, all fields of its spec, and its environment.

    A run whose spec or result can't be read has its id and the state ``damaged``.
    """
    try:
        spec, result = _spec(run), _result(run)
        return {
            "run": run.id,
            "state": run.state,
            **{name: result.get(name) for name in RESULTS},
            **spec,
            **_recorded(result),
        }
    except (ValueError, OSError):
        return {"run": run.id, "state": "damaged"}


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows as CSV: a column for each field in any row, empty where a row lacks it; lists as JSON."""
    first = ["run", "state", *RESULTS]
    names = dict.fromkeys([*first, *(name for one in rows for name in one)])
    # Put the environment last, whichever row has it first.
    last = [name for name in names if name.partition(".")[0] in _RECORDED]
    out = io.StringIO()
    writer = csv.DictWriter(out, [*(name for name in names if name not in last), *last], lineterminator="\n")
    writer.writeheader()
    for one in rows:
        writer.writerow({name: json.dumps(v) if isinstance(v, list | bool) else v for name, v in one.items()})
    return out.getvalue()


def differences(one: Run, other: Run) -> dict[str, list[Difference]]:
    """Compare two runs: ``spec``, ``environment`` (without times), and all numbers of either under ``results``.

    Raises DamagedRunError.
    """
    results = _result(one), _result(other)
    held_out = any(name in result for result in results for name in _VALIDATION)
    numbers = [name for name in RESULTS if held_out or name not in _VALIDATION]
    recorded = [{name: value for name, value in _recorded(result).items() if name not in _TIMES} for result in results]
    return {
        "spec": _unequal(_spec(one), _spec(other)),
        "environment": _unequal(*recorded) if all(results) else [],
        "results": [(name, results[0].get(name), results[1].get(name)) for name in numbers],
    }


def _unequal(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
    names = dict.fromkeys([*one, *other])
    return [(n, one.get(n), other.get(n)) for n in names if one.get(n, _MISSING) != other.get(n, _MISSING)]
