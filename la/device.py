"""Where tensors live and in which precision."""

from contextlib import AbstractContextManager, nullcontext

import torch

from la.errors import InputError


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one. Raises InputError where it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name} cannot be used here ({error}). Use cpu or auto.") from error


def autocast(device: torch.device) -> AbstractContextManager:
    """bf16 on CUDA; fp32 on the CPU, where bf16 is slower."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
