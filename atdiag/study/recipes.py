"""Published recipes as presets (``--recipe``): settings by dotted name, below the user's own.

Values and their sources, field by field: ``docs/recipes.md``. A learning rate is written as the one that is used, which
its source gives for 256 images (He et al., Li et al.) or 512 (Touvron et al.) and scales linearly with the batch. What
the sources do and this can't express is listed there, too.
"""

from __future__ import annotations

from typing import Any

from atdiag.core.errors import UserError, suggest
from atdiag.core.selection import comma_separated
from atdiag.study.profiles import METHODS

_AUGMENTED: dict[str, Any] = {
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "crop": 0.08,
    "flip": True,
    "label_smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "precision": "bfloat16",
}
"""What all of them share."""

_MAE: dict[str, Any] = {**_AUGMENTED, "clip_grad": None, "min_lr": 1e-6, "cosine_after_warmup": True}
"""What the recipes of MAE's code share, on which the 2024 paper's code is built."""

RECIPES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "li2024-copy": (
        "copy",
        {
            **_MAE,
            "epochs": 100,
            "batch_size": 2048,
            "lr": 8e-3,
            "min_lr": 2e-3,
            "warmup_epochs": 5,
            "weight_decay": 0.05,
            "betas": [0.9, 0.999],
            "layer_decay": 0.75,
            "drop_path": 0.0,
            "erase": 0.25,
            "ema": 0.9999,
        },
    ),
    "li2024-distill": (
        "distill",
        {
            **_MAE,
            "epochs": 200,
            "batch_size": 2048,
            "lr": 8e-4,
            "warmup_epochs": 20,
            "weight_decay": 0.3,
            "betas": [0.9, 0.95],
            "layer_decay": None,
            "drop_path": 0.2,
            "erase": 0.25,
            "ema": 0.9999,
        },
    ),
    "li2024-finetune": (
        "finetune",
        {
            **_MAE,
            "epochs": 50,
            "batch_size": 1024,
            "lr": 4e-3,
            "warmup_epochs": 5,
            "weight_decay": 0.05,
            "betas": [0.9, 0.999],
            "layer_decay": 0.75,
            "drop_path": 0.2,
            "erase": 0.25,
            "ema": None,
        },
    ),
    "mae-scratch": (
        "none",
        {
            **_MAE,
            "epochs": 200,
            "batch_size": 4096,
            "lr": 1.6e-3,
            "warmup_epochs": 20,
            "weight_decay": 0.3,
            "betas": [0.9, 0.95],
            "layer_decay": None,
            "drop_path": 0.2,
            "erase": 0.0,
            "ema": 0.9999,
        },
    ),
    "deit": (
        None,
        {
            **_AUGMENTED,
            "epochs": 300,
            "batch_size": 1024,
            "lr": 1e-3,
            "min_lr": 1e-5,
            "warmup_epochs": 5,
            "weight_decay": 0.05,
            "betas": [0.9, 0.999],
            "clip_grad": None,
            "cosine_after_warmup": False,
            "layer_decay": None,
            "drop_path": 0.1,
            "erase": 0.25,
            "ema": None,
        },
    ),
}
"""Name -> the method whose recipe it is (None: all), and its fields."""

_TRANSFER: dict[str, dict[str, Any]] = {
    "li2024-copy": {"transfer.pool": "mean", "transfer.layers": "bottom:21/24"},
    "li2024-distill": {
        "transfer.pool": "mean",
        "transfer.layers": "bottom:21/24",
        "transfer.weight": 3.0,
        "transfer.shared_drop_path": True,
    },
    "li2024-finetune": {"transfer.pool": "mean"},
}
"""Settings of the transfer that belong to a recipe."""


def named(text: str, profile: str) -> dict[str, Any]:
    """Return the settings of one recipe or several (``li2024-copy,mae-scratch``), by dotted name.

    Raises UserError for an unknown one, for two of one method, and at profile mini, whose images they do not fit.
    """
    chosen: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for name in comma_separated(text, "recipe", "li2024-copy,mae-scratch"):
        if name not in RECIPES:
            raise UserError(f"`recipe` {name!r} is not known{suggest(name, RECIPES)}", f"known: {', '.join(RECIPES)}")
        method, fields = RECIPES[name]
        for one in METHODS if method is None else (method,):
            if one in owners:
                raise UserError(f"`recipe` {owners[one]} and {name} are both for {_TOLD[one]}", "leave one of them out")
            owners[one] = name
            chosen |= {f"recipe.{one}.{field}": value for field, value in fields.items()}
        chosen |= _TRANSFER.get(name, {})
    if profile == "mini":
        epochs = max(value for name, value in chosen.items() if name.endswith(".epochs"))
        raise UserError(
            f"`recipe` {text} is for ImageNet ({epochs} epochs, RandAugment on colour images), and profile mini has "
            "scenes of 20 px",
            "add `profile` paper or small, or `data` FOLDER; at mini set single fields, as `recipe.layer_decay`=0.75",
        )
    return chosen


_TOLD = {"none": "students from scratch", "copy": "copying", "distill": "distillation", "finetune": "fine-tuning"}
