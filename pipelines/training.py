"""Training: one loop read from top to bottom, run in this process or by Ray Train (paper sections 4.4 and 5.2)."""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from la.batch import EpisodeBatch
from la.device import autocast, pick_device
from la.hybrid import Hybrid, HybridConfig
from la.losses import focal_loss, iou_loss
from la.model import LabelAnything, ModelConfig, build, preset, save_state
from la.schedules import factor
from pipelines.batches import BatchBuilder
from pipelines.config import EvaluateConfig, TrainConfig
from pipelines.episodes import (
    EpisodeShards,
    Plan,
    ensure_episodes,
    evaluation_plan,
    pool_of,
    training_plan,
    training_plan_of_another,
)
from pipelines.evaluate import score
from pipelines.objects import fit_matching
from pipelines.predict_episodes import predictor
from pipelines.store import FeatureStore
from pipelines.workspace import Workspace, digest, locked, write_text, write_whole

Report = Callable[[dict], None]
REPORT_EVERY = 10  # steps
VALIDATION_SEED = 1000  # apart from the seeds of the test protocol


@dataclass(frozen=True)
class Worker:
    """Place of a process among those that train together, and how they act as one."""

    rank: int = 0
    world: int = 1
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    any: Callable[[bool], bool] = lambda flag: flag  # whether the flag is set on rank 0


@dataclass(frozen=True)
class TrainResult:
    """Where a finished run lies and how it ended."""

    run_dir: Path
    checkpoint: Path  # the best on seen classes
    step: int
    metrics: dict[str, float]


def train(config: TrainConfig, on_report: Report | None = None) -> TrainResult:
    """Train a model, or go on with it; returns at once where the run is finished.

    `on_report` gets step, loss, lr, episodes_per_s, seconds and now and then seen_miou. Raises InputError for an empty
    workspace, a fold outside 0-3 and too few images for the batches.
    """
    run_dir = run_dir_of(config)
    with locked(run_dir, wait=True):  # trials of two sweeps may need the same run: the second finds it finished
        _train_in(run_dir, config, on_report)
    result = json.loads((run_dir / "result.json").read_text())
    return TrainResult(run_dir, run_dir / "best.pt", result["step"], result["metrics"])


def _train_in(run_dir: Path, config: TrainConfig, on_report: Report | None) -> None:
    if not (run_dir / "result.json").exists():
        store = FeatureStore(Workspace(config.workspace).find_store(config.store))
        for plan, each in training_plans(config, store):
            ensure_episodes(plan, each)
        ensure_episodes(validation_plan(config), store)
        write_text(run_dir / "config.json", config.model_dump_json(indent=1))
        if config.workers:
            from pipelines.ray_train import fit

            fit(config, on_report)
        else:
            train_loop(config, Worker(), on_report or (lambda _: None))


def run_dir_of(config: TrainConfig) -> Path:
    return Workspace(config.workspace).runs / config.run_name


def steps_of_epochs(config: TrainConfig, epochs: float) -> int:
    """Steps that draw `epochs` x (training photos) episodes, as the paper counts an epoch."""
    store = FeatureStore(Workspace(config.workspace).find_store(config.store))
    per_step = max(1, config.workers) * sum(b for b, _, _ in config.batches) / len(config.batches)
    return max(1, round(epochs * len(store.image_ids("train")) / per_step))


def training_plans(config: TrainConfig, store: FeatureStore) -> list[tuple[Plan, FeatureStore]]:
    """The episodes to train on with the store of each: its own first, then those of the folders in `also`."""
    others = [FeatureStore(Workspace(path).find_store()) for path in config.also]
    return [(training_plan(config), store), *((training_plan_of_another(config, store, o), o) for o in others)]


def digest_of(shards: list[EpisodeShards]) -> str:
    """Of the episodes of one source its own digest, of several a digest of theirs."""
    return shards[0].digest if len(shards) == 1 else digest([each.digest for each in shards])


SWITCHES = (
    "token_pool",
    "class_example_mixer",
    "spatial_convs",
    "match_prototypes",
    "match_affinity",
    "object_metric",
    "objectness",
    "drop_maps",
    "dim",
)


def model_config(config: TrainConfig, channels: int) -> ModelConfig | HybridConfig:
    """Raises InputError for a switch of a part that the preset has not."""
    own = preset(config.preset)
    settings = {name: getattr(config, name) for name in SWITCHES}
    # what is not given, or given as it is anyway, says nothing: a preset need not know it
    given = {k: v for k, v in settings.items() if v is not None and (v is not True or hasattr(own, k))}
    return preset(config.preset, channels=channels, **given)


def validation_plan(config: TrainConfig) -> Plan:
    """1-way 1-shot episodes of seen classes on val images: what checkpoints are chosen by."""
    settings = EvaluateConfig(
        workspace=config.workspace, fold=config.fold, classes="seen", split="val", episodes=config.val_episodes
    )
    return evaluation_plan(settings, VALIDATION_SEED + config.seed, config.fold_lists)


def train_loop(config: TrainConfig, worker: Worker, on_report: Report) -> None:
    """The loop of every worker. Goes on from `last.pt` where there is one; rank 0 validates, saves and reports."""
    if config.threads:
        torch.set_num_threads(config.threads)
    run_dir = run_dir_of(config)
    store = FeatureStore(Workspace(config.workspace).find_store(config.store))
    plans = training_plans(config, store)
    shards = [ensure_episodes(plan, each) for plan, each in plans]
    validation = ensure_episodes(validation_plan(config), store)
    shape = model_config(config, store.info.channels)
    builders = [BatchBuilder(each, "train", shape.mask_px) for _, each in plans]
    val_builder = BatchBuilder(store, "val", shape.mask_px)
    device = pick_device(config.device)

    torch.manual_seed(config.seed)
    plain = build(shape).to(device)
    if isinstance(plain, Hybrid) and not (run_dir / "last.pt").exists():
        fit_matching(plain.matching, [(pool_of(*of), builder) for of, builder in zip(plans, builders, strict=True)])
    optimiser = torch.optim.AdamW(plain.parameters(), config.lr, (0.9, 0.999), weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: factor(config.schedule, step, config.warmup_steps, config.steps)
    )
    # Single steps on few episodes swing the balance of background and classes; what counts is the moving average.
    average = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    at = {"step": 0, "seconds": 0.0, "best": -1.0, "curve": []}  # the position, saved with every checkpoint
    if (run_dir / "last.pt").exists():
        saved = torch.load(run_dir / "last.pt", map_location=device, weights_only=True)
        plain.load_state_dict(saved["training"])
        average.load_state_dict(saved["average"])
        optimiser.load_state_dict(saved["optimiser"])
        schedule.load_state_dict(saved["schedule"])
        at = saved["at"]
    model = worker.wrap(torch.compile(plain) if config.compile else plain)

    losses: list[Tensor] = []
    since = time.perf_counter()
    started = since - at["seconds"]
    episodes = 0
    done = at["step"] >= config.steps
    batches = read_ahead(config, list(zip(shards, builders, strict=True)), worker, at["step"])
    while not done:
        batch, truth = next(batches)
        batch, truth = batch.to(device), truth.to(device, non_blocking=True)
        if config.flips and at["step"] % 2:
            batch, truth = replace(batch, query=batch.query.flip(2)), truth.flip(-1)
        # by an episode's place in the step, over all ranks: the number of workers changes nothing
        first = worker.rank * len(truth)
        seeds = [_number(config.seed, at["step"], first + b) for b in range(len(truth))]
        with autocast(device):
            logits = model(batch, seeds)
        if config.loss == "iou":
            loss = iou_loss(logits, truth, batch.slots)
        else:
            loss = focal_loss(logits, truth, config.gamma, config.class_weights)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        average.update_parameters(plain)

        at["step"] += 1
        at["seconds"] = time.perf_counter() - started
        losses.append(loss.detach())
        episodes += len(truth) * worker.world
        done = at["step"] == config.steps
        saving = done or at["step"] % config.checkpoint_every == 0
        if saving and config.minutes is not None:
            done = worker.any(done or at["seconds"] > 60 * config.minutes)
        validating = done or at["step"] % config.val_every == 0
        if worker.rank != 0:
            continue
        if validating or at["step"] % REPORT_EVERY == 0:
            metrics = {
                "step": at["step"],
                "loss": torch.stack(losses).mean().item(),
                "lr": schedule.get_last_lr()[0],
                "episodes_per_s": episodes / (time.perf_counter() - since),
                "seconds": at["seconds"],
            }
            if validating:
                predict = predictor(average.module, val_builder, device)
                metrics["seen_miou"] = score(predict, validation, val_builder, device).miou()
                if metrics["seen_miou"] > at["best"]:
                    at["best"] = metrics["seen_miou"]
                    save(run_dir / "best.pt", checkpoint(average.module, config, store, at["step"]))
            at["curve"].append(metrics)
            on_report(metrics)
            losses, episodes, since = [], 0, time.perf_counter()
        if saving:
            write_text(run_dir / "curve.jsonl", "".join(json.dumps(point) + "\n" for point in at["curve"]))
            training = {"training": plain.state_dict(), "average": average.state_dict(), "at": at}
            training |= {"optimiser": optimiser.state_dict(), "schedule": schedule.state_dict()}
            save(run_dir / "last.pt", checkpoint(average.module, config, store, at["step"]) | training)
    if worker.rank == 0:
        metrics = {"seen_miou": at["best"], "train_seconds": at["seconds"]}
        result = {"step": at["step"], "metrics": metrics, "episodes_digest": digest_of(shards)}
        write_text(run_dir / "result.json", json.dumps(result))


def read_ahead(
    config: TrainConfig, sources: list[tuple[EpisodeShards, BatchBuilder]], worker: Worker, step: int
) -> Iterator[tuple[EpisodeBatch, Tensor]]:
    """(batch, truth) of every step from `step` on, made by a thread while the step before runs.

    Step s takes one source and one (B, N, K) for all workers; batch i of the step goes to rank i. Each source and
    tuple has its own sequence of batches, so shapes are equal on all ranks whatever their number.
    """
    taken: Counter[tuple[int, int]] = Counter()
    pinned = pick_device(config.device).type == "cuda"

    def kind_of(step: int) -> tuple[int, int]:
        """(source, group) of a step."""
        return _number(config.seed, step, "source") % len(sources), _number(config.seed, step) % len(config.batches)

    def load(source: int, group: int, position: int) -> tuple[EpisodeBatch, Tensor]:
        shards, builder = sources[source]
        drawn = shards.batch(group, position)
        batch, truth = builder.pack(drawn), builder.truth(drawn)
        return (batch.pin_memory(), truth.pin_memory()) if pinned else (batch, truth)

    taken.update(kind_of(past) for past in range(step))
    with ThreadPoolExecutor(1) as executor:
        ahead = []
        while True:
            while len(ahead) < 2:
                kind = kind_of(step)
                ahead.append(executor.submit(load, *kind, taken[kind] * worker.world + worker.rank))
                taken[kind] += 1
                step += 1
            yield ahead.pop(0).result()


def checkpoint(model: LabelAnything | Hybrid, config: TrainConfig, store: FeatureStore, step: int) -> dict:
    """What evaluation and prediction need: the model, the fold it has not seen, the features it was trained on."""
    made_by = store.info.settings.model_dump(include={"backbone", "weights", "image_size", "preprocessing", "layer"})
    features = made_by | {"weights_digest": store.info.weights_digest, "grid": list(store.info.grid)}
    origin = {"fold": config.fold, "store": store.key, "step": step, "train_config": config.model_dump_json()}
    return save_state(model) | origin | {"features": features}


def save(path: Path, content: dict) -> None:
    """Write a checkpoint of plain tensors and numbers; the old one stays until the new one is complete."""
    write_whole(path, lambda temporary: torch.save(content, temporary))


def _number(*parts: int | str) -> int:
    """A number below 2**53 that is a pure function of `parts`."""
    return int(random.Random("/".join(map(str, parts))).random() * 2**53)
