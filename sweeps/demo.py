"""The whole line on scenes drawn on the spot: featurize, episodes, the ablation sweep, tables and pictures."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from la.predictor.checkpoint import BUNDLED_WEIGHTS
from pipelines.config import EvaluateConfig, FeaturizeConfig, SweepConfig, TrainConfig
from pipelines.demo.scenes import draw_scenes
from pipelines.episodes.episode_shards import ensure_episodes, training_plan
from pipelines.evaluation.figures import draw_first_episodes
from pipelines.store.featurize import featurize
from pipelines.store.reader import FeatureStore
from pipelines.workspace import Workspace
from sweeps.results import SweepResult
from sweeps.runner import run_sweep
from sweeps.study import find_study

BACKBONE, IMAGE_SIZE = "vit_demo_patch8_128", 128
WEIGHTS = BUNDLED_WEIGHTS[BACKBONE]


@dataclass(frozen=True)
class DemoSize:
    """How much the demo does."""

    train_images: int = 400
    val_images: int = 240
    dim: int = 128  # D of the heads, half of the paper's
    steps: int = 1500
    batches: tuple[tuple[int, int, int], ...] = ((2, 2, 2), (4, 1, 2), (8, 1, 1))
    train_batches: int = 1500
    lr: float = 1e-3
    val_episodes: int = 50
    seeds: int = 3
    episodes: int = 200

    @property
    def train(self) -> dict:
        """Settings of every training."""
        names = ("steps", "train_batches", "val_episodes")
        return {name: getattr(self, name) for name in names} | {"warmup_steps": 50, "val_every": 250}

    @property
    def of_la(self) -> dict:
        """Settings of LA's trainings; the hybrid has its own."""
        return {name: getattr(self, name) for name in ("dim", "batches", "lr")}


SMALLEST = DemoSize(80, 48, 32, 20, ((2, 1, 1), (2, 2, 1)), 20, 1e-3, 5, 1, 5)  # for tests of the line, not its result


def run_demo(root: Path, console: Console, size: DemoSize | None = None) -> tuple[SweepResult, list[Path]]:
    """Run what is missing of every stage in `root`; returns the sweep and, if its model was trained, the pictures."""
    size = size or DemoSize()
    workspace = Workspace(root)
    say = console.rule
    say("1. draw scenes: 80 classes, 10 shapes x 8 textures")
    scenes = draw_scenes(workspace.root / "scenes", train_images=size.train_images, val_images=size.val_images)
    say("2. featurize: a frozen ViT sees every scene once")
    made = featurize(
        FeaturizeConfig(
            workspace=workspace.root, coco_dir=scenes, backbone=BACKBONE, weights=WEIGHTS, image_size=IMAGE_SIZE
        ),
        console,
    )
    say("3. episodes: fold 0, 20 classes stay unseen")
    store = FeatureStore(made.store)
    train = TrainConfig(workspace=workspace.root, store=store.key, **size.train, **size.of_la)
    shards = ensure_episodes(training_plan(train), store)
    console.print(f"{shards.manifest['episodes']} training episodes of {len(shards.manifest['classes_drawn'])} classes")
    say("4. sweep: four variants of the heads, the hybrid and the training-free prototype, in parallel on Ray")
    sweep = SweepConfig(
        workspace=workspace.root,
        store=store.key,
        variants=("complete", "no_spatial_convs", "no_mixer", "no_token_pool", "hybrid", "prototype"),
        seeds=size.seeds,
        episodes=size.episodes,
    )
    study = find_study("ablations")
    variants = tuple(
        v if v.settings.get("preset") == "hybrid" else v.model_copy(update={"defaults": size.of_la})
        for v in study.variants
    )
    study = study.model_copy(update={"train": size.train, "variants": variants})
    result = run_sweep(sweep, console, command=f"python cli.py demo --workspace {workspace.root}", study=study)
    if "complete/fold0" not in result.results:
        return result, []
    la = EvaluateConfig(
        workspace=workspace.root,
        store=store.key,
        checkpoint=result.results["complete/fold0"].checkpoint,
        episodes=size.episodes,
    )
    tasks = ({"prompt": "mask"}, {"prompt": "box"}, {"prompt": "point"}, {"ways": 2, "prompt": "point_box"})
    mixed = {"ways": 2, "shots": 2, "prompt": "mixed", "supports": "varied"}
    pictures = [
        draw_first_episodes(
            workspace.artifacts / name, [(la.model_copy(update=task), seed) for seed, task in enumerate(drawn)]
        )
        for name, drawn in (("demo-episodes.png", tasks), ("demo-mixed-prompts.png", [mixed] * 3))
    ]
    return result, pictures
