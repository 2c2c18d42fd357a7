"""Library messages on the command line: arguments in backticks are spelled as options."""

from functools import partial

import pytest

from ablations.reinit import reinit
from atdiag.cli import app
from atdiag.cli.experiments import spread
from atdiag.cli.messages import as_typed
from atdiag.core import errors
from atdiag.execution import run
from atdiag.study import settings
from atdiag.study.builder import Lab
from tests.commands import wrong


@pytest.mark.parametrize(
    ("said", "typed"),
    [
        ("`data_dir` is not a folder", "--data-dir is not a folder"),
        ("`images` 3: digits has 2, give `images` 2", "--images 3: digits has 2, give --images 2"),
        ("`from_`, `what`, `layer_map`, `k`", "--from, --what, --layer-map, --k"),
        ("give `data.image_size`", "give --set data.image_size"),
        ("add `data.image_size`=224, or more", "add --set data.image_size=224, or more"),
        ("`transfer.layers`=99: out of range", "--set transfer.layers=99: out of range"),
        ("`recipe.copy.lr`=1", "--set recipe.copy.lr=1"),
        ("`a b`, `3,17`, `-o`, `x()`, `data.`, ``", "`a b`, `3,17`, `-o`, `x()`, `data.`, ``"),
        ("no argument, 'data_dir'", "no argument, 'data_dir'"),
    ],
)
def test_arguments_are_spelled_as_options(said, typed):
    assert as_typed(said) == typed
    assert as_typed(typed) == typed


def test_a_librarys_error_keeps_its_argument_names():
    assert str(errors.UserError("`data_dir` is empty", "give `data.image_size`=32")) == (
        "`data_dir` is empty: give `data.image_size`=32"
    )


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (errors.UserError("too many", "give `micro_batch` 2"), 2),
        (errors.FaultError("too many: give `micro_batch` 2"), 1),
        (OSError("too many: give `micro_batch` 2"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_error_that_ends_a_command_names_options(fault, code, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise fault

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "execute", fail)
    with pytest.raises(SystemExit) as end:
        app.main(["reinit", "--seeds", "1"])
    assert end.value.code == code
    assert capsys.readouterr().err.splitlines()[-1] == "atdiag: too many: give --micro-batch 2"


def test_the_message_of_a_bug_is_unchanged(tmp_path, monkeypatch, capsys):
    """Backticks in messages of Python or another library are left alone."""

    def fail(*_):
        raise RuntimeError("pass `weights_only`")

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ATDIAG_DEBUG", raising=False)
    monkeypatch.setattr(run, "execute", fail)
    with pytest.raises(SystemExit):
        app.main(["reinit", "--seeds", "1"])
    assert "pass `weights_only`" in capsys.readouterr().err


def test_notes_on_skipped_teachers_name_options(tmp_path):
    def ablation(lab, teacher):
        if teacher == "deit_s":
            raise errors.UserError("deit_s is too small", "use `profile` small")
        return reinit(lab, teacher=teacher)

    lab = Lab(settings.resolve("mini", 2, environment={}, folder=tmp_path))
    series = spread(partial(ablation, teacher="clip_b,deit_s"), lab, leave_out=True, spoken=as_typed)
    assert "Left out: deit_s is too small: use --profile small." in series.notes


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("reinit --module atn", "--module 'atn'"),
        ("reinit --set transfer.layers=99", "--set transfer.layers=99"),
        ("layers --from topp", "--from 'topp'"),
        ("reinit --profile paper", "--data-dir"),
        ("reinit --out /proc/atdiag", "--out /proc/atdiag"),
        ("trace deit_s -o x.safetensors --images 3,99999", "--images 99999"),
        ("trace deit_s -o x.safetensors --layers 12", "--layers=12"),
        ("maps deit_s --query 30,0", "--query 30,0"),
        ("similarity deit_s deit_s --layer-map 0:12", "--layer-map 0:12"),
        ("intervene deit_s --with teacher", "--from"),
    ],
)
def test_the_command_line_names_its_options(line, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATDIAG_DATA", "")
    text = wrong(capsys, *line.split())
    assert named in text
    assert "`" not in text
    assert list(tmp_path.iterdir()) == []
