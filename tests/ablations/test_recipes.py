"""The recipes ablation: what failing families have in common, and what so few families can show."""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest

from ablations import recipes as ablation
from ablations.recipes import Unit, architecture, facts, findings, recipe, recipes, units, verdict
from atdiag.cli import experiments
from atdiag.core.errors import UserError
from atdiag.core.runs import Store
from atdiag.core.spec import Transfer
from atdiag.networks.model import students
from atdiag.networks.registry import teachers
from atdiag.networks.weights.loading import save
from atdiag.stats.contrasts import Estimate
from atdiag.study.builder import Lab
from atdiag.study.protocol import BASELINE, ArmResult, Report
from atdiag.study.settings import resolve
from tests.training.conftest import Bench

FAILING = ("dinov2", "dinov2_reg", "clip", "beitv2")
"""The families of which the 2026 paper says so."""
OURS = ("deit3", "beit", "dinov3", "eva02", "pe")
"""Not among the paper's, with components that those that fail have."""


def lab(profile="mini") -> Lab:
    return Lab(resolve(profile=profile, seeds=2, environment={}, folder=Path("/nonexistent")))


def estimate(value, seeds=3) -> Estimate:
    """Make an estimate that is clear of zero unless the effect is 0 or there is one seed."""
    return Estimate(
        value=value, low=value - 1, high=value + 1, level=0.95, p=0.001, seeds=seeds, images=2396, clusters=599,
        df=2.0, se=0.2, covers="seeds and images" if seeds > 1 else "images only",
        var_seed=None, var_cluster=0.0, var_residual=None,
    )  # fmt: skip


@cache
def series(profile):
    return experiments.spread(partial(recipes, teacher="all", transfer="copy"), lab(profile))


def reports(profile, effects, seeds=3) -> list[Report]:
    """Make reports on all teachers of a profile: ``effects`` by teacher or family, +3 for the others."""
    out = []
    for study in series(profile).studies:
        name = study.teacher.name
        value = float(effects.get(name, effects.get(teachers.family(name), 3.0)))
        rows = (ArmResult(BASELINE, 50.0, seeds, ()), ArmResult("copy", 50 + value, seeds, (), estimate(value, seeds)))
        out.append(Report(study, profile, rows, {}, None))
    return out


def as_published() -> list[Report]:
    return reports("paper", dict.fromkeys(FAILING, -3.0) | dict.fromkeys(OURS, 0.0))


# --- which runs, which facts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("transfer", ["copy", "distill"])
def test_runs_are_shared_with_the_benchmark(transfer):
    from ablations.benchmark import benchmark

    ours = recipes(lab(), "clip_b", transfer)
    assert {spec.id for spec in ours.specs} <= {spec.id for spec in benchmark(lab(), "clip_b").specs}
    assert [arm.name for arm in ours.studies[0].arms] == [BASELINE, transfer] and ours.figure == "recipes"


def test_all_teachers_are_analysed_together():
    mini = series("mini")
    assert [study.teacher.name for study in mini.studies] == list(teachers.miniatures())
    assert (mini.figure, mini.findings) == ("recipes", findings)


@pytest.mark.parametrize(
    ("teacher", "transfer", "message"),
    [
        ("clip_b", "copi", "`transfer` 'copi', did you mean 'copy'"),
        ("clip_b", "finetune", "choose from: copy, distill"),
        ("klip_b", "copy", "unknown teacher 'klip_b', did you mean 'clip_b'"),
    ],
)
def test_bad_input(teacher, transfer, message):
    with pytest.raises(UserError, match=message) as fault:
        recipes(lab(), teacher, transfer)
    assert len(str(fault.value).splitlines()) == 1


def test_pre_training_facts_come_from_the_registry():
    paper = lab("paper")
    beit, dino, clip, siglip = (recipe(paper.teacher(name)) for name in ("beitv2_b", "dinov2_s", "clip_b", "siglip2_l"))
    assert beit["masking"] and beit["targets of another network"] and not beit["labels"]
    assert dino["data: more than 100 M images"] and not beit["data: more than 10 M images"]
    assert clip["text"] and not clip["masking"] and not clip["targets of a tokenizer or network"]
    assert siglip["targets of a tokenizer or network"] and not siglip["targets of another network"]  # its own average
    assert dino.keys() == beit.keys() == clip.keys() == siglip.keys()


def test_every_pre_training_data_set_has_a_size_and_every_term_is_used():
    rows = [row for name, row in teachers.registry().items() if teachers.is_published(name)]
    assert {row.data for row in rows} == set(ablation.MILLIONS)
    for words, field in ((ablation.OBJECTIVES, "objective"), (ablation.AUGMENTATIONS, "augmentation")):
        assert all(any(word in getattr(row, field) for row in rows) for word in words)
    assert all(any(word in row.objective for word in ablation.OBJECTIVES) for row in rows)


SUPERVISED = {"labels": True, "masking": False, "objective: supervised": True, "objective: masked": False}


def test_a_miniature_has_an_architecture_and_the_recipe_of_all_miniatures():
    mini, paper = lab().teacher("clip_b"), lab("paper").teacher("clip_b")
    assert recipe(mini) == SUPERVISED and SUPERVISED.keys() < recipe(paper).keys()
    assert {"pre_norm", "quick_gelu"} <= architecture(mini).keys()
    assert "ln_eps" in architecture(paper) and "ln_eps" not in architecture(mini)


def test_components_after_the_blocks_do_not_affect_maps():
    found = architecture(lab().teacher("siglip2_b"))
    assert found["any component"] and found["attention_pool"] and found["no_class_token"]
    assert not found["any component up to the last block"]
    plain = architecture(lab().teacher("deit_b"))
    assert plain == dict.fromkeys(("no_class_token", "any component", "any component up to the last block"), False)


def test_unregistered_teachers_have_only_architecture_facts():
    own = lab("paper").teacher("timm:vit_small_patch16_dinov3")
    assert recipe(own) == {} and architecture(own)["any component up to the last block"]
    found = {fact.name: fact for fact in facts([Unit("own", (own,), ("gains",)), *units(as_published())])}
    assert "own" not in found["masking"].has and found["layer_scale"].has["own"]


def test_facts_that_differ_between_sizes_do_not_describe_the_family():
    found = {fact.name: fact.has for fact in facts(units(as_published()))}
    assert "augreg" not in found["augmentation: Mixup"]  # B and L are trained with it, S is not
    assert found["augmentation: Mixup"]["deit"] and not found["augmentation: Mixup"]["dino"]
    without = ("clip", "eva02", "pe")
    assert found["layer_scale"] == {
        name: name in (*FAILING, *OURS) and name not in without for name in found["layer_scale"]
    }


def masked(tmp_path, name):
    """A masked autoencoder of a miniature's architecture, as ``atdiag pretrain`` writes it."""
    path = tmp_path / f"{name}-mae.safetensors"
    vit = students.build(teachers.miniature_network(name).model_copy(update={"classes": 1}), 0)
    save(vit, path, {"recipe": {}, "masked": {}})
    return lab().teacher(str(path))


def test_teachers_that_saw_no_label_give_the_recipe_something_to_explain(tmp_path):
    own = masked(tmp_path, "dinov2_s")
    assert recipe(own) == {name: not value for name, value in SUPERVISED.items()}
    reported = units(reports("mini", {}))
    others = [Unit(f"mae {i}", (own,), ("fails",)) for i in range(4)]
    found = {one.fact.name: one for one in ablation.tested([*reported, *others])}
    assert {one.fact.kind for one in found.values()} == {"recipe", "architecture"}
    assert found["masking"].separates and found["masking"].clear
    assert sorted(other.name for other in found["masking"].same) == sorted(SUPERVISED.keys() - {"masking"})
    assert not found["layer_scale"].separates
    (tmp_path / "dinov2_s-mae.safetensors").unlink()
    assert recipe(own) == {}


def test_a_run_without_a_transfer_has_a_recipe_and_one_with_it_has_none(tmp_path):
    def own(**parts):
        run = Store(tmp_path).create(Bench.spec(**parts))
        run.weights.write_bytes(b"")
        return lab().teacher("deit_b").model_copy(update={"name": f"run:{run.id}@{run.weights}", "profile": "own"})

    assert recipe(own()) == SUPERVISED
    assert recipe(own(transfer=Transfer(method="distill", layers=(0,)))) == {}


# --- outcomes ------------------------------------------------------------------------------------------------------


def test_a_family_is_one_unit():
    found = {unit.name: unit for unit in units(reports("mini", {"dinov2_s": -3, "deit": 0, "clip": -3}))}
    assert len(found["dinov2"].teachers) == 2 and len(found) == 7
    assert {name: unit.outcome for name, unit in found.items()} == {
        "deit": "undecided",
        "siglip2": "gains",
        "dinov2": "sizes disagree",
        "dinov2_reg": "gains",
        "clip": "fails",
        "beitv2": "gains",
        "eva02": "gains",
    }


def test_a_family_with_an_undecided_size_has_no_common_outcome():
    (unit,) = (unit for unit in units(reports("mini", {"dinov2_s": 0, "dinov2_b": -3})) if unit.name == "dinov2")
    assert unit.outcome == "sizes disagree"


def test_a_teacher_below_the_baseline_is_no_failure_to_explain():
    weak, strong = (
        [
            replace(one, reference=ArmResult("itself", top1, 1, ()))
            for one in reports("mini", {"clip": -3.0, "deit": -3.0})
        ]
        for top1 in (49.0, 51.0)
    )
    assert {unit.name: unit.outcome for unit in units(weak)} | {"clip": "fails", "deit": "fails"} == {
        unit.name: unit.outcome for unit in units(strong)
    }
    assert {unit.outcome for unit in units(weak)} == {"gains", "too weak"}
    said = verdict(weak)
    assert "2 too weak to teach, below the baseline by themselves (deit, clip)" in said and "closest" not in said
    assert all(one.note.endswith("no family fails") for one in findings(weak))


# --- what is concluded ---------------------------------------------------------------------------------------------


def test_the_split_as_published():
    of_recipe, of_architecture = findings(as_published())
    assert (of_recipe.verdict, of_architecture.verdict) == ("holds", "holds")
    best = "4 of 11 families against 7: at best p = 0.003; undecided: deit3, beit, dinov3, eva02, pe"
    assert of_recipe.note == of_architecture.note == best
    assert "any component up to the last block: 4 of 4 that have it fail, 0 of 7" in of_architecture.ours
    assert "separates them without exception" in of_architecture.ours and "without exception" not in of_recipe.ours
    assert "targets of another network = layer_scale: 3 of 3" in of_recipe.ours  # here nothing tells the two apart
    said = verdict(as_published())
    assert said.startswith("16 families: 7 gain (deit, augreg, dino, mae, mocov3, ibot, siglip2); 4 fail (dinov2")
    assert "5 undecided (deit3, beit, dinov3, eva02, pe). By recipe, closest:" in said


def test_gaining_families_with_the_same_components_refute_the_architecture():
    found = findings(reports("paper", dict.fromkeys(FAILING, -3.0)))
    assert [one.verdict for one in found] == ["holds", "does not hold"]


def test_a_planted_recipe_fact_is_found():
    momentum = [name for name, row in teachers.registry().items() if row.momentum]
    of_recipe, of_architecture = findings(reports("paper", dict.fromkeys(map(teachers.family, momentum), -3.0)))
    assert (of_recipe.verdict, of_architecture.verdict) == ("does not hold", "does not hold")
    assert of_recipe.ours.startswith("momentum: 4 of 4 that have it fail, 0 of 12")


def test_too_few_families_leave_it_undecided():
    # One family fails: whatever it alone has separates the families, and nothing can be significant.
    found = findings(reports("paper", {"clip": -3.0}))
    assert [one.verdict for one in found] == ["holds", "undecided"]  # CLIP shares each recipe fact with a gainer
    assert "too few to tell" in found[1].ours and "quick_gelu" in found[1].ours
    assert "1 of 16 families against 15: at best p = 0.062" in found[1].note


def test_recipe_and_architecture_facts_with_the_same_split_decide_nothing(monkeypatch):
    monkeypatch.setattr(
        ablation,
        "recipe",
        lambda teacher: {"planted": bool(architecture(teacher)["any component up to the last block"])},
    )
    found = findings(as_published())
    assert [one.verdict for one in found] == ["undecided", "undecided"]
    assert "planted = any component up to the last block" in found[0].ours


def test_miniatures_share_one_recipe():
    of_recipe, of_architecture = findings(reports("mini", dict.fromkeys(FAILING, -3.0)))
    assert (of_recipe.verdict, of_recipe.note) == ("not testable here", "all miniatures share one recipe")
    assert of_architecture.verdict == "does not hold"  # 4 of 7 against 3, and no fact is the split
    assert "at best p = 0.029" in of_architecture.note


@pytest.mark.parametrize(
    ("effects", "note"),
    [
        ({}, "no family fails"),
        (dict.fromkeys((*FAILING, "deit", "siglip2", "eva02"), -3.0), "no family gains"),
        (dict.fromkeys((*FAILING, "deit", "siglip2", "eva02"), 0.0), "no family fails; no family gains"),
    ],
)
def test_without_a_split_nothing_can_explain_it(effects, note):
    of_recipe, of_architecture = findings(reports("mini", effects))
    assert of_recipe.verdict == of_architecture.verdict == "not testable here"
    assert of_architecture.note == note and of_recipe.note == f"all miniatures share one recipe; {note}"
    assert "closest" not in verdict(reports("mini", effects))


def test_one_seed_decides_no_outcome():
    assert {unit.outcome for unit in units(reports("mini", {"clip": -30.0}, seeds=1))} == {"undecided"}
