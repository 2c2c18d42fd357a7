"""``atdiag data check NAME --download``: from a server on this machine, with archives that are made here."""

import hashlib
import http.server
import io
import json
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from atdiag.core.errors import UserError
from atdiag.data import catalogue, download, image_folders, sources
from atdiag.data.archives import unpack
from atdiag.data.download import DownloadError, fetch
from tests.commands import ran, wrong

RNG = np.random.default_rng(0)
SYNSETS = tuple(catalogue.FACTS["imagenette"].class_folders.split("|"))
FINE = [f"{word}_fish" for word in ("aa", "bb", "cc", "dd")]


def tar(entries) -> bytes:
    """A gzipped tar of (name, content), or of TarInfos with their content."""
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


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty folder of all data sets."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("ATDIAG_DATA", str(folder))
    return folder


@pytest.fixture
def server():
    """A server on this machine: ``server.bodies[path]`` is what it sends, or a function of the request."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            site.asked.append(self.path)
            body = site.bodies.get(self.path)
            if callable(body):
                body(self)
            elif body is None:
                self.send_error(404)
            else:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.bodies, site.asked = {}, []
    thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield site
    site.shutdown()
    thread.join()
    site.server_close()


@pytest.fixture
def publish(server, monkeypatch):
    """Let a data set be published on this machine: (name, entries of its archive, images of each split)."""
    monkeypatch.setattr(download, "SCHEMES", ("http",))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def make(name, entries, train, test, **changes):
        content = entries if isinstance(entries, bytes) else tar(entries)
        file = catalogue.FACTS[name].archive.url.rpartition("/")[2]
        server.bodies[f"/{file}"] = content
        url = f"http://127.0.0.1:{server.server_port}/{file}"
        archive = catalogue.Archive(url, len(content), hashlib.md5(content).hexdigest())
        row = replace(catalogue.FACTS[name], train=train, test=test, archive=archive, **changes)
        monkeypatch.setitem(catalogue.FACTS, name, row)
        return content

    return make


def left(data) -> list[str]:
    """What lies in the folder of all data sets, but for locks."""
    return sorted(path.name for path in data.iterdir() if path.suffix != ".lock")


# --- what is made -----------------------------------------------------------------------------------------------------


def test_imagenette_is_fetched_and_checked(data, publish, server):
    entries = imagenette()
    publish("imagenette", entries, 20, 10)
    code, out = ran("data", "check", "imagenette", "--download", "--json")
    assert code == 0
    assert out.startswith(f"imagenette: downloaded to {data}/imagenette\n")
    assert json.loads(out.splitlines()[-1])["images"] == {"train": 20, "test": 10}
    for name, content in entries[1:]:
        assert (data / "imagenette" / name.partition("/")[2]).read_bytes() == content
    assert left(data) == ["imagenette"]
    code, out = ran("data", "check", "imagenette", "--download")
    assert (code, len(server.asked)) == (0, 1)
    assert out.startswith("imagenette: already there, nothing downloaded\n")


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


def test_cifar10_s_records_become_images(data, publish):
    entries, pixels = cifar10()
    publish("cifar10", entries, 50, 10)
    seen = []
    assert fetch("cifar10", lambda *report: seen.append(report)) == data / "cifar10"
    files = sources.find("cifar10").files()
    assert files["train"].counts == [5] * 10
    classes = catalogue.FACTS["cifar10"].class_folders.split("|")
    for i in range(1, 6):
        for j, image in enumerate(pixels[i]):
            label = j if i % 2 else 9 - j
            path = data / "cifar10" / "train" / classes[label] / f"{10 * (i - 1) + j:05d}.png"
            assert np.array_equal(np.moveaxis(np.asarray(Image.open(path)), -1, 0), image)
    assert np.array_equal(
        np.asarray(Image.open(data / "cifar10/test/cat/00003.png")), np.moveaxis(pixels["test"][3], 0, -1)
    )
    assert {what for what, _, _ in seen} == {"downloading cifar10", "unpacking cifar10"}
    assert seen[-1] == ("unpacking cifar10", 60, 60)
    assert len({path.stat().st_size for path in (data / "cifar10").rglob("*.png")}) == 1  # whatever the pixels


def cifar100(names=FINE) -> list:
    train, _ = records([0, 1, 2, 3] * 3, before=[7])
    test, _ = records([3, 2, 1, 0], before=[7])
    top = "cifar-100-binary"
    listed = "\n".join([*names, ""]).encode()
    return [(f"{top}/fine_label_names.txt", listed), (f"{top}/train.bin", train), (f"{top}/test.bin", test)]


def test_cifar100_is_labelled_by_its_fine_names(data, publish):
    publish("cifar100", cifar100(), 12, 4, classes=4)
    fetch("cifar100")
    files = sources.find("cifar100").files()
    assert files["train"].classes == tuple(FINE)
    assert files["train"].counts == [3] * 4
    assert files["test"].keys == tuple(f"{cls}/{3 - i:05d}.png" for i, cls in enumerate(FINE))


def test_an_archive_that_was_fetched_by_hand_is_taken(data, publish, server):
    content = publish("imagenette", imagenette(), 20, 10)
    own = data / "imagenette2-320.tgz"
    own.write_bytes(content[:-1] + b"?")
    with pytest.raises(DownloadError, match=rf"came with md5 .* remove {own}"):
        fetch("imagenette")
    own.write_bytes(content)
    assert fetch("imagenette") == data / "imagenette"
    assert (left(data), server.asked) == (["imagenette", "imagenette2-320.tgz"], [])


# --- what is not ------------------------------------------------------------------------------------------------------


def test_what_can_t_be_downloaded_says_why(data, capsys, tmp_path, monkeypatch):
    text = wrong(capsys, "data", "check", "imagenet", "--download")
    assert text == (
        "imagenet can't be downloaded, it takes an account, and agreeing to its terms: get it from image-net.org and "
        "put it below --data-dir as 'imagenet' (see docs/data.md)"
    )
    assert "up to 200 GB, under terms" in wrong(capsys, "data", "check", "inat2018", "--download")
    for name in ("digits", f"folder:{tmp_path}/own"):
        assert f"{name} can't be downloaded" in wrong(capsys, "data", "check", name, "--download")
    assert "did you mean 'cifar10'" in wrong(capsys, "data", "check", "cifar1", "--download")
    monkeypatch.setenv("ATDIAG_DATA", str(data / "gone"))
    assert "which is not a folder" in wrong(capsys, "data", "check", "cifar10", "--download")
    monkeypatch.setenv("ATDIAG_DATA", "")
    assert "data set cifar10: give --data-dir" in wrong(capsys, "data", "check", "cifar10", "--download")
    assert left(data) == []


def test_every_set_may_be_downloaded_or_says_why_not():
    for row in catalogue.FACTS.values():
        assert (row.archive is None) == bool(row.closed)
        assert row.archive is None or row.archive.url.startswith("https://")


def test_where_it_can_be_downloaded_the_error_says_so(data, capsys):
    assert "'atdiag data check cifar10 --download' fetches it" in wrong(capsys, "data", "check", "cifar10")
    assert "--download" not in wrong(capsys, "data", "check", "imagenet")


def test_a_folder_of_one_s_own_needs_no_download(uniform):
    code, out = ran("data", "check", f"folder:{uniform}", "--download")
    assert code == 0
    assert "already there" in out


def failed(capfd, data, name="imagenette") -> str:
    """The one line of a download that fails with exit code 1 and leaves nothing."""
    before = left(data)
    code, out = ran("data", "check", name, "--download")
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("atdiag: ")]
    assert (code, out, len(said)) == (1, "", 1)
    assert left(data) == before
    assert image_folders.found(name) is None
    return said[0]


def cut(handler, content):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.close_connection = True


def test_what_the_network_does(data, publish, server, capfd, monkeypatch):
    content = publish("imagenette", imagenette(), 20, 10)
    path = "/imagenette2-320.tgz"
    url = f"http://127.0.0.1:{server.server_port}{path}"
    server.bodies[path] = None
    by_hand = f"fetch {url} by hand, put it at {data}/imagenette2-320.tgz and type the same line"
    text = failed(capfd, data)
    assert "can't be downloaded (HTTP 404 " in text
    assert text.endswith(by_hand)
    server.bodies[path] = lambda handler: cut(handler, content)
    assert f"of its {len(content):,} bytes" in (text := failed(capfd, data)) or "IncompleteRead" in text
    server.bodies[path] = content + b"more"
    assert "more than its" in failed(capfd, data)
    server.bodies[path] = content[:-1] + b"?"
    assert "came with md5" in failed(capfd, data)
    server.bodies[path] = lambda handler: handler.wfile.write(b"no HTTP at all\n")
    assert "can't be downloaded" in failed(capfd, data)
    monkeypatch.setattr(download, "_SECONDS", 0.1)
    server.bodies[path] = lambda handler: time.sleep(0.5)
    assert "timed out" in failed(capfd, data)
    server.bodies[path] = content
    monkeypatch.setattr(download, "SCHEMES", ("https",))
    assert f"{url} is not an https address" in failed(capfd, data)


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/x", "file:///etc/hostname", "//127.0.0.1:1/x"])
def test_a_redirection_leads_nowhere_else(data, publish, server, capfd, target):
    def redirect(handler):
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.end_headers()

    publish("imagenette", imagenette(), 20, 10)
    server.bodies["/imagenette2-320.tgz"] = redirect
    text = failed(capfd, data)
    assert any(why in text for why in ("is not an https address", "is not allowed", "refused"))
    assert len(server.asked) == 1


def test_no_room_is_told_before_anything_is_asked(data, publish, server, capfd, monkeypatch):
    publish("imagenette", imagenette(), 20, 10)
    monkeypatch.setattr(download, "_BLOCK", 2**60)
    assert "GiB in" in failed(capfd, data)
    assert server.asked == []
    (data / "imagenette").touch()
    with pytest.raises(UserError, match="imagenette is not a folder"):
        fetch("imagenette")


def test_an_empty_folder_of_its_name_is_no_data_set(data, publish, capfd):
    publish("imagenette", imagenette(), 20, 10)
    (data / "imagenette").mkdir()
    assert fetch("imagenette") == data / "imagenette"
    assert fetch("imagenette") is None


# --- archives that are not what they should be ------------------------------------------------------------------------


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
def test_a_hostile_name_writes_nothing(data, publish, tmp_path, how):
    entries = imagenette()
    publish("imagenette", [entries[0], HOSTILE[how], *entries[1:]], 20, 10)
    fetch("imagenette")  # passed over
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
def test_an_archive_of_something_else(data, publish, capfd, change, says):
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
def test_records_of_something_else(data, publish, capfd, change, says):
    publish("cifar100", change(cifar100()), 12, 4, classes=4)
    assert says in failed(capfd, data, "cifar100")


def test_a_label_without_a_class(data, publish, capfd):
    publish("cifar10", cifar10(wrong_label=10)[0], 50, 10)
    assert "an image of train has the label 10" in failed(capfd, data, "cifar10")


def test_flipped_archives_are_refused_or_right(tmp_path):
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


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("during", ["downloading", "unpacking"])
@pytest.mark.parametrize("fault", [KeyboardInterrupt, SystemExit(143), OSError(28, "No space left on device")])
def test_an_interruption_leaves_nothing(data, publish, during, fault):
    def report(what, done, total):
        if what.startswith(during) and done > total // 2:
            raise fault

    publish("imagenette", imagenette(), 20, 10)
    with pytest.raises(BaseException) as raised:
        fetch("imagenette", report)
    assert raised.value is fault or raised.type is fault
    assert left(data) == []
    assert fetch("imagenette") is not None


KILLED = """
import os, signal, sys
from dataclasses import replace
from atdiag.data import catalogue, download
download.SCHEMES = ("http",)
url, size, md5, during = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
catalogue.FACTS["imagenette"] = replace(
    catalogue.FACTS["imagenette"], train=20, test=10, archive=catalogue.Archive(url, size, md5)
)
def report(what, done, total):
    if what.startswith(during) and done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
download.fetch("imagenette", report)
"""


@pytest.mark.parametrize("during", ["downloading", "unpacking"])
def test_what_a_killed_one_left_is_no_data_set_and_goes(data, publish, during):
    publish("imagenette", imagenette(), 20, 10)
    archive = catalogue.FACTS["imagenette"].archive
    command = [sys.executable, "-c", KILLED, archive.url, str(archive.size), archive.md5, during]
    assert subprocess.run(command, check=False).returncode == -9
    assert left(data) == [".imagenette-part"]
    assert image_folders.found("imagenette") is None
    (data / ".imagenette-part" / "imagenette" / "train" / "n00000000").mkdir(parents=True, exist_ok=True)
    assert fetch("imagenette") is not None
    assert left(data) == ["imagenette"]
    sources.find("imagenette").files()


def test_two_at_once_download_once(data, publish, server):
    content = publish("imagenette", imagenette(), 20, 10)
    waits = threading.Event()

    def slow(handler):
        assert waits.wait(10)
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(content)

    server.bodies["/imagenette2-320.tgz"] = slow
    came = []

    def one():
        came.append(fetch("imagenette", lambda what, done, total: waits.set() if "waiting" in what else None))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(came, key=str) == [data / "imagenette", None]
    assert len(server.asked) == 1
    assert left(data) == ["imagenette"]
