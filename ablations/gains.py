"""Gain of a student from a teacher by each method, compared with scratch: the study that several ablations vary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from atdiag.core.errors import UserError
from atdiag.core.selection import choose
from atdiag.core.spec import Init
from atdiag.networks.registry import sizes
from atdiag.study.builder import Lab
from atdiag.study.protocol import BASELINE, Arm, Report, Study
from atdiag.study.verdicts import verb_phrase

METHODS = ("copy", "distill", "finetune", "logits", "features")
_SAID = {
    "copy": "copying its attention",
    "distill": "distilling its attention",
    "finetune": "starting from all its weights",
    "logits": "distilling its logits",
    "features": "distilling its residual stream",
}


def study(lab: Lab, ablation: str, teacher: str, methods: Sequence[str], where: str = "", **more: Any) -> Study:
    """Return a study of the standard student: from scratch, and with each of the methods.

    where: distinguishes the study from others of the same teacher, such as "8 epochs". more: further fields of the
    Study. Raises UserError for an unknown method or teacher.
    """
    for method in methods:
        choose(method, METHODS, "methods")
    source = lab.teacher(teacher)
    standard = lab.student(source)
    own = source.network.components

    def arm(method: str) -> Arm:
        if method == "finetune":  # the teacher's own architecture, so no weight is lost
            if lab.settings.student is not None and sizes.differing(standard, source.network):
                others = ",".join(name for name in methods if name != "finetune") or "copy,distill"
                raise UserError(
                    "finetune trains the teacher itself further, at its own size", f"give `methods` {others}"
                )
            return lab.arm(method, lab.student(source, own), source, Init(source="teacher"), recipe="finetune")
        return lab.arm(method, standard, source, transfer=lab.transfer(method, standard, allowed=METHODS))

    label = ", ".join(filter(None, (source.label, where)))

    def verdict(report: Report) -> str:
        said = [
            f"{_SAID[name]} {verb_phrase(report.row(name).contrast_or_raise(), 'helps', 'hurts')}" for name in methods
        ]
        return f"{label}: {'; '.join(said)}."

    notes = [f"{BASELINE} and all but finetune train the standard student; finetune trains the teacher itself further."]
    return Study(
        ablation=ablation,
        teacher=source,
        options={"methods": ",".join(methods), **more.pop("options", {})},
        arms=(lab.baseline(source), *map(arm, methods)),
        contrasts=(),  # none besides arm minus baseline
        verdict=verdict,
        label=label,
        reference=lab.reference(source),
        notes=tuple(notes) if "finetune" in methods else (),
        **more,
    )
