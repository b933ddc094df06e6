"""What a model keeps of a support set, computed once, to segment any number of queries."""

import torch
from torch import Tensor

from la.device import autocast
from la.errors import InputError
from la.model.hybrid import Hybrid
from la.model.label_anything import LabelAnything
from la.predictor.support_set import SupportSet

SUPPORTS_AT_ONCE = 8  # whose maps are in memory together


class Prototypes:
    """LA: one vector a class, `prototypes` (1, C, D); slot i + 1 is `classes[i]`, slot 0 the background."""

    @torch.inference_mode()
    def __init__(self, model: LabelAnything, supports: SupportSet, device: torch.device):
        self.model, self.classes = model, supports.classes
        pool = model.prompt_encoder.pool
        if pool is not None and len(self.classes) >= len(pool.rows):
            raise InputError(
                f"there are {len(self.classes)} classes; this checkpoint tells at most {len(pool.rows) - 1} apart. "
                "Leave some out."
            )
        count = len(supports.supports)
        with autocast(device):
            self.prototypes = model.prototypes(
                supports.batch(range(start, start + SUPPORTS_AT_ONCE)).to(device)
                for start in range(0, count, SUPPORTS_AT_ONCE)
            ).float()
        self.slots = torch.ones(self.prototypes.shape[:2], dtype=torch.bool, device=device)

    @torch.inference_mode()
    def logits(self, query: Tensor) -> Tensor:
        """Query features (B, h, w, Dv) on the model's device -> (B, C, 4h, 4w) float32."""
        b = len(query)
        with autocast(query.device):
            return self.model.decode(query, self.prototypes.expand(b, -1, -1), self.slots.expand(b, -1)).float()


class Matched:
    """The hybrid: what of the supports belongs to the classes shown, and the tokens that queries are compared with."""

    @torch.inference_mode()
    def __init__(self, model: Hybrid, supports: SupportSet, device: torch.device):
        self.model, self.classes = model, supports.classes
        (self.annotated,) = model.matching.annotated(supports.batch().to(device))
        self.slots = torch.ones(1, len(self.classes) + 1, dtype=torch.bool, device=device)

    @torch.inference_mode()
    def logits(self, query: Tensor) -> Tensor:
        """As of `Prototypes`, one query after the other: affinities of several at once would fill the memory."""
        return torch.cat([self._logits(one) for one in query.split(1)])

    def _logits(self, query: Tensor) -> Tensor:
        maps = self.model.matching.match(query, self.slots, [self.annotated])
        with autocast(query.device):
            return self.model.decode(query, maps, self.slots).float()


Learned = Prototypes | Matched  # a support set as a model knows it


def learn(model: LabelAnything | Hybrid, supports: SupportSet, device: torch.device) -> Learned:
    """Raises InputError for more classes than the model's token pool has rows for."""
    return (Matched if isinstance(model, Hybrid) else Prototypes)(model, supports, device)
