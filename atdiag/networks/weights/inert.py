"""Read what training scripts store beside weights (options, paths, numbers) as inert records, without running code.

torch's restricted unpickler refuses every class that it was not told of. Those in ``NAMES`` are common beside weights
and are replaced by a record that keeps nothing and calls nothing, so the class itself is never imported.
"""

from __future__ import annotations

import argparse
from typing import Any

NAMES = (
    *(f"pathlib.{kind}" for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")),
    *(f"pathlib._local.{kind}" for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")),
    *(f"numpy.{core}.multiarray.{kind}" for core in ("core", "_core") for kind in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray"),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float64", "Float32", "Int64", "Int32", "Bool", "UInt8")),
    *(f"{package}.AttributeDict" for package in ("lightning_fabric.utilities.data", "lightning.fabric.utilities.data")),
    *("pytorch_lightning.utilities.parsing.AttributeDict", "lightning.pytorch.utilities.parsing.AttributeDict"),
    *(f"omegaconf.{kind}" for kind in ("dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata")),
    *(f"omegaconf.{kind}" for kind in ("base.Metadata", "nodes.AnyNode", "nodes.StringNode", "nodes.IntegerNode")),
    *("typing.Any", "ml_collections.config_dict.config_dict.ConfigDict"),
    *("timm.utils.misc.AttrDict", "easydict.EasyDict", "addict.addict.Dict", "mmengine.config.config.ConfigDict"),
)


class Record(dict[Any, Any]):
    """An object of another class, of which nothing is kept."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Ignore the state."""

    def append(self, _: Any) -> None:
        """Ignore an item of what was a list."""

    def extend(self, _: Any) -> None:
        """Ignore items of what was a list."""


def classes() -> list[Any]:
    """Return what torch's restricted unpickler may build besides tensors: ``argparse.Namespace`` and records."""
    # Namespace is itself a record of options, and timm's says which architecture the weights are of.
    return [argparse.Namespace, *((Record, name) for name in NAMES)]
