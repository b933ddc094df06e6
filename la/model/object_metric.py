"""A metric of features in which objects of one class lie together."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ObjectMetric(nn.Module):
    """A linear map of features in which objects of one class lie together, fitted in closed form to labelled objects.

    An object is the mean of the unit features that its mask covers, o. With m the mean of objects and S their mean
    covariance within a class, x becomes (S / tr(S) D + shrinkage I)^-1/2 (x - m): linear discriminant analysis with a
    metric that carries over to classes it was not fitted to. Before `fit` it is the identity.
    """

    shrinkage = 2.0

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("map", torch.eye(channels))

    def fit(self, objects: Tensor, classes: Tensor) -> None:
        """objects (n, D), classes (n,) long; classes of a single object say nothing of the spread and are left out."""
        objects = objects.to(self.mean)
        number = classes.unique(return_inverse=True)[1].to(objects.device)
        counts = number.bincount()
        centres = torch.zeros(len(counts), objects.shape[1]).to(objects).index_add_(0, number, objects)
        apart = (objects - (centres / counts[:, None])[number])[counts[number] > 1]
        values, vectors = torch.linalg.eigh(apart.T @ apart)
        scale = (values / values.mean().clamp(min=1e-12) + self.shrinkage).rsqrt()
        self.mean.copy_(objects.mean(0))
        self.map.copy_(vectors @ scale.diag() @ vectors.T)

    def forward(self, units: Tensor) -> Tensor:
        """Unit features (..., D) -> unit features (..., D)."""
        return F.normalize((units - self.mean) @ self.map, dim=-1)
