"""Export a trained student: for timm where timm's class is the same function, else with a small loader."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atdiag.core import paths
from atdiag.core.errors import UserError
from atdiag.core.runs import Run

if TYPE_CHECKING:
    from torch import Tensor, nn

    from atdiag.core.spec import Network, RunSpec, Teacher
    from atdiag.networks.model.vit import ViT

TIMM_FILES = ("model.safetensors", "config.json", "README.md")
OWN_FILES = ("student.safetensors", "student.json", "loader.py", "README.md")

_LOADER = '''"""Load this student: it needs atdiag, and its teacher's weights if it copies its attention."""

from pathlib import Path

import atdiag


def load(teacher=None):
    """Return the student, which takes images in [0, 1]. teacher: a file with its teacher's weights."""
    return atdiag.load_student(Path(__file__).parent, teacher)
'''


def export_model(run: Run | str | Path, folder: str | Path, experiment: str | Path | None = None) -> tuple[Path, ...]:
    """Write a finished run's student with a model card into a new folder; return the files.

    run: a run or its directory, such as one of :attr:`~atdiag.api.results.Result.runs`. experiment: the ``.json`` of an
    experiment that has the run, for its contrast. Where timm builds the same function, the folder is in timm's layout
    (:data:`TIMM_FILES`), so that ``timm.create_model("local-dir:DIR", pretrained=True)`` gives the same logits; this is
    checked before anything is written. Else it holds :data:`OWN_FILES`.

    Raises UserError, with nothing written, for an unfinished run, a teacher as it is, a folder that holds something,
    and an experiment that does not have the run; DamagedRunError for weights that are not those that were trained.
    """
    from safetensors.torch import save

    from atdiag.api import cards
    from atdiag.training import evaluation

    run = run if isinstance(run, Run) else Run(Path(run).expanduser().absolute())
    folder = Path(folder).expanduser()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"`out` {folder} is there already", "name a new folder, or an empty one")
    paths.writable(folder, "out")
    if not run.path.is_dir():
        raise UserError(f"there is no run {run.path}", "give a run's directory")
    if not run.finished:
        raise UserError(f"run {run.id} is not finished ({run.state})", "the same experiment finishes it")
    spec = run.spec
    if not spec.recipe.epochs:
        raise UserError(f"run {run.id} is a teacher as it is, measured and not trained", "choose a student's run")
    if spec.transfer.method == "copy" and spec.transfer.average == "examples":
        raise UserError(
            f"run {run.id} copies maps averaged over its training images, which no file here holds",
            "choose a run with another transfer.average",
        )
    contrast = None if experiment is None else cards.contrast(Path(experiment), run.id)
    student = evaluation.load_subject(run, _no_teacher).network
    timms = None if spec.transfer.method == "copy" else as_timms(student)
    card = cards.card(run, contrast, timms is not None)
    files: dict[str, bytes] = {"README.md": card.encode()}
    if timms is not None:
        model, config = timms
        files["model.safetensors"] = save(_plain(model), {"format": "pt"})
        files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    else:
        files["student.safetensors"] = save(_plain(student), {"format": "pt"})
        files["student.json"] = (json.dumps(_described(spec, run.result()), indent=1) + "\n").encode()
        files["loader.py"] = _LOADER.encode()
    return _write(folder, files)


def _no_teacher(teacher: Teacher) -> Any:
    """Stand in for the teacher, which exporting a student does not need."""


def _plain(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}


def _described(spec: RunSpec, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the loader needs of a run, without the paths of this machine."""
    teacher = None
    if spec.transfer.method == "copy":
        assert spec.teacher is not None
        teacher = spec.teacher.model_dump(mode="json")
        teacher["name"] = str(teacher["name"]).partition("@")[0]
    return {
        "network": spec.network.model_dump(mode="json"),
        "transfer": spec.transfer.model_dump(mode="json"),
        "teacher": teacher,
        **({"teacher_heads": result["teacher_heads"]} if "teacher_heads" in result else {}),
    }


def _write(folder: Path, files: Mapping[str, bytes]) -> tuple[Path, ...]:
    """Write the files beside the folder first, so that none is left if one can't be written."""
    existing = folder.absolute().parent
    while not existing.is_dir():
        existing = existing.parent
    temporary = Path(tempfile.mkdtemp(dir=existing, prefix=".atdiag-"))
    try:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        temporary.chmod(0o755)
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, folder)  # of a folder only onto an empty one, and at once
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    order = [name for name in (*TIMM_FILES, *OWN_FILES) if name in files]
    return tuple(folder / name for name in dict.fromkeys(order))


# --- in timm's layout ----------------------------------------------------------------------------------------------

_VIT, _VIT_EPS, _BEIT = "vit_base_patch16_224", "vit_base_patch16_clip_224", "beit_base_patch16_224"
"""timm's constructors, all of whose sizes can be given: LayerNorm's epsilon is 1e-6 in the first and the last, 1e-5 in
the second."""


def as_timms(student: ViT) -> tuple[nn.Module, dict[str, Any]] | None:
    """Return timm's network with a student's weights, and its hub configuration; None if timm has no such function.

    Both networks are run on the same images, and must agree up to rounding.
    """
    import timm
    import torch

    network = student.network
    for name in (_VIT, _VIT_EPS, _BEIT):
        arguments = _arguments(network, name)
        if arguments is None:
            continue
        model: Any = timm.create_model(name, **arguments)
        try:
            model.load_state_dict(_state(student, model))
        except (RuntimeError, KeyError):  # a component of another's has parameters that timm lacks
            continue
        model.eval()
        side = network.image_size
        pixels = torch.rand(2, network.channels, side, side, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected, found = student(pixels), model((pixels - student.mean) / student.std)
        if bool(torch.allclose(found, expected, rtol=1e-4, atol=1e-5)):
            return model, _config(network, name, arguments)
    return None


def _arguments(network: Network, name: str) -> dict[str, Any] | None:
    """Return the arguments of timm's constructor for a network; None if it can't be one of its class."""
    parts = set(network.components)
    if network.norm_eps != (1e-5 if name == _VIT_EPS else 1e-6):
        return None
    sizes: dict[str, Any] = {
        "img_size": network.image_size,
        "patch_size": network.patch_size,
        "in_chans": network.channels,
        "embed_dim": network.width,
        "depth": network.depth,
        "num_heads": network.heads,
        "mlp_ratio": network.mlp_ratio,
        "num_classes": network.classes,
    }
    pool = "map" if "attention_pool" in parts else "avg" if "mean_pool" in parts or not network.class_token else "token"
    if name == _BEIT:
        if "rel_pos_bias" not in parts or network.registers or not network.class_token or pool == "map":
            return None
        return sizes | {
            "global_pool": pool,
            "init_values": network.layer_scale_init or 0.0,  # None would mean the constructor's own
            "use_abs_pos_emb": "no_abs_pos" not in parts,
        }
    if "rel_pos_bias" in parts:
        return None
    return sizes | {
        "global_pool": pool,
        "class_token": network.class_token,
        "init_values": network.layer_scale_init,
        "reg_tokens": network.registers,
        "no_embed_class": bool(network.registers),
        "pre_norm": "pre_norm" in parts,
        "pos_embed": "none" if "no_abs_pos" in parts else "learn",
        "act_layer": "quick_gelu" if "quick_gelu" in parts else "gelu",
    }


def _state(student: ViT, model: nn.Module) -> dict[str, Tensor]:
    """Return a student's weights under timm's keys; biases that only one of the two has are zero, or have no effect."""
    import torch

    state = {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}
    wanted = model.state_dict()
    for block in range(student.network.depth):
        at = f"blocks.{block}"
        for n in (1, 2):
            if f"{at}.gamma_{n}" in wanted:
                state[f"{at}.gamma_{n}"] = state.pop(f"{at}.ls{n}.gamma")
        table = f"{at}.attn.rel_pos_bias.relative_position_bias_table"
        if table in state:
            state[f"{at}.attn.relative_position_bias_table"] = state.pop(table)
        q, v, fused = f"{at}.attn.q_bias", f"{at}.attn.v_bias", f"{at}.attn.qkv.bias"
        if fused in wanted and q in state:
            state[fused] = torch.cat([state[q], torch.zeros_like(state[q]), state[v]])
            del state[q], state[v]
        elif q in wanted and fused in state:  # a bias of k adds the same to all logits of a query
            state[q], _, state[v] = state.pop(fused).chunk(3)
    bias = "patch_embed.proj.bias"
    if bias in wanted and bias not in state:
        state[bias] = torch.zeros_like(wanted[bias])
    return state


def _config(network: Network, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the content of ``config.json`` in timm's layout."""

    def channels(values: tuple[float, ...]) -> list[float]:
        return list(values) * (network.channels if len(values) == 1 else 1)

    side = network.image_size
    return {
        "architecture": name,
        "num_classes": network.classes,
        "num_features": network.width,
        "global_pool": arguments["global_pool"],
        "model_args": {key: value for key, value in arguments.items() if value is not None},
        "pretrained_cfg": {
            "tag": "atdiag",
            "custom_load": False,
            "input_size": [network.channels, side, side],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": channels(network.mean),
            "std": channels(network.std),
            "num_classes": network.classes,
            "pool_size": None,
            "first_conv": None,
            "classifier": "head",
        },
    }
