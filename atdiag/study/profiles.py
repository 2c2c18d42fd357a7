"""Profiles, as data: the scales at which everything runs."""

from __future__ import annotations

from atdiag.core.spec import Data, Recipe, Spec
from atdiag.data.embedded import USUAL
from atdiag.study.transfer_settings import TransferSettings

METHODS = ("none", "copy", "distill", "finetune")
"""Methods with a recipe. ``finetune`` starts from all of a teacher's weights and transfers nothing."""


class Profile(Spec):
    """A scale: data, a recipe for each transfer method, and a number of seeds."""

    name: str
    summary: str
    data: Data
    recipe: dict[str, Recipe]
    """By transfer method, since optimisation may differ between methods, as in the 2024 paper."""
    transfer: TransferSettings = TransferSettings()
    """Settings of every transfer, unless the experiment varies them."""
    seeds: int
    device: str | None = None
    """Default training device; None: the best device found."""
    threads: int | None = None
    """Threads of one training process on a CPU; None: the cores divided among the processes."""


_MINI_RECIPE = Recipe(epochs=4, batch_size=32, lr=2e-3, warmup_epochs=0.5)


_DEIT = Recipe(
    epochs=100,
    lr=1e-3,
    warmup_epochs=5,
    betas=(0.9, 0.999),
    label_smoothing=0.1,
    drop_path=0.1,
    mixup=0.8,
    cutmix=1.0,
    rand_augment="rand-m9-mstd0.5-inc1",
    crop=0.08,
    flip=True,
    erase=0.25,
    precision="bfloat16",
)
"""Touvron et al. 2021, table 9, for 100 epochs (Qin et al. 2026 train up to 100): one recipe for scratch, copy and
distillation, so that a contrast measures the transfer. The papers' recipes differ by method and size; set
``recipe.copy.lr`` etc. to follow them."""


_SHORT = Recipe(
    epochs=30,
    batch_size=64,
    lr=5e-4,
    warmup_epochs=1,
    betas=(0.9, 0.999),
    label_smoothing=0.1,
    crop=0.35,
    flip=True,
)
"""For trainings of minutes to hours on a user's own images: DeiT's optimiser with the augmentation that does not need
hundreds of epochs (no Mixup, CutMix, RandAugment, erasing or stochastic depth)."""

OWN_PROFILE = "own"
"""The profile of a user's own images."""


def _recipes(recipe: Recipe, finetune_lr: float) -> dict[str, Recipe]:
    """Return a recipe for each method: all equal, except that fine-tuning uses a smaller learning rate."""
    return dict.fromkeys(METHODS, recipe) | {"finetune": recipe.model_copy(update={"lr": finetune_lr})}


PROFILES: dict[str, Profile] = {
    "mini": Profile(
        name="mini",
        summary="miniature teachers on embedded cluttered digits; a CPU, minutes",
        data=USUAL,
        recipe=_recipes(_MINI_RECIPE, finetune_lr=5e-4),
        seeds=3,
        device="cpu",  # too small to benefit from a GPU, and bitwise equal everywhere
        threads=1,
    ),
    "small": Profile(
        name="small",
        summary="published teachers on Imagenette at 128 px; one GPU, hours",
        data=Data(name="imagenette", train=1, image_size=128),
        recipe=_recipes(_DEIT.model_copy(update={"batch_size": 256}), finetune_lr=1e-4),
        seeds=3,
    ),
    "paper": Profile(
        name="paper",
        summary="published teachers on ImageNet-1k; many GPUs, days",
        data=Data(name="imagenet", train=1, image_size=224),
        recipe=_recipes(_DEIT.model_copy(update={"batch_size": 1024}), finetune_lr=1e-4),
        seeds=3,
    ),
    OWN_PROFILE: Profile(
        name=OWN_PROFILE,
        summary="your own images, at the size and crop that the teacher expects; minutes to days, as you like",
        data=Data(name="folder:", train=1, image_size=224, validation=0.1),
        recipe=_recipes(_SHORT, finetune_lr=1e-4),
        seeds=3,
    ),
}
