"""Blocks of a ViT: timm's, with what transfer needs."""

from __future__ import annotations

from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor

from atdiag.transfer.attention import AttentionOverride
from atdiag.transfer.observation import AttentionRecord


class Block(TimmBlock):  # type: ignore[misc]
    """timm's block, with attention overrides, attention records, and drop-path masks as an argument."""

    def forward(self, x: Tensor, given: AttentionOverride | None = None, keep: Tensor | None = None) -> Tensor:
        """Map tokens [B, N, C] to [B, N, C].

        given: see :meth:`Attention.forward`. keep: [2, B, 1, 1], the factors of the attention and the MLP branch for
        each image (0 if the branch is dropped, 1 / (1 - rate) if kept).
        """
        return self._rest(x, self._leave(self.attn(self._enter(x), given)), keep)

    def see(
        self, x: Tensor, given: AttentionOverride | None = None, keep: Tensor | None = None
    ) -> tuple[Tensor, AttentionRecord]:
        """Run :meth:`forward`, and also return the attention's record."""
        branch, seen = self.attn.see(self._enter(x), given)
        return self._rest(x, self._leave(branch), keep), seen

    def peek(self, x: Tensor, values: bool = False) -> AttentionRecord:
        """Return the attention's record for tokens [B, N, C], without computing its output."""
        record: AttentionRecord = self.attn.peek(self._enter(x), values)
        return record

    def _enter(self, x: Tensor) -> Tensor:
        """Return what the attention is given, for the block's input."""
        normed: Tensor = self.norm1(x)
        return normed

    def _leave(self, branch: Tensor) -> Tensor:
        """Return the attention branch before LayerScale, for the attention's output."""
        return branch

    def _mlp(self, x: Tensor) -> Tensor:
        """Return the MLP branch before LayerScale."""
        branch: Tensor = self.mlp(self.norm2(x))
        return branch

    def _rest(self, x: Tensor, branch: Tensor, keep: Tensor | None) -> Tensor:
        branch = self.ls1(branch)
        x = x + (branch if keep is None else keep[0] * branch)
        branch = self.ls2(self._mlp(x))
        return x + (branch if keep is None else keep[1] * branch)


class PostNormBlock(Block):
    """A block whose norms act on its branches' outputs in place of their inputs."""

    def _enter(self, x: Tensor) -> Tensor:
        return x

    def _leave(self, branch: Tensor) -> Tensor:
        normed: Tensor = self.norm1(branch)
        return normed

    def _mlp(self, x: Tensor) -> Tensor:
        branch: Tensor = self.norm2(self.mlp(x))
        return branch
