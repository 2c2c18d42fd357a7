"""Files with weights and their moving average: the choice is reported, recorded, and part of a run's identity."""

import pytest
import timm
import torch
from timm.models import load_state_dict

from atdiag.core.spec import Data, Recipe, RunSpec, Seed, Transfer
from atdiag.execution.plan import cohorts
from atdiag.networks.registry import teachers
from atdiag.networks.weights import formats, loading, sources
from atdiag.networks.weights.sources import WeightsError

MODEL = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return timm.create_model(MODEL).state_dict()


def average(weights):
    return {key: value + 0.5 for key, value in weights.items()}


@pytest.fixture(scope="module")
def both(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "both.pth"
    torch.save({"state_dict": weights, "state_dict_ema": average(weights), "epoch": 3}, path)
    return path


def bias(reference: str) -> torch.Tensor:
    teacher = teachers.teacher(reference, "small", 32)
    return loading.load(teacher).state_dict()["blocks.0.norm1.bias"]


def test_each_branch_equals_what_timm_loads(both, weights):
    key = "blocks.0.norm1.bias"
    for suffix, use_ema in (("", False), ("#ema", True)):
        assert torch.equal(bias(f"timm:{MODEL}@{both}{suffix}"), load_state_dict(str(both), use_ema=use_ema)[key])
    assert not torch.equal(bias(f"timm:{MODEL}@{both}"), bias(f"timm:{MODEL}@{both}#ema"))


def test_the_chosen_branch_is_recorded_and_reported(both):
    raw, mean = (loading.load(teachers.teacher(f"timm:{MODEL}@{both}{s}", "small", 32)) for s in ("", "#ema"))
    assert raw.origin.branch.startswith("state_dict:") and raw.origin.averages == ("state_dict_ema",)
    assert "raw weights (state_dict) were taken" in raw.origin.note and "FILE#ema" in raw.origin.note
    assert mean.origin.branch.startswith("state_dict_ema:")
    assert "moving average (state_dict_ema) was taken" in mean.origin.note


def test_the_branch_is_part_of_a_runs_identity(both):
    def spec(reference):
        teacher = teachers.teacher(reference, "small", 32)
        network = teacher.network.student((), 2)
        transfer = Transfer(method="copy", layers=(0,))
        data = Data(name="folder:x", train=2, image_size=32)
        return RunSpec(
            network=network, teacher=teacher, transfer=transfer, data=data, recipe=Recipe(epochs=1, batch_size=1),
            seed=Seed(data=0, model=0),
        )  # fmt: skip

    raw, mean = spec(f"timm:{MODEL}@{both}"), spec(f"timm:{MODEL}@{both}#ema")
    assert raw.teacher.sha256 == mean.teacher.sha256 and raw.id != mean.id
    assert "'branch': " not in str(raw._content()).replace("'branch': 'weights'", "")
    assert len(cohorts([raw, mean])) == 2  # they are different teachers
    assert (raw.teacher.label, mean.teacher.label) == (f"timm:{MODEL} (own file)", f"timm:{MODEL} (own file, average)")


def test_a_missing_branch_is_reported(weights):
    with pytest.raises(WeightsError, match=r"no moving average .* leave #ema out"):
        formats.convert({"state_dict": weights}, "ema")
    with pytest.raises(WeightsError, match=r"moving average alone .*add #ema"):
        formats.convert({"model_ema": weights})
    assert formats.convert({"model_ema": weights}, "ema").branch.startswith("model_ema")
    assert formats.convert({"model": weights, "model_ema": weights}).branch.startswith("model:")
    assert formats.convert({"state_dict": weights}).averages == ()


def test_an_existing_path_is_taken_literally(tmp_path):
    file = tmp_path / "w.pth#ema"
    assert sources.split_reference(f"timm:m@{file}") == ("timm:m", tmp_path / "w.pth", "ema")
    file.touch()
    assert sources.split_reference(f"timm:m@{file}") == ("timm:m", file, "weights")
    assert sources.split_reference("clip_b") == ("clip_b", None, "weights")
