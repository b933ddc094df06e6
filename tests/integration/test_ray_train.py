"""Training on Ray Train workers, as the command line starts it."""

from pipelines.config import FeaturizeConfig, TrainConfig
from pipelines.demo.scenes import draw_scenes
from pipelines.featurize import featurize
from pipelines.training import train
from sweeps.demo import BACKBONE, IMAGE_SIZE, WEIGHTS


def test_two_ray_workers_train_report_and_finish(tmp_path):
    scenes = draw_scenes(tmp_path / "scenes", train_images=80, val_images=48)
    settings = {"backbone": BACKBONE, "weights": WEIGHTS, "image_size": IMAGE_SIZE}
    featurize(FeaturizeConfig(workspace=tmp_path, coco_dir=scenes, **settings))
    config = TrainConfig(
        workspace=tmp_path,
        preset="debug",
        workers=2,
        steps=12,
        warmup_steps=2,
        batches=((2, 1, 1), (2, 2, 1)),
        train_batches=12,
        val_episodes=3,
        val_every=6,
        threads=1,
    )
    reports = []
    result = train(config, reports.append)
    assert result.step == 12
    assert [r["step"] for r in reports] == [6, 10, 12], "one report a step, of rank 0"
    assert result.checkpoint.exists()
