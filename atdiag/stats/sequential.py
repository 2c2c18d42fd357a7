"""Several hypotheses, looked at several times: which of them may be rejected, with a stated error rate.

*Looks.* Contrasts are looked at after 5, 8 and 12 seeds, say. Their variances are estimated from few seeds, and all
looks share the test images, so that the increments between looks are not independent with a known variance, which
spending functions (Lan & DeMets 1983) need. Bonferroni's inequality over looks needs nothing: at look k every
hypothesis is tested anew at level a_k, with sum a_k <= alpha, and what is rejected at any look is rejected.

*Hypotheses.* At each look they share its level by a graph (Bretz, Maurer, Brannath & Posch 2009): node i has the share
w_i, and tests at w_i * a_k; when it is rejected, its share goes to other nodes along weighted edges g_ij, and the graph
is updated:

    w_l  <- w_l + w_i g_il,      g_lm <- (g_lm + g_li g_im) / (1 - g_li g_il)      (l != m, and g_li g_il < 1, else 0)

This controls the chance of any false rejection at a_k, for any dependence between p-values. Holm's method is the graph
in which all nodes begin with equal shares and pass theirs on equally. A node that begins with nothing is tested only
once another has passed its share on: so single components are asked about only after the architecture was accused.

Sources: Bretz, Maurer, Brannath & Posch, Stat. Med. 28 (2009). Holm, Scand. J. Stat. 6 (1979). Lan & DeMets, Biometrika
70 (1983).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isclose

from atdiag.core.text import count


@dataclass(frozen=True)
class Graph:
    """Hypotheses with their shares of a level, and where a share goes when one is rejected.

    Raises ValueError for shares or edges that are negative or add up to more than 1, and for unknown names.
    """

    shares: Mapping[str, float]
    """Name -> its share of the level at the start; 0: tested only once it has been given one."""
    edges: Mapping[str, Mapping[str, float]]
    """Name -> the names that its share goes to, with the part that each is given."""

    def __post_init__(self) -> None:
        if unknown := ({*self.edges} | {to for out in self.edges.values() for to in out}) - {*self.shares}:
            raise ValueError(f"no hypothesis is named {', '.join(sorted(unknown))}")
        if any(name in out for name, out in self.edges.items()):
            raise ValueError("a hypothesis can't pass its share to itself")
        for what, values in (("shares", self.shares), *((f"edges of {name}", out) for name, out in self.edges.items())):
            if any(value < 0 for value in values.values()) or sum(values.values()) > 1 + 1e-9:
                raise ValueError(f"{what} must be at least 0, and add up to at most 1: {dict(values)}")

    @staticmethod
    def holm(names: Sequence[str]) -> Graph:
        """Return the graph of Holm's method: equal shares, passed on equally."""
        others = len(names) - 1
        return Graph(
            {name: 1 / len(names) for name in names},
            {name: {to: 1 / others for to in names if to != name} for name in names} if others else {},
        )

    def rejected(self, p_values: Mapping[str, float], level: float) -> tuple[str, ...]:
        """Return the rejected hypotheses, in the order of rejection (the order does not change which they are).

        p_values: of hypotheses of the graph; one without a p-value is never rejected. Raises ValueError for others.
        """
        if unknown := {*p_values} - {*self.shares}:
            raise ValueError(f"no hypothesis is named {', '.join(sorted(unknown))}")
        shares = dict(self.shares)
        edges = {name: dict(self.edges.get(name, {})) for name in shares}
        out: list[str] = []
        while True:
            passing = [name for name in shares if name in p_values and p_values[name] <= shares[name] * level]
            passing = [name for name in passing if shares[name] > 0]
            if not passing:
                return tuple(out)
            name = min(passing, key=lambda one: (p_values[one] / shares[one], one))
            out.append(name)
            _pass_on(name, shares, edges)


def _pass_on(name: str, shares: dict[str, float], edges: dict[str, dict[str, float]]) -> None:
    """Take a rejected hypothesis out of the graph."""
    share, away = shares.pop(name), edges.pop(name)
    for to, part in away.items():
        shares[to] += share * part
    for one, out in edges.items():
        back = out.pop(name, 0.0)
        if not back:
            continue
        left = 1 - back * away.get(one, 0.0)
        for to in shares:
            if to != one:
                through = out.get(to, 0.0) + back * away.get(to, 0.0)
                out[to] = 0.0 if isclose(left, 0) else through / left


@dataclass(frozen=True)
class Look:
    """A planned look at the results."""

    seeds: int
    """Seeds of every arm by then."""
    level: float
    """Level of all hypotheses together at this look."""


SEEDS = (5, 8, 12)
"""Seeds of every arm at the planned looks."""
LEVELS = (0.010, 0.015, 0.025)
"""Their levels, which add up to 5 %. Later looks have more, for they are the ones that most effects need."""


def looks(seeds: Sequence[int] = SEEDS, alpha: float = 0.05) -> tuple[Look, ...]:
    """Return planned looks after these numbers of seeds, which share ``alpha`` in the proportions of :data:`LEVELS`.

    With fewer looks than three the first ones are taken. Raises ValueError for numbers that do not increase, and for
    more than three.

    >>> [(look.seeds, round(look.level, 3)) for look in looks()]
    [(5, 0.01), (8, 0.015), (12, 0.025)]
    >>> [(look.seeds, round(look.level, 3)) for look in looks([4, 6])]
    [(4, 0.02), (6, 0.03)]
    """
    if not seeds or list(seeds) != sorted({*seeds}) or seeds[0] < 1:
        raise ValueError(f"looks come after more and more seeds, not {list(seeds)}")
    if len(seeds) > len(LEVELS):
        raise ValueError(f"at most {count(len(LEVELS), 'look')}, not {len(seeds)}")
    parts = LEVELS[: len(seeds)]
    return tuple(Look(n, alpha * part / sum(parts)) for n, part in zip(seeds, parts, strict=True))
