"""Every command in the README runs."""

import re
from pathlib import Path

import pytest

from atdiag.networks.registry import teachers
from atdiag.networks.weights import loading
from atdiag.study import profiles
from tests.commands import LINES, ran

README = (Path(__file__).parents[2] / "README.md").read_text()


def typed() -> list[str]:
    """Return every command in the README's console blocks."""
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip().startswith("atdiag")]


def test_the_readme_has_commands():
    assert {"atdiag reinit --module attn --teacher clip_b", "atdiag rescue --teacher clip_b"} <= set(typed())


@pytest.mark.parametrize("line", sorted(set(typed())))
def test_every_line_of_the_readme_runs(line, folder):
    words = line.split()[1:]
    if words[0] == "pretrain":
        words = ["pretrain", "--help"]
    elif words[0] == "figures":  # needs finished runs; tests/cli/test_reproduce.py runs it
        words = ["figures", "--help"]
    elif words[0] in (*LINES, "benchmark", "reproduce"):
        words += [] if "--dry-run" in words else ["--dry-run"]
        name = words[words.index("--teacher") + 1] if "--teacher" in words else "dinov2_s"
        if "paper" not in words and not loading.shipped_path(name).exists():
            pytest.skip(f"the miniature of {name} is not here")
    elif words[0] in ("similarity", "intervene", "attention-stats", "maps"):
        words += ["--out", str(folder.parent / "elsewhere")]
        if "--images" not in words:
            words += ["--images", "4"]
    code, out = ran(*words)
    complete = all(loading.shipped_path(name).exists() for name in teachers.miniatures())
    assert code == 0 or (words == ["doctor"] and not complete)
    assert out
    assert list(folder.iterdir()) == []


def test_the_profile_is_printed():
    for name in profiles.PROFILES:
        assert f"`{name}`" in README
