"""Networks: the architecture of a ViT, and a teacher as an architecture with weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from atdiag.core.spec.base import Spec, sorted_set
from atdiag.core.spec.former import as_first_described
from atdiag.core.spec.specimen import Operation

PLAIN_NORM_EPS = 1e-6
"""LayerNorm epsilon of ViT and DeiT, in their authors' code and in timm."""


Value = bool | int | float | str
"""What a component's value is."""

EXCLUSIVE: tuple[tuple[str, str, str], ...] = (
    ("mean_pool", "attention_pool", "are two ways to pool"),
    ("distillation_token", "attention_pool", "are two ways to read the output"),
    ("distillation_token", "mean_pool", "are two ways to read the output"),
    ("distillation_token", "registers", "both say what the extra tokens are"),
    ("gelu_tanh", "quick_gelu", "are two activations of one MLP"),
    ("gelu_tanh", "swiglu", "are two activations of one MLP"),
    ("quick_gelu", "swiglu", "are two activations of one MLP"),
    ("ln_eps", "rms_norm", "contradict each other: there is no LayerNorm whose epsilon could differ"),
    ("no_last_norm", "norm_before_pool", "contradict each other: there is no norm to place"),
    ("no_k_bias", "no_qkv_bias", "both say which biases are missing"),
)
"""Pairs of components that no network can have together -> why."""


def _pairs(values: Any) -> Any:
    """Return values given as a mapping, as pairs; sorted by name."""
    pairs = values.items() if isinstance(values, dict) else values
    try:
        return tuple(sorted((tuple(pair) for pair in pairs), key=lambda pair: str(pair[0])))
    except TypeError:
        return values  # for pydantic to refuse


class Network(Spec):
    """The architecture of a ViT: a plain one (``components`` empty) or one with any set of native components.

    Token grid = ``image_size / patch_size``; tokens are ordered class token, registers, patches.
    """

    image_size: Annotated[int, Field(gt=0, le=2**14)]
    patch_size: Annotated[int, Field(gt=0, le=2**14)]
    channels: Annotated[int, Field(gt=0, le=2**10)] = 3
    width: Annotated[int, Field(gt=0, le=2**17)]
    depth: Annotated[int, Field(gt=0, le=2**10)]
    """Upper bounds here are far beyond any ViT: they reject a damaged or malicious file before anything is built."""
    heads: Annotated[int, Field(gt=0, le=2**17)]
    mlp_ratio: Annotated[float, Field(gt=0, le=2**10)] = 4.0
    class_token: bool = True
    classes: Annotated[int, Field(gt=0, le=2**24)]
    norm_eps: Annotated[float, Field(gt=0)] = PLAIN_NORM_EPS
    """Epsilon of all LayerNorms; the plain ViT's unless the component `ln_eps` is present."""
    mean: tuple[float, ...] = (0.5,)
    """Per-channel mean that the network subtracts from pixels in [0, 1] (a single value applies to all channels)."""
    std: tuple[Annotated[float, Field(gt=0)], ...] = (0.5,)
    components: Annotated[tuple[str, ...], AfterValidator(sorted_set)] = ()
    layer_scale_init: float | None = None
    """Initial value of LayerScale; None without the component `layer_scale`."""
    registers: int = Field(default=0, ge=0, le=2**14)
    """Number of register tokens; 0 without the component `registers`."""
    differences: Annotated[tuple[str, ...], AfterValidator(sorted_set)] = ()
    """Other departures of a published network from the plain ViT that students can't be given
    (``parallel_blocks``): such a network can teach, but no student has them."""
    values: Annotated[tuple[tuple[str, Value], ...], BeforeValidator(_pairs)] = ()
    """What components are like where they differ from their defaults, as pairs (``component.value``, value):
    ``("rope.temperature", 100.0)``. Sorted by name; a mapping is accepted."""

    def canonical(self) -> dict[str, Any]:
        """Reset the fields of absent components, and collapse channel values that are all equal."""
        changed: dict[str, Any] = {}
        if "components" in self.model_fields_set:
            without = {"layer_scale_init": None, "registers": 0, "norm_eps": PLAIN_NORM_EPS}
            owners = {
                "layer_scale_init": ("layer_scale",),
                "registers": ("registers", "distillation_token"),
                "norm_eps": ("ln_eps",),
            }
            changed |= {field: without[field] for field, names in owners.items() if not {*names} & {*self.components}}
            changed["values"] = tuple(p for p in self.values if p[0].partition(".")[0] in self.components)
        pixels = {"mean": self.mean, "std": self.std}
        return changed | {name: values[:1] for name, values in pixels.items() if len(set(values)) == 1}

    def check(self) -> None:
        """Raise ValueError for inconsistent sizes, and for a component without its value."""
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if len(self.mean) not in (1, self.channels) or len(self.std) not in (1, self.channels):
            raise ValueError(f"mean and std need 1 or {self.channels} values")
        if ("layer_scale" in self.components) != (self.layer_scale_init is not None):
            raise ValueError("layer_scale_init belongs to the component layer_scale: give both or neither")
        extra = {"registers", "distillation_token"} & {*self.components}
        if bool(extra) != (self.registers > 0):
            raise ValueError("a number of registers belongs to the component registers: give both or neither")
        self._check_combination()
        if ("ln_eps" in self.components) != (self.norm_eps != PLAIN_NORM_EPS):
            raise ValueError(
                f"a norm_eps other than {PLAIN_NORM_EPS} belongs to the component ln_eps: give both or neither"
            )

    def _check_combination(self) -> None:
        """Raise ValueError for components that exclude each other, or that this network can't have."""
        for one, other, why in EXCLUSIVE:
            if {one, other} <= {*self.components}:
                raise ValueError(f"{one} and {other} {why}: choose one")
        if not self.class_token:
            if "mean_pool" in self.components:
                raise ValueError("mean_pool is the plain way to pool where there is no class token: leave it out")
            if "distillation_token" in self.components:
                raise ValueError("distillation_token is read beside a class token, and there is none: leave it out")
        if "distillation_token" in self.components and self.registers != 1:
            raise ValueError(f"there is one distillation token: give registers=1, not {self.registers}")
        if "rope" in self.components and self.width // self.heads % 4:
            raise ValueError(
                f"rope rotates pairs of channels along two axes: heads of {self.width // self.heads} channels are "
                "no multiple of 4"
            )

    def own(self, component: str) -> dict[str, Value]:
        """Return a component's values that differ from its defaults, by name."""
        named = ((*name.partition("."), value) for name, value in self.values)
        return {name: value for owner, _, name, value in named if owner == component}

    @property
    def as_taught(self) -> dict[str, Any]:
        """The network as a teacher's is hashed: equal for all descriptions of one teacher (``former``)."""
        return as_first_described(self.model_dump(mode="json"))

    def student(self, components: tuple[str, ...] = (), classes: int | None = None) -> Network:
        """Return the architecture of a student for this teacher: its grid, width, depth, heads and class token.

        components: native components of the student: none for the standard student, all of the teacher's for the native
        one. Raises ValueError for one that the teacher lacks.
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
        """Approximate number of parameters, without biases and norms: enough to reject a network too large to build."""
        c, n = self.width, self.tokens
        maps = n * n if "rel_pos_bias" in self.components else 0  # the table of indices
        block = int((4 + 3 * self.mlp_ratio) * c * c)  # a gated MLP has three matrices
        return self.depth * (block + maps) + c * (n + self.classes + self.channels * self.patch_size**2)

    def tokens_shared_with(self, other: Network) -> tuple[int, ...] | None:
        """Return the indices of this network's tokens that a network with fewer registers also has; None if all.

        The patches are this network's, whatever the other's grid. Raises ValueError if only one of the two has a class
        token, or the other more registers.
        """
        if self.class_token != other.class_token or self.registers < other.registers:
            raise ValueError(f"the tokens of two networks do not line up: {self.tokens} and {other.tokens}")
        if self.registers == other.registers:
            return None
        first = int(self.class_token)
        return (*range(first + other.registers), *range(first + self.registers, self.tokens))


OWN = "own"
"""In place of a teacher's profile, if a user registered it: such a teacher is the same at every profile."""


_BRANCHES = {"weights": "", "ema": ", average", "student": ", student"}


class Teacher(Spec):
    """A frozen pre-trained ViT: a network with its weights."""

    name: str
    """Name given by the user, such as ``clip_b``."""
    profile: str
    """Profile of the weights: ``clip_b`` at mini is not CLIP. ``own`` for a user's own teacher (:data:`OWN`)."""
    network: Network
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    """Of the weight file; None in a plan for weights that are not on this machine; such a spec can't be trained."""
    branch: Literal["weights", "ema", "student"] = "weights"
    """Which network of a file that holds several: the raw weights (of a pair, the teacher's), their moving average, or
    the student's."""
    operation: Operation | None = None
    """What is done to the weights when they are loaded: a planted fault. None: nothing."""

    def check(self) -> None:
        """Raise ValueError for an operation on blocks that the network lacks."""
        if self.operation is not None and max(self.operation.layers, default=0) >= self.network.depth:
            raise ValueError(f"{self.operation.name}: the network has {self.network.depth} blocks, counted from 0")

    @property
    def weights(self) -> str:
        """Name of the weights: the file's sha256, with the branch and the operation if any (empty in a plan)."""
        branch = "" if self.branch == "weights" else f"#{self.branch}"
        operation = f"#{self.operation.key}" if self.operation else ""
        return f"{self.sha256 or ''}{branch}{operation}"

    @property
    def seen_as(self) -> tuple[str, int]:
        """The weights, and the image size at which they are run: what the runs of a cohort share."""
        return self.weights, self.network.image_size

    @property
    def label(self) -> str:
        """Display name: ``clip_b (mini)``, ``deit_s (own file)``, ``run 1a2b3c``.

        The plain name at paper scale, and of a user's own teachers.
        """
        name, at, _ = self.name.partition("@")
        if at:
            if name.startswith("run:"):
                return f"run {name.removeprefix('run:')[:6]}"
            name = name.removeprefix("file:")  # a network of the user's own
            return f"{name} (own file{_BRANCHES[self.branch]})"
        return name if self.profile in ("paper", OWN) or ":" in name else f"{name} ({self.profile})"
