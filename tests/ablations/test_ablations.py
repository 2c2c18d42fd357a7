"""What each experiment varies, and what it says of what came out."""

import dataclasses
import re
import signal
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated

import pytest
import typer

from ablations.layers import blocks, layers
from ablations.reinit import reinit
from ablations.rescue import OF_INTEREST, rescue
from atdiag.cli import app, experiments
from atdiag.core.errors import UserError
from atdiag.core.runs import DamagedRunError, Store
from atdiag.networks.registry import teachers
from atdiag.networks.weights import loading
from atdiag.study import registry
from atdiag.study.aggregate import report as read
from atdiag.study.builder import Lab
from atdiag.study.protocol import BASELINE, Contrast, Study
from atdiag.study.verdicts import verb_phrase
from tests.studies import arms, differences, estimate, fabricated, finished, lab

HERE = [name for name in teachers.miniatures() if loading.shipped_path(name).exists()]


# --- which arms there are ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "redrawn"), [("attn", ("attn",)), ("mlp", ("mlp",)), ("all", ("attn", "mlp"))])
@pytest.mark.parametrize("transfer", ["copy", "distill"])
@pytest.mark.parametrize("teacher", ["clip_b", "beitv2_b"])
def test_reinit_tells_initialisation_and_transfer_apart(module, redrawn, transfer, teacher):
    study = reinit(lab(), module, teacher, transfer)
    without, passed = f"reinit {module}", f"reinit {module} + {transfer}"
    specs = arms(study)
    assert list(specs) == [BASELINE, without, passed]
    assert specs[BASELINE].teacher is None
    assert (specs[BASELINE].init.source, specs[BASELINE].transfer.method) == ("scratch", "none")
    for name in (without, passed):
        assert specs[name].teacher.name == teacher
        assert (specs[name].init.source, specs[name].init.reinit, specs[name].init.head) == ("teacher", redrawn, False)
    assert specs[without].transfer.method == "none"
    assert (specs[passed].transfer.method, specs[passed].transfer.layers) == (transfer, tuple(range(12)))
    assert specs[passed].transfer.weight == (None if transfer == "copy" else 3.0)

    assert differences(study, BASELINE, without) == {"teacher", "init.source", "init.reinit"}
    loss = {"transfer.loss", "transfer.weight"} if transfer == "distill" else set()
    assert differences(study, without, passed) == {"transfer.method", "transfer.layers"} | loss
    assert all(spec.network.components == () for spec in specs.values())
    assert {c.name: dict(c.weights) for c in study.contrasts} == {
        f"{transfer}, given the start": {passed: 1, without: -1},
    }


def test_reinit_says_what_becomes_of_layer_scale():
    clip, beit = (" ".join(reinit(lab(), "attn", name, "copy").notes) for name in ("clip_b", "beitv2_b"))
    assert "the head is fresh" in clip
    assert "LayerScale" not in clip
    assert "LayerScale is folded into the projection that follows it, which is exact." in beit


@pytest.mark.parametrize(("end", "first", "last"), [("top", 6, 12), ("bottom", 0, 6)])
def test_layers(end, first, last):
    study = layers(lab(), end, 6, "clip_b", "copy", False)
    specs = arms(study)
    assert list(specs) == [BASELINE, f"{end} 6", "all blocks"]
    assert specs[f"{end} 6"].transfer.layers == tuple(range(first, last))
    assert specs["all blocks"].transfer.layers == tuple(range(12))
    assert differences(study, f"{end} 6", "all blocks") == {"transfer.layers"}
    assert differences(study, BASELINE, "all blocks") == {"teacher", "transfer.method", "transfer.layers"}
    assert dict(study.contrasts[0].weights) == {f"{end} 6": 1, "all blocks": -1}
    assert study.figure == "contrasts"


def test_blocks_are_counted_from_the_input():
    network = lab().teacher("clip_b").network
    assert blocks(network, "top", 1) == (11,)
    assert blocks(network, "bottom", 1) == (0,)
    assert blocks(network, "top", 0) == blocks(network, "bottom", 0) == ()
    for k in range(13):
        assert sorted(blocks(network, "top", k) + blocks(network, "bottom", 12 - k)) == list(range(12))


@pytest.mark.parametrize("end", ["top", "bottom"])
def test_layers_at_the_ends(end):
    none, whole = layers(lab(), end, 0, "clip_b", "copy", False), layers(lab(), end, 12, "clip_b", "copy", False)
    assert list(arms(none)) == list(arms(whole)) == [BASELINE, "all blocks"]
    assert not none.contrasts and not whole.contrasts
    assert {s.id for s in none.specs} == {s.id for s in whole.specs}


@pytest.mark.parametrize("end", ["top", "bottom"])
def test_the_sweep_has_every_k(end):
    study = layers(lab(), end, None, "clip_b", "copy", True)
    assert list(study.curve.values()) == list(range(13))
    assert list(study.curve) == list(arms(study)) == [BASELINE, *(f"{end} {k}" for k in range(1, 12)), "all blocks"]
    for name, k in study.curve.items():
        assert arms(study)[name].transfer.layers == (tuple(range(12 - k, 12)) if end == "top" else tuple(range(k)))
    assert study.figure == "layer_curve"
    # a sweep finds the runs of single commands finished
    single = layers(lab(), end, 4, "clip_b", "copy", False)
    assert {s.id for s in single.specs} <= {s.id for s in study.specs}


@pytest.mark.parametrize("k", [-1, 13, 10**9])
def test_layers_that_the_teacher_has_not(k):
    with pytest.raises(UserError, match=rf"--k {k}: clip_b \(mini\) has 12 blocks: give a number from 0 to 12"):
        layers(lab(), "top", k, "clip_b", "copy", False)


@pytest.mark.parametrize("transfer", ["copy", "distill"])
@pytest.mark.parametrize(
    ("teacher", "own"),
    [
        ("clip_b", ("no_patch_bias", "pre_norm", "quick_gelu")),
        ("beitv2_b", ("layer_scale", "no_abs_pos", "rel_pos_bias")),
    ],
)
def test_rescue(teacher, own, transfer):
    study = rescue(lab(), teacher, transfer)
    specs = arms(study)
    plain, full, control = f"standard + {transfer}", f"native + {transfer}", "native, scratch"
    singles = {f"{name} + {transfer}": (name,) for name in own}
    others = {f"all but {name} + {transfer}": tuple(other for other in own if other != name) for name in own}
    assert list(specs) == [BASELINE, plain, *singles, *others, full, control]
    have = {name: spec.network.components for name, spec in specs.items()}
    assert have == {BASELINE: (), plain: (), **singles, **others, full: own, control: own}
    assert all(spec.init.source == "scratch" for spec in specs.values())
    for name in (plain, *singles, *others, full):
        assert specs[name].teacher.name == teacher
        assert (specs[name].transfer.method, specs[name].transfer.layers) == (transfer, tuple(range(12)))
    assert specs[control].teacher is None
    assert specs[control].network == specs[full].network

    scale = {"network.layer_scale_init"} if "layer_scale" in own else set()
    loss = {"transfer.loss", "transfer.weight"} if transfer == "distill" else set()
    transferred = {"teacher", "transfer.method", "transfer.layers"} | loss
    assert differences(study, plain, full) == {"network.components"} | scale
    assert differences(study, BASELINE, control) == {"network.components"} | scale
    assert differences(study, control, full) == transferred
    assert differences(study, BASELINE, plain) == transferred
    assert study.contrasts[0].name == OF_INTEREST
    assert dict(study.contrasts[0].weights) == {full: 1, control: -1, plain: -1, BASELINE: 1}
    assert all(sum(c.weights.values()) == 0 for c in study.contrasts)


@pytest.mark.parametrize("teacher", HERE)
def test_every_miniature_that_is_here_can_be_studied(teacher):
    own = teachers.miniature_network(teacher).components
    made = [reinit(lab(), "attn", teacher, "copy"), layers(lab(), "top", 6, teacher, "copy", False)]
    if own:
        made.append(rescue(lab(), teacher, "copy"))
        # one component alone is the native student, and of two, all but one is the other alone
        assert len(arms(made[-1])) == 4 + (len(own) if len(own) > 1 else 0) + (len(own) if len(own) > 2 else 0)
    for study in made:
        assert study.teacher.label == f"{teacher} (mini)"
        assert study.arms[0] == lab().baseline(study.teacher)
        assert study.reference.specs[0].recipe.epochs == 0
    assert len({study.arms[0].specs[0].id for study in made}) == 1


def test_the_baseline_is_one_for_all_experiments_and_teachers():
    every = [
        reinit(lab(), m, t, x) for m in ("attn", "mlp") for t in ("clip_b", "beitv2_b") for x in ("copy", "distill")
    ]
    assert len({study.arms[0].specs for study in every}) == 1
    # ... and the start without transfer is one for both transfers
    assert len({study.arms[1].specs for study in every}) == 4


def test_a_recipe_for_one_method_reaches_its_arms_only():
    study = reinit(lab("recipe.copy.lr=0.5"), "attn", "clip_b", "copy")
    assert {name: spec.recipe.lr for name, spec in arms(study).items()} == {
        BASELINE: 2e-3,
        "reinit attn": 2e-3,
        "reinit attn + copy": 0.5,
    }


def test_seeds_are_the_same_in_every_arm():
    study = rescue(lab(seeds=4), "clip_b", "copy")
    assert {tuple(spec.seed.model for spec in arm.specs) for arm in study.arms} == {(0, 1, 2, 3)}
    assert len({spec.id for arm in study.arms for spec in arm.specs}) == 4 * len(study.arms)


def test_the_teacher_s_head_is_a_reference_on_its_own_task_only():
    assert reinit(lab(), "attn", "clip_b", "copy").reference is not None
    study = reinit(lab("data.name=larger"), "attn", "clip_b", "copy")
    assert study.reference is None
    assert {spec.network.classes for spec in arms(study).values()} == {9}


def test_a_component_that_the_teacher_has_not():
    with pytest.raises(UserError, match=r"clip_b \(mini\) has no component 'prenorm', did you mean 'pre_norm'\?"):
        lab().student(lab().teacher("clip_b"), ["prenorm"])


def test_a_teacher_without_components_can_not_be_rescued(monkeypatch):
    plain = lab().teacher("clip_b")
    plain = plain.model_copy(update={"name": "deit_b", "network": lab().student(plain)})
    monkeypatch.setattr(Lab, "teacher", lambda self, name: plain)
    with pytest.raises(UserError, match=r"deit_b \(mini\) has no native component, so there is nothing to add: choose"):
        rescue(lab(), "deit_b", "copy")


# --- what is said --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "half", "seeds", "says"),
    [
        (3.0, 1.0, 3, "helps (+3.0 points [+2.0, +4.0], 3 seeds)"),
        (-3.0, 1.0, 3, "hurts (-3.0 points [-4.0, -2.0], 3 seeds)"),
        (0.5, 1.0, 3, "can't be told from noise (+0.5 points [-0.5, +1.5], 3 seeds)"),
        (1.0, 1.0, 3, "can't be told from noise (+1.0 points [+0.0, +2.0], 3 seeds)"),
        (30.0, 1.0, 1, "is undecided with one seed (+30.0 points [+29.0, +31.0], images only)"),
        (30.0, 1.0, 2, "is undecided with two seeds (+30.0 points [+29.0, +31.0])"),
    ],
)
def test_an_estimate_in_words(value, half, seeds, says):
    assert verb_phrase(estimate(value, half, seeds), "helps", "hurts") == says


def test_the_verdict_of_reinit():
    study = reinit(lab(), "attn", "clip_b", "copy")
    report = fabricated(study, [5.0, 2.0], [-3.0])
    assert study.verdict(report) == (
        "Starting a standard student from clip_b (mini) with attn re-initialised helps (+5.0 points [+4.0, +6.0], "
        "3 seeds); copy of its attention on top hurts (-3.0 points [-4.0, -2.0], 3 seeds)."
    )


@pytest.mark.parametrize(
    ("k", "effects", "rest", "says"),
    [
        (6, [-2.0, 4.0], [-6.0], "hurts (-2.0 points [-3.0, -1.0], 3 seeds), and is worse than all (-6.0"),
        (6, [2.0, 2.5], [-0.5], "3 seeds), and can't be told apart from all (-0.5 points"),
        (6, [9.0, 4.0], [5.0], "is better than all (+5.0 points"),
        (12, [4.0], [], "Copy of all 12 blocks of clip_b (mini) helps (+4.0 points [+3.0, +5.0], 3 seeds)."),
        (0, [4.0], [], "k = 0 transfers nothing: this is the baseline."),
    ],
)  # fmt: skip
def test_the_verdict_of_layers(k, effects, rest, says):
    study = layers(lab(), "top", k, "clip_b", "copy", False)
    assert says in study.verdict(fabricated(study, effects, rest))


def test_the_verdict_of_a_sweep_owns_up_to_choosing_after_the_fact():
    study = layers(lab(), "bottom", None, "clip_b", "copy", True)
    text = study.verdict(fabricated(study, [float(k) for k in range(6, -6, -1)]))
    assert "Copy of all 12 blocks of clip_b (mini) hurts (-5.0 points" in text
    assert "along the curve bottom 1 is highest (56.0 %), chosen after the fact." in text


@pytest.mark.parametrize(
    ("value", "seeds", "standard", "says"),
    [
        (4.0, 3, -1.5, "by +4.0 points [+3.0, +5.0] (a rescue)"),
        (-4.0, 3, -1.5, "by -4.0 points [-5.0, -3.0] (the opposite of a rescue)"),
        (4.0, 3, 1.5, "by +4.0 points [+3.0, +5.0] (clear of zero, but there was no failure to rescue)"),
        (0.5, 3, 1.5, "by +0.5 points [-0.5, +1.5] (within noise)"),
        (40.0, 1, 1.5, "(undecided with one seed)"),
    ],
)
def test_the_verdict_of_rescue(value, seeds, standard, says):
    study = rescue(lab(), "clip_b", "copy")
    text = study.verdict(fabricated(study, [standard, *[0.0] * 6, 5.0, -5.0], [value, 0.0, 0.0], seeds=seeds))
    assert says in text
    assert text.count("undecided") == (3 if seeds == 1 else 0)
    if seeds > 1:
        assert f"into a standard student {'helps' if standard > 0 else 'hurts'} ({standard:+.1f}" in text
        assert "the components alone, from scratch, hurt (-5.0" in text


@pytest.mark.parametrize(
    "make", [lambda: reinit(lab()), lambda: rescue(lab()), lambda: layers(lab(), teacher="clip_b")]
)
def test_one_seed_decides_nothing(make):
    study = make()
    text = study.verdict(fabricated(study, [30.0] * (len(study.arms) - 1), seeds=1, half=0.1))
    assert "undecided with one seed" in text
    assert not any(word in text for word in ("helps", "hurts", "rescue)", "better", "worse"))


def test_a_report_is_read_from_run_directories(tmp_path):
    study = reinit(lab())
    right = {BASELINE: [20, 22], "reinit attn": [20, 22], "reinit attn + copy": [30, 31], "teacher": [36]}
    report = finished(study, Store(tmp_path), right)
    assert [row.arm for row in report.rows] == [arm.name for arm in study.arms]
    assert [row.top1 for row in report.rows] == [52.5, 52.5, 76.25]
    assert [row.runs for row in report.rows] == [tuple(spec.id for spec in arm.specs) for arm in study.arms]
    assert report.rows[0].contrast is None
    assert [row.contrast.value for row in report.rows[1:]] == pytest.approx([0.0, 23.75])
    assert [estimate.value for estimate in report.contrasts.values()] == pytest.approx([23.75])
    assert report.rows[2].contrast.images == 40
    assert report.rows[2].contrast.clusters == 20
    assert (report.reference.top1, report.reference.seeds) == (90.0, 1)
    assert report.dropped["reinit attn"] == ("norm_pre.weight", "blocks.*.attn.x")
    assert "weakness" not in report.verdict
    assert "is undecided with two seeds (+0.0 points [+0.0, +0.0])" in report.verdict


def test_predictions_of_another_run_are_not_taken_for_its_own(tmp_path):
    store, study = Store(tmp_path), reinit(lab())
    right = {BASELINE: [20, 22], "reinit attn": [20, 22], "reinit attn + copy": [30, 31], "teacher": [36]}
    finished(study, store, right)
    one, other = (store.run(spec) for spec in study.arms[2].specs)
    one.predictions.write_bytes(other.predictions.read_bytes())
    with pytest.raises(DamagedRunError, match=r"its sha256 is not the one in result\.json"):
        read(study, lab().settings, store)
    one.predictions.write_bytes(b"nonsense")
    with pytest.raises(DamagedRunError, match=f"atdiag runs remove {one.id}"):
        read(study, lab().settings, store)


def test_a_teacher_below_the_baseline_is_named(tmp_path):
    right = {BASELINE: [20, 22], "reinit attn": [19, 18], "reinit attn + copy": [10, 11], "teacher": [20]}
    assert finished(reinit(lab()), Store(tmp_path), right).verdict.endswith(
        "The teacher itself (50.0 %) is below the baseline (52.5 %): a failure here may be the teacher's weakness and "
        "says nothing about its architecture."
    )


def test_runs_of_different_semantics_are_not_compared():
    study = reinit(lab())
    old = dataclasses.replace(
        study.arms[1], specs=tuple(spec.model_copy(update={"semantics": 0}) for spec in study.arms[1].specs)
    )
    mixed = dataclasses.replace(study, arms=(study.arms[0], old, study.arms[2]))
    with pytest.raises(ValueError, match=r"runs of different semantics can't be compared: \[0, 1\]"):
        read(mixed, lab().settings, None)


# --- someone else's experiment -------------------------------------------------------------------------------------


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
    """The module that the README shows."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    module: dict = {}
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    [example] = [example for example in examples if "def finetune" in example]
    exec(example, module)
    return module


@pytest.fixture
def installed(monkeypatch, capsys, tmp_path):
    """A command line with one foreign experiment installed; gives exit code, output and errors of a command."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)

    def install(name, function):
        monkeypatch.setattr(EntryPoint, "load", lambda entry: function)
        monkeypatch.setattr(registry, "_entries", lambda: [EntryPoint(name, "theirs:it", registry.GROUP)])
        monkeypatch.setattr(app, "app", typer.Typer(cls=app._Commands))
        app.app.command()(app.doctor.doctor)  # a second command, or typer makes an application of one

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


def test_an_experiment_that_cannot_be_loaded_takes_no_other_away(monkeypatch, capsys):
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


def test_the_readme_s_experiment_is_a_command(installed, tmp_path):
    run = installed("finetune", readme_example()["finetune"])
    assert "--teacher" in run("--help")[1]
    code, out, err = run("--teacher", "beitv2_b", "--seeds", "2", "--dry-run")
    assert (code, err) == (0, "")
    assert "atdiag finetune: beitv2_b (mini)" in out
    assert "5 runs, 5 to do" in out
    study = readme_example()["finetune"](lab(), "beitv2_b")
    right = {arm.name: [20, 30] for arm in study.arms} | {"teacher": [36]}
    assert "Fine-tuning beitv2_b (mini) " in finished(study, Store(tmp_path), right).verdict
