"""Pre-train a miniature teacher: an ordinary run of its native network from scratch, on more scenes and for longer."""

from __future__ import annotations

from pathlib import Path

from atdiag.core.runs import Run
from atdiag.core.spec import Data, Recipe, RunSpec, Seed
from atdiag.networks.registry import teachers

DATA = Data(name="digits", train=60_000, clutter=6)
"""24 times the scenes of a student's default recipe ..."""

RECIPE = Recipe(epochs=5, batch_size=64, lr=2e-3, warmup_epochs=0.5)
"""... and 30 times its images: a teacher that a student from scratch could match would transfer only a handicap."""

SEED = Seed(data=1_000_000, model=1_000_000)
"""Apart from the seeds of any study, so that a student never starts where its teacher did."""


def spec(name: str) -> RunSpec:
    """The run that pre-trains a miniature: one shared recipe for all. Raises UserError for a name without one."""
    return RunSpec(network=teachers.miniature_network(name), data=DATA, recipe=RECIPE, seed=SEED)


def export(run: Run, path: Path) -> None:
    """Write a finished pre-training run as a teacher file, with its recipe, seed, versions and accuracy."""
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
    save(vit, path, facts)
