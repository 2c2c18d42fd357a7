"""The model card of an exported student. Imports nothing heavy."""

from __future__ import annotations

import json
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atdiag.core.errors import UserError

if TYPE_CHECKING:
    from atdiag.core.runs import Run
    from atdiag.core.spec import Data, RunSpec, Teacher


def contrast(experiment: Path, run: str) -> str:
    """Return what an experiment says of the arm that has a run: its points against the baseline, with the interval.

    Raises UserError for a file that is no experiment's, or whose arms do not have the run.
    """
    try:
        document = json.loads(experiment.expanduser().read_text())
        arms = [(study, arm) for study in document["studies"] for arm in study["arms"]]
        found = next(((study, arm) for study, arm in arms if run in arm["runs"]), None)
    except FileNotFoundError:
        raise UserError(f"there is no file {experiment}", "an experiment writes its .json under results/") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{experiment} is not the JSON file of an experiment") from None
    if found is None:
        raise UserError(f"no arm of {experiment} has the run {run}", "name the experiment that trained it")
    study, arm = found
    where = f"{plain(document['ablation'])} of {plain(study['study'])}, arm {plain(arm['arm'])}, {arm['seeds']} seeds"
    if arm["contrast"] is None:
        return f"{where}: this is the baseline, {arm['top1']:.1f} %."
    interval = f"{arm['contrast']:+.1f} [{arm['ci_low']:+.1f}, {arm['ci_high']:+.1f}]"
    said = f"{where}: {arm['top1']:.1f} %, points against the baseline {interval} (95 %)"
    p = "" if arm.get("p_holm") is None else f", p = {arm['p_holm']:.3g} (Holm)"
    return f"{said}{p}. The experiment's verdict: {plain(study['verdict'])}"


def card(run: Run, contrast: str | None, timms: bool) -> str:
    """Return the README.md of an exported student; timms: whether the folder is in timm's layout."""
    spec, result = run.spec, run.result()
    network = spec.network
    facts = {
        "student": f"{', '.join(network.components) or 'standard ViT'}: width {network.width}, {network.depth} blocks, "
        f"{network.heads} heads, patches of {network.patch_size} px, images of {network.channels} x "
        f"{network.image_size} x {network.image_size}, {network.classes} classes",
        "data": _data(spec.data),
        "start": _start(spec),
        "transfer": _transfer(spec),
        "top-1, test images": f"{result['top1']:.2f} % of {result['test_images']:,} (last epoch; nothing is selected)",
        "seeds": f"data {spec.seed.data}, model {spec.seed.model}",
        "run": run.id,
    }
    if spec.teacher is not None:
        facts |= _teacher(spec.teacher)
    lines = [
        "---",
        f"library_name: {'timm' if timms else 'atdiag'}",
        "pipeline_tag: image-classification",
        "license: other",
        "tags: [image-classification, vision-transformer, attention-transfer, atdiag]",
        "---",
        "",
        f"# A ViT trained by atdiag (run {run.id[:12]})",
        "",
        *_use(spec, timms),
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {plain(value)} |" for name, value in facts.items()),
        "",
        "## The experiment",
        "",
        contrast or "One run, without the contrast of its experiment.",
        "",
        "## The recipe",
        "",
        "```json",
        json.dumps(spec.recipe.model_dump(mode="json"), indent=1),
        "```",
        "",
        "## Licence",
        "",
        "These weights were trained on the data, and with the teacher, named above, whose terms may bind their use.",
        "",
        f"Written by atdiag {plain(_version())}.",
        "",
    ]
    return "\n".join(lines)


def _version() -> str:
    try:
        return version("atdiag")
    except PackageNotFoundError:
        return "(unknown version)"


def plain(text: str) -> str:
    """Return a text for one line of Markdown: with no markup, no HTML, and no absolute path.

    >>> plain("a|b <img> [x](y)")
    'a\\\\|b &lt;img&gt; \\\\[x\\\\](y)'
    """
    one = re.sub(r"(?<![\w.])(?:[A-Za-z]:)?[/\\][^\s:,;'\"]*[/\\]", "", " ".join(str(text).split()))
    one = one.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|#~])", r"\\\1", one)


def _use(spec: RunSpec, timms: bool) -> list[str]:
    if timms:
        return [
            "```python",
            "import timm",
            "",
            'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # the folder of this file',
            "```",
            "",
            "It takes images that are normalised by the mean and std in config.json.",
        ]
    why = (
        "The student copies its teacher's attention, so it works only together with its teacher, whose weights are not "
        "in this folder."
        if spec.transfer.method == "copy"
        else "timm has no class for this combination of components."
    )
    return [
        f"{why} loader.py loads it with atdiag; it takes images in [0, 1]:",
        "",
        "```python",
        "from loader import load",
        "",
        'student = load()  # load("FILE"): with the teacher\'s weights from a file'
        if spec.transfer.method == "copy"
        else "student = load()",
        "```",
    ]


def _data(data: Data) -> str:
    from atdiag.data.catalogue import FACTS

    name, sign, _ = data.name.partition(":")
    if sign:
        return f"a folder of the user's own (fingerprint {str(data.fingerprint)[:12]}), {data.train:,} training images"
    facts = FACTS.get(name)
    if facts is None:
        made = " (embedded scenes of scikit-learn's digits)" if data.image_size is None else ""
        return f"{name}{made}, {data.train:,} training images"
    return f"{facts.title} ({facts.source}; licence: {facts.licence}), {data.train:,} training images"


def _start(spec: RunSpec) -> str:
    if spec.init.source == "scratch":
        return "from scratch"
    anew = f", with {' and '.join(spec.init.reinit)} drawn anew" if spec.init.reinit else ""
    whose = "the teacher's weights" if spec.start is None else f"the weights of {spec.start.label}"
    return f"{whose}{anew}"


def _transfer(spec: RunSpec) -> str:
    from atdiag.core.selection import ranges

    transfer = spec.transfer
    if transfer.method == "none":
        return "none"
    changed: dict[str, Any] = transfer.model_dump(mode="json", exclude_defaults=True, exclude={"method", "layers"})
    rest = "".join(f", {name} {value}" for name, value in changed.items())
    blocks = f" in blocks {ranges(transfer.layers)}" if transfer.layers else ""
    return f"{transfer.method}{blocks}{rest}"


def _teacher(teacher: Teacher) -> dict[str, str]:
    from atdiag.networks.registry import teachers

    name = teacher.name.partition("@")[0]
    row = teachers.registry().get(name)
    licence = (
        "that of atdiag"
        if teachers.is_shipped(teacher)
        else row.licence
        if row
        else "not known: a teacher of the user's"
    )
    return {
        "teacher": f"{teacher.label} (weights sha256 {str(teacher.sha256)[:16]})",
        "the teacher's licence": licence,
    }
