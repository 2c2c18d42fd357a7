"""Layer-wise learning rates group by group against timm's, and the cosine after the warm-up against its formula."""

import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay

from atdiag.core.spec import Network, Recipe
from atdiag.networks.model import students
from atdiag.training import trainer

NETWORK = Network(image_size=8, patch_size=4, channels=1, width=16, depth=3, heads=2, classes=4)
CPU = torch.device("cpu")


def scales(groups, model):
    """Parameter -> its learning rate's factor and its weight decay, q, k and v as one."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    out = {}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            for part in ("q", "k", "v"):
                name = name.replace(f".attn.{part}_", ".attn.qkv.")
            out.setdefault(name, set()).add((group["lr_scale"], group["weight_decay"]))
    return {name: found.pop() for name, found in out.items() if len(found) == 1}


def test_each_group_is_timms():
    vit = students.build(NETWORK, 0)
    theirs = VisionTransformer(img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=3, num_heads=2, num_classes=4)
    own = trainer._optimizer(vit, Recipe(epochs=1, layer_decay=0.75, weight_decay=0.1), CPU)
    wanted = param_groups_layer_decay(theirs, 0.1, theirs.no_weight_decay(), layer_decay=0.75)
    found = scales(own.param_groups, vit)
    assert found == scales(wanted, theirs)
    assert found["pos_embed"] == (0.75**4, 0.0) and found["blocks.0.mlp.fc1.weight"] == (0.75**3, 0.1)
    assert found["head.weight"] == (1.0, 0.1) and found["norm.bias"] == (0.75, 0.0)


def rates(recipe, steps, per_epoch):
    optimizer = trainer._optimizer(students.build(NETWORK, 0), recipe, CPU)
    schedule = trainer._schedule(optimizer, recipe, steps, per_epoch)
    out = []
    for step in range(steps):
        schedule.step_update(step)
        out.append([group["lr"] for group in optimizer.param_groups])
    return out


def test_the_cosine_begins_at_its_peak_after_the_warm_up():
    recipe = Recipe(epochs=20, lr=1.0, min_lr=0.1, warmup_epochs=2, cosine_after_warmup=True)
    found = [one[0] for one in rates(recipe, 100, 5)]
    assert found[:10] == pytest.approx([0.1 + 0.09 * step for step in range(10)])
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * step / 90)) for step in range(90)]
    assert found[10:] == pytest.approx(cosine)
    usual = [one[0] for one in rates(recipe.model_copy(update={"cosine_after_warmup": False}), 100, 5)]
    assert usual[10:] == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * step / 100)) for step in range(10, 100)])


def test_every_rate_is_scaled_the_least_and_the_warm_up_included():
    recipe = Recipe(epochs=20, lr=1.0, min_lr=0.1, warmup_epochs=2, layer_decay=0.5)
    plain = [one[0] for one in rates(recipe.model_copy(update={"layer_decay": None}), 100, 5)]
    optimizer = trainer._optimizer(students.build(NETWORK, 0), recipe, CPU)
    factors = [group["lr_scale"] for group in optimizer.param_groups]
    assert {*factors} == {0.5**n for n in range(5)}
    for found, whole in zip(rates(recipe, 100, 5), plain, strict=True):
        assert found == pytest.approx([factor * whole for factor in factors])


def test_what_changes_nothing_is_the_same_recipe():
    assert Recipe(epochs=1, layer_decay=1.0) == Recipe(epochs=1)
    assert Recipe(epochs=1, warmup_epochs=0, cosine_after_warmup=True) == Recipe(epochs=1, warmup_epochs=0)
