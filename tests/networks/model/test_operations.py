"""What specimens are derived by is mathematics."""

import numpy as np
import pytest
import torch

from atdiag.core.spec import Operation, Transfer
from atdiag.data import scenes
from atdiag.networks.model import operations, students
from atdiag.networks.registry import teachers
from atdiag.networks.registry.specimens import specimens
from atdiag.networks.weights import loading, sources
from atdiag.transfer import methods, ops
from atdiag.transfer.observation import CaptureRequest, Observation

ALL = tuple(range(12))
DERIVED = [name for name, one in specimens().items() if one.operation is not None and one.file.exists()]
ITSELF = [name for name in DERIVED if specimens()[name].operation.name != "sliced"]
SCENES = scenes.train_scenes("digits", 6, 5, 6)
IMAGES = torch.from_numpy(SCENES.images).float() / 255


def base(name="dinov2_s"):
    """What is loaded from a teacher's file, with nothing done to it."""
    return loading.load(teachers.teacher(name, "mini").model_copy(update={"operation": None}))


def done(whose="dinov2_s", **fields):
    return operations.apply(base(whose), Operation(**fields))


@pytest.mark.parametrize("name", ["dinov2_s", "beitv2_b"])
def test_sharp_multiplies_the_logits_by_eight_exactly(name):
    """Bit for bit: 8 is a power of two. In the first block, whose input is the same."""
    before = ops.logits(base(name).maps(IMAGES, [0])[0])
    after = ops.logits(done(name, name="sharp", layers=ALL, factor=8.0).maps(IMAGES, [0])[0])
    assert torch.equal(after, 8 * before)


def test_sharp_changes_no_other_block():
    one, other = base(), done(name="sharp", layers=(11,), factor=8.0)
    for layer, qk in one.maps(IMAGES, range(11)).items():
        assert torch.equal(ops.logits(qk), ops.logits(other.maps(IMAGES, [layer])[layer]))
    assert torch.equal(8 * ops.logits(one.maps(IMAGES, [11])[11]), ops.logits(other.maps(IMAGES, [11])[11]))


def test_uniform_maps_are_one_over_n():
    vit = done("deit_s", name="uniform", layers=ALL)
    for qk in vit.maps(IMAGES, ALL).values():
        assert torch.equal(ops.probabilities(qk), torch.full((6, 2, 26, 26), 1 / 26))
    with pytest.raises(ValueError, match="relative position bias"):
        done("beitv2_b", name="uniform", layers=ALL)


def test_uniform_and_shuffled_leave_the_weights():
    own = base("deit_s").state_dict()
    for fields in ({"name": "uniform", "layers": ALL}, {"name": "shuffled", "seed": 3}):
        state = done("deit_s", **fields).state_dict()
        assert state.keys() == own.keys()
        assert all(torch.equal(state[name], own[name]) for name in own)


def test_shuffled_gives_the_maps_of_the_stated_other_image():
    vit, plain = done("deit_s", name="shuffled", seed=3), base("deit_s")
    pool = scenes.train_scenes("digits", operations.POOL, 3, operations.POOL_CLUTTER).images
    others = vit.others(IMAGES)
    assert all((other.numpy() == pool / np.float32(255)).all((1, 2, 3)).any() for other in others)
    assert not any(torch.equal(one, other) for one, other in zip(IMAGES, others, strict=True))
    assert torch.equal(ops.logits(vit.maps(IMAGES, [7])[7]), ops.logits(plain.maps(others, [7])[7]))


def test_the_other_image_does_not_depend_on_company_and_does_on_the_seed():
    vit = done("deit_s", name="shuffled", seed=3)
    together = vit.others(IMAGES)
    assert torch.equal(torch.cat([vit.others(one[None]) for one in IMAGES]), together)
    assert torch.equal(done("deit_s", name="shuffled", seed=3).others(IMAGES), together)
    assert not torch.equal(done("deit_s", name="shuffled", seed=4).others(IMAGES), together)


def test_a_larger_embedding_before_pre_norm_changes_no_map():
    before, after = (vit.maps(IMAGES, ALL) for vit in (base("clip_b"), done("clip_b", name="scaled", factor=20.0)))
    for layer in ALL:
        torch.testing.assert_close(ops.probabilities(after[layer]), ops.probabilities(before[layer]), atol=2e-3, rtol=0)


REGISTERS = [1, 2, 3, 4]
OTHERS = [0, *range(5, 30)]


def test_sliced_maps_are_those_that_a_student_without_registers_is_given():
    own, shown = (vit.maps(IMAGES, ALL) for vit in (base("hub"), done("hub", name="sliced", layers=(0, 7))))
    for layer in ALL:
        p = ops.probabilities(shown[layer])
        if layer not in (0, 7):
            assert torch.equal(p, ops.probabilities(own[layer]))
            continue
        rest = ops.probabilities(own[layer])[:, :, OTHERS][..., OTHERS]
        assert (p[:, :, OTHERS][..., REGISTERS] == 0).all()
        torch.testing.assert_close(p[:, :, OTHERS][..., OTHERS], rest / rest.sum(-1, keepdim=True), atol=1e-5, rtol=0)
        torch.testing.assert_close(p[:, :, REGISTERS], ops.probabilities(own[layer])[:, :, REGISTERS])
        student = shown[layer].select(torch.tensor(OTHERS))
        torch.testing.assert_close(ops.probabilities(student), p[:, :, OTHERS][..., OTHERS], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="only the maps of a network with registers"):
        done("deit_s", name="sliced", layers=ALL)


def test_slicing_changes_what_is_shown_and_not_what_is_computed():
    assert torch.equal(done("hub", name="sliced", layers=ALL)(IMAGES), base("hub")(IMAGES))


def test_scrambling_shuts_the_branch_and_draws_queries_and_keys_by_the_seed():
    fields = {"name": "scrambled", "layers": (5,), "factor": 4.0, "gain": 0.01}
    one, again, other = (done(**fields, seed=seed) for seed in (0, 0, 1))
    own = base()
    torch.testing.assert_close(one.blocks[5].ls1.gamma, 0.01 * own.blocks[5].ls1.gamma)
    weights = [vit.blocks[5].attn.q_weight for vit in (one, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].abs().max() <= 4 * (6 / 64) ** 0.5  # Xavier-uniform of [32, 32], four times
    changed = {key for key, value in own.state_dict().items() if not torch.equal(value, one.state_dict()[key])}
    assert changed == {"blocks.5.ls1.gamma", "blocks.5.attn.qkv.weight", "blocks.5.attn.qkv.bias"}


@pytest.mark.parametrize(("module", "parts"), [("mlp", (".mlp.",)), ("qk", (".attn.qkv.",))])
def test_drawing_anew_changes_that_module_alone(module, parts):
    own, state = base("deit_s").state_dict(), done("deit_s", name="drawn_anew", layers=ALL, module=module, seed=0)
    changed = [key for key, value in state.state_dict().items() if not torch.equal(value, own[key])]
    assert len(changed) >= 12
    assert all(any(part in key for part in parts) for key in changed)
    values = [vit.blocks[3].attn.v_weight for vit in (base("deit_s"), state)]
    assert torch.equal(*values)


@pytest.mark.parametrize("name", DERIVED)
def test_the_original_stays_as_it_is(name):
    """The file, and what is loaded from it under its own name."""
    path = specimens()[name].file
    before, state = sources.fresh_sha256(path), base(path.stem).state_dict()
    found = teachers.teacher(name, "mini")
    assert found.sha256 == before
    loading.load(found)
    assert sources.fresh_sha256(path) == before
    assert all(torch.equal(value, state[key]) for key, value in base(path.stem).state_dict().items())


@pytest.mark.parametrize("name", ITSELF)
def test_a_copy_of_itself_is_itself(name):
    """The network under its own maps computes what it computes without: what is copied is what it uses.

    Not where its maps are shown sliced.
    """
    vit = loading.load(teachers.teacher(name, "mini"))
    seen = vit.observe(IMAGES, CaptureRequest(maps=frozenset(ALL), logits=True))
    copy = Transfer(method="copy", layers=ALL)
    logits = methods.forward_test(vit, copy, IMAGES, Observation(seen.seen))
    torch.testing.assert_close(logits, seen.logits, atol=1e-4, rtol=1e-4)


def test_a_student_starts_from_a_specimens_weights():
    from atdiag.core.spec import Init

    vit = loading.load(teachers.teacher("shuffled", "mini"))
    student = students.build(vit.network, 0)
    start = students.start_from(student, vit, Init(source="teacher", head=True))
    assert not start.dropped
    assert not start.fresh
    assert torch.equal(student(IMAGES), base("deit_s")(IMAGES))
