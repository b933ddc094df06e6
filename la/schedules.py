"""Learning-rate schedules as factors of the base rate (paper section 5.2)."""

import math


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Linear from 0 over `warmup` steps, then a cosine to 0 at step `total`, changed at every step."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
