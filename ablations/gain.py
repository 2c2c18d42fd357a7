"""What LayerScale may be to a student under given maps: a gain of its attention branch, a gate, or a slow beginning.

A student with LayerScale differs from the standard one in three ways at once: its branches are small, each channel's
size is learned, and all of them are small at first. Each variant here has one of these:

- ``gain G``: a frozen factor on the attention branch; the MLP branch is as in the standard student;
- ``teacher's gains``: the same, block by block as large as the teacher's branch is beside its stream;
- ``learned from G``: a factor per channel on the attention branch, which starts at G and is trained;
- ``warm-up``: the branch grows from 0 to 1 over the first tenth of the training, and is then the standard student's;
- ``LayerScale on the MLP``: a learned factor per channel on the MLP branch, which starts where the teacher's would;
- ``LayerScale``: learned factors on both branches, as teachers have them.

If a frozen gain changes what transfer gives as LayerScale does, it is the branch's size that matters; if only a learned
factor does, it is gating; if the warm-up does, it is the beginning of the training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from atdiag.core.errors import UserError
from atdiag.core.selection import comma_separated
from atdiag.core.spec import Network, Teacher
from atdiag.study.builder import Lab
from atdiag.study.protocol import BASELINE, Arm, Contrast, Report, Study
from atdiag.study.registry import ablation
from atdiag.study.verdicts import agree, effect, no_verdict, odds, verb_phrase

WARMUP = 0.1
"""Share of the training over which the branch grows."""
IMAGES = 64
"""Images that the teacher's gains are measured on."""


@dataclass(frozen=True)
class Variant:
    """A student that differs from the standard one in the gain of its branches, and the lab that trains it."""

    name: str
    lab: Lab
    network: Network


@ablation(order=150, reproduce={}, papers=())
def gain(
    lab: Lab,
    teacher: Annotated[str, typer.Option(help="Teachers, such as dinov2_s.")] = "dinov2_s",
    gains: Annotated[
        str, typer.Option("--gains", help="Factors of the attention branch, such as 0.1,0.3.")
    ] = "0.1,0.3",
    transfer: Annotated[str, typer.Option(help="The transfer: copy or distill.")] = "copy",
) -> Study:
    """Take LayerScale apart: which part changes the transfer?"""
    factors = [_gain(text) for text in comma_separated(gains, "gains", "0.1,0.3")]  # before the teacher is measured
    source = lab.teacher(teacher)
    standard = lab.student(source)
    passed = lab.transfer(transfer, standard)
    plain = f"standard + {transfer}"
    own = _of_teacher(source, lab)
    variants = _variants(lab, source, standard, own, factors)

    def both(one: Variant) -> tuple[Arm, Arm]:
        alone = one.lab.arm(f"{one.name}, scratch", one.network)
        return alone, one.lab.arm(f"{one.name} + {transfer}", one.network, source, transfer=passed)

    def contrasts(one: Variant) -> tuple[Contrast, ...]:
        weights = {f"{one.name} + {transfer}": 1, f"{one.name}, scratch": -1, plain: -1, BASELINE: 1}
        name = changed(one.name)
        return Contrast(name, weights), Contrast(odds(name), weights, "log-odds")

    def verdict(report: Report) -> str:
        whole = verb_phrase(report.row(plain).contrast_or_raise(), "helps", "hurts")
        told = "; ".join(_said(report, one.name) for one in variants)
        return (
            f"{transfer.capitalize()} from {source.label} into a standard student {whole}. What a variant changes of "
            f"that (a difference of differences): {told}."
        )

    return Study(
        ablation="gain",
        teacher=source,
        options={"transfer": transfer, "gains": gains},
        arms=(
            lab.baseline(source),
            lab.arm(plain, standard, source, transfer=passed),
            *(arm for one in variants for arm in both(one)),
        ),
        contrasts=tuple(contrast for one in variants for contrast in contrasts(one)),
        verdict=verdict,
        figure="gain",
        together="gain",
        reference=lab.reference(source),
        notes=_notes(source, own),
    )


def changed(name: str) -> str:
    """Return the name of the contrast of interest of a variant."""
    return f"{name} changes the gain"


def _gain(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 10:
        raise UserError(f"`gains` {text!r} is no factor above 0 and up to 10", "give factors such as 0.1,0.3")
    return value


def _variants(
    lab: Lab, source: Teacher, standard: Network, own: tuple[float, ...] | None, gains: list[float]
) -> list[Variant]:
    out = [Variant(f"gain {value:g}", lab, _scaled(standard, value, frozen=True)) for value in gains]
    if own is not None:
        out.append(Variant("teacher's gains", lab, _scaled(standard, 1.0, frozen=True, blocks=own)))
    lowest = min(gains)
    out.append(Variant(f"learned from {lowest:g}", lab, _scaled(standard, lowest)))
    out.append(Variant("warm-up", lab.under("recipe.branch_warmup", WARMUP), standard))
    if "layer_scale" in source.network.components:
        whole = lab.student(source, ["layer_scale"])
        out.append(Variant("LayerScale on the MLP", lab, _scaled(standard, whole.layer_scale_init, branch="mlp")))
        out.append(Variant("LayerScale", lab, whole))
    return out


def _scaled(
    network: Network, value: float | None, frozen: bool = False, blocks: tuple[float, ...] = (), branch: str = "attn"
) -> Network:
    """Return a network with LayerScale on one branch alone: `attn` or `mlp`."""
    values: dict[str, bool | float | str] = {"layer_scale.branch": branch}
    if frozen:
        values["layer_scale.frozen"] = True
    values |= {f"layer_scale.block_{block}": gain for block, gain in enumerate(blocks)}
    changed = {"components": (*network.components, "layer_scale"), "layer_scale_init": value, "values": values}
    return Network.model_validate({**network.model_dump(), **changed})


def _of_teacher(source: Teacher, lab: Lab) -> tuple[float, ...] | None:
    """Return the teacher's gain of each block, to two digits; None without its weights, or where it has other blocks.

    The mean over images and tokens of ||branch|| / ||stream||, the branch after LayerScale.
    """
    if source.sha256 is None or lab.settings.student is not None:
        return None
    from atdiag.analysis import images, subjects
    from atdiag.hooks.branches import branch_gains

    data = lab.settings.profile.data
    subject = subjects.loaded(source, data)
    found = branch_gains(subject, images.choose(IMAGES, data, subject.network))
    return tuple(float(f"{value:.2g}") for value in found)


def _notes(source: Teacher, own: tuple[float, ...] | None) -> tuple[str, str]:
    what = "Gains are of the attention branch; warm-up: over the first tenth of the training."
    if own is None:
        why = "its weights are not here" if source.sha256 is None else "the students are of another size"
        return what, f"The arm teacher's gains is left out, since {why}."
    shown = ", ".join(f"{value:g}" for value in own)
    return what, f"Gains of {source.label} by block, ||branch|| / ||stream|| on {IMAGES} images: {shown}."


def _said(report: Report, name: str) -> str:
    points, other = report.contrasts[changed(name)], report.contrasts[odds(changed(name))]
    numbers = f"{name} {effect(points)}, {effect(other)}"
    if why := no_verdict(points):
        return f"{numbers} (undecided {why})"
    return numbers if agree(points, other) else f"{numbers} (not clear on both scales)"
