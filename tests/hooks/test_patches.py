"""Patching over many images: against single runs, with a teacher's values and with other images."""

import numpy as np
import pytest
import torch

from atdiag import hooked, patching
from atdiag.core.errors import UserError
from atdiag.hooks import patches


def test_effects_equal_single_runs_in_any_batch(subject, pictures):
    a, b = subject(0), subject(1)
    some = pictures(a, 5)
    found = patches.patch(a, b, some, what="pattern", by="head", layers=(0, 2), batch=2)
    whole = patches.patch(a, b, some, what="map", by="head", layers=(0, 2), batch=5)
    np.testing.assert_allclose(found.after, whole.after, rtol=1e-4, atol=1e-5)
    images = next(some.batches(5)).pixels
    mine, theirs = hooked(a), hooked(b)
    with torch.no_grad():
        _, cache = theirs.run_with_cache(images)
        for i, layer in enumerate((0, 2)):
            for head in range(3):

                def put(value, hook, head=head):
                    value[:, head] = cache[hook.name][:, head]
                    return value

                logits = mine.run_with_hooks(images, [(f"blocks.{layer}.attn.hook_pattern", put)])
                own = logits[range(5), some.labels]
                expected = own - (logits.sum(-1) - own) / 9
                np.testing.assert_allclose(whole.after[i, head], expected, rtol=1e-4, atol=1e-5)
    frame = whole.frame()
    assert len(frame) == 6 and list(frame["head"]) == [0, 1, 2] * 2
    d = whole.after[1, 2] - whole.before
    half = 2.7764 * d.std(ddof=1) / np.sqrt(5)  # Student's t, 4 degrees of freedom
    assert frame.change[5] == pytest.approx(d.mean()) and frame.ci_high[5] == pytest.approx(d.mean() + half, rel=1e-3)


@pytest.mark.parametrize(
    ("what", "by"), [("z", "head"), ("resid_pre", "position"), ("resid_mid", "layer"), ("q", "layer")]
)
def test_a_networks_own_values_change_nothing_and_other_images_do(what, by, subject, pictures):
    a = subject()
    some, others = pictures(a, 4), pictures(a, 4, seed=1)
    own = patches.patch(a, a, some, what=what, by=by, layers=(1,))
    assert np.abs(own.change).max() < 1e-5
    assert np.abs(patches.patch(a, a, some, what=what, by=by, layers=(1,), others=others).change).max() > 1e-4


def test_the_whole_stream_of_another_run_gives_its_output(subject, pictures):
    a = subject()
    some, others = pictures(a, 4), pictures(a, 4, seed=1)
    found = patches.patch(a, a, some, what="resid_post", by="layer", layers=(2,), others=others, measure="loss")
    with torch.no_grad():
        logits = a.module(next(others.batches(4)).pixels)
    expected = torch.nn.functional.cross_entropy(logits, torch.as_tensor(some.labels), reduction="none")
    np.testing.assert_allclose(found.after[0, 0], expected, rtol=1e-4, atol=1e-5)


def test_a_teachers_registers_are_sliced_off(pair, pictures):
    from atdiag.analysis import subjects

    student, teacher = (subjects.of(net, name) for net, name in zip(pair, ("student", "teacher"), strict=True))
    some = pictures(student, 3)
    images = next(some.batches(3)).pixels
    with torch.no_grad():
        _, cache = hooked(teacher).run_with_cache(images, ["blocks.1.attn.hook_pattern", "blocks.1.hook_resid_pre"])
    fitted = patching.aligned(cache, hooked(student))
    kept = [0, *range(3, 28)]
    p = cache["pattern", 1][..., kept, :][..., kept]
    torch.testing.assert_close(fitted["pattern", 1], p / p.sum(-1, keepdim=True))
    assert torch.equal(fitted["resid_pre", 1], cache["resid_pre", 1][:, kept])
    assert patches.patch(student, teacher, some, what="pattern", by="position", layers=(1,)).after.shape == (1, 26, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"what": "patern"}, "did you mean 'pattern'"),
        ({"by": "heads"}, "did you mean 'head'"),
        ({"what": "resid_pre"}, "resid_pre has no heads"),
        ({"measure": "acc"}, "is not one of margin, top1, loss"),
        ({"layers": (3,)}, "layer 3 is out of range"),
        ({"what": "rot_q"}, "has no rotary embedding"),
    ],
)
def test_wrong_input_is_refused_in_one_line(options, message, subject, pictures):
    a = subject()
    with pytest.raises(UserError, match=message):
        patches.patch(a, subject(1), pictures(a, 2), **options)


def test_caches_that_do_not_fit_are_refused(subject, pictures):
    a = subject()
    mine = hooked(a)
    x = next(pictures(a, 3).batches(3)).pixels
    with torch.no_grad():
        _, cache = mine.run_with_cache(x[:2])
        _, part = mine.run_with_cache(x, "hook_embed")
    for own, message in ((cache, "cache as many images"), (part, "is not in the cache")):
        with pytest.raises(UserError, match=message):
            patching.get_act_patch_attn_head_out_all_pos(mine, x, own, lambda logits: 0.0)
    with pytest.raises(UserError, match="one of the two"):
        patching.generic_activation_patch(mine, x, cache, float, patching.layer_pos_patch_setter, "z")


def test_every_function_has_its_axes(subject, pictures):
    mine = hooked(subject())
    x = next(pictures(mine.subject, 2).batches(2)).pixels
    with torch.no_grad():
        _, cache = mine.run_with_cache(x.flip(0))

    def metric(logits):
        return logits[0, 0]

    heads = patching.get_act_patch_attn_head_all_pos_every(mine, x, cache, metric, layers=[0])
    assert heads.shape == (5, 1, 3) and heads.std() > 0
    import pandas as pd

    table = pd.DataFrame({"layer": [0, 2], "head": [1, 2]})
    rows, back = patching.generic_activation_patch(
        mine, x, cache, metric, patching.layer_head_vector_patch_setter, "z", index_df=table, return_index_df=True
    )
    assert rows.shape == (2,) and back is table and rows[0] == pytest.approx(float(heads[0, 0, 1]), rel=1e-5)
