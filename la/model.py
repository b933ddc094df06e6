"""Label Anything from backbone features to logits (paper section 4, figure 1)."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from la.batch import EpisodeBatch
from la.decoder import MaskDecoder
from la.errors import InputError
from la.prompts import PromptEncoder
from la.prototypes import ClassExampleMixer, ImagePromptFusion


@dataclass(frozen=True)
class ModelConfig:
    """What a model is made of; saved in every checkpoint."""

    channels: int = 768  # Dv, channels of the backbone's features
    dim: int = 256  # D, channels after the neck
    heads: int = 8
    token_pool: bool = True
    class_example_mixer: bool = True
    spatial_convs: bool = True

    def __post_init__(self):
        if self.dim % (2 * self.heads):
            raise InputError(f"--dim {self.dim} must be a multiple of {2 * self.heads} (two per attention head).")


PRESETS = {"paper": 256, "debug": 32}  # preset -> D


class LabelAnything(nn.Module):
    """Neck, prompt encoder, image-prompt fusion, class-example mixer and mask decoder; the backbone stays outside."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.neck = nn.Linear(config.channels, config.dim)  # a 1x1 convolution on channels-last features
        self.prompt_encoder = PromptEncoder(config.dim, config.token_pool, config.heads)
        self.fusion = ImagePromptFusion(config.dim, config.heads)
        self.mixer = ClassExampleMixer(config.dim, config.class_example_mixer, config.heads)
        self.decoder = MaskDecoder(config.dim, config.spatial_convs, config.heads)

    def forward(self, batch: EpisodeBatch, generator: torch.Generator | None = None) -> Tensor:
        """Logits (B, C, 4h, 4w), slot 0 the background.

        `generator` draws the token-pool rows (training); without it they are fixed, so evaluation is deterministic.
        """
        return self.decode(batch.query, self.prototypes(batch, generator), batch.slots)

    def prototypes(self, batch: EpisodeBatch, generator: torch.Generator | None = None) -> Tensor:
        """Class prototypes E (B, C, D) from the supports alone."""
        grid = tuple(batch.support.shape[1:3])
        rows = None
        if self.prompt_encoder.pool is not None:
            rows = self.prompt_encoder.pool.draw(*batch.slots.shape, generator).to(batch.support.device)
        images = self.neck(batch.support.to(self.neck.weight.dtype).flatten(1, 2))
        dense, sparse, valid = self.prompt_encoder(batch, rows, grid)
        position = self.prompt_encoder.position.grid(*grid)
        # most pairs (background, and masks alone) have the one no-sparse token: the others' padding is not theirs
        embeddings = images.new_zeros(len(valid), images.shape[-1])
        for some, count in ((~valid[:, 1:].any(1), 1), (valid[:, 1:].any(1), valid.shape[1])):
            pairs = some.nonzero()[:, 0]
            if len(pairs):
                parts = dense[pairs], sparse[pairs, :count], valid[pairs, :count]
                fused = self.fusion(images[batch.pair_support[pairs]], *parts, position)
                embeddings = embeddings.index_put((pairs,), fused)
        return self.mixer(batch, embeddings)

    def decode(self, query: Tensor, prototypes: Tensor, slots: Tensor) -> Tensor:
        """Query features (B, h, w, Dv), prototypes (B, C, D), slots (B, C) -> logits (B, C, 4h, 4w)."""
        image = self.neck(query.to(self.neck.weight.dtype).flatten(1, 2))
        return self.decoder(image, prototypes, slots, tuple(query.shape[1:3]))

    def parameter_table(self) -> dict[str, int]:
        """Part -> number of learnable parameters."""
        return {name: sum(p.numel() for p in part.parameters()) for name, part in self.named_children()}


def save_state(model: LabelAnything) -> dict:
    """What rebuilds the model: its config and its state dict on the CPU."""
    return {
        "config": asdict(model.config),
        "state": {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()},
    }


def load_state(saved: dict) -> LabelAnything:
    """The inverse of `save_state`."""
    model = LabelAnything(ModelConfig(**saved["config"]))
    model.load_state_dict(saved["state"])
    return model
