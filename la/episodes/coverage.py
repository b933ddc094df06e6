"""Which cells of the feature map the prompts of a support cover: all that matching knows of a prompt."""

import torch
from torch import Tensor
from torch.nn import functional as F

from la.episodes.batch import EpisodeBatch


def prompt_coverage(batch: EpisodeBatch) -> Tensor:
    """(P, h, w) in 0..1: how much of each feature cell the prompts of a pair cover; zeros for background pairs."""
    grid = batch.support.shape[1:3]
    covered = torch.maximum(box_coverage(batch, grid), point_coverage(batch, grid)[1])
    return torch.maximum(covered, mask_coverage(batch, grid))


def mask_coverage(batch: EpisodeBatch, grid: tuple[int, int]) -> Tensor:
    """(P, h, w) in 0..1: the share of each cell that the pair's mask covers."""
    coverage = torch.zeros(len(batch.pair_support), *grid, device=batch.support.device)
    if len(batch.masks):
        coverage[batch.mask_pair] = F.interpolate(batch.masks[:, None].float(), tuple(grid), mode="area")[:, 0]
    return coverage


def box_coverage(batch: EpisodeBatch, grid: tuple[int, int]) -> Tensor:
    """(P, h, w): 1 for the cells whose centres lie in a box of the pair."""
    h, w = grid
    device = batch.support.device
    y = torch.arange(0.5, h, device=device) / h
    x = torch.arange(0.5, w, device=device) / w
    x0, y0, x1, y1 = batch.boxes[..., None].unbind(2)
    rows = (y >= y0) & (y <= y1) & batch.box_valid[..., None]
    columns = (x >= x0) & (x <= x1)
    return (rows[..., None] & columns[..., None, :]).any(1).float()


def point_coverage(batch: EpisodeBatch, grid: tuple[int, int]) -> Tensor:
    """(2, P, h, w): 1 for the cells that hold a point of the pair, outside the object and inside."""
    h, w = grid
    coverage = torch.zeros(3, len(batch.pair_support), h, w, device=batch.support.device)  # last that of padding
    x, y = batch.points.unbind(-1)
    row, column = (y * h).long().clamp(0, h - 1), (x * w).long().clamp(0, w - 1)
    coverage[batch.point_labels, torch.arange(len(row), device=row.device)[:, None], row, column] = 1
    return coverage[:2]


def slot_weights(batch: EpisodeBatch) -> Tensor:
    """(P, h, w) in 0..1: how much each feature cell of a pair's support counts for the pair's slot.

    A class's cells count by their coverage, the background's by what no prompt of the support covers.
    """
    coverage = prompt_coverage(batch)
    covered = torch.zeros(batch.support.shape[:3], device=batch.support.device)
    covered.scatter_reduce_(0, batch.pair_support[:, None, None].expand_as(coverage), coverage, "amax")
    background = batch.pairs.slot % batch.slots.shape[1] == 0
    return torch.where(background[:, None, None], (1 - covered)[batch.pair_support], coverage)
