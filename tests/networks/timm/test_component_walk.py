"""Adding a native component that acts on q and k: this file alone adds q/k norm, from inspection to training."""

import copy

import pytest
import timm.layers
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from atdiag.core.runs import Store
from atdiag.core.spec import Data, Init, Recipe, RunSpec, Seed, Teacher, Transfer
from atdiag.data.loader import Stream
from atdiag.networks.model import components, students
from atdiag.networks.model.components import Component
from atdiag.networks.model.vit import ViT
from atdiag.networks.timm import conversion
from atdiag.networks.timm.wrapping import Foreign
from atdiag.training import evaluation, trainer
from atdiag.transfer import methods, ops
from atdiag.transfer.attention import Attention
from atdiag.transfer.observation import CaptureRequest, of_teacher

NAME = "qk_norm_test"
MEAN, STD = (0.2,), (0.3,)


# --- The component ----------------------------------------------------------------------------------------------------


class QKNorm(nn.Module):
    """A LayerNorm on the queries of each head, and one on its keys."""

    def __init__(self, network):
        super().__init__()
        for name in "qk":
            self.add_module(f"{name}_norm", nn.LayerNorm(network.width // network.heads, eps=network.norm_eps))

    def forward(self, x, name, heads):
        return self.get_submodule(f"{name}_norm")(x)


def found(model):
    def has(attn):
        if isinstance(attn, Attention):
            return NAME in attn.qk_hooks
        norms = (getattr(attn, name, None) for name in ("q_norm", "k_norm"))
        return all(isinstance(norm, nn.LayerNorm) for norm in norms)

    return all(has(getattr(block, "attn", None)) for block in model.blocks)


def attach(vit, network):
    for block in vit.blocks:
        block.attn.qk_hooks[NAME] = QKNorm(network)


COMPONENT = Component(
    NAME,
    "A LayerNorm on queries and keys, which bounds the logits and so keeps attention from saturating.",
    "Henry et al. 2020, Query-Key Normalization for Transformers; in this form Dehghani et al. 2023, ViT-22B",
    found,
    attach=attach,
    keys=components.renamed({f"attn.{q}_norm": f"attn.qk_hooks.{NAME}.{q}_norm" for q in "qk"}),
    explains=frozenset({"qk_norm"}),
    belongs_to_map=True,
    parameters=(f"qk_hooks.{NAME}.",),
)


# --- What comes of it -------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def without_the_packages_own(monkeypatch):
    """Take the package's component of this kind away: a user's own has its place."""
    monkeypatch.delitem(components.COMPONENTS, "qk_norm")


@pytest.fixture
def component():
    """The component, registered for one test."""
    components.register_component(COMPONENT)
    yield COMPONENT
    del components.COMPONENTS[NAME]


@pytest.fixture
def model():
    """Build timm's ViT with q/k norm, every parameter away from its initial value."""
    return timms()


def timms(**options):
    sizes = {"img_size": 20, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 24, "depth": 3}
    made = VisionTransformer(**sizes, num_heads=3, qk_norm=True, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made.eval().requires_grad_(False)


def normalised(images):
    return (images - MEAN[0]) / STD[0]


IMAGES = torch.rand(4, 1, 20, 20, generator=torch.Generator().manual_seed(1))


def test_without_the_component_the_teacher_is_foreign(model):
    assert conversion.describe(model, MEAN, STD).differences == ("qk_norm",)
    assert isinstance(conversion.teacher_from(model, MEAN, STD), Foreign)


def test_the_component_is_found_and_explains_the_difference(component, model):
    network = conversion.describe(model, MEAN, STD)
    assert network.components == (NAME,) and network.differences == ()
    plain = VisionTransformer(img_size=20, patch_size=4, in_chans=1, num_classes=10, embed_dim=24, depth=3, num_heads=3)
    assert conversion.describe(plain, MEAN, STD).components == ()


def test_what_the_component_does_not_explain_stays_a_difference(component, model):
    rms = timms(norm_layer=timm.layers.RmsNorm)
    assert "qk_norm" in conversion.describe(rms, MEAN, STD).differences
    model.blocks[1].attn.q_norm = model.blocks[1].attn.k_norm = nn.Identity()
    assert conversion.describe(model, MEAN, STD).differences == ("qk_norm", "uneven_blocks")


@torch.no_grad()
def test_the_teacher_is_converted_to_the_same_function(component, model):
    foreign = Foreign(copy.deepcopy(model), conversion.describe(model, MEAN, STD))
    ours = conversion.teacher_from(model, MEAN, STD)
    assert isinstance(ours, ViT)
    torch.testing.assert_close(ours(IMAGES), model(normalised(IMAGES)), rtol=1e-5, atol=1e-5)
    expected, maps = foreign.maps(IMAGES, range(3)), ours.maps(IMAGES, range(3))
    for layer in range(3):
        torch.testing.assert_close(maps[layer].q, expected[layer].q, rtol=1e-5, atol=1e-5)
        p = ops.probabilities(maps[layer])
        torch.testing.assert_close(p, ops.probabilities(expected[layer]), rtol=1e-5, atol=1e-6)
        assert p.std() > 1e-2  # not uniform
    assert conversion.describe(ours) == ours.network
    again = conversion.convert(ours, ours.network)
    assert torch.equal(again(IMAGES), ours(IMAGES))


def test_the_maps_are_what_nnsight_traces(component, model):
    nnsight = pytest.importorskip("nnsight")
    ours, traced = conversion.teacher_from(model, MEAN, STD), {}
    wrapped = nnsight.NNsight(model)
    with wrapped.trace(normalised(IMAGES)):
        for layer in range(3):
            traced[layer] = nnsight.save(wrapped.blocks[layer].attn.source.F_scaled_dot_product_attention_0.inputs)
    for layer, qk in ours.maps(IMAGES, range(3)).items():
        (q, k, _), _ = traced[layer]
        expected = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        torch.testing.assert_close(ops.probabilities(qk), expected, rtol=1e-5, atol=1e-6)


def test_a_native_student_learns_and_a_standard_one_takes_the_rest(component, model):
    teacher = conversion.teacher_from(model, MEAN, STD)
    student = students.build(teacher.network.student((NAME,)), 0)
    assert list(student.state_dict()) == list(teacher.state_dict())
    shown = teacher.observe(IMAGES, CaptureRequest(maps=frozenset(range(3))))
    logits, loss = methods.forward(student, Transfer(method="distill", layers=(0, 1, 2)), IMAGES, shown)
    (logits.logsumexp(1).mean() + loss).backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if NAME in name:
            assert parameter.grad.any(), name
    standard = students.build(teacher.network.student(), 0)
    start = students.start_from(standard, teacher, Init(source="teacher"))
    assert len(start.dropped) == 12 and all(NAME in name for name in start.dropped)


@pytest.mark.parametrize(("tensor", "unused"), [("map", "qk"), ("q", "q"), ("k", "k"), ("v", "")])
def test_under_copy_what_belongs_to_the_map_is_not_trained(component, model, tmp_path, tensor, unused):
    """Under the trainer itself: blocks 1 and 2 copy, and in block 0 the component is trained as usual."""
    teacher = conversion.teacher_from(model, MEAN, STD)
    transfer = Transfer(method="copy", layers=(1, 2), tensor=tensor)
    spec = RunSpec(
        network=teacher.network.student((NAME,)),
        teacher=Teacher(name="deit_s", profile="mini", network=teacher.network, sha256="0" * 64),
        transfer=transfer,
        data=Data(train=85, test_per_source=1),
        recipe=Recipe(epochs=1, batch_size=16),
        seed=Seed(data=0, model=0),
    )
    stream = Stream(spec.data, spec.recipe, spec.seed.data)
    run = Store(tmp_path / "runs").create(spec)
    training = trainer.RunTrainer(run, spec, teacher, {}, stream.steps_per_epoch, torch.device("cpu"))
    before = {name: value.clone() for name, value in training.student.named_parameters()}
    for step in range(2):
        batch = stream.batch(step).to(torch.device("cpu"))
        shown = evaluation.fit(teacher.observe(batch.images, of_teacher([transfer])), teacher, spec.network)
        training.advance(batch, shown)
    training.settle()
    assert training.cause is None
    optimised = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    names = [name for name, _ in training.student.named_parameters() if NAME in name]
    assert len(names) == 12
    for name, parameter in training.student.named_parameters():
        if NAME in name:
            still = name.startswith(("blocks.1.", "blocks.2.")) and name.split(".")[-2][0] in unused
            assert (id(parameter) in optimised) == (parameter in training.optimizer.state) == (not still), name
            assert torch.equal(parameter, before[name]) == still, name
            if still:
                assert parameter.grad is None, name
    if tensor == "map":  # and a copied map carries all that the component does
        student = training.student.eval()
        shown = teacher.observe(IMAGES, CaptureRequest(maps=frozenset(range(3))))
        whole = Transfer(method="copy", layers=(0, 1, 2))
        with torch.no_grad():
            out = methods.forward_test(student, whole, IMAGES, shown)
            for block in student.blocks:
                del block.attn.qk_hooks[NAME]
            assert torch.equal(methods.forward_test(student, whole, IMAGES, shown), out)
