"""Features in eight bits: one scale for each token, half the bytes of float16, decoded where they are used."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LEVELS = 127  # the scale is symmetric, so a feature of zero stays zero
LARGEST = 515.5  # of the scales: 127 times the next float16 would be beyond float16


def quantise(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features (..., C) -> int8 values (..., C) and float16 scales (...,): each token's largest magnitude is 127."""
    wide = features.astype(np.float32)
    scales = np.minimum(np.abs(wide).max(-1) / LEVELS, LARGEST).astype(np.float16)
    steps = np.where(scales > 0, scales, 1).astype(np.float32)[..., None]
    return np.clip(np.rint(wide / steps), -LEVELS, LEVELS).astype(np.int8), scales


@dataclass
class Quantised:
    """Features (n, h, w, C) as they lie in an int8 store. Moving them to a device, the same one too, decodes them."""

    values: Tensor  # (n, h, w, C) int8
    scales: Tensor  # (n, h, w) float16

    @classmethod
    def empty(cls, count: int, shape: tuple[int, int, int]) -> "Quantised":
        """Room for `count` images of (h, w, C)."""
        return cls(torch.empty(count, *shape, dtype=torch.int8), torch.empty(count, *shape[:2], dtype=torch.float16))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Tensor:
        """(n, h, w, C) float32 on `device`: a quarter of these bytes travel."""
        moved = Quantised(*(t.to(device, non_blocking=non_blocking) for t in (self.values, self.scales)))
        return moved.decode(torch.empty(self.values.shape, device=device))

    def decode(self, out: Tensor) -> Tensor:
        """`out` (n, h, w, C), filled."""
        return out.copy_(self.values).mul_(self.scales.float()[..., None])

    def pin_memory(self) -> "Quantised":
        return Quantised(self.values.pin_memory(), self.scales.pin_memory())
