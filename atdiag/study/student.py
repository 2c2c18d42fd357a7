"""The size of a student as typed by a user: ``--student deit_s``, ``timm:MODEL``, ``width=384,depth=12,heads=6``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from atdiag.core.errors import UserError, suggest
from atdiag.core.spec import Network
from atdiag.networks.registry import sizes
from atdiag.study.sense import short

_KEYS = {"width": "width", "depth": "depth", "heads": "heads", "mlp": "mlp_ratio", "patch": "patch_size"}
"""Typed key -> field of :class:`~atdiag.core.spec.Network`."""
_EXAMPLE = "write it as a name (deit_s), timm:MODEL, or width=384,depth=12,heads=6 (also mlp=4, patch=16)"


@dataclass(frozen=True)
class StudentSize:
    """The size of a student. What is None is as the teacher's."""

    typed: str
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    patch_size: int | None = None

    def of(self, student: Network, image_size: int) -> Network:
        """Return a student of this size, in place of one of its teacher's, for images of a size in pixels.

        Raises UserError for heads that do not divide the width, and patches that do not divide the image.
        """
        named = {name: getattr(self, name) for name in _KEYS.values()}
        fields = {name: value for name, value in named.items() if value is not None}
        patch = self.patch_size or student.patch_size
        if image_size % patch:
            low = image_size // patch * patch
            raise UserError(
                f"`student` {self.typed}: patches of {patch} px do not divide images of {image_size} px",
                f"give patch=, or `data.image_size`={low or patch}" if student.channels == 3 else "give another patch=",
            )
        try:
            return Network.model_validate({**student.model_dump(), **fields, "image_size": image_size})
        except ValidationError as fault:
            told = fault.errors()[0]["msg"].removeprefix("Value error, ")
            raise UserError(f"`student` {self.typed}: {told}", "give a width that its heads divide") from None

    def teachers_image_size(self, image_size: int, patch_size: int) -> int:
        """Return the image size that gives a teacher of some patch size the student's grid."""
        return image_size if self.patch_size is None else image_size // self.patch_size * patch_size


def parse(text: str, profile: str) -> StudentSize:
    """Parse a size at a profile. Raises UserError for one that can't be meant, with "did you mean" for a name.

    >>> parse("width=384,heads=6", "paper")
    StudentSize(typed='width=384,heads=6', width=384, depth=None, heads=6, mlp_ratio=None, patch_size=None)
    >>> parse("s", "mini")
    StudentSize(typed='s', width=32, depth=12, heads=2, mlp_ratio=4.0, patch_size=None)
    """
    text = text.strip()
    if not text:
        raise UserError("`student` is empty", _EXAMPLE)
    if text in (known := sizes.letters(profile)):
        return StudentSize(text, **known[text], mlp_ratio=4.0)
    if "=" in text and not text.startswith("timm:") and "@" not in text and "/" not in text:
        return _typed(text)
    if re.fullmatch(r"[a-z]|\d+", text):
        raise UserError(f"`student` {text!r}: profile {profile} has the sizes {', '.join(known)}", _EXAMPLE)
    try:
        found = sizes.network(text, profile)
    except UserError as fault:
        near = "" if "did you mean" in str(fault) else suggest(text, sizes.names(profile))
        raise UserError(f"`student` {text}: {fault}{near}") from None
    return StudentSize(text, found.width, found.depth, found.heads, found.mlp_ratio, found.patch_size)


def _typed(text: str) -> StudentSize:
    fields: dict[str, Any] = {}
    for part in text.split(","):
        key, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign:
            raise UserError(f"`student` {text}: {short(part)} is not NAME=NUMBER", _EXAMPLE)
        if key not in _KEYS:
            raise UserError(
                f"`student` {text}: unknown size {key!r}{suggest(key, _KEYS)}", f"known: {', '.join(_KEYS)}"
            )
        name = _KEYS[key]
        if name in fields:
            raise UserError(f"`student` {text}: {key} is given twice", "give it once")
        pattern = r"\d+(\.\d+)?" if key == "mlp" else r"\d+"
        if not re.fullmatch(pattern, value) or not float(value):
            whole = "a number" if key == "mlp" else "a whole number"
            raise UserError(f"`student` {text}: {key} {short(value)} is not {whole} above 0", _EXAMPLE)
        fields[name] = float(value) if key == "mlp" else int(value)
    return StudentSize(text, **fields)
