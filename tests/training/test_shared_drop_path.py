"""A teacher that drops its student's residual branches (``transfer.shared_drop_path``)."""

import pytest
import torch

from atdiag.core.spec import Init, RunSpec, Transfer
from atdiag.training.branches import branch_factors, teacher_factors
from tests.training.conftest import NATIVE, NETWORK, RECIPE, TEACHER

HALF = RECIPE.model_copy(update={"drop_path": 0.5, "epochs": 1, "mixup": 0.0, "cutmix": 0.0})
EVERY = tuple(range(NETWORK.depth))


def distill(**fields):
    return Transfer(method="distill", layers=EVERY, shared_drop_path=True, **fields)


def whole(transfer):
    return transfer.model_copy(update={"shared_drop_path": False})


@pytest.mark.parametrize("method", ["distill", "features"])
def test_a_student_with_its_teachers_weights_differs_by_nothing_where_both_drop_the_same(bench, method):
    """At the only step of an epoch a student is its teacher: the loss besides the task's vanishes, if shared."""
    # Of cross-entropy the excess over the teacher's own entropy, its divergence, is what vanishes.
    name = {"distill": "kl", "features": "transfer_loss"}[method]
    once = HALF.model_copy(update={"batch_size": 85})
    transfer = Transfer(method=method, layers=EVERY, shared_drop_path=True)
    together = bench.spec(recipe=once, network=NATIVE, init=Init(source="teacher"), transfer=transfer)
    apart = together.model_copy(update={"transfer": whole(transfer)})
    bench.train(together, apart)
    (shared,), (unshared,) = bench.run(together).progress(), bench.run(apart).progress()
    assert shared["step"] == 1
    assert abs(shared[name]) < 1e-5
    assert unshared[name] > 1e-3


def test_in_company_and_alone_it_ends_with_the_same_weights(bench, assert_same):
    """Two seeds drop different branches; a third run's teacher is whole; micro-batches see their own images."""
    one = bench.spec(recipe=HALF, transfer=distill())
    other = bench.spec(recipe=HALF, transfer=distill(), model_seed=1)
    plain = one.model_copy(update={"transfer": whole(one.transfer)})
    copy = bench.spec(recipe=HALF, transfer=Transfer(method="copy", layers=EVERY, shared_drop_path=True))
    assert set(bench.train(one, other, plain, copy).values()) == {"finished"}
    for spec in (one, other, plain, copy):
        alone = bench.sibling(f"alone-{spec.id}")
        alone.train(spec)
        assert_same(alone, bench, spec)
    parts = bench.sibling("parts")
    parts.train(one, micro_batch=5)
    left, right = bench.weights(one), parts.weights(one)
    assert all(torch.allclose(left[name], right[name], atol=2e-3) for name in left)


def test_the_teachers_factors_are_the_students_without_its_warm_up(bench):
    samples = torch.arange(16).numpy()
    recipe = HALF.model_copy(update={"branch_warmup": 0.5})
    spec = bench.spec(recipe=recipe, transfer=distill())
    theirs = teacher_factors(spec, 3, samples)
    assert torch.equal(theirs, branch_factors(bench.spec(recipe=HALF, transfer=distill()), 3, 10, samples))
    assert (theirs == 0).any()
    own = branch_factors(spec, 3, 10, samples)
    assert torch.equal(own[:, 1], theirs[:, 1]) and torch.equal(own[:, 0], theirs[:, 0] * (3 / 5))
    assert teacher_factors(bench.spec(recipe=HALF, transfer=whole(distill())), 3, samples) is None


def test_it_is_no_other_run_where_no_branch_is_dropped(bench):
    never = RECIPE.model_copy(update={"drop_path": 0.0})
    assert bench.spec(recipe=never, transfer=distill()) == bench.spec(recipe=never, transfer=whole(distill()))
    assert bench.spec(transfer=distill()).id != bench.spec(transfer=whole(distill())).id
    assert bench.spec(transfer=Transfer(method="none", shared_drop_path=True)).transfer == Transfer()


def test_a_teacher_without_the_students_branches_is_refused(bench):
    def spec(**network):
        teacher = {**TEACHER.model_dump(), "network": {**NETWORK.model_dump(), **network}}
        return {**bench.spec(transfer=distill()).model_dump(), "teacher": teacher}

    RunSpec.model_validate(spec())
    shallow = spec(depth=5)
    shallow["transfer"] |= {"layers": (0, 1), "teacher_layers": (0, 1)}
    with pytest.raises(ValueError, match="the teacher has 5 blocks, the student 6, so they have different branches"):
        RunSpec.model_validate(shallow)
    with pytest.raises(ValueError, match="no branch can be dropped in a teacher with conv"):
        RunSpec.model_validate(spec(differences=("conv",)))
