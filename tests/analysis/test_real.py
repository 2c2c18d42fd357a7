"""A real pre-trained ViT on real images, where the test data is available."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from atdiag.analysis import images, interventions, similarity, streaming, subjects
from atdiag.analysis.replacements import Replacement
from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.core.spec import Data
from atdiag.data import sources
from atdiag.networks.weights import loading
from atdiag.networks.weights.classes import HeadRows
from atdiag.study.builder import Lab
from atdiag.study.settings import resolve
from atdiag.training import cohort

REAL = Path(os.environ.get("ATDIAG_TEST_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
FILE = REAL / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
ARCHIVE = REAL / "imagenette-128.zip"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four test images of every class of Imagenette."""
    if not (FILE.exists() and ARCHIVE.exists()):
        pytest.skip(f"no {FILE.name} and {ARCHIVE.name} in {REAL} (ATDIAG_TEST_DATA)")
    root = tmp_path_factory.mktemp("real")
    with zipfile.ZipFile(ARCHIVE) as archive:
        by_class = {}
        for name in sorted(archive.namelist()):
            parts = name.split("/")
            if len(parts) == 4 and parts[3] and parts[1] in ("train", "val"):
                by_class.setdefault(tuple(parts[1:3]), []).append(name)
        archive.extractall(root, [name for found in by_class.values() for name in found[:4]])
    return root / "imagenette-128"


@pytest.fixture(scope="module")
def real(folder):
    data = sources.complete(Data(name=f"folder:{folder}", train=1, image_size=224))
    subject = subjects.find(f"timm:vit_tiny_patch16_224@{FILE}", data=data)
    return subject, images.choose(0, data, subject.network)


def test_maps_equal_hooks_on_timms_explicit_path(real):
    subject, some = real
    two = some.reordered(np.array([3, 17]))
    found = streaming.trace(subject, two)
    from atdiag.networks.registry import teachers
    from atdiag.networks.weights import loading, sources

    source = teachers.source(f"timm:vit_tiny_patch16_224@{FILE}")
    model, _ = loading.load_source(source, sources.find(source), 224)
    for i, block in enumerate(model.blocks):
        block.attn.fused_attn = False

        def keep(_, inputs, output, i=i):
            torch.testing.assert_close(found["map", i], output, atol=1e-5, rtol=1e-3)

        block.attn.attn_drop.register_forward_hook(keep)
    (pixels,) = (one.pixels for one in two.batches(2))
    with torch.no_grad():
        model((pixels - 0.5) / 0.5)
    assert len(found) == 12


def test_accuracy_depends_on_the_maps(real):
    subject, some = real
    rows = np.array(sources.find("imagenette").imagenet_rows)
    classes = set(some.labels)
    assert len(some) == 40 and len(classes) == 10
    known = images.ImageSet(
        some.names, some.source, some.labels, some.clusters, Data(name="imagenette", train=1, image_size=224)
    )
    for one in (known, some):  # named in the catalogue; a folder of one's own whose classes are wnids
        assert one.head_rows(subject.head) == HeadRows(tuple(rows), "ImageNet's wnids")
    own, uniform = interventions.intervene(subject, [Replacement("own"), Replacement("uniform")], some)
    assert own.top1[0] == own.top1[1] > 80 and own.logits < 1e-4
    assert uniform.top1[1] < 40 and uniform.residual[-1] > 0.1


def test_a_folder_of_wnids_gets_the_imagenet_teachers_reference_row(folder, tmp_path):
    lab = Lab(
        resolve(
            profile="small", seeds=1, sets=[f"data.name=folder:{folder}", "data.image_size=224", "recipe.batch_size=8"]
        )
    )
    arm = lab.reference(lab.teacher(f"timm:vit_tiny_patch16_224@{FILE}"))
    assert arm.head.how == "ImageNet's wnids"
    (spec,) = arm.specs
    assert spec.init.head_rows == sources.find("imagenette").imagenet_rows and spec.network.classes == 10
    store = Store(tmp_path)
    assert set(cohort.train([spec], store, loading.load, ExecutionOptions(device="cpu")).values()) == {"finished"}
    assert store.run(spec).result()["top1"] > 80


def test_a_network_is_identical_to_itself(real):
    subject, some = real
    assert subject.label == f"vit_tiny_patch16_224 {subject.id[:6]}"  # the file is part of the name
    (found,) = similarity.similarity(subject, subject, some.reordered(np.arange(4)), layers=(0, 11))
    assert (found.matched("optimal") == 0).all()
    np.testing.assert_allclose(found.cka["all"], 1, atol=1e-9)
