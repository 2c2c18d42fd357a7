"""The analyses that measure networks: trace, similarity, intervene, probe. Each is the command of its name.

A subject is a teacher's name, a run's id, a file, or a network of timm's or ours. Imports nothing heavy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from atdiag.api import probed
from atdiag.api.given import CommonOptions, Indices, answer, open_analysis, runs_of, several, typed, wanted_images
from atdiag.api.results import Result, in_own_context
from atdiag.api.sessions import (
    InspectionOptions,
    chosen,
    chosen_of_all,
    head_record,
    layer_pairs,
    left_out,
    shown_on,
    stem,
    watched,
)
from atdiag.core import paths
from atdiag.core.errors import UserError
from atdiag.core.text import byte_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from atdiag.analysis.interventions import Outcome
    from atdiag.analysis.replacements import Replacement
    from atdiag.analysis.similarity import Similarity
    from atdiag.reports.writers import Drawing


@in_own_context
def trace(
    subject: str | Path | nn.Module,
    what: str | Iterable[str] = ("map",),
    layers: Indices = None,
    heads: Indices = None,
    images: Any = None,
    mean: bool = False,
    **common: Unpack[CommonOptions],
) -> Result:
    """Return a network's internal values; ``.found`` holds a tensor for each (quantity, block).

    what: any of map, logits, q, k, v, attn, mlp and residual. images: default 64 test images. mean: only the mean over
    the images. out: a .safetensors file, with tensors such as ``map.5`` [images, heads, tokens, tokens].
    """
    from atdiag.analysis import streaming
    from atdiag.reports.writers import Written

    file = common.pop("out", None)
    if file is not None:
        file = Path(file).expanduser()
        if file.suffix != ".safetensors" or file.is_dir():
            raise UserError(
                f"`out` {file} is not the name of a .safetensors file", f"write it as {file.stem}.safetensors"
            )
        paths.writable(file.parent, "out")
    session = open_analysis([subject], common)
    (one,) = session.subjects
    pictures = session.pictures(wanted_images(images), default=64)
    blocks = chosen(typed(layers), one.network.depth, "layers")
    some = chosen(typed(heads), one.network.heads, "heads")
    asked = [name.strip() for name in (what.split(",") if isinstance(what, str) else what)]
    with watched(images=pictures):
        found = streaming.trace(one, pictures, asked, blocks, some, mean)
    tensors = {f"{name}.{layer}": tensor.contiguous() for (name, layer), tensor in found.items()}
    kept = [name for name in pictures.names if name not in pictures.skipped]
    header = {"subject": one.label, "id": one.id, "images": json.dumps(kept), "mean": json.dumps(mean)}
    header["left_out"] = json.dumps(list(pictures.skipped))
    written = None
    if file is not None:
        from safetensors.torch import save

        from atdiag.core.runs import write_atomically

        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, save(tensors, header))
        written = Written([file])
    import pandas as pd

    rows = [
        {
            "tensor": name,
            "shape": " x ".join(map(str, tensor.shape)),
            "largest": max(float(tensor.max()), -float(tensor.min())),
            "size": byte_size(tensor.numel() * tensor.element_size()),
        }
        for name, tensor in tensors.items()
    ]
    document = {"command": "trace", "subject": one.label, "id": one.id, "images": len(kept), "tensors": list(tensors)}
    document["left_out"] = list(pictures.skipped)
    note = f"{'mean over ' if mean else ''}{shown_on(pictures)}"
    return Result(
        "trace",
        pd.DataFrame(rows),
        "",
        runs_of(session),
        (note, *session.notes(pictures)),
        document,
        found,
        {},
        written,
    )


@in_own_context
def similarity(
    subject: str | Path | nn.Module,
    *others: str | Path | nn.Module,
    layers: Indices = None,
    layer_map: str | Mapping[int, int] | None = None,
    images: Any = None,
    **common: Unpack[CommonOptions],
) -> Result:
    """Compare a network's attention with that of others, head by head: Jensen-Shannon divergence in bits, and CKA.

    layer_map: which blocks belong together in networks of different depth, as ``{0: 0, 5: 11}``. images: default 256
    test images.
    """
    import pandas as pd

    from atdiag.analysis import similarity as work

    if not others:
        raise UserError("there is nothing to compare with", "give two subjects or more")
    session = open_analysis([subject, *others], common)
    a, *bs = session.subjects
    pairs = layer_pairs(layer_map) if isinstance(layer_map, str) else None if layer_map is None else dict(layer_map)
    blocks = chosen(typed(layers), a.network.depth, "layers")
    work.check(a, bs, blocks, pairs)  # first: other images would not make incompatible networks fit
    pictures = session.pictures(wanted_images(images))
    with watched(images=pictures):
        found = work.similarity(a, bs, pictures, blocks, pairs)
    frame = pd.concat([one.frame() for one in found], ignore_index=True)
    document = {
        "command": "similarity",
        "profile": session.profile,
        "subjects": [{"label": one.label, "id": one.id} for one in session.subjects],
        "images": found[0].images,
        "left_out": list(pictures.skipped),
        "layers": [list(pair) for pair in found[0].layers],
        "rows": json.loads(frame.to_json(orient="records")),
        "heads": [{rows: one.heads[rows].round(6).tolist() for rows in one.heads} for one in found],
    }

    def by_layer() -> Figure:
        from figures import similarity as figures

        return figures.by_layer(found)

    def heads(one: Similarity) -> Figure:
        from figures import similarity as figures

        return figures.heads(one)

    drawn: dict[str, Drawing] = {"-layers": by_layer}
    drawn |= {f"-heads{i if len(found) > 1 else ''}": partial(heads, one) for i, one in enumerate(found, 1)}
    ids = [one.id for one in session.subjects]
    name = stem(a.label, "+".join(one.label for one in bs), *ids, str(found[0].layers), *pictures.names)
    notes = [f"bits, 0 to 1, mean over queries and {shown_on(pictures)}; CKA of the residual stream, 0 to 1"]
    notes += dict.fromkeys(note for one in found for note in one.notes)
    told = "; ".join(f"{one.b}: {one.matched('optimal').mean():.3f} bits" for one in found)
    verdict = f"Mean divergence between the attention of {a.label} and that of {told} (heads matched one to one)."
    return answer(session, "similarity", frame, verdict, notes, document, found, drawn, name, pictures)


@in_own_context
def intervene(
    subject: str | Path | nn.Module,
    from_: Any = (),
    with_: str | Sequence[str] | None = None,
    what: str = "map",
    layers: Indices = None,
    heads: Indices = None,
    layer_map: str | Mapping[int, int] | None = None,
    each: bool = False,
    images: Any = None,
    classes: Path | None = None,
    **common: Unpack[CommonOptions],
) -> Result:
    """Replace a trained network's attention, without training, and measure the effect.

    from_: one or more networks whose attention is put in. with_: teacher (of a run's student), uniform, identity,
    shuffled, no-sinks or own; default, without ``from_``: uniform, identity, shuffled and no-sinks. what: map, q, k or
    v. each: one block at a time. classes: a text file with the class names of the head, one a row.
    """
    from atdiag.analysis import interventions as work
    from atdiag.analysis import subjects
    from atdiag.analysis.replacements import Replacement, check

    sources_ = several(from_)
    session = open_analysis([subject, *sources_], common, classes)
    a, *others = session.subjects
    words = several(with_) or ([] if sources_ else ["uniform", "identity", "shuffled", "no-sinks"])
    sources: list[Any] = [*others]
    sources += [subjects.teacher_of(a).to(session.device) if word == "teacher" else word for word in words]
    blocks = chosen(typed(layers), a.network.depth, "layers")
    some = chosen(typed(heads), a.network.heads, "heads")
    pairs = layer_pairs(layer_map) if isinstance(layer_map, str) else None if layer_map is None else dict(layer_map)
    groups = [(block,) for block in blocks or sorted(pairs or range(a.network.depth))] if each else [blocks]
    part: Any = what
    replacements: list[Replacement] = [
        Replacement(source, part, group, some, pairs) for source in sources for group in groups
    ]
    for one in replacements:
        check(a, one)
    pictures = session.pictures(wanted_images(images))
    with watched(images=pictures):
        found = work.intervene(a, replacements, pictures)
    frame = work.frame(found)
    head = head_record(found[0].head, found[0].warning, session.given.spoken)
    document = {
        "command": "intervene",
        "profile": session.profile,
        "subject": {"label": a.label, "id": a.id, "head": head},
        "images": found[0].images,
        "left_out": list(pictures.skipped),
        "rows": json.loads(frame.to_json(orient="records")),
    }

    def residual() -> Figure:
        from figures import interventions as figures

        return figures.residual(found)

    def accuracy() -> Figure:
        from figures import interventions as figures

        return figures.accuracy(found)

    drawn: dict[str, Drawing] = {"-residual": residual} | ({} if found[0].change is None else {"-accuracy": accuracy})
    said = dict.fromkeys(one.replaced for one in found)
    asked = [(one.replaced, one.layers, one.heads) for one in found]
    name = stem(a.label, "+".join(said), *(one.id for one in session.subjects), str(asked), *pictures.names)
    notes = [f"{shown_on(pictures)}, the same before and after; 95 % intervals over images (by cluster)"]
    notes.append("stream: how far the last block's output moves, relative to its norm")
    if found[0].change is None:
        notes.append(f"no accuracy: these images have no labels for the classes of its head ({head['rows']})")
    else:
        notes.append(f"which row of its head is which class: {head['rows']}")
        notes += [f"{a.label} is {warning}"] if (warning := head["warning"]) else []
    return answer(session, "intervene", frame, _changes(a.label, found), notes, document, found, drawn, name, pictures)


def _changes(label: str, found: Sequence[Outcome]) -> str:
    """Return the changes of accuracy in words; empty where there is none, or one for each block."""
    if found[0].change is None or found[0].top1 is None or len({one.replaced for one in found}) < len(found):
        return ""
    told = "; ".join(
        f"{one.replaced} {'{:+.1f} [{:+.1f}, {:+.1f}]'.format(*one.change)}" for one in found if one.change is not None
    )
    return f"{label} is right in {found[0].top1[0]:.1f} % as it is; points with another attention put in: {told}."


@in_own_context
def probe(
    *subjects: str | Path | nn.Module,
    layers: Indices = None,
    train: int | None = None,
    images: Any = None,
    neighbours: int = 20,
    classes: Path | None = None,
    **common: Unpack[CommonOptions],
) -> Result:
    """Probe every layer's tokens for the classes, and apply the trained head to every layer.

    subjects: also the ``.json`` of an experiment, for all of its arms. train: training images for the probes; default:
    the data set's, at most 20,000. images: default all test images. neighbours: how many nearest neighbours vote.
    """
    from atdiag.analysis import probing
    from atdiag.study import depth

    arms = probed.arms(subjects)
    if labels := InspectionOptions(label=common.pop("label", None)).names(len(arms)):
        arms = [replace(arm, name=label) for arm, label in zip(arms, labels, strict=True)]
    session = open_analysis([reference for arm in arms for reference in arm.references], common, classes)
    names = probed.named(arms, session.subjects)
    asked = chosen_of_all(typed(layers), session.subjects)
    pictures = session.pictures(wanted_images(images) or ["0"])
    data_set = pictures.data
    if data_set is None:
        raise UserError("the classes of these images are not known", "give `images` a number or indices")
    count = min(data_set.train, 20_000) if train is None else train
    fitted = probing.training_pictures(data_set, session.subjects[0].network, count, session.given.skip_bad)
    with watched(training_images=fitted, test_images=pictures):
        done = probing.probe(session.subjects, fitted, pictures, asked, neighbours)
    held_out, rest = done[0].held_out, iter(done)
    groups = {name: [next(rest) for _ in range(count)] for name, count in names}
    spoken = session.given.spoken
    heads = {n: head_record(group[0].head, group[0].warning, spoken) for n, group in groups.items() if group[0].head}
    frame = depth.frame(groups)
    document = {
        "command": "probe",
        "profile": session.profile,
        "data": data_set.model_dump(mode="json"),
        "subjects": [
            {"subject": name, "runs": [{"label": one.label, "id": one.id} for one in group], "head": heads.get(name)}
            for name, group in groups.items()
        ],
        "train": int(frame.train.iloc[0]),
        "train_left_out": list(fitted.skipped),
        "images": int(frame.images.iloc[0]),
        "left_out": list(pictures.skipped),
        "neighbours": neighbours,
        "regularisation": {"fixed": held_out == 0, "held_out": held_out, "stratified": held_out > 0},
        "rows": json.loads(frame.to_json(orient="records")),
    }
    ids = [one.id for group in groups.values() for one in group]
    described = [str(asked), str(len(fitted)), str(neighbours), data_set.model_dump_json(), *pictures.names]
    notes = [
        f"fitted to {document['train']} training images of {data_set.name}, {probed.regularised(held_out)}; "
        f"measured on {shown_on(pictures)}",
        f"nearest neighbours: {neighbours}, cosine, majority; 95 % intervals over test images, and seeds where there "
        "are several",
    ]
    notes += [f"which row of the head of {name} is which class: {head['rows']}" for name, head in heads.items()]
    notes += [f"{name} is {head['warning']}" for name, head in heads.items() if head["warning"]]
    notes += left_out(fitted, "training images")
    name = stem("+".join(groups), data_set.name, *ids, *described)
    drawn = probed.drawings(frame)
    return answer(session, "probe", frame, probed.verdict(frame), notes, document, groups, drawn, name, pictures)
