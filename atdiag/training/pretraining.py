"""Pre-train a miniature teacher: a from-scratch run of its native network, with more scenes and more epochs.

A specimen's run also has the losses that plant its fault, and its own length. A masked autoencoder's sees no label:
what is exported has no head, and its accuracy is that of a linear probe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from atdiag.core.errors import UserError, suggest
from atdiag.core.runs import Run
from atdiag.core.spec import NOT_MASKED, Data, Masked, Recipe, RunSpec, Seed
from atdiag.networks.registry import teachers
from atdiag.networks.registry.specimens import specimens

DATA = Data(name="digits", train=60_000, clutter=6)
"""24 times as many scenes as in a student's default recipe."""

RECIPE = Recipe(epochs=5, batch_size=64, lr=2e-3, warmup_epochs=0.5)
"""About 30 times as many images as a student sees: a teacher that a student from scratch could match would only hold it
back."""

SEED = Seed(data=1_000_000, model=1_000_000)
"""Outside the seeds of any study, so that no student shares its teacher's initialisation."""


Objective = Literal["supervised", "mae"]
"""By labels, or as a masked autoencoder."""

MASKED = Masked(share=0.4, heads=4, pixels="of network", positions="sincos")
"""What a miniature learns something from in its budget; docs/teachers.md has the settings that were tried. With He et
al.'s share and patches normalised by themselves, and learned positions in the decoder, it learned next to nothing."""

MASKED_RECIPE = RECIPE.model_copy(update={"epochs": 2, "lr": 6e-3, "betas": (0.9, 0.95), "warmup_epochs": 0.2})
"""The same scenes; betas as He et al. 2022 (table 8)."""


def spec(
    name: str,
    objective: str = "supervised",
    scenes: int | None = None,
    epochs: int | None = None,
    seed: int | None = None,
) -> RunSpec:
    """Return the run that pre-trains a miniature, or a specimen. All miniatures of one objective share one recipe.

    objective: ``supervised`` or ``mae``. scenes, epochs: another length, as for a weaker teacher; seed: another one, of
    data and initialisation. Raises UserError if the teacher has no miniature, for an unknown objective, for a specimen
    that is derived from another teacher, and for a network that can't be a masked autoencoder.
    """
    usual = _usual(name, objective)
    data = usual.data if scenes is None else usual.data.model_copy(update={"train": scenes})
    recipe = usual.recipe if epochs is None else usual.recipe.model_copy(update={"epochs": epochs})
    own = usual.seed if seed is None else Seed(data=seed, model=seed)
    return usual.model_copy(update={"data": data, "recipe": recipe, "seed": own})


def _usual(name: str, objective: str) -> RunSpec:
    known = get_args(Objective)
    if objective not in known:
        raise UserError(
            f"`objective` {objective!r} is not known{suggest(objective, known)}", f"type {' or '.join(known)}"
        )
    if name in specimens():
        if objective == "mae":
            raise UserError(
                f"{name} is a specimen: its fault is planted while it learns labels", "leave `objective` out"
            )
        return _specimen(name)
    network = teachers.miniature_network(name)
    if objective == "supervised":
        return RunSpec(network=network, data=DATA, recipe=RECIPE, seed=SEED)
    if unfit := [part for part in NOT_MASKED if part in network.components]:
        raise UserError(
            f"{name} has {' and '.join(unfit)}, with which it can't be a masked autoencoder here",
            "choose one without it, such as deit_b",
        )
    return RunSpec(network=network, data=DATA, recipe=MASKED_RECIPE, seed=SEED, masked=MASKED)


def _specimen(name: str) -> RunSpec:
    one = specimens()[name]
    how = one.pretraining
    if how is None:
        raise UserError(
            f"{name} is derived from {one.of} when it is loaded: there is nothing to pre-train", f"pre-train {one.of}"
        )
    return RunSpec(
        network=how.network,
        data=DATA.model_copy(update={"train": how.train}),
        recipe=RECIPE.model_copy(update={"epochs": how.epochs}),
        seed=Seed(data=how.seed, model=how.seed),
        planted=how.losses,
    )


def export(run: Run, path: Path) -> None:
    """Write a finished pre-training run as a teacher file, with its recipe, seed, versions and accuracy as metadata."""
    import torch

    from atdiag.networks.model.vit import ViT
    from atdiag.networks.weights import files
    from atdiag.networks.weights.loading import save
    from atdiag.training.provenance import versions

    network, state, result = run.spec.network, files.tensors(run.weights), run.result()
    if (
        run.spec.masked is not None
    ):  # the head is a probe's, fitted to labels: a network without a head has one row of 0
        network = network.model_copy(update={"classes": 1})
        state |= {name: torch.zeros_like(state[name][:1]) for name in ("head.weight", "head.bias")}
    vit = ViT(network)
    vit.load_state_dict(state)
    facts = {
        "data": run.spec.data.model_dump(mode="json"),
        "recipe": run.spec.recipe.model_dump(mode="json"),
        "seed": run.spec.seed.model_dump(mode="json"),
        "run": run.id,
        "top1": result["top1"],
        "test_images": result["test_images"],
        "versions": versions(),
    }
    for name in ("planted", "masked"):
        if (how := getattr(run.spec, name)) is not None:
            facts[name] = how.model_dump(mode="json")
    save(vit, path, facts)
