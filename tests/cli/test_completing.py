"""Shell completion: what each place completes, without torch, as a shell asks for it."""

import os
import shlex
import subprocess
import sys

import pytest
import typer

from atdiag.cli import app, completing
from atdiag.core.runs import Store
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed
from atdiag.networks.model.components import COMPONENTS
from atdiag.networks.registry import specimens, teachers
from atdiag.study.settings import SETTINGS


@pytest.fixture
def asked(folder, monkeypatch, capsys):
    """Ask in this process what completes a line, as bash does."""

    def ask(line: str) -> list[str]:
        words = shlex.split(line) + ([""] if line.endswith(" ") else [])
        monkeypatch.setenv("_ATDIAG_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        with pytest.raises(SystemExit) as end:
            app.main([])
        assert not end.value.code
        return capsys.readouterr().out.split()

    return ask


def test_names_of_teachers_complete(asked):
    every = {*teachers.registry(), *specimens.specimens()}
    assert set(asked("atdiag rescue --teacher ")) == every
    assert set(asked("atdiag diagnose ")) == every
    assert asked("atdiag reinit --teacher dinov2_s,clip") == ["dinov2_s,clip_b", "dinov2_s,clip_l"]
    assert set(asked("atdiag similarity clip_b dinov2_re")) == {n for n in every if n.startswith("dinov2_re")}
    assert asked("atdiag reinit --teacher ./weights") == [], "then the shell completes files"


def spec(network):
    data, recipe = Data(train=32, test_per_source=1), Recipe(epochs=1, batch_size=16)
    return RunSpec(network=network, data=data, recipe=recipe, seed=Seed(data=0, model=0))


def test_ids_of_runs_complete(asked, folder, tmp_path):
    network = Network(image_size=20, patch_size=4, channels=1, width=16, depth=2, heads=2, classes=10, mean=(0.2,))
    here = Store(folder / "runs").create(spec(network)).id
    there = Store(tmp_path / "other").create(spec(network.model_copy(update={"depth": 3}))).id
    assert asked("atdiag runs show ") == [here]
    assert asked(f"atdiag runs diff {here} {here[:3]}") == [here]
    assert asked(f"atdiag runs show --runs {tmp_path / 'other'} ") == [there]
    assert here in asked(f"atdiag probe {here[:2]}")
    (folder / "atdiag.toml").write_text("runs = [")
    assert asked("atdiag runs show ") == [], "a file that can't be read is no matter of the shell's"


def test_settings_complete(asked):
    plain = [f"{name}=" for name in SETTINGS if name.count(".") == 1]
    assert asked("atdiag layers --set ") == plain
    assert asked("atdiag layers --set recipe.ep") == ["recipe.epochs="]
    assert asked("atdiag layers --set recipe.copy.lr") == ["recipe.copy.lr="]


def test_options_of_an_ablation_and_their_values_complete(asked):
    assert asked("atdiag layers --s") == ["--sweep", "--split", "--set", "--seeds", "--student"]
    assert asked("atdiag layers --from ") == ["top", "bottom", "both"]
    assert asked("atdiag benchmark --methods copy,f") == ["copy,finetune", "copy,features"]
    assert asked("atdiag lay") == ["layers"]
    assert asked("atdiag figures la") == ["layers"]


def test_components_are_those_that_can_be_chosen():
    found = completing.components("")
    assert {"layer_scale", "rel_pos_bias", "rope"} <= set(found)
    assert set(found) <= {name for name, one in COMPONENTS.items() if not one.followed}
    assert completing.components("layer_scale,re") == [f"layer_scale,{n}" for n in found if n.startswith("re")]


def test_another_packages_option_keeps_its_own_completion():
    own = typer.Option(autocompletion=lambda incomplete: ["mine"])
    annotation = completing.Annotated[str, own]
    assert completing.completed("teacher", annotation) is annotation
    bare = completing.get_args(completing.completed("teacher", str))
    assert (bare[0], bare[1].autocompletion) == (str, completing.teachers)
    assert completing.completed("threshold", str) is str
    given = completing.Annotated[str, typer.Option()]
    assert completing.get_args(completing.completed("teacher", given))[1].autocompletion is completing.teachers
    assert completing.get_args(given)[1].autocompletion is None, "the original is left alone"


def test_every_completion_belongs_to_a_parameter(monkeypatch):
    parameters = {p.name for command in app.whole(app.app).commands.values() for p in command.params}
    assert {*completing.BY_NAME} <= parameters | {"teachers", "component", "components"}


@pytest.mark.parametrize("line", ["atdiag rescue --teacher ", "atdiag runs show ", "atdiag layers --set "])
def test_completion_imports_no_torch(line, folder):
    """In a process of its own, within a second of processor time: a person waits for it."""
    code = (
        "import sys, resource; from atdiag.cli import app\ntry: app.main([])\nfinally:\n"
        "    print(*sys.modules); print(resource.getrusage(resource.RUSAGE_SELF).ru_utime)"
    )
    asking = {"_ATDIAG_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **asking})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    *_, modules, seconds = done.stdout.splitlines()
    heavy = {"torch", "torchvision", "timm", "nnsight", "seaborn", "matplotlib", "scipy", "pandas", "sklearn", "numpy"}
    assert not heavy & {name.partition(".")[0] for name in modules.split()}
    assert float(seconds) < 3, "well under one on an idle machine"


def test_a_shell_is_told_how_to_ask(capsys, monkeypatch):
    monkeypatch.setattr("typer._completion_shared.shellingham.detect_shell", lambda: ("bash", "/bin/bash"))
    with pytest.raises(SystemExit) as end:
        app.main(["--show-completion"])
    assert not end.value.code
    assert "complete -o default -F _atdiag_completion atdiag" in capsys.readouterr().out
