"""Drawing neither depends on the user's matplotlib settings nor changes them."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

from atdiag.reports import writers
from figures import contrasts, layer_curve, style
from tests import series_shapes as shapes

REPORT = shapes.GAINS["one"].reports[0]
HOSTILE = {
    "text.usetex": True,
    "font.family": ["Nowhere Sans"],
    "font.size": 40,
    "axes.grid": False,
    "figure.dpi": 30,
    "savefig.dpi": 30,
    "savefig.bbox": "tight",
    "savefig.format": "svg",
    "axes.prop_cycle": matplotlib.cycler(color=["r"]),
    "figure.constrained_layout.use": False,
    "axes.unicode_minus": False,
    "pdf.fonttype": 3,
}


@pytest.mark.parametrize("kind", writers.FIGURE_KINDS)
def test_figures_neither_depend_on_nor_change_matplotlib_settings(kind):
    for figure in (
        lambda: contrasts.contrasts(REPORT),
        lambda: layer_curve.layer_curve(shapes.CURVES["one"].reports[0]),
    ):
        plain = writers.draw(figure(), kind)
        with matplotlib.rc_context(HOSTILE):
            before = dict(matplotlib.rcParams)
            assert writers.draw(figure(), kind) == plain
            assert dict(matplotlib.rcParams) == before


def test_saved_figures_do_not_depend_on_settings(tmp_path):
    one, other = (contrasts.contrasts(REPORT) for _ in range(2))
    one.savefig(tmp_path / "a.png")
    with matplotlib.rc_context(HOSTILE):
        other.savefig(tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


CODE = """
import sys
from figures import style
figure, axes = style.canvas(1.0)
axes.set_title("a title")
figure.savefig(sys.argv[1])
assert figure.canvas.__class__.__module__ == "matplotlib.backends.backend_agg"
"""


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense", "TkAgg", ""])
def test_backend_and_matplotlibrc_do_not_matter(tmp_path, backend):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nbackend: nonsense\nfigure.figsize: 1, 1\n")
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "MPLBACKEND": backend}
    subprocess.run([sys.executable, "-c", CODE, "a.png"], cwd=tmp_path, env=env, check=True)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_wrapping_keeps_names_whole():
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k 587e9d"
    lines = style.wrapped(name, 16).splitlines()
    assert max(map(len, lines)) <= 16 and "".join(lines) == name
    assert style.wrapped("x" * 50, 20).splitlines() == ["x" * 20, "x" * 20, "x" * 10]
    assert style.wrapped("clip_b (mini)") == "clip_b (mini)"


THEIRS = """
import sys
from pathlib import Path
from atdiag.reports import writers

def make():
    from matplotlib import pyplot
    figure, axes = pyplot.subplots()
    axes.set_title("a title")
    return figure

written = writers.write(Path(sys.argv[1]), "stem", {}, {}, {"": make})
assert not written.missing, written.missing
"""


def test_a_figure_of_another_package_is_drawn_with_matplotlibs_defaults(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfigure.figsize: 1, 1\n")
    for folder, settings in (("plain", {"MPLBACKEND": ""}), ("hostile", {"MPLBACKEND": "nonsense"})):
        cwd = tmp_path if folder == "hostile" else Path(__file__).parent
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | settings
        subprocess.run([sys.executable, "-c", THEIRS, tmp_path / folder], cwd=cwd, env=env, check=True)
    pictures = [(tmp_path / folder / "stem.png").read_bytes() for folder in ("plain", "hostile")]
    assert pictures[0] == pictures[1]
