"""Output of ``atdiag data``: the known data sets and their folders, and the result of scanning one."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from atdiag.core.errors import UserError
from atdiag.core.text import count
from atdiag.data import image_folders, sources
from atdiag.data.catalogue import ANY_FOLDER, CORRUPTIONS, TEST_SETS
from atdiag.data.embedded import EMBEDDED
from atdiag.data.manifest import Scan
from atdiag.data.tars import TIMM


def rows() -> list[dict[str, Any]]:
    """Return a row for each data set: name, title, classes, images, resolution, normalisation, source, licence, folder.

    Those without training images are test sets for ``atdiag ood``.
    """
    tests = [
        {
            "name": name,
            "title": facts.title,
            "classes": facts.classes,
            "train": None,
            "test": facts.images,
            "resolution": "mixed",
            "normalisation": "ImageNet",
            "source": facts.source,
            "licence": facts.licence,
            "folder": _searched(name, facts.folders),
        }
        for name, facts in TEST_SETS.items()
    ]
    return [*(data_set.row() for data_set in sources.listed()), *tests]


def _searched(name: str, folders: tuple[str, ...]) -> str | None:
    try:
        return str(image_folders.search(name, folders))
    except UserError:
        return None


def table(listed: list[dict[str, Any]]) -> Table:
    """Format the rows as a table."""
    out = Table(box=box.SIMPLE_HEAD)
    out.collapse_padding, out.pad_edge = True, False
    for name in ("name", "classes", "training", "test", "pixels", "mean, std", "found"):
        numbers = name in ("classes", "training", "test")
        out.add_column(name, justify="right" if numbers else "left", no_wrap=True)
    for row in listed:
        counts = [f"{row[split]:,}" if row[split] else "" for split in ("train", "test")]
        found = "no" if row["folder"] is None else "yes"
        out.add_row(row["name"], f"{row['classes']:,}", *counts, row["resolution"], row["normalisation"], found)
    for own in (ANY_FOLDER, TIMM):
        out.add_row(f"{own}PATH", "", "", "", "", "", "")
    return out


def where(listed: list[dict[str, Any]]) -> list[str]:
    """Format where the real data sets were found, as lines."""
    return [f"{row['name']}: {row['folder']}" for row in listed if row["folder"] not in (None, EMBEDDED)]


def others() -> str:
    """Describe in one line the other test sets for finished runs."""
    return f"'atdiag ood' also tests on corruptions of any of them: {', '.join(CORRUPTIONS)}"


def text(reading: Scan) -> list[str]:
    """Format the result of scanning a data set as lines of text."""
    counts = " + ".join(f"{number:,} {split}" for split, number in reading.counts.items())
    width, height = reading.mean_size
    lines = [
        f"{reading.folder}: {counts} images, {count(reading.classes, 'class')}, mean size {width:.0f} x {height:.0f}"
    ]
    for remark, number, first in reading.remarks:
        lines.append(f"{count(number, 'image')} {remark} (first: {first})")
    if reading.left_out:
        lines.append(reading.left_out)
    if reading.broken:
        lines += [f"broken: {path} ({why})" for path, why in reading.broken]
        lines.append(f"{len(reading.broken)} broken: no manifest is written")
    else:
        lines.append(f"all sound; manifest sha256 {reading.sha256}\n  {reading.manifest}")
    return lines


def document(reading: Scan) -> dict[str, Any]:
    """Return the result of scanning a data set as a JSON document."""
    return {
        "folder": str(reading.folder),
        "images": reading.counts,
        "classes": reading.classes,
        "mean_size": list(reading.mean_size),
        "broken": [{"path": str(path), "why": why} for path, why in reading.broken],
        "remarks": [{"what": what, "images": number, "first": str(first)} for what, number, first in reading.remarks],
        "left_out": reading.left_out,
        "manifest": None if reading.manifest is None else str(reading.manifest),
        "sha256": reading.sha256,
    }
