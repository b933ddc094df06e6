"""The mask decoder: prototypes and query features to logits (section 4.3)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from la.model.attention import Attention, LayerNorm2d


class QueryClassAttention(nn.Module):
    """Equations 5 and 6. As in the fusion, attentions have residuals and norms that the equations leave out."""

    def __init__(self, dim: int, heads: int = 8):
        super().__init__()
        self.image_to_class = Attention(dim, dim // 2, heads)
        self.class_to_image = Attention(dim, dim // 2, heads)
        self.image_norm = nn.LayerNorm(dim)
        self.class_norm = nn.LayerNorm(dim)

    def forward(self, prototypes: Tensor, query: Tensor, place: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """prototypes E (B, C, D), query F_q (B, h*w, D), slots (B, C) bool -> both anew; `place` is not used."""
        query = self.image_norm(query + self.image_to_class.spread(query, prototypes, prototypes, slots))  # equation 5
        prototypes = self.class_norm(prototypes + self.class_to_image.gather(prototypes, query, query))  # equation 6
        return prototypes, query


class MaskDecoder(nn.Module):
    """Equations 5 to 7. `layers` are rounds of 5 and 6: of `QueryClassAttention`, or one two-way transformer."""

    def __init__(self, dim: int, layers: Sequence[nn.Module], spatial_convs: bool = True):
        super().__init__()
        narrow = dim // 8
        self.layers = nn.ModuleList(layers)
        self.upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, 2, stride=2),
            LayerNorm2d(dim // 4),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 4, narrow, 2, stride=2),
        )
        self.class_mlp = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, narrow)
        )
        self.spatial_convs = (
            nn.Sequential(
                nn.Conv2d(narrow, narrow, 3, padding=1),
                LayerNorm2d(narrow),
                nn.GELU(),
                nn.Conv2d(narrow, narrow, 3, padding=1),
                LayerNorm2d(narrow),
                nn.GELU(),
                nn.Conv2d(narrow, narrow, 3, padding=1),
            )
            if spatial_convs
            else nn.Identity()
        )

    def forward(self, query: Tensor, prototypes: Tensor, place: Tensor, slots: Tensor, grid: tuple[int, int]) -> Tensor:
        """query F_q (B, h*w, D), prototypes E (B, C, D), place PE (h*w, D), slots (B, C) bool -> (B, C, 4h, 4w).

        Slots that an episode does not have get a logit so low that no pixel takes them.
        """
        for layer in self.layers:
            prototypes, query = layer(prototypes, query, place, slots)
        image = self.spatial_convs(self.upscaling(query.transpose(1, 2).unflatten(2, grid)))
        logits = torch.einsum("bdhw,bcd->bchw", image, self.class_mlp(prototypes))  # equation 7
        return logits.masked_fill(~slots[:, :, None, None], -1e4)


def segment(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (C, h, w) of one query -> slots (H, W), upsampled bilinearly to `size`."""
    # max, not argmax: argmax over the first of three dimensions takes 15 times as long on a CPU
    return F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0].max(0).indices
