"""The installed ablations, their order, and the options with which `reproduce` runs them."""

import tomllib
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from atdiag.study import registry
from atdiag.study.registry import Placement, ablation, placement

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


@pytest.fixture
def entries(monkeypatch):
    """Replace the installed ablations: source -> function, or an error that loading it raises."""

    def put(functions: dict) -> None:
        def load(entry):
            found = functions[entry.value]
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(EntryPoint, "load", load)
        made = [EntryPoint(source.rpartition(":")[2], source, registry.GROUP) for source in functions]
        monkeypatch.setattr(registry, "_entries", lambda: iter(made))

    return put


def at(order: int):
    @ablation(order=order, reproduce={})
    def function(lab):
        """An experiment."""

    return function


def unplaced(lab):
    """An experiment without an order."""


def test_our_own_ablations_come_first_in_their_order(entries):
    entries(
        {
            "theirs.x:early": at(1),
            "ablations.c:none": unplaced,
            "ablations.b:late": at(20),
            "theirs.y:broken": ImportError("no such"),
            "ablations.a:soon": at(10),
            "theirs.z:late": at(2),
        }
    )
    found = registry.installed()
    assert [one.source for one in found] == [
        *("ablations.a:soon", "ablations.b:late", "ablations.c:none"),
        *("theirs.x:early", "theirs.z:late", "theirs.y:broken"),
    ]
    assert (found[-1].function, found[-1].fault) == (None, "ImportError: no such")
    # all except those without an order or that can't be loaded; of equal names the first
    assert list(registry.placed()) == ["soon", "late", "early"]
    assert registry.placed()["late"][1].order == 20


def test_the_decorator_returns_the_function_itself():
    def function(lab):
        """An experiment."""

    assert ablation(order=5, reproduce={"k": (1, 2)})(function) is function
    assert placement(function) == Placement(5, {"k": (1, 2)})
    assert placement(unplaced) is None


@pytest.mark.parametrize(
    ("place", "mini", "small", "quick"),
    [
        (Placement(1, {"k": 1}), {"k": 1}, {"k": 1}, {"k": 1}),
        (Placement(1, {"k": 1}, mini={"k": 2}), {"k": 2}, {"k": 1}, {"k": 2}),
        (Placement(1, {"k": 1}, mini={"k": 2}, quick={"k": 3}), {"k": 2}, {"k": 1}, {"k": 3}),
        (Placement(1, {"k": 1}, mini={}, quick={}), {}, {"k": 1}, {}),
    ],
)
def test_the_options_of_reproduce(place, mini, small, quick):
    assert place.options("mini", quick=False) == mini
    assert place.options("small", quick=False) == small
    assert place.options("mini", quick=True) == quick


def test_every_shipped_ablation_is_installed_and_has_an_order():
    shipped = PROJECT["entry-points"][registry.GROUP]
    ours = {one.name: one for one in registry.installed() if one.source.startswith("ablations.")}
    assert {name: one.source for name, one in ours.items()} == shipped
    orders = [placement(one.function).order for one in ours.values()]
    assert orders == sorted(set(orders))
    for name, source in shipped.items():
        module, _, function = source.partition(":")
        assert ours[name].function is getattr(import_module(module), function)
