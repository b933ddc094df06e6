"""Training: shapes equal on all ranks, resume, two workers, and that it learns."""

import json
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from la.data.folds import fold_classes
from la.episodes.protocols import PROTOCOLS
from la.errors import InputError
from la.evaluation.baselines import BASELINES
from la.evaluation.metrics import FewShotIoU
from la.model.label_anything import LabelAnything
from la.model.label_anything import preset as preset_of
from la.model.official_names import to_official
from pipelines.config import EvaluateConfig, FeaturizeConfig, TrainConfig
from pipelines.demo.scenes import draw_scenes
from pipelines.episodes.batches import BatchBuilder
from pipelines.episodes.episode_shards import draw, ensure_episodes, evaluation_plan, training_plan
from pipelines.evaluation.evaluate import evaluate, extremes_of, score
from pipelines.evaluation.methods import find_method, latest_run
from pipelines.evaluation.shared_work import predictor
from pipelines.runs.checkpoints import load, save
from pipelines.runs.identity import run_dir_of
from pipelines.runs.official_files import import_official
from pipelines.store.featurize import featurize
from pipelines.store.reader import FeatureStore
from pipelines.training import loop
from pipelines.training.loop import Worker, train_loop
from pipelines.training.prepare import prepare
from pipelines.training.run import train
from pipelines.training.step_batches import read_ahead
from pipelines.training.train_on_ray import STARTS, Desk
from sweeps.demo import BACKBONE, IMAGE_SIZE, WEIGHTS


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A workspace with features of a few scenes."""
    return featurized_scenes(tmp_path_factory.mktemp("study"), train_images=80, val_images=48)


def featurized_scenes(root, **counts):
    scenes = draw_scenes(root / "scenes", **counts)
    settings = {"backbone": BACKBONE, "weights": WEIGHTS, "image_size": IMAGE_SIZE}
    featurize(FeaturizeConfig(workspace=root, coco_dir=scenes, **settings))
    return root


def settings(workspace, **changes):
    plain = {
        "preset": "debug",
        "steps": 12,
        "warmup_steps": 2,
        "batches": ((2, 1, 1), (2, 2, 1)),
        "train_batches": 12,
        "val_episodes": 3,
        "val_every": 6,
        "checkpoint_every": 4,
        "threads": 1,
    }
    return TrainConfig(workspace=workspace, **(plain | changes))


def weights_of(path):
    return torch.load(path, weights_only=True)["state"]


@contextmanager
def stopped_after_a_checkpoint(monkeypatch):
    """The training inside ends by KeyboardInterrupt when it has written a checkpoint."""
    save_last = loop.save_last

    def stop(run_dir, content):
        save_last(run_dir, content)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_last", stop)
        with pytest.raises(KeyboardInterrupt):
            yield


class Stop(Exception):
    pass


@pytest.mark.parametrize("preset", ["debug", "hybrid"])
def test_a_stopped_run_goes_on_and_ends_with_the_same_weights(workspace, monkeypatch, preset):
    config = settings(workspace, lr=1.1e-3, preset=preset)
    whole = train(config)
    expected = weights_of(whole.run_dir / "last.pt")
    import pipelines.training.loop as module

    real, saves = module.save_last, []

    def stopping(run_dir, content):
        real(run_dir, content)
        saves.append(run_dir)
        if len(saves) == 2:
            raise Stop

    for file in (*whole.run_dir.glob("*.pt"), whole.run_dir / "result.json"):
        file.unlink()
    monkeypatch.setattr(module, "save_last", stopping)
    with pytest.raises(Stop):
        train(config)
    monkeypatch.setattr(module, "save_last", real)
    reports = []
    again = train(config, reports.append)
    assert reports[0]["step"] > 8, "it went on from the checkpoint of step 8"
    resumed = weights_of(again.run_dir / "last.pt")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    points = [json.loads(line)["step"] for line in (again.run_dir / "curve.jsonl").read_text().splitlines()]
    assert points == sorted(set(points))


def test_a_hybrid_is_fitted_to_the_training_photos_and_evaluated_from_its_checkpoint(workspace):
    run = train(settings(workspace, preset="hybrid"))
    fitted = weights_of(run.checkpoint)["matching.metric.map"]
    assert not torch.equal(fitted, torch.eye(len(fitted)))


def test_a_hybrids_checkpoint_is_evaluated_as_any_other(workspace):
    run = train(settings(workspace, preset="hybrid"))
    score = evaluate(EvaluateConfig(workspace=workspace, checkpoint=run.checkpoint, seeds=1, episodes=4, threads=1))
    assert score.method.startswith("hybrid@")
    with pytest.raises(InputError, match="no token pool"):
        evaluate(EvaluateConfig(workspace=workspace, checkpoint=run.checkpoint, pool_draws=2))


@pytest.fixture(scope="module")
def another(tmp_path_factory):
    """A workspace of other scenes, featurized alike."""
    return featurized_scenes(tmp_path_factory.mktemp("another"), train_images=60, val_images=10)


def test_training_on_two_folders_takes_both_and_leaves_unseen_classes_out_of_both(workspace, another):
    config = settings(workspace, also=(another,), fold=1, preset="hybrid")
    store = FeatureStore(next((workspace / "features").iterdir()))
    plans = prepare(config).sources
    categories = store.dataset("train").categories
    unseen = {categories[c] for c in fold_classes(categories, 1)[1]}
    assert set(plans[1][0].without) == unseen
    drawn = [{c for e in ensure_episodes(plan, of) for c in e.classes} for plan, of in plans]
    for classes, (_, of) in zip(drawn, plans, strict=True):
        assert classes
        assert not {of.dataset("train").categories[c] for c in classes} & unseen
    photos = [[], []]

    class Queries:
        def __init__(self, number):
            self.number = number

        def pack(self, episodes):
            photos[self.number].extend(e.query for e in episodes)

        def truth(self, episodes):
            return None

    sources = [(ensure_episodes(plan, of), Queries(n)) for n, (plan, of) in enumerate(plans)]
    batches = read_ahead(config, sources, 0, 1, 0)
    for _ in range(20):
        next(batches)
    assert all(photos)
    assert train(config).step == 12
    evaluate(EvaluateConfig(workspace=workspace, fold=1, checkpoint=run_dir_of(config), seeds=1, episodes=2))


def test_a_folder_of_other_features_is_not_trained_on(workspace, another, tmp_path):
    scenes, size = another / "scenes", IMAGE_SIZE // 2
    featurize(FeaturizeConfig(workspace=tmp_path, coco_dir=scenes, backbone=BACKBONE, weights=WEIGHTS, image_size=size))
    with pytest.raises(InputError, match=r"--also .* was featurized with image_size"):
        train(settings(workspace, also=(tmp_path,)))


def test_a_finished_run_is_not_repeated(workspace):
    config = settings(workspace)
    first = train(config)
    stamp = (first.run_dir / "last.pt").stat().st_mtime_ns
    assert train(config) == first
    assert (first.run_dir / "last.pt").stat().st_mtime_ns == stamp
    assert run_dir_of(settings(workspace, lr=0.5)) != first.run_dir


def test_a_run_does_not_go_on_with_the_features_of_another_store(workspace):
    config = settings(workspace, seed=21)
    run_dir = train(config).run_dir
    save(run_dir / "last.pt", load(run_dir / "last.pt") | {"store": "0123456789ab"})
    with pytest.raises(InputError, match=r"was trained on the store 0123456789ab.*Pass --name"):
        train(config)


def test_ranks_that_see_different_checkpoints_do_not_train_together(workspace):
    config = settings(workspace, seed=22)
    with pytest.raises(RuntimeError, match="rank 0 goes on from step 10, rank 1 from 0"):
        train_loop(prepare(config), Worker(rank=1, from_rank0=lambda _: 10), lambda _: None)


def test_all_ranks_have_one_shape_in_a_step_and_share_no_episode(workspace):
    config = settings(workspace, train_batches=40)
    store = FeatureStore(next((workspace / "features").iterdir()))
    shards = ensure_episodes(training_plan(config), store)

    class Names:
        def pack(self, episodes):
            return [(len(e.classes), e.index) for e in episodes]

        def truth(self, episodes):
            return None

    def steps(rank, world):
        batches = read_ahead(config, [(shards, Names())], rank, world, 0)
        return [next(batches)[1] for _ in range(10)]

    alone, first, second = steps(0, 1), steps(0, 2), steps(1, 2)
    for one, other in zip(first, second, strict=True):
        assert [ways for ways, _ in one] == [ways for ways, _ in other]
        assert not set(one) & set(other)
    assert [b[0][0] for b in alone] == [b[0][0] for b in first], "a step's shape does not depend on the workers"


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_episodes_of_a_step_are_shared_out_evenly_and_keep_their_places(workspace, world):
    store = FeatureStore(next((workspace / "features").iterdir()))
    plan = training_plan(settings(workspace, batches=((4, 2, 3),), train_batches=12))
    shards = ensure_episodes(plan, store)
    costs, apart = Counter(), Counter()

    def work(episodes):
        return sum(3 if p.points or p.boxes else 2 for e in episodes for p in e.pairs)

    for step in range(12 // world):
        inorder = [e for part in range(world) for e in shards.batch(0, step * world + part)]
        shares = [shards.share(0, step, rank, world) for rank in range(world)]
        assert sorted(place for places, _ in shares for place in places) == list(range(4 * world))
        for rank, (places, episodes) in enumerate(shares):
            assert episodes == [inorder[place] for place in places]
            costs[step, rank] = work(episodes)
            apart[step, rank] = work(inorder[4 * rank : 4 * rank + 4])

    def waited(of):
        return sum(max(of[step, rank] for rank in range(world)) for step in range(12 // world))

    assert waited(costs) < waited(apart) or world == 1


def test_resumed_reading_takes_up_the_same_batches(workspace):
    config = settings(workspace)
    store = FeatureStore(next((workspace / "features").iterdir()))
    shards = ensure_episodes(training_plan(config), store)

    class Indices:
        def pack(self, episodes):
            return [e.index for e in episodes]

        def truth(self, episodes):
            return None

    def take(start, count):
        batches = read_ahead(config, [(shards, Indices())], 0, 1, start)
        return [next(batches)[1] for _ in range(count)]

    assert take(0, 9)[5:] == take(5, 4)


def test_shards_hold_the_drawn_episodes_and_the_same_for_any_number_of_workers(workspace, tmp_path):
    store = FeatureStore(next((workspace / "features").iterdir()))
    plan = training_plan(settings(workspace, seed=5, train_batches=9000))
    digests = []
    for workers in (1, 2):
        shards = ensure_episodes(plan, store, workers)
        digests.append((shards.digest, sorted((p.name, p.read_bytes()) for p in shards.folder.glob("*.parquet"))))
        for path in (*shards.folder.glob("*"),) if workers == 1 else ():
            path.unlink()
    assert digests[0] == digests[1]
    assert len(digests[0][1]) > 2
    drawn = draw(plan, store, 1, 0, 40)
    assert [e for position in range(20) for e in shards.batch(1, position)] == drawn
    tested = evaluation_plan(EvaluateConfig(workspace=workspace, prompt="point_box", episodes=70), 0)
    assert list(ensure_episodes(tested, store)) == draw(tested, store, 0, 0, 70)


def _two_workers(rank, config, port, shared):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

    def wrap(model):
        return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)

    reports = []
    train_loop(prepare(config), Worker(rank, 2, wrap), reports.append)
    shared[rank] = len(reports)
    dist.destroy_process_group()


def train_on_two(config):
    """Number of reports of each rank."""
    run_dir_of(config).mkdir(parents=True)
    (run_dir_of(config) / "config.json").write_text(config.model_dump_json())
    ensure_episodes(training_plan(config), FeatureStore(next((config.workspace / "features").iterdir())))
    shared = mp.get_context("spawn").Manager().dict()
    mp.spawn(_two_workers, (config, _free_port(), shared), nprocs=2)
    return shared


def test_two_gloo_workers_train_one_model(workspace):
    config = settings(workspace, lr=2e-3, workers=2)
    shared = train_on_two(config)
    assert shared[0] > 0
    assert shared[1] == 0, "only rank 0 reports"
    result = json.loads((run_dir_of(config) / "result.json").read_text())
    assert result["step"] == 12


@pytest.mark.parametrize("preset", ["debug", "official"])
def test_two_workers_at_half_the_batch_have_the_gradients_of_one(workspace, preset):
    one = settings(workspace, preset=preset, dim=32, batches=((4, 1, 1), (4, 2, 1)), steps=1)
    two = one.model_copy(update={"batches": ((2, 1, 1), (2, 2, 1)), "workers": 2})
    train(one)
    train_on_two(two)

    def gradients(config):
        state = torch.load(run_dir_of(config) / "last.pt", weights_only=True)["optimiser"]["state"]
        return {number: each["exp_avg"] / 0.1 for number, each in state.items()}  # after one step

    alone, together = gradients(one), gradients(two)
    assert any(gradient.abs().max() > 1e-3 for gradient in alone.values())
    # what no episode used has a zero of one worker and nothing of two, or the other way round
    for number in alone.keys() | together.keys():
        ours, theirs = (found.get(number, torch.zeros(1)) for found in (together, alone))
        torch.testing.assert_close(ours.expand_as(theirs), theirs, atol=1e-5, rtol=0)


def test_workers_start_again_as_long_as_there_is_a_new_checkpoint_in_between():
    desk = Desk()
    assert all(desk.begin(mark) for mark in (None, None, 7, 7, 7, 8, *range(9, 40)))
    assert desk.verdict() is None
    desk.fail("ValueError: odd", mistake=None)
    assert [desk.begin(50) for _ in range(STARTS + 1)] == [True] * STARTS + [False]
    assert desk.verdict() == ("ValueError: odd", None)


def test_a_users_mistake_is_not_tried_again():
    desk = Desk()
    assert desk.begin(None)
    desk.fail("the disk is full", mistake=InputError)
    desk.fail("RuntimeError: the other worker is gone", mistake=None)
    assert not desk.begin(None)
    assert desk.verdict() == ("the disk is full", InputError)


def _free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_evaluation_gives_the_same_bits_again_and_about_the_same_one_by_one(workspace, monkeypatch):
    run = train(settings(workspace))
    config = EvaluateConfig(workspace=workspace, checkpoint=run.run_dir, seeds=1, episodes=9)
    together = evaluate(config)
    assert evaluate(config) == together
    monkeypatch.setattr("pipelines.evaluation.evaluate.SUPPORTS_AT_ONCE", 1)
    apart = evaluate(config)
    assert apart.miou == pytest.approx(together.miou, abs=0.05)
    assert apart.episodes_digest == together.episodes_digest


def test_an_episode_drawn_again_is_predicted_once_and_counts_every_time(workspace):
    store = FeatureStore(next((workspace / "features").iterdir()))
    builder, cpu = BatchBuilder(store, "val"), torch.device("cpu")
    predict = predictor(BASELINES["prototype"], builder, cpu)
    shards = ensure_episodes(evaluation_plan(EvaluateConfig(workspace=workspace, episodes=9, seeds=1), 0), store)

    class Twice:
        manifest = shards.manifest

        def __iter__(self):
            return (episode._replace(index=i) for i, episode in enumerate([*shards, *shards]))

    predicted, progress = [], []
    once = score(predict, shards, builder, cpu)
    twice = score(lambda drawn: predicted.extend(drawn) or predict(drawn), Twice(), builder, cpu, None, progress.append)
    assert twice.episodes == 2 * once.episodes
    assert len(predicted) == len({episode._replace(index=0) for episode in shards})
    assert progress[-1] == 18


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_evaluates(workspace, protocol):
    config = EvaluateConfig(workspace=workspace, method="prototype", protocol=protocol, episodes=12, ways=2, seeds=2)
    result = evaluate(config)
    assert result.protocol == protocol
    low, high = result.interval
    assert low <= high
    assert 0 < result.fb_iou < 100
    store = FeatureStore(next((workspace / "features").iterdir()))
    plans = [evaluation_plan(config, seed) for seed in (0, 1)]
    drawn = [list(ensure_episodes(plan, store)) for plan in plans]
    if PROTOCOLS[protocol].truth == "network":
        builder, size = BatchBuilder(store, "val"), (store.info.image_size + 8,) * 2
        assert builder.full_truth(drawn[0][0], size).shape == size
    for episode in drawn[0]:
        areas = store.dataset("val").class_areas
        assert any(areas[episode.query].get(c, 0) >= PROTOCOLS[protocol].min_area for c in episode.classes)
        for pair in episode.pairs:
            shown = areas[episode.supports[pair.support]][episode.classes[pair.slot]]
            assert shown >= PROTOCOLS[protocol].min_area
    if protocol == "panet":
        assert [len({frozenset(e.classes) for e in episodes}) for episodes in drawn] == [1, 1], (
            "classes are fixed in a run"
        )
    unseen = fold_classes(store.dataset("val").categories, 0, PROTOCOLS[protocol].folds)[1]
    assert {c for episodes in drawn for e in episodes for c in e.classes} <= set(unseen)


def test_variants_at_test_time_change_the_logits(workspace):
    run = train(settings(workspace))
    store = FeatureStore(next((workspace / "features").iterdir()))
    config = EvaluateConfig(workspace=workspace, checkpoint=run.run_dir, seeds=1, episodes=6, ways=2)
    episodes = list(ensure_episodes(evaluation_plan(config, 0), store))

    def logits(**changes):
        method, _, mask_px = find_method(config.model_copy(update=changes), store, torch.device("cpu"))
        with torch.inference_mode():
            return method(BatchBuilder(store, "val", mask_px).pack(episodes))

    plain = logits()
    assert torch.equal(plain, logits())
    for changes in ({"pool_draws": 2}, {"flips": True}):
        other = logits(**changes)
        assert other.shape == plain.shape
        assert (other - plain).abs().max() > 1e-4, changes
    with pytest.raises(InputError, match="--pool-draws is of trained models"):
        logits(method="prototype", pool_draws=2)


def test_contiguous_folds_need_a_checkpoint_trained_on_them(workspace):
    run = train(settings(workspace))
    config = EvaluateConfig(workspace=workspace, checkpoint=run.run_dir, seeds=1, episodes=2, protocol="panet")
    with pytest.raises(InputError, match="train with --fold-lists contiguous"):
        evaluate(config)
    run = train(settings(workspace, fold_lists="contiguous"))
    assert evaluate(config.model_copy(update={"checkpoint": run.run_dir})).protocol == "panet"


def test_the_default_checkpoint_has_not_seen_the_test_classes(workspace):
    store = FeatureStore(next((workspace / "features").iterdir()))
    plain = train(settings(workspace, seed=5))
    train(settings(workspace, seed=6, classes="all"))
    train(settings(workspace, seed=7, fold_lists="contiguous"))
    assert latest_run(EvaluateConfig(workspace=workspace), store) == plain.run_dir
    with pytest.raises(InputError, match="train --fold 3 --fold-lists contiguous"):
        latest_run(EvaluateConfig(workspace=workspace, fold=3, protocol="panet"), store)


def test_a_generalist_may_be_tested_on_what_it_has_seen(workspace):
    run = train(settings(workspace, classes="all"))
    result = evaluate(EvaluateConfig(workspace=workspace, checkpoint=run.run_dir, seeds=1, episodes=2, fold=3))
    assert result.method.startswith("generalist")


def test_a_checkpoint_is_refused_on_classes_it_has_seen(workspace):
    run = train(settings(workspace))
    with pytest.raises(InputError, match="trained on fold 0, so it has seen classes of fold 1"):
        evaluate(EvaluateConfig(workspace=workspace, checkpoint=run.run_dir, fold=1, seeds=1, episodes=2))


def test_an_imported_checkpoint_is_evaluated_on_features_of_its_channels(workspace, tmp_path):
    tiny = {"dim": 32, "two_way_ffn": 24, "block_ffn": 40}
    for channels in (128, 12):
        torch.manual_seed(0)
        state = to_official(LabelAnything(preset_of("official", channels=channels, **tiny)))
        torch.save(state, tmp_path / f"{channels}.pt")
        import_official(str(tmp_path / f"{channels}.pt"), 0, tmp_path / str(channels) / "best.pt")
    config = EvaluateConfig(workspace=workspace, checkpoint=tmp_path / "128", ways=2, shots=2, seeds=1, episodes=3)
    assert 0 <= evaluate(config).miou < 100
    with pytest.raises(InputError, match="takes features of 12 channels"):
        evaluate(config.model_copy(update={"checkpoint": tmp_path / "12"}))


def test_an_untrained_fold_says_what_to_run(workspace):
    with pytest.raises(InputError, match="has no finished training of fold 3"):
        evaluate(EvaluateConfig(workspace=workspace, fold=3, seeds=1, episodes=2))


def test_too_many_ways_for_the_images_are_refused(workspace):
    with pytest.raises(InputError, match="Lower ways or shots"):
        evaluate(EvaluateConfig(workspace=workspace, method="prototype", ways=20, shots=9, seeds=1, episodes=2))


def test_an_empty_workspace_says_what_to_run(tmp_path):
    with pytest.raises(InputError, match="featurize"):
        train(settings(tmp_path))


@pytest.mark.parametrize("name", ["debug", "official"])
def test_work_that_episodes_share_is_done_once_and_changes_nothing(workspace, name):
    store = FeatureStore(next((workspace / "features").iterdir()))
    torch.manual_seed(0)
    model = LabelAnything(preset_of(name, channels=store.info.channels, dim=32)).eval()
    builder = BatchBuilder(store, "val", model.config.mask_px)
    shared = predictor(model, builder, torch.device("cpu"))
    embedded = []
    plain_embed = model.embed
    model.embed = lambda batch, rows: embedded.append(len(batch.support)) or plain_embed(batch, rows)
    for task in ({}, {"ways": 2, "prompt": "mixed"}, {"ways": 2, "shots": 2, "supports": "varied", "prompt": "mixed"}):
        config = EvaluateConfig(workspace=workspace, episodes=12, seeds=1, **task)
        episodes = list(ensure_episodes(evaluation_plan(config, 0), store))
        with torch.inference_mode():
            embedded.clear()
            ours = torch.cat([shared(episodes[:5]), shared(episodes[5:])])
            count = sum(embedded)
            assert torch.equal(shared(episodes[5:]), ours[5:])
            assert sum(embedded) == count, "known supports are not embedded again"
            theirs = model(builder.pack(episodes))
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


def test_galleries_show_no_episode_twice():
    scores = FewShotIoU()
    truth = torch.tensor([[1, 1, 1, 0]])
    for said in (3, 3, 2, 1, 0, 3, 2):
        scores.add((torch.arange(4) < said).long()[None], truth, (5,))
    chosen = extremes_of(scores, per_seed=4, count=2)
    assert [(seed, index) for seed, index, _ in chosen["best"]] == [(0, 0), (0, 2)]
    assert [(seed, index) for seed, index, _ in chosen["worst"]] == [(0, 3), (1, 0)]
    assert chosen["best"][0][2] == 100


def test_the_nearest_supports_are_those_most_like_the_query_and_the_rest_of_an_episode_stays(workspace):
    from pipelines.episodes.episode_shards import evaluation_plan

    store = FeatureStore(next((workspace / "features").iterdir()))
    config = EvaluateConfig(workspace=workspace, classes="seen", shots=2, episodes=6)
    nearest = config.model_copy(update={"support_selection": "nearest"})
    random_ones, found = (list(ensure_episodes(evaluation_plan(c, 0), store)) for c in (config, nearest))
    pool = store.dataset("val").images_by_class(32 * 32)

    def likeness(one, other):
        maps = [torch.nn.functional.normalize(store.read_batch([i])[0].float(), dim=-1) for i in (one, other)]
        means = [torch.nn.functional.normalize(m.mean((0, 1)), dim=-1) for m in maps]
        return (means[0] @ means[1]).item()

    for plain, episode in zip(random_ones, found, strict=True):
        assert (episode.query, episode.classes) == (plain.query, plain.classes)
        others = [i for i in pool[episode.classes[0]] if i != episode.query]
        ranked = sorted(others, key=lambda i: -likeness(episode.query, i))
        assert [likeness(episode.query, i) for i in episode.supports] == pytest.approx(
            [likeness(episode.query, i) for i in ranked[:2]], abs=1e-5
        )
