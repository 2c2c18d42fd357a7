"""Specimens are teachers of their own kind: by name in every experiment, and in no list but theirs."""

import json
from dataclasses import replace

import pytest

from atdiag.core.errors import UserError
from atdiag.core.spec import Operation, RunSpec, Teacher
from atdiag.networks.model.components import COMPONENTS
from atdiag.networks.registry import listing, specimens, teachers
from atdiag.networks.registry.specimens import specimens as every
from atdiag.networks.weights import classes, loading, sources
from atdiag.study import settings
from atdiag.study.builder import Lab
from atdiag.training import pretraining

HERE = [name for name, one in every().items() if one.file.exists()]


def test_a_specimen_is_pre_trained_or_derived_from_one_that_ships():
    for one in every().values():
        assert (one.pretraining is None) == bool(one.of)
        assert one.operation is not None or not one.of
        assert one.of == "" or one.of in (*teachers.miniatures(), *every())
        assert one.name not in teachers.registry()
        assert set(one.decoys) <= set(COMPONENTS)
        assert one.planted
        assert one.summary.endswith(".")


def test_further_pre_trainings_differ_in_the_seed_alone():
    first, second, third = (every()[name] for name in ("hub", "hub_2", "hub_3"))
    assert specimens.members("hub") == (first, second, third)
    assert specimens.members("sharp") == (every()["sharp"],)
    assert specimens.members("deit_s") == ()
    assert len({one.pretraining.seed for one in (first, second, third)}) == 3
    how = replace(second.pretraining, seed=first.pretraining.seed)
    assert replace(second, name="hub", pretraining=how) == first
    assert pretraining.spec("hub_2").seed.data == pretraining.spec("hub_2").seed.model == second.pretraining.seed


def test_those_that_ship_are_what_the_table_says():
    for name in HERE:
        if (how := every()[name].pretraining) is None:
            continue
        facts = sources.metadata(every()[name].file)
        spec = pretraining.spec(name)
        assert facts["run"] == spec.id
        assert facts["data"]["train"] == how.train
        assert facts.get("planted") == (None if how.losses is None else how.losses.model_dump(mode="json"))
        assert every()[name].file.stat().st_size < 1_000_000


@pytest.mark.parametrize("name", HERE)
def test_a_specimen_loads_by_its_name(name):
    found = teachers.teacher(name, "mini")
    assert found.label == f"{name} (specimen)"
    assert specimens.is_specimen(found)
    assert not teachers.is_miniature(found)
    assert teachers.is_shipped(found)
    assert loading.load(found).network == found.network
    assert classes.of_teacher(found).data.name == "digits"
    assert Teacher.model_validate_json(found.model_dump_json()) == found


def test_a_specimen_is_in_no_list_of_teachers():
    assert not {*every()} & {*teachers.registry(), *teachers.miniatures(), *Lab(settings.resolve("mini")).teachers}
    assert not {*every()} & {row["name"] for row in listing.rows("mini")}
    assert [row["name"] for row in listing.specimen_rows()] == list(every())
    json.dumps(listing.specimen_rows())
    listing.specimen_table(listing.specimen_rows())


def test_an_operation_is_part_of_the_run_and_of_the_weights_name():
    lab = Lab(settings.resolve("mini"))
    plain, sharp, shuffled = (lab.teacher(name) for name in ("dinov2_s", "sharp", "shuffled"))
    assert plain.sha256 == sharp.sha256
    assert len({one.weights for one in (plain, sharp, shuffled)}) == 3
    ids = set()
    for one in (plain, sharp, sharp.model_copy(update={"operation": Operation(name="uniform", layers=(0,))})):
        student = lab.student(one)
        ids.add(lab.arm("copy", student, one, transfer=lab.transfer("copy", student)).specs[0].id)
    assert len(ids) == 3
    assert lab.baseline(plain).specs == lab.baseline(sharp).specs


def test_a_run_of_a_miniature_has_the_id_it_had():
    spec = pretraining.spec("deit_s")
    assert spec.id == sources.metadata(sources.shipped_path("deit_s"))["run"]
    assert "planted" in spec.model_dump()
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("reference", "profile", "message", "hint"),
    [
        (
            "shuffled",
            "paper",
            "shuffled is a specimen, a miniature with a planted fault: there is none at paper",
            "mini",
        ),
        (
            "shuffled@x.safetensors",
            "mini",
            "shuffled is a specimen, a miniature with a planted fault: it takes no file",
            "type",
        ),
        ("shufled", "mini", "unknown teacher 'shufled', did you mean 'shuffled'?", "lists them"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_type(reference, profile, message, hint):
    with pytest.raises(UserError) as caught:
        teachers.teacher(reference, profile)
    assert message in str(caught.value)
    assert hint in str(caught.value)


def test_a_specimen_that_was_not_pre_trained_says_how(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "SHIPPED", tmp_path)
    with pytest.raises(UserError, match="'atdiag pretrain weak --install' makes them"):
        teachers.teacher("weak", "mini")
    assert not any(row["available"] for row in listing.specimen_rows())


def test_what_is_derived_is_not_pre_trained():
    with pytest.raises(UserError, match="sharp is derived from dinov2_s when it is loaded"):
        pretraining.spec("sharp")


def test_a_specimens_name_is_taken():
    with pytest.raises(ValueError, match="there is already a teacher 'shuffled'"):
        teachers.register_teacher("shuffled", "vit_tiny_patch16_224")


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "sharp", "layers": (0,)},
        {"name": "sharp", "layers": (0,), "factor": 8.0, "seed": 0},
        {"name": "shuffled"},
        {"name": "drawn_anew", "layers": (0,), "seed": 0},
    ],
)
def test_an_operation_takes_its_own_fields_and_no_other(fields):
    with pytest.raises(ValueError, match="and no other field"):
        Operation(**fields)


def test_an_operation_on_a_block_that_is_not_there_is_refused():
    plain = teachers.teacher("deit_s", "mini")
    with pytest.raises(ValueError, match="the network has 12 blocks"):
        Teacher(**{**plain.model_dump(), "operation": {"name": "uniform", "layers": (12,)}})
