"""Native components: found where they were asked for, trainable in any mix, and equal to timm's."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from timm.models import beit

from atdiag.networks import components, students, teachers
from atdiag.networks.components import COMPONENTS, RelPosBias
from atdiag.spec import Network
from atdiag.transfer.attention import Attention
from atdiag.transfer.observation import Wanted

GRID, HEADS = 3, 2
NAMES = sorted(COMPONENTS)


def network(names=(), class_token=True) -> Network:
    sizes = {"image_size": 12, "patch_size": 4, "channels": 1, "width": 12, "depth": 2, "heads": HEADS, "classes": 5}
    extras = {"class_token": class_token, "components": names, "layer_scale_init": 0.1, "registers": 3}
    return Network.model_validate({**sizes, **extras})


def assert_builds_and_trains(wanted: Network) -> None:
    vit = students.build(wanted, 0)
    assert components.inspect(vit) == wanted.components
    images = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    shown = vit.observe(images, Wanted(maps=frozenset(range(wanted.depth)), logits=True))
    logits = shown.logits
    assert logits.shape == (2, wanted.classes)
    assert all(one.qk.q.shape == (2, HEADS, wanted.tokens, 6) for one in shown.seen.values())
    assert len(shown.seen) == wanted.depth
    logits.square().sum().backward()
    for name, parameter in vit.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_each_component_alone(name, class_token):
    assert_builds_and_trains(network((name,), class_token))


@given(names=st.sets(st.sampled_from(NAMES)), class_token=st.booleans())
@example({"rel_pos_bias", "registers"}, True)
@example({"rel_pos_bias", "registers", "no_abs_pos"}, False)
def test_any_mix_of_components(names, class_token):
    assert_builds_and_trains(network(names, class_token))


@pytest.mark.parametrize("name", teachers.miniatures())
def test_the_miniatures_have_what_the_registry_says(name):
    wanted = teachers.miniature_network(name)
    assert components.inspect(students.build(wanted, 0)) == wanted.components == teachers.row(name).components


@pytest.mark.parametrize("name", NAMES)
def test_a_component_brings_the_parameters_that_it_names(name):
    plain = set(students.build(network(), 0).state_dict())
    brought = set(students.build(network((name,)), 0).state_dict()) - plain
    fragments = COMPONENTS[name].parameters
    assert all(any(fragment in parameter for fragment in fragments) for parameter in brought)
    assert all(any(fragment in parameter for parameter in brought) for fragment in fragments)


def test_an_unknown_component_is_named_with_a_suggestion():
    with pytest.raises(ValueError, match=r"unknown component 'layerscale'.*layer_scale"):
        components.resolve(["layerscale"])


def beits(bias: RelPosBias) -> beit.Attention:
    """timm's BEiT attention with the same table."""
    twin = beit.Attention(12, HEADS, qkv_bias=True, window_size=(GRID, GRID))
    with torch.no_grad():
        twin.relative_position_bias_table.copy_(bias.relative_position_bias_table)
    return twin


@pytest.fixture
def bias():
    """A position bias with class token and a random table."""
    module = RelPosBias(GRID, class_token=True, registers=0, heads=HEADS)
    torch.nn.init.normal_(module.relative_position_bias_table, generator=torch.Generator().manual_seed(0))
    return module


def test_the_position_bias_is_beits(bias):
    assert torch.equal(bias(), beits(bias)._get_rel_pos_bias()[0])


def test_the_position_bias_without_class_token_is_beits_among_patches(bias):
    patches = RelPosBias(GRID, class_token=False, registers=0, heads=HEADS)
    rows = len(patches.relative_position_bias_table)
    assert rows == len(bias.relative_position_bias_table) - 3
    with torch.no_grad():
        patches.relative_position_bias_table.copy_(bias.relative_position_bias_table[:rows])
    assert torch.equal(patches(), bias()[:, 1:, 1:])


@pytest.mark.parametrize(("class_token", "kept"), [(True, [0, *range(4, 13)]), (False, list(range(3, 12)))])
def test_registers_have_no_position_bias(class_token, kept):
    without, with_them = (RelPosBias(GRID, class_token, registers, HEADS) for registers in (0, 3))
    torch.nn.init.normal_(without.relative_position_bias_table)
    with_them.load_state_dict(without.state_dict())
    expected = torch.zeros(HEADS, len(kept) + 3, len(kept) + 3)
    expected[:, torch.tensor(kept)[:, None], kept] = without()
    assert torch.equal(with_them(), expected)
    gradients = [
        torch.autograd.grad(module().square().sum(), module.relative_position_bias_table)
        for module in (with_them, without)
    ]
    assert torch.equal(*(gradient for (gradient,) in gradients))


@torch.no_grad()
def test_attention_with_position_bias_is_beits(bias):
    module, x = Attention(12, HEADS), torch.randn(2, GRID**2 + 1, 12, generator=torch.Generator().manual_seed(1))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(2))
    module.k_bias.zero_()  # BEiT has none
    module.rel_pos_bias = bias
    twin, state = beits(bias), module.state_dict()
    twin.qkv.weight.copy_(state["qkv.weight"])
    twin.q_bias.copy_(module.q_bias), twin.v_bias.copy_(module.v_bias)
    twin.proj.load_state_dict(module.proj.state_dict())
    torch.testing.assert_close(module(x), twin(x), rtol=1e-5, atol=1e-6)
    module.rel_pos_bias = None
    assert not torch.allclose(module(x), twin(x), atol=1e-2)


def test_quick_gelu_is_its_formula():
    vit, x = students.build(network(("quick_gelu",)), 0), torch.linspace(-4, 4, 50)
    torch.testing.assert_close(vit.blocks[0].mlp.act(x), x * torch.sigmoid(1.702 * x))
