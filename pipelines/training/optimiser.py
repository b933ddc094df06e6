"""AdamW of a training run: which parameters decay, how long a step of it may be, and the average of its weights."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pipelines.config import TrainConfig

MATRICES = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)  # layers whose weights are matrices, of whatever rank


def optimiser_of(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """With `decay` "matrices", norms, biases and learned tokens are the second group, which does not decay."""
    groups = [{"params": list(model.parameters())}]
    if config.decay == "matrices":
        matrices = {id(layer.weight) for layer in model.modules() if isinstance(layer, MATRICES)}
        parts = [[p for p in model.parameters() if (id(p) in matrices) == inside] for inside in (True, False)]
        groups = [{"params": parts[0]}, {"params": parts[1], "weight_decay": 0.0}]
    # one operator on a GPU; on a CPU that one rounds otherwise than recorded results, and the next best does not
    way = {"fused": True} if next(model.parameters()).is_cuda else {"foreach": True}
    return torch.optim.AdamW(groups, config.lr, config.betas, weight_decay=config.weight_decay, **way)


def clip_gradients(model: nn.Module, clip: float | None) -> Tensor:
    """The norm of all gradients together, which are scaled down to the norm `clip` where theirs is larger."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.stack(torch._foreach_norm([p.grad for p in parameters])).norm()
    if clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm, foreach=True)
    return norm


@torch.no_grad()
def update_average(average: AveragedModel, model: nn.Module, decay: float) -> None:
    """Exponential moving average of the weights, which begins as those of the first step; all tensors at once."""
    weight = 1 - decay if average.n_averaged else 1.0
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), weight)
    torch._foreach_copy_(list(average.module.buffers()), list(model.buffers()))
    average.n_averaged += 1
