"""Prompt encoding and the token pool (paper section 4.2, "Prompt Encoding")."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from la.episodes.batch import EpisodeBatch
from la.model.attention import FourierPosition, LayerNorm2d, SelfAttentionBlock

TOP_LEFT = 2  # types: 0 negative point, 1 positive point, 2 and 3 the corners of a box


class TokenPool(nn.Module):
    """R x D learnable rows, Gaussian at first; each class of an episode takes one, the background always row 0."""

    def __init__(self, dim: int, rows: int = 100):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(rows, dim) * 0.02)

    def draw(self, seeds: Sequence[int], slots: int) -> Tensor:
        """(len(seeds), slots) row numbers, different within an episode, each episode's drawn by a seed of its own."""
        generators = (torch.Generator().manual_seed(seed) for seed in seeds)
        scores = torch.stack([torch.rand(len(self.rows) - 1, generator=generator) for generator in generators])
        return F.pad(1 + scores.topk(slots - 1).indices, (1, 0))

    def fixed(self, episodes: int, slots: int) -> Tensor:
        """(episodes, slots): 0, 1, 2, ... in each, for evaluation."""
        return torch.arange(slots).expand(episodes, -1)


class PromptEncoder(nn.Module):
    """Masks to dense embeddings P_d, points and boxes to sparse embeddings P_s, each plus its class's pool row.

    Where the paper is silent, a pair without a mask gets a learned vector as P_d, and one without points and boxes a
    learned token as P_s, so that equation 2 still has a query. There are two of each: `absent_mask` beside pairs of
    the same episode that do have a mask, `no_mask` in an episode without any (`absent_point`, `no_sparse` likewise).
    Points outside the object have a type of their own.

    `feed_forward` channels give the self-attention of the sparse tokens an MLP. With `pad_tokens`, the places that
    pairs with fewer points and boxes than others leave empty are tokens as well, as released checkpoints know it;
    else they are masked.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        token_pool: bool = True,
        feed_forward: int | None = None,
        pad_tokens: bool = False,
    ):
        super().__init__()
        self.pad_tokens = pad_tokens
        self.mask_cnn = nn.Sequential(
            nn.Conv2d(1, 4, 2, stride=2),
            LayerNorm2d(4),
            nn.GELU(),
            nn.Conv2d(4, 16, 2, stride=2),
            LayerNorm2d(16),
            nn.GELU(),
            nn.Conv2d(16, dim, 1),
        )
        # Prompts start as large as features and positions: smaller ones leave class and background alike for long.
        with torch.no_grad():
            self.mask_cnn[-1].weight.mul_(4)
            self.mask_cnn[-1].bias.mul_(4)
        self.no_mask = nn.Parameter(torch.randn(dim))
        self.absent_mask = nn.Parameter(torch.randn(dim))
        self.no_sparse = nn.Parameter(torch.randn(dim))
        self.absent_point = nn.Parameter(torch.randn(dim))
        self.types = nn.Parameter(torch.randn(4, dim))
        self.position = FourierPosition(dim)
        self.exchange = SelfAttentionBlock(dim, heads=heads, feed_forward=feed_forward)
        self.pool = TokenPool(dim) if token_pool else None

    def forward(self, batch: EpisodeBatch, rows: Tensor | None, grid: tuple[int, int]):
        """-> P_d (P, h*w, D), P_s (P, T, D) and which of its tokens are real (P, T) bool.

        The first of the T tokens stands for "no point and no box", the others are the points, then two to a box.
        """
        sparse, valid = self._tokens(batch)
        sparse = self._exchange(batch, sparse, valid)
        any_mask = batch.any_mask[batch.pairs.episode, None]
        dense = torch.where(any_mask, self.absent_mask, self.no_mask)[:, None].expand(-1, grid[0] * grid[1], -1)
        if len(batch.masks):
            encoded = self.mask_cnn(batch.masks[:, None].to(dense.dtype))
            if encoded.shape[-2:] != grid:
                encoded = F.interpolate(encoded, grid, mode="bilinear", align_corners=False)
            dense = dense.index_put((batch.mask_pair,), encoded.flatten(2).transpose(1, 2).to(dense.dtype))
        if self.pool is not None:
            row = self.pool.rows[rows.flatten()[batch.pairs.slot]][:, None]
            dense, sparse = dense + row, sparse + row
        return dense, sparse, valid

    def _tokens(self, batch: EpisodeBatch) -> tuple[Tensor, Tensor]:
        """(P, 1 + n + 2m, D) tokens and which of them count."""
        has_point, has_corner = batch.point_labels >= 0, batch.box_valid.repeat_interleave(2, 1)
        real = torch.cat((has_point, has_corner), 1)
        any_sparse = batch.any_sparse[batch.pairs.episode, None]
        points = self.position(batch.points) + self.types[batch.point_labels.clamp(min=0)]
        corners = self.position(batch.boxes.unflatten(-1, (2, 2))) + self.types[TOP_LEFT:]
        tokens = torch.cat((points, corners.flatten(1, 2)), 1)
        none = torch.where(any_sparse, self.absent_point, self.no_sparse)
        tokens = torch.cat((none[:, None], torch.where(real[..., None], tokens, self.absent_point)), 1)
        if self.pad_tokens:
            return tokens, torch.cat((~any_sparse, any_sparse.expand_as(real)), 1)
        return tokens, torch.cat((~real.any(1, keepdim=True), real), 1)

    def _exchange(self, batch: EpisodeBatch, tokens: Tensor, valid: Tensor) -> Tensor:
        """Self-attention over all tokens of one support image, across its classes."""
        supports, places, count = len(batch.support), batch.most_places, tokens.shape[1]
        at = (batch.pair_support, batch.pair_place)
        table = tokens.new_zeros(supports, places, *tokens.shape[1:]).index_put(at, tokens).flatten(1, 2)
        seen = valid.new_zeros(supports, places, count).index_put(at, valid).flatten(1)
        return self.exchange(table, seen).unflatten(1, (places, count))[at]
