"""Variants of a trained model at test time; none of them trains anything."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from la.episodes.batch import EpisodeBatch
from la.evaluation.baselines import slot_weights
from la.model.label_anything import LabelAnything


def averaged_over_draws(model: LabelAnything, batch: EpisodeBatch, draws: int) -> Tensor:
    """Mean logits (B, C, 4h, 4w) over `draws` draws of the token-pool rows, seeds 0, 1, ..., instead of fixed rows."""
    episodes = len(batch.slots)
    return torch.stack([model(batch, [draw] * episodes) for draw in range(draws)]).mean(0)


def with_flips(method, batch: EpisodeBatch) -> Tensor:
    """Mean of the logits (B, C, ...) of `method` as it is and with the query's feature map flipped left to right."""
    flipped = replace(batch, query=batch.query.flip(2))
    return (method(batch) + method(flipped).flip(-1)) / 2


def with_background_prompts(batch: EpisodeBatch) -> EpisodeBatch:
    """The batch with a mask prompt on every support's background pair: what no prompt of that support covers."""
    weights = slot_weights(batch)
    background = (batch.pairs.slot % batch.slots.shape[1] == 0).nonzero()[:, 0]
    size = tuple(batch.masks.shape[1:]) if len(batch.masks) else tuple(4 * n for n in weights.shape[1:])
    rest = F.interpolate(weights[background][:, None], size)[:, 0]
    masks = torch.cat((batch.masks, rest.to(batch.masks.dtype))) if len(batch.masks) else rest
    return replace(
        batch,
        mask_pair=torch.cat((batch.mask_pair, background)),
        masks=masks,
        any_mask=torch.ones_like(batch.any_mask),
    )
