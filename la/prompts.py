"""Prompt encoding and the token pool (paper section 4.2, "Prompt Encoding")."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from la.attention import Attention, FourierPosition, LayerNorm2d
from la.batch import EpisodeBatch

TOP_LEFT = 2  # types: 0 negative point, 1 positive point, 2 and 3 the corners of a box


class TokenPool(nn.Module):
    """R x D learnable rows, Gaussian at first; each class of an episode takes one, the background always row 0."""

    def __init__(self, dim: int, rows: int = 100):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(rows, dim) * 0.02)

    def draw(self, episodes: int, slots: int, generator: torch.Generator | None) -> Tensor:
        """(episodes, slots) row numbers, different within an episode; 0, 1, 2, ... without a generator (evaluation)."""
        if generator is None:
            return torch.arange(slots).expand(episodes, -1)
        scores = torch.rand(episodes, len(self.rows) - 1, generator=generator)
        drawn = 1 + scores.topk(slots - 1, dim=1).indices
        return F.pad(drawn, (1, 0))


class PromptEncoder(nn.Module):
    """Masks to dense embeddings P_d, points and boxes to sparse embeddings P_s, each plus its class's pool row.

    Where the paper is silent: a pair without a mask gets one learned vector as P_d; a pair without points and boxes
    one learned token as P_s, so that equation 2 still has a query; points outside the object have a type of their own.
    """

    def __init__(self, dim: int, token_pool: bool, heads: int = 8):
        super().__init__()
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
        self.no_sparse = nn.Parameter(torch.randn(dim))
        self.types = nn.Parameter(torch.randn(4, dim))
        self.position = FourierPosition(dim)
        self.self_attention = Attention(dim, heads=heads)
        self.norm = nn.LayerNorm(dim)
        self.pool = TokenPool(dim) if token_pool else None

    def forward(self, batch: EpisodeBatch, rows: Tensor | None, grid: tuple[int, int]):
        """-> P_d (P, h*w, D), P_s (P, T, D) and which of its tokens are real (P, T) bool."""
        sparse, valid = self._tokens(batch)
        sparse = self._exchange(batch, sparse, valid)
        cells = grid[0] * grid[1]
        dense = self.no_mask.expand(len(sparse), cells, -1)
        if len(batch.masks):
            encoded = self.mask_cnn(batch.masks[:, None].to(dense.dtype))
            if encoded.shape[-2:] != grid:
                encoded = F.interpolate(encoded, grid, mode="bilinear", align_corners=False)
            dense = dense.index_put((batch.mask_pair,), encoded.flatten(2).transpose(1, 2).to(dense.dtype))
        if self.pool is not None:
            row = self.pool.rows[rows.flatten()[batch.pair_slot]][:, None]
            dense, sparse = dense + row, sparse + row
        return dense, sparse, valid

    def _tokens(self, batch: EpisodeBatch) -> tuple[Tensor, Tensor]:
        """(P, 1 + n + 2m, D) tokens, the no-sparse one first, and which of them count."""
        has_point = batch.point_labels >= 0
        none = ~(has_point.any(1) | batch.box_valid.any(1))
        kinds = batch.point_labels.clamp(min=0)
        points = self.position(batch.points) + self.types[kinds]
        corners = self.position(batch.boxes.unflatten(-1, (2, 2))) + self.types[TOP_LEFT:]
        tokens = torch.cat((self.no_sparse.expand(len(points), 1, -1), points, corners.flatten(1, 2)), 1)
        return tokens, torch.cat((none[:, None], has_point, batch.box_valid.repeat_interleave(2, 1)), 1)

    def _exchange(self, batch: EpisodeBatch, tokens: Tensor, valid: Tensor) -> Tensor:
        """Self-attention with a residual over all tokens of one support image, across its classes."""
        supports, places, count = len(batch.support), batch.places, tokens.shape[1]
        at = (batch.pair_support, batch.pair_place)
        table = tokens.new_zeros(supports, places, *tokens.shape[1:]).index_put(at, tokens).flatten(1, 2)
        seen = valid.new_zeros(supports, places, count).index_put(at, valid).flatten(1)
        mixed = self.norm(table + self.self_attention(table, table, table, seen))
        return mixed.unflatten(1, (places, count))[at]
