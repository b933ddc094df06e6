"""Trains the checkpoint that comes with the product, `--checkpoint demo`: some minutes on one core.

A hybrid on the demo's drawn scenes, on the 60 seen classes of fold 0, as `demo` trains it; the other 20 classes stay
unseen, so that a scene of `demo` is a fair query.

    python -m tools.demo_pretrain.train_hybrid --out la/predictor/hybrid_demo.safetensors
"""

import argparse
import tempfile
from pathlib import Path

import torch

from la.predictor.checkpoint import BUNDLED_WEIGHTS, write_safetensors
from pipelines.config import FeaturizeConfig, TrainConfig
from pipelines.demo.scenes import draw_scenes
from pipelines.store.featurize import featurize
from pipelines.training.run import train
from pipelines.workspace import write_whole

BACKBONE, IMAGE_SIZE = "vit_demo_patch8_128", 128
STEPS, BATCHES = 600, ((4, 1, 1), (3, 1, 3), (3, 2, 1), (2, 4, 1))  # ways and shots of the recipe, half its episodes


def make(workspace: Path, out: Path) -> float:
    """Draw, featurize, train, write; returns mIoU in percent on seen classes. Killed, it goes on in `workspace`."""
    scenes = draw_scenes(workspace / "scenes", train_images=400, val_images=240)
    weights = BUNDLED_WEIGHTS[BACKBONE]
    featurize(
        FeaturizeConfig(workspace=workspace, coco_dir=scenes, backbone=BACKBONE, weights=weights, image_size=IMAGE_SIZE)
    )
    result = train(TrainConfig(workspace=workspace, preset="hybrid", steps=STEPS, batches=BATCHES, threads=1))
    saved = torch.load(result.checkpoint, map_location="cpu", weights_only=True)
    names = ("kind", "config", "fold", "store", "step", "features", "state")
    write_whole(out, lambda temporary: write_safetensors(temporary, {name: saved[name] for name in names}))
    return result.metrics["seen_miou"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workspace", type=Path, help="kept, to go on after a kill; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(f"mIoU on seen classes {make(arguments.workspace or Path(folder), arguments.out):.1f} %")
