"""AdamW of a training run: which parameters decay, and how long a step of it may be."""

import torch
from torch import Tensor, nn

from pipelines.config import TrainConfig

MATRICES = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)  # layers whose weights are matrices, of whatever rank


def optimiser_of(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """With `decay` "matrices", norms, biases and learned tokens are the second group, which does not decay."""
    groups = [{"params": list(model.parameters())}]
    if config.decay == "matrices":
        matrices = {id(layer.weight) for layer in model.modules() if isinstance(layer, MATRICES)}
        parts = [[p for p in model.parameters() if (id(p) in matrices) == inside] for inside in (True, False)]
        groups = [{"params": parts[0]}, {"params": parts[1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, config.lr, config.betas, weight_decay=config.weight_decay, fused=True)


def clip_gradients(model: nn.Module, clip: float | None) -> Tensor:
    """The norm of all gradients together, which are scaled down to the norm `clip` where theirs is larger."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    return norm
