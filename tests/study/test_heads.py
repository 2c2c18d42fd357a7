"""A teacher whose head has its rows in another order than a folder's classes, in every table that uses the head."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from atdiag.analysis import images, interventions, probing, subjects
from atdiag.analysis.replacements import Replacement
from atdiag.core.errors import UserError
from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.core.spec import Init
from atdiag.networks.registry import teachers
from atdiag.networks.weights import classes, loading, sources
from atdiag.networks.weights.classes import ASSUMED, SUSPECT
from atdiag.reports import document, tables
from atdiag.study import aggregate
from atdiag.study.builder import Lab
from atdiag.study.protocol import Series, Study
from atdiag.study.settings import resolve
from atdiag.training import cohort
from tests.commands import atdiag, wrong

COLOURS = {
    "aqua": (0, 200, 200),
    "blue": (0, 0, 220),
    "green": (0, 220, 0),
    "pink": (230, 120, 190),
    "red": (220, 0, 0),
}
ROWS = ("pink", "aqua", "red", "blue", "green")
"""The class of each row of the head: none in its place in the alphabet."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make noisy images of five colours."""
    root, draw = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 8)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.array(colour) + draw.normal(0, 25, (32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def state(folder):
    """Make a small ViT with random weights and a head fitted to the training images by least squares."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, **ARGUMENTS).eval()
    files = sorted((folder / "train").glob("*/*.png"))
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        x = model.forward_head(model.forward_features((pixels - 0.5) / 0.5), pre_logits=True)
        y = torch.tensor([[name == file.parent.name for name in ROWS] for file in files]).float()
        solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y, driver="gelsd").solution
        model.head.weight.copy_(solution[:-1].T)
        model.head.bias.copy_(solution[-1])
    return model.state_dict()


ARGUMENTS = {"num_classes": 5, "depth": 2, "embed_dim": 24, "num_heads": 3}


@pytest.fixture
def here(state, tmp_path, monkeypatch):
    """Make the teacher ``own_s`` from ``own.pth``, and a folder without a class list."""
    monkeypatch.setattr(teachers, "_OWN", {})
    monkeypatch.chdir(tmp_path)
    save(state)
    teachers.register_teacher("own_s", "vit_tiny_patch16_224", file=tmp_path / "own.pth", arguments=ARGUMENTS)
    return tmp_path


def save(state, **entries):
    torch.save({"state_dict": state, **entries}, "own.pth")


def inside(here, state):
    save(state, classes=list(ROWS))
    return f"the list in {here / 'own.pth'} (classes)"


def by_index(here, state):
    save(state, class_to_idx={name: ROWS.index(name) for name in sorted(ROWS)})
    return f"the list in {here / 'own.pth'} (class_to_idx)"


def beside(here, state):
    (here / "own.pth.classes.txt").write_text("\n".join(map(str.upper, ROWS)))
    return f"the list in {here / 'own.pth.classes.txt'}"


def typed(here, state):
    (here / "my.txt").write_text("\n".join(ROWS))
    return "`classes` my.txt"


def nothing(here, state):
    return ASSUMED


def lab(folder, given=None, **more):
    sets = [f"data.name=folder:{folder}", "data.image_size=32", "recipe.epochs=1", "recipe.batch_size=20"]
    return Lab(resolve(seeds=1, sets=sets, classes=given, **more))


@pytest.mark.parametrize("say", [inside, by_index, beside, typed, nothing])
def test_the_accuracy_is_right_or_marked_as_assumption(here, state, folder, say):
    how = say(here, state)
    settings = lab(folder, here / "my.txt" if say is typed else None)
    if say is typed:
        how = f"`classes` {here / 'my.txt'}"
    (one,) = subjects.with_classes([subject(settings)], here / "my.txt") if say is typed else [subject(settings)]
    data = settings.settings.profile.data
    pictures = images.choose(0, data, one.network)
    (own,) = interventions.intervene(one, Replacement("own"), pictures)
    train = probing.training_pictures(data, one.network)
    (probed,) = probing.probe([one], train, pictures, layers=(0, 1), neighbours=3)
    arm = settings.reference(settings.teacher("own_s"))
    assert own.head.how == probed.head.how == arm.head.how == how
    known = say is not nothing
    rows = tuple(ROWS.index(name) for name in sorted(ROWS)) if known else ()
    assert arm.specs[0].init.head_rows == rows
    accuracy = 100 * (np.array(predicted(one, pictures)) == pictures.labels).mean()  # by matching names explicitly
    assert accuracy > 90
    for top1, warning in (
        (own.top1[0], own.warning),
        (100 * probed.itself.mean(), probed.warning),
        (probed.top1("head")[-1], probed.warning),
    ):
        assert (top1 == pytest.approx(accuracy) and warning == "") if known else (top1 < 10 and warning == SUSPECT)


def subject(settings):
    return subjects.find("own_s", data=settings.settings.profile.data)


def predicted(one, pictures):
    """Return the labels of the classes that the head predicts, by hand."""
    (batch,) = pictures.batches(len(pictures))
    with torch.no_grad():
        return [sorted(ROWS).index(ROWS[row]) for row in one.module(batch.pixels).argmax(-1)]


def copying(settings, teacher):
    """Return a small experiment with the teacher itself."""
    student = settings.student(teacher)
    copy = settings.arm("copy", student, teacher, transfer=settings.transfer("copy", student))
    return Study(
        ablation="mine",
        teacher=teacher,
        options={},
        arms=(settings.baseline(teacher), copy),
        contrasts=(),
        verdict=lambda report: "",
        reference=settings.reference(teacher),
    )


@pytest.mark.parametrize("say", [inside, nothing])
def test_the_teachers_row_in_an_experiment(here, state, folder, say):
    how, settings = say(here, state), lab(folder)
    teacher = settings.teacher("own_s")
    study = copying(settings, teacher)
    store = Store(here / "runs")
    for specs in (study.specs[:2], study.specs[2:]):
        assert set(cohort.train(specs, store, loading.load, ExecutionOptions(device="cpu")).values()) == {"finished"}
    reading = aggregate.read(Series.join([study]), settings.settings, store)
    (report,) = reading.reports
    told = document.as_json(reading)["studies"][0]["reference"]
    note = next(note for note in tables.notes(reading) if "itself: which row of its head" in note)
    assert told["head"] == how and how in note
    known = say is inside
    assert (told["top1"] > 90) if known else (told["top1"] < 10)
    assert told["head_warning"] == (None if known else SUSPECT)
    assert (SUSPECT in note) == ("no better than chance" in tables.markdown(reading)) == (not known)
    assert report.reference.top1 == told["top1"]


@pytest.mark.parametrize("rows", [0, 3])
def test_a_teacher_without_a_fitting_head_is_probed(here, state, folder, rows):
    kept = {key: value[:rows] if key.startswith("head.") else value for key, value in state.items()}
    torch.save({key: value for key, value in kept.items() if len(value)}, here / "own.pth")
    settings = lab(folder)
    teacher = settings.teacher(f"{here}/own.pth#heads={ARGUMENTS['num_heads']}#pixels=imagenet")
    study = copying(settings, teacher)
    (spec,) = study.reference.specs
    assert study.reference.probed and spec.network.classes == 5 and spec.data.name == f"folder:{folder}"
    store = Store(here / "runs")
    for one in study.specs:
        assert set(cohort.train([one], store, loading.load, ExecutionOptions(device="cpu")).values()) == {"finished"}
    reading = aggregate.read(Series.join([study]), settings.settings, store)
    told = document.as_json(reading)["studies"][0]["reference"]
    assert told["probe"] and told["top1"] > 90 and told["head_warning"] is None
    assert "| linear probe |" in tables.markdown(reading)
    why = "its weights have no head" if not rows else r"its head is not used (it has 3 rows, and"
    assert any(f"itself: a linear probe on 60 training images, since {why}" in one for one in tables.notes(reading))


def test_students_never_learn_from_rows_in_the_wrong_order(here, state, folder):
    beside(here, state)
    settings = lab(folder)
    teacher = settings.teacher("own_s")
    student = settings.student(teacher)
    logits = settings.transfer("logits", student, allowed=("logits",))
    for more in ({"transfer": logits}, {"init": Init(source="teacher", head=True)}):
        with pytest.raises(UserError, match=r"their order is another \(the list in .*own.pth.classes.txt\)"):
            settings.arm("x", student, teacher, **more)
    rows = classes.match(classes.of_teacher(teacher), settings.settings.profile.data).rows
    settings.arm("x", student, teacher, init=Init(source="teacher", head=True, head_rows=rows))
    (here / "own.pth.classes.txt").write_text("\n".join(sorted(ROWS)))
    settings.arm("x", student, teacher, transfer=logits)


@pytest.mark.slow
def test_the_command_line(here, state, folder, capsys):
    data = ["--data", f"folder:{folder}", "--set", "data.image_size=32", "--images", "0", "--device", "cpu", "--json"]
    typed(here, state)
    out = json.loads(atdiag("intervene", "own_s", *data, "--classes", "my.txt").splitlines()[-1])
    assert out["subject"]["head"] == {"rows": "--classes my.txt", "warning": None}
    assert out["rows"][0]["top1_before"] > 90
    out = atdiag("probe", "own_s", *data, "--neighbours", "3")
    assert "own_s is no better than chance" in " ".join(out.split())
    head = json.loads(out.splitlines()[-1])["subjects"][0]["head"]
    assert head == {"rows": ASSUMED, "warning": SUSPECT.replace("`classes`", "--classes")}
    for text, says in (
        ("a\nb", "--classes my.txt names 2 classes, and the head of own_s has 5 rows"),
        (None, "no such"),
    ):
        (here / "my.txt").write_text(text) if text else (here / "my.txt").unlink()
        assert says in wrong(capsys, "intervene", "own_s", *data, "--classes", "my.txt")
    sets = ["--set", f"data.name=folder:{folder}", "--set", "data.image_size=32"]
    experiment = ["benchmark", "--teacher", "own_s", *sets, "--dry-run", "--classes"]
    (here / "my.txt").write_text("\n".join(("grey", *ROWS[1:])))
    assert "lacks 1 of the 5 classes" in wrong(capsys, *experiment, "my.txt")
    (here / "my.txt").write_text("\n".join(ROWS))
    shutil.rmtree(here / "runs", ignore_errors=True)
    (line,) = [line for line in atdiag(*experiment, "my.txt", "--json").splitlines() if line.startswith("{")]
    (run,) = [run for run in json.loads(line)["runs"] if run["arm"] == "teacher"]
    assert run["spec"]["init"]["head_rows"] == [ROWS.index(name) for name in sorted(ROWS)]
    assert sources.sha256(here / "own.pth") == run["spec"]["teacher"]["sha256"]
