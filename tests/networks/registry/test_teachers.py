"""The registry's data, compared with timm's configurations and with the networks that timm builds."""

import io
import json
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import timm

from atdiag.core.errors import UserError
from atdiag.networks.model import components
from atdiag.networks.registry import listing, teachers
from atdiag.networks.registry.teachers import register_teacher
from atdiag.networks.timm import architectures
from atdiag.networks.weights import formats

NAMES = sorted(teachers.published())

SIZES = {
    "deit": "sb",
    "augreg": "sbl",
    "dino": "sb",
    "mae": "blh",
    "mocov3": "sb",
    "ibot": "sbl",
    "siglip2": ("b", "l", "so"),
    "dinov2": "sbl",
    "dinov2_reg": "sbl",
    "clip": "bl",
    "beitv2": "bl",
    "deit3": "sbl",
    "beit": "b",
    "dinov3": "sbl",
    "eva02": "sb",
    "pe": "sb",
}
NAMED_2026 = {"deit", "dino", "dinov2", "dinov2_reg", "clip", "beitv2", "ibot", "mae", "siglip2"}

LICENCES = {"clip": "MIT", "beit": "MIT", "dinov3": "DINOv3"}
"""Where timm's table keeps its default (Apache-2.0) and the authors' repositories say otherwise, and a shorter name."""


@pytest.fixture
def nothing_registered(monkeypatch):
    monkeypatch.setattr(teachers, "_OWN", {})


def test_every_family_and_size_is_there():
    assert set(NAMES) == {f"{family}_{size}" for family, sizes in SIZES.items() for size in sizes}
    assert {row.family for row in map(teachers.row, NAMES) if row.paper2026} == NAMED_2026


@pytest.mark.parametrize("name", NAMES)
def test_rows_agree_with_timms_configurations(name):
    row, facts = teachers.row(name), timm.get_pretrained_cfg(teachers.row(name).model)
    if row.url:
        assert row.hub is None
        assert row.url.startswith("https://")
        assert row.classes == 0
    else:
        assert (row.hub, row.classes) == (facts.hf_hub_id, facts.num_classes)
        assert (row.mean, row.std, row.interpolation) == (facts.mean, facts.std, facts.interpolation)
        assert row.licence.lower() == LICENCES.get(row.family, facts.license).lower()
        assert facts.license in (row.licence.lower(), "apache-2.0", "dinov3-license")  # timm's, its default, in full
        assert not facts.hf_hub_filename
    assert (3, row.image_size, row.image_size) == facts.input_size


@pytest.mark.parametrize("name", NAMES)
def test_rows_agree_with_inspection_of_the_network(name):
    row, network = teachers.row(name), teachers.teacher(name, "paper").network
    assert network.components == tuple(sorted(row.components))
    assert network.differences == ()
    assert (network.image_size, network.patch_size, network.width) == (row.image_size, row.patch, row.width)
    assert (network.depth, network.heads, network.tokens) == (row.depth, row.heads, row.tokens)
    assert (network.class_token, network.registers) == (row.class_token, row.registers)
    assert network.classes == max(row.classes, 1)
    assert network.mean in (row.mean, row.mean[:1])
    assert network.std in (row.std, row.std[:1])
    assert set(row.follows) == (set() if row.class_token else {"no_class_token"})


def test_head_counts_that_shapes_do_not_determine():
    assert teachers.row("mocov3_s").heads == 12
    assert teachers.row("dino_s").heads == teachers.row("ibot_s").heads == 6


def test_the_table_uses_only_known_terms():
    for row in map(teachers.row, NAMES):
        assert {*row.components, *row.follows} <= set(components.COMPONENTS)
        assert set(row.formats) <= set(formats._DROPPED)
        assert all((row.objective, row.data, row.augmentation, row.title))
    assert {row.licence for row in map(teachers.row, NAMES) if row.family in ("mae", "mocov3")} == {"CC-BY-NC-4.0"}


def test_the_table_fits_into_eighty_columns():
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(listing.table(listing.rows("paper"), "paper"))
    text = console.export_text()
    assert all(name in text for name in NAMES)
    assert "…" not in text
    assert "CC-BY-NC" in text
    assert text.count("authors") == sum(teachers.row(name).url is not None for name in NAMES)


def test_json_has_every_field():
    rows = json.loads(json.dumps(listing.rows("paper", "dinov2")))
    assert [row["name"] for row in rows] == ["dinov2_s", "dinov2_b", "dinov2_l"]
    assert rows[0]["source"] == "timm:vit_small_patch14_dinov2.lvd142m"
    assert (rows[0]["image_size"], rows[0]["tokens"], rows[0]["patch"]) == (518, 1370, 14)
    assert {"licence", "mean", "interpolation", "momentum", "masking", "target", "augmentation"} < rows[0].keys()


# --- references ----------------------------------------------------------------------------------------------------


def test_a_name_means_the_miniature_at_mini_and_the_published_network_elsewhere():
    mini, small, paper = (teachers.teacher("dinov2_s", profile) for profile in ("mini", "small", "paper"))
    assert (mini.network.image_size, mini.label) == (20, "dinov2_s (mini)")
    assert (small.network, small.label) == (paper.network, "dinov2_s (small)")
    assert teachers.teacher("dinov2_s", "small", 140).network.tokens == 101


def test_the_miniatures_keep_their_components():
    assert {name: teachers.miniature_network(name).components for name in teachers.miniatures()} == {
        "deit_s": (),
        "deit_b": (),
        "siglip2_b": ("attention_pool",),
        "dinov2_s": ("layer_scale",),
        "dinov2_b": ("layer_scale",),
        "dinov2_reg_s": ("layer_scale", "registers"),
        "clip_b": ("no_patch_bias", "pre_norm", "quick_gelu"),
        "beitv2_b": ("layer_scale", "no_abs_pos", "rel_pos_bias"),
        "eva02_s": ("qk_norm", "rope", "swiglu"),
    }


@pytest.mark.parametrize(
    ("name", "use"), {"augreg_l": "deit_b", "ibot_s": "deit_s", "deit3_s": "dinov2_s", "beit_b": "beitv2_b"}.items()
)
def test_a_teacher_without_a_miniature_names_the_nearest(name, use):
    assert teachers.stand_in(name) == use
    with pytest.raises(UserError, match=f"{name} has no miniature of its own: .* use '{use}'"):
        teachers.teacher(name, "mini")


@pytest.mark.parametrize(
    ("reference", "size", "said"),
    [
        ("dinov5_s", 224, "unknown teacher 'dinov5_s', did you mean 'dinov2_s'?"),
        ("timm:vit_tiny_patch16_225", 224, "timm has no model 'vit_tiny_patch16_225', did you mean 'vit_tiny_patch1"),
        ("timm:vit_small_patch16_224.dinno", 224, "did you mean 'vit_small_patch16_224.dino'?"),
        ("timm:resnet18", 224, "timm:resnet18 can't be a teacher: it has no self-attention"),
        ("timm:swin_tiny_patch4_window7_224", 224, "its attention stays within windows"),
        ("timm:vit_tiny_patch16_224", None, "needs real images, and the data set has none: add `data` FOLDER"),
        ("deit_s@/nowhere/x.pth", 224, "/nowhere/x.pth: there is no such file"),
        ("deit_s@", 224, "'deit_s@' names no file: type deit_s@/path/to/file"),
        (
            "dinov2_s",
            128,
            "128 px is not a multiple of that: add `data.image_size`=126, or 140",
        ),
        ("timm:xcit_nano_12_p16_224", 224, "can't be a teacher"),
        (
            "timm:vit_tiny_patch16_224",
            9,
            "9 px is not a multiple of that: add `data.image_size`=16",
        ),
    ],
)
@pytest.mark.parametrize("profile", ["small", "mini"])
def test_impossible_references_are_refused_in_one_line(reference, size, said, profile):
    if reference == "dinov2_s" and profile == "mini":
        said = "dinov2_s (mini) is a miniature for scenes of 20 px, not for images of 128 px"
    with pytest.raises(UserError) as fault:
        teachers.teacher(reference, profile, size)
    assert said in str(fault.value)
    assert "\n" not in str(fault.value)


def test_any_timm_vit_is_described():
    found = teachers.teacher("timm:vit_base_patch16_clip_quickgelu_224.openai", "mini", 64)
    assert found.network == teachers.teacher("clip_b", "paper", 64).network
    assert (found.sha256, found.name) == (None, "timm:vit_base_patch16_clip_quickgelu_224.openai")
    assert "rope" in teachers.teacher("timm:vit_small_patch16_dinov3", "small", 64).network.components


def test_planning_describes_each_network_once(monkeypatch):
    first = teachers.teacher("mae_h", "paper", 112)
    monkeypatch.setattr(architectures, "build", None)
    assert teachers.teacher("mae_h", "paper", 112) == first


# --- the user's own ------------------------------------------------------------------------------------------------


def test_a_users_own_teacher(nothing_registered, tmp_path):
    register_teacher(
        "pathology_s",
        "vit_small_patch16_224",
        file=tmp_path / "pathology.safetensors",
        arguments={"num_classes": 10},
        mean=(0.7, 0.5, 0.7),
        std=(0.2, 0.2, 0.2),
        title="Pathology ViT",
    )
    source = teachers.source("pathology_s")
    assert (source.file, source.mean) == (tmp_path / "pathology.safetensors", (0.7, 0.5, 0.7))
    with pytest.raises(UserError, match="there is no such file"):
        teachers.teacher("pathology_s", "paper", 64)
    network = architectures.network(source, 64)
    assert (network.classes, network.mean, network.std) == (10, (0.7, 0.5, 0.7), (0.2,))
    for profile in ("mini", "paper"):
        row = next(row for row in listing.rows(profile) if row["name"] == "pathology_s")
        assert (row["title"], row["available"], row["components"]) == ("Pathology ViT", False, None)
        listing.table(listing.rows(profile), profile)
    with pytest.raises(ValueError, match="there is already a teacher 'pathology_s'"):
        register_teacher("pathology_s", "vit_small_patch16_224")


@pytest.mark.parametrize("name", ["clip_b", "timm:x", "a@b", "a b", "a/b", ""])
def test_names_that_a_user_can_not_take(name, nothing_registered):
    with pytest.raises(ValueError, match=r"already a teacher|can't be a teacher's name"):
        register_teacher(name, "vit_small_patch16_224")


@pytest.mark.parametrize("profile", ["mini", "small", "paper"])
def test_a_users_own_teacher_keeps_its_name_in_every_profile(nothing_registered, profile):
    register_teacher("mine", "vit_tiny_patch16_224", classes=7)
    found = teachers.teacher("mine", profile, 64)
    assert (found.label, found.network.classes) == ("mine", 7)
    assert not teachers.is_miniature(found)


def test_classes_of_a_users_own_teacher(nothing_registered):
    register_teacher("seven", "vit_tiny_patch16_224", classes=7)
    register_teacher("six", "vit_tiny_patch16_224", arguments={"num_classes": 6})
    register_teacher("none", "vit_tiny_patch16_224", classes=0)
    register_teacher("timms", "vit_tiny_patch16_224")
    networks = [teachers.teacher(name, "small", 64).network.classes for name in ("seven", "six", "none", "timms")]
    assert networks == [7, 6, 1, 1000]
    listed = {row["name"]: row["classes"] for row in listing.rows("mini")}
    assert [listed[name] for name in ("seven", "six", "none", "timms")] == [7, 6, 0, None]
    for wrong in (-1, True, 7.0, "7"):
        with pytest.raises(ValueError, match=f"`classes` {wrong!r} is not a number of classes"):
            register_teacher("other", "vit_tiny_patch16_224", classes=wrong)
    with pytest.raises(ValueError, match=r"`classes` 7 is not the num_classes of its arguments \(6\)"):
        register_teacher("other", "vit_tiny_patch16_224", classes=7, arguments={"num_classes": 6})


ours = {"model": "vit_tiny_patch16_224", "licence": "ours"}


def test_other_packages_add_teachers_by_entry_points(monkeypatch):
    def entry(name, value):
        return EntryPoint(name, value, teachers.ENTRY_POINTS)

    here = f"{Path(__file__).stem}_plugin"
    monkeypatch.setitem(
        __import__("sys").modules,
        here,
        type("Module", (), {"a": ours, "b": staticmethod(lambda: ours), "c": {**ours, "depth": 3}}),
    )
    found = [
        entry("own_a", f"{here}:a"),
        entry("own_b", f"{here}:b"),
        entry("clip_b", f"{here}:a"),
        entry("bad", "no:x"),
        entry("odd", f"{here}:c"),
    ]
    monkeypatch.setattr(teachers, "entry_points", lambda group: found)
    teachers._installed.cache_clear()
    try:
        with pytest.warns(UserWarning) as warned:
            names = set(teachers.registry())
        assert names == {*NAMES, "own_a", "own_b"}
        assert teachers.row("own_b").licence == "ours"
        assert [str(w.message).split("'")[1] for w in warned] == ["clip_b", "bad", "odd"]
        assert str(warned[2].message).endswith("is left out (depth: not an argument of register_teacher)")
        assert teachers.teacher("own_a", "mini", 64).network.width == 192
    finally:
        teachers._installed.cache_clear()
