"""Tracing batch by batch: the same values as in one pass, in constant memory."""

import gc

import torch

from atdiag.analysis import images, streaming, subjects, tracing
from atdiag.core.spec import Data

DATA = Data(name="digits", train=1, clutter=6)


def test_streaming_equals_one_shot_in_values_and_means():
    subject = subjects.find("dinov2_reg_s")
    some = images.choose(23, DATA, subject.network)
    whole = streaming.trace(subject, some, tracing.WHAT, (3, 7), batch=23)
    for batch in (1, 5):
        for key, value in streaming.trace(subject, some, tracing.WHAT, (3, 7), batch=batch).items():
            torch.testing.assert_close(value, whole[key], atol=1e-5, rtol=1e-4)
    for key, value in streaming.trace(subject, some, tracing.WHAT, (3, 7), mean=True, batch=4).items():
        torch.testing.assert_close(value, whole[key].double().mean(0), atol=1e-5, rtol=1e-4)


def live() -> int:
    gc.collect()
    return sum(x.numel() for x in gc.get_objects() if issubclass(type(x), torch.Tensor))


def test_memory_does_not_grow_with_the_number_of_images():
    subject = subjects.find("deit_s")
    want = tracing.request(subject, tracing.WHAT, (0, 5))
    peaks = {}
    for count in (100, 2000):
        some, mean = images.choose(count, DATA, subject.network), streaming.Mean(("map", "residual"))
        before, peak = live(), 0
        for n, (traced,) in enumerate(streaming.stream([(subject, want)], some, 50)):
            mean.add(traced)
            if n in (1, count // 50 - 1):
                peak = max(peak, live() - before)
        peaks[count] = peak
        del traced
        assert mean.count == count
    assert 0 < peaks[2000] == peaks[100]
