"""Native components: present where requested, trainable in any combination, and equal to timm's."""

import subprocess
import sys

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from timm.models import beit

from atdiag.core import randomness
from atdiag.core.spec import Network, Transfer
from atdiag.core.spec.network import EXCLUSIVE
from atdiag.networks.model import components, students
from atdiag.networks.model.acting import why_idle
from atdiag.networks.model.components import COMPONENTS, Component, RelPosBias
from atdiag.networks.registry import teachers
from atdiag.networks.weights import loading
from atdiag.transfer.attention import Attention, AttentionOverride
from atdiag.transfer.observation import CaptureRequest
from atdiag.transfer.ops import Averaged

GRID, HEADS = 3, 2
OTHERS = {"distillation_token", "gelu_tanh", "quick_gelu", "ln_eps", "no_last_norm", "no_k_bias"}
"""Components of which each excludes one that is left."""
NAMES = sorted(name for name, component in COMPONENTS.items() if not component.followed)


def network(names=(), class_token=True) -> Network:
    sizes = {"image_size": 12, "patch_size": 4, "channels": 1, "width": 16, "depth": 2, "heads": HEADS, "classes": 5}
    registers = 1 if "distillation_token" in names else 3
    extras = {"class_token": class_token, "components": names, "layer_scale_init": 0.1, "registers": registers}
    return Network.model_validate({**sizes, **extras, **({"norm_eps": 1e-5} if "ln_eps" in names else {})})


def contradict(names, class_token) -> bool:
    """Return whether these components exclude each other, or what is read of a class token where there is none."""
    pairs = any({one, other} <= set(names) for one, other, _ in EXCLUSIVE)
    return pairs or (not class_token and bool({"mean_pool", "distillation_token"} & set(names)))


def assert_builds_and_trains(wanted: Network) -> None:
    vit = students.build(wanted, 0)
    # Where it does nothing, nothing shows it.
    unseen = {"norm_before_pool"} if why_idle("norm_before_pool", Transfer(), wanted) else set()
    assert set(components.inspect(vit)) == set(wanted.components) - unseen
    images = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    shown = vit.observe(images, CaptureRequest(maps=frozenset(range(wanted.depth)), logits=True))
    logits = shown.logits
    assert logits.shape == (2, wanted.classes)
    assert all(one.qk.q.shape == (2, HEADS, wanted.tokens, 8) for one in shown.seen.values())
    assert len(shown.seen) == wanted.depth
    logits.square().sum().backward()
    for name, parameter in vit.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert components.values(vit, wanted.components) == dict(wanted.values)
    again = students.build(wanted, 1)
    again.load_state_dict(vit.state_dict())
    assert torch.equal(again(images), logits)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_each_component_works_alone(name, class_token):
    if not contradict({name}, class_token):
        assert_builds_and_trains(network((name,), class_token))


@given(names=st.sets(st.sampled_from(NAMES)), class_token=st.booleans())
@example({"rel_pos_bias", "registers"}, True)
@example({"rel_pos_bias", "registers", "no_abs_pos"}, False)
@example({*NAMES} - OTHERS - {"attention_pool"}, True)
@example({*NAMES} - OTHERS - {"mean_pool"}, False)
def test_any_combination_of_components_works(names, class_token):
    if contradict(names, class_token):
        with pytest.raises(ValueError, match=r"choose one|leave it out"):
            network(names, class_token)
    else:
        assert_builds_and_trains(network(names, class_token))


def test_components_that_follow_others_are_found_and_not_chosen():
    followed = {name for name, component in COMPONENTS.items() if component.followed}
    assert followed == {"no_class_token"}
    assert [COMPONENTS["no_class_token"].found(students.build(network((), token), 0)) for token in (True, False)] == [
        False,
        True,
    ]
    with pytest.raises(ValueError, match="no_class_token is not a component to choose"):
        students.build(network(("no_class_token",)), 0)


@pytest.fixture
def temperature():
    """A user's component: a learned factor on the embedded tokens."""

    def attach(vit, network):
        vit.norm_pre = Scale(network.width)

    def found(model):
        return isinstance(model.norm_pre, Scale)

    mine = Component("token_scale", "A factor.", "here", found, attach=attach, initial=lambda network: {"factor": 0.5})
    components.register_component(mine)
    yield mine
    del COMPONENTS["token_scale"]


class Scale(torch.nn.Module):
    """A learned factor per channel."""

    def __init__(self, width):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.empty(width))

    def forward(self, x):
        return x * self.factor


def test_a_registered_component_is_like_any_other(temperature):
    vit = students.build(network(("token_scale", "layer_scale")), 0)
    assert torch.equal(vit.norm_pre.factor, torch.full((16,), 0.5)) and "norm_pre.factor" in vit.state_dict()
    assert "token_scale" in components.inspect(vit)
    with pytest.raises(ValueError, match="already a component 'token_scale'"):
        components.register_component(temperature)


def test_a_component_of_another_package_is_found_by_its_entry_point(tmp_path):
    (tmp_path / "theirs.py").write_text(
        "from atdiag.networks.model.components import Component\n"
        "component = Component('theirs', 'What it does.', 'source', found=lambda model: False)\n"
    )
    (facts := tmp_path / "theirs-1.0.dist-info").mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[atdiag.components]\ntheirs = theirs:component\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from atdiag.networks.model import components as c"
    ran = subprocess.run([sys.executable, "-c", f"{code}; print(*c.COMPONENTS)"], capture_output=True, text=True)
    assert ran.stdout.split() == [*COMPONENTS, "theirs"], ran.stderr


def test_weights_with_a_bias_of_the_keys_do_not_load_where_there_is_none():
    vit = students.build(network(("no_k_bias",)), 0)
    assert {"blocks.0.attn.q_bias", "blocks.0.attn.v_bias"} <= set(vit.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*blocks\.0\.attn\.k_bias"):
        vit.load_state_dict(students.build(network(), 0).state_dict())


def test_every_component_has_a_summary_and_a_source():
    for name, component in COMPONENTS.items():
        assert component.name == name and component.summary.endswith(".") and len(component.summary) > 30
        assert component.source


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("no_bias", [True, False])
def test_the_bias_of_the_patch_embedding_does_not_depend_on_the_pre_norm(pre_norm, no_bias):
    wanted = [name for name, on in (("pre_norm", pre_norm), ("no_patch_bias", no_bias)) if on]
    vit = students.build(network(wanted), 0)
    assert (vit.patch_embed.proj.bias is None) == no_bias
    assert isinstance(vit.norm_pre, torch.nn.LayerNorm) == pre_norm


def test_every_layer_norm_has_the_epsilon():
    vit = students.build(network(("ln_eps", "pre_norm", "attention_pool")), 0)
    assert {norm.eps for norm in components.layer_norms(vit)} == {1e-5} and len(components.layer_norms(vit)) == 7
    assert network(("ln_eps",)).student().norm_eps == 1e-6
    for faulty in ({"components": ("ln_eps",)}, {"norm_eps": 1e-5}):
        with pytest.raises(ValueError, match="ln_eps"):
            Network.model_validate(network().model_dump(exclude={"components", "norm_eps"}) | faulty)


@torch.no_grad()
def test_a_bias_of_the_keys_is_not_seen_by_softmax():
    """What the description of `no_k_bias` claims."""
    vit, images = students.build(network(), 0), torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    before = vit(images)
    for block in vit.blocks:
        torch.nn.init.normal_(block.attn.k_bias, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(vit(images), before, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_mean_pool_reads_the_patches_alone():
    vit = students.build(network(("mean_pool", "registers")), 0)
    x = torch.randn(2, 13, 16, generator=torch.Generator().manual_seed(0))
    expected = vit.head(torch.nn.functional.layer_norm(x[:, 4:].mean(1), (16,), eps=1e-6))
    torch.testing.assert_close(vit.forward_head(vit.norm(x)), expected)


@pytest.mark.parametrize("name", teachers.miniatures())
def test_miniatures_have_the_components_of_the_registry(name):
    wanted = teachers.miniature_network(name)
    assert components.inspect(students.build(wanted, 0)) == wanted.components
    missing = set(teachers.row(name).components) - set(wanted.components)
    # EVA-02's miniature has a norm of q and k besides, so that every component on the map can be seen at mini.
    assert set(wanted.components) - set(teachers.row(name).components) == ({"qk_norm"} if name == "eva02_s" else set())
    # Components that the miniature was pre-trained without: CLIP's at epsilon 1e-6, BEiT's with a bias of k.
    without = {"clip_b": {"ln_eps"}, "beitv2_b": {"no_k_bias"}, "eva02_s": {"mean_pool", "no_k_bias"}}
    assert missing == without.get(name, set())


@pytest.mark.parametrize("name", teachers.miniatures())
def test_shipped_miniatures_agree_with_the_registry(name):
    assert loading.shipped(name).network == teachers.miniature_network(name)
    vit = loading.load(loading.shipped(name))
    assert components.inspect(vit) == vit.network.components


@pytest.mark.parametrize("name", NAMES)
def test_a_component_adds_the_parameters_that_it_names(name):
    plain = set(students.build(network(), 0).state_dict())
    brought = set(students.build(network((name,)), 0).state_dict()) - plain
    fragments = COMPONENTS[name].parameters
    assert all(any(fragment in parameter for fragment in fragments) for parameter in brought)
    assert all(any(fragment in parameter for parameter in brought) for fragment in fragments)


def test_an_unknown_component_is_named_with_a_suggestion():
    with pytest.raises(ValueError, match=r"unknown component 'layerscale'.*layer_scale"):
        components.resolve(["layerscale"])


def beits(bias: RelPosBias) -> beit.Attention:
    """Make timm's BEiT attention with the same table."""
    twin = beit.Attention(12, HEADS, qkv_bias=True, window_size=(GRID, GRID))
    with torch.no_grad():
        twin.relative_position_bias_table.copy_(bias.relative_position_bias_table)
    return twin


@pytest.fixture
def bias():
    """Make a position bias with class token and a random table."""
    module = RelPosBias(GRID, class_token=True, registers=0, heads=HEADS)
    torch.nn.init.normal_(module.relative_position_bias_table, generator=torch.Generator().manual_seed(0))
    return module


def test_the_position_bias_equals_beits(bias):
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


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_component_belongs_to_the_map_if_a_given_map_removes_its_effect(name):
    """Two networks, with and without the component, that share all other weights, under the same uniform maps."""
    out = []
    # Two components of the pooling act where tokens are averaged.
    base = ("registers",) if name == "pool_includes_prefix" else ()
    for names in (base, (*base, name)):
        vit = students.build(network(names, name not in ("norm_before_pool", "pool_includes_prefix")), 0)
        for key, parameter in vit.named_parameters():
            values = randomness.generator(0, "test", key).standard_normal(parameter.shape)
            parameter.add_(0.3 * torch.from_numpy(values).float())
        tokens = vit.network.tokens
        uniform = AttentionOverride("map", Averaged(torch.full((1, 1, 1, tokens), 1 / tokens)))
        images = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
        own, under = vit(images), vit(images, {0: uniform, 1: uniform})
        assert not torch.allclose(own, under, atol=1e-3)
        out.append(under)
    assert torch.equal(*out) == COMPONENTS[name].belongs_to_map


def test_renaming_moves_a_module_or_a_parameter_of_every_block_and_nothing_else():
    wanted = network()
    assert wanted.depth == 2
    names = {"gamma": "ls.gamma", "attn.q_norm": "attn.norms.q"}
    others = ["blocks.1.attn.q_norms.weight", "gamma", "blocks.0.gamma_1", "norm.blocks.0.gamma"]
    theirs = ["blocks.0.gamma", "blocks.1.attn.q_norm.weight", *others]
    ours = ["blocks.0.ls.gamma", "blocks.1.attn.norms.q.weight", *others]
    state = {key: torch.full((1,), float(i)) for i, key in enumerate(theirs)}
    for _ in range(2):  # our own names stay what they are
        components.renamed(names)(state, wanted)
        assert {key: int(value) for key, value in state.items()} == {key: i for i, key in enumerate(ours)}
