"""The rows of ``atdiag runs list``, with an index of those of finished runs, which don't change.

The index, ``<runs>/.index.json``, is only a cache: a row is taken from it if the run's spec and result are still the
files that it was made from. It may be deleted, and is written atomically. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

from atdiag.core.resources import GIB, small_file
from atdiag.core.runs import Run, Store, write_atomically
from atdiag.core.selection import ranges
from atdiag.core.spec import Transfer

INDEX = ".index.json"
_FORM = 2
"""Form of the rows: an index of another one is made anew."""
_FEW = 200
"""Runs below which no index is worth a file."""


def rows(store: Store) -> list[dict[str, Any]]:
    """Return the row of every run, oldest first."""
    runs = store.list()
    kept = _read(store) if len(runs) > _FEW else {}
    out, index = [], {}
    for run in runs:
        stamp = _stamp(run) if len(runs) > _FEW else None
        old = kept.get(run.id)
        row = old[1] if stamp is not None and old is not None and old[0] == stamp else listed(run)
        if stamp is not None and row["state"] == "finished":
            index[run.id] = [stamp, row]
        out.append(row)
    if index != kept and index:
        with contextlib.suppress(OSError):  # a store that can't be written is only read
            content = {"form": _FORM, "rows": index}
            write_atomically(store.root / INDEX, json.dumps(content))
    return out


def _stamp(run: Run) -> list[int] | None:
    """Return what tells whether a finished run's files are the same as before; None for an unfinished one."""
    out = []
    for name in ("result.json", "spec.json"):
        try:
            found = os.stat(run.path / name)  # noqa: PTH116
        except OSError:
            return None
        out += [found.st_mtime_ns, found.st_size, found.st_ino]
    return out


def _read(store: Store) -> dict[str, Any]:
    """Return the index by run; empty if there is none, or none that can be used."""
    try:
        content = json.loads(small_file(store.root / INDEX, GIB))
        if content["form"] == _FORM and all(len(entry) == 2 for entry in content["rows"].values()):
            return dict(content["rows"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return {}


def listed(run: Run) -> dict[str, Any]:
    """Return a run's row: what it is, its state, and its accuracy."""
    try:
        spec = run.spec
        result = run.result() if run.finished else {}
        command = result.get("origin", {}).get("command") or []
        return {
            "run": run.id,
            "state": run.state,
            "teacher": spec.teacher.label if spec.teacher else "",
            "student": " ".join(spec.network.components) or "standard",
            "start": (spec.start.label if spec.start else spec.init.source)
            + (f" less {'+'.join(spec.init.reinit)}" if spec.init.reinit else ""),
            "transfer": _transfer_text(spec.transfer),
            "data": f"{spec.data.name} {spec.data.train}x{spec.recipe.epochs}",
            "seed": f"{spec.seed.data}/{spec.seed.model}",
            "top1": result["top1"] if run.finished else None,
            "ordered_by": str(command[1]) if len(command) > 1 else "",
        }
    except (ValueError, KeyError, TypeError, AttributeError):  # damaged, or of another version: still list the others
        nothing = dict.fromkeys(("teacher", "student", "start", "transfer", "data", "seed", "ordered_by"), "")
        return {"run": run.id, "state": "damaged", **nothing, "top1": None}


def _transfer_text(transfer: Transfer) -> str:
    """Format a transfer: ``copy 0-11``, ``distill q 6-11 x3``, ``distill 0-5 heads 0,2 mean over queries, mse x3``."""
    words: list[str] = [transfer.method]
    if transfer.tensor != "map":
        words.append(transfer.tensor)
    if transfer.layers:
        words.append(ranges(transfer.layers))
    if transfer.teacher_layers:
        words.append(f"from {ranges(transfer.teacher_layers)}")
    if transfer.heads is not None:
        words.append(f"heads {ranges(transfer.heads)}")
    if transfer.different_heads is not None:
        words.append(f"{transfer.different_heads} most different heads")
    if transfer.average is not None:
        words.append(f"mean over {transfer.average}")
    if transfer.method == "distill" and transfer.tensor == "map" and transfer.loss != "ce":
        words.append(str(transfer.loss))
    if transfer.weight is not None:
        words.append(f"x{transfer.weight:g}")
    return " ".join(words)
