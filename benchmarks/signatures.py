"""Write the table by which a weight file without a name is recognised: a row for each ViT of timm that can teach.

    python benchmarks/signatures.py [--out atdiag/networks/registry/signatures.csv]

Run it again for a newer timm; ``tests/benchmarks/test_signatures.py`` compares a sample of the committed rows. Each
network is built on the meta device (no weights), at its native resolution.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch

from atdiag.core.errors import UserError
from atdiag.networks.registry import recognition
from atdiag.networks.timm import inspection

MODULES = ("vision_transformer", "deit", "beit", "eva")
"""timm's files with the classes that can be teachers."""
COLUMNS = ("model", "signature", "function", "patch", "width", "depth", "heads", "mean", "pixels")


def models() -> list[str]:
    """Return the names of timm's networks in these files, in whose order a user is shown those that fit."""
    return [name for module in MODULES for name in timm.list_models(module=module)]


def rows(names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield a row for each network that can be a teacher; ``function`` numbers them in this order.

    Networks compute the same function of equal weights if they are described alike, except for the resolution and the
    head's classes, and have equal keys and shapes.
    """
    functions: dict[tuple[str, str], int] = {}
    for name in names:
        config = timm.get_pretrained_cfg(name)
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
            network = inspection.describe(model, config.mean, config.std)
        except (UserError, RuntimeError, ValueError) as fault:  # no teacher, or not to be built without weights
            print(f"{name}: {type(fault).__name__}: {fault}", file=sys.stderr)
            continue
        signature = recognition.signature(model.state_dict())
        alike = network.model_dump_json(exclude={"image_size", "classes", "layer_scale_init"})
        yield {
            "model": name,
            "signature": signature,
            "function": functions.setdefault((signature, alike), len(functions)),
            "patch": network.patch_size,
            "width": network.width,
            "depth": network.depth,
            "heads": network.heads,
            "mean": network.mean[0],
            "pixels": config.input_size[-1],
        }


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(recognition.__file__).with_name("signatures.csv"))
    out = parser.parse_args().out
    found = list(rows(models()))
    with out.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(found)
    print(f"{len(found)} networks of timm {timm.__version__} in {out}")


if __name__ == "__main__":
    main()
