"""Finished runs in a store nearby are found, and said before they are trained again."""

from pathlib import Path

from atdiag.core.runs import Store
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed
from atdiag.execution import elsewhere

NETWORK = Network(image_size=20, patch_size=4, channels=1, width=16, depth=2, heads=2, classes=10, mean=(0.2,))
DATA, RECIPE = Data(train=32, test_per_source=1), Recipe(epochs=1, batch_size=16)
SPECS = [RunSpec(network=NETWORK, data=DATA, recipe=RECIPE, seed=Seed(data=0, model=i)) for i in range(3)]


def done(root, specs):
    for spec in specs:
        Store(root).create(spec).finish({"top1": 1.0})


def test_the_store_with_most_is_named(tmp_path, monkeypatch):
    here = tmp_path / "one" / "deep"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    store = Store(Path("runs"))
    assert elsewhere.finished(store, SPECS) is None
    done(tmp_path / "runs", SPECS[:1])
    assert elsewhere.finished(store, SPECS) == (Path("../../runs"), 1)
    done(tmp_path / "one" / "beside" / "runs", SPECS[:2])
    assert elsewhere.finished(store, SPECS) == (Path("../beside/runs"), 2)
    assert elsewhere.finished(store, SPECS[2:]) is None, "a store without any of the runs is no news"
    done(Path("runs"), SPECS)
    assert elsewhere.finished(store, SPECS) == (Path("../beside/runs"), 2), "not the store itself"
    assert elsewhere.finished(Store(Path("else")), SPECS) == (Path("runs"), 3)
