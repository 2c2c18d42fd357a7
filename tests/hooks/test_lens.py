"""The conventions and numbers of TransformerLens 3.9 itself, fed with our embedded tokens from the first block on."""

import logging

import pytest
import torch

from atdiag import hooked, patching
from atdiag.analysis.points.names import act_name
from atdiag.core.spec import Network
from atdiag.networks.model import students

pytest.importorskip("transformer_lens", reason="TransformerLens is not installed: pip install 'atdiag[lens]'")

import transformer_lens as lens
from transformer_lens import patching as lens_patching
from transformer_lens.utilities import get_act_name

NETWORK = Network(image_size=20, patch_size=4, channels=1, width=24, depth=2, heads=3, classes=10)


class Started:
    """TransformerLens's model from the first block on: tokens stand for embedded images."""

    def __init__(self, model, embedded):
        self.model, self.embedded, self.cfg = model, embedded, model.cfg
        self.tokens = torch.zeros(embedded.shape[:2], dtype=torch.long)

    def run_with_cache(self, **options):
        return self.model.run_with_cache(self.embedded, start_at_layer=0, **options)

    def run_with_hooks(self, tokens=None, **options):
        return self.model.run_with_hooks(self.embedded.clone(), start_at_layer=0, **options)


@pytest.fixture(scope="module")
def both():
    """Give our model, images, and TransformerLens's model with the same weights."""
    vit, generator = students.build(NETWORK, 0), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if not name.startswith("norm."):  # TransformerLens's attribution leaves the last norm's weight out
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    vit.eval().requires_grad_(False)
    mine = hooked(vit, label="mine")
    config = lens.HookedTransformerConfig(
        n_layers=2, d_model=24, n_heads=3, d_head=8, d_mlp=96, n_ctx=26, d_vocab=10, act_fn="gelu", device="cpu",
        eps=NETWORK.norm_eps, normalization_type="LN", attention_dir="bidirectional", init_weights=False,
    )  # fmt: skip
    logging.disable(logging.WARNING)
    theirs = lens.HookedTransformer(config)
    with torch.no_grad():
        for i, block in enumerate(theirs.blocks):
            for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"):
                getattr(block.attn, name).copy_(getattr(mine, name)[i])
            for name in ("W_in", "b_in", "W_out", "b_out"):
                getattr(block.mlp, name).copy_(getattr(mine, name)[i])
            for norm, own in ((block.ln1, vit.blocks[i].norm1), (block.ln2, vit.blocks[i].norm2)):
                norm.w.copy_(own.weight), norm.b.copy_(own.bias)
        theirs.ln_final.w.copy_(vit.norm.weight), theirs.ln_final.b.copy_(vit.norm.bias)
        theirs.unembed.W_U.copy_(mine.W_U), theirs.unembed.b_U.copy_(mine.b_U)
        images = torch.rand(2, 1, 20, 20, generator=generator)
        embedded = vit.embed(images)
    yield mine, images, Started(theirs, embedded)
    logging.disable(logging.NOTSET)


def close(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=5e-5)


def test_names_order_shapes_and_values(both):
    mine, images, theirs = both
    with torch.no_grad():
        logits, cache = mine.run_with_cache(images)
        expected, other = theirs.run_with_cache()
    close(logits, expected[:, 0])
    assert [name for name in cache if name in other] == list(other)
    for name, value in other.items():
        close(cache[name], value[:, 0] if name.startswith("unembed") else value)  # ours are of the class token
    for key in (("pattern", 1), ("q", 0), ("scale", 1, "ln1"), ("normalized", 1, "ln2"), ("resid_post", -1), "pre1"):
        close(cache[key], other[key])
    for name in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "W_U", "b_Q", "b_O", "b_in", "b_out", "b_U"):
        assert torch.equal(getattr(mine, name), getattr(theirs.model, name))


def test_short_names():
    given = [("k", 6, "a"), ("pre", 2), ("embed",), ("normalized", 27, "ln2"), ("k6",), ("scale4ln1",), ("pre5",)]
    given += [("attn", 3), ("mlp_post", 1), ("scale",), ("normalized",), ("rot_q", 2), ("resid_mid", 4), ("mlp_out", 0)]
    given += [("blocks.1.hook_resid_pre",), ("hook_embed",), ("attn_logits", 2), ("result", 1), ("key", 3)]
    for arguments in given:
        assert act_name(*arguments) == get_act_name(*arguments)


@pytest.mark.parametrize(
    "names", ["blocks.1.attn.hook_z", ["blocks.1.attn.hook_z", "blocks.0.hook_mlp_out"], lambda name: "hook_q" in name]
)
def test_filters_and_options_of_the_cache(names, both):
    mine, images, theirs = both
    with torch.no_grad():
        _, cache = mine.run_with_cache(images, names_filter=names)
        _, other = theirs.run_with_cache(names_filter=names)
        out, part = mine.run_with_cache(images, stop_at_layer=1)
        stopped, other_part = theirs.run_with_cache(stop_at_layer=1)
    assert list(cache) == list(other)
    close(out, stopped)
    assert [name for name in part if name in other_part] == list(other_part)


def test_cache_methods(both):
    mine, images, theirs = both
    mine.set_use_attn_result(True)
    with torch.no_grad():
        _, cache = mine.run_with_cache(images)
        _, other = theirs.run_with_cache()
        for options in ({}, {"layer": 1}, {"incl_mid": True}, {"layer": 1, "mlp_input": True}, {"apply_ln": True}):
            (stack, labels), (stack2, labels2) = (
                one.accumulated_resid(return_labels=True, **options) for one in (cache, other)
            )
            assert labels == labels2
            close(stack, stack2)
        for options in ({}, {"layer": 1}, {"mode": "attn"}, {"layer": 1, "mlp_input": True}, {"apply_ln": True}):
            (stack, labels), (stack2, labels2) = (
                one.decompose_resid(return_labels=True, incl_embeds=False, **options) for one in (cache, other)
            )
            assert labels == labels2
            close(stack, stack2)
        for options in ({}, {"layer": 1}, {"incl_remainder": True}, {"apply_ln": True}, {"pos_slice": 0}):
            (stack, labels), (stack2, labels2) = (
                one.stack_head_results(return_labels=True, **options) for one in (cache, other)
            )
            assert labels == labels2
            close(stack, stack2)
        close(cache.stack_activation("scale", -1, "ln2"), other.stack_activation("scale", -1, "ln2"))
        close(cache["result", 1], other["result", 1])
        weight = mine.model.blocks[1].norm1.weight  # TransformerLens leaves it out
        stack = cache.decompose_resid(1, incl_embeds=False)
        close(cache.apply_ln_to_stack(stack, 1), other.apply_ln_to_stack(stack, 1) * weight)
        stack = cache.decompose_resid(incl_embeds=False, pos_slice=0)
        for classes in (4, torch.tensor([1, 7])):
            mine_attrs = cache.logit_attrs(stack, classes, pos_slice=0)
            close(mine_attrs, other.logit_attrs(stack, classes, pos_slice=0))
        close(cache.logit_attrs(stack, 4, 5, pos_slice=0), other.logit_attrs(stack, 4, 5, pos_slice=0))
    mine.set_use_attn_result(False)


def test_hooks_forward_and_backward(both):
    mine, images, theirs = both

    def halve(value, hook):
        return value / 2

    def first_only(value, hook):
        value[:, 1:] = 0

    hooks = [("blocks.1.attn.hook_pattern", halve), (lambda name: name.endswith("hook_mlp_out"), first_only)]
    with torch.no_grad():
        close(mine.run_with_hooks(images, hooks), theirs.run_with_hooks(fwd_hooks=hooks)[:, 0])
    grads = {}

    def keep(which):
        def hook(grad, hook):
            own = grads.setdefault(hook.name, {})
            own[which] = own.get(which, 0) + grad  # TransformerLens calls ln1 for queries, keys and values separately

        return hook

    names = [
        "blocks.0.hook_resid_post",
        "blocks.1.attn.hook_pattern",
        "blocks.1.ln1.hook_scale",
        "blocks.1.mlp.hook_pre",
    ]
    with mine.hooks(bwd_hooks=[(name, keep("mine")) for name in names]):
        mine(images)[:, 3].sum().backward()
    with theirs.model.hooks(bwd_hooks=[(name, keep("theirs")) for name in names]):
        theirs.model(theirs.embedded.requires_grad_(), start_at_layer=0)[:, 0, 3].sum().backward()
    theirs.embedded.requires_grad_(False)
    assert set(grads) == set(names)
    for name, one in grads.items():
        torch.testing.assert_close(one["mine"], one["theirs"], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["attn_head_out_all_pos", "attn_head_pattern_all_pos", "attn_head_all_pos_every"])
def test_patching(name, both):
    mine, images, theirs = both
    other = images.flip(0)
    with torch.no_grad():
        _, cache = mine.run_with_cache(other)
        clean = Started(theirs.model, mine.module.embed(other))
        _, other_cache = clean.run_with_cache()
        found = getattr(patching, f"get_act_patch_{name}")(mine, images, cache, lambda logits: logits[0, 3])
        expected = getattr(lens_patching, f"get_act_patch_{name}")(
            theirs, theirs.tokens, other_cache, lambda logits: logits[0, 0, 3]
        )
    close(found, expected)


BY_POSITION = ["resid_pre"]
SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("attn_out", "mlp_out", "attn_head_q_by_pos", "attn_head_pattern_by_pos")
]


@pytest.mark.parametrize("name", [*BY_POSITION, *SLOW])
def test_patching_by_position(name, both):
    mine, images, theirs = both
    other = images.flip(0)
    with torch.no_grad():
        _, cache = mine.run_with_cache(other)
        _, other_cache = Started(theirs.model, mine.module.embed(other)).run_with_cache()
        function, reference = (getattr(module, f"get_act_patch_{name}") for module in (patching, lens_patching))
        found = function(mine, images, cache, lambda logits: logits[0, 3], layers=[1])
        expected = reference(theirs, theirs.tokens, other_cache, lambda logits: logits[0, 0, 3])
    close(found[0], expected[1])
