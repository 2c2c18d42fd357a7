"""The vocabulary: what a run *is*, as frozen models with a JSON form and a content hash.

The hash names the estimand: two runs with the same hash estimate the same quantity, so the second is never trained.
Everything that defines the quantity is hashed (weights by their sha256, the precision policy, both seeds); what only
says how or where it was computed (device, threads, cohort, paths, a teacher's alias) is not.

Equal conditions have equal specs. Each model brings itself to a canonical form when it is made: ``weight=0`` or no
layers mean ``method="none"``; a run that neither takes nor starts from a teacher has none. So the baseline is one and
the same run for every teacher of the same student.

Imports nothing of atdiag, and nothing heavy.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

SEMANTICS = 1
"""Raised when the *meaning* of a spec changes (a fixed bug in a loss, say). Contrasts refuse to mix semantics."""

NOT_HASHED: frozenset[str] = frozenset({"teacher.name", "teacher.profile"})
"""Fields that say by which name a thing was asked for, not what it is (a teacher *is* its network and weights)."""

ADDED_FIELDS: dict[str, Any] = {}
"""Fields added since version 1 -> the value under which nothing changed. A spec that holds that value hashes as if the
field did not exist, so old runs stay finished. Frozen: rows are only ever added, and never edited."""

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1), AfterValidator(abs)]
"""From 0 to 1. ``abs`` makes -0.0 the 0.0 that it equals."""
BelowOne = Annotated[float, Field(ge=0, lt=1), AfterValidator(abs)]
NonNegative = Annotated[float, Field(ge=0), AfterValidator(abs)]


def _sorted_set(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(sorted(set(values)))


class Spec(BaseModel):
    """Base of all models: frozen, strict about unknown fields, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def _become(self, **values: Any) -> None:
        """Bring fields to their canonical value while the model is being made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


class Network(Spec):
    """The architecture of a ViT: a plain one (``components`` empty) or one with any set of native components.

    Token grid = ``image_size / patch_size``; tokens are ordered class token, registers, patches.
    """

    image_size: Positive
    patch_size: Positive
    channels: Positive = 3
    width: Positive
    depth: Positive
    heads: Positive
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    class_token: bool = True
    classes: Positive
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    mean: tuple[float, ...] = (0.5,)
    """Per-channel mean that the network subtracts from pixels in [0, 1] (one value serves all channels)."""
    std: tuple[Annotated[float, Field(gt=0)], ...] = (0.5,)
    components: Annotated[tuple[str, ...], AfterValidator(_sorted_set)] = ()
    layer_scale_init: float | None = None
    """Initial value of LayerScale's factors; None without the component `layer_scale`."""
    registers: int = Field(default=0, ge=0)
    """Number of register tokens; 0 without the component `registers`."""

    @model_validator(mode="after")
    def _canonical(self) -> Self:
        if "components" in self.model_fields_set:  # taking a component out takes its number along
            if "layer_scale" not in self.components:
                self._become(layer_scale_init=None)
            if "registers" not in self.components:
                self._become(registers=0)
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if len(self.mean) not in (1, self.channels) or len(self.std) not in (1, self.channels):
            raise ValueError(f"mean and std need 1 or {self.channels} values")
        if ("layer_scale" in self.components) != (self.layer_scale_init is not None):
            raise ValueError("layer_scale_init belongs to the component layer_scale: give both or neither")
        if ("registers" in self.components) != (self.registers > 0):
            raise ValueError("a number of registers belongs to the component registers: give both or neither")
        self._become(**{name: v[:1] for name in ("mean", "std") if len(set(v := getattr(self, name))) == 1})
        return self

    def student(self, components: tuple[str, ...] = (), classes: int | None = None) -> Network:
        """The architecture of a student for this teacher: its grid, width, depth, heads and class token.

        ``components`` are the native components that the student is given: none for the standard student, all of the
        teacher's for the native one. Raises ValueError for one that the teacher lacks.
        """
        if foreign := [name for name in components if name not in self.components]:
            have = ", ".join(self.components) or "none"
            raise ValueError(f"{', '.join(foreign)}: not a native component of this teacher (it has: {have})")
        same = self.model_dump(exclude={"norm_eps"})  # the plain ViT's own
        return Network.model_validate({**same, "components": components, "classes": classes or self.classes})

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches: class token and registers."""
        return int(self.class_token) + self.registers

    @property
    def tokens(self) -> int:
        """Length of the token sequence."""
        return self.grid**2 + self.prefix_tokens


class Teacher(Spec):
    """A frozen pre-trained ViT: which network with which weights."""

    name: str
    """What the user calls it, such as ``clip_b``."""
    profile: str
    """The profile whose weights are meant: ``clip_b`` at mini is not CLIP."""
    network: Network
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the weight file."""

    @property
    def label(self) -> str:
        """How it is named wherever it is shown: ``clip_b (mini)``, or its plain name at paper scale."""
        return self.name if self.profile == "paper" else f"{self.name} ({self.profile})"


BlockModule = Literal["attn", "mlp"]


class Init(Spec):
    """How a student starts: from scratch, or from its teacher's weights with some modules re-initialised."""

    source: Literal["scratch", "teacher"] = "scratch"
    reinit: Annotated[tuple[BlockModule, ...], AfterValidator(_sorted_set)] = ()
    """Modules of every block that are drawn afresh although the rest starts from the teacher."""
    head: bool = False
    """Also take the teacher's classifier head (a student starts with a fresh head otherwise)."""
    layer_scale: Literal["fold", "drop"] = "fold"
    """What becomes of a teacher's LayerScale in a student without it: multiplied into the projection that follows
    (exact), or dropped."""

    @model_validator(mode="after")
    def _canonical(self) -> Self:
        if self.source == "scratch":
            self._become(reinit=(), head=False, layer_scale="fold")
        return self


class Transfer(Spec):
    """What passes from the teacher's attention to the student's during training.

    ``copy``: the teacher's map replaces the student's (Li et al. 2024, section 3.1). ``distill``: a loss pulls the
    student's map to the teacher's (section 3.2). ``none``: nothing.
    """

    method: Literal["copy", "distill", "none"] = "none"
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(_sorted_set)] = ()
    """Blocks, counted from 0 at the input."""
    loss: Literal["ce"] | None = None
    weight: NonNegative | None = None
    """Factor of the distillation loss, which is summed over layers. Copy has none."""

    @model_validator(mode="after")
    def _canonical(self) -> Self:
        if self.method == "none" or not self.layers or self.weight == 0:
            self._become(method="none", layers=(), loss=None, weight=None)
        elif self.method == "distill":
            self._become(loss=self.loss or "ce", weight=3.0 if self.weight is None else self.weight)
        elif self.loss is not None or self.weight is not None:
            raise ValueError("copy has neither loss nor weight: the teacher's map replaces the student's")
        return self


class Data(Spec):
    """A data set: which images a run is trained and measured on."""

    name: str = "digits"
    train: Positive
    """Training images (the data seed chooses which)."""
    test_per_source: Positive = 4
    """Test scenes for each held-out source digit (the same for every run)."""
    clutter: int = Field(default=3, ge=0, le=64)
    """Fragments of other digits in a scene."""


class Recipe(Spec):
    """How a run is optimised: AdamW, cosine schedule with linear warm-up, as in DeiT (Touvron et al. 2021)."""

    epochs: int = Field(ge=0)
    """0: not trained at all, only evaluated (a teacher as it is)."""
    batch_size: Positive = 64
    optimizer: Literal["adamw"] = "adamw"
    lr: NonNegative = 1e-3
    min_lr: NonNegative = 1e-5
    warmup_epochs: NonNegative = 1.0
    weight_decay: NonNegative = 0.05
    """Of weight matrices, an attention pool's query and relative position biases; other biases, norms, LayerScale,
    tokens and position embeddings have none (as in timm's ``VisionTransformer``)."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.99)
    clip_grad: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the whole gradient; null for no clipping."""
    label_smoothing: Share = 0.0
    drop_path: BelowOne = 0.0
    """Stochastic depth rate of the last block, rising linearly from 0 at the first."""
    mixup: NonNegative = 0.0
    """Alpha of Mixup (0: off)."""
    cutmix: NonNegative = 0.0
    """Alpha of CutMix (0: off). With both on, each batch takes either with equal chance, as in timm."""
    rand_augment: str | None = None
    """timm's RandAugment configuration, such as ``rand-m9-mstd0.5-inc1``."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: automatic mixed precision, weights and optimiser in float32."""


_SHARED = {"batch_size", "mixup", "cutmix", "rand_augment", "precision"}


class Seed(Spec):
    """A run's seed is a pair: ``data`` (subset, order, augmentation) and ``model`` (initialisation, drop path)."""

    data: int = Field(ge=0)
    model: int = Field(ge=0)


class RunSpec(Spec):
    """One arm with one seed: the unit that is trained, stored, and never trained twice."""

    network: Network
    teacher: Teacher | None = None
    init: Init = Init()
    transfer: Transfer = Transfer()
    data: Data
    recipe: Recipe
    seed: Seed
    semantics: int = SEMANTICS

    @model_validator(mode="after")
    def _canonical(self) -> Self:
        if self.transfer.method == "none" and self.init.source == "scratch":
            self._become(teacher=None)
        if self.teacher is not None and not self._folds(self.teacher.network):
            self._become(init=self.init.model_copy(update={"layer_scale": "fold"}))
        return self

    def _folds(self, teacher: Network) -> bool:
        """Whether the teacher has a LayerScale that the student has no place for."""
        return "layer_scale" in teacher.components and "layer_scale" not in self.network.components

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        needs = self.transfer.method != "none" or self.init.source == "teacher"
        if needs and self.teacher is None:
            raise ValueError("a transfer, or a start from a teacher, needs a teacher")
        if self.teacher is None:
            return self
        student, teacher = self.network, self.teacher.network
        for field in ("depth", "heads", "image_size", "channels", "grid", "class_token"):
            if getattr(student, field) != getattr(teacher, field):
                raise ValueError(
                    f"the student's {field} ({getattr(student, field)}) must be "
                    f"the teacher's ({getattr(teacher, field)}): they see the same images, and their maps must line up"
                )
        if student.registers not in (0, teacher.registers):
            raise ValueError(f"the student has {student.registers} registers, the teacher {teacher.registers}")
        if self.init.source == "teacher" and (student.width, student.mlp_ratio) != (teacher.width, teacher.mlp_ratio):
            raise ValueError("a student that starts from its teacher needs the teacher's width and mlp_ratio")
        if self.init.head and student.classes != teacher.classes:
            raise ValueError(f"the teacher's head has {teacher.classes} classes, the student {student.classes}")
        if self.transfer.layers and self.transfer.layers[-1] >= student.depth:
            raise ValueError(
                f"layer {self.transfer.layers[-1]} is out of range: the network has {student.depth} blocks"
            )
        return self

    @property
    def id(self) -> str:
        """The run's name: 16 hexadecimal digits of the content hash."""
        return content_hash(self.model_dump(mode="json"))[:16]

    @property
    def stream(self) -> str:
        """A hash of what a cohort shares: runs with equal streams see the same batches, in the same precision."""
        recipe = self.recipe.model_dump(mode="json", include=_SHARED)
        return content_hash({"data": self.data.model_dump(mode="json"), "recipe": recipe, "seed": self.seed.data})[:16]


def content_hash(
    document: dict[str, Any], *, added: dict[str, Any] = ADDED_FIELDS, ignored: frozenset[str] = NOT_HASHED
) -> str:
    """sha256 of the canonical JSON of ``document``, without ``ignored`` fields and ``added`` ones at their old value.

    Fields are named by dotted paths. Key order and white space do not matter.

    >>> content_hash({"a": 1, "b": {"c": 2}}) == content_hash({"b": {"c": 2}, "a": 1})
    True
    >>> content_hash({"a": 1, "new": 0}, added={"new": 0}) == content_hash({"a": 1})
    True
    """

    def kept(node: Any, path: str) -> Any:
        if not isinstance(node, dict):
            return node
        out = {}
        for key, value in node.items():
            here = f"{path}.{key}" if path else key
            if here in ignored or (here in added and added[here] == value):
                continue
            out[key] = kept(value, here)
        return out

    text = json.dumps(kept(document, ""), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
