"""Malformed or oversized input is refused in one line, before memory is allocated and without running its code."""

import io
import json
import pickle
import resource
import struct
import subprocess
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from atdiag.core import resources
from atdiag.core.errors import UserError
from atdiag.core.runs import DamagedRunError, Run, Store
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed
from atdiag.data import sources
from atdiag.data.decoding import BrokenImageError, decode
from atdiag.networks.model.vit import ViT
from atdiag.networks.weights import files
from atdiag.networks.weights.sources import WeightsError
from atdiag.study.settings import resolve
from atdiag.training import checkpoint, predictions

NETWORK = Network(image_size=20, patch_size=4, channels=1, width=16, depth=2, heads=2, classes=10)
SPEC = RunSpec(network=NETWORK, data=Data(train=32), recipe=Recipe(epochs=1), seed=Seed(data=0, model=0))


@pytest.fixture
def run(tmp_path) -> Run:
    return Store(tmp_path / "runs").create(SPEC)


@pytest.fixture(autouse=True)
def little_memory():
    """Limit memory to some gigabytes, so that a larger allocation fails its test with a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:  # noqa: PTH123
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 3 * 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# --- Specs and settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["width", "depth", "heads", "classes", "channels", "registers", "image_size"])
def test_a_spec_of_an_absurd_network_is_damaged(run, field):
    document = json.loads((run.path / "spec.json").read_text())
    document["network"][field] = 10**9
    (run.path / "spec.json").write_text(json.dumps(document))
    with pytest.raises(DamagedRunError, match="is damaged"):
        _ = Run(run.path).spec


@given(st.integers(1, 64), st.integers(1, 1024), st.sampled_from([0.5, 4.0]), st.integers(1, 50))
def test_the_number_of_parameters_is_computed_in_advance(heads, depth, ratio, classes):
    network = Network(image_size=8, patch_size=4, width=64 * heads, depth=depth, heads=heads, classes=classes)
    network = network.model_copy(update={"mlp_ratio": ratio})
    small = network.model_copy(update={"depth": 2})
    with torch.device("meta"):
        real = sum(p.numel() for p in ViT(small).parameters())
    assert 0.6 * real < small.parameters < 1.6 * real
    assert network.parameters > 0


def test_a_network_that_does_not_fit_is_refused_before_it_is_built(monkeypatch):
    with pytest.raises(UserError, match=r"weights of a network of width 131072 take [\d,.]+ GiB of memory"):
        ViT(NETWORK.model_copy(update={"width": 2**17, "depth": 1000}))
    monkeypatch.setattr(resources, "memory", lambda: None)
    resources.room(1e30, "where the system does not say, nothing")


def test_scenes_that_do_not_fit_are_refused():
    for data in (Data(train=10**12), Data(train=10, test_per_source=10**10)):
        with pytest.raises(UserError, match=r"images of digits take .* GiB of memory.*: make `data.train`"):
            sources.find(data).check(data, NETWORK)


def test_a_huge_or_endless_settings_file_is_refused(tmp_path):
    path = tmp_path / "atdiag.toml"
    with path.open("wb") as file:
        file.truncate(2**40)  # a sparse terabyte
    with pytest.raises(UserError, match="larger than 16 MiB"):
        resolve(folder=tmp_path, environment={})


@pytest.mark.parametrize("name", ["result.json", "failure.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", ["{", "[" * 100_000, "nul\0", "[1, 2]x", "9" * 5000])
def test_run_files_with_invalid_json_are_damaged(run, name, content):
    (run.path / name).write_text(content)
    read = {"result.json": run.result, "failure.json": run.failure, "metrics.jsonl": run.progress}[name]
    with pytest.raises(DamagedRunError, match="is damaged"):
        read()


def test_a_terabyte_of_json_is_refused(run):
    with (run.path / "result.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DamagedRunError, match="larger than"):
        run.result()


# --- Weights and checkpoints ------------------------------------------------------------------------------------------


def header(length: int, text: bytes) -> bytes:
    return struct.pack("<Q", length) + text


@pytest.mark.parametrize(
    "content",
    [
        header(2**63, b"{}"),
        header(90_000_000, b"{}"),
        header(60, b'{"a":{"dtype":"F32","shape":[999999999999],"data_offsets":[0,3999999999996]}}'),
        header(2, b"{}"),
        b"",
        b"PK\x03\x04" + bytes(50),
        pickle.dumps(print),
    ],
    ids=["2^63", "90 MB", "shape", "empty header", "empty", "zip", "pickle"],
)
def test_files_that_are_no_weights_are_refused(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError):
        files.tensors(path)


WEIGHTS = save({"a": torch.arange(12.0), "b": torch.ones(2, 3)}, {"run": "x"})


def _checkpoint() -> bytes:
    buffer = io.BytesIO()
    state = checkpoint.Checkpoint(3, {"w": torch.ones(4)}, {"state": {}}, 1.5, [{"step": 1}])
    torch.save(vars(state), buffer)
    return buffer.getvalue()


CHECKPOINT = _checkpoint()


def flipped(content: bytes, flips: list[tuple[int, int]], cut: int | None) -> bytes:
    out = bytearray(content)
    for place, bit in flips:
        out[place % len(out)] ^= 1 << bit
    return bytes(out[: len(out) if cut is None else cut % len(out)])


FLIPS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), max_size=4)
CUT = st.none() | st.integers(0, 10**6)


@given(FLIPS, CUT)
def test_flipped_weights_are_read_or_refused(tmp_path_factory, flips, cut):
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(flipped(WEIGHTS, flips, cut))
    try:
        found = files.tensors(path)
    except WeightsError as fault:
        assert len(str(fault).splitlines()) == 1
    else:
        assert sum(tensor.numel() for tensor in found.values()) <= 100


@given(FLIPS, CUT)
def test_a_flipped_checkpoint_is_the_same_or_refused(tmp_path_factory, flips, cut):
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.write_bytes(flipped(CHECKPOINT, flips, cut))
    try:
        found = checkpoint.read(path)
    except ValueError as fault:
        assert len(str(fault).splitlines()) == 1
    else:  # flips that cancel, or lie in bytes of the archive that don't matter
        assert (found.step, found.metrics, found.seconds) == (3, [{"step": 1}], 1.5)
        assert torch.equal(found.student["w"], torch.ones(4))


def test_a_decompression_bomb_as_checkpoint_is_refused(tmp_path):
    path = tmp_path / "bomb"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    with pytest.raises(ValueError, match="can't be read"):
        checkpoint.read(path)


# --- Predictions ------------------------------------------------------------------------------------------------------


def npz(shape="(4,)", descr="<i4", body=bytes(16), declared=None) -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    entry = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("label.npy", entry)
    return buffer.getvalue()


def test_valid_predictions_are_read(tmp_path):
    path = tmp_path / "p.npz"
    path.write_bytes(npz())
    assert predictions.arrays(path)["label"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "content",
    [
        npz(shape="(1000000000000,)"),
        npz(shape="(-4,)"),
        npz(shape="(2, 2"),
        npz(shape="__import__('os').getpid()"),
        npz(descr="|O", body=pickle.dumps([print] * 4)),
        npz(body=bytes(15)),
        npz(body=bytes(17)),
        npz(shape="(2000000000,)", body=zlib.compress(b"")),
        b"PK\x05\x06" + bytes(18),
        b"",
    ],
)
def test_predictions_with_false_headers_are_refused(run, content):
    run.predictions.write_bytes(content)
    run.finish({"top1": 0.0})
    with pytest.raises(DamagedRunError, match="is damaged"):
        predictions.correct(run)


@given(FLIPS, CUT)
def test_flipped_predictions_are_the_same_or_refused(tmp_path_factory, flips, cut):
    path = tmp_path_factory.getbasetemp() / "flipped.npz"
    buffer = io.BytesIO()
    np.savez_compressed(buffer, label=np.arange(50))
    path.write_bytes(flipped(buffer.getvalue(), flips, cut))
    try:
        found = predictions.arrays(path)
    except ValueError as fault:
        assert len(str(fault).splitlines()) == 1
    else:
        assert all(np.array_equal(array, np.arange(50)) for array in found.values())


# --- Images -----------------------------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    about = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", about) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_an_image_bomb_is_a_broken_image(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(60_000, 60_000))
    with pytest.raises(BrokenImageError, match="DecompressionBombError"):
        decode(path)


def test_no_program_is_started_for_an_image(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")
    path = tmp_path / "photo.jpg"
    path.write_bytes(buffer.getvalue())
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("Ghostscript was called"))
    with pytest.raises(BrokenImageError, match="not an image of a known format"):
        decode(path)


def test_the_source_never_unpickles_or_unpacks_unguarded():
    """No unguarded call that could run a file's code or write outside a folder.

    One module unpacks tar archives (of data sets that the user requests), file by file and under names of its own;
    another reads images inside them.
    """
    import ast
    from pathlib import Path

    root = Path(__file__).parents[2]
    for path in (p for package in ("atdiag", "ablations", "figures") for p in (root / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert call not in ("pickle.load", "pickle.loads", "eval", "exec"), path
            assert not call.endswith((".extractall", ".extract", "unpack_archive")), path
            if call.startswith("tarfile.") or call.endswith(".extractfile"):
                assert path.relative_to(root).as_posix() in ("atdiag/data/archives.py", "atdiag/data/tars.py"), path
            if call == "ReaderImageInTar":  # it would unpickle a file beside the tars
                assert given["cache_tarinfo"] == "False", path
            if call == "torch.load":
                assert given["weights_only"] == "True", path
            if call in ("np.load", "numpy.load"):
                assert given["allow_pickle"] == "False", path
            if call == "Image.open":
                assert "formats" in given or path.name == "corruptions.py", path  # which reads what it wrote
