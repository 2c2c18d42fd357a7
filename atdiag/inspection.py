"""Commands that look inside: trace, similarity, intervene. Each is a function of ``analysis`` with words around it.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atdiag import folders
from atdiag.experiments import DataDir, Json, Profile, Runs, Set

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.table import Table

    from atdiag.analysis.images import Pictures
    from atdiag.analysis.intervene import Outcome
    from atdiag.analysis.replacements import Replacement
    from atdiag.analysis.similarity import Similarity
    from atdiag.analysis.subjects import Subject

_SUBJECT = "a teacher (clip_b), a run's id (start:ID: before its first step), a file of a run, or timm:MODEL[@FILE]"

Images = Annotated[
    list[str] | None,
    typer.Option(
        "--images",
        help="A number of test images (0: all), indices as 3,17,40-43, a folder, or files. Repeatable. [default: 256]",
    ),
]
Layers = Annotated[str | None, typer.Option(help="Blocks, such as 0,5,11 or 3-5 or top:4. [default: all]")]
Heads = Annotated[str | None, typer.Option(help="Heads, such as 0,2. [default: all]")]
LayerMap = Annotated[
    str | None, typer.Option(help="Which blocks belong together in networks of different depth: 0:0,5:11.")
]
DataName = Annotated[
    str | None, typer.Option("--data", help="The data set. [default: the one that a run was trained on, else mini's]")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that can't be read, and count them.")]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu. [default: the best that is here]")]
Out = Annotated[Path | None, typer.Option(help="Folder for tables and figures. [default: ./results/<command>]")]


class Desk:
    """What every command here starts with: subjects by their references, and images for them."""

    def __init__(
        self,
        references: Sequence[str],
        profile: str | None = None,
        runs: Path | None = None,
        data: str | None = None,
        sets: Sequence[str] = (),
        data_dir: Path | None = None,
        device: str | None = None,
    ) -> None:
        from atdiag.analysis import subjects
        from atdiag.runs import Store
        from atdiag.study import profile as profiles
        from atdiag.study import schedule

        if data_dir is not None:
            folders.look_in(data_dir)
        overrides = [*([f"data.name={data}"] if data is not None else []), *sets]
        settings = profiles.resolve(profile, None, overrides, runs)
        self.profile = settings.profile.name
        self.store = Store(settings.runs)
        self.device = schedule.choose_device(device)
        asked = settings.profile.data
        self.subjects: list[Subject] = [
            subjects.find(reference, self.profile, asked, self.store).to(self.device) for reference in references
        ]
        # A run's student is looked into with the images that it was trained for, unless others are asked for.
        trained = next((one.data for one in self.subjects if one.spec is not None), None)
        own = trained is None or any(item.startswith("data.") for item in overrides)
        self.data = asked if own else trained

    def pictures(self, images: Sequence[str] | None, skip_bad: bool, default: int = 256) -> Pictures:
        """The images that are asked for, as the first subject sees them; else ``default`` of the data set's."""
        import numpy as np

        from atdiag.analysis.images import choose

        network = self.subjects[0].network
        if images:
            return choose(list(images), self.data, network, skip_bad)
        every = choose(0, self.data, network)
        count = min(default, len(every))
        return every.reordered(np.arange(count, dtype=np.int64) * len(every) // count)


def chosen(text: str | None, count: int, option: str) -> tuple[int, ...] | None:
    """Blocks or heads as they are typed; None for all. Raises UserError."""
    from atdiag.study.forms import indices

    return None if text is None else indices(text, count, option)


def layer_pairs(text: str | None) -> dict[int, int] | None:
    """``0:0,5:11`` -> a mapping. Raises UserError."""
    from atdiag.words import UserError

    if text is None:
        return None
    out: dict[int, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", part)
        if not found or int(found[1]) in out:
            raise UserError(f"--layer-map {text!r} is no list of pairs", "write it as 0:0,5:11")
        out[int(found[1])] = int(found[2])
    return out


def write(folder: Path, stem: str, frame: pd.DataFrame, document: Any, figures: dict[str, Figure]) -> list[Path]:
    """Write a table as CSV and JSON, and figures as PNG and PDF. Returns the files."""
    from atdiag.runs import write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.csv", folder / f"{stem}.json"]
    write_atomically(paths[0], frame.to_csv(index=False))
    for name, figure in figures.items():
        for kind in ("png", "pdf"):
            paths.append(folder / f"{stem}{name}.{kind}")
            figure.savefig(paths[-1])
    write_atomically(paths[1], json.dumps({**document, "files": [str(path) for path in paths]}, indent=1))
    return paths


def stem(*parts: str) -> str:
    """A file name for what was looked at: readable, and another one for anything else."""
    words = [re.sub(r"[^\w.-]+", "_", part).strip("_")[:40] for part in parts[:2]]
    return f"{'-'.join(words)}-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:6]}"


def tell(
    tables: Sequence[Table], notes: Sequence[str], files: Sequence[Path], document: Any, json_: bool, pictures: Pictures
) -> None:
    """Say what came out."""
    from rich.console import Console

    console = Console()
    for table in tables:
        console.print(table)
    skipped = [f"{len(pictures.skipped)} of {len(pictures)} images can't be read and are left out."]
    for note in [*notes, *(skipped if pictures.skipped else [])]:
        console.print(f"- {note}", style="dim", highlight=False)
    for path in files:
        typer.echo(f"  {path}")
    if json_:
        typer.echo(json.dumps({**document, "files": [str(path) for path in files]}))


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold", no_wrap=i > 0)
    return table


def shown_on(pictures: Pictures) -> str:
    """``256 test images of digits``."""
    seen = len(pictures) - len(pictures.skipped)
    return f"{seen} images" if pictures.data is None else f"{seen} test images of {pictures.data.name}"


# --- trace ---------------------------------------------------------------------------------------------------------


def trace(
    subject: Annotated[str, typer.Argument(help=f"What to look into: {_SUBJECT}.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write, .safetensors.")],
    what: Annotated[
        str, typer.Option(help="Any of map, logits, q, k, v, attn, mlp, residual, with commas between them.")
    ] = "map",
    layers: Layers = None,
    heads: Heads = None,
    images: Images = None,
    mean: Annotated[bool, typer.Option("--mean", help="Only the mean over the images.")] = False,
    skip_bad: SkipBad = False,
    data: DataName = None,
    set_: Set = [],  # noqa: B006 - typer copies it
    data_dir: DataDir = None,
    profile: Profile = None,
    runs: Runs = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Write what a network computes inside: attention maps, queries, keys, values, outputs, the residual stream.

    The file has a tensor for each thing and block, such as map.5 [images, heads, tokens, tokens].
    """
    from safetensors.torch import save

    from atdiag.analysis import tracing
    from atdiag.runs import write_atomically
    from atdiag.study import tables
    from atdiag.words import UserError

    out = out.expanduser()
    if out.suffix != ".safetensors" or out.is_dir():
        raise UserError(f"-o {out} is no name of a .safetensors file", f"write it as -o {out.stem}.safetensors")
    tables.writable(out.parent, "-o")
    desk = Desk([subject], profile, runs, data, set_, data_dir, device)
    (one,) = desk.subjects
    pictures = desk.pictures(images, skip_bad, default=64)
    found = tracing.trace(
        one,
        pictures,
        [name.strip() for name in what.split(",")],
        chosen(layers, one.network.depth, "--layers"),
        chosen(heads, one.network.heads, "--heads"),
        mean,
    )
    tensors = {f"{name}.{layer}": tensor.contiguous() for (name, layer), tensor in found.items()}
    kept = [name for name in pictures.names if name not in pictures.skipped]
    header = {"subject": one.label, "id": one.id, "images": json.dumps(kept), "mean": json.dumps(mean)}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, save(tensors, header))
    table = _table(f"trace - {one.label}", "tensor", "shape", "mean", "MB")
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size() / 1e6
        table.add_row(name, " x ".join(map(str, tensor.shape)), f"{float(tensor.mean()):.4g}", f"{size:.1f}")
    document = {"command": "trace", "subject": one.label, "id": one.id, "images": len(kept), "tensors": list(tensors)}
    over = "mean over " if mean else ""
    tell([table], [f"{over}{shown_on(pictures)}"], [out], document, json_, pictures)


# --- similarity ----------------------------------------------------------------------------------------------------


def similarity(
    subject: Annotated[str, typer.Argument(metavar="A", help=f"{_SUBJECT[0].upper()}{_SUBJECT[1:]}.")],
    others: Annotated[
        list[str], typer.Argument(metavar="B...", help="What it is compared with; several are compared in one pass.")
    ],
    layers: Layers = None,
    layer_map: LayerMap = None,
    images: Images = None,
    skip_bad: SkipBad = False,
    data: DataName = None,
    set_: Set = [],  # noqa: B006 - typer copies it
    data_dir: DataDir = None,
    profile: Profile = None,
    runs: Runs = None,
    device: Device = None,
    out: Out = None,
    json_: Json = False,
) -> None:
    """Compare two networks' attention, head by head: Jensen-Shannon divergence by layer, in bits, and CKA.

    Heads have no order: they are matched one to one so that the divergence is least (optimal), each with its nearest
    (best), by index (same), or averaged before. 0: the same maps; 1: nothing in common.
    """
    from atdiag.analysis import similarity as work
    from atdiag.study import tables
    from figures import similarity as figures

    folder = out.expanduser() if out else Path("results") / "similarity"
    tables.writable(folder, "--out")
    desk = Desk([subject, *others], profile, runs, data, set_, data_dir, device)
    a, *bs = desk.subjects
    pairs = layer_pairs(layer_map)
    pictures = desk.pictures(images, skip_bad)
    found = work.similarity(a, bs, pictures, chosen(layers, a.network.depth, "--layers"), pairs)
    import pandas as pd

    frame = pd.concat([one.frame() for one in found], ignore_index=True)
    document = {
        "command": "similarity",
        "profile": desk.profile,
        "subjects": [{"label": one.label, "id": one.id} for one in desk.subjects],
        "images": found[0].images,
        "layers": [list(pair) for pair in found[0].layers],
        "rows": json.loads(frame.to_json(orient="records")),
        "heads": [{rows: one.heads[rows].round(6).tolist() for rows in one.heads} for one in found],
    }
    drawn = {"-layers": figures.by_layer(found)}
    drawn |= {f"-heads{i if len(found) > 1 else ''}": figures.heads(one) for i, one in enumerate(found, 1)}
    ids = [one.id for one in desk.subjects]
    name = stem(a.label, "+".join(one.label for one in bs), *ids, str(found[0].layers), *pictures.names)
    files = write(folder, name, frame, document, drawn)
    notes = [f"bits, 0 to 1, mean over queries and {shown_on(pictures)}; CKA of the residual stream, 0 to 1"]
    notes += dict.fromkeys(note for one in found for note in one.notes)
    tell([_similarity_table(one) for one in found], notes, files, document, json_, pictures)


def _similarity_table(one: Similarity) -> Table:
    """A line for each layer: the four matchings over all queries, the optimal one of class token and patches, CKA."""
    table = _table(f"{one.a} and {one.b}", "layer", "optimal", "best", "same", "averaged", "class", "patches", "CKA")
    columns = [one.matched(how) for how in ("optimal", "best", "same", "averaged")]
    none = columns[0] * float("nan")
    columns += [one.matched("optimal", rows) if rows in one.heads else none for rows in ("class", "patch")]
    columns.append(one.cka["all"])
    for i, (layer_a, layer_b) in enumerate(one.layers):
        name = str(layer_a) if layer_a == layer_b else f"{layer_a}:{layer_b}"
        table.add_row(name, *("-" if column[i] != column[i] else f"{column[i]:.3f}" for column in columns))
    table.add_section()
    table.add_row("mean", *("-" if c.mean() != c.mean() else f"{c.mean():.3f}" for c in columns))
    return table


# --- intervene -----------------------------------------------------------------------------------------------------


def intervene(
    subject: Annotated[str, typer.Argument(metavar="A", help=f"The network that is changed: {_SUBJECT}.")],
    from_: Annotated[
        list[str] | None, typer.Option("--from", metavar="B", help="Put in this network's. Repeatable.")
    ] = None,
    with_: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            help="Put in: teacher (of a run's student), uniform, identity, shuffled (of another image), no-sinks or "
            "own. Repeatable. [default, without --from: uniform, identity, shuffled, no-sinks]",
        ),
    ] = None,
    what: Annotated[str, typer.Option(help="What is replaced: map, q, k or v.")] = "map",
    layers: Layers = None,
    heads: Heads = None,
    layer_map: LayerMap = None,
    each: Annotated[bool, typer.Option("--each", help="One block at a time, not all of them at once.")] = False,
    images: Images = None,
    skip_bad: SkipBad = False,
    data: DataName = None,
    set_: Set = [],  # noqa: B006 - typer copies it
    data_dir: DataDir = None,
    profile: Profile = None,
    runs: Runs = None,
    device: Device = None,
    out: Out = None,
    json_: Json = False,
) -> None:
    """Replace a trained network's attention, without training, and see what it still knows.

    Reports accuracy before and after, and how far the residual stream moves, block by block.
    """
    from atdiag.analysis import intervene as work
    from atdiag.analysis import subjects
    from atdiag.analysis.replacements import Replacement
    from atdiag.study import tables
    from figures import interventions as figures

    folder = out.expanduser() if out else Path("results") / "intervene"
    tables.writable(folder, "--out")
    desk = Desk([subject, *(from_ or ())], profile, runs, data, set_, data_dir, device)
    a, *others = desk.subjects
    words = with_ or ([] if from_ else ["uniform", "identity", "shuffled", "no-sinks"])
    sources: list[Any] = [*others]
    sources += [subjects.teacher_of(a).to(desk.device) if word == "teacher" else word for word in words]
    blocks = chosen(layers, a.network.depth, "--layers")
    some = chosen(heads, a.network.heads, "--heads")
    pairs = layer_pairs(layer_map)
    groups = [(block,) for block in blocks or sorted(pairs or range(a.network.depth))] if each else [blocks]
    part: Any = what
    replacements: list[Replacement] = [
        Replacement(source, part, group, some, pairs) for source in sources for group in groups
    ]
    pictures = desk.pictures(images, skip_bad)
    found = work.intervene(a, replacements, pictures)
    frame = work.frame(found)
    document = {
        "command": "intervene",
        "profile": desk.profile,
        "subject": {"label": a.label, "id": a.id},
        "images": found[0].images,
        "rows": json.loads(frame.to_json(orient="records")),
    }
    drawn = {"-residual": figures.residual(found)}
    if found[0].change is not None:
        drawn["-accuracy"] = figures.accuracy(found)
    said = dict.fromkeys(one.replaced for one in found)
    asked = [(one.replaced, one.layers, one.heads) for one in found]
    name = stem(a.label, "+".join(said), *(one.id for one in desk.subjects), str(asked), *pictures.names)
    files = write(folder, name, frame, document, drawn)
    notes = [f"{shown_on(pictures)}, the same before and after; 95 % intervals over images (by cluster)"]
    notes.append("stream: how far the last block's output moves, relative to its norm")
    if found[0].change is None:
        notes.append("no accuracy: of these images no labels are known that its head was made for")
    tell([_outcomes_table(found)], notes, files, document, json_, pictures)


def _outcomes_table(found: Sequence[Outcome]) -> Table:
    columns = ("put in", "layers", "top-1 %", "points [95 %]", "flips %", "stream")
    table = _table(f"intervene - {found[0].subject}", *columns)
    top1 = found[0].top1
    if top1:
        table.add_row("(as it is)", "", f"{top1[0]:.1f}", "", "", "")
    for one in found:
        change = "" if one.change is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*one.change)
        accuracy = "" if one.top1 is None else f"{one.top1[1]:.1f}"
        where = _ranges(one.layers) + ("" if one.heads is None else f" h{_ranges(one.heads)}")
        table.add_row(one.replaced, where, accuracy, change, f"{one.flips:.1f}", f"{one.residual[-1]:.3f}")
    return table


def _ranges(indices: Sequence[int]) -> str:
    """``0-3,7``."""
    out: list[list[int]] = []
    for index in indices:
        if out and out[-1][-1] == index - 1:
            out[-1] = [out[-1][0], index]
        else:
            out.append([index])
    return ",".join("-".join(map(str, part)) for part in out)


def add_commands(app: typer.Typer) -> None:
    """The commands of this module."""
    for command in (trace, similarity, intervene):
        app.command()(command)
