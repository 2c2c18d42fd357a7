"""A diagnosis as one self-contained page: no request to any host, and everything from files and names escaped."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atdiag.core.text import listed
from atdiag.reports import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from atdiag.diagnosis.words import Advice, Said

BIBTEX = """\
@inproceedings{li2024attention,
  title = {On the Surprising Effectiveness of Attention Transfer for Vision Transformers},
  author = {Li, Alexander C. and Tian, Yuandong and Chen, Beidi and Pathak, Deepak and Chen, Xinlei},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  eprint = {2411.09702},
  archiveprefix = {arXiv}
}
@misc{qin2026attention,
  author = {Qin and others},
  year = {2026},
  eprint = {2605.07191},
  archiveprefix = {arXiv}
}
@article{bretz2009graphical,
  title = {A graphical approach to sequentially rejective multiple test procedures},
  author = {Bretz, Frank and Maurer, Willi and Brannath, Werner and Posch, Martin},
  journal = {Statistics in Medicine},
  volume = {28},
  number = {4},
  pages = {586--604},
  year = {2009}
}
"""


def page(
    document: Mapping[str, Any],
    said: Said,
    figure: Figure,
    typed: Callable[[Advice], str],
    spoken: Callable[[str], str] = str,
) -> str:
    """Return the page of a diagnosis.

    document: as :func:`atdiag.diagnosis.document.as_json` makes it. typed: formats an advice with its line to type.
    spoken: spells out the arguments named in texts.
    """
    from jinja2 import Environment, StrictUndefined

    source = Path(__file__).with_name("report.html.jinja").read_text()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(source).render(
        d=document,
        said=said,
        typed=typed,
        spoken=spoken,
        figure=svg(figure),
        effect=_effect,
        p=lambda value: "< .001" if value < 0.001 else f"{value:.3f}",
        methods=methods(document),
        bibtex=BIBTEX,
    )


def svg(figure: Figure) -> str:
    """Render a figure as an SVG element whose text is text; equal figures give equal text."""
    content = io.StringIO()
    with drawing.defaults():
        settings = drawing.import_matplotlib().rcParams
        settings.update({"svg.fonttype": "none", "svg.hashsalt": "atdiag"})
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    text = content.getvalue()
    return text[text.index("<svg") :]


def _effect(one: Mapping[str, Any]) -> str:
    return f"{one['points']:+.1f} [{one['ci_low']:+.1f}, {one['ci_high']:+.1f}]"


def methods(document: Mapping[str, Any]) -> str:
    """Return the methods as a paragraph that can be pasted into a paper."""
    plan = document["plan"]
    looks = listed(f"{one['seeds']} ({100 * one['level']:.2g} %)" for one in plan["looks"])
    taken = document["looks"][-1]["seeds"]
    asked = listed(one["name"] for one in plan["accusations"] if one["share_of_level"])
    return (
        f"We diagnosed attention {plan['transfer']} from {document['teacher']['label']} into a randomly initialised "
        f"standard ViT with atdiag (profile {plan['profile']}). All arms share data, recipe and seeds. Intervals are "
        f"95 %, over seeds and test images as crossed random factors. Looks were planned after {looks} seeds, and the "
        f"last one taken was after {taken}. At each look, accusations ({asked}) shared its level by a graph (Bretz et "
        "al. 2009), and levels add up over looks (Bonferroni), so that any false accusation has a probability of at "
        f"most 5 %. Effects within {plan['margin']:g} points were called none only by two one-sided 5 % tests. "
        "A set of components was chosen by non-inferiority and confirmed on seeds that were not used to choose it."
    )
