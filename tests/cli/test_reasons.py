"""Error messages give the true reason, and name the file or setting at fault."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file

from atdiag.cli import experiments
from atdiag.core.errors import UserError
from atdiag.networks.weights import files, formats
from atdiag.networks.weights.sources import WeightsError
from tests.commands import wrong

MODEL = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def state():
    return timm.create_model(MODEL).state_dict()


@pytest.mark.parametrize("prefix", ["net.backbone.", "_orig_mod.module.", "encoder.vit."])
def test_an_unknown_prefix_hides_no_network(state, prefix):
    found = formats.convert({"state_dict": {prefix + key: value for key, value in state.items()}})
    assert found.state.keys() == state.keys()
    assert found.branch == f"state_dict: {prefix}*"


def test_two_networks_under_unknown_prefixes_are_listed(state):
    both = {f"{prefix}{key}": value for prefix in ("left.", "right.") for key, value in state.items()}
    with pytest.raises(WeightsError, match=r"2 networks, .*'left\.', 'right\.'"):
        formats.convert(both)


def test_a_path_may_contain_a_comma(tmp_path):
    file = tmp_path / "a, b,c.safetensors"
    file.touch()
    whole = f"timm:{MODEL}@{file}"
    assert experiments.references(f"clip_b,{whole},deit_b") == ("clip_b", whole, "deit_b")
    assert experiments.references(whole) == (whole,)
    assert experiments.references("clip_b, deit_b,clip_b") == ("clip_b", "deit_b")
    for typed in ("clip_b,", ",clip_b", "clip_b,,deit_b"):
        with pytest.raises(UserError, match=r"has a comma too many: type clip_b"):
            experiments.references(typed)
    assert experiments.references("x@/no/a,b") == ("x@/no/a", "b")
    assert experiments.references(f"clip_b,{file},deit_b") == ("clip_b", str(file), "deit_b")


def test_files_that_are_no_weights_are_identified(tmp_path):
    (tmp_path / "empty.pth").touch()
    (tmp_path / "index.json").write_text(json.dumps({"metadata": {}, "weight_map": {}}))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 768}))
    for name, says in (("empty.pth", "empty"), ("index.json", "index of shards"), ("config.json", "neither")):
        with pytest.raises(WeightsError, match=says):
            files.check(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("reinit --set lr=1e-3", "did you mean 'recipe.lr'?"),
        ("reinit --set image_size=96", "did you mean 'data.image_size'?"),
        ("reinit --set epocs=1", "'epocs' is not a setting"),
    ],
)
def test_a_setting_without_its_section_gets_a_suggestion(tmp_path, monkeypatch, capsys, line, says):
    monkeypatch.chdir(tmp_path)
    assert says in wrong(capsys, *line.split())


@pytest.mark.parametrize(
    ("content", "line", "named"),
    [
        ("[recipe]\nbatch_size = 100000\n", "reinit --dry-run", True),
        ('[recipe]\nlr = "x"\n', "reinit --dry-run", True),
        ("[recipe]\nlr = 1e-3\n", "reinit --dry-run --set recipe.epochs=0", False),
    ],
)
def test_errors_in_the_settings_file_name_it(tmp_path, monkeypatch, capsys, content, line, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "atdiag.toml").write_text(content)
    assert wrong(capsys, *line.split()).startswith("atdiag.toml: ") == named


def test_no_hash_is_suggested(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "0123456789abcdef"
    run.mkdir(parents=True)
    (run / "spec.json").write_text("{}")
    for line in ("runs show 0123456789abcdee", "maps 0123456789abcdee --out out"):
        said = wrong(capsys, *line.split())
        assert "did you mean" not in said and "0123456789abcdee" in said


def test_a_closed_pipe_is_no_error():
    code = f"exec {sys.executable} -m atdiag teachers --profile paper --json"
    done = subprocess.run(["bash", "-c", f"({code}) | head -c 1"], capture_output=True, text=True, check=False)
    assert done.stdout == "[" and done.stderr == ""


def test_weights_of_a_fine_tuned_file_are_read(state, tmp_path):
    save_file({f"net.{key}": value for key, value in state.items()}, tmp_path / "mine.safetensors")
    found = formats.convert(files.read(tmp_path / "mine.safetensors"))
    assert torch.equal(found.state["cls_token"], state["cls_token"])
