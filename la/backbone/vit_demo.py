"""A small vision transformer for the demo, known to ``timm.create_model`` once this module is imported."""

from __future__ import annotations

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

default_cfgs = generate_default_cfgs(
    {
        # No url: the weights are trained by tools.demo_pretrain.pretrain and kept beside it.
        "vit_demo_patch8_128.scenes": {
            "url": "",
            "num_classes": 0,
            "input_size": (3, 128, 128),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
)


@register_model
def vit_demo_patch8_128(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """ViT of 5 blocks of width 128 with 8-pixel patches and a class token: 128-pixel images, no head.

    Takes (B, 3, 128, 128) images of mean and deviation 0.5; ``forward_features`` gives
    (B, 1 + 256, 128).  Keyword arguments are those of timm's ``VisionTransformer``.
    """
    arguments = {"patch_size": 8, "embed_dim": 128, "depth": 5, "num_heads": 4, "num_classes": 0}
    return build_model_with_cfg(
        VisionTransformer,
        "vit_demo_patch8_128",
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**arguments, **kwargs},
    )
