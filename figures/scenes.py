"""Picture of the embedded data: 25 scenes of a task with their labels.

python -m figures.scenes FILE.png [digits|larger]
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@style.drawn
def scenes(task: str = "digits", clutter: int = 6) -> Figure:
    """Draw 25 training scenes of a task, each under its label."""
    from atdiag.data import scenes

    made = scenes.train_scenes(task, 25, 0, clutter)
    figure, axes = style.canvas(height=style.COLUMN)
    axes.remove()
    for place, image, label in zip(figure.subplots(5, 5).flat, made.images, made.labels, strict=True):
        place.imshow(image[0], cmap="gray_r", interpolation="nearest")
        place.set_title(str(label + (task == "larger")), fontsize=7, pad=1.5)
        place.set(xticks=[], yticks=[])
        place.grid(visible=False)
        for spine in place.spines.values():
            spine.set(visible=True, color=style.GREY, linewidth=0.5)
    return figure


if __name__ == "__main__":
    scenes(sys.argv[2] if len(sys.argv) > 2 else "digits").savefig(sys.argv[1])
