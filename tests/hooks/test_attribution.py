"""The residual stream and the logits, taken apart: the parts sum to the whole."""

import pytest
import torch
import torch.nn.functional as F

from atdiag.core.errors import UserError
from atdiag.networks.registry import teachers
from tests.hooks.witness import ARCHITECTURES

TIMM = ["deit3_small_patch16_224", "beitv2_base_patch16_224", "deit_tiny_distilled_patch16_224"]
TIMM += ["vit_so150m_patch16_reg4_gap_256", "vit_base_patch16_clip_quickgelu_224", "vit_small_patch16_dinov3"]
REST = ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "eva02_base_patch14_224", "vit_giant_patch14_dinov2"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in REST]


def parts_sum_to_the_logits(model, images):
    classes = torch.arange(len(images)) % model.cfg.d_vocab_out
    model.set_use_attn_result(True)
    with torch.no_grad():
        logits, cache = model.run_with_cache(images)
    parts, labels = cache.decompose_resid(return_labels=True)
    assert len(parts) == len(labels) and labels[-1] == f"{model.cfg.n_layers - 1}_mlp_out"
    torch.testing.assert_close(parts.sum(0), cache["resid_post", -1], rtol=1e-4, atol=1e-4)
    for layer in (0, 1):
        inside = cache.decompose_resid(layer, mlp_input=True)
        torch.testing.assert_close(inside.sum(0), cache["resid_mid", layer], rtol=1e-4, atol=1e-4)
    heads, names = cache.stack_head_results(incl_remainder=True, return_labels=True)
    assert names[:2] == ["L0H0", "L0H1"] and names[-1] == "remainder"
    for stack in (parts, heads):
        one = cache.logit_attrs(stack, 1).sum((0, 2)) + cache.bias_attrs(1)
        torch.testing.assert_close(one, logits[:, 1], rtol=0, atol=1e-4)
        each = cache.logit_attrs(stack, classes).sum((0, 2)) + cache.bias_attrs(classes)
        torch.testing.assert_close(each, logits.gather(1, classes[:, None])[:, 0], rtol=0, atol=1e-4)
        difference = cache.logit_attrs(stack, 1, 2).sum((0, 2)) + cache.bias_attrs(1, 2)
        torch.testing.assert_close(difference, logits[:, 1] - logits[:, 2], rtol=0, atol=1e-4)
    for i in range(model.cfg.n_layers):
        whole = cache["result", i].sum(2) + model.b_O[i]
        torch.testing.assert_close(whole, cache["attn_out", i], rtol=1e-4, atol=2e-5)
        if "norm" not in dict(model.model.blocks[i].mlp.named_children()):
            continue
        mlp = cache["post", i] @ model.W_out[i] + model.b_out[i]
        torch.testing.assert_close(mlp, cache["mlp_out", i], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in teachers.miniatures() if name not in ("siglip2_b",)])
def test_parts_of_miniatures_sum_to_the_logits(name, mini, images):
    model = mini(name)
    parts_sum_to_the_logits(model, images(model, 3))


@pytest.mark.parametrize("name", [*TIMM, *SLOW])
def test_parts_of_timms_networks_sum_to_the_logits(name, network):
    assert name in ARCHITECTURES
    parts_sum_to_the_logits(*network(name, 3))


def test_positions_and_images_can_be_chosen(mini, images):
    model = mini("dinov2_reg_s")
    with torch.no_grad():
        logits, cache = model.run_with_cache(images(model, 4))
    whole = cache.logit_attrs(cache.decompose_resid(), 3)
    assert (whole[:, :, 1:] == 0).all()  # read from the class token
    token = cache.decompose_resid(pos_slice=0)
    torch.testing.assert_close(cache.logit_attrs(token, 3, pos_slice=0), whole[:, :, 0])
    some = cache.decompose_resid(pos_slice=(0, 3))
    torch.testing.assert_close(cache.logit_attrs(some, 3, pos_slice=(0, 3)), whole[:, :, :3])
    each = torch.tensor([1, 2, 3, 4])
    token_each = cache.logit_attrs(token, each, pos_slice=0).sum(0) + cache.bias_attrs(each)
    torch.testing.assert_close(token_each, logits[range(4), each], rtol=0, atol=1e-4)
    two = cache.apply_slice_to_batch_dim((1, 3))
    torch.testing.assert_close(two.logit_attrs(two.decompose_resid(), 3), whole[:, 1:3])
    torch.testing.assert_close(cache.logit_attrs(two.decompose_resid(), 3, batch_slice=(1, 3)), whole[:, 1:3])
    single = cache.apply_slice_to_batch_dim([0]).remove_batch_dim()
    torch.testing.assert_close(single.logit_attrs(single.decompose_resid(), 3), whole[:, 0])
    assert single.stack_head_results().shape == (24, model.cfg.n_ctx, model.cfg.d_model)


def test_mean_pooling_with_its_norm_after_it_spreads_a_logit_over_the_patches(network):
    model, images = network("beitv2_base_patch16_224", 3)
    with torch.no_grad():
        logits, cache = model.run_with_cache(images)
    attrs = cache.logit_attrs(cache.decompose_resid(), 2)
    assert (attrs[:, :, 0] == 0).all() and attrs[:, :, 1:].abs().min() > 0
    pooled = cache["resid_post", -1][:, 1:].mean(1)
    norm = model.model.fc_norm
    expected = F.linear(norm(pooled), model.W_U.T, model.b_U)
    torch.testing.assert_close(expected, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attrs.sum((0, 2)) + cache.bias_attrs(2), expected[:, 2], rtol=0, atol=1e-4)


def test_the_accumulated_stream_gives_the_logit_lens(mini, images):
    model = mini("clip_b")
    some = images(model, 3)
    with torch.no_grad():
        logits, cache = model.run_with_cache(some)
    stack, labels = cache.accumulated_resid(return_labels=True, incl_mid=True)
    assert labels[:3] == ["0_pre", "0_mid", "1_pre"] and labels[-1] == "final_post" and len(stack) == 25
    assert torch.equal(stack[1], cache["resid_mid", 0]) and torch.equal(stack[-1], cache["resid_post", 11])
    normed = cache.accumulated_resid(apply_ln=True)
    torch.testing.assert_close(normed[5], model.model.norm(cache["resid_pre", 5]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(normed[-1][:, 0] @ model.W_U + model.b_U, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.logit_lens(cache["resid_post", -1]), logits)
    third = cache.accumulated_resid(3, apply_ln=True)
    expected = cache["normalized", 3, "ln1"] * model.model.blocks[3].norm1.weight
    torch.testing.assert_close(third[-1], expected, rtol=1e-4, atol=1e-5)
    scales = cache.stack_activation("scale", -1, "ln2")
    assert torch.equal(scales[4], cache["scale", 4, "ln2"]) and len(scales) == 12


@pytest.mark.parametrize("name", ["siglip2_b"])
def test_attention_pooling_is_an_error_that_says_so(name, mini, images):
    model = mini(name)
    with torch.no_grad():
        _, cache = model.run_with_cache(images(model))
    parts = cache.decompose_resid()
    torch.testing.assert_close(parts.sum(0), cache["resid_post", -1], rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="attention pools the tokens"):
        cache.logit_attrs(parts, 0)


def test_heads_results_are_computed_from_z_if_they_are_not_cached(mini, images):
    model = mini("dinov2_s")
    with torch.no_grad():
        _, cache = model.run_with_cache(images(model))
        _, full = model.run_with_cache(images(model), names_filter=lambda name: name.endswith("hook_result"))
    assert "blocks.0.attn.hook_result" not in cache
    torch.testing.assert_close(cache.stack_head_results(), full.stack_activation("result").movedim(3, 1).flatten(0, 1))
