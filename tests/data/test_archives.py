"""Malformed and malicious archives."""

import tarfile
from dataclasses import replace

import pytest

from atdiag.data import catalogue
from atdiag.data.archives import unpack
from atdiag.data.download import fetch
from tests.data.publications import FINE, RNG, SYNSETS, cifar10, cifar100, failed, imagenette, jpeg, tar


def link(kind, target, name=f"imagenette2-320/train/{SYNSETS[0]}/{SYNSETS[0]}_0.JPEG"):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry, b""


TRAIN = f"imagenette2-320/train/{SYNSETS[0]}"


HOSTILE = {
    "up": (f"{TRAIN}/../../../../../evil.JPEG", jpeg()),
    "up by a class": ("imagenette2-320/train/../evil.JPEG", jpeg()),
    "absolute": ("/tmp/train/../evil.JPEG", jpeg()),
    "symbolic link": link(tarfile.SYMTYPE, "/etc/hostname"),
    "hard link": link(tarfile.LNKTYPE, "/etc/hostname"),
    "device": link(tarfile.CHRTYPE, ""),
    "hidden": (f"{TRAIN}/.evil.JPEG", jpeg()),
    "a class that is none": ("imagenette2-320/train/n00000000/evil.JPEG", jpeg()),
    "no image": (f"{TRAIN}/evil.sh", b"#!/bin/sh\n"),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_malicious_member_name_writes_nothing(data, publish, tmp_path, how):
    entries = imagenette()
    publish("imagenette", [entries[0], HOSTILE[how], *entries[1:]], 20, 10)
    fetch("imagenette")  # skipped
    files = [path for path in tmp_path.rglob("*") if not path.is_dir() and path.suffix != ".lock"]
    assert sorted(files) == sorted(data / "imagenette" / name.partition("/")[2] for name, _ in entries[1:])
    assert not any(path.is_symlink() for path in files)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda e: e[:-1], "images are missing: 1 in val"),
        (lambda e: [*e, (f"{TRAIN}/more.JPEG", jpeg())], "too many images in train"),
        (lambda e: [e[0], e[1], e[1], *e[3:]], "twice"),
        (lambda e: [(f"{TRAIN}/bomb.JPEG", bytes(10**7)), *e], "unpacks to more than"),
        (lambda e: [("elsewhere", bytes(10**7)), *e], "unpacks to more than"),
        (lambda e: b"no archive at all", "not a gzip file"),
        (lambda e: tar(e)[:5000], "unexpected end"),
        (lambda e: [], "images are missing: 20 in train, 10 in val"),
    ],
)
def test_archives_with_other_content_are_refused(data, publish, capfd, change, says):
    publish("imagenette", change(imagenette()), 20, 10)
    text = failed(capfd, data)
    assert "imagenette2-320.tgz is not the archive of imagenette that was published (" in text
    assert says in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda e: e[1:], "files are missing: fine_label_names.txt"),
        (lambda e: [e[0], e[2]], "files are missing: train.bin"),
        (lambda e: [e[0], (e[1][0], e[1][1][:-1]), e[2]], "train.bin has 36,887 bytes"),
        (lambda e: [link(tarfile.SYMTYPE, "/etc/hostname", e[0][0]), *e[1:]], "files are missing: fine_label"),
        (lambda e: cifar100(["../evil", *FINE[1:]]), "classes that are not those of CIFAR-100"),
        (lambda e: cifar100(FINE[:3]), "classes that are not those of CIFAR-100"),
        (lambda e: cifar100([*FINE[:3], FINE[0]]), "classes that are not those of CIFAR-100"),
        (lambda e: cifar100(["é", *FINE[1:]]), "codec"),
    ],
)
def test_records_with_other_content_are_refused(data, publish, capfd, change, says):
    publish("cifar100", change(cifar100()), 12, 4, classes=4)
    assert says in failed(capfd, data, "cifar100")


def test_a_label_without_a_class_is_refused(data, publish, capfd):
    publish("cifar10", cifar10(wrong_label=10)[0], 50, 10)
    assert "an image of train has the label 10" in failed(capfd, data, "cifar10")


def test_archives_with_flipped_bits_are_refused_or_read_correctly(tmp_path):
    entries = [entry for entry in imagenette() if f"/{SYNSETS[0]}/" in entry[0]]
    row = replace(catalogue.FACTS["imagenette"], train=2, test=1)
    content, path = bytearray(tar(entries)), tmp_path / "archive"
    for i, place in enumerate(RNG.integers(0, len(content), 100)):
        wrong = bytearray(content)
        wrong[place] ^= 1 << (i % 8)
        path.write_bytes(wrong)
        into = tmp_path / "out" / str(i) / "imagenette"
        try:
            unpack("imagenette", row, path, into, lambda done: None)
        except ValueError as fault:
            assert len(str(fault).splitlines()) <= 1
        else:
            assert len(list(into.rglob("*.JPEG"))) == 3
    assert {p.name for p in tmp_path.iterdir()} == {"archive", "out"}
