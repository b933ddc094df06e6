"""Memory for the features of batches, used again and again."""

import math
import sys
import threading

import numpy as np
import torch
from torch import Tensor

KEPT = 8  # buffers of a thread


class Buffers(threading.local):
    """Hands out memory that no tensor uses any more; each thread has its own.

    New memory costs as much as filling it does: the system clears it, and locks it where it is `pinned`, for copying
    to a GPU. PyTorch keeps pinned memory by itself, until the GPU has read it.
    """

    pinned = False

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []

    def empty(self, *shape: int) -> Tensor:
        """float16, not initialised."""
        if Buffers.pinned:
            return torch.empty(shape, dtype=torch.float16, pin_memory=True)
        numbers = math.prod(shape)
        unused = [n for n in range(len(self._kept)) if sys.getrefcount(self._kept[n]) == 2]  # the list, the call
        fitting = [n for n in unused if len(self._kept[n]) >= numbers]
        best = min(fitting, key=lambda n: len(self._kept[n]), default=None)
        kept = np.empty(numbers, np.float16) if best is None else self._kept.pop(best)
        self._kept = [*self._kept[1 - KEPT :], kept]  # what was used longest ago goes first
        return torch.from_numpy(kept[:numbers].reshape(shape))
