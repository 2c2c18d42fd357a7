"""Load an exported student that timm can't build: ``atdiag.load_student``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atdiag.core.errors import UserError
from atdiag.core.resources import small_file
from atdiag.core.spec import Network, Teacher, Transfer
from atdiag.networks.model.vit import ViT
from atdiag.networks.registry import teachers
from atdiag.networks.timm.wrapping import Foreign
from atdiag.networks.weights import files, loading
from atdiag.training import evaluation
from atdiag.transfer import methods
from atdiag.transfer.observation import of_teacher


class ExportedStudent(nn.Module):
    """A trained student, with the teacher whose attention it copies, if it does. Takes images in [0, 1]."""

    def __init__(
        self,
        student: ViT,
        transfer: Transfer,
        teacher: ViT | Foreign | None,
        heads: Mapping[int, tuple[int, ...]] | None = None,
    ) -> None:
        """heads: the teacher's block -> its heads that were chosen for the student, if any were."""
        super().__init__()
        self.student, self.transfer, self.teacher, self.heads = student, transfer, teacher, heads or {}

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, channels, S, S] in [0, 1] to logits [B, classes]."""
        if self.teacher is None:
            out: Tensor = self.student(images)
            return out
        shown = evaluation.show(self.teacher, images, of_teacher([self.transfer]))
        given = evaluation.fit(shown, self.teacher, self.student.network, self.transfer, self.heads)
        return methods.forward_test(self.student, self.transfer, images, given)


def load_student(folder: str | Path, teacher: str | Path | None = None) -> ExportedStudent:
    """Load a student that ``atdiag runs export-model`` wrote with a loader, frozen and in eval mode.

    teacher: a file with its teacher's weights, if it copies its attention and the registry does not find them. Raises
    UserError for a folder that holds no such student, and for a teacher that is missing or is another.
    """
    folder = Path(folder).expanduser()
    try:
        document: dict[str, Any] = json.loads(small_file(folder / "student.json"))
        network = Network.model_validate(document["network"])
        transfer = Transfer.model_validate(document["transfer"])
        known = None if document["teacher"] is None else Teacher.model_validate(document["teacher"])
        heads = {int(block): tuple(some) for block, some in document.get("teacher_heads", {}).items()}
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise UserError(
            f"{folder} holds no student with a loader ({type(fault).__name__})",
            "one with a config.json is loaded by timm.create_model('local-dir:FOLDER', pretrained=True)",
        ) from None
    student = ViT(network)
    try:
        student.load_state_dict(files.tensors(folder / "student.safetensors"))
    except (OSError, ValueError, RuntimeError) as fault:
        raise UserError(f"the weights in {folder} can't be read ({str(fault).splitlines()[0]})") from None
    found = None if known is None else _teacher(known, teacher)
    whole = ExportedStudent(student, transfer, found, heads)
    return whole.eval().requires_grad_(False)


def _teacher(known: Teacher, file: str | Path | None) -> ViT | Foreign:
    if file is not None:
        known = known.model_copy(update={"name": f"{known.name}@{Path(file).expanduser().absolute()}"})
    elif known.name.startswith("file:"):
        raise UserError(f"this student copies from {known.label}, which is not in its folder", "give teacher=FILE")
    try:
        return loading.load(known)
    except (loading.WeightsMissingError, ValueError, UserError) as fault:
        hint = None if teachers.is_shipped(known) else "give teacher=FILE, the file that it was trained with"
        raise UserError(f"this student copies its teacher's attention: {fault}", hint) from None
