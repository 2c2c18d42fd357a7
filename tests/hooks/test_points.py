"""Every hook point against plain PyTorch hooks and our own attention module; identity, edits and stopping."""

import pytest
import torch
import torch.nn.functional as F

from atdiag import hooked
from atdiag.core.errors import UserError
from atdiag.networks.registry import teachers
from atdiag.transfer import ops
from atdiag.transfer.observation import CaptureRequest
from tests.analysis.timm_networks import build
from tests.hooks.witness import ARCHITECTURES, QUICK, seen

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES if name not in QUICK]


def identity(value, hook):
    return value


def every(name):
    return True


def shaped(model, name, images):
    return tuple(len(images) if length == "batch" else length for length in model.shapes[name])


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_points_of_timms_networks_equal_plain_hooks(name, network):
    model, images = network(name)
    expected, out = seen(model.subject, model.model, images)
    with torch.no_grad():
        logits, cache = model.run_with_cache(images)
        assert torch.equal(logits, out)
        assert torch.equal(model.run_with_hooks(images, fwd_hooks=[(every, identity)]), out)
        rewritten = model.run_with_hooks(images, fwd_hooks=[(every, lambda value, hook: value.clone())])
    torch.testing.assert_close(rewritten, out, rtol=1e-4, atol=1e-5)
    missing = {name for name in expected if name not in cache}
    assert all(one in model.missing for one in missing), missing
    for point, value in expected.items():
        if point in cache:
            torch.testing.assert_close(cache[point], value, rtol=1e-4, atol=2e-5, msg=lambda m, p=point: f"{p}: {m}")
    assert list(cache) == [point for point in model.hook_dict if not point.endswith("hook_result")]
    assert all(tuple(value.shape) == shaped(model, point, images) for point, value in cache.items())
    assert len(expected) - len(missing) >= 18


@pytest.mark.parametrize("name", teachers.miniatures())
def test_points_of_miniatures_equal_our_attention_module(name, mini, images):
    model = mini(name)
    some = images(model, 3)
    depth = model.cfg.n_layers
    wanted = CaptureRequest(frozenset(range(depth)), frozenset(range(depth)), frozenset(range(depth)), True)
    with torch.no_grad():
        expected = model.module.observe(some, wanted)
        embedded = model.module.embed(some)
        logits, cache = model.run_with_cache(some)
        unchanged = model.run_with_hooks(some, fwd_hooks=[(every, identity)])
    assert torch.equal(logits, expected.logits) and torch.equal(unchanged, logits)
    assert torch.equal(cache["hook_full_embed"], embedded)
    for i in range(depth):
        record = expected.seen[i]
        acting = teachers.miniature_network(name).components  # q and k are as they meet before a norm or rotation, too
        points = {"score_q": record.qk.q, "score_k": record.qk.k, "v": record.v}
        points |= {} if {"qk_norm", "rope"} & {*acting} else {"q": record.qk.q, "k": record.qk.k}
        for point, value in points.items():
            assert torch.equal(cache[point, i], value.transpose(1, 2))
        assert torch.equal(cache["attn_scores", i], ops.logits(record.qk))
        assert torch.equal(cache["pattern", i], ops.probabilities(record.qk))
        torch.testing.assert_close(cache["z", i], ops.attend(record.qk, record.v).transpose(1, 2))
        assert torch.equal(cache["resid_post", i], expected.features[i])
        if model.cfg.n_registers:
            assert torch.equal(cache["registers", i], expected.features[i][:, 1 : 1 + model.cfg.n_registers])
        if model.cfg.class_token:
            assert torch.equal(cache["cls", i], expected.features[i][:, 0])
    assert all(tuple(value.shape) == shaped(model, point, some) for point, value in cache.items())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "vit_small_patch16_dinov3"])
def test_an_edit_of_the_pattern_equals_the_explicit_formula(name, network):
    model, images = network(name)
    net = model.model

    def flat(pattern, hook):
        pattern[:, 1] = 1 / pattern.shape[-1]
        return pattern

    assert all(block.attn.fused_attn for block in net.blocks)
    with torch.no_grad():
        edited = model.run_with_hooks(images, fwd_hooks=[("blocks.1.attn.hook_pattern", flat)])
        assert all(block.attn.fused_attn for block in net.blocks)
        # The witness: with fused attention off, timm passes its pattern through the module attn_drop.
        net.blocks[1].attn.fused_attn = False

        def replace(module, args, output):
            output[:, 1] = 1 / output.shape[-1]
            return output

        handle = net.blocks[1].attn.attn_drop.register_forward_hook(replace)
        expected = model.module(images)
        handle.remove()
        torch.testing.assert_close(edited, expected, rtol=1e-4, atol=1e-5)
        plain = model.module(images)  # explicit in block 1
        identical = model.run_with_hooks(images, fwd_hooks=[(every, identity)])
        assert torch.equal(plain, identical) and not net.blocks[1].attn.fused_attn
        again = model.run_with_hooks(images, fwd_hooks=[("blocks.1.attn.hook_pattern", flat)])
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)


EDITS = {
    "hook_embed": "hook_full_embed",
    "hook_pos_embed": "hook_full_embed",
    "blocks.1.ln1.hook_scale": "blocks.1.attn.hook_q",
    "blocks.1.ln1.hook_normalized": "blocks.1.attn.hook_q",
    "blocks.1.attn.hook_q": "blocks.1.attn.hook_attn_scores",
    "blocks.1.attn.hook_v": "blocks.1.attn.hook_z",
    "blocks.1.attn.hook_attn_scores": "blocks.1.attn.hook_pattern",
    "blocks.1.attn.hook_result": "blocks.1.hook_attn_out",
    "blocks.1.hook_attn_out": "blocks.1.hook_resid_mid",
    "blocks.1.hook_resid_mid": "blocks.1.hook_resid_post",
    "blocks.1.mlp.hook_pre": "blocks.1.mlp.hook_post",
    "blocks.1.mlp.hook_post": "blocks.1.mlp.hook_out",
    "blocks.1.hook_mlp_out": "blocks.1.hook_resid_post",
    "blocks.1.hook_cls": "unembed.hook_out",
    "ln_final.hook_normalized": "unembed.hook_in",
    "unembed.hook_in": "unembed.hook_out",
}
"""Point -> one after it that must change with it."""


@pytest.mark.parametrize("name", ["deit_s", "timm"])
def test_edits_reach_what_comes_after_and_nothing_before(name, mini, network, images):
    model, some = (mini(), images(mini())) if name == "deit_s" else network("vit_tiny_patch16_224", depth=3)
    model.set_use_attn_result(True)
    with torch.no_grad():
        _, clean = model.run_with_cache(some)
        for point, after in EDITS.items():
            hook = [(point, lambda value, hook: 2 * value)]
            logits, cache = model.run_with_cache(some, fwd_hooks=hook)
            assert torch.equal(cache[point], 2 * clean[point]), point
            assert not torch.equal(cache[after], clean[after]), (point, after)
            assert not torch.equal(logits, clean["unembed.hook_out"])
            for earlier in list(model.hook_dict)[: list(model.hook_dict).index(point)]:
                if earlier not in ("blocks.1.attn.hook_k",):
                    assert torch.equal(cache[earlier], clean[earlier]), (point, earlier)


def test_edited_sums_are_exact(mini, images):
    model = mini("dinov2_s")
    some = images(model)

    def shift(value, hook):
        return value + 1

    with torch.no_grad():
        _, cache = model.run_with_cache(some, fwd_hooks=[("blocks.3.hook_resid_mid", shift)])
        assert torch.equal(cache["resid_post", 3], cache["resid_mid", 3] + cache["mlp_out", 3])
        _, cache = model.run_with_cache(some, fwd_hooks=[("blocks.3.hook_attn_out", shift)])
        assert torch.equal(cache["resid_mid", 3], cache["resid_pre", 3] + cache["attn_out", 3])
        norm = model.model.blocks[3].norm1
        _, cache = model.run_with_cache(some, fwd_hooks=[("blocks.3.ln1.hook_scale", lambda value, hook: 2 * value)])
        x = F.layer_norm(cache["resid_pre", 3], norm.normalized_shape, eps=norm.eps) / 2 * norm.weight + norm.bias
        expected = torch.einsum("bnc,hcd->bnhd", x, model.W_Q[3]) + model.b_Q[3]
        torch.testing.assert_close(cache["q", 3], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "point", ["hook_resid_pre", "hook_attn_out", "attn.hook_z", "attn.hook_pattern", "mlp.hook_post"]
)
def test_patching_a_run_with_its_own_values_changes_nothing(point, mini, images):
    model = mini("beitv2_b")
    some = images(model)
    with torch.no_grad():
        logits, cache = model.run_with_cache(some)
        name = f"blocks.4.{point}"
        out = model.run_with_hooks(some, fwd_hooks=[(name, lambda value, hook: cache[hook.name])])
    torch.testing.assert_close(out, logits, rtol=0, atol=2e-6)


def test_stopping_returns_the_stream_and_runs_nothing_after_it(mini, images):
    model = mini()
    some = images(model)
    ran = []
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(model.model.blocks)]
    with torch.no_grad():
        _, cache = model.run_with_cache(some)
        ran.clear()
        for stop, expected in (
            (0, "hook_full_embed"),
            (3, "blocks.3.hook_resid_pre"),
            (-1, "blocks.11.hook_resid_pre"),
        ):
            out, part = model.run_with_cache(some, stop_at_layer=stop)
            assert torch.equal(out, cache[expected])
            assert list(ran) == list(range(stop % 12))
            assert not any(name.startswith(f"blocks.{stop % 12}.") for name in part)
            ran.clear()
        assert torch.equal(model(some, stop_at_layer=12), cache["resid_post", -1])
    for handle in handles:
        handle.remove()


def test_explicit_attention_and_training_mode_of_a_users_network_are_left_alone():
    net = build("vit_tiny_patch16_224", depth=2)
    before = {module: dict(module.__dict__) for module in net.modules()}
    model = hooked(net)
    model.run_with_cache(torch.rand(1, 3, 32, 32))
    model.close()
    for module, had in before.items():
        assert module.__dict__.keys() == had.keys()
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_other_precisions_and_inference_mode(network):
    model, some = network("vit_tiny_patch16_224")
    with torch.inference_mode():
        plain = model.module(some)
        assert torch.equal(model.run_with_hooks(some, [(every, identity)]), plain)
        assert not torch.equal(
            model.run_with_hooks(some, [("blocks.1.hook_resid_mid", lambda x, hook: x.mul_(2))]), plain
        )
    half = hooked(build("vit_tiny_patch16_224").bfloat16())
    with torch.no_grad():
        logits, cache = half.run_with_cache(some.bfloat16())
        assert torch.equal(logits, half.module(some.bfloat16())) and cache["z", 1].dtype == torch.bfloat16
        rewritten = half.run_with_hooks(some, [(every, lambda value, hook: value.clone())])
    torch.testing.assert_close(rewritten, logits, rtol=0.05, atol=0.05)


def test_a_closed_model_says_so():
    model = hooked(build("vit_tiny_patch16_224"))
    model.close()
    with pytest.raises(UserError, match="were closed"):
        model(torch.rand(1, 3, 32, 32))
