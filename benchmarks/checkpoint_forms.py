"""What each form of a checkpoint gives: the network, its classes, what is said; or the refusal with the line to type.

    python benchmarks/checkpoint_forms.py [--data DIR] [--json benchmarks/results/checkpoint_forms.json] [--markdown]

Every form is written anew from one of two real ViT-Ti/16 in DIR (or ATDIAG_TEST_DATA), or from random networks, and
read as ``--teacher`` reads it. Compared are the maps of block 5 on a random image with those of the network that was
written (timm's, or that of Hugging Face's transformers, where it is installed).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import IMAGENET_DEFAULT_MEAN as IMAGENET_MEAN
from timm.data import IMAGENET_DEFAULT_STD as IMAGENET_STD
from torch import Tensor

from atdiag.core.errors import UserError
from atdiag.networks.registry import teachers
from atdiag.networks.weights import loading
from atdiag.training.provenance import environment
from atdiag.transfer import ops

DEIT, VIT = "deit_tiny_patch16_224", "vit_tiny_patch16_224"
FILES = {DEIT: f"{DEIT}.fb_in1k.safetensors", VIT: f"{VIT}.augreg_in21k_ft_in1k.safetensors"}
BLOCK, SIZE = 5, 224
HALF = (0.5, 0.5, 0.5)
State = dict[str, Tensor]


@dataclass(frozen=True)
class Form:
    """A form of a checkpoint: what it is called, how it is typed, and the network that should come out."""

    name: str
    typed: str
    map: Tensor | None
    """The maps of block ``BLOCK`` of the network that was written [1, H, N, N]; None: it is to be refused."""


def images() -> Tensor:
    """Return random images [1, 3, 224, 224] in [0, 1]."""
    return torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def maps(net: torch.nn.Module, mean: Any = IMAGENET_MEAN, std: Any = IMAGENET_STD) -> Tensor:
    """Return the maps of block ``BLOCK`` [1, H, N, N] of timm's network, from the output of its qkv layer."""
    seen: list[Tensor] = []
    attn: Any = net.get_submodule(f"blocks.{BLOCK}.attn")
    handle = attn.qkv.register_forward_hook(lambda _, __, out: seen.append(out))
    net.eval()((images() - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    handle.remove()
    q, k, _ = seen[0].unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (attn.scale * q @ k.transpose(-2, -1)).softmax(-1)


def prefixed(prefix: str, state: State) -> State:
    """Return a state dict under a prefix."""
    return {prefix + key: value for key, value in state.items()}


def loaded(net: torch.nn.Module, state: State) -> torch.nn.Module:
    """Return a network with weights."""
    net.load_state_dict(state)
    return net


class Writer:
    """Writes forms into a folder."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self.real = {name: load_file(data / file) for name, file in FILES.items()}
        self.deit, self.vit = (loaded(timm.create_model(name), self.real[name]) for name in FILES)

    def __call__(self, name: str, contents: Any) -> str:
        """Write a file; return its path."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(contents, path) if name.endswith("safetensors") else torch.save(contents, path)
        return str(path)


def wrapped(write: Writer) -> Iterator[Form]:
    """Yield the real DeiT-Ti in the containers and under the prefixes of training code."""
    state, net, typed = write.real[DEIT], maps(write.deit), f"timm:{DEIT}@"
    bare = {key: value for key, value in state.items() if not key.startswith("head.")}
    ten = state | {key: state[key][:10].clone() for key in ("head.weight", "head.bias")}
    yield Form("DeiT-Ti as published, FILE alone", str(write.data / FILES[DEIT]), net)
    yield Form("ViT-Ti as published, FILE alone", str(write.data / FILES[VIT]), maps(write.vit, HALF, HALF))
    yield Form("a head for 10 classes", typed + write("ten.safetensors", ten), net)
    yield Form("no head", typed + write("bare.safetensors", bare), net)
    for name, prefix in (
        *(("DDP of compiled", "module._orig_mod."), ("compiled DDP", "_orig_mod.module."), ("`net.`", "net.")),
        *(("`backbone.`", "backbone."), ("`encoder.`", "encoder.")),
    ):
        yield Form(name, typed + write(f"{prefix}pth", prefixed(prefix, state)), net)
    lightning = {"state_dict": prefixed("model.", state), "optimizer_states": [], "epoch": 3}
    yield Form("Lightning's `state_dict`, `model.`", typed + write("last.ckpt.pth", lightning), net)
    options = argparse.Namespace(model=DEIT, output=Path("out"))
    best = {"state_dict": state, "arch": DEIT, "args": options, "metric": np.float64(72.0), "optimizer": {}}
    yield Form("timm's `model_best.pth.tar`, FILE alone", write("best/model_best.pth.tar", best), net)
    other = {key: value + 0.01 for key, value in bare.items()}
    pair = write("pair.pth", {"student": prefixed("module.backbone.", other), "teacher": prefixed("backbone.", bare)})
    yield Form("a student and a teacher", typed + pair, net)
    student = maps(loaded(timm.create_model(DEIT, num_classes=0), other))
    yield Form("the same, FILE#student", f"{typed}{pair}#student", student)
    average = write("ema.pth", {"state_dict": state, "state_dict_ema": state | other})
    yield Form("weights and their average", typed + average, net)
    yield Form("the same, FILE#ema", f"{typed}{average}#ema", student)
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        half = {key: value.to(dtype) for key, value in state.items()}
        rounded = loaded(timm.create_model(DEIT), {key: value.float() for key, value in half.items()})
        yield Form(name, typed + write(f"{name}.safetensors", half), maps(rounded))
    yield Form("a path with `,` `:` `@` and a space", typed + write(f"a, b: c@d/{DEIT}.pth", state), net)


def folders(write: Writer) -> Iterator[Form]:
    """Yield it as shards, and in timm's folder."""
    state, net = write.real[DEIT], maps(write.deit)
    keys, where = sorted(state), {}
    for number, part in enumerate((keys[::2], keys[1::2]), 1):
        name = f"model-0000{number}-of-00002.safetensors"
        write(f"shards/{name}", {key: state[key] for key in part})
        where |= dict.fromkeys(part, name)
    index = write.folder / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    yield Form("a folder of two shards", f"timm:{DEIT}@{index.parent}", net)
    hub = Path(write("hub/model.safetensors", state)).parent
    config = {"architecture": DEIT, "num_classes": 1000, "pretrained_cfg": {"tag": "fb_in1k"}}
    (hub / "config.json").write_text(json.dumps(config))
    yield Form("timm's folder, FOLDER alone", str(hub), net)


def drawn(model: str, **arguments: Any) -> torch.nn.Module:
    """Return a random network of timm."""
    torch.manual_seed(0)
    return stirred(timm.create_model(model, **arguments), 0.05)


@torch.no_grad()
def stirred(net: Any, by: float) -> Any:
    """Return a network in eval mode, with noise on every weight: fresh ones give maps that are nearly uniform."""
    for parameter in net.parameters():
        parameter.add_(by * torch.randn_like(parameter))
    return net.eval()


def random_networks(write: Writer) -> Iterator[Form]:
    """Yield networks of other kinds, and of sizes that no timm model has."""
    distilled = drawn("deit_tiny_distilled_patch16_224")
    file = write("distilled.pth", distilled.state_dict())
    yield Form("a distillation token, FILE alone", file, maps(distilled))
    yield Form("the same, as the plain model", f"timm:{DEIT}@{file}", None)
    mae = drawn(VIT, global_pool="avg", num_classes=10)
    yield Form(
        "MAE fine-tuned (`fc_norm`)",
        f"timm:{VIT}@{write('mae.pth', {'model': mae.state_dict()})}",
        maps(mae, HALF, HALF),
    )
    own = drawn("vit_base_patch16_224", embed_dim=96, depth=8, num_heads=6, patch_size=14, reg_tokens=4, num_classes=5)
    file = write("own.pth", {"state_dict": prefixed("model.", own.state_dict())})
    yield Form("sizes of one's own, FILE alone", file, None)
    yield Form("the same, FILE#heads=6#pixels=imagenet", f"{file}#heads=6#pixels=imagenet", maps(own))


def transformers_networks(write: Writer) -> Iterator[Form]:
    """Yield folders of Hugging Face's transformers; nothing where it is not installed."""
    try:
        import transformers
    except ImportError:
        return
    sizes = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 6, "image_size": SIZE}
    wide = {**sizes, "intermediate_size": 192}
    text = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 1, "intermediate_size": 32}
    tower = {"vision_config": wide, "text_config": text}
    for name, options in (
        ("ViTForImageClassification", {**wide, "num_labels": 5}),
        ("DeiTForImageClassificationWithTeacher", {**wide, "num_labels": 5}),
        ("Dinov2Model", sizes),
        ("Dinov2WithRegistersForImageClassification", {**sizes, "num_labels": 5}),
        ("BeitForImageClassification", {**wide, "num_labels": 5, "use_relative_position_bias": True}),
        ("CLIPVisionModelWithProjection", wide),
        ("CLIPModel", tower),
        ("SiglipVisionModel", wide),
        ("SiglipModel", tower),
    ):
        cls = getattr(transformers, name)
        torch.manual_seed(0)
        model = stirred(cls(cls.config_class(**options)), 0.1)
        path = write.folder / name
        model.save_pretrained(path)
        normal = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (path / "preprocessor_config.json").write_text(json.dumps(normal))
        yield Form(f"transformers' {name}, FOLDER alone", str(path), librarys(model))


@torch.no_grad()
def librarys(model: Any) -> Tensor:
    """Return the maps of block ``BLOCK`` of a network of transformers, as it returns them."""
    model.set_attn_implementation("eager")
    tower = model.vision_model if hasattr(model, "text_model") else model
    found: Tensor = tower(pixel_values=(images() - 0.5) / 0.5, output_attentions=True).attentions[BLOCK]
    return found


FORMS: tuple[Callable[[Writer], Iterator[Form]], ...] = (wrapped, folders, random_networks, transformers_networks)


def outcome(form: Form, folders: dict[str, str]) -> dict[str, Any]:
    """Read a form; return what it gave."""
    found: dict[str, Any] = {"form": form.name, "typed": form.typed}
    try:
        model = loading.load(teachers.teacher(form.typed, "small", SIZE))
    except UserError as fault:
        found["refused"] = str(fault)
    else:
        origin: Any = model.origin
        found |= {"format": origin.format, "place": origin.branch, "said": origin.note}
        found["classes"] = model.network.classes if model.network.classes > 1 else None
        found["components"] = [*model.network.components, *model.network.differences]
        if form.map is None:
            raise AssertionError(f"{form.name} should have been refused")
        found["difference"] = float((ops.probabilities(model.maps(images(), [BLOCK])[BLOCK]) - form.map).abs().max())
    for path, name in folders.items():
        found = {key: value.replace(path, name) if isinstance(value, str) else value for key, value in found.items()}
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table for the documentation."""
    lines = ["| form | head | maps differ by | said |", "|---|---|---|---|"]
    for row in rows:
        if "refused" in row:
            lines.append(f"| {row['form']} | | refused | {row['refused']} |")
        else:
            head = row["classes"] or "none"
            by = format(row["difference"], ".0e") if row["difference"] else "0"
            lines.append(f"| {row['form']} | {head} | {by} | {row['said']} |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("ATDIAG_TEST_DATA"), help="the real ViT-Ti's folder"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", action="store_true", help="print the table for docs/teachers.md")
    given = parser.parse_args()
    if given.data is None or not all((given.data / file).is_file() for file in FILES.values()):
        parser.error(f"--data must be a folder with {' and '.join(FILES.values())}")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        write = Writer(Path(name), given.data)
        for kind in FORMS:
            for form in kind(write):
                rows.append(outcome(form, {name: "DIR", str(given.data): "DATA"}))
                if not given.markdown:
                    print(rows[-1], flush=True)
    if given.markdown:
        print(markdown(rows))
    if given.json:
        document = {"benchmark": "checkpoint_forms", "machine": environment(torch.device("cpu")), "forms": rows}
        given.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
