"""Training on fake CUDA tensors, which have shape, dtype and device but no data, on a machine without a GPU.

This finds tensors left on the CPU, unexpected dtypes under autocast, and steps that would synchronise.
Networks are built on ``meta`` and get their parameters within the mode. The backward pass does not run there:
made-up gradients replace its results.
"""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from atdiag.core.runs import Store
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed, Teacher, Transfer
from atdiag.core.spec.losses import MAP_LOSSES
from atdiag.data.loader import Batch
from atdiag.networks.model import students
from atdiag.networks.model.vit import ViT
from atdiag.training import compiled, evaluation
from atdiag.training.trainer import RunTrainer
from atdiag.transfer import attention, methods, ops
from atdiag.transfer.observation import CaptureRequest, of_teacher
from atdiag.transfer.ops import Averaged

CUDA = torch.device("cuda")
BLOCKS = (0, 1)
BATCH = 4
SHAPE = {"image_size": 32, "patch_size": 4, "width": 48, "depth": 2, "heads": 3, "classes": 10}
PLAIN = Network(**SHAPE)
REGISTERS = Network(**SHAPE, components=("layer_scale", "registers"), layer_scale_init=0.1, registers=4)
POSITIONS = Network(**SHAPE, components=("no_k_bias", "rel_pos_bias"))
BOTH = Network(**SHAPE, components=("registers", "rel_pos_bias"), registers=4)
PAIRS = {
    "plain to plain": (PLAIN, PLAIN),
    "registers to standard": (REGISTERS, PLAIN),
    "registers to native": (REGISTERS, REGISTERS),
    "positions to standard": (POSITIONS, PLAIN),
    "positions to native": (POSITIONS, POSITIONS),
    "both to native": (BOTH, BOTH),
    "both to standard": (BOTH, PLAIN),
}
FUSED = ("ce", "kl", "mse")
"""Losses that need no map where the student has no bias, and so no product in float32."""
AVERAGES = ("examples", "queries", "heads", "layers")
TRANSFERS = {
    "none": Transfer(),
    "copy": Transfer(method="copy", layers=BLOCKS),
    "copy, some heads": Transfer(method="copy", layers=BLOCKS, heads=(0, 2)),
    **{f"copy, over {over}": Transfer(method="copy", layers=BLOCKS, average=over) for over in AVERAGES},
    **{f"copy {tensor}": Transfer(method="copy", layers=BLOCKS, tensor=tensor) for tensor in "qkv"},
    **{f"copy {tensor}, a head": Transfer(method="copy", layers=BLOCKS, tensor=tensor, heads=(1,)) for tensor in "qkv"},
    **{f"distill {loss}": Transfer(method="distill", layers=BLOCKS, loss=loss) for loss in MAP_LOSSES},
    "distill, some heads": Transfer(method="distill", layers=BLOCKS, heads=(0, 2)),
    **{f"distill, over {over}": Transfer(method="distill", layers=BLOCKS, average=over) for over in AVERAGES},
    **{f"distill {tensor}": Transfer(method="distill", layers=BLOCKS, tensor=tensor) for tensor in "qkv"},
    "features": Transfer(method="features", layers=BLOCKS),
    "logits": Transfer(method="logits"),
}


class Watch(TorchDispatchMode):
    """Record what would wait for a GPU, like ``torch.cuda.set_sync_debug_mode``, and the dtypes of all products."""

    aten = torch.ops.aten
    PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution")
    READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim")

    def __init__(self):
        super().__init__()
        self.waits, self.products, self.attention = [], [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        out = func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            source, waits = (args[1] if name == "copy_" else args[0]), True
            target = args[0] if name == "copy_" else out
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            if source.device != target.device and waits:
                self.waits.append(f"{name} {source.device} -> {target.device} {tuple(source.shape)}")
        elif name in self.READS:
            self.waits.append(name)
        elif name in self.PRODUCTS:
            self.products.append((name, out.dtype))
        elif name.startswith("_scaled_dot_product"):
            self.attention.append((name, out[0].dtype))
        return out


def kernel(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Replace SDPA (which takes the formula without a GPU) by a GPU kernel, and check that kernel's requirements."""
    given = [x for x in (q, k, v, attn_mask) if x is not None]
    if torch.is_autocast_enabled("cuda"):
        given = [x.to(torch.get_autocast_dtype("cuda")) for x in given]
    assert len({x.dtype for x in given}) == len({x.device for x in given}) == 1
    assert len({x.shape[-1] for x in (q, k, v)}) == 1 and q.shape[-1] % 8 == 0
    assert attn_mask is None or not attn_mask.requires_grad
    q, k, v, *mask = given
    if not mask and q.dtype == torch.bfloat16:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    bias = mask[0].expand(*q.shape[:3], k.shape[2]) if mask else None
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, keep, dropout_p, scale=scale)[0]


@pytest.fixture
def a_device(monkeypatch):
    """Pretend that there is a GPU, and keep fake tensors out of caches that outlive the test."""

    def grad(out, value, upstream):
        """Replace autograd's engine for losses that ask for gradients while they compute their value."""
        assert upstream.device == out.device and upstream.dtype == out.dtype and upstream.shape == out.shape
        return (torch.empty_like(value),)

    monkeypatch.setattr(torch.amp.autocast_mode, "amp_definitely_not_available", lambda: False, raising=False)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.autograd, "grad", grad)
    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    kept = [value for module in (attention, evaluation, ops, methods) for value in vars(module).values()]
    caches = [value for value in kept if hasattr(value, "cache_clear")]
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@contextlib.contextmanager
def fake():
    with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
        yield watch


def on_cuda(network):
    with unset_fake_temporarily(), torch.device("meta"):  # timm asks for numbers while it builds
        vit = ViT(network)
    return vit.to_empty(device="cuda")


def teacher_of(network):
    return on_cuda(network).eval().requires_grad_(False)


def show(teacher, student, transfer, images, amp=True):
    """Return a teacher's observation for a transfer, as a cohort requests it."""
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=amp):
        shown = evaluation.fit(teacher.observe(images, of_teacher([transfer])), teacher, student)
    if transfer.average != "examples":
        return shown
    tokens = student.tokens
    chosen = len(transfer.heads or range(student.heads))
    maps = {layer: Averaged(torch.empty(1, chosen, tokens, tokens, device="cuda")) for layer in transfer.sources}
    return replace(shown, averages=maps)


def tensors(observation):
    for one in observation.seen.values():
        yield from (x for x in (*one.map, one.v) if isinstance(x, torch.Tensor))
    yield from observation.features.values()
    if observation.logits is not None:
        yield observation.logits


@pytest.mark.slow
@pytest.mark.parametrize(("pair", "amp"), [("both to native", False), *((pair, True) for pair in PAIRS)])
def test_every_tensor_has_the_right_device_and_dtype(pair, amp, a_device):
    source, target = PAIRS[pair]
    wide = torch.bfloat16 if amp else torch.float32
    with fake() as watch:
        teacher, student = teacher_of(source), on_cuda(target)
        images = torch.empty(BATCH, 3, 32, 32, device="cuda")
        keep = torch.ones(2, 2, BATCH, 1, 1, device="cuda")
        for name, transfer in TRANSFERS.items():
            watch.products.clear()
            shown = show(teacher, target, transfer, images, amp)
            assert all(x.device.type == "cuda" for x in tensors(shown)), name
            assert {dtype for _, dtype in watch.products} <= {wide}, name
            student.train()
            with torch.autocast("cuda", torch.bfloat16, enabled=amp):
                logits, loss = methods.forward(student, transfer, images, shown, keep)
            student.eval()
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=amp):
                tested = methods.forward_test(student, transfer, images, shown)
            for out in (logits, tested):
                assert (out.device.type, out.dtype, out.shape) == ("cuda", wide, (BATCH, 10)), name
            if transfer.weight is None:
                assert loss is None, name
            else:
                assert (loss.device.type, loss.dtype, loss.shape) == ("cuda", torch.float32, ()), name
            by_maps = transfer.method == "distill" and transfer.tensor == "map"
            if not (by_maps and (transfer.loss not in FUSED or "rel_pos_bias" in target.components)):
                fused = transfer.average is None  # an average is made of maps, in float32
                assert not fused or {dtype for _, dtype in watch.products} == {wide}, name
        assert watch.attention and {dtype for _, dtype in watch.attention} == {wide}


def spec(source, target, transfer, **recipe):
    values = {"epochs": 1, "batch_size": BATCH, "drop_path": 0.1, "ema": 0.9, "clip_grad": 1.0, "label_smoothing": 0.1}
    return RunSpec(
        network=target,
        teacher=Teacher(name="t", profile="benchmark", network=source, sha256="0" * 64),
        transfer=transfer,
        data=Data(name="folder:x", train=8, image_size=32, fingerprint="0" * 64),
        recipe=Recipe(**(values | {"precision": "bfloat16"} | recipe)),
        seed=Seed(data=0, model=0),
    )


@pytest.fixture
def without_backward(monkeypatch, a_device):
    """Build networks on the device, and let the backward pass leave gradients there, as on a GPU."""
    built = []

    def build(network, seed):
        vit = on_cuda(network)
        vit.to = lambda device: vit  # it is on the device already, and a fake's parameters can't be swapped
        built.append(vit)
        return vit

    def backward(loss, *args, **options):
        assert loss.device.type == "cuda" and loss.shape == ()
        for student in built:
            for parameter in student.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)

    class Generator(torch.Generator):  # timm makes one beside an average of weights, and draws nothing from it
        def __new__(cls, device=None):
            return super().__new__(cls)

    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(students, "build", build)
    monkeypatch.setattr(torch.Tensor, "backward", backward)


def batch(mixed):
    """Make a batch as the loader returns it, before it is on the device."""
    labels = torch.zeros(BATCH, dtype=torch.int64)
    images = torch.zeros(BATCH, 3, 32, 32, dtype=torch.uint8)
    return Batch(
        images,
        labels,
        np.arange(BATCH),
        partner_labels=labels if mixed else None,
        lam=0.3 if mixed else 1.0,
        box=(1, 9, 2, 8) if mixed else None,
    )


@pytest.mark.parametrize("pair", ["plain to plain", "registers to standard", "both to native"])
@pytest.mark.parametrize(
    "name", ["none", "copy", "copy, some heads", "distill ce", "distill mse", "features", "logits"]
)
def test_no_step_waits_for_the_device(name, pair, tmp_path, without_backward):
    """Batch, teacher, student, loss and update of steps between two fetches of the losses."""
    source, target = PAIRS[pair]
    transfer = TRANSFERS[name]
    one = spec(source, target, transfer)
    with fake() as watch:
        teacher = teacher_of(source)
        run = Store(tmp_path).create(one)
        member = RunTrainer(run, one, teacher, {}, 100, CUDA)
        for step in range(3):
            if step == 1:  # caches are filled in the first step
                watch.waits.clear()
            shared = batch(mixed=step > 0).to(CUDA)
            member.advance(shared, show(teacher, target, transfer, shared.images))
    assert member.step == 3
    assert not watch.waits, sorted(set(watch.waits))


def test_the_watch_detects_synchronisation(a_device):
    with fake() as watch:
        there = torch.zeros(3, device="cuda")
        torch.zeros(3).to("cuda", non_blocking=True)
        assert watch.waits == []
        torch.tensor([1, 2, 3], device="cuda")
        torch.zeros(3).to("cuda")
        there.cpu()
        with contextlib.suppress(Exception):  # a fake has no data
            there.sum().item()
    assert len(watch.waits) >= 3


def test_a_tensor_left_on_the_cpu_is_detected(a_device):
    with fake():
        vit = on_cuda(PLAIN)
        vit.mean = torch.zeros(2, 3, 1, 1)
        with pytest.raises(Exception, match="device"):
            vit(torch.empty(2, 3, 32, 32, device="cuda"))


GRAPHS = {name: one for name, one in TRANSFERS.items() if one.average != "examples"}


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_blocks_have_no_graph_break(pair):
    """What Dynamo traces of a block is one graph, for every transfer; ``compile_blocks`` makes a break an error."""
    source, target = PAIRS[pair]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of tests before
    images = torch.rand(2, 3, 32, 32)
    keep = torch.ones(2, 2, 2, 1, 1)
    teacher = students.build(source, 1).eval().requires_grad_(False)
    compiled.compile_blocks(teacher, backend="eager")
    student = students.build(target, 0)
    compiled.compile_blocks(student, backend="eager")
    try:
        for transfer in GRAPHS.values():
            with torch.no_grad():
                shown = evaluation.fit(teacher.observe(images, of_teacher([transfer])), teacher, target)
            logits, loss = methods.forward(student, transfer, images, shown, keep)
            (logits.sum() + (0 if loss is None else loss)).backward()
            assert logits.isfinite().all()
        assert not torch._dynamo.utils.counters["graph_break"]
    finally:
        torch._dynamo.reset()


def test_a_graph_break_is_detected():
    """By the same tracing: a print in a block."""
    torch._dynamo.reset()
    vit = students.build(PLAIN, 0)
    norm = vit.blocks[0].norm1.forward
    vit.blocks[0].norm1.forward = lambda x: (torch._dynamo.graph_break(), norm(x))[1]
    compiled.compile_blocks(vit, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        vit.observe(torch.rand(2, 3, 32, 32), CaptureRequest(logits=True))
    torch._dynamo.reset()
