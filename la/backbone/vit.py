"""The frozen ViT: a photo becomes one map of final-layer, final-norm patch tokens (paper section 4.1).

Photos are squashed to a square (bicubic, as the masks are), so one token always covers the same share of a photo.
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import nn

import la.backbone.vit_demo  # noqa: F401  timm learns the demo's ViT by this import
from la.device import autocast
from la.errors import InputError

LAYER = "final block, final norm, patch tokens only"


def preprocessing(name: str) -> dict[str, Any]:
    """How a photo is prepared for the timm model `name`: mean and std of RGB in [0, 1], and the resize, in words.

    Known without building the model. Raises InputError for a name timm does not know.
    """
    config = _pretrained_config(name)
    return {"resize": "squash to a square, bicubic", "mean": list(config.mean), "std": list(config.std)}


def identify_weights(name: str, weights: Path | None) -> str:
    """What tells these weights from others without loading them: a digest of the file, or the hub's own id.

    Raises InputError for a missing file or an unknown model name.
    """
    if weights is None:
        return f"hub:{_hub_id(name)}"
    try:
        with open(weights, "rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        raise InputError(
            f"weights {weights} cannot be read ({error.strerror}). Pass a .safetensors or .pth."
        ) from error


class Backbone(nn.Module):
    """A frozen ViT in evaluation mode.

    Attributes: `name`; `image_size` S and `patch_size` in pixels; `grid` (h, w) in tokens; `channels` C;
    `weights_digest`, sha256 of the state dict in use; `preprocessing`, see the function of that name.
    """

    def __init__(self, name: str, vit: nn.Module, image_size: int):
        super().__init__()
        self.vit = vit.eval().requires_grad_(False)
        self.name = name
        self.image_size = image_size
        self.patch_size: int = vit.patch_embed.patch_size[0]
        self.grid: tuple[int, int] = (image_size // self.patch_size,) * 2
        self.channels: int = vit.num_features
        self.weights_digest = _digest(vit.state_dict())
        self.preprocessing = preprocessing(name)
        # Not part of the weights: they belong to the preprocessing, which has its own place in every key.
        self.register_buffer("mean", torch.tensor(self.preprocessing["mean"]).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(self.preprocessing["std"]).view(1, 3, 1, 1) * 255, persistent=False)

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in evaluation mode: the backbone is frozen, whatever its owner does."""
        return super().train(False)

    def normalise(self, photos: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 RGB on any device -> float on the backbone's device, mean 0 and std 1 by channel."""
        return (photos.to(self.mean.device, non_blocking=True).float() - self.mean) / self.std

    def forward(self, photos: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) normalised -> (B, h, w, C) patch tokens of the last block after the last norm."""
        tokens = self.vit.forward_features(photos)
        if isinstance(self.vit.norm, nn.Identity):
            # Average-pooled ViTs keep their last norm behind the pooling, where patch tokens would never meet it.
            tokens = getattr(self.vit, "fc_norm", nn.Identity())(tokens)
        return tokens[:, self.vit.num_prefix_tokens :].unflatten(1, self.grid)

    @torch.inference_mode()
    def encode(self, photos: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 RGB -> (B, h, w, C) float16 features, the very ones a feature store holds.

        bf16 autocast on CUDA, fp32 on the CPU, where bf16 is slower.
        """
        with autocast(self.mean.device):
            return self(self.normalise(photos)).half()


def load_backbone(
    name: str, image_size: int, weights: Path | None = None, device: torch.device | str = "cpu"
) -> Backbone:
    """The timm ViT `name` for photos of `image_size` pixels a side, its position embedding resized to the grid.

    `weights` is a safetensors or torch file in timm's names; without it timm's own weights come from the hub. Raises
    InputError for an unknown name, a model that is not a plain ViT, a size the patch does not divide, and weights that
    cannot be had or do not fit.
    """
    vit = random_vit(name, image_size)
    if weights is not None:
        _load_file(vit, name, Path(weights))
    else:
        try:
            vit = timm.create_model(name, num_classes=0, img_size=image_size, pretrained=True)
        except Exception as error:  # the hub client raises anything from OSError to its HTTP library's own
            raise InputError(
                f"The weights of {name} could not be had from the model hub (timm wants {_hub_id(name)}; "
                f"{type(error).__name__}: {error!s:.160}). Pass as weights a .safetensors or .pth in timm's names."
            ) from error
    return Backbone(name, vit, image_size).to(device)


def random_vit(name: str, image_size: int) -> nn.Module:
    """The timm ViT `name` with random weights; under `torch.device("meta")` its shapes alone.

    Raises InputError as `load_backbone` does for names and sizes.
    """
    _pretrained_config(name)
    try:
        vit = timm.create_model(name, num_classes=0, img_size=image_size)
    except (TypeError, AssertionError) as error:
        raise _not_a_vit(name) from error
    if not hasattr(vit, "num_prefix_tokens") or not hasattr(getattr(vit, "patch_embed", None), "patch_size"):
        raise _not_a_vit(name)
    patch = vit.patch_embed.patch_size[0]
    if image_size % patch or image_size < patch:
        lower = max(image_size // patch, 1) * patch
        raise InputError(
            f"image_size {image_size} is not a multiple of {patch}, the patch size of {name}. "
            f"Pass {lower} or {lower + patch}."
        )
    return vit


def _pretrained_config(name: str) -> Any:
    try:
        if not timm.is_model(name):
            raise LookupError(name)
        return timm.get_pretrained_cfg(name)
    except (RuntimeError, LookupError) as error:  # timm raises RuntimeError for a tag it does not know
        family = name.split(".")[0]
        near = timm.list_pretrained(f"{family}*") or timm.list_models(f"{family[:8]}*") or timm.list_models("vit_base*")
        raise InputError(
            f"backbone {name} is not a model that timm {timm.__version__} knows. Near it: {', '.join(near[:5])}."
        ) from error


def _hub_id(name: str) -> str:
    config = _pretrained_config(name)
    return config.hf_hub_id or config.url or "nothing: it knows no weights of this model"


def _not_a_vit(name: str) -> InputError:
    return InputError(
        f"backbone {name} is not a plain ViT: one size of tokens from first block to last is needed. "
        "Pass one such as vit_base_patch16_224.mae or vit_small_patch14_dinov2."
    )


def _load_file(vit: nn.Module, name: str, file: Path) -> None:
    state = _read_state(file)
    shown = f"weights {file} does not fit {name}"
    # Each timm family has its own filter under this name: it renames old keys and resizes the position embedding.
    convert = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", None)
    try:
        state = convert(state, vit) if convert else state
    except (RuntimeError, KeyError, AttributeError, ValueError, AssertionError) as error:
        raise InputError(f"{shown} ({error!s:.160}). Pass the weights of this model, in timm's names.") from error
    own = vit.state_dict()
    head = _pretrained_config(name).classifier or "head"
    heads = tuple(f"{part}." for part in ([head] if isinstance(head, str) else head))
    state = {key: value for key, value in state.items() if key in own or not key.startswith(heads)}
    faults = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in sorted(own.keys() & state.keys())
            if state[key].shape != own[key].shape
        ],
    }
    listed = [f"{len(v)} {kind}, e.g. {', '.join(v[:3])}" for kind, v in faults.items() if v]
    if listed:
        raise InputError(f"{shown}: {'; '.join(listed)}. Pass the weights of this model, in timm's names.")
    vit.load_state_dict(state)


def _read_state(file: Path) -> dict[str, torch.Tensor]:
    try:
        if file.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files give errors of many kinds, and code in them is refused by yet another
        raise InputError(
            f"weights {file} cannot be read ({type(error).__name__}: {error!s:.120}); "
            "expected tensors alone in a .safetensors or .pth. Download it again or convert it."
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f"weights {file} holds no state dict: expected names and tensors, or them under `model`.")
    # Half-precision files are widened first: the position embedding would be resized in their precision.
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def _digest(state: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        total.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.view(-1).view(torch.uint8).numpy())
    return total.hexdigest()
