"""Every random number by name.

A number is a pure function of what it is *for*: a seed, a named stream ("order", "drop_path", "init", ...) and
indices (epoch, step, layer, sample, ...). No global generator is read or advanced, so a run's result cannot depend on
what else runs beside it, on where it was interrupted, or on how its batches are spread over processes.

Two forms:

- :func:`generator` gives a NumPy generator for a name: for things drawn in bulk (a permutation, a weight tensor).
- :func:`uniform` gives one number for each element of index arrays: for things drawn per sample, where the sample
  must get the same number in any batch on any rank.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _key(seed: int, stream: str, *indices: int | str) -> int:
    """128 bits that name a stream: a hash, so that neighbouring seeds and indices share nothing."""
    name = "\x1f".join([str(seed), stream, *map(str, indices)])
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")


def generator(seed: int, stream: str, *indices: int | str) -> np.random.Generator:
    """A NumPy generator (Philox, Salmon et al. 2011) for the named stream.

    >>> generator(0, "order", 3).permutation(4).tolist() == generator(0, "order", 3).permutation(4).tolist()
    True
    """
    return np.random.Generator(np.random.Philox(key=_key(seed, stream, *indices)))


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele et al. 2014): a bijection of 64 bits with full avalanche."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(seed: int, stream: str, *indices: ArrayLike) -> NDArray[np.float64]:
    """One uniform number in [0, 1) for each element of the broadcast ``indices`` (non-negative integers).

    The number of an element depends on its own indices alone, never on its neighbours in the array.

    >>> whole = uniform(7, "drop_path", 3, [10, 11, 12])
    >>> bool(whole[1] == uniform(7, "drop_path", 3, 11))
    True
    """
    state = np.array(_key(seed, stream) & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        for index in indices:
            state = _mix((state + _GOLDEN) ^ _mix(np.asarray(index, dtype=np.uint64) + _GOLDEN))
    return (np.asarray(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


@contextlib.contextmanager
def isolated(seed: int, stream: str, *indices: int | str) -> Iterator[None]:
    """Run third-party code that draws from global generators as a pure function of a name.

    Python's, NumPy's and torch's (CPU) global generators are seeded from the name inside and given back their
    state outside. For timm's RandAugment and torchvision's transforms, which offer no generator argument.
    """
    import torch

    key = _key(seed, stream, *indices)
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(key)
        np.random.seed(key & 0xFFFFFFFF)
        torch.default_generator.manual_seed(key & 0x7FFFFFFFFFFFFFFF)
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
