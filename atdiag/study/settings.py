"""Profiles (the scale of experiments), and the resolution of a user's settings.

Precedence, for the profile and for every setting: command line, then environment, then the nearest ``atdiag.toml`` (of
the working directory, or of a folder above it), then the default (``mini``). Relative paths in the file are relative to
the file's folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from atdiag.core import paths
from atdiag.core.errors import UserError, suggest
from atdiag.core.spec import Data, Recipe, Seed
from atdiag.data import sources
from atdiag.study import recipes, sense, settings_file
from atdiag.study.profiles import METHODS, OWN_PROFILE, PROFILES, Profile
from atdiag.study.sense import short
from atdiag.study.student import StudentSize, parse
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
    executor: str | None = None
    """What runs cohorts, as the settings file names it."""
    slurm: dict[str, Any] = field(default_factory=dict)
    """The file's table ``[slurm]``, as it stands there."""
    varied: dict[str, Any] = field(default_factory=dict)
    """Settings varied by the experiment on top of these, likewise."""
    chosen: dict[str, Any] = field(default_factory=dict)
    """Settings that were chosen for the user (:mod:`atdiag.study.own`), likewise; the user's own override them."""
    student: StudentSize | None = None
    """The size of all students; None: their teacher's."""
    file: Path | None = None
    """The ``atdiag.toml`` that was read, if any."""
    recipe: str | None = None
    """Published recipes, as typed; their settings are among the ``chosen``."""

    @property
    def told(self) -> dict[str, Any]:
        """What is shown as the user's own settings: recipes by name, and the overrides."""
        return ({} if self.recipe is None else {"recipe": self.recipe}) | self.overrides


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
    data: str | None = None,
    split: float | None = None,
    student: str | None = None,
    recipe: str | None = None,
) -> Settings:
    """Resolve a command's settings. Raises UserError for any invalid one.

    data: a data set by name, or a folder of images by its path. If it is of real images, and no profile is given
    anywhere, the profile is ``own``. split: the same as ``data.split``.

    training: whether the command may train on the data; otherwise ten images, or one class, are enough.
    first_seed: the first of ``seeds`` seeds in a row; by default 0. student: the size of all students, as typed
    (:mod:`atdiag.study.student`); None: their teacher's. recipe: published recipes
    by name (:mod:`atdiag.study.recipes`), below all other settings.
    """
    path = settings_file.find(folder)
    file = settings_file.read(path)
    line = _typed({"data.name": ("data", data and sources.named(data)), "data.split": ("split", split)}, sets)
    named = str(line.get("data.name", ""))
    own = bool(data) and sources.is_real(named)
    name = _name(profile, environment, path, file, OWN_PROFILE if own else "mini")
    if name == OWN_PROFILE and not named and training:
        raise UserError("profile own is for your own images", "name them by `data` FOLDER")
    if split is not None and name == "mini" and not named:
        raise UserError("`split` holds out images of yours", "add `data` FOLDER")
    given = data_dir or environment.get(paths.DATA) or settings_file.place(path, file.get("data_dir"))
    place = None if given is None else Path(given).expanduser().absolute()
    overrides = _overrides(path, file.get("set", {}), line)
    chosen = {} if recipe is None else recipes.named(recipe, name)
    with paths.looking_in(place):
        try:
            resolved = _apply(PROFILES[name], _over(chosen, overrides), training)
        except UserError as fault:
            raise UserError(f"{_culprit(PROFILES[name], path, overrides, line)}{fault}") from None
    count = seeds if seeds is not None else file.get("seeds", resolved.seeds)
    if not 1 <= count <= 1000:
        asked = f"`seeds` {count}" if seeds is not None else f"{path}: seeds = {count}"
        raise UserError(asked, "give a number from 1 to 1000")
    first = first_seed if first_seed is not None else file.get("first_seed", 0)
    if not 0 <= first <= SEEDS - count:
        asked = f"`first_seed` {first}" if first_seed is not None else f"{path}: first_seed = {first}"
        raise UserError(asked, f"give a number from 0 to {SEEDS - count}")
    pairs = tuple(Seed(data=i, model=i) for i in range(first, first + count))
    if classes is not None and not (classes := classes.expanduser()).is_file():
        raise UserError(f"`classes` {classes}: there is no such file", "give a text file with one class per line")
    size = None if student is None else parse(student, name)
    fleet = file.get("executor"), file.get("slurm", {})
    return Settings(
        resolved,
        pairs,
        _runs(runs, environment, path, file),
        place,
        overrides,
        classes,
        *fleet,
        chosen=chosen,
        student=size,
        file=path if file else None,
        recipe=recipe,
    )


def runs_folder(runs: Path | None = None, environment: Mapping[str, str] = os.environ, folder: Path = Path()) -> Path:
    """Return the folder of runs alone. Raises UserError if the settings file can't be read."""
    path = settings_file.find(folder)
    return _runs(runs, environment, path, settings_file.read(path))


def _runs(runs: Path | None, environment: Mapping[str, str], path: Path, file: Mapping[str, Any]) -> Path:
    given = runs or environment.get("ATDIAG_RUNS") or settings_file.place(path, file.get("runs")) or "runs"
    return Path(given).expanduser()


def changed(settings: Settings, name: str, value: Any) -> Settings:
    """Return the settings with another value of one, by dotted name; an experiment's value overrides the user's.

    Raises UserError if it contradicts the others.
    """
    return _again(settings, settings.overrides, settings.varied | {name: value}, settings.chosen)


def choosing(settings: Settings, chosen: Mapping[str, Any], training: bool = True) -> Settings:
    """Return the settings with further values that were chosen for the user; the user's own override them.

    training: as in :func:`resolve`. Raises UserError if they contradict the others.
    """
    return _again(settings, settings.overrides, settings.varied, {**settings.chosen, **chosen}, training)


def _again(
    settings: Settings,
    overrides: dict[str, Any],
    varied: dict[str, Any],
    chosen: dict[str, Any],
    training: bool = True,
) -> Settings:
    applied = _over(_over(chosen, overrides), varied)
    with paths.looking_in(settings.data_dir):
        profile = _apply(PROFILES[settings.profile.name], applied, training)
    return replace(settings, profile=profile, overrides=overrides, varied=varied, chosen=chosen)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return both sets of overrides; a general setting above replaces those below for single methods, too."""
    return {name: value for name, value in below.items() if _general(name) not in above} | dict(above)


def overriding(settings: Settings, more: Mapping[str, Any]) -> Settings:
    """Return the settings with further overrides, as if the user had typed them. Raises UserError if they clash."""
    return _again(settings, {**settings.overrides, **more}, settings.varied, settings.chosen)


def leaving_out(settings: Settings, name: str) -> Settings:
    """Return the settings without one of the user's overrides. Raises UserError if the others then contradict."""
    others = {key: value for key, value in settings.overrides.items() if key != name}
    return _again(settings, others, settings.varied, settings.chosen)


def without(settings: Settings, name: str) -> Profile | None:
    """Return the profile without one of the user's overrides; None if the others then contradict each other."""
    try:
        return leaving_out(settings, name).profile
    except UserError:
        return None


def profile_name(profile: str | None = None, environment: Mapping[str, str] = os.environ, folder: Path = Path()) -> str:
    """Return the name of the selected profile. Raises UserError for an unknown one, saying where it was given."""
    path = settings_file.find(folder)
    return _name(profile, environment, path, settings_file.read(path))


def _name(
    profile: str | None, environment: Mapping[str, str], path: Path, file: Mapping[str, Any], usual: str = "mini"
) -> str:
    name, origin = next(
        (value, origin)
        for value, origin in (
            (profile, "`profile`"),
            (environment.get("ATDIAG_PROFILE") or None, "ATDIAG_PROFILE"),
            (file.get("profile"), str(path)),
            (usual, ""),
        )
        if value is not None
    )
    known = list(PROFILES)
    if name not in known:
        raise UserError(f"{origin}: unknown profile {name!r}{suggest(name, known)} (known: {', '.join(known)})")
    return str(name)


SETTINGS = (
    *(f"data.{field}" for field in Data.model_fields),
    *(f"recipe.{field}" for field in Recipe.model_fields),
    *(f"recipe.{method}.{field}" for method in METHODS for field in Recipe.model_fields),
    *(f"transfer.{field}" for field in TransferSettings.model_fields),
)
"""Settings that can be overridden, by dotted name. ``recipe.lr`` applies to all methods, ``recipe.copy.lr`` to one."""


def _typed(options: Mapping[str, tuple[str, Any]], sets: Sequence[str]) -> dict[str, Any]:
    """Return the overrides of a command line by dotted name: from options of their own, and from ``--set``."""
    line = {name: value for name, (_, value) in options.items() if value is not None}
    for item in sets:
        name, value = _parse(item)
        if name in line and (name not in options or options[name][1] is None):
            raise UserError(f"{name} is given twice ({short(line[name])} and {short(value)})", "give it once")
        if name in line:
            raise UserError(f"{name} is given twice, by `{options[name][0]}` and by `{name}`", "give it once")
        line[name] = value
    return line


def _overrides(path: Path, file: Mapping[str, Any], line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides from the file and the command line; the line wins, for one method or all."""
    for origin, given in ((f"{path}: ", file), ("", line)):
        for name in given:
            if name not in SETTINGS:
                raise UserError(
                    f"{origin}{name!r} is not a setting{_near(name)}",
                    "'atdiag reinit --dry-run' lists the settings",
                )
    return _over(file, line)


def _culprit(profile: Profile, path: Path, overrides: Mapping[str, Any], line: Mapping[str, Any]) -> str:
    """Return the file's name with a colon if the settings are invalid because of the file alone; else empty."""
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
    whole = [setting for setting in SETTINGS if setting.count(".") == 1 and setting.endswith(f".{name}")]
    return f", did you mean {whole[0]!r}?" if whole else suggest(name, SETTINGS)


def _general(name: str) -> str:
    """Drop the method from ``recipe.copy.lr`` -> ``recipe.lr``; other names are returned unchanged."""
    section, *rest = name.split(".")
    return f"{section}.{rest[-1]}"


def _parse(item: str) -> tuple[str, Any]:
    """Split ``recipe.epochs=40`` into name and value (parsed as JSON if possible, else a string)."""
    name, sign, text = item.partition("=")
    if not sign or not name.strip():
        raise UserError(f"{short(item)} is not NAME=VALUE", "write it as `recipe.epochs`=40")
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
    sense.check(applied)
    if training:
        sense.check_training(applied)
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
    elif first["type"] in ("bool_type", "bool_parsing"):
        message = "write true or false"
    return f"{'.'.join(parts)}={short(value)}: {message[0].lower()}{message[1:]}"
