"""Refuse settings that contradict each other, or with which nothing can be trained. Imports nothing heavy."""

from __future__ import annotations

import json
import re
from typing import Any

from atdiag.core.errors import UserError
from atdiag.data import sources
from atdiag.data.datasets import check_classes
from atdiag.study.profiles import Profile


def short(value: Any) -> str:
    """Format a value as one short line; null, true and lists as they are typed."""
    text = json.dumps(value, default=str) if value is None or isinstance(value, bool | list | tuple) else repr(value)
    return text if len(text) <= 60 else f"{text[:40]} ... {text[-10:]}"


_MOST = {"data.train": 10_000_000, "data.test_per_source": 1_000, "recipe.epochs": 100_000}
"""Limits beyond which a typing error is more likely than intent; memory or time would run out long before."""

_RAND_AUGMENT = re.compile(r"rand(-(m|n|mmax|inc)\d+|-(mstd|p)\d+(\.\d+)?|-tweights)*")
"""timm's configuration string, which timm itself parses only when training starts."""


def check(profile: Profile) -> None:
    """Raise UserError for settings that are valid alone but contradict each other or can't be trained with."""
    data = profile.data
    if profile.transfer.weight == 0:
        raise UserError("transfer.weight=0 transfers nothing", "give a positive weight")
    if profile.transfer.shared_drop_path and not any(recipe.drop_path for recipe in profile.recipe.values()):
        raise UserError(
            "transfer.shared_drop_path: no student drops a branch that its teacher could drop",
            "add recipe.drop_path=0.1",
        )
    for recipe in profile.recipe.values():
        values = {
            "data.train": data.train,
            "data.test_per_source": data.test_per_source,
            "recipe.epochs": recipe.epochs,
        }
        for name, value in values.items():
            if value > _MOST[name]:
                raise UserError(f"{name}={short(value)} is too large", f"give at most {_MOST[name]}")
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
                f"recipe.rand_augment={short(recipe.rand_augment)} is not one of timm's configurations",
                "write it as 'rand-m9-mstd0.5-inc1'",
            )


def check_training(profile: Profile) -> None:
    """Raise UserError for data that can't be trained on."""
    data = profile.data
    check_classes(data.name, sources.find(data).classes)
    for recipe in profile.recipe.values():
        if recipe.batch_size > data.train:
            raise UserError(
                f"recipe.batch_size={short(recipe.batch_size)} is larger than the training set "
                f"(data.train={data.train})",
                f"give at most `recipe.batch_size`={data.train}, or more images",
            )
