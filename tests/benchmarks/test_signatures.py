"""The committed table of signatures is what its script writes."""

import csv
from pathlib import Path

import pytest

from atdiag.networks.registry import recognition
from benchmarks import signatures

SAMPLE = (
    *("beit_base_patch16_224", "beit_base_patch16_384", "deit3_small_patch16_224", "deit_tiny_distilled_patch16_224"),
    *("vit_small_patch16_rope_224", "vit_small_patch16_rope_mixed_224", "eva02_tiny_patch14_224"),
    *("eva02_tiny_patch14_336", "deit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_tiny_patch16_224"),
)


def committed():
    with Path(recognition.__file__).with_name("signatures.csv").open() as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def compare(found, names):
    """Compare everything but the functions' numbers, of which only equality means anything."""
    there = {row["model"]: {key: str(value) for key, value in row.items()} for row in found}
    table = {name: row for name, row in committed().items() if name in names}
    for column in signatures.COLUMNS:
        if column != "function":
            assert {name: row[column] for name, row in there.items()} == {n: row[column] for n, row in table.items()}
    assert partition(there) == partition(table)


def partition(rows):
    """Return the sets of models that share a function."""
    by = {}
    for name, row in rows.items():
        by.setdefault(row["function"], set()).add(name)
    return {frozenset(names) for names in by.values()}


def test_a_sample_is_made_again():
    assert set(SAMPLE) <= set(signatures.models())
    compare(signatures.rows(SAMPLE), SAMPLE)


@pytest.mark.slow
def test_the_whole_table_is_made_again():
    names = signatures.models()
    compare(signatures.rows(names), names)
