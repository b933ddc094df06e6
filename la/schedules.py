"""Learning-rate schedules as factors of the base rate (paper section 5.2)."""

import math
from typing import Literal

Schedule = Literal["cosine", "constant"]


def factor(schedule: Schedule, step: int, warmup: int, total: int) -> float:
    """Of the base rate at `step`: linear from 0 over `warmup` steps, then `schedule`."""
    return warmup_cosine(step, warmup, total) if schedule == "cosine" else min(1.0, (step + 1) / max(1, warmup))


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Linear from 0 over `warmup` steps, then a cosine to 0 at step `total`, changed at every step."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
