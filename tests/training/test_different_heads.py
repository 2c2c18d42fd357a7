"""Students that take the teacher's most different heads, other ones in each block."""

import torch

from atdiag.core.spec import Network, Teacher, Transfer
from atdiag.networks.model import students
from atdiag.training import evaluation
from atdiag.transfer import ops, sizes
from atdiag.transfer.observation import CaptureRequest
from tests.training.conftest import NETWORK, RECIPE, load_teacher

SHORT = RECIPE.model_copy(update={"epochs": 1, "weight_decay": 0.0})
NARROW = Network.model_validate({**NETWORK.model_dump(), "width": 24, "depth": 4, "heads": 3})
TEACHER = Teacher(name="narrow", profile="own", network=NARROW, sha256="1" * 64)


def narrow(bench, method, count):
    one = bench.spec(recipe=SHORT, network=NARROW)
    passed = Transfer(method=method, layers=range(4), different_heads=count)
    return type(one).model_validate({**one.model_dump(), "teacher": TEACHER, "transfer": passed})


def test_the_chosen_heads_pass_and_the_others_are_trained_freely(bench, assert_same, monkeypatch):
    """Alone and in company they end with the same weights, and finished runs keep the choice."""
    copy, distill = narrow(bench, "copy", 1), narrow(bench, "distill", 2)
    assert set(bench.train(copy, distill).values()) == {"finished"}
    alone = bench.sibling("alone")
    alone.train(copy)
    assert_same(alone, bench, copy)

    chosen = evaluation.chosen_heads(copy, load_teacher(copy.teacher))
    result = bench.run(copy).result()
    assert result["teacher_heads"] == {str(block): list(heads) for block, heads in chosen.items()}
    assert len(set(chosen.values())) > 1  # block by block
    assert all(len(heads) == 2 for heads in bench.run(distill).result()["teacher_heads"].values())

    start, end = students.build(NARROW, 0).state_dict(), bench.weights(copy)
    for block, (head,) in chosen.items():
        key = f"blocks.{block}.attn.qkv.weight"
        for part in (0, 1):  # q and k, by head
            moved = (end[key] - start[key])[24 * part : 24 * (part + 1)].abs().view(3, -1).amax(-1)
            assert moved[head] == 0  # it has no gradient, and no decay here
            assert (moved > 1e-4).sum() == 2

    monkeypatch.setattr(sizes, "head_divergence", None)  # read, not computed anew
    assert evaluation.load_subject(bench.run(copy), load_teacher).heads == chosen


def test_a_statistic_chooses_them(bench):
    spec = narrow(bench, "copy", 2)
    apart = torch.tensor([[0.0, 0.2, 0.5], [0.2, 0.0, 0.1], [0.5, 0.1, 0.0]])
    assert (sizes.most_different(apart, 1), sizes.most_different(apart, 2)) == ((0,), (0, 2))
    teacher = load_teacher(TEACHER)
    count = 0
    sums = dict.fromkeys(range(4), torch.zeros(3, 3, dtype=torch.float64))
    for pixels in evaluation._training_images(spec, teacher, None, evaluation.COMPARED_IMAGES):
        for block, seen in evaluation.show(teacher, pixels, CaptureRequest(maps=frozenset(range(4)))).seen.items():
            p = ops.logits(seen.qk).double().softmax(-1)
            one, other = p[:, :, None], p[:, None]
            m = (one + other) / 2
            kl = [(x * (x / m).log2()).sum(-1) for x in (one, other)]
            sums[block] = sums[block] + ((kl[0] + kl[1]) / 2).mean(-1).sum(0)
        count += len(pixels)
    assert count == 64
    expected = {block: sizes.most_different(total / count, 2) for block, total in sums.items()}
    assert evaluation.chosen_heads(spec, teacher) == expected
