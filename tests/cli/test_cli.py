"""The command line: what a newcomer types, right and wrong."""

import contextlib
import csv
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from atdiag.cli import app
from atdiag.core import errors, paths
from atdiag.core.errors import UserError
from atdiag.core.runs import Store
from atdiag.execution import devices, local, run
from atdiag.networks.registry import teachers
from atdiag.networks.weights import loading, sources
from atdiag.stats.contrasts import Outcomes, estimate
from atdiag.study import settings
from tests.commands import ran, wrong

README = (Path(__file__).parents[2] / "README.md").read_text()
TINY = ("data.train=64", "recipe.epochs=1", "recipe.warmup_epochs=0.5", "data.test_per_source=1")
SETS = [word for item in TINY for word in ("--set", item)]


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Nothing of the machine's settings, and the signal handler as it was."""
    for name in ("ATDIAG_PROFILE", "ATDIAG_RUNS", "ATDIAG_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ATDIAG_DATA", "")  # set, so that what --data-dir sets ends with the test
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


# --- bad input: one clear line, exit 2, nothing written ------------------------------------------------------------


# What each row names is what was wrong and what to type; the words between (" ... ") may change.
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("reinitt", "No such command 'reinitt'. Did you mean 'reinit'?"),
        ("runs lst", "Did you mean 'list'?"),
        ("reinit --modul attn", "--module"),
        ("reinit more", "unexpected extra argument"),
        ("reinit --teacher", "'--teacher' requires an argument"),
        ("reinit --module atn", "--module 'atn' ... did you mean 'attn'? ... attn, mlp, all"),
        ("reinit --module layer_scale", "--module 'layer_scale'"),
        ("reinit --transfer copi", "--transfer 'copi' ... did you mean 'copy'? ... copy, distill"),
        ("layers --from topp --teacher clip_b", "--from 'topp' ... did you mean 'top'? ... top, bottom, both"),
        ("layers --transfer none --teacher clip_b", "--transfer 'none'"),
        ("layers --k 13 --teacher clip_b", "--k 13 ... from 0 to 12"),
        ("layers --k -1 --teacher clip_b", "--k -1 ... from 0 to 12"),
        ("layers --k six --teacher clip_b", "--k 'six' ... such as 6 or 3,6,9"),
        ("layers --k 1.5 --teacher clip_b", "--k '1.5' ... such as 6 or 3,6,9"),
        ("layers --k 13 --sweep --teacher clip_b", "--k 13"),
        ("layers --k 3 --sweep --teacher clip_b", "leave one of them out"),
        ("reinit --set recipe.distill.lr=1e-5", "recipe.distill.lr has no effect here"),
        ("reinit --set transfer.weight=2", "transfer.weight has no effect here"),
        ("reinit --transfer distill --set transfer.weight=0", "transfer.weight=0 transfers nothing"),
        ("reinit --set recipe.lr=0", "recipe.lr=0 trains nothing"),
        ("reinit --set recipe.min_lr=1", "recipe.min_lr=1 ... recipe.lr=0.002 ... smaller"),
        ("reinit --device cdua", "'cdua' ... did you mean 'cuda'?"),
        ("pretrain clip_b --out .", "is a folder"),
        ("reinit --teacher clip", "did you mean 'clip_b'?"),
        ("reinit --teacher clip_bb", "'clip_bb' ... did you mean 'clip_b'?"),
        ("reinit --teacher zebra", "'zebra'"),
        ("reinit --teacher zebra", "'atdiag teachers' lists them"),
        ("reinit --teacher mae_b", "use 'deit_b'"),
        ("layers --teacher dino_s", "use 'deit_s'"),
        ("rescue --teacher deit3_b", "use 'dinov2_b'"),
        ("rescue --teacher beit_b", "use 'beitv2_b'"),
        ("reinit --profile min", "'min' ... did you mean 'mini'? ... mini, small, paper"),
        ("reinit --profile paper", "data set imagenet ... give --data-dir or set ATDIAG_DATA"),
        ("rescue --profile small --teacher timm:vit_small_patch16_dinov3", "there is no native student"),
        ("reinit --set recipe.epcohs=4", "'recipe.epcohs' ... did you mean 'recipe.epochs'?"),
        ("reinit --set recipe.epochs=four", "recipe.epochs='four' ... integer"),
        ("reinit --set recipe.epochs", "'recipe.epochs' ... --set recipe.epochs=40"),
        ("reinit --set recipe.lr=NaN", "recipe.lr=nan ... finite number"),
        ("reinit --set data.train=8", "recipe.batch_size=32 ... data.train=8"),
        ("reinit --set data.name=imagenett", "'imagenett' ... did you mean 'imagenette'?"),
        ("reinit --set data.name=imagenette", "clip_b (mini) ... --profile small"),
        (
            "reinit --teacher timm:vit_tiny_patch16_224",
            "--set data.name=imagenette, or --profile small",
        ),
        ("data check cifr10", "'cifr10' ... did you mean 'cifar10'?"),
        ("data check", "Missing argument"),
        ("data chek", "Did you mean 'check'?"),
        ("data --data-dir {file}", "--data-dir {file}"),
        ("reinit --data-dir {file}", "--data-dir {file}"),
        ("maps deit_s --data-dir {file}", "--data-dir {file}"),
        ("data check folder:{file}", "there is no folder {file}"),
        ("data check cifar10 --data-dir .", "looked for a folder 'cifar10'"),
        ("reinit --seeds 0", "--seeds 0 ... from 1 to 1000"),
        ("reinit --seeds -3", "--seeds -3"),
        ("reinit --seeds many", "'--seeds'"),
        ("reinit --device gpu", "gpu"),
        ("reinit --out {file}", "{file} is not a folder"),
        ("reinit --out {file}/below/it", "{file} is not a folder"),
        ("reinit --out /proc/atdiag", "--out /proc/atdiag"),
        pytest.param(f"reinit --out {'x' * 300}", "can't be written (File name too long)", id="long name"),
        ("reinit --runs {file}", "{file} is not a folder"),
        ("reinit --runs {file}/below", "{file} is not a folder"),
        ("reinit --dry-run --out {file}/below", "{file} is not a folder"),
        ("teachers --family dinov", "'dinov' ... did you mean 'dinov2'?"),
        ("teachers --profile papr", "'papr' ... did you mean 'paper'?"),
        ("pretrain clip_bb", "'clip_bb' ... did you mean 'clip_b'?"),
        ("pretrain mae_b", "use 'deit_b'"),
        ("pretrain", "Missing argument 'name' (see 'atdiag pretrain --help')"),
        ("pretrain clip_b --out {file}/x.safetensors", "{file} is not a folder"),
        ("runs show 0123", "no run in runs named '0123'"),
        ("runs remove 0123", "no run in runs named '0123'"),
        ("runs show", "Missing argument"),
    ],
)
def test_bad_input(line, says, folder, capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    text = wrong(capsys, *(word.format(file=file) for word in line.split()))
    assert all(part.format(file=file) in text for part in says.split(" ... "))
    assert list(folder.iterdir()) == []
    assert file.read_text() == ""


@pytest.mark.parametrize("command", ["reinit", "layers", "rescue", "runs list"])
@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("profile =", "atdiag.toml can't be read (Invalid value"),
        ("profile = 'papr'", "atdiag.toml: unknown profile 'papr', did you mean 'paper'?"),
        ("profil = 'mini'", "atdiag.toml: unknown key 'profil', did you mean 'profile'?"),
        ("[recipe]\nepochs = 1\nwarmup_epochs = 2", "recipe.warmup_epochs=2 is longer than recipe.epochs=1"),
    ],
)
def test_a_bad_file(command, toml, says, folder, capsys):
    (folder / "atdiag.toml").write_text(toml)
    assert says in wrong(capsys, *command.split())
    assert [path.name for path in folder.iterdir()] == ["atdiag.toml"]


def test_bad_variables(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("ATDIAG_PROFILE", "mnii")
    assert "ATDIAG_PROFILE: unknown profile 'mnii', did you mean 'mini'?" in wrong(capsys, "reinit")
    monkeypatch.setenv("ATDIAG_PROFILE", "")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATDIAG_RUNS", str(tmp_path / "file"))
    assert "file is not a folder" in wrong(capsys, "reinit")
    assert list(folder.iterdir()) == []


def test_a_miniature_that_is_not_here(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "SHIPPED", tmp_path / "none")
    text = wrong(capsys, "reinit", "--teacher", "clip_b")
    assert f"the miniature of clip_b is not in {tmp_path / 'none'}" in text
    assert "'atdiag pretrain clip_b --install'" in text


def test_a_teacher_without_components_has_nothing_to_be_rescued(folder, capsys):
    if not loading.shipped_path("deit_s").exists():
        pytest.skip("the miniature of deit_s is not here")
    assert "deit_s (mini) has no native component, so there is nothing to add" in wrong(
        capsys, "rescue", "--teacher", "deit_s"
    )


# --- faults and signals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        (errors.FaultError("run 0 stopped"), 1, "run 0 stopped"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (RuntimeError("surprise"), 1, "RuntimeError: surprise (this is a bug in atdiag; ATDIAG_DEBUG=1 shows where)"),
        (errors.StoppedError("asked"), 143, "stopped: checkpoints are written"),
        (SystemExit(143), 143, "stopped: checkpoints are written"),
        (KeyboardInterrupt(), 130, "stopped: checkpoints are written"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_faults_end_in_one_line(fault, code, says, folder, capsys, monkeypatch):
    def fail(*_):
        raise fault

    monkeypatch.setattr(run, "execute", fail)
    with pytest.raises(SystemExit) as end:
        app.main(["reinit", *SETS])
    said = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert end.value.code == code
    assert len(said) == 1
    assert said[0].startswith(f"atdiag: {says}") or says in said[0]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("similarity", "deit_s", "dinov2_s"), "nothing was written, the same command starts again"),
        (("trace", "deit_s", "-o", "x.safetensors"), "nothing was written, the same command starts again"),
        (("runs", "list"), "stopped: the same command starts again"),
        (("reinit",), "checkpoints are written"),
    ],
)
@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (SystemExit, 143)])
def test_what_is_said_of_a_stopped_command_is_true_of_it(command, says, stop, code, folder, capsys, monkeypatch):
    def stops(*_, **__):
        raise stop(143)

    monkeypatch.setattr("atdiag.study.settings.resolve", stops)
    with pytest.raises(SystemExit) as end:
        app.main([*command])
    assert end.value.code == code
    assert says in capsys.readouterr().err


def test_a_bug_can_be_looked_at(folder, monkeypatch):
    def fail(*_):
        raise RuntimeError("surprise")

    monkeypatch.setattr(run, "execute", fail)
    monkeypatch.setenv("ATDIAG_DEBUG", "1")
    with pytest.raises(RuntimeError, match="surprise"), contextlib.redirect_stdout(io.StringIO()):
        app.main(["reinit", *SETS])


# --- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", ["--help", "reinit --help", "runs --help", "data --help"])
def test_help_imports_nothing_heavy(arguments):
    code = f"import sys; from atdiag.cli import app\ntry: app.main({arguments.split()})\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    heavy = {"torch", "torchvision", "timm", "nnsight", "seaborn", "matplotlib", "scipy", "pandas", "sklearn", "numpy"}
    assert not loaded & heavy


RUNS = ("list", "show", "remove", "verify", "diff", "export")


def test_every_command_has_help(folder):
    commands = ["benchmark", "sizes", "epochs", "datasets", "ood", "reinit", "layers", "match", "rescue", "losses"]
    commands += ["recipes", "reproduce", "figures", "teachers", "pretrain", "doctor", "runs", "data"]
    commands += ["trace", "similarity", "intervene", "probe", "attention-stats", "maps"]
    code, out = ran("--help")
    assert code == 0
    assert re.findall(r"^  ([\w-]+)  ", out.partition("Commands:")[2], re.MULTILINE) == commands
    for command in [*commands, "teachers pull", *(f"runs {one}" for one in RUNS), "data check"]:
        code, out = ran(*command.split(), "--help")
        assert code == 0
        assert "Usage: " in out
    for command in ("reinit", "layers", "rescue"):
        out = ran(command, "--help")[1]
        options = ("teacher", "transfer", "profile", "set", "seeds", "dry-run", "json", "out", "runs", "device")
        assert all(f"--{option}" in out for option in options)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("group", [[], ["runs"]])
def test_nothing_at_all_shows_the_help(group, capsys, folder):
    with pytest.raises(SystemExit) as end:
        app.main(group)
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert err.startswith("Usage: ")
    assert len(err.splitlines()) > 5


def test_ctrl_c_while_it_starts(folder):
    child = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "atdiag", "doctor"], stderr=subprocess.PIPE, text=True
    )
    with child:
        assert any("typer" in line for line in child.stderr)  # in the middle of what cli imports
        child.send_signal(signal.SIGINT)
        assert "Traceback" not in child.stderr.read()
    assert child.returncode == 130


# --- teachers ------------------------------------------------------------------------------------------------------


def test_teachers(folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("ATDIAG_CACHE", str(folder / "none"))  # whatever this machine has fetched
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


# --- before anything was run ---------------------------------------------------------------------------------------


def test_a_dry_run_creates_nothing(folder):
    code, out = ran("reinit", "--dry-run", "--json", "--seeds", "2", *SETS)
    assert code == 0
    plan = json.loads(out.splitlines()[-1])
    assert plan["ablation"] == "reinit"
    assert len(plan["runs"]) == 7
    assert {run["state"] for run in plan["runs"]} == {"new"}
    assert {run["spec"]["recipe"]["epochs"] for run in plan["runs"] if run["arm"] != "teacher"} == {1}
    for planned in plan["runs"]:
        assert planned["run"] in out.partition("{")[0]
    assert "7 runs, 7 to do, about " in out
    assert "clip_b (mini)" in out
    assert list(folder.iterdir()) == []


def test_what_lists_runs_creates_nothing(folder):
    assert json.loads(ran("runs", "list", "--json")[1]) == []
    assert "0 runs in runs" in ran("runs", "list")[1]
    assert list(folder.iterdir()) == []


# --- from end to end -----------------------------------------------------------------------------------------------

LINES = {
    "reinit": ["reinit", "--module", "attn", "--teacher", "clip_b"],
    "layers": ["layers", "--from", "top", "--k", "6", "--teacher", "clip_b"],
    "rescue": ["rescue", "--teacher", "clip_b"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder in which the three experiments were run: its path, and what each printed."""
    here = tmp_path_factory.mktemp("home")
    with contextlib.chdir(here), pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "available_cores", lambda: 1)  # most of a worker's time goes into imports
        printed = {}
        for name, line in LINES.items():
            code, printed[name] = ran(*line, *SETS, "--seeds", "2", "--json")
            assert code == 0
    return here, printed


@pytest.fixture
def at_home(home, monkeypatch):
    monkeypatch.chdir(home[0])
    return home[0]


def answer(printed: str) -> dict:
    """What a machine reads of an experiment, with what is said of its only study beside it."""
    return alone(json.loads(printed.splitlines()[-1]))


def alone(document: dict) -> dict:
    (study,) = document["studies"]
    return study | document


def snapshot(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "lock"}


def right(run: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(run / "predictions.npz") as saved:
        return saved["prediction"] == saved["label"], saved["cluster"]


@pytest.mark.parametrize("name", LINES)
def test_what_an_experiment_prints(home, at_home, name):
    printed = home[1][name]
    found = answer(printed)
    assert found.keys() >= {"ablation", "profile", "teacher", "arms", "verdict", "files"}
    assert (found["ablation"], found["profile"], found["teacher"]) == (name, "mini", "clip_b (mini)")
    for arm in found["arms"]:
        assert arm.keys() >= {"arm", "top1", "contrast", "ci_low", "ci_high", "seeds", "runs"}
        assert arm["seeds"] == len(arm["runs"]) == 2
        assert (arm["contrast"] is None) == (arm["arm"] == "scratch")
        if arm["contrast"] is not None:
            assert arm["ci_low"] <= arm["contrast"] <= arm["ci_high"]
        assert arm["arm"] in printed
        assert f"{arm['top1']:.1f}" in printed
    suffixes = [".csv", ".md", ".tex", ".json", ".txt", ".png", ".pdf"]
    assert [Path(file).suffix for file in found["files"]] == suffixes
    for file in found["files"]:
        assert Path(file).stat().st_size > 100
        assert Path(file).parent == Path("results") / f"{name}-clip_b-mini"
        assert f"  {file}\n" in printed
    flat = " ".join(printed.split())
    assert "Verdict " + " ".join(found["verdict"].split()) in flat
    assert "clip_b (mini) itself" in printed
    assert "overrides: data.test_per_source=1, data.train=64" in printed
    saved = json.loads(Path(found["files"][3]).read_text())
    assert alone(saved) == found
    markdown = Path(found["files"][1]).read_text()
    assert found["verdict"] in markdown
    assert all(run in markdown for arm in found["arms"] for run in arm["runs"])


@pytest.mark.parametrize("name", LINES)
def test_every_number_comes_from_run_directories(home, at_home, name):
    found = answer(home[1][name])
    measured = {}
    for arm in found["arms"]:
        runs = [right(Path("runs") / run) for run in arm["runs"]]
        assert arm["top1"] == pytest.approx(np.mean([100 * correct.mean() for correct, _ in runs]))
        measured[arm["arm"]] = Outcomes({i: correct for i, (correct, _) in enumerate(runs)}, runs[0][1])
        if arm["contrast"] is not None:
            again = estimate(measured, {arm["arm"]: 1, "scratch": -1})
            assert (arm["contrast"], arm["ci_low"], arm["ci_high"]) == pytest.approx(
                (again.value, again.low, again.high)
            )
    assert found["reference"]["top1"] == pytest.approx(
        100 * right(Path("runs") / found["reference"]["runs"][0])[0].mean()
    )
    with Path(found["files"][0]).open() as file:
        table = list(csv.DictReader(file))
    by_name = {row["name"]: row for row in table}
    for arm in found["arms"]:
        row = by_name[arm["arm"]]
        assert float(row["top1"]) == pytest.approx(arm["top1"])
        assert row["runs"].split() == arm["runs"]
        assert row["interval_covers"] == ("seeds and images" if arm["contrast"] is not None else "")
    for contrast in found["contrasts"]:
        row = by_name[contrast["contrast"]]
        assert float(row["contrast"]) == pytest.approx(contrast["value"])
        assert set(row["runs"].split()) <= {run for arm in found["arms"] for run in arm["runs"]}
    assert {row["teacher"] for row in table} == {"clip_b (mini)"}


def test_the_teacher_s_accuracy_is_that_of_its_file(home, at_home):
    """On other scenes of the same digits: 599 here, 2,396 in its file."""
    told = loading.metadata(loading.shipped_path("clip_b"))["top1"]
    assert answer(home[1]["reinit"])["reference"]["top1"] == pytest.approx(told, abs=5)


def test_baseline_and_reference_are_shared(home):
    found = [answer(printed) for printed in home[1].values()]
    assert len({tuple(answer["arms"][0]["runs"]) for answer in found}) == 1
    assert len({tuple(answer["reference"]["runs"]) for answer in found}) == 1
    # layers' "all blocks" is rescue's "standard + copy"
    whole = {arm["arm"]: arm["runs"] for answer in found for arm in answer["arms"]}
    assert whole["all blocks"] == whole["standard + copy"]


@pytest.mark.parametrize("name", LINES)
def test_the_second_time_nothing_is_trained(home, at_home, name, monkeypatch):
    def never(*_):
        raise AssertionError("a worker was started")

    monkeypatch.setattr(local.subprocess, "Popen", never)
    before = snapshot(at_home / "runs")
    code, printed = ran(*LINES[name], *SETS, "--seeds", "2", "--json")
    assert code == 0
    assert "all finished before: nothing to train" in printed
    assert snapshot(at_home / "runs") == before
    assert answer(printed) == answer(home[1][name])


def test_a_dry_run_afterwards_says_finished(home, at_home):
    before = snapshot(at_home)
    printed = ran(*LINES["rescue"], *SETS, "--seeds", "3", "--dry-run", "--json")[1]
    states = [run["state"] for run in json.loads(printed.splitlines()[-1])["runs"]]
    assert (states.count("finished"), states.count("new")) == (21, 10)
    assert "31 runs, 10 to do" in printed
    assert snapshot(at_home) == before


def test_another_module_leaves_the_files_of_the_first(home, at_home, monkeypatch):
    monkeypatch.setattr(devices, "available_cores", lambda: 1)
    files = {path: path.read_bytes() for path in map(Path, answer(home[1]["reinit"])["files"])}
    code, printed = ran("reinit", "--module", "mlp", *SETS, "--seeds", "2", "--json")
    assert code == 0
    assert "7 runs, 3 finished before; 4 to do" in printed
    assert not set(answer(printed)["files"]) & {str(path) for path in files}
    assert all(path.read_bytes() == content for path, content in files.items())


def test_finished_runs_are_only_read(home, at_home, monkeypatch, capsys):
    writable = paths.writable

    def read_only(folder, argument):
        if argument == "runs":
            raise UserError(f"`runs` {folder} can't be written")
        writable(folder, argument)

    monkeypatch.setattr(paths, "writable", read_only)
    assert answer(ran(*LINES["reinit"], *SETS, "--seeds", "2", "--json")[1]) == answer(home[1]["reinit"])
    assert "can't be written" in wrong(capsys, *LINES["reinit"], *SETS, "--seeds", "3")


def test_one_seed_is_undecided(home, at_home):
    code, printed = ran(*LINES["reinit"], *SETS, "--seeds", "1", "--json")
    found = answer(printed)
    assert code == 0
    assert found["verdict"].count("is undecided with one seed") == 2
    assert {arm["seeds"] for arm in found["arms"]} == {1}
    assert "test images only: one seed" in printed
    assert not set(found["files"]) & set(answer(home[1]["reinit"])["files"])


def test_out_and_runs_elsewhere(home, at_home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "a" / "b"
    code, printed = ran(*LINES["reinit"], *SETS, "--seeds", "2", "--runs", home[0] / "runs", "--out", out, "--json")
    assert code == 0
    assert {Path(file).parent for file in answer(printed)["files"]} == {out}
    monkeypatch.setenv("ATDIAG_RUNS", str(home[0] / "runs"))
    assert "nothing to train" in ran(*LINES["reinit"], *SETS, "--seeds", "2")[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "results"]


def test_runs_list_show_remove(home, at_home, tmp_path, monkeypatch, capsys):
    listed = json.loads(ran("runs", "list", "--json")[1].splitlines()[-1])
    assert {row["run"] for row in listed} == {path.parent.name for path in Path("runs").glob("*/spec.json")}
    assert {row["state"] for row in listed} == {"finished"}
    table = ran("runs", "list")[1]
    assert all(row["run"][:12] in table for row in listed)

    copy = next(row for row in listed if row["transfer"] == "copy 6-11")
    assert (copy["teacher"], copy["student"], copy["start"]) == ("clip_b (mini)", "standard", "scratch")
    shown = json.loads(ran("runs", "show", copy["run"][:6])[1])
    assert (shown["run"], shown["state"]) == (copy["run"], "finished")
    assert shown["result"]["top1"] == copy["top1"]
    assert shown["spec"]["transfer"]["layers"] == [6, 7, 8, 9, 10, 11]
    assert [line["epoch"] for line in shown["metrics"]] == [1]

    shutil.copytree("runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    one, other = (row["run"] for row in listed[:2])
    assert wrong(capsys, "runs", "remove", one, "nothing").startswith("no run in runs named 'nothing'")
    assert (tmp_path / "runs" / one).exists()  # all are found before any is removed
    with Store(Path("runs")).find(one).lock():
        assert "wait until it ends" in wrong(capsys, "runs", "remove", one)
    code, out = ran("runs", "remove", one[:8], other)
    assert (code, out) == (0, f"removed {one}\nremoved {other}\n")
    assert len(json.loads(ran("runs", "list", "--json")[1])) == len(listed) - 2
    assert "at least 4" in wrong(capsys, "runs", "show", "")


def test_a_damaged_run_is_listed_and_can_be_removed(folder, capsys):
    run = folder / "runs" / "0123456789abcdef"
    run.mkdir(parents=True)
    (run / "spec.json").write_text("{")
    assert json.loads(ran("runs", "list", "--json")[1])[0]["state"] == "damaged"
    assert "damaged" in ran("runs", "list")[1]
    assert "'atdiag runs remove 0123456789abcdef' deletes it" in wrong(capsys, "runs", "show", "0123")
    assert ran("runs", "remove", "0123") == (0, "removed 0123456789abcdef\n")
    assert not run.exists()


def test_a_run_s_folder_holds_what_later_analyses_need(home, at_home):
    for spec in Path("runs").glob("*/spec.json"):
        names = {path.name for path in spec.parent.iterdir()} - {"tensorboard", "lock"}
        assert names == {"spec.json", "metrics.jsonl", "weights.safetensors", "predictions.npz", "result.json"}


# --- the README ----------------------------------------------------------------------------------------------------


def typed() -> list[str]:
    """Every command in the README's console blocks."""
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
    elif words[0] == "figures":  # of finished runs, which tests/test_reproduction.py has
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


def test_the_profile_is_told():
    for name in settings.PROFILES:
        assert f"`{name}`" in README
