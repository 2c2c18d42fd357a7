import math
from functools import partial

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.nn import functional as F

from atdiag.core.errors import UserError
from atdiag.core.spec import Data, Init, Recipe, Teacher, Transfer
from atdiag.data.loader import Batch, Stream
from atdiag.networks.model import students
from atdiag.training import branches, trainer
from tests.training.conftest import NETWORK

CPU = torch.device("cpu")


def test_a_run_ends_with_the_same_weights_alone_and_in_a_cohort(bench, alone, assert_same):
    company = bench.company()
    # In another order, and without some of the others.
    for members in (list(company)[::-1], ["copy below", "distill"]):
        here = bench.sibling("-".join(members))
        status = here.train(*(company[name] for name in members))
        assert status == {company[name].id: "finished" for name in members}
        for name in members:
            assert_same(alone, here, company[name])


def test_runs_differ_where_their_arms_differ(alone):
    heads = {name: alone.weights(spec)["head.weight"] for name, spec in alone.company().items()}
    assert not any(torch.equal(heads[a], heads[b]) for a in heads for b in heads if a < b)


def test_the_files_of_a_finished_run(alone):
    for spec in alone.company().values():
        run = alone.run(spec)
        lines, result = run.progress(), run.result()
        assert [line["epoch"] for line in lines] == list(range(1, spec.recipe.epochs + 1))
        assert [line["step"] for line in lines] == [5 * line["epoch"] for line in lines]
        for line in lines:
            assert all(math.isfinite(value) for value in line.values())
            assert ("transfer_loss" in line) == (spec.transfer.method == "distill")
            assert line["loss"] == pytest.approx(line["task_loss"] + line.get("transfer_loss", 0), rel=1e-5)
        with np.load(run.predictions, allow_pickle=False) as saved:
            assert result["top1"] == pytest.approx(100 * np.mean(saved["prediction"] == saved["label"]))
            assert len(np.unique(saved["cluster"])) == len(saved["label"]) == result["test_images"]
            right = saved["prediction"] == saved["label"]
            assert (saved["log_p"][right] >= math.log(0.1) - 1e-6).all()
        assert result["steps"] == lines[-1]["step"]
        assert result["teacher"] == (spec.teacher and "deit_s (mini)")
        assert result["environment"]["threads"] == 1
        assert not run.checkpoint.exists()


# --- The same as plain timm -------------------------------------------------------------------------------------------


class Times(nn.Module):
    """Replace timm's DropPath: multiply by factors set from outside."""

    factor = torch.ones(())

    def forward(self, x):
        return x * self.factor


def plain_timm(spec, steps):
    """Train timm's own VisionTransformer on the run's batches, as a timm user would; weights before and after."""
    network, recipe = spec.network, spec.recipe
    stream = Stream(spec.data, recipe, spec.seed.data)
    norm = partial(nn.LayerNorm, eps=network.norm_eps)
    vit = VisionTransformer(
        img_size=20, patch_size=4, in_chans=1, num_classes=10, embed_dim=16, depth=6, num_heads=2, norm_layer=norm
    )
    start = students.build(network, spec.seed.model).state_dict()
    vit.load_state_dict(start)
    for block in vit.blocks:
        block.attn.fused_attn = False
        block.drop_path1, block.drop_path2 = Times(), Times()
    adamw = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "betas": recipe.betas, "fused": True}
    optimizer = create_optimizer_v2(vit, "adamw", **adamw)
    total, warmup = recipe.epochs * stream.steps_per_epoch, round(recipe.warmup_epochs * stream.steps_per_epoch)
    schedule = CosineLRScheduler(
        optimizer, total, lr_min=recipe.min_lr, warmup_t=warmup, warmup_lr_init=recipe.lr / warmup, t_in_epochs=False
    )
    for step in range(steps):
        batch = stream.batch(step).to(CPU)
        keep = branches.drop_path(recipe.drop_path, 6, spec.seed.model, step, batch.samples)
        if keep is not None:
            for block, (attention, mlp) in zip(vit.blocks, keep, strict=True):
                block.drop_path1.factor, block.drop_path2.factor = attention, mlp
        schedule.step_update(step)
        optimizer.zero_grad()
        logits = vit((batch.images - network.mean[0]) / network.std[0])
        F.cross_entropy(logits, batch.labels, label_smoothing=recipe.label_smoothing).backward()
        if recipe.clip_grad:
            nn.utils.clip_grad_norm_(vit.parameters(), recipe.clip_grad)
        optimizer.step()
    return start, vit.state_dict()


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_transfer_none_equals_plain_timm_training(bench, rate, clip):
    recipe = Recipe(epochs=4, batch_size=16, label_smoothing=0.1, drop_path=rate, warmup_epochs=2, clip_grad=clip)
    spec = bench.spec(recipe=recipe)
    bench.train(spec)
    start, expected = plain_timm(spec, steps=20)
    trained = bench.weights(spec)
    assert trained.keys() == expected.keys()
    for name, value in expected.items():
        assert (value - start[name]).abs().max() > 1e-3, name
        if clip is None:
            assert torch.equal(trained[name], value), name
            continue
        # The gradient norm of separate q, k, v is rounded differently from that of timm's fused tensor. This shows only
        # in k's bias: softmax does not feel it, so its gradient is nothing but rounding, which Adam blows up to size.
        parts = zip("qkv", trained[name].chunk(3), value.chunk(3), strict=True)
        pairs = [(a, b) for n, a, b in parts if n != "k"] if name.endswith("qkv.bias") else [(trained[name], value)]
        assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in pairs), name


def test_drop_path_is_timms():
    rate, samples = 0.4, np.arange(4000)
    factors = branches.drop_path(rate, 5, 0, 7, samples)
    assert factors.shape == (5, 2, 4000, 1, 1)
    timms = VisionTransformer(embed_dim=16, depth=5, num_heads=2, drop_path_rate=rate)
    for block, pair in zip(timms.blocks, factors, strict=True):
        p = getattr(block.drop_path1, "drop_prob", 0.0)
        for factor in pair:
            assert torch.isclose(factor.unique(), torch.tensor([0.0, 1 / (1 - p)][p == 0 :])).all()
            assert (factor == 0).float().mean().item() == pytest.approx(p, abs=0.03)
    some = branches.drop_path(rate, 5, 0, 7, samples[[30, 2]])
    assert torch.equal(some, factors[:, :, [30, 2]])
    assert not torch.equal(branches.drop_path(rate, 5, 0, 8, samples), factors)
    assert branches.drop_path(0.0, 5, 0, 7, samples) is None


def test_the_loss_of_a_mixed_batch_is_the_cross_entropy_to_its_soft_target():
    logits, labels, partners = torch.randn(8, 10), torch.arange(8), torch.arange(8).flip(0)
    batch = Batch(torch.zeros(8, 1, 2, 2), labels, np.arange(8), partners, 0.3)
    target = 0.3 * F.one_hot(labels, 10) + 0.7 * F.one_hot(partners, 10)
    expected = F.cross_entropy(logits, 0.9 * target + 0.01)
    assert torch.isclose(trainer.classification_loss(logits, batch, 0.1), expected)


# --- Copy -------------------------------------------------------------------------------------------------------------


def test_copy_leaves_unused_q_and_k_unchanged(alone):
    spec = alone.company()["copy"]
    start, trained = students.build(spec.network, spec.seed.model).state_dict(), alone.weights(spec)
    for layer in range(6):
        for kind in ("weight", "bias"):
            name = f"blocks.{layer}.attn.qkv.{kind}"
            before, after = (state[name].chunk(3) for state in (start, trained))
            for part in range(2):
                assert torch.equal(before[part], after[part]) == (layer in spec.transfer.layers), name
            assert not torch.equal(before[2], after[2]), "v is trained"


def test_copy_gives_unused_parameters_neither_gradient_nor_optimiser_state(bench):
    spec = bench.company()["copy"]
    training, batch, shown = begin(bench, spec)
    training.advance(batch, shown)
    unused = {id(p) for i in spec.transfer.layers for p in training.student.blocks[i].attn.unused_parameters().values()}
    assert len(unused) == 16
    assert not unused & {id(p) for p in training.optimizer.state}
    assert not unused & {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    assert all(p.grad is None for p in training.student.parameters() if id(p) in unused)
    assert len(training.optimizer.state) == len(list(training.student.parameters())) - 16


def begin(bench, spec):
    """Return a run's trainer, its first batch and the teacher's observation of it."""
    from atdiag.training import evaluation
    from atdiag.transfer.observation import Observation, of_teacher

    run = bench.store.create(spec)
    stream = Stream(spec.data, spec.recipe, spec.seed.data)
    teacher = students.build(spec.teacher.network, 99).eval().requires_grad_(False) if spec.teacher else None
    training = trainer.RunTrainer(run, spec, teacher, {}, stream.steps_per_epoch, CPU)
    batch = stream.batch(0).to(CPU)
    if teacher is None:
        return training, batch, Observation()
    shown = teacher.observe(batch.images, of_teacher([spec.transfer]))
    return training, batch, evaluation.fit(shown, teacher, spec.network)


# --- What is not finite -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_non_finite_loss_stops_the_run_before_the_update(bench, poison):
    training, batch, shown = begin(bench, bench.spec())
    training.advance(batch, shown)
    before = {name: value.clone() for name, value in training.student.state_dict().items()}
    moments = {p: {k: v.clone() for k, v in s.items()} for p, s in training.optimizer.state.items()}
    if poison == "loss":
        batch.images[3, 0, 5, 5] = math.nan
    else:
        training.student.head.weight.register_hook(lambda grad: grad * math.inf)
    training.advance(batch, shown)
    assert poison in training.cause
    assert training.done
    assert training.step == 1
    assert all(torch.equal(value, before[name]) for name, value in training.student.state_dict().items())
    assert all(torch.equal(v, moments[p][k]) for p, s in training.optimizer.state.items() for k, v in s.items())


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_without_fetching_losses_the_optimiser_itself_skips_non_finite_steps(bench, poison):
    """As on a GPU: later steps run on, but change nothing."""
    training, batch, shown = begin(bench, bench.spec())
    training._fetches_at_once = False
    training.advance(batch, shown)
    before = {name: value.clone() for name, value in training.student.state_dict().items()}
    if poison == "loss":
        pixel = batch.images[3, 0, 5, 5].clone()
        batch.images[3, 0, 5, 5] = math.nan
    else:
        hook = training.student.head.weight.register_hook(lambda grad: grad * math.inf)
    training.advance(batch, shown)
    if poison == "loss":
        batch.images[3, 0, 5, 5] = pixel
    else:
        hook.remove()
    training.advance(batch, shown)
    assert training.cause is None
    training.save()
    assert poison in training.cause and training.done and training.step == 1
    assert not training.run.checkpoint.exists()
    assert all(torch.equal(value, before[name]) for name, value in training.student.state_dict().items())


def test_losses_fetched_late_are_the_same(bench):
    lines = []
    for at_once in (True, False):
        spec = bench.spec(transfer=Transfer(method="distill", layers=(0, 1)), model_seed=int(at_once))
        training, batch, shown = begin(bench, spec.model_copy(update={"seed": bench.spec().seed}))
        training._fetches_at_once = at_once
        for _ in range(5):
            training.advance(batch, shown)
        training.end_epoch()
        lines.append({k: v for k, v in training.metrics[0].items() if k != "seconds"})
    assert lines[0] == pytest.approx(lines[1])
    assert {"loss", "task_loss", "transfer_loss", "grad_norm", "kl"} <= set(lines[0])
    assert lines[0]["loss"] == pytest.approx(lines[0]["task_loss"] + lines[0]["transfer_loss"])
    assert 0 < lines[0]["kl"] < lines[0]["transfer_loss"]


def test_a_diverging_run_stops_with_its_cause_and_the_others_continue(bench, alone, assert_same):
    company = bench.company()
    wild = bench.spec(recipe=company["baseline"].recipe.model_copy(update={"lr": 1e30}))
    seen = []
    status = bench.train(company["baseline"], wild, company["copy"], on_progress=seen.append)
    assert status == {company["baseline"].id: "finished", wild.id: "failed", company["copy"].id: "finished"}
    for name in ("baseline", "copy"):
        assert_same(alone, bench, company[name])
    run = bench.run(wild)
    assert run.state == "failed"
    assert 1 <= run.failure()["step"] <= 4
    assert "became" in run.failure()["cause"]
    assert not run.weights.exists()
    assert not run.predictions.exists()
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert {p.total for p in seen} == {30}
    assert seen[-1].done == 30
    assert seen[-1].doing == "training"


def test_a_non_finite_last_update_is_a_failure_too(bench):
    recipe = Recipe(epochs=1, batch_size=16, lr=1e30)
    spec = bench.spec(recipe=recipe, data=Data(train=16, test_per_source=1))
    assert bench.train(spec) == {spec.id: "failed"}
    assert bench.run(spec).failure() == {"step": 1, "cause": "the trained network's outputs are not finite"}
    assert not bench.run(spec).finished


# --- Who may train together -------------------------------------------------------------------------------------------


def test_runs_of_different_streams_or_data_are_refused_and_nothing_is_written(bench):
    teacher = bench.spec(transfer=Transfer(method="copy", layers=(1,))).teacher
    other = teacher.model_copy(update={"sha256": "1" * 64})
    copy = Transfer(method="copy", layers=(1,))
    pairs = [
        (bench.spec(), bench.spec(recipe=Recipe(epochs=1)), "share one data stream"),
        (bench.spec(transfer=copy), bench.spec(transfer=copy).model_copy(update={"teacher": other}), "one teacher"),
        (bench.spec(), bench.spec(network=bench.spec().network.model_copy(update={"classes": 9})), "classes 9"),
    ]
    for one, two, message in pairs:
        with pytest.raises(ValueError, match=message):
            bench.train(one, two)
    with pytest.raises(UserError, match="unknown data set"):
        bench.train(bench.spec(data=Data(name="cifar", train=64)))
    assert not bench.store.root.exists()


def test_duplicate_runs_are_trained_once_and_busy_ones_skipped(bench):
    short = Recipe(epochs=1, batch_size=32)
    one, two = bench.spec(recipe=short), bench.spec(recipe=short, model_seed=1)
    with bench.store.create(two).lock():
        assert bench.train(one, one, two) == {one.id: "finished", two.id: "busy"}
    assert [p.name for p in bench.run(two).path.iterdir() if p.name != "lock"] == ["spec.json"]


def test_half_precision_trains(bench):
    recipe = Recipe(epochs=1, batch_size=32, precision="bfloat16")
    specs = [
        bench.spec(recipe=recipe, transfer=Transfer(method=m, layers=(0, 5)), init=Init(source="teacher"))
        for m in ("copy", "distill")
    ]
    assert set(bench.train(*specs).values()) == {"finished"}
    for spec in specs:
        assert {value.dtype for value in bench.weights(spec).values()} == {torch.float32}


def test_a_student_starts_from_one_network_and_copies_another(bench):
    """With no step trained, its weights are those of the start, whoever teaches it in company."""
    own = bench.spec(init=Init(source="teacher"), transfer=Transfer(method="copy", layers=(2, 3)))
    plain = Teacher(name="plain", profile="own", network=NETWORK, sha256="2" * 64)
    still = own.recipe.model_copy(update={"epochs": 0})
    spec, other = (
        type(own).model_validate({**own.model_dump(), "start": start, "recipe": still}) for start in (plain, None)
    )
    assert spec.start == plain

    def load(teacher):
        return students.build(teacher.network, 5 if teacher == plain else 99).eval().requires_grad_(False)

    assert set(bench.train(spec, other, load=load).values()) == {"finished"}
    expected = students.build(NETWORK, 5).state_dict()
    for name, value in bench.weights(spec).items():
        if not name.startswith("head."):
            assert torch.equal(value, expected[name]), name
    assert not torch.equal(bench.weights(other)["blocks.0.attn.qkv.weight"], expected["blocks.0.attn.qkv.weight"])
