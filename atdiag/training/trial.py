"""Trial steps: one forward pass for each kind of run, before any run is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from atdiag.core.errors import UserError
from atdiag.core.spec import RunSpec, Teacher
from atdiag.networks.model import students
from atdiag.networks.model.vit import ViT
from atdiag.networks.timm.wrapping import Foreign
from atdiag.training import evaluation
from atdiag.transfer import methods, observation


def trial(specs: Sequence[RunSpec], load_teacher: Callable[[Teacher], ViT | Foreign]) -> None:
    """Pass one image of zeros through teacher and student of every kind of run, as a training step would.

    Runs that differ only in seed, data or recipe are of one kind. Averages over examples are left out, since they need
    images. Takes seconds for a ViT-B on a CPU.

    Raises UserError, naming teacher, method and fault, if a step would certainly fail.
    """
    kinds = {(s.network, s.teacher, s.origin, s.init, s.transfer): s for s in specs if s.teacher is not None}
    loaded: dict[Teacher, ViT | Foreign] = {}
    for network, teacher, origin, init, transfer in kinds:
        assert teacher is not None and origin is not None
        if transfer.average == "examples":
            continue
        try:
            for one in (teacher, origin):
                if one not in loaded:
                    loaded[one] = load_teacher(one)
            network_of_teacher = loaded[teacher]
            student = students.build(network, seed=0)
            if init.source == "teacher":
                source = loaded[origin]
                assert isinstance(source, ViT)
                students.start_from(student, source, init)
            image = torch.zeros(1, network.channels, network.image_size, network.image_size)
            with torch.no_grad():
                shown = evaluation.show(network_of_teacher, image, observation.of_teacher([transfer]))
                number = transfer.different_heads or network.heads
                some = {block: tuple(range(number)) for block in transfer.sources}  # in place of chosen ones
                shown = evaluation.fit(shown, network_of_teacher, network, transfer, some)
                methods.forward(student, transfer, image, shown)
        except (RuntimeError, ValueError, TypeError, AssertionError, KeyError) as fault:
            doing = "start a student" if transfer.method == "none" else f"be used for {transfer.method}"
            first = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
            raise UserError(f"{teacher.label} can't {doing}: {first}") from fault
