"""Experiments of other packages."""

import re
import signal
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated

import pytest
import typer

from atdiag.cli import app, experiments
from atdiag.core.runs import Store
from atdiag.study import registry
from atdiag.study.builder import Lab
from atdiag.study.protocol import BASELINE, Contrast, Study
from tests.studies import finished, lab


def warmup(
    lab: Lab,
    teacher: Annotated[str, typer.Option(help="The teacher.")] = "clip_b",
    blocks: Annotated[int, typer.Option("--blocks", help="How many.")] = 3,
) -> Study:
    """Copy the attention of the first blocks."""
    source = lab.teacher(teacher)
    student = lab.student(source)
    passed = lab.arm("first", student, source, transfer=lab.transfer("copy", student, range(blocks)))
    return Study(
        ablation="warmup",
        teacher=source,
        options={"blocks": str(blocks)},
        arms=(lab.baseline(source), passed),
        contrasts=(Contrast("first minus scratch", {"first": 1, BASELINE: -1}),),
        verdict=lambda report: "",
    )


def readme_example() -> dict:
    """Return the module shown in docs/extending.md."""
    text = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    module: dict = {}
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    [example] = [example for example in examples if "def finetune" in example]
    exec(example, module)
    return module


@pytest.fixture
def installed(monkeypatch, capsys, tmp_path):
    """Install one foreign experiment; return a function from a command to its exit code, output and errors."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)

    def install(name, function):
        monkeypatch.setattr(EntryPoint, "load", lambda entry: function)
        monkeypatch.setattr(registry, "_entries", lambda: [EntryPoint(name, "theirs:it", registry.GROUP)])
        monkeypatch.setattr(app, "app", typer.Typer(cls=app._Commands))
        app.app.command()(app.doctor.doctor)  # a second command, since typer treats a single one differently

        def run(*arguments):
            with pytest.raises(SystemExit) as end:
                app.main([name, *arguments])
            return (end.value.code or 0, *capsys.readouterr())

        return run

    yield install
    signal.signal(signal.SIGTERM, before)


def test_an_experiment_of_another_package_is_a_command(installed, tmp_path):
    run = installed("warmup", warmup)
    code, out, _ = run("--help")
    assert code == 0
    assert all(text in out for text in ("Copy the attention of the first blocks.", "--blocks", "--dry-run", "--seeds"))
    code, out, _ = run("--blocks", "2", "--seeds", "1", "--dry-run")
    assert code == 0
    assert "atdiag warmup: clip_b (mini)" in out
    assert "2 runs, 2 to do" in out
    code, out, err = run("--blocks", "13")
    assert (code, out) == (2, "")
    assert "out of range: the network has 12 blocks" in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_experiment_that_can_not_be_loaded_disables_no_other(monkeypatch, capsys):
    entries = [
        EntryPoint("broken", "nowhere_at_all:it", "atdiag.ablations"),
        EntryPoint("reinit", "theirs:it", "atdiag.ablations"),
        EntryPoint("runs", "theirs:it", "atdiag.ablations"),
        EntryPoint("reinit", "ablations.reinit:reinit", "atdiag.ablations"),
    ]
    monkeypatch.setattr(registry, "_entries", lambda: entries)
    app = typer.Typer()
    experiments.add_commands(app)
    assert [command.callback.__name__ for command in app.registered_commands] == ["reinit"]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 3
    assert any("'broken' of nowhere_at_all:it can't be loaded (ModuleNotFoundError" in line for line in warnings)
    assert sum("that name is taken" in line for line in warnings) == 2


def test_the_readmes_experiment_is_a_command(installed, tmp_path):
    run = installed("finetune", readme_example()["finetune"])
    assert "--teacher" in run("--help")[1]
    code, out, err = run("--teacher", "beitv2_b", "--seeds", "2", "--dry-run")
    assert (code, err) == (0, "")
    assert "atdiag finetune: beitv2_b (mini)" in out
    assert "5 runs, 5 to do" in out
    study = readme_example()["finetune"](lab(), "beitv2_b")
    right = {arm.name: [20, 30] for arm in study.arms} | {"teacher": [36]}
    assert "Fine-tuning beitv2_b (mini) " in finished(study, Store(tmp_path), right).verdict
