"""Native components: parts that a teacher has and the plain ViT lacks, each detected on a network or added to one.

The *standard* student follows its teacher where maps require their tokens to line up, even though this departs from the
plain ViT: in the token grid (image and patch size) and in whether there is a class token (``no_class_token``, the one
component that is ``followed``: it is stored as ``Network.class_token``, never in ``Network.components``). It also
follows width, depth, heads and MLP width. Everything else here is *ablated*: the standard student has none of it, and a
student can be given any subset of its teacher's components.

The set is open: :func:`register_component`, or an entry point of the group ``atdiag.components`` that names a
:class:`Component` (which also reaches the processes that train). A new one needs no other file, wherever it acts: on q
and k (``Attention.qk_hooks``), on the logits (``Attention.rel_pos_bias``), or anywhere else in the network.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import entry_points

from torch import nn

from atdiag.core.errors import suggest
from atdiag.core.spec.network import Value
from atdiag.networks.model import around_the_map, of_the_map
from atdiag.networks.model.component import Component as Component
from atdiag.networks.model.component import branch_scales as branch_scales
from atdiag.networks.model.component import layer_norms as layer_norms
from atdiag.networks.model.component import qkv_biases as qkv_biases
from atdiag.networks.model.component import renamed as renamed
from atdiag.networks.model.positions import RelPosBias as RelPosBias

COMPONENTS: dict[str, Component] = {}
"""All components by name."""


def register_component(component: Component) -> None:
    """Add a component to the set. Raises ValueError for a name that is taken."""
    if component.name in COMPONENTS:
        raise ValueError(f"there is already a component {component.name!r}")
    COMPONENTS[component.name] = component


for _component in (*around_the_map.COMPONENTS, *of_the_map.COMPONENTS):
    register_component(_component)


def resolve(names: Iterable[str]) -> list[Component]:
    """Return the components of the given names. Raises ValueError for an unknown or a ``followed`` one."""
    out = []
    for name in names:
        if name not in COMPONENTS:
            raise ValueError(f"unknown component {name!r}{suggest(name, COMPONENTS)} (known: {', '.join(COMPONENTS)})")
        if COMPONENTS[name].followed:
            raise ValueError(f"{name} is not a component to choose: every student has it if its teacher does")
        out.append(COMPONENTS[name])
    return out


def inspect(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a built network's native components, without those that every student follows."""
    return tuple(sorted(name for name, c in COMPONENTS.items() if not c.followed and c.found(model)))


def values(model: nn.Module, names: Iterable[str]) -> dict[str, Value]:
    """Return what some components are like on a built network that has them, as ``Network.values``."""
    return {f"{name}.{key}": value for name in names for key, value in COMPONENTS[name].values(model).items()}


for _entry in entry_points(group="atdiag.components"):  # last, since such a module imports this one
    register_component(_entry.load())
