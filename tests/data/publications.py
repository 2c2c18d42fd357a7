"""Archives in their publishers' layouts, with few images."""

import io
import tarfile

import numpy as np
from PIL import Image

from atdiag.data import catalogue, image_folders
from tests.commands import ran

RNG = np.random.default_rng(0)


SYNSETS = tuple(catalogue.FACTS["imagenette"].class_folders.split("|"))


FINE = [f"{word}_fish" for word in ("aa", "bb", "cc", "dd")]


def tar(entries) -> bytes:
    """Make a gzipped tar of (name, content), or of TarInfos with content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in entries:
            entry = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if entry.isreg():
                entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def imagenette() -> list:
    counts = (("train", 2), ("val", 1))
    return [
        ("imagenette2-320/noisy_imagenette.csv", b"path,noisy_labels_0\n"),
        *(
            (f"imagenette2-320/{split}/{cls}/{cls}_{i}.JPEG", jpeg())
            for split, count in counts
            for cls in SYNSETS
            for i in range(count)
        ),
    ]


def records(labels, before=()) -> tuple[bytes, np.ndarray]:
    pixels = RNG.integers(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8)
    return b"".join(bytes([*before, label]) + image.tobytes() for label, image in zip(labels, pixels)), pixels  # noqa: B905


def cifar10(wrong_label=None) -> tuple[list, dict]:
    batches = [list(range(10))[:: (-1) ** i] for i in range(5)]
    if wrong_label is not None:
        batches[2][3] = wrong_label
    entries, pixels = [], {}
    for i, labels in enumerate(batches, 1):
        content, pixels[i] = records(labels)
        entries.append((f"cifar-10-batches-bin/data_batch_{i}.bin", content))
    content, pixels["test"] = records(range(10))
    entries += [("cifar-10-batches-bin/test_batch.bin", content), ("cifar-10-batches-bin/readme.html", b"hello")]
    return entries[::-1], pixels  # in whatever order they come


def cifar100(names=FINE) -> list:
    train, _ = records([0, 1, 2, 3] * 3, before=[7])
    test, _ = records([3, 2, 1, 0], before=[7])
    top = "cifar-100-binary"
    listed = "\n".join([*names, ""]).encode()
    return [(f"{top}/fine_label_names.txt", listed), (f"{top}/train.bin", train), (f"{top}/test.bin", test)]


def left(data) -> list[str]:
    """Return what is in the folder of all data sets, except locks."""
    return sorted(path.name for path in data.iterdir() if path.suffix != ".lock")


def failed(capfd, data, name="imagenette") -> str:
    """Run a download that must fail with exit code 1 and leave nothing; return its one-line message."""
    before = left(data)
    code, out = ran("data", "check", name, "--download")
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("atdiag: ")]
    assert (code, out, len(said)) == (1, "", 1)
    assert left(data) == before
    assert image_folders.found(name) is None
    return said[0]
