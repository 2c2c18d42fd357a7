"""Test the statistical protocol: how often it calls an absent effect clear, and whether it finds a real one.

    python benchmarks/false_alarms.py --json benchmarks/results/false_alarms.json [--runs DIR]
    python benchmarks/false_alarms.py --json benchmarks/results/false_alarms_ties.json \\
        --like benchmarks/results/false_alarms.json

1. How real runs vary: contrasts of finished mini runs, trained first if they are not in DIR. Two arms are the same
   condition if they differ only in the model seeds. An arm's runs are paired by their *data* seed, as in
   every contrast: the effect of the training images on accuracy is in both arms and cancels.
2. Studies simulated to vary in the same way (``atdiag.stats.simulation``), through the shipped ``estimate``: false
   alarms, families of contrasts under Holm's correction, equivalence claimed at the very margin, and effects of known
   size with the number of seeds that ``seeds_needed`` says.
3. Real studies of two identical arms, trained with a shorter recipe so that there are many: disjoint runs, each pair
   with three data seeds of its own, so the pairs are independent given the test images. In addition, studies drawn
   from the same runs (three of the data seeds, each with its two runs in either order): more precise, but not
   independent of one another.

With ``--like`` nothing is trained: false alarms with 2, 3 and 5 seeds are simulated from the moments in that file, in
all studies and, as a diagnostic, in those whose seeds have exactly equal accuracies. A rate given a tie is not an error
rate of the protocol: it may exceed 5 % although that of all studies does not. It tells how far to trust the narrow
interval of tied seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from scipy import stats

from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.core.spec import RunSpec, Seed
from atdiag.execution import plan, run
from atdiag.stats.contrasts import Estimate, Outcomes, equivalent, estimate, holm, seeds_needed
from atdiag.stats.simulation import Moments, Population, moments, tied
from atdiag.study.builder import Lab
from atdiag.study.settings import resolve
from atdiag.training.provenance import environment

TEACHER = "deit_s"
SHORT = ("recipe.epochs=2", "data.train=1600", "data.clutter=3")
"""About as accurate as the default recipe (45 % versus 49 %) in a third of its time."""
OTHER = 1000
"""Offset that turns a model seed into another one: no experiment has as many seeds."""
SEEDS = 3
SEVERAL = (2, 3, 5)
"""Numbers of seeds whose false alarms are compared."""
POOL = 300
"""Seeds of a study of which some tie."""
SMALL = 50
"""Clusters of a small test set, of 200 images."""
SAME = "same condition"
DIFFERENCE = {"a": 1.0, "b": -1.0}
Draw = Callable[[float, int], Estimate]
"""A simulated contrast of this true size in points and with this many seeds."""


def lab(seeds: int, sets: Sequence[str] = ()) -> Lab:
    """Return a lab at profile mini without any of the user's settings."""
    return Lab(resolve("mini", seeds, sets, environment={}, folder=Path("/nonexistent")))


def reseeded(spec: RunSpec) -> RunSpec:
    """Return the same condition with the same data seed and another model seed."""
    return spec.model_copy(update={"seed": Seed(data=spec.seed.data, model=spec.seed.model + OTHER)})


def arms(seeds: int, sets: Sequence[str] = (), methods: Sequence[str] = ()) -> dict[str, list[RunSpec]]:
    """Return the student from scratch, from scratch again, and with each method."""
    here = lab(seeds, sets)
    teacher = here.teacher(TEACHER)
    student = here.student(teacher)
    scratch = list(here.baseline(teacher).specs)
    passed = {
        name: list(here.arm(name, student, teacher, transfer=here.transfer(name, student)).specs) for name in methods
    }
    return {"scratch": scratch, "again": [reseeded(spec) for spec in scratch], **passed}


def train(specs: Sequence[RunSpec], store: Store, bar: Progress, what: str) -> None:
    """Train runs to completion, two side by side on two cores."""
    task = bar.add_task(what, total=len(specs))

    def report(_: Any) -> None:
        bar.update(task, completed=len(specs) - len(plan.pending(specs, store)))

    run.execute(specs, store, ExecutionOptions(device="cpu", threads=1), report)
    report(None)


def outcomes(specs: Sequence[RunSpec], store: Store) -> Outcomes:
    """Return finished runs' outcomes by data seed."""
    correct = {}
    for spec in specs:
        with np.load(store.run(spec).predictions) as saved:
            correct[spec.seed.data] = saved["prediction"] == saved["label"]
            clusters = saved["cluster"]
    return Outcomes(correct, clusters)


# --- 1. how real runs vary -------------------------------------------------------------------------------------------


def variation(store: Store, seeds: int, bar: Progress) -> dict[str, tuple[Estimate, Moments]]:
    """Return contrasts with scratch at the default recipe, and the moments of their runs."""
    planned = arms(seeds, methods=("copy", "distill"))
    train([spec for specs in planned.values() for spec in specs], store, bar, "runs of the default recipe")
    measured = {name: outcomes(specs, store) for name, specs in planned.items()}
    named = {"again": SAME, "distill": "distill - scratch", "copy": "copy - scratch"}
    return {title: vary({"a": measured[arm], "b": measured["scratch"]}, title) for arm, title in named.items()}


def vary(pair: dict[str, Outcomes], title: str) -> tuple[Estimate, Moments]:
    """Return a contrast and its moments; between identical arms the cluster component is known to be 0."""
    found = estimate(pair, DIFFERENCE)
    if title.startswith(SAME):
        return found, moments(pair, replace(found, var_cluster=0.0))
    return found, moments(pair, found)


# --- 2. simulated studies --------------------------------------------------------------------------------------------


def simulated(found: Estimate, like: Moments, studies: int, bar: Progress, title: str) -> dict[str, Any]:
    """Measure the protocol's error rates on studies that vary like these runs."""
    population, rng = Population.like(like), np.random.default_rng(2026)
    task = bar.add_task(f"simulated: {title}", total=None)

    def draw(effect: float, seeds: int) -> Estimate:
        bar.advance(task)
        accuracies = {"a": like.accuracy + effect / 200, "b": like.accuracy - effect / 200}
        return estimate(population.study(rng, accuracies, seeds), DIFFERENCE)

    null = [draw(0, SEEDS) for _ in range(studies)]
    names = ("var_seed", "var_cluster", "var_residual")
    return {
        "moments": asdict(like),
        "population": asdict(population),
        "components_in_simulation": {name: float(np.mean([getattr(e, name) for e in null])) for name in names},
        "false_alarms": rate(e.clear for e in null),
        "p_below": {str(level): rate(e.p < level for e in null) for level in (0.01, 0.001)},
        "families": [family(population, like, size, studies // 4, rng) for size in (3, 12)],
        "equivalence": edge(draw, like, studies),
        "power": [power(draw, found, like, effect, studies // 2) for effect in (2.0, 3.0, 5.0, 8.0)],
    }


def rate(hits: Iterator[bool] | Sequence[bool]) -> dict[str, Any]:
    """Return a share in per cent with its Monte Carlo standard error."""
    found = np.fromiter(hits, bool)
    share = float(found.mean())
    return {
        "percent": 100 * share,
        "standard_error": 100 * sqrt(share * (1 - share) / len(found)),
        "studies": len(found),
    }


def family(population: Population, like: Moments, size: int, studies: int, rng: np.random.Generator) -> dict[str, Any]:
    """Measure how often any contrast is called clear among several arms that equal one baseline."""
    accuracies = dict.fromkeys(["baseline", *(f"arm {i}" for i in range(size))], like.accuracy)
    raw, adjusted, one_df = [], [], []
    for _ in range(studies):
        study = population.study(rng, accuracies, SEEDS)
        found = [estimate(study, {name: 1, "baseline": -1}) for name in list(accuracies)[1:]]
        p_values = [e.p for e in found]
        raw.append(min(p_values) < 0.05)
        adjusted.append(min(holm(p_values)) < 0.05)
        one_df.append(min(holm([float(2 * stats.t.sf(abs(e.value) / e.se, e.df)) for e in found])) < 0.05)
    return {"contrasts": size, "uncorrected": rate(raw), "holm": rate(adjusted), "holm_with_one_df": rate(one_df)}


def edge(draw: Draw, like: Moments, studies: int) -> dict[str, Any]:
    """Measure equivalence claims for arms that differ by exactly the margin (an error) and for equal arms (power)."""
    per_seed = like.var_seed + like.var_residual / like.clusters
    margin = round(5 * sqrt(per_seed / SEEDS + like.var_cluster / like.clusters), 1)
    return {
        "margin": margin,
        "claimed_at_the_margin": rate(equivalent(draw(margin, SEEDS), margin) for _ in range(studies)),
        "claimed_at_zero": rate(equivalent(draw(0, SEEDS), margin) for _ in range(studies // 2)),
    }


def power(draw: Draw, found: Estimate, like: Moments, effect: float, studies: int) -> dict[str, Any]:
    """Simulate an effect of known size, with as many seeds as should find it in four of five studies."""
    known = {name: getattr(like, name) for name in ("var_seed", "var_cluster", "var_residual")}
    seeds = seeds_needed(replace(found, value=effect, **known))
    if seeds is None or seeds > 30:
        return {"effect": effect, "seeds_needed": seeds, "found": None}
    drawn = [draw(effect, seeds) for _ in range(studies)]
    return {
        "effect": effect,
        "seeds_needed": seeds,
        "found": rate(e.clear and e.value > 0 for e in drawn),
        "covered": rate(e.low <= effect <= e.high for e in drawn),
    }


# --- 3. real studies of two identical arms ---------------------------------------------------------------------------


def real(store: Store, pairs: int, studies: int, bar: Progress) -> tuple[dict[str, Any], tuple[Estimate, Moments]]:
    """Count false alarms among real pairs of identical arms, and return the moments of such runs."""
    planned = arms(SEEDS * pairs, SHORT)
    both = [spec for pair in zip(*planned.values(), strict=True) for spec in pair]
    train(both, store, bar, "real pairs of identical arms")
    a, b = (outcomes(planned[name], store) for name in ("scratch", "again"))

    def study(data_seeds: Sequence[int], swapped: Sequence[bool]) -> Estimate:
        sides: list[dict[int, Any]] = [{}, {}]
        for seed, swap in zip(data_seeds, swapped, strict=True):
            sides[swap][seed], sides[not swap][seed] = a.correct[seed], b.correct[seed]
        return estimate({n: Outcomes(one, a.clusters) for n, one in zip("ab", sides, strict=True)}, DIFFERENCE)

    disjoint = [study(range(SEEDS * i, SEEDS * (i + 1)), [False] * SEEDS) for i in range(pairs)]
    rng, all_seeds = np.random.default_rng(2026), SEEDS * pairs
    drawn = [
        study(rng.choice(all_seeds, SEEDS, replace=False).tolist(), (rng.random(SEEDS) < 0.5).tolist())
        for _ in range(studies)
    ]
    most = int(stats.binom.ppf(0.95, pairs, 0.05))
    return {
        "settings": list(SHORT),
        "pairs": pairs,
        "runs": len(both),
        "train_seconds": round(sum(store.run(spec).result()["seconds"] for spec in both)),
        "top1": 100 * float(np.mean([y.mean() for arm in (a, b) for y in arm.correct.values()])),
        "false_alarms": sum(e.clear for e in disjoint),
        "chance_allows": {"at_most": most, "probability_of_more": float(stats.binom.sf(most, pairs, 0.05))},
        "differences": [round(e.value, 2) for e in disjoint],
        "drawn_from_the_same_runs": rate(e.clear for e in drawn),
    }, vary({"a": a, "b": b}, SAME)


# --- given a tie -----------------------------------------------------------------------------------------------------


def by_seeds(like: Moments, clusters: int, studies: int, pools: int, bar: Progress, title: str) -> list[dict[str, Any]]:
    """Count false alarms by number of seeds, in all studies and in those whose seeds tie."""
    population, rng = replace(Population.like(like), clusters=clusters), np.random.default_rng(2026)
    accuracies = dict.fromkeys("ab", like.accuracy)
    task = bar.add_task(f"ties: {title}, {clusters} clusters", total=pools + len(SEVERAL) * studies)
    given: dict[int, list[tuple[int, Estimate]]] = {seeds: [] for seeds in SEVERAL}
    for _ in range(pools):
        study = population.study(rng, accuracies, POOL)
        for seeds, found in given.items():
            chosen, sets = tied(study, seeds, rng)
            if sets:
                found.append((sets, estimate(chosen, DIFFERENCE)))
        bar.advance(task)
    out = []
    for seeds, found in given.items():
        every = []
        for _ in range(studies):
            every.append(estimate(population.study(rng, accuracies, seeds), DIFFERENCE))
            bar.advance(task)
        out.append(
            {
                "seeds": seeds,
                "images": clusters * population.per_cluster,
                "interval_excludes_zero": rate(e.p < 0.05 for e in every),
                "verdicts": rate(e.clear for e in every),
                "given_a_tie": {
                    "interval_excludes_zero": weighted([(sets, e.p < 0.05) for sets, e in found]),
                    "verdicts": weighted([(sets, e.clear) for sets, e in found]),
                    "half_width": sum(sets * (e.high - e.value) for sets, e in found) / sum(sets for sets, _ in found),
                },
            }
        )
    return out


def weighted(hits: Sequence[tuple[int, bool]]) -> dict[str, Any]:
    """Return a weighted share in per cent, and the standard error of such a ratio of sums (Cochran 1977, ch. 6)."""
    weights, hit = (np.array(column, float) for column in zip(*hits, strict=True))
    weights /= weights.sum()
    share = float(weights @ hit)
    error = sqrt(float(np.square(weights * (hit - share)).sum()))
    return {"percent": 100 * share, "standard_error": 100 * error, "studies": len(hits)}


def main() -> None:
    """Measure, print, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000, help="simulated, for each setting")
    parser.add_argument("--pairs", type=int, default=40, help="real ones, of six runs each")
    parser.add_argument("--seeds", type=int, default=8, help="of the runs whose variation is measured")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where finished runs are, and new ones go")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--like", type=Path, metavar="FILE", help="results whose moments are simulated; trains nothing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.like:
        write_ties(asked)
        return
    store = Store(asked.runs)
    with Progress(transient=True) as bar:
        found = variation(store, asked.seeds, bar)
        pairs, short = real(store, asked.pairs, asked.studies, bar)
        found[f"{SAME}, short recipe"] = short
        settings = {title: simulated(*both, asked.studies, bar, title) for title, both in found.items()}
    document = {
        "benchmark": "false_alarms",
        "machine": environment(torch.device("cpu")),
        "teacher": f"{TEACHER} (mini)",
        "seeds": SEEDS,
        "measured": {title: asdict(e) for title, (e, _) in found.items()},
        "simulated": settings,
        "real_pairs": pairs,
    }
    show(document)
    if asked.json:
        asked.json.write_text(json.dumps(document, indent=1) + "\n")


def write_ties(asked: argparse.Namespace) -> None:
    """Simulate by number of seeds and given a tie from the moments of earlier results; print, and write JSON."""
    before = {
        title: Moments(**one["moments"]) for title, one in json.loads(asked.like.read_text())["simulated"].items()
    }
    pools = asked.studies // 4
    with Progress(transient=True) as bar:
        settings = {
            title: [
                each
                for clusters in (like.clusters, SMALL)
                for each in by_seeds(like, clusters, asked.studies, pools, bar, title)
            ]
            for title, like in before.items()
        }
    document = {
        "benchmark": "false_alarms, given a tie",
        "machine": environment(torch.device("cpu")),
        "like": asked.like.name,
        "pool": POOL,
        "by_seeds": settings,
    }
    for title, found in settings.items():
        print(title)
        for each in found:
            tie = each["given_a_tie"]
            print(
                f"  {each['seeds']} seeds, {each['images']:4} images: interval excludes zero in "
                f"{said(each['interval_excludes_zero'])}, verdict in {said(each['verdicts'])}; given a tie "
                f"{said(tie['interval_excludes_zero'])} and {said(tie['verdicts'])} "
                f"(+-{tie['half_width']:.1f} points)"
            )
    if asked.json:
        asked.json.write_text(json.dumps(document, indent=1) + "\n")


def said(one: dict[str, Any]) -> str:
    """Format a rate with its standard error."""
    return f"{one['percent']:.1f} +- {one['standard_error']:.1f} %"


def show(document: dict[str, Any]) -> None:
    """Print the results as lines."""
    for title, one in document["simulated"].items():
        components = ", ".join(f"{one['moments'][n]:.3g}" for n in ("var_seed", "var_cluster", "var_residual"))
        print(f"{title} (seed, cluster, residual: {components})")
        met = 3 <= one["false_alarms"]["percent"] <= 7
        print(f"  {'met   ' if met else 'MISSED'} false alarms {said(one['false_alarms'])} (target 3 to 7)")
        for each in one["families"]:
            line = f"{said(each['holm'])} (one df {said(each['holm_with_one_df'])}, none {said(each['uncorrected'])})"
            print(f"         any of {each['contrasts']} contrasts, Holm: {line}")
        same = one["equivalence"]
        print(
            f"         equivalence within {same['margin']}: claimed of a difference of just that in "
            f"{said(same['claimed_at_the_margin'])}, of none in {said(same['claimed_at_zero'])}"
        )
        for each in one["power"]:
            start = f"         {each['effect']:g} points, {each['seeds_needed'] or 'no number of'} seeds"
            if each["found"]:
                print(f"{start}: found in {said(each['found'])}, covered in {said(each['covered'])}")
            else:
                print(f"{start}: not simulated")
    real = document["real_pairs"]
    met = real["false_alarms"] <= real["chance_allows"]["at_most"]
    print(
        f"{'met   ' if met else 'MISSED'} {real['false_alarms']} false alarms in {real['pairs']} real pairs "
        f"(at most {real['chance_allows']['at_most']}); {said(real['drawn_from_the_same_runs'])} of "
        f"{real['drawn_from_the_same_runs']['studies']} studies drawn from their runs"
    )


if __name__ == "__main__":
    main()
