"""Which experiment asked for which run, for lists: ``<runs>/.experiments/<experiment>-<hash>.json``.

A run knows what it estimates, not who asked: several experiments share it. So an experiment leaves one small file with
the runs of its arms when it trains. Lists read them; nothing else does, and they may be deleted. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from atdiag.core.resources import small_file
from atdiag.core.runs import Store, digest, write_atomically

FOLDER = ".experiments"


def record(store: Store, ablation: str, arms: Mapping[str, Sequence[str]], trains: bool = True) -> None:
    """Write the ids of the runs of an experiment's arms; once for each set of them. A full or read-only disk: nothing.

    An arm without a name is described by its runs. trains: whether some of them are trained now; if not, an experiment
    that is recorded already leaves everything as it is.
    """
    folder = store.root / FOLDER
    path = folder / f"{ablation}-{digest(arms)[:8]}.json"
    if not any(arms.values()):
        return
    with contextlib.suppress(OSError):
        if path.exists():
            if trains:
                path.touch()  # the one that asked last is the last in a list
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"experiment": ablation, "arms": arms}))


def read(store: Store) -> dict[str, dict[str, str]]:
    """Return the experiments that asked for each run, in the order in which they last did: id -> experiment -> arm.

    Files that can't be read are skipped.
    """
    out: dict[str, dict[str, str]] = {}
    for path in sorted((store.root / FOLDER).glob("*.json"), key=_age):
        try:
            content = json.loads(small_file(path))
            pairs = [(run, str(arm)) for arm, ids in content["arms"].items() for run in ids]
            name = str(content["experiment"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        for run, arm in pairs:
            who = out.setdefault(run, {})
            who[name] = arm or who.pop(name, "")
    return out


def _age(path: Path) -> tuple[float, str]:
    try:
        return path.stat().st_mtime, path.name
    except OSError:
        return 0.0, path.name
