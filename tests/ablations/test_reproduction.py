"""All analyses as `atdiag reproduce` plans them, and the claims they are compared with."""

import tomllib
from functools import partial
from pathlib import Path

import pytest

from ablations import claims as paper
from ablations.reproduction import combinations
from atdiag.cli.experiments import spread
from atdiag.core.errors import UserError
from atdiag.networks.registry import teachers
from atdiag.study import registry
from atdiag.study.judging import judge_claim
from atdiag.study.protocol import Series
from tests.studies import fabricated, lab

PLACED = registry.placed()


ABLATIONS = {name: function for name, (function, _) in PLACED.items()}


def options(profile: str, quick: bool) -> dict:
    return {name: place.options(profile, quick) for name, (_, place) in PLACED.items()}


def test_the_claims_file_names_only_existing_things():
    """Every claim names known ablations and families, and matches contrasts that its ablation makes."""
    content = tomllib.loads((Path(paper.__file__).with_name("claims.toml")).read_text())
    families = {row.family for row in teachers.registry().values()}
    planned = {
        name: Series.join([spread(partial(ABLATIONS[name], **one), lab()) for one in combinations(chosen)])
        for name, chosen in options("mini", False).items()
    }
    for ablation in content.keys() - {"cost"}:  # no experiment: tests/ablations/test_cost.py
        series = planned[ablation]
        reports = [
            fabricated(
                study,
                [-9.0 if arm.name.startswith("standard + ") else 9.0 for arm in study.arms[1:]],
                [9.0] * len(study.contrasts),
            )
            for study in series.studies
        ]
        for claim in paper.of(ablation):
            assert claim in series.claims, f"{ablation} does not carry {claim.name}"
            assert set(claim.families) <= families
            assert claim.paper and claim.source and claim.text
            assert judge_claim(claim, reports).verdict != "not testable here", claim.name


def runs_of(profile_lab, quick: bool) -> dict[str, set[str]]:
    chosen = options("mini", quick)
    return {
        name: {
            s.id
            for one in combinations(chosen[name])
            for s in spread(partial(ABLATIONS[name], **one), profile_lab).specs
        }
        for name in chosen
    }


def test_quick_runs_are_a_subset_of_all_runs():
    some, every = runs_of(lab(seeds=3), True), runs_of(lab(seeds=3), False)
    assert list(some) == list(every) == list(ABLATIONS)
    for name in some:
        assert some[name] <= every[name], name
    count, whole = len(set.union(*some.values())), len(set.union(*every.values()))
    assert count < whole / 2
    # ood, match and recipes use the runs of other ablations
    assert every["ood"] | every["recipes"] | every["match"] <= every["benchmark"]


@pytest.mark.parametrize("profile", ["small", "paper"])
def test_all_analyses_can_be_planned_at_every_profile(profile):
    from atdiag.study.builder import Lab
    from atdiag.study.settings import resolve

    sets = ["data.image_size=126"] if profile == "small" else []
    at = Lab(resolve(profile=profile, sets=sets, environment={}, folder=Path("/nonexistent")))
    made = 0
    for name in ("epochs", "reinit", "layers", "rescue", "losses"):
        for one in combinations(options(profile, False)[name]):
            try:
                made += len(spread(partial(ABLATIONS[name], **one), at).specs)
            except UserError as fault:
                assert profile == "small", fault  # 126 px fit patches of 14 and no others
    assert made
