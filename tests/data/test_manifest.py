"""``atdiag data check`` reads every image, names broken ones and writes a manifest."""

import hashlib
import json
import os
import subprocess

import numpy as np
import pytest
from PIL import Image

from atdiag.core import paths
from atdiag.data import listing, manifest, sources
from atdiag.data.decoding import DARK, TRANSPARENT
from tests.commands import ran


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("ATDIAG_DATA", "")  # set, so that what --data-dir sets ends with the test


def read(root, **options):
    return manifest.read(sources.find(f"folder:{root}").files(), **options)


def test_a_sound_folder_gets_a_manifest(mixed):
    seen = []
    reading = read(mixed, report=lambda done, total: seen.append((done, total)), processes=2)
    assert reading.broken == ()
    assert reading.counts == {"train": 36, "test": 15}
    assert seen == [(i, 51) for i in range(1, 52)]
    lines = reading.manifest.read_text().splitlines()
    assert len(lines) == 51
    for line in lines:
        sha256, file = line.split("  ", 1)
        assert sha256 == hashlib.sha256((mixed / file).read_bytes()).hexdigest()
    assert reading.sha256 == hashlib.sha256(reading.manifest.read_bytes()).hexdigest()
    assert reading.manifest.is_relative_to(paths.cache())
    sizes = [(40, 30), (31, 57), (32, 32), (90, 20)]
    taken = [sizes[i % 4] for i in range(51)]
    assert reading.mean_size == pytest.approx([sum(size[i] for size in taken) / 51 for i in (0, 1)])


def test_sha256sum_reads_the_manifest(uniform):
    reading = read(uniform, processes=1)
    command = ["sha256sum", "--quiet", "-c", str(reading.manifest)]
    try:
        assert subprocess.run(command, cwd=uniform, capture_output=True).returncode == 0
        (uniform / "val" / "ant" / "ant_0.jpg").write_bytes(b"other")
        assert subprocess.run(command, cwd=uniform, capture_output=True).returncode == 1
    except FileNotFoundError:
        pytest.skip("no sha256sum here")


def test_a_manifest_is_valid_only_while_the_files_are_unchanged(uniform, draw):
    name = f"folder:{uniform}"
    assert manifest.recorded(name) is None
    first = read(uniform, processes=1)
    assert manifest.recorded(name) == first.sha256
    assert read(uniform, processes=1) == first
    draw(uniform / "train" / "ant" / "ant_0.jpg", (32, 32), 77)
    assert manifest.recorded(name) is None
    second = read(uniform, processes=1)
    assert second.sha256 != first.sha256
    assert manifest.recorded(name) == second.sha256


def test_broken_images_are_listed_by_path_and_exit_with_1(uniform, capfd):
    code, out = ran("data", "check", f"folder:{uniform}", "--json")
    assert code == 0
    assert "36 train + 15 test images, 3 classes, mean size 32 x 32" in out
    assert json.loads(out.splitlines()[-1])["broken"] == []

    cut, text = uniform / "train" / "bee" / "bee_3.jpg", uniform / "val" / "cow" / "cow_1.jpg"
    cut.write_bytes(cut.read_bytes()[:-30])
    text.write_text("no image at all")
    code, out = ran("data", "check", f"folder:{uniform}", "--json")
    assert code == 1
    document = json.loads(out.splitlines()[-1])
    assert [row["path"] for row in document["broken"]] == [str(cut), str(text)]
    assert "truncated" in document["broken"][0]["why"]
    assert "not an image of a known format" in document["broken"][1]["why"]
    assert document["manifest"] is document["sha256"] is None
    assert f"broken: {cut} (" in out
    assert "2 broken: no manifest is written" in out
    assert "Traceback" not in capfd.readouterr().err
    assert manifest.recorded(f"folder:{uniform}") is None


def test_surprising_and_skipped_files_are_counted_and_named(uniform):
    bee, cow = uniform / "train" / "bee", uniform / "val" / "cow"
    for i in (3, 4):
        Image.new("RGBA", (32, 32), (200, 0, 0, 0)).save(bee / f"clear{i}.png")
    Image.fromarray(np.full((32, 32), 4095, np.uint16)).save(cow / "dark.png")
    (bee / "notes.txt").touch()
    (bee / os.fsdecode(b"\xff\n.csv")).touch()
    (cow / "masks").mkdir()
    (cow / "masks" / "a.npy").touch()
    code, out = ran("data", "check", f"folder:{uniform}", "--json")
    assert code == 0
    assert f"2 images {TRANSPARENT} (first: {bee / 'clear3.png'})" in out
    assert f"1 image {DARK} (first: {cow / 'dark.png'})" in out
    named = r"train/bee/notes.txt, train/bee/\udcff\n.csv, val/cow/masks/a.npy"
    assert f"3 files in class folders left out, no images by the ending: {named}\n" in out
    document = json.loads(out.splitlines()[-1])
    assert [row["images"] for row in document["remarks"]] == [1, 2]
    assert document["left_out"].startswith("3 files")


def test_the_list_shows_all_data_sets_and_their_locations(tmp_path, fill):
    code, out = ran("data", "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)}
    assert {"digits", "larger", "imagenet", "cifar10"} < set(rows)
    assert rows["digits"]["folder"] == "embedded"
    assert rows["imagenet"]["folder"] is None
    fill(tmp_path / "sets" / "imagenette2-160", train=1, test=1)
    code, out = ran("data", "--data-dir", tmp_path / "sets")
    assert code == 0
    assert f"imagenette: {tmp_path}/sets/imagenette2-160\n" in out
    assert all(name in out for name in rows)
    assert all(len(line) <= 80 for line in out.partition("imagenette: ")[0].splitlines())


def test_scenes_have_nothing_to_check():
    code, out = ran("data", "check", "digits")
    assert (code, len(out.splitlines())) == (0, 1)


def test_every_row_of_the_list_is_complete():
    assert all(row["classes"] > 1 and row["title"] and row["licence"] and row["source"] for row in listing.rows())
