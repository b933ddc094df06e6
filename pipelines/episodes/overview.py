"""All sets of episodes that a study will need, drawn at once and listed."""

from collections.abc import Callable

from pipelines.config import EpisodesConfig, EvaluateConfig, TrainConfig
from pipelines.episodes.episode_shards import ensure_episodes, evaluation_plan, training_plan
from pipelines.store.reader import FeatureStore
from pipelines.workspace import Workspace


def draw_all(
    config: EpisodesConfig, on_progress: Callable[[int, int], None] | None = None
) -> tuple[list[tuple], dict[str, str]]:
    """Draw what is missing of every fold's training and test episodes; `on_progress` gets (sets done, of all).

    Returns rows of (fold, training or testing, classes, ways, shots, seed, episodes, classes drawn, classes skipped,
    digest), and why classes were skipped. Raises InputError where classes or images are too few.
    """
    features = FeatureStore(Workspace(config.workspace).find_store(config.store))
    plans = []
    for fold in config.folds:
        shared = {"workspace": config.workspace, "fold": fold}
        plans.append(training_plan(TrainConfig(**shared, seed=config.seed, train_batches=config.train_batches)))
        for ways in config.ways:
            for shots in config.shots:
                how = {"prompt": config.prompt, "supports": config.supports, "episodes": config.episodes}
                tested = EvaluateConfig(**shared, ways=ways, shots=shots, **how)
                plans += [evaluation_plan(tested, seed) for seed in range(config.seeds)]
    rows, reasons = [], {}
    for number, plan in enumerate(plans, 1):
        manifest = ensure_episodes(plan, features, config.workers).manifest
        names, skipped = features.dataset(plan.split).categories, manifest["classes_skipped"]
        where = f"fold {plan.fold} {plan.split} {plan.classes}"
        reasons |= {f"{where}: {names[int(category)]}": reason for category, reason in skipped.items()}
        kind = ("training", plan.classes, "mixed", "mixed") if plan.prompt is None else ("testing", plan.classes)
        task = () if plan.prompt is None else plan.batches[0][1:]
        counts = (manifest["episodes"], len(manifest["classes_drawn"]), len(skipped), manifest["digest"][:8])
        rows.append((plan.fold, *kind, *task, plan.seed, *counts))
        if on_progress:
            on_progress(number, len(plans))
    return rows, reasons
