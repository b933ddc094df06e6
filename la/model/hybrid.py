"""The prototype-affinity hybrid: a small decoder of what matching knows and of what looks like an object.

LA's decoder sees one pooled vector of each class. Here it sees maps (see `la.model.matching`): for every class and
query token, how the frozen features match the annotated supports. They rank tokens well on classes never seen, but say
neither where an object ends nor how sure they are; that is learned, and from few photos little can be. So a few
thousand parameters turn the maps of one class, beside a narrow view of the query's features that all classes share,
into that class's logit; the background's is 0. As every class passes through the same decoder, ways and their order
are free.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from la.episodes.batch import EpisodeBatch
from la.model.matching import Matching

UPSCALE = 4  # of the logits, as in the mask decoder


@dataclass(frozen=True)
class HybridConfig:
    """What a hybrid is made of; saved in every checkpoint."""

    channels: int = 768  # Dv, channels of the backbone's features
    dim: int = 32  # channels of the decoder
    depth: int = 1  # its layers after the first; without spatial_convs one less
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
        self.decoder = MapDecoder(
            self.matching.votes, config.objectness, config.dim, config.depth, config.spatial_convs
        )

    def forward(self, batch: EpisodeBatch, seeds: Sequence[int] | None = None) -> Tensor:
        """Logits (B, C, 4h, 4w), slot 0 the background; `seeds` draw the maps that training leaves out."""
        kept = self._kept(seeds) if self.training and seeds is not None else None
        return self.decode(batch.query, self.matching(batch), batch.slots, kept)

    def decode(self, query: Tensor, maps: Tensor, slots: Tensor, kept: Tensor | None = None) -> Tensor:
        """Query (B, h, w, Dv), maps (B, C, K, h, w), slots (B, C), kept (B, K) bool -> logits (B, C, 4h, 4w)."""
        maps = maps[:, 1:].to(self.decoder.out.weight.dtype)
        b, classes = maps.shape[:2]
        seen = maps if kept is None else maps * kept.to(maps)[:, None, :, None, None]
        if self.objectness is not None:
            looks = self.objectness(query.to(maps.dtype)).movedim(-1, 1)
            seen = torch.cat((seen, looks[:, None].expand(-1, classes, -1, -1, -1)), 2)
        logits = self.decoder(maps.flatten(0, 1), seen.flatten(0, 1)).unflatten(0, (b, classes))
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
    """Maps of one class to its logit: a weighted sum of them, plus what a few layers add to it.

    The sum starts at the votes of the maps: a handful of weights and a threshold, which carry over to new classes. The
    layers start at nothing, and training leaves out some of the maps that they see. With `spatial_convs` tokens see
    their neighbours as well.
    """

    def __init__(self, votes: Sequence[float], looks: int, dim: int, depth: int, spatial_convs: bool):
        super().__init__()
        self.calibration = nn.Conv2d(len(votes), 1, 1)
        self.mix = nn.Conv2d(len(votes) + looks, dim, 1)
        self.spatial = nn.Conv2d(dim, dim, 3, padding=1) if spatial_convs else None
        wide = 3 if spatial_convs else 1
        self.more = nn.ModuleList(nn.Conv2d(dim, dim, wide, padding=wide // 2) for _ in range(depth - 1))
        self.out = nn.Conv2d(dim, 1, 1)
        self.calibration.weight.data.copy_(torch.tensor(votes)[None, :, None, None])
        for start in (self.calibration.bias, self.out.weight, self.out.bias):
            nn.init.zeros_(start)

    def forward(self, maps: Tensor, seen: Tensor) -> Tensor:
        """All maps (B, K, h, w) and what the layers see, (B, K + looks, h, w) -> (B, h, w)."""
        mixed = F.gelu(self.mix(seen))
        for layer in filter(None, (self.spatial, *self.more)):
            mixed = mixed + F.gelu(layer(mixed))
        return (self.calibration(maps) + self.out(mixed))[:, 0]
