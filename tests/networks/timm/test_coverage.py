"""Which of timm's networks can teach, and which can have a native student."""

from collections import Counter

import pytest

from atdiag.networks.timm import coverage


@pytest.mark.parametrize(
    ("module", "name", "kind", "why"),
    [
        ("eva", "vit_small_patch16_dinov3", "native", "rope"),
        ("eva", "eva02_tiny_patch14_224", "native", "swiglu"),
        ("vision_transformer", "vit_tiny_patch16_224", "native", "none"),
        ("vision_transformer_relpos", "test_vit_relpos", "maps", "other_rel_pos_bias"),
        ("vision_transformer", "vit_pwee_patch16_reg1_gap_256", "maps", "parallel_blocks"),
        ("vitamin", "vitamin_small_224", "maps", "convolutional_embedding"),
        ("vision_transformer", "vit_dwee_patch16_reg1_gap_256", "refused", "no single softmax map"),
        ("naflexvit", "naflexvit_base_patch16_gap", "native", "registers"),
        ("vision_transformer_sam", "samvit_base_patch16", "refused", "attend within windows"),
    ],
)
def test_a_sample(module, name, kind, why):
    found = coverage.look(module, name)
    assert found.kind == kind
    assert why in found.why


def test_a_survey_in_lines():
    rows = [
        coverage.Covered("eva", "a", "native", "rope"),
        coverage.Covered("eva", "b", "maps", "parallel_blocks"),
        coverage.Covered("beit", "c", "refused", "its blocks are odd"),
    ]
    assert coverage.lines(rows) == [
        "eva: 2 networks, 1 with native students, 1 show their maps, 0 refused",
        "beit: 1 networks, 0 with native students, 0 show their maps, 1 refused",
        "no native student (parallel_blocks): b",
        "can't teach (its blocks are odd): c",
    ]


@pytest.mark.slow
def test_most_of_timms_networks():
    """At least 230 of 251 have native students, all NaFlex networks, too, and 301 of the 310 counted can teach."""
    rows = list(coverage.survey())
    ours = Counter(row.kind for row in rows if row.module in coverage.FAMILIES)
    assert ours["native"] >= 230
    assert {row.kind for row in rows if row.module == "naflexvit"} == {"native"}
    assert Counter(row.kind for row in rows)["refused"] <= 0.03 * len(rows)
