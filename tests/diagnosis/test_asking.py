"""The order of the questions, on made-up answers whose truth is known."""

import dataclasses

import numpy as np
import pytest

from atdiag.diagnosis.asking import ask
from atdiag.diagnosis.hypotheses import Outline
from atdiag.stats.contrasts import Outcomes, estimate, one_sided
from atdiag.stats.sequential import looks
from atdiag.study.protocol import BASELINE, Footing
from benchmarks import diagnosis_errors
from benchmarks.diagnosis_errors import LOWER, NAMES, OUTLINE, UPPER, truth

IMAGES = 3000


class Answers:
    """Independent right and wrong answers with these accuracies in per cent; remembers what was asked."""

    def __init__(self, accuracies, seed=0, images=IMAGES):
        self.accuracies, self.seed, self.images = accuracies, seed, images
        self.asked: dict[str, set[int]] = {}

    def __call__(self, arms, seeds):
        for arm in arms:
            self.asked.setdefault(arm, set()).update(seeds)
        return {
            arm: Outcomes({n: self._right(arm, n) for n in seeds}, np.arange(self.images, dtype=np.int32))
            for arm in arms
        }

    def _right(self, arm, n):
        names = sorted(self.accuracies)
        rng = np.random.default_rng([self.seed, names.index(arm), n])
        return rng.random(self.images) < self.accuracies[arm] / 100


def trained(_):
    return Footing(chance=10, low=40, needed=20, classes=10)


def diagnose(accuracies, teacher=90.0, outline=OUTLINE, seeds=(5, 8, 12), footing=trained):
    answers = Answers(accuracies)
    return ask(outline, looks(seeds), answers, footing, teacher), answers


def test_a_transfer_that_helps_ends_at_the_first_look():
    found, answers = diagnose(truth(own=20))
    assert found.verdict == "transfers"
    assert found.causes == ()
    assert answers.asked == {arm: set(range(5)) for arm in OUTLINE.first}, "nothing else was trained"


@pytest.mark.parametrize(
    ("changed", "causes"),
    [
        ({"maps": 0.0}, {"the maps"}),
        ({"own": -12, "native": 10, "alone": 22}, {"the architecture", "component registers"}),
        ({"start_attention": -12}, {"the start (attention)"}),
        ({"start_MLPs": -12}, {"the start (MLPs)"}),
        ({"lower": -12}, {"blocks 0-5"}),
        ({"upper": -12}, {"blocks 6-11"}),
    ],
)
def test_a_single_fault_is_found_alone(changed, causes):
    found, _ = diagnose(truth(**changed))
    assert found.verdict == "fails"
    assert set(found.causes) == causes


def test_half_a_half_is_found():
    accuracies = truth(lower=-12)
    accuracies[NAMES.blocks(range(3))] = 60.0
    accuracies[NAMES.blocks(range(3, 6))] = 30.0
    assert set(diagnose(accuracies)[0].causes) == {"blocks 0-5", "blocks 3-5"}


def test_bisection_goes_on_to_a_single_block_and_stays_on_one_way():
    accuracies = truth(lower=0)
    for layers in (range(6), range(3, 6), range(4, 6), range(4, 5)):
        accuracies[NAMES.blocks(layers)] = 20.0
    found, answers = diagnose(accuracies)
    assert set(found.causes) == {"blocks 0-5", "blocks 3-5", "blocks 4-5", "block 4"}
    assert {arm for arm in answers.asked if "block" in arm} == {
        NAMES.blocks(range(*ends)) for ends in [(0, 6), (6, 12), (0, 3), (3, 6), (3, 4), (4, 6), (4, 5), (5, 6)]
    }


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6, 12, 24, 27])
def test_parts_of_the_blocks(depth):
    """Each part of two blocks or more is split; a single way asks about two parts at each step."""
    outline = Outline("copy", (), depth)
    parts = outline.parts
    assert [*parts.values()].count(range(depth)) == 0
    assert {n for part in parts.values() if len(part) == 1 for n in part} == ({*range(depth)} if depth > 1 else set())
    assert {*outline.longest_way} <= {*parts} <= {*outline.hypotheses}
    assert len(outline.longest_way) == 2 * int(np.ceil(np.log2(depth)))


def test_components_are_trained_only_once_the_architecture_is_accused():
    _, answers = diagnose(truth())
    assert not set(NAMES.singles) & set(answers.asked)
    _, answers = diagnose(truth(own=-12, native=10, alone=22))
    assert set(NAMES.singles) <= set(answers.asked)


def test_the_sufficient_set_is_confirmed_on_seeds_that_chose_nothing():
    found, answers = diagnose(truth(own=-12, native=10, alone=22))
    enough = found.sufficient
    assert enough is not None
    assert enough.components == ("registers",)
    assert enough.confirmed
    assert set(enough.dropped) == {"layer_scale", "quick_gelu"}
    assert [*enough.seeds] == [5, 6, 7, 8, 9]
    without = NAMES.given(["layer_scale", "quick_gelu"])
    assert answers.asked[without] == set(range(5)), "the choice saw only the seeds of the look"


def test_components_that_only_help_together_are_all_kept():
    accuracies = truth(own=-12, native=10)
    for left_out in OUTLINE.components:
        accuracies[NAMES.given(c for c in OUTLINE.components if c != left_out)] = 38.0
    found, _ = diagnose(accuracies)
    assert found.sufficient is not None
    assert found.sufficient.components == OUTLINE.components
    assert found.sufficient.against_native is None


def test_components_each_of_which_is_enough_leave_one():
    accuracies = truth(own=-12, native=10)
    accuracies |= dict.fromkeys(NAMES.singles, 60.0)
    found, _ = diagnose(accuracies)
    assert found.sufficient is not None
    assert len(found.sufficient.components) == 1
    assert found.sufficient.confirmed


def test_a_weak_teacher_is_a_gate_and_no_accusation():
    found, answers = diagnose(truth(own=-12, native=10), teacher=45.0)
    assert found.verdict == "weak teacher"
    assert found.causes == ()
    assert NAMES.native not in answers.asked
    assert diagnose(truth(own=20), teacher=45.0)[0].verdict == "transfers", "what helps needs no strong teacher"


def test_an_undertrained_baseline_ends_it():
    near = Footing(chance=10, low=12, needed=20, classes=10)
    found, answers = diagnose(truth(own=20), footing=lambda _: near)
    assert found.verdict == "undertrained"
    assert set(answers.asked) == set(OUTLINE.first)


def test_nothing_anywhere_is_no_difference_and_only_after_the_last_look():
    found, _ = diagnose(truth())
    assert found.verdict == "no difference"
    assert [one.look.seeds for one in found.looks] == [5, 8, 12]
    states = {one.hypothesis.name: one.state for one in found.last.findings}
    assert states["the architecture"] == states["the maps"] == "cleared"


def test_a_wide_interval_is_undecided_and_clears_nobody():
    answers = Answers(truth(maps=4), images=40)
    found = ask(OUTLINE, looks((3,)), answers, trained, 90.0)
    assert found.verdict == "undecided"
    assert {one.state for one in found.last.findings} == {"not accused"}


def test_a_failure_without_a_cause_is_said_after_the_last_look():
    found, _ = diagnose(truth(own=-12, native=-12))
    assert (found.verdict, found.causes) == ("fails", ())
    assert len(found.looks) == 3


def test_two_seeds_decide_nothing():
    found, _ = diagnose(truth(own=-30, native=10, maps=0), seeds=(2,))
    assert found.verdict == "undecided"
    assert all(one.p == 1 for one in found.last.findings)


def test_a_hypothesis_of_two_parts_needs_both():
    """The lower half is worse than the upper one, but hurts nobody: it is not accused."""
    found, _ = diagnose(truth(lower=0, upper=15))
    assert found.causes == ()
    (finding,) = [one for one in found.last.findings if one.hypothesis.name == "blocks 0-5"]
    answers = Answers(truth(lower=0, upper=15))([LOWER, UPPER, BASELINE], range(12))
    better = estimate(answers, {UPPER: 1, LOWER: -1})
    worse = estimate(answers, {LOWER: 1, BASELINE: -1})
    assert finding.p == max(one_sided(better, "above"), one_sided(worse, "below"))


def test_the_loss_is_accused_where_copying_helps_and_weight_hurts():
    outline = dataclasses.replace(OUTLINE, transfer="distill", components=())
    names = outline.names
    accuracies = truth() | {"standard + copy": 70.0, "standard + distill": 50.0, names.averaged: 30.0}
    accuracies |= {names.weighted(10): 30.0, names.weighted(0.1): 50.0}
    accuracies |= {names.blocks(half): 50.0 for half in outline.halves}
    found, _ = diagnose(accuracies, outline=outline)
    assert set(found.causes) == {"the loss"}
    found, _ = diagnose(accuracies | {"standard + copy": 45.0}, outline=outline)
    assert found.causes == (), "where copying fails too, the loss explains nothing"


@pytest.mark.parametrize("depth", [1, 2, 3, 12, 13])
@pytest.mark.parametrize("components", [(), ("registers",), ("registers", "layer_scale")])
@pytest.mark.parametrize("transfer", ["copy", "distill"])
@pytest.mark.parametrize("start", [True, False])
def test_shares_of_a_level_add_up(depth, components, transfer, start):
    outline = Outline(transfer, components, depth, start=start)
    graph = outline.graph
    assert sum(graph.shares.values()) == pytest.approx(1)
    assert all(sum(out.values()) == pytest.approx(1) for out in graph.edges.values() if out)
    assert set(graph.shares) == set(outline.hypotheses)
    assert not any(graph.shares[one.name] for some in outline.follow_ups.values() for one in some)
    rejected = graph.rejected(dict.fromkeys(outline.hypotheses, 0.0), 0.01)
    assert set(rejected) == set(outline.hypotheses), "every question can be reached"


@pytest.mark.slow
def test_false_accusations_keep_their_rate():
    settings = ("no effect of anything", "maps worth just the margin", "halves that hurt alike")
    like = diagnosis_errors.population()
    for title in settings:
        found = diagnosis_errors.studies(diagnosis_errors.SETTINGS[title], like, 200, title)
        assert found["met"], (title, found)
