"""The grid of whose maps and from where the student starts."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ablations.benchmark import benchmark
from ablations.grid import grid, untrained
from atdiag.core import paths
from atdiag.core.errors import UserError
from atdiag.core.runs import Store, file_sha256
from atdiag.core.spec import RunSpec
from atdiag.networks.model import students
from atdiag.networks.weights import loading
from atdiag.study.judging import judge_claim
from atdiag.study.protocol import BASELINE
from atdiag.training.trial import trial
from tests.studies import arms, differences, fabricated, lab

BEST = "pre-trained maps, random start"


def test_cells_differ_only_in_maps_and_start():
    study = grid(lab(), "deit_s", others="dinov2_s")
    made = arms(study)
    rows = ("pre-trained", "dinov2_s", "untrained")
    assert list(made) == [
        BASELINE,
        *(f"{row} maps, random start" for row in rows),
        *(f"{row} maps, pre-trained start" for row in ("no", *rows)),
    ]
    usual = arms(benchmark(lab(), "deit_s", "copy,finetune"))
    assert made[BEST] == usual["copy"]
    assert made["no maps, pre-trained start"] == usual["finetune"]
    assert differences(study, BEST, "untrained maps, random start") == {"teacher"}
    assert differences(study, BEST, "dinov2_s maps, random start") == {"teacher"}
    own, other = (f"{row} maps, pre-trained start" for row in ("pre-trained", "dinov2_s"))
    assert made[own].start is None  # it is the teacher's
    assert made[other].start == made[own].teacher
    recipes = {spec.recipe for name, spec in made.items() if name.endswith("pre-trained start")}
    assert recipes == {usual["finetune"].recipe}
    assert len({spec.id for spec in study.specs}) == len(study.specs)


def test_a_start_is_hashed_by_its_weights_and_not_where_nothing_starts_from_it():
    made = arms(grid(lab(), "deit_s", others="dinov2_s"))
    one = made["dinov2_s maps, pre-trained start"]
    document = one.model_dump()

    def like(**changes) -> RunSpec:
        return RunSpec.model_validate({**document, **changes})

    renamed = one.start.model_copy(update={"name": "deit_s@elsewhere", "profile": "own"})
    assert like(start=renamed).id == one.id
    assert like(start=one.start.model_copy(update={"sha256": "0" * 64})).id != one.id
    assert like(start=None).id != one.id
    assert like(start=one.teacher).start is None
    assert like(init={"source": "scratch"}).start is None
    untaught = like(transfer={"method": "none"})
    assert (untaught.teacher, untaught.start) == (one.start, None)
    assert RunSpec.model_validate_json(one.model_dump_json()) == one
    with pytest.raises(ValueError, match="starts from its teacher needs the teacher's width"):
        wide = made[BASELINE].network.model_validate({**one.network.model_dump(), "width": 64})
        like(start=one.start.model_copy(update={"network": wide}))


def test_an_untrained_teacher_is_drawn_and_is_not_a_student_of_any_seed():
    source = lab().teacher("deit_s")
    drawn = loading.load(untrained(source))
    again = loading.load(untrained(lab().teacher("deit_s"))).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in drawn.state_dict().items())
    assert not any(parameter.requires_grad for parameter in drawn.parameters())
    trained = loading.load(source).state_dict()
    weight = "blocks.3.attn.qkv.weight"
    assert not torch.equal(drawn.state_dict()[weight], trained[weight])
    for seed in range(3):
        assert not torch.equal(drawn.state_dict()[weight], students.build(source.network, seed).state_dict()[weight])


def test_a_student_starts_from_one_network_and_copies_another():
    """One step of each kind: logits of the start's weights under the teacher's maps."""
    made = arms(grid(lab(), "deit_s", others="dinov2_s"))
    trial(list(made.values()), loading.load)


def test_a_fine_tuned_run_is_a_row_of_its_own(tmp_path):
    """`--others run:ID`: the paper's fine-tuned teacher, whose maps both kinds of student are given."""
    store = Store(tmp_path / "runs")
    paths.runs_are_in(store.root)
    tuned = store.create(arms(benchmark(lab(), "deit_s", "finetune"))["finetune"])
    save_file(students.build(tuned.spec.network, 7).state_dict(), tuned.weights)
    tuned.finish({"top1": 50.0, "start": None})
    row = f"run:{tuned.id}"
    made = arms(grid(lab(), "deit_s", others=row))
    source = made[BEST].teacher
    both = [made[f"{row} maps, {start} start"] for start in ("random", "pre-trained")]
    assert {one.teacher.sha256 for one in both} == {file_sha256(tuned.weights)} != {source.sha256}
    assert both[1].start == source
    given = loading.load(both[0].teacher).state_dict()
    assert all(torch.equal(value, given[name]) for name, value in load_file(tuned.weights).items())
    trial(both, loading.load)
    with pytest.raises(UserError, match="0000"):
        grid(lab(), "deit_s", others="run:0000")


@pytest.mark.parametrize(("value", "said"), [(4.0, "holds"), (-4.0, "does not hold"), (0.5, "undecided")])
def test_the_claims_follow_from_their_contrasts(value, said):
    study = grid(lab(), "deit_s", others="dinov2_s")
    maps = [one.name for one in study.contrasts if one.name.startswith("pre-trained minus untrained")]
    best = [one.name for one in study.contrasts if one.name.startswith(BEST)]
    assert len(maps) == 2
    assert len(best) == len(study.arms) - 2  # all but the baseline and itself
    for claim, which in zip(study.claims, (maps, best), strict=True):
        values = [value if one.name in which else 9.0 for one in study.contrasts]
        report = fabricated(study, [9.0] * (len(study.arms) - 1), values)
        assert judge_claim(claim, [report]).verdict == said


def test_the_verdict_names_what_decides():
    study = grid(lab(), "deit_s")
    report = fabricated(study, [20.0, 1.0, 15.0, 18.0, 3.0], [19.0, 0.2, 19.0, 5.0, 2.0, 17.0])
    said = study.verdict(report)
    assert said.startswith("maps of deit_s (mini) instead of untrained ones, random start, help (+19.0")
    assert "pre-trained start, can't be told from noise" in said
    assert f"The highest of all cells is {BEST} (70.0 %), chosen after the fact." in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"others": "deit_s"}, "`others` deit_s is `teacher` itself"),
        ({"others": "dino_x"}, "dino_x"),
        ({"transfer": "finetune"}, "`transfer` 'finetune'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        grid(lab(), "deit_s", **options)
