"""What passes, as a user says it: ``transfer.layers=top:6``, ``transfer.heads=0,3``, ``transfer.tensor=q``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from atdiag.spec import NonNegative, Spec, Transfer, TransferMethod
from atdiag.words import UserError, suggest

_ENDS = {"bottom": "first", "first": "first", "top": "last", "last": "last"}


class Form(Spec):
    """The settings under ``transfer.``: the form that every transfer of an experiment has unless the experiment itself
    varies it. Fields as in :class:`atdiag.spec.Transfer`."""

    weight: NonNegative | None = None
    """Factor of the transfer loss; None: 3.0 of maps, as in the 2024 paper's code, and 1.0 of logits and features."""
    loss: Literal["ce", "kl", "mse", "jsd", "l1", "logits_mse"] | None = None
    reduce: Literal["sum", "mean"] = "sum"
    tensor: Literal["map", "q", "k", "v"] = "map"
    average: Literal["examples", "queries", "heads", "layers"] | None = None
    layers: str | int | tuple[int, ...] | None = None
    heads: str | int | tuple[int, ...] | None = None
    temperature: float | None = None

    def transfer(
        self, method: TransferMethod, depth: int, heads: int, layers: tuple[int, ...] | None = None
    ) -> Transfer:
        """The transfer of a method in this form.

        layers: the blocks, where the experiment itself chooses them. Fields that a method does not have are left out:
        whether a user's setting changes anything is for the command to check. Raises UserError for blocks or heads that
        are not there.
        """
        if layers is None:
            layers = indices(self.layers, depth, "transfer.layers")
        chosen = None if self.heads is None else indices(self.heads, heads, "transfer.heads")
        if method == "none":
            return Transfer()
        if method == "logits":
            return Transfer(method=method, weight=self.weight, temperature=self.temperature)
        if method == "features":
            return Transfer(method=method, layers=layers, weight=self.weight, reduce=self.reduce)
        attention = {"layers": layers, "heads": chosen, "tensor": self.tensor, "average": self.average}
        if method == "copy":
            return Transfer(method=method, **attention)
        return Transfer(method=method, **attention, weight=self.weight, loss=self.loss, reduce=self.reduce)


def indices(text: str | int | tuple[int, ...] | None, count: int, name: str) -> tuple[int, ...]:
    """``3,5,7-9``, ``top:6``, ``bottom:6`` (also ``last:6``, ``first:6``) or None (all) -> indices below ``count``.

    Raises UserError that says what was wrong with it.

    >>> indices("0,3-5", 12, "transfer.layers"), indices("top:2", 12, "transfer.layers")
    ((0, 3, 4, 5), (10, 11))
    """
    if text is None:
        return tuple(range(count))
    text = ",".join(map(str, text)) if isinstance(text, tuple) else str(text)
    ends = ("first:2", "last:2") if name.endswith("heads") else ("top:6", "bottom:6")
    hint = f"write it as '3,5,7-9', '{ends[0]}' or '{ends[1]}'"
    if end := re.fullmatch(r"\s*([a-z]+)\s*:\s*(\d+)\s*", text):
        word, number = end[1], int(end[2])
        if word not in _ENDS:
            raise UserError(f"{name}={text}: unknown word {word!r}{suggest(word, _ENDS)}", hint)
        if not 1 <= number <= count:
            raise UserError(f"{name}={text}: there are {count}", f"give a number from 1 to {count}")
        return tuple(range(number) if _ENDS[word] == "first" else range(count - number, count))
    found: set[int] = set()
    for part in text.split(","):
        if not (match := re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)):
            raise UserError(f"{name}={text}: {part.strip()!r} is neither a number nor a range", hint)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"{name}={text}: the range {part.strip()} runs backwards", f"write it as '{last}-{first}'")
        if last >= count:
            raise UserError(f"{name}={text}: {last} is out of range", f"they are counted from 0 to {count - 1}")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def ranges(indices: Iterable[int]) -> str:
    """Indices as :func:`indices` reads them; those that follow one another are a range.

    >>> ranges((0, 1, 2, 5, 7, 8))
    '0-2,5,7-8'
    """
    out: list[tuple[int, int]] = []
    for index in indices:
        if out and out[-1][1] == index - 1:
            out[-1] = out[-1][0], index
        else:
            out.append((index, index))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in out)
