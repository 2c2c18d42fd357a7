"""Readings of every shape in which a series' figure must be legible, made without training."""

from collections.abc import Mapping

from atdiag.core.spec import Network, Teacher
from atdiag.networks.registry import teachers
from atdiag.study.protocol import BASELINE, ArmResult, Contrast, Reading, Report, Series, Study
from tests.drawings import estimate

LONG = "timm:vit_so400m_patch14_reg4_siglip_gap_896"
PLAIN = Network(image_size=20, patch_size=4, channels=1, width=48, depth=12, heads=3, classes=10)
EIGHT = ("deit_s", "deit_b", "siglip2_b", "dinov2_s", "dinov2_b", "dinov2_reg_s", "clip_b", "beitv2_b")
TWENTY = tuple(name for name in teachers.registry() if name != "augreg_s")[:20]
GAIN = dict(zip(EIGHT, (24.0, 22.5, 15.0, -3.0, -2.0, -5.1, 0.3, -1.2), strict=True))


def study(name: str, effects: Mapping[str, float], *, half=2.0, seeds=3, base=50.0, own=80.0, profile="mini", **more):
    """Make a report on one study: arms that lie ``effects`` above the baseline."""
    network = teachers.miniature_network(name) if name in EIGHT else PLAIN
    asked, numbers = more.pop("asked", {}), more.pop("numbers", {})
    adjusted = more.pop("adjusted", None)
    planned = Study(
        ablation=more.pop("ablation", "benchmark"),
        teacher=Teacher(name=name, profile=profile, network=network, sha256="0" * 64),
        options={"methods": "copy,distill"} | more.pop("options", {}),
        arms=(),
        contrasts=tuple(Contrast(one, {}) for one in asked),
        verdict=lambda report: "",
        **more,
    )

    def row(arm: str, effect: float) -> ArmResult:
        versus = estimate(effect, half, seeds, adjusted=adjusted)
        return ArmResult(arm, base + effect, seeds, (), versus, numbers.get(arm, {}))

    rows = (
        ArmResult(BASELINE, base, seeds, (), None, numbers.get(BASELINE, {})),
        *(row(arm, effect) for arm, effect in effects.items()),
    )
    contrasts = {one: estimate(value, half, seeds, adjusted=adjusted) for one, value in asked.items()}
    reference = None if own is None else ArmResult("teacher", own, 1, ())
    return Report(planned, profile, rows, contrasts, reference)


def reading(*reports: Report) -> Reading:
    """Make a reading of several studies."""
    series = Series(reports[0].study.ablation, tuple(report.study for report in reports))
    return Reading(series, reports, (), "")


def arms(gain: float, scale: float = 1.0) -> dict[str, float]:
    """Make the effects of copy, distill and fine-tune from the gain by copy."""
    return {"copy": gain * scale, "distill": gain * scale * 0.42, "finetune": 26.0 * scale}


GAINS = {
    "usual": reading(*(study(name, arms(gain)) for name, gain in GAIN.items())),
    "one": reading(study("dinov2_s", arms(-3))),
    "one arm": reading(*(study(name, {"copy": gain}) for name, gain in GAIN.items())),
    "corrected": reading(*(study(name, arms(gain), adjusted=0.2) for name, gain in GAIN.items())),
    "one seed": reading(*(study(name, arms(gain), seeds=1) for name, gain in GAIN.items())),
    "no teacher": reading(*(study(name, arms(gain), own=None) for name, gain in GAIN.items())),
    "some teachers": reading(*(study(n, arms(g), own=None if n == "clip_b" else 99.9) for n, g in GAIN.items())),
    "twenty": reading(*(study(n, arms(i - 10.0), profile="paper") for i, n in enumerate(TWENTY))),
    "timm": reading(*(study(f"{LONG}_{i}", arms(3.0 * i)) for i in range(3)), study("deit_s", arms(3))),
    "huge": reading(*(study(name, arms(gain, 100), half=900) for name, gain in GAIN.items())),
    "tiny": reading(*(study(name, arms(gain, 1e-4), half=1e-4) for name, gain in GAIN.items())),
    "no width": reading(*(study(name, arms(0), half=0.0) for name in EIGHT)),
    "data sets": reading(
        *(
            study(n, {"copy": g, "distill": g / 2}, label=f"{n} (mini), {data}", options={"data": data})
            for n, g in (("deit_s", 24.0), ("dinov2_s", -3.0))
            for data in ("digits", "larger")
        ),
    ),
    "data sets of one": reading(
        *(study("dinov2_s", {"copy": -3.0}, label=f"dinov2_s (mini), {data}") for data in ("digits", "larger"))
    ),
    "out of distribution": reading(
        *(
            study(n, arms(GAIN[n]), label=f"{n} (mini), {on}", test_set=on, base=50 - 3 * i)
            for n in ("deit_s", "dinov2_reg_s")
            for i, on in enumerate(("gaussian_noise:3", "jpeg_compression:5", "contrast:1"))
        ),
    ),
    "reinit": reading(
        *(
            study(
                name,
                {f"reinit {module}": gain / 2, f"reinit {module} + copy": gain},
                label=f"{name} (mini), {module}",
                ablation="reinit",
                options={"module": module, "transfer": "copy"},
            )
            for name, gain in GAIN.items()
            for module in ("attn", "mlp")
        )
    ),
    "long arms": reading(study("deit_s", {f"an arm with a rather long name, number {i}": i - 4.0 for i in range(9)})),
}


def _lengths(name: str, lengths, effects, **more):
    return [
        study(
            name,
            {arm: value * (1 + i / 4) for arm, value in effects.items()},
            base=40 + 6 * i,
            label=f"{name} (mini), {length} epochs",
            ablation="epochs",
            options={"epochs": str(length)},
            **more,
        )
        for i, length in enumerate(lengths)
    ]


BOTH = {"copy": 24.0, "distill": 10.0}
EPOCHS = {
    "usual": reading(*_lengths("deit_s", (4, 8, 16), BOTH), *_lengths("dinov2_s", (4, 8, 16), {"copy": -3.0})),
    "one": reading(*_lengths("dinov2_s", (4, 8, 16), {"copy": -3.0, "distill": 1.0})),
    "one length": reading(*_lengths("dinov2_s", (8,), BOTH)),
    "many lengths": reading(*_lengths("dinov2_s", (1, 2, 3, 4, 5, 6, 8, 20, 25, 50, 90, 100), BOTH, own=None)),
    "linear": reading(*_lengths("dinov2_s", tuple(range(40, 120, 5)), BOTH)),
    "eight": reading(*(r for n, g in GAIN.items() for r in _lengths(n, (4, 8, 16), {"copy": g}))),
    "long": reading(*(r for i in range(5) for r in _lengths(f"{LONG}_{i}", (4, 8, 300), BOTH, seeds=1))),
    "tiny": reading(*_lengths("dinov2_s", (4, 8), {"copy": 1e-3}, half=1e-4)),
    "huge": reading(*_lengths("dinov2_s", (4, 8), {"copy": 1e-3}, half=800)),
}


def _losses(name: str, scale: float, weights=(0.3, 3.0, 30.0), losses=("ce", "mse", "jsd", "l1"), **more):
    effects = {
        f"{loss} x{w:g}": scale * (2 + 4 * j) * (1 - i / 5)
        for i, loss in enumerate(losses)
        for j, w in enumerate(weights)
    }
    return study(name, effects, ablation="losses", options={"losses": ",".join(losses)}, **more)


LOSSES = {
    "usual": reading(_losses("deit_s", 1.0), _losses("dinov2_s", -0.4)),
    "one": reading(_losses("dinov2_s", -0.4)),
    "one, corrected": reading(_losses("dinov2_s", -0.4, adjusted=0.2)),
    "one weight": reading(_losses("dinov2_s", -0.4, weights=(3.0,))),
    "many weights": reading(
        _losses("dinov2_s", -0.4, weights=(0.001, 0.003, 0.0125, 0.1, 0.3, 1, 3, 10, 30, 100, 30000))
    ),
    "near weights": reading(_losses("dinov2_s", -0.4, weights=(2.9, 3.0, 3.1))),
    "eight": reading(*(_losses(name, gain / 20) for name, gain in GAIN.items())),
    "long": reading(*(_losses(f"{LONG}_{i}", i - 1.5, seeds=1) for i in range(4))),
    "tiny": reading(_losses("dinov2_s", 1e-5, half=1e-5)),
    "huge": reading(_losses("dinov2_s", 10, half=900)),
}


def _rescue(name: str, before: float, after: float, alone: float = -2.5, transfer="copy", **more):
    return study(
        name,
        {f"standard + {transfer}": before, f"native + {transfer}": after + alone, "native, scratch": alone},
        asked={
            "rescue: (native + transfer - native) - (standard + transfer - scratch)": after - before,
            "transfer in the native student": after,
            "native minus standard, both with transfer": after + alone - before,
        },
        ablation="rescue",
        options={"transfer": transfer},
        **more,
    )


RESCUES = {
    "usual": reading(*(_rescue(name, gain, 20.0) for name, gain in GAIN.items() if gain < 10)),
    "one": reading(_rescue("clip_b", -3.0, 12.0)),
    "one seed": reading(_rescue("clip_b", -3.0, 12.0, seeds=1)),
    "distill": reading(_rescue("clip_b", -3.0, 12.0, transfer="distill"), _rescue("dinov2_s", 1.0, 2.0)),
    "twenty": reading(*(_rescue(name, i - 9.0, 12.0, profile="paper") for i, name in enumerate(TWENTY))),
    "long": reading(*(_rescue(f"{LONG}_{i}", i - 9.0, 12.0) for i in range(3))),
    "huge": reading(_rescue("clip_b", -300.0, 1200.0, half=900)),
    "same": reading(_rescue("clip_b", 0.0, 0.0, 0.0, half=0.0)),
}


def _matched(name: str, gain: float, divergence: float, blocks: int = 12, names=("copy", "distill"), **more):
    numbers = {
        arm: {"JSD": (divergence + 0.02) / (i + 1)}
        | {f"JSD block {b}": (divergence + 0.003 * b) / (i + 1) for b in range(blocks)}
        for i, arm in enumerate(names)
    }
    if blocks:
        numbers[BASELINE] = {"JSD": 0.5, "JSD heads matched": divergence + 0.1}
    effects = {arm: gain / (i + 1) for i, arm in enumerate(names)}
    return study(name, effects, numbers=numbers, ablation="match", **more)


MATCHES = {
    "usual": reading(*(_matched(n, g, 0.05 + 0.03 * i, names=("distill",)) for i, (n, g) in enumerate(GAIN.items()))),
    "two arms": reading(*(_matched(n, g, 0.05 + 0.03 * i) for i, (n, g) in enumerate(GAIN.items()))),
    "one": reading(_matched("clip_b", -3.0, 0.08)),
    "two": reading(_matched("deit_s", 24.0, 0.05), _matched("clip_b", -3.0, 0.08)),
    "no blocks": reading(_matched("deit_s", 24.0, 0.05, 0), _matched("clip_b", -3.0, 0.08, 0)),
    "copied exactly": reading(_matched("clip_b", -3.0, -0.02, 0, seeds=1)),
    "two copied exactly": reading(*(_matched(n, 24.0, -0.02, names=("copy",)) for n in ("deit_s", "clip_b"))),
    "one block": reading(_matched("clip_b", -3.0, 0.0, 1)),
    "twenty": reading(*(_matched(n, i - 9.0, 0.01 * i, 32, profile="paper") for i, n in enumerate(TWENTY))),
    "long": reading(*(_matched(f"{LONG}_{i}", i - 1.0, 0.01 * i) for i in range(3))),
    "huge": reading(_matched("clip_b", -3000.0, 0.9, half=9000.0)),
}


def _agreeing(name: str, top: float = 0.3, references=("pre-trained", "fine-tuned"), **more):
    names = ("copy", "distill", "copy q", "copy k", "finetune", "logits", "features")
    numbers = {
        arm: {
            f"JSD {reference}{how}": 0.0 if arm == "copy" and not k else top * (1 - i / 9) * (1 - j / 6) + 0.001 * k
            for k, reference in enumerate(references)
            for j, how in enumerate(("", " (same)", " (optimal)", " (best)", " (averaged)"))
            if how != " (optimal)"
        }
        for i, arm in enumerate((BASELINE, *names))
    }
    effects = {arm: 3.0 * i for i, arm in enumerate(names)}
    return study(name, effects, numbers=numbers, ablation="agreement", **more)


AGREEMENTS = {
    "one": reading(_agreeing("deit_s")),
    "two": reading(_agreeing("deit_s"), _agreeing("clip_b", 0.9)),
    "pre-trained alone": reading(_agreeing("deit_s", references=("pre-trained",))),
    "long": reading(*(_agreeing(f"{LONG}_{i}") for i in range(3))),
    "equal": reading(_agreeing("deit_s", 0.0, seeds=1)),
}

RECIPES = {
    "usual": reading(*(study(name, {"copy": gain}, ablation="recipes") for name, gain in GAIN.items())),
    "one": reading(study("clip_b", {"copy": -3.0}, ablation="recipes")),
    "plain": reading(study("deit_s", {"copy": 24.0}, ablation="recipes", own=None)),
    "one seed": reading(*(study(n, {"copy": g}, ablation="recipes", seeds=1) for n, g in GAIN.items())),
    "twenty": reading(*(study(n, {"copy": i - 9.0}, profile="paper") for i, n in enumerate(TWENTY))),
    "timm": reading(
        *(study(f"{LONG}_{i}", {"distill": i - 1.0}) for i in range(3)), study("deit_s", {"distill": 24.0})
    ),
    "huge": reading(*(study(name, {"copy": 100 * gain}, half=900) for name, gain in GAIN.items())),
    "tiny": reading(*(study(name, {"copy": gain / 1e4}, half=1e-4) for name, gain in GAIN.items())),
}


def curve(name: str, scale: float, ends=("top", "bottom"), ks=tuple(range(1, 12)), depth=12, **more) -> Report:
    """Make a study of layers with a curve from one end or both."""
    places = {f"{end} {k}": k for k in ks for end in ends} | {"all blocks": depth}
    effects = {arm: scale * k * (0.6 if arm.startswith("top") else 1.0) for arm, k in places.items()}
    options = {"from": "both" if len(ends) == 2 else ends[0], "transfer": "copy", "k": "all"}
    more = {"ablation": "layers", "options": options, "curve": {BASELINE: 0, **places}} | more
    return study(name, effects, **more)


CURVES = {
    "usual": reading(curve("deit_s", 2.0), curve("dinov2_s", -0.3)),
    "one": reading(curve("dinov2_s", -0.3)),
    "one end": reading(curve("dinov2_s", -0.3, ("top",)), curve("deit_s", 2.0, ("top",))),
    "some k": reading(*(curve(name, gain / 12, ks=(3, 6, 9), own=None) for name, gain in GAIN.items())),
    "deep": reading(curve("mae_h", 1.0, ks=tuple(range(1, 32)), depth=32, profile="paper", own=99.0)),
    "long": reading(*(curve(f"{LONG}_{i}", i - 1.5, seeds=1) for i in range(4))),
    "flat": reading(curve("deit_s", 0.0, half=0.0, own=50.0)),
}


def _heads(name: str, scale: float, rules=("first", "random", "different"), ks=(4, 8, 12), every=16, **more) -> Report:
    places = {f"{rule} {k}": k for k in ks for rule in rules} | {"all heads": every}
    effects = {arm: scale * k**0.5 * (0.8 if arm.startswith("random") else 1.0) for arm, k in places.items()}
    options = {"transfer": "copy", "which": ",".join(rules)}
    return study(name, effects, **{"ablation": "heads", "options": options, "curve": {BASELINE: 0, **places}, **more})


HEAD_CURVES = {
    "usual": reading(_heads("mae_l", 4.0, profile="paper"), _heads("deit_b", 4.0, ks=(3, 6, 9), every=12)),
    "one": reading(_heads("deit_b", 9.0, ks=(1, 2), every=3)),
    "one rule": reading(_heads("deit_s", 9.0, ("first",), ks=(1,), every=2)),
    "all heads alone": reading(_heads("deit_s", 9.0, ("random",), ks=(), every=1)),
}


def starts(name: str, rows=("pre-trained", "dinov2_s", "untrained"), **more) -> Report:
    """Make a study of maps and starts."""
    cells = [(row, start) for start in ("random", "pre-trained") for row in ("no", *rows)][1:]
    effects = {f"{row} maps, {start} start": 9.0 * i - 8 for i, (row, start) in enumerate(cells)}
    return study(name, effects, ablation="grid", options={"transfer": "copy", "others": ",".join(rows[1:-1])}, **more)


STARTS = {
    "usual": starts("deit_s"),
    "two": starts("deit_s", ("pre-trained", "untrained"), seeds=1),
    "many": starts("mae_l", ("pre-trained", "run:0123456789abcdef", LONG, "moco_v3_b", "untrained"), profile="paper"),
}
