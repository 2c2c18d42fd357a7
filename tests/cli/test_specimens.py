"""Specimens on the command line."""

import json

import pytest

from atdiag.networks.registry.specimens import specimens
from tests.commands import ran

TOY = ["--set", "recipe.epochs=1", "--set", "data.train=32", "--set", "data.test_per_source=1", "--seeds", "1"]


def test_the_list(folder):
    code, out = ran("teachers", "--specimens")
    assert code == 0
    assert all(name in out for name in specimens())
    assert max(map(len, out.splitlines())) <= 80
    rows = json.loads(ran("teachers", "--specimens", "--json")[1].splitlines()[-1])
    assert [row["name"] for row in rows] == list(specimens())
    assert next(row for row in rows if row["name"] == "sharp")["operation"]["factor"] == 8.0
    assert ran("teachers", "--specimens", "--family", "clip")[0] == 2
    assert not any(name in ran("teachers")[1].split() for name in specimens())


def test_what_is_derived_is_not_pre_trained(folder, capsys):
    assert ran("pretrain", "shuffled")[0] == 2
    out = capsys.readouterr().err
    assert "shuffled is derived from deit_s when it is loaded: there is nothing to pre-train" in out


@pytest.mark.parametrize(
    "line",
    [
        ("rescue", "--teacher", "sharp"),
        ("reinit", "--teacher", "start_without_mlp"),
        ("layers", "--teacher", "uniform", "--from", "both"),
        ("benchmark", "--teacher", "gated,shuffled,clip_b"),
        ("epochs", "--teacher", "scaled"),
        ("datasets", "--teacher", "shuffled"),
        ("losses", "--teacher", "sharp"),
        ("match", "--teacher", "shuffled"),
        ("recipes", "--teacher", "weak"),
    ],
    ids=lambda line: line[0],
)
def test_every_experiment_takes_one_as_typed(folder, line):
    code, out = ran(*line, "--dry-run")
    assert code == 0, out
    assert "is a specimen, no published teacher" in out


@pytest.mark.slow
def test_no_claim_is_judged_by_a_specimen(folder):
    code, out = ran("benchmark", "--teacher", "shuffled", "--methods", "copy", *TOY, "--json", "--device", "cpu")
    assert code == 0, out
    document = json.loads(out.splitlines()[-1])
    assert document["claims"] == []
    assert "shuffled (specimen)" in out
    assert "no claim of a paper is judged by it" in " ".join(out.split())


def test_no_analysis_of_reproduce_has_a_specimen(folder):
    out = ran("reproduce", "--dry-run", "--json")[1]
    assert "specimen" not in out
