"""Download a teacher's published weights in advance, for machines without network access during training.

The only module here that accesses the network, and only for ``atdiag teachers pull``.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from atdiag.core import paths
from atdiag.core.errors import UserError
from atdiag.networks.registry import teachers
from atdiag.networks.weights import sources
from atdiag.networks.weights.sources import Source, WeightsError


@dataclass(frozen=True)
class Pulled:
    """Weights that are now on this machine and fit their network."""

    name: str
    path: Path
    sha256: str
    branch: str
    """The part of the file that is the network."""
    dropped: int
    """Number of keys in the file that are not part of it."""
    was_here: bool


def pull(reference: str) -> Pulled:
    """Bring a teacher's weights to this machine, check that they load, and record their sha256.

    Raises UserError if that is not possible: no network, offline mode, no such file, no source; WeightsError if the
    file does not fit, in which case it is not kept.
    """
    source = teachers.source(reference)
    if source.file is not None:
        raise UserError(f"{reference} is your own file: there is nothing to fetch")
    found = sources.find(source)
    path = found or _fetch(source)
    try:
        branch, dropped = _checked(source, path)
    except WeightsError:
        if found is None and path.is_relative_to(paths.cache()):
            path.unlink()
        raise
    return Pulled(source.name, path, sources.sha256(path), branch, dropped, was_here=found is not None)


def _checked(source: Source, path: Path) -> tuple[str, int]:
    from atdiag.networks.timm import architectures
    from atdiag.networks.weights import loading

    _, converted = loading.load_source(source, path, architectures.native_size(source))
    return converted.branch, len(converted.dropped)


def _fetch(source: Source) -> Path:
    from huggingface_hub import constants

    if not source.hub and not source.url:
        raise UserError(f"it is not known where {source.name}'s weights are published", sources.how_to_get(source))
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"offline mode is on (HF_HUB_OFFLINE): {source.name} can't be fetched", _by_hand(source))
    return _from_hub(source, source.hub) if source.hub else _from_url(source, str(source.url))


def _by_hand(source: Source) -> str:
    if source.hub:
        file, place = (
            f"{sources.HUB_FILES[0]} of https://huggingface.co/{source.hub}",
            sources.place(source, ".safetensors"),
        )
    else:
        file, place = str(source.url), sources.place(source)
    return f"from a machine with a network, bring {file} to {place}"


def _from_hub(source: Source, repository: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    # Silence its reports of retries: we report the outcome in one line.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    for name in sources.HUB_FILES:
        try:
            return Path(hf_hub_download(repository, name))  # shows its progress
        except LocalEntryNotFoundError as fault:  # raised without a network, too
            raise _unreachable(source, fault) from None
        except EntryNotFoundError:
            continue
        except OSError as fault:
            raise _unreachable(source, fault) from None
    raise UserError(f"{repository} on the hub has none of {', '.join(sources.HUB_FILES)}", _by_hand(source))


def _from_url(source: Source, url: str) -> Path:
    import torch

    if not url.startswith("https://"):
        raise UserError(f"{url} is not an https address, so what it sends can't be trusted", _by_hand(source))
    path = sources.place(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.hub.download_url_to_file(url, str(part), progress=True)
        part.replace(path)
    except OSError as fault:
        raise _unreachable(source, fault) from None
    finally:
        part.unlink(missing_ok=True)
    return path


def _unreachable(source: Source, fault: BaseException) -> UserError:
    reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
    return UserError(f"{source.name} can't be fetched ({reason})", _by_hand(source))
