"""Random numbers keyed by name.

A number is a pure function of its purpose: a seed, a named stream ("order", "drop_path", "init", ...) and
indices (epoch, step, layer, sample, ...). No global generator is read or advanced, so a run's result can't depend on
other runs, on interruptions, or on how its batches are distributed over processes.

Two forms:

- :func:`generator` returns a NumPy generator for a name: for bulk draws (a permutation, a weight tensor).
- :func:`uniform` returns one number for each element of index arrays: for draws per sample, where a sample
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
    """Return a 128-bit hash that keys a stream, so that neighbouring seeds and indices are unrelated."""
    name = "\x1f".join([str(seed), stream, *map(str, indices)])
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")


def generator(seed: int, stream: str, *indices: int | str) -> np.random.Generator:
    """Return a NumPy generator (Philox, Salmon et al. 2011) for the named stream.

    >>> generator(0, "order", 3).permutation(4).tolist() == generator(0, "order", 3).permutation(4).tolist()
    True
    """
    return np.random.Generator(np.random.Philox(key=_key(seed, stream, *indices)))


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply SplitMix64's finaliser (Steele et al. 2014): a bijection of 64 bits with full avalanche."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(seed: int, stream: str, *indices: ArrayLike) -> NDArray[np.float64]:
    """Return a uniform number in [0, 1) for each element of the broadcast ``indices`` (non-negative integers).

    An element's number depends on its own indices alone, never on its neighbours in the array.

    >>> whole = uniform(7, "drop_path", 3, [10, 11, 12])
    >>> bool(whole[1] == uniform(7, "drop_path", 3, 11))
    True
    """
    state = np.array(_key(seed, stream) & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    with np.errstate(over="ignore"):  # overflow wraps modulo 2**64, as intended
        for index in indices:
            state = _mix((state + _GOLDEN) ^ _mix(np.asarray(index, dtype=np.uint64) + _GOLDEN))
    return (np.asarray(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


@contextlib.contextmanager
def isolated(seed: int, stream: str, *indices: int | str) -> Iterator[None]:
    """Run third-party code that draws from global generators as a pure function of a name.

    Inside the context, the global generators of Python, NumPy and torch (CPU) are seeded from the name; their states
    are restored afterwards. For timm's RandAugment and torchvision's transforms, which take no generator argument.
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
