"""Masked autoencoding: what is hidden, the loss against numpy, and a run that sees no label, resumed bit for bit."""

import numpy as np
import pytest
import torch

from atdiag.core.errors import UserError
from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.core.spec import Data, Masked, Network, Recipe, RunSpec, Seed, Transfer
from atdiag.networks.model import students
from atdiag.networks.model.vit import ViT
from atdiag.networks.registry import stored, teachers
from atdiag.networks.weights import files, loading
from atdiag.study.builder import Lab
from atdiag.study.settings import resolve
from atdiag.training import cohort, masked, pretraining
from atdiag.transfer.attention import AttentionOverride

NETWORK = Network(
    image_size=20, patch_size=4, channels=1, width=16, depth=2, heads=2, classes=10, mean=(0.18,), std=(0.33,)
)
BIASED = NETWORK.model_copy(update={"components": ("rel_pos_bias",)})
HOW = Masked(width=8, depth=1, heads=2)
SAMPLES = np.arange(7)


def spec(**more):
    return RunSpec(
        network=NETWORK,
        data=Data(name="digits", train=64, test_per_source=1, clutter=6),
        recipe=Recipe(epochs=2, batch_size=16, lr=3e-3, warmup_epochs=0),
        seed=Seed(data=0, model=0),
        masked=HOW,
        **more,
    )


def test_three_quarters_are_hidden_and_each_image_has_its_own():
    hide = masked.hidden(HOW, NETWORK, 0, 5, SAMPLES)
    assert hide.shape == (7, 25) and set(hide.sum(1).tolist()) == {19}
    assert len({tuple(row.tolist()) for row in hide}) == 7
    assert torch.equal(masked.hidden(HOW, NETWORK, 0, 5, SAMPLES[3:4]), hide[3:4]), "a sample's own, in any batch"
    assert not torch.equal(masked.hidden(HOW, NETWORK, 0, 6, SAMPLES), hide)
    often = torch.stack([masked.hidden(HOW, NETWORK, 0, step, SAMPLES) for step in range(200)]).float().mean((0, 1))
    assert (often - 19 / 25).abs().max() < 0.06  # 1,400 draws: a standard error of 0.011


@pytest.mark.parametrize(("share", "patches", "count"), [(0.75, 25, 19), (0.01, 25, 1), (0.99, 4, 3), (0.5, 4, 2)])
def test_at_least_one_patch_is_hidden_and_one_visible(share, patches, count):
    assert Masked(share=share).hidden(patches) == count


def test_the_loss_is_that_of_normalised_pixels_of_hidden_patches():
    vit, decoder = students.build(NETWORK, 0).double(), masked.Decoder(HOW, NETWORK, 0).double()
    images = torch.rand(7, 1, 20, 20, generator=torch.Generator().manual_seed(0)).double()
    hide = masked.hidden(HOW, NETWORK, 0, 0, SAMPLES)
    predicted = decoder(masked.encode(vit, images, hide), hide).detach().numpy()
    total = []
    for image in range(7):
        for patch in range(25):
            row, column = divmod(patch, 5)
            pixels = images[image, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].numpy().ravel()
            wanted = (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6)
            if hide[image, patch]:
                total.append(((predicted[image, patch] - wanted) ** 2).mean())
    got = masked.loss(vit, decoder, images, hide).detach()
    assert float(got) == pytest.approx(np.mean(total), rel=1e-12)


def test_pixels_may_be_normalised_as_the_network_normalises_images():
    images = torch.rand(7, 1, 20, 20, generator=torch.Generator().manual_seed(0)).double()
    got = masked.targets(NETWORK, images, "of network")
    assert got.shape == (7, 25, 16)
    wanted = (images[3, 0, 8:12, 4:8].numpy() - 0.18) / 0.33
    np.testing.assert_allclose(got[3, 11].numpy().reshape(4, 4), wanted, rtol=1e-12)


def test_fixed_positions_are_sines_and_cosines_of_row_and_column():
    network = BIASED.model_copy(update={"components": ("registers",), "registers": 2})
    decoder = masked.Decoder(Masked(width=8, depth=1, heads=2, positions="sincos"), network, 0)
    found = decoder.pos_embed[0].numpy()
    assert not decoder.pos_embed.requires_grad
    assert found.shape == (28, 8) and not found[:3].any()
    row, column = 2, 4
    wanted = [f(place * rate) for place in (row, column) for f in (np.sin, np.cos) for rate in (1.0, 0.01)]
    np.testing.assert_allclose(found[3 + 5 * row + column], wanted, rtol=1e-6)
    with pytest.raises(ValueError, match="multiple of 4"):
        Masked(width=6, heads=2, positions="sincos")


def test_hidden_pixels_do_not_reach_the_prediction():
    vit, decoder = students.build(NETWORK, 0), masked.Decoder(HOW, NETWORK, 0)
    images = torch.rand(7, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    hide = masked.hidden(HOW, NETWORK, 0, 0, SAMPLES)
    cover = hide.view(7, 1, 5, 5).repeat_interleave(4, 2).repeat_interleave(4, 3)
    one = decoder(masked.encode(vit, images, hide), hide)
    assert torch.equal(one, decoder(masked.encode(vit, torch.where(cover, 1 - images, images), hide), hide))
    assert not torch.equal(one, decoder(masked.encode(vit, torch.where(cover, images, 1 - images), hide), hide))
    place = hide[0].nonzero()[0]
    moved = decoder(masked.encode(vit, images, hide), hide)[0, place]
    assert not torch.equal(moved, one[0, hide[0].nonzero()[1]]), "hidden patches differ by their position"


@pytest.mark.parametrize("network", [NETWORK, BIASED], ids=["plain", "rel_pos_bias"])
def test_where_nothing_is_hidden_from_it_the_encoder_is_the_network(network):
    vit = students.build(network, 0).eval()
    if network is BIASED:
        _draw_biases(vit)
    images = torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    none = torch.zeros(2, 25, dtype=torch.bool)
    torch.testing.assert_close(masked.encode(vit, images, none), vit.norm(vit.blocks(vit.embed(images))))


def _draw_biases(vit):
    for i, block in enumerate(vit.blocks):
        for table in block.attn.rel_pos_bias.parameters():
            torch.nn.init.normal_(table, generator=torch.Generator().manual_seed(i))


def test_visible_patches_keep_the_bias_of_their_places():
    """Oracle: the whole network in which no token attends to a hidden patch."""
    vit = students.build(BIASED, 0).double().eval()
    _draw_biases(vit)
    images = torch.rand(7, 1, 20, 20, generator=torch.Generator().manual_seed(0)).double()
    hide = masked.hidden(HOW, BIASED, 0, 0, SAMPLES)
    got = masked.encode(vit, images, hide)
    for image in range(7):
        never = torch.cat([torch.zeros(1, dtype=torch.bool), hide[image]])
        x = vit.embed(images[image : image + 1])
        for block in vit.blocks:
            qk = block.peek(x).qk
            bias = qk.bias.masked_fill(never, -torch.inf)
            x = block(x, AttentionOverride("map", qk._replace(bias=bias)))
        torch.testing.assert_close(got[image], vit.norm(x)[0, ~never])


def test_a_run_sees_no_label_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    def train(folder, stops=()):
        asked = []

        def stop():
            asked.append(1)
            return len(asked) in stops

        store = Store(tmp_path / folder)
        status = cohort.train([spec()], store, loading.load, ExecutionOptions(device="cpu"), should_stop=stop)
        return store.run(spec()), status[spec().id]

    whole, status = train("whole")
    assert status == "finished" and whole.result()["top1"] > 0
    assert train("parts", {3})[1] == "interrupted"
    part, status = train("parts")
    assert status == "finished"
    before, after = files.tensors(whole.weights), files.tensors(part.weights)
    assert before.keys() == ViT(NETWORK).state_dict().keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    from atdiag.training import linear_head

    monkeypatch.setattr(linear_head, "fit", lambda *_: None)  # only the probe's head reads labels
    import dataclasses

    from atdiag.data.loader import Batch

    def without_labels(batch, device, to=Batch.to):
        return dataclasses.replace(to(batch, device), labels=torch.zeros_like(batch.labels))

    monkeypatch.setattr(Batch, "to", without_labels)
    blind, _ = train("blind")
    blind = files.tensors(blind.weights)
    assert all(torch.equal(blind[name], before[name]) for name in before if not name.startswith("head."))

    path = tmp_path / "made.safetensors"
    pretraining.export(whole, path)
    teacher = teachers.teacher(stored.reference(path), "mini")
    assert teacher.network == NETWORK.model_copy(update={"classes": 1})
    reference = Lab(resolve("mini", 1, ["data.train=64", "data.test_per_source=1"], tmp_path)).reference(teacher)
    assert reference.probed and "none" in reference.head.how
    loaded = loading.load(teacher).state_dict()
    assert torch.equal(loaded["blocks.1.attn.qkv.weight"], before["blocks.1.attn.qkv.weight"].half().float())


def test_what_cannot_be_masked_is_refused():
    with pytest.raises(UserError, match="did you mean 'mae'"):
        pretraining.spec("deit_b", "mea")
    with pytest.raises(UserError, match=r"rope.*deit_b"):
        pretraining.spec("eva02_s", "mae")
    with pytest.raises(UserError, match="specimen"):
        pretraining.spec("hub", "mae")
    with pytest.raises(ValueError, match="not mixed"):
        RunSpec(**{**spec().model_dump(), "recipe": Recipe(epochs=1, mixup=0.8)})
    with pytest.raises(ValueError, match="without a transfer"):
        teacher = loading.shipped("deit_s")
        RunSpec(**{**spec().model_dump(), "teacher": teacher, "transfer": Transfer(method="copy", layers=(0,))})
    assert pretraining.spec("deit_b", "supervised") == pretraining.spec("deit_b")
    assert pretraining.spec("deit_b", "mae").masked == pretraining.MASKED


def test_another_length_and_seed():
    made = pretraining.spec("deit_b", scenes=500, epochs=2, seed=7)
    usual = pretraining.spec("deit_b")
    assert (made.data.train, made.recipe.epochs, made.seed) == (500, 2, Seed(data=7, model=7))
    assert made.network == usual.network and made.id != usual.id
    assert pretraining.spec("deit_b", scenes=usual.data.train, epochs=usual.recipe.epochs) == usual
