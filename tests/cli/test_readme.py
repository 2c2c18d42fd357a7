"""Every command in the README and in some pages of docs/ runs; that those of all pages parse is in test_pages.py."""

import re
from pathlib import Path

import pytest

from atdiag.networks.registry import teachers
from atdiag.networks.weights import loading
from atdiag.study import profiles
from atdiag.study.registry import installed
from tests.commands import ran

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = ("README.md", "design.md", "diagnose.md", "experiments.md", "index.md", "looking-inside.md", "published.md")
SHOWN += ("results.md", "transfer.md")
"""Pages whose every command is run here; those on faults, data, GPUs and one's own files need what is not here."""


def typed() -> list[str]:
    """Return every command in the console blocks of these pages."""
    text = "\n".join(page.read_text() for page in PAGES if page.name in SHOWN)
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip().startswith("atdiag")]


def test_the_readme_has_commands():
    assert {"atdiag reinit --module attn --teacher clip_b", "atdiag rescue --teacher clip_b"} <= set(typed())


@pytest.mark.parametrize("line", sorted(set(typed())))
def test_every_line_of_the_readme_runs(line, folder, pictures):
    words = line.split()[1:]
    if words[0] == "pretrain":
        words = ["pretrain", "--help"]
    elif words[0] == "figures":  # needs finished runs; tests/cli/test_reproduce.py runs it
        words = ["figures", "--help"]
    elif words[0] in (*(one.name for one in installed()), "reproduce", "diagnose"):
        words += [] if "--dry-run" in words else ["--dry-run"]
        names = words[words.index("--teacher") + 1] if "--teacher" in words else "dinov2_s"
        missing = [name for name in names.split(",") if not loading.shipped_path(name).exists()]
        if "paper" not in words and missing:
            pytest.skip(f"the miniature of {missing[0]} is not here")
    elif words[0] in ("similarity", "intervene", "attention-stats", "maps"):
        words += ["--out", str(folder.parent / "elsewhere")]
        if "--images" not in words:
            words += ["--images", "4"]
    elif words[0] == "cost":
        words += ["--repeats", "0", "--out", str(folder.parent / "elsewhere")]  # counts alone: measuring takes minutes
    code, out = ran(*words)
    complete = all(loading.shipped_path(name).exists() for name in teachers.miniatures())
    assert code == 0 or (words == ["doctor"] and not complete)
    assert out
    assert list(folder.iterdir()) == []


def test_the_readme_is_short():
    assert len(README.split()) <= 1600
    assert len(README.splitlines()) <= 200


def test_the_profile_is_printed():
    for name in profiles.PROFILES:
        assert f"`{name}`" in README
