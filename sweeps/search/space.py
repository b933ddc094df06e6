"""What a search draws, and what it trains for it.

Learning rate, width and depth are relative to the preset's own, so that what is learned of them on one preset tells
something of the others.
"""

import shlex
from pathlib import Path

from la.model.label_anything import preset as model_preset
from pipelines.config import SearchConfig, TrainConfig, default_recipe, scaled_batches

LR_TIMES = (0.1, 10.0)
WEIGHT_DECAY = (1e-4, 0.3)
WIDTH_TIMES = (0.5, 1.0, 2.0)
DEPTH_MORE = (0, 1)
LOSSES = ("focal", "iou")
MIXTURES = ("mask+point+box", "mask+box", "mask+point", "mask")  # kinds of prompt that training episodes mix
VALIDATIONS = 6  # in a training: the first is ASHA's first rung, the third the second


def draw_settings(trial, presets: tuple[str, ...]) -> dict:
    """Draw a point of the space with an Optuna trial; returns it by the names under which Optuna keeps it."""
    return {
        "preset": trial.suggest_categorical("preset", presets),
        "lr_times": trial.suggest_float("lr_times", *LR_TIMES, log=True),
        "weight_decay": trial.suggest_float("weight_decay", *WEIGHT_DECAY, log=True),
        "width_times": trial.suggest_categorical("width_times", WIDTH_TIMES),
        "depth_more": trial.suggest_categorical("depth_more", DEPTH_MORE),
        "loss": trial.suggest_categorical("loss", LOSSES),
        "prompts": trial.suggest_categorical("prompts", MIXTURES),
    }


def own_settings(preset: str) -> dict:
    """The point of the space that is the preset as its recipe has it."""
    own = TrainConfig(workspace=Path(), preset=preset)
    return {
        "preset": preset,
        "lr_times": 1.0,
        "weight_decay": own.weight_decay,
        "width_times": 1.0,
        "depth_more": 0,
        "loss": own.loss,
        "prompts": "+".join(own.prompts),
    }


def train_config(config: SearchConfig, point: dict) -> TrainConfig:
    """The training of a point. Its numbers are rounded to what a command line can well say."""
    preset = point["preset"]
    own = TrainConfig(workspace=config.workspace, preset=preset)
    return TrainConfig(
        workspace=config.workspace,
        store=config.store,
        also=config.also,
        fold=config.fold,
        seed=config.seed,
        preset=preset,
        recipe=default_recipe(preset),
        dim=round(point["width_times"] * model_preset(preset).dim),
        depth=model_preset(preset).depth + point.get("depth_more", 0),  # not there in older searches
        lr=_rounded(point["lr_times"] * own.lr),
        weight_decay=_rounded(point["weight_decay"]),
        loss=point["loss"],
        prompts=tuple(point["prompts"].split("+")),
        batches=scaled_batches(own.recipe, config.batch_scale),
        steps=config.steps,
        val_every=first_rung(config),
        val_episodes=config.val_episodes,
        workers=config.workers,
        device=config.device,
        threads=config.threads,
    )


def first_rung(config: SearchConfig) -> int:
    """The step at which ASHA first compares, and the distance of validations."""
    return -(-config.steps // VALIDATIONS)


def train_command(train: TrainConfig, batch_scale: float) -> str:
    """The command line of a training. Where it ran already in its workspace, the command finds it finished."""
    options: dict[str, object] = {
        "--workspace": train.workspace,
        "--store": train.store,
        "--fold": train.fold,
        "--preset": train.preset,
        "--steps": train.steps,
        "--lr": train.lr,
        "--weight-decay": train.weight_decay,
        "--dim": train.dim,
        "--depth": train.depth,
        "--loss": train.loss,
        "--train-prompts": ",".join(train.prompts),
        "--val-every": train.val_every,
        "--val-episodes": train.val_episodes,
    }
    defaults = {"--batch-scale": (batch_scale, 1), "--seed": (train.seed, 0), "--workers": (train.workers, 0)}
    options |= {flag: value for flag, (value, default) in defaults.items() if value != default}
    words = [str(word) for pair in options.items() for word in pair]
    words += [word for path in train.also for word in ("--also", str(path))]
    return shlex.join(["python", "cli.py", "train", *words])


def _rounded(number: float) -> float:
    return float(f"{number:.3g}")
