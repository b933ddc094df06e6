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

from la.data.folds import fold_classes
from la.device import autocast, pick_device
from la.episodes.batch import EpisodeBatch
from la.errors import InputError
from la.evaluation.losses import focal_loss, iou_loss
from la.model.hybrid import Hybrid, HybridConfig
from la.model.label_anything import LabelAnything, ModelConfig, build, preset, save_state
from la.schedules import factor
from pipelines.config import EvaluateConfig, TrainConfig
from pipelines.episodes.batches import BatchBuilder
from pipelines.episodes.episode_shards import (
    EpisodeShards,
    Plan,
    ensure_episodes,
    evaluation_plan,
    pool_of,
    training_plan,
    training_plan_of_another,
)
from pipelines.evaluation.evaluate import score
from pipelines.evaluation.shared_work import predictor
from pipelines.runs.checkpoints import BEST, full_disk_told, load_last, mend, save, save_last
from pipelines.store.reader import FeatureStore
from pipelines.training.fit_matching import fit_matching
from pipelines.training.stop import Stopped, notice
from pipelines.workspace import Workspace, digest, locked, write_text

Report = Callable[[dict], None]
REPORT_EVERY = 10  # steps
VALIDATION_SEED = 1000  # apart from the seeds of the test protocol


@dataclass(frozen=True)
class Worker:
    """Place of a process among those that train together, and how they act as one."""

    rank: int = 0
    world: int = 1
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    of_first: Callable[[int], int] = lambda value: value  # the value that rank 0 has
    told: Callable[[], bool] = lambda: False  # whether rank 0 has notice to stop
    # the same for all ranks: asked when a step begins, so that the answer travels meanwhile, and taken when it ends
    ask: Callable[[Callable[[], bool]], Callable[[], bool]] = lambda told: told


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
    workspace, a fold outside 0-3, too few images for the batches and a full disk. SIGTERM, SIGUSR1 and Ctrl-C to this
    process end the run after the step under way with a checkpoint, and raise Stopped.
    """
    store = FeatureStore(Workspace(config.workspace).find_store(config.store))
    model_config(config, store.info.channels)  # mistakes are told before a folder is made
    fold_classes(store.dataset("train").categories, config.fold, config.fold_lists)
    run_dir = run_dir_of(config)
    with locked(run_dir, wait=True), full_disk_told(run_dir):
        # two sweeps may need the same run: the second waits and finds it finished
        _train_in(run_dir, config, store, on_report)
    result = json.loads((run_dir / "result.json").read_text())
    return TrainResult(run_dir, run_dir / BEST, result["step"], result["metrics"])


def _train_in(run_dir: Path, config: TrainConfig, store: FeatureStore, on_report: Report | None) -> None:
    mend(run_dir)
    _same_store(run_dir, store.key)
    if not (run_dir / "result.json").exists():
        for plan, each in training_plans(config, store):
            ensure_episodes(plan, each)
        ensure_episodes(validation_plan(config), store)
        write_text(run_dir / "config.json", config.model_dump_json(indent=1))
        if config.workers:
            from pipelines.training.train_on_ray import fit

            signum = fit(config, on_report)
        else:
            with notice() as told:
                train_loop(config, Worker(told=told.came), on_report or (lambda _: None))
            signum = told.signum
        if signum and not (run_dir / "result.json").exists():
            raise Stopped(signum, run_dir)


def _same_store(run_dir: Path, key: str) -> None:
    """Without --store, the only store of a workspace is another one once that of before was removed."""
    saved = load_last(run_dir)
    if saved and saved["store"] != key:
        raise InputError(
            f"{run_dir} was trained on the store {saved['store']}, and the workspace has {key} now. Pass --store {key} "
            f"for a run of its own, or remove {run_dir}."
        )


def run_dir_of(config: TrainConfig) -> Path:
    return Workspace(config.workspace).runs / config.run_name


def steps_of_epochs(config: TrainConfig, epochs: float) -> int:
    """Steps that draw `epochs` x (training photos) episodes, as the paper counts an epoch."""
    store = FeatureStore(Workspace(config.workspace).find_store(config.store))
    if not 0 < epochs < float("inf"):
        raise InputError(f"--epochs is {epochs:g}; expected a number above 0, such as 50.")
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
    "depth",
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
    """The loop of every worker. Goes on from the last checkpoint; rank 0 validates, saves and reports.

    Without `result.json` at its end, it stopped on notice.
    """
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
    saved = load_last(run_dir)  # on the CPU, where AdamW wants its step counts; the rest goes where the weights are
    if isinstance(plain, Hybrid) and saved is None:
        fit_matching(plain.matching, [(pool_of(*of), builder) for of, builder in zip(plans, builders, strict=True)])
    optimiser = torch.optim.AdamW(plain.parameters(), config.lr, (0.9, 0.999), weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: factor(config.schedule, step, config.warmup_steps, config.steps)
    )
    # Single steps on few episodes swing the balance of background and classes; what counts is the moving average.
    average = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    # The position. `losses`: of the steps since the last report; `pending`: the validation that notice cut short
    at = {"step": 0, "seconds": 0.0, "best": -1.0, "curve": [], "losses": [], "pending": False, "starts": []}
    best: dict | None = None
    if saved:
        plain.load_state_dict(saved["training"])
        average.load_state_dict(saved["average"])
        optimiser.load_state_dict(saved["optimiser"])
        schedule.load_state_dict(saved["schedule"])
        torch.set_rng_state(saved.get("rng", torch.get_rng_state()))  # older checkpoints have fewer parts
        at |= saved["at"]
        best = saved.get("best")
    if (first := worker.of_first(at["step"])) != at["step"]:  # shared storage may show nodes older files for a while
        raise RuntimeError(f"{run_dir}: rank 0 goes on from step {first}, rank {worker.rank} from {at['step']}")
    at["starts"].append(at["step"])
    model = worker.wrap(torch.compile(plain) if config.compile else plain)

    losses: list[Tensor] = list(torch.tensor(at["losses"], device=device))
    since = time.perf_counter()
    started = since - at["seconds"]
    episodes = 0
    pending = at["pending"]
    done = at["step"] >= config.steps and not pending
    batches = read_ahead(config, list(zip(shards, builders, strict=True)), worker, at["step"])
    while not done:
        has_notice = worker.ask(worker.told)
        if not pending:
            places, batch, truth = next(batches)
            batch, truth = batch.to(device), truth.to(device, non_blocking=True)
            if config.flips and at["step"] % 2:
                batch, truth = replace(batch, query=batch.query.flip(2)), truth.flip(-1)
            # by an episode's place in the step, over all ranks: the number of workers changes nothing
            seeds = [_number(config.seed, at["step"], place) for place in places]
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
        if (saving or pending) and config.minutes is not None:
            done = bool(worker.of_first(done or at["seconds"] > 60 * config.minutes))
        validating = done or pending or at["step"] % config.val_every == 0
        pending = False
        if worker.rank == 0 and (validating or at["step"] % REPORT_EVERY == 0):
            metrics = {
                "step": at["step"],
                "loss": torch.stack(losses).mean().item(),
                "lr": schedule.get_last_lr()[0],
                "episodes_per_s": episodes / (time.perf_counter() - since),
                "seconds": at["seconds"],
            }
            try:
                if validating:
                    metrics["seen_miou"] = validate(average.module, validation, val_builder, device, worker.told)
                    if metrics["seen_miou"] > at["best"]:
                        at["best"] = metrics["seen_miou"]
                        best = checkpoint(average.module, config, store, at["step"])
                        save(run_dir / BEST, best)
                at["curve"].append(metrics)
                on_report(metrics)
                losses, episodes, since = [], 0, time.perf_counter()
            except CutShort:
                pending = True
        stopping = has_notice()
        if validating:  # which takes long, and which notice cuts short on rank 0
            stopping = bool(worker.of_first(stopping or worker.told()))
        if worker.rank == 0 and (saving or stopping):
            write_text(run_dir / "curve.jsonl", "".join(json.dumps(point) + "\n" for point in at["curve"]))
            at |= {"losses": [loss.item() for loss in losses], "pending": pending}
            training = {"training": plain.state_dict(), "average": average.state_dict(), "at": at, "best": best}
            training |= {"optimiser": optimiser.state_dict(), "schedule": schedule.state_dict()}
            training |= {"rng": torch.get_rng_state()}
            save_last(run_dir, checkpoint(average.module, config, store, at["step"]) | training)
        if stopping and (pending or not done):
            return
    if worker.rank == 0:
        metrics = {"seen_miou": at["best"], "train_seconds": at["seconds"]}
        result = {"step": at["step"], "metrics": metrics, "episodes_digest": digest_of(shards), "starts": at["starts"]}
        write_text(run_dir / "result.json", json.dumps(result))


class CutShort(Exception):
    """Notice came while a validation was under way."""


def validate(
    model: LabelAnything | Hybrid,
    episodes: EpisodeShards,
    builder: BatchBuilder,
    device: torch.device,
    told: Callable[[], bool],
) -> float:
    """mIoU on seen classes in percent. Raises CutShort: it may take longer than notice leaves for a checkpoint."""

    def look_up(_: int) -> None:
        if told():
            raise CutShort

    return score(predictor(model, builder, device), episodes, builder, device, on_progress=look_up).miou()


def read_ahead(
    config: TrainConfig, sources: list[tuple[EpisodeShards, BatchBuilder]], worker: Worker, step: int
) -> Iterator[tuple[list[int], EpisodeBatch, Tensor]]:
    """(places in the step, batch, truth) of every step from `step` on, made by a thread while the step before runs.

    Step s takes one source and one (B, N, K) for all workers, and as many batches as there are workers, whose episodes
    are shared out. Each source and tuple has its own sequence of batches, so shapes are equal on all ranks whatever
    their number.
    """
    taken: Counter[tuple[int, int]] = Counter()
    pinned = pick_device(config.device).type == "cuda"

    def kind_of(step: int) -> tuple[int, int]:
        """(source, group) of a step."""
        return _number(config.seed, step, "source") % len(sources), _number(config.seed, step) % len(config.batches)

    def load(source: int, group: int, position: int) -> tuple[list[int], EpisodeBatch, Tensor]:
        shards, builder = sources[source]
        places, drawn = shards.share(group, position, worker.rank, worker.world)
        batch, truth = builder.pack(drawn), builder.truth(drawn)
        return (places, batch.pin_memory(), truth.pin_memory()) if pinned else (places, batch, truth)

    taken.update(kind_of(past) for past in range(step))
    with ThreadPoolExecutor(1) as executor:
        ahead = []
        while True:
            while len(ahead) < 2:
                kind = kind_of(step)
                ahead.append(executor.submit(load, *kind, taken[kind]))
                taken[kind] += 1
                step += 1
            yield ahead.pop(0).result()


def checkpoint(model: LabelAnything | Hybrid, config: TrainConfig, store: FeatureStore, step: int) -> dict:
    """What evaluation and prediction need: the model, the fold it has not seen, the features it was trained on."""
    made_by = store.info.settings.model_dump(include={"backbone", "weights", "image_size", "preprocessing", "layer"})
    features = made_by | {"weights_digest": store.info.weights_digest, "grid": list(store.info.grid)}
    origin = {"fold": config.fold, "store": store.key, "step": step, "train_config": config.model_dump_json()}
    return save_state(model) | origin | {"features": features}


def _number(*parts: int | str) -> int:
    """A number below 2**53 that is a pure function of `parts`."""
    return int(random.Random("/".join(map(str, parts))).random() * 2**53)
