"""Checkpoints of the official implementation: its names for our parameters, and back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from la.errors import InputError
from la.model.label_anything import LabelAnything, ModelConfig, preset

# our name -> the official one; the longest matching start wins, then parts inside are renamed
STARTS = {
    "neck.": "neck.",
    "prompt_encoder.mask_cnn.": "prompt_encoder.mask_downscaling.",
    "prompt_encoder.no_mask": "prompt_encoder.no_mask_embed.weight",
    "prompt_encoder.absent_mask": "prompt_encoder.not_a_mask_embed.weight",
    "prompt_encoder.no_sparse": "prompt_encoder.no_sparse_embedding.weight",
    "prompt_encoder.absent_point": "prompt_encoder.not_a_point_embed.weight",
    "prompt_encoder.position.matrix": "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    "prompt_encoder.exchange.attention.": "prompt_encoder.sparse_embedding_attention.attn.",
    "prompt_encoder.exchange.": "prompt_encoder.sparse_embedding_attention.",
    "prompt_encoder.pool.rows": "prompt_encoder.class_encoder.pos_embedding",
    "mixer.block.attention.": "prompt_encoder.class_example_attention.attn.",
    "mixer.block.": "prompt_encoder.class_example_attention.",
    "fusion.transformer.": "prompt_encoder.transformer.",
    "decoder.layers.0.": "mask_decoder.transformer.",
    "decoder.upscaling.": "mask_decoder.output_upscaling.",
    "decoder.class_mlp.0.": "mask_decoder.class_mlp.layers.0.",
    "decoder.class_mlp.2.": "mask_decoder.class_mlp.layers.1.",
    "decoder.class_mlp.4.": "mask_decoder.class_mlp.layers.2.",
    "decoder.spatial_convs.": "mask_decoder.spatial_convs.",
}
PARTS = {
    ".self_attention.": ".self_attn.",
    ".token_to_image.": ".cross_attn_token_to_image.",
    ".image_to_token.": ".cross_attn_image_to_token.",
    ".last_attention.": ".final_attn_token_to_image.",
    ".last_norm.": ".norm_final_attn.",
    ".mlp.0.": ".mlp.lin1.",
    ".mlp.2.": ".mlp.lin2.",
} | {f".norms.{i}.": f".norm{i + 1}." for i in range(4)}
TYPES = "prompt_encoder.types"  # one tensor here, one embedding for each type there
TYPE_NAMES = tuple(f"prompt_encoder.point_embeddings.{i}.weight" for i in range(4))
BACKBONE = "image_encoder."  # frozen: it comes from timm
WRAPPERS = ("model.", "module.", "_orig_mod.")


def official_name(name: str) -> str:
    """The official name of one of our parameters, `prompt_encoder.types` aside."""
    start = max((s for s in STARTS if name.startswith(s)), key=len)
    renamed = STARTS[start] + name[len(start) :]
    for ours, theirs in PARTS.items():
        renamed = renamed.replace(ours, theirs)
    return renamed


def from_official(state: Mapping[str, Tensor], absent_pairs: bool = True) -> LabelAnything:
    """A model from an official state dict, with the parts that the file has (mixer, token pool, spatial convolutions).

    `absent_pairs` reproduces how the official model lets pairs that are not annotated take part, which its released
    checkpoints were trained with. Raises InputError that lists what is missing, left over or of another shape.
    """
    state = {_unwrapped(name): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if not name.startswith(BACKBONE)}
    model = LabelAnything(_config_of(state, absent_pairs))
    ours, unused, problems = {}, set(state), []
    for name, tensor in model.state_dict().items():
        names = TYPE_NAMES if name == TYPES else (official_name(name),)
        missing = [n for n in names if n not in state]
        problems += [f"missing: {n}" for n in missing]
        unused -= set(names)
        if missing:
            continue
        found = torch.cat([state[n].reshape(-1) for n in names])
        if found.numel() != tensor.numel():
            problems.append(f"{names[0]}: shape {tuple(state[names[0]].shape)}, expected {tuple(tensor.shape)}")
            continue
        ours[name] = found.reshape(tensor.shape).to(tensor.dtype)
    problems += [f"left over: {name}" for name in sorted(unused)]
    if problems:
        raise InputError("This is not a checkpoint of the official model:\n  " + "\n  ".join(problems))
    model.load_state_dict(ours)
    return model


def to_official(model: LabelAnything) -> dict[str, Tensor]:
    """The state dict under the official names and shapes. InputError for a model of another make."""
    if model.config.arch != "released":
        raise InputError("Only a model of the official preset has a place for all of its parameters there.")
    state = {}
    for name, tensor in model.state_dict().items():
        if name == TYPES:
            state |= {n: row[None].clone() for n, row in zip(TYPE_NAMES, tensor, strict=True)}
        elif name == "neck.0.weight":
            state[name] = tensor[:, :, None, None].clone()
        elif name == "prompt_encoder.pool.rows":
            state[official_name(name)] = tensor[None, None].clone()
        elif name.startswith("prompt_encoder.") and tensor.dim() == 1 and name.count(".") == 1:
            state[official_name(name)] = tensor[None].clone()
        else:
            state[official_name(name)] = tensor.clone()
    return state


def _config_of(state: Mapping[str, Tensor], absent_pairs: bool) -> ModelConfig:
    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise InputError(f"This is not a checkpoint of the official model: it has no {name}.")
        return tuple(state[name].shape)

    dim, channels = shape("neck.0.weight")[:2]
    return preset(
        "official",
        channels=channels,
        dim=dim,
        token_pool=official_name("prompt_encoder.pool.rows") in state,
        class_example_mixer=official_name("mixer.block.norm.weight") in state,
        spatial_convs=official_name("decoder.spatial_convs.0.weight") in state,
        two_way_ffn=shape("mask_decoder.transformer.layers.0.mlp.lin1.weight")[0],
        block_ffn=shape("prompt_encoder.sparse_embedding_attention.mlp.lin1.weight")[0],
        absent_pairs=absent_pairs,
    )


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    return name
