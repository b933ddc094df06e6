"""Checkpoints of the official implementation: from a file or a hub to one of ours, and back to a file."""

from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from la.errors import InputError
from la.model.label_anything import LabelAnything, load_state, save_state
from la.model.official_names import from_official, to_official
from pipelines.runs.checkpoints import save
from pipelines.workspace import write_whole

HUB = "hf://"
HUB_FILE = "model.safetensors"
STATE_KEYS = ("model", "state_dict", "model_state_dict")  # where training scripts keep the weights


def import_official(source: str, fold: int, out: Path, absent_pairs: bool = True) -> LabelAnything:
    """Turn a released checkpoint into one that `evaluate` takes, written to `out`; returns the model.

    `source` is a .safetensors file, a file for `torch.load(weights_only=True)`, or hf://owner/name[/file]. `fold` is
    the COCO-20i fold whose classes the checkpoint has not seen, which the file does not say. Raises InputError for a
    source that is not there, that cannot be read without running code in it, or that is not of the official model.
    """
    try:
        model = from_official(_read(_fetch(source)), absent_pairs)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    # which features it was trained on is not in the file: only their channels can be checked
    save(out, save_state(model) | {"fold": fold, "store": None, "step": 0, "source": source})
    return model


def export_official(checkpoint: Path, out: Path) -> None:
    """Write a checkpoint's weights under the official names, as safetensors. InputError as for `to_official`."""
    if not checkpoint.is_file():
        raise InputError(f"{checkpoint} is not there. Pass a run's best.pt.")
    model = load_state(torch.load(checkpoint, map_location="cpu", weights_only=True))
    write_whole(out, lambda temporary: safetensors.torch.save_file(to_official(model), temporary))


def _fetch(source: str) -> Path:
    if not source.startswith(HUB):
        path = Path(source)
        if not path.is_file():
            raise InputError(f"is not there. Pass a file, or {HUB}owner/name where a hub is in reach.")
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    owner, _, rest = source.removeprefix(HUB).partition("/")
    name, _, file = rest.partition("/")
    if not owner or not name:
        raise InputError(f"expected {HUB}owner/name or {HUB}owner/name/file.")
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file or HUB_FILE))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"could not be downloaded ({error}). Download it elsewhere and pass the file.") from error


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise InputError(f"cannot be read ({error}).") from error
    except Exception as error:  # the unpickler's own, which is not exported
        raise InputError(f"holds more than tensors, and pickled code is never run ({error}).") from error
    while isinstance(content, dict) and (inner := next((k for k in STATE_KEYS if k in content), None)):
        content = content[inner]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"holds {type(content).__name__} instead of a dictionary of tensors.")
    return content
