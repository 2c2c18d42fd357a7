"""A new user's way from a file and a folder to a plan: wrong guesses, what each is told, and how many there are."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from atdiag.cli import messages
from tests.commands import atdiag, ran, wrong

CLASSES = ("ant", "bee", "cow")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny timm ViT fine-tuned to three classes, and the same images in three layouts."""
    import timm
    import torch

    root = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), root / "mine.pth")
    draw = np.random.default_rng(0)
    for split, count in (("train", 30), ("val", 6)):
        for cls in CLASSES:
            (root / "pics" / split / cls).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (36, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "pics" / split / cls / f"{cls}{i}.jpg")
    shutil.copytree(root / "pics" / "train", root / "classes")
    (root / "flat").mkdir()
    lines = ["file,label"]
    for path in sorted((root / "classes").rglob("*.jpg")):
        shutil.copy(path, root / "flat")
        lines.append(f"{path.name},{path.parent.name}")
    (root / "flat" / "labels.csv").write_text("\n".join(lines))
    (root / "more").mkdir()
    shutil.copytree(root / "pics", root / "more" / "pics")
    return root


@pytest.fixture(autouse=True)
def _there(place, monkeypatch, tmp_path, pictures):
    monkeypatch.chdir(place)
    monkeypatch.setenv("ATDIAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ATDIAG_RUNS", str(tmp_path / "runs"))


LINES = [
    # a line, and for each refusal what the user takes from it: this part of the line -> that
    ("benchmark --teacher mine.pth", ("mine.pth", "mine.pth --data pics", "add --data FOLDER")),
    ("benchmark --teacher mine.pth --data pics",),
    ("benchmark --teacher mine.pth --data classes", ("classes", "classes --split 0.2", "--split 0.2")),
    ("benchmark --teacher mine.pth --data flat", ("flat", "flat --split 0.2", "--split 0.2")),
    ("benchmark --teacher mine.pth --data pics --split 0.2", ("--split 0.2", "", "leave --split out")),
    ("benchmark --teacher mine.pt --data pics", ("mine.pt", "mine.pth", "did you mean 'mine.pth'?")),
    ("benchmark --teacher mine.pth --data pic", ("pic", "pics", "did you mean 'pics'?")),
    ("benchmark --teacher mine.pth --data pics/train", ("pics/train", "pics", "give {place}/pics, which has some")),
    ("benchmark --teacher mine.pth --data more", ("more", "more/pics", "give {place}/more/pics")),
    (
        "benchmark --teacher mine.pth --data flat/labels.csv",
        ("/labels.csv", "", "such as flat"),
        ("flat", "flat --split 0.2", "--split 0.2"),
    ),
    ("rescue --teacher mine.pth --data pics", ("rescue", "benchmark", "'benchmark' for 'rescue'")),
    ("reinit --module attention --teacher mine.pth --data pics", ("attention", "attn", "did you mean 'attn'?")),
    ("benchmark --model mine.pth --data pics", ("--model", "--teacher", "type --teacher FILE")),
    (
        "benchmark mine.pth pics",
        ("mine.pth", "--teacher mine.pth", "mine.pth"),
        ("pics", "--data pics", "type --data pics"),
    ),
    ("benchmark --teacher mine.pth --dataset pics", ("--dataset", "--data", "type --data FOLDER")),
    (
        "benchmark --teacher mine.pth --data pics --epochs 2",
        ("--epochs 2", "--set recipe.epochs=2", "type --set recipe.epochs=N"),
    ),
    (
        "benchmark --teacher mine.pth --data pics --set epochs=2",
        ("epochs", "recipe.epochs", "did you mean 'recipe.epochs'?"),
    ),
    (
        "benchmark --teacher mine.pth --data pics --batch-size 128",
        ("--batch-size 128", "--set recipe.batch_size=128", "type --set recipe.batch_size=N"),
        ("=128", "=81", "--set recipe.batch_size=81"),
    ),
    (
        "benchmark --teacher mine.pth --data pics --profile mini",
        ("mini", "mini --set data.image_size=224", "--set data.image_size=224"),
    ),
    ("benchmarks --teacher mine.pth --data pics", ("benchmarks", "benchmark", "Did you mean 'benchmark'?")),
    ("layers --from top --k 6 --teacher mine.pth --data pics",),
    ("benchmark --teacher mine.pth --data pics --budget 5", ("--budget 5", "--budget 20m", "as --budget 20m")),
]


@pytest.fixture
def quick(monkeypatch):
    """A measured rate that needs no measurement."""
    from atdiag.execution import rate

    monkeypatch.setattr(rate, "measure", lambda specs, options: 50e9)


@pytest.mark.parametrize(("line", "steps"), [(line, steps) for line, *steps in LINES], ids=[line for line, *_ in LINES])
def test_a_wrong_guess_is_at_most_two_refusals_from_a_plan(line, steps, place, capsys, quick):
    assert len(LINES) > 20 and len(steps) <= 2
    for old, new, told in steps:
        said = wrong(capsys, *line.split(), "--dry-run")
        assert told.format(place=place) in said
        assert len(said.split()) <= 60
        line = line.replace(old, new, 1)
    out = atdiag(*line.split(), "--dry-run")
    assert re.search(r"\d+ runs?, .*\d+ to do", out)
    assert not (place / "results").exists()


def test_a_wrong_file_or_folder_is_refused_before_anything_heavy_is_loaded(place, tmp_path):
    import subprocess

    for words in (
        ["benchmark", "--teacher", "gone.pth", "--data", "pics"],
        ["benchmark", "--teacher", "mine.pth", "--data", "gone"],
        ["benchmark", "--teacher", "mine.pth"],
        ["maps", "gone.pth"],
    ):
        code = (
            "import sys\nfrom atdiag.cli import app\n"
            f"try: app.main({words!r})\nexcept SystemExit as end: code = end.code\n"
            "print(code, sorted({'torch', 'timm', 'nnsight'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=place)
        assert done.stdout == "2 []\n", done.stderr


# --- what is chosen ---------------------------------------------------------------------------------------------------


def plan(*words) -> dict:
    return json.loads(atdiag("benchmark", "--teacher", "mine.pth", *words, "--dry-run", "--json").splitlines()[-1])


def test_the_header_says_what_was_chosen_in_five_lines(place):
    out = atdiag("benchmark", "--teacher", "mine.pth", "--data", "classes", "--split", "0.2", "--dry-run").splitlines()
    assert out[0].startswith(
        "atdiag benchmark: timm:test_vit (own file): patches of 16 px, width 64, 6 blocks, 2 heads"
    )
    assert out[1] == (
        f"data: {place}/classes, 3 classes: 72 images to train on, 7 of them held out for validation, 18 to test on "
        "(0.2 of each class, chosen by a hash of the file's name: --split)"
    )
    assert out[2].startswith(
        "images: 160 px, central crop of 95 %, bicubic, mean 0.5, std 0.5, all as the teacher expects"
    )
    assert out[3].startswith("length: 30 epochs in batches of 64, the default; --budget 20m")
    assert out[4].startswith("3 seeds: 13 runs, 0 finished before; 13 to do in")


def test_the_teacher_decides_the_images_and_settings_win(place):
    runs = plan("--data", "pics", "--set", "data.image_size=96", "--set", "recipe.batch_size=32")["runs"]
    for run in (run["spec"] for run in runs if run["arm"] != "teacher"):
        data, recipe = run["data"], run["recipe"]
        assert (data["image_size"], data["crop_share"], data["interpolation"]) == (96, 0.95, "bicubic")
        assert (data["validation"], data["train"], recipe["batch_size"]) == (0.1, 81, 32)
        assert run["network"]["mean"] == run["network"]["std"] == [0.5]


def test_the_batch_and_the_runs_do_not_depend_on_the_device(place):
    here, there = plan("--data", "pics"), plan("--data", "pics", "--device", "cuda")
    assert [run["run"] for run in here["runs"]] == [run["run"] for run in there["runs"]]


def test_the_same_split_twice_is_the_same_runs(place):
    one, two = (plan("--data", name, "--split", "0.2") for name in ("classes", "flat"))
    assert [run["run"] for run in one["runs"]] == [run["run"] for run in two["runs"]]
    assert {run["spec"]["data"]["split"] for run in one["runs"]} == {0.2}
    other = plan("--data", "classes", "--split", "0.2", "--set", "data.split_seed=1")
    assert not {run["run"] for run in one["runs"]} & {run["run"] for run in other["runs"]}


def test_a_budget_is_chosen_once(place, tmp_path, monkeypatch):
    from atdiag.execution import cost, rate
    from atdiag.execution import plan as plans

    speeds = iter([40e9, 400e9])
    monkeypatch.setattr(rate, "measure", lambda specs, options: next(speeds))
    words = ("--data", "pics", "--budget", "2m", "--seeds", "1")
    first = plan(*words)
    (kept,) = (tmp_path / "runs" / "choices").iterdir()
    choice = json.loads(kept.read_text())
    specs = [run["spec"] for run in first["runs"] if run["arm"] != "teacher"]
    assert {spec["recipe"]["epochs"] for spec in specs} == {choice["epochs"]}
    assert {spec["recipe"]["warmup_epochs"] for spec in specs} == {min(5.0, choice["epochs"] / 10)}
    assert choice["seconds"] <= 120
    from atdiag.core.spec import RunSpec

    longer = [RunSpec.model_validate(run["spec"]) for run in first["runs"]]
    longer = [
        spec.model_copy(update={"recipe": spec.recipe.model_copy(update={"epochs": spec.recipe.epochs + 1})})
        for spec in longer
        if spec.recipe.epochs
    ]
    assert plans.estimate(longer, 1, 40e9) > 120 - cost.testing_seconds(longer[0], 40e9)
    assert [run["run"] for run in plan(*words)["runs"]] == [
        run["run"] for run in first["runs"]
    ]  # not at ten times the speed
    assert {run["spec"]["recipe"]["epochs"] for run in plan(*words[:-1], "2")["runs"]} != {choice["epochs"], 0}
    kept.write_text("{")
    assert ran("benchmark", "--teacher", "mine.pth", *words, "--dry-run")[0] == 2


def test_a_budget_on_a_gpu_is_no_measurement(place, monkeypatch, capsys):
    from atdiag.execution import devices, rate

    monkeypatch.setattr(rate, "measure", lambda specs, options: pytest.fail("measured"))
    monkeypatch.setattr(devices, "is_here", lambda device: device == "cpu")
    runs = plan("--data", "pics", "--budget", "1m", "--gpu", "h100")["runs"]
    assert {run["spec"]["recipe"]["precision"] for run in runs if run["arm"] != "teacher"} == {"bfloat16"}
    line = ("benchmark", "--teacher", "mine.pth", "--data", "pics", "--budget", "1m", "--gpu")
    assert (
        wrong(capsys, *line, "h100")
        == "there is no cuda device on this machine: add --dry-run to plan for one elsewhere"
    )
    assert wrong(capsys, *line, "h10").startswith("--gpu 'h10' is not known, did you mean 'h100'?")
    assert (
        wrong(capsys, *line[:5], "--gpu", "h100")
        == "there is no cuda device on this machine: add --dry-run to plan for one elsewhere"
    )


def test_a_budget_that_is_too_small_names_one_that_is_not(place, monkeypatch, capsys):
    from atdiag.execution import rate

    monkeypatch.setattr(rate, "measure", lambda specs, options: 2e9)
    line = ("benchmark", "--teacher", "mine.pth", "--data", "pics", "--dry-run", "--budget")
    said = wrong(capsys, *line, "10s")
    assert "--budget 10s is too little for one epoch of 13 runs and their tests" in said
    needed = re.search(r"give --budget (\d+m)", said)[1]
    assert ran(*line, needed)[0] == 0
    both = wrong(capsys, *line, "10m", "--set", "recipe.epochs=3")
    assert both == "--budget chooses the epochs, and recipe.epochs sets them: leave one of them out"


def test_a_budget_that_is_far_too_small_names_the_smallest_experiment_of_use(place, tmp_path, monkeypatch, capsys):
    from atdiag.execution import rate

    for cls in ("yes", "no"):
        (tmp_path / "many" / cls).mkdir(parents=True)
        for i in range(420):
            shutil.copy(place / "flat" / "ant0.jpg", tmp_path / "many" / cls / f"{i}.jpg")
    monkeypatch.setattr(rate, "measure", lambda specs, options: 2e9)
    line = ("benchmark", "--teacher", "mine.pth", "--data", str(tmp_path / "many"), "--split", "0.2", "--dry-run")
    said = wrong(capsys, *line, "--budget", "10s")
    budget, sets = re.search(r"or --budget (\d+m) with (.*), for 4 epochs", said).groups()
    assert "--set data.per_class=250" in sets
    assert ran(*line, "--budget", budget, *sets.split())[0] == 0


# --- what would settle it --------------------------------------------------------------------------------------------


def test_a_line_is_typed_again_with_other_options():
    messages.TYPED.set(
        ("benchmark", "--teacher", "my file.pth", "--budget=5m", "--seeds", "2", "--set", "recipe.lr=1e-3")
    )
    again = messages.retyped({"--budget": None, "--seeds": "3"}, {"recipe.epochs": 4})
    assert again == "atdiag benchmark --teacher 'my file.pth' --set recipe.lr=1e-3 --seeds 3 --set recipe.epochs=4"
    assert messages.retyped({}, {"recipe.lr": None}).endswith("--budget=5m --seeds 2")


@pytest.mark.slow
def test_undecided_ends_in_a_line_that_goes_on(place, tmp_path):
    small = ("data.per_class=20", "data.image_size=32", "recipe.epochs=1", "recipe.batch_size=8")
    sets = [word for item in small for word in ("--set", item)]
    line = (
        "benchmark",
        "--teacher",
        "mine.pth",
        "--data",
        "pics",
        "--methods",
        "copy",
        *sets,
        "--out",
        str(tmp_path / "out"),
    )
    document = json.loads(atdiag(*line, "--seeds", "1", "--json").splitlines()[-1])
    assert document["profile"] == "own"
    (step,) = document["settle"]
    assert step["why"].startswith("Undertrained: train for longer, for 10 epochs in place of 1")
    words = step["line"].split()
    assert words[0] == "atdiag" and words[-2:] == ["--set", "recipe.epochs=10"] and "recipe.epochs=1" not in words
    assert ran(*words[1:], "--dry-run")[0] == 0


def test_the_page_is_short_and_its_line_plans(quick):
    page = (Path(__file__).parents[2] / "docs" / "own.md").read_text()
    assert len(page.split()) <= 700
    (line,) = re.findall(r"^\$ atdiag (.*)$", page, re.MULTILINE)
    line = line.replace("deit_tiny_patch16_224.fb_in1k.safetensors", "mine.pth").replace("imagenette-128", "pics")
    assert ran(*line.split(), "--dry-run")[0] == 0
