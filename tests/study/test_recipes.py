"""Published recipes: each preset's golden id, what overrides it, and where it is refused."""

import pytest

from atdiag.core.errors import UserError
from atdiag.core.selection import indices
from atdiag.core.spec import Data, Network, RunSpec, Seed
from atdiag.study import recipes, settings
from atdiag.study.builder import Lab
from atdiag.study.profiles import METHODS
from tests.commands import wrong

NETWORK = Network(image_size=224, patch_size=16, width=1024, depth=24, heads=16, classes=1000)
DATA = Data(name="imagenet", train=1_281_167, image_size=224)
GOLDEN = {
    "li2024-copy": "916fe25c36933427",
    "li2024-distill": "43bfdc4dcb73c868",
    "li2024-finetune": "624e51517c741974",
    "mae-scratch": "a25352486ab0b5b3",
    "deit": "46cde2de45bc46aa",
}


def applied(monkeypatch, name, *sets):
    """The recipes of profile paper under a preset, without ImageNet on this machine."""
    monkeypatch.setattr(settings.sources, "complete", lambda data, train: data.model_copy(update={"train": 1_281_167}))
    return settings.resolve("paper", sets=sets, recipe=name, environment={})


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_presets_run_has_its_golden_id(monkeypatch, name):
    method = recipes.RECIPES[name][0] or "none"
    found = applied(monkeypatch, name).profile
    spec = RunSpec(network=NETWORK, data=DATA, recipe=found.recipe[method], seed=Seed(data=0, model=0))
    assert spec.id == GOLDEN[name]
    changed = [other for other in METHODS if found.recipe[other] != settings.PROFILES["paper"].recipe[other]]
    assert changed == (list(METHODS) if name == "deit" else [method])


def test_each_rate_is_its_base_rate_scaled_by_the_batch():
    for name, base, per in (
        ("li2024-copy", 1e-3, 256),
        ("li2024-distill", 1e-4, 256),
        ("li2024-finetune", 1e-3, 256),
        ("mae-scratch", 1e-4, 256),
        ("deit", 5e-4, 512),
    ):
        fields = recipes.RECIPES[name][1]
        assert fields["lr"] == pytest.approx(base * fields["batch_size"] / per)


def test_several_presets_one_for_each_method_and_the_users_own_settings_above(monkeypatch):
    found = applied(monkeypatch, "li2024-copy,li2024-distill,mae-scratch", "recipe.epochs=30", "recipe.copy.lr=0.1")
    recipe = found.profile.recipe
    assert [recipe[name].epochs for name in METHODS] == [30, 30, 30, 30]
    assert (recipe["copy"].lr, recipe["distill"].lr, recipe["none"].lr) == (0.1, 8e-4, 1.6e-3)
    assert recipe["copy"].layer_decay == 0.75 and recipe["distill"].layer_decay is None
    assert found.told["recipe"] == "li2024-copy,li2024-distill,mae-scratch"
    again = settings.changed(found, "recipe.copy.epochs", 9).profile
    assert again.recipe["copy"].epochs == 9 and again.recipe["copy"].min_lr == 2e-3
    assert indices(found.profile.transfer.layers, 24, "transfer.layers") == tuple(range(21))
    assert applied(monkeypatch, "li2024-copy", "transfer.layers=top:6").profile.transfer.layers == "top:6"


def test_a_share_of_the_blocks_is_rounded_down():
    assert indices("bottom:21/24", 12, "transfer.layers") == tuple(range(10))
    assert indices("top:1/2", 5, "transfer.layers") == (3, 4)
    assert indices("top:1/24", 12, "transfer.layers") == (11,)
    for odd in ("top:5/4", "top:0/4", "top:1/0"):
        with pytest.raises(UserError, match="no share of all"):
            indices(odd, 12, "transfer.layers")


def test_students_are_read_by_the_mean_of_their_patches():
    lab = Lab(settings.resolve("mini", sets=["transfer.pool=mean"], environment={}))
    for name, own in (("deit_s", ("mean_pool",)), ("dinov2_reg_s", ("mean_pool",)), ("siglip2_b", ())):
        teacher = lab.teacher(name)
        assert lab.student(teacher).components == own
        native = lab.student(teacher, teacher.network.components)
        assert {*native.components} == {*teacher.network.components, *own}
    plain = Lab(settings.resolve("mini", environment={}))
    assert plain.student(plain.teacher("deit_s")).components == ()


def test_a_preset_that_cannot_be_meant_is_refused_in_one_line(capsys):
    line = ["layers", "--teacher", "deit_s", "--dry-run"]
    assert "ImageNet" in (told := wrong(capsys, *line, "--recipe", "li2024-copy")) and "--profile paper" in told
    assert "did you mean 'li2024-copy'" in wrong(capsys, *line, "--recipe", "li2024-copi")
    both = wrong(capsys, *line, "--recipe", "deit,mae-scratch")
    assert "deit and mae-scratch are both for students from scratch" in both
    assert "--recipe" in wrong(capsys, *line, "--recipe", "")
