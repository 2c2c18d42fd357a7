"""Results as files: all of them, or none."""

import json

import pytest
from matplotlib.figure import Figure

from atdiag.reports import writers


class BrokenFigure(Figure):
    """Can't be drawn."""

    def savefig(self, *arguments, **options):
        raise ValueError("no room for the legend")


def figure() -> Figure:
    made = Figure(figsize=(2, 1))
    made.add_subplot().plot([0, 1], [1, 0])
    return made


def test_every_form_is_written_and_listed(tmp_path):
    texts = {"txt": "caption", "csv": "a,b\n", "md": "| a |"}
    files = writers.write(tmp_path / "new", "x", texts, {"verdict": "ä"}, {"": figure(), "-layers": figure()})
    names = ["x.csv", "x.md", "x.json", "x.txt", "x.png", "x.pdf", "x-layers.png", "x-layers.pdf"]
    assert [path.name for path in files] == names
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(names)
    for kind, text in texts.items():
        assert (tmp_path / "new" / f"x.{kind}").read_text() == text
    document = json.loads((tmp_path / "new" / "x.json").read_text())
    assert document == {"verdict": "ä", "files": [str(path) for path in files]}
    for path in files[4:]:
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"%PDF")


def test_the_same_result_is_the_same_bytes(tmp_path):
    one, other = (writers.write(tmp_path / name, "x", {}, {}, {"": figure()}) for name in "ab")
    assert [path.read_bytes() for path in one[1:]] == [path.read_bytes() for path in other[1:]]


@pytest.mark.parametrize("before", [None, "of another time"])
def test_a_figure_that_fails_leaves_no_file(tmp_path, before):
    folder = tmp_path / "results"
    if before is not None:
        folder.mkdir()
        (folder / "x.csv").write_text(before)
    with pytest.raises(ValueError, match="no room for the legend"):
        writers.write(folder, "x", {"csv": "new"}, {}, {"": figure(), "-layers": BrokenFigure()})
    if before is None:
        assert not folder.exists()
    else:
        assert {path.name: path.read_text() for path in folder.iterdir()} == {"x.csv": before}


def test_the_document_is_written_when_all_it_names_is_there(tmp_path, monkeypatch):
    real, order = writers.write_atomically, []

    def write(path, content):
        order.append(path)
        real(path, content)

    monkeypatch.setattr(writers, "write_atomically", write)
    files = writers.write(tmp_path, "x", {"csv": "", "md": "", "tex": "", "txt": ""}, {}, {"": figure()})
    assert order[-1] == tmp_path / "x.json"
    assert sorted(order) == sorted(files)


def test_an_ending_that_is_unknown_writes_nothing(tmp_path):
    with pytest.raises(ValueError):
        writers.write(tmp_path / "results", "x", {"xlsx": ""}, {}, {})
    assert not (tmp_path / "results").exists()
