"""What a cohort computes of its teacher before training, and what its runs start from."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from atdiag.core.spec import RunSpec, Teacher
from atdiag.data.splits import Split
from atdiag.networks.model.vit import ViT
from atdiag.networks.timm.wrapping import Foreign
from atdiag.training import evaluation
from atdiag.transfer.ops import Averaged


class TeacherFacts:
    """What is computed of the teacher before training, once for all runs of a cohort that use the same."""

    def __init__(self, teacher: ViT | Foreign | None, images: Split | None) -> None:
        self.teacher, self.images = teacher, images
        self._averages: dict[Hashable, dict[int, Averaged]] = {}
        self._origins: dict[Hashable, ViT | Foreign] = {}
        self._heads: dict[Hashable, dict[int, tuple[int, ...]]] = {}

    def averages(self, spec: RunSpec) -> dict[int, Averaged]:
        """Return a run's averages over examples, empty if it uses none. Raises ValueError for tokens that don't fit."""
        transfer = spec.transfer
        if self.teacher is None or transfer.average != "examples":
            return {}
        key = transfer.heads, transfer.teacher_heads, self._of(spec)  # all that they depend on within a cohort
        if key not in self._averages:
            found = evaluation.averages(spec, self.teacher, self.images, self.heads(spec))
            self._averages[key] = found
        return self._averages[key]

    def heads(self, spec: RunSpec) -> dict[int, tuple[int, ...]]:
        """Return the teacher's heads that a run takes, by block; empty unless it takes the most different ones."""
        chooses = spec.transfer.teacher_heads == "different" or spec.transfer.different_heads is not None
        if self.teacher is None or not chooses:
            return {}
        key = spec.transfer.different_heads, self._of(spec)
        if key not in self._heads:
            self._heads[key] = evaluation.chosen_heads(spec, self.teacher, images=self.images)
        return self._heads[key]

    def origin(self, spec: RunSpec, load: Callable[[Teacher], ViT | Foreign]) -> ViT | Foreign | None:
        """Return the network whose weights a run starts from, loaded once; None unless it is another than the teacher.

        Raises what loading raises.
        """
        if spec.start is None:
            return None
        key = spec.start.seen_as
        if key not in self._origins:
            self._origins[key] = load(spec.start)
        return self._origins[key]

    def _of(self, spec: RunSpec) -> Hashable:
        """Return the blocks, the tokens that teacher and student share, and the student's heads and grid."""
        assert self.teacher is not None
        network = spec.network
        return spec.transfer.sources, self.teacher.network.tokens_shared_with(network), network.heads, network.grid
