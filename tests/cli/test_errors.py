"""Wrong input: one clear line, exit 2, nothing written."""

import pytest

from atdiag.networks.weights import loading, sources
from tests.commands import wrong


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("reinitt", "No such command 'reinitt'. Did you mean 'reinit'?"),
        ("runs lst", "Did you mean 'list'?"),
        ("reinit --modul attn", "--module"),
        ("reinit more", "unexpected extra argument"),
        ("reinit --teacher", "'--teacher' requires an argument"),
        ("reinit --module atn", "--module 'atn' ... did you mean 'attn'? ... attn, mlp, all"),
        ("reinit --module layer_scale", "--module 'layer_scale'"),
        ("reinit --transfer copi", "--transfer 'copi' ... did you mean 'copy'? ... copy, distill"),
        ("layers --from topp --teacher clip_b", "--from 'topp' ... did you mean 'top'? ... top, bottom, both"),
        ("layers --transfer none --teacher clip_b", "--transfer 'none'"),
        ("layers --k 13 --teacher clip_b", "--k 13 ... from 0 to 12"),
        ("layers --k -1 --teacher clip_b", "--k -1 ... from 0 to 12"),
        ("layers --seeds two --teacher clip_b", "Invalid value for '--seeds': 'two'"),
        ("layers --k six --teacher clip_b", "--k 'six' ... such as 6 or 3,6,9"),
        ("layers --k 1.5 --teacher clip_b", "--k '1.5' ... such as 6 or 3,6,9"),
        ("layers --k 13 --sweep --teacher clip_b", "--k 13"),
        ("layers --k 3 --sweep --teacher clip_b", "leave one of them out"),
        ("reinit --set recipe.distill.lr=1e-5", "recipe.distill.lr has no effect here"),
        ("reinit --set transfer.weight=2", "transfer.weight has no effect here"),
        ("reinit --transfer distill --set transfer.weight=0", "transfer.weight=0 transfers nothing"),
        ("reinit --set recipe.lr=0", "recipe.lr=0 trains nothing"),
        ("reinit --set recipe.min_lr=1", "recipe.min_lr=1 ... recipe.lr=0.002 ... smaller"),
        ("reinit --device cdua", "'cdua' ... did you mean 'cuda'?"),
        ("pretrain clip_b --out .", "is a folder"),
        ("reinit --teacher clip", "did you mean 'clip_b'?"),
        ("reinit --teacher clip_bb", "'clip_bb' ... did you mean 'clip_b'?"),
        ("reinit --teacher zebra", "'zebra'"),
        ("reinit --teacher zebra", "'atdiag teachers' lists them"),
        ("reinit --teacher mae_b", "use 'deit_b'"),
        ("layers --teacher dino_s", "use 'deit_s'"),
        ("rescue --teacher deit3_b", "use 'dinov2_b'"),
        ("rescue --teacher beit_b", "use 'beitv2_b'"),
        ("reinit --profile min", "'min' ... did you mean 'mini'? ... mini, small, paper"),
        ("reinit --profile paper", "data set imagenet ... give --data-dir or set ATDIAG_DATA"),
        ("rescue --profile small --teacher timm:vit_base_patch16_xp_224", "there is no native student"),
        ("reinit --set recipe.epcohs=4", "'recipe.epcohs' ... did you mean 'recipe.epochs'?"),
        ("reinit --set recipe.epochs=four", "recipe.epochs='four' ... integer"),
        ("reinit --set recipe.epochs", "'recipe.epochs' ... --set recipe.epochs=40"),
        ("reinit --set recipe.lr=NaN", "recipe.lr=nan ... finite number"),
        ("reinit --set data.train=8", "recipe.batch_size=32 ... data.train=8"),
        ("reinit --set data.name=imagenett", "'imagenett' ... did you mean 'imagenette'?"),
        ("reinit --set data.name=imagenette", "clip_b (mini) ... --profile small"),
        (
            "reinit --teacher timm:vit_tiny_patch16_224",
            "add --data FOLDER with images of yours, or --profile small",
        ),
        ("data check cifr10", "'cifr10' ... did you mean 'cifar10'?"),
        ("data check", "Missing argument"),
        ("data chek", "Did you mean 'check'?"),
        ("data --data-dir {file}", "--data-dir {file}"),
        ("reinit --data-dir {file}", "--data-dir {file}"),
        ("maps deit_s --data-dir {file}", "--data-dir {file}"),
        ("data check folder:{file}", "there is no folder {file}"),
        ("data check cifar10 --data-dir .", "looked for a folder 'cifar10'"),
        ("reinit --seeds 0", "--seeds 0 ... from 1 to 1000"),
        ("reinit --seeds -3", "--seeds -3"),
        ("reinit --seeds many", "'--seeds'"),
        ("reinit --first-seed -1", "--first-seed -1 ... from 0 to 999997"),
        ("reinit --set data.validation=1.5", "a share between 0 and 1, or a whole number of images"),
        ("reinit --device gpu", "gpu"),
        ("reinit --out {file}", "{file} is not a folder"),
        ("reinit --out {file}/below/it", "{file} is not a folder"),
        ("reinit --out /proc/atdiag", "--out /proc/atdiag"),
        pytest.param(f"reinit --out {'x' * 300}", "can't be written (File name too long)", id="long name"),
        ("reinit --runs {file}", "{file} is not a folder"),
        ("reinit --runs {file}/below", "{file} is not a folder"),
        ("reinit --dry-run --out {file}/below", "{file} is not a folder"),
        ("teachers --family dinov", "'dinov' ... did you mean 'dinov3'?"),
        ("teachers --profile papr", "'papr' ... did you mean 'paper'?"),
        ("pretrain clip_bb", "'clip_bb' ... did you mean 'clip_b'?"),
        ("pretrain mae_b", "use 'deit_b'"),
        ("pretrain deit_b --install --scenes 100", "share one recipe: leave --install out, or --scenes"),
        ("pretrain", "Missing argument 'name' (see 'atdiag pretrain --help')"),
        ("pretrain clip_b --out {file}/x.safetensors", "{file} is not a folder"),
        ("runs show 0123", "no run in runs named '0123'"),
        ("runs remove 0123", "no run in runs named '0123'"),
        ("runs show", "Missing argument"),
    ],
)
def test_bad_input(line, says, folder, capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    text = wrong(capsys, *(word.format(file=file) for word in line.split()))
    assert all(part.format(file=file) in text for part in says.split(" ... "))
    assert list(folder.iterdir()) == []
    assert file.read_text() == ""


@pytest.mark.parametrize("command", ["reinit", "layers", "rescue", "runs list"])
@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("profile =", "atdiag.toml can't be read (Invalid value"),
        ("profile = 'papr'", "atdiag.toml: unknown profile 'papr', did you mean 'paper'?"),
        ("profil = 'mini'", "atdiag.toml: unknown key 'profil', did you mean 'profile'?"),
        ("[recipe]\nepochs = 1\nwarmup_epochs = 2", "recipe.warmup_epochs=2 is longer than recipe.epochs=1"),
    ],
)
def test_a_bad_file(command, toml, says, folder, capsys):
    (folder / "atdiag.toml").write_text(toml)
    assert says in wrong(capsys, *command.split())
    assert [path.name for path in folder.iterdir()] == ["atdiag.toml"]


def test_bad_environment_variables(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("ATDIAG_PROFILE", "mnii")
    assert "ATDIAG_PROFILE: unknown profile 'mnii', did you mean 'mini'?" in wrong(capsys, "reinit")
    monkeypatch.setenv("ATDIAG_PROFILE", "")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATDIAG_RUNS", str(tmp_path / "file"))
    assert "file is not a folder" in wrong(capsys, "reinit")
    assert list(folder.iterdir()) == []


def test_a_missing_miniature(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "SHIPPED", tmp_path / "none")
    text = wrong(capsys, "reinit", "--teacher", "clip_b")
    assert f"the miniature of clip_b is not in {tmp_path / 'none'}" in text
    assert "'atdiag pretrain clip_b --install'" in text


def test_rescue_refuses_a_teacher_without_components(folder, capsys):
    if not loading.shipped_path("deit_s").exists():
        pytest.skip("the miniature of deit_s is not here")
    assert "deit_s (mini) has no native component, so there is nothing to add" in wrong(
        capsys, "rescue", "--teacher", "deit_s"
    )
