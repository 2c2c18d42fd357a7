"""The settings file ``atdiag.toml``: where it is found, and what may stand in it."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atdiag.core.errors import UserError, suggest
from atdiag.core.resources import small_file
from atdiag.study.sense import short

NAME = "atdiag.toml"

_KEYS = {
    "profile": (str, 'profile = "mini"'),
    "seeds": (int, "seeds = 3"),
    "first_seed": (int, "first_seed = 100"),
    "runs": (str, 'runs = "runs"'),
    "data_dir": (str, 'data_dir = "/data"'),
    "executor": (str, 'executor = "slurm"'),
}
_TABLES = ("data", "recipe", "transfer", "slurm")


def place(path: Path, value: str | None) -> Path | None:
    """Return a path that stands in a settings file, from the working directory."""
    return path.parent / Path(value).expanduser() if value else None


def find(folder: Path) -> Path:
    """Return the nearest ``atdiag.toml``, of the folder or of one above it; the folder's own if there is none."""
    folders = [folder.joinpath(*[".."] * i) for i in range(len(folder.absolute().parents) + 1)]
    # os.path.exists: a folder above that may not be searched holds nothing for us.
    return next((above / NAME for above in folders if os.path.exists(above / NAME)), folder / NAME)  # noqa: PTH110


def read(path: Path) -> dict[str, Any]:
    """Return what the file sets: its keys, ``slurm`` as it stands there, the other tables by dotted name in ``set``.

    Empty if there is no such file. Raises UserError for what it can't mean.
    """
    if not path.exists():
        return {}
    try:
        content = tomllib.loads(small_file(path).decode())
    except (ValueError, RecursionError, OSError) as fault:  # invalid TOML or UTF-8, a number of 5,000 digits, a folder
        raise UserError(f"{path} can't be read ({fault})") from None
    out: dict[str, Any] = {"set": {}}
    for key, value in content.items():
        if key in _KEYS:
            wanted, example = _KEYS[key]
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise UserError(f"{path}: {key} = {short(value)} has the wrong type", f"write it as '{example}'")
            out[key] = value
        elif key in _TABLES:
            if not isinstance(value, dict):
                raise UserError(f"{path}: {key} = {short(value)} is not a table", f"write its fields under '[{key}]'")
            if key == "slurm":
                out["slurm"] = value
                continue
            out["set"] |= {f"{key}.{name}": v for name, v in _flatten(value).items()}
        else:
            known = [*_KEYS, *_TABLES]
            names = ", ".join([*_KEYS, *(f"[{table}]" for table in _TABLES)])
            raise UserError(f"{path}: unknown key {key!r}{suggest(key, known)} (known: {names})")
    return out


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in table.items():
        out |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out
