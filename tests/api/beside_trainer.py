"""A training loop of a user's own with ``attach``, beside atdiag's trainer."""

from dataclasses import replace

import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import nn

from atdiag.api.attaching import attach
from atdiag.core.runs import Store
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed, Teacher, Transfer
from atdiag.data import sources
from atdiag.data.loader import Stream
from atdiag.networks.model import students
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


def plain() -> nn.Module:
    """Return timm's ViT with the architecture of ``PLAIN``, without a word on its pixels."""
    return timm.models.VisionTransformer(
        img_size=20, patch_size=4, in_chans=1, embed_dim=16, depth=3, num_heads=2, num_classes=10
    )


def assert_step_for_step(tmp_path, network: Network, transfer: Transfer, options: dict) -> None:
    """Assert that both train the same weights in float64, at every step.

    Weights that no gradient reaches are left out: a fused projection's weight decay still moves those of q and k.
    """
    dtype = torch.float64
    teacher = students.build(network, 99).eval().requires_grad_(False).to(dtype)
    spec = RunSpec(
        network=PLAIN,
        teacher=Teacher(name="deit_s", profile="mini", network=network, sha256="0" * 64),
        transfer=transfer,
        data=Data(train=16 * STEPS, test_per_source=1),
        recipe=RECIPE,
        seed=Seed(data=0, model=0),
    )
    trainer = RunTrainer(Store(tmp_path).create(spec), spec, teacher, {}, STEPS, torch.device("cpu"))
    trainer.student.to(dtype)
    mean, std = (torch.tensor(x).to(dtype).view(1, -1, 1, 1) for x in (PLAIN.mean, PLAIN.std))

    heads = {}
    if transfer.teacher_heads == "different":
        first = sources.find(spec.data).train_split(spec.data, 0).batch(0, evaluation.COMPARED_IMAGES)
        pixels = torch.from_numpy(first).to(dtype) / 255
        options = {**options, "examples": (pixels - mean) / std}
        heads = evaluation.differing_heads(teacher, PLAIN, transfer, [pixels])
        assert heads == evaluation.chosen_heads(spec, teacher.float())
        teacher.to(dtype)

    student = plain()
    student.load_state_dict(trainer.student.state_dict())
    student.to(dtype)
    groups = param_groups_weight_decay(
        student, RECIPE.weight_decay, no_weight_decay_list=tuple(student.no_weight_decay())
    )
    optimizer = torch.optim.AdamW(groups, lr=RECIPE.lr, betas=RECIPE.betas, fused=True)
    pair = attach(student.train(), teacher, transfer.method, mean=PLAIN.mean, std=PLAIN.std, **options)
    assert pair.transfer == transfer and pair.heads == heads

    for step, batch in enumerate(Stream(spec.data, RECIPE, 0).batches(0, STEPS, 0)):
        batch = batch.to(torch.device("cpu"))
        batch = replace(batch, images=batch.images.to(dtype))
        shown = evaluation.show(teacher, batch.images, of_teacher([transfer]))
        trainer.advance(batch, evaluation.fit(shown, teacher, PLAIN, transfer, heads))

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
            if transfer.method == "copy" and ".qkv." in name and "heads" not in options:
                kept = {"map": (2,), "k": (0, 2)}[transfer.tensor]
                one, other = (torch.stack([x.chunk(3)[i] for i in kept]) for x in (one, other))
            # The gradient of k's bias is zero but for rounding, which Adam makes larger.
            assert (one - other).abs().max() < (1e-11 if name.endswith("qkv.bias") else 1e-13), (step, name)
    assert step == STEPS - 1
