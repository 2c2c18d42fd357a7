"""The README, the pages of docs/ and what they name: links, anchors, commands, figures, and what must be in a list."""

import functools
import re
import shlex
import tomllib
from pathlib import Path

import pytest

import atdiag
from atdiag.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
MADE = {"cli.md"}
"""Pages that are made when the site is built."""
SAMPLES = {"COMMAND", "finetune"}
"""Words in place of a command, and the command of the example in docs/extending.md."""

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = [re.sub(r"[`*]|\]\([^)]*\)|\[", "", found) for found in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@by_page
def test_every_link_and_anchor_leads_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)", without_code(page.read_text())):
        to = (page.parent / target).resolve() if target else page
        if to.name in MADE and to.parent == ROOT / "docs":
            continue
        assert to.exists(), target
        assert not anchor or anchor in anchors(to), f"{target}#{anchor}"
        assert to.is_relative_to(ROOT)


# --- commands ------------------------------------------------------------------------------------------------------


def typed(text: str) -> set[str]:
    """Return every command of atdiag in a page's blocks of code and in its running text."""
    blocks = re.findall(r"```(?:console)?\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\n {2,}--", " --", block).splitlines()]
    lines = [part.strip() for line in lines for part in line.removeprefix("$ ").split("&&")]
    found = [line.partition("  #")[0] for line in lines if re.match(r"atdiag [\w-]+(?!\w*:)", line)]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found += [" ".join(code.split()) for code in re.findall(r"`(atdiag [^`]+)`", prose)]
    return {line for line in found if line.split()[1].rstrip(":") == line.split()[1] not in SAMPLES}


@functools.cache
def parts():
    """Return the whole command line, and its context."""
    root = app.whole(app.app)
    return root, root.make_context("atdiag", [], resilient_parsing=True)


def parse(line: str) -> None:
    """Read a line as the command line does, without carrying it out; a command's bare name is only looked up."""
    command, context = parts()
    words = [word for word in shlex.split(line)[1:] if word not in ("--help", "--version", "...")]
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        name = words.pop(0)
        assert name in command.commands, f"there is no command {name!r}"
        command = command.commands[name]
        context = type(context)(command, parent=context, info_name=name)
    if words:
        command.make_context(context.info_name, words, parent=context.parent)


@by_page
def test_every_command_on_a_page_can_be_typed(page):
    for line in sorted(typed(page.read_text())):
        try:
            parse(line)
        except Exception as fault:
            message = fault.format_message() if hasattr(fault, "format_message") else str(fault)
            pytest.fail(f"{line}: {message}")


def test_wrong_commands_are_found():
    with pytest.raises(Exception, match="oops"):
        parse("atdiag reinit --oops 3")
    with pytest.raises(Exception, match="reinti"):
        parse("atdiag reinti")
    with pytest.raises(Exception, match="rgument"):
        parse("atdiag runs show 1a2b 3c4d 5e6f")
    assert typed("```console\n$ atdiag layers && atdiag rescue\n```\nand `atdiag runs\nlist`") == {
        *("atdiag layers", "atdiag rescue", "atdiag runs list")
    }


# --- figures -------------------------------------------------------------------------------------------------------


@by_page
def test_every_figure_has_the_command_that_made_it_beside_it(page):
    for section in re.split(r"^#+ ", page.read_text(), flags=re.MULTILINE):
        pictures = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", section)
        for told, picture in pictures:
            assert (page.parent / picture).exists(), picture
            assert told, f"{picture}: nothing for those who can't see it"
        commands = [line for line in typed(section) if line.split()[1] != "runs"]
        for script in re.findall(r"`python (?:-m )?([\w./]+)", section):
            path = ROOT / (script if script.endswith(".py") else script.replace(".", "/"))
            assert path.exists() or path.with_suffix(".py").exists() or not re.match("benchmarks[./][a-z]", script), (
                script
            )
            commands.append(script)
        assert not pictures or commands, f"no command beside {pictures}"


def test_every_picture_is_shown_on_a_page():
    shown = {
        (page.parent / picture).resolve()
        for page in PAGES
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text())
    }
    assert set((ROOT / "docs").rglob("*.png")) <= shown


# --- lists ---------------------------------------------------------------------------------------------------------


def test_every_experiment_is_in_the_overview():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["atdiag.ablations"]
    overview = (ROOT / "docs" / "experiments.md").read_text()
    assert [name for name in declared if f"`{name}`" not in overview] == []


def test_every_public_name_is_in_the_reference():
    shown = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    homes = [f"{atdiag._HOME[name]}.{name}" for name in atdiag.__all__ if name in atdiag._HOME]
    assert sorted(shown) == sorted(homes)


def test_the_site_fetches_nothing_from_another_host():
    settings = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in settings
    assert "http" not in settings + (ROOT / "docs" / "site.css").read_text()
