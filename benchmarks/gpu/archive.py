"""Pack runs into files small enough to transfer: finished ones without weights, checkpoints in pieces."""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from atdiag.core.runs import Run, Store, write_atomically

PIECE = 15 * 2**20
"""Maximum bytes of a file: 16 MiB less the archive's overhead."""
FILES = 7
TOTAL = 63 * 2**20
"""Maximum number of files returned from the device machine, and their total bytes, with room for the part's JSON."""
_KEPT = ("spec.json", "metrics.jsonl", "predictions.npz", "result.json")
_PIECE = re.compile(r"([0-9a-f]{16})\.checkpoint\.(\d+)of(\d+)")


def pack(runs: Path, folder: Path, piece: int = PIECE, files: int = FILES, total: int = TOTAL) -> list[str]:
    """Write a folder's runs as files of at most about ``piece`` bytes; describe what does not fit.

    Finished runs come first, then complete checkpoints, the most advanced run's first. A run whose checkpoint is left
    out starts afresh.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("runs-*.tar.gz"), *folder.glob("*.checkpoint.*")):
        old.unlink()
    found = Store(runs).list()
    started = [run for run in found if not run.finished and run.checkpoint.is_file()]
    written, left_out = 0, []
    for index, group in enumerate(_groups([*(run for run in found if run.finished), *started], piece)):
        path = folder / f"runs-{index:02}.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for run in group:
                for name in _KEPT:
                    if (run.path / name).is_file():
                        archive.add(run.path / name, f"{run.id}/{name}")
        files, written = files - 1, written + path.stat().st_size
    for run in sorted(started, key=lambda run: len(run.progress()), reverse=True):
        content = zlib.compress(run.checkpoint.read_bytes(), 1)
        count = -(-len(content) // piece)
        if count > files or written + len(content) > total:
            left_out.append(f"the checkpoint of {run.id} ({len(content) / 2**20:.0f} MiB, {count} files)")
            continue
        for number in range(count):
            part = content[number * piece : (number + 1) * piece]
            write_atomically(folder / f"{run.id}.checkpoint.{number}of{count}", part)
        files, written = files - count, written + len(content)
    return left_out


def _groups(runs: list[Run], piece: int) -> Iterator[list[Run]]:
    """Yield groups of runs of at most ``piece`` bytes before compression. Raises ValueError for a larger run."""
    group: list[Run] = []
    size = 0
    for run in runs:
        own = sum((run.path / name).stat().st_size for name in _KEPT if (run.path / name).is_file())
        if own > piece:
            raise ValueError(f"{run.path} has {own} bytes without its weights: more than a file may have")
        if group and size + own > piece:
            yield group
            group, size = [], 0
        group.append(run)
        size += own
    if group:
        yield group


def restore(folder: Path, runs: Path) -> list[str]:
    """Unpack what :func:`pack` wrote below ``folder`` into a folder of runs; describe what was restored.

    Existing finished runs are kept. Raises ValueError for a checkpoint with a missing piece.
    """
    said = []
    finished = {run.id for run in Store(runs).list() if run.finished}
    for path in sorted(folder.rglob("runs-*.tar.gz")):
        with tarfile.open(path) as archive:
            members = [m for m in archive.getmembers() if m.name.split("/")[0] not in finished]
            # The result alone marks a run as finished, so it comes last.
            for member in sorted(members, key=lambda m: m.name.endswith("result.json")):
                archive.extract(member, runs, filter="data")
        said.append(f"{len({member.name.split('/')[0] for member in members})} runs from {path.name}")
    pieces: dict[str, dict[int, Path]] = {}
    counts: dict[str, int] = {}
    for path in folder.rglob("*.checkpoint.*of*"):
        if match := _PIECE.fullmatch(path.name):
            pieces.setdefault(match[1], {})[int(match[2])] = path
            counts[match[1]] = int(match[3])
    for name, parts in sorted(pieces.items()):
        if missing := sorted(set(range(counts[name])) - set(parts)):
            raise ValueError(f"the checkpoint of run {name} lacks pieces {missing} of {counts[name]}")
        run = Run(runs / name)
        if run.finished:
            continue
        whole = b"".join(parts[number].read_bytes() for number in range(counts[name]))
        run.write("checkpoint", zlib.decompress(whole))
        said.append(f"the checkpoint of {name}")
    return said
