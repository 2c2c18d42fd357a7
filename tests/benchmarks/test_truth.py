"""The truth table names only what there is."""

from ablations import found
from atdiag.networks.registry import teachers
from atdiag.networks.registry.specimens import specimens
from benchmarks import truth


def test_it_names_existing_specimens_commands_and_verdicts():
    for one in truth.TRUTH:
        assert one.specimen in specimens() or one.specimen in truth.HEALTHY
        assert one.command in truth.COMMANDS
        assert one.verdict in truth.VERDICTS
        assert one.because
    assert set(truth.HEALTHY) <= set(teachers.miniatures())
    assert len({(one.specimen, one.command) for one in truth.TRUTH}) == len(truth.TRUTH)


def test_every_kind_has_a_truth_and_at_most_one_denominator():
    groups = [truth.DETECTION, truth.ACCUSATION, truth.DESCRIPTIVE]
    kinds = {kind for group in groups for kind in group} - {"hub decoys"}
    made = {one.kind for one in specimens().values()}
    assert kinds == {one.specimen for one in truth.TRUTH} == {*made, *truth.HEALTHY}
    assert sum(map(len, groups)) == len({kind for group in groups for kind in group})
    assert {*truth.SET_ASIDE} <= kinds
    assert len(truth.DETECTION) * truth.STUDIES == len(truth.ACCUSATION) * truth.STUDIES == 84


def test_only_components_that_a_specimen_has_and_that_are_no_decoys_are_named():
    for one in truth.TRUTH:
        if one.command == truth.RESCUE and one.specimen in specimens():
            assert not any(decoy in one.verdict for decoy in specimens()[one.specimen].decoys)


def test_what_counts_as_an_accusation():
    assert truth.accuses("deit_s", truth.COPY, found.FAILS)
    assert truth.accuses("clip_b", truth.RESCUE, found.fails_by("pre_norm"))
    assert not truth.accuses("deit_s", truth.COPY, found.UNDECIDED)
    assert not truth.accuses("hub", truth.COPY, found.FAILS)
    assert truth.accuses("hub decoys", truth.RESCUE, found.fails_by("registers", "layer_scale"))
    assert not truth.accuses("hub decoys", truth.RESCUE, found.fails_by("registers"))
