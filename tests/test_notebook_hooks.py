"""The notebook on hooks runs, on a miniature, and on the real ViT-Ti where the test data is available."""

import ast
import json
import os
import zipfile
from pathlib import Path

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "hooks.ipynb"
REAL = Path(os.environ.get("ATDIAG_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
FILE, PHOTOS = REAL / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors", REAL / "imagenette-128.zip"


def cells():
    found = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    real = FILE.exists() and PHOTOS.exists()
    if real:
        (tmp_path / "vit_tiny.safetensors").symlink_to(FILE)
        (tmp_path / "photos").mkdir()
        with zipfile.ZipFile(PHOTOS) as archive:
            names = [name for name in sorted(archive.namelist()) if "/val/" in name and not name.endswith("/")]
            for i, name in enumerate(names[::700][:5]):
                (tmp_path / "photos" / f"{i}.jpg").write_bytes(archive.read(name))
    space = {}
    for source in cells():
        ast.parse(source)
        exec(compile(source, str(NOTEBOOK), "exec"), space)
    matplotlib.pyplot.close("all")
    said = capsys.readouterr().out
    assert "[batch, head, query, key]" in said and space["effect"].shape == (12, 2)
    assert space["attrs"].shape[0] in (25, 37)
    assert ("HookedViT(vit_tiny" in said) == real


@pytest.mark.parametrize("word", ["run_with_cache", "run_with_hooks", "logit_attrs", "get_act_patch_attn_head"])
def test_the_notebook_shows(word):
    assert word in "".join(cells())
