"""Shards of global batches: together they are the batch, image by image."""

import numpy as np
import pytest
import torch

from atdiag.core.spec import Data, Recipe
from atdiag.data.loader import Stream, shard

DATA = Data(train=40, test_per_source=1)
RANDOM = {"crop": 0.5, "flip": True, "erase": 0.7}
CPU = torch.device("cpu")


@pytest.mark.parametrize("batch", [6, 7, 16])
@pytest.mark.parametrize("mix", [{}, {"mixup": 0.8}, {"cutmix": 1.0}])
@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_are_the_global_batch(batch, mix, ranks):
    recipe = Recipe(epochs=2, batch_size=batch, **mix, **RANDOM)
    whole = Stream(DATA, recipe, 3)
    shards = [Stream(DATA, recipe, 3, rank, ranks) for rank in range(ranks)]
    for step in (0, 1, whole.steps_per_epoch):
        expected, parts = whole.batch(step).to(CPU), [one.batch(step).to(CPU) for one in shards]
        place = {sample: row for row, sample in enumerate(expected.samples)}
        seen = np.concatenate([part.samples for part in parts])
        assert sorted(seen) == sorted(expected.samples)
        for part in parts:
            rows = [place[sample] for sample in part.samples]
            assert rows == sorted(rows)
            assert torch.equal(part.images, expected.images[rows])
            assert torch.equal(part.labels, expected.labels[rows])
            assert (part.lam, part.box) == (expected.lam, expected.box)
            assert (part.partner_labels is None) == (not mix)
            if mix:
                assert torch.equal(part.partner_labels, expected.partner_labels[rows])


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_shards_are_as_equal_as_can_be(mixup):
    for batch in range(1, 20):
        recipe = Recipe(epochs=1, batch_size=batch, mixup=mixup)
        assert recipe.most_ranks == (-(-batch // 2) if mixup else batch)
        for ranks in range(1, recipe.most_ranks + 1):
            rows = [shard(recipe, rank, ranks) for rank in range(ranks)]
            assert sorted(np.concatenate(rows)) == list(range(batch))
            sizes = [len(one) for one in rows]
            # Pairs can't be split, and of an odd batch the image in the middle is its own partner.
            assert min(sizes) >= 1
            assert max(sizes) - min(sizes) <= (1 if not mixup else 2 + batch % 2)


def test_more_ranks_than_a_batch_has_shards():
    with pytest.raises(ValueError, match="a batch of 4 has 4 shards at most, not 5"):
        Stream(DATA, Recipe(epochs=1, batch_size=4), 0, 0, 5)
    with pytest.raises(ValueError, match="a batch of 4 has 2 shards at most, not 3"):
        shard(Recipe(epochs=1, batch_size=4, mixup=0.8), 0, 3)
