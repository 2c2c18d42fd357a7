"""Networks of the user's as teachers: stored in a file that processes and later sessions find. Imports nothing heavy.

A file is named by the sha256 of its content, which is also the teacher's identity. Where timm builds the same function
from the architecture's name, the file holds timm's state dict, and the reference is ``timm:MODEL@FILE``, as for any
file. Otherwise it holds our ViT's, with its architecture in the header: ``file:NAME@FILE``, or just the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from atdiag.core.errors import UserError
from atdiag.networks.weights import sources

if TYPE_CHECKING:
    from atdiag.core.spec import Network

FILE = "file:"


def network(path: Path) -> Network | None:
    """Return the architecture in a file's header; None if there is none. Raises UserError for one that is damaged."""
    from atdiag.core.spec import Network

    if path.suffix != ".safetensors" or not path.is_file() or (path.parent / "spec.json").exists():
        return None
    try:
        header = sources.metadata(path)
    except ValueError:  # no header, or another program's
        return None
    if "network" not in header:
        return None
    try:
        return Network.model_validate(header["network"])
    except ValueError as fault:
        raise UserError(f"{path} has no valid architecture in its header ({str(fault).splitlines()[0]})") from None


def reference(path: Path) -> str | None:
    """Return the reference of a file that holds its architecture; None for any other."""
    return None if network(path) is None else f"{FILE}{path.stem}@{path.expanduser().absolute()}"
