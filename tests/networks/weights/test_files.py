"""Damaged and unrelated files are refused in one line before anything in them is used."""

import argparse
import json
import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as to_safetensors
from safetensors.torch import save_file

from atdiag.networks.weights import files
from atdiag.networks.weights.sources import WeightsError

TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5)}


def refused(path):
    with pytest.raises(WeightsError) as fault:
        files.read(path)
    said = str(fault.value)
    assert str(path) in said
    assert "\n" not in said
    return said


@pytest.fixture(params=["x.safetensors", "x.pth", "old.pt"])
def good(request, tmp_path):
    path = tmp_path / request.param
    if path.suffix == ".safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=path.stem != "old")
    return path


def test_written_files_are_read_back(good):
    kinds = {"x.safetensors": "safetensors", "x.pth": "zip", "old.pt": "pickle"}
    assert files.check(good) == kinds[good.name]
    assert {key: value.tolist() for key, value in files.read(good).items()} == {
        key: value.tolist() for key, value in TENSORS.items()
    }


def test_the_file_type_is_determined_by_content_not_name(good, tmp_path):
    other = tmp_path / "weights.bin"
    other.write_bytes(good.read_bytes())
    assert files.check(other) == files.check(good)
    assert set(files.read(other)) == set(TENSORS)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(good, share):
    whole = good.read_bytes()
    good.write_bytes(whole[: int(share * len(whole))])
    said = refused(good)
    assert "truncated" in said or "damaged" in said


@given(length=st.integers(0, 400))
def test_no_prefix_of_a_safetensors_file_is_accepted(length, tmp_path_factory):
    whole = to_safetensors(TENSORS)
    path = tmp_path_factory.mktemp("cut") / "x.safetensors"
    path.write_bytes(whole[: min(length, len(whole) - 1)])
    refused(path)


def test_bytes_outside_the_header_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(to_safetensors(TENSORS) + b"more")
    assert "asks for" in refused(path)


def test_a_header_that_declares_terabytes_allocates_nothing(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "truncated" in refused(path)
    path.write_bytes((2**60).to_bytes(8, "little") + header)
    assert "its header should be" in refused(path)


def test_a_decompression_bomb_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    assert "compressed archive" in refused(path)


class Evil:
    """An object that creates a file if it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_with_code_is_named_and_never_run(new, tmp_path):
    path, mark = tmp_path / "x.pth", tmp_path / "mark"
    torch.save({"state_dict": TENSORS, "extra": Evil(mark)}, path, _use_new_zipfile_serialization=new)
    said = refused(path)
    assert "posix.system" in said or "nt.system" in said
    assert "save its state dict alone" in said
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_bare_pickle_with_code_is_never_run(protocol, tmp_path):
    path, mark = tmp_path / "x.pth", tmp_path / "mark"
    path.write_bytes(pickle.dumps(Evil(mark), protocol=protocol))
    refused(path)
    assert not mark.exists()


def test_pickled_argument_namespaces_are_harmless(tmp_path):
    torch.save({"model": TENSORS, "args": argparse.Namespace(lr=0.1)}, tmp_path / "x.pth")
    assert files.read(tmp_path / "x.pth")["args"].lr == 0.1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty (0 bytes)"),
        (b"hello", "neither a safetensors file nor"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 100, "neither a safetensors file nor"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        (b"\x80\x02K\x05.", "truncated or damaged"),
        (b"PK\x03\x04" + b"\0" * 60, "truncated or damaged"),
    ],
)
def test_other_file_types_are_named(content, said, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    assert said in refused(tmp_path / "x.pth")


def test_a_checkpoint_that_is_no_dictionary_is_refused(tmp_path):
    torch.save(torch.ones(3), tmp_path / "x.pth")
    assert "holds a Tensor" in refused(tmp_path / "x.pth")
