"""Can the gain of a transfer be predicted from the teacher and the budget, without training?

    python -m benchmarks.prediction --runs DIR --json benchmarks/results/prediction.json [--budget MINUTES]
    python -m benchmarks.prediction --from benchmarks/results/prediction.json [--figure docs/why-prediction.png]

Teachers, measurements, model, validation and rule are those of the plan in ``docs/why.md``, committed before any model
was fitted. What is missing in DIR is trained (``--budget`` stops in time; the same line goes on). The JSON holds the
data: ``--from`` validates again without runs, and with ``--simulate 200`` says how often the rule ships a model of
simulated gains.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from atdiag.core.runs import Store
from atdiag.networks.registry.specimens import specimens
from atdiag.stats.prediction import (
    Between,
    Floats,
    held_out,
    left_out,
    rank_correlation,
    resampled,
    ridge,
    sign_agreement,
)
from atdiag.training.provenance import environment
from benchmarks.prediction_data import (
    BUDGETS,
    FEWEST_KINDS,
    OF_MAPS,
    TEACHERS,
    TRANSFERS,
    Cell,
    cell,
    entering,
    measured,
    train,
)
from figures import style

MODELS = {
    "model": ("lead", *OF_MAPS, "images", "baseline"),
    "accuracy alone": ("lead", "images", "baseline"),
}
ALWAYS = "always transfers"
SCHEMES = ("kind", "teacher")
LEVEL = 0.975
"""Of the intervals that decide: two transfers have a chance each."""


# --- model and validation ------------------------------------------------------------------------------------------


def table(cells: Sequence[Cell], of: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> Floats:
    """Return what a model sees of cells, [n, p]; of: teacher -> its measurements."""
    rows = [
        {
            **of[one.teacher],
            "lead": one.accuracy - one.baseline,
            "images": float(np.log10(one.train * one.epochs)),
            "baseline": one.baseline,
        }
        for one in cells
    ]
    return np.array([[row[name] for name in names] for row in rows])


def predictions(cells: Sequence[Cell], of: Mapping[str, Mapping[str, float]], y: Floats, by: str) -> dict[str, Floats]:
    """Return the predictions of each model for cells whose kind, or teacher, it did not see."""
    kinds = [one.kind for one in cells]
    groups = kinds if by == "kind" else [one.teacher for one in cells]
    out = {name: held_out(table(cells, of, columns), y, groups, kinds) for name, columns in MODELS.items()}
    return out | {ALWAYS: np.ones(len(cells))}


def levels(cells: Sequence[Cell], y: Floats, by: str) -> Floats:
    """Return the mean outcome of the cells that each cell's models were fitted to."""
    out = np.full(len(y), np.nan)
    for kept, left in left_out([one.kind if by == "kind" else one.teacher for one in cells]):
        out[left] = y[kept].mean()
    return out


def figures(
    cells: Sequence[Cell],
    predicted: Mapping[str, Floats],
    y: Floats,
    known: NDArray[np.bool_],
    resamples: int = 10_000,
    level: float = LEVEL,
) -> dict[str, dict[str, Between]]:
    """Return rank correlation and sign agreement of each model, and the model's advantages over both baselines."""
    strata = np.array([f"{one.train} x {one.epochs}" for one in cells])
    names = list(predicted)

    def both(chosen: NDArray[np.int64]) -> list[float]:
        ranks = [rank_correlation(predicted[name][chosen], y[chosen], strata[chosen].tolist()) for name in names]
        signs = [sign_agreement(predicted[name][chosen], y[chosen], known[chosen]) for name in names]
        return [*ranks, *signs, *(own[0] - other for own in (ranks, signs) for other in own[1:])]

    kinds = [one.kind for one in cells]
    found = resampled(both, kinds, np.random.default_rng(0), level, resamples)
    n = len(names)
    return {
        "rank correlation": dict(zip(names, found[:n], strict=True)),
        "sign agreement": dict(zip(names, found[n : 2 * n], strict=True)),
        "advantage in rank correlation": dict(zip(names[1:], found[2 * n :], strict=False)),
        "advantage in sign agreement": dict(zip(names[1:], found[3 * n - 1 :], strict=True)),
    }


def ships(of_kinds: Mapping[str, Mapping[str, Between]]) -> bool:
    """Return whether the rule is met: with kinds left out, the lower limits of all four advantages are above zero."""
    return all(
        one.low > 0 for name, found in of_kinds.items() if name.startswith("advantage") for one in found.values()
    )


def validation(cells: Sequence[Cell], of: Mapping[str, Mapping[str, float]], resamples: int) -> dict[str, Any]:
    """Return all that is said of one transfer."""
    y = np.array([one.gain for one in cells])
    known = np.array([one.low > 0 or one.high < 0 for one in cells])
    odds = np.array([one.log_odds for one in cells])
    odds_known = np.array([one.log_odds_low > 0 or one.log_odds_high < 0 for one in cells])
    by = {scheme: predictions(cells, of, y, scheme) for scheme in SCHEMES}
    judged = {scheme: figures(cells, predicted, y, known, resamples) for scheme, predicted in by.items()}
    of_odds = figures(cells, predictions(cells, of, odds, "kind"), odds, odds_known, resamples)
    level = {scheme: levels(cells, y, scheme) for scheme in SCHEMES}
    centred = {s: figures(cells, _centred(by[s], level[s]), y, known, resamples) for s in SCHEMES}
    fitted = ridge(table(cells, of, MODELS["model"]), y, [one.kind for one in cells])
    return {
        "ships": ships(judged["kind"]),
        "teachers": len({one.teacher for one in cells}),
        "kinds": len({one.kind for one in cells}),
        "cells": len(cells),
        "known signs": int(known.sum()),
        "gains among them": int((known & (y > 0)).sum()),
        "left out": {scheme: _plain(found) for scheme, found in judged.items()},
        "log-odds, kinds left out": _plain(of_odds),
        "mean squared error": {
            scheme: {
                "training mean": round(float(np.square(level[scheme] - y).mean()), 3),
                **{name: round(float(np.square(by[scheme][name] - y).mean()), 3) for name in MODELS},
            }
            for scheme in SCHEMES
        },
        # Not in the plan: folds differ in their mean, which runs against the outcome that was left out.
        "post hoc, training mean taken away": {
            scheme: _plain({name: rows for name, rows in found.items() if "rank" in name})
            for scheme, found in centred.items()
        },
        "penalty": fitted.penalty,
        "weights": dict(zip(MODELS["model"], fitted.weights.round(3).tolist(), strict=True)),
        "predicted": [
            {
                "teacher": one.teacher,
                "train": one.train,
                "epochs": one.epochs,
                **{f"{name}, {scheme}": round(float(by[scheme][name][i]), 3) for scheme in SCHEMES for name in MODELS},
            }
            for i, one in enumerate(cells)
        ],
    }


def _centred(predicted: Mapping[str, Floats], level: Floats) -> dict[str, Floats]:
    return {name: values if name == ALWAYS else values - level for name, values in predicted.items()}


def _plain(found: Mapping[str, Mapping[str, Between]]) -> dict[str, dict[str, list[float]]]:
    return {
        what: {name: [round(value, 3) for value in (one.value, one.low, one.high)] for name, one in of.items()}
        for what, of in found.items()
    }


def simulated(
    cells: Sequence[Cell], of: Mapping[str, Mapping[str, float]], strength: float, generator: np.random.Generator
) -> list[Cell]:
    """Return cells with other gains: of the lead and the budget, of a kind and a teacher by chance, and noise.

    strength: what a teacher's measured maps add, as a multiple of what chance adds; 0: measurements beside the lead
    tell nothing. Teachers, budgets, measurements and standard errors stay.
    """
    x = table(cells, of, MODELS["model"])
    x = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    lead, maps, rest = x[:, 0], x[:, 1 : 1 + len(OF_MAPS)], x[:, 1 + len(OF_MAPS) :]
    signal = maps @ generator.normal(size=maps.shape[1])
    kinds = {name: generator.normal() for name in dict.fromkeys(one.kind for one in cells)}
    teachers = {name: generator.normal() for name in dict.fromkeys(one.teacher for one in cells)}
    out = []
    for i, one in enumerate(cells):
        chance = 10 * kinds[one.kind] + 5 * teachers[one.teacher] + generator.normal(scale=one.se)
        gain = 3 + 5 * lead[i] + 2 * rest[i].sum() + strength * 10 * signal[i] / max(signal.std(), 1e-12) + chance
        half = (one.high - one.low) / 2
        out.append(replace(one, gain=gain, low=gain - half, high=gain + half))
    return out


def shipped(cells: Sequence[Cell], of: Mapping[str, Mapping[str, float]], resamples: int = 10_000) -> bool:
    """Return whether a model of these cells would be shipped."""
    y = np.array([one.gain for one in cells])
    known = np.array([one.low > 0 or one.high < 0 for one in cells])
    return ships(figures(cells, predictions(cells, of, y, "kind"), y, known, resamples))


# --- the file ------------------------------------------------------------------------------------------------------


def document(
    cells: Sequence[Cell], of: Mapping[str, Mapping[str, float]], machine: Any, resamples: int
) -> dict[str, Any]:
    """Return all that is written."""
    own = {name: entering([one for one in cells if one.transfer == name]) for name in TRANSFERS}
    return {
        "benchmark": "prediction",
        "machine": machine,
        "missing": len(TEACHERS) * len(TRANSFERS) * len(BUDGETS) - len(cells),
        "validation": {name: validation(some, of, resamples) for name, some in own.items() if some},
        "measurements": of,
        "cells": [asdict(one) for one in cells],
    }


def show(content: Mapping[str, Any]) -> None:
    """Print the validation."""
    for transfer, found in content["validation"].items():
        counts = ", ".join(f"{found[what]} {what}" for what in ("cells", "teachers", "kinds"))
        signs = f"{found['known signs']} signs known ({found['gains among them']} gains)"
        print(f"{transfer}: {counts}, {signs}; {'ships' if found['ships'] else 'is not shipped'}")
        every = {
            **{f"{scheme} left out": rows for scheme, rows in found["left out"].items()},
            "kind, log-odds": found["log-odds, kinds left out"],
            "kind, post hoc": found["post hoc, training mean taken away"]["kind"],
        }
        for scheme, rows in every.items():
            for what, models in rows.items():
                for name, (value, low, high) in models.items():
                    print(f"  {scheme:20}{what:32}{name:18}{value:+.2f} [{low:+.2f}, {high:+.2f}]")


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, measure, validate, print, and write JSON and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="nothing there is trained twice")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="stop training in time; the same line goes on")
    parser.add_argument("--only-train", action="store_true", help="train, and read no outcome")
    parser.add_argument("--from", dest="data", type=Path, metavar="FILE", help="validate a file's data, without runs")
    parser.add_argument("--simulate", type=int, metavar="N", help="how often the rule ships a model in N simulations")
    parser.add_argument("--resamples", type=int, default=10_000, help="of kinds, for the intervals")
    parser.add_argument("--figure", type=Path, metavar="FILE")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    if given.data is not None and not given.data.is_file():
        parser.error(f"--from {given.data}: there is no such file")
    if given.data is not None:
        content = json.loads(given.data.read_text())
        cells, of, machine = [Cell(**one) for one in content["cells"]], content["measurements"], content["machine"]
    else:
        store = Store(given.runs)
        until = time.monotonic() + 60 * given.budget if given.budget is not None else float("inf")
        done = train(store, until)
        if given.only_train:
            print("all is trained" if done else "out of time")
            return
        found = [cell(*one, store) for one in product(TEACHERS, TRANSFERS, BUDGETS)]
        cells = [one for one in found if one is not None]
        of = {name: measured(name) for name in dict.fromkeys(one.teacher for one in cells)}
        machine = environment(torch.device("cpu"))
    if given.simulate:
        simulate(cells, of, given.simulate, given.resamples)
        return
    content = document(cells, of, machine, given.resamples)
    show(content)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(content, indent=1) + "\n")
    if given.figure and not content["validation"]:
        raise SystemExit(f"no figure: of no budget are teachers of {FEWEST_KINDS} kinds finished")
    if given.figure:
        draw(content).savefig(given.figure)


@style.drawn
def draw(content: Mapping[str, Any]) -> Figure:
    """Draw measured against predicted gains, kinds left out: a point for each teacher and budget."""
    figure, panels = style.panels(1, len(content["validation"]), 3.2, style.PAGE)
    every: list[Cell] = []
    for axes, (transfer, found) in zip(panels, content["validation"].items(), strict=True):
        cells = entering([Cell(**one) for one in content["cells"] if one["transfer"] == transfer])
        every += cells
        points = [one["model, kind"] for one in found["predicted"]]
        limits = [*points, *(value for one in cells for value in (one.low, one.high))]
        low, high = min(limits) - 2, max(limits) + 2
        axes.axhline(0, color=style.INK, lw=0.8, zorder=1)
        axes.axvline(0, color=style.INK, lw=0.8, zorder=1)
        axes.plot((low, high), (low, high), color=style.GREY, lw=0.6, ls=":")
        for x, one in zip(points, cells, strict=True):
            colour, shape, fill = _look(one)
            axes.plot([x, x], [one.low, one.high], color=colour, lw=0.6, alpha=0.5)
            axes.plot(x, one.gain, shape, color=colour, ms=3.5, mfc=fill)
        _name(axes, points, cells, high - 0.22 * (high - low), 0.037 * (high - low))
        axes.set(aspect="equal", title=transfer, xlabel="predicted gain, points", ylabel="measured gain, points")
        ticks = [tick for tick in axes.get_yticks() if low < tick < high]
        axes.set(xticks=ticks, yticks=ticks, xlim=(low, high), ylim=(low, high))
    order = sorted(every, key=lambda one: (one.teacher in specimens(), one.budget))
    looks = {_label(one): _look(one) for one in order}
    keys = [Line2D([], [], marker=m, color=c, mfc=f, ls="", ms=3.5, label=label) for label, (c, m, f) in looks.items()]
    note = "each kind of teacher predicted by a model that saw none of it; bars: 95 % intervals of the measured gain"
    style.finish(figure, "Predicted and measured gain of a transfer (mini)", keys, note)
    return figure


def _name(axes: Axes, points: Sequence[float], cells: Sequence[Cell], column: float, apart: float) -> None:
    """Write each point's teacher in a column, none over another."""
    below = float("inf")
    for i in sorted(range(len(cells)), key=lambda i: -cells[i].gain):
        below = min(cells[i].gain, below - apart)
        line = {"arrowstyle": "-", "lw": 0.3, "color": style.GREY, "shrinkA": 0, "shrinkB": 2}
        at = points[i], cells[i].gain
        written = axes.annotate(cells[i].teacher, at, (column, below), fontsize=5.5, va="center", arrowprops=line)
        written.set_in_layout(False)  # many names may run out below; the axes keep their size


def _look(one: Cell) -> tuple[str, str, str]:
    """Return colour, marker and fill of a cell's point."""
    colour = style.VERMILLION if one.teacher in specimens() else style.BLUE
    return (colour, "s", colour) if one.budget == BUDGETS[-1] else (colour, "o", "none")


def _label(one: Cell) -> str:
    kind = "specimen" if one.teacher in specimens() else "healthy teacher"
    return f"{kind}, {one.train:,} images x {one.epochs} epochs"


def simulate(cells: Sequence[Cell], of: Mapping[str, Mapping[str, float]], times: int, resamples: int) -> None:
    """Print how often the rule ships a model where the measurements tell nothing, and where they tell most."""
    for transfer, strength in product(TRANSFERS, (0.0, 3.0)):
        own = entering([one for one in cells if one.transfer == transfer])
        generator = np.random.default_rng(1)
        count = sum(shipped(simulated(own, of, strength, generator), of, resamples) for _ in range(times))
        print(f"{transfer}: strength {strength:g}: shipped in {count} of {times}", flush=True)


if __name__ == "__main__":
    main()
