"""The commands hooks and patch: what they print and write, and wrong input."""

import json
from pathlib import Path

import pandas as pd
import pytest

from atdiag import hooked
from tests.commands import atdiag, wrong

pytestmark = pytest.mark.usefixtures("at_tmp_path")


def narrow(out):
    return all(len(line) <= 80 for line in out.splitlines() if not line.startswith(("  results", "{")))


def test_hooks_lists_every_point_with_its_shape():
    out = atdiag("hooks", "dinov2_reg_s", "--json")
    document = json.loads(out.splitlines()[-1])
    assert narrow(out)
    listed = {}
    for row in document["points"]:
        for name in [f"blocks.{i}.{row['name']}" for i in row["blocks"]] if row["blocks"] else [row["name"]]:
            listed[name] = tuple(row["shape"])
    model = hooked("dinov2_reg_s")
    assert listed == model.shapes
    why = {row["name"]: row["why"] for row in document["missing"]}
    assert why["attn.hook_rot_q"] == "it has no rotary embedding" and "hook_registers" not in why
    assert "blocks.{l}.attn.hook_pattern" in out and "map" in out
    assert list(Path().iterdir()) == []


def test_patch_writes_table_document_and_heat_map():
    options = ("--what", "pattern", "--by", "head", "--layers", "0,11", "--images", "6")
    out = atdiag("patch", "deit_s", "dinov2_s", *options, "--json")
    document = json.loads(out.splitlines()[-1])
    assert narrow(out) and len(document["rows"]) == 4
    assert document["what"] == "pattern" and document["images"] == 6
    assert sorted(Path(path).suffix for path in document["files"]) == [".csv", ".json", ".pdf", ".png"]
    frame = pd.read_csv(next(path for path in document["files"] if path.endswith(".csv")))
    assert list(frame["layer"]) == [0, 0, 11, 11] and (frame.ci_low <= frame.change).all()


def test_patch_with_other_images_and_by_layer():
    options = ("--images", "0-3", "--from-images", "4-7", "--by", "layer", "--what", "residual", "--measure", "top1")
    out = atdiag("patch", "deit_s", "deit_s", *options, "--layers", "0,5")
    assert "resid_post" in out and len(list(Path("results/patch").glob("*.png"))) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("hooks deit_t", "no teacher"),
        ("patch deit_s deit_s", "--from-images"),
        ("patch deit_s deit_b", "3 heads"),
        ("patch deit_s dinov2_s --what patern", "did you mean 'pattern'"),
        ("patch deit_s dinov2_s --what resid_pre", "--by position or layer"),
        ("patch deit_s dinov2_s --by haed", "did you mean 'head'"),
        ("patch deit_s dinov2_s --measure acc", "margin, top1, loss"),
        ("patch deit_s deit_s --images 0-3 --from-images 4-6", "4 images and 3"),
        ("patch deit_s dinov2_s --layers 12", "12"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(arguments, says, capsys):
    assert says in wrong(capsys, *arguments.split())
    assert list(Path().rglob("*.*")) == []
