"""Variants of a trained model at test time; none of them trains anything."""

from dataclasses import replace

import torch
from torch import Tensor

from la.episodes.batch import EpisodeBatch
from la.model.label_anything import LabelAnything


def averaged_over_draws(model: LabelAnything, batch: EpisodeBatch, draws: int) -> Tensor:
    """Mean logits (B, C, 4h, 4w) over `draws` draws of the token-pool rows, seeds 0, 1, ..., instead of fixed rows."""
    episodes = len(batch.slots)
    return torch.stack([model(batch, [draw] * episodes) for draw in range(draws)]).mean(0)


def with_flips(method, batch: EpisodeBatch) -> Tensor:
    """Mean of the logits (B, C, ...) of `method` as it is and with the query's feature map flipped left to right."""
    flipped = replace(batch, query=batch.query.flip(2))
    return (method(batch) + method(flipped).flip(-1)) / 2
