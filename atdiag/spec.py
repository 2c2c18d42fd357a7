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

ADDED_FIELDS: dict[str, Any] = {
    "network.differences": [],
    "teacher.network.differences": [],
    "init.head_rows": [],
    "transfer.teacher_layers": [],
    "transfer.tensor": "map",
    "transfer.heads": None,
    "transfer.average": None,
    "transfer.reduce": "sum",
    "transfer.temperature": None,
    **dict.fromkeys(("data.image_size", "data.per_class", "data.test_per_class", "data.fingerprint")),
    "recipe.crop": None,
    "recipe.flip": False,
    "recipe.erase": 0.0,
    "recipe.ema": None,
}
"""Fields added since version 1 -> the value under which nothing changed. A spec that holds that value hashes as if the
field did not exist, so old runs stay finished. Frozen: rows are only ever added, and never edited."""

PLAIN_NORM_EPS = 1e-6
"""Epsilon of the LayerNorms of ViT and DeiT, in their authors' code and in timm."""

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

    image_size: Annotated[int, Field(gt=0, le=2**14)]
    patch_size: Annotated[int, Field(gt=0, le=2**14)]
    channels: Annotated[int, Field(gt=0, le=2**10)] = 3
    width: Annotated[int, Field(gt=0, le=2**17)]
    depth: Annotated[int, Field(gt=0, le=2**10)]
    """Bounds like this one are far beyond any ViT: a damaged or malicious file is refused before it is built."""
    heads: Annotated[int, Field(gt=0, le=2**17)]
    mlp_ratio: Annotated[float, Field(gt=0, le=2**10)] = 4.0
    class_token: bool = True
    classes: Annotated[int, Field(gt=0, le=2**24)]
    norm_eps: Annotated[float, Field(gt=0)] = PLAIN_NORM_EPS
    """Epsilon of every LayerNorm; the plain ViT's without the component `ln_eps`."""
    mean: tuple[float, ...] = (0.5,)
    """Per-channel mean that the network subtracts from pixels in [0, 1] (one value serves all channels)."""
    std: tuple[Annotated[float, Field(gt=0)], ...] = (0.5,)
    components: Annotated[tuple[str, ...], AfterValidator(_sorted_set)] = ()
    layer_scale_init: float | None = None
    """Initial value of LayerScale's factors; None without the component `layer_scale`."""
    registers: int = Field(default=0, ge=0, le=2**14)
    """Number of register tokens; 0 without the component `registers`."""
    differences: Annotated[tuple[str, ...], AfterValidator(_sorted_set)] = ()
    """What else tells a published network from the plain ViT and can't be added to a student yet (``rope``): such a
    network can teach, and no student has it."""

    @model_validator(mode="after")
    def _canonical(self) -> Self:
        if "components" in self.model_fields_set:  # taking a component out takes its number along
            if "layer_scale" not in self.components:
                self._become(layer_scale_init=None)
            if "registers" not in self.components:
                self._become(registers=0)
            if "ln_eps" not in self.components:
                self._become(norm_eps=PLAIN_NORM_EPS)
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
        if ("ln_eps" in self.components) != (self.norm_eps != PLAIN_NORM_EPS):
            raise ValueError(
                f"a norm_eps other than {PLAIN_NORM_EPS} belongs to the component ln_eps: give both or neither"
            )
        if "mean_pool" in self.components:
            if "attention_pool" in self.components:
                raise ValueError("mean_pool and attention_pool are two ways to pool: choose one")
            if not self.class_token:
                raise ValueError("mean_pool is the plain way to pool where there is no class token: leave it out")
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
        same = self.model_dump(exclude={"differences"})
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

    @property
    def parameters(self) -> int:
        """About how many parameters it has, biases and norms left out: enough to tell what can't be built."""
        c, n = self.width, self.tokens
        maps = n * n if "rel_pos_bias" in self.components else 0  # its table of indices
        block = int((4 + 3 * self.mlp_ratio) * c * c)  # a gated MLP has three matrices
        return self.depth * (block + maps) + c * (n + self.classes + self.channels * self.patch_size**2)

    def tokens_shared_with(self, other: Network) -> tuple[int, ...] | None:
        """Indices of this network's tokens that a network with fewer registers also has; None if all.

        Raises ValueError where the two differ in more than their registers.
        """
        if (self.grid, self.class_token) != (other.grid, other.class_token) or self.registers < other.registers:
            raise ValueError(f"the tokens of two networks do not line up: {self.tokens} and {other.tokens}")
        if self.registers == other.registers:
            return None
        first = int(self.class_token)
        return (*range(first + other.registers), *range(first + self.registers, self.tokens))


class Teacher(Spec):
    """A frozen pre-trained ViT: which network with which weights."""

    name: str
    """What the user calls it, such as ``clip_b``."""
    profile: str
    """The profile whose weights are meant: ``clip_b`` at mini is not CLIP."""
    network: Network
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    """Of the weight file; None in a plan for weights that are not on this machine, which nothing trains with."""

    @property
    def label(self) -> str:
        """How it is shown: ``clip_b (mini)``, its plain name at paper scale, ``deit_s (own file)``."""
        name, at, _ = self.name.partition("@")
        if at:
            return f"{name} (own file)"
        return name if self.profile == "paper" or ":" in name else f"{name} ({self.profile})"


BlockModule = Literal["attn", "mlp"]


class Init(Spec):
    """How a student starts: from scratch, or from its teacher's weights with some modules re-initialised."""

    source: Literal["scratch", "teacher"] = "scratch"
    reinit: Annotated[tuple[BlockModule, ...], AfterValidator(_sorted_set)] = ()
    """Modules of every block that are drawn afresh although the rest starts from the teacher."""
    head: bool = False
    """Also take the teacher's classifier head (a student starts with a fresh head otherwise)."""
    head_rows: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """With ``head``: which of the teacher's classes the student's classes are, in order (a data set of ten ImageNet
    classes). Empty: the same classes."""
    layer_scale: Literal["fold", "drop"] = "fold"
    """What becomes of a teacher's LayerScale in a student without it: multiplied into the projection that follows
    (exact), or dropped."""

    @model_validator(mode="after")
    def _canonical(self) -> Self:
        if self.source == "scratch":
            self._become(reinit=(), head=False, layer_scale="fold")
        if not self.head:
            self._become(head_rows=())
        return self


TransferMethod = Literal["copy", "distill", "logits", "features", "none"]
MapLoss = Literal["ce", "mse", "jsd", "l1", "logits_mse"]

_METHODS_TEXT = {
    "copy": "the teacher's tensor replaces the student's",
    "logits": "the student's class probabilities are pulled to the teacher's",
    "features": "the student's residual stream is pulled to the teacher's",
}


class Transfer(Spec):
    """What passes from the teacher to the student during training.

    ``copy``: the teacher's map replaces the student's (Li et al. 2024, section 3.1). ``distill``: a loss pulls the
    student's map to the teacher's (section 3.2). ``none``: nothing. Beside them, as comparisons that pass no attention:
    ``logits``, distillation of the class probabilities (Hinton et al. 2015), and ``features``, of the residual stream.
    """

    method: TransferMethod = "none"
    layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """The student's blocks, counted from 0 at the input."""
    teacher_layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """The teacher's block for each of ``layers``; empty: the same ones."""
    tensor: Literal["map", "q", "k", "v"] = "map"
    """What of a block's attention passes: the map, or its queries, keys or values alone."""
    heads: Annotated[tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(_sorted_set)] | None = None
    """Which heads; None: all."""
    average: Literal["examples", "queries", "heads", "layers"] | None = None
    """What the teacher's map is averaged over before it passes (of layers and heads: the chosen ones): what is lost
    shows what mattered."""
    loss: Literal["ce", "kl", "mse", "jsd", "l1", "logits_mse"] | None = None
    """How two maps are compared (distill). ``kl`` becomes ``ce``: their gradients are the same, so they are one arm.
    Of q, k, v and features it is always ``mse``."""
    reduce: Literal["sum", "mean"] = "sum"
    """How the losses of several layers become one."""
    weight: NonNegative | None = None
    """Factor of the transfer loss. Copy has none."""
    temperature: Annotated[float, Field(gt=0)] | None = None
    """By which both networks' logits are divided (``logits``)."""

    @model_validator(mode="after")
    def _canonical(self) -> Self:
        if self.method not in ("none", "logits") and "layers" not in self.model_fields_set:
            raise ValueError(f"{self.method} needs layers: say which of the student's blocks, () for none")
        nothing = self.method == "none" or self.weight == 0 or self.heads == ()
        if nothing or (self.method != "logits" and not self.layers):
            blank = type(self).model_fields
            self._become(**{name: info.default for name, info in blank.items()})
            return self
        if self.method == "logits":
            self._refuse("layers", "teacher_layers", "heads", "average", "loss")
            self._become(weight=self._or(1.0), temperature=self.temperature or 3.0)
            if self.tensor != "map" or self.reduce != "sum":
                raise ValueError("logits are the network's one output: there is no tensor to choose, nothing to reduce")
            return self
        self._refuse("temperature")
        self._pair_layers()
        if self.method == "features":
            self._refuse("heads", "average")
            if self.tensor != "map" or self.loss not in (None, "mse"):
                raise ValueError(
                    "features are the residual stream, compared by mse: there is no tensor or loss to choose"
                )
            self._become(loss="mse", weight=self._or(1.0))
        elif self.method == "copy":
            self._refuse("loss", "weight")
            self._become(reduce="sum")
        else:
            self._become(weight=self._or(3.0))
            self._choose_loss()
        if self.average is not None and self.tensor != "map":
            raise ValueError(f"only maps are averaged before transfer, not {self.tensor}")
        # The mean of one is itself.
        if (self.average == "layers" and len(self.layers) == 1) or (
            self.average == "heads" and len(self.heads or ()) == 1
        ):
            self._become(average=None)
        if self.reduce == "mean" and len(self.layers) == 1:
            self._become(reduce="sum")
        return self

    def _or(self, default: float) -> float:
        return default if self.weight is None else self.weight

    def _refuse(self, *fields: str) -> None:
        for name in fields:
            if getattr(self, name) != type(self).model_fields[name].default:
                why = _METHODS_TEXT.get(self.method, "it compares maps, not class probabilities")
                raise ValueError(f"{self.method} has no {name} ({why})")

    def _pair_layers(self) -> None:
        theirs = self.teacher_layers or self.layers
        if len(theirs) != len(self.layers):
            raise ValueError(
                f"teacher_layers names {len(theirs)} blocks for the {len(self.layers)} of layers: give one for each"
            )
        pairs = sorted(set(zip(self.layers, theirs, strict=True)))
        own = tuple(layer for layer, _ in pairs)
        if len(set(own)) < len(own):
            raise ValueError("a student's block takes from one block of the teacher, and here one is named for two")
        other = tuple(layer for _, layer in pairs)
        self._become(layers=own, teacher_layers=() if other == own else other)

    def _choose_loss(self) -> None:
        if self.tensor != "map":
            if self.loss not in (None, "mse"):
                raise ValueError(f"{self.tensor} is compared by mse: {self.loss} compares maps")
            self._become(loss="mse")
            return
        if self.average is not None and self.loss == "logits_mse":
            raise ValueError("an averaged map has no logits: choose ce, mse, jsd or l1")
        self._become(loss="ce" if self.loss in (None, "kl") else self.loss)

    @property
    def sources(self) -> tuple[int, ...]:
        """The teacher's block for each of ``layers``."""
        return self.teacher_layers or self.layers

    @property
    def takes_attention(self) -> bool:
        """Whether anything of the teacher's attention passes."""
        return self.method in ("copy", "distill")


class Data(Spec):
    """A data set: which images a run is trained and measured on."""

    name: str = "digits"
    """``digits`` and ``larger`` are embedded scenes, made for each data seed; the others are real images."""
    train: Positive
    """Training images: of scenes, the data seed chooses which; of real images fewer than there are, a hash does."""
    test_per_source: Positive = 4
    """Scenes: test scenes for each held-out source digit (the same for every run)."""
    clutter: int = Field(default=3, ge=0, le=64)
    """Scenes: fragments of other digits in each."""
    image_size: Positive | None = None
    """Real images: the side of the square crop that every network sees, in pixels. None for scenes."""
    per_class: Positive | None = None
    """Real images: how many training images of each class, chosen by a hash of the file name; None: all."""
    test_per_class: Positive | None = None
    """Real images: the same for test images."""
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Real images in a folder of one's own, or of a set that is kept in several forms: sha256 of the list of files and
    sizes, because the path, or the name, does not say which images they are."""

    @model_validator(mode="after")
    def _canonical(self) -> Self:
        if self.image_size is not None:
            self._become(test_per_source=4, clutter=3)
        elif self.per_class or self.test_per_class or self.fingerprint:
            raise ValueError("per_class, test_per_class and fingerprint are of real images, which need an image_size")
        return self


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
    crop: Annotated[float, Field(gt=0, le=1)] | None = None
    """Random resized crop: the least share of the image's area that a crop keeps (0.08 in DeiT). None: the middle, as a
    test sees it."""
    flip: bool = False
    """Mirror images left to right with chance one half."""
    erase: Share = 0.0
    """Chance that a random rectangle of an image is erased (0.25 in DeiT; Zhong et al. 2020)."""
    ema: BelowOne | None = None
    """Decay per step of an exponential moving average of the weights, such as 0.9999 (MAE's recipe from scratch):
    ``average = ema * average + (1 - ema) * weights`` after every update, from the initial weights on. The run trains as
    it would without; what is tested and stored is the average. None: the weights themselves, as is 0."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: automatic mixed precision, weights and optimiser in float32."""

    @model_validator(mode="after")
    def _canonical(self) -> Self:
        self._become(ema=self.ema or None)  # an average that forgets everything is the weights
        return self


_SHARED = {"batch_size", "mixup", "cutmix", "rand_augment", "crop", "flip", "erase", "precision"}


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
        for field in ("heads", "image_size", "channels", "grid", "class_token"):
            if getattr(student, field) != getattr(teacher, field):
                raise ValueError(
                    f"the student's {field} ({getattr(student, field)}) must be "
                    f"the teacher's ({getattr(teacher, field)}): they see the same images, and their maps must line up"
                )
        if student.registers not in (0, teacher.registers):
            raise ValueError(f"the student has {student.registers} registers, the teacher {teacher.registers}")
        self._check_start(student, teacher)
        self._check_transfer(student, teacher)
        return self

    def _check_start(self, student: Network, teacher: Network) -> None:
        if self.init.source == "scratch":
            return
        if teacher.differences:
            raise ValueError(
                f"no student can start from this teacher: what it has of {', '.join(teacher.differences)} "
                "can't be given to a student (its maps can)"
            )
        for field in ("width", "mlp_ratio", "depth"):
            if getattr(student, field) != getattr(teacher, field):
                raise ValueError(
                    f"a student that starts from its teacher needs the teacher's {field} "
                    f"({getattr(teacher, field)}, not {getattr(student, field)})"
                )
        if not self.init.head:
            return
        rows = self.init.head_rows
        if rows and (len(rows) != student.classes or max(rows) >= teacher.classes):
            raise ValueError(
                f"head_rows must name one of the teacher's {teacher.classes} classes for each of the student's"
            )
        if not rows and student.classes != teacher.classes:
            raise ValueError(f"the teacher's head has {teacher.classes} classes, the student {student.classes}")

    def _check_transfer(self, student: Network, teacher: Network) -> None:
        transfer = self.transfer
        if student.depth != teacher.depth and transfer.layers and not transfer.teacher_layers:
            raise ValueError(
                f"the student's depth ({student.depth}) is not the teacher's ({teacher.depth}): "
                "say in teacher_layers which of its blocks passes to which of the student's"
            )
        for layers, network, whose in (
            (transfer.layers, student, ""),
            (transfer.teacher_layers, teacher, "teacher's "),
        ):
            if layers and max(layers) >= network.depth:
                raise ValueError(f"layer {max(layers)} is out of range: the {whose}network has {network.depth} blocks")
        if transfer.heads is not None:
            if transfer.heads[-1] >= student.heads:
                raise ValueError(f"head {transfer.heads[-1]} is out of range: there are {student.heads}")
            if len(transfer.heads) == student.heads:
                self._become(transfer=transfer.model_copy(update={"heads": None}))
        what = "features" if transfer.method == "features" else transfer.tensor
        if what != "map" and student.width != teacher.width:
            raise ValueError(
                f"{what} pass between networks of one width: teacher {teacher.width}, student {student.width}"
            )
        if transfer.method == "logits" and student.classes != teacher.classes:
            raise ValueError(
                f"logit distillation needs a teacher with the student's classes "
                f"(teacher {teacher.classes}, student {student.classes})"
            )

    def _content(self) -> dict[str, Any]:
        """What is hashed. A folder of one's own is what its fingerprint says, wherever it lies, in tars or not."""
        document = self.model_dump(mode="json")
        if self.data.name.startswith(("folder:", "timm:")) and self.data.fingerprint:
            document["data"]["name"] = "folder:"
        return document

    @property
    def id(self) -> str:
        """The run's name: 16 hexadecimal digits of the content hash."""
        return content_hash(self._content())[:16]

    @property
    def stream(self) -> str:
        """A hash of what a cohort shares: runs with equal streams see the same batches, in the same precision."""
        recipe = self.recipe.model_dump(mode="json", include=_SHARED)
        return content_hash({"data": self._content()["data"], "recipe": recipe, "seed": self.seed.data})[:16]


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
