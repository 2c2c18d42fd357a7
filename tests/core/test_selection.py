"""Blocks and heads as typed on the command line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atdiag.core.errors import UserError
from atdiag.core.selection import choose, comma_separated, indices, ranges


@given(st.sets(st.integers(0, 11), min_size=1))
def test_a_list_names_its_members(chosen):
    assert indices(",".join(map(str, chosen)), 12, "x") == tuple(sorted(chosen))
    assert indices(ranges(sorted(chosen)), 12, "x") == tuple(sorted(chosen))


@given(st.integers(1, 40), st.data())
def test_ends_and_ranges(count, data):
    k = data.draw(st.integers(1, count))
    assert indices(f"top:{k}", count, "x") == indices(f" last : {k}", count, "x") == tuple(range(count - k, count))
    assert indices(f"bottom:{k}", count, "x") == indices(f"0-{k - 1}", count, "x") == tuple(range(k))
    assert indices(None, count, "x") == tuple(range(count))
    assert indices(k - 1, count, "x") == (k - 1,)


def test_consecutive_numbers_are_shown_as_a_range():
    assert ranges((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8"
    assert ranges((4,)) == "4" and ranges(()) == "" and ranges((2, 1)) == "2,1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tpo:3", "unknown word 'tpo', did you mean 'top'"),
        ("top:13", "there are only 12: give a number from 1 to 12"),
        ("top:0", "give a number from 1 to 12"),
        ("3,x", "'x' is neither a number nor a range: write it as '3,5,7-9'"),
        ("", "neither a number nor a range"),
        ("5-3", "runs backwards: write it as '3-5'"),
        ("12", "12 is out of range: give numbers from 0 to 11"),
        ("-1", "neither a number nor a range"),
    ],
)
def test_errors_name_the_problem(text, message):
    with pytest.raises(UserError) as fault:
        indices(text, 12, "transfer.layers")
    assert message in str(fault.value) and str(fault.value).startswith(f"`transfer.layers`={text}: ")


def test_an_unknown_name_gets_the_nearest_as_suggestion():
    assert choose("copy", ("copy", "distill"), "transfer") == "copy"
    with pytest.raises(UserError, match=r"'cpoy'.*did you mean 'copy'.*copy, distill"):
        choose("cpoy", ("copy", "distill"), "transfer")


def test_a_list_is_split_without_repetition_and_an_empty_one_refused():
    assert comma_separated(" a, b ,a,", "on", "a,b") == ("a", "b")
    for nothing in ("", " , "):
        with pytest.raises(UserError, match="a,b"):
            comma_separated(nothing, "on", "a,b")
