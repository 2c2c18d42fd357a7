"""The notebook example of docs/looking-inside.md, run verbatim."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PAGE = (Path(__file__).parents[1] / "docs" / "looking-inside.md").read_text()


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """Run the example; return what it defines, and its folder."""
    (code,) = re.findall(r"## In a notebook.*?```python\n(.*?)```", PAGE, re.DOTALL)
    folder, names = tmp_path_factory.mktemp("notebook"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(code, names)
    return names, folder


def test_shapes_are_as_stated(notebook):
    names, _ = notebook
    assert names["p"].shape == (64, 3, 26, 26) and names["heads"].shape == (12, 3, 3)
    np.testing.assert_allclose(names["p"].sum(-1), 1, atol=1e-5)
    for name, shape in (("p", "64 images, 3 heads, 26 queries, 26 keys"), ("heads", "12 layers, 3 heads, 3 heads")):
        assert re.search(rf"^{name} = .*# \[{shape}\]", PAGE, re.MULTILINE)


def test_frames_are_as_stated(notebook):
    names, _ = notebook
    jsd, changed, accuracy = names["jsd"], names["changed"], names["accuracy"]
    assert len(jsd) == 12 * 3 and jsd.jsd_optimal.between(0, 1).all() and jsd.cka.between(0, 1).all()
    assert len(changed) == 2 * 12 and set(changed.replaced) == {"uniform map", "map of dinov2_b (mini)"}
    assert (changed.change < -30).all()
    assert len(accuracy) == 3 * (3 * 3 + 1) + 1 and accuracy.top1.between(accuracy.ci_low, accuracy.ci_high).all()


def test_the_picture_exists(notebook):
    with Image.open(notebook[1] / "similarity.png") as picture:
        assert picture.width > 900
