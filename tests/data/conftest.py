"""Small folders of images: made-up ones with the quirks of real ones, and a few real images."""

import hashlib
import http.server
import os
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from atdiag.core.spec import Data
from atdiag.data import catalogue, download
from atdiag.data.sources import complete
from tests.data import publications

PER_CLASS = {"train": 6, "test": 3}
REAL = Path(os.environ.get("ATDIAG_TEST_DATA") or Path(__file__).parents[2].parent / "shared" / "data")


@pytest.fixture(autouse=True)
def _own_places(tmp_path, monkeypatch):
    monkeypatch.setenv("ATDIAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ATDIAG_DATA", raising=False)


def _draw(path, size, seed):
    """Write a smooth random JPEG of the given size (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)


def _fill(root, sizes=((32, 32),), classes=("ant", "bee", "cow"), train=12, test=5):
    """Write a folder of images whose sizes alternate."""
    seed = 0
    for split, count in (("train", train), ("val", test)):
        for cls in classes:
            for i in range(count):
                _draw(root / split / cls / f"{cls}_{i}.jpg", sizes[seed % len(sizes)], seed)
                seed += 1
    return root


@pytest.fixture
def uniform(tmp_path):
    """A folder whose images have one size, 32 x 32."""
    return _fill(tmp_path / "uniform")


@pytest.fixture
def mixed(tmp_path):
    """A folder whose images have several sizes."""
    return _fill(tmp_path / "mixed", sizes=((40, 30), (31, 57), (32, 32), (90, 20)))


@pytest.fixture(scope="session")
def fill():
    """Make a folder of images: (root, sizes, classes, train, test)."""
    return _fill


@pytest.fixture(scope="session")
def draw():
    """Make one image: (path, size, seed)."""
    return _draw


@pytest.fixture(scope="session")
def spec():
    """The completed spec of a folder: (root, **fields)."""

    def make(root, image_size=32, **values):
        return complete(Data(name=f"folder:{root}", train=1, image_size=image_size, **values))

    return make


def _unpacked(archive, root, members):
    """Extract the wanted members [(name in the archive, path below root)] of a zip or tar."""
    path = REAL / archive
    if not path.exists():
        pytest.skip(f"no {archive} in {REAL} (ATDIAG_TEST_DATA)")
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as file:
            for name, place in members(file.namelist()):
                (root / place).parent.mkdir(parents=True, exist_ok=True)
                (root / place).write_bytes(file.read(name))
        return
    with tarfile.open(path) as file:
        for member in file:
            for _, place in members([member.name] if member.isfile() else []):
                (root / place).parent.mkdir(parents=True, exist_ok=True)
                (root / place).write_bytes(file.extractfile(member).read())


class _FirstOfEach:
    """Choose the first images of each class and split of an archive: (name, path below the data set's folder)."""

    def __init__(self, depth):
        self.depth, self.taken = depth, {}

    def __call__(self, names):
        for name in sorted(names):
            parts = Path(name).parts[self.depth :]
            if len(parts) != 3:
                continue
            most = PER_CLASS["train" if parts[0] == "train" else "test"]
            self.taken[parts[:2]] = self.taken.get(parts[:2], 0) + 1
            if self.taken[parts[:2]] <= most:
                yield name, Path(*parts)


@pytest.fixture(scope="session")
def imagenette_files(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenette")
    _unpacked("imagenette-128.zip", root / "imagenette", _FirstOfEach(1))
    return root


@pytest.fixture(scope="session")
def cifar10_files(tmp_path_factory):
    root = tmp_path_factory.mktemp("cifar10")
    _unpacked("cifar10-jpeg.tar.xz", root / "cifar10", _FirstOfEach(0))
    return root


def _fewer(monkeypatch, name):
    """Make a data set's facts match the number of images that the tests unpack."""
    row = catalogue.FACTS[name]
    few = replace(row, train=PER_CLASS["train"] * row.classes, test=PER_CLASS["test"] * row.classes)
    monkeypatch.setitem(catalogue.FACTS, name, few)


@pytest.fixture
def imagenette(imagenette_files, monkeypatch):
    """A few real images of each class of Imagenette-128, found by name."""
    _fewer(monkeypatch, "imagenette")
    monkeypatch.setenv("ATDIAG_DATA", str(imagenette_files))
    return imagenette_files / "imagenette"


@pytest.fixture
def cifar10(cifar10_files, monkeypatch):
    """A few real images of each class of CIFAR-10, found by name."""
    _fewer(monkeypatch, "cifar10")
    monkeypatch.setenv("ATDIAG_DATA", str(cifar10_files))
    return cifar10_files / "cifar10"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty folder of all data sets."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("ATDIAG_DATA", str(folder))
    return folder


@pytest.fixture
def server():
    """Run a server on this machine: it sends ``server.bodies[path]``, or that function's result for the request."""

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
    """Publish a data set on that server: (name, entries of its archive, images of each split)."""
    monkeypatch.setattr(download, "SCHEMES", ("http",))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def make(name, entries, train, test, **changes):
        content = entries if isinstance(entries, bytes) else publications.tar(entries)
        file = catalogue.FACTS[name].archive.url.rpartition("/")[2]
        server.bodies[f"/{file}"] = content
        url = f"http://127.0.0.1:{server.server_port}/{file}"
        archive = catalogue.Archive(url, len(content), hashlib.md5(content).hexdigest())
        row = replace(catalogue.FACTS[name], train=train, test=test, archive=archive, **changes)
        monkeypatch.setitem(catalogue.FACTS, name, row)
        return content

    return make
