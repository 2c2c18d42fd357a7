"""The list of teachers."""

import json

from atdiag.networks.registry import teachers
from atdiag.networks.weights import loading
from tests.commands import ran


def test_teachers(folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("ATDIAG_CACHE", str(folder / "none"))  # whatever this machine has downloaded
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "none"))
    code, out = ran("teachers", "--json")
    rows = json.loads(out.splitlines()[-1])
    assert code == 0
    assert {row["name"] for row in rows} == set(teachers.registry())
    for row in rows:
        assert row.keys() >= {"name", "family", "size", "source", "licence", "components", "tokens", "available"}
        assert row["available"] == (row["name"] in teachers.miniatures() and loading.shipped_path(row["name"]).exists())
    clip = next(row for row in rows if row["name"] == "clip_b")
    assert (clip["tokens"], clip["available"]) == (26, True)
    assert clip["components"] == ["no_patch_bias", "pre_norm", "quick_gelu"]
    assert clip["top1"] > 70

    rows = json.loads(ran("teachers", "--json", "--profile", "paper")[1].splitlines()[-1])
    assert not any(row["available"] for row in rows)
    assert {row["licence"] for row in rows if row["name"].startswith(("mae", "mocov3"))} == {"CC-BY-NC-4.0"}
    assert next(row for row in rows if row["name"] == "clip_b")["tokens"] == 197

    out = ran("teachers", "--family", "clip")[1]
    assert "clip_b" in out
    assert "beitv2_b" not in out
    assert list(folder.iterdir()) == []
