"""Profiles (the scale of experiments), and the resolution of a user's settings.

Precedence, for the profile and for every setting: command line, then environment, then ``atdiag.toml`` in the working
directory, then the default (``mini``).
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from atdiag.core import paths
from atdiag.core.errors import UserError, suggest
from atdiag.core.resources import small_file
from atdiag.core.spec import Data, Recipe, Seed
from atdiag.data import sources
from atdiag.data.datasets import check_classes
from atdiag.study.profiles import METHODS, PROFILES, Profile
from atdiag.study.transfer_settings import TransferSettings

SEEDS = 1_000_000
"""Studies have seeds below this; miniature teachers were pre-trained with this one."""


@dataclass(frozen=True)
class Settings:
    """A command's resolved settings: profile with overrides applied, seeds, and folders of runs and results."""

    profile: Profile
    seeds: tuple[Seed, ...]
    runs: Path
    data_dir: Path | None = None
    """Folder of all data sets; None: not set, which is enough for most commands."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """The user's overrides by dotted name, as applied."""
    classes: Path | None = None
    """The user's list of the classes of the teacher's head, one for each row."""
    varied: dict[str, Any] = field(default_factory=dict)
    """Settings varied by the experiment on top of these, likewise."""


def resolve(
    profile: str | None = None,
    seeds: int | None = None,
    sets: Sequence[str] = (),
    runs: Path | None = None,
    data_dir: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    folder: Path = Path(),
    classes: Path | None = None,
    training: bool = True,
    first_seed: int | None = None,
) -> Settings:
    """Resolve a command's settings. Raises UserError for any invalid one.

    training: whether the command may train on the data; otherwise ten images, or one class, are enough.
    first_seed: the first of ``seeds`` seeds in a row; by default 0.
    """
    path = folder / "atdiag.toml"
    file = _read_file(path)
    name = _name(profile, environment, path, file)
    given = data_dir or environment.get(paths.DATA) or file.get("data_dir")
    place = None if given is None else Path(given).expanduser().absolute()
    overrides = _overrides(path, file.get("set", {}), sets)
    with paths.looking_in(place):
        try:
            resolved = _apply(PROFILES[name], overrides, training)
        except UserError as fault:
            raise UserError(f"{_culprit(PROFILES[name], path, overrides, sets)}{fault}") from None
    count = seeds if seeds is not None else file.get("seeds", resolved.seeds)
    if not 1 <= count <= 1000:
        asked = f"`seeds` {count}" if seeds is not None else f"{path}: seeds = {count}"
        raise UserError(asked, "give a number from 1 to 1000")
    first = first_seed if first_seed is not None else file.get("first_seed", 0)
    if not 0 <= first <= SEEDS - count:
        asked = f"`first_seed` {first}" if first_seed is not None else f"{path}: first_seed = {first}"
        raise UserError(asked, f"give a number from 0 to {SEEDS - count}")
    root = (
        runs.expanduser() if runs else Path(environment.get("ATDIAG_RUNS") or file.get("runs") or "runs").expanduser()
    )
    pairs = tuple(Seed(data=i, model=i) for i in range(first, first + count))
    if classes is not None and not (classes := classes.expanduser()).is_file():
        raise UserError(f"`classes` {classes}: there is no such file", "give a text file with one class per line")
    return Settings(resolved, pairs, root, place, overrides, classes)


def changed(settings: Settings, name: str, value: Any) -> Settings:
    """Return the settings with another value of one, by dotted name; an experiment's value overrides the user's.

    Raises UserError if it contradicts the others.
    """
    varied = settings.varied | {name: value}
    others = {key: given for key, given in settings.overrides.items() if _general(key) != name}
    with paths.looking_in(settings.data_dir):
        return replace(settings, profile=_apply(PROFILES[settings.profile.name], others | varied), varied=varied)


def without(settings: Settings, name: str) -> Profile | None:
    """Return the profile without one of the user's overrides; None if the others then contradict each other."""
    others = {key: value for key, value in settings.overrides.items() if key != name}
    try:
        with paths.looking_in(settings.data_dir):
            return _apply(PROFILES[settings.profile.name], others | settings.varied)
    except UserError:
        return None


def profile_name(profile: str | None = None, environment: Mapping[str, str] = os.environ, folder: Path = Path()) -> str:
    """Return the name of the selected profile. Raises UserError for an unknown one, saying where it was given."""
    path = folder / "atdiag.toml"
    return _name(profile, environment, path, _read_file(path))


def _name(profile: str | None, environment: Mapping[str, str], path: Path, file: Mapping[str, Any]) -> str:
    name, origin = next(
        (value, origin)
        for value, origin in (
            (profile, "`profile`"),
            (environment.get("ATDIAG_PROFILE") or None, "ATDIAG_PROFILE"),
            (file.get("profile"), str(path)),
            ("mini", ""),
        )
        if value is not None
    )
    known = list(PROFILES)
    if name not in known:
        raise UserError(f"{origin}: unknown profile {name!r}{suggest(name, known)} (known: {', '.join(known)})")
    return str(name)


_FILE_KEYS = {
    "profile": (str, 'profile = "mini"'),
    "seeds": (int, "seeds = 3"),
    "first_seed": (int, "first_seed = 100"),
    "runs": (str, 'runs = "runs"'),
    "data_dir": (str, 'data_dir = "/data"'),
}
_FILE_TABLES = ("data", "recipe", "transfer")

_SETTINGS = (
    *(f"data.{field}" for field in Data.model_fields),
    *(f"recipe.{field}" for field in Recipe.model_fields),
    *(f"recipe.{method}.{field}" for method in METHODS for field in Recipe.model_fields),
    *(f"transfer.{field}" for field in TransferSettings.model_fields),
)
"""Settings that can be overridden, by dotted name. ``recipe.lr`` applies to all methods, ``recipe.copy.lr`` to one."""


def _read_file(path: Path) -> dict[str, Any]:
    """Read ``atdiag.toml``: profile, seeds, first_seed, runs, data_dir, and the tables data, recipe and transfer."""
    if not path.exists():
        return {}
    try:
        content = tomllib.loads(small_file(path).decode())
    except (ValueError, RecursionError, OSError) as fault:  # invalid TOML or UTF-8, a number of 5,000 digits, a folder
        raise UserError(f"{path} can't be read ({fault})") from None
    out: dict[str, Any] = {"set": {}}
    for key, value in content.items():
        if key in _FILE_KEYS:
            wanted, example = _FILE_KEYS[key]
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise UserError(f"{path}: {key} = {_short(value)} has the wrong type", f"write it as '{example}'")
            out[key] = value
        elif key in _FILE_TABLES:
            if not isinstance(value, dict):
                raise UserError(f"{path}: {key} = {_short(value)} is not a table", f"write its fields under '[{key}]'")
            out["set"] |= {f"{key}.{name}": v for name, v in _flatten(value).items()}
        else:
            known = [*_FILE_KEYS, *_FILE_TABLES]
            names = ", ".join([*_FILE_KEYS, *(f"[{table}]" for table in _FILE_TABLES)])
            raise UserError(f"{path}: unknown key {key!r}{suggest(key, known)} (known: {names})")
    return out


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in table.items():
        out |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def _overrides(path: Path, file: Mapping[str, Any], sets: Sequence[str]) -> dict[str, Any]:
    """Return the overrides from the file and from ``--set`` by dotted name; ``--set`` wins, for one method or all."""
    line: dict[str, Any] = {}
    for item in sets:
        name, value = _parse(item)
        if name in line:
            raise UserError(f"{name} is given twice ({_short(line[name])} and {_short(value)})", "give it once")
        line[name] = value
    for origin, given in ((f"{path}: ", file), ("", line)):
        for name in given:
            if name not in _SETTINGS:
                raise UserError(
                    f"{origin}{name!r} is not a setting{_near(name)}",
                    "'atdiag reinit --dry-run' lists the settings",
                )
    return {name: value for name, value in file.items() if _general(name) not in line} | line


def _culprit(profile: Profile, path: Path, overrides: Mapping[str, Any], sets: Sequence[str]) -> str:
    """Return the file's name with a colon if the settings are invalid because of the file alone; else empty."""
    line = {_parse(item)[0] for item in sets}
    typed = {name: value for name, value in overrides.items() if name in line}
    if typed == overrides:
        return ""
    try:
        _apply(profile, typed)
    except UserError:
        return ""
    return f"{path}: "


def _near(name: str) -> str:
    """Return ", did you mean 'recipe.lr'?" for ``lr``, and for any other slip the closest setting."""
    whole = [setting for setting in _SETTINGS if setting.count(".") == 1 and setting.endswith(f".{name}")]
    return f", did you mean {whole[0]!r}?" if whole else suggest(name, _SETTINGS)


def _general(name: str) -> str:
    """Drop the method from ``recipe.copy.lr`` -> ``recipe.lr``; other names are returned unchanged."""
    section, *rest = name.split(".")
    return f"{section}.{rest[-1]}"


def _parse(item: str) -> tuple[str, Any]:
    """Split ``recipe.epochs=40`` into name and value (parsed as JSON if possible, else a string)."""
    name, sign, text = item.partition("=")
    if not sign or not name.strip():
        raise UserError(f"{_short(item)} is not NAME=VALUE", "write it as `recipe.epochs`=40")
    try:
        return name.strip(), json.loads(text, parse_float=_number)
    except (ValueError, RecursionError):  # a number of 5,000 digits is a ValueError, too
        return name.strip(), text


def _number(text: str) -> float:
    """Parse a JSON number with a point or an exponent; ``1e4`` is whole, as people write it, and ``1.0`` is not."""
    value = float(text)
    return int(value) if "." not in text and abs(value) < 2**53 and value.is_integer() else value


def _apply(profile: Profile, overrides: Mapping[str, Any], training: bool = True) -> Profile:
    """Apply overrides by dotted name to a profile."""
    document = profile.model_dump(mode="json")
    document["data"] = _data(profile.data, overrides.get("data.name"))
    # General settings first, so that recipe.copy.lr wins over recipe.lr.
    for name, value in sorted(overrides.items(), key=lambda pair: pair[0].count(".")):
        section, *rest = name.split(".")
        if section in ("transfer", "data"):
            document[section][rest[0]] = value  # data: see _data
        elif len(rest) == 2:
            document["recipe"][rest[0]][rest[1]] = value
        else:
            for method in METHODS:
                document["recipe"][method][rest[0]] = value
    try:
        # Validate as strict JSON: lists become tuples and 3 a float, but true is not 1 and "3" is not a number.
        applied = Profile.model_validate_json(json.dumps(document, default=str), strict=True)
    except ValidationError as fault:
        raise UserError(describe(fault, overrides)) from None
    completed = sources.complete(applied.data, overrides.get("data.train"))
    applied = applied.model_copy(update={"data": completed})
    _check_sense(applied)
    if training:
        _check_training(applied)
    return applied


def _data(usual: Data, name: Any) -> dict[str, Any]:
    """Return the data to apply overrides to, as a document: the profile's, or defaults for another data set."""
    if name in (None, usual.name) or not isinstance(name, str):
        return usual.model_dump(mode="json")
    return sources.find(name).usual(usual).model_dump(mode="json")


def describe(fault: ValidationError, given: Collection[str] = ()) -> str:
    """Format a validation error as one line: the setting (as the user named it), its value, and what is allowed."""
    first = fault.errors()[0]
    parts = [str(part) for part in first["loc"]]
    if len(parts) > 2 and parts[0] == "recipe" and ".".join(parts[:3]) not in given:
        del parts[1]  # recipe.<method>.<field>: the user named recipe.<field>
    message = first["msg"].removeprefix("Value error, ")
    if not parts:  # an inconsistency of the whole model, which the message describes
        return message
    value = first["input"]
    if parts[-1].isdigit():  # an entry of a list: the user named the list
        entry = parts.pop()
        if first["type"] == "missing":
            message = "a list of more numbers is needed, as [0.9,0.95]"
        else:
            parts[-1] += f"[{entry}]"
    elif first["type"] == "tuple_type":
        message = "write a list, as [0.9,0.95]"
    return f"{'.'.join(parts)}={_short(value)}: {message[0].lower()}{message[1:]}"


def _short(value: Any) -> str:
    """Format a value as one short line; null, true and lists as they are typed."""
    text = json.dumps(value, default=str) if value is None or isinstance(value, bool | list | tuple) else repr(value)
    return text if len(text) <= 60 else f"{text[:40]} ... {text[-10:]}"


_MOST = {"data.train": 10_000_000, "data.test_per_source": 1_000, "recipe.epochs": 100_000}
"""Limits beyond which a typing error is more likely than intent; memory or time would run out long before."""

_RAND_AUGMENT = re.compile(r"rand(-(m|n|mmax|inc)\d+|-(mstd|p)\d+(\.\d+)?|-tweights)*")
"""timm's configuration string, which timm itself parses only when training starts."""


def _check_sense(profile: Profile) -> None:
    """Raise UserError for settings that are valid alone but contradict each other or can't be trained with."""
    data = profile.data
    if profile.transfer.weight == 0:
        raise UserError("transfer.weight=0 transfers nothing", "give a positive weight")
    for recipe in profile.recipe.values():
        values = {
            "data.train": data.train,
            "data.test_per_source": data.test_per_source,
            "recipe.epochs": recipe.epochs,
        }
        for name, value in values.items():
            if value > _MOST[name]:
                raise UserError(f"{name}={_short(value)} is too large", f"give at most {_MOST[name]}")
        if recipe.lr == 0:
            raise UserError("recipe.lr=0 trains nothing", "give a positive rate")
        if recipe.min_lr > recipe.lr:
            raise UserError(
                f"recipe.min_lr={recipe.min_lr:g} is above recipe.lr={recipe.lr:g}", "give a smaller min_lr"
            )
        if recipe.epochs == 0:
            raise UserError("recipe.epochs=0 trains nothing", "give at least 1")
        if recipe.warmup_epochs > recipe.epochs:
            raise UserError(
                f"recipe.warmup_epochs={recipe.warmup_epochs:g} is longer than recipe.epochs={recipe.epochs}",
                f"give at most {recipe.epochs}",
            )
        if max(recipe.mixup, recipe.cutmix) > 1e6:
            raise UserError(
                "recipe.mixup or recipe.cutmix is too large for the alpha of a beta distribution",
                "give at most 1e6",
            )
        if recipe.rand_augment is not None and not _RAND_AUGMENT.fullmatch(recipe.rand_augment):
            raise UserError(
                f"recipe.rand_augment={_short(recipe.rand_augment)} is not one of timm's configurations",
                "write it as 'rand-m9-mstd0.5-inc1'",
            )


def _check_training(profile: Profile) -> None:
    """Raise UserError for data that can't be trained on."""
    data = profile.data
    check_classes(data.name, sources.find(data).classes)
    for recipe in profile.recipe.values():
        if recipe.batch_size > data.train:
            raise UserError(
                f"recipe.batch_size={_short(recipe.batch_size)} is larger than the training set "
                f"(data.train={data.train})",
                "make one smaller or the other larger",
            )
