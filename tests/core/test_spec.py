import json
import subprocess
import sys
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from atdiag.core import spec
from atdiag.core.spec import (
    ADDED_FIELDS,
    Data,
    Init,
    Masked,
    Network,
    Recipe,
    RunSpec,
    Seed,
    Teacher,
    Transfer,
    content_hash,
)

PLAIN = Network(image_size=20, patch_size=4, channels=1, width=32, depth=12, heads=2, classes=10, mean=(0.18,))
SCALED = PLAIN.model_copy(update={"components": ("layer_scale",), "layer_scale_init": 0.1})
TEACHER = Teacher(name="deit_s", profile="mini", network=PLAIN, sha256="0" * 64)
SCALED_TEACHER = Teacher(name="dinov2_s", profile="mini", network=SCALED, sha256="1" * 64)


def run(**changes: Any) -> RunSpec:
    parts = {"network": PLAIN, "data": Data(train=1000), "recipe": Recipe(epochs=2), "seed": Seed(data=0, model=0)}
    return RunSpec(**{**parts, **changes})


COPY = run(teacher=TEACHER, transfer=Transfer(method="copy", layers=(0, 11)))


# --- The hash ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "id", "stream"),
    [
        (run(), "0f625c538914619c", "4872d443fe0cb1aa"),
        (COPY, "e8211096ced432c7", "4872d443fe0cb1aa"),
        (
            run(teacher=TEACHER, transfer=Transfer(method="distill", layers=range(12), weight=1.5)),
            "2dab2af9ca65ed37",
            "4872d443fe0cb1aa",
        ),
        (
            run(teacher=SCALED_TEACHER, init=Init(source="teacher", reinit=("attn",))),
            "f1157673ac3bd8bb",
            "4872d443fe0cb1aa",
        ),
        (
            run(network=SCALED, recipe=Recipe(epochs=1, mixup=0.8), seed=Seed(data=1, model=2)),
            "428018bc9fee84a3",
            "7371367548124e04",
        ),
        (run(masked=Masked()), "0df750b7c5263d3c", "4872d443fe0cb1aa"),
    ],
    ids=["baseline", "copy", "distill", "init", "scaled", "masked"],
)
def test_ids_are_golden(made, id, stream):
    # A change here orphans every run directory and teacher file in the world: fix the code, not the numbers.
    assert (made.id, made.stream) == (id, stream)


def test_the_hash_is_sha256_of_canonical_json():
    assert (
        content_hash({"b": [1.5, None], "a": {"c": "é"}}) == sha256(b'{"a":{"c":"\\u00e9"},"b":[1.5,null]}').hexdigest()
    )


def leaves(node: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(node, dict):
        return [path]
    return [leaf for key, value in node.items() for leaf in leaves(value, (*path, key))]


def other(value: Any) -> Any:
    """Return a JSON value of the same kind other than ``value``."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case None:
            return "something"
        case list():
            return [*value, 7]
    raise TypeError(value)


FULL = run(teacher=SCALED_TEACHER, transfer=Transfer(method="distill", layers=(3,)), init=Init(source="teacher"))
DOCUMENT = FULL.model_dump(mode="json")


@pytest.mark.parametrize("path", leaves(DOCUMENT), ids=".".join)
def test_every_hashed_field_changes_the_hash(path):
    changed = json.loads(json.dumps(DOCUMENT))
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = other(inner[path[-1]])
    assert (content_hash(changed) == content_hash(DOCUMENT)) == (".".join(path) in spec.NOT_HASHED)


def test_the_walk_over_fields_is_complete():
    models = {"network": Network, "init": Init, "transfer": Transfer, "data": Data, "recipe": Recipe, "seed": Seed}
    walked = {".".join(path) for path in leaves(DOCUMENT)}
    expected = {f"{part}.{field}" for part, model in models.items() for field in model.model_fields}
    expected |= {f"teacher.{field}" for field in Teacher.model_fields if field != "network"}
    expected |= {f"teacher.network.{field}" for field in Network.model_fields} | {
        "semantics",
        "planted",
        "masked",
        "start",
    }
    assert walked == expected
    assert walked >= spec.NOT_HASHED


def test_a_teachers_alias_is_no_part_of_the_run():
    alias = TEACHER.model_copy(update={"name": "mine", "profile": "paper"})
    assert run(teacher=alias, transfer=COPY.transfer).id == COPY.id
    assert (TEACHER.label, alias.label) == ("deit_s (mini)", "mine")
    own = TEACHER.model_copy(update={"name": "mine", "profile": spec.OWN})
    assert (run(teacher=own, transfer=COPY.transfer).id, own.label) == (COPY.id, "mine")


def test_an_added_field_at_its_old_value_changes_nothing():
    old = content_hash(DOCUMENT, added={})
    grown = {**DOCUMENT, "recipe": {**DOCUMENT["recipe"], "later": 0.0}}
    added = {"recipe.later": 0.0}
    assert content_hash(grown, added=added) == old
    assert content_hash(DOCUMENT, added=added) == old
    assert content_hash({**grown, "recipe": {**grown["recipe"], "later": 0.9}}, added=added) != old
    assert content_hash({**grown, "later": 0.0}, added=added) != old, "a field is named by its whole path"


def test_added_fields_name_fields_and_their_defaults():
    walked = {".".join(path) for path in leaves(DOCUMENT)} | {f"masked.{field}" for field in Masked.model_fields}
    assert set(spec.ADDED_FIELDS) <= walked


@pytest.mark.parametrize(
    ("shared", "change"),
    [
        (True, {"seed": Seed(data=0, model=5)}),
        (True, {"recipe": Recipe(epochs=9, lr=0.5, drop_path=0.1, label_smoothing=0.1)}),
        (False, {"seed": Seed(data=1, model=0)}),
        (False, {"recipe": Recipe(epochs=2, batch_size=32)}),
        (False, {"recipe": Recipe(epochs=2, cutmix=1.0)}),
        (False, {"recipe": Recipe(epochs=2, rand_augment="rand-m9")}),
        (False, {"data": Data(train=1001)}),
    ],
)
def test_the_stream_is_what_a_cohort_shares(shared, change):
    assert (run(**change).stream == run().stream) == shared


# --- Canonical forms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transfer",
    [
        Transfer(method="copy", layers=()),
        Transfer(method="distill", layers=()),
        Transfer(method="distill", layers=(1, 2), weight=0),
        Transfer(method="distill", layers=(1, 2), weight=-0.0),
        Transfer(method="none", layers=(1,), loss="ce", weight=2),
    ],
)
def test_no_transfer_has_one_canonical_form_so_all_teachers_share_the_baseline(transfer):
    assert transfer == Transfer()
    for teacher in (None, TEACHER, SCALED_TEACHER):
        baseline = run(teacher=teacher, transfer=transfer, init=Init(source="scratch", reinit=("mlp",), head=True))
        assert baseline.teacher is None
        assert baseline == run()
        assert baseline.id == run().id


def test_order_and_repetition_do_not_matter():
    assert Transfer(method="copy", layers=(5, 2, 5)) == Transfer(method="copy", layers=[2, 5])
    assert Init(source="teacher", reinit=("mlp", "attn", "mlp")) == Init(source="teacher", reinit=("attn", "mlp"))
    both = {**PLAIN.model_dump(), "layer_scale_init": 0.1}
    one, two = ({**both, "components": c} for c in (("pre_norm", "layer_scale"), ("layer_scale", "pre_norm")))
    assert Network.model_validate(one) == Network.model_validate(two)


def test_explicit_defaults_change_nothing():
    assert Transfer(method="distill", layers=(1,)) == Transfer(method="distill", layers=(1,), loss="ce", weight=3.0)
    assert Recipe(epochs=1, lr=1e-3) == Recipe(epochs=1)
    assert Recipe(epochs=1, mixup=-0.0).model_dump_json() == Recipe(epochs=1).model_dump_json()
    rgb = {**PLAIN.model_dump(), "channels": 3}
    assert Network(**{**rgb, "mean": (0.5,) * 3}) == Network(**{**rgb, "mean": (0.5,)})


def test_removing_a_component_removes_its_number():
    assert Network.model_validate({**SCALED.model_dump(), "components": ()}) == PLAIN


def test_the_handling_of_layer_scale_counts_only_if_the_student_lacks_it():
    def started(network, teacher):
        specs = (
            run(network=network, teacher=teacher, init=Init(source="teacher", layer_scale=how))
            for how in ("fold", "drop")
        )
        return len({s.id for s in specs})

    assert started(PLAIN, SCALED_TEACHER) == 2
    assert started(SCALED, SCALED_TEACHER) == 1
    assert started(PLAIN, TEACHER) == 1


# --- JSON -------------------------------------------------------------------------------------------------------------

layers = st.lists(st.integers(0, 11), max_size=12)
transfers = st.one_of(
    st.builds(Transfer),
    st.builds(Transfer, method=st.just("copy"), layers=layers),
    st.builds(Transfer, method=st.just("distill"), layers=layers, weight=st.none() | st.floats(0, 100)),
)
inits = st.builds(
    Init,
    source=st.sampled_from(["scratch", "teacher"]),
    reinit=st.lists(st.sampled_from(["attn", "mlp"])),
    head=st.booleans(),
    layer_scale=st.sampled_from(["fold", "drop"]),
)
recipes = st.builds(
    Recipe,
    epochs=st.integers(0, 400),
    lr=st.floats(0, 1),
    clip_grad=st.none() | st.floats(0.1, 10),
    drop_path=st.floats(0, 0.9),
    ema=st.none() | st.floats(0, 0.9999),
    rand_augment=st.none() | st.text(),
    precision=st.sampled_from(["float32", "bfloat16"]),
)
specs = st.builds(
    RunSpec,
    network=st.sampled_from([PLAIN, SCALED]),
    teacher=st.sampled_from([TEACHER, SCALED_TEACHER]),
    init=inits,
    transfer=transfers,
    data=st.builds(Data, train=st.integers(1, 10**7), clutter=st.integers(0, 64)),
    recipe=recipes,
    seed=st.builds(Seed, data=st.integers(0, 2**70), model=st.integers(0, 2**70)),
)


@given(specs)
def test_json_round_trip(made):
    again = RunSpec.model_validate_json(made.model_dump_json())
    assert again == made
    assert (again.id, again.stream) == (made.id, made.stream)
    assert RunSpec.model_validate(made.model_dump()) == made, "a canonical form is its own canonical form"


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Network(**{**PLAIN.model_dump(), "patch_size": 3}), "not a multiple of patch_size"),
        (lambda: Network(**{**PLAIN.model_dump(), "heads": 5}), "not a multiple of heads"),
        (lambda: Network(**{**PLAIN.model_dump(), "mean": (0.1, 0.2)}), "mean and std need 1 or 1 values"),
        (lambda: Network(**{**PLAIN.model_dump(), "std": (0.0,)}), "greater than 0"),
        (lambda: Network(**{**PLAIN.model_dump(), "components": ("layer_scale",)}), "give both or neither"),
        (lambda: Network(**{**PLAIN.model_dump(), "components": ("registers",)}), "give both or neither"),
        (lambda: Network(**{**PLAIN.model_dump(), "components": 5}), "valid tuple"),
        (lambda: Network(**{**PLAIN.model_dump(), "components": "layer_scale"}), "valid tuple"),
        (lambda: Network(**{**PLAIN.model_dump(), "hieght": 5}), "hieght"),
        (lambda: Transfer(method="copy", layers=(1,), weight=2.0), "copy has no weight"),
        (lambda: Transfer(method="copi", layers=(1,)), "'copy', 'distill', 'logits', 'features' or 'none'"),
        (lambda: Transfer(method="none", lairs=(1,)), "lairs"),
        (lambda: Transfer(method="copy", layers=(-1,)), "greater than or equal to 0"),
        (lambda: Init(source="scratch", bogus=1), "bogus"),
        (lambda: Init(source="teacher", reinit=("atn",)), "'attn' or 'mlp'"),
        (lambda: Recipe(epochs=1, lr=float("nan")), "finite number"),
        (lambda: Recipe(epochs=1, drop_path=1.0), "less than 1"),
        (lambda: Recipe(epochs=1, betas=(0.9, 1.0)), "less than 1"),
        (lambda: Recipe(epochs=1, ema=1.0), "less than 1"),
        (lambda: Recipe(epochs=1, clip_grad=0), "greater than 0"),
        (lambda: Recipe(epochs=-1), "greater than or equal to 0"),
        (lambda: Seed(data=-1, model=0), "greater than or equal to 0"),
        (lambda: TEACHER.model_validate({**TEACHER.model_dump(), "sha256": "abc"}), "match pattern"),
        (lambda: run(transfer=COPY.transfer), "needs a teacher"),
        (lambda: run(init=Init(source="teacher")), "needs a teacher"),
        (lambda: run(teacher=TEACHER, transfer=Transfer(method="copy", layers=(12,))), "layer 12 is out of range"),
        (lambda: run(**grown(heads=4), transfer=COPY.transfer), "give teacher_heads, one of first, different"),
        (lambda: run(teacher=TEACHER, transfer=Transfer(method="copy", layers=(1,), different_heads=3)), "has 2 heads"),
        (lambda: distill(layers=(1,), different_heads=1, heads=(0,)), "leave out heads, teacher_heads and average"),
        (lambda: distill(layers=(1,), different_heads=1, average="queries"), "leave out heads"),
        (lambda: Transfer(method="logits", different_heads=1), "logits has no different_heads"),
        (lambda: run(**grown(depth=6), transfer=COPY.transfer), "is out of range: the network has 6 blocks"),
        (lambda: run(**grown(image_size=40, patch_size=8), init=Init(source="teacher")), "the teacher's patch_size"),
        (lambda: run(**grown(class_token=False), transfer=COPY.transfer), "the student's class_token"),
        (lambda: run(**grown(components=("registers",), registers=4), transfer=COPY.transfer), "registers"),
        (lambda: run(**grown(width=64), init=Init(source="teacher")), "the teacher's width"),
        (lambda: run(**grown(classes=9), init=Init(source="teacher", head=True)), "head has 10 classes"),
        (lambda: run(teacher=TEACHER, init=Init(source="teacher", head=True, head_rows=(1, 2))), "head_rows must name"),
        (lambda: distill(layers=(1,), loss="nll"), "known: ce, kl, mse, jsd, l1, logits_mse"),
        (lambda: distill(layers=(1,), tensor="q", loss="ce"), "q is compared by mse"),
        (lambda: distill(layers=(1,), tensor="v", average="heads"), "only maps are averaged"),
        (lambda: distill(layers=(1,), average="heads", loss="logits_mse"), "an averaged map has no logits"),
        (lambda: distill(layers=(1,), temperature=2.0), "distill has no temperature"),
        (lambda: distill(layers=(1, 2), teacher_layers=(1,)), "names 1 blocks for the 2 of layers"),
        (lambda: distill(layers=(1, 1), teacher_layers=(1, 2)), "names a block twice"),
        (lambda: Transfer(method="logits", layers=(1,)), "logits has no layers"),
        (lambda: Transfer(method="features", layers=(1,), tensor="q"), "features are the residual stream"),
        (lambda: Data(train=10, per_class=2), "give an image_size"),
        (lambda: Transfer(method="copy"), "copy needs layers"),
        (lambda: distill(tensor="q", loss="ce"), "distill needs layers"),
        (lambda: run(teacher=TEACHER, transfer=distill(layers=(1,), teacher_layers=(12,))), "layer 12 is out of range"),
        (lambda: run(teacher=TEACHER, transfer=distill(layers=(1,), heads=(9,))), "head 9 is out of range"),
        (lambda: run(**grown(width=64), transfer=distill(layers=(1,), tensor="k")), "networks of the same width"),
        (lambda: run(**grown(classes=9), transfer=Transfer(method="logits")), "a teacher with the student's classes"),
    ],
)
def test_invalid_specs_are_refused_with_the_reason(make, message):
    with pytest.raises(ValidationError) as fault:
        make()
    assert message in str(fault.value)


def distill(**fields: Any) -> Transfer:
    return Transfer(method="distill", **fields)


def test_equal_transfers_have_equal_specs():
    assert distill(layers=(1,), loss="kl") == distill(layers=(1,)) == distill(layers=(1,), reduce="mean")
    assert distill(layers=(2, 1), teacher_layers=(2, 1)) == distill(layers=(1, 2))
    assert distill(layers=(2, 1), teacher_layers=(5, 3)).teacher_layers == (3, 5)
    assert distill(layers=(1,), average="layers") == distill(layers=(1,))
    assert distill(layers=(1, 2), average="heads", heads=(0,)) == distill(layers=(1, 2), heads=(0,))
    assert distill(layers=(1, 2), average="layers").average == "layers"
    assert distill(layers=(1,), heads=()) == Transfer() == distill(layers=(), loss="l1", average="heads")
    every = run(teacher=TEACHER, transfer=distill(layers=(1,), heads=tuple(range(PLAIN.heads))))
    assert every == run(teacher=TEACHER, transfer=distill(layers=(1,)))
    assert run(teacher=TEACHER, transfer=distill(layers=(1,), different_heads=PLAIN.heads)) == every
    assert distill(layers=(1,), different_heads=0) == Transfer()
    assert Transfer(method="logits").weight == 1.0
    assert distill(layers=(1,)).sources == (1,)


def test_an_ema_with_decay_0_is_no_average():
    assert Recipe(epochs=1, ema=0.0) == Recipe(epochs=1)
    assert run(recipe=Recipe(epochs=2, ema=0.9)).id != run().id
    assert run(recipe=Recipe(epochs=2, ema=0.9)).stream == run().stream, "it may train beside one without"


def test_fields_added_later_leave_old_hashes_alone():
    """A spec as version 1 wrote it, hashed as then (without later fields)."""
    spec = run(teacher=TEACHER, transfer=distill(layers=(1,)))
    document = spec.model_dump(mode="json")
    old = json.loads(json.dumps(document))
    for path in ADDED_FIELDS:
        node = old
        *parents, last = path.split(".")
        for part in parents:
            node = node.get(part) or {}
        node.pop(last, None)
    assert content_hash(old, added={}) == content_hash(document)
    assert RunSpec.model_validate(old) == spec


def grown(**changes: Any) -> dict[str, Any]:
    return {"teacher": TEACHER, "network": Network.model_validate({**PLAIN.model_dump(), **changes})}


def test_a_student_may_differ_where_maps_are_unaffected():
    run(**grown(width=64, components=("pre_norm",), classes=9), transfer=COPY.transfer)


def test_specs_are_frozen():
    with pytest.raises(ValidationError):
        PLAIN.width = 64


def test_tokens():
    registers = Network.model_validate({**PLAIN.model_dump(), "components": ("registers",), "registers": 4})
    assert (PLAIN.grid, PLAIN.prefix_tokens, PLAIN.tokens) == (5, 1, 26)
    assert (registers.prefix_tokens, registers.tokens) == (5, 30)


def test_the_spec_imports_nothing_heavy_and_nothing_else_of_atdiag():
    code = "import sys, atdiag.core.spec; print('\\n'.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    ours = {name for name in loaded if name.partition(".")[0] == "atdiag"}
    assert all(name in ("atdiag", "atdiag.core") or name.startswith("atdiag.core.spec") for name in ours)
    assert not {"numpy", "torch", "timm", "pandas", "scipy", "filelock", "typer", "rich"} & set(loaded)
