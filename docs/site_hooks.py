"""What the documentation site adds to the pages of docs/: the command line, the experiments, and files beside docs/.

A hook of MkDocs (``hooks`` in mkdocs.yml). It reads the commands and the papers' claims from the installed package, so
nothing that it writes is committed, and nothing can be out of date.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from ablations import claims
from atdiag.cli import app as commands
from atdiag.study import registry

ROOT = Path(__file__).parents[1]
BESIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "LICENSE": "LICENSE.txt",
    "examples/atdiag.ipynb": "examples/atdiag.ipynb",
    "examples/hooks.ipynb": "examples/hooks.ipynb",
}
"""Files outside docs/ that belong to the site, and where they are in it."""

Command = Any  # a click command: typer has its own copy of click in some versions


# --- events of MkDocs ----------------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add a page for each experiment to the navigation, below the overview of them."""
    for entry in config.nav or []:
        for title, pages in entry.items():
            if title == "Experiments":
                pages.extend({one.name: f"experiments/{one.name}.md"} for one in _ablations())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files beside docs/, the command line's reference, and a page for each experiment that has none."""
    for source, target in BESIDE.items():
        path = ROOT / source
        if target.endswith(".md"):
            files.append(File.generated(config, target, content=_moved(path.read_text(), "")))
        else:
            files.append(File.generated(config, target, abs_src_path=str(path)))
    files.append(File.generated(config, "cli.md", content="\n".join(_cli())))
    for one in _ablations():
        if files.get_file_from_path(page := f"experiments/{one.name}.md") is None:
            files.append(File.generated(config, page, content="\n".join(_experiment(one))))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Add options and claims to an experiment's page; point links to files outside docs/ at their place in the site."""
    path = page.file.src_uri
    if path.startswith("experiments/"):
        markdown = "\n".join([markdown, *_of_experiment(Path(path).stem)])
    return _moved(markdown, "../" * path.count("/"))


# --- files beside docs/ --------------------------------------------------------------------------------------------


def _moved(markdown: str, up: str) -> str:
    """Return a page whose links lead to places in the site; ``up`` leads from its folder to that of the site."""
    for source, target in BESIDE.items():
        markdown = re.sub(rf"\]\((?:\.\./)*{re.escape(source)}(#[^)]*)?\)", rf"]({up}{target}\1)", markdown)
    markdown = re.sub(r"\]\((?:\.\./)*README\.md(#[^)]*)?\)", rf"]({up}index.md)", markdown)
    return re.sub(r"\]\(docs/", f"]({up}", markdown)


# --- the command line ----------------------------------------------------------------------------------------------


def _ablations() -> list[registry.Installed]:
    """Return the ablations of atdiag itself: a site built beside other packages does not show theirs."""
    return [one for one in registry.installed() if one.source.startswith("ablations.") and one.function is not None]


def _root() -> tuple[Command, Any]:
    """Return the whole command line, and its context."""
    root = commands.whole(commands.app)
    return root, root.make_context("atdiag", [], resilient_parsing=True)


def _walk(command: Command, context: Any) -> Iterator[tuple[Command, Any]]:
    """Yield every command that does something, with its context, in the order of ``--help``."""
    names = command.list_commands(context) if hasattr(command, "list_commands") else ()
    if not names or getattr(command, "invoke_without_command", False):
        yield command, context
    for name in names:
        below = command.get_command(context, name)
        yield from _walk(below, type(context)(below, parent=context, info_name=name))


def _options(command: Command, context: Any) -> dict[str, tuple[str, str]]:
    """Return, for each option and argument of a command, how it is typed and what it does."""
    found = {}
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record and not getattr(parameter, "hidden", False):
            found[parameter.name] = (_code(record[0]), _text(record[1]))
    return found


def _common() -> dict[str, tuple[str, str]]:
    """Return the options that all experiments have, with the same words."""
    root, context = _root()
    tables = [
        _options(command := root.get_command(context, one.name), type(context)(command, parent=context))
        for one in _ablations()
    ]
    return {name: row for name, row in tables[0].items() if all(table.get(name) == row for table in tables)}


def _cli() -> Iterator[str]:
    """Yield the lines of the reference."""
    root, above = _root()
    common, experiments = _common(), {one.name for one in _ablations()}
    yield "# Command line\n"
    yield f"{_text(root.help or '')}\n"
    yield "This page is made from the commands when the site is built. `atdiag COMMAND --help` says the same.\n"
    yield "## Options of every experiment\n"
    yield from _list(common)
    for command, context in _walk(root, above):
        yield f"\n## {context.command_path}\n"
        yield f"{_text(command.help or '')}\n"
        yield "```\n" + " ".join([context.command_path, *command.collect_usage_pieces(context)]) + "\n```\n"
        options = _options(command, context)
        if context.info_name in experiments and context.parent is above:
            yield from _list({name: row for name, row in options.items() if name not in common})
            yield "\nand the [options of every experiment](#options-of-every-experiment).\n"
        else:
            yield from _list(options)


def _experiment(one: registry.Installed) -> Iterator[str]:
    """Yield a page on an experiment that has none of its own: its module's docstring, and its row in the overview."""
    headline, _, about = (inspect.getdoc(inspect.getmodule(one.function)) or one.name).partition("\n")
    row = re.search(
        rf"^\| `{one.name}` \| (.*?) \| (.*?) \|$", (ROOT / "docs/experiments.md").read_text(), re.MULTILINE
    )
    yield f"# {one.name}\n\n{headline}\n{about}\n"
    yield f"```console\n$ atdiag {one.name}\n$ atdiag {one.name} --dry-run\n```\n"
    if row:
        arms, question = (text.replace("](", "](../") for text in row.groups())
        yield f"**Arms:** {arms}.\n\n**Question:** {question}\n"


def _of_experiment(name: str) -> Iterator[str]:
    """Yield what an experiment's page ends with: its own options, and what the papers claim about it."""
    root, context = _root()
    command = root.get_command(context, name)
    common = _common()
    own = _options(command, type(context)(command, parent=context, info_name=name))
    yield "\n## Its options\n"
    yield from _list({key: row for key, row in own.items() if key not in common})
    yield "\nand the [options of every experiment](../cli.md#options-of-every-experiment).\n"
    stated = claims._all().get(name, ())
    if stated:
        yield "\n## What the papers claim\n"
        yield "`atdiag reproduce` judges these claims ([results at profile mini](../results.md)).\n"
        yield "| claim | in a sentence | the paper's numbers | source |\n| --- | --- | --- | --- |"
        for claim in stated:
            yield f"| {claim.name} | {_text(claim.text)} | {_text(claim.paper)} | {_text(claim.source)} |"


def _list(rows: dict[str, tuple[str, str]]) -> Iterator[str]:
    """Yield a list of definitions, which is readable at any width."""
    for typed, does in rows.values():
        yield f"{typed}\n:   {does}\n"


def _code(text: str) -> str:
    return f"`{text}`"


def _text(text: str) -> str:
    """Return plain text as Markdown, for a cell of a table or a paragraph."""
    text = re.sub(r"\s*\[x>=\d+\]", "", text)  # a lower limit, which a wrong value is told anyway
    return re.sub(r"([<>|*_])", r"\\\1", text.strip()).replace("\\<", "&lt;").replace("\\>", "&gt;")
