"""Gradients at hook points, through hooks, and into caches."""

import pytest
import torch
import torch.nn.functional as F

from atdiag.core.errors import UserError


def metric(logits):
    return logits[:, 3].sum()


def test_cached_gradients_equal_autograd(mini, images):
    model = mini("dinov2_s")
    some = images(model)
    names = ["hook_pos_embed", "hook_full_embed", "blocks.2.hook_resid_mid", "blocks.2.attn.hook_pattern"]
    names += ["blocks.2.attn.hook_z", "blocks.2.mlp.hook_post", "blocks.2.ln1.hook_scale", "unembed.hook_out"]
    _, cache = model.run_with_cache(some, names, incl_bwd=True, metric=metric)
    assert set(cache) == {*names, *(f"{name}_grad" for name in names)}
    for name in names:
        kept = {}

        def leaf(value, hook, kept=kept):
            kept["x"] = value.detach().clone().requires_grad_()
            return kept["x"].clone()

        metric(model.run_with_hooks(some, fwd_hooks=[(name, leaf)])).backward()
        torch.testing.assert_close(cache[f"{name}_grad"], kept["x"].grad, rtol=1e-3, atol=1e-6)
    assert torch.equal(cache["unembed.hook_out_grad"], F.one_hot(torch.tensor([3, 3]), 10).float())
    assert all(parameter.grad is None for parameter in model.module.parameters())
    assert cache["pattern", 2].abs().sum() > 0 and not cache["pattern", 2].requires_grad


def test_gradients_of_a_direction_equal_finite_differences(mini, images):
    model = mini()
    some = images(model).double()
    model.module.double()
    name = "blocks.4.attn.hook_pattern"
    try:
        _, cache = model.run_with_cache(some, name, incl_bwd=True, metric=metric)
        direction = torch.rand(cache[name].shape, generator=torch.Generator().manual_seed(1)).double()

        def at(step):
            with torch.no_grad():
                hook = [(name, lambda value, hook: value + step * direction)]
                return metric(model.run_with_hooks(some, fwd_hooks=hook))

        slope = (at(1e-5) - at(-1e-5)) / 2e-5
        torch.testing.assert_close((cache[f"{name}_grad"] * direction).sum(), slope, rtol=1e-5, atol=1e-7)
    finally:
        model.module.float()


def test_backward_hooks_see_and_change_the_gradient(mini, images):
    model = mini()
    some = images(model).requires_grad_()
    seen = []

    def watch(grad, hook):
        seen.append((hook.name, grad.clone()))

    def stop(grad, hook):
        return torch.zeros_like(grad)

    with model.hooks(bwd_hooks=[("blocks.3.hook_resid_post", watch), ("blocks.3.hook_resid_post", stop)]):
        metric(model(some)).backward()
    assert seen[0][0] == "blocks.3.hook_resid_post" and seen[0][1].abs().sum() > 0
    assert (some.grad == 0).all()
    assert not model.hook_dict["blocks.3.hook_resid_post"].has_hooks()
    metric(model(some)).backward()
    assert some.grad.abs().sum() > 0


def test_gradients_flow_through_values_that_a_hook_keeps(mini, images):
    model = mini()
    some = images(model).requires_grad_()
    kept = {}

    def keep(value, hook):
        value.retain_grad()
        kept[hook.name] = value

    names = ["blocks.5.attn.hook_pattern", "blocks.5.attn.hook_q", "blocks.5.ln2.hook_normalized"]
    metric(model.run_with_hooks(some, fwd_hooks=[(name, keep) for name in names])).backward()
    _, cache = model.run_with_cache(some, names, incl_bwd=True, metric=metric)
    for name in names:
        torch.testing.assert_close(kept[name].grad, cache[f"{name}_grad"])


def test_no_grad_is_respected(mini, images):
    model = mini()
    some = images(model)
    with torch.no_grad():
        assert not model.run_with_hooks(
            some, fwd_hooks=[(lambda name: True, lambda value, hook: value * 1)]
        ).requires_grad
        with pytest.raises(UserError, match="outside torch"):
            model.run_with_cache(some, incl_bwd=True, metric=metric)
    assert torch.is_grad_enabled()
    with pytest.raises(UserError, match="give a metric"):
        model.run_with_cache(some, incl_bwd=True)
    assert not any(point.has_hooks() for point in model.hook_points())
