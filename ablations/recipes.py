"""Find what failing teachers have in common: a fact of their pre-training, or of their architecture?

Qin et al. 2026: no fact of the pre-training recipe explains which of 11 families fail; the architecture does. The unit
is a family, because its sizes share recipe and architecture and are not independent evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ablations import claims, gains
from atdiag.core.selection import choose
from atdiag.core.spec import Teacher
from atdiag.networks.registry import stored, teachers
from atdiag.study.builder import Lab
from atdiag.study.claims import Judged, Verdict
from atdiag.study.protocol import METHODS, Report, Series
from atdiag.study.registry import ablation
from atdiag.study.verdicts import outcome

if TYPE_CHECKING:
    from atdiag.stats.association import Fact, Kind, TestedFact

MILLIONS = {
    "ImageNet-1k": 1.28,
    "ImageNet-21k": 14,
    "LVD-142M": 142,
    "WIT-400M": 400,
    "LVD-1689M": 1689,
    "5.4B image-text pairs, videos": 5400,
    "WebLI": 10_000,
}
"""Sizes of the pre-training data sets, in millions of images."""
OBJECTIVES = ("supervised", "self-distillation", "masked", "contrastive", "image-text")
AUGMENTATIONS = ("multi-crop", "colour", "blur", "solarise", "RandAugment", "Mixup", "CutMix")
AFTER_THE_BLOCKS = ("attention_pool", "mean_pool")
"""Components that act after the blocks and affect no map."""

_NOTES = (
    "The unit is a family: its sizes share recipe and architecture. A family whose sizes disagree, or of which one is "
    "undecided, does not count, nor does one that fails and is by itself below the student from scratch.",
    "Each fact is tested alone against the outcomes (Fisher's exact test, two-sided; Holm over the distinct splits of "
    "the families that facts make, without those that so few families can't make clear). Combinations of facts, and "
    "facts that are not in the registry, are not tested; families are no random sample.",
    f"'Any component up to the last block' leaves out {' and '.join(AFTER_THE_BLOCKS)}, which touch no map: a choice "
    "made knowing which families the paper names.",
)


@dataclass(frozen=True)
class Unit:
    """A family, and the outcomes of its sizes."""

    name: str
    teachers: tuple[Teacher, ...]
    """Its sizes."""
    outcomes: tuple[str, ...]
    """Outcome of each: gains, fails, undecided or too weak."""

    @property
    def outcome(self) -> str:
        """Common outcome of all sizes; ``sizes disagree`` if there is none."""
        found = set(self.outcomes)
        return found.pop() if len(found) == 1 else "sizes disagree"


@ablation(
    order=110,
    reproduce={"teacher": "all"},
    quick={"teacher": "deit_s,dinov2_s,clip_b"},
)
def recipes(
    lab: Lab,
    teacher: Annotated[str, typer.Option(help="Teachers, such as deit_b,clip_b; all: every one.")] = "all",
    transfer: Annotated[str, typer.Option(help="The transfer whose outcome counts: copy or distill.")] = "copy",
) -> Series:
    """Find the facts that the failing teachers have in common.

    Facts of pre-training and of architecture are tested against the families' outcomes.
    """
    choose(transfer, METHODS, "transfer")
    study = gains.study(lab, "recipes", teacher, [transfer])
    return Series("recipes", (study,), figure="recipes", verdict=verdict, findings=findings, notes=_NOTES)


def units(reports: Sequence[Report]) -> tuple[Unit, ...]:
    """Return the teachers' families, in their order. An unregistered teacher is its own family."""
    by: dict[str, list[Report]] = {}
    for report in reports:
        by.setdefault(teachers.family(report.study.teacher.name) or report.study.teacher.label, []).append(report)
    return tuple(
        Unit(
            name,
            tuple(one.study.teacher for one in some),
            tuple(map(_outcome, some)),
        )
        for name, some in by.items()
    )


def _outcome(report: Report) -> str:
    """Return a teacher's outcome; ``too weak`` if it fails and is by itself below the baseline, which explains that."""
    found = outcome(report.rows[1].contrast_or_raise())
    return "too weak" if found == "fails" and report.weak else found


def facts(families: Sequence[Unit]) -> list[Fact]:
    """Return every binary fact by family; a fact is missing where sizes differ in it or the recipe is unknown.

    Facts of a recipe that all families share are left out: they can explain no split.
    """
    from atdiag.stats.association import Fact

    found = []
    kinds: tuple[tuple[Kind, Callable[[Teacher], dict[str, bool]], bool | None], ...] = (
        ("recipe", recipe, None),
        ("architecture", architecture, False),  # a component appears only for networks that have it; all others lack it
    )
    for kind, facts_of, otherwise in kinds:
        known = {family.name: [facts_of(one) for one in family.teachers] for family in families}
        for name in dict.fromkeys(name for several in known.values() for one in several for name in one):
            has: dict[str, bool] = {}
            for family, several in known.items():
                said = {one.get(name, otherwise) for one in several}
                if len(said) == 1 and (value := said.pop()) is not None:
                    has[family] = value
            if kind == "architecture" or len(set(has.values())) > 1:
                found.append(Fact(name, kind, has))
    return found


def recipe(teacher: Teacher) -> dict[str, bool]:
    """Return facts of a teacher's pre-training: from the registry, or as atdiag trained it; none where unknown."""
    name = teacher.name.partition("@")[0]
    here = "supervised" if teachers.is_miniature(teacher) else stored.objective(teacher)
    if here is not None:
        known = {f"objective: {word}": word == here for word in ("supervised", "masked")}
        return {"labels": here == "supervised", "masking": here == "masked", **known}
    if not teachers.is_published(name):
        return {}
    row = teachers.row(name)
    out = {
        "labels": row.labels,
        "text": row.text,
        "momentum": row.momentum,
        "masking": bool(row.masking),
        "targets of a tokenizer or network": bool(row.target),
        "targets of another network": bool(row.target) and "moving average" not in row.target,
    }
    out |= {f"objective: {word}": word in row.objective for word in OBJECTIVES}
    if (size := MILLIONS.get(row.data)) is not None:
        out |= {f"data: more than {limit} M images": size > limit for limit in (10, 100)}
    return out | {f"augmentation: {word}": word in row.augmentation for word in AUGMENTATIONS}


def architecture(teacher: Teacher) -> dict[str, bool]:
    """Return the parts of a teacher's network that the plain ViT lacks, each separately and any of them."""
    network = teacher.network
    parts = (*network.components, *network.differences)
    out = dict.fromkeys(parts, True) | {"no_class_token": not network.class_token}
    inner = any(part not in AFTER_THE_BLOCKS for part in parts)
    return out | {"any component": bool(parts), "any component up to the last block": inner}


def tested(families: Sequence[Unit]) -> list[TestedFact]:
    """Test every fact against the families' outcomes."""
    from atdiag.stats.association import against

    return against(facts(families), {family.name: family.outcome for family in families})


def findings(reports: Sequence[Report]) -> list[Judged]:
    """Judge whether a recipe fact separates failing from gaining families, and whether an architecture fact does."""
    families = units(reports)
    every = tested(families)
    seeds = min(one.rows[1].contrast_or_raise().seeds for one in reports)
    asked: tuple[tuple[Kind, str], ...] = (
        ("recipe", "no recipe fact explains the split"),
        ("architecture", "architecture explains the split"),
    )
    out = []
    for kind, name in asked:
        claim = claims.stated("recipes", name)
        of_kind = [one for one in every if one.fact.kind == kind]
        if reason := _no_split(families, of_kind):
            out.append(Judged(claim, "not testable here", "", seeds=seeds, note=reason))
        else:
            out.append(
                Judged(claim, judge_facts(of_kind, kind), _closest(of_kind), seeds=seeds, note=_limits(families))
            )
    return out


def judge_facts(found: Sequence[TestedFact], kind: Kind) -> Verdict:
    """Judge a kind of facts, if some families fail and some gain.

    A fact explains the split if it separates the two without exception and the corrected test is clear, unless a fact
    of the other kind separates them in the same way. No fact explains it if each has an exception (as outcomes are
    clear, one exception is enough) and no test is clear. Everything in between is undecided.
    """
    hints = [one for one in found if one.separates or one.clear]
    explains = any(one.separates and one.clear and all(f.kind == kind for f in one.same) for one in hints)
    if hints and not explains:
        return "undecided"
    return "holds" if explains == (kind == "architecture") else "does not hold"


def verdict(reports: Sequence[Report]) -> str:
    """Return the families' outcomes, and the facts that come closest to separating them."""
    families = units(reports)
    words = {"gains": "gain", "fails": "fail", "too weak": "too weak to teach, below the baseline by themselves"}
    counts = [
        f"{len(some)} {words.get(kind, kind)} ({', '.join(some)})" for kind, some in _sides(families).items() if some
    ]
    split = f"{len(families)} {'family' if len(families) == 1 else 'families'}: {'; '.join(counts)}."
    every = tested(families)
    said = [
        f"By {kind}, closest: {_closest(of_kind, 3)}."
        for kind in ("recipe", "architecture")
        if (of_kind := [one for one in every if one.fact.kind == kind]) and not _no_split(families, of_kind)
    ]
    return " ".join([split, *said])


def _sides(families: Sequence[Unit]) -> dict[str, list[str]]:
    kinds = ("gains", "fails", "undecided", "sizes disagree", "too weak")
    return {kind: [one.name for one in families if one.outcome == kind] for kind in kinds}


def _no_split(families: Sequence[Unit], found: Sequence[TestedFact]) -> str:
    """Explain why nothing can be concluded about a kind of facts here; empty if something can."""
    sides = _sides(families)
    reasons = [f"no family {kind}" for kind in ("fails", "gains") if not sides[kind]]
    if found and not any(one.fails[0] + one.fails[1] and one.gains[0] + one.gains[1] for one in found):
        reasons = reasons or ["the facts are not known of families on both sides"]
    if not found:
        every = [one for family in families for one in family.teachers]
        shared = "these teachers share their recipe" if any(map(recipe, every)) else "no recipe here is known"
        miniature = all(map(teachers.is_miniature, every))
        reasons = ["all miniatures share one recipe" if miniature else shared, *reasons]
    return "; ".join(reasons)


def _closest(found: Sequence[TestedFact], count: int = 1) -> str:
    """Return the facts with the smallest p-values, with their counts; facts with the same partition are merged."""
    said: list[str] = []
    seen: set[str] = set()
    for one in sorted(found, key=lambda one: (one.p, not one.separates)):
        if one.fact.name in seen or len(said) == count:
            continue
        alike = [one.fact.name, *(other.name for other in one.same)]
        seen |= set(alike)
        (a, b), (c, d) = ((len(have), len(lack)) for have, lack in (one.fails, one.gains))
        corrected = "too few to tell" if one.adjusted is None else f"Holm {one.adjusted:.2g}"
        parts = ", separates them without exception" if one.separates else ""
        said.append(
            f"{' = '.join(alike)}: {a} of {a + c} that have it fail, {b} of {b + d} that lack it "
            f"(p = {one.p:.2g}, {corrected}{parts})"
        )
    return "; ".join(said)


def _limits(families: Sequence[Unit]) -> str:
    """Describe the smallest p-value possible with so few families, and which families do not count."""
    from atdiag.stats.association import least

    sides = _sides(families)
    fails, gains_ = len(sides["fails"]), len(sides["gains"])
    best = f"{fails} of {fails + gains_} families against {gains_}: at best p = {least(fails, gains_, fails):.2g}"
    left = [f"{kind}: {', '.join(sides[kind])}" for kind in ("undecided", "sizes disagree", "too weak") if sides[kind]]
    return "; ".join([best, *left])
