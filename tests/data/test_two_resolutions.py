"""A teacher with patches of 14 px and students with patches of 16 px on real JPEGs: one grid at two resolutions."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from ablations.benchmark import benchmark
from atdiag.core import randomness
from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.core.spec import Network
from atdiag.data import cache, decoding, sources
from atdiag.data.augmentation import ATTEMPTS, crop_box
from atdiag.data.loader import Stream
from atdiag.networks.model import students
from atdiag.networks.model.vit import ViT
from atdiag.networks.weights import loading
from atdiag.study.builder import Lab
from atdiag.study.settings import resolve
from atdiag.training import cohort

LARGE, SMALL = 64, 56  # 4 x 4 patches of 16 and of 14 px; as 224 and 196
BATCH = 10
TEACHER = Network(
    image_size=SMALL,
    patch_size=14,
    channels=3,
    width=24,
    depth=2,
    heads=2,
    classes=1000,
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.3, 0.4),
)
QUIET = ("mixup=0", "cutmix=0", "erase=0", "rand_augment=null")
LOUD = ("mixup=0.8", "cutmix=1.0", "erase=0.5", "rand_augment=rand-m9-mstd0.5-inc1")


@pytest.fixture
def plan(imagenette, tmp_path):
    """The study of the teacher's file with students of 16 px: (settings of the recipe)."""
    file = tmp_path / "patch14.safetensors"
    loading.save(students.build(TEACHER, 3), file, {})

    def made(*recipe):
        sets = ["data.name=imagenette", f"data.image_size={LARGE}", "data.per_class=2", "data.test_per_class=1"]
        own = ("epochs=2", f"batch_size={BATCH}", "warmup_epochs=0", "precision=float32", "crop=0.3", "flip=true")
        sets += [f"recipe.{one}" for one in (*own, *recipe)]
        lab = Lab(resolve("small", sets=sets, seeds=1, environment={}, student="width=16,heads=2,patch=16"))
        return benchmark(lab, str(file), "copy,distill")

    return made


def train(study, tmp_path, monkeypatch):
    """Train the study's runs as one cohort; return what the networks saw [b, 3, S, S], by image size, and the runs."""
    seen = {LARGE: [], SMALL: []}
    observe = ViT.observe

    def watched(self, images, *args, **options):
        assert images.shape[-1] == self.network.image_size
        seen[images.shape[-1]].append(images.detach().clone())
        return observe(self, images, *args, **options)

    store = Store(tmp_path / "runs")
    specs = [arm.specs[0] for arm in study.arms]
    with monkeypatch.context() as patch:
        patch.setattr(ViT, "observe", watched)
        done = cohort.train(specs, store, loading.load, ExecutionOptions(device="cpu"))
    assert set(done.values()) == {"finished"}
    return {size: [one for one in some if len(one) == BATCH] for size, some in seen.items()}, specs, store


def resized(images):
    return v2.functional.resize(images, [SMALL, SMALL], v2.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)


def test_both_networks_see_one_crop_each_at_its_own_size(plan, tmp_path, monkeypatch):
    study = plan(*QUIET)
    opened = Counter()
    for place in (decoding, cache):
        load = place.load
        monkeypatch.setattr(place, "load", lambda one, load=load: opened.update([one.path]) or load(one))
    seen, specs, store = train(study, tmp_path, monkeypatch)
    spec = specs[1]
    assert (spec.network.patch_size, spec.teacher.network.patch_size) == (16, 14)
    assert spec.network.grid == spec.teacher.network.grid == 4
    assert spec.teacher.network.image_size == SMALL and spec.transfer.teacher_heads is None
    assert any("the teacher the same crop resized to 56 px" in note for note in study.notes)

    # Decoded once for three students and a teacher over two epochs.
    assert set(opened.values()) == {1} and len(opened) >= 30

    # Each batch is seen by the three students, and once by the teacher; the tests' 10 images follow.
    students_, teachers_ = seen[LARGE], seen[SMALL]
    steps = 2 * 20 // BATCH
    assert len(teachers_) == steps + 1 and len(students_) == 3 * steps + 3
    images, stream = sources.find(spec.data).train_split(spec.data, 0), Stream(spec.data, spec.recipe, 0)
    for step in range(steps):
        own = students_[3 * step : 3 * step + 3]
        assert all(torch.equal(own[0], other) for other in own[1:])
        epoch, within = divmod(step, steps // 2)
        samples = stream.batch(epoch * 2 + within).samples
        expected = np.stack([_view(images, epoch, sample) for sample in samples])
        assert torch.equal(own[0], torch.from_numpy(expected).float().div(255))
        assert torch.allclose(teachers_[step], resized(own[0]), atol=1e-6)
    # Tests: the view of the data set, and the same view for the teacher.
    test = sources.find(spec.data).test_split(spec.data).batch(0, BATCH)
    assert torch.equal(students_[-1], torch.from_numpy(test).float().div(255))
    assert torch.allclose(teachers_[-1], resized(students_[-1]), atol=1e-6)
    assert all(store.run(one).result()["test_images"] == 10 for one in specs)


def _view(images, epoch, sample):
    """Return a training view by Pillow and torchvision: a random resized crop of the JPEG, mirrored or not."""
    with Image.open(images.path(sample)) as picture:
        picture = picture.convert("RGB")
    draws = randomness.uniform(0, "crop", epoch, np.array([[sample]]), np.arange(4 * ATTEMPTS)).reshape(ATTEMPTS, 4)
    box = crop_box(picture.height, picture.width, 0.3, draws)
    view = v2.functional.resized_crop(picture, *box, [LARGE, LARGE], v2.InterpolationMode.BICUBIC)
    if randomness.uniform(0, "flip", epoch, np.array([[sample]]), np.arange(1))[0, 0] < 0.5:
        view = v2.functional.horizontal_flip(view)
    return np.moveaxis(np.asarray(view), -1, 0)


def test_whatever_augments_the_images_the_teacher_sees_what_the_students_see(plan, tmp_path, monkeypatch):
    """RandAugment, random erasing, Mixup and CutMix are drawn once, too."""
    seen, *_ = train(plan(*LOUD), tmp_path, monkeypatch)
    own = seen[LARGE][: 3 * 4 : 3]
    for shown, theirs in zip(seen[SMALL], own, strict=False):
        assert torch.allclose(shown, resized(theirs), atol=1e-6)
    assert not all(torch.equal(one, one.mul(255).round().div(255)) for one in own)  # Mixup: no whole values
