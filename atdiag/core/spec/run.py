"""One arm with one seed: the unit that is trained, stored, and never trained twice."""

from __future__ import annotations

from typing import Any

from atdiag.core.spec.base import Spec
from atdiag.core.spec.data import Data
from atdiag.core.spec.former import as_first_described
from atdiag.core.spec.hashing import SEMANTICS, content_hash
from atdiag.core.spec.masked import NOT_MASKED, Masked
from atdiag.core.spec.network import Network, Teacher
from atdiag.core.spec.passing import check_transfer
from atdiag.core.spec.recipe import Recipe, Seed
from atdiag.core.spec.specimen import PlantedLosses
from atdiag.core.spec.transfer import Init, Transfer

_SHARED = {"batch_size", "mixup", "cutmix", "rand_augment", "crop", "flip", "erase", "precision"}

PROBE_IMAGES = 10_000
"""Number of training images, spread evenly over them, on which a linear probe is fitted at most (``init.probe``)."""


class RunSpec(Spec):
    """One arm with one seed: the unit that is trained, stored, and never trained twice."""

    network: Network
    teacher: Teacher | None = None
    init: Init = Init()
    transfer: Transfer = Transfer()
    data: Data
    recipe: Recipe
    seed: Seed
    start: Teacher | None = None
    """Whose weights the student starts from, if not from those of ``teacher``, whose attention is transferred."""
    planted: PlantedLosses | None = None
    """Losses that plant a fault, for the pre-training of a specimen; None in every other run."""
    masked: Masked | None = None
    """The masked autoencoder by which a teacher is pre-trained without labels; None in every other run. What is stored
    is the network, its head a linear probe (as of ``init.probe``)."""
    semantics: int = SEMANTICS

    def canonical(self) -> dict[str, Any]:
        """Drop a teacher that nothing depends on, name a single one ``teacher``, and write all heads as None."""
        if self.transfer.method == "none" and self.init.source == "scratch":
            return {"teacher": None, "start": None}
        changed: dict[str, Any] = {}
        origin = self.origin
        if self.start is not None and self.transfer.method == "none":
            changed |= {"teacher": self.start, "start": None}
        elif self.start is not None and (self.init.source == "scratch" or self._starts_from_its_teacher(self.start)):
            changed["start"] = None
        if origin is not None and not self._folds(origin.network):
            changed["init"] = self.init.model_copy(update={"layer_scale": "fold"})
        whole = self.transfer.heads == tuple(range(self.network.heads))
        equal = self.teacher is not None and self.teacher.network.heads == self.network.heads
        every = self.transfer.different_heads == self.network.heads
        idle = {"heads": whole, "different_heads": every, "teacher_heads": equal}
        reset: dict[str, Any] = {name: None for name, is_idle in idle.items() if is_idle}
        if self.recipe.drop_path == 0:
            reset["shared_drop_path"] = False
        if any(getattr(self.transfer, name) != value for name, value in reset.items()):
            changed["transfer"] = self.transfer.model_copy(update=reset)
        return changed

    @property
    def origin(self) -> Teacher | None:
        """The network whose weights the student starts from, if it does."""
        return self.start or self.teacher

    def _starts_from_its_teacher(self, start: Teacher) -> bool:
        """Return whether a network to start from is the one that teaches."""
        teacher = self.teacher
        return teacher is not None and bool(start.weights) and start.seen_as == teacher.seen_as

    def _folds(self, teacher: Network) -> bool:
        """Return whether the teacher has a LayerScale for which the student has no counterpart."""
        return "layer_scale" in teacher.components and "layer_scale" not in self.network.components

    def check(self) -> None:
        """Raise ValueError if student and teacher do not fit the transfer or the initialisation."""
        if self.planted is not None:
            self._check_planted(self.planted)
        if self.masked is not None:
            self._check_masked()
        needs = self.transfer.method != "none" or self.init.source == "teacher"
        if needs and self.teacher is None:
            raise ValueError("a transfer, or a start from a teacher, needs a teacher")
        if self.teacher is None:
            return
        student, teacher = self.network, self.teacher.network
        for field in ("channels", "class_token"):
            if getattr(student, field) != getattr(teacher, field):
                raise ValueError(
                    f"the student's {field} ({getattr(student, field)}) must be "
                    f"the teacher's ({getattr(teacher, field)}): they see the same images, and their maps must line up"
                )
        if student.registers not in (0, teacher.registers):
            raise ValueError(f"the student has {student.registers} registers, the teacher {teacher.registers}")
        if self.origin is not None:
            self._check_start(student, self.origin.network)
        check_transfer(self.transfer, student, teacher)

    def _check_planted(self, planted: PlantedLosses) -> None:
        if self.transfer.method != "none":
            raise ValueError("losses are planted in a teacher that is pre-trained, not in a student with a transfer")
        if max(planted.layers) >= self.network.depth:
            raise ValueError(f"planted losses: the network has {self.network.depth} blocks, counted from 0")
        through_registers = (planted.routing and planted.hub == "registers") or planted.diagonal
        if through_registers and not self.network.registers:
            raise ValueError("attention can be routed through registers only in a network that has some")
        if planted.gate and "layer_scale" not in self.network.components:
            raise ValueError("an attention branch can be gated only in a network with layer_scale")

    def _check_masked(self) -> None:
        if self.transfer.method != "none" or self.init.source != "scratch" or self.planted is not None:
            raise ValueError("a masked autoencoder is pre-trained from scratch, without a transfer or planted losses")
        if self.recipe.mixes:
            raise ValueError("a masked autoencoder predicts the pixels of images that are not mixed: no mixup, cutmix")
        if unfit := [name for name in NOT_MASKED if name in self.network.components]:
            raise ValueError(f"a network with {', '.join(unfit)} can't be pre-trained as a masked autoencoder here")
        if self.network.grid == 1:
            raise ValueError("a masked autoencoder needs images of more than one patch")

    def _check_start(self, student: Network, teacher: Network) -> None:
        if self.init.source == "scratch":
            return
        if teacher.differences:
            raise ValueError(
                f"no student can start from this teacher's weights: it has {', '.join(teacher.differences)}, "
                "which no student can be given (its maps can be transferred)"
            )
        for field in ("width", "mlp_ratio", "depth", "heads", "patch_size", "image_size"):
            if getattr(student, field) != getattr(teacher, field):
                raise ValueError(
                    f"a student that starts from its teacher needs the teacher's {field} "
                    f"({getattr(teacher, field)}, not {getattr(student, field)})"
                )
        if self.init.probe and (self.init.head or self.recipe.epochs or self.transfer.method != "none"):
            raise ValueError("a linear probe is the head of a network that is not trained: no head, epochs or transfer")
        if not self.init.head:
            return
        rows = self.init.head_rows
        if rows and (len(rows) != student.classes or max(rows) >= teacher.classes):
            raise ValueError(
                f"head_rows must name one of the teacher's {teacher.classes} classes for each of the student's"
            )
        if not rows and student.classes != teacher.classes:
            raise ValueError(f"the teacher's head has {teacher.classes} classes, the student {student.classes}")

    @property
    def probe_images(self) -> int:
        """The number of training images on which its head is fitted; 0 unless it is a linear probe."""
        return min(self.data.train, PROBE_IMAGES) if self.init.probe or self.masked else 0

    def _content(self) -> dict[str, Any]:
        """Return the content to hash.

        A user's folder counts by its fingerprint, wherever it is, in tars or not; a teacher's architecture by its
        first description (``former``).
        """
        document = self.model_dump(mode="json")
        if self.teacher is not None:
            document["teacher"]["network"] = as_first_described(document["teacher"]["network"])
        if self.start is not None:  # as the teacher: what it is, and not by which name it was requested
            start = document["start"]
            own = {name: value for name, value in start.items() if name not in ("name", "profile")}
            document["start"] = {**own, "network": as_first_described(start["network"])}
        if self.data.name.startswith(("folder:", "timm:")) and self.data.fingerprint:
            document["data"]["name"] = "folder:"
        return document

    @property
    def id(self) -> str:
        """The run's id: the first 16 hexadecimal digits of the content hash."""
        return content_hash(self._content())[:16]

    @property
    def stream(self) -> str:
        """A hash of what a cohort shares: runs with equal streams see the same batches, in the same precision."""
        recipe = self.recipe.model_dump(mode="json", include=_SHARED)
        return content_hash({"data": self._content()["data"], "recipe": recipe, "seed": self.seed.data})[:16]
