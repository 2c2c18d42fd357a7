"""Where a teacher's weights come from. Reading a file's header needs no torch, so that planning stays fast."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atdiag.spec import Network, Teacher

if TYPE_CHECKING:
    from atdiag.networks.vit import ViT

SHIPPED = Path(__file__).parent / "miniatures"
"""The miniature teachers that come with the package: ``<name>.safetensors``, half precision."""


class WeightsMissingError(FileNotFoundError):
    """A teacher's weights are not on this machine; the message says where they would go."""


@cache
def sha256(path: Path) -> str:
    """The sha256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def metadata(path: Path) -> dict[str, Any]:
    """The JSON values in a safetensors file's header, read without loading a tensor.

    Raises ValueError where the file is not such a file.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size <= 100_000_000 or size > path.stat().st_size:
                raise ValueError("no header")
            header = json.loads(file.read(size))
        return {key: json.loads(value) for key, value in header["__metadata__"].items()}
    except (ValueError, KeyError, TypeError) as fault:
        raise ValueError(f"{path} is not a safetensors file written by atdiag ({fault})") from None


def shipped_path(name: str) -> Path:
    """Where the miniature of a teacher lies, if it ships."""
    return SHIPPED / f"{name}.safetensors"


def shipped(name: str) -> Teacher:
    """The spec of a miniature teacher that ships with the package."""
    path = shipped_path(name)
    if not path.exists():
        raise WeightsMissingError(
            f"the miniature of {name} is not in {SHIPPED}: rebuild it with 'atdiag pretrain {name} --install'"
        )
    return Teacher(name=name, profile="mini", network=Network(**metadata(path)["network"]), sha256=sha256(path))


def load(teacher: Teacher) -> ViT:
    """A teacher, frozen and in eval mode.

    Raises WeightsMissingError, or ValueError if the file is not the one meant.
    """
    from safetensors.torch import load_file

    from atdiag.networks.vit import ViT

    path = shipped_path(teacher.name)
    if teacher.profile != "mini" or not path.exists():
        raise WeightsMissingError(f"no weights of {teacher.label} on this machine")
    if sha256(path) != teacher.sha256:
        meant = str(teacher.sha256)[:12]
        raise ValueError(f"{path} is not the file this run was made with (sha256 {sha256(path)[:12]}, not {meant})")
    vit = ViT(teacher.network)
    vit.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    vit.eval().requires_grad_(False)
    return vit


def save(vit: ViT, path: Path, facts: dict[str, Any]) -> None:
    """Write a network as a miniature teacher: half precision, with its architecture and ``facts`` in the header."""
    from safetensors.torch import save as to_bytes

    from atdiag.runs import write_atomically

    state = {name: tensor.detach().half().contiguous() for name, tensor in vit.state_dict().items()}
    header = {"network": vit.network.model_dump(mode="json"), **facts}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_bytes(state, {key: json.dumps(value) for key, value in header.items()}))
