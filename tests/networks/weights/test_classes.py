"""The classes of a head's rows: lists inside and beside weights, matched with a data set's classes."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import binom
from timm.data import ImageNetInfo

from atdiag.core.errors import UserError
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed
from atdiag.data import sources, testsets
from atdiag.networks.registry import teachers
from atdiag.networks.weights import classes
from atdiag.networks.weights.classes import ASSUMED, IMAGENET, OWN, SUSPECT, HeadClasses, HeadRows

BIRDS = ("wren", "auk", "Kite")


def make_folder(root, names, train=1):
    """Make a folder with one grey image per class and split; return its spec."""
    for split, count in (("train", train), ("val", 1)):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(root / split / name / f"{i}.png")
    return sources.complete(Data(name=f"folder:{root}", train=1, image_size=8))


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """Make a data set whose classes, in the order of labels, are Kite, auk and wren."""
    data = make_folder(tmp_path_factory.mktemp("birds"), BIRDS)
    assert sources.find(data).class_names == ("Kite", "auk", "wren")
    return data


WEIGHT = {"head.weight": torch.zeros(3, 2)}


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ({"classes": list(BIRDS)}, BIRDS),
        ({"class_names": BIRDS}, BIRDS),
        ({"class_to_idx": {"Kite": 2, "wren": 0, "auk": 1}}, BIRDS),
        ({"idx_to_class": {1: "auk", 0: "wren", 2: "Kite"}}, BIRDS),
        ({"idx_to_class": {"2": "Kite", "0": "wren", "1": "auk"}}, BIRDS),
        ({"class_to_idx": {"wren": 0, "auk": 0, "Kite": 1}}, ()),  # two classes for one row
        ({"class_to_idx": {"wren": 1, "auk": 2, "Kite": 3}}, ()),
        ({"classes": 3}, ()),
        ({"classes": ["LABEL_0", "LABEL_1", "LABEL_2"]}, ()),
        ({}, ()),
    ],
)
def test_a_class_list_inside_the_weights(tmp_path, entry, names):
    torch.save({"state_dict": WEIGHT, **entry}, tmp_path / "a.pth")
    texts = {key: json.dumps(value) for key, value in entry.items()}
    save_file(WEIGHT, tmp_path / "a.safetensors", texts)
    for file in ("a.pth", "a.safetensors"):
        found = classes.of_file(tmp_path / file, 3)
        assert found.names == names
        assert found.how == (f"the list in {tmp_path / file} ({next(iter(entry))})" if names else "")


@pytest.mark.parametrize("name", ["a.pth.classes.txt", "classes.txt", "class_names.txt", "labels.txt"])
def test_a_class_list_beside_the_weights(tmp_path, name):
    torch.save(WEIGHT, tmp_path / "a.pth")
    (tmp_path / name).write_text("\ufeffwren\r\nauk\r\nKite\r\n\r\n", encoding="utf-8")
    assert classes.of_file(tmp_path / "a.pth", 3) == HeadClasses(3, BIRDS, f"the list in {tmp_path / name}")
    other = classes.of_file(tmp_path / "a.pth", 4)  # a list of other things
    assert other.names == () and other.passed_over == f"{tmp_path / name} lists 3 classes, not 4, and is ignored"
    torch.save({"model": WEIGHT, "classes": ["x", "y", "z"]}, tmp_path / "a.pth")
    assert classes.of_file(tmp_path / "a.pth", 3).names == ("x", "y", "z")  # the list inside takes precedence


@pytest.mark.parametrize("config", [{"label_names": BIRDS}, {"id2label": dict(enumerate(BIRDS))}])
def test_a_class_list_in_a_configuration_file(tmp_path, config):
    torch.save(WEIGHT, tmp_path / "a.pth")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert classes.of_file(tmp_path / "a.pth", 3).names == BIRDS
    (tmp_path / "config.json").write_text("not JSON")
    assert classes.of_file(tmp_path / "a.pth", 3) == HeadClasses(3)


def test_a_class_list_named_by_the_user(tmp_path, birds):
    (file := tmp_path / "my.txt").write_text("\n".join(BIRDS))
    assert classes.match(classes.of_list(file, 3, "x"), birds) == HeadRows((2, 1, 0), f"`classes` {file}")
    with pytest.raises(UserError, match="names 3 classes, and the head of x has 4 rows"):
        classes.of_list(file, 4, "x")
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="can't be read"):
        classes.of_list(file, 3, "x")
    with pytest.raises(UserError, match="known: digits: leave `classes` out"):
        classes.of_teacher(teachers.teacher("deit_s", "mini"), file)


@pytest.mark.parametrize(
    ("names", "rows", "how"),
    [
        (("wren", "auk", "Kite"), (2, 1, 0), "it"),
        (("owl", "Wren", "AUK", "kite"), (3, 2, 1), "it"),
        (("kite", "Kite", "auk", "wren"), (1, 2, 3), "it"),  # exact matches take precedence
        (("wren", "auk", "owl"), None, "it lacks 1 of the 3 classes of .*: Kite"),
        (("a", "b", "c"), None, "it lacks 3 of the 3 classes of .*: Kite, auk, wren"),
        (("wren", "auk", "Kite", "auk"), None, "it is ambiguous about auk"),
        (("wren", "auk", "KITE", "kite"), None, "it is ambiguous about Kite"),
    ],
)
def test_class_names_are_matched(birds, names, rows, how):
    found = classes.match(HeadClasses(len(names), names, "it"), birds)
    assert found.rows == rows
    assert re.fullmatch(how, found.how)


def test_without_a_list_the_mapping_is_an_assumption_or_missing(birds):
    assert classes.match(HeadClasses(3), birds) == HeadRows((0, 1, 2), ASSUMED)
    found = classes.match(HeadClasses(4, passed_over="b.txt lists 2 classes"), birds)
    assert found.rows is None
    assert found.note == f"it has 4 rows, and {birds.name} 3 classes; b.txt lists 2 classes"


def test_an_assumption_is_tested_against_chance():
    assumed, known = (HeadRows(tuple(range(10)), how) for how in (ASSUMED, IMAGENET))
    for right in range(41):  # of 200: the exact binomial tail, P(X >= right)
        correct = np.arange(200) < right
        chance = binom.sf(right - 1, 200, 0.1) > 0.05
        assert assumed.warning(correct) == (SUSPECT if chance else "")
        assert known.warning(correct) == ""
    assert HeadRows(None, "").warning(np.zeros(3, bool)) == ""


def test_imagenets_wnids(tmp_path, birds):
    some = tuple(reversed(testsets.synsets()[5:400:100]))
    data = make_folder(tmp_path / "some", some)
    rows = (5, 105, 205, 305)
    assert classes.match(HeadClasses(1000), data) == HeadRows(rows, IMAGENET)
    assert sources.find(data).head_rows(1000) == rows
    info = ImageNetInfo("imagenet-1k")
    english = tuple(info.index_to_description(row) for row in range(1000))
    assert classes.match(HeadClasses(1000, english, "it"), data).rows == rows
    assert classes.match(HeadClasses(1000, testsets.synsets()[::-1], "it"), data).rows == tuple(999 - r for r in rows)
    assert classes.match(HeadClasses(4), data) == HeadRows((0, 1, 2, 3), ASSUMED)
    odd = make_folder(tmp_path / "odd", (*some, "n00000000"))  # looks like a wnid, and is none of ImageNet-1k
    assert sources.find(odd).imagenet_rows == () and classes.match(HeadClasses(1000), odd).rows is None
    assert classes.match(HeadClasses(1000), birds).rows is None


def test_a_runs_own_classes(tmp_path, birds):
    network = Network(image_size=8, patch_size=4, channels=3, width=8, depth=1, heads=1, classes=3)
    recipe = Recipe(epochs=1, batch_size=1)
    head = classes.of_run(RunSpec(network=network, data=birds, recipe=recipe, seed=Seed(data=0, model=0)))
    assert classes.match(head, birds) == HeadRows((0, 1, 2), OWN)
    other = make_folder(tmp_path / "other", ("auk", "kite", "owl"))
    assert "lacks 1 of the 3 classes" in classes.match(head, other).how
    fewer = make_folder(tmp_path / "fewer", ("WREN", "auk"))
    assert classes.match(head, fewer) == HeadRows((2, 1), OWN)
    gone = HeadClasses(3, data=birds.model_copy(update={"fingerprint": "0" * 64}))  # its folder has changed
    assert classes.match(gone, other) == HeadRows((0, 1, 2), ASSUMED)
    imagenet = HeadClasses(1000, data=Data(name="imagenet", train=1, image_size=224))
    imagenette = Data(name="imagenette", train=1, image_size=224)
    assert classes.match(imagenet, imagenette).rows == sources.find("imagenette").imagenet_rows
    # Embedded data are another task, whatever the number of classes.
    digits = classes.of_teacher(teachers.teacher("deit_s", "mini"))
    assert classes.match(digits, Data(name="digits", train=5)) == HeadRows(tuple(range(10)), OWN)
    assert classes.match(digits, Data(name="larger", train=5)).how == "its classes are those of digits"
    assert classes.match(digits, imagenette).rows is None
