"""A step that would certainly fail is found before anything is trained."""

import pytest
import torch

from atdiag.core.errors import UserError
from atdiag.core.spec import Data, Init, Network, Recipe, RunSpec, Seed, Teacher, Transfer
from atdiag.networks.model import students
from atdiag.training.trial import trial

NETWORK = Network(image_size=8, patch_size=4, channels=1, width=16, depth=2, heads=2, classes=3)
NATIVE = NETWORK.model_copy(update={"components": ("registers",), "registers": 2})
TEACHER = Teacher(name="mine", profile="small", network=NATIVE, sha256="1" * 64)


def spec(**parts) -> RunSpec:
    recipe, seed = Recipe(epochs=1), Seed(data=0, model=0)
    return RunSpec(network=NETWORK, teacher=TEACHER, data=Data(train=64), recipe=recipe, seed=seed, **parts)


KINDS = [
    spec(transfer=Transfer(method="copy", layers=(0, 1))),
    spec(transfer=Transfer(method="distill", layers=(1,), loss="jsd")),
    spec(transfer=Transfer(method="logits")),
    spec(transfer=Transfer(method="features", layers=(0,))),
    spec(init=Init(source="teacher", reinit=("attn",))),
]


def load(teacher):
    return students.build(teacher.network, 0).eval().requires_grad_(False)


def test_trainable_runs_pass_and_each_teacher_is_loaded_once():
    loaded = []

    def counted(teacher):
        loaded.append(teacher)
        return load(teacher)

    trial([*KINDS, *KINDS, spec()], counted)
    assert loaded == [TEACHER]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.transfer.method)
def test_a_teacher_that_fails_is_named_with_the_method(kind):
    class Broken(torch.nn.Module):
        network = NATIVE

        def observe(self, *_):
            raise RuntimeError("block 1 attends twice: it has no single map\nand more")

        def state_dict(self, **_):
            raise RuntimeError("block 1 attends twice: it has no single map")

    with pytest.raises(UserError, match="mine") as found:
        trial([kind], lambda teacher: Broken())
    text = str(found.value)
    assert "and more" not in text
    assert (kind.transfer.method in text) if kind.transfer.method != "none" else ("start a student" in text)
