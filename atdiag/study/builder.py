"""Build the arms of an experiment from settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from pydantic import ValidationError

from atdiag.core.errors import UserError, suggest
from atdiag.core.selection import choose
from atdiag.core.spec import Data, Init, Network, Recipe, RunSpec, Seed, Teacher, Transfer, TransferMethod
from atdiag.data import sources
from atdiag.networks.registry import sizes, teachers
from atdiag.networks.weights import classes
from atdiag.networks.weights.classes import HeadRows
from atdiag.study import own
from atdiag.study.protocol import BASELINE, METHODS, Arm
from atdiag.study.settings import Settings, changed, describe


@dataclass(frozen=True)
class Lab:
    """Builder of an ablation's arms: the settings, and standard constructions by name."""

    settings: Settings

    def under(self, name: str, value: Any) -> Lab:
        """Return the lab with another value of a setting, such as ``recipe.epochs``.

        Raises UserError for a contradiction.
        """
        return Lab(changed(self.settings, name, value))

    def suited(self, teacher: str) -> Lab:
        """Return the lab with images as a teacher expects them, at the profile of a user's own images; else itself."""
        return Lab(own.suited(self.settings, teacher))

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the available teachers: miniatures at profile mini, else the published ones."""
        mini = self.settings.profile.name == "mini"
        return teachers.miniatures() if mini else tuple(filter(teachers.is_published, teachers.registry()))

    def teacher(self, name: str) -> Teacher:
        """Return a teacher at the profile, on the profile's images. Raises UserError if there is none.

        If its published weights are not on this machine, it is a plan (``sha256`` None), which can't be trained with.
        For a student with another patch size, a teacher of real images is built for the size that gives both one grid.
        """
        profile, student = self.settings.profile, self.settings.student
        size = profile.data.image_size
        resized = student is not None and student.patch_size is not None and profile.transfer.grid == "resize"
        if student is not None and size is not None and resized:
            own = sizes.network(name, profile.name)
            size = student.teachers_image_size(size, own.patch_size)
        return teachers.teacher(name, profile.name, size)

    def student(self, teacher: Teacher, components: Iterable[str] = ()) -> Network:
        """Return the student's architecture: standard, or with some or all of the teacher's native components.

        Of the teacher's size, or of that in the settings.
        """
        components = tuple(components)
        for name in components:
            if name not in teacher.network.components:
                have = teacher.network.components
                raise UserError(
                    f"{teacher.label} has no component {name!r}{suggest(name, have)}",
                    f"it has {', '.join(have) or 'none'}",
                )
        data = sources.find(self.settings.profile.data)
        student = self._pooled(teacher.network.student(components, data.classes))
        size = self.settings.student
        return student if size is None else size.of(student, data.shape(self.settings.profile.data)[1])

    def _pooled(self, student: Network) -> Network:
        """Return the student, read by the mean of its patch tokens if the settings say so and it can be."""
        kept = {"attention_pool", "distillation_token", "mean_pool"} & {*student.components}
        if self.settings.profile.transfer.pool == "teacher" or kept or not student.class_token:
            return student
        return Network.model_validate({**student.model_dump(), "components": (*student.components, "mean_pool")})

    def transfer(
        self, method: str, network: Network, layers: Sequence[int] | None = None, allowed: Sequence[str] = METHODS
    ) -> Transfer:
        """Return a transfer with the profile's settings; ``layers``: blocks, if the experiment chooses them.

        Raises UserError for a method that is not allowed, and for contradictory settings.
        """
        choose(method, allowed, "transfer")
        try:
            return self.settings.profile.transfer.transfer(
                cast(TransferMethod, method), network.depth, network.heads, None if layers is None else tuple(layers)
            )
        except ValidationError as fault:
            raise UserError(describe(fault)) from None

    def arm(
        self,
        name: str,
        network: Network,
        teacher: Teacher | None = None,
        init: Init | None = None,
        transfer: Transfer | None = None,
        recipe: str | None = None,
        start: Teacher | None = None,
    ) -> Arm:
        """Return an arm over the seeds of the settings.

        start: whose weights the student starts from, if not from the teacher's. recipe: which of the profile's recipes
        it uses; None: that of its transfer method.
        """
        profile = self.settings.profile
        transfer = transfer or Transfer()
        init = init or Init()
        origin = start or teacher
        if origin is not None and self.settings.student is not None and init.source == "teacher":
            self._check_same_size(origin, network)
        if teacher is not None and (transfer.method == "logits" or (init.head and not init.head_rows)):
            self._check_same_classes(teacher)
        try:
            if teacher is not None:
                transfer = profile.transfer.between(transfer, network, teacher.network)
            return Arm(
                name,
                tuple(
                    RunSpec(
                        network=network,
                        teacher=teacher,
                        init=init,
                        transfer=transfer,
                        data=profile.data,
                        recipe=profile.recipe[recipe or recipe_of(transfer)],
                        seed=seed,
                        start=start,
                    )
                    for seed in self.settings.seeds
                ),
            )
        except ValidationError as fault:
            raise UserError(describe(fault)) from None

    def _check_same_size(self, teacher: Teacher, network: Network) -> None:
        """Raise UserError for a student of another size that is to start from its teacher's weights."""
        if differing := sizes.differing(network, teacher.network):
            told = ", ".join(f"{name} {ours} for the teacher's {theirs}" for name, ours, theirs in differing)
            raise UserError(
                f"a student of another size can't start from the weights of {teacher.label} ({told})",
                "leave `student` out, or choose an experiment in which no student starts from its teacher",
            )

    def baseline(self, teacher: Teacher) -> Arm:
        """Return the standard student from scratch, without transfer: equal for all teachers of the same student."""
        return self.arm(BASELINE, self.student(teacher))

    def reference(self, teacher: Teacher) -> Arm | None:
        """Return the teacher itself on the test images: with its own head, or with a linear probe's.

        Of its head, the rows for the data set's classes are used. Without a head for them, one is fitted (see
        ``training.linear_head``). None for a network whose weights no student of ours can take.

        Raises UserError if the user's list of classes does not fit the head, or lacks classes of the data set.
        """
        data, network = self._seen_by(teacher), teacher.network
        head = self._head(teacher)
        if network.differences:
            return None
        if head.rows is None:
            return replace(self._probed("teacher", teacher, [Seed(data=0, model=0)]), head=head)
        rows = () if head.rows == tuple(range(network.classes)) else head.rows
        spec = RunSpec(
            network=network.model_copy(update={"classes": len(rows) or network.classes}),
            teacher=teacher,
            init=Init(source="teacher", head=True, head_rows=rows),
            data=data.only_tested(),  # it is not trained
            recipe=Recipe(epochs=0, batch_size=1),
            seed=Seed(data=0, model=0),
        )
        return Arm("teacher", (spec,), head)

    def probe(self, name: str, teacher: Teacher) -> Arm:
        """Return an arm of the teacher itself with a linear probe, fitted on the images of each of the settings' seeds.

        Raises UserError for a network whose weights no student of ours can take.
        """
        if differences := teacher.network.differences:
            raise UserError(
                f"{teacher.label} has {', '.join(differences)}, so its accuracy can't be measured by a linear probe",
                "choose another teacher",
            )
        return self._probed(name, teacher, self.settings.seeds)

    def _seen_by(self, teacher: Teacher) -> Data:
        """Return the data at the teacher's own image size, which may be another than the student's."""
        data = self.settings.profile.data
        return data if data.image_size is None else data.model_copy(update={"image_size": teacher.network.image_size})

    def _probed(self, name: str, teacher: Teacher, seeds: Iterable[Seed]) -> Arm:
        data = self._seen_by(teacher)
        network = teacher.network.model_copy(update={"classes": sources.find(data).classes})
        return Arm(
            name,
            tuple(
                RunSpec(
                    network=network,
                    teacher=teacher,
                    init=Init(source="teacher", probe=True),
                    data=data,
                    recipe=Recipe(epochs=0, batch_size=1),
                    seed=seed,
                )
                for seed in seeds
            ),
        )

    def _check_same_classes(self, teacher: Teacher) -> None:
        """Raise UserError for a head with as many classes as the data set, but other ones, or in another order."""
        network, data = teacher.network, self.settings.profile.data
        if network.classes != sources.find(data).classes:
            return  # the spec refuses it with the reason
        head = self._head(teacher)
        if head.rows == tuple(range(network.classes)):
            return
        why = head.how if head.rows is None else f"their order is another ({head.how})"
        raise UserError(
            f"the head of {teacher.label} is not for the classes of {data.name}: {why}",
            "a student can learn from its logits, or start with it, only row by row",
        )

    def _head(self, teacher: Teacher) -> HeadRows:
        """Return the rows of a teacher's head that are the data set's classes."""
        typed = self.settings.classes
        found = classes.match(classes.of_teacher(teacher, typed), self.settings.profile.data)
        if typed is not None and found.rows is None:
            raise UserError(found.how, "its names must be those of the data set's classes")
        return found


def recipe_of(transfer: Transfer) -> str:
    """Return the method whose recipe a transfer uses; the comparison losses use that of distillation."""
    return transfer.method if transfer.method in ("copy", "none") else "distill"
