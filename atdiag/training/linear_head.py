"""Give a frozen network a head for a data set: a linear probe (Alain & Bengio 2016) on what its own head would read.

This measures a teacher that has no head, or one for other classes. The probe is a multinomial logistic regression on
the pooled features of training images in the test view, standardised; its penalty is chosen on a fifth of these images
(see ``classifiers``), so no test image is used. Scaling is folded into the head, which makes the result a network like
any other.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from atdiag.core.spec import PROBE_IMAGES, RunSpec
from atdiag.data import sources
from atdiag.data.splits import Split
from atdiag.networks.model.vit import ViT
from atdiag.training import classifiers

BATCH = 256


@torch.no_grad()
def fit(vit: ViT, spec: RunSpec, device: torch.device) -> None:
    """Replace the weights of a network's head by a linear probe's, on up to ``PROBE_IMAGES`` training images of a run.

    Raises ValueError if the network has no linear head to fit.
    """
    if not isinstance(vit.head, nn.Linear):
        raise ValueError("a linear probe needs a network with a linear head")
    images = sources.find(spec.data).train_split(spec.data, spec.seed.data)
    chosen = np.unique(np.linspace(0, len(images) - 1, min(len(images), PROBE_IMAGES)).round().astype(np.int64))
    x = _features(vit, images, chosen, device)
    labels = images.labels[chosen]
    held = classifiers.hold_out(images.clusters[chosen], labels)
    # Where zero and one go gives the scaling of each feature, which the head must do itself.
    z, zero, one = classifiers.standardise(x, torch.zeros_like(x[:1]), torch.ones_like(x[:1]))
    y = torch.from_numpy(labels).to(z.device)
    with torch.enable_grad():
        found = classifiers.choose_linear(
            z, y, spec.network.classes, None if held is None else torch.from_numpy(held).to(z.device)
        )
    vit.head.weight.copy_(found.weight * (one - zero))
    vit.head.bias.copy_(found.bias + found.weight @ zero[0])


def _features(vit: ViT, images: Split, chosen: NDArray[np.int64], device: torch.device) -> Tensor:
    """Return what the head reads for some images, [n, C] in float32."""
    seen: list[Tensor] = []
    handle = vit.head.register_forward_pre_hook(lambda _, read: seen.append(read[0].float()))
    training = vit.training
    vit.eval()
    try:
        for start in range(0, len(chosen), BATCH):
            pixels = torch.from_numpy(images.take(chosen[start : start + BATCH])).to(device)
            vit(pixels.float().div_(255))
    finally:
        handle.remove()
        vit.train(training)
    return torch.cat(seen)
