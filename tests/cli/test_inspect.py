"""The commands trace, similarity and intervene: right and wrong input, and the contents of their files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from atdiag.analysis import images, similarity, streaming, subjects
from atdiag.api import sessions as session
from atdiag.core.errors import UserError
from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed, Transfer
from atdiag.networks.model import students
from atdiag.training import checkpoint, cohort
from tests.commands import atdiag, wrong

DATA = Data(name="digits", train=32, test_per_source=1, clutter=6)
NETWORK = Network(image_size=20, patch_size=4, channels=1, width=32, depth=12, heads=2, classes=10)


pytestmark = pytest.mark.usefixtures("at_tmp_path")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Make tiny runs of deit_s: one copied, one distilled, and one stopped early."""
    store = Store(tmp_path_factory.mktemp("inside") / "runs")
    teacher = subjects.teachers.teacher("deit_s", "mini")
    recipe = Recipe(epochs=1, batch_size=16)
    common = {"network": teacher.network.student(), "teacher": teacher, "data": DATA, "recipe": recipe}
    transfers = [Transfer(method=method, layers=tuple(range(12))) for method in ("copy", "distill")]
    specs = [RunSpec(**common, seed=Seed(data=0, model=0), transfer=transfer) for transfer in transfers]
    load = subjects.loading.load
    assert set(cohort.train(specs, store, load, ExecutionOptions(device="cpu")).values()) == {"finished"}
    stopped = specs[0].model_copy(update={"transfer": Transfer(), "teacher": None})
    ended = cohort.train([stopped], store, load, ExecutionOptions(device="cpu"), should_stop=lambda: True)
    assert ended == {stopped.id: "interrupted"}
    return store, *(store.run(spec) for spec in specs), store.run(stopped)


def last_line(out) -> dict:
    return json.loads(out.splitlines()[-1])


def narrow(out) -> bool:
    return all(len(line) <= 80 for line in out.splitlines() if not line.startswith(("  results", "{")))


# The commands


def test_trace_writes_the_functions_result(tmp_path):
    what = ("--what", "map,residual", "--layers", "0,11", "--images", 3)
    out = atdiag("trace", "dinov2_reg_s", *what, "-o", "a/t.safetensors", "--json")
    tensors = load_file("a/t.safetensors")
    subject = subjects.find("dinov2_reg_s")
    some = images.choose(3, Data(name="digits", train=1, clutter=6), subject.network)
    for (what, layer), expected in streaming.trace(subject, some, ("map", "residual"), (0, 11)).items():
        assert torch.equal(tensors[f"{what}.{layer}"], expected)
    assert last_line(out)["tensors"] == ["map.0", "residual.0", "map.11", "residual.11"] and narrow(out)
    atdiag("trace", "dinov2_reg_s", "--heads", "1", "--mean", "--images", 3, "-o", "m.safetensors")
    torch.testing.assert_close(load_file("m.safetensors")["map.11"], tensors["map.11"][:, 1:].double().mean(0))


def test_similarity_writes_table_document_and_figures(store):
    _, copied, distilled, stopped = store
    runs = ("--runs", store[0].root)
    out = atdiag("similarity", "deit_s", copied.id, distilled.id[:6], stopped.id, "--images", 8, "--json", *runs)
    document = last_line(out)
    assert narrow(out) and [one["id"] for one in document["subjects"][1:]] == [copied.id, distilled.id, stopped.id]
    assert "at step" in document["subjects"][3]["label"]
    assert sum(path.endswith(".png") for path in document["files"]) == 4
    frame = pd.read_csv(next(path for path in document["files"] if path.endswith(".csv")))
    every = frame[(frame.rows == "all") & (frame.b == f"{copied.id[:6]} copy")]
    assert len(every) == 12 and (every.jsd_same == 0).all()  # the map that it uses is its teacher's
    assert (frame[frame.b == f"{distilled.id[:6]} distill"].jsd_same > 0.01).any()
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF"}
    for path in map(Path, document["files"]):
        assert path.read_bytes().startswith(starts.get(path.suffix, b""))
    (found,) = similarity.similarity(
        subjects.find("deit_s"), subjects.find(distilled.id, store=store[0]), images.choose("8", DATA, NETWORK)
    )
    mine = frame[frame.b == found.b].reset_index(drop=True)
    pd.testing.assert_frame_equal(mine, found.frame(), rtol=1e-6)


def test_intervene_with_a_teachers_and_other_maps(store):
    root, copied, distilled, _ = store
    runs = ("--runs", root.root)
    put_in = ("--with", "teacher", "--with", "own", "--from", copied.id)
    out = atdiag("intervene", distilled.id, *put_in, "--images", 12, "--json", *runs)
    rows = pd.DataFrame(last_line(out)["rows"])
    assert narrow(out) and len(rows) == 36
    same = rows[rows.replaced == "own map"]
    assert (same.residual_change < 1e-5).all() and (same.change == 0).all()
    by = {name: group.residual_change.tolist() for name, group in rows.groupby("replaced")}
    # The copy's map is its teacher's.
    np.testing.assert_allclose(by[f"map of {copied.id[:6]} copy"], by["map of deit_s (mini)"], rtol=1e-4)
    assert all(x > 1e-3 for x in by["map of deit_s (mini)"])
    out = atdiag("intervene", "deit_s", "--with", "uniform", "--each", "--layers", "top:2", "--images", 6, "--json")
    assert [row["layers"] for row in last_line(out)["rows"][::12]] == ["10", "11"] and narrow(out)


def test_no_accuracy_is_reported_for_a_plain_folder_of_images(tmp_path):
    folder = tmp_path / "of images"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 20), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "4.png").write_text("broken")
    out = atdiag("intervene", "deit_s", "--with", "uniform", "--images", folder, "--skip-bad", "--json")
    assert last_line(out)["rows"][0]["top1_after"] is None and last_line(out)["images"] == 3
    said = "".join(out.split())
    assert f"1 of 4 images can't be read and are left out: {folder / '4.png'}".replace(" ", "") in said
    assert last_line(out)["left_out"] == [str(folder / "4.png")]
    document = json.loads(next(path for path in Path("results/intervene").glob("*.json")).read_text())
    assert document["left_out"] == [str(folder / "4.png")]
    atdiag("trace", "deit_s", "--images", folder, "--skip-bad", "-o", "x/t.safetensors")
    with safe_open("x/t.safetensors", "pt") as file:
        assert json.loads(file.metadata()["left_out"]) == [str(folder / "4.png")]


def test_the_same_command_writes_the_same_files():
    written = []
    for folder in "ab":
        atdiag("similarity", "deit_s", "dinov2_s", "--layers", "0,11", "--images", 4, "--out", folder)
        written.append({path.name: path.read_bytes() for path in Path(folder).iterdir() if path.suffix != ".json"})
    assert len(written[0]) == 5 and written[0] == written[1]


def test_progress_counts_the_images_processed():
    subject = subjects.find("deit_s")
    some = images.choose(5, DATA, subject.network)
    seen = []
    with session.watched(images=some):
        on_progress = some.on_progress
        some.on_progress = lambda done: (seen.append(done), on_progress(done))
        streaming.trace(subject, some, layers=(0,), mean=True, batch=2)
    assert seen == [2, 4, 5]


# Subjects


def test_a_subject_is_found_by_any_of_its_names(store, tmp_path):
    root, copied, distilled, stopped = store
    some = images.choose(2, DATA, NETWORK)
    (pixels,) = (one.pixels for one in some.batches(2))

    def logits(reference):
        subject = subjects.find(str(reference), store=root)
        given = subject.given(pixels)
        return subject.module(pixels, given) if given else subject.module(pixels)

    for run in (copied, distilled):
        expected = logits(run.id)
        shutil.copytree(run.path, tmp_path / run.id[:3])
        for reference in (run.id[:5], run.path, run.weights, tmp_path / run.id[:3]):
            assert torch.equal(logits(reference), expected)
    assert torch.equal(logits(stopped.id), logits(stopped.checkpoint))
    kept = checkpoint.load(stopped)
    fresh = subjects.ViT(stopped.spec.network)
    fresh.load_state_dict(kept.student)
    assert torch.equal(logits(stopped.id), fresh.eval()(pixels))
    vit = students.build(NETWORK, 3).eval()
    subjects.loading.save(vit, tmp_path / "mine.safetensors", {})
    torch.testing.assert_close(logits(tmp_path / "mine.safetensors"), vit(pixels), atol=1e-2, rtol=1e-2)


def test_unknown_subjects(capsys, store, tmp_path):
    root, copied, *_ = store
    runs = ("--runs", root.root)
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    shutil.copytree(copied.path, tmp_path / "bad")
    (tmp_path / "bad/weights.safetensors").write_bytes(b"no")
    wanted = {
        "clip_c": "did you mean 'clip_b'",
        "Start:" + copied.id[:4]: f"did you mean 'start:{copied.id[:4]}'",
        copied.id[:3]: "too short for a run's id: give at least 4 of its digits",
        f"start:{copied.id[:2]}": "give at least 4 of its digits",
        "timm:vit_tiny_patch16_22@/x": "did you mean 'vit_tiny_patch16_224'",
        str(copied.path / "result.json"): "holds no network: a subject is a teacher's name",
        copied.id[:4] + "zz": "'atdiag runs list' list what there is",
        "ffffffff": "no run in",
        "nowhere/weights.safetensors": "there is no file",
        str(tmp_path): "is not a run's folder",
        str(tmp_path / "x.safetensors"): "no ViT is in the file",
        str(tmp_path / "bad"): "can't be read",
    }
    for reference, message in wanted.items():
        assert message in wrong(capsys, "similarity", "deit_s", reference, *runs), reference
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("similarity", "deit_s", "dinov2_s", "--layers", "12"), "12"),
        (("similarity", "deit_s", "dinov2_s", "--layer-map", "0-0"), "write it as 0:0,5:11"),
        (("similarity", "deit_s", "dinov2_s", "--layer-map", "0:0,0:1,11:2"), "has layer 0 of A twice"),
        (("similarity", "deit_s", "dinov2_s", "--images", "nowhere"), "no such file or folder"),
        (("similarity", "deit_s", "dinov2_s", "--data", "digit"), "did you mean 'digits'"),
        (("trace", "deit_s", "--what", "maps", "-o", "x.safetensors"), "did you mean 'map'"),
        (("trace", "deit_s", "-o", "x.npz"), "x.safetensors"),
        (("trace", "deit_s", "--heads", "5", "-o", "x.safetensors"), "5"),
        (("intervene", "deit_s", "--with", "unifrom"), "did you mean 'uniform'"),
        (("intervene", "deit_s", "--with", "teacher"), "has no teacher"),
        (("intervene", "deit_s", "--from", "deit_b"), "3 heads"),
        (("intervene", "deit_s", "--from", "deit_b", "--images", "nowhere"), "3 heads"),
        (("intervene", "deit_s", "--what", "mpa"), "did you mean 'map'"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(capsys, tmp_path, arguments, message):
    assert message in wrong(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_networks_of_different_depth_ask_for_a_layer_map(capsys, tmp_path):
    shallow = NETWORK.model_copy(update={"depth": 4})
    subjects.loading.save(students.build(shallow, 0), tmp_path / "shallow.safetensors", {})
    said = wrong(capsys, "similarity", "deit_s", tmp_path / "shallow.safetensors")
    assert "has 12 blocks, shallow 4" in said and "--layer-map 0:0,11:3" in said
    out = atdiag("similarity", "deit_s", tmp_path / "shallow.safetensors", "--layer-map", "0:0,11:3", "--images", 4)
    assert "11:3" in out


@pytest.mark.parametrize("command", ["similarity", "probe", "attention-stats"])
def test_mismatches_that_no_images_could_fix_are_reported_first(capsys, tmp_path, command):
    large = NETWORK.model_copy(update={"image_size": 40, "patch_size": 8, "depth": 4})
    subjects.loading.save(students.build(large, 0), tmp_path / "large.safetensors", {})
    said = wrong(capsys, command, tmp_path / "large.safetensors", "deit_s", "--images", "nowhere")
    assert "see different images (20 x 20 x 1 and 40 x 40 x 1)" in said


def test_a_network_that_is_not_finite_is_a_fault_that_names_the_layer(capsys, tmp_path):
    vit = students.build(NETWORK, 0)
    with torch.no_grad():
        vit.blocks[4].attn.q_weight[0, 0] = float("nan")
    subjects.loading.save(vit, tmp_path / "nan.safetensors", {})
    said = wrong(capsys, "similarity", "deit_s", tmp_path / "nan.safetensors")
    assert "layer 4 of nan: its" in said and "is not finite" in said


def test_layer_pairs_are_parsed_and_unreadable_images_listed():
    assert session.layer_pairs("0:0, 5:11") == {0: 0, 5: 11}
    with pytest.raises(UserError):
        session.layer_pairs("0:0,0:1")
    some = images.from_arrays(np.zeros((40, 1, 20, 20), np.uint8))
    assert session.left_out(some) == []
    some.skipped.update({f"{i}.png": "broken" for i in range(12)})
    (said,) = session.left_out(some)
    assert (
        said.startswith("12 of 40 images can't be read and are left out: 0.png, 1.png") and "9.png and 2 more" in said
    )
