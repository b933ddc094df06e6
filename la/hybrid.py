"""The prototype-affinity hybrid: a small decoder of what matching knows and of what looks like an object.

LA's decoder sees one pooled vector of each class. Here it sees maps (see `la.matching`): for every class and query
token, how the frozen features match the annotated supports. They rank tokens well on classes never seen, but say
neither where an object ends nor how sure they are; that is learned, and from few photos little can be. So a few
thousand parameters turn the maps of one class, beside a narrow view of the query's features that all classes share,
into that class's logit; the background's is 0. As every class passes through the same decoder, ways and their order
are free.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from la.batch import EpisodeBatch
from la.matching import Matching

UPSCALE = 4  # of the logits, as in the mask decoder
BIASES = (0.0, 0.5, 1.0, 1.5, 2.0)  # to choose from


@dataclass(frozen=True)
class HybridConfig:
    """What a hybrid is made of; saved in every checkpoint."""

    channels: int = 768  # Dv, channels of the backbone's features
    dim: int = 16  # channels of the decoder
    match_prototypes: bool = True
    match_affinity: bool = True
    object_metric: bool = True
    objectness: int = 4  # channels of the view of the query that all classes share; 0: none
    spatial_convs: bool = True
    drop_maps: float = 0.4  # share of the matching maps that training leaves out, so that it learns to use them all
    mask_px: int | None = None  # side of mask prompts; None: four cells to a feature cell


class Hybrid(nn.Module):
    """Takes and gives what `LabelAnything` does; the metric and completion of `matching` are fitted before training."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.config = config
        self.matching = Matching(config.channels, config.match_prototypes, config.match_affinity, config.object_metric)
        self.objectness = (
            nn.Sequential(nn.LayerNorm(config.channels), nn.Linear(config.channels, config.objectness))
            if config.objectness
            else None
        )
        # Added to the logits of classes outside training, where the decoder is less sure than on what it has seen;
        # chosen in validation.
        self.register_buffer("foreground_bias", torch.tensor(0.0))
        self.decoder = MapDecoder(self.matching.maps + config.objectness, config.dim, config.spatial_convs)

    def forward(self, batch: EpisodeBatch, seeds: Sequence[int] | None = None) -> Tensor:
        """Logits (B, C, 4h, 4w), slot 0 the background; `seeds` draw the maps that training leaves out."""
        maps = self.matching(batch)
        if self.training and seeds is not None:
            maps = maps * self._kept(seeds).to(maps)[:, None, :, None, None]
        return self.decode(batch.query, maps, batch.slots)

    def decode(self, query: Tensor, maps: Tensor, slots: Tensor) -> Tensor:
        """Query features (B, h, w, Dv), maps (B, C, K, h, w), slots (B, C) -> logits (B, C, 4h, 4w)."""
        maps = maps[:, 1:].to(self.decoder.out.weight.dtype)
        if self.objectness is not None:
            looks = self.objectness(query.to(maps.dtype)).movedim(-1, 1)
            maps = torch.cat((maps, looks[:, None].expand(-1, maps.shape[1], -1, -1, -1)), 2)
        logits = self.decoder(maps.flatten(0, 1)).unflatten(0, maps.shape[:2])
        if not self.training:
            logits = logits + self.foreground_bias
        logits = F.pad(logits, (0, 0, 0, 0, 1, 0))
        logits = F.interpolate(logits, scale_factor=UPSCALE, mode="bilinear", align_corners=False)
        return logits.masked_fill(~slots[:, :, None, None], -1e4)

    def _kept(self, seeds: Sequence[int]) -> Tensor:
        """(B, K) bool, each episode's by its own seed."""
        draws = [torch.rand(self.matching.maps, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(draws) >= self.config.drop_maps

    def parameter_table(self) -> dict[str, int]:
        """Part -> number of learnable parameters."""
        return {name: sum(p.numel() for p in part.parameters()) for name, part in self.named_children()}


class MapDecoder(nn.Module):
    """Maps of one class to its logit, token by token; with `spatial_convs` tokens see their neighbours as well."""

    def __init__(self, maps: int, dim: int, spatial_convs: bool):
        super().__init__()
        self.mix = nn.Conv2d(maps, dim, 1)
        self.spatial = nn.Conv2d(dim, dim, 3, padding=1) if spatial_convs else None
        self.out = nn.Conv2d(dim, 1, 1)
        nn.init.constant_(self.out.bias, math.log(0.15 / 0.85))  # an object covers about so much of a photo

    def forward(self, maps: Tensor) -> Tensor:
        """(B, K, h, w) -> (B, h, w)."""
        mixed = F.gelu(self.mix(maps))
        if self.spatial is not None:
            mixed = mixed + F.gelu(self.spatial(mixed))
        return self.out(mixed)[:, 0]
