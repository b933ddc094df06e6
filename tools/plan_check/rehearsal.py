"""The plan's arithmetic held against real runs: a small one made here and now, or one that a workspace recorded."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from unittest import mock

from la.data.coco import find_splits, load_coco
from la.errors import InputError
from pipelines.bench.cost import Rates, bytes_per_image, job_of, store_bytes
from pipelines.bench.rates import made_up_store, measure_featurizing, measure_training, photos_drawn
from pipelines.config import EvaluateConfig, FeaturizeConfig, TrainConfig
from pipelines.episodes.episode_shards import ensure_episodes, evaluation_plan, training_plan
from pipelines.evaluation.evaluate import evaluate, tasks_of
from pipelines.remote_path import PathOrUri
from pipelines.store.featurize import featurize
from pipelines.store.reader import FeatureStore
from pipelines.training.run import train
from pipelines.workspace import Workspace

EPISODES = 100  # evaluated in a rehearsal
Clock = Callable[[], float]  # seconds: time.perf_counter, or time.process_time, which other processes do not disturb


@dataclass(frozen=True)
class Compared:
    """One number as the plan has it and as it was."""

    name: str
    predicted: float
    measured: float
    unit: str

    @property
    def error(self) -> float:
        """In percent of what was measured; positive where the plan says too much."""
        return 100 * (self.predicted / self.measured - 1)


def rehearse(
    featurizing: FeaturizeConfig,
    training: TrainConfig,
    photos: int,
    clock: Clock = time.perf_counter,
    say: Callable[[str], None] = lambda _: None,
) -> list[Compared]:
    """Featurize some photos, train and evaluate on them, with the plan's rates measured right before and after each.

    `say` hears what comes next. The workspaces of both settings do not matter: all happens in a temporary folder. Load
    of other processes changes from minute to minute, so the rates before and after count half each; the jobs and the
    rates are timed by `clock`, and `time.process_time` leaves that load out. Raises InputError as the jobs do.
    """
    with tempfile.TemporaryDirectory(prefix="la-plan-") as name, mock.patch("time.perf_counter", clock):
        folder = Path(name)
        some = some_photos(featurizing.coco_dir, folder / "photos", photos)
        featurizing = featurizing.model_copy(update={"coco_dir": some, "workspace": folder / "real"})
        training = training.model_copy(
            update={"workspace": folder / "real", "train_batches": training.steps, "workers": 0}
        )
        compared, store = _rehearse_featurizing(featurizing, folder, say)
        return [*compared, *_rehearse_training(training, store, folder, say)]


def _rehearse_featurizing(
    config: FeaturizeConfig, folder: Path, say: Callable[[str], None]
) -> tuple[list[Compared], FeatureStore]:
    def probed(turn: str) -> float:
        say(f"featurize: rate {turn} the run")
        how = {"device": config.device, "threads": config.threads}
        return measure_featurizing(folder / f"photos-{turn}", config.backbone, config.image_size, **how)

    before = probed("before")
    say("featurize: the run")
    report = featurize(config)
    rate = statistics.fmean((before, probed("after")))
    store, photos = FeatureStore(report.store), report.made
    return [_disk(store), Compared("featurize", photos / rate, photos / report.images_per_second, "s")], store


def _rehearse_training(
    config: TrainConfig, store: FeatureStore, folder: Path, say: Callable[[str], None]
) -> list[Compared]:
    made_up = made_up_store(folder / "made-up", store.info.backbone, store.info.image_size)
    photos = photos_drawn(config, store.dataset("train"))

    def probed(turn: str) -> Rates:
        say(f"train, evaluate: rates {turn} the run")
        # a seed of its own: a training that is finished would not be run again
        apart = {"workspace": made_up, "seed": config.seed + (turn == "after")}
        return measure_training(config.model_copy(update=apart), photos)

    before = probed("before")
    say("train, evaluate: the run")
    started = time.perf_counter()
    train(config)
    training = time.perf_counter() - started
    judged = EvaluateConfig(
        workspace=config.workspace,
        classes="seen",
        seeds=1,
        episodes=EPISODES,
        device=config.device,
        threads=config.threads,
    )
    distinct = len(set(tasks_of(ensure_episodes(evaluation_plan(judged, 0), store))))  # the others cost nothing
    done: list[tuple[float, int]] = []
    evaluate(judged, lambda count, _: done.append((time.perf_counter(), count)))
    (started, before_them), (ended, _) = done[0], done[-1]  # without what an evaluation takes before its episodes
    rates = Rates(*map(statistics.fmean, zip(before, probed("after"), strict=True)))
    job = job_of(config, rates, photos, tested=2 * distinct)
    return [
        _reading(photos, config, store),
        Compared("train", job.steps + job.beside, training, "s"),
        Compared("evaluate", job.evaluating * (1 - before_them / EPISODES), ended - started, "s"),
    ]


def check_workspace(workspace: Path, store_key: str | None = None) -> list[Compared]:
    """What a workspace recorded against the plan for the same settings, its rates measured now on this machine.

    The latest finished training counts. Raises InputError where there is no store or no training.
    """
    store = FeatureStore(Workspace(workspace).find_store(store_key))
    config, curve = _latest_training(workspace, store)
    own = store.info
    with tempfile.TemporaryDirectory() as name:
        made_up = made_up_store(Path(name), own.backbone, own.image_size)
        photos = photos_drawn(config, store.dataset("train"))
        rates = measure_training(config.model_copy(update={"workspace": made_up, "store": None}), photos)
    recorded = [
        1 / (later["seconds"] - earlier["seconds"]) * (later["step"] - earlier["step"])
        for earlier, later in pairwise(curve)
        if "seen_miou" not in earlier  # a validation lies between the two
    ]
    if not recorded:
        raise InputError(
            f"--check {workspace}: its training was validated at every report. Train with a larger --val-every."
        )
    return [
        _disk(store),
        _reading(photos, config, store),
        Compared("training steps", 1 / rates.step, statistics.median(recorded), "steps/s"),
    ]


def _latest_training(workspace: Path, store: FeatureStore) -> tuple[TrainConfig, list[dict]]:
    for file in sorted(Workspace(workspace).runs.glob("*/result.json"), key=lambda f: -f.stat().st_mtime):
        config = TrainConfig.model_validate_json((file.parent / "config.json").read_text())
        curve = [json.loads(line) for line in (file.parent / "curve.jsonl").read_text().splitlines()]
        if config.store in (None, store.key) and not config.workers and len(curve) > 2:
            return config, curve
    raise InputError(
        f"{Workspace(workspace).runs} holds no finished training of 30 steps or more in one process on the store "
        f"{store.key}. Run `python cli.py train --workspace {workspace}` first, or use --verify."
    )


def _disk(store: FeatureStore) -> Compared:
    info = store.info
    images = sum(split.images for split in info.splits.values())
    planned = store_bytes(images, bytes_per_image(info.grid, info.channels, info.dtype))
    actual = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
    return Compared("disk", planned / 1e6, actual / 1e6, "MB")


def _reading(planned: float, config: TrainConfig, store: FeatureStore) -> Compared:
    """Photos read in a step, beside those of the episodes that were drawn for the training itself."""
    plan = training_plan(config)
    shards = ensure_episodes(plan, store)
    drawn = [[shards.batch(g, i) for i in range(plan.count or config.steps)] for g in range(len(config.batches))]
    photos = statistics.fmean(sum(1 + len(e.supports) for e in batch) for kind in drawn for batch in kind)
    return Compared("photos read a step", planned, photos, "photos")


def some_photos(coco_dir: PathOrUri, folder: Path, most: int) -> Path:
    """A COCO folder of at most so many photos, a third of them for validation, spread over those of `coco_dir`.

    Raises InputError as `load_coco` does.
    """
    for split, (file, photos) in find_splits(coco_dir).items():
        load_coco(file, photos, split)  # before any of its file names is written to
        content = json.loads(file.read_text())
        count = max(1, most // 3 if split == "val" else most - most // 3)
        images = sorted(content["images"], key=lambda image: image["id"])
        chosen = images[:: max(1, len(images) // count)][:count]
        ids = {image["id"] for image in chosen}
        content |= {"images": chosen, "annotations": [a for a in content["annotations"] if a["image_id"] in ids]}
        (folder / "annotations").mkdir(parents=True, exist_ok=True)
        (folder / "annotations" / file.name).write_text(json.dumps(content))
        (folder / photos.name).mkdir()
        for image in chosen:
            (folder / photos.name / image["file_name"]).write_bytes((photos / image["file_name"]).read_bytes())
    return folder
