"""Attention: between tokens, between tokens and a feature map, and the blocks made of it; position encoding."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """MultiHead(Q, K, V) with projections to `inner` channels and back to `dim`, 8 heads by default.

    Between a handful of tokens and a feature map most of the work is projecting the map. `gather` and `spread` give
    the same result without: a projection of the map is moved over to the tokens' side, since q (W x) = (q W) x.
    """

    absorb = True  # False: always project the map, for comparison

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

    def gather(self, tokens: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """MultiHead(tokens, key, value): tokens (B, T, D), key and value (B, S, D) of a map -> (B, T, D)."""
        if not self._absorbs(tokens):
            return self(tokens, key, value)
        q = self.q_proj(tokens).unflatten(-1, (self.heads, -1))
        seen = torch.einsum("bthd,hdc->bthc", q, self._by_head(self.k_proj)) / math.sqrt(q.shape[-1])
        # the key's bias adds the same to every score of a token, so the softmax drops it
        weights = (seen.flatten(1, 2) @ key.transpose(1, 2)).softmax(-1)
        pooled = (weights @ value).unflatten(1, (-1, self.heads))
        mixed = torch.einsum("bthc,hdc->bthd", pooled, self._by_head(self.v_proj)).flatten(-2) + self.v_proj.bias
        return self.out_proj(mixed)

    def spread(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor) -> Tensor:
        """MultiHead(query, key, value): query (B, S, D) of a map, key and value (B, T, D) of tokens -> (B, S, D).

        valid (B, T) bool: the tokens that are attended to.
        """
        if not self._absorbs(key):
            return self(query, key, value, valid)
        k = self.k_proj(key).unflatten(-1, (self.heads, -1))
        scale = 1 / math.sqrt(k.shape[-1])
        seen = torch.einsum("bthd,hdc->bthc", k, self._by_head(self.q_proj)) * scale
        offset = torch.einsum("bthd,hd->bth", k, self.q_proj.bias.unflatten(0, (self.heads, -1))) * scale
        offset = offset.masked_fill(~valid[..., None], -math.inf)
        scores = query @ seen.flatten(1, 2).transpose(1, 2) + offset.flatten(1)[:, None]
        weights = scores.unflatten(-1, (-1, self.heads)).softmax(-2).flatten(-2)
        v = self.v_proj(value).unflatten(-1, (self.heads, -1))
        said = torch.einsum("bthd,chd->bthc", v, self.out_proj.weight.unflatten(1, (self.heads, -1)))
        return weights @ said.flatten(1, 2) + self.out_proj.bias

    def _absorbs(self, tokens: Tensor) -> bool:
        """Whether moving the projections over is less work: each token costs the map one row per head."""
        return self.absorb and tokens.shape[1] * self.heads <= self.q_proj.out_features

    def _by_head(self, projection: nn.Linear) -> Tensor:
        """(heads, inner / heads, D) weights."""
        return projection.weight.unflatten(0, (self.heads, -1))


class SelfAttentionBlock(nn.Module):
    """Self-attention, residual, norm; with `feed_forward` channels an MLP, residual and the same norm once more."""

    def __init__(self, dim: int, inner: int | None = None, heads: int = 8, feed_forward: int | None = None):
        super().__init__()
        self.attention = Attention(dim, inner, heads)
        self.norm = nn.LayerNorm(dim)
        self.mlp = (
            nn.Sequential(nn.Linear(dim, feed_forward), nn.GELU(), nn.Linear(feed_forward, dim))
            if feed_forward
            else None
        )

    def forward(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """tokens (B, T, D), valid (B, T) bool -> (B, T, D). A row without a valid token comes out as anything."""
        attendable = valid | ~valid.any(1, keepdim=True)  # a softmax over nothing would be NaN
        tokens = self.norm(tokens + self.attention(tokens, tokens, tokens, attendable))
        return tokens if self.mlp is None else self.norm(tokens + self.mlp(tokens))


class TwoWayLayer(nn.Module):
    """Tokens among themselves, tokens to image, MLP, image to tokens; a residual and a norm after each.

    Positions are added to queries and keys, never to values; cross-attention works at width D/2.
    """

    def __init__(self, dim: int, heads: int, feed_forward: int, first: bool):
        super().__init__()
        self.first = first
        self.self_attention = Attention(dim, heads=heads)
        self.token_to_image = Attention(dim, dim // 2, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, feed_forward), nn.ReLU(), nn.Linear(feed_forward, dim))
        self.image_to_token = Attention(dim, dim // 2, heads)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(4))

    def forward(self, tokens: Tensor, token_place: Tensor, image: Tensor, place: Tensor, valid: Tensor):
        if self.first:
            tokens = self.self_attention(tokens, tokens, tokens, valid)
        else:
            placed = tokens + token_place
            tokens = tokens + self.self_attention(placed, placed, tokens, valid)
        tokens = self.norms[0](tokens)
        tokens = self.norms[1](tokens + self.token_to_image.gather(tokens + token_place, image + place, image))
        tokens = self.norms[2](tokens + self.mlp(tokens))
        image = self.norms[3](image + self.image_to_token.spread(image + place, tokens + token_place, tokens, valid))
        return tokens, image


class TwoWayTransformer(nn.Module):
    """Two-way layers, then a last look of the tokens at the image. A token's position is its first value."""

    def __init__(self, dim: int, heads: int, feed_forward: int, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(TwoWayLayer(dim, heads, feed_forward, first=i == 0) for i in range(depth))
        self.last_attention = Attention(dim, dim // 2, heads)
        self.last_norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, image: Tensor, place: Tensor, valid: Tensor, image_only: bool = False):
        """tokens (B, T, D), image (B, S, D), its positions (S, D), valid (B, T) bool -> tokens, image.

        `image_only` leaves out the last look, which changes the tokens alone, and gives None for them.
        """
        token_place = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, token_place, image, place, valid)
        if image_only:
            return None, image
        seen = self.last_attention.gather(tokens + token_place, image + place, image)
        return self.last_norm(tokens + seen), image


class FourierPosition(nn.Module):
    """Positions (x, y) in [0, 1] to D channels: a fixed Gaussian matrix, then sine and cosine."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("matrix", torch.randn(2, dim // 2))

    def forward(self, positions: Tensor) -> Tensor:
        """(..., 2) -> (..., D)."""
        angles = 2 * math.pi * ((2 * positions - 1) @ self.matrix)
        return torch.cat((angles.sin(), angles.cos()), -1)

    def grid(self, height: int, width: int) -> Tensor:
        """(height * width, D): the cell centres of a feature map, row by row."""
        device = self.matrix.device
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        cells = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)
        return self(cells.to(self.matrix)).flatten(0, 1)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
