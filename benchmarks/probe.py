"""Compare the linear probe with scikit-learn's ``LogisticRegressionCV``: chosen penalties and accuracy.

    python benchmarks/probe.py [--data DIR] [--json benchmarks/results/probe.json]

Both get the same standardised features, grid of penalties and stratified hold-out. Also reported: the best penalty of
the grid on the test images, which no method can choose, and the fixed penalty that is used if a class has a single
image. Penalties are those of the held-out fits.

*Synthetic*: classes' means at random in 64 dimensions under noise, from 2 to 200 classes and 1 to 50 images a class.
*Real*: class token and mean patch after the last block of a pre-trained ViT-Ti/16 on images of Imagenette, where DIR
(or ATDIAG_TEST_DATA) has both.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV
from torch import Tensor

from atdiag.analysis import images, probing, subjects
from atdiag.core.spec import Data
from atdiag.data import names
from atdiag.training import classifiers
from atdiag.training.provenance import environment

CLASSES = (2, 10, 50, 200)
PER_CLASS = (1, 2, 5, 20, 50)
WIDTH = 64
TEST = 2000
"""Number of synthetic test images, at least five per class."""
WEIGHTS = "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
ARCHIVE = "imagenette-128.zip"
REAL_TRAIN, REAL_TEST = 50, 40
"""Training images per class."""
Case = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]


def synthetic(classes: int, per_class: int) -> Case:
    """Make training and test features with labels. The more classes, the further apart they are."""
    rng = np.random.default_rng([classes, per_class])
    means = rng.normal(size=(classes, WIDTH)) * (0.3 + 0.1 * np.log(classes))

    def draw(y: NDArray[np.int64]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = (means[y] + rng.normal(size=(len(y), WIDTH))).astype(np.float32)
        return found

    y, z = np.repeat(np.arange(classes), per_class), np.repeat(np.arange(classes), max(TEST // classes, 5))
    return draw(y), y, draw(z), z


def real(folder: Path) -> Case | None:
    """Return features of all ten classes, one class after another; None without the files."""
    if not ((folder / WEIGHTS).exists() and (folder / ARCHIVE).exists()):
        return None
    with tempfile.TemporaryDirectory() as root, zipfile.ZipFile(folder / ARCHIVE) as archive:
        by_class: dict[tuple[str, ...], list[str]] = {}
        for name in sorted(archive.namelist()):
            parts = tuple(name.split("/"))
            if len(parts) == 4 and parts[3] and parts[1] in ("train", "val"):
                by_class.setdefault(parts[1:3], []).append(name)
        for (split, _), found in by_class.items():
            archive.extractall(root, found[: REAL_TRAIN if split == "train" else REAL_TEST])
        data = names.complete(Data(name=f"folder:{root}/imagenette-128", train=1, image_size=224))
        subject = subjects.find(f"timm:vit_tiny_patch16_224@{folder / WEIGHTS}", data=data)
        out: list[Any] = []
        for pictures in (
            probing.training_pictures(data, subject.network, 10 * REAL_TRAIN),
            images.choose(0, data, subject.network),
        ):
            (found_,), kept = probing.features([subject], pictures, (subject.network.depth - 1,), exits=False)
            assert pictures.labels is not None
            out += [found_.of("both", 0).numpy(), pictures.labels[kept]]
    return out[0], out[1], out[2], out[3]


def part(case: Case, classes: int, per_class: int) -> Case:
    """Select the first classes, and the first training images of each."""
    x, y, z, t = case
    rows = np.concatenate([np.flatnonzero(y == one)[:per_class] for one in range(classes)])
    return x[rows], y[rows], z[t < classes], t[t < classes]


def compare(case: Case) -> dict[str, Any]:
    """Return accuracy on the test images in per cent, penalties and seconds, for our probe and scikit-learn's."""
    x, z = classifiers.standardise(*(torch.from_numpy(one) for one in (case[0], case[2])))
    y, truth, classes = torch.from_numpy(case[1]), torch.from_numpy(case[3]), int(case[1].max()) + 1

    def right(said: Tensor) -> float:
        return 100 * float((said == truth).double().mean())

    held_out = classifiers.hold_out(np.arange(len(y)), case[1])
    begun = time.perf_counter()
    ours = classifiers.choose_linear(x, y, classes, None if held_out is None else torch.from_numpy(held_out))
    # The last fit uses more images with the same C.
    grown = 1.0 if held_out is None else len(y) / int((~held_out).sum())
    out = {"classes": classes, "images": len(y), "held_out": 0 if held_out is None else int(held_out.sum())}
    out |= {"ours": right(ours(z)), "our_penalty": ours.penalty * grown, "our_seconds": time.perf_counter() - begun}
    out |= {"best_of_grid": best(x, y, classes, lambda fitted: right(fitted(z)))}
    out |= {"fixed": right(classifiers.choose_linear(x, y, classes, None)(z))}
    if held_out is None:
        return out
    begun, fit, held = time.perf_counter(), np.flatnonzero(~held_out), np.flatnonzero(held_out)
    theirs = LogisticRegressionCV(
        Cs=[1 / (penalty * len(fit)) for penalty in classifiers.PENALTIES],
        cv=[(fit, held)],
        l1_ratios=(0.0,),
        scoring="accuracy",
        max_iter=2000,
        use_legacy_attributes=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        said = torch.from_numpy(theirs.fit(x.numpy(), case[1]).predict(z.numpy()))
    penalty = 1 / (float(np.ravel(theirs.C_)[0]) * len(fit))
    return out | {"theirs": right(said), "their_penalty": penalty, "their_seconds": time.perf_counter() - begun}


def best(x: Tensor, y: Tensor, classes: int, score: Any) -> float:
    """Return the highest score along the grid of penalties."""
    fitted, found = None, 0.0
    for penalty in classifiers.PENALTIES:
        fitted = classifiers.fit_linear(x, y, classes, penalty, fitted, 1e-4)
        found = max(found, score(fitted))
    return found


def cases(folder: Path) -> Iterator[tuple[str, int, Case]]:
    """Yield the cases: the features' name, images per class, features and labels."""
    for classes in CLASSES:
        for per_class in PER_CLASS:
            yield "synthetic", per_class, synthetic(classes, per_class)
    if (whole := real(folder)) is None:
        print(f"no {WEIGHTS} and {ARCHIVE} in {folder}: synthetic features alone")
        return
    for classes in (2, 5, 10):
        for per_class in PER_CLASS:
            yield "vit_tiny, imagenette", per_class, part(whole, classes, per_class)


def main() -> None:
    """Measure, print, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = os.environ.get("ATDIAG_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(there), help="where the test data is")
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    print("features                classes  a class  held out   ours  theirs  best  fixed   penalties      seconds")
    for name, per_class, case in cases(asked.data):
        one = {"features": name, "per_class": per_class, **compare(case)}
        found.append(one)
        print(
            f"{name:22} {one['classes']:8} {per_class:8} {one['held_out']:9} {one['ours']:6.1f} "
            f"{one.get('theirs', float('nan')):7.1f} {one['best_of_grid']:5.1f} {one['fixed']:6.1f} "
            f"{one['our_penalty']:8.2g} {one.get('their_penalty', float('nan')):6.2g} "
            f"{one['our_seconds']:6.1f} {one.get('their_seconds', float('nan')):6.1f}",
            flush=True,
        )
    both = [one for one in found if "theirs" in one]
    apart = [one["ours"] - one["theirs"] for one in both]
    alike = sum(bool(np.isclose(one["our_penalty"], one["their_penalty"])) for one in both)
    print(
        f"{len(both)} cases: the same penalty in {alike}; ours minus theirs {np.mean(apart):+.2f} points in the mean, "
        f"{min(apart):+.1f} to {max(apart):+.1f}"
    )
    if asked.json:
        machine = environment(torch.device("cpu"))
        document = {"benchmark": "probe", "machine": machine, "grid": classifiers.PENALTIES, "cases": found}
        asked.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
