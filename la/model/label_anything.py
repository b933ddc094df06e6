"""Label Anything from backbone features to logits (paper section 4, figure 1)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor, nn

from la.episodes.batch import EpisodeBatch, Pairs, dense_grid
from la.errors import InputError
from la.model.attention import LayerNorm2d, TwoWayTransformer
from la.model.decoder import MaskDecoder, QueryClassAttention
from la.model.hybrid import Hybrid, HybridConfig
from la.model.prompt_encoder import PromptEncoder
from la.model.prototypes import ClassExampleMixer, ImagePromptFusion, TwoWayFusion


@dataclass(frozen=True)
class ModelConfig:
    """What a model is made of; saved in every checkpoint."""

    channels: int = 768  # Dv, channels of the backbone's features
    dim: int = 256  # D, channels after the neck
    heads: int = 8
    # "paper": the paper's equations, without feed-forward blocks. "released": built as the authors' code, with a neck
    # of two convolutions, two-way transformers, and a mixer over all pairs of an episode. See `paper_parts`.
    arch: Literal["paper", "released"] = "paper"
    depth: int = 0  # rounds of attention, of prompts and image, of classes and query; 0: 1, or 2 if released
    token_pool: bool = True
    class_example_mixer: bool = True
    spatial_convs: bool = True
    two_way_ffn: int = 2048  # channels of feed-forward blocks in two-way transformers, released only
    block_ffn: int = 2048  # and of those in the self-attention of sparse tokens and of the mixer
    # Whether pairs that are not annotated and padding take part as they do in the released model, whose results depend
    # on batch mates for it. Slow; only for checkpoints that were trained so.
    absent_pairs: bool = False
    mask_px: int | None = None  # side of mask prompts; None: four cells to a feature cell

    def __post_init__(self):
        if not self.depth:
            object.__setattr__(self, "depth", 2 if self.arch == "released" else 1)
        if self.dim % (2 * self.heads):
            raise InputError(f"dim is {self.dim}; it must be a multiple of {2 * self.heads} (two per attention head).")


PRESETS = {
    "paper": ModelConfig(),
    "official": ModelConfig(arch="released", mask_px=256),
    "hybrid": HybridConfig(),
    "debug": ModelConfig(dim=32),
}


def preset(name: str, **changes) -> ModelConfig | HybridConfig:
    """The config of that preset with `changes`. Raises InputError for an unknown name and for parts it has not."""
    if name not in PRESETS:
        raise InputError(f"preset {name} is unknown. Choose one of {', '.join(PRESETS)}.")
    unknown = sorted(changes.keys() - {field.name for field in fields(PRESETS[name])})
    if unknown:
        raise InputError(f"preset {name} has no setting {', '.join(unknown)}. Leave it out, or choose another preset.")
    return replace(PRESETS[name], **changes)


def build(config: ModelConfig | HybridConfig) -> "LabelAnything | Hybrid":
    """A model of random weights."""
    return Hybrid(config) if isinstance(config, HybridConfig) else LabelAnything(config)


class Neck(nn.Sequential):
    """Backbone features to D channels: one 1x1 convolution, or with `refine` a 3x3 one after it, both normalised."""

    def __init__(self, channels: int, dim: int, refine: bool):
        # a linear layer is a 1x1 convolution on channels-last features
        if not refine:
            super().__init__(nn.Linear(channels, dim))
            return
        conv = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        super().__init__(nn.Linear(channels, dim, bias=False), nn.LayerNorm(dim, 1e-6), conv, LayerNorm2d(dim))

    def forward(self, features: Tensor) -> Tensor:
        """(B, h, w, Dv) -> (B, h*w, D)."""
        image = self[0](features.to(self[0].weight.dtype))
        if len(self) > 1:
            image = self[3](self[2](self[1](image).permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        return image.flatten(1, 2)


def paper_parts(config: ModelConfig) -> tuple[nn.Module, ...]:
    """Neck, prompt encoder, fusion, mixer and decoder by the paper's equations 1 to 7."""
    dim, heads = config.dim, config.heads
    return (
        Neck(config.channels, dim, refine=False),
        PromptEncoder(dim, heads, config.token_pool, pad_tokens=config.absent_pairs),
        ImagePromptFusion(dim, heads, config.depth),
        ClassExampleMixer(dim, heads, config.class_example_mixer),
        MaskDecoder(dim, [QueryClassAttention(dim, heads) for _ in range(config.depth)], config.spatial_convs),
    )


def released_parts(config: ModelConfig) -> tuple[nn.Module, ...]:
    """The same five parts as the authors' released code has them."""
    dim, heads, wide, block = config.dim, config.heads, config.two_way_ffn, config.block_ffn
    return (
        Neck(config.channels, dim, refine=True),
        PromptEncoder(dim, heads, config.token_pool, block, pad_tokens=config.absent_pairs),
        TwoWayFusion(dim, heads, config.depth, wide),
        ClassExampleMixer(dim, heads, config.class_example_mixer, block, jointly=True),
        MaskDecoder(dim, [TwoWayTransformer(dim, heads, wide, config.depth)], config.spatial_convs),
    )


class LabelAnything(nn.Module):
    """Neck, prompt encoder, image-prompt fusion, class-example mixer and mask decoder; the backbone stays outside."""

    # Most pairs (background, and masks alone) have the one no-sparse token. Where arithmetic is what takes long, they
    # go through the fusion apart from those with more, whose padding is not theirs; the results are equal.
    fused_apart_on: tuple[str, ...] = ("cpu",)

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        parts = released_parts(config) if config.arch == "released" else paper_parts(config)
        self.neck, self.prompt_encoder, self.fusion, self.mixer, self.decoder = parts

    def forward(self, batch: EpisodeBatch, seeds: Sequence[int] | None = None) -> Tensor:
        """Logits (B, C, 4h, 4w), slot 0 the background.

        `seeds` draw the token-pool rows of each episode (training); without them the rows are fixed, so evaluation is
        deterministic.
        """
        return self.decode(batch.query, self.prototypes(batch, seeds), batch.slots)

    def prototypes(self, supports: EpisodeBatch | Iterable[EpisodeBatch], seeds: Sequence[int] | None = None) -> Tensor:
        """Class prototypes E (B, C, D) from the supports alone.

        `supports` in chunks (see `pack`) gives the same in the memory of one chunk, whatever the number of shots.
        """
        chunks = [supports] if isinstance(supports, EpisodeBatch) else supports
        rows, parts, embeddings = None, [], []
        for chunk in chunks:
            if self.config.absent_pairs:
                chunk = dense_grid(chunk)
            if rows is None and self.prompt_encoder.pool is not None:
                pool, (episodes, slots) = self.prompt_encoder.pool, chunk.slots.shape
                rows = pool.draw(seeds, slots) if seeds is not None else pool.fixed(episodes, slots)
                rows = rows.to(chunk.support.device, non_blocking=True)
            parts.append(chunk.pairs)
            embeddings.append(self.embed(chunk, rows))
        return self.mixer(parts[0] if len(parts) == 1 else Pairs.merged(parts), torch.cat(embeddings))

    def embed(self, batch: EpisodeBatch, rows: Tensor | None) -> Tensor:
        """The embedding e_{l,c} of every pair, (P, D), given the classes' token-pool rows (B, C)."""
        grid = tuple(batch.support.shape[1:3])
        images = self.neck(batch.support)
        dense, sparse, valid = self.prompt_encoder(batch, rows, grid)
        place = self.prompt_encoder.position.grid(*grid)
        if self.config.absent_pairs or images.device.type not in self.fused_apart_on:
            return self.fusion(images[batch.pair_support], dense, sparse, valid, place)
        embeddings = images.new_zeros(len(valid), images.shape[-1])
        for pairs, count in ((batch.other_pair, 1), (batch.sparse_pair, valid.shape[1])):
            if len(pairs):
                parts = dense[pairs], sparse[pairs, :count], valid[pairs, :count]
                fused = self.fusion(images[batch.pair_support[pairs]], *parts, place)
                embeddings = embeddings.index_put((pairs,), fused.to(embeddings.dtype))
        return embeddings

    def decode(self, query: Tensor, prototypes: Tensor, slots: Tensor) -> Tensor:
        """Query features (B, h, w, Dv), prototypes (B, C, D), slots (B, C) -> logits (B, C, 4h, 4w)."""
        grid = tuple(query.shape[1:3])
        place = self.prompt_encoder.position.grid(*grid)
        return self.decoder(self.neck(query), prototypes, place, slots, grid)

    def parameter_table(self) -> dict[str, int]:
        """Part -> number of learnable parameters."""
        return {name: sum(p.numel() for p in part.parameters()) for name, part in self.named_children()}


def save_state(model: LabelAnything | Hybrid) -> dict:
    """What rebuilds the model: its kind, its config and its state dict on the CPU."""
    return {
        "kind": "hybrid" if isinstance(model, Hybrid) else "la",
        "config": asdict(model.config),
        "state": {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()},
    }


def load_state(saved: dict) -> LabelAnything | Hybrid:
    """The inverse of `save_state`, for checkpoints of earlier versions too."""
    config = dict(saved["config"])
    if saved.get("kind") == "hybrid":
        model = build(HybridConfig(**config))
    else:
        if "arch" not in config:  # it followed from the width of feed-forward blocks, which the paper's have none of
            config["arch"] = "released" if config.get("two_way_ffn") else "paper"
            config = {name: value for name, value in config.items() if not (name.endswith("_ffn") and value is None)}
        model = build(ModelConfig(**config))
    model.load_state_dict(today_names(saved["state"]))
    return model


def today_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose layers are named as now: once the first stood apart from those in `more`."""
    own = r"(token_to_image|image_to_token|token_norm|image_norm)\."
    if not any("fusion." in name for name in state):  # a hybrid, whose layers never were named otherwise
        return dict(state)
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(rf"(^|\.)fusion\.(?={own})", r"\1fusion.layers.0.", name)
        name = re.sub(r"(^|\.)decoder\.attention\.", r"\1decoder.layers.0.", name)
        name = re.sub(r"(^|\.)(fusion|decoder)\.more\.(\d+)\.", lambda m: f"{m[1]}{m[2]}.layers.{int(m[3]) + 1}.", name)
        renamed[name] = tensor
    return renamed
