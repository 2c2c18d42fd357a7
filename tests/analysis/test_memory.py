"""Memory does not grow with the number of images: counted for all tensors, and measured for the whole process."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atdiag.analysis import images, interventions, maps, probing, similarity, statistics, streaming, tracing
from atdiag.analysis.replacements import Replacement

FEW, MANY, BATCH = 100, 2000, 50


class Count(TorchDispatchMode):
    """Count the bytes of all storages created while active; ``peak``: the most that were alive at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        old = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in old and storage._cdata not in self._alive:
                    self._take_in(storage._cdata, storage.nbytes(), storage)
        return out

    def _take_in(self, key, size, storage):
        def gone(_):
            self.now -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class Made:
    """Images that are made when they are read, and so take no memory.

    Garbage is collected before each batch: nnsight leaves reference cycles, which Python frees only eventually.
    """

    def __init__(self, network):
        self.shape = network.channels, network.image_size, network.image_size
        self.reads = 0

    def read(self, index):
        if self.reads % BATCH == 0:
            gc.collect()
        self.reads += 1
        return np.random.default_rng(index).integers(0, 256, self.shape, dtype=np.uint8)


def made(network, count):
    names = tuple(f"image {i}" for i in range(count))
    return images.ImageSet(names, Made(network), np.arange(count) % network.classes, np.arange(count))


def peak(work):
    """Return the peak of bytes of tensors during some work, and the work's result."""
    gc.collect()
    gc.freeze()  # exclude existing objects from garbage collection
    try:
        with Count() as count:
            out = work()
    finally:
        gc.unfreeze()
    return count.peak, out


def test_the_count_is_of_tensors_alive_at_once():
    def work():
        kept = [torch.zeros(1000) for _ in range(3)]
        for _ in range(10):
            torch.zeros(5000).add_(1).view(50, 100)
        return kept

    assert peak(work)[0] == 4 * (3 * 1000 + 5000)


WORK = {
    "trace": lambda a, b, some: streaming.trace(a, some, tracing.WHAT, mean=True, batch=BATCH),
    "similarity": lambda a, b, some: similarity.similarity(a, [b, a], some, batch=BATCH),
    "attention-stats": lambda a, b, some: statistics.attention_stats([a, b], some, rank_images=8, batch=BATCH),
    "intervene": lambda a, b, some: interventions.intervene(
        a, [Replacement(b), Replacement("no-sinks"), Replacement("own", "q")], some, batch=BATCH
    ),
}


@pytest.mark.parametrize(
    "name", [name if name == "trace" else pytest.param(name, marks=pytest.mark.slow) for name in WORK]
)
def test_memory_does_not_grow_with_the_number_of_images(subject, name):
    a, b = subject(0), subject(1)
    few, many = (peak(lambda n=n: WORK[name](a, b, made(a.network, n)))[0] for n in (FEW, MANY))
    maps_of_all = MANY * 4 * 3 * 3 * 26**2  # float32, 3 layers, 3 heads
    # What grows with images: predictions, eight bytes for each replacement and for the original, held twice.
    predictions = 8 * 2 * 4 * MANY if name == "intervene" else 0
    assert 0 < many <= few + predictions
    assert many < maps_of_all / 4


def test_a_probe_keeps_two_rows_per_image_and_layer(subject):
    one = subject(0)
    few, many = (peak(lambda n=n: probing.features([one], made(one.network, n), batch=BATCH)) for n in (FEW, MANY))
    kept = 4 * 3 * 2 * one.network.width  # float32: of each layer, class token and mean patch
    said = 8 * (3 + 1)  # class logits of early exits and of the network
    # The batches' parts, and once more when they are joined: not the stream of 26 tokens, and no maps.
    assert many[0] - few[0] <= 2 * (kept + said) * (MANY - FEW)
    (found,), places = many[1]
    assert sum(x.numel() * x.element_size() for x in found.tokens.values()) == kept * MANY and len(places) == MANY


def test_a_maps_figure_keeps_only_what_it_shows(subject):
    one = subject(0)
    few, many = (peak(lambda n=n: maps.maps(one, made(one.network, n), (2,), batch=BATCH))[0] for n in (10, 110))
    shown = 4 * (2 * 26 + 400)  # one query's row and its rollout; the pixels
    assert many - few <= 100 * 3 * shown + 4 * (BATCH - 10) * 3 * 30 * 26**2


CODE = """
import sys, torch
sys.path.insert(0, {folder!r})
torch.set_num_threads(1)
from atdiag.analysis import subjects
from test_memory import WORK, made

def largest():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

a, b = subjects.find("deit_b"), subjects.find("dinov2_b")
for count in ({few}, {many}):
    WORK[{name!r}](a, b, made(a.network, count))
    print(largest())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the process is weighed by /proc")
@pytest.mark.parametrize("name", WORK)
def test_process_memory_is_the_same_for_2000_images_as_for_100(name):
    """Measured by the system in a separate process, so with all that Python, numpy and nnsight hold."""
    code = CODE.format(folder=str(Path(__file__).parent), few=FEW, many=MANY, name=name)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    few, many = map(int, done.stdout.split())
    maps_of_all = MANY * 4 * 12 * 3 * 26**2 / 1024  # kB: 190 MB
    assert many - few < maps_of_all / 4, f"{few} kB with {FEW} images, {many} kB with {MANY}"
