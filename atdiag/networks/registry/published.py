"""The table of published teachers (``teachers.toml``), one entry per teacher."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

TIMM = "timm:"


@dataclass(frozen=True, kw_only=True)
class TeacherEntry:
    """A registered teacher. For a user's own, the facts about the network are None until it is built."""

    name: str
    family: str
    size: str
    title: str
    licence: str
    objective: str
    data: str
    paper2026: bool = False
    """Whether the 2026 paper is known to include the family (otherwise our choice)."""
    model: str
    """timm's name of the architecture."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Constructor arguments that differ from timm's defaults."""
    hub: str | None = None
    """The hub repository with its weights."""
    url: str | None = None
    """URL of the authors' checkpoint, if the hub has none."""
    file: Path | None = None
    """The file that a user's teacher was registered with."""
    formats: tuple[str, ...] | None = None
    """Accepted key layouts of its file; None: any."""
    image_size: int | None = None
    """Resolution of pre-training (or of the last fine-tuning), in pixels."""
    patch: int | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    classes: int | None = None
    """Rows of its head; 0 without a head."""
    class_token: bool = True
    registers: int = 0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str = "bicubic"
    components: tuple[str, ...] | None = None
    """Native components."""
    follows: tuple[str, ...] = ()
    """Non-standard parts that the standard student shares, because tokens must line up."""
    labels: bool = False
    text: bool = False
    momentum: bool = False
    masking: str = ""
    target: str = ""
    augmentation: str = ""

    @property
    def tokens(self) -> int | None:
        """Length of the token sequence at the native resolution."""
        if self.image_size is None or self.patch is None:
            return None
        return (self.image_size // self.patch) ** 2 + int(self.class_token) + self.registers

    @property
    def weights(self) -> str:
        """Source of its weights: ``timm:MODEL``, a URL or a file."""
        return str(self.file or self.url or f"{TIMM}{self.model}")


@cache
def table() -> dict[str, Any]:
    """Return the contents of the table as it is written."""
    return tomllib.loads((Path(__file__).parent / "teachers.toml").read_text())


@cache
def published() -> dict[str, TeacherEntry]:
    """Return the published teachers by name."""
    facts_of, rows = table(), {}
    for family, facts in facts_of["family"].items():
        shared = {key: value for key, value in facts.items() if key not in ("teacher", "pixels", "timm_names")}
        formats = (*facts.get("formats", ()), *(["timm"] if facts.get("timm_names", True) else []))
        for size, own in facts["teacher"].items():
            merged: dict[str, Any] = {
                **shared,
                **facts_of["size"][size],
                **facts_of["pixels"][facts["pixels"]],
                "classes": 0,
                **({} if "url" in own else {"hub": f"timm/{own['model']}"}),
                **own,
                "formats": formats,
            }
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in merged.items()}
            token = "no_class_token" not in values.get("follows", ())
            name = f"{family}_{size}"
            rows[name] = TeacherEntry(name=name, family=family, size=size, class_token=token, **values)
    return rows
