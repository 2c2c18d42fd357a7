"""Attention records of calls of scaled dot-product attention."""

import pytest
import torch
import torch.nn.functional as F

from atdiag.transfer import ops
from atdiag.transfer.observation import UnreadableAttentionError, record_of_sdpa


def qkv(groups=4):
    torch.manual_seed(0)
    return torch.randn(2, 4, 5, 8), torch.randn(2, groups, 5, 8), torch.randn(2, groups, 5, 8)


@pytest.mark.parametrize("mask", [None, (5, 5), (4, 5, 5), (1, 1, 5, 5), (1, 4, 5, 5), (1, 4, 1, 5)], ids=str)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_the_recorded_map_gives_the_output_of_sdpa(mask, groups, scale):
    q, k, v = qkv(groups)
    options = {"attn_mask": None if mask is None else torch.randn(mask), "scale": scale, "enable_gqa": groups < 4}
    record = record_of_sdpa(q, k, v, **options)
    assert torch.allclose(
        ops.attend(record.map, record.v), F.scaled_dot_product_attention(q, k, v, **options), atol=1e-6
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"is_causal": True}, "causal mask or dropout"),
        ({"dropout_p": 0.1}, "causal mask or dropout"),
        ({"attn_mask": torch.ones(5, 5, dtype=torch.bool)}, "is no bias"),
        ({"attn_mask": torch.randn(2, 4, 5, 5)}, "is no bias"),  # differs between images
    ],
)
def test_other_attention_is_refused(options, says):
    with pytest.raises(UnreadableAttentionError, match=says):
        record_of_sdpa(*qkv(), **options)
