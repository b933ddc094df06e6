"""A search whose trainings are pretended: for the tests, and as a script for those that kill its process.

    python tests/fake_search.py WORKSPACE ROUND

In round 1, the trainings of trial 3 on do not end.
"""

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from fake_sweep import fake_store

from pipelines.config import SearchConfig, SettingSpace, TrainConfig
from pipelines.runs.identity import run_dir_of, run_name
from sweeps.study import find_study

STEPS, TRIALS = 60, 6
TRAINING = ("also", "batch_scale", "workers")


def fake_config(workspace: Path, **changes: object) -> SearchConfig:
    fake_store(workspace)
    study, train = find_study("search"), {name: changes.pop(name) for name in TRAINING if name in changes}
    space = dict(study.space)
    if "presets" in changes:
        space["preset"] = SettingSpace(values=changes.pop("presets"))
    how = {"steps": STEPS, "trials": TRIALS, "space": space, "train": train}
    return SearchConfig(workspace=workspace, **(how | changes))


def quality(config: TrainConfig) -> float:
    """What a training ends at: best at a learning rate of 1e-3 and with all kinds of prompt."""
    return 40 - 10 * abs(math.log10(config.lr / 1e-3)) + len(config.prompts)


def fake_train(config: TrainConfig, on_report) -> SimpleNamespace:
    """Reports like the real one, without a model: half of its end is reached from the start."""
    for step in range(config.val_every, config.steps + 1, config.val_every):
        seen = quality(config) * (0.5 + 0.5 * step / config.steps)
        on_report({"step": step, "loss": 1 / step, "lr": config.lr, "episodes_per_s": 5.0, "seen_miou": seen})
    run_dir = run_dir_of(config)
    metrics = {"seen_miou": quality(config), "train_seconds": 1.0}
    return SimpleNamespace(
        run_dir=run_dir, checkpoint=run_dir / "best.pt", step=config.steps, metrics=metrics, code=None
    )


def main(workspace: Path, round_: int) -> None:
    from rich.console import Console

    from sweeps.search.search_run import run_search

    calls = workspace / "calls.log"

    def train(config, on_report):
        if "mlflow" in sys.modules:
            raise RuntimeError("a worker has no need of MLflow")
        with open(calls, "a") as log:
            log.write(f"{round_} {run_name(config)}\n")
        while round_ == 1 and len(calls.read_text().splitlines()) > 3:
            time.sleep(0.1)
        return fake_train(config, on_report)

    result = run_search(fake_config(workspace, concurrent=1), Console(width=120), train)
    print(result.tables[0].text())
    outcome = {"results": sorted(result.results), "failed": result.failed, "best": result.ranked[0]}
    settings = {name: job.train.model_dump(mode="json") for name, job in result.jobs.items()}
    (workspace / f"outcome{round_}.json").write_text(json.dumps(outcome | {"settings": settings}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
