"""Pre-train a miniature teacher: a from-scratch run of its native network, with more scenes and more epochs.

A specimen's run also has the losses that plant its fault, and its own length.
"""

from __future__ import annotations

from pathlib import Path

from atdiag.core.errors import UserError
from atdiag.core.runs import Run
from atdiag.core.spec import Data, Recipe, RunSpec, Seed
from atdiag.networks.registry import teachers
from atdiag.networks.registry.specimens import specimens

DATA = Data(name="digits", train=60_000, clutter=6)
"""24 times as many scenes as in a student's default recipe."""

RECIPE = Recipe(epochs=5, batch_size=64, lr=2e-3, warmup_epochs=0.5)
"""About 30 times as many images as a student sees: a teacher that a student from scratch could match would only hold it
back."""

SEED = Seed(data=1_000_000, model=1_000_000)
"""Outside the seeds of any study, so that no student shares its teacher's initialisation."""


def spec(name: str) -> RunSpec:
    """Return the run that pre-trains a miniature, all of which share one recipe, or a specimen.

    Raises UserError if the teacher has no miniature, and for a specimen that is derived from another teacher.
    """
    if name in specimens():
        return _specimen(name)
    return RunSpec(network=teachers.miniature_network(name), data=DATA, recipe=RECIPE, seed=SEED)


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
    from atdiag.networks.model.vit import ViT
    from atdiag.networks.weights import files
    from atdiag.networks.weights.loading import save
    from atdiag.training.provenance import versions

    vit = ViT(run.spec.network)
    vit.load_state_dict(files.tensors(run.weights))
    result = run.result()
    facts = {
        "data": run.spec.data.model_dump(mode="json"),
        "recipe": run.spec.recipe.model_dump(mode="json"),
        "seed": run.spec.seed.model_dump(mode="json"),
        "run": run.id,
        "top1": result["top1"],
        "test_images": result["test_images"],
        "versions": versions(),
    }
    if run.spec.planted is not None:
        facts["planted"] = run.spec.planted.model_dump(mode="json")
    save(vit, path, facts)
