"""Sources of settings and their precedence, and errors for wrong ones."""

import json
import os
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from atdiag.core.errors import UserError
from atdiag.core.spec import Data, Recipe
from atdiag.study.profiles import METHODS, PROFILES
from atdiag.study.settings import SEEDS, Settings, resolve, runs_folder
from atdiag.study.transfer_settings import TransferSettings
from atdiag.training import pretraining


def asked(*sets: str, toml: str | None = None, folder: Path = Path("/nonexistent"), **options) -> Settings:
    if toml is not None:
        (folder / "atdiag.toml").write_text(toml)
    return resolve(sets=sets, folder=folder, **{"environment": {}, **options})


def refused(*sets: str, **options) -> str:
    """Return the one-line message."""
    with pytest.raises(UserError) as fault:
        asked(*sets, **options)
    text = str(fault.value)
    assert len(text.splitlines()) == 1
    assert len(text) < 400
    return text


# --- where a setting comes from ------------------------------------------------------------------------------------


def test_the_default_is_mini_with_three_seeds_of_pairs():
    found = asked()
    assert found.profile == PROFILES["mini"]
    assert [(seed.data, seed.model) for seed in found.seeds] == [(0, 0), (1, 1), (2, 2)]
    assert found.runs == Path("runs")
    assert found.overrides == {}


def test_command_line_wins_over_environment_over_file(tmp_path):
    file = 'profile = "from_file"\nruns = "file_runs"\nseeds = 5\n[recipe]\nepochs = 7\nlr = 0.5\n'
    everywhere = {"ATDIAG_PROFILE": "from_environment", "ATDIAG_RUNS": "environment_runs"}
    (tmp_path / "atdiag.toml").write_text(file)
    assert "from_line" in refused(folder=tmp_path, profile="from_line", environment=everywhere)
    assert "from_environment" in refused(folder=tmp_path, environment=everywhere)
    assert "from_file" in refused(folder=tmp_path)

    found = asked(
        "recipe.epochs=9", folder=tmp_path, profile="mini", seeds=2, runs=Path("line_runs"), environment=everywhere
    )
    assert found.runs == Path("line_runs")
    assert len(found.seeds) == 2
    assert {r.epochs for r in found.profile.recipe.values()} == {9}
    assert {r.lr for r in found.profile.recipe.values()} == {0.5}
    assert found.overrides == {"recipe.epochs": 9, "recipe.lr": 0.5}

    found = asked(folder=tmp_path, profile="mini", environment=everywhere)
    assert (found.runs, len(found.seeds)) == (Path("environment_runs"), 5)
    assert asked(folder=tmp_path, profile="mini").runs == tmp_path / "file_runs"


def test_an_empty_variable_is_an_unset_one():
    assert asked(environment={"ATDIAG_PROFILE": "", "ATDIAG_RUNS": ""}) == asked()


def test_the_folder_of_runs_may_start_with_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert asked(environment={"ATDIAG_RUNS": "~/runs"}).runs == Path("/home/someone/runs")


@pytest.mark.parametrize("order", [1, -1])
def test_a_methods_own_field_wins_in_any_order(order):
    recipe = asked(*["recipe.copy.lr=0.5", "recipe.lr=0.25"][::order]).profile.recipe
    assert {method: recipe[method].lr for method in METHODS} == {
        "none": 0.25,
        "copy": 0.5,
        "distill": 0.25,
        "finetune": 0.25,
    }


@pytest.mark.parametrize("tables", ["[recipe]\nlr = 0.25\n[recipe.copy]\nlr = 0.5", "[recipe.copy]\nlr = 0.5"])
def test_a_methods_own_field_in_the_file(tmp_path, tables):
    assert asked(toml=tables, folder=tmp_path).profile.recipe["copy"].lr == 0.5
    # ... but a value typed for all methods wins over the file's value for one
    found = asked("recipe.lr=0.125", folder=tmp_path)
    assert {recipe.lr for recipe in found.profile.recipe.values()} == {0.125}
    assert found.overrides == {"recipe.lr": 0.125}


def test_every_field_can_be_set(tmp_path):
    found = asked(
        "data.name=larger", "data.clutter=2", "recipe.betas=[0.8, 0.9]", "recipe.clip_grad=null", "transfer.weight=2",
        "recipe.rand_augment=rand-m9-mstd0.5-inc1", "recipe.precision=bfloat16", "recipe.lr=1",
    )  # fmt: skip
    assert (found.profile.data.name, found.profile.data.clutter) == ("larger", 2)
    recipe = found.profile.recipe["distill"]
    assert (recipe.betas, recipe.clip_grad, recipe.precision, recipe.lr) == ((0.8, 0.9), None, "bfloat16", 1.0)
    assert recipe.rand_augment == "rand-m9-mstd0.5-inc1"
    assert found.profile.transfer.weight == 2
    for name, value in PROFILES["mini"].recipe["copy"].model_dump(mode="json").items():
        found = asked(f"recipe.{name}={json.dumps(value)}", "recipe.finetune.lr=5e-4")
        assert found.profile == PROFILES["mini"]


def test_a_whole_number_may_be_typed_with_an_exponent():
    found = asked("data.train=1e3", "recipe.lr=1e-3", "transfer.weight=1e1")
    assert (found.profile.data.train, found.profile.recipe["copy"].lr) == (1000, 1e-3)
    assert found.profile == asked("data.train=1000", "recipe.lr=0.001", "transfer.weight=10.0").profile


def test_overrides_do_not_change_the_profile():
    before = PROFILES["mini"].model_dump()
    asked("recipe.epochs=9", "data.train=100")
    assert PROFILES["mini"].model_dump() == before


# --- what is said of a wrong one -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["recipe.epochs"], "'recipe.epochs' is not NAME=VALUE: write it as `recipe.epochs`=40"),
        (["=3"], "is not NAME=VALUE"),
        ([""], "is not NAME=VALUE"),
        (["recipe.epcohs=3"], "'recipe.epcohs' is not a setting, did you mean 'recipe.epochs'?"),
        (["epochs=3"], "did you mean 'recipe.epochs'?"),
        (["qqqqqqqqqqqqqqqqqqq=3"], "'atdiag reinit --dry-run'"),
        (["a\nb=3"], "'a\\nb' is not"),
        (["recipe=3"], "'recipe' is not"),
        (["recipe.copy=3"], "'recipe.copy' is not"),
        (["recipe.lr=1", "recipe.lr=2"], "recipe.lr is given twice (1 and 2)"),
        (["recipe.epochs=many"], "recipe.epochs='many': input should be a valid integer"),
        (["recipe.epochs=1.5"], "recipe.epochs=1.5: input should be a valid integer"),
        (["recipe.epochs=true"], "recipe.epochs=true: input should be a valid integer"),
        (['recipe.epochs="3"'], "recipe.epochs='3': input should be a valid integer"),
        (["recipe.epochs=-1"], "recipe.epochs=-1: input should be greater than or equal to 0"),
        (["recipe.epochs="], "recipe.epochs=''"),
        (["recipe.copy.lr=-1"], "recipe.copy.lr=-1: "),
        (["recipe.lr=-1"], "recipe.lr=-1: "),
        (["recipe.lr=fast"], "recipe.lr='fast': input should be a valid number"),
        (["recipe.betas=[0.9]"], "recipe.betas=[0.9]: a list of more numbers is needed, as [0.9,0.95]"),
        (["recipe.betas=0.9"], "recipe.betas=0.9: write a list, as [0.9,0.95]"),
        (["recipe.flip=maybe"], "recipe.flip='maybe': write true or false"),
        (["recipe.betas=[0.9, 1]"], "recipe.betas[1]=1: input should be less than 1"),
        (["recipe.precision=fp16"], "recipe.precision='fp16': input should be 'float32' or 'bfloat16'"),
        (["recipe.clip_grad=0"], "recipe.clip_grad=0: input should be greater than 0"),
        (["recipe.ema=1.0"], "recipe.ema=1.0: input should be less than 1"),
        (["recipe.ema=-1"], "recipe.ema=-1: input should be greater than or equal to 0"),
        (["recipe.ema=abc"], "recipe.ema='abc': input should be a valid number"),
        (["data.name=digit"], "unknown data set 'digit', did you mean 'digits'?"),
        (["data.name=3"], "data.name=3: input should be a valid string"),
        (["data.name=foldr:/x"], "unknown data set 'foldr:/x', did you mean 'folder:/x'?"),
        (["data.train=null"], "data.train=null: input should be a valid integer"),
        (["data.train=1e9"], "data.train=1000000000 is too large"),
        (["data.clutter=65"], "data.clutter=65"),
        (["transfer.weight=much"], "transfer.weight='much': input should be a valid number"),
        (["transfer.loss=cross_entropy"], "transfer.loss='cross_entropy': unknown loss"),
        (["transfer.average=images"], "transfer.average='images': input should be 'examples'"),
        (["transfer.weight=-1"], "transfer.weight=-1: "),
        (["transfer.method=copy"], "'transfer.method' is not"),
        (["recipe.rand_augment=strong"], "recipe.rand_augment='strong' is not one of timm's configurations"),
        (["recipe.rand_augment=rand-x9"], "write it as 'rand-m9-mstd0.5-inc1'"),
    ],
)  # fmt: skip
def test_wrong_overrides(sets, says):
    assert says in refused(*sets)


@pytest.mark.parametrize("name", ["data.train", "data.test_per_source", "recipe.epochs", "recipe.mixup", "recipe.lr"])
@pytest.mark.parametrize(
    "value",
    [
        *("NaN", "Infinity", "-Infinity", "1e400"),
        pytest.param("1" * 30, id="1e30"),
        pytest.param("9" * 5000, id="5000 digits"),
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_infinite_and_absurd_values_are_refused(name, value):
    if name == "recipe.lr" and value == "1" * 30:
        return  # absurd, but only an error at run time, which names the run and the step
    text = refused(f"{name}={value}")
    assert text.startswith((f"{name}=", "recipe.mixup or"))


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["recipe.batch_size=64", "data.train=32"], "larger than the training set (data.train=32): give at most"),
        (["recipe.copy.batch_size=99999"], "recipe.batch_size=99999 is larger than the training set"),
        (["recipe.warmup_epochs=5", "recipe.epochs=4"], "_epochs=5 is longer than recipe.epochs=4: give at most 4"),
        (["recipe.epochs=0"], "recipe.epochs=0 trains nothing: give at least 1"),
        (["recipe.epochs=0", "recipe.warmup_epochs=0"], "recipe.epochs=0 trains nothing"),
    ],
)  # fmt: skip
def test_contradictions(sets, says):
    assert says in refused(*sets)


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_numbers_of_seeds(count, tmp_path):
    assert f"`seeds` {count}: give a number from 1 to 1000" in refused(seeds=count)
    assert f"atdiag.toml: seeds = {count}" in refused(toml=f"seeds = {count}", folder=tmp_path)


def test_seeds_are_consecutive_from_the_first(tmp_path):
    def seeds(**given):
        return [(seed.data, seed.model) for seed in asked(**given).seeds]

    assert seeds(first_seed=100) == [(100, 100), (101, 101), (102, 102)]
    assert seeds(first_seed=7, seeds=1) == [(7, 7)]
    assert seeds(toml="first_seed = 5\nseeds = 2", folder=tmp_path) == [(5, 5), (6, 6)]
    assert seeds(folder=tmp_path, first_seed=0) == [(0, 0), (1, 1)]
    assert {pretraining.SEED.data, pretraining.SEED.model} == {SEEDS}, "no study reaches the miniatures' seed"
    assert seeds(first_seed=SEEDS - 3)[-1] == (SEEDS - 1, SEEDS - 1)


@pytest.mark.parametrize("first", [-1, SEEDS - 2])
def test_first_seeds_out_of_range(first, tmp_path):
    says = f"give a number from 0 to {SEEDS - 3}"
    assert refused(first_seed=first) == f"`first_seed` {first}: {says}"
    assert f"atdiag.toml: first_seed = {first}: {says}" in refused(toml=f"first_seed = {first}", folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mnii", "unknown profile 'mnii', did you mean 'mini'? (known: mini, small, paper, own)"),
        ("", "unknown profile ''"),
    ],
)
def test_profiles(name, says, tmp_path):
    assert says in refused(profile=name)
    if name:
        assert says in refused(environment={"ATDIAG_PROFILE": name})
    assert says in refused(toml=f'profile = "{name}"', folder=tmp_path)
    if "unknown" in says:
        assert refused(profile=name).startswith("`profile`: ")
        assert refused(folder=tmp_path).startswith(f"{tmp_path / 'atdiag.toml'}: ")


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("profile = ", "can't be read (Invalid value (at"),
        ("seeds = 3\nseeds = 4", "can't be read (Cannot overwrite a value (at"),
        ("[recipe]\nlr = 1\n[recipe]\nlr = 2", "can't be read ("),
        ("[recipe]\nlr = 1\nlr = 2", "can't be read ("),
        pytest.param(f"seeds = {'9' * 5000}", "can't be read (Exceeds the limit", id="5000 digits"),
        (
            "profil = 'mini'",
            "unknown key 'profil', did you mean 'profile'? (known: profile, seeds, first_seed, runs, data_dir, ",
        ),
        ("[recipes]\nlr = 1", "unknown key 'recipes', did you mean 'recipe'?"),
        ("epochs = 3", "unknown key 'epochs'"),
        ("profile = 3", "profile = 3 has the wrong type: write it as 'profile = \"mini\"'"),
        ("seeds = '3'", "seeds = '3' has the wrong type: write it as 'seeds = 3'"),
        ("seeds = true", "seeds = true has the wrong type"),
        ("runs = [1979-05-27]", "has the wrong type"),
        ("seeds = 3.0", "seeds = 3.0 has the wrong type"),
        ("runs = ['a']", 'runs = ["a"] has the wrong type'),
        ("recipe = 3", "recipe = 3 is not a table: write its fields under '[recipe]'"),
        ("[[recipe]]\nlr = 1", "is not a table"),
        ("[recipe]\nepcohs = 3", "atdiag.toml: 'recipe.epcohs' is not a setting, did you mean 'recipe.epochs'?"),
        ("[recipe.copyy]\nlr = 3", "'recipe.copyy.lr' is not a setting, did you mean 'recipe.copy.lr'?"),
        ("[recipe.copy.lr]\na = 3", "'recipe.copy.lr.a' is not"),
        ("[recipe]\nepochs = true", "recipe.epochs=true: input should be a valid integer"),
        ("[recipe]\nlr = nan", "recipe.lr=nan: input should be a finite number"),
        ("[recipe]\nlr = 2026-01-01", "recipe.lr='2026-01-01': input should be a valid number"),
        ("[recipe.distill]\nlr = -1", "recipe.distill.lr=-1: "),
        ("[data]\ntrain = 16", "recipe.batch_size=32 is larger than the training set (data.train=16)"),
        ("[transfer]\nweight = 'a'", "transfer.weight='a': "),
    ],
)
def test_wrong_files(toml, says, tmp_path):
    assert says in refused(toml=toml, folder=tmp_path)


@pytest.mark.parametrize("make", ["folder", "bytes"])
def test_files_that_are_not_text(make, tmp_path):
    if make == "folder":
        (tmp_path / "atdiag.toml").mkdir()
    else:
        (tmp_path / "atdiag.toml").write_bytes(b"\xff\xfe\x00")
    assert f"{tmp_path / 'atdiag.toml'} can't be read (" in refused(folder=tmp_path)


# --- any input at all ----------------------------------------------------------------------------------------------

NAMES = [f"data.{f}" for f in Data.model_fields]
NAMES += [f"recipe.{m}{f}" for m in ("", "copy.") for f in Recipe.model_fields] + [
    f"transfer.{f}" for f in TransferSettings.model_fields
]
VALUES = st.one_of(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    ).map(json.dumps),
    st.text(max_size=10),
)


@given(st.lists(st.one_of(st.text(max_size=30), st.builds("{}={}".format, st.sampled_from(NAMES), VALUES)), max_size=3))
@example(["recipe.rand_augment=\udc80"])
@example(["recipe.betas=[1e400,{}]"])
@example(["data.train=" + "9" * 400])
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_any_input_is_understood_or_refused(sets):
    try:
        found = asked(*sets)
    except UserError as fault:
        assert len(str(fault).splitlines()) == 1
    else:
        assert found.profile.model_dump_json()
        assert all(recipe.epochs * found.profile.data.train > 0 for recipe in found.profile.recipe.values())


# Real images


def test_the_larger_profiles_use_real_images():
    """Planning needs neither the images nor the weights."""
    small, paper = (resolve(profile=name, environment={}).profile for name in ("small", "paper"))
    assert (small.data.name, small.data.train, small.data.image_size) == ("imagenette", 9469, 128)
    assert (paper.data.name, paper.data.train, paper.data.image_size) == ("imagenet", 1_281_167, 224)
    assert {recipe.precision for recipe in (*small.recipe.values(), *paper.recipe.values())} == {"bfloat16"}


def test_another_data_set_brings_its_own_facts():
    def data(*sets, profile="mini"):
        return resolve(profile=profile, sets=sets, environment={}).profile.data

    cifar = data("data.name=cifar10")
    assert (cifar.train, cifar.image_size, cifar.clutter) == (50_000, 32, Data(train=1).clutter)
    assert data("data.name=cifar10", profile="small").image_size == 128
    assert data("data.name=cifar10", "data.per_class=7", "data.image_size=64").train == 70
    assert data("data.name=cifar10", "data.train=300").train == 300
    assert data("data.name=digits", profile="small") == PROFILES["mini"].data
    assert data("data.name=larger").clutter == PROFILES["mini"].data.clutter
    assert "has 50000 training images" in refused("data.name=cifar10", "data.train=50001")
    assert "`data.image_size` is of real images" in refused("data.image_size=20")


def test_the_folder_of_all_data_sets_can_stand_in_the_file(tmp_path, monkeypatch):
    monkeypatch.delenv("ATDIAG_DATA", raising=False)
    (tmp_path / "atdiag.toml").write_text('data_dir = "/some/folder"')
    before = dict(os.environ)
    assert resolve(folder=tmp_path).data_dir == Path("/some/folder")
    assert resolve(folder=tmp_path, environment={"ATDIAG_DATA": "/another"}).data_dir == Path("/another")
    assert resolve(folder=tmp_path, data_dir=Path("/a/third")).data_dir == Path("/a/third")
    assert dict(os.environ) == before  # resolving settings writes no environment variable


def test_the_nearest_file_above_counts_with_paths_of_its_own_folder(tmp_path, monkeypatch):
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    (tmp_path / "atdiag.toml").write_text('data_dir = "images"\nruns = "runs"\nseeds = 5')
    monkeypatch.chdir(inside)
    found = resolve(environment={})
    assert (found.runs, len(found.seeds), found.file) == (Path("../../runs"), 5, Path("../../atdiag.toml"))
    assert found.data_dir is not None and found.data_dir.resolve() == tmp_path / "images"
    assert runs_folder(environment={}) == found.runs
    assert runs_folder(Path("mine"), environment={}) == Path("mine")
    (tmp_path / "a" / "atdiag.toml").write_text('runs = "/elsewhere"')
    found = resolve(environment={})
    assert (found.runs, len(found.seeds), found.data_dir) == (Path("/elsewhere"), 3, None), "the nearest one alone"
    (tmp_path / "a" / "atdiag.toml").write_text("sed = 1")
    with pytest.raises(UserError, match=r"\.\./atdiag\.toml: unknown key 'sed'"):
        resolve(environment={})
