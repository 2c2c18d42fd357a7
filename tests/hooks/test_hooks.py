"""Hooks: order, levels, in-place changes, caches within hooks, wrong input, and nothing left after errors."""

import warnings

import numpy as np
import pytest
import timm
import torch

import atdiag
from atdiag import hooked
from atdiag.analysis import subjects, tracing
from atdiag.core.errors import UserError
from atdiag.training import evaluation
from atdiag.transfer.methods import Transfer

Z = "blocks.2.attn.hook_z"


def clean(model):
    return not any(point.has_hooks() for point in model.hook_points()) and model.context_level == 0


def test_several_hooks_on_one_point_chain_in_order(mini, images):
    model = mini()
    some = images(model)
    called = []

    def note(word):
        def hook(value, hook):
            called.append(word)
            return value + 1

        return hook

    with torch.no_grad():
        model.add_hook(Z, note("second"))
        model.add_hook(Z, note("first"), prepend=True)
        model.add_perma_hook(Z, note("third"))
        _, cache = model.run_with_cache(some, Z)
        assert called == ["first", "second", "third"]
        model.reset_hooks()
        _, one = model.run_with_cache(some, Z)
        assert called[3:] == ["third"]
        torch.testing.assert_close(cache[Z], one[Z] + 2)
        model.reset_hooks(including_permanent=True)
        assert clean(model)


def test_in_place_changes_count_and_leave_other_points_alone(mini, images):
    model = mini()
    some = images(model)

    def in_place(value, hook):
        value[:, 0] = 0

    with torch.no_grad():
        _, plain = model.run_with_cache(some)
        _, cache = model.run_with_cache(some, fwd_hooks=[("blocks.3.hook_resid_pre", in_place)])
    assert (cache["resid_pre", 3][:, 0] == 0).all()
    assert torch.equal(cache["resid_post", 2], plain["resid_post", 2])


def test_contexts_nest_and_hooks_keep_data(mini, images):
    model = mini()
    some = images(model)

    def count(value, hook):
        hook.ctx["n"] = hook.ctx.get("n", 0) + 1
        assert hook.layer() == 2

    with torch.no_grad(), model.hooks([(Z, count)]):
        with model.hooks([(Z, count)]):
            model(some)
        model(some)
    assert model.hook_dict[Z].ctx["n"] == 3 and clean(model)
    model.reset_hooks()
    assert model.hook_dict[Z].ctx == {}


def test_names_are_short_or_full_and_layers_negative(mini, images):
    model = mini()
    with torch.no_grad():
        _, cache = model.run_with_cache(images(model))
    assert cache["pattern", 5] is cache["blocks.5.attn.hook_pattern"] is cache["pattern5"] is cache["attn", 5]
    assert cache["resid_post", -1] is cache["blocks.11.hook_resid_post"]
    assert cache["scale", 2, "ln1"] is cache["blocks.2.ln1.hook_scale"] is cache["scale2ln1"]
    assert cache["scale"] is cache["ln_final.hook_scale"] and cache["embed"] is cache["hook_embed"]
    assert (
        cache["pre", 1] is cache["blocks.1.mlp.hook_pre"] and cache["out", 1, "attn"] is cache["blocks.1.attn.hook_out"]
    )
    assert len(cache) == len(list(cache.items())) and "hook_embed" in cache
    single = model.run_with_cache(images(model, 1), remove_batch_dim=True)[1]
    assert single["pattern", 0].shape == (2, 26, 26) and not single.has_batch_dim
    assert single.to("cpu")["z", 0].dtype == torch.float32


@pytest.mark.parametrize("names", [Z, [Z, "hook_embed"], lambda name: name.endswith("hook_z")])
def test_filters_choose_points(names, mini, images):
    model = mini()
    with torch.no_grad():
        _, cache = model.run_with_cache(images(model), names)
    expected = (
        {Z}
        if names == Z
        else {Z, "hook_embed"}
        if isinstance(names, list)
        else {f"blocks.{i}.attn.hook_z" for i in range(12)}
    )
    assert set(cache) == expected


def attributions(model, images, classes):
    cache = model.run_with_cache(images)[1]
    return cache.logit_attrs(cache.decompose_resid(), classes)


@pytest.mark.parametrize(("scale", "shift"), [(2.0, -1.0), (255.0, 0.0)])
def test_images_that_are_normalised_already_are_noticed(mini, images, scale, shift):
    model = mini()
    some = images(model)
    with pytest.warns(UserWarning, match=r"takes them in \[0, 1\], and normalises them itself") as warned:
        model(scale * some + shift)
    assert warned[0].filename == __file__
    with warnings.catch_warnings(action="error"):
        model(some)


def test_images_take_the_networks_type(mini, images):
    model = mini()
    some = images(model)
    assert torch.equal(model(some.double()), model(some))


# fmt: off
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m.run_with_cache(x, "blocks.2.attn.hook_zz"), "did you mean 'blocks.2.attn.hook_z'"),
        (lambda m, x: m.run_with_cache(x, [Z, "hook_embedd"]), "did you mean 'hook_embed'"),
        (lambda m, x: m.run_with_cache(x, lambda name: False), "the filter matches no hook point"),
        (lambda m, x: m.run_with_hooks(x, [(lambda name: False, print)]), "the filter matches no hook point"),
        (lambda m, x: m.run_with_hooks(x, [(Z, lambda value, hook: value[:, 1:])]), r"shape \[2, 25, 2, 16\], and the"),
        (lambda m, x: m.run_with_hooks(x, [(Z, lambda value, hook: value.double())]), "dtype torch.float64"),
        (lambda m, x: m.run_with_hooks(x, [(Z, lambda value, hook: value.to("meta"))]), "device meta"),
        (lambda m, x: m.run_with_hooks(x, [(Z, lambda value, hook: 3)]), "returned int: return a tensor"),
        (lambda m, x: m.run_with_hooks(x, [(Z, None)]), "is no function but NoneType"),
        (lambda m, x: m.run_with_hooks(x, [("blocks.12.attn.hook_z", print)]), "out of range: deit_s .mini. has 12"),
        (lambda m, x: m.run_with_hooks(x, [("blocks.2.attn.hook_rot_q", print)]), "has no rotary embedding"),
        (lambda m, x: m.run_with_hooks(x, [(Z, print), ("blocks.2.hook_registers", print)]), "has no registers"),
        (lambda m, x: m.run_with_hooks(x[:, :, :10]), "sees images of 20 x 20 x 1"),
        (lambda m, x: m(np.zeros((2, 1, 20, 20))), "must be a floating-point tensor"),
        (lambda m, x: m((255 * x).to(torch.uint8)), "must be a floating-point tensor"),
        (lambda m, x: m(x, stop_at_layer=13), "stop_at_layer 13 is out of range"),
        (lambda m, x: m.run_with_cache(x, remove_batch_dim=True), "needs a single image, and there are 2"),
        (lambda m, x: m.run_with_cache(x, Z)[1]["z", 12], "layer 12 is out of range"),
        (lambda m, x: m.run_with_cache(x, Z)[1]["pattern", 1], "is not in the cache: name it"),
        (lambda m, x: m.run_with_cache(x, Z)[1].decompose_resid(), "is not in the cache"),
        (lambda m, x: m.run_with_cache(x)[1].decompose_resid(13), "layer 13 is out of range"),
        (lambda m, x: m.run_with_cache(x)[1].bias_attrs(10), "class 10 is out of range"),
        (lambda m, x: attributions(m, x, [1, 2, 3]), "3 classes for 2 images: give one class, or one for each image"),
        (lambda m, x: m.run_with_cache(x)[1].decompose_resid(mode="heads"), "mode is all, mlp or attn"),
        (lambda m, x: m.add_hook(Z, print, dir="up"), "fwd or bwd"),
        (lambda m, x: m.W_gate, "its MLP is not gated"),
        (lambda m, x: hooked(3), "is no network"),
        (lambda m, x: hooked("deit_t"), "deit_s"),
        (lambda m, x: hooked(timm.create_model("resnet18")), "ResNet can't be looked into"),
    ],
)  # fmt: skip
def test_wrong_input_is_named_and_leaves_nothing(call, message, mini, images):
    model = mini()
    some = images(model)
    with torch.no_grad():
        before = model(some)
        with pytest.raises(UserError, match=message):
            call(model, some)
        assert clean(model) and torch.equal(model(some), before)


def test_hooks_are_removed_after_an_exception_of_their_own(mini, images):
    model = mini()
    some = images(model)

    def broken(value, hook):
        raise ZeroDivisionError("mine")

    for run in (model.run_with_hooks, lambda x, fwd_hooks: model.run_with_cache(x, fwd_hooks=fwd_hooks)):
        with pytest.raises(ZeroDivisionError, match="mine"):
            run(some, fwd_hooks=[(Z, lambda value, hook: value * 0), (Z, broken)])
        assert clean(model)
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=5)
    net.blocks[1].attn.fused_attn = False
    own = hooked(net)
    with pytest.raises(ZeroDivisionError):
        own.run_with_hooks(torch.rand(1, 3, 32, 32), [("blocks.1.attn.hook_pattern", broken)])
    assert clean(own) and net.blocks[0].attn.fused_attn and not net.blocks[1].attn.fused_attn


def test_a_block_that_is_not_run_is_named():
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=5)
    model = hooked(net)
    net.blocks[1].forward = lambda x: x
    with pytest.raises(tracing.TracingError, match="layer 1"):
        model.run_with_cache(torch.rand(1, 3, 32, 32), "blocks.1.attn.hook_pattern")


def test_a_copy_student_shows_its_teachers_maps(mini, images):
    student, teacher = mini("deit_s").module, mini("dinov2_reg_s").module
    transfer = Transfer(method="copy", layers=(0, 1))
    model = hooked(subjects.Subject("copy", evaluation.Predictor(student, transfer, teacher), student.network))
    some = images(model)
    with torch.no_grad():
        shown = model.subject.given(some)
        plain = model.module(some, shown)
        logits, cache = model.run_with_cache(some)
        assert torch.equal(logits, plain)
        assert torch.equal(cache["pattern", 0], atdiag.analysis.tracing.ops.probabilities(shown[0].value))
        torch.testing.assert_close(cache["pattern", 0] @ cache["v", 0].transpose(1, 2), cache["z", 0].transpose(1, 2))
        same = model.run_with_hooks(some, [("blocks.1.attn.hook_pattern", lambda value, hook: value.clone())])
        torch.testing.assert_close(same, logits, rtol=1e-4, atol=1e-5)
        none = model.run_with_hooks(some, [("blocks.1.attn.hook_v", lambda value, hook: 0 * value)])
        assert not torch.allclose(none, logits, atol=1e-3)
    with pytest.raises(UserError, match="its map is its teacher's"):
        model.run_with_cache(some, "blocks.0.attn.hook_q")


def test_nnsight_reads_and_writes_the_same_points(mini, images):
    model = mini("clip_b")
    some = images(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(some)
        with model.nnsight.trace(some):
            mid = model.nnsight.save(model.nnsight["resid_mid", 0].output)
            pattern = model.nnsight.save(model.nnsight["pattern", 1].output)
            model.nnsight["blocks.2.attn.hook_z"].output = torch.zeros_like(cache["z", 2])
            out = model.nnsight.save(model.nnsight.output)
        expected = model.run_with_hooks(some, [(Z, lambda value, hook: 0 * value)])
    assert torch.equal(mid, cache["resid_mid", 0]) and torch.equal(pattern, cache["pattern", 1])
    assert torch.equal(out, expected)
    with pytest.raises(UserError, match="has no hook point"):
        model.nnsight["patern", 1]


def test_weights_have_transformerlens_shapes_and_make_the_activations(mini, images):
    model = mini("dinov2_s")
    config = model.cfg
    layers, heads, width, head, hidden = config.n_layers, config.n_heads, config.d_model, config.d_head, config.d_mlp
    for name in "QKV":
        assert getattr(model, f"W_{name}").shape == (layers, heads, width, head)
        assert getattr(model, f"b_{name}").shape == (layers, heads, head)
    assert model.W_O.shape == (layers, heads, head, width) and model.b_O.shape == (layers, width)
    assert model.W_in.shape == (layers, width, hidden) and model.W_out.shape == (layers, hidden, width)
    assert model.W_U.shape == (width, 10) and model.b_U.shape == (10,)
    assert model.W_E.shape == (16, width) and model.W_pos.shape == (26, width) and model.b_E.shape == (width,)
    some = images(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(some)
    net = model.model
    x = cache["normalized", 3, "ln1"] * net.blocks[3].norm1.weight + net.blocks[3].norm1.bias
    for name in "QKV":
        made = torch.einsum("bnc,hcd->bnhd", x, getattr(model, f"W_{name}")[3]) + getattr(model, f"b_{name}")[3]
        torch.testing.assert_close(made, cache[name.lower(), 3], rtol=1e-4, atol=1e-5)
    x = cache["normalized", 3, "ln2"] * net.blocks[3].norm2.weight + net.blocks[3].norm2.bias
    torch.testing.assert_close(x @ model.W_in[3] + model.b_in[3], cache["pre", 3], rtol=1e-4, atol=1e-5)
    patches = (
        ((some - net.mean) / net.std).unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    )
    torch.testing.assert_close(patches @ model.W_E + model.b_E, cache["embed"][:, 1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache["embed"] + model.W_pos, cache["full_embed"])
    torch.testing.assert_close(cache["pos_embed"][0], model.W_pos)
