"""Which components can matter under which transfer, checked by computing with and without them."""

from functools import cache

import pytest
import torch
from torch import nn

from atdiag.core import randomness
from atdiag.core.spec import Network, Transfer
from atdiag.networks.model import components, students
from atdiag.networks.model.acting import AROUND_THE_MAP, OF_THE_MAP, belongs_to_map, matters, why_idle
from atdiag.networks.model.components import COMPONENTS, Component
from atdiag.transfer import methods, observation

NAMES = sorted(name for name, component in COMPONENTS.items() if not component.followed)
BOTH = (0, 1)
TRANSFERS = {
    "none": Transfer(),
    "copy": Transfer(method="copy", layers=BOTH),
    "copy, every head named": Transfer(method="copy", layers=BOTH, heads=(0, 1)),
    "copy, averaged": Transfer(method="copy", layers=BOTH, average="queries"),
    "copy of one block": Transfer(method="copy", layers=(1,)),
    "copy of one head": Transfer(method="copy", layers=BOTH, heads=(1,)),
    **{f"copy of {name}": Transfer(method="copy", layers=BOTH, tensor=name) for name in "qkv"},
    **{f"distill, {name}": Transfer(method="distill", layers=BOTH, loss=name) for name in ("ce", "mse", "logits_mse")},
    **{f"distill of {name}": Transfer(method="distill", layers=BOTH, tensor=name) for name in "qkv"},
    "features": Transfer(method="features", layers=BOTH),
    "logits": Transfer(method="logits"),
}
IDLE = {
    "no_k_bias": {*TRANSFERS} - {"distill of k"},
    **{name: {"copy", "copy, every head named", "copy, averaged"} for name in ("rel_pos_bias", "rope", "qk_norm")},
    **{name: {*TRANSFERS} for name in ("norm_before_pool", "pool_includes_prefix")},  # the output is the class token's
}


def network(names=()) -> Network:
    sizes = {"image_size": 12, "patch_size": 4, "channels": 1, "width": 16, "depth": 2, "heads": 2, "classes": 5}
    registers = 1 if "distillation_token" in names else 3
    extras = {"components": names, "layer_scale_init": 0.1, "registers": registers}
    return Network.model_validate({**sizes, **extras, **({"norm_eps": 1e-2} if "ln_eps" in names else {})})


@torch.no_grad()
def drawn(names, stream):
    """Make a network with large random parameters drawn by name, so that networks share their common ones."""
    vit = students.build(network(names), 0)
    for key, parameter in vit.named_parameters():
        values = randomness.generator(0, stream, key).standard_normal(parameter.shape)
        parameter.add_(0.3 * torch.from_numpy(values).float())
    return vit


@cache
def step(names, how):
    """Compute a student's logits, transfer loss and gradients under a transfer from a teacher with registers."""
    transfer = TRANSFERS[how]
    teacher, student = drawn(("registers",), "teacher"), drawn(names, "student")
    if student.network.registers == 1:  # a distillation token, which the teacher has too
        teacher = drawn(("distillation_token",), "teacher")
    images = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = teacher.observe(images, observation.of_teacher([transfer]))
    if (shared := teacher.shared_tokens(student.network)) is not None:
        seen = seen.select(shared)
    passed = methods.forward(student, transfer, images, seen)
    loss = torch.zeros(()) if passed.loss is None else passed.loss
    (passed.logits.square().mean() + loss).backward()
    return passed.logits.detach(), loss.detach(), {n: p.grad for n, p in student.named_parameters()}


def same(one, other) -> bool:
    """Return whether two students compute the same and get the same gradients in their common parameters."""
    gradients = [(one[2][name], other[2][name]) for name in one[2].keys() & other[2].keys()]
    pairs = [*zip(one[:2], other[:2], strict=True), *(pair for pair in gradients if None not in pair)]
    alike = all((a is None) == (b is None) for a, b in gradients)
    return alike and all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("how", TRANSFERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_component_matters_if_a_student_with_it_computes_or_learns_something_else(name, how):
    transfer = TRANSFERS[how]
    differ = not same(step((), how), step((name,), how))
    assert matters(name, transfer, network((name,))) == differ == (how not in IDLE.get(name, ()))
    assert (why_idle(name, transfer, network((name,))) is None) == differ


def test_under_a_copy_of_every_map_the_run_would_be_the_same_bit_for_bit():
    plain, biased = (step(names, "copy") for names in ((), ("rel_pos_bias",)))
    assert torch.equal(plain[0], biased[0])
    assert all(torch.equal(grad, biased[2][name]) for name, grad in plain[2].items() if grad is not None)


class KeyNorm(nn.Module):
    """A component of the map: a norm of the keys."""

    def forward(self, x, name, heads):
        return nn.functional.layer_norm(x, x.shape[-1:]) if name == "k" else x


@pytest.fixture
def key_norm():
    def attach(vit, network):
        for block in vit.blocks:
            block.attn.qk_hooks["key_norm"] = KeyNorm()

    mine = Component("key_norm", "A norm.", "here", lambda model: False, attach=attach, belongs_to_map=True)
    components.register_component(mine)
    yield mine
    del COMPONENTS["key_norm"]


@pytest.mark.parametrize("how", ["none", "copy", "copy of one block", "distill, ce"])
def test_a_bias_of_the_keys_matters_beside_a_component_that_acts_on_them(key_norm, how):
    transfer, parts = TRANSFERS[how], ("key_norm", "no_k_bias")
    differ = not same(step(("key_norm",), how), step(parts, how))
    assert matters("no_k_bias", transfer, network(parts)) == differ == (how != "copy")
    assert matters("key_norm", transfer, network(parts)) == (how != "copy")


def test_the_table_is_that_of_the_components():
    package = {name for name, one in COMPONENTS.items() if one.attach.__module__.startswith("atdiag")}
    assert package == OF_THE_MAP | AROUND_THE_MAP
    assert not OF_THE_MAP & AROUND_THE_MAP
    assert {name: belongs_to_map(name) for name in package} == {n: COMPONENTS[n].belongs_to_map for n in package}
    with pytest.raises(ValueError, match="unknown component 'rel_pos_bas', did you mean 'rel_pos_bias'"):
        belongs_to_map("rel_pos_bas")
