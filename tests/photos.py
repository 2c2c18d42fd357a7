"""Small sets of made-up photographs."""

from pathlib import Path

import numpy as np
from PIL import Image


def draw(root: Path, train: int, val: int = 4) -> None:
    """Make a folder of random JPEGs of several sizes, in two classes."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for cls in ("ant", "bee"):
            (root / split / cls).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (24 + i, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / cls / f"{i}.jpg")
