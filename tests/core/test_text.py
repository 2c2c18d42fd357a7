"""Human-readable numbers and names."""

import pytest

from atdiag.core import text


def test_sizes_in_bytes():
    assert (text.byte_size(400), text.byte_size(5_408), text.byte_size(12_345_678)) == ("0.4 kB", "5.4 kB", "12.3 MB")


@pytest.mark.parametrize(
    ("number", "what", "says"),
    [(0, "run", "0 runs"), (1, "run", "1 run"), (1, "process", "1 process"), (12_000, "process", "12,000 processes")],
)
def test_counted_nouns(number, what, says):
    assert text.count(number, what) == says


def test_long_lists_are_shortened_with_a_count():
    names = [f"n{i}" for i in range(7)]
    assert text.shortlist(names) == "n0, n1, n2, n3, n4 and 2 more"
    assert text.shortlist(names, most=7) == ", ".join(names)
    assert text.shortlist(iter(names), most=1) == "n0 and 6 more"
    assert text.shortlist(()) == "nothing"


@pytest.mark.parametrize(
    ("seconds", "says"),
    [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (5_399, "90 min"), (5_400, "1.5 h"), (172_799, "48.0 h")],
)
def test_durations(seconds, says):
    assert text.duration(seconds) == says


def test_long_durations_are_in_days():
    assert text.duration(172_800) == "2 days"
    assert text.duration(86_400 * 1_234) == "1,234 days"
