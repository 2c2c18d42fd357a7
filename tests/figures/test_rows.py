"""How studies are grouped in figures that compare many."""

from ablations.benchmark import benchmark
from figures import rows
from tests.studies import fabricated, lab


def test_specimens_are_a_group_of_their_own():
    reports = [fabricated(benchmark(lab(), name, "copy"), [1.0]) for name in ("deit_s", "shuffled", "sharp")]
    groups = {title: [one.study.label for one in members] for title, members in rows.families(reports).items()}
    assert groups == {"DeiT": ["deit_s (mini)"], "specimens": ["shuffled (specimen)", "sharp (specimen)"]}
