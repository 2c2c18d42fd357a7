"""Result files: a failing figure never costs a table, and LaTeX tables use only characters of their font."""

import json
import re

import pandas as pd
import pytest

from atdiag.reports import document, latex, tables, writers
from figures import contrasts
from tests import series_shapes as shapes

MADE = shapes.GAINS["corrected"]


def test_a_failing_figure_costs_no_table(tmp_path, capsys):
    def broken():
        raise RuntimeError("no\nfont")

    (tmp_path / "x-bad.png").write_bytes(b"of an earlier result")
    figures = {"-bad": broken, "-good": lambda: contrasts.contrasts(MADE.reports[0])}
    written = writers.write(tmp_path, "x", {"csv": "a\n1\n"}, {"command": "c"}, figures)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "x-bad.png" in said and "RuntimeError: no font" in said
    assert {path.name for path in tmp_path.iterdir()} == {"x.csv", "x.json", "x-good.png", "x-good.pdf"}
    assert set(written.files) == set(tmp_path.iterdir())
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["command"] == "c" and set(record["files"]) == {str(path) for path in tmp_path.iterdir()}
    assert record["missing"] == {str(tmp_path / f"x-bad.{kind}"): "RuntimeError: no font" for kind in ("png", "pdf")}


def test_a_reading_without_its_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(writers, "figure_of", lambda reading: 1 / 0)
    monkeypatch.setattr(tables, "frame", lambda reading: pd.DataFrame({"a": [1]}))  # needs runs, and there are none
    monkeypatch.setattr(tables, "notes", lambda reading: [])
    written = writers.write_reading(MADE, tmp_path)
    assert {path.suffix for path in written.files} == {".csv", ".md", ".tex", ".txt", ".json"}
    assert all(path.stat().st_size for path in written.files) and len(written.missing) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("made", shapes.GAINS.values(), ids=shapes.GAINS)
def test_latex_tables_use_only_characters_of_ot1(made):
    text = tables.latex(made, document.headline(made), "tab:x")
    assert text.isascii()
    plain = re.sub(r"\$[^$]*\$|^%.*$|\\\$", "", text, flags=re.M)  # outside of formulas and comments
    assert not set(plain) & set('<>|"~^')
    assert not re.search(r"(?<!\\)[#%]", plain) and not re.search(r"(?<!\\)_", plain.replace(r"\label{tab:x}", ""))
    assert not re.search(r"\\\\\s*[\[*]", text)  # would be read as an argument of the line break
    widths = {len(re.findall(r"(?<!\\)&", line)) for line in text.splitlines() if line.endswith(r"\\")}
    (numbers,) = re.findall(r"\\begin\{tabular\}\{(?:l|p\{0\.3\\linewidth\})(r*)\}", text)
    assert widths == {len(numbers)}
    assert text.index(r"\caption{") < text.index(r"\label{tab:x}") < text.index(r"\begin{tabular}")
    assert f"n = {made.reports[0].rows[1].contrast.images:,} test images" in text
    assert text.count("{") == text.count("}")


def test_a_long_name_in_latex_is_broken_and_not_beyond_the_page():
    short, long = (latex.booktabs(["arm", "top-1"], [[name, "1"]], "", "x") for name in ("copy", "a long name " * 6))
    assert r"\begin{tabular}{lr}" in short
    assert r"\begin{tabular}{p{0.3\linewidth}r}" in long


def test_headings_of_many_columns_are_stacked_in_latex():
    head = ["arm", "top-1 %", "points vs scratch [95 %]", "p, Holm", "JSD", "seeds"]
    wide, usual = (latex.booktabs(names, [["copy"] * len(names)], "", "x") for names in (head, head[:5]))
    assert r"arm & \shortstack[r]{top-1\\\%} & \shortstack[r]{points vs\\scratch {[}95 \%{]}}" in wide
    assert r"arm & top-1 \% & points vs scratch {[}95 \%{]} & p, Holm & JSD \\" in usual


def test_texts_in_latex():
    assert latex.escaped('<.001 a_b 5 % [x] c:\\d {e} ~ ^ # $ & | "f"') == (
        r"$<$.001 a\_b 5 \% {[}x{]} c:\textbackslash{}d \{e\} \textasciitilde{} \textasciicircum{} \# \$ \& $|$ ''f''"
    )
    assert latex.escaped("caf\u00e9 \u00b1 \u2212 \u4e2d") == r"cafe $\pm$ $-$ U+4E2D"
