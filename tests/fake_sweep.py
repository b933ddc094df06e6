"""A sweep whose training and evaluation are pretended: for the tests, and as a script for those that kill its process.

    python tests/fake_sweep.py WORKSPACE ROUND

In round 1, the process of `no_spatial_convs` dies and the two after it never end; in round 2, `no_token_pool` fails.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from pipelines.config import EvaluateConfig, SweepConfig, TrainConfig
from pipelines.runs.identity import run_dir_of
from pipelines.store.reader import StoreInfo, StoreSettings
from pipelines.workspace import Workspace

STEPS = 30


def fake_store(workspace: Path) -> str:
    """A feature store without features; returns its key."""
    settings = StoreSettings(
        annotations={}, backbone="vit_fake", weights="none", image_size=480, preprocessing={}, layer="last"
    )
    info = StoreInfo(
        key=settings.key,
        settings=settings,
        weights_digest="0",
        patch_size=16,
        channels=8,
        grid=(30, 30),
        splits={},
        shards={},
        coco_dir="nowhere",
        software={},
    )
    folder = Workspace(workspace).features / info.key
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "store.json").write_text(info.model_dump_json())
    return info.key


def fake_config(workspace: Path, **changes: object) -> SweepConfig:
    fake_store(workspace)
    table5 = ("complete", "no_spatial_convs", "no_mixer", "no_token_pool", "prototype")
    settings = {"variants": table5, "train": {"steps": STEPS}, "seeds": 2, "episodes": 4}
    return SweepConfig(workspace=workspace, **(settings | changes))


def fake_train(config: TrainConfig, on_report) -> SimpleNamespace:
    """Reports and writes a curve like the real one, without a model."""
    run_dir = run_dir_of(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    curve = [{"step": s, "loss": 1 / s, "lr": 1e-4, "episodes_per_s": 5.0} for s in range(10, config.steps + 1, 10)]
    curve[-1]["seen_miou"] = 20.0
    for point in curve:
        on_report(point)
    (run_dir / "curve.jsonl").write_text("".join(json.dumps(point) + "\n" for point in curve))
    metrics = {"seen_miou": 21.0, "train_seconds": 1.0}
    return SimpleNamespace(
        run_dir=run_dir, checkpoint=run_dir / "best.pt", step=config.steps, metrics=metrics, code=None
    )


def fake_evaluate(config: EvaluateConfig, on_progress) -> SimpleNamespace:
    on_progress(1, config.seeds * config.episodes)
    miou = 30.0 - 5 * config.ways + config.fold
    return SimpleNamespace(
        miou=miou,
        std=0.5,
        interval=(miou - 1, miou + 1),
        fb_iou=60.0,
        method="paper@10",
        resampled=tuple(np.linspace(miou - 1, miou + 1, 5)),
        per_seed=[miou - 0.5, miou + 0.5],
        per_class={"cat": miou, "dog": 0.0},
        episodes_digest=f"{config.fold}-{config.ways}-{config.shots}-{config.prompt}",
        classes_drawn=2,
    )


def main(workspace: Path, round_: int) -> None:
    from sweeps.paper_tables import tables_of
    from sweeps.runner import run_sweep
    from sweeps.trial import run_trial

    calls = workspace / "calls.log"

    def trial(job, report):
        name = job.variant.name

        def noted(what, work):
            def call(config, on_report):
                with open(calls, "a") as log:
                    log.write(f"{round_} {what} {name}\n")
                return work(config, on_report)

            return call

        def train(config, on_report):
            if "mlflow" in sys.modules:
                raise RuntimeError("a worker has no need of MLflow")
            if (round_, name) == (1, "no_spatial_convs"):
                os.kill(os.getpid(), signal.SIGKILL)
            if (round_, name) == (2, "no_token_pool"):
                raise ValueError(f"{name} broke [on purpose]")
            result = fake_train(config, on_report)
            while round_ == 1 and name in ("no_mixer", "no_token_pool"):
                time.sleep(0.1)
            return result

        return run_trial(job, report, noted("train", train), noted("evaluate", fake_evaluate))

    from rich.console import Console

    result = run_sweep(fake_config(workspace), Console(width=120), trial)
    for table in tables_of(result):
        print(table.text())
    outcome = {"finished": sorted(result.results), "failed": result.failed, "interrupted": result.interrupted}
    (workspace / "outcome.json").write_text(json.dumps(outcome | {"folder": str(result.folder)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
