"""Figures are legible at the width of a paper's column: nothing overlaps, nothing is cut off."""

import dataclasses

import numpy as np
import pytest

from atdiag.analysis.interventions import Outcome
from atdiag.analysis.maps import Shown
from atdiag.analysis.probing import FITTED, Probed
from atdiag.analysis.similarity import Similarity
from atdiag.analysis.statistics import OF_HEADS, OF_LAYERS, Stats
from atdiag.core.spec import Network, Teacher
from atdiag.data.scenes import train_scenes
from atdiag.reports import writers
from atdiag.study import depth as depths
from atdiag.study.protocol import BASELINE, ArmResult, Contrast, Report, Study
from figures import attention_maps, attention_stats, depth, interventions, similarity, style
from figures.contrasts import contrasts
from figures.layer_curve import layer_curve
from figures.scenes import scenes
from tests.drawings import check, estimate


def joined(drawn) -> set[str]:
    """Join texts without their line breaks."""
    return {text.replace("\n", "").replace(" ", "") for text in drawn}


RESCUE = "rescue: (native + transfer - native) - (standard + transfer - scratch)"


def report(effects, asked=None, half=1.0, seeds=3, base=50.0, teacher=80.0, name="clip_b", curve=False) -> Report:
    """Make a report on arms that lie ``effects`` above the baseline."""
    network = Network(image_size=20, patch_size=4, channels=1, width=48, depth=12, heads=3, classes=10)
    weights = Teacher(name=name, profile="mini", network=network, sha256="0" * 64)
    asked = asked or {}
    study = Study(
        ablation="layers" if curve else "rescue",
        teacher=weights,
        options={"from": "bottom", "transfer": "distill"},
        arms=(),
        contrasts=tuple(Contrast(name, {}) for name in asked),
        verdict=lambda report: "",
        curve={arm: k for k, arm in enumerate([BASELINE, *effects])} if curve else {},
    )
    rows = [ArmResult(BASELINE, base, seeds, ())]
    rows += [ArmResult(arm, base + effect, seeds, (), estimate(effect, half, seeds)) for arm, effect in effects.items()]
    contrasts = {name: estimate(value, half, seeds) for name, value in asked.items()}
    reference = None if teacher is None else ArmResult("teacher", teacher, 1, ())
    return Report(study, "mini", tuple(rows), contrasts, reference)


USUAL = {"standard + copy": 3.0, "pre_norm + copy": 9.0, "quick_gelu + copy": -2.5, "native, scratch": 0.2}
ASKED = {RESCUE: 4.0, "transfer in the native student": 0.3, "native minus standard, both with transfer": -2.0}


@pytest.mark.parametrize(
    "made",
    [
        report(USUAL, ASKED),
        report({"all blocks": -5.0}),
        report({"reinit attn": 3.0, "reinit attn + copy": 12.0}, {"copy, given the start": 9.0}),
        report(USUAL, ASKED, seeds=1, name="dinov2_reg_s"),
        report(USUAL, ASKED, half=0.0),
        report({arm: 45 + value / 10 for arm, value in USUAL.items()}, half=0.4),
        report({arm: -95 + value / 10 for arm, value in USUAL.items()}, half=0.4, base=100.0),
        report({arm: value / 1000 for arm, value in USUAL.items()}, ASKED, half=1e-4),
        report(USUAL, ASKED, half=200.0),
        report({f"arm number {i} of very many indeed, with a long name": i - 10.0 for i in range(24)}, ASKED),
        report({"a_name_of_one_word_that_is_longer_than_any_line_could_ever_be": 3.0, "x": 1.0}),
        report(USUAL, ASKED, teacher=None),
    ],
    ids=[
        "usual",
        "one",
        "few",
        "one seed",
        "no width",
        "far",
        "far below",
        "tiny",
        "huge",
        "many",
        "long",
        "no teacher",
    ],
)
def test_contrasts(made):
    drawn = check(contrasts(made))
    said = {text.replace("\n", " ").replace("\u00a0", " ") for text in drawn}
    names = {name.replace(" ", "") for name in [*(row.arm for row in made.rows[1:]), *made.contrasts]}
    assert names <= {text.replace(" ", "") for text in said}
    assert {"top-1", *(f"{row.top1:.1f} %" for row in made.rows[1:])} <= said
    assert any("red" in text for text in said) == bool(made.contrasts)
    assert any(f"{BASELINE} ({made.rows[0].top1:.1f} %)" in text for text in said)
    assert any(f"{made.study.teacher.label}, {made.rows[0].seeds} seed" in text for text in said)
    assert any("images only" in text for text in said) == (made.rows[0].seeds == 1)


def test_clear_contrasts_have_filled_markers():
    figure = contrasts(report({"clear": 3.0, "noise": 0.5}, {"asked": -3.0}))
    faces = [line.get_markerfacecolor() for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert faces == [style.BLUE, "white", style.VERMILLION]
    undecided = contrasts(report({"clear": 3.0}, seeds=1))
    assert [line.get_markerfacecolor() for line in undecided.axes[0].lines if line.get_marker() == "o"] == ["white"]


KS = [*(f"bottom {k}" for k in range(1, 12)), "all blocks"]


@pytest.mark.parametrize(
    "made",
    [
        report({arm: 1.5 * k for k, arm in enumerate(KS)}, half=3.0, curve=True),
        report({arm: 0.1 * k for k, arm in enumerate(KS)}, teacher=51.0, curve=True),
        report({arm: -0.5 * k for k, arm in enumerate(KS)}, teacher=50.0, curve=True, seeds=1),
        report({arm: 0.5 * k for k, arm in enumerate(KS)}, teacher=49.9, curve=True),
        report(dict.fromkeys(KS, 0.0), half=0.0, teacher=None, curve=True),
        report(dict.fromkeys(KS, 0.0), half=0.0, teacher=50.0, curve=True),
        report({arm: k / 1000 for k, arm in enumerate(KS)}, half=1e-4, teacher=None, curve=True),
        report({f"bottom {k}": k / 2 for k in range(1, 25)}, curve=True, base=10.0, teacher=100.0, name="dinov2_reg_s"),
    ],
    ids=["rising", "near teacher", "falling", "weak teacher", "flat", "flat at teacher", "tiny", "deep"],
)
def test_layer_curve(made):
    drawn = check(layer_curve(made))
    below = f"k\nscratch: {made.rows[0].top1:.1f} %"
    below += f"\nteacher: {made.reference.top1:.1f} %" if made.reference else ""
    assert {"0", "12", below, "top-1 points minus scratch"} <= drawn
    assert any("bottom" in text and "distill" in text for text in drawn)


def test_the_curve_shows_the_measured_contrasts():
    """Contrasts with their own intervals on an axis of contrasts, whatever the baseline's accuracy."""
    for base in (50.0, 12.0):
        made = report({arm: 1.5 * k for k, arm in enumerate(KS)}, half=3.0, curve=True, base=base)
        axes = layer_curve(made).axes[0]
        line = next(line for line in axes.lines if len(line.get_xdata()) == 13)
        assert list(line.get_xdata()) == list(range(13))
        assert list(line.get_ydata()) == [0.0, *(row.contrast.value for row in made.rows[1:])]
        band = axes.collections[0].get_paths()[0].vertices
        assert band[:, 1].min() == pytest.approx(-3.0)
        assert band[:, 1].max() == pytest.approx(1.5 * 11 + 3)
        assert -6 < axes.get_ylim()[0] < -3 and 19.5 < axes.get_ylim()[1] < 24
        points = [line for line in axes.lines if line.get_marker() == "o"]
        assert [p.get_markerfacecolor() != "white" for p in points] == [row.contrast.clear for row in made.rows[1:]]


@pytest.mark.parametrize("task", ["digits", "larger"])
def test_scenes(task):
    drawn = check(scenes(task))
    labels = train_scenes(task, 25, 0, 6).labels
    assert {int(text) for text in drawn} == {int(label) + (task == "larger") for label in labels}


def test_colours_can_be_told_apart_by_the_colour_blind():
    """The two colours of a figure differ for everyone (Machado et al. 2009, severity 1, in linear RGB)."""
    import numpy as np

    kinds = {
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }

    def linear(colour):
        srgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)

    for matrix in kinds.values():
        seen = [np.clip(np.array(matrix) @ linear(c), 0, 1) ** (1 / 2.2) for c in (style.BLUE, style.VERMILLION)]
        assert np.linalg.norm(seen[0] - seen[1]) > 0.3
    for colour in (style.INK, style.GREY):  # text on white: WCAG's contrast for small print
        luminance = linear(colour) @ [0.2126, 0.7152, 0.0722]
        assert 1.05 / (luminance + 0.05) > 4.5


def compared(layers=12, heads=3, others=3, name="deit_s (mini)", other="dinov2_reg_s (mini)", token=True, seed=0):
    """Make a comparison of two networks with random numbers."""
    draw = np.random.default_rng(seed)
    groups = ("all", "class", "patch") if token else ("all", "patch")
    curve = {rows: draw.random(layers) for rows in groups}
    matrices = {rows: draw.random((layers, heads, others)) for rows in groups}
    pairs = tuple((i, i if heads == others else 2 * i) for i in range(layers))
    return Similarity(name, other, pairs, 256, matrices, curve, curve)


LONG = "vit_so400m_patch14_reg4_siglip_gap_896"
FILE = "vit_tiny_patch16_224.augreg_in21k_ft_in1k 587e9d"


@pytest.mark.parametrize(
    "found",
    [
        [compared()],
        [compared(layers=24, heads=16, others=16)],
        [compared(layers=1, heads=1, others=1, token=False)],
        [compared(layers=3, heads=2, others=6, name=LONG, other=LONG)],
        [compared(name=FILE, other=FILE)],
        [compared(name=FILE, other=FILE), compared(name=FILE, other="1a2b3c distill")],
        [compared(other=f"1a2b3c distill at step {i}", seed=i) for i in range(9)],
    ],
    ids=["usual", "large", "one", "long", "of files", "of files, several", "many"],
)
def test_similarity(found):
    drawn = joined(check(similarity.by_layer(found)))
    assert joined([f"layer of {found[0].a}"]) <= drawn
    assert len(found) == 1 or joined(one.b for one in found) <= drawn
    figure = similarity.heads(found[0])
    drawn = joined(check(figure))
    assert any(found[0].b.replace(" ", "") in text for text in drawn)
    # The dots are the optimal matching, one for each pair of heads.
    for axes, (mine, theirs) in zip(figure.axes, found[0].assignments(), strict=False):
        (dots,) = axes.collections
        assert dots.get_offsets().tolist() == [[t, m] for m, t in zip(mine, theirs, strict=True)]


def outcome(name, layers, depth=12, labels=True, seed=0):
    """Make the outcome of an intervention with random numbers."""
    draw = np.random.default_rng(seed)
    before, after, truth = (draw.integers(0, 3, 64) for _ in range(3))
    stream = draw.random(depth)
    return Outcome(
        subject="deit_s (mini)", replaced=name, layers=layers, heads=None, images=64, before=before, after=after,
        labels=truth if labels else None, clusters=None, residual=stream, residual_class=stream, logits=1.0,
    )  # fmt: skip


KINDS = ("uniform map", "identity map", "shuffled map", "map of dinov2_reg_s (mini)")


@pytest.mark.parametrize(
    "found",
    [
        [outcome(name, tuple(range(12)), seed=i) for i, name in enumerate(KINDS)],
        [outcome("uniform map", (3,))],
        [outcome(name, (i,), seed=i + 100 * j) for j, name in enumerate(KINDS) for i in range(12)],
        [outcome(f"q of {LONG}", (i,), 40, seed=i) for i in range(40)],
    ],
    ids=["usual", "one", "each", "deep"],
)
def test_interventions(found):
    names = joined(one.replaced for one in found)
    drawn = joined(check(interventions.residual(found)))
    assert names <= drawn and "changeoftheresidualstream,shareofitsnorm" in drawn
    drawn = joined(check(interventions.accuracy(found)))
    assert names <= drawn and any("filled:clearofzero;open:not" in text for text in drawn)


@pytest.mark.parametrize("layers", [[tuple(range(12))], [(i,) for i in range(12)]], ids=["at once", "each"])
def test_clear_changes_have_filled_markers_here_too(layers):
    found = [outcome("uniform map", some, seed=i) for i, some in enumerate(layers)]
    found[0] = dataclasses.replace(found[0], before=found[0].labels, after=(found[0].labels + 1) % 3)
    points = [line for line in interventions.accuracy(found).axes[0].lines if line.get_marker() == "o"]
    expected = [not one.change[1] <= 0 <= one.change[2] for one in found]
    assert [line.get_markerfacecolor() != "white" for line in points] == expected and expected[0]


@pytest.mark.parametrize("layers", [[tuple(range(12))], [(i,) for i in range(12)]], ids=["at once", "each"])
def test_no_change_is_not_magnified(layers):
    found = [outcome("uniform map", some) for some in layers]
    axes = interventions.accuracy([dataclasses.replace(one, after=one.before) for one in found]).axes[0]
    low, high = axes.get_xlim() if len(layers) == 1 else axes.get_ylim()
    assert low <= -5 and high >= 5


def test_saved_figures_are_reproducible(tmp_path):
    made = [tmp_path / f"{i}.{kind}" for i in range(2) for kind in ("png", "pdf")]
    for path in made:
        path.write_bytes(writers.draw(similarity.by_layer([compared()]), path.suffix.removeprefix(".")))
    assert made[0].read_bytes() == made[2].read_bytes() and made[1].read_bytes() == made[3].read_bytes()
    assert b"CreationDate" not in made[1].read_bytes()


def test_lines_can_be_told_apart_without_colours():
    for made in (
        similarity.by_layer([compared(other=f"net {i}", seed=i) for i in range(9)]),
        interventions.residual([outcome(f"map of net {i}", tuple(range(12)), seed=i) for i in range(9)]),
    ):
        drawn = [line for line in made.axes[0].lines if len(line.get_xdata()) == 12]
        assert len({line.get_color() for line in drawn}) == len({line.get_marker() for line in drawn}) == 9


def shown(label, layers=(0, 5, 11), heads=1, grid=5, name="digits 0", roll=True):
    """Make attention on images with random weights."""
    draw, side = np.random.default_rng(0), 4
    network = Network(image_size=grid * side, patch_size=side, channels=1, width=48, depth=24, heads=12, classes=10)
    maps = draw.dirichlet(np.ones(grid**2), (1, len(layers), 1, heads)).reshape(1, len(layers), 1, heads, grid, grid)
    return Shown(
        label=label, network=network, names=(name,), pixels=draw.random((1, 1, grid * side, grid * side)),
        layers=layers, queries=("centre",), places=(network.prefix_tokens + grid**2 // 2,),
        heads=("mean",) if heads == 1 else tuple(map(str, range(heads))), attention=maps,
        elsewhere=np.zeros((1, len(layers), 1, heads)), rollout=maps[:, 0, :, 0] if roll else None,
    )  # fmt: skip


ARMS = ("1a2b3c at its start", "2b3c4d scratch", "deit_b (mini)", "3c4d5e fine-tuned", "4d5e6f distill")


@pytest.mark.parametrize(
    "found",
    [
        [shown(label, (1, 13, 23)) for label in ARMS],
        [shown("deit_b (mini)", heads=12)],
        [shown(LONG, tuple(range(12)), name="a/folder/that/is/far/away/with/a/name/too/long/for/any/title/at/all.jpg")],
        [shown(LONG, (2, 11), 3, name="/OF/IMAGES/imagenette-128/val/N02102040/ILSVRC2012_VAL_00004650.JPEG")],
        [shown("deit_b (mini)", name="imagenette 2000"), shown(LONG, name="imagenette 2000", grid=14)],
        [shown("deit_b (mini)", (3,), roll=False)],
        [shown(FILE), shown("1a2b3c distill")],
    ],
    ids=["five arms", "heads", "long", "capitals", "two grids", "one", "of a file"],
)
def test_attention_maps(found):
    wide = len(found[0].layers) > 3
    drawn = check(attention_maps.attention_maps(found), 2 * style.COLUMN + 0.25 if wide else style.COLUMN)
    assert {f"layer {layer}" for layer in found[0].layers} <= drawn
    whole = " ".join(drawn).replace("\n", " ")
    assert found[0].names[0] in whole.replace(" ", "") or found[0].names[0] in whole
    assert "the patch in the centre" in whole
    if len(found) > 1:
        squeezed = {text.replace("\n", "").replace(" ", "") for text in drawn}
        assert {one.label.replace(" ", "") for one in found} <= squeezed


@pytest.mark.parametrize(("labels", "layers", "registers"), [(ARMS, 12, 0), ((LONG,), 40, 4), (("a", "b"), 1, 4)])
def test_attention_stats(labels, layers, registers):
    network = Network(image_size=20, patch_size=4, channels=1, width=48, depth=40, heads=3, classes=10)
    draw = np.random.default_rng(0)
    found = []
    for label in labels:
        heads = {name: draw.random((layers, 3)) for name in OF_HEADS}
        if not registers:
            heads["register_share"][:] = np.nan
        of_layers = {name: draw.random(layers) for name in OF_LAYERS}
        found.append(Stats(label, "", network, tuple(range(layers)), 256, heads, of_layers, 64))
    drawn = joined(check(attention_stats.attention_stats(found), 2 * style.COLUMN + 0.25))
    assert joined([*labels, "entropy, bits", "effective rank, dimensions"]) <= drawn
    assert ("shareonregisters" in drawn) == bool(registers)


@pytest.mark.parametrize(("labels", "layers", "token"), [(ARMS, 12, True), ((LONG,), 40, False), (("a", "b"), 1, True)])
def test_accuracy_over_depth(labels, layers, token):
    draw = np.random.default_rng(0)
    kinds = ("class", "patch", "both") if token else ("patch",)
    arms = {}
    for label in labels:
        right = {(probe, tokens): draw.random((layers, 50)) < 0.7 for probe in FITTED for tokens in kinds}
        right["head", ""] = draw.random((layers, 50)) < 0.5
        penalties = {tokens: np.ones(layers) for tokens in kinds}
        itself = draw.random(50) < 0.5
        one = Probed(label, "", tuple(range(layers)), 100, right, penalties, 20, 20, np.arange(50), itself)
        arms[label] = [one]
    frame = depths.frame(arms)
    drawn = joined(check(depth.depth(frame)))
    assert joined([*labels, "layer", "top-1, %"]) <= drawn
    check(depth.grid(frame), 2 * style.COLUMN + 0.25 if token else style.COLUMN)
