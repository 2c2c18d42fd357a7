"""Properties common to several ablations."""

from functools import partial

import pytest

from ablations.datasets import datasets
from ablations.layers import layers
from ablations.ood import ood
from ablations.reinit import reinit
from ablations.rescue import rescue
from atdiag.core.errors import UserError
from atdiag.networks.registry import teachers
from atdiag.networks.weights import loading
from tests.studies import arms, fabricated, lab

HERE = [name for name in teachers.miniatures() if loading.shipped_path(name).exists()]


@pytest.mark.parametrize("teacher", HERE)
def test_every_shipped_miniature_can_be_studied(teacher):
    own = teachers.miniature_network(teacher).components
    made = [reinit(lab(), "attn", teacher, "copy"), layers(lab(), "top", 6, teacher, "copy", False)]
    if own:
        made.append(rescue(lab(), teacher, "copy"))
        # with one component, "only it" is the native student; with two, "all but one" is "only the other"; if all maps
        # are copied, what acts on q and k changes nothing
        acting = len({*own} - {"rel_pos_bias", "rope", "qk_norm"})
        assert len(arms(made[-1])) == 4 + (acting if acting > 1 else 0) + (acting if acting > 2 else 0)
    for study in made:
        assert study.teacher.label == f"{teacher} (mini)"
        assert study.arms[0] == lab().baseline(study.teacher)
        assert study.reference.specs[0].recipe.epochs == 0
    assert len({study.arms[0].specs[0].id for study in made}) == 1


def test_all_experiments_and_teachers_share_the_baseline():
    every = [
        reinit(lab(), m, t, x) for m in ("attn", "mlp") for t in ("clip_b", "beitv2_b") for x in ("copy", "distill")
    ]
    assert len({study.arms[0].specs for study in every}) == 1
    # ... and the start without transfer is one for both transfers
    assert len({study.arms[1].specs for study in every}) == 4


@pytest.mark.parametrize(
    "make", [lambda: reinit(lab()), lambda: rescue(lab()), lambda: layers(lab(), teacher="clip_b")]
)
def test_one_seed_decides_nothing(make):
    study = make()
    text = study.verdict(fabricated(study, [30.0] * (len(study.arms) - 1), seeds=1, half=0.1))
    assert "undecided with one seed" in text
    assert not any(word in text for word in ("helps", "hurts", "rescue)", "better", "worse"))


@pytest.mark.parametrize("make", [partial(ood, on=""), partial(datasets, data=" , ")])
def test_an_empty_list_is_refused(make):
    with pytest.raises(UserError, match="is empty"):
        make(lab())
