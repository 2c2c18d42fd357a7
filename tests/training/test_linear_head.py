"""A head fitted to a frozen network is scikit-learn's logistic regression on the head's input, as one linear layer."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from atdiag.core.spec import Data, Init, Network, Recipe, RunSpec, Seed, Teacher
from atdiag.data import sources
from atdiag.networks.model import students
from atdiag.training import classifiers, linear_head

NETWORK = Network(
    image_size=20, patch_size=5, channels=1, width=12, depth=2, heads=3, classes=10, mean=(0.5,), std=(0.5,)
)
TEACHER = Teacher(name="t", profile="mini", network=NETWORK.model_copy(update={"classes": 1}), sha256="0" * 64)
CPU = torch.device("cpu")


def spec(**changes):
    given = {
        "network": NETWORK,
        "teacher": TEACHER,
        "init": Init(source="teacher", probe=True),
        "data": Data(name="digits", train=300, test_per_source=1),
        "recipe": Recipe(epochs=0, batch_size=1),
        "seed": Seed(data=0, model=0),
    }
    return RunSpec(**{**given, **changes})


@pytest.fixture(scope="module")
def fitted():
    vit = students.build(NETWORK, 0)
    with torch.no_grad():
        vit.norm.weight[3] = 0  # a feature without spread
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    linear_head.fit(vit, spec(), CPU)
    return vit.eval(), before


@torch.no_grad()
def read(vit, split):
    """Return what the head reads, by timm's own functions."""
    pixels = torch.from_numpy(split.take(np.arange(len(split)))).float() / 255
    x = vit.norm(vit.blocks(vit.embed(pixels)))
    return pixels, vit.forward_head(x, pre_logits=True)


def test_the_head_is_scikit_learns_at_the_penalty_chosen_without_test_images(fitted):
    vit, _ = fitted
    images = sources.find(spec().data).train_split(spec().data, 0)
    pixels, features = read(vit, images)
    (z,) = classifiers.standardise(features)
    held = torch.from_numpy(classifiers.hold_out(images.clusters, images.labels))
    chosen = classifiers.choose_linear(z, torch.from_numpy(images.labels), 10, held)
    x = StandardScaler().fit_transform(np.delete(features.double().numpy(), 3, axis=1))
    theirs = LogisticRegression(C=1 / (chosen.penalty * len(x)), tol=1e-8, max_iter=5000).fit(x, images.labels)
    with torch.no_grad():
        ours = vit(pixels).softmax(-1)
    np.testing.assert_allclose(ours, theirs.predict_proba(x), atol=2e-4)


def test_nothing_but_the_head_changes(fitted):
    vit, before = fitted
    changed = {name for name, value in vit.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_a_fit_does_not_depend_on_anything_else():
    heads = []
    for seed in (0, 0, 1):
        vit = students.build(NETWORK, 0)
        torch.manual_seed(seed)
        linear_head.fit(vit, spec(seed=Seed(data=seed, model=0)), CPU)
        heads.append(vit.head.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_probe_is_not_trained_and_has_no_other_head():
    for wrong in ({"recipe": Recipe(epochs=1, batch_size=1)}, {"init": Init(source="teacher", probe=True, head=True)}):
        with pytest.raises(ValueError, match="a linear probe is the head of a network that is not trained"):
            spec(**wrong)
    assert Init(probe=True) == Init()


def test_a_spec_without_a_probe_hashes_as_before():
    plain = spec(init=Init(source="teacher"))
    assert "probe" in plain.model_dump()["init"] and plain.probe_images == 0
    assert plain.id != spec().id and spec().probe_images == 300
