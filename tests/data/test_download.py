"""``atdiag data check NAME --download`` from a server on this machine, with made-up archives."""

import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from atdiag.core.errors import UserError
from atdiag.data import catalogue, download, image_folders, sources
from atdiag.data.download import DownloadError, fetch
from tests.commands import ran, wrong
from tests.data.publications import FINE, cifar10, cifar100, failed, imagenette, left


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


def test_cifar100_is_labelled_by_its_fine_names(data, publish):
    publish("cifar100", cifar100(), 12, 4, classes=4)
    fetch("cifar100")
    files = sources.find("cifar100").files()
    assert files["train"].classes == tuple(FINE)
    assert files["train"].counts == [3] * 4
    assert files["test"].keys == tuple(f"{cls}/{3 - i:05d}.png" for i, cls in enumerate(FINE))


def test_a_manually_downloaded_archive_is_used(data, publish, server):
    content = publish("imagenette", imagenette(), 20, 10)
    own = data / "imagenette2-320.tgz"
    own.write_bytes(content[:-1] + b"?")
    with pytest.raises(DownloadError, match=rf"came with md5 .* remove {own}"):
        fetch("imagenette")
    own.write_bytes(content)
    assert fetch("imagenette") == data / "imagenette"
    assert (left(data), server.asked) == (["imagenette", "imagenette2-320.tgz"], [])


def test_data_sets_that_can_not_be_downloaded_say_why(data, capsys, tmp_path, monkeypatch):
    text = wrong(capsys, "data", "check", "imagenet", "--download")
    assert text == (
        "imagenet can't be downloaded because it requires an account, and agreement to its terms: get it from "
        "image-net.org and put it below --data-dir as 'imagenet' (see docs/data.md)"
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


def test_every_data_set_can_be_downloaded_or_says_why_not():
    for row in catalogue.FACTS.values():
        assert (row.archive is None) == bool(row.closed)
        assert row.archive is None or row.archive.url.startswith("https://")


def test_the_error_for_a_missing_data_set_offers_the_download(data, capsys):
    assert "'atdiag data check cifar10 --download' fetches it" in wrong(capsys, "data", "check", "cifar10")
    assert "--download" not in wrong(capsys, "data", "check", "imagenet")


def test_a_folder_of_one_s_own_needs_no_download(uniform):
    code, out = ran("data", "check", f"folder:{uniform}", "--download")
    assert code == 0
    assert "already there" in out


def cut(handler, content):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.close_connection = True


def test_network_errors(data, publish, server, capfd, monkeypatch):
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
def test_unsafe_redirections_are_refused(data, publish, server, capfd, target):
    def redirect(handler):
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.end_headers()

    publish("imagenette", imagenette(), 20, 10)
    server.bodies["/imagenette2-320.tgz"] = redirect
    text = failed(capfd, data)
    assert any(why in text for why in ("is not an https address", "is not allowed", "refused"))
    assert len(server.asked) == 1


def test_lack_of_disk_space_is_reported_before_any_request(data, publish, server, capfd, monkeypatch):
    publish("imagenette", imagenette(), 20, 10)
    monkeypatch.setattr(download, "_BLOCK", 2**60)
    assert "GiB in" in failed(capfd, data)
    assert server.asked == []
    (data / "imagenette").touch()
    with pytest.raises(UserError, match="imagenette, and is no folder"):
        fetch("imagenette")


def test_an_empty_folder_of_its_name_is_no_data_set(data, publish, capfd):
    publish("imagenette", imagenette(), 20, 10)
    (data / "imagenette").mkdir()
    assert fetch("imagenette") == data / "imagenette"
    assert fetch("imagenette") is None


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
def test_the_remains_of_a_killed_download_are_no_data_set_and_are_removed(data, publish, during):
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


def test_concurrent_downloads_fetch_once(data, publish, server):
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
