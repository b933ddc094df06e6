"""Multi-head attention and the position encoding that every attention of the model shares."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """MultiHead(Q, K, V) with projections to `inner` channels and back to `dim`, 8 heads by default.

    Between a handful of tokens and a feature map most of the work is projecting the map. `gather` and `spread` give
    the same result without: a projection of the map is moved over to the tokens' side, since q (W x) = (q W) x.
    """

    def __init__(self, dim: int, inner: int | None = None, heads: int = 8):
        super().__init__()
        inner = inner or dim
        self.heads = heads
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None = None) -> Tensor:
        """query (B, Q, D), key and value (B, T, D), valid (B, T) bool, False = not attended to -> (B, Q, D).

        Every row of `valid` needs one True.
        """
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x in (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        )
        mask = None if valid is None else valid[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(-2))

    def gather(self, tokens: Tensor, image: Tensor) -> Tensor:
        """MultiHead(tokens, image, image): tokens (B, T, D), image (B, S, D) -> (B, T, D)."""
        q = self.q_proj(tokens).unflatten(-1, (self.heads, -1))
        seen = torch.einsum("bthd,hdc->bthc", q, self._by_head(self.k_proj)) / math.sqrt(q.shape[-1])
        # the key's bias adds the same to every score of a token, so the softmax drops it
        weights = (seen.flatten(1, 2) @ image.transpose(1, 2)).softmax(-1)
        pooled = (weights @ image).unflatten(1, (-1, self.heads))
        mixed = torch.einsum("bthc,hdc->bthd", pooled, self._by_head(self.v_proj)).flatten(-2) + self.v_proj.bias
        return self.out_proj(mixed)

    def spread(self, image: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
        """MultiHead(image, tokens, tokens): image (B, S, D), tokens (B, T, D), valid (B, T) bool -> (B, S, D)."""
        k = self.k_proj(tokens).unflatten(-1, (self.heads, -1))
        scale = 1 / math.sqrt(k.shape[-1])
        seen = torch.einsum("bthd,hdc->bthc", k, self._by_head(self.q_proj)) * scale
        offset = torch.einsum("bthd,hd->bth", k, self.q_proj.bias.unflatten(0, (self.heads, -1))) * scale
        offset = offset.masked_fill(~valid[..., None], -math.inf)
        scores = image @ seen.flatten(1, 2).transpose(1, 2) + offset.flatten(1)[:, None]
        weights = scores.unflatten(-1, (-1, self.heads)).softmax(-2).flatten(-2)
        v = self.v_proj(tokens).unflatten(-1, (self.heads, -1))
        said = torch.einsum("bthd,chd->bthc", v, self.out_proj.weight.unflatten(1, (self.heads, -1)))
        return weights @ said.flatten(1, 2) + self.out_proj.bias

    def _by_head(self, projection: nn.Linear) -> Tensor:
        """(heads, inner / heads, D) weights."""
        return projection.weight.unflatten(0, (self.heads, -1))


class FourierPosition(nn.Module):
    """Positions (x, y) in [0, 1] to D channels: a fixed Gaussian matrix, then sine and cosine."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, dim // 2))

    def forward(self, positions: Tensor) -> Tensor:
        """(..., 2) -> (..., D)."""
        angles = 2 * math.pi * ((2 * positions - 1) @ self.positional_encoding_gaussian_matrix)
        return torch.cat((angles.sin(), angles.cos()), -1)

    def grid(self, height: int, width: int) -> Tensor:
        """(height * width, D): the cell centres of a feature map, row by row."""
        device = self.positional_encoding_gaussian_matrix.device
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        cells = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)
        return self(cells.to(self.positional_encoding_gaussian_matrix)).flatten(0, 1)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
