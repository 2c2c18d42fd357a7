"""The first lines of an experiment on a user's own images: what was chosen, and why.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from atdiag.core.text import count

if TYPE_CHECKING:
    from atdiag.cli.session import ExperimentSession
    from atdiag.core.spec import Data, Network
    from atdiag.study.protocol import Series

_IMAGES = ("data.image_size", "data.crop_share", "data.interpolation")
"""Settings of the images that the teacher decides, unless the user does."""


def lines(series: Series, session: ExperimentSession) -> list[str]:
    """Return four lines: teacher, data, images, and training length; the fifth, seeds and cost, follows the plan."""
    from atdiag.reports import tables

    specs = list({spec.data: spec for study in series.studies for arm in study.arms for spec in arm.specs}.values())
    networks = list(dict.fromkeys(study.teacher.network for study in series.studies))
    body = f": {_body(networks[0])}" if len(networks) == 1 else ""
    return [
        f"atdiag {series.ablation}: {tables.subject(series)}{body}",
        f"data: {'; '.join(dict.fromkeys(_data(spec.data) for spec in specs))}",
        f"images: {_images([spec.data for spec in specs], networks, session)}",
        length(series, session),
    ]


def length(series: Series, session: ExperimentSession) -> str:
    """Return the line on the training length: its epochs and batch, and who chose them."""
    recipes = {arm.specs[0].recipe for study in series.studies for arm in study.arms}
    epochs = " or ".join(map(str, sorted({one.epochs for one in recipes})))
    batches = " or ".join(map(str, sorted({one.batch_size for one in recipes})))
    said = f"length: {epochs} {'epoch' if epochs == '1' else 'epochs'} in batches of {batches}"
    choice, given = session.choice, session.settings.overrides
    if choice is not None:
        speed = f"{choice.flops_per_second / 1e9:,.0f} GFLOP/s, {'assumed' if choice.gpu else 'measured'}"
        return f"{said}, as many as fit --budget {choice.budget} ({speed} on {choice.made[:10]} and kept in the runs)"
    if any(name.endswith(".epochs") for name in given):
        return f"{said}, as you set it"
    if session.settings.recipe is not None:
        return f"{said}, by --recipe {session.settings.recipe}"
    return f"{said}, the default; --budget 20m chooses what fits a time, --set recipe.epochs=N sets it"


def _body(network: Network) -> str:
    own = ", ".join(network.components) or "no native component"
    return (
        f"patches of {network.patch_size} px, width {network.width}, {count(network.depth, 'block')}, "
        f"{count(network.heads, 'head')}, {own}"
    )


def _data(data: Data) -> str:
    """Describe the folder: its classes and the images of each part, and how a part that it lacks was made."""
    from atdiag.data import image_folders, sources
    from atdiag.data.catalogue import ANY_FOLDER

    found = sources.find(data)
    held, own = found.validation_images(data), data.name.startswith(ANY_FOLDER)
    root = str(image_folders.find(data.name)) if own else data.name
    tests, why = f"{found.test_images(data):,}", ""
    if data.split is not None:
        per_class = "of each class, " if data.split < 1 else "stratified by class, "
        why = f" ({data.split:g} {per_class}chosen by a hash of the file's name: --split)"
    elif own and not data.test_per_class:
        folder = image_folders.test_folder(image_folders.find(data.name))
        tests, why = f"{len(image_folders.read(data.name, 'test')):,}", f" ({folder}/)" if folder else ""
    validating = f", {held:,} of them held out for validation" if held else ""
    return (
        f"{root}, {count(found.classes, 'class')}: {data.train + held:,} images to train on{validating}, "
        f"{tests} to test on{why}"
    )


def _images(every: list[Data], networks: list[Network], session: ExperimentSession) -> str:
    from atdiag.data.catalogue import crop_share

    def one(data: Data, network: Network) -> str:
        crop = data.crop_share or crop_share(data.name)
        pixels = f"mean {_numbers(network.mean)}, std {_numbers(network.std)}"
        return f"{data.image_size} px, central crop of {100 * crop:.4g} %, {data.interpolation}, {pixels}"

    shown = dict.fromkeys(one(data, network) for data, network in zip(every, networks, strict=False))
    yours = [name for name in _IMAGES if name in session.settings.overrides]
    told = f", the teacher's but for {', '.join(yours)}" if yours else ", all as the teacher expects them"
    change = "" if yours else " (--set data.image_size=N)"
    return f"{' or '.join(shown)}{told}{change}"


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.3g}" for value in values)
