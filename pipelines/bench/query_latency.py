"""Latency of one query against classes that are known already: the heads against the backbone, on the CPU."""

import numpy as np
import timm
import torch

from la.backbone.vit import Backbone
from la.errors import InputError
from la.model.label_anything import build, preset
from la.predictor.checkpoint import Checkpoint
from la.predictor.predictor import Predictor, masks_and_scores
from la.predictor.user_prompts import Box
from pipelines.bench.ratios import BenchResult, in_turn

BAR = 0.25  # of the backbone's time
HEIGHT, WIDTH = 480, 640  # pixels of the photo


def bench_predict(
    names: tuple[str, ...] = ("paper", "official", "hybrid"),
    backbone: str = "vit_small_patch14_dinov2",
    image_size: int = 420,
    ways: int = 1,
    shots: int = 1,
    repeats: int = 5,
) -> list[BenchResult]:
    """One result a preset. Weights are random, which no time depends on; heads go as far as the mask of the photo.

    Raises InputError for an unknown preset or backbone.
    """
    torch.manual_seed(0)
    if not timm.is_model(backbone):
        raise InputError(f"--backbone {backbone} is not a model that timm knows.")
    vit = Backbone(backbone, timm.create_model(backbone, num_classes=0, img_size=image_size), image_size)
    photos = [np.random.default_rng(k).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8) for k in range(ways * shots + 1)]
    boxes = [{f"class {k % ways}": Box(100, 100, 400, 300)} for k in range(ways * shots)]
    return [_latency(name, vit, photos, boxes, repeats) for name in names]


def _latency(name: str, vit: Backbone, photos: list[np.ndarray], boxes: list[dict], repeats: int) -> BenchResult:
    model = build(preset(name, channels=vit.channels)).eval().requires_grad_(False)
    predictor = Predictor(Checkpoint(model, None, name, "random"), vit, torch.device("cpu"))
    learned = predictor.learn(predictor.read_supports(photos[1:], boxes))
    squashed = torch.zeros(1, 3, vit.image_size, vit.image_size, dtype=torch.uint8)
    features = predictor.encode(photos[:1])

    def heads(_: int) -> None:
        masks_and_scores(learned.logits(features)[0], (HEIGHT, WIDTH))

    def backbone(_: int) -> None:
        vit.encode(squashed)

    ours, theirs = in_turn(heads, backbone, turns=range(repeats))
    name = f"predict: the {name} heads against the backbone, {len(learned.classes)} ways, {len(boxes)} supports"
    details = {"heads ms": 1e3 * min(ours), "backbone ms": 1e3 * min(theirs), "threads": torch.get_num_threads()}
    # the least disturbed: work of some milliseconds is stretched by any other process
    return BenchResult(name, min(ours) / min(theirs), BAR, "at most", details)
