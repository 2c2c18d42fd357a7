"""Attention transfer in a training loop of one's own, beside atdiag's trainer and the definitions."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import nn

import atdiag
from atdiag.api.attaching import attach
from atdiag.core.errors import UserError
from atdiag.core.runs import Store
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed, Teacher, Transfer
from atdiag.data.loader import Stream
from atdiag.networks.model import students
from atdiag.networks.model.vit import ViT
from atdiag.networks.timm import conversion
from atdiag.training import evaluation
from atdiag.training.trainer import RunTrainer
from atdiag.transfer.observation import of_teacher

PLAIN = Network(image_size=20, patch_size=4, channels=1, width=16, depth=3, heads=2, classes=10, mean=(0.2,))
NATIVE = Network.model_validate(
    {
        **PLAIN.model_dump(),
        "components": ("layer_scale", "registers", "rel_pos_bias"),
        "layer_scale_init": 0.5,
        "registers": 3,
    }
)
RECIPE = Recipe(epochs=1, batch_size=16, warmup_epochs=0.5, label_smoothing=0.1)
STEPS = 5
SMALL = {"img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}


def plain(**changed) -> nn.Module:
    """Return timm's ViT with the architecture of ``PLAIN``, without a word on its pixels."""
    sizes = {"img_size": 20, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 3, "num_heads": 2}
    return timm.models.VisionTransformer(**{**sizes, "num_classes": 10, **changed})


def small(name="vit_tiny_patch16_224", seed=0, **changed) -> nn.Module:
    """Return a small network of timm's with maps that are far from uniform."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**SMALL, **changed})
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.15)
    for name, parameter in model.named_parameters():
        if "gamma" in name:  # LayerScale
            nn.init.constant_(parameter, 0.5)
    return model


def images(side=32, seed=1) -> torch.Tensor:
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(seed))


# --- beside our trainer ----------------------------------------------------------------------------------------------


def ours(tmp_path, transfer, teacher) -> RunTrainer:
    """Return the trainer of a run with this transfer."""
    spec = RunSpec(
        network=PLAIN,
        teacher=Teacher(name="deit_s", profile="mini", network=NATIVE, sha256="0" * 64),
        transfer=transfer,
        data=Data(train=16 * STEPS, test_per_source=1),
        recipe=RECIPE,
        seed=Seed(data=0, model=0),
    )
    return RunTrainer(Store(tmp_path).create(spec), spec, teacher, {}, STEPS, torch.device("cpu"))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("distill", {"weight": 3.0}),
        ("distill", {"layers": (0, 2), "loss": "mse", "reduce": "mean"}),
        ("distill", {"heads": (1,), "average": "queries", "loss": "jsd"}),
        ("copy", {}),
        ("copy", {"layers": (1, 2), "heads": (0,)}),
        ("copy", {"tensor": "k"}),
    ],
)
def test_a_plain_loop_equals_our_trainer_step_for_step(tmp_path, method, options):
    """Weights that no gradient reaches are left out: a fused projection's weight decay still moves those of q and k."""
    dtype = torch.float64
    given = {"layers": tuple(range(3)), **options}
    teacher = students.build(NATIVE, 99).eval().requires_grad_(False).to(dtype)
    trainer = ours(tmp_path, Transfer(method=method, **given), teacher)
    trainer.student.to(dtype)

    student = plain()
    student.load_state_dict(trainer.student.state_dict())
    student.to(dtype)
    groups = param_groups_weight_decay(
        student, RECIPE.weight_decay, no_weight_decay_list=tuple(student.no_weight_decay())
    )
    optimizer = torch.optim.AdamW(groups, lr=RECIPE.lr, betas=RECIPE.betas, fused=True)
    pair = attach(student.train(), teacher, method, mean=PLAIN.mean, std=PLAIN.std, **options)

    stream = Stream(trainer.spec.data, RECIPE, 0)
    for step, batch in enumerate(stream.batches(0, STEPS, 0)):
        batch = batch.to(torch.device("cpu"))
        batch = replace(batch, images=batch.images.to(dtype))
        shown = teacher.observe(batch.images, of_teacher([trainer.spec.transfer]))
        trainer.advance(batch, evaluation.fit(shown, teacher, PLAIN))

        mean, std = (torch.tensor(x).to(dtype).view(1, -1, 1, 1) for x in (PLAIN.mean, PLAIN.std))
        logits = student((batch.images - mean) / std)
        loss = F.cross_entropy(logits.float(), batch.labels, label_smoothing=0.1) + pair.loss
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), RECIPE.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = trainer.optimizer.param_groups[0]["lr"]
        optimizer.step()
        optimizer.zero_grad()

        expected, found = trainer.student.state_dict(), student.state_dict()
        assert expected.keys() == found.keys()
        for name in found:
            one, other = expected[name], found[name]
            if method == "copy" and ".qkv." in name and "heads" not in options:
                kept = {"map": (2,), "k": (0, 2)}[options.get("tensor", "map")]
                one, other = (torch.stack([x.chunk(3)[i] for i in kept]) for x in (one, other))
            # The gradient of k's bias is zero but for rounding, which Adam makes larger.
            assert (one - other).abs().max() < (1e-11 if name.endswith("qkv.bias") else 1e-13), (step, name)
    assert step == STEPS - 1


# --- against the definitions -----------------------------------------------------------------------------------------

KINDS = {
    "plain": ("vit_tiny_patch16_224", {"patch_size": 8}),
    "clip": ("vit_base_patch16_clip_224", {"patch_size": 8}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 28}),
    "position bias": ("beit_base_patch16_224", {"patch_size": 8}),
    "rope": ("eva02_small_patch14_224", {"img_size": 28, "num_heads": 3}),
    "q/k norm, in parallel": ("vit_base_patch16_xp_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"patch_size": 8}),
    "no class token": ("vit_base_patch16_siglip_224", {"patch_size": 8}),
}


def kind(name: str, seed=0) -> nn.Module:
    model, changed = KINDS[name]
    return small(model, seed, **changed)


def scramble_queries_and_keys(model: nn.Module) -> None:
    """Draw anew all that acts on q and k alone."""
    torch.manual_seed(7)
    with torch.no_grad():
        for block in model.blocks:
            if hasattr(block, "in_proj"):  # MLP, then q, k, v
                width = block.attn_out_proj.in_features
                block.in_proj.weight[-3 * width : -width].normal_(std=0.3)
                continue
            weight = block.attn.qkv.weight
            weight[: 2 * len(weight) // 3].normal_(std=0.3)


@pytest.mark.parametrize("name", KINDS)
def test_copying_gives_the_teachers_output_to_a_student_with_other_queries_and_keys(name):
    teacher = kind(name).eval()
    student = copy.deepcopy(teacher)
    scramble_queries_and_keys(student)
    x = images(teacher.patch_embed.img_size[0])
    before, keys = student(x), list(student.state_dict())
    expected = teacher(x)
    assert (before - expected).abs().max() > 1e-3
    pair = attach(student, teacher, "copy")
    for found in (student(x), pair(x), student.forward_head(student.forward_features(x))):
        assert (found - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    assert pair.loss == 0
    assert list(student.state_dict()) == keys
    assert all(p.requires_grad for p in teacher.parameters())  # the user's module is left as it is
    pair.detach()
    pair.detach()  # a second time does nothing
    assert torch.equal(student(x), before)


@pytest.mark.parametrize("name", KINDS)
def test_the_loss_is_the_cross_entropy_of_the_maps(name):
    """For a student and a teacher whose maps come from timm's own explicit formula."""
    teacher, student = kind(name).eval(), kind(name, seed=3)
    x = images(teacher.patch_embed.img_size[0])

    def maps(model):
        seen, fused = [], []
        places = [getattr(block, "attn", block) for block in model.blocks]
        hooks = [p.attn_drop.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0])) for p in places]
        for place in places:
            fused.append(place.fused_attn)
            place.fused_attn = False
        model(x)
        for hook, place, before in zip(hooks, places, fused, strict=True):
            hook.remove()
            place.fused_attn = before
        return seen

    student.train()
    expected = sum(-(p * q.log()).sum(-1).mean() for p, q in zip(maps(teacher), maps(student), strict=True))
    pair = attach(student, teacher, weight=2.0)
    plainly = student(x)
    assert pair.loss.item() == pytest.approx(2 * expected.item(), rel=1e-4)
    pair.detach()
    assert torch.allclose(student(x), plainly, atol=1e-5)


def test_each_network_sees_the_pixels_under_its_own_normalisation():
    """The student has mean and std 0.5, the teacher ImageNet's: its maps are those of its own normalised images."""
    teacher, student = small("deit_tiny_patch16_224", patch_size=8), small(patch_size=8, seed=2)
    pixels = torch.rand(4, 3, 32, 32)
    mean, std = (torch.tensor(teacher.pretrained_cfg[n]).view(1, 3, 1, 1) for n in ("mean", "std"))
    assert teacher.pretrained_cfg["mean"] != student.pretrained_cfg["mean"]
    ours = conversion.teacher_from(copy.deepcopy(teacher))
    expected = ours.maps(pixels, [2])[2]
    pair = attach(student, teacher)
    found = pair._shown((pixels - 0.5) / 0.5).seen[2].qk
    assert (found.q - expected.q).abs().max() < 1e-4 and (found.k - expected.k).abs().max() < 1e-4
    pair.detach()
    own = attach(student, teacher, mean=teacher.pretrained_cfg["mean"], std=teacher.pretrained_cfg["std"])
    assert torch.equal(own._shown((pixels - mean) / std).seen[2].qk.q, expected.q)


# --- a loop as people write it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["copy", "distill"])
def test_a_loop_in_the_style_of_timms_script(method):
    """timm's optimiser factory, schedule, average of the weights, compilation and autocast: the loss falls."""
    from timm.optim import create_optimizer_v2

    teacher = small(patch_size=8).eval()
    student = timm.create_model("vit_tiny_patch16_224", **SMALL, patch_size=8)
    optimizer = create_optimizer_v2(student, opt="adamw", lr=2e-3, weight_decay=0.05)
    pair = atdiag.attach(student, teacher, method=method)
    average = ModelEmaV3(student, decay=0.5)
    model = torch.compile(student, backend="eager")
    x, labels = images(), torch.tensor([0, 1, 2, 3])
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        loss = F.cross_entropy(output.float(), labels) + pair.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(student)
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(map(torch.isfinite, map(torch.tensor, losses)))
    model.eval()
    with torch.no_grad():
        out = model(x)
        assert pair.loss == 0 and torch.equal(out, student(x))
        averaged = average.module(x)  # has the teacher's maps under copy, too
    fresh = timm.create_model("vit_tiny_patch16_224", **SMALL, patch_size=8).eval()
    fresh.load_state_dict(average.module.state_dict())
    if method == "distill":
        assert torch.allclose(fresh(x), averaged, atol=1e-6)
    else:
        attach(fresh, teacher, "copy")
        assert torch.allclose(fresh(x), averaged, atol=1e-6)
    assert set(student.state_dict()) == set(fresh.state_dict())


def test_a_student_of_ours_and_a_teacher_by_name():
    student = students.build(Network.model_validate({**_clip(), "components": ()}), 0)
    pixels = torch.rand(2, 1, 20, 20)
    own = student(pixels)
    pair = atdiag.attach(student, "clip_b", layers="top:2")
    assert torch.allclose(student(pixels), own) and pair.loss > 0
    pair.detach()
    assert torch.equal(student(pixels), own) and isinstance(student, ViT)


def _clip() -> dict:
    from atdiag.networks.registry import teachers

    return teachers.miniature_network("clip_b").model_dump()


def test_a_student_inside_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        teacher, student = small(patch_size=8).eval(), small(patch_size=8, seed=2)
        alone, x = copy.deepcopy(student), images()
        model = nn.parallel.DistributedDataParallel(student)
        pair, other = attach(model, teacher), attach(alone, teacher)
        (model(x).sum() + pair.loss).backward()
        (alone(x).sum() + other.loss).backward()
        for one, two in zip(student.parameters(), alone.parameters(), strict=True):
            assert torch.allclose(one.grad, two.grad, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        ({"patch_size": 16}, {}, r"token grids differ: the student has 2 x 2 patches \(32 px in steps of 16\)"),
        ({"num_heads": 6}, {}, "the student has 6 heads, the teacher 3"),
        ({"depth": 2}, {}, "the student has 2 blocks, the teacher 3: give layers=.* teacher_layers"),
        (
            {"class_token": False, "global_pool": "avg"},
            {},
            "token grids differ: .* no class token, the teacher .* a class token",
        ),
        ({"reg_tokens": 2}, {}, "the student has 2 registers"),
        ({"patch_drop_rate": 0.5}, {}, "drops patches"),
        ({"attn_drop_rate": 0.1}, {}, "drops attention weights"),
        ({}, {"method": "kopy"}, "method 'kopy', did you mean 'copy'"),
        ({}, {"method": "copy", "weight": 1.0}, "copy has no loss"),
        ({}, {"layers": (3,)}, "3 is out of range"),
        ({}, {"teacher_layers": (0, 1)}, "teacher_layers names 2 blocks for the 3"),
        ({}, {"loss": "cee"}, "loss"),
        ({"embed_dim": 96}, {"tensor": "q"}, "passes only between equal widths: the student has 96, the teacher 48"),
    ],
)
def test_what_does_not_fit_is_named(student, options, message):
    with pytest.raises(UserError, match=message):
        attach(small(**{"patch_size": 8, **student}), small(patch_size=8), **options)


def test_other_misuse_is_named():
    student, teacher = small(patch_size=8), small(patch_size=8)
    with pytest.raises(UserError, match="Linear can't be a student: it has no self-attention"):
        attach(nn.Linear(2, 2), teacher)
    with pytest.raises(UserError, match="can't be a teacher"):
        attach(student, nn.Linear(2, 2))
    with pytest.raises(UserError, match="unknown teacher 'klip_b'"):
        attach(student, "klip_b")
    with pytest.raises(UserError, match="is a miniature for scenes of 20 px"):
        attach(student, "clip_b")
    pair = attach(student, teacher, "copy")
    with pytest.raises(RuntimeError, match="run it first"):
        _ = pair.loss
    with pytest.raises(UserError, match="already has a teacher"):
        attach(student, teacher)
    student.set_grad_checkpointing(True)
    with pytest.raises(UserError, match="gradient checkpointing"):
        student(images())
    student.set_grad_checkpointing(False)
    with pytest.raises(UserError, match="images of 40 x 40 px: this pair takes 32 x 32"):
        student(images(40))


def test_blocks_of_different_depths_are_paired():
    teacher, student = small(patch_size=8, depth=4), small(patch_size=8, depth=2, seed=2)
    pair = attach(student, teacher, layers=(0, 1), teacher_layers=(1, 3))
    student(images())
    both = pair.loss.item()
    pair.detach()
    single = []
    for layer, theirs in ((0, 1), (1, 3)):
        pair = attach(student, teacher, layers=(layer,), teacher_layers=(theirs,))
        student(images())
        single.append(pair.loss.item())
        pair.detach()
    assert both == pytest.approx(sum(single), rel=1e-5)
