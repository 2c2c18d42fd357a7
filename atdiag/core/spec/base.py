"""Base of all spec models: frozen, strict, canonicalised, then checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1), AfterValidator(abs)]
"""A share from 0 to 1. ``abs`` turns -0.0 into 0.0."""
BelowOne = Annotated[float, Field(ge=0, lt=1), AfterValidator(abs)]
NonNegative = Annotated[float, Field(ge=0), AfterValidator(abs)]


def sorted_set(values: Iterable[Any]) -> tuple[Any, ...]:
    """Sort values and drop duplicates: the canonical form of a field that is a set."""
    return tuple(sorted(set(values)))


class Spec(BaseModel):
    """Base of all models: frozen, strict about unknown fields, finite numbers only.

    Construction has two steps. :meth:`canonical` returns the fields to change so that equal conditions have equal
    specs; :meth:`check` then validates the result and changes nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def canonical(self) -> dict[str, Any]:
        """Return the fields whose canonical value differs from the given one."""
        return {}

    def check(self) -> None:
        """Raise ValueError if fields of the canonical form contradict each other."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for name, value in self.canonical().items():
            object.__setattr__(self, name, value)
        self.check()
        return self
