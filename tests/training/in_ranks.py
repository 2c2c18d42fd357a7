"""Train runs over ranks, or in one process: ``torchrun --nproc-per-node N in_ranks.py STORE`` (see ``test_ranks``)."""

import contextlib
import sys
from pathlib import Path
from unittest import mock

import torch

from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.core.spec import Data, Recipe, Transfer
from atdiag.training import cohort
from atdiag.training.ranks import ALONE, join
from tests.training.conftest import Bench, load_teacher

EVERYTHING = Recipe(
    epochs=6, batch_size=16, drop_path=0.2, mixup=0.8, cutmix=1.0, label_smoothing=0.1, ema=0.9, warmup_epochs=1
)
SMALL = Recipe(epochs=3, batch_size=5, crop=0.5, flip=True, erase=0.5, clip_grad=None)
"""Two ranks have 2 and 3 images of a batch, three have 1, 2 and 2."""
MICRO = 3
"""Of the 4 or 6 images of a rank the last part is of one image, or there is none."""


def specs():
    """Return cohorts of runs of 30 steps: Mixup, drop path, EMA, validation; and augmentation without Mixup."""
    data = Data(train=85, test_per_source=1, validation=20)
    one = [
        Bench.spec(recipe=EVERYTHING, data=data, transfer=transfer)
        for transfer in (
            Transfer(),
            Transfer(method="copy", layers=(2, 3, 4, 5)),
            Transfer(method="distill", layers=range(6)),
            Transfer(method="copy", layers=(1,), average="examples"),
        )
    ]
    other = Bench.spec(recipe=SMALL, data=Data(train=50, test_per_source=1), transfer=Transfer(method="logits"))
    return [one, [other]]


@contextlib.contextmanager
def float64():
    """Compute everything in float64, the losses too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            yield
    finally:
        torch.set_default_dtype(before)


PRECISIONS = {"float64": float64, "float32": contextlib.nullcontext}


def train(folder: Path, ranks=ALONE) -> None:
    """Train all runs in float64 and in float32."""
    for name, precision in PRECISIONS.items():
        store = Store(folder / name)
        for group, micro in zip(specs(), (MICRO, None), strict=True):
            options = ExecutionOptions(device="cpu", micro_batch=micro)
            with precision():
                statuses = cohort.train(group, store, load_teacher, options, ranks=ranks)
            assert set(statuses.values()) == {"finished"}


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), join()[0])
