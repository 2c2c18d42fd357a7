"""A table in LaTeX, for a paper."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

_LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    '"': "''",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "\u2212": "$-$",
    "\u00b1": "$\\pm$",
    "\u00d7": "$\\times$",
    "\u2013": "--",
    "\u2014": "---",
    "\u00a0": "~",
    "[": "{[}",
    "]": "{]}",
}
"""Characters that are special in LaTeX, or that its default font encoding OT1 lacks (``<`` would print as an inverted
exclamation mark). A bracket after a line break would be read as an argument."""


def escaped(text: str) -> str:
    """Escape a text for LaTeX with OT1 fonts, in ASCII: accents are dropped, other characters written as U+4E2D.

    >>> escaped("a_b <.001 [1]")
    'a\\\\_b $<$.001 {[}1{]}'
    """
    out = []
    for char in text:
        plain = _LATEX.get(char) or "".join(c for c in unicodedata.normalize("NFKD", char) if c.isascii())
        out.append(plain or f"U+{ord(char):04X}")
    return "".join(out)


_LONG = 36
"""Characters of a name that is broken in LaTeX: a longer one would push the table beyond the page."""


_USUAL = 5
"""Columns beyond which headings are stacked."""


def _stacked(heading: str) -> str:
    """Return a heading in two lines, split at the space nearest its middle."""
    spaces = [i for i, char in enumerate(heading) if char == " "]
    if not spaces:
        return escaped(heading)
    at = min(spaces, key=lambda i: abs(2 * i - len(heading)))
    return rf"\shortstack[r]{{{escaped(heading[:at])}\\{escaped(heading[at + 1 :])}}}"


def booktabs(
    head: Sequence[str], body: Sequence[Sequence[str]], caption: str, label: str, columns: str | None = None
) -> str:
    """Return a LaTeX table with its caption above, and the rules of the package booktabs; texts are escaped.

    columns: alignment; by default the first left, wrapped if a name is long, the others right. The type is small,
    and of more than ``_USUAL`` columns smaller, with stacked headings, so that the table fits the text of an article.
    """
    if columns is None:
        longest = max(len(cells[0]) for cells in (head, *body))
        columns = (r"p{0.3\linewidth}" if longest > _LONG else "l") + "r" * (len(head) - 1)
    many = len(head) > _USUAL
    size, gap = ("footnotesize", 2) if many else ("small", 4)
    heading = [_stacked(name) if many else escaped(name) for name in head]
    lines = [" & ".join(cells) + r" \\" for cells in (heading, *([escaped(cell) for cell in row] for row in body))]
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            rf"\centering\{size}\setlength{{\tabcolsep}}{{{gap}pt}}",
            rf"\caption{{{escaped(caption)}}}",
            rf"\label{{{label}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )
