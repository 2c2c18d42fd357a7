"""Subjects of analysis (teachers, runs, checkpoints, a user's own ViT) and how to find them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from atdiag.analysis.outside import Outside
from atdiag.core.errors import UserError, suggest
from atdiag.core.resources import small_file
from atdiag.core.runs import DamagedRunError, Run
from atdiag.core.spec import Data, Network, RunSpec, Teacher, Transfer
from atdiag.data import sources as data_sets
from atdiag.networks.model import students
from atdiag.networks.model.vit import ViT
from atdiag.networks.registry import recognition, stored, teachers
from atdiag.networks.registry.published import TIMM
from atdiag.networks.registry.reading import VIT
from atdiag.networks.registry.specimens import specimens
from atdiag.networks.weights import classes, files, loading, sources
from atdiag.networks.weights.classes import HeadClasses
from atdiag.training import checkpoint, evaluation
from atdiag.transfer import methods
from atdiag.transfer.attention import AttentionOverride
from atdiag.transfer.observation import of_teacher

if TYPE_CHECKING:
    from atdiag.core.runs import Store


_START = "start:"

_SUBJECTS = (
    "a subject is a teacher's name, a run's id, its folder, checkpoint or weights.safetensors, or timm:MODEL@FILE"
)


@dataclass(frozen=True)
class Subject:
    """A frozen network with a name; a copy-student comes with the teacher that it needs at test time."""

    label: str
    """Name in tables and figures, such as ``clip_b (mini)`` or ``1a2b3c copy``."""
    body: evaluation.Predictor | nn.Module
    """The network with its teacher, or a foreign network."""
    network: Network
    data: Data | None = None
    """The data set that it was trained on, if known."""
    id: str = ""
    """A run's id or a weight file's sha256: enough to refer to the same subject again."""
    spec: RunSpec | None = None
    """The run's spec, if the subject is a run's student."""
    teacher: Teacher | None = None
    """The teacher's spec, if the subject is a teacher."""
    classes: Path | None = None
    """The user's list of its head's classes, if the subject is a teacher."""

    @property
    def head(self) -> HeadClasses:
        """What is known about the classes of its head. Raises UserError for a list that does not fit it."""
        if self.spec is not None:
            return classes.of_run(self.spec)
        if self.teacher is not None:
            return classes.of_teacher(self.teacher, self.classes)
        if self.classes is not None:
            return classes.of_list(self.classes, self.network.classes, self.label)
        return HeadClasses(self.network.classes, data=self.data)

    @property
    def module(self) -> nn.Module:
        """The network to run: images [B, channels, S, S] in [0, 1] -> logits [B, classes]."""
        return self.body.network if isinstance(self.body, evaluation.Predictor) else self.body

    @property
    def note(self) -> str:
        """Which weights were taken from a file that holds several; empty for other files."""
        origin = getattr(self.module, "origin", None)
        return f"{self.label}: {origin.note}" if origin is not None and origin.note else ""

    @property
    def transfer(self) -> Transfer:
        """The transfer from its teacher."""
        return self.body.transfer if isinstance(self.body, evaluation.Predictor) else Transfer()

    @property
    def device(self) -> torch.device:
        """The device of its parameters."""
        return next(self.module.parameters()).device

    def to(self, device: torch.device | str) -> Subject:
        """Move the subject, and its teacher if it has one, to a device; return the subject."""
        self.module.to(device)
        if isinstance(self.body, evaluation.Predictor):
            if self.body.teacher is not None:
                self.body.teacher.to(device)
            self.body.averages = {
                layer: averaged._replace(p=averaged.p.to(device)) for layer, averaged in self.body.averages.items()
            }
        return self

    @torch.no_grad()
    def given(self, pixels: Tensor) -> dict[int, AttentionOverride]:
        """Return the overrides from its teacher for images [B, channels, S, S] in [0, 1]; empty unless it copies.

        Raises ValueError for a copy-student without its teacher.
        """
        body = self.body
        if not isinstance(body, evaluation.Predictor) or not methods.needs_teacher_at_test(body.transfer):
            return {}
        if body.teacher is None:
            raise ValueError(f"{self.label} copies blocks {body.transfer.layers}: it needs its teacher, and has none")
        own = body.given(evaluation.show(body.teacher, pixels, of_teacher([body.transfer])))
        return methods.given(body.transfer, own, self.network, pixels.device) or {}


def teacher_of(subject: Subject) -> Subject:
    """Return the teacher of a run's student, as used in training. Raises UserError if there is none."""
    spec = subject.spec
    if spec is None or spec.teacher is None:
        raise UserError(f"{subject.label} has no teacher", "name a network with `from_`")
    return loaded(spec.teacher, spec.data)


def of(model: nn.Module, label: str, network: Network | None = None) -> Subject:
    """Wrap a network as a subject: a :class:`ViT`, or a timm ViT.

    A timm ViT runs unmodified in eval mode, with fused attention on or off as configured; it takes images in [0, 1] and
    normalises them by the mean and std of its own configuration. Raises UserError for one without softmax attention
    over all of its tokens.
    """
    if isinstance(model, ViT):
        return Subject(label, evaluation.Predictor(model.eval()), model.network)
    outside = model if isinstance(model, Outside) else Outside(model)
    return Subject(label, outside.eval(), network or outside.network)


def find_all(
    references: Sequence[str], profile: str, data: Data, store: Store | None = None, asked: Collection[str] = ()
) -> tuple[list[Subject], Data]:
    """Return the subjects of some references, in order, and the data set whose images they are examined on.

    The first run among them determines the data, and teachers are built for images of its size. data: the data set if
    there is no run. asked: settings of ``data`` given by the user, such as ``data.image_size``, which a run does not
    change. Raises UserError as :func:`find` does, and for runs that see images of different sizes.
    """
    found = {one: find(one, profile, data, store) for one in references if not is_teacher(one)}
    runs = [one for one in found.values() if one.spec is not None]
    for one in runs[1:]:
        if runs[0].network.image_size != one.network.image_size:
            sizes = [f"{run.label} sees images of {run.network.image_size} px" for run in (runs[0], one)]
            raise UserError(" and ".join(sizes), "analyse runs of one image size at a time")
    if runs and runs[0].data is not None and not asked:
        data = runs[0].data
    elif runs and "data.image_size" not in asked:
        data = data_sets.find(data).resized(data, runs[0].network.image_size)
    found |= {one: find(one, profile, data, store) for one in references if one not in found}
    return [found[one] for one in references], data


def is_teacher(reference: str) -> bool:
    """Return whether a reference names a teacher, rather than a run or a file of one."""
    name = reference.partition("@")[0]
    named = name in teachers.registry() or name in specimens() or reference.startswith((TIMM, VIT, teachers.HUB))
    return named or recognition.is_foreign(reference)


def find(reference: str, profile: str = "mini", data: Data | None = None, store: Store | None = None) -> Subject:
    """Return the subject that a reference names, frozen, on the CPU.

    ===========================  ======================================================================================
    ``clip_b``                   a teacher in the registry, at the profile
    ``timm:MODEL[@/path/file]``  any softmax-attention ViT of timm
    ``/path/to/weights``         a weight file or folder of other programs, whose model is recognised
    ``1a2b3c``                   a run by its id or a prefix of it (at least 4 digits): its trained weights, or its
                                 checkpoint if it is unfinished; also ``run:1a2b3c``
    ``start:1a2b3c``             the same run's student at initialisation, without its teacher's overrides
    ``/path/to/file``            a run's folder, its checkpoint (or a copy beside ``spec.json``) or its weights; a file
                                 written by ``atdiag pretrain``
    ===========================  ======================================================================================

    data: the images that it will see, unless the reference implies them. Raises UserError, with suggestions, for a
    reference that names nothing.
    """
    if is_teacher(reference):
        return _teacher(reference, profile, data)
    word, colon, rest = reference.partition(":")
    there = Path(reference).expanduser().exists()
    if colon and word not in ("start", "run") and not there:
        near = suggest(f"{word.lower()}:{rest}", [f"start:{rest}", f"run:{rest}", f"{TIMM}{rest}"])
        raise UserError(f"nothing is named {reference!r}{near}", _SUBJECTS)
    if there or "/" in reference or Path(reference).suffix:
        return _file(Path(reference).expanduser())
    begin, run_id = reference.startswith(_START), reference.removeprefix(_START).removeprefix(stored.RUN)
    if store is not None and re.fullmatch("[0-9a-f]{1,16}", run_id):
        found = store.find(run_id)
        return of_start(found) if begin else of_run(found)
    near = suggest(reference, (*teachers.miniatures(), *specimens())) or suggest(reference, teachers.registry())
    raise UserError(
        f"no teacher, run or file is named {reference!r}{near}",
        "'atdiag teachers' and 'atdiag runs list' list what there is",
    )


def with_classes(found: Sequence[Subject], names: Path) -> list[Subject]:
    """Return subjects with the user's list of a head's classes, attached to those whose classes are otherwise unknown.

    A run's classes are known. Raises UserError for a list that fits none of them.
    """
    heads = [one for one in found if one.spec is None]
    if not heads:
        raise UserError("the classes of a run's head are those of its data set", "leave `classes` out")
    length = len(classes.read_list(names))
    if all(one.network.classes != length for one in heads):
        classes.of_list(names, heads[0].network.classes, heads[0].label)  # raises the error that says why
    return [replace(one, classes=names) if one.spec is None and one.network.classes == length else one for one in found]


def _teacher(reference: str, profile: str, data: Data | None) -> Subject:
    reference = teachers.canonical(reference)
    spec = teachers.teacher(reference, profile, _image_size(reference, profile, data))
    return loaded(spec, data)


def _image_size(reference: str, profile: str, data: Data | None) -> int | None:
    """Return a teacher's input size: the data set's for real images, else None or the teacher's default."""
    name = reference.partition("@")[0]
    if name in specimens():
        return None
    row = teachers.registry().get(name)
    if row is not None and profile == "mini" and name == reference and teachers.is_published(name):
        return None  # a miniature, made for scenes
    if data is not None and data.image_size is not None:
        return data.image_size
    if row is not None and row.image_size is not None:
        return row.image_size
    if name.startswith(VIT):
        return teachers.source(reference).image_size
    from timm.models import get_pretrained_cfg

    model = name.removeprefix(TIMM) if row is None else row.model
    config = get_pretrained_cfg(model, allow_unregistered=True)
    return None if config is None else int(config.input_size[-1])


def loaded(spec: Teacher, data: Data | None) -> Subject:
    """Load a teacher with its weights. Raises UserError saying where the weights belong if they are missing."""
    if spec.sha256 is None:
        raise UserError(f"the weights of {spec.label} are not on this machine", teachers.how_to_get(spec))
    try:
        found = loading.load(spec)
    except (loading.WeightsMissingError, ValueError) as fault:
        raise UserError(str(fault)) from None
    body = evaluation.Predictor(found) if isinstance(found, ViT) else found
    # A published network is the same at any profile. A path is too long for a table, but two files differ in their
    # hash.
    named = spec.name.removeprefix(TIMM).removeprefix(VIT).removeprefix(stored.FILE)
    name, _, own = named.partition("@")
    branch = {"weights": "", "ema": " average", "student": " student"}[spec.branch]
    label = spec.label if teachers.is_shipped(spec) else f"{name} {spec.sha256[:6]}{branch}" if own else name
    return Subject(label, body, found.network, data, spec.weights, teacher=spec)


def of_run(run: Run) -> Subject:
    """Return a run's student with its trained weights, or with its checkpoint's if the run is unfinished."""
    return _student(run.spec, run.weights if run.finished else run.checkpoint)


def of_start(run: Run) -> Subject:
    """Return a run's student at initialisation, with its own attention whatever its transfer."""
    spec = run.spec
    network = students.build(spec.network, spec.seed.model)
    if spec.init.source == "teacher":
        assert spec.origin is not None
        try:
            source = loading.load(spec.origin)
        except (loading.WeightsMissingError, ValueError) as fault:
            raise UserError(f"run {spec.id} starts from its teacher: {fault}") from None
        assert isinstance(source, ViT)
        students.start_from(network, source, spec.init)
    network.eval().requires_grad_(False)
    return Subject(f"{spec.id[:6]} at its start", evaluation.Predictor(network), spec.network, spec.data, spec.id, spec)


def _student(spec: RunSpec, file: Path) -> Subject:
    """Build the student of a spec with the weights of a file, together with its teacher if it copies.

    Raises DamagedRunError for a damaged file of the run itself, UserError for a file elsewhere.
    """
    run = Run(file.parent)
    own = run.id == spec.id and file in (run.weights, run.checkpoint)
    if own and file == run.weights and run.finished:
        run.sound(file)
    if not file.exists():
        raise _nothing_yet(spec, run)
    network = ViT(spec.network)
    try:
        state, step = _state(file, run.id if own else None)
        network.load_state_dict(state)
    except _UnreadableError as fault:
        raise DamagedRunError(file, fault.cause) if own else fault from None
    except RuntimeError as fault:
        cause = str(fault).splitlines()[-1].strip()
        if own:
            raise DamagedRunError(file, cause) from None
        raise UserError(f"{file} does not fit the network of run {spec.id} ({cause})") from None
    network.eval().requires_grad_(False)
    label = f"{spec.id[:6]} {_kind(spec)}" + ("" if step is None else f" at step {step}")
    body = evaluation.Predictor(network, spec.transfer)
    if methods.needs_teacher_at_test(spec.transfer):
        assert spec.teacher is not None
        try:
            body.teacher = loading.load(spec.teacher)
        except (loading.WeightsMissingError, ValueError) as fault:
            raise UserError(f"run {spec.id} copies from its teacher: {fault}") from None
        body.heads = evaluation.chosen_heads(spec, body.teacher, run if own else None)
        body.averages = evaluation.averages(spec, body.teacher, heads=body.heads)
    return Subject(label, body, spec.network, spec.data, spec.id, spec)


def _nothing_yet(spec: RunSpec, run: Run) -> Exception:
    """Return the error for a run that has no saved state yet."""
    if run.weights.exists():
        return UserError(
            f"run {spec.id} is not finished: {run.path / 'result.json'} is not there",
            f"the same experiment finishes it; to look at its weights as they are, type {run.weights}",
        )
    return UserError(f"run {spec.id} is not finished and has no checkpoint yet", "the same experiment trains it")


class _UnreadableError(UserError):
    """A file that holds no saved state."""

    def __init__(self, problem: str, cause: str, hint: str | None = None) -> None:
        super().__init__(problem, hint)
        self.cause = cause


def _kind(spec: RunSpec) -> str:
    if spec.transfer.method != "none":
        return spec.transfer.method
    if spec.init.source == "teacher" and not spec.recipe.epochs:  # an experiment's reference row
        return "teacher itself"
    return "scratch" if spec.init.source == "scratch" else "reinit" if spec.init.reinit else "fine-tuned"


def _state(file: Path, run: str | None = None) -> tuple[dict[str, Tensor], int | None]:
    """Read a state dict and, from a checkpoint, its step. Raises UserError for a file that is neither."""
    try:
        if file.suffix == ".safetensors":
            return {name: tensor.float() for name, tensor in files.tensors(file).items()}, None
    except (sources.WeightsError, OSError) as fault:
        raise _UnreadableError(f"{file} can't be read ({fault})", str(fault)) from None
    try:
        found = checkpoint.read(file, run)
    except ValueError as fault:
        raise _UnreadableError(f"{file} is no checkpoint of a run ({fault})", str(fault), _SUBJECTS) from None
    return found.weights, found.step


def _file(path: Path) -> Subject:
    """Load a run's folder, a file beside its ``spec.json``, or a miniature's file."""
    if not path.exists():
        raise UserError(f"there is no file {path}", _SUBJECTS)
    folder, file = (path, None) if path.is_dir() else (path.parent, path)
    if file is not None and file.suffix in (".json", ".jsonl", ".npz", ".csv", ".png", ".pdf"):
        hint = "; 'atdiag probe' also takes an experiment's .json" if file.suffix == ".json" else ""
        raise UserError(f"{path} holds no network", f"{_SUBJECTS}{hint}")
    if (folder / "spec.json").exists():
        try:
            spec = RunSpec.model_validate_json(small_file(folder / "spec.json"))
        except ValueError as fault:
            if re.fullmatch("[0-9a-f]{16}", folder.absolute().name):
                raise DamagedRunError(folder.absolute() / "spec.json", fault) from None
            raise UserError(f"{folder / 'spec.json'} can't be read ({str(fault).splitlines()[0]})") from None
        run = Run(folder)
        return _student(spec, file or (run.weights if run.weights.exists() else run.checkpoint))
    if file is None:
        raise UserError(f"{path} is not a run's folder: there is no spec.json in it")
    try:
        header = loading.metadata(file)
        network = Network.model_validate(header["network"])
        trained = Data.model_validate(header["data"]) if "data" in header else None
    except (ValueError, KeyError):
        why = f"it is not known which network {path} belongs to (a run's has a spec.json beside it)"
        raise UserError(why, f"for weights of a timm model type timm:MODEL@{path}") from None
    vit = ViT(network)
    try:
        vit.load_state_dict(_state(file)[0])
    except RuntimeError as fault:
        raise UserError(f"{file} does not fit the network in its header ({str(fault).splitlines()[-1]})") from None
    vit.eval().requires_grad_(False)
    return Subject(file.stem, evaluation.Predictor(vit), network, trained, sources.sha256(file))
