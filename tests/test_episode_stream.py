"""Episodes without end: the same as of any plan, drawn ahead by another process, in whatever order they are read."""

import pytest
import torch

from pipelines.episodes import episode_shards
from pipelines.episodes.episode_shards import EpisodeStream, draw, ensure_episodes, training_plan
from pipelines.runs.checkpoints import load
from pipelines.store.reader import FeatureStore
from pipelines.training.prepare import run_dir_of
from pipelines.training.run import train
from tests.test_training import featurized_scenes, settings, stopped_after_a_checkpoint


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.setattr(episode_shards, "ROWS_PER_PART", 8)  # 4 batches of two
    return featurized_scenes(tmp_path, train_images=80, val_images=48)


def parts_on_disk(shards):
    return {path.name for path in shards.folder.glob("*.parquet")}


def test_a_stream_holds_the_drawn_episodes_and_draws_no_more_than_it_needs(workspace, monkeypatch):
    monkeypatch.setattr(episode_shards, "STEPS_AHEAD", 2)
    store = FeatureStore(next((workspace / "features").iterdir()))
    plan = training_plan(settings(workspace, train_batches=None))
    shards = ensure_episodes(plan, store)
    assert isinstance(shards, EpisodeStream)
    assert len(parts_on_disk(shards)) == 2 == len(plan.parts)
    expected = draw(plan, store, 1, 0, 60)
    assert [e for position in range(30) for e in shards.batch(1, position)] == expected
    assert sum(name.startswith("b2-n2") for name in parts_on_disk(shards)) in (8, 9)
    assert sum(name.startswith("b2-n1") for name in parts_on_disk(shards)) == 1
    finite = ensure_episodes(training_plan(settings(workspace, train_batches=60)), store)
    assert [e for position in range(30) for e in finite.batch(1, position)] == expected
    again = ensure_episodes(plan, store)
    assert again.batch(1, 17) == expected[34:36]
    assert again.digest == shards.digest
    assert list(again) == [e for group in (0, 1) for e in draw(plan, store, group, 0, 8)]


def test_one_rank_draws_what_all_read_and_any_draws_where_none_does(workspace, monkeypatch):
    store = FeatureStore(next((workspace / "features").iterdir()))
    plan = training_plan(settings(workspace, train_batches=None))
    first, second = (ensure_episodes(plan, store) for _ in range(2))
    drawn = []
    for step in range(20):
        shares = [shards.share(0, step, rank, 2) for rank, shards in enumerate((first, second))]
        placed = dict(pair for places, episodes in shares for pair in zip(places, episodes, strict=True))
        drawn += [placed[place] for place in range(4)]
    assert drawn == draw(plan, store, 0, 0, 80)
    assert second._drawer is None, "rank 0 has drawn"
    monkeypatch.setattr(episode_shards, "PATIENCE", 0.1)
    assert second.share(1, 30, 1, 2)[1], "nobody else draws this"


def test_a_drawing_process_that_died_is_stood_in_for_and_none_outlives_its_stream(workspace):
    store = FeatureStore(next((workspace / "features").iterdir()))
    plan = training_plan(settings(workspace, train_batches=None))
    shards = ensure_episodes(plan, store)
    shards.batch(0, 4)
    shards._drawer.kill()
    shards._drawer.wait()
    assert shards.batch(0, 4000) == draw(plan, store, 0, 8000, 8002)
    other = ensure_episodes(plan, store)
    other.batch(1, 4)
    process = other._drawer
    del other
    assert process.wait(60) == 0


def test_training_on_a_stream_is_that_on_as_many_episodes_and_goes_on_in_its_middle(workspace, monkeypatch):
    weights = {}
    for batches in (60, None):
        config = settings(workspace, train_batches=batches, steps=40, val_every=40, checkpoint_every=17, flips=True)
        weights[batches] = load(train(config).run_dir / "last.pt")["training"]
    run_dir = run_dir_of(config)
    for file in (*run_dir.glob("*.pt"), run_dir / "result.json"):
        file.unlink()
    for part in (workspace / "episodes" / "protocol=la-train").rglob("*.parquet"):
        part.unlink()
    with stopped_after_a_checkpoint(monkeypatch):
        train(config)
    assert load(run_dir / "last.pt")["step"] == 17
    train(config)
    weights["resumed"] = load(run_dir / "last.pt")["training"]
    for other in (None, "resumed"):
        assert all(torch.equal(weights[other][name], tensor) for name, tensor in weights[60].items())
