"""A user's own teacher and images: what is chosen from the teacher, and how long within a time."""

import re

import pytest
import torch

from atdiag.core.errors import UserError
from atdiag.core.options import ExecutionOptions
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed
from atdiag.execution import gpus, rate
from atdiag.networks.registry import preprocessing
from atdiag.study import own
from atdiag.study.own import Budget, Length


@pytest.mark.parametrize(
    ("text", "seconds", "said"),
    [
        ("20m", 1200, "20m"),
        ("1.5h", 5400, "1.5h"),
        ("90 s", 90, "1.5m"),
        ("2 days", 172_800, "2d"),
        (".5h", 1800, "30m"),
    ],
)
def test_times(text, seconds, said):
    assert Budget.parse(text) == Budget(seconds)
    assert str(Budget(seconds)) == said
    assert Budget.parse(said) == Budget(seconds)


@pytest.mark.parametrize("text", ["20", "m", "-5m", "0m", "5 weeks", "1h30"])
def test_no_times(text):
    with pytest.raises(UserError, match=re.escape(f"`budget` {text!r} is not a time: give a number and a unit")):
        Budget.parse(text)


def test_the_settings_of_a_length():
    assert Length(9, 1e9, 60, "5m", None, "").settings == {"recipe.epochs": 9, "recipe.warmup_epochs": 0.9}
    assert Length(90, 1e9, 60, "5m on h100", "h100", "").settings == {
        "recipe.epochs": 90,
        "recipe.warmup_epochs": 5.0,
        "recipe.precision": "bfloat16",
    }


def test_gpus_that_were_measured():
    assert gpus.speed("h100", 768) == gpus.speed("h100", 1024) == gpus.GPUS["h100"].measured
    assert gpus.speed("h100", 192) == gpus.GPUS["h100"].flops_per_second / 4


@pytest.mark.parametrize(
    ("model", "own_size", "expected"),
    [
        ("deit_tiny_patch16_224.fb_in1k", None, (224, 0.9, "bicubic")),
        ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 384, (384, 0.9, "bicubic")),
        ("vit_base_patch16_clip_quickgelu_224.openai", None, (224, 0.9, "bicubic")),
        ("test_vit", 96, (96, 0.95, "bicubic")),
    ],
)
def test_images_as_the_teacher_expects_them(model, own_size, expected, tmp_path):
    import timm

    reference = f"timm:{model}"
    if own_size is not None:  # fine-tuned at another resolution: its position embeddings say so
        network = timm.create_model(model, img_size=own_size, depth=1)
        state = network.state_dict()
        file = tmp_path / "mine.pth"
        torch.save(state, file)
        reference += f"@{file}"
    facts = timm.get_pretrained_cfg(model)
    found = preprocessing.of(reference)
    assert (found.image_size, found.crop_share, found.interpolation) == expected
    assert (found.crop_share, found.interpolation) == (facts.crop_pct, facts.interpolation)


def test_other_profiles_are_left_alone():
    from tests.studies import lab

    settings = lab().settings
    assert own.suited(settings, "no such teacher") is settings


def test_a_rate_is_measured_by_training(monkeypatch):
    monkeypatch.setattr(rate, "_SECONDS", 0.5)
    network = Network(image_size=20, patch_size=4, channels=1, width=32, depth=2, heads=2, classes=10)
    run = RunSpec(
        network=network, data=Data(train=256), recipe=Recipe(epochs=3, batch_size=32), seed=Seed(data=0, model=0)
    )
    specs = [run, run.model_copy(update={"seed": Seed(data=1, model=1)})]
    found = rate.measure(specs, ExecutionOptions(device="cpu", threads=1))
    assert 1e8 < found < 1e13
    with pytest.raises(ValueError, match="none of these runs is trained"):
        rate.measure(
            [run.model_copy(update={"recipe": Recipe(epochs=0, batch_size=1)})], ExecutionOptions(device="cpu")
        )
